"""Turn a Transformer into Mamba students: MOHAWK for the pure one, MambaInLlama for the hybrid one.

    python distill.py                                     the tiny teacher, then both students, into out/
    python distill.py --sizes small,base                  the same twice, with a smaller teacher too
    python distill.py --student hybrid --attention-layers 0,2 --kl forward
    python distill.py --teacher folder --task gsm8k --sft --student pure        fine-tune a copy of the teacher first
    python distill.py --verifier                          a verifier, which tells right completions of students from wrong ones
    torchrun --nproc_per_node=8 distill.py ...            the same training on eight GPUs (or CPU processes)

Reads   a teacher's checkpoint (the repository ships the built-in task's; --pretrain trains it anew), a task
Writes  out/<name>/: config.json, model.safetensors, tokenizer; metrics.jsonl (the training curves); training.json
A killed run goes on from its last checkpoint when the same command is run again, and ends where it would have ended,
on whatever number of processes.

Contents: losses, batches, schedule and optimiser, processes, the training loop with its checkpoints, the teacher,
training data, students and their stages, the script. Beside it: verifier.py (--verifier) and ablate.py (--ablate).
"""
import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import pickle
import random
import shutil
import sys
import time

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import (Parser, at_least, choose_subset, load_task, load_tokenizer, prompt_template, read_json,
                  refuse_other_settings, run, token_cache, write_json)
from grade import extract_answer, is_correct
from memory import check_memory
from model import (LM, Attention, Config, Mamba, checkpoint_folder, choose_device, fingerprint, from_hf_config,
                   hub_folder, read_config, student_from)
from sample import barrier, generate, processes, rank, read_samples, record_of, world

IGNORE = -100  # label of a position whose prediction does not count


# ------------------------------------------------------------------------------------------------ losses
# labels (B, L) are aligned with the logits: labels[t] is the token that position t predicts, i.e. tokens[t + 1], where
# that token belongs to the answer, and IGNORE elsewhere. The first answer token and the stop token both count. (The
# MambaInLlama / M1 code masks by the label at t instead of t + 1, and so never distils the first answer token.)
def cross_entropy_loss(logits, labels):
    """Mean over answer tokens of -log p(label). logits (B, L, V), labels (B, L) -> scalar."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def kl_loss(student_logits, teacher_logits, labels, direction="reverse"):
    """Mean over answer tokens of a KL divergence between next-token distributions, in float32, temperature 1.

    "reverse" is KL(student || teacher) = sum_v p_S (log p_S - log p_T), as M1 uses it: the student is punished for
    what the teacher would not say. "forward" is KL(teacher || student): punished for what it does not cover.
    The teacher gets no gradient. logits (B, L, V), labels (B, L) -> scalar.
    """
    counted = labels != IGNORE
    student = F.log_softmax(student_logits[counted].float(), dim=-1)  # (tokens, V)
    teacher = F.log_softmax(teacher_logits[counted].detach().float(), dim=-1)
    if direction == "reverse":
        student, teacher = teacher, student  # F.kl_div(input, target) is KL(target || input)
    return F.kl_div(student, teacher, log_target=True, reduction="sum") / counted.sum()


def matrix_loss(student, teacher, tokens, valid):
    """MOHAWK's first stage: sum over layers of the mean over batch and heads of || T - attention ||_F.

    Every student layer gets the teacher's hidden state as input; only replaced layers count. Rows of padding are left
    out. In float32, also under autocast, as in the reference code. tokens (B, L), valid (B, L) bool -> scalar.
    """
    loss = 0.0
    with torch.autocast(tokens.device.type, enabled=False):
        rope = teacher.rope(torch.arange(tokens.shape[1], device=tokens.device)[None])
        with torch.no_grad():
            inputs = teacher.hidden_states(tokens)
        for block, source, x in zip(student.layers, teacher.layers, inputs):
            if isinstance(block.mix(), Attention):
                continue
            with torch.no_grad():
                target = mixing(source, x, rope)  # (B, H, L, L)
            difference = (mixing(block, x, rope) - target) * valid[:, None, :, None]
            loss = loss + difference.square().sum((2, 3)).sqrt().mean()
    return loss


def mixing(block, x, rope):
    """The matrix (B, H, L, L) by which a block's mixer combines tokens, given the block's input x (B, L, d_model)."""
    sharded = isinstance(block, FSDPModule)
    if sharded:
        block.unshard()  # FSDP does so by itself only around a block's own call
    matrix = block.mix().matrix(block.input_layernorm(x), rope)
    if sharded and not matrix.requires_grad:
        block.reshard()  # otherwise FSDP does after the backward pass
    return matrix


def hidden_loss(student, teacher, tokens, valid):
    """MOHAWK's second stage: sum over layers of the mean over tokens of || block(h) - teacher's block(h) ||_2.

    h is the teacher's residual stream before the layer, so layers learn in parallel and errors do not add up.
    """
    with torch.no_grad():
        states = teacher.hidden_states(tokens)
    rope = teacher.rope(torch.arange(tokens.shape[1], device=tokens.device)[None])
    loss = 0.0
    for block, x, target in zip(student.layers, states, states[1:]):
        if isinstance(block.mix(), Attention):
            continue
        distance = (block(x, rope).float() - target.float()).norm(dim=-1)  # (B, L)
        loss = loss + (distance * valid).sum() / valid.sum()
    return loss


# ------------------------------------------------------------------------------------------------ batches
def batches(pairs, tokens_per_batch, max_length, seed, share=lambda step: 1.0):
    """Endless batches of (prompt, answer) pairs: (tokens (B, L), labels (B, L), valid (B, L)), always the same for a seed.

    Sequences of similar length go together, so that little is padded; rows are padded on the right, where a causal
    model's real tokens cannot see it. B x L is at most tokens_per_batch (a longer sequence comes alone).
    share(step): keep only sequences up to this share of the longest, see `curriculum`.
    """
    rng, step = random.Random(seed), 0
    while True:
        before = step
        order = rng.sample(range(len(pairs)), len(pairs))
        for pool in (order[i:i + 512] for i in range(0, len(order), 512)):
            pool = sorted((p for p in map(pairs.__getitem__, pool) if length_of(p) <= max_length), key=length_of)
            kept = [p for p in pool if length_of(p) <= share(step) * length_of(pool[-1])]
            groups = list(split_by_tokens(kept or pool, tokens_per_batch))
            rng.shuffle(groups)
            for group in groups:
                yield collate(group)
                step += 1
        if step == before:
            raise ValueError(f"every worked solution is longer than the model's max_length = {max_length} tokens")


class Pairs:
    """(prompt ids, answer ids) of every worked solution, as a sequence read from the token cache on disk."""

    def __init__(self, tokens, bounds):
        self.tokens, self.bounds = tokens, bounds  # all ids in a row; (n, 3): start, start of the answer, end

    def __len__(self):
        return len(self.bounds)

    def __getitem__(self, index):
        start, answer, end = self.bounds[index]
        return self.tokens[start:answer].tolist(), self.tokens[answer:end].tolist()


def curriculum(steps, start=0.15, until=0.5):
    """Sequence length as a share of the longest, step by step: grows from `start` to 1 over the first half of a stage.

    Short chains have their questions near: what is to be looked up is learnt there, then stretched. A pure student
    trained on full length from the start does not learn to look up at all within the built-in experiment's budget.
    """
    return lambda step: min(1.0, start + (1 - start) * step / max(1, until * steps))


def deal(batch, over, accumulate):
    """This process's part of a batch, in up to `accumulate` pieces: (tokens, labels, valid, weight) each.

    Rows are dealt out like cards, so that all pieces have short rows and long ones, and cut to their longest row.
    weight is a piece's share of what the loss is a mean over: the weighted sum over all pieces of all processes is the
    loss of the whole batch, and so is its gradient. A process left without a row in the last round computes row 0 with
    weight 0, because FSDP's exchanges need everyone.
    """
    rows = len(batch[0])
    pieces = min(accumulate, -(-rows // world())) * world()
    for piece in range(rank(), pieces, world()):
        tokens, labels, valid = (t[piece::pieces] if piece < rows else t[:1] for t in batch)
        weight = count(over, labels, valid) / count(over, *batch[1:]) if piece < rows else 0.0
        length = int(valid.sum(1).max())
        yield tokens[:, :length], labels[:, :length], valid[:, :length], weight


def count(over, labels, valid):
    """How many rows, tokens or answers (tokens with a label) a batch has."""
    return int(dict(rows=torch.tensor(len(valid)), tokens=valid.sum(), answers=(labels != IGNORE).sum())[over])


def length_of(pair):
    return len(pair[0]) + len(pair[1])


def split_by_tokens(pairs, tokens_per_batch):
    """Cut (prompt, answer) pairs, shortest first, into batches of at most tokens_per_batch tokens with padding."""
    group = []
    for prompt, answer in pairs:
        if group and (len(group) + 1) * length_of((prompt, answer)) > tokens_per_batch:
            yield group
            group = []
        group.append((prompt, answer))
    if group:
        yield group


def collate(pairs):
    """Tensors of (prompt, answer) pairs of token ids; see `labels` above for their alignment."""
    length = max(map(length_of, pairs))
    tokens, labels = torch.zeros(len(pairs), length, dtype=torch.long), torch.full((len(pairs), length), IGNORE)
    valid = torch.zeros(len(pairs), length, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        tokens[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) - 1:end - 1] = torch.tensor(answer)
        valid[i, :end] = True
    return tokens, labels, valid


# ------------------------------------------------------------------------------------------------ optimisation
def learning_rate(step, steps, peak, warmup=0.05, decay=0.4):
    """Warm-up, stable, decay: linear from 0 over the first 5%, constant, linear to 0 over the last 40% of the steps."""
    return peak * min(1.0, (step + 1) / max(1, warmup * steps), (steps - step) / max(1, decay * steps))


def make_optimizer(lm, lr):
    """AdamW without weight decay on anything that is not a matrix (norms, biases, D) nor on A_log: decay would pull
    gains and memory lengths towards an arbitrary zero."""
    decayed, kept = [], []
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            (kept if parameter.dim() < 2 or name.endswith("A_log") else decayed).append(parameter)
    return torch.optim.AdamW([dict(params=decayed, weight_decay=0.1), dict(params=kept, weight_decay=0.0)],
                             lr=lr, betas=(0.9, 0.95))


def train_only_mixers(lm, only):
    """Freeze everything but the replaced mixers, or nothing."""
    for parameter in lm.parameters():
        parameter.requires_grad_(not only)
    for block in lm.layers:
        if only and not isinstance(block.mix(), Attention):
            block.mix().requires_grad_(True)


# ------------------------------------------------------------------------------------------------ processes
# Under torchrun (see sample.processes), N processes train one model with PyTorch's FSDP2: each keeps 1/N of every weight,
# gradient and moment, and computes its part of every batch; a block's weights are gathered, in float32, around the block's
# call. Checkpoints hold whole tensors. Outside torchrun there is one process, and all this does nothing.
@contextlib.contextmanager
def first_process_first():
    """What is made on disk here is made by the first process, and found by the others."""
    if rank():
        barrier()
    yield
    if not rank():
        barrier()


def agreed(value):
    """The first process's value, in all of them."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def total(value):
    """Sum over all processes of a scalar tensor."""
    if world() > 1:
        dist.all_reduce(value)
    return value


def whole(tree):
    """A nested state with its sharded tensors put together: in the first process, on the CPU; None in the others."""
    def gather(tensor):
        full = tensor.full_tensor()
        return None if rank() else full.cpu()
    return tree_map_only(DTensor, gather, tree)


def part_of(tensor, like):
    """A whole tensor, cut as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class Objective(nn.Module):
    """A loss of a student and its teacher as one module: what FSDP wraps, and gathers the embeddings around."""

    def __init__(self, lm, teacher=None):
        super().__init__()
        self.lm, self.teacher = lm, teacher

    def forward(self, loss, tokens, labels, valid):
        return loss(self.lm, tokens, labels, valid)


def prepare(lm, teacher, args):
    """The Objective of a student (and its teacher), with compilation, activation checkpointing and sharding as asked for.

    The first two replace each block's `forward` in place, so that names in checkpoints stay as they are.
    """
    objective = Objective(lm, teacher)
    blocks = [*lm.layers, *(teacher.layers if teacher else [])]
    for block in blocks if args.compile else ():
        block.forward = torch.compile(block.forward)
    for block in lm.layers if args.checkpoint_activations else ():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if world() > 1:
        mesh = init_device_mesh(args.device.type, (world(),))
        for module in (*blocks, objective):
            fully_shard(module, mesh=mesh)  # moves its weights to the mesh's device
    return objective


def home(args):
    """Where models are made: many processes make theirs on the CPU and move only their part."""
    return args.device if world() == 1 else "cpu"


# ------------------------------------------------------------------------------------------------ training
@dataclasses.dataclass
class Stage:
    """A stretch of training with one loss: loss(lm, tokens, labels, valid) -> scalar, a mean over what `count` counts."""
    name: str
    lr: float
    loss: object
    over: str = "answers"
    mixers_only: bool = False
    steps: int = 0


class Run:
    """One model's training: its folder, where it stands, and how it is saved and found again.

    training.json holds the settings; training.pt, while training goes on, everything needed to go on: weights,
    optimiser, RNG, stage and step (which is also the position in the data). Both are replaced whole, never edited.
    """

    def __init__(self, folder, settings):
        self.folder, self.settings = folder, settings
        self.stage, self.step, self.tokens, self.losses = 0, 0, 0, []  # losses since the last log line
        if os.path.exists(self.path("training.json")):
            refuse_other_settings(folder, read_json(self.path("training.json")), settings)
        elif os.path.exists(self.path("config.json")):
            raise ValueError(f"{folder} holds a model that this command did not make: choose another --out, or delete it")

    def path(self, name):
        return os.path.join(self.folder, name)

    def is_finished(self):
        return os.path.exists(self.path("config.json")) and not os.path.exists(self.path("training.pt"))

    def save(self, lm, optimizer):
        position = dict(stage=self.stage, step=self.step, tokens=self.tokens, losses=[float(loss) for loss in self.losses])
        state = whole(dict(model=lm.state_dict(), optimizer=optimizer.state_dict()))
        if not rank():
            torch.save(dict(**state, rng=torch.get_rng_state(), position=position), self.path("training.pt.tmp"))
            os.replace(self.path("training.pt.tmp"), self.path("training.pt"))

    def load(self, lm):
        """Restore weights and position; returns the optimiser's state, or None at the very beginning."""
        path = self.path("training.pt")
        if not os.path.exists(path):
            self.begin()
            return None
        try:
            saved = torch.load(path, weights_only=True, map_location=lm.device if world() == 1 else "cpu")
        except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__}): delete it to start over")
        mine = lm.state_dict()
        lm.load_state_dict({name: part_of(tensor, mine[name]) for name, tensor in saved["model"].items()})
        torch.set_rng_state(saved["rng"].cpu())
        self.__dict__.update(saved["position"])
        lines = [line for line in open(self.path("metrics.jsonl")) if line.endswith("\n")]
        barrier()  # all have read it
        if not rank():
            write_lines(self.path("metrics.jsonl"), [line for line in lines if json.loads(line)["tokens"] <= self.tokens])
        print(f"{self.folder}: going on at stage {self.stage + 1}, step {self.step}", flush=True)
        return saved["optimizer"]

    def begin(self):
        barrier()  # all have seen that there is nothing to go on from
        if not rank():
            os.makedirs(self.folder, exist_ok=True)
            write_json(self.path("training.json"), self.settings)
            write_lines(self.path("metrics.jsonl"), [])

    def finish(self, lm, tokenizer):
        state = whole(lm.state_dict())
        if not rank():
            with torch.device("meta"):
                lm = type(lm)(lm.config)
            lm.load_state_dict(state, assign=True)
            tokenizer.save(self.folder)
            lm.save_pretrained(self.folder)
            if os.path.exists(self.path("training.pt")):
                os.remove(self.path("training.pt"))
        barrier()  # the others may read it next


def write_lines(path, lines):
    with open(path + ".tmp", "w") as f:
        f.writelines(lines)
    os.replace(path + ".tmp", path)


def load_optimizer(optimizer, state):
    """optimizer.load_state_dict for a checkpoint's whole tensors."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {index: {name: part_of(value, parameters[index]) if value.dim() else value for name, value in of_one.items()}
               for index, of_one in state["state"].items()}
    optimizer.load_state_dict(state | dict(state=moments))


def train(run, objective, stages, make_batches, args):
    """Run the stages that are left of a Run, from where it stands. make_batches(index, steps) -> a stage's batches."""
    lm = objective.lm
    optimizer_state = run.load(lm)
    for index in range(run.stage, len(stages)):
        stage = stages[index]
        train_only_mixers(lm, stage.mixers_only)
        optimizer = make_optimizer(lm, stage.lr)
        if optimizer_state:
            load_optimizer(optimizer, optimizer_state)
            optimizer_state = None
        data = itertools.islice(make_batches(index, stage.steps), run.step, None)
        train_stage(run, objective, stage, optimizer, data, args)
        run.stage, run.step = index + 1, 0
    train_only_mixers(lm, False)


def train_stage(run, objective, stage, optimizer, data, args):
    """The training loop: one step per batch, one log line per interval, a checkpoint now and then."""
    clock, began, tokens_before = time.perf_counter, time.perf_counter(), run.tokens
    for batch in itertools.islice(data, stage.steps - run.step):
        run.losses.append(batch_gradient(objective, stage, batch, args))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.step, stage.steps, stage.lr)
        norm = torch.nn.utils.clip_grad_norm_(objective.lm.parameters(), 1.0)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.step()
        optimizer.zero_grad()
        run.step, run.tokens = run.step + 1, run.tokens + int(batch[2].sum())
        if run.step % args.log_every == 0 or run.step == stage.steps:
            seconds = clock() - began
            log(run, stage, sum(map(float, run.losses)) / len(run.losses), norm.item(), optimizer.param_groups[0]["lr"],
                (run.tokens - tokens_before) / seconds, seconds)
            run.losses = []
        if run.step % args.save_every == 0 and run.step < stage.steps:
            run.save(objective.lm, optimizer)


def batch_gradient(objective, stage, batch, args):
    """Add a batch's gradient to the parameters, piece by piece; returns the batch's loss."""
    loss = 0.0
    for *piece, weight in deal(batch, stage.over, args.accumulate):
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == torch.bfloat16, cache_enabled=False):
            piece_loss = weight * objective(stage.loss, *(t.to(args.device) for t in piece))
        (world() * piece_loss).backward()  # FSDP takes the mean over processes, this makes it a sum
        loss = loss + piece_loss.detach()
    return total(loss)


def log(run, stage, loss, norm, lr, speed, seconds):
    """One line for the reader, the same fields for plot.py. `speed` in tokens/s since the stage began or resumed."""
    if not torch.isfinite(torch.tensor(loss)):
        raise ValueError(f"the loss of stage {stage.name} is {loss} at step {run.step}: lower --lr or try another --seed")
    left = seconds / run.step * (stage.steps - run.step)
    print(f"{os.path.basename(run.folder)} {stage.name} {run.step}/{stage.steps} {run.step / stage.steps:4.0%} | "
          f"loss {loss:.4f} | grad {norm:.2f} | lr {lr:.1e} | {speed:,.0f} tokens/s | {seconds:.0f} s | eta {left:.0f} s",
          flush=True)
    record = dict(stage=stage.name, step=run.step, steps=stage.steps, tokens=run.tokens, loss=loss, grad_norm=norm, lr=lr,
                  tokens_per_second=round(speed), seconds=round(seconds, 2))
    if not rank():
        with open(run.path("metrics.jsonl"), "a") as f:
            f.write(json.dumps(record) + "\n")


# ------------------------------------------------------------------------------------------------ the teacher
ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")
SIZES = dict(small=dict(n_layers=2), base={})  # how the teachers of the built-in experiment differ from the options


def named(name, size):
    """A model's folder: pure for the base size, pure-small for the small one."""
    return name if size == "base" else f"{name}-{size}"


def get_teacher(size, args):
    """The folder of the teacher: --teacher or, with --sft, its fine-tuned copy out/teacher; without --teacher out/teacher
    (or its other size), which is filled from assets/ or by pre-training."""
    folder, asset = (os.path.join(where, named("teacher", size)) for where in (args.out, ASSETS))
    if args.teacher:
        given = checkpoint_folder(args.teacher)
        hub_folder(args.teacher, ("*tokenizer*", "chat_template.jinja"))  # from the Hub into the same folder
        if args.sft:
            fine_tune(given, folder, args)
        return folder if args.sft else given
    if args.sft:
        raise ValueError("--sft fine-tunes a copy of a given teacher: name one with --teacher")
    if args.task == "arithmetic" and not args.pretrain:
        if os.path.exists(os.path.join(folder, "training.pt")):
            raise ValueError(f"{folder} holds an unfinished pre-training: go on with --pretrain, or delete that folder")
        with first_process_first():
            if not os.path.exists(os.path.join(folder, "config.json")):
                print(f"teacher: the one that ships in assets/{os.path.basename(asset)}, copied to {folder} (--pretrain trains a "
                      f"new one)")
                shutil.copytree(asset, folder + ".tmp", dirs_exist_ok=True)
                os.replace(folder + ".tmp", folder)
        return folder
    pretrain(folder, size, args)
    return folder


def pretrain(folder, size, args):
    """Train a Transformer from scratch on the task's worked solutions with cross-entropy."""
    tokenizer = load_tokenizer("arithmetic")
    shape = dict(d_model=args.d_model, n_layers=args.n_layers, n_heads=args.n_heads, d_ff=args.d_ff) | SIZES[size]
    config = Config(vocab_size=tokenizer.vocab_size, eos_ids=tokenizer.eos_ids, **shape)
    settings = dict(data_settings(args), config=dataclasses.asdict(config), steps=args.pretrain_steps, lr=args.pretrain_lr,
                    batch_tokens=args.batch_tokens, start_length=args.start_length)
    train_teacher(Run(folder, settings), config, lambda: LM(config).to(home(args)), tokenizer,
                  Stage("pretrain", args.pretrain_lr, answers_loss, steps=args.pretrain_steps), args)


def fine_tune(given, folder, args):
    """Train a copy of a teacher on the task's worked solutions with cross-entropy, all lengths from the start."""
    if os.path.realpath(given) == os.path.realpath(folder):
        raise ValueError(f"--sft writes its copy of the teacher to {folder}, where --teacher is: choose another --out")
    settings = dict(data_settings(args), teacher=fingerprint(given), steps=args.teacher_sft_steps, lr=args.teacher_lr,
                    batch_tokens=args.batch_tokens)
    train_teacher(Run(folder, settings), from_hf_config(read_config(given)),
                  lambda: LM.from_pretrained(given, home(args), torch.float32), load_tokenizer(given),
                  Stage("sft", args.teacher_lr, answers_loss, steps=args.teacher_sft_steps), args)


def train_teacher(run, config, make, tokenizer, stage, args):
    """Train what make() gives through one stage on the task's own solutions."""
    if run.is_finished():
        print(f"{run.folder}: finished")
        return
    pairs = tokenized(worked_solutions(args), tokenizer, args)
    check_memory(config, None, pairs, {stage.name}, args, world())
    torch.manual_seed(args.seed)
    lm = make()
    start = 1.0 if stage.name == "sft" else start_length(args)  # what can solve the task already needs no curriculum
    train(run, prepare(lm, None, args), [stage], batch_maker(pairs, config, start, args), args)
    run.finish(lm, tokenizer)


def answers_loss(lm, tokens, labels, valid):
    return cross_entropy_loss(lm(tokens), labels)


# ------------------------------------------------------------------------------------------------ training data
def worked_solutions(args):
    """The task's training problems that have a solution, or --limit of them."""
    problems = [problem for problem in load_task(args.task, "train") if problem.solution]
    if not problems:
        raise ValueError(f"{args.task} has no worked solutions to train on: its answers need a solution (GSM8K's layout, "
                         f"solution #### answer) or a column `solution`")
    return choose_subset(problems, args.limit, args.subset_seed)


def data_settings(args):
    """What the training problems depend on; None where it is the default."""
    return dict(task=args.task, seed=args.seed, limit=args.limit, subset_seed=args.subset_seed,
                prompt=prompt_template(args.task, args.prompt_file) if args.prompt_file else None)


def tokenized(problems, tokenizer, args):
    """Pairs of token ids of the problems' solutions, from the cache if another run has made them."""
    os.makedirs(args.cache, exist_ok=True)
    with first_process_first():
        return Pairs(*token_cache(problems, tokenizer, prompt_template(args.task, args.prompt_file), args.cache))


def start_length(args):
    """The share of the longest sequence at which a stage begins, see `curriculum`."""
    return (0.15 if args.task == "arithmetic" else 1.0) if args.start_length is None else args.start_length


def batch_maker(pairs, config, start, args):
    """make_batches(stage index, steps) for `train`: each stage sees the data in an order of its own, short ones first."""
    return lambda index, steps: batches(pairs, args.batch_tokens, config.max_length, f"{args.seed} {index}",
                                        curriculum(steps, start))


def teacher_solutions(problems, teacher_folder, tokenizer, args):
    """The problems with the teacher's completions in place of the solutions: distillation on the level of sequences
    (Kim & Rush 2016). Left out are completions that did not stop or box an answer and, with --data-filter, wrong ones."""
    sample_teacher(problems, teacher_folder, tokenizer, args)
    records = sorted(read_samples(data_path(args)), key=lambda r: (r["problem"], r["sample"]))
    records = [r for r in records if r["sample"] < args.data_samples]
    records = [r for r in records if r["finish"] == "stop" and "\\boxed" in r["completion"]]
    if args.data_filter:  # graded once: a time limit may be met in one process and not in another
        right = agreed(None if rank() else [is_correct(extract_answer(r["completion"]) or "", r["gold"]) for r in records])
        records = list(itertools.compress(records, right))
    print(f"{data_path(args)}: {len(records)} completions of {len(problems)} problems to train on"
          f"{', all with the right answer' if args.data_filter else ''}", flush=True)
    if not records:
        found = "is right: leave out --data-filter" if args.data_filter else "ends in \\boxed{}: raise --data-max-new-tokens"
        raise ValueError(f"no completion in {data_path(args)} {found}, raise --data-samples or train the teacher (--sft)")
    return [dataclasses.replace(problems[r["problem"]], solution=r["completion"]) for r in records]


def data_path(args):
    return os.path.join(args.out, "teacher-data.jsonl")


def sample_teacher(problems, teacher_folder, tokenizer, args):
    """Complete the training problems into teacher-data.jsonl."""
    settings = dict(data_settings(args), teacher=fingerprint(teacher_folder), temperature=args.data_temperature,
                    max_new_tokens=args.data_max_new_tokens)
    sample_problems(data_path(args), settings, problems, args.data_samples, teacher_folder, tokenizer, args)


def sample_problems(path, settings, problems, num_samples, model_folder, tokenizer, args):
    """Complete problems with a model into a file laid out like samples.jsonl, its settings beside it; goes on where it stopped.

    Each process takes every world()-th problem; all append to the same file, a record with one write."""
    beside = path.removesuffix("l")
    if os.path.exists(beside):
        refuse_other_settings(path, read_json(beside), settings)
    every = {(p, s) for s in range(num_samples) for p in range(len(problems))}
    todo = every - {(r["problem"], r["sample"]) for r in read_samples(path)}
    barrier()  # all have looked
    if not todo:
        return
    if not rank():
        os.makedirs(args.out, exist_ok=True)
        write_json(beside, settings)
    mine = {(p, s) for p, s in todo if p % world() == rank()}
    template = prompt_template(args.task, args.prompt_file)
    prompts = [tokenizer.chat(template.replace("{question}", problem.question)) for problem in problems]
    lm = LM.from_pretrained(model_folder, args.device, args.dtype).eval().fuse()
    with open(path, "ab", buffering=0) as f:
        completions = generate(lm, prompts, num_samples=num_samples, max_new_tokens=args.data_max_new_tokens,
                               temperature=args.data_temperature, batch_size=args.data_batch_size,
                               stop_ids=tokenizer.eos_ids, seed=args.seed, skip=every - mine)
        for c in tqdm(completions, desc=path, total=len(mine), unit="sample", mininterval=10, disable=rank() > 0):
            f.write(record_of(c, problems[c.problem], tokenizer))
    barrier()


# ------------------------------------------------------------------------------------------------ students
RECIPES = ("mohawk", "mambainllama")
# The two students of the built-in experiment: how each is made, with which mixer, and which layers keep attention.
STUDENTS = dict(pure=("mohawk", "mamba2", ()), hybrid=("mambainllama", "mamba2", (1,)))
# The stages of a recipe and their steps at --scale 1. MambaInLlama is weight transfer and KL alone.
STEPS = dict(mohawk=dict(matrices=20, hidden=60, kl=420, sft=0), mambainllama=dict(kl=420, sft=0))


def student_stages(student, teacher, args, steps):
    """The stages of a student's training, in order; those of zero steps are left out."""
    def matrices(lm, tokens, labels, valid):
        return matrix_loss(lm, teacher, tokens[:, :args.matrix_length], valid[:, :args.matrix_length])

    def hidden(lm, tokens, labels, valid):
        return hidden_loss(lm, teacher, tokens, valid)

    def kl(lm, tokens, labels, valid):
        with torch.no_grad():
            target = teacher(tokens)
        return kl_loss(lm(tokens), target, labels, args.kl)

    every = dict(
        matrices=Stage("matrices", args.lr, matrices, over="rows", mixers_only=True),
        hidden=Stage("hidden", args.lr, hidden, over="tokens", mixers_only=True),
        kl=Stage("kl", args.lr, kl),
        sft=Stage("sft", args.lr / 10, answers_loss),
    )
    if steps.get("matrices") and any(isinstance(block.mix(), Mamba) for block in student.layers):
        raise ValueError("matrix orientation needs --mixer mamba2: Mamba-1 has one decay per channel and state, not one "
                         "matrix per head; use --matrices-steps 0 with --mixer mamba")
    return [dataclasses.replace(every[name], steps=count) for name, count in steps.items() if count]


def distill(name, teacher_folder, args, folder=None):
    """Make one student of the teacher, in out/<folder or name>: transfer the weights, then run the recipe's stages."""
    recipe, mixer, attention_layers = STUDENTS.get(name, STUDENTS["pure"])
    recipe, mixer = args.recipe or recipe, args.mixer or mixer
    if args.attention_layers is not None:
        attention_layers = args.attention_layers
    steps = {stage: choose_steps(getattr(args, f"{stage}_steps"), default, args.scale)
             for stage, default in STEPS[recipe].items()}
    tokenizer, config = load_tokenizer(teacher_folder), from_hf_config(read_config(teacher_folder))
    mixers = mixers_of(config.n_layers, mixer, attention_layers)
    args = argparse.Namespace(**vars(args) | dict(lr=args.lr or default_lr(config)))
    own_data = [args.data_samples, args.data_filter, args.data_temperature, args.data_max_new_tokens]
    settings = dict(data_settings(args), teacher=fingerprint(teacher_folder), recipe=recipe, mixers=mixers, steps=steps,
                    kl=args.kl, lr=args.lr, batch_tokens=args.batch_tokens, matrix_length=args.matrix_length,
                    start_length=args.start_length, data=own_data if args.data == "teacher" else None,
                    d_state=args.d_state, random_mixers=args.random_mixers or None)
    run = Run(os.path.join(args.out, folder or name), settings)
    if run.is_finished():
        print(f"{run.folder}: finished")
        return
    problems = worked_solutions(args)
    if args.data == "teacher":
        problems = teacher_solutions(problems, teacher_folder, tokenizer, args)
    pairs = tokenized(problems, tokenizer, args)
    shape = dataclasses.replace(config, mixers=mixers, d_state=args.d_state)
    check_memory(shape, config, pairs, {stage for stage in steps if steps[stage]}, args, world())
    teacher = LM.from_pretrained(teacher_folder, home(args), torch.float32).eval().requires_grad_(False)
    torch.manual_seed(args.seed)
    student = student_from(teacher, mixers, args.d_state, not args.random_mixers)
    stages = student_stages(student, teacher, args, steps)
    print(f"{folder or name}: {recipe}, layers {' '.join(mixers)}, {student.num_parameters():,} parameters, "
          + ", ".join(f"{stage.name} {stage.steps} steps" for stage in stages)
          + f" of up to {args.batch_tokens:,} tokens", flush=True)
    train(run, prepare(student, teacher, args), stages, batch_maker(pairs, config, start_length(args), args), args)
    run.finish(student, tokenizer)


def default_lr(config):
    """2e-3 for the built-in experiment's width of 64, and in inverse proportion to the width above it: 6e-5 at 2048. (At
    constant rate the change of a layer's output grows with its width: Yang et al. 2022. M1 has 1e-5, MOHAWK 1e-4.)"""
    return 2e-3 * min(1.0, 64 / config.d_model)


def choose_steps(asked, default, scale):
    return round(default * scale) if asked is None else asked


def mixers_of(n_layers, mixer, attention_layers):
    """The list of mixers of a student; ValueError for a layer that does not exist."""
    for layer in attention_layers:
        if not 0 <= layer < n_layers:
            raise ValueError(f"--attention-layers {layer} is out of range: the teacher has layers 0 to {n_layers - 1}")
    return ["attention" if layer in attention_layers else mixer for layer in range(n_layers)]


# ------------------------------------------------------------------------------------------------ the script
def size_list(text):
    """"small,base" -> ["small", "base"]."""
    sizes = text.split(",")
    if unknown := [size for size in sizes if size not in SIZES]:
        raise argparse.ArgumentTypeError(f"unknown size {unknown[0]!r}: choose from {', '.join(SIZES)}")
    return list(dict.fromkeys(sizes))


def layer_list(text):
    """"0,2" -> (0, 2), "" or "none" -> ()."""
    try:
        return tuple(int(part) for part in text.split(",")) if text not in ("", "none") else ()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layer indices such as 0,2") from None


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", default="out", help="models go to OUT/<name>")
    add("--task", default="arithmetic", help="arithmetic, gsm8k, openmath2[a:b], or a .jsonl file with worked solutions")
    add("--limit", type=at_least(1), help="train on this many of the task's problems; default: all")
    add("--subset-seed", type=int, help="take --limit problems at random with this seed; default: the first")
    add("--prompt-file", help="file with the text around {question}; default: the bare question for arithmetic, else an "
        "instruction to reason step by step")
    add("--start-length", type=float, help="share of the longest sequence at which a stage starts, growing to 1 over its "
        "first half; default: 0.15 for arithmetic, 1 (no curriculum) for other tasks")
    add("--ablate", action="store_true", help="what is each part worth? Distil pure students with one thing changed at a time, "
        "three seeds each, into OUT/ablation, and print a table")
    add("--ablate-seeds", type=at_least(1), default=3, help="of --ablate: how many students of each kind")
    add("--ablate-problems", type=at_least(1), default=96, help="of --ablate: test problems that a student is judged on")
    add("--teacher", help="folder or Hugging Face repository of a Llama; default: OUT/teacher, else assets/, else pre-train")
    add("--sft", action="store_true", help="fine-tune a copy of --teacher on the task first, into OUT/teacher")
    add("--teacher-sft-steps", type=at_least(1), default=500, help="steps of --sft")
    add("--teacher-lr", type=float, default=2e-5, help="peak learning rate of --sft")
    add("--sizes", type=size_list, default="base", help="of the built-in experiment: base, small (a teacher of two layers, into "
        "OUT/teacher-small, and its students) or small,base")
    add("--student", nargs="+", metavar="NAME", default=["pure", "hybrid"], help="students to make, by name; other names "
        "than pure and hybrid start from pure's settings")
    add("--recipe", choices=RECIPES, help="default: mohawk for pure, mambainllama for hybrid")
    add("--mixer", choices=["mamba", "mamba2"], help="what replaces attention; default: mamba2")
    add("--attention-layers", type=layer_list, metavar="I,J", help="layers that keep attention, or none; default: none for "
        "pure, 1 for hybrid")
    add("--d-state", type=at_least(1), help="state size of the mixers; default: head_dim for mamba2, which then takes the "
        "weights of q and k too, 16 for mamba")
    add("--random-mixers", action="store_true", help="do not transfer attention's weights into the mixers")
    add("--kl", choices=["forward", "reverse"], default="forward", help="direction of the KL divergence")
    add("--scale", type=at_least(0, float), default=1.0, help="multiply the students' default steps; 2 made the README's "
        "long run")
    for stage, what in (("matrices", "matrix orientation"), ("hidden", "hidden-state alignment"),
                        ("kl", "end-to-end distillation"), ("sft", "fine-tuning with cross-entropy after it")):
        each = ", ".join(f"{STEPS[recipe].get(stage, 0)} for {recipe}" for recipe in RECIPES)
        add(f"--{stage}-steps", type=at_least(0), help=f"steps of {what}; default: {each}, times --scale")
    add("--data", choices=["task", "teacher"], default="task", help="whose solutions students learn from")
    add("--data-samples", type=at_least(1), default=4, help="completions per problem of --data teacher")
    add("--data-filter", action="store_true", help="keep only those of them with the right answer")
    add("--data-temperature", type=float, default=0.8, help="of --data teacher and of --ablate")
    add("--data-max-new-tokens", type=at_least(1), default=896, help="longest completion of --data teacher and of --ablate")
    add("--data-batch-size", type=at_least(1), default=256, help="completions decoded at a time for both")
    add("--batch-tokens", type=at_least(1), default=6144, help="tokens per step of all processes, padding included: steps x "
        "this = a stage's budget")
    add("--accumulate", type=at_least(1), default=1, help="compute a step's gradient in this many pieces: less memory")
    add("--checkpoint-activations", action="store_true", help="recompute blocks in the backward pass: less memory")
    add("--compile", action="store_true", help="compile blocks with torch.compile")
    add("--matrix-length", type=at_least(1), default=128, help="tokens of a sequence in matrix orientation (memory ~ L^2)")
    add("--lr", type=float, help="peak learning rate of the students' stages; default: 2e-3, less in proportion for models "
        "wider than 64: 6e-5 at d_model 2048")
    add("--verifier", action="store_true", help="make OUT/verifier, which tells right completions from wrong ones, instead of "
        "students")
    add("--verifier-from", metavar="NAME", help="the model OUT/NAME whose completions it learns from, drawn with the --data "
        "options; teacher is the teacher; default: pure if it is there, as it draws six times as fast, else the teacher")
    add("--verifier-problems", type=at_least(10), default=500, help="training problems that are completed for it; a tenth "
        "is held out for its evaluation")
    add("--verifier-samples", type=at_least(1), default=8, help="completions of each")
    add("--verifier-steps", type=at_least(1), default=180, help="steps of its training")
    add("--verifier-lr", type=float, help="its peak learning rate; default: as --lr")
    add("--seed", type=int, default=0, help="of initialisation and of the order of the data")
    add("--pretrain", action="store_true", help="train a new teacher instead of taking the one in assets/")
    add("--pretrain-steps", type=at_least(1), default=3500, help="steps of the teacher's pre-training")
    add("--pretrain-lr", type=float, default=4e-3, help="peak learning rate of pre-training")
    for name, default in (("d-model", 64), ("n-layers", 4), ("n-heads", 4), ("d-ff", 192)):
        add(f"--{name}", type=at_least(1), default=default, help="shape of a pre-trained teacher (the small one has 2 layers)")
    add("--cache", default=os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "nanoreasoner"),
        help="folder of tokenised solutions, by a key of all that they depend on")
    add("--log-every", type=at_least(1), default=10, help="steps between log lines")
    add("--save-every", type=at_least(1), default=100, help="steps between checkpoints to resume from")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--dtype", choices=["float32", "bfloat16"], help="of autocast, weights stay float32; default: bfloat16 on "
        "cuda, float32 on cpu")
    return parser.parse_args(argv)


def main(argv=None):
    with contextlib.redirect_stderr(io.StringIO() if os.environ.get("RANK", "0") != "0" else sys.stderr):
        args = parse_args(argv)  # one process complains for all
    with processes(args.device):
        if args.compile and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
            raise ValueError("--compile needs a C++ compiler and finds none: install g++, set CXX, or leave it out")
        if args.teacher and args.sizes != ["base"]:
            raise ValueError("--sizes is for the teachers of the built-in experiment: leave it out with --teacher")
        args.device, args.dtype = choose_device(args.device, args.dtype)
        if args.verifier or args.ablate:
            teacher = get_teacher("base", args)
            if args.verifier:  # both build on this file, and import it
                from verifier import make_verifier as make
            else:
                from ablate import ablate as make
            make(teacher, args)
            return
        for size in args.sizes:
            teacher = get_teacher(size, args)
            for name in args.student:
                distill(name, teacher, args, named(name, size))


if __name__ == "__main__":
    run(main)
