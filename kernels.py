"""The recurrences inside a Mamba layer, from four lines of mathematics to what a training run uses.

Selective scan (Mamba; Gu & Dao 2023, eq. 2, algorithm 2): each channel d has N states of its own,

    h_t[d, n] = exp(dt_t[d] A[d, n]) h_{t-1}[d, n] + dt_t[d] x_t[d] B_t[n]
    y_t[d]    = (sum_n C_t[n] h_t[d, n] + D[d] x_t[d]) SiLU(z_t[d])

with A discretised exactly, exp(dt A), and B by Euler's rule, dt B, as in Mamba's own code. SSD
(Mamba-2; Dao & Gu 2024, section 6): each head has a (P, N) matrix of states and one decay,

    h_t = exp(log_decay_t) h_{t-1} + x_t B_t^T
    y_t = h_t C_t

The ladder, every rung tested against the one below:

    1  loop              the formulas, token by token; autograd keeps every state, N times x
    2  matrices          SSD as a triangular matrix: attention without softmax, with forgetting
    3  chunks            SSD in four steps; the scan with gradients by hand, 1/16 of the states kept
    -  one token         what decoding runs
    4  Triton, forward   the scan in one kernel, with its states in registers
    5  Triton, backward  the gradients of rung 3, in registers
    6  segments          pieces of time side by side, where batch x channels do not fill a GPU

`python kernels.py` checks every rung on this machine and shows what it costs.
Letters in shape comments: B batch, L length, D channels, N states, G groups of channels that share
B and C, H heads, P channels of a head, W taps of a convolution, Q steps of a chunk. The papers call
tensors A, B, C, D too: "B (B, L, G, N)" is the input matrix B, by batch, length, group and state.

All is computed in float32 (float64 for float64 inputs), also under autocast; y has x's dtype. One
exception: on a GPU the factors of ssd's matrix products are rounded to x's dtype.
"""
import argparse
import statistics
import sys
import time

import torch
import torch.nn.functional as F

import decode_kernels
from decode_kernels import (FUSED, check_shapes, compute_dtype, full_precision, load, pieces,
                            sigmoid, softplus, tl, triton, use_triton)

CHUNK = 16  # steps whose states the chunked scan holds at once
LOG2_E = 1.4426950408889634  # e^u = 2^(u log2 e): on a CPU, exp2 takes a third of the time of exp


# ------------------------------------------------------------------------------ rung 1: the loop
def scan_loop(x, dt, A, B, C, h):
    """x, dt (B, L, D), A (D, N), B, C (B, L, G, N), h (B, D, N) -> y (B, L, D), h."""
    channels, ys = x.shape[2] // B.shape[2], []  # channel d reads group d // channels
    for t in range(x.shape[1]):
        B_t = B[:, t].repeat_interleave(channels, dim=1)  # (B, D, N)
        C_t = C[:, t].repeat_interleave(channels, dim=1)  # (B, D, N)
        x_t, dt_t = x[:, t, :, None], dt[:, t, :, None]  # (B, D, 1)
        h = torch.exp(dt_t * A) * h + dt_t * x_t * B_t  # (B, D, N)
        ys.append((C_t * h).sum(-1))  # (B, D)
    return torch.stack(ys, dim=1), h


def ssd_loop(x, log_decay, B, C, h):
    """x (B, L, H, P), log_decay (B, L, H), B, C (B, L, H, N), h (B, H, P, N) -> y like x, h."""
    decay, ys = log_decay.exp()[..., None, None], []  # (B, L, H, 1, 1)
    for t in range(x.shape[1]):
        h = decay[:, t] * h + x[:, t, :, :, None] * B[:, t, :, None]  # (B, H, P, N)
        ys.append((h * C[:, t, :, None]).sum(-1))  # (B, H, P)
    return torch.stack(ys, dim=1), h


# ------------------------------------------------------------------------------ rung 2: matrices
class _Decays(torch.autograd.Function):
    """decay_ts = exp(log_decay_{s+1} + ... + log_decay_t) for s <= t, else 0, (..., L, L).

    The sum is total_t - total_s, with totals in float64 because such differences cancel, and terms
    cut at -1000, where exp is 0. Gradient: w = grad * decay is that of total_t - total_s, total_t
    gets row sum t of w minus column sum t, and log_decay_r is in every total_t with t >= r.
    """

    @staticmethod
    def forward(ctx, log_decay):
        total = log_decay.double().clamp(min=-1000).cumsum(-1)  # (..., L)
        decay = (total[..., :, None] - total[..., None, :]).to(log_decay.dtype)  # (..., L, L)
        decay.exp_().tril_()  # exp may be inf above the diagonal: tril_ puts 0 in its place
        ctx.save_for_backward(decay)
        return decay

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_decay):
        decay, = ctx.saved_tensors
        w = grad_decay * decay  # (..., L, L)
        grad_total = w.sum(-1).double() - w.sum(-2)  # (..., L)
        return grad_total.flip(-1).cumsum(-1).flip(-1).to(w.dtype)


def mixing_matrix(log_decay, B, C):
    """T (B, H, L, L), float32, with y = T x for ssd from h = 0: T_ts = (C_t . B_s) decay_ts.

    This is the recurrence written out: attention with queries C, keys B and values x, without
    softmax, and with a decay for each step in between. log_decay (B, L, H), B, C (B, L, H, N).
    """
    check_shapes(B=(B, "B L H N"), C=(C, "B L H N"), log_decay=(log_decay, "B L H"))
    kind = compute_dtype(B)
    with full_precision(B):
        scores = C.transpose(1, 2).to(kind) @ B.permute(0, 2, 3, 1).to(kind)  # (B, H, L, L)
    return scores * _Decays.apply(log_decay.transpose(1, 2).to(kind))


# ------------------------------------------------------------------------------ rung 3: chunks
def split(u, chunk):
    """(B, L, H, ...) -> (B, H, L/Q, Q, ...), with zeros behind the end if Q does not divide L."""
    if missing := -u.shape[1] % chunk:
        u = F.pad(u, (0, 0) * (u.dim() - 2) + (0, missing))
    return u.unflatten(1, (-1, chunk)).movedim(3, 1).contiguous()


def ssd_chunks(x, log_decay, B, C, h, chunk, product=torch.matmul):
    """ssd_loop by matrices within chunks of Q steps and a loop over L/Q states (listing 1).

    The padding of the last chunk has x = 0 and log_decay = 0: it adds and forgets nothing.
    """
    length, chunk = x.shape[1], min(chunk, x.shape[1])
    x, log_decay, B, C = (split(u, chunk) for u in (x, log_decay, B, C))  # (B, H, L/Q, Q, ...)
    # 1. What the inputs of a chunk give to its own outputs: rung 2.
    decay = _Decays.apply(log_decay)  # (B, H, L/Q, Q, Q)
    y = product(product(C, B.transpose(-1, -2)) * decay, x)  # (B, H, L/Q, Q, P)
    # 2. What they leave in the state at the end of the chunk.
    left = product((x * decay[..., -1, :, None]).transpose(-1, -2), B)  # (B, H, L/Q, P, N)
    # 3. The recurrence, from chunk to chunk: the state before each.
    from_start = log_decay.cumsum(-1).exp()[..., None]  # (B, H, L/Q, Q, 1)
    starts = []
    for left_c, decay_c in zip(left.unbind(2), from_start[..., -1:, :].unbind(2)):
        starts.append(h)
        h = decay_c * h + left_c  # (B, H, P, N)
    # 4. What that state gives to the outputs.
    y = torch.addcmul(y, product(C, torch.stack(starts, 2).transpose(-1, -2)), from_start)
    return y.movedim(1, 3).flatten(1, 2)[:, :length], h


def chunk_states(x, dt, A, B, h):
    """Decays and states (Q, B, G, N, D/G) of a chunk that begins with state h (B, G, N, D/G)."""
    decay = torch.exp2(dt * (A * LOG2_E))
    states = dt * x * B  # what each step adds, and then the states themselves
    for decay_t, h_t in zip(decay, states):
        h = h_t.addcmul_(decay_t, h)
    return decay, states


class _ChunkedScan(torch.autograd.Function):
    """The scan chunk by chunk, which keeps the state at the start of each chunk and no other.

    x, dt (L, B, G, 1, D/G), A (G, N, D/G), B, C (L, B, G, N, 1), h (B, G, N, D/G) -> y like x, h.
    When the backward pass reaches a chunk, its states are computed once more. Let g_t = dLoss/dh_t.
    h_t feeds y_t and h_{t+1}, so g runs back in time, and all other gradients follow from it:

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
            h = states[-1].clone()  # a view would keep all states of the chunk
        ctx.save_for_backward(x, dt, A, B, C, *starts)
        return y, h

    @staticmethod
    @torch.autograd.function.once_differentiable
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
            grad_h = w[0].clone()  # exp(dt A) g of the first step is for the chunk before
            w[1:] *= states[:-1]
            w[0] *= start
            grad_A += (dt_c * w).sum((0, 1))
            torch.mul(dt_c, b, out=grad_x)
            torch.add(x_c * b, (A * w).sum(-2, keepdim=True), out=grad_dt)
        grad_x, grad_dt, grad_B, grad_C = grads
        return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_h


def scan_chunks(x, dt, A, B, C, h):
    """scan_loop by chunks. With time in front and a group's channels last, steps are contiguous."""
    groups = B.shape[2]
    x, dt = (u.transpose(0, 1).unflatten(2, (groups, 1, -1)).contiguous() for u in (x, dt))
    B, C = (u.transpose(0, 1)[..., None].contiguous() for u in (B, C))  # (L, B, G, N, 1)
    A, h = (u.unflatten(-2, (groups, -1)).transpose(-1, -2).contiguous() for u in (A, h))
    y, h = _ChunkedScan.apply(x, dt, A, B, C, h)  # (L, B, G, 1, D/G), (B, G, N, D/G)
    return y.flatten(2).transpose(0, 1).contiguous(), h.transpose(-1, -2).flatten(1, 2)


# ------------------------------------------------------------------------------ one token
def selective_step(h, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False,
                   backend="auto"):
    """y (B, D) of one token of selective_scan; the state h (B, D, N) changes in place.

    x, dt, z (B, D), B, C (B, G, N), the rest as there. If h is in half precision, the step computes
    in float32 all the same and rounds the state that it writes back.
    """
    tensors = h, x, dt, A, B, C, D, z, dt_bias
    if use_triton(backend, *tensors, backward=False) and h.is_contiguous():
        return decode_kernels.selective_step(*tensors, dt_softplus)
    kind, groups = compute_dtype(h), B.shape[1]
    state, u = h.to(kind), x.to(kind)  # a float32 h itself, not a copy
    dt = dt.to(kind) if dt_bias is None else dt.to(kind) + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    state.mul_((dt[..., None] * (A * LOG2_E)).exp2_())
    rows = state.unflatten(1, (groups, -1))  # (B, G, D/G, N)
    rows.addcmul_((dt * u).unflatten(1, (groups, -1))[..., None], B[:, :, None].to(kind))
    with full_precision(h):  # (B, G, 1, N) @ (B, G, N, D/G)
        y = (C[:, :, None].to(kind) @ rows.transpose(2, 3)).flatten(1)  # (B, D)
    h.copy_(state)  # does nothing to a float32 h
    y = y if D is None else torch.addcmul(y, u, D)
    return (y if z is None else y * F.silu(z.to(kind))).to(x.dtype)


def ssd_step(h, x, log_decay, B, C, backend="auto"):
    """y (B, H, P) of one token of ssd; the state h (B, H, P, N), of any dtype, changes in place.

    x (B, H, P), log_decay (B, H), B, C (B, H, N).
    """
    if use_triton(backend, h, x, log_decay, B, C, backward=False) and h.is_contiguous():
        return decode_kernels.ssd_step(h, x, log_decay, B, C)
    kind = compute_dtype(h)
    state = h.to(kind)  # a float32 h itself, not a copy
    state.mul_(log_decay.to(kind).exp()[..., None, None])
    state.addcmul_(x.to(kind)[..., None], B.to(kind)[..., None, :])  # (B, H, P, 1) * (B, H, 1, N)
    with full_precision(h):
        y = C.to(kind)[..., None, :] @ state.transpose(-1, -2)  # (B, H, 1, P), faster than h @ C
    h.copy_(state)  # does nothing to a float32 h
    return y[..., 0, :].to(x.dtype)


# ------------------------------------------------------------------------------ a whole sequence
def selective_scan(x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, h0=None,
                   backend="auto"):
    """y (B, L, D) in x's dtype and the state h (B, D, N), float32, after the last step.

    x, dt, z (B, L, D); A (D, N); B, C (B, L, G, N), where channel d reads group d // (D/G); D,
    dt_bias (D,); h0 (B, D, N), None for zeros. With dt_softplus, dt is softplus(dt + dt_bias), and
    dt = -inf is padding: it leaves the state as it is. Differentiable in every tensor, through y
    and h. backend: "ref" is rung 1, "torch" rung 3, "triton" 4 to 6, "auto" Triton on CUDA.
    """
    check_shapes(x=(x, "B L D"), dt=(dt, "B L D"), A=(A, "D N"), B=(B, "B L G N"),
                 C=(C, "B L G N"), D=(D, "D"), z=(z, "B L D"), dt_bias=(dt_bias, "D"),
                 h0=(h0, "B D N"))
    if x.shape[2] % B.shape[2]:
        raise ValueError(f"B has {B.shape[2]} groups, expected a divisor of {x.shape[2]} channels")
    by_triton = use_triton(backend, x, dt, A, B, C, D, z, dt_bias, h0)
    y_dtype, kind = x.dtype, compute_dtype(x)
    A, D, dt_bias, h0 = (u if u is None else u.to(kind) for u in (A, D, dt_bias, h0))
    h0 = A.new_zeros(len(x), *A.shape) if h0 is None else h0
    if by_triton:
        return scan_by_triton(x, dt, A, B, C, D, z, dt_bias, h0, dt_softplus)  # below the line
    x, dt, B, C = (u.to(kind) for u in (x, dt, B, C))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    y, h = (scan_loop if backend == "ref" else scan_chunks)(x, dt, A, B, C, h0)
    y = y if D is None else torch.addcmul(y, D, x)
    return (y if z is None else y * F.silu(z.to(kind))).to(y_dtype), h


def ssd(x, log_decay, B, C, h0=None, chunk=64, backend="auto"):
    """y (B, L, H, P) in x's dtype and the state h (B, H, P, N), float32, after the last step.

    x (B, L, H, P), log_decay (B, L, H) <= 0, B, C (B, L, H, N), h0 (B, H, P, N), None for zeros.
    x = 0 and log_decay = 0 are padding. Differentiable in every tensor, through y and h. `chunk`
    changes speed and memory only. backend: "ref" is rung 1; "torch" and "auto" are rung 3, matrix
    products, for which a GPU needs no kernel of ours.
    """
    if backend not in ("auto", "ref", "torch") or chunk < 1:
        raise ValueError(f"backend is {backend!r} and chunk is {chunk}, expected 'auto', 'torch' "
                         "or 'ref' for ssd, and 1 or more")
    check_shapes(x=(x, "B L H P"), log_decay=(log_decay, "B L H"), B=(B, "B L H N"),
                 C=(C, "B L H N"), h0=(h0, "B H P N"))
    y_dtype, kind = x.dtype, compute_dtype(x)
    h0 = x.new_zeros(len(x), *x.shape[2:], B.shape[3]) if h0 is None else h0
    product = half_product(x.dtype) if x.is_cuda and x.dtype != kind else torch.matmul  # below
    x, log_decay, B, C, h0 = (u.to(kind) for u in (x, log_decay, B, C, h0))
    with full_precision(x):
        y, h = (ssd_loop(x, log_decay, B, C, h0) if backend == "ref"
                else ssd_chunks(x, log_decay, B, C, h0, chunk, product))
    return y.to(y_dtype), h


# ---- first reading ends here: the convolution, Triton, and a check of every rung ----


def selective_scan_ref(x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, h0=None,
                       backend="ref"):
    """selective_scan by the loop, whatever the backend."""
    return selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, h0, backend="ref")


def ssd_ref(x, log_decay, B, C, h0=None, chunk=64, backend="ref"):
    """ssd by the loop, whatever the chunk and the backend."""
    return ssd(x, log_decay, B, C, h0, chunk, backend="ref")


# ------------------------------------------------------------------------------ the convolution
class _CausalConv(torch.autograd.Function):
    """y_t = bias + sum_k taps[k] x_{t-W+1+k}, as W multiply-adds: on a CPU twice as fast as conv1d.

    x (B, W-1 + L, D) begins with the past; taps (W, D), bias (D,) -> y (B, L, D). In the gradient
    the same pairs of x, tap and y meet as in the formula. Only the inputs are kept.
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
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        x, taps = ctx.saved_tensors
        length, product = grad_y.shape[1], torch.empty_like(grad_y)
        grad_x, grad_taps = torch.zeros_like(x), torch.empty_like(taps)
        for k, tap in enumerate(taps):
            grad_x[:, k:k + length].addcmul_(grad_y, tap)
            grad_taps[k] = torch.mul(grad_y, x[:, k:k + length], out=product).sum((0, 1))
        return grad_x, grad_taps, grad_y.sum((0, 1))


def causal_conv(x, weight, bias, past=None, counts=None):
    """y of a depthwise convolution, y_t = bias + sum_k weight[k] x_{t-W+1+k}, and the next past.

    x, y (B, L, D), weight (D, 1, W), bias (D,); past (B, W-1, D): the inputs before x, None for
    zeros. counts (B,): row b has counts[b] tokens and padding behind them; its past is taken at its
    own end, so a row of 0 tokens keeps what it had. Both results have x's dtype. Differentiable.
    """
    width, length = weight.shape[-1], x.shape[1]
    check_shapes(x=(x, "B L D"), weight=(weight, "D 1 W"), bias=(bias, "D"),
                 past=(past, f"B {width - 1} D"), counts=(counts, "B"))
    kind = compute_dtype(x)
    past = x.new_zeros(len(x), width - 1, x.shape[2]) if past is None else past.to(x.dtype)
    inputs = torch.cat([past, x], dim=1)  # (B, W-1 + L, D)
    taps = weight[:, 0].t().to(kind).contiguous()  # (W, D)
    y = _CausalConv.apply(inputs.to(kind), taps, bias.to(kind)).to(x.dtype)
    if counts is None:
        return y, inputs[:, length:]
    window = counts[:, None] + torch.arange(width - 1, device=x.device)  # (B, W-1)
    return y, inputs.gather(1, window[..., None].expand(-1, -1, x.shape[2]))


def causal_conv_step(past, x, weight, bias, backend="auto"):
    """y (B, D) of one token x (B, D) of causal_conv; past (B, W-1, D) takes x in place."""
    if use_triton(backend, past, x, weight, bias, backward=False) and past.is_contiguous():
        return decode_kernels.causal_conv_step(past, x, weight, bias)
    kind, taps = compute_dtype(x), weight[:, 0].unbind(1)  # W times (D,)
    columns = [past[:, k] for k in range(past.shape[1])]  # not unbind: its views may not change
    y = torch.addcmul(bias, x.to(kind), taps[-1])  # (B, D)
    for column, tap in zip(columns, taps):
        y.addcmul_(column.to(kind), tap)
    for column, newer in zip(columns, (*columns[1:], x)):
        column.copy_(newer)
    return y.to(x.dtype)


# ------------------------------------------------------------------------ rung 4: Triton, forward
# PyTorch writes every intermediate tensor to memory and reads it again, and those of rung 3 are N
# times as large as x. One kernel keeps them in registers: a program owns a few channels of one
# sequence and walks through time, reads x, dt, z, B and C once and writes y once. What binds then
# is the N exponentials for each x, or the bytes.
#
# Why no associative scan, as in Mamba's own kernel? It combines pairs (decay, state): log L rounds
# instead of L steps, but more work, with a block of time held at once. It helps where programs are
# few. So does rung 6, and it leaves the kernel as plain as the formula.
#
# A program holds its states as a tile (N, W), W channels wide; what belongs to a channel is (1, W),
# what belongs to a state (N, 1). In memory, states lie as (N, D) here. A warp should hold 16
# channels x 2 states and a thread the other states, so that the sum over states, for y, begins
# inside a thread. Triton lays a tile out like this unless it knows that rows are aligned, for it
# then reads them in wide pieces. `width` is d_inner once more, as a number it knows nothing about.
KEPT = 8  # the state before every KEPT-th step is kept; the backward kernel runs those steps again
sizes_unknown = triton.jit(do_not_specialize=["length", "segment_length", "width"])


@triton.jit
def _tile(d_inner: tl.constexpr, d_state: tl.constexpr, groups: tl.constexpr,
          BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's part of (N, D), by axis 0 of the grid: blocks of channels, group after group.

    -> group, block in it, channels d (1, W) and which exist, states n (N, 1) and which exist.
    """
    channels = d_inner // groups
    blocks = tl.cdiv(channels, BLOCK_D)
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]  # (1, W)
    n = tl.arange(0, BLOCK_N)[:, None]  # (N, 1)
    return group, block, group * channels + d, d < channels, n, n < d_state


@sizes_unknown
def _scan_forward_kernel(x, dt, A, B, C, D, z, dt_bias, h_start, y, kept, h_end, dt_sum,
                         length, segment_length, width,
                         d_inner: tl.constexpr, d_state: tl.constexpr, groups: tl.constexpr,
                         SOFTPLUS: tl.constexpr, KEPT: tl.constexpr,
                         BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """y (B, L, D), kept (B, L/KEPT, N, D), and per segment h_end (B, S, N, D), dt_sum (B, S, D).

    z may be None, and kept where nobody will ask for gradients. Grid: blocks of channels, S, B.
    """
    group, _, d, is_d, n, is_n = _tile(d_inner, d_state, groups, BLOCK_D, BLOCK_N)
    segment, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = batch * tl.num_programs(1) + segment  # in (B, S)
    states, is_state = n * width + d, is_d & is_n  # (N, W): offsets in (N, D)
    A2 = load(A + states, is_state) * 1.4426950408889634  # A log2 e, for exp(dt A) = 2^(dt A2)
    D, dt_bias = load(D + d, is_d), load(dt_bias + d, is_d)  # (1, W)
    h = load(h_start + place * d_inner * d_state + states, is_state)  # (N, W)
    total = tl.zeros_like(dt_bias)
    begin = segment * segment_length
    end = tl.minimum(begin + segment_length, length)
    end_d, end_n = tl.where(is_d, end, 0), tl.where(is_n, end, 0)  # d has step t if t < end_d
    for first in range(begin, end, KEPT):
        if kept is not None:
            row = batch * tl.cdiv(length, KEPT) + first // KEPT
            tl.store(kept + row * d_inner * d_state + states, h, mask=is_state)
        inputs = ()  # of KEPT steps: asked for at once, they wait for memory together
        for i in tl.static_range(KEPT):
            row, has_d, has_n = batch * length + first + i, first + i < end_d, first + i < end_n
            channels, state_row = row * d_inner + d, (row * groups + group) * d_state + n
            inputs += ((load(x + channels, has_d), load(dt + channels, has_d),
                        load(z + channels, has_d) if z is not None else 0.0,
                        load(B + state_row, has_n), load(C + state_row, has_n)),)
        for i in tl.static_range(KEPT):
            x_t, dt_t, z_t, B_t, C_t = inputs[i]
            dt_t = softplus(dt_t + dt_bias) if SOFTPLUS else dt_t + dt_bias
            dt_t = tl.where(first + i < end_d, dt_t, 0.0)  # behind the end h stays as it is
            h = tl.exp2(dt_t * A2) * h + (dt_t * x_t) * B_t  # (N, W)
            y_t = tl.sum(h * C_t, axis=0, keep_dims=True) + D * x_t  # (1, W)
            if z is not None:
                y_t *= z_t * sigmoid(z_t)
            total += dt_t
            row = batch * length + first + i
            tl.store(y + row * d_inner + d, y_t, mask=first + i < end_d)
    tl.store(h_end + place * d_inner * d_state + states, h, mask=is_state)
    tl.store(dt_sum + place * d_inner + d, total, mask=is_d)


# ------------------------------------------------------------------------ rung 5: Triton, backward
@sizes_unknown
def _scan_backward_kernel(x, dt, A, B, C, D, z, dt_bias, kept, grad_y, g_end, grad_x, grad_dt,
                          grad_A, grad_B, grad_C, grad_D, grad_z, grad_dt_bias, g_start,
                          length, segment_length, width,
                          d_inner: tl.constexpr, d_state: tl.constexpr, groups: tl.constexpr,
                          SOFTPLUS: tl.constexpr, KEPT: tl.constexpr,
                          BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """The equations of _ChunkedScan: a program goes back through its segment, KEPT steps at a time.

    Those first run forward from their kept state; their states stay in registers for the way back.
    What is summed over programs is left in parts, to be added in a fixed order (atomics would give
    other bits every time): grad_A (B, S, N, D), grad_D, grad_dt_bias (B, S, D), grad_B, grad_C
    (blocks, B, L, G, N).
    """
    group, block, d, is_d, n, is_n = _tile(d_inner, d_state, groups, BLOCK_D, BLOCK_N)
    segment, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = batch * tl.num_programs(1) + segment  # in (B, S)
    states, is_state = n * width + d, is_d & is_n  # (N, W): offsets in (N, D)
    A2 = load(A + states, is_state) * 1.4426950408889634  # A log2 e, for exp(dt A) = 2^(dt A2)
    D, dt_bias = load(D + d, is_d), load(dt_bias + d, is_d)  # (1, W)
    g = load(g_end + place * d_inner * d_state + states, is_state)  # (N, W)
    sum_A, sum_D, sum_bias = tl.zeros_like(A2), tl.zeros_like(D), tl.zeros_like(D)
    begin = segment * segment_length
    end = tl.minimum(begin + segment_length, length)
    end_d, end_n = tl.where(is_d, end, 0), tl.where(is_n, end, 0)  # d has step t if t < end_d
    part = (block * tl.num_programs(2) + batch) * length  # this block's part of grad_B, grad_C
    chunks = tl.cdiv(end - begin, KEPT)
    for back in range(0, chunks):
        first = begin + (chunks - 1 - back) * KEPT
        row = batch * tl.cdiv(length, KEPT) + first // KEPT
        h = load(kept + row * d_inner * d_state + states, is_state)
        before = ()  # the states before the KEPT steps
        for i in tl.static_range(KEPT):
            row, has_d, has_n = batch * length + first + i, first + i < end_d, first + i < end_n
            channels, state_row = row * d_inner + d, (row * groups + group) * d_state + n
            x_t, raw = load(x + channels, has_d), load(dt + channels, has_d) + dt_bias
            dt_t = tl.where(has_d, softplus(raw) if SOFTPLUS else raw, 0.0)
            before += (h,)
            h = tl.exp2(dt_t * A2) * h + (dt_t * x_t) * load(B + state_row, has_n)
        for i in tl.static_range(KEPT - 1, -1, -1):
            row, has_d, has_n = batch * length + first + i, first + i < end_d, first + i < end_n
            channels, state_row = row * d_inner + d, (row * groups + group) * d_state + n
            x_t, raw = load(x + channels, has_d), load(dt + channels, has_d) + dt_bias
            grad_y_t, B_t = load(grad_y + channels, has_d), load(B + state_row, has_n)
            C_t = load(C + state_row, has_n)
            dt_t = tl.where(has_d, softplus(raw) if SOFTPLUS else raw, 0.0)
            if z is not None:
                z_t = load(z + channels, has_d)
                gate = sigmoid(z_t)
                y_t = tl.sum(h * C_t, axis=0, keep_dims=True) + D * x_t
                grad_z_t = grad_y_t * y_t * gate * (1 + z_t * (1 - gate))
                tl.store(grad_z + channels, grad_z_t, mask=has_d)
                grad_y_t *= z_t * gate
            g += C_t * grad_y_t
            part_row = ((part + first + i) * groups + group) * d_state + n
            grad_B_t = tl.sum(g * (dt_t * x_t), axis=1, keep_dims=True)  # (N, 1)
            grad_C_t = tl.sum(h * grad_y_t, axis=1, keep_dims=True)
            tl.store(grad_B + part_row, grad_B_t, mask=has_n)
            tl.store(grad_C + part_row, grad_C_t, mask=has_n)
            b = tl.sum(g * B_t, axis=0, keep_dims=True)  # (1, W)
            h = before[i]
            g *= tl.exp2(dt_t * A2)  # now of the state before the step
            w = g * h  # (N, W)
            sum_A += dt_t * w
            grad_dt_t = tl.sum(w * A2, axis=0, keep_dims=True) * 0.6931471805599453 + b * x_t
            if SOFTPLUS:
                grad_dt_t *= sigmoid(raw)
            sum_D += grad_y_t * x_t
            sum_bias += tl.where(has_d, grad_dt_t, 0.0)
            tl.store(grad_x + channels, b * dt_t + D * grad_y_t, mask=has_d)
            tl.store(grad_dt + channels, grad_dt_t, mask=has_d)
    tl.store(g_start + place * d_inner * d_state + states, g, mask=is_state)
    tl.store(grad_A + place * d_inner * d_state + states, sum_A, mask=is_state)
    tl.store(grad_D + place * d_inner + d, sum_D, mask=is_d)
    tl.store(grad_dt_bias + place * d_inner + d, sum_bias, mask=is_d)


# ------------------------------------------------------------------------------ rung 6: segments
def join_segments(first, left, dt_sum, A):
    """The state (B, S, N, D) that each of S segments inherits; that of the first is `first`.

    left (B, S, N, D) is what a segment ends with if it begins at zero. What it inherits shrinks by
    prod_t exp(dt_t A) = exp(A sum_t dt_t), so dt_sum (B, S, D) is all that is needed of its dt.
    """
    shrinks, starts = torch.exp(A * dt_sum[:, :, None]), [first]  # (B, S, N, D)
    for s in range(left.shape[1] - 1):
        starts.append(torch.addcmul(left[:, s], shrinks[:, s], starts[-1]))
    return torch.stack(starts, dim=1)


def scan_plan(x, A, groups, segments):
    """The grid (blocks of channels, S segments, B), blocks of a group, sizes and constants.

    x (B, L, D), A (N, D). segments None: enough for this GPU.
    """
    (batch, length, d_inner), d_state = x.shape, len(A)
    block_n = triton.next_power_of_2(d_state)
    block_d = 16 if block_n < 256 else 8
    blocks = triton.cdiv(d_inner // groups, block_d)
    segments = segments or pieces(batch * groups * blocks, length, x.device)
    segments = segments if segments > 2 else 1  # each is scanned twice, so two gain nothing
    segment_length = KEPT * triton.cdiv(triton.cdiv(length, segments), KEPT)
    grid = groups * blocks, triton.cdiv(length, segment_length), batch
    warps = max(1, block_n * block_d // 256)  # 8 states to a thread
    constants = dict(d_inner=d_inner, d_state=d_state, groups=groups, KEPT=KEPT, BLOCK_D=block_d,
                     BLOCK_N=block_n, num_warps=warps, **FUSED)
    return grid, blocks, (length, segment_length, d_inner), constants


class _TritonScan(torch.autograd.Function):
    """All of selective_scan, from softplus to gate: inputs are read once and y is written once.

    With segments: scan each as if it began at zero, join, and scan again from the right states.
    """

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, dt_bias, h0, softplus, segments, recorded):
        x, dt, B, C, D, z, dt_bias = (
            u if u is None else u.contiguous() for u in (x, dt, B, C, D, z, dt_bias))
        A, h0 = A.t().contiguous(), h0.transpose(1, 2).contiguous()  # (N, D), (B, N, D)
        ctx.softplus, ctx.plan = softplus, scan_plan(x, A, B.shape[2], segments)
        grid, _, sizes, constants = ctx.plan
        _, segments, batch = grid
        y, dt_sum = torch.empty_like(x), A.new_empty(batch, segments, x.shape[2])
        h_end, kept = A.new_empty(batch, segments, *A.shape), None
        if recorded:
            kept = A.new_empty(batch, triton.cdiv(x.shape[1], KEPT), *A.shape)

        def scan(h_start):
            _scan_forward_kernel[grid](x, dt, A, B, C, D, z, dt_bias, h_start, y, kept, h_end,
                                       dt_sum, *sizes, SOFTPLUS=softplus, **constants)

        if segments > 1:
            scan(torch.zeros_like(h_end))
        scan(join_segments(h0, h_end, dt_sum, A))
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, kept, dt_sum)
        return y, h_end[:, -1].transpose(1, 2).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_h):
        x, dt, A, B, C, D, z, dt_bias, kept, dt_sum = ctx.saved_tensors
        grad_y, grad_h = grad_y.contiguous(), grad_h.transpose(1, 2).contiguous()
        grid, blocks, sizes, constants = ctx.plan
        _, segments, batch = grid
        grad_x, grad_dt, grad_z = (u if u is None else torch.empty_like(u) for u in (x, dt, z))
        grad_A, g_start = (A.new_empty(batch, segments, *A.shape) for _ in range(2))
        grad_D, grad_bias = torch.empty_like(dt_sum), torch.empty_like(dt_sum)
        grad_B, grad_C = (A.new_empty(blocks, *B.shape) for _ in range(2))

        def scan(g_end):
            _scan_backward_kernel[grid](
                x, dt, A, B, C, D, z, dt_bias, kept, grad_y, g_end, grad_x, grad_dt,
                grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, g_start, *sizes,
                SOFTPLUS=ctx.softplus, **constants)

        if segments > 1:
            scan(torch.zeros_like(g_start))
        scan(join_segments(grad_h, g_start.flip(1), dt_sum.flip(1), A).flip(1))  # back in time
        grad_A, grad_D, grad_bias = (u.sum((0, 1)) for u in (grad_A, grad_D, grad_bias))
        return (grad_x, grad_dt, grad_A.t(), grad_B.sum(0).to(B.dtype), grad_C.sum(0).to(C.dtype),
                grad_D, grad_z, grad_bias, g_start[:, 0].transpose(1, 2), None, None, None)


def scan_by_triton(x, dt, A, B, C, D, z, dt_bias, h0, softplus, segments=None):
    """What selective_scan returns. A, D, dt_bias, h0 are float32; D, z and dt_bias may be None."""
    D, dt_bias = (A.new_zeros(len(A)) if u is None else u for u in (D, dt_bias))
    inputs = x, dt, A, B, C, D, z, dt_bias, h0
    recorded = torch.is_grad_enabled() and any(u is not None and u.requires_grad for u in inputs)
    return _TritonScan.apply(*inputs, softplus, segments, recorded)


# ------------------------------------------------------------------------------ ssd on tensor cores
def bmm_float32(a, b):
    """a (..., M, K) @ b (..., K, N) in half precision, summed and returned in float32."""
    if not a.is_cuda:  # out_dtype is for CUDA only
        return a.float() @ b.float()
    product = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return product.unflatten(0, a.shape[:-2])


class _HalfProduct(torch.autograd.Function):
    """The product of two float32 tensors, factors rounded to `dtype`, sums in float32, both ways.

    a.to(dtype) @ b.to(dtype) would round the sums as well, and out_dtype has no derivative.
    """

    @staticmethod
    def forward(ctx, a, b, dtype):
        a, b = a.to(dtype), b.to(dtype)
        ctx.save_for_backward(a, b)
        return bmm_float32(a, b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        grad = grad.to(a.dtype)
        return bmm_float32(grad, b.transpose(-1, -2)), bmm_float32(a.transpose(-1, -2), grad), None


def half_product(dtype):
    """The `product` of ssd_chunks that a GPU has units for."""
    return lambda a, b: _HalfProduct.apply(a, b, dtype)


# ------------------------------------------------------------------------------ check and time
def scan_rung(backend):
    """The scan on one rung, as a function of its inputs."""
    return lambda **inputs: selective_scan(**inputs, dt_softplus=True, backend=backend)[0]


def matrix_rung(x, log_decay, B, C):
    """SSD as one matrix per head, y = T x."""
    T = mixing_matrix(log_decay, B, C)  # (B, H, L, L)
    return (T @ x.transpose(1, 2).to(T.dtype)).transpose(1, 2).to(x.dtype)


LADDERS = {  # function: its rungs, as (name, what it adds, y of the inputs)
    "selective_scan": (
        ("1 loop", "the formula, token by token", scan_rung("ref")),
        ("3 chunks", "gradients by hand, 1 state in 16 kept", scan_rung("torch")),
        ("4, 5 Triton", "one kernel forward, one backward", scan_rung("triton")),
        ("6 segments", "time in 3 pieces, for small batches",
         lambda **inputs: scan_by_triton(**inputs, softplus=True, segments=3)[0])),
    "ssd": (
        ("1 loop", "the formula, token by token", lambda **inputs: ssd_ref(**inputs)[0]),
        ("2 matrix", "one L x L matrix for each head", matrix_rung),
        ("3 chunks", "matrices inside, states between",
         lambda **inputs: ssd(**inputs, chunk=32)[0])),
}


def random_inputs(batch, length, channels, states, dtype, device):
    """{function: inputs by name}: activations of the dtype, parameters and states in float32."""
    def draw(*shape, dtype=torch.float32):
        return torch.randn(shape, device=device).to(dtype)

    def activation(*shape):
        return draw(batch, length, *shape, dtype=dtype)

    heads = max(channels // 64, 1 if channels % 4 else 4)  # of 64 channels, or 4 smaller ones
    scan = dict(x=activation(channels), dt=activation(channels), A=-draw(channels, states).abs(),
                B=activation(1, states), C=activation(1, states), D=draw(channels),
                z=activation(channels), dt_bias=draw(channels), h0=draw(batch, channels, states))
    matrices = dict(x=activation(heads, channels // heads), log_decay=-activation(heads).abs(),
                    B=activation(heads, states), C=activation(heads, states))
    return {name: {key: u.requires_grad_() for key, u in inputs.items()}
            for name, inputs in (("selective_scan", scan), ("ssd", matrices))}


def values_and_gradients(function, inputs):
    """y, and the gradient of half its sum of squares in every input."""
    y = function(**inputs)
    return y, *torch.autograd.grad(y, list(inputs.values()), y.detach())


def largest_error(found, expected):
    """The largest difference, each tensor's as a share of its largest expected entry."""
    errors = [(a - b).abs().max().float() / b.abs().max().float() for a, b in zip(found, expected)]
    return torch.stack(errors).max().item()  # unlike Python's max, it returns a NaN


def milliseconds(function, inputs, repeats=5):
    """The median of some runs, forward and backward; the caller has warmed up."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        values_and_gradients(function, inputs)[1].sum().item()  # .item() waits for a GPU
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def bytes_kept(function, inputs):
    """Bytes that autograd keeps for y's backward pass: every storage once, those of inputs too."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(**inputs)  # while y lives, so does what is kept: no address comes twice
    assert y.requires_grad
    return sum(kept.values())


def positive(text):
    """An argparse type: a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def parse_options():
    """The options of `python kernels.py`."""
    on_gpu = torch.cuda.is_available()
    sizes = 4, 2048, 2048, 16  # of a real layer
    if not on_gpu:  # the interpreter takes a second for what a GPU does in microseconds
        sizes = (1, 40, 16, 16) if decode_kernels.INTERPRETED else (8, 256, 64, 16)
    parser = argparse.ArgumentParser(
        description="Check every rung against the one below, and show what it costs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"kernels.py: {message}\n")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=["cpu", "cuda"],
                        help="where to run")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32",
                        choices=["float32", "bfloat16", "float16"], help="of activations")
    for name, size, text in zip(("batch", "length", "channels", "states"), sizes,
                                ("sequences", "tokens in each", "inner width", "of a channel")):
        parser.add_argument(f"--{name}", type=positive, default=size, help=text)
    args = parser.parse_args()
    if args.device == "cuda" and not on_gpu:
        parser.error("--device is cuda, but PyTorch sees no GPU here: expected cpu")
    return args


def climb(name, inputs, dtype, on_cpu):
    """Prints a line for each rung of a function; SystemExit at the first that is off."""
    allowed, below = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype], None
    for rung, adds, function in LADDERS[name]:
        line, triton_on_cpu = f"{name:15} {rung:12} {adds:38}", on_cpu and rung[0] in "46"
        if triton_on_cpu and not decode_kernels.INTERPRETED:
            print(f"{line}  needs a GPU")
            continue
        found = values_and_gradients(function, inputs)
        error = largest_error(found, below or found)
        if not error < allowed:
            sys.exit(f"kernels.py: {name}, rung {rung}, is off by {error:.1e} of its scale, "
                     f"allowed {allowed:.0e}")
        line, below = line + (f" {error:8.0e}" if below else f"{'':9}"), found
        if triton_on_cpu:
            print(f"{line}  interpreted: not timed")
        else:
            kept = bytes_kept(function, inputs) / 1e6
            print(f"{line} {milliseconds(function, inputs):9.2f} {kept:8.1f}")


def main():
    args = parse_options()
    torch.manual_seed(0)
    dtype, on_cpu = getattr(torch, args.dtype), args.device == "cpu"
    machine = f"{torch.get_num_threads()} CPU thread(s)" if on_cpu else torch.cuda.get_device_name()
    print(f"batch {args.batch}, length {args.length}, {args.channels} channels, {args.states} "
          f"states, {args.dtype}, {machine}")
    print(f"{'':15} {'rung':12} {'what it adds':38} {'error':>8} {'ms':>9} {'MB kept':>8}")
    inputs = random_inputs(args.batch, args.length, args.channels, args.states, dtype, args.device)
    for name in LADDERS:
        climb(name, inputs[name], dtype, on_cpu)


if __name__ == "__main__":
    main()
