"""Errors in one line, and files that are never half written. Everything else stands on this.

Read before: nothing.
"""
import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# --- Errors ---------------------------------------------------------------------------------------

class LensError(ValueError):
    """A user's mistake, told in one line. `run_command` prints `error: ...` and exits with code
    2."""


def require(ok, message):
    """Raises LensError(message) unless ok."""
    if not ok:
        raise LensError(message)


@contextlib.contextmanager
def error_context(doing):
    """Whatever a library raises inside becomes a LensError that begins with what we were doing."""
    try:
        yield
    except LensError:
        raise
    except Exception as e:
        text = str(e).strip() or type(e).__name__
        raise LensError(f"{doing}: {text.splitlines()[0]}") from e


def first_few(names, count=4):
    """"a, b, c, d and 7 more": enough of a long list to see what is meant."""
    names = sorted(names)
    shown = ", ".join(names[:count])
    if len(names) > count:
        shown += f" and {len(names) - count} more"
    return shown


# --- Command lines --------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse as every script here uses it: its errors are LensErrors, and --help ends with the
    commands that stand in the script's docstring."""

    def __init__(self, description, doc=""):
        # A command, with the lines that it goes on in behind a backslash.
        command = re.compile(r"^ {4}(?:python|torchrun) (?:.*\\\n)*.*$", re.MULTILINE)
        commands = command.findall(doc)
        super().__init__(description=description, epilog="\n".join(commands),
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise LensError(message)


def positive(text):
    """An argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def not_negative(text):
    """An argparse type: a whole number of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return number


def run_command(main):
    """Runs a script's main. A user's mistake, or a GPU too small, becomes one line on stderr and
    exit code 2; never a stack trace."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        main()
    except (LensError, torch.OutOfMemoryError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# --- Files ----------------------------------------------------------------------------------------

def replace_file(path, write):
    """Runs write(temporary path) beside `path`, then renames: a full disk or a kill leaves the
    previous file whole."""
    path = Path(path)
    beside = Path(f"{path}.{os.getpid()}.new")
    with error_context(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(beside)
            with open(beside, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def check_writable(folder):
    """LensError where nothing can be written to `folder`: asked before the work, not found out
    after it."""
    trial = Path(folder) / ".writable"
    replace_file(trial, lambda beside: beside.write_text(""))
    trial.unlink()


def read_text(path):
    """A UTF-8 text file; LensError names it if it is missing or is something else."""
    with error_context(f"cannot read {path}"):
        return Path(path).read_text(encoding="utf-8")


def write_text(path, text):
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def read_json(path):
    with error_context(f"cannot read {path}"):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def write_json(path, data):
    write_text(path, json.dumps(data, indent=2) + "\n")


def read_json_lines(path):
    """The rows of a JSON-lines file that we write ourselves; [] where there is none. A line torn by
    a crash is left out."""
    rows = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def write_json_lines(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def open_safetensors(path):
    """A safetensors file, its tensors not yet read: a context manager with keys(),
    get_tensor(name), metadata()."""
    other = other_format(path)
    require(other is None, f"cannot read {path}: it is {other}")
    with error_context(f"cannot read {path}"):
        return safe_open(str(path), "pt")


# What weights also come as, and what to do then: by how the file begins, or how its name ends.
GGUF = "GGUF, which is not read: take a .safetensors file in bf16, or in fp8 with scales"
PICKLE = "a PyTorch pickle, which is not read as it can run code: take a .safetensors file"
LFS_POINTER = "what git-lfs puts in the place of a large file: `git lfs pull` fetches it"
BEGINNINGS = {b"GGUF": GGUF, b"PK\x03\x04": PICKLE, b"\x80": PICKLE,
              b"version https://git-lfs": LFS_POINTER}
ENDINGS = {".gguf": GGUF, ".pt": PICKLE, ".pth": PICKLE, ".ckpt": PICKLE, ".bin": PICKLE}


def other_format(path):
    """What a file of weights is, in words, if we know it and it is not safetensors; else None."""
    with error_context(f"cannot read {path}"), open(path, "rb") as f:
        begin = f.read(32)
    if begin[8:9] == b"{":             # safetensors: the header's length in 8 bytes, then JSON
        return None
    for known, what in BEGINNINGS.items():
        if begin.startswith(known):
            return what
    return ENDINGS.get(Path(path).suffix)


def unread_weights(folder):
    """"; x.gguf is GGUF, ..." of the first file in a folder whose format is not read, or ""."""
    for path in sorted(Path(folder).glob("*")):
        if path.suffix in ENDINGS:
            return f"; {path.name} is {ENDINGS[path.suffix]}"
    return ""


def write_safetensors(path, tensors, metadata=None):
    """tensors {name: tensor}, from any device; metadata {name: anything that str() tells}."""
    tensors = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    metadata = {name: str(value) for name, value in (metadata or {}).items()}
    replace_file(path, lambda beside: save_file(tensors, beside, metadata))


def file_hash(path):
    """16 hex digits that tell files apart by their content."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]
