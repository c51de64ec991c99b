"""LoRA: a low-rank change B A beside a frozen weight, as a layer to train and as a file.

Read before: the denoiser in lens.py, kit/files.py.
"""
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.files import (
    error_context,
    first_few,
    open_safetensors,
    read_json,
    require,
    write_json,
    write_safetensors,
)

# Attention and MLPs. [ours]
LORA_TARGETS = ("img_qkv", "txt_qkv", "to_out.0", "to_add_out", "w1", "w2", "w3")


# --- Layers to train ------------------------------------------------------------------------------

class LoRALinear(nn.Module):
    """y = W x + b + strength * alpha / rank * B A x.

    Holds several adapters by name on one base ("new" and "old" in RL), of which one is active, or
    none. `weight` and `bias` stay where they were: the base keeps its names in the state dict.
    """

    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight                               # [out, in]
        self.bias = linear.bias
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
        y = F.linear(x, self.weight, self.bias)                   # [..., out]
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
        linear = isinstance(layer, (nn.Linear, LoRALinear))
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
    config = {
        "peft_type": "LORA",
        "r": first.lora_A[name].shape[0],
        "lora_alpha": first.alpha[name],
        "bias": "none",
        "target_modules": sorted(layers),
    }
    write_json(Path(folder) / "adapter_config.json", config)
    write_safetensors(Path(folder) / "adapter_model.safetensors", tensors, metadata)


LORA_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")

# A layer's name, then what is stored of it. PEFT: `.lora_A.weight`, `.lora_B.weight`, sometimes
# with the adapter's name between; sd-scripts: `.lora_down.weight`, `.lora_up.weight`, `.alpha`.
LORA_KEY = re.compile(
    r"(?P<layer>.+?)\.(?:lora_(?P<matrix>A|B|down|up)(?:\.default)?\.weight|alpha)")

# What tools put before a layer's name: PEFT, ComfyUI, diffusers; and sd-scripts, which also writes
# underscores for the dots in it.
TOOL_PREFIX = re.compile(r"^(base_model\.model\.|diffusion_model\.|transformer\.)+")
SD_SCRIPTS_PREFIX = "lora_unet_"


@dataclass
class LoraPart:
    """What a LoRA file holds for one layer."""
    a: Tensor = None           # [rank, in] fp32
    b: Tensor = None           # [out, rank] fp32
    alpha: float = None        # None: the rank, so that B A is added as it is
    root: bool = False         # divide by the root of the rank ("rank-stabilised LoRA")

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
    require(len(files) == 1,
            f"no LoRA in {path}: expected one .safetensors file, found {len(files)}")
    return files[0]


def read_lora(file, layers):
    """-> ({layer name: LoraPart}, [keys that match none of layers]). Nothing is checked yet."""
    underscored = {name.replace(".", "_"): name for name in layers}
    parts, unmatched = {}, []
    with error_context(f"cannot read {file}"), open_safetensors(file) as handle:
        settings = lora_settings(file, handle)
        for key in handle.keys():
            match = LORA_KEY.fullmatch(key)
            name = layer_of(match, underscored)
            if name not in layers:
                unmatched.append(key)
                continue

            part = parts.setdefault(name, LoraPart())
            tensor = handle.get_tensor(key).float()
            if match["matrix"] in ("A", "down"):
                part.a = tensor
            elif match["matrix"] in ("B", "up"):
                part.b = tensor
            else:
                part.alpha = tensor.item()

        # What one layer does not say holds for all: PEFT's config, or the notes of sd-scripts.
        alpha = settings.get("lora_alpha", settings.get("ss_network_alpha"))
        for part in parts.values():
            part.root = bool(settings.get("use_rslora"))
            if part.alpha is None and alpha is not None:
                part.alpha = float(alpha)
    return parts, unmatched


def lora_settings(file, handle):
    """What holds for all layers: PEFT's config beside the file, else the notes in the file."""
    beside = file.parent / "adapter_config.json"
    if beside.exists():
        return read_json(beside)
    return handle.metadata() or {}


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
