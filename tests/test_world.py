"""toy/world.py: scenes, their pictures, and words that say exactly what is meant."""
import math
import pickle

import numpy as np
import pytest
from PIL import Image

import toy.world
from data import buckets
from toy.world import (
    AREAS,
    COLORS,
    OBJECT_GAP,
    RELATION_GAP,
    RELATIONS,
    SHAPES,
    TASKS,
    Fact,
    Object,
    Scene,
    Spot,
    caption,
    coverage,
    details_for,
    draw,
    facts,
    grouped,
    listing,
    plural,
    random_scene,
    relation_of,
    request,
    sample_scene,
    satisfies,
    too_close,
)


def plain_object(shape="circle", color="red", size=0.11, x=0.5, y=0.5, angle=0.0):
    return Object(shape, color, size, x, y, angle, "plain", (0, 0, 0))


def plain_scene(*objects, task="two_object", tone="black"):
    return Scene(objects, tone, (0.1, 0.1), 0.0, "plain", task, 0)


# --- Scenes ---------------------------------------------------------------------------------------

def test_a_sample_is_a_function_of_its_arguments():
    one = sample_scene(3, 1, 7, 96, 96)
    two = sample_scene(3, 1, 7, 96, 96)
    assert one == two
    assert np.array_equal(draw(one[0], 96, 96), draw(two[0], 96, 96))

    words = {sample_scene(3, epoch, index, 96, 96)[2] for epoch in (1, 2) for index in (7, 8)}
    assert len(words) == 4


def test_the_order_of_random_draws_is_kept():
    """One sample, number by number, as the shipped weights were trained on it."""
    scene, details, words = sample_scene(3, 1, 7, 96, 128)
    (ring,) = scene.objects
    assert (ring.shape, ring.color, ring.fill) == ("ring", "red", "shaded")
    assert (ring.size, ring.x, ring.y) == pytest.approx((0.110223, 0.466859, 0.741050), abs=1e-6)
    assert ring.shade == pytest.approx((-2.238005, -1.488076, -1.739411), abs=1e-6)
    assert (scene.tone, scene.texture, scene.task) == ("white", "bands", "single_object")
    assert scene.luminance == pytest.approx((0.958760, 0.931079), abs=1e-6)
    assert scene.slope == pytest.approx(5.163341, abs=1e-6)
    assert scene.noise_seed == 804_898_553
    assert details == {"background", "place"}
    assert words == "a ring at the bottom. it is all on a white background"

    def words_of(index, task, style):
        return sample_scene(3, 1, index, 96, 128, task, style)[2]

    assert words_of(7, "counting", "brief") == "two red stars"
    assert words_of(7, "counting", "vague") == "a pair of scarlet stars"
    assert words_of(8, "position", "brief") == "a green circle to the left of a yellow star"
    assert words_of(8, "position", "vague") == "a green circle left of a lemon star"


def test_scenes_can_be_pickled_and_changed():
    """Worker processes hand them over."""
    scene, details, _ = sample_scene(0, 0, 0, 64, 64)
    assert pickle.loads(pickle.dumps(scene)) == scene
    assert pickle.loads(pickle.dumps(facts(scene, details))) == facts(scene, details)
    assert scene._replace(tone="none").objects == scene.objects


def test_objects_of_a_scene_have_room_and_stand_in_their_relation():
    sizes = [size for area in AREAS for size in buckets(area)]
    for i in range(300):
        height, width = sizes[i % len(sizes)]
        scene = random_scene(np.random.default_rng(i), height, width)
        spots = []
        for obj in scene.objects:
            reach = toy.world.REACH[obj.shape] * obj.size * math.sqrt(height * width)
            assert reach < obj.x * width < width - reach
            assert reach < obj.y * height < height - reach
            spots.append(Spot(obj.x, obj.y, reach))

        for k, spot in enumerate(spots):
            assert not any(too_close(spot, other, height, width) for other in spots[:k])
        if scene.task in ("two_object", "position", "color_attr", "mixed"):
            first, second = scene.objects[:2]
            apart = max(abs(first.x - second.x), abs(first.y - second.y))
            assert apart >= RELATION_GAP
            assert satisfies(relation_of(first, second), first, second)


def test_too_close_and_satisfies_by_hand():
    left, right = Spot(0.25, 0.5, 10), Spot(0.75, 0.5, 10)
    assert satisfies("to the left of", left, right)
    assert not satisfies("to the right of", left, right)
    assert not satisfies("above", left, right)

    # On 100 x 100 the centres are 50 pixels apart, the circles 30, and the gap asked for is 5.
    assert not too_close(left, right, 100, 100)
    assert not too_close(left, right._replace(reach=39 - 100 * OBJECT_GAP), 100, 100)
    assert too_close(left, right._replace(reach=41 - 100 * OBJECT_GAP), 100, 100)
    assert too_close(left, left._replace(x=0.01, reach=0), 100, 100)        # in the same ninth


def test_tasks_are_what_their_names_say():
    for i in range(100):
        count, kinds, sizes = {}, {}, {}
        for task in (*TASKS, "mixed"):
            scene = random_scene(np.random.default_rng(i), 96, 96, task)
            assert scene.task == task
            count[task] = len(scene.objects)
            kinds[task] = len({(obj.shape, obj.color) for obj in scene.objects})
            sizes[task] = len({obj.size_word for obj in scene.objects})

        assert count["single_object"] == count["colors"] == 1
        assert 2 <= count["counting"] <= 4
        assert kinds["counting"] == sizes["counting"] == 1
        for task in ("two_object", "position", "color_attr"):
            assert count[task] == kinds[task] == 2
        assert count["mixed"] == kinds["mixed"] == 3


def test_odds_say_how_often_shapes_are_drawn():
    odds = [0, 0, 0, 0.8, 0.2, 0]
    drawn = [random_scene(np.random.default_rng(i), 64, 64, "single_object", odds).objects[0].shape
             for i in range(200)]
    assert set(drawn) == {"star", "cross"}
    assert 140 < drawn.count("star") < 180


# --- Pictures -------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES)
def test_an_object_covers_the_area_of_a_circle_of_its_size(shape):
    height, width = 96, 128
    obj = plain_object(shape, size=0.15, angle=0.2)
    area = math.pi * obj.size**2 * height * width
    assert coverage(obj, height, width).sum() == pytest.approx(area, rel=0.02)


def test_a_picture_is_as_the_scene_says():
    scene = plain_scene(plain_object("square", "blue", size=0.15, x=0.25, y=0.7))
    picture = np.asarray(draw(scene, 64, 128))
    assert picture.shape == (64, 128, 3)
    assert picture[45, 32].tolist() == list(COLORS["blue"])
    assert picture[10, 100].tolist() == [26, 26, 26]                # 0.1 of 255, rounded


def test_a_scene_looks_alike_at_every_size():
    for i in range(20):
        scene = random_scene(np.random.default_rng(i), 64, 96)
        small = np.asarray(draw(scene, 64, 96), float)
        large = np.asarray(draw(scene, 128, 192).reduce(2), float)
        assert np.abs(small - large).mean() < 3


def test_hues_are_far_apart():
    hues = sorted(Image.new("RGB", (1, 1), rgb).convert("HSV").getpixel((0, 0))[0] * 360 / 255
                  for rgb in COLORS.values())
    gaps = np.diff([*hues, hues[0] + 360])
    assert gaps.min() > 23


# --- Words ----------------------------------------------------------------------------------------

def test_captions_state_what_the_facts_claim():
    for i in range(400):
        scene, details, words = sample_scene(8, 0, i, 96, 96)
        assert ("background" in words) == ("background" in details)
        for obj in scene.objects:
            assert obj.shape in words
            assert (obj.color in words) == ("color" in details)
        if "relation" in details:
            assert relation_of(*scene.objects[:2]) in words
        if "size" in details:
            assert "small" in words or "large" in words
        # Dense: no short captions.
        assert len({"size", "place", "relation", "background"} & details) >= 2


def test_brief_requests_state_only_what_the_task_is_about():
    for i in range(200):
        _, details, words = sample_scene(9, 0, i, 96, 96, style="brief")
        assert not {"size", "place", "background"} & details
        assert len(words.split()) <= 14


def test_vague_requests_use_words_that_captions_never_use():
    vague = {word for words in toy.world.VAGUE.values() for word in words} - {"three", "four"}
    dense_words = " ".join(sample_scene(4, 0, i, 64, 64)[2] for i in range(300)).split()
    single_words = {word for word in vague if " " not in word}
    assert not single_words & set(dense_words)

    briefs = [sample_scene(4, 0, i, 64, 64, style="brief") for i in range(100)]
    vagues = [sample_scene(4, 0, i, 64, 64, style="vague") for i in range(100)]
    assert [brief[:2] for brief in briefs] == [vague[:2] for vague in vagues]
    different = sum(brief[2] != vague[2] for brief, vague in zip(briefs, vagues))
    assert different > 70


def test_facts_of_a_pair():
    circle = plain_object("circle", "red", size=0.11, x=0.2, y=0.2)
    ring = plain_object("ring", "blue", size=0.16, x=0.8, y=0.3)
    scene = plain_scene(circle, ring, task="position")
    everything = {"color", "size", "place", "relation", "background"}

    one, two = ("circle", "red"), ("ring", "blue")
    assert facts(scene, everything) == [
        Fact("total", (None, None), 2),
        Fact("count", one, 1),
        Fact("size", one, "small"),
        Fact("place", one, "at the top left"),
        Fact("count", two, 1),
        Fact("size", two, "large"),
        Fact("place", two, "at the top right"),
        Fact("relation", one, "to the left of", two),
        Fact("background", (None, None), "black"),
    ]
    assert facts(scene, {"relation"}) == [
        Fact("total", (None, None), 2),
        Fact("count", ("circle", None), 1),
        Fact("count", ("ring", None), 1),
        Fact("relation", ("circle", None), "to the left of", ("ring", None)),
    ]


def test_objects_alike_in_all_that_is_stated_are_named_together():
    red = plain_object("star", "red", x=0.2)
    blue = plain_object("star", "blue", x=0.8)
    scene = plain_scene(red, blue)
    assert [group.members for group in grouped(scene, {"color"})] == [[red], [blue]]
    assert [group.members for group in grouped(scene, set())] == [[red, blue]]
    assert request(scene, {"color"}, np.random.default_rng(0)) == "a red star and a blue star"
    assert request(scene, set(), np.random.default_rng(0)) == "two stars"


def test_every_wording_of_a_caption_is_used():
    circle = plain_object("circle", "orange", x=0.2, y=0.2)
    cross = plain_object("cross", "blue", x=0.8, y=0.2)
    scene = plain_scene(circle, cross, task="position")

    def captions(*details):
        return {caption(scene, set(details), np.random.default_rng(i)) for i in range(300)}

    pair = "an orange circle to the left of a blue cross"
    openings = ("", "a picture of ", "an image of ", "there is ")
    assert captions("color", "relation") == {opening + pair for opening in openings}

    grounds = captions("relation", "background")
    endings = {words.split("cross", 1)[1] for words in grounds}
    assert endings == {" on a black background", " against a black background",
                       ". the background is black"}

    placed = captions("place", "relation")
    assert any("a circle to the left of a cross. the circle is at the top left" in words
               for words in placed)
    assert any(words.startswith("a circle in the top left corner and a cross at the top right. "
                                "the circle is to the left of the cross") for words in placed)


def test_small_words():
    assert [plural(noun) for noun in ("circle", "cross")] == ["circles", "crosses"]
    assert listing(["a"]) == "a"
    assert listing(["a", "b", "c"]) == "a, b and c"
    near, far = plain_object(x=0.3, y=0.4), plain_object(x=0.6, y=0.9)
    assert relation_of(near, far) == "above"
    assert relation_of(far, near) == "below"
    assert relation_of(near, far._replace(x=0.9)) == "to the left of"
    assert set(RELATIONS) == {"above", "below", "to the left of", "to the right of"}


def test_dense_details_by_task():
    seen = {task: set() for task in TASKS}
    for i in range(400):
        task = TASKS[i % len(TASKS)]
        rng = np.random.default_rng(i)
        scene = random_scene(rng, 96, 96, task)
        seen[task] |= details_for(scene, rng)
    for task in ("single_object", "counting", "colors"):
        assert "relation" not in seen[task]
    for task in ("single_object", "two_object"):
        assert "color" not in seen[task]
    for task in ("colors", "position", "color_attr"):
        assert "color" in seen[task]


# --- The command ----------------------------------------------------------------------------------

def test_the_command_writes_a_sheet_and_captions(tmp_path, capsys):
    toy.world.main(["--out", str(tmp_path / "sheet.png")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 24
    assert lines[7] == "2.2  " + sample_scene(0, 0, 7, 128, 128)[2]

    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (6 * 132 - 4, 4 * 132 - 4)
    second = np.asarray(sheet.crop((132, 0, 132 + 128, 128)))
    assert np.array_equal(second, draw(sample_scene(0, 0, 1, 128, 128)[0], 128, 128))
