"""Pictures: to tensors and back, from files that others made, to contact sheets and PNG files.

Read before: kit/files.py.
"""
import io
import json
import math
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from kit.files import replace_file

# --- Pixels and tensors ---------------------------------------------------------------------------

def to_images(pixels, device="cpu"):
    """Pixels uint8 [B, H, W, 3] -> [B, 3, H, W] fp32 in [-1, 1], on `device`."""
    # A GPU's convolutions are fastest with the channels innermost, a CPU's with them apart.
    on_gpu = torch.device(device).type == "cuda"
    layout = torch.channels_last if on_gpu else torch.contiguous_format

    images = pixels.to(device).permute(0, 3, 1, 2).float()            # [B, 3, H, W]
    return images.contiguous(memory_format=layout) / 127.5 - 1


def to_pil(images):
    """[B, 3, H, W] in [-1, 1] -> [PIL image]."""
    pixels = (images.float().clamp(-1, 1) + 1) * 127.5
    pixels = pixels.to(torch.uint8)                # truncates, as the reference does [checkpoint]
    pixels = pixels.permute(0, 2, 3, 1).cpu().numpy()                 # [B, H, W, 3]
    return [Image.fromarray(picture) for picture in pixels]


def from_pil(images):
    """[PIL image], all of one size -> [B, 3, H, W] fp32 in [-1, 1]."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return to_images(torch.from_numpy(pixels))


# --- Picture files --------------------------------------------------------------------------------
# Others made them: nothing in them is trusted, and every fault has a name.

# Endings of the files that are taken for pictures; what a file holds is found out by reading it.
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# A file that claims more pixels is refused from its header: unpacked it would take 400 MB and more.
MAX_PIXELS = 2**27

ORIENTATION = 0x0112         # the EXIF tag that says how a camera was held; from 5 on, on its side


class Fault(Exception):
    """Why a picture or a caption cannot be used, in the few words under which it is counted."""


def read_picture(blob, size=None, where=(0.5, 0.5)):
    """Bytes of an image file -> RGB PIL image; with size = (height, width), resized to that.

    The picture keeps its proportions: it is scaled until it just covers the size, and of what hangs
    over, the share `where` (x, y in [0, 1]) is cut off on the left or at the top. [ours]
    Raises Fault: "broken picture" or "too many pixels".
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")        # odd metadata is no fault of the pixels
            image = decode(blob, size)
    except Image.DecompressionBombError:
        raise Fault("too many pixels") from None
    except Exception:                              # PIL's plugins raise whatever they meet
        raise Fault("broken picture") from None

    if size and image.size != (size[1], size[0]):
        image = cover(image, size, where)
    return image


def decode(blob, size=None):
    """Bytes -> RGB PIL image, upright as viewers show it. size: what it must be able to cover."""
    image = Image.open(io.BytesIO(blob))
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    if size:
        decode_reduced(image, size)
    image = ImageOps.exif_transpose(image)

    # 16 bits a pixel: PIL would clip them, we scale.
    if image.mode.startswith("I"):
        eight_bits = (np.asarray(image, np.float64) / 257).clip(0, 255).round()
        image = Image.fromarray(eight_bits.astype(np.uint8))

    # What is transparent is laid on white paper.
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)

    return image.convert("RGB")


def decode_reduced(image, size):
    """Has a JPEG decoded at the smallest of the scales 1, 1/2, 1/4, 1/8 that still covers `size`:
    2.5 to 4.4 times as fast as decoding all of a camera's picture. Other files stay as they are."""
    height, width = size
    if image.getexif().get(ORIENTATION, 1) >= 5:   # stored on its side
        height, width = width, height
    scale = max(height / image.height, width / image.width)
    image.draft("RGB", (math.ceil(image.width * scale), math.ceil(image.height * scale)))


def cover(image, size, where):
    """The part of the picture that has the proportions of `size`, resized. See read_picture."""
    height, width = size
    across = min(image.width, image.height * width / height)
    down = min(image.height, image.width * height / width)

    left = (image.width - across) * where[0]
    top = (image.height - down) * where[1]
    box = (left, top, left + across, top + down)
    return image.resize((width, height), Image.LANCZOS, box=box)


# --- Pictures for people --------------------------------------------------------------------------

def contact_sheet(images, columns=None):
    """All pictures in one, in a grid of equal cells, row by row; of none, an empty row.
    columns: None for about as many as rows."""
    columns = columns or max(1, math.ceil(math.sqrt(len(images))))
    rows = max(1, math.ceil(len(images) / columns))
    width = max((image.width for image in images), default=128)
    height = max((image.height for image in images), default=128)

    gap = 4
    across, down = width + gap, height + gap
    sheet = Image.new("RGB", (columns * across - gap, rows * down - gap), "white")
    for k, image in enumerate(images):
        row, column = divmod(k, columns)
        sheet.paste(image, (column * across, row * down))
    return sheet


def save_png(image, path, notes=None):
    """Writes a PNG, whole or not at all. notes {name: value}: text that image viewers show."""
    info = PngInfo()
    for name, value in (notes or {}).items():
        info.add_itxt(name, str(value))            # UTF-8
    replace_file(path, lambda beside: image.save(beside, "PNG", pnginfo=info))


# What save_picture writes: formats that have room for notes.
WRITTEN = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
DESCRIPTION = 0x010E         # the EXIF tag of a picture's description


def save_picture(image, path, notes):
    """Writes a picture as the ending of its path says, whole or not at all. The notes stand in a
    PNG as text; in a JPEG or WebP as JSON in the description, which holds ASCII alone."""
    kind = WRITTEN[path.suffix.lower()]
    if kind == "PNG":
        save_png(image, path, notes)
        return
    exif = Image.Exif()
    exif[DESCRIPTION] = json.dumps({name: str(value) for name, value in notes.items()})
    replace_file(path, lambda beside: image.save(beside, kind, quality=95, exif=exif))


def read_notes(path):
    """{name: text} of a picture that save_picture wrote; {} of any other file. Its pixels are not
    read."""
    try:
        with Image.open(path) as image:
            if image.format == "PNG":
                return {name: str(text) for name, text in image.info.items()
                        if isinstance(text, str)}
            return json.loads(image.getexif()[DESCRIPTION])
    except Exception:                              # PIL's plugins raise whatever they meet
        return {}
