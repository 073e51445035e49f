"""What distill.py --verifier promises: labels are the grades, AUC is a share of pairs, the verifier starts as the teacher and
learns what tells right from wrong, and a killed run ends where an uninterrupted one ends."""
import itertools
import json
import os
import random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close

from conftest import TOLERANCE
import distill
import verifier as verifying
from data import find_models, load_tokenizer, read_problems
from distill import collate
from model import Verifier
from sample import Completion
from verifier import Graded, packed, ranked_right, ranking, verdict_loss, verifier_from


# ------------------------------------------------------------------------------------------------ the figures
@pytest.mark.parametrize("levels", [4, 1000], ids=["many ties", "few ties"])
def test_ranked_right_counts_pairs(levels):
    """Against all pairs, one by one. Red if a tie counts whole or not at all, or if the direction is swapped."""
    rng = random.Random(0)
    scores, right = [rng.randrange(levels) / 7 for _ in range(60)], [rng.random() < 0.3 for _ in range(60)]
    pairs = [(a, b) for (a, x), (b, y) in itertools.product(zip(scores, right), repeat=2) if x and not y]
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)
    assert ranked_right(torch.tensor(scores), torch.tensor(right)) == (wins, len(pairs))
    assert ranked_right(torch.tensor(scores), torch.ones(60, dtype=torch.bool)) == (0, 0)


def test_the_ranking_by_hand():
    """Two problems, an easy one and a hard one: 4 of 6 pairs are in order, and 2 of the 3 within a problem. Red if pairs
    across problems count within them."""
    scores, right, problem = [3.0, 1.0, 2.0, -1.0, -2.0], [True, True, False, True, False], [0, 0, 0, 1, 1]
    found = ranking(*map(torch.tensor, (scores, right, problem)))
    assert (found["problems"], found["pairs"], found["pairs_within_problems"]) == (2, 6, 3)
    assert found["auc"] == pytest.approx(4 / 6)  # 3 > 2, -2; 1 > -2; -1 > -2; but not 1 > 2 nor -1 > 2
    assert found["auc_within_problems"] == pytest.approx(2 / 3)
    assert ranking(*map(torch.tensor, (scores[:2], right[:2], problem[:2])))["auc_within_problems"] is None


# ------------------------------------------------------------------------------------------------ the loss
ROWS = [([1, 2, 3], [11, 12, 49, 1]), ([4], [13, 0]), ([5, 6], [14, 15, 16, 17, 49, 0])]  # the last id is the verdict


@pytest.fixture
def verifier(make_lm):
    made = verifier_from(make_lm(tie_embeddings=True))
    torch.nn.init.normal_(made.score.weight)
    return made.requires_grad_(True)


def test_every_token_of_a_completion_is_told_its_verdict(verifier):
    """Row by row, without padding: from the last of the prompt to the last of the completion. Red if the verdict itself is
    read before it counts, if a row gets another's, or if the prompt or the padding counts."""
    losses = []
    for prompt, (*answer, verdict) in ROWS:
        odds = verifier(torch.tensor([prompt + answer]))[0, len(prompt) - 1:]
        losses += F.binary_cross_entropy_with_logits(odds, torch.full_like(odds, verdict), reduction="none")
    assert len(losses) == 4 + 2 + 6
    assert_close(verdict_loss(verifier, *collate(ROWS)), torch.stack(losses).mean())


def test_packed_pairs_are_the_pairs():
    pairs = packed(ROWS)
    assert [pairs[i] for i in range(len(pairs))] == ROWS
    assert pairs.bounds.tolist() == [[0, 3, 7], [7, 8, 10], [10, 12, 18]]


def test_the_evaluation_scores_as_one_text_at_a_time_would(verifier, make_lm, monkeypatch):
    """Red if padding, the wrong row or the token before the last is read, or if the prompt's likelihood counts."""
    teacher, seen = make_lm(seed=1), []
    graded = [Graded(0, prompt, answer[:-1], i == 1) for i, (prompt, answer) in enumerate(ROWS[:2])]
    monkeypatch.setattr(verifying.Verifier, "from_pretrained", lambda *_: verifier)
    monkeypatch.setattr(verifying.LM, "from_pretrained", lambda *_: teacher)
    monkeypatch.setattr(verifying, "ranking", lambda scores, right, _: seen.append(dict(zip(right.tolist(), scores.tolist()))))
    found = verifying.evaluate("", "", graded, distill.parse_args(["--device", "cpu"]))
    odds, likelihood = {}, {}
    for g in graded:
        ids = torch.tensor([g.prompt + g.answer])
        odds[g.right] = verifier(ids)[0, -1].item()
        likely = teacher(ids).log_softmax(-1)[0, len(g.prompt) - 1:-1]
        likelihood[g.right] = sum(row[i].item() for row, i in zip(likely, g.answer))
    close = dict(rel=TOLERANCE[torch.float32], abs=TOLERANCE[torch.float32])
    assert seen == [pytest.approx(odds, **close), pytest.approx(likelihood, **close)]
    p = torch.tensor([odds[True], odds[False]]).sigmoid()
    assert found["brier"] == pytest.approx((((p[0] - 1) ** 2 + p[1] ** 2) / 2).item(), rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_the_verifier_starts_as_the_teacher(make_lm, tied):
    """Its residual stream is the teacher's, and every text is 50:50. Red if a weight is left at random."""
    teacher = make_lm(tie_embeddings=tied)
    made, tokens = verifier_from(teacher), torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(made.trunk(tokens), teacher.trunk(tokens))
    assert made(tokens).shape == (2, 9) and not made(tokens).any()


# ------------------------------------------------------------------------------------------------ the command
@pytest.fixture
def command(tmp_path, tiny_out, task_file):
    """command("--option", ...): distill.py --verifier with the tiny teacher, a second; returns OUT/verifier."""
    (tmp_path / "prompt").write_text("Q: {question}")

    def run(*options):
        distill.main(["--task", task_file, "--prompt-file", str(tmp_path / "prompt"), "--teacher", str(tiny_out / "teacher"),
                      "--out", str(tmp_path / "out"), "--device", "cpu", "--verifier", "--verifier-from", "teacher",
                      "--verifier-samples", "3", "--verifier-steps", "30", "--batch-tokens", "512", "--data-max-new-tokens", "30",
                      *options])
        return tmp_path / "out" / "verifier"
    return run


@pytest.fixture
def told(monkeypatch, task_file):
    """In place of sampling: completions of which every second is right, and some say so. Collects what was asked for."""
    asked, problems, tokenizer = [], read_problems(task_file), load_tokenizer("arithmetic")

    def fake(lm, prompts, *, num_samples, skip, **_):
        asked.append({(p, s) for p in range(len(prompts)) for s in range(num_samples)} - skip)
        for problem, sample in sorted(asked[-1]):
            right = (problem + sample) % 2 == 0
            text = f"{'so' if right else 'or'} \\boxed{{{int(problems[problem].answer) + (not right)}}}"
            yield Completion(problem, sample, tokenizer.encode(text), "length" if sample == 2 else "stop", 0.1)
    monkeypatch.setattr(distill, "generate", fake)
    return asked


@pytest.fixture
def lenient(monkeypatch):
    """The tiny teacher is hardly ever right: here every answer with an even last digit is."""
    monkeypatch.setattr(verifying, "is_correct", lambda answer, gold: (answer or "1")[-1] in "02468")


def records(folder):
    return [json.loads(line) for line in (folder.parent / "verifier-data.jsonl").read_text().splitlines()]


def test_the_verifier_is_trained_on_graded_samples(command, told, monkeypatch):
    """Hand-made completions: 60 problems x 3. Red if a label is wrong, if a held-out problem is trained on, if a completion
    that was cut off gets the stop token, or if one that ended does not."""
    trained_on, held_out, pack, evaluate = [], [], verifying.packed, verifying.evaluate
    monkeypatch.setattr(verifying, "packed", lambda pairs: (trained_on.extend(pairs), pack(pairs))[1])
    monkeypatch.setattr(verifying, "evaluate", lambda *a: (held_out.extend(a[2]), evaluate(*a))[1])
    folder = command()
    tokenizer = load_tokenizer("arithmetic")
    expected = {False: [], True: []}
    for r in records(folder):
        answer = tokenizer.encode(r["completion"]) + tokenizer.eos_ids * (r["sample"] < 2)
        right = (r["problem"] + r["sample"]) % 2 == 0
        expected[r["problem"] % 10 == 0].append((tokenizer.chat(f"Q: {r['question']}"), answer, right))
    assert sorted((p, a[:-1], bool(a[-1])) for p, a in trained_on) == sorted(expected[False]) and len(trained_on) == 162
    assert sorted((g.prompt, g.answer, g.right) for g in held_out) == sorted(expected[True]) and len(held_out) == 18


def test_a_toy_that_can_be_learnt_is_learnt(command, told):
    """The first token of a completion tells. Red if labels and rows are mixed up anywhere from the file to the evaluation,
    or if the verifier that is saved is not the one that was trained."""
    found = json.loads((command("--verifier-steps", "60", "--verifier-lr", "0.01") / "verifier.json").read_text())
    assert found["verifier"]["problems"] == 6 and found["completions"] == 18 and found["brier"] < 0.1
    assert found["verifier"]["auc"] > 0.95 and found["verifier"]["auc_within_problems"] > 0.95


def test_the_verifier_is_a_checkpoint_beside_the_models(command, lenient, capsys):
    """With a real sampler: it loads, scores, and is no model to sample from; students are not made; a second run finds it
    finished and says the same."""
    folder = command()
    said = capsys.readouterr().out.splitlines()[-2:]
    lm, tokens = Verifier.from_pretrained(folder), torch.ones(1, 5, dtype=torch.long)
    assert lm(tokens).shape == (1, 5) and lm.score.weight.any()
    assert load_tokenizer(str(folder)).definition == load_tokenizer("arithmetic").definition
    assert {"verifier", "verifier-data.json", "verifier-data.jsonl"} == set(os.listdir(folder.parent))
    with pytest.raises(ValueError, match="no models under"):
        find_models(str(folder.parent))
    assert len(records(folder)) == 180 and said[0].startswith("18 held-out completions of 6 problems, ")
    before = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    command()
    assert {f.name: f.stat().st_mtime_ns for f in folder.iterdir()} == before
    assert capsys.readouterr().out.splitlines()[-2:] == said


# ------------------------------------------------------------------------------------------------ stop and resume
class Killed(Exception):
    pass


def killed_after(monkeypatch, owner, name, calls):
    """From the `calls`-th call of owner.name on, everything ends right after it."""
    function, done = getattr(owner, name), []

    def once_more(*arguments, **named):
        result = function(*arguments, **named)
        done.append(1)
        if len(done) == calls:
            raise Killed
        return result
    monkeypatch.setattr(owner, name, once_more)


@pytest.mark.parametrize("owner, name, calls", [(distill, "record_of", 50), (distill.Run, "save", 2), (distill.Run, "finish", 1)],
                         ids=["while it samples", "while it trains", "before it evaluates"])
def test_a_killed_run_ends_where_an_uninterrupted_one_ends(command, lenient, tmp_path, monkeypatch, owner, name, calls):
    """Bit for bit. Red if a sample is drawn anew or lost, if training starts over, or if an evaluation is left out."""
    options = ("--save-every", "10", "--log-every", "3")
    os.rename(command(*options).parent, tmp_path / "straight")
    with monkeypatch.context() as patch:
        killed_after(patch, owner, name, calls)
        with pytest.raises(Killed):
            command(*options)
    assert not (tmp_path / "out" / "verifier" / "verifier.json").exists()
    again, straight = command(*options), tmp_path / "straight" / "verifier"
    one, two = load_file(straight / "model.safetensors"), load_file(again / "model.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert (straight / "verifier.json").read_text() == (again / "verifier.json").read_text()
    assert sorted(os.listdir(straight)) == sorted(os.listdir(again))


@pytest.mark.parametrize("options, name", [
    (["--verifier-problems", "50"], "problems"), (["--data-temperature", "0.5"], "temperature"), (["--seed", "1"], "seed"),
    (["--verifier-samples", "4"], "samples")], ids=str)
def test_data_of_other_settings_are_refused(command, told, tmp_path, options, name):
    """With and without the verifier that was made of them. Nothing is overwritten."""
    folder, data = command("--verifier-steps", "1"), tmp_path / "out" / "verifier-data.jsonl"
    before = data.read_bytes(), (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=rf"verifier was made with other settings .*\b{name} = "):
        command("--verifier-steps", "1", *options)
    assert before == (data.read_bytes(), (folder / "model.safetensors").read_bytes())
    os.rename(folder, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"verifier-data.jsonl was made with other settings .*\b{name} = "):
        command(*options)
    assert before[0] == data.read_bytes() and not folder.exists()


@pytest.mark.parametrize("options, message", [
    (["--verifier-from", "nobody"], "no model .*nobody.*--verifier-from teacher"), (["--verifier-problems", "1"], "^2$"),
    (["--verifier-steps", "0"], "^2$"), (["--verifier-samples", "0"], "^2$")], ids=str)
def test_a_mistake_is_one_clear_line(command, tmp_path, options, message):
    with pytest.raises((ValueError, SystemExit), match=message):
        command(*options)
    assert not (tmp_path / "out").exists()


def test_by_default_the_pure_student_writes_and_else_the_teacher(tmp_path):
    args = distill.parse_args(["--verifier", "--out", str(tmp_path)])
    assert verifying.generator_folder("given", args) == "given"
    (tmp_path / "pure").mkdir()
    (tmp_path / "pure" / "config.json").write_text("{}")
    assert verifying.generator_folder("given", args) == str(tmp_path / "pure")


def test_completions_that_are_all_wrong_are_refused(command, told, monkeypatch):
    monkeypatch.setattr(verifying, "is_correct", lambda answer, gold: False)
    with pytest.raises(ValueError, match="0 are right, but a verifier learns from both"):
        command()
