"""Sizes are the paper's, every bad file is counted, and an epoch is exact."""
import json
import math
import multiprocessing
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDENS, ROOT, error_line
from PIL import Image
from shards import LOOSE, SIZES, FixedEncoder, encoded, make_shards, make_tar, photo, png_of, spoil
from torch.utils.data import DataLoader

import data
import kit.pack
from kit import chat
from kit.checkpoint import load_pipeline
from kit.files import LensError
from kit.images import Fault, from_pil, read_picture
from kit.pack import ASK_CAPTION
from kit.places import vae_identity
from kit.tars import Part, find_files, read, tar_members, words_of
from toy.world import AREAS

TOY = ROOT / "weights" / "toy"
FOUR_A_BATCH = dict.fromkeys(range(len(SIZES)), 4)


def pack(images, out, *more):
    data.main(["pack", "--images", str(images), "--out", str(out), *more])


def tar_names(folder):
    return sorted(path.name for path in folder.glob("*.tar"))


def one_batch(shards, samples, epoch=0):
    """Samples of one bucket, as a Reading."""
    bucket = shards.buckets[samples[0]]
    return shards[data.PlannedBatch(bucket, np.array(samples), epoch)]


# --- Sizes ----------------------------------------------------------------------------------------

def test_buckets_are_the_checkpoints():
    golden = json.loads((GOLDENS / "buckets.json").read_text())
    for base, sizes in golden["inference_buckets_by_base_height_width"].items():
        assert {ratio: list(data.bucket(int(base), ratio)) for ratio in data.RATIOS} == sizes
    for base, sizes in golden["training_buckets_by_base"].items():
        found = sorted(data.bucket(int(base), ratio) for ratio in data.RATIOS)
        assert found == sorted(map(tuple, sizes))
        assert found == data.buckets(int(base))


def test_buckets_of_other_areas_are_near_to_ratio_and_area():
    for base in AREAS:
        sizes = data.buckets(base)
        assert len(sizes) == (9 if base == 128 else 7)             # some of the small ones coincide
        for height, width in sizes:
            assert height % 16 == width % 16 == 0
            assert 0.45 <= height / width <= 2.2
            assert 0.7 <= height * width / base**2 <= 1.3

    # What generalisation to new sizes is scored on must be new.
    for size in ((128, 160), data.bucket(96, "6:7"), data.bucket(180)):
        assert size not in SIZES


def test_a_ratio_is_width_to_height():
    for base in (96, 512):
        for ratio in data.RATIOS:
            wide, tall = (int(number) for number in ratio.split(":"))
            height, width = data.bucket(base, ratio)
            assert np.sign(width - height) == np.sign(wide - tall), (base, ratio)


@pytest.mark.parametrize("ratio", ["wide", "16/9", "1:0", "0:1", "-1:2", "nan:1", ""])
def test_a_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(LensError, match="W:H"):
        data.bucket(96, ratio)


def test_a_picture_goes_to_the_largest_area_that_it_fills(tmp_path):
    pictures = {
        (2000, 2000): (1024, 1024),
        (900, 900): (768, 768),
        (600, 600): (512, 512),
        (300, 300): (512, 512),                    # fills none: the smallest
        (1100, 2300): (736, 1472),
        (640, 960): (640, 960),
        (640, 959): (640, 960),                    # enlarged by a thousandth
        (640, 900): (448, 608),
    }
    members = []
    for k, (height, width) in enumerate(pictures):
        notes = {"caption": "words", "height": height, "width": width}
        members += [(f"{k}.png", b"never read"), (f"{k}.json", json.dumps(notes).encode())]
    make_tar(tmp_path / "a.tar", members)

    sizes = [size for base in (512, 768, 1024) for size in data.buckets(base)]
    shards = data.Shards(tmp_path / "a.tar", sizes)
    assert [shards.sizes[b] for b in shards.buckets] == list(pictures.values())


def test_the_bucket_is_that_of_the_rule_in_words():
    """Against plain loops: pictures that fill the largest area get its nearest ratio."""
    sizes = sorted(SIZES, key=lambda size: size[0] * size[1])
    rng = np.random.default_rng(0)
    height, width = rng.integers(200, 600, (2, 300))                  # fills every size
    chosen = data.choose_buckets(height, width, sizes)
    for i, b in enumerate(chosen):
        assert sizes[b] in data.buckets(128)
        off_ratio = [abs(np.log(height[i] / width[i] * w / h)) for h, w in data.buckets(128)]
        h, w = sizes[b]
        assert abs(np.log(height[i] / width[i] * w / h)) == pytest.approx(min(off_ratio))


def test_a_picture_gets_its_own_ratio_in_small_areas_too():
    """48 x 64 is three quarters of 64 x 64: it lost to sizes that are nearer to the area."""
    sizes = data.sorted_by_area([size for base in (64, 96) for size in data.buckets(base)])
    for size, picture in (((48, 64), (48, 64)), ((64, 48), (60, 45)), ((80, 144), (450, 800))):
        height, width = (np.array([side]) for side in picture)
        (chosen,) = data.choose_buckets(height, width, sizes)
        assert sizes[chosen] == size


@pytest.mark.parametrize("base", (64, 96, 128, 512, 768, 1024))
def test_sizes_of_one_base_belong_to_one_area(base):
    sizes = [size for area in (64, 96, 128, 512, 768, 1024) for size in data.buckets(area)]
    areas = data.areas_of(sizes)
    assert {areas[sizes.index(size)] for size in data.buckets(base)} == {base**2}


def test_a_lone_size_has_an_area_of_its_own():
    assert data.areas_of([(64, 128)]).tolist() == [64 * 128]
    assert data.areas_of([(512, 512), (64, 128)]).tolist() == [512**2, 64 * 128]


# --- Batches --------------------------------------------------------------------------------------

def as_lists(planned):
    return [(batch.bucket, batch.samples.tolist(), batch.epoch) for batch in planned]


def test_an_epoch_is_every_sample_once_whatever_the_world():
    rng = np.random.default_rng(0)
    buckets, lengths = rng.integers(5, size=203), rng.integers(1, 40, size=203)
    batch = {0: 3, 1: 4, 2: 5, 3: 6, 4: 7}
    first, again, second = (data.plan(buckets, lengths, batch, 3, epoch) for epoch in (0, 0, 1))

    for planned in (first, second):
        samples = np.concatenate([batch.samples for batch in planned])
        assert sorted(samples) == list(range(203))
        for bucket, samples, _ in planned:
            assert (buckets[samples] == bucket).all()
            assert len(samples) <= batch[bucket]
    assert as_lists(first) == as_lists(again)
    assert as_lists(first) != as_lists(second)

    # Ranks take turns: together they have all samples, each once.
    for ranks in (1, 2, 4):
        dealt = [first[rank::ranks] for rank in range(ranks)]
        samples = [batch.samples for share in dealt for batch in share]
        assert sorted(np.concatenate(samples)) == list(range(203))


def test_a_batch_has_captions_of_like_length():
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 400, size=800)
    planned = data.plan(np.zeros(800, int), lengths, {0: 10}, seed=0, epoch=0)
    spread = np.mean([np.ptp(lengths[batch.samples]) for batch in planned])
    assert spread < 0.25 * np.ptp(lengths)
    assert lengths[planned[0].samples].tolist() != sorted(lengths)[:10]


def counted(count, faults, samples):
    count.add(data.Batch(np.arange(samples), 0, (1, 1), [], None, faults=["bad"] * faults))


def test_faults_are_counted_named_and_limited(capsys):
    count = data.FaultCount()
    counted(count, 0, 50)
    assert capsys.readouterr().err == ""
    counted(count, 2, 50)
    assert (count.replaced, count.seen) == (2, 100)
    assert capsys.readouterr().err == "replaced by the next of its bucket: bad\n" * 2

    counted(count, 99, 100)                        # the limit at 200 samples is 102
    counted(count, 1, 0)
    assert (count.replaced, count.seen) == (102, 200)
    with pytest.raises(LensError, match="103 of 200 samples could not be read"):
        counted(count, 1, 0)


def test_a_count_of_faults_goes_on_where_a_run_is_resumed():
    count = data.FaultCount(replaced=100, seen=0)
    with pytest.raises(LensError, match="more than one in a hundred"):
        counted(count, 1, 50)


# --- Cleaning and packing -------------------------------------------------------------------------

def write_bad_files(folder):
    """Twelve good pictures, two of them in tars, and 26 kinds of bad files."""
    good = encoded(photo(3))
    folder.mkdir()

    def write(name, blob, caption="a picture"):
        (folder / name).write_bytes(blob)
        if isinstance(caption, str):
            caption = caption.encode()
        if caption is not None:
            (folder / name).with_suffix(".txt").write_bytes(caption)

    for i in range(6):
        write(f"good{i}.png", encoded(photo(100 + i)))
    write("wrong_ending.jpg", encoded(photo(110)))               # a PNG: read by what it holds
    write("upper.PNG", encoded(photo(111)))

    # broken picture: 9; too many pixels: 1
    flipped = bytes(byte ^ 255 for byte in good[60:400])
    write("torn.png", good[:len(good) // 2])
    write("torn_jpeg.jpg", encoded(photo(4), "JPEG")[:900])
    write("empty.png", b"")
    write("zeros.png", b"\0" * 4000)
    write("text.jpg", b"this is not a picture")
    write("html.jpg", b"<html><body>404</body></html>")
    write("header_only.png", good[:33])
    write("flipped.png", good[:60] + flipped + good[400:])
    write("no_pixels.png", png_of(0, 10))
    write("bomb.png", png_of(60_000, 60_000))

    # no caption of a word: 2; not UTF-8: 1; too long: 1; broken JSON: 4
    write("no_caption.png", encoded(photo(112)), None)
    write("blank_caption.png", encoded(photo(113)), " \n ")
    write("latin.png", encoded(photo(114)), "caf\xe9".encode("latin-1"))
    write("huge.png", encoded(photo(115)), "word " * 100_000)
    for name, content in {"json": "{not json", "list": "[1, 2]", "number": '{"caption": [7]}',
                          "deep": "[" * 100_000}.items():
        write(f"{name}.png", encoded(photo(116)), None)
        (folder / f"{name}.json").write_text(content)

    # broken JSON line: 3; no picture: 1; duplicate key: 1, and 2 in a tar. The torn tar has one
    # whole picture, y; the one that is no tar has none.
    lines = ['{"file_name": "blank_caption.png"}', "{torn", '{"file": 1}', "[" * 100_000]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "lonely.txt").write_text("words without a picture")
    write("good0.jpg", encoded(photo(119), "JPEG"), None)

    # one for each filter
    dark = Image.fromarray((np.asarray(photo(121)) // 12).astype(np.uint8))
    board = np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((8, 8))).astype(np.uint8) * 255
    write("same_as_good1.png", encoded(photo(101)))
    write("black.png", encoded(Image.new("RGB", (64, 64))))      # blur
    write("tiny.png", encoded(photo(120, 16, 16)))               # area
    write("flat.png", encoded(Image.fromarray(board).convert("RGB")))              # entropy
    write("dark.png", encoded(dark))

    # tars: hostile, torn, none at all
    make_tar(folder / "a.tar", [
        ("x.png", encoded(photo(122))), ("x.txt", b"inside a tar"),
        ("../../evil.png", good), ("/etc/evil.png", good), ("link.png", None),
        ("x.png", good), ("x.txt", b"again")])
    make_tar(folder / "b.tar", [
        ("y.png", encoded(photo(123))), ("y.txt", b"whole"),
        ("z.png", encoded(photo(124))), ("z.txt", b"cut")])
    torn = (folder / "b.tar").read_bytes()
    (folder / "b.tar").write_bytes(torn[:torn.index(b"z.png") + 700])
    (folder / "c.tar").write_bytes(b"no tar at all")


@pytest.mark.parametrize("spoil", ["a broken header", "a header cut short", "a size below zero"])
def test_a_tar_that_breaks_off_at_a_header_is_counted(spoil, tmp_path):
    """tarfile takes such a header for the end: the rest was missing without a word."""
    make_tar(tmp_path / "a.tar", [(f"{k}.txt", b"words") for k in range(3)])
    content = bytearray((tmp_path / "a.tar").read_bytes())
    begin = content.index(b"1.txt")
    if spoil == "a broken header":
        content[begin + 10] = 1
    elif spoil == "a header cut short":
        del content[begin + 100:]
    else:
        header = content[begin:begin + 512]
        header[124:136] = b"\xff" * 10 + b"\xfe\x00"                # -512 in base 256
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        content[begin:begin + 512] = header
    (tmp_path / "a.tar").write_bytes(content)

    faults = Counter()
    names = [str(name) for name, _ in tar_members(tmp_path / "a.tar", faults)]
    assert names == ["0.txt"]
    assert faults == {"torn or unreadable tar": 1}


def test_half_a_character_in_a_caption_is_a_fault(tmp_path):
    """JSON can escape it, and no tokenizer takes it."""
    (tmp_path / "a.json").write_text(r'{"caption": "a cat \ud83d"}')
    with pytest.raises(Fault, match="half a character"):
        words_of({".json": Part(str(tmp_path / "a.json"))})


def test_a_pattern_may_end_at_its_folders(tmp_path):
    (tmp_path / "deep").mkdir()
    make_tar(tmp_path / "deep" / "a.tar", [])
    assert find_files(f"{tmp_path}/**/") == [str(tmp_path / "deep" / "a.tar")]


def test_every_kind_of_bad_file_is_counted_exactly(tmp_path, capsys):
    write_bad_files(tmp_path / "in")
    pack(tmp_path / "in", tmp_path / "out",
         "--limit", "area=1000", "--limit", "entropy=1.5", "--limit", "blur=0.5")
    report = json.loads((tmp_path / "out" / "pack.json").read_text())
    assert report["faults"] == {
        "broken picture": 9,
        "too many pixels": 1,
        "caption is not UTF-8": 1,
        "caption too long": 1,
        "broken JSON": 4,
        "broken JSON line": 3,
        "no picture": 1,
        "duplicate key": 3,
        "hostile path in a tar": 2,
        "link or device in a tar": 1,
        "torn or unreadable tar": 2,
    }

    names, counts = zip(*report["table"], strict=True)
    lost = {name.split()[0]: before - after
            for name, before, after in zip(names[1:], counts, counts[1:], strict=False)}
    members_of_tars = 7 + 2
    on_disk = len(list((tmp_path / "in").iterdir()))
    assert counts[0] == on_disk + members_of_tars
    words = [path for path in (tmp_path / "in").iterdir()
             if path.suffix in (".txt", ".json", ".jsonl")]
    assert lost == {"captions": len(words) + 3, "tars": 3, "links": 3, "second": 2, "unusable": 16,
                    "area": 1, "nsfw": 0, "aesthetic": 0, "watermark": 0, "blur": 1,
                    "entropy": 1, "dark": 1, "bright": 0, "duplicate": 1, "no": 2}
    assert counts[0] - sum(lost.values()) == counts[-1]
    assert report["duplicates"] == [["same_as_good1", "good1"]]

    # The good ones, those with odd endings, and those of the tars are all there.
    shards = data.Shards(tmp_path / "out" / "*.tar", SIZES)
    assert len(shards.rows) == counts[-1] == 6 + 2 + 2
    assert not shards.faults
    assert not (tmp_path / "evil.png").exists()
    assert not (tmp_path.parent / "evil.png").exists()
    assert capsys.readouterr().out.count("hostile path") == 1


def test_scores_come_from_the_metadata_and_what_is_no_number_is_no_score(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i, score in enumerate((0.4, 0.6, None, "UNLIKELY", 1, "0.9", math.inf, [0.9], True)):
        photo(i).save(folder / f"{i}.png")
        notes = {"caption": f"picture {i}", "nsfw": score}
        (folder / f"{i}.json").write_text(json.dumps(notes))
    pack(folder, tmp_path / "out", *LOOSE)
    shards = data.Shards(tmp_path / "out" / "*.tar", SIZES)
    captions = [words_of(shards.parts(i))[0] for i in range(len(shards.rows))]
    assert captions == [["picture 0"], ["picture 2"], ["picture 3"], ["picture 6"], ["picture 7"]]
    report = json.loads((tmp_path / "out" / "pack.json").read_text())
    assert report["faults"] == {"nsfw score that is no number": 3}


def fake_pipeline(task, model, top_k):
    """Says "bad" with a certainty that is the picture's brightness."""
    def judge(image):
        bright = float(np.asarray(image).mean() / 255)
        return [{"label": "good", "score": 1 - bright}, {"label": "bad", "score": bright}]

    config = types.SimpleNamespace(label2id={"good": 0, "bad": 1})
    judge.model = types.SimpleNamespace(config=config)
    return judge


def test_a_classifier_scores_what_the_metadata_do_not(tmp_path, monkeypatch, capsys):
    fake = types.SimpleNamespace(pipeline=fake_pipeline)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    folder = tmp_path / "in"
    folder.mkdir()
    for name, shift in (("bright", 90), ("dim", -90)):
        pixels = (np.asarray(photo(1), int) + shift).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)

    pack(folder, tmp_path / "out", "--classifier", "nsfw=owner/model:bad", *LOOSE)
    shards = data.Shards(tmp_path / "out" / "*.tar", SIZES)
    assert [words_of(shards.parts(i))[0] for i in range(len(shards.rows))] == [["dim"]]

    said = error_line(data.main, ["pack", "--images", str(folder), "--out", str(tmp_path / "b"),
                                  "--classifier", "nsfw=owner/model:ugly"], capsys)
    assert "owner/model has no label 'ugly' among good, bad" in said


def stumbling():
    """Fails as real endpoints do: the first call of a picture may be answered with 429 or 500."""
    seen = Counter()

    def answer(request):
        name = json.dumps(request["messages"])
        seen[name] += 1
        words = f" {request['model']} saw it "
        if seen[name] > 1:
            return words
        return (429, 500, words)[len(name) % 3]

    return answer


def test_missing_captions_are_written_by_an_endpoint_and_never_twice(
        tmp_path, server, monkeypatch, capsys):
    monkeypatch.setenv("LENS_API_KEY", "secret-key")
    server.script = [stumbling()]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(6):
        photo(i).save(pictures / f"{i}.png")
    (pictures / "0.txt").write_text("this one has its words and is long enough")
    (pictures / "1.txt").write_text("too brief")

    def packed_captions(out):
        pack(pictures, tmp_path / out, "--endpoint", server.url, "--model", "eye",
             "--min-words", "3", *LOOSE)
        shards = data.Shards(tmp_path / out / "*.tar", SIZES)
        return sorted(one_batch(shards, [i]).captions[0] for i in range(6))

    expected = ["eye saw it"] * 5 + ["this one has its words and is long enough"]
    assert packed_captions("a") == expected
    assert len(server.calls) >= 5

    # The second run finds every answer in the first one's journal, though its last line is torn. It
    # asks only whether somebody is there.
    before = len(server.calls)
    (tmp_path / "b").mkdir()
    journal = (tmp_path / "a" / "captions.jsonl").read_text()
    (tmp_path / "b" / "captions.jsonl").write_text(journal + '["torn')
    assert packed_captions("b") == expected
    assert len(server.calls) == before + 1

    assert set(server.keys) == {"Bearer secret-key"}
    written = [path.read_text(errors="ignore") for path in tmp_path.rglob("*") if path.is_file()]
    assert "secret-key" not in "".join([*capsys.readouterr(), *written])


def test_captions_are_cleaned_and_refusals_counted(tmp_path, server, capsys):
    answers = {"0": "<think>hm</think>A cat.",
               "1": "I'm sorry, I can't help with that.",
               "2": 'Here is the description:\n\n"A dog."',
               "3": [{"type": "text", "text": "A hat."}]}
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    by_request = {}
    for name, answer in answers.items():
        photo(int(name)).save(pictures / f"{name}.png")
        shown = chat.chat_about(Image.open(pictures / f"{name}.png").convert("RGB"), ASK_CAPTION)
        by_request[json.dumps(shown)] = answer
    server.script = [lambda request: by_request.get(json.dumps(request["messages"]), "hello")]

    out = tmp_path / "out"
    pack(pictures, out, "--endpoint", server.url, *LOOSE)
    shards = data.Shards(out / "*.tar", SIZES)
    captions = [words_of(shards.parts(i))[0][0] for i in range(len(shards.rows))]
    assert sorted(captions) == ["A cat.", "A dog.", "A hat."]
    faults = json.loads((out / "pack.json").read_text())["faults"]
    assert faults == {"caption not written: a refusal, or no words": 1}
    assert len((out / "captions.jsonl").read_text().splitlines()) == 3


def test_a_dead_caption_server_is_found_out_before_pictures_are_read(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.01)
    (tmp_path / "in").mkdir()
    photo(1).save(tmp_path / "in" / "a.png")
    monkeypatch.setattr(kit.pack, "examine_all", None)                 # not called
    flags = ["pack", "--images", str(tmp_path / "in"), "--out", str(tmp_path / "out"),
             "--endpoint", "http://127.0.0.1:9/v1"]
    assert "no answer from default" in error_line(data.main, flags, capsys)
    assert not list(tmp_path.glob("out/*"))


# --- A packing that was killed --------------------------------------------------------------------

@pytest.fixture
def photos(tmp_path):
    """Six pictures of a little over half a MB: --shard-mb 1 makes three tars of them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 255, (420, 420, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


class Killed(BaseException):
    pass


def killed_pack(photos, out, monkeypatch):
    """A packing that ends while it reads its last picture."""
    def packed_until_killed(candidate):
        if candidate.key == "5":
            raise Killed
        return packed(candidate)

    packed = kit.pack.packed
    with monkeypatch.context() as patch:
        patch.setattr(kit.pack, "packed", packed_until_killed)
        with pytest.raises(Killed):
            pack(photos, out, "--shard-mb", "1", *LOOSE)


def test_tars_of_a_killed_packing_do_not_outlive_the_next(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    killed_pack(photos, out, monkeypatch)
    assert tar_names(out) == ["00000.tar", "00001.tar"]
    (out / "00002.tar.77.new").write_text("torn")                # as a kill leaves it
    data.Shards(out / "*.tar", SIZES)                            # an index beside each tar
    (out / "notes.txt").write_text("of the user")

    for path in photos.glob("[3-5].*"):
        path.unlink()
    pack(photos, out, *LOOSE)
    assert sorted(path.name for path in out.iterdir()) == ["00000.tar", "notes.txt", "pack.json"]
    assert len(data.Shards(out / "*.tar", SIZES).rows) == 3


def test_an_unfinished_packing_below_the_pictures_is_not_packed(photos, monkeypatch):
    out = photos / "shards"
    killed_pack(photos, out, monkeypatch)
    pack(photos, out, "--shard-mb", "1", *LOOSE)
    assert len(data.Shards(out / "*.tar", SIZES).rows) == 6


def test_a_finished_packing_is_never_touched(photos, tmp_path, capsys):
    out = tmp_path / "out"
    pack(photos, out, "--shard-mb", "1", *LOOSE)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len([name for name in before if name.endswith(".tar")]) > 1
    said = error_line(data.main, ["pack", "--images", str(photos), "--out", str(out)], capsys)
    assert "holds finished shards already" in said
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_tars_that_nobody_packed_here_are_never_touched(photos, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    make_tar(out / "00000.tar", [("a.txt", b"of the user")])
    said = error_line(data.main, ["pack", "--images", str(photos), "--out", str(out)], capsys)
    assert "no unfinished packing wrote" in said
    assert [path.name for path in out.iterdir()] == ["00000.tar"]

    # Nor are they mixed with those of a packing after one that was killed.
    (out / "00000.tar").rename(out / "holiday.tar")
    (out / "pack.unfinished").write_text("")
    said = error_line(data.main, ["pack", "--images", str(photos), "--out", str(out)], capsys)
    assert "no unfinished packing wrote" in said
    assert [path.name for path in out.iterdir()] == ["holiday.tar"]


# --- Shards ---------------------------------------------------------------------------------------

def test_shards_of_others_are_read_with_every_fault_counted(tmp_path):
    far = json.dumps({"caption": "sixth", "height": 10**30, "width": 5}).encode()
    make_tar(tmp_path / "a.tar", [
        ("one.jpg", encoded(photo(1), "JPEG")), ("one.txt", b"first"),
        ("two.png", encoded(photo(2))),
        ("three.txt", b"no picture"),
        ("../up.png", encoded(photo(3))),
        ("bad.png", b"zero"), ("bad.txt", b"fourth"),
        ("empty.png", b""), ("empty.json", b'{"caption": "e", "height": 64, "width": 64}'),
        ("sub/one.png", encoded(photo(4))), ("sub/one.json", b'{"caption": "fifth"}'),
        ("far.png", encoded(photo(5))), ("far.json", far)])
    shards = data.Shards(tmp_path / "*.tar", SIZES)
    assert len(shards.rows) == 3
    assert shards.faults == Counter(
        {"no caption": 1, "no picture": 1, "hostile path in a tar": 1, "broken picture": 2})

    pixels, captions, faults, _ = one_batch(shards, [0, 1, 2])
    assert pixels.shape == (3, 64, 64, 3)
    assert captions == ["first", "fifth", "sixth"]
    assert not faults

    again = data.Shards(tmp_path / "*.tar", SIZES)                # from the index beside it
    assert list(tmp_path.glob("*.index.json"))
    assert again.digest == shards.digest
    assert again.faults == shards.faults


def test_crop_and_caption_are_a_function_of_seed_epoch_and_sample(tmp_path):
    captions = json.dumps({"captions": [f"caption {k}" for k in range(50)]}).encode()
    members = []
    for i in range(4):
        members += [(f"{i}.png", encoded(photo(i, 90, 64))), (f"{i}.json", captions)]
    make_tar(tmp_path / "a.tar", members)

    shards, same = (data.Shards(tmp_path / "a.tar", [(64, 64)], seed=1) for _ in range(2))
    other = data.Shards(tmp_path / "a.tar", [(64, 64)], seed=2)
    first = one_batch(shards, [0, 1, 2, 3])
    alone = one_batch(same, [2])
    assert (first.pixels[2] == alone.pixels[0]).all()
    assert first.captions[2] == alone.captions[0]
    for reading in (one_batch(shards, [0, 1, 2, 3], epoch=1), one_batch(other, [0, 1, 2, 3])):
        assert (reading.pixels != first.pixels).any()
        assert reading.captions != first.captions


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_change_nothing(tmp_path, workers):
    shards = data.Shards(make_shards(tmp_path, 24), SIZES, seed=1)
    planned = data.plan(shards.buckets, shards.lengths, FOUR_A_BATCH, seed=1, epoch=5)

    def load(planned):
        return DataLoader(shards, batch_size=None, sampler=planned, num_workers=workers)

    for (pixels, captions, faults, _), batch in zip(load(planned), planned, strict=True):
        expected = shards[batch]
        assert (np.asarray(pixels) == expected.pixels).all()
        assert list(captions) == expected.captions
        assert not faults

    # A resume is a slice of the plan.
    resumed = next(iter(load(planned[3:])))
    assert (np.asarray(resumed.pixels) == shards[planned[3]].pixels).all()


def test_a_bad_sample_is_replaced_from_its_bucket_and_named(tmp_path):
    pattern = make_shards(tmp_path, 16)
    shards = data.Shards(pattern, SIZES)
    members = np.flatnonzero(shards.buckets == shards.buckets[0])
    spoil(shards, members[0])
    pixels, captions, faults, _ = one_batch(shards, members[:2])
    assert len(pixels) == 2
    assert (pixels[0] == pixels[1]).all()
    assert captions[0] == captions[1]
    assert len(faults) == 1
    assert f"sample {members[0]}: broken picture" in faults[0]

    spoil(shards, members[-1])                                    # the first follows the last
    assert one_batch(shards, members[-1:]).captions == captions[1:]

    for i in members:
        spoil(shards, i)
    with pytest.raises(LensError, match="20 samples in a row"):
        one_batch(shards, members[:1])
    assert data.Shards(pattern, SIZES).digest == shards.digest    # it covers where things are


def test_a_worker_does_not_grow(tmp_path):
    """In a process of its own: its memory after eight epochs is that after three."""
    pattern = make_shards(tmp_path, 40)
    code = f"""
import gc
import sys
sys.path.insert(0, {str(ROOT)!r})
import data

def memory():
    gc.collect()
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1])

shards = data.Shards({pattern!r}, {SIZES!r})
sizes = []
for epoch in range(8):
    for batch in data.plan(shards.buckets, shards.lengths, {FOUR_A_BATCH!r}, 0, epoch):
        shards[batch]
    sizes.append(memory())
print(sizes[2], sizes[7])
"""
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    first, last = map(int, printed.stdout.split())
    assert last < 1.01 * first, (first, last)


# --- Sources --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def vae():
    return load_pipeline(TOY, "cpu", torch.float32, parts=("vae",))[1]


def shard_source(pattern, vae, workers=0, vae_hash=None):
    return data.ShardSource(pattern, SIZES, 3, vae, FixedEncoder(), "cpu", workers, vae_hash,
                            say=lambda message: None)


def test_shards_are_a_source_of_batches(tmp_path, vae):
    source = shard_source(make_shards(tmp_path, 12), vae)
    planned = data.plan(source.buckets, source.lengths(0), FOUR_A_BATCH, seed=3, epoch=2)
    batches = list(source.stream(planned))
    assert [batch.samples.tolist() for batch in batches] == [p.samples.tolist() for p in planned]
    for batch, (bucket, samples, epoch) in zip(batches, planned, strict=True):
        height, width = source.sizes[bucket]
        assert batch.epoch == epoch == 2
        assert batch.grid == (height // 16, width // 16)
        assert batch.tokens.shape == (len(samples), height * width // 256, 32)
        assert batch.tokens.dtype == batch.text[0].dtype == torch.float32
        assert batch.mask.dtype == torch.bool
        assert batch.mask.shape == batch.text[0].shape[:2]
        assert batch.mask.sum(1).tolist() == batch.text[0][:, 0, 0].tolist()
        assert list(batch.faults) == []

    for i, picture in enumerate(source.shards[planned[0]].pixels):     # each by itself
        with torch.no_grad():
            mean, _ = vae.encode(from_pil([Image.fromarray(picture)]))
        expected = vae.to_tokens(mean)[0].bfloat16().float()
        assert torch.equal(batches[0].tokens[i], expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_is_one_line(tmp_path, vae, workers):
    source = shard_source(make_shards(tmp_path, 4), vae, workers)
    for i in range(4):
        spoil(source.shards, i)
    planned = data.plan(source.buckets, source.lengths(0), FOUR_A_BATCH, seed=3, epoch=0)
    with pytest.raises(LensError, match="^20 samples in a row cannot be read; the last: ") as error:
        list(source.stream(planned))
    assert "\n" not in str(error.value)
    assert multiprocessing.active_children() == []    # though the error keeps its traceback


def test_a_source_names_what_it_replaced(tmp_path, vae):
    source = shard_source(make_shards(tmp_path, 16), vae, workers=1)
    spoil(source.shards, 3)
    planned = data.plan(source.buckets, source.lengths(0), FOUR_A_BATCH, seed=3, epoch=0)
    faults = [fault for batch in source.stream(planned) for fault in batch.faults]
    assert faults == ["00000.tar, sample 3: broken picture"]


LINES = "a red circle\n\na blue circle on the left\na ring\n"
JSON_LINES = """
{"prompt": "a red circle"}
{"prompt": "a blue circle on the left", "tag": 1}
{"prompt": "a ring"}
"""


@pytest.mark.parametrize("name, content", [("a.txt", LINES), ("a.jsonl", JSON_LINES)])
def test_captions_alone_are_a_source(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    source = data.CaptionSource(tmp_path / name, [(64, 64), (64, 96)], FixedEncoder())
    assert source.lengths(0).tolist() == [3, 6, 2]
    assert source.buckets.tolist() == [0, 1, 0]                   # sizes take turns

    planned = data.plan(source.buckets, source.lengths(0), {0: 2, 1: 2}, seed=0, epoch=0)
    batches = {batch.grid: batch for batch in source.stream(planned)}
    assert batches[4, 4].mask.sum(1).tolist() == [2, 3]
    assert batches[4, 6].mask.sum(1).tolist() == [6]
    assert batches[4, 4].tokens is None

    other = tmp_path / "other.txt"
    other.write_text("a green circle")
    assert data.CaptionSource(other, SIZES, FixedEncoder()).digest != source.digest


# --- Latents --------------------------------------------------------------------------------------

def test_latents_are_kept_while_fresh_and_refused_when_stale(tmp_path, vae, capsys):
    pattern = make_shards(tmp_path, 12)
    latents = tmp_path / "latents"
    command = cache_command(pattern, latents)
    data.main(command)
    assert "1 tars were encoded now, 0 were there already" in capsys.readouterr().out
    data.main(command)
    assert "0 tars were encoded now, 1 were there already" in capsys.readouterr().out

    plain = data.Shards(pattern, SIZES)
    cached = data.Shards(latents / "*.tar", SIZES, vae_hash=vae_identity(TOY))
    assert len(cached.rows) == 12
    assert sorted(cached.buckets) == sorted(plain.buckets)
    bits, captions, _, _ = one_batch(cached, [0])

    # The same picture, encoded here. Not to the bit: bf16, and a batch changes the order of sums.
    i = next(i for i in range(12) if words_of(plain.parts(i))[0] == captions)
    picture = read(plain.parts(i)["picture"])
    image = read_picture(picture, plain.sizes[plain.buckets[i]])
    with torch.no_grad():
        expected = vae.to_tokens(vae.encode(from_pil([image]))[0])
    found = torch.from_numpy(bits).view(torch.bfloat16).view(expected.shape).float()
    assert torch.allclose(found, expected, rtol=0.01, atol=0.01)

    source = shard_source(latents / "*.tar", vae, vae_hash=vae_identity(TOY))
    batch = next(source.stream([data.PlannedBatch(source.buckets[0], np.array([0]), 0)]))
    assert torch.equal(batch.tokens, found)

    stale = data.Shards(latents / "*.tar", SIZES, vae_hash="another")
    with pytest.raises(LensError, match="data.py cache"):
        one_batch(stale, [0])

    # The pictures changed: the latents are made again.
    tar = Path(plain.paths[0])
    tar.write_bytes(tar.read_bytes() + b"\0" * 512)
    data.main(command)
    assert "1 tars were encoded now, 0 were there already" in capsys.readouterr().out


def cache_command(pattern, out):
    return ["cache", "--data", str(pattern), "--bases", "64,96,128", "--weights", str(TOY),
            "--out", str(out)]


def test_caching_counts_and_names_what_it_cannot_read(tmp_path, capsys):
    pattern = make_shards(tmp_path, 6)
    spoil(data.Shards(pattern, SIZES), 3)
    data.main(cache_command(pattern, tmp_path / "latents"))
    said = capsys.readouterr()
    assert "1 pictures were left out" in said.out
    assert "left out: 00000.tar, sample 3: broken picture" in said.err
    assert len(data.Shards(tmp_path / "latents" / "*.tar", SIZES).rows) == 5


def test_latents_are_not_cached_again(tmp_path, capsys):
    data.main(cache_command(make_shards(tmp_path, 4), tmp_path / "latents"))
    capsys.readouterr()
    command = cache_command(tmp_path / "latents" / "*.tar", tmp_path / "again")
    assert "00000.tar holds latents already" in error_line(data.main, command, capsys)
    assert not list((tmp_path / "again").glob("*.tar*"))


def test_caching_never_writes_over_the_pictures(tmp_path, capsys):
    pattern = make_shards(tmp_path, 4)
    (tar,) = Path(pattern).parent.glob("*.tar")
    before = tar.read_bytes()
    command = cache_command(pattern, Path(pattern).parent)
    assert "there the pictures are" in error_line(data.main, command, capsys)
    assert tar.read_bytes() == before


def test_statistics_are_shown_of_pictures_and_of_latents(tmp_path, capsys):
    pattern = make_shards(tmp_path, 8)
    data.main(cache_command(pattern, tmp_path / "latents"))
    capsys.readouterr()
    for shards in (pattern, str(tmp_path / "latents" / "*.tar")):
        sheet = tmp_path / "sheet.png"
        data.main(["stats", "--data", shards, "--bases", "64,96,128", "--out", str(sheet)])
        said = capsys.readouterr().out
        assert "8 samples in 1 shards" in said
        assert "words a caption" in said
        assert "samples/s" in said
        # Who has pictures, not latents, can train an autoencoder of his own.
        assert ("nothing: python -m toy.autoencoder" in said) == (shards == pattern)
        assert Image.open(sheet).width > 128
        sheet.unlink()


# --- Command line ---------------------------------------------------------------------------------

@pytest.mark.parametrize("command, said", [
    (["pack"], "needs --images"),
    (["pack", "--images", "/nowhere"], "no pictures there"),
    (["pack", "--images", ".", "--limit", "beauty=3"], "the limits are"),
    (["pack", "--images", ".", "--limit", "blur=much"], "--limit"),
    (["pack", "--images", ".", "--classifier", "nsfw"], "NAME=MODEL:LABEL"),
    (["pack", "--images", ".", "--classifier", "beauty=model:pretty"], "one of nsfw, aesthetic"),
    (["stats"], "needs --data"),
    (["stats", "--data", "/nowhere/*.tar"], "no file matches"),
    (["stats", "--data", "/nowhere/*.tar", "--bases", "big"], "--bases"),
    (["cache"], "needs --data"),
    (["world"], "invalid choice"),
    (["pack", "--data", "photos"], "pack reads a folder of pictures: --images DIR, not --data"),
    (["stats", "--images", "photos"], "stats reads shards: --data 'shards/*.tar', not --images"),
    (["--images", "photos"], "which command? python data.py pack --images photos"),
    (["--data", "s/*.tar"], "which command? python data.py stats --data 's/*.tar'"),
])
def test_mistakes_are_one_line(command, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in error_line(data.main, command, capsys)
    assert not list(tmp_path.rglob("*.tar"))


def test_without_a_command_help_is_printed(capsys):
    data.main([])
    said = capsys.readouterr().out
    for part in ("pack", "stats", "cache", "--images", "python data.py pack", "duplicate > 0.985"):
        assert part in said
