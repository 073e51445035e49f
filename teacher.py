"""Make a teacher: train a Transformer from scratch, or fine-tune a Llama, on worked solutions.

    python teacher.py                              the built-in task's, anew, in out/teacher
    python teacher.py --size large                 one that a GPU feels; students likewise
    python teacher.py --from folder --task gsm8k   a copy of a Llama, fine-tuned on a task

Writes  out/teacher/, and goes on after a stop, as distill.py does
"""
import os

from common import Parser, number, require, run

import torch

import hub
import parallel
from data import load_tokenizer
from distill import (START, SUFFIX, Hardware, Stage, add_shared_options, load_pairs, sft,
                     task_for, train_in)
from model import LM, Config

SIZES = dict(base={}, small=dict(n_layers=2),  # as Config's defaults, but for
             large=dict(d_model=512, n_layers=8, n_heads=16, d_ff=1536))
SCRATCH, FINE_TUNING = (3500, 4e-3), (500, 2e-5)  # steps, peak learning rate


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.group("what to make")
    add("--from", dest="source", metavar="MODEL", help="a Llama to fine-tune, folder or "
        "Hugging Face repository; default: from scratch, with the built-in task's tokenizer")
    add("--size", choices=SIZES, default="base", help="small: half the layers; large: "
        "27 million parameters, numbers of six digits, for a GPU; in OUT/teacher-SIZE")
    add = parser.group("how to learn")
    add("--steps", type=number(1), help=f"default: {SCRATCH[0]}, with --from {FINE_TUNING[0]}")
    add("--lr", type=number(1e-9, 100, float), help=f"peak learning rate; default: {SCRATCH[1]}, "
        f"an eighth for large, with --from {FINE_TUNING[1]}")
    add("--batch-tokens", type=number(1), default=6144, help="tokens a step, padding included")
    add_shared_options(parser)
    args = parser.parse_args(argv)
    source, folder = args.source, os.path.join(args.out, "teacher" + SUFFIX[args.size])
    require(not source or os.path.realpath(source) != os.path.realpath(folder),
            f"--from {source} is where the copy would go: choose another --out")
    (steps, lr), task = FINE_TUNING if source else SCRATCH, task_for(args.size, args.task)
    if args.size == "large" and not source:
        lr /= 8  # it is 8 times as wide
    budget = dict(steps=args.steps or steps, lr=args.lr or lr, batch_tokens=args.batch_tokens,
                  seed=args.seed)
    with parallel.processes(args.device):
        hardware = Hardware(*(getattr(args, name) for name in Hardware.__annotations__))
        tokenizer = load_tokenizer(source or "arithmetic")
        torch.manual_seed(args.seed)
        if source:  # can solve the task already: no curriculum
            stage, start, origin = "sft", 1.0, dict(teacher=hub.fingerprint(source))
            lm = LM.from_pretrained(source, dtype=torch.float32)
        else:
            stage, start, origin = "pretrain", START.get(task, 1.0), dict(size=args.size)
            lm = LM(Config(vocab_size=tokenizer.vocab_size, eos_ids=tokenizer.eos_ids,
                           **SIZES[args.size]))
        pairs, data = load_pairs(tokenizer, task, args.limit, args.subset_seed, args.prompt_file)
        train_in(folder, data | origin | budget, pairs,
                 [Stage(stage, budget["steps"], budget["lr"], sft)], lm, None, hardware, start)


if __name__ == "__main__":
    run(main, "--batch-tokens, or raise --accumulate")
