"""The toy world as a source of batches, drawn, captioned and encoded once.

Read before: toy/world.py, toy/labels.py, vae.py, data.py (Batch and the protocol of sources).

The story in one paragraph: to draw and encode a scene costs as much as a training step, so it is
done once. Every scene gets CAPTIONS captions, which take turns from epoch to epoch. The frozen
autoencoder and text encoder turn picture and captions into tokens and features. What a run's steps
need is drawn and kept in a folder beside the run's own, which every run there takes that has the
same models and settings.

Where this departs: the paper draws from 800M pictures and encodes them as it trains.
"""
import hashlib
import inspect
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

import toy.labels
import toy.world
from data import Batch
from kit.files import (
    LensError,
    error_context,
    file_hash,
    open_safetensors,
    require,
    write_json,
    write_safetensors,
)
from kit.images import from_pil
from kit.run import make_loader, usable_cores
from toy.labels import labels
from toy.world import COLORS, SHAPES, caption, details_for, draw, random_scene

CAPTIONS = 2                  # kept for each scene, each stating other details
BRIEF = 0.25                  # share of "position" captions that state the relation alone [ours]
CHUNK = 64                    # scenes of one size that are drawn and encoded together


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


class Scenes:
    """Every scene of a stage, numbered through, size after size: `buckets[n]` is the number of
    scene n's size, `first[bucket]` that size's first scene."""

    def __init__(self, stage, seed):
        self.seed = seed
        self.shape_odds = stage.shape_odds
        by_size = {}                               # {size: [(area, i)]}
        for area, count in zip(stage.areas, stage.scenes):
            sizes = stage.sizes_of(area)           # they take turns
            for i in range(count):
                by_size.setdefault(sizes[i % len(sizes)], []).append((area, i))

        self.sizes = sorted(by_size)               # [(height, width)]
        self.places = [place for size in self.sizes for place in by_size[size]]
        counts = [len(by_size[size]) for size in self.sizes]
        self.buckets = np.repeat(np.arange(len(counts)), counts)
        self.first = np.cumsum([0, *counts])

    def __len__(self):
        return len(self.places)

    def size(self, n):
        return self.sizes[self.buckets[n]]

    def captioned(self, n):
        """-> (scene n, its captions): a function of (seed, area, i), i counted in the area."""
        rng = np.random.default_rng((self.seed, *self.places[n]))
        scene = random_scene(rng, *self.size(n), odds=self.shape_odds)
        return scene, captions_of(scene, rng)

    def chunks(self, numbers):
        """Sorted numbers of scenes -> [those of one size, at most CHUNK]."""
        chunks = []
        for bucket in np.unique(self.buckets[numbers]):
            members = numbers[self.buckets[numbers] == bucket]
            chunks += [members[k:k + CHUNK] for k in range(0, len(members), CHUNK)]
        return chunks


class Captioning(Dataset):
    """Item k: what is known of chunk k before it is drawn: (lengths [n, CAPTIONS] of its captions'
    features in tokens, the set of words that they use)."""

    def __init__(self, scenes, chunks, encoder):
        self.scenes = scenes
        self.chunks = chunks
        self.encoder = encoder

    def __getitem__(self, k):
        captions = []
        for n in self.chunks[k]:
            captions += self.scenes.captioned(n)[1]
        rows, offset = self.encoder.tokenize(captions)
        lengths = torch.tensor([len(row) - offset for row in rows])
        return lengths.view(-1, CAPTIONS), words_of(captions)


class Piece(NamedTuple):
    """A chunk of n scenes as it is kept."""
    numbers: torch.Tensor     # [n] of its scenes
    tokens: torch.Tensor      # [n, h*w, C] bf16
    labels: torch.Tensor      # [n, h*w, 6] fp32
    text: torch.Tensor        # [sum of lengths, K * E] bf16: the captions' features end to end
    lengths: torch.Tensor     # [n * CAPTIONS] tokens of each caption


class Drawing(Dataset):
    """Item k is chunk k, drawn, captioned and encoded by both frozen models: a Piece."""

    def __init__(self, scenes, chunks, vae, encoder):
        self.scenes = scenes
        self.chunks = chunks
        self.vae = vae
        self.encoder = encoder

    @torch.no_grad()
    def __getitem__(self, k):
        numbers = self.chunks[k]
        size = self.scenes.size(numbers[0])
        scenes, captions = [], []
        for n in numbers:
            scene, its_captions = self.scenes.captioned(n)
            scenes.append(scene)
            captions += its_captions

        features = self.encoder.encode_each(captions)                # [K, S, E] each
        text = [f.transpose(0, 1).flatten(1).bfloat16().cpu() for f in features]      # [S, K * E]
        covering = np.stack([labels(scene, *size) for scene in scenes])
        return Piece(numbers=torch.from_numpy(numbers),
                     tokens=self.tokens_of([draw(scene, *size) for scene in scenes]),
                     labels=torch.from_numpy(covering), text=torch.cat(text),
                     lengths=torch.tensor([len(rows) for rows in text]))

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


# --- The kept pieces ------------------------------------------------------------------------------

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
    """What a kept world depends on, as JSON: each key has a folder of its own."""
    return json.dumps({
        "seed": seed,
        "areas": stage.areas,
        "scenes": stage.scenes,
        "sizes": [stage.sizes_of(area) for area in stage.areas],
        "captions": CAPTIONS,
        "brief": BRIEF,
        "shape_odds": stage.shape_odds,
        "labels": [*SHAPES, *COLORS],
        # Who changes how scenes are drawn, captioned, labelled or encoded gets new ones, be it a
        # comment that was changed. (Not who changes how lens.py computes a caption's features: then
        # delete the folder.)
        "code": [file_hash(path) for path in (toy.world.__file__, toy.labels.__file__, __file__,
                                              inspect.getfile(type(vae)))],
        "vae": weights_digest(vae),
        "text_encoder": text_digest(encoder),
    })


def write_piece(path, key, piece):
    write_safetensors(path, piece._asdict(), {"key": key})


def read_piece(path, key):
    """-> Piece; None for a file that is torn or of another key."""
    try:
        with error_context(f"cannot read {path}"), open_safetensors(path) as f:
            if (f.metadata() or {}).get("key") != key:
                return None
            return Piece(*(f.get_tensor(name) for name in Piece._fields))
    except LensError:
        return None


# --- The source of batches ------------------------------------------------------------------------

class World:
    """What the frozen models made of the toy world: a source of batches, as data.py describes it.

    Its captions are made at once, since a plan sorts by their lengths; its scenes are drawn when
    `prepare` asks for them, and kept in pieces in a folder that runs of one kind share.
    """

    def __init__(self, stage, seed, vae, encoder, parent, device, say=print):
        """parent: the folder that the world's own folder is made in. device: "cpu", or that of both
        models."""
        self.key = world_key(stage, seed, vae, encoder)
        digest = hashlib.sha256(self.key.encode()).hexdigest()
        self.folder = Path(parent) / f"world-{digest[:12]}"
        self.vae = vae
        self.encoder = encoder
        self.device = device
        self.say = say

        self.scenes = Scenes(stage, seed)
        self.sizes = self.scenes.sizes
        self.buckets = self.scenes.buckets
        self.first = self.scenes.first
        self.caption_lengths, self.words = self.make_captions()
        self.layers = len(encoder.layers)
        self.digest = None                         # made here, from the run's seed
        self.waited = 0.0                          # all of it is in memory

        # Scene n is row `row_of[n]` of piece `piece_of[n]`, if that is not -1. Offsets of a piece:
        # the first row of each caption in its text, and one past the last one's end.
        self.pieces, self.offsets = [], []
        self.piece_of = np.full(len(self.scenes), -1)
        self.row_of = np.full(len(self.scenes), -1)

    def make_captions(self):
        """-> (lengths [n, CAPTIONS] of every scene's captions in tokens, [word])"""
        chunks = self.scenes.chunks(np.arange(len(self.scenes)))
        # 20,000 scenes take one core ten seconds; a few are done before a process has started.
        workers = 0
        if len(self.scenes) > 2000:
            self.say(f"captioning {len(self.scenes):,} scenes")
            workers = usable_cores()
        captioning = Captioning(self.scenes, chunks, self.encoder)
        all_lengths, words = [], set()
        for lengths, chunk_words in make_loader(captioning, range(len(chunks)), workers):
            all_lengths.append(lengths.numpy().copy())                # see `draw`
            words |= chunk_words
        return np.concatenate(all_lengths), sorted(words)

    def lengths(self, epoch):
        """[n] tokens of the caption that each scene shows in this epoch."""
        n = np.arange(len(self.scenes))
        return self.caption_lengths[n, caption_shown(n, epoch)]

    def missing(self, samples):
        """Those of `samples` that are not in memory, sorted."""
        samples = np.unique(samples)
        return samples[self.piece_of[samples] < 0]

    def prepare(self, samples, stopped=None):
        """Reads these scenes from the folder, or draws them into it. See data.Source."""
        if len(self.missing(samples)):
            for path in sorted(self.folder.glob("*.safetensors")):
                piece = read_piece(path, self.key)
                if piece is not None:
                    self.take(piece)
        missing = self.missing(samples)
        if not len(missing):
            return True

        self.say(f"drawing {len(missing):,} scenes, which are kept in {self.folder}")
        write_json(self.folder / "key.json", json.loads(self.key))
        self.draw(missing, stopped)
        drawn = f"{np.sum(self.piece_of >= 0):,} of {len(self.scenes):,} scenes are drawn"
        if len(self.missing(samples)):
            self.say(f"stopped: {drawn} and kept in {self.folder}; the same command goes on")
            return False
        size = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        self.say(f"{drawn} and kept in {self.folder}, {size / 1e6:,.0f} MB; "
                 "runs beside this one use them too")
        return True

    def draw(self, missing, stopped):
        """Draws and keeps scenes, chunk by chunk, until stopped() turns true.

        On a CPU by one process a core, since these models are too small for threads.
        """
        chunks = self.scenes.chunks(missing)
        drawing = Drawing(self.scenes, chunks, self.vae, self.encoder)
        workers = min(usable_cores(), len(chunks)) if self.device == "cpu" else 0
        pieces = iter(make_loader(drawing, range(len(chunks)), workers))
        with tqdm(total=len(missing), desc="drawing and encoding scenes", unit="scene",
                  mininterval=2) as bar:
            for numbers in chunks:
                if stopped is not None and stopped():
                    break
                # What a worker sends lies in shared memory, an open file each: copies let it go.
                piece = Piece(*(part.clone() for part in next(pieces)))
                name = hashlib.sha256(numbers.tobytes()).hexdigest()[:12]
                height, width = self.scenes.size(numbers[0])
                write_piece(self.folder / f"{width}x{height}-{name}.safetensors", self.key, piece)
                self.take(piece)
                bar.update(len(numbers))

    def take(self, piece):
        """Remembers where the scenes of a piece are, if any of them was not in memory."""
        numbers = piece.numbers.numpy()
        if not len(self.missing(numbers)):
            return
        self.piece_of[numbers] = len(self.pieces)
        self.row_of[numbers] = np.arange(len(numbers))
        self.pieces.append(piece)
        self.offsets.append(F.pad(piece.lengths.cumsum(0), (1, 0)).tolist())

    def stream(self, planned):
        """Planned batches of data.plan -> Batch, in order."""
        for bucket, samples, epoch in planned:
            require(not len(self.missing(samples)), "scenes are streamed that `prepare` was not "
                    "asked for")
            height, width = self.sizes[bucket]
            places = list(zip(self.piece_of[samples], self.row_of[samples]))
            text, mask = self.text_of(places, caption_shown(samples, epoch))
            tokens = torch.stack([self.pieces[p].tokens[row] for p, row in places])
            covering = torch.stack([self.pieces[p].labels[row] for p, row in places])
            yield Batch(samples=samples, epoch=epoch, grid=(height // 16, width // 16),
                        text=text, mask=mask, tokens=tokens.float(), labels=covering)

    def text_of(self, places, shown):
        """Features K x [B, S, E] fp32 and mask [B, S] of a caption of each scene, padded to the
        longest of them.

        places   [(piece, row)] of the scenes;  shown: which of its captions each shows
        """
        captions = []                                                 # [length, K * E] each
        for (p, row), which in zip(places, shown):
            c = CAPTIONS * row + which
            begin, end = self.offsets[p][c:c + 2]
            captions.append(self.pieces[p].text[begin:end])
        lengths = torch.tensor([len(features) for features in captions])
        longest = int(lengths.max())

        padded = [F.pad(features, (0, 0, 0, longest - len(features))) for features in captions]
        features = torch.stack(padded).float()                        # [B, S, K * E]
        mask = torch.arange(longest) < lengths[:, None]               # [B, S]
        return list(features.chunk(self.layers, dim=-1)), mask


def caption_shown(samples, epoch):
    """Which of its captions a scene shows in an epoch: they take turns."""
    return (samples + epoch) % CAPTIONS
