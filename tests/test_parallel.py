"""What parallel.py promises: processes change where a training is computed and nothing else, they
may come and go, and whatever ends a command ends all of its processes."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import distill
from conftest import ROOT, assert_close

# 1e-3 of the largest weight: Adam divides by the gradient's size, and so makes a step of any
# rounding where a gradient is next to zero: 16 steps of up to 1e-3 each, rarely in one direction.
ADAM = 50  # times TOLERANCE[float32]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(one, two):
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert all(a[key] == b[key] for key in ("stage", "step", "tokens", "lr"))
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-3)
    for name, weight in load_file(one / "model.safetensors").items():
        assert_close(weight, load_file(two / "model.safetensors")[name], times=ADAM)
    pictures = [np.load(folder / "matrices.npz") for folder in (one, two)]
    for name in "teacher", "transfer", "orientation", "end":
        assert_close(*(torch.tensor(picture[name]) for picture in pictures))
    assert sorted(os.listdir(one)) == sorted(os.listdir(two))


@pytest.fixture(scope="module")
def options(tiny_out, tiny_options):
    """A batch holds three rows: of four pieces, one has none."""
    return [*tiny_options, "--teacher", str(tiny_out / "teacher"), "--batch-tokens", "300",
            "--recipe", "mohawk", "--steps", "4", "--log-every", "1", "--save-every", "3"]


# ---- torchrun
STOPPING = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import common, distill
save = distill.Progress.save

def save_and_stop(progress, *state):
    save(progress, *state)
    if progress.folder.name == "changing" and progress.stage == 3:
        raise ValueError("stopped on purpose")

distill.Progress.save = save_and_stop
common.run(distill.main)
"""


def test_two_processes_train_what_one_trains_and_they_come_and_go(options, tmp_path, monkeypatch):
    """`steady` is trained by two processes. `changing` begins with one, two go on from the first
    checkpoint, one from the last. Red if gradients are means of ranks' means, if a rank without
    rows stops or adds something, if a checkpoint holds shards, if each tells a mistake."""
    for name in ("steady", "changing"):
        distill.main([*options, "--student", name, "--out", str(tmp_path / "one")])
    save = distill.Progress.save
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(distill.Progress, "save", lambda *state: (save(*state), 1 / 0))
        distill.main([*options, "--student", "changing", "--out", str(tmp_path / "two")])
    (tmp_path / "stopping.py").write_text(STOPPING)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "stopping.py", str(ROOT), *options, "--student", "steady", "changing", "--accumulate", "2",
         "--checkpoint-activations", "--out", "two"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode and done.stderr.count("error: stopped on purpose") == 1, done.stderr
    assert done.stdout.count("going on at stage 1, step 3") == 1  # only the first process speaks
    assert_same_training(tmp_path / "one" / "steady", tmp_path / "two" / "steady")
    distill.main([*options, "--student", "changing", "--out", str(tmp_path / "two")])
    assert_same_training(tmp_path / "one" / "changing", tmp_path / "two" / "changing")


# ---- side by side
def alive(session):
    """Processes of a session that have not ended (a zombie has: nobody has asked for it yet)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it is gone
            state, _, _, its_session = path.read_text().rsplit(")", 1)[1].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(int(path.parent.name))
    return found


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be in time"
        time.sleep(0.02)


def outcome(options, cwd, end=None, when=lambda: True):
    """(exit code, stdout, stderr) of distill.py as a user runs it, in a session of its own, when
    nothing is left of it. The signal `end` is sent when `when` says so."""
    # a shell's foreground job gets Ctrl-C, whatever pytest was started with
    code = ("import os, signal, sys; signal.signal(2, signal.SIG_DFL); "
            "os.execv(sys.argv[1], sys.argv[1:])")
    process = subprocess.Popen(
        [sys.executable, "-c", code, sys.executable, str(ROOT / "distill.py"), *options], cwd=cwd,
        start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        if end:
            wait_until(lambda: process.poll() is not None or when())
            # a terminal's Ctrl-C goes to all
            (os.killpg if end == signal.SIGINT else os.kill)(process.pid, end)
        said = process.communicate(timeout=120)
        wait_until(lambda: not alive(process.pid))
    finally:
        for pid in alive(process.pid):
            os.kill(pid, signal.SIGKILL)
    return process.returncode, *said


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are counted on Linux")
def test_whatever_ends_the_command_ends_its_students_and_it_goes_on(options, tmp_path):
    """kill -9 of the parent, then SIGTERM, Ctrl-C, and a student's error: no process is left, one
    line is said, and the next command goes on."""
    options = [*options, "--student", "pure", "hybrid", "--steps", "100000", "--out", "out"]
    folders = [tmp_path / "out" / name for name in ("pure", "hybrid")]
    steps = [0, 0]
    for end, expected, words in ((signal.SIGKILL, -9, ""), (signal.SIGTERM, 143, "interrupted: "),
                                 (signal.SIGINT, 130, "interrupted: ")):
        code, out, err = outcome(options, tmp_path, end, lambda: all(
            (folder / "metrics.jsonl").exists() and len(metrics(folder)) > before + 3
            for folder, before in zip(folders, steps)))
        assert code == expected and words in err and len(err.splitlines()) <= 2, err
        assert "Traceback" not in err and out.count("going on at") == 2 * (steps != [0, 0])
        assert {line.split()[0] for line in out.splitlines() if "| loss" in line} == {
            "pure", "hybrid"}
        steps = [len(metrics(folder)) for folder in folders]
    (folders[0] / "training.pt").write_bytes(b"garbage")
    code, _, err = outcome(options, tmp_path)
    assert code == 2 and err.startswith("distill.py: error: out/pure/training.pt (delete it")
    assert len(err.splitlines()) == 1
    for found in map(metrics, folders):
        assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    for folder in folders:  # each learns what it learns alone
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(distill.Progress, "save", lambda *_: 1 / 0)
            distill.main([*options, "--student", folder.name, "--out", str(tmp_path / "alone")])
        alone = metrics(tmp_path / "alone" / folder.name)
        assert len(alone) == 3
        for a, b in zip(alone, metrics(folder)):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
