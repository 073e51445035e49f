"""What grade.py promises: votes and estimators are the textbook ones, only complete rounds count,
and time is what was measured. Small numbers, worked out by hand or by brute force."""
import functools
import itertools
import json

import numpy as np
import pytest
import torch
from conftest import TOLERANCE

import grade
from common import crc

approx = functools.partial(pytest.approx, rel=TOLERANCE[torch.float64],
                           abs=TOLERANCE[torch.float64])


def write_model(out, name, answers, golds, seconds=None, **sidecar):
    """out/<name>/samples.jsonl: answers[p][s], finished at seconds[p][s], by default 1, 2, ..."""
    (out / name).mkdir(parents=True)
    records = [dict(problem=p, sample=s, question=f"question {p}", gold=golds[p], num_tokens=10,
                    completion="no idea" if answer is None else f"so it is \\boxed{{{answer}}}",
                    finish="stop", seconds=seconds[p][s] if seconds else 1.0 + s)
               for p, row in enumerate(answers) for s, answer in enumerate(row)]
    (out / name / "samples.json").write_text(json.dumps(sidecar))
    path = out / name / "samples.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in sorted(
        records, key=lambda r: r["seconds"])))
    return path


def write_scores(out, name, scores, seconds, file="scores.jsonl"):
    """A judge's file beside the samples: scores[p][s], there at seconds[p][s]."""
    with open(out / name / file, "w") as f:
        for r in map(json.loads, (out / name / "samples.jsonl").read_text().splitlines()):
            p, s = r["problem"], r["sample"]
            f.write(json.dumps(dict(problem=p, sample=s, score=scores[p][s], crc=crc(
                r["completion"]), seconds=seconds[p][s])) + "\n")


def run_main(out, *arguments):
    grade.main(["--out", str(out), *arguments])
    return json.loads((out / "results.json").read_text())


# ---- votes
def test_votes_worked_out_by_hand():
    """Ties go to the earliest, None never wins over an answer, equal answers count together."""
    for answers, winner in ((["1", "2", "2"], "2"), (["1", "2", "2", "1"], "1"), ([], None),
                            ([None, None, None, "3"], "3"), ([None, None], None),
                            (["3", "3", "1.0", "1", "1.00"], "1.0")):
        assert grade.majority_vote(answers) == winner
    for vote, answers, scores, winner in (
            (grade.weighted_vote, ["1", "2", "2.0", None], [0.5, 0.3, 0.3, 9.0], "2"),  # 0.6 > 0.5
            (grade.weighted_vote, ["1", "2"], [-1.0, -1.0], "1"),
            (grade.weighted_vote, ["1", "1", "2"], [-1.0, -1.0, -1.5], "2"),
            (grade.weighted_vote, [], [], None), (grade.best_of_n, [None], [1.0], None),
            (grade.best_of_n, ["1", "2", "2.0", None], [0.5, 0.3, 0.3, 9.0], "1"),
            (grade.best_of_n, ["1", "2"], [0.5, 0.5], "1")):
        assert vote(answers, scores) == winner
        with pytest.raises(ValueError, match="longer|shorter"):
            vote([*answers, "7"], scores)


def test_leaders_are_those_of_a_count_from_scratch_after_each_sample():
    """With ties and negative weights, where the one who led may fall behind several others."""
    rng = np.random.default_rng(0)
    for weights in rng.integers(-2, 4, (300, 12)).tolist():
        ids = rng.integers(-1, 4, 12).tolist()
        for k, leader in enumerate(grade.leaders(ids, weights), 1):
            totals = {i: sum(w for j, w in zip(ids[:k], weights) if j == i) for i in ids[:k]}
            totals.pop(-1, None)
            best = [i for i in totals if totals[i] == max(totals.values())]
            assert leader == (min(best, key=ids.index) if best else -1)


# ---- k of n samples
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([i < c for i in range(n)], k))
            found = grade.pass_at_k(n, c, k)
            assert found == approx(sum(map(any, subsets)) / len(subsets)) and type(found) is float
    assert grade.pass_at_k(10_000, 1, 100) == approx(0.01)
    assert grade.pass_at_k(10_000, 9_500, 9_000) == 1.0  # the product alone would overflow
    for n, c, k in (4, 1, 5), (4, 1, 0), (4, 5, 2), (4, -1, 2):
        with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
            grade.pass_at_k(n, c, k)


@pytest.mark.parametrize("n", [1, 5, 40, 75])
def test_votes_at_k_are_the_means_over_runs_of_consecutive_samples(n):
    """Runs begin at every multiple of 1, 2, 4, ... samples for k up to 16, 32, 64, ..., and the
    vote is the function that users import; k = 1 is pass@1, k = n one vote."""
    rng = np.random.default_rng(n)
    answers = [[None, "7", "8", "9"][i] for i in rng.integers(0, 4, n)]
    scores, right = rng.random(n).tolist(), [answer == "7" for answer in answers]
    found = grade.vote_at_k(grade.groups(answers), right, scores)
    for k in range(1, n + 1):
        step = 2 ** max(0, int(np.ceil(np.log2(k / 16))))
        votes = [grade.weighted_vote(answers[i:i + k], scores[i:i + k])
                 for i in range(0, n - k + 1, step)]
        assert found[k - 1] == approx(np.mean([vote == "7" for vote in votes])), k
    alone = grade.vote_at_k(grade.alone(answers), right, scores)
    assert alone[-1] == (grade.best_of_n(answers, scores) == "7")
    assert not grade.vote_at_k([-1] * n, [False] * n, scores).any()  # nobody answers


def test_bootstrap_interval_has_the_textbook_width():
    """For 400 coin flips the 95% interval is the mean +- 1.96 sqrt(p (1 - p) / 400) = 0.049. With
    1,000 resamples its ends are known to about 6% of that; we allow 0.008."""
    found = grade.with_interval("x", np.repeat([0.0, 1.0], 200), seed=0)
    assert [*found.values()] == pytest.approx([0.5, 0.5 - 0.049, 0.5 + 0.049], abs=0.008)


# ---- time
def test_only_complete_rounds_count_at_the_moment_when_they_are_complete(tmp_path):
    """The teacher's problem 1 has its sample 0 last, after its samples 1 and 2. That of the student
    has no sample 1 yet: later samples do not count, but for the speed. A last line that was cut off
    by a kill is left out."""
    write_model(tmp_path, "teacher", [["1"] * 3, ["2"] * 3], ["1", "2"], [[1, 2, 9], [5, 3, 4]])
    path = write_model(tmp_path, "pure", [["1", "0", "0"], ["2", None, "2"]], ["1", "2"])
    lines = [line for line in path.read_text().splitlines() if "no idea" not in line]
    path.write_text("\n".join([*lines, lines[-1][:40]]))
    teacher, pure = run_main(tmp_path)["models"].values()
    assert teacher["k"] == [1, 2, 3] and teacher["seconds"] == [5, 5, 9]
    assert pure["k"] == [1] and pure["coverage"] == [1.0] and pure["seconds"] == [1.0]
    assert pure["tokens_per_second"] == approx(5 * 10 / 3)


def curve(seconds, *values):
    """A Curve of one problem per row of values."""
    return grade.Curve(np.array(seconds, float), np.array(values, float))


@pytest.mark.parametrize("teacher, student, expected", [
    # the lead of .20 at 3 s is at no moment of the teacher; both reach .10 (1, .5 s), .30, .40
    (([1, 2, 4, 8, 10], [0.1, 0.3, 0.4, 0.7, 0.72]), ([0.5, 1.5, 3, 5], [0.2, 0.25, 0.5, 0.6]),
     dict(budgets=[[1, 1], [4, 4]], best_lead=10, best_lead_low=10, best_lead_high=10, seconds=1,
          times_as_fast=[2 / 3, 2])),
    # moments in a row are one stretch; level, as at 6 s, is not ahead
    (([1, 2, 4, 6, 8], [.1, .2, .3, .4, .9]), ([1, 2, 4, 5, 8], [.2, .3, .4, .4, .5]),
     dict(budgets=[[1, 4]])),
    # rounds that the teacher completes within 1% of the time count for it
    (([1, 1.009], [0.1, 0.5]), ([0.9], [0.4]), dict(budgets=[], best_lead=-10)),
    # moments before the student's first round do not count
    (([1, 2, 3], [0.1, 0.2, 0.3]), ([3, 4], [0.2, 0.9]), dict(budgets=[], best_lead=-10)),
    (([1, 2], [0.1, 0.2]), ([3, 4], [0.9, 0.9]), dict(
        budgets=[], best_lead=None, best_lead_low=None, times_as_fast=[1 / 3, 2 / 3])),
    # a student that never gets there is never as fast; to have nothing right is nothing to reach
    (([1, 2], [0.5, 0.6]), ([1, 2], [0.1, 0.2]), dict(times_as_fast=None)),
    (([1, 2], [0.0, 0.5]), ([4], [0.5]), dict(times_as_fast=[0.5, 0.5])),
])
def test_ahead_worked_out_by_hand(teacher, student, expected):
    found = grade.ahead(curve(*teacher), curve(*student), seed=0)
    for key, value in expected.items():
        assert found[key] == (approx(value) if value and key != "budgets" else value), key


def test_lead_intervals_are_paired(tmp_path):
    """The student is right on exactly the teacher's problems and one more of 20: a lead of 5
    points. Unpaired, the interval would be about +-31; paired, it can't be negative."""
    golds = [str(1000 + p) for p in range(20)]
    for name, solved in (("teacher", 10), ("pure", 11)):
        answers = [[gold if p < solved else "0"] for p, gold in enumerate(golds)]
        write_model(tmp_path, name, answers, golds)
    results = run_main(tmp_path)
    found = results["models"]["pure"]["ahead"]["coverage"]
    assert found["best_lead"] == approx(5)
    assert 0 <= found["best_lead_low"] < 5 < found["best_lead_high"] <= 20
    assert results["front"]["coverage"][0]["student_lead_low"] == approx(found["best_lead_low"])
    assert results == run_main(tmp_path) != run_main(tmp_path, "--seed", "3")


def test_accuracy_on_the_clock_is_that_of_the_better_rule_then():
    """The weighted vote lags behind and is better only from 5 s on; then the majority is again."""
    majority, weighted = curve([1, 2, 6], [0.3, 0.4, 0.7]), curve([3, 5], [0.2, 0.6])
    found = grade.best_rule([majority, weighted])
    assert found.seconds.tolist() == [1, 2, 3, 5, 6]
    assert found.values.tolist() == [[0.3, 0.4, 0.4, 0.6, 0.7]]


def test_the_front_agrees_with_a_literal_loop():
    """At each moment every model's rounds are counted one by one, the best of them by hand."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        curves = {name: curve(np.sort(rng.integers(1, 20, n)), *rng.integers(0, 2, (3, n)))
                  for name, n in (("teacher", 4), ("pure", 7), ("hybrid", 2))}
        first = min(c.seconds[0] for c in curves.values())
        for row in grade.front(curves, {"pure": "teacher"}, np.arange(first, 22), seed=0):
            there = {name: c.values[:, sum(s <= row["seconds"] for s in c.seconds) - 1]
                     for name, c in curves.items() if c.seconds[0] <= row["seconds"]}
            means = {name: values.mean() for name, values in there.items()}
            assert means == {name: approx(at["value"]) for name, at in row["models"].items()}
            best = max(means, key=lambda name: round(means[name], 9))  # max takes the first
            both = {"teacher", "pure"} <= means.keys()
            lead = approx(100 * (means["pure"] - means["teacher"])) if both else None
            assert (row["model"], row["student"], row["student_lead"]) == (
                best, "pure" if both else None, lead)


# ---- whole runs
@pytest.fixture
def example(tmp_path):
    """Results of three models on three problems, four samples each; a teacher's round takes 2 s."""
    golds = ["10", "20", "30"]
    right = {"teacher": (4, 2, 0), "pure": (3, 1, 1), "hybrid": (4, 1, 1)}
    for name, speed in (("teacher", 2.0), ("pure", 0.5), ("hybrid", 1.0)):
        answers = [[g] * c + [None, "5", "6", "7"][:4 - c] for g, c in zip(golds, right[name])]
        write_model(tmp_path, name, answers, golds, [[speed * (s + 1) for s in range(4)]] * 3,
                    params=1000, settings={"task": "arithmetic"})
    return run_main(tmp_path)


def test_results_json_worked_out_by_hand(example):
    assert list(example["models"]) == ["teacher", "pure", "hybrid"]
    teacher, pure, _ = example["models"].values()
    assert teacher["params"] == 1000 and teacher["tokens_per_second"] == approx(120 / 8)
    assert teacher["k"] == [1, 2, 4] and teacher["seconds"] == [2, 4, 8]
    assert teacher["coverage"] == approx([6 / 12, (1 + 5 / 6 + 0) / 3, 2 / 3])
    assert teacher["majority"] == approx([6 / 12, (1 + 2 / 3 + 0) / 3, 2 / 3])
    assert pure["coverage"] == approx([5 / 12, (1 + 1 / 2 + 1 / 2) / 3, 1])
    assert "ahead" not in teacher and pure["teacher"] == "teacher"
    assert not {"weighted", "seconds_scored"} & pure.keys()
    # at the teacher's 2, 4, 6 and 8 s pure has all its samples: 1 against 1/2, 11/18, 2/3, 2/3;
    # the teacher has 1/2 after 2 s and 2/3 after 6 s, pure has 2/3 after 1 s
    assert pure["ahead"]["coverage"] | dict(best_lead_low=0, best_lead_high=0) == dict(
        best_lead=approx(50), best_lead_low=0, best_lead_high=0, seconds=2, budgets=[[2, 8]],
        times_as_fast=approx([2, 6]))
    assert list(example["front"]) == ["coverage", "accuracy"]
    rows = example["front"]["coverage"]
    assert [(row["seconds"], row["model"], row["student"]) for row in rows] == [
        (1, "pure", None), (2, "pure", "pure"), (5, "pure", "pure"), (8, "pure", "pure")]
    assert list(rows[0]["models"]) == ["pure", "hybrid"]
    assert rows[1]["student_lead"] == approx(50) and rows[0]["student_lead"] is None


def test_the_report_is_a_sentence_per_student_and_one_table(example, tmp_path, capsys):
    text = grade.report(run_main(tmp_path))
    assert text == grade.report(example) and text in capsys.readouterr().out
    for name, lead in (("pure", "+50.0"), ("hybrid", "+38.9")):
        where = "in coverage from 2.0 to 8.0 s, at best"
        assert f"**{name}** is ahead of teacher {where} {lead} [" in text
    table = [line.split() for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4 and table[3][-5:-3] == ["pure", "+50.0"]
    assert table[2][:6] == ["|", "1", "|", "-", "|", "66.7"] and table[2][-2:] == ["-", "|"]


def test_words_for_where_a_student_is_ahead():
    lead = dict(best_lead=2.0, best_lead_low=-1.0, best_lead_high=5.0, seconds=3.0, budgets=[],
                times_as_fast=None)
    often = dict(budgets=[[1, 2], [3, 9.5], [20, 20]], times_as_fast=[0.8, 1.5])  # the longest one
    at_best = "at best +2.0 [-1.0, +5.0] points at 3.0 s"
    assert [grade.in_words(lead | change) for change in (often, {}, dict(best_lead=None))] == [
        f"from 3.0 to 9.5 s, {at_best} (equally good 0.8 to 1.5 times as fast)",
        f"nowhere, {at_best} (equally good never)", "nowhere: it completes no round in that time"]


def test_a_model_alone_has_a_front_and_times_of_0_divide_nothing(tmp_path):
    write_model(tmp_path, "pure", [["1"]], ["1"], [[0]])
    results = run_main(tmp_path)
    row, model = results["front"]["accuracy"][0], results["models"]["pure"]
    assert "ahead" not in model and model["params"] is model["tokens_per_second"] is None
    assert (row["seconds"], row["model"], row["student"]) == (0, "pure", None)
    write_model(tmp_path, "teacher", [["0"]], ["1"], [[0]])
    found = run_main(tmp_path)["models"]["pure"]["ahead"]["coverage"]
    assert (found["best_lead"], found["times_as_fast"]) == (100, None)


# ---- which models
def test_each_student_is_compared_with_the_teacher_of_its_size(tmp_path):
    names = ["teacher", "pure", "hybrid", "another", "teacher-small", "pure-small", "hybrid-small"]
    for name in names:
        write_model(tmp_path, name, [["1"], ["2"]], ["1", "2"])

    def teachers(*arguments):
        found = run_main(tmp_path, *arguments)["models"]
        return {name: m["teacher"] for name, m in found.items() if "ahead" in m}
    assert list(run_main(tmp_path)["models"]) == names
    assert teachers() == {"pure": "teacher", "hybrid": "teacher", "another": "teacher",
                          "pure-small": "teacher-small", "hybrid-small": "teacher-small"}
    assert teachers("--teacher", "pure") == dict.fromkeys({*names} - {"pure"}, "pure")
    assert teachers("--model", "teacher", "pure-small") == {"pure-small": "teacher"}
    assert teachers("--model", "pure", "--teacher", "hybrid") == {"pure": "hybrid"}  # joins in


def test_models_on_other_problems_are_not_compared(tmp_path, capsys):
    for name, golds in dict(teacher=["1", "2"], pure=["1", "3"], hybrid=["1"]).items():
        write_model(tmp_path, name, [["1"], ["2"]][:len(golds)], golds)
    results, said = run_main(tmp_path), capsys.readouterr().out
    assert not any("ahead" in m for m in results["models"].values())
    assert list(results["front"]["coverage"][0]["models"]) == ["teacher"]
    for name in "pure", "hybrid":
        assert f"{name} was sampled on other problems than teacher: not compared" in said


# ---- scores
def scored(out):
    """Two models whose majority is wrong and whose weighted vote is right, of three samples."""
    for name, speed in (("teacher", 2.0), ("pure", 1.0)):
        write_model(out, name, [["1", "0", "0"], ["2", "0", "0"]], ["1", "2"],
                    [[speed * (s + 1) for s in range(3)]] * 2, params=5)
    write_scores(out, "teacher", [[0.9, 0.3, 0.3]] * 2, [[0.1, 0.2, 0.3], [0.2, 0.4, 0.6]])
    write_scores(out, "pure", [[0.9, 0.3, 0.3]] * 2, [[5.0, 5.5, 6.0]] * 2)


def test_with_scores_there_are_two_rules_more_with_the_time_of_scoring(tmp_path):
    """pure is faster to sample and slower to score: the teacher's accuracy is first to be 1. Scores
    count only if all models have them."""
    scored(tmp_path)
    results = run_main(tmp_path)
    teacher = results["models"]["teacher"]
    assert teacher["majority"][-1] == 0 and teacher["weighted"][-1] == teacher["best_of_n"][-1] == 1
    assert teacher["k"] == [1, 2, 3] and teacher["seconds_scored"] == approx([2.2, 4.4, 6.6])
    value = {row["seconds"]: {name: at["value"] for name, at in row["models"].items()}
             for row in results["front"]["accuracy"]}
    assert value[2.0] == approx(dict(teacher=1 / 3, pure=1 / 2))  # a tie goes to the earliest
    assert value[5.0]["teacher"] == approx(1 / 2)
    assert value[6.0] == approx(dict(teacher=1 / 2, pure=1 / 3))
    (tmp_path / "pure" / "scores.jsonl").unlink()
    results = run_main(tmp_path)
    assert not any("weighted" in m for m in results["models"].values())
    assert results["front"]["accuracy"][-1]["models"]["teacher"]["value"] == 0


def test_another_file_of_scores(tmp_path):
    scored(tmp_path)
    with pytest.raises(ValueError, match="mine.jsonl has no score of problem 0, sample 0"):
        run_main(tmp_path, "--scores", "mine.jsonl")
    for name in ("teacher", "pure"):
        write_scores(tmp_path, name, [[0.5, 0.3, 0.3]] * 2, [[0, 0, 0]] * 2, "mine.jsonl")
    found = run_main(tmp_path, "--scores", "mine.jsonl")["models"]["pure"]
    assert (found["weighted"][-1], found["best_of_n"][-1]) == (0, 1)  # 0.6 > 0.5 > 0.3


# ---- mistakes
def edit(**change):
    """Change fields of the second line."""
    return lambda lines: [lines[0], json.dumps(json.loads(lines[1]) | change), *lines[2:]]


@pytest.mark.parametrize("file, change, said", [
    ("samples.jsonl", lambda lines: [lines[0], lines[1][:20], *lines], "line 2 is not readable JS"),
    ("samples.jsonl", edit(seconds=-1), "negative seconds"),
    ("samples.jsonl", edit(problem=-1), "line 2: problem is -1, expected"),
    ("samples.jsonl", edit(gold=3), "line 2: gold is 3, expected text"),
    ("samples.jsonl", edit(gold="3"), "problem 1, sample . .* another question or gold"),
    ("samples.jsonl", edit(question="3"), "problem 1, sample . .* another question or gold"),
    ("samples.jsonl", lambda lines: [*lines, lines[0]], "problem 0, sample 0 comes twice"),
    ("samples.jsonl", edit(problem=9), "has no complete round"),
    ("samples.jsonl", lambda lines: [], "has no complete round.*run python sample.py"),
    ("samples.json", lambda lines: ["{"], "samples.json is not readable"),
    ("scores.jsonl", lambda lines: [*lines, lines[0]], "problem 0, sample 0 comes twice"),
    ("scores.jsonl", edit(sample=-1), "line 2: sample is -1, expected"),
    ("scores.jsonl", lambda lines: lines[1:], "no score of problem .*run python score.py"),
    ("scores.jsonl", edit(crc="00000000"), "or one of another text"),  # numbers like any others
    ("scores.jsonl", edit(score="x"), "line 2: score is \"x\", expected"),
])
def test_a_damaged_file_is_named_and_nothing_is_written(file, change, said, tmp_path):
    scored(tmp_path)
    path = tmp_path / "pure" / file
    path.write_text("\n".join([*change(path.read_text().splitlines()), ""]))
    (tmp_path / "results.json").write_text("earlier")
    with pytest.raises(ValueError, match=said) as error:
        run_main(tmp_path)
    assert str(path) in str(error.value)
    assert (tmp_path / "results.json").read_text() == "earlier"


def test_what_is_not_there_or_a_folder_is_named(tmp_path):
    scored(tmp_path)
    for arguments, said in (["--model", "mamba"], "mamba/samples.jsonl has no complete round"), (
            ["--teacher", "llama"], "llama/samples.jsonl has no complete round"), (
            ["--out", "nowhere"], "no samples under nowhere/: run python sample.py"):
        with pytest.raises(ValueError, match=said):
            run_main(tmp_path, *arguments)
    (tmp_path / "results.json").mkdir()
    with pytest.raises(OSError, match="results.json'$"):
        run_main(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
