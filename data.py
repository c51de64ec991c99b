"""
data.py - the toy world: scenes that can be drawn and captioned; and pictures of your own, cleaned, in shards, in batches.

Read `lens.py` and `vae.py` first for what a picture becomes; this file says where pictures and captions come from. Every
random choice comes from a generator made from (seed, epoch, sample): a sample does not depend on batch size, worker count
or where a run was resumed.

    python data.py                                                 # a contact sheet of the toy world, and its captions
    python data.py pack --images photos --out shards               # pictures + captions -> cleaned tar shards
    python data.py stats --data 'shards/*.tar'                     # buckets, caption lengths, speed, a contact sheet
    python data.py cache --data 'shards/*.tar' --weights DIR_OR_REPO --out latents     # encoded once, for small sets

The paper trains on 800M images and is judged by GenEval's object detectors. The toy world is the same story with ground
truth [ours]: a scene is drawn by a program, so its caption is true by construction, and a checker (`sample.py`) that looks
at the pixels alone can say which facts of a prompt hold in a picture, for the price of a millisecond and without a model.

    scene  --draw-->     picture [H, W, 3] uint8          what the VAE and the denoiser learn
    scene  --caption-->  "a small red circle on the left ..."   dense, as in the paper; brief ones for tests
    scene  --facts-->    [count, place, relation, ...]    what the caption claims
    picture, facts  --check-->  [True, False, ...]        what holds
"""
import argparse, base64, contextlib, glob, hashlib, io, itertools, json, math, os, random, sys, tarfile, threading, time
import urllib.error, urllib.request, warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Sizes. A bucket is one (height, width); a batch holds one bucket, so no picture is padded or cropped to another's.

RATIOS = ("1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1")       # height : width, as the paper lists them
# [paper] the first five ratios, (height, width) tall side second; the other four are these turned over.
PAPER_BUCKETS = {512: ((352, 704), (384, 672), (416, 640), (448, 608), (512, 512)),
                 768: ((544, 1088), (576, 1024), (640, 960), (672, 896), (768, 768)),
                 1024: ((736, 1472), (768, 1376), (832, 1248), (864, 1152), (1024, 1024)),
                 1440: ((1040, 2080), (1088, 1936), (1168, 1760), (1216, 1616), (1440, 1440))}

def bucket(base, ratio="1:1"):
    """(height, width) of an area base^2 at `ratio` = width:height, as the checkpoint names its sizes ("16:9" is wide).

    Bases 512, 768, 1024 and 1440 are tables [paper] [checkpoint]; any other base takes the sides divisible by 16 that come
    nearest to ratio and area, the ratio counting double [ours]. Raises ValueError for a ratio it cannot read."""
    try:
        target = float(ratio.split(":", 1)[0]) / float(ratio.split(":", 1)[1])
    except (ValueError, IndexError, ZeroDivisionError):
        raise ValueError(f"ratio '{ratio}' is not of the form W:H, such as 16:9") from None
    if base in PAPER_BUCKETS and ratio in RATIOS:
        short, long = PAPER_BUCKETS[base][min(RATIOS.index(ratio), 8 - RATIOS.index(ratio))]
        return (long, short) if target < 1 else (short, long)
    ideal_h, ideal_w = base / math.sqrt(target), base * math.sqrt(target)
    near = lambda side: {max(16, 16 * (int(side) // 16 + k)) for k in (-1, 0, 1, 2)}
    cost = lambda hw: 2 * abs(math.log(hw[1] / hw[0] / target)) + abs(math.log(hw[0] * hw[1] / base**2))
    return min(((h, w) for h in sorted(near(ideal_h)) for w in sorted(near(ideal_w))), key=cost)

buckets = lambda base: sorted({bucket(base, ratio) for ratio in RATIOS})           # the nine sizes of an area
BUCKETS = {base: buckets(base) for base in (64, 96, 128)}                          # the toy's training sizes

# ---------------------------------------------------------------------------------------------------------------------
# What a scene is made of.

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# Hues at least 23 degrees apart. Mixing with grey leaves a hue as it is, so an anti-aliased edge over a grey background
# keeps its object's colour: that is why backgrounds here are all but grey, and why the checker reads hue, not RGB.
COLORS = {"red": (222, 38, 38), "orange": (240, 134, 28), "yellow": (236, 222, 40), "green": (48, 172, 72),
          "cyan": (46, 192, 214), "blue": (48, 88, 222), "purple": (140, 56, 204), "pink": (242, 108, 182)}
# A size is the radius of the circle of equal area, in units of sqrt(height * width): a "large" star and a "large"
# circle cover the same area. The gap between the two ranges is what lets a checker call a size right or wrong.
SIZE_RANGES = {"small": (0.106, 0.120), "large": (0.150, 0.172)}
SIZE_LIMIT = 0.135
TONES = {"black": (0.04, 0.16), "grey": (0.42, 0.58), "white": (0.86, 0.97)}       # mean luminance of the background
PLACES = (("at the top left", "at the top", "at the top right"),
          ("on the left", "in the center", "on the right"),
          ("at the bottom left", "at the bottom", "at the bottom right"))
RELATIONS = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}
CELL_MARGIN, CELL_TOLERANCE = 0.05, 0.04      # centres keep this far from the lines between thirds; the checker forgives less
OBJECT_GAP = 0.05     # [ours] free room between the circles around two objects, in sqrt(height * width): at 0.02 the model drew two of a kind as one
RELATION_GAP, RELATION_TOLERANCE = 0.16, 0.10 # two centres differ by this much along the axis that a relation names
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")      # GenEval's six
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}

class Object(NamedTuple):
    shape: str
    color: str
    size: float          # equal-area radius / sqrt(height * width)
    x: float             # centre, fraction of the width
    y: float             # centre, fraction of the height
    angle: float         # radians; captions leave it open
    fill: str            # plain, striped or shaded; captions leave it open
    shade: tuple         # a small colour shift (r, g, b) in [0, 255]; captions leave it open

    size_word = property(lambda self: "small" if self.size < SIZE_LIMIT else "large")
    place = property(lambda self: PLACES[int(3 * self.y)][int(3 * self.x)])

class Scene(NamedTuple):
    objects: tuple
    tone: str            # black, grey, white
    luminance: tuple     # background brightness at its two ends, [0, 1]
    slope: float         # direction of the gradient, radians
    texture: str         # plain, bands or speckle
    task: str            # which of the six tasks it was made for, or "mixed"
    noise_seed: int      # for the speckle

class Fact(NamedTuple):
    """One claim that a picture can be checked for. `subject` and `other` are (shape or None, color or None)."""
    kind: str            # count, total, size, place, relation, background
    subject: tuple
    value: object
    other: tuple = (None, None)

# ---------------------------------------------------------------------------------------------------------------------
# Shapes as outlines of area pi, so that scaling by r gives the area of a circle of radius r.

def _outline(shape):
    turn = lambda n, radii: [(r * math.sin(2 * math.pi * k / n), -r * math.cos(2 * math.pi * k / n)) for k, r in zip(range(n), radii)]
    a = 0.34                                                                       # half the width of a cross's arm
    points = {"cross": [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)],
              "square": [((x - y) / math.sqrt(2), (x + y) / math.sqrt(2)) for x, y in turn(4, [1] * 4)],       # flat side down at angle 0
              "triangle": turn(3, [1] * 3), "star": turn(10, [1, 0.45] * 5)}.get(shape, turn(48, [1] * 48))
    x, y = np.array(points).T
    area = 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) * (1 - HOLE**2 if shape == "ring" else 1)
    return np.stack([x, y], 1) * math.sqrt(math.pi / area)

HOLE = 0.55                                                                        # inner over outer radius of a ring
OUTLINES = {shape: _outline(shape) for shape in SHAPES}
REACH = {shape: float(np.abs(points[:, 0] + 1j * points[:, 1]).max()) for shape, points in OUTLINES.items()}  # outermost point
MAX_TILT = {"square": 0.3, "cross": 0.3, "triangle": 0.4, "star": 0.6, "circle": 0.0, "ring": 0.0}   # radians either way

def coverage(obj, height, width):
    """How much of each pixel the object covers, [H, W] in [0, 1]: drawn four times larger, then averaged."""
    s, k = math.sqrt(height * width), 4
    turn = np.array([[math.cos(obj.angle), -math.sin(obj.angle)], [math.sin(obj.angle), math.cos(obj.angle)]])
    points = (OUTLINES[obj.shape] @ turn.T) * obj.size * s + np.array([obj.x * width, obj.y * height])
    mask = Image.new("L", (width * k, height * k))
    pen = ImageDraw.Draw(mask)
    pen.polygon([tuple(p) for p in points * k - 0.5], fill=255)
    if obj.shape == "ring":
        inner = (points - points.mean(0)) * HOLE + points.mean(0)
        pen.polygon([tuple(p) for p in inner * k - 0.5], fill=0)
    return np.asarray(mask.reduce(k), np.float32) / 255

def draw(scene, height, width):
    """The scene as an RGB picture (PIL image, height x width), any size; the same scene at two sizes is the same picture."""
    ys, xs = np.meshgrid((np.arange(height) + 0.5) / height - 0.5, (np.arange(width) + 0.5) / width - 0.5, indexing="ij")
    along = xs * math.cos(scene.slope) + ys * math.sin(scene.slope)                # [H, W], about -0.7 .. 0.7
    low, high = scene.luminance
    paper = low + (high - low) * (along + 0.5)
    if scene.texture == "bands":
        paper = paper + 0.035 * np.sign(np.sin(2 * math.pi * 4 * along))
    elif scene.texture == "speckle":                                               # drawn coarse, so that it looks alike at every size
        coarse = np.random.default_rng(scene.noise_seed).normal(0, 14, (12, 12)).clip(-60, 60) + 128
        paper = paper + (np.asarray(Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.BILINEAR), np.float32) - 128) / 255
    canvas = np.repeat(paper[..., None], 3, 2).astype(np.float32) * 255
    for obj in scene.objects:
        alpha = coverage(obj, height, width)[..., None]
        paint = np.array(COLORS[obj.color], np.float32) + np.array(obj.shade, np.float32)
        u = ((xs + 0.5 - obj.x) * width * math.cos(obj.angle + 0.8) + (ys + 0.5 - obj.y) * height * math.sin(obj.angle + 0.8)) / (
            obj.size * math.sqrt(height * width))                                  # -1 .. 1 across the object
        light = {"plain": np.ones_like(u), "striped": np.where(np.sin(4.2 * u) > 0, 1.0, 0.78), "shaded": (0.9 - 0.12 * u).clip(0.7, 1.05)}[obj.fill]
        canvas += alpha * (paint * light.astype(np.float32)[..., None] - canvas)
    return Image.fromarray((canvas.clip(0, 255) + 0.5).clip(0, 255).astype(np.uint8))

def labels(scene, height, width):
    """What covers each cell of 16 x 16 pixels, a token of the denoiser: [h*w, 6] fp32, of the object that has most of it: shape and colour,
    counted from 1 in the order of SHAPES and COLORS; in cells, its centre seen from the cell's (column, row) and its size; its angle. 0
    where no object has a seventh."""
    (h, w), most = (height // 16, width // 16), 1 / 7
    found, (row, column) = np.zeros((h, w, 6), np.float32), np.mgrid[:h, :w] + 0.5
    for obj in scene.objects:
        share = coverage(obj, height, width).reshape(h, 16, w, 16).mean((1, 3))
        told = np.stack(np.broadcast_arrays(SHAPES.index(obj.shape) + 1, list(COLORS).index(obj.color) + 1, obj.x * w - column, obj.y * h - row,
                                            obj.size * math.sqrt(h * w), obj.angle), -1)
        found[share > most] = told[share > most]
        most = np.maximum(most, share)
    return found.reshape(h * w, 6)

# ---------------------------------------------------------------------------------------------------------------------
# Making scenes.

def _place(specs, relation, rng, height, width):
    """Positions for objects given as (shape, color, size, cell or None), or None where no try succeeds.
    Rejection sampling: centres in distinct cells, away from the cells' borders, objects apart by OBJECT_GAP.
    `relation`: a name of RELATIONS that the first two must satisfy, or None."""
    (dx, dy), s, placed = RELATIONS.get(relation, (0, 0)), math.sqrt(height * width), []
    for shape, color, size, cell in specs:
        reach = REACH[shape] * size * s + 1.5                                      # pixels; + the anti-aliased rim
        for _ in range(60):
            x, y = rng.uniform(reach / width, 1 - reach / width), rng.uniform(reach / height, 1 - reach / height)
            if reach * 2 >= min(height, width):
                return None
            clear = min(abs(v - line) for v in (x, y) for line in (1 / 3, 2 / 3)) >= CELL_MARGIN
            here = PLACES[int(3 * y)][int(3 * x)]
            taken = any(here == PLACES[int(3 * q)][int(3 * p)] or math.hypot((x - p) * width, (y - q) * height) < reach + r + OBJECT_GAP * s
                        for p, q, r in placed)
            wrong = relation and len(placed) == 1 and (placed[0][0] - x) * dx + (placed[0][1] - y) * dy < RELATION_GAP
            if clear and not taken and not wrong and cell in (None, here):
                placed.append((x, y, reach))
                break
        else:
            return None
    return placed

def _paint(spec, xy, rng):
    shape, color, size, _ = spec
    return Object(shape, color, size, xy[0], xy[1], rng.uniform(-1, 1) * MAX_TILT[shape],
                  ("plain", "striped", "shaded")[rng.integers(3)], tuple(float(v) for v in rng.uniform(-10, 10) + rng.uniform(-5, 5, 3)))

def random_scene(rng, height, width, task=None, odds=None):
    """A scene for a picture of height x width (where things fit depends on it). task: one of TASKS, "mixed" (three different
    objects), or None to draw one; odds: how likely each of SHAPES is (None: all alike); rng: np.random.Generator."""
    task = task or str(rng.choice(TASKS + ("mixed",), p=(0.08, 0.16, 0.28, 0.06, 0.20, 0.13, 0.09)))
    while True:
        number = {"single_object": 1, "colors": 1, "counting": int(rng.integers(2, 5)), "mixed": 3}.get(task, 2)
        shapes = list(rng.permutation(SHAPES)[:number] if odds is None else rng.choice(SHAPES, number, replace=False, p=odds))
        colors = list(rng.permutation(list(COLORS))[:number])
        sizes = [("small", "large")[rng.integers(2)] for _ in range(number)]
        if task == "counting":
            shapes, colors, sizes = shapes[:1] * number, colors[:1] * number, [sizes[0] if number < 4 else "small"] * number
        elif task in ("position", "color_attr") and rng.random() < 0.25:           # told apart by colour alone
            shapes = shapes[:1] * number
        elif task == "two_object" and rng.random() < 0.25:                         # told apart by shape alone
            colors = colors[:1] * number
        specs = [(str(sh), str(co), rng.uniform(*SIZE_RANGES[si]), None) for sh, co, si in zip(shapes, colors, sizes)]
        relation = list(RELATIONS)[rng.integers(4)] if task in ("two_object", "position", "color_attr", "mixed") else None
        placed = _place(specs, relation, rng, height, width)
        if placed:
            return Scene(tuple(_paint(spec, xy, rng) for spec, xy in zip(specs, placed)), *_background(rng), task, int(rng.integers(2**31)))

def _background(rng, tone=None):
    tone = tone or ("black", "grey", "white")[rng.integers(3)]
    a, b = rng.uniform(*TONES[tone], 2)
    return tone, (float(a), float(b)), rng.uniform(0, 2 * math.pi), ("plain", "bands", "speckle")[rng.integers(3)]

def relation_of(a, b):
    """The relation that a caption states for two objects: along the axis on which they lie further apart."""
    if abs(a.x - b.x) >= abs(a.y - b.y):
        return "to the left of" if a.x < b.x else "to the right of"
    return "above" if a.y < b.y else "below"

# ---------------------------------------------------------------------------------------------------------------------
# Captions. `details` is the set of things that a caption states; what it leaves out, the picture is free to choose.
# That freedom is what guidance, many steps and dense prompts are for: where a caption fixes everything, four plain
# Euler steps are as good as twenty guided ones, and there is nothing to show.

def details_for(scene, rng, style="dense"):
    """What a caption of this scene states: a frozenset of color, size, place, relation, background.
    dense: most of it, and never fewer than two of size, place, relation, background (the paper trains on dense
    captions alone). brief: only what the task is about, as people ask: "two red circles"."""
    always = {"single_object": (), "two_object": (), "counting": ("color",) * (rng.random() < 0.5),
              "position": ("relation", "color")}.get(scene.task, ("color",))
    if scene.task == "position" and len({o.shape for o in scene.objects}) > 1 and rng.random() < 0.3:
        always = ("relation",)
    if style != "dense":
        return frozenset(always)
    pair = scene.task in ("two_object", "position", "color_attr", "mixed")
    while True:
        chosen = {d for d, p in (("size", 0.7), ("place", 0.8), ("relation", 0.6 * pair), ("background", 0.8)) if rng.random() < p}
        if len(chosen) >= 2:
            return frozenset(chosen | set(always))

def grouped(scene, details):
    """Objects that a caption names together: [(shape, color or None, size word or None, [objects])]."""
    found = {}
    for o in scene.objects:
        found.setdefault((o.shape, o.color if "color" in details else None), []).append(o)
    return [(*name, members[0].size_word if "size" in details else None, members) for name, members in found.items()]

def facts(scene, details):
    """The checkable claims of a caption with these details: list of Fact."""
    found = [Fact("total", (None, None), len(scene.objects))]
    for shape, color, size, members in grouped(scene, details):
        found += [Fact("count", (shape, color), len(members))] + [Fact("size", (shape, color), size)] * bool(size)
        found += [Fact("place", (shape, color), o.place) for o in members if "place" in details]
    if "relation" in details:
        (a, b), ref = scene.objects[:2], lambda o: (o.shape, o.color if "color" in details else None)
        found.append(Fact("relation", ref(a), relation_of(a, b), ref(b)))
    return found + [Fact("background", (None, None), scene.tone)] * ("background" in details)

PLACE_WORDS = {place: (place, place.replace("at the", "in the") + " corner" if len(place.split()) == 4 else place)
               for row in PLACES for place in row}
PLACE_WORDS["in the center"] = ("in the center", "in the middle")
plural = lambda shape: shape + ("es" if shape.endswith("s") else "s")
listing = lambda parts: parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]

def caption(scene, details, rng):
    """One caption of the scene, stating exactly `details`, in varied wording. Lower case, one paragraph."""
    where = lambda o: PLACE_WORDS[o.place][rng.integers(2)]
    name = lambda o: f"{o.color} {o.shape}" if "color" in details else o.shape
    phrases, groups, (a, b) = [], grouped(scene, details), (scene.objects * 2)[:2]
    for shape, color, size, members in groups:
        n = len(members)
        words = " ".join([w for w in (size, color) if w] + [shape if n == 1 else plural(shape)])
        phrases.append(("an " if n == 1 and words[0] in "aeiou" else NUMBERS[n] + " ") + words)
    inline = "relation" in details and len(scene.objects) == 2 and ("place" not in details or rng.random() < 0.3)
    if inline:                                                                     # "a red circle to the left of a blue square"
        sentences = [f"{phrases[0]} {relation_of(a, b)} {phrases[1]}"]             # the two always differ in what is stated
        sentences += [f"the {name(o)} is {where(o)}" for o in (a, b) if "place" in details]
    else:
        if "place" in details:
            phrases = [f"{p} {where(m[0])}" if len(m) == 1 else f"{p}, " + listing(["one " + where(o) for o in m])
                       for p, (_, _, _, m) in zip(phrases, groups)]
        sentences = [listing(phrases)]
        if "relation" in details:
            sentences.append(f"the {name(a)} is {relation_of(a, b)} the {name(b)}")
    opening = ("", "", "a picture of ", "an image of ", "there is " if phrases[0][:2] in ("a ", "an") else "there are ")[rng.integers(5)]
    sentences[0] = opening + sentences[0]
    if "background" in details:
        ground = (f"on a {scene.tone} background", f"against a {scene.tone} background", f"the background is {scene.tone}")[rng.integers(3)]
        if ground.startswith("the"):
            sentences.insert(len(sentences) if rng.random() < 0.7 else 1, ground)
        elif "place" in details or len(sentences) > 1:
            sentences.append(("it is all " if rng.random() < 0.5 else "everything is ") + ground)
        else:
            sentences[0] += " " + ground
    return ". ".join(sentences)

def sample(seed, epoch, index, height, width, task=None, style="dense", say=caption):
    """Sample `index` of an epoch: (scene, details, caption), a pure function of its arguments."""
    rng = np.random.default_rng((seed, epoch, index))
    scene = random_scene(rng, height, width, task)
    details = details_for(scene, rng, style)
    return scene, details, say(scene, details, rng)

# ---------------------------------------------------------------------------------------------------------------------
# Real pictures. What follows reads files that others made: nothing in them is trusted, every fault has a name and is counted.

MAX_PIXELS = 2**27       # a file that claims more is refused from its header: unpacked it would take 400 MB and more
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
file_hash = lambda path: hashlib.file_digest(open(path, "rb"), "sha256").hexdigest()[:16]

class Fault(Exception):
    """Why a picture or caption cannot be used, in a few words: the name under which it is counted."""

def read_picture(blob, size=None, where=(0.5, 0.5)):
    """Bytes of an image file -> RGB PIL image; with size = (height, width), scaled to cover it and cropped. Raises Fault.
    EXIF orientation is applied; transparency is laid on white; CMYK, grey, palette and 16-bit files become 8-bit RGB.
    Crop policy [ours]: the picture keeps its proportions, one side fits, and of what hangs over on the other the share
    `where` (x, y in [0, 1]) goes on the left or top. A JPEG is decoded at the smallest of the scales 1, 1/2, 1/4, 1/8 that
    still covers the size, which is where the speed is; LANCZOS goes the rest of the way."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                        # odd metadata is no fault of the pixels
            image = Image.open(io.BytesIO(blob))
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if size:
                height, width = size[::-1] if image.getexif().get(0x0112, 1) >= 5 else size        # stored on its side
                scale = max(height / image.height, width / image.width)
                image.draft("RGB", (math.ceil(image.width * scale), math.ceil(image.height * scale)))
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                                         # 16 bits a pixel: PIL would clip, not scale
                image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).round().astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except Exception as e:                                                         # PIL's plugins raise whatever they meet
        raise Fault("too many pixels" if isinstance(e, Image.DecompressionBombError) else "broken picture") from None
    if size and image.size != (size[1], size[0]):
        across, down = min(image.width, image.height * size[1] / size[0]), min(image.height, image.width * size[0] / size[1])
        left, top = (image.width - across) * where[0], (image.height - down) * where[1]
        image = image.resize((size[1], size[0]), Image.LANCZOS, box=(left, top, left + across, top + down))
    return image

def read(part):
    """Bytes of a part (path, offset, length); length -1: to the end of the file."""
    with open(part[0], "rb") as f:
        f.seek(part[1])
        return f.read(part[2])

def tar_parts(path, faults):
    """{key: {ending: (path, offset, length)}} of a tar in WebDataset's layout, read by offset, never unpacked: a member's name is
    only ever a key. Hostile names, links, names that come twice and a torn end are counted in `faults` and left out."""
    samples, end = {}, os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                stem, _, ending = name.name.partition(".")                         # WebDataset: the key ends at the first dot
                if name.is_absolute() or ".." in name.parts:
                    faults["hostile path in a tar"] += 1
                elif not member.isfile():
                    faults["link or device in a tar"] += not member.isdir()
                elif member.offset_data + member.size > end:
                    raise EOFError
                else:
                    parts = samples.setdefault(str(name.parent / stem), {})
                    faults["duplicate key"] += "." + ending.lower() in parts
                    parts.setdefault("." + ending.lower(), (str(path), member.offset_data, member.size))
    except (tarfile.TarError, EOFError, ValueError):
        faults["torn or unreadable tar"] += 1
    return samples

def words_of(parts, row=None):
    """(captions, notes) of a sample: from its .txt, its .json or its row of the folder's JSON lines. Raises Fault."""
    try:
        notes = {**(row or {}), **(json.loads(read(parts[".json"]).decode("utf-8")) if ".json" in parts else {})}
        found = ([read(parts[".txt"]).decode("utf-8")] if ".txt" in parts else
                 notes.get("captions") or notes.get("caption") or notes.get("text") or [])
        found = [" ".join(caption.split()) for caption in ([found] if isinstance(found, str) else found)]
    except UnicodeDecodeError:
        raise Fault("caption is not UTF-8") from None
    except (ValueError, TypeError, AttributeError):
        raise Fault("broken JSON") from None
    if any(len(caption) > 20_000 for caption in found):
        raise Fault("caption too long")
    return list(filter(None, found)), notes

# What a picture must be [paper: the filters, their order, the limits of area, aesthetic and duplicates; the other limits are ours].
# "<": a picture below the limit is left out; ">": one above it.
LIMITS = {"area": ("<", 384**2), "nsfw": (">", 0.5), "aesthetic": ("<", 3.0), "watermark": (">", 0.5), "blur": ("<", 15.0),
          "entropy": ("<", 3.0), "dark": ("<", 0.06), "bright": (">", 0.97), "duplicate": (">", 0.985)}

def measure(image):
    """What the filters look at: {area, blur, entropy, dark, bright}, and a unit vector [768] that is close for near duplicates: a
    16 x 16 thumbnail less its mean [ours]; the paper's is CLIP's. blur is the variance of the Laplacian of the grey picture at
    512^2 pixels, so that size does not matter; entropy that of the grey histogram in bits; dark and bright the mean of HSV's V."""
    scale, area = 512 / math.sqrt(image.width * image.height), image.width * image.height
    grey = np.asarray(image.convert("L").resize([max(3, round(side * scale)) for side in image.size], Image.BOX), np.float32)
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    share = np.array([count / area for count in image.convert("L").histogram() if count])
    value = float(np.asarray(image.resize((64, 64), Image.BOX)).max(-1).mean() / 255)
    small = np.asarray(image.resize((16, 16), Image.BOX), np.float32).ravel()
    small = small - small.mean()
    return ({"area": area, "blur": float(laplacian.var()), "entropy": float(-(share * np.log2(share)).sum()), "dark": value, "bright": value},
            small / max(float(np.linalg.norm(small)), 1e-6))

def near_duplicates(vectors, limit, chunk=2048):
    """[n] bool: which of the unit vectors [n, d] have a cosine above limit with an earlier one. In chunks: n^2 never stands in memory."""
    import torch                                                                   # the toy world needs none of it
    vectors, found = torch.as_tensor(np.array(vectors)), np.zeros(len(vectors), bool)
    for a in range(0, len(vectors), chunk):
        for b in range(0, a + 1, chunk):
            close = vectors[a:a + chunk] @ vectors[b:b + chunk].T > limit          # [chunk, chunk]
            found[a:a + chunk] |= (close.tril(-1) if a == b else close).any(1).numpy()
    return found

class Endpoint:
    """An OpenAI-compatible chat endpoint: captions here, the reasoner in sample.py, judges in rl.py. url: up to and with /v1. Its key
    is read from LENS_API_KEY and written nowhere. journal: a file of all answers, so that work begun again asks only for the rest."""

    def __init__(self, url, model, journal=None, workers=8, tries=5, timeout=120):
        self.url, self.model, self.journal, self.workers, self.tries, self.timeout = url.rstrip("/"), model, journal, workers, tries, timeout
        self.known, self.failed, self.lock = {}, [], threading.Lock()
        for line in Path(journal).read_text().splitlines() if journal and Path(journal).exists() else []:
            with contextlib.suppress(ValueError):                                  # a line torn by a crash is asked again
                self.known.update([json.loads(line)])

    def one(self, messages):
        body = json.dumps({"model": self.model, "messages": messages}).encode()
        name, key, reason = hashlib.sha256(body).hexdigest(), os.environ.get("LENS_API_KEY"), ""
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        for trial in range(0 if name in self.known else self.tries):
            time.sleep(wait if trial else 0)
            reason, wait = "", min(60.0, 2.0**trial * random.uniform(0.5, 1.0))    # 1, 2, 4, ... s, spread: workers must not return as one
            try:
                request = urllib.request.Request(self.url + "/chat/completions", body, headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    answer = json.load(reply)["choices"][0]["message"]["content"].strip()
                with self.lock, open(self.journal or os.devnull, "a") as f:
                    self.known[name] = answer
                    f.write(json.dumps([name, answer]) + "\n")
                break
            except urllib.error.HTTPError as e:
                reason, after = f"HTTP {e.code}", e.headers["Retry-After"] or ""
                wait = min(60.0, float(after)) if after.isdigit() else wait
                if e.code < 500 and e.code not in (408, 409, 429):                 # asking again would not help
                    break
            except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
                reason = type(e).__name__                                          # not its message, which may quote the request
        self.failed += [reason] if reason else []
        return self.known.get(name)

    def ask(self, items, messages=lambda item: item):
        """[item] -> [answer or None], in order; messages: item -> its chat, made when its turn comes. self.failed: why some are None."""
        with ThreadPoolExecutor(self.workers) as pool:
            answers = pool.map(lambda item: self.one(messages(item)), items)
            return list(tqdm(answers, total=len(items), desc=f"asking {self.model}", disable=len(items) < 2))

ASK_CAPTION = ("Describe this picture in one dense paragraph of about 100 English words: objects, number, colors, places, relations, "
               "background, style. Nothing else.")

def chat_about(image, words):
    """Messages that show a picture (PIL, sent as a JPEG of at most 1024 pixels a side) beside words."""
    blob, image = io.BytesIO(), image.copy()
    image.thumbnail((1024, 1024))
    image.save(blob, "JPEG", quality=90)
    picture = {"url": "data:image/jpeg;base64," + base64.b64encode(blob.getvalue()).decode()}
    return [{"role": "user", "content": [{"type": "image_url", "image_url": picture}, {"type": "text", "text": words}]}]

def gather(folder, faults):
    """[(key, parts, row)] of everything below a folder: files by their stem, members of tars, rows of JSON lines by file_name."""
    samples, rows = {}, {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        name, ending = path.relative_to(folder), path.suffix.lower()
        if ending == ".jsonl":
            for line in path.read_bytes().splitlines():
                try:
                    row = json.loads(line)
                    rows[str((name.parent / row["file_name"]).with_suffix(""))] = row
                except (ValueError, KeyError, TypeError):
                    faults["broken JSON line"] += 1
        elif ending == ".tar":
            samples.update({f"{name.with_suffix('')}/{key}": parts for key, parts in tar_parts(path, faults).items()})
        elif ending in (*ENDINGS, ".txt", ".json"):
            parts = samples.setdefault(str(name.with_suffix("")), {})
            faults["duplicate key"] += ending in ENDINGS and any(e in parts for e in ENDINGS)
            parts.setdefault(ending, (str(path), 0, -1))
    return [(key, parts, rows.get(key)) for key, parts in samples.items()]

def examine(sample):
    """(key, parts, row) -> (key, fault) or (key, None, picture's part, captions, notes, vector): one sample of a folder, in a worker."""
    key, parts, row = sample
    try:
        ending = next((e for e in ENDINGS if e in parts), None)
        if ending is None:
            return key, "no picture"
        (captions, notes), image = words_of(parts, row), read_picture(read(parts[ending]))
        numbers, vector = measure(image)
        return key, None, parts[ending], captions, {**notes, **numbers, "width": image.width, "height": image.height, "ending": ending}, vector
    except (Fault, OSError) as e:
        return key, str(e) if isinstance(e, Fault) else "unreadable file"

def pack(args):
    """A folder of pictures with captions -> tar shards, cleaned in the paper's order, every loss counted in a table."""
    faults, kept, out, limits = Counter(), [], Path(args.out), {name: limit for name, (_, limit) in LIMITS.items()}
    for name, _, value in (given.partition("=") for given in args.limit):
        if name not in limits:
            raise ValueError(f"--limit {name}: the limits are {', '.join(limits)}")
        limits[name] = float(value)
    models = dict(given.split("=", 1) for given in args.classifier)
    if (out / "pack.json").exists():
        raise ValueError(f"{out} holds finished shards already; give another folder, or remove it first")
    if not (samples := gather(args.images, faults)):
        raise ValueError(f"--images {args.images}: no pictures there")
    out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        for key, fault, *rest in tqdm(pool.map(examine, samples, chunksize=8), total=len(samples), desc="reading", unit="picture"):
            faults.update([fault] if fault else [])
            kept += [] if fault else [(key, *rest)]
            tqdm.write(f"{key}: {fault}") if fault else None
    table = [("read", len(samples)), ("broken, one way or another", len(kept))]
    for name, (sense, _) in LIMITS.items():
        if name in models:                                                         # scores only what earlier filters left
            from transformers import pipeline                                      # takes seconds to import: only where it is asked for
            path, _, label = models[name].rpartition(":")
            score = pipeline("image-classification", path, top_k=None)
            if label not in score.model.config.label2id:
                raise ValueError(f"--classifier {name}: {path} has no label '{label}' among {', '.join(score.model.config.label2id)}")
            for _, part, _, notes, _ in tqdm(kept, desc=name):
                notes[name] = next(row["score"] for row in score(read_picture(read(part))) if row["label"] == label)
        if name == "duplicate":
            drop = near_duplicates([vector for *_, vector in kept], limits[name])
        else:                                                                      # what has no score is not judged by it
            drop = [name in notes and (notes[name] < limits[name] if sense == "<" else notes[name] > limits[name]) for *_, notes, _ in kept]
        kept = [row for row, leave in zip(kept, drop) if not leave]
        table.append((f"{name} {sense} {limits[name]:g}", len(kept)))
    brief = lambda captions: max((len(c.split()) for c in captions), default=0) < args.min_words
    if args.endpoint:
        endpoint, wanting = Endpoint(args.endpoint, args.model, out / "captions.jsonl"), [row for row in kept if brief(row[2])]
        for row, answer in zip(wanting, endpoint.ask(wanting, lambda row: chat_about(read_picture(read(row[1])), ASK_CAPTION))):
            row[2][:] = [answer] if answer else row[2]
        faults.update(f"caption not written: {reason}" for reason in endpoint.failed)
    kept = [row for row in kept if not brief(row[2])]
    table.append((f"no caption of {args.min_words} words", len(kept)))
    write_shards(((read(part), notes.pop("ending"), {**notes, "captions": captions, "source": key})
                  for key, part, captions, notes, _ in kept), out, args.shard_mb)
    for (name, count), (_, before) in zip(table, table[:1] + table):
        print(f"{name:30} {count - before:8} {count:10}")
    print("".join(f"    {name:26} {count:8}\n" for name, count in sorted(faults.items()) if count), end="")
    (out / "pack.json").write_text(json.dumps({"table": table, "faults": faults}, indent=1))

def write_shards(samples, out, shard_mb, name="{:05d}.tar"):
    """(bytes, ending, notes) -> out/00000.tar, ... in WebDataset's layout; each written beside and renamed."""
    number, samples = 0, enumerate(samples)
    for first in samples:
        path, used = out / name.format(number), 0
        with tarfile.open(f"{path}.new", "w") as tar:
            for k, (blob, ending, notes) in itertools.chain([first], samples):
                for tail, content in ((ending, blob), (".json", json.dumps(notes).encode())):
                    member = tarfile.TarInfo(f"{k:09d}{tail}")                     # no date, no owner: equal pictures give equal bytes
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                used += len(blob)
                if used > shard_mb * 2**20:
                    break
        os.replace(f"{path}.new", path)
        number += 1

# ---------------------------------------------------------------------------------------------------------------------
# The loader. Its whole state is (epoch, batches done): the order is a pure function of (index, seed, epoch).

def plan(buckets, lengths, batch, seed, epoch):
    """An epoch's batches [(bucket, samples, epoch)]: every sample once, one bucket a batch, captions of like length together.
    buckets, lengths   [n] int; batch: {bucket: samples a batch}. What does not fill a batch makes a smaller one: nothing is lost."""
    rng, found = np.random.default_rng((seed, epoch)), []
    for b in sorted(batch):
        order = rng.permutation(np.flatnonzero(buckets == b))
        for window in np.split(order, range(8 * batch[b], len(order), 8 * batch[b])):          # sorted inside windows: order stays random
            ranked = window[np.argsort(lengths[window], kind="stable")]
            found += [(b, ranked[k:k + batch[b]], epoch) for k in range(0, len(ranked), batch[b])]
    return [found[i] for i in rng.permutation(len(found))]

def index(path):
    """([(picture offset, length, json offset, length, txt offset, length, height, width)], faults) of a tar; 0, 0: there is none.
    Kept beside it in NAME.tar.index.json, and made again when the tar's size or date is another."""
    kept, state = Path(f"{path}.index.json"), [os.path.getsize(path), os.stat(path).st_mtime_ns]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(kept.read_text())
        if found["state"] == state:
            return found["rows"], found["faults"]
    faults, rows = Counter(), []
    for parts in tar_parts(path, faults).values():
        ending = next((e for e in (*ENDINGS, ".latent") if e in parts), None)
        try:
            if ending is None or not (".json" in parts or ".txt" in parts):
                raise Fault("no picture" if ending is None else "no caption")
            notes = words_of({k: v for k, v in parts.items() if k == ".json"})[1]
            if not all(isinstance(notes.get(side), int) and notes[side] > 0 for side in ("width", "height")):
                notes["width"], notes["height"] = read_picture(read(parts[ending])).size
            rows.append([v for e in (ending, ".json", ".txt") for v in parts.get(e, ("", 0, 0))[1:]] + [notes["height"], notes["width"]])
        except Fault as e:
            faults[str(e)] += 1
    with contextlib.suppress(OSError):                                             # a read-only disk: indexed again next time
        Path(f"{kept}.new").write_text(json.dumps({"state": state, "rows": rows, "faults": faults}))
        os.replace(f"{kept}.new", kept)
    return rows, faults

class Shards:
    """Tar shards as batches: shards[bucket, samples, epoch] -> (pictures, captions, faults). sizes: the buckets; vae: hash of the
    autoencoder's file, to know stale latents by. pictures is uint8 [B, H, W, 3], or what `data.py cache` wrote, bf16 bits in uint8
    [B, h*w * C * 2]. The index is one array, not lists of objects, so that workers go on sharing it with the parent. A sample's
    bucket is the largest area that it fills, and there the nearest ratio [ours]. One that cannot be read is replaced by the next
    of its bucket and named in faults. Raises ValueError."""

    def __init__(self, pattern, sizes, seed=0, vae=None):
        self.paths, self.sizes, self.seed, self.vae = sorted(glob.glob(str(pattern))), sorted(sizes, key=lambda s: s[0] * s[1]), seed, vae
        rows, self.faults = [], Counter()
        for number, path in enumerate(tqdm(self.paths, desc="indexing", unit="shard", disable=len(self.paths) < 8)):
            found, faults = index(path)
            rows += [(number, *row) for row in found]
            self.faults.update(faults)
        if not rows:
            raise ValueError(f"--data {pattern}: no usable sample in {len(self.paths)} files ({dict(self.faults) or 'none match'})")
        self.rows = np.array(rows, np.int64)                                       # [n, 9]
        self.digest = hashlib.sha256(json.dumps([Path(p).name for p in self.paths]).encode() + self.rows.tobytes()).hexdigest()[:16]
        height, width, (h, w) = self.rows[:, 7:8], self.rows[:, 8:9], np.array(self.sizes).T           # [n, 1], [buckets]
        enlarged = np.maximum(np.log(np.maximum(h / height, w / width)), 0)        # [n, buckets]; 1% is let pass
        self.buckets = (100 * enlarged - np.round(2 * np.log2(h * w)) + np.abs(np.log(height / width) - np.log(h / w))).argmin(1)
        self.lengths = np.maximum(self.rows[:, 4], self.rows[:, 6])                # bytes of caption and notes: near enough to sort by

    def parts(self, i):
        shard, *where = self.rows[i, :7].tolist()
        return {name: (self.paths[shard], where[k], where[k + 1]) for k, name in ((0, "picture"), (2, ".json"), (4, ".txt")) if where[k + 1]}

    def sample(self, i, size, epoch):
        """Sample i as epoch shows it: (array, caption). Crop and caption are drawn from (seed, epoch, i). Raises Fault."""
        rng, parts = np.random.default_rng((self.seed, epoch, int(i))), self.parts(i)
        (captions, notes), blob = words_of(parts), read(parts["picture"])
        if notes.get("latent") not in (None, [self.vae, *size]):
            raise ValueError(f"{Path(self.paths[self.rows[i, 0]]).name} holds latents of another autoencoder or bucket: run `data.py cache` again")
        image = np.frombuffer(blob, np.uint8) if "latent" in notes else np.asarray(read_picture(blob, size, rng.random(2)))
        if not captions:
            raise Fault("no caption")
        return image, captions[rng.integers(len(captions))]

    def __getitem__(self, batch):
        bucket, samples, epoch = batch
        found, faults = [], []
        for i in samples:
            for trial in range(20):
                try:
                    found.append(self.sample(i, self.sizes[bucket], epoch))
                    break
                except (Fault, OSError) as e:
                    faults.append(f"{Path(self.paths[self.rows[i, 0]]).name}, sample {i}: {e}")
                    members = np.flatnonzero(self.buckets == bucket)
                    i = members[np.searchsorted(members, i + 1) % len(members)]
            else:
                raise ValueError(f"20 samples in a row cannot be read; the last: {faults[-1]}")
        return np.stack([image for image, _ in found]), [caption for _, caption in found], faults

def vae_identity(path_or_repo):
    """A hash of an autoencoder's file: what latents are kept under. Shards without latents need none."""
    import lens
    return file_hash(lens.weight_files(Path(lens.fetch(path_or_repo, ("vae",))) / "vae")[0])

def cache(args):
    """Shards again, each picture as the tokens of its centre crop. What is there of the same tar, buckets and autoencoder is kept."""
    import torch, lens
    from vae import to_images
    device, vae_hash = "cuda" if torch.cuda.is_available() else "cpu", vae_identity(args.weights)
    vae = lens.load_pipeline(args.weights, device, torch.float32, parts=("vae",))[1]
    shards, out, fresh = Shards(args.data, args.bases), Path(args.out), 0
    out.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def encoded(mine, key):
        for b in np.unique(shards.buckets[mine]):
            members, (h, w) = mine[shards.buckets[mine] == b], shards.sizes[b]
            for chunk in np.split(members, range(16, len(members), 16)):
                found = []
                for i in chunk:
                    with contextlib.suppress(Fault):                               # `stats` and training name what is left out here
                        found.append((read_picture(read(shards.parts(i)["picture"]), (h, w)), *words_of(shards.parts(i))))
                images = torch.from_numpy(np.stack([image for image, *_ in found] or [np.zeros((h, w, 3), np.uint8)]))
                tokens = vae.to_tokens(vae.encode(to_images(images).to(device))[0]).bfloat16().cpu().contiguous().view(torch.uint8)
                for latent, (_, captions, notes) in zip(tokens.numpy(), found):
                    yield latent.tobytes(), ".latent", {**notes, "captions": captions, "height": h, "width": w,
                                                        "latent": [vae_hash, h, w], "key": key}
    for number, path in enumerate(tqdm(shards.paths, desc="caching", unit="shard")):
        target, key = out / Path(path).name, [file_hash(path), vae_hash, *map(list, shards.sizes), "centre"]
        with contextlib.suppress(OSError, ValueError, KeyError, Fault):
            old = next(iter(tar_parts(target, Counter()).values()), {})
            if words_of(old)[1]["key"] == key:
                fresh += 1
                continue
        write_shards(encoded(np.flatnonzero(shards.rows[:, 0] == number), key), out, math.inf, target.name)
    print(f"{out}: {fresh} of {len(shards.paths)} shards were fresh, the others are written")

def stats(args):
    """Buckets, caption lengths, faults and decoding speed of shards, and a contact sheet of what training would see."""
    shards = Shards(args.data, args.bases)
    print(f"{len(shards.rows)} samples in {len(shards.paths)} shards, index {shards.digest}; left out: {dict(+shards.faults) or 'nothing'}")
    for b, count in zip(*np.unique(shards.buckets, return_counts=True)):
        print(f"{shards.sizes[b][1]:5} x {shards.sizes[b][0]:<5} {count:9}  {count / len(shards.rows):6.1%}")
    rows = plan(shards.buckets, shards.lengths, dict.fromkeys(range(len(shards.sizes)), 1), 0, 0)[:500]
    found, ours, plain = [], [], []                                                # seconds a picture: as training reads it, and the plain way
    for bucket, (i,), epoch in tqdm(rows, desc="decoding"):
        begin = time.perf_counter()
        found.append(shards[bucket, [i], epoch])
        middle = time.perf_counter()
        with contextlib.suppress(OSError, ValueError):                             # latents and broken files have no plain way
            Image.open(io.BytesIO(read(shards.parts(i)["picture"]))).convert("RGB").resize(shards.sizes[bucket][::-1], Image.LANCZOS)
            ours, plain = ours + [middle - begin], plain + [time.perf_counter() - middle]
    if ours:
        print(f"{len(ours) / sum(ours):.1f} pictures/s decoded by one process, {sum(plain) / sum(ours):.2f} times as many as by a plain open, convert, resize")
    pictures, captions, faults = zip(*found)
    words = np.quantile([len(caption.split()) for caption, in captions], (0.05, 0.5, 0.95))
    print(f"words a caption (5%, half, 95%): {words.round().astype(int).tolist()}", *sum(faults, []), sep="\n")
    shown = [Image.fromarray(p[0]) for p in pictures[:24] if p.ndim == 4]
    contact_sheet([ImageOps.contain(image, (128, 128)) if max(image.size) > 128 else image for image in shown], 6).save(args.out)

def contact_sheet(images, columns=None):
    """All pictures in one, a grid of equal cells; of none, an empty row."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    w, h = (max((i.size[side] for i in images), default=128) for side in (0, 1))
    sheet = Image.new("RGB", (columns * (w + 4) - 4, max(1, math.ceil(len(images) / columns)) * (h + 4) - 4), "white")
    for k, image in enumerate(images):
        sheet.paste(image, (k % columns * (w + 4), k // columns * (h + 4)))
    return sheet

def draw_world(args):
    """A contact sheet of the toy world and its captions."""
    scenes = [sample(0, 0, i, 128, 128) for i in range(24)]
    print(*(f"{i // 6 + 1}.{i % 6 + 1}  {words}" for i, (*_, words) in enumerate(scenes)), sep="\n")
    contact_sheet([draw(scene, 128, 128) for scene, *_ in scenes], 6).save(args.out)

def main(argv=None):
    parser = argparse.ArgumentParser(description="The toy world; and pictures of your own as tar shards to train on.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=__doc__[__doc__.index("    python"):__doc__.index("The paper trains")])
    commands = {"world": (draw_world, "toy_world.png", None), "pack": (pack, "shards", "images"), "cache": (cache, "latents", "data"),
                "stats": (stats, "shards.png", "data")}
    parser.add_argument("command", nargs="?", default="world", choices=commands, help="default: world, a contact sheet of the toy world")
    parser.add_argument("--out", metavar="PATH", help="world, stats: the contact sheet (PNG); pack, cache: a folder")
    some = parser.add_argument_group("pack")
    some.add_argument("--images", metavar="DIR",
                      help="pictures, with captions in .txt or .json beside them or in .jsonl with file_name; tars of such too")
    some.add_argument("--limit", action="append", default=[], metavar="NAME=VALUE",
                      help="of a filter: " + ", ".join(f"{k} {s} {v:g}" for k, (s, v) in LIMITS.items()))
    some.add_argument("--classifier", action="append", default=[], metavar="NAME=MODEL:LABEL",
                      help="nsfw, aesthetic or watermark scores by an image classifier of transformers; else from columns of the metadata")
    some.add_argument("--endpoint", metavar="URL",
                      help="OpenAI-compatible, up to /v1; writes captions that are missing or brief; its key is read from LENS_API_KEY")
    some.add_argument("--model", default="default", help="the endpoint's model")
    some.add_argument("--min-words", type=int, default=1, metavar="N", help="a shorter caption is brief (the paper's have about 109)")
    some.add_argument("--shard-mb", type=int, default=256)
    more = parser.add_argument_group("cache, stats")
    more.add_argument("--data", metavar="GLOB", help="the shards, say 'shards/*.tar'")
    more.add_argument("--weights", metavar="DIR", default=str(Path(__file__).resolve().parent / "weights" / "toy"), help="whose autoencoder")
    more.add_argument("--bases", type=lambda s: [size for base in s.split(",") for size in buckets(int(base))], default="512,768,1024",
                      metavar="N,N", help="areas of the buckets (default %(default)s)")
    args = parser.parse_args(argv)
    (command, out, needed), args.out = commands[args.command], args.out or commands[args.command][1]
    try:
        if needed and not getattr(args, needed):
            raise ValueError(f"{args.command} needs --{needed}")
        command(args)
    except (OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
