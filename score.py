"""Judge completions with a model: how likely is each to be right? A vote counts, a judge weighs.

    python score.py                        every model under out/, by the likelihood of its teacher
    python score.py MODEL --kind process   by a process reward model, such as
                                           RLHFlow/Llama3.1-8B-PRM-Deepseek-Data

Reads   out/<name>/samples.jsonl
Writes  out/<name>/scores.jsonl, a record per completion; scores.json, the settings
Rerunning goes on where a run stopped. torchrun shares the work as it does in sample.py.

Two kinds of judge. The likelihood of a text under a language model needs no training, and reading
many texts at once is far cheaper than writing them token by token: so a slow teacher can judge what
a fast student wrote. A process reward model (Lightman et al. 2023) judges every step of a solution.
That of RLHFlow, which search-and-learn uses, is a language model, fine-tuned for a dialogue: each
turn of the user is a step, and it answers "+" if all is well so far, "-" if not.
"""
import argparse
import itertools
import math
import os
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import hub
import parallel
from common import (Parser, choose_device, crc, folder_name, json_line, number, read_json,
                    read_jsonl, run, same_settings, write_json)
from data import INSTRUCTION, load_tokenizer
from model import LM
from sample import RECORD, cut_torn_line

AGGREGATE = dict(last=lambda steps: steps[-1], min=min, prod=math.prod)  # one score of all steps


# ---------------------------------------------------------------------------- what is read
class Text(NamedTuple):
    """Token ids, and the positions at which the model has seen what it shall judge."""
    record: dict  # of samples.jsonl
    ids: list
    positions: list


def likelihood_text(tokenizer, record, template):
    """A sample as its model wrote it, with the positions that predict its tokens.

    An end that was reached is a token too.
    """
    prompt = tokenizer.chat(template.replace("{question}", record["question"]))
    ids = prompt + tokenizer.encode(record["completion"])
    ids += tokenizer.eos_ids[:1] if record["finish"] == "stop" else []
    return Text(record, ids, list(range(len(prompt) - 1, len(ids) - 1)))


def process_text(tokenizer, record, template):
    """The dialogue about a sample: question and first step, "+", second step, "+", ...

    Steps stand between blank lines; blank ones are left out. The positions are those before each
    "+": in a causal model one pass judges every step as if all before were good.
    """
    steps = [step for step in record["completion"].split("\n\n") if step.strip()] or [""]
    steps[0] = f"{record['question']} {steps[0]}"
    ids, positions = [], []
    for turn, step in enumerate(steps):
        ids += tokenizer.chat(step, first=turn == 0)
        positions.append(len(ids) - 1)
        ids += tokenizer.encode("+") + tokenizer.eos_ids[:1]
    return Text(record, ids, positions)


# ---------------------------------------------------------------------------- judges
def residual_stream(lm, tokens):
    """The hidden state (B, L, d_model) after the last block."""
    for x in lm.hidden_states(tokens):
        pass
    return x


class Likelihood:
    """The probability of a completion after its prompt, 0 below 1e-323, as floats are."""
    text = staticmethod(likelihood_text)

    def __init__(self, lm, tokenizer):
        self.lm = lm

    def judge(self, x, text):
        """[p] for the hidden states x (L, d_model) of a text.

        The head sees one text at a time: logits of a batch would be the largest tensor by far.
        """
        logits = self.lm.head(x[None, text.positions])[0].float()  # (tokens judged, V)
        targets = [text.ids[position + 1] for position in text.positions]
        targets = torch.tensor(targets, device=x.device)
        return [math.exp(-F.cross_entropy(logits, targets, reduction="sum"))]


class Process:
    """The probability of "+" against "-" after each step.

    The softmax of two logits is the sigmoid of their difference, w . x if w is the difference of
    the head's rows.
    """
    text = staticmethod(process_text)

    def __init__(self, lm, tokenizer):
        self.lm, signs = lm, [tokenizer.encode(sign) for sign in "+-"]
        if any(len(ids) != 1 for ids in signs):
            raise ValueError('this is no process reward model: its tokenizer must have a token "+" '
                             f'and a token "-", but makes {signs[0]} and {signs[1]} of them')
        tied = lm.config.tie_embeddings
        rows = (lm.model.embed_tokens if tied else lm.lm_head).weight
        self.w = rows[signs[0][0]].float() - rows[signs[1][0]].float()  # (d_model,)

    def judge(self, x, text):
        """p of each step, for the hidden states x (L, d_model) of a text. In float32: in bfloat16,
        logits of 16 to 32 are multiples of 1/8."""
        return (self.lm.model.norm(x[text.positions]).float() @ self.w).sigmoid().tolist()


KINDS = dict(likelihood=Likelihood, process=Process)


@torch.inference_mode()
def judge_batch(judge, batch):
    """p at every position of every Text of a batch; padding at the right is seen by nothing."""
    rows = [torch.tensor(text.ids) for text in batch]
    tokens = pad_sequence(rows, batch_first=True).to(judge.lm.device)  # (B, L)
    return [judge.judge(x, text) for x, text in zip(residual_stream(judge.lm, tokens), batch)]


def batches(texts, budget):
    """Lists of texts of like length, with the padding at most `budget` tokens unless one has more.

    Texts come every problem's sample 0 first. Sorting all of them would pad least and finish no
    problem before the end: so they are sorted a few batches at a time.
    """
    texts = iter(texts)
    while pool := take(texts, 8 * budget):
        batch = []
        for text in sorted(pool, key=lambda text: len(text.ids), reverse=True):
            if batch and (len(batch) + 1) * len(batch[0].ids) > budget:
                yield batch
                batch = []
            batch.append(text)
        yield batch


def take(texts, tokens):
    """The next texts, until they have that many tokens."""
    pool = []
    for text in texts:
        pool.append(text)
        tokens -= len(text.ids)
        if tokens <= 0:
            break
    return pool


# ---------------------------------------------------------------------------- one model's samples
def read_scores(path, records):
    """{(problem, sample): score record} so far; ValueError if one is not of these samples."""
    texts, found = {(r["problem"], r["sample"]): crc(r["completion"]) for r in records}, {}
    fields = dict(problem=int, sample=int, score=float, num_tokens=int, seconds=float, crc=str)
    for score in read_jsonl(path, fields, torn=True):
        pair = score["problem"], score["sample"]
        if texts.get(pair) != score["crc"] or pair in found:
            raise ValueError(f"{path} holds a score of another text, or one twice (problem "
                             f"{pair[0]}, sample {pair[1]}): delete {path}")
        found[pair] = score
    return found


def score_samples(folder, to, judge, tokenizer, settings, aggregate, budget):
    """Scores of all samples in a folder into the file `to` there, going on where a run stopped.

    `seconds` is since scoring of this model began, and every problem's first samples come first: so
    it says what choosing among k samples costs.
    """
    samples, path = os.path.join(folder, "samples.jsonl"), os.path.join(folder, to)
    beside = os.path.splitext(path)[0] + ".json"
    records = read_jsonl(samples, RECORD, torn=True)
    records.sort(key=lambda r: (r["sample"], r["problem"]))
    if not records:
        raise ValueError(f"no samples in {samples}: run python sample.py first")
    origin = os.path.join(folder, "samples.json")
    origin = read_json(origin).get("settings", {}) if os.path.exists(origin) else {}
    template = origin.get("prompt") or INSTRUCTION
    settings = settings | dict(prompt=template, processes=parallel.world())
    scores = read_scores(path, records)
    if os.path.exists(path) and not os.path.exists(beside):
        raise ValueError(f"{beside} is missing, so {path} is no file of this script: name another "
                         f"with --to")
    same_settings(beside, settings, bool(scores))
    parallel.wait()  # until all have read what is there
    if not parallel.rank():
        cut_torn_line(path)
        if not scores:
            write_json(beside, dict(settings=settings))
    offset = max((score["seconds"] for score in scores.values()), default=0.0)
    left = [r for r in records if (r["problem"], r["sample"]) not in scores]
    mine = left[parallel.rank()::parallel.world()]
    for batch in itertools.islice(batches(texts_of(judge, tokenizer, mine, template), budget), 1):
        judge_batch(judge, batch)  # warm-up
    parallel.wait()  # all clocks start together
    began = time.perf_counter()
    with open(path, "ab", buffering=0) as f, tqdm(
            desc=os.path.basename(folder), total=len(mine), unit=" texts", dynamic_ncols=True,
            disable=parallel.rank() > 0, mininterval=0.5 if sys.stderr.isatty() else 10) as bar:
        for batch in batches(texts_of(judge, tokenizer, mine, template), budget):
            judged = judge_batch(judge, batch)
            seconds = offset + time.perf_counter() - began
            f.write(b"".join(json_line(dict(
                problem=text.record["problem"], sample=text.record["sample"],
                score=AGGREGATE[aggregate](steps), num_tokens=len(text.ids),
                seconds=round(seconds, 4), crc=crc(text.record["completion"])))
                for text, steps in zip(batch, judged)))
            bar.update(len(batch))
    parallel.wait()
    print(f"{path}: {len(records):,} scores", flush=True)


def texts_of(judge, tokenizer, records, template):
    """What the judge reads of each record."""
    return (judge.text(tokenizer, record, template) for record in records)


# ---------------------------------------------------------------------------- the script
TAKEN = "samples", "metrics", "config", "training", "tokenizer.tiktoken"  # by others' files


def file_name(text):
    """An argparse type: a .jsonl file that, as the .json beside it, no other script writes."""
    stem, ending = os.path.splitext(folder_name(text))
    if ending != ".jsonl" or stem in TAKEN:
        raise argparse.ArgumentTypeError(f"{text!r} is not a new .jsonl file: not one of "
                                         f"{', '.join(TAKEN)}")
    return text


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("judge", nargs="?", metavar="MODEL", help="the judge's folder or Hugging Face repository; "
        "default: teacher in --out, or teacher-small for small students")
    add("--kind", choices=KINDS, default="likelihood", help="what it tells of a text")
    add("--aggregate", choices=AGGREGATE, default="last", help="of a process reward model's steps: "
        "the last one's probability, the smallest, or the product")
    add("--model", nargs="+", type=folder_name, metavar="NAME", help="judge samples of OUT/NAME; "
        "default: of all that have samples")
    add("--to", type=file_name, default="scores.jsonl", metavar="FILE", help="in each folder")
    add("--tokens", type=number(1), default=16384, help="read at a time, padding included")
    add("--out", default="out", help="folder of the models")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, else float32")
    return parser.parse_args(argv)


def sampled(out, names):
    """The names of the models under `out` that have samples, or these of them."""
    there = sorted(os.listdir(out)) if os.path.isdir(out) else []
    found = [name for name in sorted(there, key=lambda name: name != "teacher")
             if os.path.isfile(os.path.join(out, name, "samples.jsonl"))]
    if missing := [name for name in names or () if name not in found]:
        raise ValueError(f"no samples of {missing[0]} under {out}/: run python sample.py first")
    if not found:
        raise ValueError(f"no samples under {out}/: run python sample.py first")
    return names or found


def main(argv=None):
    args = parse_args(argv)
    with parallel.processes(args.device):
        device, dtype = choose_device(args.device, args.dtype)
        judges = {}  # folder -> (judge, tokenizer, settings)
        for name in sampled(args.out, args.model):
            teacher = "teacher-small" if name.endswith("-small") else "teacher"
            source = args.judge or os.path.join(args.out, teacher)
            if source not in judges:
                tokenizer = load_tokenizer(source)
                lm = LM.from_pretrained(source, device, dtype).eval().requires_grad_(False)
                settings = dict(kind=args.kind, aggregate=args.aggregate, weights=hub.fingerprint(
                    source), dtype=str(dtype).removeprefix("torch."), device=device.type)
                judges[source] = KINDS[args.kind](lm, tokenizer), tokenizer, settings
            folder = os.path.join(args.out, name)
            with parallel.exclusively(folder):
                score_samples(folder, args.to, *judges[source], args.aggregate, args.tokens)


if __name__ == "__main__":
    run(main, "--tokens")
