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
[checkpoint]
"""
import hashlib
import importlib.util
import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from kit.files import (
    LensError,
    error_context,
    file_hash,
    first_few,
    open_safetensors,
    read_json,
    require,
    unread_weights,
    write_json,
    write_safetensors,
)
from kit.fp8 import PackedLinear, e4m3, pack_blocks
from kit.lora import LORA_KEY, LORA_NAMES, LORA_TARGETS, add_lora, merge_lora
from kit.run import whole
from lens import DATE, SIZES, LensConfig, LensTransformer, TextEncoder, text_model_classes
from vae import LensVAE

PARTS = ("transformer", "vae", "text_encoder")
WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
ADAPTER_NAME = "adapter_model.safetensors"
INDEX_NAME = "model_index.json"
ROOT = Path(__file__).resolve().parent.parent      # of this repository


# --- Names of weights: a folder, a file or a hub id -----------------------------------------------

HUB_ID = re.compile(r"(?P<owner>[\w-][\w.-]*)/[\w.-]+")

# Where this repository keeps weights: "weights/toy" from another folder is a mistake, and not what
# somebody called "weights" has put on the hub.
OUR_FOLDERS = ("weights", "runs")


def fetch(path_or_repo, parts):
    """A local folder or file as it is, or the files of a hub id, downloaded once and cached.
    -> Path."""
    return local_path(path_or_repo) or from_hub(path_or_repo, files_of(parts))


def fetch_lora(path_or_repo):
    """The same for an adapter alone."""
    return local_path(path_or_repo) or from_hub(
        path_or_repo, ["adapter_config.json", "*.safetensors"])


def files_of(parts):
    """Patterns of the files of some parts in a repository of the hub."""
    patterns = ["*.json", *(f"{part}/*" for part in (*parts, "tokenizer"))]
    if "transformer" in parts:
        patterns.extend(LORA_NAMES)
    return patterns


def local_path(name):
    """The folder or file of this name; None where nothing is there and it can be a hub id."""
    path = expanded(name)
    if path.exists():
        return path
    elsewhere = ""
    if (ROOT / path).exists():
        elsewhere = f"; there is {ROOT / path}"
    require(may_be_hub_id(name), f"no weights at {name}: it is neither a local folder nor a hub id "
            f"like owner/name{elsewhere}")
    return None


def expanded(name):
    """The path of a name; the shell leaves a quoted ~ as it is."""
    return Path(os.path.expanduser(name))


def from_hub(hub_id, patterns):
    from huggingface_hub import snapshot_download

    with error_context(f"no local folder {hub_id}, and the hub could not give it"):
        return Path(snapshot_download(str(hub_id), allow_patterns=patterns))


def may_be_hub_id(name):
    """Whether a name that is no local path can be one of the hub's."""
    match = HUB_ID.fullmatch(str(name))
    if match is None:
        return False
    # A mistyped name in a folder that is there is no hub id.
    return match["owner"] not in OUR_FOLDERS and not Path(match["owner"]).is_dir()


def base_from(folder, name):
    """How model_index.json in `folder` names the base `name`: a local folder by the way from
    `folder`, so that both can be moved together; a hub id as it is; a file, which has one part
    alone, not at all (None)."""
    path = expanded(name)
    if path.is_file():
        return None
    if not path.exists():
        return str(name)
    # Links are followed first: `..` leads out of where a folder is, not out of a link to it.
    way = os.path.relpath(path.resolve(), Path(folder).resolve())
    if HUB_ID.fullmatch(way):
        way = f"./{way}"
    return way


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
    files = [file for file in sorted(path.glob("*.safetensors")) if file.name not in LORA_NAMES]
    require(len(files) == 1, f"no weights in {path}: expected one .safetensors file or shards "
            f"with an index, found {len(files)} files{unread_weights(path)}")
    return files


def with_bases(path, parts=()):
    """The folder `path`, the base that it names, that one's base, and so on.

    parts   what is downloaded of a base that is a hub id, beside its JSON files
    """
    folder, visited = Path(path), []
    while folder is not None:
        visited.append(folder.resolve())
        yield folder
        folder = base_of(folder, parts)
        in_circle = folder is not None and folder.resolve() in visited
        require(not in_circle, f"{path}: the bases in {INDEX_NAME} lead in a circle")


def base_of(folder, parts):
    """Where the base is that a folder names, or None if it names none."""
    named = pipeline_index(folder).get("base")
    if named is None:
        return base_of_adapter(folder, parts)

    way = expanded(named)
    by_link = os.path.normpath(folder.absolute() / way)            # as it was stored once
    for base in ((folder.resolve() / way).resolve(), Path(by_link)):
        if base.is_dir():
            return base
    if HUB_ID.fullmatch(named):
        return from_hub(named, files_of(parts))
    raise LensError(f"{folder}/{INDEX_NAME} names {named} as its base, but {by_link} is not there: "
                    "put it there, or write as \"base\" where it is now")


def base_of_adapter(folder, parts):
    """The base of an adapter without model_index.json, where PEFT's config or our notes name one
    that can be found; else None."""
    config = folder / "adapter_config.json"
    named = None
    if config.exists():
        named = read_json(config).get("base_model_name_or_path")
    if not named and adapter_files(folder):
        named = notes_in(adapter_files(folder)[0]).get("init")
    if named and (expanded(named).is_dir() or may_be_hub_id(named)):
        return fetch(named, parts)
    return None


def part_folder(path, part):
    """path/part; where that is not there, the folder of this part in the base that path names."""
    for folder in with_bases(path, (part,)):
        if (folder / part).is_dir():
            return folder / part
        # What a folder had and has no more is not what its base has.
        require(part not in pipeline_index(folder),
                f"no weights in {folder}: {INDEX_NAME} names a {part}, but {folder / part} is gone")
        lost = (folder / "adapter_config.json").exists() and not adapter_files(folder)
        require(part != "transformer" or not lost, f"no weights in {folder}: it has an "
                f"adapter_config.json, but no {ADAPTER_NAME}{unread_weights(folder)}")
    return Path(path) / part


def check_part(path, part):
    """LensError unless a pipeline has this part, with what to do."""
    require(path.is_dir(), f"{path} is one file, of one part: name a folder that has the parts "
            f"{', '.join(PARTS)} (docs/weights.md)")
    found = part_folder(path, part).is_dir()
    require(found or not adapter_files(path), f"{path} is an adapter whose base is not known: name "
            f"that with --weights and the adapter with --lora, or write \"base\" into "
            f"{path}/{INDEX_NAME}")
    require(found, f"no weights in {path}: expected {path}/{part}/*.safetensors")


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
    elif adapter_files(path):
        check_part(path, part)
    files = weight_files(path)
    if (path / "config.json").exists():
        return files, read_json(path / "config.json")
    with open_safetensors(files[0]) as handle:
        is_lora = any(LORA_KEY.fullmatch(name) for name in handle.keys())
    require(not is_lora, f"{files[0]} is a LoRA: name the weights that it changes with --weights, "
            "and it with --lora")
    with error_context(f"{files[0]}: bad config in its metadata"):
        return files, json.loads(notes_in(files[0]).get("config", "null"))


def has_parts(folder):
    """Whether a folder has an autoencoder and a text encoder of its own."""
    folder = Path(folder)
    has_vae = (folder / "vae" / "config.json").exists()
    return has_vae and (folder / "text_encoder" / "config.json").exists()


# --- What a checkpoint says of itself -------------------------------------------------------------

def notes_in(file):
    """The metadata of a safetensors file, {name: text}."""
    with open_safetensors(file) as handle:
        return handle.metadata() or {}


def adapter_files(folder):
    """The adapter in a pipeline's folder, as a list of one or none. Under diffusers' name it may
    also be an offer beside a whole model, and is then left alone."""
    folder = Path(folder)
    names = [ADAPTER_NAME]
    if not (folder / "transformer").is_dir():
        names = LORA_NAMES
    return [folder / name for name in names if (folder / name).exists()][:1]


def adapters_of(path):
    """The adapters in a pipeline's folder and in its bases down to the denoiser, whose comes first:
    the order in which they are merged."""
    files = []
    for folder in with_bases(path, ("transformer",)):
        files = adapter_files(folder) + files
        if (folder / "transformer").is_dir():
            break
    return files


def read_metadata(path):
    """The notes stored with a denoiser (command, seed, score, ...), and over them its adapter's."""
    files, _ = locate(path, "transformer")
    notes = notes_in(files[0])
    for file in adapters_of(path):
        own = notes_in(file)
        if "init" in own and not own.get("base", "").isdigit():
            own.pop("base", None)      # rl.py once noted scores under the name of the home size
        notes.update(own)
    return notes


def identity(folder, part="transformer"):
    """A short name for a part's weights: the folder's name, and a hash of what the files say of
    themselves (their first 64 KiB, which hold the header, name and size)."""
    files, _ = locate(folder, part)
    if part == "transformer":
        files = [*files, *adapters_of(folder)]

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
    files, _ = locate(fetch(path_or_repo, ("vae",)), "vae")
    return file_hash(files[0])


def content_hash(folder, part):
    """A hash of all that the files of a part hold, the same wherever they lie."""
    files, _ = locate(folder, part)
    hashes = [file_hash(file) for file in files]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()[:16]


# --- Filling a model with stored tensors ----------------------------------------------------------

# Single files of other tools write one of these before each tensor's name.
PREFIX = re.compile(r"^(model\.diffusion_model\.|diffusion_model\.|net\.)")

# fp8 files hold W / scale, and beside each `x.weight` its scale. Their other notes are for kernels
# that we do not use, but for comfy_quant, which names the format.
SCALE_ENDING = re.compile(r"\.(scale_weight|weight_scale)$")
SCALE_OF_PACKED = re.compile(r"scale|SCB|absmax|zero_point")
COMFY_QUANT = ".comfy_quant"
UNUSED_ENDINGS = ("scaled_fp8", ".scale_input", ".input_scale", COMFY_QUANT)

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")      # as safetensors names them
COUNTS = ("I64",)              # of the autoencoder's statistics; no packed format has these

# Packed formats, by what stands beside `x.weight`, or by its type.
MARKS = {
    "weight_scale_2": "nvfp4",
    "weight.quant_state.bitsandbytes__nf4": "bitsandbytes' nf4",
    "weight.quant_state.bitsandbytes__fp4": "bitsandbytes' fp4",
    "SCB": "bitsandbytes' int8",
    "zero_point": "SDNQ",
    "qzeros": "GPTQ or AWQ",
}
KINDS = {"I8": "int8", "F8_E8M0": "mxfp8"}
INSTEAD = "take a file in bf16, or in fp8 with one scale for each tensor or row"


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


def read_index(files, config=None):
    """-> (tensors, scales), {name: Stored} both, of files whose format is read. config: what they
    say of themselves, or None."""
    stored = index_files(files)
    tensors, scales = split_scales(stored)
    check_formats(files[0], config or {}, stored, tensors, scales)
    return tensors, scales


def fill(module, file, tensors, scales, device, dtype):
    """Fills a module that was built on the meta device with stored tensors; returns it.

    file: for the error alone. dtype None keeps what is stored (fp8 becomes bf16). Tensors are moved
    one by one, so the host's memory never holds a second copy. LensError names tensors that are
    missing, left over, or of another shape. The weight of a PackedLinear stays in 8 bits, if it is
    stored so.
    """
    wanted = module.state_dict()
    packed = {}                                    # {name of a weight: name of its rows' scales}
    for name, layer in module.named_modules():
        if isinstance(layer, PackedLinear):
            packed[f"{name}.weight"] = f"{name}.scale"
            del wanted[f"{name}.scale"]
    check_names(file, tensors.keys(), scales.keys(), wanted.keys())
    check_shapes(file, tensors, wanted)

    state = {}
    for name, where in tensors.items():
        if name in packed:
            value, row_scales = read_packed(where, scales.get(name))
            state[packed[name]] = row_scales.to(device)
        else:
            value = read_tensor(where, scales.get(name), dtype)
        state[name] = value.to(device)
    module.load_state_dict(state, assign=True)
    return module.eval()


def check_formats(file, config, stored, tensors, scales):
    """Refuses what would be misread: packed numbers, and scales of blocks within a row."""
    packed = config.get("quantization_config") or {}
    method = f"{packed.get('quant_method')} {packed.get('weights_dtype', '')}".strip()
    require(not packed, f"{file}: its config.json says that it is packed by {method}, which is not "
            f"read: {INSTEAD}")

    for name, where in stored.items():
        if name.endswith(COMFY_QUANT):
            with error_context(f"{file}: {name}"):
                comfy_format = json.loads(bytes(where.read().tolist()))["format"]
            require(comfy_format.startswith("float8_"),
                    f"{file}: {name} says {comfy_format}, which is not read: {INSTEAD}")

    for name, where in tensors.items():
        beside = name.removesuffix("weight")
        known = [MARKS[mark] for mark in MARKS if beside + mark in stored]
        known.append(KINDS.get(where.kind, "a packed format, say nvfp4 or uint4"))
        require(where.kind in FLOATS + COUNTS, f"{file}: {name} is stored as {where.kind} "
                f"({known[0]}), which is not read: {INSTEAD}")

    for name, scale in scales.items():
        if name in tensors:
            count = torch.Size(scale.shape).numel()
            rows = tensors[name].shape[:1]
            one_a_row = scale.shape in (rows, [*rows, 1])
            require(scale.kind in FLOATS and (count == 1 or one_a_row),
                    f"{file}: {name} has {count} scales stored as {scale.kind}: block formats "
                    f"(mxfp8, nvfp4) are not read: {INSTEAD}")


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
    if value.dtype in FP8 or scale is not None:
        kept = torch.bfloat16 if value.dtype in FP8 else value.dtype
        value = value.float()
        if scale is not None:
            one_a_row = (-1, *[1] * (value.dim() - 1))             # or one in all
            value = value * scale.read().float().reshape(one_a_row)
        return value.to(dtype or kept)
    if dtype is not None and value.is_floating_point():
        return value.to(dtype)
    return value


def read_packed(where, scale):
    """A stored matrix -> (its numbers in e4m3 [out, in], a scale a row [out] fp32). What is e4m3 in
    the file stays as it is, with its own scales."""
    if where.kind != "F8_E4M3":
        value, row_scales = e4m3(read_tensor(where, scale, torch.float32), dim=1)
        return value, row_scales[:, 0]
    value = where.read()
    row_scales = torch.ones(len(value))
    if scale is not None:
        row_scales = row_scales * scale.read().float().reshape(-1)     # one in all, or one a row
    return value, row_scales


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
    tensors, scales = read_index(files, stored_config)
    if config is None:
        if stored_config and "num_layers" in stored_config:
            config = LensConfig.from_dict(stored_config)
        else:
            shapes = {name: where.shape for name, where in tensors.items()}
            config = config_from_shapes(files[0], shapes)
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
    files, stored_config = locate(fetch(path, ("vae",)), "vae")
    tensors, scales = read_index(files, stored_config)
    config = {**SIZES["full"].vae, **(stored_config or {})}
    with error_context(f"{files[0]}: bad config of an autoencoder"), torch.device("meta"):
        vae = LensVAE(config)
    fill(vae, files[0], tensors, scales, device, dtype)
    if dtype == torch.bfloat16:
        # A picture of 96 to 512 pixels is decoded 1.2 to 1.4 times as fast, on a CPU too.
        vae.to(memory_format=torch.channels_last)
    return vae


def load_text_encoder(path, device="cpu", dtype=None, date=DATE):
    """The language model and its tokenizer, from a pipeline's folder; the network is not asked.

    MXFP4 experts stay packed (14 GB) where the kernels for that are installed.
    """
    import transformers  # here, because it takes seconds

    path = fetch(path, ("text_encoder",))
    check_part(path, "text_encoder")
    folder = part_folder(path, "text_encoder")
    tokenizer_folder = part_folder(path, "tokenizer")
    config = read_json(folder / "config.json")
    layers = layers_read_by_denoiser(path, config.get("hidden_size"))
    model_class, _ = text_model_classes(config.get("model_type"))

    options = dict(dtype=dtype or "auto", local_files_only=True, output_loading_info=True,
                   use_safetensors=True)
    if config.get("quantization_config", {}).get("quant_method") == "mxfp4":
        options.update(mxfp4_options(device))
    with error_context(f"cannot load the text encoder from {folder}"):
        model, info = model_class.from_pretrained(str(folder), **options)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
            str(tokenizer_folder), local_files_only=True)

    # Numbers whose scales nobody reads: transformers would go on with them as they are.
    scales = [name for name in info["unexpected_keys"] if SCALE_OF_PACKED.search(name)]
    require(not scales, f"{folder} is packed in a format that transformers does not know from its "
            f"config.json (it has {first_few(scales)}): take one in bf16, or MXFP4 with its config")
    # transformers fills missing tensors with random numbers and goes on: wrong pictures, no error.
    missing = {str(name) for name in info["missing_keys"]}
    misshapen = {str(name) for name in info["mismatched_keys"]}
    bad = (missing - {"lm_head.weight"}) | misshapen
    require(not bad, f"{folder}: missing or misshapen tensors: {first_few(bad)}")
    if "lm_head.weight" in missing:                # an encoder that was stored without its head
        model = model.model
    return TextEncoder(model.to(device), tokenizer, layers, date)


def layers_read_by_denoiser(path, width):
    """Which layers of the text encoder the pipeline's denoiser reads; where it does not say, those
    of the size in SIZES with an encoder of this width, else the released ones."""
    for folder in with_bases(path):                # a folder of parts alone has no denoiser
        beside = folder / "transformer" / "config.json"
        if beside.exists():
            return LensConfig.from_dict(read_json(beside)).selected_layer_index
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
    """-> (transformer, vae, text_encoder), from a local folder or a hub id.

    A part that is not asked for comes back as None. Load the encoder, encode, let it go, then load
    the denoiser: so a card needs to hold only the larger of the two.
    """
    path = fetch(path_or_repo, parts)
    if len(parts) > 1:                             # one alone may also be a file
        for part in parts:
            check_part(path, part)

    transformer = vae = text_encoder = None
    if "transformer" in parts:
        transformer = load_transformer(path, device, dtype)
    if "vae" in parts:
        vae = load_vae(path, device, dtype)
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
    base          where the parts are that folder does not hold, as `base_from` names it
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
