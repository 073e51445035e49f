"""What grade.py promises: answers are read and compared as the field does it, the estimators are the textbook ones, and
time is what was measured. Small numbers, worked out by hand or by brute force; nothing is downloaded."""
import itertools
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import grade


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


def run_main(monkeypatch, out, *arguments):
    monkeypatch.setattr(sys, "argv", ["grade.py", "--out", str(out), *arguments])
    grade.main()
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


@pytest.mark.parametrize("answer", ["9**9**9**9", "10^{10^{10}}", "(" * 250, "9" * 100_000 + "^9", "\\frac{" * 40])
def test_hostile_answers_are_wrong_within_the_time_limit(answer, capfd, monkeypatch):
    """sympy would compute 10^{10^{10}} for ever. The check runs in a process that is killed, quietly, and the next
    check works."""
    monkeypatch.setattr(grade, "CHECK_SECONDS", 1.5)
    start = time.time()
    assert grade.is_correct(answer, "x+7") is False
    assert grade.extract_answer("\\boxed{" * 20_000) is None
    assert time.time() - start < 6
    assert grade.equivalent("1/4", "0.25")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_answers_can_be_checked_from_any_thread():
    """math-verify's own time limit needs signal.alarm and so the main thread; ours must not."""
    verdicts = []
    threads = [threading.Thread(target=lambda i=i: verdicts.append(grade.is_correct(f"\\frac{{{i}}}{{8}}", f"{i}/8")))
               for i in (1, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True, True, True]


# --- one problem ---

def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 7):
        for c in range(n + 1):
            right = [i < c for i in range(n)]
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(right, k))
                assert grade.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
                assert grade.coverage_table(n)[c, k - 1] == pytest.approx(grade.pass_at_k(n, c, k))


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
    with pytest.raises(ValueError, match="2 answers and 1 scores"):
        vote(["1", "2"], [0.5])


# --- k of n samples ---

def brute_force(vote, answers, gold, k):
    """Share of the k-subsets (in sample order) whose vote is right."""
    subsets = list(itertools.combinations(range(len(answers)), k))
    return np.mean([vote(subset) == gold for subset in subsets])


CASE = ["7", "8", None, "7", "9", "8", "7"]


def as_arrays(answers, gold):
    names = list(dict.fromkeys(a for a in answers if a is not None))
    return np.array([-1 if a is None else names.index(a) for a in answers]), np.array([a == gold for a in answers])


@pytest.mark.parametrize("gold", ["7", "8", "9", "none of these"])
def test_majority_curve_is_exact_at_1_and_n_and_near_brute_force_between(gold, monkeypatch):
    monkeypatch.setattr(grade, "NUM_SUBSETS", 20_000)
    groups, right = as_arrays(CASE, gold)
    ks = range(1, len(CASE) + 1)
    curve = grade.vote_curve(groups, right, np.ones(len(CASE)), ks, np.random.default_rng(0))
    expected = [brute_force(lambda s: grade.majority_vote([CASE[i] for i in s]), CASE, gold, k) for k in ks]
    assert curve == pytest.approx(expected, abs=0.015)                    # standard error of 20,000 draws: 0.004
    assert curve[0] == pytest.approx(expected[0]) and curve[-1] == expected[-1]


def test_weighted_curve_agrees_with_brute_force(monkeypatch):
    monkeypatch.setattr(grade, "NUM_SUBSETS", 20_000)
    scores = np.array([0.1, 0.45, 0.9, 0.2, -0.7, 0.05, 0.3])
    groups, right = as_arrays(CASE, "7")
    curve = grade.vote_curve(groups, right, scores, range(1, 8), np.random.default_rng(0))
    expected = [brute_force(lambda s: grade.weighted_vote([CASE[i] for i in s], scores[list(s)]), CASE, "7", k)
                for k in range(1, 8)]
    assert curve == pytest.approx(expected, abs=0.015)


def test_best_of_n_curve_equals_brute_force():
    scores = np.array([0.1, 0.4, 0.9, 0.2, 0.7, 0.4, 0.3])
    groups, right = as_arrays(CASE, "8")
    run = {"scores": scores[None], "groups": groups[None], "right": right[None], "num_samples": len(CASE)}
    expected = [brute_force(lambda s: grade.best_of_n([CASE[i] for i in s], scores[list(s)]), CASE, "8", k)
                for k in range(1, 8)]
    assert grade.best_of_n_curve(run)[0] == pytest.approx(expected)


def test_nobody_answers_is_wrong_at_every_k():
    curve = grade.vote_curve(np.full(4, -1), np.zeros(4, bool), np.ones(4), [1, 2, 4], np.random.default_rng(0))
    assert curve == [0, 0, 0]


def test_bootstrap_interval_brackets_the_mean_and_has_the_textbook_width():
    """For 400 coin flips the 95% interval is the mean plus or minus 1.96 sqrt(p (1 - p) / 400) = 0.049."""
    flips = np.zeros((400, 1))
    flips[:200] = 1
    (mean,), (low,), (high,) = grade.mean_low_high(flips, seed=0)
    assert mean == 0.5
    assert (mean - low, high - mean) == (pytest.approx(0.049, abs=0.008), pytest.approx(0.049, abs=0.008))
    assert grade.mean_low_high(flips, seed=0)[1] == [low]                 # the seed decides


# --- time ---

def test_seconds_is_when_the_slowest_problem_has_k_completions(tmp_path):
    """Problem 0's samples finish at 1, 2, 9 and problem 1's at 3, 4, 5; sample 0 of problem 1 is the last to finish."""
    write_run(tmp_path, "teacher", [["1"] * 3, ["1"] * 3], ["1", "1"], seconds=[[1, 2, 9], [5, 3, 4]])
    run = grade.load_run(str(tmp_path / "teacher"), "teacher", False)
    assert run["seconds"].tolist() == [3, 4, 9]


def steps(name, seconds, coverage):
    """A run as ahead() sees it, with one problem and made-up numbers."""
    return {"name": name, "seconds": np.array(seconds, float), "coverage": np.array([coverage]), "num_samples": len(seconds),
            "ids": [0], "groups": np.zeros((1, len(seconds)), int), "right": np.ones((1, len(seconds)), bool)}


TEACHER = steps("teacher", [1, 2, 4, 8], [0.1, 0.3, 0.4, 0.7])
STUDENT = steps("pure", [0.5, 1.5, 3, 5], [0.2, 0.25, 0.5, 0.6])


def test_ahead_on_step_functions_worked_out_by_hand():
    """moment   1    1.5    2     3    4    5    8
       teacher .10   .10   .30   .30  .40  .40  .70
       student .20   .25   .25   .50  .50  .60  .60   (its 0.5 s do not count: the teacher had nothing yet)"""
    a = grade.leads(TEACHER, STUDENT, seed=0)
    assert a["budgets"] == [[1, 2], [3, 8]]
    assert a["span"] == pytest.approx(8 / 3)
    assert (a["best_lead"], a["best_lead_seconds"]) == (pytest.approx(20), 3)
    assert (a["round_lead"], a["round_lead_seconds"]) == (pytest.approx(10), 1)      # among 1, 2, 4, 8


def test_fixed_budgets_and_equal_coverage_worked_out_by_hand():
    rows = grade.fixed_budgets(TEACHER, STUDENT, seed=0)
    assert [(r["seconds"], r["teacher_k"], r["student_k"]) for r in rows] == [(1, 1, 1), (2, 2, 2), (8, 4, 4)]
    assert [r["lead"] for r in rows] == pytest.approx([10, -5, -10])
    rows = grade.equal_coverage(TEACHER, STUDENT)
    assert [(r["k"], r["student_k"], r["ratio"]) for r in rows] == [(1, 1, 2.0), (2, 3, pytest.approx(2 / 3)), (4, None, None)]


def test_a_student_without_a_complete_round_is_not_ahead():
    """The teacher is done before the student's first round: compared from there on, the teacher held flat."""
    a = grade.ahead(steps("teacher", [1, 2], [0.1, 0.2]), steps("late", [5, 6], [0.9, 0.95]), seed=0)
    assert a["budgets"] == [[5, 6]] and (a["round_lead"], a["round_lead_seconds"]) == (pytest.approx(70), 5)
    assert [row["student_k"] for row in a["table"]] == [0, 0]
    assert [row["lead"] for row in a["table"]] == [None, None]


def test_a_student_that_is_never_ahead_has_no_budgets():
    a = grade.leads(steps("teacher", [1, 2], [0.5, 0.6]), steps("worse", [1, 2], [0.5, 0.5]), seed=0)
    assert (a["budgets"], a["span"], a["best_lead"]) == ([], None, 0)


def test_lead_intervals_are_paired(tmp_path, monkeypatch):
    """The student is right on exactly the teacher's problems and one more of 20: a lead of 5 points. Unpaired, the
    interval would be about +-31 points; paired, the lead can never be negative."""
    golds = [str(1000 + p) for p in range(20)]
    for name, solved in (("teacher", 10), ("pure", 11)):
        write_run(tmp_path, name, [[g if p < solved else "0"] for p, g in enumerate(golds)], golds)
    a = run_main(monkeypatch, tmp_path)["models"]["pure"]["ahead"]
    assert a["best_lead"] == pytest.approx(5) and a["best_lead_low"] >= 0 and a["best_lead_high"] <= 20


# --- whole runs ---

def example(out):
    """Three models on three problems, four samples each."""
    golds = ["10", "20", "30"]
    right = {"teacher": (4, 2, 0), "pure": (3, 1, 1), "hybrid": (4, 1, 1)}
    for name, speed in (("teacher", 2.0), ("pure", 0.5), ("hybrid", 1.0)):
        answers = [[g] * c + [None, "5", "6", "7"][:4 - c] for g, c in zip(golds, right[name])]
        write_run(out, name, answers, golds, seconds=[[speed * (s + 1) for s in range(4)]] * 3,
                  sidecar={"settings": {"num_samples": 4, "task": "arithmetic", "model": name}, "device": "cpu (test)",
                           "dtype": "float32", "params": 1000, "tokens_per_second": 50.0, "date": "2026-11-21"})


def test_results_json_layout(tmp_path, monkeypatch, capsys):
    example(tmp_path)
    results = run_main(monkeypatch, tmp_path)
    assert list(results["models"]) == ["hybrid", "pure", "teacher"] and results["teacher"] == "teacher"
    teacher, pure = results["models"]["teacher"], results["models"]["pure"]
    assert teacher["k"] == [1, 2, 4] and teacher["seconds"] == [2, 4, 8]
    for curve in ("coverage", "majority"):
        assert all(len(teacher[curve + suffix]) == 3 for suffix in ("", "_low", "_high"))
        assert all(low <= x <= high for low, x, high in zip(*(teacher[curve + s] for s in ("_low", "", "_high"))))
    assert teacher["coverage"] == pytest.approx([6 / 12, (1 + 5 / 6 + 0) / 3, 2 / 3])
    assert teacher["majority"][0] == pytest.approx(teacher["coverage"][0])            # a vote of one
    assert teacher["majority"][-1] == pytest.approx(2 / 3)                            # 20, 20, None, 5: 20 wins
    assert (teacher["params"], teacher["tokens_per_second"], teacher["num_problems"]) == (1000, 50.0, 3)
    assert teacher["answered"] == pytest.approx(10 / 12) and teacher["luck"] == 0
    assert "ahead" not in teacher and "best_of_n" not in teacher
    assert set(pure["ahead"]) >= {"budgets", "span", "best_lead", "best_lead_low", "best_lead_high", "best_lead_seconds",
                                  "table", "equal_coverage"}
    assert "pure against teacher" in capsys.readouterr().out


def test_without_samples_json_speed_comes_from_the_samples(tmp_path, monkeypatch):
    write_run(tmp_path, "teacher", [["1"] * 3], ["1"], seconds=[[1, 2, 5]])
    model = run_main(monkeypatch, tmp_path)["models"]["teacher"]
    assert model["params"] is None and model["tokens_per_second"] == pytest.approx(30 / 5)
    assert model["k"] == [1, 2, 3]                                        # n itself, though no power of two


@pytest.mark.parametrize("golds, answers, luck", [
    (["1", "2", "3"], [["1", "2"], ["2", "3"], ["1", "3"]], 1.0),         # each has the next one's answer among its own
    (["1", "2", "3"], [["1", "9"], ["2", "3"], ["8", "3"]], 1 / 3),
    (["1", "1", "2"], [["1", "1"], ["1", "1"], ["2", "2"]], 0.0),         # a neighbour with the same answer is skipped
    (["1", "1"], [["1", "2"], ["1", "1"]], None),                         # nobody to compare with
])
def test_luck_counts_hits_on_another_problems_answer(golds, answers, luck, tmp_path, monkeypatch):
    write_run(tmp_path, "teacher", answers, golds)
    assert run_main(monkeypatch, tmp_path)["models"]["teacher"]["luck"] == pytest.approx(luck)


def test_scores_add_best_of_n_and_weighted(tmp_path, monkeypatch):
    path = write_run(tmp_path, "teacher", [["1", "2", "2"]], ["1"])
    scores = [{"problem": 0, "sample": s, "score": x} for s, x in enumerate([0.9, 0.3, 0.3])]
    (path.parent / "scores.jsonl").write_text("".join(json.dumps(s) + "\n" for s in scores))
    model = run_main(monkeypatch, tmp_path, "--scores")["models"]["teacher"]
    assert (model["majority"][-1], model["best_of_n"][-1], model["weighted"][-1]) == (0, 1, 1)
    assert model["best_of_n"] == pytest.approx([1 / 3, 2 / 3, 1])


def test_a_torn_last_line_is_dropped_and_uneven_samples_are_named(tmp_path, monkeypatch, capsys):
    path = write_run(tmp_path, "teacher", [["1"] * 2, ["1"] * 2], ["1", "1"])
    path.write_text(path.read_text()[:-30])
    model = run_main(monkeypatch, tmp_path)["models"]["teacher"]
    assert model["num_samples"] == 1 and model["num_problems"] == 2
    out = capsys.readouterr().out
    assert "the last line is torn" in out and "1 of 2 problems have more than 1 samples" in out


def test_without_a_teacher_there_is_no_ahead_and_a_line_says_so(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, "pure", [["1"]], ["1"])
    results = run_main(monkeypatch, tmp_path)
    assert results["teacher"] is None and "ahead" not in results["models"]["pure"]
    assert "no model named teacher" in capsys.readouterr().out


def test_models_on_different_problems_are_not_compared(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, "teacher", [["1"], ["2"]], ["1", "2"])
    write_run(tmp_path, "pure", [["1"], ["2"]], ["1", "3"])
    assert "ahead" not in run_main(monkeypatch, tmp_path)["models"]["pure"]
    assert "pure and teacher were sampled on different problems" in capsys.readouterr().out


def test_settings_that_differ_are_named(tmp_path, monkeypatch, capsys):
    for name, batch in (("teacher", 64), ("pure", 256)):
        write_run(tmp_path, name, [["1"]], ["1"], sidecar={"settings": {"batch_size": batch, "weights": name}})
    run_main(monkeypatch, tmp_path)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert notes == ["note: pure was sampled with batch_size 256, teacher with 64"]


def test_grading_twice_gives_the_same_file(tmp_path, monkeypatch):
    example(tmp_path)
    assert run_main(monkeypatch, tmp_path, "--seed", "3") == run_main(monkeypatch, tmp_path, "--seed", "3")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hybrid", "pure", "results.json", "teacher"]


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
    (["--model", "mamba"], None, "--model mamba: no .*samples.jsonl; there are: hybrid, pure, teacher"),
    (["--teacher", "llama"], None, "--teacher llama: not among .*: hybrid, pure, teacher"),
    (["--seed", "-1"], None, "--seed -1: must be 0 or more"),
    (["--seed", "x"], None, "invalid int value: 'x'"),
    (["--bogus"], None, "unrecognized arguments: --bogus"),
    (["--scores"], None, "no model under .* has a scores.jsonl"),
    ([], lambda p: break_line(p, 2, '{"problem": 0, "sam'), "samples.jsonl, line 2: not JSON"),
    ([], lambda p: break_line(p, 2, without(p, 2, "seconds")), "samples.jsonl, line 2: 'seconds' is missing"),
    ([], lambda p: break_line(p, 3, "[1, 2]"), "samples.jsonl, line 3: 'problem' is missing"),
    ([], lambda p: break_line(p, 2, p.read_text().splitlines()[0]), "line 2: problem 0 has sample 0 twice"),
    ([], lambda p: p.write_text(""), "samples.jsonl holds no samples; run python sample.py first"),
    ([], lambda p: (p.parent / "samples.json").write_text("{"), "samples.json is not JSON"),
])
def test_a_mistake_is_one_line_and_exit_code_2_and_changes_nothing(arguments, damage, said, tmp_path, monkeypatch, capsys):
    example(tmp_path)
    (tmp_path / "results.json").write_text("earlier")
    if damage:
        damage(tmp_path / "teacher" / "samples.jsonl")
    monkeypatch.setattr(sys, "argv", ["grade.py", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as exit:
        grade.main()
    error = capsys.readouterr().err
    assert exit.value.code == 2 and len(error.splitlines()) == 1
    assert re.search(said, error), error
    assert (tmp_path / "results.json").read_text() == "earlier"


@pytest.mark.parametrize("out", ["missing", "empty"])
def test_without_samples_the_command_says_what_to_run(out, tmp_path):
    (tmp_path / "empty").mkdir()
    done = subprocess.run([sys.executable, str(ROOT / "grade.py"), "--out", out], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "run python sample.py first" in done.stderr


def test_importing_grade_is_silent_and_needs_no_torch():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import grade; "
            "assert not {'torch', 'triton', 'math_verify', 'sympy'} & set(sys.modules), 'heavy import'")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
