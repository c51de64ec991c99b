"""The model: everything between a prompt's tokens and a velocity.

Read before: nothing, this is the first file. Next: vae.py (pixels to tokens), then data.py.
Assumes:     Python and PyTorch. `transformers` is imported only where a text encoder is made.

    python lens.py        # the table of sizes, with their parameter counts

+-- The convention, used everywhere in this project -------------------------------------------+
|  t = 1 is noise, t = 0 is data:  x_t = (1 - t) x0 + t eps      velocity  v = dx/dt = eps - x0 |
|  so from x_t and v:              x0  = x_t - t v               eps = x_t + (1 - t) v          |
|  one Euler step from t to s:     x_s = x_t + (s - t) v         score = -(x_t + (1 - t) v) / t |
|  No sign flips anywhere; guidance 1.0 means no guidance.                                      |
+----------------------------------------------------------------------------------------------+

One toy picture, 96 rows by 64 columns, with 12 text tokens (a test runs it and reads this table):

    pixels      [1, 3, 96, 64]      red, green, blue in [-1, 1]
    latent      [1, 8, 12, 8]       the VAE: 8x down on each side, 8 channels
    tokens      [1, 24, 32]         2x2 latent pixels fold into one token: a 6 x 4 grid
    features    4 x [1, 12, 96]     hidden states of four layers of the text encoder
    text        [1, 12, 160]        normed, concatenated, projected to the denoiser's width
    image       [1, 24, 160]        the noisy tokens, projected to the same width
    joint       [1, 36, 160]        what attention sees: image first, then text
    velocity    [1, 24, 32]         the prediction, shaped as the tokens
    decoded     [1, 3, 96, 64]      tokens -> latent -> pixels

Labels: [paper] arXiv 2605.21573, [checkpoint] what the released weights need, [ours] our choice.
"""
import math
import re
import warnings
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kit.files import LensError, require

__all__ = ["LensError", "require"]         # lens.LensError: for programs that import lens alone


# --- 1. The convention in code --------------------------------------------------------------------
# Times t and s are one number or [B]; they are widened over tokens and channels.

def widen(t, x):
    """t, one number or [B], shaped so that it multiplies x [B, ...]: [B, 1, ...], of x's type."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    if t.dim() == 0:
        return t
    axes = [1] * (x.dim() - 1)
    return t.view(-1, *axes)


def add_noise(x0, eps, t):
    """x_t = (1 - t) x0 + t eps."""
    return (1 - widen(t, x0)) * x0 + widen(t, x0) * eps


def velocity(x0, eps):
    """v = eps - x0, what the model learns."""
    return eps - x0


def data_prediction(x_t, v, t):
    """x0 = x_t - t v."""
    return x_t - widen(t, x_t) * v


def euler_step(x, v, t, s):
    """x_s = x_t + (s - t) v; the one step of every sampler here."""
    return x + widen(s - t, x) * v


# --- 2. Configuration and sizes -------------------------------------------------------------------

@dataclass(frozen=True)
class LensConfig:
    """Field names and defaults of the released transformer/config.json [checkpoint]."""
    patch_size: int = 2                # latent pixels folded into one token, per side
    in_channels: int = 128             # channels of a token: out_channels * patch_size^2
    out_channels: int = 32             # channels of a latent pixel
    num_layers: int = 48
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    inner_dim: int = 1536              # width of both streams: heads * head_dim
    enc_hidden_dim: int = 2880         # width of the text encoder
    axes_dims_rope: tuple = (8, 28, 28)             # how head_dim is split: frame, row, column
    gate_mlp: bool = True
    rms_norm: bool = True
    multi_layer_encoder_feature: bool = True
    selected_layer_index: tuple = (5, 11, 17, 23)   # blocks of the text encoder, from 0

    def __post_init__(self):
        width = self.num_attention_heads * self.attention_head_dim
        require(self.inner_dim == width, f"inner_dim {self.inner_dim} is not "
                f"num_attention_heads * attention_head_dim = {width}")

        axes = self.axes_dims_rope
        all_even = all(axis % 2 == 0 for axis in axes)
        require(sum(axes) == self.attention_head_dim and all_even, f"axes_dims_rope {axes} must "
                f"be even and add up to attention_head_dim {self.attention_head_dim}")

        folded = self.out_channels * self.patch_size**2
        require(self.in_channels == folded, f"in_channels {self.in_channels} is not "
                f"out_channels {self.out_channels} * patch_size^2")

        for name in ("gate_mlp", "rms_norm", "multi_layer_encoder_feature"):
            value = getattr(self, name)
            require(value is True,
                    f"{name}={value}: only True is implemented, as in every released Lens")

    @classmethod
    def from_dict(cls, d):
        """From the keys of a config.json; unknown keys are ignored, missing ones have defaults."""
        known = {}
        for name, value in d.items():
            if name in cls.__dataclass_fields__:
                known[name] = tuple(value) if isinstance(value, list) else value
        heads, head_dim = known.get("num_attention_heads"), known.get("attention_head_dim")
        # Configs of other tools may leave out the width, which follows from the heads.
        if "inner_dim" not in known and heads and head_dim:
            known["inner_dim"] = heads * head_dim
        return cls(**known)

    def to_dict(self):
        """As JSON has it: tuples become lists."""
        return {name: list(value) if isinstance(value, tuple) else value
                for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Size:
    """One size of the whole system."""
    transformer: LensConfig
    vae: dict                          # what vae.LensVAE takes
    text_encoder: dict                 # model_type, and its config's arguments in transformers


FULL_VAE = dict(                       # FLUX.2's autoencoder [checkpoint]
    block_out_channels=[128, 256, 512, 512],
    latent_channels=32,
    norm_num_groups=32,
    layers_per_block=2,
)
TOY_VAE = dict(
    block_out_channels=[16, 32, 64, 96],
    latent_channels=8,
    norm_num_groups=8,
    layers_per_block=1,
)
NANO_VAE = dict(
    block_out_channels=[8, 8, 16, 16],
    latent_channels=4,
    norm_num_groups=4,
    layers_per_block=1,
)


def yarn(original_length):
    """GPT-OSS stretches its rotary positions by YaRN [checkpoint]. Without it the features are
    silently wrong: their cosine with the right ones is 0.94."""
    return dict(
        rope_type="yarn",
        rope_theta=150000.0,
        factor=32.0,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=False,
        original_max_position_embeddings=original_length,
    )


GPT_OSS_20B = dict(
    model_type="gpt_oss",
    num_hidden_layers=24,
    hidden_size=2880,
    intermediate_size=2880,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    num_local_experts=32,
    num_experts_per_tok=4,
    sliding_window=128,
    vocab_size=201088,
    initial_context_length=4096,
    pad_token_id=199999,
    rope_parameters=yarn(4096),
)
QWEN3_06B = dict(
    model_type="qwen3",
    num_hidden_layers=28,
    hidden_size=1024,
    intermediate_size=3072,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    max_position_embeddings=40960,
    tie_word_embeddings=True,
    rope_parameters=dict(rope_type="default", rope_theta=1e6),
)
TOY_GPT_OSS = dict(
    model_type="gpt_oss",
    num_hidden_layers=4,
    hidden_size=96,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=128,
    vocab_size=1024,
    max_position_embeddings=16384,
    initial_context_length=512,
    rope_parameters=yarn(512),
)
NANO_GPT_OSS = dict(
    TOY_GPT_OSS,
    num_hidden_layers=2,
    hidden_size=32,
    intermediate_size=32,
    head_dim=8,
)

SIZES = {
    # The smallest thing with every part in it, for tests. [ours]
    "nano": Size(
        LensConfig(in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
                   num_attention_heads=2, inner_dim=32, enc_hidden_dim=32,
                   axes_dims_rope=(4, 6, 6), selected_layer_index=(0, 1)),
        NANO_VAE, NANO_GPT_OSS),
    # What weights/toy ships, trained on two CPU cores. [ours]
    "toy": Size(
        LensConfig(in_channels=32, out_channels=8, num_layers=5, attention_head_dim=32,
                   num_attention_heads=5, inner_dim=160, enc_hidden_dim=96,
                   axes_dims_rope=(8, 12, 12), selected_layer_index=(0, 1, 2, 3)),
        TOY_VAE, TOY_GPT_OSS),
    # For one consumer GPU: a small denoiser, all else as in `full`. [ours]
    "small": Size(
        LensConfig(num_layers=8, num_attention_heads=6, inner_dim=384),
        FULL_VAE, GPT_OSS_20B),
    # The paper's ablation model, 1.2B with Qwen3-0.6B [paper]; its layout is ours. (The paper calls
    # it "Lens-Toy"; it is not our toy.)
    "1b": Size(
        LensConfig(num_layers=14, enc_hidden_dim=1024, selected_layer_index=(6, 13, 20, 27)),
        FULL_VAE, QWEN3_06B),
    # The released model. [checkpoint]
    "full": Size(LensConfig(), FULL_VAE, GPT_OSS_20B),
}


# --- 3. Rotary positions: attention learns "two rows up" instead of absolute places [checkpoint] --

@lru_cache(maxsize=256)
def rope_table(grid, text_len, axes, device):
    """(cos, sin) of every joint token's angles: [h*w + text_len, 1, head_dim/2, 2], always fp32.

    Computed in bf16, the angle at position 40 would be off by a tenth of a radian. The table is
    cached: a sampler asks for the same one at every step. The axis of length 1 stands for the
    heads.
    """
    h, w = grid
    # A cached inference-mode tensor could not be used in training later.
    with torch.inference_mode(False), torch.no_grad():
        # Centred, so that a model trained at one size meets few new positions at another: six
        # rows are -3 ... 2, five rows -3 ... 1.
        rows = torch.arange(h, device=device) - (h - h // 2)
        columns = torch.arange(w, device=device) - (w - w // 2)
        # Text goes on where the picture ends, on all three axes.
        text = torch.arange(text_len, device=device) + max(h // 2, w // 2)

        positions = (
            torch.cat([torch.zeros(h * w, device=device), text]),      # frame: 0 for a picture
            torch.cat([rows.repeat_interleave(w), text]),              # row
            torch.cat([columns.repeat(h), text]),                      # column
        )
        angles = []
        for position, dim in zip(positions, axes):
            exponent = torch.arange(0, dim, 2, device=device).float() / dim
            angles.append(position.float()[:, None] * 10000.0 ** -exponent)    # [N + S, dim/2]
        angles = torch.cat(angles, -1)                                 # [N + S, head_dim/2]
        return torch.stack((angles.cos(), angles.sin()), -1)[:, None]


def rotate(x, rope):
    """Turns each (even, odd) pair of channels of x [B, N, heads, head_dim] by its angle."""
    pairs = x.float().unflatten(-1, (-1, 2))                           # [B, N, H, D/2, 2]
    if torch.compiler.is_compiling():
        # The form that the compiler fuses; it cannot fuse complex numbers.
        a, b = pairs.unbind(-1)
        cos, sin = rope.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    else:
        # A pair as one complex number: 8 times as fast on a CPU without the compiler.
        product = torch.view_as_complex(pairs) * torch.view_as_complex(rope)
        turned = torch.view_as_real(product)
    return turned.flatten(-2).type_as(x)


# --- 4. The block: two streams, image and text, that meet in one attention [checkpoint] -----------

class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        # F.rms_norm takes its statistics in fp32, whatever x is.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def modulate(x, norm, shift, scale):
    """norm(x) * (1 + scale) + shift, for x [B, N, W] and shift, scale [B or 1, 1, W].

    The norm's own weight goes into the scale, which is one row a picture. On x it would cost one
    more pass over all tokens.
    """
    x = F.rms_norm(x, norm.weight.shape, None, norm.eps)
    scale = norm.weight.to(scale.dtype) * (1 + scale)
    return torch.addcmul(shift, x, scale)                              # shift + x * scale


class SwiGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        # Three matrices of width x 8/3 width cost what two of width x 4 width do.
        hidden = int(width / 3 * 8)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def attend(q, k, v, mask=None):
    """Attention over q, k, v [B, N, H, D] -> [B, N, H * D]. mask [B, 1, 1, N]: True where a key is
    visible; None: all are."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, N, D]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


class JointAttention(nn.Module):
    def __init__(self, width, head_dim):
        super().__init__()
        self.head_dim = head_dim
        # Norms on q and k bound the attention logits; without them they grow until the softmax
        # saturates. The `added` ones are the text's.
        self.norm_q = RMSNorm(head_dim, 1e-6)
        self.norm_k = RMSNorm(head_dim, 1e-6)
        self.norm_added_q = RMSNorm(head_dim, 1e-6)
        self.norm_added_k = RMSNorm(head_dim, 1e-6)
        self.img_qkv = nn.Linear(width, 3 * width)
        self.txt_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])         # a list in the checkpoint
        self.to_add_out = nn.Linear(width, width)

    def qkv(self, x, linear, norm_q, norm_k, rope):
        """x [B, N, W] -> q, k, v [B, N, H, D]; q and k normed and rotated. [checkpoint]"""
        fused = linear(x).unflatten(-1, (3, -1, self.head_dim))        # [B, N, 3, H, D]
        q, k, v = fused.unbind(2)
        q = rotate(norm_q(q), rope)
        k = rotate(norm_k(k), rope)
        return q.to(v.dtype), k.to(v.dtype), v     # under autocast norms give fp32

    def forward(self, img, txt, rope, mask, last):
        """img [B, N, W], txt [b, S, W] or None -> what attention adds to each; None for txt if
        there is none, or if the block is the `last`, where nobody reads it.

        The first b pictures see text, the others see none: b < B where the two branches of
        guidance share a batch (see Context).
        """
        N = img.shape[1]
        q, k, v = self.qkv(img, self.img_qkv, self.norm_q, self.norm_k, rope[:N])
        if txt is None:
            return self.to_out[0](attend(q, k, v)), None

        b = len(txt)
        tq, tk, tv = self.qkv(txt, self.txt_qkv, self.norm_added_q, self.norm_added_k, rope[N:])
        joint_q = torch.cat([q[:b], tq], 1)                            # [b, N + S, H, D]
        joint_k = torch.cat([k[:b], tk], 1)
        joint_v = torch.cat([v[:b], tv], 1)
        joint = attend(joint_q, joint_k, joint_v, mask)                # [b, N + S, W]

        out = joint[:, :N]
        if len(img) > b:
            out = torch.cat([out, attend(q[b:], k[b:], v[b:])])        # [B, N, W]
        txt_out = None if last else self.to_add_out(joint[:, N:])      # [b, S, W]
        return self.to_out[0](out), txt_out


class Block(nn.Module):
    def __init__(self, width, head_dim, last):
        super().__init__()
        self.last = last               # the last block's text output is never read: not computed
        self.recompute = "none"        # see LensTransformer.set_recompute
        self.attn = JointAttention(width, head_dim)

        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.img_norm1 = RMSNorm(width, 1e-6)
        self.img_norm2 = RMSNorm(width, 1e-6)
        self.img_mlp = SwiGLU(width)

        self.txt_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.txt_norm1 = RMSNorm(width, 1e-6)
        self.txt_norm2 = RMSNorm(width, 1e-6)
        self.txt_mlp = SwiGLU(width)

    def modulation_of(self, time):
        """time [B, W] -> for each stream [B, 6, 1, W]: shift, scale, gate of the attention, then
        of the MLP."""
        img_mod = self.img_mod(time).unflatten(-1, (6, 1, -1))
        txt_mod = self.txt_mod(time).unflatten(-1, (6, 1, -1))
        return img_mod, txt_mod

    def forward(self, img, txt, time, modulation, rope, mask):
        """img [B, N, W], txt [b, S, W] or None, time [B or 1, W] -> img, txt.

        modulation: what `modulation_of` gave before, for time; None: it is made here.
        """
        inputs = (img, txt, time, modulation, rope, mask)
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.compute(*inputs)
        if self.recompute == "full":
            return checkpoint(self.compute, *inputs, use_reentrant=False)
        return checkpoint(self.compute, *inputs, use_reentrant=False, context_fn=keep_products)

    def compute(self, img, txt, time, modulation, rope, mask):
        if modulation is None:
            modulation = self.modulation_of(time)
        img_mod, txt_mod = modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = img_mod.unbind(1)           # [B, 1, W]
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mod.unbind(1)

        # Attention, over both streams at once.
        a_img = modulate(img, self.img_norm1, shift1, scale1)                      # [B, N, W]
        a_txt = None
        if txt is not None:
            a_txt = modulate(txt, self.txt_norm1, txt_shift1, txt_scale1)          # [b, S, W]
        a_img, a_txt = self.attn(a_img, a_txt, rope, mask, self.last)

        # Gates on the residual, then each stream's MLP.
        img = torch.addcmul(img, gate1, a_img)
        m_img = self.img_mlp(modulate(img, self.img_norm2, shift2, scale2))
        img = torch.addcmul(img, gate2, m_img)
        if a_txt is not None:
            txt = torch.addcmul(txt, txt_gate1, a_txt)
            m_txt = self.txt_mlp(modulate(txt, self.txt_norm2, txt_shift2, txt_scale2))
            txt = torch.addcmul(txt, txt_gate2, m_txt)
        return img, txt


def keep_products():
    """For selective recomputation: what matrix products and attention gave is kept, the cheap
    rest is run again."""
    heavy = ("aten.mm", "aten.addmm", "aten.bmm", "aten._scaled_dot_product")

    def policy(context, op, *args, **kwargs):
        if str(op).startswith(heavy):              # op: such as aten.mm.default
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


# --- 5. The denoiser ------------------------------------------------------------------------------

class Context(NamedTuple):
    """What depends on the prompt and the size alone. A sampler makes it once, for every step.

    `txt` may hold fewer rows than the batch of image tokens: the first pictures see its rows, the
    others see no text at all. So the two branches of guidance, with the prompt and without, can
    share one forward: give [x, x], the text of the first half, and a modulation of one row
    (Modulation.at). With a row for each picture, text and pictures would not match in number.
    """
    txt: Tensor | None         # [b, S, W], or None: no text at all
    rope: Tensor               # [N + S, 1, head_dim/2, 2]
    mask: Tensor | None        # [b, 1, 1, N + S], True where a key is visible; None: all are


class Modulation(NamedTuple):
    """What depends on t alone, made for all T steps of a sampler at once. It takes a third of the
    model's weights: 12 of a block's 36 W^2."""
    time: Tensor               # [T, W]
    blocks: tuple              # per block (image, text) [T, 6, 1, W], or None: made in the block
    out: Tensor                # [T, 2 W]

    def at(self, i):
        """That of time i alone, which broadcasts over the pictures of a batch."""
        row = slice(i, i + 1)
        blocks = tuple((img_mod[row], txt_mod[row]) for img_mod, txt_mod in self.blocks)
        return Modulation(self.time[row], blocks, self.out[row])


class LensTransformer(nn.Module):
    """The denoiser, 4B parameters at full size. Names and shapes of its state dict are exactly
    those of the released checkpoint, odd ones included."""

    def __init__(self, config):
        super().__init__()
        width = config.inner_dim
        self.config = config
        self.records_graphs = False    # True: its blocks run as CUDA graphs, see kit.run
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": nn.ModuleDict({
            "linear_1": nn.Linear(256, width),
            "linear_2": nn.Linear(width, width),
        })})
        # Features of GPT-OSS reach 1e4, each layer at its own scale: each has its own norm
        # before they are mixed.
        layers = len(config.selected_layer_index)
        self.txt_norm = nn.ModuleList(
            [RMSNorm(config.enc_hidden_dim, 1e-5) for _ in range(layers)])
        self.txt_in = nn.Linear(config.enc_hidden_dim * layers, width)
        self.img_in = nn.Linear(config.in_channels, width)
        self.transformer_blocks = nn.ModuleList(
            [Block(width, config.attention_head_dim, last=i == config.num_layers - 1)
             for i in range(config.num_layers)])
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(width, 2 * width)})
        self.proj_out = nn.Linear(width, config.in_channels)

    def init_weights(self, generator=None):
        """[ours] adaLN-zero as in DiT: every gate starts at zero, so every block starts as the
        identity, and the output starts at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for linear in self.time_text_embed["timestep_embedder"].values():
            nn.init.normal_(linear.weight, std=0.02, generator=generator)
        for block in self.transformer_blocks:
            nn.init.zeros_(block.img_mod[1].weight)
            nn.init.zeros_(block.txt_mod[1].weight)
        nn.init.zeros_(self.norm_out["linear"].weight)
        nn.init.zeros_(self.proj_out.weight)
        return self

    def unread(self):
        """Names of the parameters that are never run, since only the last block's text output
        would need them. They get no gradient; DDP and LoRA must know. (What makes that block's text
        queries is run in vain: its gradient is zero.)"""
        last = f"transformer_blocks.{self.config.num_layers - 1}."
        dead = (last + "attn.to_add_out.", last + "txt_norm2.", last + "txt_mlp.")
        return [name for name, _ in self.named_parameters() if name.startswith(dead)]

    def set_recompute(self, how):
        """What the blocks keep for the backward pass. "none": all of it; "full": their inputs
        alone, each block is run again; "selective": what products and attention gave."""
        for block in self.transformer_blocks:
            block.recompute = how

    def time(self, t):
        """t [T] -> its embedding [T, W]."""
        # t is rounded to the activations' type first, as in training of the released weights
        # [checkpoint]. It matters: 1000 t is off by up to 2 then.
        weight = self.txt_norm[0].weight
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)

        frequencies = 10000.0 ** -(torch.arange(128, device=t.device).float() / 128)
        angles = 1000.0 * t.to(dtype).float()[:, None] * frequencies               # [T, 128]
        wave = torch.cat([angles.cos(), angles.sin()], -1).to(weight.dtype)        # [T, 256]
        embed = self.time_text_embed["timestep_embedder"]
        return embed["linear_2"](F.silu(embed["linear_1"](wave)))                  # [T, W]

    def prepare(self, text, text_mask, grid):
        """The work that does not depend on t: -> Context.

        text       K x [B, S, E], features of K layers of the encoder; None: no text at all
        text_mask  [B, S] bool; None: every token is visible. (It is not found out here: to look
                   into a mask, the CPU would have to wait for the GPU.)
        grid       (h, w) image tokens
        """
        N = grid[0] * grid[1]
        txt, mask, S = None, None, 0
        if text is not None:
            require(len(text) == len(self.txt_norm), f"{len(text)} text features given, "
                    f"this model reads {len(self.txt_norm)} layers")
            dtype = self.txt_norm[0].weight.dtype
            normed = [norm(layer.to(dtype)) for norm, layer in zip(self.txt_norm, text)]
            txt = self.txt_in(torch.cat(normed, -1))                               # [B, S, W]
            S = txt.shape[1]
            if text_mask is not None:
                visible = F.pad(text_mask.bool(), (N, 0), value=True)              # [B, N + S]
                mask = visible[:, None, None]
        axes, device = tuple(self.config.axes_dims_rope), self.txt_norm[0].weight.device
        return Context(txt, rope_table(tuple(grid), S, axes, device), mask)

    def modulation(self, t):
        """Everything that depends on t [T] alone, for all T times at once: -> Modulation."""
        time = self.time(t)
        blocks = tuple(block.modulation_of(time) for block in self.transformer_blocks)
        return Modulation(time, blocks, self.norm_out["linear"](F.silu(time)))

    def velocity_from(self, x, modulation, context, on_block=None):
        """x [B, N, C] -> v [B, N, C], from what was prepared before.

        on_block   called as on_block(i, img) with the image tokens [B, N, W] after block i
        """
        if self.records_graphs:
            # CUDA graphs write to the same memory again: the last step's results may go now.
            torch.compiler.cudagraph_mark_step_begin()
        img, txt = self.img_in(x), context.txt                                     # [B, N, W]
        for i, block in enumerate(self.transformer_blocks):
            img, txt = block(img, txt, modulation.time, modulation.blocks[i],
                             context.rope, context.mask)
            if on_block:
                on_block(i, img)
        scale, shift = modulation.out[:, None].chunk(2, -1)        # scale first here [checkpoint]
        normed = F.layer_norm(img, img.shape[-1:], eps=1e-6)
        img = torch.addcmul(shift, normed, 1 + scale)                              # [B, N, W]
        return self.proj_out(img)                                                  # [B, N, C]

    def forward(self, x, t, text, text_mask, grid, on_block=None):
        """x [B, h*w, C], t [B] -> velocity [B, h*w, C]; the rest as in `prepare`.

        Unlike in sampling, each block makes its own modulation here: a block that uses all of its
        weights itself can be recomputed, compiled, and sharded by FSDP, which gathers the weights
        of one block at a time.
        """
        require(x.shape[1] == grid[0] * grid[1],
                f"{x.shape[1]} tokens do not fill a grid of {grid[0]} x {grid[1]}")
        time = self.time(t)                                                        # [B, W]
        in_blocks = (None,) * len(self.transformer_blocks)
        modulation = Modulation(time, in_blocks, self.norm_out["linear"](F.silu(time)))
        return self.velocity_from(x, modulation, self.prepare(text, text_mask, grid), on_block)


def build(size, seed=0):
    """A fresh denoiser of one of SIZES. Its weights come from `seed` alone: it is made without
    storage first, which leaves PyTorch's global random state as it was."""
    require(size in SIZES, f"unknown size {size!r}: choose one of {', '.join(SIZES)}")
    with torch.device("meta"):
        model = LensTransformer(SIZES[size].transformer)
    return model.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(seed))


# --- 6. Noise levels ------------------------------------------------------------------------------

def sigmas(image_tokens, steps):
    """Levels of the sampler, fp32 [steps + 1], 1 first and 0 last.

    The odds of every level, t / (1 - t), are multiplied by e^mu, so that more steps lie near t = 1:
    the more tokens, the more noise it takes to hide a picture. The fit of mu is empirical
    [checkpoint]. Up to 4300 tokens it grows with them and falls with the number of steps. Above, it
    depends on the tokens alone, and begins again lower: 2.22 at 4300 and 1.18 at 4301, for 20
    steps. A constant mu, as other code bases have it (1.15, 1.83), fits one size at most.
    """
    mu_200 = 0.00016927 * image_tokens + 0.45666666                # at 200 steps
    mu_10 = 8.73809524e-05 * image_tokens + 1.89833333             # at 10 steps
    if image_tokens > 4300:
        mu = mu_200
    else:
        mu = mu_10 + (mu_200 - mu_10) * (steps - 10) / (200 - 10)
    sigma = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    sigma = math.exp(mu) / (math.exp(mu) + 1 / sigma - 1)          # odds times e^mu
    return torch.cat([sigma, sigma.new_zeros(1)]).float()


# --- 7. Text: a frozen language model reads the prompt; some of its layers are the condition ------

# [ours] The date that the chat around a prompt names. The reference names today's: there, the same
# seed gives another picture tomorrow.
DATE = "2026-05-23"
DESCRIBE = ("Describe the image by detailing the color, shape, size, texture, quantity, text, "
            "spatial relationships of the objects and background.")

CHAT = {  # what stands before and after the prompt, to the letter
    "gpt_oss": (  # [checkpoint]
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: {date}\n\nReasoning: medium\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message."
        "<|end|><|start|>developer<|message|># Instructions\n\n" + DESCRIBE + "\n\n<|end|>"
        "<|start|>user<|message|>",
        "<|end|><|start|>assistant<|channel|>analysis<|message|>Need to generate one image "
        "according to the description.<|end|><|start|>assistant<|channel|>final<|message|>"),
    "qwen3": (  # [ours]: the paper's rendering for Qwen3 is not published
        "<|im_start|>system\n" + DESCRIBE + "<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
}
# Anything from `<|` to the next `|>` without another `<|` between: the innermost marker first.
MARKER = re.compile(r"<\|(?:(?!<\|).)*?\|>")


def strip_markers(prompt):
    """The prompt without `<|...|>`: it must not close its own message and speak as the system."""
    # Again until none is left, for the sake of `<|<|end|>end|>`.
    while MARKER.search(prompt):
        prompt = MARKER.sub("", prompt)
    return prompt


@torch.no_grad()
def text_features(hf_model, input_ids, attention_mask, layers):
    """Hidden states after the given blocks, counted from 0: K x [B, S, E], padding zeroed.

    input_ids, attention_mask [B, S]. Hooks take them, because `output_hidden_states` passes the
    last one through the final norm, which the denoiser was not trained on [checkpoint].
    """
    trunk = getattr(hf_model, "model", hf_model)   # without its head, whose logits nobody needs
    require(min(layers) >= 0 and max(layers) < len(trunk.layers),
            f"text layers {tuple(layers)} asked of an encoder with {len(trunk.layers)} blocks")
    hidden = {}

    def keep(i):
        def hook(module, inputs, output):
            hidden[i] = output[0] if isinstance(output, tuple) else output
        return hook

    hooks = [trunk.layers[i].register_forward_hook(keep(i)) for i in layers]
    try:
        trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    padding = attention_mask[..., None] == 0                                       # [B, S, 1]
    return [hidden[i].masked_fill(padding, 0) for i in layers]                     # K x [B, S, E]


class TextEncoder:
    """A language model, its tokenizer, and which of its layers the denoiser reads.

    model      of transformers, with its head where it has one: then it can write, too (reason.py)
    date       what the chat around the prompt says; max_length: tokens, the chat's included
    """

    def __init__(self, model, tokenizer, layers, date=DATE, max_length=512):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.layers = tuple(layers)
        self.date = date
        self.max_length = max_length
        self.kind = model.config.model_type
        require(self.kind in CHAT,
                f"text encoder of type {self.kind!r}: known are {', '.join(CHAT)}")

    def chat(self):
        """(head, tail): what stands before and after the prompt."""
        head, tail = CHAT[self.kind]
        return head.replace("{date}", self.date), tail

    def render(self, prompt):
        """The whole text that the language model reads."""
        head, tail = self.chat()
        return head + strip_markers(prompt) + tail

    def tokens(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def tokenize(self, prompts):
        """-> (a list of ids per prompt, the offset at which the prompt begins in each).

        Head, prompt and tail are tokenized apart, so that only the prompt is cut where it is too
        long: the tail's features are part of the condition. The ids are those of the whole text,
        since head and tail end and begin with a marker (Qwen's head with a line's end, so there
        only where the prompt does not begin with white space).
        """
        head, tail = (self.tokens(part) for part in self.chat())
        room = max(0, self.max_length - len(head) - len(tail))
        rows = []
        for prompt in prompts:
            ids = self.tokens(strip_markers(prompt))
            if len(ids) > room:
                warnings.warn(f"prompt of {len(ids)} tokens: the last {len(ids) - room} were cut, "
                              f"{room} fit", stacklevel=3)
            rows.append(head + ids[:room] + tail)
        return rows, len(head)

    def encode(self, prompts):
        """[prompt] -> (K x [B, S, E], mask [B, S] bool, or None when all are equally long).

        Padded on the right to the longest of the batch only.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows, offset = self.tokenize(prompts)
        device = self.model.device
        lengths = [len(row) for row in rows]
        longest, pad = max(lengths), self.pad_id()

        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
        positions = torch.arange(longest, device=device)
        # L is the longest chat, S without its head.
        visible = positions < torch.tensor(lengths, device=device)[:, None]        # [B, L]
        features = text_features(self.model, ids, visible.long(), self.layers)     # K x [B, L, E]

        # The head is the same for every prompt and says nothing: its features are dropped. The
        # tail's are kept.
        features = [layer[:, offset:].contiguous() for layer in features]          # K x [B, S, E]
        if min(lengths) == longest:
            return features, None
        return features, visible[:, offset:]

    def encode_each(self, prompts):
        """[prompt] -> [its own features [K, S, E]], nothing padded: equal lengths run together.

        Empty prompts give None: an empty prompt is never encoded, it is no text at all
        [checkpoint]. (One of markers alone is encoded, as the empty string.)
        """
        features = [None] * len(prompts)
        by_length = {}
        for i, row in enumerate(self.tokenize(prompts)[0]):
            if prompts[i].strip():
                by_length.setdefault(len(row), []).append(i)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")        # `tokenize` has already told what was cut
            for members in by_length.values():
                for k in range(0, len(members), 64):
                    chunk = members[k:k + 64]
                    layers, _ = self.encode([prompts[i] for i in chunk])           # K x [B, S, E]
                    for i, own in zip(chunk, torch.stack(layers, 1)):              # [K, S, E]
                        features[i] = own
        return features

    def pad_id(self):
        for pad in (self.model.config.pad_token_id, self.tokenizer.pad_token_id):
            if pad is not None:
                return pad
        return 0


def text_model_classes(kind):
    """-> (model class, config class) of transformers for a model_type. The import takes seconds."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    require(kind in CHAT, f"text encoder of type {kind!r}: known are {', '.join(CHAT)}")
    if kind == "gpt_oss":
        return transformers.GptOssForCausalLM, transformers.GptOssConfig
    return transformers.Qwen3ForCausalLM, transformers.Qwen3Config


def build_text_model(spec, seed=0, **override):
    """A fresh language model from a row of SIZES, say
    build_text_model(SIZES["toy"].text_encoder, vocab_size=len(tokenizer))."""
    spec = {**spec, **override}
    model_class, config_class = text_model_classes(spec.pop("model_type"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config_class(**spec))


def main():
    print(f"{'size':6} {'parameters':>14} {'blocks':>6} {'width':>6} {'heads':>8} {'token':>6}"
          "  text encoder")
    for name, size in SIZES.items():
        config = size.transformer
        with torch.device("meta"):
            count = sum(p.numel() for p in LensTransformer(config).parameters())
        heads = f"{config.num_attention_heads} x {config.attention_head_dim}"
        print(f"{name:6} {count:14,} {config.num_layers:6} {config.inner_dim:6} {heads:>8} "
              f"{config.in_channels:6}  {size.text_encoder['model_type']}, width "
              f"{config.enc_hidden_dim}, blocks {config.selected_layer_index}")


if __name__ == "__main__":
    main()
