"""A folder as people have it: what is read comes out right, and what is not read is counted."""
import json
import os
import re
import shlex
import unicodedata

import numpy as np
import pytest
from conftest import error_line
from PIL import Image, ImageDraw
from shards import LOOSE, SIZES, FixedEncoder, encoded, make_tar, photo

import data
import train
from kit.checkpoint import load_vae
from kit.files import LensError, read_json, read_json_lines, read_prompts, read_text
from kit.images import ENDINGS
from kit.pack import near_duplicates
from kit.places import vae_identity
from kit.rubrics import read_rows
from kit.tars import find_files, words_of

NFD = unicodedata.normalize("NFD", "café über")
NFC = unicodedata.normalize("NFC", NFD)
assert NFC != NFD


def pack(images, out, *more):
    """-> pack.json."""
    data.main(["pack", "--images", str(images), "--out", str(out), *LOOSE,
               "--limit", "duplicate=1.1", *more])
    return json.loads((out / "pack.json").read_text())


def packed_captions(out):
    """{where a picture came from: its captions}"""
    shards = data.Shards(out, SIZES)
    words = [words_of(shards.parts(i)) for i in range(len(shards.rows))]
    return {notes["source"]: captions for captions, notes in words}


def adds_up(report):
    """Whether the table goes down to the pictures that were written, without a gap."""
    counts = [count for _, count in report["table"]]
    return counts == sorted(counts, reverse=True)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    return folder


# --- Text -----------------------------------------------------------------------------------------

def test_captions_are_read_as_editors_write_them(folder, tmp_path):
    texts = {
        "mark.txt": "a cat".encode("utf-8-sig"),
        "little.txt": "a cat".encode("utf-16"),                   # as Notepad's "Unicode"
        "big.txt": b"\xfe\xff" + "a cat".encode("utf-16-be"),
        "lines.txt": b"a\r\ncat\r",
        "kohya.caption": b"a cat",
        "loud.TXT": b"a cat",
        "mark.json.json": json.dumps({"caption": "a cat"}).encode("utf-8-sig"),
        "wide.json": json.dumps({"caption": "a cat"}).encode("utf-16"),
        "object.json": b'{"caption": {"short": "a cat", "long": "a cat", "none": null}}',
    }
    for i, (name, blob) in enumerate(texts.items()):
        (folder / name).write_bytes(blob)
        photo(i).save(folder / (name.rpartition(".")[0] + ".png"))
    photo(99).save(folder / "nul.png")
    (folder / "nul.txt").write_bytes("a cat".encode("utf-16-le"))  # without its mark: no guess

    report = pack(folder, tmp_path / "out")
    assert report["faults"] == {"caption is not UTF-8": 1}
    captions = packed_captions(tmp_path / "out")
    assert captions.pop("object") == ["a cat", "a cat"]
    assert len(captions) == len(texts) - 1
    assert set(map(tuple, captions.values())) == {("a cat",)}


def test_names_and_captions_are_compared_and_stored_in_one_form(folder, tmp_path):
    photo(1).save(folder / f"{NFC}.png")
    (folder / f"{NFD}.txt").write_text(NFD)
    photo(2).save(folder / f"{NFD} 2.png")
    (folder / "rows.jsonl").write_text(json.dumps({"file_name": f"{NFC} 2.png", "text": NFD}))
    report = pack(folder, tmp_path / "out")
    assert report["faults"] == {}
    assert packed_captions(tmp_path / "out") == {NFC: [NFC], f"{NFC} 2": [NFC]}


SEPARATED = "a cat\u2028on a mat"                 # a line separator, as web pages hold it


def test_json_lines_end_at_line_feeds_alone(folder, tmp_path):
    rows = [{"file_name": "0.png", "caption": SEPARATED}, {"file_name": "1.png", "caption": "b"}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "rows.jsonl").write_bytes(lines.encode("utf-8-sig"))
    for i in range(2):
        photo(i).save(folder / f"{i}.png")
    assert pack(folder, tmp_path / "out")["faults"] == {}
    assert packed_captions(tmp_path / "out") == {"0": ["a cat on a mat"], "1": ["b"]}


def test_files_of_prompts_are_read_so_too(tmp_path):
    row = {"prompt": SEPARATED, "rubrics": [{"name": "cat", "check": "a cat"}]}
    text = json.dumps(row, ensure_ascii=False) + "\n" + json.dumps({**row, "prompt": NFD})
    for encoding in ("utf-8-sig", "utf-16"):
        path = tmp_path / "prompts.jsonl"
        path.write_bytes(text.encode(encoding))
        assert read_prompts(path)[0] == [SEPARATED, NFC]
        assert [row["prompt"] for row in read_rows(path, [(64, 64)])] == [SEPARATED, NFC]

        plain = tmp_path / "prompts.txt"
        plain.write_bytes(f"one\r\n{NFD}\n".encode(encoding))
        assert read_prompts(plain)[0] == ["one", NFC]
        assert read_text(plain) == f"one\n{NFD}\n"

        (tmp_path / "a.json").write_bytes(json.dumps({"a": "é"}).encode(encoding))
        assert read_json(tmp_path / "a.json") == {"a": "é"}


def test_a_quoted_tilde_is_the_home(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    photo(1).save(folder / "a.png")
    (folder / "a.txt").write_text("words")
    data.main(["pack", "--images", f"~/{folder.name}", "--out", "~/made", *LOOSE])
    assert (tmp_path / "made" / "00000.tar").exists()
    assert f"{tmp_path / 'made'}: 1 pictures in 1 tars" in capsys.readouterr().out


@pytest.mark.parametrize("name, content, said", [
    ("p.txt", "\n \n", "no prompts in the file"),
    ("p.jsonl", "", "no prompts in the file"),
    ("p.jsonl", '{"prompt": "a star"}\n\n{"text": "a cat"}', "line 3 must look like"),
    ("p.jsonl", '{"prompt": " "}', 'line 1 must look like {"prompt": "a red circle"}'),
    ("p.jsonl", '{"prompt": "a star"}\n{torn', "line 2 must look like"),
    ("p.json", '["a star", "a ring"]', "line 1 must look like"),
    ("p.json", '{"prompt": 5}', "line 1 must look like"),
])
def test_of_a_file_of_prompts_the_line_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(LensError) as error:
        read_prompts(tmp_path / name)
    assert said in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_a_log_of_our_own_outlives_a_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "x": "\xc3\n\0\0\0\n{"step": 3}\n{"st')
    assert read_json_lines(path) == [{"step": 1}, {"step": 3}]


# --- Folders --------------------------------------------------------------------------------------

def test_endings_that_are_read_and_those_that_are_counted(folder, tmp_path, capsys):
    photo(0).save(folder / "camera.JFIF", "JPEG")
    photo(1).save(folder / "old.tga")
    read = 2
    if ".avif" in ENDINGS:                         # where Pillow was built with it
        photo(2).save(folder / "new.avif")
        read += 1
    for name in ("a.heic", "b.HEIC", "clip.mov", "Thumbs.db", "README"):
        (folder / name).write_bytes(b"something")
    for path in list(folder.iterdir())[:]:
        if path.suffix.lower() in ENDINGS:
            path.with_suffix(".caption").write_text("words")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")

    report = pack(folder, tmp_path / "out")
    assert report["skipped"] == {".heic": 2, ".mov": 1, ".db": 1, "no ending": 1,
                                 "no file, or a link to none": 1}
    assert report["table"][0][1] == 2 * read + 6
    assert report["table"][-1][1] == read
    assert adds_up(report)
    said = capsys.readouterr().out
    assert re.search(r"\.heic +2\n", said)
    assert re.search(r"skipped for their ending +6 ", said)


def test_links_to_folders_are_followed_and_circles_end(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for i, place in enumerate((folder, elsewhere)):
        photo(i).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"picture {i}")
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    (folder / "self").symlink_to(folder)
    report = pack(folder, tmp_path / "out")
    assert packed_captions(tmp_path / "out") == {"0": ["picture 0"], "linked/1": ["picture 1"]}
    assert report["table"][0][1] == 4


def test_two_files_of_a_name_and_rows_without_a_picture_are_counted(folder, tmp_path):
    photo(1).save(folder / "a.png")
    photo(2).save(folder / "a.jpg")
    (folder / "a.txt").write_text("one")
    (folder / "a.caption").write_text("two")
    (folder / "alone.txt").write_text("no picture")
    (folder / "rows.jsonl").write_text('{"file_name": "b.png", "text": "gone"}')
    report = pack(folder, tmp_path / "out")
    assert report["faults"] == {"duplicate key": 2, "no picture": 1,
                                "JSON line without its picture": 1}
    assert [tuple(row) for row in report["table"][:3]] == [
        ("files, those in tars too", 6), ("captions and notes", 2),
        ("second picture of a name", 1)]


# --- Tars -----------------------------------------------------------------------------------------

def test_a_tar_of_photographs_is_packed_as_a_folder_would_be(folder, tmp_path):
    members = []
    for i in range(3):
        members += [(f"trip/img.00{i}.jpg", encoded(photo(i), "JPEG")),
                    (f"trip/img.00{i}.txt", f"picture {i}".encode())]
    rows = b'{"file_name": "rows.v1.png", "text": "of a row"}'
    members += [("metadata.jsonl", rows), ("rows.v1.png", encoded(photo(9))), ("inner.tar", b"")]
    make_tar(folder / "holiday.tar", members)
    report = pack(folder, tmp_path / "out")
    assert packed_captions(tmp_path / "out") == {
        "holiday/trip/img.000": ["picture 0"], "holiday/trip/img.001": ["picture 1"],
        "holiday/trip/img.002": ["picture 2"], "holiday/rows.v1": ["of a row"]}
    assert report["skipped"] == {".tar": 1}
    assert report["table"][0][1] == len(members) + 1


def test_the_bucket_is_that_of_the_picture_not_of_the_note(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                               # held upright, stored on its side
    blob = encoded(photo(1, 128, 64), "JPEG", exif=exif)
    notes = {"caption": "tall", "width": 128, "height": 64}
    larger = {"caption": "wide", "width": 2000, "height": 2000}
    make_tar(tmp_path / "a.tar", [
        ("0.jpg", blob), ("0.json", json.dumps(notes).encode()),
        ("1.png", encoded(photo(2, 128, 64))), ("1.json", json.dumps(larger).encode())])
    for _ in range(2):                             # the second time from the index
        shards = data.Shards(tmp_path / "a.tar", SIZES)
        assert [(row["height"], row["width"]) for row in shards.rows] == [(128, 64), (64, 128)]
        assert [shards.sizes[b] for b in shards.buckets] == [(128, 64), (64, 128)]


def test_an_index_of_older_rules_is_made_again(tmp_path):
    make_tar(tmp_path / "a.tar", [("0.png", encoded(photo(1))), ("0.caption", b"of kohya")])
    shards = data.Shards(tmp_path / "a.tar", SIZES)
    kept = tmp_path / "a.tar.index.json"
    stored = json.loads(kept.read_text())
    assert len(stored["rows"]) == 1
    kept.write_text(json.dumps({**stored, "state": stored["state"][1:], "rows": []}))
    assert len(data.Shards(tmp_path / "a.tar", SIZES).rows) == 1
    assert shards.sample(0, (64, 64), 0)[1] == "of kohya"


def test_what_data_names(tmp_path, monkeypatch):
    places = ["a/0.tar", "a/b/1.tar", "a/b/c/2.tar", "a/odd [1].tar"]
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        make_tar(tmp_path / place, [("0.png", encoded(photo(1))), ("0.txt", b"words")])
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")      # a circle
    (tmp_path / "photos").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def named(pattern):
        return [os.path.relpath(path, tmp_path) for path in find_files(pattern)]

    assert named("a/**/*.tar") == named("~/**/*.tar") == places
    assert named("~/a/*.tar") == named("a") == ["a/0.tar", "a/odd [1].tar"]
    assert named("a/odd [1].tar") == ["a/odd [1].tar"]
    assert named("none/*.tar") == []
    with pytest.raises(LensError, match="data.py pack --images photos"):
        find_files("photos")
    assert len(data.Shards("~/**/*.tar", SIZES).rows) == 4


def test_old_tars_are_not_mixed_in(tmp_path, capsys):
    for name in ("a.tar", "b.tar"):
        make_tar(tmp_path / name, [("0.png", encoded(photo(1))), ("0.txt", b"words")])

    def cache(pattern):
        return ["cache", "--data", str(tmp_path / pattern), "--bases", "64",
                "--out", str(tmp_path / "latents")]

    data.main(cache("*.tar"))
    said = error_line(data.main, cache("b.tar"), capsys)
    assert "holds a.tar, not among --data" in said
    (tmp_path / "latents" / "a.tar").unlink()
    data.main(cache("b.tar"))
    assert "0 tars were encoded now, 1 were there already" in capsys.readouterr().out


# --- What the filters took ------------------------------------------------------------------------

def draw_emoji(folder, count=12):
    """Flat drawings on white: what the limits for photographs take."""
    for i in range(count):
        image = Image.new("RGB", (400, 400), "white")
        box = (10 + 20 * i, 40, 110 + 20 * i, 140 + 10 * i)
        ImageDraw.Draw(image).ellipse(box, fill=(255, 20 * i, 0))
        image.save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"emoji {i}")


def test_where_nothing_is_left_it_says_why_and_a_retry_works(folder, tmp_path, capsys):
    draw_emoji(folder)
    out = tmp_path / "out"
    command = ["pack", "--images", str(folder), "--out", str(out)]
    said = error_line(data.main, command, capsys)
    assert "no picture is left: 'entropy < 3' takes 12 of 12 pictures, which score 0.2" in said
    assert "'bright > 0.97' takes 12 of 12 pictures" in said
    assert not out.exists()

    for limit in re.findall(r"--limit \S+=\S+", said):           # as the message says
        command += limit.split()
    data.main(command)
    assert len(data.Shards(out, SIZES).rows) == 12


def test_nothing_left_keeps_what_the_user_has_in_the_folder(folder, tmp_path, capsys):
    photo(1).save(folder / "a.png")
    out = tmp_path / "out"
    out.mkdir()
    (out / "captions.jsonl").write_text("")
    said = error_line(data.main, ["pack", "--images", str(folder), "--out", str(out), *LOOSE],
                      capsys)
    assert "1 of 1 pictures have no caption of 1 words" in said
    assert [path.name for path in out.iterdir()] == ["captions.jsonl"]


def test_near_duplicates_are_named_in_pairs(folder, tmp_path, capsys):
    for i in range(3):
        for copy in range(3):
            photo(i).save(folder / f"{i}{copy}.png")
            (folder / f"{i}{copy}.txt").write_text("words")
    report = pack(folder, tmp_path / "out", "--limit", "duplicate=0.985")
    assert report["duplicates"] == [[f"{i}{copy}", f"{i}0"] for i in range(3) for copy in (1, 2)]
    said = capsys.readouterr().out
    assert "near duplicates, 5 of 6 pairs:\n    01 is like 00\n" in said
    assert "note: 'duplicate > 0.985' takes 6 of 9 pictures; --limit duplicate=1.1 keeps" in said


def test_near_duplicates_are_those_of_plain_loops():
    vectors = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = []
    for i in range(40):
        close = [j for j in range(i) if vectors[i] @ vectors[j] > 0.95]
        expected.append(close[0] if close else -1)
    assert -1 in expected and max(expected) > 8
    for chunk in (7, 64):
        assert near_duplicates(list(vectors), 0.95, chunk).tolist() == expected


@pytest.mark.parametrize("name, said", [
    ("a.heic", r"no pictures there \(skipped for their ending: 1 .heic\)"),
    ("a.txt", "no pictures there$"),
])
def test_a_folder_without_pictures_says_what_is_there(folder, tmp_path, capsys, name, said):
    (folder / name).write_text("something")
    command = ["pack", "--images", str(folder), "--out", str(tmp_path / "out")]
    assert re.search(said, error_line(data.main, command, capsys))
    assert not (tmp_path / "out").exists()
    file = ["pack", "--images", str(folder / name), "--out", str(tmp_path / "out")]
    assert "a file; give the folder" in error_line(data.main, file, capsys)


def test_every_command_ends_with_what_it_wrote_and_what_comes_next(folder, tmp_path, capsys):
    photo(1).save(folder / "a.png")
    (folder / "a.txt").write_text("words")
    shards, sheet, latents = tmp_path / "shards", tmp_path / "sheet.png", tmp_path / "latents"
    pack(folder, shards)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.endswith("left")] == [["taken", "left"]]
    assert lines[-2].startswith(f"{shards}: 1 pictures in 1 tars")
    assert lines[-1] == f"next: python data.py stats --data '{shards}/*.tar'"

    of_toy = ["--data", f"{shards}/*.tar", "--bases", "64"]
    data.main(["stats", *of_toy, "--out", str(sheet)])
    *_, wrote, following, from_nothing = capsys.readouterr().out.splitlines()
    assert wrote.startswith(f"{sheet}: 1 of the pictures")
    assert f": python train.py --data '{shards}/*.tar' --size toy --stage 2" in following
    assert "python -m toy.autoencoder" in from_nothing

    data.main(["cache", *of_toy[:2], "--out", str(latents)])
    *_, wrote, following = capsys.readouterr().out.splitlines()
    size = data.in_bytes(sum(tar.stat().st_size for tar in latents.glob("*.tar")))
    assert wrote == (f"{latents}: latents of 1 pictures in 1 tars, {size}; 1 tars were encoded "
                     "now, 0 were there already; 0 pictures were left out")
    assert following.startswith(f"next: python train.py --data '{latents}/*.tar' --size toy ")

    # What it says next is true: training takes these latents as they are.
    args = train.arguments(shlex.split(following)[3:])
    stage = train.stage_of(args.size, int(args.stage))
    source = data.ShardSource(args.data, stage.sizes(), 0, load_vae(args.parts), FixedEncoder(),
                              "cpu", 0, vae_identity(args.parts))
    planned = data.plan(source.buckets, source.lengths(0), dict.fromkeys(range(27), 1), 0, 0)
    assert len(next(source.stream(planned)).samples) == 1

    # Another stage has other sizes: it says with which --bases they are made.
    first = train.stage_of("toy", 1)
    for sizes in (first.sizes(), data.bases_option("32,48")):
        other = data.Shards(args.data, sizes, vae_hash=vae_identity(args.parts))
        with pytest.raises(LensError, match="holds latents of other sizes") as error:
            other[data.PlannedBatch(other.buckets[0], np.array([0]), 0)]
        bases = str(error.value).split("--bases ")[1]
        assert set(data.bases_option(bases)) == set(sizes)
