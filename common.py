"""What every script shares: one-line errors, options and their checks, JSON, files that are
replaced whole, the identity of a run, locks, and the device. Nothing here is about models; torch is
imported only where it is needed.

    run(main)                                     a user's mistake ends in one line and exit code 2
    read_json(path), read_jsonl(path, fields)     the only readers: they name file, line and field
    write_json(path, value)                       under a temporary name first
    same_settings(path, settings, begun)          refuses to mix two different runs in one file
"""
import argparse
import contextlib
import fcntl
import json
import os
import platform
import re
import signal
import sys
import zlib


# ---------------------------------------------------------------------------- errors in one line
def first_line(error):
    """The first line of what an exception says, or its name."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def run(main, lower="the batch", child=False):
    """Run a script's main: a user's mistake is one line and exit code 2.

    `lower` is the option to name when memory runs out. A child's parent says what is to be said
    about an interruption.
    """
    script = os.path.basename(sys.argv[0])

    def stop(signum, frame):
        raise SystemExit(128 + signum)
    signal.signal(signal.SIGTERM, stop)
    # a shell starts background jobs that ignore Ctrl-C; a child is ended by its parent
    signal.signal(signal.SIGINT, signal.SIG_IGN if child else signal.default_int_handler)
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(complain(script, " ".join(str(error).split()))) from None
    except RuntimeError as error:
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
            raise
        raise SystemExit(complain(script, f"out of memory: lower {lower}")) from None
    except (KeyboardInterrupt, SystemExit) as end:
        code = 130 if isinstance(end, KeyboardInterrupt) else end.code
        if code in (130, 143) and not child:
            print("\ninterrupted: run the same command again to go on", file=sys.stderr)
        raise SystemExit(code) from None


def complain(script, message):
    """Print the one line of a user's mistake; its exit code, 2."""
    print(f"{script}: error: {message}", file=sys.stderr, flush=True)
    return 2


# ---------------------------------------------------------------------------- options
class Parser(argparse.ArgumentParser):
    """argparse whose --help shows the script's docstring and all defaults, with one-line errors."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=Help)

    def error(self, message):
        raise SystemExit(complain(self.prog, f"{message} (see --help)"))


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a docstring, and shows the defaults that say something."""

    def _get_help_string(self, action):  # no "(default: None)", "(default: False)", "(default: [])"
        plain = action.default in (None, []) or action.default is False
        return action.help if plain else super()._get_help_string(action)


def number(least, most=10 ** 12, kind=int):
    """An argparse type: a finite number from `least` to `most`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what}") from None
        if not least <= value <= most:  # refuses nan too
            raise argparse.ArgumentTypeError(f"{text} is out of range, {least:g} to {most:g}")
        return value
    return parse


def folder_name(text):
    """An argparse type: a name that is one part of a path, so that nothing is written elsewhere."""
    if text in ("", ".", "..") or any(c in text for c in "/\\\0") or text.endswith(".tmp"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a plain name: no '/', not '.' or '..', no '.tmp' at its end")
    return text


# ---------------------------------------------------------------------------- JSON
def parse_json(content, where, kind=dict):
    """The JSON value in some bytes, a dict or what `kind` says; ValueError says `where` not."""
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")
    try:
        value = json.loads(content.decode("utf-8-sig"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not readable JSON: {first_line(error)}") from None
    if not isinstance(value, kind):
        expected = "an object {...}" if kind is dict else "a list [...]"
        raise ValueError(f"{where} holds {json.dumps(value)[:60]}, expected {expected}")
    return value


def read_json(path, kind=dict):
    """The value of a JSON file, a dict or whatever `kind` says. ValueError names the file."""
    with open(path, "rb") as f:
        return parse_json(f.read(), path, kind)


def check_fields(record, fields, where):
    """ValueError unless a record has the fields {name: str, int (0 or more) or float (finite)}."""
    most = sys.float_info.max
    checks = {str: ("text", lambda v: isinstance(v, str)),
              int: ("a whole number, 0 or more", lambda v: type(v) is int and 0 <= v <= most),
              float: ("a finite number", lambda v: type(v) in (int, float) and abs(v) <= most)}
    for name, kind in fields.items():
        expected, fits = checks[kind]
        if not fits(record.get(name)):
            found = f"is {json.dumps(record[name])[:40]}" if name in record else "is missing"
            raise ValueError(f"{where}: {name} {found}, expected {expected}")


def json_lines(path, torn=False):
    """("path, line n", dict) of each line of a .jsonl file that is not blank; none without a file.

    torn: a last line without an end was cut off by a kill, and is left out.
    """
    if not os.path.exists(path):
        return
    with open(path, "rb") as f:
        lines = f.read().split(b"\n")
    for line_number, line in enumerate(lines[:-1] if torn else lines, 1):
        if line.strip():
            where = f"{path}, line {line_number}"
            yield where, parse_json(line, where)


def read_jsonl(path, fields=(), torn=False):
    """The dicts of json_lines as a list, each with these fields (see check_fields)."""
    records = []
    for where, record in json_lines(path, torn):
        check_fields(record, dict(fields), where)
        records.append(record)
    return records


def json_line(record):
    """A record as a line of a .jsonl file, in bytes: to be appended with one write."""
    return (json.dumps(record) + "\n").encode()


# ---------------------------------------------------------------------------- files and runs
def replace_file(path, write):
    """Call write(temporary path), then rename: readers see the old file or the new one, whole."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def write_bytes(path, content):
    """Replace a file by these bytes."""
    def write(temporary):
        with open(temporary, "wb") as f:
            f.write(content)
    replace_file(path, write)


def write_json(path, value):
    """Replace a file by this value; NaN and infinity, which are not JSON, are a ValueError."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def crc(content):
    """CRC-32 of a text or of bytes, as 8 hexadecimal digits: tells one content from another."""
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return f"{zlib.crc32(content):08x}"


def same_settings(path, settings, begun):
    """ValueError names each setting in which a run differs from that whose settings are in `path`.

    A run that has not `begun`, that completed neither a step nor a record, refuses nobody.
    """
    if not begun:
        return
    old = read_json(path)
    old = old.get("settings", old)
    settings = json.loads(json.dumps(settings))  # as they would be read: tuples are lists
    differ = [f"{name} = {old.get(name)!r} there, {settings.get(name)!r} now"
              for name in sorted(old.keys() | settings.keys())
              if old.get(name) != settings.get(name)]
    if differ:
        raise ValueError(f"{path} is of a run with other settings ({'; '.join(differ)}): "
                         f"rerun with those, choose another --out, or delete that folder")


@contextlib.contextmanager
def locked(folder):
    """Only one process at a time works in a folder; another one is refused in one line."""
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in os.listdir(folder):
            if re.search(r"\.\d+\.tmp$", name):  # half a file of a process that was killed
                os.remove(os.path.join(folder, name))
        yield
    except BlockingIOError:
        raise ValueError(f"another process is working in {folder}: wait for it, "
                         f"or choose another --out") from None
    finally:
        os.close(handle)


def find_models(out):
    """Folders of the finished checkpoints under `out`: the teacher first, then by name."""
    names = sorted(os.listdir(out)) if os.path.isdir(out) else []
    folders = [os.path.join(out, name) for name in sorted(names, key=lambda name: name != "teacher")
               if not name.endswith(".tmp")
               and os.path.isfile(os.path.join(out, name, "config.json"))]
    if not folders:
        raise ValueError(f"no models under {out}/: run python distill.py first, "
                         f"or name one with --model")
    return folders


# ---------------------------------------------------------------------------- device
def choose_device(device=None, dtype=None):
    """(torch.device, torch.dtype): as asked for, else cuda in bfloat16, else cpu in float32.

    Prints both with the reason. GPUs before Ampere only emulate bfloat16: float32 there.
    """
    import torch
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but PyTorch finds no GPU here: "
                         "use --device cpu or leave it out")
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    half = chosen.type == "cuda" and torch.cuda.get_device_capability()[0] >= 8
    kind = dtype or ("bfloat16" if half else "float32")
    print(f"device: {device_name(chosen)} ({'asked for' if device else 'chosen automatically'}), "
          f"dtype: {kind} ({'asked for' if dtype else 'the default there'})", flush=True)
    return chosen, getattr(torch, kind)


def device_name(device):
    """"cuda (NVIDIA ...)" or "cpu (name, threads)"."""
    import torch
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            lines = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
        name = lines[0] if lines else name
    return f"cpu ({name}, {torch.get_num_threads()} threads)"
