"""How fast do they decode? A Transformer and its students, in the shapes of real models.

    python bench.py                      random weights, a minute
    python bench.py --shape llama-1b --batch 1,64,256,512 --generate 512,2048,8192   on a GPU
    python bench.py --ceiling            how much faster a student can be, by bytes alone
    python bench.py --against FOLDER --batch 16    a Llama's weights, here and in transformers

Writes  out/bench.jsonl, a line for each measured line of a table. What is compared takes turns; a
speed, and its ratio over the first one's, is their median.
"""
import copy
import gc
import itertools
import os
import time

from common import (Parser, add_device_options, choose_device, device_name, json_line, number,
                    require, run)

import numpy as np
import torch
import torch.nn.functional as F

import kernels
import sample
from model import LM, Config, cast


# ---- shapes
LLAMA = dict(vocab_size=128256, n_kv_heads=8, d_ff=8192)
LLAMA_3B = LLAMA | dict(d_model=3072, n_layers=28, n_heads=24)
HYBRID_3B = 3, 8, 13, 18, 23, 27  # MambaInLlama's; of its 1B hybrid only the number, 4, is known
SHAPES = {  # a Llama; the hybrid's mixer, and its layers of attention; where the pure one differs
    "tiny": (dict(), "mamba2", (1,), {}),
    "smollm2-135m": (dict(vocab_size=49152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3,
                          d_ff=1536), "mamba2", (3, 7, 11, 15, 19, 23, 27), {}),
    "llama-1b": (LLAMA | dict(d_model=2048, n_layers=16, n_heads=32), "mamba", (3, 7, 11, 15), {}),
    "llama-3b": (LLAMA_3B, "mamba", HYBRID_3B, {}),
    "llamba-3b": (LLAMA_3B, "mamba", HYBRID_3B,  # the pure student as Llamba released it
                  dict(n_heads=32, n_kv_heads=32, head_dim=96, d_state=64))}


def empty_models(shape, dtype):
    """{"transformer", "pure", "hybrid": model} of a shape, on the device "meta"."""
    llama, mixer, attention, pure = SHAPES[shape]
    n_layers = Config(**llama).n_layers
    hybrid = ["attention" if i in attention else mixer for i in range(n_layers)]
    with torch.device("meta"):
        models = dict(transformer=LM(Config(**llama)),
                      pure=LM(Config(**llama | pure, mixers=["mamba2"] * n_layers)),
                      hybrid=LM(Config(**llama, mixers=hybrid)))
        return {pattern: cast(lm, "meta", dtype) for pattern, lm in models.items()}


# ---- bytes
def sizes(lm, states=None):
    """Bytes of the weights, of a token in a row's caches, and of a row's states of this dtype."""
    one, two = (lm.init_state(1, length, states).nbytes() for length in (1, 2))
    return sum(parameter.nbytes for parameter in lm.parameters()), two - one, 2 * one - two


def bytes_per_token(weights, token, state, rows, prompt, new):
    """What decoding has to move for each of `new` tokens of a row, on average: a step reads the
    weights once for all rows, a row's cache and its state; it writes a token of it and the state.
    """
    context = prompt + (new + 1) / 2  # the mean of prompt + 1, ..., prompt + new
    return weights / rows + context * token + 2 * state


def ceilings(shape, batch, prompt, generate, memory):
    """Yield tokens/s over the Transformer's by bytes alone (and rows: each of `batch`, then what
    fills `memory` GB); weights and caches in bfloat16, states in 32 or 16 bits. With thousands of
    rows it is arithmetic that binds."""
    for name in shape:
        models = empty_models(name, torch.bfloat16)
        for rows, new in itertools.product([*batch, None], generate):
            line, moved = dict(shape=name, tokens=f"{prompt}+{new}"), []
            for model in "transformer", "pure 32", "pure 16", "hybrid 32", "hybrid 16":
                states = torch.bfloat16 if model.endswith("16") else torch.float32
                weights, token, state = sizes(models[model.split()[0]], states)
                count = rows or int((1e9 * memory - weights) // ((prompt + new) * token + state))
                require(count > 0, f"--memory {memory:g} is too small for a row of {name}")
                moved.append(bytes_per_token(weights, token, state, count, prompt, new))
                line[model] = f"{moved[0] / moved[-1]:.2f} ({count})"
            yield line


# ---- the clock
def speed_of(tokens, work, *arguments):
    """Tokens per second of a call that works on so many tokens."""
    start = time.perf_counter()
    work(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - start)


def race(runs, repeats, **about):
    """Yield a dict of `about`, name and speed for each of some runs, which take turns: {name:
    (function that returns tokens per second, *its arguments)}."""
    turns = np.array([[function(*arguments) for function, *arguments in runs.values()]
                      for _ in range(repeats)])  # (repeats, runs)
    for name, speeds, ratios in zip(runs, turns.T, (turns / turns[:, :1]).T):
        yield {**about, "model": name, "tokens/s": np.median(speeds), "lowest": speeds.min(),
               "highest": speeds.max(), "ratio": np.median(ratios)}


# ---- decoding
POSITIONS, STEPS = 8, 8  # lengths of the context; steps timed at each, on a GPU one visit
ROOM = 32  # tokens behind the last: no row is ever done


def full_batch(empty, device, rows, prompt, new):
    """A Batch of sample.py: random weights, a random past in all rows, room for texts."""
    lm = copy.deepcopy(empty).requires_grad_(False).to_empty(device=device)
    for parameter in lm.parameters():
        parameter.normal_(std=0.02)
    batch = sample.Batch(sample.prepare(lm), rows, prompt + new + ROOM, new + ROOM, (),
                         lambda logits, u: sample.choose_tokens(logits, u, temperature=0.8))
    batch.done.fill_(False)
    for layer in batch.state.layers:
        for tensor in layer.values():
            tensor.normal_()
    return batch


def decode(batch, contexts):
    """Run STEPS steps from each of these lengths of the context."""
    for context in contexts:
        batch.state.lengths.fill_(context)
        batch.steps.zero_()
        while batch.steps[0] < STEPS:
            sample.advance(batch)


@torch.inference_mode()
def decoding_speed(empty, device, rows, prompt, new):
    """New tokens per second over a text, of a model alone in memory; nan if it is too large."""
    gc.collect()
    torch.cuda.empty_cache()
    contexts = [max(0, prompt + new * i // (2 * POSITIONS) - STEPS // 2)
                for i in range(1, 2 * POSITIONS, 2)]
    try:
        batch = full_batch(empty, device, rows, prompt, new)
        decode(batch, contexts[-1:])  # to warm up: compile, record, touch
        return speed_of(rows * STEPS * POSITIONS, decode, batch, contexts)
    except torch.OutOfMemoryError:
        return np.nan


def bench_decoding(shape, batch, prompt, generate, repeats, device, dtype, state_dtype):
    """Yield speeds, the ratio's ceiling by bytes, and GB/s of what has to move."""
    for name, rows, new in itertools.product(shape, batch, generate):
        models = empty_models(name, dtype)
        for lm in models.values():
            lm.state_dtype = state_dtype
        runs = {pattern: (decoding_speed, lm, device, rows, prompt, new)
                for pattern, lm in models.items()}
        moved = [bytes_per_token(*sizes(lm), rows, prompt, new) for lm in models.values()]
        lines = race(runs, repeats, shape=name, batch=rows, prompt=prompt, generate=new)
        for line, mine in zip(lines, moved):
            yield line | {"ceiling": moved[0] / mine, "GB/s": line["tokens/s"] * mine / 1e9}


# ---- against transformers
def bench_against(against, batch, prompt, generate, repeats, device, dtype):
    """Yield speeds of a Llama's texts, prompts included, in transformers and here."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    ours = sample.prepare(LM.from_pretrained(against, device, dtype))
    require(set(ours.config.mixers) == {"attention"}, f"--against {against} is not a Llama")
    theirs = AutoModelForCausalLM.from_pretrained(against, dtype=dtype).to(device).eval()
    for rows, new in itertools.product(batch, generate):
        prompts = torch.randint(1, ours.config.vocab_size, (rows, prompt), device=device)
        theirs.generation_config = GenerationConfig(  # without eos, no text stops
            do_sample=True, temperature=0.8, top_k=0, max_new_tokens=new, pad_token_id=0,
            cache_implementation="static" if device.type == "cuda" else None)

        def our_texts():
            list(sample.generate(ours, prompts.tolist(), max_new_tokens=new, temperature=0.8,
                                 batch_size=rows))
        runs = {"transformers": (speed_of, rows * new, theirs.generate, prompts),
                "ours": (speed_of, rows * new, our_texts)}
        list(race(runs, 1))  # to warm up
        yield from race(runs, repeats, batch=rows, prompt=prompt, generate=new)


# ---- kernels and peers
def ours(**inputs):
    return kernels.selective_scan(**inputs, dt_softplus=True)


def mambapy(x, dt, A, B, C, D, z, dt_bias):
    """In PyTorch, as its MambaBlock.selective_scan does; one group."""
    from mambapy.pscan import pscan
    dt = F.softplus(dt + dt_bias)  # (B, L, D)
    h = pscan(torch.exp(dt[..., None] * A), (dt * x)[..., None] * B.float())  # (B, L, D, N)
    y = (h @ C[:, :, 0, :, None].float())[..., 0] + D * x  # (B, L, D)
    return (y * F.silu(z)).to(x.dtype)


def bench_kernels(shape, batch, prompt, repeats, device, dtype):
    """Yield speeds of scans, forward and backward, N = 16, and their largest errors."""
    for name, rows in itertools.product(shape, batch):
        found, runs, work = [], {}, kernels.values_and_gradients
        inputs = kernels.random_inputs(kernels.SCAN_SHAPES, rows, prompt,
                                       Config(**SHAPES[name][0]).d_model, 16, dtype, device)
        for scan in ours, mambapy:
            try:
                found.append(work(scan, inputs))  # warms up, too
                runs[scan.__name__] = speed_of, rows * prompt, work, scan, inputs
            except ImportError:
                print(f"{scan.__name__} is not installed")
        lines = race(runs, repeats, shape=name, batch=rows, prompt=prompt)
        for line, result in zip(lines, found):
            yield line | {"error": f"{kernels.largest_error(result, found[0]):.0e}"}


# ---- the script
def numbers(text):
    """An argparse type: whole numbers with commas between them."""
    return [*map(number(1, 10 ** 7), text.split(","))]


def report(lines, path, **about):
    """Print dicts as a table while they come; append them, and what is `about` all, to a file."""
    for i, line in enumerate(lines):
        cells = [f"{u:,.2f}" if isinstance(u, float) else u for u in line.values()]
        for row in [cells] if i else [line, cells]:
            print("".join(f"{cell:>14}" for cell in row))
        with open(path, "ab") as f:
            f.write(json_line(about | {k: v if v == v else None for k, v in line.items()}))


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument_group("job").add_mutually_exclusive_group().add_argument
    add("--against", metavar="FOLDER", help="a Llama's texts, here and in transformers")
    add("--ceiling", action="store_true", help="what bytes allow; runs nothing")
    add("--kernels", action="store_true", help="selective scans")
    add = parser.group("sizes")
    add("--shape", nargs="+", choices=SHAPES, metavar="NAME",
        help=f"{', '.join(SHAPES)}; default: tiny, for --ceiling the last three")
    add("--batch", type=numbers, default="1,16,128", help="rows at a time")
    add("--prompt", type=number(1, 10 ** 7), default=128, help="tokens before the new ones")
    add("--generate", type=numbers, default="256,1024", help="new tokens")
    add("--memory", type=number(1, 1e6), default=80, help="GB, to be filled by --ceiling")
    add = parser.group("where and how often")
    add("--repeats", type=number(1, 1000), default=3, help="turns")
    add_device_options(add, states=True)
    add("--out", default="out", help="lines go to OUT/bench.jsonl")
    args = parser.parse_args(argv)
    sizes, shape = (args.batch, args.prompt, args.generate), args.shape or ["tiny"]
    if args.ceiling:
        return report(ceilings(args.shape or list(SHAPES)[-3:], *sizes, args.memory), os.devnull)
    device, dtype = choose_device(args.device, args.dtype)
    where = args.repeats, device, dtype
    if args.against:
        lines = bench_against(args.against, *sizes, *where)
    elif args.kernels:
        lines = bench_kernels(shape, *sizes[:2], *where)
    else:
        lines = bench_decoding(shape, *sizes, *where, getattr(torch, args.state_dtype))
    os.makedirs(args.out, exist_ok=True)
    report(lines, os.path.join(args.out, "bench.jsonl"), device=device_name(device),
           dtype=str(dtype)[6:], state_dtype=args.state_dtype, date=time.strftime("%F"))


if __name__ == "__main__":
    run(main, "--batch", resumes=False)
