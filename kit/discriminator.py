"""The discriminator of distillation: small heads on a frozen denoiser's image tokens that tell real
pictures from a student's.

Read before: lens.py.
"""
import torch
import torch.nn.functional as F
from torch import nn

R1_GAMMA = 1.0             # [paper] weight of R1
R1_NOISE = 0.1             # [paper] how far R1 moves a picture


def places(blocks):
    """Blocks whose output the heads read: after a third, two thirds and all of them. [ours]"""
    return sorted({blocks // 3, 2 * blocks // 3, blocks - 1})


def make_heads(config, seed):
    """One head a place, each a logit a token. The last layer's weights start at zero: all logits
    are then its bias, whatever the picture, and no force acts on the student. [ours]"""
    width = config.inner_dim
    hidden = min(256, width)
    heads = nn.ModuleList()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in places(config.num_layers):
            heads.append(nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, hidden),
                nn.SiLU(),
                nn.Linear(hidden, 1)))
    for head in heads:
        nn.init.zeros_(head[-1].weight)
    return heads


def teacher_features(teacher, x, t, text, mask, grid):
    """The image tokens [B, N, W] after each block of `places`."""
    wanted = places(len(teacher.transformer_blocks))
    features = []

    def keep(i, img):
        if i in wanted:
            features.append(img)

    teacher(x, t, text, mask, grid, on_block=keep)
    return features


def judge(heads, features):
    """Logits [B, places * N] fp32: high for real."""
    pairs = zip(heads, features, strict=True)
    logits = [head(feature.float()).squeeze(-1) for head, feature in pairs]        # [B, N] each
    return torch.cat(logits, 1)


def logistic(real, made):
    """The heads' loss from their logits on real and on made pictures: 2 log 2 where all logits are
    zero. [paper]"""
    return F.softplus(-real).mean() + F.softplus(made).mean()


def approximate_r1(plain, moved):
    """gamma / 2 |D(x) - D(x + a noise)|^2, from D's logits on both. [paper]

    For small a, D(x + a noise) - D(x) is a noise . grad D(x), so this is gamma a^2 / 2 times the
    squared length of D's gradient, without a second backward pass.
    """
    return R1_GAMMA / 2 * (plain - moved).square().mean()
