"""kit/checkpoint.py: what is saved is what loads, files of other tools load, and what is wrong with
a file is one line that names it."""
import dataclasses
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file

import lens
import vae
from kit import checkpoint
from kit.checkpoint import (
    load_pipeline,
    load_text_encoder,
    load_transformer,
    load_vae,
    save_pipeline,
    unsharded,
)
from kit.files import LensError
from kit.fp8 import e4m3
from kit.lora import add_lora, lora_parameters, save_lora
from kit.places import (
    ADAPTER_NAME,
    WEIGHT_NAMES,
    fetch,
    has_parts,
    identity,
    locate,
    notes_in,
    part_folder,
    read_metadata,
    vae_identity,
)
from kit.run import Run
from kit.stored import config_from_shapes

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
NANO = lens.SIZES["nano"]


def equal(a, b):
    """Whether two state dicts hold the same numbers under the same names."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same(a, b):
    """Whether two denoisers are one."""
    return equal(a.state_dict(), b.state_dict()) and a.config == b.config


def random_vae(seed=0):
    model = vae.LensVAE(NANO.vae).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3, generator=generator)
        model.bn.running_mean.normal_(generator=generator)
        model.bn.running_var.uniform_(0.5, 2, generator=generator)
    return model


@pytest.fixture(scope="module")
def encoder():
    """A nano GPT-OSS with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|pad|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>")
    model = lens.build_text_model(NANO.text_encoder, vocab_size=300)
    return lens.TextEncoder(model, tokenizer, (0, 1))


@pytest.fixture
def saved(tmp_path):
    """A denoiser, the folder it is saved in, and its file there."""
    model = random_model()
    save_pipeline(tmp_path / "p", transformer=model, metadata={"seed": "7"})
    return model, tmp_path / "p", tmp_path / "p" / "transformer" / WEIGHT_NAMES[0]


@pytest.fixture
def pipeline(tmp_path, encoder):
    """A whole pipeline's folder, and its denoiser and autoencoder."""
    model, coder = random_model(), random_vae()
    save_pipeline(tmp_path / "whole", model, coder, encoder,
                  metadata={"command": "x", "seed": 3}, vae_metadata={"probe": 0.5})
    return tmp_path / "whole", model, coder


# --- Pipelines ------------------------------------------------------------------------------------

def test_what_is_saved_is_what_loads(pipeline, encoder):
    folder, model, coder = pipeline
    transformer, autoencoder, text_encoder = load_pipeline(folder)
    assert same(model, transformer)
    assert equal(coder.state_dict(), autoencoder.state_dict())
    assert text_encoder.layers == (0, 1)
    assert text_encoder.model.lm_head is not None                 # it can also write
    expected, _ = encoder.encode(["a red circle"])
    features, _ = text_encoder.encode(["a red circle"])
    assert all(torch.equal(f, g) for f, g in zip(expected, features, strict=True))
    for module in (transformer, autoencoder, text_encoder.model):
        assert not module.training
    assert has_parts(folder)


def test_only_what_is_asked_for_is_read(pipeline):
    folder, *_ = pipeline
    (folder / "vae" / WEIGHT_NAMES[0]).unlink()
    transformer, autoencoder, text_encoder = load_pipeline(folder, parts=("text_encoder",))
    assert transformer is None
    assert autoencoder is None
    assert text_encoder is not None
    with pytest.raises(LensError, match="no weights in"):
        load_pipeline(folder, parts=("vae",))


def test_a_checkpoint_may_hold_its_denoiser_alone(pipeline, tmp_path):
    folder, model, coder = pipeline
    tuned = tmp_path / "tuned"
    other = random_model(seed=5)
    save_pipeline(tuned, other, base="../whole", weights=model.state_dict())
    assert not has_parts(tuned)
    transformer, autoencoder, text_encoder = load_pipeline(
        str(tuned), dtype=torch.bfloat16, parts=("transformer", "vae"))
    assert text_encoder is None
    assert torch.equal(transformer.img_in.weight, model.img_in.weight.bfloat16())
    assert autoencoder.decoder.conv_in.weight.dtype == torch.bfloat16

    # A base may have a base; the nearest part counts.
    save_pipeline(tmp_path / "again", base="../tuned")
    assert part_folder(tmp_path / "again", "transformer") == tuned / "transformer"
    assert part_folder(tmp_path / "again", "vae") == folder / "vae"
    assert vae_identity(tmp_path / "again") == vae_identity(folder)


@pytest.mark.parametrize("base", [".", "../b"])
def test_bases_in_a_circle_are_an_error(base, tmp_path):
    save_pipeline(tmp_path / "a", base=base)
    save_pipeline(tmp_path / "b", base="../a")
    with pytest.raises(LensError, match="circle"):
        load_pipeline(tmp_path / "a")


def test_a_checkpoint_may_be_an_adapter_over_its_base(pipeline, tmp_path):
    folder, model, _ = pipeline
    tuned = random_model()
    add_lora(tuned, 4, 8)
    torch.nn.init.ones_(lora_parameters(tuned)[1])
    save_lora(tuned, tmp_path / "tuned", metadata={"seed": 9})
    save_pipeline(tmp_path / "tuned", base="../whole")

    transformer, *_ = load_pipeline(tmp_path / "tuned", parts=("transformer",))
    assert transformer.state_dict().keys() == model.state_dict().keys()
    assert not same(transformer, model)
    notes = read_metadata(tmp_path / "tuned")
    assert notes["seed"] == "9"                                   # the adapter's own
    assert notes["command"] == "x"                                # the base's, as it has none


def test_the_shipped_weights_load():
    transformer, autoencoder, encoder = load_pipeline(WEIGHTS / "toy-turbo", dtype=torch.float32)
    toy = lens.SIZES["toy"]
    assert transformer.config == toy.transformer
    assert autoencoder.config == toy.vae
    assert encoder.layers == toy.transformer.selected_layer_index
    base = load_transformer(WEIGHTS / "toy", dtype=torch.float32)
    assert not equal(base.state_dict(), transformer.state_dict())


# --- Writing --------------------------------------------------------------------------------------

def test_notes_and_configs_of_both_parts(pipeline):
    folder, model, coder = pipeline
    notes = read_metadata(folder)
    assert notes["seed"] == "3"
    assert json.loads(notes["config"]) == model.config.to_dict()
    _, config = locate(folder, "transformer")
    assert lens.LensConfig.from_dict(config) == model.config

    vae_notes = notes_in(folder / "vae" / WEIGHT_NAMES[0])
    assert vae_notes["probe"] == "0.5"
    assert "seed" not in vae_notes
    config = json.loads((folder / "vae" / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKLFlux2"
    assert config["batch_norm_eps"] == coder.bn.eps
    assert len(config["down_block_types"]) == len(config["block_out_channels"]) == 4
    assert {key: config[key] for key in coder.config} == coder.config


def test_notes_from_another_file_do_not_replace_the_config(saved, tmp_path):
    model, *_ = saved
    stale = {"config": "{}", "format": "x", "seed": "7"}
    save_pipeline(tmp_path / "q", model, metadata=stale)
    single = tmp_path / "q" / "transformer" / WEIGHT_NAMES[0]
    shutil.copy(single, tmp_path / "one.safetensors")
    assert same(load_transformer(tmp_path / "one.safetensors"), model)
    assert read_metadata(tmp_path / "q")["seed"] == "7"


def test_parts_that_are_not_given_stay(pipeline):
    folder, _, coder = pipeline
    tuned = random_model(seed=5)
    save_pipeline(folder, tuned)
    transformer, autoencoder, _ = load_pipeline(folder, parts=("transformer", "vae"))
    assert same(transformer, tuned)
    assert equal(autoencoder.state_dict(), coder.state_dict())
    index = json.loads((folder / "model_index.json").read_text())
    assert {"transformer", "vae", "text_encoder", "tokenizer", "scheduler"} < index.keys()


def test_stored_in_bf16_with_statistics_as_they_are_and_fp8_as_it_is(tmp_path):
    model, coder = random_model(), random_vae()
    rounded, scale = e4m3(model.img_in.weight.detach())
    weights = {**model.state_dict(), "img_in.weight": rounded,
               "img_in.scale_weight": scale.view(())}
    save_pipeline(tmp_path, model, coder, dtype=torch.bfloat16, weights=weights)

    stored = load_file(tmp_path / "transformer" / WEIGHT_NAMES[0])
    assert stored["img_in.weight"].dtype == torch.float8_e4m3fn
    assert stored["txt_in.weight"].dtype == torch.bfloat16
    stored = load_file(tmp_path / "vae" / WEIGHT_NAMES[0])
    assert stored["bn.running_var"].dtype == torch.float32
    assert stored["bn.num_batches_tracked"].dtype == torch.int64
    assert stored["decoder.conv_in.weight"].dtype == torch.bfloat16

    loaded = load_transformer(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded.img_in.weight, rounded.float() * scale)
    assert torch.equal(loaded.txt_in.weight, model.txt_in.weight.bfloat16().float())


def test_a_full_disk_keeps_the_previous_file(saved):
    model, folder, file = saved
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel refuses longer files, as a full disk would.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(LensError, match="cannot write"):
            save_pipeline(folder, transformer=random_model(seed=9))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert not [f for f in file.parent.iterdir() if ".new" in f.name]
    assert same(model, load_transformer(folder))


def test_attached_adapters_are_not_lost_silently(tmp_path):
    model = random_model()
    add_lora(model, 4, 8)
    with pytest.raises(LensError, match="save_lora"):
        save_pipeline(tmp_path, transformer=model)
    assert not list(tmp_path.iterdir())


# --- The denoiser's files -------------------------------------------------------------------------

@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "net.", "diffusion_model."])
def test_a_single_file_without_config(prefix, tmp_path):
    model = random_model()
    tensors = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "one.safetensors")
    assert same(model, load_transformer(tmp_path / "one.safetensors"))
    assert same(model, load_transformer(tmp_path))                # the only file of a folder
    half = load_transformer(tmp_path / "one.safetensors", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("size", lens.SIZES)
def test_shapes_alone_give_the_config(size):
    config = lens.SIZES[size].transformer
    with torch.device("meta"):
        model = lens.LensTransformer(config)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert config_from_shapes("x", shapes) == config


@pytest.mark.parametrize("text_width, layers", [(64, (0, 1)), (1024, (0, 1)), (2880, (3, 4, 5))])
def test_layers_of_an_unknown_encoder_are_the_first_ones(text_width, layers):
    config = dataclasses.replace(
        NANO.transformer, enc_hidden_dim=text_width, selected_layer_index=layers)
    with torch.device("meta"):
        model = lens.LensTransformer(config)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = config_from_shapes("x", shapes)
    assert found.selected_layer_index == tuple(range(len(layers)))
    assert found.enc_hidden_dim == text_width


def test_a_file_of_something_else_is_no_denoiser(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "one.safetensors")
    with pytest.raises(LensError, match="one.safetensors is not a Lens denoiser: missing.*img_in"):
        load_transformer(tmp_path / "one.safetensors")
    with pytest.raises(LensError, match="x is not a Lens denoiser"):
        config_from_shapes("x", {
            "img_in.weight": [3], "txt_norm.0.weight": [4],
            "transformer_blocks.0.attn.norm_q.weight": [16]})


def test_shards_with_an_index(saved):
    model, folder, file = saved
    state = load_file(file)
    names = sorted(state)
    first, second = "a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"
    save_file({name: state[name] for name in names[::2]}, file.parent / first)
    save_file({name: state[name] for name in names[1::2]}, file.parent / second)
    weight_map = {name: first if i % 2 == 0 else second for i, name in enumerate(names)}
    index = file.parent / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    file.unlink()

    transformer, *_ = load_pipeline(folder, parts=("transformer",))
    assert same(model, transformer)
    (file.parent / second).unlink()
    with pytest.raises(LensError, match="00002"):
        load_transformer(folder)
    index.write_text("{}")
    with pytest.raises(LensError, match="index.json: 'weight_map'"):
        load_transformer(folder)
    index.write_text('{"weight_map": {}}')
    with pytest.raises(LensError, match="it names no shards"):
        load_transformer(folder)


@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale"])
def test_an_fp8_file(ending, tmp_path):
    """With a scale a row in every second matrix, and one scale in the others."""
    model = random_model()
    tensors = {"scaled_fp8": torch.zeros(1)}
    for i, (name, tensor) in enumerate(model.state_dict().items()):
        tensors[name] = tensor
        if tensor.dim() == 2:
            module = name.removesuffix(".weight")
            if i % 2 == 1:
                scale = tensor.abs().amax(1, keepdim=True) / 448
                tensors[f"{module}.{ending}"] = scale.reshape(-1)
            else:
                scale = tensor.abs().max() / 448
                tensors[f"{module}.{ending}"] = scale
            tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[f"{module}.input_scale"] = torch.ones(1)      # for kernels that we do not use
    save_file(tensors, tmp_path / "fp8.safetensors")

    loaded = load_transformer(tmp_path / "fp8.safetensors", dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        assert (loaded[name] - tensor).abs().max() <= tensor.abs().max() * 0.04, name
    as_stored = load_transformer(tmp_path / "fp8.safetensors")
    assert as_stored.img_in.weight.dtype == torch.bfloat16        # fp8 becomes bf16
    assert as_stored.img_in.bias.dtype == torch.float32


MATRIX = "transformer_blocks.0.attn.img_qkv"       # 96 x 32
EIGHT_BITS = torch.zeros(96, 32).to(torch.float8_e4m3fn)
WRONG = {
    "missing.*txt_in.bias": {"txt_in.bias": None},
    "no place.*extra_thing": {"extra_thing": torch.ones(1)},
    "no place.*elsewhere": {"elsewhere.scale_weight": torch.ones(1)},
    r"proj_out.bias has shape \[5\], expected \[16\]": {"proj_out.bias": torch.ones(5)},
    # nvfp4: two numbers a byte. mxfp8: a scale for 32 numbers of a row, or here for 16.
    "img_qkv.weight is stored as U8.*nvfp4": {
        f"{MATRIX}.weight": torch.zeros(96, 16, dtype=torch.uint8),
        f"{MATRIX}.weight_scale_2": torch.ones(1)},
    "img_qkv.weight has 192 scales.*mxfp8": {
        f"{MATRIX}.weight": EIGHT_BITS,
        f"{MATRIX}.weight_scale": torch.ones(96, 2)},
    # As many scales as rows, but powers of two alone; or as many as columns.
    "img_qkv.weight has 96 scales stored as F8_E8M0.*mxfp8": {
        f"{MATRIX}.weight": EIGHT_BITS,
        f"{MATRIX}.weight_scale": torch.ones(96, 1).to(torch.float8_e8m0fnu)},
    "img_qkv.weight has 96 scales stored as U8.*mxfp8": {
        f"{MATRIX}.weight": EIGHT_BITS,
        f"{MATRIX}.weight_scale": torch.full((96, 1), 127, dtype=torch.uint8)},
    "to_out.0.weight has 32 scales": {
        "transformer_blocks.0.attn.to_out.0.weight": EIGHT_BITS[:32],
        "transformer_blocks.0.attn.to_out.0.weight_scale": torch.ones(1, 32)},
    r"comfy_quant says mxfp8, which is not read: take a file in bf16": {
        f"{MATRIX}.comfy_quant": torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)},
    r"stored as I8 \(int8\), which is not read: take a file in bf16": {
        f"{MATRIX}.weight": torch.zeros(96, 32, dtype=torch.int8),
        f"{MATRIX}.weight_scale": torch.ones(96, 1)},
    r"stored as U8 \(bitsandbytes' nf4\)": {
        f"{MATRIX}.weight": torch.zeros(1536, 1, dtype=torch.uint8),
        f"{MATRIX}.weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)},
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_tensors_are_named_in_one_line(words, saved):
    _, folder, file = saved
    state = load_file(file)
    for name, tensor in WRONG[words].items():
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    save_file(state, file)
    with pytest.raises(LensError, match=words) as error:
        load_pipeline(folder, parts=("transformer",))
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind, shape", [(torch.uint8, (32, 8)), (torch.int8, (32, 16))])
def test_a_packed_file_without_config_is_named_too(kind, shape, tmp_path):
    """Its shapes are not the model's, and tell nothing."""
    state = random_model().state_dict()
    state["img_in.weight"] = torch.zeros(shape, dtype=kind)
    save_file(state, tmp_path / "packed.safetensors")
    with pytest.raises(LensError, match="img_in.weight is stored as .*8 .*take a file in bf16"):
        load_transformer(tmp_path / "packed.safetensors")


def test_a_config_that_says_packed_is_refused_by_its_name(saved):
    _, folder, _ = saved
    config = json.loads((folder / "transformer" / "config.json").read_text())
    packed = {"quant_method": "sdnq", "weights_dtype": "uint4"}
    (folder / "transformer" / "config.json").write_text(
        json.dumps({**config, "quantization_config": packed}))
    with pytest.raises(LensError, match="packed by sdnq uint4, which is not read: take a file in"):
        load_transformer(folder)


def test_a_scale_counts_whatever_it_stands_beside(tmp_path):
    model = random_model()
    stored = {**model.state_dict(), "img_in.scale_weight": torch.tensor(2.0)}
    save_file(stored, tmp_path / "one.safetensors")
    loaded = load_transformer(tmp_path / "one.safetensors")
    assert torch.equal(loaded.img_in.weight, 2 * model.img_in.weight)
    assert loaded.img_in.weight.dtype == torch.float32


OTHER_FILES = {
    "one.gguf": (b"GGUF\x03\0\0\0" + bytes(50), "GGUF, which is not read: take a .safetensors"),
    "one.ckpt": (b"\x80\x02}q\0.", "pickle, which is not read as it can run code: take a .safe"),
    "one.pt": (b"PK\x03\x04" + bytes(50), "pickle, which is not read"),
    # Under another name.
    "a.safetensors": (b"GGUF\x03\0\0\0" + bytes(50), "GGUF"),
    "b.safetensors": (b"PK\x03\x04" + bytes(50), "pickle"),
    "c.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid x\n", "git lfs pull"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_of_another_format_is_named(name, tmp_path):
    content, words = OTHER_FILES[name]
    (tmp_path / "p" / "transformer").mkdir(parents=True)
    (tmp_path / "p" / "transformer" / name).write_bytes(content)
    for path in (tmp_path / "p" / "transformer" / name, tmp_path / "p"):
        for load in (load_transformer, read_metadata):
            with pytest.raises(LensError, match=words) as error:
                load(path)
            assert "\n" not in str(error.value)


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    """A safetensors file begins with that length in 8 bytes."""
    file, padding = tmp_path / "one.safetensors", ""
    model = random_model()
    while not file.exists() or file.read_bytes()[0] != 0x80:
        save_file(model.state_dict(), file, {"padding": padding})
        padding += 8 * "x"
    assert same(load_transformer(file), model)


def test_paths_without_weights(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", "no such thing", tmp_path / "a" / "b"):
        with pytest.raises(LensError, match="no weights"):
            load_pipeline(path)
    (tmp_path / "bad.safetensors").write_bytes(b"not weights")
    with pytest.raises(LensError, match="bad.safetensors"):
        load_transformer(tmp_path / "bad.safetensors")


def test_a_pickle_is_not_opened(saved):
    model, folder, file = saved
    torch.save(model.state_dict(), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(LensError, match="no weights in .*found 0 files"):
        load_pipeline(folder, parts=("transformer",))


def test_a_hub_id_is_asked_for_the_parts_alone(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repo, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns))
        if repo == "no/network":
            raise OSError("no network\nand more")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert fetch("owner/name", ("vae",)) == tmp_path
    assert fetch("owner/name@v1.0", ("vae", "text_encoder")) == tmp_path
    patterns = ["*.json", "vae/*", "tokenizer/*", "diffusion_pytorch_model*.safetensors"]
    assert asked == [
        ("owner/name", None, patterns),
        ("owner/name", "v1.0", ["*.json", "vae/*", "text_encoder/*", "tokenizer/*"]),
    ]
    with pytest.raises(LensError, match="hub could not give it: no network$"):
        fetch("no/network", ("vae",))
    # A mistyped name in a folder that is there is not asked of the hub.
    (tmp_path / "weights").mkdir()
    with pytest.raises(LensError, match="neither a local folder nor a hub id"):
        fetch("weights/tyo", ("vae",))
    assert len(asked) == 3


# --- The autoencoder and the text encoder ---------------------------------------------------------

def test_the_autoencoder_from_a_pipeline_its_folder_or_its_file(pipeline):
    folder, _, coder = pipeline
    for path in (folder, folder / "vae", folder / "vae" / WEIGHT_NAMES[0]):
        loaded = load_vae(path)
        assert equal(loaded.state_dict(), coder.state_dict())
        assert loaded.config == coder.config


@torch.no_grad()
def test_the_autoencoder_in_bf16_has_its_channels_last(pipeline):
    folder, *_ = pipeline
    plain, half = load_vae(folder, dtype=torch.float32), load_vae(folder, dtype=torch.bfloat16)
    last = torch.channels_last
    assert plain.decoder.conv_in.weight.is_contiguous()
    assert half.decoder.conv_in.weight.is_contiguous(memory_format=last)
    latent = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    picture, rounded = plain.decode(latent), half.decode(latent.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert (rounded - picture).norm() < 0.05 * picture.norm()


def test_an_autoencoder_that_does_not_say_its_size_is_known_by_its_shapes(tmp_path):
    coder = random_vae()
    state = coder.state_dict()
    save_file(state, tmp_path / "vae.safetensors")
    assert equal(load_vae(tmp_path / "vae.safetensors").state_dict(), state)
    del state["decoder.conv_out.bias"]
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(LensError, match="missing tensors: decoder.conv_out.bias"):
        load_vae(tmp_path / "vae.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(LensError, match="is not FLUX.2's autoencoder: missing tensors: bn."):
        load_vae(tmp_path / "vae.safetensors")


def test_an_autoencoder_that_cannot_be_is_one_line(pipeline):
    folder, *_ = pipeline
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps({**config, "norm_num_groups": 3}))
    with pytest.raises(LensError, match="bad config of an autoencoder"):
        load_vae(folder)


def drop_from_text_encoder(folder, name):
    file = folder / "text_encoder" / "model.safetensors"
    state = load_file(file)
    state.pop(name)
    save_file(state, file, {"format": "pt"})


def test_a_text_encoder_without_its_head_reads_but_does_not_write(pipeline):
    folder, *_ = pipeline
    whole = load_text_encoder(folder)
    drop_from_text_encoder(folder, "lm_head.weight")
    bare = load_text_encoder(folder)
    assert not hasattr(bare.model, "lm_head")
    expected, _ = whole.encode(["a red circle"])
    features, _ = bare.encode(["a red circle"])
    assert all(torch.equal(f, g) for f, g in zip(expected, features, strict=True))


def test_tensors_missing_in_a_text_encoder_are_not_made_up(pipeline):
    folder, *_ = pipeline
    drop_from_text_encoder(folder, "model.layers.1.self_attn.q_proj.weight")
    with pytest.raises(LensError, match="missing or misshapen.*layers.1.self_attn.q_proj.weight"):
        load_text_encoder(folder)


@pytest.mark.parametrize("kind, name", [
    (torch.int8, "weight_scale"), (torch.float8_e4m3fn, "scale_weight"), (torch.int8, "SCB")])
def test_a_packed_text_encoder_is_refused(kind, name, pipeline):
    folder, *_ = pipeline
    file = folder / "text_encoder" / "model.safetensors"
    state = load_file(file)
    layer = "model.layers.1.self_attn.q_proj"
    state[f"{layer}.weight"] = (100 * state[f"{layer}.weight"]).to(kind)
    state[f"{layer}.{name}"] = torch.tensor([0.01])
    save_file(state, file, {"format": "pt"})
    with pytest.raises(LensError, match=f"is packed in a format.*{name}.*take one in bf16"):
        load_text_encoder(folder)


def test_a_pickled_text_encoder_is_not_opened(pipeline):
    folder, *_ = pipeline
    file = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(file), folder / "text_encoder" / "pytorch_model.bin")
    file.unlink()
    named = "no weights.*pytorch_model.bin is a PyTorch pickle"
    with pytest.raises(LensError, match=named) as error:
        load_text_encoder(folder)
    assert "\n" not in str(error.value)


def test_a_text_encoder_of_another_kind_is_refused(pipeline):
    folder, *_ = pipeline
    (folder / "text_encoder" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(LensError, match="'t5': known are gpt_oss, qwen3"):
        load_text_encoder(folder)


def test_packed_experts_are_unpacked_with_a_warning_where_they_cannot_stay():
    with pytest.warns(UserWarning, match="42 GB instead of 14"):
        options = checkpoint.mxfp4_options("cpu")
    assert options["quantization_config"].dequantize


def test_packed_experts_stay_packed_where_the_kernels_are(monkeypatch):
    monkeypatch.setattr(checkpoint.importlib.util, "find_spec", lambda name: True)
    assert checkpoint.mxfp4_options("cuda") == {"device_map": "cuda"}
    with pytest.warns(UserWarning, match="42 GB"):
        checkpoint.mxfp4_options("cpu")


# --- Identities -----------------------------------------------------------------------------------

def test_identity_tells_weights_and_adapters_apart(saved, tmp_path):
    model, folder, file = saved
    first = identity(folder)
    assert first.startswith("p-")
    assert identity(folder) == first

    shutil.copytree(folder, tmp_path / "elsewhere" / "p")
    assert identity(tmp_path / "elsewhere" / "p") == first        # dates do not count
    add_lora(model, 4, 8)
    save_lora(model, folder)
    assert identity(folder) != first
    (folder / ADAPTER_NAME).unlink()
    assert identity(folder) == first
    save_pipeline(folder, random_model(), metadata={"seed": 8})
    assert identity(folder) != first


def test_identity_of_a_text_encoder_counts_its_date(pipeline):
    folder, *_ = pipeline
    first = identity(folder / "text_encoder", "text_encoder")
    os.utime(folder / "text_encoder" / "model.safetensors", (1, 1))
    assert identity(folder / "text_encoder", "text_encoder") != first


def test_identity_of_an_autoencoder_is_its_content(pipeline, tmp_path):
    folder, *_ = pipeline
    first = vae_identity(folder)
    os.utime(folder / "vae" / WEIGHT_NAMES[0], (1, 1))
    assert vae_identity(folder) == first
    save_pipeline(folder, vae=random_vae(seed=1))
    assert vae_identity(folder) != first


# --- Sharded models -------------------------------------------------------------------------------

@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_sharded_model_comes_back_plain_on_rank_zero_alone(lora_rank, one_process, tmp_path):
    from torch.distributed.fsdp import fully_shard

    targets = ("img_qkv",)
    model = random_model()
    if lora_rank:
        add_lora(model, lora_rank, lora_rank, targets)
        torch.nn.init.ones_(lora_parameters(model)[1])
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for module in (*model.transformer_blocks, model):
        fully_shard(module)
    assert hasattr(model.img_in.weight, "full_tensor")

    plain = unsharded(Run(tmp_path), model, lora_rank, targets)
    assert equal(plain.state_dict(), expected)
    assert type(plain) is lens.LensTransformer
    assert plain.config == model.config
    assert unsharded(Run(tmp_path, rank=1), model, lora_rank, targets) is None
    if lora_rank:
        save_lora(plain, tmp_path)
        assert (tmp_path / ADAPTER_NAME).exists()


def test_a_model_that_is_not_sharded_comes_back_itself(tmp_path):
    model = random_model()
    assert unsharded(Run(tmp_path), model) is model
    assert unsharded(Run(tmp_path, rank=1), model) is None


def test_a_large_part_is_announced_before_it_is_read(nano, monkeypatch, capsys):
    load_pipeline(nano)
    assert "reading" not in capsys.readouterr().err
    monkeypatch.setattr(checkpoint, "LARGE", 0)
    load_pipeline(nano)
    said = capsys.readouterr().err
    assert "reading the denoiser, 0.0 GB" in said
    assert "reading the text encoder, 0.0 GB" in said
