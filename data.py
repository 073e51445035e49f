"""Tokenizers and tasks: what goes into a model, and what counts as right.

    problems = load_task("arithmetic", "test")        # or a .jsonl file
    tokenizer = load_tokenizer("arithmetic")          # or the folder of a checkpoint
    prompt = tokenizer.chat(problems[0].question)     # token ids up to where the answer starts

Contents: Problem, the built-in task, .jsonl files, load_task, Tokenizer, the built-in tokenizer, load_tokenizer,
and what every script shares: JSON files, the models under out/, options, errors in one line.
"""
import argparse
import base64
import itertools
import json
import os
import random
import re
import sys
import zlib
from dataclasses import dataclass

import tiktoken


@dataclass(frozen=True)
class Problem:
    id: str
    question: str
    answer: str  # the gold answer, for grading
    solution: str  # a worked solution that ends in the answer, for training; "" if the data has none


# ------------------------------------------------------------------------------------------------ the built-in task
# One real example; 2.7) means that two rounds and seven additions are left:
#
#   In each of 2 rounds do +7 7 times, then x7, keeping four digits. Start: 4821
#
#   2.7) 4821 +7 = 4828
#   2.6) 4828 +7 = 4835
#   ...
#   2.1) 4863 +7 = 4870
#   2.0) 4870 x7 = 4090
#   1.7) 4090 +7 = 4097
#   ...
#   1.1) 4132 +7 = 4139
#   1.0) 4139 x7 = 8973
#   \boxed{8973}
#
# Additions are easy and fill the page. A multiplication has to be done in the head, carries and all, and a small model
# gets it right only some of the time: the problems with many rounds and large numbers are the hard ones.
# The number of a problem is coprime to 10: a round is then a bijection of the four-digit numbers, so a mistake is never
# forgotten and the answer is right only if the whole chain is (a later mistake that happens to undo it aside).
ROUNDS, NUMBERS = (1, 6), (3, 7, 11, 13, 17)
TRAIN_PROBLEMS, TEST_PROBLEMS = 50_000, 1_000


def arithmetic_problem(rng):
    """One problem drawn from `rng` (random.Random), as (question, solution, answer)."""
    value, rounds, by = rng.randrange(10_000), rng.randint(*ROUNDS), rng.choice(NUMBERS)
    question = f"In each of {rounds} rounds do +{by} {by} times, then x{by}, keeping four digits. Start: {value:04d}"
    lines = []
    for rounds_left in range(rounds, 0, -1):
        for additions_left in range(by, -1, -1):
            result = (value + by if additions_left else value * by) % 10_000
            sign = "+" if additions_left else "x"
            lines.append(f"{rounds_left}.{additions_left}) {value:04d} {sign}{by} = {result:04d}\n")
            value = result
    return question, "".join(lines) + f"\\boxed{{{value:04d}}}", f"{value:04d}"


def arithmetic_problems(split):
    """Endless problems of a split, always the same ones.

    Train and test never share a question: a question belongs to the test split if its CRC-32 is a multiple of 8, and to
    the train split otherwise, whatever the seed it was drawn with.
    """
    rng = random.Random(f"arithmetic {split}")
    for index in itertools.count():
        while True:
            question, solution, answer = arithmetic_problem(rng)
            if (zlib.crc32(question.encode()) % 8 == 0) == (split == "test"):
                break
        yield Problem(f"{split}/{index}", question, answer, solution)


# ------------------------------------------------------------------------------------------------ files and names
def read_problems(path):
    """Problems of a .jsonl file with columns question (or problem) and answer, and optionally solution.

    In the GSM8K layout the answer column holds the worked solution and, after ####, the answer. Raises ValueError
    naming the line that is not JSON or lacks a column.
    """
    problems = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                question, answer = row["question"] if "question" in row else row["problem"], str(row["answer"])
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
            except (KeyError, TypeError):
                raise ValueError(f"{path}, line {number}: expected an object with 'question' (or 'problem') and "
                                 f"'answer', found {line.strip()[:80]}") from None
            solution = str(row.get("solution") or "")
            if "####" in answer:
                solution, answer = answer, answer.rsplit("####", 1)[1]
            problems.append(Problem(str(row.get("id", number - 1)), str(question), answer.strip(), solution))
    if not problems:
        raise ValueError(f"{path} has no problems: expected one JSON object per line")
    return problems


def load_task(name_or_file, split):
    """The problems of a task, as a list of Problem. `split` is "train" or "test"; a .jsonl file is its own split."""
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: choose train or test")
    if name_or_file == "arithmetic":
        count = TRAIN_PROBLEMS if split == "train" else TEST_PROBLEMS
        return list(itertools.islice(arithmetic_problems(split), count))
    if name_or_file.endswith(".jsonl"):
        if not os.path.isfile(name_or_file):
            raise FileNotFoundError(f"no such file: {name_or_file}")
        return read_problems(name_or_file)
    raise ValueError(f"unknown task {name_or_file!r}: choose arithmetic, or the path of a .jsonl file")


# ------------------------------------------------------------------------------------------------ tokenizer
TOKENIZER_FILE = "tokenizer.tiktoken.json"


class Tokenizer:
    """A tiktoken.Encoding together with what a chat needs: the ids around a question, and the ids that end an answer.

    `definition` is what is saved with a checkpoint: pattern (the split regex), ranks (token bytes in base64, in order
    of their ids), special (name -> id), chat (ids before and after the question, names of special tokens), eos.
    """

    def __init__(self, definition):
        self.definition = definition
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(definition["ranks"])}
        self.encoding = tiktoken.Encoding("nanoreasoner", pat_str=definition["pattern"], mergeable_ranks=ranks,
                                          special_tokens=definition["special"])
        self.before, self.after = ([definition["special"][name] for name in names] for names in definition["chat"])
        self.eos_ids = [definition["special"][name] for name in definition["eos"]]
        self.vocab_size = self.encoding.n_vocab

    def encode(self, text):
        """Ids of a text. Adds nothing, and reads text that looks like a special token as plain text."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        return self.encoding.decode(ids)

    def chat(self, question):
        """The prompt for a question, up to where the answer starts."""
        return self.before + self.encode(question) + self.after

    def save(self, folder):
        write_json(os.path.join(folder, TOKENIZER_FILE), self.definition)


def arithmetic_definition():
    """The built-in task's tokenizer: 256 bytes, all two-digit numbers, and the words of the task, one token each.

    With two digits a token (Llama 3 has up to three) and 2.7) or +7 or x13 as one, the operands of a step are at most
    three tokens away, within the reach of a convolution of width 4. Any other text falls back to bytes, so every text survives encode and decode.
    """
    rng = random.Random(0)
    text = "\n".join(itertools.chain.from_iterable(arithmetic_problem(rng)[:2] for _ in range(1000)))
    pattern = r"\d+\.\d+\)| [+x]\d+| ?\d\d| ?\d| ?[^\s\d]+|\s"
    pairs = [f"{space}{number:02d}" for space in ("", " ") for number in range(100)]
    words = sorted({piece for piece in re.findall(pattern, text) if len(piece) > 1} - set(pairs))
    tokens = [bytes([byte]) for byte in range(256)] + [token.encode() for token in pairs + words]
    special = {name: len(tokens) + i for i, name in enumerate(("<|question|>", "<|answer|>", "<|end|>"))}
    return dict(pattern=pattern, ranks=[base64.b64encode(token).decode() for token in tokens], special=special,
                chat=[["<|question|>"], ["<|answer|>"]], eos=["<|end|>"])


def load_tokenizer(dir_or_name):
    """The tokenizer of the built-in task ("arithmetic"), or the one saved in a checkpoint's folder."""
    if dir_or_name == "arithmetic":
        return Tokenizer(arithmetic_definition())
    path = os.path.join(dir_or_name, TOKENIZER_FILE)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no tokenizer in {dir_or_name}: expected {TOKENIZER_FILE} there")
    return Tokenizer(read_json(path))


# ------------------------------------------------------------------------------------------------ for every script
def read_json(path):
    """A JSON file's value; ValueError naming the file if it is not JSON."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None


def write_json(path, value):
    """Write under a temporary name, then rename: whoever reads sees the old file or the new one, never half of one."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)
        f.write("\n")
    os.replace(path + ".tmp", path)


def find_models(out):
    """Folders of the finished checkpoints under `out`: the teacher first, then by name."""
    names = sorted(os.listdir(out)) if os.path.isdir(out) else []
    folders = [os.path.join(out, name) for name in names if os.path.isfile(os.path.join(out, name, "config.json"))]
    if not folders:
        raise ValueError(f"no models under {out}/: run python distill.py first, or name one with --model")
    return sorted(folders, key=lambda folder: os.path.basename(folder) != "teacher")


def refuse_other_settings(path, old, new):
    """Raises ValueError that names every setting in which what is at `path` differs from what is asked for."""
    differ = [f"{name} = {old.get(name)!r} there, {new.get(name)!r} now"
              for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if differ:
        raise ValueError(f"{path} was made with other settings ({'; '.join(differ)}): "
                         f"rerun with those, choose another --out, or delete it")


class Parser(argparse.ArgumentParser):
    """argparse whose --help shows every default and whose complaints are one line."""

    def __init__(self, doc):
        super().__init__(description=doc.split("\n")[0], formatter_class=Help)

    def error(self, message):
        print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def at_least(low, kind=int):
    """An argparse type: a number that is `low` or more."""
    def parse(text):
        if kind(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is out of range, the least is {low}")
        return kind(text)
    parse.__name__ = kind.__name__  # argparse says "invalid int value" with it
    return parse


def run(main):
    """Run a script's main; a user's mistake ends in one line and exit code 2 instead of a traceback."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to go on", file=sys.stderr)
        sys.exit(130)
