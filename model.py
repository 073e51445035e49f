"""One language model, three kinds of layer: Llama attention and two Mamba mixers that can take its place.

    lm = LM(Config(vocab_size=512, mixers=["attention", "mamba2", "mamba2", "mamba2"]))
    logits = lm(tokens)                               # (B, L) int64 -> (B, L, V)
    state = lm.init_state(batch=2, max_length=100)    # KV caches and SSM states, each row at its own length
    logits = lm(tokens, state)                        # the tokens continue each row; the state moves on
    student = student_from(lm, ["mamba2"] * 4)        # attention weights moved into Mamba mixers
    student.save_pretrained("out/student");  LM.from_pretrained("out/student")

Contents: Config, RMSNorm, RoPE, Attention, MLP, Mamba, Mamba2, Block, State, LM with save and load, devices, config.json,
weight files, released students, student_from.

Glossary, for every file of the repository. Sizes in shape comments, tensors in code:

    size  in code            meaning                        tensor  meaning
    B     batch              sequences in a batch           x       input of a mixer or of a scan
    L     length             tokens in a sequence           dt      step size of the SSM (Delta in the papers)
    D     d_inner            inner channels of a mixer      A       decay rates, A = -exp(A_log) < 0
    N     d_state            state size per channel         B, C    input and output matrices (k and q of attention)
    H, P  n_heads, head_dim  heads, channels of one head    D       skip connection, y += D x
    K     n_kv_heads         heads of keys and values       z       gate, y *= SiLU(z)
    G     groups             groups that share B and C      h       state of the SSM
    V, T  vocab_size, ...    vocabulary, cache capacity     y       output

The tensors B and D clash with the sizes B and D, as they do in the papers: "B: (B, L, G, N)" is the input matrix B.
Weights are (out, in) and carry their upstream names: Hugging Face's for Llama, those of the released MambaInLlama
checkpoints for "mamba", Llamba's for "mamba2".
"""
import contextlib
import dataclasses
import json
import math
import os
import pickle
import platform
import re
import zlib
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import kernels

MIXERS = ("attention", "mamba", "mamba2")
# Parameters that stay float32 in a bf16 model: they are exponentiated or accumulated over the whole sequence.
FLOAT32_PARAMETERS = ("A_log", "A_log_bias", "D", "dt_proj.bias")


# ------------------------------------------------------------------------------------------------ configuration
@dataclass
class Config:
    """Shape of a model. The defaults are the tiny teacher of the built-in experiment.

    `None` means derived: n_kv_heads = n_heads, head_dim = d_model / n_heads, mixers = all attention,
    d_state = 16 for "mamba" and head_dim for "mamba2", dt_rank = ceil(d_model / 16).
    In both Mamba mixers n_heads x head_dim is the inner width. discrete_mamba2 is for all "mamba2" layers; see Mamba2.
    """
    vocab_size: int = 512
    d_model: int = 64
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int = 192
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's; see rope_frequencies
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    max_length: int = 2048  # longest sequence the model was made for; nothing is allocated by it
    mixers: list | None = None  # one of MIXERS per layer
    d_state: int | None = None
    d_conv: int = 4
    dt_rank: int | None = None
    discrete_mamba2: bool = True
    eos_ids: list = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.head_dim = self.head_dim or self.d_model // self.n_heads
        self.mixers = list(self.mixers or ["attention"] * self.n_layers)
        self.dt_rank = self.dt_rank or math.ceil(self.d_model / 16)
        self.eos_ids = list(self.eos_ids)
        if len(self.mixers) != self.n_layers:
            raise ValueError(f"mixers has {len(self.mixers)} entries for n_layers = {self.n_layers}: give one per layer")
        for mixer in self.mixers:
            if mixer not in MIXERS:
                raise ValueError(f"unknown mixer {mixer!r}: choose from {', '.join(MIXERS)}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads = {self.n_heads} is not a multiple of n_kv_heads = {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd: RoPE rotates pairs of channels")
        if "mamba" in self.mixers and (self.n_kv_heads * self.head_dim) % self.state_size("mamba"):
            raise ValueError(f"d_state = {self.state_size('mamba')} does not divide n_kv_heads x head_dim = "
                             f"{self.n_kv_heads * self.head_dim}: the mamba mixer groups channels by d_state")
        rope_frequencies(self)  # refuses an unknown kind of RoPE now rather than at the first token

    def state_size(self, mixer):
        """N of a mixer: MambaInLlama has 16; discrete Mamba-2 has head_dim, so that q and k fit C and B exactly."""
        return self.d_state or (16 if mixer == "mamba" else self.head_dim)


# ------------------------------------------------------------------------------------------------ Llama parts
class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019), normalised in float32, scaled in the input's dtype as in HF Llama."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):  # (B, L, d_model)
        u = x.float()
        u = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * u.to(x.dtype)


def rope_frequencies(config):
    """Angle per position for each channel pair, (head_dim / 2,) float32 (Su et al. 2021).

    Llama 3.1/3.2 stretch the context by slowing the low frequencies by `factor`, keeping the high ones and blending
    in between. Raises ValueError for any other kind of scaling.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = config.rope_theta ** -half
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    kind = scaling.get("rope_type", scaling.get("type", "llama3"))
    if kind == "default":
        return frequencies
    if kind != "llama3":
        raise ValueError(f"unsupported RoPE type {kind!r}: only 'default' and 'llama3' are implemented")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [key for key in keys if key not in scaling]:
        raise ValueError(f"llama3 RoPE scaling lacks {', '.join(missing)}")
    factor, low, high, original = (scaling[key] for key in keys)
    turns = original * frequencies / (2 * math.pi)  # full turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: divide by factor, 1: keep
    return (1 - keep) * frequencies / factor + keep * frequencies


PACK_FROM = 2 ** 18  # entries of a weight; below, calling oneDNN costs more than its product saves


def linear(x, *layers):
    """x W^T for one layer; for several a tuple, from one product if `LM.fuse` has joined their weights."""
    joined, sizes = getattr(layers[0], "joined", None), [len(layer.weight) for layer in layers]
    if joined is None:
        outputs = [F.linear(x, layer.weight) for layer in layers]
    elif joined.is_mkldnn:
        outputs = torch.ops.mkldnn._linear_pointwise(x, joined, None, "none", [], "").split(sizes, dim=-1)
    else:
        outputs = F.linear(x, joined).split(sizes, dim=-1)
    return tuple(outputs) if len(layers) > 1 else outputs[0]


def join(*layers):
    """Get layers ready for `linear`: their weights become views of one tensor, or, on a CPU and if large, a packed copy.

    oneDNN packs a weight into the blocks in which its products read it: at 16 rows that is 1.2 to 3.5 times as fast as a
    product of the plain weight. The plain one is given up (its shape stays, on "meta"), unless tokens are looked up in it.
    """
    weights = [layer.weight.detach() for layer in layers]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    onednn = weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and weight.numel() >= PACK_FROM and (
        weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    layers[0].joined = torch.ops.mkldnn._reorder_linear_weight(weight, 64) if onednn else weight  # 64 rows: fits any number
    for layer, view in zip(layers, weight.split([len(w) for w in weights])):
        if not isinstance(layer, nn.Embedding):
            layer.weight = nn.Parameter(view.to("meta") if onednn else view, requires_grad=False)


def apply_rope(x, cos, sin):
    """Rotate channel pairs (i, i + head_dim/2), HF's half-split layout. x (B, H, L, h), cos and sin (B, 1, L, h/2)."""
    first, second = x.chunk(2, dim=-1)  # (B, H, L, h/2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def per_prompt(function, tensors, caches, lengths, dim=1):
    """A function of a sequence and its cache, for each of the prompts that are packed, one after the other, into one row.

    tensors: (1, total, ...), or with the sequence in another dim; caches: one per prompt, each of one row.
    """
    pieces = zip(*(tensor.split(lengths, dim) for tensor in tensors), caches)
    return torch.cat([function(*piece) for piece in pieces], dim)


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE, as in Llama (Touvron et al. 2023; Ainslie et al. 2023)."""
    PRODUCTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",))  # layers of the same input, for `LM.fuse`

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.d_model, self.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.d_model, self.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.d_model, self.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, config.d_model, bias=False)

    def init_cache(self, layers, batch, max_length, device, dtype):
        shape = (layers, batch, self.n_kv_heads, max_length, self.head_dim)  # keys, values: (layers, B, K, T, h)
        return dict(keys=torch.zeros(shape, device=device, dtype=dtype), values=torch.zeros(shape, device=device, dtype=dtype))

    def project(self, x, rope):
        """q (B, H, L, h), k and v (B, K, L, h), rotated."""
        def heads(u):
            return u.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, L, h)
        q, k, v = map(heads, linear(x, self.q_proj, self.k_proj, self.v_proj))
        return apply_rope(q, *rope), apply_rope(k, *rope), v

    def forward(self, x, rope, cache=None, reads=None):  # x (B, L, d_model)
        q, k, v = self.project(x, rope)
        if cache is None:
            y = self.attend(q, k, v)
        elif isinstance(cache, list):
            y = per_prompt(self.attend_prompt, (q, k, v), cache, reads, dim=2)
        else:
            y = self.attend_cache(q, k, v, cache, reads)
        return linear(y.transpose(1, 2).flatten(2), self.o_proj)  # (B, L, d_model)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.n_heads != self.n_kv_heads)

    def attend_prompt(self, q, k, v, cache):
        cache["keys"][:, :, :k.shape[2]], cache["values"][:, :, :v.shape[2]] = k, v
        return self.attend(q, k, v)

    def attend_cache(self, q, k, v, cache, reads):
        """Write k and v behind each row's past, then attend to the used columns only; on a CPU one group of rows at a time.

        The G = H / K query heads that share a kv head are laid out as G rows of queries of that head, so the cache is
        read in place: no repeated heads, no copies.
        """
        batch, _, length, _ = q.shape
        keys, values = cache["keys"], cache["values"]
        keys[reads.rows, :, reads.columns] = k.transpose(1, 2)  # columns (B, L): where each new token goes
        values[reads.rows, :, reads.columns] = v.transpose(1, 2)
        if reads.on_device:
            return kernels.decode_attention(q[:, :, 0], keys, values, reads.lengths)[:, :, None]  # (B, H, 1, h)
        q = q.unflatten(1, (self.n_kv_heads, -1)).flatten(2, 3)  # (B, K, G * L, h)
        group = self.n_heads // self.n_kv_heads
        y = torch.cat([F.scaled_dot_product_attention(
            q[rows], keys[rows, :, :longest], values[rows, :, :longest],
            attn_mask=mask if group == 1 or length == 1 else mask.repeat(1, 1, group, 1),
        ) for rows, longest, mask in reads.groups])  # (B, K, G * L, h)
        return y.view(batch, self.n_heads, length, self.head_dim)

    def matrix(self, x, rope):
        """The attention matrix softmax(q k^T / sqrt(h)), (B, H, L, L) float32: the target of MOHAWK's first stage."""
        q, k, _ = self.project(x, rope)
        k = k.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)
        scores = (q.float() @ k.float().transpose(2, 3)) * self.head_dim ** -0.5  # (B, H, L, L)
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).tril()
        return scores.masked_fill(~causal, float("-inf")).softmax(-1)


class CacheReads:
    """What one forward pass needs to know about the KV caches: where to write, which columns to read, under what mask.

    Rows of very different lengths share a batch. Reading all rows up to the longest would waste most of the memory
    traffic that decoding is made of, so rows are read in groups of `ROWS`, each up to its own longest row (the sampler
    keeps rows of similar length together). Computed once and shared by all layers.

    A GPU would have to wait for the host to read lengths: there, decoding leaves the groups to kernels.decode_attention.
    """
    ROWS, ON_DEVICE = 32, ("cuda",)

    def __init__(self, lengths, length, dtype):  # lengths (B,): tokens already in each row
        self.rows = torch.arange(len(lengths), device=lengths.device)[:, None]  # (B, 1)
        self.columns = lengths[:, None] + torch.arange(length, device=lengths.device)  # (B, L)
        self.lengths, self.groups = lengths + length, []  # (B,): tokens in each row after the pass
        self.on_device = length == 1 and lengths.device.type in self.ON_DEVICE
        for start in range(0, 0 if self.on_device else len(lengths), self.ROWS):
            rows = slice(start, start + self.ROWS)
            longest = int(lengths[rows].max()) + length
            hidden = torch.arange(longest, device=lengths.device) > self.columns[rows, None, :, None]
            mask = torch.zeros(hidden.shape, dtype=dtype, device=lengths.device).masked_fill_(hidden, float("-inf"))
            self.groups.append((rows, longest, mask))  # mask (rows, 1, L, longest)


def columns_read(lengths):
    """Cache columns that one decoding step reads for rows of these lengths (B,), in groups of CacheReads.ROWS."""
    return sum(int(rows.max()) * len(rows) for rows in lengths.split(CacheReads.ROWS))


class MLP(nn.Module):
    """SwiGLU: down(SiLU(gate x) * up x) (Shazeer 2020)."""
    PRODUCTS = (("gate_proj", "up_proj"), ("down_proj",))

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x):
        gate, up = linear(x, self.gate_proj, self.up_proj)
        return linear(F.silu(gate) * up, self.down_proj)


# ------------------------------------------------------------------------------------------------ Mamba mixers
class Mamba(nn.Module):
    """The Mamba-1 mixer of MambaInLlama (Wang et al. 2024), whose x, B, C and out stand where v, k, q and o stood.

        x = SiLU(conv(repeat(W_x u)))   B = repeat(W_B u)   C = W_C u   dt = softplus(W_dt W_down u + b)
        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t      y_t = C_t h_t + D x_t      out = W_o (y * SiLU(W_z u))

    Channels form groups of d_state that share B and C; `repeat` copies whole groups of the K kv heads to H heads.
    B and C have neither convolution nor activation nor RoPE. The dt bias is added once; released checkpoints were
    trained with it added twice, which is for the loader to fold in.
    """
    PRODUCTS = (("in_proj_x", "B_proj", "C_proj", "in_proj_z", "dt_proj_down"), ("out_proj",))

    def __init__(self, config):
        super().__init__()
        inner, inner_kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.d_inner, self.d_state, self.repeats = inner, config.state_size("mamba"), config.n_heads // config.n_kv_heads
        self.in_proj_x = nn.Linear(config.d_model, inner_kv, bias=False)
        self.B_proj = nn.Linear(config.d_model, inner_kv, bias=False)
        self.C_proj = nn.Linear(config.d_model, inner, bias=False)
        self.in_proj_z = nn.Linear(config.d_model, inner, bias=False)
        self.dt_proj_down = nn.Linear(config.d_model, config.dt_rank, bias=False)
        self.dt_proj = nn.Linear(config.dt_rank, inner, bias=True)
        self.conv1d = nn.Conv1d(inner, inner, config.d_conv, groups=inner)
        self.A_log = nn.Parameter(torch.empty(inner, self.d_state))  # (D, N)
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.d_model, bias=False)

    def reset_parameters(self):
        """A = -1 .. -N in every channel. dt starts log-uniform in [0.001, 0.1] (Gu & Dao 2023, section 3.6); the bias is
        its inverse softplus."""
        self.A_log.data.copy_(torch.arange(1.0, self.d_state + 1).log())
        nn.init.uniform_(self.dt_proj.weight, -self.dt_proj.in_features ** -0.5, self.dt_proj.in_features ** -0.5)
        dt = torch.empty(self.d_inner).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_proj.bias.data.copy_(dt + torch.log(-torch.expm1(-dt)))

    def init_cache(self, layers, batch, max_length, device, dtype):
        window = torch.zeros(layers, batch, self.conv1d.kernel_size[0] - 1, self.d_inner, device=device, dtype=dtype)
        return dict(window=window.transpose(2, 3),  # (layers, B, D, W-1)
                    h=torch.zeros(layers, batch, self.d_inner, self.d_state, device=device))  # (layers, B, D, N)

    def repeat(self, u):
        """(B, L, K h) -> (B, L, H h): groups of d_state channels, each repeated consecutively."""
        return u.unflatten(-1, (-1, self.d_state)).repeat_interleave(self.repeats, dim=-2).flatten(-2)

    def forward(self, u, rope, cache=None, reads=None):  # u (B, L, d_model); rope and reads are attention's
        x, B, C, z, dt = linear(u, self.in_proj_x, self.B_proj, self.C_proj, self.in_proj_z, self.dt_proj_down)
        x = self.repeat(x)  # (B, L, D), as z
        B = self.repeat(B).unflatten(-1, (-1, self.d_state))  # (B, L, G, N)
        C = C.unflatten(-1, (-1, self.d_state))  # (B, L, G, N)
        dt = F.linear(dt, self.dt_proj.weight)  # (B, L, D), its bias is added in the scan
        if isinstance(cache, list):
            y = per_prompt(self.scan, (x, B, C, z, dt), cache, reads)
        else:
            y = self.scan(x, B, C, z, dt, cache)
        return linear(y, self.out_proj)  # (B, L, d_model)

    def scan(self, x, B, C, z, dt, cache):
        """All that mixes tokens, and the gate: (B, L, D)."""
        A = -torch.exp(self.A_log.float())  # (D, N)
        dt_bias = self.dt_proj.bias.float()
        weight, bias = self.conv1d.weight, self.conv1d.bias
        if cache is not None and x.shape[1] == 1:
            window, h = cache["window"], cache["h"]
            x = F.silu(kernels.causal_conv_step(window, x[:, 0], weight, bias))  # (B, D)
            return kernels.selective_step(h, x, dt[:, 0], A, B[:, 0], C[:, 0], self.D, z[:, 0], dt_bias, True)[:, None]
        window, h = (None, None) if cache is None else (cache["window"], cache["h"])
        x, new_window = kernels.causal_conv(x, weight, bias, window)
        y, new_h = kernels.selective_scan(F.silu(x), dt, A, B, C, self.D, z, dt_bias, True, h)
        if cache is not None:
            window.copy_(new_window)
            h.copy_(new_h)
        return y


class Mamba2(nn.Module):
    """The discrete Mamba-2 mixer of Llamba and phi-mamba (Bick et al. 2024, 2025): one scalar decay per head and token.

        (x, B, C, z, a) = W_in u        (x, B, C) <- causal conv(x, B, C)        decay = sigmoid(-(a + a_bias))
        h_t = decay_t h_{t-1} + x_t B_t^T      y_t = h_t C_t + D x_t      out = W_o (y * SiLU(z + z_bias))

    log decay = -softplus(a). As a matrix over time, y = T x with T_ts = C_t . B_s prod_{s<r<=t} decay_r: causal linear
    attention with forgetting, which is why q, k, v and o of attention fit C, B, x and out. a_bias (zero in Llamba
    checkpoints, which lack it) lets the heads start at different memory lengths.

    With discrete_mamba2 = False it is the Mamba-2 of Dao & Gu (2024), as released MambaInLlama checkpoints have it
    (MambaInLlama mamba2/hybrid_mamba_layer.py): softplus(a + a_bias) is a step size dt, and

        (x, B, C) <- SiLU(conv(x, B, C))     decay = exp(-dt exp(A_log))     h_t = decay_t h_{t-1} + dt_t x_t B_t^T
        out = W_o norm(y * SiLU(z + z_bias)),  an RMS norm over each head's channels
    """
    PRODUCTS = (("in_proj",), ("out_proj",))

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.head_dim, self.d_state = config.n_heads, config.head_dim, config.state_size("mamba2")
        inner = self.n_heads * self.head_dim
        self.sizes = [inner, self.n_heads * self.d_state, self.n_heads * self.d_state, inner, self.n_heads]  # x B C z a
        self.conv_channels = sum(self.sizes[:3])
        self.in_proj = nn.Linear(config.d_model, sum(self.sizes), bias=False)
        self.z_bias = nn.Parameter(torch.zeros(inner))
        self.A_log_bias = nn.Parameter(torch.zeros(self.n_heads))
        self.conv1d = nn.Conv1d(self.conv_channels, self.conv_channels, config.d_conv, groups=self.conv_channels)
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.out_proj = nn.Linear(inner, config.d_model, bias=False)
        self.discrete = config.discrete_mamba2
        if not self.discrete:
            self.A_log = nn.Parameter(torch.zeros(self.n_heads))
            self.norm = RMSNorm(inner, eps=1e-5)

    def reset_parameters(self):
        """Nothing special from scratch; `student_from` overwrites what matters."""

    def init_cache(self, layers, batch, max_length, device, dtype):
        window = torch.zeros(layers, batch, self.conv1d.kernel_size[0] - 1, self.conv_channels, device=device, dtype=dtype)
        return dict(window=window.transpose(2, 3),  # (layers, B, conv channels, W-1)
                    h=torch.zeros(layers, batch, self.n_heads, self.head_dim, self.d_state, device=device))

    def split(self, xBC):
        """(..., conv channels) -> x (..., H, P), B (..., H, N), C (..., H, N)."""
        xBC = xBC if self.discrete else F.silu(xBC)
        return (u.unflatten(-1, (self.n_heads, -1)) for u in xBC.split(self.sizes[:3], dim=-1))

    def project(self, u):
        """xBC before the convolution (B, L, conv channels), z (B, L, D), log decay (B, L, H) and dt, both float32."""
        xBC, z, a = linear(u, self.in_proj).split([self.conv_channels, *self.sizes[3:]], dim=-1)
        dt = F.softplus(a.float() + self.A_log_bias.float())  # (B, L, H)
        return xBC, z, -dt if self.discrete else -dt * self.A_log.float().exp(), dt

    def step_input(self, x, dt):
        """What enters the state: x itself, or dt x. x (..., H, P), dt (..., H)."""
        return x if self.discrete else (x * dt[..., None]).to(x.dtype)

    def gate(self, y, z):  # (B, L, D)
        y = y * F.silu(z + self.z_bias)
        if self.discrete:
            return y
        heads = y.unflatten(-1, (self.n_heads, -1)).float()  # (B, L, H, P)
        return self.norm.weight * F.rms_norm(heads, heads.shape[-1:], eps=self.norm.eps).flatten(2).to(y.dtype)

    def forward(self, u, rope, cache=None, reads=None):  # u (B, L, d_model); rope and reads are attention's
        xBC, z, log_decay, dt = self.project(u)
        if isinstance(cache, list):
            y = per_prompt(self.scan, (xBC, log_decay, dt), cache, reads)
        else:
            y = self.scan(xBC, log_decay, dt, cache)
        return linear(self.gate(y, z), self.out_proj)  # (B, L, d_model)

    def scan(self, xBC, log_decay, dt, cache):
        """All that mixes tokens: (B, L, D)."""
        weight, bias = self.conv1d.weight, self.conv1d.bias
        if cache is not None and xBC.shape[1] == 1:
            window, h = cache["window"], cache["h"]
            x, B, C = self.split(kernels.causal_conv_step(window, xBC[:, 0], weight, bias))  # (B, H, P | N | N)
            y = kernels.ssd_step(h, self.step_input(x, dt[:, 0]), log_decay[:, 0], B, C)  # (B, H, P)
            y, x = y[:, None], x[:, None]  # (B, 1, H, P)
        else:
            window, h = (None, None) if cache is None else (cache["window"], cache["h"])
            xBC, new_window = kernels.causal_conv(xBC, weight, bias, window)
            x, B, C = self.split(xBC)  # (B, L, H, P | N | N)
            y, new_h = kernels.ssd(self.step_input(x, dt), log_decay, B, C, h,
                                   chunk=32 if xBC.device.type == "cpu" else 64)  # (B, L, H, P)
            if cache is not None:
                window.copy_(new_window)
                h.copy_(new_h)
        return (y + self.D[:, None].to(y.dtype) * x).flatten(2)  # (B, L, D)

    def matrix(self, u, rope):
        """T with D on its diagonal, (B, H, L, L) float32: what MOHAWK's first stage compares with attention."""
        xBC, _, log_decay, dt = self.project(u)
        xBC, _ = kernels.causal_conv(xBC, self.conv1d.weight, self.conv1d.bias)
        _, B, C = self.split(xBC)
        skip = torch.diag_embed(self.D.float()[:, None].expand(-1, u.shape[1]))  # (H, L, L)
        return kernels.mixing_matrix(log_decay, self.step_input(B.float(), dt), C.float()) + skip


# ------------------------------------------------------------------------------------------------ the model
class Block(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x)); the mixer is the only thing that distillation replaces.

    Mixers take their layer's cache of a State, and a CacheReads; in `LM.prefill`, where x holds several prompts, one after
    the other, lists of their caches and of their lengths.
    """

    def __init__(self, config, mixer):
        super().__init__()
        self.mixer = {"attention": "self_attn", "mamba": "mamba", "mamba2": "mamba2"}[mixer]  # name in checkpoints
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.add_module(self.mixer, {"attention": Attention, "mamba": Mamba, "mamba2": Mamba2}[mixer](config))
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    def mix(self):
        """The mixer module, whatever its kind."""
        return getattr(self, self.mixer)

    def forward(self, x, rope, cache=None, reads=None):  # (B, L, d_model)
        x = x + self.mix()(self.input_layernorm(x), rope, cache, reads)
        return x + self.mlp(self.post_attention_layernorm(x))


class State:
    """Where every row of a batch stands: its length, and each layer's cache. All tensors of `layers` have the rows in front.

    An attention layer has keys and values (B, K, T, h); a Mamba layer has the convolution's window and the state h. They
    are views of `stacks`, {mixer: {name: tensor of all its layers}}: so a row starts in a few copies, however deep the model.
    """

    def __init__(self, lengths, stacks, mixers):
        self.lengths, self.stacks, self.mixers = lengths, stacks, mixers  # (B,) int64, (layers, B, ...), one name per layer
        self.unstack()

    def unstack(self):
        places = [self.mixers[:i].count(mixer) for i, mixer in enumerate(self.mixers)]  # of each layer among its kind
        self.layers = [{name: tensor[i] for name, tensor in self.stacks[mixer].items()} for mixer, i in zip(self.mixers, places)]

    def put(self, row, source):
        """Make a row a copy of the only row of `source`, whose KV caches may be shorter (a prompt's exact length)."""
        self.lengths[row] = source.lengths[0]
        for mixer, stack in self.stacks.items():
            for name, tensor in source.stacks[mixer].items():
                stack[name][:, row][(slice(None), *map(slice, tensor.shape[2:]))] = tensor[:, 0]

    def select(self, rows):
        """Keep these rows, in this order, in place: sorts or shrinks a batch. Unused cache columns stay where they are."""
        used = int(self.lengths.max())
        self.lengths = self.lengths[rows]
        for stack in self.stacks.values():
            for name, tensor in stack.items():
                columns = (slice(None), slice(used)) if name in ("keys", "values") else ()
                for layer in tensor:
                    layer[(slice(len(rows)), *columns)] = layer[(rows, *columns)]
                stack[name] = tensor[:, :len(rows)]
        self.unstack()


class LM(nn.Module):
    """Embedding, blocks, norm, head. Module names are Hugging Face's, so state-dict keys are checkpoint keys."""
    architecture = "LlamaForCausalLM"  # its name in config.json

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.model.layers = nn.ModuleList(Block(config, mixer) for mixer in config.mixers)
        self.model.norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if self.device.type != "meta":
            self.apply(self.reset_parameters)

    def reset_parameters(self, module):
        """Normal weights of variance 1 / fan-in; what writes to the residual stream is scaled down with depth (GPT-2)."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        if isinstance(module, (Mamba, Mamba2)):
            module.reset_parameters()
        if isinstance(module, Block):
            out = getattr(module.mix(), "o_proj", None) or module.mix().out_proj
            for weight in (out.weight, module.mlp.down_proj.weight):
                weight.data.mul_((2 * self.config.n_layers) ** -0.5)

    @property
    def layers(self):
        return self.model.layers

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.model.embed_tokens.weight.dtype

    def num_parameters(self):
        return sum(parameter.numel() for parameter in self.parameters())

    def fuse(self):
        """Join the weights that meet the same input, for decoding. The last thing done to a model: see `join`."""
        for layers in self.products():
            if not hasattr(layers[0], "joined"):
                join(*layers)
        return self

    def products(self):
        """Lists of layers that meet the same input, the head last."""
        products = [[getattr(m, name) for name in names] for m in self.modules() for names in getattr(m, "PRODUCTS", ())]
        return [*products, [self.model.embed_tokens if self.config.tie_embeddings else self.lm_head]]

    def rope(self, positions):
        """cos and sin for positions (B, L), each (B, 1, L, h/2) in the model's dtype; angles in float32."""
        if not hasattr(self, "frequencies") or self.frequencies.device != positions.device:
            self.frequencies = rope_frequencies(self.config).to(positions.device)
        angles = positions[:, None, :, None].float() * self.frequencies
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def head(self, x):
        """Logits (B, L, V) of the residual stream after the last block (B, L, d_model)."""
        return linear(self.model.norm(x), self.model.embed_tokens if self.config.tie_embeddings else self.lm_head)

    def init_state(self, batch, max_length):
        """An empty state for `batch` rows of up to `max_length` tokens. SSM states are float32 and do not grow."""
        mixers = [block.mixer for block in self.layers]
        stacks = {mixer: self.layers[mixers.index(mixer)].mix().init_cache(
            mixers.count(mixer), batch, max_length, self.device, self.dtype) for mixer in dict.fromkeys(mixers)}
        return State(torch.zeros(batch, dtype=torch.long, device=self.device), stacks, mixers)

    def trunk(self, tokens, state=None):
        """tokens (B, L) -> the residual stream after the last block, (B, L, d_model): all but the head."""
        batch, length = tokens.shape
        x = self.model.embed_tokens(tokens)  # (B, L, d_model)
        if state is None:
            rope = self.rope(torch.arange(length, device=tokens.device)[None])
            for block in self.layers:
                x = block(x, rope)
            return x
        reads = CacheReads(state.lengths, length, self.dtype)
        rope = self.rope(reads.columns)
        with torch.no_grad():  # the caches change in place, which gradients could not follow
            for block, cache in zip(self.layers, state.layers):
                x = block(x, rope, cache, reads)
        state.lengths += length
        return x

    @torch.no_grad()
    def prefill(self, prompts):
        """Run prompts, token lists of any lengths, packed into one row without padding; the head at their ends only.

        Returns for each a state of one row, whose caches have the prompt's length, and the logits (number of prompts, V).
        """
        lengths = [len(prompt) for prompt in prompts]
        states = [self.init_state(1, length) for length in lengths]
        tokens = torch.tensor([[token for prompt in prompts for token in prompt]], device=self.device)  # (1, total)
        x = self.model.embed_tokens(tokens)  # (1, total, d_model)
        rope = self.rope(torch.cat([torch.arange(length, device=self.device) for length in lengths])[None])
        for block, *caches in zip(self.layers, *(state.layers for state in states)):
            x = block(x, rope, caches, lengths)
        for state, length in zip(states, lengths):
            state.lengths += length
        ends = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        return states, self.head(x[:, ends])[0]

    def forward(self, tokens, state=None):
        """tokens (B, L) int64 -> logits (B, L, V). With a state, the tokens continue each row and the state is updated."""
        return self.head(self.trunk(tokens, state))

    def hidden_states(self, tokens):
        """The residual stream before every block and after the last, before the final norm: n_layers + 1 of (B, L, d)."""
        rope = self.rope(torch.arange(tokens.shape[1], device=tokens.device)[None])
        states = [self.model.embed_tokens(tokens)]
        for block in self.layers:
            states.append(block(states[-1], rope))
        return states

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, each under a temporary name first. Loads in transformers if a Llama."""
        os.makedirs(folder, exist_ok=True)
        weights, config = (os.path.join(folder, name) for name in ("model.safetensors", "config.json"))
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, weights + ".tmp", metadata={"format": "pt"})
        with open(config + ".tmp", "w") as f:
            json.dump(to_hf_config(self.config, self.dtype, self.architecture), f, indent=2)
        os.replace(weights + ".tmp", weights)
        os.replace(config + ".tmp", config)

    @classmethod
    def from_pretrained(cls, folder, device=None, dtype=None):
        """Load a folder or a Hugging Face repository: ours, any Llama's, a released MambaInLlama's or Llamba's.

        dtype: of the weights in memory (default: as stored), except FLOAT32_PARAMETERS. Raises FileNotFoundError for
        a missing file and ValueError for an unsupported model or a missing, extra or misshapen tensor, naming it.
        Tensors are read one by one: the peak of memory is little above the size of the model.
        """
        folder = checkpoint_folder(folder)
        values, stored = read_config(folder), stored_tensors(folder)
        config = from_hf_config(released_values(values, stored), cls.architecture)
        with shapes_only():
            lm = cls(config)
        lm.load_state_dict(read_tensors(folder, values, stored, lm, device or "cpu", dtype), assign=True)
        return lm


class Verifier(LM):
    """An LM with one number per token in place of logits: is this text on the way to the right answer (Cobbe et al. 2021)?

    verifier(tokens) -> (B, L), log-odds; a text's own is that at its last token. On disk it is transformers'
    LlamaForSequenceClassification with one label, the layout of many released reward models too.
    """
    architecture = "LlamaForSequenceClassification"

    def __init__(self, config):
        super().__init__(dataclasses.replace(config, tie_embeddings=True))  # there is no lm_head, whatever the config says
        self.score = nn.Linear(config.d_model, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def head(self, x):
        return self.score(self.model.norm(x))[..., 0]  # (B, L)


# ------------------------------------------------------------------------------------------------ devices
def choose_device(device=None, dtype=None):
    """(torch.device, torch.dtype): what was asked for, else cuda in bfloat16 if there is one, else cpu in float32."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but PyTorch finds no GPU here: use --device cpu or leave it out")
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = dtype or ("bfloat16" if chosen.type == "cuda" else "float32")
    print(f"device: {device_name(chosen)} ({'asked for' if device else 'chosen automatically'}), "
          f"dtype: {kind} ({'asked for' if dtype else f'the default on {chosen.type}'})", flush=True)
    return chosen, getattr(torch, kind)


def device_name(device):
    """"cuda (NVIDIA ...)" or "cpu (name, threads)"."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            name = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), name)
    return f"cpu ({name}, {torch.get_num_threads()} threads)"


def fingerprint(folder):
    """CRC-32 of a checkpoint's weights: tells whether two runs used the same model."""
    crc, folder = 0, checkpoint_folder(folder)
    for name in sorted(os.listdir(folder)):
        if name.endswith((".safetensors", ".bin")):
            with open(os.path.join(folder, name), "rb") as f:
                while block := f.read(1 << 24):
                    crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


# ------------------------------------------------------------------------------------------------ config.json
# Config field -> key of a Hugging Face Llama config. Fields of ours (mixers, d_state, ...) keep their own names.
HF_KEYS = dict(vocab_size="vocab_size", d_model="hidden_size", n_layers="num_hidden_layers",
               n_heads="num_attention_heads", n_kv_heads="num_key_value_heads", head_dim="head_dim",
               d_ff="intermediate_size", rope_theta="rope_theta", rope_scaling="rope_scaling",
               norm_eps="rms_norm_eps", tie_embeddings="tie_word_embeddings", max_length="max_position_embeddings",
               mixers="mixers", d_state="d_state", d_conv="d_conv", dt_rank="dt_rank", discrete_mamba2="discrete_mamba2",
               eos_ids="eos_token_id")
# Keys of which only one value (or null, or none at all) is implemented here.
ONLY = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, rope_interleaved=False, partial_rotary_factor=1.0,
            sliding_window=None, quantization_config=None)


def to_hf_config(config, dtype, architecture=LM.architecture):
    """The dict that goes into config.json: a Hugging Face Llama config plus our keys."""
    fixed = dict(architectures=[architecture], model_type="llama", hidden_act="silu", attention_bias=False,
                 mlp_bias=False, torch_dtype=str(dtype).removeprefix("torch."))
    if architecture == Verifier.architecture:
        fixed["num_labels"] = 1
    fields = {HF_KEYS[name]: value for name, value in dataclasses.asdict(config).items()}
    if fields["rope_scaling"]:
        fields["rope_scaling"] = {"rope_type": "llama3", **fields["rope_scaling"]}
    return fixed | fields | {"eos_token_id": config.eos_ids or None}


def from_hf_config(values, architecture=LM.architecture):
    """Config of a config.json dict, old layout (rope_theta, rope_scaling) or new (rope_parameters)."""
    if values.get("model_type") != "llama":
        raise ValueError(f"unsupported model_type {values.get('model_type')!r}: only 'llama' and 'llamba' are implemented")
    refuse_unless(values | (values.get("rope_parameters") or values.get("rope_scaling") or {}), ONLY, "config")
    if values.get("architectures") and architecture not in values["architectures"] and "mamba_config" not in values:
        raise ValueError(f"unsupported architecture {', '.join(values['architectures'])}: only {architecture} can be used here")
    values = dict(values)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if scaling.get("rope_type", scaling.get("type", "default")) == "default":
        scaling = None
    values["rope_scaling"] = scaling
    eos = values.get("eos_token_id")
    values["eos_token_id"] = [] if eos is None else [eos] if isinstance(eos, int) else eos
    missing = [key for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                               "intermediate_size") if values.get(key) is None]
    if missing:
        base = f" (copy it from that of {values['_name_or_path']})" if values.get("_name_or_path") else ""
        raise ValueError(f"config.json lacks {', '.join(missing)}{base}")
    values.setdefault("tie_word_embeddings", False)  # Hugging Face's default for a Llama that does not say
    return Config(**{field: values[key] for field, key in HF_KEYS.items() if key in values})


def refuse_unless(values, only, what):
    """ValueError if a key of `only` is in `values` with another value than the one implemented (or null)."""
    for key, value in only.items():
        if values.get(key) not in (None, value):
            raise ValueError(f"unsupported {what}: {key} = {values[key]!r}, only {json.dumps(value)} is implemented")


def read_config(folder):
    """The dict of a folder's config.json; if MambaInLlama released it, with its mamba_config.json under "mamba_config"."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint in {folder}: expected config.json and model.safetensors there")
    values = read_json(path)
    path = os.path.join(folder, "mamba_config.json")
    if os.path.isfile(path) and "mixers" not in values:  # with mixers: what we saved ourselves
        values["mamba_config"] = read_json(path)
    return values


def read_json(path):
    try:
        with open(path) as f:
            values = json.load(f)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return values


# ------------------------------------------------------------------------------------------------ weight files
BLOCK = 1 << 23  # bytes of a tensor that are read at a time; of a .bin, slow to open (25 ms), eight times as many


def hub_folder(path_or_repo, patterns):
    """The folder itself, or where huggingface_hub keeps its copy of the files of "org/name" that match the patterns.

    A name of that form counts as a repository unless its first half is a folder here ("out/pure" is a missing folder).
    Raises FileNotFoundError, in one line, if the Hub cannot give the files.
    """
    name = str(path_or_repo)
    if os.path.exists(name) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or os.path.isdir(name.split("/")[0]):
        return name
    try:
        import huggingface_hub
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        raise FileNotFoundError(f"no folder {name}; to download it: pip install huggingface_hub") from None
    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=list(patterns))
    except GatedRepoError:
        reason = "the Hugging Face repository is gated: accept its terms there, then `hf auth login` or set HF_TOKEN"
    except RepositoryNotFoundError:
        reason = "no Hugging Face repository of that name either (if it is private: `hf auth login` or set HF_TOKEN)"
    except LocalEntryNotFoundError:
        reason = "the Hugging Face Hub cannot be reached and there is no downloaded copy: go online, or give a folder"
    except Exception as error:  # whatever else goes wrong on the way: disk, network, server
        reason = f"downloading it failed: {type(error).__name__}: {first_line(error)}"
    raise FileNotFoundError(f"no folder {name}; {reason}")


def checkpoint_folder(path_or_repo):
    """The folder of a checkpoint's config and weights; from the Hub safetensors, .bin only where a release has no others."""
    folder = hub_folder(path_or_repo, ("*.json", "model*.safetensors"))
    return folder if weight_files(folder) else hub_folder(path_or_repo, ("*.json", "pytorch_model*.bin"))


def first_line(error):
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def weight_files(folder):
    """Paths of a folder's weights: safetensors, pytorch_model.bin only where there are none; sharded or not."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return [path]
        if os.path.isfile(path + ".index.json"):
            files = set(read_json(path + ".index.json").get("weight_map", {}).values())
            return [os.path.join(folder, file) for file in sorted(files)]
    return []


def open_weights(path):
    """{name: (shape, rows)} of a weight file; rows[i:j] is read when it is asked for."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such file: {path}")
    try:
        if path.endswith(".bin"):
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            return {name: (tuple(tensor.shape), tensor) for name, tensor in tensors.items()}
        file = safe_open(path, framework="pt")
        rows = {name: file.get_slice(name) for name in file.keys()}
        return {name: (tuple(tensor.get_shape()), tensor) for name, tensor in rows.items()}
    except (SafetensorError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a readable weight file: {first_line(error)}") from None


def stored_tensors(folder):
    """{name: (path, shape)} of all tensors of a folder, without those that the config determines (in files of 2023)."""
    paths = weight_files(folder)
    if not paths:
        raise FileNotFoundError(f"no such file: {os.path.join(folder, 'model.safetensors')}")
    return {name: (path, shape) for path in paths for name, (shape, _) in open_weights(path).items()
            if not name.endswith("rotary_emb.inv_freq")}


def read_blocks(path, name, start, shape):
    """Yield (i, rows) for rows start .. start + shape[0] of a stored tensor, rows i, i + 1, ... of them at a time.

    Pages of a mapped file count as memory until it is closed. So it is opened for every block anew (0.1 ms), and
    neither a large file nor a large tensor is ever in memory beside its copy.
    """
    step = max(1, BLOCK * (8 if path.endswith(".bin") else 1) // (4 * math.prod(shape[1:])))
    for i in range(0, shape[0], step):
        yield i, open_weights(path)[name][1][start + i:start + min(i + step, shape[0])]


@contextlib.contextmanager
def shapes_only():
    """Models made in here have shapes but no memory. Embedding's normal_ would import sympy there: a second and 75 MB."""
    normal, nn.init.normal_ = nn.init.normal_, lambda tensor, *args, **kwargs: tensor
    try:
        with torch.device("meta"):
            yield
    finally:
        nn.init.normal_ = normal


def read_rows(path, name, start, shape, device, dtype):
    """Rows start, ... of a stored tensor as a tensor of this shape, in memory of its own."""
    tensor = None
    for i, rows in read_blocks(path, name, start, shape):
        if not rows.is_floating_point():
            raise ValueError(f"{path}: tensor {name} is stored as {rows.dtype}: only floating point is implemented")
        if tensor is None:
            tensor = torch.empty(shape, device=device, dtype=dtype or rows.dtype)
        tensor[i:i + len(rows)] = rows
    return tensor


def read_tensors(folder, values, stored, lm, device, dtype):
    """The state dict of `lm` from the files, every tensor checked, read and cast."""
    ours = {name: tuple(tensor.shape) for name, tensor in lm.state_dict().items()}
    pieces = {name: stored_pieces(values, lm.config, name, shape[0], stored) for name, shape in ours.items()}
    expected = {}  # stored name -> shape: the last row that any piece of it needs
    for name, piece in ((name, piece) for name in ours for piece in pieces[name]):
        rows = max(piece.start + piece.rows, expected.get(piece.name, (0,))[0])
        expected[piece.name] = (rows, *ours[name][1:])
    if lm.config.tie_embeddings and "lm_head.weight" in stored:  # stored all the same: harmless if it is the embedding
        expected["lm_head.weight"] = ours["model.embed_tokens.weight"]
    for name in sorted(expected.keys() | stored.keys()):
        if name not in stored:
            raise ValueError(f"{folder}: tensor {name} is missing, expected shape {expected[name]}")
        path, shape = stored[name]
        if name not in expected:
            raise ValueError(f"{folder}: unexpected tensor {name} of shape {shape}")
        if shape != expected[name]:
            raise ValueError(f"{folder}: tensor {name} has shape {shape}, expected {expected[name]}")

    tensors = {}
    for name, shape in ours.items():
        kind = torch.float32 if name.endswith(FLOAT32_PARAMETERS) else dtype
        parts = []
        for piece in pieces[name]:
            rows = read_rows(stored[piece.name][0], piece.name, piece.start, (piece.rows, *shape[1:]), device, kind)
            parts.append(repeat_rows(rows, piece.group, piece.repeats))
        if not parts:
            parts = [torch.zeros(shape, device=device, dtype=kind or tensors["model.embed_tokens.weight"].dtype)]
        tensors[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
        if "mamba_config" in values and name.endswith("mamba.dt_proj.bias"):
            tensors[name] *= 2  # mamba/hybrid_mamba_layer.py adds it in dt_proj and once more in the scan
    embedding = tensors["model.embed_tokens.weight"]
    if lm.config.tie_embeddings and "lm_head.weight" in stored:
        blocks = read_blocks(stored["lm_head.weight"][0], "lm_head.weight", 0, embedding.shape)
        if not all(torch.equal(rows.to(embedding), embedding[i:i + len(rows)]) for i, rows in blocks):
            raise ValueError(f"{folder}: tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight: "
                             f"set tie_word_embeddings to false in config.json to use both")
    return tensors


# ------------------------------------------------------------------------------------------------ released students
def released_values(values, stored):
    """config.json of a released student as one of ours; any other as it is."""
    if values.get("model_type") == "llamba":
        return llamba_values(values)
    return mamba_in_llama_values(values, stored) if "mamba_config" in values else values


def llamba_values(values):
    """Llamba (modeling_llamba.py of cartesia-ai/edge): discrete Mamba-2 everywhere, as many heads of x as of B and C."""
    ssm, mlp = values.get("ssm_cfg") or {}, values.get("mlp_cfg") or {}
    needed = dict(vocab_size=values, d_model=values, n_layer=values, n_v_heads=ssm, d_state=ssm, intermediate_size=mlp)
    if missing := [key for key, where in needed.items() if where.get(key) is None]:
        raise ValueError(f"config.json of a Llamba lacks {', '.join(missing)}")
    refuse_unless(ssm, dict(activation="identity", bias=False, conv_bias=True, n_qk_heads=ssm["n_v_heads"]), "ssm_cfg")
    refuse_unless(mlp, dict(act_fn="silu", bias=False), "mlp_cfg")
    refuse_unless(values, dict(lm_head_bias=False), "config")
    return dict(model_type="llama", vocab_size=values["vocab_size"], hidden_size=values["d_model"],
                num_hidden_layers=values["n_layer"], mixers=["mamba2"] * values["n_layer"],
                num_attention_heads=ssm["n_v_heads"], head_dim=ssm.get("expand", 1) * values["d_model"] // ssm["n_v_heads"],
                d_state=ssm["d_state"], d_conv=ssm.get("d_conv", 4), intermediate_size=mlp["intermediate_size"],
                rms_norm_eps=values.get("norm_epsilon", 1e-5), tie_word_embeddings=values.get("tie_embeddings", False),
                eos_token_id=values.get("eos_token_id"))


def mamba_in_llama_values(values, stored):
    """MambaInLlama: a Llama's config.json, and mamba_config.json (mamba/hybrid_mamba_config.py) for the layers replaced."""
    config, mamba = from_hf_config(values), values["mamba_config"]
    ssm, attention = mamba.get("ssm_cfg") or {}, mamba.get("attn_layers")
    known = {"expand", "d_state", "d_conv", "dt_rank", "ngroups", "repeat_kv_before_conv", "chunk_size"}
    if unknown := sorted(ssm.keys() - known):
        raise ValueError(f"unsupported ssm_cfg in mamba_config.json: {', '.join(unknown)}")
    if attention is None or not set(attention) <= set(range(config.n_layers)):
        raise ValueError(f"mamba_config.json has attn_layers = {attention}, but layers are 0 .. {config.n_layers - 1}")
    mixer = "mamba2" if "ngroups" in ssm else "mamba"
    found = mamba | ssm | dict(d_inner=mamba.get("d_inner") or ssm.get("expand", 1) * config.d_model)
    implied = dict(n_layer=config.n_layers, d_model=config.d_model, d_inner=config.n_heads * config.head_dim,
                   d_xb=config.n_kv_heads * config.head_dim)
    if mixer == "mamba2":
        implied |= dict(ngroups=config.n_heads, d_state=config.head_dim)
    for key, value in implied.items():
        if found.get(key) != value:
            raise ValueError(f"mamba_config.json has {key} = {found.get(key)}, but config.json implies {value}")
    ours = dict(mixers=["attention" if i in attention else mixer for i in range(config.n_layers)],
                d_state=ssm.get("d_state"), d_conv=ssm.get("d_conv", 4), discrete_mamba2=mixer == "mamba")
    if isinstance(ssm.get("dt_rank"), int):  # else "auto", our default
        ours["dt_rank"] = ssm["dt_rank"]
    if any(".mha." in name for name in stored):  # M1, whose attention layers were trained without the base's scaling
        ours |= dict(rope_theta=config.rope_theta, rope_scaling=None, rope_parameters=None)
    return values | ours


@dataclass
class Piece:
    """Rows of a stored tensor, in groups of which each is repeated: kv heads for the query heads that share them."""
    name: str
    start: int
    rows: int
    group: int = 1
    repeats: int = 1


def stored_pieces(values, config, name, rows, stored):
    """Where a checkpoint keeps our tensor `name`: the pieces that make it up, from top to bottom; none: it starts at 0."""
    if values.get("model_type") == "llamba":
        for mine, theirs in (("model.embed_tokens", "backbone.embedding"), ("model.norm", "backbone.final_layernorm"),
                             ("model.", "backbone."), (".mamba2.", ".mixer.")):
            name = name.replace(mine, theirs)
        return [] if name.endswith("A_log_bias") else [Piece(name, 0, rows)]
    if "mamba_config" not in values:
        return [Piece(name, 0, rows)]

    heads, size, inner = config.n_heads, config.head_dim, config.n_heads * config.head_dim
    kv, repeats = config.n_kv_heads * size, heads // config.n_kv_heads
    layer, key = re.fullmatch(r"(model\.layers\.\d+\.)?(.*)", name).groups()
    # What their inference code and M1 store as one (mamba_inference/hybrid_wrapper.py): z | x | B | C | dt and q | k | v.
    fused = {"mamba.in_proj_z": ("mamba.in_proj", 0), "mamba.in_proj_x": ("mamba.in_proj", inner),
             "mamba.B_proj": ("mamba.in_proj", inner + kv), "mamba.C_proj": ("mamba.in_proj", inner + 2 * kv),
             "mamba.dt_proj_down": ("mamba.in_proj", 2 * inner + 2 * kv), "self_attn.q_proj": ("mha.in_proj", 0),
             "self_attn.k_proj": ("mha.in_proj", inner), "self_attn.v_proj": ("mha.in_proj", inner + kv),
             "self_attn.o_proj": ("mha.out_proj", 0)}
    whole, start = fused.get(key.removesuffix(".weight"), (None, 0))
    if whole and f"{layer}{whole}.weight" in stored:
        return [Piece(f"{layer}{whole}.weight", start, rows)]
    name = name.replace(".mamba2.", ".mamba.").replace("A_log_bias", "dt_bias")
    # A convolution before the repetition of kv heads (repeat_kv_before_conv = False) has fewer channels: repeat its weights.
    narrow = ".conv1d." in name and name in stored and stored[name][1][0] < rows
    if narrow and key.startswith("mamba."):
        return [Piece(name, 0, kv, config.state_size("mamba"), repeats)]
    if narrow:
        return [Piece(name, 0, kv, size, repeats), Piece(name, kv, kv, size, repeats), Piece(name, 2 * kv, inner)]
    if key == "mamba2.in_proj.weight":  # z | x | B | C | dt there, x | B | C | z | a here
        return [Piece(name, inner, kv, size, repeats), Piece(name, inner + kv, kv, size, repeats),
                Piece(name, inner + 2 * kv, inner), Piece(name, 0, inner), Piece(name, 2 * inner + 2 * kv, heads)]
    return [] if key == "mamba2.z_bias" else [Piece(name, 0, rows)]


def repeat_rows(weight, group, repeats):
    """Groups of rows, each repeated consecutively: [k1, k2] -> [k1, k1, k2, k2], as the queries of a kv head sit."""
    return weight if repeats == 1 else weight.unflatten(0, (-1, group)).repeat_interleave(repeats, dim=0).flatten(0, 1)


# ------------------------------------------------------------------------------------------------ teacher -> student
UNIT_GATE = 1.278464542761  # SiLU(UNIT_GATE) = 1
LONGEST_MEMORY, SHORTEST_MEMORY = -6.0, 0.0  # a_bias of the first and last head: decay 0.998 .. 0.5


def student_from(teacher, mixers, d_state=None, transfer=True):
    """A student with the teacher's weights, in which layers named "mamba" or "mamba2" replace attention.

    Everything outside the replaced mixers is copied. Inside them (Wang et al. 2024, figure 2):

        attention           "mamba"             "mamba2"
        q_proj  (H h, d)    C_proj              rows C of in_proj
        k_proj  (K h, d)    B_proj              rows B of in_proj, kv heads repeated to H
        v_proj  (K h, d)    in_proj_x           rows x of in_proj, kv heads repeated to H
        o_proj  (d, H h)    out_proj            out_proj

    Two options are for seeing what this is worth. transfer=False leaves the projections of new mixers at their random
    start. A d_state of mamba2 other than head_dim, which is aligned with q and k, leaves no place to copy them to: B and C
    then start at random. (mamba cuts its heads into groups of d_state, so that any d_state takes all weights.)
    Raises ValueError if a mixer is unknown, their number is not the teacher's, or an attention layer is wanted where
    the teacher has none.
    """
    config = dataclasses.replace(teacher.config, mixers=list(mixers), d_state=d_state)
    student = LM(config).to(device=teacher.device, dtype=teacher.dtype)
    for i, (block, source) in enumerate(zip(student.layers, teacher.layers)):
        if not isinstance(source.mix(), Attention) and block.mixer != source.mixer:
            raise ValueError(f"layer {i} of the teacher is {source.mixer}, not attention: cannot turn it into {block.mixer}")
        block.load_state_dict({k: v for k, v in source.state_dict().items() if k in block.state_dict()}, strict=False)
        if isinstance(source.mix(), Attention) and isinstance(block.mix(), Mamba):
            mamba_from_attention(block.mix(), source.mix(), transfer)
        elif isinstance(source.mix(), Attention) and isinstance(block.mix(), Mamba2):
            mamba2_from_attention(block.mix(), source.mix(), transfer)
    rest = {k: v for k, v in teacher.state_dict().items() if not k.startswith("model.layers.")}
    student.load_state_dict(rest, strict=False)
    return student


@torch.no_grad()
def mamba_from_attention(mamba, attention, transfer):
    """Q to C, K to B, V to x, O to out.

    It cannot start as a copy of the teacher: SiLU follows the convolution and the gate SiLU(W_z u) has no bias, so no
    choice of the new weights makes either the identity. What can be done is done: the convolution passes the current
    token through, so that SiLU(x) is all that stands between v and the scan; gate and dt keep their random start.
    """
    if transfer:
        mamba.C_proj.weight.copy_(attention.q_proj.weight)
        mamba.B_proj.weight.copy_(attention.k_proj.weight)
        mamba.in_proj_x.weight.copy_(attention.v_proj.weight)
        mamba.out_proj.weight.copy_(attention.o_proj.weight)
    identity_convolution(mamba.conv1d)


@torch.no_grad()
def mamba2_from_attention(mamba2, attention, transfer):
    """Q to C, K to B, V to x, O to out; then linear attention is all that is left of the difference.

    The convolution is the identity, the gate is SiLU(UNIT_GATE) = 1 with zero weights, the skip D is 0 (attention has
    none). Decays start slow, one memory length per head and the same for every token: a state that forgets within a
    few tokens gets no gradient for what it should have kept.
    """
    def repeat(weight):  # (K h, d) -> (H h, d)
        return repeat_rows(weight, attention.head_dim, attention.n_heads // attention.n_kv_heads)

    x, B, C, z, a = mamba2.in_proj.weight.split(mamba2.sizes)
    if transfer:
        x.copy_(repeat(attention.v_proj.weight))
        mamba2.out_proj.weight.copy_(attention.o_proj.weight)
    if transfer and mamba2.d_state == attention.head_dim:
        B.copy_(repeat(attention.k_proj.weight))
        C.copy_(attention.q_proj.weight)
    z.zero_()
    a.zero_()
    mamba2.z_bias.fill_(UNIT_GATE)
    mamba2.A_log_bias.copy_(torch.linspace(LONGEST_MEMORY, SHORTEST_MEMORY, mamba2.n_heads))
    mamba2.D.zero_()
    identity_convolution(mamba2.conv1d)
    mamba2.conv1d.weight[mamba2.sizes[0]:, :, -1] = 1 / attention.head_dim  # B and C


def identity_convolution(conv):
    conv.weight.zero_()
    conv.weight[:, :, -1] = 1  # the last tap is the current token
    conv.bias.zero_()
