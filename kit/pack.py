"""Cleaning: a folder of pictures with captions becomes tar shards, in the paper's order of filters.

Read before: kit/tars.py. Its command is `python data.py pack`.
"""
import json
import math
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from kit.chat import NoAnswer, chat_about, clean
from kit.files import error_context, require, write_json, write_text
from kit.images import ENDINGS, Fault, read_picture
from kit.tars import Part, read, tar_parts, words_of, write_shards

# --- Which pictures are left out ------------------------------------------------------------------

class Limit(NamedTuple):
    """Of one filter. What has no score is not judged by it."""
    sense: str                # "<": a picture below the value is left out; ">": one above it
    value: float

    def excludes(self, score):
        if not isinstance(score, (int, float)):
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
    The vector is of unit length and close for near duplicates: a thumbnail of 16 x 16 less its
    mean [ours]; the paper takes CLIP's.
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
    """[n] bool: which unit vectors [n, d] have a cosine above the limit with an earlier one."""
    found = np.zeros(len(vectors), bool)
    vectors = torch.as_tensor(np.array(vectors))

    # In chunks: the n^2 cosines never stand in memory together.
    for a in range(0, len(vectors), chunk):
        for b in range(0, a + 1, chunk):
            close = vectors[a:a + chunk] @ vectors[b:b + chunk].T > limit     # [chunk, chunk]
            if a == b:
                close = close.tril(-1)             # with earlier ones only
            found[a:a + chunk] |= close.any(1).numpy()
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


def gather(folder, faults):
    """[(key, {ending: Part}, row)] of all below a folder: files that share a stem, members of tars.
    row: {name: value} of the JSON line whose `file_name` is the picture, or None."""
    samples = {}
    rows = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        name = path.relative_to(folder)
        stem = str(name.with_suffix(""))
        ending = path.suffix.lower()

        if ending == ".jsonl":
            rows.update(folder_rows(path, name.parent, faults))
        elif ending == ".tar":
            for key, parts in tar_parts(path, faults).items():
                samples[f"{stem}/{key}"] = parts
        elif ending in (*ENDINGS, ".txt", ".json"):
            parts = samples.setdefault(stem, {})
            if ending in ENDINGS and any(e in parts for e in ENDINGS):
                faults["duplicate key"] += 1
            parts.setdefault(ending, Part(str(path)))
    return [(key, parts, rows.get(key)) for key, parts in samples.items()]


def folder_rows(path, parent, faults):
    """{key: row} of a file of JSON lines. parent: the folder that its file names start from."""
    rows = {}
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            key = (parent / row["file_name"]).with_suffix("")
        except (ValueError, KeyError, TypeError, RecursionError):
            faults["broken JSON line"] += 1
        else:
            rows[str(key)] = row
    return rows


def examine(sample):
    """(key, parts, row) of `gather` -> (key, Candidate or None, fault or None), in a worker."""
    key, parts, row = sample
    try:
        ending = next((e for e in ENDINGS if e in parts), None)
        if ending is None:
            raise Fault("no picture")
        captions, notes = words_of(parts, row)
        image = read_picture(read(parts[ending]))
    except Fault as fault:
        return key, None, str(fault)
    except OSError:
        return key, None, "unreadable file"

    numbers, vector = measure(image)
    notes = {**notes, **numbers, "width": image.width, "height": image.height}
    return key, Candidate(key, parts[ending], ending, captions, notes, vector), None


def examine_all(samples, faults):
    """[Candidate] of those that can be used; the others are named, and counted in `faults`."""
    candidates = []
    with ProcessPoolExecutor() as pool:
        examined = pool.map(examine, samples, chunksize=8)
        for key, candidate, fault in tqdm(examined, "reading", len(samples), unit="picture"):
            if fault:
                faults[fault] += 1
                tqdm.write(f"{key}: {fault}")
            else:
                candidates.append(candidate)
    return candidates


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


def apply_filter(candidates, name, limit):
    """The candidates that one filter leaves in."""
    if name == "duplicate":
        excluded = near_duplicates([c.vector for c in candidates], limit.value)
    else:
        excluded = [limit.excludes(c.notes.get(name)) for c in candidates]
    return [c for c, out in zip(candidates, excluded, strict=True) if not out]


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
    """A folder of pictures with captions -> tar shards, cleaned in the paper's order; every loss is
    counted in a table, which is printed and kept in out/pack.json.

    limits  {filter: Limit}, all of LIMITS        classifiers  {filter: Classifier}
    endpoint  kit.chat.Endpoint that writes captions which are missing or brief; None: nobody does
    min_words  of a caption, or it is brief       shard_mb  size of a tar
    """
    clear_unfinished(out)
    faults = Counter()
    samples = gather(images, faults)
    require(samples, f"--images {images}: no pictures there")
    if endpoint:                                   # before all of them are read
        endpoint.check(chat_about(Image.new("RGB", (64, 64), "grey"), ASK_CAPTION))
    write_text(out / UNFINISHED, "")

    table = [("read", len(samples))]
    kept = examine_all(samples, faults)
    table.append(("broken, one way or another", len(kept)))

    for name, limit in limits.items():
        if name in classifiers:                    # scores only what earlier filters left
            classify(kept, name, classifiers[name])
        kept = apply_filter(kept, name, limit)
        table.append((f"{name} {limit}", len(kept)))

    if endpoint:
        write_captions([c for c in kept if is_brief(c, min_words)], endpoint, faults)
    kept = [c for c in kept if not is_brief(c, min_words)]
    table.append((f"no caption of {min_words} words", len(kept)))

    write_shards(map(packed, kept), out, shard_mb)
    print_table(table, faults)
    write_json(out / FINISHED, {"table": table, "faults": faults})
    (out / UNFINISHED).unlink()


def packed(candidate):
    """(bytes, ending, notes) of a candidate, as `write_shards` takes them."""
    notes = {**candidate.notes, "captions": candidate.captions, "source": candidate.key}
    return read(candidate.picture), candidate.ending, notes


def print_table(table, faults):
    """How many pictures each filter took, and how many it left."""
    before = table[0][1]
    for name, count in table:
        print(f"{name:30} {count - before:8} {count:10}")
        before = count
    for name, count in sorted(faults.items()):
        print(f"    {name:26} {count:8}")


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
    require(unfinished or not any(out.glob("*.tar")),
            f"{out} holds tars that no unfinished packing wrote; give another folder")
    if unfinished:
        for path in list(out.iterdir()):
            if PACKED_FILE.fullmatch(path.name):
                path.unlink()
