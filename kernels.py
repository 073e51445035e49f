"""The recurrences inside a Mamba layer, from four lines of mathematics to what a training run uses.

Selective scan (Mamba; Gu & Dao 2023, eq. 2, algorithm 2): each channel d has N states of its own,

    h_t[d, n] = exp(dt_t[d] A[d, n]) h_{t-1}[d, n] + dt_t[d] x_t[d] B_t[n]
    y_t[d]    = (sum_n C_t[n] h_t[d, n] + D[d] x_t[d]) SiLU(z_t[d])

A < 0 makes the past fade. dt, B and C come from the token itself, hence "selective": a large dt
writes the token and forgets the past, dt = 0 passes over it. (A is discretised exactly, B by
Euler's rule, as in Mamba's code.) SSD (Mamba-2; Dao & Gu 2024, section 6): a head has a (P, N)
matrix of states and one decay for all,

    h_t = exp(log_decay_t) h_{t-1} + x_t B_t^T
    y_t = h_t C_t

The ladder, every rung tested against the one before:

    1  loop        the formulas: L small steps, and autograd keeps every state
    2  matrices    SSD as attention without softmax, with forgetting: work L^2
    3  chunks      SSD: a matrix within each chunk of Q steps, one between: work L Q + (L/Q)^2;
                   the scan: the state before each chunk is kept, the others computed twice
    4  Triton      the scan in one kernel, its states in registers
    5  backward    rung 3's gradients, in registers
    6  segments    pieces of time side by side, where batch x channels do not fill a GPU

`python kernels.py` checks and times them. All is computed in float32 (float64 for float64 inputs),
also under autocast; y has x's dtype. Letters in shape comments are model.py's.
"""
import timeit
from functools import partial

from common import Parser, add_device_options, choose_device, number, require, run

import torch
import torch.nn.functional as F
from torch.autograd.function import Function, once_differentiable

import decode_kernels
from decode_kernels import (FUSED, check_shapes, compute_dtype, full_precision, load, pieces, tl,
                            triton, use_triton)

CHUNK = 16  # steps whose states the chunked scan holds at once
LOG2_E = 1.4426950408889634  # e^u = 2^(u log2 e): on a CPU, exp2 takes a third of exp's time


# ---- rung 1: the loop
def scan_loop(x, dt, A, B, C, h):
    """x, dt (B, L, D), A (D, N), B, C (B, L, G, N), h (B, D, N) -> y (B, L, D), h."""
    channels, ys = x.shape[2] // B.shape[2], []  # channel d reads group d // channels
    B, C = (u.repeat_interleave(channels, dim=2).unbind(1) for u in (B, C))  # L times (B, D, N)
    for t in range(x.shape[1]):
        x_t, dt_t = x[:, t, :, None], dt[:, t, :, None]  # (B, D, 1)
        h = torch.exp(dt_t * A) * h + dt_t * x_t * B[t]  # (B, D, N)
        ys.append((C[t] * h).sum(-1))  # (B, D)
    return torch.stack(ys, dim=1), h


def ssd_loop(x, log_decay, B, C, h):
    """x (B, L, H, P), log_decay (B, L, H), B, C (B, L, H, N), h (B, H, P, N) -> y like x, h."""
    decay, ys = log_decay.exp()[..., None, None], []  # (B, L, H, 1, 1)
    for t in range(x.shape[1]):
        h = decay[:, t] * h + x[:, t, :, :, None] * B[:, t, :, None]  # (B, H, P, N)
        ys.append((h * C[:, t, :, None]).sum(-1))  # (B, H, P)
    return torch.stack(ys, dim=1), h


# ---- rung 2: matrices
def mixing_matrix(log_decay, B, C):
    """T (B, H, L, L), float32, with y = T x for ssd from h = 0; inputs as there.

    T_ts = (C_t . B_s) exp(log_decay_{s+1} + ... + log_decay_t) for s <= t, else 0: attention with
    queries C, keys B and values x, without softmax, and with a decay for each step in between.
    """
    kind = compute_dtype(B)
    with full_precision(B):
        scores = C.transpose(1, 2).to(kind) @ B.permute(0, 2, 3, 1).to(kind)  # (B, H, L, L)
    return scores * decays(log_decay.transpose(1, 2).to(kind))  # below the line


# ---- rung 3: chunks
def in_chunks(u, chunk):
    """(B, L, H, ...) -> (B, H, L/Q, Q, ...), with zeros behind the end: they change no state."""
    u, missing = u.transpose(1, 2), -u.shape[1] % chunk
    u = F.pad(u, (0, 0) * (u.dim() - 3) + (0, missing)) if missing else u.contiguous()
    return u.unflatten(2, (-1, chunk))


def ssd_chunks(x, log_decay, B, C, h, chunk):
    """ssd_loop by matrices within chunks of Q steps and one between the L/Q chunks (listing 1)."""
    length, chunk = x.shape[1], min(chunk, x.shape[1])
    x, log_decay, B, C = (in_chunks(u, chunk) for u in (x, log_decay, B, C))  # (B, H, L/Q, Q, ...)
    # 1. What the inputs of a chunk give to its outputs: rung 2.
    decay = decays(log_decay)  # (B, H, L/Q, Q, Q)
    y = (C @ B.transpose(-1, -2) * decay) @ x  # (B, H, L/Q, Q, P)
    # 2. What they leave in the state at its end, by the last row of decays.
    left = (x * decay[..., -1, :, None]).transpose(-1, -2) @ B  # (B, H, L/Q, P, N)
    # 3. The recurrence from chunk to chunk, h before the first: rung 2 again, for L/Q steps.
    from_start = log_decay.cumsum(-1)[..., None]  # (B, H, L/Q, Q, 1)
    T = decays(F.pad(from_start[..., -1, 0], (1, 0)))  # (B, H, 1 + L/Q, 1 + L/Q)
    ends = T @ torch.cat((h[:, :, None], left), 2).flatten(3)  # (B, H, 1 + L/Q, P N)
    ends = ends.unflatten(3, h.shape[2:])
    # 4. What the state before a chunk gives to its outputs.
    y = torch.addcmul(y, C @ ends[:, :, :-1].transpose(-1, -2), from_start.exp())
    return y.flatten(2, 3)[:, :, :length].transpose(1, 2), ends[:, :, -1]


def chunk_states(x, dt, A, B, h):
    """Decays and states (Q, B, G, N, D/G) of a chunk that begins with state h (B, G, N, D/G)."""
    decay = torch.exp2(dt * (A * LOG2_E))
    states = dt * x * B  # what each step adds, and then the states themselves
    for decay_t, h_t in zip(decay, states):
        h = h_t.addcmul_(decay_t, h)
    return decay, states


class _ChunkedScan(Function):
    """The scan, which keeps the state at the start of each chunk and computes the others twice.

    x, dt (L, B, G, 1, D/G), A (G, N, D/G), B, C (L, B, G, N, 1), h (B, G, N, D/G) -> y like x, h.
    h_t feeds y_t and h_{t+1}, so its gradient g_t runs back in time. All others follow from it:

        g_t = C_t grad_y_t + exp(dt_{t+1} A) g_{t+1}    (from the gradient of the last h)
        grad_C_t = sum_d grad_y_t h_t               grad_B_t = sum_d dt_t x_t g_t
        w_t = exp(dt_t A) h_{t-1} g_t               (the gradient of dt_t A)
        b_t = sum_n B_t g_t                         (the gradient of dt_t x_t)
        grad_A = sum_t dt_t w_t                     grad_x_t = dt_t b_t
        grad_dt_t = x_t b_t + sum_n A w_t
    """

    @staticmethod
    def forward(ctx, x, dt, A, B, C, h):
        y, starts = torch.empty_like(x), []
        for x_c, dt_c, B_c, C_c, y_c in zip(*(u.split(CHUNK) for u in (x, dt, B, C, y))):
            starts.append(h)
            _, states = chunk_states(x_c, dt_c, A, B_c, h)  # (Q, B, G, N, D/G)
            torch.sum(C_c * states, -2, keepdim=True, out=y_c)  # (Q, B, G, 1, D/G)
            h = states[-1].clone()  # a view would keep all of them
        ctx.save_for_backward(x, dt, A, B, C, *starts)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_h):
        x, dt, A, B, C, *starts = ctx.saved_tensors
        grads, grad_A = [torch.empty_like(u) for u in (x, dt, B, C)], torch.zeros_like(A)
        chunks = list(zip(*(u.split(CHUNK) for u in (x, dt, B, C, grad_y, *grads)), starts))
        for x_c, dt_c, B_c, C_c, grad_y_c, grad_x, grad_dt, grad_B, grad_C, start in chunks[::-1]:
            decay, states = chunk_states(x_c, dt_c, A, B_c, start)  # (Q, B, G, N, D/G)
            g = C_c * grad_y_c  # (Q, B, G, N, D/G)
            g[-1] += grad_h
            for t in reversed(range(len(g) - 1)):
                g[t].addcmul_(decay[t + 1], g[t + 1])
            torch.sum(states * grad_y_c, -1, keepdim=True, out=grad_C)  # (Q, B, G, N, 1)
            torch.sum(g * (dt_c * x_c), -1, keepdim=True, out=grad_B)
            b = (B_c * g).sum(-2, keepdim=True)  # (Q, B, G, 1, D/G)
            w = g.mul_(decay)
            grad_h = w[0].clone()  # exp(dt A) g goes to the chunk before
            w[1:] *= states[:-1]
            w[0] *= start
            grad_A += (dt_c * w).sum((0, 1))
            torch.mul(dt_c, b, out=grad_x)
            torch.add(x_c * b, (A * w).sum(-2, keepdim=True), out=grad_dt)
        return *grads[:2], grad_A, *grads[2:], grad_h


def scan_chunks(x, dt, A, B, C, h):
    """scan_loop by chunks. With time in front and a group's channels last, steps are contiguous."""
    groups = B.shape[2]
    x, dt = (u.transpose(0, 1).unflatten(2, (groups, 1, -1)).contiguous() for u in (x, dt))
    B, C = (u.transpose(0, 1)[..., None].contiguous() for u in (B, C))  # (L, B, G, N, 1)
    A, h = (u.unflatten(-2, (groups, -1)).transpose(-1, -2).contiguous() for u in (A, h))
    y, h = _ChunkedScan.apply(x, dt, A, B, C, h)  # (L, B, G, 1, D/G), (B, G, N, D/G)
    return y.flatten(2).transpose(0, 1).contiguous(), h.transpose(-1, -2).flatten(1, 2)


# ---- a whole sequence
SCAN_SHAPES = dict(x="B L D", dt="B L D", A="D N", B="B L G N", C="B L G N", D="D", z="B L D",
                   dt_bias="D", h0="B D N")  # channel d reads group d // (D/G)
SSD_SHAPES = dict(x="B L H P", log_decay="B L H", B="B L H N", C="B L H N", h0="B H P N")


def selective_scan(x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, h0=None,
                   backend="auto"):
    """y (B, L, D) in x's dtype and the state h (B, D, N), float32, after the last step.

    Inputs as in SCAN_SHAPES; h0 = None is zeros. With dt_softplus, dt is softplus(dt + dt_bias),
    and dt = -inf padding, which leaves the state alone. Differentiable in all, through y and h.
    backend: "ref" is rung 1, "torch" rung 3, "triton" 4 to 6, "auto" Triton on CUDA.
    """
    tensors = x, dt, A, B, C, D, z, dt_bias, h0
    check_shapes(SCAN_SHAPES, *tensors)
    require(x.shape[2] % B.shape[2] == 0,
            f"B has {B.shape[2]} groups, expected a divisor of {x.shape[2]} channels")
    scan = (scan_loop if backend == "ref" else  # scan_triton stands below the line
            scan_triton if use_triton(backend, x) else scan_chunks)
    y_dtype, kind = x.dtype, compute_dtype(x)
    x, dt, A, B, C, D, z, dt_bias, h0 = (u if u is None else u.to(kind) for u in tensors)
    h0 = A.new_zeros(len(x), *A.shape) if h0 is None else h0
    dt = dt if dt_bias is None else dt + dt_bias
    y, h = scan(x, F.softplus(dt) if dt_softplus else dt, A, B, C, h0)
    y = y if D is None else torch.addcmul(y, D, x)
    return (y if z is None else y * F.silu(z)).to(y_dtype), h


def ssd(x, log_decay, B, C, h0=None, chunk=64, backend="auto"):
    """y (B, L, H, P) in x's dtype and the state h (B, H, P, N), float32, after the last step.

    Inputs as in SSD_SHAPES, log_decay <= 0; h0 = None is zeros. x = 0 and log_decay = 0 are
    padding. Differentiable in all, through y and h; `chunk` is a matter of speed.
    backend: "ref" is rung 1, "torch" and "auto" rung 3, on a GPU too.
    """
    require(backend in ("auto", "ref", "torch"),
            f"backend is {backend!r}, expected 'auto', 'ref' or 'torch' for ssd")
    check_shapes(SSD_SHAPES, x, log_decay, B, C, h0)
    y_dtype, kind = x.dtype, compute_dtype(x)
    h0 = x.new_zeros(len(x), *x.shape[2:], B.shape[3]) if h0 is None else h0
    inputs = (u.to(kind) for u in (x, log_decay, B, C, h0))
    with full_precision(x):
        y, h = ssd_loop(*inputs) if backend == "ref" else ssd_chunks(*inputs, chunk)
    return y.to(y_dtype), h


# ---- one token
def selective_step(h, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False,
                   backend="auto"):
    """y (B, D) of one token of selective_scan; the state h (B, D, N), of any dtype, in place.

    x, dt, z (B, D), B, C (B, G, N), the rest as there.
    """
    tensors = h, x, dt, A, B, C, D, z, dt_bias
    if use_triton(backend, *tensors, backward=False) and h.is_contiguous():
        return decode_kernels.recurrent_step(*tensors, dt_softplus)
    kind, groups = compute_dtype(h), B.shape[1]
    state, u, dt, A, B, C, D, z, dt_bias = (v if v is None else v.to(kind) for v in tensors)
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    state.mul_((dt[..., None] * (A * LOG2_E)).exp2_())  # h itself if that is float32, else a copy
    rows = state.unflatten(1, (groups, -1))  # (B, G, D/G, N)
    rows.addcmul_((dt * u).unflatten(1, (groups, -1))[..., None], B[:, :, None])
    with full_precision(h):
        y = (C[:, :, None] @ rows.transpose(2, 3)).flatten(1)  # (B, G, 1, D/G) -> (B, D)
    h.copy_(state)
    y = y if D is None else torch.addcmul(y, u, D)
    return (y if z is None else y * F.silu(z)).to(x.dtype)


def ssd_step(h, x, log_decay, B, C, backend="auto"):
    """y (B, H, P) of one token of ssd; the state h (B, H, P, N), of any dtype, in place.

    x (B, H, P), log_decay (B, H), B, C (B, H, N).
    """
    if use_triton(backend, h, x, log_decay, B, C, backward=False) and h.is_contiguous():
        return decode_kernels.recurrent_step(h, x, log_decay, None, B, C)
    state, u, log_decay, B, C = (v.to(compute_dtype(h)) for v in (h, x, log_decay, B, C))
    state.mul_(log_decay.exp()[..., None, None])
    state.addcmul_(u[..., None], B[..., None, :])  # (B, H, P, 1) * (B, H, 1, N)
    with full_precision(h):
        y = C[..., None, :] @ state.transpose(-1, -2)  # (B, H, 1, P), faster than h @ C
    h.copy_(state)
    return y[..., 0, :].to(x.dtype)


# ---- first reading ends here: the convolution, Triton, and a check of every rung ----


selective_scan_ref = partial(selective_scan, backend="ref")
ssd_ref = partial(ssd, backend="ref")


class _Decays(Function):
    """mixing_matrix's exp(...), (..., L, L), of log_decay (..., L), in 2/3 of autograd's time.

    It is exp(total_t - total_s), totals in float64, because they cancel, of terms cut at -1000.
    """

    @staticmethod
    def forward(ctx, log_decay):
        total = log_decay.double().clamp(min=-1000).cumsum(-1)  # (..., L)
        decay = (total[..., :, None] - total[..., None, :]).to(log_decay.dtype)  # (..., L, L)
        decay.exp_().tril_()  # above the diagonal exp may be inf
        ctx.save_for_backward(decay)
        return decay

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_decay):
        w = grad_decay * ctx.saved_tensors[0]  # (..., L, L), gradients of total_t - total_s
        grad_total = w.sum(-1).double() - w.sum(-2)  # (..., L)
        return grad_total.flip(-1).cumsum(-1).flip(-1).to(w.dtype)


decays = _Decays.apply


# ---- the convolution
class _CausalConv(Function):
    """y_t = bias + sum_k taps[k] x_{t-W+1+k} in half of conv1d's time on a CPU.

    x (B, W-1 + L, D) begins with the past; taps (W, D), bias (D,) -> y (B, L, D).
    """

    @staticmethod
    def forward(ctx, x, taps, bias):
        ctx.save_for_backward(x, taps)
        length = x.shape[1] - len(taps) + 1
        y = torch.addcmul(bias, x[:, :length], taps[0])  # (B, L, D)
        for k in range(1, len(taps)):
            y.addcmul_(x[:, k:k + length], taps[k])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, taps = ctx.saved_tensors
        length, product = grad_y.shape[1], torch.empty_like(grad_y)
        grad_x, grad_taps = torch.zeros_like(x), torch.empty_like(taps)
        for k, tap in enumerate(taps):
            grad_x[:, k:k + length].addcmul_(grad_y, tap)
            grad_taps[k] = torch.mul(grad_y, x[:, k:k + length], out=product).sum((0, 1))
        return grad_x, grad_taps, grad_y.sum((0, 1))


def causal_conv(x, weight, bias, past=None, counts=None):
    """y (B, L, D) of a convolution over time, channel by channel, and the next past; x's dtype.

    x (B, L, D), weight (D, 1, W), bias (D,); past (B, W-1, D): what came before x, None for zeros.
    counts (B,): row b has counts[b] tokens, then padding, which does not enter its past.
    """
    width, kind = weight.shape[-1], compute_dtype(x)
    past = x.new_zeros(len(x), width - 1, x.shape[2]) if past is None else past.to(x.dtype)
    inputs = torch.cat([past, x], dim=1)  # (B, W-1 + L, D)
    taps = weight[:, 0].t().to(kind).contiguous()  # (W, D)
    y = _CausalConv.apply(inputs.to(kind), taps, bias.to(kind)).to(x.dtype)
    if counts is None:
        return y, inputs[:, x.shape[1]:]
    window = counts[:, None] + torch.arange(width - 1, device=x.device)  # (B, W-1)
    return y, inputs.gather(1, window[..., None].expand(-1, -1, x.shape[2]))


def causal_conv_step(past, x, weight, bias, backend="auto"):
    """y (B, D) of one token x (B, D); past (B, W-1, D) in place."""
    if use_triton(backend, past, x, weight, bias, backward=False) and past.is_contiguous():
        return decode_kernels.causal_conv_step(past, x, weight, bias)
    kind, taps = compute_dtype(x), weight[:, 0].unbind(1)  # W times (D,)
    y = torch.addcmul(bias, x.to(kind), taps[-1])  # (B, D)
    window = *(past[:, k] for k in range(past.shape[1])), x
    for column, newer, tap in zip(window, window[1:], taps):
        y.addcmul_(column.to(kind), tap)
        column.copy_(newer)
    return y.to(x.dtype)


# ---- rung 4: Triton
# Rung 3 writes tensors N times as large as x. Here a program walks through time with the states of
# M channels in registers; N exponentials for each x bind. (Mamba's associative scan takes log L
# rounds, but more work; where programs are few, rung 6 does instead.)
# States are (N, D). `width` is D, but Triton knows no factor of it: else it reads in wide pieces,
# and sums over N exchange 12 times as much between threads.
KEPT = 8  # every KEPT-th state is kept for the backward kernel


@triton.jit(do_not_specialize=["length", "width"])
def _scan_forward_kernel(x, dt, A, B, C, h_start, y, kept, h_end, length, width,
                         d_inner: tl.constexpr, d_state: tl.constexpr, groups: tl.constexpr,
                         KEPT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """y (B, L, D), h_end (B, N, D), kept (B, L/KEPT, N, D) or None. Grid: blocks, G, B."""
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, d = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_D)[None, :]  # (N, 1), (1, M)
    d += tl.program_id(0) * BLOCK_D
    end_d, end_n = tl.where(d < d_inner // groups, length, 0), tl.where(n < d_state, length, 0)
    d += group * (d_inner // groups)  # there at step t if t < end_d
    states, is_state = n * width + d, (end_d > 0) & (end_n > 0)  # (N, M)
    A, in_batch = load(A + states, is_state), batch * d_inner * d_state + states  # (N, M)
    h = load(h_start + in_batch, is_state)
    for first in range(0, length, KEPT):
        row = batch * tl.cdiv(length, KEPT) + first // KEPT
        if kept is not None:
            tl.store(kept + row * d_inner * d_state + states, h, mask=is_state)
        steps = ()  # they wait for memory together
        for i in tl.static_range(KEPT):
            row, has_d, has_n = batch * length + first + i, first + i < end_d, first + i < end_n
            channels, in_group = row * d_inner + d, (row * groups + group) * d_state + n
            steps += ((load(x + channels, has_d), load(dt + channels, has_d),
                       load(B + in_group, has_n), load(C + in_group, has_n), channels, has_d),)
        for i in tl.static_range(KEPT):
            x_t, dt_t, B_t, C_t, channels, has_d = steps[i]
            h = tl.exp(dt_t * A) * h + (dt_t * x_t) * B_t  # (N, M); behind the end dt_t = 0
            tl.store(y + channels, tl.sum(h * C_t, 0, keep_dims=True), mask=has_d)
    tl.store(h_end + in_batch, h, mask=is_state)


# ---- rung 5: backward
@triton.jit(do_not_specialize=["length", "width"])
def _scan_backward_kernel(x, dt, A, B, C, kept, grad_y, g_end,
                          grad_x, grad_dt, grad_A, grad_B, grad_C, g_start, length, width,
                          d_inner: tl.constexpr, d_state: tl.constexpr, groups: tl.constexpr,
                          KEPT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """_ChunkedScan's equations: KEPT steps forward from their kept state, then back.

    Sums are left in parts, grad_A (B, N, D), grad_B and grad_C (blocks, B, L, G, N): atomics would
    not repeat bit for bit.
    """
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, d = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_D)[None, :]  # (N, 1), (1, M)
    d += tl.program_id(0) * BLOCK_D
    end_d, end_n = tl.where(d < d_inner // groups, length, 0), tl.where(n < d_state, length, 0)
    d += group * (d_inner // groups)  # there at step t if t < end_d
    states, is_state = n * width + d, (end_d > 0) & (end_n > 0)  # (N, M)
    A, in_batch = load(A + states, is_state), batch * d_inner * d_state + states  # (N, M)
    g, sum_A = load(g_end + in_batch, is_state), tl.zeros_like(A)  # (N, M)
    part = tl.program_id(0).to(tl.int64) * tl.num_programs(2) * length * groups * d_state
    grad_B, grad_C = grad_B + part, grad_C + part  # of this block
    for back in range(0, length, KEPT):
        first = (length - 1 - back) // KEPT * KEPT
        row = batch * tl.cdiv(length, KEPT) + first // KEPT
        h = load(kept + row * d_inner * d_state + states, is_state)
        before = ()  # the states before the KEPT steps
        for i in tl.static_range(KEPT):
            row, has_d, has_n = batch * length + first + i, first + i < end_d, first + i < end_n
            channels, in_group = row * d_inner + d, (row * groups + group) * d_state + n
            x_t, dt_t = load(x + channels, has_d), load(dt + channels, has_d)
            before += (h,)
            h = tl.exp(dt_t * A) * h + (dt_t * x_t) * load(B + in_group, has_n)
        for i in tl.static_range(KEPT - 1, -1, -1):
            row, has_d, has_n = batch * length + first + i, first + i < end_d, first + i < end_n
            channels, in_group = row * d_inner + d, (row * groups + group) * d_state + n
            x_t, dt_t = load(x + channels, has_d), load(dt + channels, has_d)
            B_t, C_t = load(B + in_group, has_n), load(C + in_group, has_n)
            grad_y_t = load(grad_y + channels, has_d)
            g += C_t * grad_y_t
            tl.store(grad_B + in_group, tl.sum(g * (dt_t * x_t), 1, keep_dims=True), mask=has_n)
            tl.store(grad_C + in_group, tl.sum(h * grad_y_t, 1, keep_dims=True), mask=has_n)
            b = tl.sum(g * B_t, 0, keep_dims=True)  # (1, M)
            h = before[i]
            g *= tl.exp(dt_t * A)  # now of the state before the step
            w = g * h  # (N, M)
            sum_A += dt_t * w
            tl.store(grad_x + channels, b * dt_t, mask=has_d)
            tl.store(grad_dt + channels, tl.sum(w * A, 0, keep_dims=True) + b * x_t, mask=has_d)
    tl.store(g_start + in_batch, g, mask=is_state)
    tl.store(grad_A + in_batch, sum_A, mask=is_state)


class _TritonScan(Function):
    """scan_loop by the two kernels; contiguous float32, A (N, D), h (B, N, D)."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, h):
        (batch, length, d_inner), (groups, d_state) = x.shape, B.shape[2:]
        block_n = triton.next_power_of_2(d_state)
        block_d = 16 if block_n < 256 else 8
        ctx.grid = triton.cdiv(d_inner // groups, block_d), groups, batch
        ctx.sizes = dict(length=length, width=d_inner, d_inner=d_inner, d_state=d_state,
                         groups=groups, KEPT=KEPT, BLOCK_D=block_d, BLOCK_N=block_n,
                         num_warps=max(1, block_n * block_d // 256), **FUSED)
        y, h_end = torch.empty_like(x), torch.empty_like(h)
        kept = (h.new_empty(batch, triton.cdiv(length, KEPT), *A.shape)
                if any(ctx.needs_input_grad) else None)
        _scan_forward_kernel[ctx.grid](x, dt, A, B, C, h, y, kept, h_end, **ctx.sizes)
        ctx.save_for_backward(x, dt, A, B, C, kept)
        return y, h_end

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_h):
        x, dt, A, B, C, kept = ctx.saved_tensors
        grad_x, grad_dt = x.new_empty(2, *x.shape)
        grad_A, g_start = A.new_empty(2, len(x), *A.shape)
        grad_B, grad_C = A.new_empty(2, ctx.grid[0], *B.shape)
        _scan_backward_kernel[ctx.grid](
            x, dt, A, B, C, kept, grad_y.contiguous(), grad_h.contiguous(),
            grad_x, grad_dt, grad_A, grad_B, grad_C, g_start, **ctx.sizes)
        return grad_x, grad_dt, grad_A.sum(0), grad_B.sum(0), grad_C.sum(0), g_start


# ---- rung 6: segments
def scan_triton(x, dt, A, B, C, h):
    """scan_loop by Triton, with time in S segments where sequences are too few to fill the GPU.

    The kernels take segments for sequences: scanned from zero, then from the state that each
    inherits, which shrinks in it by exp(A sum_t dt_t).
    """
    batch, length, d_inner = x.shape
    segments = pieces(batch * triton.cdiv(d_inner, 16), length, x.device)
    while length % segments or segments == 2:  # scanned twice, two gain nothing
        segments -= 1
    x, dt, B, C = (u.unflatten(1, (segments, -1)).flatten(0, 1).contiguous()
                   for u in (x, dt, B, C))  # (B S, L/S, ...)
    A, starts = A.t().contiguous(), [h.transpose(1, 2)]  # (N, D), (B, N, D)
    scan = partial(_TritonScan.apply, x, dt, A, B, C)
    if segments > 1:
        shrinks = torch.exp(A * dt.sum(1)[:, None])  # (B S, N, D)
        _, left = scan(torch.zeros_like(shrinks))
        for s in range(segments - 1):
            starts.append(torch.addcmul(left[s::segments], shrinks[s::segments], starts[-1]))
    y, h = scan(torch.stack(starts, 1).flatten(0, 1))
    return y.view(batch, length, d_inner), h[segments - 1::segments].transpose(1, 2)


# ---- check and time
def ssd_matrix(x, log_decay, B, C):
    T = mixing_matrix(log_decay, B, C)  # (B, H, L, L)
    return torch.einsum("bhts,bshp->bthp", T, x.to(T.dtype)).to(x.dtype)


LADDERS = {
    "selective_scan": (SCAN_SHAPES, {
        rung: partial(selective_scan, dt_softplus=True, backend=backend) for rung, backend in
        (("1 loop", "ref"), ("3 chunks", "torch"), ("4-6 Triton", "triton"))}),
    "ssd": (SSD_SHAPES, {"1 loop": ssd_ref, "2 matrix": ssd_matrix,
                         "3 chunks": partial(ssd, chunk=32)})}


def random_inputs(shapes, batch, length, channels, states, dtype, device):
    """Inputs by name, without h0: what has a time axis in this dtype, else float32."""
    inputs, heads = {}, max(1, channels // 64)
    sizes = dict(B=batch, L=length, D=channels, G=1, N=states, H=heads, P=channels // heads)
    for name, letters in shapes.items():
        u = torch.randn([sizes[letter] for letter in letters.split()], device=device,
                        dtype=dtype if "L" in letters else torch.float32)
        inputs[name] = (-u.abs() if name in ("A", "log_decay") else u).requires_grad_()
    del inputs["h0"]
    return inputs


def values_and_gradients(function, inputs):
    """y, and the gradients of half its sum of squares."""
    y = function(**inputs)
    y = y[0] if isinstance(y, tuple) else y
    return y, *torch.autograd.grad(y, list(inputs.values()), y.detach())


def largest_error(found, expected):
    """The largest difference, each tensor's as a share of its largest entry."""
    errors = [((a - b).abs().max() / b.abs().max()).float() for a, b in zip(found, expected)]
    return torch.stack(errors).max().item()  # unlike Python's max, it returns a NaN


def bytes_kept(function, inputs):
    """Bytes that autograd keeps for the backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        values_and_gradients(function, inputs)
    return sum(kept.values())


def main():
    parser = Parser("Check every rung against the one below; show what it costs.")
    sizes = (1, 2048, 2048, 16) if torch.cuda.is_available() else (8, 256, 64, 16)
    add = parser.add_argument
    for name, size in zip(("batch", "length", "channels", "states"), sizes):
        add(f"--{name}", type=number(1), default=size, help="of the inputs")
    add_device_options(add)
    *sizes, device, dtype = vars(parser.parse_args()).values()
    device, dtype = choose_device(device, dtype)
    torch.manual_seed(0)
    print(f"{'':15} {'rung':11} {'error':>8} {'ms':>9} {'MB kept':>8}")
    for name, (shapes, rungs) in LADDERS.items():
        inputs, below = random_inputs(shapes, *sizes, dtype, device), None
        for rung, function in rungs.items():
            if "Triton" in rung and device.type == "cpu":
                print(f"{name:15} {rung:11} needs a GPU")
                continue
            work = partial(values_and_gradients, function, inputs)
            found = work()
            error, below = largest_error(found, below or found), found
            if not error < (1e-4 if dtype == torch.float32 else 5e-2):
                raise SystemExit(f"kernels.py: {name}, rung {rung}, is off by {error:.1e}")
            seconds = min(timeit.repeat(lambda: work()[1].sum().item(), number=1))
            print(f"{name:15} {rung:11} {error:8.0e} {1e3 * seconds:9.2f} "
                  f"{bytes_kept(function, inputs) / 1e6:8.1f}")


if __name__ == "__main__":
    run(main, "--batch or --length", resumes=False)
