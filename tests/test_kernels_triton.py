"""The Triton kernels equal the PyTorch forms that test_kernels.py has compared with the loop, and compile for real GPUs.

Where there is a GPU they run on it. Elsewhere they are interpreted on the CPU (conftest.py sets TRITON_INTERPRET before
kernels.py is imported), which checks the logic, not races or speed."""
import itertools
import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch

pytest.importorskip("triton")
import kernels
from test_kernels import (OPTIONS, ROOT, TOLERANCE, assert_same, attention_inputs, conv_inputs, in_double, results, scan_inputs,
                          ssd_inputs)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ------------------------------------------------------------------------------------------------ helpers
def on_device(inputs):
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def assert_scan_equals_the_loop(inputs, softplus=True, dtype=torch.float32, **projection):
    """y, h and every gradient of the Triton scan against the literal loop in float64 on the same numbers."""
    inputs = on_device(inputs)
    found = results(kernels.selective_scan, inputs, dt_softplus=softplus, backend="triton", **projection)
    wanted = results(kernels.selective_scan_ref, in_double(inputs), dt_softplus=softplus, **projection)
    assert_same(found, wanted, dtype)


@pytest.fixture
def three_segments(monkeypatch):
    """Cut time into three pieces, as a GPU does that batch x channels can't fill."""
    monkeypatch.setattr(kernels, "_segments", lambda programs, length, device: min(3, -(-length // kernels.TRITON_CHUNK)))


# ------------------------------------------------------------------------------------------------ selective scan
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("options", [chosen for n in range(5) for chosen in itertools.combinations(OPTIONS, n)],
                         ids=lambda chosen: "+".join(chosen) or "none")
def test_scan_with_every_optional_input_on_and_off(options, softplus):
    """Values and every gradient, also through the returned state. Red if one term of the backward kernel is missing."""
    assert_scan_equals_the_loop(scan_inputs(batch=1, d_inner=4, options=options), softplus)


@pytest.mark.parametrize("length, d_inner, d_state, groups", [
    (1, 6, 5, 2), (15, 5, 1, 5), (16, 12, 16, 1), (17, 9, 3, 3), (33, 20, 7, 1), (5, 34, 16, 2), (3, 2, 256, 1), (4, 3, 100, 3)])
def test_scan_of_odd_shapes(length, d_inner, d_state, groups):
    """L = 1, around a chunk, several chunks; channels that fill a block and that don't; N from 1 to 256; each kind of G."""
    assert_scan_equals_the_loop(scan_inputs(1, length, d_inner, d_state, groups))


@pytest.mark.parametrize("length", [20, 48, 50])
@pytest.mark.parametrize("options", [(), OPTIONS])
def test_scan_in_segments_with_a_carry(three_segments, length, options):
    """Segments scanned side by side, then joined, are the scan of the whole; the last one may be short."""
    inputs = scan_inputs(2, length, 4, 3, 1, options)
    assert kernels._scan_plan(inputs["x"], inputs["A"].t(), 1)[0][1] > 1
    assert_scan_equals_the_loop(inputs)


@pytest.mark.parametrize("use", [("y",), ("h",)])
def test_scan_gradients_flow_from_either_output_alone(use):
    assert_scan_equals_the_loop(scan_inputs(1, 18, 4), use=use)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scan_computes_low_precision_inputs_in_float32(dtype):
    """x, dt, z, B and C in half precision, the parameters and the state in float32, as a model under autocast has them."""
    inputs = scan_inputs(1, 20, 6)
    inputs |= {name: inputs[name].to(dtype) for name in ("x", "dt", "z", "B", "C")}
    found = results(kernels.selective_scan, on_device(inputs), dt_softplus=True, backend="triton")
    assert found["y"].dtype == found["grad of x"].dtype == found["grad of B"].dtype == dtype
    assert found["h"].dtype == found["grad of A"].dtype == torch.float32
    assert_same(found, results(kernels.selective_scan_ref, on_device(in_double(inputs)), dt_softplus=True), dtype)


@pytest.mark.parametrize("product", [-50.0, -1000.0, 0.0])
def test_scan_with_strong_or_no_decay(product):
    """dt A = -50 forgets everything and must not overflow; 0 forgets nothing."""
    inputs = scan_inputs(1, 20, 4, options=("h0",))
    inputs["dt"], inputs["A"] = torch.ones_like(inputs["dt"]), torch.full_like(inputs["A"], product)
    assert_scan_equals_the_loop(inputs, softplus=False)


@pytest.mark.parametrize("dt", [-30.0, -12.0, 19.9, 20.1, 60.0])
def test_softplus_keeps_its_digits_at_both_ends(dt):
    """Red for log(1 + e^u), whose step at u = -12 is off by 1e-3 of itself."""
    inputs = scan_inputs(1, 2, 2, 2, 1, options=())
    inputs["dt"] = torch.full_like(inputs["dt"], dt)
    inputs["x"], inputs["B"], inputs["A"] = (torch.ones_like(inputs[name]) for name in ("x", "B", "A"))
    inputs["A"] *= -1e-6
    h = kernels.selective_scan(**on_device(inputs), dt_softplus=True, backend="triton")[1]
    wanted = kernels.selective_scan_ref(**on_device(in_double(inputs)), dt_softplus=True)[1]
    torch.testing.assert_close(h.double(), wanted, rtol=1e-5, atol=0)


def test_scan_takes_strided_inputs_and_leaves_them_alone():
    """A slice of a wider projection is not contiguous; a kernel that assumed so would read its neighbours."""
    inputs = on_device(scan_inputs(1, 18, 4))
    wide = {name: torch.stack([tensor, tensor + 1], dim=-1)[..., 0] for name, tensor in inputs.items()}
    assert not wide["x"].is_contiguous()
    found = results(kernels.selective_scan, wide, dt_softplus=True, backend="triton")
    assert_same(found, results(kernels.selective_scan, inputs, dt_softplus=True, backend="triton"), torch.float64)
    for name, tensor in wide.items():
        assert torch.equal(tensor, inputs[name])


def test_scan_repeats_bit_for_bit():
    """Sums over programs are added in a fixed order; atomics would not be."""
    inputs = on_device(scan_inputs(2, 20, 20, groups=1))
    first, second = (results(kernels.selective_scan, inputs, dt_softplus=True, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------------ steps, convolution
@pytest.mark.parametrize("options", [(), OPTIONS])
@pytest.mark.parametrize("d_inner, d_state, groups", [(6, 5, 2), (4, 16, 1), (3, 1, 3), (2, 256, 1)])
def test_selective_step_token_by_token_is_the_scan(options, d_inner, d_state, groups):
    inputs = on_device(scan_inputs(2, 3, d_inner, d_state, groups, options))
    h = inputs.pop("h0", torch.zeros(2, d_inner, d_state, device=DEVICE)).clone()
    y, last = kernels.selective_scan_ref(**inputs, h0=h, dt_softplus=True)
    timed = {"x", "dt", "B", "C", "z"}
    for t in range(3):
        token = {name: tensor[:, t] if name in timed else tensor for name, tensor in inputs.items()}
        y_t = kernels.selective_step(h, **token, dt_softplus=True, backend="triton")
        torch.testing.assert_close(y_t, y[:, t], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(h, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dim, d_state", [(3, 5), (64, 64), (1, 1)])
def test_ssd_step_token_by_token_is_ssd(head_dim, d_state):
    inputs = on_device(ssd_inputs(2, 3, 2, head_dim, d_state))
    h = inputs.pop("h0").clone()
    y, last = kernels.ssd_ref(**inputs, h0=h)
    for t in range(3):
        y_t = kernels.ssd_step(h, *(inputs[name][:, t] for name in ("x", "log_decay", "B", "C")), backend="triton")
        torch.testing.assert_close(y_t, y[:, t], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(h, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 40])
def test_causal_conv_equals_pytorch_in_values_and_gradients(length, width):
    inputs = on_device(conv_inputs(2, length, 70, width, torch.float32))
    found = results(kernels.causal_conv, inputs, backend="triton")
    assert_same(found, results(kernels.causal_conv, in_double(inputs), backend="torch"), torch.float32)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_conv_step_token_by_token_is_causal_conv(dtype, contiguous):
    """The state moves by one column a step, whichever way its memory lies."""
    inputs = on_device(conv_inputs(2, 6, 5, 4, torch.float32))
    inputs |= {name: inputs[name].to(dtype) for name in ("x", "state")}
    y, last = kernels.causal_conv(**inputs, backend="torch")
    state = inputs["state"].clone() if contiguous else inputs["state"].transpose(1, 2).contiguous().transpose(1, 2)
    for t in range(6):
        y_t = kernels.causal_conv_step(state, inputs["x"][:, t], inputs["weight"], inputs["bias"], backend="triton")
        torch.testing.assert_close(y_t, y[:, t], rtol=TOLERANCE[dtype][0], atol=TOLERANCE[dtype][1])
    assert torch.equal(state, last)


# ------------------------------------------------------------------------------------------------ attention to a cache
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 4, 64), (6, 2, 20), (18, 1, 8)])
def test_decode_attention_equals_its_reference(heads, kv_heads, head_dim, dtype, parts, monkeypatch):
    """Rows that are empty, of one token, around a block of 64 columns and full, in one part or cut into several of which some
    are empty; query heads that fill their tile and that don't."""
    monkeypatch.setattr(kernels, "_segments", lambda programs, length, device: parts)
    inputs = on_device(attention_inputs([0, 1, 63, 64, 65, 130, 200], heads, kv_heads, 200, head_dim, dtype))
    found = kernels.decode_attention(**inputs, backend="triton")
    assert found.dtype == dtype
    wanted = kernels.decode_attention(**inputs | {name: inputs[name].double() for name in ("q", "keys", "values")}, backend="ref")
    torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE[dtype][0], atol=TOLERANCE[dtype][1])


def test_decode_attention_reads_the_rows_of_a_batch_that_has_shrunk():
    """A State keeps the first rows of wider tensors; the caches of layers lie in one tensor."""
    inputs = on_device(attention_inputs([5, 70, 8], capacity=80))
    narrow = {name: tensor[:2] for name, tensor in inputs.items()}
    found = kernels.decode_attention(**narrow, backend="triton")
    torch.testing.assert_close(found, kernels.decode_attention_ref(**inputs)[:2], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ which backend
def test_float64_is_refused_by_name():
    inputs = on_device(in_double(scan_inputs()))
    with pytest.raises(ValueError, match="float64"):
        kernels.selective_scan(**inputs, backend="triton")


def test_cpu_tensors_need_the_interpreter():
    """The line says what to do. auto never takes Triton on a CPU, not even where it is interpreted: it is slow."""
    code = ("import torch, kernels; x = torch.zeros(1, 1, 1); n = torch.zeros(1, 1, 1, 1)\n"
            "try: kernels.selective_scan(x, x, x[0], n, n, backend='triton')\n"
            "except ValueError as error: print(error)")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "not on a GPU" in done.stdout and "TRITON_INTERPRET=1" in done.stdout, done.stderr
    assert not kernels._use_triton("auto", torch.zeros(1))


# ------------------------------------------------------------------------------------------------ ahead of time
def launches(dtype, d_state):
    """Every kernel as the public functions launch it: {name: (kernel, arguments by name)}, recorded instead of run."""
    recorded = {}

    def record(kernel, *args, grid, warmup, **constants):
        recorded[kernel.fn.__name__] = kernel, dict(zip(kernel.arg_names, args)) | constants

    from triton.runtime.jit import JITFunction
    JITFunction.run, kernels.INTERPRETED = record, True
    kernels._segments = lambda programs, length, device: 2
    inputs = scan_inputs(1, 40, 128, d_state, 1)
    inputs |= {name: inputs[name].to(dtype) for name in ("x", "dt", "z", "B", "C")}
    results(kernels.selective_scan, inputs, dt_softplus=True, backend="triton")
    token = {name: tensor[:, 0] if name in ("x", "dt", "z", "B", "C") else tensor for name, tensor in inputs.items()}
    kernels.selective_step(token.pop("h0"), **token, dt_softplus=True, backend="triton")
    heads = ssd_inputs(1, 1, 2, 64, 64, dtype=dtype)
    kernels.ssd_step(heads["h0"].float(), *(heads[name][:, 0] for name in ("x", "log_decay", "B", "C")), backend="triton")
    conv = conv_inputs(1, 40, 128, 4, torch.float32) | {"x": torch.zeros(1, 40, 128, dtype=dtype)}
    kernels.causal_conv(**conv, backend="triton")
    kernels.causal_conv_step(conv["state"], conv["x"][:, 0], conv["weight"], conv["bias"], backend="triton")
    kernels.decode_attention(**attention_inputs([9, 5], heads=6, head_dim=64, dtype=dtype), backend="triton")
    return recorded


def compile_for(capability, kernel, arguments):
    """The PTX of a kernel for a GPU that is not there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
    constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr or arguments[p.name] is None}
    signature = {p.name: "constexpr" if p.name in constants else types[arguments[p.name].dtype]
                 if isinstance(arguments[p.name], torch.Tensor) else "i32" for p in kernel.params}
    source = ASTSource(kernel, signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": arguments.get("num_warps", 4)})


def assembled(ptx, capability):
    """What NVIDIA's assembler, which Triton brings along, reports: bytes spilled where registers did not suffice, and registers."""
    from triton.backends.nvidia.compiler import get_ptxas
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        with open(path, "w") as file:
            file.write(ptx)
        name = re.search(r"\.target (sm_\w+)", ptx)[1]
        done = subprocess.run([get_ptxas(capability).path, "-v", f"--gpu-name={name}", path, "-o", os.devnull],
                              capture_output=True, text=True, check=True)
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)), re.search(r"Used (\d+) registers", done.stderr)[1]


def compile_all(dtype, d_state, capability):
    for name, (kernel, arguments) in launches(getattr(torch, dtype), int(d_state)).items():
        spilled, registers = assembled(compile_for(int(capability), kernel, arguments).asm["ptx"], int(capability))
        print(f"{name} sm_{capability}: {spilled} bytes spilled, {registers} registers")


@pytest.mark.parametrize("dtype, d_state", [("float32", 16), ("bfloat16", 16), ("bfloat16", 64)])
def test_every_kernel_compiles_ahead_of_time_without_spills(dtype, d_state):
    """For an A100 and an H100, no GPU needed; own process, as the interpreter replaces the compiler for a whole process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    running = [subprocess.Popen([sys.executable, __file__, dtype, str(d_state), capability], cwd=ROOT, text=True,
                                env=environment | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE) for capability in ("80", "90")]
    said = "".join(process.communicate()[0] for process in running)
    assert not any(process.returncode for process in running)
    names = {name for name, value in vars(kernels).items() if name.endswith("_kernel")}
    for name, capability in itertools.product(names, (80, 90)):
        assert f"{name} sm_{capability}: 0 bytes spilled" in said, said


if __name__ == "__main__":
    compile_all(*sys.argv[1:])
