"""Matrices in 8-bit floating point: half the memory of bf16, and faster products on recent GPUs.

Read before: the block of lens.py.

Two layers, for two ends. Fp8Linear multiplies 8-bit numbers: faster sampling where the GPU can.
PackedLinear only stores them and multiplies as precisely as ever: a frozen base under a LoRA in
training, on any machine.
"""
import torch
import torch.nn.functional as F
from torch import nn

LARGEST = 448                  # the largest number of e4m3

# A block's matrices that work on image tokens. Text and modulation stay as they are: they are few
# tokens, or one row.
IMAGE_MATRICES = ("attn.img_qkv", "attn.to_out.0", "img_mlp.w1", "img_mlp.w2", "img_mlp.w3")


def e4m3(x, dim=()):
    """x -> (x / scale in 8 bits, scale fp32): one scale for each slice along dim, or one in all.

    e4m3 keeps three bits behind the leading one, so each number is off by up to 6%. The scales are
    powers of two, which rounds nothing more: what was fp8 once stays as it is.
    """
    largest = x.abs().amax(dim, keepdim=True).float()
    scale = largest.clamp_min(1e-12) / LARGEST                    # zeros must not divide by zero
    scale = scale.log2().ceil().exp2()
    return (x / scale).to(torch.float8_e4m3fn), scale


class Fp8Linear(nn.Module):
    """y = W x + b by products of 8-bit numbers. [ours]

    W has a scale a row, made once; x has a scale a token, made at each call.
    """

    def __init__(self, linear):
        super().__init__()
        weight, scale = e4m3(linear.weight.detach(), dim=1)
        self.weight = nn.Buffer(weight)                           # [out, in] e4m3
        self.scale = nn.Buffer(scale)                             # [out, 1] fp32
        self.bias = linear.bias

    def forward(self, x):                                         # [B, N, in]
        tokens, scale = e4m3(x.flatten(0, 1), dim=1)              # [B*N, in], [B*N, 1]
        y = torch._scaled_mm(
            tokens, self.weight.t(), scale, self.scale.t(), self.bias,
            out_dtype=x.dtype, use_fast_accum=True)               # [B*N, out]
        return y.unflatten(0, x.shape[:2])                        # [B, N, out]


class PackedLinear(nn.Module):
    """y = W x + b, W stored in 8 bits with a scale a row, and unpacked each time it is used. [ours]

    W and b are frozen: gradients flow to x alone.
    """

    def __init__(self, linear):
        super().__init__()
        weight, scale = e4m3(linear.weight.detach(), dim=1)
        self.weight = nn.Parameter(weight, requires_grad=False)       # [out, in] e4m3
        self.scale = nn.Parameter(scale[:, 0], requires_grad=False)   # [out] fp32
        self.bias = linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def forward(self, x):                                         # [..., in]
        return packed_product(x, self.weight, self.scale, self.bias)


def packed_product(x, weight, scale, bias):
    """W x + b in the type that x has, or that of autocast where it is on.

    x [..., in];  weight [out, in] e4m3, scale [out] fp32: a PackedLinear's
    """
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return PackedProduct.apply(x.to(dtype), weight, scale, bias)


class PackedProduct(torch.autograd.Function):
    """Keeps the packed matrix for the backward pass: autograd by itself would keep the unpacked one
    of every layer, more than a base in bf16 takes."""

    @staticmethod
    def forward(ctx, x, weight, scale, bias):
        ctx.save_for_backward(weight, scale)
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, unpacked(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):                                      # [..., out]
        return grad @ unpacked(*ctx.saved_tensors, grad.dtype), None, None, None


def unpacked(weight, scale, dtype):
    return (weight.float() * scale[:, None]).to(dtype)            # [out, in]


def pack_blocks(model):
    """Packs the matrices of attention and MLPs of both streams, in place. Not those of the
    modulation: in 8 bits they are seen in the pictures, as others found (docs/weights.md)."""
    for block in model.transformer_blocks:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear) and "_mod." not in name:
                block.set_submodule(name, PackedLinear(layer))


def to_fp8(model):
    """Puts the image stream's matrices in 8 bits, in place; returns the model.

    Matrices with a side that 16 does not divide stay: the kernels cannot do them (the toy's MLP).
    """
    for block in model.transformer_blocks:
        for name in IMAGE_MATRICES:
            linear = block.get_submodule(name)
            rows, columns = linear.weight.shape
            if rows % 16 == 0 and columns % 16 == 0:
                block.set_submodule(name, Fp8Linear(linear))
    return model
