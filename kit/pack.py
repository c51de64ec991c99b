"""Cleaning: a folder of pictures with captions becomes tar shards, in the paper's order of filters.

Read before: kit/tars.py. Its command is `python data.py pack`.
"""
import json
import math
import os
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from kit.chat import NoAnswer, chat_about, clean
from kit.files import (
    LensError,
    check_writable,
    decode_text,
    error_context,
    lines_of,
    one_form,
    paths_below,
    quoted,
    require,
    write_json,
    write_text,
)
from kit.images import ENDINGS, Fault, read_picture
from kit.run import ignore_signals, usable_cores
from kit.tars import Part, add_part, read, tar_members, words_of, write_shards

# --- Which pictures are left out ------------------------------------------------------------------

class Limit(NamedTuple):
    """Of one filter. What has no score is not judged by it."""
    sense: str                # "<": a picture below the value is left out; ">": one above it
    value: float

    def excludes(self, score):
        if score is None:
            return False
        return score < self.value if self.sense == "<" else score > self.value

    def __str__(self):
        return f"{self.sense} {self.value:g}"


# The filters in their order, and the limits of area, aesthetic score and duplicates [paper]; the
# other limits [ours].
LIMITS = {
    "area": Limit("<", 384**2),          # pixels
    "nsfw": Limit(">", 0.5),             # this and the next two: scores of others, see --classifier
    "aesthetic": Limit("<", 3.0),
    "watermark": Limit(">", 0.5),
    "blur": Limit("<", 15.0),            # the next four: see `measure`
    "entropy": Limit("<", 3.0),
    "dark": Limit("<", 0.06),
    "bright": Limit(">", 0.97),
    "duplicate": Limit(">", 0.985),      # cosine of two pictures' vectors
}
CLASSIFIED = ("nsfw", "aesthetic", "watermark")


def measure(image):
    """What the filters look at: {"area", "blur", "entropy", "dark", "bright"}, and a vector [768].

    area          in pixels
    blur          variance of the grey picture's Laplacian, at 512^2 pixels: size does not matter
    entropy       of the grey picture's histogram, in bits
    dark, bright  both the mean of HSV's V, in [0, 1]
    The vector is of unit length (of a picture of one grey it is zero, and equals no other) and
    close for near duplicates: a thumbnail of 16 x 16 less its mean [ours]; the paper takes CLIP's.
    """
    grey = image.convert("L")
    area = image.width * image.height

    scale = 512 / math.sqrt(area)
    near_512 = [max(3, round(side * scale)) for side in image.size]
    g = np.asarray(grey.resize(near_512, Image.BOX), np.float32)
    laplacian = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]

    shares = np.array([count / area for count in grey.histogram() if count])
    entropy = -(shares * np.log2(shares)).sum()

    small = np.asarray(image.resize((64, 64), Image.BOX))
    value = float(small.max(-1).mean() / 255)

    vector = np.asarray(image.resize((16, 16), Image.BOX), np.float32).ravel()
    vector = vector - vector.mean()
    vector = vector / max(float(np.linalg.norm(vector)), 1e-6)

    numbers = {"area": area, "blur": float(laplacian.var()), "entropy": float(entropy),
               "dark": value, "bright": value}
    return numbers, vector


def near_duplicates(vectors, limit, chunk=2048):
    """[n] int: for each of n unit vectors [n, d] an earlier one with which it has a cosine above
    the limit; -1 where there is none. The earlier one may have one itself: of a slow film the first
    picture alone is left."""
    found = np.full(len(vectors), -1)
    vectors = torch.as_tensor(np.array(vectors))

    # In chunks: the n^2 cosines never stand in memory together.
    for a in range(0, len(vectors), chunk):
        for b in range(0, a + 1, chunk):
            close = vectors[a:a + chunk] @ vectors[b:b + chunk].T > limit     # [chunk, chunk]
            if a == b:
                close = close.tril(-1)             # with earlier ones only
            earlier = b + close.int().argmax(1).numpy()               # the first of them
            first_met = close.any(1).numpy() & (found[a:a + chunk] < 0)
            found[a:a + chunk][first_met] = earlier[first_met]
    return found


# --- Packing: a folder of pictures into shards ----------------------------------------------------

@dataclass
class Candidate:
    """A picture with its captions, on its way into the shards."""
    key: str                  # where it came from
    picture: Part
    ending: str
    captions: list
    notes: dict               # the user's own, and what `measure` found
    vector: np.ndarray        # [768], see `measure`


# What `skipped` counts where a name has no file: a link whose target is gone, a socket.
NO_FILE = "no file, or a link to none"


def gather(folder, out, faults, skipped):
    """What lies below a folder; a tar is read as if it were a folder.

    out      left out where it lies below the folder: it is what we write ourselves
    faults   a Counter, gets what is wrong;  skipped: one of the endings that nobody reads
    Returns samples, table.
    samples  [(key, {ending: Part}, row)]: files that share a stem, one of them a picture.
             row: {name: value} of the JSON line whose `file_name` is the picture, or None
    table    [(what, files that it leaves)], from all files down to the samples
    """
    samples, rows = {}, {}
    files, words, doubles = 0, 0, 0
    tars = []
    for name, part in files_below(folder, out, tars, faults, skipped):
        files += 1
        ending = name.suffix.lower()
        parts = samples.setdefault(one_form(str(name.with_suffix(""))), {})
        if ending == ".jsonl":
            words += 1
            rows.update(folder_rows(part, name.parent, faults))
        elif ending in (".txt", ".caption", ".json"):
            words += 1
            add_part(parts, ending, part, faults)
        elif ending in ENDINGS:
            if picture_ending(parts):
                doubles += 1
                faults["duplicate key"] += 1
            parts.setdefault(ending, part)
        else:
            skipped[ending or "no ending"] += 1

    for key, parts in samples.items():
        if parts and not picture_ending(parts):
            faults["no picture"] += 1
            tqdm.write(f"{key}: no picture")
    samples = {key: parts for key, parts in samples.items() if picture_ending(parts)}
    lost_rows = len(rows.keys() - samples.keys())
    if lost_rows:
        faults["JSON line without its picture"] = lost_rows

    not_files = faults["hostile path in a tar"] + faults["link or device in a tar"]
    left = files + len(tars) + not_files + skipped[NO_FILE]
    table = [("files, those in tars too", left)]
    for what, count in (("captions and notes", words), ("tars", len(tars)),
                        ("links and hostile names in tars", not_files),
                        ("skipped for their ending", skipped.total()),
                        ("second picture of a name", doubles)):
        left -= count
        if count:
            table.append((what, left))
    return [(key, parts, rows.get(key)) for key, parts in samples.items()], table


def files_below(folder, out, tars, faults, skipped):
    """Yields (name, Part) of every file below a folder and in its tars, whose paths go to `tars`.
    The name begins at the folder, or with the tar's."""
    def unreadable(error):
        faults["unreadable folder"] += 1
        tqdm.write(f"{error.filename}: unreadable folder")

    leave_out = None if out.resolve() == folder.resolve() else out
    for path in paths_below(folder, leave_out, unreadable):
        name = PurePosixPath(path.relative_to(folder))
        if not os.path.isfile(path):               # Path.is_file raises where it may not look
            skipped[NO_FILE] += 1
        elif name.suffix.lower() != ".tar":
            yield name, Part(str(path))
        else:
            tars.append(path)
            try:
                for member, part in tar_members(path, faults):
                    yield name.with_suffix("") / member, part
            except OSError:
                faults["unreadable file"] += 1
                tqdm.write(f"{path}: unreadable file")


def picture_ending(parts):
    """Which of a sample's files is its picture; None where it has none."""
    return next((ending for ending in ENDINGS if ending in parts), None)


def folder_rows(part, parent, faults):
    """{key: row} of a file of JSON lines. parent: the folder that its file names start from."""
    rows = {}
    try:
        lines = lines_of(decode_text(read(part)))
    except (UnicodeError, OSError) as error:
        unread = isinstance(error, OSError)
        faults["unreadable file" if unread else "caption is not UTF-8"] += 1
        return rows
    for line in lines:
        try:
            row = json.loads(line)
            key = (parent / row["file_name"]).with_suffix("")
        except (ValueError, KeyError, TypeError, RecursionError):
            faults["broken JSON line"] += 1
        else:
            rows[one_form(str(key))] = row
    return rows


def examine(sample):
    """(key, parts, row) of `gather` -> (key, Candidate or None, fault or None), in a worker."""
    key, parts, row = sample
    ending = picture_ending(parts)
    try:
        captions, notes = words_of(parts, row)
        image = read_picture(read(parts[ending]))
    except Fault as fault:
        return key, None, str(fault)
    except OSError:
        return key, None, "unreadable file"

    numbers, vector = measure(image)
    notes = {**notes, **numbers, "width": image.width, "height": image.height}
    return key, Candidate(key, parts[ending], ending, captions, notes, vector), None


def examine_all(samples):
    """[Candidate] of those that can be used, and a Counter of why the others cannot, which are
    named."""
    faults = Counter()
    candidates = []
    with ProcessPoolExecutor(usable_cores(), initializer=ignore_signals) as pool:
        examined = pool.map(examine, samples, chunksize=8)
        for key, candidate, fault in tqdm(examined, "reading", len(samples), unit="picture"):
            if fault:
                faults[fault] += 1
                tqdm.write(f"{key}: {fault}")
            else:
                candidates.append(candidate)
    return candidates, faults


class Classifier(NamedTuple):
    """An image classifier of transformers; the probability of its label is the score."""
    model: str                # folder or hub id
    label: str


def classify(candidates, name, classifier):
    """Puts the classifier's score into each candidate's notes, under `name`."""
    # Takes seconds to import: only where it is asked for.
    from transformers import pipeline

    with error_context(f"--classifier {name}: cannot load {classifier.model}"):
        judge = pipeline("image-classification", classifier.model, top_k=None)
    labels = judge.model.config.label2id
    require(classifier.label in labels,
            f"--classifier {name}: {classifier.model} has no label '{classifier.label}' "
            f"among {', '.join(labels)}")

    for candidate in tqdm(candidates, name):
        answers = judge(read_picture(read(candidate.picture)))
        scores = {answer["label"]: answer["score"] for answer in answers}
        candidate.notes[name] = scores[classifier.label]


def score_of(candidate, name, faults):
    """A filter's score as a number; None where there is none. What is none, such as "UNLIKELY", is
    counted."""
    score = candidate.notes.get(name)
    if score is None:
        return None
    try:
        number = float(score)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        faults[f"{name} score that is no number"] += 1
        return None
    return number


def apply_filter(candidates, name, limit, faults):
    """What one filter leaves in, and why it took the others.

    -> [Candidate], pairs, hints
    pairs  [(key, key of what it nearly equals)] of duplicates, else []
    hints  {its name: how to set it} of a filter that took more than half, else {}
    """
    pairs = []
    if name == "duplicate":
        earlier = near_duplicates([c.vector for c in candidates], limit.value)
        excluded = earlier >= 0
        pairs = [(candidates[i].key, candidates[earlier[i]].key) for i in np.flatnonzero(excluded)]
    else:
        scores = [score_of(c, name, faults) for c in candidates]
        excluded = [limit.excludes(score) for score in scores]

    hints = {}
    count = sum(excluded)
    if 2 * count > len(candidates):
        hint = f"'{name} {limit}' takes {count} of {len(candidates)} pictures"
        if name == "duplicate":
            hint += "; --limit duplicate=1.1 keeps them"
        else:
            taken = [score for score, out in zip(scores, excluded) if out]
            # To two digits behind the point, on the side where none of them is left out.
            value = math.floor(100 * min(taken)) / 100
            if limit.sense == ">":
                value = math.ceil(100 * max(taken)) / 100
            hint += (f", which score {min(taken):.3g} to {max(taken):.3g}; "
                     f"--limit {name}={value:.12g} keeps them")
        hints[name] = hint
    return [c for c, out in zip(candidates, excluded) if not out], pairs, hints


# What a vision-language model is asked for; dense captions train better than brief ones. [paper]
ASK_CAPTION = (
    "Describe this picture in one dense paragraph of about 100 English words: objects, number, "
    "colors, places, relations, background, style. Nothing else.")


def caption_request(candidate):
    return chat_about(read_picture(read(candidate.picture)), ASK_CAPTION)


def written_caption(answer, _):
    """The caption in a model's answer: without its thoughts and remarks. NoAnswer for a refusal."""
    caption = clean(answer)
    if not caption:
        raise NoAnswer("a refusal, or no words")
    return caption


def write_captions(candidates, endpoint, faults):
    """Has the endpoint write each candidate's caption; where it fails, the old ones stay."""
    captions = endpoint.ask(candidates, caption_request, written_caption)
    for candidate, caption in zip(candidates, captions, strict=True):
        if caption:
            candidate.captions = [caption]
    faults.update(f"caption not written: {reason}" for reason in endpoint.failed)


def is_brief(candidate, min_words):
    """No caption of it has so many words."""
    return all(len(caption.split()) < min_words for caption in candidate.captions)


def pack(images, out, limits, classifiers, endpoint=None, min_words=1, shard_mb=256):
    """A folder of pictures with captions -> tar shards, cleaned in the paper's order; every file is
    counted in a table, which is printed and kept in out/pack.json. Where nothing is left, no
    empty `out` is left either, and LensError says what took most.

    limits  {filter: Limit}, all of LIMITS        classifiers  {filter: Classifier}
    endpoint  kit.chat.Endpoint that writes captions which are missing or brief; None: nobody does
    min_words  of a caption, or it is brief       shard_mb  size of a tar
    """
    images = Path(images).expanduser()
    require(not images.is_file(), f"--images {images}: a file; give the folder that it lies in")
    require(images.is_dir(), f"--images {images}: no such folder, so no pictures there")
    clear_unfinished(out)
    faults, skipped = Counter(), Counter()
    samples, table = gather(images, out, faults, skipped)
    hint = f" (skipped for their ending: {in_numbers(skipped)})" if skipped else ""
    require(samples, f"--images {images}: no pictures there{hint}")
    check_writable(out)
    if endpoint:                                   # before all of them are read
        endpoint.check(chat_about(Image.new("RGB", (64, 64), "grey"), ASK_CAPTION))

    kept, unusable = examine_all(samples)
    table.append(("unusable", len(kept)))
    usable = kept
    hints, pairs = {}, []
    if 2 * unusable.total() > len(samples):
        hints["unusable"] = (f"{unusable.total()} of {len(samples)} pictures cannot be used "
                             f"({in_numbers(unusable)})")

    for name, limit in limits.items():
        if name in classifiers:                    # scores only what earlier filters left
            classify(kept, name, classifiers[name])
        kept, its_pairs, its_hints = apply_filter(kept, name, limit, faults)
        table.append((f"{name} {limit}", len(kept)))
        pairs += its_pairs
        hints.update(its_hints)

    if endpoint:
        write_captions([c for c in kept if is_brief(c, min_words)], endpoint, faults)
    told = [c for c in kept if not is_brief(c, min_words)]
    table.append((f"no caption of {min_words} words", len(told)))
    if 2 * len(told) < len(kept):
        hints["captions"] = (
            f"{len(kept) - len(told)} of {len(kept)} pictures have no caption of {min_words} "
            "words; put one beside each (photo.txt for photo.jpg), or have --endpoint write them")

    print_table(table, skipped, unusable, faults, pairs)
    if not told:
        if not any(out.iterdir()):
            out.rmdir()
        # Each filter on all pictures: those after one that took everything have said nothing yet.
        for name, limit in limits.items():
            hints.update(apply_filter(usable, name, limit, Counter())[2])
        raise LensError(f"--images {images}: no picture is left: {'; '.join(hints.values())}")
    for hint in hints.values():
        print(f"note: {hint}")

    write_text(out / UNFINISHED, "")
    write_shards(map(packed, told), out, shard_mb)
    write_json(out / FINISHED, {"table": table, "faults": faults + unusable, "skipped": skipped,
                                "duplicates": pairs})
    (out / UNFINISHED).unlink()

    tars = list(out.glob("*.tar"))
    size = sum(tar.stat().st_size for tar in tars) / 2**20
    print(f"{out}: {len(told)} pictures in {len(tars)} tars, {size:,.1f} MB; the table is in "
          f"{out / FINISHED}\nnext: python data.py stats --data {quoted(f'{out}/*.tar')}")


def in_numbers(counter):
    """"3 .heic, 1 .mov", the most frequent first."""
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())


def packed(candidate):
    """(bytes, ending, notes) of a candidate, as `write_shards` takes them."""
    notes = {**candidate.notes, "captions": candidate.captions, "source": candidate.key}
    return read(candidate.picture), candidate.ending, notes


def print_table(table, skipped, unusable, faults, pairs):
    """How many files each step took and how many it left: what is taken adds up to what was there.
    Below it, the same in parts; faults of what is no picture; a few pairs of near duplicates."""
    print(f"\n{'':34} {'taken':>8} {'left':>10}")
    name, before = table[0]
    print(f"{name:34} {'':8} {before:10}")
    for name, left in table[1:]:
        print(f"{name:34} {before - left:8} {left:10}")
        before = left

    for title, counter in (("skipped for their ending", skipped), ("unusable", unusable),
                           ("also met", faults)):
        if counter:
            print(f"{title}:")
        for name, count in sorted(counter.items()):
            print(f"    {name:30} {count:8}")

    if pairs:
        print(f"near duplicates, {min(len(pairs), 5)} of {len(pairs)} pairs:")
    for key, earlier in pairs[:5]:
        print(f"    {key} is like {earlier}")
    print()


# A packing that is killed leaves tars behind. The next may write fewer, and those with higher
# numbers would stay and be trained on. So a file marks a folder whose packing is not finished.
UNFINISHED = "pack.unfinished"
FINISHED = "pack.json"
PACKED_FILE = re.compile(r"\d{5,}\.tar(\.index\.json|\.\d+\.new)?")


def clear_unfinished(out):
    """Removes what an unfinished packing wrote into `out`. LensError where another than such a one
    would be written over."""
    unfinished = (out / UNFINISHED).exists()
    require(not (out / FINISHED).exists(),
            f"{out} holds finished shards already; give another folder, or remove it first")
    if unfinished:
        for path in list(out.iterdir()):
            if PACKED_FILE.fullmatch(path.name):
                path.unlink()
        (out / UNFINISHED).unlink()
    require(not any(out.glob("*.tar")),
            f"{out} holds tars that no unfinished packing wrote; give another folder")
