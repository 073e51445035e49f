"""What verdict.py promises: the answer is found, right is told from wrong, votes group by value,
and no text, however hostile, stops or misuses the grader."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import verdict
from verdict import extract_answer, groups, is_correct

ROOT = Path(verdict.__file__).parent
CASES = [json.loads(line) for line in (Path(__file__).parent / "verdict_cases.jsonl").open()]


@pytest.fixture
def fresh(monkeypatch):
    """A process of this test's own, and no verdict remembered."""
    verdict.readings.cache_clear()
    monkeypatch.setattr(verdict, "_process", None)
    yield
    if verdict._process:
        verdict.end_process(verdict._process)
    verdict.readings.cache_clear()


# ---------------------------------------------------------------------------- the table
@pytest.mark.parametrize("kind", sorted({case["guards"] for case in CASES}))
def test_verdicts_are_those_of_the_table(kind):
    """Each line: a gold, a completion, whether it is right, and the kind of mistake it guards."""
    cases = [case for case in CASES if case["guards"] == kind]
    wrong = [case for case in cases
             if is_correct(extract_answer(case["completion"]), case["gold"]) is not case["correct"]]
    assert not wrong


def test_the_table_has_right_and_wrong_answers():
    assert len(CASES) > 400 and {case["correct"] for case in CASES} == {True, False}
    assert sum(not case["correct"] for case in CASES) > 100


def test_votes_agree_with_verdicts():
    """An answer and a gold are one group exactly if the answer is right."""
    for case in CASES:
        answer = extract_answer(case["completion"])
        if answer is not None:
            expected = [0, 0] if case["correct"] else [0, 1]
            assert groups([case["gold"], answer]) == expected, case


# ---------------------------------------------------------------------------- extraction
@pytest.mark.parametrize("text, answer", [
    ("so it is \\boxed{42}.", "42"),
    ("\\boxed{1}, no: \\boxed{2}", "2"),  # the last one counts
    ("\\boxed{\\frac{1}{\\sqrt{2}}}", "\\frac{1}{\\sqrt{2}}"),  # nested braces
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),  # escaped braces are no braces
    ("\\boxed{$7$}", "7"),
    ("\\boxed{5} and then \\boxed{6", "5"),  # cut off by the length limit
    ("so \\boxed{6", "6"),  # also cut off, but there is no other
    ("\\boxed{5}\nPut your final answer within \\boxed{}.", "5"),  # an empty box hides nothing
    ("The answer is 5. Put it within \\boxed{}.", "5"),
    ("\\boxed{1} and \\boxed{2}", "1, 2"),
    ("$\\boxed{1}$ \\text{ or } $\\boxed{2}$", "1, 2"),
    ("\\fbox{5}", "5"),
    ("\\boxed 5", "5"),
    ("#### 9 but in fact \\boxed{8}", "8"),  # boxed before ####
    ("3 + 4 = 7\n#### 7\nnext question", "7"),
    ("#### 1\n#### $1,234.", "1,234"),
    ("#### 1 #### 2", "2"),
    ("#### Answer: 5", "5"),
    ("The answer is 12. I hope it is correct.", "12"),
    ("the answer is 5, no, the Answer Is: $x = 3.5$.", "x = 3.5"),
    ("The answer is .5", ".5"),
    ("The answer is [2,5].", "[2,5]"),
    ("The answer is \\[\n5\n\\]", "5"),
    ("The answer is 5, so we are done", "5"),
    ("**Final Answer:** 5", "5"),
    ("I think <answer> 5 </answer>", "5"),
    ("So she earns **18**.", "18"),
    ("**Step 1** is to add", None),
    ("The answer is", None),
    ("\\boxed{}", None),
    ("I do not know", None),
    ("", None),
])
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


# ---------------------------------------------------------------------------- votes
def test_votes_group_by_value_in_order_of_first_appearance():
    """Spelled one by one, 1/2, \\frac12 and 0.5 would lose to two 3s."""
    answers = ["1/2", None, "3", "\\frac12", "", "0.5", "3", "x=3", "\\sqrt{8}", "2\\sqrt2"]
    assert groups(answers) == [0, -1, 1, 0, -1, 0, 1, 1, 2, 2]


def test_an_answer_of_two_meanings_joins_the_first_group_that_it_may_mean():
    assert groups(["0.15", "15\\%", "15"]) == [0, 0, 1]
    assert groups(["15", "15\\%", "0.15"]) == [0, 0, 1]
    assert groups(["x=5", "y=5", "5"]) == [0, 1, 0]


def test_grouping_reads_every_answer_once(fresh, monkeypatch):
    """n answers cost n readings, not n^2 comparisons."""
    asked = []
    monkeypatch.setattr(verdict, "ask", lambda text: asked.append(text) or [f"value {text[-1]}"])
    answers = [f"x+{i}" for i in range(300)] * 3
    assert len(set(groups(answers))) == 10 and len(asked) == 300


# ---------------------------------------------------------------------------- the process
def test_plain_answers_never_reach_the_process(monkeypatch):
    """What the built-in task and GSM8K are made of is graded without math-verify."""
    monkeypatch.setattr(verdict, "ask", None)
    verdict.readings.cache_clear()
    assert is_correct("473", "0473") and is_correct("4,090.0", "4090") and is_correct("\\$18", "18")
    assert is_correct("-.5", "-0.50") and not is_correct("17", "18")
    assert is_correct("East", "\\text{east}") and is_correct("52", "52_8")


HOSTILE = ["9**9**9**9", "10^{10^{10}}", "(10^9)!", "\\frac{1}{" * 28 + "2" + "}" * 28, "{" * 290]


@pytest.mark.parametrize("answer", HOSTILE)
def test_hostile_answers_end_quietly_and_the_next_one_is_graded(answer, fresh, monkeypatch, capfd):
    """sympy would compute some for ever. By the wall a try may take ten times its CPU limit."""
    with monkeypatch.context() as short:
        short.setattr(verdict, "CPU_SECONDS", 0.2)
        start = time.monotonic()
        assert is_correct(answer, "x+7") is False
        assert time.monotonic() - start < 2 * 10 * 0.2 + 60  # two tries, and time to start them
    assert is_correct("\\frac{1}{4}", "0.25")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("text", [
    "\\boxed{" * 100_000, "{" * 1_000_000, "\\boxed{5} and " * 70_000, "\\boxed" + " " * 1_000_000,
    "answer" + " " * 1_000_000, "The answer is " + ". " * 500_000, "**" * 500_000,
    "<answer>" * 100_000, "9" * 1_000_000, "\\boxed{" + "9" * 1_000_000 + "}",
], ids=lambda text: text[:14].strip())
def test_a_million_characters_are_read_in_one_pass(text):
    """A second at most on any machine, where a quadratic pass would take hours."""
    start = time.monotonic()
    assert is_correct(extract_answer(text), "x+7") is False
    assert time.monotonic() - start < 30


def test_the_limit_is_of_cpu_time(fresh, monkeypatch):
    """The parent's own clock, here set to a minute, has nothing to do with it."""
    ended, end, read = [], verdict.end_process, verdict.read_line
    monkeypatch.setattr(verdict, "end_process", lambda child: end(child) or ended.append(child))
    monkeypatch.setattr(verdict, "read_line", lambda pipe, seconds: read(pipe, 60))
    monkeypatch.setattr(verdict, "CPU_SECONDS", 0.2)
    assert not is_correct("10^{10^{10}}", "1")
    assert [child.returncode for child in ended] == [-signal.SIGPROF] * 2


def test_answers_are_never_run(fresh, tmp_path):
    """Neither by us nor by sympy, whose own parser evaluates Python."""
    victim = tmp_path / "victim"
    for code in (f"__import__('os').mkdir('{victim}')", f"\\text{{open('{victim}', 'w')}}",
                 f"eval(\"__import__('os').mkdir('{victim}')\")"):
        is_correct(code, "x+7")
    assert not victim.exists()


def test_a_killed_process_is_replaced(fresh):
    assert is_correct("\\frac{1}{4}", "0.25")
    first = verdict._process
    os.kill(first.pid, signal.SIGKILL)
    assert is_correct("\\frac{3}{4}", "0.75") and verdict._process.pid != first.pid


def test_a_stopped_process_is_replaced(fresh, monkeypatch):
    """It uses no CPU time, so only the parent's own clock can tell; the answer is not to blame."""
    monkeypatch.setattr(verdict, "CPU_SECONDS", 0.3)
    assert is_correct("\\frac{1}{4}", "0.25")
    first = verdict._process
    os.kill(first.pid, signal.SIGSTOP)
    assert is_correct("\\frac{3}{4}", "0.75") and first.returncode == -signal.SIGKILL


def test_the_process_ends_with_its_parent():
    """Even if the parent is killed: nothing is left behind that eats memory."""
    code = ("import os, verdict; verdict.ask('x+1'); print(verdict._process.pid, flush=True); "
            "os.kill(os.getpid(), 9)")
    parent = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    pid, end = int(parent.stdout), time.monotonic() + 30
    while time.monotonic() < end:
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the process outlived its parent")


@pytest.mark.skipif(not os.path.exists("/proc/self/limits"), reason="needs /proc")
def test_the_process_has_a_limit_of_memory(fresh):
    verdict.ask("x+1")
    limits = Path(f"/proc/{verdict._process.pid}/limits").read_text()
    line = next(line for line in limits.splitlines() if line.startswith("Max address space"))
    assert line.split()[3] == str(verdict.MEMORY)


def test_answers_can_be_graded_from_any_thread(fresh):
    verdicts = {}

    def grade(i):
        verdicts[i] = is_correct(f"\\frac{{{i}}}{{8}}", "3/8")
    threads = [threading.Thread(target=grade, args=[i]) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {i: i == 3 for i in range(6)}


def test_a_verdict_does_not_depend_on_what_was_asked_before(fresh):
    cases = [case for case in CASES if case["guards"].startswith("formulas")][:12]
    verdicts = [is_correct(extract_answer(c["completion"]), c["gold"]) for c in reversed(cases)]
    verdict.readings.cache_clear()
    again = [is_correct(extract_answer(c["completion"]), c["gold"]) for c in cases]
    assert again == verdicts[::-1] == [case["correct"] for case in cases]


def test_without_math_verify_the_error_says_what_to_install(fresh, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ValueError, match="pip install -r requirements.txt"):
        is_correct("x+1", "x+2")


def test_importing_verdict_is_silent_and_light():
    code = ("import sys, verdict; heavy = {'torch', 'numpy', 'sympy', 'math_verify'}; "
            "assert not heavy & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
