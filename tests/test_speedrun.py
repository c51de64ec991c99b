"""tools/speedrun.sh, with a stand-in for python, and tools/summary.py, which ends it."""
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import sample
from kit.files import LensError
from kit.images import save_png
from tools import summary
from toy.language import TOY_SYSTEM

SCRIPT = ROOT / "tools" / "speedrun.sh"

# Writes down how it was called. On the first call that has $SLOW in it, it waits for a notice, and
# then ends well, as a training that has saved; one that has $BAD in it fails with status 3.
STAND_IN = """#!{python}
import os, signal, sys, time
words = " ".join(sys.argv[1:])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with open(os.environ["CALLS"], "a+") as file:
    file.seek(0)
    before = file.read()
    file.write(words + "\\n")
if os.environ["SLOW"] in words and os.environ["SLOW"] not in before:
    time.sleep(60)
if os.environ["BAD"] in words:
    sys.exit(3)
"""


class Speedrun:
    """tools/speedrun.sh whose commands are told and not run."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "an out"
        self.calls = folder / "calls"
        self.calls.touch()
        programs = folder / "programs"
        programs.mkdir()
        (programs / "python").write_text(STAND_IN.format(python=sys.executable))
        (programs / "python").chmod(0o755)

    def start(self, *words, slow="nothing", bad="nothing"):
        env = {**os.environ, "PATH": f"{self.folder / 'programs'}:{os.environ['PATH']}",
               "CALLS": str(self.calls), "SLOW": slow, "BAD": bad, "PYTHONNOUSERSITE": "1"}
        return subprocess.Popen(["bash", str(SCRIPT), *words, str(self.out)], env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, *words, **kinds):
        """-> (status, what it said, its errors, the stages' commands that it ran)"""
        before = len(self.commands())
        process = self.start(*words, **kinds)
        said, errors = process.communicate(timeout=30)
        return process.returncode, said, errors, self.commands()[before:]

    def commands(self):
        return self.calls.read_text().splitlines()

    def done(self):
        return {path.stem for path in (self.out / "stages").glob("*.done")}


@pytest.fixture
def speedrun(tmp_path):
    return Speedrun(tmp_path)


def printed(*words):
    """The commands of --dry-run, each as its words."""
    text = subprocess.run(["bash", str(SCRIPT), "--dry-run", *words], check=True, text=True,
                          capture_output=True).stdout
    return [shlex.split(line) for line in text.splitlines()]


# --- The commands ---------------------------------------------------------------------------------

def test_the_order_of_the_stages():
    """That each command is understood, test_house.py says."""
    scripts = [" ".join(command[1:3]) for command in printed() if command[1] != "sample.py"]
    assert scripts == ["-m toy.autoencoder", "-m toy.language", "train.py --stage",
                       "rl.py --eval-every", "rl.py --search", "distill.py --eval-every",
                       "tools/summary.py runs/speedrun"]


def test_each_command_finds_what_it_needs():
    """Folders that a command reads were written by one before it."""
    for words in ([], ["--long"]):
        written = set()
        for command in printed(*words, "an out"):
            flags = dict(zip(command, command[1:]))
            for name in ("--weights", "--lora", "--init", "--teacher"):
                assert flags.get(name) in {None, "3", *written}, command   # 3: a rank
            if "--system-prompt" in flags:
                assert flags["--system-prompt"] == "an out/search/best.txt"
                assert "an out/search" in written
            written |= {flags[name] for name in ("--out", "--export") if name in flags}


def test_nothing_is_made_by_a_dry_run(speedrun):
    status, _, _, commands = speedrun.run("--dry-run")
    assert (status, commands, speedrun.out.exists()) == (0, [], False)


@pytest.mark.parametrize("words, reason", [
    (["--size", "big"], "toy or nano"), (["--size"], "toy or nano"), (["--fast"], "--help")])
def test_a_wrong_word_is_one_line(words, reason):
    ended = subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert reason in line


# --- Stopped, failed, resumed ---------------------------------------------------------------------

def test_a_stage_that_was_stopped_is_not_done_and_goes_on(speedrun):
    process = speedrun.start(slow="rl.py --eval-every")
    deadline = time.monotonic() + 20
    while not any("rl.py --eval-every" in call for call in speedrun.commands()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)                                # until the stand-in waits
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    assert errors.splitlines() == ["stopped; the same command goes on"]
    before = {"autoencoder", "text-encoder", "denoiser", "score-denoiser", "score-plain"}
    assert speedrun.done() == before

    status, said, _, commands = speedrun.run(slow="rl.py --eval-every")
    assert status == 0
    assert commands[0].startswith("rl.py --eval-every")
    assert [command.split()[0] for command in commands] == [
        "rl.py", "sample.py", "rl.py", "sample.py", "sample.py", "distill.py", "sample.py",
        "tools/summary.py"]
    assert said.count("done before") == len(before)
    lines = (speedrun.out / "stages" / "seconds.txt").read_text().splitlines()
    assert sum(line.startswith("rl ") for line in lines) == 2

    status, said, _, commands = speedrun.run()     # all of it is there
    assert (status, len(commands)) == (0, 1)
    assert commands[0].startswith("tools/summary.py")

    status, _, errors, commands = speedrun.run("--long")
    assert (status, commands) == (2, [])
    assert "holds another speedrun: autoencoder" in errors


def test_a_stage_that_fails_ends_it_with_its_status(speedrun):
    status, _, errors, commands = speedrun.run("--size", "nano", bad="toy.language")
    assert (status, len(commands)) == (3, 2)
    assert errors == "stage text-encoder failed, with status 3\n"
    assert speedrun.done() == {"autoencoder"}
    status, _, _, commands = speedrun.run("--size", "nano")
    assert status == 0
    assert commands[0].startswith("-m toy.language")


# --- The table and the strip ----------------------------------------------------------------------

def write_scores(out, folder, name="eval.png", **scores):
    save_png(Image.new("RGB", (8, 8)), out / "scores" / folder / name,
             {"score": json.dumps(scores)})


def test_the_table_of_made_up_numbers(tmp_path):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "seconds.txt").write_text(
        "autoencoder 600\nautoencoder 906\ndenoiser 60\nscore-denoiser 30\nrl 6\nsummary 90\n")
    for k, (_, _, folder) in enumerate(summary.TABLE):
        if folder:
            write_scores(tmp_path, folder, overall=k / 10, fidelity=0.204, outline=0.9)
    text = summary.table(tmp_path)
    assert text.splitlines()[2:] == [
        "| autoencoder | 25.1 | - | - | - |",
        "| text encoder | 0.0 | - | - | - |",
        "| denoiser | 1.0 | 0.20 | 0.20 | 0.90 |",
        "| denoiser, guidance 1 | - | 0.30 | 0.20 | 0.90 |",
        "| reward RL, guidance 1 | 0.1 | 0.40 | 0.20 | 0.90 |",
        "| brief requests, as asked | - | 0.50 | 0.20 | 0.90 |",
        "| brief requests, rewritten | 0.0 | 0.60 | 0.20 | 0.90 |",
        "| four steps, guidance 1 | 0.0 | 0.70 | 0.20 | 0.90 |",
        "| evaluations and the rest | 0.5 | - | - | - |",
        "| all | 26.7 | - | - | - |",
    ]


def test_of_two_evaluations_the_newest_counts(tmp_path):
    write_scores(tmp_path, "rl", "eval-1.png", overall=0.7)
    write_scores(tmp_path, "rl", "eval.png", overall=0.8)
    os.utime(tmp_path / "scores" / "rl" / "eval-1.png", (1, 1))
    assert summary.scores_in(tmp_path / "scores" / "rl") == {"overall": 0.8}
    with pytest.raises(LensError, match="no evaluation"):
        summary.scores_in(tmp_path / "scores" / "turbo")


def test_the_stages_of_the_table_are_those_of_the_script():
    text = SCRIPT.read_text()
    for _, stage, folder in summary.TABLE:
        assert stage is None or f"\nstage {stage} " in text
        assert folder is None or f'"$OUT/scores/{folder}"' in text


def test_the_strip_has_a_row_for_each_stage(nano, tmp_path):
    for folder in ("toy", "rl", "turbo"):          # as if they were of three stages
        shutil.copytree(nano, tmp_path / folder)
    rows = summary.held_out_rows(2, 64, 64)
    sheet = summary.strip(tmp_path, rewritten=["a red circle"] * len(rows))
    assert sheet.size == (13 * 68 - 4, 6 * 68 - 4)
    pixels = np.asarray(sheet)
    for column, row in enumerate(rows, start=1):
        drawn = pixels[:64, 68 * column:68 * column + 64]
        assert (drawn == np.asarray(summary.draw(row.scene, 64, 64))).all()
    # Guidance 2, as the notes say, and 1 differ; the titles are words on white.
    assert (pixels[136:200, 68:] != pixels[204:268, 68:]).any()
    for row in range(6):
        title = pixels[68 * row:68 * row + 64, :64]
        assert 0 < (title < 128).mean() < 0.3


def test_brief_requests_are_rewritten_under_the_system_prompt_that_was_found(tmp_path):
    (tmp_path / "best.txt").write_text(TOY_SYSTEM)
    prompts = summary.rewrite_brief_requests(sample.TOY, tmp_path / "best.txt")
    requests = [row.prompt for row in summary.held_out_rows(2, 128, 128, "brief")]
    assert len(prompts) == len(requests)
    longer = [len(prompt) > len(request) for prompt, request in zip(prompts, requests)]
    assert sum(longer) >= 10
