"""
data.py - the toy world: scenes that can be drawn, captioned and checked.

Read `lens.py` and `vae.py` first for what a picture becomes; this file says where pictures and captions come from.
It assumes numpy and Pillow only. Every random choice comes from a generator that the caller hands in, made from
(seed, epoch, sample), so a sample does not depend on batch size, worker count or where a run was resumed.

    python data.py                         # a contact sheet of drawn scenes with their captions -> toy_world.png
    python data.py --check 2000            # how often the checker passes true scenes and rejects altered ones

The paper trains on 800M images and is judged by GenEval's object detectors. Here is the same story with ground
truth [ours]: a scene is drawn by a program, so its caption is true by construction, and a checker that looks at the
pixels alone can say which facts of a prompt hold in a picture, for the price of a millisecond and without a model.

    scene  --draw-->     picture [H, W, 3] uint8          what the VAE and the denoiser learn
    scene  --caption-->  "a small red circle on the left ..."   dense, as in the paper; brief and vague ones for tests
    scene  --facts-->    [count, place, relation, ...]    what the caption claims
    picture, facts  --check-->  [True, False, ...]        what holds
"""
import argparse, colorsys, functools, math, sys
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

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

    Bases 512, 768, 1024 and 1440 are tables [paper] [checkpoint]; any other base takes the sides divisible by 16 that
    come nearest to ratio and area, the ratio counting double [ours]. Raises ValueError for a ratio it cannot read."""
    try:
        across, down = (float(part) for part in ratio.split(":"))
        target = across / down
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"ratio '{ratio}' is not of the form W:H, such as 16:9") from None
    if base in PAPER_BUCKETS and ratio in RATIOS:
        short, long = PAPER_BUCKETS[base][min(RATIOS.index(ratio), 8 - RATIOS.index(ratio))]
        return (long, short) if target < 1 else (short, long)
    ideal_h, ideal_w = base / math.sqrt(target), base * math.sqrt(target)
    near = lambda side: {max(16, 16 * (int(side) // 16 + k)) for k in (-1, 0, 1, 2)}
    cost = lambda hw: 2 * abs(math.log(hw[1] / hw[0] / target)) + abs(math.log(hw[0] * hw[1] / base**2))
    return min(((h, w) for h in sorted(near(ideal_h)) for w in sorted(near(ideal_w))), key=cost)


BUCKETS = {base: sorted({bucket(base, ratio) for ratio in RATIOS}) for base in (64, 96, 128)}   # the toy's training sizes

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

    @property
    def size_word(self):
        return "small" if self.size < SIZE_LIMIT else "large"

    @property
    def place(self):
        return PLACES[int(3 * self.y)][int(3 * self.x)]


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

    def __str__(self):
        name = lambda ref: " ".join(word for word in (ref[1], ref[0]) if word) or "object"
        return {"count": f"exactly {self.value} {name(self.subject)}", "total": f"exactly {self.value} objects in all",
                "size": f"the {name(self.subject)} is {self.value}", "place": f"a {name(self.subject)} {self.value}",
                "relation": f"the {name(self.subject)} is {self.value} the {name(self.other)}",
                "background": f"the background is {self.value}"}[self.kind]


# ---------------------------------------------------------------------------------------------------------------------
# Shapes as outlines of area pi, so that scaling by r gives the area of a circle of radius r.

def _outline(shape):
    turn = lambda n, radii: [(r * math.sin(2 * math.pi * k / n), -r * math.cos(2 * math.pi * k / n)) for k, r in zip(range(n), radii)]
    if shape in ("circle", "ring"):
        points = turn(48, [1] * 48)
    elif shape == "cross":
        a = 0.34                                                                   # half the width of an arm
        points = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    else:
        points = {"square": turn(4, [1] * 4), "triangle": turn(3, [1] * 3), "star": turn(10, [1, 0.45] * 5)}[shape]
        if shape == "square":                                                      # flat side down at angle 0
            points = [((x - y) / math.sqrt(2), (x + y) / math.sqrt(2)) for x, y in points]
    (x, y), area = np.array(points).T, math.pi
    polygon_area = 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))
    if shape == "ring":
        polygon_area *= 1 - HOLE**2
    return np.stack([x, y], 1) * math.sqrt(area / polygon_area)


HOLE = 0.55                                                                        # inner over outer radius of a ring
OUTLINES = {shape: _outline(shape) for shape in SHAPES}
REACH = {shape: float(np.abs(points[:, 0] + 1j * points[:, 1]).max()) for shape, points in OUTLINES.items()}  # outermost point
MAX_TILT = {"square": 0.3, "cross": 0.3, "triangle": 0.4, "star": 0.6, "circle": 0.0, "ring": 0.0}   # radians either way


def _coverage(obj, height, width):
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
        alpha = _coverage(obj, height, width)[..., None]
        paint = np.array(COLORS[obj.color], np.float32) + np.array(obj.shade, np.float32)
        light = np.ones((height, width), np.float32)
        u = ((xs + 0.5 - obj.x) * width * math.cos(obj.angle + 0.8) + (ys + 0.5 - obj.y) * height * math.sin(obj.angle + 0.8)) / (
            obj.size * math.sqrt(height * width))                                  # -1 .. 1 across the object
        if obj.fill == "striped":
            light = np.where(np.sin(4.2 * u) > 0, 1.0, 0.78).astype(np.float32)
        elif obj.fill == "shaded":
            light = (0.9 - 0.12 * u).clip(0.7, 1.05).astype(np.float32)
        canvas += alpha * (paint * light[..., None] - canvas)
    return Image.fromarray((canvas.clip(0, 255) + 0.5).clip(0, 255).astype(np.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Making scenes.

def _place(specs, relation, rng, height, width):
    """Positions for objects given as (shape, color, size, cell or None), or None where no try succeeds.

    Rejection sampling: centres in distinct cells, away from the cells' borders, objects apart by a visible gap.
    `relation`: a name of RELATIONS that the first two must satisfy, or None."""
    s, placed = math.sqrt(height * width), []
    for shape, color, size, cell in specs:
        reach = REACH[shape] * size * s + 1.5                                      # pixels; + the anti-aliased rim
        for _ in range(60):
            x, y = rng.uniform(reach / width, 1 - reach / width), rng.uniform(reach / height, 1 - reach / height)
            if reach * 2 >= min(height, width):
                return None
            clear = min(abs(v - line) for v in (x, y) for line in (1 / 3, 2 / 3)) >= CELL_MARGIN
            here = PLACES[int(3 * y)][int(3 * x)]
            if not clear or (cell and here != cell) or any(here == PLACES[int(3 * q)][int(3 * p)] for p, q, _ in placed):
                continue
            if any(math.hypot((x - p) * width, (y - q) * height) < reach + r + 0.02 * s for p, q, r in placed):
                continue
            if relation and len(placed) == 1:
                dx, dy = RELATIONS[relation]
                if (placed[0][0] - x) * dx + (placed[0][1] - y) * dy < RELATION_GAP:
                    continue
            placed.append((x, y, reach))
            break
        else:
            return None
    return placed


def _paint(spec, xy, rng):
    shape, color, size, _ = spec
    return Object(shape, color, size, xy[0], xy[1], rng.uniform(-1, 1) * MAX_TILT[shape],
                  ("plain", "striped", "shaded")[rng.integers(3)], tuple(float(v) for v in rng.uniform(-10, 10) + rng.uniform(-5, 5, 3)))


def random_scene(rng, height, width, task=None):
    """A scene for a picture of height x width. task: one of TASKS, "mixed" (three different objects), or None to draw one.

    rng: np.random.Generator. The shape of the picture matters only for where things fit."""
    if task is None:
        task = str(rng.choice(TASKS + ("mixed",), p=(0.13, 0.13, 0.22, 0.08, 0.18, 0.16, 0.10)))
    while True:
        number = {"single_object": 1, "colors": 1, "counting": int(rng.integers(2, 5)), "mixed": 3}.get(task, 2)
        shapes = list(rng.permutation(SHAPES)[:number])
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
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= abs(dy):
        return "to the left of" if dx < 0 else "to the right of"
    return "above" if dy < 0 else "below"


# ---------------------------------------------------------------------------------------------------------------------
# Captions. `details` is the set of things that a caption states; what it leaves out, the picture is free to choose.
# That freedom is what guidance, many steps and dense prompts are for: where a caption fixes everything, four plain
# Euler steps are as good as twenty guided ones, and there is nothing to show.

DETAILS = ("color", "size", "place", "relation", "background")


def details_for(scene, rng, style="dense"):
    """What a caption of this scene states: a frozenset of DETAILS.

    dense: most of it, and never fewer than two of size, place, relation, background (the paper trains on dense
    captions alone). brief: only what the task is about, as people ask: "two red circles"."""
    always = {"single_object": (), "two_object": (), "counting": ("color",) if rng.random() < 0.5 else (), "colors": ("color",),
              "position": ("relation", "color"), "color_attr": ("color",), "mixed": ("color",)}[scene.task]
    if scene.task == "position" and len({o.shape for o in scene.objects}) > 1 and rng.random() < 0.3:
        always = ("relation",)
    if style != "dense":
        return frozenset(always)
    pair = scene.task in ("two_object", "position", "color_attr", "mixed")
    while True:
        chosen = {d for d, p in (("size", 0.7), ("place", 0.8), ("relation", 0.6 * pair), ("background", 0.8)) if rng.random() < p}
        if len(chosen) >= 2:
            return frozenset(chosen | set(always))


def _groups(scene, details):
    """Objects that a caption names together: [(shape, color or None, size word or None, [objects])]."""
    groups = {}
    for o in scene.objects:
        groups.setdefault((o.shape, o.color if "color" in details else None), []).append(o)
    return [(shape, color, members[0].size_word if "size" in details else None, members) for (shape, color), members in groups.items()]


def facts(scene, details):
    """The checkable claims of a caption with these details: list of Fact."""
    found = [Fact("total", (None, None), len(scene.objects))]
    for shape, color, size, members in _groups(scene, details):
        found.append(Fact("count", (shape, color), len(members)))
        if size:
            found.append(Fact("size", (shape, color), size))
        if "place" in details:
            found += [Fact("place", (shape, color), o.place) for o in members]
    if "relation" in details:
        a, b = scene.objects[:2]
        ref = lambda o: (o.shape, o.color if "color" in details else None)
        found.append(Fact("relation", ref(a), relation_of(a, b), ref(b)))
    if "background" in details:
        found.append(Fact("background", (None, None), scene.tone))
    return found


PLACE_WORDS = {place: (place, place.replace("at the", "in the") + " corner" if len(place.split()) == 4 else place) for row in PLACES for place in row}
PLACE_WORDS["in the center"] = ("in the center", "in the middle")


def plural(shape):
    return shape + ("es" if shape.endswith("s") else "s")


def _listing(parts):
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(scene, details, rng):
    """One caption of the scene, stating exactly `details`, in varied wording. Lower case, one paragraph."""
    where = lambda o: PLACE_WORDS[o.place][rng.integers(2)]
    name = lambda shape, color: f"{color} {shape}" if color else shape
    phrases, groups = [], _groups(scene, details)
    for shape, color, size, members in groups:
        n = len(members)
        words = [NUMBERS[n]] + [w for w in (size, color) if w] + [shape if n == 1 else plural(shape)]
        if words[0] == "a" and words[1][0] in "aeiou":
            words[0] = "an"
        phrases.append(" ".join(words))
    inline = "relation" in details and len(scene.objects) == 2 and ("place" not in details or rng.random() < 0.3)
    if inline:                                                                     # "a red circle to the left of a blue square"
        a, b = scene.objects
        first, second = phrases                                                    # the pairs of a scene always differ in what is stated
        body = f"{first} {relation_of(a, b)} {second}"
        sentences = [body] + ([f"the {name(g[0], g[1])} is {where(g[3][0])}" for g in groups] if "place" in details else [])
    else:
        if "place" in details:
            phrases = [f"{p} {where(m[0])}" if len(m) == 1 else f"{p}, " + _listing(["one " + where(o) for o in m])
                       for p, (_, _, _, m) in zip(phrases, groups)]
        sentences = [_listing(phrases)]
        if "relation" in details:
            a, b = scene.objects[:2]
            of = lambda o: name(o.shape, o.color if "color" in details else None)
            sentences.append(f"the {of(a)} is {relation_of(a, b)} the {of(b)}")
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


# Words that people use and captions never do. Only requests hold them, so the denoiser has not seen them; the reasoner
# learns to put them into the words of the captions.
VAGUE = {"circle": ("disc", "dot"), "square": ("box", "block"), "triangle": ("pyramid", "wedge"), "star": ("asterisk", "starlet"),
         "cross": ("plus", "plus sign"), "ring": ("hoop", "donut"), "red": ("crimson", "scarlet"), "orange": ("tangerine", "amber"),
         "yellow": ("lemon", "golden"), "green": ("emerald", "grassy"), "cyan": ("turquoise", "teal"), "blue": ("navy", "cobalt"),
         "purple": ("violet", "lilac"), "pink": ("rosy", "magenta"), "two": ("a couple of", "a pair of"), "three": ("a trio of", "three"),
         "four": ("a quartet of", "four"), "to the left of": ("left of", "on the left side of"), "to the right of": ("right of", "on the right side of"),
         "above": ("over", "on top of"), "below": ("under", "beneath")}


def request(scene, details, rng, vague=False):
    """A brief request for the scene, as a person would type it: "two red circles"; vague ones swap words by VAGUE."""
    say = lambda word: str(VAGUE[word][rng.integers(2)]) if vague and word in VAGUE and rng.random() < 0.6 else word
    phrases = []
    for shape, color, _, members in _groups(scene, details):
        n, noun, hue = len(members), say(shape), say(color) if color else ""
        lead = say(NUMBERS[n]) if n > 1 else "an" if (hue or noun)[0] in "aeiou" else "a"
        phrases.append(" ".join(w for w in (lead, hue, noun if n == 1 else plural(noun)) if w))
    if "relation" in details:
        first, second = phrases
        return f"{first} {say(relation_of(*scene.objects[:2]))} {second}"
    return _listing(phrases)


# What a system message can ask of the reasoner, and the detail that it then writes out. Two wordings each.
GUIDELINES = {"size": ("State the size of every object.", "Say how large each object is."),
              "place": ("State where every object is.", "Give the place of each object."),
              "relation": ("Say how the objects stand to each other.", "Describe the relations between objects."),
              "background": ("Describe the background.", "Say what is behind the objects."),
              "color": ("Give every object a color.", "Name a color for each object.")}


def sample(seed, epoch, index, height, width, task=None, style="dense"):
    """Sample `index` of an epoch: (scene, details, caption), a pure function of its arguments."""
    rng = np.random.default_rng((seed, epoch, index))
    scene = random_scene(rng, height, width, task)
    details = details_for(scene, rng, style)
    return scene, details, caption(scene, details, rng) if style == "dense" else request(scene, details, rng, style == "vague")


# ---------------------------------------------------------------------------------------------------------------------
# The checker: pixels in, facts out. Colour segmentation, connected regions, and shape by moments.

class Found(NamedTuple):
    shape: str           # one of SHAPES, or "unclear"
    color: str
    size: float
    x: float
    y: float


def _regions(labels):
    """Connected regions (4 neighbours, equal label > 0) of an integer map [H, W]: list of (rows, columns) index arrays."""
    height, width = labels.shape
    flat, regions = labels.ravel().copy(), []
    for start in np.flatnonzero(flat):
        if not flat[start]:
            continue
        label, stack, members = flat[start], [int(start)], []
        flat[start] = 0                                                            # visited
        while stack:
            i = stack.pop()
            members.append(i)
            x = i % width
            for j in ((i - 1) if x else -1, (i + 1) if x + 1 < width else -1, i - width, i + width):
                if 0 <= j < flat.size and flat[j] == label:
                    flat[j] = 0
                    stack.append(j)
        regions.append(np.divmod(np.array(members), width))
    return regions


def _signature(weight, ys, xs):
    """A region's centre, equal-area radius (pixels), and shape numbers that do not depend on size, place or rotation.

    With z the offset from the centre as a complex number in units of that radius, |mean z^k| is large for a shape of
    k-fold symmetry (3: triangle, 4: square and cross, 5: star) and 0 for a disc; mean |z|^2 tells compact from spread
    shapes, and the cover near the centre tells a ring. Sums over areas, so a pixel more or less hardly matters."""
    total = weight.sum()
    cx, cy = (weight * xs).sum() / total, (weight * ys).sum() / total
    radius = math.sqrt(total / math.pi)
    z = ((xs - cx) + 1j * (ys - cy)) / radius
    moment = lambda k: abs((weight * z**k).sum() / total)
    middle = np.abs(z) < 0.36
    hollow = 1 - weight[middle].sum() / max(math.pi * (0.36 * radius) ** 2, 1.0)
    return cx, cy, radius, np.array([(weight * np.abs(z) ** 2).sum() / total, moment(3), moment(4), moment(5), 0.5 * hollow])


@functools.cache
def _references():
    """Mean shape numbers of each shape, measured on drawn ones: [6, 5], and their spread over all shapes: [5]."""
    rng, table, spread = np.random.default_rng(0), [], []
    for shape in SHAPES:
        rows = []
        for k in range(24):
            obj = Object(shape, "red", 0.10 + 0.07 * k / 23, 0.5 + rng.uniform(-.01, .01), 0.5 + rng.uniform(-.01, .01), rng.uniform(0, 6.3), "plain", (0, 0, 0))
            cover = _coverage(obj, 80, 80)
            ys, xs = np.nonzero(cover)
            rows.append(_signature(cover[ys, xs], ys, xs)[3])
        table.append(np.mean(rows, 0))
        spread.append(np.std(rows, 0))
    return np.array(table), np.sqrt(np.mean(np.square(spread), 0)) + 0.012


UNCLEAR = 12.0           # this many spreads from every reference, a region is no shape at all
HUES = np.array([colorsys.rgb_to_hsv(*(v / 255 for v in rgb))[0] for rgb in COLORS.values()])


def look(image):
    """(list of Found, background luminance in [0, 1]) of a PIL image or uint8 array [H, W, 3]."""
    rgb = np.asarray(image, np.float32)[..., :3] / 255
    height, width = rgb.shape[:2]
    low, high = rgb.min(-1), rgb.max(-1)
    chroma = high - low                                                            # [H, W]: 0 on greys, about 0.7 on objects
    r, g, b = np.moveaxis(rgb, -1, 0)
    safe = np.maximum(chroma, 1e-6)
    hue = np.where(high == r, (g - b) / safe, np.where(high == g, 2 + (b - r) / safe, 4 + (r - g) / safe)) / 6 % 1
    gap = np.abs(hue[..., None] - HUES)
    nearest = np.minimum(gap, 1 - gap).argmin(-1) + 1
    labels = np.where(chroma > 0.22, nearest, 0)
    empty = chroma < 0.10
    tone = float(rgb.mean(-1)[empty].mean()) if empty.any() else 0.5
    table, spread = _references()
    found = []
    for ys, xs in _regions(labels):
        if len(ys) < 0.30 * math.pi * SIZE_RANGES["small"][0] ** 2 * height * width:   # specks: under a third of the smallest object
            continue
        c = chroma[ys, xs]
        weight = (2 * c / np.quantile(c, 0.8) - 0.5).clip(0, 1)                    # half-covered rim pixels count a half
        cx, cy, radius, numbers = _signature(weight, ys, xs)
        distance = np.sqrt((((numbers - table) / spread) ** 2).mean(1))
        k = int(distance.argmin())
        found.append(Found(SHAPES[k] if distance[k] < UNCLEAR else "unclear", list(COLORS)[labels[ys[0], xs[0]] - 1],
                           radius / math.sqrt(height * width), (cx + 0.5) / width, (cy + 0.5) / height))
    return found, tone


def check(image, claims):
    """Which of the facts hold in the picture: list of bool. image: PIL or uint8 [H, W, 3]; claims: list of Fact."""
    found, tone = look(image)
    match = lambda ref: [o for o in found if ref[0] in (None, o.shape) and ref[1] in (None, o.color)]

    def holds(fact):
        mine = match(fact.subject)
        if fact.kind == "total":
            return len(found) == fact.value
        if fact.kind == "count":
            return len(mine) == fact.value
        if fact.kind == "size":
            return bool(mine) and all((o.size < SIZE_LIMIT) == (fact.value == "small") for o in mine)
        if fact.kind == "place":
            row, column = next((i, row.index(fact.value)) for i, row in enumerate(PLACES) if fact.value in row)
            inside = lambda v, k: k / 3 - CELL_TOLERANCE <= v <= (k + 1) / 3 + CELL_TOLERANCE
            return any(inside(o.x, column) and inside(o.y, row) for o in mine)
        if fact.kind == "relation":
            dx, dy = RELATIONS[fact.value]
            return any((a.x - b.x) * dx + (a.y - b.y) * dy > RELATION_TOLERANCE for a in mine for b in match(fact.other) if a is not b)
        nearest_tone = min(TONES, key=lambda name: abs(sum(TONES[name]) / 2 - tone))
        return nearest_tone == fact.value
    return [holds(fact) for fact in claims]


def altered(scene, fact, rng, height, width):
    """The same scene with one thing changed so that `fact` no longer holds; None where no layout was found in 40 tries."""
    objects = list(scene.objects)
    mine = [i for i, o in enumerate(objects) if fact.subject[0] in (None, o.shape) and fact.subject[1] in (None, o.color)]
    i = int(rng.choice(mine)) if mine else 0
    if fact.kind == "background":
        return scene._replace(**dict(zip(("tone", "luminance", "slope", "texture"), _background(rng, str(rng.choice([t for t in TONES if t != fact.value]))))))
    if fact.kind == "relation":                                                    # mirror the picture along the relation's axis
        across = RELATIONS[fact.value][0] != 0
        return scene._replace(objects=tuple(o._replace(x=1 - o.x, angle=-o.angle) if across else o._replace(y=1 - o.y) for o in objects))
    for _ in range(40):
        specs = [[o.shape, o.color, o.size, o.place] for o in objects]
        if fact.kind == "total" or (fact.kind == "count" and rng.random() < 0.3):
            specs = specs[:i] + specs[i + 1:] if len(specs) > 1 and rng.random() < 0.5 else specs + [specs[i][:3] + [None]]
        elif fact.kind == "count" and (fact.subject[1] is None or rng.random() < 0.5):
            specs[i][0] = str(rng.choice([s for s in SHAPES if s != specs[i][0]]))
        elif fact.kind == "count":
            specs[i][1] = str(rng.choice([c for c in COLORS if c != specs[i][1]]))
        elif fact.kind == "size":
            specs[i][2] = rng.uniform(*SIZE_RANGES["small" if fact.value == "large" else "large"])
        elif fact.kind == "place":
            i = next(k for k in mine if objects[k].place == fact.value)
            taken = {o.place for o in objects}
            specs[i][3] = str(rng.choice([p for row in PLACES for p in row if p not in taken]))
        placed = _place(specs, None, rng, height, width)
        if placed:
            return scene._replace(objects=tuple(_paint(spec, xy, rng) for spec, xy in zip(specs, placed)))
    return None


def score_checker(count, seed=0):
    """(share of drawn scenes that pass, share of altered ones that fail, how many were altered), over every training bucket."""
    sizes, passed, rejected, tried = [s for base in BUCKETS for s in BUCKETS[base]], 0, 0, 0
    for i in range(count):
        height, width = sizes[i % len(sizes)]
        scene, details, _ = sample(seed, 1, i, height, width)
        claims, rng = facts(scene, details), np.random.default_rng((seed, 2, i))
        passed += all(check(draw(scene, height, width), claims))
        other = altered(scene, claims[rng.integers(len(claims))], rng, height, width)
        if other is not None:
            tried += 1
            rejected += not all(check(draw(other, height, width), claims))
    return passed / count, rejected / tried, tried


def main(argv=None):
    parser = argparse.ArgumentParser(description="The toy world: a contact sheet of drawn scenes, or a score of the checker.")
    parser.add_argument("--check", type=int, metavar="N", help="draw N scenes, and the same with one fact changed; print how often the checker is right")
    parser.add_argument("--out", default="toy_world.png", metavar="FILE", help="the contact sheet")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.check is not None and args.check < 1:
        parser.error("--check must be at least 1")
    if args.check:
        passed, rejected, tried = score_checker(args.check, args.seed)
        print(f"true scenes that pass: {passed:.4f} of {args.check}; scenes with one fact changed that are rejected: {rejected:.4f} of {tried}")
        return
    sheet = Image.new("RGB", (6 * 132, 4 * 132), "white")
    for i in range(24):
        scene, _, words = sample(args.seed, 0, i, 128, 128)
        sheet.paste(draw(scene, 128, 128), (i % 6 * 132, i // 6 * 132))
        print(f"{i // 6 + 1}.{i % 6 + 1}  {words}")
    try:
        sheet.save(args.out)
    except (OSError, ValueError) as e:
        print(f"error: cannot write {args.out}: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
