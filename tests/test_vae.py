"""vae.py against the reference's numbers (tests/goldens), and its tokens."""
import json

import pytest
import torch
from conftest import GOLDENS, relative

from kit.files import open_safetensors
from lens import SIZES
from vae import CONFIG_KEYS, LensVAE


@pytest.fixture(scope="module")
def golden():
    """(the reference's autoencoder, {name: tensor} of inputs and outputs, its tokens' grid)"""
    with open_safetensors(GOLDENS / "vae.safetensors") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}
        notes = f.metadata()

    weights = {}
    for name, tensor in tensors.items():
        if name.startswith("weights."):
            weights[name.removeprefix("weights.")] = tensor
    model = LensVAE(json.loads(notes["config"])).eval()
    model.load_state_dict(weights)
    return model, tensors, tuple(json.loads(notes["latent_grid"]))


@torch.no_grad()
def test_goldens(golden):
    model, tensors, grid = golden
    mean, logvar = model.encode(tensors["in.image"])
    assert relative(mean, tensors["out.encode_mean"]) < 1e-4
    assert relative(logvar, tensors["out.encode_logvar"]) < 1e-4

    decoded = model.decode(tensors["in.latent"])
    assert relative(decoded, tensors["out.decode"]) < 1e-4
    latent = model.to_latent(tensors["in.normalised_tokens"], grid)
    assert relative(model.decode(latent), tensors["out.decode_from_tokens"]) < 1e-4


@torch.no_grad()
def test_half_precision_and_channels_last(golden):
    model, tensors, grid = golden
    other = LensVAE(model.config).eval()
    other.load_state_dict(model.state_dict())
    other.to(memory_format=torch.channels_last)
    image = tensors["in.image"].contiguous(memory_format=torch.channels_last)
    mean, _ = other.encode(image)
    assert relative(mean, tensors["out.encode_mean"]) < 1e-4

    other.to(torch.bfloat16)
    mean, _ = other.encode(image.bfloat16())
    assert relative(mean.float(), tensors["out.encode_mean"]) < 0.1
    latent = other.to_latent(tensors["in.normalised_tokens"].bfloat16(), grid)
    assert latent.dtype == torch.bfloat16
    decoded = other.decode(latent).float()
    assert relative(decoded, tensors["out.decode_from_tokens"]) < 0.1


def test_full_size_is_the_released_layout():
    config = {"_class_name": "AutoencoderKLFlux2", "sample_size": 1024, **SIZES["full"].vae}
    with torch.device("meta"):
        model = LensVAE(config)                                # other keys do not matter
    shapes = {name: list(t.shape) for name, t in model.state_dict().items()}
    released = json.loads((GOLDENS / "checkpoint_tensors.json").read_text())["vae"]
    assert shapes == released
    assert len(released) == 251
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 84.0


@pytest.mark.parametrize("key", CONFIG_KEYS)
def test_a_config_without_one_of_its_keys_is_an_error_that_names_it(key):
    config = dict(SIZES["nano"].vae)
    del config[key]
    with pytest.raises(ValueError, match=key):
        LensVAE(config)


@torch.no_grad()
def test_tokens_and_latent_are_inverse(golden):
    model, _, _ = golden
    latent = torch.randn(2, 8, 12, 8)
    tokens = model.to_tokens(latent)
    assert tokens.shape == (2, 24, 32)
    assert relative(model.to_latent(tokens, (6, 4)), latent) < 1e-5

    # Token 1 is the cell in row 0, column 1. Its channel 4 c + 2 r + k is latent channel c, row r,
    # column k of that cell: here c = 3, r = 1, k = 0.
    channel = 4 * 3 + 2 * 1 + 0
    mean, var = model.bn.running_mean[channel], model.bn.running_var[channel]
    expected = (latent[0, 3, 1, 2] - mean) / (var + 1e-4).sqrt()
    assert torch.allclose(tokens[0, 1, channel], expected, atol=1e-6)

    model.train()                                              # a batch's statistics do not matter
    assert torch.equal(model.to_tokens(latent), tokens)
    model.eval()


@torch.no_grad()
def test_header_trace():
    """The table of shapes at the top of vae.py."""
    model = LensVAE(SIZES["toy"].vae)
    mean, logvar = model.encode(torch.zeros(1, 3, 96, 64))
    tokens = model.to_tokens(mean)
    latent = model.to_latent(tokens, (6, 4))
    assert mean.shape == (1, 8, 12, 8)
    assert logvar.shape == (1, 8, 12, 8)
    assert tokens.shape == (1, 24, 32)
    assert latent.shape == (1, 8, 12, 8)
    assert model.decode(latent).shape == (1, 3, 96, 64)
