"""Sample many completions per problem in large batches, against the clock.

    python sample.py                                every model under out/, each the same seconds
    python sample.py --model out/pure --seconds 60 --temperature 0.6
    python sample.py --split train --limit 500 --num-samples 4 --out out/train    to learn from
    torchrun --nproc_per_node=8 sample.py ...       each process takes its share of the problems

Writes out/<name>/samples.jsonl, a record per completion, and samples.json, the settings. Rerunning
goes on where a run stopped. Teacher and students go through the same loop.
"""
import functools
import itertools
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import hub
import parallel
from common import (Parser, choose_device, crc, device_name, find_models, json_line, number,
                    read_json, read_jsonl, run, same_settings, write_json)
from data import choose_subset, load_task, load_tokenizer, prompt_template
from decode_kernels import prepare
from grade import extract_answer, is_correct
from model import LM, CacheReads


# ---- random numbers
# One uniform number for each step of each completion, a pure function of (seed, problem, sample,
# step): SplitMix64 (Steele, Lea & Flood 2014). So in float32 on a CPU neither batch size, nor
# order, nor a restart changes a text, up to ties. (In half precision products depend on the batch.)
WEYL = 0x9E3779B97F4A7C15 - 2 ** 64  # 2^64 / golden ratio, odd; int64 wraps around


def mix(x):
    """SplitMix64's finaliser of int64 tensors: every bit depends on every bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2 ** 64), (27, 0x94D049BB133111EB - 2 ** 64),
                          (31, 1)):
        logical = (x >> shift) & (2 ** (64 - shift) - 1)  # >> copies the sign bit
        x = (x ^ logical) * factor
    return x


def row_keys(seed, owners):
    """64 bits for each (problem, sample) and for nothing else: (B,) int64."""
    keys = torch.zeros(len(owners), dtype=torch.long)
    for part in (torch.full_like(keys, seed), *torch.tensor(owners).unbind(1)):
        keys = mix(keys + WEYL + part)
    return keys


def uniforms(keys, steps):
    """Numbers in [0, 1) for keys and steps (B,): (B,) float32.

    Of 23 bits, so that u * total in choose_tokens never rounds up to total.
    """
    return ((mix(keys + (steps + 1) * WEYL) >> 41) & (2 ** 23 - 1)).float() * 2.0 ** -23


# ---- choosing a token
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


# ---- prompts
class Prompts:
    """Runs each prompt through the model once, when its first sample is to start, many in a pass.

    Rows are padded on the right, and padding must be a no-op. Known bugs elsewhere are a
    convolution whose window ends in the padding, and a state that goes on decaying over it: the
    mixers of model.py take each row's own end (counts), and make no step for padding.
    """
    TOKENS = 8192  # of a pass, which bounds its memory

    def __init__(self, lm, prompts):
        self.lm, self.prompts = lm, prompts
        self.passes = []  # of each: {problem: its row}, state, logits (B, V) of token 1

    def run(self, problems):
        """Run the prompts of these problems that have not been run, the longest first."""
        new = set(problems).difference(*(places for places, _, _ in self.passes))
        new = sorted(new, key=lambda problem: len(self.prompts[problem]), reverse=True)
        while new:
            size = max(1, self.TOKENS // len(self.prompts[new[0]]))
            pack, new = new[:size], new[size:]
            rows = [torch.tensor(self.prompts[problem]) for problem in pack]
            tokens = pad_sequence(rows, batch_first=True).to(self.lm.device)  # (B, L)
            counts = torch.tensor([len(row) for row in rows], device=self.lm.device)
            state = self.lm.init_state(*tokens.shape)
            logits = self.lm(tokens, state, counts)[:, 0]
            self.passes.append(({problem: i for i, problem in enumerate(pack)}, state, logits))


# ---- the batch
@dataclass
class Completion:
    """One sampled text. finish: "stop" or "length"; seconds: since generation began."""
    problem: int
    sample: int
    tokens: list  # without the stop id
    finish: str
    seconds: float


class Batch:
    """The rows being decoded: each belongs to one (problem, sample), its owner, or is empty.

    All that a step reads and writes is a tensor that stays where it is. The host looks only between
    steps, to read out the rows that are done and to start others in their place.
    """

    def __init__(self, lm, size, max_length, max_new_tokens, stop_ids, choose):
        self.lm, self.choose, self.max_new_tokens = lm, choose, max_new_tokens
        self.owner, self.state = {}, lm.init_state(size, max_length)  # owner: of each busy row
        self.stop_ids = torch.tensor(list(stop_ids), dtype=torch.long, device=lm.device)
        self.logits = torch.zeros(size, lm.config.vocab_size, dtype=lm.dtype, device=lm.device)
        self.keys, self.steps = torch.zeros(2, size, dtype=torch.long, device=lm.device)
        self.tokens = torch.zeros(size, max_new_tokens + 1, dtype=torch.long, device=lm.device)
        self.done = torch.ones(size, dtype=torch.bool, device=lm.device)  # at its end, or empty
        self.visits, self.graph = 0, None  # see tidy and advance

    def start(self, rows, owners, seed, prompts):
        """Begin these completions in empty rows, each from the state after its prompt."""
        prompts.run([problem for problem, _ in owners])
        for places, state, logits in prompts.passes:
            pairs = [(row, places[problem]) for row, (problem, _) in zip(rows, owners)
                     if problem in places]
            if pairs:
                mine, theirs = torch.tensor(pairs, device=self.lm.device).unbind(1)
                self.state.put(mine, state, theirs)
                self.logits[mine] = logits[theirs]
        self.owner.update(zip(rows, owners))
        rows = torch.tensor(rows, device=self.lm.device)
        self.keys[rows] = row_keys(seed, owners).to(self.lm.device)
        self.steps[rows], self.done[rows] = 0, False

    def step(self):
        """One more token in every row, without waiting for a number to reach the host.

        A done row runs along: it starts over at length 0, and its token goes behind its end.
        """
        tokens = self.choose(self.logits, uniforms(self.keys, self.steps))  # (B,)
        self.tokens.scatter_(1, self.steps[:, None], tokens[:, None])
        self.steps += ~self.done
        self.done |= (tokens[:, None] == self.stop_ids).any(1) | (self.steps == self.max_new_tokens)
        self.state.lengths.masked_fill_(self.done, 0)
        self.logits.copy_(self.lm(tokens[:, None], self.state)[:, -1])

    def finished(self, seconds):
        """Yield the completions of the rows that are done, and empty those rows."""
        rows = [row for row, done in enumerate(self.done.tolist()) if done and row in self.owner]
        stop_ids = self.stop_ids.tolist()
        for row, tokens, steps in zip(rows, self.tokens[rows].tolist(), self.steps[rows].tolist()):
            stopped = tokens[steps - 1] in stop_ids
            yield Completion(*self.owner.pop(row), tokens[:steps - stopped],
                             "stop" if stopped else "length", seconds)


@torch.inference_mode()
def generate(lm, prompts, *, num_samples=1, max_new_tokens=256, temperature=1.0, top_k=0,
             top_p=1.0, batch_size=64, stop_ids=(), seed=0, skip=(), seconds=float("inf")):
    """Yield a Completion of every prompt, num_samples times, each as soon as it is finished.

    prompts: lists of token ids. skip: (problem, sample) pairs not to run. seconds: when to end;
    rows still running are dropped. top_k and top_p act after the temperature, and 0 is greedy. In
    float32 on a CPU, batch_size and skip change no text, up to ties. ValueError for an empty prompt
    or a setting out of range.
    """
    choice = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    check_settings(prompts, num_samples=num_samples, max_new_tokens=max_new_tokens,
                   batch_size=batch_size, **choice)
    began, ready = time.perf_counter(), Prompts(lm, prompts)
    # 1. Wait in line: every problem's sample 0, then every sample 1, ...; drawn one by one.
    queue = ((problem, sample) for sample in range(num_samples) for problem in range(len(prompts))
             if (problem, sample) not in skip)
    owners = list(itertools.islice(queue, batch_size))
    longest = max(map(len, prompts), default=0) + max_new_tokens
    batch = Batch(lm, len(owners), longest, max_new_tokens, stop_ids,
                  functools.partial(choose_tokens, **choice))
    while owners or batch.owner:
        # 2. Empty rows are taken by the next in line, from the state after their prompts.
        if owners:
            empty = [row for row in range(len(batch.done)) if row not in batch.owner]
            batch.start(empty[:len(owners)], owners, seed, ready)
        # 3. When nobody is left in line, the batch shrinks.
        tidy(batch)
        # 4. One more token in every row.
        advance(batch)
        # 5. Read out the rows that are done, if they are in time.
        now = time.perf_counter() - began
        if now > seconds:
            return
        yield from batch.finished(now)
        owners = list(itertools.islice(queue, len(batch.done) - len(batch.owner)))


# ---- first reading ends here: recorded steps, sorted rows, one model into a file, options ----
VISIT_EVERY = dict(cuda=8)  # steps between visits of the host; 1 on a CPU
SORT_EVERY, SORT_ABOVE = 16, 1.2  # visits between checks; columns read per column used


def advance(batch):
    """Run the steps up to the host's next visit: several on a GPU, where it has to wait."""
    device = batch.lm.device.type
    for _ in range(VISIT_EVERY.get(device, 1)):
        if batch.graph is not None:
            batch.graph.replay()
            continue
        batch.step()  # the first one as it is: it compiles kernels, which can't be recorded
        if device == "cuda":
            batch.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(batch.graph):
                batch.step()  # recorded, not run: one launch instead of hundreds


def tidy(batch):
    """Drop empty rows once a quarter is empty. On a CPU, sort rows by length if attention, which
    reads groups of rows up to the longest of each, reads much in vain."""
    rows, lengths = sorted(batch.owner), batch.state.lengths
    batch.visits += 1
    if len(rows) > 0.75 * len(lengths):
        if batch.visits % SORT_EVERY or batch.lm.device.type != "cpu":
            return
        attends = any("keys" in cache for cache in batch.state.layers)
        read = sum(int(group.max()) * len(group) for group in lengths.split(CacheReads.ROWS))
        if not attends or read <= SORT_ABOVE * int(lengths.sum()):
            return
        rows = lengths.argsort().tolist()
    batch.owner = {i: batch.owner[row] for i, row in enumerate(rows) if row in batch.owner}
    rows = torch.tensor(rows, dtype=torch.long, device=lengths.device)
    batch.state.select(rows)
    for name in "logits", "keys", "steps", "tokens", "done":
        setattr(batch, name, getattr(batch, name)[rows])
    batch.graph = None  # these are other tensors: what was recorded is void


def check_settings(prompts, **settings):
    """ValueError for a number out of range or an empty prompt."""
    ranges = dict(temperature=(0, 1000), top_k=(0, 1e12), top_p=(1e-300, 1))
    for name, value in settings.items():
        least, most = ranges.get(name, (1, 1e12))
        if not least <= value <= most:  # refuses nan too
            raise ValueError(f"{name} = {value} is out of range, {least:g} to {most:g}")
    if 0 in (lengths := [len(prompt) for prompt in prompts]):
        raise ValueError(f"prompt {lengths.index(0)} is empty: a model needs a token to start from")


# ---- one model into a file
RECORD = dict(problem=int, sample=int, question=str, gold=str, completion=str, num_tokens=int,
              finish=str, seconds=float)  # fields of a line of samples.jsonl


def resume(path, lm, fields, belongs, settings, **about):
    """({(problem, sample): record}, seconds) of a run so far, which may append to its .jsonl file
    from now on. ValueError, and no change, if that or the .json beside it is of another run."""
    beside, records = path.with_suffix(".json"), {}
    begun = path.exists() and path.stat().st_size
    if "settings" not in read_json(beside) if beside.exists() else begun:
        raise ValueError(f"{beside}, the settings of {path}, is missing or foreign: choose "
                         f"another place, or delete the latter")
    for record in read_jsonl(path, fields, torn=True):
        pair = record["problem"], record["sample"]
        if pair in records or not belongs(record):
            raise ValueError(f"{path}: problem {pair[0]}, sample {pair[1]} is there twice or of "
                             f"another run: choose another place, or delete the file")
        records[pair] = record
    settings = settings | dict(processes=parallel.world(), device=lm.device.type,
                               dtype=str(lm.dtype).removeprefix("torch."))
    same_settings(beside, settings, bool(records))
    parallel.wait()  # until all have read what is there
    if not parallel.rank():
        path.touch()
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # a kill may have cut the last line
        if not records:
            write_json(beside, dict(settings=settings, **about))
    return records, max((record["seconds"] for record in records.values()), default=0.0)


def append(path, records, spent, **bar):
    """Write each record as it comes, with one write; `spent` seconds went by before."""
    parallel.wait()  # all clocks start together
    with open(path, "ab", buffering=0) as f:
        for record in tqdm(records, path.parent.name, disable=parallel.rank() > 0, **bar,
                           dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 10):
            f.write(json_line(record | dict(seconds=round(spent + record["seconds"], 4))))
    parallel.wait()


class NotMine(set):
    """What is done, and what others do: each process takes every world()-th problem."""

    def __contains__(self, pair):
        return super().__contains__(pair) or pair[0] % parallel.world() != parallel.rank()


def sample_model(model, folder, problems, template, knobs, most, seconds, device, dtype):
    """Sample one model into folder/samples.jsonl, going on where an earlier run stopped, up to
    `most` samples of each problem. template: around a question; knobs: settings of generate."""
    tokenizer, path = load_tokenizer(model), Path(folder, "samples.jsonl")
    lm = LM.from_pretrained(model, device, dtype).eval()
    about = dict(params=lm.num_parameters(), device=device_name(device), torch=torch.__version__)
    prepare(lm)  # what it joins is no longer a parameter
    asked = [(p.question, p.answer) for p in problems]
    prompts = [tokenizer.chat(template.replace("{question}", question)) for question, _ in asked]
    settings = knobs | dict(prompt=template, problems=len(asked), questions=crc(repr(asked)),
                            weights=hub.fingerprint(model))
    known = dict(enumerate(asked))
    done, spent = resume(path, lm, RECORD, lambda record: known.get(record["problem"]) == (
        record["question"], record["gold"]), settings, **about)

    def draw(seconds):
        for c in generate(lm, prompts, num_samples=most, stop_ids=tokenizer.eos_ids,
                          skip=NotMine(done), seconds=seconds, **knobs):
            question, gold = asked[c.problem]
            yield dict(problem=c.problem, sample=c.sample, question=question, gold=gold,
                       completion=tokenizer.decode(c.tokens), num_tokens=len(c.tokens),
                       finish=c.finish, seconds=c.seconds)
    if spent < seconds:
        list(draw(0))  # one step of the same batch compiles and touches all that is used
        append(path, draw(seconds - spent), spent, unit=" samples")
    print(summary(path), flush=True)


def summary(path):
    """The number of samples, their speed, and the last one, cut in the middle."""
    records = read_jsonl(path, RECORD, torn=True)
    if not records:
        return f"{path}: no sample was finished, give it more --seconds"
    last, text = records[-1], records[-1]["completion"]
    speed = sum(record["num_tokens"] for record in records) / last["seconds"]
    verdict = "right" if is_correct(extract_answer(text) or "", last["gold"]) else "wrong"
    text = text if len(text) < 250 else f"{text[:120]} ... {text[-120:]}"
    return (f"{path}: {len(records):,} samples, {speed:,.0f} tokens/s. The last is {verdict}:\n"
            f"{last['question']}\n{text}")


# ---- the script
SECONDS = 60  # of each model by default: the main command takes 9 minutes


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument_group("what to sample").add_argument
    add("--model", nargs="+", help="folders of checkpoints; default: all under --out")
    add("--task", default="arithmetic", help="or gsm8k, math500, openmath2, a .jsonl file")
    add("--split", choices=["train", "test"], default="test", help="of the task")
    add("--limit", type=number(1), default=72, help="how many problems")
    add("--subset-seed", type=number(0), help="take them at random; default: the first")
    add("--prompt-file", help="text around {question}; default: an instruction to reason, but none "
        "for arithmetic")
    add = parser.add_argument_group("how long").add_argument
    add("--seconds", type=number(0.1, 1e9, float), help=f"for each model; default: {SECONDS}, or "
        f"no limit with --num-samples")
    add("--num-samples", type=number(1), help="of each problem; default: no limit")
    add("--max-new-tokens", type=number(1, 10 ** 6), default=896, help="of a completion")
    add = parser.add_argument_group("how to choose tokens").add_argument
    add("--temperature", type=number(0, 1000, float), default=0.8, help="0 is greedy")
    add("--top-k", type=number(0), default=0, help="keep the k likeliest tokens; 0: all")
    add("--top-p", type=number(1e-6, 1, float), default=1.0, help="keep the likeliest of this mass")
    add("--seed", type=number(0, 2 ** 31), default=0, help="of the random numbers")
    add = parser.add_argument_group("where and how to compute").add_argument
    add("--batch-size", type=number(1, 10 ** 6), help="default: 256 on a CPU, 2048 on a GPU")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, else float32")
    add("--out", default="out", help="samples go to OUT/<model's name>/samples.jsonl")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with parallel.processes(args.device):
        device, dtype = choose_device(args.device, args.dtype)
        names = {}  # folder of each
        for model in args.model or find_models(args.out):
            hub.read_config(hub.checkpoint_folder(model))  # a mistake is told before data is read
            name = os.path.basename(os.path.abspath(model))
            if names.setdefault(name, model) != model:
                raise ValueError(f"two models are named {name}: sample them into different --out")
        problems = choose_subset(load_task(args.task, args.split), args.limit, args.subset_seed)
        if len(problems) < parallel.world():  # one without would search for its own forever
            raise ValueError(f"{len(problems)} problems: too few for {parallel.world()} processes")
        size = args.batch_size or (2048 if device.type == "cuda" else 256)
        knobs = dict(seed=args.seed, batch_size=size, max_new_tokens=args.max_new_tokens,
                     temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
        template = prompt_template(args.task, args.prompt_file)
        most = args.num_samples or 10 ** 9
        seconds = args.seconds or (float("inf") if args.num_samples else SECONDS)
        until = "" if seconds == float("inf") else f", {seconds:g} seconds a model"
        print(f"{len(problems)} problems of {args.task}{until}", flush=True)
        for name, model in names.items():
            with parallel.exclusively(os.path.join(args.out, name)) as folder:
                sample_model(model, folder, problems, template, knobs, most, seconds, device, dtype)


if __name__ == "__main__":
    run(main, "--batch-size")
