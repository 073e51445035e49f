"""What a reader types and sees: the documented commands from start to figures, options that all do
something, mistakes that end in one line; and the rules that every file of the repository keeps."""
import argparse
import ast
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
import score
import teacher
from conftest import ROOT

FILES = sorted(ROOT.glob("*.py"))
# Each file imports from the left only. deltanet.py is the worked example of a mixer of one's own.
ORDER = ("common decode_kernels hub kernels deltanet data model verdict grade parallel sample "
         "distill plot teacher score bench").split()
OPTIONS = dict(distill=28, sample=18, teacher=18, score=14, bench=14, grade=6, kernels=6, plot=4)


def python(*arguments, cwd):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True,
                          timeout=300, env=os.environ | dict(PYTHONPATH=str(ROOT)))


# ---------------------------------------------------------------------------- the pipeline
def test_the_documented_commands_make_all_files(tmp_path):
    """Without a network, in an empty folder, on the built-in task: everything lands in out/. Every
    script says where it runs and why there."""
    for script, *options in (
            ["distill", "--steps", "matrices=1", "hidden=1", "kl=2", "--log-every", "1"],
            ["sample", "--limit", "3", "--num-samples", "4", "--max-new-tokens", "20"],
            ["score"], ["grade"], ["plot"]):
        done = python(str(ROOT / f"{script}.py"), *options, cwd=tmp_path)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
        if script in ("distill", "sample", "score"):
            assert re.search(r"^device: .*chosen automatically.*dtype", done.stdout, re.M)
    out = tmp_path / "out"
    assert os.listdir(tmp_path) == ["out"] and not list(out.rglob("*.tmp"))
    for name in ("teacher", "pure", "hybrid"):
        assert {"config.json", "model.safetensors", "metrics.jsonl", "training.json",
                "samples.jsonl", "samples.json", "scores.jsonl", "scores.json",
                data.TOKENIZER_FILE} <= set(os.listdir(out / name))
        assert len((out / name / "samples.jsonl").read_text().splitlines()) == 12
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [
        "hybrid", "pure", "teacher"]
    assert json.loads((out / "results.json").read_text())["models"].keys() == {
        "teacher", "pure", "hybrid"}
    pictures = [path.read_bytes() for path in out.glob("*.png")]
    assert len(pictures) >= 3 and all(content[:4] == b"\x89PNG" for content in pictures)


@pytest.mark.parametrize("script, options, parts", [
    ("distill", ["--teacher", "nowhere"], ["nowhere"]), ("sample", [], ["out/", "distill.py"]),
    ("score", [], ["out/", "sample.py"]), ("grade", ["--out", "nowhere"], ["nowhere", "sample.py"]),
    ("plot", ["--out", "nowhere"], ["nowhere", "grade.py"]),
    ("teacher", ["--lr", "x"], ["--lr", "'x' is not a number"])])
def test_a_mistake_ends_in_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, script, options,
                                                   parts):
    """As __main__ runs it, in an empty folder, where nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *options])
    monkeypatch.setattr("signal.signal", lambda *_: None)  # pytest keeps its own handlers
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith(f"{script}.py: error: ")
    assert error.count("\n") == 1 and all(part in error for part in parts)
    assert not list(tmp_path.rglob("*.*"))


# ---------------------------------------------------------------------------- options
def parser_of(script):
    """The parser behind a script's --help, and what it prints."""
    found, printed = [], argparse.ArgumentParser.print_help
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "print_help",
                      lambda self, *to: (found.append(self), printed(self, *to)))
        patch.setattr(sys, "argv", [f"{script}.py", "--help"])
        patch.setattr("signal.signal", lambda *_: None)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert not end.value.code
    return found[0]


def options_of(script):
    return [action for action in parser_of(script)._actions if action.dest != "help"]


@pytest.mark.parametrize("script", OPTIONS)
def test_help_explains_every_option_and_there_are_not_too_many(script, capsys):
    """Names have dashes; the script's docstring and every default are shown."""
    options = options_of(script)
    text = " ".join(capsys.readouterr().out.split())
    assert len(options) <= OPTIONS[script]
    for action in options:
        name = (action.option_strings or [action.metavar])[-1]
        assert re.fullmatch(r"--[a-z][a-z-]*|[A-Z]+", name) and name in text and action.help, name
        if action.default not in (None, False, []):
            shown = f"(default: {action.default})"
            assert shown in text or re.sub(r"[\[\]']", "", shown) in text, name


@pytest.fixture
def world(tmp_path, tiny_out, monkeypatch):
    """A folder with models, a samples.jsonl that is also a task (a question twice, a wrong answer,
    two steps each), and counters of what leaves no trace in a file."""
    shutil.copytree(tiny_out, tmp_path / "models")
    rows = [dict(problem=i // 2, sample=i % 2, question=f"{i // 2} +1", gold=str(i // 2 + 1),
                 completion=f"so{i}\n\n\\boxed{{{(i // 2 + 1) * (i != 3)}}}", num_tokens=3,
                 finish="stop", seconds=0.1) for i in range(60)]
    for path in tmp_path / "samples.jsonl", tmp_path / "models" / "pure" / "samples.jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompt").write_text("Q: {question}")
    monkeypatch.chdir(tmp_path)
    counts = []

    def count(owner, name, note=lambda *arguments: ()):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments, **named: (
            counts.append((name, *note(*arguments))), function(*arguments, **named))[1])
    count(distill.Progress, "save")
    count(distill.Batch, "piece")
    count(torch.utils.checkpoint, "checkpoint")
    count(sample.Batch, "__init__", lambda self, lm, size, *_: [size])
    count(score, "judge_batch")
    monkeypatch.setattr(torch, "compile", lambda f: (counts.append("compile"), f)[1])
    return counts


FOLDERS = "out", "new", "other"


def outcome(counts, capsys, main, arguments):
    """All that a run leaves, but for the time and the mere record of its settings, or its error."""
    for folder in FOLDERS:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree("models", "out")
    counts.clear(), capsys.readouterr()
    try:
        main(arguments)
    except (ValueError, OSError, SystemExit) as error:
        return str(error)
    files = {str(path): path.read_bytes() for folder in FOLDERS
             for path in Path(folder).rglob("*.*") if path.suffix != ".json"}
    for path in [path for path in files if path.endswith(".jsonl")]:
        files[path] = re.sub(rb'"(seconds|tokens_per_second)": [^,}]*', b"", files[path])
    device = [x for x in capsys.readouterr().out.splitlines() if x.startswith("device")]
    return files, device, list(counts)


DATA = [["--task", "nowhere.jsonl"], ["--limit", "3"], ["--subset-seed", "1"], ["--only-right"],
        ["--prompt-file", "prompt"]]
HARDWARE = [["--device", "cuda"], ["--dtype", "bfloat16"], ["--accumulate", "2"],
            ["--checkpoint-activations"], ["--compile"], ["--log-every", "2"],
            ["--save-every", "1"], ["--out", "other"]]
LEARN = [["--lr", "0.1"], ["--batch-tokens", "99"], ["--seed", "1"], ["--size", "small"]]
TRAIN = ["--task", "samples.jsonl", "--limit", "20", "--device", "cpu", "--log-every", "1",
         "--batch-tokens", "300"]
WALK = {  # script -> (what it is called with, an option more for each run)
    "distill": (distill.main, [*TRAIN, "--teacher", "models/teacher", "--student", "new", "--steps",
                               "2"], [
        ["--student", "x"], ["--teacher", "nowhere"], ["--recipe", "mambainllama"],
        ["--mixer", "mamba"], ["--attention-layers", "0"], ["--d-state", "4"], ["--random-mixers"],
        ["--steps", "kl=3"], ["--scale", "0.01", "--steps", "kl=2"], ["--kl", "reverse"],
        *LEARN, *DATA, *HARDWARE]),
    "teacher": (teacher.main, [*TRAIN, "--steps", "2", "--out", "new"], [
        ["--from", "models/teacher"], ["--steps", "3"], *LEARN, *DATA[:3], *DATA[4:],
        *HARDWARE]),
    "sample": (sample.main, ["--model", "models/pure", "--task", "samples.jsonl", "--limit", "4",
                             "--num-samples", "2", "--max-new-tokens", "9", "--device", "cpu",
                             "--out", "new"], [
        ["--model", "models/hybrid"], ["--split", "train"], ["--num-samples", "3"],
        ["--seconds", "0.1", "--num-samples", "99999"], ["--max-new-tokens", "8"],
        ["--temperature", "0"], ["--top-k", "1"], ["--top-p", "0.01"], ["--seed", "1"],
        ["--batch-size", "3"], *(o for o in DATA if o[0] != "--only-right"), *HARDWARE[:2],
        ["--out", "other"]]),
    "score": (score.main, ["models/teacher", "--kind", "process", "--device", "cpu"], [
        ["MODEL"], ["--kind", "likelihood"], ["--aggregate", "prod"], ["--model", "hybrid"],
        ["--to", "x.jsonl"], ["--tokens", "50"], ["--out", "other"], *HARDWARE[:2]])}


@pytest.mark.parametrize("script", WALK)
def test_every_option_does_something_or_ends_in_an_error(world, capsys, script):
    """Other weights, texts, scores, files or calls; recording a setting is not enough. The same
    command twice leaves the same, so that a difference means something."""
    main, base, walk = WALK[script]
    known = {(action.option_strings or [action.metavar])[-1] for action in options_of(script)}
    assert {options[0] for options in walk} == known
    expected = outcome(world, capsys, main, base)
    assert not isinstance(expected, str), expected
    assert outcome(world, capsys, main, base) == expected
    for options in walk:
        changed = [*base, *options] if options != ["MODEL"] else ["models/pure", *base[1:]]
        assert outcome(world, capsys, main, changed) != expected, options


# ---------------------------------------------------------------------------- rules for all files
def test_importing_any_file_prints_nothing_and_starts_nothing(tmp_path):
    """No output, file, thread or process; grading and plotting do without PyTorch."""
    names = sorted((path.stem for path in FILES), key=ORDER.index)
    light = [name for name in names if name in ("common", "verdict", "grade", "plot")]
    code = (f"import {', '.join(light)}, sys, threading, multiprocessing; "
            f"assert not {{'torch', 'triton'}} & set(sys.modules); import {', '.join(names)}; "
            f"assert threading.active_count() == 1 and not multiprocessing.active_children()")
    done = python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_imports_only_from_those_before_it(path):
    """So there is no circle. Imports inside functions count; strings and comments do not."""
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [
            node.module] if isinstance(node, ast.ImportFrom) else []
        for module in set(modules) & {file.stem for file in FILES}:
            assert ORDER.index(module) < ORDER.index(path.stem), f"line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_functions_are_short_and_take_what_they_need_by_name(path):
    """At most 60 lines, a Triton kernel 85; `args` ends right below main."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            name = getattr(node, "name", "lambda")
            most = 85 if name.endswith("_kernel") else 60
            assert node.end_lineno - node.lineno < most, name
            names = {argument.arg for argument in ast.walk(node.args)
                     if isinstance(argument, ast.arg)}
            assert "args" not in names or name.endswith("_of"), name


@pytest.mark.parametrize("path", [*FILES, *sorted(ROOT.glob("tests/*.py"))],
                         ids=lambda path: path.name)
def test_no_line_is_over_100_columns(path):
    long = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert not long
