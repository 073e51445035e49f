"""Sample many completions per problem in large batches, against the clock.

    python sample.py                                every model under out/, each the same seconds
    python sample.py --split train --limit 500 --num-samples 4 --out out/train    to learn from
    torchrun --nproc_per_node=8 sample.py           each process takes a share of the problems

Writes out/<name>/samples.jsonl, a record per completion, and samples.json, the settings. The same
command goes on with a stopped run.
"""
import functools
import itertools
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common import (Parser, add_device_options, add_task_options, choose_device, crc, device_name,
                    find_models, json_line, number, optional_json, read_jsonl, require, run,
                    same_settings, write_json)

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import hub
import parallel
from data import choose_subset, load_task, load_tokenizer, prompt_template
from decode_kernels import choose_token, prepare, use_triton
from model import LM, CacheReads


# ---- random numbers
# A uniform number for each step of each completion, a pure function of (seed, problem, sample,
# step): SplitMix64 (Steele, Lea & Flood 2014). So no text depends on others, order or restarts.
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
    for part in seed, *torch.tensor(owners).unbind(1):
        keys = mix(keys + WEYL + part)
    return keys


def uniforms(keys, steps):
    """Numbers in [0, 1) for keys and steps (B,): (B,) float32, of 23 bits: u * total in
    choose_tokens then never rounds up to total."""
    return ((mix(keys + (steps + 1) * WEYL) >> 41) & (2 ** 23 - 1)).float() * 2.0 ** -23


# ---- choosing a token
def nucleus(p, top_p, few=256):
    """p (B, V), in place: 0 but for the fewest likeliest tokens of mass top_p (Holtzman et al.
    2020), of equal ones the first. They are sought among the `few` likeliest, where those do not
    suffice among more: sorting all takes 20 times as long.
    """
    some = few < p.shape[1] and not p.is_cuda  # a recorded step can't look at what it found
    tokens = torch.arange(p.shape[1], device=p.device).expand_as(p)
    tokens = p.topk(few).indices.sort().values if some else tokens
    values, order = p.gather(1, tokens).sort(descending=True, stable=True)
    kept = values.cumsum(1) - values < top_p  # likelier tokens have less than that mass
    short = values.masked_fill(~kept, 1).amin(1) <= values[:, -1]  # all, or one equal to the last
    left = p[short] if some else p[:0]
    p.zero_().scatter_(1, tokens.gather(1, order), values * kept)
    if len(left):
        p[short] = nucleus(left, top_p, 8 * few)
    return p


def choose_tokens(logits, u, temperature, top_k=0, top_p=1.0):
    """A token for each row, by inverting the cumulative distribution at u: (B, V), (B,) -> (B,).

    One random number a row, however large the vocabulary. Temperature 0 takes the likeliest token.
    Logits that are nan or infinite give V, which is no token.
    """
    vocab = logits.shape[-1]
    if temperature < 1e-30:  # logits / temperature would overflow
        largest, tokens = logits.max(-1)
        return tokens.masked_fill(~largest.isfinite(), vocab)
    if 0 < top_k < vocab:  # ties with the k-th stay
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    top_p = max(top_p, 1e-30)  # 1e-300 is 0 in float32
    if use_triton("auto", logits):
        return choose_token(logits, u, temperature, top_p)
    p = (logits.float() / temperature).softmax(-1)  # (B, V)
    cdf = (nucleus(p, top_p) if top_p < 1 else p).cumsum_(1)
    return torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]  # V if p is nan


# ---- prompts
PACK = 8192  # tokens of a pass over prompts, which bounds its memory


def prefill(lm, prompts):
    """Run prompts {problem: ids}, the longest first, many in a pass. Yield for each pass
    ({problem: row}, state, logits (B, V) of the next token).

    Rows are padded on the right, and padding must be a no-op. Known bugs elsewhere are a
    convolution whose window ends in the padding, and a state that goes on decaying over it: the
    mixers of model.py take each row's own end (counts), and make no step for padding.
    """
    left = sorted(prompts, key=lambda problem: len(prompts[problem]), reverse=True)
    while left:
        size = max(1, PACK // len(prompts[left[0]]))
        pack, left = left[:size], left[size:]
        rows = [torch.tensor(prompts[problem]) for problem in pack]
        tokens = pad_sequence(rows, batch_first=True).to(lm.device)  # (B, L)
        counts = torch.tensor([len(row) for row in rows], device=lm.device)
        state = lm.init_state(*tokens.shape)
        logits = lm(tokens, state, counts)[:, 0]
        yield {problem: i for i, problem in enumerate(pack)}, state, logits


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

    What a step reads and writes are tensors that stay where they are. The host looks only between
    steps, to read out the rows that are done and to start others in their place.
    """

    def __init__(self, lm, size, max_length, max_new_tokens, stop_ids, choose):
        self.lm, self.choose, self.max_new_tokens = lm, choose, max_new_tokens
        self.owner, self.state = {}, lm.init_state(size, max_length)  # owner: of each busy row
        self.no_token = lm.config.vocab_size  # from choose_tokens; a row ends with it, too
        self.stop_ids = torch.tensor([*stop_ids, self.no_token], device=lm.device)
        self.logits = torch.zeros(size, self.no_token, dtype=lm.dtype, device=lm.device)
        self.keys, self.steps = torch.zeros(2, size, dtype=torch.long, device=lm.device)
        self.tokens = torch.zeros(size, max_new_tokens + 1, dtype=torch.long, device=lm.device)
        self.done = torch.ones(size, dtype=torch.bool, device=lm.device)  # at its end, or empty
        self.passes, self.visits, self.graph = [], 0, None  # see prefill, tidy, advance

    def start(self, rows, owners, seed, prompts):
        """Begin completions in empty rows, each from the state after its prompt; that runs once."""
        ran = {problem for places, _, _ in self.passes for problem in places}
        new = {problem: prompts[problem] for problem, _ in owners if problem not in ran}
        self.passes += prefill(self.lm, new)
        for places, state, logits in self.passes:
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
        """One more token in every row, without waiting for a number to reach the host. A done row
        runs along, at length 0, and its token lands behind its text, where nobody reads it."""
        tokens = self.choose(self.logits, uniforms(self.keys, self.steps))  # (B,)
        self.tokens.scatter_(1, self.steps[:, None], tokens[:, None])
        self.steps += ~self.done
        self.done |= (tokens[:, None] == self.stop_ids).any(1) | (self.steps == self.max_new_tokens)
        self.state.lengths.masked_fill_(self.done, 0)
        tokens = tokens.clamp(max=self.no_token - 1)
        self.logits.copy_(self.lm(tokens[:, None], self.state)[:, -1])

    def finished(self, seconds):
        """Yield the completions of the rows that are done, and empty those rows."""
        done, stop_ids = self.done.tolist(), self.stop_ids.tolist()
        rows = [row for row in self.owner if done[row]]
        for row, tokens, steps in zip(rows, self.tokens[rows].tolist(), self.steps[rows].tolist()):
            owner, last = self.owner.pop(row), tokens[steps - 1]
            if last == self.no_token:
                raise ValueError("problem {}, sample {}, step {}: the logits are nan or infinite: "
                                 "check the weights, or use float32".format(*owner, steps))
            stopped = last in stop_ids
            yield Completion(*owner, tokens[:steps - stopped],
                             "stop" if stopped else "length", seconds)


@torch.inference_mode()
def generate(lm, prompts, *, num_samples=1, max_new_tokens=256, temperature=1.0, top_k=0,
             top_p=1.0, batch_size=64, stop_ids=(), seed=0, skip=(), seconds=float("inf")):
    """Yield a Completion of every prompt, num_samples times, each as soon as it is finished.

    prompts: lists of token ids. skip: (problem, sample) pairs not to run. seconds: when to end;
    rows still running are dropped. top_k and top_p act after the temperature (0: greedy). In
    float32 on a CPU, batch_size and skip change no text, up to ties. ValueError at the call for
    arguments out of range, and later for logits that are nan or infinite.
    """
    began = time.perf_counter()
    # 1. Wait in line: every problem's sample 0, then every sample 1, ...; drawn one by one.
    queue = ((problem, sample) for sample in range(num_samples) for problem in range(len(prompts))
             if (problem, sample) not in skip)
    owners = list(itertools.islice(queue, batch_size))
    longest = max(map(len, prompts), default=0) + max_new_tokens
    batch = Batch(lm, len(owners), longest, max_new_tokens, stop_ids, functools.partial(
        choose_tokens, temperature=temperature, top_k=top_k, top_p=top_p))
    while owners or batch.owner:
        # 2. Empty rows are taken by the next in line, from the state after their prompts.
        if owners:
            empty = [row for row in range(len(batch.done)) if row not in batch.owner]
            batch.start(empty[:len(owners)], owners, seed, prompts)
        # 3. When nobody is left in line, the batch drops its empty rows.
        tidy(batch)
        # 4. One more token in every row: batch.step(), on a GPU several, recorded.
        advance(batch)
        # 5. Read out the rows that are done, if they are in time.
        now = time.perf_counter() - began
        if now > seconds:
            return
        yield from batch.finished(now)
        owners = list(itertools.islice(queue, len(batch.done) - len(batch.owner)))


# ---- first reading ends here: recorded steps, checks, one model into a file, options ----
VISIT_EVERY = dict(cuda=8)  # steps between visits of the host; 1 on a CPU
SORT_EVERY, SORT_ABOVE = 16, 1.2  # visits between checks; columns read per column used


def advance(batch):
    """Run the steps up to the host's next visit: several on a GPU, where it has to wait."""
    device = batch.lm.device.type
    for _ in range(VISIT_EVERY.get(device, 1)):
        if batch.graph:
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
        attends = any("keys" in cache for cache in batch.state.layers)
        if batch.visits % SORT_EVERY or batch.lm.device.type != "cpu" or not attends:
            return
        read = sum(int(group.max()) * len(group) for group in lengths.split(CacheReads.ROWS))
        if read <= SORT_ABOVE * int(lengths.sum()):
            return
        rows = lengths.argsort().tolist()
    batch.owner = {i: batch.owner[row] for i, row in enumerate(rows) if row in batch.owner}
    rows = torch.tensor(rows, dtype=torch.long, device=lengths.device)
    batch.state.select(rows)
    for name in "logits", "keys", "steps", "tokens", "done":
        setattr(batch, name, getattr(batch, name)[rows])
    batch.graph = None  # these are other tensors: what was recorded is void


SETTINGS = dict(  # of generate: least, most, default of the script, and its --help
    num_samples=(1, 10 ** 12, None, "of each problem; default: no limit"),
    max_new_tokens=(1, 10 ** 6, 896, "of a completion"),
    temperature=(0.0, 1e3, 0.8, "0 is greedy"),
    top_k=(0, 10 ** 12, 0, "keep the k likeliest tokens; 0: all"),
    top_p=(1e-300, 1.0, 1.0, "keep the likeliest tokens of this mass"),
    batch_size=(1, 10 ** 6, None, "default: 256 on a CPU, 2048 on a GPU"),
    seed=(0, 2 ** 31, 0, "of the random numbers"))


def with_checks(generate):
    """generate, which refuses arguments at the call, not at its first text."""
    @functools.wraps(generate)
    def checked(lm, prompts, **settings):
        for name, (least, most, *_) in SETTINGS.items():
            value, kind = settings.get(name, least), type(least)
            require(isinstance(value, (int, kind)) and least <= value <= most,  # refuses nan too
                    f"{name} = {value!r} is no {kind.__name__}, {least:g} to {most:g}")
        ids = range(lm.config.vocab_size)
        for prompt in prompts if isinstance(prompts, list) else [prompts]:
            require(isinstance(prompt, list) and prompt
                    and all(type(token) is int and token in ids for token in prompt),
                    f"prompts: {prompt!r:.60} is no list of ids below {ids.stop}")
        return generate(lm, prompts, **settings)
    return checked


generate = with_checks(generate)


# ---- one model into a file
RECORD = dict(problem=int, sample=int, question=str, gold=str, completion=str, num_tokens=int,
              finish=str, seconds=float)  # fields of a line of samples.jsonl


def read_settings(path, key):
    """The settings beside a .jsonl file, in .json, None if both are new. ValueError if they have no
    text of this key, as those of another program."""
    beside = path.with_suffix(".json")
    if beside.exists() or path.exists() and path.stat().st_size:
        settings = optional_json(beside).get("settings")
        require(isinstance(settings, dict) and isinstance(settings.get(key), str),
                f"{beside}, the settings of {path}, is missing or foreign: choose another place, "
                "or delete the latter")
        return settings


def resume(path, lm, fields, belongs, settings, **about):
    """({(problem, sample): record}, seconds) of a run so far, which may now append to its .jsonl
    file. ValueError, and no change, if records or settings are of another run."""
    records = {}
    for record in read_jsonl(path, fields, torn=True):
        pair = record["problem"], record["sample"]
        if pair in records or not belongs(record):
            raise ValueError(f"{path}: problem {pair[0]}, sample {pair[1]} is there twice or of "
                             f"another run: delete the file, or choose another place")
        records[pair] = record
    settings = settings | dict(processes=parallel.world(), device=lm.device.type,
                               dtype=str(lm.dtype)[6:])
    beside = path.with_suffix(".json")
    same_settings(beside, settings, bool(records))
    parallel.wait()  # until all have read what is there
    if not parallel.rank():
        path.touch()
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # a kill may cut the last line
        if not records:
            write_json(beside, dict(settings=settings, **about))
    return records, max((record["seconds"] for record in records.values()), default=0.0)


def append(path, records, spent, total=None):
    """Write each record as it comes; `spent` seconds went by before."""
    parallel.wait()  # all clocks start together
    with open(path, "ab", buffering=0) as f:
        for record in tqdm(records, path.parent.name, total, disable=parallel.rank() > 0,
                           mininterval=0.5 if sys.stderr.isatty() else 10):
            f.write(json_line(record | dict(seconds=round(spent + record["seconds"], 4))))
    parallel.wait()


class NotMine(set):
    """What is done, and what others do: a process takes every world()-th problem."""

    def __contains__(self, pair):
        return super().__contains__(pair) or pair[0] % parallel.world() != parallel.rank()


def sample_model(model, folder, problems, template, knobs, most, seconds, device, dtype,
                 state_dtype):
    """Sample a model into folder/samples.jsonl, going on where a run stopped, up to `most` samples
    of each problem. template: the text around a question; knobs: settings of generate."""
    lm, tokenizer = LM.from_pretrained(model, device, dtype).eval(), load_tokenizer(model)
    about = dict(params=lm.num_parameters(), device=device_name(device), torch=torch.__version__)
    lm.state_dtype = getattr(torch, state_dtype)
    prepare(lm)  # what it joins is no longer a parameter
    asked = {i: (problem.question, problem.answer) for i, problem in enumerate(problems)}
    prompts = [tokenizer.chat(template.replace("{question}", p.question)) for p in problems]
    settings = knobs | dict(prompt=template, problems=len(asked), weights=hub.fingerprint(model),
                            questions=crc(repr(list(asked.values()))), state_dtype=state_dtype)
    path = Path(folder, "samples.jsonl")

    def draw(seconds):
        for c in generate(lm, prompts, num_samples=most, stop_ids=tokenizer.eos_ids,
                          skip=NotMine(done), seconds=seconds, **knobs):
            yield dict(zip(RECORD, (c.problem, c.sample, *asked[c.problem], tokenizer.decode(
                c.tokens), len(c.tokens), c.finish, c.seconds)))
    with parallel.exclusively(folder):
        read_settings(path, "questions")
        done, spent = resume(path, lm, RECORD, lambda record: asked.get(record["problem"]) == (
            record["question"], record["gold"]), settings, **about)
        if spent >= seconds or sum(sample < most for _, sample in done) == most * len(asked):
            print(f"{path}: finished")
            return
        list(draw(0))  # one step of the same batch compiles and touches all that is used
        append(path, draw(seconds - spent), spent)
    print(f"{path}: {len(read_jsonl(path)):,} samples")


# ---- the script
def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.group("what to sample")
    add("--model", nargs="+", help="folders of checkpoints; default: all under --out")
    add_task_options(add, limit=200)
    add("--split", choices=["train", "test"], default="test", help="of the task")
    add("--seconds", type=number(0.1, 1e9, float),
        help="for each model; default: no limit with --num-samples, else 60")
    add = parser.group("how to sample")
    for name, (least, most, default, text) in SETTINGS.items():
        add("--" + name.replace("_", "-"), type=number(least, most, type(least)), default=default,
            help=text)
    add = parser.group("where")
    add_device_options(add, states=True)
    add("--out", default="out", help="samples go to OUT/<model's name>/samples.jsonl")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with parallel.processes(args.device):
        device, dtype = choose_device(args.device, args.dtype)
        models = args.model or find_models(args.out)
        for model in models:
            hub.read_config(model)  # a mistake is told before data is read
        problems = choose_subset(load_task(args.task, args.split), args.limit, args.subset_seed)
        require(len(problems) >= parallel.world(),  # one without would search for its own forever
                f"{len(problems)} problems: too few for {parallel.world()} processes")
        args.batch_size = args.batch_size or (2048 if device.type == "cuda" else 256)
        knobs = {name: getattr(args, name) for name in SETTINGS}
        most = knobs.pop("num_samples") or 10 ** 9
        template = prompt_template(args.task, args.prompt_file)
        seconds = args.seconds or (float("inf") if args.num_samples else 60)
        limit = f", {seconds:g} seconds a model" if seconds < float("inf") else ""
        print(f"{len(problems)} problems{limit}")
        for model in models:
            folder = os.path.join(args.out, os.path.basename(os.path.abspath(model)))
            sample_model(model, folder, problems, template, knobs, most, seconds, device, dtype,
                         args.state_dtype)


if __name__ == "__main__":
    run(main, "--batch-size")
