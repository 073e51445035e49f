"""What every script shares: one-line errors, options, JSON, files replaced whole, a run's identity,
locks, the device. torch is imported where it is needed.
"""
import argparse
import contextlib
import fcntl
import json
import os
import re
import signal
import sys
import zlib
from pathlib import Path


# ---- errors in one line
def end(number, frame):
    """Until run() is there."""
    os.write(2, b"\ninterrupted\n")
    os._exit(128 + number)


if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:
    for sig in signal.SIGINT, signal.SIGTERM:  # a script imports this file before torch
        signal.signal(sig, end)


def first_line(error):
    """The first line of an exception's text, or its name."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


@contextlib.contextmanager
def naming(what, fault="cannot be used"):
    """Any exception inside becomes a ValueError of one line: `what` cannot be used, and why."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what} {fault}: {kind}{first_line(error)}") from None


def run(main, lower="the batch", child=False, resumes=True):
    """Run a script's main: a user's mistake ends in one line and exit code 2.

    lower: what to lower when memory runs out. child: its parent ends it and reports. resumes:
    after an interruption, the same command goes on.
    """
    with contextlib.suppress(AttributeError):  # a notebook's, or closed
        sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # else a shell's background jobs ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.SIG_IGN if child else signal.default_int_handler)
    try:
        return main()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        code = complain(" ".join(str(error).split()))
    except RuntimeError as error:
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        code = complain(f"out of memory: lower {lower}")
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code
    if code in (130, 143) and not child:
        advice = ": run the same command again to go on" if resumes else ""
        print(f"\ninterrupted{advice}", file=sys.stderr)
    raise SystemExit(code)


def require(condition, complaint):
    """ValueError(complaint) unless the condition holds."""
    if not condition:
        raise ValueError(complaint)


def complain(message):
    """Print a mistake in one line; exit code 2."""
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    return 2


# ---- options
class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, whose --help shows the script's docstring and defaults."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=Help)

    def group(self, title):
        """add_argument of a group of options."""
        return self.add_argument_group(title).add_argument

    def error(self, message):
        sys.exit(complain(f"{message} (see --help)"))


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's lines; leaves out the defaults None, False and []."""

    def _get_help_string(self, action):
        says = action.default or type(action.default) in (int, float)
        return super()._get_help_string(action) if says else action.help


def number(least, most=10 ** 12, kind=int):
    """An argparse type: a finite number from `least` to `most`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a {'whole ' * (kind is int)}number") from None
        if not least <= value <= most:  # refuses nan too
            raise argparse.ArgumentTypeError(f"{text} is out of range, {least:g} to {most:g}")
        return value
    return parse


def folder_name(text):
    """An argparse type: a name that is one part of a path."""
    if text in ("", ".", "..") or set(text) & set("/\\\0") or text.endswith(".tmp"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a plain name: no '/', not '.' or '..', no '.tmp' at its end")
    return text


# ---- JSON
def parse_json(content, where):
    """The dict in some bytes of JSON; ValueError says where there is none."""
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")
    try:
        value = json.loads(content.decode("utf-8-sig"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not readable JSON: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds {json.dumps(value)[:60]}, expected an object")
    return value


def read_json(path):
    """The dict in a JSON file."""
    return parse_json(Path(path).read_bytes(), path)


def optional_json(*parts):
    """The dict in a JSON file, {} if there is none."""
    path = Path(*parts)
    return read_json(path) if path.is_file() else {}


FIELDS = {kind: (name, lambda v, kind=kind: type(v) is kind) for kind, name in {
    str: "text", list: "a list", dict: "an object", bool: "true or false"}.items()}
FIELDS |= {int: ("a whole number, 0 or more", lambda v: type(v) is int and 0 <= v <= 1e308),
           float: ("a finite number", lambda v: type(v) in (int, float) and abs(v) <= 1e308)}


def check_fields(record, fields, where):
    """The record; ValueError unless it has these fields, {name: kind}. A kind is a type of FIELDS,
    a pair like its values, or the only value that is allowed beside null."""
    for name, kind in fields.items():
        if not isinstance(kind, (type, tuple)):
            kind = json.dumps(kind), lambda v, only=kind: v in (None, only)
        expected, fits = FIELDS.get(kind, kind)
        if not fits(record.get(name)):
            found = f"is {json.dumps(record[name])[:40]}" if name in record else "is missing"
            raise ValueError(f"{where}: {name} {found}, expected {expected}")
    return record


def json_lines(path, torn=False):
    """Yield ("path, line n", dict) for each line of a .jsonl file that isn't blank, if it exists;
    torn: but for a last line without an end, which a kill cut off."""
    lines = Path(path).read_bytes().split(b"\n") if os.path.exists(path) else []
    for i, line in enumerate(lines[:-1] if torn else lines, 1):
        if line.strip():
            yield f"{path}, line {i}", parse_json(line, f"{path}, line {i}")


def read_jsonl(path, fields={}, torn=False):
    """The dicts of json_lines in a list, each with these fields, as in check_fields."""
    return [check_fields(record, fields, where) for where, record in json_lines(path, torn)]


def json_line(record):
    """A record as a line of a .jsonl file: bytes, to be appended with one write."""
    return (json.dumps(record) + "\n").encode()


# ---- files and runs
def replace_file(path, write):
    """Call write(temporary path), then rename: readers see the old file or the new one."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors would leave 0600
        write(temporary)
        temporary.chmod(mode)
        temporary.replace(path)
    except Exception as error:
        if type(error).__name__ not in ("RuntimeError", "SafetensorError"):
            raise
        raise OSError(f"{path} cannot be written, is the disk full? {first_line(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path, content):
    """Replace a file by bytes."""
    replace_file(path, lambda temporary: temporary.write_bytes(content))


def write_json(path, value):
    """Replace a file by this value as JSON; ValueError for NaN and infinity."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def crc(content):
    """CRC-32 of a text or of bytes, 8 hexadecimal digits."""
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return f"{zlib.crc32(content):08x}"


def same_settings(path, settings, begun):
    """ValueError names the settings in which a run differs from the one recorded in `path`, if that
    one has completed a step or a record."""
    if not begun:
        return
    old, new = read_json(path), json.loads(json.dumps(settings))  # tuples become lists
    old = check_fields(dict(settings=old) | old, dict(settings=dict), path)["settings"]
    differ = [f"{name} = {old.get(name)!r} there, {new.get(name)!r} now"
              for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    require(not differ, f"{path} is of a run with other settings ({'; '.join(differ)}): rerun with "
                        "those, choose another --out, or delete that folder")


@contextlib.contextmanager
def locked(folder):
    """One process works in a folder at a time: ValueError for another."""
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in Path(folder).iterdir():
            if re.search(r"\.\d+\.tmp$", path.name):  # half a file of a killed process
                path.unlink()
        yield
    except BlockingIOError:
        raise ValueError(f"another process is working in {folder}: wait for it, "
                         "or choose another --out") from None
    finally:
        os.close(handle)


def find_models(out):
    """Folders of the finished checkpoints under `out`: the teacher first, then by name."""
    models = sorted(str(path.parent) for path in Path(out).glob("*/config.json")
                    if path.parent.suffix != ".tmp")
    require(models, f"no models under {out}/: run python distill.py first, or use --model")
    return sorted(models, key=lambda model: Path(model).name != "teacher")


def own_teacher(name):
    """teacher-SIZE of NAME-SIZE, else teacher."""
    return "teacher" + re.search("(-small|-large)?$", name)[0]


# ---- task and device
def add_task_options(add, limit=None):
    add("--task", default="arithmetic", help="or arithmetic6, gsm8k, math500, openmath2, "
        "openmath2[1000:2000], a .jsonl file of problems, solutions or samples")
    add("--limit", type=number(1), default=limit, help="how many problems; without it, all")
    add("--subset-seed", type=number(0), help="take them at random; default: the first")
    add("--prompt-file", help="text around {question}; default: an instruction to reason, nothing "
        "for arithmetic")


def add_device_options(add, states=False):
    """Add --device and --dtype, arguments of choose_device, and with `states` --state-dtype."""
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, else float32")
    if states:
        add("--state-dtype", choices=["float32", "bfloat16"], default="float32",
            help="of mixers' states, most of what a student's step moves in large batches")


def choose_device(device=None, dtype=None):
    """(torch.device, torch.dtype), printed with the reason: as asked for, else cuda in bfloat16 (in
    float32 before Ampere, which only emulates it), else cpu in float32."""
    import torch
    require(device != "cuda" or torch.cuda.is_available(), "--device cuda was asked for, but "
            "PyTorch finds no GPU here: use --device cpu or leave it out")
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    half = chosen.type == "cuda" and torch.cuda.get_device_capability()[0] >= 8
    name = dtype or ("bfloat16" if half else "float32")
    print(f"device: {device_name(chosen)} ({'asked for' if device else 'chosen automatically'}), "
          f"dtype: {name} ({'asked for' if dtype else 'the default there'})")
    return chosen, getattr(torch, name)


def device_name(device):
    """"cuda (NVIDIA ...)" or "cpu (name, threads)"."""
    import torch
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)|$", info.read_text() if info.exists() else "")[1]
    return f"cpu ({name or os.uname().machine}, {torch.get_num_threads()} threads)"
