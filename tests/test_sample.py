"""sample.py: a text depends on (seed, problem, sample) and on nothing else, no work is done for
nothing, and a killed run goes on. Random models; texts are checked by full forward passes."""
import contextlib
import copy
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import decode_kernels
import sample
from conftest import ROOT
from data import load_task, load_tokenizer
from model import LM, CacheReads, State
from sample import Batch, choose_tokens, generate, row_keys, uniforms

PROMPTS = [[7, 3], [1] * 11, [20, 21, 22, 23, 24], [5, 9, 9], [30, 2, 31, 2, 30, 2, 8]]
STOPS = [11, 12, 13, 14, 40]


# ---- random numbers
@pytest.mark.parametrize("owner, key, numbers", [
    ((0, 0, 0), 2558736989570252433, (1087546, 418759, 7517065)),
    ((1, 2, 3), 7702586659592502839, (1091238, 3668492, 8311888)),
    ((2 ** 40 + 5, 499, 255), -7340384562543519409, (2258496, 850942, 4753133))])
def test_random_numbers_are_those_of_runs_long_ago(owner, key, numbers):
    """Recorded: a run that was begun goes on with them. Red if the sign bit leaks into a shift."""
    keys = row_keys(owner[0], [owner[1:]] * 3)
    assert keys.tolist() == [key] * 3
    assert (uniforms(keys, torch.tensor([0, 1, 895])) * 2 ** 23).tolist() == list(numbers)


def test_a_random_number_is_splitmix64s():
    """Steele, Lea & Flood's published outputs for seed 1234567: a step of a stream is one."""
    outputs = 6457827717110365317, 3203168211198807973, 9817491932198370423
    found = uniforms(torch.tensor([1234567] * 3), torch.arange(3))
    assert found.tolist() == [(output >> 41) / 2 ** 23 for output in outputs]


def test_random_numbers_are_uniform_and_independent():
    """20 seeds x 20 problems x 20 samples x 25 steps: mean, variance and 100 bins within 4 standard
    deviations, and no correlation of neighbours along any of these. Red if the key is a sum: then
    problem 1, sample 0 is problem 0, sample 1."""
    owners = list(itertools.product(range(20), repeat=2))
    keys = torch.cat([row_keys(seed, owners) for seed in range(20)])
    assert len(set(keys.tolist())) == 8000
    u = uniforms(keys.repeat_interleave(25), torch.arange(25).repeat(8000)).double()
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 1 / 2) < 4 * (1 / 12 / u.numel()) ** 0.5
    assert abs(u.var() - 1 / 12) < 4 * (1 / 180 / u.numel()) ** 0.5
    chi2 = (torch.histc(u, 100, 0, 1) - 2000).square().sum() / 2000
    assert abs(chi2 - 99) < 4 * (2 * 99) ** 0.5
    for dim in range(4):
        u = (u - u.mean()).view(20, 20, 20, 25).movedim(dim, 0)
        assert abs((u[:-1] * u[1:]).mean() * 12) < 4 / u[1:].numel() ** 0.5
        u = u.movedim(0, dim)


# ---- choosing a token
GRID = (torch.arange(20_000) + 0.5) / 20_000  # evenly spaced random numbers


def frequencies(logits, temperature=1.0, **settings):
    """How often each token is chosen: its probability, up to the spacing of GRID."""
    tokens = choose_tokens(logits.expand(len(GRID), -1), GRID, temperature, **settings)
    return torch.bincount(tokens, minlength=len(logits)).double() / len(GRID)


def brute_force(logits, temperature, top_k, top_p):
    """The distribution, token by token, in float64."""
    p = (logits.double() / temperature).softmax(-1)
    ranked = sorted(range(len(p)), key=lambda i: -p[i])
    kept = [i for i in ranked if p[i] >= p[ranked[(top_k or len(p)) - 1]]]  # ties with the k-th
    total, nucleus, mass = p[kept].sum(), [], 0.0
    for i in kept:
        if mass < top_p:
            nucleus.append(i)
        mass += p[i] / total
    return torch.zeros_like(p).index_copy(0, torch.tensor(nucleus), p[nucleus] / p[nucleus].sum())


def transformers_p(logits, temperature, top_k, top_p):
    """The distribution by transformers' own warpers."""
    transformers, warped = pytest.importorskip("transformers"), logits[None] / temperature
    if top_k:
        warped = transformers.TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = transformers.TopPLogitsWarper(top_p)(None, warped)
    return warped[0].softmax(-1)


@pytest.mark.parametrize("yardstick", [brute_force, transformers_p])
def test_tokens_are_chosen_by_temperature_then_top_k_then_top_p(yardstick):
    """Up to two spacings, as a token has two ends; and no other token is ever chosen."""
    logits = 2 * torch.randn(60, generator=torch.Generator().manual_seed(0))
    for choice in itertools.product((0.3, 1.0, 2.0), (0, 1, 7), (1.0, 0.8, 1e-6)):
        choice = dict(zip(("temperature", "top_k", "top_p"), choice))
        found, wanted = frequencies(logits, **choice), yardstick(logits, **choice)
        assert (found - wanted).abs().max() <= 2 / len(GRID), choice
        assert not found[wanted == 0].any(), choice


def test_ties_zero_temperature_and_rows_of_nan():
    """Of two tokens of 0.5 each, the first alone has the mass of top_p = 0.5; top_k keeps ties.
    Rows are chosen for themselves, and one of nan gives a token of the vocabulary."""
    logits = torch.tensor([-torch.inf, 1.0, 1.0, -torch.inf])
    assert frequencies(logits, top_p=0.5).tolist() == [0, 1, 0, 0]
    for settings in dict(top_p=0.500001), dict(top_k=1), dict(top_k=2), dict(top_k=99):
        assert frequencies(logits, **settings).tolist() == [0, 0.5, 0.5, 0]
    rows, u = torch.stack([logits, 2 * logits.roll(1), logits * torch.nan]), torch.full((3,), 0.99)
    assert choose_tokens(rows, u, 0)[:2].tolist() == [1, 2]
    assert choose_tokens(rows, u, 1.0).tolist()[:2] == [2, 3]
    assert 0 <= choose_tokens(rows, u, 1.0)[2] < 4


@pytest.mark.parametrize("u", [0.0, 2.0 ** -23, 0.5, 1 - 2.0 ** -23])
def test_tokens_of_probability_zero_are_never_chosen(u):
    """The ends of the vocabulary are where an inverted distribution goes wrong."""
    logits = torch.randn(500, 300, generator=torch.Generator().manual_seed(0)) * 3
    hidden = torch.rand(500, 300, generator=torch.Generator().manual_seed(1)) < 0.5
    hidden[:, [0, -1]] = True
    tokens = choose_tokens(logits.masked_fill(hidden, -torch.inf), torch.full((500,), u), 1.0)
    assert not hidden[torch.arange(500), tokens].any()


# ---- texts
def texts(lm, prompts=PROMPTS, **settings):
    """{(problem, sample): (tokens, finish)} of generate, which yields none twice."""
    completions = list(generate(lm, prompts, **settings))
    found = {(c.problem, c.sample): (c.tokens, c.finish) for c in completions}
    assert len(found) == len(completions)
    return found


def literal_text(lm, prompt, stops, length, seed, problem, index, temperature):
    """One completion by full forward passes over one row, with its own random numbers."""
    tokens, keys = [], row_keys(seed, [(problem, index)] * length)
    for u in uniforms(keys, torch.arange(length)).double():
        logits = lm(torch.tensor([prompt + tokens]))[0, -1].double()
        cdf = (logits / (temperature or 1)).softmax(-1).cumsum(-1)
        token = (cdf <= u * cdf[-1]).sum().item() if temperature else logits.argmax().item()
        if token in stops:
            return tokens, "stop"
        tokens.append(token)
    return tokens, "length"


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_generate_equals_full_forward_passes(make_lm, pattern, temperature):
    """Ragged prompts, rows that stop and are replaced. Red if a state is not reset, leftovers leak,
    the stop id is included, or a step uses another's random number."""
    lm = make_lm(pattern)
    settings = dict(num_samples=3 if temperature else 1, max_new_tokens=14, batch_size=3,
                    temperature=temperature, seed=5)
    stops = STOPS
    if not temperature:  # let some greedy texts stop, at tokens that they come to, one at once
        stops = [tokens[at] for at, (tokens, _) in zip((3, 0), texts(lm, **settings).values())]
    found = texts(lm, stop_ids=stops, **settings)
    assert found == {(p, s): literal_text(lm, prompt, stops, 14, 5, p, s, temperature)
                     for s in range(settings["num_samples"]) for p, prompt in enumerate(PROMPTS)}
    assert any(finish == "stop" for _, finish in found.values())


@pytest.fixture(scope="module")
def hybrid(make_lm):
    return make_lm(["mamba2", "attention", "mamba"])


MANY = dict(num_samples=12, max_new_tokens=16, temperature=0.9, stop_ids=STOPS, seed=1)


@pytest.fixture(scope="module")
def many(hybrid):
    """Reference: 60 completions, one at a time, that end at all kinds of steps."""
    found = texts(hybrid, batch_size=1, **MANY)
    assert len({len(tokens) for tokens, _ in found.values()}) > 8
    assert {finish for _, finish in found.values()} == {"stop", "length"}
    return found


@pytest.mark.parametrize("batch_size", [3, 16, 64])
def test_texts_do_not_depend_on_the_batch_nor_on_what_is_skipped(hybrid, many, batch_size):
    """A resumed run does what is missing, and the same; fewer samples are a part of more, and of a
    billion the first come at once."""
    settings = MANY | dict(batch_size=batch_size)
    assert texts(hybrid, **settings) == many
    skip = {pair for i, pair in enumerate(sorted(many)) if i % 3 or pair[0] == 2}
    rest = {pair: text for pair, text in many.items() if pair not in skip}
    assert texts(hybrid, **settings, skip=skip) == rest
    assert texts(hybrid, **settings, skip=list(many)) == {}
    few = texts(hybrid, **settings | dict(num_samples=4))
    assert few == {pair: text for pair, text in many.items() if pair[1] < 4}
    endless = generate(hybrid, PROMPTS, **settings | dict(num_samples=10 ** 9))
    for c in itertools.islice(endless, 30):
        assert c.sample >= 12 or many[c.problem, c.sample] == (c.tokens, c.finish)


def test_texts_do_not_depend_on_the_device(hybrid, many):
    """Up to ties, in float32, with recorded steps."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    assert texts(copy.deepcopy(hybrid).cuda(), batch_size=16, **MANY) == many


def test_samples_differ_and_the_seed_decides(hybrid, many):
    """Red if samples share their random numbers: coverage would not rise with k."""
    for problem in range(len(PROMPTS)):
        assert len({tuple(many[problem, s][0]) for s in range(12)}) > 8
    other = texts(hybrid, batch_size=16, **MANY | dict(seed=2))
    assert sum(other[pair] == many[pair] for pair in many) < 10


def test_completions_come_sample_major_as_they_finish(hybrid):
    """So a clock can say when all problems had k samples. Seconds never run backwards."""
    done = list(generate(hybrid, PROMPTS, batch_size=1, **MANY | dict(num_samples=3)))
    assert [(c.problem, c.sample) for c in done] == [(p, s) for s in range(3) for p in range(5)]
    for completions in done, list(generate(hybrid, PROMPTS, batch_size=16, **MANY)):
        seconds = [c.seconds for c in completions]
        assert seconds == sorted(seconds) and seconds[0] > 0


@pytest.mark.parametrize("steps, batch_size", [(2, 3), (7, 16), (30, 16)])
def test_texts_do_not_depend_on_how_often_the_host_looks(hybrid, many, monkeypatch, batch_size,
                                                         steps):
    """Rows that are done run along until it does: red if they write into their text, out of their
    cache, or into what the next row finds."""
    monkeypatch.setitem(sample.VISIT_EVERY, "cpu", steps)
    assert texts(hybrid, batch_size=batch_size, **MANY) == many


def test_texts_do_not_depend_on_sorting(hybrid, many, make_lm, monkeypatch):
    """At every visit, in groups of two rows; a model without attention is never sorted."""
    sorts, select = [], State.select
    monkeypatch.setattr(State, "select", lambda state, rows: (
        sorts.append(len(rows) == len(state.lengths)), select(state, rows)))
    for owner, name, value in ((sample, "SORT_EVERY", 1), (sample, "SORT_ABOVE", 1.0),
                               (CacheReads, "ROWS", 2)):
        monkeypatch.setattr(owner, name, value)
    assert texts(hybrid, batch_size=16, **MANY) == many and any(sorts)
    sorts.clear()
    assert texts(make_lm(["mamba2", "mamba"]), batch_size=16, **MANY) and not any(sorts)


class NoCopies(TorchDispatchMode):
    """Within it, no operation on tensors may take one of a device other than "meta"."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        devices = {tensor.device.type for tensor in tensors}
        assert devices <= {"meta"}, f"{operation} of tensors on {devices}"
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize("choice", [dict(temperature=0), dict(temperature=0.8, top_k=5, top_p=0.9)],
                         ids=str)
def test_a_step_moves_nothing_to_or_from_the_host(make_lm, pattern, monkeypatch, choice):
    """A CUDA graph records a step without running it. So do tensors on "meta", without data: an
    .item(), a nonzero() or an `if` on a tensor raises there. The first step may copy, as RoPE's
    angles are; no other. On a GPU, attention is one kernel."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(decode_kernels, "INTERPRETED", None)  # a kernel's form in PyTorch
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    lm = make_lm(pattern).to("meta")
    batch = Batch(lm, 3, 9, 4, STOPS, lambda logits, u: choose_tokens(logits, u, **choice))
    batch.step()
    with NoCopies():
        batch.step()


def addresses(batch):
    """Where the tensors of a batch lie, those of its state among them."""
    tensors = tree_leaves([vars(batch), batch.state.lengths, batch.state.layers])
    return [tensor.data_ptr() for tensor in tensors if isinstance(tensor, torch.Tensor)]


class Graph:
    """A stand-in for a CUDA graph: what is recorded does not run, and replays on the addresses of
    its recording."""
    recording, sizes = None, []

    def replay(self):
        assert addresses(self.batch) == self.before
        self.step(self.batch)
        assert addresses(self.batch) == self.before


@contextlib.contextmanager
def recording(graph):
    Graph.recording = graph
    yield
    Graph.recording = None


class Device(str):
    """The CPU, which says that it is a GPU."""
    type = "cuda"


@pytest.mark.parametrize("batch_size", [1, 16])
def test_recorded_steps_find_their_tensors_where_they_were(hybrid, many, monkeypatch, batch_size):
    """Red if a step or a start puts a new tensor in an old one's place, if the batch shrinks and
    the old graph is used on, or if the recorded step is taken for one that ran."""
    step, Graph.sizes = Batch.step, []

    def record_or_run(batch):
        if Graph.recording is None:
            return step(batch)
        Graph.sizes.append(len(batch.done))
        vars(Graph.recording).update(batch=batch, before=addresses(batch), step=step)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(Batch, "step", record_or_run)
    monkeypatch.setattr(LM, "device", Device("cpu"))
    assert texts(hybrid, batch_size=batch_size, **MANY) == many
    assert Graph.sizes == sorted(set(Graph.sizes), reverse=True)  # once for each size
    assert len(Graph.sizes) == 1 if batch_size == 1 else 1 < len(Graph.sizes) <= 9


# ---- no work for nothing
@pytest.fixture
def watch(hybrid):
    """The rows of every decoding step, and the lengths of the prompts of every prefill."""
    seen = SimpleNamespace(rows=[], prefills=[])
    hook = hybrid.register_forward_pre_hook(lambda module, inputs: (
        seen.prefills.append(inputs[2].tolist()) if len(inputs) == 3
        else seen.rows.append(len(inputs[0]))))
    yield seen
    hook.remove()


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_a_finished_rows_place_is_taken_at_once(hybrid, many, watch, batch_size):
    """The batch is full while anyone waits, as in an ideal schedule, and shrinks when nobody does:
    at most a quarter of it is empty. Every prompt runs once, the shortest first."""
    waiting = [len(many[p, s][0]) + (many[p, s][1] == "stop") for s in range(12) for p in range(5)]
    busy, ideal = [], []
    while waiting or busy:
        new = batch_size - len(busy)
        busy, waiting = busy + waiting[:new], waiting[new:]
        ideal.append(len(busy))
        busy = [left - 1 for left in busy if left > 1]
    texts(hybrid, batch_size=batch_size, **MANY)
    assert len(watch.rows) == len(ideal)
    assert all(best <= rows <= max(1, best / 0.75) for rows, best in zip(watch.rows, ideal))
    assert sorted(sum(watch.prefills, [])) == sorted(map(len, PROMPTS))
    assert batch_size == 1 or watch.prefills == [sorted(map(len, PROMPTS))]  # one pass


def test_prompts_are_packed_up_to_a_number_of_tokens(hybrid, many, watch, monkeypatch):
    """Padding included; one that is longer runs alone, and one with nothing left to do not."""
    monkeypatch.setattr(sample.Prompts, "TOKENS", 8)
    assert texts(hybrid, batch_size=16, **MANY) == many
    assert watch.prefills == [[2, 3], [5], [7], [11]]
    watch.prefills.clear()
    texts(hybrid, batch_size=16, **MANY, skip=[pair for pair in many if pair[0] != 3])
    assert watch.prefills == [[3]]


@pytest.mark.parametrize("settings, message", [
    (dict(num_samples=0), "num_samples = 0"), (dict(batch_size=0), "batch_size = 0"),
    (dict(max_new_tokens=0), "max_new_tokens = 0"), (dict(temperature=-0.5), "temperature = -0.5"),
    (dict(temperature=float("nan")), "temperature = nan"), (dict(top_k=-1), "top_k = -1"),
    (dict(top_p=0.0), "top_p = 0"), (dict(top_p=1.5), "top_p = 1.5"),
    (dict(prompts=[[1], [2], []]), "prompt 2 is empty")], ids=str)
def test_what_cannot_be_is_refused_with_its_value(hybrid, settings, message):
    with pytest.raises(ValueError, match=message):
        texts(hybrid, **settings)


# ---- samples.jsonl
FIELDS = ["problem", "sample", "question", "gold", "completion", "num_tokens", "finish", "seconds"]
OPTIONS = ["--limit", "4", "--max-new-tokens", "12", "--batch-size", "6", "--device", "cpu"]
FIVE = ["--num-samples", "5"]


@pytest.fixture(scope="module")
def models(make_lm, tmp_path_factory):
    """Checkpoints with the built-in task's tokenizer, which end some texts early: pure, hybrid."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), load_tokenizer("arithmetic")
    for seed, name in enumerate(("pure", "hybrid")):
        mixers = ["mamba2", "attention" if name == "hybrid" else "mamba2"]
        lm = make_lm(mixers, seed, vocab_size=tokenizer.vocab_size, eos_ids=tokenizer.eos_ids)
        lm.model.embed_tokens.weight[tokenizer.eos_ids] *= 5
        lm.save_pretrained(folder / name)
        tokenizer.save(str(folder / name))
    return folder


@pytest.fixture(scope="module")
def arguments(models, task_file):
    """arguments(out, *options): the command line that samples a model."""
    def make(out, *options, model="pure"):
        return ["--model", str(models / model), "--out", str(out), "--task", task_file, *OPTIONS,
                *options]
    return make


@pytest.fixture(scope="module")
def sampled(arguments, tmp_path_factory):
    """An uninterrupted run, its folder. Read only: tests work on copies."""
    out = tmp_path_factory.mktemp("sampled")
    sample.main(arguments(out, *FIVE))
    return out / "pure"


@pytest.fixture
def begun(sampled, tmp_path):
    """A copy of that run, its folder."""
    return shutil.copytree(sampled, tmp_path / "out" / "pure")


def records(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def untimed(folder):
    """A run's records in order, without their times."""
    rows = sorted(records(folder), key=lambda row: (row["sample"], row["problem"]))
    return [row | dict(seconds=0) for row in rows]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def settings_of(folder):
    return json.loads((folder / "samples.json").read_text())["settings"]


def test_a_run_is_recorded_as_documented(sampled, models, task_file):
    rows, problems = records(sampled), load_task(task_file, "test")
    assert [(row["problem"], row["sample"]) for row in untimed(sampled)] == [
        (p, s) for s in range(5) for p in range(4)]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0
    for row in rows:
        problem = problems[row["problem"]]
        assert list(row) == FIELDS and "<|end|>" not in row["completion"]
        assert (row["question"], row["gold"]) == (problem.question, problem.answer)
        assert row["num_tokens"] == 12 if row["finish"] == "length" else row["num_tokens"] < 12
    assert {row["finish"] for row in rows} == {"stop", "length"}
    summary = json.loads((sampled / "samples.json").read_text())
    assert summary["params"] == LM.from_pretrained(str(models / "pure")).num_parameters()
    assert summary.keys() == {"settings", "params", "device", "torch"}
    assert summary["settings"].keys() == {
        "prompt", "seed", "batch_size", "top_p", "max_new_tokens", "temperature", "top_k",
        "problems", "questions", "weights", "processes", "device", "dtype"}


def test_a_run_killed_and_torn_goes_on_and_ends_the_same(sampled, begun, arguments):
    """Whole records stay as they are, a torn last line is dropped, the clock goes on; a third run
    finds nothing to do."""
    path, whole = begun / "samples.jsonl", (begun / "samples.jsonl").read_bytes()
    for keep, torn in (7, True), (7, False), (0, True), (19, True):
        lines = whole.splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:keep]) + lines[keep][:-9] * torn)
        sample.main(arguments(begun.parent, *FIVE))
        assert path.read_bytes().startswith(b"".join(lines[:keep]))
        assert untimed(begun) == untimed(sampled)
        seconds = [row["seconds"] for row in records(begun)]
        assert seconds == sorted(seconds) and (keep == 0 or seconds[keep] > seconds[keep - 1])
    before = contents(begun)
    sample.main(arguments(begun.parent, *FIVE))
    assert contents(begun) == before


def test_a_run_ended_by_kill_9_goes_on_and_ends_the_same(arguments, tmp_path):
    """A process that writes, killed once it has written; in the meantime no other may write."""
    line = arguments(tmp_path / "out", "--num-samples", "40")
    path, deadline = tmp_path / "out" / "pure" / "samples.jsonl", time.monotonic() + 100
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", *line],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        if process.poll() is None:  # it has not come to its end
            with pytest.raises(ValueError, match="another process is working in .*pure"):
                sample.main(line)
    finally:
        process.kill()
        process.wait(timeout=60)
    assert 0 < len(path.read_bytes())
    sample.main(line)
    sample.main(arguments(tmp_path / "whole", "--num-samples", "40"))
    assert untimed(tmp_path / "out" / "pure") == untimed(tmp_path / "whole" / "pure")


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock of sample.py takes a second: one at the start, one a step."""
    ticks = itertools.count()
    monkeypatch.setattr(sample, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


def test_seconds_and_samples_end_a_run_and_more_of_them_go_on(sampled, arguments, tmp_path, clock):
    """Whichever limit comes first. Neither is of a run's identity; those spent before count."""
    folder = tmp_path / "pure"
    for seconds, samples in (13, FIVE), (13, []), (30, []), (99, FIVE):
        sample.main(arguments(tmp_path, "--seconds", str(seconds), *samples))
        spent = [row["seconds"] for row in records(folder)]
        assert spent == sorted(spent)
        assert seconds / 2 < spent[-1] <= seconds or seconds == 99
    assert spent[-1] < 90 and untimed(folder)[:20] == untimed(sampled)


def test_a_run_too_short_for_a_sample_says_so_and_refuses_none(arguments, tmp_path, capsys, clock):
    """Without a record there is nothing to mix: other settings take its place. They go on with
    more samples, also where the batch is larger than what there is to do."""
    sample.main(arguments(tmp_path, "--seconds", "0.5"))
    assert "no sample" in capsys.readouterr().out and records(tmp_path / "pure") == []
    for count in 1, 2:
        sample.main(arguments(tmp_path, "--num-samples", str(count), "--seed", "7",
                              "--batch-size", "256"))
        assert len(records(tmp_path / "pure")) == 4 * count
    assert settings_of(tmp_path / "pure")["seed"] == 7


@pytest.mark.parametrize("options, name", [
    (["--temperature", "0.33"], "temperature = "), (["--seed", "9"], "seed = "),
    (["--max-new-tokens", "13"], "max_new_tokens = "), (["--limit", "5"], "problems = "),
    (["--batch-size", "5"], "batch_size = "), (["--top-k", "3"], "top_k = "),
    (["--top-p", "0.9"], "top_p = "), (["--dtype", "bfloat16"], "dtype = "),
    (["--task", "arithmetic"], "problem 0, sample "), (["--limit", "3"], "problem 3, sample "),
    (["--subset-seed", "1"], "problem 0, sample "), (["--model", "WEIGHTS"], "weights = ")], ids=str)
def test_another_run_is_refused_by_name_and_nothing_is_touched(begun, arguments, models, tmp_path,
                                                               options, name):
    """Not even a torn last line is cut: mixed samples could not be told apart afterwards."""
    shutil.copytree(models / "hybrid", tmp_path / "pure")  # of the same name, trained anew
    options = [str(tmp_path / "pure") if option == "WEIGHTS" else option for option in options]
    with open(begun / "samples.jsonl", "ab") as f:
        f.write(b'{"problem": 1, "sam')
    before = contents(begun)
    with pytest.raises(ValueError, match=f"{name}.*choose another"):
        sample.main(arguments(begun.parent, *FIVE, *options))
    assert contents(begun) == before


@pytest.mark.parametrize("change, message", [
    (lambda lines: lines + lines[3:4], "problem [0-3], sample 0 is there twice"),
    (lambda lines: [lines[0].replace(b'"problem": 0', b'"problem": 99'), *lines[1:]], "problem 99"),
    (lambda lines: [*lines[:3], b'{"problem": 0, "sa\n', *lines[4:]], "samples.jsonl, line 4"),
    (lambda lines: [*lines[:3], b'{"problem": 0}\n', *lines[4:]], "line 4: sample is missing"),
    (None, "samples.json is missing.*delete")], ids=["twice", "foreign", "torn", "fields", "json"])
def test_records_that_cannot_be_of_this_run_are_named(begun, arguments, change, message):
    if change:
        lines = (begun / "samples.jsonl").read_bytes().splitlines(keepends=True)
        (begun / "samples.jsonl").write_bytes(b"".join(change(lines)))
    else:
        (begun / "samples.json").unlink()
    before = contents(begun)
    with pytest.raises(ValueError, match=message):
        sample.main(arguments(begun.parent, *FIVE))
    assert contents(begun) == before


def test_two_processes_share_the_problems_and_write_what_one_writes(sampled, arguments, tmp_path):
    """One file, a record for each completion, the same texts. Red if a process takes another's
    problems, or a text depends on who drew it."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         ROOT / "sample.py", *arguments(tmp_path, *FIVE)], capture_output=True, text=True,
        timeout=120)
    assert done.returncode == 0, done.stderr
    assert untimed(tmp_path / "pure") == untimed(sampled)
    assert settings_of(tmp_path / "pure")["processes"] == 2


def test_more_processes_than_problems_are_refused(arguments, tmp_path, monkeypatch):
    """One without a problem would search a billion pairs for one of its own."""
    monkeypatch.setattr(sample.parallel, "world", lambda: 5)
    with pytest.raises(ValueError, match="4 problems: too few for 5 processes"):
        sample.main(arguments(tmp_path, "--seconds", "1"))


def test_a_model_is_named_by_its_folder(models, sampled, arguments, tmp_path, monkeypatch):
    """--model . from inside it, too; without --model all under --out; no two of one name."""
    line = arguments(tmp_path / "one", *FIVE)[2:]
    monkeypatch.chdir(models / "pure")
    sample.main(["--model", ".", *line])
    assert untimed(tmp_path / "one" / "pure") == untimed(sampled)
    shutil.copytree(models, tmp_path / "all")
    line[line.index("--out") + 1] = str(tmp_path / "all")
    sample.main(line)
    assert untimed(tmp_path / "all" / "pure") == untimed(sampled)
    assert len(records(tmp_path / "all" / "hybrid")) == 20
    shutil.copytree(models / "hybrid", tmp_path / "pure")
    with pytest.raises(ValueError, match="pure/samples.json is of a run.*weights"):
        sample.main(["--model", str(models / "pure"), str(tmp_path / "pure"), *line])


def test_every_option_reaches_generate_and_the_prompt_is_put_around_the_question(
        arguments, tmp_path, monkeypatch, task_file):
    """Red if an option is parsed and then forgotten. Records keep the bare question; --subset-seed
    takes the problems of its choose_subset, and the model is prepared."""
    (tmp_path / "prompt.txt").write_text("Q {question} A")
    seen = {}
    monkeypatch.setattr(sample, "generate", lambda lm, prompts, **settings: seen.update(
        lm=lm, prompts=prompts, **settings) or iter(()))
    sample.main(arguments(
        tmp_path, "--num-samples", "3", "--max-new-tokens", "9", "--temperature", "0.4", "--top-k",
        "7", "--top-p", "0.6", "--batch-size", "2", "--seed", "8", "--subset-seed", "3",
        "--seconds", "50", "--prompt-file", str(tmp_path / "prompt.txt")))
    tokenizer, problems = load_tokenizer("arithmetic"), load_task(task_file, "test")
    chosen = sample.choose_subset(problems, 4, 3)
    assert chosen != problems[:4]
    assert any(isinstance(module, decode_kernels.Products) for module in seen.pop("lm").modules())
    assert seen.pop("prompts") == [tokenizer.chat(f"Q {p.question} A") for p in chosen]
    assert not any(pair in seen["skip"] for pair in itertools.product(range(4), range(3)))
    assert seen == dict(num_samples=3, max_new_tokens=9, temperature=0.4, top_k=7, top_p=0.6,
                        batch_size=2, seed=8, stop_ids=tokenizer.eos_ids, seconds=50,
                        skip=set())
