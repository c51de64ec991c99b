"""vae.py against the reference's numbers (tests/goldens), its tokens, and its training command."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import vae

GOLDENS = Path(__file__).parent / "goldens"
NANO = ["--size", "nano", "--dtype", "fp32", "--report", "10", "--preview-every", "1000"]


@pytest.fixture(scope="module")
def golden():
    with safe_open(str(GOLDENS / "vae.safetensors"), "pt") as f:
        tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    model = vae.LensVAE(json.loads(meta["config"])).eval()
    model.load_state_dict({k[len("weights."):]: v for k, v in tensors.items() if k.startswith("weights.")})
    return model, tensors, tuple(json.loads(meta["latent_grid"]))


@pytest.fixture(scope="module", autouse=True)
def one_thread():                                             # on a busy machine two threads wait for each other at every tiny layer
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.no_grad()
def test_goldens(golden):
    model, t, grid = golden
    mean, logvar = model.encode(t["in.image"])
    assert relative(mean, t["out.encode_mean"]) < 1e-4
    assert relative(logvar, t["out.encode_logvar"]) < 1e-4
    assert relative(model.decode(t["in.latent"]), t["out.decode"]) < 1e-4
    assert relative(model.decode(model.to_latent(t["in.normalised_tokens"], grid)), t["out.decode_from_tokens"]) < 1e-4


@torch.no_grad()
def test_half_precision_and_channels_last(golden):
    model, t, grid = golden
    layout = vae.LensVAE(model.config).eval()
    layout.load_state_dict(model.state_dict())
    layout.to(memory_format=torch.channels_last)
    image = t["in.image"].contiguous(memory_format=torch.channels_last)
    assert relative(layout.encode(image)[0], t["out.encode_mean"]) < 1e-4
    layout.to(torch.bfloat16)
    assert relative(layout.encode(image.bfloat16())[0].float(), t["out.encode_mean"]) < 0.1
    tokens = t["in.normalised_tokens"].bfloat16()
    assert layout.to_latent(tokens, grid).dtype == torch.bfloat16
    assert relative(layout.decode(layout.to_latent(tokens, grid)).float(), t["out.decode_from_tokens"]) < 0.1


def test_full_size_is_the_released_layout():
    with torch.device("meta"):
        model = vae.LensVAE({"_class_name": "AutoencoderKLFlux2", "sample_size": 1024})      # unknown keys are ignored
    released = json.loads((GOLDENS / "checkpoint_tensors.json").read_text())["vae"]
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == released and len(released) == 251
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 84.0


@torch.no_grad()
def test_tokens_and_latent_are_inverse(golden):
    model, t, grid = golden
    latent = torch.randn(2, 8, 12, 8)
    tokens = model.to_tokens(latent)
    assert tokens.shape == (2, 24, 32) and relative(model.to_latent(tokens, grid), latent) < 1e-5
    # Token 1 is the cell in row 0, column 1; its channel 4 c + 2 r + k is latent channel c, row r, column k of that cell.
    mean, var = model.bn.running_mean, model.bn.running_var
    assert torch.allclose(tokens[0, 1, 4 * 3 + 2 * 1 + 0], (latent[0, 3, 1, 2] - mean[14]) / (var[14] + 1e-4).sqrt(), atol=1e-6)
    model.train()                                             # the statistics of the batch must not matter
    assert torch.equal(model.to_tokens(latent), tokens)
    model.eval()


def test_header_trace():
    model = vae.LensVAE(vae.SIZES["toy"])
    with torch.no_grad():
        mean, logvar = model.encode(torch.zeros(1, 3, 64, 96))
        tokens = model.to_tokens(mean)
        latent = model.to_latent(tokens, (4, 6))
        assert (mean.shape, logvar.shape, tokens.shape) == ((1, 8, 8, 12), (1, 8, 8, 12), (1, 24, 32))
        assert latent.shape == (1, 8, 8, 12) and model.decode(latent).shape == (1, 3, 64, 96)


def test_pixels_are_truncated():
    x = torch.full((1, 3, 2, 2), (200.9 / 127.5) - 1)
    assert np.asarray(vae.to_pil(x)[0]).max() == 200
    assert np.asarray(vae.to_pil(3 * x)[0]).max() == 255
    image = vae.to_pil(torch.rand(1, 3, 16, 32) * 2 - 1)
    assert np.abs(np.asarray(vae.to_pil(vae.to_images(torch.from_numpy(np.array(image[0]))[None]) + 1e-4)[0], int) - np.asarray(image[0])).max() == 0


def test_batches_depend_on_seed_and_index_alone():
    import data
    a, b, c = (vae.make_batch(0, i, (64, 96), 3) for i in (5, 5, 6))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], c[0])
    scene = data.random_scene(np.random.default_rng((0, 5, 0)), 64, 96)
    cells = a[1][0].view(4, 6, 4)
    for o in scene.objects[-1:]:                              # the last one drawn is never hidden by another
        row, column = int(o.y * 4), int(o.x * 6)
        assert cells[row, column, :2].tolist() == [data.SHAPES.index(o.shape), list(data.COLORS).index(o.color)]
        assert torch.allclose(cells[row, column, 2:], torch.tensor([o.x * 6 - column, o.y * 4 - row]), atol=1e-5)
    assert (cells[..., 0] >= 0).sum() <= len(scene.objects)


def test_training_lowers_the_loss_and_resumes_bit_for_bit(tmp_path, monkeypatch, capsys):
    command = [*NANO, "--steps", "12", "--save-every", "6"]
    vae.main(["--out", str(tmp_path / "whole"), *command])
    said = capsys.readouterr().out
    assert "linear probe" in said
    rows = [json.loads(line) for line in (tmp_path / "whole" / "vae" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [*range(1, 13), 12]
    assert np.mean([r["loss"] for r in rows[8:12]]) < np.mean([r["loss"] for r in rows[:3]])
    assert set(rows[-1]["probe"]) == {"shape", "colour", "place"}

    class Killed(Exception): pass
    replace = vae.os.replace
    def replace_then_die(a, b):
        replace(a, b)
        raise Killed
    monkeypatch.setattr(vae.os, "replace", replace_then_die)
    with pytest.raises(Killed):
        vae.main(["--out", str(tmp_path / "halves"), *command])
    monkeypatch.setattr(vae.os, "replace", replace)
    vae.main(["--out", str(tmp_path / "halves"), *command])   # the same command again
    assert "resuming at step 6" in capsys.readouterr().out
    one, two = (load_file(tmp_path / name / "vae" / "diffusion_pytorch_model.safetensors") for name in ("whole", "halves"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    rows = [json.loads(line)["step"] for line in (tmp_path / "halves" / "vae" / "metrics.jsonl").read_text().splitlines()]
    assert rows == [*range(1, 13), 12]

    model = vae.load_vae(tmp_path / "whole")                  # what was saved is what loads, with its story
    assert all(torch.equal(v, one[k]) for k, v in model.state_dict().items())
    assert json.loads((tmp_path / "whole" / "vae" / "config.json").read_text())["_class_name"] == "AutoencoderKLFlux2"
    with safe_open(str(tmp_path / "whole" / "vae" / "diffusion_pytorch_model.safetensors"), "pt") as f:
        assert {"command", "seed", "steps", "minutes", "probe"} <= set(f.metadata())


@torch.no_grad()
def test_statistics_make_tokens_standard():
    torch.manual_seed(0)
    model = vae.LensVAE(vae.SIZES["nano"])
    vae.initialise(model)
    vae.set_statistics(model, 7, 8, "cpu")
    tokens = []
    for i in range(8):                                        # samples of the posterior, from the same scenes
        mean, logvar = model.encode(vae.to_images(vae.make_batch(7, i)[0], "cpu"))
        tokens.append(model.to_tokens(mean + (0.5 * logvar).exp() * torch.randn_like(mean)).flatten(0, 1))
    tokens = torch.cat(tokens)
    assert tokens.mean(0).abs().max() < 0.2 and (tokens.std(0) - 1).abs().max() < 0.2


@pytest.mark.parametrize("arguments", [
    ["--out", "x", "--size", "huge"], ["--out", "x", "--steps", "0"], ["--out", "x", "--minutes", "-1"], ["--check", "/nowhere"],
    ["--out", "/proc/nothing"], [], ["--out", "x", "--steps", "1", "--minutes", "1"]])
def test_errors_are_one_line(arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        vae.main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1


def test_help():
    said = subprocess.run([sys.executable, vae.__file__, "--help"], capture_output=True, text=True)
    assert said.returncode == 0 and "--semantic" in said.stdout
