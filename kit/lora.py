"""LoRA: a low-rank change B A beside a frozen weight, as a layer to train and as a file.

Read before: the denoiser in lens.py, kit/files.py.
"""
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.files import (
    error_context,
    first_few,
    open_safetensors,
    read_object,
    require,
    unread_weights,
    write_json,
    write_safetensors,
)
from kit.fp8 import PackedLinear, packed_product

# Attention and MLPs. [ours]
LORA_TARGETS = ("img_qkv", "txt_qkv", "to_out.0", "to_add_out", "w1", "w2", "w3")


# --- Layers to train ------------------------------------------------------------------------------

class LoRALinear(nn.Module):
    """y = W x + b + strength * alpha / rank * B A x.

    Holds several adapters by name on one base ("new" and "old" in RL), of which one is active, or
    none. `weight` and `bias` stay where they were: the base keeps its names in the state dict. The
    base may be of any type, also a PackedLinear.
    """

    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight                               # [out, in]
        self.bias = linear.bias
        self.scale = None                                         # of a PackedLinear's rows, [out]
        if isinstance(linear, PackedLinear):
            self.scale = linear.scale
        self.lora_A = nn.ParameterDict()                          # {adapter: [rank, in]}
        self.lora_B = nn.ParameterDict()                          # {adapter: [out, rank]}
        self.alpha = {}                                           # {adapter: number}
        self.strength = 1.0
        self.active = None                                        # the adapter at work, or None

    def add(self, name, rank, alpha, generator=None):
        """Adds an adapter; it starts as no change, because B starts at zero."""
        rows, columns = self.weight.shape
        bound = columns**-0.5
        a = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)

        # fp32 even on a bf16 base: the steps of training are too small for bf16.
        device = self.weight.device
        self.lora_A[name] = nn.Parameter(a.to(device))
        self.lora_B[name] = nn.Parameter(torch.zeros(rows, rank, device=device))
        self.alpha[name] = alpha

    def forward(self, x):                                         # [..., in]
        if self.scale is None:
            y = F.linear(x, self.weight, self.bias)               # [..., out]
        else:
            y = packed_product(x, self.weight, self.scale, self.bias)
        if self.active is None:
            return y
        a = self.lora_A[self.active]                              # [rank, in]
        b = self.lora_B[self.active]                              # [out, rank]
        rank = a.shape[0]
        scale = self.strength * self.alpha[self.active] / rank
        return y + scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))


def lora_layers(model, name):
    """{layer name: LoRALinear} of all layers that hold the adapter `name`."""
    return {layer_name: layer for layer_name, layer in model.named_modules()
            if isinstance(layer, LoRALinear) and name in layer.lora_A}


def named_lora(model, name="default"):
    """{name: parameter} of one adapter, A and B of layer by layer. The names do not tell which
    adapter: those of two adapters on one model are the same."""
    named = {}
    for path, layer in lora_layers(model, name).items():
        named[f"{path}.lora_A"] = layer.lora_A[name]
        named[f"{path}.lora_B"] = layer.lora_B[name]
    return named


def lora_parameters(model, name="default"):
    """[A, B, A, B, ...] of one adapter, layer by layer."""
    return list(named_lora(model, name).values())


def set_lora(model, name, strength=1.0):
    """Makes one adapter the active one; None: the base model alone."""
    # A typo must not run the base model.
    known = name is None or lora_layers(model, name)
    require(known, f"the model has no LoRA adapter {name!r}")
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.active = name if name in layer.lora_A else None
            layer.strength = strength


def add_lora(model, rank, alpha, targets=LORA_TARGETS, name="default", generator=None):
    """Freezes the base, adds an adapter to each linear layer whose name ends in one of targets, and
    makes it the active one. -> how many layers got one."""
    # Layers that get no gradient are left out: to train them would do nothing.
    unread = {parameter.rpartition(".")[0] for parameter in model.unread()}
    endings = tuple(f".{target}" for target in targets)

    chosen = []
    for layer_name, layer in model.named_modules():
        linear = isinstance(layer, (nn.Linear, PackedLinear, LoRALinear))
        if linear and layer_name not in unread and f".{layer_name}".endswith(endings):
            chosen.append(layer_name)
    require(chosen, f"no linear layer matches the LoRA targets {', '.join(targets)}")

    for layer_name in chosen:
        layer = model.get_submodule(layer_name)
        if not isinstance(layer, LoRALinear):                     # no adapter was here before
            layer = LoRALinear(layer)
            model.set_submodule(layer_name, layer)
        layer.add(name, rank, alpha, generator)

    for parameter_name, parameter in model.named_parameters():
        if "lora_" not in parameter_name:
            parameter.requires_grad_(False)
    set_lora(model, name)
    return len(chosen)


# --- Files ----------------------------------------------------------------------------------------

def save_lora(model, folder, name="default", metadata=None):
    """Writes an adapter in PEFT's format, which merge_lora reads back, and most other tools."""
    layers = lora_layers(model, name)
    require(layers, f"the model has no LoRA adapter {name!r} to save")

    tensors = {}
    for layer_name, layer in layers.items():
        tensors[f"base_model.model.{layer_name}.lora_A.weight"] = layer.lora_A[name]
        tensors[f"base_model.model.{layer_name}.lora_B.weight"] = layer.lora_B[name]

    first = next(iter(layers.values()))
    scale = {"r": first.lora_A[name].shape[0], "lora_alpha": first.alpha[name]}
    config = {"peft_type": "LORA", **scale, "bias": "none", "target_modules": sorted(layers)}
    write_json(Path(folder) / "adapter_config.json", config)
    # In the file too, which may be copied alone. Last: notes read from another file hold its own.
    notes = {**(metadata or {}), **scale}
    write_safetensors(Path(folder) / "adapter_model.safetensors", tensors, notes)


LORA_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")

# A layer's name, then what is stored of it. PEFT: `.lora_A.weight`, `.lora_B.weight`, sometimes
# with `default`, the adapter's name, between; sd-scripts: `.lora_down.weight`, `.lora_up.weight`,
# `.alpha`.
LORA_KEY = re.compile(
    r"(?P<layer>.+?)\.(?:lora_(?P<matrix>A|B|down|up)(?:\.default)?\.weight|alpha)")

# What tools put before a layer's name: PEFT, ComfyUI, diffusers; and sd-scripts, which also writes
# underscores for the dots in it.
PEFT_PREFIX = "base_model.model."
TOOL_PREFIX = re.compile(
    r"^(base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer\.)+")
SD_SCRIPTS_PREFIX = "lora_unet_"

# Adapters of other kinds, by what stands in their keys.
OTHER_KINDS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "vera_": "VeRA",
    ".diff_b": "whole changes",
    ".diff": "whole changes",
    "lora_B.bias": "a LoRA with biases",
}

# Settings of PEFT's config under which the change is not strength * alpha / rank * B A. With these
# starts, PEFT takes a part out of the base, which ours still has.
OTHER_SETTINGS = ("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens",
                  "layer_replication")
OTHER_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass
class LoraPart:
    """What a LoRA file holds for one layer."""
    a: Tensor = None           # [rank, in] fp32
    b: Tensor = None           # [out, rank] fp32
    alpha: float = None        # None: the rank, so that B A is added as it is
    rank: int = None           # that PEFT's config says, which must be that of a and b
    root: bool = False         # divide by the root of the rank ("rank-stabilised LoRA")
    path: str = ""             # the layer's name in the file, which PEFT's patterns are about

    def change(self, strength):
        """[out, in] fp32: what the weight gains."""
        rank = self.a.shape[0]
        alpha = rank if self.alpha is None else self.alpha
        divisor = rank**0.5 if self.root else rank
        return strength * alpha / divisor * (self.b @ self.a)


@torch.no_grad()
def merge_lora(model, path, strength=1.0):
    """Merges a LoRA into the weights: W += strength * alpha / rank * B A. path: a file or a folder.

    -> how many layers it changed. Reads the names of PEFT, of ComfyUI (`diffusion_model.`) and of
    sd-scripts (`lora_unet_...`). LensError where the file does not fit the model; all is checked
    before anything is changed.
    """
    layers = {name: layer for name, layer in model.named_modules()
              if isinstance(layer, (nn.Linear, LoRALinear))}
    file = lora_file(path)
    parts, unmatched = read_lora(file, layers)
    check_lora(file, parts, unmatched, layers)

    for name in parts:
        require(layers[name].weight.element_size() > 1, f"{file}: {name} is packed in 8 bits, and "
                "nothing can be merged into it: load the base in bf16")
    for name, part in parts.items():
        weight = layers[name].weight
        change = part.change(strength).to(weight.device)
        weight.copy_(weight.float() + change)
    return len(parts)


def lora_file(path):
    """A file itself; in a folder one of the usual names, or the only file there."""
    path = Path(path)
    if path.is_file():
        return path
    for name in LORA_NAMES:
        if (path / name).exists():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    require(len(files) == 1, f"no LoRA in {path}: expected one .safetensors file, found "
            f"{len(files)}{unread_weights(path)}")
    return files[0]


def read_lora(file, layers):
    """-> ({layer name: LoraPart}, [keys that match none of layers]). Of the tensors nothing is
    checked yet."""
    underscored = {name.replace(".", "_"): name for name in layers}
    parts, unmatched = {}, []
    with error_context(f"cannot read {file}"), open_safetensors(file) as handle:
        settings = lora_settings(file, handle)
        check_settings(file, settings)
        for key in handle.keys():
            match = LORA_KEY.fullmatch(key)
            name = layer_of(match, underscored)
            if name not in layers:
                unmatched.append(key)
                continue

            part = parts.setdefault(name, LoraPart(path=match["layer"].removeprefix(PEFT_PREFIX)))
            tensor = handle.get_tensor(key)
            if match["matrix"] is None:
                part.alpha = tensor.item()
                continue
            slot = "a" if match["matrix"] in ("A", "down") else "b"
            require(getattr(part, slot) is None, f"{file}: {name} stands there under two names, "
                    f"{key} is the second")
            require(tensor.is_floating_point(), f"{file}: {key} is stored as {tensor.dtype}, a "
                    "packed format, which is not read")
            setattr(part, slot, tensor.float())

        for name, part in parts.items():
            apply_settings(part, name, settings)
    return parts, unmatched


def lora_settings(file, handle):
    """What holds for all layers, under the names of PEFT's config: that config beside the file,
    else the notes in the file, of diffusers, of sd-scripts, or our own."""
    beside = file.parent / "adapter_config.json"
    others = [name for name in LORA_NAMES if name != file.name and (file.parent / name).exists()]
    is_of_another = file.name != LORA_NAMES[0] and bool(others)
    if beside.exists() and not is_of_another:
        return read_object(beside)

    notes = handle.metadata() or {}
    if "lora_adapter_metadata" in notes:           # PEFT's config, by diffusers
        config = json.loads(notes["lora_adapter_metadata"])
        return {key.removeprefix("transformer."): value for key, value in config.items()}

    settings = {key: notes[key] for key in ("r", "lora_alpha") if key in notes}
    if "ss_network_alpha" in notes:
        settings.setdefault("lora_alpha", notes["ss_network_alpha"])
    by_peft = any(key.startswith(PEFT_PREFIX) for key in handle.keys())
    if by_peft and not settings:
        warnings.warn(f"{file} does not say its alpha, nor does an adapter_config.json beside it: "
                      "taken as its rank", stacklevel=4)
    return settings


def check_settings(file, settings):
    """LensError where an adapter is not a plain LoRA by its settings."""
    kind = settings.get("peft_type") or "LORA"
    require(kind == "LORA", f"{file} is {kind}, not a LoRA, and is not read")
    for name in OTHER_SETTINGS:
        require(not settings.get(name), f"{file} is no plain LoRA ({name}) and is not read")
    start = str(settings.get("init_lora_weights")).lower()
    require(not start.startswith(OTHER_STARTS), f"{file} changes a base that {start} has changed "
            "before: have PEFT convert it to a plain LoRA when it saves")


def apply_settings(part, name, settings):
    """Gives the part of a layer what the settings say of it. What the file itself says of it, an
    alpha beside the matrices, comes first."""
    paths = (name, part.path)
    rank = matching(settings.get("rank_pattern"), paths, settings.get("r"))
    alpha = matching(settings.get("alpha_pattern"), paths, settings.get("lora_alpha"))
    # An alpha beside the matrices is of tools that divide by the rank alone.
    part.root = part.alpha is None and settings.get("use_rslora") in (True, "true", "True")
    if rank is not None:
        part.rank = int(rank)
    if part.alpha is None and alpha is not None:
        part.alpha = float(alpha)


def matching(patterns, paths, otherwise):
    """The value of the first of patterns {regular expression: value} that is the end of a layer's
    name, from a dot on, as PEFT has it."""
    for pattern, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths):
            return value
    return otherwise


def layer_of(match, underscored):
    """The name of the layer that a key (a match of LORA_KEY, or None) is about, or None."""
    if match is None:
        return None
    name = TOOL_PREFIX.sub("", match["layer"])
    if name.startswith(SD_SCRIPTS_PREFIX):
        return underscored.get(name.removeprefix(SD_SCRIPTS_PREFIX))
    return name


def check_lora(file, parts, unmatched, layers):
    """LensError unless every key has its layer, and every layer has two matrices that fit."""
    for mark, kind in OTHER_KINDS.items():
        keys = [key for key in unmatched if f"{mark}." in f"{key}." or not mark.startswith(".")
                and mark in key]
        require(not keys, f"{file} is {kind}, not a plain LoRA, and is not read: it has "
                f"{first_few(keys)}")
    require(parts, f"{file}: this LoRA matches no layer of the model; its keys look like: "
            f"{first_few(unmatched)}")
    require(not unmatched,
            f"{file}: keys that match no layer of the model: {first_few(unmatched)}")

    for name, part in parts.items():
        both = part.a is not None and part.b is not None
        require(both, f"{file}: {name} lacks one of its two matrices")
        a, b = tuple(part.a.shape), tuple(part.b.shape)
        weight = tuple(layers[name].weight.shape)
        matrices = len(a) == 2 and len(b) == 2
        fits = matrices and (b[0], a[1]) == weight and b[1] == a[0]
        require(fits, f"{file}: {name}: B {b} times A {a} does not give the weight's {weight}")
        require(part.rank in (None, a[0]), f"{file}: {name} has rank {a[0]}, but its settings say "
                f"{part.rank}: they are not of this file")


# --- For ComfyUI ----------------------------------------------------------------------------------

def write_for_comfyui(path, target):
    """A LoRA (a file or a folder, with PEFT's names) as one file with the names that ComfyUI reads,
    and each layer's alpha beside its matrices. -> how many layers."""
    file = lora_file(path)
    with error_context(f"cannot read {file}"), open_safetensors(file) as handle:
        settings = lora_settings(file, handle)
        notes = handle.metadata() or {}
        matrices = {}                              # {layer: {"A" or "B": tensor}}
        for key in handle.keys():
            match = LORA_KEY.fullmatch(key)
            require(match and match["matrix"] in ("A", "B"), f"{file}: {key} is not PEFT's name of "
                    "a LoRA's matrix")
            layer = TOOL_PREFIX.sub("", match["layer"])
            matrices.setdefault(layer, {})[match["matrix"]] = handle.get_tensor(key)
    check_settings(file, settings)

    tensors = {}
    for layer, pair in matrices.items():
        require(pair.keys() == {"A", "B"}, f"{file}: {layer} lacks one of its two matrices")
        a, b = pair["A"], pair["B"]
        require(a.is_floating_point() and b.is_floating_point(),
                f"{file}: {layer} is stored as {a.dtype}, a packed format, which is not read")
        part = LoraPart(a=a, b=b, path=layer)
        apply_settings(part, layer, settings)
        rank = len(a)
        require(b.shape[1] == rank and part.rank in (None, rank), f"{file}: {layer} has rank "
                f"{rank}, but its other matrix or its settings say otherwise")
        alpha = rank if part.alpha is None else part.alpha
        if part.root:                              # ComfyUI divides by the rank alone
            alpha *= rank**0.5
        name = f"diffusion_model.{layer}"
        tensors[f"{name}.lora_A.weight"] = a
        tensors[f"{name}.lora_B.weight"] = b
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    require(tensors, f"no LoRA in {file}")
    kept = {name: notes[name] for name in notes if name not in OF_THE_SCALE}
    write_safetensors(target, tensors, kept)
    return len(matrices)


# Notes of a file that say its strength, which stands beside the matrices here.
OF_THE_SCALE = ("r", "lora_alpha", "lora_adapter_metadata", "ss_network_alpha", "ss_network_dim")
