"""What sample.py --bench and memory.py promise: the engine that is timed is the one that samples, bytes are counted as tensors
have them, a line says what was measured, out of memory is a line, and a batch is chosen that fits."""
import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import distill
import memory
import plot
import sample
from bench import PATTERNS, config_of
from model import LM, Config

ROOT = Path(bench.__file__).parent
CPU, GPU, FLOAT, HALF = torch.device("cpu"), torch.device("cuda"), torch.float32, torch.bfloat16
FIELDS = {"shape", "pattern", "mixers", "params", "dtype", "device", "batch", "prompt", "generate", "prefill_tokens_per_second",
          "prefill_prompts", "decode_tokens_per_second", "ms_per_step", "spread", "bytes_per_step", "copy_bandwidth", "fraction",
          "memory", "memory_estimate", "ratio", "oom", "method", "contexts", "ms_at_contexts", "repeats", "date", "torch",
          "threads"}


# ------------------------------------------------------------------------------------------------ shapes and engine
@pytest.mark.parametrize("shape, params", [("tiny", 251_776), ("smollm2-135m", 134_515_008), ("llama-1b", 1_235_814_400),
                                           ("llama-3b", 3_212_749_824)])
def test_shapes_are_those_of_the_released_models(shape, params):
    with bench.shapes_only():
        assert LM(config_of(shape, "transformer")).num_parameters() == params


def test_students_keep_the_attention_layers_of_the_papers_and_of_the_experiment():
    kept = {shape: [i for i, mixer in enumerate(config_of(shape, "hybrid").mixers) if mixer == "attention"]
            for shape in bench.SHAPES}
    assert kept["llama-1b"] == [3, 7, 11, 15] and kept["llama-3b"] == [3, 8, 13, 18, 23, 27]
    assert tuple(kept["tiny"]) == distill.STUDENTS["hybrid"][2] and set(config_of("tiny", "hybrid").mixers) == {
        "attention", distill.STUDENTS["hybrid"][1]}
    assert all(set(config_of(shape, "pure").mixers) == {"mamba2"} for shape in bench.SHAPES)


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.inference_mode()
def test_what_is_timed_is_what_samples(pattern):
    """The same prompts through sample.generate give the same tokens. Red if the engine leaves a part of a step out."""
    lm = bench.random_model(config_of("tiny", pattern), CPU, FLOAT)
    engine = bench.Engine(lm, 3, 10, 20)
    engine.prefill(3)
    engine.seek(10)
    engine.steps(20)
    expected = sample.generate(lm, engine.prompts, max_new_tokens=20, temperature=0.8, batch_size=3)
    assert engine.batch.tokens[:, :20].tolist() == [c.tokens for c in sorted(expected, key=lambda c: c.problem)]
    assert engine.batch.state.lengths.tolist() == [30] * 3


def test_every_step_and_some_steps_agree_where_time_is_linear(monkeypatch):
    """As it is for attention; contexts are where the steps were. Red if warm-up steps count, or if an end is left out."""
    class Engine:
        lm = argparse.Namespace(device=CPU)

        def seek(self, context):
            self.context, self.times = context, []

        def steps(self, count):
            self.times += [1 + 0.01 * c for c in range(self.context, self.context + count)]
            self.context += count
            assert self.context <= 100 + 1000
    engine = Engine()

    def seconds(function, count, device):
        function(count)
        return sum(engine.times[-count:])
    monkeypatch.setattr(bench, "seconds", seconds)
    expected = np.mean([1 + 0.01 * c for c in range(100, 1100)])
    for time, points in (bench.time_every_step(engine, 100, 1000), bench.time_some_steps(engine, 100, 1000)):
        assert time == pytest.approx(expected, rel=1e-3) and len(points) == bench.POSITIONS
        assert [t for _, t in points] == pytest.approx([1 + 0.01 * c for c, _ in points])
    every, some = bench.METHODS
    assert bench.choose_method(engine, 100, 1000, 1001 * expected) == every
    assert bench.choose_method(engine, 100, 1000, 999 * expected) == some
    assert bench.choose_method(engine, 100, bench.LONG - 1, 0) == every


# ------------------------------------------------------------------------------------------------ bytes
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_bytes_and_memory_are_counted_as_the_tensors_have_them(pattern, dtype):
    """Weights, caches and states of a real model of the shape. Red if a dtype, a layer or a row is forgotten."""
    config, batch, prompt, generate = config_of("tiny", pattern), 3, 10, 5
    lm = bench.random_model(config, CPU, dtype)
    assert {p.dtype for name, p in lm.named_parameters() if not name.endswith(memory.FLOAT32_PARAMETERS)} == {dtype}
    weights = sum(p.nbytes for p in lm.parameters())
    layers = lm.init_state(batch, prompt + generate).layers
    kv = sum(layer[name].nbytes for layer in layers for name in ("keys", "values") if name in layer)
    ssm = sum(layer[name].nbytes for layer in layers for name in ("h", "window") if name in layer)
    needed = memory.sampling_memory(config, dtype, batch, prompt + generate, 1, prompt)
    assert (needed["weights"], needed["KV caches"], needed["SSM states"]) == (weights, kv, ssm)

    assert kv == 2 * config.mixers.count("attention") * batch * 4 * 15 * 16 * dtype.itemsize  # k and v, heads x tokens x size
    token = kv / (prompt + generate)  # of all rows
    moved = sum(weights + 2 * ssm + (context + 1) * token for context in range(prompt, prompt + generate)) / generate
    assert bench.bytes_per_step(config, dtype, batch, prompt, generate) == pytest.approx(moved)


def test_an_embedding_that_is_not_the_head_need_not_be_read():
    tied, untied = (Config(vocab_size=1000, tie_embeddings=tie) for tie in (True, False))
    assert bench.bytes_per_step(tied, FLOAT, 1, 1, 1) == bench.bytes_per_step(untied, FLOAT, 1, 1, 1)


# ------------------------------------------------------------------------------------------------ bench.jsonl
def lines(out):
    return [json.loads(line) for line in (Path(out) / "bench.jsonl").read_text().splitlines()]


def run(out, *options):
    bench.main(["--bench", "--shape", "tiny", "--prompt", "8", "--generate", "6", "--batch", "2", "--repeats", "2",
                "--seconds", "0", "--device", "cpu", "--out", str(out), *options])


@pytest.fixture(autouse=True)
def copying(monkeypatch):
    monkeypatch.setattr(bench.kernels, "_bandwidth", lambda device: 1e10)  # measuring it takes a second


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """bench.jsonl of two batches, short and long. Read only."""
    out = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.kernels, "_bandwidth", lambda device: 1e10)
        run(out, "--generate", f"6,{bench.LONG}", "--batch", "2,5", "--repeats", "1")
    return out


def test_a_line_has_all_fields_and_says_how_it_was_measured(measured):
    rows, (every, some) = lines(measured), bench.METHODS
    assert [(r["batch"], r["generate"], r["pattern"]) for r in rows] == list(itertools.product((2, 5), (6, bench.LONG), PATTERNS))
    for row in rows:
        assert row.keys() == FIELDS and None not in {k: v for k, v in row.items() if k != "memory"}.values() and not row["oom"]
        assert row["method"] == (some if row["generate"] == bench.LONG else every)
        assert row["decode_tokens_per_second"] == pytest.approx(1e3 * row["batch"] / row["ms_per_step"], rel=1e-4)
        assert row["fraction"] == pytest.approx(row["bytes_per_step"] / row["ms_per_step"] * 1e3 / 1e10, rel=1e-4)
        assert len(row["contexts"]) == len(row["ms_at_contexts"]) >= 6
        assert row["prompt"] <= min(row["contexts"]) and max(row["contexts"]) <= row["prompt"] + row["generate"]
        assert (row["ratio"] == 1) == (row["pattern"] == "transformer")


def test_a_second_run_measures_only_what_is_not_there(measured, tmp_path, monkeypatch):
    """A group of patterns is measured together: the ratio needs both. A line that a kill cut off is measured again."""
    whole, seen, real = (measured / "bench.jsonl").read_bytes(), [], bench.measure
    (tmp_path / "bench.jsonl").write_bytes(whole + b'{"shape": "ti')
    monkeypatch.setattr(bench, "measure", lambda *arguments: seen.append(arguments[3:6]) or real(*arguments))
    run(tmp_path, "--batch", "5,2")
    assert not seen and (tmp_path / "bench.jsonl").read_bytes() == whole
    run(tmp_path, "--batch", "2,3")
    assert seen == [(3, 8, 6)] * 6 and (tmp_path / "bench.jsonl").read_bytes().startswith(whole)


def test_models_take_turns(tmp_path, monkeypatch):
    """Red if one model's turns come in a row: what slows the machine for a while would hit one of them."""
    seen, real = [], bench.measure
    monkeypatch.setattr(bench, "measure",
                        lambda config, *rest: seen.append(config.mixers.count("attention")) or real(config, *rest))
    run(tmp_path, "--pattern", "transformer", "pure")
    assert seen == [4, 0, 4, 0]


def test_the_ratio_is_the_median_of_the_turns():
    runs, theirs = ([bench.Run(1, 1, step, [(0, step)], "", None) for step in steps] for steps in ((1, 2, 4), (3, 10, 16)))
    found = bench.measured(runs, theirs, 6, 10, 100, 1000)
    assert found["ratio"] == 4 and found["ms_per_step"] == 2000 and found["decode_tokens_per_second"] == 3
    assert found["spread"] == 1.5 and found["fraction"] == 0.05 and found["memory"] is None
    assert bench.measured(runs, [], 6, 10, 100, 1000)["ratio"] is None


def out_of_memory(config, *rest):
    if config.mixers[0] == "attention":
        raise torch.OutOfMemoryError("CUDA out of memory")
    return bench.Run(0.1, 1, 0.2, [(8, 0.2)], "", 1)


def test_out_of_memory_is_a_line_and_the_others_go_on(tmp_path, monkeypatch):
    """Without the Transformer there is nothing to compare with."""
    monkeypatch.setattr(bench, "measure", out_of_memory)
    run(tmp_path)
    rows = {row["pattern"]: row for row in lines(tmp_path)}
    assert [rows[pattern]["oom"] for pattern in PATTERNS] == [True, False, False]
    for row in rows.values():
        assert row.keys() == FIELDS and row["memory_estimate"] > 0 and row["bytes_per_step"] > 0 and row["ratio"] is None
    assert all(rows["transformer"][name] is None for name in bench.MEASURED) and rows["pure"]["ms_per_step"] == 200


def test_on_a_cpu_what_does_not_fit_is_not_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda device: 1000)
    monkeypatch.setattr(bench, "measure", None)
    run(tmp_path)
    assert [row["oom"] for row in lines(tmp_path)] == [True] * 3


def test_other_errors_are_errors(tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("expected shape")
    monkeypatch.setattr(bench, "measure", broken)
    with pytest.raises(RuntimeError, match="expected shape"):
        run(tmp_path)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory is measured on Linux")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_estimate_is_near_the_measured_peak(pattern, monkeypatch):
    """A shape whose weights, caches and logits count alike. Red if one of them is left out."""
    monkeypatch.setitem(bench.SHAPES, "tiny", dict(vocab_size=10_000, d_model=512, n_heads=8, d_ff=1024))
    found = bench.measure(config_of("tiny", pattern), CPU, FLOAT, 24, 100, 100, 0.1, list(bench.METHODS)[1])
    expected = bench.estimate(config_of("tiny", pattern), FLOAT, 24, 100, 100)
    assert 0.75 < expected / found.memory < 1.3, (expected, found.memory)


def test_the_command_in_full_and_its_mistakes(tmp_path):
    """Through sample.py, whose other options it does not take. One line and exit code 2."""
    def command(*options):
        return subprocess.run([sys.executable, str(ROOT / "sample.py"), "--bench", "--device", "cpu", *options], cwd=tmp_path,
                              capture_output=True, text=True, timeout=60)
    done = command("--batch", "1", "--generate", "2", "--prompt", "3", "--repeats", "1")
    assert done.returncode == 0 and "transformer" in done.stdout, done.stderr
    assert [row["shape"] for row in lines(tmp_path / "out")] == ["tiny"] * 3


@pytest.mark.parametrize("options, said", [(["--batch", "0"], "least is 1"), (["--batch", "4,x"], "--batch"),
                                           (["--shape", "llama-9b"], "llama-3b"), (["--temperature", "1"], "--temperature")])
def test_a_mistake_is_one_line(options, said, capsys):
    with pytest.raises(SystemExit) as end:
        sample.main(["--bench", *options])
    said_so = capsys.readouterr().err
    assert end.value.code == 2 and said in said_so and len(said_so.splitlines()) == 1


def test_help_explains_every_option_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        sample.main(["--bench", "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for name in ("shape", "pattern", "prompt", "generate", "batch", "repeats", "seconds", "out", "device", "dtype"):
        entry = text.split(f"\n  --{name} ")[1].split("\n  --")[0]
        assert "default: " in entry, entry


# ------------------------------------------------------------------------------------------------ the batch that fits
def choose(free, completions=5000, device=CPU, **more):
    return memory.choose_batch(config_of("tiny", "transformer"), device, FLOAT, completions, 100, free, **more)


def needs(rows):
    return sum(memory.sampling_memory(config_of("tiny", "transformer"), FLOAT, rows, 100).values())


def test_the_largest_batch_is_the_largest():
    for free in (2e6, 3e6, 1e7, 1e8):
        rows = memory.largest_batch(config_of("tiny", "transformer"), FLOAT, 100, free)
        assert needs(rows) <= free < needs(rows + (1 if rows < 32 else 32)) and (rows <= 32 or rows % 32 == 0)
    assert memory.largest_batch(config_of("tiny", "transformer"), FLOAT, 100, 1e6) == 0


def test_unless_told_the_batch_is_what_fits(capsys):
    """All completions if they do; a tenth of the memory stays free; on a CPU 256 at most, on a GPU no limit."""
    assert choose(1e12) == memory.MOST_ROWS_ON_CPU == 256
    assert choose(1e12, completions=7) == 7
    assert choose(1e12, device=GPU) == 5000
    assert choose(needs(70) / 0.9) == choose(needs(70) / 0.9, device=GPU) == 64
    assert choose(needs(20) / 0.9 + 1) == 20
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 6 and "for 20 rows of up to 100 tokens" in said[-1] and "weights 0.001" in said[-1]


def test_a_batch_that_was_asked_for_is_taken_or_refused_in_one_line():
    assert choose(1e12, asked=300) == 300
    assert choose(needs(10), asked=10) == 10
    assert choose(needs(10), asked=1000, completions=10) == 1000  # there are no more than 10 rows to decode
    with pytest.raises(ValueError, match="100 rows of up to 100 tokens need .* GB are free.*--batch-size 64 is the largest"):
        choose(needs(70) / 0.9, asked=100)


@pytest.mark.parametrize("asked", [None, 4])
def test_not_even_one_row(asked):
    with pytest.raises(ValueError, match="not even one row fits, most is needed for weights: .*--dtype bfloat16"):
        choose(1e6, asked=asked)


def test_kept_prompts_count():
    """A prompt's state is kept until its last sample has begun: of many problems that is much."""
    few, many = (memory.sampling_memory(config_of("tiny", "pure"), FLOAT, 1, 100, prompts, 10)["prompts"] for prompts in (1, 101))
    state = LM(config_of("tiny", "pure")).init_state(1, 10)
    assert many - few == 100 * (4 * 597 + sum(tensor.nbytes for layer in state.layers for tensor in layer.values()))


def test_a_run_that_goes_on_keeps_the_batch_it_had(tiny_out, task_file, tmp_path, monkeypatch):
    """Less memory is free than when it began, or more: the choice was automatic, so nobody is told to choose another --out.
    What was used is recorded."""
    options = ["--model", str(tiny_out / "pure"), "--out", str(tmp_path), "--task", task_file, "--limit", "4",
               "--num-samples", "2", "--max-new-tokens", "5", "--device", "cpu"]
    path, seen, real = tmp_path / "pure" / "samples.jsonl", [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda *a, **k: seen.append(k["batch_size"]) or real(*a, **k))
    for fits in (4, 100, 2):
        monkeypatch.setattr(memory, "largest_batch", lambda *arguments: fits)
        sample.main(options)
        assert json.loads((tmp_path / "pure" / "samples.json").read_text())["settings"]["batch_size"] == 4
        lines = path.read_bytes().splitlines(keepends=True)
        assert len(lines) == 8
        path.write_bytes(b"".join(lines[:3]))
    assert set(seen) == {4}


# ------------------------------------------------------------------------------------------------ the figure
def made_up(pattern, batch, generate, ms, ratio, **more):
    return dict(shape="tiny", pattern=pattern, device="cpu (test)", dtype="float32", batch=batch, prompt=10, generate=generate,
                oom=ms is None, ratio=ratio, contexts=ms and [10.0, 10.0 + generate], ms_at_contexts=ms) | more


ROWS = [made_up(*row) for row in (
    ("transformer", 1, 50, [1.0, 2.0], 1.0), ("pure", 1, 50, [2.0, 2.0], 0.8), ("transformer", 8, 50, [3.0, 6.0], 1.0),
    ("pure", 8, 50, [2.0, 2.0], 2.5), ("transformer", 8, 100, [3.0, 9.0], 1.0), ("pure", 8, 100, [2.0, 2.0], 3.5),
    ("transformer", 64, 50, None, None), ("pure", 64, 50, [4.0, 4.0], None))]


def test_the_figure_shows_the_lines_of_the_file():
    """Speed-up against batch at the length with most comparisons, against length at such a batch, a step against the context."""
    with plot.plt.rc_context(plot.STYLE):
        figure = plot.draw_bench(ROWS)
    drawn = [{line.get_label(): line.get_xydata().tolist() for line in ax.lines} for ax in figure.axes]
    assert drawn[0]["pure"] == [[1, 0.8], [8, 2.5]] and drawn[0]["out of memory"] == [[64, 1]]
    assert drawn[1]["pure"] == [[50, 2.5], [100, 3.5]]
    assert drawn[2]["transformer"] == [[10, 3], [110, 9]] and drawn[2]["pure"] == [[10, 2], [110, 2]]
    titles = [" ".join(ax.get_title(loc="left").split()) for ax in figure.axes]
    assert titles == ["With 8 rows, pure decodes 2.5 times as fast as the Transformer",
                      "With 100 new tokens, pure decodes 3.5 times as fast as the Transformer",
                      "A step's time grows: transformer x3.0, pure x1.0"]
    plot.plt.close(figure)


def test_plot_draws_a_bench_alone_and_what_is_measured_again_counts(tmp_path, measured):
    """Without results.json; other machines' lines and a torn last line are left out."""
    rows = [made_up("pure", 1, 50, [9.0, 9.0], 0.1), made_up("pure", 1, 50, [9.0, 9.0], 0.2, device="another")] + ROWS
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"shape"')
    assert plot.read_bench(tmp_path / "bench.jsonl") == [ROWS[1], ROWS[0], *ROWS[2:]]
    plot.main(["--out", str(tmp_path)])
    assert sorted(os.listdir(tmp_path)) == ["bench.jsonl", "bench.png"]
    plot.plt.close(plot.draw_bench(lines(measured)))  # what sample.py --bench wrote


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[1:2], ROWS[6:7], [row | dict(ratio=None) for row in ROWS]], ids=str)
def test_any_rows_can_be_drawn(rows):
    figure = plot.draw_bench(rows)
    assert len(figure.axes) == 3 * len({row["shape"] for row in rows}) and all(ax.get_title() for ax in figure.axes)
    plot.plt.close(figure)


def test_against_a_student_is_a_mistake(make_lm, tmp_path):
    pytest.importorskip("transformers")
    make_lm(["attention", "mamba2"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a student"):
        bench.main(["--bench", "--against", str(tmp_path), "--device", "cpu"])


def test_against_transformers_prints_three_speeds(make_lm, tmp_path, capsys):
    """The same weights and settings in turns; what is printed is tokens/s, and by how much ours is ahead."""
    pytest.importorskip("transformers")
    make_lm().save_pretrained(tmp_path)
    bench.main(["--bench", "--against", str(tmp_path), "--batch", "2", "--prompt", "3", "--generate", "5", "--repeats", "1",
                "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    for name in ("ours", "transformers", "the products alone"):
        line, = (line for line in lines if line.strip().startswith(f"{name}:"))
        assert "tokens/s" in line and ("times as fast" in line) == (name != "ours")
