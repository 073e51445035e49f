"""What distill.py promises: the losses are the papers' formulas over answer tokens and nothing else, each stage trains what
it should, and a killed run ends bit for bit where an uninterrupted one ends."""
import collections
import copy
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close

import distill
from data import Problem, load_tokenizer
from distill import IGNORE, batches, collate, cross_entropy_loss, hidden_loss, kl_loss, learning_rate, make_optimizer, matrix_loss
from model import LM, student_from

ROOT = Path(distill.__file__).parent


# ------------------------------------------------------------------------------------------------ losses on logits
def random_logits(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_kl_is_zero_for_equal_logits_only(direction):
    """A constant added to all logits of a token does not count: only distributions matter."""
    logits, labels = random_logits(2, 5, 7), torch.ones(2, 5, dtype=torch.long)
    shifted = logits + torch.arange(10.0).view(2, 5, 1)
    assert abs(kl_loss(logits, shifted, labels, direction)) < 1e-6
    assert kl_loss(logits, random_logits(2, 5, 7, seed=1), labels, direction) > 0.1


def test_kl_by_hand():
    """Student (1/2, 1/2), teacher (3/4, 1/4), then the other way round. Red if the directions are swapped, if one is a
    cross-entropy, or if the sum over the vocabulary became a mean."""
    half, quarter = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.75, 0.25]]]).log()
    labels = torch.zeros(1, 1, dtype=torch.long)
    of_half = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)           # KL(half || quarter)
    of_quarter = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)      # KL(quarter || half)
    assert kl_loss(half, quarter, labels).item() == pytest.approx(of_half)       # reverse: KL(student || teacher)
    assert kl_loss(half, quarter, labels, "reverse").item() == pytest.approx(of_half)
    assert kl_loss(half, quarter, labels, "forward").item() == pytest.approx(of_quarter)


def test_cross_entropy_by_hand():
    logits = torch.tensor([[[0.75, 0.25], [0.5, 0.5], [0.1, 0.9]]]).log()
    labels = torch.tensor([[1, IGNORE, 1]])
    assert cross_entropy_loss(logits, labels).item() == pytest.approx(-(math.log(0.25) + math.log(0.9)) / 2)


LOSSES = {"reverse": lambda s, t, labels: kl_loss(s, t, labels, "reverse"),
          "forward": lambda s, t, labels: kl_loss(s, t, labels, "forward"),
          "cross-entropy": lambda s, t, labels: cross_entropy_loss(s, labels)}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_losses_are_means_over_answer_tokens(loss):
    """Padding a batch, whatever the logits there, and repeating it in length or in rows does not move the loss. Red for
    a mean over all positions or over rows, and for F.kl_div's "batchmean", which grows with the length."""
    student, teacher = random_logits(3, 6, 7), random_logits(3, 6, 7, seed=1)
    labels = torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(2))
    labels[0, :4], labels[1, 5:] = IGNORE, IGNORE
    expected = loss(student, teacher, labels)
    counted = labels != IGNORE
    one_by_one = [loss(student[i, t][None, None], teacher[i, t][None, None], labels[i, t][None, None])
                  for i, t in counted.nonzero().tolist()]
    assert_close(expected, torch.stack(one_by_one).mean())
    padding = torch.full((3, 4), IGNORE)
    assert_close(loss(torch.cat([student, random_logits(3, 4, 7, seed=3) * 9], 1),
                      torch.cat([teacher, random_logits(3, 4, 7, seed=4)], 1), torch.cat([labels, padding], 1)), expected)
    for dim in (0, 1):
        assert_close(loss(*(torch.cat([t, t], dim) for t in (student, teacher, labels))), expected)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_teacher_gets_no_gradient(direction):
    student, teacher = random_logits(2, 3, 5).requires_grad_(), random_logits(2, 3, 5, seed=1).requires_grad_()
    kl_loss(student, teacher, torch.tensor([[1, IGNORE, 2], [0, 0, IGNORE]]), direction).backward()
    assert teacher.grad is None
    assert student.grad[0, 0].any() and not student.grad[0, 1].any() and not student.grad[1, 2].any()


def test_losses_are_computed_in_float32():
    """From bfloat16 logits, as under autocast: red if log-softmax runs in bfloat16, where 0.004 steps hide the KL."""
    student = torch.linspace(-3, 3, 4000)[None, None]
    teacher = student + 0.02 * torch.sin(torch.arange(4000.0))
    labels = torch.zeros(1, 1, dtype=torch.long)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    found = kl_loss(student, teacher, labels)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(kl_loss(student.double().float(), teacher.double().float(), labels).item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------ labels
def test_the_first_answer_token_and_the_stop_token_are_learnt_and_the_prompt_is_not():
    """Position t predicts token t + 1, so the last prompt position learns the first answer token, and the last answer
    token learns the stop. The reference code masks by the token at t instead, and never distils the first one."""
    stop = 99
    tokens, labels, valid = collate([([1, 2, 3], [11, 12, stop]), ([4], [13, stop])])
    n = IGNORE
    assert tokens[0].tolist() == [1, 2, 3, 11, 12, stop] and tokens[1, :3].tolist() == [4, 13, stop]
    assert labels.tolist() == [[n, n, 11, 12, stop, n], [13, stop, n, n, n, n]]
    assert valid.tolist() == [[True] * 6, [True] * 3 + [False] * 3]


def test_a_loss_reads_the_logits_that_predict_the_answer(make_lm):
    """Through the model: the gradient of the loss over a hand-made batch reaches exactly the logits of these positions."""
    tokens, labels, _ = collate([([1, 2, 3], [11, 12, 49]), ([4], [13, 49])])
    logits = make_lm()(tokens).requires_grad_()
    cross_entropy_loss(logits, labels).backward()
    assert logits.grad.abs().sum(-1).nonzero().tolist() == [[0, 2], [0, 3], [0, 4], [1, 0], [1, 1]]
    expected = F.log_softmax(logits, -1)
    picked = [expected[0, 2, 11], expected[0, 3, 12], expected[0, 4, 49], expected[1, 0, 13], expected[1, 1, 49]]
    assert_close(cross_entropy_loss(logits, labels), -torch.stack(picked).mean())


# ------------------------------------------------------------------------------------------------ losses on layers
ROWS = [list(range(1, 12)), [3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8]]


def padded(rows, extra=0):
    """tokens and valid of ragged rows, padded on the right."""
    tokens, _, valid = collate([(row, []) for row in rows])
    return F.pad(tokens, (0, extra), value=7), F.pad(valid, (0, extra))


@pytest.fixture
def teacher(make_lm):
    return make_lm(n_kv_heads=2)


@pytest.fixture
def student(teacher):
    """Two of three layers replaced, and moved away from their start."""
    student = student_from(teacher, ["mamba2", "attention", "mamba2"]).requires_grad_(False)
    torch.manual_seed(3)
    for parameter in student.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return student


def teacher_states(teacher, row):
    """The residual stream of one row before each layer and after the last, and the positions' rotations."""
    rope = teacher.rope(torch.arange(len(row))[None])
    states = [teacher.model.embed_tokens(torch.tensor([row]))]
    for block in teacher.layers:
        states.append(block(states[-1], rope))
    return states, rope


@pytest.mark.parametrize("extra", [0, 6])
def test_hidden_loss_is_the_mean_distance_over_tokens_summed_over_replaced_layers(teacher, student, extra):
    """Against rows run alone, without padding: every student layer starts from the teacher's state before that layer."""
    expected = 0.0
    for layer in (0, 2):
        distances = []
        for row in ROWS:
            states, rope = teacher_states(teacher, row)
            distances += (student.layers[layer](states[layer], rope) - states[layer + 1])[0].norm(dim=-1).tolist()
        expected += sum(distances) / len(distances)
    assert hidden_loss(student, teacher, *padded(ROWS, extra)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("extra", [0, 6])
def test_matrix_loss_is_the_frobenius_distance_summed_over_replaced_layers(teacher, student, extra):
    """Mean over rows and heads of || T - attention ||_F, each row without its padding."""
    expected = 0.0
    for layer in (0, 2):
        norms = []
        for row in ROWS:
            states, rope = teacher_states(teacher, row)
            theirs, mine = teacher.layers[layer], student.layers[layer]
            difference = mine.mix().matrix(mine.input_layernorm(states[layer]), rope) - theirs.mix().matrix(
                theirs.input_layernorm(states[layer]), rope)
            norms += difference[0].norm(dim=(1, 2)).tolist()
        expected += sum(norms) / len(norms)
    assert matrix_loss(student, teacher, *padded(ROWS, extra)).item() == pytest.approx(expected, rel=1e-5)


def test_layer_losses_are_zero_for_a_perfect_student(make_lm, monkeypatch):
    """Mixers that do exactly what the teacher's do, norms included. (A Mamba teacher stands in for hidden_loss.)"""
    tokens, valid = padded(ROWS)
    mamba = make_lm(["mamba2"] * 3)
    assert hidden_loss(copy.deepcopy(mamba), mamba, tokens, valid) == 0
    teacher = make_lm()
    student = student_from(teacher, ["mamba2"] * 3)
    assert matrix_loss(student, teacher, tokens, valid) > 0.1
    for block, source in zip(student.layers, teacher.layers):
        monkeypatch.setattr(block.mix(), "matrix", source.mix().matrix)
    assert matrix_loss(student, teacher, tokens, valid) == 0


@pytest.mark.parametrize("loss", [hidden_loss, matrix_loss])
def test_layer_losses_train_the_student_only(teacher, student, loss):
    teacher.requires_grad_(True), student.requires_grad_(True)
    loss(student, teacher, *padded(ROWS)).backward()
    assert all(p.grad is None for p in teacher.parameters())
    touched = {name.split(".")[2] for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"0", "2"}


# ------------------------------------------------------------------------------------------------ batches
@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("arithmetic")


def some_problems(count=600):
    return [Problem(str(i), f"{i}?", str(i), "\n".join([f"{i} +1 = {i + 1}"] * (1 + i % 9))) for i in range(count)]


def pairs_of(problems, tokenizer):
    return [(tokenizer.chat(p.question), tokenizer.encode(p.solution) + tokenizer.eos_ids[:1]) for p in problems]


def take_epoch(problems, tokenizer, seed, budget=700):
    """Rows of one epoch as (tokens without padding, labels), and the sizes of its batches."""
    rows, sizes = [], []
    for tokens, labels, valid in batches(pairs_of(problems, tokenizer), budget, 10_000, seed):
        sizes.append(tokens.shape)
        rows += [(t[v].tolist(), l.tolist()) for t, l, v in zip(tokens, labels, valid)]
        if len(rows) >= len(problems):
            return rows, sizes


def test_every_problem_comes_once_per_epoch_within_the_budget(tokenizer):
    """600 problems of mixed lengths: none lost at the end of a pool, none twice, little padding, no batch too large."""
    problems = some_problems()
    rows, sizes = take_epoch(problems, tokenizer, seed="0")
    texts = collections.Counter(tuple(tokens) for tokens, _ in rows)
    expected = [tuple(tokenizer.chat(p.question) + tokenizer.encode(p.solution) + tokenizer.eos_ids[:1]) for p in problems]
    assert texts == collections.Counter(expected)
    assert all(batch * length <= 700 for batch, length in sizes)
    assert sum(map(len, expected)) > 0.8 * sum(batch * length for batch, length in sizes)


def test_batches_are_the_same_for_a_seed_and_others_for_another(tokenizer):
    problems = some_problems()
    rows, _ = take_epoch(problems, tokenizer, seed="1 0")
    assert take_epoch(problems, tokenizer, seed="1 0")[0] == rows
    assert take_epoch(problems, tokenizer, seed="1 1")[0] != rows


def test_a_sequence_above_the_budget_comes_alone_and_above_the_models_length_not_at_all(tokenizer):
    lengths = [len(tokenizer.chat(p.question) + tokenizer.encode(p.solution)) + 1 for p in some_problems(9)]
    assert all(batch == 1 for batch, _ in take_epoch(some_problems(9), tokenizer, "0", budget=5)[1])
    short = itertools.islice(batches(pairs_of(some_problems(9), tokenizer), 700, sorted(lengths)[4], "0"), 20)
    assert max(tokens.shape[1] for tokens, _, _ in short) == sorted(lengths)[4]


def test_a_task_that_is_too_long_for_the_model_is_an_error_not_an_endless_loop(tokenizer):
    def too_late(*_):
        raise TimeoutError("still looking for a sequence that fits")
    old = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(ValueError, match="long"):
            next(batches(pairs_of(some_problems(9), tokenizer), 700, 3, "0"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


# ------------------------------------------------------------------------------------------------ optimisation
@pytest.mark.parametrize("steps", [200, 1000])
def test_the_learning_rate_warms_up_stays_and_decays(steps):
    rates = [learning_rate(step, steps, 2.0) for step in range(steps)]
    peak = [step for step, rate in enumerate(rates) if rate == 2.0]
    assert peak == list(range(peak[0], peak[-1] + 1)) and len(peak) > 0.4 * steps  # a plateau at exactly the peak
    assert 0 < rates[0] < 0.25 and 0.02 * steps < peak[0] < 0.1 * steps
    assert rates[:peak[0]] == sorted(rates[:peak[0]]) and rates[peak[-1]:] == sorted(rates[peak[-1]:], reverse=True)
    assert 0 < rates[-1] < 0.03 * 2.0


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_learning_rate_of_a_few_steps_is_positive(steps):
    assert all(0 < learning_rate(step, steps, 1.0) <= 1.0 for step in range(steps))


def test_only_matrices_decay(make_lm):
    """Weight decay would pull gains, skips, step sizes and memory lengths towards an arbitrary zero."""
    lm = make_lm(["mamba", "mamba2", "attention"]).requires_grad_(True)
    names = {parameter: name for name, parameter in lm.named_parameters()}
    decay = {names[p]: group["weight_decay"] for group in make_optimizer(lm, 1e-3).param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())  # every parameter is trained, exactly once
    for name, value in decay.items():
        kept = any(word in name for word in ("norm", "bias", "A_log")) or name.endswith(".D")
        assert (value == 0) == kept, name
    assert {value for value in decay.values()} == {0.0, 0.1}


def test_frozen_parameters_stay_what_they_are(teacher, student):
    """The mixers-only stages: a step of AdamW, weight decay included, moves the mixers and nothing else."""
    student.requires_grad_(True)
    before = {name: p.clone() for name, p in student.named_parameters()}
    distill.train_only_mixers(student, True)
    optimizer = make_optimizer(student, 1e-2)
    hidden_loss(student, teacher, *padded(ROWS)).backward()
    optimizer.step()
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) == (".mamba2." not in name), name
    distill.train_only_mixers(student, False)
    assert all(p.requires_grad for p in student.parameters())


# ------------------------------------------------------------------------------------------------ the tiny experiment
def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def stages(folder):
    return list(dict.fromkeys(record["stage"] for record in metrics(folder)))


def test_the_experiment_leaves_whole_checkpoints_and_no_leftovers(tiny_out):
    for name in ("teacher", "pure", "hybrid"):
        assert {"config.json", "model.safetensors", "metrics.jsonl"} <= {f.name for f in (tiny_out / name).iterdir()}
        assert not [f.name for f in (tiny_out / name).iterdir() if f.suffix in (".tmp", ".pt")]
        lm = LM.from_pretrained(str(tiny_out / name))
        assert lm.config.eos_ids == load_tokenizer(str(tiny_out / name)).eos_ids
    mixers = {name: set(LM.from_pretrained(str(tiny_out / name)).config.mixers) for name in ("teacher", "pure", "hybrid")}
    assert mixers["teacher"] == {"attention"} and "attention" not in mixers["pure"]
    assert "attention" in mixers["hybrid"] and len(mixers["hybrid"]) == 2


def test_metrics_tell_the_course_of_training(tiny_out):
    for name in ("teacher", "pure", "hybrid"):
        records = metrics(tiny_out / name)
        assert all({"stage", "step", "loss", "lr", "tokens_per_second"} <= record.keys() for record in records)
        tokens = [record["tokens"] for record in records]
        assert tokens == sorted(set(tokens))
    assert stages(tiny_out / "teacher") == ["pretrain"]
    assert stages(tiny_out / "pure") == ["matrices", "hidden", "kl"] and stages(tiny_out / "hybrid") == ["kl"]


def test_training_reduces_the_loss(tiny_out):
    """Sixty steps teach the teacher most of the little task, and alignment and distillation bring the students nearer."""
    for name, stage, share in (("teacher", "pretrain", 0.5), ("pure", "hidden", 0.9), ("pure", "kl", 0.8), ("hybrid", "kl", 0.8)):
        losses = [record["loss"] for record in metrics(tiny_out / name) if record["stage"] == stage]
        assert losses[-1] < share * losses[0], (name, stage, losses)


# ------------------------------------------------------------------------------------------------ options
@pytest.fixture
def command(tiny_out, tiny_options, tmp_path):
    """Run distill.py's main for three steps of KL on the tiny teacher; returns the student's folder."""
    def run(*options, name="student"):
        distill.main([*tiny_options, "--out", str(tmp_path / "out"), "--teacher", str(tiny_out / "teacher"), "--student", name,
                      "--matrices-steps", "0", "--hidden-steps", "0", "--kl-steps", "3", "--log-every", "1", *options])
        return tmp_path / "out" / name
    return run


def mixers_of(folder):
    return LM.from_pretrained(str(folder)).config.mixers


def weights_of(folder):
    return {name: tensor for name, tensor in load_file(folder / "model.safetensors").items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("options, mixers", [
    (["--attention-layers", "none"], ["mamba2", "mamba2"]),
    (["--attention-layers", "1"], ["mamba2", "attention"]),
    (["--attention-layers", "0", "--mixer", "mamba"], ["attention", "mamba"]),
    (["--attention-layers", "0,1"], ["attention", "attention"]),
    (["--attention-layers", "none", "--mixer", "mamba"], ["mamba", "mamba"]),
])
def test_mixers_are_chosen_by_options(command, options, mixers):
    assert mixers_of(command("--mixer", "mamba2", *options)) == mixers


def test_the_student_that_is_the_teacher_has_nothing_to_learn(command, tiny_out):
    """All layers kept, KL against itself: zero from the first step. Red if tokens and teacher's logits are misaligned."""
    folder = command("--attention-layers", "0,1")
    assert all(abs(record["loss"]) < 1e-5 for record in metrics(folder)[:1])


@pytest.mark.parametrize("options, expected", [
    ([], ["kl"]), (["--recipe", "mambainllama"], ["kl"]),
    (["--recipe", "mohawk", "--matrices-steps", "2", "--hidden-steps", "2"], ["matrices", "hidden", "kl"]),
    (["--sft-steps", "2"], ["kl", "sft"]), (["--kl-steps", "0", "--sft-steps", "2"], ["sft"]),
    (["--recipe", "mambainllama", "--matrices-steps", "2"], ["kl"]),
], ids=str)
def test_stages_are_chosen_by_options(command, options, expected):
    """The recipe says which stages there are, and --...-steps how long: 0 leaves one out."""
    folder = command("--mixer", "mamba2", *options)
    assert stages(folder) == expected
    counts = collections.Counter(record["stage"] for record in metrics(folder))
    assert all(counts[stage] == (3 if stage == "kl" else 2) for stage in expected)


@pytest.mark.parametrize("options", [["--kl", "reverse"], ["--seed", "1"], ["--lr", "1e-3"], ["--batch-tokens", "256"],
                                     ["--dtype", "bfloat16"]], ids=str)
def test_options_change_the_weights(command, tmp_path, options):
    """And the same command gives the same weights, bit for bit."""
    first = weights_of(command("--mixer", "mamba", name="first"))
    assert same(first, weights_of(command("--mixer", "mamba", name="again")))
    assert not same(first, weights_of(command("--mixer", "mamba", *options, name="other")))


def test_training_follows_the_schedule(command):
    """The learning rate of a step, as logged from the optimiser, is that of the schedule: red if it is never set."""
    rates = [record["lr"] for record in metrics(command("--kl-steps", "8"))]
    assert rates == pytest.approx([learning_rate(step, 8, max(rates)) for step in range(8)])
    assert rates[-1] < max(rates)


def test_scale_multiplies_the_default_steps(command):
    folder = command("--scale", "0.5", "--hidden-steps", "2", "--recipe", "mohawk", "--mixer", "mamba2")  # explicit steps win
    assert collections.Counter(r["stage"] for r in metrics(folder)) == dict(hidden=2, kl=3)
    assert distill.choose_steps(None, 100, 2.5) == 250 and distill.choose_steps(0, 100, 2.5) == 0


def test_mixers_only_stages_leave_the_rest_to_the_teacher(command, tiny_out):
    """After matrix orientation and hidden-state alignment alone, everything but the mixers is the teacher's, bit for bit."""
    folder = command("--mixer", "mamba2", "--recipe", "mohawk", "--matrices-steps", "2", "--hidden-steps", "2", "--kl-steps", "0")
    mine, theirs = weights_of(folder), weights_of(tiny_out / "teacher")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine if ".mamba2." not in name)
    start = student_from(LM.from_pretrained(str(tiny_out / "teacher")), ["mamba2"] * 2).state_dict()
    assert all(not torch.equal(mine[f"model.layers.{i}.mamba2.in_proj.weight"], start[f"model.layers.{i}.mamba2.in_proj.weight"])
               for i in (0, 1))


def test_the_teacher_is_not_changed_by_making_students(command, tiny_out):
    before = {file.name: file.read_bytes() for file in (tiny_out / "teacher").iterdir()}
    command()
    assert {file.name: file.read_bytes() for file in (tiny_out / "teacher").iterdir()} == before


@pytest.mark.parametrize("options, message", [
    (["--attention-layers", "0,5"], "--attention-layers 5 .*0 to 1"),
    (["--attention-layers", "-1"], "--attention-layers -1 .*0 to 1"),
    (["--mixer", "mamba", "--recipe", "mohawk", "--matrices-steps", "1"], "--matrices-steps 0"),
    (["--task", "aritmetic"], "aritmetic"),
], ids=str)
def test_a_mistake_leaves_nothing_that_blocks_the_corrected_command(command, options, message):
    """Red if the settings of a run that never started are recorded: the right command is then "other settings"."""
    with pytest.raises(ValueError, match=message):
        command("--mixer", "mamba2", *options)
    assert mixers_of(command("--mixer", "mamba2")) == ["mamba2", "mamba2"]


@pytest.mark.parametrize("options, name", [(["--kl-steps", "-1"], "kl.steps"), (["--save-every", "0"], "save.every"),
                                           (["--log-every", "0"], "log.every"), (["--scale", "-1"], "scale")], ids=str)
def test_numbers_out_of_range_are_refused_by_name(command, options, name):
    with pytest.raises((ValueError, SystemExit), match=rf"{name}|^2$"):
        command(*options)


# ------------------------------------------------------------------------------------------------ stop and resume
def snapshot(folder):
    return {str(f.relative_to(folder)): (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.rglob("*") if f.is_file()}


def test_a_finished_run_is_not_done_again(tiny_out, tiny_options, tmp_path, capsys):
    shutil.copytree(tiny_out, tmp_path / "out")
    before = {k: v for k, v in snapshot(tmp_path / "out").items() if k.endswith((".safetensors", "metrics.jsonl", "config.json"))}
    distill.main([*tiny_options, "--out", str(tmp_path / "out"), "--pretrain-steps", "60", "--matrices-steps", "10",
                  "--hidden-steps", "30", "--kl-steps", "30"])
    after = snapshot(tmp_path / "out")
    assert {k: after[k] for k in before} == before and len(before) == 9
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize("options, name", [
    (["--pretrain-steps", "61"], "steps"), (["--seed", "4"], "seed"), (["--d-ff", "65"], "config"), (["--kl-steps", "31"], "steps"),
    (["--kl", "reverse"], "kl"), (["--lr", "0.5"], "lr"), (["--attention-layers", "0"], "mixers")], ids=str)
def test_other_settings_are_refused_and_nothing_is_overwritten(tiny_out, tiny_options, tmp_path, options, name):
    shutil.copytree(tiny_out, tmp_path / "out")
    before = {k: v[0] for k, v in snapshot(tmp_path / "out").items()}
    with pytest.raises(ValueError, match=rf"\b{name} = .*--out"):
        distill.main([*tiny_options, "--out", str(tmp_path / "out"), "--pretrain-steps", "60", "--matrices-steps", "10",
                      "--hidden-steps", "30", "--kl-steps", "30", *options])
    assert {k: v[0] for k, v in snapshot(tmp_path / "out").items()} == before


def start(folder, options):
    """distill.py as a user runs it, in a process of its own."""
    return subprocess.Popen([sys.executable, str(ROOT / "distill.py"), *options, "--out", str(folder)], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def kill_at(folder, options, name, stage, step):
    """Start distill.py and kill -9 it when the metrics of `name` have reached a step of a stage."""
    process, path = start(folder, options), folder / name / "metrics.jsonl"
    while process.poll() is None:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        if any(r["stage"] == stage and r["step"] >= step for r in records):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed: give it more steps"
    assert not (folder / name / "config.json").exists()


def without_time(folder):
    return [{k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")} for record in metrics(folder)]


@pytest.fixture(scope="module")
def long_options(tiny_options):
    return [*tiny_options, "--student", "pure", "--pretrain-steps", "60", "--matrices-steps", "8", "--hidden-steps", "16",
            "--kl-steps", "80", "--log-every", "3", "--save-every", "6"]


def test_kill_9_and_rerun_ends_where_an_uninterrupted_run_ends(long_options, tmp_path):
    """Killed while the teacher trains, and in the student's last stage when the latest checkpoint is still of the stage
    before: in the end every weight and every metric but time is the same, bit for bit. Red if optimiser, schedule, random
    state or position in the data is lost on the way."""
    straight = start(tmp_path / "straight", long_options)
    kill_at(tmp_path / "killed", long_options, "teacher", "pretrain", 20)
    kill_at(tmp_path / "killed", long_options, "pure", "kl", 3)
    last = start(tmp_path / "killed", long_options)
    for process in (straight, last):
        assert (process.communicate()[1], process.returncode) == ("", 0)
    for name in ("teacher", "pure"):
        one, two = tmp_path / "straight" / name, tmp_path / "killed" / name
        assert same(weights_of(one), weights_of(two))
        assert without_time(one) == without_time(two)
        assert sorted(os.listdir(one)) == sorted(os.listdir(two))


class Killed(Exception):
    pass


@pytest.mark.parametrize("crash_after", [1, 2, 3])
def test_a_log_line_that_spans_a_checkpoint_survives_a_crash(tiny_options, tmp_path, monkeypatch, crash_after):
    """Checkpoints every 4 steps and log lines every 3: a loss averaged over steps 4 to 6 needs step 4's, from before."""
    options = [*tiny_options, "--student", "pure", "--pretrain-steps", "18", "--matrices-steps", "0", "--hidden-steps", "0",
               "--kl-steps", "2", "--log-every", "3", "--save-every", "4"]
    distill.main([*options, "--out", str(tmp_path / "straight")])
    save, saves = distill.Run.save, []

    def save_and_crash(*arguments, **named):
        save(*arguments, **named)
        saves.append(1)
        if len(saves) == crash_after:
            raise Killed
    monkeypatch.setattr(distill.Run, "save", save_and_crash)
    with pytest.raises(Killed):
        distill.main([*options, "--out", str(tmp_path / "killed")])
    distill.main([*options, "--out", str(tmp_path / "killed")])
    one, two = tmp_path / "straight" / "teacher", tmp_path / "killed" / "teacher"
    assert same(weights_of(one), weights_of(two))
    assert without_time(one) == without_time(two)


@pytest.mark.parametrize("leftover", [b"", b"garbage"], ids=["empty", "garbage"])
def test_an_unreadable_checkpoint_is_named(tiny_options, tmp_path, monkeypatch, leftover):
    """A damaged training.pt must stop the run and say which file it is, not start over in silence."""
    def crash(*_):
        raise Killed
    options = [*tiny_options, "--out", str(tmp_path), "--pretrain-steps", "8", "--save-every", "4"]
    save = distill.Run.save
    monkeypatch.setattr(distill.Run, "save", lambda *arguments, **named: (save(*arguments, **named), crash()))
    with pytest.raises(Killed):
        distill.main(options)
    assert (tmp_path / "teacher" / "training.pt").stat().st_size > 0
    (tmp_path / "teacher" / "training.pt").write_bytes(leftover)
    with pytest.raises((ValueError, OSError), match="training.pt"):
        distill.main(options)
