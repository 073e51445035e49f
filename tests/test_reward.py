"""What reward.py and sample.py --score promise: the scores are those of the models' own authors, of whatever batch, and
sample.py --score keeps them beside the samples they belong to. Tiny random models."""
import json
import math
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from conftest import TOLERANCE
import data
import sample
from data import load_tokenizer
from model import LM, Verifier, fingerprint
from reward import AGGREGATE, POOL, RewardModel, Text, batches, process_text, steps_of, verifier_text

QUESTION = "Start with 4821. In each of 2 rounds do +7 3 times."
COMPLETIONS = ["4821 +7 = 4828\n\n4828 +7 = 4835\n\n\\boxed{4835}", "12", "", "So é🤖\n\n\n\n7 x7 = 49\n\n",
               "\n\n".join(f"{n} +7 = {n + 7}" for n in range(1000, 1100, 7))]
RECORDS = [dict(problem=i, sample=0, question=f"{QUESTION} {i}", completion=completion, finish=("stop", "length")[i % 2])
           for i, completion in enumerate(COMPLETIONS)]


def save(folder, lm, tokenizer="arithmetic"):
    lm.save_pretrained(folder)
    load_tokenizer(tokenizer).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def process_model(make_lm, tmp_path_factory):
    """A folder with a random Llama, which says "+" and "-" as readily as anything; logits far enough apart to matter."""
    lm = make_lm(vocab_size=597, tie_embeddings=False)
    lm.lm_head.weight *= 4
    return save(tmp_path_factory.mktemp("process"), lm)


@pytest.fixture(scope="module")
def verifier(make_lm, tmp_path_factory):
    torch.manual_seed(1)
    lm = Verifier(make_lm(vocab_size=597).config).eval().requires_grad_(False)
    lm.score.weight.normal_()
    return save(tmp_path_factory.mktemp("verifier"), lm)


# ------------------------------------------------------------------------------------------------ what they read
@pytest.mark.parametrize("completion, steps", [
    ("one\ntwo", ["one\ntwo"]), ("one\n\ntwo\nthree\n\nfour", ["one", "two\nthree", "four"]), ("", [""]), ("\n\n\n\n", [""]),
    ("one\n\n", ["one"]), ("one\n\n \n\n\n\ntwo", ["one", "two"]), ("one\n\n\ntwo", ["one", "\ntwo"])])
def test_steps_stand_between_blank_lines(completion, steps):
    """A blank one is no step: a text that ends in a blank line would else be judged by what is not there."""
    assert steps_of(completion) == steps


def test_a_process_reward_model_reads_a_dialogue():
    """Question and step 1 are the first turn, every other step is one of its own, and each is answered with "+". The
    positions are those just before the answers. Red if the system message, here "Be brief", comes in every turn."""
    tokenizer = data.Tokenizer(data.arithmetic_definition() | dict(
        chat=[["<|question|>", "Be brief", "<|end|>", "<|question|>"], ["<|answer|>"]]))
    text = process_text(tokenizer, dict(question="Q?", completion="12 +7 = 19\n\n\\boxed{19}"))
    assert tokenizer.decode(text.ids) == ("<|question|>Be brief<|end|><|question|>Q? 12 +7 = 19<|answer|>+<|end|>"
                                          "<|question|>\\boxed{19}<|answer|>+<|end|>")
    answer = tokenizer.definition["special"]["<|answer|>"]
    assert text.positions == [i for i, token in enumerate(text.ids) if token == answer]


def test_a_verifier_reads_what_the_model_read_and_wrote():
    """Prompt, text, and the end if it was reached; the last of it is judged. Red if the template is forgotten."""
    tokenizer, record = load_tokenizer("arithmetic"), dict(question="Q?", completion="12")
    texts = [verifier_text(tokenizer, record | dict(finish=finish), "<{question}>") for finish in ("stop", "length")]
    assert [tokenizer.decode(t.ids) for t in texts] == ["<|question|><Q?><|answer|>12<|end|>", "<|question|><Q?><|answer|>12"]
    assert [t.positions for t in texts] == [[len(t.ids) - 1] for t in texts]


# ------------------------------------------------------------------------------------------------ their scores
def literal_process(lm, tokenizer, record):
    """RLHFlow's way: the dialogue up to each step run alone, softmax of two of the last position's logits; in float64."""
    steps, ids, found = [s for s in record["completion"].split("\n\n") if s.strip()] or [""], [], []
    plus, minus = tokenizer.encode("+-")
    for turn, step in enumerate(steps):
        ids = ids + tokenizer.chat(step if turn else record["question"] + " " + step, first=turn == 0)
        found.append(lm.double()(torch.tensor([ids]))[0, -1][[plus, minus]].softmax(-1)[0].item())
        ids = ids + [plus, tokenizer.eos_ids[0]]
    return found


def test_every_step_is_judged_as_if_the_text_ended_there(make_lm, pattern, tmp_path):
    """One pass over the dialogue, in a padded batch, for any mixers: red if padding or a later step leaks into p, or if
    the position is off by one."""
    lm = make_lm(pattern, vocab_size=597)
    reward = RewardModel(save(tmp_path, lm))
    found = reward.judge([process_text(reward.tokenizer, record) for record in RECORDS])
    assert list(map(len, found)) == [3, 1, 1, 2, 15]
    for steps, record in zip(found, RECORDS):
        assert steps == pytest.approx(literal_process(lm, reward.tokenizer, record), abs=1e-5)
    assert max(sum(found, [])) - min(sum(found, [])) > 0.1


def test_process_scores_are_transformers(process_model):
    """search-and-learn's batched way: "ки" in place of every "+" marks what follows the positions to read."""
    transformers = pytest.importorskip("transformers")
    reward, theirs = RewardModel(process_model), transformers.LlamaForCausalLM.from_pretrained(process_model).eval()
    texts, (plus, minus) = [process_text(reward.tokenizer, record) for record in RECORDS], reward.tokenizer.encode("+-")
    for text, found in zip(texts, reward.judge(texts)):
        is_answer = [i + 1 for i in text.positions]
        assert [text.ids[i] for i in is_answer] == [plus] * len(found)
        with torch.no_grad():
            logits = theirs(torch.tensor([text.ids])).logits[0]
        expected = logits[[i - 1 for i in is_answer]][:, [plus, minus]].softmax(-1)[:, 0]
        assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)


def test_verifier_scores_are_transformers(verifier):
    """sigmoid of LlamaForSequenceClassification's only logit, one text at a time."""
    transformers = pytest.importorskip("transformers")
    reward, theirs = RewardModel(verifier), transformers.LlamaForSequenceClassification.from_pretrained(verifier).eval()
    texts = [verifier_text(reward.tokenizer, record, "{question}") for record in RECORDS]
    with torch.no_grad():
        expected = [[theirs(torch.tensor([text.ids])).logits.sigmoid().item()] for text in texts]
    assert_close(torch.tensor(reward.judge(texts)), torch.tensor(expected), rtol=0, atol=1e-5)
    assert max(expected)[0] - min(expected)[0] > 0.1


def texts_of(reward):
    return [verifier_text(reward.tokenizer, record, "{question}") if reward.kind == "verifier" else
            process_text(reward.tokenizer, record) for record in RECORDS]


@pytest.mark.parametrize("kind", ["process_model", "verifier"])
def test_bfloat16_is_close_to_float32(kind, request):
    folder = request.getfixturevalue(kind)
    full, half = (RewardModel(folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.lm.dtype == torch.bfloat16
    for exact, rounded in zip(full.judge(texts_of(full)), half.judge(texts_of(half))):
        assert exact != rounded and rounded == pytest.approx(exact, abs=0.05)


def test_in_bfloat16_the_head_is_not_rounded(process_model):
    """p as fine as the residual stream allows: rounded logits leave texts with the same score, and the first of them wins."""
    reward = RewardModel(process_model, dtype=torch.bfloat16)
    plus, minus = reward.tokenizer.encode("+-")
    for text in texts_of(reward):
        with torch.inference_mode():
            x = reward.lm.model.norm(reward.lm.trunk(torch.tensor([text.ids])))[0, text.positions].double()
            logits = x @ reward.lm.lm_head.weight[[plus, minus]].double().T
        assert reward.judge([text])[0] == pytest.approx(logits.softmax(-1)[:, 0].tolist(), abs=TOLERANCE[torch.float32])


def test_a_score_is_the_last_step_the_worst_or_all():
    assert {name: of([0.5, 0.25, 0.75]) for name, of in AGGREGATE.items()} == dict(last=0.75, min=0.25, prod=0.09375)


def test_a_model_without_signs_is_refused(process_model, tmp_path):
    shutil.copytree(process_model, tmp_path / "model")
    definition = json.loads((tmp_path / "model" / data.TOKENIZER_FILE).read_text())
    definition["ranks"][ord("-")] = None
    (tmp_path / "model" / data.TOKENIZER_FILE).write_text(json.dumps(definition))
    with pytest.raises(ValueError, match=r'no process reward model.*"-".*\[43\] and \[\]'):
        RewardModel(str(tmp_path / "model"))


# ------------------------------------------------------------------------------------------------ batches
def random_texts(count, seed=0):
    lengths = torch.randint(1, 200, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Text(dict(problem=i), [1] * length, [length - 1]) for i, length in enumerate(lengths)]


@pytest.mark.parametrize("budget", [1, 199, 1000, 10 ** 9])
def test_batches_hold_every_text_once_and_keep_to_the_budget(budget):
    texts = random_texts(500)
    found = list(batches(iter(texts), budget))
    assert sorted(text.record["problem"] for batch in found for text in batch) == list(range(500))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(len(text.ids) for text in batch) <= budget
    assert len(found) == {1: 500, 10 ** 9: 1}.get(budget, len(found))
    assert list(batches(iter([]), budget)) == []


def test_batches_pad_little_and_keep_the_order_of_the_samples():
    """Sorted within a few batches only: a text's place changes by no more than these hold, so that the first sample of
    every problem is scored long before the last."""
    texts = random_texts(2000)
    found = list(batches(texts, 2000))
    padded, real = sum(len(b) * len(b[0].ids) for b in found), sum(len(text.ids) for text in texts)
    assert real < padded < 1.15 * real
    order = [text.record["problem"] for batch in found for text in batch]
    furthest = max(abs(place - i) for place, i in enumerate(order))
    assert furthest <= 1.3 * POOL * 2000 / 100 < len(texts) / 5


@pytest.mark.parametrize("kind", ["process_model", "verifier"])
def test_scores_do_not_depend_on_the_batch(kind, request):
    """Each text alone, all at once, and in pairs."""
    reward, found = RewardModel(request.getfixturevalue(kind)), []
    for budget in (1, 10 ** 6, 120):
        scores = {text.record["problem"]: steps for batch in batches(texts_of(reward), budget)
                  for text, steps in zip(batch, reward.judge(batch))}
        found.append(sum((scores[i] for i in range(len(RECORDS))), []))
    assert found[1] == pytest.approx(found[0], abs=1e-5) and found[2] == pytest.approx(found[0], abs=1e-5)


# ------------------------------------------------------------------------------------------------ sample.py --score
ROOT = Path(__file__).resolve().parents[1]
PROBLEMS, SAMPLES = 4, 5


@pytest.fixture
def out(tmp_path, monkeypatch):
    """out/ of a new current folder with samples of two models, as sample.py writes them."""
    monkeypatch.chdir(tmp_path)
    for name in ("pure", "teacher"):
        (tmp_path / "out" / name).mkdir(parents=True)
        rows = [dict(problem=p, sample=s, question=f"{QUESTION} {p}", gold="7", num_tokens=3, seconds=0.1 * s, finish="stop",
                     completion="\n\n".join([f"{name} {p} {s}"] * (1 + p * s % 4)))
                for s in range(SAMPLES) for p in range(PROBLEMS)]
        (tmp_path / "out" / name / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
        (tmp_path / "out" / name / "samples.json").write_text(json.dumps(dict(settings=dict(prompt="Do {question}!"))))
    return tmp_path / "out"


def score(model, *options):
    sample.main(["--device", "cpu", "--score-tokens", "150", "--score", model, *options])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scores_by_sample(folder, field="score"):
    return {(r["problem"], r["sample"]): r[field] for r in lines(folder / "scores.jsonl")}


def test_every_sample_gets_a_score_in_the_order_of_the_samples(out, process_model):
    """Of every model with samples, every problem's sample 0 first, whatever order their lines are in (exactly so in
    batches of one). seconds grows; crc tells which text was scored."""
    score(process_model, "--score-tokens", "1")
    reward = RewardModel(process_model)
    for name in ("pure", "teacher"):
        samples = {(r["problem"], r["sample"]): r for r in lines(out / name / "samples.jsonl")}
        rows = lines(out / name / "scores.jsonl")
        assert [(r["problem"], r["sample"]) for r in rows] == sorted(samples, key=lambda owner: owner[::-1])
        seconds = [r["seconds"] for r in rows]
        assert seconds == sorted(seconds) and 0 < seconds[0] < seconds[-1]
        for row in rows:
            assert list(row) == ["problem", "sample", "score", "num_tokens", "seconds", "crc", "steps"]
            record = samples[row["problem"], row["sample"]]
            text = process_text(reward.tokenizer, record)
            assert row["num_tokens"] == len(text.ids) and row["crc"] == f"{zlib.crc32(record['completion'].encode()):08x}"
            assert row["steps"] == pytest.approx(reward.judge([text])[0], abs=1e-5) and row["score"] == pytest.approx(
                row["steps"][-1], abs=TOLERANCE[torch.float32])
    assert max(len(row["steps"]) for row in rows) == 4


def test_a_verifier_scores_with_the_prompt_of_the_samples(out, verifier):
    """samples.json says what stood around the question; without it the task's own prompt is taken."""
    reward = RewardModel(verifier)
    (out / "teacher" / "samples.json").unlink()
    score(verifier, "--model", "anywhere/pure", "somewhere/teacher/", "--task", "gsm8k")
    for name, template in dict(pure="Do {question}!", teacher=data.INSTRUCTION).items():
        for record in lines(out / name / "samples.jsonl"):
            [[p]] = reward.judge([verifier_text(reward.tokenizer, record, template)])
            assert scores_by_sample(out / name)[record["problem"], record["sample"]] == pytest.approx(p, abs=1e-5)
        assert "steps" not in lines(out / name / "scores.jsonl")[0]
        assert json.loads((out / name / "scores.json").read_text())["settings"]["prompt"] == template


def test_the_likelihood_is_the_product_over_the_completions_tokens(out, process_model):
    """Any language model judges so. Token by token, one text at a time; its end counts, the prompt does not. In a file of
    its own, beside the scores of another model."""
    score(process_model, "--model", "pure")
    score(process_model, "--model", "pure", "--aggregate", "likelihood", "--score-to", "likelihood.jsonl")
    tokenizer, lm = data.load_tokenizer(process_model), LM.from_pretrained(process_model, dtype=torch.float64).eval()
    rows = {(r["problem"], r["sample"]): r for r in lines(out / "pure" / "likelihood.jsonl")}
    for record in lines(out / "pure" / "samples.jsonl"):
        prompt = tokenizer.chat(f"Do {record['question']}!")
        ids = prompt + tokenizer.encode(record["completion"]) + tokenizer.eos_ids[:1]
        with torch.no_grad():
            logp = lm(torch.tensor([ids]))[0].log_softmax(-1)
        expected = sum(logp[at, ids[at + 1]].item() for at in range(len(prompt) - 1, len(ids) - 1))
        row = rows[record["problem"], record["sample"]]
        assert math.log(row["score"]) == pytest.approx(expected, rel=1e-5) and "steps" not in row
    settings = json.loads((out / "pure" / "likelihood.json").read_text())["settings"]
    assert (settings["kind"], settings["aggregate"]) == ("likelihood", None)
    assert lines(out / "pure" / "scores.jsonl")[0]["steps"]


@pytest.mark.parametrize("line", ["5", "{}", '{"problem": 0, "sample": 0, "crc": "00000000"}'])
def test_a_line_that_is_no_score_is_named(out, process_model, line):
    score(process_model, "--model", "pure")
    with open(out / "pure" / "scores.jsonl", "a") as f:
        f.write(line + "\n")
    with pytest.raises(ValueError, match="scores.jsonl, line 21 is no score"):
        score(process_model, "--model", "pure")


@pytest.mark.parametrize("name", ["samples.jsonl", "../scores.jsonl", "scores.txt"])
def test_scores_overwrite_nothing_else(out, process_model, name):
    before = (out / "pure" / "samples.jsonl").read_bytes()
    with pytest.raises(ValueError, match="--score-to"):
        score(process_model, "--score-to", name)
    assert (out / "pure" / "samples.jsonl").read_bytes() == before


@pytest.mark.parametrize("aggregate, of", [("min", min), ("prod", math.prod)])
def test_the_steps_are_aggregated_as_asked(out, process_model, aggregate, of):
    score(process_model, "--model", "pure", "--aggregate", aggregate)
    for row in lines(out / "pure" / "scores.jsonl"):
        assert row["score"] == pytest.approx(of(row["steps"]), abs=1e-5)


def test_the_summary_says_which_model_how_and_how_fast(out, process_model):
    score(process_model, "--model", "pure", "--dtype", "bfloat16")
    summary, rows = json.loads((out / "pure" / "scores.json").read_text()), lines(out / "pure" / "scores.jsonl")
    assert summary["settings"] == dict(
        kind="process", aggregate="last", prompt=None, score_tokens=150, processes=1, device="cpu", dtype="bfloat16",
        weights=fingerprint(process_model))
    assert summary["reward_model"] == process_model and summary["dtype"] == "bfloat16"
    assert summary["params"] == LM.from_pretrained(process_model).num_parameters()
    assert summary["tokens"] == sum(r["num_tokens"] for r in rows) and summary["seconds"] == pytest.approx(
        rows[-1]["seconds"], abs=1e-3)
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / rows[-1]["seconds"], rel=0.05)
    assert {"device", "date", "threads"} <= summary.keys()


@pytest.mark.parametrize("keep, torn", [(7, True), (7, False), (0, True), (19, True)])
def test_a_killed_run_goes_on_and_ends_the_same(out, process_model, keep, torn, capsys):
    """Cut after some lines, in the middle of one: the rest is scored in other batches, and the clock goes on."""
    score(process_model, "--model", "pure")
    path, whole = out / "pure" / "scores.jsonl", scores_by_sample(out / "pure", "steps")
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(rows[:keep]) + (rows[keep][:-9] if torn else b""))
    score(process_model, "--model", "pure")
    assert path.read_bytes().startswith(b"".join(rows[:keep]))
    again = scores_by_sample(out / "pure", "steps")
    assert again.keys() == whole.keys() and all(again[key] == pytest.approx(whole[key], abs=1e-5) for key in whole)
    seconds = [r["seconds"] for r in lines(path)]
    assert len(seconds) == PROBLEMS * SAMPLES and seconds == sorted(seconds) and (keep == 0 or seconds[keep] > seconds[keep - 1])
    assert json.loads((out / "pure" / "scores.json").read_text())["tokens"] == sum(r["num_tokens"] for r in lines(path))
    before = path.read_bytes()
    capsys.readouterr()
    score(process_model, "--model", "pure")
    assert path.read_bytes() == before and "scores.jsonl: finished" in capsys.readouterr().out


def test_more_samples_are_scored_later(out, process_model):
    """Scoring may start while samples are still missing."""
    path = out / "pure" / "samples.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(rows[:9]))
    score(process_model)
    assert len(lines(out / "pure" / "scores.jsonl")) == 9
    path.write_text("".join(rows))
    score(process_model)
    assert len(scores_by_sample(out / "pure")) == len(lines(out / "pure" / "scores.jsonl")) == 20


def test_two_processes_share_the_samples(out, process_model):
    """Under torchrun: one file, each sample once, the scores of one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "sample.py"),
               "--device", "cpu", "--model", "pure", "--score-tokens", "150", "--score", process_model]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    two, rows = scores_by_sample(out / "pure"), lines(out / "pure" / "scores.jsonl")
    summary = json.loads((out / "pure" / "scores.json").read_text())
    assert summary["settings"]["processes"] == 2 and summary["tokens"] == sum(r["num_tokens"] for r in rows)
    (out / "pure" / "scores.jsonl").unlink()
    score(process_model, "--model", "pure")
    assert len(rows) == len(two) == 20 and two == pytest.approx(scores_by_sample(out / "pure"), abs=1e-5)


# ------------------------------------------------------------------------------------------------ mistakes
@pytest.fixture
def fails(out, capsys, monkeypatch):
    """Score as __main__ does; it must end with code 2 and one line, and touch no file under out/."""
    def run(model, *parts, options=()):
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", "--score-tokens", "150", "--score", model, *options])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            data.run(sample.main)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith("sample.py: error: ") and error.count("\n") == 1
        for part in parts:
            assert part in error, error
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    return run


def test_no_samples_is_a_mistake(out, fails, process_model):
    fails(process_model, "no samples under empty/", "python sample.py", options=["--out", "empty"])
    fails(process_model, "no out/other/samples.jsonl", "python sample.py", options=["--model", "out/pure", "out/other"])
    (out / "pure" / "samples.jsonl").write_text("")
    fails(process_model, "out/pure/samples.jsonl is empty", "python sample.py", options=["--model", "pure"])


def test_a_record_without_a_text_is_named_by_its_line(out, fails, process_model):
    path = out / "pure" / "samples.jsonl"
    rows = lines(path)
    del rows[2]["question"], rows[2]["completion"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fails(process_model, "out/pure/samples.jsonl, line 3 lacks question, completion", options=["--model", "pure"])
    path.write_text('"text"\n')
    fails(process_model, "samples.jsonl, line 1 lacks problem", options=["--model", "pure"])


def test_a_model_that_cannot_judge_is_a_mistake(out, fails, process_model, tmp_path):
    fails("nowhere", "nowhere")
    shutil.copytree(process_model, tmp_path / "model")
    (tmp_path / "model" / data.TOKENIZER_FILE).unlink()
    fails("model", "no tokenizer in model")
    definition = json.loads((Path(process_model) / data.TOKENIZER_FILE).read_text())
    definition["ranks"][ord("-")] = None
    (tmp_path / "model" / data.TOKENIZER_FILE).write_text(json.dumps(definition))
    fails("model", 'model is no process reward model', '"-"', "[43] and []")


@pytest.mark.parametrize("change", [dict(completion="sampled again"), dict(sample=77)], ids=str)
def test_scores_of_other_samples_are_a_mistake(out, fails, process_model, change):
    """The samples were deleted and made anew: their scores must not stay."""
    score(process_model, "--model", "pure")
    path = out / "pure" / "samples.jsonl"
    rows = lines(path)
    rows[3] |= change
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = f"out/pure/scores.jsonl holds scores of other samples (problem {rows[3]['problem']}, sample "
    fails(process_model, where, "delete out/pure/scores.jsonl", options=["--model", "pure"])


def test_other_settings_are_a_mistake(out, fails, process_model, verifier):
    score(process_model, "--model", "pure")
    for options, part in [(["--aggregate", "min"], "aggregate = 'last' there, 'min' now"), (["--dtype", "bfloat16"], "dtype = "),
                          (["--score-tokens", "151"], "score_tokens = 150 there, 151 now")]:
        fails(process_model, "out/pure/scores.jsonl", part, "delete it", options=["--model", "pure", *options])
    fails(verifier, "kind = 'process' there, 'verifier' now", "weights = ", options=["--model", "pure"])
    (out / "pure" / "scores.json").unlink()  # scores of another tool
    fails(process_model, "out/pure/scores.jsonl was made with other settings", options=["--model", "pure"])
