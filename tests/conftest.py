import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """A nano autoencoder and text encoder, made by the commands that make the real ones."""
    import train
    import vae
    folder = tmp_path_factory.mktemp("parts")
    vae.main(["--out", str(folder), "--size", "nano", "--steps", "4", "--report", "10", "--dtype", "fp32"])
    train.main(["--stage", "text", "--size", "nano", "--steps", "6", "--out", str(folder), "--save-every", "3"])
    return folder
