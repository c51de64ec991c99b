"""The model: everything between a prompt's tokens and a velocity, and the files it is stored in.

Read before: nothing, this is the first file. Next: vae.py (pixels <-> tokens), then data.py.
Assumes:     Python and PyTorch. `transformers` is imported only where a text encoder is made: it costs seconds.
Commands:    python lens.py        # prints the table of sizes with their parameter counts

+-- The convention, used everywhere in this project -----------------------------------------------------------+
|  t = 1 is noise, t = 0 is data:  x_t = (1 - t) x0 + t eps        velocity   v = dx/dt = eps - x0              |
|  so from x_t and v:              x0  = x_t - t v                 eps = x_t + (1 - t) v                        |
|  one Euler step from t to s:     x_s = x_t + (s - t) v           score = -(x_t + (1 - t) v) / t               |
|  No sign flips anywhere; guidance 1.0 means no guidance.                                                      |
+---------------------------------------------------------------------------------------------------------------+

One toy picture, 96 rows by 64 columns, with 12 text tokens (tests/test_lens.py runs it and reads this table):

    pixels      [1, 3, 96, 64]      red, green, blue in [-1, 1]
    latent      [1, 8, 12, 8]       the VAE: 8x down on each side, 8 channels
    tokens      [1, 24, 32]         2x2 latent pixels fold into one token: a 6 x 4 grid of 32 channels
    features    4 x [1, 12, 96]     hidden states of four layers of the text encoder
    text        [1, 12, 160]        normed, concatenated, projected to the denoiser's width
    image       [1, 24, 160]        the noisy tokens, projected to the same width
    joint       [1, 36, 160]        what attention sees: image first, then text
    velocity    [1, 24, 32]         the prediction, shaped as the tokens
    decoded     [1, 3, 96, 64]      tokens -> latent -> pixels

Labels: [paper] arXiv 2605.21573, [checkpoint] what the released weights need, [ours] our own choice.
"""

import importlib.util, itertools, json, math, os, re, warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

class LensError(ValueError):
    """A user's mistake, told in one line. Scripts print `error: ...` and exit with code 2."""

def require(ok, message):
    if not ok:
        raise LensError(message)

@contextmanager
def told(what):
    """What a library raises inside, as a LensError: one line that begins with what we were doing."""
    try:
        yield
    except LensError:
        raise
    except Exception as e:
        raise LensError(f"{what}: {(str(e).strip() or type(e).__name__).splitlines()[0]}") from e

# --- 1. The convention in code. t is one number or [B]; it is widened over tokens and channels. ---------------------
def wide(t, x):
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return t.view(-1, *[1] * (x.dim() - 1)) if t.dim() else t
def add_noise(x0, eps, t):       return (1 - wide(t, x0)) * x0 + wide(t, x0) * eps
def velocity(x0, eps):           return eps - x0
def data_prediction(x_t, v, t):  return x_t - wide(t, x_t) * v
def euler_step(x, v, t, s):      return x + wide(s - t, x) * v

# --- 2. Configuration and sizes -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LensConfig:
    """Field names and defaults of the released transformer/config.json [checkpoint]."""
    patch_size: int = 2                               # latent pixels folded into one token, per side
    in_channels: int = 128                            # channels of a token: out_channels * patch_size^2
    out_channels: int = 32                            # channels of a latent pixel
    num_layers: int = 48
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    inner_dim: int = 1536                             # width of both streams: heads * head_dim
    enc_hidden_dim: int = 2880                        # width of the text encoder
    axes_dims_rope: tuple = (8, 28, 28)               # how head_dim is split over (frame, row, column)
    gate_mlp: bool = True
    rms_norm: bool = True
    multi_layer_encoder_feature: bool = True
    selected_layer_index: tuple = (5, 11, 17, 23)     # blocks of the text encoder, counted from 0

    def __post_init__(self):
        heads, axes = self.num_attention_heads * self.attention_head_dim, self.axes_dims_rope
        require(self.inner_dim == heads, f"inner_dim {self.inner_dim} is not num_attention_heads * attention_head_dim = {heads}")
        require(sum(axes) == self.attention_head_dim and not any(a % 2 for a in axes),
                f"axes_dims_rope {axes} must be even and add up to attention_head_dim {self.attention_head_dim}")
        require(self.in_channels == self.out_channels * self.patch_size ** 2,
                f"in_channels {self.in_channels} is not out_channels {self.out_channels} * patch_size^2")
        for name in ("gate_mlp", "rms_norm", "multi_layer_encoder_feature"):
            require(getattr(self, name) is True, f"{name}={getattr(self, name)}: only True is implemented, as in every released Lens")

    @classmethod
    def from_dict(cls, d):
        d = {k: tuple(v) if isinstance(v, list) else v for k, v in d.items() if k in cls.__dataclass_fields__}
        if "inner_dim" not in d and {"num_attention_heads", "attention_head_dim"} <= d.keys():
            d["inner_dim"] = d["num_attention_heads"] * d["attention_head_dim"]
        return cls(**d)

    def to_dict(self):
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

@dataclass(frozen=True)
class Size:
    transformer: LensConfig
    vae: dict                                         # what vae.LensVAE takes
    text_encoder: dict                                # model_type and the arguments of its config in transformers

FULL_VAE = dict(block_out_channels=[128, 256, 512, 512], latent_channels=32, norm_num_groups=32, layers_per_block=2)
TOY_VAE = dict(block_out_channels=[16, 32, 64, 96], latent_channels=8, norm_num_groups=8, layers_per_block=1)

def yarn(original):
    # GPT-OSS stretches its rotary positions by YaRN. Left out, the features come out silently wrong (cosine 0.94).
    return dict(rope_type="yarn", rope_theta=150000.0, factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=original)

GPT_OSS_20B = dict(model_type="gpt_oss", num_hidden_layers=24, hidden_size=2880, intermediate_size=2880, num_attention_heads=64,
                   num_key_value_heads=8, head_dim=64, num_local_experts=32, num_experts_per_tok=4, sliding_window=128,
                   vocab_size=201088, initial_context_length=4096, pad_token_id=199999, rope_parameters=yarn(4096))
QWEN3_06B = dict(model_type="qwen3", num_hidden_layers=28, hidden_size=1024, intermediate_size=3072, num_attention_heads=16,
                 num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960, tie_word_embeddings=True,
                 rope_parameters=dict(rope_type="default", rope_theta=1e6))
TOY_GPT_OSS = dict(model_type="gpt_oss", num_hidden_layers=4, hidden_size=96, intermediate_size=128, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=24, num_local_experts=4, num_experts_per_tok=2, sliding_window=128,
                   vocab_size=1024, max_position_embeddings=16384, initial_context_length=512, rope_parameters=yarn(512))

SIZES = {  # [ours] but for full [checkpoint]
    # nano: the smallest thing with every part in it, for tests
    "nano": Size(LensConfig(in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, inner_dim=32,
                            enc_hidden_dim=32, axes_dims_rope=(4, 6, 6), selected_layer_index=(0, 1)),
                 dict(block_out_channels=[8, 8, 16, 16], latent_channels=4, norm_num_groups=4, layers_per_block=1),
                 dict(TOY_GPT_OSS, num_hidden_layers=2, hidden_size=32, intermediate_size=32, head_dim=8)),
    # toy: what weights/toy ships, trained on two CPU cores
    "toy": Size(LensConfig(in_channels=32, out_channels=8, num_layers=5, attention_head_dim=32, num_attention_heads=5, inner_dim=160,
                           enc_hidden_dim=96, axes_dims_rope=(8, 12, 12), selected_layer_index=(0, 1, 2, 3)), TOY_VAE, TOY_GPT_OSS),
    "small": Size(LensConfig(num_layers=8, num_attention_heads=6, inner_dim=384), FULL_VAE, GPT_OSS_20B),      # one consumer GPU, all else full-size
    # 1b: the paper's ablation model "Lens-Toy", 1.2B with Qwen3-0.6B [paper]; its layout is unpublished, this one is [ours]
    "1b": Size(LensConfig(num_layers=14, enc_hidden_dim=1024, selected_layer_index=(6, 13, 20, 27)), FULL_VAE, QWEN3_06B),
    "full": Size(LensConfig(), FULL_VAE, GPT_OSS_20B),                                                         # the released model
}

# --- 3. Rotary positions [checkpoint]: attention learns "two rows up" instead of absolute places --------------------
@lru_cache(maxsize=256)
def rope_table(grid, text_len, axes, device):
    """(cos, sin) of every joint token's angles: [h*w + text_len, 1, head_dim/2, 2]. Always fp32: at position 40, bf16
    angles are off by a tenth of a radian. Cached: a training run meets few grids and lengths."""
    h, w = grid
    with torch.inference_mode(False), torch.no_grad():     # a cached inference tensor could not be used in training later
        rows = torch.arange(h, device=device) - (h - h // 2)        # centred, so that a model trained at one size
        cols = torch.arange(w, device=device) - (w - w // 2)        # meets no wholly new positions at another
        text = torch.arange(text_len, device=device) + max(h // 2, w // 2)     # text goes on where the picture ends
        positions = (torch.cat([torch.zeros(h * w, device=device), text]),     # frame: 0 for a picture
                     torch.cat([rows.repeat_interleave(w), text]),
                     torch.cat([cols.repeat(h), text]))
        angles = torch.cat([p.float()[:, None] * 10000.0 ** -(torch.arange(0, d, 2, device=device).float() / d)
                            for p, d in zip(positions, axes)], -1)             # [h*w + text_len, head_dim/2]
        return torch.stack((angles.cos(), angles.sin()), -1)[:, None]

def rotate(x, rope):
    """Turns each (even, odd) pair of channels by its angle. x [B, N, heads, head_dim]."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():                      # inductor fuses this form, and cannot fuse complex numbers
        (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        out = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    else:                                                  # a pair as one complex number: 8x faster eagerly on a CPU
        out = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return out.flatten(-2).type_as(x)

# --- 4. The block: two streams, image and text, with their own weights, that meet in one attention [checkpoint] -----
class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):                                  # statistics in fp32 inside F.rms_norm, whatever x is
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

def modulate(x, norm, shift, scale):
    # norm(x) * (1 + scale) + shift. The norm's weight rides on the scale, which is one row a picture, instead of
    # costing a pass over all tokens forwards and two backwards.
    x = F.rms_norm(x, norm.weight.shape, None, norm.eps)
    return torch.addcmul(shift, x, norm.weight.to(scale.dtype) * (1 + scale))

class SwiGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = int(width / 3 * 8)                        # 8/3 with three matrices costs as much as 4 with two
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))

class JointAttention(nn.Module):
    def __init__(self, width, head_dim):
        super().__init__()
        self.head_dim = head_dim
        # Norms on q and k bound the attention logits: without them they grow until softmax saturates.
        self.norm_q, self.norm_k = RMSNorm(head_dim, 1e-6), RMSNorm(head_dim, 1e-6)
        self.norm_added_q, self.norm_added_k = RMSNorm(head_dim, 1e-6), RMSNorm(head_dim, 1e-6)
        self.img_qkv, self.txt_qkv = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_add_out = nn.Linear(width, width)

    def forward(self, img, txt, rope, mask, last):
        n, b = img.shape[1], 0 if txt is None else len(txt)    # the first b pictures see text, any others see none: guidance's other branch
        q, k, v = self.img_qkv(img).unflatten(-1, (3, -1, self.head_dim)).unbind(2)        # [B, N, H, D] each
        q, k = rotate(self.norm_q(q), rope[:n]).to(v.dtype), rotate(self.norm_k(k), rope[:n]).to(v.dtype)
        attend = lambda q, k, v, mask=None: F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask).transpose(1, 2).flatten(2)
        if not b:
            return self.to_out[0](attend(q, k, v)), None
        tq, tk, tv = self.txt_qkv(txt).unflatten(-1, (3, -1, self.head_dim)).unbind(2)     # [b, S, H, D] each
        tq, tk = rotate(self.norm_added_q(tq), rope[n:]).to(tv.dtype), rotate(self.norm_added_k(tk), rope[n:]).to(tv.dtype)
        joint = attend(torch.cat([q[:b], tq], 1), torch.cat([k[:b], tk], 1), torch.cat([v[:b], tv], 1), mask)      # [b, N+S, W]
        out = joint[:, :n] if b == len(img) else torch.cat([joint[:, :n], attend(q[b:], k[b:], v[b:])])            # [B, N, W]
        return self.to_out[0](out), None if last else self.to_add_out(joint[:, n:])

class Block(nn.Module):
    def __init__(self, width, head_dim, last):
        super().__init__()
        self.last = last                                   # the last block's text output is never read: not computed
        self.attn = JointAttention(width, head_dim)
        for s in ("img", "txt"):
            setattr(self, f"{s}_mod", nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)))
            setattr(self, f"{s}_norm1", RMSNorm(width, 1e-6))
            setattr(self, f"{s}_norm2", RMSNorm(width, 1e-6))
            setattr(self, f"{s}_mlp", SwiGLU(width))

    def modulation(self, time):                            # [B, W] -> shift, scale, gate for attention, then for the MLP
        return (self.img_mod(time).unflatten(-1, (6, 1, -1)),                              # [B, 6, 1, W]
                self.txt_mod(time).unflatten(-1, (6, 1, -1)))                              # [B, 6, 1, W]

    def forward(self, img, txt, time, mod, rope, mask):
        img_mod, txt_mod = self.modulation(time) if mod is None else mod
        shift1, scale1, gate1, shift2, scale2, gate2 = img_mod.unbind(1)                   # [B, 1, W] each
        a_img = modulate(img, self.img_norm1, shift1, scale1)                              # [B, N, W]
        a_txt = None
        if txt is not None:
            tshift1, tscale1, tgate1, tshift2, tscale2, tgate2 = txt_mod.unbind(1)
            a_txt = modulate(txt, self.txt_norm1, tshift1, tscale1)                        # [B, S, W]
        a_img, a_txt = self.attn(a_img, a_txt, rope, mask, self.last)
        img = torch.addcmul(img, gate1, a_img)                                             # [B, N, W]
        img = torch.addcmul(img, gate2, self.img_mlp(modulate(img, self.img_norm2, shift2, scale2)))
        if a_txt is not None:
            txt = torch.addcmul(txt, tgate1, a_txt)                                        # [B, S, W]
            txt = torch.addcmul(txt, tgate2, self.txt_mlp(modulate(txt, self.txt_norm2, tshift2, tscale2)))
        return img, txt

# --- 5. The denoiser ------------------------------------------------------------------------------------------------
class Context(NamedTuple):
    """What depends on the prompt and the size alone. A sampler makes it once and uses it at every step."""
    txt: Tensor | None         # [B, S, W], or None: no text at all
    rope: Tensor               # [N + S, 1, head_dim/2, 2]
    mask: Tensor | None        # [B, 1, 1, N + S], True where a key is visible, or None: all are

class Modulation(NamedTuple):
    """What depends on t alone: a third of the full model's weights. Made for all steps in one batch, then taken by `at`."""
    time: Tensor               # [T, W]
    blocks: tuple              # per block (image [T, 6, 1, W], text [T, 6, 1, W]), or None: the block makes its own
    out: Tensor                # [T, 2W]

    def at(self, i):           # row i (a number, or [1] on the device), to be used for every picture of a batch
        row = i if torch.is_tensor(i) else slice(i, i + 1)
        return Modulation(self.time[row], tuple(b and (b[0][row], b[1][row]) for b in self.blocks), self.out[row])

class LensTransformer(nn.Module):
    """4B at full size. State dict names and shapes are exactly the released checkpoint's, odd ones included."""
    graph = False                                          # whether a sampler plays its steps back from a CUDA graph

    def __init__(self, config):
        super().__init__()
        width = config.inner_dim
        self.config = config
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": nn.ModuleDict({"linear_1": nn.Linear(256, width), "linear_2": nn.Linear(width, width)})})
        # GPT-OSS features reach 1e4, each layer at its own scale: each has its own norm before they are mixed.
        self.txt_norm = nn.ModuleList([RMSNorm(config.enc_hidden_dim, 1e-5) for _ in config.selected_layer_index])
        self.txt_in = nn.Linear(config.enc_hidden_dim * len(config.selected_layer_index), width)
        self.img_in = nn.Linear(config.in_channels, width)
        self.transformer_blocks = nn.ModuleList([Block(width, config.attention_head_dim, i == config.num_layers - 1) for i in range(config.num_layers)])
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(width, 2 * width)})
        self.proj_out = nn.Linear(width, config.in_channels)

    def init_weights(self, generator=None):
        """[ours] adaLN-zero as in DiT: every gate starts at zero, so every block starts as the identity, and so does the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        [nn.init.normal_(linear.weight, std=0.02, generator=generator) for linear in self.time_text_embed["timestep_embedder"].values()]
        zero = [m for b in self.transformer_blocks for m in (b.img_mod[1], b.txt_mod[1])] + [self.norm_out["linear"], self.proj_out]
        [nn.init.zeros_(linear.weight) for linear in zero]
        return self

    def unread(self):
        """Names of the parameters that can get no gradient: the last block's text output. DDP and LoRA must know."""
        last = f"transformer_blocks.{self.config.num_layers - 1}."
        dead = (last + "attn.to_add_out.", last + "txt_norm2.", last + "txt_mlp.")
        return [name for name, _ in self.named_parameters() if name.startswith(dead)]

    def time(self, t):                                                                     # [T]
        # t is rounded to the activations' type first, as the released weights were trained and are run [checkpoint]:
        # in bf16 the sinusoid of an unrounded t is a different number.
        weight = self.txt_norm[0].weight
        dtype = torch.get_autocast_dtype(weight.device.type) if torch.is_autocast_enabled(weight.device.type) else weight.dtype
        frequencies = 10000.0 ** -(torch.arange(128, device=t.device).float() / 128)
        angles = 1000.0 * t.to(dtype).float()[:, None] * frequencies                       # [T, 128]
        wave = torch.cat([angles.cos(), angles.sin()], -1).to(weight.dtype)                # [T, 256], cosines first
        embed = self.time_text_embed["timestep_embedder"]
        return embed["linear_2"](F.silu(embed["linear_1"](wave)))                          # [T, W]

    def prepare(self, text, text_mask, grid):
        """The work that does not depend on t. text: list of K [B, S, E] or None; text_mask [B, S] bool, or None when every
        token is visible (the caller says so: to look would make a GPU wait for the CPU)."""
        n, txt, mask, length = grid[0] * grid[1], None, None, 0
        if text is not None:
            require(len(text) == len(self.txt_norm), f"{len(text)} text features given, this model reads {len(self.txt_norm)} layers")
            dtype = self.txt_norm[0].weight.dtype
            txt = self.txt_in(torch.cat([norm(f.to(dtype)) for norm, f in zip(self.txt_norm, text)], -1))          # [B, S, W]
            length = txt.shape[1]
            if text_mask is not None:
                mask = F.pad(text_mask.bool(), (n, 0), value=True)[:, None, None]          # [B, 1, 1, N+S]
        rope = rope_table(tuple(grid), length, tuple(self.config.axes_dims_rope), self.txt_norm[0].weight.device)
        return Context(txt, rope, mask)

    def modulation(self, t):
        """Everything that depends on t alone, for any number of times at once."""
        time = self.time(t)
        return Modulation(time, tuple(b.modulation(time) for b in self.transformer_blocks), self.norm_out["linear"](F.silu(time)))

    def velocity_from(self, x, modulation, context, seen=None):
        img, txt = self.img_in(x), context.txt                                             # [B, N, W], [B, S, W]
        for block, mod in zip(self.transformer_blocks, modulation.blocks):
            img, txt = block(img, txt, modulation.time, mod, context.rope, context.mask)   # [B, N, W], [B, S, W]
            seen(img) if seen else None
        scale, shift = modulation.out[:, None].chunk(2, -1)                                # scale first here [checkpoint]
        img = torch.addcmul(shift, F.layer_norm(img, img.shape[-1:], eps=1e-6), 1 + scale)    # [B, N, W]
        return self.proj_out(img)                                                          # [B, N, C]

    def forward(self, x, t, text, text_mask, grid, seen=None):
        """x [B, h*w, C], t [B] -> velocity [B, h*w, C]; seen: called with each block's image tokens [B, h*w, W]. In training each block makes its
        own modulation, so that recomputing, compiling and sharding (FSDP gathers weights block by block) need nothing from outside the block."""
        require(x.shape[1] == grid[0] * grid[1], f"{x.shape[1]} tokens do not fill a grid of {grid[0]} x {grid[1]}")
        time = self.time(t)                                                                # [B, W]
        modulation = Modulation(time, (None,) * len(self.transformer_blocks), self.norm_out["linear"](F.silu(time)))
        return self.velocity_from(x, modulation, self.prepare(text, text_mask, grid), seen)

def build(size, seed=0):
    """A fresh denoiser of one of SIZES. Built without storage first, so the global random state is left alone."""
    require(size in SIZES, f"unknown size {size!r}: choose one of {', '.join(SIZES)}")
    with torch.device("meta"):
        model = LensTransformer(SIZES[size].transformer)
    return model.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(seed))

def quicken(model, vae=None, fullgraph=True):
    """Compiles in place, so that weights keep their names: blocks one by one (alike, they compile once), for all sizes and text lengths."""
    torch._dynamo.config.recompile_limit = 64              # programs of a block: last or not, each branch or both at once, one picture or many
    torch._dynamo.config.optimize_ddp = False              # would cut a block where a bucket of DDP's gradients is full, and fails on it: dynamic sizes
    [part.compile(fullgraph=fullgraph, dynamic=True) for part in (*model.transformer_blocks, *([vae.decoder] if vae else []))]

def e4m3(x, dim=()):
    """(x / scale in 8 bits, scale [fp32]): one scale for all of x, or one for each slice along dim. e4m3 keeps three bits of a number below 448,
    so each is off by up to 6%; the scales are powers of two, which rounds nothing more: what was fp8 once stays as it is."""
    scale = (x.abs().amax(dim, keepdim=True).float().clamp_min(1e-12) / 448).log2().ceil().exp2()
    return (x / scale).to(torch.float8_e4m3fn), scale

class Fp8Linear(nn.Module):
    """y = W x + b by products of 8-bit numbers [ours]: W with a scale a row, made once; x with a scale a token, made here."""
    def __init__(self, linear):
        super().__init__()
        self.bias, (self.weight, self.scale) = linear.bias, map(nn.Buffer, e4m3(linear.weight.detach(), 1))      # [out, in], [out, 1]

    def forward(self, x):                                                                  # [B, N, in]
        rows, scale = e4m3(x.flatten(0, 1), 1)                                             # [B*N, in], [B*N, 1]
        return torch._scaled_mm(rows, self.weight.t(), scale, self.scale.t(), self.bias, out_dtype=x.dtype, use_fast_accum=True).unflatten(0, x.shape[:2])

def to_fp8(model):
    """The image stream's matrices in 8 bits, in place, but for sides not divisible by 16, which the kernels cannot do (the toy's MLP).
    Text and modulation stay: they are few tokens, or one row."""
    for block, name in itertools.product(model.transformer_blocks, ("attn.img_qkv", "attn.to_out.0", "img_mlp.w1", "img_mlp.w2", "img_mlp.w3")):
        if not any(side % 16 for side in block.get_submodule(name).weight.shape):
            block.set_submodule(name, Fp8Linear(block.get_submodule(name)))
    return model

# --- 6. Noise levels ------------------------------------------------------------------------------------------------
def sigmas(image_tokens, steps):
    """Levels of the sampler, fp32 [steps + 1], 1 first and 0 last. More tokens show the same picture through more noise, so larger pictures
    spend more of their steps near t = 1. The fit of mu is empirical [checkpoint]; constants that other code bases use (1.15, 1.83) are not it."""
    hi = 0.00016927 * image_tokens + 0.45666666
    lo = 8.73809524e-05 * image_tokens + 1.89833333
    mu = hi if image_tokens > 4300 else lo + (hi - lo) * (steps - 10) / (200 - 10)         # lo at 10 steps, hi at 200
    sigma = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    sigma = math.exp(mu) / (math.exp(mu) + 1 / sigma - 1)
    return torch.cat([sigma, sigma.new_zeros(1)]).float()

# --- 7. Text: a frozen language model reads the prompt; four of its layers are the condition ------------------------
DATE = "2026-05-23"         # [ours] frozen. With today's date in the chat, as in the reference, one seed drifts from day to day.
DESCRIBE = ("Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the objects and background.")

CHAT = {  # what stands before and after the prompt, to the letter
    "gpt_oss": (  # [checkpoint]
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
        "Current date: {date}\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be included "
        "for every message.<|end|><|start|>developer<|message|># Instructions\n\n" + DESCRIBE + "\n\n<|end|>"
        "<|start|>user<|message|>",
        "<|end|><|start|>assistant<|channel|>analysis<|message|>Need to generate one image according to the description."
        "<|end|><|start|>assistant<|channel|>final<|message|>"),
    "qwen3": (  # [ours]: the paper's Qwen3 rendering is not published
        "<|im_start|>system\n" + DESCRIBE + "<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
}
MARKER = re.compile(r"<\|(?:(?!<\|).)*?\|>")        # the innermost first

def strip_markers(prompt):
    # A prompt must not close its own message and speak as the system. Again until none is left: `<|<|end|>end|>`.
    while MARKER.search(prompt):
        prompt = MARKER.sub("", prompt)
    return prompt

@torch.no_grad()
def text_features(hf_model, input_ids, attention_mask, layers):
    """Hidden states after the given blocks -> list of [B, S, E], padding zeroed. Hooks, because `output_hidden_states`
    passes the last one through the final norm, which the denoiser was not trained on [checkpoint]."""
    base = getattr(hf_model, "model", hf_model)            # without the head: its logits cost more than a block
    require(-1 < min(layers) <= max(layers) < len(base.layers), f"text layers {tuple(layers)} asked of an encoder with {len(base.layers)} blocks")
    seen, keep = {}, lambda i, _module, _args, out: seen.update({i: out[0] if isinstance(out, tuple) else out})
    hooks = [base.layers[i].register_forward_hook(partial(keep, i)) for i in layers]
    try:
        base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        [hook.remove() for hook in hooks]
    hidden = attention_mask[..., None] == 0
    return [seen[i].masked_fill(hidden, 0) for i in layers]                                # K x [B, S, E]

class TextEncoder:
    """A language model, its tokenizer, and which layers to read. `model` keeps its head where it has one: it can also write."""
    def __init__(self, model, tokenizer, layers, date=DATE, max_length=512):
        self.model, self.tokenizer, self.layers = model.eval().requires_grad_(False), tokenizer, tuple(layers)
        self.date, self.max_length, self.kind = date, max_length, model.config.model_type
        require(self.kind in CHAT, f"text encoder of type {self.kind!r}: known are {', '.join(CHAT)}")

    def chat(self):                                        # what stands before and after the prompt
        return [part.replace("{date}", self.date) for part in CHAT[self.kind]]

    def render(self, prompt):
        return strip_markers(prompt).join(self.chat())

    def tokenize(self, prompts):
        """-> (a list of ids per prompt, the offset where the prompt begins). Head, prompt and tail are tokenized apart: they meet at markers, so the
        ids are those of the whole, and a cut falls on the prompt alone. A cut tail would cost the features of the words that follow every prompt."""
        tokens = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]
        head, tail = map(tokens, self.chat())
        room, rows = self.max_length - len(head) - len(tail), []
        for prompt in prompts:
            ids = tokens(strip_markers(prompt))
            if len(ids) > room:
                warnings.warn(f"prompt of {len(ids)} tokens: the last {len(ids) - room} were cut, {room} fit", stacklevel=3)
            rows.append(head + ids[:max(room, 0)] + tail)
        return rows, len(head)

    def encode(self, prompts):
        """-> (K x [B, S, E], mask [B, S] or None when all prompts are equally long). Padded to the batch's longest only."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows, offset = self.tokenize(prompts)
        pad = next((p for p in (self.model.config.pad_token_id, self.tokenizer.pad_token_id) if p is not None), 0)
        longest, device = max(map(len, rows)), self.model.device
        ids = torch.tensor([r + [pad] * (longest - len(r)) for r in rows], device=device)              # [B, L]
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows], device=device)    # [B, L]
        features = text_features(self.model, ids, mask, self.layers)                                   # K x [B, L, E]
        # The head is the same for every prompt and says nothing: drop its features, keep the tail's.
        mask = None if len(set(map(len, rows))) == 1 else mask[:, offset:].bool()                      # [B, S]
        return [f[:, offset:].contiguous() for f in features], mask                                    # K x [B, S, E]

def text_model_class(kind):
    import transformers
    transformers.utils.logging.disable_progress_bar()      # "Loading weights: 71/71" tells a user nothing
    require(kind in CHAT, f"text encoder of type {kind!r}: known are {', '.join(CHAT)}")
    return [getattr(transformers, {"gpt_oss": "GptOss", "qwen3": "Qwen3"}[kind] + end) for end in ("ForCausalLM", "Config")]

def build_text_model(spec, seed=0, **override):
    """A fresh language model from a row of SIZES, say build_text_model(SIZES["toy"].text_encoder, vocab_size=len(tokenizer))."""
    spec = {**spec, **override}
    model_class, config_class = text_model_class(spec.pop("model_type"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config_class(**spec))

def load_text_encoder(path, device="cpu", dtype=None, date=DATE):
    """From a pipeline's folder; never touches the network. MXFP4 experts stay packed (14 GB) where the kernels are there."""
    import transformers
    path = Path(path)
    beside = part_folder(path, "transformer") / "config.json"      # it says which layers the denoiser reads
    layers = LensConfig.from_dict(read_json(beside) if beside.exists() else {}).selected_layer_index
    config = read_json((folder := part_folder(path, "text_encoder")) / "config.json")
    model_class, _ = text_model_class(config.get("model_type"))
    kwargs = dict(dtype=dtype or "auto", local_files_only=True, output_loading_info=True)
    if config.get("quantization_config", {}).get("quant_method") == "mxfp4":
        if torch.device(device).type == "cuda" and all(map(importlib.util.find_spec, ("accelerate", "triton", "kernels"))):
            kwargs["device_map"] = str(device)
        else:                  # asked for by name: left to itself, transformers stops here and wants accelerate
            kwargs["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
            warnings.warn("the text encoder's MXFP4 weights are unpacked to bf16: about 42 GB instead of 14 for GPT-OSS-20B "
                          "(they stay packed on CUDA with accelerate, triton and kernels installed)", stacklevel=2)
    with told(f"cannot load the text encoder from {folder}"):
        model, info = model_class.from_pretrained(str(folder), **kwargs)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(part_folder(path, "tokenizer")), local_files_only=True)
    # transformers fills missing tensors with random numbers and goes on: wrong pictures, and no error.
    missing, misshapen = {str(m) for m in info["missing_keys"]}, {str(m) for m in info["mismatched_keys"]}
    require(not (bad := missing - {"lm_head.weight"} | misshapen), f"{folder}: missing or misshapen tensors: {some(bad)}")
    model = model.model if missing else model              # an encoder stored without its head
    return TextEncoder(model.to(device), tokenizer, layers, date)

# --- 8. LoRA: a low-rank change B A beside a frozen weight ----------------------------------------------------------
LORA_TARGETS = ("img_qkv", "txt_qkv", "to_out.0", "to_add_out", "w1", "w2", "w3")     # [ours] attention and MLPs

class LoRALinear(nn.Module):
    """y = W x + b + strength * alpha / rank * B A x. Holds several adapters by name on one base ("new" and "old" in RL), of
    which one is active, or none. `weight` and `bias` stay where they were: state dict names do not change under it."""
    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.alpha, self.strength, self.active = {}, 1.0, None

    def add(self, name, rank, alpha, generator=None):
        out, inside = self.weight.shape
        a = torch.empty(rank, inside).uniform_(-inside ** -0.5, inside ** -0.5, generator=generator)
        # B starts at zero, so an adapter starts as no change. fp32 even on a bf16 base: its steps are too small for bf16.
        self.lora_A[name] = nn.Parameter(a.to(self.weight.device))
        self.lora_B[name] = nn.Parameter(torch.zeros(out, rank, device=self.weight.device))
        self.alpha[name] = alpha

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.active is None:
            return y
        a, b = self.lora_A[self.active], self.lora_B[self.active]                          # [r, in], [out, r]
        scale = self.strength * self.alpha[self.active] / a.shape[0]
        return y + scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))

def lora_layers(model, name):
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear) and name in m.lora_A}

def lora_parameters(model, name="default"):
    return [p for layer in lora_layers(model, name).values() for p in (layer.lora_A[name], layer.lora_B[name])]

def set_lora(model, name, strength=1.0):
    """Makes one adapter the active one; None leaves the base model alone."""
    require(name is None or lora_layers(model, name), f"the model has no LoRA adapter {name!r}")    # a typo must not run the base model
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.active, layer.strength = name if name in layer.lora_A else None, strength

def add_lora(model, rank, alpha, targets=LORA_TARGETS, name="default", generator=None):
    """Freezes the base, adds an adapter to each linear layer whose name ends in one of targets, makes it the active one."""
    dead = {n.rpartition(".")[0] for n in model.unread()}  # layers without a gradient: training them would do nothing
    found = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, LoRALinear)) and n not in dead
             and f".{n}".endswith(tuple(f".{t}" for t in targets))]
    require(found, f"no linear layer matches the LoRA targets {', '.join(targets)}")
    for n in found:
        if not isinstance(layer := model.get_submodule(n), LoRALinear):
            model.set_submodule(n, layer := LoRALinear(layer))
        layer.add(name, rank, alpha, generator)
    [p.requires_grad_(p.requires_grad and "lora_" in n) for n, p in model.named_parameters()]
    set_lora(model, name)
    return len(found)

def save_lora(model, folder, name="default", metadata=None):
    """PEFT's format, which load_lora reads back, and most other tools."""
    layers = lora_layers(model, name)
    require(layers, f"the model has no LoRA adapter {name!r} to save")
    first = next(iter(layers.values()))
    write_json(Path(folder) / "adapter_config.json", dict(
        peft_type="LORA", r=first.lora_A[name].shape[0], lora_alpha=first.alpha[name], bias="none", target_modules=sorted(layers)))
    write_safetensors(Path(folder) / "adapter_model.safetensors", {f"base_model.model.{n}.lora_{ab}.weight": getattr(layer, f"lora_{ab}")[name]
                                                                   for n, layer in layers.items() for ab in "AB"}, metadata)

LORA_KEY = re.compile(r"(?P<base>.+?)\.(?:lora_(?P<part>A|B|down|up)(?:\.default)?\.weight|alpha)")

@torch.no_grad()
def load_lora(model, path, strength=1.0):
    """Merges a LoRA file into the weights, W += strength * alpha / rank * B A, and returns how many layers it changed. Reads
    PEFT's names, ComfyUI's `diffusion_model.` and sd-scripts' `lora_unet_...`. All is checked before anything is changed."""
    file = weight_files(path, ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"))[0]
    beside, handle = file.parent / "adapter_config.json", open_safetensors(file)
    config = read_json(beside) if beside.exists() else handle.metadata() or {}
    default = config.get("lora_alpha", config.get("ss_network_alpha"))      # neither there: alpha = rank, scale 1
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, LoRALinear))}
    flat = {n.replace(".", "_"): n for n in layers}        # sd-scripts writes underscores for dots
    found, unmatched = {}, []
    for key in handle.keys():
        match = LORA_KEY.fullmatch(key)
        name = re.sub(r"^(base_model\.model\.|diffusion_model\.|transformer\.)+", "", match["base"]) if match else ""
        name = flat.get(name[len("lora_unet_"):]) if name.startswith("lora_unet_") else name
        if name in layers:
            part = {"down": "A", "up": "B", None: "alpha"}.get(match["part"], match["part"])
            found.setdefault(name, {})[part] = handle.get_tensor(key).float()
        else:
            unmatched.append(key)
    if unmatched or not found:
        what = "keys that match no layer of the model" if found else "this LoRA matches no layer of the model; its keys look like"
        raise LensError(f"{file}: {what}: {some(unmatched)}")
    for name, part in found.items():
        require({"A", "B"} <= part.keys(), f"{file}: {name} lacks one of its two matrices")
        a, b, want = tuple(part["A"].shape), tuple(part["B"].shape), tuple(layers[name].weight.shape)
        require(len(a) == len(b) == 2 and (b[0], a[1]) == want and b[1] == a[0], f"{file}: {name}: B {b} times A {a} does not give the weight's {want}")
    for name, part in found.items():
        rank, weight = part["A"].shape[0], layers[name].weight
        scale = strength * float(part.get("alpha", rank if default is None else default)) / (rank ** 0.5 if config.get("use_rslora") else rank)
        weight.copy_(weight.float() + scale * (part["B"] @ part["A"]).to(weight.device))
    return len(found)

# --- 9. Checkpoints. safetensors only: a pickle can run code. DIR/model_index.json, and a folder for each part ------
PREFIX = re.compile(r"^(model\.diffusion_model\.|diffusion_model\.|net\.)")         # single files of other tools
WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")

def some(names):
    return ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

def read_json(path):
    with told(f"cannot read {path}"):
        return json.loads(Path(path).read_text())

def replace_file(path, write):
    """Runs write(temporary path) beside path, then renames: a full disk or a kill leaves the previous file whole."""
    path, new = Path(path), Path(f"{path}.{os.getpid()}.new")
    with told(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(new)
            with open(new, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)

def write_json(path, data):
    replace_file(path, lambda new: new.write_text(json.dumps(data, indent=2) + "\n"))

def write_safetensors(path, tensors, metadata=None):
    from safetensors.torch import save_file
    tensors = {k: v.detach().to("cpu").contiguous() for k, v in tensors.items()}
    replace_file(path, lambda new: save_file(tensors, new, {k: str(v) for k, v in (metadata or {}).items()}))

def open_safetensors(path):
    from safetensors import safe_open
    with told(f"cannot read {path}"):
        return safe_open(str(path), "pt")

def weight_files(path, names=WEIGHT_NAMES):
    """The safetensors files of one part: a file itself; in a folder the shards of an index, a known name, or the only file."""
    path = Path(path)
    if path.is_file():
        return [path]
    if index := sorted(path.glob("*.safetensors.index.json")):
        return sorted({path / Path(f).name for f in read_json(index[0])["weight_map"].values()})
    files = [path / n for n in names if (path / n).exists()][:1] or sorted(path.glob("*.safetensors"))
    require(len(files) == 1, f"no weights in {path}: expected one .safetensors file or shards with an index, found {len(files)} files")
    return files

def locate(path, part):
    """-> (files, config) of a part, from a pipeline's folder, the part's own folder, or a single file. The config is the
    config.json beside the weights, else what our own files carry in their metadata, else None."""
    path = Path(path)
    path = inner if path.is_dir() and (inner := part_folder(path, part)).is_dir() else path
    files = weight_files(path)
    if (path / "config.json").exists():
        return files, read_json(path / "config.json")
    with told(f"{files[0]}: bad config in its metadata"):
        return files, json.loads((open_safetensors(files[0]).metadata() or {}).get("config", "null"))

def part_folder(path, part):
    """path/part; or, where a small fine-tuned checkpoint holds only its own part or an adapter, that of the `base` its model_index.json names."""
    index = path / "model_index.json"
    base = read_json(index).get("base") if index.exists() and not (path / part).is_dir() else None
    return part_folder((path / base).resolve(), part) if base else path / part

def read_metadata(path):
    """The notes stored with a denoiser (command, seed, score ...), and over them an adapter's, from its file, folder, or pipeline's folder."""
    files = [locate(path, "transformer")[0][0], *Path(path).glob("adapter_model.safetensors")]
    return {name: note for file in files for name, note in (open_safetensors(file).metadata() or {}).items()}

def shapes_in(files):
    return {PREFIX.sub("", k): tuple(h.get_slice(k).get_shape()) for h in map(open_safetensors, files) for k in h.keys()}

def fill(module, files, device, dtype):
    """Moves tensors one by one from files into a module built on the meta device: host memory never holds a second copy."""
    stored = {PREFIX.sub("", key): (handle, key) for handle in map(open_safetensors, files) for key in handle.keys()}
    # fp8 files hold weight / scale with the scale beside it; their other notes are for kernels that we do not use.
    scales = {re.sub(r"(scale_weight|weight_scale)$", "weight", n): stored.pop(n) for n in list(stored) if n.endswith((".scale_weight", ".weight_scale"))}
    stored = {n: at for n, at in stored.items() if not n.endswith(("scaled_fp8", ".scale_input", ".input_scale", ".comfy_quant"))}
    wanted = module.state_dict(keep_vars=True)
    missing, extra = wanted.keys() - stored.keys(), (stored.keys() | scales.keys()) - wanted.keys()
    require(not missing, f"{files[0]}: missing tensors: {some(missing)}")
    require(not extra, f"{files[0]}: tensors this model has no place for: {some(extra)}")
    for name, (handle, key) in stored.items():
        shape, want = list(handle.get_slice(key).get_shape()), list(wanted[name].shape)
        require(shape == want, f"{files[0]}: {name} has shape {shape}, expected {want}")
    for name, (handle, key) in stored.items():
        value = handle.get_tensor(key)
        if value.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            scale = scales[name][0].get_tensor(scales[name][1]).float() if name in scales else torch.ones(1)
            scale = scale.reshape(-1, *[1] * (value.dim() - 1))            # one number a tensor, or one a row
            value = (value.float() * scale).to(dtype or torch.bfloat16)
        value = value.to(device, dtype if value.is_floating_point() else None)
        owner, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=wanted[name].requires_grad)
        else:
            owner._buffers[leaf] = value
    return module.eval()

def load_transformer(path, device="cpu", dtype=None, config=None):
    """dtype None keeps what is on disk (fp8 becomes bf16)."""
    files, found = locate(path, "transformer")
    if config is None and found and "num_layers" in found:
        config = LensConfig.from_dict(found)
    if config is None:         # a bare file: its shapes tell all but how the head is split and which text layers were read
        shapes = shapes_in(files)
        told_by = {"img_in.weight", "transformer_blocks.0.attn.norm_q.weight", "txt_norm.0.weight"}
        require(told_by <= shapes.keys(), f"{files[0]} is not a Lens denoiser: missing tensors: {some(told_by - shapes.keys())}")
        (width, channels), (head,) = shapes["img_in.weight"], shapes["transformer_blocks.0.attn.norm_q.weight"]
        (enc,), k = shapes["txt_norm.0.weight"], sum(n.startswith("txt_norm.") for n in shapes)
        axes, layers = {64: (8, 28, 28), 32: (8, 12, 12), 16: (4, 6, 6)}, {1024: (6, 13, 20, 27), 2880: (5, 11, 17, 23)}
        config = LensConfig(in_channels=channels, out_channels=channels // 4, attention_head_dim=head, inner_dim=width,
                            num_layers=len({n.split(".")[1] for n in shapes if n.startswith("transformer_blocks.")}),
                            num_attention_heads=width // head, enc_hidden_dim=enc, axes_dims_rope=axes.get(head, ()),
                            selected_layer_index=layers[enc] if k == 4 and enc in layers else tuple(range(k)))
    with torch.device("meta"):
        model = LensTransformer(config)
    return fill(model, files, device, dtype)

def load_vae(path, device="cpu", dtype=None):
    files, config = locate(path, "vae")
    with torch.device("meta"):
        vae = importlib.import_module("vae").LensVAE(config or FULL_VAE)    # the one arrow down the list of files, taken only when called
    # In bf16 with channels last: a picture of 96 to 512 pixels decoded 1.2 to 1.4 times as fast, on a CPU too.
    return fill(vae, files, device, dtype).to(memory_format=torch.channels_last if dtype == torch.bfloat16 else torch.contiguous_format)

def fetch(path_or_repo, parts):
    """A local folder, or a hub id's files, downloaded once and cached."""
    path = Path(path_or_repo).expanduser()
    if path.exists():
        return path
    require(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path_or_repo)) and not path.parent.is_dir(),
            f"no weights at {path_or_repo}: it is neither a local folder nor a hub id like owner/name")
    from huggingface_hub import snapshot_download
    with told(f"no local folder {path_or_repo}, and the hub could not give it"):
        return Path(snapshot_download(str(path_or_repo), allow_patterns=["*.json", *(f"{p}/*" for p in (*parts, "tokenizer"))]))

def load_pipeline(path_or_repo, device="cpu", dtype=None, parts=("transformer", "vae", "text_encoder"), date=DATE):
    """-> (transformer, vae, text_encoder). A part not asked for comes back as None: load the encoder, encode, let it go, then
    load the denoiser, and a card needs to hold only the larger of the two. A folder may be an adapter that names its base."""
    path = fetch(path_or_repo, parts)
    for part in parts:
        require(part_folder(path, part).is_dir(), f"no weights in {path}: expected {path}/{part}/*.safetensors")
    transformer = load_transformer(part_folder(path, "transformer"), device, dtype) if "transformer" in parts else None
    if transformer and (path / "adapter_model.safetensors").exists():
        load_lora(transformer, path)                       # a checkpoint that is an adapter over its base
    return (transformer, load_vae(part_folder(path, "vae"), device, dtype) if "vae" in parts else None,
            load_text_encoder(path, device, dtype, date) if "text_encoder" in parts else None)

def save_pipeline(folder, transformer=None, vae=None, text_encoder=None, metadata=None, dtype=None, weights=None, base=None):
    """Writes the layout that load_pipeline reads. weights: a state dict to store instead of the denoiser's own (EMA, gathered from shards, or fp8 with
    its scales, which stays fp8). base: where the parts not stored here are, as a path from folder. metadata: notes for read_metadata."""
    folder = Path(folder)
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").exists() else {"_class_name": "LensPipeline"}
    for part, module, title in (("transformer", transformer, "LensTransformer2DModel"), ("vae", vae, "AutoencoderKLFlux2")):
        if module is None:
            continue
        state = weights if part == "transformer" and weights is not None else module.state_dict()
        require(not any(".lora_" in n for n in state), "the model has LoRA adapters attached: save them with save_lora, or merge them with load_lora first")
        state = {n: v.to(dtype) if dtype and v.is_floating_point() and v.itemsize > 1 and not n.startswith("bn.") else v for n, v in state.items()}
        config = module.config.to_dict() if part == "transformer" else dict(module.config)
        notes = {"format": "pt", "config": json.dumps(config), **((metadata or {}) if part == "transformer" else {})}
        write_safetensors(folder / part / WEIGHT_NAMES[0], state, notes)
        write_json(folder / part / "config.json", {"_class_name": title, **config})
        index[part] = ["lens", title]
    if text_encoder is not None:
        with told(f"cannot write the text encoder to {folder}"):
            text_encoder.model.save_pretrained(folder / "text_encoder")
            text_encoder.tokenizer.save_pretrained(folder / "tokenizer")
        index.update(text_encoder=["transformers", type(text_encoder.model).__name__], tokenizer=["transformers", "PreTrainedTokenizerFast"])
    write_json(folder / "scheduler" / "scheduler_config.json", dict(
        _class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, use_dynamic_shifting=True, time_shift_type="exponential"))
    index.update(scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"], **({"base": str(base)} if base else {}))
    write_json(folder / "model_index.json", index)         # last: a folder with an index is a whole pipeline

if __name__ == "__main__":
    print(f"{'size':6} {'parameters':>14} {'blocks':>6} {'width':>6} {'heads':>8} {'token':>6}  text encoder")
    for size_name, size in SIZES.items():
        c = size.transformer
        with torch.device("meta"):
            count = sum(p.numel() for p in LensTransformer(c).parameters())
        print(f"{size_name:6} {count:14,} {c.num_layers:6} {c.inner_dim:6} {c.num_attention_heads:3} x {c.attention_head_dim:2} {c.in_channels:6}"
              f"  {size.text_encoder['model_type']}, width {c.enc_hidden_dim}, blocks {c.selected_layer_index}")
