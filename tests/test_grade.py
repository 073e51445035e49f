"""What grade.py promises: answers are read and compared as the field does it, the estimators are the textbook ones, and
time is what was measured. Small numbers, worked out by hand or by brute force; nothing is downloaded."""
import itertools
import json
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import grade

ROOT = Path(grade.__file__).parent


def write_run(out, name, answers, golds, seconds=None, sidecar=None):
    """out/<name>/samples.jsonl in the order in which sample.py writes it: answers[p][s], finished at seconds[p][s]."""
    folder = Path(out) / name
    folder.mkdir(parents=True)
    records = []
    for p, row in enumerate(answers):
        for s, answer in enumerate(row):
            at = seconds[p][s] if seconds is not None else 1.0 + s
            records.append({"problem": p, "sample": s, "question": f"question {p}", "gold": golds[p],
                            "completion": "no idea" if answer is None else f"so we get\n#### {answer}",
                            "num_tokens": 10, "finish": "stop" if answer is not None else "length", "seconds": at})
    records.sort(key=lambda r: r["seconds"])
    (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if sidecar is not None:
        (folder / "samples.json").write_text(json.dumps(sidecar))
    return folder / "samples.jsonl"


def write_scores(out, name, scores, seconds=None, crc=False, file="scores.jsonl"):
    """scores[p][s] beside the samples, there at seconds[p][s] since scoring began."""
    records = []
    for r in map(json.loads, (Path(out) / name / "samples.jsonl").read_text().splitlines()):
        p, s = r["problem"], r["sample"]
        records.append({"problem": p, "sample": s, "score": scores[p][s]})
        records[-1] |= {"seconds": seconds[p][s]} if seconds is not None else {}
        records[-1] |= {"crc": f"{zlib.crc32(r['completion'].encode()):08x}"} if crc else {}
    path = Path(out) / name / file
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def run_main(out, *arguments):
    grade.main(["--out", str(out), *arguments])
    return json.loads((Path(out) / "results.json").read_text())


# --- one completion ---

@pytest.mark.parametrize("text, answer", [
    ("so it is \\boxed{42}.", "42"),
    ("\\boxed{1}, no: \\boxed{2}", "2"),                                # the last one counts
    ("\\boxed{\\frac{1}{\\sqrt{2}}}", "\\frac{1}{\\sqrt{2}}"),          # nested braces
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),                              # escaped braces are no braces
    ("\\boxed{$7$}", "7"),
    ("\\boxed{5} and then \\boxed{6", "5"),                             # cut off by the length limit
    ("#### 9 but in fact \\boxed{8}", "8"),                             # boxed before ####
    ("3 + 4 = 7\n#### 7\nnext question", "7"),
    ("#### 1\n#### $1,234.", "1,234"),
    ("#### 1 #### 2", "2"),
    ("The answer is 12. I hope it is correct.", "12"),
    ("the answer is 5, no, the Answer Is: $x = 3.5$.", "x = 3.5"),
    ("The answer is", None),
    ("\\boxed{}", None),
    ("I do not know", None),
    ("", None),
])
def test_extract_answer(text, answer):
    assert grade.extract_answer(text) == answer


@pytest.mark.parametrize("gold, answer, verdict", [
    ("42", "42", True),
    ("42", "43", False),
    ("42", None, False),
    ("42", "", False),
    ("-3", "3", False),
    ("7", "+7", True),
    ("7", "007", True),
    ("7", "7.0", True),
    ("7", "7.5", False),
    ("0.5", ".50", True),
    ("1234", "1,234", True),
    ("1,234,567.5", "1234567.50", True),
    ("1234", "1{,}234", True),
    ("(1,234)", "1234", False),                                          # a pair, not thousands
    ("18", "\\$18", True),
    ("18", "$18.00", True),
    ("12", "12\\text{ apples}", True),
    ("12", "12 apples", True),
    ("3", "3 thousand", False),                                          # not every word is a unit
    ("12", "12 cm", True),
    ("90", "90^\\circ", True),
    ("5", "x = 5", True),
    ("0.5", "1/2", True),
    ("1/2", "0.5", True),
    ("\\frac{1}{2}", "\\dfrac{2}{4}", True),
    ("\\frac{1}{2}", "\\frac{1}{3}", False),
    ("2\\sqrt{2}", "\\sqrt{8}", True),
    ("x+1", "1 + x", True),
    ("x+1", "x-1", False),
    ("(1, 2)", "(2, 1)", False),
    ("\\text{Monday}", "monday", True),
    ("listen", "silent", False),                                         # as products of letters they are equal
    ("120", "5!", True),
    ("1000", "10^{3}", True),
    ("7", "))({\\frac", False),
    ("7", "\x00\ud800", False),
    ("7", "__import__('os').getcwd()", False),
])
def test_is_correct(gold, answer, verdict):
    assert grade.is_correct(answer, gold) is verdict


@pytest.mark.parametrize("answer", ["9**9**9**9", "10^{10^{10}}", "{" * 290, "9" * 100_000 + "^9", "\\frac{" * 40])
def test_hostile_answers_are_wrong_within_the_time_limit(answer, capfd):
    """sympy would compute 10^{10^{10}} for ever. The process that tries is ended, quietly, and the next check works."""
    start = time.time()
    assert grade.is_correct(answer, "x+7") is False
    assert grade.extract_answer("\\boxed{" * 20_000) is None
    assert time.time() - start < 3 * grade.CHECK_SECONDS
    assert grade.equivalent("1/4", "0.25")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_answers_can_be_checked_from_any_thread():
    """math-verify's own time limit needs the main thread; ours must not, and answers must not get mixed up."""
    verdicts = {}
    threads = [threading.Thread(target=lambda i=i: verdicts.update({i: grade.is_correct(f"\\frac{{{i}}}{{8}}", "3/8")}))
               for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {i: i == 3 for i in range(6)}


def test_plain_answers_never_start_math_verify(monkeypatch):
    monkeypatch.setattr(grade, "equivalent", None)
    assert grade.is_correct("0421", "421") and grade.is_correct("x^2", "x^2") and not grade.is_correct("17", "18")


# --- one problem ---

def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 7):
        for c in range(n + 1):
            right = [i < c for i in range(n)]
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(right, k))
                assert grade.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_of_large_n_is_exact():
    assert grade.pass_at_k(10_000, 1, 100) == pytest.approx(0.01)
    assert grade.pass_at_k(10_000, 0, 10_000) == 0.0


@pytest.mark.parametrize("n, c, k", [(4, 1, 5), (4, 1, 0), (4, 5, 2), (4, -1, 2)])
def test_pass_at_k_refuses_impossible_numbers(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        grade.pass_at_k(n, c, k)


@pytest.mark.parametrize("answers, winner", [
    (["1", "2", "2"], "2"),
    (["1", "2", "2", "1"], "1"),                                          # a tie goes to the earliest
    ([None, None, None, "3"], "3"),                                       # None never wins over an answer
    ([None, None], None),
    ([], None),
])
def test_majority_vote(answers, winner):
    assert grade.majority_vote(answers) == winner


def test_weighted_vote_sums_scores_and_best_of_n_takes_the_highest():
    answers, scores = ["1", "2", "2", None], [0.5, 0.3, 0.3, 9.0]
    assert grade.weighted_vote(answers, scores) == "2"                    # 0.6 > 0.5
    assert grade.best_of_n(answers, scores) == "1"
    assert grade.best_of_n(["1", "2"], [0.5, 0.5]) == "1"                 # ties go to the earliest
    assert grade.weighted_vote(["1", "2"], [-1.0, -1.0]) == "1"
    assert grade.best_of_n([None], [1.0]) is None and grade.weighted_vote([], []) is None


@pytest.mark.parametrize("vote", [grade.best_of_n, grade.weighted_vote])
def test_votes_refuse_scores_that_do_not_match(vote):
    with pytest.raises(ValueError, match="shorter"):
        vote(["1", "2"], [0.5])


# --- k of n samples ---

CASE = ["7", "8", None, "7", "9", "8", "7"]
SCORES = np.array([0.1, 0.4, 0.9, 0.2, 0.7, 0.45, 0.3])


def fake_run(**fields):
    """A Run without files: only what a test needs."""
    run = grade.Run.__new__(grade.Run)
    run.__dict__.update(fields)
    return run


@pytest.mark.parametrize("gold", ["7", "8", "9", "none of these"])
@pytest.mark.parametrize("rule", ["majority", "weighted", "best_of_n"])
def test_votes_at_k_agree_with_all_subsets(rule, gold, monkeypatch):
    """Random subsets come near the mean over all; one sample, and all of them, are exact."""
    monkeypatch.setattr(grade, "NUM_SUBSETS", 20_000)
    vote = {"majority": lambda answers, _: grade.majority_vote(answers), "weighted": grade.weighted_vote,
            "best_of_n": grade.best_of_n}[rule]
    ks, n = range(1, len(CASE) + 1), len(CASE)
    run = fake_run(codes=np.array([[0, 1, -1, 0, 2, 1, 0]]), right=np.array([[a == gold for a in CASE]]),
                   scores=SCORES[None])
    # ties go to the earliest in the order in which samples were drawn, so each subset counts in random orders
    rng, expected = np.random.default_rng(1), []
    for k in ks:
        subsets = list(itertools.combinations(range(n), k)) * (60 if k < n else 1)
        orders = [rng.permutation(s) if k < n else s for s in subsets]
        expected.append(np.mean([vote([CASE[i] for i in s], SCORES[list(s)]) == gold for s in orders]))
    curve = run.votes(rule, ks, seed=0)[0]
    assert curve == pytest.approx(expected, abs=0.03)
    assert (curve[0], curve[-1]) == (pytest.approx(expected[0]), expected[-1])


def test_nobody_answers_is_wrong_at_every_k():
    run = fake_run(codes=np.full((1, 4), -1), right=np.zeros((1, 4), bool))
    assert run.votes("majority", [1, 2, 4], seed=0).tolist() == [[0, 0, 0]]


def test_bootstrap_interval_has_the_textbook_width():
    """For 400 coin flips the 95% interval is the mean plus or minus 1.96 sqrt(p (1 - p) / 400) = 0.049."""
    flips = np.repeat([[0.0], [1.0]], 200, axis=0)
    mean, low, high = grade.mean_low_high(flips, seed=0)[:, 0]
    assert mean == 0.5
    assert (mean - low, high - mean) == (pytest.approx(0.049, abs=0.008), pytest.approx(0.049, abs=0.008))
    assert grade.mean_low_high(flips, seed=0)[1, 0] == low  # the seed decides


# --- time ---

def test_seconds_is_when_the_slowest_problem_has_k_completions(tmp_path):
    """Problem 0's samples finish at 1, 2, 9 and problem 1's at 3, 4, 5; sample 0 of problem 1 is the last to finish."""
    write_run(tmp_path, "teacher", [["1"] * 3, ["1"] * 3], ["1", "1"], seconds=[[1, 2, 9], [5, 3, 4]])
    assert grade.Run(str(tmp_path / "teacher")).seconds.tolist() == [3, 4, 9]


def steps(seconds, coverage):
    """A run as ahead() sees it: one problem, made-up numbers."""
    return SimpleNamespace(seconds=np.array(seconds, float), coverage=np.array([coverage]),
                           votes=lambda rule, ks, seed: np.array([coverage])[:, np.array(ks) - 1] / 2)


def test_ahead_worked_out_by_hand():
    """teacher's moments    1    2    4    8   10
       teacher            .10  .30  .40  .70  .72
       student            .20  .25  .50  .60  .60   with k = 1, 2, 3, 4, 4; its lead of .20 at 3 s is no moment of the teacher's
    """
    a = grade.ahead(steps([1, 2, 4, 8, 10], [0.1, 0.3, 0.4, 0.7, 0.72]), steps([0.5, 1.5, 3, 5], [0.2, 0.25, 0.5, 0.6]), seed=0)
    assert a["budgets"] == [[1, 1], [4, 4]] and a["span"] == 1
    assert (a["best_lead"], a["best_lead_seconds"]) == (pytest.approx(10), 1)
    assert [(r["seconds"], r["teacher_k"], r["student_k"]) for r in a["table"]] == [(1, 1, 1), (2, 2, 2), (8, 4, 4), (10, 5, 4)]
    assert [r["lead"] for r in a["table"]] == pytest.approx([10, -5, -10, -12])
    assert [r["student_majority"] for r in a["table"]] == pytest.approx([0.1, 0.125, 0.3, 0.3])
    assert [(r["k"], r["student_seconds"], r["ratio"]) for r in a["equal_coverage"]] == [
        (1, 0.5, 2), (2, 3, pytest.approx(2 / 3)), (4, None, None), (5, None, None)]


def test_consecutive_moments_ahead_are_one_stretch_of_budgets():
    """At 6 s they are level, which is not ahead."""
    a = grade.ahead(steps([1, 2, 4, 6, 8], [0.1, 0.2, 0.3, 0.4, 0.9]), steps([1, 2, 4, 5, 8], [0.2, 0.3, 0.4, 0.4, 0.5]), seed=0)
    assert a["budgets"] == [[1, 4]] and a["span"] == 4


def test_moments_before_the_students_first_round_do_not_count():
    a = grade.ahead(steps([1, 2, 3], [0.1, 0.2, 0.3]), steps([3, 4, 5], [0.2, 0.9, 0.9]), seed=0)
    assert a["budgets"] == [] and a["span"] is None and (a["best_lead"], a["best_lead_seconds"]) == (pytest.approx(-10), 3)
    assert [(r["student_k"], r["lead"], r["student_majority"]) for r in a["table"]][:2] == [(0, None, None)] * 2
    late = grade.ahead(steps([1, 2], [0.1, 0.2]), steps([3, 4], [0.9, 0.9]), seed=0)
    assert (late["best_lead"], late["best_lead_low"], late["best_lead_seconds"], late["budgets"]) == (None, None, None, [])
    assert "completes no round" in grade.verdict("teacher", "late", late)


def test_lead_intervals_are_paired(tmp_path):
    """The student is right on exactly the teacher's problems and one more of 20: a lead of 5 points. Unpaired, the
    interval would be about +-31 points; paired, the lead can never be negative."""
    golds = [str(1000 + p) for p in range(20)]
    for name, solved in (("teacher", 10), ("pure", 11)):
        write_run(tmp_path, name, [[g if p < solved else "0"] for p, g in enumerate(golds)], golds)
    a = run_main(tmp_path)["models"]["pure"]["ahead"]
    assert a["best_lead"] == pytest.approx(5) and a["best_lead_low"] >= 0 and a["best_lead_high"] <= 20


# --- whole runs ---

def example(out):
    """Three models on three problems, four samples each."""
    golds = ["10", "20", "30"]
    right = {"teacher": (4, 2, 0), "pure": (3, 1, 1), "hybrid": (4, 1, 1)}
    for name, speed in (("teacher", 2.0), ("pure", 0.5), ("hybrid", 1.0)):
        answers = [[g] * c + [None, "5", "6", "7"][:4 - c] for g, c in zip(golds, right[name])]
        write_run(out, name, answers, golds, seconds=[[speed * (s + 1) for s in range(4)]] * 3,
                  sidecar={"settings": {"num_samples": 4, "task": "arithmetic"}, "device": "cpu (test)",
                           "dtype": "float32", "params": 1000, "tokens_per_second": 50.0, "date": "2026-11-21"})


def test_results_json_and_the_report(tmp_path, capsys):
    example(tmp_path)
    results = run_main(tmp_path)
    assert list(results["models"]) == ["teacher", "pure", "hybrid"] and results["teacher"] == "teacher"
    teacher, pure = results["models"]["teacher"], results["models"]["pure"]
    assert teacher["k"] == [1, 2, 4] and teacher["seconds"] == [2, 4, 8]
    for curve in ("coverage", "majority"):
        assert all(low <= x <= high for low, x, high in zip(*(teacher[curve + s] for s in ("_low", "", "_high")), strict=True))
    assert teacher["coverage"] == pytest.approx([6 / 12, (1 + 5 / 6 + 0) / 3, 2 / 3])
    assert teacher["majority"][0] == pytest.approx(teacher["coverage"][0])  # a vote of one
    assert teacher["majority"][-1] == pytest.approx(2 / 3)  # 20, 20, None, 5: 20 wins
    assert (teacher["params"], teacher["tokens_per_second"], teacher["num_problems"]) == (1000, 50.0, 3)
    assert teacher["answered"] == pytest.approx(10 / 12) and teacher["luck"] == 0
    assert "ahead" not in teacher and "best_of_n" not in teacher
    assert set(pure["ahead"]) == {"budgets", "span", "best_lead", "best_lead_low", "best_lead_high", "best_lead_seconds",
                                  "table", "equal_coverage"}
    printed = capsys.readouterr().out
    assert "pure is ahead of teacher at budgets from 2.0 to 8.0 s (a factor of 4.0)" in printed
    assert "arithmetic on cpu (test), float32, 2026-11-21" in printed
    assert grade.report(results) in printed


def test_without_samples_json_speed_comes_from_the_samples(tmp_path):
    write_run(tmp_path, "teacher", [["1"] * 3], ["1"], seconds=[[1, 2, 5]])
    model = run_main(tmp_path)["models"]["teacher"]
    assert model["params"] is None and model["tokens_per_second"] == pytest.approx(30 / 5)
    assert model["k"] == [1, 2, 3]  # n itself, though no power of two


@pytest.mark.parametrize("golds, answers, luck", [
    (["1", "2", "3"], [["1", "3"], ["1", "3"], ["2", "1"]], 1.0),  # each has the answer of the one before among its own
    (["1", "2", "3"], [["1", "9"], ["2", "1"], ["8", "3"]], 1 / 3),
    (["1", "1", "2"], [["1", "1"], ["1", "1"], ["2", "2"]], 0.0),  # a problem with the same answer is no test of luck
    (["1", "1"], [["1", "2"], ["1", "1"]], None),
])
def test_luck_counts_hits_on_another_problems_answer(golds, answers, luck, tmp_path):
    write_run(tmp_path, "teacher", answers, golds)
    assert run_main(tmp_path)["models"]["teacher"]["luck"] == pytest.approx(luck)


def test_scores_add_best_of_n_and_weighted_if_they_are_complete(tmp_path, capsys):
    path = write_run(tmp_path, "teacher", [["1", "2", "2"]], ["1"])
    scores = [{"problem": 0, "sample": s, "score": x} for s, x in enumerate([0.9, 0.3, 0.3])]
    (path.parent / "scores.jsonl").write_text("".join(json.dumps(s) + "\n" for s in scores))
    model = run_main(tmp_path)["models"]["teacher"]
    assert (model["majority"][-1], model["best_of_n"][-1], model["weighted"][-1]) == (0, 1, 1)
    assert model["best_of_n"] == pytest.approx([1 / 3, 2 / 3, 1], abs=0.1)
    (path.parent / "scores.jsonl").write_text(json.dumps(scores[0]) + "\n")
    assert "best_of_n" not in run_main(tmp_path)["models"]["teacher"]
    assert "scores.jsonl lacks some of the samples" in capsys.readouterr().out


def test_scoring_takes_its_own_time(tmp_path, capsys):
    """Samples at 1, 2, 3, 4 s. All of round k is scored when the slower problem has k scores, in whatever order they came:
    at 0.5, 0.8, 2.0 and 2.5 s. Votes by scores pay both."""
    write_run(tmp_path, "teacher", [["1", "2", "2", "1"]] * 2, ["1", "2"])
    write_scores(tmp_path, "teacher", [[0.9, 0.1, 0.2, 0.8]] * 2, [[0.1, 0.2, 0.3, 0.4], [0.8, 0.5, 2.0, 2.5]], crc=True)
    results = run_main(tmp_path, "--scores")
    model = results["models"]["teacher"]
    assert model["k"] == [1, 2, 4] and model["seconds"] == [1, 2, 4]
    assert model["scoring_seconds"] == [0.5, 0.8, 2.5] and model["seconds_scored"] == [1.5, 2.8, 6.5]
    assert capsys.readouterr().out.count("|         4.0 |        2.5 |    6.5 |") == 1
    write_scores(tmp_path, "teacher", [[0.9, 0.1, 0.2, 0.8]] * 2)
    model = run_main(tmp_path)["models"]["teacher"]
    assert model["scoring_seconds"] is None and model["seconds_scored"] is None
    assert "How long scoring took is unknown for teacher and not counted" in capsys.readouterr().out


def test_scores_may_lie_in_another_file_and_say_where_they_come_from(tmp_path, capsys):
    path = write_run(tmp_path, "teacher", [["1", "2", "2"]], ["1"])
    write_scores(tmp_path, "teacher", [[0.9, 0.3, 0.3]], file="scores-prm.jsonl")
    (path.parent / "scores-prm.json").write_text('{"settings": {"model": "out/verifier", "kind": "prm", "aggregate": "min"}}')
    assert "weighted" not in run_main(tmp_path)["models"]["teacher"]
    assert "weighted" in run_main(tmp_path, "--scores", "scores-prm.jsonl")["models"]["teacher"]
    assert "by scores (scores-prm.jsonl, model out/verifier, kind prm, aggregate min)." in capsys.readouterr().out


@pytest.mark.parametrize("right, wrong, said", [  # scores
    (0.9, 0.1, "at k = 2, 4, 5 (interval above 0: 2, 4, 5), at best by +100.0 [+100.0, +100.0] points at k = 5."),
    (0.5, 0.5, "at no k (interval above 0: none), at best by +0.0 [+0.0, +0.0] points at k = 2."),
    (0.1, 0.9, "at no k (interval above 0: none), at best by +0.0 [+0.0, +0.0] points at k = 5."),
])
def test_the_report_says_at_which_k_weighting_beats_the_majority(right, wrong, said, tmp_path, capsys):
    """Two of five samples are right, so a full majority is wrong: 100 points to win with scores that know, nothing with
    constant ones; scores that favour the wrong answer make it worse, but for k = 5, where it is wrong already."""
    golds = [str(1000 + p) for p in range(40)]
    write_run(tmp_path, "pure", [["7", "7", gold, "7", gold] for gold in golds], golds)
    write_scores(tmp_path, "pure", [[wrong, wrong, right, wrong, right]] * 40)
    model = run_main(tmp_path, "--scores")["models"]["pure"]
    assert f"- pure: the weighted vote is ahead of the majority {said}" in capsys.readouterr().out
    assert model["gain"] == pytest.approx([100 * (w - m) for w, m in zip(model["weighted"], model["majority"], strict=True)])
    assert model["gain"][0] == 0 and (model["gain_high"][1] < 0) == (right < wrong)


SCORES_LINE = {"problem": 0, "sample": 1, "score": 0.5}


def crc_of(text):
    return f"{zlib.crc32(text.encode()):08x}"


@pytest.mark.parametrize("change, said", [
    (lambda lines: lines[:3], r"lacks some of the samples: 3 of 6 have no score, the first is problem 1, sample 0; run python "
                              r"sample.py --score MODEL"),
    (lambda lines: lines[:5] + [lines[5][:-9]], "1 of 6 have no score, the first is problem 1, sample 2"),  # a torn line
    (lambda lines: lines + [json.dumps(SCORES_LINE | {"problem": 2})], r"of other samples \(problem 2, sample 1 is not in"),
    (lambda lines: lines + [json.dumps(SCORES_LINE | {"sample": 3})], r"of other samples \(problem 0, sample 3 is not in"),
    (lambda lines: lines + [json.dumps(SCORES_LINE | {"crc": crc_of("another text")})],
     r"scores of other samples \(problem 0, sample 1 has another text in samples.jsonl\)"),
    (lambda lines: lines + [json.dumps(SCORES_LINE | {"score": 0.25})], "problem 0, sample 1 has two scores, 0.5 and 0.25"),
    (lambda lines: ['{"problem": 0, "sample": 0, "score": NaN}'] + lines[1:], "the score of problem 0, sample 0 is nan"),
    (lambda lines: ['{"problem": 0, "sample": 0, "score": -Infinity}'] + lines[1:], "the score of problem 0, sample 0 is -inf"),
    (lambda lines: ['{"problem": 0, "sample": 0, "score": 1, "seconds": "x"}'] + lines[1:], "the seconds of .* is x"),
    (lambda lines: ['{"problem": 0, "sample": 0}'] + lines[1:], "line 1 is not an object with problem, sample, score"),
])
def test_scores_that_do_not_fit_are_an_error_if_asked_for_and_a_note_if_not(change, said, tmp_path, capsys):
    """Scores of other samples would give numbers that look like any others. Nothing is overwritten."""
    write_run(tmp_path, "teacher", [["1", "2", "2"]] * 2, ["1", "2"])
    write_run(tmp_path, "pure", [["1", "2", "2"]] * 2, ["1", "2"])
    write_scores(tmp_path, "teacher", [[0.9, 0.3, 0.3]] * 2)
    path = write_scores(tmp_path, "pure", [[0.5] * 3] * 2)
    lines = sorted(path.read_text().splitlines())
    path.write_text("\n".join(change(lines)))
    (tmp_path / "results.json").write_text("earlier")
    with pytest.raises(ValueError, match=said):
        run_main(tmp_path, "--scores")
    assert (tmp_path / "results.json").read_text() == "earlier"
    capsys.readouterr()
    models = run_main(tmp_path)["models"]
    assert "weighted" in models["teacher"] and "weighted" not in models["pure"]
    note, rest, *_ = capsys.readouterr().out.splitlines()
    assert note.endswith("until then it does not count") and str(path) in note
    assert rest == "no scores of pure: the front is that of coverage and majority"


def test_scores_asked_for_but_not_there(tmp_path):
    write_run(tmp_path, "teacher", [["1"]], ["1"])
    with pytest.raises(ValueError, match="no .*teacher/scores.jsonl: run python sample.py --score MODEL"):
        run_main(tmp_path, "--scores")
    with pytest.raises(ValueError, match="no .*teacher/mine.jsonl: "):
        run_main(tmp_path, "--scores", "mine.jsonl")


def test_a_pair_scored_twice_alike_counts_once(tmp_path):
    """As after a kill between a write and its record."""
    write_run(tmp_path, "teacher", [["1", "2"]], ["1"])
    path = write_scores(tmp_path, "teacher", [[0.9, 0.3]], [[1.0, 2.0]])
    path.write_text(path.read_text() + '{"problem": 0, "sample": 1, "score": 0.3, "seconds": 9.0}\n')
    assert run_main(tmp_path, "--scores")["models"]["teacher"]["scoring_seconds"] == [1, 2]


def test_a_torn_last_line_is_dropped_and_uneven_samples_are_named(tmp_path, capsys):
    path = write_run(tmp_path, "teacher", [["1"] * 2, ["1"] * 2], ["1", "1"])
    path.write_text(path.read_text()[:-30])
    model = run_main(tmp_path)["models"]["teacher"]
    assert model["num_samples"] == 1 and model["num_problems"] == 2
    assert "only 1 of 2 samples" in capsys.readouterr().out


def test_without_a_teacher_there_is_no_ahead_and_a_line_says_so(tmp_path, capsys):
    write_run(tmp_path, "pure", [["1"]], ["1"])
    results = run_main(tmp_path)
    assert results["teacher"] is None and "ahead" not in results["models"]["pure"]
    assert "no teacher among these models" in capsys.readouterr().out


def test_a_teacher_of_any_name_joins_the_models_asked_for(tmp_path):
    example(tmp_path)
    results = run_main(tmp_path, "--model", "pure", "--teacher", "hybrid")
    assert list(results["models"]) == ["pure", "hybrid"] and "ahead" in results["models"]["pure"]


def test_models_on_different_problems_are_not_compared(tmp_path, capsys):
    write_run(tmp_path, "teacher", [["1"], ["2"]], ["1", "2"])
    write_run(tmp_path, "pure", [["1"], ["2"]], ["1", "3"])
    assert "ahead" not in run_main(tmp_path)["models"]["pure"]
    assert "pure and teacher were sampled on different problems" in capsys.readouterr().out


def test_settings_that_differ_are_named(tmp_path, capsys):
    for name, batch in (("teacher", 64), ("pure", 256)):
        write_run(tmp_path, name, [["1"]], ["1"], sidecar={"settings": {"batch_size": batch, "weights": name}})
    run_main(tmp_path)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert notes == ["note: pure was sampled with batch_size 256, teacher with 64"]


def test_grading_twice_gives_the_same_file(tmp_path):
    example(tmp_path)
    assert run_main(tmp_path, "--seed", "3") == run_main(tmp_path, "--seed", "3")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hybrid", "pure", "results.json", "teacher"]


# --- two sizes and the front ---

SIX = ["teacher", "pure", "hybrid", "teacher-small", "pure-small", "hybrid-small"]


@pytest.mark.parametrize("name, names, teacher", [
    ("pure", SIX, "teacher"),
    ("pure-small", SIX, "teacher-small"),
    ("my-own-small", SIX, "teacher-small"),
    ("pure-small", SIX[:3], "teacher"),
    ("pure-big", SIX, "teacher"),
    ("pure-very-small", SIX + ["teacher-very-small"], "teacher-very-small"),
])
def test_a_students_teacher_has_its_size(name, names, teacher):
    assert grade.teacher_of(name, names) == teacher


def test_two_sizes_each_student_is_compared_with_its_own_teacher(tmp_path, capsys):
    for i, name in enumerate(reversed(SIX)):
        write_run(tmp_path, name, [["1"], ["2"]], ["1", "2"], seconds=[[i + 1]] * 2)
    write_run(tmp_path, "another", [["1"], ["2"]], ["1", "2"], seconds=[[9]] * 2)
    results = run_main(tmp_path)
    assert list(results["models"]) == SIX + ["another"] and results["teacher"] == "teacher"
    assert {name: m["teacher"] for name, m in results["models"].items() if "ahead" in m} == {
        "pure": "teacher", "hybrid": "teacher", "another": "teacher",
        "pure-small": "teacher-small", "hybrid-small": "teacher-small"}
    assert "**pure-small is ahead of teacher-small at no time budget" in capsys.readouterr().out  # as good, faster
    results = run_main(tmp_path, "--teacher", "pure")
    assert {m["teacher"] for name, m in results["models"].items() if name != "pure"} == {"pure"} == {results["teacher"]}
    assert "ahead" not in results["models"]["pure"]
    results = run_main(tmp_path, "--model", "teacher-small", "pure-small")
    assert results["teacher"] is None and results["models"]["pure-small"]["teacher"] == "teacher-small"


def staircase(name, seconds, values):
    """A Curve of one problem per row of values."""
    values = np.array(values, float)
    return grade.Curve(name, np.arange(1, len(seconds) + 1), np.array(seconds, float), values, values.mean(0).round(9))


def test_the_front_agrees_with_a_literal_loop():
    """At each moment: every model's rounds counted one by one, the best of them by hand, and the lead over the second."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        curves = [staircase(name, np.sort(rng.integers(1, 30, n)), rng.integers(0, 2, (3, n))) for name, n in
                  (("a", 4), ("b", 7), ("c", 2))]
        steps, moments = grade.front_steps(curves), np.arange(0, 33)
        budgets = {row["seconds"]: row for row in grade.front_at(curves, moments, seed=0)}
        for moment in moments:
            there = []
            for c in curves:
                k = sum(second <= moment for second in c.seconds)
                if k:
                    value = sum(problem[k - 1] for problem in c.values) / 3
                    first = min(s for s, *column in zip(c.seconds, *c.values) if sum(column) / 3 > value - 1e-9)
                    there.append((-value, first, c.name, k, c.values[:, k - 1]))
            there.sort(key=lambda place: place[:3])
            assert (moment in budgets) == bool(there)
            if there:
                (value, _, name, k, column), *others = there
                row = budgets[moment]
                assert (row["model"], row["k"], row["value"]) == (name, k, pytest.approx(-value))
                at = [step for step in steps if step[0] <= moment][-1]
                assert at[1:] == [name, k, pytest.approx(-value)]
                assert row["next"] == (others[0][2] if others else None)
            if len(there) > 1:
                expected = grade.mean_low_high(100 * (column - others[0][4])[:, None], 0)[:, 0]
                assert [row["lead"], row["lead_low"], row["lead_high"]] == pytest.approx(expected)


def test_ties_go_to_who_was_there_first_and_votes_may_get_worse():
    """b equals a's .5 at 3 s: a had it first. At 4 s a's vote has dropped to .4 and a has no better k to go back to."""
    a, b = staircase("a", [1, 2, 4], [[0.3, 0.5, 0.4]]), staircase("b", [3, 5], [[0.5, 0.4]])
    assert grade.front_steps([b, a]) == [[1, "a", 1, 0.3], [2, "a", 2, 0.5], [4, "b", 1, 0.5], [5, "a", 3, 0.4]]
    assert grade.stretches(grade.front_steps([b, a])) == [["a", 1, 4], ["b", 4, 5], ["a", 5, None]]


@pytest.mark.parametrize("changes, said", [
    ([(1, "a")], "a from 1.00 s on."),
    ([(1, "a"), (4, "b")], "a from 1.00 s, b from 4.00 s on."),
    ([(1, "a"), (4, "b"), (4.5, "a"), (5, "b"), (5.1, "c")], "a from 1.00 s, b or a from 4.00 s, c from 5.10 s on."),
    ([(1, "a"), (1.1, "b")], "a from 1.00 s, b from 1.10 s on."),
])
def test_the_front_in_words_puts_short_stretches_together(changes, said):
    assert grade.front_line("coverage", [[at, name, 1, 0.5] for at, name in changes]) == f"Front of coverage: {said}"


def test_budgets_are_1_2_5_between_the_first_and_the_last_moment():
    assert grade.budgets_between(0.7, 23.0) == [0.7, 1, 2, 5, 10, 20, 23.0]
    assert grade.budgets_between(2.0, 5.0) == [2, 5] and grade.budgets_between(3.0, 3.0) == [3]
    assert grade.budgets_between(0.0, 0.003) == [0, 0.001, 0.002, 0.003]


def test_the_front_in_results_json(tmp_path, capsys):
    """pure: 5 of 6 right from 0.5 s on, in part. The teacher's three rounds come at 2, 4, 6 and 8 s."""
    example(tmp_path)
    results = run_main(tmp_path)
    assert list(results["front"]) == list(results["front_steps"]) == ["coverage", "majority"]
    rows = results["front"]["coverage"]
    assert [row["seconds"] for row in rows] == [0.5, 1, 2, 5, 8]
    assert [(row["model"], row["k"]) for row in rows] == [("pure", 1), ("pure", 2), ("pure", 4), ("pure", 4), ("pure", 4)]
    assert [row["next"] for row in rows] == [None, "hybrid", "hybrid", "hybrid", "hybrid"]
    assert [row["lead"] for row in rows[1:]] == pytest.approx([100 * (2 / 3 - 0.5), 100 / 3 * (3 - 1 - 0.5 - 0.5), 0, 0])
    assert results["front_models"] == ["teacher", "pure", "hybrid"]
    said = capsys.readouterr().out
    assert "- Front of coverage: pure from 0.50 s on." in said and "|    8.00 | pure@4 100.0% |" in said


def test_models_on_other_problems_are_not_on_the_front(tmp_path, capsys):
    for name, golds in (("teacher", ["1", "2"]), ("pure", ["1", "2"]), ("hybrid", ["1", "3"])):
        write_run(tmp_path, name, [["1"], ["2"]], golds)
    assert run_main(tmp_path)["front_models"] == ["teacher", "pure"]
    assert "left out of the front, since sampled on other problems than teacher: hybrid\n" in capsys.readouterr().out
    assert run_main(tmp_path, "--model", "teacher", "hybrid")["front"] == {}
    assert run_main(tmp_path, "--model", "teacher")["front"] == {}


def test_votes_by_scores_join_the_front_with_the_time_of_scoring_if_all_models_know_it(tmp_path, capsys):
    """pure is faster to sample but slow to score: it is first with a majority and last with a weighted vote."""
    for name, sampling, scoring in (("teacher", 2.0, 1.0), ("pure", 1.0, 9.0)):
        write_run(tmp_path, name, [["1", "1"], ["2", "2"]], ["1", "2"], seconds=[[sampling] * 2] * 2)
        write_scores(tmp_path, name, [[0.5, 0.5]] * 2, seconds=[[scoring] * 2] * 2)
    results = run_main(tmp_path)
    assert results["front_steps"] == {"coverage": [[1, "pure", 2, 1]], "majority": [[1, "pure", 2, 1]],
                                      "best_of_n": [[3, "teacher", 2, 1]], "weighted": [[3, "teacher", 2, 1]]}
    assert [row["seconds"] for row in results["front"]["weighted"]] == [5, 10] and results["front_with_scoring"]
    assert "weighted with the time of scoring" in capsys.readouterr().out
    write_scores(tmp_path, "pure", [[0.5, 0.5]] * 2)
    results = run_main(tmp_path)
    assert results["front_steps"]["weighted"] == [[1, "pure", 2, 1]] and not results["front_with_scoring"]
    assert "weighted without the time of scoring" in capsys.readouterr().out


def test_votes_among_many_samples_are_taken_at_fewer_k():
    n = 100
    run = fake_run(name="a", codes=np.zeros((1, n), int), right=np.ones((1, n), bool), seconds=np.arange(1.0, n + 1),
                   coverage=np.ones((1, n)))
    assert grade.curve(run, "coverage", False, 0).ks.tolist() == list(range(1, n + 1))
    votes = grade.curve(run, "majority", False, 0)
    assert len(votes.ks) < 50 and {1, 2, 4, 8, 16, 32, 64, n} <= set(votes.ks) and votes.seconds.tolist() == votes.ks.tolist()
    assert votes.values.tolist() == [[1] * len(votes.ks)]


# --- mistakes ---

def break_line(path, number, line):
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")


def without(path, number, field):
    record = json.loads(path.read_text().splitlines()[number - 1])
    del record[field]
    return json.dumps(record)


@pytest.mark.parametrize("arguments, damage, said", [
    (["--model", "mamba"], None, "no samples of mamba under .*: choose from teacher, pure, hybrid"),
    (["--teacher", "llama"], None, "no samples of llama under .*: choose from teacher, pure, hybrid"),
    (["--seed", "-1"], None, "expected non-negative integer"),
    ([], lambda p: break_line(p, 2, '{"problem": 0, "sam'), "samples.jsonl, line 2 is not an object with problem, .*: {\"problem"),
    ([], lambda p: break_line(p, 2, without(p, 2, "seconds")), "samples.jsonl, line 2 .* .'seconds'.: "),
    ([], lambda p: break_line(p, 3, "[1, 2]"), "samples.jsonl, line 3 is not an object"),
    ([], lambda p: p.write_text(""), "samples.jsonl is empty: run python sample.py first"),
    ([], lambda p: (p.parent / "samples.json").write_text("{"), "samples.json is not readable JSON"),
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
    done = subprocess.run([sys.executable, str(ROOT / "grade.py")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "run python sample.py first" in done.stderr


def test_importing_grade_is_silent_and_needs_no_torch():
    code = ("import sys, grade; "
            "assert not {'torch', 'triton', 'math_verify', 'sympy'} & set(sys.modules), 'heavy import'")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
