"""Make a teacher: train a Transformer from scratch, or fine-tune a Llama, on worked solutions.

    python teacher.py                                  the built-in task's, anew, in out/teacher
    python teacher.py --from SmolLM2 --task gsm8k      a copy of a Llama, fine-tuned on a task

Reads   a task, and with --from a checkpoint
Writes  out/teacher/, as distill.py does; it goes on after a stop as distill.py does
"""
import os

import torch

import hub
import parallel
from common import Parser, choose_device, number, run
from data import load_tokenizer, prompt_template
from distill import (Data, Hardware, Progress, Stage, add_data_options, add_hardware_options,
                     home, sft, start_length, train_and_save)
from model import LM, Config

SIZES = dict(base=dict(n_layers=4), small=dict(n_layers=2))  # else as Config's defaults
SCRATCH, FINE_TUNING = dict(steps=3500, lr=4e-3), dict(steps=500, lr=2e-5)


def make_teacher(source, size, data, budget, seed, hardware, out):
    """Train a new model, or a copy of the one in `source`, with cross-entropy, and save it."""
    tokenizer = load_tokenizer(source or "arithmetic")
    if source:
        stage, start = "sft", 1.0  # who can solve the task already needs no curriculum
        config = Config(**hub.read_config(hub.checkpoint_folder(source)))
        origin = dict(teacher=hub.fingerprint(source))
    else:
        stage, start = "pretrain", start_length(data.task)
        config = Config(vocab_size=tokenizer.vocab_size, eos_ids=tokenizer.eos_ids, **SIZES[size])
        origin = dict(size=size)
    folder = os.path.join(out, "teacher" + "-small" * (size == "small"))
    if source and os.path.realpath(source) == os.path.realpath(folder):
        raise ValueError(f"--from {source} is where the copy would go: choose another --out")
    with parallel.exclusively(folder):
        progress = Progress(folder, data.settings() | origin | budget | dict(seed=seed))
        if progress.is_finished:
            print(f"{folder}: finished", flush=True)
            return
        pairs = data.pairs(tokenizer)
        torch.manual_seed(seed)
        where = home(hardware)
        lm = LM.from_pretrained(source, where, torch.float32) if source else LM(config).to(where)
        stages = [Stage(stage, budget["steps"], budget["lr"], sft)]
        train_and_save(progress, lm, None, stages, tokenizer, pairs, budget["batch_tokens"], start,
                       seed, hardware)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument_group("what to make").add_argument
    add("--from", dest="source", metavar="MODEL", help="folder or Hugging Face repository of a "
        "Llama to fine-tune; default: from scratch, with the built-in task's tokenizer")
    add("--size", choices=SIZES, default="base", help="of a model from scratch; small goes to "
        "OUT/teacher-small")
    add = parser.add_argument_group("how to learn").add_argument
    add("--steps", type=number(1), help=f"default: {SCRATCH['steps']}, with --from "
        f"{FINE_TUNING['steps']}")
    add("--lr", type=number(1e-9, 100, float), help=f"peak learning rate; default: "
        f"{SCRATCH['lr']}, with --from {FINE_TUNING['lr']}")
    add("--batch-tokens", type=number(1), default=6144, help="tokens a step, padding included")
    add("--seed", type=number(0, 2 ** 31), default=0, help="of initialisation and the data's order")
    add_data_options(parser)
    add_hardware_options(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    default = FINE_TUNING if args.source else SCRATCH
    with parallel.processes(args.device):
        hardware = Hardware(*choose_device(args.device, args.dtype), args.accumulate,
                            args.checkpoint_activations, args.compile, args.log_every,
                            args.save_every)
        template = prompt_template(args.task, args.prompt_file)
        budget = dict(steps=args.steps or default["steps"], lr=args.lr or default["lr"],
                      batch_tokens=args.batch_tokens)
        make_teacher(args.source, args.size,
                     Data(args.task, args.limit, args.subset_seed, template), budget, args.seed,
                     hardware, args.out)


if __name__ == "__main__":
    run(main, "--batch-tokens, or raise --accumulate")
