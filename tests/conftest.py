"""What the test files share: tolerances, tiny models, a task in a file, a tiny experiment."""
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are so small that threads only wait
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest
import torch

if not torch.cuda.is_available():  # before kernels.py is imported: Triton is then interpreted
    os.environ["TRITON_INTERPRET"] = "1"

# The largest error that the arithmetic of a dtype allows, as a share of the largest entry of what
# is expected. Never what one machine printed: another processor adds up in another order.
TOLERANCE = {
    torch.float64: 1e-12,  # a rounding is 2^-53 = 1e-16; long sums of exponentials lose 4 digits
    torch.float32: 2e-5,  # 2^-24 = 6e-8; two to three digits are lost likewise, over a few layers
    torch.float16: 4e-3,  # 2^-11 = 5e-4: inputs, weights and outputs are rounded, sums are float32
    torch.bfloat16: 3e-2,  # 2^-8 = 4e-3: likewise
}


def assert_close(found, expected, dtype=None, times=1.0):
    """All differences are within TOLERANCE of `dtype`, times a factor that a test explains."""
    scale = expected.double().abs().max().clamp(min=1e-30)
    error = ((found.double() - expected.double()).abs().max() / scale).item()
    assert error <= times * TOLERANCE[dtype or found.dtype], f"off by {error:.1e} of its scale"


@pytest.fixture(ids="+".join, params=[
    ["attention"] * 3, ["mamba"] * 3, ["mamba2"] * 3, ["mamba", "attention", "mamba"],
    ["attention", "mamba2", "mamba2"], ["mamba2", "mamba", "attention"],
    ["mamba2_step", "attention", "mamba2_step"]])
def pattern(request):
    """The mixers of a model."""
    return request.param


@pytest.fixture(scope="session")
def make_lm():
    """make_lm(mixers, **config fields): a tiny model with 4 query heads on 2 kv heads. No parameter
    is left at a value such as 0 or 1 that would hide a mistake in its use."""
    from model import LM, Config

    def make(mixers=("attention",) * 3, seed=0, **fields):
        torch.manual_seed(seed)
        fields = dict(vocab_size=50, d_model=32, n_layers=len(mixers), n_heads=4, n_kv_heads=2,
                      head_dim=8, d_ff=48) | fields
        lm = LM(Config(**fields, mixers=mixers)).eval().requires_grad_(False)
        for parameter in lm.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        return lm
    return make


@pytest.fixture(scope="session")
def task_file(tmp_path_factory):
    """A .jsonl task of 60 short problems with solutions: no test waits for the built-in task."""
    path = tmp_path_factory.mktemp("task") / "sums.jsonl"
    path.write_text("".join(json.dumps(dict(
        question=f"{a} +{b} +{b}", answer=a + 2 * b,
        solution=f"{a:02d} +{b} = {a + b:02d}\n\\boxed{{{a + 2 * b}}}")) + "\n"
        for a in range(10, 70, 5) for b in range(1, 6)))
    return str(path)


@pytest.fixture(scope="session")
def tiny_options(task_file):
    """Options with which distill.py and teacher.py take a second, on the task of `task_file`."""
    return ["--task", task_file, "--batch-tokens", "512", "--device", "cpu"]


@pytest.fixture(scope="session")
def tiny_out(tmp_path_factory, tiny_options):
    """out/ with a trained teacher of two layers and two students. Read only: tests copy it."""
    import distill
    import teacher
    from data import load_tokenizer
    from model import LM, Config
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = load_tokenizer("arithmetic")
    torch.manual_seed(0)
    LM(Config(vocab_size=tokenizer.vocab_size, eos_ids=tokenizer.eos_ids, d_model=32, n_layers=2,
              n_heads=2, d_ff=64)).save_pretrained(folder / "new")
    tokenizer.save(folder / "new")
    options = [*tiny_options, "--out", str(folder / "out"), "--log-every", "10"]
    teacher.main([*options, "--from", str(folder / "new"), "--steps", "60", "--lr", "4e-3"])
    for name, steps in dict(pure=["matrices=10", "hidden=30"], hybrid=[]).items():
        distill.main([*options, "--student", name, "--lr", "2e-3", "--steps", *steps, "kl=30"])
    return folder / "out"
