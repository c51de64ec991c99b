"""Weights on disk: the released layout in and out, single files of other tools, hub ids.

Read before: lens.py, vae.py, kit/files.py; kit/lora.py for checkpoints that are adapters.

A pipeline is a folder, and each part of it has a folder of its own:

    DIR/model_index.json        which parts there are; `base`: where those are that DIR lacks
    DIR/transformer/            the denoiser: config.json and one .safetensors file, or several
                                shards with an index
    DIR/vae/                    the autoencoder, likewise
    DIR/text_encoder/           the language model, as transformers stores it
    DIR/tokenizer/
    DIR/adapter_model.safetensors       a LoRA of the denoiser, merged when DIR is loaded

A fine-tuned checkpoint can be small: it holds its denoiser or an adapter alone, and names its base:
the way to a folder, from DIR, or a hub id. Only safetensors files are read: a pickle can run code.
"""
import contextlib
import importlib.util
import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from kit.files import error_context, first_few, require, write_json, write_safetensors
from kit.fp8 import pack_blocks
from kit.lora import LORA_TARGETS, add_lora, merge_lora
from kit.places import (
    INDEX_NAME,
    PARTS,
    TELLING,
    WEIGHT_NAMES,
    adapters_of,
    check_parts,
    config_in,
    fetch,
    fetch_places,
    find_tokenizer,
    from_hub,
    gather,
    locate,
    own_folder,
    part_folder,
    pipeline_index,
    with_bases,
)
from kit.run import whole
from kit.stored import (
    FP8,
    SCALE_OF_PACKED,
    check_formats,
    config_from_shapes,
    fill,
    index_files,
    read_index,
    split_scales,
    text_config_from_shapes,
    vae_config_from_shapes,
    vae_names,
)
from lens import DATE, SIZES, LensConfig, LensTransformer, TextEncoder, text_model_classes
from vae import LensVAE

# --- The parts ------------------------------------------------------------------------------------

def load_transformer(path, device="cpu", dtype=None, config=None, packed=False):
    """The denoiser, from a pipeline's folder with its adapters merged, from its own folder, or a
    single file; or from a hub id.

    dtype None keeps what is stored (fp8 becomes bf16). config None: what the files say of
    themselves, else what their shapes tell. packed: the blocks' matrices are kept in 8 bits, see
    kit.fp8.pack_blocks.
    """
    path = fetch(path, ("transformer",))
    files, stored_config = locate(path, "transformer")
    announce("the denoiser", files)
    tensors, scales = read_index(files, stored_config)
    if config is None:
        config = denoiser_config(files, stored_config, tensors)
    with torch.device("meta"):
        model = LensTransformer(config)
    adapters = adapters_of(path)
    if packed and not adapters:
        pack_blocks(model)                         # before it is filled: never larger than it stays
    fill(model, files[0], tensors, scales, device, dtype)
    for adapter in adapters:
        merge_lora(model, adapter)
    if packed and adapters:
        pack_blocks(model)
    return model


def read_denoiser_config(path):
    """The LensConfig of a denoiser, named as for `load_transformer`. Its weights are opened only
    where no config.json says it."""
    path = fetch(path, ("transformer",))
    for folder in (part_folder(path, "transformer"), path):
        beside = config_in(folder)
        if TELLING["transformer"] in beside:
            return LensConfig.from_dict(beside)
    files, stored_config = locate(path, "transformer")
    tensors, _ = read_index(files)
    return denoiser_config(files, stored_config, tensors)


def denoiser_config(files, stored_config, tensors):
    if stored_config:                              # locate has seen that it is a denoiser's
        return LensConfig.from_dict(stored_config)
    return config_from_shapes(files[0], {name: where.shape for name, where in tensors.items()})


LARGE = 2**30                # bytes: what is larger is announced before it is read


def announce(what, files):
    """Says that a large part is read, which may take minutes."""
    size = sum(file.stat().st_size for file in files if file.exists())
    if size > LARGE:
        print(f"reading {what}, {size / 1e9:.1f} GB", file=sys.stderr)


def load_vae(path, device="cpu", dtype=None):
    """The autoencoder, from a pipeline's folder, its `vae` folder, or a single file, also with the
    tensor names of FLUX.2's own code; or from a hub id."""
    files, config = locate(fetch(path, ("vae",)), "vae")
    tensors, scales = read_index(files, config)
    tensors = vae_names(tensors)
    if config is None:
        config = vae_config_from_shapes(files[0], {n: where.shape for n, where in tensors.items()})
    with error_context(f"{files[0]}: bad config of an autoencoder"), torch.device("meta"):
        vae = LensVAE(config)
    fill(vae, files[0], tensors, scales, device, dtype)
    if dtype == torch.bfloat16:
        # A picture of 96 to 512 pixels is decoded 1.2 to 1.4 times as fast, on a CPU too.
        vae.to(memory_format=torch.channels_last)
    return vae


def load_text_encoder(path, device="cpu", dtype=None, date=DATE, layers=None):
    """The language model and its tokenizer, from a pipeline's folder, a stock language model's, or
    a single file; or from a hub id.

    MXFP4 experts stay packed (14 GB) where the kernels for that are installed.
    layers   that the denoiser reads; None: what the denoiser beside it says
    """
    import transformers  # here, because it takes seconds

    path = fetch(path, ("text_encoder",))
    files, config = locate(path, "text_encoder")
    alone = config is None                         # a file without its config
    if alone:
        require(len(files) == 1, f"{files[0].parent}: shards without their config.json; put it "
                "beside them")
        stored = index_files(files)
        shapes = {name: where.shape for name, where in stored.items()}
        config = text_config_from_shapes(files[0], shapes)
        if "quantization_config" not in config:
            check_formats(files[0], config, stored, *split_scales(stored))
    if layers is None:
        layers = layers_read_by_denoiser(path, config.get("hidden_size"))
    model_class, _ = text_model_classes(config.get("model_type"))

    options = dict(dtype=dtype or "auto", local_files_only=True, output_loading_info=True,
                   use_safetensors=True)
    packed = config.get("quantization_config") or {}
    if packed.get("quant_method") == "mxfp4":
        options.update(mxfp4_options(device))
    announce("the text encoder", files)
    with error_context(f"cannot load the text encoder from {files[0].parent}"):
        with as_folder(files, config) as folder:
            model, info = model_class.from_pretrained(folder, **options)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
            str(tokenizer_folder(path, files, config, alone)), local_files_only=True)
    require(len(tokenizer) <= config["vocab_size"], f"{files[0].parent}: its tokenizer has "
            f"{len(tokenizer)} tokens, the model {config['vocab_size']}: one of them is another's")

    # Numbers whose scales nobody reads: transformers would go on with them as they are.
    scales = [name for name in info["unexpected_keys"] if SCALE_OF_PACKED.search(name)]
    require(not scales, f"{files[0].parent} is packed in a format that transformers does not know "
            f"from its config.json (it has {first_few(scales)}): take one in bf16, or MXFP4 with "
            "its config")
    # transformers fills missing tensors with random numbers and goes on: wrong pictures, no error.
    missing = {str(name) for name in info["missing_keys"]}
    misshapen = {str(name) for name in info["mismatched_keys"]}
    bad = (missing - {"lm_head.weight"}) | misshapen
    require(not bad, f"{files[0].parent}: missing or misshapen tensors: {first_few(bad)}")
    extra = [str(name) for name in info["unexpected_keys"]]
    require(not extra, f"{files[0].parent}: tensors this model has no place for: "
            f"{first_few(extra)}")
    if "lm_head.weight" in missing:                # an encoder that was stored without its head
        model = model.model
    return TextEncoder(model.to(device), tokenizer, layers, date)


@contextlib.contextmanager
def as_folder(files, config):
    """A folder as transformers reads it, for as long as the body runs: the files' own; for a single
    file without its config.json beside it one that is made."""
    own = files[0].parent
    usual = len(files) > 1 or files[0].name == "model.safetensors"
    if usual and config_in(own) == config:
        yield str(own)
        return
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "model.safetensors").symlink_to(files[0].resolve())
        write_json(Path(made) / "config.json", config)
        yield made


# Where the tokenizer is, of a language model that came as a file alone.
TOKENIZERS = {"gpt_oss": "openai/gpt-oss-20b", "qwen3": "Qwen/Qwen3-0.6B"}


def tokenizer_folder(path, files, config, alone):
    """The folder of tokenizer.json, see `find_tokenizer`. A file alone may have none; then it is
    the one on the hub."""
    found = find_tokenizer(path)
    if found is not None:
        return found.parent
    require(alone, f"no tokenizer.json for {path}: expected it in tokenizer/, or beside {files[0]}")
    hub_id = TOKENIZERS[config["model_type"]]
    print(f"note: no tokenizer.json beside {files[0]}: that of {hub_id} is taken", file=sys.stderr)
    return from_hub(hub_id, ["tokenizer*.json", "special_tokens_map.json"])


def layers_read_by_denoiser(path, width):
    """Which layers of the text encoder the pipeline's denoiser reads; where it does not say, those
    of the size in SIZES with an encoder of this width, else the released ones."""
    for folder in with_bases(path):                # a folder of parts alone has no denoiser
        own = own_folder(folder, "transformer")
        if own is not None and own.is_dir():       # a file is the language model itself
            return read_denoiser_config(own).selected_layer_index
    layers = {c.enc_hidden_dim: c.selected_layer_index
              for c in (size.transformer for size in SIZES.values())}
    return layers.get(width, LensConfig().selected_layer_index)


def mxfp4_options(device):
    """What transformers must be told to load 4-bit experts: packed if it can be, else unpacked."""
    import transformers

    needed = ("accelerate", "triton", "kernels")
    installed = all(importlib.util.find_spec(name) for name in needed)
    if installed and torch.device(device).type == "cuda":
        return {"device_map": str(device)}

    warnings.warn("the text encoder's MXFP4 weights are unpacked to bf16: about 42 GB instead of "
                  "14 for GPT-OSS-20B (they stay packed on CUDA with accelerate, triton and "
                  "kernels installed)", stacklevel=3)
    # Asked for by name: left to itself, transformers stops here and wants accelerate.
    return {"quantization_config": transformers.Mxfp4Config(dequantize=True)}


# --- Pipelines ------------------------------------------------------------------------------------

def load_pipeline(path_or_repo, device="cpu", dtype=None, parts=PARTS, date=DATE):
    """-> (transformer, vae, text_encoder), from a local folder, a hub id, or Places of each part.

    A part that is not asked for comes back as None. Load the encoder, encode, let it go, then load
    the denoiser: so a card needs to hold only the larger of the two.
    """
    places = fetch_places(gather(path_or_repo), parts)
    check_parts(places, parts)

    transformer = vae = text_encoder = None
    if "transformer" in parts:
        transformer = load_transformer(places.transformer, device, dtype)
    if "vae" in parts:
        vae = load_vae(places.vae, device, dtype)
    if "text_encoder" in parts:
        text_encoder = load_text_encoder(places.text_encoder, device, dtype, date)
        names = [str(places.of(part)) for part in PARTS]
        if names[0] not in names[1:]:              # a denoiser apart: it says what it reads
            config = read_denoiser_config(places.transformer)
            if config.enc_hidden_dim == text_encoder.model.config.hidden_size:
                text_encoder.layers = config.selected_layer_index
    return transformer, vae, text_encoder


def check_fit(places):
    """LensError where local parts are not of one model, as far as their configs say."""
    config = read_denoiser_config(places.transformer)
    _, of_vae = locate(places.vae, "vae")
    channels = 4 * (of_vae or {}).get("latent_channels", config.in_channels // 4)
    require(channels == config.in_channels, f"{places.vae} makes tokens of {channels} channels, "
            f"the denoiser of {places.transformer} takes {config.in_channels}: they are not of one "
            "model")
    _, of_text = locate(places.text_encoder, "text_encoder")
    width = (of_text or {}).get("hidden_size", config.enc_hidden_dim)
    require(width == config.enc_hidden_dim, f"{places.text_encoder} has features {width} wide, the "
            f"denoiser of {places.transformer} reads {config.enc_hidden_dim}: they are not of one "
            "model")


def save_pipeline(folder, transformer=None, vae=None, text_encoder=None, metadata=None, dtype=None,
                  weights=None, base=None, vae_metadata=None):
    """Writes the layout that load_pipeline reads; parts that are None stay as they are in folder.

    metadata      notes for read_metadata;  vae_metadata: notes in the autoencoder's file
    dtype         of the stored weights; None: as they are. fp8 stays fp8
    weights       a state dict to store instead of the denoiser's own: an average, gathered from
                  shards, or fp8 with its scales (`x.scale_weight` beside `x.weight`)
    base          where the parts are that folder does not hold, as `base_from` names it: a text,
                  or {part: text}
    """
    folder = Path(folder)
    index = {"_class_name": "LensPipeline", **pipeline_index(folder)}

    if transformer is not None:
        state = transformer.state_dict() if weights is None else weights
        attached = any(".lora_" in name for name in state)
        require(not attached, "the model has LoRA adapters attached: save them with save_lora, "
                "or merge them with merge_lora first")
        title = "LensTransformer2DModel"
        config = transformer.config.to_dict()
        save_part(folder / "transformer", title, config, state, dtype=dtype, notes=metadata)
        index["transformer"] = ["lens", title]

    if vae is not None:
        title = "AutoencoderKLFlux2"
        config = diffusers_vae_config(vae)
        save_part(folder / "vae", title, config, vae.state_dict(), dtype=dtype, notes=vae_metadata)
        index["vae"] = ["lens", title]

    if text_encoder is not None:
        with error_context(f"cannot write the text encoder to {folder}"):
            text_encoder.model.save_pretrained(folder / "text_encoder")
            text_encoder.tokenizer.save_pretrained(folder / "tokenizer")
        index["text_encoder"] = ["transformers", type(text_encoder.model).__name__]
        index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]

    title = "FlowMatchEulerDiscreteScheduler"
    write_json(folder / "scheduler" / "scheduler_config.json", {
        "_class_name": title,
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": True,
        "time_shift_type": "exponential",
    })
    index["scheduler"] = ["diffusers", title]

    if base:
        index["base"] = base
    write_json(folder / INDEX_NAME, index)         # last: a folder with an index is whole


def save_part(folder, title, config, state, dtype, notes):
    """Writes one part: its weights, with config and notes in the file too, and config.json."""
    tensors = {name: stored_as(name, tensor, dtype) for name, tensor in state.items()}
    # The config comes last: notes read from another file may hold that one's.
    notes = {**(notes or {}), "format": "pt", "config": json.dumps(config)}
    write_safetensors(folder / WEIGHT_NAMES[0], tensors, notes)
    write_json(folder / "config.json", {"_class_name": title, **config})


def stored_as(name, tensor, dtype):
    """A tensor as dtype, but for what must keep its own: integers, fp8, and the autoencoder's
    statistics (`bn.`), by which every token is divided."""
    is_fp8 = tensor.dtype in FP8
    keeps = is_fp8 or not tensor.is_floating_point() or name.startswith("bn.")
    if dtype is None or keeps:
        return tensor
    return tensor.to(dtype)


def diffusers_vae_config(vae):
    """The fields of the released autoencoder's config.json, so that what reads that one reads ours
    [checkpoint]."""
    levels = len(vae.config["block_out_channels"])
    return {
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "batch_norm_eps": 1e-4,
        "patch_size": [2, 2],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        **vae.config,
    }


# --- From a sharded model to a plain one ----------------------------------------------------------

def unsharded(run, model, lora_rank=0, lora_targets=LORA_TARGETS):
    """A denoiser that FSDP has sharded, as a plain model on rank 0's device; None on other ranks.

    A model that is not sharded comes back itself, on rank 0. All ranks must call this at once.
    lora_rank    of the adapter attached to the model, whose alpha is its rank too; 0: none
    """
    sharded = any(hasattr(p, "full_tensor") for p in model.parameters())
    if not sharded:
        return model if run.rank == 0 else None

    state = {}
    for name, tensor in model.state_dict().items():
        gathered = whole(tensor.detach())          # every rank takes part, rank 0 keeps it
        if run.rank == 0:
            state[name] = gathered.cpu()
    if run.rank > 0:
        return None

    with torch.device("meta"):
        plain = LensTransformer(model.config)
        if lora_rank:
            add_lora(plain, lora_rank, lora_rank, lora_targets)
    plain.load_state_dict(state, assign=True)
    return plain.to(run.device)
