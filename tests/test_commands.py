"""What a reader types: the documented commands from start to figures, --help, and mistakes, which end in one line."""
import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import distill
import sample

ROOT = Path(distill.__file__).parent
SCRIPTS = ("distill.py", "sample.py", "grade.py", "plot.py")


def python(*arguments, cwd):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})


# ------------------------------------------------------------------------------------------------ the documented pipeline
@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """The four commands in an empty folder, at tiny size, on the built-in task: {script: what it said}, and out/."""
    folder = tmp_path_factory.mktemp("experiment")
    sizes = {
        "distill.py": ["--pretrain", "--d-model", "32", "--n-layers", "2", "--n-heads", "2", "--d-ff", "64", "--pretrain-steps",
                       "4", "--batch-tokens", "600", "--matrices-steps", "2", "--hidden-steps", "2", "--kl-steps", "2",
                       "--matrix-length", "16", "--log-every", "1"],
        "sample.py": ["--limit", "3", "--num-samples", "4", "--max-new-tokens", "20", "--batch-size", "8"],
        "grade.py": [], "plot.py": []}
    said = {}
    for script in SCRIPTS:
        done = python(str(ROOT / script), *sizes[script], cwd=folder)
        assert done.returncode == 0, f"{script}: {done.stdout}\n{done.stderr}"
        said[script] = done
    return said, folder


def test_the_documented_commands_make_all_files(experiment):
    """distill.py && sample.py && grade.py && plot.py, without a network: everything lands under out/ of the current folder."""
    _, folder = experiment
    assert sorted(os.listdir(folder)) == ["out"]
    out = folder / "out"
    assert sorted(f.name for f in out.iterdir() if f.is_dir()) == ["hybrid", "pure", "teacher"]
    for name in ("teacher", "pure", "hybrid"):
        expected = {"config.json", "model.safetensors", "metrics.jsonl", "samples.jsonl", "samples.json", data.TOKENIZER_FILE}
        assert expected <= {f.name for f in (out / name).iterdir()}
        assert len((out / name / "samples.jsonl").read_text().splitlines()) == 12
    assert {"results.json", "results.md"} <= {f.name for f in out.iterdir() if f.is_file()}
    pictures = list(out.glob("*.png"))
    assert len(pictures) >= 3 and all(f.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for f in pictures)
    assert not list(folder.rglob("*.tmp"))


def test_results_have_the_documented_layout(experiment):
    results = json.loads((experiment[1] / "out" / "results.json").read_text())
    assert results["models"].keys() == {"teacher", "pure", "hybrid"}
    for model in results["models"].values():
        assert {"params", "tokens_per_second", "k", "seconds"} <= model.keys()
        assert model["k"][:3] == [1, 2, 4]
        for name in ("coverage", "majority"):
            for suffix in ("", "_low", "_high"):
                assert len(model[name + suffix]) == len(model["k"])
        assert model["seconds"] == sorted(model["seconds"])


def test_scripts_say_where_they_run_and_where_they_are(experiment):
    """The device with its reason, and one line per logged step: name, stage, step, percent, loss, rate, tokens/s, ETA."""
    said, _ = experiment
    for script in ("distill.py", "sample.py"):
        assert re.search(r"^device: .*chosen automatically.*dtype", said[script].stdout, re.M)
        assert "Traceback" not in said[script].stderr
    line = next(line for line in said["distill.py"].stdout.splitlines() if line.startswith("pure hidden 2/2"))
    for part in (r"100%", r"loss \d", r"lr \d", r"tokens/s", r"eta \d"):
        assert re.search(part, line), part
    assert re.search(r"tokens/s", said["sample.py"].stderr)


def test_a_second_run_of_the_same_command_changes_nothing(experiment):
    """sample.py after everything is there: no sample is added, none is changed."""
    _, folder = experiment
    before = {path: path.read_bytes() for path in folder.rglob("samples.jsonl")}
    done = python(str(ROOT / "sample.py"), "--limit", "3", "--num-samples", "4", "--max-new-tokens", "20", "--batch-size", "8",
                  cwd=folder)
    assert done.returncode == 0 and len(before) == 3
    assert {path: path.read_bytes() for path in folder.rglob("samples.jsonl")} == before


# ------------------------------------------------------------------------------------------------ --help and import
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_option_with_its_default(script, monkeypatch, capsys):
    """Red for an option without help, or help without a default. Needs no GPU, no weights, no out/."""
    parsers = []
    print_help = argparse.ArgumentParser.print_help
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda self, *a: (parsers.append(self), print_help(self, *a)))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert end.value.code == 0
    text, (parser,) = capsys.readouterr().out, parsers
    options = [action for action in parser._actions if action.dest != "help"]
    assert len(options) >= 2 and parser.description
    for action in options:
        name = action.option_strings[-1]
        assert re.fullmatch(r"--[a-z][a-z-]*", name) and name in text  # dashes, not underscores
        entry = re.search(rf"^  {name}\b.*?(?=^  -|\Z)", text, re.M | re.S)[0]
        assert action.help and ("default" in entry or action.nargs == 0), entry
        if action.default not in (None, False):
            shown = " ".join(map(str, action.default)) if isinstance(action.default, list) else str(action.default)
            assert str(action.default) in entry or shown in entry, entry


def test_importing_any_file_prints_nothing_and_starts_nothing(tmp_path):
    """In an empty folder, from a fresh process: no output, no files; and grading and plotting do without PyTorch."""
    code = ("import sys, grade, plot; assert not {'torch', 'triton'} & set(sys.modules); "
            "import kernels, model, data, sample, distill")
    done = python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not os.listdir(tmp_path)


# ------------------------------------------------------------------------------------------------ mistakes
def one_line(error, *parts):
    """What stderr must look like: one line, no traceback, with these parts in it."""
    assert error.endswith("\n") and error.count("\n") == 1 and "Traceback" not in error, error
    for part in parts:
        assert part in error, error


@pytest.fixture
def fails(capsys, monkeypatch, tmp_path):
    """Run a script's main as its __main__ does, in an empty folder; it must end with code 2 and one line."""
    monkeypatch.chdir(tmp_path)

    def run(module, options, *parts):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *options])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            data.run(module.main)
        assert end.value.code == 2
        one_line(capsys.readouterr().err, f"{module.__name__}.py: error: ", *parts)
    return run


@pytest.fixture
def copy_of_tiny_out(tiny_out, tmp_path):
    shutil.copytree(tiny_out, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("script, options, parts", [
    ("distill.py", ["--teacher", "nowhere"], ["nowhere"]),
    ("sample.py", [], ["out/", "python distill.py"]),
    ("grade.py", ["--out", "nowhere"], ["nowhere", "sample.py"]),
    ("plot.py", ["--out", "nowhere"], ["nowhere", "grade.py"]),
], ids=SCRIPTS)
def test_a_mistake_ends_in_one_line_and_exit_code_2(script, options, parts, tmp_path):
    """As a user sees it, in a process of its own; and nothing is left behind."""
    done = python(str(ROOT / script), *options, cwd=tmp_path)
    assert done.returncode == 2
    one_line(done.stderr, f"{script}: error: ", *parts)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("options, parts", [
    (["--model", "nowhere"], ["nowhere"]),
    (["--model", "out/pure", "--task", "nope"], ["'nope'", "arithmetic"]),
    (["--model", "out/pure", "--task", "nope.jsonl"], ["nope.jsonl"]),
    (["--model", "out/pure", "--num-samples", "0"], ["num_samples = 0"]),
    (["--model", "out/pure", "--temperature", "-1"], ["temperature = -1"]),
    (["--out", "empty"], ["empty/", "python distill.py"]),
], ids=str)
def test_mistakes_with_sample(fails, copy_of_tiny_out, options, parts):
    fails(sample, options, *parts)
    assert not list(copy_of_tiny_out.rglob("samples.jsonl"))


@pytest.mark.parametrize("options, parts", [
    (["--attention-layers", "7"], ["--attention-layers 7", "0 to 1"]),
    (["--task", "nope"], ["'nope'", "arithmetic"]),
    (["--task", "nope.jsonl"], ["nope.jsonl"]),
    (["--teacher", "nowhere"], ["nowhere"]),
], ids=str)
def test_mistakes_with_distill(fails, copy_of_tiny_out, options, parts):
    fails(distill, ["--teacher", "out/teacher", "--student", "new", "--kl-steps", "1", *options], *parts)
    assert not (copy_of_tiny_out / "new" / "config.json").exists()


@pytest.mark.parametrize("module", [distill, sample], ids=["distill", "sample"])
def test_a_gpu_that_is_not_there_is_a_mistake(fails, module):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    fails(module, ["--device", "cuda"], "cuda", "--device cpu")


@pytest.mark.parametrize("module", [distill, sample], ids=["distill", "sample"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", data.TOKENIZER_FILE])
def test_an_unreadable_checkpoint_is_named(fails, copy_of_tiny_out, task_file, module, name):
    (copy_of_tiny_out / "teacher" / name).write_text("{not what it was")
    model = ["--teacher", "out/teacher", "--student", "new"] if module is distill else ["--model", "out/teacher", "--limit", "1"]
    fails(module, [*model, "--task", task_file], f"out/teacher/{name}")


@pytest.mark.parametrize("line, part", [("{\"answer\": 1}", "line 2"), ("{\"question\": 1}", "line 2"), ("{\"question", "line 2")])
@pytest.mark.parametrize("module", [distill, sample], ids=["distill", "sample"])
def test_a_bad_line_of_a_task_is_named(fails, copy_of_tiny_out, tmp_path, module, line, part):
    (tmp_path / "mine.jsonl").write_text('{"question": "1 +1", "answer": "2 #### 2"}\n' + line + "\n")
    model = ["--teacher", "out/teacher", "--student", "new"] if module is distill else ["--model", "out/teacher"]
    fails(module, [*model, "--task", "mine.jsonl"], "mine.jsonl", part)


def test_a_task_without_worked_solutions_cannot_be_trained_on(fails, copy_of_tiny_out, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"question": "1 +1", "answer": "2"}\n')
    fails(distill, ["--teacher", "out/teacher", "--student", "new", "--task", "mine.jsonl"], "mine.jsonl", "solution")


def test_other_settings_end_in_one_line_too(fails, copy_of_tiny_out, tiny_options):
    before = {path: path.read_bytes() for path in copy_of_tiny_out.rglob("*") if path.is_file()}
    fails(distill, [*tiny_options, "--pretrain-steps", "61"], "steps = 60 there, 61 now", "--out")
    assert {path: path.read_bytes() for path in copy_of_tiny_out.rglob("*") if path.is_file()} == before


def test_an_interrupt_says_how_to_go_on(capsys, monkeypatch):
    """Ctrl-C is no error of the program: no traceback, and the exit code of a shell."""
    def interrupted():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as end:
        data.run(interrupted)
    assert end.value.code == 130 and "again" in capsys.readouterr().err
