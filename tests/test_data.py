"""The toy world: its checker must be right, since every score in this project rests on it."""
import collections
import json
from pathlib import Path

import numpy as np
import pytest

import data
import sample

GOLDENS = Path(__file__).parent / "goldens"


def altered(scene, fact, rng, height, width):
    """The same scene with one thing changed so that `fact` no longer holds; None where no layout was found in 40 tries."""
    objects = list(scene.objects)
    mine = [i for i, o in enumerate(objects) if fact.subject[0] in (None, o.shape) and fact.subject[1] in (None, o.color)]
    i = int(rng.choice(mine)) if mine else 0
    if fact.kind == "background":
        return scene._replace(**dict(zip(("tone", "luminance", "slope", "texture"), data._background(rng, str(rng.choice([t for t in data.TONES if t != fact.value]))))))
    if fact.kind == "relation":                                                    # mirror the picture along the relation's axis
        across = data.RELATIONS[fact.value][0] != 0
        return scene._replace(objects=tuple(o._replace(x=1 - o.x, angle=-o.angle) if across else o._replace(y=1 - o.y) for o in objects))
    for _ in range(40):
        specs = [[o.shape, o.color, o.size, o.place] for o in objects]
        if fact.kind == "total" or (fact.kind == "count" and rng.random() < 0.3):
            specs = specs[:i] + specs[i + 1:] if len(specs) > 1 and rng.random() < 0.5 else specs + [specs[i][:3] + [None]]
        elif fact.kind == "count" and (fact.subject[1] is None or rng.random() < 0.5):
            specs[i][0] = str(rng.choice([s for s in data.SHAPES if s != specs[i][0]]))
        elif fact.kind == "count":
            specs[i][1] = str(rng.choice([c for c in data.COLORS if c != specs[i][1]]))
        elif fact.kind == "size":
            specs[i][2] = rng.uniform(*data.SIZE_RANGES["small" if fact.value == "large" else "large"])
        elif fact.kind == "place":
            i = next(k for k in mine if objects[k].place == fact.value)
            taken = {o.place for o in objects}
            specs[i][3] = str(rng.choice([p for row in data.PLACES for p in row if p not in taken]))
        placed = data._place(specs, None, rng, height, width)
        if placed:
            return scene._replace(objects=tuple(data._paint(spec, xy, rng) for spec, xy in zip(specs, placed)))
    return None


def score_checker(count, seed=0):
    """(share of drawn scenes that pass, share of altered ones that fail, how many were altered), over every training bucket."""
    sizes, passed, rejected, tried = [s for base in data.BUCKETS for s in data.BUCKETS[base]], 0, 0, 0
    for i in range(count):
        height, width = sizes[i % len(sizes)]
        scene, details, _ = data.sample(seed, 1, i, height, width)
        claims, rng = data.facts(scene, details), np.random.default_rng((seed, 2, i))
        passed += all(sample.check(data.draw(scene, height, width), claims))
        other = altered(scene, claims[rng.integers(len(claims))], rng, height, width)
        if other is not None:
            tried += 1
            rejected += not all(sample.check(data.draw(other, height, width), claims))
    return passed / count, rejected / tried, tried


def test_checker_passes_true_scenes_and_rejects_altered_ones():
    passed, rejected, tried = score_checker(2000, seed=5)
    assert passed >= 0.99
    assert rejected >= 0.99
    assert tried >= 1800                                       # most facts can be altered, or the second number says little


def test_checker_at_sizes_never_trained_on():
    for height, width in ((128, 160), data.bucket(96, "6:7"), data.bucket(180)):
        for i in range(40):
            scene, details, _ = data.sample(11, 0, i, height, width)
            assert all(sample.check(data.draw(scene, height, width), data.facts(scene, details)))


def test_each_kind_of_fact_is_rejected_when_it_alone_is_changed():
    seen = collections.Counter()
    for i in range(300):
        scene, details, _ = data.sample(6, 0, i, 128, 128)
        rng = np.random.default_rng(i)
        for fact in data.facts(scene, details):
            other = altered(scene, fact, rng, 128, 128)
            if other is not None:
                seen[fact.kind, sample.check(data.draw(other, 128, 128), [fact])[0]] += 1
    for kind in ("total", "count", "size", "place", "relation", "background"):
        assert seen[kind, False] > 30
        assert seen[kind, True] <= 0.01 * seen[kind, False], (kind, seen)


def test_a_blank_and_a_noisy_picture_have_no_objects():
    assert sample.look(np.full((96, 96, 3), 128, np.uint8))[0] == []
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3)).astype(np.uint8)
    scene, details, _ = data.sample(1, 0, 0, 96, 96)
    assert not all(sample.check(noise, data.facts(scene, details)))


def test_sample_is_a_function_of_its_arguments():
    one, two = data.sample(3, 1, 7, 96, 96), data.sample(3, 1, 7, 96, 96)
    assert one == two
    assert data.sample(3, 1, 8, 96, 96)[2] != one[2] or data.sample(3, 2, 7, 96, 96)[2] != one[2]
    assert (np.asarray(data.draw(one[0], 96, 96)) == np.asarray(data.draw(two[0], 96, 96))).all()


def test_captions_state_what_the_facts_claim():
    for i in range(400):
        scene, details, words = data.sample(8, 0, i, 96, 96)
        assert ("background" in words) == ("background" in details)
        for o in scene.objects:
            assert o.shape in words
            assert (o.color in words) == ("color" in details)
        if "relation" in details:
            assert data.relation_of(*scene.objects[:2]) in words
        if "size" in details:
            assert "small" in words or "large" in words
        assert len({"size", "place", "relation", "background"} & details) >= 2          # dense: no short captions


def test_labels_say_what_is_painted_in_each_cell():
    """Against pixels: painted alone on black, an object fills the cells with its labels by more than a seventh, and more than any other object does."""
    for i in range(20):
        height, width = data.BUCKETS[96][i % len(data.BUCKETS[96])]
        scene = data.random_scene(np.random.default_rng(i), height, width)
        found, grid = data.labels(scene, height, width), (height // 16, width // 16)
        plain = [scene._replace(objects=(o._replace(fill="plain"),), tone="black", luminance=(0.0, 0.0), texture="plain") for o in scene.objects]
        painted = [np.asarray(data.draw(s, height, width), float).max(2) for s in plain]
        shares = np.stack([[p[16 * r:16 * r + 16, 16 * c:16 * c + 16].mean() / p.max() for r in range(grid[0]) for c in range(grid[1])] for p in painted])
        for k, (share, (shape, color, x, y, size, angle)) in enumerate(zip(shares.T, found)):
            if abs(share.max() - 1 / 7) > 0.01:                                    # on the edge itself rounding decides
                assert (shape > 0) == (share.max() > 1 / 7)
            if shape:
                place = (x + k % grid[1] + 0.5) / grid[1], (y + k // grid[1] + 0.5) / grid[0]
                [mine] = [i for i, o in enumerate(scene.objects) if np.allclose((o.x, o.y), place, atol=1e-5)]
                obj = scene.objects[mine]
                assert share[mine] > share.max() - 0.01 and [obj.shape, obj.color] == [data.SHAPES[int(shape) - 1], list(data.COLORS)[int(color) - 1]]
                assert (size, angle) == pytest.approx((obj.size * (grid[0] * grid[1]) ** 0.5, obj.angle), abs=1e-5)
            else:
                assert not found[k].any()
        assert found[:, 0].any()


def test_brief_requests_state_only_what_the_task_is_about():
    for i in range(200):
        scene, details, words = sample.sampled(9, 0, i, 96, 96, style="brief")
        assert not {"size", "place", "background"} & details
        assert len(words.split()) <= 14
        assert all(sample.check(data.draw(scene, 96, 96), data.facts(scene, details)))


def test_buckets_are_the_checkpoints():
    golden = json.loads((GOLDENS / "buckets.json").read_text())
    for base, sizes in golden["inference_buckets_by_base_height_width"].items():
        assert {r: list(data.bucket(int(base), r)) for r in data.RATIOS} == sizes
    for base, sizes in golden["training_buckets_by_base"].items():
        assert sorted(data.bucket(int(base), r) for r in data.RATIOS) == sorted(map(tuple, sizes))
    for base, sizes in data.BUCKETS.items():
        for h, w in sizes:
            assert h % 16 == w % 16 == 0 and 0.45 <= h / w <= 2.2 and 0.7 <= h * w / base**2 <= 1.3
    for height, width in ((128, 160), data.bucket(96, "6:7"), data.bucket(180)):                # what generalisation is scored on
        assert not any((height, width) in sizes for sizes in data.BUCKETS.values())
    with pytest.raises(ValueError, match="W:H"):
        data.bucket(96, "wide")
