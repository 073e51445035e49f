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
from common import json_line
from conftest import ROOT
from data import choose_subset, load_task, load_tokenizer
from model import LM, CacheReads, State, cast
from sample import Batch, choose_tokens, generate, row_keys, uniforms
from test_kernels import DEVICE, TRITON

PROMPTS = [[7, 3], [1] * 11, [20, 21, 22, 23, 24], [5, 9, 9], [30, 2, 31, 2, 30, 2, 8]]
STOPS = [11, 12, 13, 14, 40]


# ---- random numbers
def test_random_numbers_are_those_of_runs_long_ago_and_splitmix64s():
    """Recorded for (seed, problem, sample): a run that was begun goes on with them. Red if the sign
    bit leaks into a shift. Then Steele, Lea & Flood's published outputs for seed 1234567."""
    for owner, key, numbers in (
            ((0, 0, 0), 2558736989570252433, [1087546, 418759, 7517065]),
            ((1, 2, 3), 7702586659592502839, [1091238, 3668492, 8311888]),
            ((2 ** 40 + 5, 499, 255), -7340384562543519409, [2258496, 850942, 4753133])):
        keys = row_keys(owner[0], [owner[1:]] * 3)
        assert keys.tolist() == [key] * 3
        assert (uniforms(keys, torch.tensor([0, 1, 895])) * 2 ** 23).tolist() == numbers
    outputs = 6457827717110365317, 3203168211198807973, 9817491932198370423
    found = uniforms(torch.tensor([1234567] * 3), torch.arange(3))
    assert found.tolist() == [(output >> 41) / 2 ** 23 for output in outputs]


# ---- choosing a token
GRID = (torch.arange(20_000) + 0.5) / 20_000  # evenly spaced random numbers


def frequencies(logits, temperature=1.0, **settings):
    """How often each token is chosen: its probability, up to the spacing of GRID."""
    tokens = choose_tokens(logits.expand(len(GRID), -1), GRID, temperature, **settings)
    return torch.bincount(tokens, minlength=len(logits)).double() / len(GRID)


def distribution(logits, temperature, top_k, top_p):
    """The definition, in float64."""
    p = (logits.double() / temperature).softmax(-1)
    ranked = sorted(range(len(p)), key=lambda i: -p[i])
    kept = [i for i in ranked if p[i] >= p[ranked[(top_k or len(p)) - 1]]]  # ties with the k-th
    likelier = (p[kept].cumsum(0) - p[kept]) / p[kept].sum()
    nucleus = torch.tensor(kept)[likelier < top_p]
    return torch.zeros_like(p).index_copy(0, nucleus, p[nucleus] / p[nucleus].sum())


def test_tokens_are_chosen_by_temperature_then_top_k_then_top_p():
    """Up to two spacings, as a token has two ends; and no other token is ever chosen."""
    logits = 2 * torch.randn(60, generator=torch.Generator().manual_seed(0))
    for t, k, p in itertools.product((0.3, 1.0, 2.0), (0, 1, 7), (1.0, 0.8, 1e-6)):
        found, wanted = frequencies(logits, t, top_k=k, top_p=p), distribution(logits, t, k, p)
        assert (found - wanted).abs().max() <= 2 / len(GRID), (t, k, p)
        assert not found[wanted == 0].any(), (t, k, p)


def test_ties_zero_temperature_and_rows_of_nan():
    """Of two tokens of 0.5 each, the first alone has the mass of top_p = 0.5; top_k keeps ties.
    Rows are chosen for themselves; one with a nan or an infinity gives the token V, which is none.
    What float32 takes for 0 is greedy."""
    logits = torch.tensor([-torch.inf, 1.0, 1.0, -torch.inf])
    assert frequencies(logits, top_p=0.5).tolist() == [0, 1, 0, 0]
    for settings in dict(top_p=0.500001), dict(top_k=1), dict(top_k=2), dict(top_k=99):
        assert frequencies(logits, **settings).tolist() == [0, 0.5, 0.5, 0]
    rows = torch.tensor([[0, 1, 1, 0], [0, 0, 2, 2], [0, torch.nan, 0, 0], [0, 0, torch.inf, 0]])
    u = torch.full((4,), 0.99)
    for settings in (0,), (1e-300,), (1.0, 0, 1e-300), (1e-3, 0, 1e-300):
        assert choose_tokens(rows, u, *settings).tolist() == [1, 2, 4, 4]
    for settings in (1.0,), (1.0, 2), (1.0, 0, 0.9), (1e-3, 3, 0.9):
        assert choose_tokens(rows, u, *settings)[1:].tolist() == [3, 4, 4]


@pytest.mark.parametrize("few", [4, 64, 3000])
def test_top_p_sorts_the_vocabulary_only_where_a_few_tokens_do_not_suffice(few):
    """A peaked row, a flat one, ties at the edge. Whole numbers add up exactly, in any order."""
    exponents = torch.randint(0, 12, (40, 3000), generator=torch.Generator().manual_seed(0))
    weights = torch.where(exponents > torch.arange(40)[:, None] // 4, 1, 2 ** exponents)
    for share in 0.01, 0.5, 0.9, 0.999, 1e-30:
        found = sample.nucleus(weights.float(), (mass := share * 2.0 ** 17), few)
        for row, kept in zip(weights.tolist(), found.tolist()):
            ranked, before = sorted(range(3000), key=lambda i: -row[i]), 0
            for i in ranked:
                assert kept[i] == row[i] * (before < mass), (share, i)
                before += row[i]


def test_top_p_and_top_k_keep_what_transformers_keeps():
    """As many tokens, of the same probabilities: of equal ones it takes others."""
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = 4 * torch.randn(12, 300, generator=torch.Generator().manual_seed(0))
    logits[4:] = (2 * logits[4:]).round() / 2  # ties
    for warper, settings in ((process.TopPLogitsWarper(0.95), dict(top_p=0.95)),
                             (process.TopPLogitsWarper(0.3), dict(top_p=0.3)),
                             (process.TopKLogitsWarper(20), dict(top_k=20))):
        wanted = warper(None, logits).softmax(-1).sort().values
        found = torch.stack([frequencies(row, **settings) for row in logits]).sort().values
        assert (found - wanted).abs().max() <= 2 / len(GRID)


@TRITON.marks[0]
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 1e-30])
def test_on_a_gpu_one_kernel_chooses_the_tokens(dtype, top_p):
    """Of two blocks of the vocabulary, with ties and in their order: u lies between what comes
    before the token and what ends with it."""
    logits = (3 * torch.randn(8, 5000, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[4:] = (2 * logits[4:]).round() / 2
    logits[0, 7], logits[4, 9], logits[1, ::2] = torch.nan, torch.inf, -torch.inf
    logits[7], logits[7, -1] = 0, 5  # of 4,999 equal ones 4,375 are kept, more than a block has
    u = torch.tensor([0.5, 0.0, 0.9, 1 - 2 ** -23, 0.5, 0.0, 0.9, 0.8])
    tokens = decode_kernels.choose_token(logits.to(DEVICE), u.to(DEVICE), 0.7, top_p).tolist()
    assert tokens[0] == tokens[4] == 5000 and (top_p < 0.1 or max(tokens[:3]) > 4096)
    for row in 1, 2, 3, 5, 6, 7:
        p = distribution(logits[row].float(), 0.7, 0, top_p)
        before = p[:tokens[row]].sum()
        assert p[tokens[row]] and before - 1e-5 <= u[row] <= before + p[tokens[row]] + 1e-5


def test_tokens_of_probability_zero_are_never_chosen():
    """The ends of the vocabulary are where an inverted distribution goes wrong."""
    logits = 3 * torch.randn(500, 300, generator=torch.Generator().manual_seed(0))
    hidden = logits < 0
    hidden[:, [0, -1]] = True
    for u in 0.0, 2.0 ** -23, 0.5, 1 - 2.0 ** -23:
        tokens = choose_tokens(logits.masked_fill(hidden, -torch.inf), torch.full((500,), u), 1.0)
        assert not hidden[torch.arange(500), tokens].any()


# ---- texts
def texts(lm, prompts=PROMPTS, **settings):
    """{(problem, sample): (tokens, finish)} of generate, which yields none twice."""
    completions = list(generate(lm, prompts, **settings))
    found = {(c.problem, c.sample): (c.tokens, c.finish) for c in completions}
    assert len(found) == len(completions)
    return found


def literal_text(lm, prompt, stops, length, seed, owner, temperature):
    """One completion by full forward passes over one row, with its own random numbers."""
    tokens = []
    for u in uniforms(row_keys(seed, [owner] * length), torch.arange(length)).double():
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
    lm, stops = make_lm(pattern), STOPS
    settings = dict(num_samples=3 if temperature else 1, max_new_tokens=14, batch_size=3,
                    temperature=temperature, seed=5)
    if not temperature:  # let some greedy texts stop, at tokens that they come to, one at once
        stops = [tokens[at] for at, (tokens, _) in zip((3, 0), texts(lm, **settings).values())]
    found = texts(lm, stop_ids=stops, **settings)
    assert found == {(p, s): literal_text(lm, PROMPTS[p], stops, 14, 5, (p, s), temperature)
                     for s in range(settings["num_samples"]) for p in range(5)}
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


@pytest.mark.parametrize("batch_size, steps", [(3, 1), (64, 1), (3, 2), (16, 7), (16, 30)])
def test_texts_depend_neither_on_the_batch_nor_on_what_is_skipped_nor_on_visits_of_the_host(
        hybrid, many, monkeypatch, batch_size, steps):
    """A resumed run does what is missing, and the same; fewer samples are a part of more, and of a
    billion the first come at once. Rows that are done run along until the host looks: red if they
    write into their text, out of their cache, or into what the next row finds."""
    monkeypatch.setitem(sample.VISIT_EVERY, "cpu", steps)
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


def test_samples_differ_and_come_sample_major_as_they_finish(hybrid, many):
    """So coverage can rise with k, and a clock say when all problems had k samples. Seconds never
    run backwards; another seed gives other texts."""
    for problem in range(len(PROMPTS)):
        assert len({tuple(many[problem, s][0]) for s in range(12)}) > 8
    other = texts(hybrid, batch_size=16, **MANY | dict(seed=2))
    assert sum(other[pair] == many[pair] for pair in many) < 10
    for size, samples in (1, 3), (16, 12):
        done = list(generate(hybrid, PROMPTS, batch_size=size, **MANY | dict(num_samples=samples)))
        assert 0 < done[0].seconds and done == sorted(done, key=lambda c: c.seconds)
        pairs = [(c.sample, c.problem) for c in done]
        assert size > 1 or pairs == sorted(pairs)


def test_texts_depend_neither_on_the_device_nor_on_sorting(hybrid, many, make_lm, monkeypatch):
    """Up to ties, in float32, with recorded steps. On a CPU sorted at every visit, in groups of two
    rows; a model without attention never."""
    if torch.cuda.is_available():
        assert texts(copy.deepcopy(hybrid).cuda(), batch_size=16, **MANY) == many
    sorts, select = [], State.select
    monkeypatch.setattr(State, "select", lambda state, rows: (
        sorts.append(len(rows) == len(state.lengths)), select(state, rows)))
    monkeypatch.setattr(sample, "SORT_EVERY", 1)
    monkeypatch.setattr(sample, "SORT_ABOVE", 1.0)
    monkeypatch.setattr(CacheReads, "ROWS", 2)
    assert texts(make_lm(["mamba2", "mamba"]), batch_size=16, **MANY) and not any(sorts)
    assert texts(hybrid, batch_size=16, **MANY) == many and any(sorts)


def test_states_have_the_dtype_that_is_asked_for(hybrid, many, monkeypatch):
    """In the batch and after prompts; a number of two bytes changes a text now and then only."""
    made, init_state = [], LM.init_state
    monkeypatch.setattr(LM, "init_state", lambda *sizes: (
        made.append(init_state(*sizes)), made[-1])[1])
    monkeypatch.setattr(hybrid, "state_dtype", torch.bfloat16)
    found = texts(hybrid, batch_size=16, **MANY)
    for state in made:
        assert [layer["h"].dtype for layer in state.layers if "h" in layer] == [torch.bfloat16] * 2
        assert {state.layers[1]["keys"].dtype, state.layers[0]["past"].dtype} == {torch.float32}
    assert len(made) == 2 and 30 < sum(found[pair] == many[pair] for pair in many) < 60


class NoCopies(TorchDispatchMode):
    """Within it, no operation on tensors may take one of a device other than "meta"."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta", operation
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize("choice", [(0,), (0.8, 5, 0.9)])
def test_a_step_moves_nothing_to_or_from_the_host(make_lm, pattern, monkeypatch, choice):
    """A CUDA graph records a step without running it. So do tensors on "meta", without data: an
    .item(), a nonzero() or an `if` on a tensor raises there. The first step may copy, as RoPE's
    angles are; no other. On a GPU, attention is one kernel."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(decode_kernels, "INTERPRETED", None)  # a kernel's form in PyTorch
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    batch = Batch(make_lm(pattern).to("meta"), 3, 9, 4, STOPS,
                  lambda logits, u: choose_tokens(logits, u, *choice))
    batch.step()
    with NoCopies():
        batch.step()


def addresses(batch):
    """Where the tensors of a batch lie that a step uses, those of its state among them."""
    mine = vars(batch) | dict(passes=None)
    tensors = tree_leaves([mine, batch.state.lengths, batch.state.layers])
    return [tensor.data_ptr() for tensor in tensors if isinstance(tensor, torch.Tensor)]


@pytest.mark.parametrize("batch_size", [1, 16])
def test_recorded_steps_find_their_tensors_where_they_were(hybrid, many, monkeypatch, batch_size):
    """A stand-in for CUDA graphs: what is recorded does not run, and replays on the addresses of
    its recording. Red if a step or a start puts a new tensor in an old one's place, if the batch
    shrinks and the old graph is used on, or if the recorded step is taken for one that ran."""
    step, sizes = Batch.step, []

    class Graph:
        def replay(self):
            assert addresses(self.batch) == self.before
            step(self.batch)
            assert addresses(self.batch) == self.before

    @contextlib.contextmanager
    def record(graph):
        with monkeypatch.context() as patch:
            patch.setattr(Batch, "step", lambda batch: vars(graph).update(
                batch=batch, before=addresses(batch)))
            yield
        sizes.append(len(graph.batch.done))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    # A CPU which says that it is a GPU.
    monkeypatch.setattr(LM, "device", type("Device", (str,), dict(type="cuda"))("cpu"))
    assert texts(hybrid, batch_size=batch_size, **MANY) == many
    assert sizes == sorted(set(sizes), reverse=True)  # once for each size
    assert len(sizes) == 1 if batch_size == 1 else 1 < len(sizes) <= 9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_on_a_gpu_recorded_steps_give_the_same_texts(make_lm, pattern, monkeypatch, dtype, top_p):
    """Bit for bit, as long as the batch has as many rows, on which half precision depends."""
    monkeypatch.setitem(sample.VISIT_EVERY, "cuda", 1)
    lm, settings = cast(make_lm(pattern), "cuda", dtype), dict(batch_size=16, top_p=top_p, **MANY)
    recorded = texts(lm, **settings)
    monkeypatch.setattr(sample, "advance", Batch.step)
    assert texts(lm, **settings) == recorded


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
    at most a quarter of it is empty. Every prompt runs once, the longest first."""
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
    assert batch_size == 1 or watch.prefills == [[11, 7, 5, 3, 2]]  # one pass


def test_prompts_are_packed_up_to_a_number_of_tokens(hybrid, many, watch, monkeypatch):
    """Padding included; one that is longer runs alone, and one with nothing left to do not."""
    monkeypatch.setattr(sample, "PACK", 8)
    assert texts(hybrid, batch_size=16, **MANY) == many
    assert watch.prefills == [[11], [7], [5], [3, 2]]
    watch.prefills.clear()
    texts(hybrid, batch_size=16, **MANY, skip=[pair for pair in many if pair[0] != 3])
    assert watch.prefills == [[3]]


@pytest.mark.parametrize("name, values", dict(
    num_samples=[0, 2.5], batch_size=[0, "4"], max_new_tokens=[0], temperature=[-0.5, torch.nan],
    top_k=[-1, 1.5], top_p=[0.0, 1.5], seed=[0.5, -1], prompts=[
        ([1] for _ in "ab"), "ab", *([[1], wrong] for wrong in (
            [], "a", 3, [50], [-1], [2.0], [True], iter([1])))]).items())
def test_what_cannot_be_is_refused_at_the_call_by_name(hybrid, name, values):
    """Not when the first text is asked for. Red if a number is rounded or a generator used up."""
    for value in values:
        with pytest.raises(ValueError, match=f"^{name}.* is no "):
            generate(hybrid, **dict(prompts=[[1]]) | {name: value})


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_no_text_comes_from_logits_that_are_not_finite(make_lm, temperature):
    """They are those after token 49, whose embedding is nan; all others end a text."""
    lm = make_lm(["mamba2", "attention"], tie_embeddings=False)
    lm.model.embed_tokens.weight[49] = torch.nan
    found = generate(lm, [[1], [49], [3]], temperature=temperature, batch_size=1,
                     stop_ids=list(range(49)))
    assert next(found).finish == "stop"
    with pytest.raises(ValueError, match="problem 1, sample 0, step 1: the logits are nan"):
        next(found)


# ---- samples.jsonl
FIVE = ["--num-samples", "5"]


@pytest.fixture(scope="module")
def models(make_lm, tmp_path_factory):
    """Checkpoints with the built-in task's tokenizer, which end some texts early: pure, hybrid."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), load_tokenizer("arithmetic")
    for seed, (name, mixer) in enumerate(dict(pure="mamba2", hybrid="attention").items(), 8):
        lm = make_lm(["mamba2", mixer], seed, vocab_size=tokenizer.vocab_size,
                     eos_ids=tokenizer.eos_ids)
        lm.model.embed_tokens.weight[tokenizer.eos_ids] *= 5
        lm.save_pretrained(folder / name)
        tokenizer.save(str(folder / name))
    return folder


@pytest.fixture(scope="module")
def line(models, task_file):
    """line(out, *options): the command line that samples the pure model into out/pure."""
    base = "--limit 4 --max-new-tokens 12 --batch-size 6 --device cpu".split()
    return lambda out, *options: ["--model", str(models / "pure"), "--task", task_file, *base,
                                  "--out", str(out), *options]


@pytest.fixture(scope="module")
def sampled(line, tmp_path_factory):
    """An uninterrupted run, its folder. Read only: tests work on copies."""
    out = tmp_path_factory.mktemp("sampled")
    sample.main(line(out, *FIVE))
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
    return {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()}


def test_a_run_is_recorded_as_documented(sampled, models, task_file):
    rows, problems = records(sampled), load_task(task_file, "test")
    assert [(row["problem"], row["sample"]) for row in untimed(sampled)] == [
        (p, s) for s in range(5) for p in range(4)]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0
    for row in rows:
        problem = problems[row["problem"]]
        assert " ".join(row) == "problem sample question gold completion num_tokens finish seconds"
        assert (row["question"], row["gold"]) == (problem.question, problem.answer)
        assert row["num_tokens"] == 12 if row["finish"] == "length" else row["num_tokens"] < 12
        assert "<|end|>" not in row["completion"]
    assert {row["finish"] for row in rows} == {"stop", "length"}
    about = json.loads((sampled / "samples.json").read_text())
    assert about["params"] == LM.from_pretrained(str(models / "pure")).num_parameters()
    assert " ".join(about) == "settings params device torch"
    of_run = "prompt problems questions weights processes device dtype state_dtype".split()
    assert about["settings"].keys() == {*sample.SETTINGS, *of_run} - {"num_samples"}


def test_a_run_killed_and_torn_goes_on_and_ends_the_same(sampled, begun, line, capsys):
    """Whole records stay as they are, a torn last line is dropped, the clock goes on; a run with
    nothing left to do says that it is finished."""
    path, lines = begun / "samples.jsonl", []
    for keep, torn in (7, True), (7, False), (0, True), (19, True), (20, False):
        lines = lines or path.read_bytes().splitlines(keepends=True)
        kept = b"".join(lines[:keep])
        path.write_bytes(kept + b"".join(lines[keep:])[:9] * torn)
        sample.main(line(begun.parent, *FIVE))
        assert path.read_bytes().startswith(kept) and untimed(begun) == untimed(sampled)
        seconds = [row["seconds"] for row in records(begun)]
        assert seconds == sorted(seconds) and (keep in (0, 20) or seconds[keep] > seconds[keep - 1])
        assert capsys.readouterr().out.endswith("finished\n") is (keep == 20)


def test_a_run_ended_by_kill_9_goes_on_and_ends_the_same(line, tmp_path):
    """A process that writes, killed once it has written; in the meantime no other may write."""
    command, path = line(tmp_path, "--num-samples", "40"), tmp_path / "pure" / "samples.jsonl"
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", *command],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    try:
        if process.poll() is None:  # it has not come to its end
            with pytest.raises(ValueError, match="another process is working in .*pure"):
                sample.main(command)
    finally:
        process.kill()
        process.wait(timeout=60)
    assert path.stat().st_size
    sample.main(command)
    sample.main(line(tmp_path / "whole", "--num-samples", "40"))
    assert untimed(tmp_path / "pure") == untimed(tmp_path / "whole" / "pure")


def test_seconds_and_samples_end_a_run_and_more_of_them_go_on(sampled, line, tmp_path, capsys,
                                                              monkeypatch):
    """Whichever limit comes first. Neither is of a run's identity; those spent before count. A run
    without a record refuses nobody. Every look at this clock takes a second, as a step does."""
    ticks, folder = itertools.count(), tmp_path / "pure"
    monkeypatch.setattr(sample, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    sample.main(line(tmp_path, "--seconds", "0.5", "--seed", "7"))
    assert "samples.jsonl: 0 samples" in capsys.readouterr().out and records(folder) == []
    for seconds, samples in (13, FIVE), (13, []), (30, []), (99, FIVE):
        sample.main(line(tmp_path, "--seconds", str(seconds), *samples))
        spent = [row["seconds"] for row in records(folder)]
        assert spent == sorted(spent)
        assert seconds / 2 < spent[-1] <= seconds or seconds == 99
    assert spent[-1] < 90 and untimed(folder)[:20] == untimed(sampled)


@pytest.mark.parametrize("options, message", [
    (["--temperature", "0.33"], "temperature = "), (["--seed", "9"], "seed = "),
    (["--max-new-tokens", "13"], "max_new_tokens = "), (["--limit", "5"], "problems = "),
    (["--batch-size", "5"], "batch_size = "), (["--top-k", "3"], "top_k = "),
    (["--top-p", "0.9"], "top_p = "), (["--dtype", "bfloat16"], "dtype = "),
    (["--task", "arithmetic"], "problem 0, sample "), (["--limit", "3"], "problem 3, sample "),
    (["--subset-seed", "1"], "problem 0, sample "), (["--model", "TRAINED ANEW"], "weights = "),
    (b'{"problem": 0, "sa\n', "samples.jsonl, line 21"), (b'{"problem": 0}\n', "sample is missing"),
    (dict(sample=9), "problem 0, sample 9 is there twice"), (dict(problem=99), "problem 99, "),
    (None, "samples.json, the settings of .* is missing"), ("FOLDER", "samples.jsonl")], ids=str)
def test_what_is_not_of_this_run_is_refused_by_name_and_nothing_is_touched(
        begun, line, models, tmp_path, options, message):
    """Other settings, or records that are damaged, twice there, or of another problem. Not even a
    torn last line is cut: mixed samples could not be told apart afterwards."""
    with open(begun / "samples.jsonl", "ab") as f:
        if isinstance(options, dict):
            f.write(2 * json_line(records(begun)[0] | dict(problem=0, sample=9) | options))
        f.write((options if isinstance(options, bytes) else b"") + b'{"problem": 1, "sam')
    if options is None:
        (begun / "samples.json").unlink()
    if options == "FOLDER":  # where the file should be
        (begun / "samples.jsonl").unlink()
        (begun / "samples.jsonl").mkdir()
    anew = str(shutil.copytree(models / "hybrid", tmp_path / "pure"))  # of the same name
    options = [anew if option == "TRAINED ANEW" else option for option in options or []
               if isinstance(options, list)]
    before = contents(begun)
    with pytest.raises((ValueError, OSError), match=message):
        sample.main(line(begun.parent, *FIVE, *options))
    assert contents(begun) == before


def test_two_processes_share_the_problems_and_write_what_one_writes(sampled, line, tmp_path,
                                                                    monkeypatch):
    """One file, a record for each completion, the same texts. Red if a process takes another's
    problems, or a text depends on who drew it. One without a problem would search for ever."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "sample.py", *line(tmp_path, *FIVE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert untimed(tmp_path / "pure") == untimed(sampled)
    settings = json.loads((tmp_path / "pure" / "samples.json").read_text())["settings"]
    assert settings["processes"] == 2
    monkeypatch.setattr(sample.parallel, "world", lambda: 5)
    with pytest.raises(ValueError, match="4 problems: too few for 5 processes"):
        sample.main(line(tmp_path, "--seconds", "1"))


def test_a_model_is_named_by_its_folder(models, sampled, line, tmp_path, monkeypatch):
    """--model . from inside it, too; without --model all under --out. Another of that name does
    not write into its file."""
    monkeypatch.chdir(models / "pure")
    sample.main(line(tmp_path / "one", *FIVE, "--model", "."))
    assert untimed(tmp_path / "one" / "pure") == untimed(sampled)
    out = shutil.copytree(models, tmp_path / "all")
    sample.main(line(out, *FIVE)[2:])
    assert untimed(out / "pure") == untimed(sampled) and len(records(out / "hybrid")) == 20
    shutil.copytree(models / "hybrid", tmp_path / "pure")
    with pytest.raises(ValueError, match="weights = "):
        sample.main(line(out, *FIVE, "--model", str(out / "pure"), str(tmp_path / "pure")))
    (out / "hybrid" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="model.safetensors"):
        sample.main(line(tmp_path / "new", "--model", str(out / "hybrid")))
    assert not (tmp_path / "new").exists()


def test_the_prompt_is_put_around_the_question_and_the_model_prepared(line, tmp_path, task_file,
                                                                      monkeypatch):
    """--subset-seed takes the problems of choose_subset; generate gets what the options say."""
    (tmp_path / "prompt.txt").write_text("Q {question} A")
    seen = {}
    monkeypatch.setattr(sample, "generate", lambda lm, prompts, **settings: seen.update(
        lm=lm, prompts=prompts, **settings) or iter(()))
    sample.main(line(tmp_path, *"--subset-seed 3 --seconds 50 --top-p 1e-300 --top-k 7".split(),
                     "--prompt-file", str(tmp_path / "prompt.txt")))
    tokenizer = load_tokenizer("arithmetic")
    chosen = choose_subset(load_task(task_file, "test"), 4, 3)
    assert seen["prompts"] == [tokenizer.chat(f"Q {p.question} A") for p in chosen]
    assert any(isinstance(module, decode_kernels.Products) for module in seen["lm"].modules())
    assert (seen["seconds"], seen["top_p"], seen["top_k"]) == (50, 1e-300, 7)
