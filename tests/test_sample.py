"""What sample.py promises: a text depends on (seed, problem, sample) and on nothing else, no place in the batch and no
prompt is computed for nothing, and a killed run goes on. Tiny random models; the expected texts come from full forward
passes and from random numbers computed here."""
import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import sample
from data import load_task, load_tokenizer
from model import CacheReads
from sample import Batch, Completion, choose_tokens, generate, row_key, uniforms

PROMPTS = [[7, 3], [1] * 11, [20, 21, 22, 23, 24], [5, 9, 9], [30, 2, 31, 2, 30, 2, 8]]
STOPS = [11, 12, 13, 14, 40]


# ------------------------------------------------------------------------------------------------ random numbers
MASK = 2 ** 64 - 1


def splitmix64(state):
    """Next state and output of Steele, Lea & Flood's generator, on Python's unbounded integers."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return state, z ^ (z >> 31)


def literal_uniforms(seed, problem, sample_index, steps):
    """The random numbers of one completion's first steps."""
    key = 0
    for part in (seed, problem, sample_index):
        key = splitmix64((key + part) & MASK)[1]
    numbers = []
    for _ in range(steps):
        key, output = splitmix64(key)
        numbers.append((output >> 41) / 2 ** 23)  # the upper 23 bits
    return numbers


def test_the_published_vector():
    """The first outputs of SplitMix64 for seed 1234567, as in its reference implementation: checks the check."""
    state, outputs = 1234567, []
    for _ in range(3):
        state, output = splitmix64(state)
        outputs.append(output)
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed, problem, index", [(0, 0, 0), (1, 2, 3), (2 ** 40 + 5, 499, 255)])
def test_uniforms_are_splitmix64(seed, problem, index):
    """int64 tensors wrap around and shift arithmetically: red if the sign bit leaks into a shift."""
    keys = torch.full((300,), row_key(seed, problem, index))
    assert uniforms(keys, torch.arange(300)).tolist() == literal_uniforms(seed, problem, index, 300)


def test_uniforms_do_not_depend_on_the_batch():
    keys = torch.tensor([row_key(0, p, 1) for p in range(9)])
    steps = torch.arange(9)
    for i in range(9):
        assert uniforms(keys[i:i + 1], steps[i:i + 1])[0] == uniforms(keys, steps)[i]


def test_uniforms_are_uniform_and_independent():
    """8000 completions x 25 steps: mean, variance and 100 bins as they should be, and no correlation between neighbouring
    problems, samples, seeds or steps. Red if the key is a plain sum, as then problem 1 sample 0 is problem 0 sample 1."""
    keys = torch.tensor([[[row_key(s, p, i) for i in range(20)] for p in range(20)] for s in range(20)])
    assert len(set(keys.flatten().tolist())) == 8000
    steps = torch.arange(25)
    u = uniforms(keys[..., None].expand(20, 20, 20, 25).reshape(-1), steps.repeat(8000)).view(20, 20, 20, 25).double()
    assert 0 <= u.min() and u.max() < 1
    n = u.numel()
    assert abs(u.mean() - 1 / 2) < 4 * (1 / 12 / n) ** 0.5 and abs(u.var() - 1 / 12) < 4 * (1 / 180 / n) ** 0.5
    counts = torch.histc(u, bins=100, min=0, max=1)
    chi2 = ((counts - n / 100) ** 2 / (n / 100)).sum()
    assert abs(chi2 - 99) < 4 * (2 * 99) ** 0.5
    for dim in range(4):
        first, second = (u - 0.5).movedim(dim, 0)[:-1], (u - 0.5).movedim(dim, 0)[1:]
        assert abs((first * second).mean() * 12) < 4 / first.numel() ** 0.5


# ------------------------------------------------------------------------------------------------ choosing a token
GRID = (torch.arange(20_000) + 0.5) / 20_000  # evenly spaced random numbers


def frequencies(logits, **settings):
    tokens = choose_tokens(logits.expand(len(GRID), -1), GRID, **dict(temperature=1.0) | settings)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / len(GRID)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_tokens_are_chosen_with_the_softmax_probabilities(temperature):
    """With evenly spaced random numbers the frequencies are the probabilities, up to the spacing."""
    logits = torch.randn(60, generator=torch.Generator().manual_seed(0)) * 2
    expected = (logits / temperature).softmax(-1)
    assert_close(frequencies(logits, temperature=temperature), expected, rtol=0, atol=2 / len(GRID))


def test_random_numbers_of_the_sampler_give_the_softmax_too():
    """A chi-square over 20 tokens and 20,000 of our own random numbers, 4 standard deviations wide; no luck, same seed."""
    logits = torch.randn(20, generator=torch.Generator().manual_seed(0))
    u = uniforms(torch.tensor([row_key(0, p, s) for p in range(100) for s in range(200)]), torch.zeros(20_000).long())
    counts = torch.bincount(choose_tokens(logits.expand(20_000, -1), u, 1.0), minlength=20)
    expected = logits.softmax(-1) * 20_000
    assert abs(((counts - expected) ** 2 / expected).sum() - 19) < 4 * (2 * 19) ** 0.5


def support(logits, **settings):
    return frequencies(logits, **settings).nonzero()[:, 0].tolist()


PROBABILITIES = torch.tensor([0.05, 0.5, 0.03, 0.25, 0.17])


@pytest.mark.parametrize("settings, tokens", [
    (dict(), [0, 1, 2, 3, 4]),
    (dict(top_k=1), [1]),
    (dict(top_k=3), [1, 3, 4]),
    (dict(top_k=5), [0, 1, 2, 3, 4]),
    (dict(top_k=99), [0, 1, 2, 3, 4]),
    (dict(top_p=1e-6), [1]),
    (dict(top_p=0.49), [1]),
    (dict(top_p=0.51), [1, 3]),
    (dict(top_p=0.76), [1, 3, 4]),
    (dict(top_p=0.96), [0, 1, 3, 4]),
    (dict(top_p=0.99), [0, 1, 2, 3, 4]),
    (dict(top_k=2, top_p=0.99), [1, 3]),
    (dict(top_k=2, top_p=0.6), [1]),              # of the two that are left, the first has 0.5 / 0.75 of the mass
    (dict(top_p=0.51, temperature=0.5), [1]),     # after temperature: squared, 0.5 has 0.72 of the mass
    (dict(top_p=0.51, temperature=4.0), [1, 3, 4]),
    (dict(temperature=0), [1]),
], ids=str)
def test_top_k_and_top_p_limit_the_support_exactly(settings, tokens):
    """All of the tokens that may be chosen are, and no other."""
    assert support(PROBABILITIES.log(), **settings) == tokens


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    """Two tokens of exactly 0.5 each: the first alone has the mass of top_p = 0.5."""
    logits = torch.tensor([-torch.inf, 1.0, 1.0, -torch.inf])
    assert support(logits, top_p=0.5) == [1] and support(logits, top_p=0.500001) == [1, 2]


def test_top_k_and_top_p_keep_proportions_and_are_per_row():
    logits = torch.stack([PROBABILITIES.log(), PROBABILITIES.flip(0).log()])
    assert_close(frequencies(logits[0], top_k=2)[[1, 3]], torch.tensor([2 / 3, 1 / 3]), rtol=0, atol=2e-4)
    for settings in (dict(top_k=1), dict(top_p=0.3)):
        assert choose_tokens(logits, torch.tensor([0.99, 0.99]), 1.0, **settings).tolist() == [1, 3]


@pytest.mark.parametrize("u", [0.0, 2.0 ** -23, 0.5, 1 - 2.0 ** -23])
def test_tokens_of_probability_zero_are_never_chosen(u):
    """The ends of the vocabulary are where an inverted cumulative distribution goes wrong: u = 0 and u just below 1."""
    logits = torch.randn(500, 300, generator=torch.Generator().manual_seed(0)) * 3
    hidden = torch.rand(500, 300, generator=torch.Generator().manual_seed(1)) < 0.5
    hidden[:, [0, -1]] = True
    tokens = choose_tokens(logits.masked_fill(hidden, float("-inf")), torch.full((500,), u), 1.0)
    assert not hidden[torch.arange(500), tokens].any()


# ------------------------------------------------------------------------------------------------ texts
def texts(lm, prompts=PROMPTS, **settings):
    """{(problem, sample): (tokens, finish)} of `generate`."""
    found = {}
    for c in generate(lm, prompts, **settings):
        assert (c.problem, c.sample) not in found
        found[c.problem, c.sample] = (c.tokens, c.finish)
    return found


def literal_text(lm, prompt, stops, length, seed, problem, index, temperature):
    """One completion by full forward passes over one row, and the random numbers above."""
    tokens, u = [], literal_uniforms(seed, problem, index, length)
    for step in range(length):
        logits = lm(torch.tensor([prompt + tokens]))[0, -1].double()
        if temperature == 0:
            token = logits.argmax().item()
        else:
            cdf = (logits / temperature).softmax(-1).cumsum(-1)
            token = (cdf <= u[step] * cdf[-1]).sum().item()
        if token in stops:
            return tokens, "stop"
        tokens.append(token)
    return tokens, "length"


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_generate_equals_full_forward_passes(make_lm, pattern, temperature):
    """Ragged prompts in one batch, rows that stop and are replaced, against a loop that recomputes everything. Red if a
    state is not reset, a finished row's leftovers leak, the stop id is included, or a step uses another's random number."""
    lm = make_lm(pattern)
    settings = dict(num_samples=1 if temperature == 0 else 3, max_new_tokens=14, temperature=temperature, seed=5)
    stops = STOPS
    if temperature == 0:  # let some greedy texts stop: at a token that they come to
        free = texts(lm, batch_size=3, **settings)
        stops = [tokens[3] for tokens, _ in free.values()][:2]
    found = texts(lm, batch_size=3, stop_ids=stops, **settings)
    expected = {(p, s): literal_text(lm, PROMPTS[p], stops, 14, 5, p, s, temperature)
                for p in range(len(PROMPTS)) for s in range(settings["num_samples"])}
    assert found == expected
    assert any(finish == "stop" for _, finish in found.values())


@pytest.fixture(scope="module")
def hybrid(make_lm):
    return make_lm(["mamba2", "attention", "mamba"])


MANY = dict(num_samples=12, max_new_tokens=16, temperature=0.9, stop_ids=STOPS, seed=1)


@pytest.fixture(scope="module")
def many(hybrid):
    """Reference: 60 completions, one at a time."""
    return texts(hybrid, batch_size=1, **MANY)


@pytest.mark.parametrize("batch_size", [2, 3, 16, 64])
def test_texts_do_not_depend_on_the_batch_size(hybrid, many, batch_size):
    assert texts(hybrid, batch_size=batch_size, **MANY) == many
    lengths = {len(tokens) for tokens, _ in many.values()}
    assert len(lengths) > 8  # a batch of rows that end at all kinds of steps


def test_texts_do_not_depend_on_what_is_skipped(hybrid, many):
    """A resumed run: only the missing completions, and the same ones. Skipped pairs do not run."""
    skip = {pair for i, pair in enumerate(sorted(many)) if i % 3 or pair[0] == 2}
    rest = texts(hybrid, batch_size=16, **MANY, skip=skip)
    assert rest == {pair: text for pair, text in many.items() if pair not in skip}
    assert texts(hybrid, batch_size=16, **MANY, skip=list(many)) == {}


def test_more_samples_extend_fewer(hybrid, many):
    assert texts(hybrid, batch_size=16, **MANY | dict(num_samples=4)) == {k: v for k, v in many.items() if k[1] < 4}


def test_samples_differ_and_the_seed_decides(hybrid, many):
    """Red if the samples of a problem share their random numbers: coverage would not rise with k."""
    for problem in range(len(PROMPTS)):
        assert len({tuple(many[problem, s][0]) for s in range(12)}) > 8
        assert len({tuple(many[problem, s][0][:1]) for s in range(12)}) > 4  # already in the first token
    other = texts(hybrid, batch_size=16, **MANY | dict(seed=2))
    assert sum(other[pair] == many[pair] for pair in many) < 10


@pytest.mark.parametrize("settings", [dict(top_k=1), dict(top_p=1e-9), dict(temperature=1e-6)], ids=str)
def test_extreme_settings_are_greedy(hybrid, settings):
    settings = dict(num_samples=2, max_new_tokens=10) | settings
    greedy = texts(hybrid, num_samples=1, max_new_tokens=10, temperature=0)
    assert texts(hybrid, **settings) == {(p, s): greedy[p, 0] for p in range(len(PROMPTS)) for s in range(2)}


def test_texts_end_at_their_own_stop_id_and_never_include_it(many):
    finishes = {finish for _, finish in many.values()}
    assert finishes == {"stop", "length"}
    for tokens, finish in many.values():
        assert not set(tokens) & set(STOPS)
        assert len(tokens) == 16 if finish == "length" else len(tokens) < 16


def test_a_text_may_stop_at_once(hybrid):
    """A stop id as the first token: an empty text, and its place goes to the next."""
    first = [texts(hybrid, [prompt], max_new_tokens=1, temperature=0)[0, 0][0][0] for prompt in PROMPTS]
    found = texts(hybrid, batch_size=2, max_new_tokens=5, temperature=0, stop_ids=first)
    assert all(found[p, 0] == ([], "stop") for p in range(len(PROMPTS)))


def test_no_stop_ids_means_full_length(hybrid):
    assert all((len(t), finish) == (6, "length") for t, finish in texts(hybrid, max_new_tokens=6, num_samples=2).values())


def test_completions_come_sample_major_when_they_finish(hybrid):
    """Every problem's sample 0 first: so a clock can say when all problems had k samples. Seconds never run backwards."""
    done = list(generate(hybrid, PROMPTS, batch_size=1, **MANY))
    assert [(c.problem, c.sample) for c in done] == [(p, s) for s in range(12) for p in range(len(PROMPTS))]
    for completions in (done, list(generate(hybrid, PROMPTS, batch_size=16, **MANY))):
        seconds = [c.seconds for c in completions]
        assert seconds == sorted(seconds) and seconds[0] > 0
    assert isinstance(done[0], Completion)


# ------------------------------------------------------------------------------------------------ steps between visits
@pytest.mark.parametrize("steps", [2, 7, 100])
@pytest.mark.parametrize("batch_size", [3, 16])
def test_texts_do_not_depend_on_how_often_the_host_looks(hybrid, many, monkeypatch, batch_size, steps):
    """Rows that are done run along until the host comes: red if they write into their text, or out of their cache, or if the
    row that follows finds anything of theirs."""
    monkeypatch.setattr(sample.Batch, "VISIT_EVERY", dict(cpu=steps))
    assert texts(hybrid, batch_size=batch_size, **MANY) == many


@pytest.mark.parametrize("settings", [dict(temperature=0), dict(temperature=0.8, top_k=5, top_p=0.9)], ids=str)
def test_a_step_needs_nothing_from_the_device(make_lm, pattern, monkeypatch, settings):
    """A CUDA graph records a step without running it. So do tensors on "meta", which have no data: an .item(), a nonzero() or
    an `if` on a tensor raises there."""
    monkeypatch.setattr(CacheReads, "ON_DEVICE", ("meta",))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # knows no "meta"
    batch = Batch(make_lm(pattern).to("meta"), 3, 9, 4, STOPS, lambda logits, u: choose_tokens(logits, u, **settings))
    batch.step()


def addresses(batch):
    """Where the tensors of a batch lie, those of its state among them."""
    tensors = [*vars(batch).values(), batch.state.lengths, *(t for layer in batch.state.layers for t in layer.values())]
    return [tensor.data_ptr() for tensor in tensors if isinstance(tensor, torch.Tensor)]


@pytest.mark.parametrize("batch_size", [1, 16])
def test_what_is_recorded_finds_its_tensors_where_they_were(hybrid, many, monkeypatch, batch_size):
    """A stand-in for CUDA graphs, which replay on fixed addresses: red if a step or a start puts a new tensor in an old one's
    place, or if the batch shrinks and the old graph is used on."""
    recordings = []

    def recorded(step, device):
        batch = step.__self__
        before = addresses(batch)
        recordings.append(len(batch.owner))

        def replay():
            assert addresses(batch) == before
            step()
            assert addresses(batch) == before
        return replay

    monkeypatch.setattr(sample, "recorded", recorded)
    monkeypatch.setattr(CacheReads, "ON_DEVICE", ("cpu",))  # as on a GPU: nothing is sorted
    monkeypatch.setattr(sample.Batch, "VISIT_EVERY", dict(cpu=8))
    assert texts(hybrid, batch_size=batch_size, **MANY) == many
    assert recordings == sorted(recordings, reverse=True) and len(recordings) == len(set(recordings)) <= 1 + batch_size // 2


# ------------------------------------------------------------------------------------------------ no work for nothing
class Watch:
    """Rows of the model's decoding steps, and the prompts of each of its prefills."""

    def __init__(self, lm):
        self.lm, self.rows, self.prefills = lm, [], []
        self.hook = lm.register_forward_pre_hook(lambda module, inputs: self.rows.append(len(inputs[0])))

    def __enter__(self):
        def prefill(prompts):
            self.prefills.append(prompts)
            return type(self.lm).prefill(self.lm, prompts)
        self.lm.prefill = prefill
        return self

    def __exit__(self, *exception):
        self.hook.remove()
        del self.lm.prefill


def simulate(lengths, batch_size):
    """Rows busy at every step if each completion takes a free place at once, in order: [rows at step 0, ...]."""
    queue, busy, rows = list(lengths), [], []
    while queue or busy:
        while queue and len(busy) < batch_size:
            busy.append(queue.pop(0))
        rows.append(len(busy))
        busy = [left - 1 for left in busy if left > 1]
    return rows


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_a_finished_rows_place_is_taken_at_once(hybrid, many, batch_size):
    """The number of decoding steps is that of an ideal schedule, the batch is full while anyone waits, and it shrinks when
    nobody does. Red if a batch waits for its longest row, or finished rows run along to the end."""
    steps_of = [len(many[p, s][0]) + (many[p, s][1] == "stop") for s in range(12) for p in range(len(PROMPTS))]
    ideal = simulate(steps_of, batch_size)
    with Watch(hybrid) as watch:
        texts(hybrid, batch_size=batch_size, **MANY)
    assert len(ideal) - 1 <= len(watch.rows) <= len(ideal) + 1
    full = ideal.count(batch_size)
    assert watch.rows[:full - 1] == [batch_size] * (full - 1)
    assert sum(watch.rows) <= 1.34 * sum(ideal) + batch_size
    assert watch.rows[-1] <= max(1, 1.34 * ideal[-1])


def test_a_prompt_is_run_once_for_all_its_samples(hybrid):
    with Watch(hybrid) as watch:
        texts(hybrid, batch_size=16, **MANY)
    assert watch.prefills == [PROMPTS]  # all at once


def test_prompts_are_packed_up_to_a_number_of_tokens(hybrid, many, monkeypatch):
    """Memory stays bounded however many prompts there are, and one that is longer than that still runs, alone."""
    monkeypatch.setattr(sample.Prompts, "TOKENS", 8)
    with Watch(hybrid) as watch:
        assert texts(hybrid, batch_size=16, **MANY) == many
    assert watch.prefills == [[PROMPTS[0]], [PROMPTS[1]], PROMPTS[2:4], [PROMPTS[4]]]


def test_a_prompt_with_nothing_left_to_do_is_not_run(hybrid, many):
    with Watch(hybrid) as watch:
        texts(hybrid, batch_size=16, **MANY, skip=[pair for pair in many if pair[0] != 3])
    assert watch.prefills == [[PROMPTS[3]]]


@pytest.mark.parametrize("settings, value", [
    (dict(num_samples=0), "num_samples = 0"), (dict(batch_size=0), "batch_size = 0"), (dict(max_new_tokens=0), "max_new_tokens = 0"),
    (dict(temperature=-0.5), "temperature = -0.5"), (dict(top_k=-1), "top_k = -1"), (dict(top_p=0.0), "top_p = 0"),
    (dict(top_p=1.5), "top_p = 1.5"), (dict(temperature=float("nan")), "temperature = nan")], ids=str)
def test_settings_out_of_range_are_refused_with_their_value(hybrid, settings, value):
    with pytest.raises(ValueError, match=value):
        list(generate(hybrid, PROMPTS, **settings))


def test_an_empty_prompt_is_refused_by_its_number(hybrid):
    with pytest.raises(ValueError, match="prompt 2"):
        list(generate(hybrid, [[1], [2], []]))


# ------------------------------------------------------------------------------------------------ samples.jsonl
ROOT = Path(__file__).resolve().parents[1]
FIELDS = ["problem", "sample", "question", "gold", "completion", "num_tokens", "finish", "seconds"]


@pytest.fixture(scope="module")
def command(tiny_out, task_file):
    """Run sample.py's main on a model of the tiny experiment; returns the folder of its samples."""
    def run(out, *options, model="pure"):
        sample.main(["--model", str(tiny_out / model), "--out", str(out), "--task", task_file, "--limit", "4", "--num-samples",
                     "5", "--max-new-tokens", "12", "--batch-size", "6", "--device", "cpu", *options])
        return out / model
    return run


@pytest.fixture(scope="module")
def sampled(command, tmp_path_factory):
    """An uninterrupted run. Read only: tests work on copies."""
    return command(tmp_path_factory.mktemp("sampled"))


def records(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def without_time(rows):
    return sorted(json.dumps(row | dict(seconds=0)) for row in rows)


def test_records_have_the_documented_fields(sampled, task_file, tiny_out):
    rows, problems, tokenizer = records(sampled), load_task(task_file, "test"), load_tokenizer(str(tiny_out / "pure"))
    assert sorted((row["problem"], row["sample"]) for row in rows) == [(p, s) for p in range(4) for s in range(5)]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0
    for row in rows:
        assert list(row) == FIELDS
        problem = problems[row["problem"]]
        assert (row["question"], row["gold"]) == (problem.question, problem.answer)
        assert row["finish"] in ("stop", "length") and 0 <= row["num_tokens"] <= 12
        assert len(tokenizer.encode(row["completion"])) <= 2 * 12 and "<|" not in row["completion"]


def test_the_summary_says_how_and_how_fast(sampled, tiny_out):
    summary = json.loads((sampled / "samples.json").read_text())
    assert {"settings", "device", "dtype", "params", "tokens_per_second"} <= summary.keys()
    assert summary["settings"]["temperature"] > 0 and summary["settings"]["num_samples"] == 5
    rows = records(sampled)
    assert summary["tokens_per_second"] == pytest.approx(sum(r["num_tokens"] for r in rows) / rows[-1]["seconds"], rel=0.05)
    from model import LM
    assert summary["params"] == LM.from_pretrained(str(tiny_out / "pure")).num_parameters()


@pytest.mark.parametrize("keep, torn", [(7, True), (7, False), (0, True), (19, True)])
def test_a_killed_run_goes_on_and_ends_the_same(sampled, command, tmp_path, keep, torn):
    """Cut after some lines, in the middle of one: the rest is sampled, with the same texts, and the clock goes on. The
    records that were whole are not touched."""
    shutil.copytree(sampled, tmp_path / "pure")
    path = tmp_path / "pure" / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:keep]) + (lines[keep][:-9] if torn else b""))
    command(tmp_path)
    assert path.read_bytes().startswith(b"".join(lines[:keep]))
    assert without_time(records(tmp_path / "pure")) == without_time(records(sampled))
    seconds = [row["seconds"] for row in records(tmp_path / "pure")]
    assert seconds == sorted(seconds) and (keep == 0 or seconds[keep] > seconds[keep - 1])


def test_a_finished_run_is_not_sampled_again(sampled, command, tmp_path):
    shutil.copytree(sampled, tmp_path / "pure")
    before = (tmp_path / "pure" / "samples.jsonl").read_bytes(), json.loads((tmp_path / "pure" / "samples.json").read_text())
    command(tmp_path)
    after = (tmp_path / "pure" / "samples.jsonl").read_bytes(), json.loads((tmp_path / "pure" / "samples.json").read_text())
    assert before[0] == after[0]
    assert before[1]["tokens_per_second"] == pytest.approx(after[1]["tokens_per_second"], rel=0.05)


def test_a_run_killed_after_its_last_record_still_gets_its_summary(sampled, command, tmp_path):
    """All records are there, but samples.json is still the one from the start: the rerun must measure the speed."""
    shutil.copytree(sampled, tmp_path / "pure")
    path = tmp_path / "pure" / "samples.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | dict(tokens=0, seconds=0.0, tokens_per_second=None)))
    command(tmp_path)
    assert json.loads(path.read_text())["tokens_per_second"] == pytest.approx(whole["tokens_per_second"], rel=0.05)


@pytest.mark.parametrize("options, name", [
    (["--temperature", "0.33"], "temperature"), (["--seed", "9"], "seed"), (["--num-samples", "6"], "num_samples"),
    (["--max-new-tokens", "13"], "max_new_tokens"), (["--limit", "5"], "problems"), (["--top-k", "3"], "top_k"),
    (["--top-p", "0.9"], "top_p"), (["--task", "arithmetic"], "task"), (["--dtype", "bfloat16"], "dtype")], ids=str)
def test_other_settings_are_refused_and_nothing_is_touched(sampled, command, tmp_path, options, name):
    """Not even a torn last line is cut: mixed samples could not be told apart afterwards."""
    shutil.copytree(sampled, tmp_path / "pure")
    with open(tmp_path / "pure" / "samples.jsonl", "ab") as f:
        f.write(b'{"problem": 1, "sam')
    before = {file.name: file.read_bytes() for file in (tmp_path / "pure").iterdir()}
    with pytest.raises(ValueError, match=rf"{name} = .*--out"):
        command(tmp_path, *options)
    assert {file.name: file.read_bytes() for file in (tmp_path / "pure").iterdir()} == before


def test_another_model_of_the_same_name_is_refused(sampled, tiny_out, task_file, tmp_path):
    """Retrained in between: the texts would come from two models."""
    shutil.copytree(sampled, tmp_path / "out" / "pure")
    shutil.copytree(tiny_out / "hybrid", tmp_path / "pure")
    with pytest.raises(ValueError, match="weights"):
        sample.main(["--model", str(tmp_path / "pure"), "--out", str(tmp_path / "out"), "--task", task_file, "--limit", "4",
                     "--num-samples", "5", "--max-new-tokens", "12", "--batch-size", "6", "--device", "cpu"])


def test_a_line_that_is_not_json_in_the_middle_is_an_error(sampled, command, tmp_path):
    shutil.copytree(sampled, tmp_path / "pure")
    path = tmp_path / "pure" / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + b'{"problem": 0, "sa\n' + b"".join(lines[4:]))
    with pytest.raises(ValueError, match="samples.jsonl"):
        command(tmp_path)


def test_every_option_of_generate_reaches_it(command, tmp_path, monkeypatch):
    """Red if an option is parsed and then forgotten."""
    seen = []

    def spy(lm, prompts, **settings):
        seen.append(settings)
        return iter(())
    monkeypatch.setattr(sample, "generate", spy)
    command(tmp_path, "--num-samples", "3", "--max-new-tokens", "9", "--temperature", "0.4", "--top-k", "7", "--top-p", "0.6",
            "--batch-size", "2", "--seed", "8")
    expected = dict(num_samples=3, max_new_tokens=9, temperature=0.4, top_k=7, top_p=0.6, batch_size=2, seed=8, skip=set())
    assert {name: seen[-1][name] for name in expected} == expected and seen[-1]["stop_ids"]


def test_without_a_model_every_model_under_out_is_sampled(tiny_out, task_file, tmp_path):
    shutil.copytree(tiny_out, tmp_path / "out")
    sample.main(["--out", str(tmp_path / "out"), "--task", task_file, "--limit", "2", "--num-samples", "1", "--max-new-tokens",
                 "3", "--device", "cpu"])
    names = sorted(os.listdir(tiny_out))
    assert names == ["hybrid", "pure", "teacher"]
    for name in names:
        assert len(records(tmp_path / "out" / name)) == 2


def test_two_processes_share_the_problems_and_write_what_one_writes(tiny_out, task_file, tmp_path):
    """Data-parallel under torchrun: one file, each completion once, the same texts; a second run finds nothing to do.
    Red if a process takes another's problems, or if texts depend on who drew them."""
    options = [str(ROOT / "sample.py"), "--task", task_file, "--limit", "5", "--num-samples", "3", "--max-new-tokens", "8",
               "--batch-size", "4", "--device", "cpu", "--model", str(tiny_out / "hybrid"), "--out"]
    one, two = tmp_path / "one", tmp_path / "two"
    parallel = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options, str(two)]
    for command in ([sys.executable, *options, str(one)], parallel):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    texts = [{(r["problem"], r["sample"]): r["completion"] for r in records(out / "hybrid")} for out in (one, two)]
    assert texts[0] == texts[1] and len(records(two / "hybrid")) == 15
    summary = json.loads((two / "hybrid" / "samples.json").read_text())
    assert summary["settings"]["processes"] == 2
    assert summary["tokens"] == sum(r["num_tokens"] for r in records(two / "hybrid"))
    before = (two / "hybrid" / "samples.jsonl").read_bytes()
    again = subprocess.run(parallel, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and (two / "hybrid" / "samples.jsonl").read_bytes() == before


def test_the_prompt_file_is_put_around_the_question(command, tmp_path, monkeypatch):
    """The model reads the template with the question in it; records keep the bare question. Red if one of them is mixed up."""
    template = tmp_path / "prompt.txt"
    template.write_text("Q {question} A")
    seen = []
    monkeypatch.setattr(sample, "generate", lambda lm, prompts, **settings: seen.append(prompts) or iter(()))
    command(tmp_path, "--prompt-file", str(template))
    tokenizer = sample.load_tokenizer("arithmetic")
    assert tokenizer.decode(seen[0][0][1:-1]).startswith("Q ") and tokenizer.decode(seen[0][0][1:-1]).endswith(" A")


def test_a_subset_is_drawn_with_its_seed(command, tmp_path, task_file):
    """--subset-seed takes other problems than the first, always the same ones."""
    command(tmp_path, "--subset-seed", "3")
    problems = sample.load_task(task_file, "test")
    wanted = [p.question for p in sample.choose_subset(problems, 4, 3)]
    found = {r["problem"]: r["question"] for r in records(tmp_path / "pure")}
    assert [found[i] for i in range(len(found))] == wanted[:len(found)] != [p.question for p in problems[:len(found)]]
