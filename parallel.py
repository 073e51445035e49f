"""Several processes: those of torchrun share one training or one sampling, those of run_all
train a student each on a CPU.

Under torchrun PyTorch's FSDP2 trains one model: each process keeps its share of every weight,
gradient and moment, gathers the weights of a block, in float32, around its call, and computes its
pieces of every batch. Checkpoints hold whole tensors: a run can go on with another number of
processes. Outside torchrun there is one, and what is said about others does nothing.
"""
import contextlib
import datetime
import multiprocessing
import os
import sys
import threading
import time
from multiprocessing.connection import wait as wait_for

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict)
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from common import locked, run


# ---------------------------------------------------------------------------- torchrun
def rank():
    """Which of the processes this is; 0 is the first."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait():
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def total(value):
    """The sum of a scalar tensor over all processes."""
    if world() > 1:
        dist.all_reduce(value)
    return value


@contextlib.contextmanager
def first_alone():
    """What is made on disk in here is made by the first process and found by the others."""
    if rank():
        wait()
    yield
    if not rank():
        wait()


@contextlib.contextmanager
def exclusively(folder):
    """Work in a folder where no other command works; the first process locks it for all."""
    with contextlib.nullcontext() if rank() else locked(folder):
        yield folder


@contextlib.contextmanager
def processes(device):
    """Meet the other processes of torchrun. Only the first one prints; all end with the block."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    patience = datetime.timedelta(days=1)  # some wait while one works
    dist.init_process_group("nccl" if gpus else "gloo", timeout=patience)
    try:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        if 0 < gpus < here:
            raise ValueError(f"--nproc_per_node={here} needs as many GPUs, and PyTorch finds "
                             f"{gpus} here: lower it, or use --device cpu")
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        with contextlib.redirect_stdout(open(os.devnull, "w") if rank() else sys.stdout):
            yield
    except (ValueError, OSError):
        if rank():  # what all run into is said by the first one, whose end ends the others
            time.sleep(5)
        raise
    wait()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # in the usual end PyTorch's threads race with Python's: one in twenty aborts


# ---------------------------------------------------------------------------- FSDP2
class Pair(nn.Module):
    """A model in training and its teacher (or None), as one module: what FSDP wraps, so that their
    embeddings are gathered around the whole loss."""

    def __init__(self, lm, teacher=None):
        super().__init__()
        self.lm, self.teacher = lm, teacher

    @property
    def blocks(self):
        """The layers of both."""
        return [*self.lm.layers, *(self.teacher.layers if self.teacher else ())]

    def forward(self, loss, batch):
        return loss(self.lm, self.teacher, batch)


def shard(pair, device):
    """The Pair on its device, spread over the processes if there are several."""
    if world() == 1:
        return pair.to(device)
    mesh = dist.device_mesh.init_device_mesh(device.type, (world(),))
    for block in pair.blocks:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "mixing_matrix")  # gathers around this call too
    return fully_shard(pair, mesh=mesh)


def without_gradient(pair, loss, batch):
    """pair(loss, batch) in no_grad. FSDP leaves the embeddings gathered for a backward pass, which
    does not come: an optimizer made then would train copies that are thrown away."""
    with torch.no_grad():
        found = pair(loss, batch)
    if world() > 1:
        pair.reshard()
    return found


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole_weights(lm):
    """The state dict of a model with whole tensors on the CPU, in the first process."""
    return get_model_state_dict(lm, options=WHOLE)


def whole_state(lm, optimizer):
    """Weights and moments, with whole tensors on the CPU, in the first process."""
    return dict(zip(("model", "optimizer"), get_state_dict(lm, optimizer, options=WHOLE)))


def load_whole_state(lm, optimizer, state):
    """Give every process its part of what whole_state has saved.

    Not strict about moments: weights that a stage's loss does not reach have none, such as out_proj
    in orientation.
    """
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world() > 1, strict=False)
    set_state_dict(lm, optimizer, model_state_dict=state["model"],
                   optim_state_dict=state["optimizer"], options=options)


# ---------------------------------------------------------------------------- side by side
def begin(job, threads):
    """What a process of run_all does: end with its parent, take its share, do its job."""
    def end_with_parent():
        wait_for([multiprocessing.parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    run(job, child=True)


def run_all(jobs, device):
    """Call all jobs: on a CPU at once, in a process each with its share of the threads.

    Whatever ends the caller ends all of them; one that fails ends the others, and the caller.
    """
    if device.type != "cpu" or world() > 1 or len(jobs) == 1:
        for job in jobs:
            job()
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // len(jobs))
    children = [context.Process(target=begin, args=(job, threads)) for job in jobs]
    try:
        for child in children:
            child.start()
        # Every code is asked for once a round: a sentinel is there a moment before its code is.
        while None in (codes := [child.exitcode for child in children]) and not any(codes):
            wait_for([child.sentinel for child, code in zip(children, codes) if code is None])
        if any(codes):
            raise SystemExit(next(filter(None, codes)))
    finally:
        for child in children:
            if child.is_alive():
                child.terminate()
        for child in children:
            if child.pid:
                child.join()
