"""How fast do they decode? Random weights in the shapes of real models, as a Transformer and as its students.

    python sample.py --bench                                                   a minute or two on a laptop
    python sample.py --bench --shape llama-1b llama-3b --batch 1,16,64,256,512 --generate 512,2048,8192
    python sample.py --bench --against FOLDER --batch 16 --prompt 60 --generate 128     a Llama here and in transformers

Writes  out/bench.jsonl, a line per measurement; python plot.py draws them. Rerunning measures what is not there yet.

The protocol of the literature: random prompts of one length, a fixed number of new tokens, no stop token. Every row of the
batch is decoded as sample.py decodes it (temperature 0.8). Prompts are timed by themselves. Decoding is timed after a
warm-up, either every step or, where that takes too long, a few steps at several lengths of the context, between which
the time is interpolated; a line says which. KV caches and SSM states hold random numbers. The models take turns, several
times, each alone in memory, and the ratio to the Transformer is the median of those of the turns.

With --against nothing is written: whole texts are drawn with real weights, prompts included, in turns with
transformers.generate and with the products of the weights alone, which bound what any engine can do with them.

Contents: shapes, the engine, time, bytes, memory, a measurement, the table, against transformers, the script.
"""
import collections
import ctypes
import dataclasses
import datetime
import gc
import itertools
import json
import os
import statistics
import time

import numpy as np
import torch

import kernels
from data import Parser, at_least
from memory import free_memory, sampling_memory, state_tensors, weight_bytes
from model import FLOAT32_PARAMETERS, LM, Config, choose_device, device_name, linear, shapes_only
from sample import Batch, Prompts, choose_tokens, read_samples
from sample import generate as sample_texts

# ------------------------------------------------------------------------------------------------ shapes
SHAPES = {
    "tiny": dict(vocab_size=597),  # of the built-in experiment
    "smollm2-135m": dict(vocab_size=49_152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, d_ff=1536),
    "llama-1b": dict(vocab_size=128_256, d_model=2048, n_layers=16, n_heads=32, n_kv_heads=8, d_ff=8192),
    "llama-3b": dict(vocab_size=128_256, d_model=3072, n_layers=28, n_heads=24, n_kv_heads=8, d_ff=8192)}
# The mixer and the attention layers of the hybrids. The paper's are MambaInLlama's: the 3B one keeps these six layers; of the
# 1B one only their number is known, 4, and every fourth is where MambaInLlama's 8B with as large a share keeps them. The
# other two shapes have the mixer that distill.py takes by default, SmolLM2 the same share of attention.
HYBRIDS = {"tiny": ("mamba2", [1]), "smollm2-135m": ("mamba2", range(3, 30, 4)),
           "llama-1b": ("mamba", [3, 7, 11, 15]), "llama-3b": ("mamba", [3, 8, 13, 18, 23, 27])}
PATTERNS = ("transformer", "pure", "hybrid")


def config_of(shape, pattern):
    """The Config of a shape with attention everywhere, nowhere, or in the hybrid's layers."""
    config = Config(**SHAPES[shape])
    mixer, attention = HYBRIDS[shape] if pattern == "hybrid" else ("mamba2", ())
    mixers = ["attention" if pattern == "transformer" or i in attention else mixer for i in range(config.n_layers)]
    return dataclasses.replace(config, mixers=mixers)


def random_model(config, device, dtype):
    """Random weights, made in `dtype` where they stay: a 3B model is never in memory in float32 too."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            lm = LM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, weight in lm.named_parameters():
        if name.endswith(FLOAT32_PARAMETERS):
            weight.data = weight.data.float()
    return lm


# ------------------------------------------------------------------------------------------------ the engine
class Engine:
    """A full batch of sample.generate whose rows have one length and never stop. All that knows sample.py's parts is here."""

    def __init__(self, lm, batch, prompt, generate):
        def choose(logits, u):
            return choose_tokens(logits, u, temperature=0.8)
        self.lm, self.batch = lm, Batch(lm.fuse(), batch, prompt + generate, generate + 1, (), choose)  # + 1: never at the end
        self.prompts = torch.randint(lm.config.vocab_size, (batch, prompt)).tolist()
        for tensor in itertools.chain(*(layer.values() for layer in self.batch.state.layers)):
            tensor.normal_()

    def prefill(self, count):
        """Run the prompts of the first `count` rows."""
        rows = list(range(count))
        owners = [(row, 0) for row in rows]
        self.batch.start(rows, owners, 0, Prompts(self.lm, self.prompts, owners).start(rows))

    def seek(self, context):
        """Put all rows at this length of the context."""
        self.batch.state.lengths.fill_(context)
        for flags in (self.batch.steps, self.batch.stopped, self.batch.done):
            flags.zero_()

    def steps(self, count):
        """So many times: choose a token of every row and run the model on them."""
        self.batch.advance(count)


# ------------------------------------------------------------------------------------------------ time
POSITIONS, WARM_UP, TIMED = 8, 2, 6  # lengths of the context at which steps are timed; steps before, and timed, at each
LONG = 2 * POSITIONS * (WARM_UP + TIMED)  # new tokens from which sampling a few steps saves something


def seconds(function, count, device):
    """Wall-clock time of function(count), from an idle device to an idle device."""
    kernels._synchronize(device)
    start = time.perf_counter()
    function(count)
    kernels._synchronize(device)
    return time.perf_counter() - start


def time_prompts(engine, budget):
    """(seconds per prompt, how many were timed): all that `budget` seconds suffice for, at least one."""
    engine.prefill(1)
    count = int(budget / seconds(engine.prefill, 1, engine.lm.device))
    count = min(max(count, 1), len(engine.prompts))
    return seconds(engine.prefill, count, engine.lm.device) / count, count


def time_every_step(engine, prompt, generate):
    """(seconds per step, [(context, seconds per step) of each of POSITIONS stretches])."""
    engine.seek(prompt)
    engine.steps(min(WARM_UP, generate))
    engine.seek(prompt)
    stretches = [stretch for stretch in np.array_split(np.arange(generate), POSITIONS) if len(stretch)]
    times = [seconds(engine.steps, len(stretch), engine.lm.device) for stretch in stretches]
    points = [(prompt + stretch.mean(), total / len(stretch)) for stretch, total in zip(stretches, times)]
    return sum(times) / generate, points


def time_some_steps(engine, prompt, generate, positions=POSITIONS):
    """The same from TIMED steps at each of some lengths of the context, from the first to the last."""
    points = []
    for context in np.linspace(prompt, prompt + generate - WARM_UP - TIMED, positions).astype(int):
        engine.seek(int(context))
        engine.steps(WARM_UP)
        points.append((context + WARM_UP + (TIMED - 1) / 2, seconds(engine.steps, TIMED, engine.lm.device) / TIMED))
    return np.interp(np.arange(prompt, prompt + generate), *zip(*points)).mean(), points


METHODS = {"all steps": time_every_step, f"{TIMED} steps at each of {POSITIONS} lengths, interpolated": time_some_steps}


def choose_method(engine, prompt, generate, budget):
    """All steps if they take at most `budget` seconds, to judge by the first and the last."""
    every, some = METHODS
    short = generate < LONG or time_some_steps(engine, prompt, generate, 2)[0] * generate <= budget
    return every if short else some


# ------------------------------------------------------------------------------------------------ bytes
def bytes_per_step(config, dtype, batch, prompt, generate):
    """What a step has to move, on average over the new tokens.

    Weights are read once, the embedding as the head (untied: only the head). Of each row the KV cache is read up to its
    length and gets one more token; SSM states and convolution windows are read and written. Activations and logits are
    not counted: they need not leave the chip.
    """
    kv, fixed = (sum(tensor.nbytes for tensor in tensors) for tensors in state_tensors(config, dtype, 1))
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.d_model * dtype.itemsize
    context = prompt + (generate + 1) / 2  # mean of prompt + 1, ..., prompt + generate
    return weight_bytes(config, dtype) - lookup + batch * (context * kv + 2 * fixed)


# ------------------------------------------------------------------------------------------------ memory
def peak(device, anew=False):
    """The most bytes in use since they were last counted anew; 0 where nobody tells (a CPU without Linux's /proc)."""
    if anew:
        gc.collect()
    if device.type == "cuda":
        if anew:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return 0
    if anew:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc keeps what was freed: the next model would seem to need nothing
            libc.malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))


# ------------------------------------------------------------------------------------------------ a measurement
@dataclasses.dataclass
class Run:
    """One turn of one model."""
    prefill: float  # seconds per prompt, of
    prompts: int  # so many
    step: float  # seconds, on average over the new tokens
    points: list  # [(tokens in the context, seconds per step), ...]
    method: str
    memory: int | None


@torch.inference_mode()
def measure(config, device, dtype, batch, prompt, generate, budget, method=None):
    """A Run of a model that is made for it and gone afterwards."""
    start = peak(device, anew=True)
    engine = Engine(random_model(config, device, dtype), batch, prompt, generate)
    prefill, prompts = time_prompts(engine, budget)
    method = method or choose_method(engine, prompt, generate, budget)
    step, points = METHODS[method](engine, prompt, generate)
    return Run(prefill, prompts, step, points, method, peak(device) - start or None)


def attempt(config, device, dtype, batch, prompt, generate, *rest):
    """`measure`, or None where the memory does not suffice. On a CPU the estimate decides: there Linux ends who takes more."""
    if device.type == "cpu" and estimate(config, dtype, batch, prompt, generate) > free_memory(device):
        return None
    try:
        return measure(config, device, dtype, batch, prompt, generate, *rest)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
    return None


def estimate(config, dtype, batch, prompt, generate):
    """Bytes that memory.py expects: prompts are run one by one, and none is kept."""
    return sum(sampling_memory(config, dtype, batch, prompt + generate, 1, prompt).values())


def take_turns(configs, repeats, *rest):
    """{pattern: its Runs, [] if it was out of memory}, the models one after the other, `repeats` times."""
    runs = {pattern: [] for pattern in configs}
    for _ in range(repeats):
        for pattern, config in configs.items():
            if None not in runs[pattern]:
                runs[pattern].append(attempt(config, *rest, runs[pattern][0].method if runs[pattern] else None))
    return {pattern: [] if None in found else found for pattern, found in runs.items()}


def settings_of(shape, pattern, device, dtype, batch, prompt, generate):
    """What tells one line of bench.jsonl from another."""
    counts = collections.Counter(config_of(shape, pattern).mixers)
    return dict(shape=shape, pattern=pattern, mixers=" + ".join(f"{n} {mixer}" for mixer, n in sorted(counts.items())),
                dtype=str(dtype).removeprefix("torch."), device=device_name(device), batch=batch, prompt=prompt,
                generate=generate)


MEASURED = ("method", "prefill_prompts", "prefill_tokens_per_second", "decode_tokens_per_second", "ms_per_step", "spread",
            "fraction", "memory", "ratio", "contexts", "ms_at_contexts")


def measured(runs, transformer, batch, prompt, moved, bandwidth):
    """The fields MEASURED of a line: medians over the runs; null if there are none, out of memory.

    spread: the slowest less the fastest, of the median; fraction: of the copy bandwidth; ratio: as fast as the Transformer.
    """
    if not runs:
        return dict.fromkeys(MEASURED)
    every = [run.step for run in runs]
    step, ratios = statistics.median(every), [theirs.step / run.step for theirs, run in zip(transformer, runs)]
    contexts, times = [context for context, _ in runs[0].points], zip(*([t for _, t in run.points] for run in runs))
    values = (runs[0].method, runs[0].prompts, prompt / statistics.median(run.prefill for run in runs), batch / step, 1e3 * step,
              (max(every) - min(every)) / step, moved / step / bandwidth, max(run.memory or 0 for run in runs) or None,
              statistics.median(ratios) if ratios else None, contexts,
              [round(1e3 * statistics.median(turns), 5) for turns in times])
    return dict(zip(MEASURED, values))


def measure_group(shape, batch, generate, device, dtype, bandwidth, args):
    """The lines of bench.jsonl for the patterns of one shape, batch and length."""
    configs = {pattern: config_of(shape, pattern) for pattern in args.pattern}
    runs = take_turns(configs, args.repeats, device, dtype, batch, args.prompt, generate, args.seconds)
    rows = []
    for pattern, config in configs.items():
        with shapes_only():
            params = LM(config).num_parameters()
        moved = bytes_per_step(config, dtype, batch, args.prompt, generate)
        row = settings_of(shape, pattern, device, dtype, batch, args.prompt, generate)
        row |= dict(params=params, bytes_per_step=moved, copy_bandwidth=bandwidth, oom=not runs[pattern],
                    memory_estimate=estimate(config, dtype, batch, args.prompt, generate))
        row |= measured(runs[pattern], runs.get("transformer", []), batch, args.prompt, moved, bandwidth)
        row |= dict(repeats=args.repeats, date=datetime.date.today().isoformat(), torch=torch.__version__,
                    threads=torch.get_num_threads())
        rows.append({name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()})
    return rows


# ------------------------------------------------------------------------------------------------ the table
COLUMNS = {"shape": 13, "batch": 6, "tokens": 11, "pattern": 13, "tokens/s": 10, "ms/step": 9, "x Transformer": 15, "GB/step": 9,
           "of copy": 9, "GB": 7, "estimated": 11, "prefill/s": 11}


def table_line(cells):
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values()))


def cells_of(row):
    def number(name, form, scale=1.0):
        return "-" if row[name] is None else format(row[name] * scale, form)
    return (row["shape"], row["batch"], f"{row['prompt']}+{row['generate']}", row["pattern"],
            "no memory" if row["oom"] else number("decode_tokens_per_second", ",.0f"), number("ms_per_step", ".3f"),
            number("ratio", ".2f"), number("bytes_per_step", ".3g", 1e-9), number("fraction", ".0%"),
            number("memory", ".3g", 1e-9), number("memory_estimate", ".3g", 1e-9), number("prefill_tokens_per_second", ",.0f"))


# ------------------------------------------------------------------------------------------------ against transformers
def run_ours(lm, prompts, tokens):
    """Draw `tokens` new tokens after each of the prompts (B, L), at temperature 0.8."""
    for c in sample_texts(lm, prompts.tolist(), max_new_tokens=tokens, batch_size=len(prompts), temperature=0.8):
        assert len(c.tokens) == tokens


@torch.inference_mode()
def run_theirs(model, prompts, tokens):
    """The same by transformers; on a GPU with its static cache, whose step it compiles."""
    cache = dict(cache_implementation="static") if prompts.device.type == "cuda" else {}
    found = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=0.8, top_k=0, top_p=1.0,
                           max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=None, pad_token_id=0, **cache)
    assert found.shape[1] == prompts.shape[1] + tokens


@torch.inference_mode()
def run_products(products, prompts, tokens):
    """Only the products with the weights, as many as the new tokens take; fused and packed as LM.fuse has left them."""
    inputs = {width: torch.randn(len(prompts), width, device=prompts.device, dtype=dtype)
              for width, dtype in {(group[0].weight.shape[1], group[0].weight.dtype) for group in products}}
    for _ in range(tokens):
        for group in products:
            linear(inputs[group[0].weight.shape[1]], *group)


def against_transformers(folder, batch, prompt, generate, device, dtype, repeats):
    """Print tokens/s of ours, of transformers.generate on the same weights, and of the products alone, in turns."""
    try:
        import transformers
    except ImportError:
        raise ValueError("--against compares with the package transformers: pip install transformers") from None
    lm = LM.from_pretrained(folder, device, dtype).eval().fuse()
    if set(lm.config.mixers) != {"attention"}:
        raise ValueError(f"--against {folder} holds a student, which transformers cannot run: give a Llama's folder")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    theirs.generation_config.eos_token_id = None
    prompts = torch.randint(lm.config.vocab_size, (batch, prompt), device=device)
    runs = {"ours": (run_ours, lm), "transformers": (run_theirs, theirs), "the products alone": (run_products, lm.products())}
    for run, model in runs.values():
        run(model, prompts, min(generate, 8))  # warm-up
    speeds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, (run, model) in runs.items():
            took = seconds(lambda tokens: run(model, prompts, tokens), generate, device)
            speeds[name].append(batch * generate / took)
    for name, found in speeds.items():
        ratio = statistics.median(ours / other for ours, other in zip(speeds["ours"], found))
        print(f"{name:>20}: {statistics.median(found):,.1f} tokens/s ({min(found):,.1f} to {max(found):,.1f} in {repeats} turns)"
              + ("" if name == "ours" else f", ours is {ratio:.2f} times as fast"))


# ------------------------------------------------------------------------------------------------ the script
DEFAULTS = dict(cuda=dict(shape=["llama-1b"], prompt=512, generate=[512, 2048, 8192], batch=[1, 16, 64, 256, 512], seconds=5.0),
                cpu=dict(shape=["tiny"], prompt=128, generate=[256, 1024], batch=[1, 16, 64, 256], seconds=0.5))


def numbers(text):
    return [at_least(1)(part) for part in text.split(",")]


def parse_args(argv=None):
    def default(name):
        values = {kind: ",".join(map(str, np.atleast_1d(DEFAULTS[kind][name]))) for kind in ("cuda", "cpu")}
        return f"; default: {values['cuda']} on cuda, {values['cpu']} on cpu"
    parser = Parser(__doc__)
    parser.add_argument("--bench", action="store_true", help="what brought you here")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="sizes of the model" + default("shape"))
    parser.add_argument("--pattern", nargs="+", choices=PATTERNS, default=list(PATTERNS), help="all attention, none (discrete "
                        "Mamba-2), or the paper's attention layers; without transformer there is nothing to compare with")
    parser.add_argument("--prompt", type=at_least(1), help="tokens of every prompt" + default("prompt"))
    parser.add_argument("--generate", type=numbers, help="new tokens, as in 512,2048" + default("generate"))
    parser.add_argument("--batch", type=numbers, help="rows decoded at a time, as in 1,64" + default("batch"))
    parser.add_argument("--against", metavar="FOLDER", help="compare with transformers.generate on the weights of this Llama, for "
                        "the first --batch and --generate, instead")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="turns, whose median counts")
    parser.add_argument("--seconds", type=at_least(0, float), help="of decoding in one turn, beyond which only some steps are "
                        "timed; also of prompts" + default("seconds"))
    parser.add_argument("--out", default="out", help="lines go to OUT/bench.jsonl")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, float32 on cpu")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device, dtype = choose_device(args.device, args.dtype)
    for name, value in DEFAULTS[device.type].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.against:
        against_transformers(args.against, args.batch[0], args.prompt, args.generate[0], device, dtype, args.repeats)
        return
    os.makedirs(args.out, exist_ok=True)
    path = os.path.join(args.out, "bench.jsonl")
    there = read_samples(path)

    def is_there(pattern, shape, batch, generate):
        wanted = settings_of(shape, pattern, device, dtype, batch, args.prompt, generate)
        return any(wanted.items() <= row.items() for row in there)
    groups = list(itertools.product(args.shape, args.batch, args.generate))
    todo = [group for group in groups if not all(is_there(pattern, *group) for pattern in args.pattern)]
    bandwidth = kernels._bandwidth(device)
    print(f"{path}: {len(groups) - len(todo)} of {len(groups)} settings are there; copying moves {bandwidth / 1e9:.3g} GB/s\n"
          + table_line(COLUMNS), flush=True)
    for group in todo:
        rows = measure_group(*group, device, dtype, bandwidth, args)
        with open(path, "ab", buffering=0) as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        for row in rows:
            print(table_line(cells_of(row)), flush=True)
