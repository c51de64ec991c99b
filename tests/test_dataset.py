"""toy/dataset.py: labels against pixels, their loss, and the world that is encoded and kept."""
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import lens
from kit.checkpoint import load_pipeline
from kit.files import LensError, open_safetensors, read_json, write_safetensors
from kit.images import from_pil
from kit.run import Run
from toy import dataset
from toy import labels as toy_labels
from toy.world import COLORS, SHAPES, draw, random_scene


@dataclass(frozen=True)
class Stage:
    """What World reads of train.Stage."""
    areas: tuple = (64, 96)
    scenes: tuple = (64, 32)
    shape_odds: tuple = (0.11, 0.12, 0.12, 0.37, 0.17, 0.11)
    square: bool = False

    def sizes_of(self, area):
        return [(area, area)] if self.square else data.buckets(area)


@pytest.fixture
def models(parts):
    """(autoencoder, text encoder) of size nano, loaded anew for each test."""
    _, vae, encoder = load_pipeline(parts, parts=("vae", "text_encoder"))
    encoder.layers = lens.SIZES["nano"].transformer.selected_layer_index
    return vae, encoder


EVERY = np.arange(64 + 32)                         # scene of Stage


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder beside runs, in which the world of Stage is kept once a test has drawn it."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def world(models, shared):
    vae, encoder = models
    world = dataset.World(Stage(), 0, vae, encoder, shared, "cpu")
    assert world.prepare(EVERY)
    return world


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
    labels = toy_labels.labels(scene, height, width)
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
    shapes, colors, _ = toy_labels.label_sizes()
    img = torch.randn(2, 6, 32)
    labels = torch.zeros(2, 6, 6)
    labels[..., 0] = torch.arange(6)               # the first token has no object
    labels[..., 2:] = 0.5

    # The pose costs 4 times 0.5 where there is an object: at 5 tokens of 6.
    ignorant = toy_labels.label_head(32)
    expected = np.log(shapes) + np.log(colors) + 2 * 5 / 6
    expected = torch.full((2,), expected)
    assert torch.allclose(toy_labels.label_loss(ignorant, img, labels), expected)

    def wise(img):
        shape = 50.0 * F.one_hot(labels[..., 0].long(), shapes)
        color = 50.0 * F.one_hot(labels[..., 1].long(), colors)
        return torch.cat([shape, color, labels[..., 2:]], dim=-1)

    assert toy_labels.label_loss(wise, img, labels).max() < 1e-6


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
    for epoch in (0, 1):
        lengths = world.lengths(epoch)
        planned = planned_of(world, epoch)
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
    assert torch.equal(batch.labels[0], torch.from_numpy(toy_labels.labels(scene, *size)))
    assert batch.mask.all()
    assert len(batch.text) == len(features)
    for kept, layer in zip(batch.text, features):
        assert torch.allclose(kept, layer.bfloat16().float(), rtol=0.02, atol=0.02)


def planned_of(world, epoch=0):
    """An epoch of it in batches of three."""
    sizes = range(len(world.sizes))
    return data.plan(world.buckets, world.lengths(epoch), {b: 3 for b in sizes}, 0, epoch)


def assert_same_batches(one, two, planned):
    for a, b in zip(one.stream(planned), two.stream(planned), strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.mask, b.mask)
        assert all(torch.equal(x, y) for x, y in zip(a.text, b.text, strict=True))


@torch.no_grad()
def encode_whole(stage, seed, vae, encoder):
    """{size: (tokens, labels, text, lengths)} and words, as a world was once made as a whole: by an
    area and its sizes, 64 scenes at once."""
    world, words = {}, set()
    for area, count in zip(stage.areas, stage.scenes):
        sizes = stage.sizes_of(area)
        for k, size in enumerate(sizes):
            numbers = range(count)[k::len(sizes)]
            for begin in range(0, len(numbers), 64):
                scenes, captions = [], []
                for i in numbers[begin:begin + 64]:
                    rng = np.random.default_rng((seed, area, i))
                    scenes.append(random_scene(rng, *size, odds=stage.shape_odds))
                    captions += dataset.captions_of(scenes[-1], rng)
                words |= dataset.words_of(captions)
                features = encoder.encode_each(captions)
                text = [f.transpose(0, 1).flatten(1).bfloat16() for f in features]
                images = from_pil([draw(scene, *size) for scene in scenes])
                means = [vae.encode(few)[0] for few in images.split(4)]
                world.setdefault(size, []).append((
                    vae.to_tokens(torch.cat(means)).bfloat16(),
                    torch.from_numpy(np.stack([toy_labels.labels(s, *size) for s in scenes])),
                    torch.cat(text), torch.tensor([len(rows) for rows in text])))
    parts = {size: [torch.cat(column) for column in zip(*chunks)] for size, chunks in world.items()}
    return parts, sorted(words)


def test_a_whole_world_is_to_the_bit_what_it_was_when_it_was_made_at_once(
        models, tmp_path, monkeypatch):
    """Of 70 squares, so that there is a second chunk, and of many sizes."""
    vae, encoder = models
    monkeypatch.setattr(dataset, "usable_cores", lambda: 0)           # sums in the same order
    squares = Stage(areas=(64,), scenes=(70,), square=True)
    for stage in (squares, Stage()):
        parts, words = encode_whole(stage, 0, vae, encoder)
        world = dataset.World(stage, 0, vae, encoder, tmp_path, "cpu")
        assert world.words == words
        assert world.sizes == sorted(parts)
        assert world.prepare(np.arange(sum(stage.scenes)))
        for bucket, size in enumerate(world.sizes):
            tokens, labels, text, lengths = parts[size]
            samples = np.flatnonzero(world.buckets == bucket)
            assert len(samples) == len(tokens)
            by_scene = lengths.view(-1, dataset.CAPTIONS)
            assert (world.caption_lengths[samples] == by_scene.numpy()).all()

            offsets = F.pad(lengths.cumsum(0), (1, 0))
            for epoch in (0, 1):
                (batch,) = world.stream([data.PlannedBatch(bucket, samples, epoch)])
                assert torch.equal(batch.tokens, tokens.float())
                assert torch.equal(batch.labels, labels)
                for row, n in enumerate(samples):
                    c = dataset.CAPTIONS * row + dataset.caption_shown(n, epoch)
                    features = torch.cat(batch.text, dim=-1)[row, :lengths[c]]
                    assert torch.equal(features, text[offsets[c]:offsets[c + 1]].float())


def remade(stage, seed, vae, encoder, shared):
    """Whether World would draw a scene anew, instead of taking what the folder keeps."""
    world = dataset.World(stage, seed, vae, encoder, shared, "cpu")
    world.prepare(np.array([0]), stopped=lambda: True)
    return len(world.missing(np.array([0]))) == 1


def test_a_world_that_fits_is_read_and_is_the_same(world, models, shared):
    vae, encoder = models
    encoder.encode(["a red circle", "two stars on the left"])  # using it changes nothing
    assert not remade(Stage(), 0, vae, encoder, shared)
    again = dataset.World(Stage(), 0, vae, encoder, shared, "cpu")
    assert again.prepare(EVERY, stopped=lambda: True)
    assert again.sizes == world.sizes
    assert again.words == world.words
    assert_same_batches(world, again, planned_of(world))


def test_only_what_is_asked_for_is_drawn_and_said(models, tmp_path):
    vae, encoder = models
    said = []
    world = dataset.World(Stage(), 0, vae, encoder, tmp_path, "cpu", said.append)
    assert not world.folder.exists()
    planned = planned_of(world)[:2]
    samples = np.concatenate([batch.samples for batch in planned])
    assert world.prepare(samples)
    assert sorted(EVERY[world.piece_of >= 0]) == sorted(samples)
    first, last = said
    count = len(samples)
    assert first == f"drawing {count} scenes, which are kept in {world.folder}"
    assert last.startswith(f"{count} of 96 scenes are drawn and kept in {world.folder}, ")
    assert "MB" in last
    assert read_json(world.folder / "key.json")["scenes"] == [64, 32]

    assert world.prepare(samples[::-1])
    assert len(said) == 2                          # nothing more to draw
    with pytest.raises(LensError, match="prepare"):
        next(world.stream(planned_of(world)[2:]))


def test_rank_zero_draws_and_the_others_read_the_same(models, tmp_path, monkeypatch):
    vae, encoder = models
    said = []
    zero = dataset.World(Stage(), 0, vae, encoder, tmp_path, "cpu")
    one = dataset.World(Stage(), 0, vae, encoder, tmp_path, "cpu", said.append)
    planned = planned_of(zero)[:3]

    # Where rank 0 was told to stop, the others do not go on in its place.
    monkeypatch.setattr(data, "same_everywhere", lambda ready: False)
    assert not data.prepare(Run(tmp_path, rank=1, ranks=2), one, planned, lambda: False)
    assert not data.prepare(Run(tmp_path, rank=0, ranks=2), zero, planned, lambda: True)
    assert not said
    assert len(zero.missing(EVERY)) == 96

    monkeypatch.setattr(data, "same_everywhere", lambda ready: ready)
    assert data.prepare(Run(tmp_path, rank=0, ranks=2), zero, planned, lambda: False)
    assert data.prepare(Run(tmp_path, rank=1, ranks=2), one, planned, lambda: False)
    assert not said
    assert_same_batches(zero, one, planned)


def stop_after(chunks):
    """A `stopped` that turns true once so many chunks are drawn."""
    asked = iter([False] * chunks)
    return lambda: next(asked, True)


def test_a_stop_in_the_middle_keeps_what_was_drawn_and_the_rest_comes_to_the_bit(
        world, models, tmp_path):
    vae, encoder = models
    said = []
    halves = dataset.World(Stage(), 0, vae, encoder, tmp_path, "cpu", said.append)
    assert not halves.prepare(EVERY, stop_after(5))
    count = 96 - len(halves.missing(EVERY))
    assert len(list(halves.folder.glob("*.safetensors"))) == 5
    assert said[-1] == (f"stopped: {count} of 96 scenes are drawn and kept in {halves.folder}; the "
                        "same command goes on")

    said.clear()
    halves = dataset.World(Stage(), 0, vae, encoder, tmp_path, "cpu", said.append)
    assert halves.prepare(EVERY)
    assert said[0].startswith(f"drawing {96 - count} scenes")
    assert_same_batches(world, halves, planned_of(world))


def test_ctrl_c_keeps_what_was_drawn(models, tmp_path):
    vae, encoder = models
    asked = iter([False, False])

    def interrupt():
        if next(asked, None) is None:
            raise KeyboardInterrupt
        return False

    world = dataset.World(Stage(), 0, vae, encoder, tmp_path, "cpu")
    with pytest.raises(KeyboardInterrupt):
        world.prepare(EVERY, interrupt)
    again = dataset.World(Stage(), 0, vae, encoder, tmp_path, "cpu")
    again.prepare(EVERY, stopped=lambda: True)
    assert len(again.pieces) == 2


def tear(path):
    path.write_bytes(path.read_bytes()[:-7])


def empty(path):
    path.write_bytes(b"")


def of_another_key(path):
    piece = dataset.read_piece(path, read_key(path))
    dataset.write_piece(path, "another", piece)


def without_labels(path):
    key = read_key(path)
    piece = dataset.read_piece(path, key)._asdict()
    write_safetensors(path, {"numbers": piece["numbers"]}, {"key": key})


def read_key(path):
    with open_safetensors(path) as f:
        return f.metadata()["key"]


@pytest.mark.parametrize("spoil", [tear, empty, of_another_key, without_labels])
def test_a_piece_that_is_spoiled_is_drawn_again(world, models, tmp_path, spoil):
    vae, encoder = models
    shutil.copytree(world.folder, tmp_path / world.folder.name)
    pieces = sorted((tmp_path / world.folder.name).glob("*.safetensors"))
    spoil(pieces[3])
    said = []
    again = dataset.World(Stage(), 0, vae, encoder, tmp_path, "cpu", said.append)
    assert again.prepare(EVERY)
    assert said[0].startswith("drawing ")
    assert 0 < int(said[0].split()[1]) < 20
    assert sorted(again.folder.glob("*.safetensors")) == pieces
    assert_same_batches(world, again, planned_of(world))


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
def test_other_models_do_not_meet_the_kept_world(world, models, shared, change):
    """Once the key knew the seed, the stage and a sum of the autoencoder's statistics only: an
    encoder that was trained again silently met its predecessor's features."""
    vae, encoder = models
    change(vae, encoder)
    assert remade(Stage(), 0, vae, encoder, shared)


def test_another_stage_or_seed_does_not_meet_the_kept_world(world, models, shared):
    vae, encoder = models
    assert remade(Stage(), 1, vae, encoder, shared)
    for stage in (replace(Stage(), scenes=(64, 33)), replace(Stage(), shape_odds=None)):
        assert remade(stage, 0, vae, encoder, shared)
