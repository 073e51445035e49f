"""A verifier (Cobbe et al. 2021): a copy of the teacher that learns to tell right completions from wrong ones.

    python distill.py --verifier          after python distill.py: the pure student completes training problems

Reads   out/teacher, and out/pure, whose completions it learns from
Writes  out/verifier-data.jsonl, the completions, laid out like samples.jsonl
        out/verifier/: a checkpoint for `sample.py --score`, and verifier.json: how well it does on problems held out
Training is distill.py's: the same loop, stages, checkpoints and processes. Of a wrong completion the verifier is told that
the answer is wrong, not where.

Contents: from start to end, graded completions, training, evaluation.
"""
import argparse
import dataclasses
import os

import torch
import torch.nn.functional as F

from data import choose_subset, load_task, load_tokenizer, prompt_template, read_json, write_json
from distill import (IGNORE, Pairs, Run, Stage, agreed, batch_maker, collate, data_settings, default_lr, home, length_of, prepare,
                     sample_problems, split_by_tokens, start_length, train)
from grade import extract_answer, is_correct
from memory import check_memory
from model import LM, Verifier, fingerprint, from_hf_config, read_config
from sample import barrier, rank, read_samples, world

HELD_OUT = 10  # every tenth problem is not trained on: it is for the evaluation


# ------------------------------------------------------------------------------------------------ from start to end
def make_verifier(teacher_folder, args):
    """OUT/verifier: complete the training problems, grade, train on nine in ten of them, evaluate on the others."""
    generator = generator_folder(teacher_folder, args)
    tokenizer, config = load_tokenizer(teacher_folder), from_hf_config(read_config(teacher_folder))
    args = argparse.Namespace(**vars(args) | dict(lr=args.verifier_lr or default_lr(config)))
    data = dict(data_settings(args), generator=fingerprint(generator), problems=args.verifier_problems,
                samples=args.verifier_samples, temperature=args.data_temperature, max_new_tokens=args.data_max_new_tokens)
    training = dict(teacher=fingerprint(teacher_folder), steps=args.verifier_steps, lr=args.lr, batch_tokens=args.batch_tokens,
                    start_length=args.start_length)
    run = Run(os.path.join(args.out, "verifier"), data | training)
    if not (run.is_finished() and os.path.exists(run.path("verifier.json"))):
        train_set, held_out = graded_completions(data, generator, tokenizer, args)
        if not run.is_finished():
            train_verifier(run, train_set, teacher_folder, tokenizer, config, args)
        if not rank():
            write_json(run.path("verifier.json"), evaluate(run.folder, teacher_folder, held_out, args))
        barrier()
    print(f"{run.folder}: finished\n{report(read_json(run.path('verifier.json')))}", flush=True)


def generator_folder(teacher_folder, args):
    """Whose completions the verifier learns from: the folder of the model OUT/<--verifier-from>, or the teacher's."""
    name = args.verifier_from or "pure"
    folder = os.path.join(args.out, name)
    if name != "teacher" and os.path.exists(os.path.join(folder, "config.json")):
        return folder
    if args.verifier_from not in (None, "teacher"):
        raise ValueError(f"no model {folder} to draw completions from: run distill.py without --verifier first, name another "
                         f"with --verifier-from, or take --verifier-from teacher")
    print(f"completions to learn from: the teacher's{'' if args.verifier_from else f', as there is no {folder}'}", flush=True)
    return teacher_folder


# ------------------------------------------------------------------------------------------------ graded completions
@dataclasses.dataclass
class Graded:
    """A completion of training problem number `problem` as its model read and wrote it, and whether its answer is right."""
    problem: int
    prompt: list
    answer: list
    right: bool


def graded_completions(settings, generator, tokenizer, args):
    """(those to train on, those held out), lists of Graded, drawn into verifier-data.jsonl if they are not there yet."""
    path = os.path.join(args.out, "verifier-data.jsonl")
    problems = choose_subset(load_task(args.task, "train"), args.limit, args.subset_seed)[:args.verifier_problems]
    sample_problems(path, settings, problems, args.verifier_samples, generator, tokenizer, args)
    records = sorted(read_samples(path), key=lambda r: (r["problem"], r["sample"]))
    template, stop = prompt_template(args.task, args.prompt_file), tokenizer.eos_ids[:1]
    right = agreed(None if rank() else [is_correct(extract_answer(r["completion"]), r["gold"]) for r in records])
    graded = [Graded(r["problem"], tokenizer.chat(template.replace("{question}", r["question"])),
                     tokenizer.encode(r["completion"]) + (stop if r["finish"] == "stop" else []), is_right)
              for r, is_right in zip(records, right)]
    parts = [[g for g in graded if (g.problem % HELD_OUT == 0) == held_out] for held_out in (False, True)]
    for part, held_out in zip(parts, (False, True)):
        count = sum(g.right for g in part)
        print(f"{path}: {len(part)} completions {'held out' if held_out else 'to train on'}, {count} of them right", flush=True)
        if not held_out and not 0 < count < len(part):
            raise ValueError(f"of {len(part)} completions in {path}, {count} are right, but a verifier learns from both right "
                             f"and wrong ones: try other --data options or another --verifier-from, in another --out")
    return parts


# ------------------------------------------------------------------------------------------------ training
def train_verifier(run, graded, teacher_folder, tokenizer, config, args):
    pairs = packed([(g.prompt, g.answer + [int(g.right)]) for g in graded])
    check_memory(config, None, pairs, {"verifier"}, args, world())
    stage = Stage("verifier", args.lr, verdict_loss, steps=args.verifier_steps)
    verifier = verifier_from(LM.from_pretrained(teacher_folder, home(args), torch.float32))
    train(run, prepare(verifier, None, args), [stage], batch_maker(pairs, config, start_length(args), args), args)
    run.finish(verifier, tokenizer)


def packed(pairs):
    """A list of (prompt ids, answer ids) as Pairs."""
    starts = torch.tensor([0] + [length_of(pair) for pair in pairs]).cumsum(0)
    bounds = torch.stack([starts[:-1], starts[:-1] + torch.tensor([len(prompt) for prompt, _ in pairs]), starts[1:]], 1)
    return Pairs(torch.tensor([i for prompt, answer in pairs for i in prompt + answer]), bounds)


def verifier_from(teacher):
    """A Verifier with all weights of the teacher but the head's. Its own head starts at zero: every text is 50:50."""
    verifier = Verifier(teacher.config).to(teacher.device)
    weights = {name: tensor for name, tensor in teacher.state_dict().items() if not name.startswith("lm_head")}
    verifier.load_state_dict(verifier.state_dict() | weights)
    return verifier


def verdict_loss(verifier, tokens, labels, valid):
    """Mean over answer tokens of -log p(verdict), as if each were the last: so the verifier learns when it can know.

    A row's verdict, 1 for right and 0 for wrong, follows its completion as one more token: it is the last label of the
    row, and where it would be read as a token, nothing counts. tokens, labels, valid (B, L) -> scalar.
    """
    counted = labels != IGNORE
    last = valid.sum(1, keepdim=True) - 2  # (B, 1): the completion's last token
    verdict = labels.gather(1, last).float().expand(labels.shape)  # (B, L)
    return F.binary_cross_entropy_with_logits(verifier(tokens).float()[counted], verdict[counted])


# ------------------------------------------------------------------------------------------------ evaluation
@torch.inference_mode()
def evaluate(folder, teacher_folder, graded, args):
    """How well the verifier in `folder` tells right from wrong among these completions, as a dict for verifier.json; beside
    it the score that needs no training, the completion's log-likelihood under the teacher."""
    verifier = Verifier.from_pretrained(folder, args.device, args.dtype).eval()
    teacher = LM.from_pretrained(teacher_folder, args.device, args.dtype).eval()
    graded, odds, likelihood = sorted(graded, key=lambda g: len(g.prompt) + len(g.answer)), [], []
    for group in split_by_tokens([(g.prompt, g.answer) for g in graded], args.batch_tokens):
        tokens, labels, valid = (t.to(args.device) for t in collate(group))
        odds += verifier(tokens).gather(1, valid.sum(1, keepdim=True) - 1)[:, 0].tolist()  # at the last token
        likelihood += cross_entropies(teacher(tokens), labels).sum(1).neg().tolist()
    right, problem = torch.tensor([g.right for g in graded]), torch.tensor([g.problem for g in graded])
    odds, likelihood = torch.tensor(odds), torch.tensor(likelihood)
    return dict(completions=len(graded), right=right.float().mean().item(),
                brier=(odds.sigmoid() - right.float()).square().mean().item(),
                verifier=ranking(odds, right, problem), likelihood=ranking(likelihood, right, problem))


def cross_entropies(logits, labels):
    """-log p(label), 0 where a position does not count. logits (B, L, V), labels (B, L) -> (B, L)."""
    return F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")


def ranking(scores, right, problem):
    """AUC over all completions, and over the pairs of the same problem, which are all that a vote can use. All (n,)."""
    wins, pairs = ranked_right(scores, right)
    each = [ranked_right(scores[problem == p], right[problem == p]) for p in problem.unique()]
    wins_within, pairs_within = map(sum, zip(*each))
    return dict(problems=len(each), pairs=pairs, auc=wins / pairs if pairs else None, pairs_within_problems=pairs_within,
                auc_within_problems=wins_within / pairs_within if pairs_within else None)


def ranked_right(scores, right):
    """(In how many pairs of a right and a wrong one has the right one the higher score, number of pairs): AUC is their
    ratio. Equal scores count half. scores (n,), right (n,) bool."""
    good, bad = scores[right], scores[~right].sort().values
    below, not_above = torch.searchsorted(bad, good), torch.searchsorted(bad, good, right=True)
    return (below + not_above).sum().item() / 2, len(good) * len(bad)


def report(found):
    """What `evaluate` found, for the reader."""
    def text(number):
        return "-" if number is None else f"{number:.3f}"
    verifier, likelihood = found["verifier"], found["likelihood"]
    return (f"{found['completions']} held-out completions of {verifier['problems']} problems, {found['right']:.1%} right; Brier "
            f"score {found['brier']:.3f}\n"
            f"AUC of the verifier: {text(verifier['auc'])}, within problems {text(verifier['auc_within_problems'])} "
            f"({verifier['pairs_within_problems']:,} pairs); of the log-likelihood under the teacher: {text(likelihood['auc'])}, "
            f"within problems {text(likelihood['auc_within_problems'])}")
