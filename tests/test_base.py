"""The frozen base under a LoRA in training: in 8 bits it is the model that it was, takes the memory
that is counted, and lets the adapter learn."""
import json

import pytest
import torch
from conftest import error_line, random_model, relative, rows
from safetensors.torch import load_file, save_file

import lens
import train
from kit.checkpoint import load_transformer, save_pipeline
from kit.files import LensError
from kit.fp8 import PackedLinear, e4m3, pack_blocks
from kit.lora import LoRALinear, add_lora, lora_parameters, merge_lora, named_lora, save_lora
from kit.places import WEIGHT_NAMES
from kit.run import Run
from tools import budget

NANO = lens.SIZES["nano"].transformer
GRID = (3, 2)


def inputs():
    """x, t, text of two noisy pictures with five words each."""
    g = torch.Generator().manual_seed(1)
    text = [torch.randn(2, 5, NANO.enc_hidden_dim, generator=g) for _ in range(2)]
    return torch.randn(2, 6, NANO.in_channels, generator=g), torch.rand(2, generator=g), text


def velocity(model):
    x, t, text = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        return model(x, t, text, None, GRID).float()


def stored(model, folder):
    """The model as a folder of weights in bf16."""
    save_pipeline(folder, model, dtype=torch.bfloat16)
    return folder


def packed_names(model):
    return [name for name, layer in model.named_modules() if isinstance(layer, PackedLinear)]


def bytes_of(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())


# --- The base in 8 bits ---------------------------------------------------------------------------

def test_attention_and_mlps_are_packed_and_the_modulation_is_not(tmp_path):
    model = load_transformer(stored(random_model(), tmp_path), dtype=torch.bfloat16, packed=True)
    names = packed_names(model)
    assert len(names) == NANO.num_layers * (2 + 2 + 6)
    assert not [name for name in names if "_mod" in name or "txt_in" in name]
    assert model.state_dict()["transformer_blocks.0.img_mod.1.weight"].dtype == torch.bfloat16
    assert model.state_dict()["transformer_blocks.0.attn.img_qkv.weight"].dtype == (
        torch.float8_e4m3fn)


@torch.no_grad()
def test_what_8_bits_hold_exactly_is_the_same_model(tmp_path):
    """To the bit; and the check can fail, since other weights are rounded."""
    model = random_model()
    folder = stored(model, tmp_path / "any")
    plain = velocity(load_transformer(folder, dtype=torch.bfloat16))
    rounded = velocity(load_transformer(folder, dtype=torch.bfloat16, packed=True))
    assert 1e-3 < relative(rounded, plain) < 0.05

    for block in model.transformer_blocks:
        for layer in block.modules():
            if isinstance(layer, torch.nn.Linear):
                weight, scale = e4m3(layer.weight, 1)
                layer.weight.copy_(weight.float() * scale)
    folder = stored(model, tmp_path / "exact")
    plain = velocity(load_transformer(folder, dtype=torch.bfloat16))
    assert torch.equal(velocity(load_transformer(folder, dtype=torch.bfloat16, packed=True)), plain)


@pytest.mark.parametrize("rows_of_scales", [False, True])
@torch.no_grad()
def test_what_is_stored_in_8_bits_stays_as_it_is(rows_of_scales, tmp_path):
    """With scales of its own, no powers of two: they are not rounded a second time."""
    folder = stored(random_model(), tmp_path)
    file = folder / "transformer" / WEIGHT_NAMES[0]
    state = load_file(file)
    name = "transformer_blocks.1.img_mlp.w1"
    weight = state[f"{name}.weight"]
    largest = weight.float().abs().amax(1, keepdim=True) if rows_of_scales else weight.abs().max()
    scale = largest.float() / 300
    numbers = (weight.float() / scale).to(torch.float8_e4m3fn)
    state[f"{name}.weight"], state[f"{name}.scale_weight"] = numbers, scale
    save_file(state, file, {"config": json.dumps(NANO.to_dict())})

    layer = load_transformer(folder, packed=True).get_submodule(name)
    assert torch.equal(layer.weight.float(), numbers.float())
    assert layer.scale.shape == (len(numbers),)
    assert torch.equal(layer.scale, scale.flatten().expand(len(numbers)))


@torch.no_grad()
def test_an_adapter_in_the_base_is_merged_before_it_is_packed(tmp_path):
    base = stored(random_model(), tmp_path / "base")
    tuned = random_model()
    add_lora(tuned, 4, 4)
    for p in lora_parameters(tuned):
        p.normal_(std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    save_lora(tuned, tmp_path / "tuned")
    save_pipeline(tmp_path / "tuned", base=str(base))
    plain = velocity(load_transformer(tmp_path / "tuned", dtype=torch.bfloat16))
    packed = load_transformer(tmp_path / "tuned", dtype=torch.bfloat16, packed=True)
    assert relative(velocity(packed), plain) < 0.1
    without = velocity(load_transformer(base, dtype=torch.bfloat16))
    assert relative(without, plain) > 0.5

    with pytest.raises(LensError, match="packed in 8 bits"):
        add_lora(packed, 4, 4)
        merge_lora(packed, tmp_path / "tuned")


# --- The adapter over it --------------------------------------------------------------------------

def adapter_gradients(folder, **options):
    """{name: gradient} of an adapter over a base that is loaded with these options."""
    model = load_transformer(folder, **options)
    add_lora(model, 4, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for p in lora_parameters(model)[1::2]:                    # B, which starts at zero
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    model.set_recompute("full")
    velocity(model).square().mean().backward()
    learnt = {id(p) for p in lora_parameters(model)}
    assert all(p.grad is None for p in model.parameters() if id(p) not in learnt)
    return {name: p.grad for name, p in named_lora(model).items()}


def test_the_adapters_gradients_are_close_to_those_over_bf16(tmp_path):
    folder = stored(random_model(), tmp_path)
    plain = adapter_gradients(folder, dtype=torch.bfloat16)
    packed = adapter_gradients(folder, dtype=torch.bfloat16, packed=True)
    assert plain.keys() == packed.keys()
    for name, gradient in packed.items():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()
        off = (gradient - plain[name]).norm() / plain[name].norm()
        assert 0 < off < 0.2, name


def test_gradients_are_those_of_the_unpacked_matrix():
    linear = torch.nn.Linear(32, 48)
    packed = PackedLinear(linear)
    matrix = packed.weight.float() * packed.scale[:, None]
    x = torch.randn(2, 5, 32, requires_grad=True)
    y = packed(x)
    assert torch.equal(y, torch.nn.functional.linear(x, matrix, linear.bias))
    y.square().sum().backward()
    own, x.grad = x.grad, None
    torch.nn.functional.linear(x, matrix, linear.bias).square().sum().backward()
    torch.testing.assert_close(own, x.grad)
    assert packed.weight.grad is None


# --- The account ----------------------------------------------------------------------------------

@pytest.mark.parametrize("base_dtype", train.BASE_DTYPES)
def test_a_base_takes_the_memory_that_is_counted(base_dtype, tmp_path):
    folder = stored(random_model(), tmp_path)
    dtype = torch.float32 if base_dtype == "fp32" else torch.bfloat16
    model = load_transformer(folder, dtype=dtype, packed=base_dtype == "fp8")
    counted = budget.base_bytes(NANO, base_dtype)
    assert bytes_of(model) == counted
    whole = sum(p.numel() for p in lens.build("nano").parameters())
    if base_dtype != "fp8":
        assert counted == whole * dtype.itemsize

    # With the adapter, and its average, which shares the base.
    stage = train.Stage(areas=(64,), batch=(2,), steps=1, lr=1e-4)
    learner = train.make_learner(Run(out=None), model, stage, lora=4)
    counts = budget.parameter_counts(NANO, 4)
    held = {id(p): p.numel() * p.element_size()
            for owner in (learner.denoiser, learner.ema) for p in owner.parameters()}
    weights, average, *_ = budget.fixed_parts("train", counts, counted)
    assert sum(held.values()) == weights.bytes + average.bytes
    layers = [layer for layer in learner.ema.modules() if isinstance(layer, LoRALinear)]
    assert all((layer.scale is None) == (base_dtype != "fp8") for layer in layers)


def test_less_of_the_base_is_less_memory():
    config = lens.SIZES["full"].transformer
    fp32, bf16, fp8 = [budget.base_bytes(config, name) for name in train.BASE_DTYPES]
    assert fp32 == 2 * bf16
    assert 0.6 < fp8 / bf16 < 0.7                  # the modulation, a third, stays in bf16


def test_8_bits_save_memory_without_recomputing_too():
    """Autograd would keep each unpacked matrix until the backward pass."""
    config = lens.LensConfig(num_layers=2)
    bf16, fp8 = [budget.tracked_bytes(config, "none", 1, (16, 16), 32, 16, name)
                 for name in ("bf16", "fp8")]
    assert fp8[0] < 1.05 * bf16[0]


def test_the_table_says_what_fits(capsys):
    (row,) = budget.lora_rows("nano", 4, ("fp8",), areas=(64,), counts=(1,), recomputes=("full",))
    counts = budget.parameter_counts(NANO, 4)
    assert row.fixed == budget.base_bytes(NANO, "fp8") + 5 * 4 * counts.adapter
    assert row.total(1) > row.fixed
    assert row.card(1) == 8
    budget.print_lora("nano", 4, [row])
    assert "8 GB" in capsys.readouterr().out.splitlines()[-1]
    for gigabytes, card in ((6.9, 8), (7.0, 12), (22.9, 24), (23.0, None)):
        row.fixed, row.steps = int(gigabytes * 1e9), {1: 0}
        assert row.card(1) == card                 # with 1 GiB, 1.07 GB, for CUDA


# --- The run --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return stored(random_model(), tmp_path_factory.mktemp("start"))


def test_a_run_over_each_base_and_its_resume(start, nano, steady, tmp_path, capsys):
    losses = {}
    command = ["--size", "nano", "--stage", "1", "--device", "cpu", "--preview-every", "0",
               "--parts", str(nano), "--init", str(start), "--lora", "4", "--recompute", "full",
               "--batch", "2"]
    for base_dtype in train.BASE_DTYPES:
        own = [*command, "--base-dtype", base_dtype, "--out", str(tmp_path / base_dtype)]
        train.main([*own, "--steps", "2"])
        train.main([*own, "--steps", "3"])
        losses[base_dtype] = [row["loss"] for row in rows(tmp_path / base_dtype)]
        assert len(losses[base_dtype]) == 3
        tuned = load_transformer(start)
        assert merge_lora(tuned, tmp_path / base_dtype) > 0
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.02)
    assert losses["fp8"] != losses["bf16"] != losses["fp32"]

    capsys.readouterr()
    other = [*command, "--base-dtype", "fp8", "--out", str(tmp_path / "fp32")]
    assert "--base-dtype None, not fp8" in error_line(train.main, other, capsys)


def test_bf16_is_usual_but_for_the_toys_sizes():
    usual = train.usual_base_dtype
    assert usual("full", 16) == usual("small", 8) == "bf16"
    assert usual("toy", 16) == usual("full", 0) == usual("full", 16, fsdp=True) == "fp32"


@pytest.mark.parametrize("flags, words", [
    (["--base-dtype", "fp8"], "with --lora alone"),
    (["--base-dtype", "fp8", "--lora", "4", "--init", "x", "--fsdp"], "not with --fsdp"),
    (["--base-dtype", "int4"], "invalid choice"),
])
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    command = ["--device", "cpu", "--out", str(tmp_path / "run"), *flags]
    assert words in error_line(train.main, command, capsys)


def test_packing_twice_changes_nothing():
    model = random_model()
    pack_blocks(model)
    before = velocity(model)
    pack_blocks(model)
    assert torch.equal(velocity(model), before)
