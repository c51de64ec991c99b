"""A run on shards that is killed, at any moment and in the middle of saving, and its accounts."""
import copy
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import lens
import sample
import train
from conftest import STEADY, steady
from test_shards import make_shards

ROOT = Path(__file__).parent.parent
ALIKE = STEADY + "import sys, train\n"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), 40)


@pytest.fixture(scope="module")
def command(parts, shards):
    return ["--size", "nano", "--stage", "2", "--parts", str(parts), "--data", shards, "--steps", "24", "--save-every", "4", "--preview-every", "0", "--device", "cpu",
            "--batch", "5,3"]


def rows(folder):
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "pictures_per_s", "tflops", "peak_share", "wait_s")}
            for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        steady(patch)
        train.main([*command, "--out", str(out), "--workers", "0"])
    return out


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_run_that_is_killed_goes_on_to_the_bit(command, undisturbed, tmp_path, workers):
    """SIGKILL twice, at steps that no checkpoint holds; over an epoch's end; every loss is that of the run nobody killed."""
    (tmp_path / "run.py").write_text(ALIKE + "train.main(sys.argv[1:])\n")
    out, threads = tmp_path / "out", str(torch.get_num_threads())
    start = lambda: subprocess.Popen([sys.executable, tmp_path / "run.py", *command, "--out", out, "--workers", str(workers)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                     env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads})
    for until in (6, 15):
        process, log = start(), out / "metrics.jsonl"
        while process.poll() is None and (not log.exists() or log.read_text().count("\n") < until):
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert len(train.checkpoints(out)) == 1
    assert start().communicate()[1] is not None
    assert rows(out) == rows(undisturbed)
    a, b = (lens.load_transformer(folder).state_dict() for folder in (out, undisturbed))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_other_shards_are_refused_and_spoilt_samples_are_counted(command, undisturbed, shards, parts, tmp_path, capsys, monkeypatch):
    other = make_shards(tmp_path / "other", 24, seed=9)
    swapped = [other if word == shards else word for word in command]
    with pytest.raises(lens.LensError, match="not those that the run"):
        train.main([*swapped, "--steps", "30", "--out", str(undisturbed), "--workers", "0"])
    found = data.Shards(other, [s for base in (64, 96) for s in data.buckets(base)])
    with open(found.paths[0], "r+b") as f:
        f.seek(found.rows[3, 1] + 8)
        f.write(b"\0" * 40)
    train.main([*swapped, "--steps", "6", "--out", str(tmp_path / "run"), "--workers", "1"])                # 24 samples in batches of 5 and 3: an epoch and a bit
    assert rows(tmp_path / "run")[-1]["replaced"] >= 1 and "sample 3: broken picture" in capsys.readouterr().err


def test_cached_latents_train_as_pictures_do(command, shards, parts, tmp_path, monkeypatch):
    """The same samples in the same order, but for the crop, which pictures of their bucket's own size do not have."""
    steady(monkeypatch)
    data.main(["cache", "--data", shards, "--bases", "64,96", "--weights", str(parts), "--out", str(tmp_path / "latents")])
    cached = [str(tmp_path / "latents" / "*.tar") if word == shards else word for word in command]
    train.main([*cached, "--out", str(tmp_path / "run"), "--workers", "0"])
    assert [r["step"] for r in rows(tmp_path / "run")] == list(range(1, 25)) and np.isfinite([r["loss"] for r in rows(tmp_path / "run")]).all()
    with pytest.raises(lens.LensError, match="another autoencoder"):
        train.main([*cached, "--parts", str(ROOT / "weights" / "toy"), "--size", "toy", "--batch", "2,2,2", "--out", str(tmp_path / "toy"), "--workers", "1"])


def test_killed_while_saving_twenty_times_the_newest_checkpoint_is_whole(parts, tmp_path):
    """A child saves without end, each time weights that all equal the step's number, and is killed; what is there must be of one step."""
    (tmp_path / "run.py").write_text(f"""
import argparse, os, random, signal, sys, time
import torch, lens, train
out = sys.argv[1]
args = argparse.Namespace(out=out, parts={str(parts)!r}, rank=0, fsdp=False, lora=0, seed=0, guidance=3.0, table=train.STAGES["nano"], say=lambda *_: None)
model, ema = lens.build("nano"), lens.build("nano")
optimizers = train.make_optimizers(model, train.STAGES["nano"][2])
train.make_moments(optimizers)
random.seed(0)
last, loaded = 0, 0
for round in range(20):
    child = os.fork()
    if child == 0:
        for step in range(last + 1, last + 10000):
            with torch.no_grad():
                for t in train.resumable(model, ema, optimizers).values():
                    t.fill_(step)
            train.save(args, 2, model, ema, optimizers, {{"step": step, "total": step, "seconds": 0.0}}, [])
    time.sleep(random.uniform(0.05, 0.4))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if train.checkpoints(out):
        state = {{}}
        train.resume(args, model, ema, optimizers, state)
        assert state["total"] >= last, (state, last)
        last, loaded = state["total"], loaded + 1
        assert all((t == last).all() for t in train.resumable(model, ema, optimizers).values())
        weights = lens.load_transformer(out).state_dict() if os.path.exists(out + "/model_index.json") else {{}}
        assert len({{float(v.flatten()[0]) for v in weights.values()}}) <= 1 and all((v == v.flatten()[0]).all() for v in weights.values())
print("loaded", loaded, "at", last)
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))                          # a disk that is full after 100 kB
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    train.save(args, 2, model, ema, optimizers, {{"step": last + 1, "total": last + 1, "seconds": 0.0}}, [])
except lens.LensError as e:
    print("said:", e)
train.resume(args, model, ema, optimizers, state)
print("still", state["total"] == last)
""")
    done = subprocess.run([sys.executable, tmp_path / "run.py", str(tmp_path / "out")], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "loaded" in done.stdout and int(done.stdout.split("loaded ")[1].split()[0]) >= 15 and int(done.stdout.split(" at ")[1].split()[0]) >= 5, done.stdout
    said = [line for line in done.stdout.splitlines() if line.startswith("said:")]
    assert len(said) == 1 and "cannot write" in said[0] and "still True" in done.stdout, done.stdout


def test_recomputing_keeps_less():
    config = lens.SIZES["nano"].transformer
    none, selective, full = (train.activations(config, how, 4, (8, 8), 16) for how in ("none", "selective", "full"))
    assert none > 1.5 * selective and selective > 1.5 * full > 0


@pytest.mark.parametrize("size, grid, length, rank", [("nano", (4, 6), 7, 0), ("toy", (6, 6), 30, 0), ("small", (16, 16), 100, 0), ("small", (16, 16), 100, 8)])
def test_flops_are_those_that_torch_counts(size, grid, length, rank):
    with torch.device("meta"):
        model = lens.LensTransformer(lens.SIZES[size].transformer).train()
    model = model.to_empty(device="cpu")
    for name, p in model.named_parameters():
        p.requires_grad_(name not in set(model.unread()))
    lens.add_lora(model, rank, rank) if rank else None
    c, n = model.config, grid[0] * grid[1]
    tokens, text = torch.randn(2, n, c.in_channels), [torch.randn(2, length, c.enc_hidden_dim) for _ in c.selected_layer_index]
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        train.flow_matching_loss(model, tokens, text, None, grid, torch.randn_like(tokens), torch.rand(2)).mean().backward()
    # autograd skips the gradients of what enters the first layers; attention's softmax is not counted on either side
    assert counter.get_total_flops() == pytest.approx(2 * train.flops(model, n, length), rel=0.05)


def test_the_dry_run_makes_no_weights(capsys):
    train.main(["--size", "nano", "--stage", "2", "--dry-run"])
    said = capsys.readouterr().out
    assert "89,872 parameters" in said and said.count("selective") == 2
    train.main(["--size", "nano", "--stage", "2", "--dry-run", "--lora", "4"])
    adapter = int(re.search(r"89,872 parameters, ([\d,]+) of them learn", capsys.readouterr().out)[1].replace(",", ""))
    model = lens.build("nano")
    lens.add_lora(model, 4, 4)
    assert adapter == sum(p.numel() for p in lens.lora_parameters(model)) and 0 < adapter < 10_000


def test_lora_trains_an_adapter_and_nothing_else(command, undisturbed, tmp_path):
    train.main([*command, "--init", str(undisturbed), "--lora", "4", "--steps", "6", "--out", str(tmp_path), "--workers", "0"])
    base = lens.load_transformer(undisturbed)
    tuned = copy.deepcopy(base)
    assert lens.load_lora(tuned, tmp_path) > 4
    changed = [k for (k, a), b in zip(base.state_dict().items(), tuned.state_dict().values()) if not torch.equal(a, b)]
    assert changed and all(k.endswith("weight") for k in changed) and not (tmp_path / "transformer").exists()
    assert sum(p.stat().st_size for p in train.checkpoints(tmp_path)[-1].rglob("*") if p.is_file()) < 4 * sum(v.numel() * 4 for v in base.state_dict().values())


@pytest.mark.parametrize("arguments, words", [(["--size", "full", "--data", "{here}"], "the one that size full"), (["--data", "/nowhere/*.tar"], "no file matches"),
                                              (["--fsdp"], "torchrun"), (["--batch", "4"], "areas"), (["--accumulate", "0"], "at least 1")])
def test_bad_input_is_one_clear_line(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lens, "build", lambda *_: pytest.fail("a model was built before the mistake was found"))
    arguments = [word.replace("{here}", __file__) for word in arguments]
    with pytest.raises(SystemExit) as e:
        sample.run(lambda: train.main(["--out", str(tmp_path / "run"), *arguments]))
    err = capsys.readouterr().err
    assert e.value.code == 2 and len([l for l in err.splitlines() if l.startswith("error: ")]) == 1 and words in err
