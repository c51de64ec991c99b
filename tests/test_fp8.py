"""kit/fp8.py: the rounding is the arithmetic that it says, and the model stays close to itself."""
import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lens
from kit.checkpoint import load_pipeline
from kit.fp8 import Fp8Linear, e4m3, to_fp8

TOY = Path(__file__).resolve().parent.parent / "weights" / "toy"
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


def norm_difference(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def fp8_layers(model):
    return [name for name, layer in model.named_modules() if isinstance(layer, Fp8Linear)]


# --- Numbers --------------------------------------------------------------------------------------

@pytest.fixture
def matrix():
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    weight[3] = 0                                  # a row of zeros must not divide by zero
    return weight


def test_e4m3_is_off_by_a_sixteenth_at_most(matrix):
    rounded, scale = e4m3(matrix, 1)
    assert rounded.dtype == torch.float8_e4m3fn
    assert scale.shape == (48, 1)
    assert scale.dtype == torch.float32

    error = (rounded.double() * scale - matrix).abs()
    assert (error <= matrix.abs() / 16 + scale * 2**-10).all()


def test_one_scale_for_all_or_one_for_each_slice(matrix):
    assert e4m3(matrix)[1].shape == (1, 1)
    assert e4m3(matrix, 0)[1].shape == (1, 32)
    assert (e4m3(matrix, 1)[1].log2() % 1 == 0).all()            # powers of two


def test_what_was_fp8_once_stays_as_it_is(matrix):
    rounded, scale = e4m3(matrix, 1)
    back = rounded.float() * scale
    for dim in (1, ()):                            # (): under another scale, as weights/toy has it
        again, other_scale = e4m3(back, dim)
        assert torch.equal(again.float() * other_scale, back)


@torch.no_grad()
def test_the_layer_is_the_product_of_the_rounded_numbers(matrix):
    x = 1000 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    x[1, 2] = 0
    linear = torch.nn.Linear(32, 48)
    linear.weight.data = matrix
    y = Fp8Linear(linear)(x)

    tokens, token_scales = e4m3(x.flatten(0, 1), 1)
    weight, weight_scales = e4m3(matrix, 1)
    product = (tokens.double() * token_scales) @ (weight.double() * weight_scales).T
    by_hand = (product + linear.bias.double()).view(2, 5, 48)
    assert norm_difference(y, by_hand) < 1e-6
    assert norm_difference(y, linear(x)) > 1e-3    # and it does round


# --- Models ---------------------------------------------------------------------------------------

def test_five_matrices_of_a_block_at_full_width():
    config = lens.LensConfig(num_layers=2)
    with torch.device("meta"):
        model = to_fp8(lens.LensTransformer(config).bfloat16())
    names = fp8_layers(model)
    assert len(names) == 5 * 2
    assert not [name for name in names if "txt" in name or "mod" in name]


def coarse_copy(model, names):
    """The model with a bit less than fp8 in the named matrices: steps of a quarter of 1 to 2."""
    coarse = copy.deepcopy(model)
    for name in names:
        weight = coarse.get_submodule(name).weight
        scale = weight.abs().amax(1, keepdim=True) / 2
        steps = (weight.float() / scale).mul(4).round().div(4)
        weight.data = (steps * scale).to(weight)
    return coarse


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_fp8_is_close_to_the_plain_model_on_its_own_way(device):
    """Each forward along a guided run, with text and without. The bound must also tell: fewer bits
    by one in the weights break it."""
    model, _, encoder = load_pipeline(TOY, device, torch.bfloat16,
                                      parts=("transformer", "text_encoder"))
    features, _ = encoder.encode(["two red circles above a star"])
    text = [layer.expand(3, -1, -1) for layer in features]
    rounded = to_fp8(copy.deepcopy(model))
    names = fp8_layers(rounded)
    # The MLP stays: its width of 426 is no multiple of 16.
    assert len(names) == 2 * 5
    assert all("img_qkv" in name or "to_out" in name for name in names)
    others = {"fp8": rounded, "coarse": coarse_copy(model, names)}

    grid = (3, 4)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 12, 32, generator=generator).to(device)
    levels = lens.sigmas(12, 8).to(device)
    worst = {"fp8": 1.0, "coarse": 1.0}
    for i in range(8):
        t = levels[i:i + 1]
        plain = {}
        for branch, condition in (("text", text), ("none", None)):
            plain[branch] = model(x.bfloat16(), t, condition, None, grid).float()
            for name, other in others.items():
                v = other(x.bfloat16(), t, condition, None, grid).float()
                near = F.cosine_similarity(v.flatten(), plain[branch].flatten(), 0).item()
                worst[name] = min(worst[name], near)
        guided = plain["none"] + 3 * (plain["text"] - plain["none"])
        length = plain["text"].norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        x = lens.euler_step(x, guided * length, levels[i], levels[i + 1])
    assert worst["fp8"] > 0.999 > worst["coarse"], worst
