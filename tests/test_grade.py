"""What grade.py promises: votes and estimators are the textbook ones, only complete rounds count,
and time is what was measured. Small numbers, worked out by hand or by brute force."""
import functools
import itertools
import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOLERANCE

import grade

ROOT = Path(grade.__file__).parent
approx = functools.partial(pytest.approx, rel=TOLERANCE[torch.float64],
                           abs=TOLERANCE[torch.float64])


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_model(out, name, answers, golds, seconds=None, **sidecar):
    """out/<name>/samples.jsonl: answers[p][s], finished at seconds[p][s], by default 1, 2, ..."""
    folder = Path(out) / name
    folder.mkdir(parents=True)
    records = []
    for p, row in enumerate(answers):
        for s, answer in enumerate(row):
            records.append(dict(
                problem=p, sample=s, question=f"question {p}", gold=golds[p],
                completion="no idea" if answer is None else f"so it is \\boxed{{{answer}}}",
                num_tokens=10, finish="length" if answer is None else "stop",
                seconds=seconds[p][s] if seconds else 1.0 + s))
    if sidecar:
        (folder / "samples.json").write_text(json.dumps(sidecar))
    return write_lines(folder / "samples.jsonl", sorted(records, key=lambda r: r["seconds"]))


def write_scores(out, name, scores, seconds=None, file="scores.jsonl"):
    """A judge's file beside the samples: scores[p][s], there at seconds[p][s]."""
    path, records = Path(out) / name / "samples.jsonl", []
    for r in map(json.loads, path.read_text().splitlines()):
        p, s = r["problem"], r["sample"]
        records.append(dict(
            problem=p, sample=s, score=scores[p][s], num_tokens=r["num_tokens"],
            seconds=seconds[p][s] if seconds else 0.0,
            crc=f"{zlib.crc32(r['completion'].encode('utf-8', 'surrogatepass')):08x}"))
    return write_lines(path.parent / file, records)


def run_main(out, *arguments):
    grade.main(["--out", str(out), *arguments])
    return json.loads((Path(out) / "results.json").read_text())


# ---------------------------------------------------------------------------- votes
@pytest.mark.parametrize("answers, winner", [
    (["1", "2", "2"], "2"),
    (["1", "2", "2", "1"], "1"),  # a tie goes to the earliest
    ([None, None, None, "3"], "3"),  # None never wins over an answer
    (["3", "3", "1.0", "1", "1.00"], "1.0"),  # equal answers count together, as first spelled
    ([None, None], None),
    ([], None),
])
def test_majority_vote(answers, winner):
    assert grade.majority_vote(answers) == winner


def test_weighted_vote_sums_scores_and_best_of_n_takes_the_highest():
    answers, scores = ["1", "2", "2.0", None], [0.5, 0.3, 0.3, 9.0]
    assert grade.weighted_vote(answers, scores) == "2"  # 0.6 > 0.5
    assert grade.best_of_n(answers, scores) == "1"
    assert grade.best_of_n(["1", "2"], [0.5, 0.5]) == "1"  # ties go to the earliest
    assert grade.weighted_vote(["1", "2"], [-1.0, -1.0]) == "1"
    assert grade.weighted_vote(["1", "1", "2"], [-1.0, -1.0, -1.5]) == "2"
    assert grade.best_of_n([None], [1.0]) is None and grade.weighted_vote([], []) is None


@pytest.mark.parametrize("vote", [grade.best_of_n, grade.weighted_vote])
def test_votes_refuse_scores_that_do_not_match(vote):
    with pytest.raises(ValueError, match="shorter"):
        vote(["1", "2"], [0.5])


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


# ---------------------------------------------------------------------------- k of n samples
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([i < c for i in range(n)], k))
            found = grade.pass_at_k(n, c, k)
            assert found == approx(sum(map(any, subsets)) / len(subsets)) and type(found) is float


def test_pass_at_k_of_large_n_is_exact():
    assert grade.pass_at_k(10_000, 1, 100) == approx(0.01)
    assert grade.pass_at_k(10_000, 0, 10_000) == 0.0
    assert grade.pass_at_k(10_000, 9_500, 9_000) == 1.0  # the product alone would overflow


@pytest.mark.parametrize("n, c, k", [(4, 1, 5), (4, 1, 0), (4, 5, 2), (4, -1, 2)])
def test_pass_at_k_refuses_impossible_numbers(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        grade.pass_at_k(n, c, k)


@pytest.mark.parametrize("n", [1, 5, 40, 75])
def test_votes_at_k_are_the_means_over_runs_of_consecutive_samples(n):
    """Runs begin at every multiple of 1, 2, 4, ... samples for k up to 16, 32, 64, ..., and the
    vote is the function that users import; k = 1 is pass@1, k = n one vote."""
    rng = np.random.default_rng(n)
    answers = [[None, "7", "8", "9"][i] for i in rng.integers(0, 4, n)]
    scores, right = rng.random(n).tolist(), [answer == "7" for answer in answers]
    ids = grade.groups(answers)
    found = grade.vote_at_k(ids, right, scores)
    for k in range(1, n + 1):
        step = 2 ** max(0, int(np.ceil(np.log2(k / 16))))
        votes = [grade.weighted_vote(answers[i:i + k], scores[i:i + k])
                 for i in range(0, n - k + 1, step)]
        assert found[k - 1] == approx(np.mean([vote == "7" for vote in votes])), k
    assert found[0] == approx(np.mean(right))
    alone = grade.vote_at_k(grade.alone(answers), right, scores)
    assert alone[-1] == (grade.best_of_n(answers, scores) == "7")


def test_runs_of_k_samples_are_as_good_as_all_subsets():
    """Over many problems, the mean of the votes among 3 of 8 samples is that over all subsets:
    800 problems leave an error of about 0.5 sqrt(1/8 / 800) = 0.6 points; we allow six of that."""
    rng, expected, found = np.random.default_rng(0), [], []
    for _ in range(800):
        answers = rng.choice(["7", "8", "9"], 8, p=[0.5, 0.3, 0.2]).tolist()
        right = [answer == "7" for answer in answers]
        found.append(grade.vote_at_k(grade.groups(answers), right, [1] * 8)[2])
        expected.append(np.mean([grade.majority_vote([answers[i] for i in subset]) == "7"
                                 for subset in itertools.combinations(range(8), 3)]))
    assert abs(np.mean(found) - np.mean(expected)) < 0.036


def test_nobody_answers_is_wrong_at_every_k():
    assert grade.vote_at_k([-1] * 4, [False] * 4, [1] * 4).tolist() == [0, 0, 0, 0]


def test_bootstrap_interval_has_the_textbook_width():
    """For 400 coin flips the 95% interval is the mean +- 1.96 sqrt(p (1 - p) / 400) = 0.049. With
    1,000 resamples its ends are known to about 6% of that; we allow 0.008."""
    flips = np.repeat([0.0, 1.0], 200)
    found = grade.with_interval("x", flips, seed=0)
    assert found["x"] == 0.5 and found == grade.with_interval("x", flips, seed=0)
    assert 0.5 - found["x_low"] == pytest.approx(0.049, abs=0.008)
    assert found["x_high"] - 0.5 == pytest.approx(0.049, abs=0.008)
    assert grade.with_interval("x", flips, seed=1)["x_low"] != found["x_low"]


# ---------------------------------------------------------------------------- time
def test_seconds_is_when_every_problem_has_its_first_k_samples(tmp_path):
    """Problem 1's sample 0 is the last of its round: its samples 1 and 2 were there before it."""
    write_model(tmp_path, "teacher", [["1"] * 3, ["1"] * 3], ["1", "1"], [[1, 2, 9], [5, 3, 4]])
    model = run_main(tmp_path)["models"]["teacher"]
    assert model["k"] == [1, 2, 3] and model["seconds"] == [5, 5, 9]


def test_only_complete_rounds_count_and_later_records_are_left_alone(tmp_path):
    """Problem 1 has no sample 1 yet: its right sample 2 and problem 0's wrong ones do not count,
    but all tokens count for the speed. A last line that was cut off by a kill is left out."""
    path = write_model(tmp_path, "teacher", [["1", "0", "0"], ["2", None, "2"]], ["1", "2"])
    lines = [line for line in path.read_text().splitlines() if "no idea" not in line]
    path.write_text("\n".join([*lines, lines[-1][:40]]))
    model = run_main(tmp_path)["models"]["teacher"]
    assert model["k"] == [1] and model["coverage"] == [1.0] and model["seconds"] == [1.0]
    assert model["tokens_per_second"] == approx(5 * 10 / 3)


def curve(seconds, *values):
    """A Curve of one problem per row of values."""
    return grade.Curve(np.array(seconds, float), np.array(values, float))


def test_ahead_worked_out_by_hand():
    """teacher's moments    1    2    4    8   10
       teacher            .10  .30  .40  .70  .72
       student            .20  .25  .50  .60  .60; its lead of .20 at 3 s is no teacher's moment
    Values that the teacher has and the student reaches: .10 (1 s; .5 s), .30 (2; 3), .40 (4; 3).
    """
    found = grade.ahead(curve([1, 2, 4, 8, 10], [0.1, 0.3, 0.4, 0.7, 0.72]),
                        curve([0.5, 1.5, 3, 5], [0.2, 0.25, 0.5, 0.6]), seed=0)
    assert found["budgets"] == [[1, 1], [4, 4]]
    assert (found["best_lead"], found["seconds"]) == (approx(10), 1)
    assert (found["best_lead_low"], found["best_lead_high"]) == (approx(10), approx(10))
    assert found["times_as_fast"] == approx([2 / 3, 2])


def test_consecutive_moments_ahead_are_one_stretch_of_budgets():
    """At 6 s they are level, which is not ahead."""
    found = grade.ahead(curve([1, 2, 4, 6, 8], [0.1, 0.2, 0.3, 0.4, 0.9]),
                        curve([1, 2, 4, 5, 8], [0.2, 0.3, 0.4, 0.4, 0.5]), seed=0)
    assert found["budgets"] == [[1, 4]]


def test_rounds_that_the_teacher_completes_within_one_percent_count_for_it():
    found = grade.ahead(curve([1, 1.009], [0.1, 0.5]), curve([0.9], [0.4]), seed=0)
    assert found["budgets"] == [] and found["best_lead"] == approx(-10)


def test_moments_before_the_students_first_round_do_not_count():
    found = grade.ahead(curve([1, 2, 3], [0.1, 0.2, 0.3]), curve([3, 4], [0.2, 0.9]), seed=0)
    assert found["budgets"] == []
    assert (found["best_lead"], found["seconds"]) == (approx(-10), 3)
    late = grade.ahead(curve([1, 2], [0.1, 0.2]), curve([3, 4], [0.9, 0.9]), seed=0)
    keys = ("best_lead", "best_lead_low", "best_lead_high", "seconds")
    assert late["budgets"] == [] and [late[key] for key in keys] == [None] * 4
    assert late["times_as_fast"] == approx([1 / 3, 2 / 3])


def test_a_student_that_never_gets_there_is_never_as_fast():
    teacher, student = curve([1, 2], [0.5, 0.6]), curve([1, 2], [0.1, 0.2])
    assert grade.ahead(teacher, student, seed=0)["times_as_fast"] is None


def test_to_have_nothing_right_is_no_value_to_be_reached():
    """Everybody has 0 with the first round."""
    teacher, student = curve([1, 2], [0.0, 0.5]), curve([4], [0.5])
    assert grade.ahead(teacher, student, seed=0)["times_as_fast"] == [0.5, 0.5]


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
    row = results["front"]["coverage"][0]
    assert [row["lead_low"], row["student_lead_low"]] == [found["best_lead_low"]] * 2


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
            others = [name for name in means if name != best]
            assert (row["model"], row["value"]) == (best, approx(means[best]))
            if others:
                second = max(others, key=lambda name: round(means[name], 9))
                assert row["next"] == second
                assert row["lead"] == approx(100 * (means[best] - means[second]))
            if {"teacher", "pure"} <= means.keys():
                lead = 100 * (means["pure"] - means["teacher"])
                assert (row["student"], row["student_lead"]) == ("pure", approx(lead))
            else:
                assert row["student"] is row["student_lead"] is row["student_lead_low"] is None


# ---------------------------------------------------------------------------- whole runs
def example(out):
    """Three models on three problems with four samples each; a teacher's round takes 2 s."""
    golds = ["10", "20", "30"]
    right = {"teacher": (4, 2, 0), "pure": (3, 1, 1), "hybrid": (4, 1, 1)}
    for name, speed in (("teacher", 2.0), ("pure", 0.5), ("hybrid", 1.0)):
        answers = [[g] * c + [None, "5", "6", "7"][:4 - c] for g, c in zip(golds, right[name])]
        write_model(out, name, answers, golds, [[speed * (s + 1) for s in range(4)]] * 3,
                    params=1000, settings={"task": "arithmetic"})


def test_results_json_worked_out_by_hand(tmp_path):
    example(tmp_path)
    results = run_main(tmp_path)
    assert list(results["models"]) == ["teacher", "pure", "hybrid"]
    teacher, pure = results["models"]["teacher"], results["models"]["pure"]
    assert (teacher["params"], teacher["num_problems"]) == (1000, 3)
    assert teacher["tokens_per_second"] == approx(120 / 8)
    assert teacher["k"] == [1, 2, 4] and teacher["seconds"] == [2, 4, 8]
    assert teacher["coverage"] == approx([6 / 12, (1 + 5 / 6 + 0) / 3, 2 / 3])
    assert teacher["majority"] == approx([6 / 12, (1 + 2 / 3 + 0) / 3, 2 / 3])
    assert pure["coverage"] == approx([5 / 12, (1 + 1 / 2 + 1 / 2) / 3, 1])
    for key in ("coverage", "majority"):
        columns = [teacher[key + end] for end in ("_low", "", "_high")]
        assert all(low <= x <= high for low, x, high in zip(*columns, strict=True))
    assert "ahead" not in teacher and pure["teacher"] == "teacher"
    # at the teacher's 2, 4, 6 and 8 s pure has all its samples: 1 against 1/2, 11/18, 2/3, 2/3;
    # the teacher has 1/2 after 2 s and 2/3 after 6 s, pure has 2/3 after 1 s
    assert pure["ahead"]["coverage"] | dict(best_lead_low=0, best_lead_high=0) == dict(
        best_lead=approx(50), best_lead_low=0, best_lead_high=0, seconds=2, budgets=[[2, 8]],
        times_as_fast=approx([2, 6]))
    assert not {"weighted", "seconds_scored"} & pure.keys()


def test_the_front_of_an_example(tmp_path):
    example(tmp_path)
    front = run_main(tmp_path)["front"]
    assert list(front) == ["coverage", "accuracy"]
    rows = front["coverage"]
    assert [row["seconds"] for row in rows] == [1, 2, 5, 8]
    assert [row["model"] for row in rows] == ["pure"] * 4
    assert [list(row["models"]) for row in rows][0] == ["pure", "hybrid"]
    assert [row["next"] for row in rows] == ["hybrid", "hybrid", "hybrid", "hybrid"]
    assert [row["student"] for row in rows] == [None, "pure", "pure", "pure"]
    assert rows[1]["student_lead"] == approx(50) and rows[0]["student_lead"] is None


def test_the_report_is_a_sentence_per_student_and_one_table(tmp_path, capsys):
    example(tmp_path)
    results = run_main(tmp_path)
    text = grade.report(results)
    assert text in capsys.readouterr().out
    for name, lead in (("pure", "+50.0"), ("hybrid", "+38.9")):
        where = "ahead of teacher in coverage from 2.0 to 8.0 s, at best"
        assert f"**{name}** is {where} {lead} [" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1 and len(table) == 2 + 4
    cells = [cell.strip() for cell in table[2].split("|")[1:-1]]
    assert cells[:2] == ["1", "-"] and cells[2].startswith("66.7 [") and cells[-1] == "-"
    assert table[3].split("|")[-2].strip().startswith("pure +50.0 [")


def test_words_name_the_longest_stretch_of_budgets_and_what_never_was():
    lead = dict(best_lead=2.0, best_lead_low=-1.0, best_lead_high=5.0, seconds=3.0)
    often = lead | dict(budgets=[[1, 2], [3, 9.5], [20, 20]], times_as_fast=[0.8, 1.5])
    assert grade.in_words(often) == ("from 3.0 to 9.5 s, at best +2.0 [-1.0, +5.0] points at 3.0 s "
                                     "(equally good 0.8 to 1.5 times as fast)")
    never = lead | dict(budgets=[], times_as_fast=None)
    assert grade.in_words(never) == ("nowhere, at best +2.0 [-1.0, +5.0] points at 3.0 s "
                                     "(equally good never)")
    late = dict.fromkeys(lead) | dict(budgets=[], times_as_fast=None)
    assert grade.in_words(late) == "nowhere, since it completes no round in that time"


def test_models_with_other_numbers_of_samples_are_compared_by_time(tmp_path):
    """In the same 4 s the student has 8 rounds and the teacher 2."""
    write_model(tmp_path, "teacher", [["1", "0"]], ["1"], [[2, 4]])
    write_model(tmp_path, "pure", [["0"] * 7 + ["1"]], ["1"], [[0.5 * i for i in range(1, 9)]])
    results = run_main(tmp_path)
    assert results["models"]["pure"]["k"] == [1, 2, 4, 8]
    assert [row["models"]["pure"]["value"] for row in results["front"]["coverage"]] == approx(
        [2 / 8, 4 / 8, 1])


def test_a_model_alone_has_a_front_and_no_ahead(tmp_path, capsys):
    write_model(tmp_path, "pure", [["1"]], ["1"])
    results = run_main(tmp_path)
    assert "ahead" not in results["models"]["pure"] and results["models"]["pure"]["params"] is None
    row = results["front"]["accuracy"][0]
    assert (row["model"], row["value"], row["next"], row["lead"]) == ("pure", 1, None, None)


def test_all_times_0_divide_nothing(tmp_path):
    for name in ("teacher", "pure"):
        write_model(tmp_path, name, [["1", "0"]], ["1"], [[0, 0]])
    results = run_main(tmp_path)
    assert results["models"]["pure"]["tokens_per_second"] is None
    assert results["models"]["pure"]["ahead"]["coverage"]["times_as_fast"] is None
    assert [row["seconds"] for row in results["front"]["coverage"]] == [0]


def test_grading_twice_gives_the_same_file(tmp_path):
    example(tmp_path)
    assert run_main(tmp_path, "--seed", "3") == run_main(tmp_path, "--seed", "3")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hybrid", "pure", "results.json",
                                                         "teacher"]


# ---------------------------------------------------------------------------- which models
SIX = ["teacher", "pure", "hybrid", "teacher-small", "pure-small", "hybrid-small"]


def test_each_student_is_compared_with_the_teacher_of_its_size(tmp_path):
    for i, name in enumerate(reversed([*SIX, "another"])):
        write_model(tmp_path, name, [["1"], ["2"]], ["1", "2"], [[i + 1]] * 2)
    models = run_main(tmp_path)["models"]
    assert list(models) == ["teacher", "pure", "hybrid", "another", *SIX[3:]]
    assert {name: m["teacher"] for name, m in models.items() if "ahead" in m} == {
        "pure": "teacher", "hybrid": "teacher", "another": "teacher",
        "pure-small": "teacher-small", "hybrid-small": "teacher-small"}
    models = run_main(tmp_path, "--teacher", "pure")["models"]
    assert {m["teacher"] for name, m in models.items() if name != "pure"} == {"pure"}
    assert "ahead" not in models["pure"]
    models = run_main(tmp_path, "--model", "teacher", "pure-small")["models"]
    assert {name: m.get("teacher") for name, m in models.items()} == {
        "teacher": None, "pure-small": "teacher"}


def test_a_teacher_of_any_name_joins_the_models_asked_for(tmp_path):
    example(tmp_path)
    models = run_main(tmp_path, "--model", "pure", "--teacher", "hybrid")["models"]
    assert list(models) == ["pure", "hybrid"] and models["pure"]["teacher"] == "hybrid"


def test_models_on_other_problems_are_not_compared(tmp_path, capsys):
    """Neither with other golds nor with fewer problems."""
    write_model(tmp_path, "teacher", [["1"], ["2"]], ["1", "2"])
    write_model(tmp_path, "pure", [["1"], ["2"]], ["1", "3"])
    write_model(tmp_path, "hybrid", [["1"]], ["1"])
    results = run_main(tmp_path)
    assert not any("ahead" in m for m in results["models"].values())
    assert list(results["front"]["coverage"][0]["models"]) == ["teacher"]
    said = capsys.readouterr().out
    for name in ("pure", "hybrid"):
        assert f"{name} was sampled on other problems than teacher: not compared\n" in said


# ---------------------------------------------------------------------------- scores
def scored(out):
    """Two models whose majority is wrong and whose weighted vote is right, of three samples."""
    for name, speed in (("teacher", 2.0), ("pure", 1.0)):
        write_model(out, name, [["1", "0", "0"], ["2", "0", "0"]], ["1", "2"],
                    [[speed * (s + 1) for s in range(3)]] * 2, params=5)
    write_scores(out, "teacher", [[0.9, 0.3, 0.3]] * 2, [[0.1, 0.2, 0.3], [0.2, 0.4, 0.6]])
    write_scores(out, "pure", [[0.9, 0.3, 0.3]] * 2, [[5.0, 5.5, 6.0]] * 2)


def test_with_scores_there_are_two_rules_more_with_the_time_of_scoring(tmp_path):
    """pure is faster to sample and slower to score: the teacher's accuracy is first to be 1."""
    scored(tmp_path)
    results = run_main(tmp_path)
    teacher, pure = (results["models"][name] for name in ("teacher", "pure"))
    assert teacher["majority"][-1] == 0 and teacher["weighted"][-1] == teacher["best_of_n"][-1] == 1
    assert teacher["k"] == [1, 2, 3] and teacher["seconds_scored"] == approx([2.2, 4.4, 6.6])
    assert len(teacher["weighted_low"]) == len(teacher["best_of_n_high"]) == 3
    value = {row["seconds"]: {name: at["value"] for name, at in row["models"].items()}
             for row in results["front"]["accuracy"]}
    # two samples tie in the majority, which then goes to the earliest
    assert value[2.0] == approx(dict(teacher=1 / 3, pure=1 / 2))
    assert value[5.0]["teacher"] == approx(1 / 2)
    assert value[6.0] == approx(dict(teacher=1 / 2, pure=1 / 3))


def test_scores_count_for_the_accuracy_only_if_all_models_have_them(tmp_path, capsys):
    scored(tmp_path)
    (tmp_path / "pure" / "scores.jsonl").unlink()
    results = run_main(tmp_path)
    assert [name for name, m in results["models"].items() if "weighted" in m] == ["teacher"]
    assert results["front"]["accuracy"][-1]["models"]["teacher"]["value"] == 0
    assert "only teacher has scores: accuracy is that of the majority" in capsys.readouterr().out


def edit(line, **change):
    return json.dumps(json.loads(line) | change)


@pytest.mark.parametrize("change, said", [
    (lambda lines: lines[:-1], "no score of problem 1, sample 2"),
    (lambda lines: [edit(lines[0], crc="00000000"), *lines[1:]], "or one of another text"),
    (lambda lines: [edit(lines[0], score="x"), *lines[1:]], "line 1: score is \"x\", expected"),
    (lambda lines: [lines[0].replace("0.9", "NaN"), *lines[1:]], "line 1 is not readable"),
    (lambda lines: [lines[0].replace("0.9", "1e999"), *lines[1:]], "line 1: score is Infinity"),
    (lambda lines: [edit(lines[0], seconds=-1), *lines[1:]], "negative seconds"),
    (lambda lines: [edit(lines[0], seconds="x"), *lines[1:]], "seconds is \"x\""),
    (lambda lines: [*lines, lines[0]], "comes twice"),
    (lambda lines: ["[1]", *lines], "line 1 holds"),
])
def test_scores_that_do_not_fit_are_an_error_or_a_note(change, said, tmp_path, capsys):
    """An error if they were asked for: then nothing is written. Scores of other samples would give
    numbers that look like any."""
    scored(tmp_path)
    path = tmp_path / "pure" / "scores.jsonl"
    path.write_text("\n".join(change(sorted(path.read_text().splitlines()))) + "\n")
    (tmp_path / "results.json").write_text("earlier")
    with pytest.raises(ValueError, match=said):
        run_main(tmp_path, "--scores", "scores.jsonl")
    assert (tmp_path / "results.json").read_text() == "earlier"
    capsys.readouterr()
    assert "weighted" not in run_main(tmp_path)["models"]["pure"]
    note = capsys.readouterr().out.splitlines()[0]
    assert str(path) in note and note.endswith("until then its scores do not count")


def test_another_file_of_scores(tmp_path):
    scored(tmp_path)
    with pytest.raises(ValueError, match="mine.jsonl has no score of problem 0, sample 0"):
        run_main(tmp_path, "--scores", "mine.jsonl")
    for name in ("teacher", "pure"):
        write_scores(tmp_path, name, [[0.5, 0.3, 0.3]] * 2, file="mine.jsonl")
    found = run_main(tmp_path, "--scores", "mine.jsonl")["models"]["pure"]
    assert (found["weighted"][-1], found["best_of_n"][-1]) == (0, 1)  # 0.6 > 0.5 > 0.3


# ---------------------------------------------------------------------------- mistakes
def change_line(path, number, change):
    lines = path.read_text().splitlines()
    lines[number - 1] = change(lines[number - 1])
    path.write_text("\n".join(lines) + "\n")


def set_field(**change):
    return lambda path: change_line(path, 2, lambda line: edit(line, **change))


@pytest.mark.parametrize("arguments, damage, said", [
    (["--model", "mamba"], None, "no samples of mamba under .*: choose from hybrid, pure, teacher"),
    (["--teacher", "llama"], None, "no samples of llama under"),
    ([], lambda path: change_line(path, 2, lambda line: line[:20]), "line 2 is not readable JSON"),
    ([], set_field(seconds=None), "line 2: seconds is null"),
    ([], set_field(seconds=-1), "negative seconds"),
    ([], set_field(sample=-1), "line 2: sample is -1"),
    ([], set_field(gold=3), "line 2: gold is 3, expected text"),
    ([], set_field(problem=0, sample=0), "problem 0, sample 0 comes twice"),
    ([], set_field(problem=9), "has no complete round"),
    ([], lambda path: path.write_text(""), "has no complete round.*run python sample.py"),
    ([], lambda path: path.with_suffix(".json").write_text("{"), "samples.json is not readable"),
])
def test_a_mistake_is_named_and_changes_nothing(arguments, damage, said, tmp_path):
    example(tmp_path)
    (tmp_path / "results.json").write_text("earlier")
    if damage:
        damage(tmp_path / "teacher" / "samples.jsonl")
    with pytest.raises(ValueError, match=said):
        run_main(tmp_path, *arguments)
    assert (tmp_path / "results.json").read_text() == "earlier"


def test_without_samples_the_command_says_what_to_run_in_one_line(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "grade.py")], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "run python sample.py" in done.stderr


def test_importing_grade_is_silent_and_needs_no_torch():
    code = ("import sys, grade; "
            "assert not {'torch', 'triton', 'math_verify', 'sympy'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
