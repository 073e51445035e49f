"""A language model with Llama's attention, or with a Mamba mixer in its place, layer by layer.

    lm = LM(Config(vocab_size=512, mixers=["attention", "mamba2", "mamba2", "mamba2"]))
    logits = lm(tokens)                           # (B, L) int64 -> (B, L, V)
    state = lm.init_state(batch=2, max_length=100)
    logits = lm(tokens, state)                    # the tokens continue each row; the state moves on
    student = student_from(lm, ["mamba2"] * 4)    # the attention's weights, moved into Mamba mixers

Glossary for every file. Sizes in shape comments, tensors in code:

    B     batch               sequences in a batch       u      input of a mixer
    L, T  length, capacity    tokens; of a KV cache      x      input of a recurrence
    D     inner               channels inside a mixer    dt     step size (Delta in the papers)
    N     d_state             states of a channel        A      decay rates, -exp(A_log) < 0
    H, P  n_heads, head_dim   heads, channels of one     B, C   input and output matrices (k and q)
    K     n_kv_heads          heads of keys and values   D      skip connection, y += D x
    G     groups              channels that share B, C   z      gate, y *= SiLU(z)
    V, W  vocab_size, d_conv  tokens; convolution taps   h      state of the recurrence

The tensors B, C, D clash with the sizes B, D as they do in the papers: `B (B, L, G, N)` is the
matrix B. T is also a mixer as a matrix over time, Q the steps of a chunk. Parameters have the names
of the code this follows: transformers' modeling_llama.py, MambaInLlama's
mamba/hybrid_mamba_layer.py ("mamba"), cartesia-ai/edge's Llamba ("mamba2").
"""
import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import decode_kernels
import hub
import kernels
from common import check_fields, naming, require


@dataclass
class Config:
    """Shape of a model. The defaults are the tiny teacher of the built-in experiment."""
    vocab_size: int = 512
    d_model: int = 64
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = None  # None: n_heads
    head_dim: int | None = None  # None: d_model / n_heads
    d_ff: int = 192
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's, see stretched
    norm_eps: float = 1e-5
    tie_embeddings: bool = True  # one matrix for tokens and logits
    max_length: int = 2048  # longest sequence the model was made for
    mixers: list | None = None  # a word of MIXERS for each layer; None: attention everywhere
    d_state: int | None = None  # None: 16 in "mamba", head_dim in "mamba2"
    d_conv: int = 4
    dt_rank: int | None = None  # None: d_model / 16
    eos_ids: list = dataclasses.field(default_factory=list)  # tokens that end an answer

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.head_dim = self.head_dim or self.d_model // self.n_heads
        self.mixers = list(self.mixers or ["attention"] * self.n_layers)
        self.dt_rank = self.dt_rank or math.ceil(self.d_model / 16)
        check(self)


# ---- Llama
RMSNorm = nn.RMSNorm  # x / rms(x) * weight (Zhang & Sennrich 2019)
Linear = functools.partial(nn.Linear, bias=False)


def rope_frequencies(config):
    """Angle per position of each pair of channels, (P / 2,) float32 (Su et al. 2021)."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    return stretched(config.rope_theta ** -(pairs / config.head_dim), config.rope_scaling)


def apply_rope(x, cos, sin):
    """x (B, H, L, P) with channel pairs (i, i + P/2) rotated: (x_i cos - x_j sin, x_j cos + x_i
    sin). cos and sin (B, 1, L, P) have a pair's number in both places, sin the first negated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE (Touvron et al. 2023; Ainslie et al. 2023).

    Its cache holds the keys and values of all past tokens: it grows, and every new token reads all
    of it. That is what the mixers below do without.
    """
    # name in checkpoints, last product, weights that stay float32 in a bfloat16 model
    key, output, float32 = "self_attn", "o_proj", ()

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim = config.head_dim
        inner, inner_kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.q_proj = Linear(config.d_model, inner)
        self.k_proj = Linear(config.d_model, inner_kv)
        self.v_proj = Linear(config.d_model, inner_kv)
        self.o_proj = Linear(inner, config.d_model)

    def init_cache(self, batch, max_length, like, state_dtype):
        shape = batch, self.n_kv_heads, max_length, self.head_dim  # (B, K, T, P)
        return dict(keys=like.new_zeros(shape), values=like.new_zeros(shape))

    def project(self, u, rope):
        """q (B, H, L, P), k and v (B, K, L, P); q and k rotated."""
        q, k, v = (layer(u).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        return apply_rope(q, *rope), apply_rope(k, *rope), v

    def forward(self, u, rope, cache=None, reads=None):  # u (B, L, d_model)
        q, k, v = self.project(u, rope)
        if cache is None:
            grouped = self.n_heads != self.n_kv_heads
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            y = attend_to_cache(q, k, v, cache, reads)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, H, L, P) -> (B, L, d_model)

    def mixing_matrix(self, u, rope):
        """softmax(q k^T / sqrt(P)), (B, H, L, L) float32: how tokens are mixed, y = T v."""
        q, k, _ = self.project(u, rope)
        k = k.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)
        scores = (q.float() @ k.float().transpose(2, 3)) * self.head_dim ** -0.5  # (B, H, L, L)
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        return scores.masked_fill(future, float("-inf")).softmax(-1)


class MLP(nn.Module):
    """SwiGLU: down(SiLU(gate x) * up x) (Shazeer 2020)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.d_ff)
        self.up_proj = Linear(config.d_model, config.d_ff)
        self.down_proj = Linear(config.d_ff, config.d_model)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# ---- Mamba
class Mamba(nn.Module):
    """MambaInLlama's Mamba-1 mixer (Wang et al. 2024): x, B, C, out where v, k, q, o stood. (The
    built-in students are Mamba2.)

        x = SiLU(conv(repeat(W_x u)))     B = repeat(W_B u)     C = W_C u     z = W_z u
        dt = softplus(W_dt W_down u + b)
        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t          y_t = C_t h_t + D x_t
        out = W_o (y * SiLU(z))

    N neighbouring channels, a group, share B and C (N numbers each); `repeat` copies the groups of
    K heads to H heads. The cache, W-1 inputs of the convolution and h, does not grow.
    """
    key, output, float32 = "mamba", "out_proj", ("A_log", "D", "dt_proj.bias")

    def __init__(self, config):
        super().__init__()
        self.inner, inner_kv = (n * config.head_dim for n in (config.n_heads, config.n_kv_heads))
        self.d_state, self.repeats = config.d_state or 16, config.n_heads // config.n_kv_heads
        require(inner_kv % self.d_state == 0,
                f"d_state = {self.d_state} does not divide n_kv_heads x head_dim = {inner_kv}: the "
                "mamba mixer groups channels by d_state")
        self.in_proj_x = Linear(config.d_model, inner_kv)
        self.B_proj = Linear(config.d_model, inner_kv)
        self.C_proj = Linear(config.d_model, self.inner)
        self.in_proj_z = Linear(config.d_model, self.inner)
        self.dt_proj_down = Linear(config.d_model, config.dt_rank)
        self.dt_proj = nn.Linear(config.dt_rank, self.inner)
        self.conv1d = nn.Conv1d(self.inner, self.inner, config.d_conv, groups=self.inner)
        self.A_log = nn.Parameter(torch.arange(1.0, self.d_state + 1).log().repeat(self.inner, 1))
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out_proj = Linear(self.inner, config.d_model)

    def reset_parameters(self):
        """dt starts log-uniform in [0.001, 0.1] (Gu & Dao 2023, 3.6): b is its inverse softplus."""
        bound = self.dt_proj.in_features ** -0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        dt = torch.empty(self.inner).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_proj.bias.data.copy_(dt + torch.log(-torch.expm1(-dt)))

    def init_cache(self, batch, max_length, like, state_dtype):
        past = like.new_zeros(batch, self.conv1d.kernel_size[0] - 1, self.inner)  # (B, W-1, D)
        return dict(past=past, h=past.new_zeros(batch, *self.A_log.shape, dtype=state_dtype))

    def repeat(self, v):
        """(B, L, K P) -> (B, L, H P): groups of N channels, each repeated consecutively."""
        return v.unflatten(-1, (-1, self.d_state)).repeat_interleave(self.repeats, -2).flatten(-2)

    def forward(self, u, rope, cache=None, reads=None):  # u (B, L, d_model); no use for rope
        x, z = self.repeat(self.in_proj_x(u)), self.in_proj_z(u)  # (B, L, D)
        B = self.repeat(self.B_proj(u)).unflatten(-1, (-1, self.d_state))  # (B, L, G, N)
        C = self.C_proj(u).unflatten(-1, (-1, self.d_state))  # (B, L, G, N)
        dt = F.linear(self.dt_proj_down(u), self.dt_proj.weight)  # (B, L, D); the scan adds b
        x = F.silu(convolve(self.conv1d, x, cache, reads))
        dt = masked(dt, reads, float("-inf"))  # padding makes no step in time: softplus(-inf) = 0
        A = -torch.exp(self.A_log.float())  # (D, N)
        rest = dict(D=self.D, dt_bias=self.dt_proj.bias.float(), dt_softplus=True)
        if cache is not None and reads.is_step:
            x, dt, B, C, z = (v[:, 0] for v in (x, dt, B, C, z))
            y = kernels.selective_step(cache["h"], x, dt, A, B, C, z=z, **rest)[:, None]
        else:
            y, h = kernels.selective_scan(x, dt, A, B, C, z=z, h0=cache and cache["h"], **rest)
            keep(cache, h)
        return self.out_proj(y)  # (B, L, D) -> (B, L, d_model)


class Mamba2(nn.Module):
    """Llamba's Mamba-2 mixer (Bick et al. 2024, 2025), "discrete": without dt, one decay per head.

        (x, B, C, z, a) = W_in u       (x, B, C) <- causal conv(x, B, C)
        decay = sigmoid(-(a + a_bias))
        h_t = decay_t h_{t-1} + x_t B_t^T             y_t = h_t C_t + D x_t
        out = W_o (y * SiLU(z + z_bias))

    As a matrix over time, y = T x with T_ts = (C_t . B_s) prod_{s<r<=t} decay_r: attention without
    softmax, with forgetting. That is why q, k, v and o fit C, B, x and out. a_bias (A_log_bias, not
    in Llamba) gives each head its own length of memory: the smaller, the longer.
    """
    key, output, float32 = "mamba2", "out_proj", ("A_log_bias", "D")

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.d_state = config.n_heads, config.d_state or config.head_dim
        inner, states = config.n_heads * config.head_dim, config.n_heads * self.d_state
        self.sizes = [inner, states, states, inner, config.n_heads]  # rows x, B, C, z, a of W_in
        self.mixed = inner + 2 * states  # channels of the convolution
        self.in_proj = Linear(config.d_model, sum(self.sizes))
        self.z_bias = nn.Parameter(torch.zeros(inner))
        self.A_log_bias = nn.Parameter(torch.zeros(config.n_heads))
        self.conv1d = nn.Conv1d(self.mixed, self.mixed, config.d_conv, groups=self.mixed)
        self.D = nn.Parameter(torch.ones(config.n_heads))
        self.out_proj = Linear(inner, config.d_model)

    def init_cache(self, batch, max_length, like, state_dtype):
        shape = batch, self.n_heads, self.sizes[0] // self.n_heads, self.d_state  # (B, H, P, N)
        return dict(past=like.new_zeros(batch, self.conv1d.kernel_size[0] - 1, self.mixed),
                    h=like.new_zeros(shape, dtype=state_dtype))

    def project(self, u, cache=None, reads=None):
        """x (B, L, H, P), B, C (B, L, H, N), z (B, L, D), log decay (B, L, H) float32."""
        xBC, z, a = self.in_proj(u).split([self.mixed, *self.sizes[3:]], dim=-1)
        xBC = convolve(self.conv1d, xBC, cache, reads)  # (B, L, D + 2 H N)
        x, B, C = (w.unflatten(-1, (self.n_heads, -1)) for w in xBC.split(self.sizes[:3], dim=-1))
        return x, B, C, z, -F.softplus(a.float() + self.A_log_bias.float())

    def gate(self, y, z):
        return y * F.silu(z + self.z_bias)

    def forward(self, u, rope, cache=None, reads=None):  # u (B, L, d_model); no use for rope
        x, B, C, z, log_decay = self.project(u, cache, reads)
        B, log_decay = masked(B, reads, 0), masked(log_decay, reads, 0)  # padding changes no state
        if cache is not None and reads.is_step:
            now = (v[:, 0] for v in (x, log_decay, B, C))
            y = kernels.ssd_step(cache["h"], *now)[:, None]  # (B, 1, H, P)
        else:
            y, h = kernels.ssd(x, log_decay, B, C, h0=cache and cache["h"],
                               chunk=64 if u.is_cuda else 32)  # (B, L, H, P)
            keep(cache, h)
        y = (y + self.D[:, None].to(y.dtype) * x).flatten(2)  # (B, L, D)
        return self.out_proj(self.gate(y, z))

    def mixing_matrix(self, u, rope):
        """T with D on its diagonal, (B, H, L, L) float32: MOHAWK compares it with attention's."""
        _, B, C, _, log_decay = self.project(u)
        skip = torch.diag_embed(self.D.float()[:, None].expand(-1, u.shape[1]))  # (H, L, L)
        return kernels.mixing_matrix(log_decay, B.float(), C.float()) + skip


# A mixer of your own is a class with what Mamba2 has, an entry here and one in FROM_ATTENTION.
# Below the line: `reads` (CacheReads) says where the tokens stand in each row's cache, `masked`
# makes padding change nothing, `convolve` goes on from a cache.
MIXERS = {"attention": Attention, "mamba": Mamba, "mamba2": Mamba2}


# ---- the model
class Block(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x)). The mixer is all that distillation replaces."""

    def __init__(self, config, mixer):
        super().__init__()
        self.key = MIXERS[mixer].key  # its name in checkpoints
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.add_module(self.key, MIXERS[mixer](config))
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    mixer = property(lambda self: getattr(self, self.key))

    def mixing_matrix(self, x, rope):
        """The mixer's matrix for the block's input x: (B, H, L, L)."""
        return self.mixer.mixing_matrix(self.input_layernorm(x), rope)

    def forward(self, x, rope, cache=None, reads=None):  # (B, L, d_model)
        x = x + self.mixer(self.input_layernorm(x), rope, cache, reads)
        return x + self.mlp(self.post_attention_layernorm(x))


class LM(nn.Module):
    """Embedding, blocks, norm, head. Modules, and so weights, have Hugging Face's names."""

    def __init__(self, config):
        super().__init__()
        self.config, self.frequencies = config, rope_frequencies(config)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.model.layers = nn.ModuleList(Block(config, mixer) for mixer in config.mixers)
        self.model.norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.d_model, config.vocab_size)
        if self.device.type != "meta":
            self.apply(self.reset_parameters)

    state_dtype = torch.float32  # of the mixers' h, see init_state
    layers = property(lambda self: self.model.layers)
    device = property(lambda self: self.model.embed_tokens.weight.device)
    dtype = property(lambda self: self.model.embed_tokens.weight.dtype)

    def reset_parameters(self, module):
        """Variance 1 / fan-in; what writes to the residual stream is scaled down with depth."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        if isinstance(module, Block):
            if hasattr(module.mixer, "reset_parameters"):
                module.mixer.reset_parameters()
            for layer in getattr(module.mixer, module.mixer.output), module.mlp.down_proj:
                layer.weight.data.mul_((2 * self.config.n_layers) ** -0.5)

    def init_state(self, batch, max_length, state_dtype=None):
        """An empty State for `batch` rows of up to `max_length` tokens; h is of state_dtype."""
        like = self.model.embed_tokens.weight.detach()
        lengths = torch.zeros(batch, dtype=torch.long, device=self.device)
        return State(lengths, [block.mixer.init_cache(
            batch, max_length, like, state_dtype or self.state_dtype) for block in self.layers])

    def rope(self, positions):
        """cos and sin at positions (B, L), each (B, 1, L, P) in the model's dtype."""
        self.frequencies = self.frequencies.to(positions.device)  # copied once, then in place
        angles = positions[:, None, :, None].float() * self.frequencies  # (B, 1, L, P/2)
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def hidden_states(self, tokens, state=None, counts=None):
        """Yield the residual stream (B, L, d_model) before every block and after the last."""
        reads, caches = None, [None] * len(self.layers)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, L)
        if state is not None:
            reads, caches = CacheReads(state, tokens.shape[1], self.dtype, counts), state.layers
            positions = reads.positions  # (B, L): counted from each row's own start
        rope = self.rope(positions)
        x = self.model.embed_tokens(tokens)
        for block, cache in zip(self.layers, caches):
            yield x
            x = block(x, rope, cache, reads)
        if state is not None:
            state.lengths.copy_(reads.lengths)
        yield x

    def last_state(self, tokens, state=None, counts=None):
        """The residual stream (B, L, d_model) after the last block."""
        for x in self.hidden_states(tokens, state, counts):
            pass  # only one at a time is kept
        return x

    def head(self, x):
        """Logits (..., V) of the residual stream (..., d_model) after the last block."""
        x = self.model.norm(x)
        tied = self.config.tie_embeddings
        return F.linear(x, self.model.embed_tokens.weight) if tied else self.lm_head(x)

    def forward(self, tokens, state=None, counts=None):
        """tokens (B, L) int64 -> logits (B, L, V).

        With a state the tokens continue each row, and the state moves on. With counts (B,) row b
        has counts[b] tokens, then padding, and logits (B, 1, V) are of each row's last token.
        """
        # no gradients with a state: it changes in place
        with torch.set_grad_enabled(torch.is_grad_enabled() and state is None):
            x = self.last_state(tokens, state, counts)
            if counts is not None:
                x = x[torch.arange(len(x), device=x.device), counts - 1][:, None]  # (B, 1, d_model)
            return self.head(x)

    def num_parameters(self):
        return sum(parameter.numel() for parameter in self.parameters())

    # LM.save_pretrained and LM.from_pretrained stand below the line.


# ---- teacher -> student
UNIT_GATE = 1.278464542761  # SiLU(UNIT_GATE) = 1
LONGEST_MEMORY, SHORTEST_MEMORY = -6.0, 0.0  # a_bias of the first, last head: decay 0.998, 0.5


def student_from(teacher, mixers, d_state=None, transfer=True):
    """The teacher with other mixers in place of attention, its weights copied.

    What is outside the replaced mixers stays as it is. Inside (Wang et al. 2024, figure 2):

        attention           "mamba"             "mamba2"
        q_proj  (H P, d)    C_proj              rows C of in_proj
        k_proj  (K P, d)    B_proj              rows B of in_proj, kv heads repeated to H
        v_proj  (K P, d)    in_proj_x           rows x of in_proj, kv heads repeated to H
        o_proj  (d, H P)    out_proj            out_proj

    transfer=False leaves these random. ValueError for a layer that cannot be made from its
    teacher's.
    """
    student = LM(dataclasses.replace(teacher.config, mixers=mixers,
                                     d_state=d_state or teacher.config.d_state))
    try:
        student.load_state_dict(teacher.state_dict(), strict=False)  # all that has the same name
    except RuntimeError:
        raise ValueError(f"d_state = {d_state}: a mixer that is kept has another") from None
    for i, (block, source) in enumerate(zip(student.layers, teacher.layers)):
        if type(block.mixer) is type(source.mixer):
            continue
        require(isinstance(source.mixer, Attention) and type(block.mixer) in FROM_ATTENTION,
                f"layer {i} of the teacher is {teacher.config.mixers[i]}: it cannot be turned into "
                f"{mixers[i]}")
        with torch.no_grad():
            FROM_ATTENTION[type(block.mixer)](block.mixer, source.mixer, transfer)
    return cast(student, teacher.device, teacher.dtype)


def mamba_from_attention(mamba, attention, transfer):
    """Move q, k, v, o; the convolution passes the current token, gate and dt stay random."""
    if transfer:
        mamba.C_proj.weight.copy_(attention.q_proj.weight)
        mamba.B_proj.weight.copy_(attention.k_proj.weight)
        mamba.in_proj_x.weight.copy_(attention.v_proj.weight)
        mamba.out_proj.weight.copy_(attention.o_proj.weight)
    identity_convolution(mamba.conv1d)


def mamba2_from_attention(mamba2, attention, transfer):
    """Move q, k, v, o. Softmax and RoPE are lost; the gate starts as SiLU(UNIT_GATE) = 1, the skip
    D as 0, and the convolution passes the current token. Decays start slow, another for each head:
    a state that forgets at once gets no gradient for what it should have kept.
    """
    def repeat(weight):  # (K P, d) -> (H P, d): kv heads for the query heads that share them
        heads = weight.unflatten(0, (-1, attention.head_dim))
        return heads.repeat_interleave(attention.n_heads // attention.n_kv_heads, 0).flatten(0, 1)

    x, B, C, z, a = mamba2.in_proj.weight.split(mamba2.sizes)
    if transfer:
        x.copy_(repeat(attention.v_proj.weight))
        mamba2.out_proj.weight.copy_(attention.o_proj.weight)
    if transfer and mamba2.d_state == attention.head_dim:  # else q and k have no place
        B.copy_(repeat(attention.k_proj.weight))
        C.copy_(attention.q_proj.weight)
    for tensor in z, a, mamba2.D:
        tensor.zero_()
    mamba2.z_bias.fill_(UNIT_GATE)
    mamba2.A_log_bias.copy_(torch.linspace(LONGEST_MEMORY, SHORTEST_MEMORY, mamba2.n_heads))
    identity_convolution(mamba2.conv1d)
    # keeps C . B of order 1, as softmax does; with taps of 1 the loss starts 1,000 times larger
    mamba2.conv1d.weight[mamba2.sizes[0]:, :, -1] = 1 / attention.head_dim


FROM_ATTENTION = {Mamba: mamba_from_attention, Mamba2: mamba2_from_attention}


# ---- first reading ends here: checks, ragged batches, loading, released Mamba-2 students ----
def identity_convolution(conv):
    """The convolution that gives back its current token, the last tap."""
    conv.weight.zero_()
    conv.weight[:, :, -1] = 1
    conv.bias.zero_()


def check(config):
    """ValueError for a Config that no model can have; mixers check what they can take."""
    mixers, heads, kv_heads = config.mixers, config.n_heads, config.n_kv_heads
    unknown = [mixer for mixer in mixers if mixer not in [*MIXERS]]
    require(len(mixers) == config.n_layers,
            f"mixers has {len(mixers)} entries for n_layers = {config.n_layers}")
    require(not unknown, f"unknown mixer {unknown[:1]}: choose from {', '.join(MIXERS)}")
    require(heads % kv_heads == 0, f"n_heads = {heads} is no multiple of n_kv_heads = {kv_heads}")
    require(config.head_dim % 2 == 0, f"head_dim = {config.head_dim} is odd: RoPE rotates pairs")
    rope_frequencies(config)  # refuses an unknown kind of RoPE now, not at the first token


def stretched(frequencies, scaling):
    """Llama 3's frequencies for a longer context: low ones are slowed down by `factor`, high ones
    kept, those between blended."""
    scaling = scaling or {"rope_type": "default"}
    kind = scaling.get("rope_type", scaling.get("type", "llama3"))
    if kind == "default":
        return frequencies
    require(kind == "llama3",
            f"unsupported RoPE type {kind!r}: 'default' and 'llama3' are implemented")
    keys = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    check_fields(scaling, dict.fromkeys(keys, float), "llama3 RoPE scaling")
    factor, low, high, original = (scaling[key] for key in keys)
    turns = original * frequencies / (2 * math.pi)  # full turns within the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


@dataclass
class State:
    """Where every row of a batch stands."""
    lengths: torch.Tensor  # (B,) int64
    layers: list  # of each its cache, a dict of tensors with the rows in front

    def put(self, rows, source, places):
        """Make `rows` copies of the rows `places` of another state, whose caches may be shorter."""
        self.lengths[rows] = source.lengths[places]
        for mine, theirs in zip(self.layers, source.layers):
            for name, tensor in theirs.items():
                mine[name][(rows, *map(slice, tensor.shape[1:]))] = tensor[places]

    def select(self, rows):
        """Keep these rows, in this order; of keys and values only used columns move."""
        used = slice(max(self.lengths.tolist(), default=0))
        self.lengths = self.lengths[rows]
        for layer in self.layers:
            for name, tensor in layer.items():
                part = (slice(None), used) if name in ("keys", "values") else ()
                tensor[(slice(len(rows)), *part)] = tensor[(rows, *part)]
                layer[name] = tensor[:len(rows)]

    def nbytes(self):
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.values())


class CacheReads:
    """Where one pass writes into the caches and what it reads, for all layers. valid (B, L) is
    False where a token is padding, None if none is. is_step: one token a row."""
    ROWS = 32

    def __init__(self, state, length, dtype, counts=None):
        device, self.counts, self.dtype = state.lengths.device, counts, dtype
        steps = torch.arange(length, device=device)  # (L,)
        self.positions = state.lengths[:, None] + steps  # (B, L)
        self.valid = None if counts is None else steps < counts[:, None]  # (B, L)
        self.lengths = state.lengths + (length if counts is None else counts)  # (B,), afterwards
        self.is_step = length == 1 and counts is None
        self.real = ... if counts is None else self.valid  # index of what is written, and where:
        rows = torch.arange(len(state.lengths), device=device)[:, None]  # (B, 1)
        self.rows = rows.expand_as(self.positions)[self.real]
        self.columns = self.positions[self.real]

    @functools.cached_property
    def groups(self):
        """(rows, columns to read, mask (rows, 1, L, columns)) of every ROWS rows: each group is
        read up to its own longest only, and sample.py sorts rows by length."""
        groups = []
        for start in range(0, len(self.lengths), self.ROWS):
            rows = slice(start, start + self.ROWS)
            longest = int(self.lengths[rows].max())
            columns = torch.arange(longest, device=self.lengths.device)
            later = columns > self.positions[rows, None, :, None]  # (rows, 1, L, columns)
            groups.append((rows, longest, torch.where(later, -torch.inf, 0.0).to(self.dtype)))
        return groups


def attend_to_cache(q, k, v, cache, reads):
    """Write k and v behind each row's past, then attend to what the row has used: (B, H, L, P). The
    H/K query heads of a kv head become rows of queries of that head: no key is copied."""
    keys, values = cache["keys"], cache["values"]  # (B, K, T, P)
    keys[reads.rows, :, reads.columns] = k.transpose(1, 2)[reads.real]
    values[reads.rows, :, reads.columns] = v.transpose(1, 2)[reads.real]
    if q.is_cuda and reads.is_step:
        return decode_kernels.decode_attention(q[:, :, 0], keys, values, reads.lengths)[:, :, None]
    shape, group = q.shape, q.shape[1] // keys.shape[1]
    q = q.unflatten(1, (-1, group)).flatten(2, 3)  # (B, K, H/K L, P)
    y = torch.cat([F.scaled_dot_product_attention(
        q[rows], keys[rows, :, :longest], values[rows, :, :longest],
        attn_mask=mask if shape[2] == 1 else mask.repeat(1, 1, group, 1))
        for rows, longest, mask in reads.groups])  # (B, K, H/K L, P)
    return y.view(shape)


def convolve(conv, x, cache, reads):
    """The causal convolution of x (B, L, D). The cache has the W-1 tokens before x; a row's new
    past ends where the row does, not where its padding does."""
    if cache is None:
        return kernels.causal_conv(x, conv.weight, conv.bias)[0]
    if reads.is_step:
        return kernels.causal_conv_step(cache["past"], x[:, 0], conv.weight, conv.bias)[:, None]
    y, past = kernels.causal_conv(x, conv.weight, conv.bias, cache["past"], reads.counts)
    cache["past"].copy_(past)
    return y


def masked(x, reads, value):
    """x (B, L, ...) with `value` where a token is padding."""
    if reads is None or reads.valid is None:
        return x
    return x.masked_fill(~reads.valid.view(*x.shape[:2], *[1] * (x.dim() - 2)), value)


def keep(cache, h):
    if cache is not None:
        cache["h"].copy_(h)


def weight_dtype(lm, name, dtype):
    """The dtype of a weight in a model of this dtype: float32 for what a mixer keeps in float32."""
    mixers = {type(block.mixer) for block in lm.layers}
    ends = tuple(f".{mixer.key}.{end}" for mixer in mixers for end in mixer.float32)
    return torch.float32 if name.endswith(ends) else dtype


def cast(lm, device, dtype):
    """The model on a device, its weights in a dtype, those apart that stay float32."""
    for name, parameter in lm.named_parameters():
        parameter.data = parameter.data.to(device, weight_dtype(lm, name, dtype))
    return lm


def save_pretrained(lm, folder):
    """Write config.json and model.safetensors; all attention, it loads in transformers too."""
    hub.write_checkpoint(folder, dataclasses.asdict(lm.config), lm.state_dict())


def from_pretrained(cls, path_or_repo, device=None, dtype=None):
    """The model in a folder or a Hugging Face repository: ours, any Llama, a released student; in
    its stored dtype if None. FileNotFoundError or ValueError names what is missing or unsupported.
    """
    folder = hub.checkpoint_folder(path_or_repo)
    fields = hub.read_config(folder)
    with torch.device("meta"), naming(f"{folder}/config.json"):  # shapes without memory
        lm = cls(Config(**fields))
    shapes = {name: tuple(tensor.shape) for name, tensor in lm.state_dict().items()}

    def place(name, tensor):
        return tensor.to(device, weight_dtype(lm, name, dtype), copy=True)
    lm.load_state_dict(hub.read_tensors(folder, shapes, place), assign=True)
    return lm


LM.save_pretrained, LM.from_pretrained = save_pretrained, classmethod(from_pretrained)


class Mamba2WithStep(Mamba2):
    """The Mamba-2 of Dao & Gu (2024) in released MambaInLlama checkpoints, with a step dt.

        (x, B, C) <- SiLU(conv(x, B, C))      dt = softplus(a + a_bias)
        decay = exp(-dt exp(A_log))           h_t = decay_t h_{t-1} + dt_t x_t B_t^T
        out = W_o norm(y * SiLU(z + z_bias)), an RMS norm over each head's channels

    Follows MambaInLlama's mamba2/hybrid_mamba_layer.py, to run what was released.
    """
    float32 = "A_log_bias", "A_log", "D"
    mixing_matrix = None

    def __init__(self, config):
        super().__init__(config)
        self.A_log = nn.Parameter(torch.zeros(config.n_heads))
        self.norm = RMSNorm(self.sizes[0], eps=1e-5)

    def project(self, u, cache=None, reads=None):
        x, B, C, z, log_decay = super().project(u, cache, reads)
        dt = -log_decay[..., None]  # (B, L, H, 1)
        B = (dt * F.silu(B)).to(B.dtype)  # dt scales what enters the state, x B^T
        return F.silu(x), B, F.silu(C), z, log_decay * self.A_log.float().exp()

    def gate(self, y, z):
        heads = super().gate(y, z).unflatten(-1, (self.n_heads, -1)).float()  # (B, L, H, P)
        heads = F.rms_norm(heads, heads.shape[-1:], eps=self.norm.eps)
        return self.norm.weight * heads.flatten(2).to(y.dtype)


MIXERS["mamba2_step"] = Mamba2WithStep
