"""How fast do they decode? A Transformer and its students, in the shapes of real models.

    python bench.py                          random weights; a minute on a laptop
    python bench.py --shape llama-1b llama-3b --batch 1,64,256 --generate 512,2048
    python bench.py --ceiling                the most that a student can gain, by bytes alone
    python bench.py --against FOLDER         a Llama's weights, here and in transformers
    python bench.py --kernels                the selective scan here and in other packages

Writes  out/bench.jsonl, a line per measurement, and out/bench.png: only the first of these jobs

What is timed are steps of sample.py, at 8 lengths of the context, after a warm-up: a full batch at
temperature 0.8, all rows of one length, none of which stops. KV caches and states hold random
numbers. The models take turns, each alone in memory; their ratio is the median over the turns.
Prompts are not timed, except with --against, which draws whole texts.
"""
import datetime
import gc
import itertools
import os
import statistics
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

import kernels
from common import Parser, choose_device, device_name, json_line, number, replace_file, run
from decode_kernels import prepare
from model import LM, Config, cast
from sample import Batch, advance, choose_tokens
from sample import generate as draw_texts


# ---------------------------------------------------------------------------- shapes
class Shape(NamedTuple):
    """A Llama, and the students that are compared with it."""
    llama: dict  # fields of Config
    mixer: str  # what replaces attention in the hybrid; in the pure student it is mamba2
    attention: tuple  # the layers that stay attention in the hybrid
    pure: dict = {}  # fields in which the pure student differs from the Llama


LLAMA_3B = dict(vocab_size=128256, d_model=3072, n_layers=28, n_heads=24, n_kv_heads=8, d_ff=8192)
HYBRID_3B = 3, 8, 13, 18, 23, 27  # MambaInLlama's; of its 1B hybrid only the number, 4, is known
SHAPES = {
    "tiny": Shape(dict(), "mamba2", (1,)),  # of the built-in experiment
    "smollm2-135m": Shape(dict(vocab_size=49152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3,
                               d_ff=1536), "mamba2", (3, 7, 11, 15, 19, 23, 27)),
    "llama-1b": Shape(dict(vocab_size=128256, d_model=2048, n_layers=16, n_heads=32, n_kv_heads=8,
                           d_ff=8192), "mamba", (3, 7, 11, 15)),
    "llama-3b": Shape(LLAMA_3B, "mamba", HYBRID_3B),
    "llamba-3b": Shape(LLAMA_3B, "mamba", HYBRID_3B,  # its pure student as Llamba released it
                       dict(n_heads=32, n_kv_heads=32, head_dim=96, d_state=64)),
}
PATTERNS = "transformer", "pure", "hybrid"


def config_of(shape, pattern):
    """The Config of a shape with attention everywhere, nowhere, or in the hybrid's layers."""
    llama, mixer, attention, pure = SHAPES[shape]
    config = Config(**llama)
    if pattern == "pure":
        config = Config(**llama | pure, mixers=["mamba2"] * config.n_layers)
    if pattern == "hybrid":
        config = Config(**llama, mixers=["attention" if i in attention else mixer
                                         for i in range(config.n_layers)])
    return config


def empty_model(config, dtype):
    """A model without memory, on the device "meta": its weights and states have sizes only."""
    with torch.device("meta"):
        return cast(LM(config), "meta", dtype).eval().requires_grad_(False)


def random_model(config, device, dtype):
    """A model with random weights, made in the dtype in which they stay."""
    lm = empty_model(config, dtype).to_empty(device=device)
    for parameter in lm.parameters():
        parameter.normal_(std=0.02)
    return lm


def print_cells(name, *cells, width=12):
    """Print a line of a table: measured numbers with two decimals, None as a dash."""
    texts = ("-" if cell is None else f"{cell:,.2f}" if isinstance(cell, float) else str(cell)
             for cell in cells)
    print(f"{name:18}" + "".join(f" {text:>{width - 1}}" for text in texts), flush=True)


# ---------------------------------------------------------------------------- bytes
def weight_bytes(lm):
    """The bytes of a model's weights."""
    return sum(parameter.nbytes for parameter in lm.parameters())


def step_bytes(lm, rows, prompt, new, state_dtype=torch.float32):
    """What a decoding step has to move, on average over the new tokens.

    Weights are read once, the embedding as the head (all shapes tie them). What grows with a row is
    read up to its length, and a token of it written; what does not grow is read and written.
    Activations and logits are not counted.
    """
    one, two = (lm.init_state(1, length, state_dtype).nbytes() for length in (1, 2))
    token, fixed = two - one, 2 * one - two
    context = prompt + (new + 1) / 2  # the mean of prompt + 1, ..., prompt + new
    return weight_bytes(lm) + rows * (context * token + 2 * fixed)


def rows_in(memory, lm, length, state_dtype=torch.float32):
    """How many rows of `length` tokens fit into so many bytes, beside the weights."""
    row = lm.init_state(1, length, state_dtype).nbytes()
    return max(0, int((memory - weight_bytes(lm)) // row))


VARIANTS = [("transformer", torch.float32)] + list(
    itertools.product(("pure", "hybrid"), (torch.float32, torch.bfloat16)))


def ceilings(models, rows, prompt, new, memory=None):
    """[(ratio, rows) of each of VARIANTS]: its tokens/s over the Transformer's, by bytes alone.

    models: {pattern: model}. rows: decoded at a time; None takes as many as fit `memory` bytes.
    Where bytes bind, time is bytes / bandwidth, and the bandwidth drops out of the ratio. With
    thousands of rows arithmetic binds first.
    """
    counts = [rows or rows_in(memory, models[pattern], prompt + new, dtype)
              for pattern, dtype in VARIANTS]
    if not counts[0]:
        raise ValueError(f"--memory {memory / 1e9:g} does not hold the Transformer's weights and a "
                         f"row of {prompt} + {new} tokens: give more")
    speeds = [count / step_bytes(models[pattern], count, prompt, new, dtype)
              for count, (pattern, dtype) in zip(counts, VARIANTS)]
    return [(speed / speeds[0], count) for speed, count in zip(speeds, counts)]


def print_ceilings(shape, batch, prompt, generate, memory, dtype):
    """Print the ceilings at every batch, and with as many rows as fit `memory` GB."""
    print(f"tokens/s over the Transformer's by bytes alone, and rows; in {str(dtype)[6:]}, "
          f"columns by the dtype of states;\nat every batch, then in {memory:g} GB")
    print_cells("shape", "tokens", "transformer", *(f"{pattern} {str(kind)[6:]}" for pattern, kind
                                                    in VARIANTS[1:]), width=17)
    for name in shape:
        models = {pattern: empty_model(config_of(name, pattern), dtype) for pattern in PATTERNS}
        for rows, new in itertools.product([*batch, None], generate):
            found = ceilings(models, rows, prompt, new, 1e9 * memory)
            print_cells(name, f"{prompt}+{new}",
                        *(f"{ratio:.2f} ({count:,})" for ratio, count in found), width=17)


# ---------------------------------------------------------------------------- decoding on the clock
POSITIONS, STEPS = 8, 4  # lengths of the context; steps timed at each (8 on a GPU, see sample.py)
ROOM = 32  # tokens for which there is room behind the last, so that no row is ever done
MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # bytes of memory


def copy_bandwidth(device):
    """Bytes per second of a large copy, reading and writing counted: the best of some."""
    source = torch.ones(2 ** 28 if device.type == "cuda" else 2 ** 25, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)[0].item()  # .item() waits for a GPU
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


def full_batch(lm, rows, prompt, new):
    """A Batch of sample.py with room for the texts, all of its rows with a random past."""
    batch = Batch(lm, rows, prompt + new + ROOM, new + ROOM, (),
                  lambda logits, u: choose_tokens(logits, u, temperature=0.8))
    batch.done.fill_(False)
    for layer in batch.state.layers:
        for tensor in layer.values():
            tensor.normal_()
    return batch


def time_steps(batch, context):
    """(mean length of the context, milliseconds per step) of some steps from `context` tokens."""
    for _ in range(2):  # the first time to warm up: compile, record, touch
        batch.state.lengths.fill_(context)
        batch.steps.zero_()
        steps, start = int(batch.steps[0]), time.perf_counter()  # int() waits for a GPU
        while steps < STEPS:
            advance(batch)
            steps = int(batch.steps[0])
        seconds = time.perf_counter() - start
    return context + steps / 2, 1e3 * seconds / steps


class Turn(NamedTuple):
    """What was measured in one turn of a model."""
    contexts: tuple  # lengths, equally spaced
    times: tuple  # milliseconds per step at each
    gigabytes: float | None  # the most in use; None on a CPU


@torch.inference_mode()
def measure(config, device, dtype, rows, prompt, new):
    """A Turn of a model that is made for it and gone afterwards."""
    lm, on_gpu = prepare(random_model(config, device, dtype)), device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    batch = full_batch(lm, rows, prompt, new)
    middles = [prompt + new * (2 * i + 1) // (2 * POSITIONS) for i in range(POSITIONS)]
    points = [time_steps(batch, max(0, middle - STEPS // 2)) for middle in middles]
    return Turn(*zip(*points), torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None)


def attempt(config, device, dtype, rows, prompt, new):
    """What measure returns, or None where memory does not suffice.

    On a CPU that is computed: Linux ends a process that takes too much, without an error.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif rows > rows_in(MACHINE, empty_model(config, dtype), prompt + new + ROOM):
        return None
    try:
        return measure(config, device, dtype, rows, prompt, new)
    except torch.OutOfMemoryError:
        return None


def take_turns(configs, repeats, *rest):
    """{pattern: its Turns, () if out of memory}, one model after another, `repeats` times."""
    rounds = [[attempt(config, *rest) for config in configs.values()] for _ in range(repeats)]
    return {pattern: () if None in turns else turns
            for pattern, turns in zip(configs, zip(*rounds))}


def summary(turns, transformer, rows, copying):
    """What a line of bench.jsonl says of these Turns; {} if there are none.

    spread: slowest less fastest, over the median; ratio: how many times as fast as the Transformer;
    of_copy: `copying`, seconds in which a copy moves the bytes of a step, over a step's.
    """
    if not turns:
        return {}
    steps = [statistics.mean(turn.times) for turn in turns]
    ratios = [statistics.mean(turn.times) / step for turn, step in zip(transformer, steps)]
    ms = statistics.median(steps)
    return dict(tokens_per_second=1e3 * rows / ms, ms_per_step=ms, of_copy=1e3 * copying / ms,
                spread=(max(steps) - min(steps)) / ms,
                ratio=statistics.median(ratios) if ratios else None,
                gigabytes=turns[-1].gigabytes, contexts=turns[0].contexts,
                ms_at_contexts=[statistics.median(t) for t in zip(*(t.times for t in turns))])


def measure_group(shape, rows, prompt, new, device, dtype, repeats, bandwidth):
    """Yield a line of bench.jsonl for each model of a shape, at one batch and length."""
    configs = {pattern: config_of(shape, pattern) for pattern in PATTERNS}
    turns = take_turns(configs, repeats, device, dtype, rows, prompt, new)
    for pattern, config in configs.items():
        copying = step_bytes(empty_model(config, dtype), rows, prompt, new) / bandwidth
        yield dict(shape=shape, batch=rows, prompt=prompt, generate=new, pattern=pattern,
                   out_of_memory=not turns[pattern], repeats=repeats, dtype=str(dtype)[6:],
                   device=device_name(device), date=datetime.date.today().isoformat(),
                   **summary(turns[pattern], turns["transformer"], rows, copying))


# Okabe and Ito's colours, which stay apart with any colour blindness; markers differ too
LOOKS = dict(transformer=("#0072B2", "o"), pure=("#D55E00", "s"), hybrid=("#009E73", "^"))


def draw(rows):
    """A figure: for every shape, at the longest texts, the ratio against the batch; and the time of
    a step against the context, at the largest batch that has a ratio."""
    from matplotlib.figure import Figure
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(10, 3.8 * len(shapes)), layout="constrained")
    for shape, (left, right) in zip(shapes, figure.subplots(len(shapes), 2, squeeze=False)):
        rated = [row for row in rows if row["shape"] == shape and row.get("ratio")]
        new = max((row["generate"] for row in rated), default=0)
        batch = max((row["batch"] for row in rated), default=0)
        for pattern, (colour, marker) in LOOKS.items():
            look = dict(color=colour, marker=marker, label=pattern)
            line = [row for row in rated if (row["pattern"], row["generate"]) == (pattern, new)]
            left.plot([row["batch"] for row in line], [row["ratio"] for row in line], **look)
            for row in (row for row in line if row["batch"] == batch):
                right.plot(row["contexts"], row["ms_at_contexts"], **look)
        left.set(title=shape, xlabel=f"rows decoded at a time, {new:,} new tokens",
                 ylabel="tokens/s over the Transformer's")
        left.set_xscale("log", base=2)
        left.xaxis.set_major_formatter("{x:,.0f}")
        right.set(xlabel=f"tokens in the context, {batch:,} rows", ylabel="milliseconds per step")
        left.set_ylim(0)
        right.set_ylim(0)
        left.legend(frameon=False)
    figure.supxlabel(f"{rows[0]['device']}, {rows[0]['dtype']}, random weights", fontsize=9)
    return figure


def bench_decoding(shape, batch, prompt, generate, repeats, out, device, dtype):
    """Measure all shapes, batches and lengths: a table, lines of bench.jsonl, and a figure."""
    bandwidth, lines, path = copy_bandwidth(device), [], os.path.join(out, "bench.jsonl")
    os.makedirs(out, exist_ok=True)
    print(f"copying moves {bandwidth / 1e9:.3g} GB/s; lines go to {path}")
    shown = "tokens_per_second", "ms_per_step", "spread", "ratio", "of_copy", "gigabytes"
    print_cells("shape", "rows", "tokens", "model", "tokens/s", *shown[1:])
    for name, rows, new in itertools.product(shape, batch, generate):
        for line in measure_group(name, rows, prompt, new, device, dtype, repeats, bandwidth):
            lines.append(line)
            with open(path, "ab") as f:
                f.write(json_line(line))
            found = ([line.get(key) for key in shown] if not line["out_of_memory"] else
                     ["out of memory"])
            print_cells(name, rows, f"{prompt}+{new}", line["pattern"], *found)
    path = os.path.join(out, "bench.png")
    replace_file(path, lambda temporary: draw(lines).savefig(temporary, format="png", dpi=150))
    print(f"wrote {path}")


# ---------------------------------------------------------------------------- against transformers
def run_ours(lm, prompts, new):
    """Draw `new` tokens after each of the prompts (B, L); how many that were in all."""
    return sum(len(c.tokens) for c in draw_texts(
        lm, prompts.tolist(), max_new_tokens=new, batch_size=len(prompts), temperature=0.8))


@torch.inference_mode()
def run_theirs(model, prompts, new):
    """The same by transformers; on a GPU with its static cache, whose step it compiles."""
    cache = dict(cache_implementation="static") if prompts.is_cuda else {}
    texts = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True,
                           temperature=0.8, top_k=0, top_p=1.0, max_new_tokens=new,
                           min_new_tokens=new, eos_token_id=None, pad_token_id=0, **cache)
    return texts[:, prompts.shape[1]:].cpu().numel()  # .cpu() waits for a GPU


def load_theirs(folder, device, dtype):
    """The model of a folder in transformers. ValueError if that is not there, or cannot run it."""
    try:
        import transformers
    except ImportError:
        raise ValueError("--against compares with the package transformers: "
                         "pip install transformers") from None
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True)
    if strange := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
        raise ValueError(f"--against {folder} is not a Llama that transformers can run: it lacks, "
                         f"or has no use for, {strange[0]}")
    model.generation_config.eos_token_id = None
    return model.to(device).eval()


def bench_against(against, batch, prompt, generate, repeats, device, dtype):
    """Print tokens/s of whole texts of the Llama in a folder, ours and transformers', in turns."""
    lm = prepare(LM.from_pretrained(against, device, dtype).eval())
    runs = dict(ours=(run_ours, lm), theirs=(run_theirs, load_theirs(against, device, dtype)))
    print_cells("tokens/s", "rows", "tokens", "median", "least", "most")
    for rows, new in itertools.product(batch, generate):
        prompts = torch.randint(lm.config.vocab_size, (rows, prompt), device=device)
        speeds = dict(ours=[], theirs=[])
        for turn in range(repeats + 1):
            for name, (run_texts, model) in runs.items():
                start = time.perf_counter()
                count = run_texts(model, prompts, new)
                if turn:  # the first one warms up and compiles
                    speeds[name].append(count / (time.perf_counter() - start))
        speeds["ratio"] = [ours / theirs for ours, theirs in zip(*speeds.values())]
        for name, found in speeds.items():
            print_cells(name, rows, f"{prompt}+{new}", statistics.median(found), min(found),
                        max(found))


# ---------------------------------------------------------------------------- kernels and peers
# Each takes our inputs and returns a selective scan and what to call it with.
def our_scan(inputs):
    """Our selective scan, with the arguments of all peers."""
    return lambda **inputs: kernels.selective_scan(**inputs, dt_softplus=True)[0], inputs


def mamba_ssm_scan(inputs):  # Gu & Dao's own
    """mamba_ssm's scan: channels first, no first state."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def scan(x, dt, A, B, C, D, z, dt_bias):
        x, dt, z = (u.transpose(1, 2).contiguous() for u in (x, dt, z))  # (B, D, L)
        B, C = (u.permute(0, 2, 3, 1).contiguous() for u in (B, C))  # (B, G, N, L)
        return selective_scan_fn(x, dt, A, B, C, D, z, dt_bias, delta_softplus=True).transpose(1, 2)
    return scan, inputs


def mambapy_scan(inputs):  # as in its MambaBlock.selective_scan; PyTorch only, one group
    """mambapy's parallel scan, as its MambaBlock uses it."""
    from mambapy.pscan import pscan

    def scan(x, dt, A, B, C, D, z, dt_bias):
        dt = F.softplus(dt + dt_bias)  # (B, L, D)
        h = pscan(torch.exp(dt[..., None] * A), (dt * x)[..., None] * B.float())  # (B, L, D, N)
        y = (h @ C[:, :, 0, :, None].float())[..., 0] + D * x  # (B, L, D)
        return (y * F.silu(z)).to(x.dtype)
    return scan, inputs


def transformers_layer(inputs):  # the whole layer: it does not offer its scan alone
    """transformers' whole Mamba layer: its loop can't be called alone."""
    from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer
    x, (channels, d_state) = inputs["x"], inputs["A"].shape
    layer = MambaMixer(MambaConfig(hidden_size=channels, intermediate_size=channels, expand=1,
                                   state_size=d_state), layer_idx=0).to(x.device, x.dtype)

    def whole_layer(x, **weights):
        return torch.func.functional_call(layer, weights, x)
    return whole_layer, dict(x=x, **dict(layer.named_parameters()))


PEERS = {"ours": our_scan, "mamba_ssm": mamba_ssm_scan, "mambapy": mambapy_scan,
         "transformers layer": transformers_layer}


def bench_kernels(shape, batch, prompt, repeats, device, dtype):
    """Print milliseconds of the selective scan, forward and backward, and of what is installed.

    error: the largest in y and all gradients, over the largest entry of ours.
    """
    for name, rows in itertools.product(shape, batch):
        config = config_of(name, "transformer")
        inputs = kernels.random_inputs(rows, prompt, config.n_heads * config.head_dim, 16, dtype,
                                       device)["selective_scan"]
        del inputs["h0"]  # mamba_ssm's state starts at zero
        calls, results, times = {}, {}, {peer: [] for peer in PEERS}
        for peer, make in PEERS.items():
            try:
                calls[peer] = make(inputs)
                results[peer] = kernels.values_and_gradients(*calls[peer])  # a warm-up too
            except ImportError:
                print(f"{peer} is not installed")
        for _, peer in itertools.product(range(repeats), calls):
            times[peer].append(kernels.milliseconds(*calls[peer]))
        print_cells(name, "rows", "tokens", "ms", "over ours", "error")
        for peer, (_, theirs) in calls.items():
            ms, ours = (statistics.median(times[key]) for key in (peer, "ours"))
            error = kernels.largest_error(results[peer], results["ours"]) if theirs is inputs else 0
            print_cells(peer, rows, prompt, ms, ms / ours, f"{error:.0e}" if error else None)


# ---------------------------------------------------------------------------- the script
JOBS = {  # name: its function; the options it takes, with defaults; those that are others on a GPU
    "decoding": (bench_decoding,
                 dict(shape=["tiny"], batch=[1, 16, 128], prompt=128, generate=[256, 1024],
                      repeats=3, out="out", device=None, dtype=None),
                 dict(shape=["llama-1b"], batch=[1, 16, 64, 256, 512], prompt=512,
                      generate=[512, 2048, 8192])),
    "ceiling": (print_ceilings,
                dict(shape=["llama-1b", "llama-3b", "llamba-3b"], batch=[128, 512], prompt=512,
                     generate=[512, 2048, 8192], memory=80, dtype="bfloat16"), {}),
    "against": (bench_against,
                dict(against=None, batch=[16], prompt=60, generate=[128], repeats=3, device=None,
                     dtype=None), dict(prompt=512, generate=[512])),
    "kernels": (bench_kernels,
                dict(shape=["tiny"], batch=[8], prompt=256, repeats=3, device=None, dtype=None),
                dict(shape=["llama-1b"], prompt=2048))}


def numbers(text):
    """An argparse type: whole numbers from 1, with commas between them."""
    return [number(1, 10 ** 7)(part) for part in text.split(",")]


def listed(options):
    """Options with their values, as --help shows them."""
    return ", ".join(f"{name} {value}" for name, value in options.items() if value)


def parse_args(argv=None):
    """(the job, {option: value} of what was given)."""
    parser = Parser(__doc__)
    parser.epilog = "defaults:\n" + "\n".join(
        f"  {job:10}{listed(defaults)}" + f"\n{'on a GPU':>20}: {listed(on_gpu)}" * bool(on_gpu)
        for job, (_, defaults, on_gpu) in JOBS.items())
    add = parser.add_argument_group("job").add_mutually_exclusive_group().add_argument
    add("--against", metavar="FOLDER", help="whole texts of a Llama, here and in transformers")
    add("--ceiling", dest="job", action="store_const", const="ceiling", help="what bytes allow")
    add("--kernels", dest="job", action="store_const", const="kernels", help="scan and gradients")
    add = parser.add_argument_group("sizes").add_argument
    add("--shape", nargs="+", choices=SHAPES, metavar="NAME", help=", ".join(SHAPES))
    add("--batch", type=numbers, metavar="N,N", help="rows at a time")
    add("--prompt", type=number(1, 10 ** 7), help="tokens before the new ones; all of a scan's")
    add("--generate", type=numbers, metavar="N,N", help="new tokens")
    add("--repeats", type=number(1, 1000), help="turns, whose median counts")
    add("--memory", type=number(1e-3, 1e6, float), metavar="GB", help="for weights and rows")
    add = parser.add_argument_group("where").add_argument
    add("--out", help="lines go to OUT/bench.jsonl")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, else float32")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items()
             if value is not None}
    job = "against" if "against" in given else given.pop("job", "decoding")
    takes = JOBS[job][1]
    if strange := sorted(given.keys() - takes.keys()):
        parser.error(f"--{strange[0]} is not for this job: {job} takes --{', --'.join(takes)}")
    return job, given


def main(argv=None):
    job, given = parse_args(argv)
    function, defaults, on_gpu = JOBS[job]
    options = defaults | given
    if "device" in options:
        device, dtype = choose_device(options["device"], options["dtype"])
        options = defaults | (on_gpu if device.type == "cuda" else {}) | given
        options |= dict(device=device, dtype=dtype)
    else:  # nothing is run
        options["dtype"] = getattr(torch, options["dtype"])
    function(**options)


if __name__ == "__main__":
    run(main, "--batch")
