"""What bench.py promises: bytes are those of the tensors, what is timed is what samples, models
take turns, out of memory is a line, and every job's mistakes end in one line."""
import dataclasses
import json
import sys
import types

import pytest
import torch

import bench
import distill
import sample
from bench import PATTERNS, VARIANTS, Turn, config_of, empty_model
from kernels import selective_scan_ref
from conftest import TOLERANCE

CPU, FLOAT, HALF = torch.device("cpu"), torch.float32, torch.bfloat16


# ---------------------------------------------------------------------------- shapes and bytes
@pytest.mark.parametrize("shape, pattern, parameters", [
    ("smollm2-135m", "transformer", 134_515_008), ("llama-1b", "transformer", 1_235_814_400),
    ("llama-3b", "transformer", 3_212_749_824),
    ("llamba-3b", "pure", 3_656_994_688 + 28 * 32)])  # and a_bias, which Llamba's file lacks
def test_shapes_are_those_of_released_models(shape, pattern, parameters):
    assert empty_model(config_of(shape, pattern), FLOAT).num_parameters() == parameters


def test_the_tiny_hybrid_is_the_one_that_distill_makes():
    assert bench.SHAPES["tiny"][1:3] == distill.STUDENTS["hybrid"][1:]


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_bytes_of_a_step_are_those_of_its_tensors(pattern, dtype):
    """Summed step by step. Red if a dtype, a layer, a row or a write is left out."""
    lm, moved = bench.random_model(config_of("tiny", pattern), CPU, dtype), 0
    for context in range(10 + 1, 10 + 5 + 1):
        moved += sum(parameter.nbytes for parameter in lm.parameters())
        for layer in lm.init_state(3, context, dtype).layers:
            moved += sum(u.nbytes * (1 if "keys" in layer else 2) for u in layer.values())
    assert bench.step_bytes(empty_model(lm.config, dtype), 3, 10, 5, dtype) * 5 == moved


@pytest.mark.parametrize("shape, rows, new, full, half, hybrid", [
    ("llama-1b", 128, 512, 1.11, 1.41, 1.49), ("llama-1b", 512, 512, 1.28, 1.99, 2.03),
    ("llama-1b", 512, 2048, 2.35, 3.66, 2.62), ("llama-1b", 256, 8192, 5.55, 7.82, 3.13),
    ("llama-3b", 128, 512, 0.92, 1.29, 1.68), ("llama-3b", 128, 2048, 1.50, 2.12, 2.24),
    ("llama-3b", 64, 8192, 2.98, 3.77, 2.73), ("llamba-3b", 128, 2048, 2.19, 2.78, 2.24)])
def test_ceilings_at_equal_batch(shape, rows, new, full, half, hybrid, capsys):
    """A table that was worked out without this code: prompts of 512, weights in bfloat16."""
    bench.main(["--ceiling", "--shape", shape, "--batch", str(rows), "--generate", str(new)])
    line = capsys.readouterr().out.splitlines()[3].split()
    assert line[2:10:2] == ["1.00", f"{full:.2f}", f"{half:.2f}", f"{hybrid:.2f}"]


def test_at_equal_memory_as_many_rows_as_fit():
    models = {pattern: empty_model(config_of("llama-1b", pattern), HALF) for pattern in PATTERNS}
    found = bench.ceilings(models, None, 512, 512, 40e9)
    speeds = []
    for (_, rows), (pattern, dtype) in zip(found, VARIANTS):
        lm, row = models[pattern], models[pattern].init_state(1, 1024, dtype).nbytes()
        free = 40e9 - sum(parameter.nbytes for parameter in lm.parameters())
        assert rows * row <= free < (rows + 1) * row
        speeds.append(rows / bench.step_bytes(lm, rows, 512, 512, dtype))
    assert [ratio for ratio, _ in found] == pytest.approx([s / speeds[0] for s in speeds])


# ---------------------------------------------------------------------------- the clock
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.inference_mode()
def test_what_is_timed_is_what_samples(pattern):
    """A full batch draws what sample.generate does. Red if it leaves out a part of a step."""
    lm, prompts = bench.random_model(config_of("tiny", pattern), CPU, FLOAT), [[5, 6, 7], [8, 9, 1]]
    batch = bench.full_batch(lm, 2, 3, 12)
    batch.start([0, 1], [(0, 0), (1, 0)], 0, sample.Prompts(lm, prompts))
    for _ in range(12):
        sample.advance(batch)
    texts = sample.generate(lm, prompts, max_new_tokens=12, temperature=0.8)
    expected = [c.tokens for c in sorted(texts, key=lambda c: c.problem)]
    assert batch.tokens[:, :12].tolist() == expected


def test_steps_are_timed_over_the_whole_text(monkeypatch):
    """On a clock on which a step takes 1 + context / 100 ms, but the first ones 10 s: the mean over
    the points is that over all steps, but for half a step. Red if an end or the warm-up counts."""
    clock, seen = [0.0], set()

    def step(batch):
        context = int(batch.state.lengths[0])
        slow = 10 if (context // 8) not in seen else 0
        seen.add(context // 8)
        clock[0] += slow + (1 + context / 100) / 1e3
        batch.state.lengths += 1
        batch.steps += 1
    monkeypatch.setattr(bench, "advance", step)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    turn = bench.measure(config_of("tiny", "pure"), CPU, FLOAT, 2, 100, 1024)
    assert sum(turn.times) / len(turn.times) == pytest.approx(1 + (100 + 511.5) / 100, abs=0.01)
    assert turn.times == pytest.approx([1 + c / 100 for c in turn.contexts], abs=0.01)
    assert turn.contexts[0] == 100 + 64 and turn.contexts[-1] == 100 + 1024 - 64


def test_numbers_are_medians_of_turns_and_the_ratio_is_of_turns():
    """The ratio's median, 3, is not the ratio of the medians, 4."""
    ours, theirs = ([Turn((10, 20), (t, t), memory) for t, memory in turns] for turns in (
        ((1, 5), (2, 7), (4, 6)), ((3, 0), (8, 0), (8, 0))))
    found = bench.summary(ours, theirs, rows=6, copying=0.0005)
    assert (found["ms_per_step"], found["tokens_per_second"], found["ratio"]) == (2, 3000, 3)
    assert (found["spread"], found["of_copy"], found["gigabytes"]) == (1.5, 0.25, 6)
    assert bench.summary(ours, [], 6, 0.0005)["ratio"] is None and not bench.summary([], ours, 6, 1)


def test_models_take_turns_and_out_of_memory_ends_only_its_own(monkeypatch):
    seen = []

    def measure(config, *rest):
        seen.append(config.mixers[0])
        if config.mixers[0] == "attention":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Turn((1,), (1,), None)
    monkeypatch.setattr(bench, "measure", measure)
    configs = {pattern: config_of("tiny", pattern) for pattern in ("transformer", "pure")}
    turns = bench.take_turns(configs, 2, CPU, FLOAT, 1, 8, 8)
    assert seen == ["attention", "mamba2"] * 2
    assert turns == dict(transformer=(), pure=(Turn((1,), (1,), None),) * 2)
    monkeypatch.setattr(bench, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # other errors are errors
        bench.take_turns(configs, 1, CPU, FLOAT, 1, 8, 8)


# ---------------------------------------------------------------------------- jobs
def decode(out, *options):
    bench.main(["--prompt", "8", "--generate", "6", "--batch", "1,2", "--repeats", "1", "--device",
                "cpu", "--out", str(out), *options])
    return [json.loads(line) for line in (out / "bench.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def copying(monkeypatch):
    """Measuring it takes a second."""
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e10)


def test_lines_are_added_and_drawn(tmp_path, monkeypatch, capsys):
    """What does not fit is not tried, and is a line too."""
    assert [(row["batch"], row["pattern"]) for row in decode(tmp_path)] == [
        (rows, pattern) for rows in (1, 2) for pattern in PATTERNS]
    monkeypatch.setattr(bench, "MACHINE", 0)
    rows = decode(tmp_path)
    assert [row["out_of_memory"] for row in rows] == [False] * 6 + [True] * 6
    assert capsys.readouterr().out.count("out of memory") == 6
    assert all(row["tokens_per_second"] > 0 for row in rows[:6]) and "ratio" not in rows[6]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    left, right = bench.draw(rows).axes
    for row, speed, steps in zip(rows[3:6], left.lines, right.lines):  # of the larger batch
        assert speed.get_label() == row["pattern"]
        assert speed.get_xydata()[-1].tolist() == [2, row["ratio"]]
        assert steps.get_ydata().tolist() == row["ms_at_contexts"]


def mamba_ssm_by_definition(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """mamba_ssm's arguments, u, delta, z (B, D, L) and B, C (B, G, N, L), by our literal loop."""
    u, delta, z = (tensor.transpose(1, 2) for tensor in (u, delta, z))
    B, C = (tensor.permute(0, 3, 1, 2) for tensor in (B, C))
    y, _ = selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return y.transpose(1, 2)


def test_kernels_meet_their_peers(monkeypatch, capsys):
    """Peers compute what ours does, values and gradients; who is not installed is named."""
    package = types.SimpleNamespace(selective_scan_fn=mamba_ssm_by_definition)
    for name in "mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface":
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, "transformers.models.mamba.modeling_mamba", None)
    bench.main(["--kernels", "--batch", "2", "--prompt", "20", "--repeats", "1", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "transformers layer is not installed" in said
    lines = [line.split() for line in said.splitlines() if line.startswith("mamba")]
    errors = [float(line[-1]) for line in lines if line[-1] != "installed"]
    assert errors and max(errors) < TOLERANCE[FLOAT]


def test_whole_texts_against_transformers(make_lm, tmp_path, capsys):
    """The ratio is ours over theirs. A student's folder is refused in one line."""
    pytest.importorskip("transformers")
    lm = make_lm()
    lm.save_pretrained(tmp_path / "llama")
    bench.main(["--against", str(tmp_path / "llama"), "--batch", "2", "--prompt", "3", "--generate",
                "5", "--repeats", "1", "--device", "cpu"])
    ours, theirs, ratio = (float(line.split()[3].replace(",", ""))
                           for line in capsys.readouterr().out.splitlines()[-3:])
    assert ratio == pytest.approx(ours / theirs, rel=0.05, abs=0.02)  # printed with two decimals
    config = dataclasses.replace(lm.config, mixers=["attention", "mamba2", "mamba2"])
    bench.LM(config).save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="student is not a Llama that transformers can run"):
        bench.main(["--against", str(tmp_path / "student"), "--device", "cpu"])


@pytest.mark.parametrize("options, said", [
    ("--batch 0", "0 is out of range"), ("--batch 4,x", "'x' is not a whole number"),
    ("--shape llama-9b", "llama-3b"), ("--ceiling --out x", "--out is not for this job"),
    ("--kernels --memory 8", "kernels takes --shape"), ("--ceiling --kernels", "not allowed with")])
def test_a_mistake_is_one_line(options, said, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(options.split())
    printed = capsys.readouterr().err
    assert end.value.code == 2 and said in printed and len(printed.splitlines()) == 1


def test_too_little_memory_is_one_line():
    with pytest.raises(ValueError, match="--memory 1 does not hold the Transformer's weights"):
        bench.main(["--ceiling", "--memory", "1"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_on_a_gpu_the_peak_holds_weights_and_states(pattern):
    config, device = config_of("tiny", pattern), torch.device("cuda")
    lm = empty_model(config, HALF)
    least = bench.weight_bytes(lm) + lm.init_state(64, 200).nbytes()
    assert bench.measure(config, device, HALF, 64, 100, 100).gigabytes > least / 1e9
