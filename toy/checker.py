"""The toy world's checker: from pixels alone to facts, rewards and scores.

Read before: toy/world.py. Read after: toy/dataset.py, or sample.py.

It stands in for GenEval's object detectors [ours]: `look` segments a picture by colour and names
the shape of every connected region by its moments; `check_facts` says which facts of a prompt hold.
From that come the toy's judge in reward learning (`Checker`), the `score` of held-out prompts of
six tasks, and the test of an autoencoder (`round_trip`). Facts do not see everything, so more
numbers stand beside them: outline (do shapes have their corners?), textures (are stripes, shading,
bands and speckle there?), fidelity (a Fréchet distance to drawn pictures), and the diversity of
the pictures of one prompt.
"""
import colorsys
import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from kit.images import from_pil, to_images, to_pil
from toy.world import (
    AREAS,
    BANDS,
    CELL_TOLERANCE,
    COLORS,
    FILLS,
    PLACES,
    RELATION_TOLERANCE,
    RELATIONS,
    SHAPES,
    SIZE_LIMIT,
    SIZE_RANGES,
    STRIPES,
    TASKS,
    TEXTURES,
    TONES,
    Object,
    Scene,
    article,
    coverage,
    draw,
    facts,
    plural,
    sample_scene,
)

# --- Looking: pixels to objects -------------------------------------------------------------------

# A pixel's chroma, see `chroma_of`, is 0 on greys and about 0.7 on objects.
COLORED = 0.22           # more: the pixel belongs to an object, or to a speck
COLORLESS = 0.10         # less: it is background

# A region smaller than this share of the smallest object's area is a speck and is passed over.
SPECK = 0.30

# This many spreads from every shape's numbers, a region is no shape at all.
UNCLEAR = 12.0


class FoundObject(NamedTuple):
    shape: str           # one of SHAPES, or "unclear"
    color: str           # one of COLORS
    size: float          # equal-area radius / sqrt(height * width)
    x: float             # centre, share of the width
    y: float             # centre, share of the height


class Seen(NamedTuple):
    """What `look` finds in a picture."""
    objects: list        # [FoundObject]
    tone: float          # luminance of the background, [0, 1]


class Form(NamedTuple):
    """What a region of pixels looks like."""
    x: float             # centre, pixels
    y: float
    radius: float        # of the circle of equal area, pixels
    numbers: np.ndarray  # [5] that tell shapes apart, see `form_of`
    folds: dict          # {k: mean of z^k}, complex, see `form_of`


class Region(NamedTuple):
    """A connected region of one colour that is large enough to be an object. n pixels."""
    rows: np.ndarray     # [n]
    columns: np.ndarray  # [n]
    color: str           # one of COLORS
    cover: np.ndarray    # [n] in [0, 1]: how much of each pixel is covered
    form: Form


def hue_of(rgb):
    """The hue of a colour (r, g, b) in [0, 255], as a share of the way around the colour circle."""
    r, g, b = rgb
    hue, _, _ = colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)
    return hue


HUES = np.array([hue_of(rgb) for rgb in COLORS.values()])


def look(image):
    """What is in a picture: Seen. image: PIL, or uint8 [H, W, 3]."""
    rgb = rgb_of(image)                                             # [H, W, 3]
    height, width = rgb.shape[:2]
    chroma = chroma_of(rgb)                                         # [H, W]

    empty = chroma < COLORLESS
    tone = float(rgb.mean(-1)[empty].mean()) if empty.any() else 0.5

    objects = []
    for region in objects_in(rgb, chroma):
        form = region.form
        objects.append(FoundObject(
            shape_of(form), region.color, form.radius / math.sqrt(height * width),
            (form.x + 0.5) / width, (form.y + 0.5) / height))
    return Seen(objects, tone)


def rgb_of(image):
    """A picture, PIL or uint8 [H, W, 3], as fp32 [H, W, 3] in [0, 1]."""
    return np.asarray(image, np.float32)[..., :3] / 255


def objects_in(rgb, chroma):
    """[Region] of a picture [H, W, 3] in [0, 1] whose chroma [H, W] is known."""
    height, width = chroma.shape
    colored = chroma > COLORED
    labels = np.zeros((height, width), int)                         # 0, or a colour's number
    labels[colored] = 1 + nearest_color(rgb[colored])

    smallest = SPECK * math.pi * SIZE_RANGES["small"][0] ** 2 * height * width
    found = []
    for rows, columns in regions(labels):
        if len(rows) >= smallest:
            color = list(COLORS)[labels[rows[0], columns[0]] - 1]
            cover = rim_weights(chroma[rows, columns])
            form = form_of(cover, rows, columns)
            found.append(Region(rows, columns, color, cover, form))
    return found


def chroma_of(rgb):
    """The largest of r, g and b less the smallest: [...]. rgb [..., 3] in [0, 1]."""
    r, g, b = np.moveaxis(rgb, -1, 0)
    largest = np.maximum(np.maximum(r, g), b)                       # much faster than rgb.max(-1)
    smallest = np.minimum(np.minimum(r, g), b)
    return largest - smallest


def nearest_color(rgb):
    """[n]: which of COLORS has the nearest hue. rgb [n, 3] in [0, 1], none of them grey."""
    r, g, b = rgb.T
    high = rgb.max(-1)
    chroma = chroma_of(rgb)

    # The hue runs once around from red over green and blue, in sixths.
    from_green = np.where(high == g, 2 + (b - r) / chroma, 4 + (r - g) / chroma)
    hue = np.where(high == r, (g - b) / chroma, from_green) / 6 % 1

    gap = np.abs(hue[:, None] - HUES)                               # [n, colors]
    around = np.minimum(gap, 1 - gap)
    return around.argmin(-1)


def regions(labels):
    """Connected regions (4 neighbours, equal label > 0) of an integer map [H, W].

    Returns a list of (rows, columns), index arrays of a region's pixels.
    """
    # A border of zeros: then every pixel has four neighbours.
    padded = np.pad(labels, 1)
    width = padded.shape[1]
    left = padded.ravel().tolist()                                  # labels; 0 where visited

    found = []
    for start in np.flatnonzero(padded).tolist():
        label = left[start]
        if not label:
            continue
        left[start] = 0
        pixels, stack = [], [start]
        while stack:
            i = stack.pop()
            pixels.append(i)
            for neighbour in (i - 1, i + 1, i - width, i + width):
                if left[neighbour] == label:
                    left[neighbour] = 0
                    stack.append(neighbour)
        rows, columns = np.divmod(np.array(pixels), width)
        found.append((rows - 1, columns - 1))
    return found


def rim_weights(chroma):
    """About how much of each of a region's pixels is covered, [n] in [0, 1]: a half-covered rim
    pixel has half the chroma of the others, and counts a half. It is steep, so that the dark
    stripes of a fill, with three quarters of the chroma, count whole."""
    return (2 * chroma / np.quantile(chroma, 0.8) - 0.5).clip(0, 1)


def form_of(weight, rows, columns):
    """-> Form of the pixels at (rows, columns), each covered by `weight`, all [n].

    Its numbers do not depend on size, place or rotation. With z the offset from the centre as a
    complex number in units of the radius, |mean z^k| is large for a shape of k-fold symmetry
    (3: triangle, 4: square and cross, 5: star) and 0 for a disc; mean |z|^2 tells compact from
    spread shapes, and the cover near the centre tells a ring. All are sums over areas: a pixel more
    or less hardly matters.
    """
    total = weight.sum()
    x = (weight * columns).sum() / total
    y = (weight * rows).sum() / total
    radius = math.sqrt(total / math.pi)
    z = ((columns - x) + 1j * (rows - y)) / radius                  # [n]

    spread = (weight * np.abs(z) ** 2).sum() / total
    folds = {k: (weight * z**k).sum() / total for k in (3, 4, 5)}

    middle = np.abs(z) < 0.36
    middle_area = math.pi * (0.36 * radius) ** 2
    hollow = 1 - weight[middle].sum() / max(middle_area, 1.0)
    numbers = np.array([spread, *np.abs(list(folds.values())), 0.5 * hollow])
    return Form(x, y, radius, numbers, folds)


@functools.cache
def shape_numbers():
    """The numbers of each of SHAPES, measured on 24 drawn ones: (means [shapes, 5], spread [5])."""
    rng = np.random.default_rng(0)
    means, spreads = [], []
    for shape in SHAPES:
        numbers = []
        for k in range(24):
            x = 0.5 + rng.uniform(-0.01, 0.01)
            y = 0.5 + rng.uniform(-0.01, 0.01)
            angle = rng.uniform(0, 6.3)
            obj = Object(shape, "red", 0.10 + 0.07 * k / 23, x, y, angle, "plain", (0, 0, 0))

            cover = coverage(obj, 80, 80)
            rows, columns = np.nonzero(cover)
            numbers.append(form_of(cover[rows, columns], rows, columns).numbers)
        means.append(np.mean(numbers, 0))
        spreads.append(np.std(numbers, 0))

    spread = np.sqrt(np.mean(np.square(spreads), 0))
    return np.array(means), spread + 0.012


def shape_of(form):
    """The shape whose numbers are nearest, or "unclear"."""
    shape, distance = nearest_shape(form)
    return shape if distance < UNCLEAR else "unclear"


def nearest_shape(form):
    """-> (one of SHAPES, how many spreads its numbers are away)."""
    means, spread = shape_numbers()
    distance = np.sqrt((((form.numbers - means) / spread) ** 2).mean(1))        # [shapes]
    nearest = int(distance.argmin())
    return SHAPES[nearest], distance[nearest]


# --- Checking: do the facts hold? -----------------------------------------------------------------

def check_facts(image, claims, seen=None):
    """Which facts hold in the picture: list of bool.

    image: PIL, or uint8 [H, W, 3]    claims: [Fact]    seen: look(image), if that is known
    """
    if seen is None:
        seen = look(image)
    return [HOLDS[fact.kind](fact, seen) for fact in claims]


def named(name, objects):
    """Those of the objects that fit a name: (shape or None, color or None)."""
    shape, color = name
    return [obj for obj in objects if shape in (None, obj.shape) and color in (None, obj.color)]


def total_holds(fact, seen):
    return len(seen.objects) == fact.value


def count_holds(fact, seen):
    return len(named(fact.subject, seen.objects)) == fact.value


def size_holds(fact, seen):
    """All of them have the size, and there is one."""
    objects = named(fact.subject, seen.objects)
    small = fact.value == "small"
    return bool(objects) and all((obj.size < SIZE_LIMIT) == small for obj in objects)


def place_holds(fact, seen):
    """One of them is there, or hardly outside."""
    row, column = place_index(fact.value)
    return any(in_third(obj.x, column) and in_third(obj.y, row)
               for obj in named(fact.subject, seen.objects))


def place_index(place):
    """(row, column) of a name in PLACES."""
    for row, names in enumerate(PLACES):
        if place in names:
            return row, names.index(place)
    raise ValueError(f"no place is called {place}")


def in_third(share, k):
    """Whether a coordinate lies in the k-th third of its side, or within CELL_TOLERANCE of it."""
    return k / 3 - CELL_TOLERANCE <= share <= (k + 1) / 3 + CELL_TOLERANCE


def relation_holds(fact, seen):
    """Two of them stand so, clearly."""
    dx, dy = RELATIONS[fact.value]
    for a in named(fact.subject, seen.objects):
        for b in named(fact.other, seen.objects):
            apart = (a.x - b.x) * dx + (a.y - b.y) * dy
            if a is not b and apart > RELATION_TOLERANCE:
                return True
    return False


def background_holds(fact, seen):
    def distance(name):
        return abs(sum(TONES[name]) / 2 - seen.tone)
    return min(TONES, key=distance) == fact.value


HOLDS = {
    "total": total_holds,
    "count": count_holds,
    "size": size_holds,
    "place": place_holds,
    "relation": relation_holds,
    "background": background_holds,
}


# --- Judging: the checker as a judge of rubrics ---------------------------------------------------

class Checker:
    """The toy world's judge: it looks at the pixels alone.

    judge(pictures, rows) -> for each picture the answers to its row's rubrics, each True or False.
    row["rubrics"]: [{"name", "check", "fact"}]; a rubric without a fact is "coherent", "clean" or
    "textured".
    """
    failed = ()          # a judge at an endpoint counts its failures here; this one has none

    def __call__(self, pictures, rows):
        answers = []
        for picture, row in zip(pictures, rows, strict=True):
            seen = look(picture)
            answers.append([self.answer(rubric, picture, seen) for rubric in row["rubrics"]])
        return answers

    def answer(self, rubric, picture, seen):
        if "fact" in rubric:
            return check_facts(picture, [rubric["fact"]], seen)[0]
        if rubric["name"] == "coherent":
            return all(obj.shape != "unclear" for obj in seen.objects)
        if rubric["name"] == "clean":
            return specks(picture, seen.objects) < 0.01
        if rubric["name"] == "textured":
            fills, ground = textures(picture)
            return {*fills, ground} != {"plain"}
        raise ValueError(f"the checker knows no rubric {rubric['name']} without a fact")


def specks(picture, objects):
    """Share of the picture that is coloured and belongs to no object."""
    rgb = np.asarray(picture, np.float32)[..., :3] / 255            # [H, W, 3]
    colored = chroma_of(rgb) > COLORED
    return float(colored.mean()) - sum(math.pi * obj.size**2 for obj in objects)


def fact_words(fact):
    """The fact as a sentence that a judge can check."""
    subject = noun(fact.subject)
    if fact.kind == "total":
        return f"There are exactly {fact.value} objects in all."
    if fact.kind == "count":
        counted = subject if fact.value == 1 else plural(subject)
        return f"There are exactly {fact.value} {counted}."
    if fact.kind == "size":
        return f"Every {subject} is {fact.value}."
    if fact.kind == "place":
        return f"There is {article(subject)} {subject} {fact.value} of the picture."
    if fact.kind == "relation":
        other = noun(fact.other)
        return (f"{article(subject).capitalize()} {subject} is {fact.value} "
                f"{article(other)} {other}.")
    return f"The background is {fact.value}."


def noun(name):
    """"red circle", "circle" or "red object" for a name: (shape or None, color or None)."""
    shape, color = name
    words = shape or "object"
    return f"{color} {words}" if color else words


# --- Outline: do shapes have their corners? -------------------------------------------------------

# How a shape's turn is read off: (k, argument of mean z^k at angle 0). A turn by `angle` multiplies
# z^k by exp(i k angle). A square's corners lie on the diagonals at angle 0, where z^4 is negative;
# those of triangle and star point up, where z is -i. Circle and ring look alike at every angle.
FOLD = {
    "square": (4, math.pi),
    "cross": (4, 0.0),
    "triangle": (3, math.pi / 2),
    "star": (5, -math.pi / 2),
}


def outlines(image):
    """[IoU] of each object in the picture with the ideal shape of its own kind, size, place and
    angle: intersection over union of their pixels, in [0, 1].

    Drawn pictures of 128 x 128 have 0.97, since pixels are coarse. A blob that is no shape is held
    against the shape that it is nearest to. It is of what is found: an object that is missing, or
    one too many, is for `check_facts` to tell. image: as in `look`
    """
    rgb = rgb_of(image)
    height, width = rgb.shape[:2]
    overlaps = []
    for region in objects_in(rgb, chroma_of(rgb)):
        mask = np.zeros((height, width), bool)
        mask[region.rows, region.columns] = region.cover > 0.5
        ideal = coverage(ideal_of(region.form, height, width), height, width) > 0.5
        overlaps.append((mask & ideal).sum() / (mask | ideal).sum())
    return overlaps


def ideal_of(form, height, width):
    """The Object that a region's form comes nearest to; its colour does not matter."""
    shape, _ = nearest_shape(form)
    angle = 0.0
    if shape in FOLD:
        k, at_rest = FOLD[shape]
        angle = (np.angle(form.folds[k]) - at_rest) / k
    return Object(shape, "red", form.radius / math.sqrt(height * width), (form.x + 0.5) / width,
                  (form.y + 0.5) / height, angle, "plain", (0, 0, 0))


# --- Textures: are stripes, shading, bands and speckle there? -------------------------------------
# Captions leave textures open, so no fact holds them, and a picture may have any. Drawn pictures
# have each of three fills and three grounds in a third of the cases: so should generated ones.

TEXTURE_SEED = 1_000_006         # of the scenes that the readers are fitted on


class Reader(NamedTuple):
    """A linear reader: numbers that tell of a texture -> which of its names."""
    names: tuple         # FILLS or TEXTURES
    mean: np.ndarray     # [d] of the numbers that it was fitted on
    spread: np.ndarray   # [d]
    weights: np.ndarray  # [d + 1, names]

    def read(self, numbers):
        """[n, d] -> [n] names."""
        if len(numbers) == 0:
            return []
        scaled = (np.asarray(numbers) - self.mean) / self.spread
        votes = with_one(scaled) @ self.weights
        return [self.names[k] for k in votes.argmax(1)]


def with_one(numbers):
    """[n, d] -> [n, d + 1]: a constant beside the numbers."""
    return np.concatenate([numbers, np.ones((len(numbers), 1))], axis=1)


def fit_reader(names, numbers, truth):
    """Reader by least squares on one-hot votes. numbers [n, d]; truth: [n] names.

    Its borders lie near the middle between two textures: stripes of less than about half their
    contrast are read as none.
    """
    numbers = np.array(numbers)
    mean, spread = numbers.mean(0), numbers.std(0)
    votes = np.array([[name == true for name in names] for true in truth], float)
    weights, *_ = np.linalg.lstsq(with_one((numbers - mean) / spread), votes, rcond=None)
    return Reader(names, mean, spread, weights)


@functools.cache
def texture_readers():
    """(Reader of an object's fill, Reader of the ground), fitted on 150 drawn scenes."""
    fills, true_fills, grounds, true_grounds = [], [], [], []
    for i in range(150):
        side = AREAS[i % len(AREAS)]
        scene, _, _ = sample_scene(TEXTURE_SEED, 0, i, side, side)
        rgb = rgb_of(draw(scene, side, side))
        chroma = chroma_of(rgb)
        for region in objects_in(rgb, chroma):
            fills.append(fill_numbers(rgb, region))
            true_fills.append(object_at(scene, region.form, side).fill)
        grounds.append(ground_numbers(rgb, chroma))
        true_grounds.append(scene.texture)
    return fit_reader(FILLS, fills, true_fills), fit_reader(TEXTURES, grounds, true_grounds)


def object_at(scene, form, side):
    """The scene's object that lies nearest to a form, in a square picture."""
    def distance(obj):
        return math.hypot(obj.x * side - form.x, obj.y * side - form.y)
    return min(scene.objects, key=distance)


def fill_numbers(rgb, region):
    """[3] that tell an object's fill: how steep its brightness is, how strong the wave of stripes
    on it, and how uneven it is beside the slope."""
    mask = np.zeros(rgb.shape[:2], bool)
    mask[region.rows, region.columns] = True
    rows, columns = np.nonzero(~widened(~mask, 1))                  # without the rim
    if len(rows) < 9:
        return [0.0, 0.0, 0.0]
    form = region.form
    brightness = rgb[rows, columns].mean(-1)
    x = (columns - form.x) / form.radius
    y = (rows - form.y) / form.radius
    slope, rest = without_slope(brightness / brightness.mean(), x, y)
    return [slope, wave(rest, x, y, STRIPES), rest.std()]


def ground_numbers(rgb, chroma):
    """[3] that tell a ground: how strong the wave of bands is on it, how uneven it is beside its
    slope, and how uneven beside slope and wave."""
    height, width = chroma.shape
    rows, columns = np.nonzero(~widened(chroma >= COLORLESS, 2))    # away from objects
    if len(rows) < 9:
        return [0.0, 0.0, 0.0]
    x = (columns + 0.5) / width - 0.5
    y = (rows + 0.5) / height - 0.5
    _, rest = without_slope(rgb[rows, columns].mean(-1), x, y)
    bands = wave(rest, x, y, BANDS)
    uneven = rest.std()
    return [bands, uneven, math.sqrt(max(uneven**2 - bands**2 / 2, 0))]


def widened(mask, pixels):
    """A mask [H, W] with all that is at most so many pixels away from it."""
    numbers = torch.from_numpy(mask)[None].float()                  # [1, H, W], 0 or 1
    size = 2 * pixels + 1
    return F.max_pool2d(numbers, size, stride=1, padding=pixels)[0].numpy() > 0


def without_slope(brightness, x, y):
    """-> (steepness of the plane through brightness [n] at x, y [n], what is left [n])."""
    terms = np.stack([np.ones_like(x), x, y], axis=1)
    plane, *_ = np.linalg.lstsq(terms, brightness, rcond=None)
    return math.hypot(plane[1], plane[2]), brightness - terms @ plane


def wave(brightness, x, y, frequency):
    """Amplitude of the strongest wave of this frequency, of 32 directions and any phase, in
    brightness [n] at x, y [n]."""
    directions = np.arange(32) * math.pi / 32
    along = np.outer(np.cos(directions), x) + np.outer(np.sin(directions), y)       # [32, n]
    return 2 * np.abs((np.exp(1j * frequency * along) * brightness).mean(1)).max()


# What is reported of textures: a name, and what the readers call it.
FILL_SHARES = {"stripes": "striped", "shading": "shaded"}
GROUND_SHARES = {"bands": "bands", "speckle": "speckle"}

# What drawn pictures of 128 x 128 have of the measures that no fact holds.
DRAWN = {"fidelity": 0.0, "outline": 0.97, "stripes": 1 / 3, "shading": 1 / 3, "bands": 1 / 3,
         "speckle": 1 / 3}


def textures(picture):
    """-> ([one of FILLS for each object], one of TEXTURES for the ground). picture: as in `look`"""
    read_fill, read_ground = texture_readers()
    rgb = rgb_of(picture)
    chroma = chroma_of(rgb)
    fills = [fill_numbers(rgb, region) for region in objects_in(rgb, chroma)]
    return read_fill.read(fills), read_ground.read([ground_numbers(rgb, chroma)])[0]


def texture_shares(pictures):
    """{"stripes", "shading": share of the objects, "bands", "speckle": share of the pictures} in
    which each is read. Of drawn pictures each has a third. pictures: as in `look`"""
    all_fills, grounds = [], []
    for picture in pictures:
        fills, ground = textures(picture)
        all_fills += fills
        grounds.append(ground)

    shares = {}
    for name, texture in FILL_SHARES.items():
        shares[name] = round(all_fills.count(texture) / max(len(all_fills), 1), 3)
    for name, texture in GROUND_SHARES.items():
        shares[name] = round(grounds.count(texture) / len(grounds), 3)
    return shares


# --- Scoring: held-out prompts of six tasks -------------------------------------------------------

EVAL_SEED = 20_260_523           # training draws its scenes with other seeds
ROUND_TRIP_SEED = 1_000_003


class HeldOut(NamedTuple):
    """A prompt of a scene that no training run draws (the same words may be)."""
    task: str            # one of TASKS
    scene: Scene         # one scene of which the prompt is true
    claims: list         # [Fact]: what the prompt claims
    prompt: str


def held_out(task, count, height, width, style="dense"):
    """[HeldOut] of one task. style: dense, brief or vague, see toy.world.sample_scene."""
    rows = []
    for i in range(count):
        scene, details, prompt = sample_scene(
            EVAL_SEED, TASKS.index(task), i, height, width, task=task, style=style)
        rows.append(HeldOut(task, scene, facts(scene, details), prompt))
    return rows


def held_out_rows(per_task, height, width, style="dense"):
    """[HeldOut] of all six tasks, `per_task` of each."""
    return [row for task in TASKS for row in held_out(task, per_task, height, width, style)]


def score(pictures, rows, vae):
    """Scores of PIL pictures that were made for the prompts of rows, [HeldOut] of all six tasks.

    Returns {"overall": mean of the six,
             each of TASKS: share of its pictures in which all facts hold,
             "fidelity": Fréchet distance to the drawn pictures of the same prompts,
             "outline": mean IoU of objects and ideal shapes,
             "stripes", "shading", "bands", "speckle": how often they are there}.
    """
    passed = {task: [] for task in TASKS}
    for picture, row in zip(pictures, rows, strict=True):
        passed[row.task].append(all(check_facts(picture, row.claims)))
    tasks = {task: sum(passes) / len(passes) for task, passes in passed.items()}
    overall = sum(tasks.values()) / len(tasks)

    width, height = pictures[0].size
    drawn = [draw(row.scene, height, width) for row in rows]
    fidelity = frechet_distance(fidelity_features(vae, from_pil(pictures)),
                                fidelity_features(vae, from_pil(drawn)))
    overlaps = [overlap for picture in pictures for overlap in outlines(picture)]
    outline = float(np.mean(overlaps)) if overlaps else 0.0
    return {"overall": round(overall, 4), **tasks, "fidelity": round(fidelity, 3),
            "outline": round(outline, 4), **texture_shares(pictures)}


def first_failures(pictures, rows):
    """For each picture of HeldOut rows the first fact that does not hold, in words; "" where all
    do."""
    words = []
    for picture, row in zip(pictures, rows, strict=True):
        holds = check_facts(picture, row.claims)
        failed = [fact for fact, so in zip(row.claims, holds) if not so]
        words.append(fact_words(failed[0]) if failed else "")
    return words


@torch.no_grad()
def fidelity_features(vae, images):
    """Mean and spread over the picture of the encoder's tokens: [n, 3, H, W] -> [n, 2 * C].
    Blur shrinks the spread."""
    weight = next(vae.parameters())
    features = []
    for part in images.split(32):
        mean, _ = vae.encode(part.to(weight.device, weight.dtype))
        tokens = vae.to_tokens(mean).float()                        # [B, N, C]
        features.append(torch.cat([tokens.mean(1), tokens.std(1)], dim=1))
    return torch.cat(features)


def frechet_distance(a, b):
    """How far two sets of features, [n, d] and [m, d], are apart as wholes: 0 for equal ones.

    |mean a - mean b|^2 + tr(Ca + Cb - 2 (Ca Cb)^1/2), with C their covariances. In fp64: the square
    root of a nearly singular matrix loses half its digits.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)                   # [d, d]
    means_apart = (a.mean(0) - b.mean(0)).square().sum()

    # Ca Cb has the eigenvalues of Ca^1/2 Cb Ca^1/2, which is symmetric.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T         # Ca^1/2
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return (means_apart + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def token_diversity(tokens):
    """Root mean square distance between a prompt's pictures, of a token's channel: two draws differ
    by twice their variance. tokens [G, N, C], G at least 2"""
    return (2 * tokens.float().var(0, correction=1)).mean().sqrt().item()


@torch.no_grad()
def round_trip(vae, device, scenes=500, noise=0.0):
    """Share of drawn scenes that keep every fact after pixels -> tokens -> pixels.

    It is what a perfect denoiser would score; the autoencoder that we ship has at least 0.98.
    noise: of this standard deviation is added to every (unit-variance) token first: no denoiser is
    exact either.
    """
    dtype = next(vae.parameters()).dtype
    sizes = [size for area in AREAS for size in data.buckets(area)]
    passed = 0
    for i in tqdm(range(scenes), desc="round trip", leave=False):
        height, width = sizes[i % len(sizes)]
        scene, details, _ = sample_scene(ROUND_TRIP_SEED, 0, i, height, width)
        pixels = torch.from_numpy(np.array(draw(scene, height, width)))[None]     # [1, H, W, 3]

        latent, _ = vae.encode(to_images(pixels, device).to(dtype))
        tokens = vae.to_tokens(latent).float()                                    # [1, N, C]
        drawn = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(i))
        tokens = tokens + noise * drawn.to(device)

        latent = vae.to_latent(tokens, (height // 16, width // 16)).to(dtype)
        image = to_pil(vae.decode(latent))[0]
        claims = facts(scene, details | {"color"})
        if all(check_facts(image, claims)):
            passed += 1
    return passed / scenes
