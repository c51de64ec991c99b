"""Pictures of every kind come out right, bad ones are named, and sheets and notes are whole."""
import io
import struct

import numpy as np
import PIL
import pytest
import torch
from conftest import ROOT
from PIL import EpsImagePlugin, Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from shards import encoded, photo, png_of

from kit.images import (
    ENDINGS,
    Fault,
    contact_sheet,
    enlarged,
    from_pil,
    picture_size,
    read_notes,
    read_picture,
    save_picture,
    save_png,
    to_images,
    to_pil,
)

ORIENTATION = 0x0112


def largest_difference(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max()


# --- Pixels and tensors ---------------------------------------------------------------------------

def test_pixels_are_truncated_and_clamped():
    x = torch.full((1, 3, 2, 2), (200.9 / 127.5) - 1)
    assert np.asarray(to_pil(x)[0]).max() == 200
    assert np.asarray(to_pil(3 * x)[0]).max() == 255
    assert np.asarray(to_pil(x - 9)[0]).max() == 0


def test_a_picture_survives_the_way_to_a_tensor_and_back():
    pixels = torch.randint(0, 256, (2, 16, 32, 3), dtype=torch.uint8)
    images = to_images(pixels)
    assert images.shape == (2, 3, 16, 32)
    assert images.dtype == torch.float32
    assert -1 <= images.min() and images.max() <= 1

    back = to_pil(images + 1e-4)                   # truncation must not meet 199.99999
    assert largest_difference(np.stack(back), pixels) == 0
    assert torch.equal(from_pil(back), images)


# --- Picture files --------------------------------------------------------------------------------

def test_every_mode_comes_out_as_rgb():
    plain = photo(1, 48, 32)
    for mode in ("RGB", "L", "1"):
        image = plain.convert(mode)
        assert largest_difference(read_picture(encoded(image)), image.convert("RGB")) == 0

    palette = plain.quantize(16)
    assert largest_difference(read_picture(encoded(palette)), palette.convert("RGB")) == 0

    cmyk = plain.convert("CMYK")
    assert largest_difference(read_picture(encoded(cmyk, "TIFF")), plain) <= 2


def test_16_bits_are_scaled_not_clipped():
    grey = photo(1, 48, 32).convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert largest_difference(read_picture(encoded(deep)), grey.convert("RGB")) == 0


GREY = np.asarray(photo(1, 48, 32).convert("L"))


def with_tag(tiff, tag, before, after):
    """A TIFF's bytes with another value of a tag that holds one 16-bit number."""
    old, new = (struct.pack("<HHIHH", tag, 3, 1, value, 0) for value in (before, after))
    assert tiff.count(old) == 1
    return tiff.replace(old, new)


@pytest.mark.parametrize("values", [
    GREY.astype(np.int32),
    GREY.astype(np.int32) * 257,
    GREY.astype(np.int32) * 2**23,
    GREY.astype(np.float32),
    GREY.astype(np.float32) * 257,
    (GREY / 255).astype(np.float32),
    np.where(GREY > 250, 1.05, GREY / 255).astype(np.float32),    # sharpened: above white
    np.zeros((32, 48), np.float32),
], ids=["int 255", "int 65535", "int 2^31", "float 255", "float 65535", "float 1", "overshoot",
        "black"])
def test_32_bits_are_scaled_by_what_they_use(values):
    expected = Image.fromarray(GREY if values.any() else np.zeros_like(GREY)).convert("RGB")
    found = read_picture(encoded(Image.fromarray(values), "TIFF"))
    assert largest_difference(found, expected) <= (5 if values.max() == np.float32(1.05) else 1)


def test_32_bits_without_a_sign_are_told_by_the_files_tag():
    values = GREY.astype(np.uint32) * (2**24 + 2**16 + 2**8 + 1)      # white is 2^32 - 1
    signed = encoded(Image.fromarray(values.view(np.int32)), "TIFF")
    with pytest.raises(Fault, match="^grey values of unknown range$"):
        read_picture(signed)
    unsigned = with_tag(signed, 0x0153, 2, 1)
    assert largest_difference(read_picture(unsigned), Image.fromarray(GREY).convert("RGB")) <= 1


@pytest.mark.parametrize("values", [
    GREY.astype(np.float32) / 255 * 7, GREY.astype(np.float32) - 128,
    np.full((4, 4), np.nan, np.float32), np.full((4, 4), 10**6, np.int32)])
def test_values_of_unknown_range_are_named_not_black(values):
    with pytest.raises(Fault, match="^grey values of unknown range$"):
        read_picture(encoded(Image.fromarray(values), "TIFF"))


def test_16_bits_with_a_transparent_value_or_with_zero_for_white():
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    value = int(GREY[5, 7])
    found = np.asarray(read_picture(encoded(deep, transparency=value * 257)))[..., 0]
    assert (found == np.where(GREY == value, 255, GREY)).all()

    negative = with_tag(encoded(deep, "TIFF"), 0x0106, 1, 0)
    assert (np.asarray(read_picture(negative))[..., 0] == 255 - GREY).all()


def swapped_profile():
    """An ICC profile in which what sRGB calls red is green, and the other way round."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")       # entries of the tag table
    places = slice(red + 4, red + 12), slice(green + 4, green + 12)
    profile[places[0]], profile[places[1]] = profile[places[1]], profile[places[0]]
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_colours_are_those_of_the_files_profile(mode):
    image = photo(1, 48, 32).quantize(16)
    if mode != "P":
        image = image.convert(mode)
    blob = encoded(image, icc_profile=swapped_profile())
    turned = np.asarray(image.convert("RGB"))[..., [1, 0, 2]]
    assert largest_difference(read_picture(blob), turned) <= 3
    small = read_picture(blob, (16, 24))
    assert largest_difference(small, read_picture(encoded(Image.fromarray(turned)), (16, 24))) <= 4


def test_a_profile_that_is_srgbs_own_broken_or_of_other_channels_changes_nothing():
    plain = photo(1, 48, 32)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (own, own[:200], b"no profile", b""):
        found = read_picture(encoded(plain, icc_profile=profile))
        assert largest_difference(found, plain) == 0
    for mode in ("L", "CMYK"):
        image = plain.convert(mode)
        found = read_picture(encoded(image, "TIFF", icc_profile=swapped_profile()))
        assert largest_difference(found, image.convert("RGB")) == 0


def test_a_long_text_does_not_break_a_png():
    notes = PngInfo()
    notes.add_text("workflow", "a node " * 300_000)
    notes.add_text("prompt", "a node " * 300_000, zip=True)
    notes.add_itxt("parameters", "a node " * 300_000)
    plain = photo(1)
    assert largest_difference(read_picture(encoded(plain, pnginfo=notes)), plain) == 0


def test_of_an_animation_the_first_picture_is_taken():
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for form in ("GIF", "PNG", "WEBP"):
        blob = encoded(first, form, save_all=True, append_images=[second])
        assert largest_difference(read_picture(blob), first) <= 2, form


def test_nothing_is_run_to_draw_a_picture(tmp_path, monkeypatch):
    """EPS is a program; Pillow has Ghostscript run it."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\n: > {tmp_path}/was-run\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)        # looked for once a process
    with pytest.raises(Fault, match="^broken picture$"):
        read_picture(encoded(photo(1), "EPS"))
    assert not (tmp_path / "was-run").exists()


def test_endings_are_those_that_pillow_reads():
    assert {".jfif", ".jpe", ".tga", ".jp2", ".ppm", ".ico", ".psd", ".mpo"} <= set(ENDINGS)
    page = (ROOT / "docs" / "formats.md").read_text()
    named = page[page.index("these are `") + 11:page.index("`. The ending only")]
    if PIL.__version__.startswith("13."):          # of which the page speaks
        assert set(ENDINGS) == set(named.split())
    assert not {".eps", ".ps", ".pdf", ".mpg", ".h5", ".wmf", ".txt", ".json"} & set(ENDINGS)


def test_there_is_one_reader_of_pictures():
    for path in ROOT.rglob("*.py"):
        if path.parent != ROOT / "tests" and path != ROOT / "kit" / "images.py":
            assert "Image.open" not in path.read_text(), path


def test_transparency_is_laid_on_white():
    clear = photo(1, 48, 32).convert("RGBA")
    clear.putalpha(0)
    assert (np.asarray(read_picture(encoded(clear))) == 255).all()

    black = np.zeros((8, 8, 3), np.uint8)
    half = Image.fromarray(np.dstack([black, np.full((8, 8), 128, np.uint8)]))
    assert largest_difference(read_picture(encoded(half)), 127) <= 1

    palette = Image.fromarray(black).quantize(8)
    found = read_picture(encoded(palette, transparency=0))
    assert found.mode == "RGB"
    assert (np.asarray(found) == 255).all()


def test_a_picture_is_upright_as_viewers_show_it():
    plain = photo(1, 48, 32)
    turned = Image.Transpose
    shown = {
        1: plain,
        2: plain.transpose(turned.FLIP_LEFT_RIGHT),
        3: plain.transpose(turned.ROTATE_180),
        4: plain.transpose(turned.FLIP_TOP_BOTTOM),
        5: plain.transpose(turned.TRANSPOSE),
        6: plain.transpose(turned.ROTATE_270),
        7: plain.transpose(turned.TRANSVERSE),
        8: plain.transpose(turned.ROTATE_90),
    }
    for orientation, expected in shown.items():
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        for form in ("PNG", "TIFF", "JPEG", "WEBP"):
            blob = encoded(plain, form, exif=exif)
            assert picture_size(blob) == read_picture(blob).size == expected.size, orientation
        found = read_picture(encoded(plain, exif=exif))
        assert largest_difference(found, expected) == 0, orientation


def test_a_png_may_say_in_other_ways_how_it_lies():
    """ImageMagick writes EXIF as text, others XMP: the size has to be that of the picture read."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    dump = exif.tobytes()
    told = {"Raw profile type exif": f"\nexif\n{len(dump):8}\n{dump.hex()}\n",
            "XML:com.adobe.xmp": '<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>6'
                                 "</tiff:Orientation></x:xmpmeta>"}
    for name, text in told.items():
        info = PngInfo()
        info.add_itxt(name, text)
        blob = encoded(photo(1, 48, 32), pnginfo=info)
        assert picture_size(blob) == read_picture(blob).size == (32, 48), name


@pytest.mark.parametrize("size", [(128, 128), (96, 192), (192, 96), (64, 96)])
def test_a_crop_keeps_proportions_and_the_reduced_decoding_hardly_differs(size):
    height, width = size
    blob = encoded(photo(2, 1200, 800), "JPEG", quality=95)
    found = read_picture(blob, size, where=(0.0, 1.0))
    assert found.size == (width, height)

    # What hangs over is cut off on the right and at the top.
    across = min(1200, 800 * width / height)
    down = min(800, 1200 * height / width)
    box = (0, 800 - down, across, 800)
    whole = Image.open(io.BytesIO(blob)).convert("RGB")
    plain = whole.resize((width, height), Image.LANCZOS, box=box)
    assert np.abs(np.asarray(found, int) - np.asarray(plain, int)).mean() < 3


def test_a_crop_is_of_what_one_sees():
    exif = Image.Exif()
    exif[ORIENTATION] = 6                          # stored on its side
    blob = encoded(photo(2, 1200, 800), "JPEG", exif=exif)
    found = read_picture(blob, (300, 200))
    assert found.size == (200, 300)
    upright = read_picture(blob).resize((200, 300), Image.LANCZOS)
    assert np.abs(np.asarray(found, int) - np.asarray(upright, int)).mean() < 3


def test_broken_exif_does_not_break_a_picture():
    for form in ("JPEG", "PNG", "WEBP"):
        for torn in (b"Exif\0\0II", b"Exif\0\0II+\0\x08\0\0\0\1\0"):
            blob = encoded(photo(1, 64, 48), form, exif=torn)
            assert read_picture(blob).size == picture_size(blob) == (64, 48)


@pytest.mark.parametrize("blob", [
    b"",
    b"\0" * 4000,
    b"this is not a picture",
    encoded(photo(3))[:400],
    encoded(photo(4), "JPEG")[:900],
    png_of(0, 10),
], ids=["empty", "zeros", "text", "torn png", "torn jpeg", "no pixels"])
def test_a_broken_picture_is_called_so(blob):
    for size in (None, (64, 64)):
        with pytest.raises(Fault, match="^broken picture$"):
            read_picture(blob, size)


@pytest.mark.parametrize("width, height", [(2**14, 2**13 + 1), (60_000, 60_000)])
def test_a_picture_that_claims_too_many_pixels_is_refused(width, height):
    with pytest.raises(Fault, match="^too many pixels$"):
        read_picture(png_of(width, height), (64, 64))


# --- Pictures for people --------------------------------------------------------------------------

def test_a_contact_sheet_holds_every_picture_whole():
    pictures = [photo(i, 30 + i, 20 + i) for i in range(5)]
    sheet = contact_sheet(pictures, columns=3)
    assert sheet.size == (3 * (34 + 4) - 4, 2 * (24 + 4) - 4)
    for k, picture in enumerate(pictures):
        left, top = k % 3 * 38, k // 3 * 28
        cell = sheet.crop((left, top, left + picture.width, top + picture.height))
        assert largest_difference(cell, picture) == 0

    assert contact_sheet(pictures).size == sheet.size             # 5 pictures: 3 columns, 2 rows


def test_captions_stand_below_their_pictures_and_are_cut_to_their_width():
    few = [Image.new("RGB", (64, 48), "blue")] * 3
    words = ["a star", "a word and another one, " * 20, "w" * 5000]
    sheet = np.asarray(contact_sheet(few, columns=3, captions=words))
    height, width, _ = sheet.shape
    assert width == 3 * 64 + 2 * 4                 # as without captions
    assert (sheet[:48, :64] == (0, 0, 255)).all()
    below = (sheet[48:] < 128).all(-1)             # ink
    inked = [below[:, k * 68:k * 68 + 64] for k in range(3)]
    assert all(ink.any() for ink in inked)
    assert not below[:, 64:68].any() and not below[:, 132:136].any()
    lines = [ink.any(1).nonzero()[0].max() for ink in inked]      # how far down it goes
    assert lines[1] > 2 * lines[0]                 # three lines, and one
    assert lines[2] < 2 * lines[0]
    assert height - 48 <= 3 * 16


def test_a_tick_is_green_and_a_cross_is_red():
    few = [Image.new("RGB", (64, 48))] * 2
    sheet = contact_sheet(few, 2, captions=["yes", "no"], right=[True, False])
    sheet = np.asarray(sheet).astype(int)
    green = (sheet[48:, :, 1] - sheet[48:, :, 0] > 100).any(0)
    red = (sheet[48:, :, 0] - sheet[48:, :, 1] > 100).any(0)
    assert green[:12].any() and not green[12:].any()
    assert red[68:80].any() and not red[:68].any() and not red[80:].any()


def test_an_enlarged_picture_has_the_same_pixels():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (3, 5, 3), np.uint8)
    large = np.asarray(enlarged(Image.fromarray(small), 4))
    assert (large == small.repeat(4, 0).repeat(4, 1)).all()


def test_a_contact_sheet_of_no_pictures_is_a_small_empty_one():
    sheet = contact_sheet([])
    assert sheet.size == (128, 128)
    assert (np.asarray(sheet) == 255).all()
    assert contact_sheet([], columns=6).height == 128


def test_a_jpeg_is_written_though_its_notes_are_too_long(tmp_path):
    save_picture(photo(5), tmp_path / "a.jpg", {"prompt": "猫" * 11_000})
    assert Image.open(tmp_path / "a.jpg").size == photo(5).size
    assert read_notes(tmp_path / "a.jpg") == {}


def test_a_png_carries_its_notes(tmp_path):
    path = tmp_path / "new" / "picture.png"
    save_png(photo(5), path, {"prompt": "a café, 猫", "seed": 7})
    found = Image.open(path)
    assert found.text == {"prompt": "a café, 猫", "seed": "7"}
    assert largest_difference(found, photo(5)) == 0
    assert list(path.parent.iterdir()) == [path]                  # nothing is left beside it

    save_png(photo(6), path)
    assert Image.open(path).text == {}
