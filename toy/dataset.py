"""The toy world as a source of batches, drawn, captioned and encoded once; and labels of what
covers each token, with their loss.

Read before: toy/world.py, vae.py, data.py (Batch and the protocol of sources).

The story in one paragraph: to draw and encode a scene costs as much as a training step, so it is
done once. Every scene gets CAPTIONS captions, which take turns from epoch to epoch. The frozen
autoencoder and text encoder turn picture and captions into tokens and features, and all of it is
kept in one file, which the next run takes if it was made from the same models and settings.

Where this departs: the paper draws from 800M pictures and encodes them as it trains. The labels are
[ours]; the thought behind their loss is REPA's (arXiv 2410.06940), with facts in the place of a
network's features: who knows what is to be drawn, and which part of it here, can draw it.
"""
import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from data import Batch
from kit.files import open_safetensors, write_safetensors
from kit.images import from_pil
from kit.run import make_loader, usable_cores
from toy.world import COLORS, SHAPES, caption, coverage, details_for, draw, random_scene

CAPTIONS = 2                  # kept for each scene, each stating other details
BRIEF = 0.25                  # share of "position" captions that state the relation alone [ours]
CHUNK = 64                    # scenes of one size that are drawn and encoded together


# --- Labels: what covers each token ---------------------------------------------------------------

def labels(scene, height, width):
    """What covers each cell of 16 x 16 pixels, a token of the denoiser: [h*w, 6] fp32.

    It tells of the object that has most of the cell:
        0, 1   shape and colour, counted from 1 in the order of SHAPES and COLORS
        2, 3   its centre seen from the cell's (column, row), in cells
        4      its size, in cells
        5      its angle, radians
    All six are 0 where no object has a seventh of the cell.
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
    """How wide the parts of a head's output are: none or a shape, none or a colour, the pose."""
    return 1 + len(SHAPES), 1 + len(COLORS), 4


def label_head(width):
    """The Linear that label_loss reads with, all zeros: it knows nothing yet."""
    head = nn.Linear(width, sum(label_sizes()))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def label_loss(head, img, covering):
    """How badly a Linear reads off a block's image tokens what covers each of them: [B] fp32.

    img [B, N, W]        covering [B, N, 6], as `labels` tells it
    Cross-entropy of shape and of colour, and where there is an object the L1 of its pose.
    """
    img = F.rms_norm(img.float(), img.shape[-1:])
    shape, color, pose = head(img).float().split(label_sizes(), -1)   # [B, N, classes or 4]
    true_shape, true_color = covering[..., 0].long(), covering[..., 1].long()

    shape_loss = F.cross_entropy(shape.transpose(1, 2), true_shape, reduction="none")    # [B, N]
    color_loss = F.cross_entropy(color.transpose(1, 2), true_color, reduction="none")
    pose_loss = (pose - covering[..., 2:]).abs().sum(-1)
    pose_loss = torch.where(true_shape > 0, pose_loss, 0.0)
    return (shape_loss + color_loss + pose_loss).mean(1)


# --- Scenes, captioned and encoded ----------------------------------------------------------------

def captions_of(scene, rng):
    """CAPTIONS captions of a scene, each stating other details.

    Dense, but for some of the scenes made for a relation: a dense caption states the places too,
    and from these alone "to the left of" was never learnt, since the places already say it.
    """
    captions = []
    for _ in range(CAPTIONS):
        brief = scene.task == "position" and rng.random() < BRIEF
        details = details_for(scene, rng, "brief" if brief else "dense")
        captions.append(caption(scene, details, rng))
    return captions


class Chunk(NamedTuple):
    """Scenes of one size, to be drawn and encoded together."""
    area: int
    size: tuple               # (height, width)
    numbers: range            # scene i is a function of (seed, area, i)


class Encoded(NamedTuple):
    """A chunk of n scenes, or all of a size, as it is kept."""
    tokens: torch.Tensor      # [n, h*w, C] bf16
    labels: torch.Tensor      # [n, h*w, 6] fp32
    text: torch.Tensor        # [sum of lengths, K * E] bf16: the captions' features end to end
    lengths: torch.Tensor     # [n * CAPTIONS] tokens of each caption


def plan_chunks(stage):
    """[Chunk]: the stage's scenes. The sizes of an area take turns: size k has scenes k, k + sizes,
    and so on."""
    chunks = []
    for area, count in zip(stage.areas, stage.scenes):
        sizes = stage.sizes_of(area)
        for k, size in enumerate(sizes):
            numbers = range(count)[k::len(sizes)]
            for begin in range(0, len(numbers), CHUNK):
                chunks.append(Chunk(area, size, numbers[begin:begin + CHUNK]))
    return chunks


class Encoding(Dataset):
    """Item k is chunk k, drawn, captioned and encoded: (size, Encoded, words of its captions)."""

    def __init__(self, chunks, shape_odds, seed, vae, encoder):
        self.chunks = chunks
        self.shape_odds = shape_odds
        self.seed = seed
        self.vae = vae
        self.encoder = encoder

    @torch.no_grad()
    def __getitem__(self, k):
        area, size, numbers = self.chunks[k]
        scenes, captions = [], []
        for i in numbers:
            rng = np.random.default_rng((self.seed, area, i))
            scene = random_scene(rng, *size, odds=self.shape_odds)
            scenes.append(scene)
            captions += captions_of(scene, rng)

        features = self.encoder.encode_each(captions)                # [K, S, E] each
        text = [f.transpose(0, 1).flatten(1).bfloat16().cpu() for f in features]      # [S, K * E]
        covering = np.stack([labels(scene, *size) for scene in scenes])
        encoded = Encoded(tokens=self.tokens_of([draw(scene, *size) for scene in scenes]),
                          labels=torch.from_numpy(covering), text=torch.cat(text),
                          lengths=torch.tensor([len(rows) for rows in text]))
        return size, encoded, words_of(captions)

    def tokens_of(self, pictures):
        """[PIL] -> [n, h*w, C] bf16. Of the posterior's mean: it is sharper than a sample."""
        device = next(self.vae.parameters()).device
        images = from_pil(pictures).to(device)                        # [n, 3, H, W]
        # By fours, whose activations fit a CPU's cache: 2.8 times as fast as 64 at once.
        means = [self.vae.encode(few)[0] for few in images.split(4)]
        return self.vae.to_tokens(torch.cat(means)).bfloat16().cpu()


def words_of(captions):
    """The set of words that captions use."""
    words = set()
    for text in captions:
        words.update(text.replace(",", " ").replace(".", " ").split())
    return words


def encode_world(stage, seed, vae, encoder, device):
    """Every scene of the stage through both frozen models. -> ({size: Encoded}, [word])

    On a CPU by one process a core, since these models are too small for threads.
    """
    chunks = plan_chunks(stage)
    encoding = Encoding(chunks, stage.shape_odds, seed, vae, encoder)
    workers = usable_cores() if device == "cpu" else 0
    loader = make_loader(encoding, range(len(chunks)), workers)

    parts_of, words = {}, set()
    bar = tqdm(total=sum(stage.scenes), desc="drawing and encoding scenes", unit="scene",
               mininterval=2)
    for size, encoded, chunk_words in loader:
        # What a worker sends lies in shared memory, an open file each: copies let it go.
        copies = [part.clone() for part in encoded]
        parts_of.setdefault(tuple(size), []).append(copies)
        words |= chunk_words
        bar.update(len(encoded.tokens))
    bar.close()

    world = {}
    for size, parts in parts_of.items():
        world[size] = Encoded(*(torch.cat(column) for column in zip(*parts)))
    return world, sorted(words)


# --- The kept file --------------------------------------------------------------------------------

def weights_digest(model):
    """16 hex digits that tell weights apart: every name, type and number counts."""
    digest = hashlib.sha256()
    for name, t in model.state_dict().items():
        digest.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        flat = t.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def text_digest(encoder):
    """16 hex digits of all that decides a text encoder's features: its weights, the layers that are
    read, its tokenizer, and the chat around the prompt with its date."""
    tokenizer = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    for passing in ("padding", "truncation"):      # settings of the last call, which we do not use
        tokenizer.pop(passing, None)

    parts = [weights_digest(encoder.model), encoder.layers, encoder.chat(), encoder.max_length,
             tokenizer]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def world_key(stage, seed, vae, encoder):
    """What a kept world depends on, as JSON: with another key it is made anew."""
    return json.dumps({
        "seed": seed,
        "areas": stage.areas,
        "scenes": stage.scenes,
        "sizes": [stage.sizes_of(area) for area in stage.areas],
        "captions": CAPTIONS,
        "brief": BRIEF,
        "shape_odds": stage.shape_odds,
        "labels": [*SHAPES, *COLORS],
        "vae": weights_digest(vae),
        "text_encoder": text_digest(encoder),
    })


def write_world(path, key, world, words):
    """One safetensors file: tensors "64x96/tokens", and so on; key and words in its metadata."""
    tensors = {}
    for (height, width), encoded in world.items():
        for name, t in encoded._asdict().items():
            tensors[f"{height}x{width}/{name}"] = t
    write_safetensors(path, tensors, {"key": key, "words": json.dumps(words)})


def read_world(path, key):
    """-> ({size: Encoded}, words) of a kept world, or None where there is none with this key."""
    if not Path(path).exists():
        return None
    with open_safetensors(path) as f:
        notes = f.metadata() or {}
        if notes.get("key") != key:
            return None
        fields_of = {}
        for tensor_name in f.keys():
            size_name, field = tensor_name.split("/")
            fields_of.setdefault(size_name, {})[field] = f.get_tensor(tensor_name)

    world = {}
    for size_name, fields in fields_of.items():
        height, width = size_name.split("x")
        world[int(height), int(width)] = Encoded(**fields)
    return world, json.loads(notes["words"])


# --- The source of batches ------------------------------------------------------------------------

class World:
    """What the frozen models made of the toy world: a source of batches, as data.py describes it.

    Scenes are numbered through, size after size: `buckets[i]` is scene i's size, `first[bucket]`
    that size's first scene.
    """

    def __init__(self, stage, seed, vae, encoder, path, device):
        """path: the file in which the world is kept. device: "cpu", or that of both models."""
        key = world_key(stage, seed, vae, encoder)
        kept = read_world(path, key)
        if kept is None:
            kept = encode_world(stage, seed, vae, encoder, device)
            write_world(path, key, *kept)
        world, self.words = kept

        self.layers = len(encoder.layers)
        self.digest = None                         # made here, from the run's seed
        self.waited = 0.0                          # all of it is in memory
        self.sizes = sorted(world)                 # a file gives them back in its own order
        self.kept = [world[size] for size in self.sizes]
        # The first row of each caption in a size's text, and one past the last one's end.
        self.offsets = [F.pad(part.lengths.cumsum(0), (1, 0)) for part in self.kept]

        counts = [len(part.tokens) for part in self.kept]
        self.buckets = np.repeat(np.arange(len(counts)), counts)
        self.first = np.cumsum([0, *counts])

    def lengths(self, epoch):
        """[n] tokens of the caption that each scene shows in this epoch."""
        shown = []
        for first, part in zip(self.first, self.kept):
            by_scene = part.lengths.numpy().reshape(-1, CAPTIONS)     # [scenes of a size, CAPTIONS]
            j = np.arange(len(by_scene))
            shown.append(by_scene[j, caption_shown(first + j, epoch)])
        return np.concatenate(shown)

    def stream(self, planned):
        """Planned batches of data.plan -> Batch, in order."""
        for bucket, samples, epoch in planned:
            height, width = self.sizes[bucket]
            part = self.kept[bucket]
            j = samples - self.first[bucket]                          # numbers within the size
            rows = torch.from_numpy(j)
            text, mask = self.text_of(bucket, CAPTIONS * j + caption_shown(samples, epoch))
            yield Batch(samples=samples, epoch=epoch, grid=(height // 16, width // 16),
                        text=text, mask=mask, tokens=part.tokens[rows].float(),
                        labels=part.labels[rows])

    def text_of(self, bucket, captions):
        """Features K x [B, S, E] fp32 and mask [B, S] of some captions of a size, padded to the
        longest of them."""
        text, offsets = self.kept[bucket].text, self.offsets[bucket]
        pieces = [text[offsets[c]:offsets[c + 1]] for c in captions]  # [length, K * E]
        lengths = torch.tensor([len(piece) for piece in pieces])
        longest = int(lengths.max())

        padded = [F.pad(piece, (0, 0, 0, longest - len(piece))) for piece in pieces]
        features = torch.stack(padded).float()                        # [B, S, K * E]
        mask = torch.arange(longest) < lengths[:, None]               # [B, S]
        return list(features.chunk(self.layers, dim=-1)), mask


def caption_shown(samples, epoch):
    """Which of its captions a scene shows in an epoch: they take turns."""
    return (samples + epoch) % CAPTIONS
