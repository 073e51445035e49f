"""Tasks and tokenizers: what goes into a model, and what counts as right.

    problems = load_task("arithmetic", "test")     # or "gsm8k", ..., or a .jsonl file
    tokenizer = load_tokenizer("arithmetic")       # or a checkpoint's folder, or a repository
    prompt = tokenizer.chat(problems[0].question)  # token ids up to where the answer starts
"""
import base64
import itertools
import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import tiktoken

import hub
from common import check_fields, json_lines, naming, read_json, require, write_json
from hub import HUB


@dataclass(frozen=True)
class Problem:
    """A question with its gold answer."""
    id: str
    question: str
    answer: str  # the gold answer, for grading
    solution: str  # a worked solution that ends in the answer, for training; "" if there is none


# ---- the built-in task
# One example; 2.7) means that two rounds and seven additions are left:
#
#   In each of 2 rounds do +7 7 times, then x7, keeping four digits. Start: 4821
#
#   2.7) 4821 +7 = 4828
#   ...
#   2.0) 4870 x7 = 4090
#   1.7) 4090 +7 = 4097
#   ...
#   1.0) 4139 x7 = 8973
#   \boxed{8973}
#
# Additions are easy and fill the page; multiplications, done in the head, a small model gets wrong
# at times: many rounds are hard, and so are large numbers. NUMBERS are coprime to 10, so that a
# round maps no two values to one: the answer is right only if the whole chain is.
ROUNDS, NUMBERS = (1, 6), (3, 7, 11, 13, 17)
TRAIN_PROBLEMS, TEST_PROBLEMS = 50_000, 1_000
BUILT_IN = dict(arithmetic=(4, "four"), arithmetic6=(6, "six"))  # tasks, and their digits


def arithmetic_problem(rng, digits=4, word="four"):
    """One problem drawn from `rng` (random.Random), as (question, solution, answer)."""
    end = 10 ** digits
    value, rounds, by = rng.randrange(end), rng.randint(*ROUNDS), rng.choice(NUMBERS)
    question = (f"In each of {rounds} rounds do +{by} {by} times, then x{by}, keeping {word} "
                f"digits. Start: {value:0{digits}d}")
    solution = ""
    for rounds_left in range(rounds, 0, -1):
        for additions_left in range(by, -1, -1):
            sign = "+" if additions_left else "x"
            solution += f"{rounds_left}.{additions_left}) {value:0{digits}d} {sign}{by} = "
            value = (value + by if additions_left else value * by) % end
            solution += f"{value:0{digits}d}\n"
    answer = f"{value:0{digits}d}"
    return question, f"{solution}\\boxed{{{answer}}}", answer


def arithmetic_problems(split, task="arithmetic"):
    """Endless problems of a split, always the same ones. Train and test share no question: it is
    of the test split if its CRC-32 is a multiple of 8."""
    rng, indices = random.Random(f"{task} {split}"), itertools.count()
    while True:
        question, solution, answer = arithmetic_problem(rng, *BUILT_IN[task])
        if (zlib.crc32(question.encode()) % 8 == 0) == (split == "test"):
            yield Problem(f"{split}/{next(indices)}", question, answer, solution)


# ---- tokenizer
TOKENIZER_FILE = "tokenizer.tiktoken.json"


class Tokenizer:
    """A tiktoken.Encoding, and what a chat puts around a question and ends an answer with.

    `definition`, saved with a checkpoint: pattern (regex that cuts a text into pieces), ranks (each
    id's bytes in base64, null if special), special (name -> id), chat (before and after a question:
    lists of special names and texts), trim (strip the question?), eos (names; the first ends it).
    """

    def __init__(self, definition):
        self.definition, self.special = definition, definition["special"]
        ranks = {base64.b64decode(token): i for i, token in enumerate(definition["ranks"]) if token}
        self.missing = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
        self.encoding = tiktoken.Encoding("nanoreasoner", pat_str=definition["pattern"],
                                          mergeable_ranks=ranks, special_tokens=self.special)
        self.eos_ids = [self.special[name] for name in definition["eos"]]
        self.vocab_size = self.encoding.n_vocab

    def encode(self, text):
        """Ids of a text: adds nothing, and reads what looks like a special token as plain text."""
        return [i for part in encodable(text, self.missing)
                for i in self.encoding.encode_ordinary(part)]

    def decode(self, ids):
        """The text of ids, special tokens by their names. ValueError names an id that is none."""
        with naming(f"one of the ids (0 to {self.vocab_size - 1})"):
            return self.encoding.decode(ids)

    def chat(self, question, first=True):
        """The ids of the prompt for a question, which is plain text, up to where the answer starts.
        first=False: a later turn, without begin-of-text and system message."""
        before, after = self.definition["chat"]
        once = {"<|begin_of_text|>", *self.definition["eos"][:1]}  # this one ends the message
        while not first and once & set(before):
            before = before[1:]
        question = question.strip() if self.definition.get("trim") else question
        ids, text = [], ""
        for part in [*before, None, *after]:  # None: here is the question
            if part in self.special:
                ids, text = ids + self.encode(text) + [self.special[part]], ""
            else:  # encoded in one go with its neighbours: a token may span them
                text += question if part is None else part
        return ids + self.encode(text)

    def save(self, folder):
        write_json(Path(folder, TOKENIZER_FILE), self.definition)


def arithmetic_definition():
    """The built-in task's tokenizer: bytes, all two-digit numbers, and the words of the task.

    With two digits a token and 2.7) or +7 or x13 as one, the operands of a step are at most three
    tokens away, within the reach of a convolution of width 4.
    """
    rng = random.Random(0)
    text = "\n".join(part for _ in range(1000) for part in arithmetic_problem(rng)[:2])
    pattern = r"\d+\.\d+\)| [+x]\d+| ?\d\d| ?\d| ?[^\s\d]+|\s"
    pairs = [f"{space}{number:02d}" for space in ("", " ") for number in range(100)]
    words = sorted({piece for piece in re.findall(pattern, text) if len(piece) > 1} - set(pairs))
    tokens = [bytes([byte]) for byte in range(256)] + [token.encode() for token in pairs + words]
    names = "<|question|>", "<|answer|>", "<|end|>"
    return dict(pattern=pattern, ranks=[base64.b64encode(token).decode() for token in tokens],
                special={name: len(tokens) + i for i, name in enumerate(names)},
                chat=[["<|question|>"], ["<|answer|>"]], eos=["<|end|>"])


# ---- first reading ends here: other tasks, prompts, tokenizers on disk, solutions as tokens ----
LONGEST_RUN = 500_000  # of white space: the regex engine of tiktoken fails beyond a million


def encodable(text, missing):
    """A text in parts that tiktoken can take, without the bytes that have no token (SmolLM2 lacks
    some, of control characters)."""
    if missing:
        text = text.encode("utf-8", "replace").translate(None, missing).decode("utf-8", "ignore")
    runs = re.finditer(rf"\s{{999,{LONGEST_RUN}}}", text)
    cuts = [run.end() for run in runs if len(run[0]) == LONGEST_RUN]
    return (text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)]))


def problem_from(row, default_id, where):
    """The Problem in a row of GSM8K, MATH, OpenMathInstruct or a samples.jsonl.

    GSM8K's answer is a solution with calculations <<1+1=2>> in it, then #### and the answer. A
    sample is a solution, as it is, if it came to an end and boxes an answer.
    """
    def first(*columns):
        return next((row[column] for column in columns if row.get(column) is not None), None)

    question, answer = first("question", "problem"), first("answer", "expected_answer", "gold")
    solution = first("solution", "generated_solution") or ""
    if "completion" in row:
        told = row.get("finish") == "stop" and "\\boxed{" in str(row["completion"])
        solution = row["completion"] if told else ""
    if type(answer) in (int, float):
        answer = str(answer)
    elif "####" in str(answer):
        solution = re.sub(r"<<[^<>]*>>", "", str(answer))
        answer = solution.rsplit("####", 1)[1]
    texts = dict(question=question, answer=answer, solution=solution)
    check_fields(texts, dict.fromkeys(texts, str), where)
    require(question.strip() and answer.strip(), f"{where}: its question or answer is empty")
    return Problem(str(first("id", "unique_id") or default_id), question, answer.strip(), solution)


def load_task(name_or_file, split):
    """The list of Problem of a task's "train" or "test" split. A .jsonl file has the same problems
    in both, but of a samples.jsonl test has every question once."""
    require(split in ("train", "test"), f"unknown split {split!r}: choose train or test")
    if name_or_file in BUILT_IN:
        count = TRAIN_PROBLEMS if split == "train" else TEST_PROBLEMS
        return list(itertools.islice(arithmetic_problems(split, name_or_file), count))
    if not name_or_file.endswith(".jsonl"):
        return hub_problems(name_or_file, split)
    rows = list(json_lines(name_or_file))
    require(rows, f"{name_or_file} is missing or empty: expected a JSON object per line")
    problems = [problem_from(row, i, where) for i, (where, row) in enumerate(rows)]
    if split == "test" and all("completion" in row for _, row in rows):
        problems = list({problem.question: problem for problem in problems}.values())
    return problems


def hub_problems(task, split):
    """The problems of a data set of the Hub, of task[first:end] those rows."""
    name, *rows = re.fullmatch(r"(\w+)(?:\[(\d+):(\d+)\])?|.*", task, re.S).groups()
    require(name in HUB, f"unknown task {task!r}: choose {', '.join([*BUILT_IN, *HUB])}, "
                         "openmath2[1000:2000] or a .jsonl file")
    # openmath2 has 14 million
    first, end = map(int, rows) if rows[0] else (0, 50_000 if name == "openmath2" else None)
    return [problem_from(row, f"{split}/{i}", f"{name}, row {i}")
            for i, row in enumerate(hub.dataset_rows(name, split, first, end), first)]


def choose_subset(problems, limit, seed=None):
    """The first `limit` problems, or with a seed as many at random, in their old order."""
    if seed is None or limit is None:
        return problems[:limit]
    indices = random.Random(seed).sample(range(len(problems)), min(limit, len(problems)))
    return [problems[i] for i in sorted(indices)]


INSTRUCTION = "{question}\n\nReason step by step, and put your final answer within \\boxed{}."


def prompt_template(task, path=None):
    """What is asked, with {question} in it: a file's text, or what suits the task."""
    if path is None:
        return "{question}" if task in BUILT_IN else INSTRUCTION
    with naming(path):
        template = Path(path).read_text("utf-8").removesuffix("\n")  # editors add it
        require(template.count("{question}") == 1, "expected exactly one {question}")
    return template


def solution_text(problem):
    """What a model learns to write: the solution ("" if there is none) with its answer in a box,
    which takes the place of a last line #### answer."""
    steps, answer = problem.solution, problem.answer
    if not steps or "\\boxed" in steps:
        return steps
    before, mark, after = steps.rpartition("####")
    if mark and after.strip() == answer:
        steps = before
    return f"{steps.rstrip()}\n\\boxed{{{answer}}}"


@dataclass
class Pairs:
    """(prompt ids, answer ids) of every worked solution, encoded when asked for."""
    problems: list
    tokenizer: Tokenizer
    template: str

    def __len__(self):
        return len(self.problems)

    def __getitem__(self, index):
        problem, tokenizer = self.problems[index], self.tokenizer
        prompt = tokenizer.chat(self.template.replace("{question}", problem.question))
        return prompt, tokenizer.encode(solution_text(problem)) + tokenizer.eos_ids[:1]


def load_tokenizer(dir_or_name):
    """The Tokenizer of the built-in task ("arithmetic"), a folder or a repository; ValueError or
    FileNotFoundError says why there is none."""
    if dir_or_name == "arithmetic":
        return Tokenizer(arithmetic_definition())
    folder = hub.tokenizer_folder(dir_or_name)
    own = Path(folder, TOKENIZER_FILE)
    if not own.is_file():
        return Tokenizer(hub.read_tokenizer(folder))
    with naming(own):
        return Tokenizer(read_json(own))
