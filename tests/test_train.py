"""train.py: what a step learns from, what a run writes, that ranks learn what one process learns,
and what is refused. Kills and resumes are in test_restart.py."""
import copy
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, STEADY_SCRIPT, error_line, random_model, rows
from shards import LOOSE, make_shards, photo
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import kit.run
import lens
import sample
import train
from kit.checkpoint import load_transformer, save_pipeline
from kit.files import LensError, open_safetensors, write_json
from kit.lora import add_lora, merge_lora
from kit.muon import Muon
from kit.places import WEIGHT_NAMES, gather, read_metadata
from kit.run import Run, compile_blocks
from kit.state import kept_progress, newest_state
from toy.labels import label_head, label_loss, label_sizes
from toy.world import SHAPES

NANO = lens.SIZES["nano"].transformer
GRID = (2, 3)


@pytest.fixture
def nano(parts, steady):
    """Runs train.py at size nano over the nano parts: nano(out, *flags)."""
    def run(out, *flags):
        train.main(nano_flags(parts, out, *flags))
    return run


def nano_flags(parts, out, *flags):
    return ["--size", "nano", "--device", "cpu", "--preview-every", "0", "--parts", str(parts),
            "--out", str(out), *flags]


def weights(folder):
    return load_transformer(folder).state_dict()


def column(folder, name):
    """One number of each step."""
    return [row[name] for row in rows(folder)]


def random_batch(samples, grid=GRID, length=5, seed=0, **fields):
    """A data.Batch of size nano, all numbers random."""
    g = torch.Generator().manual_seed(seed)
    B, N = len(samples), grid[0] * grid[1]
    text = [torch.randn(B, length, NANO.enc_hidden_dim, generator=g)
            for _ in NANO.selected_layer_index]
    return data.Batch(
        samples=np.array(samples), epoch=2, grid=grid, text=text,
        mask=torch.ones(B, length, dtype=torch.bool),
        tokens=torch.randn(B, N, NANO.in_channels, generator=g), **fields)


def random_labels(batch):
    """What covers each token: shape and colour 0 to 5, and a pose."""
    B, N = batch.tokens.shape[:2]
    covering = torch.full((B, N, 6), 0.5)
    covering[..., :2] = torch.randint(0, 6, (B, N, 2), generator=torch.Generator().manual_seed(1))
    return covering


def let_learn(model):
    """Freezes what gets no gradient, as a run does."""
    unread = set(model.unread())
    for name, p in model.named_parameters():
        p.requires_grad_(name not in unread)
    return model


# --- Settings -------------------------------------------------------------------------------------

def test_a_stage_of_one_area_has_squares_and_one_of_more_has_nine_ratios():
    assert train.STAGES["nano", 1].sizes() == [(64, 64)]
    assert train.STAGES["nano", 1].pictures([(64, 64)]) == {0: 16}

    stage = train.STAGES["nano", 2]
    small, large = data.buckets(64), data.buckets(96)
    assert stage.home == 96
    assert stage.sizes() == small + large
    expected = [16] * len(small) + [8] * len(large)
    assert list(stage.pictures(stage.sizes()).values()) == expected


def test_a_bucket_of_shards_has_as_many_pictures_as_the_area_nearest_to_it():
    stage = train.STAGES["toy", 2]
    sizes = [(16, 16), (64, 64), (80, 64), (96, 112), (128, 96), (512, 512)]
    assert list(stage.pictures(sizes).values()) == [96, 96, 96, 72, 72, 48]


def test_the_stages_of_a_size_share_what_one_optimizer_has():
    """A run makes its optimisers once."""
    for size in ("nano", "toy", "full"):
        one, two = train.STAGES[size, 1], train.STAGES[size, 2]
        assert one.betas == two.betas
        assert (one.muon_lr is None) == (two.muon_lr is None)


def test_stars_are_drawn_most_often():
    assert sum(train.STAR_ODDS) == pytest.approx(1)
    assert SHAPES[np.argmax(train.STAR_ODDS)] == "star"


def test_numbers_of_batch_are_those_of_stage_2s_areas(monkeypatch, tmp_path):
    """Stage 1 of the toy, at 128, once took the number for 64."""
    given = {}
    monkeypatch.setattr(train, "train_denoiser",
                        lambda run, size, stages, **_: given.update(stages))
    train.main(["--out", str(tmp_path), "--device", "cpu", "--batch", "6,4,2"])
    assert given[1].batch == (2,)
    assert given[2].batch == (6, 4, 2)


def test_sizes_without_stages_of_their_own_have_those_of_full():
    assert train.stage_of("small", 2) is train.STAGES["full", 2]
    assert train.stage_of("nano", 1) is train.STAGES["nano", 1]


def test_the_mean_time_is_the_papers_at_both_ends():
    assert train.timestep_mu(256) == 1.0
    assert train.timestep_mu(4096) == pytest.approx(1.3)


def test_no_two_stages_share_an_epochs_number():
    """Noise is a function of (seed, epoch, sample). Stage 1 once met stage 2's after 1,000
    epochs."""
    numbers = [train.epoch_number(stage, epoch) for stage in (1, 2) for epoch in range(5001)]
    assert len(set(numbers)) == len(numbers)
    for stage, epoch in itertools.product((1, 2), range(1000)):
        assert train.epoch_number(stage, epoch) == 1000 * stage + epoch


def test_learning_rates_rise_and_fall_as_the_stage_says():
    toy = replace(train.STAGES["toy", 1], steps=1000)
    factors = [train.rate_factor(toy, step) for step in (0, 99, 500, 750, 999)]
    assert factors == [0.01, 1.0, 1.0, 0.5, 0.002]

    full = train.STAGES["full", 1]
    factors = [train.rate_factor(full, step) for step in (0, 499, 999, full.steps - 1)]
    assert factors == [0.001, 0.5, 1.0, 1.0]

    optimizers = train.make_optimizers(let_learn(lens.build("nano")), toy)
    train.set_learning_rates(optimizers, toy, 0.5)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    assert rates == [0.5 * toy.lr, 0.5 * toy.muon_lr]


# --- Noise, times, dropped text -------------------------------------------------------------------

def test_noise_of_a_sample_does_not_depend_on_its_batch():
    batch, alone = random_batch([5, 9, 2]), random_batch([9])
    noise, t, dropped = train.draw_noise_and_time(1, batch, (1.0, 1.0))
    its_noise, its_t, its_dropped = train.draw_noise_and_time(1, alone, (1.0, 1.0))
    assert torch.equal(noise[1], its_noise[0])
    assert t[1] == its_t[0]
    assert dropped[1] == its_dropped[0]

    for seed, epoch in ((1, 3), (2, 2)):
        other, _, _ = train.draw_noise_and_time(seed, replace(alone, epoch=epoch), (1.0, 1.0))
        assert not torch.equal(other, its_noise)


def test_times_and_dropout_follow_their_distributions():
    batch = random_batch(range(4000), grid=(1, 1), length=1)
    _, t, dropped = train.draw_noise_and_time(0, batch, (1.75, 1.25))
    assert abs(t.logit().mean() - 1.75) < 0.07
    assert abs(t.logit().std() - 1.25) < 0.06
    assert abs(dropped.float().mean() - train.DROPOUT) < 0.02

    _, papers, _ = train.draw_noise_and_time(0, batch)
    assert abs(papers.logit().mean() - train.timestep_mu(1)) < 0.06
    assert abs(papers.logit().std() - 1.0) < 0.05


@torch.no_grad()
def test_a_dropped_sample_is_shown_no_text():
    model, batch = random_model(), random_batch([0, 1])
    t = torch.rand(2)
    mask = train.without_text(batch, torch.tensor([True, False])).mask
    shown = model(batch.tokens, t, batch.text, batch.mask, GRID)
    some = model(batch.tokens, t, batch.text, mask, GRID)
    none = model(batch.tokens, t, None, None, GRID)
    torch.testing.assert_close(some[0], none[0])
    torch.testing.assert_close(some[1], shown[1])
    assert not torch.allclose(shown[0], none[0])


# --- The loss -------------------------------------------------------------------------------------

def test_the_loss_is_zero_for_the_true_velocity_and_its_mean_square_for_none():
    batch, t = random_batch([0, 1, 2]), torch.rand(3)
    noise = torch.randn(batch.tokens.shape)
    truth = lens.velocity(batch.tokens, noise)

    def exact(x_t, *_):
        assert torch.equal(x_t, lens.add_noise(batch.tokens, noise, t))
        return truth

    def silent(x_t, *_):
        return torch.zeros_like(x_t)

    assert train.flow_matching_loss(exact, batch, noise, t).max() == 0
    losses = train.flow_matching_loss(silent, batch, noise, t)
    assert losses.shape == (3,)
    assert torch.allclose(losses, truth.square().mean((1, 2)))


@torch.no_grad()
def test_labels_are_asked_of_the_block_that_the_reader_names():
    model, batch = random_model(), random_batch([0, 1])
    batch.labels = random_labels(batch)
    noise, t = torch.randn(batch.tokens.shape), torch.rand(2)
    images = []
    plain = train.flow_matching_loss(
        model, batch, noise, t, on_block=lambda i, img: images.append(img))
    assert torch.equal(plain, train.flow_matching_loss(model, batch, noise, t))

    head = label_head(NANO.inner_dim)
    nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    for block in (0, 1):
        losses, label_losses = train.losses_of(
            model, batch, noise, t, train.LabelReader(head, block))
        assert torch.equal(losses, plain)
        assert torch.equal(label_losses, label_loss(head, images[block], batch.labels))
    assert not torch.allclose(images[0], images[1])

    losses, label_losses = train.losses_of(model, batch, noise, t)
    assert torch.equal(losses, plain)
    assert torch.equal(label_losses, torch.zeros(2))


def test_labels_are_learnt_and_leave_no_trace(nano, tmp_path):
    """What is saved, and sampled from, has no part of them."""
    nano(tmp_path, "--stage", "1", "--steps", "150")
    label_losses = column(tmp_path, "label_loss")
    shapes, colors, _ = label_sizes()
    assert label_losses[0] > math.log(shapes) + math.log(colors) - 1e-3      # it knows nothing yet
    assert np.mean(label_losses[-5:]) < 0.8 * label_losses[0]
    assert weights(tmp_path).keys() == lens.build("nano").state_dict().keys()


# --- One step -------------------------------------------------------------------------------------

def test_a_step_of_two_micro_batches_is_a_step_on_their_mean(tmp_path):
    """Of unequal size: each sample weighs the same."""
    run, stage = Run(tmp_path), train.STAGES["nano", 1]
    model = let_learn(random_model())
    twin = copy.deepcopy(model)
    batches = [random_batch([0, 1, 2], seed=1), random_batch([7, 8], grid=(3, 4), seed=2)]

    losses = []
    for batch in batches:
        noise, t, dropped = train.draw_noise_and_time(run.seed, batch, stage.mean_std)
        seen = train.without_text(batch, dropped)
        losses.append(train.flow_matching_loss(twin, seen, noise, t))
    mean = torch.cat(losses).mean()
    mean.backward()
    learns = [p for p in twin.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(learns, train.CLIP)
    assert norm > train.CLIP                       # or the test would not see that it is clipped

    micros = [train.MicroBatch(batch, 1 / 5, last=batch is batches[1]) for batch in batches]
    report = train.train_step(run, model, micros, [], stage)
    assert report.loss == pytest.approx(mean.item(), rel=1e-6)
    assert report.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert report.shapes == [(3, 6, 5), (2, 12, 5)]
    for p, q in zip(model.parameters(), twin.parameters()):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad)


def tallied(losses, t, share=1.0, faults=()):
    """A Tally of one micro-batch with these losses."""
    tally = train.Tally("cpu")
    batch = random_batch(range(len(losses)), faults=faults)
    losses = torch.tensor(losses)
    tally.add(train.MicroBatch(batch, share, last=True), losses, 0.5 * losses, torch.tensor(t))
    return tally


def test_a_report_holds_means_by_quarter_of_t_and_counts(tmp_path):
    tally = tallied([1.0, 2.0, 6.0], [0.1, 0.2, 1.0], faults=["a broken picture"])
    # Of a rank that only runs along for its peers nothing counts.
    along = train.MicroBatch(random_batch([0], faults=["its fault"]), 0.0, last=True)
    tally.add(along, torch.tensor([50.0]), torch.tensor([50.0]), torch.tensor([0.6]))

    report = tally.over_all_ranks(Run(tmp_path), torch.tensor(0.5), None, notified=False)
    assert report.loss == 3.0
    assert report.loss_by_t == [1.5, None, None, 6.0]
    assert report.label_loss == 1.5
    assert report.grad_norm == 0.5
    assert report.replaced == 1
    assert report.shapes == [(3, 6, 5)]
    assert report.sound
    assert not report.stop


@pytest.mark.parametrize("loss, norm, usual, sound", [
    (3.0, 0.5, None, True),
    (3.0, 0.5, 0.8, True),
    (3.0, 0.5, 0.7, False),                        # over four times the usual
    (float("nan"), 0.5, None, False),
    (float("inf"), 0.5, None, False),
    (3.0, float("nan"), None, False),
])
def test_a_step_is_sound_that_is_finite_and_near_the_usual(loss, norm, usual, sound, tmp_path):
    report = tallied([loss], [0.5]).over_all_ranks(
        Run(tmp_path), torch.tensor(norm), usual, notified=True)
    assert report.sound is sound
    assert report.stop


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_steps_batches_are_dealt_each_to_one_rank(ranks):
    for count in range(1, 10):
        group = [f"batch {k}" for k in range(count)]
        dealt = [train.deal(group, rank, ranks) for rank in range(ranks)]
        assert {len(part) for part in dealt} == {-(-count // ranks)}
        # In turn: what ranks compute at one moment stands side by side in the group.
        turns = [turn for moment in zip(*dealt) for turn in moment]
        assert [batch for batch, counts in turns if counts] == group
        along = [batch for batch, counts in turns if not counts]
        assert along == [group[-1]] * (-count % ranks)


def test_parts_come_from_the_model_that_a_run_starts_from(tmp_path):
    """They came from weights/toy, and a denoiser went on over latents that it had never seen."""
    (tmp_path / "whole" / "vae").mkdir(parents=True)
    write_json(tmp_path / "tuned" / "model_index.json", {"base": "../whole"})
    write_json(tmp_path / "alone" / "model_index.json", {})
    (tmp_path / "file.safetensors").touch()
    assert train.parts_of(None) == sample.TOY
    assert train.parts_of("owner/model") == "owner/model"
    for model in ("whole", "tuned"):
        assert train.parts_of(str(tmp_path / model)) == str(tmp_path / model)
    for denoiser in ("alone", "file.safetensors"):
        assert train.parts_of(str(tmp_path / denoiser)) == sample.TOY


def test_parts_of_the_runs_own_folder_need_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for own in ("run", "run/", f"{tmp_path}/run"):
        assert train.parts_named(own, Path("run")) is None
    apart = gather("run", vae="a.safetensors")
    assert train.parts_named(apart, Path("run")) == "a.safetensors, run"
    assert train.parts_named("owner/model", Path("run")) == "owner/model"


def test_a_step_that_was_left_out_has_no_loss_of_any_kind(tmp_path):
    tally = tallied([9.0], [0.1])
    report = tally.over_all_ranks(Run(tmp_path), torch.tensor(1.0), usual_loss=1.0, notified=False)
    row = train.log_row(Run(tmp_path), train.Progress(stage=1), report)
    assert not report.sound
    assert row["loss"] is row["grad_norm"] is row["label_loss"] is None
    assert row["loss_by_t"] == [None] * 4


def test_steps_that_are_not_finite_end_a_run_at_last():
    bar = tqdm(disable=True)
    train.check_sound(train.PATIENCE - 1, bar)
    with pytest.raises(LensError, match="10 steps in a row had a gradient that was not finite"):
        train.check_sound(train.PATIENCE, bar)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_else():
    model = let_learn(lens.build("nano"))
    optimizers = train.make_optimizers(model, train.STAGES["nano", 1])
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.AdamW, Muon]
    of_adamw, of_muon = (parameters_of(optimizer) for optimizer in optimizers)

    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not of_adamw & of_muon
    assert of_adamw | of_muon == set(named.values())
    for name in ("transformer_blocks.0.attn.img_qkv.weight",
                 "transformer_blocks.1.img_mlp.w2.weight"):
        assert named[name] in of_muon
    for name in ("img_in.weight", "proj_out.weight", "transformer_blocks.0.img_mod.1.weight",
                 "transformer_blocks.0.attn.norm_q.weight"):
        assert named[name] in of_adamw


def parameters_of(optimizer):
    return {p for group in optimizer.param_groups for p in group["params"]}


def test_the_papers_stages_have_adamw_for_all():
    model = let_learn(lens.build("nano"))
    optimizers = train.make_optimizers(model, train.STAGES["full", 1])
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.AdamW]
    assert parameters_of(optimizers[0]) == {p for p in model.parameters() if p.requires_grad}
    assert optimizers[0].param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("size, grid, length, rank", [
    ("nano", (4, 6), 7, 0),
    ("toy", (6, 6), 30, 0),
    ("small", (16, 16), 100, 0),
    ("small", (16, 16), 100, 8),
])
def test_flops_are_those_that_torch_counts(size, grid, length, rank):
    """But for the gradients of what enters the first layers, which autograd skips; the softmax of
    attention is not counted on either side."""
    config = lens.SIZES[size].transformer
    with torch.device("meta"):
        model = lens.LensTransformer(config).train()
    model = let_learn(model.to_empty(device="cpu"))
    if rank:
        add_lora(model, rank, rank)

    tokens = grid[0] * grid[1]
    x = torch.randn(2, tokens, config.in_channels)
    text = [torch.randn(2, length, config.enc_hidden_dim) for _ in config.selected_layer_index]
    batch = data.Batch(np.arange(2), 0, grid, text, mask=None, tokens=x)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses = train.flow_matching_loss(model, batch, torch.randn_like(x), torch.rand(2))
        losses.mean().backward()
    expected = 2 * train.flops(model, tokens, length)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)


# --- What learns ----------------------------------------------------------------------------------

def test_the_average_shares_what_is_frozen_and_has_its_own_of_what_learns(tmp_path):
    for lora in (0, 4):
        learner = train.make_learner(
            Run(tmp_path), lens.build("nano"), train.STAGES["nano", 1], lora=lora)
        averaged = dict(learner.ema.named_parameters())
        for name, p in learner.denoiser.named_parameters():
            assert (averaged[name] is p) is (not p.requires_grad), name
            assert not averaged[name].requires_grad
        assert learner.trained().keys() == learner.averaged().keys()
        assert len(learner.trained()) > 10


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_a_copy_of_a_learner_that_recomputes_runs_its_own_blocks(how, tmp_path):
    """Its blocks once ran the original's, whose method hung on them."""
    learner = train.make_learner(
        Run(tmp_path), random_model(), train.STAGES["nano", 1], recompute=how)
    twin, other = copy.deepcopy(learner.denoiser), let_learn(random_model(seed=5))
    twin.load_state_dict(other.state_dict())

    batch, t = random_batch([0, 1]), torch.rand(2)
    noise = torch.randn(batch.tokens.shape)
    losses = train.flow_matching_loss(twin, batch, noise, t)
    expected = train.flow_matching_loss(other, batch, noise, t)
    torch.testing.assert_close(losses, expected)
    original = train.flow_matching_loss(learner.denoiser, batch, noise, t)
    assert not torch.allclose(losses, original, rtol=1e-2)

    losses.mean().backward()
    expected.mean().backward()
    for p, q in zip(twin.parameters(), other.parameters()):
        if q.requires_grad:
            torch.testing.assert_close(p.grad, q.grad)
    assert all(p.grad is None for p in learner.denoiser.parameters())


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_compute_what_plain_ones_do():
    """One dynamic program must serve every size and text length, values and gradients."""
    plain = random_model().train()
    fast = copy.deepcopy(plain)
    assert compile_blocks(fast, fullgraph=False)
    assert fast.state_dict().keys() == plain.state_dict().keys()

    for grid, length in (((4, 6), 5), ((3, 3), 7)):
        batch, t = random_batch([0, 1], grid, length), torch.rand(2)
        batch.mask[1, 2:] = False
        one, other = (model(batch.tokens, t, batch.text, batch.mask, grid)
                      for model in (plain, fast))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert one.abs().mean() > 0.01
        one.square().mean().backward()
        other.square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters()):
        if p.grad is None:
            assert q.grad is None, name
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=name)


# --- Runs -----------------------------------------------------------------------------------------

def test_training_learns_and_its_folder_can_be_sampled_from(nano, tmp_path):
    nano(tmp_path, "--steps", "8")
    assert column(tmp_path, "step") == list(range(1, 17))
    assert column(tmp_path, "stage") == [1] * 8 + [2] * 8
    losses = column(tmp_path, "loss")
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    assert all(len(by_t) == 4 for by_t in column(tmp_path, "loss_by_t"))
    assert (tmp_path / "curves.svg").exists()

    notes = read_metadata(tmp_path)
    assert {"command", "seed", "steps", "guidance", "words", "score"} <= notes.keys()
    assert notes["base"] == "96"
    assert notes["trained_steps"] == "16"
    # The autoencoder and the text encoder come from --parts.
    pictures = sample.generate("a red circle", weights=tmp_path, height=48, width=48, steps=2)
    assert pictures[0].size == (48, 48)


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputing_learns_the_same(how, nano, tmp_path):
    flags = ["--stage", "1", "--steps", "3"]
    nano(tmp_path / "kept", *flags)
    nano(tmp_path / "again", *flags, "--recompute", how)
    losses = column(tmp_path / "again", "loss")
    assert losses == pytest.approx(column(tmp_path / "kept", "loss"), rel=1e-5)
    one, other = weights(tmp_path / "kept"), weights(tmp_path / "again")
    for name, w in one.items():
        torch.testing.assert_close(w, other[name], rtol=1e-3, atol=1e-5, msg=name)


def test_attention_is_picked_for_training_kept_by_a_resume_and_told(
        nano, tmp_path, monkeypatch, capsys):
    asked = []

    def slow_clock(device, dtype, config, tokens, learns):
        asked.append((tokens, learns))
        return "math", "slow clock"

    def fast_clock(*_):
        return "flash", "fast clock"

    flags = ["--stage", "2", "--save-every", "1"]
    monkeypatch.setattr(kit.run, "fastest_attention", slow_clock)
    nano(tmp_path, *flags, "--steps", "1")
    assert asked == [(36 + 40, True)]              # of a square of the largest area, and its text
    assert "math attention (slow clock)" in capsys.readouterr().out
    assert torch.backends.cuda.math_sdp_enabled()
    assert not torch.backends.cuda.flash_sdp_enabled()

    monkeypatch.setattr(kit.run, "fastest_attention", fast_clock)
    nano(tmp_path, *flags, "--steps", "2")
    assert "math attention" in capsys.readouterr().out
    assert not torch.backends.cuda.flash_sdp_enabled()
    assert newest_state(tmp_path).name == "state-00000002"
    assert kept_progress(tmp_path)["attention"] == "math"


def spoil_losses(monkeypatch, factors):
    """Multiplies the losses of some steps. factors: {step, counted from 1: factor}"""
    original, steps = train.losses_of, itertools.count(1)

    def spoilt(*inputs):
        losses, label_losses = original(*inputs)
        return losses * factors.get(next(steps), 1.0), label_losses

    monkeypatch.setattr(train, "losses_of", spoilt)


def test_a_bad_step_is_left_out_and_counted(nano, tmp_path, monkeypatch):
    spoil_losses(monkeypatch, {4: float("nan"), 6: 1e3})
    nano(tmp_path, "--stage", "1", "--steps", "8")
    losses = column(tmp_path, "loss")
    assert [step for step, loss in enumerate(losses, 1) if loss is None] == [4, 6]
    assert column(tmp_path, "skipped") == [0, 0, 0, 1, 1, 2, 2, 2]
    assert all(w.isfinite().all() for w in weights(tmp_path).values())


def test_many_bad_steps_in_a_row_end_the_run(nano, tmp_path, monkeypatch):
    spoil_losses(monkeypatch, dict.fromkeys(range(5, 99), float("inf")))
    with pytest.raises(LensError, match=r"10 steps in a row .* \(step 14\)"):
        nano(tmp_path, "--stage", "1", "--steps", "40", "--save-every", "3")
    kept = kept_progress(tmp_path)
    assert kept["total"] == 12
    assert kept["skipped_in_a_row"] == 8
    assert all(w.isfinite().all() for w in weights(tmp_path).values())


def test_previews_and_scores_come_when_they_are_due(nano, tmp_path, monkeypatch, capsys):
    """Every second step, and after the last."""
    asked = []

    def evaluate(pipeline, height, width, steps, guidance, per_task, progress):
        assert progress                            # or nothing moves meanwhile
        asked.append((height, width, guidance, per_task))
        return {"overall": 0.5}, None, None

    monkeypatch.setattr(sample, "evaluate", evaluate)
    monkeypatch.setattr(sample, "STEPS", 2)
    nano(tmp_path, "--stage", "1", "--steps", "3", "--preview-every", "2", "--eval-every", "2")
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"done: python sample.py --eval --weights {tmp_path}"
    assert [row.get("overall") for row in rows(tmp_path)] == [None, 0.5, 0.5]
    assert asked == [(64, 64, train.TOY_GUIDANCE, 20)] * 2
    previews = sorted(path.name for path in tmp_path.glob("preview-*.png"))
    assert previews == ["preview-000002.png", "preview-000003.png"]
    assert json.loads(read_metadata(tmp_path)["score"]) == {"overall": 0.5}


def test_own_pictures_are_previewed_by_their_captions_and_their_new_words_told(
        nano, tmp_path, monkeypatch, capsys):
    captions = [f"a fluffy cat {number}" for number in ("one", "two", "three", "four")]
    (tmp_path / "images").mkdir()
    for i, caption in enumerate(captions):
        photo(i).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(caption)
    data.main(["pack", "--images", str(tmp_path / "images"), "--out", str(tmp_path / "shards"),
               *LOOSE])
    asked = []

    def generate(prompts, *_, **how):
        asked.extend(prompts)
        return [photo()] * len(prompts)

    monkeypatch.setattr(sample, "generate", generate)
    out = tmp_path / "my run"
    flags = ["--stage", "1", "--steps", "2", "--data", f"{tmp_path}/shards/*.tar", "--workers", "0",
             "--preview-every", "2"]
    nano(out, *flags)
    assert asked == captions
    said = capsys.readouterr().out
    assert said.count('never read 2 words of these captions ("cat", "fluffy")') == 1
    assert said.splitlines()[-1] == (
        f"done: python sample.py --prompt \"a fluffy cat one\" --weights '{out}'")
    nano(out, *flags, "--eval-every", "9")
    said = capsys.readouterr().out
    assert "note: --eval-every scores the six tasks of the toy world" in said


def test_what_is_exported_is_what_was_scored(parts, tmp_path, monkeypatch):
    """The shipped file: matrices of the blocks in fp8 with a scale, the rest bf16; read back, the
    very weights that the score is of."""
    model, scored = random_model(), {}
    notes = {"base": 64, "steps": 2, "guidance": 3.0, "words": "[]"}
    save_pipeline(tmp_path / "run", model, metadata=notes,
                  base=os.path.relpath(parts, tmp_path / "run"))

    def evaluate(pipeline, height, width, steps, guidance):
        for name, w in pipeline[0].state_dict().items():
            scored[name] = w.clone()
        return {"overall": 0.5, "at": [height, width, steps, guidance]}, None, None

    monkeypatch.setattr(sample, "evaluate", evaluate)
    train.main(["--size", "nano", "--device", "cpu", "--out", str(tmp_path / "run"),
                "--parts", str(parts), "--export", str(tmp_path / "small")])

    notes = read_metadata(tmp_path / "small")
    assert json.loads(notes["score"]) == {"overall": 0.5, "at": [64, 64, 2, 3.0]}
    exported = weights(tmp_path / "small")
    assert exported.keys() == scored.keys()
    for name, w in exported.items():
        assert torch.equal(w.float(), scored[name]), name

    with open_safetensors(tmp_path / "small" / "transformer" / WEIGHT_NAMES[0]) as f:
        kinds = {name: f.get_tensor(name).dtype for name in f.keys()}
    exact = model.state_dict()
    matrices = {name for name, w in exact.items()
                if name.startswith("transformer_blocks") and w.ndim == 2}
    fp8 = {name for name, kind in kinds.items() if kind == torch.float8_e4m3fn}
    assert fp8 == matrices
    assert {kinds[name] for name in kinds.keys() - fp8} == {torch.bfloat16}

    for name in exact.keys() - matrices:
        assert torch.equal(scored[name], exact[name].bfloat16().float()), name
    for name in matrices:
        # Half of e4m3's last bit, or of its smallest step.
        size = exact[name].abs()
        allowed = 0.0665 * size + size.max() / 448 * 2**-9 * 2
        assert ((scored[name] - exact[name]).abs() <= allowed).all(), name


# --- Ranks ----------------------------------------------------------------------------------------

# A DDP that exchanges gradients in many small buckets.
SMALL_BUCKETS = """
class SmallBuckets(train.DistributedDataParallel):
    def __init__(self, module):
        super().__init__(module, bucket_cap_mb=0.001)

train.DistributedDataParallel = SmallBuckets
"""


def torchrun(ranks, folder, flags, before=""):
    """train.py with these flags on so many ranks, over gloo; before: lines of Python that run
    first."""
    script = folder / "ranks.py"
    script.write_text(f"{STEADY_SCRIPT}\nimport sys\nimport train\n{before}\n"
                      "train.main(sys.argv[1:])\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", str(ranks), str(script), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


FSDP_IN_BF16 = """
import numpy as np
import torch
import data
import lens
import train
from kit.run import start_run

run = start_run("{out}")
run.bf16 = True
learner = train.make_learner(run, lens.build("nano").train(), train.STAGES["nano", 1], fsdp=True)
seen = []
attention = learner.denoiser.transformer_blocks[0].attn
attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2].dtype))
batch = data.Batch(
    np.arange(2), 0, (2, 3), text=[torch.randn(2, 5, 32) for _ in range(2)],
    mask=torch.ones(2, 5, dtype=torch.bool), tokens=torch.randn(2, 6, 16))
micro = train.MicroBatch(batch, share=0.5, last=True)
report = train.train_step(run, learner.model, [micro], learner.optimizers, train.STAGES["nano", 1])
assert report.sound
assert seen == [torch.float32], seen
"""


def test_fsdp_in_bf16_leaves_rotary_angles_in_fp32(tmp_path):
    """FSDP casts a block's inputs to bf16 unless it is told not to; an old run did so."""
    script = tmp_path / "rank.py"
    script.write_text(FSDP_IN_BF16.replace("{out}", str(tmp_path / "out")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "1", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("ranks, how", [(2, ["--fsdp"]), (4, [])], ids=["fsdp-2", "ddp-4"])
def test_ranks_learn_what_one_process_learns(ranks, how, parts, nano, tmp_path, capsys):
    """Against one process that takes as many device batches a step. Some batches are smaller than
    others, and the last step of an epoch leaves a rank with nothing to do. What the ranks saved,
    one process goes on from."""
    flags = ["--save-every", "100", "--batch", "5,3"]
    alone = [*flags, "--accumulate", str(ranks)]
    one, many = tmp_path / "one", tmp_path / "many"
    torchrun(ranks, tmp_path, nano_flags(parts, many, *flags, *how, "--steps", "6"))
    nano(one, *alone, "--steps", "6")

    assert column(many, "step") == list(range(1, 13))
    assert column(many, "size") == column(one, "size")
    assert column(many, "loss") == pytest.approx(column(one, "loss"), rel=1e-5)
    assert column(many, "grad_norm") == pytest.approx(column(one, "grad_norm"), rel=1e-4)
    assert_near(weights(one), weights(many))

    for out in (one, many):
        nano(out, *alone, "--steps", "8")
    assert capsys.readouterr().out.count("at step 12") == 2
    assert column(many, "step") == list(range(1, 15))
    assert rows(many)[-1]["loss"] == pytest.approx(rows(one)[-1]["loss"], rel=1e-4)


def assert_near(one, other):
    assert one.keys() == other.keys()
    for name, w in one.items():
        torch.testing.assert_close(w, other[name], rtol=1e-3, atol=1e-5, msg=name)


def test_ranks_that_share_their_weights_train_the_adapter_that_one_process_trains(
        parts, nano, tmp_path):
    flags = ["--stage", "1", "--save-every", "100", "--batch", "4", "--steps", "5"]
    base, one, many = tmp_path / "base", tmp_path / "one", tmp_path / "many"
    nano(base, *flags)
    flags += ["--init", str(base), "--lora", "4"]
    torchrun(2, tmp_path, nano_flags(parts, many, *flags, "--fsdp"))
    nano(one, *flags, "--accumulate", "2")

    before = weights(base)
    by_one, by_many = merged(base, one), merged(base, many)
    moved = 0
    for name, w in by_one.items():
        change = (w - before[name]).abs().max().item()
        moved += change > 0
        torch.testing.assert_close(w, by_many[name], rtol=0, atol=1e-2 * change + 1e-9, msg=name)
    assert moved > 10


def merged(base, adapter):
    """The weights in `base` with an adapter merged into them."""
    model = load_transformer(base)
    merge_lora(model, adapter)
    return model.state_dict()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_ranks_take_compiled_blocks(parts, nano, tmp_path):
    """Left to itself PyTorch cuts a compiled block where a bucket of DDP's gradients is full, and
    fails on the cut: the toy's blocks are larger than its first bucket of 1 MiB, nano's than
    buckets of 1 KB."""
    flags = ["--stage", "1", "--steps", "3", "--batch", "4"]
    many, one = tmp_path / "many", tmp_path / "one"
    torchrun(2, tmp_path, nano_flags(parts, many, *flags, "--compile"), SMALL_BUCKETS)
    nano(one, *flags, "--accumulate", "2")
    assert len(rows(many)) == 3
    assert column(many, "loss") == pytest.approx(column(one, "loss"), rel=1e-4)


# --- Mistakes -------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    (["--size", "huge"], "--size: invalid choice: 'huge'"),
    (["--size", "full"], "name the shards to train on"),
    (["--data", "{tmp}/file"], "torn or unreadable tar"),
    (["--data", "/nowhere/*.tar"], "no file matches"),
    (["--steps", "0"], "--steps"),
    (["--steps", "x"], "--steps"),
    (["--accumulate", "0"], "at least 1"),
    (["--batch", "4"], "for the areas 64, 96, 128"),
    (["--batch", "4,4"], "for the areas 64, 96, 128"),
    (["--stage", "1", "--batch", "4,4"], "for the areas 128"),
    (["--batch", "4,0,4"], "--batch: must be numbers of at least 1"),
    (["--batch", "4,x,4"], "--batch"),
    (["--lora", "4"], "name them with --init"),
    (["--fsdp"], "torchrun"),
    (["--parts", "{tmp}/none"], "no weights"),
    (["--init", "{tmp}/none"], "no weights"),
    (["--out", "{tmp}/file/run"], "cannot write"),
])
def test_bad_input_is_one_clear_line(flags, words, tmp_path, capsys, monkeypatch):
    def build(*_):
        pytest.fail("a model was built before the mistake was found")

    monkeypatch.setattr(lens, "build", build)
    (tmp_path / "file").write_text("")
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    out = ["--device", "cpu", "--out", str(tmp_path / "run")]
    assert words in error_line(train.main, [*out, *flags], capsys)


def test_parts_of_another_size_are_no_parts(tmp_path, capsys):
    """--parts forgotten: the default is the toy's."""
    pattern = make_shards(tmp_path, 4)
    flags = ["--device", "cpu", "--out", str(tmp_path / "run"), "--size", "full", "--data", pattern]
    assert "not the one that size full works with" in error_line(train.main, flags, capsys)


def test_weights_of_another_size_are_no_start(parts, tmp_path, capsys):
    toy = str(ROOT / "weights" / "toy")
    flags = nano_flags(parts, tmp_path, "--init", toy)
    assert "its weights are not of size nano" in error_line(train.main, flags, capsys)


@pytest.mark.parametrize("there, missing", [
    ("text_encoder", "python -m toy.autoencoder --out"), ("vae", "python -m toy.language --out")])
def test_half_of_the_parts_in_out_is_an_error(there, missing, tmp_path, capsys):
    """Else the shipped ones would be taken in silence, not the one that was just trained."""
    (tmp_path / there).mkdir()
    (tmp_path / there / "config.json").write_text("{}")
    said = error_line(train.main, ["--out", str(tmp_path), "--size", "nano"], capsys)
    assert f"{missing} {tmp_path}" in said
