"""Tar shards in WebDataset's layout: the files of a sample, read without unpacking, and written.

Read before: kit/files.py, kit/images.py.

    00000.tar    000000000.jpg, 000000000.json, 000000001.png, 000000001.json, ...

A sample is all members that share a name up to the first dot: a picture (or a latent) and its
captions, in .txt, .caption or .json.
"""
import functools
import glob
import io
import itertools
import json
import math
import os
import tarfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from kit.files import decode_text, is_whole, one_form, paths_below, replace_file, require
from kit.images import Fault

# --- Reading --------------------------------------------------------------------------------------
# Others made them: nothing in them is trusted, every fault has a name and is counted.

def find_files(pattern):
    """Paths of the files that --data names, in order, each once. "~" is the home folder, "**/" any
    number of folders; a folder stands for the tars in it. LensError where it has none."""
    pattern = os.path.expanduser(str(pattern))
    if os.path.isdir(pattern):
        paths = glob.glob(os.path.join(glob.escape(pattern), "*.tar"))
        require(paths, f"--data {pattern}: a folder without tars; pictures become tars by "
                       f"`python data.py pack --images {pattern} --out shards`")
    elif os.path.isfile(pattern):                  # also one whose name holds [ or *
        paths = [pattern]
    elif "**/" in pattern:
        # Not by glob's own "**": it goes round and round where a link leads back.
        head, tail = pattern.split("**/", 1)
        folders = glob.glob(head) if head else ["."]
        paths = [path for folder in folders for path in paths_below(folder)
                 if path.match(tail or "*.tar")]
    else:
        paths = glob.glob(pattern)
    return sorted({str(path) for path in paths if os.path.isfile(path)})


class Part(NamedTuple):
    """A file, or a member of a tar."""
    path: str
    offset: int = 0
    length: int = -1          # bytes; -1: to the end of the file


def read(part):
    """Bytes of a part."""
    with open(part.path, "rb") as f:
        f.seek(part.offset)
        return f.read(part.length)


def tar_parts(path, faults):
    """{key: {ending: Part}} of a tar in WebDataset's layout. What is left out, see `tar_members`,
    is counted in `faults`, a Counter; so are names that come twice."""
    samples = {}
    for name, part in tar_members(path, faults):
        # WebDataset: the key ends at the first dot.
        stem, _, ending = name.name.partition(".")
        parts = samples.setdefault(str(name.parent / stem), {})
        add_part(parts, f".{ending.lower()}", part, faults)
    return samples


def tar_members(path, faults):
    """Yields (PurePosixPath, Part) of a tar's files.

    It is never unpacked: a member's name is only ever a key. Hostile names, links and a torn end
    are counted in `faults`, a Counter, and left out.
    """
    end = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.size < 0:                # tarfile would go back, and round and round
                    raise EOFError
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    faults["hostile path in a tar"] += 1
                elif member.isdir():
                    continue
                elif not member.isfile():
                    faults["link or device in a tar"] += 1
                elif member.offset_data + member.size > end:
                    raise EOFError
                else:
                    yield name, Part(str(path), member.offset_data, member.size)
            # tarfile takes a broken header for the end, which is made of zeros.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512).strip(b"\0"):
                raise EOFError
    except (tarfile.TarError, EOFError, ValueError):
        faults["torn or unreadable tar"] += 1


def add_part(parts, ending, part, faults):
    """Puts a file among the parts of its sample, {ending: Part}. Captions are under ".txt"."""
    if ending == ".caption":                       # kohya's tools write them so
        ending = ".txt"
    if ending in parts:
        faults["duplicate key"] += 1
    else:
        parts[ending] = part


def words_of(parts, row=None):
    """(captions [str], notes {name: value}) of a sample, from its .txt, its .json, or its row.

    parts  {ending: Part}        row  {name: value} of the folder's JSON lines; the .json goes first
    Raises Fault.
    """
    try:
        notes = dict(row or {})
        if ".json" in parts:
            stored = json.loads(decode_text(read(parts[".json"])))
            notes = {**notes, **stored}            # TypeError where it is no object

        if ".txt" in parts:
            captions = decode_text(read(parts[".txt"]))
        else:
            captions = notes.get("captions") or notes.get("caption") or notes.get("text") or []
        if isinstance(captions, str):
            captions = [captions]
        elif isinstance(captions, dict):           # {"short": "...", "long": "..."}
            captions = captions.values()
        captions = [one_form(" ".join(caption.split())) for caption in captions if caption]
    except UnicodeError:
        raise Fault("caption is not UTF-8") from None
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise Fault("broken JSON") from None

    if not all(is_whole(caption) for caption in captions):
        raise Fault("caption with half a character")
    if any(len(caption) > 20_000 for caption in captions):
        raise Fault("caption too long")
    return [caption for caption in captions if caption], notes


# --- Writing --------------------------------------------------------------------------------------

def write_shards(samples, out, shard_mb):
    """(bytes, ending, notes) of samples -> out/00000.tar, ..., each whole or not at all."""
    samples = enumerate(samples)                   # numbered through all the tars
    for number, first in enumerate(samples):
        rest = itertools.chain([first], samples)
        path = Path(out) / f"{number:05d}.tar"
        replace_file(path, functools.partial(fill_tar, samples=rest, most=shard_mb * 2**20))


def fill_tar(path, samples, most=math.inf):
    """Writes a tar in WebDataset's layout, and takes no more samples once their pictures have more
    than `most` bytes. samples: an iterator of (number, (bytes, ending, notes)), each with (ending,
    bytes) of further files behind, if any."""
    used = 0
    with tarfile.open(path, "w") as tar:
        for number, (blob, ending, notes, *others) in samples:
            add_file(tar, f"{number:09d}{ending}", blob)
            for other_ending, other_blob in others:
                add_file(tar, f"{number:09d}{other_ending}", other_blob)
            add_file(tar, f"{number:09d}.json", json.dumps(notes).encode())
            used += len(blob)
            if used > most:
                return


def add_file(tar, name, content):
    member = tarfile.TarInfo(name)                 # no date: equal pictures give equal bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
