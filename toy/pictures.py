"""Pictures and captions of one's own, as the toy's autoencoder and text encoder learn from them.

Read before: data.py (Shards, plan).

The denoiser takes both at once, from data.ShardSource. The two parts before it take one each: the
autoencoder pictures without captions, of which some are kept aside to see how good it is, and the
text encoder captions without pictures. Both take shards of `data.py pack`, and whatever they draw
comes from the seed, the epoch and the number of the sample.
"""
import itertools
import sys

import numpy as np
from tqdm import tqdm

import data
from kit.files import LensError, require
from kit.images import Fault
from kit.run import make_loader

# --- Pictures -------------------------------------------------------------------------------------

ASIDE = 1_000_006        # seeds which pictures are kept aside
FEWEST = 4               # pictures: one to keep aside, three to learn from


class Pictures:
    """Pictures of shards in batches to learn from, and some that are kept aside.

    pattern   of the shards, as in --data
    batch     {area: pictures in a batch}; the areas are those of the buckets

    Which are kept aside depends on the seed and their number: one in ten, at least one and at most
    500. The order of batches comes from (seed, epoch), a picture's crop from (seed, epoch, sample).
    LensError where there are no shards, latents in place of pictures, or fewer than FEWEST.
    """

    def __init__(self, pattern, seed, batch):
        area_of = {size: area for area in batch for size in data.buckets(area)}
        self.shards = data.Shards(pattern, list(area_of), seed)
        self.batch = {b: batch[area_of[size]] for b, size in enumerate(self.shards.sizes)}
        self.seed = seed
        count = len(self.shards.rows)
        require(not self.shards.rows["is_latent"].any(), f"--data {pattern}: latents, from which "
                "no autoencoder learns; give the shards that they were made of")
        require(count >= FEWEST, f"--data {pattern}: {count} of {FEWEST} pictures that it takes at "
                "least; one in ten, and never none, is kept aside")

        order = np.random.default_rng((seed, ASIDE)).permutation(count)
        self.aside = order[:min(max(1, count // 10), 500)]
        # What is kept aside is in no bucket, so that no plan has it.
        self.buckets = self.shards.buckets.copy()
        self.buckets[self.aside] = -1

    def epoch(self, number):
        """[data.PlannedBatch]: every picture that is not kept aside, once."""
        lengths = np.zeros(len(self.buckets))      # of captions, which are not read
        return data.plan(self.buckets, lengths, self.batch, self.seed, number)

    def batches(self, first):
        """Batches `first`, `first` + 1, ... of all epochs, without end, as `load` gives them."""
        return self.load(self.planned(first))

    def planned(self, first):
        epoch, done = divmod(first, len(self.epoch(0)))        # every epoch has as many
        for number in itertools.count(epoch):
            yield from self.epoch(number)[done:]
            done = 0

    def kept_aside(self, count):
        """The first `count` of those that were kept aside, each a batch, as `load` gives them."""
        return self.load([data.PlannedBatch(self.shards.buckets[i], np.array([i]), epoch=0)
                          for i in self.aside[:count]])

    def load(self, planned):
        """(pixels, None) of each planned batch: uint8 [B, H, W, 3], and what covers their tokens,
        which nobody knows. One process reads while the other learns."""
        readings = make_loader(data.ErrorsAsResults(self.shards), planned, workers=1, prefetch=4)
        for reading in readings:
            if isinstance(reading, LensError):
                raise reading
            for fault in reading.faults:
                tqdm.write(f"replaced by the next of its bucket: {fault}", file=sys.stderr)
            yield reading.pixels, None


# --- Captions -------------------------------------------------------------------------------------

def read_captions(pattern):
    """-> ([its captions] of each picture of shards that has some, how many have none, or none that
    can be read). Latents that `data.py cache` wrote still have theirs. LensError where no picture
    has any."""
    shards = data.Shards(pattern, [(data.CELL, data.CELL)])
    captions = []
    for i in tqdm(range(len(shards.rows)), "captions", unit="picture", leave=False):
        try:
            own, _ = data.captions_and_notes(shards.parts(i))
        except (Fault, OSError):
            continue
        if own:
            captions.append(own)
    missing = len(shards.rows) - len(captions) + shards.faults["no caption"]
    require(captions, f"--data {pattern}: not one of {missing} pictures has a caption; `data.py "
            "pack` takes them from .txt and .json beside the pictures, or has --endpoint write "
            "them")
    return captions, missing


def caption_in_turn(captions, turn, rng):
    """A text for one of a picture's captions. The captions take turns: in the first round each as
    it stands; in the second each with its parts in another order; in the third one part of each.

    >>> caption_in_turn(["a cat", "cat, face, smile"], turn=1, rng=None)
    'cat, face, smile'
    """
    turn, which = divmod(turn, len(captions))
    caption, form = captions[which], turn % 3
    parts = parts_of(caption)
    if form == 0 or len(parts) < 2:
        return caption
    if form == 1:
        return ", ".join(parts[k] for k in rng.permutation(len(parts)))
    return parts[rng.integers(len(parts))]


def parts_of(caption):
    """["cat", "face"] of "cat, face", a list of things. Sentences are one part, for the commas in
    them join what belongs together."""
    if "." in caption:
        return [caption]
    return [part.strip() for part in caption.split(",") if part.strip()]
