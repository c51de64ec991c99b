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

A fine-tuned checkpoint can be small: it holds its denoiser or an adapter alone, and names its base.
Only safetensors files are read: a pickle can run code. [checkpoint]
"""
import hashlib
import importlib.util
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from kit.files import (
    error_context,
    file_hash,
    first_few,
    open_safetensors,
    read_json,
    require,
    write_json,
    write_safetensors,
)
from kit.lora import LORA_TARGETS, add_lora, merge_lora
from kit.run import whole
from lens import DATE, SIZES, LensConfig, LensTransformer, TextEncoder, text_model_classes
from vae import LensVAE

PARTS = ("transformer", "vae", "text_encoder")
WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
ADAPTER_NAME = "adapter_model.safetensors"
INDEX_NAME = "model_index.json"


# --- Where things are -----------------------------------------------------------------------------

def weight_files(path, names=WEIGHT_NAMES):
    """The safetensors files of one part: a file itself; in a folder the shards that an index names,
    a file with a usual name, or the only file there."""
    path = Path(path)
    if path.is_file():
        return [path]

    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        with error_context(f"cannot read {indices[0]}"):
            shards = read_json(indices[0])["weight_map"].values()
        return sorted({path / Path(shard).name for shard in shards})

    for name in names:
        if (path / name).exists():
            return [path / name]
    files = sorted(path.glob("*.safetensors"))
    require(len(files) == 1, f"no weights in {path}: expected one .safetensors file or shards "
            f"with an index, found {len(files)} files")
    return files


def part_folder(path, part):
    """path/part; where that is not there, the folder of this part in the base that path names."""
    folder = Path(path)
    visited = []
    while not (folder / part).is_dir():
        base = pipeline_index(folder).get("base")
        if not base:
            break
        visited.append(folder.resolve())
        folder = (folder / base).resolve()
        require(folder not in visited, f"{path}: the bases in {INDEX_NAME} lead in a circle")
    return folder / part


def pipeline_index(folder):
    """What model_index.json says; {} where there is none."""
    index = folder / INDEX_NAME
    return read_json(index) if index.exists() else {}


def locate(path, part):
    """-> (files, config) of a part, from a pipeline's folder, the part's own folder, or a file.

    The config is the config.json beside the weights; else what our own files carry in their notes;
    else None.
    """
    path = Path(path)
    if path.is_dir() and part_folder(path, part).is_dir():
        path = part_folder(path, part)
    files = weight_files(path)
    if (path / "config.json").exists():
        return files, read_json(path / "config.json")
    with error_context(f"{files[0]}: bad config in its metadata"):
        return files, json.loads(notes_in(files[0]).get("config", "null"))


def has_parts(folder):
    """Whether a folder has an autoencoder and a text encoder of its own."""
    folder = Path(folder)
    has_vae = (folder / "vae" / "config.json").exists()
    return has_vae and (folder / "text_encoder" / "config.json").exists()


def fetch(path_or_repo, parts):
    """A local folder as it is, or the files of a hub id, downloaded once and cached. -> Path."""
    path = Path(path_or_repo).expanduser()
    if path.exists():
        return path

    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path_or_repo))
    # A mistyped name in a folder that is there is no hub id.
    require(hub_id and not path.parent.is_dir(), f"no weights at {path_or_repo}: it is neither "
            "a local folder nor a hub id like owner/name")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", *(f"{part}/*" for part in (*parts, "tokenizer"))]
    with error_context(f"no local folder {path_or_repo}, and the hub could not give it"):
        return Path(snapshot_download(str(path_or_repo), allow_patterns=wanted))


# --- What a checkpoint says of itself -------------------------------------------------------------

def notes_in(file):
    """The metadata of a safetensors file, {name: text}."""
    with open_safetensors(file) as handle:
        return handle.metadata() or {}


def adapter_files(folder):
    """The adapter in a pipeline's folder, as a list of one or none."""
    return sorted(Path(folder).glob(ADAPTER_NAME))


def read_metadata(path):
    """The notes stored with a denoiser (command, seed, score, ...), and over them its adapter's."""
    files, _ = locate(path, "transformer")
    notes = {}
    for file in (files[0], *adapter_files(path)):
        notes.update(notes_in(file))
    return notes


def identity(folder, part="transformer"):
    """A short name for a part's weights: the folder's name, and a hash of what the files say of
    themselves (their first 64 KiB, which hold the header, name and size)."""
    files, _ = locate(folder, part)
    if part == "transformer":
        files = [*files, *adapter_files(folder)]

    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            digest.update(f.read(1 << 16))
        status = file.stat()
        # Features are kept on disk under the encoder's identity; there the date counts too.
        date = status.st_mtime_ns if part == "text_encoder" else 0
        digest.update(str((file.name, status.st_size, date)).encode())
    return f"{Path(folder).name}-{digest.hexdigest()[:10]}"


def vae_identity(path_or_repo):
    """A hash of an autoencoder's file: what latents are kept under."""
    folder = part_folder(fetch(path_or_repo, ("vae",)), "vae")
    return file_hash(weight_files(folder)[0])


# --- Filling a model with stored tensors ----------------------------------------------------------

# Single files of other tools write one of these before each tensor's name.
PREFIX = re.compile(r"^(model\.diffusion_model\.|diffusion_model\.|net\.)")

# fp8 files hold W / scale, and beside each `x.weight` its scale. Their other notes are for kernels
# that we do not use.
SCALE_ENDING = re.compile(r"\.(scale_weight|weight_scale)$")
UNUSED_ENDINGS = ("scaled_fp8", ".scale_input", ".input_scale", ".comfy_quant")

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")      # as safetensors names them


@dataclass(frozen=True)
class Stored:
    """A tensor in an open file, not yet read."""
    handle: object             # the file
    key: str                   # the tensor's name there

    @property
    def shape(self):
        return list(self.handle.get_slice(self.key).get_shape())

    @property
    def kind(self):
        """Its type as safetensors names it, say BF16."""
        return self.handle.get_slice(self.key).get_dtype()

    def read(self):
        return self.handle.get_tensor(self.key)


def index_files(files):
    """{tensor name, without other tools' prefix: Stored} of all files."""
    stored = {}
    for file in files:
        handle = open_safetensors(file)
        for key in handle.keys():
            stored[PREFIX.sub("", key)] = Stored(handle, key)
    return stored


def split_scales(stored):
    """{name: Stored} -> (tensors, scales), both by the tensor's name; what we do not use is left
    out."""
    tensors, scales = {}, {}
    for name, where in stored.items():
        if SCALE_ENDING.search(name):
            scales[SCALE_ENDING.sub(".weight", name)] = where
        elif not name.endswith(UNUSED_ENDINGS):
            tensors[name] = where
    return tensors, scales


def fill(module, files, device, dtype):
    """Fills a module that was built on the meta device with the tensors in files; returns it.

    dtype None keeps what is stored (fp8 becomes bf16). Tensors are moved one by one, so the host's
    memory never holds a second copy. LensError names tensors that are missing, left over, of
    another shape, or in a format that is not read.
    """
    wanted = module.state_dict()
    tensors, scales = split_scales(index_files(files))
    check_formats(files[0], tensors, scales, wanted)
    check_names(files[0], tensors.keys(), scales.keys(), wanted.keys())
    check_shapes(files[0], tensors, wanted)

    state = {}
    for name, where in tensors.items():
        value = read_tensor(where, scales.get(name), dtype)
        state[name] = value.to(device)
    module.load_state_dict(state, assign=True)
    return module.eval()


def check_formats(file, tensors, scales, wanted):
    """Refuses what would be misread: packed integers, and scales of blocks within a row."""
    for name, where in tensors.items():
        if name in wanted and wanted[name].is_floating_point():
            require(where.kind in FLOATS, f"{file}: {name} is stored as {where.kind}: packed "
                    "formats (nvfp4, int8, uint4, ...) are not read; take a bf16 or fp8 file")

    for name, scale in scales.items():
        if name in tensors:
            count = torch.Size(scale.shape).numel()
            one_a_row = tensors[name].shape[:1]
            require(count in (1, *one_a_row), f"{file}: {name} has {count} scales: block formats "
                    "(mxfp8, nvfp4) are not read; take a bf16 file, or fp8 with a scale a tensor")


def check_names(file, stored, scaled, wanted):
    """stored, scaled, wanted: the names of tensors, of those with a scale, and of the model's."""
    missing = wanted - stored
    extra = (stored | scaled) - wanted
    require(not missing, f"{file}: missing tensors: {first_few(missing)}")
    require(not extra, f"{file}: tensors this model has no place for: {first_few(extra)}")


def check_shapes(file, tensors, wanted):
    for name, where in tensors.items():
        expected = list(wanted[name].shape)
        require(where.shape == expected,
                f"{file}: {name} has shape {where.shape}, expected {expected}")


def read_tensor(where, scale, dtype):
    """A stored tensor as dtype (None: as it is, fp8 as bf16); integers keep their type."""
    value = where.read()
    if value.dtype in FP8:
        value = value.float()
        if scale is not None:
            one_a_row = (-1, *[1] * (value.dim() - 1))             # or one in all
            value = value * scale.read().float().reshape(one_a_row)
        return value.to(dtype or torch.bfloat16)
    if dtype is not None and value.is_floating_point():
        return value.to(dtype)
    return value


# --- The parts ------------------------------------------------------------------------------------

def load_transformer(path, device="cpu", dtype=None, config=None):
    """The denoiser, from a pipeline's folder, its own folder, or a single file.

    dtype None keeps what is stored (fp8 becomes bf16). config None: what the files say of
    themselves, else what their shapes tell.
    """
    files, stored_config = locate(path, "transformer")
    if config is None:
        if stored_config and "num_layers" in stored_config:
            config = LensConfig.from_dict(stored_config)
        else:
            config = config_from_shapes(files[0], stored_shapes(files))
    with torch.device("meta"):
        model = LensTransformer(config)
    return fill(model, files, device, dtype)


def stored_shapes(files):
    """{tensor name: shape}"""
    return {name: where.shape for name, where in index_files(files).items()}


def config_from_shapes(file, shapes):
    """The LensConfig of a file that says nothing of itself; file: for the error alone.

    Its shapes tell all but how a head is split over the axes, and which layers of the text encoder
    were read; those are taken from the size in SIZES with such heads, or with such an encoder.
    """
    telling = {"img_in.weight", "transformer_blocks.0.attn.norm_q.weight", "txt_norm.0.weight"}
    missing = telling - shapes.keys()
    require(not missing, f"{file} is not a Lens denoiser: missing tensors: {first_few(missing)}")
    with error_context(f"{file} is not a Lens denoiser"):
        width, channels = shapes["img_in.weight"]
        (head_dim,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
        (text_width,) = shapes["txt_norm.0.weight"]

    block_names = [name for name in shapes if name.startswith("transformer_blocks.")]
    blocks = {name.split(".")[1] for name in block_names}
    layers_read = sum(name.startswith("txt_norm.") for name in shapes)

    known = [size.transformer for size in SIZES.values()]
    axes = {c.attention_head_dim: c.axes_dims_rope for c in known}
    layers = {c.enc_hidden_dim: c.selected_layer_index for c in known}.get(text_width, ())
    if len(layers) != layers_read:                 # an encoder that we do not know
        layers = tuple(range(layers_read))

    patch_size = LensConfig.patch_size
    return LensConfig(
        patch_size=patch_size,
        in_channels=channels,
        out_channels=channels // patch_size**2,
        num_layers=len(blocks),
        attention_head_dim=head_dim,
        num_attention_heads=width // head_dim,
        inner_dim=width,
        enc_hidden_dim=text_width,
        axes_dims_rope=axes.get(head_dim, ()),
        selected_layer_index=layers,
    )


def load_vae(path, device="cpu", dtype=None):
    """The autoencoder, from a pipeline's folder, its `vae` folder, or a single file. Where a file
    does not say its size, it is FLUX.2's. [checkpoint]"""
    files, stored_config = locate(path, "vae")
    config = {**SIZES["full"].vae, **(stored_config or {})}
    with error_context(f"{files[0]}: bad config of an autoencoder"), torch.device("meta"):
        vae = LensVAE(config)
    fill(vae, files, device, dtype)
    if dtype == torch.bfloat16:
        # A picture of 96 to 512 pixels is decoded 1.2 to 1.4 times as fast, on a CPU too.
        vae.to(memory_format=torch.channels_last)
    return vae


def load_text_encoder(path, device="cpu", dtype=None, date=DATE):
    """The language model and its tokenizer, from a pipeline's folder; the network is not asked.

    MXFP4 experts stay packed (14 GB) where the kernels for that are installed.
    """
    import transformers  # here, because it takes seconds

    folder = part_folder(path, "text_encoder")
    tokenizer_folder = part_folder(path, "tokenizer")
    layers = layers_read_by_denoiser(path)
    config = read_json(folder / "config.json")
    model_class, _ = text_model_classes(config.get("model_type"))

    options = dict(dtype=dtype or "auto", local_files_only=True, output_loading_info=True)
    if config.get("quantization_config", {}).get("quant_method") == "mxfp4":
        options.update(mxfp4_options(device))
    with error_context(f"cannot load the text encoder from {folder}"):
        model, info = model_class.from_pretrained(str(folder), **options)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
            str(tokenizer_folder), local_files_only=True)

    # transformers fills missing tensors with random numbers and goes on: wrong pictures, no error.
    missing = {str(name) for name in info["missing_keys"]}
    misshapen = {str(name) for name in info["mismatched_keys"]}
    bad = (missing - {"lm_head.weight"}) | misshapen
    require(not bad, f"{folder}: missing or misshapen tensors: {first_few(bad)}")
    if "lm_head.weight" in missing:                # an encoder that was stored without its head
        model = model.model
    return TextEncoder(model.to(device), tokenizer, layers, date)


def layers_read_by_denoiser(path):
    """Which layers of the text encoder the pipeline's denoiser reads; the released ones where it
    does not say."""
    beside = part_folder(path, "transformer") / "config.json"
    config = read_json(beside) if beside.exists() else {}
    return LensConfig.from_dict(config).selected_layer_index


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
    """-> (transformer, vae, text_encoder), from a local folder or a hub id.

    A part that is not asked for comes back as None. Load the encoder, encode, let it go, then load
    the denoiser: so a card needs to hold only the larger of the two.
    """
    path = fetch(path_or_repo, parts)
    for part in parts:
        found = part_folder(path, part).is_dir()
        require(found, f"no weights in {path}: expected {path}/{part}/*.safetensors")

    transformer = vae = text_encoder = None
    if "transformer" in parts:
        transformer = load_transformer(part_folder(path, "transformer"), device, dtype)
        if adapter_files(path):                    # the checkpoint is an adapter over its base
            merge_lora(transformer, path)
    if "vae" in parts:
        vae = load_vae(part_folder(path, "vae"), device, dtype)
    if "text_encoder" in parts:
        text_encoder = load_text_encoder(path, device, dtype, date)
    return transformer, vae, text_encoder


def save_pipeline(folder, transformer=None, vae=None, text_encoder=None, metadata=None, dtype=None,
                  weights=None, base=None, vae_metadata=None):
    """Writes the layout that load_pipeline reads; parts that are None stay as they are in folder.

    metadata      notes for read_metadata;  vae_metadata: notes in the autoencoder's file
    dtype         of the stored weights; None: as they are. fp8 stays fp8
    weights       a state dict to store instead of the denoiser's own: an average, gathered from
                  shards, or fp8 with its scales (`x.scale_weight` beside `x.weight`)
    base          where the parts are that folder does not hold, as a path from folder
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
        index["base"] = str(base)
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
