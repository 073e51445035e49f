"""What data.py promises: the built-in task is right and never leaks its test problems, a mistake in
a file is named by its line, and any text survives the tokenizer. (The tokenizers and chats of
others are guarded by test_hub.py.)"""
import base64
import collections
import itertools
import json
import os
import re
import subprocess
import sys

import pytest

import data
import hub
from conftest import ROOT
from data import Problem, Tokenizer, load_task, load_tokenizer


# ---------------------------------------------------------------------------- the built-in task
@pytest.fixture(scope="module")
def arithmetic():
    """The first problems of both splits: all 50,000 take two seconds."""
    return {split: list(itertools.islice(data.arithmetic_problems(split), 2000))
            for split in ("train", "test")}


def test_train_and_test_problems_never_overlap(arithmetic, monkeypatch):
    """Red if the splits differ by their seed alone: a question could then be drawn for both."""
    questions = [{problem.question for problem in problems} for problems in arithmetic.values()]
    assert len(questions[0]) > 1500 and not questions[0] & questions[1]
    monkeypatch.setattr(data, "TRAIN_PROBLEMS", 30)
    assert load_task("arithmetic", "train") == arithmetic["train"][:30]
    assert load_task("arithmetic", "test") == arithmetic["test"][:1000]
    ids = [problem.id for problems in arithmetic.values() for problem in problems]
    assert len(set(ids)) == len(ids)


def test_problems_are_the_same_in_every_process(arithmetic):
    """Red if hash() or global random state takes part."""
    code = "import data; print([next(data.arithmetic_problems('test')) for _ in 'ab'])"
    texts = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                            timeout=60, env=os.environ | {"PYTHONHASHSEED": seed}).stdout
             for seed in ("1", "2")}
    assert texts == {f"{[arithmetic['test'][0]] * 2}\n"}


def literal_solution(question):
    """The chain and the answer, from the words of the question alone."""
    rounds, add, times, multiply, value = map(int, re.fullmatch(
        r"In each of (\d+) rounds do \+(\d+) (\d+) times, then x(\d+), keeping four digits. "
        r"Start: (\d{4})", question).groups())
    lines = []
    for left in reversed(range(1, rounds + 1)):
        for more in reversed(range(times + 1)):
            result, sign = (value + add, f"+{add}") if more else (value * multiply, f"x{multiply}")
            lines.append(f"{left}.{more}) {value:04d} {sign} = {result % 10_000:04d}")
            value = result % 10_000
    return "\n".join([*lines, f"\\boxed{{{value:04d}}}"]), f"{value:04d}"


def test_every_solution_is_right_and_follows_from_its_question(arithmetic):
    """A slip would teach wrong arithmetic and grade right answers wrong."""
    for problem in arithmetic["train"][:1500] + arithmetic["test"][:1500]:
        assert (problem.solution, problem.answer) == literal_solution(problem.question)
        assert data.solution_text(problem) == problem.solution


def test_guessing_cannot_answer_the_task(arithmetic):
    """The most frequent answers together stay rare, or coverage with many samples would be luck."""
    answers = [problem.answer for problem in arithmetic["test"][:1000]]
    assert sum(n for _, n in collections.Counter(answers).most_common(64)) < 0.25 * len(answers)


# ---------------------------------------------------------------------------- tasks in files
def write(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return str(path)


GSM8K = dict(question="How many?", answer="6 + 6 = <<6+6=12>>12\n12 x $2 = $24,000\n#### 24,000")
MATH = dict(problem="Find $x$.", solution="So $x = \\boxed{\\frac{1}{2}}$.",
            answer=" \\frac{1}{2} ", level=3, unique_id="test/algebra/7.json")
OPENMATH = dict(problem="1 << 2?", expected_answer="4",
                generated_solution="1 <<2>> #### \\boxed{4}")
ROWS = [  # rows as the Hub has them, and what becomes of them
    ("gsm8k", GSM8K, Problem("test/0", "How many?", "24,000",
                             "6 + 6 = 12\n12 x $2 = $24,000\n#### 24,000")),
    ("math500", MATH, Problem("test/algebra/7.json", "Find $x$.", "\\frac{1}{2}",
                              "So $x = \\boxed{\\frac{1}{2}}$.")),
    ("openmath2", OPENMATH, Problem("train/0", "1 << 2?", "4", "1 <<2>> #### \\boxed{4}"))]


@pytest.mark.parametrize("task, row, expected", ROWS)
def test_a_row_means_the_same_on_the_hub_and_in_a_file(monkeypatch, tmp_path, task, row, expected):
    """Red if a column is mixed up, or if a calculator's marks stay in what a model learns: they are
    GSM8K's, and elsewhere << is mathematics."""
    asked, split = [], expected.id.split("/")[0]
    monkeypatch.setattr(hub, "dataset_rows", lambda *args: (asked.append(args), [row])[1])
    assert load_task(task, split) == [expected]
    found, = load_task(write(tmp_path / "rows.jsonl", row), "train")
    assert (found.question, found.answer, found.solution) == (
        expected.question, expected.answer, expected.solution)
    assert load_task(f"{task}[30:31]", split)[0].id in (f"{split}/30", expected.id)
    rows = (0, 50_000) if task == "openmath2" else None  # too many to take them all
    assert asked == [(task, split, rows), (task, split, (30, 31))]


def test_a_file_of_ones_own_is_read(tmp_path):
    """Blank lines, numbers as answers, ids; the same for both splits."""
    path = write(tmp_path / "mine.jsonl", {"question": "1?", "answer": 4, "id": "b"}, "", "  ",
                 {"problem": "2?", "answer": "#### no ####  6 ", "solution": "overruled"},
                 {"question": "3?", "answer": 0.5, "solution": None})
    assert load_task(path, "test") == load_task(path, "train") == [
        Problem("b", "1?", "4", ""), Problem("1", "2?", "6", "#### no ####  6 "),
        Problem("2", "3?", "0.5", "")]


@pytest.mark.parametrize("line", [
    '{"answer": "1"}', '{"question": "?"}', '{"question": "?", "answer"', "[1]", '"q"',
    '{"question": "", "answer": "1"}', '{"question": ["?"], "answer": "1"}',
    *(f'{{"question": "?", "answer": {gold}}}' for gold in (
        "[1]", '""', '" "', "true", "null", "{}", '"half ####"')),
    '{"question": "?", "answer": "1", "solution": 5}'])
def test_a_bad_line_is_named_by_the_number_that_an_editor_shows(tmp_path, line):
    path = write(tmp_path / "bad.jsonl", {"question": "?", "answer": "1"}, "", line)
    with pytest.raises(ValueError, match=rf"{re.escape(path)}, line 3\b") as error:
        load_task(path, "test")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, split, message", [
    ("aritmetic", "test", "aritmetic.*arithmetic.*gsm8k.*math500.*openmath2.*.jsonl"),
    ("gsm9k[0:3]", "test", re.escape("gsm9k[0:3]")), ("gsm8k[:3]", "test", re.escape("gsm8k[:3]")),
    ("arithmetic", "validation", "'validation'.*train.*test"),
    ("math500", "train", "math500 has no train split"),
    ("nowhere/file.jsonl", "test", "nowhere/file.jsonl is missing or empty"),
    (os.devnull + ".jsonl", "test", "missing or empty")])
def test_unknown_names_are_refused_and_the_right_ones_listed(name, split, message):
    with pytest.raises(ValueError, match=message):
        load_task(name, split)


def test_samples_are_a_task(tmp_path):
    """A worked solution has come to an end and boxes an answer, and is taken verbatim, right or
    wrong: the gold answer is never appended. Test has every question once."""
    def sample(question, text, finish="stop"):
        return dict(problem=0, sample=0, question=question, gold="5", completion=text,
                    num_tokens=3, finish=finish, seconds=0.1)
    path = write(tmp_path / "samples.jsonl", sample("2+3?", "so \\boxed{6}\n"), sample("2+3?", "5"),
                 sample("1+4?", "\\boxed{5}", "length"), sample("2+3?", "#### 5 \\boxed{5}"))
    train = load_task(path, "train")
    solutions = [problem.solution for problem in train]
    assert solutions == ["so \\boxed{6}\n", "", "", "#### 5 \\boxed{5}"]
    assert [data.solution_text(problem) for problem in train] == solutions
    assert {problem.answer for problem in train} == {"5"}
    assert [problem.question for problem in load_task(path, "test")] == ["2+3?", "1+4?"]


def test_a_subset_is_the_first_or_a_random_one_in_the_old_order():
    problems = [Problem(str(i), "?", "", "") for i in range(50)]
    assert data.choose_subset(problems, 7) == problems[:7]
    some = data.choose_subset(problems, 7, seed=0)
    assert some == data.choose_subset(problems, 7, 0) != data.choose_subset(problems, 7, 1)
    assert len(some) == 7 and some != problems[:7] and some == [p for p in problems if p in some]
    for limit, seed in itertools.product([None, 50, 51], [None, 0]):
        assert data.choose_subset(problems, limit, seed) == problems


# ---------------------------------------------------------------------------- prompts, solutions
def test_only_the_built_in_task_is_asked_bare(tmp_path):
    assert data.prompt_template("arithmetic") == "{question}"
    for task in ("gsm8k", "mine.jsonl"):
        template = data.prompt_template(task)
        assert template.count("{question}") == 1 and "\\boxed{}" in template
    (tmp_path / "prompt.txt").write_text("Q: {question}\nA: {}\n")  # an editor's last newline
    path = str(tmp_path / "prompt.txt")
    assert data.prompt_template("arithmetic", path) == "Q: {question}\nA: {}"


@pytest.mark.parametrize("text", [b"", b"Q: {}", b"{question} {question}", b"{question}\xff"])
def test_a_prompt_file_is_a_text_with_one_place_for_the_question(tmp_path, text):
    (tmp_path / "prompt.txt").write_bytes(text)
    with pytest.raises(ValueError, match="prompt.txt"):
        data.prompt_template("gsm8k", str(tmp_path / "prompt.txt"))


@pytest.mark.parametrize("answer, solution, text", [
    ("42", "6 x 7 = 42\n#### 42", "6 x 7 = 42\n\\boxed{42}"),
    ("1,002", "so\n2\n#### 1,002", "so\n2\n\\boxed{1,002}"),
    ("42", "#### Step 1\nIt is 42.\n", "#### Step 1\nIt is 42.\n\\boxed{42}"),  # a heading
    ("\\frac{1}{2}", "so $\\boxed{\\frac12}$.", "so $\\boxed{\\frac12}$."), ("4", "", "")])
def test_what_a_model_learns_to_write_ends_in_a_box(answer, solution, text):
    assert data.solution_text(Problem("0", "?", answer, solution)) == text


# ---------------------------------------------------------------------------- the tokenizer
NASTY = [
    "", "Start with 4821. In each of 2 rounds do +7 3 times, then x13.",
    "  a   b    \n\n\n c\t\td  \r\n ", "007 1234567890 3.14 -5 1,000 +7 x13 3)",
    "naïve 🤖👩‍👩‍👧 日本語 العربية ₿", "\x00\x01\x7f\u200b\u2028\ufeff",
    "<|question|><|answer|><|end|> <|endoftext|> <|eot_id|> <|begin_of_text|>",
    "\\boxed{\\frac{1}{2}} $x^2$ #### 42"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("arithmetic")


def test_decode_undoes_encode_and_adds_nothing(tokenizer, arithmetic):
    """Text that spells a special token is plain, and cannot stop anything."""
    special = set(tokenizer.special.values())
    for text in [*NASTY, *(p.question + p.solution for p in arithmetic["test"][:100])]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not special & set(ids) and all(0 <= i < tokenizer.vocab_size for i in ids)


def test_the_operands_of_a_step_are_within_reach(tokenizer):
    """Two digits a token and +7 as one: a convolution of width 4 sees an operand and the sign."""
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("2.7) 4821 +7 = 4828\n")]
    assert pieces == ["2.7)", " 48", "21", " +7", " =", " 48", "28", "\n"]


def test_bytes_without_a_token_are_left_out(tokenizer):
    """SmolLM2 lacks some of control characters; tiktoken alone panics there."""
    ranks = list(tokenizer.definition["ranks"])
    for byte in b"\x04\xf1":
        ranks[ranks.index(base64.b64encode(bytes([byte])).decode())] = None
    lacking = Tokenizer(tokenizer.definition | dict(ranks=ranks))
    assert lacking.decode(lacking.encode("!\x04!\U00040000\n12 \u00e9")) == "!!\n12 \u00e9"
    assert lacking.encode("12 \u00e9") == tokenizer.encode("12 \u00e9")


def test_a_million_spaces_are_encoded(tokenizer):
    """tiktoken's regex engine fails on such a run under Llama 3's pattern."""
    llama = Tokenizer(tokenizer.definition | dict(pattern=hub.LLAMA3_PATTERN))
    for text in (" " * 1_100_000 + "x", "1\n" + "\t " * 600_000):
        assert llama.decode(llama.encode(text)) == text


def test_a_chat_is_special_ids_around_the_question(tokenizer):
    """A later turn begins without the beginning of a text and without a system message."""
    ask, answer, end = (tokenizer.special[f"<|{name}|>"] for name in ("question", "answer", "end"))
    for question in " What is 1 + 1?<|answer|>", "<|end|>":
        assert tokenizer.chat(question) == [ask, *tokenizer.encode(question), answer]
    assert tokenizer.chat("1", first=False) == tokenizer.chat("1") and tokenizer.eos_ids == [end]
    other = Tokenizer(tokenizer.definition | dict(trim=True, chat=[
        ["<|question|>", "Be brief", "<|end|>", "\n", "<|question|>"], ["!", "<|answer|>"]]))
    told = other.decode(other.chat("\n4 x4 "))
    assert told == "<|question|>Be brief<|end|>\n<|question|>4 x4!<|answer|>"
    assert other.decode(other.chat("4", first=False)) == "\n<|question|>4!<|answer|>"


@pytest.mark.parametrize("ids", [[597], [0, 10 ** 9], [-1]])
def test_an_id_outside_the_vocabulary_is_an_error(tokenizer, ids):
    with pytest.raises(ValueError, match="ids .0 to 596"):
        tokenizer.decode(ids)


def test_a_tokenizer_is_saved_and_loaded_with_its_folder(tokenizer, tmp_path):
    """A checkpoint keeps its own ids; the shipped teachers were trained with the built-in ones."""
    tokenizer.save(tmp_path)
    for folder in (tmp_path, ROOT / "assets" / "teacher", ROOT / "assets" / "teacher-small"):
        loaded = load_tokenizer(str(folder))
        assert (loaded.eos_ids, loaded.vocab_size) == (tokenizer.eos_ids, tokenizer.vocab_size)
        for text in NASTY:
            assert loaded.encode(text) == tokenizer.encode(text)
            assert loaded.chat(text) == tokenizer.chat(text)


def test_a_folder_without_a_usable_tokenizer_is_named(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        load_tokenizer(str(tmp_path))
    damaged = [tokenizer.definition | damage for damage in (
        dict(eos=["<|no|>"]), dict(ranks=["A"]), dict(pattern="("))]
    for damage in ("{half a", "{}", *map(json.dumps, damaged)):
        (tmp_path / data.TOKENIZER_FILE).write_text(damage)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as error:
            load_tokenizer(str(tmp_path))
        assert "\n" not in str(error.value)


def test_pairs_are_prompt_solution_and_end(tokenizer):
    """In the order of the problems, at any index, as often as asked."""
    problems = [Problem(str(i), f"{i} +{{1}}?", str(i + 1), f"{i} +1 = {i + 1}\n#### {i + 1}")
                for i in range(20)]
    pairs = data.Pairs(problems, tokenizer, "Q: {question} {}")
    expected = [(tokenizer.chat(f"Q: {p.question} {{}}"),
                 tokenizer.encode(data.solution_text(p)) + tokenizer.eos_ids[:1]) for p in problems]
    assert list(pairs) == expected and [pairs[i] for i in range(len(pairs))] == expected
