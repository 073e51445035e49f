"""Several processes: torchrun's share one training or one sampling, run_all's have a job each.

Under torchrun FSDP2 gives each process its part of every weight, gradient and moment; a block's
weights are gathered around its call. Checkpoints hold whole tensors.
"""
import contextlib
import datetime
import multiprocessing.connection
import os
import sys
import threading
import time
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import torch.nn as nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from common import locked, run


# ---- torchrun
def rank():
    """Which process this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def wait():
    if dist.is_initialized():
        dist.barrier()


def total(value):
    """The sum of a scalar tensor over all processes."""
    if world() > 1:
        dist.all_reduce(value)
    return value


@contextlib.contextmanager
def exclusively(folder):
    """Work in a folder that is locked against other commands."""
    with contextlib.nullcontext() if rank() else locked(folder):
        wait()  # until it is there
        yield folder


@contextlib.contextmanager
def processes(device):
    """Meet torchrun's other processes: only the first prints, all end with the block."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    gpus, here = torch.cuda.device_count() * (device != "cpu"), int(os.environ["LOCAL_WORLD_SIZE"])
    # a day: some wait while one works
    dist.init_process_group("nccl" if gpus else "gloo", timeout=datetime.timedelta(days=1))
    try:
        if 0 < gpus < here:
            raise ValueError(f"--nproc_per_node={here}: lower it to {gpus}, or use --device cpu")
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        with contextlib.redirect_stdout(open(os.devnull, "w") if rank() else sys.stdout):
            yield
    except Exception:
        if rank():
            time.sleep(5)  # the first one speaks for all, its end ends the others
        raise
    wait()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # else one end in twenty aborts: PyTorch's threads race with Python's


# ---- FSDP2
class Pair(nn.Module):
    """A model in training and its teacher or None. FSDP gathers embeddings around a call."""

    def __init__(self, lm, teacher=None):
        super().__init__()
        self.lm, self.teacher = lm, teacher
        self.blocks = (*lm.layers, *(teacher.layers if teacher else ()))

    def forward(self, loss, batch):
        return loss(self.lm, self.teacher, batch)

    @torch.no_grad()
    def without_gradient(self, loss, batch):
        found = self(loss, batch)
        if world() > 1:  # or an optimizer made next would train gathered copies of embeddings
            self.reshard()
        return found


def shard(pair, device):
    """The Pair on its device, or spread over all processes'."""
    if world() == 1:
        return pair.to(device)
    mesh = dist.device_mesh.init_device_mesh(device.type, (world(),))
    for block in pair.blocks:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "mixing_matrix")  # gathers around this call too
    return fully_shard(pair, mesh=mesh)


def whole_state(lm, *optimizers):
    """dict(model=weights, optimizer=moments), whole tensors in the first process."""
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, moments = dcp.get_state_dict(lm, optimizers, options=options)
    return dict(model=model, optimizer=moments)


def load_whole_state(lm, optimizer, state):
    """Give every process its part of a whole_state."""
    options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=world() > 1,
                                   strict=False)  # weights without a gradient have no moments
    dcp.set_state_dict(lm, optimizer, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"], options=options)


# ---- side by side
def begin(job, threads):
    """Do a job in a process that ends when its parent does."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    run(job, child=True)


def run_all(jobs, device):
    """Call all jobs; on a CPU at once, each in a process with its share of the threads. The end of
    the caller, or of one that fails, ends them all."""
    if device.type != "cpu" or world() > 1 or len(jobs) == 1:
        for job in jobs:
            job()
        return
    threads = max(1, torch.get_num_threads() // len(jobs))
    spawn = multiprocessing.get_context("spawn").Process  # as daemons: Python's end ends them
    children = [spawn(target=begin, args=(job, threads), daemon=True) for job in jobs]
    for child in children:
        child.start()
    # asked for once a round: a sentinel is there a moment before its code is
    while None in (codes := [child.exitcode for child in children]) and not any(codes):
        multiprocessing.connection.wait(
            [child.sentinel for child, code in zip(children, codes) if code is None])
    if any(codes):
        raise SystemExit(next(filter(None, codes)))
