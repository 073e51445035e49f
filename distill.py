"""Turn a Transformer into Mamba students: MOHAWK for the pure one, MambaInLlama for the hybrid one.

    python distill.py                           the tiny teacher, then both students, in out/
    python distill.py --student hybrid --attention-layers 0,2 --steps kl=2000
    python distill.py --teacher folder --task gsm8k --student pure
    torchrun --nproc_per_node=8 distill.py ...  the same training on eight GPUs

Reads   a teacher's checkpoint (the built-in task's ships with the repository), a task
Writes  out/<name>/: config.json, model.safetensors, tokenizer; training.json, the settings;
        metrics.jsonl, the training curves; matrices.npz, how attention became a Mamba
The same command goes on with a killed run from its last checkpoint.
"""
import dataclasses
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

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.nn.utils.rnn import pad_sequence

import hub
import parallel
from common import (Parser, choose_device, crc, folder_name, json_line, number,
                    replace_file, run, same_settings, write_bytes, write_json)
from data import Pairs, choose_subset, load_task, load_tokenizer, prompt_template
from grade import extract_answer, is_correct
from model import FROM_ATTENTION, LM, MIXERS, Config, student_from, weight_dtype

IGNORE = -100  # label of a position whose prediction does not count


# ---- losses
def kl_loss(student_logits, teacher_logits, labels, direction="forward"):
    """Mean over answer tokens of a KL divergence of next-token distributions, in float32.

    "forward" is KL(teacher || student) = sum_v p_T (log p_T - log p_S): the student pays for what
    it does not cover (MambaInLlama). "reverse" is KL(student || teacher): for what the teacher
    would not say (M1). The teacher gets no gradient. logits (B, L, V), labels (B, L) -> scalar.
    """
    counted = labels != IGNORE
    student = F.log_softmax(student_logits[counted].float(), dim=-1)  # (tokens, V)
    teacher = F.log_softmax(teacher_logits[counted].detach().float(), dim=-1)
    if direction == "reverse":
        student, teacher = teacher, student  # F.kl_div(q, p) is KL(p || q)
    return F.kl_div(student, teacher, log_target=True, reduction="sum") / counted.sum()


def replaced(student, teacher):
    """The layers, as indices, whose mixer is of another class than the teacher's."""
    return [i for i, block in enumerate(student.layers)
            if type(block.mixer) is not type(teacher.layers[i].mixer)]


@torch.no_grad()
def teacher_states(teacher, tokens):
    """The residual stream (B, L, d_model) before each layer and after the last, and the rope."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, L)
    return list(teacher.hidden_states(tokens)), teacher.rope(positions)


def matrix_loss(student, teacher, tokens, valid):
    """MOHAWK's first stage, orientation: how far T is from attention, as matrices over time.

    Sum over replaced layers of the mean over batch and heads of || T - attention ||_F, both given
    the teacher's hidden state, without rows of padding. In float32 also under autocast.
    tokens (B, L), valid (B, L) bool -> scalar.
    """
    loss = 0.0
    with torch.autocast(tokens.device.type, enabled=False):
        states, rope = teacher_states(teacher, tokens)
        for i in replaced(student, teacher):
            with torch.no_grad():
                attention = teacher.layers[i].mixing_matrix(states[i], rope)  # (B, H, L, L)
            difference = student.layers[i].mixing_matrix(states[i], rope) - attention
            difference = difference * valid[:, None, :, None]
            loss = loss + difference.square().sum((2, 3)).sqrt().mean()
    return loss


def hidden_loss(student, teacher, tokens, valid):
    """MOHAWK's second stage, alignment: how far each block's output is from its teacher's.

    Sum over replaced layers of the mean over tokens of || block(h) - teacher's block(h) ||_2, with
    h the teacher's hidden state: layers learn in parallel, errors do not add up. -> scalar.
    """
    (states, rope), loss = teacher_states(teacher, tokens), 0.0
    for i in replaced(student, teacher):
        difference = student.layers[i](states[i], rope).float() - states[i + 1].float()
        loss = loss + (difference.norm(dim=-1) * valid).sum() / valid.sum()  # norm: (B, L)
    return loss


# ---- batches
class Batch(NamedTuple):
    """Sequences, padded on the right, where a causal model's real tokens cannot see it.

    labels[t] is what position t predicts, tokens[t + 1], if that is of the answer, else IGNORE: its
    first token counts (M1's code masks by the label at t, and loses it), and the stop token.
    """
    tokens: torch.Tensor  # (B, L)
    labels: torch.Tensor  # (B, L)
    valid: torch.Tensor  # (B, L): which tokens are real

    def size(self, of):
        """How many rows, tokens or answers (tokens with a label) it has."""
        if of == "rows":
            return len(self.valid)
        return int((self.valid if of == "tokens" else self.labels != IGNORE).sum())

    def piece(self, index, count, of):
        """Piece `index` of `count`, rows dealt out like cards, and its share of the rows, tokens or
        answers. Pieces beyond the last row are the first one, with a share of 0."""
        beyond = index >= len(self.valid)
        piece = Batch(*(t[:1] if beyond else t[index::count] for t in self))
        share = 0.0 if beyond else piece.size(of) / self.size(of)
        return Batch(*(t[:, :int(piece.valid.sum(1).max())] for t in piece)), share


def collate(pairs):
    """The Batch of some (prompt ids, answer ids)."""
    def padded(rows, value):
        return pad_sequence([torch.tensor(row) for row in rows], True, value)
    tokens = [prompt + answer for prompt, answer in pairs]
    labels = [[IGNORE] * (len(prompt) - 1) + answer + [IGNORE] for prompt, answer in pairs]
    valid = [[True] * len(row) for row in tokens]
    return Batch(padded(tokens, 0), padded(labels, IGNORE), padded(valid, False))


def batches(pairs, tokens_per_batch, max_length, seed, share=lambda step: 1.0):
    """Endless Batches of (prompt, answer) pairs, always the same ones for a seed.

    Sequences of like length go together: at most tokens_per_batch with padding, or one alone.
    share(step): take only sequences up to this share of the longest, see curriculum.
    """
    def length(pair):
        return len(pair[0]) + len(pair[1])
    rng, step = random.Random(seed), 0
    while True:
        before, order = step, rng.sample(range(len(pairs)), len(pairs))
        for start in range(0, len(order), 512):
            pool = sorted((pairs[i] for i in order[start:start + 512]), key=length)
            pool = [pair for pair in pool if length(pair) <= max_length]
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
            raise ValueError(f"every solution is longer than max_length = {max_length} tokens")


def curriculum(steps, start):
    """Length as a share of the longest: grows from `start` to 1 over the first half of a stage.

    It halves the KL that the same budget reaches (commit a4bed8b).
    """
    return lambda step: min(1.0, start + (1 - start) * step / max(1, 0.5 * steps))


# ---- the training loop
@dataclass
class Stage:
    """A stretch of training with one loss(student, teacher, batch) -> scalar."""
    name: str
    steps: int
    lr: float  # at its peak
    loss: Callable
    mean_over: str = "answers"  # what the loss is a mean over: rows, tokens or answers
    mixers_only: bool = False  # all else is frozen
    batches: Iterator = None  # endless


def learning_rate(step, steps, peak):
    """Warm-up, stable, decay: up from 0 over the first 5% of the steps, down over the last 40%."""
    return peak * min(1.0, (step + 1) / max(1, 0.05 * steps), (steps - step) / max(1, 0.4 * steps))


def make_optimizer(lm, lr):
    """AdamW. Only matrices decay: gains and memory lengths would be pulled to an arbitrary 0."""
    matrices, others = dict(params=[], weight_decay=0.1), dict(params=[], weight_decay=0.0)
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.dim() > 1 and weight_dtype(lm, name, None) is None
            (matrices if is_matrix else others)["params"].append(parameter)
    return torch.optim.AdamW([matrices, others], lr=lr, betas=(0.9, 0.95), fused=True)


def train(progress, pair, stages, hardware):
    """Run the stages, from where `progress` stands."""
    lm = pair.lm
    for index, stage in list(enumerate(stages))[progress.stage:]:
        lm.requires_grad_(not stage.mixers_only)
        for i in replaced(lm, pair.teacher) if stage.mixers_only else ():
            lm.layers[i].mixer.requires_grad_(True)
        optimizer = make_optimizer(lm, stage.lr)
        progress.enter(index, lm, optimizer)
        for batch in itertools.islice(stage.batches, progress.step, stage.steps):
            lr = learning_rate(progress.step, stage.steps, stage.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = gradient(pair, stage, batch, hardware)
            norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.step += 1
            progress.tokens += batch.size("tokens")
            progress.losses.append(float(loss))
            if progress.step % hardware.log_every == 0 or progress.step == stage.steps:
                progress.log(stage, lr, norm)
            if progress.step % hardware.save_every == 0:
                progress.save(lm, optimizer)
        progress.step = 0
        if stage.name == "matrices":
            progress.picture("orientation", pair)


def gradient(pair, stage, batch, hardware):
    """The loss of a batch, after adding its gradient to the parameters. The pieces of all
    processes, weighted by their shares, add up to the whole batch."""
    world, loss = parallel.world(), torch.zeros((), device=hardware.device)
    count = world * min(hardware.accumulate, math.ceil(len(batch.valid) / world))
    for index in range(parallel.rank(), count, world):
        piece, share = batch.piece(index, count, stage.mean_over)
        with torch.autocast(hardware.device.type, torch.bfloat16, cache_enabled=False,
                            enabled=hardware.dtype == torch.bfloat16):
            part = share * pair(stage.loss, Batch(*(t.to(hardware.device) for t in piece)))
        (world * part).backward()  # FSDP averages over processes: this makes it a sum
        loss += part.detach()
    return parallel.total(loss)


# ---- students
# The built-in experiment's students: recipe, mixer, layers that keep attention.
STUDENTS = dict(pure=("mohawk", "mamba2", ()), hybrid=("mambainllama", "mamba2", (1,)))
# Each recipe's stages and their steps. MambaInLlama is weight transfer and KL alone.
STEPS = dict(mohawk=dict(matrices=60, hidden=200, kl=4400, sft=0),
             mambainllama=dict(kl=4500, sft=0))
MATRIX_LENGTH = 128  # tokens of a sequence in orientation, whose memory grows with its square
START = dict(arithmetic=0.15)  # a task's curriculum; others have none


def sft(student, teacher, batch):
    """Fine-tuning on written solutions, without a teacher: mean over answer tokens of -log p."""
    logits = student(batch.tokens).float().flatten(0, 1)  # (B L, V)
    return F.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE)


def student_stages(steps, lr, direction):
    """The stages of a student's training, in their order; those of no steps are left out."""
    def matrices(student, teacher, batch):
        cut = slice(None), slice(MATRIX_LENGTH)
        return matrix_loss(student, teacher, batch.tokens[cut], batch.valid[cut])

    def hidden(student, teacher, batch):
        return hidden_loss(student, teacher, batch.tokens, batch.valid)

    def kl(student, teacher, batch):
        with torch.no_grad():
            target = teacher(batch.tokens)
        return kl_loss(student(batch.tokens), target, batch.labels, direction)

    stages = dict(matrices=(lr, matrices, "rows", True), hidden=(lr, hidden, "tokens", True),
                  kl=(lr, kl), sft=(lr / 10, sft))
    return [Stage(name, steps[name], *rest) for name, rest in stages.items() if steps.get(name)]


# ---- first reading ends here: resuming, the picture of the matrices, options ----
class Progress:
    """Where the training of one model stands. Its folder has the settings in training.json and,
    until the model is finished, weights, moments and the POSITION in training.pt."""
    POSITION = "stage", "step", "tokens", "losses", "logged", "pictures"

    def __init__(self, folder, settings):
        """As a checkpoint there says. ValueError if the folder is of another run."""
        self.folder, self.saved = Path(folder), None
        self.stage, self.step, self.tokens = 0, 0, 0  # step of the stage, tokens of all stages
        self.losses, self.logged = [], 0  # since the last log line; bytes of metrics.jsonl
        self.pictures = {}  # for matrices.npz, of the tokens in self.example, (1, L)
        names = os.listdir(folder)
        if names and "training.json" not in names:
            raise ValueError(f"{folder} holds what this command did not make: choose another --out")
        begun, finished = "training.pt" in names, "config.json" in names
        same_settings(self.folder / "training.json", settings, begun or finished)
        self.is_finished = finished and not begun
        if begun:
            self.load(self.folder / "training.pt")
        parallel.wait()  # until all have read it
        if not parallel.rank() and not self.is_finished:
            write_json(self.folder / "training.json", settings)
            with open(self.folder / "metrics.jsonl", "ab") as f:
                f.truncate(min(self.logged, f.tell()))  # what came later will be logged again

    def load(self, path):
        try:
            if zipfile.ZipFile(path).testzip():  # a checksum differs
                raise zipfile.BadZipFile
            self.saved = torch.load(path, weights_only=True, map_location="cpu")
            vars(self).update((name, self.saved["position"][name]) for name in self.POSITION)
        except Exception as error:
            raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__}): "
                             f"delete it to start over") from None
        print(f"{self.folder}: going on at stage {self.stage + 1}, step {self.step}", flush=True)

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
        """A line for the reader, and the same in metrics.jsonl for plot.py."""
        loss, seconds = sum(self.losses) / len(self.losses), time.perf_counter() - self.began[0]
        if not math.isfinite(loss):
            raise ValueError(f"the loss of stage {stage.name} is {loss} at step {self.step}: "
                             f"lower --lr or try another --seed")
        record = dict(stage=stage.name, step=self.step, steps=stage.steps, tokens=self.tokens,
                      loss=loss, grad_norm=float(norm), lr=lr, seconds=round(seconds, 2),
                      tokens_per_second=round((self.tokens - self.began[1]) / seconds))
        print("{} {stage} {step}/{steps} | loss {loss:.4f} | grad {grad_norm:.2f} | lr {lr:.1e} | "
              "{tokens_per_second:,} tokens/s | {seconds:.0f} s | eta {:.0f} s".format(
                  self.folder.name, seconds * (stage.steps / self.step - 1), **record), flush=True)
        self.losses = []
        if not parallel.rank():
            with open(self.folder / "metrics.jsonl", "ab") as f:
                f.write(json_line(record))
                self.logged = f.tell()

    def picture(self, moment, pair):
        """Keep how the example's tokens are mixed now."""
        if pair.teacher:
            found = parallel.without_gradient(pair, mixing_matrices, self.example)
            self.pictures |= dict(zip(("layer", "teacher", moment), found))

    def finish(self, lm, tokenizer):
        weights = parallel.whole_state(lm)["model"]
        if not parallel.rank():
            if self.pictures:
                tokens = [tokenizer.decode([i]) for i in self.example[0].tolist()]
                np.savez_compressed(content := io.BytesIO(), tokens=tokens, **self.pictures)
                write_bytes(self.folder / "matrices.npz", content.getvalue())
            tokenizer.save(self.folder)
            hub.write_checkpoint(self.folder, dataclasses.asdict(lm.config), weights)
            (self.folder / "training.pt").unlink(missing_ok=True)
        parallel.wait()  # the others may read it next


def mixing_matrices(student, teacher, tokens):
    """The middle replaced layer and, given the teacher's hidden state there, the matrices (3, L, L)
    float16 of attention and of the mixer; () if it has none."""
    layers = replaced(student, teacher)
    layer = layers[len(layers) // 2]
    if not getattr(student.layers[layer].mixer, "mixing_matrix", None):
        return ()
    states, rope = teacher_states(teacher, tokens)
    return layer, *(lm.layers[layer].mixing_matrix(states[layer], rope)[0, :3].half().cpu()
                    for lm in (teacher, student))


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
        if self.compile and not shutil.which(os.environ.get("CXX", "c++")):
            raise ValueError("--compile needs a C++ compiler: install g++, or set CXX")


def ready(lm, teacher, hardware):
    """Their Pair on its device. Blocks get another forward: the names of weights stay the same."""
    pair = parallel.Pair(lm, teacher)
    for block in pair.blocks if hardware.compile else ():
        block.forward = torch.compile(block.forward)
    for block in lm.layers if hardware.checkpoint_activations else ():
        block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward,
                                use_reentrant=False)
    return parallel.shard(pair, hardware.device)


def train_in(folder, settings, pairs, stages, lm, teacher, hardware, start=1.0):
    """Train a model, with or without a teacher, and save it in `folder`. settings: all that decides
    what is learnt. start: see curriculum."""
    with parallel.exclusively(folder):
        progress = Progress(folder, settings)
        if progress.is_finished:
            LM.from_pretrained(folder)  # or an error, if its weights were lost
            print(f"{folder}: finished", flush=True)
            return
        print(f"{folder}: {lm.num_parameters():,} parameters, steps", settings["steps"], flush=True)
        # to draw: the first 96 tokens of the first solution that has them
        ids = next((p + a for p, a in pairs if len(p + a) >= 96), sum(pairs[0], []))[:96]
        progress.example = torch.tensor([ids], device=hardware.device)
        for index, stage in enumerate(stages):
            stage.batches = batches(pairs, settings["batch_tokens"], lm.config.max_length,
                                    f"{settings['seed']} {index}", curriculum(stage.steps, start))
        pair = ready(lm, teacher, hardware)
        if progress.tokens == 0:
            progress.picture("transfer", pair)
        train(progress, pair, stages, hardware)
        progress.picture("end", pair)
        progress.finish(lm, pairs.tokenizer)


def distill(folder, settings, pairs, source, hardware):
    """Make a student of the teacher in `source`: transfer the weights, then run the stages."""
    teacher = LM.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
    torch.manual_seed(settings["seed"])
    lm = student_from(teacher, settings["mixers"], settings["d_state"], settings["transfer"])
    stages = student_stages(settings["steps"], settings["lr"], settings["kl"])
    start = START.get(settings["task"], 1.0)
    train_in(folder, settings, pairs, stages, lm, teacher, hardware, start)


# ---- options
def add_shared_options(parser):
    """Add the options that teacher.py has too."""
    add = parser.add_argument_group("what to learn from").add_argument
    add("--task", default="arithmetic", help="gsm8k, openmath2, openmath2[1000:2000], or a .jsonl "
        "file of problems with solutions, or of samples")
    add("--limit", type=number(1), help="how many problems; default: all")
    add("--subset-seed", type=number(0), help="take them at random; default: the first")
    add("--prompt-file", help="text around {question}; default: nothing for arithmetic, else an "
        "instruction to reason")
    add = parser.add_argument_group("where and how to compute").add_argument
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--dtype", choices=["float32", "bfloat16"], help="of autocast; default: bfloat16 on cuda, "
        "else float32")
    add("--accumulate", type=number(1), default=1, help="pieces of a batch: less memory")
    add("--checkpoint-activations", action="store_true", help="compute twice: less memory")
    add("--compile", action="store_true", help="use torch.compile")
    add("--log-every", type=number(1), default=100, help="steps between log lines")
    add("--save-every", type=number(1), default=100, help="steps between checkpoints")
    add("--out", default="out", help="models go to OUT/<name>")


def load_pairs(tokenizer, task, limit, subset_seed, prompt_file, only_right=False):
    """The Pairs of a task's worked solutions, and the settings that choose them."""
    problems = [problem for problem in load_task(task, "train") if problem.solution and (
        not only_right or is_correct(extract_answer(problem.solution) or "", problem.answer))]
    if not problems:
        raise ValueError(f"{task} has no {'right ' * only_right}worked solutions to train on: a "
                         f"column `solution`, or finished samples with a \\boxed{{}} answer")
    template = prompt_template(task, prompt_file)
    content = crc(Path(task).read_bytes()) if os.path.isfile(task) else None
    settings = dict(task=task, content=content, template=template, only_right=only_right,
                    limit=limit, subset_seed=subset_seed)
    return Pairs(choose_subset(problems, limit, subset_seed), tokenizer, template), settings


SUFFIX = dict(base="", small="-small")  # of names, by --size


def built_in_teacher(folder, task):
    """The teacher in a folder, where for arithmetic the one that ships is copied to."""
    if not parallel.rank() and not (folder / "config.json").exists():
        if task != "arithmetic" or (folder / "training.pt").exists():
            raise ValueError(f"no finished teacher in {folder}: run python teacher.py, or name one "
                             f"with --teacher")
        print(f"{folder}: the teacher that ships", flush=True)
        assets = Path(__file__).resolve().parent / "assets" / folder.name
        for file in sorted(assets.iterdir(), reverse=True):  # config.json is the last
            replace_file(folder / file.name, partial(shutil.copyfile, file))
    parallel.wait()  # until it is there
    return str(folder)


def student_settings(name, config, task, recipe, mixer, layers, steps, scale, lr, batch_tokens):
    """What decides how a student of a teacher of this Config is made: as asked for, or by its name
    and task. (The built-in task has many small steps: updates count, its batches are cheap.)"""
    defaults = STUDENTS.get(name.split("-")[0], STUDENTS["pure"])
    recipe, mixer = recipe or defaults[0], mixer or defaults[1]
    layers = defaults[2] if layers is None else layers
    mixers = [kept if i in layers else mixer for i, kept in enumerate(config.mixers)]
    if not set(layers) <= set(range(config.n_layers)) or mixers == config.mixers:
        raise ValueError(f"--attention-layers {layers}: nothing to distil; name some, not all, of "
                         f"the teacher's layers 0 to {config.n_layers - 1}")
    steps = {stage: steps.get(stage, steps.get("all", round(count * scale)))
             for stage, count in STEPS[recipe].items()}
    if steps.get("matrices") and not getattr(MIXERS[mixer], "mixing_matrix", None):
        raise ValueError(f"--mixer {mixer} has no matrix to orient: add --steps matrices=0")
    built_in = task == "arithmetic"
    return dict(recipe=recipe, mixers=mixers, steps=steps,
                lr=lr or (5e-4 if built_in else 2e-3 * min(1.0, 64 / config.d_model)),
                batch_tokens=batch_tokens or (768 if built_in else 6144))


def layer_list(text):
    """"0,2" -> (0, 2), "none" -> ()."""
    return tuple(map(int, text.split(","))) if text != "none" else ()


def stage_steps(text):
    """"kl=200" -> ("kl", 200), "200" -> ("all", 200)."""
    stage, _, count = text.rpartition("=")
    return stage or "all", number(0)(count)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument_group("what to make").add_argument
    add("--student", nargs="+", type=folder_name, metavar="NAME", default=["pure", "hybrid"],
        help="a name that does not start with hybrid has pure's defaults")
    add("--teacher", help="a Llama, folder or Hugging Face repository; default: OUT/teacher, for "
        "arithmetic a copy of the one that ships")
    add("--size", choices=SUFFIX, default="base", help="small: OUT/teacher-small, NAME-small")
    add("--recipe", choices=STEPS, help="default: mohawk for pure, mambainllama for hybrid")
    add("--mixer", choices=[word for word, mixer in MIXERS.items() if mixer in FROM_ATTENTION],
        help="what replaces attention; default: mamba2")
    add("--attention-layers", type=layer_list, metavar="I,J", help="layers to keep, or none; "
        "default: none for pure, 1 for hybrid")
    add("--d-state", type=number(1, 65536), help="state size; default: head_dim for mamba2, 16 for "
        "mamba")
    add("--random-mixers", action="store_true", help="do not transfer attention's weights")
    add = parser.add_argument_group("how to learn").add_argument
    add("--steps", nargs="+", type=stage_steps, default=[], metavar="[STAGE=]N",
        help=f"of a stage, or of all; default, times --scale: {STEPS}")
    add("--scale", type=number(0, 1e6, float), default=1.0, help="of default steps")
    add("--kl", choices=["forward", "reverse"], default="forward", help="which divergence")
    add("--lr", type=number(1e-9, 100, float), help="peak learning rate; default: 5e-4 for "
        "arithmetic, else 2e-3, less above a width of 64")
    add("--batch-tokens", type=number(1), help="tokens a step, padding included; default: 768 for "
        "arithmetic, else 6144")
    add("--seed", type=number(0, 2 ** 31), default=0, help="of initialisation and the data's order")
    add("--only-right", action="store_true", help="leave out solutions with a wrong answer")
    add_shared_options(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    steps, suffix = dict(args.steps), SUFFIX[args.size]
    with parallel.processes(args.device):
        hardware = Hardware(*choose_device(args.device, args.dtype), args.accumulate,
                            args.checkpoint_activations, args.compile, args.log_every,
                            args.save_every)
        source = args.teacher or built_in_teacher(Path(args.out, "teacher" + suffix), args.task)
        config = Config(**hub.read_config(hub.checkpoint_folder(source)))
        students = {name: student_settings(
            name, config, args.task, args.recipe, args.mixer, args.attention_layers, steps,
            args.scale, args.lr, args.batch_tokens) for name in args.student}
        stages = {"all"}.union(*(student["steps"] for student in students.values()))
        if unknown := steps.keys() - stages:
            raise ValueError(f"--steps {min(unknown)}=...: choose of {', '.join(sorted(stages))}")
        pairs, data = load_pairs(load_tokenizer(source), args.task, args.limit, args.subset_seed,
                                 args.prompt_file, args.only_right)
        data |= dict(teacher=hub.fingerprint(source), d_state=args.d_state, kl=args.kl,
                     transfer=not args.random_mixers, seed=args.seed)
        parallel.run_all([partial(distill, os.path.join(args.out, name + suffix), student | data,
                                  pairs, source, hardware) for name, student in students.items()],
                         hardware.device)


if __name__ == "__main__":
    run(main, "--batch-tokens, or raise --accumulate")
