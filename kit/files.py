"""Errors in one line, and files that are never half written. Everything else stands on this.

Read before: nothing.
"""
import argparse
import codecs
import contextlib
import difflib
import hashlib
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import unicodedata
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
        if isinstance(e, KeyError) and e.args:     # says no more than the name
            text = f"{text} is missing"
        elif isinstance(e, OSError) and e.strerror and str(e.filename) in doing:
            text = e.strerror.lower()              # without its number, and the name once more
            if isinstance(e, FileNotFoundError):
                text += did_you_mean(e.filename)
        raise LensError(f"{doing}: {text.splitlines()[0]}") from e


def did_you_mean(path):
    """"; did you mean photo.png?" where a file beside `path` has nearly its name, else ""."""
    path = Path(path)
    with contextlib.suppress(OSError):
        # Not itself: a link whose target is gone stands in its folder, too.
        names = [other.name for other in path.parent.iterdir() if other.name != path.name]
        near = difflib.get_close_matches(path.name, names, n=1)
        if near:
            return f"; did you mean {path.with_name(near[0])}?"
    return ""


def first_few(names, count=4):
    """"a, b, c, d and 7 more": enough of a long list to see what is meant."""
    names = sorted(names)
    shown = ", ".join(names[:count])
    if len(names) > count:
        shown += f" and {len(names) - count} more"
    return shown


# --- Command lines --------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse as every script here uses it: its errors are LensErrors, words that it does not know
    are answered with what was likely meant, numbers are finite, and --help ends with the commands
    that stand in the script's docstring. Options are written out: no beginning stands for one.

    bare    a command to which a word that stands alone is likely the last argument, such as
            "python sample.py --prompt"; "": there is none
    """

    def __init__(self, description, doc="", bare=""):
        # A command, with the lines that it goes on in behind a backslash.
        command = re.compile(r"^ {4}(?:python|torchrun) (?:.*\\\n)*.*$", re.MULTILINE)
        commands = command.findall(doc)
        super().__init__(description=description, epilog="\n".join(commands), allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.bare = bare
        self.register("type", int, whole_number)   # what stands for type=int, and for type=float
        self.register("type", float, finite_number)

    def error(self, message):
        raise LensError(message)

    def parse_known_args(self, words=None, namespace=None):
        words = sys.argv[1:] if words is None else list(words)
        options = re.findall(r"(?<![\w-])--[\w-]+", self.format_usage())
        for word in words:                         # first: its value would be taken for a command
            name = word.split("=")[0]
            if re.fullmatch(r"--[A-Za-z][\w-]*", name):
                require(name in (*options, "--help"), no_such_option(name, options))

        known, strange = super().parse_known_args(words, namespace)
        if strange and strange[0].startswith(DASHES):
            self.error(no_such_option(strange[0], options))
        if strange:
            self.error(stray_words(strange, words, self.bare))
        return known, strange


DASHES = ("-", "\u2013", "\u2014")     # a web page may have made a long one of two


def no_such_option(word, options):
    """That there is none of this name, and which was likely meant."""
    name = word.split("=")[0]
    near = difflib.get_close_matches("--" + name.lstrip("".join(DASHES)), options, n=1)
    hint = f"did you mean {near[0]}?" if near else "--help lists the options"
    return f"there is no option {name}; {hint}"


def stray_words(strange, words, bare):
    """What was likely meant by words of a command line that belong to no option."""
    place = words.index(strange[0])
    before = words[max(0, place - 2):place]
    number = re.compile(r"[\d.,]+")                # the beginning of no sentence
    if len(before) == 2 and before[0].startswith("--") and not number.fullmatch(before[1]):
        said = [before[1]]
        for word in words[place:]:
            if word not in strange:
                break
            said.append(word)
        together = of_one_pattern(said) or " ".join(said)
        return (f"{before[0]} takes one value, and got {len(said)} words; quotation marks keep "
                f"them together: {before[0]} {quoted(together)}")
    if bare and not number.fullmatch(strange[0]):
        return (f"{quoted(strange[0])} belongs to no option; did you mean: "
                f"{bare} {quoted(' '.join(strange))}")
    return f"{quoted(strange[0])} belongs to no option; --help lists them"


def of_one_pattern(paths):
    """'shards/*.tar' for files that a shell made of such a pattern; None for other words."""
    folders = {os.path.dirname(path) for path in paths}
    endings = {Path(path).suffix for path in paths}
    if len(folders) == len(endings) == 1 and endings != {""}:
        return os.path.join(folders.pop(), "*" + endings.pop())
    return None


def quoted(word):
    """A word as one types it into a shell: in quotation marks where it needs some."""
    if word and re.fullmatch(r"[\w ,.:;'-]+", word):
        return f'"{word}"' if re.search(r"[ ;']", word) else word
    return shlex.quote(word)


def whole_number(text):
    """An argparse type: a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not '{text}'") from None


def finite_number(text):
    """An argparse type: a number, neither nan nor infinite."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a number, not '{text}'")
    return number


def positive(text):
    """An argparse type: a whole number of at least 1."""
    number = whole_number(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def not_negative(text):
    """An argparse type: a whole number of at least 0."""
    number = whole_number(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return number


def seed_number(text):
    """An argparse type: a whole number from 0 to 2^63 - 1, which torch, numpy and every server
    take."""
    number = whole_number(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError("must be from 0 to 2^63 - 1")
    return number


def user_path(text):
    """An argparse type: a path. A shell leaves a quoted ~ as it is, and a folder of that name would
    be made."""
    return os.path.expanduser(text)


def utf8_text(text):
    """An argparse type: text in its `one_form`, which can be written. Bytes in another encoding
    reach us as lone surrogates, which no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("must be text in UTF-8, and holds other bytes") from None
    return one_form(text)


def run_command(main):
    """Runs a script's main. A user's mistake, or a GPU too small, becomes one line on stderr and
    exit code 2; never a stack trace."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    # A terminal or a file that is not UTF-8 gets \u3042 for what it cannot hold, not a traceback.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (LensError, torch.OutOfMemoryError) as e:
        say_error(str(e), int(os.environ.get("RANK", 0)))
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def say_error(message, rank):
    """One line on stderr. Under torchrun most errors meet all ranks at once, and rank 0 says them:
    another rank waits first, and where rank 0 failed too, torchrun ends it meanwhile.

    What torchrun then prints itself, a traceback of its own, nothing here can stop; its last lines
    name the message, which it takes from a file.
    """
    who = ""
    if rank > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)          # a run's Notice would go on waiting
        time.sleep(PATIENCE)
        who = f"rank {rank}: "
    print(f"error: {who}{message}", file=sys.stderr)
    for_torchrun = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if for_torchrun:
        with contextlib.suppress(LensError):
            about = {"timestamp": str(int(time.time()))}
            write_json(for_torchrun, {"message": {"message": message, "extraInfo": about}})


PATIENCE = 3                   # seconds that other ranks leave to rank 0


# --- Files ----------------------------------------------------------------------------------------

def replace_file(path, write):
    """Runs write(temporary path) beside `path`, then renames: a full disk or a kill leaves the
    previous file whole. Who may read it, the umask says: what safetensors writes would be the
    owner's alone."""
    path = Path(path)
    beside = Path(f"{path}.{os.getpid()}.new")
    with error_context(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.touch()
            usual = beside.stat().st_mode
            write(beside)
            if beside.stat().st_mode != usual:
                beside.chmod(usual)
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
    trial.unlink(missing_ok=True)                  # another process may have been as quick


def paths_below(folder, leave_out=None, on_error=None):
    """[Path] of all but the folders below a folder, in order. Links to folders are followed, and
    each folder is met once: a link back to where it came from ends there.

    leave_out   a folder that is not entered
    on_error    called with the OSError of a folder that cannot be read
    """
    met = {Path(leave_out).resolve()} if leave_out else set()
    paths = []
    for place, folders, names in os.walk(folder, onerror=on_error, followlinks=True):
        folders.sort()
        real = Path(place).resolve()
        if real in met:
            folders.clear()
        else:
            met.add(real)
            paths += [Path(place) / name for name in names]
    return sorted(paths)


def decode_text(blob):
    """Bytes of a text file -> str: UTF-8, or UTF-16 with the mark before it that Windows writes.
    The mark itself is left out, and every line ends in "\\n". UnicodeError where it is neither."""
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    text = blob.decode("utf-16" if blob.startswith(marks) else "utf-8-sig")
    if "\0" in text:                               # of UTF-16 without its mark, or of no text
        raise UnicodeError("neither UTF-8 nor UTF-16 with its byte-order mark")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path):
    """A text file, see `decode_text`; LensError names it if it is missing or is something else."""
    with error_context(f"cannot read {path}"):
        return decode_text(Path(path).read_bytes())


def lines_of(text):
    """Its lines that are not blank. They end at "\\n" alone: str.splitlines would also split at
    U+2028, which may stand inside a JSON string."""
    return [line for line in text.split("\n") if line.strip()]


def one_form(text):
    """Each letter with its accents as one character where there is such (Unicode's NFC): macOS
    writes them as two, and the same word would be another one."""
    return unicodedata.normalize("NFC", text)


def is_whole(text):
    """Whether a text can be written: JSON may hold half a character, of an emoji that was cut."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


A_PROMPT = '{"prompt": "a red circle"}'


def read_prompts(path):
    """Prompts of a file: plain lines, or of a .json or .jsonl file JSON lines with a `prompt`, as
    GenEval's. -> (prompts, [the whole row of each] or None). LensError names a line that has
    none."""
    prompts, rows = [], []
    in_json = str(path).endswith((".json", ".jsonl"))
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        prompt = line
        if in_json:
            rows.append(json_value(line))
            prompt = rows[-1].get("prompt") if isinstance(rows[-1], dict) else None
            require(isinstance(prompt, str) and prompt.strip() and is_whole(prompt),
                    f"cannot read prompts from {path}: line {number} must look like {A_PROMPT}")
        prompts.append(one_form(prompt))
    require(prompts, f"{path}: no prompts in the file")
    return prompts, rows if in_json else None


def json_value(text):
    """What a line of JSON holds; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def write_text(path, text):
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def read_json(path):
    with error_context(f"cannot read {path}"):
        return json.loads(read_text(path))


def read_object(path):
    """The same of a file that must hold an object, {...}."""
    found = read_json(path)
    require(isinstance(found, dict), f"cannot read {path}: it holds no JSON object")
    return found


def write_json(path, data):
    write_text(path, json.dumps(data, indent=2) + "\n")


def read_json_lines(path):
    """The rows of a JSON-lines file that we write ourselves; [] where there is none. A line torn by
    a crash is left out."""
    rows = []
    if Path(path).exists():
        with error_context(f"cannot read {path}"):
            lines = Path(path).read_bytes().split(b"\n")
        for line in lines:
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
