"""data.py: pictures into batches, and your own pictures, cleaned, into tar shards.

Read before: vae.py for what a picture becomes, kit/images.py for how one is read.

    python data.py pack --images photos --out shards     # pictures + captions -> cleaned tar shards
    python data.py stats --data 'shards/*.tar'           # sizes, captions, speed, a contact sheet
    python data.py cache --data 'shards/*.tar' --weights DIR_OR_REPO --out latents   # encoded once
    python data.py cache --data 'shards/*.tar' --weights DIR_OR_REPO --text    # captions, too

The story in one paragraph: `pack` reads a folder of pictures with captions, leaves out what the
paper leaves out, and writes tar files. `Shards` finds every sample in them without unpacking any,
and gives each a bucket, a (height, width) of its own proportions. `plan` deals an epoch into
batches of one bucket each. A `Source` turns planned batches into what the denoiser learns from:
tokens of the autoencoder, features of the text encoder.

A picture's crop and caption come from a generator made from (seed, epoch, sample): they depend
neither on the batch size nor on the number of workers, nor on where a run was resumed. The order of
batches comes from (seed, epoch) and the batch size.
"""
import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

import lens
from kit.chat import Endpoint
from kit.checkpoint import load_pipeline
from kit.features import feature_key
from kit.files import (
    LensError,
    Parser,
    check_writable,
    did_you_mean,
    error_context,
    file_hash,
    finite_number,
    first_few,
    positive,
    quoted,
    read_prompts,
    replace_file,
    require,
    run_command,
    user_path,
    write_text,
)
from kit.images import (
    ENDINGS,
    Fault,
    contact_sheet,
    picture_size,
    read_picture,
    save_png,
    to_images,
)
from kit.pack import CLASSIFIED, LIMITS, Classifier, pack
from kit.places import (
    PARTS,
    Places,
    add_part_flags,
    command_for_next_part,
    expanded,
    fetch,
    fetch_places,
    gather,
    has_parts,
    locate,
    part_folder,
    vae_identity,
)
from kit.run import any_attention, gathered, make_loader, same_everywhere
from kit.tars import Part, fill_tar, find_files, read, tar_parts
from kit.tars import words_of as captions_and_notes

TOY = Path(__file__).resolve().parent / "weights" / "toy"

# --- Sizes ----------------------------------------------------------------------------------------
# A bucket is one (height, width). A batch holds one bucket: no picture is padded to another's size.

CELL = 16                    # pixels on a side of one token: 8 times down, then folded 2 x 2

# width : height, as the paper lists them.
RATIOS = ("1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1")

# (short side, long side) of the first five ratios; the other four are these turned over. [paper]
PAPER_BUCKETS = {
    512: ((352, 704), (384, 672), (416, 640), (448, 608), (512, 512)),
    768: ((544, 1088), (576, 1024), (640, 960), (672, 896), (768, 768)),
    1024: ((736, 1472), (768, 1376), (832, 1248), (864, 1152), (1024, 1024)),
    1440: ((1040, 2080), (1088, 1936), (1168, 1760), (1216, 1616), (1440, 1440)),
}


def bucket(base, ratio="1:1"):
    """(height, width) of an area base^2 at `ratio`, which is width : height ("16:9" is wide).

    Bases 512, 768, 1024 and 1440 are tables. [paper] [checkpoint] Any other base, or ratio, takes
    the sides divisible by 16 that come nearest to both, the ratio counting double. [ours]
    """
    target = parse_ratio(ratio)
    if base in PAPER_BUCKETS and ratio in RATIOS:
        place = RATIOS.index(ratio)                # 5 to 8: the table's 3 to 0, turned over
        short, long = PAPER_BUCKETS[base][min(place, 8 - place)]
        return (long, short) if target < 1 else (short, long)

    def distance(size):
        height, width = size
        off_ratio = abs(math.log(width / height / target))
        off_area = abs(math.log(height * width / base**2))
        return 2 * off_ratio + off_area

    heights = sides_near(base / math.sqrt(target))
    widths = sides_near(base * math.sqrt(target))
    return min(itertools.product(heights, widths), key=distance)


def parse_ratio(ratio):
    """"16:9" -> 16 / 9."""
    try:
        width, height = ratio.split(":", 1)
        target = float(width) / float(height)
    except (ValueError, ZeroDivisionError):
        target = 0
    require(0 < target < math.inf, f"ratio '{ratio}' is not of the form W:H, such as 16:9")
    return target


def sides_near(side):
    """The multiples of 16 around a length in pixels, smallest first."""
    below = int(side) // CELL
    return sorted({max(CELL, CELL * (below + k)) for k in (-1, 0, 1, 2)})


def buckets(base):
    """The sizes of an area: nine, or fewer where small ones coincide."""
    return sorted({bucket(base, ratio) for ratio in RATIOS})


def sorted_by_area(sizes):
    return sorted(sizes, key=lambda size: size[0] * size[1])


# Areas of a training at several sizes: the released model's [paper], and the toy's [ours].
AREAS = (512, 768, 1024)
TOY_AREAS = (64, 96, 128)


def usual_sizes(vae):
    """[(height, width)] of the model that an autoencoder belongs to; the toy's has few channels."""
    areas = AREAS if vae.config["latent_channels"] >= 32 else TOY_AREAS
    return [size for area in areas for size in buckets(area)]


def bases_of(sizes):
    """What --bases must be for these sizes: every area has one square."""
    if len(sizes) == 1:
        height, width = sizes[0]
        return f"{width}x{height}"
    return ",".join(str(height) for height, width in sizes if height == width)


def areas_of(sizes):
    """[n] the area, in pixels, that each size (h, w) belongs to: that of the nearest square among
    them. The sizes of one base are not quite equal, small ones differ by up to a third. A size that
    is farther from all squares has its own."""
    h, w = np.array(sizes).T
    squares = np.unique(h[h == w])
    areas = h * w
    if len(squares):
        off = np.log(areas[:, None] / squares**2)                     # [n, squares]
        nearest = np.abs(off).argmin(1)
        areas = np.where(np.abs(off).min(1) < np.log(1.4), squares[nearest] ** 2, areas)
    return areas


def choose_buckets(height, width, sizes):
    """[n] index into sizes: the largest area that a picture fills, or nearly (where there is none,
    the one that enlarges it least), and there the nearest ratio.

    height, width  [n] pixels        sizes  [(h, w)]
    [ours]
    """
    height, width = height[:, None], width[:, None]                   # [n, 1]
    h, w = np.array(sizes).T                                          # [buckets]

    # Three wishes in one sum, heaviest first. The picture is hardly enlarged: each 1% costs 1. The
    # area is large: twice the side gains 4 (36 for all sizes of base 512, 40 for those of 1024).
    # The ratio is near: one off by a factor of 2 costs 0.7.
    enlarged = np.log(np.maximum(h / height, w / width)).clip(min=0)  # [n, buckets]
    area = np.round(2 * np.log2(areas_of(sizes)))
    off_ratio = np.abs(np.log(height / width) - np.log(h / w))
    return (100 * enlarged - area + off_ratio).argmin(axis=1)


# --- Batches --------------------------------------------------------------------------------------

class PlannedBatch(NamedTuple):
    """One batch of an epoch, before anything of it is read."""
    bucket: int
    samples: np.ndarray       # [B] which samples of the source
    epoch: int


def plan(buckets, lengths, batch, seed, epoch):
    """An epoch as [PlannedBatch]: every sample once, one bucket a batch, like lengths together.

    buckets, lengths  [n] int
    batch  {bucket: samples in a batch}; a bucket that is not in it is left out

    What does not fill a batch makes a smaller one: nothing is lost. The order is a function of the
    arguments alone, so all that a resumed run needs to know is how many batches are done.
    """
    rng = np.random.default_rng((seed, epoch))
    planned = []
    for b in sorted(batch):
        members = rng.permutation(np.flatnonzero(buckets == b))

        # Captions are padded to the longest of a batch. Sorted within windows of eight batches, few
        # are padded by much, and the order stays random.
        window = 8 * batch[b]
        for begin in range(0, len(members), window):
            some = members[begin:begin + window]
            some = some[np.argsort(lengths[some], kind="stable")]
            for k in range(0, len(some), batch[b]):
                planned.append(PlannedBatch(b, some[k:k + batch[b]], epoch))

    return [planned[i] for i in rng.permutation(len(planned))]


@dataclass
class Batch:
    """What the denoiser learns from. Its tensors may lie on different devices: who takes it moves
    them."""
    samples: np.ndarray           # [B] which samples of the source these are
    epoch: int
    grid: tuple                   # (h, w) tokens
    text: list                    # K x [B, S, E] fp32
    mask: torch.Tensor            # [B, S] bool, True where a token is visible
    tokens: torch.Tensor = None   # [B, h*w, C] fp32; None: captions alone
    labels: torch.Tensor = None   # [B, h*w, 6], see toy/labels.py; None: not known
    # One line for each sample that could not be read and was replaced.
    faults: list = field(default_factory=list)


class Source(Protocol):
    """What a source of batches offers, as toy/dataset.World, ShardSource and CaptionSource do. The
    last two also have first_captions(count): what previews show."""
    sizes: list                   # [(height, width)] pixels of its buckets
    buckets: np.ndarray           # [n] the bucket of each sample
    digest: str                   # tells data sets apart; None: the toy world, made from --seed
    words: list                   # words that its captions use; [] where nobody counted
    waited: float                 # seconds that the last batch was late

    def lengths(self, epoch):
        """[n] lengths of that epoch's captions, in any unit: `plan` sorts by them."""

    def prepare(self, samples, stopped=None):
        """Makes sure that these samples can be streamed. Where that takes long, stopped() is asked
        now and then: when it turns true, what was made is kept. -> whether all are ready"""

    def stream(self, planned):
        """[PlannedBatch], their samples prepared -> a generator of Batch, in order."""


def prepare(run, source, planned, stopped):
    """Source.prepare for planned batches, those of all ranks: rank 0 makes what is missing, then
    the others read it. -> whether all is ready; if not, all ranks are to end."""
    samples = np.unique(np.concatenate([batch.samples for batch in planned]))
    ready = run.rank > 0 or source.prepare(samples, stopped)
    ready = same_everywhere(ready)                 # the others wait here for rank 0
    if ready and run.rank > 0:
        ready = source.prepare(samples, stopped)
    return all(gathered(ready))


def grid_of(size):
    """(height, width) in pixels -> (rows, columns) of tokens."""
    height, width = size
    return height // CELL, width // CELL


def text_and_mask(encoder, captions):
    """-> text K x [B, S, E] fp32, mask [B, S] bool, as a Batch holds them."""
    text, mask = encoder.encode(captions)
    if mask is None:                               # all are of one length
        mask = torch.ones(text[0].shape[:2], dtype=torch.bool)
    return [layer.float() for layer in text], mask


@dataclass
class FaultCount:
    """How many samples a run has met that could not be read and were replaced by others."""
    replaced: int = 0
    seen: int = 0

    def add(self, batch):
        """Counts a batch, and names its faults on stderr. LensError when more than 100 + 1% of the
        samples seen were replaced: the 100, so that a few do not end a short run."""
        for fault in batch.faults:
            print(f"replaced by the next of its bucket: {fault}", file=sys.stderr)
        self.replaced += len(batch.faults)
        self.seen += len(batch.samples)
        require(self.replaced <= 100 + 0.01 * self.seen,
                f"{self.replaced} of {self.seen} samples could not be read: more than one in a "
                "hundred; look at the shards (data.py stats)")


# --- Shards ---------------------------------------------------------------------------------------

# Endings of what `cache` writes. In a picture's place: its tokens, in bf16. (Elsewhere in the code
# a latent is what has not been folded into tokens yet; the files' ending is older.) Beside it: the
# features of its captions, one after the other, in bf16.
LATENT = ".latent"
FEATURES = ".features"

# What the index knows of a sample, one column each. A member that is missing has 0 bytes.
COLUMNS = np.dtype([
    ("shard", np.int64),              # number of its tar
    ("picture_offset", np.int64),     # where in the tar, in bytes
    ("picture_bytes", np.int64),
    ("json_offset", np.int64),
    ("json_bytes", np.int64),
    ("txt_offset", np.int64),
    ("txt_bytes", np.int64),
    ("height", np.int64),             # of the picture, in pixels
    ("width", np.int64),
    ("features_offset", np.int64),
    ("features_bytes", np.int64),
    ("is_latent", np.int64),          # 1: the picture is a latent
    ("length", np.int64),             # of the captions with their notes, in bytes
])
# The columns that tell data sets apart: those from before there were features, since a run that
# began then must go on.
TELLING = COLUMNS.names[:9]


# Of the rules by which an index is made. Where they change, this does, and old ones are made again.
INDEX_VERSION = 4


def index(path):
    """(rows, faults) of a tar. A row holds all COLUMNS but the first. faults: {name: count}.

    Kept beside it in NAME.tar.index.json, and made again when the tar's size or date is another.
    """
    kept = Path(f"{path}.index.json")
    state = [INDEX_VERSION, os.path.getsize(path), os.stat(path).st_mtime_ns]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(kept.read_text())
        if stored["state"] == state:
            return stored["rows"], stored["faults"]

    faults = Counter()
    rows = []
    for parts in tar_parts(path, faults).values():
        try:
            rows.append(index_sample(parts))
        except Fault as fault:
            faults[str(fault)] += 1

    with contextlib.suppress(LensError):           # a read-only disk: indexed again next time
        write_text(kept, json.dumps({"state": state, "rows": rows, "faults": faults}))
    return rows, faults


def index_sample(parts):
    """A sample's row of the index. Raises Fault."""
    ending = next((e for e in (*ENDINGS, LATENT) if e in parts), None)
    if ending is None:
        raise Fault("no picture")
    if ".json" not in parts and ".txt" not in parts:
        raise Fault("no caption")
    if parts[ending].length == 0:
        raise Fault("broken picture")

    # Only the .json can hold height and width: the .txt need not be read.
    only_json = {name: part for name, part in parts.items() if name == ".json"}
    _, notes = captions_and_notes(only_json)
    height, width = notes.get("height"), notes.get("width")
    if not (is_side(height) and is_side(width)):
        width, height = read_picture(read(parts[ending])).size
    elif ending != LATENT:
        # The picture is trusted, not the note, which may be of one that was stored on its side or
        # was larger. A broken header changes nothing here: it is found where the picture is read.
        with contextlib.suppress(Fault):
            width, height = stored_size(parts[ending])

    row = {"height": height, "width": width, "is_latent": int(ending == LATENT)}
    members = (("picture", ending), ("json", ".json"), ("txt", ".txt"), ("features", FEATURES))
    for name, member in members:
        part = parts.get(member, Part("", 0, 0))
        row[f"{name}_offset"] = part.offset
        row[f"{name}_bytes"] = part.length
    row["length"] = max(row["json_bytes"], row["txt_bytes"])
    # What is cached keeps the length that it had, and so its place in the plan.
    if ending == LATENT and is_side(notes.get("length")):
        row["length"] = notes["length"]
    return [row[name] for name in COLUMNS.names if name != "shard"]


# Of a picture that is indexed, so many bytes are read: nearly every header is among them.
BEGINNING = 2**16


def stored_size(part):
    """(width, height) of a picture in a tar, upright. All of its bytes are read only where the
    first do not tell: an index of terabytes is made from their headers. Raises Fault."""
    beginning = part._replace(length=min(part.length, BEGINNING))
    with contextlib.suppress(Fault):
        return picture_size(read(beginning))
    return picture_size(read(part))


def is_side(number):
    return isinstance(number, int) and 0 < number < 2**31


class Reading(NamedTuple):
    """What Shards read for a planned batch. A DataLoader makes a tensor of the pixels."""
    pixels: np.ndarray        # uint8 [B, H, W, 3]; or a latent's bf16 bits, uint8 [B, h*w * C * 2]
    captions: list            # [B] str
    faults: list              # one line for each sample that was replaced
    features: list            # [B] bf16 bits, int16 [K, S, E]; or None each


class Shards:
    """Tar shards as a data set: shards[planned batch] -> Reading.

    pattern   of the tars' paths, see kit.tars.find_files
    sizes     [(height, width)] of the buckets; kept in order of area
    seed      of crops and captions
    vae_hash  kit.places.vae_identity of the autoencoder that is used, to know stale latents by;
              None: nobody decodes them
    text_key  `text_key` of the text encoder, likewise; None: stored features are not read

    rows      [n] of COLUMNS: one array, whose memory workers share with the parent. (Reading a
              list changes its members' reference counts, which would copy its memory.)
    buckets   [n] index into sizes
    lengths   [n] bytes of the captions with their notes: near enough to sort by
    faults    {name: how many samples were left out}

    A sample that cannot be read is replaced by the next of its bucket, and named in the faults.
    """

    def __init__(self, pattern, sizes, seed=0, vae_hash=None, text_key=None):
        self.paths = find_files(pattern)
        self.sizes = sorted_by_area(sizes)
        self.seed = seed
        self.vae_hash = vae_hash
        self.text_key = text_key

        rows = []
        faults = Counter()
        few = len(self.paths) < 8
        for number, path in enumerate(tqdm(self.paths, "indexing", unit="shard", disable=few)):
            with error_context(f"cannot read {path}"):
                its_rows, its_faults = index(path)
            rows += [(number, *row) for row in its_rows]
            faults.update(its_faults)
        self.faults = +faults                      # without zeros
        require(self.paths, f"--data {pattern}: no file matches{did_you_mean(str(pattern))}")
        require(rows, f"--data {pattern}: no usable sample in {len(self.paths)} files "
                      f"({dict(self.faults)})")

        self.rows = np.array(rows, COLUMNS)
        self.buckets = choose_buckets(self.rows["height"], self.rows["width"], self.sizes)
        self.lengths = self.rows["length"]

        names = json.dumps([Path(path).name for path in self.paths])
        telling = np.stack([self.rows[name] for name in TELLING], axis=1)          # [n, 9]
        self.digest = hashlib.sha256(names.encode() + telling.tobytes()).hexdigest()[:16]

    def parts(self, i):
        """{"picture", "features", ".json", ".txt": Part} of sample i, as far as they are there."""
        row = self.rows[i]
        path = self.paths[row["shard"]]
        found = {}
        for name in ("picture", "features", ".json", ".txt"):
            column = name.removeprefix(".")
            offset, length = int(row[f"{column}_offset"]), int(row[f"{column}_bytes"])
            if length > 0:
                found[name] = Part(path, offset, length)
        return found

    def first_captions(self, count):
        """A caption each of the first `count` samples that have one."""
        found = []
        for i in range(len(self.rows)):
            if len(found) == count:
                break
            with contextlib.suppress(Fault, OSError):
                captions, _ = captions_and_notes(self.parts(i))
                found += captions[:1]
        return found

    def file_name(self, i):
        return Path(self.paths[self.rows["shard"][i]]).name

    def sample(self, i, size, epoch):
        """Sample i as that epoch shows it: (pixels or bits of a latent, caption, bits of its
        features or None). Raises Fault. Crop and caption are drawn from (seed, epoch, i)."""
        rng = np.random.default_rng((self.seed, epoch, int(i)))
        parts = self.parts(i)
        captions, notes = captions_and_notes(parts)
        blob = read(parts["picture"])

        # A latent's crop is settled, but drawn all the same: the caption is then the one that the
        # picture would get.
        where = rng.random(2)
        if not self.rows["is_latent"][i]:
            pixels = np.asarray(read_picture(blob, size, where=where))
        else:
            self.check_latent(i, notes.get("latent"), size)           # [vae_hash, height, width]
            pixels = np.frombuffer(blob, np.uint8)

        if not captions:
            raise Fault("no caption")
        chosen = rng.integers(len(captions))
        features = None
        if self.text_key is not None:
            features = self.features(i, parts, notes, chosen)
        return pixels, captions[chosen], features

    def features(self, i, parts, notes, chosen):
        """The bf16 bits of one caption's features, int16 [K, S, E]. chosen: its number."""
        stored = notes.get("features", {})
        require(stored.get("key") == self.text_key,
                f"{self.file_name(i)} holds prompt features of another text encoder, tokenizer or "
                "chat form, or of other layers: run `data.py cache --text` again")
        layers, width, counts = len(stored["layers"]), stored["width"], stored["tokens"]
        token = 2 * layers * width                                    # bytes of one
        begin = parts["features"].offset + token * sum(counts[:chosen])
        bits = read(Part(parts["features"].path, begin, token * counts[chosen]))
        if len(bits) < token * counts[chosen]:
            raise Fault("features end early")
        return np.frombuffer(bits, np.int16).reshape(layers, counts[chosen], width).copy()

    def check_latent(self, i, made_for, size):
        """LensError where a latent is of another autoencoder or bucket. made_for: [vae_hash,
        height, width] of its notes."""
        if self.vae_hash is None or made_for == [self.vae_hash, *size]:
            return
        require(isinstance(made_for, list) and made_for[:1] == [self.vae_hash],
                f"{self.file_name(i)} holds latents of another autoencoder: make them again, by "
                "data.py cache with the --weights that training has as --parts")
        raise LensError(f"{self.file_name(i)} holds latents of other sizes than this training "
                        "takes: make them again, by data.py cache with "
                        f"--bases {bases_of(self.sizes)}")

    def next_in_bucket(self, i):
        """The first sample of its bucket after i; after the last, the bucket's first."""
        members = np.flatnonzero(self.buckets == self.buckets[i])
        return members[np.searchsorted(members, i + 1) % len(members)]

    def sample_or_next(self, i, size, epoch, faults):
        """Sample i, or the first after it in its bucket that can be read; `faults` gets a line for
        each that cannot."""
        for _ in range(20):
            try:
                return self.sample(i, size, epoch)
            except (Fault, OSError) as fault:
                faults.append(f"{self.file_name(i)}, sample {i}: {fault}")
                i = self.next_in_bucket(i)
        raise LensError(f"20 samples in a row cannot be read; the last: {faults[-1]}")

    def __getitem__(self, planned):
        bucket, samples, epoch = planned
        pixels, captions, faults, features = [], [], [], []
        for i in samples:
            picture, caption, own = self.sample_or_next(i, self.sizes[bucket], epoch, faults)
            pixels.append(picture)
            captions.append(caption)
            features.append(own)
        return Reading(np.stack(pixels), captions, faults, features)


# --- Sources of batches ---------------------------------------------------------------------------

class ErrorsAsResults:
    """Shards for a loader's workers. An error raised in a worker would reach us with its whole
    traceback as its message; so it is handed over like a result."""

    def __init__(self, shards):
        self.shards = shards

    def __getitem__(self, planned):
        try:
            return self.shards[planned]
        except LensError as error:
            return error


class ShardSource:
    """A Source: tar shards, read by workers while the last batch trains, encoded by frozen models.

    pattern, sizes, seed, vae_hash, text_key  as Shards has them
    vae, encoder  on `device`; None both where latents and features are cached (text_key is given)

    A picture and a caption are encoded each by itself, and rounded to bf16, as `cache` stores them:
    what a run learns from depends neither on the batch (other shapes are summed in another order)
    nor on whether it was cached. Without the rounding an encoder in fp32, as the toy's, would say
    more here than its cache; one in bf16 loses nothing.
    """

    def __init__(self, pattern, sizes, seed, vae, encoder, device, workers, vae_hash, say=print,
                 text_key=None):
        self.shards = Shards(pattern, sizes, seed, vae_hash, text_key)
        self.sizes = self.shards.sizes
        self.buckets = self.shards.buckets
        self.digest = self.shards.digest
        self.words = []
        self.waited = 0.0

        self.vae = vae
        self.encoder = encoder
        self.device = device
        self.workers = workers
        say(f"{len(self.buckets):,} samples in {len(self.shards.paths)} shards; "
            f"left out: {dict(self.shards.faults) or 'nothing'}")
        some_have(self.shards, "is_latent", "latents", f"--data {pattern}")

    def lengths(self, epoch):
        return self.shards.lengths

    def first_captions(self, count):
        return self.shards.first_captions(count)

    def prepare(self, samples, stopped=None):
        return True                                # read as they are streamed

    def stream(self, planned):
        # What the loader takes for an index is a PlannedBatch, and what it takes for an item is the
        # Reading of a whole batch.
        loader = iter(make_loader(ErrorsAsResults(self.shards), planned, self.workers,
                                  pin_memory=self.device != "cpu"))
        try:
            for bucket, samples, epoch in planned:
                begin = time.perf_counter()
                reading = next(loader)
                self.waited = time.perf_counter() - begin
                if isinstance(reading, LensError):
                    raise reading

                grid = grid_of(self.sizes[bucket])
                tokens = self.encode_pixels(reading.pixels, grid)
                if self.encoder is None:
                    features = [torch.as_tensor(bits).view(torch.bfloat16)
                                for bits in reading.features]
                else:
                    features = [encode_caption(self.encoder, caption)
                                for caption in reading.captions]
                text, mask = padded(features)
                yield Batch(samples, epoch, grid, text, mask,
                            tokens=tokens, faults=reading.faults)
        finally:
            # Ends the workers now. An error's traceback would keep the loader for the garbage
            # collector, which closes their pipes first and then waits five seconds for each.
            del loader

    def encode_pixels(self, pixels, grid):
        """A Reading's pixels as a tensor, pictures or latents that `cache` wrote, -> tokens
        [B, h*w, C] fp32 on the device. grid: (h, w)"""
        if pixels.ndim == 4:
            return torch.stack([encode_picture(self.vae, picture, self.device)
                                for picture in pixels]).float()

        rows, columns = grid
        tokens = pixels.view(torch.bfloat16).view(len(pixels), rows * columns, -1)
        return tokens.to(self.device).float()


@torch.no_grad()
def encode_picture(vae, pixels, device):
    """uint8 [H, W, 3] -> tokens [h*w, C] bf16, on the device."""
    images = to_images(pixels[None], device).to(next(vae.parameters()).dtype)
    with any_attention():                          # training chooses a kernel for its own blocks
        mean, _ = vae.encode(images)
        return vae.to_tokens(mean)[0].bfloat16()


def encode_caption(encoder, caption):
    """-> its features [K, S, E] bf16, on the encoder's device."""
    with any_attention():
        (features,) = encoder.encode_each([caption])
    return features.bfloat16()


def padded(features):
    """[[K, S, E]] of captions -> text K x [B, S, E] fp32, mask [B, S] bool, as a Batch holds
    them."""
    counts = torch.tensor([own.shape[1] for own in features])                      # [B]
    longest = int(counts.max())
    same_length = [F.pad(own, (0, 0, 0, longest - own.shape[1])) for own in features]
    text = torch.stack(same_length, 1).float()                                     # [K, B, S, E]
    return list(text), torch.arange(longest) < counts[:, None]


def encoder_dtype(weights):
    """The dtype in which autoencoder and text encoder of `weights`, Places or a name, encode for
    training: fp32 for the toy's, which are small enough and known by an autoencoder of fewer
    channels than FLUX.2's; None: as they are stored."""
    _, config = locate(fetch(gather(weights).vae, ("vae",)), "vae")
    full = lens.SIZES["full"].vae["latent_channels"]
    channels = (config or {}).get("latent_channels", full)
    return torch.float32 if channels < full else None


def text_key(weights, layers):
    """What features in shards depend on beside the caption. layers: those that are read."""
    places = fetch_places(gather(weights), ("vae", "text_encoder"))
    return feature_key(places, encoder_dtype(weights), lens.DATE, layers, by_content=True)


class CaptionSource:
    """A Source of captions alone, one a line of a file; the sizes take turns."""

    def __init__(self, path, sizes, encoder):
        self.captions, _ = read_prompts(path)
        self.encoder = encoder
        self.sizes = list(sizes)
        self.buckets = np.arange(len(self.captions)) % len(self.sizes)
        self.digest = hashlib.sha256(json.dumps(self.captions).encode()).hexdigest()[:16]
        self.words = []
        self.waited = 0.0

        rows, _ = encoder.tokenize(self.captions)
        self.counts = np.array([len(row) for row in rows])

    def lengths(self, epoch):
        return self.counts

    def first_captions(self, count):
        return self.captions[:count]

    def prepare(self, samples, stopped=None):
        return True                                # read as they are streamed

    def stream(self, planned):
        for bucket, samples, epoch in planned:
            captions = [self.captions[i] for i in samples]
            text, mask = text_and_mask(self.encoder, captions)
            yield Batch(samples, epoch, grid_of(self.sizes[bucket]), text, mask)


# --- What is cached already -----------------------------------------------------------------------

class CachedInputs(NamedTuple):
    """What shards hold in which every picture and every caption is encoded."""
    weights: Places           # of the parts that encoded them
    vae_hash: str
    channels: int             # of a token
    text_key: str
    layers: tuple             # of the text encoder
    width: int                # of the text encoder


def cached_inputs(pattern):
    """-> CachedInputs of shards that `cache --text` wrote, or None of others. LensError where some
    hold features and some do not."""
    shards = Shards(pattern, [(CELL, CELL)])
    if not some_have(shards, "features_bytes", "prompt features", f"--data {pattern}"):
        return None
    try:
        _, notes = captions_and_notes(shards.parts(0))
    except Fault as fault:
        raise LensError(f"{shards.file_name(0)}, the first sample: {fault}") from None
    features = notes.get("features")
    if not shards.rows["is_latent"][0] or not isinstance(features, dict):
        return None                                # another program's
    vae_hash, height, width = notes["latent"]
    rows, columns = grid_of((height, width))
    return CachedInputs(
        weights=Places(**features["weights"]),
        vae_hash=vae_hash,
        channels=int(shards.rows["picture_bytes"][0]) // (2 * rows * columns),
        text_key=features["key"],
        layers=tuple(features["layers"]),
        width=features["width"])


def some_have(shards, column, what, data):
    """Whether samples have something by a column of the index. LensError where some do and some do
    not. data: how the user named them."""
    has = shards.rows[column] > 0
    if has.all() or not has.any():
        return bool(has.any())
    without = np.flatnonzero(~has)
    raise LensError(f"{data}: {len(without)} of {len(has)} samples hold no {what}, the first of "
                    f"them in {shards.file_name(without[0])}, the others do: cache all of them "
                    "alike, or name one kind alone")


def check_cached(cached, parts, init, layers):
    """LensError where inputs were cached by other weights than those that the user names, with
    --parts or as --init, where these are here and have an autoencoder and a text encoder.

    parts, init  Places or a name, or None;  layers: of the text encoder that the denoiser reads
    """
    for named in (parts, init):
        # Of a hub id they would be downloaded for this alone, 14 GB of them.
        if named and has_both(gather(named)):
            by = f"(cached by {cached.weights}): run `data.py cache --text` again"
            require(cached.vae_hash == vae_identity(gather(named).vae),
                    f"--data holds latents of another autoencoder than {named} has {by}")
            require(cached.text_key == text_key(named, layers),
                    "--data holds prompt features of another text encoder, tokenizer, chat form "
                    f"or layers than {named} has {by}")
            return


def has_both(places):
    """Whether an autoencoder and a text encoder are on this machine."""
    paths = [expanded(places.vae), expanded(places.text_encoder)]
    apart = paths[0] != paths[1]
    return all(path.exists() for path in paths) and (apart or has_parts(paths[0]))


# --- Caching: pictures and captions encoded once --------------------------------------------------

def cache(pattern, sizes, weights, out, with_text=False):
    """Shards again, each picture as the tokens of its centre crop, for sets small enough to keep;
    with_text: each of its captions as its features, too.

    sizes    of the buckets; None: those of the model that the autoencoder belongs to
    weights  Places of autoencoder and text encoder, or the name of both

    What is there already of the same tar, buckets, autoencoder and text encoder is kept. Pictures
    that cannot be read are named on stderr, counted, and left out. The others keep their order, so
    that a run draws for each what it would draw without the cache.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = ("vae", "text_encoder") if with_text else ("vae",)
    weights = gather(weights)
    vae_hash, dtype = vae_identity(weights.vae), encoder_dtype(weights)
    _, vae, encoder = load_pipeline(weights, device, dtype, parts=parts)
    shards = Shards(pattern, sizes or usual_sizes(vae))
    check_cache_folder(pattern, shards.paths, out)

    features = None                                # notes on them
    if with_text:
        features = {
            "key": text_key(weights, encoder.layers),
            "weights": {part: absolute(weights.of(part)) for part in PARTS},
            "layers": list(encoder.layers),
            "width": encoder.model.config.hidden_size}
    keys = []
    for path in shards.paths:
        # What is stored depends on these. Sizes as lists, as JSON gives them back.
        keys.append([file_hash(path), vae_hash, *map(list, shards.sizes), str(dtype),
                     "centre, colours of sRGB, in order", features and features["key"]])
    targets = [Path(out) / Path(path).name for path in shards.paths]
    stale = [number for number, target in enumerate(targets) if cached_key(target) != keys[number]]
    to_encode = np.flatnonzero(np.isin(shards.rows["shard"], stale))
    check_room(shards, to_encode, channels=4 * vae.config["latent_channels"], encoder=encoder,
               out=out)

    faults = []
    with tqdm(total=len(to_encode), desc="encoding", unit="picture") as bar:
        for number in stale:
            members = np.flatnonzero(shards.rows["shard"] == number)
            notes = {"latent": vae_hash, "features": features, "key": keys[number]}
            samples = encoded(shards, members, vae, encoder, device, notes, faults, bar)
            # The numbers are the names in the tar.
            write = functools.partial(fill_tar, samples=enumerate(samples))
            replace_file(targets[number], write)   # calls write(path beside the target)

    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    count = sum(len(index(target)[0]) for target in targets)
    size = in_bytes(sum(target.stat().st_size for target in targets))
    what = "latents and prompt features" if with_text else "latents"
    print(f"{out}: {what} of {count} pictures in {len(targets)} tars, {size}; "
          f"{len(stale)} tars were encoded now, {len(targets) - len(stale)} were there already; "
          f"{len(faults)} pictures were left out")
    if shards.sizes == sorted_by_area(usual_sizes(vae)):
        name = "toy" if vae.config["latent_channels"] < 32 else "full"
        print(f"next: {training_command(f'{out}/*.tar', name, weights)}")
    else:
        print("next: training in a stage of the same areas (README.md, Your own pictures)")


def check_cache_folder(pattern, paths, out):
    """LensError unless `out` can take the cached tars of these: one for each, and nothing else."""
    folders = {Path(path).resolve().parent for path in paths}
    require(Path(out).resolve() not in folders,
            f"--out {out}: there the pictures are, which would be written over; give another")
    names = Counter(Path(path).name for path in paths)
    twice = [name for name, count in names.items() if count > 1]
    require(not twice, f"--data {pattern}: two tars are named {first_few(twice)}, and would be "
            "written over each other; cache each folder by itself")
    others = {path.name for path in Path(out).glob("*.tar")} - names.keys()
    require(not others, f"--out {out}: holds {first_few(others)}, not among --data; they would be "
                        "trained on with the others: remove them, or give another folder")
    check_writable(out)


def absolute(name):
    """The whole path of something on this machine; a hub id as it is."""
    path = expanded(name)
    return str(path.resolve() if path.exists() else name)


def training_command(pattern, size, weights):
    """A command that trains on shards, starting from the weights whose autoencoder is used; or from
    nothing, where these are an autoencoder and a text encoder alone."""
    places = gather(weights)
    if len({str(places.of(part)) for part in PARTS}) > 1:         # the autoencoder starts nothing
        return ("python train.py ... with the same --vae and --text-encoder (README.md, Your own "
                "pictures)")
    name = quoted(os.path.relpath(places.vae) if os.path.exists(places.vae) else places.vae)
    command = f"python train.py --data {quoted(pattern)} --size {size} --stage 2 --parts {name}"
    path = expanded(places.vae)
    if path.is_dir() and not part_folder(path, "transformer").exists():
        return f"{command} --out {name}"
    command += f" --init {name} --lora 16 --out runs/mine"
    return command + " --steps 300" if size == "toy" else command


def cached_key(path):
    """The key under which a tar of latents was made, or None."""
    with contextlib.suppress(OSError, Fault):
        for parts in tar_parts(path, Counter()).values():
            _, notes = captions_and_notes(parts)
            return notes.get("key")                # the first sample's: all have the same
    return None


def check_room(shards, members, channels, encoder, out):
    """Says how much will be written for these samples, and raises LensError where the disk has less
    room. channels: of a token;  encoder: None where captions are not encoded"""
    latents = features = captions = 0
    for b, count in zip(*np.unique(shards.buckets[members], return_counts=True), strict=True):
        rows, columns = grid_of(shards.sizes[b])
        latents += int(count) * rows * columns * channels * 2         # bytes: bf16
    what = f"{len(members):,} pictures: {in_bytes(latents)} of latents"

    if encoder is not None:
        token = 2 * len(encoder.layers) * encoder.model.config.hidden_size
        for i in tqdm(members, "counting tokens", disable=len(members) < 10_000):
            with contextlib.suppress(Fault, OSError):                 # left out, and named later
                own, _ = captions_and_notes(shards.parts(i))
                rows, offset = encoder.tokenize(own)
                captions += len(own)
                features += token * sum(len(row) - offset for row in rows)
        what += f"; {captions:,} captions: {in_bytes(features)} of prompt features"

    free = shutil.disk_usage(out).free
    print(f"{what}; {in_bytes(free)} are free at {out}")
    require(latents + features < free, f"--out {out}: no room for {in_bytes(latents + features)}: "
            f"{in_bytes(free)} are free")


def in_bytes(count):
    """"3.5 GiB"."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 2**10:.1f} KiB"


def encoded(shards, members, vae, encoder, device, common, faults, bar):
    """Yields (bytes, ending, notes) of those samples, and with an encoder also (ending, bytes) of
    their features, as `fill_tar` takes them. `faults` gets a line for each that cannot be read; the
    bar counts all. LensError where they are latents already.

    common   {"latent": the autoencoder's hash, "features": notes on them or None, "key": the tar's}
    """
    for i in members:
        bar.update()
        height, width = size = shards.sizes[shards.buckets[i]]
        try:
            parts = shards.parts(i)
            captions, notes = captions_and_notes(parts)
            require(not shards.rows["is_latent"][i],
                    f"{shards.file_name(i)} holds latents already: give --data the pictures")
            image = read_picture(read(parts["picture"]), size)
            if not captions:
                raise Fault("no caption")
        except (Fault, OSError) as fault:
            faults.append(f"{shards.file_name(i)}, sample {i}: {fault}")
            continue

        tokens = encode_picture(vae, torch.from_numpy(np.array(image)), device)    # [h*w, C]
        notes = {
            **notes, "captions": captions, "height": height, "width": width,
            "length": int(shards.lengths[i]), "latent": [common["latent"], height, width],
            "key": common["key"]}
        if encoder is None:
            notes.pop("features", None)            # another program's
            yield bits_of(tokens), LATENT, notes
            continue
        features = [encode_caption(encoder, caption) for caption in captions]      # [K, S, E] each
        counts = [own.shape[1] for own in features]
        notes["features"] = {**common["features"], "tokens": counts}
        blob = b"".join(bits_of(own) for own in features)
        yield bits_of(tokens), LATENT, notes, (FEATURES, blob)


def bits_of(x):
    """The bytes of a bf16 tensor."""
    return x.cpu().contiguous().view(torch.int16).numpy().tobytes()


# --- Statistics -----------------------------------------------------------------------------------

def stats(pattern, sizes, out):
    """Prints sizes, faults, speed and caption lengths of shards; out: a contact sheet (PNG) of what
    training would see."""
    shards = Shards(pattern, sizes)
    print(f"{len(shards.rows)} samples in {len(shards.paths)} shards, index {shards.digest}; "
          f"left out: {dict(shards.faults) or 'nothing'}")
    for b, count in zip(*np.unique(shards.buckets, return_counts=True), strict=True):
        height, width = shards.sizes[b]
        print(f"{width:5} x {height:<5} {count:9}  {count / len(shards.rows):6.1%}")

    one_each = dict.fromkeys(range(len(shards.sizes)), 1)
    planned = plan(shards.buckets, shards.lengths, one_each, seed=0, epoch=0)[:500]
    words, faults, shown = [], [], []
    begin = time.perf_counter()
    for batch in tqdm(planned, "decoding"):
        reading = shards[batch]
        words += [len(caption.split()) for caption in reading.captions]
        faults += reading.faults
        if reading.pixels.ndim == 4 and len(shown) < 24:              # a picture, not a latent
            shown.append(thumbnail(reading.pixels[0]))
    speed = len(planned) / (time.perf_counter() - begin)

    print(f"{speed:.1f} samples/s read by one process")
    quantiles = np.quantile(words, (0.05, 0.5, 0.95)).round().astype(int).tolist()
    print(f"words a caption (5%, half, 95%): {quantiles}")
    for fault in faults:
        print(fault)
    save_png(contact_sheet(shown, columns=6), out)
    what = f"{len(shown)} of the pictures as training sees them" if shown else "empty, of latents"
    print(f"{out}: {what}")
    print("next, on a laptop (the released model: README.md, Your own pictures): "
          f"{training_command(pattern, 'toy', TOY)}")
    if shown:
        print("or with a few thousand pictures, everything from nothing: "
              f"{command_for_next_part('runs/mine', 'toy', pattern)}")


def thumbnail(pixels):
    """uint8 [H, W, 3] -> PIL image of at most 128 pixels a side."""
    image = Image.fromarray(pixels)
    if max(image.size) > 128:
        image = ImageOps.contain(image, (128, 128))
    return image


# --- Command line ---------------------------------------------------------------------------------

def limit_option(text):
    """"blur=20" -> ("blur", 20.0), an argparse type."""
    name, _, value = text.partition("=")
    if name not in LIMITS:
        raise argparse.ArgumentTypeError(f"{name}: the limits are {', '.join(LIMITS)}")
    return name, finite_number(value)


def classifier_option(text):
    """"nsfw=MODEL:LABEL" -> ("nsfw", Classifier), an argparse type."""
    name, _, rest = text.partition("=")
    model, _, label = rest.rpartition(":")
    if name not in CLASSIFIED or not model:
        raise argparse.ArgumentTypeError(
            f"{text}: must be NAME=MODEL:LABEL, NAME one of {', '.join(CLASSIFIED)}")
    return name, Classifier(model, label)


def bases_option(text):
    """"64,96" -> the sizes of both areas; "64x128" is that width and height alone. An argparse
    type."""
    sizes = []
    for base in text.split(","):
        one_size = re.fullmatch(r"(\d+)x(\d+)", base)
        if one_size:
            sizes.append((positive(one_size[2]), positive(one_size[1])))
        else:
            sizes += buckets(positive(base))
    return sizes


def build_parser():
    parser = Parser("Pictures of your own as tar shards to train on.", __doc__)
    parser.add_argument("command", nargs="?", choices=("pack", "stats", "cache"))
    parser.add_argument("--out", metavar="PATH", type=user_path,
                        help="pack, cache: a folder (default: shards, latents); "
                             "stats: the contact sheet (default: shards.png)")

    of_pack = parser.add_argument_group("pack")
    of_pack.add_argument("--images", metavar="DIR",
                         help="pictures, with captions in .txt, .caption or .json beside them or "
                              "in .jsonl with file_name; tars of such too (docs/formats.md)")
    of_pack.add_argument("--limit", action="append", default=[], type=limit_option,
                         metavar="NAME=VALUE",
                         help="of a filter, which leaves a picture out where (default) " +
                              ", ".join(f"{name} {limit}" for name, limit in LIMITS.items()))
    of_pack.add_argument("--classifier", action="append", default=[], type=classifier_option,
                         metavar="NAME=MODEL:LABEL",
                         help="nsfw, aesthetic or watermark scores by an image classifier of "
                              "transformers; without it, they are columns of the metadata")
    of_pack.add_argument("--endpoint", metavar="URL",
                         help="OpenAI-compatible, up to and with /v1; writes captions that are "
                              "missing or brief; its key is read from LENS_API_KEY")
    of_pack.add_argument("--model", default="default",
                         help="the endpoint's model (default: the name '%(default)s')")
    of_pack.add_argument("--min-words", type=positive, default=1, metavar="N",
                         help="a shorter caption is brief (default: %(default)s; the paper's have "
                              "about 109)")
    of_pack.add_argument("--shard-mb", type=positive, default=256, metavar="N",
                         help="size of a tar (default: %(default)s)")

    of_others = parser.add_argument_group("stats, cache")
    of_others.add_argument("--data", metavar="GLOB",
                           help="the shards, say 'shards/*.tar', or their folder")
    of_others.add_argument("--bases", type=bases_option, metavar="N,N",
                           help="areas of the buckets: those of the stage that you will train; "
                                "64x64 is one size alone (default: 512,768,1024, as train.py "
                                "--size full --stage 2; of cache with the toy's autoencoder "
                                "64,96,128, as --size toy --stage 2)")
    of_others.add_argument("--weights", metavar="DIR_OR_REPO", default=str(TOY),
                           help="cache: whose autoencoder and text encoder (default: the toy's)")
    add_part_flags(of_others.add_argument)
    of_others.add_argument("--text", action="store_true",
                           help="cache: the captions' features too, so that train.py loads neither "
                                "autoencoder nor text encoder; what both take on the disk is told "
                                "first")
    return parser


DEFAULT_OUT = {"pack": "shards", "stats": "shards.png", "cache": "latents"}


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        require(not args.images, f"which command? python data.py pack --images {args.images}")
        require(not args.data, f"which command? python data.py stats --data '{args.data}'")
        parser.print_help()
        return

    out = Path(args.out or DEFAULT_OUT[args.command])
    if args.command == "pack":
        require(not args.data, "pack reads a folder of pictures: --images DIR, not --data")
        require(args.images, "pack needs --images DIR, the folder of your pictures")
        limits = dict(LIMITS)
        for name, value in args.limit:
            limits[name] = limits[name]._replace(value=value)
        endpoint = None
        if args.endpoint:
            endpoint = Endpoint(args.endpoint, args.model, journal=out / "captions.jsonl")
        pack(args.images, out, limits, dict(args.classifier), endpoint=endpoint,
             min_words=args.min_words, shard_mb=args.shard_mb)
    else:
        require(not args.images, f"{args.command} reads shards: --data 'shards/*.tar', not "
                "--images; pack makes shards of pictures")
        require(args.data, f"{args.command} needs --data, say --data 'shards/*.tar'")
        if args.command == "stats":
            sizes = [size for area in AREAS for size in buckets(area)]
            stats(args.data, args.bases or sizes, out)
        else:
            weights = gather(args.weights, args.vae, args.text_encoder)
            cache(args.data, args.bases, weights, out, with_text=args.text)


if __name__ == "__main__":
    run_command(main)
