"""Sample many completions per problem in large batches, against the clock.

    python sample.py                      every model under out/, 64 samples of each test problem
    python sample.py --model out/pure --num-samples 256 --temperature 0.6
    torchrun --nproc_per_node=8 sample.py --task gsm8k --model folder      each process takes its share of the problems
    python sample.py --score RLHFlow/Llama3.1-8B-PRM-Deepseek-Data         a reward model (reward.py) judges the samples
    python sample.py --bench              how fast models of random weights decode: bench.py

Reads   out/<name>/ (a checkpoint of distill.py); with --score the samples there, and samples.json for their prompt
Writes  out/<name>/samples.jsonl, one record per completion, and samples.json: the settings and the speed; with --score
        scores.jsonl and scores.json instead, in the same manner
Rerunning goes on where a run stopped. Teacher and students go through the same loop, batch and tricks.

Contents: random numbers, choosing a token, the prompts, the batch, generate, processes, records on disk, scores, the
script.
"""
import contextlib
import datetime
import itertools
import json
import os
import re
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import (Parser, at_least, choose_subset, find_models, load_task, load_tokenizer, prompt_template, read_json,
                  refuse_other_settings, run, write_json)
from grade import crc
from memory import MOST_ROWS_ON_CPU, choose_batch, free_memory, stored_config
from model import LM, CacheReads, choose_device, columns_read, device_name, fingerprint
from reward import AGGREGATE, RewardModel, batches, likelihood_text, process_text, verifier_text

# ------------------------------------------------------------------------------------------------ random numbers
MASK = 2 ** 64 - 1
WEYL = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def hash64(value):
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014) on a Python int: every bit depends on every bit."""
    for shift, factor in MIX:
        value = ((value ^ (value >> shift)) * factor) & MASK
    return value ^ (value >> 31)


def signed(value):
    """An unsigned 64-bit number as the int64 with the same bits."""
    return value - 2 ** 64 if value >> 63 else value


def row_key(seed, problem, sample):
    """64 bits that belong to one completion and to nothing else."""
    key = 0
    for part in (seed, problem, sample):
        key = hash64((key + WEYL + part) & MASK)
    return signed(key)


def uniforms(keys, steps):
    """One number in [0, 1) per row, a pure function of (key, step): SplitMix64 at position `step` of stream `key`.

    keys, steps (B,) int64 -> (B,) float32. Batch size, order and resuming cannot change it. 23 bits, so that u * total
    in `choose_tokens` never rounds up to total.
    """
    value = keys + (steps + 1) * signed(WEYL)  # int64 arithmetic wraps around, as it should
    for shift, factor in MIX:
        value = (value ^ ((value >> shift) & (MASK >> shift))) * signed(factor)  # the mask makes >> a logical shift
    value = value ^ ((value >> 31) & (MASK >> 31))
    return ((value >> 41) & (2 ** 23 - 1)).float() * 2.0 ** -23


# ------------------------------------------------------------------------------------------------ choosing a token
def keep_likely(logits, top_k, top_p):
    """Logits (B, V) with all but the top_k, then the smallest set of mass >= top_p, at -inf. 0 and 1.0 switch off."""
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        values, order = logits.sort(descending=True, stable=True)
        probabilities = values.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # mass of all likelier tokens; 0 for the likeliest
        logits = logits.scatter(1, order, values.masked_fill(before >= top_p, float("-inf")))
    return logits


def choose_tokens(logits, u, temperature, top_k=0, top_p=1.0):
    """One token per row by inverting the cumulative distribution at u. logits (B, V), u (B,) -> (B,) int64.

    One random number a row, however large the vocabulary. temperature 0 takes the likeliest token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cdf = keep_likely(logits.float() / temperature, top_k, top_p).softmax(-1).cumsum(-1)  # (B, V)
    return torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]


# ------------------------------------------------------------------------------------------------ generation
@dataclass
class Completion:
    """One sampled text: indices of problem and sample, ids without the stop id, why it ended, and when.

    finish is "stop" or "length"; seconds is wall-clock time since the generation of all of them began.
    """
    problem: int
    sample: int
    tokens: list
    finish: str
    seconds: float


class Prompts:
    """Every problem's prompt, run through the model once, when first needed, packed with the others that are: no padding.

    Kept until the last of the problem's samples has started from it. Each sample gets a copy of its keys and values: sharing
    them would need caches in pages, for the little that prompts are of a batch in which few rows have the same problem.
    """
    TOKENS = 8192  # packed into one row, so that memory stays bounded however many prompts there are

    def __init__(self, lm, prompts, todo):
        self.lm, self.prompts, self.ready = lm, prompts, {}
        self.uses = np.bincount([problem for problem, _ in todo], minlength=len(prompts))

    def packs(self, problems):
        """The problems in groups whose prompts have up to TOKENS tokens together, or of one problem."""
        pack, tokens = [], 0
        for problem in problems:
            tokens += len(self.prompts[problem])
            if pack and tokens > self.TOKENS:
                yield pack
                pack, tokens = [], len(self.prompts[problem])
            pack.append(problem)
        if pack:
            yield pack

    def start(self, problems):
        """Yields for each (state of one row after the prompt, logits (V,) of the first token)."""
        for pack in self.packs([problem for problem in dict.fromkeys(problems) if problem not in self.ready]):
            self.ready |= zip(pack, zip(*self.lm.prefill([self.prompts[problem] for problem in pack])))
        for problem in problems:
            self.uses[problem] -= 1
            yield self.ready[problem] if self.uses[problem] else self.ready.pop(problem)


def recorded(step, device):
    """On a GPU the kernels of a step as a CUDA graph, launched all at once; elsewhere the step itself."""
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()  # recorded, not run
    return graph.replay


class Batch:
    """The rows being decoded. A step is made of tensors alone, which stay where they are; the host looks at them every
    VISIT_EVERY steps: it reads out the rows that are done and starts others in their place. Done rows run along till then.
    """
    VISIT_EVERY = dict(cpu=1, cuda=8)  # on a GPU the host waits for the device then, and the device for the host
    SORT_EVERY, SORT_ABOVE = 16, 1.2  # visits between checks; cache columns read per column needed that call for a sort

    def __init__(self, lm, size, max_length, max_new_tokens, stop_ids, choose):
        self.lm, self.choose, self.max_new_tokens = lm, choose, max_new_tokens
        self.state, self.device = lm.init_state(size, max_length), lm.device
        self.sorts = "attention" in lm.config.mixers and self.device.type not in CacheReads.ON_DEVICE
        self.clock, self.replay = 0, None
        self.owner = [None] * size  # (problem, sample) of each row, None if it is empty
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.long, device=self.device)
        self.logits = torch.zeros(size, lm.config.vocab_size, device=self.device, dtype=lm.dtype)
        self.keys, self.steps = torch.zeros(2, size, dtype=torch.long, device=self.device)
        self.tokens = torch.zeros(size, max_new_tokens + 1, dtype=torch.long, device=self.device)  # one more: see step
        self.stopped = torch.zeros(size, dtype=torch.bool, device=self.device)
        self.done = torch.ones(size, dtype=torch.bool, device=self.device)  # stopped, at full length, or empty

    def start(self, rows, owners, seed, starts):
        """Begin completions in empty rows."""
        for row, owner, (state, logits) in zip(rows, owners, starts):
            self.owner[row], self.logits[row] = owner, logits
            self.state.put(row, state)
        rows = torch.tensor(rows, dtype=torch.long, device=self.device)
        self.keys[rows] = torch.tensor([row_key(seed, *owner) for owner in owners], device=self.device)
        for flags in (self.steps, self.stopped, self.done):
            flags[rows] = 0

    def step(self):
        """One more token in every row that is not done. No data reaches the host, and nothing here depends on any.

        A done row starts over at length 0 with each step, and leaves its token behind its end, where nobody looks.
        """
        tokens = self.choose(self.logits, uniforms(self.keys, self.steps))  # (B,)
        self.tokens.scatter_(1, self.steps[:, None], tokens[:, None])
        busy = ~self.done
        self.steps += busy
        self.stopped |= busy & (tokens[:, None] == self.stop_ids).any(1)
        self.done |= self.stopped | (self.steps == self.max_new_tokens)
        self.state.lengths.masked_fill_(self.done, 0)
        self.logits.copy_(self.lm(tokens[:, None], self.state)[:, -1])

    def advance(self, steps):
        """Run so many steps."""
        for _ in range(steps):
            if self.replay:
                self.replay()
            else:
                self.step()  # the first runs as it is: kernels are compiled then, which can't be recorded
                self.replay = recorded(self.step, self.device)

    def finished(self):
        """Rows that are done and not read out yet: here the host waits for the device."""
        return [row for row, done in enumerate(self.done.tolist()) if done and self.owner[row] is not None]

    def read(self, rows, seconds):
        """Yield the Completions of these rows and empty them."""
        columns = (tensor[rows].tolist() for tensor in (self.tokens, self.steps, self.stopped))
        for row, tokens, steps, stopped in zip(rows, *columns):
            owner, self.owner[row] = self.owner[row], None
            yield Completion(*owner, tokens[:steps - stopped], "stop" if stopped else "length", seconds)

    def tidy(self):
        """Drop empty rows once a quarter is empty, and sort by length when attention would read much for nothing.

        Returns False if no row is left.
        """
        busy = [row for row, owner in enumerate(self.owner) if owner is not None]
        if len(busy) <= 0.75 * len(self.owner):
            self.select(torch.tensor(busy, dtype=torch.long, device=self.device))
        self.clock += 1
        if busy and self.sorts and self.clock % self.SORT_EVERY == 0:
            if columns_read(self.state.lengths) > self.SORT_ABOVE * int(self.state.lengths.sum()):
                self.select(self.state.lengths.argsort())
        return bool(busy)

    def select(self, rows):
        """Keep these rows, in this order: other tensors, so what was recorded is void."""
        self.replay = None
        self.state.select(rows)
        self.owner = [self.owner[row] for row in rows.tolist()]
        self.logits, self.keys, self.steps, self.tokens, self.stopped, self.done = (
            t[rows] for t in (self.logits, self.keys, self.steps, self.tokens, self.stopped, self.done))


@torch.inference_mode()
def generate(lm, prompts, *, num_samples=1, max_new_tokens=256, temperature=1.0, top_k=0, top_p=1.0, batch_size=64,
             stop_ids=(), seed=0, skip=()):
    """Complete every prompt num_samples times; yields a Completion as soon as it is finished.

    prompts: lists of token ids, of any lengths. Order: every problem's sample 0 first, then every sample 1, ...
    `skip` holds (problem, sample) pairs not to run. A finished row's place is taken at once (on a GPU within a few steps) by
    the next in line; when none is left the batch shrinks. top_k and top_p act after temperature; temperature 0 is greedy.
    The random number of a step depends on (seed, problem, sample, step) alone, so batch_size and skip do not change a text
    (up to floating-point ties). Raises ValueError for an empty prompt or a setting out of range.
    """
    check_settings(prompts, num_samples, max_new_tokens, temperature, top_k, top_p, batch_size)
    began = time.perf_counter()
    skip = set(skip)
    todo = [(problem, sample) for sample in range(num_samples) for problem in range(len(prompts))
            if (problem, sample) not in skip]
    if not todo:
        return
    def choose(logits, u):
        return choose_tokens(logits, u, temperature, top_k, top_p)

    starts, queue = Prompts(lm, prompts, todo), iter(todo)
    batch = Batch(lm, min(batch_size, len(todo)), max(map(len, prompts)) + max_new_tokens, max_new_tokens, stop_ids, choose)
    while True:
        rows = [row for row, owner in enumerate(batch.owner) if owner is None]
        owners = list(itertools.islice(queue, len(rows)))
        if owners:
            batch.start(rows[:len(owners)], owners, seed, starts.start([problem for problem, _ in owners]))
        if not batch.tidy():
            return
        batch.advance(Batch.VISIT_EVERY.get(lm.device.type, 1))
        if rows := batch.finished():
            yield from batch.read(rows, time.perf_counter() - began)


def check_settings(prompts, num_samples, max_new_tokens, temperature, top_k, top_p, batch_size):
    """Raises ValueError for a number out of range or an empty prompt."""
    for name, value in dict(num_samples=num_samples, max_new_tokens=max_new_tokens, batch_size=batch_size).items():
        if not value >= 1:
            raise ValueError(f"{name} = {value} is out of range: the least is 1")
    for name, value in dict(temperature=temperature, top_k=top_k).items():
        if not value >= 0:  # refuses nan too
            raise ValueError(f"{name} = {value} is out of range: the least is 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p} is out of range: above 0, at most 1")
    if not all(prompts):
        raise ValueError(f"prompt {list(map(bool, prompts)).index(False)} is empty: a model needs a token to start from")


# ------------------------------------------------------------------------------------------------ processes
# Several processes may share the work: torchrun starts them and tells each its RANK. Otherwise all this does nothing.
def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def least(value):
    """The smallest of all processes' values."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return min(values)


@contextlib.contextmanager
def processes(device):
    """Meet the other processes of torchrun, if there are any. Only the first one prints; they end where the block ends."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    dist.init_process_group("nccl" if gpus else "gloo", timeout=datetime.timedelta(days=1))  # some wait while one works
    try:
        if gpus and gpus < int(os.environ["LOCAL_WORLD_SIZE"]):
            raise ValueError(f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']} needs as many GPUs, and PyTorch finds "
                             f"{gpus} here: lower it, or use --device cpu")
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        with contextlib.redirect_stdout(open(os.devnull, "w") if rank() else sys.stdout):
            yield
    except (ValueError, OSError):
        if rank():
            time.sleep(5)  # what all run into is said by the first one, whose end makes torchrun end the others
        raise
    barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # not the usual way: there PyTorch's threads race with Python's end, and abort one process in twenty


# ------------------------------------------------------------------------------------------------ records on disk
def read_samples(path):
    """Records of a samples.jsonl; a last line that was cut off by a kill is removed from the file."""
    if not os.path.exists(path):
        return []
    with open(path, "rb") as f:
        text = f.read()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(path, whole)
    try:
        return [json.loads(line) for line in text[:whole].splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} holds a line that is not JSON ({error}): repair or delete the file") from None


def record_of(completion, problem, tokenizer, offset=0.0):
    """The line of samples.jsonl for a completion, as bytes: written at once, so that several processes can share a file."""
    record = dict(problem=completion.problem, sample=completion.sample, question=problem.question, gold=problem.answer,
                  completion=tokenizer.decode(completion.tokens), num_tokens=len(completion.tokens),
                  finish=completion.finish, seconds=round(offset + completion.seconds, 4))
    return (json.dumps(record) + "\n").encode()


def write_summary(folder, settings, lm, records_tokens, seconds, name="samples.json", **more):
    """samples.json: the settings that must not mix, and what was measured."""
    summary = dict(settings=settings, device=device_name(lm.device), dtype=str(lm.dtype).removeprefix("torch."),
                   params=lm.num_parameters(), tokens=records_tokens, seconds=round(seconds, 3),
                   tokens_per_second=round(records_tokens / seconds, 1) if seconds else None,
                   date=datetime.date.today().isoformat(), torch=torch.__version__, threads=torch.get_num_threads())
    write_json(os.path.join(folder, name), summary | more)


def rows_at_a_time(model_folder, prompts, asked, args):
    """The batch size: what was asked for or recorded by the run that goes on; else what memory allows, alike in all processes."""
    share, longest = -(-len(prompts) // world()), max(map(len, prompts))
    free = least(free_memory(args.device, world()))
    return choose_batch(stored_config(model_folder), args.device, args.dtype, share * args.num_samples,
                        longest + args.max_new_tokens, free, share, longest, asked)


def sample_model(model_folder, folder, problems, args):
    """All samples of one model into folder/samples.jsonl, going on where an earlier run stopped.

    Of several processes each takes every world()-th problem and appends to the same file. Their clocks
    start together, so that `seconds` means the same in every record.
    """
    tokenizer, template = load_tokenizer(model_folder), prompt_template(args.task, args.prompt_file)
    prompts = [tokenizer.chat(template.replace("{question}", problem.question)) for problem in problems]
    check_settings(prompts, args.num_samples, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.batch_size or 1)
    path, summary = os.path.join(folder, "samples.jsonl"), os.path.join(folder, "samples.json")
    earlier = read_json(summary).get("settings", {}) if os.path.exists(path) and os.path.exists(summary) else {}
    batch_size = rows_at_a_time(model_folder, prompts, args.batch_size or earlier.get("batch_size"), args)
    lm = LM.from_pretrained(model_folder, args.device, args.dtype).eval().fuse()
    settings = dict(task=args.task, problems=len(problems), subset_seed=args.subset_seed, prompt=template,
                    num_samples=args.num_samples, batch_size=batch_size, max_new_tokens=args.max_new_tokens,
                    temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed, processes=world(),
                    device=lm.device.type, dtype=str(lm.dtype).removeprefix("torch."), weights=fingerprint(model_folder))
    if os.path.exists(path):
        refuse_other_settings(path, earlier, settings)
    barrier()  # nobody writes before everybody has compared the settings
    os.makedirs(folder, exist_ok=True)
    records = read_samples(path)
    done, tokens = {(r["problem"], r["sample"]) for r in records}, sum(r["num_tokens"] for r in records)
    offset = seconds = max((r["seconds"] for r in records), default=0.0)
    if rank() == 0:
        write_summary(folder, settings, lm, tokens, seconds)
    if len(done) == len(problems) * args.num_samples:
        print(f"{path}: finished")
        return
    mine = range(rank(), len(problems), world())
    skip = done | {(i, sample) for i in range(len(problems)) if i not in mine for sample in range(args.num_samples)}
    knobs = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed, batch_size=batch_size,
                 num_samples=args.num_samples, skip=skip)
    for _ in generate(lm, prompts, max_new_tokens=2, **knobs):
        break  # warm-up: one prefill per row and a few steps, at full batch size
    barrier()
    mine_done = sum(problem in mine for problem, _ in done)
    with open(path, "ab", buffering=0) as f, progress(folder, len(mine) * args.num_samples, mine_done) as bar:
        for c in generate(lm, prompts, max_new_tokens=args.max_new_tokens, stop_ids=tokenizer.eos_ids, **knobs):
            seconds, tokens = offset + c.seconds, tokens + len(c.tokens)
            f.write(record_of(c, problems[c.problem], tokenizer, offset))
            bar.set_postfix_str(f"{tokens / seconds:,.0f} tokens/s", refresh=False)
            bar.update()
    barrier()
    if rank() == 0:
        records = read_samples(path)
        write_summary(folder, settings, lm, sum(r["num_tokens"] for r in records),
                      max((r["seconds"] for r in records), default=0.0))


def progress(folder, total, initial):
    """A bar for a terminal, a line every ten seconds for a file; of the first process's share."""
    return tqdm(disable=rank() > 0, desc=os.path.basename(folder), total=total, initial=initial, unit="sample", dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 10)


# ------------------------------------------------------------------------------------------------ scores
SCORED = ("problem", "sample", "question", "completion", "finish")  # what scoring reads of a record of samples.jsonl


def sampled_folders(out, models):
    """The folders under `out` that hold samples; of these models if any are named, and then of all of them."""
    if models:
        names = [os.path.basename(os.path.normpath(model)) for model in models]
    else:
        names = sorted(os.listdir(out) if os.path.isdir(out) else [], key=lambda name: (name != "teacher", name))
    found = [name for name in names if os.path.isfile(os.path.join(out, name, "samples.jsonl"))]
    missing = [os.path.join(out, name, "samples.jsonl") for name in (names if models else []) if name not in found]
    if missing or not found:
        raise ValueError(f"no {missing[0] if missing else f'samples under {out}/'} to score: run python sample.py first")
    return [os.path.join(out, name) for name in found]


def read_scorable(path):
    """Records of a samples.jsonl, every problem's sample 0 first. ValueError if there are none, or naming a bad line."""
    records = read_samples(path)
    for number, record in enumerate(records, 1):
        lacks = [field for field in SCORED if not isinstance(record, dict) or field not in record]
        if lacks:
            raise ValueError(f"{path}, line {number} lacks {', '.join(lacks)}: repair or delete the file")
    if not records:
        raise ValueError(f"{path} is empty: run python sample.py first")
    return sorted(records, key=lambda record: (record["sample"], record["problem"]))


def read_scores(path, records):
    """Records of a scores.jsonl, as read_samples. ValueError if one is not of these samples: sampled again since?"""
    scores, crcs = read_samples(path), {(r["problem"], r["sample"]): crc(r) for r in records}
    for number, score in enumerate(scores, 1):
        if not isinstance(score, dict) or not {"problem", "sample", "crc", "num_tokens", "seconds"} <= score.keys():
            raise ValueError(f"{path}, line {number} is no score that sample.py wrote: delete {path}")
        if crcs.get((score["problem"], score["sample"])) != score["crc"]:
            raise ValueError(f"{path} holds scores of other samples (problem {score.get('problem')}, sample "
                             f"{score.get('sample')}): delete {path}")
    return scores


def score_of(text, steps, aggregate, seconds):
    """The line of scores.jsonl for a text and its p at each step, or at its end (aggregate None), as bytes."""
    record = dict(problem=text.record["problem"], sample=text.record["sample"], score=AGGREGATE[aggregate or "last"](steps),
                  num_tokens=len(text.ids), seconds=round(seconds, 4), crc=crc(text.record))
    return (json.dumps(record | (dict(steps=[round(p, 6) for p in steps]) if aggregate else {})) + "\n").encode()


def score_samples(folder, reward, weights, args):
    """Scores of all samples in a folder into folder/scores.jsonl, going on where an earlier run stopped.

    Of several processes each takes every world()-th of what is left. `seconds` is since scoring began, and every
    problem's first samples come first, so that it says what choosing among k samples costs.
    """
    names = args.score_to, os.path.splitext(args.score_to)[0] + ".json", "samples.json"
    path, summary, sidecar = (os.path.join(folder, name) for name in names)
    records, aggregate, template = read_scorable(os.path.join(folder, "samples.jsonl")), args.aggregate, None
    if reward.kind != "process":
        sampled_with = read_json(sidecar).get("settings", {}) if os.path.exists(sidecar) else {}
        aggregate, template = None, sampled_with.get("prompt") or prompt_template(args.task, args.prompt_file)
    settings = dict(kind=reward.kind, aggregate=aggregate, prompt=template,
                    score_tokens=args.score_tokens, processes=world(), device=reward.lm.device.type,
                    dtype=str(reward.lm.dtype).removeprefix("torch."), weights=weights)
    if os.path.exists(path):
        refuse_other_settings(path, read_json(summary).get("settings", {}) if os.path.exists(summary) else {}, settings)
    barrier()  # nobody writes before everybody has compared the settings
    scores = read_scores(path, records)
    done, tokens = {(s["problem"], s["sample"]) for s in scores}, sum(s["num_tokens"] for s in scores)
    offset = max((s["seconds"] for s in scores), default=0.0)
    if rank() == 0:
        write_summary(folder, settings, reward.lm, tokens, offset, names[1], reward_model=args.score)
    left = [record for record in records if (record["problem"], record["sample"]) not in done]
    if not left:
        print(f"{path}: finished")
        return
    mine = left[rank()::world()]

    def mine_in_batches():
        texts = (process_text(reward.tokenizer, record) if reward.kind == "process" else
                 (verifier_text if reward.kind == "verifier" else likelihood_text)(reward.tokenizer, record, template)
                 for record in mine)
        return batches(texts, args.score_tokens)
    for batch in mine_in_batches():
        reward.judge(batch)
        break  # warm-up
    barrier()
    began, share = time.perf_counter(), len(done) // world()
    with open(path, "ab", buffering=0) as f, progress(folder, share + len(mine), share) as bar:
        for batch in mine_in_batches():
            judged = reward.judge(batch)
            seconds, tokens = offset + time.perf_counter() - began, tokens + sum(len(text.ids) for text in batch)
            f.write(b"".join(score_of(text, steps, aggregate, seconds) for text, steps in zip(batch, judged)))
            bar.set_postfix_str(f"{tokens / seconds:,.0f} tokens/s", refresh=False)
            bar.update(len(batch))
    barrier()
    if rank() == 0:
        scores = read_samples(path)
        write_summary(folder, settings, reward.lm, sum(s["num_tokens"] for s in scores), max(s["seconds"] for s in scores),
                      names[1], reward_model=args.score)


# ------------------------------------------------------------------------------------------------ the script
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--model", nargs="+", help="folders of checkpoints; default: every model under --out")
    parser.add_argument("--out", default="out", help="samples go to OUT/<model's name>/samples.jsonl")
    parser.add_argument("--task", default="arithmetic", help="arithmetic, gsm8k, math500, openmath2, or a .jsonl file")
    parser.add_argument("--limit", type=at_least(1), default=72, help="how many test problems")
    parser.add_argument("--subset-seed", type=int, help="take them at random with this seed; default: the first")
    parser.add_argument("--prompt-file", help="file with the text around {question}; default: the bare question for "
                        "arithmetic, else an instruction to reason step by step")
    parser.add_argument("--num-samples", type=int, default=64, help="completions per problem (k)")
    parser.add_argument("--max-new-tokens", type=int, default=896, help="longest completion")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens of this mass; 1: all")
    parser.add_argument("--batch-size", type=at_least(1), help="completions decoded at a time; default: all or as many "
                        f"as fit into memory, on a CPU at most {MOST_ROWS_ON_CPU}: more gain nothing there")
    parser.add_argument("--bench", action="store_true", help="time decoding with random weights instead: see --bench --help")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers of sampling")
    parser.add_argument("--score", metavar="MODEL", help="a reward model's folder or Hugging Face repository: instead of "
                        "sampling, score the samples in OUT/<name>/, of all models by default")
    parser.add_argument("--aggregate", choices=[*AGGREGATE, "likelihood"], default="last", help="a process reward model's "
                        "score: its probability for the last step, the smallest, or the product of all. likelihood takes any "
                        "language model, and the probability that it would write the text itself")
    parser.add_argument("--score-to", metavar="FILE", default="scores.jsonl", help="file of scores in each model's folder")
    parser.add_argument("--score-tokens", type=at_least(1), default=16384, help="tokens scored at a time, padding included")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, float32 on cpu")
    return parser.parse_args(argv)


def main(argv=None):
    if "--bench" in (sys.argv[1:] if argv is None else argv):
        from bench import main as bench  # no part of sampling: it times what is above, with options of its own
        return bench(argv)
    args = parse_args(argv)
    with processes(args.device):
        args.device, args.dtype = choose_device(args.device, args.dtype)
        if args.score:
            folders = sampled_folders(args.out, args.model)
            if args.score_to in ("samples.jsonl", "metrics.jsonl") or not re.fullmatch(r"[^/]+\.jsonl", args.score_to):
                raise ValueError(f"--score-to {args.score_to}: give the name of a new .jsonl file, such as scores.jsonl")
            reward = RewardModel(args.score, args.device, args.dtype, args.aggregate == "likelihood")
            weights = fingerprint(args.score)
            for folder in folders:
                score_samples(folder, reward, weights, args)
            return
        folders = args.model or find_models(args.out)
        problems = choose_subset(load_task(args.task, "test"), args.limit, args.subset_seed)
        print(f"{len(problems)} problems of {args.task} x {args.num_samples} samples, "
              f"temperature {args.temperature}: {', '.join(folders)}")
        for folder in folders:
            name = os.path.basename(os.path.normpath(folder))
            sample_model(folder, os.path.join(args.out, name), problems, args)


if __name__ == "__main__":
    run(main)
