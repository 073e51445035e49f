"""What bench.py promises: bytes are those of the tensors, what is timed is what samples, models
take turns, out of memory is a line, peers compute what we do, a mistake is one line."""
import json
import sys
import types

import pytest
import torch

import bench
import distill
import sample
from bench import empty_models
from conftest import TOLERANCE

CPU, FLOAT, HALF = torch.device("cpu"), torch.float32, torch.bfloat16
PATTERNS = "transformer", "pure", "hybrid"
TINY = ["--prompt", "3", "--batch", "1,2", "--repeats", "1", "--device", "cpu"]


@pytest.mark.parametrize("shape, pattern, parameters", [
    ("smollm2-135m", "transformer", 134_515_008), ("llama-1b", "transformer", 1_235_814_400),
    ("llama-3b", "transformer", 3_212_749_824),
    ("llamba-3b", "pure", 3_656_994_688 + 28 * 32)])  # and a_bias, which Llamba's file lacks
def test_shapes_are_those_of_released_models(shape, pattern, parameters):
    assert empty_models(shape, FLOAT)[pattern].num_parameters() == parameters
    assert bench.SHAPES["tiny"][1:3] == distill.STUDENTS["hybrid"][1:]


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_bytes_per_token_are_those_of_the_tensors(pattern, dtype):
    """Summed step by step. Red if a dtype, a layer, a row or a write is left out."""
    lm = empty_models("tiny", dtype)[pattern]
    moved = 5 * sum(parameter.nbytes for parameter in lm.parameters())
    for context in range(10 + 1, 10 + 5 + 1):
        for layer in lm.init_state(3, context, dtype).layers:
            moved += sum(u.nbytes * (1 if "keys" in layer else 2) for u in layer.values())
    assert bench.bytes_per_token(*bench.sizes(lm, dtype), 3, 10, 5) * 3 * 5 == pytest.approx(moved)


@pytest.mark.parametrize("shape, rows, new, ratios", [
    ("llama-1b", 128, 512, "1.11 1.41 1.49"), ("llama-1b", 512, 512, "1.28 1.99 2.03"),
    ("llama-1b", 512, 2048, "2.35 3.66 2.62"), ("llama-1b", 256, 8192, "5.55 7.82 3.13"),
    ("llama-3b", 128, 512, "0.92 1.29 1.68"), ("llama-3b", 128, 2048, "1.50 2.12 2.24"),
    ("llama-3b", 64, 8192, "2.98 3.77 2.73"), ("llamba-3b", 128, 2048, "2.19 2.78 2.24")])
def test_ceilings_at_equal_batch_and_at_equal_memory(shape, rows, new, ratios, capsys):
    """A table that was worked out without this code; then as many rows as fit into 40 GB."""
    bench.main(["--ceiling", "--shape", shape, "--batch", str(rows), "--prompt", "512",
                "--generate", str(new), "--memory", "40"])
    _, equal, most = (line.split()[2:] for line in capsys.readouterr().out.splitlines())
    assert equal[:8:2] == ["1.00", *ratios.split()] and set(equal[1::2]) == {f"({rows})"}
    for count, lm in zip(most[1:4:2], empty_models(shape, HALF).values()):
        free = 40e9 - sum(parameter.nbytes for parameter in lm.parameters())
        assert int(count.strip("()")) == free // lm.init_state(1, 512 + new, FLOAT).nbytes()


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.inference_mode()
def test_what_is_timed_is_what_samples(pattern):
    """A full batch draws what sample.generate does. Red if it leaves out a part of a step."""
    empty, prompts = empty_models("tiny", FLOAT)[pattern], [[5, 6, 7], [8, 9, 1]]
    batch = bench.full_batch(empty, CPU, 2, 3, 12)
    batch.start([0, 1], [(0, 0), (1, 0)], 0, prompts)
    for _ in range(12):
        sample.advance(batch)
    texts = sample.generate(batch.lm, prompts, max_new_tokens=12, temperature=0.8)
    assert {c.problem: c.tokens for c in texts} == dict(enumerate(batch.tokens[:, :12].tolist()))


def test_a_speed_is_the_mean_over_the_whole_text(monkeypatch):
    """On a clock of 1 + context / 100 ms a step, 10 s in the warm-up, which must not count."""
    clock = [0.0]

    def step(batch):
        seconds = 1e-3 + int(batch.state.lengths[0]) / 1e5 if len(clock) > bench.STEPS else 10
        clock.append(clock[-1] + seconds)
        batch.state.lengths += 1
        batch.steps += 1
    monkeypatch.setattr(sample, "advance", step)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[-1])
    speed = bench.decoding_speed(empty_models("tiny", FLOAT)["pure"], CPU, 2, 100, 1024)
    assert 2e3 / speed == pytest.approx(1 + (100 + 511.5) / 100, abs=0.01)


def test_numbers_are_medians_of_turns_and_the_ratio_is_of_turns():
    """The ratio's median, 3, is not the ratio of the medians, 4. nan stays with its own."""
    turns = iter([8, 24, 1, 3, 12, float("nan"), 3, 6, 1])
    _, ours, large = bench.race(dict.fromkeys("abc", (lambda: next(turns),)), 3, batch=6)
    assert [*ours.values()] == [6, "b", 12, 6, 24, 3] and large["ratio"] != large["ratio"]


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_lines_are_printed_and_added(device, tmp_path, monkeypatch, capsys):
    """Of every batch and model; out of memory is nan, null in the file, and ends only its own."""
    def full_batch_if_it_fits(empty, *rest, full_batch=bench.full_batch):
        if set(empty.config.mixers) == {"mamba2"}:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return full_batch(empty, *rest)
    monkeypatch.setattr(bench, "full_batch", full_batch_if_it_fits)
    monkeypatch.setattr(bench, "POSITIONS", 1)
    for _ in range(2):
        bench.main([*TINY[:-1], device, "--generate", "6", "--out", str(tmp_path / "new")])
    lines = [json.loads(line) for line in open(tmp_path / "new" / "bench.jsonl")]
    assert [(line["batch"], line["model"], line["tokens/s"] is None) for line in lines] == 2 * [
        (rows, pattern, pattern == "pure") for rows in (1, 2) for pattern in PATTERNS]
    assert capsys.readouterr().out.count(" nan") == 4 * 5


def test_states_in_bfloat16_are_what_decodes_and_what_is_counted(monkeypatch, tmp_path):
    dtypes, decode = [], bench.decode
    monkeypatch.setattr(bench, "decode", lambda batch, contexts: (
        dtypes.append(batch.state.layers[0].get("h", torch.zeros(0)).dtype),
        decode(batch, contexts)))
    for dtype in "float32", "bfloat16":
        bench.main([*TINY, "--state-dtype", dtype, "--out", str(tmp_path)])
    lines = [json.loads(line) for line in open(tmp_path / "bench.jsonl")]
    ceilings = {line["state_dtype"]: line["ceiling"] for line in lines if line["model"] == "pure"}
    assert ceilings["bfloat16"] > ceilings["float32"] and torch.bfloat16 in dtypes


def test_kernels_meet_their_peers(monkeypatch, tmp_path, capsys):
    """Peers compute what ours does, values and gradients; who is not installed is named."""
    peers = types.SimpleNamespace(pscan=lambda decay, x: (
        products := decay.cumprod(1)) * (x / products).cumsum(1))
    monkeypatch.setitem(sys.modules, "mambapy", peers)
    for installed in None, peers:
        monkeypatch.setitem(sys.modules, "mambapy.pscan", installed)
        bench.main(["--kernels", *TINY, "--out", str(tmp_path)])
    assert capsys.readouterr().out.count("mambapy is not installed") == 2
    lines = [json.loads(line) for line in open(tmp_path / "bench.jsonl")]
    assert [line["model"] for line in lines[2:4]] == ["ours", "mambapy"]
    assert max(float(line["error"]) for line in lines) < TOLERANCE[FLOAT]


def test_whole_texts_against_transformers(make_lm, tmp_path):
    """The ratio is ours over theirs. A student's folder is refused in one line."""
    pytest.importorskip("transformers")
    options = [*TINY, "--generate", "5", "--out", str(tmp_path), "--against"]
    make_lm().save_pretrained(tmp_path / "llama")
    make_lm(["attention", "mamba2", "mamba2"]).save_pretrained(tmp_path / "student")
    bench.main([*options, str(tmp_path / "llama")])
    theirs, ours, *_ = (json.loads(line) for line in open(tmp_path / "bench.jsonl"))
    assert ours["ratio"] == pytest.approx(ours["tokens/s"] / theirs["tokens/s"])
    with pytest.raises(ValueError, match="student is not a Llama"):
        bench.main([*options, str(tmp_path / "student")])


def test_a_mistake_is_one_line(capsys):
    for options, said in (("--batch 0", "0 is out of range"), ("--shape llama-9b", "llama-3b"),
                          ("--batch 4,x", "'x' is not a whole"), ("--ceiling --kernels", "allowed"),
                          ("--ceiling --memory 1", "--memory 1 is too small for a row of llama")):
        with pytest.raises((SystemExit, ValueError)) as end:
            bench.main(options.split())
        assert said in (text := capsys.readouterr().err or str(end.value)) and "\n" not in text[:-1]
