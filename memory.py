"""How much memory training and sampling need, known before they start: distill.py and sample.py print it, and refuse what
does not fit in one line.

Contents: what there is, training, sampling.
"""
import os

import torch

from model import (FLOAT32_PARAMETERS, LM, Block, checkpoint_folder, from_hf_config, read_config, released_values, shapes_only,
                   stored_tensors)


# ------------------------------------------------------------------------------------------------ what there is
def free_memory(device, processes=1):
    """Bytes that each of the processes on this machine may use now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch keeps for later use counts as used
        return torch.cuda.mem_get_info()[0]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if processes > 1 else 1
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable")) // here
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // here


def print_needed(needed, what, free):
    """One line: the bytes that are needed, by purpose, and those that are free."""
    print(f"memory: about {sum(needed.values()) / 1e9:.2g} GB {what}, {free / 1e9:.3g} GB free: "
          + ", ".join(f"{name} {size / 1e9:.2g}" for name, size in needed.items() if size), flush=True)


# ------------------------------------------------------------------------------------------------ training
def check_memory(config, teacher, pairs, stages, args, processes):
    """Print what a process needs at its peak; ValueError if the device has less. Nothing is loaded yet."""
    lengths = pairs.bounds[:, 2] - pairs.bounds[:, 0]
    longest = min(int(lengths.max()), config.max_length)
    tokens = max(-(-args.batch_tokens // (processes * args.accumulate)), longest)  # in the largest piece of a batch
    answers = float((pairs.bounds[:, 2] - pairs.bounds[:, 1]).sum() / lengths.sum())  # share of them that is answers
    needed = memory_needed(config, teacher, tokens, answers, min(longest, args.matrix_length), stages, args, processes)
    total, free, most = sum(needed.values()), free_memory(args.device, processes), max(needed, key=needed.get)
    print_needed(needed, "per process at the peak", free)
    if total > free:
        smaller = "shorter solutions" if tokens == longest else f"--accumulate {2 * args.accumulate} or more"
        advice = dict(logits=smaller, activations=smaller if args.checkpoint_activations else "--checkpoint-activations")
        raise ValueError(f"training needs about {total / 1e9:.3g} GB per process, {free / 1e9:.3g} GB are free, and most is "
                         f"needed for {most}: try {advice.get(most, 'more processes (torchrun --nproc_per_node=N)')}")


def memory_needed(config, teacher, tokens, answers, matrix_length, stages, args, processes):
    """Bytes per process, by purpose. teacher: its Config or None. Within a quarter of what was measured on CPUs."""
    width = 2 if args.dtype == torch.bfloat16 else 4  # bytes of what autocast computes
    with shapes_only():
        size, theirs = LM(config).num_parameters(), LM(teacher).num_parameters() if teacher else 0
    blocks = {mixer: block_memory(config, mixer, args) for mixer in set(config.mixers)}
    layers = sum(map(blocks.get, config.mixers))
    if args.checkpoint_activations:  # the input of every block; one block at a time with its gradients
        layers = 4 * config.d_model * config.n_layers + 2 * max(blocks.values())
    if "matrices" in stages:  # five (H, L, L) matrices per layer
        layers = max(layers if stages - {"matrices"} else 0, 5 * 4 * config.n_heads * matrix_length * config.n_layers)
    embeddings = 4 * config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    return {
        "weights, gradients and moments": 16 * size / processes,
        "teacher": 4 * theirs / processes,
        "gathered weights": (processes > 1) * (4 * embeddings + 16 * size / config.n_layers),  # FSDP's, for the moment
        "copies for autocast": 2 * size if width == 2 and not args.checkpoint_activations else 0,
        "activations": tokens * layers,
        # KL: logits of both, then float32 at answer positions: both log-softmaxes, the terms of the KL, a gradient
        "logits": tokens * (0 if "verifier" in stages else config.vocab_size)  # a verifier has one number per token
        * (2 * width + 18 * answers if "kl" in stages else width + 8)}


def block_memory(config, mixer, args):
    """Bytes per token that autograd keeps of a block, measured: the slope between two lengths."""
    def run(length):
        x = torch.randn(1, length, config.d_model, device=args.device, requires_grad=True)
        rope = [torch.ones(1, 1, length, config.head_dim // 2, device=args.device)] * 2
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == torch.bfloat16, cache_enabled=False):
            return block(x, rope)
    with torch.device(args.device):
        block = Block(config, mixer)
    return (kept_bytes(run, 256) - kept_bytes(run, 128)) / 128


def kept_bytes(function, length):
    """Bytes of the tensors that autograd keeps of function(length) for a backward pass."""
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = function(length)  # alive until all are counted: an address is then counted once
    return sum(storages.values())




# ------------------------------------------------------------------------------------------------ sampling
MOST_ROWS_ON_CPU = 256  # of an automatic batch: more rows have shown no gain in tokens per second there
KEEP_FREE = 0.1  # share of the free memory that an automatic batch leaves alone, for what is not counted


def stored_config(path_or_repo):
    """The Config of a checkpoint, without its weights."""
    folder = checkpoint_folder(path_or_repo)
    return from_hf_config(released_values(read_config(folder), stored_tensors(folder)))


def weight_bytes(config, dtype):
    """Bytes of a model's weights in memory: `dtype`, but FLOAT32_PARAMETERS."""
    with shapes_only():
        weights = LM(config).named_parameters()
    return sum(weight.numel() * (4 if name.endswith(FLOAT32_PARAMETERS) else dtype.itemsize) for name, weight in weights)


def state_tensors(config, dtype, length):
    """(KV caches, what does not grow) of one row of up to `length` tokens: two lists of tensors without memory."""
    with shapes_only():
        layers = LM(config).to(dtype).init_state(1, length).layers
    return [[tensor for layer in layers for name, tensor in layer.items() if (name in ("keys", "values")) == is_kv]
            for is_kv in (True, False)]


def sampling_memory(config, dtype, batch, max_length, prompts=1, longest=1):
    """Bytes by purpose for decoding `batch` rows of up to max_length tokens, from `prompts` prompts of up to `longest`.

    Beside what stays, each row needs something at the greediest moment of a step (float32 probabilities and their sums when
    a token is chosen, activations, or a copy of a cache tensor when the batch is sorted), and so does a prompt's run.
    """
    kv, fixed = state_tensors(config, dtype, max_length)
    prompt = sum(tensor.nbytes for tensors in state_tensors(config, dtype, longest) for tensor in tensors)
    logits, inner = config.vocab_size * dtype.itemsize, config.n_heads * config.head_dim
    activations = (4 * config.d_ff + 10 * inner) * dtype.itemsize  # of a token in one layer, roughly
    greediest = max(8 * config.vocab_size, activations, *(tensor.nbytes for tensor in kv + fixed))
    packed = config.vocab_size * config.d_model * dtype.itemsize if config.tie_embeddings else 0  # by LM.fuse, on a CPU
    return {
        "weights": weight_bytes(config, dtype),
        "packed head": packed,
        "KV caches": batch * sum(tensor.nbytes for tensor in kv),
        "SSM states": batch * sum(tensor.nbytes for tensor in fixed),
        "rows' logits and temporaries": batch * (8 * max_length + logits + greediest),
        "prompts": prompts * (prompt + logits) + longest * (activations + logits)}


def largest_batch(config, dtype, max_length, free, prompts=1, longest=1):
    """Rows that fit into `free` bytes, 0 if not even one does; above 32 a multiple of 32, as rows are read 32 at a time."""
    none, one = (sum(sampling_memory(config, dtype, batch, max_length, prompts, longest).values()) for batch in (0, 1))
    rows = max(0, int((free - none) / (one - none)))
    return rows - rows % 32 if rows > 32 else rows


def choose_batch(config, device, dtype, completions, max_length, free, prompts=1, longest=1, asked=None):
    """Rows to decode at a time: `asked`, else all completions, or as many as fit. Prints what they need; ValueError if there
    is less. Texts do not depend on it."""
    fits = largest_batch(config, dtype, max_length, (1 - KEEP_FREE) * free, prompts, longest)
    rows = min(asked or max(fits, 1), completions)
    if not asked and device.type == "cpu":
        rows = min(rows, MOST_ROWS_ON_CPU)
    needed = sampling_memory(config, dtype, rows, max_length, prompts, longest)
    total, most = sum(needed.values()), max(needed, key=needed.get)
    caches = (needed["KV caches"] + needed["SSM states"]) / rows / 1e6
    print_needed(needed, f"for {rows} rows of up to {max_length:,} tokens ({caches:.3g} MB of caches and states each)", free)
    if total > free:
        raise ValueError(f"{rows} rows of up to {max_length:,} tokens need about {total / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"
                         + (f", and most is needed for {most}: --batch-size {fits} is the largest that fits" if fits else
                            f", and not even one row fits, most is needed for {most}: fewer --max-new-tokens or problems, "
                            f"--dtype bfloat16, or a smaller model"))
    return asked or rows
