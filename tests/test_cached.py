"""data.py cache --text: features are the encoder's, a run learns the same from them, and never
from those of other weights."""
import hashlib
import json
import re
import shutil
import signal
import sys
import tarfile
from collections import namedtuple

import numpy as np
import pytest
import torch
from conftest import error_line, rows
from shards import encoded, make_tar

import data
import kit.features
import lens
import train
from kit.checkpoint import load_pipeline, load_text_encoder, read_denoiser_config
from kit.files import read_json, write_json
from toy.world import draw, sample_scene

NANO = lens.SIZES["nano"].transformer
SIZES = train.STAGES["nano", 2].sizes()


@pytest.fixture(scope="module", autouse=True)
def keep_sigterm():
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def write_pictures(path, count=10):
    """Drawn pictures that fill their buckets, so that no crop is drawn, with three captions each;
    the buckets take turns."""
    members = []
    for i in range(count):
        height, width = SIZES[(0, 4, 9)[i % 3]]
        scene, _, words = sample_scene(0, 0, i, height, width)
        captions = [words, f"number {i}", " ".join(words.split()[:4 + i % 2])]
        members.append((f"{i}.png", encoded(draw(scene, height, width))))
        members.append((f"{i}.json", json.dumps({"captions": captions}).encode()))
    make_tar(path, members)


def cache(pattern, weights, out, *flags):
    data.main(["cache", "--data", str(pattern), "--bases", "64,96", "--weights", str(weights),
               "--out", str(out), *flags])


def train_nano(out, pattern, *flags):
    train.main(["--size", "nano", "--stage", "2", "--device", "cpu", "--steps", "4",
                "--batch", "4,2", "--workers", "0", "--out", str(out), "--data", str(pattern),
                *flags])


@pytest.fixture(scope="module")
def shards(nano, tmp_path_factory):
    """The folder of a tar of pictures, and `cached`, the same encoded by the nano pipeline."""
    folder = tmp_path_factory.mktemp("shards")
    write_pictures(folder / "a.tar")
    cache(folder / "a.tar", nano, folder / "cached", "--text")
    return folder


# --- What is stored -------------------------------------------------------------------------------

def test_each_caption_has_the_features_of_the_encoder(shards, nano, pipeline):
    _, vae, encoder = pipeline
    key = data.text_key(nano, NANO.selected_layer_index)
    plain = data.Shards(shards / "a.tar", SIZES)
    cached = data.Shards(shards / "cached", SIZES, text_key=key)
    assert len(cached.rows) == len(plain.rows) == 10
    assert (cached.buckets == plain.buckets).all()
    assert (cached.lengths == plain.lengths).all()

    chosen = set()
    for i in range(10):
        parts = cached.parts(i)
        captions, notes = data.captions_and_notes(parts)
        assert captions == data.captions_and_notes(plain.parts(i))[0]
        for k, caption in enumerate(captions):
            (expected,) = encoder.encode_each([caption])
            bits = torch.from_numpy(cached.features(i, parts, notes, k).copy())
            assert torch.equal(bits.view(torch.bfloat16), expected.bfloat16())

        # Each epoch shows the caption that it would without the cache.
        size = cached.sizes[cached.buckets[i]]
        for epoch in range(3):
            bits, caption, features = cached.sample(i, size, epoch)
            picture, its_caption, nothing = plain.sample(i, size, epoch)
            assert caption == its_caption
            assert nothing is None
            (expected,) = encoder.encode_each([caption])
            assert features.shape == expected.shape
            chosen.add(captions.index(caption))
            expected = data.encode_picture(vae, torch.tensor(picture), "cpu")
            assert bits.tobytes() == data.bits_of(expected)
    assert chosen == {0, 1, 2}


def test_shards_have_the_digest_that_they_had(shards):
    """The index knows more now; a run that began before goes on all the same."""
    found = data.Shards(shards / "a.tar", SIZES)
    columns = ("shard", "picture_offset", "picture_bytes", "json_offset", "json_bytes",
               "txt_offset", "txt_bytes", "height", "width")
    table = np.stack([found.rows[name] for name in columns], 1)
    assert table.dtype == np.int64
    before = hashlib.sha256(b'["a.tar"]' + table.tobytes()).hexdigest()[:16]
    assert found.digest == before


def test_features_are_the_same_alone_and_padded():
    features = [torch.randn(2, length, 3).bfloat16() for length in (4, 1, 3)]
    text, mask = data.padded(features)
    assert mask.sum(1).tolist() == [4, 1, 3]
    for i, own in enumerate(features):
        for k in range(2):
            assert torch.equal(text[k][i][mask[i]], own[k].float())
            assert not text[k][i][~mask[i]].any()


def test_samples_without_a_caption_are_left_out(nano, tmp_path, capsys):
    members = []
    for i, captions in enumerate(["one", "", "two"]):
        scene, _, _ = sample_scene(0, 0, i, 64, 64)
        members.append((f"{i}.png", encoded(draw(scene, 64, 64))))
        members.append((f"{i}.txt", captions.encode()))
    make_tar(tmp_path / "a.tar", members)
    cache(tmp_path / "a.tar", nano, tmp_path / "out", "--text")
    assert "left out: a.tar, sample 1: no caption" in capsys.readouterr().err
    assert data.cached_inputs(tmp_path / "out").layers == NANO.selected_layer_index
    assert len(data.Shards(tmp_path / "out", SIZES).rows) == 2


def test_the_layers_are_those_that_the_encoders_width_tells(copied):
    """A folder of parts alone, as toy.language writes it, once was taken for the released one's,
    whose 24th block no small encoder has."""
    shutil.rmtree(copied / "transformer")
    index = read_json(copied / "model_index.json")
    del index["transformer"]
    write_json(copied / "model_index.json", index)
    assert load_text_encoder(copied).layers == NANO.selected_layer_index


# --- Room on the disk -----------------------------------------------------------------------------

def test_the_size_is_told_before_and_is_exact(shards, nano, tmp_path, capsys):
    cache(shards / "a.tar", nano, tmp_path, "--text")
    said = capsys.readouterr().out
    assert re.search(r"^10 pictures: .* of latents; 30 captions: .* of prompt features; .* free",
                     said, re.M)
    stored = {".latent": 0, ".features": 0}
    with tarfile.open(tmp_path / "a.tar") as tar:
        for member in tar:
            ending = f".{member.name.partition('.')[2]}"
            stored[ending] = stored.get(ending, 0) + member.size
    assert f"10 pictures: {data.in_bytes(stored['.latent'])} of latents" in said
    assert f"30 captions: {data.in_bytes(stored['.features'])} of prompt features" in said


def test_a_disk_without_room_is_found_out_before_the_work(
        shards, nano, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: usage(100_000))
    monkeypatch.setattr(data, "encode_picture", lambda *_: pytest.fail("encoded"))
    command = ["cache", "--data", str(shards / "a.tar"), "--bases", "64,96", "--weights", str(nano),
               "--out", str(tmp_path / "out"), "--text"]
    error = error_line(data.main, command, capsys)
    assert "no room for" in error
    assert "97.7 KiB are free" in error
    assert not list((tmp_path / "out").glob("*.tar"))


# --- Fresh and stale ------------------------------------------------------------------------------

def test_what_is_fresh_is_kept(nano, tmp_path, capsys):
    out = tmp_path / "out"
    for name in "ab":
        write_pictures(tmp_path / f"{name}.tar", 2)
    cache(tmp_path / "a.tar", nano, out, "--text")

    def fresh(*flags):
        capsys.readouterr()
        cache(tmp_path, nano, out, *flags)
        said = capsys.readouterr().out
        return int(re.search(r"encoded now, (\d) were there already", said)[1])

    assert fresh("--text") == 1                    # as after a kill between the two
    assert fresh("--text") == 2
    assert fresh() == 0                            # latents alone, as asked for
    assert fresh("--text") == 0


def test_another_encoder_is_another_key(nano, copied, monkeypatch):
    layers = NANO.selected_layer_index
    keys = {data.text_key(nano, layers), data.text_key(copied, layers)}
    assert len(keys) == 1                          # wherever the files lie
    keys.add(data.text_key(copied, layers[::-1]))
    with monkeypatch.context() as patch:
        patch.setattr(lens, "DATE", "2027-01-01")
        keys.add(data.text_key(copied, layers))
    with monkeypatch.context() as patch:
        patch.setitem(lens.CHAT, "gpt_oss", ("head", "tail"))
        keys.add(data.text_key(copied, layers))
    tokenizer = copied / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    keys.add(data.text_key(copied, layers))
    spoil(copied / "text_encoder" / "model.safetensors")
    keys.add(data.text_key(copied, layers))
    assert len(keys) == 6


def spoil(file):
    """Another last byte: other weights under the same header."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


# --- Training -------------------------------------------------------------------------------------

@pytest.mark.parametrize("lora", [0, 4])
def test_a_run_is_the_same_with_and_without_the_cache(
        lora, shards, copied, steady, tmp_path, monkeypatch, capsys):
    """And needs no transformers, nor the folder of the parts, which is not there any more."""
    flags = ["--lora", str(lora), "--init", str(tmp_path / "denoiser")] if lora else []
    (tmp_path / "denoiser").mkdir()
    (copied / "transformer").rename(tmp_path / "denoiser" / "transformer")
    index = read_json(copied / "model_index.json")
    del index["transformer"]
    write_json(copied / "model_index.json", index)
    train_nano(tmp_path / "plain", shards / "a.tar", "--parts", str(copied), "--preview-every", "0",
               *flags)

    shutil.rmtree(copied)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(data, "load_pipeline", lambda *_: pytest.fail("parts were loaded"))
    capsys.readouterr()
    train_nano(tmp_path / "cached", shards / "cached" / "*.tar", "--preview-every", "2",
               "--eval-every", "2", *flags)
    said = capsys.readouterr().out
    assert len([line for line in said.splitlines() if "no previews" in line]) == 1
    assert not list((tmp_path / "cached").glob("preview*"))

    plain, cached = rows(tmp_path / "plain"), rows(tmp_path / "cached")
    assert len(plain) == len(cached) == 4
    assert len({row["loss"] for row in plain}) == 4
    for one, other in zip(plain, cached):
        for name in ("loss", "grad_norm", "loss_by_t", "size"):
            assert one[name] == other[name], name


@pytest.mark.parametrize("changed, words", [
    ("text_encoder/model.safetensors", "prompt features of another text encoder"),
    ("vae/diffusion_pytorch_model.safetensors", "latents of another autoencoder"),
    ("tokenizer/tokenizer.json", "prompt features of another text encoder"),
])
@pytest.mark.parametrize("flag", ["--parts", "--init"])
def test_inputs_of_other_weights_are_refused(
        changed, words, flag, shards, copied, steady, tmp_path, capsys):
    """Whether they are named as parts, or are where the denoiser comes from."""
    file = copied / changed
    if file.suffix == ".json":
        file.write_text(file.read_text() + "\n")
    else:
        spoil(file)
    command = ["--size", "nano", "--stage", "2", "--device", "cpu", "--steps", "4", "--workers",
               "0", "--out", str(tmp_path / "run"), "--data", str(shards / "cached"), flag,
               str(copied)]
    assert f"--data holds {words}" in error_line(train.main, command, capsys)


def test_inputs_of_another_size_are_refused(shards, tmp_path, capsys):
    command = ["--size", "toy", "--device", "cpu", "--out", str(tmp_path / "run"),
               "--data", str(shards / "cached")]
    assert "are not what size toy works with" in error_line(train.main, command, capsys)


def test_some_with_features_and_some_without_are_refused(shards, nano, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    shutil.copy(shards / "cached" / "a.tar", mixed / "a.tar")
    write_pictures(tmp_path / "b.tar", 4)
    cache(tmp_path / "b.tar", nano, mixed / "other")
    (mixed / "other" / "b.tar").rename(mixed / "b.tar")
    with pytest.raises(data.LensError, match="4 of 14 samples hold no prompt features, the first "
                                             "of them in b.tar, the others do"):
        data.cached_inputs(mixed)

    # Latents beside pictures too: they once were a traceback in the middle of an epoch.
    (mixed / "a.tar").unlink()
    shutil.copy(shards / "a.tar", mixed / "c.tar")
    assert data.cached_inputs(mixed) is None
    with pytest.raises(data.LensError, match="10 of 14 samples hold no latents"):
        data.ShardSource(mixed, SIZES, 0, None, None, "cpu", 0, None, say=lambda message: None)


def test_shards_of_two_encoders_are_refused(shards, copied, tmp_path):
    """Even where nothing is there to compare with."""
    both = tmp_path / "both"
    both.mkdir()
    shutil.copy(shards / "cached" / "a.tar", both / "a.tar")
    spoil(copied / "text_encoder" / "model.safetensors")
    write_pictures(tmp_path / "b.tar", 3)
    cache(tmp_path / "b.tar", copied, both / "other", "--text")
    (both / "other" / "b.tar").rename(both / "b.tar")

    cached = data.cached_inputs(both)
    mixture = data.Shards(both, SIZES, vae_hash=cached.vae_hash, text_key=cached.text_key)
    mixture.sample(0, mixture.sizes[mixture.buckets[0]], 0)
    with pytest.raises(data.LensError, match="b.tar holds prompt features of another"):
        mixture.sample(10, mixture.sizes[mixture.buckets[10]], 0)


def test_a_whole_checkpoint_finds_the_parts_that_its_inputs_were_cached_by(
        shards, nano, steady, tmp_path):
    train_nano(tmp_path / "run", shards / "cached")
    _, vae, encoder = load_pipeline(tmp_path / "run", parts=("vae", "text_encoder"))
    assert encoder.layers == NANO.selected_layer_index
    assert data.vae_identity(tmp_path / "run") == data.vae_identity(nano)


def test_the_key_of_the_prompt_cache_is_as_before(nano):
    """sample.py's: features of prompts that are kept at home stay good."""
    folder, dtype = nano, torch.float32
    layers = read_denoiser_config(folder).selected_layer_index
    assert kit.features.feature_key(folder, dtype, lens.DATE) == kit.features.feature_key(
        folder, dtype, lens.DATE, layers)
    assert np.array_equal(layers, (0, 1))
