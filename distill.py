"""Turn a Transformer into Mamba students: MOHAWK for the pure one, MambaInLlama for the hybrid one.

    python distill.py                                     the tiny teacher, then both students, into out/
    python distill.py --student hybrid --attention-layers 0,2 --kl forward
    python distill.py --teacher folder --task file.jsonl --student pure --mixer mamba2

Reads   a teacher's checkpoint (the repository ships the built-in task's; --pretrain trains it anew), a task
Writes  out/<name>/: config.json, model.safetensors, tokenizer; metrics.jsonl (the training curves); training.json
A killed run goes on from its last checkpoint when the same command is run again, and ends where it would have ended.

Contents: losses, batches, schedule and optimiser, the training loop with its checkpoints, recipes, the script.
"""
import argparse
import dataclasses
import itertools
import json
import os
import pickle
import random
import shutil
import time

import torch
import torch.nn.functional as F

from data import Parser, at_least, load_task, load_tokenizer, read_json, refuse_other_settings, run, write_json
from model import LM, Attention, Config, Mamba, choose_device, fingerprint, student_from

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
                target = source.mix().matrix(source.input_layernorm(x), rope)  # (B, H, L, L)
            difference = (block.mix().matrix(block.input_layernorm(x), rope) - target) * valid[:, None, :, None]
            loss = loss + difference.square().sum((2, 3)).sqrt().mean()
    return loss


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
def batches(problems, tokenizer, tokens_per_batch, max_length, seed, share=lambda step: 1.0):
    """Endless batches of worked solutions: (tokens (B, L), labels (B, L), valid (B, L)), always the same for a seed.

    Sequences of similar length go together, so that little is padded; rows are padded on the right, where a causal
    model's real tokens cannot see it. B x L is at most tokens_per_batch (a longer sequence comes alone).
    share(step): keep only sequences up to this share of the longest, see `curriculum`.
    """
    rng, step = random.Random(seed), 0
    while True:
        before = step
        order = rng.sample(range(len(problems)), len(problems))
        for pool in (order[i:i + 512] for i in range(0, len(order), 512)):
            pairs = [(tokenizer.chat(problems[i].question), tokenizer.encode(problems[i].solution) + tokenizer.eos_ids[:1])
                     for i in pool]
            pairs = sorted((p for p in pairs if length_of(p) <= max_length), key=length_of)
            kept = [p for p in pairs if length_of(p) <= share(step) * length_of(pairs[-1])]
            groups = list(split_by_tokens(kept or pairs, tokens_per_batch))
            rng.shuffle(groups)
            for group in groups:
                yield collate(group)
                step += 1
        if step == before:
            raise ValueError(f"every worked solution is longer than the model's max_length = {max_length} tokens")


def curriculum(steps, start=0.15, until=0.5):
    """Sequence length as a share of the longest, step by step: grows from `start` to 1 over the first half of a stage.

    Short chains have their questions near: what is to be looked up is learnt there, then stretched. A pure student
    trained on full length from the start does not learn to look up at all within the built-in experiment's budget.
    """
    return lambda step: min(1.0, start + (1 - start) * step / max(1, until * steps))


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


# ------------------------------------------------------------------------------------------------ training
@dataclasses.dataclass
class Stage:
    """A stretch of training with one loss: loss(lm, tokens, labels, valid) -> scalar."""
    name: str
    lr: float
    loss: object
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

    def path(self, name):
        return os.path.join(self.folder, name)

    def is_finished(self):
        return os.path.exists(self.path("config.json")) and not os.path.exists(self.path("training.pt"))

    def save(self, lm, optimizer):
        position = dict(stage=self.stage, step=self.step, tokens=self.tokens, losses=[float(loss) for loss in self.losses])
        torch.save(dict(model=lm.state_dict(), optimizer=optimizer.state_dict(), rng=torch.get_rng_state(),
                        position=position), self.path("training.pt.tmp"))
        os.replace(self.path("training.pt.tmp"), self.path("training.pt"))

    def load(self, lm):
        """Restore weights and position; returns the optimiser's state, or None at the very beginning."""
        path = self.path("training.pt")
        if not os.path.exists(path):
            os.makedirs(self.folder, exist_ok=True)
            write_json(self.path("training.json"), self.settings)
            write_lines(self.path("metrics.jsonl"), [])
            return None
        try:
            saved = torch.load(path, weights_only=True, map_location=lm.device)
        except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__}): delete it to start over")
        lm.load_state_dict(saved["model"])
        torch.set_rng_state(saved["rng"].cpu())
        self.__dict__.update(saved["position"])
        lines = [line for line in open(self.path("metrics.jsonl")) if line.endswith("\n")]
        write_lines(self.path("metrics.jsonl"), [line for line in lines if json.loads(line)["tokens"] <= self.tokens])
        print(f"{self.folder}: going on at stage {self.stage + 1}, step {self.step}", flush=True)
        return saved["optimizer"]

    def finish(self, lm, tokenizer):
        tokenizer.save(self.folder)
        lm.save_pretrained(self.folder)
        if os.path.exists(self.path("training.pt")):
            os.remove(self.path("training.pt"))


def write_lines(path, lines):
    with open(path + ".tmp", "w") as f:
        f.writelines(lines)
    os.replace(path + ".tmp", path)


def train(run, lm, stages, make_batches, args):
    """Run the stages that are left of a Run, from where it stands. make_batches(index, steps) -> a stage's batches."""
    optimizer_state = run.load(lm)
    for index in range(run.stage, len(stages)):
        stage = stages[index]
        train_only_mixers(lm, stage.mixers_only)
        optimizer = make_optimizer(lm, stage.lr)
        if optimizer_state:
            optimizer.load_state_dict(optimizer_state)
            optimizer_state = None
        train_stage(run, lm, stage, optimizer, itertools.islice(make_batches(index, stage.steps), run.step, None), args)
        run.stage, run.step = index + 1, 0
    train_only_mixers(lm, False)


def train_stage(run, lm, stage, optimizer, data, args):
    """The training loop: one step per batch, one log line per interval, a checkpoint now and then."""
    clock, began, tokens_before = time.perf_counter, time.perf_counter(), run.tokens
    for tokens, labels, valid in itertools.islice(data, stage.steps - run.step):
        tokens, labels, valid = (t.to(args.device) for t in (tokens, labels, valid))
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == torch.bfloat16):
            loss = stage.loss(lm, tokens, labels, valid)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.step, stage.steps, stage.lr)
        norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.step, run.tokens = run.step + 1, run.tokens + int(valid.sum())
        run.losses.append(loss.detach())
        if run.step % args.log_every == 0 or run.step == stage.steps:
            seconds = clock() - began
            log(run, stage, sum(map(float, run.losses)) / len(run.losses), norm.item(), optimizer.param_groups[0]["lr"],
                (run.tokens - tokens_before) / seconds, seconds)
            run.losses = []
        if run.step % args.save_every == 0 and run.step < stage.steps:
            run.save(lm, optimizer)


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
    with open(run.path("metrics.jsonl"), "a") as f:
        f.write(json.dumps(record) + "\n")


# ------------------------------------------------------------------------------------------------ recipes
TEACHER_ASSET = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "teacher")
RECIPES = ("mohawk", "mambainllama")
# The two students of the built-in experiment: how each is made, with which mixer, and which layers keep attention.
STUDENTS = dict(pure=("mohawk", "mamba2", ()), hybrid=("mambainllama", "mamba2", (1,)))
# The stages of a recipe and their steps at --scale 1. MambaInLlama is weight transfer and KL alone.
STEPS = dict(mohawk=dict(matrices=20, hidden=60, kl=420, sft=0), mambainllama=dict(kl=420, sft=0))


def student_stages(student, teacher, args, steps):
    """The stages of a student's training, in order; those of zero steps are left out."""
    def kl(lm, tokens, labels, valid):
        with torch.no_grad():
            target = teacher(tokens)
        return kl_loss(lm(tokens), target, labels, args.kl)

    every = dict(
        matrices=Stage("matrices", args.lr, mixers_only=True, loss=lambda lm, tokens, labels, valid: matrix_loss(
            lm, teacher, tokens[:, :args.matrix_length], valid[:, :args.matrix_length])),
        hidden=Stage("hidden", args.lr, mixers_only=True, loss=lambda lm, tokens, labels, valid: hidden_loss(
            lm, teacher, tokens, valid)),
        kl=Stage("kl", args.lr, kl),
        sft=Stage("sft", args.lr / 10, lambda lm, tokens, labels, valid: cross_entropy_loss(lm(tokens), labels)),
    )
    if steps.get("matrices") and any(isinstance(block.mix(), Mamba) for block in student.layers):
        raise ValueError("matrix orientation needs --mixer mamba2: Mamba-1 has one decay per channel and state, not one "
                         "matrix per head; use --matrices-steps 0 with --mixer mamba")
    return [dataclasses.replace(every[name], steps=count) for name, count in steps.items() if count]


def get_teacher(args):
    """The folder of the teacher: --teacher, or out/teacher, which is filled from assets/ or by pre-training."""
    if args.teacher:
        return args.teacher
    folder = os.path.join(args.out, "teacher")
    if args.task == "arithmetic" and not args.pretrain:
        if os.path.exists(os.path.join(folder, "training.pt")):
            raise ValueError(f"{folder} holds an unfinished pre-training: go on with --pretrain, or delete that folder")
        if not os.path.exists(os.path.join(folder, "config.json")):
            print(f"teacher: the one that ships in assets/teacher, copied to {folder} (--pretrain trains a new one)")
            shutil.copytree(TEACHER_ASSET, folder + ".tmp", dirs_exist_ok=True)
            os.replace(folder + ".tmp", folder)
        return folder
    pretrain(folder, args)
    return folder


def pretrain(folder, args):
    """Train a Transformer from scratch on the task's worked solutions with cross-entropy."""
    tokenizer = load_tokenizer("arithmetic")
    config = Config(vocab_size=tokenizer.vocab_size, d_model=args.d_model, n_layers=args.n_layers, n_heads=args.n_heads,
                    d_ff=args.d_ff, eos_ids=tokenizer.eos_ids)
    settings = dict(task=args.task, seed=args.seed, config=dataclasses.asdict(config), steps=args.pretrain_steps,
                    lr=args.pretrain_lr, batch_tokens=args.batch_tokens)
    run = Run(folder, settings)
    if run.is_finished():
        print(f"{folder}: finished")
        return
    torch.manual_seed(args.seed)
    lm = LM(config).to(args.device)
    stage = Stage("pretrain", args.pretrain_lr, steps=args.pretrain_steps,
                  loss=lambda lm, tokens, labels, valid: cross_entropy_loss(lm(tokens), labels))
    train(run, lm, [stage], batch_maker(args, tokenizer, config), args)
    run.finish(lm, tokenizer)


def batch_maker(args, tokenizer, config):
    """make_batches(stage index) for `train`: each stage sees the training problems in an order of its own, short ones first."""
    problems = [problem for problem in load_task(args.task, "train") if problem.solution]
    if not problems:
        raise ValueError(f"{args.task} has no worked solutions to train on: its answers need a solution (GSM8K's layout, "
                         f"solution #### answer) or a column `solution`")
    return lambda index, steps: batches(problems, tokenizer, args.batch_tokens, config.max_length,
                                        f"{args.seed} {index}", curriculum(steps))


def distill(name, teacher_folder, args):
    """Make one student of the teacher: transfer the weights, then run the recipe's stages."""
    recipe, mixer, attention_layers = STUDENTS.get(name, STUDENTS["pure"])
    recipe, mixer = args.recipe or recipe, args.mixer or mixer
    if args.attention_layers is not None:
        attention_layers = args.attention_layers
    steps = {stage: choose_steps(getattr(args, f"{stage}_steps"), default, args.scale)
             for stage, default in STEPS[recipe].items()}
    tokenizer = load_tokenizer(teacher_folder)
    teacher = LM.from_pretrained(teacher_folder, args.device, torch.float32).eval().requires_grad_(False)
    mixers = mixers_of(teacher.config.n_layers, mixer, attention_layers)
    settings = dict(task=args.task, seed=args.seed, teacher=fingerprint(teacher_folder), recipe=recipe, mixers=mixers,
                    steps=steps, kl=args.kl, lr=args.lr, batch_tokens=args.batch_tokens, matrix_length=args.matrix_length)
    run = Run(os.path.join(args.out, name), settings)
    if run.is_finished():
        print(f"{run.folder}: finished")
        return
    torch.manual_seed(args.seed)
    student = student_from(teacher, mixers)
    stages = student_stages(student, teacher, args, steps)
    print(f"{name}: {recipe}, layers {' '.join(mixers)}, {student.num_parameters():,} parameters, "
          + ", ".join(f"{stage.name} {stage.steps} steps" for stage in stages)
          + f" of up to {args.batch_tokens:,} tokens", flush=True)
    train(run, student, stages, batch_maker(args, tokenizer, teacher.config), args)
    run.finish(student, tokenizer)


def choose_steps(asked, default, scale):
    return round(default * scale) if asked is None else asked


def mixers_of(n_layers, mixer, attention_layers):
    """The list of mixers of a student; ValueError for a layer that does not exist."""
    for layer in attention_layers:
        if not 0 <= layer < n_layers:
            raise ValueError(f"--attention-layers {layer} is out of range: the teacher has layers 0 to {n_layers - 1}")
    return ["attention" if layer in attention_layers else mixer for layer in range(n_layers)]


# ------------------------------------------------------------------------------------------------ the script
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
    add("--task", default="arithmetic", help="arithmetic, or a .jsonl file with worked solutions")
    add("--teacher", help="folder of a Llama checkpoint; default: OUT/teacher, else the one in assets/, else pre-train")
    add("--student", nargs="+", metavar="NAME", default=["pure", "hybrid"], help="students to make, by name; other names "
        "than pure and hybrid start from pure's settings")
    add("--recipe", choices=RECIPES, help="default: mohawk for pure, mambainllama for hybrid")
    add("--mixer", choices=["mamba", "mamba2"], help="what replaces attention; default: mamba2")
    add("--attention-layers", type=layer_list, metavar="I,J", help="layers that keep attention, or none; default: none for "
        "pure, 1 for hybrid")
    add("--kl", choices=["forward", "reverse"], default="forward", help="direction of the KL divergence")
    add("--scale", type=at_least(0, float), default=1.0, help="multiply the students' default steps; 2 made the README's "
        "long run")
    for stage, what in (("matrices", "matrix orientation"), ("hidden", "hidden-state alignment"),
                        ("kl", "end-to-end distillation"), ("sft", "fine-tuning with cross-entropy after it")):
        each = ", ".join(f"{STEPS[recipe].get(stage, 0)} for {recipe}" for recipe in RECIPES)
        add(f"--{stage}-steps", type=at_least(0), help=f"steps of {what}; default: {each}, times --scale")
    add("--batch-tokens", type=at_least(1), default=6144, help="tokens per step, padding included: steps x this = a stage's budget")
    add("--matrix-length", type=at_least(1), default=128, help="tokens of each sequence used in matrix orientation (memory ~ L^2)")
    add("--lr", type=float, default=2e-3, help="peak learning rate of the students' stages")
    add("--seed", type=int, default=0, help="of initialisation and of the order of the data")
    add("--pretrain", action="store_true", help="train a new teacher instead of taking the one in assets/")
    add("--pretrain-steps", type=at_least(1), default=3500, help="steps of the teacher's pre-training")
    add("--pretrain-lr", type=float, default=4e-3, help="peak learning rate of pre-training")
    for name, default in (("d-model", 64), ("n-layers", 4), ("n-heads", 4), ("d-ff", 192)):
        add(f"--{name}", type=at_least(1), default=default, help="shape of a pre-trained teacher")
    add("--log-every", type=at_least(1), default=10, help="steps between log lines")
    add("--save-every", type=at_least(1), default=100, help="steps between checkpoints to resume from")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--dtype", choices=["float32", "bfloat16"], help="of autocast; weights stay float32; default: bfloat16 on cuda, float32 on cpu")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    args.device, args.dtype = choose_device(args.device, args.dtype)
    teacher = get_teacher(args)
    for name in args.student:
        distill(name, teacher, args)


if __name__ == "__main__":
    run(main)
