"""toy/autoencoder.py: its batches, its loss, and that a run that was killed goes on unharmed."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, error_line, killed_after_saving, rows, untimed_rows
from torch import nn

from kit.checkpoint import load_vae
from kit.files import open_safetensors, read_json
from kit.images import to_images
from kit.state import newest_state
from lens import SIZES
from toy import autoencoder
from toy.labels import label_head, label_loss, labels
from toy.world import random_scene
from vae import LensVAE

NANO = ["--size", "nano", "--dtype", "fp32", "--report", "10", "--preview-every", "1000"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a busy machine two threads wait for each other at every tiny layer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(folder):
    with open_safetensors(folder / "vae" / "diffusion_pytorch_model.safetensors") as f:
        return {name: f.get_tensor(name) for name in f.keys()}


def same_weights(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# --- Batches --------------------------------------------------------------------------------------

def test_batches_depend_on_seed_and_index_alone():
    images, covering = autoencoder.make_batch(0, 5, (64, 96), 3)
    again, covering_again = autoencoder.make_batch(0, 5, (64, 96), 3)
    other, _ = autoencoder.make_batch(0, 6, (64, 96), 3)
    assert torch.equal(images, again)
    assert torch.equal(covering, covering_again)
    scene = random_scene(np.random.default_rng((0, 5, 0)), 64, 96)
    assert torch.equal(covering[0], torch.from_numpy(labels(scene, 64, 96)))
    assert not torch.equal(images, other)


# --- Loss -----------------------------------------------------------------------------------------

def test_the_kl_term_is_that_of_two_normal_distributions():
    mean, logvar = torch.tensor([0.5, -2.0]), torch.tensor([0.0, -1.0])
    unit = torch.distributions.Normal(0.0, 1.0)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, unit).mean()
    assert torch.allclose(autoencoder.kl_loss(mean, logvar), expected)


def test_reconstruction_is_zero_for_the_true_picture_and_saturated_pixels_count_seven_times():
    torch.manual_seed(0)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    assert autoencoder.reconstruction_loss(images, images) == 0

    # A grey picture that is 0.2 too bright everywhere: 0.2 and twice its square, and twice that
    # square from either coarser picture. A red one, also if it is decoded as grey: seven times the
    # first part.
    grey = torch.zeros(1, 3, 32, 32)
    loss = autoencoder.reconstruction_loss(grey + 0.2, grey)
    assert loss.item() == pytest.approx(0.2 + 6 * 0.04, rel=1e-5)
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    loss = autoencoder.reconstruction_loss(red + 0.2, red)
    assert loss.item() == pytest.approx(7 * (0.2 + 2 * 0.04) + 4 * 0.04, rel=1e-5)
    loss = autoencoder.reconstruction_loss(grey, red)          # each number is off by 1
    assert loss.item() == pytest.approx(7 * (1 + 2) + 4, rel=1e-5)


@torch.no_grad()
def test_statistics_make_tokens_standard():
    torch.manual_seed(0)
    model = autoencoder.initialise(LensVAE(SIZES["nano"].vae))
    autoencoder.set_statistics(model, 7, 8, "cpu")
    tokens = []
    for i in range(8):                             # posterior samples, of the same scenes
        pixels, _ = autoencoder.make_batch(7, i)
        mean, logvar = model.encode(to_images(pixels))
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        tokens.append(model.to_tokens(z).flatten(0, 1))
    tokens = torch.cat(tokens)
    assert tokens.mean(0).abs().max() < 0.2
    assert (tokens.std(0) - 1).abs().max() < 0.2


def test_the_semantic_term_reads_tokens_through_noise():
    """Without noise it is the labels' loss; how large latents are makes no difference to it."""
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 2, 8, 4, 6, generator=generator)         # two of [2, 8, 4, 6]
    z = z / z.std((0, 2, 3), keepdim=True)
    head = label_head(32)
    nn.init.normal_(head.weight, generator=generator)
    covering = torch.from_numpy(labels(random_scene(np.random.default_rng(0), 32, 48), 32, 48))
    covering = covering.expand(2, 6, 6)

    def loss(z, t):
        return autoencoder.semantic_loss(head, z, covering, noise, torch.full((2,), t))

    def loss_of(z):
        tokens = F.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2)
        return label_loss(head, tokens, covering).mean()

    assert torch.allclose(loss(z, 0.0), loss_of(z))
    assert torch.allclose(loss(z, 0.25), loss_of(0.75 * z + 0.25 * noise))
    assert torch.allclose(loss(5 * z, 0.25), loss(z, 0.25))


def test_the_latent_is_decoded_through_noise(monkeypatch):
    """A quarter of each channel's spread, whatever the posterior's own noise is."""
    vae = LensVAE(SIZES["nano"].vae)
    pixels, _ = autoencoder.make_batch(0, 0, (32, 48), 2)
    mean, logvar = vae.encode(to_images(pixels))
    draws = autoencoder.draw_step(0, 7, mean.shape)
    seen = []
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z: seen.append(z) or decode(z))
    autoencoder.losses(vae, None, pixels, None, draws, semantic=0, kl=0.02)

    z = mean + (0.5 * logvar).exp() * draws.posterior
    spread = z.std((0, 2, 3), keepdim=True)
    assert torch.allclose(seen[0], z + 0.25 * spread * draws.decoder, atol=1e-5)
    assert (spread > 0).all()


# --- Runs -----------------------------------------------------------------------------------------

def test_training_lowers_the_loss_and_resumes_bit_for_bit(tmp_path, monkeypatch, capsys):
    command = [*NANO, "--steps", "12", "--save-every", "6"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    autoencoder.main(["--out", str(whole), *command])
    said = capsys.readouterr()
    assert "the autoencoder trains for 12 steps in all" in said.out
    assert "linear probe" in said.out
    assert said.out.splitlines()[-1] == f"next: python -m toy.language --out {whole} --size nano"
    for bar in ("statistics", "probe: scenes", "probe: the Linear"):
        assert bar in said.err
    log = rows(whole / "vae")
    losses = [row["loss"] for row in log[:12]]
    assert [row["step"] for row in log] == [*range(1, 13), 12]
    assert np.mean(losses[8:]) < np.mean(losses[:3])
    assert set(log[-1]["probe"]) == {"shape", "colour", "pose"}
    assert (whole / "vae" / "curves.svg").exists()
    assert (whole / "vae" / "preview.png").exists()

    with killed_after_saving(monkeypatch, autoencoder):
        autoencoder.main(["--out", str(halves), *command])
    autoencoder.main(["--out", str(halves), *command])         # the same command again
    assert "resuming at step 6" in capsys.readouterr().out
    assert same_weights(weights(whole), weights(halves))
    assert untimed_rows(whole / "vae") == untimed_rows(halves / "vae")


def test_what_is_saved_loads_with_its_story(tmp_path, capsys):
    autoencoder.main(["--out", str(tmp_path), *NANO, "--steps", "2"])
    stored = weights(tmp_path)
    model = load_vae(tmp_path, "cpu", torch.float32)
    assert same_weights(dict(model.state_dict()), stored)
    assert read_json(tmp_path / "vae" / "config.json")["_class_name"] == "AutoencoderKLFlux2"
    with open_safetensors(tmp_path / "vae" / "diffusion_pytorch_model.safetensors") as f:
        notes = f.metadata()
    assert {"command", "seed", "steps", "minutes", "semantic", "probe"} <= set(notes)
    assert notes["command"].startswith("python -m toy.autoencoder --out ")

    # A finished run that is started again is left as it is.
    log = rows(tmp_path / "vae")
    autoencoder.main(["--out", str(tmp_path), *NANO, "--steps", "2"])
    assert "was finished at step 2" in capsys.readouterr().out
    assert same_weights(weights(tmp_path), stored)
    assert rows(tmp_path / "vae") == log


def test_a_run_without_the_semantic_term_resumes_too(tmp_path):
    """Its head learns nothing and has no moments: none may be asked of the saved state."""
    command = [*NANO, "--semantic", "0"]
    autoencoder.main(["--out", str(tmp_path / "whole"), *command, "--steps", "4"])
    # Two runs of other lengths have other learning rates: so only that it goes on.
    autoencoder.main(["--out", str(tmp_path / "parts"), *command, "--steps", "2"])
    autoencoder.main(["--out", str(tmp_path / "parts"), *command, "--steps", "4"])
    log = rows(tmp_path / "parts" / "vae")
    steps = [row["step"] for row in log if "loss" in row]
    assert steps == [1, 2, 3, 4]
    assert all("semantic" not in row for row in log)
    assert rows(tmp_path / "whole" / "vae")[0]["loss"] == log[0]["loss"]


def test_another_run_in_the_same_folder_is_refused(tmp_path, capsys):
    autoencoder.main(["--out", str(tmp_path), *NANO, "--steps", "1"])
    for name, value in (("--seed", "1"), ("--kl", "0.01"), ("--semantic", "0"), ("--size", "toy")):
        argv = ["--out", str(tmp_path), *NANO, "--steps", "2", name, value]
        assert name in error_line(autoencoder.main, argv, capsys)


def test_sigterm_saves_and_ends_well(tmp_path, monkeypatch, capsys):
    command = ["--out", str(tmp_path), *NANO, "--steps", "6"]
    train_step = autoencoder.train_step

    def notified(run, settings, learner, batch, step, done):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return train_step(run, settings, learner, batch, step, done)

    monkeypatch.setattr(autoencoder, "train_step", notified)
    autoencoder.main(command)
    assert "stopped at step 3" in capsys.readouterr().out
    assert newest_state(tmp_path / "vae").name == "state-00000003"
    assert not (tmp_path / "model_index.json").exists()        # it is not finished

    monkeypatch.setattr(autoencoder, "train_step", train_step)
    autoencoder.main(command)
    assert "resuming at step 3" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path / "vae")] == [1, 2, 3, 4, 5, 6, 6]


def test_sigterm_to_the_whole_group_leaves_the_drawing_process_alone(tmp_path):
    """As a cluster sends it: were the drawing process to die of it, the trainer would crash."""
    command = [sys.executable, "-m", "toy.autoencoder", "--out", str(tmp_path), *NANO,
               "--steps", "100000"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "vae" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (log.exists() and log.stat().st_size > 0):
            time.sleep(0.1)
        os.killpg(running.pid, signal.SIGTERM)
        said, complaint = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 0, complaint
    assert "stopped at step" in said
    assert newest_state(tmp_path / "vae") is not None


# --- The command line -----------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, words", [
    (["--out", "x", "--size", "huge"], "unknown size"),
    (["--out", "x", "--steps", "0"], "--steps"),
    (["--out", "x", "--minutes", "-1"], "--minutes"),
    (["--out", "x", "--steps", "1", "--minutes", "1"], "not allowed"),
    (["--out", "/proc/nothing"], "/proc/nothing"),
    (["--check", "/nowhere"], "there is no option --check"),
    ([], "--out"),
])
def test_errors_are_one_line(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert words in error_line(autoencoder.main, arguments, capsys)


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as ended:
        autoencoder.main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "--semantic" in said
    assert "python -m toy.autoencoder --out" in said
