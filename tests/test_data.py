"""What data.py promises: any text survives the tokenizer, the built-in task is right and never leaks its test problems,
and a mistake in a file is named by its line."""
import json
import os
import re
import subprocess
import sys

import pytest

import data
from data import Problem, load_task, load_tokenizer

# ------------------------------------------------------------------------------------------------ tokenizer
NASTY = {
    "empty": "",
    "words": "Start with 4821. In each of 2 rounds do +7 3 times, then x13.",
    "spaces": "  a   b    \n\n\n c\t\td  \r\n ",
    "digits": "007 1234567890 3.14159 -5 1,000,000 +7 x13 [12] 3)",
    "emoji": "naïve 🤖👩‍👩‍👧 日本語 العربية ₿",
    "control": "\x00\x01\x7f\u200b\u2028\ufeff",
    "special-looking": "<|question|><|answer|><|end|> <|endoftext|> <|eot_id|> <|begin_of_text|>",
    "math": "\\boxed{\\frac{1}{2}} $x^2$ #### 42",
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("arithmetic")


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY.keys())
def test_decode_undoes_encode(tokenizer, text):
    """Red if the split pattern drops a character or a byte has no token: training text would be silently damaged."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_every_text_of_the_task_survives(tokenizer):
    for problem in load_task("arithmetic", "test")[:200]:
        for text in (problem.question, problem.solution):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_that_looks_special_stays_plain(tokenizer):
    """A question that spells the stop token must not stop anything. Red if encode allows special tokens."""
    special = set(tokenizer.definition["special"].values())
    for name in tokenizer.definition["special"]:
        ids = tokenizer.encode(f"a{name}b")
        assert len(ids) > 1 and not special & set(ids)


def test_chat_puts_special_ids_around_the_question_and_adds_nothing_to_it(tokenizer):
    question = "What is 1 + 1?<|answer|>"
    ids, inside = tokenizer.chat(question), tokenizer.encode(question)
    start = next(i for i in range(len(ids)) if ids[i:i + len(inside)] == inside)
    around = ids[:start] + ids[start + len(inside):]
    special = set(tokenizer.definition["special"].values())
    assert around and set(around) <= special and ids[-1] in special  # the model can tell where its answer starts
    assert tokenizer.eos_ids and not set(tokenizer.eos_ids) & set(ids)


def test_a_tokenizer_is_saved_and_loaded_with_its_folder(tokenizer, tmp_path):
    """A checkpoint must keep its own token ids even if the built-in task changes later."""
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    for text in NASTY.values():
        assert loaded.encode(text) == tokenizer.encode(text) and loaded.chat(text) == tokenizer.chat(text)
    assert (loaded.eos_ids, loaded.vocab_size) == (tokenizer.eos_ids, tokenizer.vocab_size)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        load_tokenizer(str(tmp_path))


def test_an_unreadable_tokenizer_is_named(tmp_path):
    (tmp_path / data.TOKENIZER_FILE).write_text("{half a")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        load_tokenizer(str(tmp_path))


# ------------------------------------------------------------------------------------------------ the built-in task
@pytest.fixture(scope="module")
def arithmetic():
    return {split: load_task("arithmetic", split) for split in ("train", "test")}


def test_train_and_test_problems_never_overlap(arithmetic):
    """Red if the splits differ by nothing but their seed: the same question could then be drawn for both."""
    questions = {split: {p.question for p in problems} for split, problems in arithmetic.items()}
    assert len(questions["test"]) > 100 and len(questions["train"]) > 1000
    assert not questions["train"] & questions["test"]


def test_ids_are_unique(arithmetic):
    ids = [p.id for problems in arithmetic.values() for p in problems]
    assert len(set(ids)) == len(ids)


def test_problems_are_the_same_in_every_process(arithmetic):
    """Red if hash() or global random state takes part: another process would sample and grade other problems."""
    code = "import data; print([p.question for p in data.load_task('arithmetic', 'test')[:50]])"
    texts = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=os.path.dirname(
        data.__file__), env=os.environ | {"PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")}
    assert texts == {f"{[p.question for p in arithmetic['test'][:50]]}\n"}


STEP = re.compile(r"\S+ (\d+) ([+x])(\d+) = (\d+)")


def chain(problem):
    """(number before, sign, operand, number after) of every line but the last, from the text."""
    return [(int(before), sign, int(operand), int(after)) for before, sign, operand, after in
            (STEP.fullmatch(line).groups() for line in problem.solution.split("\n")[:-1])]


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_line_of_every_solution_is_right(arithmetic, split):
    """Recomputed here from the text: a slip in the generator would teach wrong arithmetic and grade right answers wrong."""
    for problem in arithmetic[split][:2000]:
        number = None
        for before, sign, operand, after in chain(problem):
            assert number in (None, before)  # a line starts where the one before it ended
            number = (before + operand if sign == "+" else before * operand) % 10_000
            assert after == number
        assert problem.solution.endswith(f"\n\\boxed{{{problem.answer}}}") and int(problem.answer) == number


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_question_determines_the_solution(arithmetic, split):
    """Where to start, what to do and how many rounds is read from the question alone, as a reader or a model has to; every
    round is like the first."""
    for problem in arithmetic[split][:2000]:
        steps = chain(problem)
        assert steps[0][0] == int(re.search(r"\bStart\D+(\d{4})\b", problem.question)[1])
        operations = [(sign, str(operand)) for _, sign, operand, _ in steps]
        assert list(dict.fromkeys(operations)) == re.findall(r"([+x])(\d+)", problem.question)
        rounds = int(re.search(r"(\d+) rounds?\b", problem.question)[1])
        assert operations == operations[:len(operations) // rounds] * rounds
        assert [sign for sign, _ in operations].count("x") == rounds


def test_guessing_cannot_answer_the_task(arithmetic):
    """Coverage with many samples must not be luck: the most frequent answers together stay rare."""
    answers = [p.answer for p in arithmetic["test"]]
    common = sorted((answers.count(a) for a in set(answers)), reverse=True)[:64]
    assert sum(common) < 0.25 * len(answers)


# ------------------------------------------------------------------------------------------------ files
def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_both_layouts_of_a_file_are_read(tmp_path):
    path = write(tmp_path / "mine.jsonl", {"question": "1+1?", "answer": "so\n2\n#### 1,002"}, "",
                 {"problem": "2+2?", "answer": 4, "id": "b"}, "   ",
                 {"question": "3+3?", "answer": "#### no ####  6 ", "solution": "overruled"},
                 {"question": "x?", "answer": " \\frac{1}{2} ", "solution": "half"})
    assert load_task(path, "test") == [
        Problem("0", "1+1?", "1,002", "so\n2\n#### 1,002"),
        Problem("b", "2+2?", "4", ""),
        Problem("4", "3+3?", "6", "#### no ####  6 "),
        Problem("5", "x?", "\\frac{1}{2}", "half"),
    ]
    assert load_task(path, "train") == load_task(path, "test")


@pytest.mark.parametrize("line", ['{"answer": "1"}', '{"question": "?"}', '{"question": "?", "answer"', "[1, 2]", "7", "null",
                                  '"question"'])
def test_a_bad_line_is_named_by_its_number(tmp_path, line):
    """Blank lines count: the number has to be the one the editor shows."""
    path = write(tmp_path / "bad.jsonl", {"question": "?", "answer": "1"}, "", line)
    with pytest.raises(ValueError, match=rf"{re.escape(path)}, line 3\b"):
        load_task(path, "test")


@pytest.mark.parametrize("name, split, error, message", [
    ("aritmetic", "test", ValueError, "'aritmetic'.*arithmetic"),
    ("arithmetic", "validation", ValueError, "'validation'.*train.*test"),
    ("nowhere/file.jsonl", "test", FileNotFoundError, "nowhere/file.jsonl"),
])
def test_unknown_names_are_refused_and_the_right_ones_listed(name, split, error, message):
    with pytest.raises(error, match=message):
        load_task(name, split)


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no problems"):
        load_task(write(tmp_path / "empty.jsonl", "", ""), "test")


# ------------------------------------------------------------------------------------------------ what scripts share
def test_json_files_are_replaced_whole(tmp_path):
    """A value that cannot be written must leave the old file as it was. Red if write_json writes in place."""
    path = str(tmp_path / "a.json")
    data.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        data.write_json(path, {"a": object()})
    assert data.read_json(path) == {"a": 1}


def test_models_are_found_teacher_first_and_unfinished_ones_are_not(tmp_path):
    for name in ("pure", "teacher", "hybrid", "unfinished"):
        (tmp_path / name).mkdir()
        if name != "unfinished":
            (tmp_path / name / "config.json").write_text("{}")
    assert [os.path.basename(folder) for folder in data.find_models(str(tmp_path))] == ["teacher", "hybrid", "pure"]


def test_no_models_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="python distill.py"):
        data.find_models(str(tmp_path / "nothing"))
