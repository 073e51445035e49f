"""Judge completions with a model: how likely is each to be right? A vote counts, a judge weighs.

    python score.py                        every model under out/, by the likelihood of its teacher
    python score.py MODEL --kind process   by a process reward model, such as
                                           RLHFlow/Llama3.1-8B-PRM-Deepseek-Data

Writes out/<name>/scores.jsonl, a record per completion, and scores.json, the settings. Rerunning
goes on where a run stopped. torchrun shares the work.
"""
import math
import time
from pathlib import Path
from typing import NamedTuple

from common import (Parser, add_device_options, choose_device, crc, folder_name, number,
                    own_teacher, read_jsonl, require, run)

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import parallel
from data import load_tokenizer
from hub import fingerprint
from model import LM
from sample import RECORD, append, read_settings, resume


# ---- judges
class Text(NamedTuple):
    """Token ids, and the positions after which a judge looks."""
    record: dict  # of samples.jsonl
    ids: list
    positions: list


class Likelihood:
    """The probability of a completion after its prompt."""

    def __init__(self, lm, tokenizer):
        self.lm, self.tokenizer = lm, tokenizer

    def read(self, record, template):
        """A sample as its model wrote it, its end included if it was reached."""
        prompt = self.tokenizer.chat(template.replace("{question}", record["question"]))
        ids = prompt + self.tokenizer.encode(record["completion"])
        ids += self.tokenizer.eos_ids[:1] * (record["finish"] == "stop")
        return Text(record, ids, list(range(len(prompt) - 1, len(ids) - 1)))

    def judge(self, x, text):
        """[p] for the hidden states x (L, d_model) of a text, whose tokens come one position on.
        The head sees one text at a time: logits of a batch would be the largest tensor by far."""
        logits = self.lm.head(x[None, text.positions])[0].float()  # (tokens judged, V)
        targets = torch.tensor(text.ids[1:], device=x.device)[text.positions]
        return [math.exp(-F.cross_entropy(logits, targets, reduction="sum"))]


class Process:
    """The probability of "+" against "-" after each step (Lightman et al. 2023)."""

    def __init__(self, lm, tokenizer):
        self.lm, self.tokenizer = lm, tokenizer
        signs = tokenizer.encode("+") + tokenizer.encode("-")
        require(len(signs) == 2,
                'no process reward model: its tokenizer lacks a token of "+" or "-"')
        head = lm.model.embed_tokens if lm.config.tie_embeddings else lm.lm_head
        self.rows = head.weight[signs].float()  # (2, d_model)

    def read(self, record, template):
        """RLHFlow's dialogue about a sample: question and first step, "+", second step, "+", ...
        The positions are those before each "+": in a causal model one pass judges every step as if
        all before were good."""
        steps = [step for step in record["completion"].split("\n\n") if step.strip()] or [""]
        steps[0] = f"{record['question']} {steps[0]}"
        ids, positions = [], []
        for step in steps:
            ids += self.tokenizer.chat(step, first=not ids)
            positions.append(len(ids) - 1)
            ids += self.tokenizer.encode("+") + self.tokenizer.eos_ids[:1]
        return Text(record, ids, positions)

    def judge(self, x, text):
        """p of each step. In float32: bfloat16 rounds logits of 16 to 32 to multiples of 1/8."""
        logits = F.linear(self.lm.model.norm(x[text.positions]).float(), self.rows)  # (steps, 2)
        return logits.softmax(-1)[:, 0].tolist()


KINDS = dict(likelihood=Likelihood, process=Process)
AGGREGATE = dict(last=lambda steps: steps[-1], min=min, prod=math.prod)  # one score of all steps


@torch.inference_mode()
def judge_batch(judge, batch):
    """What the judge finds in each Text of a batch; padding on the right is seen by nothing."""
    tokens = pad_sequence([torch.tensor(text.ids) for text in batch], batch_first=True)  # (B, L)
    states = judge.lm.last_state(tokens.to(judge.lm.device))  # (B, L, d_model)
    return [judge.judge(x, text) for x, text in zip(states, batch)]


def batches(judge, records, template, budget):
    """Yield lists of Texts of like length: `budget` tokens with padding, or one text. 512 are
    sorted at a time: sorting all would finish no problem early."""
    for start in range(0, len(records), 512):
        texts = sorted((judge.read(record, template) for record in records[start:start + 512]),
                       key=lambda text: -len(text.ids))
        while texts:
            size = max(1, budget // len(texts[0].ids))
            yield texts[:size]
            texts = texts[size:]


# ---- one model's samples
FIELDS = dict(problem=int, sample=int, score=float, num_tokens=int, seconds=float, crc=str)


def score_samples(folder, to, judge, settings, budget):
    """Score a folder's samples into the file `to` there, going on where a run stopped: first every
    problem's first samples, so that `seconds` are what choosing among k costs."""
    path, aggregate = folder / to, AGGREGATE[settings["aggregate"]]
    samples = {(record["problem"], record["sample"]): record
               for record in read_jsonl(folder / "samples.jsonl", RECORD, torn=True)}
    texts = {pair: crc(record["completion"]) for pair, record in samples.items()}
    done, spent = resume(path, judge.lm, FIELDS, lambda score: score["crc"] == texts.get(
        (score["problem"], score["sample"])), settings)
    left = sorted(samples.keys() - done.keys(), key=lambda pair: pair[::-1])
    mine = [samples[pair] for pair in left[parallel.rank()::parallel.world()]]

    def judged():
        began = time.perf_counter()
        for batch in batches(judge, mine, settings["prompt"], budget):
            found = judge_batch(judge, batch)
            seconds = time.perf_counter() - began
            for text, steps in zip(batch, found):
                pair = text.record["problem"], text.record["sample"]
                yield dict(zip(FIELDS, (*pair, aggregate(steps), len(text.ids), seconds,
                                        texts[pair])))
    next(judged(), None)  # the first batch to warm up
    append(path, judged(), spent, len(mine))
    print(f"{path}: {len(samples):,} scores{'' if left else ', finished'}")


# ---- the script
OTHERS = "config", "metrics", "model", "results", "samples", "tokenizer", "training"  # not ours


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("judge", nargs="?", metavar="MODEL", help="folder or Hugging Face repository; "
        "default: teacher in --out, of NAME-SIZE teacher-SIZE")
    add("--kind", choices=KINDS, default="likelihood", help="what it tells of a text")
    add("--aggregate", choices=AGGREGATE, default="last", help="of the steps' probabilities: "
        "the last, the smallest, or their product")
    add("--model", nargs="+", type=folder_name, metavar="NAME", help="of OUT; default: all")
    add("--to", type=folder_name, default="scores.jsonl", metavar="FILE", help="in each folder")
    add("--tokens", type=number(1), default=16384, help="read at a time, padding included")
    add("--out", default="out", help="folder of the models")
    add_device_options(add)
    args = parser.parse_args(argv)
    with parallel.processes(args.device):
        device, dtype = choose_device(args.device, args.dtype)
        require(args.to.endswith(".jsonl") and not args.to.startswith(OTHERS), f"--to {args.to}: "
                f"expected a .jsonl file, its name not to begin with {', '.join(OTHERS)}")
        out, judged = Path(args.out), {}  # of each judge: {model: text around its questions}
        there = sorted(path.parent.name for path in out.glob("*/samples.jsonl"))
        for name in args.model or there or ["*"]:  # all, before anything is written
            origin = read_settings(out / name / "samples.jsonl", "prompt")
            require(origin, f"no samples of {name} under {out}/: run python sample.py")
            read_settings(out / name / args.to, "kind")
            judge = args.judge or out / own_teacher(name)
            judged.setdefault(judge, {})[name] = origin["prompt"]
        for source, prompts in judged.items():
            judge = KINDS[args.kind](
                LM.from_pretrained(source, device, dtype).eval(), load_tokenizer(source))
            settings = dict(kind=args.kind, aggregate=args.aggregate, weights=fingerprint(source))
            for name, prompt in prompts.items():
                with parallel.exclusively(out / name) as folder:
                    score_samples(folder, args.to, judge, settings | dict(prompt=prompt),
                                  args.tokens)


if __name__ == "__main__":
    run(main, "--tokens")
