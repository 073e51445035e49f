"""What score.py promises: the scores are those of the definitions, whatever the batch, and are kept
beside the samples they belong to. Tiny random judges."""
import argparse
import json
import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

import data
import hub
import score
from conftest import ROOT, TOLERANCE
from data import load_tokenizer
from model import LM

CLOSE = dict(rel=10 * TOLERANCE[torch.float32], abs=1e-30)  # exp() of sums of up to 30 logarithms
QUESTION = "Start with 4821. In each of 2 rounds do +7 3 times."


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
    """out/ of a new current folder with samples of two models, in no order."""
    monkeypatch.chdir(tmp_path)
    for name in ("pure", "teacher"):
        rows = [dict(problem=p, sample=s, question=f"{QUESTION} {p}", gold="7", num_tokens=3,
                     seconds=0.1 * s, finish=("stop", "length")[p % 2],
                     completion="\n\n".join([f"{name} {p}"] * (1 + p * s % 4)) + "\n\n \n\n" * p)
                for s in range(5) for p in range(4)]
        write(Path("out", name, "samples.jsonl"), reversed(rows))
        Path("out", name, "samples.json").write_text('{"settings": {"prompt": "Do {question}!"}}')
    return tmp_path / "out"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(judge, *options):
    score.main([judge, "--device", "cpu", "--tokens", "150", *options])


def scores(folder, file="scores.jsonl"):
    return {(r["problem"], r["sample"]): r["score"] for r in lines(folder / file)}


# ---------------------------------------------------------------------------- definitions
def next_token(lm, ids):
    """Log-probabilities of the next token: the text up to there run alone, in float64."""
    with torch.no_grad():
        return lm(torch.tensor([ids]))[0, -1].log_softmax(-1)


def literal_likelihood(lm, tokenizer, record):
    """The product over its tokens; an end that was reached counts, the prompt does not."""
    prompt = tokenizer.chat(f"Do {record['question']}!")
    answer = tokenizer.encode(record["completion"])
    answer += tokenizer.eos_ids[:1] if record["finish"] == "stop" else []
    with torch.no_grad():
        logits = lm(torch.tensor([prompt + answer]))[0].log_softmax(-1)
    return math.exp(sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(answer)))


def literal_process(lm, tokenizer, record):
    """RLHFlow's way, one dialogue a step: after each step the softmax of the logits of + and -."""
    steps = [s for s in record["completion"].split("\n\n") if s.strip()]
    ids, found, (plus, minus) = [], [], tokenizer.encode("+-")
    for turn, step in enumerate(steps):
        ids += tokenizer.chat(step if turn else f"{record['question']} {step}", first=turn == 0)
        found.append(next_token(lm, ids)[[plus, minus]].softmax(-1)[0].item())
        ids += [plus, tokenizer.eos_ids[0]]
    return found


@pytest.mark.parametrize("options, definition", [
    ([], literal_likelihood), (["--kind", "process"], lambda *a: literal_process(*a)[-1]),
    (["--kind", "process", "--aggregate", "min"], lambda *a: min(literal_process(*a))),
    (["--kind", "process", "--aggregate", "prod"], lambda *a: math.prod(literal_process(*a)))],
    ids=["likelihood", "last", "min", "prod"])
def test_every_sample_has_the_score_of_the_definition(out, judge, options, definition):
    """Of every model, in padded batches; the prompt is that of the samples. seconds grows, crc and
    num_tokens tell which text was read. Red if padding or a later step leaks into a score."""
    run(judge, *options)
    lm, tokenizer = LM.from_pretrained(judge, dtype=torch.float64).eval(), load_tokenizer(judge)
    for name in ("pure", "teacher"):
        found = {(r["problem"], r["sample"]): r for r in lines(out / name / "scores.jsonl")}
        assert len(found) == 20
        for record in lines(out / name / "samples.jsonl"):
            row = found[record["problem"], record["sample"]]
            assert row["score"] == pytest.approx(definition(lm, tokenizer, record), **CLOSE)
            assert row["crc"] == f"{zlib.crc32(record['completion'].encode()):08x}"
            assert list(row) == ["problem", "sample", "score", "num_tokens", "seconds", "crc"]
        seconds = [row["seconds"] for row in found.values()]
        assert seconds == sorted(seconds) and seconds[-1] > 0
    settings = json.loads((out / "pure" / "scores.json").read_text())["settings"]
    assert settings["weights"] == hub.fingerprint(judge) and settings["prompt"] == "Do {question}!"


def test_a_process_reward_model_reads_a_dialogue():
    """Question and step 1 are a turn, every other step is one of its own, each is answered with +;
    the positions are those before the answers. A system message comes once."""
    tokenizer = data.Tokenizer(data.arithmetic_definition() | dict(
        chat=[["<|question|>", "Be brief", "<|end|>", "<|question|>"], ["<|answer|>"]]))
    record = dict(question="Q?", completion="12 +7 = 19\n\n\n\n\\boxed{19}")
    text = score.process_text(tokenizer, record, "not {question}")
    assert tokenizer.decode(text.ids) == (
        "<|question|>Be brief<|end|><|question|>Q? 12 +7 = 19<|answer|>+<|end|>"
        "<|question|>\\boxed{19}<|answer|>+<|end|>")
    answer = tokenizer.special["<|answer|>"]
    assert text.positions == [i for i, token in enumerate(text.ids) if token == answer]
    assert len(score.process_text(tokenizer, dict(question="Q?", completion=""), "").positions) == 1


def test_batches_are_full_and_every_text_comes_once_and_early():
    """Within the budget with their padding, unless one text has more; the samples of a problem
    that come first are judged early."""
    texts = [score.Text(dict(place=i), [0] * (1 + i * 37 % 200), []) for i in range(2000)]
    found = list(score.batches(texts, 2000))
    places = [text.record["place"] for batch in found for text in batch]
    assert sorted(places) == list(range(2000))
    sizes = [len(batch) * max(len(text.ids) for text in batch) for batch in found]
    assert max(sizes) <= 2000 and sum(len(t.ids) for t in texts) > 0.85 * sum(sizes)
    assert max(abs(place - i) for i, place in enumerate(places)) < 400
    assert [len(batch) for batch in score.batches(texts[5:7], 3)] == [1, 1]


# ---------------------------------------------------------------------------- runs
@pytest.mark.parametrize("keep, torn", [(7, True), (7, False), (0, True)])
def test_a_killed_run_goes_on_and_later_samples_are_scored_too(out, judge, keep, torn):
    """Cut after some lines, in the middle of one: what is there stays, the rest is scored in other
    batches, and the clock goes on. A finished run changes nothing."""
    samples, path = out / "pure" / "samples.jsonl", out / "pure" / "scores.jsonl"
    rows = samples.read_bytes().splitlines(keepends=True)
    run(judge, "--model", "pure", "--to", "all.jsonl")
    samples.write_bytes(b"".join(rows[:12]))
    run(judge, "--model", "pure")
    kept = path.read_bytes().splitlines(keepends=True)
    assert len(kept) == 12
    path.write_bytes(b"".join(kept[:keep]) + (kept[keep][:-9] if torn else b""))
    samples.write_bytes(b"".join(rows))
    run(judge, "--model", "pure")
    assert path.read_bytes().startswith(b"".join(kept[:keep]))
    assert scores(out / "pure") == pytest.approx(scores(out / "pure", "all.jsonl"), **CLOSE)
    seconds = [row["seconds"] for row in lines(path)]
    assert len(seconds) == 20 and seconds == sorted(seconds)
    before = path.read_bytes()
    run(judge, "--model", "pure")
    assert path.read_bytes() == before and not (out / "teacher" / "scores.jsonl").exists()


def test_two_processes_share_the_samples(out, judge):
    """One file, each sample once, the scores of one process."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(ROOT / "score.py"), judge, "--device", "cpu", "--model", "pure", "--tokens", "150"],
        capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    two = scores(out / "pure")
    assert len(lines(out / "pure" / "scores.jsonl")) == len(two) == 20
    run(judge, "--model", "pure", "--to", "one.jsonl")
    assert two == pytest.approx(scores(out / "pure", "one.jsonl"), **CLOSE)


def test_by_default_the_teacher_judges(out, judge):
    """A student's own one: teacher-small judges pure-small."""
    for name in ("pure", "teacher"):
        os.rename(out / name, out / f"{name}-small")
    with pytest.raises((ValueError, FileNotFoundError), match="out/teacher-small"):
        score.main(["--device", "cpu"])
    for path in Path(judge).iterdir():
        (out / "teacher-small" / path.name).write_bytes(path.read_bytes())
    score.main(["--device", "cpu"])
    assert len(scores(out / "pure-small")) == len(scores(out / "teacher-small")) == 20


# ---------------------------------------------------------------------------- mistakes
def refused(out, judge, message, *options):
    """The run is refused with this message in one line, and no file is touched."""
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        run(judge, *options)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_scores_of_other_texts_or_another_judge_are_refused(out, judge, tiny_out):
    run(judge, "--model", "pure")
    for options, name in ((["--aggregate", "min"], "aggregate"), (["--kind", "process"], "kind"),
                          (["--dtype", "bfloat16"], "dtype")):
        refused(out, judge, f"{name} = .* there, .* now", "--model", "pure", *options)
    refused(out, str(tiny_out / "teacher"), "weights = .* there", "--model", "pure")
    path, good = out / "pure" / "samples.jsonl", lines(out / "pure" / "samples.jsonl")
    for change in (dict(completion="sampled again"), dict(sample=77)):
        write(path, [good[0] | change, *good[1:]])
        refused(out, judge, r"scores.jsonl holds a score of another text.*delete",
                "--model", "pure")
    write(path, good)
    with open(out / "pure" / "scores.jsonl", "a") as f:
        f.write('{"problem": 0}\n')
    refused(out, judge, "scores.jsonl, line 21: sample is missing", "--model", "pure")
    (out / "pure" / "scores.json").unlink()


def test_what_cannot_be_judged_is_named(out, judge, tmp_path):
    refused(out, judge, "no samples of other under out/: run python sample.py", "--model", "other")
    refused(out, judge, "no samples under empty/", "--out", "empty")
    refused(out, "nowhere", "nowhere")
    rows = lines(out / "pure" / "samples.jsonl")
    del rows[2]["question"]
    write(out / "pure" / "samples.jsonl", rows)
    refused(out, judge, "samples.jsonl, line 3: question is missing", "--model", "pure")
    for path in Path(judge).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    definition = json.loads((tmp_path / data.TOKENIZER_FILE).read_text())
    definition["ranks"][ord("-")] = None
    (tmp_path / data.TOKENIZER_FILE).write_text(json.dumps(definition))
    refused(out, str(tmp_path), 'no process reward model.*"-".*', "--kind", "process")


@pytest.mark.parametrize("name", ["samples.jsonl", "config.jsonl", "training.jsonl", "scores.json",
                                  "metrics.jsonl", "../scores.jsonl", "tokenizer.tiktoken.jsonl"])
def test_scores_overwrite_nothing_else(name):
    """Neither the file nor the .json beside it, which holds the settings."""
    with pytest.raises(argparse.ArgumentTypeError, match="is not"):
        score.file_name(name)
    assert score.file_name("likelihood.jsonl") == "likelihood.jsonl"
