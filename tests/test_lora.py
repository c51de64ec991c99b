"""kit/lora.py: adapters attached, saved, and merged from the files of several tools."""
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import random_model, relative
from safetensors.torch import load_file, save_file

from kit.checkpoint import load_transformer
from kit.files import LensError
from kit.lora import (
    add_lora,
    lora_layers,
    lora_parameters,
    merge_lora,
    save_lora,
    set_lora,
    write_for_comfyui,
)
from kit.places import notes_in

GRID = (4, 3)
WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
FIRST = "transformer_blocks.0.attn.to_out.0"       # two layers of 32 x 32
SECOND = "transformer_blocks.1.attn.to_out.0"


def velocity(model):
    """What the model predicts for two fixed noisy pictures and texts."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    text = [torch.randn(2, 5, config.enc_hidden_dim, generator=generator)
            for _ in config.selected_layer_index]
    x = torch.randn(2, 12, config.in_channels, generator=generator)
    t = torch.rand(2, generator=generator)
    return model(x, t, text, None, GRID)


def model_with_adapter():
    """A random model with an adapter that does something: as it is made, B is zero."""
    model = random_model()
    add_lora(model, 4, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for p in lora_parameters(model):
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    return model


def pair(rank=4, seed=0):
    """A [rank, 32] and B [32, rank]."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, 32, generator=generator)
    return a, torch.randn(32, rank, generator=generator)


def change_of(model, name):
    """What was added to a layer's weight."""
    base = random_model()
    return model.get_submodule(name).weight - base.get_submodule(name).weight


# --- Layers ---------------------------------------------------------------------------------------

def test_a_new_adapter_changes_nothing_and_the_base_is_frozen():
    base, model = random_model(), random_model()
    add_lora(model, 4, 8)
    torch.testing.assert_close(velocity(model), velocity(base))
    assert set(base.state_dict()) <= set(model.state_dict())      # the base keeps its names
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_two_adapters_share_one_base():
    base, model = random_model(), random_model()
    add_lora(model, 4, 8, name="new")
    add_lora(model, 4, 8, name="old")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any(name.endswith(".new") for name in trained)
    assert any(name.endswith(".old") for name in trained)

    expected = velocity(base)
    torch.nn.init.ones_(lora_parameters(model, "new")[1])
    set_lora(model, "new")
    out = velocity(model)
    assert relative(out, expected) > 1e-3
    out.square().mean().backward()
    assert all(p.grad is None for p in lora_parameters(model, "old"))
    assert all(p.grad is not None for p in lora_parameters(model, "new"))

    for name in ("old", None):
        set_lora(model, name)
        torch.testing.assert_close(velocity(model), expected)


def test_layers_without_a_gradient_get_no_adapter():
    model = random_model()
    unread = model.unread()
    count = add_lora(model, 4, 8)
    names = lora_layers(model, "default")
    assert count == len(names)
    assert not [name for name in names if f"{name}.weight" in unread]
    assert "transformer_blocks.0.attn.to_add_out" in names        # only the last block's is unread
    assert "transformer_blocks.1.attn.to_add_out" not in names


def test_an_adapter_is_drawn_from_its_generator():
    drawn = []
    for seed in (3, 3, 4):
        model = random_model()
        add_lora(model, 4, 8, generator=torch.Generator().manual_seed(seed))
        drawn.append(lora_parameters(model)[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].abs().max() <= 32**-0.5


def test_wrong_names_are_errors():
    model = model_with_adapter()
    with pytest.raises(LensError, match="nwe"):
        set_lora(model, "nwe")
    with pytest.raises(LensError, match="nwe"):
        save_lora(model, "nowhere", "nwe")
    with pytest.raises(LensError, match="targets head"):
        add_lora(model, 4, 8, targets=("head",))


# --- Files ----------------------------------------------------------------------------------------

@torch.no_grad()
def test_merged_equals_attached(tmp_path):
    attached, merged = model_with_adapter(), random_model()
    save_lora(attached, tmp_path)
    assert merge_lora(merged, tmp_path) == len(lora_layers(attached, "default"))
    torch.testing.assert_close(velocity(merged), velocity(attached), atol=1e-4, rtol=1e-3)
    assert relative(velocity(merged), velocity(random_model())) > 1e-2


@torch.no_grad()
def test_strength_is_the_same_merged_and_attached(tmp_path):
    attached, merged = model_with_adapter(), random_model()
    save_lora(attached, tmp_path)
    merge_lora(merged, tmp_path, 0.5)
    set_lora(attached, "default", 0.5)
    torch.testing.assert_close(velocity(merged), velocity(attached), atol=1e-4, rtol=1e-3)


STYLES = ["", "diffusion_model.", "transformer.", "base_model.model.",
          "base_model.model.transformer."]


@pytest.mark.parametrize("prefix", STYLES)
@torch.no_grad()
def test_names_with_dots(prefix, tmp_path):
    a, b = pair()
    tensors = {}
    for name in (FIRST, SECOND):
        tensors[f"{prefix}{name}.lora_A.weight"] = a.clone()
        tensors[f"{prefix}{name}.lora_B.weight"] = b.clone()
    save_file(tensors, tmp_path / "lora.safetensors")
    model = random_model()
    assert merge_lora(model, tmp_path / "lora.safetensors") == 2
    for name in (FIRST, SECOND):                   # no alpha: as large as the rank
        torch.testing.assert_close(change_of(model, name), b @ a)


@torch.no_grad()
def test_names_of_sd_scripts(tmp_path):
    a, b = pair()
    tensors = {}
    for name in (FIRST, SECOND):
        key = "lora_unet_" + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = a.clone()
        tensors[f"{key}.lora_up.weight"] = b.clone()
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    model = random_model()
    assert merge_lora(model, tmp_path) == 2        # the only file of a folder
    for name in (FIRST, SECOND):
        torch.testing.assert_close(change_of(model, name), 2 / 4 * b @ a)


@pytest.mark.parametrize("config, notes, scale", [
    ({"lora_alpha": 8}, {}, 8 / 4),
    ({"lora_alpha": 8, "use_rslora": True}, {}, 8 / 2),
    (None, {"ss_network_alpha": "2"}, 2 / 4),
    ({}, {"ss_network_alpha": "2"}, 1),            # the config beside counts, not the file's notes
])
@torch.no_grad()
def test_scale_for_the_whole_file(config, notes, scale, tmp_path):
    a, b = pair()
    tensors = {f"{FIRST}.lora_A.default.weight": a, f"{FIRST}.lora_B.default.weight": b}
    save_file(tensors, tmp_path / "adapter_model.safetensors", notes)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = random_model()
    merge_lora(model, tmp_path)
    torch.testing.assert_close(change_of(model, FIRST), scale * b @ a)


# What PEFT gives FIRST and SECOND under a config of r = alpha = 4. Its patterns of alpha are
# regular expressions for the end of a layer's name, from a dot on; the first that fits counts.
PATTERNS = [
    ({FIRST: 16}, 4, 1),
    ({"to_out.0": 16}, 4, 4),
    ({"0.attn.to_out.0": 16}, 4, 1),
    ({"out.0": 16}, 1, 1),
    ({"to_out": 16}, 1, 1),
    ({r"transformer_blocks\.[1-9]\.attn\.to_out\.0": 2}, 1, 0.5),
    ({SECOND: 8, "to_out.0": 16}, 4, 2),
    ({"to_out.0": 16, SECOND: 8}, 4, 4),
    ({f"^{FIRST}": 16}, 4, 1),
]


def save_pair(file, prefix="base_model.model.", notes=None):
    """The same matrices for FIRST and SECOND, with PEFT's names; returns their product."""
    a, b = pair()
    tensors = {}
    for name in (FIRST, SECOND):
        tensors[f"{prefix}{name}.lora_A.weight"] = a.clone()
        tensors[f"{prefix}{name}.lora_B.weight"] = b.clone()
    save_file(tensors, file, notes)
    return b @ a


def check_scales(model, product, first, second):
    torch.testing.assert_close(change_of(model, FIRST), first * product)
    torch.testing.assert_close(change_of(model, SECOND), second * product)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("patterns, first, second", PATTERNS)
@torch.no_grad()
def test_patterns_of_alpha(patterns, first, second, rslora, tmp_path):
    product = save_pair(tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "alpha_pattern": patterns,
              "rank_pattern": {}, "use_rslora": rslora}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = random_model()
    merge_lora(model, tmp_path)
    over_root = 2 if rslora else 1                 # alpha / 2, not alpha / 4
    check_scales(model, product, over_root * first, over_root * second)


@torch.no_grad()
def test_patterns_of_rank(tmp_path):
    """r = 8 but for SECOND; alpha = 4 for both."""
    (a, b), (small_a, small_b) = pair(8), pair(2)
    config = {"r": 8, "lora_alpha": 4, "rank_pattern": {"1.attn.to_out.0": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"{FIRST}.lora_A.weight": a, f"{FIRST}.lora_B.weight": b,
               f"{SECOND}.lora_A.weight": small_a, f"{SECOND}.lora_B.weight": small_b},
              tmp_path / "adapter_model.safetensors")
    model = random_model()
    merge_lora(model, tmp_path)
    torch.testing.assert_close(change_of(model, FIRST), 4 / 8 * b @ a)
    torch.testing.assert_close(change_of(model, SECOND), 4 / 2 * small_b @ small_a)


@pytest.mark.parametrize("config", [{"r": 8}, {"r": 4, "rank_pattern": {"to_out.0": 2}}])
def test_a_config_of_another_file_is_refused(config, tmp_path):
    save_pair(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, **config}))
    with pytest.raises(LensError, match="has rank 4, but its settings say .: they are"):
        merge_lora(random_model(), tmp_path)


@torch.no_grad()
def test_the_config_beside_is_not_of_a_file_with_another_name(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 16}))
    product = save_pair(tmp_path / "renamed.safetensors", "")
    model = random_model()
    merge_lora(model, tmp_path)                    # there is no other that it could be of
    check_scales(model, product, 4, 4)
    save_pair(tmp_path / "adapter_model.safetensors")
    model = random_model()
    merge_lora(model, tmp_path / "renamed.safetensors")
    check_scales(model, product, 1, 1)


@torch.no_grad()
def test_the_notes_of_diffusers(tmp_path):
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {SECOND: 2}, "use_rslora": False}
    notes = {f"transformer.{key}": value for key, value in config.items()}
    product = save_pair(tmp_path / "pytorch_lora_weights.safetensors", "transformer.",
                        {"lora_adapter_metadata": json.dumps(notes), "format": "pt"})
    model = random_model()
    merge_lora(model, tmp_path)
    check_scales(model, product, 2, 0.5)


@torch.no_grad()
def test_our_own_file_keeps_its_strength_without_its_config(tmp_path):
    """alpha 8 over rank 4; notes that came from another adapter do not count."""
    attached, merged = model_with_adapter(), random_model()
    stale = {"seed": 3, "lora_alpha": 99, "r": 99}
    save_lora(attached, tmp_path / "run", metadata=stale)
    file = tmp_path / "run" / "adapter_model.safetensors"
    notes = notes_in(file)
    assert (notes["r"], float(notes["lora_alpha"]), notes["seed"]) == ("4", 8, "3")
    file.rename(tmp_path / "alone.safetensors")
    merge_lora(merged, tmp_path / "alone.safetensors")
    torch.testing.assert_close(velocity(merged), velocity(attached), atol=1e-4, rtol=1e-3)


def test_a_file_of_peft_that_lost_its_alpha_says_so(tmp_path):
    save_pair(tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="does not say its alpha.*taken as its rank"):
        merge_lora(random_model(), tmp_path)


GOOD = {f"{FIRST}.lora_A.weight": torch.ones(2, 32), f"{FIRST}.lora_B.weight": torch.ones(32, 2)}
MISFITS = {
    "matches no layer": {"other.lora_A.weight": torch.ones(2, 32),
                         "other.lora_B.weight": torch.ones(32, 2)},
    "elsewhere": {**GOOD, "elsewhere.lora_A.weight": torch.ones(1)},
    "is DoRA, not a plain LoRA.*magnitude": {
        **GOOD, f"{FIRST}.lora_magnitude_vector": torch.ones(32)},
    "is DoRA, not a plain LoRA": {**GOOD, f"{FIRST}.dora_scale": torch.ones(32, 1)},
    "is LoKr": {f"{FIRST}.lokr_w1": torch.ones(2, 2), f"{FIRST}.lokr_w2": torch.ones(16, 16)},
    "is LoHa": {f"lora_unet_{FIRST.replace('.', '_')}.hada_w1_a": torch.ones(32, 2)},
    "whole changes": {**GOOD, f"diffusion_model.{SECOND}.diff": torch.ones(32, 32)},
    "a LoRA with biases": {**GOOD, f"{FIRST}.lora_B.bias": torch.ones(32)},
    "stored as torch.int8": {**GOOD, f"{FIRST}.lora_A.weight": torch.ones(2, 32).to(torch.int8)},
    "lacks one": {f"{FIRST}.lora_A.weight": torch.ones(2, 32)},
    r"\(32, 32\)": {**GOOD, f"{FIRST}.lora_A.weight": torch.ones(2, 31)},
    r"B \(32, 3\) times A \(2, 32\)": {**GOOD, f"{FIRST}.lora_B.weight": torch.ones(32, 3)},
    r"A \(2, 32, 1\)": {**GOOD, f"{FIRST}.lora_A.weight": torch.ones(2, 32, 1)},
}


@pytest.mark.parametrize("words", MISFITS)
def test_a_lora_that_does_not_fit_is_an_error_and_changes_nothing(words, tmp_path):
    # A layer that fits comes first in the file, and must not be changed either.
    tensors = {**MISFITS[words], "img_in.lora_A.weight": torch.ones(1, 16),
               "img_in.lora_B.weight": torch.ones(32, 1)}
    if words == "matches no layer":
        tensors = MISFITS[words]
    save_file(tensors, tmp_path / "lora.safetensors")
    model = random_model()
    with pytest.raises(LensError, match=words) as error:
        merge_lora(model, tmp_path / "lora.safetensors")
    assert "\n" not in str(error.value)
    for name, weight in random_model().state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


@pytest.mark.parametrize("setting, words", [
    ({"use_dora": True}, "no plain LoRA .use_dora."),
    ({"peft_type": "LOHA"}, "is LOHA, not a LoRA"),
    ({"peft_type": "ADALORA"}, "is ADALORA, not a LoRA"),
    ({"init_lora_weights": "pissa_niter_4"}, "changes a base that pissa_niter_4 has changed"),
    ({"init_lora_weights": "olora"}, "olora"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
])
def test_adapters_of_other_kinds_are_refused(setting, words, tmp_path):
    save_pair(tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, **setting}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = random_model()
    with pytest.raises(LensError, match=words) as error:
        merge_lora(model, tmp_path)
    assert "\n" not in str(error.value)
    assert change_of(model, FIRST).abs().max() == 0

    # What says that it is not so is read.
    names = {"use_dora": False, "peft_type": "LORA", "init_lora_weights": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **names, **{
        name: None for name in setting.keys() - names.keys()}}))
    assert merge_lora(model, tmp_path) == 2


@pytest.mark.parametrize("settings", [
    {}, {"use_rslora": True}, {"alpha_pattern": {"to_out.0": 16}, "rank_pattern": {}}])
def test_what_is_written_for_comfyui_is_the_same_change(settings, tmp_path):
    save_lora(model_with_adapter(), tmp_path, metadata={"seed": 7})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    wanted, comfy = random_model(), random_model()
    layers = merge_lora(wanted, tmp_path)
    target = tmp_path / "elsewhere" / "comfy.safetensors"
    assert write_for_comfyui(tmp_path, target) == layers
    assert merge_lora(comfy, target) == layers     # it has no config beside it
    names = list(load_file(target))
    assert all(name.startswith("diffusion_model.transformer_blocks.") for name in names)
    assert len(names) == 3 * layers
    assert notes_in(target)["seed"] == "7"
    for name, weight in wanted.state_dict().items():
        assert relative(weight, comfy.state_dict()[name]) < 1e-6


def test_a_root_of_the_rank_is_not_taken_twice(tmp_path):
    """What is written for ComfyUI has it in its alpha, whatever the settings beside it say."""
    product = save_pair(tmp_path / "pytorch_lora_weights.safetensors")
    config = {"r": 4, "lora_alpha": 8, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    write_for_comfyui(tmp_path, tmp_path / "comfy.safetensors")
    for file in ("pytorch_lora_weights.safetensors", "comfy.safetensors"):
        model = random_model()
        merge_lora(model, tmp_path / file)
        check_scales(model, product, 4, 4)


def test_a_settings_file_is_of_the_usual_names_alone(tmp_path):
    save_pair(tmp_path / "pytorch_lora_weights.safetensors")
    own = {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 8})}
    product = save_pair(tmp_path / "other.safetensors", notes=own)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 64}))
    model = random_model()
    merge_lora(model, tmp_path / "other.safetensors")
    check_scales(model, product, 2, 2)


def test_a_layer_under_two_names_is_refused(tmp_path):
    a, b = pair()
    save_file({f"{prefix}{FIRST}.lora_{x}.weight": t.clone()
               for prefix in ("diffusion_model.", "transformer.")
               for x, t in (("A", a), ("B", b))}, tmp_path / "lora.safetensors")
    with pytest.raises(LensError, match="stands there under two names"):
        merge_lora(random_model(), tmp_path / "lora.safetensors")


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop(next(k for k in t if "lora_B" in k)), "lacks one of its two matrices"),
    (lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()}), "a packed format"),
])
def test_nothing_unsound_is_written_for_comfyui(change, words, tmp_path):
    save_lora(model_with_adapter(), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LensError, match=words):
        write_for_comfyui(tmp_path, tmp_path / "comfy.safetensors")
    assert not (tmp_path / "comfy.safetensors").exists()


def test_a_pickled_lora_is_named(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "adapter_model.bin")
    for path in (tmp_path, tmp_path / "adapter_model.bin"):
        with pytest.raises(LensError, match="adapter_model.bin.* is a PyTorch pickle") as error:
            merge_lora(random_model(), path)
        assert "\n" not in str(error.value)


def test_an_alpha_that_is_no_number_is_one_line(tmp_path):
    save_file(GOOD, tmp_path / "lora.safetensors", {"ss_network_alpha": "Dynamic"})
    with pytest.raises(LensError, match=re.escape("lora.safetensors: could not convert")):
        merge_lora(random_model(), tmp_path / "lora.safetensors")


def test_no_file_and_too_many_files(tmp_path):
    with pytest.raises(LensError, match="no LoRA in .*none: .*found 0"):
        merge_lora(random_model(), tmp_path / "none")
    for name in ("a", "b"):
        save_file(GOOD, tmp_path / f"{name}.safetensors")
    with pytest.raises(LensError, match="found 2"):
        merge_lora(random_model(), tmp_path)
    save_file(GOOD, tmp_path / "pytorch_lora_weights.safetensors")
    assert merge_lora(random_model(), tmp_path) == 1              # a usual name settles it


def test_the_shipped_adapter_changes_the_shipped_model():
    model = load_transformer(WEIGHTS / "toy", dtype=torch.float32)
    before = model.transformer_blocks[0].attn.img_qkv.weight.clone()
    assert merge_lora(model, WEIGHTS / "toy-rl") > 0
    assert not torch.equal(before, model.transformer_blocks[0].attn.img_qkv.weight)
