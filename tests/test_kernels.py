"""What kernels.py promises: every fast path equals a literal loop, in values and in every gradient; one token at a time
equals the whole sequence; strong decay, long sequences and low precision stay accurate; memory does not grow with states."""
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import kernels

# dtype: (rtol, atol) against the float64 loop on the same (rounded) inputs. Half precision: what upstream Mamba allows.
TOLERANCE = {torch.float64: (1e-9, 1e-10), torch.float32: (2e-4, 2e-5), torch.float16: (3e-3, 5e-3),
             torch.bfloat16: (3e-2, 5e-2)}
OPTIONS = ("D", "z", "dt_bias", "h0")


# ------------------------------------------------------------------------------------------------ helpers
def scan_inputs(batch=2, length=20, d_inner=6, d_state=5, groups=2, options=OPTIONS, dtype=torch.float32, seed=0):
    """Inputs of selective_scan by name; dt is positive so that it is a step size with or without softplus."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    inputs = dict(x=randn(batch, length, d_inner), dt=randn(batch, length, d_inner).abs() / 2,
                  A=-randn(d_inner, d_state).abs(), B=randn(batch, length, groups, d_state),
                  C=randn(batch, length, groups, d_state), D=randn(d_inner), z=randn(batch, length, d_inner),
                  dt_bias=randn(d_inner).abs() / 2, h0=randn(batch, d_inner, d_state))
    return {name: tensor.to(dtype) for name, tensor in inputs.items() if name not in OPTIONS or name in options}


def ssd_inputs(batch=2, length=20, n_heads=2, head_dim=3, d_state=5, h0=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    inputs = dict(x=randn(batch, length, n_heads, head_dim), log_decay=-randn(batch, length, n_heads).abs(),
                  B=randn(batch, length, n_heads, d_state), C=randn(batch, length, n_heads, d_state))
    if h0:
        inputs["h0"] = randn(batch, n_heads, head_dim, d_state)
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def results(function, inputs, use=("y", "h"), **settings):
    """y, h and the gradient of a fixed random projection of them with respect to each input, by name."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    outputs = dict(zip(("y", "h"), function(**leaves, **settings)))
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(output.shape, generator=generator, dtype=torch.float64) for name, output in outputs.items()}
    loss = sum((outputs[name].double() * weights[name]).sum() for name in use)
    gradients = torch.autograd.grad(loss, leaves.values(), allow_unused=True)
    return {**outputs, **{f"grad of {name}": gradient for name, gradient in zip(leaves, gradients)}}


def assert_same(found, wanted, dtype, factor=1):
    """Every tensor of `found` is close to the one of the same name in `wanted`, atol relative to its scale."""
    rtol, atol = TOLERANCE[dtype]
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        if wanted[name] is None or tensor is None:  # an input that does not reach the loss
            assert tensor is None or not tensor.any(), name
            continue
        scale = max([1.0, *wanted[name].abs().flatten().tolist()])
        torch.testing.assert_close(tensor.double(), wanted[name].double(), rtol=factor * rtol, atol=factor * atol * scale,
                                   msg=lambda text, name=name: f"{name}: {text}")


def in_double(inputs):
    return {name: tensor.double() for name, tensor in inputs.items()}


# ------------------------------------------------------------------------------------------------ selective scan
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("options", [chosen for n in range(5) for chosen in itertools.combinations(OPTIONS, n)],
                         ids=lambda chosen: "+".join(chosen) or "none")
def test_selective_scan_equals_the_loop_with_every_optional_input_on_and_off(options, softplus):
    """Values and every gradient, also through the returned state. Red if one term of the backward is missing."""
    inputs = scan_inputs(options=options, dtype=torch.float64)
    wanted = results(kernels.selective_scan_ref, inputs, dt_softplus=softplus)
    assert_same(results(kernels.selective_scan, inputs, dt_softplus=softplus, backend="torch"), wanted, torch.float64)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 40])
@pytest.mark.parametrize("groups, d_state", [(1, 5), (2, 24), (6, 1)])
def test_selective_scan_equals_the_loop_for_odd_shapes(length, groups, d_state):
    """L = 1, L around and beyond a chunk, N not a power of two, shared and private groups. Red on an off-by-one between
    chunks."""
    inputs = scan_inputs(length=length, groups=groups, d_state=d_state, dtype=torch.float64)
    wanted = results(kernels.selective_scan_ref, inputs, dt_softplus=True)
    assert wanted["y"].shape == (2, length, 6) and wanted["h"].shape == (2, 6, d_state)
    assert_same(results(kernels.selective_scan, inputs, dt_softplus=True), wanted, torch.float64)
    inputs = {name: tensor.float() for name, tensor in inputs.items()}
    assert_same(results(kernels.selective_scan, inputs, dt_softplus=True), wanted, torch.float32)


@pytest.mark.parametrize("use", [("y",), ("h",)])
def test_selective_scan_gradients_flow_from_either_output_alone(use):
    """A student can be trained on the final state only, or on y only: the missing gradient counts as zero."""
    inputs = scan_inputs(length=20, dtype=torch.float64)
    wanted = results(kernels.selective_scan_ref, inputs, use)
    assert_same(results(kernels.selective_scan, inputs, use), wanted, torch.float64)


@pytest.mark.parametrize("backend", ["ref", "torch"])
def test_selective_scan_gradcheck(backend, monkeypatch):
    """Against finite differences in float64, over two and a half chunks: independent of any other code of ours."""
    monkeypatch.setattr(kernels, "SCAN_CHUNK", 2)
    inputs = scan_inputs(batch=1, length=5, d_inner=4, d_state=3, dtype=torch.float64)
    names = list(inputs)
    function = lambda *tensors: kernels.selective_scan(**dict(zip(names, tensors)), dt_softplus=True, backend=backend)
    assert gradcheck(function, [tensor.requires_grad_() for tensor in inputs.values()])


def test_the_loop_equals_hand_computed_numbers():
    """Two steps of one channel and one state, by hand: the reference itself is checked against the definition."""
    tensor = lambda *values: torch.tensor(values, dtype=torch.float64)
    y, h = kernels.selective_scan_ref(
        x=tensor(2, 3).view(1, 2, 1), dt=tensor(0.5, 1).view(1, 2, 1), A=tensor(-1).view(1, 1), D=tensor(10),
        B=tensor(4, 5).view(1, 2, 1, 1), C=tensor(6, 7).view(1, 2, 1, 1), z=tensor(0, 1).view(1, 2, 1),
        h0=tensor(8).view(1, 1, 1))
    h1 = 8 * torch.tensor(-0.5).double().exp() + 0.5 * 2 * 4
    h2 = h1 * torch.tensor(-1.0).double().exp() + 1 * 3 * 5
    silu = 1 / (1 + torch.tensor(-1.0).double().exp())
    torch.testing.assert_close(y.flatten(), torch.stack([0 * h1, (7 * h2 + 10 * 3) * silu]))
    torch.testing.assert_close(h.flatten(), h2[None])


def test_channel_d_reads_group_d_over_group_size():
    """Groups are consecutive channels. Red if groups are interleaved (channel d reading group d % G)."""
    inputs = scan_inputs(d_inner=6, groups=3, dtype=torch.float64)
    private = {**inputs, "B": inputs["B"].repeat_interleave(2, dim=2), "C": inputs["C"].repeat_interleave(2, dim=2)}
    for function in (kernels.selective_scan, kernels.selective_scan_ref):
        torch.testing.assert_close(function(**inputs), function(**private))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_selective_scan_computes_low_precision_inputs_in_float32(dtype):
    """y has x's dtype, h is float32, and the only error is the rounding of y and of the gradients."""
    inputs = scan_inputs(length=64, dtype=dtype)
    found = results(kernels.selective_scan, inputs, dt_softplus=True)
    assert found["y"].dtype == dtype and found["h"].dtype == torch.float32
    wanted = results(kernels.selective_scan_ref, in_double(inputs), dt_softplus=True)
    assert_same(found, wanted, dtype, factor=2)
    torch.testing.assert_close(found["h"].double(), wanted["h"], rtol=2e-4, atol=2e-5)


def test_selective_scan_takes_mixed_dtypes_and_strided_inputs():
    """Mixers pass bfloat16 activations beside float32 A and dt, as slices and expanded views of larger tensors."""
    inputs = scan_inputs(length=20, d_inner=6, groups=2)
    wide = torch.randn(2, 20, 12).bfloat16()
    strided = {**inputs, "x": wide[..., ::2], "z": wide[..., 1::2], "B": inputs["B"][:, :, :1].expand(-1, -1, 2, -1),
               "C": inputs["C"].transpose(1, 3).contiguous().transpose(1, 3)}
    plain = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in strided.items()}
    y, h = kernels.selective_scan(**strided)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close((y, h), kernels.selective_scan(**plain), rtol=0, atol=0)
    wanted = kernels.selective_scan_ref(**in_double(plain))
    torch.testing.assert_close((y.double(), h.double()), wanted, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("product", [-50.0, -1000.0, 0.0])
def test_selective_scan_with_strong_or_no_decay(product):
    """dt A = -50: the past is gone, and nothing is NaN. dt = 0: the state never changes, y still reads it."""
    inputs = scan_inputs(length=40, options=("h0",), dtype=torch.float64)
    inputs["dt"] = torch.full_like(inputs["dt"], -product)
    inputs["A"] = torch.full_like(inputs["A"], -1.0)
    found, wanted = results(kernels.selective_scan, inputs), results(kernels.selective_scan_ref, inputs)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert_same(found, wanted, torch.float64)
    if product == 0:
        torch.testing.assert_close(found["h"], inputs["h0"])


def test_softplus_is_the_identity_above_20():
    """As in the upstream kernels, so that large dt cannot overflow exp."""
    inputs = scan_inputs(length=3, options=())
    inputs["dt"] = torch.full_like(inputs["dt"], 200.0)
    torch.testing.assert_close(kernels.selective_scan(**inputs, dt_softplus=True), kernels.selective_scan(**inputs))


def test_selective_scan_repeats_bit_for_bit():
    """No atomics and no order of sums that depends on timing: same inputs, same bits, in values and gradients."""
    inputs = scan_inputs(batch=8, length=64, d_inner=64, d_state=16, groups=4)
    first, second = (results(kernels.selective_scan, inputs, dt_softplus=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("split", [1, 16, 25])
def test_selective_scan_of_two_halves_is_the_scan_of_the_whole(split):
    """h0 continues a sequence from any split. Red if h0 is ignored, or enters after the first decay."""
    inputs = scan_inputs(length=40)
    parts = [{name: tensor[:, span] if name in ("x", "dt", "B", "C", "z") else tensor for name, tensor in inputs.items()}
             for span in (slice(0, split), slice(split, None))]
    y_first, h_middle = kernels.selective_scan(**parts[0])
    y_second, h_end = kernels.selective_scan(**{**parts[1], "h0": h_middle})
    y, h = kernels.selective_scan(**inputs)
    torch.testing.assert_close(torch.cat([y_first, y_second], dim=1), y)
    torch.testing.assert_close(h_end, h)


def test_selective_scan_leaves_its_inputs_alone():
    """The chunk loop works in place on its own buffers only; h0 in particular is the caller's."""
    inputs = scan_inputs(length=20)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    results(kernels.selective_scan, inputs)
    kernels.selective_scan(**inputs)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


def test_selective_scan_is_accurate_over_4096_steps_in_float32():
    """Slow decay over a long sequence: float32 stays near float64. Red if decays are multiplied up over the sequence."""
    inputs = scan_inputs(batch=1, length=4096, d_inner=4, d_state=4, options=("h0",), dtype=torch.float64)
    inputs["A"], inputs["dt"] = -torch.rand(4, 4, dtype=torch.float64), inputs["dt"] / 50
    wanted = kernels.selective_scan_ref(**inputs)
    found = kernels.selective_scan(**{name: tensor.float() for name, tensor in inputs.items()})
    torch.testing.assert_close([t.double() for t in found], list(wanted), rtol=1e-4, atol=1e-4)


def bytes_kept_for_backward(function, inputs):
    """Bytes of all distinct storages that the autograd graph of y holds, inputs included."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = function(**{name: tensor.requires_grad_() for name, tensor in inputs.items()})
    assert outputs[0].requires_grad
    return sum(storages.values())


def test_selective_scan_keeps_a_sixteenth_of_the_states():
    """All states are B L D N numbers, which is why the loop is hungry. The chunked scan keeps the inputs and one state in
    16, here 2/64 + 1/16 of them. Red if a chunk's buffers, or views of them, are saved. The loop shows the measure works."""
    inputs = scan_inputs(batch=2, length=256, d_inner=32, d_state=64, groups=1, options=("h0",))
    all_states = 4 * 2 * 256 * 32 * 64
    assert bytes_kept_for_backward(kernels.selective_scan_ref, inputs) > 2 * all_states
    assert bytes_kept_for_backward(kernels.selective_scan, inputs) < 0.2 * all_states


@pytest.mark.parametrize("options", [(), OPTIONS])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_selective_step_token_by_token_is_the_scan(options, groups):
    """Decoding equals the parallel forward, and the state changes in place (the same memory, step after step)."""
    inputs = scan_inputs(length=18, groups=groups, options=options)
    y, h_end = kernels.selective_scan(**inputs, dt_softplus=True)
    h = inputs.pop("h0", torch.zeros_like(h_end)).clone()
    address, steps = h.data_ptr(), []
    for t in range(18):
        token = {name: tensor[:, t] if name in ("x", "dt", "B", "C", "z") else tensor for name, tensor in inputs.items()}
        steps.append(kernels.selective_step(h, **token, dt_softplus=True))
    assert h.data_ptr() == address
    torch.testing.assert_close(torch.stack(steps, dim=1), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(h, h_end, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ SSD
@pytest.mark.parametrize("length, chunk", [(1, 64), (5, 64), (16, 16), (17, 16), (40, 16), (20, 1)])
@pytest.mark.parametrize("h0", [False, True])
def test_ssd_equals_the_loop(length, chunk, h0):
    """Values and every gradient, for L below, at, between and beyond chunks. Red if padding touches the final state."""
    inputs = ssd_inputs(length=length, h0=h0, dtype=torch.float64)
    wanted = results(kernels.ssd_ref, inputs)
    assert wanted["y"].shape == (2, length, 2, 3) and wanted["h"].shape == (2, 2, 3, 5)
    assert_same(results(kernels.ssd, inputs, chunk=chunk), wanted, torch.float64)
    inputs = {name: tensor.float() for name, tensor in inputs.items()}
    assert_same(results(kernels.ssd, inputs, chunk=chunk, backend="torch"), wanted, torch.float32)


def test_ssd_gradcheck():
    """Against finite differences, across chunks and from h0 to the returned state."""
    inputs = [tensor.requires_grad_() for tensor in ssd_inputs(1, 5, 2, 2, 3, dtype=torch.float64).values()]
    assert gradcheck(lambda *tensors: kernels.ssd(*tensors, chunk=2), inputs)
    assert gradcheck(kernels.ssd_ref, inputs)


def test_mixing_matrix_gradcheck():
    """MOHAWK's first stage trains through the matrix itself."""
    inputs = ssd_inputs(1, 5, 2, 2, 3, dtype=torch.float64)
    assert gradcheck(kernels.mixing_matrix, [inputs[name].requires_grad_() for name in ("log_decay", "B", "C")])


@pytest.mark.parametrize("length", [1, 7, 80])
def test_mixing_matrix_times_x_is_ssd(length):
    """Three forms of one map: matrix, chunks and loop. The matrix is causal: exactly 0 above the diagonal."""
    inputs = ssd_inputs(length=length, h0=False)
    T = kernels.mixing_matrix(inputs["log_decay"], inputs["B"], inputs["C"])
    assert T.shape == (2, 2, length, length) and not T.triu(1).any()
    y = torch.einsum("bhts,bshp->bthp", T, inputs["x"])
    torch.testing.assert_close(y, kernels.ssd(**inputs)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y, kernels.ssd_ref(**inputs)[0], rtol=1e-4, atol=1e-4)


def strong_then_weak(length):
    """log_decay (1, L, 1): -50 in the first half, then -0.001, the digits that a cumulative float32 sum has lost by then."""
    log_decay = torch.full((1, length, 1), -50.0, dtype=torch.float64)
    log_decay[:, length // 2:] = -0.001
    return log_decay


@pytest.mark.parametrize("length, chunk", [(64, 64), (512, 128)])
def test_segment_sums_do_not_cancel_after_strong_decay(length, chunk):
    """Red with differences of float32 cumulative sums: at -1600 and beyond their last digit is worth 1e-4."""
    inputs = ssd_inputs(batch=1, length=length, n_heads=1, dtype=torch.float64)
    inputs["log_decay"] = strong_then_weak(length)
    single = {name: tensor.float() for name, tensor in inputs.items()}
    y, _ = kernels.ssd(**single, chunk=chunk)
    wanted, _ = kernels.ssd_ref(**inputs)
    torch.testing.assert_close(y.double(), wanted, rtol=2e-5, atol=2e-6 * wanted.abs().max().item())
    ones = torch.ones(1, length, 1, 1)
    T = kernels.mixing_matrix(single["log_decay"], ones, ones)  # with B = C = 1, T is the decay alone
    steps = torch.arange(length // 2)
    wanted = torch.exp(-0.001 * (steps[:, None] - steps)).tril()
    torch.testing.assert_close(T[0, 0, length // 2:, length // 2:], wanted, rtol=2e-6, atol=0)


@pytest.mark.parametrize("value", [-50.0, -1e30, -torch.inf, 0.0])
def test_ssd_and_mixing_matrix_with_extreme_decay(value):
    """Nothing is NaN in values or gradients, even where exp would overflow above the diagonal (-50 x 40 steps)."""
    inputs = ssd_inputs(length=40, dtype=torch.float64)
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], value)
    found = results(kernels.ssd, inputs)
    assert all(tensor.isfinite().all() for tensor in found.values())
    y, h = kernels.ssd_ref(**inputs)
    assert_same({"y": found["y"], "h": found["h"]}, {"y": y, "h": h}, torch.float64)
    log_decay = inputs["log_decay"].requires_grad_()
    T = kernels.mixing_matrix(log_decay, inputs["B"], inputs["C"])
    assert T.isfinite().all() and torch.autograd.grad(T.sum(), log_decay)[0].isfinite().all()


def test_ssd_is_accurate_over_4096_steps_in_float32():
    inputs = ssd_inputs(batch=1, length=4096, n_heads=1, dtype=torch.float64)
    inputs["log_decay"] = inputs["log_decay"] / 100
    y, h = kernels.ssd(**{name: tensor.float() for name, tensor in inputs.items()})
    wanted_y, wanted_h = kernels.ssd_ref(**inputs)
    torch.testing.assert_close(y.double(), wanted_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(h.double(), wanted_h, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ssd_with_products_in_half_precision_stays_within_its_rounding(dtype):
    """What a GPU does: the matrix products in x's dtype, decays, sums and states in float32. Here on the CPU."""
    inputs = ssd_inputs(length=100, head_dim=16, d_state=16, dtype=dtype)
    def half(x, log_decay, B, C, h0):
        return kernels._ssd_chunks(x.float(), log_decay.float(), B.float(), C.float(), h0.float(), 32, product_dtype=dtype)
    found, wanted = results(half, inputs), results(kernels.ssd_ref, in_double(inputs))
    assert found["h"].dtype == torch.float32
    assert_same(found, wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ssd_computes_low_precision_inputs_in_float32(dtype):
    """y in x's dtype, h float32, error no more than the rounding of results."""
    inputs = ssd_inputs(length=40, dtype=dtype)
    found = results(kernels.ssd, inputs, chunk=16)
    assert found["y"].dtype == dtype and found["h"].dtype == torch.float32
    assert_same(found, results(kernels.ssd_ref, in_double(inputs)), dtype, factor=2)


def test_ssd_of_two_halves_is_ssd_of_the_whole_and_repeats_bit_for_bit():
    inputs = ssd_inputs(length=40)
    first, second = ({name: tensor[:, span] for name, tensor in inputs.items() if name != "h0"}
                     for span in (slice(0, 13), slice(13, None)))
    y, h = kernels.ssd(**inputs, chunk=16)
    y_first, h_middle = kernels.ssd(**first, h0=inputs["h0"], chunk=16)
    y_second, h_end = kernels.ssd(**second, h0=h_middle, chunk=16)
    torch.testing.assert_close(torch.cat([y_first, y_second], dim=1), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(h_end, h, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(kernels.ssd(**inputs, chunk=16), (y, h)))


def test_ssd_step_token_by_token_is_ssd():
    """Decoding equals the parallel forward, in place on h."""
    inputs = ssd_inputs(length=18)
    y, h_end = kernels.ssd(**inputs, chunk=8)
    h = inputs.pop("h0").clone()
    address = h.data_ptr()
    steps = [kernels.ssd_step(h, **{name: tensor[:, t] for name, tensor in inputs.items()}) for t in range(18)]
    assert h.data_ptr() == address
    torch.testing.assert_close(torch.stack(steps, dim=1), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(h, h_end, rtol=1e-4, atol=1e-5)


def test_autocast_changes_nothing():
    """Under mixed precision the scans stay float32. Red if a matmul of theirs runs in bfloat16."""
    scan, heads = scan_inputs(length=20), ssd_inputs(length=20)
    scan_token = {name: tensor[:, 0] if tensor.dim() > 2 and name != "h0" else tensor for name, tensor in scan.items()}
    heads_token = {name: tensor[:, 0] for name, tensor in heads.items() if name != "h0"}

    def everything():
        return [*results(kernels.selective_scan, scan).values(), *kernels.ssd(**heads),
                kernels.mixing_matrix(heads["log_decay"], heads["B"], heads["C"]),
                kernels.selective_step(scan_token["h0"].clone(), **{k: v for k, v in scan_token.items() if k != "h0"}),
                kernels.ssd_step(heads["h0"].clone(), **heads_token)]

    wanted = everything()
    with torch.autocast("cpu", torch.bfloat16):
        found = everything()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


# ------------------------------------------------------------------------------------------------ attention to a cache
def attention_inputs(lengths, heads=4, kv_heads=2, capacity=9, head_dim=8, dtype=torch.float32):
    """Random caches; what lies behind a row's end is large, so that a glance at it shows."""
    generator = torch.Generator().manual_seed(0)
    q, keys, values = (torch.randn(shape, generator=generator) for shape in (
        (len(lengths), heads, head_dim), *2 * [(len(lengths), kv_heads, capacity, head_dim)]))
    for row, length in enumerate(lengths):
        keys[row, :, length:], values[row, :, length:] = 50, 1e4
    return dict(q=q.to(dtype), keys=keys.to(dtype), values=values.to(dtype), lengths=torch.tensor(lengths))


def attention_loop(q, keys, values, lengths):
    """One row, head and column at a time, in float64."""
    y, group = torch.zeros(q.shape, dtype=torch.float64), q.shape[1] // keys.shape[1]
    for row, length in enumerate(lengths.tolist()):
        for head in range(q.shape[1]):
            k, v = keys[row, head // group].double(), values[row, head // group].double()
            weights = [math.exp(q[row, head].double() @ k[t] / q.shape[2] ** 0.5) for t in range(length)]
            for t in range(length):
                y[row, head] += weights[t] / sum(weights) * v[t]
    return y


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
def test_decode_attention_equals_the_definition(heads, kv_heads):
    """An empty row gives 0; a full one reads all columns."""
    inputs = attention_inputs([0, 1, 9, 4], heads, kv_heads)
    torch.testing.assert_close(kernels.decode_attention(**inputs).double(), attention_loop(**inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, shape, message", [
    ("q", (2, 3, 8), "3 heads"), ("q", (2, 8), "q has shape"), ("keys", (2, 2, 9, 7), "keys has shape"),
    ("values", (2, 2, 8, 8), "values has shape"), ("lengths", (3,), "lengths has shape")])
def test_decode_attention_names_the_tensor_of_wrong_shape(name, shape, message):
    with pytest.raises(ValueError, match=message):
        kernels.decode_attention(**attention_inputs([1, 2]) | {name: torch.ones(shape)})


# ------------------------------------------------------------------------------------------------ causal convolution
def conv_inputs(batch=2, length=9, d_inner=5, width=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return dict(x=randn(batch, length, d_inner), weight=randn(d_inner, 1, width), bias=randn(d_inner),
                state=randn(batch, d_inner, width - 1))


def conv_loop(x, weight, bias, state):
    """The definition, one output at a time: y_t = bias + sum_k weight[k] input_{t-K+1+k}."""
    inputs, width = torch.cat([state, x.transpose(1, 2)], dim=2), weight.shape[2]  # (B, D, K-1+L)
    ys = [bias + (inputs[:, :, t:t + width] * weight[:, 0]).sum(-1) for t in range(x.shape[1])]
    return torch.stack(ys, dim=1), inputs[:, :, x.shape[1]:]


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_causal_conv_equals_the_definition(length, width):
    """Values, new state and all gradients, also for sequences shorter than the kernel. Red if the kernel is flipped."""
    inputs = conv_inputs(length=length, width=width)
    assert_same(results(kernels.causal_conv, inputs), results(conv_loop, inputs), torch.float64)


def test_causal_conv_gradcheck_and_torch():
    """Against finite differences, and against F.conv1d without a state: None means zeros before the sequence."""
    inputs = conv_inputs()
    y, _ = kernels.causal_conv(inputs["x"], inputs["weight"], inputs["bias"])
    wanted = F.conv1d(F.pad(inputs["x"].transpose(1, 2), (3, 0)), inputs["weight"], inputs["bias"], groups=5)
    torch.testing.assert_close(y, wanted.transpose(1, 2))
    assert gradcheck(kernels.causal_conv, [tensor.requires_grad_() for tensor in conv_inputs(length=5, d_inner=2).values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_conv_in_parts_and_token_by_token_is_the_whole(dtype):
    """The state continues a sequence from any split and in decoding, in place; in bfloat16 too, where y may round."""
    inputs = conv_inputs(dtype=dtype)
    x, shared = inputs["x"], dict(weight=inputs["weight"], bias=inputs["bias"])
    y, end = kernels.causal_conv(x, state=inputs["state"], **shared)
    assert y.dtype == end.dtype == dtype
    for split in range(1, 9):
        y_first, middle = kernels.causal_conv(x[:, :split], state=inputs["state"], **shared)
        y_second, end_again = kernels.causal_conv(x[:, split:], state=middle, **shared)
        assert_same({"y": torch.cat([y_first, y_second], dim=1), "h": end_again}, {"y": y, "h": end}, dtype)
    state = inputs["state"].clone()
    address = state.data_ptr()
    steps = torch.stack([kernels.causal_conv_step(state, x[:, t], **shared) for t in range(9)], dim=1)
    assert state.data_ptr() == address and steps.dtype == dtype
    assert_same({"y": steps, "h": state}, {"y": y, "h": end}, dtype)


def test_steps_need_no_special_mode():
    """Decoding with trainable weights outside torch.no_grad works. It once raised: autograd forbids writing into the views
    that unbind returns."""
    scan, heads, conv = scan_inputs(length=1), ssd_inputs(length=1), conv_inputs()
    state, h, h_heads = conv["state"].clone(), scan["h0"].clone(), heads["h0"].clone()
    x, x_scan, x_heads = (inputs["x"][:, 0].requires_grad_() for inputs in (conv, scan, heads))
    for _ in range(2):
        kernels.causal_conv_step(state, x, conv["weight"], conv["bias"])
        kernels.selective_step(h, x_scan, scan["dt"][:, 0], scan["A"], scan["B"][:, 0], scan["C"][:, 0])
        kernels.ssd_step(h_heads, x_heads, heads["log_decay"][:, 0], heads["B"][:, 0], heads["C"][:, 0])
    assert all(tensor.isfinite().all() for tensor in (state, h, h_heads))


# ------------------------------------------------------------------------------------------------ errors and the script
@pytest.mark.parametrize("name, shape, message", [
    ("x", (2, 20), r"x has shape \(2, 20\), expected \(B, L, D\)"),
    ("x", (2, 0, 6), "dt has shape"),
    ("dt", (2, 20, 1), r"dt has shape \(2, 20, 1\), expected \(B, L, D\) = \(2, 20, 6\)"),
    ("A", (5, 6), r"A has shape \(5, 6\)"),
    ("B", (2, 20, 5), r"B has shape \(2, 20, 5\), expected \(B, L, G, N\) = \(2, 20, any, 5\)"),
    ("C", (2, 20, 3, 5), r"C has shape \(2, 20, 3, 5\), expected \(B, L, G, N\) = \(2, 20, 2, 5\)"),
    ("D", (1,), r"D has shape \(1,\), expected \(D,\) = \(6,\)"),
    ("z", (2, 1, 6), r"z has shape \(2, 1, 6\)"),
    ("dt_bias", (5,), r"dt_bias has shape \(5,\)"),
    ("h0", (2, 5, 6), r"h0 has shape \(2, 5, 6\), expected \(B, D, N\) = \(2, 6, 5\)"),
])
@pytest.mark.parametrize("function", [kernels.selective_scan, kernels.selective_scan_ref])
def test_selective_scan_names_the_tensor_of_wrong_shape(function, name, shape, message):
    """One line with the tensor, its shape and the expected one, instead of a broadcast that goes unnoticed."""
    with pytest.raises(ValueError, match=message) as error:
        function(**{**scan_inputs(), name: torch.zeros(shape)})
    assert "\n" not in str(error.value)


def test_other_wrong_shapes_and_backends_are_refused():
    inputs, heads, conv = scan_inputs(), ssd_inputs(), conv_inputs()
    with pytest.raises(ValueError, match="4 groups, expected L >= 1 and groups that divide D"):
        kernels.selective_scan(**{**inputs, "B": torch.zeros(2, 20, 4, 5), "C": torch.zeros(2, 20, 4, 5)})
    for function, tensors in ((kernels.selective_scan, inputs), (kernels.ssd, heads)):
        with pytest.raises(ValueError, match="backend is 'cuda', expected one of 'auto', 'ref', 'torch', 'triton'"):
            function(**tensors, backend="cuda")
    with pytest.raises(ValueError, match="backend is 'triton', but ssd is made of PyTorch's matrix products"):
        kernels.ssd(**heads, backend="triton")
    with pytest.raises(ValueError, match=r"log_decay has shape \(2, 20\), expected \(B, L, H\) = \(2, 20, 2\)"):
        kernels.ssd(**{**heads, "log_decay": torch.zeros(2, 20)})
    with pytest.raises(ValueError, match=r"h0 has shape \(2, 2, 5, 3\), expected \(B, H, P, N\) = \(2, 2, 3, 5\)"):
        kernels.ssd_ref(**{**heads, "h0": torch.zeros(2, 2, 5, 3)})
    with pytest.raises(ValueError, match="chunk is 0"):
        kernels.ssd(**heads, chunk=0)
    with pytest.raises(ValueError, match=r"C has shape \(2, 20, 2, 4\)"):
        kernels.mixing_matrix(heads["log_decay"], heads["B"], torch.zeros(2, 20, 2, 4))
    with pytest.raises(ValueError, match=r"weight has shape \(5, 4\), expected \(D, 1, K\) = \(5, 1, any\)"):
        kernels.causal_conv(conv["x"], conv["weight"][:, 0], conv["bias"])
    with pytest.raises(ValueError, match=r"state has shape \(2, 5, 4\), expected \(B, D, K-1\) = \(2, 5, 3\)"):
        kernels.causal_conv(conv["x"], conv["weight"], conv["bias"], torch.zeros(2, 5, 4))


def test_the_script_checks_every_kernel_and_prints_a_table():
    """`python kernels.py` is how a reader trusts the kernels on their own machine; importing the file prints nothing."""
    options = ["--batch", "1", "--length", "20", "--channels", "32", "--repeats", "1"]
    run = subprocess.run([sys.executable, str(ROOT / "kernels.py"), *options], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for name in ("causal_conv", "selective_scan", "ssd", "mixing_matrix", "causal_conv_step", "selective_step", "ssd_step"):
        assert any(line.startswith(name) for line in run.stdout.splitlines()), name
    run = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("option", ["--batch", "--length", "--channels", "--states", "--repeats"])
def test_the_script_refuses_a_size_of_zero_in_one_line(option):
    run = subprocess.run([sys.executable, str(ROOT / "kernels.py"), option, "0"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and f"argument {option}: 0 is out of range" in run.stderr and "Traceback" not in run.stderr
