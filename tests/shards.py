"""What tests of pictures and of training share: pictures, tars, a folder of packed scenes."""
import io
import struct
import tarfile
import zlib

import numpy as np
import torch
from PIL import Image

import data
from toy.world import AREAS, draw, sample_scene

# All sizes of the toy.
SIZES = [size for area in AREAS for size in data.buckets(area)]

# Toy scenes are no photographs: filters that would take them are off.
LOOSE = ["--limit", "area=0", "--limit", "blur=0", "--limit", "entropy=0",
         "--limit", "dark=0", "--limit", "bright=1"]


def photo(i=0, width=64, height=64):
    """A picture with structure at all scales, no two alike."""
    rng = np.random.default_rng(i)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 7, 3), dtype=np.uint8))
    coarse = np.asarray(coarse.resize((width, height), Image.BICUBIC), int)
    fine = rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray((coarse + fine).clip(0, 255).astype(np.uint8))


def encoded(image, form="PNG", **options):
    """The bytes of a file."""
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def png_of(width, height):
    """A PNG that claims a size, with next to no pixels."""
    def chunk(kind, body):
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b""))


def make_tar(path, members):
    """members: [(name, bytes)]; None instead of bytes makes a symbolic link."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type = tarfile.SYMTYPE
                member.linkname = "/etc/passwd"
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def make_shards(folder, count=40, seed=0):
    """Draws and packs `count` scenes of a few sizes below `folder`; -> the pattern of the tars."""
    images = folder / "images"
    images.mkdir(parents=True)
    sizes = [(96, 96), (128, 64), (80, 144), (64, 64)]
    for i in range(count):
        height, width = sizes[i % len(sizes)]
        scene, _, words = sample_scene(seed, 0, i, height, width)
        draw(scene, height, width).save(images / f"{i:03d}.png")
        (images / f"{i:03d}.txt").write_text(words)

    data.main(["pack", "--images", str(images), "--out", str(folder / "shards"),
               "--limit", "duplicate=1.1", *LOOSE])
    return str(folder / "shards" / "*.tar")


def spoil(shards, i):
    """Writes zeros into the picture of sample i of data.Shards, after it was indexed."""
    row = shards.rows[i]
    with open(shards.paths[row["shard"]], "r+b") as f:
        f.seek(row["picture_offset"] + 8)
        f.write(b"\0" * 40)


class FixedEncoder:
    """Features that are a caption's length, one token a word."""

    def tokenize(self, captions):
        return [caption.split() for caption in captions], 0

    def encode(self, captions):
        counts = [len(caption.split()) for caption in captions]
        longest = max(counts)
        features = torch.tensor(counts, dtype=torch.bfloat16)[:, None, None].expand(-1, longest, 8)
        mask = torch.arange(longest) < torch.tensor(counts)[:, None]
        return [features, 2 * features], None if min(counts) == longest else mask

    def encode_each(self, captions):
        each = [self.encode([caption])[0] for caption in captions]
        return [torch.cat(layers) for layers in each]
