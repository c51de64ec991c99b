"""Tensors in safetensors files, in the names and number formats that tools write.

Read before: kit/files.py, lens.py's sizes. docs/weights.md has the table of formats.
"""
import json
import re
from dataclasses import dataclass, replace

import torch

from kit.files import error_context, first_few, open_safetensors, require
from kit.fp8 import PackedLinear, e4m3
from lens import SIZES, LensConfig

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
    flat: bool = False         # a 1 x 1 convolution [out, in, 1, 1] that is a matrix here

    @property
    def shape(self):
        shape = list(self.handle.get_slice(self.key).get_shape())
        return shape[:2] if self.flat else shape

    @property
    def kind(self):
        """Its type as safetensors names it, say BF16."""
        return self.handle.get_slice(self.key).get_dtype()

    def read(self):
        tensor = self.handle.get_tensor(self.key)
        return tensor.flatten(1) if self.flat else tensor


def index_files(files):
    """{tensor name, without other tools' prefix: Stored} of all files."""
    stored = {}
    for file in files:
        handle = open_safetensors(file)
        for key in handle.keys():
            name = PREFIX.sub("", key)
            require(name not in stored, f"{file}: {name} stands there twice, once as {key}")
            stored[name] = Stored(handle, key)
    return stored


# The autoencoder in FLUX.2's own code: what is called otherwise there, in this order. `up.` counts
# from the last stage, see `vae_names`.
VAE_NAMES = (
    (r"^(?:first_stage_model|vae)\.", ""),
    (r"^(?:en|de)coder\.((?:post_)?quant_conv)\.", r"\1."),
    (r"\.down\.(\d+)\.", r".down_blocks.\1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def vae_names(tensors):
    """{name: Stored} of an autoencoder's file, under the released names. Those of the diffusers
    layout, which are the released ones, come out as they are."""
    found = [re.search(r"(?:^|\.)decoder\.up\.(\d+)\.", name) for name in tensors]
    stages = [int(match[1]) for match in found if match]
    renamed = {}
    for name, where in tensors.items():
        for pattern, ours in VAE_NAMES:
            name = re.sub(pattern, ours, name)
        up = re.match(r"decoder\.up\.(\d+)\.(.*)", name)
        if up:
            name = f"decoder.up_blocks.{max(stages) - int(up[1])}.{up[2]}"
        in_attention = re.search(r"attentions\.0\.to_\w+(\.0)?\.weight$", name)
        flat = bool(in_attention) and len(where.shape) == 4
        renamed[name] = replace(where, flat=flat)
    return renamed


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
    if not isinstance(packed, dict):
        packed = {"quant_method": packed}
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


# --- Configs of files that say nothing of themselves ----------------------------------------------

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


def vae_config_from_shapes(file, shapes):
    """The same for an autoencoder. How many groups a norm has is not in its shapes: FLUX.2's number
    is taken, or that of the size in SIZES with such widths."""
    telling = {"encoder.conv_in.weight", "decoder.conv_in.weight", "bn.running_mean",
               "encoder.down_blocks.0.resnets.0.conv1.weight"}
    missing = telling - shapes.keys()
    require(not missing, f"{file} is not FLUX.2's autoencoder: missing tensors: "
            f"{first_few(missing)}")
    firsts = {name: shape for name, shape in shapes.items()
              if re.fullmatch(r"encoder\.down_blocks\.\d+\.resnets\.0\.conv1\.weight", name)}
    widths = [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0]
              for i in range(len(firsts))]
    layers = sum(bool(re.fullmatch(r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight", name))
                 for name in shapes)
    groups = {tuple(size.vae["block_out_channels"]): size.vae["norm_num_groups"]
              for size in SIZES.values()}
    return {
        "block_out_channels": widths,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "norm_num_groups": groups.get(tuple(widths), SIZES["full"].vae["norm_num_groups"]),
        "layers_per_block": layers,
    }


def text_config_from_shapes(file, shapes):
    """The config of a GPT-OSS language model, as transformers has it. What its shapes do not tell
    (how many experts a token asks, the rotary positions, the window) is that of GPT-OSS-20B."""
    shapes = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    telling = {"embed_tokens.weight", "layers.0.self_attn.q_proj.weight",
               "layers.0.self_attn.k_proj.weight", "layers.0.self_attn.sinks",
               "layers.0.mlp.router.weight", "layers.0.mlp.experts.gate_up_proj_bias"}
    missing = telling - shapes.keys()
    require(not missing, f"{file} has no config.json beside it and is not GPT-OSS: missing "
            f"tensors: {first_few(missing)}")
    with error_context(f"{file} is not GPT-OSS"):
        vocabulary, width = shapes["embed_tokens.weight"]
        (heads,) = shapes["layers.0.self_attn.sinks"]
        head_dim = shapes["layers.0.self_attn.q_proj.weight"][0] // heads
        experts, twice_inner = shapes["layers.0.mlp.experts.gate_up_proj_bias"]
    config = {
        **SIZES["full"].text_encoder,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": len({name.split(".")[1] for name in shapes
                                  if name.startswith("layers.")}),
        "num_attention_heads": heads,
        "num_key_value_heads": shapes["layers.0.self_attn.k_proj.weight"][0] // head_dim,
        "head_dim": head_dim,
        "num_local_experts": experts,
        "intermediate_size": twice_inner // 2,
    }
    if config["vocab_size"] <= config["pad_token_id"]:
        config["pad_token_id"] = None
    if any(name.endswith("_blocks") for name in shapes):
        config["quantization_config"] = {"quant_method": "mxfp4"}
    return config
