"""Labels: what covers each token of a drawn scene, and the loss of a Linear that must say so.

Read before: of toy/world.py what a scene is.

Two models are asked for them in training, and by one convention [ours]: the autoencoder on its
tokens, so that a scene's facts lie open in them, and the denoiser on an early block, which must
know what is to be drawn before it can draw it. The thought is REPA's (arXiv 2410.06940), with facts
in the place of a network's features. Nobody reads the Linears after training.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from toy.world import COLORS, SHAPES, coverage


def labels(scene, height, width):
    """What covers each cell of 16 x 16 pixels, a token: [h*w, 6] fp32.

    It tells of the object that has most of the cell:
        0, 1   shape and colour, counted from 1 in the order of SHAPES and COLORS
        2, 3   its centre less the cell's: columns to the right, rows down, in cells
        4      its size, the radius of a disc of its area, in cells
        5      its angle, radians (toy.world.MAX_TILT keeps it below half a symmetry's turn)
    All six are 0 where no object has a seventh of the cell: less hardly shows.
    """
    h, w = height // 16, width // 16
    row, column = np.mgrid[:h, :w] + 0.5                              # [h, w], centres of cells
    colors = list(COLORS)

    found = np.zeros((h, w, 6), np.float32)
    most = np.full((h, w), 1 / 7, np.float32)                         # the largest share so far
    for obj in scene.objects:
        share = coverage(obj, height, width).reshape(h, 16, w, 16).mean((1, 3))
        about = np.zeros((h, w, 6))
        about[..., 0] = SHAPES.index(obj.shape) + 1
        about[..., 1] = colors.index(obj.color) + 1
        about[..., 2] = obj.x * w - column
        about[..., 3] = obj.y * h - row
        about[..., 4] = obj.size * math.sqrt(h * w)
        about[..., 5] = obj.angle

        larger = share > most
        found[larger] = about[larger]
        most = np.maximum(most, share)
    return found.reshape(h * w, 6)


def label_sizes():
    """How wide the parts of a head's output are: logits of "none" and each shape, of "none" and
    each colour, and the pose's four numbers."""
    return 1 + len(SHAPES), 1 + len(COLORS), 4


def label_head(width):
    """The Linear that label_loss reads with. All zeros: it knows nothing yet, and at first leaves
    the tokens alone."""
    head = nn.Linear(width, sum(label_sizes()))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def read_labels(head, tokens):
    """What a head says of tokens [..., W], each divided by its root mean square first: logits of a
    shape, of a colour, and the pose [..., 4]."""
    tokens = F.rms_norm(tokens.float(), tokens.shape[-1:])
    return head(tokens).float().split(label_sizes(), -1)


def label_loss(head, tokens, covering):
    """How badly a Linear reads off tokens what covers each of them: [B] fp32.

    tokens [B, N, W]        covering [B, N, 6], as `labels` tells it
    Cross-entropy of shape and of colour, and where there is an object the L1 of its pose, summed
    over its four numbers. The mean is over all tokens, so pose counts by how much is covered.
    """
    shape, color, pose = read_labels(head, tokens)                    # [B, N, classes or 4]
    true_shape, true_color = covering[..., 0].long(), covering[..., 1].long()

    shape_loss = F.cross_entropy(shape.transpose(1, 2), true_shape, reduction="none")    # [B, N]
    color_loss = F.cross_entropy(color.transpose(1, 2), true_color, reduction="none")
    pose_loss = (pose - covering[..., 2:]).abs().sum(-1)
    pose_loss = torch.where(true_shape > 0, pose_loss, 0.0)
    return (shape_loss + color_loss + pose_loss).mean(1)
