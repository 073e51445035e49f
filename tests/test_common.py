"""What common.py promises: mistakes in one line, files replaced whole, runs that do not mix."""
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import common
from conftest import ROOT


def python(code):
    return subprocess.run([sys.executable, "-c", f"import common, os\n{code}"], cwd=ROOT,
                          text=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("error, code, words", [
    (ValueError("what was\nwrong"), 2, "x.py: error: what was wrong\n"),
    (FileNotFoundError(2, "No such file", "a.json"), 2, "x.py: error: [Errno 2] No such file"),
    (ModuleNotFoundError("No module named 'peer'"), 2, "x.py: error: No module named 'peer'\n"),
    (RuntimeError("CUDA out of memory. Tried to"), 2, "x.py: error: out of memory: lower --rows\n"),
    (RuntimeError("can't allocate memory: you tried"), 2, "lower --rows\n"),
    (KeyboardInterrupt(), 130, "interrupted: run the same command again to go on\n"),
    (SystemExit(3), 3, ""), (SystemExit(None), None, "")], ids=repr)
def test_every_end_has_its_exit_code_and_line(monkeypatch, capsys, error, code, words):
    monkeypatch.setattr(sys, "argv", ["/somewhere/x.py"])
    monkeypatch.setattr(common.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        common.run(Mock(side_effect=error), "--rows")
    out, err = capsys.readouterr()
    assert end.value.code == code and words in err and bool(words) == bool(err)
    assert not out and err.count("\n") <= 2
    with pytest.raises(RuntimeError, match="shapes"):  # an error of the program is no mistake
        common.run(Mock(side_effect=RuntimeError("shapes do not fit")))


@pytest.mark.parametrize("options, said", [
    ("", "\ninterrupted: run the same command again to go on\n"), ("child=True", ""),
    ("resumes=False", "\ninterrupted\n")])
def test_a_termination_ends_like_an_interruption(options, said):
    """Only of what goes on is that said, and of a child nothing: its parent speaks."""
    done = python(f"common.run(lambda: os.kill(os.getpid(), 15), {options})")
    assert (done.returncode, done.stderr) == (143, said)


def parse(*arguments):
    add = (parser := common.Parser("What it does.")).add_argument
    add("--count", type=common.number(1, 9), default=3, help="so many")
    add("--rate", type=common.number(0, 1, float), default=0, help="so fast")
    add("--name", type=common.folder_name, help="of a folder")
    add("--list", nargs="*", default=[], help="of things")
    add("--flag", action="store_true", help="or not")
    return parser.parse_args(arguments)


@pytest.mark.parametrize("arguments, words", [
    ("--count=0", "--count: 0 is out of range, 1 to 9"), ("--count=10", "range"),
    ("--count=2.5", "'2.5' is not a whole number"), ("--count=", "whole number"),
    ("--rate=nan", "nan is out of range, 0 to 1"), ("--rate=x", "'x' is not a number"),
    *((f"--name={name}", "is not a plain name") for name in ("", ".", "..", "a/b", "x.tmp", "a\0")),
    ("--unknown", "unrecognized arguments: --unknown (see --help)")])
def test_an_option_out_of_range_is_one_line(capsys, arguments, words):
    with pytest.raises(SystemExit, match="2"):
        parse(arguments)
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_help_shows_the_docstring_and_defaults_that_say_something(capsys):
    assert parse("--count=9", "--rate=1", "--name=a.b").name == "a.b"
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "What it does." in text and "many (default: 3)" in text and "fast (default: 0)" in text
    assert text.count("default") == 2


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b"7", b"null", b'"a"', b'{"a": NaN}',
                                     b'{"a": Infinity}', b'{"a": "\xff"}', b"[" * 100_000])
def test_json_that_is_no_object_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match="a.json") as error:
        common.read_json(str(tmp_path / "a.json"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_json_is_read_as_others_write_it(tmp_path):
    """With a byte-order mark, a list, lines that end as on Windows, or a last line that is torn."""
    path = str(tmp_path / "a.json")
    assert common.read_jsonl(path) == []
    common.write_bytes(path, "\ufeff{\"a\": \"é\"}".encode())
    assert common.read_json(path) == dict(a="é")
    common.write_bytes(path, b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert common.read_jsonl(path, dict(a=int)) == [dict(a=1), dict(a=2)]
    assert common.read_jsonl(path, torn=True) == [dict(a=1)]
    assert [where for where, _ in common.json_lines(path)] == [f"{path}, line {i}" for i in (1, 4)]


@pytest.mark.parametrize("name, value", [
    ("text", 1), ("text", None), ("count", -1), ("count", 1.0), ("count", True), ("count", False),
    ("count", "1"), ("score", "1"), ("score", True), ("score", None), ("score", [1])], ids=str)
def test_a_field_of_another_kind_is_named_by_file_line_and_field(tmp_path, name, value):
    path, good = str(tmp_path / "a.jsonl"), dict(text="", count=0, score=-1, more=None)
    common.write_bytes(path, b"\n".join(map(common.json_line, (good, good | {name: value}))))
    with pytest.raises(ValueError, match=f"a.jsonl, line 3: {name} is .*, expected"):
        common.read_jsonl(path, dict(text=str, count=int, score=float))
    with pytest.raises(ValueError, match="line 1: other is missing, expected text"):
        common.read_jsonl(path, dict(other=str))


def test_files_are_replaced_whole(tmp_path):
    """What cannot be written leaves the old file, and nothing else; NaN is not JSON."""
    path = str(tmp_path / "new" / "a.json")
    common.write_json(path, dict(a=1))
    with pytest.raises(ValueError):
        common.write_json(path, dict(a=math.nan))
    with pytest.raises(ZeroDivisionError):
        common.replace_file(path, lambda temporary: Path(temporary).write_text("half") / 0)
    assert common.read_json(path) == dict(a=1) and os.listdir(tmp_path / "new") == ["a.json"]


def test_two_runs_do_not_mix(tmp_path):
    """What differs is named with both values; what has not begun refuses nobody."""
    path, first = str(tmp_path / "a.json"), dict(lr=0.1, layers=[0], old=1)
    for written in first, dict(settings=first):
        common.write_json(path, written)
        common.same_settings(path, dict(lr=0.1, layers=(0,), old=1), True)
        common.same_settings(path, dict(lr=0.2), False)
        with pytest.raises(ValueError, match=r"\(lr = 0.1 there, 0.2 now; new = None there, 2 now; "
                                             r"old = 1 there, None now\): .*--out"):
            common.same_settings(path, dict(lr=0.2, layers=[0], new=2), True)
    for wrong in 3, [], None:
        common.write_json(path, dict(settings=wrong))
        with pytest.raises(ValueError, match="a.json: settings is .*, expected an object"):
            common.same_settings(path, first, True)


def test_a_folder_has_one_process_which_tidies_up(tmp_path):
    """Another one is refused; what a killed one left half-written is removed."""
    folder = tmp_path / "new"
    with common.locked(str(folder)):
        done = python(f"with common.locked({str(folder)!r}): print('in')")
        assert "another process is working in" in done.stderr and not done.stdout
        (folder / "a.json.123.tmp").touch(), (folder / "a.json").touch()
    with common.locked(str(folder)):
        assert os.listdir(folder) == ["a.json"]


def test_finished_models_are_found_teacher_first(tmp_path):
    for name in ("pure/config.json", "teacher/config.json", "hybrid/config.json",
                 "new/training.pt", "a.tmp/config.json"):
        common.write_bytes(str(tmp_path / name), b"")
    assert common.find_models(str(tmp_path)) == [
        str(tmp_path / name) for name in ("teacher", "hybrid", "pure")]
    for folder in "none", "pure":
        with pytest.raises(ValueError, match="python distill.py first"):
            common.find_models(str(tmp_path / folder))


def test_the_device_is_said_with_its_reason(capsys):
    for name, dtype in (None, torch.float32), ("bfloat16", torch.bfloat16):
        assert common.choose_device("cpu", name) == (torch.device("cpu"), dtype)
    common.choose_device()
    said = capsys.readouterr().out
    assert said.count("device: ") == said.count("asked for") == 3 and "chosen automatically" in said
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cpu"):
            common.choose_device("cuda")


@pytest.mark.parametrize("capability, dtype", [(7, torch.float32), (8, torch.bfloat16)])
def test_a_gpu_that_only_emulates_bfloat16_gets_float32(monkeypatch, capability, dtype):
    for name, found in (("is_available", True), ("get_device_capability", (capability, 5)),
                        ("get_device_name", "T4")):
        monkeypatch.setattr(torch.cuda, name, lambda *device, found=found: found)
    assert common.choose_device() == (torch.device("cuda"), dtype)


def test_a_standard_output_that_is_no_file_is_no_mistake(monkeypatch):
    """A notebook's, or a closed one."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for stdout in None, object():
        monkeypatch.setattr(sys, "stdout", stdout)
        assert common.run(lambda: 7) == 7


def test_checksums_tell_texts_and_bytes_apart():
    assert len({common.crc(content) for content in ("", "1", "1 ", "é", "\ud800")}) == 5
    assert common.crc("é") == common.crc("é".encode()) and len(common.crc("é")) == 8
