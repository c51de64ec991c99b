"""What people type: options that are none, words without quotation marks, numbers that are none;
and what they are told then."""
import argparse
import os
import shutil
import signal
import time

import pytest
import torch
from conftest import error_line

import data
import distill
import rl
import sample
import toy.autoencoder
import toy.language
import train
from kit.files import quoted, read_json, require, write_safetensors, write_text
from tools import strip

LONG_DASH = "\u2013"


@pytest.mark.parametrize("main, typed, said", [
    (sample.main, "--promt|a red circle", "no option --promt; did you mean --prompt?"),
    (sample.main, "--promt=a star", "no option --promt; did you mean --prompt?"),
    (sample.main, "-prompt|a star", "no option -prompt; did you mean --prompt?"),
    (sample.main, f"{LONG_DASH}prompt|a star", "did you mean --prompt?"),
    (sample.main, "--prom|a star", "no option --prom; did you mean --prompt?"),
    (sample.main, "--xyz", "no option --xyz; --help lists the options"),
    (data.main, "--dta|shards", "no option --dta; did you mean --data?"),
    (train.main, "--step|5", "no option --step; did you mean --steps?"),
    # Without the option, and without the quotation marks.
    (sample.main, "a red circle", 'did you mean: python sample.py --prompt "a red circle"'),
    (sample.main, "--steps|4|a|star", 'did you mean: python sample.py --prompt "a star"'),
    (sample.main, "--seed|1|2", "2 belongs to no option; --help lists them"),
    (sample.main, "--eval|a star", 'did you mean: python sample.py --prompt "a star"'),
    (sample.main, "--prompt|a|red|circle|--steps|4", '--prompt "a red circle"'),
    (sample.main, "--prompt|a star|--prompt|a|ring", '--prompt "a ring"'),
    (data.main, "stats|--data|s/0.tar|s/1.tar", "--data 's/*.tar'"),
    (train.main, "--data|s/0.tar|s/1.tar|s/2.tar", "--data 's/*.tar'"),
    # Numbers.
    (sample.main, "--steps|many", "--steps: must be a whole number, not 'many'"),
    (sample.main, "--guidance|strong", "--guidance: must be a number, not 'strong'"),
    (sample.main, "--guidance|nan", "--guidance: must be a number, not 'nan'"),
    (sample.main, "--lora-strength|inf", "--lora-strength: must be a number, not 'inf'"),
    (data.main, "pack|--limit|blur=x", "--limit: must be a number, not 'x'"),
    (data.main, "cache|--bases|64,x", "--bases: must be a whole number, not 'x'"),
])
def test_what_is_typed_wrong_is_answered_with_what_was_meant(main, typed, said, capsys):
    assert said in error_line(main, typed.split("|"), capsys)


@pytest.mark.parametrize("main, typed, said", [
    (sample.main, "--prompt|a|--image|{here}/foto.png",
     "--image {here}/foto.png: no such file or directory; did you mean {here}/photo.png?"),
    (sample.main, "--prompts-file|{here}/prompt.txt", "did you mean {here}/prompts.txt?"),
    (sample.main, "--prompt|a|--image|{here}", "cannot read --image {here}: is a directory"),
    (sample.main, "--prompt|a|--weights|{here}/toi", "did you mean {here}/toy?"),
    (data.main, "stats|--data|{here}/shard", "no file matches; did you mean {here}/shards?"),
    (data.main, "stats|--data|{here}/nothing/*.tar", "nothing/*.tar: no file matches"),
    (data.main, "stats|--data|{here}/shards",
     "`python data.py pack --images {here}/shards --out shards`"),
])
def test_a_path_that_is_typed_wrong_is_answered_with_its_neighbour(main, typed, said, tmp_path,
                                                                   capsys):
    for name in ("photo.png", "prompts.txt"):
        (tmp_path / name).touch()
    for name in ("toy", "shards"):
        (tmp_path / name).mkdir()
    words = typed.replace("{here}", str(tmp_path)).split("|")
    line = error_line(main, words, capsys)
    assert said.replace("{here}", str(tmp_path)) in line
    assert "Errno" not in line


@pytest.mark.parametrize("there, said", [
    ([], "expected {here}/transformer/*.safetensors; the toy's are made by `python train.py --out"),
    (["transformer"], "by `python -m toy.autoencoder --out '{here}'`"),
    (["transformer", "vae"], "by `python -m toy.language --out '{here}'`"),
])
def test_a_missing_part_is_answered_with_what_makes_it(there, said, tmp_path, capsys):
    here = tmp_path / "my toy"
    here.mkdir()
    for part in there:
        shutil.copytree(sample.TOY / part, here / part)
    line = error_line(sample.main, ["--weights", str(here), "--prompt", "a"], capsys)
    assert said.replace("{here}", str(here)) in line


def test_under_torchrun_rank_0_says_an_error_first(tmp_path, monkeypatch, capsys):
    """Another rank waits until torchrun has ended it; where that failed alone, it says so. For the
    last lines of torchrun itself the message is put into its file."""
    said, handler = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(time, "sleep", lambda seconds: said.append(capsys.readouterr().err))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    try:
        for rank, waits, line in (("0", 0, "error: no such data"),
                                  ("1", 1, "error: rank 1: no such data")):
            monkeypatch.setenv("RANK", rank)
            assert error_line(fails, [], capsys) == line
            assert said == waits * [""]
            notes = read_json(tmp_path / "error.json")
            assert notes["message"]["message"] == "no such data"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, handler)


def fails(argv):
    require(False, "no such data")


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_a_colleague_may_read_what_the_umask_lets_him(mask, mode, tmp_path):
    """safetensors' own writer lets nobody but the owner."""
    before = os.umask(mask)
    try:
        write_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == mode


def test_a_word_is_quoted_as_one_types_it():
    assert [quoted(word) for word in ("star", "a star", "it's", "", "$5", "*.tar")] == [
        "star", '"a star"', '"it\'s"', "''", "'$5'", "'*.tar'"]


COMMANDS = [sample, train, rl, distill, toy.autoencoder, toy.language, strip, data]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda module: module.__name__)
def test_a_quoted_tilde_is_the_home_folder(command, tmp_path, monkeypatch):
    """A folder of that name was made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = {}
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args",
                        keep_parsed(argparse.ArgumentParser.parse_args, seen))
    with pytest.raises(Parsed):
        command.main(["--out", "~/x"])
    assert seen["out"] == str(tmp_path / "x")


class Parsed(Exception):
    pass


def keep_parsed(parse, seen):
    """parse_args that keeps what it made of the words, and ends the command."""
    def parsed(parser, words=None, namespace=None):
        seen.update(vars(parse(parser, words, namespace)))
        raise Parsed

    return parsed
