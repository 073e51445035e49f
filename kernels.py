"""The recurrences inside a Mamba layer: literal references, fast PyTorch forms, Triton kernels, single steps for decoding.

Selective scan (Mamba), per channel d with state n, and SSD (Mamba-2), per head with one scalar decay:

    h_t[d,n] = exp(dt_t[d] A[d,n]) h_{t-1}[d,n] + dt_t[d] x_t[d] B_t[n]      selective scan: a state row for each channel
    y_t[d]   = (sum_n C_t[n] h_t[d,n] + D[d] x_t[d]) SiLU(z_t[d])
    h_t      = exp(log_decay_t) h_{t-1} + x_t B_t^T                          SSD: a (P, N) state matrix for each head
    y_t      = h_t C_t

Contents, small to large; every rung of the ladder is tested against the one below
    causal_conv, causal_conv_step           depthwise causal convolution: a sequence, one token; PyTorch, Triton
    selective_step                          the first recurrence, one token: PyTorch, Triton
    _scan_loop                              all tokens, as a literal loop
    _SelectiveScan                          in chunks, in PyTorch, with a backward that recomputes the states
    _SelectiveScanTriton                    one kernel forward, one backward
    selective_scan, selective_scan_ref      the public function, which picks one of the three; the loop
    ssd_step                                the second recurrence, one token: PyTorch, Triton
    mixing_matrix                           the map x -> y as one L x L matrix per head
    ssd, ssd_ref                            as matrices within chunks; as a literal loop
    decode_attention, decode_attention_ref  what the others replace: one token of attention to a cache; Triton, PyTorch
    python kernels.py                       checks each against its reference and prints a timing table

backend: "ref" the literal loop, "torch" PyTorch, "triton" (CUDA tensors; CPU tensors under TRITON_INTERPRET=1, for tests),
"auto": Triton for CUDA tensors, PyTorch elsewhere and for float64.

Letters (in shape comments): B batch, L length, D channels, N state size, G groups of channels that share B and C, H heads,
P head dimension, K convolution width, Q steps of one chunk. The tensors A, B, C, D own these letters in code, so
`B (B, L, G, N)` reads "input matrix B: batch, length, groups, state". Integers are words: batch, length, d_inner, d_state.

Precision: arithmetic and states are float32 (float64 for float64 inputs) also under autocast; y has x's dtype. One exception:
the matrix products of ssd, which on a GPU are in x's dtype.

Sources: Gu & Dao 2023 (Mamba), eq. 2 and algorithm 2; Dao & Gu 2024 (Mamba-2), section 6 and listing 1;
state-spaces/mamba selective_scan_interface.py and ssd_minimal.py; Bick et al. 2024 for the discrete form of SSD.
"""
import argparse
import itertools
import statistics
import time
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when this file is imported
except ImportError:  # Triton exists for Linux only; all but backend="triton" works without it
    triton, tl, INTERPRETED = None, SimpleNamespace(constexpr=int), False

LOG2_E = 1.4426950408889634  # exp(u) = 2^(u log2 e); exp2 is about three times as fast as exp in PyTorch on a CPU
SCAN_CHUNK = 16  # steps whose states selective_scan holds at once


# ------------------------------------------------------------------------------------------------ small helpers
def _compute_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(name, tensor, shape, letters):
    """ValueError unless tensor has the shape; None in shape allows any size."""
    found = tuple(tensor.shape)
    if len(found) != len(shape) or any(want not in (None, have) for want, have in zip(shape, found)):
        expected = str(tuple("any" if size is None else size for size in shape)).replace("'", "")
        raise ValueError(f"{name} has shape {found}, expected {letters} = {expected}")


def _check_backend(backend):
    if backend not in ("auto", "ref", "torch", "triton"):
        raise ValueError(f"backend is {backend!r}, expected one of 'auto', 'ref', 'torch', 'triton'")


def _use_triton(backend, *tensors):
    """Whether to launch Triton kernels; ValueError if they were asked for and can't run on these tensors."""
    _check_backend(backend)
    on_gpu = all(tensor is None or tensor.is_cuda for tensor in tensors)
    in_double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    if backend == "triton":
        if triton is None:
            raise ValueError("backend is 'triton', but Triton is not installed (pip install triton, on Linux)")
        if not (on_gpu or INTERPRETED):
            raise ValueError("backend is 'triton', but the tensors are not on a GPU (TRITON_INTERPRET=1 in the environment "
                             "interprets the kernels on a CPU, slowly)")
        if in_double:
            raise ValueError("backend is 'triton', which computes in float32, but a tensor is float64: take 'torch' or 'ref'")
    return backend == "triton" or (backend == "auto" and triton is not None and on_gpu and not in_double)


def _steps_by_triton(backend, *tensors):
    """The same for the steps, which have no backward in Triton: with "auto", where gradients are recorded, PyTorch."""
    recorded = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return _use_triton(backend, *tensors) and not (backend == "auto" and recorded)


# A kernel is compiled when it is first launched, for the dtypes and the constants (tl.constexpr) of that launch.
_jit = triton.jit if triton else lambda function: function
FUSED = dict(enable_fp_fusion=True)  # a b + c as one instruction, whatever the default of the Triton version


@_jit
def _load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@_jit
def _exp(u):
    return tl.exp2(u * 1.4426950408889634)  # e^u = 2^(u log2 e): one instruction on a GPU


@_jit
def _sigmoid(u):
    return 1.0 / (1.0 + _exp(-u))


@_jit
def _softplus(u):
    """log(1 + e^u) = max(u, 0) + log(1 + e) with e = e^-|u|; a small e by its series, as 1 + e would lose its digits."""
    e = _exp(-tl.abs(u))
    return tl.maximum(u, 0.0) + tl.where(e < 0.01, e * (1.0 - e * (0.5 - e * 0.33333333)), tl.log(1.0 + e))


# ------------------------------------------------------------------------------------------------ causal convolution
def _shifts(x, taps):
    """For each shift s = 1..K-1: s, how many first rows of y read the past, and which rows of the past they read."""
    width, length = len(taps), x.shape[1]
    for shift in range(1, width):
        head = min(shift, length)
        yield shift, head, slice(width - 1 - shift, width - 1 - shift + head)


@_jit
def _causal_conv_kernel(x, past, taps, bias, y, length, d_inner, WIDTH: tl.constexpr, BLOCK_L: tl.constexpr,
                        BLOCK_D: tl.constexpr):
    """y (B, L, D) in one pass over x: the K reads of an entry come from the cache. One program: BLOCK_L steps of BLOCK_D
    channels of a sequence. Grid: blocks of channels, blocks of steps, B."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]  # (1, BLOCK_D)
    t = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]  # (BLOCK_L, 1)
    batch, is_d = tl.program_id(2).to(tl.int64), d < d_inner
    total = _load(bias + d, is_d) + tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    for s in tl.static_range(WIDTH):
        inside = is_d & (t >= s) & (t < length)  # x_{t-s}, or, before x begins, past[K-1 + t-s]
        value = _load(x + (batch * length + t - s) * d_inner + d, inside)
        if s > 0:
            value += _load(past + (batch * (WIDTH - 1) + WIDTH - 1 + t - s) * d_inner + d, is_d & (t < s))
        total += _load(taps + s * d_inner + d, is_d) * value
    tl.store(y + (batch * length + t) * d_inner + d, total, mask=is_d & (t < length))


def _causal_conv_triton(x, past, taps, bias):
    """x (B, L, D), past (B, K-1, D), taps (K, D), bias (D,), all contiguous -> y (B, L, D)."""
    batch, length, d_inner = x.shape
    y = torch.empty_like(x)
    grid = (triton.cdiv(d_inner, 64), triton.cdiv(length, 32), batch)
    _causal_conv_kernel[grid](x, past, taps, bias, y, length, d_inner, WIDTH=len(taps), BLOCK_L=32, BLOCK_D=64, **FUSED)
    return y


class _CausalConv(torch.autograd.Function):
    """y_t = bias + sum_s taps[s] x_{t-s} as K shifted multiply-adds, several times faster than F.conv1d on a CPU.

    The first rows look before x, into the past: x_{-s} = past[K-1-s]. Backward is the same sum turned around,
    grad x_t = sum_s taps[s] grad y_{t+s}, and grad taps[s] sums grad_y_t x_{t-s} over batch and time. Only the inputs are
    kept, and x is never copied to put the past in front of it.
    """

    @staticmethod
    def forward(ctx, x, past, taps, bias, by_triton):  # (B, L, D), (B, K-1, D), (K, D), (D,)
        ctx.save_for_backward(x, past, taps)
        if by_triton:
            return _causal_conv_triton(x.contiguous(), past.contiguous(), taps, bias)
        y = torch.addcmul(bias, x, taps[0])  # (B, L, D)
        for shift, head, rows in _shifts(x, taps):
            y[:, :head].addcmul_(past[:, rows], taps[shift])
            y[:, head:].addcmul_(x[:, :x.shape[1] - head], taps[shift])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        x, past, taps = ctx.saved_tensors
        product = grad_y * x  # (B, L, D)
        grad_x, grad_past, grad_taps = grad_y * taps[0], torch.zeros_like(past), torch.empty_like(taps)
        grad_taps[0] = product.sum((0, 1))
        for shift, head, rows in _shifts(x, taps):
            body = slice(0, x.shape[1] - head)
            grad_past[:, rows].addcmul_(grad_y[:, :head], taps[shift])
            grad_x[:, body].addcmul_(grad_y[:, head:], taps[shift])
            torch.mul(grad_y[:, :head], past[:, rows], out=product[:, :head])
            torch.mul(grad_y[:, head:], x[:, body], out=product[:, head:])
            grad_taps[shift] = product.sum((0, 1))
        return grad_x, grad_past, grad_taps, grad_y.sum((0, 1)), None


def causal_conv(x, weight, bias, state=None, backend="auto"):
    """Depthwise causal convolution of a sequence: y_t = bias + sum_k weight[k] x_{t-K+1+k}.

    x (B, L, D), weight (D, 1, K), bias (D,), state (B, D, K-1): the K-1 inputs before x, None for zeros.
    Returns y (B, L, D) in x's dtype and the state after x, in the state's dtype. ValueError for other shapes. backend: "torch",
    "triton" (the forward; backward is PyTorch's) or "auto".
    """
    _check("x", x, (None, None, None), "(B, L, D)")
    batch, length, d_inner = x.shape
    _check("weight", weight, (d_inner, 1, None), "(D, 1, K)")
    _check("bias", bias, (d_inner,), "(D,)")
    width, dtype = weight.shape[2], _compute_dtype(x)
    if state is None:
        state = x.new_zeros(batch, d_inner, width - 1)
    _check("state", state, (batch, d_inner, width - 1), "(B, D, K-1)")
    past = state.transpose(1, 2)  # (B, K-1, D)
    taps = weight[:, 0].flip(1).t().to(dtype).contiguous()  # (K, D): taps[s] meets x_{t-s}
    by_triton = _use_triton(backend, x, weight)
    y = _CausalConv.apply(x.to(dtype), past.to(dtype), taps, bias.to(dtype), by_triton)  # (B, L, D)
    recent = torch.cat([past, x[:, max(0, length - width + 1):].to(past.dtype)], dim=1)  # (B, K-1 + min(L, K-1), D)
    return y.to(x.dtype), recent[:, recent.shape[1] - width + 1:].transpose(1, 2)


@_jit
def _causal_conv_step_kernel(state, x, weight, bias, y, d_inner, stride_b, stride_d, stride_k,
                             WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: BLOCK_D channels of one row. It reads the K-1 columns of its state once and writes them shifted by one."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    row, is_d = tl.program_id(1).to(tl.int64), d < d_inner
    column = state + row * stride_b + d * stride_d
    newest = tl.load(x + row * d_inner + d, mask=is_d, other=0.0)
    total = _load(bias + d, is_d) + newest.to(tl.float32) * _load(weight + d * WIDTH + WIDTH - 1, is_d)
    for k in tl.static_range(WIDTH - 1):
        total += _load(column + k * stride_k, is_d) * _load(weight + d * WIDTH + k, is_d)
        newer = tl.load(column + (k + 1) * stride_k, mask=is_d, other=0.0) if k + 1 < WIDTH - 1 else newest
        tl.store(column + k * stride_k, newer, mask=is_d)
    tl.store(y + row * d_inner + d, total, mask=is_d)


def causal_conv_step(state, x, weight, bias, backend="auto"):
    """One token of `causal_conv`: x (B, D) -> y (B, D); state (B, D, K-1) takes x in place, and is fastest with stride 1
    along D (a transposed (B, K-1, D), as `causal_conv` returns it)."""
    if _steps_by_triton(backend, state, x, weight, bias):
        batch, d_inner, width = *x.shape, weight.shape[2]
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        _causal_conv_step_kernel[triton.cdiv(d_inner, 256), batch](
            state, x.contiguous(), weight.contiguous(), bias, y, d_inner, *state.stride(), WIDTH=width, BLOCK_D=256, **FUSED)
        return y
    dtype, taps = _compute_dtype(x), weight[:, 0].unbind(1)  # K times (D,)
    columns = [state[..., k] for k in range(state.shape[2])]  # K-1 times (B, D); autograd lets no one write into unbind
    y = torch.addcmul(bias, x.to(dtype), taps[-1])  # (B, D)
    for column, tap in zip(columns, taps):
        y.addcmul_(column.to(dtype), tap)
    for column, newer in zip(columns, (*columns[1:], x)):
        column.copy_(newer)
    return y.to(x.dtype)


# ------------------------------------------------------------------------------------------------ selective scan: loop, step
def _step_size(dt, dt_bias, dt_softplus):
    dt = dt if dt_bias is None else dt + dt_bias
    return F.softplus(dt) if dt_softplus else dt  # F.softplus is the identity above 20, like the upstream kernel


def _skip_and_gate(y, x, D, z):
    y = y if D is None else torch.addcmul(y, x, D)
    return y if z is None else y * F.silu(z)


def _check_scan(x, dt, A, B, C, D, z, dt_bias, h0):
    _check("x", x, (None, None, None), "(B, L, D)")
    batch, length, d_inner = x.shape
    _check("A", A, (d_inner, None), "(D, N)")
    d_state = A.shape[1]
    _check("dt", dt, (batch, length, d_inner), "(B, L, D)")
    _check("B", B, (batch, length, None, d_state), "(B, L, G, N)")
    _check("C", C, (batch, length, B.shape[2], d_state), "(B, L, G, N)")
    if length == 0 or B.shape[2] == 0 or d_inner % B.shape[2]:
        raise ValueError(f"x has shape {tuple(x.shape)} and B {B.shape[2]} groups, expected L >= 1 and groups that divide D")
    if z is not None:
        _check("z", z, (batch, length, d_inner), "(B, L, D)")
    for name, vector in (("D", D), ("dt_bias", dt_bias)):
        if vector is not None:
            _check(name, vector, (d_inner,), "(D,)")
    if h0 is not None:
        _check("h0", h0, (batch, d_inner, d_state), "(B, D, N)")


def _scan_loop(x, dt, A, B, C, h):
    """x, dt (B, L, D), A (D, N), B, C (B, L, G, N), h (B, D, N) -> y (B, L, D), h."""
    repeats = x.shape[2] // B.shape[2]
    ys = []
    for t in range(x.shape[1]):
        B_t = B[:, t].repeat_interleave(repeats, dim=1)  # (B, D, N): channel d reads group d // (D // G)
        C_t = C[:, t].repeat_interleave(repeats, dim=1)  # (B, D, N)
        decay = torch.exp(dt[:, t, :, None] * A)  # (B, D, N)
        h = decay * h + (dt[:, t] * x[:, t])[..., None] * B_t  # (B, D, N)
        ys.append((C_t * h).sum(-1))  # (B, D)
    return torch.stack(ys, dim=1), h


@_jit
def _selective_step_kernel(h, x, dt, A, B, C, D, z, dt_bias, y, d_inner, d_state, groups,
                           SOFTPLUS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program: BLOCK_D channels of one row, whose states are one stretch of memory. Decoding is bound by reading and
    writing h, so all the rest happens on the way. D, z and dt_bias may be None. Grid: blocks of channels, B."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[:, None]  # (BLOCK_D, 1)
    n = tl.arange(0, BLOCK_N)[None, :]  # (1, N)
    row, is_d, is_n = tl.program_id(1).to(tl.int64), d < d_inner, n < d_state
    channel, state = row * d_inner + d, (row * d_inner + d) * d_state + n
    in_group = (row * groups + d // (d_inner // groups)) * d_state + n  # (BLOCK_D, N)
    x_t, dt_t = _load(x + channel, is_d), _load(dt + channel, is_d)  # (BLOCK_D, 1)
    if dt_bias is not None:
        dt_t += _load(dt_bias + d, is_d)
    if SOFTPLUS:
        dt_t = _softplus(dt_t)
    decay = _exp(dt_t * _load(A + d * d_state + n, is_d & is_n))  # (BLOCK_D, N)
    h_t = decay * _load(h + state, is_d & is_n) + (dt_t * x_t) * _load(B + in_group, is_d & is_n)
    tl.store(h + state, h_t, mask=is_d & is_n)
    y_t = tl.sum(h_t * _load(C + in_group, is_d & is_n), axis=1, keep_dims=True)  # (BLOCK_D, 1)
    if D is not None:
        y_t += _load(D + d, is_d) * x_t
    if z is not None:
        z_t = _load(z + channel, is_d)
        y_t *= z_t * _sigmoid(z_t)
    tl.store(y + channel, y_t, mask=is_d)


def _selective_step_triton(h, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    (batch, d_inner), d_state, y = x.shape, A.shape[1], torch.empty_like(x, memory_format=torch.contiguous_format)
    block_n = triton.next_power_of_2(d_state)
    block_d = max(1, 1024 // block_n)
    x, dt, A, B, C, z = (u if u is None else u.contiguous() for u in (x, dt, A, B, C, z))
    _selective_step_kernel[triton.cdiv(d_inner, block_d), batch](
        h, x, dt, A, B, C, D, z, dt_bias, y, d_inner, d_state, B.shape[1],
        SOFTPLUS=dt_softplus, BLOCK_D=block_d, BLOCK_N=block_n, **FUSED)
    return y


def selective_step(h, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, backend="auto"):
    """One token of `selective_scan`: x, dt, z (B, D), A (D, N), B, C (B, G, N) -> y (B, D); h (B, D, N) changes in place."""
    if _steps_by_triton(backend, h, x, dt, A, B, C, D, z, dt_bias) and h.is_contiguous():
        return _selective_step_triton(h, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    dtype, groups = h.dtype, B.shape[1]
    u = x.to(dtype)  # (B, D)
    dt = _step_size(dt.to(dtype), dt_bias, dt_softplus)  # (B, D)
    h.mul_((dt[..., None] * (A * LOG2_E)).exp2_())
    rows = h.unflatten(1, (groups, -1))  # (B, G, D/G, N)
    rows.addcmul_((dt * u).unflatten(1, (groups, -1))[..., None], B[:, :, None].to(dtype))
    with torch.autocast(h.device.type, enabled=False):
        y = (C[:, :, None].to(dtype) @ rows.transpose(2, 3)).flatten(1)  # (B, G, 1, N) @ (B, G, N, D/G) -> (B, D)
    return _skip_and_gate(y, u, D, None if z is None else z.to(dtype)).to(x.dtype)


# ------------------------------------------------------------------------------------------------ selective scan: chunks
def _chunk_inputs(span, x, dt, B, C):
    """One chunk with time first: x, dt (Q, B, D); B, C (N, Q, B, G, 1), so that they broadcast over a group's channels."""
    x, dt = (u[:, span].transpose(0, 1).contiguous() for u in (x, dt))
    B, C = (u[:, span].permute(3, 1, 0, 2).contiguous()[..., None] for u in (B, C))
    return x, dt, B, C


def _grouped(u, like):
    """View (..., D) as (..., G, D/G), with G taken from `like` (N, Q, B, G, 1)."""
    return u.unflatten(-1, (like.shape[3], -1))


def _chunk_states(x, dt, A, B, h, decay, states):
    """Run one chunk: x, dt (Q, B, D), A (N, D), B (N, Q, B, G, 1), h (N, B, D); fills decay, states (N, Q, B, D)."""
    torch.mul(dt, (A * LOG2_E)[:, None, None], out=decay).exp2_()
    torch.mul(_grouped(dt * x, B), B, out=_grouped(states, B))  # what each step adds, then the states themselves
    for decay_t, h_t in zip(decay.unbind(1), states.unbind(1)):
        h = h_t.addcmul_(decay_t, h)


def _scratch(count, x, A):
    """`count` buffers (N, Q, B, D), allocated once for all chunks: fresh memory costs more than the arithmetic in it."""
    batch, length, d_inner = x.shape
    return x.new_empty(count, A.shape[1], min(SCAN_CHUNK, length), batch, d_inner)


def _sum_states(u, weights):
    """sum_n weights[n] u[n]: u (N, Q, B, D), weights (N, Q, B, G, 1) -> (Q, B, D)."""
    u = _grouped(u, weights)
    total = u[0] * weights[0]
    for n in range(1, len(u)):
        total.addcmul_(u[n], weights[n])
    return total.flatten(-2)


def _sum_channels(u, groups):
    """Sum over the channels of each group: u (N, Q, B, D) -> (B, Q, G, N)."""
    u = u.unflatten(-1, (groups, -1))
    with torch.autocast(u.device.type, enabled=False):
        return (u @ u.new_ones(u.shape[-1])).permute(2, 1, 3, 0)


class _SelectiveScan(torch.autograd.Function):
    """The scan without D, z and softplus, chunk by chunk. Layout inside: (N, Q, B, D), so a time step is N long rows.

    Let g_t = dLoss/dh_t, all (B, D, N). The state feeds y_t and h_{t+1}, so g runs backwards in time:
        g_t = C_t grad_y_t + exp(dt_{t+1} A) g_{t+1},       starting from the gradient of the returned state, and
        grad C_t = sum_d grad_y_t h_t,   grad B_t = sum_d dt_t x_t g_t,   grad (dt_t x_t) = sum_n B_t g_t,
        grad (dt_t A) = exp(dt_t A) h_{t-1} g_t =: w_t,   so grad A = sum_t dt_t w_t and grad dt_t gets sum_n A w_t.
    Kept for backward: the inputs and the state at the start of each chunk, 1/Q of all states. A chunk's states are
    recomputed when its turn comes (one more forward), because B L D N of them cost more to store and read than to redo.
    """

    @staticmethod
    def forward(ctx, x, dt, A, B, C, h0):
        y, h = torch.empty_like(x), h0.permute(2, 0, 1)  # (B, L, D), (N, B, D)
        A_rows, starts = A.t().contiguous(), []  # (N, D)
        buffers = _scratch(2, x, A)
        for start in range(0, x.shape[1], SCAN_CHUNK):
            span = slice(start, start + SCAN_CHUNK)
            x_c, dt_c, B_c, C_c = _chunk_inputs(span, x, dt, B, C)
            decay, states = buffers[:, :, :len(x_c)]  # (N, Q, B, D) each
            starts.append(h)
            _chunk_states(x_c, dt_c, A_rows, B_c, h, decay, states)
            y[:, span] = _sum_states(states, C_c).transpose(0, 1)
            h = states[:, -1].clone()  # the next chunk overwrites the buffer
        ctx.save_for_backward(x, dt, A, B, C, *starts)
        return y, h.permute(1, 2, 0).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_h):
        x, dt, A, B, C, *starts = ctx.saved_tensors
        A_rows, carry, groups = A.t().contiguous(), grad_h.permute(2, 0, 1), B.shape[2]  # (N, D), (N, B, D)
        grad_x, grad_dt, grad_B, grad_C = (torch.empty_like(u) for u in (x, dt, B, C))
        grad_A = torch.zeros_like(A_rows)
        buffers = _scratch(4, x, A)
        for index in reversed(range(len(starts))):
            span = slice(index * SCAN_CHUNK, (index + 1) * SCAN_CHUNK)
            x_c, dt_c, B_c, C_c = _chunk_inputs(span, x, dt, B, C)
            decay, states, g, product = buffers[:, :, :len(x_c)]  # (N, Q, B, D) each
            _chunk_states(x_c, dt_c, A_rows, B_c, starts[index], decay, states)
            grad_y_c = grad_y[:, span].transpose(0, 1).contiguous()  # (Q, B, D)
            torch.mul(_grouped(grad_y_c, C_c), C_c, out=_grouped(g, C_c))
            g_steps, decay_steps = g.unbind(1), decay.unbind(1)
            g_steps[-1].add_(carry)
            for t in reversed(range(len(x_c) - 1)):
                g_steps[t].addcmul_(decay_steps[t + 1], g_steps[t + 1])
            carry = decay[:, 0] * g[:, 0]  # (N, B, D)
            grad_B[:, span] = _sum_channels(torch.mul(g, dt_c * x_c, out=product), groups)
            grad_C[:, span] = _sum_channels(torch.mul(states, grad_y_c, out=product), groups)
            grad_dtx = _sum_states(g, B_c)  # (Q, B, D)
            w = g.mul_(decay)
            w[:, 1:].mul_(states[:, :-1])
            w[:, 0].mul_(starts[index])
            grad_x[:, span] = (grad_dtx * dt_c).transpose(0, 1)
            grad_dt_c = _sum_states(w, A_rows[:, None, None, :, None])
            grad_dt[:, span] = grad_dt_c.addcmul_(grad_dtx, x_c).transpose(0, 1)
            grad_A += torch.mul(w, dt_c, out=product).sum((1, 2))
        return grad_x, grad_dt, grad_A.t(), grad_B, grad_C, carry.permute(1, 2, 0)


# ------------------------------------------------------------------------------------------------ selective scan: Triton
# What one program owns: W channels of one sequence, over one segment of time. Its states live in registers, as a tile (N, W);
# values per channel are (1, W), values per state (N, 1). Inside the kernels, and in what they keep, states lie as (N, D).
#
# Parallel: batch, channels, and segments of time. Carried: the state, from step to step in registers. If batch x channels
# fill the GPU there is one segment. If not, time is cut: first every segment is scanned as if it began at zero, then
# _carry_kernel adds up what each segment inherits, then the same kernel runs again from the right states. A segment forgets
#     prod_t exp(dt_t A) = exp(A sum_t dt_t),
# so all it has to leave behind is its last state and its sum of dt.
#
# Recomputed in backward: the states, from the one kept before every TRITON_CHUNK-th step. All of them would be (B, L, D, N)
# float32, 32 times the size of a bf16 x at N = 16: to write and read that takes longer than to compute it again.
#
# Threads: a warp should hold W = 16 channels x 2 states at a time and each thread the other states, so that the sum over
# states (for y) begins inside a thread. That is Triton's layout for a tile whose rows it may not read in larger pieces. It
# would: rows are aligned. `zero`, an offset that is 0 but must not be specialized as such, hides the alignment.
TRITON_CHUNK = 8
_tile_jit = triton.jit(do_not_specialize=["zero"]) if triton else _jit


@_jit
def _tile(d_inner: tl.constexpr, d_state: tl.constexpr, groups: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's part of (N, D), by axis 0 of the grid, which runs over groups and blocks of channels within a group.

    -> group, block, channels d (1, W) and whether they exist, states n (N, 1) and whether they exist.
    """
    per_group = d_inner // groups
    blocks = tl.cdiv(per_group, BLOCK_D)
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    in_group = block * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]  # (1, W)
    n = tl.arange(0, BLOCK_N)[:, None]  # (N, 1)
    return group, block, group * per_group + in_group, in_group < per_group, n, n < d_state


@_tile_jit
def _scan_forward_kernel(x, dt, A, B, C, D, z, dt_bias, h_start, y, kept, h_end, dt_sum,
                         length, segment_length, zero, d_inner: tl.constexpr, d_state: tl.constexpr, groups: tl.constexpr,
                         SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """y (B, L, D); the state before every CHUNK-th step, kept (B, L/CHUNK, N, D); h_end (B, S, N, D), dt_sum (B, S, D) of
    each segment, from h_start (B, S, N, D). Grid: blocks of channels, S segments, B."""
    group, _, d, is_d, n, is_n = _tile(d_inner, d_state, groups, BLOCK_D, BLOCK_N)
    segment, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = batch * tl.num_programs(1) + segment  # of this program in (B, S)
    states, is_state = n * d_inner + d + zero, is_d & is_n  # (N, W): offsets in (N, D)
    A2 = _load(A + states, is_state) * 1.4426950408889634  # A log2 e, as e^u = 2^(u log2 e)
    D, dt_bias = _load(D + d, is_d), _load(dt_bias + d, is_d)  # (1, W)
    h = _load(h_start + place * d_inner * d_state + states, is_state)  # (N, W)
    total = tl.zeros_like(dt_bias)
    begin = segment * segment_length
    end = tl.minimum(begin + segment_length, length)
    end_d, end_n = tl.where(is_d, end, 0), tl.where(is_n, end, 0)  # step t is there for channel d if t < end_d, for n likewise
    for first in range(begin, end, CHUNK):
        tl.store(kept + (batch * tl.cdiv(length, CHUNK) + first // CHUNK) * d_inner * d_state + states, h, mask=is_state)
        # Ask for the inputs of all steps of the chunk at once: they then share the waiting for memory.
        inputs = ()
        for i in tl.static_range(CHUNK):
            row, has_d, has_n = batch * length + first + i, first + i < end_d, first + i < end_n
            channels, state_row = row * d_inner + d, (row * groups + group) * d_state + n
            inputs += ((_load(x + channels, has_d), _load(dt + channels, has_d),
                        _load(z + channels, has_d) if z is not None else 0.0,
                        _load(B + state_row, has_n), _load(C + state_row, has_n)),)
        for i in tl.static_range(CHUNK):
            x_t, dt_t, z_t, B_t, C_t = inputs[i]
            dt_t = _softplus(dt_t + dt_bias) if SOFTPLUS else dt_t + dt_bias
            dt_t = tl.where(first + i < end_d, dt_t, 0.0)  # past the end: nothing is forgotten, nothing added
            h = tl.exp2(dt_t * A2) * h + (dt_t * x_t) * B_t  # (N, W)
            y_t = tl.sum(h * C_t, axis=0, keep_dims=True) + D * x_t  # (1, W)
            if z is not None:
                y_t *= z_t * _sigmoid(z_t)
            total += dt_t
            tl.store(y + (batch * length + first + i) * d_inner + d, y_t, mask=first + i < end_d)
    tl.store(h_end + place * d_inner * d_state + states, h, mask=is_state)
    tl.store(dt_sum + place * d_inner + d, total, mask=is_d)


@_jit
def _carry_kernel(first, left, dt_sum, A, inherited, segments, d_inner, d_state, REVERSED: tl.constexpr, BLOCK: tl.constexpr):
    """inherited[s + 1] = exp(A dt_sum[s]) inherited[s] + left[s], from inherited[0] = first: what each segment begins with.

    first (B, N, D), left, inherited (B, S, N, D), dt_sum (B, S, D). REVERSED: from the last segment to the first, as gradients
    go. One program: BLOCK entries of one batch's (N, D). Grid: blocks, B.
    """
    states, batch = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    size = d_inner * d_state
    A = _load(A + states, states < size)
    h = _load(first + batch * size + states, states < size)
    for i in range(segments):
        place = batch * segments + (segments - 1 - i if REVERSED else i)
        tl.store(inherited + place * size + states, h, mask=states < size)
        total = _load(dt_sum + place * d_inner + states % d_inner, states < size)
        h = _exp(A * total) * h + _load(left + place * size + states, states < size)


@_tile_jit
def _scan_backward_kernel(x, dt, A, B, C, D, z, dt_bias, kept, grad_y, g_end,
                          grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_dt_bias, g_start,
                          length, segment_length, zero, d_inner: tl.constexpr, d_state: tl.constexpr, groups: tl.constexpr,
                          SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """The equations of _SelectiveScan, one program going backwards through its segment, chunk by chunk.

    A chunk is run forward once more from its kept state; its CHUNK states then stand in registers for the way back. Sums that
    cross programs are left as parts, to be added in a fixed order afterwards (no atomics: the same result every time):
    grad_A (B, S, N, D), grad_D, grad_dt_bias (B, S, D), and grad_B, grad_C (blocks of channels, B, L, G, N).
    """
    group, block, d, is_d, n, is_n = _tile(d_inner, d_state, groups, BLOCK_D, BLOCK_N)
    segment, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = batch * tl.num_programs(1) + segment
    states, is_state = n * d_inner + d + zero, is_d & is_n  # (N, W)
    A2 = _load(A + states, is_state) * 1.4426950408889634  # A log2 e, as e^u = 2^(u log2 e)
    D, dt_bias = _load(D + d, is_d), _load(dt_bias + d, is_d)  # (1, W)
    g = _load(g_end + place * d_inner * d_state + states, is_state)  # (N, W): gradient of the state after the step
    sum_A, sum_D, sum_bias = tl.zeros_like(A2), tl.zeros_like(D), tl.zeros_like(D)
    begin = segment * segment_length
    end = tl.minimum(begin + segment_length, length)
    end_d, end_n = tl.where(is_d, end, 0), tl.where(is_n, end, 0)  # step t is there for channel d if t < end_d, for n likewise
    part = (block * tl.num_programs(2) + batch) * length  # row of grad_B's part
    for back in range(0, tl.cdiv(end - begin, CHUNK)):
        first = begin + (tl.cdiv(end - begin, CHUNK) - 1 - back) * CHUNK
        h = _load(kept + (batch * tl.cdiv(length, CHUNK) + first // CHUNK) * d_inner * d_state + states, is_state)
        before = ()  # the state before each step of the chunk
        for i in tl.static_range(CHUNK):
            row, has_d, has_n = batch * length + first + i, first + i < end_d, first + i < end_n
            x_t, dt_t = _load(x + row * d_inner + d, has_d), _load(dt + row * d_inner + d, has_d)
            B_t = _load(B + (row * groups + group) * d_state + n, has_n)
            dt_t = _softplus(dt_t + dt_bias) if SOFTPLUS else dt_t + dt_bias
            dt_t = tl.where(has_d, dt_t, 0.0)
            before += (h,)
            h = tl.exp2(dt_t * A2) * h + (dt_t * x_t) * B_t
        for i in tl.static_range(CHUNK - 1, -1, -1):
            row, has_d, has_n = batch * length + first + i, first + i < end_d, first + i < end_n
            channels, state_row = row * d_inner + d, (row * groups + group) * d_state + n
            x_t, raw = _load(x + channels, has_d), _load(dt + channels, has_d) + dt_bias
            grad_y_t, B_t, C_t = _load(grad_y + channels, has_d), _load(B + state_row, has_n), _load(C + state_row, has_n)
            dt_t = tl.where(has_d, _softplus(raw) if SOFTPLUS else raw, 0.0)
            if z is not None:
                z_t = _load(z + channels, has_d)
                gate = _sigmoid(z_t)
                y_t = tl.sum(h * C_t, axis=0, keep_dims=True) + D * x_t
                tl.store(grad_z + channels, grad_y_t * y_t * gate * (1 + z_t * (1 - gate)), mask=has_d)
                grad_y_t *= z_t * gate
            g += C_t * grad_y_t
            grad_B_t = tl.sum(g * (dt_t * x_t), axis=1, keep_dims=True)  # (N, 1)
            grad_C_t = tl.sum(h * grad_y_t, axis=1, keep_dims=True)
            part_row = ((part + first + i) * groups + group) * d_state + n
            tl.store(grad_B + part_row, grad_B_t, mask=has_n)
            tl.store(grad_C + part_row, grad_C_t, mask=has_n)
            h = before[i]
            grad_dtx = tl.sum(g * B_t, axis=0, keep_dims=True)  # (1, W)
            g *= tl.exp2(dt_t * A2)  # now the gradient of the state before the step
            w = g * h  # (N, W): the gradient of dt_t A
            sum_A += dt_t * w
            grad_dt_t = tl.sum(w * A2, axis=0, keep_dims=True) * 0.6931471805599453 + grad_dtx * x_t  # A = A2 ln 2
            if SOFTPLUS:
                grad_dt_t *= _sigmoid(raw)
            sum_D += grad_y_t * x_t
            sum_bias += tl.where(has_d, grad_dt_t, 0.0)
            tl.store(grad_x + channels, grad_dtx * dt_t + D * grad_y_t, mask=has_d)
            tl.store(grad_dt + channels, grad_dt_t, mask=has_d)
    tl.store(g_start + place * d_inner * d_state + states, g, mask=is_state)
    tl.store(grad_A + place * d_inner * d_state + states, sum_A, mask=is_state)
    tl.store(grad_D + place * d_inner + d, sum_D, mask=is_d)
    tl.store(grad_dt_bias + place * d_inner + d, sum_bias, mask=is_d)


def _segments(programs, length, device):
    """Into how many pieces to cut time: enough for 8 programs per multiprocessor, each piece of 128 steps or more."""
    wanted = 8 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(wanted // programs, triton.cdiv(length, 128)))


def _scan_plan(x, A, groups):
    """-> the grid (blocks of channels, S segments, B), blocks per group, sizes and constants of both scan kernels. A is (N, D)."""
    (batch, length, d_inner), d_state = x.shape, A.shape[0]
    block_n = triton.next_power_of_2(d_state)
    block_d = 16 if block_n < 256 else 8
    blocks = triton.cdiv(d_inner // groups, block_d)
    segments = _segments(batch * groups * blocks, length, x.device)
    segment_length = TRITON_CHUNK * triton.cdiv(triton.cdiv(length, segments), TRITON_CHUNK)
    grid = (groups * blocks, triton.cdiv(length, segment_length), batch)
    warps = max(1, block_n * block_d // 256)  # 8 states to a thread
    constants = dict(CHUNK=TRITON_CHUNK, BLOCK_D=block_d, BLOCK_N=block_n, num_warps=warps, **FUSED)
    return grid, blocks, (length, segment_length, 0, d_inner, d_state, groups), constants


def _carry(first, left, dt_sum, A, inherited, reverse):
    batch, segments, d_state, d_inner = left.shape
    grid = (triton.cdiv(d_inner * d_state, 256), batch)
    _carry_kernel[grid](first, left, dt_sum, A, inherited, segments, d_inner, d_state, REVERSED=reverse, BLOCK=256, **FUSED)


class _SelectiveScanTriton(torch.autograd.Function):
    """The whole of `selective_scan`: step size, skip and gate too, so that each input is read once and y written once."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, dt_bias, h0, softplus):
        x, dt, z, B, C, D, dt_bias = (u if u is None else u.contiguous() for u in (x, dt, z, B, C, D, dt_bias))
        A, h0 = A.t().contiguous(), h0.transpose(1, 2).contiguous()  # (N, D), (B, N, D)
        grid, _, sizes, constants = _scan_plan(x, A, B.shape[2])
        (_, segments, batch), length = grid, x.shape[1]
        y, dt_sum = torch.empty_like(x), A.new_empty(batch, segments, x.shape[2])
        kept = A.new_empty(batch, triton.cdiv(length, TRITON_CHUNK), *A.shape)
        h_start, h_end = h0[:, None], A.new_empty(batch, segments, *A.shape)

        def scan():
            _scan_forward_kernel[grid](x, dt, A, B, C, D, z, dt_bias, h_start, y, kept, h_end, dt_sum, *sizes,
                                       SOFTPLUS=softplus, **constants)

        if segments > 1:
            h_start = torch.zeros_like(h_end)
            scan()
            _carry(h0, h_end, dt_sum, A, h_start, reverse=False)
        scan()
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, kept, dt_sum)
        ctx.softplus = softplus
        return y, h_end[:, -1].transpose(1, 2).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_h):
        x, dt, A, B, C, D, z, dt_bias, kept, dt_sum = ctx.saved_tensors
        grad_y, grad_h = grad_y.contiguous(), grad_h.transpose(1, 2).contiguous()
        grid, blocks, sizes, constants = _scan_plan(x, A, B.shape[2])
        _, segments, batch = grid
        grad_x, grad_dt, grad_z = (u if u is None else torch.empty_like(u) for u in (x, dt, z))
        grad_A, g_start = (A.new_empty(batch, segments, *A.shape) for _ in range(2))
        grad_D, grad_bias = torch.empty_like(dt_sum), torch.empty_like(dt_sum)
        grad_B, grad_C = (A.new_empty(blocks, *B.shape) for _ in range(2))
        g_end = grad_h[:, None]

        def scan():
            _scan_backward_kernel[grid](x, dt, A, B, C, D, z, dt_bias, kept, grad_y, g_end, grad_x, grad_dt, grad_A, grad_B,
                                        grad_C, grad_D, grad_z, grad_bias, g_start, *sizes, SOFTPLUS=ctx.softplus, **constants)

        if segments > 1:
            g_end = torch.zeros_like(g_start)
            scan()
            _carry(grad_h, g_start, dt_sum, A, g_end, reverse=True)
        scan()
        return (grad_x, grad_dt, grad_A.sum((0, 1)).t(), grad_B.sum(0).to(B.dtype), grad_C.sum(0).to(C.dtype),
                grad_D.sum((0, 1)), grad_z, grad_bias.sum((0, 1)), g_start[:, 0].transpose(1, 2), None)


# ------------------------------------------------------------------------------------------------ selective scan: public
def selective_scan(x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, h0=None, backend="auto"):
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t;  y_t = (C_t h_t + D x_t) SiLU(z_t)  -> (y, h after the last step).

    x, dt, z (B, L, D); A (D, N); B, C (B, L, G, N), channel d reads group d // (D // G); D, dt_bias (D,); h0 (B, D, N),
    None for zeros. With dt_softplus, dt is softplus(dt + dt_bias), else dt + dt_bias. Inputs of any float dtype;
    y (B, L, D) has x's, h (B, D, N) is float32 (float64 for float64 x). Differentiable in every tensor, and through h.
    ValueError names a tensor of wrong shape, or says why the backend can't run.
    """
    by_triton = _use_triton(backend, x, dt, A, B, C, D, z, dt_bias, h0)
    _check_scan(x, dt, A, B, C, D, z, dt_bias, h0)
    if by_triton:
        A, D, dt_bias, h0 = (v if v is None else v.float() for v in (A, D, dt_bias, h0))
        D, dt_bias = (A.new_zeros(len(A)) if v is None else v for v in (D, dt_bias))
        h0 = A.new_zeros(x.shape[0], *A.shape) if h0 is None else h0
        return _SelectiveScanTriton.apply(x, dt, A, B, C, D, z, dt_bias, h0, dt_softplus)
    dtype = _compute_dtype(x)
    u, dt, A, B, C, D, z, dt_bias, h0 = (v if v is None else v.to(dtype) for v in (x, dt, A, B, C, D, z, dt_bias, h0))
    if h0 is None:
        h0 = u.new_zeros(u.shape[0], *A.shape)  # (B, D, N)
    dt = _step_size(dt, dt_bias, dt_softplus)
    scan = _scan_loop if backend == "ref" else _SelectiveScan.apply
    y, h = scan(u, dt, A, B, C, h0)
    return _skip_and_gate(y, u, D, z).to(x.dtype), h


def selective_scan_ref(x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, h0=None, backend="ref"):
    """The selective scan as a literal loop over time: arguments, results and errors of `selective_scan`, any backend."""
    return selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, h0, backend="ref")


# ------------------------------------------------------------------------------------------------ SSD: loop, step
def _check_ssd(x, log_decay, B, C, h0, chunk):
    _check("x", x, (None, None, None, None), "(B, L, H, P)")
    batch, length, n_heads, head_dim = x.shape
    _check("log_decay", log_decay, (batch, length, n_heads), "(B, L, H)")
    _check("B", B, (batch, length, n_heads, None), "(B, L, H, N)")
    _check("C", C, tuple(B.shape), "(B, L, H, N)")
    if h0 is not None:
        _check("h0", h0, (batch, n_heads, head_dim, B.shape[3]), "(B, H, P, N)")
    if length == 0 or chunk < 1:
        raise ValueError(f"x has length {length} and chunk is {chunk}, expected both to be 1 or more")


def _ssd_loop(x, log_decay, B, C, h):
    """x (B, L, H, P), log_decay (B, L, H), B, C (B, L, H, N), h (B, H, P, N) -> y (B, L, H, P), h."""
    ys = []
    for t in range(x.shape[1]):
        h = torch.exp(log_decay[:, t])[..., None, None] * h + x[:, t, :, :, None] * B[:, t, :, None]  # (B, H, P, N)
        ys.append((h * C[:, t, :, None]).sum(-1))  # (B, H, P)
    return torch.stack(ys, dim=1), h


@_jit
def _ssd_step_kernel(h, x, log_decay, B, C, y, n_heads, head_dim, d_state, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program: BLOCK_P rows of one head's state, read once and written once. Grid: blocks of rows, H, B."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]  # (P, 1)
    n = tl.arange(0, BLOCK_N)[None, :]  # (1, N)
    head, is_p, is_n = tl.program_id(2).to(tl.int64) * n_heads + tl.program_id(1), p < head_dim, n < d_state
    state = (head * head_dim + p) * d_state + n  # (P, N)
    decay = _exp(tl.load(log_decay + head).to(tl.float32))
    x_t, B_t, C_t = (_load(x + head * head_dim + p, is_p), _load(B + head * d_state + n, is_n),
                     _load(C + head * d_state + n, is_n))
    h_t = decay * _load(h + state, is_p & is_n) + x_t * B_t
    tl.store(h + state, h_t, mask=is_p & is_n)
    tl.store(y + head * head_dim + p, tl.sum(h_t * C_t, axis=1, keep_dims=True), mask=is_p)


def _ssd_step_triton(h, x, log_decay, B, C):
    (batch, n_heads, head_dim), d_state = x.shape, B.shape[2]
    y, block_n = torch.empty_like(x, memory_format=torch.contiguous_format), triton.next_power_of_2(d_state)
    block_p = min(triton.next_power_of_2(head_dim), max(1, 4096 // block_n))
    x, log_decay, B, C = (u.contiguous() for u in (x, log_decay, B, C))
    _ssd_step_kernel[triton.cdiv(head_dim, block_p), n_heads, batch](
        h, x, log_decay, B, C, y, n_heads, head_dim, d_state, BLOCK_P=block_p, BLOCK_N=block_n, **FUSED)
    return y


def ssd_step(h, x, log_decay, B, C, backend="auto"):
    """One token of `ssd`: x (B, H, P), log_decay (B, H), B, C (B, H, N) -> y (B, H, P); h (B, H, P, N) changes in place."""
    if _steps_by_triton(backend, h, x, log_decay, B, C) and h.is_contiguous():
        return _ssd_step_triton(h, x, log_decay, B, C)
    dtype = h.dtype
    h.mul_(log_decay.to(dtype).exp()[..., None, None])
    h.addcmul_(x.to(dtype)[..., None], B.to(dtype)[..., None, :])  # (B, H, P, 1) * (B, H, 1, N)
    with torch.autocast(h.device.type, enabled=False):
        y = C.to(dtype)[..., None, :] @ h.transpose(-1, -2)  # (B, H, 1, N) @ (B, H, N, P), faster than h @ C[..., None]
    return y[..., 0, :].to(x.dtype)


# ------------------------------------------------------------------------------------------------ SSD: matrices
class _Decayed(torch.autograd.Function):
    """T_ts = scores_ts exp(sum_{k=s+1..t} log_decay_k) for s <= t, 0 above: (..., L, L), (..., L) -> (..., L, L).

    The sum is total_t - total_s with cumulative sums `total`. Such differences cancel badly in float32, so total is a
    float64 sum, of terms cut at -1000, where exp is 0 anyway, then split into a float32 and its float32 remainder: the
    difference of each is cheap, and together they are exact to float32. Above the diagonal exp may overflow: it is
    assigned 0 there, not multiplied by 0. Backward: w = grad_T * T is the gradient of total_t - total_s, so that of total
    is row sums minus column sums of w, and log_decay_k is part of every total_t with t >= k.
    """

    @staticmethod
    def forward(ctx, scores, log_decay):
        total = log_decay.double().clamp_(min=-1000).cumsum(-1).mul_(LOG2_E)  # (..., L)
        high = total.to(log_decay.dtype)  # (..., L)
        low = (total - high).to(log_decay.dtype)  # (..., L)
        decay = high[..., :, None] - high[..., None, :]  # (..., L, L)
        decay.add_(low[..., :, None]).sub_(low[..., None, :]).exp2_().tril_()
        T = scores * decay  # (..., L, L)
        ctx.save_for_backward(decay, T)
        return T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_T):
        decay, T = ctx.saved_tensors
        w = grad_T * T  # (..., L, L)
        grad_total = w.sum(-1).double() - w.sum(-2)  # (..., L)
        return grad_T * decay, grad_total.flip(-1).cumsum(-1).flip(-1).to(w.dtype)


def mixing_matrix(log_decay, B, C):
    """The map x -> y of `ssd` as matrices: T_ts = (C_t . B_s) exp(sum_{k=s+1..t} log_decay_k) for s <= t, else 0.

    log_decay (B, L, H), B, C (B, L, H, N) -> T (B, H, L, L) float32 (float64 for float64 B). Differentiable.
    """
    _check("B", B, (None, None, None, None), "(B, L, H, N)")
    _check("log_decay", log_decay, tuple(B.shape[:3]), "(B, L, H)")
    _check("C", C, tuple(B.shape), "(B, L, H, N)")
    dtype = _compute_dtype(B)
    log_decay, B, C = log_decay.to(dtype), B.to(dtype), C.to(dtype)
    with torch.autocast(B.device.type, enabled=False):
        scores = C.transpose(1, 2) @ B.permute(0, 2, 3, 1)  # (B, H, L, N) @ (B, H, N, L) -> (B, H, L, L)
        return _Decayed.apply(scores, log_decay.transpose(1, 2))


def _split_chunks(u, chunk):
    """(B, L, H, ...) -> (B, H, L / chunk, chunk, ...), with zeros after the end if chunk does not divide L."""
    missing = -u.shape[1] % chunk
    if missing:
        u = torch.cat([u, u.new_zeros(u.shape[0], missing, *u.shape[2:])], dim=1)
    return u.unflatten(1, (-1, chunk)).movedim(3, 1)


def _product(a, b, dtype):
    """a @ b with both in `dtype`, back in a's: half precision is what puts a product on a GPU's tensor cores."""
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


def _ssd_chunks(x, log_decay, B, C, h, chunk, product_dtype):
    """SSD with matrices inside chunks of Q steps and a loop over chunks (Dao & Gu 2024, section 6): L/Q steps, not L.

    y_t = sum_{s<=t in the chunk} T_ts x_s + exp(sum_{chunk start..t} log_decay) (h at chunk start) C_t. Padding at the
    end has log_decay 0, x 0, so it leaves the final state alone. The four products are nearly all of the work.
    """
    length, chunk = x.shape[1], min(chunk, x.shape[1])
    x, log_decay, B, C = (_split_chunks(u, chunk) for u in (x, log_decay, B, C))  # (B, H, L/Q, Q, P | - | N | N)
    scores = _product(C, B.transpose(-1, -2), product_dtype)  # (B, H, L/Q, Q, Q)
    inside = _product(_Decayed.apply(scores, log_decay), x, product_dtype)  # (B, H, L/Q, Q, P)
    from_start = log_decay.cumsum(-1).exp()  # (B, H, L/Q, Q)
    after = F.pad(log_decay[..., 1:], (0, 1))  # (B, H, L/Q, Q): what the next step forgets, nothing after the last
    to_end = after.flip(-1).cumsum(-1).flip(-1).exp()  # (B, H, L/Q, Q)
    adds = _product((x * to_end[..., None]).transpose(-1, -2), B, product_dtype)  # (B, H, L/Q, P, N)
    starts = []
    for add, keep in zip(adds.unbind(2), from_start[..., -1].unbind(2)):
        starts.append(h)
        h = keep[..., None, None] * h + add  # (B, H, P, N)
    before = _product(C, torch.stack(starts, 2).transpose(-1, -2), product_dtype)  # (B, H, L/Q, Q, P)
    y = torch.addcmul(inside, before, from_start[..., None])
    return y.movedim(1, 3).flatten(1, 2)[:, :length], h


def ssd(x, log_decay, B, C, h0=None, chunk=64, backend="auto"):
    """h_t = exp(log_decay_t) h_{t-1} + x_t B_t^T;  y_t = h_t C_t  -> (y, h after the last step).

    x (B, L, H, P), log_decay (B, L, H) <= 0, B, C (B, L, H, N), h0 (B, H, P, N), None for zeros. Inputs of any float dtype;
    y (B, L, H, P) has x's, h (B, H, P, N) is float32 (float64 for float64 x). Differentiable in every tensor, and through
    h. chunk changes speed and memory only. On a GPU, inputs in half precision are multiplied in it, on tensor cores (sums and
    states stay float32); matrix products in PyTorch are all it takes, so there is no Triton backend. ValueError names a
    tensor of wrong shape.
    """
    if backend == "triton":
        raise ValueError("backend is 'triton', but ssd is made of PyTorch's matrix products; expected 'auto', 'torch' or 'ref'")
    _check_backend(backend)
    _check_ssd(x, log_decay, B, C, h0, chunk)
    dtype = _compute_dtype(x)
    u, log_decay, B, C = (v.to(dtype) for v in (x, log_decay, B, C))
    h0 = u.new_zeros(u.shape[0], *u.shape[2:], B.shape[3]) if h0 is None else h0.to(dtype)  # (B, H, P, N)
    with torch.autocast(x.device.type, enabled=False):
        if backend == "ref":
            y, h = _ssd_loop(u, log_decay, B, C, h0)
        else:
            y, h = _ssd_chunks(u, log_decay, B, C, h0, chunk, product_dtype=x.dtype if x.is_cuda else dtype)
    return y.to(x.dtype), h


def ssd_ref(x, log_decay, B, C, h0=None, chunk=64, backend="ref"):
    """SSD as a literal loop over time: arguments, results and errors of `ssd`, any chunk and backend."""
    return ssd(x, log_decay, B, C, h0, chunk, backend="ref")


# ------------------------------------------------------------------------------------------------ attention to a cache
def decode_attention_ref(q, keys, values, lengths):
    """decode_attention by the definition: all T columns are read, those behind a row's end weigh nothing."""
    dtype, (n_kv_heads, capacity, head_dim) = _compute_dtype(q), keys.shape[1:]
    rows = q.to(dtype).unflatten(1, (n_kv_heads, -1))  # (B, K, G, h)
    scores = rows @ keys.to(dtype).transpose(2, 3) * head_dim ** -0.5  # (B, K, G, T)
    hidden = (torch.arange(capacity, device=q.device) >= lengths[:, None])[:, None, None]  # (B, 1, 1, T)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden, 0)  # an empty row's are nan, then 0
    return (weights @ values.to(dtype)).flatten(1, 2).to(q.dtype)


@_jit
def _decode_attention_kernel(q, keys, values, lengths, y, lse, stride_b, stride_k, parts, SCALE: tl.constexpr,
                             GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr,
                             BLOCK_T: tl.constexpr, WIDEN: tl.constexpr):
    """One program: one part of the used columns of one row and kv head, for the G query heads that share it. Softmax online
    (Milakov & Gimelshein 2018): the running maximum and sum rescale what is there. Grid: parts, K, B.

    y (B, K, parts, G, h) is the attention to the part alone, lse (B, K, parts, G) the base-2 logarithm of its weight."""
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    columns = tl.cdiv(tl.cdiv(length, parts), BLOCK_T) * BLOCK_T
    start, end = part * columns, tl.minimum(part * columns + columns, length)
    g, c, t = tl.arange(0, BLOCK_G)[:, None], tl.arange(0, BLOCK_H)[None, :], tl.arange(0, BLOCK_T)[:, None]
    is_g, is_c, program = g < GROUP, c < HEAD_DIM, row * tl.num_programs(1) + head
    q_g = tl.load(q + (program * GROUP + g) * HEAD_DIM + c, mask=is_g & is_c, other=0.0)  # (G, h)
    cache = row * stride_b + head * stride_k + c
    top = tl.full((BLOCK_G, 1), -1e30, tl.float32)
    total, sums = tl.zeros((BLOCK_G, 1), tl.float32), tl.zeros((BLOCK_G, BLOCK_H), tl.float32)
    for first in range(start, end, BLOCK_T):
        column = first + t  # (T, 1)
        k = tl.load(keys + cache + column * HEAD_DIM, mask=(column < end) & is_c, other=0.0)  # (T, h)
        v = tl.load(values + cache + column * HEAD_DIM, mask=(column < end) & is_c, other=0.0)
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q_g.to(k.dtype), tl.trans(k), input_precision="ieee") * SCALE  # (G, T)
        scores = tl.where(tl.trans(column) < end, scores, -1e30)
        higher = tl.maximum(top, tl.max(scores, axis=1, keep_dims=True))
        weights, keep = tl.exp2(scores - higher), tl.exp2(top - higher)  # (G, T), (G, 1)
        total = total * keep + tl.sum(weights, axis=1, keep_dims=True)
        sums = sums * keep + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    out = (program * tl.num_programs(0) + part) * GROUP + g
    tl.store(y + out * HEAD_DIM + c, sums / tl.maximum(total, 1e-30), mask=is_g & is_c)
    tl.store(lse + out, top + tl.log2(tl.maximum(total, 1e-30)), mask=is_g)


def _decode_attention_triton(q, keys, values, lengths):
    batch, n_kv_heads, capacity, head_dim = keys.shape
    group, block_h = q.shape[1] // n_kv_heads, max(16, triton.next_power_of_2(head_dim))  # tl.dot takes 16 or more
    parts = _segments(batch * n_kv_heads, capacity, q.device)
    y = torch.empty(batch, n_kv_heads, parts, group, head_dim, device=q.device)
    lse = torch.empty(batch, n_kv_heads, parts, group, device=q.device)
    _decode_attention_kernel[parts, n_kv_heads, batch](
        q.contiguous(), keys, values, lengths, y, lse, *keys.stride()[:2], parts, SCALE=head_dim ** -0.5 * LOG2_E,
        GROUP=group, HEAD_DIM=head_dim, BLOCK_G=max(16, triton.next_power_of_2(group)), BLOCK_H=block_h, BLOCK_T=64,
        WIDEN=triton.knobs.runtime.interpret, **FUSED)  # Triton's interpreter multiplies no bfloat16
    if parts > 1:  # each part weighs 2^lse
        weights = torch.softmax(lse / LOG2_E, dim=2)  # (B, K, parts, G)
        y = (y * weights[..., None]).sum(2, keepdim=True)
    return y.view(batch, -1, head_dim).to(q.dtype)


def decode_attention(q, keys, values, lengths, backend="auto"):
    """Attention of each row's newest token to its cache: softmax(q k^T / sqrt(h)) v over the row's first `lengths` columns.

    q (B, H, h), keys and values (B, K, T, h), lengths (B,) integers -> (B, H, h) in q's dtype; an empty row gives 0. Query
    heads g G .. g G + G - 1 share kv head g, G = H / K. Nothing is read behind a row's end, and lengths stay where they are:
    no waiting for the host. Sums are float32. backend "torch" is the reference.
    """
    _check("q", q, (None, None, None), "(B, H, h)")
    _check("keys", keys, (q.shape[0], None, None, q.shape[2]), "(B, K, T, h)")
    _check("values", values, tuple(keys.shape), "(B, K, T, h)")
    _check("lengths", lengths, (q.shape[0],), "(B,)")
    if q.shape[1] % keys.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads and keys {keys.shape[1]}, expected a multiple")
    in_place = keys.stride()[2:] == values.stride()[2:] == (q.shape[2], 1) and keys.stride() == values.stride()
    if _steps_by_triton(backend, q, keys, values, lengths) and in_place:
        return _decode_attention_triton(q, keys, values, lengths)
    return decode_attention_ref(q, keys, values, lengths)


# ------------------------------------------------------------------------------------------------ check
PARAMETERS, TIMED = {"A", "D", "dt_bias", "weight", "bias"}, {"x", "dt", "z", "B", "C", "log_decay"}


def _conv_by_torch(x, weight, bias, state):
    padded = torch.cat([state, x.transpose(1, 2).to(state.dtype)], dim=2)  # (B, D, K-1+L)
    return F.conv1d(padded, weight, bias, groups=x.shape[2]).transpose(1, 2), padded[..., x.shape[1]:]


def _matrix_times_x(x, log_decay, B, C):
    return (mixing_matrix(log_decay, B, C) @ x.transpose(1, 2).float()).transpose(1, 2)  # (B, H, L, L) @ (B, H, L, P)


def _in_place(step, state_name):
    """A step as a function of all its inputs that returns y and the state it has changed."""
    def call(**inputs):
        state = inputs.pop(state_name)
        return step(state, **inputs), state
    return call


def _as_sequence(sequence):
    """A sequence function on a single token: what a step is compared with."""
    def call(**inputs):
        y, state = sequence(**{name: u[:, None] if name in TIMED else u for name, u in inputs.items()})
        return y[:, 0], state
    return call


def _random_inputs(batch, length, d_inner, d_state, dtype, device, head_dim=64, width=4):
    """Arguments of causal_conv, selective_scan and ssd, as three dicts; parameters and states in float32."""
    def draw(**shapes):
        return {name: torch.randn(shape, device=device).to(torch.float32 if name in PARAMETERS | {"state", "h0"} else dtype)
                for name, shape in shapes.items()}

    n_heads = max(1, d_inner // head_dim)
    head_dim = d_inner // n_heads
    sequence, states, heads = (batch, length, d_inner), (batch, length, 1, d_state), (batch, length, n_heads, head_dim)
    conv = draw(x=sequence, weight=(d_inner, 1, width), bias=(d_inner,), state=(batch, d_inner, width - 1))
    scan = draw(x=sequence, dt=sequence, A=(d_inner, d_state), B=states, C=states, D=(d_inner,), z=sequence, dt_bias=(d_inner,),
                h0=(batch, d_inner, d_state))
    scan["A"] = -scan["A"].abs()
    matrices = draw(x=heads, log_decay=heads[:3], B=heads, C=heads, h0=(batch, n_heads, head_dim, head_dim))
    matrices |= {"log_decay": -matrices["log_decay"].abs(), "B": matrices["B"] / head_dim}
    return conv, scan, matrices


def _cases(batch, length, d_inner, d_state, dtype, device):
    """Rows of the table: (name, whether gradients too, {backend: function of the inputs}, inputs, exponentials in one forward).
    The steps take 32 times the batch, as decoding does."""
    conv, scan, matrices = _random_inputs(batch, length, d_inner, d_state, dtype, device)
    backends = {name: dict(backend=name, dt_softplus=True) for name in ("triton", "torch", "ref")}
    sequences = (
        ("causal_conv", conv, 0, {"triton": partial(causal_conv, backend="triton"), "torch": partial(causal_conv, backend="torch"),
                                  "ref": _conv_by_torch}),
        ("selective_scan", scan, scan["x"].numel() * d_state,
         {name: partial(selective_scan, **options) for name, options in backends.items()} | _peers()),
        ("ssd", matrices, 0, {"torch": ssd, "ref": ssd_ref}),
        ("mixing_matrix @ x", {name: u for name, u in matrices.items() if name != "h0"}, 0,
         {"torch": _matrix_times_x, "ref": lambda **inputs: ssd_ref(**inputs)[0]}))
    for name, inputs, exponentials, functions in sequences:
        yield name, False, functions, inputs, exponentials
        yield name + " + backward", True, functions, inputs, exponentials
    conv, scan, matrices = _random_inputs(32 * batch, 1, d_inner, d_state, dtype, device)
    steps = ((causal_conv_step, _conv_by_torch, {}, conv, "state", 0),
             (selective_step, selective_scan_ref, dict(dt_softplus=True), scan, "h0", scan["h0"].numel()),
             (ssd_step, ssd_ref, {}, matrices, "h0", 0))
    for step, sequence, options, inputs, state_name, exponentials in steps:
        functions = {backend: _in_place(partial(step, backend=backend, **options), state_name) for backend in ("triton", "torch")}
        functions["ref"] = _as_sequence(partial(sequence, **options))
        token = {name: u[:, 0] if name in TIMED else u for name, u in inputs.items()}
        yield step.__name__, False, functions, token, exponentials
    keys, values = torch.randn(2, batch, matrices["x"].shape[2], length, matrices["x"].shape[3], device=device).to(dtype)
    cache = dict(q=keys[:, :, 0].repeat(1, 4, 1), keys=keys, values=values,  # 4 query heads to a kv head
                 lengths=torch.full((batch,), length, device=device))
    yield "decode_attention", False, {name: partial(decode_attention, backend=name) for name in backends}, cache, 0


def _results(function, inputs, gradients):
    """All outputs and, if asked for, the gradient of half the sum of their squares with respect to each input."""
    leaves = {name: tensor.detach().requires_grad_(gradients) for name, tensor in inputs.items()}
    with torch.set_grad_enabled(gradients):
        outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not gradients:
        return outputs
    return *outputs, *torch.autograd.grad(outputs, leaves.values(), [output.detach() for output in outputs], allow_unused=True)


def _largest_error(found, wanted):
    """The largest difference, each tensor relative to its own largest entry."""
    return max(((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in zip(found, wanted))


# ------------------------------------------------------------------------------------------------ time
def _peers():
    """{name: the selective scan of another package, with our arguments}, of those that can be imported here."""
    peers = {}
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        def mamba_ssm(x, dt, A, B, C, D, z, dt_bias, h0):  # its state starts at zero
            x, dt, z = (u.transpose(1, 2).contiguous() for u in (x, dt, z))  # (B, D, L)
            B, C = (u.permute(0, 2, 3, 1).contiguous() for u in (B, C))  # (B, G, N, L)
            return selective_scan_fn(x, dt, A, B, C, D, z, dt_bias, delta_softplus=True).transpose(1, 2)
        peers["mamba_ssm"] = mamba_ssm
    except ImportError:
        pass
    try:
        from mambapy.pscan import pscan

        def mambapy(x, dt, A, B, C, D, z, dt_bias, h0):  # as its MambaBlock.selective_scan does
            dt = F.softplus(dt + dt_bias)
            h = pscan(torch.exp(dt[..., None] * A), (dt * x)[..., None] * B)  # (B, L, D, N), one group
            return ((h @ C[:, :, 0, :, None]).squeeze(3) + D * x) * F.silu(z)
        peers["mambapy"] = mambapy
    except ImportError:
        pass
    try:
        from transformers import MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer
        layers = {}

        def transformers_layer(x, dt, A, B, C, D, z, dt_bias, h0):  # the whole layer: its loop can't be called alone
            if x.shape[2] not in layers:
                config = MambaConfig(hidden_size=x.shape[2], intermediate_size=x.shape[2], expand=1, state_size=A.shape[1])
                layers[x.shape[2]] = MambaMixer(config, layer_idx=0).to(x.device, x.dtype)
            layer = layers[x.shape[2]]
            return getattr(layer, "_slow_forward", getattr(layer, "slow_forward", layer))(x)  # the name of version 5, of 4
        peers["transformers"] = transformers_layer
    except ImportError:
        pass
    return peers


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def _bandwidth(device):
    """Bytes per second of a large copy, reading and writing counted."""
    source = torch.ones(2 ** 28 if device.type == "cuda" else 2 ** 25, device=device)
    target = torch.empty_like(source)
    (milliseconds,) = _times([lambda: target.copy_(source)], 5, device)
    return 2e3 * source.numel() * source.element_size() / milliseconds


def _exponentials(device):
    """exp2 per second: on a GPU 16 per clock and multiprocessor (CUDA's table of arithmetic throughput), on a CPU as measured
    on numbers that stay in the cache."""
    if device.type == "cuda":
        properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
        return 16e3 * properties["multiprocessor_count"] * properties["sm_clock_rate"]
    u = torch.rand(2 ** 16)
    (milliseconds,) = _times([lambda: [torch.exp2(u, out=u) for _ in range(50)]], 5, device)
    return 50e3 * u.numel() / milliseconds


def _times(functions, repeats, device):
    """Median milliseconds of each function after a warm-up, the functions taking turns; on a GPU the mean of 10 calls in a
    row each time, so that launching is hidden as it is in a model."""
    calls, times = 10 if device.type == "cuda" else 1, [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, record in zip(functions, times):
            _synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                function()
            _synchronize(device)
            record.append(1e3 * (time.perf_counter() - start) / calls)
    return [statistics.median(record[1:]) for record in times]


def _in_turn(function, inputs, gradients, device):
    """A call without arguments; on a GPU it goes around copies of the inputs, of 256 MB together, so that no call finds its
    inputs in the cache of the one before."""
    size = sum(u.numel() * u.element_size() for u in inputs.values())
    count = 1 + int(2 ** 28 // size) if device.type == "cuda" else 1
    copies = itertools.cycle([inputs] + [{name: u.clone() for name, u in inputs.items()} for _ in range(min(count, 16) - 1)])
    return lambda: _results(function, next(copies), gradients)


def _bytes_to_move(inputs, outputs, gradients):
    """What has to cross the memory bus: inputs and outputs once; for gradients the inputs again, their gradients, and the
    gradients of the outputs; a step writes back its state (which is among the outputs)."""
    read, written = (sum(u.numel() * u.element_size() for u in tensors) for tensors in (inputs.values(), outputs))
    return 3 * read + 2 * written if gradients else read + written


def check(device, dtype):
    """Every backend that runs here against the reference, at a small size; SystemExit at the first that differs."""
    by_triton, allowed = triton is not None and (device.type == "cuda" or INTERPRETED), 1e-4 if dtype == torch.float32 else 2e-2
    length = 20 if INTERPRETED else 100
    for name, gradients, functions, inputs, _ in _cases(1, length, 64, 16, dtype, device):
        wanted = _results(functions["ref"], {key: u.float() for key, u in inputs.items()}, gradients)
        for backend in ("triton", "torch")[not by_triton:]:
            if backend in functions:
                error = _largest_error(_results(functions[backend], {key: u.clone() for key, u in inputs.items()}, gradients), wanted)
                print(f"{name:30}{backend:14}{error:10.1e}")
                if not error < allowed:
                    raise SystemExit(f"kernels.py: {name} by {backend} differs from its reference by {error:.1e} of its scale, "
                                     f"allowed {allowed:.0e}")


def table(device, dtype, batch, length, d_inner, d_state, repeats):
    """Times of every backend and peer, and how near they come to what the machine allows."""
    bandwidth, exponentials = _bandwidth(device), _exponentials(device)
    print(f"copying moves {bandwidth / 1e9:,.0f} GB/s; {exponentials / 1e9:,.0f} G exponentials/s; the bound is the slower of the two")
    print(f"{'':30}{'':14}{'ms':>10}{'GB/s':>8}{'bound ms':>10}{'of bound':>10}")
    for name, gradients, functions, inputs, count in _cases(batch, length, d_inner, d_state, dtype, device):
        left_out = {"ref"} if device.type == "cuda" else {"triton"}  # the loop's autograd keeps all states
        functions = {backend: function for backend, function in functions.items() if backend not in left_out}
        moved = _bytes_to_move(inputs, _results(functions["torch"], inputs, False), gradients)
        bound = 1e3 * max(moved / bandwidth, (1 + gradients) * count / exponentials)
        calls = [_in_turn(function, inputs, gradients, device) for function in functions.values()]
        for backend, milliseconds in zip(functions, _times(calls, repeats, device)):
            print(f"{name:30}{backend:14}{milliseconds:10.3f}{moved / milliseconds / 1e6:8.1f}{bound:10.3f}{bound / milliseconds:10.1%}")


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range, the least is 1")
    return int(text)


def main():
    parser = argparse.ArgumentParser(description="Check every kernel against its reference on this machine, then time them.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32", choices=["float32", "bfloat16", "float16"],
                        help="of activations; parameters and states are float32")
    parser.add_argument("--batch", type=positive, default=8, help="sequences; the steps take 32 times as many")
    parser.add_argument("--length", type=positive, default=2048 if on_gpu else 256, help="tokens in each")
    parser.add_argument("--channels", type=positive, default=2048 if on_gpu else 64, help="inner width")
    parser.add_argument("--states", type=positive, default=16, help="states per channel of the selective scan")
    parser.add_argument("--repeats", type=positive, default=5, help="timed runs, of which the median is printed")
    args = parser.parse_args()
    if args.device == "cuda" and not on_gpu:
        parser.error("--device is cuda, but PyTorch sees no GPU here; expected cpu")
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{machine}, {args.dtype}, PyTorch {torch.__version__}, Triton {triton.__version__ if triton else 'not installed'}")
    print(f"\n{'largest error':30}{'backend':14}{'of scale':>10}")
    check(device, dtype)
    print(f"\nbatch {args.batch} (steps: {32 * args.batch}), length {args.length}, {args.channels} channels, {args.states} states")
    table(device, dtype, args.batch, args.length, args.channels, args.states, args.repeats)


if __name__ == "__main__":
    main()
