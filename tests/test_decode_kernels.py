"""decode_kernels.py: token by token is the whole sequence, attention reads what it may, and all
kernels, those of kernels.py too, compile for GPUs."""
import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch

import decode_kernels
import kernels
from conftest import ROOT, assert_close
from test_kernels import (BACKENDS, DEVICE, OPTIONS, TIMED, TRITON, assert_same, cast, conv_inputs,
                          double, drawer, part, scan_inputs, ssd_inputs)


def run_python(*command, **environment):
    """What a process prints that does not interpret Triton."""
    environment = {name: value for name, value in (os.environ | environment).items()
                   if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# ---- steps
SCAN_STEP = partial(kernels.selective_step, dt_softplus=True)
SCAN_REF = partial(kernels.selective_scan_ref, dt_softplus=True)
RECURRENCES = pytest.mark.parametrize("step, make", [
    (SCAN_STEP, scan_inputs), (kernels.ssd_step, ssd_inputs)])


def run_steps(step, inputs, state=None, **backend):
    """y of all steps, and the state; it changes in place: the same memory, step after step."""
    state = (inputs["h0"] if state is None else state).clone()
    address, steps = state.data_ptr(), range(inputs["x"].shape[1])
    y = torch.stack([step(state, **part(inputs, t), **backend) for t in steps], dim=1)
    assert state.data_ptr() == address
    return y, state


@BACKENDS
@pytest.mark.parametrize("step, ref, make, sizes", [
    (SCAN_STEP, SCAN_REF, partial(scan_inputs, options=some), size)
    for some in ((), OPTIONS) for size in ((6, 5, 2), (4, 16, 1), (3, 1, 3), (2, 256, 1))
] + [(kernels.ssd_step, kernels.ssd_ref, ssd_inputs, size)
     for size in ((2, 3, 5), (2, 64, 64), (1, 1, 1))])
def test_token_by_token_is_the_whole_sequence(step, ref, make, sizes, backend):
    inputs = make(2, 3, *sizes)
    wanted = ref(**double(inputs))
    h0 = inputs.get("h0", torch.zeros_like(wanted[1], dtype=torch.float32))
    assert_same(run_steps(step, inputs, h0, backend=backend), wanted)


@BACKENDS
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_conv_step_token_by_token_is_causal_conv(width, dtype, backend):
    """The window moves up by one token a step, exactly; y is off by its own rounding at most."""
    inputs = cast(conv_inputs(2, 6, 5, width, torch.float32), dtype, ("x", "past"))
    y, past = kernels.causal_conv(**inputs)
    found = run_steps(kernels.causal_conv_step, inputs, inputs.pop("past"), backend=backend)
    assert found[0].dtype == dtype and torch.equal(found[1], past)
    assert_close(found[0], y)


@BACKENDS
@RECURRENCES
def test_a_half_precision_state_is_rounded_once_a_step(step, make, backend):
    """One step from a bfloat16 state is the float32 step from the same numbers, rounded at its end,
    by 2^-7 of a number at most (the interpreter cuts digits off)."""
    inputs = make(2, 1)
    half = inputs["h0"].bfloat16()
    y, h = run_steps(step, inputs, half, backend=backend)
    wanted_y, wanted_h = run_steps(step, inputs, half.float(), backend=backend)
    assert h.dtype == torch.bfloat16 and y.dtype == torch.float32
    assert_close(y, wanted_y)
    assert ((h.float() - wanted_h).abs() <= 2 ** -7 * wanted_h.abs() + 1e-6).all()


@BACKENDS
@RECURRENCES
def test_a_step_leaves_padding_out_exactly(step, make, backend):
    """x = 0 and dt = -inf, or log_decay = 0: not one bit of the state changes."""
    inputs = make(2, 1)
    for name, value in (("dt", -torch.inf), ("log_decay", 0), ("x", 0)):
        if name in inputs:
            inputs[name][:] = value
    assert torch.equal(run_steps(step, inputs, backend=backend)[1], inputs["h0"])


@BACKENDS
@pytest.mark.parametrize("dt", [-30.0, -12.0, 19.9, 20.1, 60.0])
def test_softplus_keeps_its_digits_at_both_ends(dt, backend):
    """Red for log(1 + e^u), which at u = -12 is off by 1e-3 of itself."""
    inputs = scan_inputs(1, 1, 2, 2, 1, options=())
    for name, value in (("dt", dt), ("A", -1e-6), ("B", 1)):
        inputs[name][:] = value
    _, wanted = SCAN_REF(**double(inputs))
    h0 = torch.zeros_like(wanted).float()
    assert_close(run_steps(SCAN_STEP, inputs, h0, backend=backend)[1], wanted)


def test_steps_run_where_gradients_are_recorded():
    """Decoding needs no torch.no_grad. Red where a view that autograd guards is written to."""
    conv = conv_inputs(2, 1, dtype=torch.float32)
    for step, inputs in ((SCAN_STEP, scan_inputs(2, 1)),
                         (kernels.ssd_step, ssd_inputs(2, 1)),
                         (kernels.causal_conv_step, conv | {"h0": conv.pop("past")})):
        token = part(inputs, 0) | {"x": inputs["x"][:, 0].requires_grad_()}
        y = [step(inputs["h0"], **token) for _ in range(2)]
        assert y[1].requires_grad and inputs["h0"].isfinite().all()


# ---- attention to a cache
def attention_inputs(lengths, heads=4, kv_heads=2, capacity=9, head_dim=8, dtype=torch.float32):
    """Random caches; what lies behind a row's end is large, so that a glance at it shows."""
    draw, cache = drawer(torch.float32), (len(lengths), kv_heads, capacity, head_dim)
    q, keys, values = draw(len(lengths), heads, head_dim), draw(*cache), draw(*cache)
    for row, length in enumerate(lengths):
        keys[row, :, length:], values[row, :, length:] = 50, 1e4
    return dict(q=q.to(dtype), keys=keys.to(dtype), values=values.to(dtype),
                lengths=torch.tensor(lengths, device=DEVICE))


def attention(q, keys, values, lengths):
    """The definition, in float64; an empty row gives 0."""
    k, v = (u.double().repeat_interleave(q.shape[1] // u.shape[1], dim=1) for u in (keys, values))
    weights = (k @ q.double()[..., None] / q.shape[2] ** 0.5).exp()  # (B, H, T, 1)
    hidden = torch.arange(k.shape[2], device=DEVICE) >= lengths[:, None]
    weights = weights.masked_fill(hidden[:, None, :, None], 0)
    return (weights * v).sum(2) / weights.sum(2).clamp(min=1e-30)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("backend, dtype", [
    ("torch", torch.float32), pytest.param("triton", torch.float32, marks=TRITON.marks),
    pytest.param("triton", torch.bfloat16, marks=TRITON.marks)])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 4, 64), (6, 2, 20), (18, 1, 8)])
def test_decode_attention_is_its_definition(heads, kv_heads, head_dim, backend, dtype, parts,
                                            monkeypatch):
    """Rows around a block of 64 columns, in one part or three, of which some are empty; sizes that
    fill a tile and that don't. A batch that has shrunk is the first rows of its tensors."""
    monkeypatch.setattr(decode_kernels, "pieces", lambda *sizes: parts)
    inputs = attention_inputs([0, 1, 63, 64, 65, 130, 9], heads, kv_heads, 130, head_dim, dtype)
    inputs = {name: u[:6] for name, u in inputs.items()}
    wanted = attention(**inputs)
    if backend == "triton":
        for row, length in enumerate(inputs["lengths"].tolist()):
            inputs["values"][row, :, length:] = torch.nan  # the kernel does not even read it
    with torch.autocast(DEVICE, torch.bfloat16):  # which must not round anything
        found = decode_kernels.decode_attention(**inputs, backend=backend)
    assert found.dtype == dtype
    assert_close(found, wanted)


# ---- which backend
@pytest.mark.parametrize("interpreted, dtype, message", [
    (False, torch.float32, "not on a GPU"),
    (None, torch.float32, "Triton is not installed"), (True, torch.float64, "float64")])
def test_asked_for_by_name_triton_says_in_one_line_why_it_cannot_run(interpreted, dtype, message,
                                                                     monkeypatch):
    monkeypatch.setattr(decode_kernels, "INTERPRETED", interpreted)
    assert not decode_kernels.use_triton("auto", torch.zeros(1, dtype=dtype))
    with pytest.raises(ValueError, match=message):
        decode_kernels.use_triton("triton", torch.zeros(1, dtype=dtype))


def test_where_triton_is_missing_all_the_rest_works():
    assert run_python("-c", """if True:
        import sys; sys.modules["triton"] = None
        import torch, kernels
        x, n = torch.ones(1, 3, 2), torch.ones(1, 3, 1, 2)
        print(kernels.selective_scan(x, x, -x[0, :2], n, n)[0].isfinite().all())""") == [
            "tensor(True)"]


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU here")
def test_auto_takes_triton_on_gpus_and_leaves_gradients_of_steps_to_pytorch():
    u = torch.zeros(1, device="cuda", requires_grad=True)
    for backward, x, wanted in ((True, u, True), (False, u, False), (True, u.double(), False),
                                (False, u.detach(), True)):
        assert decode_kernels.use_triton("auto", x, backward=backward) == wanted


# ---- ahead of time
def record_launches(dtype, d_state):
    """(kernel, arguments) of all kernels as the public functions launch them; nothing runs."""
    from triton.runtime.jit import JITFunction
    recorded = []

    def record(kernel, *args, grid, warmup, **named):
        recorded.append((kernel, dict(zip(kernel.arg_names, args)) | named))

    JITFunction.run = record
    kernels.use_triton = decode_kernels.use_triton = lambda *tensors, **settings: True
    scan = cast(scan_inputs(1, 40, 128, d_state, 1), dtype, TIMED)
    leaf = scan | {"x": scan["x"].clone().requires_grad_()}
    kernels.selective_scan(**leaf, dt_softplus=True)[0].sum().backward()
    run_steps(SCAN_STEP, part(scan, slice(1)) | {"h0": scan["h0"]})
    run_steps(kernels.ssd_step, cast(ssd_inputs(1, 1, 2, 64, 64), dtype, TIMED))
    conv = cast(conv_inputs(1, 1, 128, dtype=torch.float32), dtype, ("x", "past"))
    run_steps(kernels.causal_conv_step, conv, conv.pop("past"))
    decode_kernels.decode_attention(**attention_inputs([9, 5], 6, head_dim=64, dtype=dtype))
    logits = torch.randn(2, 5000, dtype=dtype)
    decode_kernels.choose_token(logits, logits[:, 0].float(), 0.8, 0.9)
    return recorded


def spilled_bytes(kernel, arguments, capability):
    """Compile a kernel for a GPU that is not there: bytes spilled where registers don't suffice."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", int: "i32",
             float: "fp32"}
    constants = {parameter.name: arguments[parameter.name] for parameter in kernel.params
                 if parameter.is_constexpr or arguments[parameter.name] is None}
    kinds = {name: getattr(value, "dtype", type(value)) for name, value in arguments.items()}
    signature = {name: "constexpr" if name in constants else types[kinds[name]]
                 for name in kernel.arg_names}
    ptx = triton.compile(
        triton.compiler.ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", capability, 32),
        options=dict(num_warps=arguments.get("num_warps", 4), enable_fp_fusion=True)).asm["ptx"]
    target = re.search(r"\.target (sm_\w+)", ptx)[1]
    done = subprocess.run([get_ptxas(capability).path, "-v", f"--gpu-name={target}", "-o",
                           os.devnull, "/dev/stdin"], input=ptx, capture_output=True, text=True,
                          check=True)
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr))


@pytest.mark.parametrize("dtype, d_state, capability", [
    ("float32", 16, 90), ("bfloat16", 16, 80), ("bfloat16", 64, 90)])
def test_every_kernel_compiles_ahead_of_time_without_spills(dtype, d_state, capability):
    """For an A100 (80) and an H100 (90), no GPU needed; in a process that is not interpreted."""
    pytest.importorskip("triton")
    lines = run_python(__file__, dtype, str(d_state), str(capability),
                       PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    names, spilled = zip(*map(str.split, lines))
    assert {*names} == {name for module in (kernels, decode_kernels) for name in vars(module)
                        if name.endswith("_kernel")}
    assert max(map(int, spilled)) <= 32, lines  # other versions of Triton spill a little


if __name__ == "__main__":
    for kernel, arguments in record_launches(getattr(torch, sys.argv[1]), int(sys.argv[2])):
        print(kernel.fn.__name__, spilled_bytes(kernel, arguments, int(sys.argv[3])))
