"""Pictures as files: where each goes, what stands there already, and the sheets of all of them.

Read before: kit/files.py, kit/images.py.

No picture is ever written over. A PNG says in its notes what it was made from; where the same is
asked for again, it is there already, and where something else has its name, it gets another.
"""
import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path

from kit.files import error_context, first_few, read_json_lines, require
from kit.images import ENDINGS, WRITTEN, contact_sheet, read_notes, read_picture, save_picture

SHEET = 100              # pictures on a contact sheet, which are made smaller than
SHEET_SIDE = 512         # this, so that no sheet has more than 5,800 pixels a side


# --- Which pictures, and where --------------------------------------------------------------------

@dataclass
class Job:
    """A picture that was asked for."""
    prompt: str
    seed: int
    notes: dict               # all that decides what it shows, and what people want to know of it
    path: Path                # where it stands, or will
    row: dict | None          # GenEval's metadata


def plan_jobs(out, requests, prompts, rows, num, first_seed, common):
    """[Job], `num` for each prompt. LensError where a file must have a certain name, and something
    else has it.

    out         a folder, or a picture's file, see `names_a_picture`
    requests    what was asked for, after which files are named;  prompts: what is drawn
    rows        GenEval's metadata, one for each prompt, or None
    common      {name: value}, notes of all pictures
    """
    total = num * len(prompts)
    jobs = []
    for p, prompt in enumerate(prompts):
        for k in range(num):
            number = len(jobs)
            seed = first_seed + number
            notes = {"prompt": prompt, "seed": seed, **common}
            if "reasoner" in common:
                notes["request"] = requests[p]

            row = None
            if rows is not None:       # GenEval's layout: 00000/metadata.jsonl, 00000/samples/
                row = rows[p]
                path = out / f"{p:05d}" / "samples" / f"{k:04d}.png"
                check_same(path, notes)
                metadata = metadata_of(path)
                require(not metadata.exists() or read_json_lines(metadata) == [row],
                        f"{metadata} is of other prompts: give another --out")
            elif names_a_picture(out):
                path = out if total == 1 else out.with_stem(f"{out.stem}-{number}")
                check_same(path, notes)
            else:
                path = free_path(out / f"{file_name(requests[p])}-{seed}.png", notes)
            jobs.append(Job(prompt, seed, notes, path, row))
    return jobs


def names_a_picture(out):
    """Whether --out names a file, such as picture.jpg, and not a folder. LensError for a picture
    file of a kind that is not written."""
    ending = out.suffix.lower()
    if ending not in ENDINGS or out.is_dir():
        return False
    require(ending in WRITTEN, f"--out {out}: pictures are written as {', '.join(WRITTEN)}")
    return True


def file_name(request):
    """A request as a file name: its words, joined by hyphens, 60 characters at most, and 180 bytes:
    a file system takes 255 with what is added."""
    name = "-".join(words_of(request))[:60]
    return name.encode()[:180].decode(errors="ignore") or "picture"


def metadata_of(path):
    """GenEval's file for a picture's prompt."""
    return path.parents[1] / "metadata.jsonl"


def differing(path, notes):
    """Names of the notes in which the picture at a path is another one; of none it was made from
    the same."""
    kept = read_notes(path)
    wanted = {name: str(value) for name, value in notes.items()}
    return [name for name in kept.keys() | wanted.keys() if kept.get(name) != wanted.get(name)]


def check_same(path, notes):
    """LensError where something else stands at a path that must be the picture's with these
    notes."""
    if path.exists():
        others = differing(path, notes)
        what = f"and differs in {first_few(others)}" if read_notes(path) else "and is not ours"
        require(not others, f"{path} is there already, {what}: give another --out, or remove it")


def free_path(path, notes):
    """`path`; where something else stands there, the first of path_2, path_3, ... that is free or
    holds the picture with these notes."""
    chosen = path
    for number in itertools.count(2):
        if not chosen.exists() or not differing(chosen, notes):
            return chosen
        chosen = path.with_stem(f"{path.stem}_{number}")


def save_new(picture, path, notes):
    """Writes a picture at its free path, unless it is there already. -> that path"""
    # Asked again: another process may have taken it. (While one encodes, two can still meet.)
    path = free_path(path, notes)
    if not path.exists():
        save_picture(picture, path, notes)
    return path


def words_of(text):
    """Its words in lower case, without punctuation."""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


# --- Contact sheets -------------------------------------------------------------------------------

def save_sheets(out, jobs):
    """Contact sheets of all jobs' pictures, SHEET on each. -> their paths"""
    paths = []
    for k in range(0, len(jobs), SHEET):
        few = jobs[k:k + SHEET]
        pictures = []
        with error_context("no contact sheet"):    # somebody may have moved a picture
            for job in few:
                picture = read_picture(job.path.read_bytes())
                picture.thumbnail((SHEET_SIDE, SHEET_SIDE))
                pictures.append(picture)
        name = "sheet.png" if len(jobs) <= SHEET else f"sheet-{1 + k // SHEET}.png"
        shown = hashlib.sha256(repr([job.notes for job in few]).encode()).hexdigest()
        notes = {"prompts": "\n".join(dict.fromkeys(job.prompt for job in few)),
                 "seed": few[0].seed, "weights": few[0].notes["weights"], "pictures": shown[:16]}
        sheet = contact_sheet(pictures, captions=[job.prompt for job in few])
        paths.append(save_new(sheet, out / name, notes))
    return paths
