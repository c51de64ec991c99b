"""Pixels to tokens and back: FLUX.2's autoencoder in plain PyTorch. The model alone.

Read before: nothing. Assumes that you have seen a convolution and a KL divergence.
`toy/autoencoder.py` trains the small one that we ship; `kit/checkpoint.py` reads and writes files.

What happens to one picture of 96 x 64 pixels in the toy (full size in brackets; both are 8x down,
then folded 2x2):

    pixels   [B,   3, 96, 64]                          RGB in [-1, 1]
    latent   [B,   8, 12,  8]   ([B,  32, 12, 8])      encode: the posterior's mean and log variance
    tokens   [B, 24, 32]        ([B, 24, 128])         to_tokens: 6 x 4 = 24 cells of 16 x 16 pixels
    latent   [B,   8, 12,  8]                          to_latent(tokens, (6, 4))
    pixels   [B,   3, 96, 64]                          decode

The denoiser never sees pixels: it sees the tokens. So the tokens decide how hard its task is.
Three things make them easy: they are few (16x down), smooth (the KL term of the training: nearby
latents decode to nearby pictures), and of zero mean and unit variance (kept statistics, `bn`).

Where this departs: the paper takes FLUX.2's weights, frozen. So do the larger sizes here; the toy's
are trained by us.
"""
import torch
import torch.nn.functional as F
from torch import nn

CONFIG_KEYS = ("block_out_channels", "latent_channels", "norm_num_groups", "layers_per_block")

# Every attribute below is named as in the released checkpoint, so that state_dict() needs no
# renaming anywhere. [checkpoint]


# --- Parts of both halves -------------------------------------------------------------------------

def group_norm(groups, width):
    """GroupNorm with eps 1e-6, as the weights were trained, not torch's 1e-5. [checkpoint]"""
    return nn.GroupNorm(groups, width, eps=1e-6)


class ResBlock(nn.Module):
    """Two 3x3 convolutions beside a residual path, with a 1x1 only where the width changes."""

    def __init__(self, cin, cout, groups):
        super().__init__()
        self.norm1 = group_norm(groups, cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = group_norm(groups, cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.conv_shortcut = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1)

    def forward(self, x):                                         # [B, cin, H, W]
        h = self.conv1(F.silu(self.norm1(x)))                     # [B, cout, H, W]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """One head over all positions: the one place where far corners of a picture meet."""

    def __init__(self, width, groups):
        super().__init__()
        self.group_norm = group_norm(groups, width)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])    # a list, as the checkpoint has it

    def forward(self, x):                                         # [B, C, H, W]
        h = self.group_norm(x).flatten(2).transpose(1, 2)         # [B, H*W, C]
        q = self.to_q(h).unsqueeze(1)                             # [B, 1 head, H*W, C]
        k = self.to_k(h).unsqueeze(1)
        v = self.to_v(h).unsqueeze(1)
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)    # [B, H*W, C]
        h = self.to_out[0](h)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])    # [B, C, H, W]


class Mid(nn.Module):
    """The middle of either half, at the lowest resolution."""

    def __init__(self, width, groups):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(width, groups)])
        self.resnets = nn.ModuleList([ResBlock(width, width, groups) for _ in range(2)])

    def forward(self, x):                                         # [B, C, H, W] -> the same shape
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


def res_blocks(cin, cout, layers, groups):
    """The residual blocks of one resolution. The first one changes the width."""
    first = ResBlock(cin, cout, groups)
    others = [ResBlock(cout, cout, groups) for _ in range(layers - 1)]
    return nn.ModuleList([first, *others])


# --- Encoder --------------------------------------------------------------------------------------

class Downsample(nn.Module):
    """Half the height and half the width."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x):                                         # [B, C, H, W] -> [B, C, H/2, W/2]
        # Right and bottom only: with padding on all sides each level would look a pixel of its
        # input further up and left than the released weights do. [checkpoint]
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class DownStage(nn.Module):
    """Residual blocks at one resolution, then a step down, but for the last stage."""

    def __init__(self, cin, cout, layers, groups, last):
        super().__init__()
        self.resnets = res_blocks(cin, cout, layers, groups)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(cout)])

    def forward(self, x):                                         # [B, cin, H, W]
        for block in self.resnets:
            x = block(x)                                          # [B, cout, H, W]
        for step in self.downsamplers:
            x = step(x)                                           # [B, cout, H/2, W/2]
        return x


class Encoder(nn.Module):
    """[B, 3, H, W] -> [B, cout, H/8, W/8]: stages downwards, then the middle. Of four stages three
    halve the size."""

    def __init__(self, cout, widths, layers, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        cin = widths[0]
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            self.down_blocks.append(DownStage(cin, width, layers, groups, last))
            cin = width
        self.mid_block = Mid(cin, groups)
        self.conv_norm_out = group_norm(groups, cin)
        self.conv_out = nn.Conv2d(cin, cout, 3, padding=1)

    def forward(self, x):                                         # [B, 3, H, W]
        x = self.conv_in(x)                                       # [B, C0, H, W]
        for stage in self.down_blocks:
            x = stage(x)                                          # at last [B, C3, H/8, W/8]
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))       # [B, cout, H/8, W/8]


# --- Decoder: the mirror image --------------------------------------------------------------------

class Upsample(nn.Module):
    """Twice the height and twice the width."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):                                         # [B, C, H, W] -> [B, C, 2H, 2W]
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UpStage(nn.Module):
    """Residual blocks at one resolution, then a step up, but for the last stage."""

    def __init__(self, cin, cout, layers, groups, last):
        super().__init__()
        self.resnets = res_blocks(cin, cout, layers, groups)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(cout)])

    def forward(self, x):                                         # [B, cin, H, W]
        for block in self.resnets:
            x = block(x)                                          # [B, cout, H, W]
        for step in self.upsamplers:
            x = step(x)                                           # [B, cout, 2H, 2W]
        return x


class Decoder(nn.Module):
    """[B, cin, h, w] -> [B, 3, 8h, 8w]: the middle, then stages upwards. Three of four double."""

    def __init__(self, cin, widths, layers, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(cin, widths[0], 3, padding=1)

        # The stages are made before the middle, though they run after it. Random starts are drawn
        # in this order, and training again from a seed must start as it did before.
        stages = nn.ModuleList()
        before = widths[0]
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            stages.append(UpStage(before, width, layers, groups, last))
            before = width
        self.mid_block = Mid(widths[0], groups)
        self.up_blocks = stages

        self.conv_norm_out = group_norm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x):                                         # [B, cin, h, w]
        x = self.mid_block(self.conv_in(x))                       # [B, C3, h, w]
        for stage in self.up_blocks:
            x = stage(x)                                          # at last [B, C0, 8h, 8w]
        return self.conv_out(F.silu(self.conv_norm_out(x)))       # [B, 3, 8h, 8w]


# --- Latent to tokens -----------------------------------------------------------------------------

class LensVAE(nn.Module):
    """The autoencoder. config: a mapping with CONFIG_KEYS, such as SIZES["toy"].vae of lens.py or a
    released config.json, whose other keys do not matter. ValueError names a key that is missing."""

    def __init__(self, config):
        super().__init__()
        for key in CONFIG_KEYS:
            if key not in config:
                raise ValueError(f"the autoencoder's config lacks '{key}'")
        self.config = {key: config[key] for key in CONFIG_KEYS}

        c = config["latent_channels"]
        widths = tuple(config["block_out_channels"])
        layers = config["layers_per_block"]
        groups = config["norm_num_groups"]
        self.encoder = Encoder(2 * c, widths, layers, groups)     # twice: mean and log variance
        self.decoder = Decoder(c, widths[::-1], layers + 1, groups)   # one layer more [checkpoint]
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)

        # Only its buffers are used, never its forward: in train mode a batch would be normalised by
        # its own statistics, and the same picture would get other tokens in other company.
        self.bn = nn.BatchNorm2d(4 * c, eps=1e-4, affine=False)

    def encode(self, images):
        """Images [B, 3, H, W] in [-1, 1] -> the posterior's mean and log variance, [B, c, H/8, W/8]
        each. Tokens are made of the mean; the autoencoder's own training draws from the two."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)        # early in training exp(logvar) would be infinite

    def decode(self, latent):
        """Latent [B, c, H/8, W/8] -> images [B, 3, H, W], about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latent))

    def to_tokens(self, latent):
        """Latent [B, c, 2h, 2w] -> tokens [B, h*w, 4c]: over the training's pictures each channel
        has mean 0 and variance 1."""
        mean, std = self.statistics()
        # Folded 2x2: the new channel counts (channel, row, column), column fastest. [checkpoint]
        z = F.pixel_unshuffle(latent, 2).float()                  # [B, 4c, h, w]
        z = (z - mean) / std
        return z.flatten(2).transpose(1, 2).to(latent.dtype)      # [B, h*w, 4c]

    def to_latent(self, tokens, grid):
        """Tokens [B, h*w, 4c] of a grid (h, w) -> latent [B, c, 2h, 2w], the inverse."""
        mean, std = self.statistics()
        z = tokens.float().transpose(1, 2)                        # [B, 4c, h*w]
        z = z.unflatten(2, tuple(grid)) * std + mean              # [B, 4c, h, w], channels last
        z = z.contiguous()                    # in fp32 a CPU decodes this layout faster
        return F.pixel_shuffle(z, 2).to(tokens.dtype)             # [B, c, 2h, 2w]

    def statistics(self):
        """Mean and standard deviation of the folded latent, [4c, 1, 1] each. In fp32, as
        kit/checkpoint.py keeps them: bf16 has two to three digits."""
        mean = self.bn.running_mean.float()
        std = torch.sqrt(self.bn.running_var.float() + self.bn.eps)
        return mean[:, None, None], std[:, None, None]
