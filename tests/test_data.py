"""What data.py promises: the built-in task is right and never leaks its test problems, a mistake in
a file is named by its line, and any text survives the tokenizer. (The tokenizers and chats of
others are guarded by test_hub.py.)"""
import base64
import collections
import dataclasses
import itertools
import json
import re

import pytest

import data
import hub
from conftest import ROOT
from data import Problem, Tokenizer, load_task, load_tokenizer


# ---- the built-in task
ARITHMETIC = {split: list(itertools.islice(data.arithmetic_problems(split), 1500))
              for split in ("train", "test")}  # the first problems: all 50,000 take two seconds


def test_train_and_test_problems_never_overlap_and_never_change(monkeypatch):
    """Red if the splits differ by their seed alone: a question could then be drawn for both; or if
    hash() or global random state takes part."""
    train, test = ({problem.question for problem in problems} for problems in ARITHMETIC.values())
    assert len(train) > 1400 and not train & test
    monkeypatch.setattr(data, "TRAIN_PROBLEMS", 30)
    assert load_task("arithmetic", "train") == ARITHMETIC["train"][:30]
    assert load_task("arithmetic", "test") == ARITHMETIC["test"][:1000]
    assert len({problem.id for problems in ARITHMETIC.values() for problem in problems}) == 3000
    starts = [problems[7].question[-4:] for problems in ARITHMETIC.values()]
    assert starts == ["2329", "7656"]


def literal_solution(question):
    """The chain and the answer, from the words of the question alone."""
    rounds, add, times, by, value = map(int, re.fullmatch(
        r"In each of (\d+) rounds do \+(\d+) (\d+) times, then x(\d+), keeping (?:four|six) "
        r"digits. Start: (\d+)", question).groups())
    lines, digits = [], 6 if "six" in question else 4
    assert len(question.split()[-1]) == digits
    for left, more in itertools.product(range(rounds, 0, -1), range(times, -1, -1)):
        result, sign = (value + add, f"+{add}") if more else (value * by, f"x{by}")
        after = result % 10 ** digits
        lines.append(f"{left}.{more}) {value:0{digits}d} {sign} = {after:0{digits}d}")
        value = after
    answer = f"{value:0{digits}d}"
    return "\n".join([*lines, f"\\boxed{{{answer}}}"]), answer


def test_every_solution_is_right_and_follows_from_its_question():
    """A slip would teach wrong arithmetic and grade right answers wrong. The most frequent answers
    together are rare, or coverage with many samples would be luck."""
    six_digits = list(itertools.islice(data.arithmetic_problems("test", "arithmetic6"), 500))
    for problem in ARITHMETIC["train"] + ARITHMETIC["test"] + six_digits:
        assert (problem.solution, problem.answer) == literal_solution(problem.question)
        assert data.solution_text(problem) == problem.solution
    answers = collections.Counter(problem.answer for problem in ARITHMETIC["test"])
    assert sum(n for _, n in answers.most_common(64)) < 0.25 * answers.total()


# ---- tasks in files
def write(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return str(path)


ROWS = [  # (task, a row as the Hub has it, what becomes of it)
    ("gsm8k", dict(question="How?", answer="6 + 6 = <<6+6=12>>12\n12 x $2 = $24\n#### 2,4"),
     Problem("test/0", "How?", "2,4", "6 + 6 = 12\n12 x $2 = $24\n#### 2,4")),
    ("math500", dict(problem="Find $x$.", solution="So $x = \\boxed{\\frac{1}{2}}$.", level=3,
                     answer=" \\frac{1}{2} ", unique_id="test/algebra/7.json"),
     Problem("test/algebra/7.json", "Find $x$.", "\\frac{1}{2}",
             "So $x = \\boxed{\\frac{1}{2}}$.")),
    ("openmath2", dict(problem="1 << 2?", expected_answer="4",
                       generated_solution="1 <<2>> #### \\boxed{4}"),
     Problem("train/0", "1 << 2?", "4", "1 <<2>> #### \\boxed{4}"))]


@pytest.mark.parametrize("task, row, expected", ROWS)
def test_a_row_means_the_same_on_the_hub_and_in_a_file(monkeypatch, tmp_path, task, row, expected):
    """Red if a column is mixed up, or if a calculator's marks stay in what a model learns: they are
    GSM8K's, and elsewhere << is mathematics."""
    asked, split = [], expected.id.split("/")[0]
    monkeypatch.setattr(hub, "dataset_rows", lambda *args: (asked.append(args), [row])[1])
    assert load_task(task, split) == [expected]
    found, = load_task(write(tmp_path / "rows.jsonl", row), "train")
    assert dataclasses.replace(found, id=expected.id) == expected
    assert load_task(f"{task}[30:31]", split)[0].id in (f"{split}/30", expected.id)
    most = 50_000 if task == "openmath2" else None  # too many to take them all
    assert asked == [(task, split, 0, most), (task, split, 30, 31)]


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
    '{"question": "?", "answer": "1", "solution": 5}', *(f'{{"question": "?", "answer": {gold}}}'
        for gold in ("[1]", '" "', "true", "null", "{}", '"half ####"'))])
def test_a_bad_line_is_named_by_the_number_that_an_editor_shows(tmp_path, line):
    path = write(tmp_path / "bad.jsonl", {"question": "?", "answer": "1"}, "", line)
    with pytest.raises(ValueError, match=rf"^{re.escape(path)}, line 3\b.*$"):
        load_task(path, "test")


@pytest.mark.parametrize("name, split, message", [
    ("aritmetic", "test", "aritmetic.*arithmetic.*gsm8k.*math500.*openmath2.*.jsonl"),
    ("gsm9k[0:3]", "test", re.escape("gsm9k[0:3]")), ("gsm8k[:3]", "test", re.escape("gsm8k[:3]")),
    ("arithmetic", "validation", "'validation'.*train.*test"),
    ("math500", "train", "math500 has no train split"),
    ("nowhere/file.jsonl", "test", "nowhere/file.jsonl is missing or empty")])
def test_unknown_names_are_refused_and_the_right_ones_listed(name, split, message):
    with pytest.raises(ValueError, match=message):
        load_task(name, split)


def test_samples_are_a_task(tmp_path):
    """A worked solution has come to an end and boxes an answer, and is taken verbatim, right or
    wrong: the gold answer is never appended. Test has every question once."""
    rows = [("2+3?", "so \\boxed{6}\n", "stop"), ("2+3?", "5", "stop"),
            ("1+4?", "\\boxed{5}", "length"), ("2+3?", "#### 5 \\boxed{5}", "stop")]
    path = write(tmp_path / "samples.jsonl", *(
        dict(problem=0, sample=0, question=question, gold="5", completion=text, finish=finish)
        for question, text, finish in rows))
    train, solutions = load_task(path, "train"), [rows[0][1], "", "", rows[3][1]]
    assert [problem.solution for problem in train] == solutions
    assert [data.solution_text(problem) for problem in train] == solutions
    assert {problem.answer for problem in train} == {"5"}
    assert [problem.question for problem in load_task(path, "test")] == ["2+3?", "1+4?"]


def test_a_subset_is_the_first_or_a_random_one_in_the_old_order():
    problems = [Problem(str(i), "?", "", "") for i in range(50)]
    some = data.choose_subset(problems, 7, seed=0)
    assert some == data.choose_subset(problems, 7, 0) != data.choose_subset(problems, 7, 1)
    assert len(some) == 7 and some == [problem for problem in problems if problem in some]
    assert some != data.choose_subset(problems, 7) == problems[:7]
    assert all(data.choose_subset(problems, limit, 0) == problems for limit in (None, 50, 51))


def test_only_the_built_in_task_is_asked_bare(tmp_path):
    """A file has one place for the question."""
    assert data.prompt_template("arithmetic") == "{question}"
    template = data.prompt_template("gsm8k")
    assert template.count("{question}") == 1 and "\\boxed{}" in template
    path = tmp_path / "prompt.txt"
    path.write_text("Q: {question}\nA: {}\n")  # an editor's last newline
    assert data.prompt_template("arithmetic", str(path)) == "Q: {question}\nA: {}"
    for content in b"", b"Q: {}", b"{question} {question}", b"{question}\xff":
        path.write_bytes(content)
        with pytest.raises(ValueError, match="prompt.txt"):
            data.prompt_template("gsm8k", str(path))


# ---- the tokenizer
TOKENIZER = load_tokenizer("arithmetic")
NASTY = [
    "", "Start with 4821. In each of 2 rounds do +7 3 times, then x13.",
    "  a   b    \n\n\n c\t\td  \r\n ", "007 1234567890 3.14 -5 1,000 +7 x13 3)",
    "naïve 🤖👩‍👩‍👧 日本語 العربية ₿", "\x00\x01\x7f\u200b\u2028\ufeff",
    "<|question|><|answer|><|end|> <|endoftext|> <|eot_id|> <|begin_of_text|>",
    "\\boxed{\\frac{1}{2}} $x^2$ #### 42"]


def test_decode_undoes_encode_and_adds_nothing():
    """Text that spells a special token is plain, and cannot stop anything. Two digits a token and
    +7 as one: a convolution of width 4 sees the operands of a step and the sign."""
    special = set(TOKENIZER.special.values())
    for text in [*NASTY, *(p.question + p.solution for p in ARITHMETIC["test"][:100])]:
        ids = TOKENIZER.encode(text)
        assert TOKENIZER.decode(ids) == text
        assert not special & set(ids) and all(0 <= i < TOKENIZER.vocab_size for i in ids)
    pieces = [TOKENIZER.decode([i]) for i in TOKENIZER.encode("2.7) 4821 +7 = 4828\n")]
    assert pieces == ["2.7)", " 48", "21", " +7", " =", " 48", "28", "\n"]
    for ids in [597], [0, 10 ** 9], [-1]:
        with pytest.raises(ValueError, match="ids .0 to 596"):
            TOKENIZER.decode(ids)


def test_what_tiktoken_cannot_take_is_encoded():
    """SmolLM2 lacks bytes of control characters, which are left out: tiktoken panics there. Its
    regex engine fails on a million spaces under Llama 3's pattern; looking for them took minutes
    for many spaces before a long text."""
    ranks = list(TOKENIZER.definition["ranks"])
    for byte in b"\x04\xf1":
        ranks[ranks.index(base64.b64encode(bytes([byte])).decode())] = None
    lacking = Tokenizer(TOKENIZER.definition | dict(ranks=ranks))
    assert lacking.decode(lacking.encode("!\x04!\U00040000\n12 \u00e9")) == "!!\n12 \u00e9"
    assert lacking.encode("12 \u00e9") == TOKENIZER.encode("12 \u00e9")
    llama = Tokenizer(TOKENIZER.definition | dict(pattern=hub.LLAMA3_PATTERN))
    for text in " " * 1_100_000 + "x", "1\n" + "\t " * 600_000, " " * 400_000 + "x" * 600_000:
        assert llama.decode(llama.encode(text)) == text


def test_a_chat_is_special_ids_around_the_question():
    """A later turn begins without the beginning of a text and without a system message."""
    ask, answer, end = (TOKENIZER.special[f"<|{name}|>"] for name in ("question", "answer", "end"))
    for question in " What is 1 + 1?<|answer|>", "<|end|>":
        assert TOKENIZER.chat(question) == [ask, *TOKENIZER.encode(question), answer]
    assert TOKENIZER.chat("1", first=False) == TOKENIZER.chat("1") and TOKENIZER.eos_ids == [end]
    other = Tokenizer(TOKENIZER.definition | dict(trim=True, chat=[
        ["<|question|>", "Be brief", "<|end|>", "\n", "<|question|>"], ["!", "<|answer|>"]]))
    told = other.decode(other.chat("\n4 x4 "))
    assert told == "<|question|>Be brief<|end|>\n<|question|>4 x4!<|answer|>"
    assert other.decode(other.chat("4", first=False)) == "\n<|question|>4!<|answer|>"


def test_a_tokenizer_is_saved_and_loaded_with_its_folder(tmp_path):
    """A checkpoint keeps its own ids; the shipped teachers were trained with the built-in ones."""
    TOKENIZER.save(tmp_path)
    for folder in (tmp_path, ROOT / "assets" / "teacher", ROOT / "assets" / "teacher-small"):
        loaded = load_tokenizer(str(folder))
        assert (loaded.eos_ids, loaded.vocab_size) == (TOKENIZER.eos_ids, TOKENIZER.vocab_size)
        for text in NASTY:
            assert loaded.encode(text) == TOKENIZER.encode(text)
            assert loaded.chat(text) == TOKENIZER.chat(text)


def test_a_folder_without_a_usable_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        load_tokenizer(str(tmp_path))
    damages = dict(eos=["<|no|>"]), dict(ranks=["A"]), dict(pattern="(")
    for text in ("{half a", "{}", *(json.dumps(TOKENIZER.definition | bad) for bad in damages)):
        (tmp_path / data.TOKENIZER_FILE).write_text(text)
        with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}.*$"):
            load_tokenizer(str(tmp_path))


SOLUTIONS = [  # (answer, solution, what a model learns to write: it ends in a box)
    ("42", "6 x 7 = 42\n#### 42", "6 x 7 = 42\n\\boxed{42}"),
    ("1,002", "so\n2\n#### 1,002", "so\n2\n\\boxed{1,002}"),
    ("42", "#### Step 1\nIt is 42.\n", "#### Step 1\nIt is 42.\n\\boxed{42}"),  # a heading
    ("\\frac{1}{2}", "so $\\boxed{\\frac12}$.", "so $\\boxed{\\frac12}$."), ("4", "", "")]


def test_pairs_are_prompt_solution_and_end():
    """In the order of the problems, at any index, as often as asked."""
    problems = [Problem("0", "{1}?", answer, solution) for answer, solution, _ in SOLUTIONS]
    pairs = data.Pairs(problems, TOKENIZER, "Q: {question} {}")
    prompt = TOKENIZER.chat("Q: {1}? {}")
    expected = [(prompt, TOKENIZER.encode(text) + TOKENIZER.eos_ids) for _, _, text in SOLUTIONS]
    assert list(pairs) == expected and [pairs[i] for i in range(len(pairs))] == expected
