"""Pictures: to tensors and back, from files that others made, to contact sheets and PNG files.

Read before: kit/files.py. What is read of which files is told in docs/formats.md.
"""
import contextlib
import functools
import io
import json
import math
import warnings

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin
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

# Pillow tells these from their headers, but makes no pixels of them. (EPS would be drawn by another
# program, Ghostscript: no file may choose what is run here.)
NO_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

# Endings of the files that are taken for pictures: all that Pillow reads, in the order in which one
# is chosen among files of one name. What a file holds is found out by reading it.
OF_PILLOW = Image.registered_extensions()          # {ending: name of the format}
FORMATS = [name for name in Image.OPEN if name not in NO_PIXELS]
USUAL = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# An MPO is a JPEG with further pictures behind the first, and read as a JPEG.
OTHERS = sorted(ending for ending, name in OF_PILLOW.items() if name in (*FORMATS, "MPO"))
ENDINGS = tuple(dict.fromkeys((*USUAL, *OTHERS)))

# A file that claims more pixels is refused from its header: unpacked it would take 400 MB and more.
MAX_PIXELS = 2**27

# Text inside a PNG, in bytes. Above 1 MB Pillow refuses the picture, and ComfyUI writes whole
# workflows there.
PngImagePlugin.MAX_TEXT_CHUNK = 2**26

ORIENTATION = 0x0112         # the EXIF tag that says how a camera was held; from 5 on, on its side

# Tags of a TIFF. What zero stands for: 0 white, 1 black. The format: 1 unsigned, 2 signed, 3 float.
BITS = 0x0102
ZERO_IS = 0x0106
NUMBER_FORMAT = 0x0153


class Fault(Exception):
    """Why a picture or a caption cannot be used, in the few words under which it is counted."""


def read_picture(blob, size=None, where=(0.5, 0.5)):
    """Bytes of an image file -> RGB PIL image; with size = (height, width), resized to that.

    The picture keeps its proportions: it is scaled until it just covers the size, and of what hangs
    over, the share `where` (x, y in [0, 1]) is cut off on the left or at the top. [ours]
    Raises Fault: "broken picture", "too many pixels" or "grey values of unknown range".
    """
    with faults_named():
        image = open_picture(blob)
        if size:
            decode_reduced(image, size)
        image = to_rgb(image)

    if size and image.size != (size[1], size[0]):
        image = cover(image, size, where)
    return image


def picture_size(blob):
    """(width, height) that read_picture(blob) will have, from the file's header alone (of a PNG
    without the EXIF that may stand behind its pixels). Raises Fault where that is broken
    already."""
    with faults_named():
        image = open_picture(blob)
        if on_its_side(image):
            return image.height, image.width
        return image.size


@contextlib.contextmanager
def faults_named():
    """Whatever Pillow raises becomes a Fault. Filters of warnings are the whole process's: where
    threads read at once, a warning of their own may stay unheard."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")        # odd metadata is no fault of the pixels
            yield
    except Fault:
        raise
    except Image.DecompressionBombError:
        raise Fault("too many pixels") from None
    except Exception:                              # PIL's plugins raise whatever they meet
        raise Fault("broken picture") from None


def open_picture(blob):
    """Bytes -> PIL image whose pixels are not yet decoded."""
    image = Image.open(io.BytesIO(blob), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    return image


# Where the beginning of a PNG may say how it lies: its own EXIF, ImageMagick's, and XMP.
PNG_EXIF = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}


def on_its_side(image):
    """Whether a picture that was just opened will have its sides swapped when it is upright."""
    if image.format == "TIFF":                     # its size is that of the upright picture already
        return False
    if image.format == "PNG" and not PNG_EXIF & image.info.keys():
        return False
    with contextlib.suppress(Exception):           # broken EXIF: as if there were none
        # Not a PNG's own getexif: without "exif" it decodes all pixels to look behind them.
        return Image.Image.getexif(image).get(ORIENTATION, 1) in (5, 6, 7, 8)
    return False


def decode_reduced(image, size):
    """Has a JPEG decoded at the smallest of the scales 1, 1/2, 1/4, 1/8 that still covers `size`:
    2.5 to 4.4 times as fast as decoding all of a camera's picture. Other files stay as they are."""
    height, width = size
    if on_its_side(image):
        height, width = width, height
    scale = max(height / image.height, width / image.width)
    image.draft("RGB", (math.ceil(image.width * scale), math.ceil(image.height * scale)))


def to_rgb(image):
    """A PIL image of any mode -> RGB, as viewers show it: upright, what is transparent on white
    paper, colours in sRGB. Of an animation it is the first picture. Raises Fault, or what Pillow
    raises where it cannot decode the pixels."""
    image.load()
    profile = image.info.get("icc_profile")
    tags = getattr(image, "tag_v2", {})            # of a TIFF
    with contextlib.suppress(Exception):           # broken EXIF: as if there were none
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = to_8_bits(image, tags)
    if image.has_transparency_data:
        image = on_white(image)
    return in_srgb(image, profile)


def to_8_bits(image, tags):
    """A grey picture of 16 or 32 bits a pixel -> mode L: Pillow would clip its values, we scale
    them. Raises Fault. tags: of a TIFF, else {}."""
    signed = tags.get(NUMBER_FORMAT) == (2,)
    bits = tags.get(BITS, (16,))[0]
    values = np.asarray(image)
    if image.mode == "I" and bits == 32 and not signed:
        values = values.view(np.uint32)            # Pillow hands them over as signed
    values = values.astype(np.float64)             # [H, W]

    if image.mode == "F" or bits == 32:
        white = white_of_32_bits(values, signed)
    else:
        white = 2**(bits - signed) - 1
    if "transparency" in image.info:               # one value, which stands for no paint
        values[values == image.info["transparency"]] = white
    if tags.get(ZERO_IS) == 0:
        values = white - values
    return Image.fromarray((values * (255 / white)).clip(0, 255).round().astype(np.uint8))


def white_of_32_bits(values, signed):
    """Which value stands for white. No file says so: programs write 0 to 1, to 255, to 65,535, or
    to the largest number. It is the one of which the picture uses at least a sixteenth and exceeds
    at most a tenth, as sharpening may. Raises Fault where there is no such."""
    low, high = values.min(), values.max()         # one NaN makes both NaN
    if low == high == 0:
        return 1
    for white in (1, 255, 2**16 - 1, 2**(32 - signed) - 1):
        if white / 16 <= high <= 1.1 * white and low >= -0.1 * white:
            return white
    raise Fault("grey values of unknown range")


def on_white(image):
    """A picture with transparent parts, laid on white paper: L or RGB."""
    grey = image.mode in ("L", "LA", "La")
    image = image.convert("RGBA")
    paper = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(paper, image).convert("L" if grey else "RGB")


def in_srgb(image, profile=None):
    """-> RGB, in the colours of sRGB. profile: the file's ICC profile as bytes; None, or one that
    is broken or of other channels than the picture: the values are taken for sRGB's."""
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("RGB")
    if profile:
        # OSError: no profile at all. PyCMSError: one that does not fit.
        with contextlib.suppress(OSError, ImageCms.PyCMSError):
            transform = srgb_from(profile, image.mode)
            if transform:
                return ImageCms.applyTransform(image, transform)
    return image.convert("RGB")


@functools.lru_cache(maxsize=16)                   # most pictures share a few profiles
def srgb_from(profile, mode):
    """The transform from a profile, as bytes, to sRGB; None where it would change next to nothing.
    Cameras and editors write sRGB's own profile: to apply it takes longer than to decode a JPEG."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "RGB":
        levels = np.arange(0, 256, 17, dtype=np.uint8)                # [16]
        swatches = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(64, 64, 3)
        shown = np.asarray(ImageCms.applyTransform(Image.fromarray(swatches), transform))
        if np.abs(shown.astype(int) - swatches).max() <= 2:
            return None
    return transform


def cover(image, size, where=(0.5, 0.5)):
    """The part of the picture that has the proportions of `size`, resized. See read_picture."""
    height, width = size
    across = min(image.width, image.height * width / height)
    down = min(image.height, image.width * height / width)

    left = (image.width - across) * where[0]
    top = (image.height - down) * where[1]
    box = (left, top, left + across, top + down)
    return image.resize((width, height), Image.LANCZOS, box=box)


# --- Pictures for people --------------------------------------------------------------------------

GAP = 4                      # pixels between the cells of a contact sheet
CAPTION_LINES = 3            # under a picture; what is longer is cut
MARK = 10                    # pixels: the side of a tick or cross


def contact_sheet(images, columns=None, captions=None, right=None):
    """All pictures in one, in a grid of equal cells, row by row; of none, an empty row.

    columns   None for about as many as rows
    captions  [text], one below each picture; None: no text
    right     [bool], with captions: a tick stands before those that are True, else a cross
    """
    columns = columns or max(1, math.ceil(math.sqrt(len(images))))
    rows = max(1, math.ceil(len(images) / columns))
    width = max((image.width for image in images), default=128)
    height = max((image.height for image in images), default=128)

    font = ImageFont.load_default(max(10, min(16, width // 12)))
    line_height = sum(font.getmetrics())           # above and below the base line
    indent = MARK + GAP if right else 0
    texts = [wrapped(caption, font, width - indent) for caption in captions or ()]
    text_height = line_height * max(map(len, texts), default=0)

    across, down = width + GAP, height + text_height + GAP
    sheet = Image.new("RGB", (columns * across - GAP, rows * down - GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for k, image in enumerate(images):
        row, column = divmod(k, columns)
        x, y = column * across, row * down
        sheet.paste(image, (x, y))
        if texts:
            pen.multiline_text((x + indent, y + height), "\n".join(texts[k]), "black", font,
                               spacing=line_height - font.size)
        if right:
            draw_mark(pen, x + 1, y + height + 3, right[k])
    return sheet


def wrapped(text, font, width):
    """[line]: the text in lines of at most `width` pixels, CAPTION_LINES of them."""
    lines = [""]
    for word in text[:1000].split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > CAPTION_LINES:
        lines = lines[:CAPTION_LINES]
        lines[-1] += " ..."
    return [cut(line, font, width) for line in lines]


def cut(line, font, width):
    """The beginning of a line that takes at most `width` pixels."""
    while line and font.getlength(line) > width:
        line = line[:-1]
    return line


def draw_mark(pen, x, y, right):
    """A green tick or a red cross: Pillow's own font has neither."""
    end = MARK - 1
    if right:
        pen.line([(x, y + end // 2), (x + end // 3, y + end), (x + end, y)], "green", width=2)
    else:
        pen.line([(x, y), (x + end, y + end)], "red", width=2)
        pen.line([(x, y + end), (x + end, y)], "red", width=2)


def enlarged(image, times):
    """A small picture for a large screen: each pixel `times` times as wide and as high."""
    return image.resize((image.width * times, image.height * times), Image.NEAREST)


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
    PNG as text; in a JPEG or WebP as JSON in the description, which holds ASCII alone (and is left
    out of a JPEG that has no room for it)."""
    kind = WRITTEN[path.suffix.lower()]
    if kind == "PNG":
        save_png(image, path, notes)
        return
    exif = Image.Exif()
    exif[DESCRIPTION] = json.dumps({name: str(value) for name, value in notes.items()})
    if kind == "JPEG" and len(exif[DESCRIPTION]) > 60_000:          # its EXIF holds 65,533 bytes
        del exif[DESCRIPTION]
    replace_file(path, lambda beside: image.save(beside, kind, quality=95, exif=exif))


def read_notes(path):
    """{name: text} of a picture that save_picture wrote; {} of any other file. Its pixels are not
    read."""
    try:
        with Image.open(path) as image:
            if image.format == "PNG":
                return {name: str(text) for name, text in image.info.items()
                        if isinstance(text, str)}
            notes = json.loads(image.getexif()[DESCRIPTION])
            return notes if isinstance(notes, dict) else {}
    except Exception:                              # PIL's plugins raise whatever they meet
        return {}
