"""tools/strip.py: the steps of a picture as one animated file."""
import numpy as np
from conftest import ROOT, error_line
from PIL import Image

import sample
from tools import strip

PROMPT = "a red circle to the left of a blue square"


def test_a_strip_ends_with_the_finished_picture(tmp_path, capsys):
    file = tmp_path / "strip.webp"
    strip.main(["--prompt", PROMPT, "--seed", "3", "--out", str(file)])
    assert f"{file}: 20 steps" in capsys.readouterr().out

    strips = Image.open(file)
    assert strips.n_frames == 20
    strips.seek(19)
    last = np.asarray(strips.convert("RGB"), float)         # [128 + 4 + 128, 128, 3]
    finished = np.asarray(sample.generate([PROMPT], seed=3)[0], float)
    assert np.abs(last[:128] - finished).mean() < 6         # of 255: WebP loses a little
    assert np.abs(last[132:] - finished).mean() < 6         # at t = 0 the guess is what is there

    strips.seek(0)                                          # noise above, a first guess below
    first = np.asarray(strips.convert("RGB"), float)
    assert np.abs(first[:128] - finished).mean() > 60


def test_the_readmes_strip_is_small():
    assert (ROOT / "images" / "steps.webp").stat().st_size < 300_000


def test_a_strip_needs_weights(capsys):
    assert "no-such-folder" in error_line(strip.main, ["--weights", "no-such-folder"], capsys)
