"""What verdict.py promises: the answer is found, right is told from wrong, votes group by value,
and no text, however hostile, stops or misuses the grader."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import verdict
from verdict import extract_answer, groups, is_correct

ROOT = Path(verdict.__file__).parent
CASES = list(map(json.loads, (Path(__file__).parent / "verdict_cases.jsonl").open()))
assert {case["correct"] for case in CASES} == {True, False} and len(CASES) > 400


@pytest.fixture
def fresh(monkeypatch):
    """A process of this test's own, and no verdict remembered."""
    verdict.readings.cache_clear()
    monkeypatch.setattr(verdict, "_child", None)
    yield
    if verdict._child:
        verdict.end_child(verdict._child)
    verdict.readings.cache_clear()


@pytest.mark.parametrize("kind", sorted({case["guards"] for case in CASES}))
def test_verdicts_and_votes_are_those_of_the_table(kind):
    """Each line: a gold, a completion, whether it is right, and the kind of mistake it guards. A
    vote counts an answer and a gold together exactly if the answer is right."""
    for case in [case for case in CASES if case["guards"] == kind]:
        answer = extract_answer(case["completion"])
        assert is_correct(answer, case["gold"]) is case["correct"], case
        assert answer is None or groups([case["gold"], answer]) == [0, 1 - case["correct"]], case


# ---- extraction
EXTRACTED = {
    "42": ["so it is \\boxed{42}."],
    "2": ["\\boxed{1}, no: \\boxed{2}", "#### 1 #### 2"],  # the last one counts
    "\\frac{1}{\\sqrt{2}}": ["\\boxed{\\frac{1}{\\sqrt{2}}}"],  # nested braces
    "\\{1, 2\\}": ["\\boxed{\\{1, 2\\}}"],  # escaped braces are no braces
    "6": ["so \\boxed{6"],  # cut off by the length limit, but there is no other
    "1, 2": ["\\boxed{1} and \\boxed{2}", "$\\boxed{1}$ \\text{ or } $\\boxed{2}$"],
    "8": ["#### 9 but in fact \\boxed{8}"],  # boxed before ####
    "7": ["3 + 4 = 7\n#### 7\nnext question"], "1,234": ["#### 1\n#### $1,234."],
    "12": ["The answer is 12. I hope it is correct."], ".5": ["The answer is .5"],
    "x = 3.5": ["the answer is 5, no, the Answer Is: $x = 3.5$."],
    "[2,5]": ["The answer is [2,5]."], "18": ["So she earns **18**."],
    "5": ["\\boxed{5} and then \\boxed{6", "\\boxed{$5$}", "\\fbox{5}", "\\boxed 5",
          "\\boxed{5}\nPut your final answer within \\boxed{}.",  # an empty box hides nothing
          "The answer is 5. Put it within \\boxed{}.", "#### Answer: 5", "**Final Answer:** 5",
          "The answer is \\[\n5\n\\]", "The answer is 5, so we are done",
          "I think <answer> 5 </answer>"],
    None: ["**Step 1** is to add", "The answer is", "\\boxed{}", "I do not know", ""]}


@pytest.mark.parametrize("answer", EXTRACTED)
def test_extract_answer(answer):
    for text in EXTRACTED[answer]:
        assert extract_answer(text) == answer, text


# ---- votes
def test_votes_group_by_value_in_order_of_first_appearance():
    """Spelled one by one, 1/2, \\frac12 and 0.5 would lose to two 3s. An answer of two meanings is
    of the first group that it may mean."""
    answers = ["1/2", None, "3", "\\frac12", "", "0.5", "3", "x=3", "\\sqrt{8}", "2\\sqrt2"]
    assert groups(answers) == [0, -1, 1, 0, -1, 0, 1, 1, 2, 2]
    assert groups(["0.15", "15\\%", "15"]) == groups(["15", "15\\%", "0.15"]) == [0, 0, 1]
    assert groups(["x=5", "y=5", "5"]) == [0, 1, 0]


def test_grouping_reads_every_answer_once(fresh, monkeypatch):
    """n answers cost n readings, not n^2 comparisons."""
    asked = []
    monkeypatch.setattr(verdict, "ask", lambda text: asked.append(text) or [f"value {text[-1]}"])
    answers = [f"x+{i}" for i in range(300)] * 3
    assert len(set(groups(answers))) == 10 and len(asked) == 300


# ---- the process
def test_plain_answers_never_reach_the_process(fresh, monkeypatch):
    """What the built-in task and GSM8K are made of is graded without math-verify."""
    monkeypatch.setattr(verdict, "ask", None)
    for answer, gold in (("473", "0473"), ("4,090.0", "4090"), ("\\$18", "18"), ("-.5", "-0.50"),
                         ("East", "\\text{east}"), ("52", "52_8")):
        assert is_correct(answer, gold) and not is_correct(answer, "17")


@pytest.mark.parametrize("answer", [
    "9**9**9**9", "10^{10^{10}}", "(10^9)!", "\\frac{1}{" * 28 + "2" + "}" * 28, "{" * 290,
    "b" * 290 + "e"])  # for a pattern that backtracks
def test_hostile_answers_end_quietly_and_the_next_one_is_graded(answer, fresh, monkeypatch, capfd):
    """sympy would compute some for ever. By the wall a try may take ten times its CPU limit."""
    monkeypatch.setattr(verdict, "CPU_SECONDS", 0.2)
    start = time.monotonic()
    assert is_correct(answer, "x+7") is False
    assert time.monotonic() - start < 2 * 10 * 0.2 + 60  # two tries, and time to start them
    monkeypatch.setattr(verdict, "CPU_SECONDS", 1)
    assert is_correct("\\frac{1}{4}", "0.25") and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("text", [
    "\\boxed{" * 100_000, "{" * 1_000_000, "\\boxed{5} and " * 70_000, "\\boxed" + " " * 1_000_000,
    "answer" + " " * 1_000_000, "The answer is " + ". " * 500_000, "**" * 500_000,
    "<answer>" * 100_000, "9" * 1_000_000, "\\boxed{" + "9" * 1_000_000 + "}",
    "\\boxed{ " * 60_000 + "}" * 60_000,
], ids=lambda text: text[:14].strip())
def test_a_million_characters_are_read_in_one_pass(text):
    """A second at most on any machine, where a quadratic pass would take hours."""
    start = time.monotonic()
    assert is_correct(extract_answer(text), "x+7") is False
    assert time.monotonic() - start < 30


def test_the_limit_is_of_cpu_time(fresh, monkeypatch):
    """The parent's own clock, here set to a minute, has nothing to do with it."""
    ended, end, receive = [], verdict.end_child, verdict.receive
    monkeypatch.setattr(verdict, "end_child", lambda child: end(child) or ended.append(child))
    monkeypatch.setattr(verdict, "receive", lambda child, seconds: receive(child, 60))
    monkeypatch.setattr(verdict, "CPU_SECONDS", 0.2)
    assert not is_correct("10^{10^{10}}", "1")
    assert [process.returncode for process in ended] == [-signal.SIGPROF] * 2


def test_answers_are_never_run(fresh, tmp_path):
    """Neither by us nor by sympy, whose own parser evaluates Python."""
    victim = tmp_path / "victim"
    for code in (f"__import__('os').mkdir('{victim}')", f"\\text{{open('{victim}', 'w')}}",
                 f"eval(\"__import__('os').mkdir('{victim}')\")"):
        assert not is_correct(code, "x+7")
    assert not victim.exists()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_process_is_replaced(sent, fresh, monkeypatch):
    """A stopped one uses no CPU time, so only the parent's own clock can tell. The answer is not to
    blame: it is asked again."""
    monkeypatch.setattr(verdict, "CPU_SECONDS", 0.3)
    assert is_correct("\\frac{1}{4}", "0.25")
    os.kill((first := verdict._child).pid, sent)
    assert is_correct("\\frac{3}{4}", "0.75") and first.returncode == -signal.SIGKILL


def test_importing_is_light_and_the_process_ends_with_its_parent():
    """Even if the parent is killed: nothing is left behind that eats memory."""
    code = ("import os, sys, verdict; assert not {'torch', 'numpy', 'sympy'} & set(sys.modules); "
            "verdict.ask('x+1'); print(verdict._child.pid, flush=True); os.kill(os.getpid(), 9)")
    parent = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    state = Path(f"/proc/{int(parent.stdout)}/stat")

    def runs():  # Z: it has ended, and nobody has asked how
        return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"
    end = time.monotonic() + 30
    while runs() and time.monotonic() < end:
        time.sleep(0.05)
    assert not runs()


@pytest.mark.skipif(not os.path.exists("/proc/self/limits"), reason="needs /proc")
def test_the_process_has_a_limit_of_memory(fresh):
    assert verdict.ask("x+1")
    limits = Path(f"/proc/{verdict._child.pid}/limits").read_text()
    assert re.search(rf"^Max address space +{verdict.MEMORY} ", limits, re.MULTILINE)


def test_answers_can_be_graded_from_any_thread(fresh):
    with ThreadPoolExecutor(6) as pool:
        verdicts = list(pool.map(lambda i: is_correct(f"\\frac{{{i}}}{{8}}", "3/8"), range(6)))
    assert verdicts == [i == 3 for i in range(6)]


def test_without_math_verify_the_error_says_what_to_install(fresh, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ValueError, match="pip install -r requirements.txt"):
        is_correct("x+1", "x+2")
