"""kernels.py: every rung equals a literal loop, in values and in every gradient.

Triton runs on a GPU where there is one, elsewhere interpreted on the CPU (conftest.py sets
TRITON_INTERPRET), which checks its logic, not races or speed.
"""
import itertools
import sys
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck

import kernels
from conftest import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = ("D", "z", "dt_bias", "h0")
TIMED = ("x", "dt", "z", "B", "C", "log_decay")  # what has a time axis
TRITON = pytest.param("triton", marks=pytest.mark.skipif(
    kernels.decode_kernels.INTERPRETED is None, reason="Triton is not installed"))
BACKENDS = pytest.mark.parametrize("backend", ["torch", TRITON])


# ---- helpers
def drawer(dtype):
    """draw(*shape): normal numbers, the same in every dtype and on every device."""
    seed, kind = torch.Generator().manual_seed(0), torch.float64
    return lambda *shape: torch.randn(shape, generator=seed, dtype=kind).to(DEVICE, dtype)


def scan_inputs(batch=1, length=20, d_inner=6, d_state=5, groups=2, options=OPTIONS,
                dtype=torch.float32):
    """Arguments of selective_scan by name; dt is positive: a step size with or without softplus."""
    draw, row, in_group = drawer(dtype), (batch, length, d_inner), (batch, length, groups, d_state)
    inputs = dict(x=draw(*row), dt=draw(*row).abs() / 2, A=-draw(d_inner, d_state).abs(),
                  B=draw(*in_group), C=draw(*in_group), D=draw(d_inner), z=draw(*row),
                  dt_bias=draw(d_inner).abs() / 2, h0=draw(batch, d_inner, d_state))
    return {name: u for name, u in inputs.items() if name not in OPTIONS or name in options}


def ssd_inputs(batch=2, length=20, n_heads=2, head_dim=3, d_state=5, h0=True, dtype=torch.float32):
    draw, heads = drawer(dtype), (batch, length, n_heads)
    inputs = dict(x=draw(*heads, head_dim), log_decay=-draw(*heads).abs(), B=draw(*heads, d_state),
                  C=draw(*heads, d_state))
    return inputs | ({"h0": draw(batch, n_heads, head_dim, d_state)} if h0 else {})


def conv_inputs(batch=2, length=9, d_inner=5, width=4, dtype=torch.float64):
    draw = drawer(dtype)
    return dict(x=draw(batch, length, d_inner), weight=draw(d_inner, 1, width), bias=draw(d_inner),
                past=draw(batch, width - 1, d_inner))


def cast(inputs, dtype, names=None):
    return {name: u.to(dtype) if name in (names or inputs) else u for name, u in inputs.items()}


def double(inputs):
    return cast(inputs, torch.float64)


def part(inputs, span):
    """The inputs of some steps, or of one, without h0."""
    return {name: u[:, span] if name in TIMED else u for name, u in inputs.items() if name != "h0"}


def results(function, inputs, use=("y", "h"), **settings):
    """y, h, and the gradient of a random projection of them in every input that reaches it."""
    leaves = {name: u.detach().clone().requires_grad_() for name, u in inputs.items()}
    outputs = dict(zip(("y", "h"), function(**leaves, **settings)))
    draw = drawer(torch.float64)
    loss = sum((outputs[name].double() * draw(*outputs[name].shape)).sum() for name in use)
    gradients = torch.autograd.grad(loss, leaves.values(), allow_unused=True)
    return outputs | {f"grad of {name}": u for name, u in zip(leaves, gradients)
                      if u is not None and u.any()}


def assert_same(found, wanted, dtype=None):
    found, wanted = (u if isinstance(u, dict) else dict(zip("yh", u)) for u in (found, wanted))
    assert found.keys() == wanted.keys()
    for name, u in found.items():
        assert u.shape == wanted[name].shape and u.isfinite().all(), name
        if u.numel():  # a window of W = 1 has no past
            assert_close(u, wanted[name], dtype)


def assert_scan_is_the_loop(inputs, backend, dt_softplus=True, **settings):
    """Against the loop in float64; PyTorch computes in float64 too, where no term can hide."""
    settings |= {"dt_softplus": dt_softplus}
    inputs = double(inputs) if backend == "torch" else inputs
    found = results(kernels.selective_scan, inputs, backend=backend, **settings)
    assert_same(found, results(kernels.selective_scan_ref, double(inputs), **settings))


# ---- the loops
def test_scan_loop_equals_hand_computed_numbers():
    """Two steps of one channel and state by hand: what all is compared with is right."""
    tensor = lambda *values: torch.tensor(values, dtype=torch.float64)
    in_time = lambda *values: tensor(*values).view(1, 2, 1)
    y, h = kernels.selective_scan_ref(
        x=in_time(2, 3), dt=in_time(0.5, 1), A=tensor(-1).view(1, 1), B=in_time(4, 5)[..., None],
        C=in_time(6, 7)[..., None], D=tensor(10), z=in_time(0, 1), h0=tensor(8).view(1, 1, 1))
    h1 = 8 * tensor(-0.5).exp() + 0.5 * 2 * 4
    h2 = h1 * tensor(-1).exp() + 1 * 3 * 5
    assert_close(y.flatten(), torch.cat([0 * h1, (7 * h2 + 10 * 3) / (1 + tensor(-1).exp())]))
    assert_close(h.flatten(), h2)


def test_ssd_loop_is_the_selective_scan_with_one_decay_for_a_head():
    """Two formulas for one thing: dt = 1, A = log_decay at all times, and a group for each head."""
    inputs = ssd_inputs(h0=False, dtype=torch.float64)
    inputs["log_decay"][:] = inputs["log_decay"][:1, :1].clone()
    y, h = kernels.ssd_ref(**inputs)
    x, A = inputs["x"].flatten(2), inputs["log_decay"][0, 0].repeat_interleave(3)  # (B, L, D), (D,)
    wanted = kernels.selective_scan_ref(x, torch.ones_like(x), A[:, None].expand(6, 5), inputs["B"],
                                        inputs["C"])
    assert_same((y.flatten(2), h.flatten(1, 2)), wanted)


@pytest.mark.parametrize("backend", ["ref", "torch"])
def test_gradcheck(backend, monkeypatch):
    """All gradients against finite differences, over two and a half chunks; no code of ours."""
    monkeypatch.setattr(kernels, "CHUNK", 2)
    scan, heads = double(scan_inputs(1, 5, 4, 3)), double(ssd_inputs(1, 5, 2, 2, 3))
    conv, matrix = conv_inputs(2, 5, 2), part(heads, slice(None))
    del matrix["x"]
    for function, inputs in (
            (partial(kernels.selective_scan, dt_softplus=True, backend=backend), scan),
            (partial(kernels.ssd, chunk=2, backend=backend), heads),
            (kernels.mixing_matrix, matrix), (kernels.causal_conv, conv)):
        assert gradcheck(lambda *tensors: function(**dict(zip(inputs, tensors))),
                         [u.requires_grad_() for u in inputs.values()])


# ---- selective scan
@BACKENDS
@pytest.mark.parametrize("dt_softplus", [False, True])
@pytest.mark.parametrize("options", [
    some for n in range(5) for some in itertools.combinations(OPTIONS, n)],
    ids=lambda some: "+".join(some) or "none")
def test_scan_with_every_optional_input_on_and_off(options, dt_softplus, backend):
    """Values and gradients, also through h. Red if one term of a backward pass is missing."""
    length = 5 if backend == "triton" else 18  # the interpreter is slow
    assert_scan_is_the_loop(scan_inputs(1, length, 4, 3, options=options), backend, dt_softplus)


@BACKENDS
@pytest.mark.parametrize("length, d_inner, d_state, groups", [
    (1, 6, 5, 2), (7, 3, 1, 3), (8, 12, 16, 1), (17, 4, 3, 2), (33, 2, 7, 1), (5, 34, 16, 2),
    (4, 3, 256, 1)])
def test_scan_of_odd_shapes(length, d_inner, d_state, groups, backend):
    """L = 1, around chunks; channels that fill a block or not; N up to 256; all kinds of G."""
    use = "yh" if length > 8 else "y" if length > 4 else "h"  # gradients of either output alone too
    assert_scan_is_the_loop(scan_inputs(1, length, d_inner, d_state, groups), backend, use=use)


@pytest.mark.parametrize("asked, length, calls", [(2, 20, 1), (3, 21, 2), (5, 9, 2)])
def test_scan_in_segments(asked, length, calls, monkeypatch):
    """Three segments joined are the whole: scanned twice. As many as divide L, but not two."""
    pytest.importorskip("triton")
    called, apply = [], kernels._TritonScan.apply
    monkeypatch.setattr(kernels._TritonScan, "apply",
                        lambda *tensors: called.append(tensors) or apply(*tensors))
    monkeypatch.setattr(kernels, "pieces", lambda *sizes: asked)
    assert_scan_is_the_loop(scan_inputs(2, length, 4, 3, 1), "triton")
    assert len(called) == calls


def test_triton_keeps_states_for_a_backward_pass_only(monkeypatch):
    """`kept` is a kernel's eighth argument; without it, y and h are the same to the bit."""
    pytest.importorskip("triton")
    kernel, kept, inputs = kernels._scan_forward_kernel, [], scan_inputs()
    monkeypatch.setattr(kernels, "_scan_forward_kernel", {(1, 2, 1): lambda *tensors, **sizes: (
        kept.append(tensors[7]), kernel[1, 2, 1](*tensors, **sizes))})
    found = kernels.selective_scan(**inputs, backend="triton")
    inputs["x"].requires_grad_()
    recorded = kernels.selective_scan(**inputs, backend="triton")
    assert kept[0] is None and kept[1].shape == (1, 3, 5, 6)
    assert all(torch.equal(a, b) for a, b in zip(found, recorded))


@BACKENDS
@pytest.mark.parametrize("product", [-50.0, -1000.0, 0.0])
def test_scan_with_strong_or_no_decay(product, backend):
    """dt A = -50 forgets everything and must not overflow; 0 forgets nothing."""
    inputs = scan_inputs(1, 18, 4, options=("h0",))
    inputs["dt"][:], inputs["A"][:] = 1, product
    assert_scan_is_the_loop(inputs, backend, dt_softplus=False)


@BACKENDS
def test_scan_takes_strided_inputs_leaves_them_alone_and_repeats_bit_for_bit(backend):
    """A slice of a wider projection is not contiguous. Atomics would not add in a fixed order."""
    inputs = scan_inputs(2, 9, 18, groups=1)
    wide = {name: torch.stack([u, u + 1], dim=-1)[..., 0] for name, u in inputs.items()}
    assert not wide["x"].is_contiguous()
    settings = dict(dt_softplus=True, backend=backend)
    first, second = (results(kernels.selective_scan, inputs, **settings) for _ in range(2))
    assert_same(kernels.selective_scan(**wide, **settings), (first["y"], first["h"]))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(u, inputs[name]) for name, u in wide.items())


def test_scan_keeps_a_sixteenth_of_the_states():
    """All states are B L D N numbers. The chunks keep 1/16 of them, and inputs (1/64 each). The
    loop shows that the measure works. Red if a chunk's states, or views of them, are saved."""
    inputs = scan_inputs(2, 256, 32, 64, 1, ("h0",))
    inputs = {name: u.requires_grad_() for name, u in inputs.items()}
    states = 4 * 2 * 256 * 32 * 64
    assert kernels.bytes_kept(kernels.selective_scan_ref, inputs) > 2 * states
    assert kernels.bytes_kept(partial(kernels.selective_scan, backend="torch"), inputs) < states / 5


# ---- SSD
@pytest.mark.parametrize("length, chunk", [(1, 64), (5, 64), (16, 16), (17, 16), (40, 16), (20, 1)])
@pytest.mark.parametrize("h0", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ssd_is_the_loop(length, chunk, h0, dtype):
    """Values and gradients for L below, at, between and beyond chunks. Red if padding counts."""
    inputs = ssd_inputs(length=length, h0=h0, dtype=dtype)
    wanted = results(kernels.ssd_ref, double(inputs))
    assert wanted["y"].shape == (2, length, 2, 3) and wanted["h"].shape == (2, 2, 3, 5)
    assert_same(results(kernels.ssd, inputs, chunk=chunk), wanted, dtype)


@pytest.mark.parametrize("length", [1, 7, 80])
def test_mixing_matrix_times_x_is_ssd(length):
    """One map, as a matrix and as a loop. The matrix is causal: exactly 0 above the diagonal."""
    inputs = ssd_inputs(length=length, h0=False)
    T = kernels.mixing_matrix(inputs["log_decay"], inputs["B"], inputs["C"])
    assert T.shape == (2, 2, length, length) and not T.triu(1).any()
    y = torch.einsum("bhts,bshp->bthp", T, inputs["x"])
    assert_close(y, kernels.ssd_ref(**double(inputs))[0])


@pytest.mark.parametrize("length, chunk", [(64, 64), (512, 128)])
def test_decays_do_not_cancel_after_strong_ones(length, chunk):
    """-50 a step, then -0.001: red with float32 sums, whose last digit at -1600 is worth 1e-4."""
    inputs = ssd_inputs(1, length, 1)
    inputs["log_decay"][:], inputs["log_decay"][:, length // 2:] = -50, -0.001
    assert_close(kernels.ssd(**inputs, chunk=chunk)[0], kernels.ssd_ref(**double(inputs))[0])
    decay = kernels.decays(inputs["log_decay"][0, :, 0])[length // 2:, length // 2:]
    steps = torch.arange(length // 2, device=DEVICE)
    assert_close(decay, torch.exp(-0.001 * (steps[:, None] - steps).double()).tril())


@pytest.mark.parametrize("value", [-50.0, -1e30, -torch.inf, 0.0])
def test_ssd_and_its_matrix_with_extreme_decay(value):
    """No value or gradient is NaN, even where exp overflows above the diagonal (50 x 40 steps)."""
    inputs = ssd_inputs(length=40)
    inputs["log_decay"][:] = value
    found = results(kernels.ssd, inputs)
    assert_same((found["y"], found["h"]), kernels.ssd_ref(**double(inputs)))
    log_decay = inputs["log_decay"].requires_grad_()
    T = kernels.mixing_matrix(log_decay, inputs["B"], inputs["C"])
    gradient = torch.autograd.grad(T.sum(), log_decay)[0]
    assert all(u.isfinite().all() for u in (T, gradient, *found.values()))


# ---- both
SCAN = partial(kernels.selective_scan, dt_softplus=True)
BOTH = pytest.mark.parametrize("function, make", [
    (SCAN, scan_inputs), pytest.param(partial(SCAN, backend="triton"), scan_inputs,
                                      marks=TRITON.marks),
    (partial(kernels.ssd, chunk=16), ssd_inputs)], ids=["scan", "triton", "ssd"])


@BOTH
@pytest.mark.parametrize("split", [1, 13])
def test_two_halves_are_the_whole(function, make, split):
    """Red if h0 is ignored, or enters after the first decay."""
    inputs = make(2)
    first, h = function(**part(inputs, slice(split)), h0=inputs["h0"])
    second, h = function(**part(inputs, slice(split, None)), h0=h)
    assert_same((torch.cat([first, second], dim=1), h), function(**inputs))


@BOTH
def test_padding_is_left_out_exactly(function, make):
    """dt = -inf, and x = 0 with log_decay = 0: no bit of h or a gradient depends on what stands
    behind a row's end, step 11 here."""
    inputs = make(1, 17)
    no_step = {"dt": -torch.inf} if "dt" in inputs else {"x": 0, "log_decay": 0}

    def padded(value):
        for name in inputs.keys() & {*TIMED}:
            inputs[name][:, 11:] = no_step.get(name, value)
        found = results(function, inputs, ("h",))
        assert "dt" not in inputs or not found["grad of dt"][:, 11:].any()
        return {name: u[:, :11] if name.removeprefix("grad of ") in (*TIMED, "y") else u
                for name, u in found.items()}

    first, second = padded(3.0), padded(-50.0)
    assert all(torch.equal(first[name], second[name]) for name in first)
    real = part(inputs, slice(11)) | {"h0": inputs["h0"]}
    assert_same(first, results(function, real, ("h",)))


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(function, make, dtype):
    """Activations in half precision, the rest in float32, as a model under autocast has them."""
    inputs = cast(make(1, 40), dtype, TIMED)
    found = results(function, inputs)
    assert found["y"].dtype == found["grad of x"].dtype == found["grad of B"].dtype == dtype
    assert found["h"].dtype == torch.float32
    wanted = results(partial(function, backend="ref"), double(inputs))
    assert_same(found, wanted, dtype)
    assert_close(found["h"], wanted["h"])  # only what is returned in half precision is rounded


def test_4096_steps_are_accurate():
    """Red if decays are multiplied up over the sequence."""
    scan, heads = scan_inputs(1, 4096, 4, 4, options=("h0",)), ssd_inputs(1, 4096, 1)
    scan |= {"A": scan["A"] / 2, "dt": scan["dt"] / 50}
    heads["log_decay"] = heads["log_decay"] / 100
    for function, ref, inputs in ((kernels.selective_scan, kernels.selective_scan_ref, scan),
                                  (kernels.ssd, kernels.ssd_ref, heads)):
        assert_same(function(**inputs), ref(**double(inputs)))


# ---- convolution
def conv_loop(x, weight, bias, past):
    """The definition, one output at a time."""
    inputs, width = torch.cat([past, x], dim=1), weight.shape[2]
    ys = [bias + (inputs[:, t:t + width] * weight[:, 0].t()).sum(1) for t in range(x.shape[1])]
    return torch.stack(ys, dim=1), inputs[:, x.shape[1]:]


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_causal_conv_is_its_definition(length, width):
    """Values, past and gradients, also where L is less than the window. Red if taps are flipped."""
    inputs = conv_inputs(length=length, width=width)
    assert_same(results(kernels.causal_conv, inputs), results(conv_loop, inputs))
    past = torch.zeros_like(inputs.pop("past"))  # without a past: behind zeros
    assert_same(kernels.causal_conv(**inputs), conv_loop(**inputs, past=past))


def test_causal_conv_takes_each_row_at_its_own_end():
    """Rows of 0, 1, 3 and all tokens: the past of each is that of the row alone."""
    x, weight, bias, past = conv_inputs(batch=4).values()
    counts = torch.tensor([0, 1, 3, 9], device=DEVICE)
    _, ends = kernels.causal_conv(x, weight, bias, past, counts)
    assert torch.equal(ends[0], past[0])
    for row, count in enumerate(counts.tolist()[1:], 1):
        alone = kernels.causal_conv(x[row:row + 1, :count], weight, bias, past[row:row + 1])[1]
        assert torch.equal(ends[row], alone[0])


# ---- precision, errors
def test_autocast_changes_nothing():
    """Red if a matrix product of ours runs in bfloat16."""
    scan, heads, conv = scan_inputs(), ssd_inputs(), conv_inputs(dtype=torch.float32)

    def everything():
        return [*results(SCAN, scan).values(), *kernels.ssd(**heads),
                *results(kernels.causal_conv, conv).values(),
                kernels.mixing_matrix(*(heads[name] for name in ("log_decay", "B", "C"))),
                kernels.selective_step(scan["h0"].clone(), **part(scan, 0)),
                kernels.ssd_step(heads["h0"].clone(), **part(heads, 0))]

    wanted = everything()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(everything(), wanted))


@pytest.mark.parametrize("function, inputs, name, wrong, message", [
    (kernels.selective_scan, scan_inputs, *row) for row in (
        ("x", (2, 20), r"x has shape \(2, 20\), expected \(2, 20, D\)"),
        ("x", (1, 0, 6), r"x has shape \(1, 0, 6\), expected \(1, 1 or more, 6\)"),
        ("dt", (1, 20, 1), r"dt has shape \(1, 20, 1\), expected \(1, 20, 6\) = \(B, L, D\)"),
        ("A", (5, 6), "A has shape"), ("B", (1, 20, 5), "B has"), ("C", (1, 20, 3, 5), "C has"),
        ("D", (1,), "D has shape"), ("z", (1, 1, 6), "z has shape"), ("dt_bias", (5,), "dt_bias"),
        ("h0", (1, 5, 6), "h0 has shape"), ("backend", "cuda", "backend is 'cuda', expected"))] + [
    (kernels.ssd, ssd_inputs, *row) for row in (
        ("log_decay", (2, 20), "log_decay has shape"), ("h0", (2, 2, 5, 3), "h0 has shape"),
        ("backend", "triton", "backend is 'triton'"))] + [
    (kernels.selective_scan, partial(scan_inputs, groups=4), "backend", "auto",
     "4 groups, expected a divisor of 6 channels")])
def test_a_wrong_argument_is_named_in_one_line(function, inputs, name, wrong, message):
    """The tensor, its shape and the expected one, not a broadcast unnoticed."""
    wrong = torch.zeros(wrong, device=DEVICE) if isinstance(wrong, tuple) else wrong
    with pytest.raises(ValueError, match=message) as error:
        function(**inputs() | {name: wrong})
    assert "\n" not in str(error.value)


# ---- the script
def run_script(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--length", "20", "--channels", "32", *options])
    kernels.main()


def test_the_script_checks_every_rung_and_prints_what_it_costs(monkeypatch, capsys):
    run_script(monkeypatch)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:2] for line in lines] == [
        [name, rung] for name, rungs in (("selective_scan", ("1", "3", "4-6")),
                                         ("ssd", ("1", "2", "3"))) for rung in rungs]
    costs = [float(cell) for line in lines for cell in line[-3:] if line[1] != "4-6"]
    assert len(costs) == 15 and DEVICE == "cuda" or lines[2][-3:] == ["needs", "a", "GPU"]


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_the_script_ends_in_one_line_where_a_rung_is_wrong(factor, monkeypatch):
    right = kernels.ssd_chunks
    monkeypatch.setattr(kernels, "ssd_chunks", lambda *args: (factor * right(*args)[0], None))
    with pytest.raises(SystemExit, match="^kernels.py: ssd, rung 3 chunks, is off by"):
        run_script(monkeypatch)
