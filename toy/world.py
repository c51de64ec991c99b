"""The toy world: scenes that are drawn, captioned and asked for, and the facts that words claim.

Read before: nothing. Read after: toy/checker.py.

    python -m toy.world --out toy_world.png      # a contact sheet of 24 scenes, and their captions

The paper trains on 800M images and is judged by GenEval's object detectors. The toy world tells
the same story with ground truth [ours]: a program draws the scene, so its caption is true by
construction, and a checker that looks at the pixels alone says which facts of a prompt hold in a
picture, for the price of a millisecond and without a model.

    scene  --draw-->     picture, any size                what autoencoder and denoiser learn
    scene  --caption-->  "a small red circle on the left ..."    dense, as in the paper
    scene  --request-->  "a red circle"                   brief, as people ask
    scene  --facts-->    [count, place, relation, ...]    what the words claim
    picture, facts  --check_facts-->  [True, False, ...]  what holds (toy/checker.py)

The order of random draws is a contract: the shipped scores and the held-out prompts rest on it.
Where a draw is made before it is known whether it is needed, a comment says so.
"""
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

# --- What a scene is made of ----------------------------------------------------------------------

# The toy's picture areas: these squared, in pixels. data.buckets(area) has the nine sizes of each.
AREAS = (64, 96, 128)

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")

# Hues at least 23 degrees apart. Mixing with grey leaves a hue as it is, so an anti-aliased edge
# over a grey background keeps its object's colour: that is why backgrounds here are all but grey,
# and why the checker reads hue, not RGB.
COLORS = {
    "red": (222, 38, 38),
    "orange": (240, 134, 28),
    "yellow": (236, 222, 40),
    "green": (48, 172, 72),
    "cyan": (46, 192, 214),
    "blue": (48, 88, 222),
    "purple": (140, 56, 204),
    "pink": (242, 108, 182),
}

# A size is the radius of the circle of equal area, in units of sqrt(height * width): a "large" star
# and a "large" circle cover the same area. The gap between the two ranges is what lets a checker
# call a size right or wrong.
SIZE_RANGES = {"small": (0.106, 0.120), "large": (0.150, 0.172)}
SIZE_LIMIT = 0.135

# Mean luminance of the background, [0, 1].
TONES = {"black": (0.04, 0.16), "grey": (0.42, 0.58), "white": (0.86, 0.97)}

# The ninths of a picture, row by row: where an object's centre can be.
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the center", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)

# Where the first object lies, seen from the second: (x, y), y downwards.
RELATIONS = {
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}

# Centres keep CELL_MARGIN from the lines between thirds; the checker forgives CELL_TOLERANCE, which
# is less. Both are shares of the side.
CELL_MARGIN = 0.05
CELL_TOLERANCE = 0.04

# Two related centres differ by RELATION_GAP along the relation's axis; the checker asks for
# RELATION_TOLERANCE, which is less. Both are shares of the side.
RELATION_GAP = 0.16
RELATION_TOLERANCE = 0.10

# Free room between the circles around two objects, in sqrt(height * width). At 0.02 the model drew
# two objects of a kind as one. [ours]
OBJECT_GAP = 0.05

# GenEval's six. A scene can also be "mixed": three different objects.
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

# Tasks whose scenes hold a first and a second object that stand in a relation.
PAIR_TASKS = ("two_object", "position", "color_attr", "mixed")

FILLS = ("plain", "striped", "shaded")
TEXTURES = ("plain", "bands", "speckle")

# How close stripes and bands stand: radians for each radius of an object, and for each side of a
# picture.
STRIPES, BANDS = 4.2, 2 * math.pi * 4
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}


class Object(NamedTuple):
    shape: str
    color: str
    size: float          # equal-area radius / sqrt(height * width)
    x: float             # centre, share of the width
    y: float             # centre, share of the height
    angle: float         # radians; captions leave it open
    fill: str            # one of FILLS; captions leave it open
    shade: tuple         # a small colour shift (r, g, b) in [0, 255]; captions leave it open

    @property
    def size_word(self):
        return "small" if self.size < SIZE_LIMIT else "large"

    @property
    def place(self):
        return place_at(self.x, self.y)


class Scene(NamedTuple):
    objects: tuple
    tone: str            # one of TONES
    luminance: tuple     # background brightness at its two ends, [0, 1]
    slope: float         # direction of the gradient, radians
    texture: str         # one of TEXTURES
    task: str            # which of the six tasks it was made for, or "mixed"
    noise_seed: int      # for the speckle


class Fact(NamedTuple):
    """One claim that a picture can be checked for. It names objects by (shape, color); None stands
    for any."""
    kind: str            # total, count, size, place, relation or background
    subject: tuple       # the name of those that it is about
    value: object        # a number, or a size, place, relation or tone in words
    other: tuple = (None, None)          # of a relation: the second object's name


def place_at(x, y):
    """The name of the ninth that holds the point (x, y), shares of the sides."""
    return PLACES[int(3 * y)][int(3 * x)]


def pick(options, rng):
    """One of `options`, all equally likely: one draw."""
    return options[rng.integers(len(options))]


# --- Shapes ---------------------------------------------------------------------------------------
# Outlines have area pi: scaled by r, they have the area of a circle of radius r. y points down.

HOLE = 0.55              # inner over outer radius of a ring


def corners_around(count, radii=(1,)):
    """`count` points around the centre, the first one up, their radii in turn from `radii`."""
    points = []
    for k in range(count):
        angle = 2 * math.pi * k / count
        radius = radii[k % len(radii)]
        points.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return points


def corners(shape):
    """[(x, y)] of a shape's outline, at any scale."""
    if shape == "cross":
        a = 0.34                         # half the width of an arm
        return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a),
                (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    if shape == "square":                # turned by 45 degrees: at angle 0 a flat side is down
        return [((x - y) / math.sqrt(2), (x + y) / math.sqrt(2)) for x, y in corners_around(4)]
    if shape == "triangle":
        return corners_around(3)
    if shape == "star":
        return corners_around(10, radii=(1, 0.45))
    return corners_around(48)            # circle, ring


def outline(shape):
    """Corners [n, 2] of the shape at area pi; of a ring, its outer edge."""
    x, y = np.array(corners(shape)).T
    area = 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))
    if shape == "ring":
        area = area * (1 - HOLE**2)
    return np.stack([x, y], axis=1) * math.sqrt(math.pi / area)


def reach_of(points):
    """Distance of the outermost of points [n, 2] from the centre."""
    return float(np.abs(points[:, 0] + 1j * points[:, 1]).max())


OUTLINES = {shape: outline(shape) for shape in SHAPES}
REACH = {shape: reach_of(points) for shape, points in OUTLINES.items()}

# Radians that a shape is turned at most, either way.
MAX_TILT = {"circle": 0.0, "square": 0.3, "triangle": 0.4, "star": 0.6, "cross": 0.3, "ring": 0.0}


# --- Drawing --------------------------------------------------------------------------------------

def coverage(obj, height, width):
    """How much of each pixel the object covers, [H, W] fp32 in [0, 1]."""
    finer = 4                                                       # drawn larger, then averaged
    cos, sin = math.cos(obj.angle), math.sin(obj.angle)
    turn = np.array([[cos, -sin], [sin, cos]])
    centre = np.array([obj.x * width, obj.y * height])
    points = (OUTLINES[obj.shape] @ turn.T) * obj.size * math.sqrt(height * width) + centre

    mask = Image.new("L", (width * finer, height * finer))
    pen = ImageDraw.Draw(mask)
    pen.polygon([tuple(p) for p in points * finer - 0.5], fill=255)
    if obj.shape == "ring":
        middle = points.mean(0)
        hole = (points - middle) * HOLE + middle
        pen.polygon([tuple(p) for p in hole * finer - 0.5], fill=0)
    return np.asarray(mask.reduce(finer), np.float32) / 255


def draw(scene, height, width):
    """The scene as an RGB picture (PIL, height x width); it looks alike at every size."""
    rows = (np.arange(height) + 0.5) / height - 0.5
    columns = (np.arange(width) + 0.5) / width - 0.5
    y, x = np.meshgrid(rows, columns, indexing="ij")                # each [H, W], -0.5 .. 0.5

    grey = background_brightness(scene, x, y)                       # [H, W]
    canvas = np.repeat(grey[..., None], 3, axis=2)                  # [H, W, 3]
    canvas = canvas.astype(np.float32) * 255
    for obj in scene.objects:
        cover = coverage(obj, height, width)[..., None]             # [H, W, 1]
        light = brightness(obj, x, y).astype(np.float32)[..., None]
        color = np.array(COLORS[obj.color], np.float32) + np.array(obj.shade, np.float32)
        canvas += cover * (color * light - canvas)

    pixels = (canvas.clip(0, 255) + 0.5).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def background_brightness(scene, x, y):
    """[H, W], about [0, 1]: a gradient, with bands or speckle on it.
    x, y [H, W]: offsets from the picture's centre, shares of the sides."""
    along = x * math.cos(scene.slope) + y * math.sin(scene.slope)   # about -0.7 .. 0.7
    low, high = scene.luminance
    gradient = low + (high - low) * (along + 0.5)

    if scene.texture == "bands":
        return gradient + 0.035 * np.sign(np.sin(BANDS * along))
    if scene.texture == "speckle":
        height, width = x.shape
        return gradient + speckle(scene.noise_seed, height, width)
    return gradient


def speckle(seed, height, width):
    """Smooth noise [H, W], drawn coarse and enlarged, so that it looks alike at every size."""
    coarse = np.random.default_rng(seed).normal(0, 14, (12, 12)).clip(-60, 60) + 128
    image = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.BILINEAR)
    return (np.asarray(image, np.float32) - 128) / 255


def brightness(obj, x, y):
    """[H, W]: by how much the object's fill scales its colour. x, y: as above."""
    if obj.fill == "plain":
        return np.ones_like(x)

    height, width = x.shape
    direction = obj.angle + 0.8
    across = (x + 0.5 - obj.x) * width * math.cos(direction)
    down = (y + 0.5 - obj.y) * height * math.sin(direction)
    radius = obj.size * math.sqrt(height * width)
    along = (across + down) / radius                                # about -1 .. 1 on the object
    if obj.fill == "striped":
        return np.where(np.sin(STRIPES * along) > 0, 1.0, 0.78)
    return (0.9 - 0.12 * along).clip(0.7, 1.05)                     # shaded


# --- Making scenes --------------------------------------------------------------------------------

class Spec(NamedTuple):
    """What is known of an object before it has a place."""
    shape: str
    color: str
    size: float
    place: str = None    # one of PLACES' names; None: anywhere


class Spot(NamedTuple):
    """A place that was found for an object."""
    x: float             # centre, share of the width
    y: float             # centre, share of the height
    reach: float         # radius of the circle around the object, pixels


def random_scene(rng, height, width, task=None, odds=None):
    """A scene for a picture of height x width (where things fit depends on it).

    rng: np.random.Generator    task: one of TASKS or "mixed"; None: drawn
    odds: how likely each of SHAPES is; None: all alike
    """
    if not task:
        chances = (0.08, 0.16, 0.28, 0.06, 0.20, 0.13, 0.09)
        task = str(rng.choice(TASKS + ("mixed",), p=chances))

    spots = None
    while not spots:                                                # not all find room together
        specs, relation = random_specs(rng, task, odds)
        spots = place_objects(specs, relation, rng, height, width)

    objects = tuple(make_object(spec, spot, rng) for spec, spot in zip(specs, spots))
    tone, luminance, slope, texture = random_background(rng)
    noise_seed = int(rng.integers(2**31))
    return Scene(objects, tone, luminance, slope, texture, task, noise_seed)


def random_specs(rng, task, odds=None):
    """-> ([Spec], the relation in which the first two must stand, or None)."""
    several = int(rng.integers(2, 5))                               # drawn for every task
    count = {"single_object": 1, "colors": 1, "counting": several, "mixed": 3}.get(task, 2)

    if odds is None:
        shapes = rng.permutation(SHAPES)[:count].tolist()
    else:
        shapes = rng.choice(SHAPES, count, replace=False, p=odds).tolist()
    colors = rng.permutation(list(COLORS))[:count].tolist()
    size_words = [pick(("small", "large"), rng) for _ in range(count)]

    if task == "counting":                                          # all of a kind, four small
        shapes = shapes[:1] * count
        colors = colors[:1] * count
        size_words = [size_words[0] if count < 4 else "small"] * count
    elif task in ("position", "color_attr") and rng.random() < 0.25:
        shapes = shapes[:1] * count                                 # told apart by colour alone
    elif task == "two_object" and rng.random() < 0.25:
        colors = colors[:1] * count                                 # told apart by shape alone

    sizes = [rng.uniform(*SIZE_RANGES[word]) for word in size_words]
    specs = [Spec(*parts) for parts in zip(shapes, colors, sizes)]
    relation = pick(list(RELATIONS), rng) if task in PAIR_TASKS else None
    return specs, relation


def place_objects(specs, relation, rng, height, width):
    """[Spot], one for each Spec, or None where an object found no room.

    Centres lie in distinct ninths of the picture, away from the lines between them, and objects
    apart by OBJECT_GAP. relation: a name of RELATIONS that the first two must satisfy, or None.
    """
    spots = []
    for spec in specs:
        spot = find_spot(spec, spots, relation, rng, height, width)
        if spot is None:
            return None
        spots.append(spot)
    return spots


def find_spot(spec, spots, relation, rng, height, width, tries=60):
    """A Spot for one more object beside `spots`, by rejection sampling, or None."""
    rim = 1.5                                                       # pixels, for anti-aliasing
    reach = REACH[spec.shape] * spec.size * math.sqrt(height * width) + rim
    for _ in range(tries):
        x = rng.uniform(reach / width, 1 - reach / width)
        y = rng.uniform(reach / height, 1 - reach / height)
        if reach * 2 >= min(height, width):                         # too large for any place
            return None

        spot = Spot(x, y, reach)
        if spec.place not in (None, place_at(x, y)):
            continue
        if near_a_line(x) or near_a_line(y):
            continue
        if any(too_close(spot, other, height, width) for other in spots):
            continue
        if relation and len(spots) == 1 and not satisfies(relation, spots[0], spot):
            continue
        return spot
    return None


def near_a_line(share):
    """Whether a coordinate is too near to the lines between thirds to say where it lies."""
    return min(abs(share - 1 / 3), abs(share - 2 / 3)) < CELL_MARGIN


def too_close(spot, other, height, width):
    """Whether two objects would share a ninth of the picture, or come nearer than OBJECT_GAP."""
    if place_at(spot.x, spot.y) == place_at(other.x, other.y):
        return True
    distance = math.hypot((spot.x - other.x) * width, (spot.y - other.y) * height)
    gap = OBJECT_GAP * math.sqrt(height * width)
    return distance < spot.reach + other.reach + gap


def satisfies(relation, first, second):
    """Whether the first spot lies clearly in this relation to the second."""
    dx, dy = RELATIONS[relation]
    return (first.x - second.x) * dx + (first.y - second.y) * dy >= RELATION_GAP


def make_object(spec, spot, rng):
    """The Object of a Spec at its Spot; draws what captions leave open."""
    angle = rng.uniform(-1, 1) * MAX_TILT[spec.shape]
    fill = pick(FILLS, rng)
    shade = rng.uniform(-10, 10) + rng.uniform(-5, 5, 3)            # lighter or darker, and a tint
    return Object(spec.shape, spec.color, spec.size, spot.x, spot.y, angle, fill,
                  tuple(shade.tolist()))


def random_background(rng, tone=None):
    """(tone, luminance, slope, texture), as Scene has them. tone: one of TONES; None: drawn."""
    if not tone:
        tone = pick(tuple(TONES), rng)
    luminance = tuple(rng.uniform(*TONES[tone], 2).tolist())
    slope = rng.uniform(0, 2 * math.pi)
    texture = pick(TEXTURES, rng)
    return tone, luminance, slope, texture


# --- What words claim -----------------------------------------------------------------------------
# `details` is the set of things that a caption states; what it leaves out, the picture is free to
# choose. That freedom is what guidance, many steps and dense prompts are for: where a caption fixes
# everything, four plain Euler steps are as good as twenty guided ones, with nothing to show.

class Group(NamedTuple):
    """Objects that words name together: alike in all that is stated."""
    shape: str
    color: str           # None: not stated
    size: str            # "small" or "large"; None: not stated
    members: list        # [Object]


def relation_of(a, b):
    """The relation that words state for two objects: along the axis on which they differ more."""
    if abs(a.x - b.x) >= abs(a.y - b.y):
        return "to the left of" if a.x < b.x else "to the right of"
    return "above" if a.y < b.y else "below"


def details_for(scene, rng, style="dense"):
    """What a caption of this scene states: a frozenset of color, size, place, relation, background.

    dense: most of it, and never fewer than two of size, place, relation and background (the paper
    trains on dense captions alone). Any other style, brief: only what the task is about, as people
    ask: "two red circles".
    """
    always = task_details(scene, rng)
    if style != "dense":
        return frozenset(always)

    related = 0.6 if scene.task in PAIR_TASKS else 0.0
    chances = {"size": 0.7, "place": 0.8, "relation": related, "background": 0.8}
    while True:
        chosen = {detail for detail, chance in chances.items() if rng.random() < chance}
        if len(chosen) >= 2:
            return frozenset(chosen | always)


def task_details(scene, rng):
    """What the scene's task is about: a set of details."""
    counting_color = rng.random() < 0.5                             # drawn for every task
    if scene.task in ("single_object", "two_object"):
        return set()
    if scene.task == "counting":
        return {"color"} if counting_color else set()
    if scene.task == "position":
        told_by_shape = len({obj.shape for obj in scene.objects}) > 1
        if told_by_shape and rng.random() < 0.3:
            return {"relation"}
        return {"relation", "color"}
    return {"color"}


def stated_name(obj, details):
    """(shape, color or None): by what these details name an object."""
    return obj.shape, (obj.color if "color" in details else None)


def grouped(scene, details):
    """[Group]: the objects, together where these details name them alike."""
    members_of = {}
    for obj in scene.objects:
        members_of.setdefault(stated_name(obj, details), []).append(obj)

    groups = []
    for (shape, color), members in members_of.items():
        # Those that are named alike have one size.
        size = members[0].size_word if "size" in details else None
        groups.append(Group(shape, color, size, members))
    return groups


def facts(scene, details):
    """[Fact]: the checkable claims of words with these details."""
    anything = (None, None)
    claims = [Fact("total", anything, len(scene.objects))]

    for group in grouped(scene, details):
        subject = (group.shape, group.color)
        claims.append(Fact("count", subject, len(group.members)))
        if "size" in details:
            claims.append(Fact("size", subject, group.size))
        if "place" in details:
            claims += [Fact("place", subject, obj.place) for obj in group.members]

    if "relation" in details:
        first, second = scene.objects[:2]
        claims.append(Fact("relation", stated_name(first, details), relation_of(first, second),
                           stated_name(second, details)))
    if "background" in details:
        claims.append(Fact("background", anything, scene.tone))
    return claims


# --- Captions -------------------------------------------------------------------------------------

# Two wordings for each place.
PLACE_WORDS = {
    "at the top left": ("at the top left", "in the top left corner"),
    "at the top": ("at the top", "at the top"),
    "at the top right": ("at the top right", "in the top right corner"),
    "on the left": ("on the left", "on the left"),
    "in the center": ("in the center", "in the middle"),
    "on the right": ("on the right", "on the right"),
    "at the bottom left": ("at the bottom left", "in the bottom left corner"),
    "at the bottom": ("at the bottom", "at the bottom"),
    "at the bottom right": ("at the bottom right", "in the bottom right corner"),
}


def caption(scene, details, rng):
    """One caption of the scene that states exactly `details`, in varied wording. Lower case."""
    groups = grouped(scene, details)
    phrases = [group_phrase(group) for group in groups]
    placed = "place" in details
    pair_related = "relation" in details and len(scene.objects) == 2

    # "a red circle to the left of a blue square", or first all objects, then how they stand?
    if pair_related and (not placed or rng.random() < 0.3):
        sentences = relation_first(scene, details, phrases, rng)
    else:
        sentences = objects_first(scene, details, groups, phrases, rng)

    sentences[0] = opening(phrases[0], rng) + sentences[0]
    if "background" in details:
        add_background(sentences, scene.tone, placed, rng)
    return ". ".join(sentences)


def group_phrase(group):
    """"a small red circle", "two red circles": what is stated of a group, without its place."""
    count = len(group.members)
    noun = group.shape if count == 1 else plural(group.shape)
    words = " ".join(word for word in (group.size, group.color, noun) if word)
    number = article(words) if count == 1 else NUMBERS[count]
    return f"{number} {words}"


def relation_first(scene, details, phrases, rng):
    """Sentences that begin with two objects and their relation. The two always differ in what is
    stated, so each has a phrase of its own."""
    first, second = scene.objects
    sentences = [f"{phrases[0]} {relation_of(first, second)} {phrases[1]}"]
    if "place" in details:
        for obj in scene.objects:
            sentences.append(f"the {short_name(obj, details)} is {place_phrase(obj, rng)}")
    return sentences


def objects_first(scene, details, groups, phrases, rng):
    """Sentences that begin with all objects, each with its place if places are stated."""
    if "place" in details:
        phrases = [placed_phrase(phrase, group, rng) for phrase, group in zip(phrases, groups)]
    sentences = [listing(phrases)]
    if "relation" in details:
        first, second = scene.objects[:2]
        sentences.append(f"the {short_name(first, details)} is {relation_of(first, second)} "
                         f"the {short_name(second, details)}")
    return sentences


def placed_phrase(phrase, group, rng):
    """"a red circle at the top", "two red circles, one at the top and one on the left"."""
    places = [place_phrase(obj, rng) for obj in group.members]
    if len(places) == 1:
        return f"{phrase} {places[0]}"
    return f"{phrase}, " + listing([f"one {place}" for place in places])


def opening(phrase, rng):
    """How a caption whose first phrase is `phrase` begins: often with nothing."""
    one = phrase.startswith(("a ", "an "))
    there = "there is " if one else "there are "
    return pick(("", "", "a picture of ", "an image of ", there), rng)


def add_background(sentences, tone, placed, rng):
    """States the background, in a sentence added to `sentences` or at the end of the only one."""
    words = pick((f"on a {tone} background", f"against a {tone} background",
                  f"the background is {tone}"), rng)
    if words.startswith("the"):
        at_end = rng.random() < 0.7
        sentences.insert(len(sentences) if at_end else 1, words)
    elif placed or len(sentences) > 1:
        subject = "it is all" if rng.random() < 0.5 else "everything is"
        sentences.append(f"{subject} {words}")
    else:
        sentences[0] += f" {words}"


def place_phrase(obj, rng):
    """Where the object is, in one of two wordings."""
    return pick(PLACE_WORDS[obj.place], rng)


def short_name(obj, details):
    """"red circle", or "circle" where no colours are stated."""
    shape, color = stated_name(obj, details)
    return f"{color} {shape}" if color else shape


def plural(noun):
    # Not "boxes": "boxs" is what the shipped text encoder has learnt.
    return noun + ("es" if noun.endswith("s") else "s")


def article(words):
    return "an" if words[0] in "aeiou" else "a"


def listing(parts):
    """"a", "a and b", "a, b and c"."""
    if len(parts) == 1:
        return parts[0]
    return ", ".join(parts[:-1]) + " and " + parts[-1]


# --- Requests -------------------------------------------------------------------------------------

# Words that people use and captions never do. Only requests hold them, so the denoiser has not seen
# them; the reasoner learns to put them into the words of the captions.
VAGUE = {
    "circle": ("disc", "dot"),
    "square": ("box", "block"),
    "triangle": ("pyramid", "wedge"),
    "star": ("asterisk", "starlet"),
    "cross": ("plus", "plus sign"),
    "ring": ("hoop", "donut"),
    "red": ("crimson", "scarlet"),
    "orange": ("tangerine", "amber"),
    "yellow": ("lemon", "golden"),
    "green": ("emerald", "grassy"),
    "cyan": ("turquoise", "teal"),
    "blue": ("navy", "cobalt"),
    "purple": ("violet", "lilac"),
    "pink": ("rosy", "magenta"),
    "two": ("a couple of", "a pair of"),
    "three": ("a trio of", "three"),
    "four": ("a quartet of", "four"),
    "to the left of": ("left of", "on the left side of"),
    "to the right of": ("right of", "on the right side of"),
    "above": ("over", "on top of"),
    "below": ("under", "beneath"),
}


def request(scene, details, rng, vague=False):
    """A brief request for the scene, as a person would type it: "two red circles".

    details: of style brief; size, place and background are not said. With a relation there are two
    groups. vague: swaps words by VAGUE.
    """
    def say(word):
        if vague and word in VAGUE and rng.random() < 0.6:
            return pick(VAGUE[word], rng)
        return word

    phrases = []
    for group in grouped(scene, details):
        count = len(group.members)
        noun = say(group.shape)
        color = say(group.color) if group.color else ""
        if count > 1:
            words = (say(NUMBERS[count]), color, plural(noun))
        else:
            words = (article(color or noun), color, noun)
        phrases.append(" ".join(word for word in words if word))

    if "relation" in details:
        first, second = phrases
        relation = say(relation_of(*scene.objects[:2]))
        return f"{first} {relation} {second}"
    return listing(phrases)


def sample_scene(seed, epoch, index, height, width, task=None, style="dense"):
    """Sample `index` of an epoch: (Scene, details, words), a pure function of its arguments.

    style: "dense", words are a caption; "brief", a request; "vague", a request in words by VAGUE.
    """
    rng = np.random.default_rng((seed, epoch, index))
    scene = random_scene(rng, height, width, task)
    details = details_for(scene, rng, style)
    if style == "dense":
        return scene, details, caption(scene, details, rng)
    return scene, details, request(scene, details, rng, vague=style == "vague")


# --- The command ----------------------------------------------------------------------------------

def main(argv=None):
    # Imported here, so that processes which only draw need not load torch.
    from kit.files import Parser, user_path
    from kit.images import contact_sheet, save_png

    parser = Parser("A contact sheet of the toy world, and its captions.", __doc__)
    parser.add_argument("--out", type=user_path, default="toy_world.png", metavar="PNG",
                        help="the contact sheet (default %(default)s)")
    args = parser.parse_args(argv)

    columns = 6
    pictures = []
    for i in range(24):
        scene, _, words = sample_scene(0, 0, i, 128, 128)
        row, column = divmod(i, columns)
        print(f"{row + 1}.{column + 1}  {words}")
        pictures.append(draw(scene, 128, 128))
    save_png(contact_sheet(pictures, columns), args.out)


if __name__ == "__main__":
    from kit.files import run_command
    run_command(main)
