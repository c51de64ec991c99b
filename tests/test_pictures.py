"""toy/pictures.py, and both parts of the toy trained on pictures and captions of one's own."""
import json
import re

import numpy as np
import pytest
import torch
from conftest import (
    error_line,
    killed_after_saving,
    killed_after_steps,
    rows,
    untimed_rows,
)
from shards import encoded, make_tar, photo

import data
import sample
import train
from kit.checkpoint import load_text_encoder, load_vae
from kit.files import LensError, open_safetensors, read_json
from kit.places import notes_in
from kit.tars import words_of
from toy import autoencoder, language, pictures

BATCH = {64: 3, 96: 2}
CAPTIONS = [
    ["a brown owl, bird, night", "Owl"],
    ["ice-cream cone, dessert, sweet"],
    ["five o'clock, clock, time"],
    ["grüne Ampel, Verkehr"],
    ["a man, who is tall. he waves"],
    ["sailboat"],
    ["crescent moon, sky, night"],
    ["rolling on the floor laughing, face, smile"],
]
WIDTHS = (64, 64, 64, 96, 64, 96, 64, 70)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """With two, sums may come in either order on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_shard(path, captions=CAPTIONS):
    members = []
    for i, own in enumerate(captions):
        members.append((f"{i}.png", encoded(photo(i, WIDTHS[i], 64))))
        members.append((f"{i}.json", json.dumps({"captions": own}).encode()))
    make_tar(path, members)
    return str(path)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return write_shard(tmp_path_factory.mktemp("shards") / "a.tar")


# --- Pictures -------------------------------------------------------------------------------------

def samples_of(planned):
    return sorted(int(i) for batch in planned for i in batch.samples)


def test_an_epoch_is_every_picture_but_those_kept_aside(shard):
    source = pictures.Pictures(shard, seed=3, batch=BATCH)
    (aside,) = source.aside
    for number in (0, 1):
        assert samples_of(source.epoch(number)) == sorted(set(range(8)) - {aside})
    others = [pictures.Pictures(shard, seed, BATCH).aside[0] for seed in range(8)]
    assert len(set(others)) > 1
    assert pictures.Pictures(shard, 3, BATCH).aside[0] == aside

    ((pixels, covering),) = source.kept_aside(12)
    assert covering is None
    size = source.shards.sizes[source.shards.buckets[aside]]
    assert pixels.shape == (1, *size, 3)


def test_batches_go_on_where_they_were_left(shard):
    source = pictures.Pictures(shard, seed=0, batch=BATCH)
    epoch = len(source.epoch(0))
    planned = source.planned(0)
    first = [next(planned) for _ in range(3 * epoch)]
    later = source.planned(epoch + 1)
    for batch in first[epoch + 1:]:
        other = next(later)
        assert (batch.bucket, batch.epoch) == (other.bucket, other.epoch)
        assert (batch.samples == other.samples).all()
    assert [batch.epoch for batch in first] == [0] * epoch + [1] * epoch + [2] * epoch

    pixels, _ = next(source.batches(epoch + 1))
    assert (pixels.numpy() == source.shards[first[epoch + 1]].pixels).all()


def test_latents_are_no_pictures(tmp_path):
    members = [("0.latent", b"0" * 64),
               ("0.json", json.dumps({"captions": ["x"], "height": 64, "width": 64}).encode())]
    make_tar(tmp_path / "a.tar", members)
    with pytest.raises(LensError, match="latents, from which no autoencoder learns"):
        pictures.Pictures(tmp_path / "a.tar", 0, BATCH)


# --- Captions -------------------------------------------------------------------------------------

def test_captions_and_their_forms_take_turns():
    own = ["a, b, c", "one alone"]
    rng = np.random.default_rng(0)
    told = [pictures.caption_in_turn(own, turn, rng) for turn in range(6)]
    assert told[0] == "a, b, c"
    assert sorted(told[2].split(", ")) == ["a", "b", "c"]
    assert told[4] in ("a", "b", "c")
    assert told[1] == told[3] == told[5] == "one alone"

    # Any order comes, and any part.
    orders = {pictures.caption_in_turn(["a, b, c"], 1, rng) for _ in range(60)}
    assert len(orders) == 6
    assert {pictures.caption_in_turn(["a, b, c"], 5, rng) for _ in range(40)} == {"a", "b", "c"}


def test_sentences_are_not_taken_apart():
    assert pictures.parts_of("a man, who is tall. he waves") == ["a man, who is tall. he waves"]
    assert pictures.parts_of("cat,, face ,") == ["cat", "face"]


def test_every_caption_is_read_and_those_missing_are_counted(tmp_path):
    pattern = write_shard(tmp_path / "a.tar", [["a", "b"], [], ["c"]])
    assert pictures.read_captions(pattern) == ([["a", "b"], ["c"]], 1)


def test_packing_keeps_every_caption_of_a_picture(tmp_path):
    for i, own in enumerate(CAPTIONS[:2]):
        photo(i, 400, 400).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.json").write_text(json.dumps({"captions": own}))
    data.main(["pack", "--images", str(tmp_path), "--out", str(tmp_path / "shards")])
    shards = data.Shards(tmp_path / "shards" / "*.tar", [(64, 64)])
    assert [words_of(shards.parts(i))[0] for i in range(2)] == CAPTIONS[:2]


def test_the_tokenizer_knows_the_words_of_the_captions():
    tokenizer = language.own_tokenizer(CAPTIONS)
    told = [caption for own in CAPTIONS for caption in own]
    assert language.remark_on_captions(told, tokenizer) == ""
    assert {"owl", "clock", "grüne", "laughing"} <= language.words_read(tokenizer)
    assert "crimson" not in language.words_read(tokenizer)
    ids = tokenizer("a brown owl, bird", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5
    for sentence in (*language.fixed_sentences(), *language.SPECIAL):
        assert len(tokenizer(sentence, add_special_tokens=False)["input_ids"]) == 1


def test_an_epoch_of_exercises_has_every_picture_once():
    own = [[f"picture {i}"] for i in range(5)]
    told = [language.own_exercise(own, seed=1, number=k) for k in range(10)]
    shown = [re.match(r"picture (\d)", learned)[1] for _, learned in told]
    assert sorted(shown[:5]) == sorted(shown[5:]) == list("01234")
    assert shown[:5] != shown[5:]
    given, learned = told[0]
    assert given.endswith("<|message|>")
    assert "assistant" in learned
    assert language.own_exercise(own, seed=1, number=0) == told[0]

    tokenizer = language.own_tokenizer(own)
    ids, labels, mask = language.Sentences(tokenizer, seed=1, batch=4, captions=own)[1]
    assert f"picture {shown[4]}" in tokenizer.decode(ids[0][mask[0].bool()])
    assert "developer" not in tokenizer.decode(labels[0][labels[0] != language.NO_LOSS])


def test_a_long_caption_is_cut_and_markers_are_left_out():
    own = [["word " * 2000 + "<|end|>"], ["a <|<|end|>end|>cat"]]
    ids, labels, _ = language.Sentences(language.own_tokenizer(own), 0, 2, own)[0]
    assert ids.shape == labels.shape == (2, 512)
    texts = [language.own_exercise(own, seed=0, number=k)[1] for k in range(2)]
    assert sorted(text.split("<|end|>")[0] for text in texts)[0] == "a cat"


# --- What the autoencoder's report says -----------------------------------------------------------

def test_the_signal_to_noise_ratio_is_the_usual_one():
    images = torch.zeros(2, 3, 16, 16)
    decoded = images + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    assert autoencoder.psnr(decoded, images).tolist() == pytest.approx([20, 40], abs=1e-3)
    # What is too bright to be shown is white: no error there.
    assert autoencoder.psnr(images + 3, images + 0.8).tolist() == pytest.approx([20, 20], abs=1e-3)


def test_a_saturated_pixel_of_ones_own_counts_once():
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    loss = autoencoder.reconstruction_loss(red + 0.2, red, saturated=1)
    assert loss.item() == pytest.approx(0.2 + 6 * 0.04, rel=1e-5)
    assert autoencoder.Settings().saturated == 7
    assert autoencoder.Settings(data="1234").saturated == 1


# --- Runs -----------------------------------------------------------------------------------------

NANO = ["--size", "nano", "--dtype", "fp32"]


def weights(folder):
    with open_safetensors(folder / "vae" / "diffusion_pytorch_model.safetensors") as f:
        return {name: f.get_tensor(name) for name in f.keys()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_the_autoencoder_learns_from_pictures_and_resumes_bit_for_bit(
        shard, tmp_path, monkeypatch, capsys):
    command = [*NANO, "--data", shard, "--steps", "10", "--save-every", "5",
               "--preview-every", "4"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    autoencoder.main(["--out", str(whole), *command])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == ("8 pictures, of which 1 are kept aside; they have no labels, so there is no "
                       "semantic term and no probe")
    ratio, = re.findall(r"^encoded and decoded, 1 of .* kept aside have a PSNR of (\S+) dB, and "
                        r"some that were learnt \S+ dB; .*preview.png", "\n".join(said), re.M)
    assert said[-1] == f"next: python -m toy.language --out {whole} --data {shard} --size nano"

    log = rows(whole / "vae")
    assert set(log[0]) >= {"loss", "reconstruction", "kl"}
    assert "semantic" not in log[0]
    assert np.mean([row["loss"] for row in log[7:10]]) < np.mean([row["loss"] for row in log[:3]])
    notes = notes_in(whole / "vae" / "diffusion_pytorch_model.safetensors")
    assert float(notes["psnr"]) == log[-1]["psnr"] == pytest.approx(float(ratio), abs=0.06)
    assert float(notes["psnr_learnt"]) == log[-1]["psnr_learnt"]
    assert "probe" not in notes
    assert (whole / "vae" / "preview_000004.png").exists()
    assert (whole / "vae" / "preview.png").exists()

    with killed_after_saving(monkeypatch, autoencoder):
        autoencoder.main(["--out", str(halves), *command])
    autoencoder.main(["--out", str(halves), *command])
    assert "resuming at step 5" in capsys.readouterr().out
    assert_same(weights(whole), weights(halves))
    assert untimed_rows(whole / "vae") == untimed_rows(halves / "vae")

    # The statistics are those of the pictures that were learnt, whose tokens are then standard.
    model = load_vae(whole, "cpu", torch.float32)
    source = pictures.Pictures(shard, 0, autoencoder.BATCH)
    with torch.no_grad():
        tokens = [model.to_tokens(model.encode(autoencoder.to_images(pixels))[0]).flatten(0, 1)
                  for pixels, _ in source.load(source.epoch(0))]
    assert torch.cat(tokens).mean(0).abs().max() < 1e-3

    message = error_line(autoencoder.main, ["--out", str(whole), *NANO, "--steps", "10"], capsys)
    assert "another run" in message
    assert "--data" in message


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(language, "BATCH", 4)


def test_the_text_encoder_learns_from_captions_and_resumes_bit_for_bit(
        shard, tmp_path, small_steps, monkeypatch, capsys):
    command = ["--size", "nano", "--device", "cpu", "--data", shard, "--steps", "4",
               "--save-every", "2"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    language.main([*command, "--out", str(whole)])
    said = capsys.readouterr().out
    assert "9 captions of 8 pictures (0 have none);" in said
    assert "the reasoner is left out" in said
    assert re.search(r"^\d+ tokens; 0 words of the captions are none of them", said, re.M)
    assert said.endswith(f"next: python -m toy.autoencoder --out {whole} --data {shard} "
                         "--size nano\n")

    with killed_after_steps(monkeypatch, language, 3):
        language.main([*command, "--out", str(halves)])
    language.main([*command, "--out", str(halves)])
    assert "resuming at step 2" in capsys.readouterr().out
    encoders = [load_text_encoder(folder, "cpu") for folder in (whole, halves)]
    assert_same(*(encoder.model.state_dict() for encoder in encoders))

    # It says of itself that it is no reasoner, and sample.py --reason asks.
    assert read_json(whole / "text_encoder" / "config.json")["captions_only"]
    with pytest.raises(LensError, match="has read captions alone and cannot rewrite"):
        sample.make_reasoner({"words": "[]"}, encoders[0])

    other = error_line(language.main, ["--size", "nano", "--out", str(whole)], capsys)
    assert "another run" in other
    assert "--data" in other


def test_the_shipped_text_encoder_can_rewrite():
    assert language.can_rewrite(load_text_encoder(sample.TOY, "cpu"))


def test_hints_keep_the_data(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(LensError, match=r"make it with `python -m toy.language --out .* --data"):
        train.check_both_parts(tmp_path, "toy", "shards/*.tar")
    command = data.training_command("latents/*.tar", "toy", tmp_path)
    assert "--init" not in command
    assert command.endswith(f"--out {command.split()[-1]}")


# --- Mistakes -------------------------------------------------------------------------------------

@pytest.mark.parametrize("main", [autoencoder.main, language.main])
def test_shards_that_are_not_there_are_one_line(main, tmp_path, capsys):
    flags = ["--out", str(tmp_path / "out"), "--data", str(tmp_path / "*.tar")]
    assert "no file matches" in error_line(main, flags, capsys)
    assert not (tmp_path / "out").exists()


def test_a_semantic_term_of_pictures_is_one_line(shard, tmp_path, capsys):
    flags = ["--out", str(tmp_path), "--data", shard, "--semantic", "0.1"]
    assert "--semantic is for drawn scenes" in error_line(autoencoder.main, flags, capsys)


def test_too_few_pictures_are_one_line(tmp_path, capsys):
    few = write_shard(tmp_path / "a.tar", CAPTIONS[:3])
    flags = ["--out", str(tmp_path / "out"), "--data", few]
    assert "3 of 4 pictures that it takes" in error_line(autoencoder.main, flags, capsys)


def test_captions_that_are_missing_are_one_line(tmp_path, capsys):
    silent = write_shard(tmp_path / "a.tar", [[], [""]])
    flags = ["--out", str(tmp_path / "out"), "--data", silent]
    assert "not one of 2 pictures has a caption" in error_line(language.main, flags, capsys)
