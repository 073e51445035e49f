"""What score.py promises: the scores are those of the definitions, whatever the batch, and are kept
beside the samples they belong to. Tiny random judges."""
import json
import math
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import hub
import score
from conftest import ROOT, TOLERANCE
from data import load_tokenizer
from model import LM

CLOSE = dict(rel=10 * TOLERANCE[torch.float32], abs=1e-30)  # exp() of sums of up to 30 logarithms


@pytest.fixture(scope="module")
def judge(make_lm, tmp_path_factory):
    """A folder with a random Llama whose logits are far enough apart to matter."""
    lm, folder = make_lm(vocab_size=597, tie_embeddings=False), tmp_path_factory.mktemp("judge")
    lm.lm_head.weight *= 4
    lm.save_pretrained(folder)
    load_tokenizer("arithmetic").save(folder)
    return str(folder)


@pytest.fixture
def out(tmp_path, monkeypatch):
    """out/ of a new current folder with samples of two models, in no order, one of them empty."""
    monkeypatch.chdir(tmp_path)
    for folder in tmp_path / "out" / "pure", tmp_path / "out" / "teacher":
        folder.mkdir(parents=True)
        write(folder, [dict(
            problem=p, sample=s, question=f"Start with 4821. Do +7 {p} times.", gold="7",
            completion="\n\n".join([f"{folder.name} {p}"] * (p * s % 4 + p % 2)) + "\n\n \n\n" * p,
            num_tokens=3, finish=("stop", "length")[(p + s) % 2], seconds=0.1 * s)
            for s in reversed(range(5)) for p in range(4)])
        (folder / "samples.json").write_text('{"settings": {"prompt": "Do {question}!"}}')
    return tmp_path / "out"


def write(folder, rows):
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(folder, file="scores.jsonl"):
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def scores(folder, file="scores.jsonl"):
    return {(row["problem"], row["sample"]): row["score"] for row in lines(folder, file)}


def run(judge, *options):
    score.main([judge, "--device", "cpu", "--tokens", "150", *options])


# ---- definitions
def literal_likelihood(lm, tokenizer, record):
    """The product over its tokens; an end that was reached counts, the prompt does not."""
    prompt = tokenizer.chat(f"Do {record['question']}!")
    answer = tokenizer.encode(record["completion"])
    answer += tokenizer.eos_ids[:1] if record["finish"] == "stop" else []
    logits = lm(torch.tensor([prompt + answer]))[0].log_softmax(-1)
    return [math.exp(sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(answer)))]


def literal_process(lm, tokenizer, record):
    """RLHFlow's way: a step is a turn of a dialogue, the first one with the question before it,
    each is answered with "+", and judged by the softmax of the logits of + and - there."""
    ids, found, signs = [], [], tokenizer.encode("+-")
    steps = [step for step in record["completion"].split("\n\n") if step.strip()] or [""]
    for turn, step in enumerate(steps):
        ids += tokenizer.chat(step if turn else f"{record['question']} {step}", first=turn == 0)
        found.append(lm(torch.tensor([ids]))[0, -1, signs].softmax(-1)[0].item())
        ids += [signs[0], tokenizer.eos_ids[0]]
    return found


@pytest.mark.parametrize("options, definition, aggregate", [
    ([], literal_likelihood, min),
    (["--kind", "process"], literal_process, lambda steps: steps[-1]),
    (["--kind", "process", "--aggregate", "min"], literal_process, min),
    (["--kind", "process", "--aggregate", "prod"], literal_process, math.prod)])
def test_every_sample_has_the_score_of_the_definition(out, judge, options, definition, aggregate):
    """Of every model, in padded batches; the prompt is that of the samples. seconds grows, crc and
    num_tokens tell which text was read. Red if padding or a later step leaks into a score."""
    run(judge, *options)
    lm = LM.from_pretrained(judge, dtype=torch.float64).eval().requires_grad_(False)
    for folder in out.iterdir():
        samples = {(r["problem"], r["sample"]): r for r in lines(folder, "samples.jsonl")}
        assert len(lines(folder)) == 20 and scores(folder).keys() == samples.keys()
        for row in lines(folder):
            assert list(row) == ["problem", "sample", "score", "num_tokens", "seconds", "crc"]
            record = samples[row["problem"], row["sample"]]
            assert row["crc"] == f"{zlib.crc32(record['completion'].encode()):08x}"
            expected = aggregate(definition(lm, load_tokenizer(judge), record))
            assert row["score"] == pytest.approx(expected, **CLOSE)
        seconds = [row["seconds"] for row in lines(folder)]
        assert seconds == sorted(seconds) and seconds[-1] > 0
        settings = json.loads((folder / "scores.json").read_text())["settings"]
        assert settings["weights"] == hub.fingerprint(judge)


def test_batches_are_full_and_every_text_comes_once_and_early():
    """Within the budget with their padding, unless one text has more; the samples of a problem
    that come first are judged early."""
    reader = SimpleNamespace(read=lambda record, _: score.Text(record, [0] * record["length"], []))
    records = [dict(place=i, length=1 + i * 37 % 200) for i in range(2000)]
    found = list(score.batches(reader, records, "", 2000))
    places = [text.record["place"] for batch in found for text in batch]
    sizes = [len(batch) * max(len(text.ids) for text in batch) for batch in found]
    assert sorted(places) == list(range(2000))
    assert max(abs(place - i) for i, place in enumerate(places)) < 512
    assert max(sizes) <= 2000 and sum(r["length"] for r in records) > 0.85 * sum(sizes)
    assert [len(batch) for batch in score.batches(reader, records[5:7], "", 3)] == [1, 1]


# ---- runs
def test_a_killed_run_goes_on_and_later_samples_are_scored_too(out, judge, capsys):
    """Cut after some lines, in the middle of one: what is there stays, the rest is scored in other
    batches, and the clock goes on. A finished run says so and changes nothing."""
    folder, path = out / "pure", out / "pure" / "scores.jsonl"
    rows = lines(folder, "samples.jsonl")
    run(judge, "--model", "pure", "--to", "all.jsonl")
    write(folder, rows[:12])
    run(judge, "--model", "pure")
    first = path.read_bytes().splitlines(keepends=True)
    write(folder, rows)
    for keep, torn in (12, False), (7, True), (7, False), (0, True):
        kept = b"".join(first[:keep])
        path.write_bytes(kept + first[keep - 12][:-9] * torn)
        for _ in range(2):
            run(judge, "--model", "pure")
            assert path.read_bytes().startswith(kept) and len(lines(folder)) == 20
        assert capsys.readouterr().out.endswith("scores.jsonl: 20 scores, finished\n")
        assert scores(folder) == pytest.approx(scores(folder, "all.jsonl"), **CLOSE)
        seconds = [row["seconds"] for row in lines(folder)]
        assert seconds == sorted(seconds)
    assert len(first) == 12 and not (out / "teacher" / "scores.jsonl").exists()


def test_two_processes_share_the_samples(out, judge):
    """One file, each sample once, the scores of one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "score.py", judge, *"--device cpu --model pure --tokens 150".split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    run(judge, "--model", "pure", "--to", "one.jsonl")
    assert len(lines(out / "pure")) == 20
    assert scores(out / "pure") == pytest.approx(scores(out / "pure", "one.jsonl"), **CLOSE)


def test_by_default_the_teacher_judges(out, judge):
    """A student's own one: teacher-small judges pure-small."""
    (out / "pure").rename(out / "pure-small")
    with pytest.raises(FileNotFoundError, match="out/teacher-small"):
        score.main(["--device", "cpu", "--model", "pure-small"])
    shutil.copytree(judge, out / "teacher-small")
    score.main(["--device", "cpu", "--model", "pure-small"])
    assert len(scores(out / "pure-small")) == 20


# ---- mistakes
@pytest.mark.parametrize("message, line", [
    ("aggregate = .* there, .* now", "--aggregate min"), ("kind = .* now", "--kind process"),
    ("dtype = .* there, .* now", "--dtype bfloat16"), ("weights = .* now", "minus"),
    ("nowhere", "nowhere"), ('no process reward model.*"-"', "minus --kind process"),
    ("no samples of other under out/: run python sample.py", "--model teacher other"),
    ("no samples of pure under empty/", "--out empty"),
    *((f"--to {to}: expected a .jsonl", f"--to {to}") for to in (
        "samples.jsonl config.jsonl model.jsonl results.jsonl training.jsonl metrics.jsonl "
        "tokenizer.tiktoken.jsonl scores.json").split()),
    *((f"{name}.json, the settings", f"--to {name}.jsonl --model teacher pure")
      for name in ("text", "mine", "list")),
    *(("scores.jsonl: problem 0, .* of another run", change)
      for change in (dict(completion="sampled again"), dict(sample=77))),
    ("samples.jsonl, line 1: question is", dict(question=1))], ids=str)
def test_a_mistake_is_told_in_one_line_and_changes_no_file(out, judge, tiny_out, message, line):
    """Another judge or none, others' files, in the last of the models too, nothing to judge, or a
    sample with other fields."""
    run(judge, "--model", "pure")
    (out / "pure" / "text.jsonl").write_text("a line without an end")
    for name, settings in dict(mine='{"a": 1}', list="[]").items():
        (out / "pure" / f"{name}.json").write_text(f'{{"settings": {settings}}}')
    path = Path(shutil.copytree(tiny_out / "teacher", "minus"), data.TOKENIZER_FILE)
    definition = json.loads(path.read_text())
    definition["ranks"][ord("-")] = None
    path.write_text(json.dumps(definition))
    if isinstance(line, dict):
        first, *rest = lines(out / "pure", "samples.jsonl")
        write(out / "pure", [first | line, *rest])
        line = ""
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    line = line.split() if line[:1].isalpha() else [judge, *line.split()]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        run(line[0], "--model", "pure", *line[1:])
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before
