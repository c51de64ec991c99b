"""Pictures that others made: every kind of bad file is counted, good ones come out right, and the order of an epoch is exact."""
import io
import json
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data

ROOT = Path(__file__).parent.parent
LOOSE = ["--limit", "area=0", "--limit", "blur=0", "--limit", "entropy=0", "--limit", "dark=0", "--limit", "bright=1"]


def photo(i=0, width=64, height=64):
    """A picture with structure at all scales, no two alike."""
    rng = np.random.default_rng(i)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 7, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    return Image.fromarray((np.asarray(coarse, int) + rng.integers(-20, 20, (height, width, 3))).clip(0, 255).astype(np.uint8))


def encoded(image, form="PNG", **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def png_of(width, height):
    """A PNG's header alone, claiming a size."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def make_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def make_shards(folder, count=40, seed=0):
    """A folder of toy scenes at a few sizes, packed."""
    images = folder / "images"
    images.mkdir(parents=True)
    for i in range(count):
        height, width = [(96, 96), (128, 64), (80, 144), (64, 64)][i % 4]
        scene, _, words = data.sample(seed, 0, i, height, width)
        data.draw(scene, height, width).save(images / f"{i:03d}.png")
        (images / f"{i:03d}.txt").write_text(words)
    data.main(["pack", "--images", str(images), "--out", str(folder / "shards"), "--limit", "duplicate=1.1", *LOOSE])
    return str(folder / "shards" / "*.tar")


SIZES = [size for base in (64, 96, 128) for size in data.BUCKETS[base]]


def test_every_kind_of_picture_comes_out_as_right_rgb():
    plain = photo(1, 48, 32)
    grey = np.asarray(plain.convert("L"))
    same = lambda blob, image, within=2: np.abs(np.asarray(data.read_picture(blob), int) - np.asarray(image.convert("RGB"), int)).max() <= within
    assert same(encoded(plain), plain, 0)
    assert same(encoded(plain.convert("L")), plain.convert("L"), 0)
    assert same(encoded(plain.convert("1")), plain.convert("1"), 0)
    assert same(encoded(plain.quantize(16)), plain.quantize(16), 0)
    assert same(encoded(plain.convert("CMYK"), "TIFF"), plain, 2)
    assert same(encoded(Image.fromarray(grey.astype(np.uint16) * 257)), plain.convert("L"), 0)                # 16 bits: scaled, not clipped
    clear = plain.convert("RGBA")
    clear.putalpha(0)
    assert (np.asarray(data.read_picture(encoded(clear))) == 255).all()                                        # nothing there: paper
    half = Image.fromarray(np.dstack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 128, np.uint8)]))
    assert np.abs(np.asarray(data.read_picture(encoded(half)), int) - 127).max() <= 1
    palette = plain.quantize(8)
    palette.info["transparency"] = 0
    assert data.read_picture(encoded(palette, transparency=0)).mode == "RGB"
    for orientation in range(1, 9):                                                                            # what viewers show is what we read
        exif = Image.Exif()
        exif[0x0112] = orientation
        blob = encoded(plain, exif=exif)
        stored = {1: plain, 2: plain.transpose(0), 3: plain.transpose(3), 4: plain.transpose(1), 5: plain.transpose(5), 6: plain.transpose(4), 7: plain.transpose(6), 8: plain.transpose(2)}
        assert same(blob, stored[orientation], 0), orientation


def test_a_crop_keeps_proportions_and_the_reduced_decode_hardly_differs():
    image = photo(2, 1200, 800)
    blob = encoded(image, "JPEG", quality=95)
    for size in ((128, 128), (96, 192), (192, 96), (64, 96)):
        found = data.read_picture(blob, size, (0.0, 1.0))
        across = min(1200, 800 * size[1] / size[0])
        down = min(800, 1200 * size[0] / size[1])
        plain = Image.open(io.BytesIO(blob)).convert("RGB").resize((size[1], size[0]), Image.LANCZOS, box=(0, 800 - down, across, 800))
        assert found.size == (size[1], size[0])
        assert np.abs(np.asarray(found, int) - np.asarray(plain, int)).mean() < 3
    exif = Image.Exif()
    exif[0x0112] = 6                                                                                           # on its side: the crop is of what one sees
    assert data.read_picture(encoded(image, "JPEG", exif=exif), (300, 200)).size == (200, 300)


def test_25_kinds_of_bad_file_are_counted_exactly(tmp_path, capsys):
    folder, good = tmp_path / "in", encoded(photo(3))
    folder.mkdir()
    write = lambda name, blob, words="a picture": ((folder / name).write_bytes(blob), words is not None and (folder / name).with_suffix(".txt").write_bytes(words.encode() if isinstance(words, str) else words))
    for i in range(6):
        write(f"good{i}.png", encoded(photo(100 + i)))
    write("wrong_ending.jpg", encoded(photo(110)))                                     # a PNG called .jpg: read by what it holds
    write("upper.PNG", encoded(photo(111)))
    write("torn.png", good[:len(good) // 2])                                           # broken picture: 9 kinds
    write("torn_jpeg.jpg", encoded(photo(4), "JPEG")[:900])
    write("empty.png", b"")
    write("zeros.png", b"\0" * 4000)
    write("text.jpg", b"this is not a picture")
    write("html.jpg", b"<html><body>404</body></html>")
    write("header_only.png", good[:33])
    write("flipped.png", good[:60] + bytes(b ^ 255 for b in good[60:400]) + good[400:])
    write("no_pixels.png", png_of(0, 10))
    write("bomb.png", png_of(60_000, 60_000))                                          # too many pixels
    write("no_caption.png", encoded(photo(112)), None)                                 # no caption of a word
    write("blank_caption.png", encoded(photo(113)), " \n ")
    write("latin.png", encoded(photo(114)), "caf\xe9".encode("latin-1"))               # caption is not UTF-8
    write("huge.png", encoded(photo(115)), "word " * 100_000)                          # caption too long
    write("json.png", encoded(photo(116)), None)                                       # broken JSON: 3
    (folder / "json.json").write_text("{not json")
    write("list.png", encoded(photo(117)), None)
    (folder / "list.json").write_text("[1, 2]")
    write("number.png", encoded(photo(118)), None)
    (folder / "number.json").write_text('{"caption": [7]}')
    (folder / "rows.jsonl").write_text('{"file_name": "blank_caption.png"}\n{torn\n{"file": 1}\n')             # broken JSON line: 2
    (folder / "lonely.txt").write_text("words without a picture")                      # no picture
    write("good0.jpg", encoded(photo(119), "JPEG"), None)                              # duplicate key
    write("same_as_good1.png", encoded(photo(101)))                                    # duplicate > 0.985
    write("black.png", encoded(Image.new("RGB", (64, 64))))                            # blur
    write("tiny.png", encoded(photo(120, 16, 16)))                                     # area
    write("flat.png", encoded(Image.fromarray(np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((8, 8))).astype(np.uint8) * 255).convert("RGB")))       # entropy
    write("dark.png", encoded(Image.fromarray((np.asarray(photo(121)) // 12).astype(np.uint8))))               # dark
    make_tar(folder / "a.tar", [("x.png", encoded(photo(122))), ("x.txt", b"inside a tar"), ("../../evil.png", good), ("/etc/evil.png", good), ("link.png", None),
                                ("x.png", good), ("x.txt", b"again")])
    make_tar(folder / "b.tar", [("y.png", encoded(photo(123))), ("y.txt", b"whole"), ("z.png", encoded(photo(124))), ("z.txt", b"cut")])
    torn = (folder / "b.tar").read_bytes()
    (folder / "b.tar").write_bytes(torn[:torn.index(b"z.png") + 700])
    (folder / "c.tar").write_bytes(b"no tar at all")
    data.main(["pack", "--images", str(folder), "--out", str(tmp_path / "out"), "--limit", "area=1000", "--limit", "entropy=1.5", "--limit", "blur=0.5"])
    report = json.loads((tmp_path / "out" / "pack.json").read_text())
    faults = {k: v for k, v in report["faults"].items() if v}
    assert faults == {"broken picture": 9, "too many pixels": 1, "caption is not UTF-8": 1, "caption too long": 1, "broken JSON": 3, "broken JSON line": 2,
                      "no picture": 1, "duplicate key": 3, "hostile path in a tar": 2, "link or device in a tar": 1, "torn or unreadable tar": 2}
    left = dict(report["table"])
    names, counts = zip(*report["table"])
    lost = {n.split()[0]: b - a for n, a, b in zip(names[1:], counts[1:], counts)}
    assert lost == {"broken,": 16, "area": 1, "nsfw": 0, "aesthetic": 0, "watermark": 0, "blur": 1, "entropy": 1, "dark": 1, "bright": 0, "duplicate": 1, "no": 2}
    shards = data.Shards(tmp_path / "out" / "*.tar", SIZES)
    assert len(shards.rows) == counts[-1] == 6 + 2 + 2 and not +shards.faults          # good ones, and those of the tars
    assert not (tmp_path / "evil.png").exists() and not (tmp_path.parent / "evil.png").exists()
    assert capsys.readouterr().out.count("hostile path") == 1
    with pytest.raises(SystemExit) as done:                                            # finished shards are not written over
        data.main(["pack", "--images", str(folder), "--out", str(tmp_path / "out")])
    assert done.value.code == 2


def test_shards_of_others_are_read_with_every_fault_counted(tmp_path):
    make_tar(tmp_path / "a.tar", [("one.jpg", encoded(photo(1), "JPEG")), ("one.txt", b"first"), ("two.png", encoded(photo(2))), ("three.txt", b"no picture"),
                                  ("../up.png", encoded(photo(3))), ("bad.png", b"zero"), ("bad.txt", b"fourth"), ("sub/one.png", encoded(photo(4))), ("sub/one.json", b'{"caption": "fifth"}')])
    shards = data.Shards(tmp_path / "*.tar", SIZES)
    assert len(shards.rows) == 2 and +shards.faults == Counter({"no caption": 1, "no picture": 1, "hostile path in a tar": 1, "broken picture": 1})
    images, captions, faults = shards[shards.buckets[0], [0, 1], 0]
    assert images.shape == (2, 64, 64, 3) and captions == ["first", "fifth"] and not faults
    again = data.Shards(tmp_path / "*.tar", SIZES)                                     # from the index beside it
    assert again.digest == shards.digest and again.faults == shards.faults and list(tmp_path.glob("*.index.json"))


def test_an_epoch_is_every_sample_once_whatever_the_world(tmp_path):
    shards = data.Shards(make_shards(tmp_path), SIZES, seed=3)
    batch = {b: 3 for b in range(len(SIZES))}
    plans = [data.plan(shards.buckets, shards.lengths, batch, 3, epoch) for epoch in (0, 0, 1)]
    for plan in plans:
        assert sorted(np.concatenate([s for _, s, _ in plan])) == list(range(40))
        assert all((shards.buckets[s] == b).all() and len(s) <= 3 for b, s, _ in plan)
    key = lambda plan: [(b, s.tolist()) for b, s, _ in plan]
    assert key(plans[0]) == key(plans[1]) != key(plans[2])
    for ranks in (1, 2, 4):                                                            # ranks take turns: together, all of them once
        assert sorted(np.concatenate([s for rank in range(ranks) for _, s, _ in plans[0][rank::ranks]])) == list(range(40))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_change_nothing(tmp_path, workers):
    shards = data.Shards(make_shards(tmp_path, 24), SIZES, seed=1)
    plan = data.plan(shards.buckets, shards.lengths, {b: 4 for b in range(len(SIZES))}, 1, 5)
    loader = torch.utils.data.DataLoader(shards, batch_size=None, sampler=plan, num_workers=workers)
    for (images, captions, faults), batch in zip(loader, plan):
        expected, words, _ = shards[batch]
        assert (np.asarray(images) == expected).all() and list(captions) == words and not faults
    half = torch.utils.data.DataLoader(shards, batch_size=None, sampler=plan[3:], num_workers=workers)         # a resume is a slice of the plan
    assert (np.asarray(next(iter(half))[0]) == shards[plan[3]][0]).all()


def test_a_bad_sample_is_replaced_from_its_bucket_and_named(tmp_path):
    pattern = make_shards(tmp_path, 16)
    shards = data.Shards(pattern, SIZES)
    members = np.flatnonzero(shards.buckets == shards.buckets[0])
    with open(shards.paths[0], "r+b") as f:                                            # spoilt after it was indexed
        f.seek(shards.rows[members[0], 1] + 8)
        f.write(b"\0" * 40)
    images, captions, faults = shards[shards.buckets[0], members[:2], 0]
    assert len(images) == 2 and (images[0] == images[1]).all() and captions[0] == captions[1]
    assert len(faults) == 1 and f"sample {members[0]}" in faults[0] and "broken picture" in faults[0]
    with open(shards.paths[0], "r+b") as f:
        for i in members:
            f.seek(shards.rows[i, 1] + 8)
            f.write(b"\0" * 40)
    with pytest.raises(ValueError, match="20 samples in a row"):
        shards[shards.buckets[0], members[:1], 0]
    assert data.Shards(pattern, SIZES).digest == shards.digest                         # same layout: offsets are what the digest covers


def test_a_picture_goes_to_the_largest_area_that_it_fills(tmp_path):
    sizes = {"a": (2000, 2000), "b": (900, 900), "c": (600, 600), "d": (300, 300), "e": (1100, 2300), "f": (640, 960), "g": (640, 959), "h": (640, 900)}
    make_tar(tmp_path / "a.tar", [(f"{k}{e}", blob) for k, (h, w) in sizes.items() for e, blob in
                                  ((".png", b"never read"), (".json", json.dumps({"caption": k, "height": h, "width": w}).encode()))])
    shards = data.Shards(tmp_path / "a.tar", [s for base in (512, 768, 1024) for s in data.buckets(base)])
    assert [shards.sizes[b] for b in shards.buckets] == [(1024, 1024), (768, 768), (512, 512), (512, 512), (736, 1472), (640, 960), (640, 960), (448, 608)]


def test_latents_are_kept_while_fresh_and_refused_when_stale(tmp_path, capsys):
    pattern = make_shards(tmp_path, 12)
    command = ["cache", "--data", pattern, "--bases", "64,96,128", "--out", str(tmp_path / "latents")]
    data.main(command)
    assert "0 of 1 shards were fresh" in capsys.readouterr().out
    data.main(command)
    assert "1 of 1 shards were fresh" in capsys.readouterr().out
    import lens
    vae_hash = data.file_hash(lens.weight_files(ROOT / "weights" / "toy" / "vae")[0])
    plain, kept = data.Shards(pattern, SIZES), data.Shards(tmp_path / "latents" / "*.tar", SIZES, vae=vae_hash)
    assert len(kept.rows) == 12 and sorted(kept.buckets) == sorted(plain.buckets)
    bits, captions, faults = kept[kept.buckets[0], [0], 0]
    vae = lens.load_pipeline(ROOT / "weights" / "toy", "cpu", torch.float32, parts=("vae",))[1]
    i = next(i for i in range(12) if data.words_of(plain.parts(i))[0] == captions)
    image = data.read_picture(data.read(plain.parts(i)["picture"]), plain.sizes[plain.buckets[i]])
    import sample
    with torch.no_grad():
        expected = vae.to_tokens(vae.encode(sample.autoencoder.from_pil([image]))[0])
    found = torch.from_numpy(bits).view(torch.bfloat16).view(expected.shape).float()
    assert torch.allclose(found, expected, rtol=0.01, atol=0.01)                       # bf16, and a sum's order that depends on the batch
    with pytest.raises(ValueError, match="cache"):
        data.Shards(tmp_path / "latents" / "*.tar", SIZES, vae="another")[kept.buckets[0], [0], 0]
    tar = Path(plain.paths[0])
    tar.write_bytes(tar.read_bytes() + b"\0" * 512)                                    # the pictures changed: the latents are made again
    data.main(command)
    assert "0 of 1 shards were fresh" in capsys.readouterr().out


def stumbling():
    """Fails as real endpoints do: the first call of each picture may be answered with 429 or 500."""
    seen = Counter()

    def answer(request):
        name = json.dumps(request["messages"])
        seen[name] += 1
        return f" {request['model']} saw it " if seen[name] > 1 else (429, 500, f" {request['model']} saw it ")[len(name) % 3]
    return answer


def test_missing_captions_are_written_by_an_endpoint_and_never_twice(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setenv("LENS_API_KEY", "secret-key")
    server.script = [stumbling()]
    for i in range(6):
        photo(i).save(tmp_path / f"{i}.png")
    (tmp_path / "0.txt").write_text("this one has its words and is long enough")
    (tmp_path / "1.txt").write_text("too brief")
    for out in ("a", "b"):
        (tmp_path / out).mkdir()
        if out == "b":
            (tmp_path / "b" / "captions.jsonl").write_text((tmp_path / "a" / "captions.jsonl").read_text() + '["torn')
        before = len(server.calls)
        pictures = tmp_path / "pictures"
        pictures.mkdir(exist_ok=True)
        [p.rename(pictures / p.name) for p in [*tmp_path.glob("*.png"), *tmp_path.glob("*.txt")]]
        data.main(["pack", "--images", str(pictures), "--out", str(tmp_path / out), "--endpoint", server.url, "--model", "eye", "--min-words", "3", *LOOSE])
        asked = len(server.calls) - before
        assert asked >= 5 if out == "a" else asked == 0                                # the second run found every answer in the journal
        shards = data.Shards(tmp_path / out / "*.tar", SIZES)
        words = sorted(shards[shards.buckets[0], [i], 0][1][0] for i in range(6))
        assert words == ["eye saw it"] * 5 + ["this one has its words and is long enough"]
    assert set(server.keys) == {"Bearer secret-key"}
    shown = "".join(capsys.readouterr()) + "".join(p.read_text(errors="ignore") for p in tmp_path.rglob("*") if p.is_file())
    assert "secret-key" not in shown


def test_an_endpoint_that_stays_down_is_reported_and_costs_no_picture(tmp_path, capsys):
    endpoint = data.Endpoint("http://127.0.0.1:9/v1", "none", tries=1)
    assert endpoint.ask([[{"role": "user", "content": "hello"}]] * 2) == [None, None] and endpoint.failed == ["URLError"] * 2


@pytest.mark.parametrize("command, said", [(["pack"], "needs --images"), (["pack", "--images", "/nowhere"], "no pictures there"), (["stats"], "needs --data"),
                                           (["stats", "--data", "/nowhere/*.tar"], "no usable sample"), (["pack", "--images", ".", "--limit", "beauty=3"], "the limits are")])
def test_mistakes_are_one_line(command, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        data.main(command)
    message = capsys.readouterr().err
    assert done.value.code == 2 and said in message and message.count("\n") == 1


def test_a_worker_does_not_grow(tmp_path):
    """Three epochs in a process of its own: its memory after the third is that after the first."""
    pattern = make_shards(tmp_path, 40)
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import data, gc
shards = data.Shards({pattern!r}, {SIZES!r})
def memory():
    gc.collect()
    return int(next(l for l in open('/proc/self/status') if l.startswith('VmRSS')).split()[1])
sizes = []
for epoch in range(8):
    for batch in data.plan(shards.buckets, shards.lengths, {{b: 4 for b in range(27)}}, 0, epoch):
        shards[batch]
    sizes.append(memory())
print(sizes[2], sizes[7])
"""
    first, last = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert last < 1.01 * first, (first, last)
