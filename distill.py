"""Turn a Transformer into Mamba students: MOHAWK for the pure one, MambaInLlama for the hybrid one.

    python distill.py                           the tiny teacher, then both students, in out/
    torchrun --nproc_per_node=8 distill.py ...  the same training on eight GPUs

Reads   a teacher's checkpoint, a task
Writes  out/<name>/: the model; training.json, its settings; metrics.jsonl, the training curves;
        matrices.npz, how attention became a Mamba. The same command goes on with a killed run.
"""
import io
import itertools
import math
import os
import random
import shutil
import time
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

from common import (Parser, add_device_options, add_task_options, choose_device, crc, folder_name,
                    json_line, naming, number, read_json, read_jsonl, replace_file, require, run,
                    same_settings, write_bytes, write_json)

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

import hub
import parallel
from data import BUILT_IN, Pairs, choose_subset, load_task, load_tokenizer, prompt_template
from model import FROM_ATTENTION, LM, MIXERS, Config, student_from, weight_dtype
from verdict import extract_answer, is_correct

IGNORE = -100  # label of a position whose prediction does not count


# ---- losses
def divergence(student, teacher, labels, direction):
    """Sum over tokens of KL(teacher || student) = sum_v p_T (log p_T - log p_S), float32.

    So the student pays for what it does not cover (MambaInLlama); with "reverse", the two swapped,
    for what the teacher would not say (M1). Logits (tokens, V) -> scalar.
    """
    student, teacher = student.float().log_softmax(-1), teacher.detach().float().log_softmax(-1)
    if direction == "reverse":
        student, teacher = teacher, student  # F.kl_div(q, p) is KL(p || q)
    return F.kl_div(student, teacher, log_target=True, reduction="sum")


def kl_loss(student_logits, teacher_logits, labels, direction="forward"):
    """Mean of `divergence` over answer tokens. Logits (B, L, V), labels (B, L) -> scalar."""
    counted = labels != IGNORE
    total = divergence(student_logits[counted], teacher_logits[counted], None, direction)
    return total / counted.sum()


def replaced(student, teacher, tokens):
    """Yield for each layer whose mixer is of another class than the teacher's: both blocks, the
    teacher's residual stream (B, L, d_model) before and after its own, and the rope."""
    with torch.no_grad():
        states = list(teacher.hidden_states(tokens))
        rope = teacher.rope(torch.arange(tokens.shape[1], device=tokens.device)[None])
    for block, source, before, after in zip(student.layers, teacher.layers, states, states[1:]):
        if type(block.mixer) is not type(source.mixer):
            yield block, source, before, after, rope


def matrix_loss(student, teacher, tokens, valid):
    """MOHAWK's first stage, orientation: how far T is from attention, as matrices over time.

    Sum over replaced layers of the mean over batch and heads of || T - attention ||_F, both given
    the teacher's hidden state, in float32. tokens (B, L), valid (B, L): not padding -> scalar.
    """
    loss = 0.0
    with torch.autocast(tokens.device.type, enabled=False):
        for block, source, x, _, rope in replaced(student, teacher, tokens):
            attention = source.mixing_matrix(x, rope).detach()  # (B, H, L, L)
            difference = (block.mixing_matrix(x, rope) - attention) * valid[:, None, :, None]
            loss += difference.square().sum((2, 3)).sqrt().mean()
    return loss


def hidden_loss(student, teacher, tokens, valid):
    """MOHAWK's second stage, alignment: how far each block's output is from its teacher's.

    Sum over replaced layers of the mean over tokens of || block(h) - teacher's block(h) ||_2; h is
    the teacher's hidden state, so errors do not add up. Arguments as above.
    """
    loss = 0.0
    for block, _, x, target, rope in replaced(student, teacher, tokens):
        distance = (block(x, rope).float() - target.float()).norm(dim=-1)  # (B, L)
        loss += (distance * valid).sum() / valid.sum()
    return loss


# ---- batches
class Batch(NamedTuple):
    """Sequences, padded on the right, where no real token of a causal model can see the padding.

    labels[t] is the next token where that is of the answer, stop token included, else IGNORE. The
    answer's first token counts (M1's code loses it).
    """
    tokens: torch.Tensor  # (B, L)
    labels: torch.Tensor  # (B, L)
    valid: torch.Tensor  # (B, L): which tokens are real

    def size(self, of):
        """How many of these it has: rows, tokens or answer tokens."""
        counted = dict(rows=self.valid[:, 0], tokens=self.valid, answers=self.labels != IGNORE)
        return int(counted[of].sum())

    def piece(self, index, count, of):
        """Piece `index` of `count`, rows dealt out like cards, and its share of the batch's size.
        Pieces beyond the last row repeat one, with a share of 0."""
        rows = len(self.valid)
        piece = Batch(*(t[index % rows::count] for t in self))
        share = piece.size(of) / self.size(of) if index < rows else 0.0
        return Batch(*(t[:, :int(piece.valid.sum(1).max())] for t in piece)), share


def collate(pairs):
    """The Batch of some (prompt ids, answer ids)."""
    tokens = [prompt + answer for prompt, answer in pairs]
    labels = [[IGNORE] * (len(prompt) - 1) + answer + [IGNORE] for prompt, answer in pairs]
    valid = [[True] * len(row) for row in tokens]
    return Batch(*(torch.nn.utils.rnn.pad_sequence([*map(torch.tensor, rows)], True, padding)
                   for rows, padding in ((tokens, 0), (labels, IGNORE), (valid, False))))


def batches(pairs, tokens_per_batch, max_length, seed, steps=0, start=1.0):
    """Endless Batches of (prompt, answer) pairs, the same ones for a seed.

    Sequences of like length go together: at most tokens_per_batch with padding, or one alone. A
    stage of `steps` starts with those up to `start` of the longest, and has all from its half on.
    """
    def length(pair):
        return sum(map(len, pair))
    rng, step = random.Random(seed), 0
    while True:
        order = rng.sample(range(len(pairs)), len(pairs))
        for first in range(0, len(order), 512):
            pool = sorted((pairs[i] for i in order[first:first + 512]), key=length)
            pool = [pair for pair in pool if length(pair) <= max_length]
            share = min(1.0, start + (1 - start) * step / max(1, 0.5 * steps))
            short = [pair for pair in pool if length(pair) <= share * length(pool[-1])]
            groups = [[]]
            for pair in short or pool:
                if groups[-1] and (len(groups[-1]) + 1) * length(pair) > tokens_per_batch:
                    groups.append([])
                groups[-1].append(pair)
            rng.shuffle(groups)
            for group in filter(None, groups):
                yield collate(group)
                step += 1
        require(step, f"every solution is longer than max_length = {max_length} tokens")


# ---- the training loop
@dataclass
class Stage:
    """A stretch of training with one loss(student, teacher, batch) -> scalar."""
    name: str
    steps: int
    lr: float  # at its peak
    loss: Callable
    mean_over: str = "answers"  # or rows, tokens: see Batch.size
    mixers_only: bool = False  # all else is frozen
    batches: Iterator = None  # endless, see train_in


def learning_rate(step, steps, peak):
    """Up from 0 over the first 5% of the steps, then down to 0 in a straight line."""
    return peak * min(1.0, (step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps))


def make_optimizer(lm, lr):
    """AdamW. Only matrices decay: for gains and memory lengths 0 is an arbitrary value. Mixers
    other than attention have further to go: they learn at twice the rate.
    """
    new = {p for b in lm.layers if type(b.mixer) in FROM_ATTENTION for p in b.mixer.parameters()}
    groups = {}
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and weight_dtype(lm, name, None) is None
            groups.setdefault((0.1 * decays, 1 + (parameter in new)), []).append(parameter)
    return torch.optim.AdamW([dict(params=group, weight_decay=decay, pace=pace)
                              for (decay, pace), group in groups.items()],
                             lr=lr, betas=(0.9, 0.95), fused=True)


def train(progress, models, stages, hardware):
    """Run the stages from where `progress` stands. models: a parallel.Pair."""
    lm = models.lm
    for index, stage in list(enumerate(stages))[progress.stage:]:
        lm.requires_grad_(not stage.mixers_only)
        for block in lm.layers:
            block.mixer.requires_grad_(True)  # those that were kept get no gradient
        optimizer = make_optimizer(lm, stage.lr)
        progress.enter(index, lm, optimizer)
        for batch in itertools.islice(stage.batches, progress.step, stage.steps):
            lr = learning_rate(progress.step, stage.steps, stage.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["pace"]
            loss = gradient(models, stage, batch, hardware)
            norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.step += 1
            progress.tokens += batch.size("tokens")
            progress.losses.append(float(loss))
            if progress.step % hardware.log_every == 0 or progress.step == stage.steps:
                progress.log(stage, lr, float(norm))
            if progress.step % hardware.save_every == 0:
                progress.save(lm, optimizer)
        progress.step = 0
        if stage.name == "matrices":
            progress.picture("orientation", models)


def gradient(models, stage, batch, hardware):
    """The loss of a batch; adds its gradient to the parameters piece by piece, over all processes:
    weighted by their shares, pieces add up to the batch."""
    world, loss = parallel.world(), 0.0
    count = world * min(hardware.accumulate, math.ceil(len(batch.valid) / world))
    for index in range(parallel.rank(), count, world):
        piece, share = batch.piece(index, count, stage.mean_over)
        with torch.autocast(hardware.device.type, torch.bfloat16, cache_enabled=False,
                            enabled=hardware.dtype == torch.bfloat16):
            part = share * models(stage.loss, Batch(*(t.to(hardware.device) for t in piece)))
        (world * part).backward()  # FSDP averages over processes: this makes it a sum
        loss += part.detach()
    return parallel.total(loss)


# ---- students
# recipe, mixer, layers that keep attention
STUDENTS = dict(pure=("mohawk", "mamba2", ()), hybrid=("mambainllama", "mamba2", (1,)))
# a recipe's stages and their steps
STEPS = dict(mohawk=dict(matrices=60, hidden=200, kl=5400, sft=0),
             mambainllama=dict(kl=5000, sft=0))
POSITIONS = 1024  # answer tokens whose logits are in memory at once: all would outweigh the rest
MATRIX_LENGTH = 128  # tokens of a row in orientation: memory grows with its square
START = dict.fromkeys(BUILT_IN, 0.15)  # a task's, see batches; others have none


def recomputed(function):
    """It keeps only its inputs, and runs again for its gradients."""
    return partial(torch.utils.checkpoint.checkpoint, function, use_reentrant=False)


def mean_over_answers(sum_of, student, teacher, batch):
    """Mean over answer tokens of sum_of(each model's logits (tokens, V), labels (tokens,))."""
    def sum_of_piece(labels, *states):
        return sum_of(*(lm.head(x).float() for lm, x in zip(models, states)), labels)
    counted, models = batch.labels != IGNORE, [lm for lm in (student, teacher) if lm]
    inputs = batch.labels, *(lm.last_state(batch.tokens) for lm in models)
    pieces = list(zip(*(u[counted].split(POSITIONS) for u in inputs)))
    function = recomputed(sum_of_piece) if len(pieces) > 1 else sum_of_piece
    return sum(itertools.starmap(function, pieces)) / counted.sum()


def sft(student, teacher, batch):
    """Fine-tuning on solutions, without a teacher: mean over answer tokens of -log p."""
    return mean_over_answers(partial(F.cross_entropy, reduction="sum"), student, None, batch)


def student_stages(steps, lr, direction):
    """The Stages that have steps, in their order."""
    def layers(loss, length, student, teacher, batch):
        return loss(student, teacher, batch.tokens[:, :length], batch.valid[:, :length])

    kl = partial(mean_over_answers, partial(divergence, direction=direction))
    stages = dict(matrices=(lr, partial(layers, matrix_loss, MATRIX_LENGTH), "rows", True),
                  hidden=(lr, partial(layers, hidden_loss, None), "tokens", True),
                  kl=(lr, kl), sft=(lr / 10, sft))
    return [Stage(name, steps[name], *rest) for name, rest in stages.items() if steps.get(name)]


# ---- first reading ends here: resuming, the picture of the matrices, options ----
class Progress:
    """Where the training of one model stands. Its folder has the settings in training.json and,
    until the end, weights, moments and POSITION in training.pt."""
    POSITION = "stage", "step", "tokens", "losses", "pictures"

    def __init__(self, folder, settings):
        """As the checkpoint says. ValueError if it is of another run."""
        self.folder, self.saved = Path(folder), None
        self.stage = self.step = self.tokens = 0  # step of the stage, tokens of all stages
        self.losses, self.pictures = [], {}  # since the last log line; for matrices.npz
        recorded, names, metrics = self.folder / "training.json", os.listdir(folder), []
        require(not names or recorded.exists() and "steps" in read_json(recorded),
                f"{folder} holds what this command did not make, or lost its training.json: "
                "choose another --out")
        begun = "training.pt" in names
        self.is_finished = "config.json" in names and not begun
        same_settings(recorded, settings, begun or self.is_finished)
        if begun:
            path = self.folder / "training.pt"
            with naming(f"{path} (delete it to start over)"):
                require(not zipfile.ZipFile(path).testzip(), "a checksum differs")
                self.saved = torch.load(path, weights_only=True, map_location="cpu")
                vars(self).update((name, self.saved["position"][name]) for name in self.POSITION)
            metrics = read_jsonl(self.folder / "metrics.jsonl", dict(tokens=int), torn=True)
            print(f"{folder}: going on at stage {self.stage + 1}, step {self.step}")
        parallel.wait()  # until all have read it
        if not parallel.rank() and not self.is_finished:
            write_json(recorded, settings)
            write_bytes(self.folder / "metrics.jsonl", b"".join(  # later lines will come again
                json_line(record) for record in metrics if record["tokens"] <= self.tokens))

    def save(self, lm, optimizer):
        state = parallel.whole_state(lm, optimizer)
        state["position"] = {name: getattr(self, name) for name in self.POSITION}
        if not parallel.rank():
            replace_file(self.folder / "training.pt", partial(torch.save, state))

    def enter(self, stage, lm, optimizer):
        """Begin a stage, the first time with what the checkpoint holds."""
        self.stage, self.began = stage, (time.perf_counter(), self.tokens)
        if self.saved:
            parallel.load_whole_state(lm, optimizer, self.saved)
            self.saved = None

    def log(self, stage, lr, norm):
        loss, seconds = sum(self.losses) / len(self.losses), time.perf_counter() - self.began[0]
        self.losses = []
        require(math.isfinite(loss), f"the loss of stage {stage.name} is {loss} at step "
                f"{self.step}: lower --lr or change --seed")
        speed = round((self.tokens - self.began[1]) / seconds)
        print(f"{self.folder.name} {stage.name} {self.step}/{stage.steps} | loss {loss:.4f} | grad "
              f"{norm:.2f} | lr {lr:.1e} | {speed:,} tokens/s | {seconds:.0f} s | eta "
              f"{seconds * (stage.steps / self.step - 1):.0f} s")
        if not parallel.rank():
            with open(self.folder / "metrics.jsonl", "ab") as file:
                file.write(json_line(dict(
                    stage=stage.name, step=self.step, steps=stage.steps, tokens=self.tokens,
                    loss=loss, grad_norm=norm, lr=lr, seconds=round(seconds, 2),
                    tokens_per_second=speed)))

    def picture(self, moment, models):
        """Keep how the example's tokens are mixed now."""
        if models.teacher:
            found = models.without_gradient(mixing_matrices, self.example)
            self.pictures |= dict(zip(("layer", "teacher", moment), found))

    def finish(self, lm, tokenizer):
        weights = parallel.whole_state(lm)["model"]
        if parallel.rank():
            return
        if self.pictures:
            tokens = [tokenizer.decode([i]) for i in self.example[0].tolist()]
            np.savez_compressed(content := io.BytesIO(), tokens=tokens, **self.pictures)
            write_bytes(self.folder / "matrices.npz", content.getvalue())
        tokenizer.save(self.folder)
        hub.write_checkpoint(self.folder, vars(lm.config), weights)
        (self.folder / "training.pt").unlink(missing_ok=True)


def mixing_matrices(student, teacher, tokens):
    """Of the middle replaced layer: index, matrices (3, L, L) of attention and of the mixer, given
    the teacher's hidden state; () if it has none."""
    layers = list(replaced(student, teacher, tokens))
    block, source, x, _, rope = layers[len(layers) // 2]
    if not hasattr(block.mixer, "mixing_matrix"):
        return ()
    return list(student.layers).index(block), *(
        layer.mixing_matrix(x, rope)[0, :3].half().cpu() for layer in (source, block))


@dataclass
class Hardware:
    """The options of where and how to compute: speed and memory, not what is learnt."""
    device: torch.device  # given as choose_device takes it
    dtype: torch.dtype  # likewise, of autocast: weights, moments and losses stay float32
    accumulate: int
    checkpoint_activations: bool
    compile: bool
    log_every: int
    save_every: int

    def __post_init__(self):
        self.device, self.dtype = choose_device(self.device, self.dtype)
        require(not self.compile or shutil.which(os.environ.get("CXX", "c++")),
                "--compile needs a C++ compiler: install g++, or set CXX")


def ready(lm, teacher, hardware):
    """Their Pair on its device. Weights keep their names."""
    models = parallel.Pair(lm, teacher)
    for block in models.blocks if hardware.compile else ():
        block.forward = torch.compile(block.forward)
    for block in lm.layers if hardware.checkpoint_activations else ():
        block.forward = recomputed(block.forward)
    return parallel.shard(models, hardware.device)


def train_in(folder, settings, pairs, stages, lm, teacher, hardware, start):
    """Train a model. settings: all that decides what it learns."""
    with parallel.exclusively(folder):
        progress = Progress(folder, settings)
        if progress.is_finished:
            LM.from_pretrained(folder)  # or an error, if its weights were lost
            print(f"{folder}: finished")
            return
        print(f"{folder}: {lm.num_parameters():,} parameters, steps", settings["steps"])
        long = next((p + a for p, a in pairs if len(p + a) >= 96), sum(pairs[0], []))
        progress.example = torch.tensor([long[:96]], device=hardware.device)
        for index, stage in enumerate(stages):
            stage.batches = batches(pairs, settings["batch_tokens"], lm.config.max_length,
                                    f"{settings['seed']} {index}", stage.steps, start)
        models = ready(lm, teacher, hardware)
        if not progress.tokens:
            progress.picture("transfer", models)
        train(progress, models, stages, hardware)
        progress.picture("end", models)
        progress.finish(lm, pairs.tokenizer)


def distill(folder, settings, pairs, source, hardware):
    """Make a student of the teacher in `source`."""
    teacher = LM.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
    torch.manual_seed(settings["seed"])
    lm = student_from(teacher, settings["mixers"], settings["d_state"], settings["transfer"])
    stages = student_stages(settings["steps"], settings["lr"], settings["kl"])
    train_in(folder, settings, pairs, stages, lm, teacher, hardware,
             START.get(settings["task"], 1.0))


# ---- options
def add_shared_options(parser):
    """Add the options that teacher.py has too."""
    add = parser.group("what to learn from")
    add_task_options(add)
    add("--seed", type=number(0, 2 ** 31), default=0, help="of weights and the data's order")
    add = parser.group("where and how to compute")
    add_device_options(add)
    add("--accumulate", type=number(1), default=1, help="pieces of a batch, for less memory")
    add("--checkpoint-activations", action="store_true", help="for less memory")
    add("--compile", action="store_true", help="use torch.compile")
    for option in "--log-every", "--save-every":
        add(option, type=number(1), default=100, help="steps")
    add("--out", default="out", help="models go to OUT/<name>")


def load_pairs(tokenizer, task, limit, subset_seed, prompt_file, only_right=False):
    """The Pairs of a task's worked solutions, and the settings that choose them."""
    problems = [p for p in load_task(task, "train") if p.solution and (
        not only_right or is_correct(extract_answer(p.solution) or "", p.answer))]
    require(problems, f"{task} has no {'right ' * only_right}worked solutions to train on: a "
            "column `solution`, or finished samples with a \\boxed{}")
    pairs = Pairs(choose_subset(problems, limit, subset_seed), tokenizer,
                  prompt_template(task, prompt_file))
    content = crc(Path(task).read_bytes()) if os.path.isfile(task) else None
    return pairs, dict(task=task, content=content, template=pairs.template, only_right=only_right,
                       limit=limit, subset_seed=subset_seed)


SUFFIX = dict(base="", small="-small", large="-large")  # of names, by --size


def task_for(size, task):
    """A large model's built-in task has numbers of six digits."""
    return "arithmetic6" if (size, task) == ("large", "arithmetic") else task


def built_in_teacher(folder, task):
    """The teacher in a folder; for arithmetic the one that ships is copied there."""
    assets = Path(__file__).parent / "assets" / folder.name
    if not parallel.rank() and not (folder / "config.json").exists():
        require(assets.exists() and task == "arithmetic" and not (
            folder / "training.pt").exists(), f"no finished teacher in {folder}: run python "
            "teacher.py, with the same --size, or use --teacher")
        print(f"{folder}: the teacher that ships")
        for file in sorted(assets.iterdir(), reverse=True):  # config.json is the last
            if not (folder / file.name).exists():
                replace_file(folder / file.name, partial(shutil.copyfile, file))
    parallel.wait()  # until it is there
    return str(folder)


def student_settings(name, config, task, recipe, mixer, layers, steps, scale, lr, batch_tokens):
    """How a student of a teacher of this Config is made: as asked for, or by its name and task."""
    student = STUDENTS.get(name.split("-")[0], STUDENTS["pure"])
    recipe, mixer = recipe or student[0], mixer or student[1]
    layers = student[2] if layers is None else layers
    mixers = [kept if i in layers else mixer for i, kept in enumerate(config.mixers)]
    require(mixers != config.mixers and {*layers} <= {*range(config.n_layers)},
            f"--attention-layers {layers}: nothing to distil; keep some, not all, of layers 0 "
            f"to {config.n_layers - 1}")
    steps = {stage: steps.get(stage, steps.get("all", round(count * scale)))
             for stage, count in STEPS[recipe].items()}
    require(not steps.get("matrices") or hasattr(MIXERS[mixer], "mixing_matrix"),
            f"--mixer {mixer} has no matrix to orient: add --steps matrices=0")
    # the built-in task's batches are cheap: it is updates that count
    usual = (5e-4, 768) if task == "arithmetic" else (2e-3 * min(1.0, 64 / config.d_model), 6144)
    return dict(recipe=recipe, mixers=mixers, steps=steps, lr=lr or usual[0],
                batch_tokens=batch_tokens or usual[1])


def layer_list(text):  # "0,2" or "none"
    return tuple(map(int, text.split(","))) if text != "none" else ()


def stage_steps(text):  # "kl=200", or "200" for all
    stage, _, count = text.rpartition("=")
    return stage or "all", number(0)(count)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.group("what to make")
    add("--student", nargs="+", type=folder_name, metavar="NAME", default=[*STUDENTS],
        help="defaults are hybrid's if it starts with hybrid, else pure's")
    add("--teacher", help="folder or Hugging Face repository of a Llama; default: OUT/teacher")
    add("--size", choices=SUFFIX, default="base", help="of the teacher, OUT/teacher-SIZE; "
        "students are then NAME-SIZE")
    add("--recipe", choices=STEPS, help="default: mohawk for pure, mambainllama for hybrid")
    add("--mixer", choices=[word for word, mixer in MIXERS.items() if mixer in FROM_ATTENTION],
        help="instead of attention; default: mamba2")
    add("--attention-layers", type=layer_list, metavar="I,J", help="that stay; default: none for "
        "pure, 1 for hybrid")
    add("--d-state", type=number(1, 65536), help="default: head_dim for mamba2, 16 for mamba")
    add("--random-mixers", action="store_true", help="do not transfer attention's weights")
    add = parser.group("how to learn")
    add("--steps", nargs="+", type=stage_steps, default=[], metavar="[STAGE=]N",
        help=f"of a stage or all; default, times --scale: {STEPS}")
    add("--scale", type=number(0, 1e6, float), default=1.0, help="of steps")
    add("--kl", choices=["forward", "reverse"], default="forward", help="which divergence")
    add("--lr", type=number(1e-9, 100, float), help="at its peak, twice for mixers; default: 5e-4 "
        "for arithmetic, else 2e-3, less above width 64")
    add("--batch-tokens", type=number(1), help="a step, with padding; default: 768 for arithmetic, "
        "else 6144")
    add("--only-right", action="store_true", help="leave out solutions with a wrong answer")
    add_shared_options(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    steps, suffix, task = dict(args.steps), SUFFIX[args.size], task_for(args.size, args.task)
    with parallel.processes(args.device):
        hardware = Hardware(*(getattr(args, name) for name in Hardware.__annotations__))
        source = args.teacher or built_in_teacher(Path(args.out, "teacher" + suffix), task)
        config = Config(**hub.read_config(source))
        students = {name + suffix: student_settings(
            name, config, task, args.recipe, args.mixer, args.attention_layers, steps,
            args.scale, args.lr, args.batch_tokens) for name in args.student}
        stages = {"all"}.union(*(student["steps"] for student in students.values()))
        for stage in steps:
            require(stage in stages, f"--steps {stage}=...: choose of {', '.join(sorted(stages))}")
        pairs, data = load_pairs(load_tokenizer(source), task, args.limit, args.subset_seed,
                                 args.prompt_file, args.only_right)
        data |= dict(teacher=hub.fingerprint(source), d_state=args.d_state, kl=args.kl,
                     transfer=not args.random_mixers, seed=args.seed)
        parallel.run_all([partial(distill, os.path.join(args.out, name), student | data, pairs,
                                  source, hardware) for name, student in students.items()],
                         hardware.device)


if __name__ == "__main__":
    run(main, "--batch-tokens, or raise --accumulate")
