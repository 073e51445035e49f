"""What distill.py promises: the losses are the papers' formulas over answer tokens and nothing
else, each stage trains what it should, pieces change nothing, and a run that is killed anywhere
ends byte for byte where an uninterrupted one ends."""
import itertools
import json
import os
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import distill
import hub
from conftest import assert_close
from data import load_tokenizer
from distill import (IGNORE, Batch, batches, collate, hidden_loss, kl_loss, learning_rate,
                     make_optimizer, matrix_loss)
from model import LM, Config, student_from


# ---- losses on logits
def literal_loss(kind, student, teacher, labels):
    """Token by token in float64: the formulas of the docstrings, over labels that count."""
    found = []
    for s, t, label in zip(student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten().tolist()):
        if label != IGNORE:
            s, t = s.double().log_softmax(0), t.double().log_softmax(0)
            found.append(dict(forward=(t.exp() * (t - s)).sum(), reverse=(s.exp() * (s - t)).sum(),
                              sft=-s[label])[kind])
    return torch.stack(found).mean()


@pytest.mark.parametrize("kind", ["forward", "reverse", "sft"])
def test_losses_are_means_over_answer_tokens(kind):
    """Red for swapped directions, a mean over all positions or rows, a sum that grows with the
    length (F.kl_div's "batchmean"), or padding that counts. In float32, whatever the logits are.
    The teacher gets no gradient; KL is zero for equal distributions only."""
    def ours(student, teacher, labels):
        if kind == "sft":
            lm = SimpleNamespace(last_state=lambda tokens: student, head=lambda x: x)
            return distill.sft(lm, None, Batch(None, labels, None))
        return kl_loss(student, teacher, labels, kind)
    torch.manual_seed(0)
    student, teacher = (t.requires_grad_() for t in 2 * torch.randn(2, 3, 6, 7))
    labels = torch.randint(7, (3, 6))
    labels[0, :4], labels[1, 5:] = IGNORE, IGNORE
    expected, half = literal_loss(kind, student, teacher, labels), (student.half(), teacher.half())
    assert_close(loss := ours(student, teacher, labels), expected)
    loss.backward()
    assert loss > 0.1 and teacher.grad is None
    assert (student.grad.abs().sum(-1) > 0).equal(labels != IGNORE)
    if kind != "sft":  # a constant added to all logits of a token does not count
        assert abs(ours(student, student + torch.arange(6.0)[:, None], labels)) < 1e-6
    assert_close(ours(*half, labels), literal_loss(kind, *half, labels), torch.float32)
    longer = (torch.cat([t, torch.full_like(t, IGNORE)], 1) for t in (student, teacher, labels))
    assert_close(ours(*longer), expected)


class Widest(TorchDispatchMode):
    """The rows of the largest tensor with a vocabulary of V entries."""
    V, rows = 499, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **kwargs or {})
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.V,):
                self.rows = max(self.rows, tensor.numel() // self.V)
        return found


@pytest.mark.parametrize("stage", ["kl", "sft"])
def test_the_logits_of_few_answer_tokens_are_in_memory_at_once(make_lm, monkeypatch, stage):
    """Loss and gradients are those of all at once, the head's too."""
    teacher = make_lm(["attention"] * 2, vocab_size=Widest.V, d_model=8, d_ff=8)
    student = student_from(teacher, ["mamba2"] * 2).requires_grad_()
    batch, found = collate([([3], [5] * 30), ([1, 2], [9] * 20)]), []
    loss, = (s.loss for s in distill.student_stages({stage: 1}, 1e-3, "forward"))
    for positions in 1000, 9:
        monkeypatch.setattr(distill, "POSITIONS", positions)
        student.zero_grad()
        with Widest() as widest:
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1],
                                                          lambda t: t):
                value = loss(student, teacher, batch)
            value.backward()
        assert widest.rows == min(50, positions)
        assert ((50, Widest.V) in kept) == (positions > 50) and (9, Widest.V) not in kept
        found.append([value.detach(), *(p.grad for p in student.parameters())])
    for one, other in zip(*found):
        assert_close(one, other)


# ---- losses on layers
ROWS = [list(range(1, 12)), [3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8]]


def padded(extra=0):
    """tokens and valid of ROWS, padded on the right."""
    tokens, _, valid = collate([(row, []) for row in ROWS])
    return F.pad(tokens, (0, extra), value=7), F.pad(valid, (0, extra))


def literal_layer_loss(loss, student, teacher):
    """Rows run alone, without padding; every layer of the student starts from the teacher's
    state before that layer. Sum over the two replaced layers."""
    total = 0.0
    for layer in (0, 2):
        mine, theirs, found = student.layers[layer], teacher.layers[layer], []
        for row in ROWS:
            rope = teacher.rope(torch.arange(len(row))[None])
            *_, x, y = itertools.islice(teacher.hidden_states(torch.tensor([row])), layer + 2)
            if loss is hidden_loss:
                found += (mine(x, rope) - y)[0].norm(dim=-1).tolist()
            else:
                difference = mine.mixing_matrix(x, rope) - theirs.mixing_matrix(x, rope)
                found += difference[0].norm(dim=(1, 2)).tolist()
        total += sum(found) / len(found)
    return torch.tensor(total)


@pytest.mark.parametrize("loss", [hidden_loss, matrix_loss])
def test_layer_losses_are_their_definition_and_train_the_replaced_layers(make_lm, loss):
    """Mean over tokens of a norm, or over rows and heads of a Frobenius norm. Red if the layer that
    was kept counts, if padding does, or if a layer starts from the student's own state. Orientation
    is in float32 under autocast too."""
    teacher = make_lm().requires_grad_(True)
    student = student_from(teacher, ["mamba2", "attention", "mamba2"])
    with torch.no_grad():
        for parameter in student.parameters():  # away from the teacher
            parameter.add_(0.05 * torch.randn_like(parameter))
        expected = literal_layer_loss(loss, student, teacher)
    found = loss(student, teacher, *padded())
    found.backward()
    assert_close(found.detach(), expected)
    assert_close(loss(student, teacher, *padded(6)).detach(), expected)
    assert all(p.grad is None for p in teacher.parameters())
    assert {name.split(".")[2] for name, p in student.named_parameters()
            if p.grad is not None and p.grad.any()} == {"0", "2"}
    with torch.autocast("cpu", torch.bfloat16):
        unchanged = torch.equal(loss(student, teacher, *padded()), found)
    assert unchanged == (loss is matrix_loss)


# ---- batches
def test_the_first_answer_token_and_the_stop_token_are_learnt_and_the_prompt_is_not():
    """Position t predicts token t + 1. M1's code masks by the token at t, and loses the first."""
    tokens, labels, valid = collate([([1, 2, 3], [11, 12, 99]), ([4], [13, 99])])
    n = IGNORE
    assert tokens[0].tolist() == [1, 2, 3, 11, 12, 99] and tokens[1, :3].tolist() == [4, 13, 99]
    assert labels.tolist() == [[n, n, 11, 12, 99, n], [13, 99, n, n, n, n]]
    assert valid.tolist() == [[True] * 6, [True] * 3 + [False] * 3]


PAIRS = [(list(range(1 + i % 7)), [i] * (2 + i * i % 60)) for i in range(600)]


def rows_of(found):
    return [tuple(t[v].tolist()) for batch in found for t, v in zip(batch.tokens, batch.valid)]


def epoch(seed, pairs=PAIRS, budget=300):
    """The batches of one epoch."""
    found = []
    for batch in batches(pairs, budget, 10_000, seed):
        found.append(batch)
        if sum(len(batch.tokens) for batch in found) >= len(pairs):
            return found


def test_every_solution_comes_once_per_epoch_within_the_budget_in_an_order_of_the_seed():
    """600 of mixed lengths: none lost at the end of a pool, none twice, little padding. The order
    is not that of the lengths, by which batches are made. One that is too long for the budget is
    alone; for the model, left out, and where all are, an error: no endless search."""
    found = epoch("0")
    assert sorted(rows_of(found)) == sorted((*prompt, *answer) for prompt, answer in PAIRS)
    assert max(batch.tokens.numel() for batch in found) <= 300
    padding = sum((~batch.valid).sum() for batch in found) / sum(b.valid.numel() for b in found)
    assert padding < 0.2
    lengths = [batch.tokens.shape[1] for batch in found][:20]
    assert lengths != sorted(lengths)
    assert rows_of(epoch("1 0")) == rows_of(epoch("1 0")) != rows_of(epoch("1 1"))
    assert {len(batch.tokens) for batch in epoch("0", PAIRS[:9], budget=5)} == {1}
    lengths = sorted(len(prompt + answer) for prompt, answer in PAIRS[:9])
    short = itertools.islice(batches(PAIRS[:9], 300, lengths[4], "0"), 20)
    assert max(batch.tokens.shape[1] for batch in short) == lengths[4]
    with pytest.raises(ValueError, match="longer than max_length = 2"):
        next(batches(PAIRS, 300, 2, "0"))
    # a stage begins with short ones and has all from its half on
    longest = max(len(prompt + answer) for prompt, answer in PAIRS)
    found = list(itertools.islice(batches(PAIRS, 300, 999, "0", steps=200, start=0.2), 200))
    lengths = [batch.tokens.shape[1] / longest for batch in found]
    assert max(lengths[:5]) <= 0.2 and max(lengths[:50]) < 0.6 and max(lengths) == 1


def test_pieces_add_up_to_the_batch():
    """Rows are dealt once, shares of rows, tokens and answers add up to 1 and are what they say;
    with more pieces than rows the rest have a share of 0 and still a row: no process may idle."""
    batch = collate(PAIRS[7:12])
    sizes = dict(rows=5, answers=sum(len(answer) for _, answer in PAIRS[7:12]),
                 tokens=sum(len(prompt + answer) for prompt, answer in PAIRS[7:12]))
    for count, of in itertools.product((1, 2, 5, 8), sizes):
        assert batch.size(of) == sizes[of]
        pieces = [batch.piece(index, count, of) for index in range(count)]
        assert sum(share for _, share in pieces) == pytest.approx(1)
        for piece, share in pieces:
            assert piece.valid.any(0).all() and len(piece.tokens)  # no column is padding alone
            assert share in (0, pytest.approx(piece.size(of) / sizes[of]))
        assert sorted(rows_of(p for p, share in pieces if share)) == sorted(rows_of([batch]))


# ---- optimisation
def test_only_matrices_decay_and_mixers_learn_faster(make_lm):
    """Every parameter is trained exactly once, or not at all where it is frozen; twice as fast in
    mixers other than attention."""
    lm = make_lm(["mamba", "mamba2", "attention"]).requires_grad_(True)
    names = {parameter: name for name, parameter in lm.named_parameters()}
    found = [(names[p], group["weight_decay"], group["pace"]) for group in make_optimizer(
        lm, 1e-3).param_groups for p in group["params"]]
    assert sorted(name for name, *_ in found) == sorted(names.values())
    for name, decay, pace in found:
        assert pace == 1 + (".mamba." in name or ".mamba2." in name), name
        kept = any(word in name for word in ("norm", "bias", "A_log")) or name.endswith(".D")
        assert (decay == 0) == kept, name
    lm.model.embed_tokens.weight.requires_grad_(False)
    assert sum(len(g["params"]) for g in make_optimizer(lm, 1e-3).param_groups) == len(found) - 1


def test_new_mixers_are_stepped_at_twice_the_rate(command, monkeypatch):
    rates = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(
        {group["pace"]: group["lr"] for group in self.param_groups}))
    command("--lr", "1e-3")
    assert len(rates) == 3 and all(0 < 2 * rate[1] == rate[2] for rate in rates)


HERE = dict(device="cpu", dtype=None, accumulate=1, checkpoint_activations=False, compile=False,
            log_every=1, save_every=1)
MIXED = [([1, 2, 3], [11, 12, 13, 14, 49]), ([4], [13, 49]), ([5, 6], [49]),
         ([7, 8, 9, 10, 11, 12], [3, 49]), ([9], [2, 2, 2, 49])]
STAGES = {stage.name: stage for stage in distill.student_stages(
    dict(matrices=1, hidden=1, kl=1, sft=1), 1e-3, "forward")}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("change", [dict(accumulate=2), dict(accumulate=99),
                                    dict(checkpoint_activations=True)], ids=str)
def test_pieces_and_checkpoints_change_no_gradient(make_lm, name, change):
    """Red if a piece's mean is weighted by 1 / pieces or by the wrong count: rows have one to five
    answer tokens. Red if a wrapper renames weights."""
    teacher, losses, gradients = make_lm(), [], []
    for options in HERE, HERE | change:
        hardware = distill.Hardware(**options)
        torch.manual_seed(0)
        student = student_from(teacher, ["mamba2", "attention", "mamba2"])
        names, pair = set(student.state_dict()), distill.ready(student, teacher, hardware)
        losses.append(distill.gradient(pair, STAGES[name], collate(MIXED), hardware))
        assert set(student.state_dict()) == names
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    expected, found = gradients
    assert_close(losses[1], losses[0])
    assert found.keys() == expected.keys() and len(found) > 4
    scale = max(g.abs().max() for g in expected.values())
    for key in expected:  # some gradients are sums that cancel: the scale is the largest one's
        assert_close(found[key] / scale + 1, expected[key] / scale + 1)


# ---- the tiny experiment
def metrics(folder, *without):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in without} for line in lines]


@pytest.mark.parametrize("name, mixers, shares", [
    ("teacher", ["attention"] * 2, dict(sft=0.5)),
    ("pure", ["mamba2"] * 2, dict(matrices=1, hidden=0.9, kl=0.8)),
    ("hybrid", ["mamba2", "attention"], dict(kl=0.8))])
def test_training_leaves_a_checkpoint_and_metrics_of_a_falling_loss(tiny_out, name, mixers, shares):
    folder, records = tiny_out / name, metrics(tiny_out / name)
    assert set(os.listdir(folder)) - {"matrices.npz"} == {
        "config.json", "model.safetensors", "metrics.jsonl", "training.json", data.TOKENIZER_FILE}
    config = LM.from_pretrained(folder).config
    assert (config.mixers, config.eos_ids) == (mixers, load_tokenizer(str(folder)).eos_ids)
    assert all(one["tokens"] < two["tokens"] for one, two in itertools.pairwise(records))
    assert list(dict.fromkeys(record["stage"] for record in records)) == list(shares)
    for stage, share in shares.items():
        course = [record for record in records if record["stage"] == stage]
        assert course[-1]["loss"] <= share * course[0]["loss"]
        assert set(course[0]) == set("stage step steps tokens loss lr grad_norm seconds "
                                     "tokens_per_second".split())


@pytest.fixture
def command(tiny_out, tiny_options, tmp_path):
    """Run distill.py's main for three steps of KL on the tiny teacher -> the student's folder."""
    def run(*options, name="student", out="out", steps=("matrices=0", "hidden=0", "kl=3")):
        distill.main([*tiny_options, "--out", str(tmp_path / out), "--teacher",
                      str(tiny_out / "teacher"), "--log-every", "1", "--student", name, *options,
                      "--steps", *steps])
        return tmp_path / out / name
    run.folder = tmp_path / "out" / "student"
    return run


def test_training_follows_the_schedule(command, tiny_out):
    """The rate as logged from the optimizer, of kl and of sft, a tenth; the teacher is untouched;
    the same command gives the same weights, another seed other ones. Orientation and alignment
    alone: all but the mixers is the teacher's, bit for bit, and every mixer learns. The schedule is
    up over 5% of the steps, down over the others, never 0."""
    for steps, step in ((steps, step) for steps in (1, 2, 3, 20, 200) for step in range(steps)):
        up = (step + 1) / (0.05 * steps) if step + 1 < 0.05 * steps else 1
        down = (steps - step) / (0.95 * steps) if steps - step < 0.95 * steps else 1
        assert learning_rate(step, steps, 2.0) == pytest.approx(2.0 * up * down) != 0
    frozen = command(steps=["matrices=2", "hidden=2", "kl=0"], name="frozen")
    mine = load_file(frozen / "model.safetensors")
    start = student_from(LM.from_pretrained(tiny_out / "teacher"), ["mamba2"] * 2).state_dict()
    for name, tensor in start.items():
        if ".mamba2." not in name or "in_proj" in name:
            assert torch.equal(mine[name], tensor) == (".mamba2." not in name), name
    before = {path: path.stat().st_mtime_ns for path in (tiny_out / "teacher").iterdir()}
    folder = command("--lr", "1e-3", steps=["matrices=0", "hidden=0", "kl=8", "sft=4"])
    expected = [learning_rate(step, 8, 1e-3) for step in range(8)]
    expected += [learning_rate(step, 4, 1e-4) for step in range(4)]
    assert [record["lr"] for record in metrics(folder)] == pytest.approx(expected)
    assert {path: path.stat().st_mtime_ns for path in (tiny_out / "teacher").iterdir()} == before
    first, again, other = (hub.fingerprint(command("--seed", seed, name=name)) for name, seed in
                           (("first", "1"), ("again", "1"), ("other", "2")))
    assert first == again != other


@pytest.mark.parametrize("name, options, expected", [
    ("pure", "", dict(recipe="mohawk", mixers=["mamba2"] * 4, lr=5e-4, batch_tokens=768,
                      steps=distill.STEPS["mohawk"])),
    ("hybrid-2", "--scale 0.5", dict(mixers=["mamba2", "attention", "mamba2", "mamba2"],
                                     steps=dict(kl=2500, sft=0))),
    ("mine", "--steps 5 sft=0 --attention-layers 0,3", dict(
        mixers=["attention", "mamba2", "mamba2", "attention"],
        steps=dict(matrices=5, hidden=5, kl=5, sft=0))),
    ("mine", "--task gsm8k --recipe mambainllama --mixer mamba --attention-layers none", dict(
        mixers=["mamba"] * 4, lr=1e-3, batch_tokens=6144)),
    ("mine", "--task gsm8k --lr 0.1 --batch-tokens 7", dict(lr=0.1, batch_tokens=7))], ids=str)
def test_what_a_student_is_by_default_and_as_asked(name, options, expected):
    """Of a teacher of four layers and width 128: 2e-3 is halved."""
    args = distill.parse_args(options.split())
    found = distill.student_settings(
        name, Config(d_model=128), args.task, args.recipe, args.mixer, args.attention_layers,
        dict(args.steps), args.scale, args.lr, args.batch_tokens)
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("options, message", [
    ("--attention-layers 0,5", r"--attention-layers \(0, 5\).* 0 to 1"),
    ("--attention-layers -1", "--attention-layers .* 0 to 1"),
    ("--attention-layers 0,1", "nothing to distil"), ("--attention-layers x", "^2$"),
    ("--mixer mamba --steps kl=1 matrices=1", "--mixer mamba .* --steps matrices=0"),
    ("--steps kl=1 nope=3", "--steps nope=.*hidden, kl, matrices, sft"),
    ("--recipe mambainllama --steps hidden=1", "--steps hidden=.*all, kl, sft"),
    ("--task aritmetic", "aritmetic"), ("--limit 0", "^2$"), ("--lr 1e9", "^2$"),
    ("--log-every 0", "^2$"), ("--steps kl=-1", "^2$")])
def test_a_mistake_is_named_and_leaves_nothing_that_blocks_the_right_command(
        command, options, message):
    with pytest.raises((ValueError, SystemExit), match=message) as error:
        command(steps=["hidden=0", "kl=1", "matrices=0", *options.split()])
    assert "\n" not in str(error.value) and not command.folder.exists()
    assert LM.from_pretrained(str(command())).config.mixers == ["mamba2", "mamba2"]


# ---- data, matrices.npz
def test_samples_are_a_task_and_only_right_keeps_the_right_ones(tmp_path):
    """Unfinished and unboxed texts are no solutions; --only-right leaves out wrong ones. Their text
    is learnt as it is. Nothing left is an error that says what is needed."""
    path, tokenizer = tmp_path / "samples.jsonl", load_tokenizer("arithmetic")
    texts = "so \\boxed{5}", "so \\boxed{6}", "5", "\\boxed{5}"
    rows = [dict(problem=0, sample=i, question="2 +3", gold="5", completion=text,
                 finish="stop" if i < 3 else "length") for i, text in enumerate(texts)]

    def learnt(rows, only_right=False):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        pairs, _ = distill.load_pairs(tokenizer, str(path), None, None, None, only_right)
        return [tokenizer.decode(answer) for _, answer in pairs]
    assert learnt(rows) == ["so \\boxed{5}<|end|>", "so \\boxed{6}<|end|>"]
    assert learnt(rows, True) == ["so \\boxed{5}<|end|>"]
    for first, only_right, said in (1, True, "right worked"), (2, False, "worked"):
        with pytest.raises(ValueError, match=f"has no {said} solutions to train on"):
            learnt(rows[first:], only_right)


def test_the_picture_has_attention_and_what_replaces_it(command, tiny_out, make_lm, tmp_path):
    """float16 and causal, of the middle replaced layer, both given the teacher's state: recomputed
    for the end, from the tokens that are named. None of mixers without matrices; small of random
    weights, whose matrices compress least: three heads of eight, 96 tokens."""
    folder = command(steps=["matrices=1", "hidden=1", "kl=2", "sft=1"])
    found, stages = dict(np.load(folder / "matrices.npz")), ("transfer", "orientation", "end")
    assert found.keys() == {"tokens", "layer", "teacher", *stages} and found["layer"] == 1
    student, teacher = (LM.from_pretrained(str(path)) for path in (folder, tiny_out / "teacher"))
    tokenizer, length = load_tokenizer("arithmetic"), len(found["tokens"])
    tokens = [i for text in found["tokens"].tolist() for i in (
        [tokenizer.special[text]] if text in tokenizer.special else tokenizer.encode(text))]
    with torch.no_grad():
        *_, x, _ = itertools.islice(teacher.hidden_states(torch.tensor([tokens])), 3)
        rope = teacher.rope(torch.arange(length)[None])
        for key, lm in ("teacher", teacher), ("end", student):
            matrix = lm.layers[1].mixing_matrix(x, rope)[0, :3]
            assert_close(torch.tensor(found[key]), matrix, torch.float16)
    for key in ("teacher", *stages):
        assert found[key].shape == (2, length, length) and found[key].dtype == np.float16
        assert not np.triu(found[key], 1).any() and np.isfinite(found[key]).all()
    assert all((found[one] != found[two]).any() for one, two in itertools.pairwise(stages))
    assert not (command("--mixer", "mamba", name="mamba") / "matrices.npz").exists()
    make_lm(n_heads=8, d_model=64, vocab_size=1000).save_pretrained(tmp_path / "large")
    load_tokenizer("arithmetic").save(tmp_path / "large")
    path = command("--teacher", str(tmp_path / "large"), "--task", "arithmetic", "--limit", "9",
                   steps=["matrices=1", "hidden=0", "kl=1"], name="other") / "matrices.npz"
    assert np.load(path)["end"].shape == (3, 96, 96) and path.stat().st_size <= 250_000


# ---- stop and resume
RESUMED = ["matrices=2", "hidden=3", "kl=5", "sft=2"]
OFTEN = ["--save-every", "2", "--log-every", "3"]  # a log line spans a checkpoint


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def contents(folder):
    """{file: bytes}, of metrics.jsonl without what depends on the time."""
    return files(folder) | {"metrics.jsonl": metrics(folder, "seconds", "tokens_per_second")}


def killed(run, when, renames):
    """Run in a forked process that kills -9 itself before or after its n-th renaming, which is how
    every file comes to be; returns whether it got so far."""
    process = os.fork()
    if not process:
        rename, count = os.replace, itertools.count(1)

        def replace(source, target):
            last = next(count) == renames
            if last and when == "before":
                os.truncate(source, os.path.getsize(source) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
        os.replace = replace
        try:
            os.close(1), os.close(2)
            run()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL



@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_anywhere_it_ends_where_an_uninterrupted_run_ends(command, tmp_path, capsys, when,
                                                                 request):
    """kill -9 in the middle of writing any file, or after its renaming, and half a log line: every
    byte of every file is the same in the end, but for the time. Red if a rerun starts over, or if
    a finished run is done again."""
    request.addfinalizer(lambda threads=torch.get_num_threads(): torch.set_num_threads(threads))
    torch.set_num_threads(1)  # a forked process has no other, and would wait for it
    def run(out):
        return command(*OFTEN, out=out, steps=RESUMED)
    expected = contents(run("straight"))
    for renames in itertools.count(1):
        if not killed(lambda: run(f"killed {renames}"), when, renames):
            break
        folder, _ = tmp_path / f"killed {renames}" / "student", capsys.readouterr()
        begun = (folder / "training.pt").exists()
        if begun:
            with open(folder / "metrics.jsonl", "a") as f:
                f.write('{"stage": "k')
        assert contents(run(f"killed {renames}")) == expected
        assert ("going on at" in capsys.readouterr().out) == begun
    assert renames > 10  # settings, checkpoints, matrices, tokenizer, model, config
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "straight").rglob("*")}
    run("straight")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "straight").rglob("*")} == before
    assert "finished" in capsys.readouterr().out


@pytest.fixture
def stopped(command, monkeypatch):
    """The folder of a run whose first checkpoint was the last thing it did."""
    save = distill.Progress.save
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(distill.Progress, "save", lambda *state: (save(*state), 1 / 0))
        command("--save-every", "1")
    return command.folder


@pytest.mark.parametrize("option, name", [
    ("--seed 4", "seed"), ("--kl reverse", "kl"), ("--lr 0.5", "lr"), ("--limit 7", "limit"),
    ("--attention-layers 0", "mixers"), ("--d-state 4", "d_state"), ("--only-right", "only_right"),
    ("--random-mixers", "transfer"), ("--batch-tokens 99", "batch_tokens"),
    ("--prompt-file prompt", "template"), ("--task task.jsonl", "content"),
    ("--teacher {tiny}/hybrid", "teacher")])
def test_settings_of_another_run_are_refused_by_name(command, stopped, tmp_path, tiny_out,
                                                     task_file, option, name, monkeypatch):
    """A run that stopped goes on with its own settings only, and nothing is overwritten; one that
    has not completed a checkpoint refuses nobody."""
    monkeypatch.chdir(tmp_path)
    Path("prompt").write_text("Compute {question}")
    Path("task.jsonl").write_text(Path(task_file).read_text() + "\n")
    options, before = option.format(tiny=tiny_out).split(), files(stopped)
    with pytest.raises(ValueError, match=rf"\b{name} = .* there, .* now.*--out"):
        command(*options)
    assert files(stopped) == before
    os.remove(stopped / "training.pt")
    command(*options)


@pytest.mark.parametrize("file, content, message", [
    ("training.pt", lambda old: b"", "training.pt .delete it to start over"),
    ("training.pt", lambda old: old[:len(old) // 2], "training.pt .delete it to start over"),
    ("training.pt", lambda old: old[:9999] + bytes([old[9999] ^ 4]) + old[10000:], "checksum"),
    ("training.json", lambda old: None, "lost its training.json: choose another --out"),
    ("training.json", lambda old: b"[1]", "training.json holds .*expected an object"),
    ("metrics.jsonl", lambda old: b"x\n", "metrics.jsonl, line 1 is not readable JSON"),
    ("metrics.jsonl", lambda old: b'{"tokens": -1}\n', "metrics.jsonl, line 1: tokens is -1"),
    *((file, None, "did not make.*--out") for file in (
        "config.json", "metrics.jsonl", "training.json"))])
def test_a_file_that_is_damaged_or_alone_is_named(command, stopped, file, content, message):
    """Of a stopped run; alone, it is not what this command made. Nothing is overwritten."""
    if content is None:
        shutil.rmtree(stopped)
        stopped.mkdir()
    content = content((stopped / file).read_bytes()) if content else b"{}"
    (stopped / file).unlink() if content is None else (stopped / file).write_bytes(content)
    before = files(stopped)
    with pytest.raises(ValueError, match=message):
        command()
    assert files(stopped) == before


@pytest.mark.parametrize("option, file", [("--save-every=1", "training.pt"),
                                          ("--save-every=9", "model.safetensors")])
def test_a_full_disk_is_one_line_and_then_the_run_goes_on(command, option, file):
    """Files have the umask's mode. Weights that are lost afterwards are named, too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{file} cannot be written"):
            command(option)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(command.folder.glob("*tmp*")) and not (command.folder / file).exists()
    weights = command(option, "--lr", "0.1") / "model.safetensors"
    assert weights.stat().st_mode == (command.folder / "config.json").stat().st_mode
    weights.write_bytes(weights.read_bytes()[:999])
    with pytest.raises(ValueError, match="model.safetensors"):
        command(option, "--lr", "0.1")


def test_a_loss_that_is_no_number_ends_the_run_and_another_rate_is_welcome(command, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(
            ValueError, match="loss of stage kl is nan at step 1: lower --lr"):
        patch.setattr(distill, "divergence", lambda s, *_, **to: s.sum() * float("nan"))
        command("--lr", "0.1")
    assert command("--lr", "0.01").exists()


def test_compiling_changes_nothing(command, monkeypatch):
    """With a backend that compiles nothing but goes the same way. Red if parameters get other names
    or a block is left out: two of the teacher, two of the student. Without a compiler: one line."""
    compile, asked, graphs = torch.compile, [], []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile",
                        lambda f: (asked.append(f), compile(f, backend=backend))[1])
    plain, compiled = (load_file(folder / "model.safetensors") for folder in (
        command(), command("--compile", name="compiled")))
    assert len(asked) == 4 and graphs and plain.keys() == compiled.keys()
    for name in plain:
        assert_close(compiled[name], plain[name])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"--compile needs a C\+\+ compiler"):
        command("--compile")
