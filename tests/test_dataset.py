"""toy/dataset.py: labels against pixels, their loss, and the world that is encoded and kept."""
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import lens
from kit.checkpoint import load_pipeline
from kit.images import from_pil
from toy import dataset
from toy.world import COLORS, SHAPES, draw, random_scene


@dataclass(frozen=True)
class Stage:
    """What World reads of train.Stage."""
    areas: tuple = (64, 96)
    scenes: tuple = (64, 32)
    shape_odds: tuple = (0.11, 0.12, 0.12, 0.37, 0.17, 0.11)

    def sizes_of(self, area):
        return data.buckets(area)


@pytest.fixture
def models(parts):
    """(autoencoder, text encoder) of size nano, loaded anew for each test."""
    _, vae, encoder = load_pipeline(parts, parts=("vae", "text_encoder"))
    encoder.layers = lens.SIZES["nano"].transformer.selected_layer_index
    return vae, encoder


@pytest.fixture(scope="module")
def world_file(tmp_path_factory):
    return tmp_path_factory.mktemp("world") / "world.safetensors"


@pytest.fixture
def world(models, world_file):
    vae, encoder = models
    return dataset.World(Stage(), 0, vae, encoder, world_file, "cpu")


# --- Labels ---------------------------------------------------------------------------------------

def shares_of_cells(obj, scene, height, width):
    """[h*w] how much of each cell the object fills, by pixels: painted alone on black."""
    alone = scene._replace(objects=(obj._replace(fill="plain"),), tone="black",
                           luminance=(0.0, 0.0), texture="plain")
    painted = np.asarray(draw(alone, height, width), float).max(2)
    shares = []
    for row in range(height // 16):
        for column in range(width // 16):
            cell = painted[16 * row:16 * row + 16, 16 * column:16 * column + 16]
            shares.append(cell.mean() / painted.max())
    return np.array(shares)


@pytest.mark.parametrize("i", range(20))
def test_labels_say_what_is_painted_in_each_cell(i):
    """An object fills the cells with its labels by more than a seventh, and more than others do."""
    sizes = data.buckets(96)
    height, width = sizes[i % len(sizes)]
    h, w = height // 16, width // 16
    scene = random_scene(np.random.default_rng(i), height, width)
    shares = np.stack([shares_of_cells(obj, scene, height, width) for obj in scene.objects])
    labels = dataset.labels(scene, height, width)
    assert labels.dtype == np.float32
    assert labels[:, 0].any()

    for k, (shape, color, x, y, size, angle) in enumerate(labels):
        largest = shares[:, k].max()
        if abs(largest - 1 / 7) > 0.01:            # on the edge itself rounding decides
            assert (shape > 0) == (largest > 1 / 7)
        if not shape:
            assert not labels[k].any()
            continue

        row, column = divmod(k, w)
        centre = (x + column + 0.5) / w, (y + row + 0.5) / h
        meant = [j for j, obj in enumerate(scene.objects)
                 if np.allclose((obj.x, obj.y), centre, atol=1e-5)]
        assert len(meant) == 1
        obj = scene.objects[meant[0]]
        assert shares[meant[0], k] > largest - 0.01
        assert SHAPES[int(shape) - 1] == obj.shape
        assert list(COLORS)[int(color) - 1] == obj.color
        assert size == pytest.approx(obj.size * (h * w) ** 0.5, abs=1e-5)
        assert angle == pytest.approx(obj.angle, abs=1e-5)


def test_the_loss_of_labels_is_what_ignorance_costs_and_zero_for_who_knows():
    shapes, colors, _ = dataset.label_sizes()
    img = torch.randn(2, 6, 32)
    labels = torch.zeros(2, 6, 6)
    labels[..., 0] = torch.arange(6)               # the first token has no object
    labels[..., 2:] = 0.5

    # The pose costs 4 times 0.5 where there is an object: at 5 tokens of 6.
    ignorant = dataset.label_head(32)
    expected = np.log(shapes) + np.log(colors) + 2 * 5 / 6
    expected = torch.full((2,), expected)
    assert torch.allclose(dataset.label_loss(ignorant, img, labels), expected)

    def wise(img):
        shape = 50.0 * F.one_hot(labels[..., 0].long(), shapes)
        color = 50.0 * F.one_hot(labels[..., 1].long(), colors)
        return torch.cat([shape, color, labels[..., 2:]], dim=-1)

    assert dataset.label_loss(wise, img, labels).max() < 1e-6


def test_some_captions_of_a_relation_state_the_relation_alone():
    brief, total = 0, 0
    for i in range(300):
        rng = np.random.default_rng(i)
        scene = random_scene(rng, 96, 96, task="position")
        captions = dataset.captions_of(scene, rng)
        assert len(captions) == dataset.CAPTIONS
        # Dense ones state two of size, place, relation and background, so they are longer.
        brief += sum(len(words.split()) <= 11 and "." not in words for words in captions)
        total += len(captions)
    assert 0.15 < brief / total < 0.40


# --- The world ------------------------------------------------------------------------------------

def test_the_world_keeps_each_caption_as_long_as_it_is(world):
    """What the plan sorts by is what the batch then holds; a scene's two captions take turns."""
    sizes = range(len(world.sizes))
    for epoch in (0, 1):
        lengths = world.lengths(epoch)
        planned = data.plan(world.buckets, lengths, {b: 3 for b in sizes}, 0, epoch)
        met = np.concatenate([samples for _, samples, _ in planned])
        assert sorted(met) == list(range(64 + 32))

        for (bucket, samples, _), batch in zip(planned, world.stream(planned)):
            height, width = world.sizes[bucket]
            tokens = height * width // 256
            assert batch.samples is samples
            assert batch.epoch == epoch
            assert batch.grid == (height // 16, width // 16)
            assert batch.tokens.shape[:2] == (len(samples), tokens)
            assert batch.labels.shape == (len(samples), tokens, 6)
            assert batch.mask.sum(1).tolist() == lengths[samples].tolist()
            longest = lengths[samples].max()
            assert all(layer.shape[1] == longest for layer in batch.text)
            assert not batch.faults
    assert (world.lengths(0) != world.lengths(1)).any()
    assert (world.lengths(0) == world.lengths(2)).all()


def test_the_kept_world_is_what_the_frozen_models_say(world, models):
    """Scene i of an area is a function of (seed, area, i): drawn again here, encoded one by one."""
    vae, encoder = models
    sizes = data.buckets(64)
    size = sizes[2]
    bucket = world.sizes.index(size)
    number = world.first[bucket] + 3               # the fourth of its size: the area's scene i
    i = 2 + 3 * len(sizes)
    epoch = 1 - number % 2                         # which shows its second caption
    batch = next(world.stream([(bucket, np.array([number]), epoch)]))

    rng = np.random.default_rng((0, 64, i))
    scene = random_scene(rng, *size, odds=Stage().shape_odds)
    _, second = dataset.captions_of(scene, rng)
    features, _ = encoder.encode([second])
    with torch.no_grad():
        mean, _ = vae.encode(from_pil([draw(scene, *size)]))
    expected = vae.to_tokens(mean).bfloat16().float()
    assert torch.allclose(batch.tokens, expected, atol=0.02)
    assert torch.equal(batch.labels[0], torch.from_numpy(dataset.labels(scene, *size)))
    assert batch.mask.all()
    assert len(batch.text) == len(features)
    for kept, layer in zip(batch.text, features):
        assert torch.allclose(kept, layer.bfloat16().float(), rtol=0.02, atol=0.02)


def remade(monkeypatch, stage, seed, vae, encoder, path):
    """Whether World would encode anew, instead of taking what the file keeps."""
    class Anew(Exception):
        pass

    def encode_world(*_):
        raise Anew

    monkeypatch.setattr(dataset, "encode_world", encode_world)
    try:
        dataset.World(stage, seed, vae, encoder, path, "cpu")
    except Anew:
        return True
    return False


def test_a_world_that_fits_is_read_and_is_the_same(world, models, world_file, monkeypatch):
    vae, encoder = models
    encoder.encode(["a red circle", "two stars on the left"])  # using it changes nothing
    assert not remade(monkeypatch, Stage(), 0, vae, encoder, world_file)
    again = dataset.World(Stage(), 0, vae, encoder, world_file, "cpu")
    assert again.sizes == world.sizes
    assert again.words == world.words
    for one, two in zip(world.kept, again.kept):
        assert all(torch.equal(a, b) for a, b in zip(one, two))


def train_text_encoder(vae, encoder):
    with torch.no_grad():
        next(encoder.model.parameters()).view(-1)[0] += 0.01


def train_autoencoder(vae, encoder):
    """The statistics stay as they are: a sum of them would not tell."""
    with torch.no_grad():
        vae.encoder.conv_in.weight.view(-1)[0] += 0.01


def change_layers(vae, encoder):
    encoder.layers = tuple(reversed(encoder.layers))


def change_date(vae, encoder):
    encoder.date = "2031-01-01"


def change_tokenizer(vae, encoder):
    encoder.tokenizer.add_tokens(["circle"])


@pytest.mark.parametrize("change", [
    train_text_encoder, train_autoencoder, change_layers, change_date, change_tokenizer])
def test_other_models_do_not_meet_the_kept_world(world, models, world_file, monkeypatch, change):
    """Once the key knew the seed, the stage and a sum of the autoencoder's statistics only: an
    encoder that was trained again silently met its predecessor's features."""
    vae, encoder = models
    change(vae, encoder)
    assert remade(monkeypatch, Stage(), 0, vae, encoder, world_file)


def test_another_stage_or_seed_does_not_meet_the_kept_world(world, models, world_file, monkeypatch):
    vae, encoder = models
    assert remade(monkeypatch, Stage(), 1, vae, encoder, world_file)
    for stage in (replace(Stage(), scenes=(64, 33)), replace(Stage(), shape_odds=None)):
        assert remade(monkeypatch, stage, 0, vae, encoder, world_file)
