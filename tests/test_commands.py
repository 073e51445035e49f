"""What a reader types and sees, and the rules that every file of the repository keeps."""
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

import distill
import sample
import score
import teacher
from conftest import ROOT
from model import LM

FILES, TESTS = sorted(ROOT.glob("*.py")), sorted(ROOT.glob("tests/*.py"))
ORDER = ("common decode_kernels hub kernels deltanet data model verdict grade parallel sample "
         "distill plot teacher score bench").split()


def python(*arguments, cwd):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True,
                          timeout=300, env=os.environ | dict(PYTHONPATH=str(ROOT)))


def test_the_documented_commands_make_all_files(tmp_path):
    """In out/, without a network, on the built-in task; and they say where they run."""
    for command in ("distill.py --steps matrices=1 hidden=1 kl=2 --log-every 1",
                    "sample.py --limit 3 --num-samples 4 --max-new-tokens 20",
                    "score.py", "grade.py", "plot.py"):
        script, *options = command.split()
        done = python(ROOT / script, *options, cwd=tmp_path)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
        assert ("device: " in done.stdout) == (script not in ("grade.py", "plot.py"))
    out, models = tmp_path / "out", {"hybrid", "pure", "teacher"}
    assert os.listdir(tmp_path) == ["out"] and not list(out.rglob("*.tmp"))
    assert [path.read_text().count("\n") for path in out.glob("*/s*.jsonl")] == [12] * 6
    assert json.loads((out / "results.json").read_text())["models"].keys() == models
    assert len(list(out.glob("*.png"))) >= 3


def run_as_main(patch, script, *options):
    """The exit code of a script that is run as by `python script.py`."""
    patch.setattr(sys, "argv", [f"{script}.py", *options])
    patch.setattr("signal.signal", lambda *_: None)  # pytest keeps its own handlers
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize("script, options, said", [
    ("distill", "--teacher nowhere", "nowhere"), ("sample", "", "run python distill.py first"),
    ("score", "", "sample.py"), ("grade", "--out nowhere", "sample.py"),
    ("plot", "--out nowhere", "grade.py"), ("teacher", "--lr x", "--lr: 'x' is not a number")])
def test_a_mistake_is_one_line(monkeypatch, capsys, tmp_path, script, options, said):
    monkeypatch.chdir(tmp_path)
    assert run_as_main(monkeypatch, script, *options.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{script}.py: error: ") and error.count("\n") == 1 and said in error
    assert not list(tmp_path.rglob("*.*"))


def options_of(patch, script):
    """The options that a script's --help prints, as argparse keeps them."""
    parsers, printed = [], argparse.ArgumentParser.print_help
    patch.setattr(argparse.ArgumentParser, "print_help",
                  lambda self, *to: (parsers.append(self), printed(self, *to)))
    assert not run_as_main(patch, script, "--help")
    return {(action.option_strings or [action.metavar])[-1]: action
            for action in parsers[-1]._actions if action.dest != "help"}


@pytest.mark.parametrize("script, most", dict(
    distill=28, sample=18, teacher=18, score=14, bench=14, grade=6, kernels=6, plot=4).items())
def test_help_explains_every_option_and_there_are_not_too_many(script, most, monkeypatch, capsys):
    options = options_of(monkeypatch, script)
    text = " ".join(capsys.readouterr().out.split())
    assert len(options) <= most
    for name, action in options.items():
        assert re.fullmatch(r"--[a-z][a-z-]*|[A-Z]+", name) and name in text and action.help, name
        assert action.default in (None, False, []) or f"(default: {action.default})" in text, name


@pytest.fixture
def world(tmp_path, tiny_out, monkeypatch):
    """A folder with models and a samples.jsonl that is a task; calls that leave no trace there."""
    shutil.copytree(tiny_out, tmp_path / "models")
    rows = [dict(problem=i // 2, sample=i % 2, question=f"{i // 2} +1", gold=str(i // 2 + 1),
                 completion=f"so{i}\n\n\\boxed{{{(i // 2 + 1) * (i != 3)}}}", num_tokens=3,
                 finish="stop", seconds=0.1) for i in range(60)]
    monkeypatch.chdir(tmp_path)
    for path in "samples.jsonl", "models/pure/samples.jsonl":
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("prompt").write_text("Q: {question}")
    Path("models/pure/samples.json").write_text('{"settings": {"prompt": "{question}"}}')
    monkeypatch.setattr(torch, "compile", lambda f: f)
    counts = []
    for owner, name in ((distill.Progress, "save"), (distill.Batch, "piece"), (torch, "compile"),
                        (torch.utils.checkpoint, "checkpoint"), (sample.Batch, "__init__"),
                        (score, "judge_batch")):
        def counted(*values, of=getattr(owner, name), name=name, **named):
            counts.append((name, *(getattr(x, "state_dtype", x) for x in values
                                   if isinstance(x, (int, LM)))))
            return of(*values, **named)
        monkeypatch.setattr(owner, name, counted)
    return counts


def outcome(counts, capsys, main, arguments):
    """All that a run leaves, but for the time and the mere record of its settings, or its error."""
    for folder in (folders := ("out", "new", "other")):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree("models", "out")
    counts.clear(), capsys.readouterr()
    try:
        main(arguments)
    except (ValueError, OSError, SystemExit) as error:
        return str(error)
    files = {path: re.sub(rb'"(seconds|tokens_per_second)": [^,}]*', b"", path.read_bytes())
             for folder in folders for path in Path(folder).rglob("*.*") if path.suffix != ".json"}
    return files, re.findall(r"^device.*", capsys.readouterr().out, re.M), list(counts)


MACHINE = "--device cuda, --dtype bfloat16, --out other"
DATA = "--task nowhere.jsonl, --limit 3, --subset-seed 1, --prompt-file prompt, " + MACHINE
TRAIN = """--lr 0.1, --batch-tokens 99, --seed 1, --size small, --accumulate 2, --compile,
    --checkpoint-activations, --log-every 2, --save-every 1, """ + DATA
SHORT = "--task samples.jsonl --limit 20 --device cpu --log-every 1 --batch-tokens 300 --steps 2"
WALK = {  # what a script is called with, and an option more for each other call
    distill: f"""{SHORT} --teacher models/teacher --student new, --student x, --teacher nowhere,
        --recipe mambainllama, --mixer mamba, --attention-layers 0, --d-state 4, --random-mixers,
        --steps kl=3, --scale 0.01 --steps kl=2, --kl reverse, --only-right, {TRAIN}""",
    teacher: f"{SHORT} --out new, --from models/teacher, --steps 3, {TRAIN}",
    sample: f"""--model models/pure --task samples.jsonl --limit 4 --num-samples 2 --out new
        --max-new-tokens 9 --device cpu, --model models/hybrid, --split train, --num-samples 3,
        --seconds 0.1 --num-samples 99999, --max-new-tokens 8, --temperature 0, --top-k 1,
        --top-p 0.01, --seed 1, --batch-size 3, --state-dtype bfloat16, {DATA}""",
    score: f"""models/teacher --kind process --device cpu, MODEL, --kind likelihood,
        --aggregate prod, --model hybrid, --to x.jsonl, --tokens 50, {MACHINE}"""}


@pytest.mark.parametrize("script", WALK, ids=lambda script: script.__name__)
def test_every_option_does_something_or_ends_in_an_error(world, monkeypatch, capsys, script):
    """Other weights, texts, scores, files or calls: recording a setting is not enough."""
    base, *walk = (options.split() for options in WALK[script].split(","))
    assert {name for name, *_ in walk} == set(options_of(monkeypatch, script.__name__))
    expected = outcome(world, capsys, script.main, base)
    assert not isinstance(expected, str) and outcome(world, capsys, script.main, base) == expected
    for options in walk:
        changed = [*base, *options] if options != ["MODEL"] else ["models/pure", *base[1:]]
        assert outcome(world, capsys, script.main, changed) != expected, options


def test_importing_any_file_prints_nothing_and_starts_nothing(tmp_path):
    """No output, file, thread or process; grading and plotting do without PyTorch."""
    done = python("-c", f"""import common, verdict, grade, plot, sys, threading, multiprocessing
assert not {{'torch', 'triton'}} & set(sys.modules)
import {', '.join(path.stem for path in FILES)}
assert threading.active_count() == 1 and not multiprocessing.active_children()""", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not os.listdir(tmp_path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_imports_what_is_before_it_and_its_functions_are_short(path):
    """So there is no circle; imports inside functions count. `args` ends right below main."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for module in {getattr(node, "module", None), *(alias.name for alias in node.names)}:
                if (ROOT / f"{module}.py").exists():
                    assert ORDER.index(module) < ORDER.index(path.stem), f"line {node.lineno}"
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            name = getattr(node, "name", "lambda")
            assert node.end_lineno - node.lineno < (85 if name.endswith("_kernel") else 60), name
            names = {getattr(argument, "arg", None) for argument in ast.walk(node.args)}
            assert "args" not in names, name


def test_the_house_is_as_small_as_it_was_drawn():
    """For those who read: characters outside tests, lines of an afternoon, of tests, columns."""
    assert sum(len(path.read_text()) for path in FILES) <= 250_000
    above = [text for name in "model kernels data distill sample grade plot".split() for text, _ in
             [(ROOT / f"{name}.py").read_text().split("\n# ---- first reading ends here: ")]]
    assert sum(len(text.splitlines()) for text in above) <= 1_700
    assert sum(len(path.read_text().splitlines()) for path in TESTS) <= 5_300
    for path in [*FILES, *TESTS]:
        assert max(map(len, path.read_text().splitlines())) <= 100, path


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("script", ["distill.py", "plot.py"])
def test_ctrl_c_while_torch_or_matplotlib_loads_is_one_line(script, tmp_path):
    """Before run() is there: the handler of common.py, which scripts import first."""
    code = f"""import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, *rest):
        if name in ("torch", "matplotlib"):
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = [{str(ROOT / script)!r}]
runpy.run_path(sys.argv[0], run_name="__main__")"""
    done = python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")
