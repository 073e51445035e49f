"""The recurrences inside a Mamba layer: literal references, fast PyTorch forms, single steps for decoding.

Selective scan (Mamba), per channel d with state n, and SSD (Mamba-2), per head with one scalar decay:

    h_t[d,n] = exp(dt_t[d] A[d,n]) h_{t-1}[d,n] + dt_t[d] x_t[d] B_t[n]      selective scan: a state row for each channel
    y_t[d]   = (sum_n C_t[n] h_t[d,n] + D[d] x_t[d]) SiLU(z_t[d])
    h_t      = exp(log_decay_t) h_{t-1} + x_t B_t^T                          SSD: a (P, N) state matrix for each head
    y_t      = h_t C_t

Contents, small to large
    causal_conv, causal_conv_step           depthwise causal convolution: a sequence, one token
    selective_step                          the first recurrence: one token
    selective_scan, selective_scan_ref      in chunks, with a backward that recomputes the states; as a literal loop
    ssd_step                                the second recurrence: one token
    mixing_matrix                           the map x -> y as one L x L matrix per head
    ssd, ssd_ref                            as matrices within chunks; as a literal loop
    python kernels.py                       checks each against its reference and prints a timing table

Letters (in shape comments): B batch, L length, D channels, N state size, G groups of channels that share B and C, H heads,
P head dimension, K convolution width, Q steps of one chunk. The tensors A, B, C, D own these letters in code, so
`B (B, L, G, N)` reads "input matrix B: batch, length, groups, state". Integers are words: batch, length, d_inner, d_state.

Precision: arithmetic and states are float32 (float64 for float64 inputs) also under autocast; y has x's dtype.

Sources: Gu & Dao 2023 (Mamba), eq. 2 and algorithm 2; Dao & Gu 2024 (Mamba-2), section 6 and listing 1;
state-spaces/mamba selective_scan_interface.py and ssd_minimal.py; Bick et al. 2024 for the discrete form of SSD.
"""
import argparse
import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F

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
    if backend not in ("auto", "ref", "torch"):
        raise ValueError(f"backend is {backend!r}, expected one of 'auto', 'ref', 'torch'")


# ------------------------------------------------------------------------------------------------ causal convolution
def _shifts(x, taps):
    """For each shift s = 1..K-1: s, how many first rows of y read the past, and which rows of the past they read."""
    width, length = len(taps), x.shape[1]
    for shift in range(1, width):
        head = min(shift, length)
        yield shift, head, slice(width - 1 - shift, width - 1 - shift + head)


class _CausalConv(torch.autograd.Function):
    """y_t = bias + sum_s taps[s] x_{t-s} as K shifted multiply-adds, several times faster than F.conv1d on a CPU.

    The first rows look before x, into the past: x_{-s} = past[K-1-s]. Backward is the same sum turned around,
    grad x_t = sum_s taps[s] grad y_{t+s}, and grad taps[s] sums grad_y_t x_{t-s} over batch and time. Only the inputs are
    kept, and x is never copied to put the past in front of it.
    """

    @staticmethod
    def forward(ctx, x, past, taps, bias):  # (B, L, D), (B, K-1, D), (K, D), (D,)
        ctx.save_for_backward(x, past, taps)
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
        return grad_x, grad_past, grad_taps, grad_y.sum((0, 1))


def causal_conv(x, weight, bias, state=None):
    """Depthwise causal convolution of a sequence: y_t = bias + sum_k weight[k] x_{t-K+1+k}.

    x (B, L, D), weight (D, 1, K), bias (D,), state (B, D, K-1): the K-1 inputs before x, None for zeros.
    Returns y (B, L, D) in x's dtype and the state after x, in the state's dtype. ValueError for other shapes.
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
    y = _CausalConv.apply(x.to(dtype), past.to(dtype), taps, bias.to(dtype))  # (B, L, D)
    recent = torch.cat([past, x[:, max(0, length - width + 1):].to(past.dtype)], dim=1)  # (B, K-1 + min(L, K-1), D)
    return y.to(x.dtype), recent[:, recent.shape[1] - width + 1:].transpose(1, 2)


def causal_conv_step(state, x, weight, bias):
    """One token of `causal_conv`: x (B, D) -> y (B, D); state (B, D, K-1) takes x in place, and is fastest with stride 1
    along D (a transposed (B, K-1, D), as `causal_conv` returns it)."""
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


def selective_step(h, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """One token of `selective_scan`: x, dt, z (B, D), A (D, N), B, C (B, G, N) -> y (B, D); h (B, D, N) changes in place."""
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


def selective_scan(x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, h0=None, backend="auto"):
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t;  y_t = (C_t h_t + D x_t) SiLU(z_t)  -> (y, h after the last step).

    x, dt, z (B, L, D); A (D, N); B, C (B, L, G, N), channel d reads group d // (D // G); D, dt_bias (D,); h0 (B, D, N),
    None for zeros. With dt_softplus, dt is softplus(dt + dt_bias), else dt + dt_bias. Inputs of any float dtype;
    y (B, L, D) has x's, h (B, D, N) is float32 (float64 for float64 x). Differentiable in every tensor, and through h.
    backend: "ref" the literal loop, "torch" chunks, "auto" the fastest here. ValueError names a tensor of wrong shape.
    """
    _check_backend(backend)
    _check_scan(x, dt, A, B, C, D, z, dt_bias, h0)
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


def ssd_step(h, x, log_decay, B, C):
    """One token of `ssd`: x (B, H, P), log_decay (B, H), B, C (B, H, N) -> y (B, H, P); h (B, H, P, N) changes in place."""
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


def _ssd_chunks(x, log_decay, B, C, h, chunk):
    """SSD with matrices inside chunks of Q steps and a loop over chunks (Dao & Gu 2024, section 6): L/Q steps, not L.

    y_t = sum_{s<=t in the chunk} T_ts x_s + exp(sum_{chunk start..t} log_decay) (h at chunk start) C_t. Padding at the
    end has log_decay 0, x 0, so it leaves the final state alone.
    """
    length, chunk = x.shape[1], min(chunk, x.shape[1])
    x, log_decay, B, C = (_split_chunks(u, chunk) for u in (x, log_decay, B, C))  # (B, H, L/Q, Q, P | - | N | N)
    inside = _Decayed.apply(C @ B.transpose(-1, -2), log_decay) @ x  # (B, H, L/Q, Q, Q) @ (B, H, L/Q, Q, P)
    from_start = log_decay.cumsum(-1).exp()  # (B, H, L/Q, Q)
    after = F.pad(log_decay[..., 1:], (0, 1))  # (B, H, L/Q, Q): what the next step forgets, nothing after the last
    to_end = after.flip(-1).cumsum(-1).flip(-1).exp()  # (B, H, L/Q, Q)
    adds = (x * to_end[..., None]).transpose(-1, -2) @ B  # (B, H, L/Q, P, N)
    starts = []
    for add, keep in zip(adds.unbind(2), from_start[..., -1].unbind(2)):
        starts.append(h)
        h = keep[..., None, None] * h + add  # (B, H, P, N)
    before = C @ torch.stack(starts, 2).transpose(-1, -2)  # (B, H, L/Q, Q, P)
    y = torch.addcmul(inside, before, from_start[..., None])
    return y.movedim(1, 3).flatten(1, 2)[:, :length], h


def ssd(x, log_decay, B, C, h0=None, chunk=64, backend="auto"):
    """h_t = exp(log_decay_t) h_{t-1} + x_t B_t^T;  y_t = h_t C_t  -> (y, h after the last step).

    x (B, L, H, P), log_decay (B, L, H) <= 0, B, C (B, L, H, N), h0 (B, H, P, N), None for zeros. Inputs of any float dtype;
    y (B, L, H, P) has x's, h (B, H, P, N) is float32 (float64 for float64 x). Differentiable in every tensor, and through
    h. chunk changes speed and memory only. backend: "ref" the literal loop, "torch" chunks, "auto" the fastest here.
    ValueError names a tensor of wrong shape.
    """
    _check_backend(backend)
    _check_ssd(x, log_decay, B, C, h0, chunk)
    dtype = _compute_dtype(x)
    u, log_decay, B, C = (v.to(dtype) for v in (x, log_decay, B, C))
    h0 = u.new_zeros(u.shape[0], *u.shape[2:], B.shape[3]) if h0 is None else h0.to(dtype)  # (B, H, P, N)
    with torch.autocast(x.device.type, enabled=False):
        y, h = _ssd_loop(u, log_decay, B, C, h0) if backend == "ref" else _ssd_chunks(u, log_decay, B, C, h0, chunk)
    return y.to(x.dtype), h


def ssd_ref(x, log_decay, B, C, h0=None, chunk=64, backend="ref"):
    """SSD as a literal loop over time: arguments, results and errors of `ssd`, any chunk and backend."""
    return ssd(x, log_decay, B, C, h0, chunk, backend="ref")


# ------------------------------------------------------------------------------------------------ check and time
def _stepping(step):
    """An in-place step as a function of its inputs: (state, ...) -> (y, new state)."""
    def call(state, **inputs):
        state = state.clone()
        return step(state, **inputs), state
    return call


def _conv_by_torch(x, weight, bias, state):
    padded = torch.cat([state, x.transpose(1, 2)], dim=2)  # (B, D, K-1+L)
    return F.conv1d(padded, weight, bias, groups=x.shape[2]).transpose(1, 2), padded[..., x.shape[1]:]


def _matrix_times_x(x, log_decay, B, C):
    return (mixing_matrix(log_decay, B, C) @ x.transpose(1, 2)).transpose(1, 2)  # (B, H, L, L) @ (B, H, L, P)


def _random_inputs(batch, length, d_inner, d_state=16, head_dim=32, width=4):
    """Arguments of causal_conv, selective_scan and ssd, as three dicts."""
    randn, groups, n_heads = torch.randn, max(1, d_inner // d_state), max(1, d_inner // head_dim)
    conv = dict(x=randn(batch, length, d_inner), weight=randn(d_inner, 1, width), bias=randn(d_inner),
                state=randn(batch, d_inner, width - 1))
    scan = dict(x=conv["x"], dt=randn(batch, length, d_inner), A=-torch.rand(d_inner, d_state),
                B=randn(batch, length, groups, d_state), C=randn(batch, length, groups, d_state), D=randn(d_inner),
                z=randn(batch, length, d_inner), dt_bias=randn(d_inner), h0=randn(batch, d_inner, d_state))
    heads = dict(x=randn(batch, length, n_heads, head_dim), log_decay=-torch.rand(batch, length, n_heads),
                 B=randn(batch, length, n_heads, head_dim), C=randn(batch, length, n_heads, head_dim),
                 h0=randn(batch, n_heads, head_dim, head_dim))
    return conv, scan, heads


def _sequence_cases(batch, length, d_inner):
    """name -> (fast function, reference, inputs), both functions of the same inputs and differentiable in them."""
    conv, scan, heads = _random_inputs(batch, length, d_inner)
    without_h0 = {name: tensor for name, tensor in heads.items() if name != "h0"}
    softplus = dict(dt_softplus=True)
    return {
        "causal_conv": (causal_conv, _conv_by_torch, conv),
        "selective_scan": (partial(selective_scan, **softplus), partial(selective_scan_ref, **softplus), scan),
        "ssd": (ssd, ssd_ref, heads),
        "mixing_matrix @ x": (_matrix_times_x, lambda **inputs: ssd_ref(**inputs)[0], without_h0),
    }


def _step_cases(batch, d_inner):
    """name -> (one step, the same as a sequence of length 1, inputs). The reference gives the token a time axis."""
    conv, scan, heads = _random_inputs(batch, 1, d_inner)
    softplus, in_time = dict(dt_softplus=True), {"x", "dt", "z", "B", "C", "log_decay"}

    def case(step, sequence, inputs, state_name):
        token = {name: tensor[:, 0] if name in in_time else tensor for name, tensor in inputs.items() if name != state_name}

        def as_sequence(state, **token):
            timed = {name: tensor[:, None] if name in in_time else tensor for name, tensor in token.items()}
            y, state = sequence(**timed, **{state_name: state})
            return y[:, 0], state

        return _stepping(step), as_sequence, dict(state=inputs[state_name], **token)

    return {
        "causal_conv_step": case(causal_conv_step, _conv_by_torch, conv, "state"),
        "selective_step": case(partial(selective_step, **softplus), partial(selective_scan_ref, **softplus), scan, "h0"),
        "ssd_step": case(ssd_step, ssd_ref, heads, "h0"),
    }


def _results(function, inputs, gradients):
    """All outputs and, if asked for, the gradient of the sum of their squares with respect to each input."""
    leaves = {name: tensor.detach().requires_grad_(gradients) for name, tensor in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not gradients:
        return outputs
    loss = sum(output.square().sum() for output in outputs)
    return *outputs, *torch.autograd.grad(loss, leaves.values())


def _largest_error(found, wanted):
    """The largest difference, each tensor relative to its own largest entry."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted))


def _seconds(functions, inputs, gradients, repeats):
    """Median seconds of each function, after a warm-up, the functions taking turns."""
    times = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, record in zip(functions, times):
            start = time.perf_counter()
            _results(function, inputs, gradients)
            record.append(time.perf_counter() - start)
    return [statistics.median(record[1:]) for record in times]


def _report(cases, gradients, repeats):
    """Check and time each case, one line each; stop at a wrong one."""
    for name, (fast, reference, inputs) in cases.items():
        error = _largest_error(_results(fast, inputs, gradients), _results(reference, inputs, gradients))
        fast_s, reference_s = _seconds((fast, reference), inputs, gradients, repeats)
        print(f"{name:18}{error:14.1e}{1e3 * fast_s:10.2f}{1e3 * reference_s:14.2f}{reference_s / fast_s:8.1f}")
        if not error < 1e-4:
            raise SystemExit(f"kernels.py: {name} differs from its reference by {error:.1e} of its scale, allowed 1e-4")


def main():
    parser = argparse.ArgumentParser(description="Check every kernel against its reference and time both.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="sequences; the steps take 32 times as many")
    parser.add_argument("--length", type=int, default=256, help="tokens in each")
    parser.add_argument("--channels", type=int, default=64, help="inner width, a multiple of 32")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs, of which the median is printed")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"batch {args.batch}, length {args.length}, channels {args.channels}, float32, {torch.get_num_threads()} threads, "
          f"PyTorch {torch.__version__}; sequences: forward and backward, steps: forward")
    print(f"{'':18}{'largest error':>14}{'fast ms':>10}{'reference ms':>14}{'ratio':>8}")
    _report(_sequence_cases(args.batch, args.length, args.channels), True, args.repeats)
    _report(_step_cases(32 * args.batch, args.channels), False, 10 * args.repeats)


if __name__ == "__main__":
    main()
