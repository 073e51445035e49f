"""What distill.py promises for real models: pieces and processes change the memory and the time of training and nothing
else, memory is known before it is needed, and teachers are fine-tuned and write training data as asked."""
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import distill
import memory
from data import load_tokenizer, read_problems, solution_text
from distill import Stage, collate, cross_entropy_loss, hidden_loss, kl_loss, matrix_loss
from model import LM, Config, fingerprint, student_from
from sample import Completion

ROOT = Path(distill.__file__).parent
ARGS = Namespace(device=torch.device("cpu"), dtype=torch.float32, accumulate=1, compile=False, checkpoint_activations=False)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_time(folder):
    return [{k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")} for record in metrics(folder)]


def assert_same_training(one, two):
    """Losses within 1e-4, the project's bound; weights within what Adam makes of rounding in gradients near 0."""
    for a, b in zip(without_time(one), without_time(two), strict=True):
        assert a.keys() == b.keys() and (a["stage"], a["step"], a["tokens"]) == (b["stage"], b["step"], b["tokens"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    weights, others = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert weights.keys() == others.keys()
    for name in weights:
        assert_close(weights[name], others[name], rtol=0, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


# ------------------------------------------------------------------------------------------------ pieces of a batch
ROWS = [([1, 2, 3], [11, 12, 13, 14, 49]), ([4], [13, 49]), ([5, 6], [49]), ([7, 8, 9, 10, 11, 12], [3, 49]), ([9], [2, 2, 2, 49])]


@pytest.fixture
def teacher(make_lm):
    return make_lm()


@pytest.fixture
def stages(teacher):
    def kl(lm, tokens, labels, valid):
        return kl_loss(lm(tokens), teacher(tokens), labels)
    return dict(kl=Stage("kl", 0, kl), sft=Stage("sft", 0, lambda lm, tokens, labels, valid: cross_entropy_loss(lm(tokens), labels)),
                hidden=Stage("hidden", 0, lambda lm, tokens, _, valid: hidden_loss(lm, teacher, tokens, valid), "tokens"),
                matrices=Stage("matrices", 0, lambda lm, tokens, _, valid: matrix_loss(lm, teacher, tokens, valid), "rows"))


def gradient(student, teacher, stage, accumulate):
    student.zero_grad()
    objective = distill.prepare(student, teacher, ARGS)
    loss = distill.batch_gradient(objective, stage, collate(ROWS), Namespace(**vars(ARGS) | dict(accumulate=accumulate)))
    return loss, {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["matrices", "hidden", "kl", "sft"])
@pytest.mark.parametrize("accumulate", [2, 3, 99])
def test_the_gradient_of_the_pieces_is_that_of_the_batch(teacher, stages, name, accumulate):
    """Red if a piece's mean is weighted by 1 / pieces, or by the wrong count: rows have one to five answer tokens."""
    student = student_from(teacher, ["mamba2", "attention", "mamba2"]).requires_grad_(True)
    loss, expected = gradient(student, teacher, stages[name], 1)
    found_loss, found = gradient(student, teacher, stages[name], accumulate)
    assert_close(found_loss, loss)
    assert found.keys() == expected.keys() and len(found) > 4
    for key in expected:
        assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)


def test_the_gradient_of_one_piece_is_the_losses_own_bit_for_bit(teacher, stages):
    """Red if the weight of the only piece is not exactly 1: the built-in experiment would then change."""
    student = student_from(teacher, ["mamba2"] * 3).requires_grad_(True)
    loss, found = gradient(student, teacher, stages["kl"], 1)
    student.zero_grad()
    stages["kl"].loss(student, *collate(ROWS)).backward()
    assert all(torch.equal(p.grad, found[name]) for name, p in student.named_parameters())


@pytest.mark.parametrize("rows, processes, accumulate", [(5, 2, 1), (5, 2, 2), (1, 2, 3), (3, 4, 2), (5, 3, 9), (4, 1, 4)])
def test_every_row_is_dealt_to_one_process_once(monkeypatch, rows, processes, accumulate):
    """And all processes get as many pieces, or one would wait forever for another; without a row, of weight 0."""
    batch, dealt, weights, lengths = collate(ROWS[:rows]), [], 0.0, set()
    monkeypatch.setattr(distill, "world", lambda: processes)
    for process in range(processes):
        monkeypatch.setattr(distill, "rank", lambda: process)
        pieces = list(distill.deal(batch, "answers", accumulate))
        lengths.add(len(pieces))
        for tokens, labels, valid, weight in pieces:
            assert valid.any(0).all() and tokens.shape == labels.shape == valid.shape  # no column is all padding
            weights += weight
            dealt += [t[v].tolist() for t, v in zip(tokens, valid)] if weight else []
    assert sorted(dealt) == sorted(prompt + answer for prompt, answer in ROWS[:rows])
    assert weights == pytest.approx(1) and len(lengths) == 1 and lengths.pop() <= accumulate


# ------------------------------------------------------------------------------------------------ memory
def test_checkpointing_activations_keeps_less_and_changes_nothing(make_lm):
    """Red if blocks keep what they should recompute, or if wrapping renames parameters: checkpoints would not load."""
    teacher, tokens, names = make_lm(), collate(ROWS)[0], set(make_lm(["mamba2"] * 3).state_dict())

    def prepared(checkpointed):
        student = student_from(teacher, ["mamba2"] * 3).requires_grad_(True)
        return distill.prepare(student, teacher, Namespace(**vars(ARGS) | dict(checkpoint_activations=checkpointed))).lm
    torch.manual_seed(0)
    plain = prepared(False)
    torch.manual_seed(0)
    checkpointed = prepared(True)
    assert set(checkpointed.state_dict()) == names
    kept = [memory.kept_bytes(lambda _: lm(tokens), 0) - memory.kept_bytes(lambda _: lm.head(lm.model.embed_tokens(tokens)), 0)
            for lm in (plain, checkpointed)]
    assert kept[1] < 0.2 * kept[0]
    for lm in (plain, checkpointed):
        cross_entropy_loss(lm(tokens), collate(ROWS)[1]).backward()
    assert all(torch.equal(one.grad, two.grad) for one, two in zip(plain.parameters(), checkpointed.parameters()))


@pytest.fixture
def command(tiny_out, tiny_options, tmp_path):
    """Run distill.py's main for two steps of KL on the tiny teacher; returns the student's folder."""
    def run(*options, name="student", out="out", teacher=tiny_out / "teacher"):
        distill.main([*tiny_options, "--out", str(tmp_path / out), "--teacher", str(teacher), "--student", name,
                      "--matrices-steps", "0", "--hidden-steps", "0", "--kl-steps", "2", "--log-every", "1", *options])
        return tmp_path / out / name
    return run


def test_what_does_not_fit_is_refused_before_anything_is_loaded(command, monkeypatch):
    """In one line with the need and what there is. Red if loading comes first, or if a smaller piece needs as much."""
    free, needs = [1000], []
    monkeypatch.setattr(memory, "free_memory", lambda device, processes: free[0])
    monkeypatch.setattr(LM, "from_pretrained", None)
    for options in ([], ["--accumulate", "2"], ["--accumulate", "4"]):
        with pytest.raises(ValueError, match="training needs about .* GB per process, 1e-06 GB are free.*: try") as error:
            command("--batch-tokens", "4096", *options)
        needs.append(float(error.value.args[0].split()[3]))
    assert needs[0] > 1.8 * needs[1] > 3 * needs[2]
    free[0] = 1e9 * needs[0] + 1e6
    with pytest.raises(TypeError):  # enough: it goes on to load the teacher
        command("--batch-tokens", "4096")


@pytest.mark.parametrize("most, options, advice", [
    ("logits", ["--accumulate", "2"], "--accumulate 4"), ("activations", [], "--checkpoint-activations"),
    ("activations", ["--checkpoint-activations"], "--accumulate 2"), ("teacher", [], "torchrun"),
    ("weights, gradients and moments", [], "torchrun"), ("logits", ["--batch-tokens", "1"], "shorter solutions")], ids=str)
def test_the_advice_is_for_what_needs_most(command, monkeypatch, most, options, advice):
    needed = memory.memory_needed
    monkeypatch.setattr(memory, "memory_needed", lambda *arguments: needed(*arguments) | {most: 1e18})
    with pytest.raises(ValueError, match=f"for {most}: try .*{advice}"):
        command(*options)


def test_activations_are_counted_as_autograd_keeps_them(make_lm, pattern):
    """Of all blocks of a model, per token. Red if a kind of mixer, or the number of layers, is left out."""
    lm = make_lm(pattern).requires_grad_(True)
    kept = [memory.kept_bytes(lambda length: lm.hidden_states(torch.zeros(1, length, dtype=torch.long)), length)
            for length in (256, 512)]
    found = memory.memory_needed(lm.config, None, 256, 1.0, 128, {"kl"}, ARGS, 1)["activations"]
    assert found == pytest.approx(kept[1] - kept[0], rel=0.1)


MEASURE = """
import gc, json, sys
sys.path.insert(0, sys.argv.pop(1))
import distill, memory
check, need, seen = distill.check_memory, memory.memory_needed, {}

def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) * 1024

def start(*arguments):
    check(*arguments)
    gc.collect()
    seen["start"] = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM, the peak, starts anew

def needed(*arguments):
    seen["estimate"] = sum((parts := need(*arguments)).values())
    return parts

distill.check_memory, memory.memory_needed = start, needed
distill.main()
print(json.dumps(dict(estimate=seen["estimate"], measured=status("VmHWM") - seen["start"])))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory is measured on Linux")
def test_the_memory_estimate_is_near_what_is_measured(tmp_path, task_file):
    """A Llama of 14 M parameters whose logits and moments need about the same. Red if either is left out."""
    tokenizer, folder = load_tokenizer("arithmetic"), tmp_path / "llama"
    LM(Config(vocab_size=16_000, d_model=512, n_layers=2, d_ff=1024, eos_ids=tokenizer.eos_ids)).save_pretrained(folder)
    tokenizer.save(folder)
    (tmp_path / "measure.py").write_text(MEASURE)
    done = subprocess.run([sys.executable, "measure.py", str(ROOT), "--teacher", "llama", "--task", task_file, "--student", "pure",
                           "--device", "cpu", "--matrices-steps", "0", "--hidden-steps", "0", "--kl-steps", "2",
                           "--batch-tokens", "1024"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.75 < found["estimate"] / found["measured"] < 1.3, found


# ------------------------------------------------------------------------------------------------ compilation
def test_compiling_keeps_names_and_results(command, monkeypatch):
    """With the eager backend, which compiles nothing but goes the same way. Red if blocks become OptimizedModules, whose
    parameters have other names, or if nothing is compiled."""
    compile, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f: (compiled.append(f), compile(f, backend="eager"))[1])
    plain, folder = command(name="plain"), command("--compile", name="compiled")
    assert len(compiled) == 4  # two blocks of the teacher, two of the student
    assert_same_training(plain, folder)


def test_compiling_without_a_compiler_is_one_clear_line(command, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="--compile needs a C\\+\\+ compiler"):
        command("--compile")


# ------------------------------------------------------------------------------------------------ teachers
def test_sft_trains_a_copy_of_the_teacher_and_students_learn_from_the_copy(command, tiny_out, tmp_path):
    """Red if the given teacher is written to, if the student's teacher is the given one, or if a rerun trains again."""
    given = tiny_out / "teacher"
    before = {f.name: f.read_bytes() for f in given.iterdir()}
    options = ["--sft", "--teacher-sft-steps", "3", "--teacher-lr", "1e-3"]
    student, copy = command(*options), tmp_path / "out" / "teacher"
    assert {f.name: f.read_bytes() for f in given.iterdir()} == before
    assert [record["stage"] for record in metrics(copy)] == ["sft"] * 3
    assert max(record["lr"] for record in metrics(copy)) == pytest.approx(1e-3)
    used = json.loads((student / "training.json").read_text())["teacher"]
    assert used == fingerprint(copy) != fingerprint(given)
    written = (copy / "model.safetensors").stat().st_mtime_ns
    command(*options, name="another")
    assert (copy / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="steps = 3 there, 4 now"):
        command("--sft", "--teacher-sft-steps", "4", "--teacher-lr", "1e-3", name="third")


def test_sft_never_overwrites_a_model_that_it_did_not_make(command, tiny_out, tiny_options, tmp_path):
    """--teacher out/teacher --sft, and an out/teacher from elsewhere: both would destroy, or pass off, another's model."""
    shutil.copytree(tiny_out / "teacher", tmp_path / "out" / "teacher")
    before = (tmp_path / "out" / "teacher" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="--sft writes .*--out"):
        command("--sft", teacher=tmp_path / "out" / "teacher")
    (tmp_path / "out" / "teacher" / "training.json").unlink()
    with pytest.raises(ValueError, match="did not make.*--out"):
        command("--sft")
    assert (tmp_path / "out" / "teacher" / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="--sft .*--teacher"):
        distill.main([*tiny_options, "--out", str(tmp_path / "new"), "--sft"])


def test_the_learning_rate_falls_with_the_width():
    assert distill.default_lr(Config(d_model=64)) == distill.default_lr(Config(d_model=32)) == 2e-3
    assert distill.default_lr(Config(d_model=2048, head_dim=64)) == pytest.approx(6.25e-5)


@pytest.mark.parametrize("options, name", [(["--limit", "7"], "limit"), (["--limit", "7", "--subset-seed", "1"], "subset_seed"),
                                           (["--prompt-file", "mine.txt"], "prompt"), (["--start-length", "0.3"], "start_length")],
                         ids=str)
def test_options_of_the_data_are_settings_of_the_run(command, tmp_path, monkeypatch, options, name):
    """A run that is resumed with others would go on with other data. Red if one is forgotten in training.json."""
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("Compute {question}")
    command("--limit", "7") if name == "subset_seed" else command()
    with pytest.raises(ValueError, match=rf"\b{name} = "):
        command(*options)


# ------------------------------------------------------------------------------------------------ the teacher's own solutions
@pytest.fixture
def told(monkeypatch, task_file):
    """generate() replaced: even samples are right and odd ones wrong, every fifth problem has no end. Returns what was asked."""
    tokenizer, problems, asked = load_tokenizer("arithmetic"), read_problems(task_file), []

    def fake(lm, prompts, *, num_samples, skip, **_):
        asked.append({(p, s) for p in range(len(prompts)) for s in range(num_samples)} - set(skip))
        for problem, sample in sorted(asked[-1]):
            text = f"so \\boxed{{{problems[problem].answer if sample % 2 == 0 else 1}}}"
            yield Completion(problem, sample, tokenizer.encode(text), "length" if problem % 5 == 0 else "stop", 0.1)
    monkeypatch.setattr(distill, "generate", fake)
    return asked


@pytest.fixture
def trained_on(monkeypatch):
    """The (question, solution) pairs that went into the token cache."""
    seen, cache = [], distill.token_cache

    def spy(problems, *rest):
        seen[:] = [(p.question, solution_text(p)) for p in problems]
        return cache(problems, *rest)
    monkeypatch.setattr(distill, "token_cache", spy)
    return seen


@pytest.mark.parametrize("filter", [True, False])
def test_students_learn_from_the_teachers_completions(command, told, trained_on, task_file, tmp_path, filter):
    """Of 60 problems, 12 never end; with the filter the right half of the others remains. Red if the task's solutions are
    trained on, if an unfinished text counts as one that ends, or if the filter keeps what is wrong."""
    command("--data", "teacher", "--data-samples", "2", *["--data-filter"] * filter)
    problems = read_problems(task_file)
    right = [(p.question, f"so \\boxed{{{p.answer}}}") for i, p in enumerate(problems) if i % 5]
    wrong = [] if filter else [(question, "so \\boxed{1}") for question, _ in right]
    assert sorted(trained_on) == sorted(right + wrong)
    records = [json.loads(line) for line in (tmp_path / "out" / "teacher-data.jsonl").read_text().splitlines()]
    assert len(records) == 120
    assert list(records[0]) == ["problem", "sample", "question", "gold", "completion", "num_tokens", "finish", "seconds"]


def test_sampling_the_teacher_goes_on_where_it_stopped(command, told, tmp_path):
    """After a cut line, only what is missing is sampled; a second student and more samples use what is there. Red if it
    is sampled twice."""
    command("--data", "teacher", "--data-samples", "2")
    path = tmp_path / "out" / "teacher-data.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:100]) + lines[100][:20])
    command("--data", "teacher", "--data-samples", "2", name="second")
    command("--data", "teacher", "--data-samples", "2", name="third")
    command("--data", "teacher", "--data-samples", "3", name="fourth")
    assert [len(pairs) for pairs in told] == [120, 20, 60]
    assert sorted(path.read_text().splitlines()[:120]) == sorted(line.strip() for line in lines)
    with pytest.raises(ValueError, match="temperature = 0.8 there, 0.5 now"):
        command("--data", "teacher", "--data-temperature", "0.5", name="fifth")


def test_no_completion_left_is_one_clear_line(command, told, monkeypatch):
    monkeypatch.setattr(distill, "is_correct", lambda answer, gold: False)
    with pytest.raises(ValueError, match="no completion in .*teacher-data.jsonl is right: leave out --data-filter"):
        command("--data", "teacher", "--data-filter")


def test_the_teacher_completes_the_prompts_that_the_student_is_trained_on(command, trained_on, tmp_path):
    """With the project's own engine, for real. Red if completion and training use different prompts, or sampling stops at
    another token: every completion that ends, ends in the stop token that is trained on."""
    command("--data", "teacher", "--data-samples", "2", "--data-max-new-tokens", "30")
    records = [json.loads(line) for line in (tmp_path / "out" / "teacher-data.jsonl").read_text().splitlines()]
    good = [(r["question"], r["completion"]) for r in records if r["finish"] == "stop" and "\\boxed" in r["completion"]]
    assert sorted(trained_on) == sorted(good) and len(good) > 40  # the tiny teacher has learnt to end in \boxed{}


# ------------------------------------------------------------------------------------------------ processes
CRASHING = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import data, distill
after, save, saves = int(sys.argv.pop(1)), distill.Run.save, []

def save_and_crash(*arguments):
    save(*arguments)
    saves.append(1)
    if len(saves) == after:
        raise ValueError("crashed on purpose")

distill.Run.save = save_and_crash
data.run(distill.main)
"""


def torchrun(*arguments, cwd):
    """Two processes of one thread, on a free port. The end must come within a minute: red for a hang."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments],
                          cwd=cwd, capture_output=True, text=True, timeout=60, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def options(tiny_options):
    """A batch holds three rows: of four pieces, one has none."""
    return [*tiny_options, "--pretrain-steps", "8", "--student", "pure", "--matrices-steps", "4", "--hidden-steps", "4",
            "--kl-steps", "4", "--sft-steps", "4", "--log-every", "1", "--save-every", "3", "--batch-tokens", "300"]


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "out"
    distill.main([*options, "--out", str(out)])
    return out


@pytest.mark.parametrize("first, after", [("two", 5), ("one", 3)])
def test_processes_come_and_go_and_nothing_changes(options, straight, tmp_path, first, after):
    """Two processes until the KL stage, then one; one until the matrices stage, then two. Losses and weights are those of
    one process throughout. Red if gradients are means of ranks' means, if a rank without rows stops or adds something, if
    FSDP misses the weights of a matrix, or if a checkpoint holds shards."""
    (tmp_path / "crashing.py").write_text(CRASHING)
    crashing = ["crashing.py", str(ROOT), str(after), *options, "--out", "out"]
    if first == "two":
        crashed = torchrun(*crashing, cwd=tmp_path)
        assert crashed.returncode != 0 and crashed.stderr.count("error: crashed on purpose") == 1
    else:
        crashed = subprocess.run([sys.executable, *crashing], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert crashed.returncode == 2
    assert (tmp_path / "out" / "pure" / "training.pt").exists()
    if first == "two":
        distill.main([*options, "--out", str(tmp_path / "out")])
    else:
        done = torchrun(str(ROOT / "distill.py"), *options, "--out", "out", "--accumulate", "2", "--checkpoint-activations",
                        cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("going on at") == 1  # only the first process speaks
    for name in ("teacher", "pure"):
        assert_same_training(straight / name, tmp_path / "out" / name)
        assert sorted(os.listdir(straight / name)) == sorted(os.listdir(tmp_path / "out" / name))


def test_a_mistake_ends_all_processes_with_one_line(tmp_path):
    """Red for a line per process, and for a hang."""
    done = torchrun(str(ROOT / "distill.py"), "--teacher", "nowhere", "--device", "cpu", cwd=tmp_path)
    assert done.returncode != 0 and done.stderr.count("distill.py: error: ") == 1 and "nowhere" in done.stderr
    assert not list(tmp_path.rglob("*.*"))
