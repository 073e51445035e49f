"""Tokenizers and tasks: what goes into a model, and what counts as right.

    problems = load_task("gsm8k", "test")             # or "arithmetic", or a .jsonl file
    tokenizer = load_tokenizer("HuggingFaceTB/SmolLM2-135M-Instruct")  # or "arithmetic", or the folder of a checkpoint
    question = prompt_template("gsm8k").replace("{question}", problems[0].question)
    prompt = tokenizer.chat(question)                 # token ids up to where the answer starts

Contents: Problem, the built-in task, rows and files and the Hub, load_task, choose_subset, what a model reads and
writes, Tokenizer, the built-in tokenizer, Llama 3's tokenizer.model, byte-level BPE's tokenizer.json, chat formats,
load_tokenizer, token_cache, and what every script shares: JSON files, the models under out/, options, errors in one
line.
"""
import argparse
import base64
import hashlib
import itertools
import json
import os
import random
import re
import sys
import zlib
from dataclasses import dataclass

import numpy as np
import tiktoken
from tqdm import tqdm


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
HUB = {  # name of the task: repository, configuration, splits
    "gsm8k": ("openai/gsm8k", "main", ("train", "test")),
    "math500": ("HuggingFaceH4/MATH-500", None, ("test",)),
    "openmath2": ("nvidia/OpenMathInstruct-2", None, ("train",)),
}
OPENMATH2_ROWS = (0, 50_000)  # of its 14 million, if no slice is named


def problem_from(row, default_id):
    """The Problem in a row of GSM8K (question, answer), of MATH (problem, solution, answer) or of OpenMathInstruct
    (problem, generated_solution, expected_answer). KeyError if there is no question or no answer.

    GSM8K's answer column holds the worked solution, with a calculator's <<1+1=2>> in it, and after #### the answer.
    """
    def first(*columns):
        return next((str(row[column]) for column in columns if row.get(column) is not None), None)

    question, answer = first("question", "problem"), first("answer", "expected_answer")
    if question is None or answer is None:
        raise KeyError("question or answer")
    solution = first("solution", "generated_solution") or ""
    if "####" in answer:
        solution = re.sub(r"<<[^<>]*>>", "", answer)
        answer = solution.rsplit("####", 1)[1]
    return Problem(first("id", "unique_id") or default_id, question, answer.strip(), solution)


def read_problems(path):
    """Problems of a .jsonl file, one JSON object with the columns of `problem_from` per line.

    Raises ValueError naming the line that is not JSON or lacks a column.
    """
    problems = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                problems.append(problem_from(json.loads(line), str(number - 1)))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
            except (KeyError, AttributeError):
                raise ValueError(f"{path}, line {number}: expected an object with 'question' (or 'problem') and "
                                 f"'answer' (or 'expected_answer'), found {line.strip()[:80]}") from None
    if not problems:
        raise ValueError(f"{path} has no problems: expected one JSON object per line")
    return problems


def hub_problems(task, split, rows):
    """Problems of a data set on the Hugging Face Hub; with rows = (first, end) it is streamed, and only so far.

    Raises ValueError in one line if there is no such split, no `datasets` or no network.
    """
    repo, configuration, splits = HUB[task]
    if split not in splits:
        raise ValueError(f"{task} has no {split} split: it has {' and '.join(splits)}")
    instead = f"or pass its rows from a .jsonl file instead of {task}"
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{task} needs the package datasets: pip install datasets, {instead}") from None
    try:
        found = datasets.load_dataset(repo, configuration, split=split, streaming=rows is not None)
        found = list(itertools.islice(found, *rows) if rows else found)
    except Exception as error:  # the library has its own, httpx's, OSError and more; all mean that there is no data
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        raise ValueError(f"could not load {repo} from the Hugging Face Hub ({reason}): check the network, "
                         f"{instead}") from None
    if not found:
        raise ValueError(f"{task} has no rows {rows[0]} to {rows[1]}: choose smaller numbers")
    first = rows[0] if rows else 0
    return [problem_from(row, f"{split}/{first + i}") for i, row in enumerate(found)]


def load_task(name_or_file, split):
    """The problems of a task, as a list of Problem. `split` is "train" or "test"; a .jsonl file is its own split.

    Names: arithmetic (built in), gsm8k, math500 (test only), openmath2 (train only: its first OPENMATH2_ROWS, or any
    others as openmath2[1000:2000]).
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: choose train or test")
    if name_or_file == "arithmetic":
        count = TRAIN_PROBLEMS if split == "train" else TEST_PROBLEMS
        return list(itertools.islice(arithmetic_problems(split), count))
    if name_or_file.endswith(".jsonl"):
        if not os.path.isfile(name_or_file):
            raise FileNotFoundError(f"no such file: {name_or_file}")
        return read_problems(name_or_file)
    part = re.fullmatch(r"openmath2\[(\d+):(\d+)\]", name_or_file)
    rows = (int(part[1]), int(part[2])) if part else OPENMATH2_ROWS if name_or_file == "openmath2" else None
    name = "openmath2" if part else name_or_file
    if name not in HUB or rows and rows[0] >= rows[1]:
        raise ValueError(f"unknown task {name_or_file!r}: choose arithmetic, {', '.join(HUB)}, openmath2[1000:2000], or "
                         f"the path of a .jsonl file")
    return hub_problems(name, split, rows)


def choose_subset(problems, limit, seed=None):
    """The first `limit` problems; with a seed as many at random, in their old order. All if limit is None or larger.

    The paper, as large_language_monkeys before it, measures 128 random problems of a test set.
    """
    if limit is None or limit >= len(problems):
        return list(problems)
    if seed is None:
        return problems[:limit]
    return [problems[i] for i in sorted(random.Random(seed).sample(range(len(problems)), limit))]


# ------------------------------------------------------------------------------------------------ reading and writing
INSTRUCTION = "{question}\n\nReason step by step, and put your final answer within \\boxed{}."


def prompt_template(task, path=None):
    """The text around a question, for str.replace("{question}", ...): questions are full of braces of their own.

    The built-in task's is the bare question, any other's INSTRUCTION, unless `path` names a file with another (a newline
    at its end, which editors add, does not count). Raises ValueError if the file has not exactly one {question}.
    """
    if path is None:
        return "{question}" if task == "arithmetic" else INSTRUCTION
    with open(path, encoding="utf-8") as f:
        template = f.read().removesuffix("\n")
    if template.count("{question}") != 1:
        raise ValueError(f"{path}: expected {{question}} exactly once, found it {template.count('{question}')} times")
    return template


def solution_text(problem):
    """What a model is trained to write: the solution, ending in \\boxed{answer} if it boxes nothing itself.

    GSM8K's last line, #### answer, is dropped. "" if there is no solution.
    """
    solution = problem.solution
    before, mark, after = solution.rpartition("####")
    if mark and after.strip() == problem.answer:
        solution = before.rstrip()
    if not solution or "\\boxed" in solution:
        return solution
    return f"{solution.rstrip()}\n\\boxed{{{problem.answer}}}"


# ------------------------------------------------------------------------------------------------ tokenizer
TOKENIZER_FILE = "tokenizer.tiktoken.json"
LONGEST_RUN = 500_000  # white space: the regex engine of tiktoken fails beyond a million


def merge_bytes(token, ranks, below=sys.maxsize):
    """Byte-pair encoding in plain Python: as long as neighbours make a token of an id below `below`, the lowest first."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 1:
        found = [ranks.get(left + right, below) for left, right in itertools.pairwise(parts)]
        if min(found) >= below:
            break
        i = found.index(min(found))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


class Tokenizer:
    """A tiktoken.Encoding together with what a chat needs: what comes around a question, and the ids that end an answer.

    `definition` is what is saved with a checkpoint: pattern (the split regex), ranks (token bytes in base64, in order
    of their ids, null where an id is special), special (name -> id), chat (what comes before and after the question:
    names of special tokens and plain texts), eos (names; the first ends a turn), and maybe trim (true: the template
    strips the question) and unknown (what stands for a byte without a token).
    """

    def __init__(self, definition):
        self.definition, special = definition, definition["special"]
        self.ranks = {base64.b64decode(token): rank for rank, token in enumerate(definition["ranks"]) if token}
        self.missing = bytes(byte for byte in range(256) if bytes([byte]) not in self.ranks)
        self.encoding = tiktoken.Encoding("nanoreasoner", pat_str=definition["pattern"], mergeable_ranks=self.ranks,
                                          special_tokens=special)
        self.eos_ids = [special[name] for name in definition["eos"]]
        self.vocab_size = self.encoding.n_vocab

    def encode(self, text):
        """Ids of a text. Adds nothing, and reads text that looks like a special token as plain text.

        Bytes without a token are left out: SmolLM2 lacks some, of control characters and of planes that hold no text.
        """
        content = text.encode("utf-8", "replace")
        if len(content.translate(None, self.missing)) < len(content):
            return self.encode_incomplete(text)
        if len(text) <= LONGEST_RUN:
            return self.encoding.encode_ordinary(text)
        cuts = [i for run in re.finditer(r"\s+", text) for i in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)]
        parts = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
        return list(itertools.chain.from_iterable(map(self.encoding.encode_ordinary, parts)))

    def encode_incomplete(self, text):
        """Ids of a text with bytes that have no token, where tiktoken would fail: what is around them merges over them."""
        import regex  # comes with tiktoken
        unknown, ids = self.definition["special"].get(self.definition.get("unknown")), []
        for piece in (match[0] for match in regex.finditer(self.definition["pattern"], text)):
            content = piece.encode("utf-8", "replace")
            if len(content.translate(None, self.missing)) == len(content):
                ids += self.encoding.encode_ordinary(piece)
            else:
                content = content if unknown is not None else content.translate(None, self.missing)
                ids += [self.ranks.get(part, unknown) for part in merge_bytes(content, self.ranks)]
        return ids

    def decode(self, ids):
        """The text of ids, special tokens by their names. ValueError naming an id that is not in the vocabulary."""
        try:
            return self.encoding.decode(ids)
        except (KeyError, OverflowError) as error:
            raise ValueError(f"{error.args[0]}: the vocabulary has ids 0 to {self.vocab_size - 1}") from None

    def chat(self, question, first=True):
        """The prompt for a question, up to where the answer starts. What the question spells is plain text, and is encoded
        in one go with the plain texts next to it: a token may span them.

        Not the first question of a dialogue: it follows an answer and eos_ids[0], without what only starts a dialogue.
        """
        special, (before, after) = self.definition["special"], self.definition["chat"]
        if not first:  # what starts a dialogue is the beginning of the text and, as it ends like a turn, the system message
            once = [i for i, item in enumerate(before) if item in ("<|begin_of_text|>", *self.definition["eos"][:1])]
            before = before[once[-1] + 1:] if once else before
        ids, text = [], ""
        for item in [*before, None, *after]:
            if item in special:
                ids, text = ids + self.encode(text) + [special[item]], ""
            elif item is None:
                text += question.strip() if self.definition.get("trim") else question
            else:
                text += item
        return ids + self.encode(text)

    def save(self, folder):
        write_json(os.path.join(folder, TOKENIZER_FILE), self.definition)


def arithmetic_definition():
    """The built-in task's tokenizer: 256 bytes, all two-digit numbers, and the words of the task, one token each.

    With two digits a token (Llama 3 has up to three) and 2.7) or +7 or x13 as one, the operands of a step are at most
    three tokens away, within the reach of a convolution of width 4. Any other text falls back to bytes, so every text
    survives encode and decode.
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


# ------------------------------------------------------------------------------------------------ tokenizers of others
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                  r"\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_RANKS = 128_000  # and 256 special tokens: these, and reserved ones
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
                  "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
                  "<|eot_id|>", "<|python_tag|>", "<|image|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 246))]
LLAMA3_TEMPLATE = "<|start_header_id|> Cutting Knowledge Date"  # what tells its chat template
LLAMA3_SYSTEM = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def is_tiktoken(path):
    """Is it a file of tiktoken's, lines of `base64 rank`? Llama 2's tokenizer.model, for one, is sentencepiece's."""
    with open(path, "rb") as f:
        return re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", f.readline(1000)) is not None


def read_llama3(path):
    """The tokenizer in Llama 3's tokenizer.model: {pattern, ranks, special}, the special tokens named as Meta does."""
    if not is_tiktoken(path):
        raise ValueError("tokenizer.model is not Llama 3's but probably a sentencepiece file, which is not supported")
    with open(path, encoding="ascii") as f:
        tokens, ranks = zip(*(line.split() for line in f))
    if list(map(int, ranks)) != list(range(LLAMA3_RANKS)):
        raise ValueError(f"tokenizer.model has {len(ranks):,} lines: expected Llama 3's ranks 0 to {LLAMA3_RANKS - 1}")
    return dict(pattern=LLAMA3_PATTERN, ranks=list(tokens),
                special={name: LLAMA3_RANKS + i for i, name in enumerate(LLAMA3_SPECIAL)})


def need(condition, problem):
    if not condition:
        raise ValueError(f"{problem}; supported is byte-level BPE as SmolLM2 and Llama 3 have it")


def read_byte_bpe(path):
    """The tokenizer in a tokenizer.json of Hugging Face, if it is byte-level BPE that tiktoken can do exactly:
    {pattern, ranks, special, unknown}. Raises ValueError naming the first thing that it cannot."""
    file = read_json(path)
    model, added = file.get("model") or {}, file.get("added_tokens") or []
    need(model.get("type") == "BPE", f"its model is {model.get('type')}, not BPE")
    for option in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk"):
        need(not model.get(option), f"its model has {option} = {model.get(option)!r}")
    need(not file.get("normalizer"), f"it has a normalizer, {(file.get('normalizer') or {}).get('type')}")
    for token in added:
        need(token["special"], f"its added token {token['content']!r} is not special")
    special = {token["content"]: token["id"] for token in added}

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's alphabet: a character for every byte
    others = (byte for byte in range(256) if byte not in printable)
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    ranks = {}
    for token, rank in model["vocab"].items():
        if token not in special:
            need(set(token) <= byte_of.keys(), f"its token {token!r} is not made of bytes")
            ranks[bytes(byte_of[c] for c in token)] = rank
    pairs = [tuple(bytes(byte_of[c] for c in part) for part in (merge.split(" ") if isinstance(merge, str) else merge))
             for merge in model.get("merges") or []]
    check_merges(ranks, pairs, model.get("ignore_merges"))
    tokens = {rank: base64.b64encode(token).decode() for token, rank in ranks.items()}
    return dict(pattern=split_pattern(file.get("pre_tokenizer") or {}), special=special,
                ranks=[tokens.get(rank) for rank in range(max(tokens) + 1)], unknown=model.get("unk_token"))


def check_merges(ranks, pairs, ignore_merges):
    """Does tiktoken merge as the list `pairs` says? It merges whatever neighbours make a token, the lowest id first.

    It is the same if the pairs come in the order of the ids they make, and if merging the bytes of a token alone gets to
    a listed pair: then its bytes never meet as another. A token that merging does not get to is for ignore_merges only,
    which like tiktoken takes a piece that is a token whole.
    """
    made = list(dict.fromkeys(ranks.get(left + right) for left, right in pairs))
    need(made, "it has no merges")
    need(None not in made, "one of its merges makes no token")
    need(made == sorted(made), "its merges are not in the order of the ids")
    listed = set(pairs)
    for token, rank in ranks.items():
        parts = merge_bytes(token, ranks, rank)
        need(len(parts) == 1 or tuple(parts) in listed or len(parts) > 2 and ignore_merges,
             f"its merges do not make the token {token!r}")


def split_pattern(pre_tokenizer):
    r"""One regex that splits as a pre-tokenizer does: [Digits,] [Split by a regex,] ByteLevel.

    Digits cuts first: the rest sees each digit, or run of digits, as a text of its own. So no space joins a digit, and
    spaces before one end their text: \s+(?!\S) takes all of them.
    """
    steps, order = pre_tokenizer.get("pretokenizers", [pre_tokenizer]), ("Digits", "Split", "ByteLevel")
    kinds = [step.get("type") for step in steps]
    digits, split, level = (steps[kinds.index(kind)] if kind in kinds else {} for kind in order)
    pattern = split["pattern"].get("Regex") if split else GPT2_PATTERN
    known = pattern in (GPT2_PATTERN, LLAMA3_PATTERN)
    need(kinds == [kind for kind in order if kind in kinds] and level and pattern
         and not level["add_prefix_space"] and level.get("use_regex", True) != bool(split)
         and (not split or split["behavior"] == "Isolated" and not split["invert"]) and (known or not digits),
         f"its pre-tokenizer is {json.dumps(pre_tokenizer)[:400]}")
    if digits:
        pattern = pattern.replace(r"(?!\S)", r"(?![^\s\p{N}])").replace(r" ?\p{N}+", r"\p{N}+")
        if digits["individual_digits"]:
            pattern = pattern.replace(r"\p{N}+", r"\p{N}").replace(r"\p{N}{1,3}", r"\p{N}")
    return pattern if known else rf"{pattern}|(?s:(?:(?!{pattern}).)+)"  # between two matches is a piece, too


def chat_format(template, special):
    """{chat, trim, eos} for a model's chat template, which is recognised, not run. Raises ValueError if it is not.

    Without a template it is a base model: its prompt is the text and a newline, after <|begin_of_text|> in a Llama.
    """
    if template is None:
        starts, *ends = ([name] if name in special else [] for name in
                         ("<|begin_of_text|>", "<|end_of_text|>", "<|endoftext|>"))
        return dict(chat=[starts, ["\n"]], trim=False, eos=sum(ends, []))
    llama3 = {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
    if "<|start_header_id|>" in template and llama3 <= special.keys():
        def header(role):
            return ["<|start_header_id|>", role, "<|end_header_id|>", "\n\n"]
        system = [*header("system"), LLAMA3_SYSTEM, "<|eot_id|>"] if "Cutting Knowledge Date" in template else []
        return dict(chat=[["<|begin_of_text|>", *system, *header("user")], ["<|eot_id|>", *header("assistant")]], trim=True,
                    eos=[name for name in ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>") if name in special])
    if SMOLLM2_SYSTEM in template and {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= special.keys():
        before = ["<|im_start|>", f"system\n{SMOLLM2_SYSTEM}", "<|im_end|>", "\n", "<|im_start|>", "user\n"]
        return dict(chat=[before, ["<|im_end|>", "\n", "<|im_start|>", "assistant\n"]], trim=False,
                    eos=["<|im_end|>", "<|endoftext|>"])
    raise ValueError("its chat template is of no known family: choose a model of Llama 3's or SmolLM2's")


def read_format(folder, special, template=None):
    """{chat, trim, eos} for the files in a model's folder; `template` counts if they do not say how to chat."""
    def read(name):
        path = os.path.join(folder, name)
        return read_json(path) if os.path.isfile(path) else {}

    template = read("tokenizer_config.json").get("chat_template", template)
    if isinstance(template, list):  # several, with names
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    jinja = os.path.join(folder, "chat_template.jinja")
    if os.path.isfile(jinja):
        with open(jinja, encoding="utf-8") as f:
            template = f.read()
    found, name_of = chat_format(template, special), {i: name for name, i in special.items()}
    ends = read("generation_config.json").get("eos_token_id", read("config.json").get("eos_token_id", []))
    for end in ends if isinstance(ends, list) else [ends]:
        if end not in name_of:
            raise ValueError(f"its eos_token_id, {end}, is not a special token")
        found["eos"] = list(dict.fromkeys([*found["eos"], name_of[end]]))
    return found


def load_tokenizer(dir_or_name):
    """The tokenizer of the built-in task ("arithmetic"), of a folder, or of a repository on the Hub ("org/name").

    Of the files in a folder the first counts: our own, saved with a checkpoint; tokenizer.model, if it is Llama 3's;
    tokenizer.json. Raises FileNotFoundError if there is none, ValueError saying why a file cannot be used.
    A tokenizer.model without a tokenizer_config.json is taken for Llama 3 Instruct's, since it does not say.
    """
    if dir_or_name == "arithmetic":
        return Tokenizer(arithmetic_definition())
    folder = dir_or_name
    if not os.path.isdir(folder):
        from model import hub_folder  # here, since it brings torch, which grade.py and plot.py do without
        folder = hub_folder(folder, ["tokenizer*", "chat_template.jinja", "config.json", "generation_config.json"])
    own, llama3, bpe = (os.path.join(folder, name) for name in (TOKENIZER_FILE, "tokenizer.model", "tokenizer.json"))
    try:
        if os.path.isfile(own):
            return Tokenizer(read_json(own))
        if os.path.isfile(llama3) and (is_tiktoken(llama3) or not os.path.isfile(bpe)):
            found, known = read_llama3(llama3), os.path.isfile(os.path.join(folder, "tokenizer_config.json"))
            return Tokenizer(found | read_format(folder, found["special"], None if known else LLAMA3_TEMPLATE))
        if os.path.isfile(bpe):
            found = read_byte_bpe(bpe)
            return Tokenizer(found | read_format(folder, found["special"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"the tokenizer in {folder} cannot be used: {reason}") from None
    raise FileNotFoundError(f"no tokenizer in {folder}: expected {TOKENIZER_FILE}, tokenizer.model or tokenizer.json there")


# ------------------------------------------------------------------------------------------------ documents as tokens
CACHE_FORMAT = 1


def token_cache(problems, tokenizer, template, folder):
    """The documents to train on: (tokens uint32 (all,), bounds int64 (n, 3)), tokens memory-mapped from a file.

    Document i, tokens[bounds[i, 0]:bounds[i, 2]], is the question in its template and the model's chat format, then from
    bounds[i, 1] on solution_text and the id that ends a turn. Files under `folder` are named by a hash of all that goes
    in, and checked by a CRC-32 (with the length the last row of bounds on disk): whatever is broken is built again.
    """
    if not problems:
        raise ValueError("no problems to tokenise")
    texts = [(template.replace("{question}", problem.question), solution_text(problem)) for problem in problems]
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, tokenizer.definition, texts]).encode()).hexdigest()[:16]
    paths = [os.path.join(folder, f"{name}-{key}.npy") for name in ("tokens", "bounds")]
    for attempt in range(2):
        try:
            tokens, bounds = np.load(paths[0], mmap_mode="r"), np.load(paths[1])
            if [len(tokens), zlib.crc32(tokens, zlib.crc32(bounds[:-1])), 0] == bounds[-1].tolist():
                return tokens, bounds[:-1]
        except Exception:
            pass  # missing, or broken in one of numpy's many ways
        if attempt == 0:
            build_cache(texts, tokenizer, paths)
    raise ValueError(f"{paths[0]} cannot be read back after writing it: is the disk full?")


def build_cache(texts, tokenizer, paths):
    """Tokenise (prompt, answer) texts and write both files of `token_cache`, each under a temporary name first."""
    tokens, bounds, end = [np.zeros(0, np.uint32)], np.zeros((len(texts) + 1, 3), np.int64), 0
    for i, (question, solution) in enumerate(tqdm(texts, desc="tokenising", disable=None)):
        prompt, answer = tokenizer.chat(question), tokenizer.encode(solution) + tokenizer.eos_ids[:1]
        bounds[i] = end, end + len(prompt), end + len(prompt) + len(answer)
        tokens.append(np.array(prompt + answer, np.uint32))
        end = bounds[i, 2]
    tokens = np.concatenate(tokens)
    bounds[-1] = len(tokens), zlib.crc32(tokens, zlib.crc32(bounds[:-1])), 0
    os.makedirs(os.path.dirname(paths[0]), exist_ok=True)
    for path, array in zip(paths, (tokens, bounds)):
        with open(f"{path}.{os.getpid()}.tmp", "wb") as f:
            np.save(f, array)
        os.replace(f.name, path)


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
    """Folders of the finished checkpoints under `out` that write text: the teacher first, then by name."""
    folders = [os.path.join(out, name) for name in (sorted(os.listdir(out)) if os.path.isdir(out) else [])]
    folders = [folder for folder in folders if os.path.isfile(os.path.join(folder, "config.json"))
               and "LlamaForSequenceClassification" not in
               (read_json(os.path.join(folder, "config.json")).get("architectures") or ())]
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
