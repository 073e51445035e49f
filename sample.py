"""Sample many completions per problem in large batches, against the clock.

    python sample.py                                every model under out/, each the same seconds
    python sample.py --model out/pure --seconds 60 --temperature 0.6
    python sample.py --split train --limit 500 --num-samples 4 --out out/train    to learn from
    torchrun --nproc_per_node=8 sample.py ...       each process takes its share of the problems

Reads   out/<name>/, checkpoints of distill.py
Writes  out/<name>/samples.jsonl, a record per completion; samples.json, the settings of the run
Rerunning goes on where a run stopped. Teacher and students go through the same loop and tricks.
"""
import itertools
import os
import sys
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import hub
import parallel
from common import (Parser, choose_device, crc, device_name, find_models, json_line, number,
                    read_jsonl, run, same_settings, write_json)
from data import choose_subset, load_task, load_tokenizer, prompt_template
from decode_kernels import prepare
from grade import extract_answer, is_correct
from model import LM, CacheReads


# ---------------------------------------------------------------------------- random numbers
# One uniform number for each step of each completion, a pure function of (seed, problem, sample,
# step): SplitMix64 (Steele, Lea & Flood 2014). So in float32 on a CPU neither batch size, nor
# order, nor a restart changes a text, up to ties. (On a GPU in half precision the products
# themselves depend on the number of rows.)
def signed(value):
    """An unsigned 64-bit constant as the int64 with the same bits."""
    return value - 2 ** 64 if value >> 63 else value


WEYL = signed(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd


def mix(x):
    """SplitMix64's finaliser of int64 tensors: every bit depends on every bit. It wraps around."""
    for shift, factor in (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1):
        logical = (x >> shift) & (2 ** (64 - shift) - 1)  # >> copies the sign bit: mask it away
        x = (x ^ logical) * signed(factor)
    return x


def row_keys(seed, owners):
    """64 bits for each (problem, sample), that belong to it and to nothing else: (B,) int64."""
    keys = torch.zeros(len(owners), dtype=torch.long)
    for part in (torch.full_like(keys, seed), *torch.tensor(owners).unbind(1)):
        keys = mix(keys + WEYL + part)
    return keys


def uniforms(keys, steps):
    """Numbers in [0, 1) for keys and steps (B,): (B,) float32.

    They have 23 bits, so that u * total in choose_tokens never rounds up to total.
    """
    return ((mix(keys + (steps + 1) * WEYL) >> 41) & (2 ** 23 - 1)).float() * 2.0 ** -23


# ---------------------------------------------------------------------------- choosing a token
def keep_likely(logits, top_k, top_p):
    """Logits (B, V), -inf for all but the top_k, then for all but the likeliest of mass top_p."""
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        values, order = logits.sort(descending=True, stable=True)
        p = values.softmax(-1)
        unlikely = p.cumsum(-1) - p >= top_p  # the likelier tokens have that mass without it
        logits = logits.scatter(1, order, values.masked_fill(unlikely, float("-inf")))
    return logits


def choose_tokens(logits, u, temperature, top_k=0, top_p=1.0):
    """A token for each row, by inverting the cumulative distribution at u: (B, V), (B,) -> (B,).

    One random number a row, however large the vocabulary. Temperature 0 takes the likeliest token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cdf = keep_likely(logits.float() / temperature, top_k, top_p).softmax(-1).cumsum(-1)  # (B, V)
    tokens = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
    return tokens.clamp(max=logits.shape[-1] - 1)  # a row of nan would give V


# ---------------------------------------------------------------------------- prompts
class Pack:
    """Some prompts, run through the model in one pass; samples start from copies of its rows.

    Rows are padded on the right, and padding must be a no-op. Known bugs elsewhere are a
    convolution whose window ends in the padding, and a state that goes on decaying over it: the
    mixers of model.py take each row's own end (counts), and make no step where no token is real.
    """

    def __init__(self, lm, prompts, problems):
        lengths = [len(prompts[problem]) for problem in problems]
        tokens = torch.zeros(len(problems), max(lengths), dtype=torch.long)  # (B, L)
        for row, problem in enumerate(problems):
            tokens[row, :lengths[row]] = torch.tensor(prompts[problem])
        self.place = {problem: row for row, problem in enumerate(problems)}
        self.state = lm.init_state(*tokens.shape)
        counts = torch.tensor(lengths, device=lm.device)
        self.logits = lm(tokens.to(lm.device), self.state, counts)[:, 0]  # (B, V): of token 1


class Prompts:
    """The packs of all prompts. Each prompt is run once, when its first sample is to start."""
    TOKENS = 8192  # of a pack, padding included: memory is bounded, however many prompts there are

    def __init__(self, lm, prompts):
        self.lm, self.prompts, self.packs = lm, prompts, []

    def run(self, problems):
        """Make packs of these problems' prompts, of those that are not in one."""
        done = set().union(*(pack.place for pack in self.packs))
        new = sorted(set(problems) - done, key=lambda problem: len(self.prompts[problem]))
        while new:  # the shortest first: the longest of a pack is its last
            size = max((i for i, problem in enumerate(new, 1)
                        if i * len(self.prompts[problem]) <= self.TOKENS), default=1)
            self.packs.append(Pack(self.lm, self.prompts, new[:size]))
            new = new[size:]


# ---------------------------------------------------------------------------- the batch
@dataclass
class Completion:
    """One sampled text. finish: "stop" or "length"; seconds: since all of the generation began."""
    problem: int
    sample: int
    tokens: list  # without the stop id
    finish: str
    seconds: float


class Batch:
    """The rows being decoded: each belongs to one (problem, sample), its owner, or is empty.

    Everything a step reads and writes is a tensor that stays where it is; the host looks at them
    only between steps, to read out the rows that are done and to start others in their place.
    """

    def __init__(self, lm, size, max_length, max_new_tokens, stop_ids, choose):
        self.lm, self.choose, self.max_new_tokens = lm, choose, max_new_tokens
        self.owner, self.state = [None] * size, lm.init_state(size, max_length)
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.long, device=lm.device)
        self.logits = torch.zeros(size, lm.config.vocab_size, dtype=lm.dtype, device=lm.device)
        self.keys, self.steps = torch.zeros(2, size, dtype=torch.long, device=lm.device)
        self.tokens = torch.zeros(size, max_new_tokens + 1, dtype=torch.long, device=lm.device)
        self.stopped, self.done = torch.zeros(2, size, dtype=torch.bool, device=lm.device)
        self.done.fill_(True)  # stopped, at full length, or empty
        self.visits, self.graph = 0, None  # see advance and tidy

    def start(self, rows, owners, seed, prompts):
        """Begin these completions in these empty rows, each from the state after its prompt."""
        prompts.run([problem for problem, _ in owners])
        for pack in prompts.packs:
            pairs = [(row, pack.place[problem]) for row, (problem, _) in zip(rows, owners)
                     if problem in pack.place]
            if pairs:
                mine, places = torch.tensor(pairs, device=self.lm.device).unbind(1)
                self.state.put(mine, pack.state, places)
                self.logits[mine] = pack.logits[places]
        for row, owner in zip(rows, owners):
            self.owner[row] = owner
        rows = torch.tensor(rows, device=self.lm.device)
        self.keys[rows] = row_keys(seed, owners).to(self.lm.device)
        self.steps[rows], self.stopped[rows], self.done[rows] = 0, False, False

    def step(self):
        """One more token in every row. Nothing here waits for a number to reach the host.

        A done row runs along: it starts over at length 0, and its token goes behind its end.
        """
        tokens = self.choose(self.logits, uniforms(self.keys, self.steps))  # (B,)
        self.tokens.scatter_(1, self.steps[:, None], tokens[:, None])
        self.steps += ~self.done
        self.stopped |= ~self.done & (tokens[:, None] == self.stop_ids).any(1)
        self.done |= self.stopped | (self.steps == self.max_new_tokens)
        self.state.lengths.masked_fill_(self.done, 0)
        self.logits.copy_(self.lm(tokens[:, None], self.state)[:, -1])

    def finished(self, seconds):
        """Yield the completions of the rows that are done, and empty those rows."""
        rows = [row for row, done in enumerate(self.done.tolist())
                if done and self.owner[row] is not None]
        columns = (tensor[rows].tolist() for tensor in (self.tokens, self.steps, self.stopped))
        for row, tokens, steps, stopped in zip(rows, *columns):
            owner, self.owner[row] = self.owner[row], None
            end = "stop" if stopped else "length"
            yield Completion(*owner, tokens[:steps - stopped], end, seconds)


@torch.inference_mode()
def generate(lm, prompts, *, num_samples=1, max_new_tokens=256, temperature=1.0, top_k=0,
             top_p=1.0, batch_size=64, stop_ids=(), seed=0, skip=(), seconds=float("inf")):
    """Yield a Completion of every prompt, num_samples times, each as soon as it is finished.

    prompts: lists of token ids, of any lengths. skip: (problem, sample) pairs not to run. seconds:
    when to end; rows still running are dropped. top_k and top_p act after the temperature, and
    temperature 0 is greedy. In float32 on a CPU, batch_size and skip change no text, up to ties.
    ValueError for an empty prompt or a setting out of range.
    """
    check_settings(prompts, num_samples, max_new_tokens, temperature, top_k, top_p, batch_size)
    began = time.perf_counter()

    def choose(logits, u):
        return choose_tokens(logits, u, temperature, top_k, top_p)

    # 1. Wait in line: every problem's sample 0, then every sample 1, ...; drawn one by one.
    queue = ((problem, sample) for sample in range(num_samples) for problem in range(len(prompts))
             if (problem, sample) not in skip)
    first = list(itertools.islice(queue, batch_size))
    queue, ready = itertools.chain(first, queue), Prompts(lm, prompts)
    longest = max(map(len, prompts), default=0) + max_new_tokens
    batch = Batch(lm, len(first), longest, max_new_tokens, stop_ids, choose)
    while True:
        # 2. Empty rows are taken by the next in line, from the state after their prompts.
        empty = [row for row, owner in enumerate(batch.owner) if owner is None]
        if owners := list(itertools.islice(queue, len(empty))):
            batch.start(empty[:len(owners)], owners, seed, ready)
        # 3. When nobody is left in line, the batch shrinks, until no row is left.
        if not tidy(batch):
            return
        # 4. One more token in every row.
        advance(batch)
        # 5. Read out the rows that are done, if they are in time.
        now = time.perf_counter() - began
        if now > seconds:
            return
        yield from batch.finished(now)


# ---- first reading ends here: recorded steps, sorted rows, one model into a file, options ----
VISIT_EVERY = dict(cuda=8)  # steps between visits of the host; 1 on a CPU
SORT_EVERY, SORT_ABOVE = 16, 1.2  # visits between checks; columns read per column used


def advance(batch):
    """Run the steps up to the host's next visit: on a GPU, where it has to wait, several."""
    device = batch.lm.device.type
    for _ in range(VISIT_EVERY.get(device, 1)):
        if batch.graph is not None:
            batch.graph.replay()
            continue
        batch.step()  # the first one as it is: kernels are compiled then, which can't be recorded
        if device == "cuda":
            batch.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(batch.graph):
                batch.step()  # recorded, not run: from now on one launch instead of hundreds


def tidy(batch):
    """Drop empty rows once a quarter is empty, and sort rows by length where that saves reading.

    Returns whether a row is left.
    """
    busy = [row for row, owner in enumerate(batch.owner) if owner is not None]
    if len(busy) <= 0.75 * len(batch.owner):
        select(batch, torch.tensor(busy, dtype=torch.long, device=batch.lm.device))
    batch.visits += 1
    if busy and batch.visits % SORT_EVERY == 0 and batch.lm.device.type == "cpu":
        lengths = batch.state.lengths
        read = sum(int(rows.max()) * len(rows) for rows in lengths.split(CacheReads.ROWS))
        if read > SORT_ABOVE * int(lengths.sum()) and has_growing_cache(batch.lm):
            select(batch, lengths.argsort())
    return bool(busy)


def has_growing_cache(lm):
    """Whether a longer row has a larger cache: attention's is read up to the row's length."""
    return lm.init_state(1, 2).nbytes() > lm.init_state(1, 1).nbytes()


def select(batch, rows):
    """Keep these rows, in this order: other tensors, so what was recorded is void."""
    batch.graph, batch.owner = None, [batch.owner[row] for row in rows.tolist()]
    batch.state.select(rows)
    for name in "logits", "keys", "steps", "tokens", "stopped", "done":
        setattr(batch, name, getattr(batch, name)[rows])


def check_settings(prompts, num_samples, max_new_tokens, temperature, top_k, top_p, batch_size):
    """ValueError for a number out of range or an empty prompt."""
    for name, value, least in (("num_samples", num_samples, 1), ("batch_size", batch_size, 1),
                               ("max_new_tokens", max_new_tokens, 1), ("top_k", top_k, 0),
                               ("temperature", temperature, 0)):
        if not value >= least:  # refuses nan too
            raise ValueError(f"{name} = {value} is out of range: the least is {least}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p} is out of range: above 0, at most 1")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty: a model needs a token to start from")


# ---------------------------------------------------------------------------- one model into a file
RECORD = dict(problem=int, sample=int, question=str, gold=str, completion=str, num_tokens=int,
              finish=str, seconds=float)  # fields of a line of samples.jsonl


def read_samples(path, problems):
    """The records of a run so far: every one of a problem of this run, and none twice."""
    records, seen = read_jsonl(path, RECORD, torn=True), set()
    for record in records:
        pair = record["problem"], record["sample"]
        problem = problems[pair[0]] if pair[0] < len(problems) else None
        if problem is None or (problem.question, problem.answer) != (record["question"],
                                                                     record["gold"]):
            raise ValueError(f"{path}: problem {pair[0]} is not of this run: delete the file, "
                             f"or choose another --out")
        if pair in seen:
            raise ValueError(f"{path}: problem {pair[0]}, sample {pair[1]} is there twice: delete "
                             f"one of the lines")
        seen.add(pair)
    return records


def cut_torn_line(path):
    """Remove a last line that a kill cut off."""
    if os.path.exists(path):
        with open(path, "rb+") as f:
            f.truncate(f.read().rfind(b"\n") + 1)


class NotMine:
    """The pairs that this process does not run: what is done, and the other processes' problems."""

    def __init__(self, done):
        self.done, self.rank, self.world = done, parallel.rank(), parallel.world()

    def __contains__(self, pair):
        return pair in self.done or pair[0] % self.world != self.rank


def warm_up(lm, prompts, batch_size, max_new_tokens, seed, **choice):
    """Touch and compile what the timed run will: a few steps of a full batch at its capacity."""
    with torch.inference_mode():
        batch = Batch(lm, batch_size, max(map(len, prompts)) + max_new_tokens, max_new_tokens, (),
                      lambda logits, u: choose_tokens(logits, u, **choice))
        owners = [(row % len(prompts), row // len(prompts)) for row in range(batch_size)]
        batch.start(list(range(batch_size)), owners, seed, Prompts(lm, prompts))
        for _ in range(2):
            advance(batch)


def sample_model(model_folder, folder, problems, settings, most, seconds, device, dtype):
    """Sample one model into folder/samples.jsonl, going on where an earlier run stopped.

    settings: those of generate, and `prompt`, the text around a question. It ends with `most`
    samples of each problem, or after `seconds`. Of several processes each takes every world()-th
    problem and appends to the same file, a record with one write; their clocks start together.
    """
    path, beside = (os.path.join(folder, name) for name in ("samples.jsonl", "samples.json"))
    tokenizer, knobs = load_tokenizer(model_folder), dict(settings)
    template, size = knobs.pop("prompt"), min(knobs["batch_size"], most * len(problems))
    prompts = [tokenizer.chat(template.replace("{question}", p.question)) for p in problems]
    lm = LM.from_pretrained(model_folder, device, dtype).eval()
    params = lm.num_parameters()  # what prepare joins is no longer a parameter
    prepare(lm)
    settings = settings | dict(
        problems=len(problems), questions=crc(repr([(p.question, p.answer) for p in problems])),
        weights=hub.fingerprint(model_folder), processes=parallel.world(), device=device.type,
        dtype=str(lm.dtype).removeprefix("torch."))
    records = read_samples(path, problems)
    if records and not os.path.exists(beside):
        raise ValueError(f"{beside} is missing, which says how {path} was made: delete {path}")
    same_settings(beside, settings, bool(records))
    parallel.wait()  # until all have read what is there
    if not parallel.rank():
        cut_torn_line(path)
        if not records:
            write_json(beside, dict(settings=settings, params=params, device=device_name(lm.device),
                                    torch=torch.__version__))
    done = {(record["problem"], record["sample"]) for record in records}
    offset = max((record["seconds"] for record in records), default=0.0)
    if offset >= seconds or sum(sample < most for _, sample in done) == most * len(problems):
        print(f"{path}: finished", flush=True)
        return
    warm_up(lm, prompts, **knobs | dict(batch_size=size))
    parallel.wait()  # all clocks start together
    completions = generate(lm, prompts, num_samples=most, stop_ids=tokenizer.eos_ids,
                           skip=NotMine(done), seconds=seconds - offset, **knobs)
    write_completions(path, completions, problems, tokenizer, offset)
    parallel.wait()
    if not parallel.rank():
        print(summary(path, lm, size), flush=True)


def write_completions(path, completions, problems, tokenizer, offset):
    """Append a record for each completion; `offset` seconds were spent before this command."""
    name, tokens = os.path.basename(os.path.dirname(path)), 0
    with open(path, "ab", buffering=0) as f, tqdm(
            desc=name, unit=" samples", disable=parallel.rank() > 0, dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10) as bar:
        for c in completions:
            problem, tokens = problems[c.problem], tokens + len(c.tokens)
            f.write(json_line(dict(
                problem=c.problem, sample=c.sample, question=problem.question, gold=problem.answer,
                completion=tokenizer.decode(c.tokens), num_tokens=len(c.tokens), finish=c.finish,
                seconds=round(offset + c.seconds, 4))))
            bar.set_postfix_str(f"{tokens / c.seconds:,.0f} tokens/s", refresh=False)
            bar.update()


def summary(path, lm, batch_size):
    """What a reader wants to see of a model's samples: how many, how fast, and the last one."""
    records = read_jsonl(path, RECORD)
    if not records:
        return f"{path}: no sample was finished, give it more --seconds"
    tokens, last = sum(record["num_tokens"] for record in records), records[-1]
    text = last["completion"]
    if len(text) > 240:
        text = f"{text[:120]} ... {text[-120:]}"
    right = is_correct(extract_answer(last["completion"]) or "", last["gold"])
    per_row = lm.init_state(1, 1024).nbytes() / 1e6
    return (f"{path}: {len(records):,} samples, {tokens / last['seconds']:,.0f} tokens/s, "
            f"{batch_size} rows of {per_row:.3g} MB at 1,024 tokens. The last, which is "
            f"{'right' if right else 'wrong'}:\n{last['question']}\n{text}")


# ---------------------------------------------------------------------------- the script
SECONDS = 60  # of each model if nothing else is asked for: the main command takes 9 minutes


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument_group("what to sample").add_argument
    add("--model", nargs="+", help="folders of checkpoints; default: every model under --out")
    add("--task", default="arithmetic", help="arithmetic, gsm8k, math500, openmath2, a .jsonl file")
    add("--split", choices=["train", "test"], default="test", help="of the task")
    add("--limit", type=number(1), default=72, help="how many problems")
    add("--subset-seed", type=number(0), help="take them at random; default: the first")
    add("--prompt-file", help="the text around {question}; default: nothing for arithmetic, else "
        "an instruction to reason step by step")
    add = parser.add_argument_group("how long").add_argument
    add("--seconds", type=number(0.1, 1e9, float), help=f"of sampling for each model; default: "
        f"{SECONDS}, or no limit with --num-samples")
    add("--num-samples", type=number(1), help="completions of each problem; default: no limit")
    add("--max-new-tokens", type=number(1, 10 ** 6), default=896, help="longest completion")
    add = parser.add_argument_group("how to choose tokens").add_argument
    add("--temperature", type=number(0, 1000, float), default=0.8, help="0 is greedy")
    add("--top-k", type=number(0), default=0, help="keep the k likeliest tokens; 0: all")
    add("--top-p", type=number(1e-6, 1, float), default=1.0, help="keep the likeliest of this mass")
    add("--seed", type=number(0, 2 ** 31), default=0, help="of the random numbers")
    add = parser.add_argument_group("where and how to compute").add_argument
    add("--batch-size", type=number(1, 10 ** 6), help="completions decoded at a time; default: "
        "256 on a CPU, 2048 on a GPU, and no more than there are")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, else float32")
    add("--out", default="out", help="samples go to OUT/<model's name>/samples.jsonl")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with parallel.processes(args.device):
        device, dtype = choose_device(args.device, args.dtype)
        models = {}
        for folder in args.model or find_models(args.out):
            name = os.path.basename(os.path.abspath(folder))
            if models.setdefault(name, folder) != folder:
                raise ValueError(f"two models are named {name}: sample one of them at a time, into "
                                 f"another --out")
        for folder in models.values():
            hub.read_config(hub.checkpoint_folder(folder))  # a mistake is told before data is read
        problems = choose_subset(load_task(args.task, args.split), args.limit, args.subset_seed)
        if len(problems) < parallel.world():  # without one, it would search for its own forever
            raise ValueError(f"{len(problems)} problems are too few for {parallel.world()} "
                             f"processes: each needs one of its own")
        most, seconds = args.num_samples or 10 ** 9, args.seconds or float("inf")
        if not args.num_samples and not args.seconds:
            seconds = SECONDS
        size = args.batch_size or (2048 if device.type == "cuda" else 256)
        settings = dict(prompt=prompt_template(args.task, args.prompt_file), seed=args.seed,
                        batch_size=size, max_new_tokens=args.max_new_tokens, top_p=args.top_p,
                        temperature=args.temperature, top_k=args.top_k)
        until = "" if seconds == float("inf") else f", {seconds:g} seconds each"
        print(f"{len(problems)} problems of {args.task}{until}: {', '.join(models)}", flush=True)
        for name, folder in models.items():
            with parallel.exclusively(os.path.join(args.out, name)) as target:
                sample_model(folder, target, problems, settings, most,
                             seconds, device, dtype)


if __name__ == "__main__":
    run(main, "--batch-size")
