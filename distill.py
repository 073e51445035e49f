"""Turn a Transformer into Mamba students: MOHAWK for the pure one, MambaInLlama for the hybrid one.

    python distill.py                           the tiny teacher, then both students, in out/
    python distill.py --student hybrid --attention-layers 0,2 --steps kl=2000
    python distill.py --teacher folder --task gsm8k --student pure
    python distill.py --only-right --task out/train/teacher/samples.jsonl     what a model wrote
    torchrun --nproc_per_node=8 distill.py ...  the same training on eight GPUs

Reads   a teacher's checkpoint (the built-in task's ships with the repository), a task
Writes  out/<name>/: config.json, model.safetensors, tokenizer; metrics.jsonl, the training curves;
        training.json, the settings; matrices.npz, how attention became a Mamba
A killed run goes on from its last checkpoint when the same command is run again, and ends where it
would have ended.
"""
import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

import hub
import parallel
from common import (Parser, choose_device, crc, folder_name, json_line, number, read_jsonl,
                    replace_file, run, same_settings, write_bytes, write_json)
from data import Pairs, choose_subset, load_task, load_tokenizer, prompt_template
from grade import extract_answer, is_correct
from model import FROM_ATTENTION, LM, MIXERS, Config, student_from, weight_dtype

IGNORE = -100  # label of a position whose prediction does not count


# ---------------------------------------------------------------------------- losses
# labels (B, L) are aligned with the logits: labels[t] is the token that position t predicts, which
# is tokens[t + 1], where that belongs to the answer, and IGNORE elsewhere. So the first token of
# the answer and the stop token count. (M1's code masks by the label at t, and loses the first.)
def cross_entropy_loss(logits, labels):
    """Mean over answer tokens of -log p(label). logits (B, L, V), labels (B, L) -> scalar."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def kl_loss(student_logits, teacher_logits, labels, direction="forward"):
    """Mean over answer tokens of a KL divergence of next-token distributions, in float32.

    "forward" is KL(teacher || student) = sum_v p_T (log p_T - log p_S): the student pays for what
    it does not cover (MambaInLlama). "reverse" is KL(student || teacher): it pays for what the
    teacher would not say (M1). The teacher gets no gradient. logits (B, L, V), labels (B, L).
    """
    counted = labels != IGNORE
    student = F.log_softmax(student_logits[counted].float(), dim=-1)  # (tokens, V)
    teacher = F.log_softmax(teacher_logits[counted].detach().float(), dim=-1)
    if direction == "reverse":
        student, teacher = teacher, student  # F.kl_div(q, p) is KL(p || q)
    return F.kl_div(student, teacher, log_target=True, reduction="sum") / counted.sum()


def replaced(student, teacher):
    """(student's block, teacher's block, layer) of each layer whose mixer is of another class."""
    return [(block, source, layer) for layer, (block, source) in
            enumerate(zip(student.layers, teacher.layers))
            if type(block.mixer) is not type(source.mixer)]


def positions_of(tokens):
    """The positions of tokens (B, L) in their rows, (1, L)."""
    return torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, L)


def matrix_loss(student, teacher, tokens, valid):
    """MOHAWK's first stage, orientation: how far T is from attention, as matrices over time.

    Sum over replaced layers of the mean over batch and heads of || T - attention ||_F, both given
    the teacher's hidden state. Rows of padding are left out. In float32 also under autocast, as in
    the reference code. tokens (B, L), valid (B, L) bool -> scalar.
    """
    loss = 0.0
    with torch.autocast(tokens.device.type, enabled=False):
        rope = teacher.rope(positions_of(tokens))
        with torch.no_grad():
            states = list(teacher.hidden_states(tokens))
        for block, source, layer in replaced(student, teacher):
            with torch.no_grad():
                target = source.mixing_matrix(states[layer], rope)  # (B, H, L, L)
            difference = block.mixing_matrix(states[layer], rope) - target
            difference = difference * valid[:, None, :, None]
            loss = loss + difference.square().sum((2, 3)).sqrt().mean()
    return loss


def hidden_loss(student, teacher, tokens, valid):
    """MOHAWK's second stage, alignment: how far each block's output is from its teacher's.

    Sum over replaced layers of the mean over tokens of || block(h) - teacher's block(h) ||_2. h is
    the teacher's hidden state, so layers learn in parallel and errors do not add up. -> scalar.
    """
    with torch.no_grad():
        states = list(teacher.hidden_states(tokens))
    rope, loss = teacher.rope(positions_of(tokens)), 0.0
    for block, _, layer in replaced(student, teacher):
        distance = block(states[layer], rope).float() - states[layer + 1].float()
        loss = loss + (distance.norm(dim=-1) * valid).sum() / valid.sum()  # (B, L)
    return loss


# ---------------------------------------------------------------------------- batches
class Batch(NamedTuple):
    """tokens (B, L), labels (B, L), and valid (B, L): which tokens are real. Padding is on the
    right, where a causal model's real tokens cannot see it."""
    tokens: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor

    def size(self, of):
        """How many rows, tokens or answers (tokens with a label) it has."""
        return len(self.valid) if of == "rows" else int(
            (self.valid if of == "tokens" else self.labels != IGNORE).sum())

    def piece(self, index, count, of):
        """Piece `index` of `count`, rows dealt out like cards, and its share of the rows, tokens or
        answers. With more pieces than rows some are the first row with a share of 0."""
        beyond = index >= len(self.valid)
        piece = Batch(*(t[:1] if beyond else t[index::count] for t in self))
        longest = int(piece.valid.sum(1).max())
        share = 0.0 if beyond else piece.size(of) / self.size(of)
        return Batch(*(t[:, :longest] for t in piece)), share


def collate(pairs):
    """The Batch of some (prompt ids, answer ids)."""
    shape = len(pairs), max(len(prompt) + len(answer) for prompt, answer in pairs)
    tokens, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORE)
    valid = torch.zeros(shape, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        tokens[i, :end] = torch.tensor([*prompt, *answer])
        labels[i, len(prompt) - 1:end - 1] = torch.tensor(answer)
        valid[i, :end] = True
    return Batch(tokens, labels, valid)


def batches(pairs, tokens_per_batch, max_length, seed, share=lambda step: 1.0):
    """Endless Batches of (prompt, answer) pairs, always the same ones for a seed.

    Sequences of like length go together, so that little is padded: at most tokens_per_batch with
    the padding (a longer sequence comes alone). share(step): take only sequences up to this share
    of the longest, see curriculum.
    """
    def length(pair):
        return len(pair[0]) + len(pair[1])
    rng, step = random.Random(seed), 0
    while True:
        before, order = step, rng.sample(range(len(pairs)), len(pairs))
        for pool in (order[i:i + 512] for i in range(0, len(order), 512)):
            pool = [pair for pair in map(pairs.__getitem__, pool) if length(pair) <= max_length]
            pool.sort(key=length)
            kept = [pair for pair in pool if length(pair) <= share(step) * length(pool[-1])]
            groups = [[]]
            for pair in kept or pool:
                if groups[-1] and (len(groups[-1]) + 1) * length(pair) > tokens_per_batch:
                    groups.append([])
                groups[-1].append(pair)
            rng.shuffle(groups)
            for group in filter(None, groups):
                yield collate(group)
                step += 1
        if step == before:
            raise ValueError(f"every worked solution is longer than max_length = {max_length} "
                             f"tokens")


def curriculum(steps, start):
    """Length as a share of the longest: grows from `start` to 1 over the first half of a stage.

    Short chains first: after the same budget the KL is 0.15 nats a token where all lengths from the
    beginning left 0.35 (commit a4bed8b).
    """
    return lambda step: min(1.0, start + (1 - start) * step / max(1, 0.5 * steps))


# ---------------------------------------------------------------------------- the training loop
@dataclass
class Stage:
    """A stretch of training with one loss(student, teacher, batch) -> scalar."""
    name: str
    steps: int
    lr: float  # at its peak
    loss: Callable
    mean_over: str = "answers"  # what the loss is a mean over: rows, tokens or answers
    mixers_only: bool = False  # all else is frozen


def learning_rate(step, steps, peak):
    """Warm-up, stable, decay: up from 0 over the first 5% of the steps, down over the last 40%."""
    return peak * min(1.0, (step + 1) / max(1, 0.05 * steps), (steps - step) / max(1, 0.4 * steps))


def make_optimizer(lm, lr):
    """AdamW. Only matrices decay: gains and memory lengths would be pulled to an arbitrary zero."""
    decayed, kept = [], []
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.dim() > 1 and weight_dtype(lm, name, None) is None
            (decayed if is_matrix else kept).append(parameter)
    groups = [dict(params=decayed, weight_decay=0.1), dict(params=kept, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def train(progress, pair, stages, make_batches, hardware):
    """Run the stages, from where `progress` stands. make_batches(index, stage) -> its batches."""
    lm = pair.lm
    for index in range(progress.stage, len(stages)):
        stage = stages[index]
        train_only_mixers(pair, stage.mixers_only)
        optimizer = make_optimizer(lm, stage.lr)
        progress.restore(lm, optimizer)
        began, tokens = time.perf_counter(), progress.tokens
        for batch in itertools.islice(make_batches(index, stage), progress.step, stage.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress.step, stage.steps, stage.lr)
            loss = gradient(pair, stage, batch, hardware)
            norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.count(loss, batch)
            last = progress.step == stage.steps
            if last or progress.step % hardware.log_every == 0:
                seconds = time.perf_counter() - began
                speed = (progress.tokens - tokens) / seconds
                progress.log(stage, norm, group["lr"], speed, seconds)
            if not last and progress.step % hardware.save_every == 0:
                progress.save(lm, optimizer)
        progress.stage, progress.step = index + 1, 0
        if stage.name == "matrices":
            progress.picture("orientation", pair)


def gradient(pair, stage, batch, hardware):
    """Add a batch's gradient to the parameters, piece by piece; its loss, a detached scalar.

    The pieces of all processes, weighted by their shares, add up to the loss of the whole batch.
    """
    rounds = min(hardware.accumulate, -(-len(batch.valid) // parallel.world()))
    count, loss = rounds * parallel.world(), torch.zeros((), device=hardware.device)
    for index in range(parallel.rank(), count, parallel.world()):
        piece, share = batch.piece(index, count, stage.mean_over)
        with torch.autocast(hardware.device.type, torch.bfloat16, cache_enabled=False,
                            enabled=hardware.dtype == torch.bfloat16):
            part = share * pair(stage.loss, Batch(*(t.to(hardware.device) for t in piece)))
        (parallel.world() * part).backward()  # FSDP averages over processes: this makes it a sum
        loss += part.detach()
    return parallel.total(loss)


# ---------------------------------------------------------------------------- students
# The students of the built-in experiment: recipe, mixer, layers that keep attention.
STUDENTS = dict(pure=("mohawk", "mamba2", ()), hybrid=("mambainllama", "mamba2", (1,)))
# A recipe's stages and their steps at --scale 1. MambaInLlama is weight transfer and KL alone.
STEPS = dict(mohawk=dict(matrices=60, hidden=200, kl=4400, sft=0),
             mambainllama=dict(kl=4500, sft=0))
MATRIX_LENGTH = 128  # tokens of a sequence in orientation, whose memory grows with its square


def matrices(student, teacher, batch):
    """The loss of orientation: matrix_loss of the first tokens."""
    cut = slice(None), slice(MATRIX_LENGTH)
    return matrix_loss(student, teacher, batch.tokens[cut], batch.valid[cut])


def hidden(student, teacher, batch):
    """The loss of alignment."""
    return hidden_loss(student, teacher, batch.tokens, batch.valid)


def kl_towards(direction):
    """The loss of end-to-end distillation."""
    def kl(student, teacher, batch):
        with torch.no_grad():
            target = teacher(batch.tokens)
        return kl_loss(student(batch.tokens), target, batch.labels, direction)
    return kl


def sft(student, teacher, batch):
    """The loss of fine-tuning on the written solutions, without a teacher."""
    return cross_entropy_loss(student(batch.tokens), batch.labels)


def student_stages(steps, lr, direction):
    """The stages of a student's training, in their order; those of no steps are left out."""
    every = (Stage("matrices", steps.get("matrices", 0), lr, matrices, "rows", mixers_only=True),
             Stage("hidden", steps.get("hidden", 0), lr, hidden, "tokens", mixers_only=True),
             Stage("kl", steps["kl"], lr, kl_towards(direction)),
             Stage("sft", steps["sft"], lr / 10, sft))
    return [stage for stage in every if stage.steps]


# ---- first reading ends here: resuming, the picture of the matrices, options ----
@dataclass
class Hardware:
    """Where and how to compute: it changes speed and memory, not what is learnt."""
    device: torch.device
    dtype: torch.dtype  # of autocast; weights, moments and losses stay float32
    accumulate: int
    checkpoint_activations: bool
    compile: bool
    log_every: int  # steps
    save_every: int

    def __post_init__(self):
        compilers = os.environ.get("CXX", "c++"), "g++", "clang++"
        if self.compile and not any(map(shutil.which, compilers)):
            raise ValueError("--compile needs a C++ compiler: install g++, or set CXX")


def train_only_mixers(pair, only):
    """Let everything learn, or only the mixers that differ from the teacher's."""
    pair.lm.requires_grad_(not only)
    for block, _, _ in replaced(pair.lm, pair.teacher) if only else ():
        block.mixer.requires_grad_(True)


class Progress:
    """One model's training: where it stands, and how it is saved in its folder and found again.

    training.json holds the settings. training.pt, while training lasts, holds what it takes to go
    on: weights, moments and the position, which is also the place in the data. Both are replaced
    whole, never edited.
    """

    def __init__(self, folder, settings, example=None):
        self.folder, self.settings, self.example = folder, settings, example
        self.stage, self.step, self.tokens = 0, 0, 0
        self.losses, self.saved = [], None  # since the last log line; a checkpoint to go on from
        finished, begun = self.has("config.json"), self.has("training.pt")
        if finished and not self.has("training.json"):
            raise ValueError(f"{folder} holds a model that this command did not make: "
                             f"choose another --out, or delete it")
        same_settings(self.path("training.json"), settings, finished or begun)
        self.is_finished = finished and not begun

    def path(self, name):
        return os.path.join(self.folder, name)

    def has(self, name):
        return os.path.exists(self.path(name))

    def begin(self):
        """Find the checkpoint to go on from, or make the folder's first files."""
        if not self.has("training.pt"):
            parallel.wait()  # until all have seen that
            if not parallel.rank():
                with contextlib.suppress(FileNotFoundError):
                    os.remove(self.path("matrices.npz"))  # of a run that was given up
                write_json(self.path("training.json"), self.settings)
                write_bytes(self.path("metrics.jsonl"), b"")
            return
        try:
            self.saved = torch.load(self.path("training.pt"), weights_only=True, map_location="cpu")
            vars(self).update(self.saved["position"])
        except (EOFError, RuntimeError, OSError, LookupError, TypeError,
                pickle.UnpicklingError) as error:
            raise ValueError(f"{self.path('training.pt')} is not a readable checkpoint "
                             f"({type(error).__name__}): delete it to start over") from None
        lines = read_jsonl(self.path("metrics.jsonl"), dict(tokens=int), torn=True)
        parallel.wait()  # until all have read it
        if not parallel.rank():  # what was logged after the checkpoint will be logged again
            kept = [json_line(line) for line in lines if line["tokens"] <= self.tokens]
            write_bytes(self.path("metrics.jsonl"), b"".join(kept))
        print(f"{self.folder}: going on at stage {self.stage + 1}, step {self.step}", flush=True)

    def restore(self, lm, optimizer):
        """Take weights and moments from the checkpoint, the first time."""
        if self.saved is not None:
            parallel.load_whole_state(lm, optimizer, self.saved)
            self.saved = None

    def count(self, loss, batch):
        self.step, self.tokens = self.step + 1, self.tokens + batch.size("tokens")
        self.losses.append(float(loss))

    def log(self, stage, norm, lr, speed, seconds):
        """One line for the reader, the same in metrics.jsonl for plot.py. speed in tokens/s."""
        loss, self.losses = sum(self.losses) / len(self.losses), []
        if not math.isfinite(loss):
            raise ValueError(f"the loss of stage {stage.name} is {loss} at step {self.step}: "
                             f"lower --lr or try another --seed")
        left = seconds / self.step * (stage.steps - self.step)
        print(f"{os.path.basename(self.folder)} {stage.name} {self.step}/{stage.steps} | "
              f"loss {loss:.4f} | grad {float(norm):.2f} | lr {lr:.1e} | {speed:,.0f} tokens/s | "
              f"{seconds:.0f} s | eta {left:.0f} s", flush=True)
        record = dict(stage=stage.name, step=self.step, steps=stage.steps, tokens=self.tokens,
                      loss=loss, grad_norm=float(norm), lr=lr, tokens_per_second=round(speed),
                      seconds=round(seconds, 2))
        if not parallel.rank():
            with open(self.path("metrics.jsonl"), "ab", buffering=0) as f:
                f.write(json_line(record))

    def save(self, lm, optimizer):
        position = dict(stage=self.stage, step=self.step, tokens=self.tokens, losses=self.losses)
        state = dict(parallel.whole_state(lm, optimizer), position=position)
        if not parallel.rank():
            replace_file(self.path("training.pt"), lambda path: torch.save(state, path))

    def picture(self, when, pair):
        """Add to matrices.npz how tokens are mixed: attention, and what stands in its place."""
        if self.example is None:
            return
        found = mixing_matrices(pair, self.example["ids"].to(pair.lm.device))
        if found is None or parallel.rank():
            return
        path = self.path("matrices.npz")
        old = dict(np.load(path)) if os.path.exists(path) else {}
        teacher, student, layer = found
        new = dict(old, tokens=np.array(self.example["tokens"]), layer=layer, teacher=teacher)
        replace_file(path, lambda path: save_npz(path, new | {when: student}))

    def finish(self, lm, tokenizer):
        weights = parallel.whole_weights(lm)
        if not parallel.rank():
            tokenizer.save(self.folder)
            hub.write_checkpoint(self.folder, dataclasses.asdict(lm.config), weights)
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.path("training.pt"))
        parallel.wait()  # the others may read it next


def save_npz(path, arrays):
    """Write arrays by name into a compressed file of exactly this path."""
    with open(path, "wb") as f:  # given a name, numpy would add its own ending
        np.savez_compressed(f, **arrays)


HEADS = 3  # of the picture, and the tokens of a problem that it shows
PICTURE_TOKENS = 96


def mixing_matrices(pair, tokens):
    """(teacher's, student's, layer): matrices (HEADS, L, L) float16 of the middle replaced layer,
    both given the teacher's hidden state; None if the student's mixers have none."""
    def compute(student, teacher, _):
        places = [place for place in replaced(student, teacher)
                  if getattr(place[0].mixer, "mixing_matrix", None)]
        if not places:
            return None
        block, source, layer = places[len(places) // 2]
        x = next(itertools.islice(teacher.hidden_states(tokens), layer, None))
        rope = teacher.rope(positions_of(tokens))
        both = (b.mixing_matrix(x, rope)[0, :HEADS].half().cpu().numpy() for b in (source, block))
        return (*both, layer)
    return parallel.without_gradient(pair, compute, None)


@dataclass
class Data:
    """What to train on: a task's worked solutions."""
    task: str
    limit: int | None
    subset_seed: int | None
    template: str  # around a question
    only_right: bool = False

    def pairs(self, tokenizer):
        """(prompt ids, answer ids) of the solutions."""
        problems = [problem for problem in load_task(self.task, "train") if problem.solution]
        if self.only_right:
            problems = [problem for problem in problems
                        if is_correct(extract_answer(problem.solution) or "", problem.answer)]
        if not problems:
            raise ValueError(f"{self.task} has no {'right ' * self.only_right}worked solutions to "
                             f"train on: it needs GSM8K's layout, a column `solution`, or finished "
                             f"samples with a \\boxed{{}} answer")
        problems = choose_subset(problems, self.limit, self.subset_seed)
        return Pairs(problems, tokenizer, self.template)

    def settings(self):
        content = None
        if os.path.isfile(self.task):
            with open(self.task, "rb") as f:
                content = crc(f.read())
        return dataclasses.asdict(self) | dict(content=content)


@dataclass
class Student:
    """What a student is to be, and how long it learns. None: the default for its name or task."""
    recipe: str | None
    mixer: str | None
    attention_layers: tuple | None
    d_state: int | None
    transfer: bool
    steps: dict  # stage -> steps, of those that were asked for; "" for all stages
    scale: float
    lr: float | None
    batch_tokens: int | None
    kl: str
    seed: int


def settle(name, student, task, config):
    """What a student of a teacher of this Config is: recipe, mixers, steps, lr, batch_tokens.

    ValueError for what cannot be. The built-in task has many small steps: the number of updates
    counts, and its batches are cheap.
    """
    recipe, mixer, attention_layers = STUDENTS.get(name.split("-")[0], STUDENTS["pure"])
    recipe, mixer = student.recipe or recipe, student.mixer or mixer
    layers = attention_layers if student.attention_layers is None else student.attention_layers
    if wrong := [layer for layer in layers if not 0 <= layer < config.n_layers]:
        raise ValueError(f"--attention-layers {wrong[0]} is out of range: the teacher has layers "
                         f"0 to {config.n_layers - 1}")
    mixers = [config.mixers[i] if i in layers else mixer for i in range(config.n_layers)]
    if mixers == config.mixers:
        raise ValueError(f"{name} would keep every layer of its teacher: nothing to distil")
    steps = {stage: student.steps.get(stage, student.steps.get("all", round(count * student.scale)))
             for stage, count in STEPS[recipe].items()}
    if steps.get("matrices") and not getattr(MIXERS[mixer], "mixing_matrix", None):
        raise ValueError(f"--mixer {mixer} has no matrix per head to orient: "
                         f"add --steps matrices=0")
    built_in = task == "arithmetic"
    lr = student.lr or (5e-4 if built_in else 2e-3 * min(1.0, 64 / config.d_model))
    return dict(recipe=recipe, mixers=mixers, steps=steps, lr=lr,
                batch_tokens=student.batch_tokens or (768 if built_in else 6144))


def check_stages(student, choices):
    """ValueError for steps of a stage that none of the students has."""
    stages = {stage: None for choice in choices for stage in choice["steps"]}
    if unknown := student.steps.keys() - stages.keys() - {"all"}:
        recipes = " and ".join(sorted({choice["recipe"] for choice in choices}))
        raise ValueError(f"--steps {min(unknown)}=...: the stages of {recipes} are "
                         f"{', '.join(stages)}")


def distill(name, student, data, hardware, teacher_folder, out, suffix=""):
    """Make one student of the teacher, in out/<name>: transfer the weights, then run its stages."""
    tokenizer, config = load_tokenizer(teacher_folder), Config(**hub.read_config(teacher_folder))
    choices = settle(name, student, data.task, config)
    settings = data.settings() | choices | dict(
        teacher=hub.fingerprint(teacher_folder), kl=student.kl, d_state=student.d_state,
        transfer=student.transfer, seed=student.seed)
    with parallel.exclusively(os.path.join(out, name + suffix)) as folder:
        progress = Progress(folder, settings)
        if progress.is_finished:
            print(f"{folder}: finished", flush=True)
            return
        pairs = data.pairs(tokenizer)
        teacher = LM.from_pretrained(teacher_folder, home(hardware), torch.float32)
        torch.manual_seed(student.seed)
        lm = student_from(teacher, choices["mixers"], student.d_state, student.transfer)
        stages = student_stages(choices["steps"], choices["lr"], student.kl)
        print(f"{name}{suffix}: {choices['recipe']}, layers {' '.join(choices['mixers'])}, "
              f"{lm.num_parameters():,} parameters; steps of {choices['batch_tokens']:,} tokens: "
              + ", ".join(f"{stage.name} {stage.steps}" for stage in stages), flush=True)
        progress.example = example_of(pairs, tokenizer)
        train_and_save(progress, lm, teacher.eval().requires_grad_(False), stages, tokenizer, pairs,
                       choices["batch_tokens"], start_length(data.task), student.seed, hardware)


def train_and_save(progress, lm, teacher, stages, tokenizer, pairs, batch_tokens, start, seed,
                   hardware):
    """Train a model, a student or a teacher itself, and save it: what all trainings share."""
    def make_batches(index, stage):
        return batches(pairs, batch_tokens, lm.config.max_length, f"{seed} {index}",
                       curriculum(stage.steps, start))
    pair = ready(lm, teacher, hardware)
    progress.begin()
    if progress.tokens == 0:
        progress.picture("transfer", pair)
    train(progress, pair, stages, make_batches, hardware)
    progress.picture("end", pair)
    progress.finish(lm, tokenizer)


def ready(lm, teacher, hardware):
    """The Pair of a model and its teacher, compiled, checkpointed and sharded as asked for.

    The first two replace each block's forward, so that the names of weights stay as they are.
    """
    for block in (*lm.layers, *(teacher.layers if teacher else ())) if hardware.compile else ():
        block.forward = torch.compile(block.forward)
    for block in lm.layers if hardware.checkpoint_activations else ():
        block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward,
                                          use_reentrant=False)
    return parallel.shard(parallel.Pair(lm, teacher), hardware.device)


def home(hardware):
    """Where models are made: many processes make theirs on the CPU, and move only their part."""
    return hardware.device if parallel.world() == 1 else "cpu"


def start_length(task):
    """The share of the longest sequence at which a stage begins, see curriculum."""
    return 0.15 if task == "arithmetic" else 1.0


def example_of(pairs, tokenizer):
    """The first tokens of the first solution that has enough: ids (1, L), and as texts."""
    enough = (pair for pair in pairs if len(pair[0]) + len(pair[1]) >= PICTURE_TOKENS)
    prompt, answer = next(enough, pairs[0])
    ids = [*prompt, *answer][:PICTURE_TOKENS]
    return dict(ids=torch.tensor([ids]), tokens=[tokenizer.decode([i]) for i in ids])


ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")


def find_teacher(given, out, name, task):
    """The folder of the teacher: the given one, or out/<name>, which is filled from assets/."""
    if given:
        hub.tokenizer_folder(given)
        return hub.checkpoint_folder(given)
    folder = os.path.join(out, name)
    if os.path.exists(os.path.join(folder, "training.pt")):
        raise ValueError(f"{folder} is not finished: go on with python teacher.py")
    if os.path.exists(os.path.join(folder, "config.json")):
        return folder
    if task != "arithmetic":
        raise ValueError(f"no teacher for {task}: name one with --teacher, or make {folder} with "
                         f"python teacher.py")
    with parallel.first_alone():
        if not os.path.exists(os.path.join(folder, "config.json")):
            print(f"teacher: the one that ships in assets/{name}, copied to {folder}", flush=True)
            os.makedirs(folder, exist_ok=True)
            files = sorted(os.listdir(os.path.join(ASSETS, name)))
            for file in sorted(files, key=lambda file: file == "config.json"):  # it makes a model
                source = os.path.join(ASSETS, name, file)
                replace_file(os.path.join(folder, file), lambda to: shutil.copyfile(source, to))
    return folder


# ---------------------------------------------------------------------------- the script
def layer_list(text):
    """"0,2" -> (0, 2), "none" -> ()."""
    try:
        return tuple(int(part) for part in text.split(",")) if text != "none" else ()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 0,2") from None


def stage_steps(text):
    """"kl=200" -> ("kl", 200), "200" -> ("all", 200)."""
    stage, _, count = text.rpartition("=")
    return stage or "all", number(0)(count)


def add_data_options(parser):
    """Add the options of what to learn from, shared with teacher.py; returns the group's add."""
    group = parser.add_argument_group("what to learn from")
    add = group.add_argument
    add("--task", default="arithmetic", help="arithmetic, gsm8k, openmath2, openmath2[1000:2000], "
        "or a .jsonl file: with worked solutions, or samples of sample.py")
    add("--limit", type=number(1), metavar="N", help="so many of its problems; default: all")
    add("--subset-seed", type=number(0), metavar="N", help="take them at random with this seed; "
        "default: the first")
    add("--prompt-file", metavar="FILE", help="the text around {question}; default: nothing for "
        "arithmetic, else an instruction to reason step by step")
    return add


def add_hardware_options(parser):
    """Add the options of where and how to compute, shared with teacher.py."""
    group = parser.add_argument_group("where and how to compute")
    add = group.add_argument
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--dtype", choices=["float32", "bfloat16"], help="of autocast; weights stay float32; "
        "default: bfloat16 on cuda, float32 on cpu")
    add("--accumulate", type=number(1), default=1, metavar="N", help="compute a step's gradient in "
        "this many pieces: less memory")
    add("--checkpoint-activations", action="store_true", help="compute blocks again in the "
        "backward pass: less memory")
    add("--compile", action="store_true", help="compile blocks with torch.compile")
    add("--log-every", type=number(1), default=100, metavar="STEPS", help="between log lines")
    add("--save-every", type=number(1), default=100, metavar="STEPS", help="between checkpoints")
    add("--out", default="out", metavar="FOLDER", help="models go to FOLDER/<name>")


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument_group("what to make").add_argument
    add("--student", nargs="+", type=folder_name, metavar="NAME", default=["pure", "hybrid"],
        help="a name that does not start with hybrid has pure's defaults")
    add("--teacher", metavar="MODEL", help="folder or Hugging Face repository of a Llama; default: "
        "teacher in --out, which for arithmetic is copied from assets/")
    add("--size", choices=["base", "small"], default="base", help="small: the smaller teacher of "
        "the built-in task, teacher-small, and its students pure-small, hybrid-small")
    add("--recipe", choices=STEPS, help="default: mohawk for pure, mambainllama for hybrid")
    add("--mixer", choices=[word for word, mixer in MIXERS.items() if mixer in FROM_ATTENTION],
        help="what replaces attention; default: mamba2")
    add("--attention-layers", type=layer_list, metavar="I,J", help="layers that keep their "
        "attention, or none; default: none for pure, 1 for hybrid")
    add("--d-state", type=number(1, 65536), metavar="N", help="state size of the mixers; default: "
        "head_dim for mamba2, so that q and k fit, 16 for mamba")
    add("--random-mixers", action="store_true", help="do not transfer attention's weights")
    add = parser.add_argument_group("how to learn").add_argument
    defaults = "; ".join(f"{recipe} " + " ".join(f"{s}={n}" for s, n in steps.items())
                         for recipe, steps in STEPS.items())
    add("--steps", nargs="+", type=stage_steps, default=[], metavar="[STAGE=]N", help="of a stage, "
        f"or of all of them; default, times --scale: {defaults}")
    add("--scale", type=number(0, 1e6, float), default=1.0, metavar="X", help="of default steps")
    add("--kl", choices=["forward", "reverse"], default="forward", help="which divergence")
    add("--lr", type=number(1e-9, 100, float), metavar="X", help="peak learning rate; default: "
        "5e-4 for arithmetic, else 2e-3, in inverse proportion to widths above 64")
    add("--batch-tokens", type=number(1), metavar="N", help="tokens a step, padding included; "
        "default: 768 for arithmetic, else 6144")
    add("--seed", type=number(0, 2 ** 31), default=0, help="of initialisation and the data's order")
    add = add_data_options(parser)
    add("--only-right", action="store_true", help="leave out solutions with a wrong answer, which "
        "samples may have")
    add_hardware_options(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with parallel.processes(args.device):
        hardware = Hardware(*choose_device(args.device, args.dtype), args.accumulate,
                            args.checkpoint_activations, args.compile, args.log_every,
                            args.save_every)
        suffix = "-small" if args.size == "small" else ""
        data = Data(args.task, args.limit, args.subset_seed,
                    prompt_template(args.task, args.prompt_file), args.only_right)
        student = Student(args.recipe, args.mixer, args.attention_layers, args.d_state,
                          not args.random_mixers, dict(args.steps), args.scale, args.lr,
                          args.batch_tokens, args.kl, args.seed)
        teacher = find_teacher(args.teacher, args.out, "teacher" + suffix, args.task)
        config, names = Config(**hub.read_config(teacher)), list(dict.fromkeys(args.student))
        # a mistake is told before anything begins
        check_stages(student, [settle(name, student, args.task, config) for name in names])
        make = functools.partial(distill, student=student, data=data, hardware=hardware,
                                 teacher_folder=teacher, out=args.out, suffix=suffix)
        if hardware.device.type == "cpu" and parallel.world() == 1 and len(names) > 1:
            if args.task != "arithmetic":
                data.pairs(load_tokenizer(teacher))  # if it cannot be read, one process says so
            parallel.side_by_side(make, names)  # a second thread gains 3% at these sizes
        else:
            for name in names:
                make(name)


if __name__ == "__main__":
    run(main, "--batch-tokens, or raise --accumulate")
