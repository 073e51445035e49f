"""What teacher.py promises: a teacher from scratch that students can be made of, a copy of a given
one that leaves the original alone, and runs that go on like those of distill.py."""
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

import data
import distill
import grade
import hub
import sample
import teacher
from conftest import assert_close
from data import load_tokenizer
from model import LM, Config


@pytest.fixture
def command(tiny_options, tmp_path):
    """teacher.py's main for three steps; returns the teacher's folder."""
    def run(*options, name="teacher"):
        teacher.main([*tiny_options, "--out", str(tmp_path / "out"), "--steps", "3",
                      "--log-every", "1", *options])
        return tmp_path / "out" / name
    return run


def test_a_teacher_from_scratch_has_the_built_in_tasks_tokenizer(command, tiny_options, tmp_path):
    """All attention, of the size asked for; a student can be made of it without naming it."""
    for size, name, layers in ("base", "teacher", 4), ("small", "teacher-small", 2):
        folder = command("--size", size, name=name)
        config, tokenizer = LM.from_pretrained(folder).config, load_tokenizer(str(folder))
        assert config.mixers == ["attention"] * layers and config.eos_ids == tokenizer.eos_ids
        assert config.vocab_size == tokenizer.vocab_size
        assert (folder / "metrics.jsonl").read_text().count('"stage": "pretrain"') == 3
    distill.main([*tiny_options, "--out", str(tmp_path / "out"), "--size", "small", "--student",
                  "pure", "--steps", "1"])
    made = json.loads((tmp_path / "out" / "pure-small" / "training.json").read_text())
    assert made["teacher"] == hub.fingerprint(tmp_path / "out" / "teacher-small")


def test_the_large_experiment_is_the_same_commands(tmp_path, monkeypatch):
    """About 27 million parameters and numbers of six digits; here all at tiny size."""
    with torch.device("meta"):
        assert 26e6 < LM(Config(597, **teacher.SIZES["large"])).num_parameters() < 28e6
    monkeypatch.setitem(teacher.SIZES, "large", dict(d_model=32, n_heads=2, d_ff=32))
    monkeypatch.setattr(data, "TRAIN_PROBLEMS", 100)
    out, training = tmp_path / "out", ["--steps", "1", "--batch-tokens", "3000", "--size", "large"]
    for main, options in ((teacher.main, training), (distill.main, training), (
            sample.main, "--task arithmetic6 --limit 2 --num-samples 2 --batch-size 3 "
                         "--max-new-tokens 5".split())):
        main([*options, "--device", "cpu", "--out", str(out)])
    grade.main(["--out", str(out)])
    compared = json.loads((out / "results.json").read_text())["models"]["pure-large"]
    assert compared["teacher"] == "teacher-large"
    for name in "teacher-large", "pure-large", "hybrid-large":
        assert json.loads((out / name / "training.json").read_text())["task"] == "arithmetic6"
        first, *rest = (out / name / "samples.jsonl").read_text().splitlines()
        assert len(json.loads(first)["gold"]) == 6 and len(rest) == 3


def test_a_given_model_is_fine_tuned_as_a_copy(command, tiny_out):
    """Red if the given one is written to, or if training starts anew: with a rate of next to 0 the
    copy is the original, with another it learns. It cannot take its original's place."""
    given, before = str(tiny_out / "teacher"), hub.fingerprint(tiny_out / "teacher")
    original, copied, learnt = (load_file(os.path.join(folder, "model.safetensors")) for folder in (
        given, command("--from", given, "--lr", "1e-9"),
        command("--from", given, "--lr", "1e-2", "--size", "small", name="teacher-small")))
    with pytest.raises(ValueError, match="--from .* where the copy would go: choose another --out"):
        command("--from", given, "--out", str(tiny_out))
    assert hub.fingerprint(given) == before
    for name, tensor in original.items():
        assert_close(copied[name], tensor)
        assert (learnt[name] - tensor).abs().max() > 1e-3


def test_the_loss_is_the_cross_entropy_of_the_solutions(command, tiny_out, task_file):
    """Of the first batch, before any step: recomputed from the tokens of the solutions."""
    folder = command("--from", str(tiny_out / "teacher"), "--batch-tokens", "1000000", "--lr", "1")
    loss = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    tokenizer, lm = load_tokenizer("arithmetic"), LM.from_pretrained(str(tiny_out / "teacher"))
    found = []
    for prompt, answer in distill.load_pairs(tokenizer, task_file, None, None, None)[0]:
        with torch.no_grad():
            logits = lm(torch.tensor([prompt + answer]))[0].double().log_softmax(-1)
        found += [-logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)]
    assert loss == pytest.approx(sum(found) / len(found), rel=1e-4)


def test_a_stopped_run_goes_on_and_another_one_is_refused(command, monkeypatch, capsys, tmp_path):
    """A student cannot be made of half a teacher either."""
    expected, save = hub.fingerprint(command("--save-every", "2")), distill.Progress.save
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(distill.Progress, "save", lambda *state: (save(*state), 1 / 0))
        command("--save-every", "2")
    with pytest.raises(ValueError, match="no finished teacher in .*run python teacher.py"):
        distill.main(["--out", str(tmp_path / "out"), "--device", "cpu"])
    for option, value in ("--seed", "1"), ("--lr", "0.5"), ("--steps", "4"), ("--limit", "9"):
        with pytest.raises(ValueError, match=rf"\b{option[2:]} = .*--out"):
            command(option, value)
    assert hub.fingerprint(command("--save-every", "2")) == expected
    assert "going on at stage 1, step 2" in capsys.readouterr().out
    assert command() and "finished" in capsys.readouterr().out
