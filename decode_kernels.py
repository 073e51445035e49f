"""Triton's small helpers, and the kernels for ONE token, where decoding spends its time.

To decode a token, a layer reads its state, changes it a little and writes it back, with next to no
arithmetic. So what counts on a GPU is to touch the state once: every step is one kernel. The
formulas stand in kernels.py beside the same steps in PyTorch. Attention to a cache of keys and
values, which the recurrences replace, has its PyTorch form here.

    check_shapes, use_triton, pieces              may it run, and where
    load, exp, sigmoid, softplus                  inside kernels, in float32
    causal_conv_step, selective_step, ssd_step    one token of each recurrence
    decode_attention                              one token of attention

Letters: B batch, D channels, N states, G groups, H heads, P channels of a head, W taps of a
convolution; for attention K kv heads, h head size, T columns of the cache.
"""
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when this file is imported
except ImportError:  # Triton is for Linux only; elsewhere kernels are functions that nobody calls
    INTERPRETED, tl = None, SimpleNamespace(constexpr=int)
    triton = SimpleNamespace(jit=lambda kernel=None, **options: kernel or (lambda kernel: kernel))
FUSED = dict(enable_fp_fusion=True)  # a b + c in one instruction: not every Triton's default


def compute_dtype(x):
    """The dtype in which a result for x is computed: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def full_precision(x):
    """A context in which autocast does not round the factors of matrix products."""
    return torch.autocast(x.device.type, enabled=False)


# ---------------------------------------------------------------------------- may it run, and where
def check_shapes(**tensors):
    """The size of every letter in check_shapes(x=(x, "B L D"), weight=(weight, "D 1")), as a dict.

    ValueError names the first tensor that does not fit those before it, or has a size of 0 where a
    letter is. A number stands for itself; a tensor that is None is skipped.
    """
    sizes = {}
    for name, (tensor, letters) in tensors.items():
        if tensor is None:
            continue
        letters, found = letters.split(), tuple(tensor.shape)
        for letter, size in zip(letters, found if len(found) == len(letters) else ()):
            sizes.setdefault(letter, int(letter) if letter.isdigit() else size or "1 or more")
        expected = tuple(sizes.get(letter, letter) for letter in letters)
        if found != expected:
            raise ValueError(f"{name} has shape {found}, expected ({', '.join(map(str, expected))})"
                             f" = ({', '.join(letters)})")
    return sizes


def use_triton(backend, *tensors, backward=True):
    """Whether Triton runs on these tensors; None is skipped. ValueError if "triton" can't.

    "auto" takes it for CUDA tensors, but not for float64, nor where a gradient is recorded and the
    kernel has no backward pass (backward=False).
    """
    if backend not in ("auto", "ref", "torch", "triton"):
        raise ValueError(f"backend is {backend!r}, expected one of 'auto', 'ref', 'torch', "
                         "'triton'")
    tensors = [tensor for tensor in tensors if tensor is not None]
    on_gpu = all(tensor.is_cuda for tensor in tensors)
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    if backend != "triton":
        recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        possible = on_gpu and INTERPRETED is not None and not double and (backward or not recorded)
        return backend == "auto" and possible
    if INTERPRETED is None:
        raise ValueError("backend is 'triton', but Triton is not installed (pip install triton, on "
                         "Linux)")
    if not (on_gpu or INTERPRETED):
        raise ValueError("backend is 'triton', but the tensors are not on a GPU (TRITON_INTERPRET=1"
                         " in the environment interprets the kernels on a CPU, slowly)")
    if double:
        raise ValueError("backend is 'triton', which computes in float32, but a tensor is float64: "
                         "take 'torch' or 'ref'")
    return True


def pieces(programs, length, device):
    """Into how many pieces to cut time so that a GPU is full: 8 programs for each multiprocessor.

    `programs` are there without cutting; a piece has 128 steps or more.
    """
    if device.type != "cuda":
        return 1
    wanted = 8 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(wanted // programs, triton.cdiv(length, 128)))


# ---------------------------------------------------------------------------- inside kernels
@triton.jit
def load(pointers, mask):
    """What the pointers hold, as float32; 0 where the mask is False."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def exp(u):
    """e^u by one instruction: 2^(u log2 e)."""
    return tl.exp2(u * 1.4426950408889634)  # e^u = 2^(u log2 e): a GPU has an instruction for 2^u


@triton.jit
def sigmoid(u):
    """1 / (1 + e^-u)."""
    return 1.0 / (1.0 + exp(-u))


@triton.jit
def softplus(u):
    """log(1 + e^u) = max(u, 0) + log(1 + e) with e = e^-|u|: it can't overflow, and is 0 at -inf.

    1 + e would lose the digits of a small e: there log(1 + e) = e - e^2/2 + e^3/3.
    """
    e = exp(-tl.abs(u))
    series, log = e * (1.0 - e * (0.5 - e * 0.33333333)), tl.log2(1.0 + e) * 0.6931471805599453
    return tl.maximum(u, 0.0) + tl.where(e < 0.01, series, log)


# ---------------------------------------------------------------------------- a step
@triton.jit
def _causal_conv_step_kernel(past, x, weight, bias, y, d_inner,
                             WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: BLOCK_D channels of a row, whose past moves up by one. Grid: blocks, B."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    row, is_d = tl.program_id(1).to(tl.int64), d < d_inner
    newest = tl.load(x + row * d_inner + d, mask=is_d, other=0.0)
    taps = weight + d * WIDTH
    total = load(bias + d, is_d) + newest.to(tl.float32) * load(taps + WIDTH - 1, is_d)
    for k in tl.static_range(WIDTH - 1):
        place = past + (row * (WIDTH - 1) + k) * d_inner + d
        total += load(place, is_d) * load(taps + k, is_d)
        newer = tl.load(place + d_inner, mask=is_d, other=0.0) if k < WIDTH - 2 else newest
        tl.store(place, newer, mask=is_d)
    tl.store(y + row * d_inner + d, total, mask=is_d)


def causal_conv_step(past, x, weight, bias):
    """kernels.causal_conv_step in one launch; past (B, W-1, D) contiguous, changed in place."""
    (batch, d_inner), y = x.shape, torch.empty_like(x, memory_format=torch.contiguous_format)
    _causal_conv_step_kernel[triton.cdiv(d_inner, 256), batch](
        past, x.contiguous(), weight.contiguous(), bias, y, d_inner,
        WIDTH=weight.shape[2], BLOCK_D=256, **FUSED)
    return y


@triton.jit
def _selective_step_kernel(h, x, dt, A, B, C, D, z, dt_bias, y, d_inner, d_state, groups,
                           SOFTPLUS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program: BLOCK_D channels of a row, whose states are one stretch of memory.

    D, z and dt_bias may be None. Grid: blocks of channels, B.
    """
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[:, None]  # (BLOCK_D, 1)
    n = tl.arange(0, BLOCK_N)[None, :]  # (1, N)
    row, is_d, is_n = tl.program_id(1).to(tl.int64), d < d_inner, n < d_state
    channel, state = row * d_inner + d, (row * d_inner + d) * d_state + n
    in_group = (row * groups + d // (d_inner // groups)) * d_state + n  # (BLOCK_D, N)
    x_t, dt_t = load(x + channel, is_d), load(dt + channel, is_d)  # (BLOCK_D, 1)
    if dt_bias is not None:
        dt_t += load(dt_bias + d, is_d)
    if SOFTPLUS:
        dt_t = softplus(dt_t)
    decay = exp(dt_t * load(A + d * d_state + n, is_d & is_n))  # (BLOCK_D, N)
    h_t = decay * load(h + state, is_d & is_n) + (dt_t * x_t) * load(B + in_group, is_d & is_n)
    tl.store(h + state, h_t, mask=is_d & is_n)
    y_t = tl.sum(h_t * load(C + in_group, is_d & is_n), axis=1, keep_dims=True)  # (BLOCK_D, 1)
    if D is not None:
        y_t += load(D + d, is_d) * x_t
    if z is not None:
        z_t = load(z + channel, is_d)
        y_t *= z_t * sigmoid(z_t)
    tl.store(y + channel, y_t, mask=is_d)


def selective_step(h, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """kernels.selective_step in one launch; h (B, D, N) contiguous, changed in place."""
    (batch, d_inner), d_state = x.shape, A.shape[1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    block_n = triton.next_power_of_2(d_state)
    block_d = max(1, 1024 // block_n)
    x, dt, A, B, C, z = (u if u is None else u.contiguous() for u in (x, dt, A, B, C, z))
    _selective_step_kernel[triton.cdiv(d_inner, block_d), batch](
        h, x, dt, A, B, C, D, z, dt_bias, y, d_inner, d_state, B.shape[1],
        SOFTPLUS=dt_softplus, BLOCK_D=block_d, BLOCK_N=block_n, **FUSED)
    return y


@triton.jit
def _ssd_step_kernel(h, x, log_decay, B, C, y, n_heads, head_dim, d_state,
                     BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program: BLOCK_P rows of one head's state. Grid: blocks of rows, H, B."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]  # (P, 1)
    n = tl.arange(0, BLOCK_N)[None, :]  # (1, N)
    head = tl.program_id(2).to(tl.int64) * n_heads + tl.program_id(1)
    is_p, is_n = p < head_dim, n < d_state
    state = (head * head_dim + p) * d_state + n  # (P, N)
    decay, x_t = exp(tl.load(log_decay + head).to(tl.float32)), load(x + head * head_dim + p, is_p)
    B_t, C_t = load(B + head * d_state + n, is_n), load(C + head * d_state + n, is_n)
    h_t = decay * load(h + state, is_p & is_n) + x_t * B_t
    tl.store(h + state, h_t, mask=is_p & is_n)
    tl.store(y + head * head_dim + p, tl.sum(h_t * C_t, axis=1, keep_dims=True), mask=is_p)


def ssd_step(h, x, log_decay, B, C):
    """kernels.ssd_step in one launch; h (B, H, P, N) contiguous, changed in place."""
    (batch, n_heads, head_dim), d_state = x.shape, B.shape[2]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    block_n = triton.next_power_of_2(d_state)
    block_p = min(triton.next_power_of_2(head_dim), max(1, 4096 // block_n))
    x, log_decay, B, C = (u.contiguous() for u in (x, log_decay, B, C))
    _ssd_step_kernel[triton.cdiv(head_dim, block_p), n_heads, batch](
        h, x, log_decay, B, C, y, n_heads, head_dim, d_state,
        BLOCK_P=block_p, BLOCK_N=block_n, **FUSED)
    return y


# ---------------------------------------------------------------------------- attention
def decode_attention_ref(q, keys, values, lengths):
    """decode_attention by its definition: columns behind a row's end are read, and weigh 0."""
    kind, (n_kv_heads, capacity, head_dim) = compute_dtype(q), keys.shape[1:]
    rows = q.to(kind).unflatten(1, (n_kv_heads, -1))  # (B, K, H/K, h)
    columns = torch.arange(capacity, device=q.device)
    hidden = (columns >= lengths[:, None])[:, None, None]  # (B, 1, 1, T)
    with full_precision(q):
        scores = rows @ keys.to(kind).transpose(2, 3) * head_dim ** -0.5  # (B, K, H/K, T)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        weights = weights.masked_fill(hidden, 0)  # softmax gave an empty row NaN
        return (weights @ values.to(kind)).flatten(1, 2).to(q.dtype)  # (B, H, h)


@triton.jit
def _decode_attention_kernel(q, keys, values, lengths, y, weight, stride_b, stride_k, parts,
                             SCALE: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
                             BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
                             WIDEN: tl.constexpr):
    """One program: a part of the used columns of a row and kv head, for its H/K query heads.

    y (B, K, parts, H/K, h) is the attention to that part alone, weight (B, K, parts, H/K) the
    base-2 logarithm of its sum of exponentials. Online softmax (Milakov & Gimelshein 2018): when a
    higher score comes, what has been summed shrinks. Grid: parts, K, B.
    """
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    columns = tl.cdiv(tl.cdiv(length, parts), BLOCK_T) * BLOCK_T
    start, end = part * columns, tl.minimum(part * columns + columns, length)
    g, t = tl.arange(0, BLOCK_G)[:, None], tl.arange(0, BLOCK_T)[:, None]  # (G, 1), (T, 1)
    c = tl.arange(0, BLOCK_H)[None, :]  # (1, h)
    is_g, is_c, program = g < GROUP, c < HEAD_DIM, row * tl.num_programs(1) + head
    q_g = tl.load(q + (program * GROUP + g) * HEAD_DIM + c, mask=is_g & is_c, other=0.0)  # (G, h)
    cache = row * stride_b + head * stride_k + c
    top = tl.full((BLOCK_G, 1), -1e30, tl.float32)  # the highest score so far
    total, sums = tl.zeros((BLOCK_G, 1), tl.float32), tl.zeros((BLOCK_G, BLOCK_H), tl.float32)
    for first in range(start, end, BLOCK_T):
        column = first + t  # (T, 1)
        place, there = cache + column * HEAD_DIM, (column < end) & is_c  # (T, h)
        k = tl.load(keys + place, mask=there, other=0.0)
        v = tl.load(values + place, mask=there, other=0.0)
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q_g.to(k.dtype), tl.trans(k), input_precision="ieee") * SCALE  # (G, T)
        scores = tl.where(tl.trans(column) < end, scores, -1e30)
        higher = tl.maximum(top, tl.max(scores, axis=1, keep_dims=True))
        weights, keep = tl.exp2(scores - higher), tl.exp2(top - higher)  # (G, T), (G, 1)
        total = total * keep + tl.sum(weights, axis=1, keep_dims=True)
        sums = sums * keep + tl.dot(weights.to(v.dtype), v, input_precision="ieee")  # (G, h)
        top = higher
    out = (program * parts + part) * GROUP + g
    tl.store(y + out * HEAD_DIM + c, sums / tl.maximum(total, 1e-30), mask=is_g & is_c)
    tl.store(weight + out, top + tl.log2(tl.maximum(total, 1e-30)), mask=is_g)


def _decode_attention_triton(q, keys, values, lengths):
    batch, n_kv_heads, capacity, head_dim = keys.shape
    group, parts = q.shape[1] // n_kv_heads, pieces(batch * n_kv_heads, capacity, q.device)
    y = q.new_empty(batch, n_kv_heads, parts, group, head_dim, dtype=torch.float32)
    weight = y.new_empty(y.shape[:-1])
    block_g, block_h = (max(16, triton.next_power_of_2(size)) for size in (group, head_dim))
    _decode_attention_kernel[parts, n_kv_heads, batch](
        q.contiguous(), keys, values, lengths, y, weight, *keys.stride()[:2], parts,
        SCALE=head_dim ** -0.5 * 1.4426950408889634, GROUP=group, HEAD_DIM=head_dim,
        BLOCK_G=block_g, BLOCK_H=block_h, BLOCK_T=64,
        WIDEN=INTERPRETED, **FUSED)  # the interpreter multiplies no bfloat16
    if parts > 1:  # a part counts by its sum of exponentials, 2^weight
        y = y * torch.softmax(weight * 0.6931471805599453, dim=2)[..., None]  # 2^w = e^(w ln 2)
    return y.sum(2).flatten(1, 2).to(q.dtype)  # (B, H, h)


def decode_attention(q, keys, values, lengths, backend="auto"):
    """softmax(q k^T / sqrt(h)) v of each row's newest token over the row's first `lengths` columns.

    q (B, H, h), keys and values (B, K, T, h), lengths (B,) integers -> (B, H, h) in q's dtype; an
    empty row gives 0. Query head i reads kv head i // (H / K). The kernel reads nothing behind a
    row's end, and lengths stay on the GPU: the host does not wait. Sums are float32. backend: "ref"
    and "torch" are the definition.
    """
    check_shapes(q=(q, "B H h"), keys=(keys, "B K T h"), values=(values, "B K T h"),
                 lengths=(lengths, "B"))
    if q.shape[1] % keys.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, expected a multiple of keys' {keys.shape[1]}")
    plain = keys.stride() == values.stride() and keys.stride()[2:] == (q.shape[2], 1)
    if use_triton(backend, q, keys, values, lengths, backward=False) and plain:
        return _decode_attention_triton(q, keys, values, lengths)
    return decode_attention_ref(q, keys, values, lengths)


# ---------------------------------------------------------------------------- a model for decoding
PACK_FROM = 2 ** 18  # entries of a weight; below, calling oneDNN costs more than its product saves


class Products(nn.Module):
    """The products of one input with the weights of several Linears, computed as one.

    It stands where the first of them stood and gives its product; the others' wait in `rest`. On a
    CPU, large weights are packed into the blocks in which oneDNN reads them: at 16 rows, 1.2 to 3.5
    times as fast as with the plain weight.
    """

    def __init__(self, weights):
        super().__init__()
        self.in_features, self.sizes = weights[0].shape[1], [len(weight) for weight in weights]
        weight = torch.cat([weight.detach() for weight in weights])
        self.packed = is_packable(weight)
        if self.packed:  # for 64 rows, which fits any number of them
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
        self.weight, self.rest = weight, None

    def forward(self, x):
        if self.packed:
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        else:
            y = F.linear(x, self.weight)
        first, *self.rest = y.split(self.sizes, dim=-1)
        return first


class Rest(nn.Module):
    """One of the products that a Products has computed a moment ago."""

    def __init__(self, products, index):
        super().__init__()
        self.find, self.in_features = lambda: products.rest[index], products.in_features

    def forward(self, x):
        return self.find()


def is_packable(weight):
    """Whether oneDNN's packed products are there for this weight, and worth it."""
    return (weight.device.type == "cpu" and weight.numel() >= PACK_FROM
            and torch.backends.mkldnn.is_available()
            and (weight.dtype == torch.float32 or weight.dtype == torch.bfloat16
                 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))


@torch.inference_mode()
def meetings(lm):
    """Lists of the Linears (without bias) that meet the same tensor, found by running one token."""
    met = {}  # id of a tensor -> (the tensor, kept so that its id stays its own; who met it)

    def note(linear, inputs):
        met.setdefault(id(inputs[0]), (inputs[0], []))[1].append(linear)
    hooks = [module.register_forward_pre_hook(note) for module in lm.modules()
             if isinstance(module, nn.Linear) and module.bias is None]
    lm(torch.zeros(1, 1, dtype=torch.long, device=lm.device), lm.init_state(1, 1))
    for hook in hooks:
        hook.remove()
    return [linears for _, linears in met.values()]


def prepare(lm):
    """The model, ready for decoding: Linears that meet the same tensor joined, large ones packed.

    In place, and for decoding only: the plain weights are given up, so it cannot be saved.
    """
    place = {child: (parent, name) for parent in lm.modules()
             for name, child in parent.named_children()}
    for linears in meetings(lm):
        if len(linears) > 1 or is_packable(linears[0].weight):
            products = Products([linear.weight for linear in linears])
            swapped = [products, *(Rest(products, i) for i in range(len(linears) - 1))]
            for linear, module in zip(linears, swapped):
                setattr(*place[linear], module)
    table = lm.model.embed_tokens.weight  # a tied head is no Linear
    if lm.config.tie_embeddings and is_packable(table) and "head" not in vars(lm):
        head = Products([table])
        lm.head = lambda x: head(lm.model.norm(x))
    return lm
