"""What common.py promises: a mistake is one line that names file, line and field, files are
replaced whole, two runs do not mix, and a folder has one process."""
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

import common
from conftest import ROOT


# ---------------------------------------------------------------------------- ends
@pytest.mark.parametrize("error, code, words", [
    (ValueError("what was\nwrong"), 2, "x.py: error: what was wrong\n"),
    (FileNotFoundError(2, "No such file", "a.json"), 2, "x.py: error: [Errno 2] No such file"),
    (RuntimeError("CUDA out of memory. Tried to"), 2, "x.py: error: out of memory: lower --rows\n"),
    (RuntimeError("can't allocate memory: you tried"), 2, "lower --rows\n"),
    (KeyboardInterrupt(), 130, "interrupted: run the same command again to go on\n"),
    (SystemExit(143), 143, "interrupted: run the same command again"),
    (SystemExit(3), 3, ""), (SystemExit(None), None, ""),
], ids=repr)
def test_every_end_has_its_exit_code_and_line(monkeypatch, capsys, error, code, words):
    def main():
        raise error
    monkeypatch.setattr(sys, "argv", ["/somewhere/x.py"])
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        with pytest.raises(SystemExit) as end:
            common.run(main, "--rows")
        assert end.value.code == code
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers):
            signal.signal(number, handler)
    found = capsys.readouterr()
    assert words in found.err and found.err.count("\n") <= 2 and not found.out
    assert bool(words) == bool(found.err)


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        common.run(lambda: (_ for _ in ()).throw(RuntimeError("shapes do not fit")))


def test_a_termination_ends_like_a_mistake():
    """As kill and a shell's background job send it; a second thought of the parent of a child."""
    code = "import common, os, sys; common.run(lambda: os.kill(os.getpid(), 15), child={})"
    for child, said in (False, "interrupted"), (True, ""):
        done = subprocess.run([sys.executable, "-c", code.format(child)], cwd=ROOT, text=True,
                              capture_output=True, timeout=60)
        assert done.returncode == 143 and said in done.stderr and bool(said) == bool(done.stderr)


# ---------------------------------------------------------------------------- options
def parse(*arguments):
    parser = common.Parser("What it does.")
    parser.add_argument("--count", type=common.number(1, 9), default=3, help="so many")
    parser.add_argument("--rate", type=common.number(0, 1, float), default=0, help="so fast")
    parser.add_argument("--name", type=common.folder_name, help="of a folder")
    parser.add_argument("--list", nargs="*", default=[], help="of things")
    parser.add_argument("--flag", action="store_true", help="or not")
    return parser.parse_args(arguments)


@pytest.mark.parametrize("arguments, words", [
    (["--count", "0"], "--count: 0 is out of range, 1 to 9"), (["--count", "10"], "range"),
    (["--count", "2.5"], "'2.5' is not a whole number"), (["--count", ""], "whole number"),
    (["--rate", "nan"], "nan is out of range, 0 to 1"), (["--rate", "x"], "'x' is not a number"),
    *((["--name", name], "is not a plain name") for name in ("", ".", "..", "a/b", "x.tmp", "a\0")),
    (["--unknown"], "unrecognized arguments: --unknown (see --help)"),
], ids=str)
def test_an_option_out_of_range_is_one_line(capsys, arguments, words):
    with pytest.raises(SystemExit) as end:
        parse(*arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and words in error and error.count("\n") == 1


def test_help_shows_the_docstring_and_defaults_that_say_something(capsys):
    assert parse("--count", "9", "--rate", "1", "--name", "a.b").name == "a.b"
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "What it does." in text and "so many (default: 3)" in text
    assert "so fast (default: 0)" in text and text.count("default") == 2


# ---------------------------------------------------------------------------- JSON
@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b"7", b"null", b'"a"', b'{"a": NaN}',
                                     b'{"a": Infinity}', b'{"a": "\xff"}', b"[" * 100_000])
def test_json_that_is_no_object_is_named(tmp_path, content):
    path = str(tmp_path / "a.json")
    with open(path, "wb") as f:
        f.write(content)
    with pytest.raises(ValueError, match="a.json") as error:
        common.read_json(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_json_is_read_as_others_write_it(tmp_path):
    """With a byte-order mark, a list where one is asked for, lines that end as on Windows."""
    path = str(tmp_path / "a.json")
    common.write_bytes(path, "\ufeff{\"a\": \"é\"}".encode())
    assert common.read_json(path) == dict(a="é")
    common.write_json(path, [1])
    assert common.read_json(path, list) == [1]
    common.write_bytes(path, b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}\r\n')
    assert common.read_jsonl(path, dict(a=int)) == [dict(a=1), dict(a=2)]
    assert [where for where, _ in common.json_lines(path)] == [f"{path}, line {i}" for i in (1, 4)]


FIELDS = dict(text=str, count=int, score=float)


@pytest.mark.parametrize("name, value", [
    ("text", 1), ("text", None), ("count", -1), ("count", 1.0), ("count", True), ("count", False),
    ("count", "1"), ("score", "1"), ("score", True), ("score", None), ("score", [1])], ids=str)
def test_a_field_of_another_kind_is_named_by_file_line_and_field(tmp_path, name, value):
    good = dict(text="", count=0, score=-1, more=None)
    path = str(tmp_path / "a.jsonl")
    lines = common.json_line(good), b"\n", common.json_line(good | {name: value})
    common.write_bytes(path, b"".join(lines))
    with pytest.raises(ValueError, match=f"a.jsonl, line 3: {name} is .*, expected"):
        common.read_jsonl(path, FIELDS)
    del good[name]
    common.write_bytes(path, common.json_line(good))
    with pytest.raises(ValueError, match=f"line 1: {name} is missing"):
        common.read_jsonl(path, FIELDS)


def test_a_torn_last_line_is_left_out_where_a_kill_may_have_cut_it(tmp_path):
    path = str(tmp_path / "a.jsonl")
    common.write_bytes(path, b'{"a": 1}\n{"a": 2}')
    assert common.read_jsonl(path, torn=True) == [dict(a=1)]
    assert common.read_jsonl(path) == [dict(a=1), dict(a=2)]
    assert common.read_jsonl(str(tmp_path / "none.jsonl")) == []


# ---------------------------------------------------------------------------- files and runs
def test_files_are_replaced_whole(tmp_path):
    """What cannot be written leaves the old file, and nothing else; NaN is not JSON."""
    path = str(tmp_path / "new" / "a.json")
    common.write_json(path, dict(a=1))
    for value, error in ((object(), TypeError), (math.nan, ValueError)):
        with pytest.raises(error):
            common.write_json(path, dict(a=value))

    def half(temporary):
        with open(temporary, "w") as f:
            f.write('{"a"')
        assert common.read_json(path) == dict(a=1)
        raise OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        common.replace_file(path, half)
    assert common.read_json(path) == dict(a=1) and os.listdir(tmp_path / "new") == ["a.json"]


def test_two_runs_do_not_mix(tmp_path):
    """Every setting that differs is named with both values; tuples are lists to a file; a run that
    has not begun refuses nobody."""
    path = str(tmp_path / "a.json")
    first = dict(lr=0.1, layers=[0], old=1)
    for written in (first, dict(settings=first)):
        common.write_json(path, written)
        common.same_settings(path, dict(lr=0.1, layers=(0,), old=1), True)
        with pytest.raises(ValueError) as error:
            common.same_settings(path, dict(lr=0.2, layers=[0], new=2), True)
        for part in ("lr = 0.1 there, 0.2 now", "new = None there, 2 now", "old = 1 there",
                     "--out"):
            assert part in str(error.value)
        assert "layers" not in str(error.value)
        common.same_settings(path, dict(lr=0.2), False)


def test_a_folder_has_one_process_which_tidies_up(tmp_path):
    """Another one is refused; what a killed one left half-written is removed."""
    folder = tmp_path / "new"
    with common.locked(str(folder)):
        code = f"import common\nwith common.locked({str(folder)!r}): print('in')"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True,
                              capture_output=True, timeout=60)
        assert "another process is working in" in done.stderr and not done.stdout
        (folder / "a.json.123.tmp").touch(), (folder / "a.json").touch()
    with common.locked(str(folder)):
        assert os.listdir(folder) == ["a.json"]


def test_finished_models_are_found_teacher_first(tmp_path):
    for name in ("pure", "teacher", "hybrid", "unfinished", "a.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("training.pt" if name == "unfinished" else "config.json")).touch()
    found = common.find_models(str(tmp_path))
    assert [os.path.basename(folder) for folder in found] == ["teacher", "hybrid", "pure"]
    for folder in (tmp_path / "none", tmp_path / "pure"):
        with pytest.raises(ValueError, match="python distill.py first"):
            common.find_models(str(folder))


def test_the_device_is_said_with_its_reason(capsys):
    assert common.choose_device("cpu") == (torch.device("cpu"), torch.float32)
    assert "device: cpu (" in (said := capsys.readouterr().out) and "asked for" in said
    assert common.choose_device("cpu", "bfloat16")[1] == torch.bfloat16
    common.choose_device()
    assert "chosen automatically" in capsys.readouterr().out
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cpu"):
            common.choose_device("cuda")


def test_checksums_tell_contents_apart():
    """Of texts and of bytes alike; half a surrogate, which a model may write, is no error."""
    contents = "", "1", "1 ", "é", "\ud800"
    assert len({common.crc(content) for content in contents}) == 5
    assert common.crc("é") == common.crc("é".encode()) and len(common.crc("é")) == 8
    assert json.loads(common.json_line(dict(a="\n"))) == dict(a="\n")
