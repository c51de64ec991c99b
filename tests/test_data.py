"""The toy world: its checker must be right, since every score in this project rests on it."""
import collections
import json
from pathlib import Path

import numpy as np
import pytest

import data

GOLDENS = Path(__file__).parent / "goldens"


def test_checker_passes_true_scenes_and_rejects_altered_ones():
    passed, rejected, tried = data.score_checker(2000, seed=5)
    assert passed >= 0.99
    assert rejected >= 0.99
    assert tried >= 1800                                       # most facts can be altered, or the second number says little


def test_checker_at_sizes_never_trained_on():
    for height, width in ((128, 160), data.bucket(96, "6:7"), data.bucket(180)):
        for i in range(40):
            scene, details, _ = data.sample(11, 0, i, height, width)
            assert all(data.check(data.draw(scene, height, width), data.facts(scene, details)))


def test_each_kind_of_fact_is_rejected_when_it_alone_is_changed():
    seen = collections.Counter()
    for i in range(300):
        scene, details, _ = data.sample(6, 0, i, 128, 128)
        rng = np.random.default_rng(i)
        for fact in data.facts(scene, details):
            other = data.altered(scene, fact, rng, 128, 128)
            if other is not None:
                seen[fact.kind, data.check(data.draw(other, 128, 128), [fact])[0]] += 1
    for kind in ("total", "count", "size", "place", "relation", "background"):
        assert seen[kind, False] > 30
        assert seen[kind, True] <= 0.01 * seen[kind, False], (kind, seen)


def test_a_blank_and_a_noisy_picture_have_no_objects():
    assert data.look(np.full((96, 96, 3), 128, np.uint8))[0] == []
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3)).astype(np.uint8)
    scene, details, _ = data.sample(1, 0, 0, 96, 96)
    assert not all(data.check(noise, data.facts(scene, details)))


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


def test_brief_requests_state_only_what_the_task_is_about():
    for i in range(200):
        scene, details, words = data.sample(9, 0, i, 96, 96, style="brief")
        assert not {"size", "place", "background"} & details
        assert len(words.split()) <= 14
        assert all(data.check(data.draw(scene, 96, 96), data.facts(scene, details)))


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
