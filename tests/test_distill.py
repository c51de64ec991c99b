"""Distillation: the forces against known answers, the updates, and runs that are killed."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    STEADY_SCRIPT,
    error_line,
    fixed_attention,
    fixed_dtype,
    random_model,
    untimed_rows,
)
from PIL import Image

import data
import distill
import kit.run
import lens
import sample
from distill import places
from kit.checkpoint import load_pipeline, load_transformer, save_pipeline
from kit.files import LensError, open_safetensors, read_json
from kit.places import gather, read_metadata
from kit.run import Run, follow
from kit.shrink import nearest_of_rank
from kit.state import newest_state
from toy.world import COLORS

# --- One number a picture -------------------------------------------------------------------------
# Data N(m, 1): what is known of x0 at x_t is m + (1 - t) (x_t - (1 - t) m) / ((1 - t)^2 + t^2).

EVEN = torch.linspace(1, 0, 5)                     # levels without a shift
M = 0.7


def velocity(x, t, m):
    t = lens.widen(t, x)
    x0 = m + (1 - t) * (x - (1 - t) * m) / ((1 - t) ** 2 + t**2)
    return (x - x0) / t


def plain_guide(cond, uncond, guidance):
    """Over one channel, the sampler's rescaling would undo all guidance."""
    return uncond + guidance * (cond - uncond)


def normal(shape, rng):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def forces(mean, m, guidance, ca_levels, count=4000):
    """(y, DM gradient, CA gradient) for a student of N(mean, 1), its perfect fake, and a teacher of
    N(m, 1), without text N(0, 1)."""
    rng = torch.Generator().manual_seed(0)
    y = normal((count, 1, 1), rng) + mean

    t = distill.draw_levels(count, EVEN, 1.0, rng).double()
    x = lens.add_noise(y.detach(), normal(y.shape, rng), t)
    dm = distill.dm_gradient(velocity(x, t, mean.detach()), velocity(x, t, m), t)

    t = ca_levels(count, rng).double()
    x = lens.add_noise(y.detach(), normal(y.shape, rng), t)
    ca = distill.ca_gradient(velocity(x, t, m), velocity(x, t, 0.0), t, guidance, plain_guide)
    return y, dm, ca


def shared_levels(count, rng):
    return distill.draw_levels(count, EVEN, 1.0, rng)


def cleaner_half(count, rng):
    return distill.draw_levels(count, EVEN, 0.5, rng)


def noisier_half(count, rng):
    return 1 - distill.draw_levels(count, EVEN, 0.5, rng)


@pytest.mark.parametrize("ca_levels, expected", [
    (shared_levels, 4.0), (cleaner_half, 1.92), (noisier_half, 6.08)])
def test_where_the_mean_comes_to_rest(ca_levels, expected):
    """Guidance 4: shared levels 4 m; CA at the cleaner half of them 1.92 m; at the noisier half,
    the sign that ports copied, 6.08 m."""
    mean = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([mean], lr=1.0)
    for _ in range(40):
        y, dm, ca = forces(mean, M, 4.0, ca_levels)
        optimizer.zero_grad()
        distill.pull(y, dm + ca).backward()
        optimizer.step()
    assert mean.item() / M == pytest.approx(expected, rel=0.02)


def test_the_dm_gradient_vanishes_where_the_student_is_the_data():
    y, dm, _ = forces(torch.tensor(M, dtype=torch.float64), M, 4.0, cleaner_half)
    y.requires_grad_()
    # A force divided by its own size would be 1 everywhere.
    for force in (dm, distill.normalised(dm, y, torch.zeros_like(y))):
        (grad,) = torch.autograd.grad(distill.pull(y, force), y)
        assert grad.abs().max() < 1e-12

    too_high = torch.tensor(M + 0.1, dtype=torch.float64)
    _, dm, _ = forces(too_high, M, 4.0, cleaner_half)
    assert dm.min() > 0                            # it is subtracted: y is to fall


def all_equal(a, b):
    """To the bit, tensor by tensor."""
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# --- The forces, levels and terms, each by itself -------------------------------------------------

def test_pull_has_the_force_as_its_gradient_and_nothing_flows_into_the_force():
    y = torch.randn(2, 3, 4, requires_grad=True)
    w = torch.randn(2, 3, 4, requires_grad=True)
    force = 2 * w + y
    loss = distill.pull(y, force)
    loss.backward()
    assert torch.allclose(y.grad * y.numel(), force.detach(), atol=1e-6)
    assert w.grad is None
    assert loss.item() == pytest.approx(0.5 * force.square().mean().item(), rel=1e-5)


def test_guidance_is_the_samplers_own():
    x, cond, uncond = torch.randn(3, 2, 5, 8)
    t = torch.tensor([0.3, 0.9])
    x0_cond, x0_uncond = lens.data_prediction(x, cond, t), lens.data_prediction(x, uncond, t)

    # One step along the force is the guided prediction.
    force = distill.ca_gradient(cond, uncond, t, 5.0)
    guided = lens.data_prediction(x, sample.guide(cond, uncond, 5.0), t)
    assert torch.allclose(x0_cond - force, guided, atol=1e-5)

    plain = distill.ca_gradient(cond, uncond, t, 5.0, plain_guide)
    assert torch.allclose(plain, -4 * (x0_cond - x0_uncond), atol=1e-4)
    assert not torch.allclose(force, plain, atol=0.1)


def test_forces_are_normalised_each_sample_by_itself():
    force, y, x0 = torch.randn(3, 2, 5, 8)
    expected = distill.normalised(force, y, x0)
    assert torch.allclose(expected[0], force[0] / (y[0] - x0[0]).abs().mean())

    scale = torch.tensor([1.0, 10.0])[:, None, None]
    scaled = distill.normalised(force * scale, y * scale, x0 * scale)
    assert torch.allclose(scaled, expected, atol=1e-6)
    assert torch.isfinite(distill.normalised(force, y, y)).all()


def test_ida_alone_lags_by_32_steps():
    behind, ahead, d = torch.zeros(3), torch.zeros(3), 0.01
    for _ in range(1000):
        ahead += d
        follow([behind], [ahead], distill.IDA)
    lag = (ahead - behind) / d
    assert lag.tolist() == pytest.approx([0.97 / 0.03] * 3, rel=1e-3)              # 32.3


def test_r1_of_a_linear_head():
    w = torch.randn(6, requires_grad=True)
    x, noise = torch.randn(2, 200_000, 6)
    r1 = distill.approximate_r1(x @ w, (x + distill.R1_NOISE * noise) @ w)
    (grad,) = torch.autograd.grad(r1, w)
    expected = 0.5 * 0.01 * w.square().sum().item()                        # gamma / 2 a^2 |w|^2
    assert r1.item() == pytest.approx(expected, rel=0.02)
    assert torch.allclose(grad, 0.01 * w, atol=0.02 * 0.01 * w.abs().max().item() + 1e-4)


@pytest.mark.parametrize("tokens", [16, 36, 64, 1024, 4096, 6400])
def test_levels_of_ca_are_cleaner_than_the_students_input(tokens):
    levels = lens.sigmas(tokens, distill.STEPS)
    rng = torch.Generator().manual_seed(0)
    at_steps = distill.shifted(torch.tensor([0.75, 0.5, 0.25]), levels)
    assert torch.allclose(at_steps, levels[1:4], atol=1e-6)                # the sampler's own shift

    for k in range(distill.STEPS):
        below = 1 - k / distill.STEPS
        t = distill.draw_levels(100_000, levels, below, rng)
        assert 0 < t.min()
        assert 0.95 * levels[k] < t.max() < levels[k]
        u = distill.draw_levels(100_000, EVEN, below, rng)
        assert u.mean().item() == pytest.approx(below / 2, rel=0.01)       # even, before the shift


@pytest.mark.parametrize("grid, length", [((4, 6), 0), ((6, 6), 9)])
def test_simulation_is_the_samplers_prefix_to_the_bit(grid, length):
    model = random_model("nano", 1)
    N = grid[0] * grid[1]
    noise, text, mask = torch.randn(3, N, 16), None, None
    if length:
        text = [torch.randn(3, length, 32) for _ in range(2)]
        mask = torch.arange(length) < torch.tensor([[9], [4], [7]])

    states = [noise]
    sample.denoise(model, noise, text, mask, grid, distill.STEPS, 1.0,
                   on_step=lambda i, x, v: states.append(x.clone()))
    levels = lens.sigmas(N, distill.STEPS)
    for k in range(distill.STEPS):
        x = distill.simulate(model, noise, text, mask, grid, levels, k)
        assert torch.equal(x, states[k])

    # The last forward, which the gradient goes through, ends where the sampler ends.
    t = levels[3].expand(3)
    y = lens.data_prediction(x, model(x, t, text, mask, grid), t)
    assert torch.allclose(y, states[-1], atol=1e-5)


def test_the_heads_read_three_places_of_the_teacher():
    model = random_model("nano")
    x, t = torch.randn(2, 24, 16), torch.tensor([0.3, 0.9])
    seen = []
    model(x, t, None, None, (4, 6), on_block=lambda i, img: seen.append(img))
    features = distill.teacher_features(model, x, t, None, None, (4, 6))
    assert all_equal(features, [seen[i] for i in places(len(seen))])
    assert places(48) == [16, 32, 47]


# --- Updates: players and a batch without a run ---------------------------------------------------

@pytest.fixture(scope="module")
def base(parts, tmp_path_factory):
    """A nano model over the parts. Its gates are opened: fresh from adaLN-zero, it would not see
    its text."""
    out, model = tmp_path_factory.mktemp("base"), lens.build("nano")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    save_pipeline(out, model, metadata={"words": "[]"}, base=os.path.relpath(parts, out))
    return out


class Stage:
    """What the updates need: a run, players, optimisers, settings, and a batch at k = 2."""

    def __init__(self, base, lora=0, bf16=False, without=(), shard_dtype=None):
        self.run = Run(Path("unused"), bf16=bf16)
        self.settings = distill.settings_for("nano", lr=1e-3, without=without)
        config = lens.SIZES["nano"].transformer
        heads = distill.make_heads(config, 0)
        self.players = distill.make_players(
            load_transformer(base, "cpu", torch.float32), heads, seed=0, lora=lora,
            shard_dtype=shard_dtype)
        self.optimizers = distill.make_optimizers(self.players, self.settings)

        g = torch.Generator().manual_seed(0)
        text = [torch.randn(4, 7, 32, generator=g) for _ in range(2)]
        self.batch = distill.UpdateBatch(
            tokens=torch.randn(4, 24, 16, generator=g), text=text,
            mask=torch.arange(7) < torch.tensor([[7], [3], [5], [6]]), grid=(4, 6),
            noise=torch.randn(4, 24, 16, generator=g), levels=lens.sigmas(24, 4), k=2, rng=g)

    def critic_update(self):
        return distill.critic_update(self.run, self.players, self.batch, self.optimizers,
                                     self.settings)

    def student_update(self):
        return distill.student_update(self.run, self.players, self.batch, self.optimizers,
                                      self.settings)

    @torch.no_grad()
    def velocity_of(self, who):
        batch = self.batch
        t = batch.levels[1].expand(4)
        return self.players.as_(who)(batch.noise, t, batch.text, batch.mask, batch.grid)

    def copy_of(self, who):
        return [p.detach().clone() for p in self.players.weights(who).values()]


def test_dm_and_ca_have_levels_and_normalisers_of_their_own(base, monkeypatch):
    stage = Stage(base)
    seen, drawn = [], []
    normalised, draw_levels = distill.normalised, distill.draw_levels

    def watched_normalised(gradient, y, x0):
        seen.append((y, x0))
        return normalised(gradient, y, x0)

    def watched_draw(count, levels, below, rng):
        t = draw_levels(count, levels, below, rng)
        drawn.append((below, t))
        return t

    monkeypatch.setattr(distill, "normalised", watched_normalised)
    monkeypatch.setattr(distill, "draw_levels", watched_draw)
    stage.student_update()
    (y, x0), (same, other) = seen
    assert torch.equal(y, same)
    assert not torch.equal(x0, other)
    assert [below for below, _ in drawn] == [1.0, 0.5, 1.0]        # DM, CA at k = 2, the heads
    assert drawn[1][1].max() < stage.batch.levels[2]


@pytest.mark.parametrize("bf16", [False, True])
def test_every_weight_of_the_student_gets_a_gradient_and_the_teacher_none(base, bf16):
    """In one autocast context the casts of the simulation, made without gradient, would be kept for
    the forward pass: no gradient, no error."""
    stage = Stage(base, bf16=bf16)
    y = distill.student_prediction(stage.run, stage.players, stage.batch)
    y.square().sum().backward()
    idle = {name for name, p in stage.players.weights("student").items()
            if p.grad is None or p.grad.abs().sum() == 0}
    # The last block's text queries: nobody reads what they find.
    assert idle == {"transformer_blocks.1.attn.norm_added_q.weight"}

    stage.critic_update()
    stage.student_update()
    assert all(p.grad is None for p in stage.players.models["teacher"].parameters())
    assert all(p.grad is None for p in stage.players.weights("fake").values())


def test_heads_learn_and_push_the_student_through_the_teacher(base):
    stage = Stage(base, without=("dm", "ca", "ida"))
    first = stage.student_update()
    assert first["gan_loss"] == pytest.approx(math.log(2), abs=0.02)
    assert first["grad_norm"] == 0                 # fresh heads push nothing

    stage.optimizers["heads"].param_groups[0]["lr"] = 0.01
    stage.batch = replace(stage.batch, tokens=stage.batch.tokens + 2)
    losses = [stage.critic_update()["heads_loss"] for _ in range(60)]
    assert losses[-1] < losses[0] - 0.1
    assert stage.student_update()["grad_norm"] > 0


@pytest.mark.parametrize("without, rate", [(("ida",), 0.0), ((), 0.03)])
def test_ida_is_what_pulls_the_fake_in_the_students_update(base, without, rate):
    stage = Stage(base, without=without)
    before = stage.copy_of("fake")
    stage.student_update()
    student, fake = stage.copy_of("student"), stage.copy_of("fake")
    for f, b, s in zip(fake, before, student, strict=True):
        assert torch.allclose(f, (1 - rate) * b + rate * s, atol=1e-7)
    assert all_equal(fake, before) == (rate == 0)


def test_no_step_is_taken_along_a_gradient_that_is_not_finite(base):
    stage = Stage(base)
    before = stage.copy_of("student")
    for p in stage.players.weights("student").values():
        p.grad = torch.full_like(p, math.nan)
    assert math.isnan(distill.descend(stage.run, stage.optimizers["student"]))
    assert all_equal(stage.copy_of("student"), before)
    assert all(p.grad is None for p in stage.players.weights("student").values())


def test_adapters_start_alike_and_as_the_teacher_and_the_base_stays(base):
    def base_weights(model):
        return {name: p.clone() for name, p in model.state_dict().items() if ".lora_" not in name}

    stage = Stage(base, lora=4)
    before = base_weights(stage.players.models["teacher"])
    everyone = ("teacher", "student", "fake", "ema")
    start = {who: stage.velocity_of(who) for who in everyone}
    assert all(torch.equal(start[who], start["teacher"]) for who in everyone)
    assert all_equal(stage.copy_of("student"), stage.copy_of("fake"))

    for _ in range(2):
        stage.critic_update()
        stage.student_update()
    end = {who: stage.velocity_of(who) for who in everyone}
    assert torch.equal(end["teacher"], start["teacher"])
    assert torch.equal(end["ema"], start["ema"])
    assert not torch.equal(end["student"], start["student"])
    assert not torch.equal(end["fake"], start["fake"])
    assert not torch.equal(end["fake"], end["student"])
    after = base_weights(stage.players.models["teacher"])
    assert all(torch.equal(after[name], before[name]) for name in before)


# --- Batches --------------------------------------------------------------------------------------

def captions_only(faults=()):
    return data.Batch(samples=[1, 2], epoch=0, grid=(4, 6), text=[torch.zeros(2, 3, 32)] * 2,
                      mask=torch.ones(2, 3).bool(), faults=faults)


def test_k_is_the_same_on_all_ranks_and_the_noise_is_not():
    ks = set()
    for number in range(40):
        a, b = (distill.make_update_batch(Run(Path("unused"), rank=rank), captions_only(), number,
                                          channels=16) for rank in (0, 1))
        assert a.k == b.k
        assert not torch.equal(a.noise, b.noise)
        ks.add(a.k)
    assert ks == {0, 1, 2, 3}


class OneBatch:
    """A source that gives one batch over and over."""

    def __init__(self, batch):
        self.batch = batch

    def stream(self, planned):
        for _ in planned:
            yield self.batch


def test_unreadable_pictures_are_named_and_too_many_end_the_run(capsys):
    run = Run(Path("unused"))
    source = OneBatch(captions_only(faults=["a.tar, sample 7: truncated"]))
    batches = distill.update_batches(run, source, range(300), first=0, channels=16)
    next(batches)
    assert "a.tar, sample 7: truncated" in capsys.readouterr().err
    with pytest.raises(LensError, match="could not be read"):
        for _ in batches:
            pass


# --- Runs -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module", autouse=True)
def steady_module():
    """Precision and attention, whatever the clock says; for fixtures of the module too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit.run, "fastest_dtype", fixed_dtype)
        patch.setattr(kit.run, "fastest_attention", fixed_attention)
        yield


FLAGS = ["--size", "nano", "--eval-every", "0", "--preview-every", "0", "--save-every", "1",
         "--device", "cpu", "--lr", "0.001"]


def command(base, out, *flags):
    return [*FLAGS, "--teacher", str(base), "--out", str(out), *flags]


def go(base, out, *flags):
    """Runs the command; -> its log."""
    distill.main(command(base, out, *flags))
    return untimed_rows(out)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run of five steps."""
    out = tmp_path_factory.mktemp("whole")
    go(base, out, "--steps", "5")
    return out


def tensors(out):
    """All that the newest state holds."""
    (path,) = newest_state(out).glob("*.safetensors")
    with open_safetensors(path) as f:
        return {name: f.get_tensor(name) for name in f.keys()}


def group(state, who):
    return {name.removeprefix(f"{who}."): t for name, t in state.items()
            if name.startswith(f"{who}.")}


def assert_alike(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    groups = {name.split(".")[0] for name in a}
    assert groups == {"student", "fake", "ema", "heads", "optimizer"}
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_that_is_killed_and_told_to_stop_goes_on_to_the_bit(base, whole, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(STEADY_SCRIPT + "import sys, distill, kit.files\n"
                      "kit.files.run_command(lambda: distill.main(sys.argv[1:]))\n")
    out = tmp_path / "out"
    log = out / "metrics.jsonl"
    threads = str(torch.get_num_threads())
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}

    for notice, lines in ((signal.SIGKILL, 1), (signal.SIGTERM, 2)):
        run = subprocess.Popen([sys.executable, script, *command(base, out, "--steps", "5")],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env)
        while run.poll() is None and (not log.exists() or log.read_text().count("\n") < lines):
            time.sleep(0.02)
        run.send_signal(notice)
        said = run.communicate()[0].decode()
        if notice == signal.SIGKILL:
            assert run.returncode == -signal.SIGKILL
        else:
            assert run.returncode == 0
            assert "stopped at step" in said

    assert go(base, out, "--steps", "5") == untimed_rows(whole)
    assert [row["step"] for row in untimed_rows(out)] == [1, 2, 3, 4, 5]
    assert_alike(out, whole)


def test_a_stop_while_scenes_are_drawn_ends_well(base, tmp_path, monkeypatch):
    stopped_at = []

    def prepare(run, source, planned, stopped):
        stopped_at.append(len(planned))
        signal.raise_signal(signal.SIGTERM)
        return not stopped()

    monkeypatch.setattr(data, "prepare", prepare)
    with pytest.raises(SystemExit) as ended:
        go(base, tmp_path, "--steps", "2")
    assert ended.value.code == 0
    assert stopped_at == [2 * (distill.CRITIC + 1)]
    assert newest_state(tmp_path) is None


def test_signals_are_logged_and_all_that_should_move_moves(base, whole):
    wanted = {"loss", "dm", "ca", "gan", "cosine", "fake_loss", "heads_loss", "r1", "heads_right",
              "spread", "spread_real", "grad_norm", "k", "size"}
    log = untimed_rows(whole)
    for row in log:
        assert wanted <= row.keys()
        assert all(row[name] is not None for name in wanted)
    assert log[0]["heads_loss"] == pytest.approx(2 * math.log(2), abs=0.02)
    assert -1 <= log[0]["cosine"] <= 1
    assert "loss of the heads" in (whole / "curves.svg").read_text()

    teacher = load_transformer(base, "cpu", torch.float32)
    start, end = teacher.state_dict(), tensors(whole)
    for who in ("student", "fake", "ema"):
        own = group(end, who)
        assert set(start) - set(own) == set(teacher.unread())      # these can get no gradient
        still = [name for name, p in own.items() if torch.equal(start[name], p)]
        assert all(start[name].numel() <= 32 or "txt_norm" in name for name in still)


def test_the_student_loads_as_any_weights_do_with_four_steps_and_no_guidance(
        whole, tmp_path, capsys):
    notes = read_metadata(whole)
    assert (int(notes["steps"]), float(notes["guidance"])) == (4, 1.0)
    assert notes["command"].startswith("python distill.py")

    sample.main(["--weights", str(whole), "--prompt", "a red circle", "--out", str(tmp_path),
                 "--cache", ""])
    assert "4 steps, guidance 1," in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.png"))) == 1

    stored = load_transformer(whole).state_dict()
    for name, p in group(tensors(whole), "ema").items():
        assert torch.equal(stored[name], p)


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions.txt"
    lines = [f"a {size} {color} circle" for size in ("small", "large") for color in COLORS]
    path.write_text("\n".join(lines))
    return path


def test_captions_alone_suffice_without_a_discriminator(base, captions, tmp_path, monkeypatch,
                                                        capsys):
    def fail(*_):
        pytest.fail("a discriminator was run")

    monkeypatch.setattr(distill, "teacher_features", fail)
    out = tmp_path / "run"
    flags = ["--data", str(captions), "--without", "gan"]
    go(base, out, *flags, "--steps", "1")
    log = go(base, out, *flags, "--steps", "2")    # resumed
    assert len(log) == 2
    hint = f'done: python sample.py --prompt "a small red circle" --weights {out}'
    assert capsys.readouterr().out.splitlines()[-1] == hint
    assert not {"gan", "heads_loss", "spread_real"} & log[0].keys()
    assert all(math.isfinite(row["loss"]) for row in log)

    heads = group(tensors(out), "heads")
    fresh = distill.make_heads(lens.SIZES["nano"].transformer, 0).state_dict()
    assert heads.keys() == fresh.keys()
    assert all(torch.equal(heads[name], fresh[name]) for name in fresh)


def test_a_run_is_not_resumed_on_other_captions(base, captions, tmp_path):
    flags = ["--data", str(captions), "--without", "gan", "--steps"]
    go(base, tmp_path / "run", *flags, "1")
    captions.write_text("a red circle\na blue square")
    with pytest.raises(LensError, match="not the shards or captions"):
        go(base, tmp_path / "run", *flags, "2")


def test_a_state_is_written_after_the_weights_that_it_tells_of(base, tmp_path, monkeypatch):
    """A run killed between the two must do the step again, not take old weights for new ones."""
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "save_pipeline", killed)
    with pytest.raises(KeyboardInterrupt):
        go(base, tmp_path, "--steps", "1")
    assert newest_state(tmp_path) is None


def test_an_exported_adapter_is_the_student(base, tmp_path, capsys):
    """A change of rank 2 in one matrix, of weights and biases in the modulation, and of the time
    embedding: all of it comes through rank 4."""
    teacher = load_transformer(base, "cpu", torch.float32)
    student = load_transformer(base, "cpu", torch.float32)
    g = torch.Generator().manual_seed(0)

    def change(*shape):
        return 0.05 * torch.randn(*shape, generator=g)

    def add_of_rank(weight, rank):
        weight += 20 * change(weight.shape[0], rank) @ change(rank, weight.shape[1])

    with torch.no_grad():
        block = student.transformer_blocks[0]
        add_of_rank(block.attn.img_qkv.weight, 2)
        for layer in (block.img_mod[1], block.txt_mod[1], student.norm_out["linear"]):
            add_of_rank(layer.weight, 1)
            layer.bias += change(len(layer.bias))
        bias = student.time_text_embed["timestep_embedder"]["linear_2"].bias
        bias += 0.1 * change(len(bias))
    run, small = tmp_path / "run", tmp_path / "small"
    notes = {"steps": 4, "guidance": 1.0, "base": 64, "words": "[]"}
    save_pipeline(run, transformer=student, metadata=notes, base=os.path.relpath(base, run))

    flags = ["--size", "nano", "--teacher", str(base), "--out", str(run), "--export", str(small)]
    with pytest.raises(LensError, match="--lora"):
        distill.main(flags)
    distill.main([*flags, "--lora", "4"])
    assert "overall" in capsys.readouterr().out
    assert sample.sampler_settings(read_metadata(small), None, None) == (4, 1.0)

    exported, _, _ = load_pipeline(small, "cpu", torch.float32, parts=("transformer",))
    noise, t = torch.randn(8, 24, 16, generator=g), torch.linspace(0.1, 1, 8)
    text = [torch.randn(8, 7, 32, generator=g) for _ in range(2)]
    with torch.no_grad():
        got = exported(noise, t, text, None, (4, 6))
        wanted = student(noise, t, text, None, (4, 6))
        before = teacher(noise, t, text, None, (4, 6))
    assert (got - wanted).norm() < 0.05 * (before - wanted).norm()


@pytest.mark.parametrize("rank", (2, 6, 9))
def test_an_adapter_of_a_rank_above_a_layers_size_is_as_strong(rank):
    """It had fewer directions than its rank, and was added the more strongly for that."""
    change = torch.randn(6, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = nearest_of_rank(change, rank)
    assert (a.shape, b.shape) == ((rank, 20), (6, rank))
    left = torch.linalg.svdvals(change)[rank:].norm().item()
    assert (b @ a - change).norm() == pytest.approx(left, abs=1e-9)


def test_the_adapter_that_is_saved_is_what_was_trained_and_resumes(base, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    go(base, a, "--lora", "4", "--steps", "3")
    go(base, b, "--lora", "4", "--steps", "1")
    assert go(base, b, "--lora", "4", "--steps", "3") == untimed_rows(a)
    assert_alike(a, b)
    assert not (a / "transformer").exists()

    stage = Stage(base, lora=4)
    saved = group(tensors(a), "ema")
    with torch.no_grad():
        for name, p in stage.players.weights("ema").items():
            p.copy_(saved[name])
    wanted, teachers = stage.velocity_of("ema"), stage.velocity_of("teacher")

    loaded, _, _ = load_pipeline(a, "cpu", torch.float32, parts=("transformer",))
    batch = stage.batch
    with torch.no_grad():
        got = loaded(batch.noise, batch.levels[1].expand(4), batch.text, batch.mask, batch.grid)
    assert torch.allclose(wanted, got, atol=1e-5)
    assert not torch.allclose(got, teachers, atol=1e-5)


def test_two_processes_share_the_weights_and_one_goes_on(base, whole, tmp_path):
    """FSDP2 on two processes saves a student that loads, and a state that one process resumes."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         str(ROOT / "distill.py"), *command(base, tmp_path, "--fsdp", "--steps", "1")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]

    student = load_transformer(tmp_path, "cpu", torch.float32).state_dict()
    teacher = load_transformer(base, "cpu", torch.float32).state_dict()
    assert student.keys() == teacher.keys()
    assert any(not torch.equal(student[name], teacher[name]) for name in student)
    assert untimed_rows(tmp_path)[0]["k"] == untimed_rows(whole)[0]["k"]

    log = go(base, tmp_path, "--steps", "2")
    assert [row["step"] for row in log] == [1, 2]
    assert all(math.isfinite(row["loss"]) for row in log)
    assert tensors(tmp_path).keys() == tensors(whole).keys()


def test_a_fake_that_is_shared_out_is_pulled_as_a_whole(base, one_process, monkeypatch):
    """FSDP left gathered what is in no block, so the critic's next update saw that part of the
    fake as it had been before."""
    monkeypatch.setattr(distill, "IDA", 0.9)
    plain, shared = Stage(base), Stage(base, shard_dtype=torch.float32)
    before = plain.velocity_of("fake")
    for stage in (plain, shared):
        stage.student_update()
    expected = plain.velocity_of("fake")
    assert not torch.allclose(expected, before, atol=1e-4)
    assert torch.allclose(shared.velocity_of("fake"), expected, atol=1e-6)


# --- Evaluation and the command line --------------------------------------------------------------

def stub_evaluate(pipeline, height, width, steps, guidance, per_task, progress, diversity):
    assert progress                                # or nothing moves meanwhile
    return {"overall": steps / 100 + guidance, "measured": float(diversity)}, [], []


def test_evaluation_and_sheets_come_on_schedule(base, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "evaluate", stub_evaluate)
    log = go(base, tmp_path, "--steps", "2", "--eval-every", "2", "--preview-every", "2")
    assert "overall" not in log[0]
    assert log[1]["overall"] == pytest.approx(1.04)
    assert log[1]["measured"] == 1                 # with the diversity
    with Image.open(tmp_path / "preview-00002.png") as sheet:
        assert sheet.size == (12 * 100 - 4, 3 * 100 - 4)
    progress = read_json(newest_state(tmp_path) / "notes.json")["progress"]
    overall = {how: scores["overall"] for how, scores in progress["teacher"].items()}
    assert overall == {"20 steps, guidance 5": 5.2, "4 steps, guidance 1": 1.04}


def test_all_ranks_gather_weights_equally_often(base, monkeypatch):
    """Under FSDP one that gathers once more than the others would wait for them for ever."""
    monkeypatch.setattr(sample, "evaluate", stub_evaluate)
    stage, gathered = Stage(base), {0: 0, 1: 0}

    def count(run, model):
        gathered[run.rank] += 1
        return model if run.rank == 0 else None

    monkeypatch.setattr(distill, "unsharded", count)
    output = distill.Output(gather("teacher"), gather(base), None, None, home=(96, 96), same={})
    for rank in (0, 1):
        run = Run(Path("unused"), rank=rank, ranks=2)
        viewer = distill.Viewer(run, stage.players, output, guidance=5.0)
        progress = distill.Progress()
        viewer.evaluate(progress, say=lambda message: None)
        viewer.evaluate(progress, say=lambda message: None)
    assert gathered == {0: 4, 1: 4}


@pytest.mark.parametrize("device, flags, expected", [
    ("cpu", [], False), ("cpu", ["--compile"], True),
    ("cuda", [], True), ("cuda", ["--no-compile"], False)])
def test_blocks_are_compiled_on_a_gpu_unless_told_otherwise(
        tmp_path, monkeypatch, device, flags, expected):
    compiled = []
    monkeypatch.setattr(distill, "start_run", lambda out, *_: Run(Path(out), device=device))
    monkeypatch.setattr(distill, "distill", lambda *_, **how: compiled.append(how["compiled"]))
    distill.main(["--size", "nano", "--out", str(tmp_path), *flags])
    assert compiled == [expected]


def test_learning_rates_of_presets_and_flags():
    preset = distill.SETTINGS["toy"]
    assert distill.settings_for("toy") == preset
    adapter = distill.settings_for("toy", lora=3)
    assert adapter.stage.lr == pytest.approx(10 * preset.stage.lr)
    assert adapter.fake_lr == pytest.approx(10 * preset.fake_lr)
    asked = distill.settings_for("toy", lora=3, lr=2e-4, steps=7, guidance=2.0, without=["ca"])
    assert (asked.stage.lr, asked.stage.steps, asked.guidance) == (2e-4, 7, 2.0)
    assert asked.fake_lr == pytest.approx(2e-4 * preset.fake_lr / preset.stage.lr)
    assert asked.without == {"ca"}
    assert distill.settings_for("1b") == distill.SETTINGS["full"]


@pytest.mark.parametrize("flags, words", [
    (["--size", "huge"], "invalid choice"),
    (["--size", "full"], "--data"),
    (["--data", "none-*.tar"], "no file matches"),
    (["--data", __file__], "captions alone suffice with --without gan only"),
    (["--without", "eyes"], "--without"),
    (["--without", "ca", "--without", "dm", "--without", "gan"], "must stay"),
    (["--steps", "0"], "at least 1"),
    (["--guidance", "1"], "--guidance 1"),
    (["--lr", "0"], "--lr 0"),
    (["--lora", "-1"], "--lora"),
    (["--fsdp"], "torchrun"),
    (["--teacher", "/nowhere"], "/nowhere"),
    (["--seed", "9"], "holds another run, with --seed 0, not 9"),
    (["--lora", "4"], "holds another run, with --lora 0, not 4")])
def test_a_mistake_is_one_clear_line(base, whole, flags, words, capsys):
    assert words in error_line(distill.main, command(base, whole, *flags), capsys)


def test_a_teacher_of_another_size_is_refused(base, tmp_path, capsys):
    line = error_line(distill.main, command(base, tmp_path, "--size", "toy"), capsys)
    assert "not of size toy" in line


def test_an_adapter_does_not_go_beside_a_whole_checkpoint(base, whole, tmp_path, capsys):
    shutil.copytree(whole / "transformer", tmp_path / "transformer")
    line = error_line(distill.main, command(base, tmp_path, "--lora", "4"), capsys)
    assert "holds a whole checkpoint" in line


def test_the_state_tells_how_a_run_is_known_again(whole, base):
    notes = json.loads((newest_state(whole) / "notes.json").read_text())
    assert notes["settings"] == {
        "--size": "nano", "--teacher": str(base), "--seed": 0, "--data": None, "--lora": 0,
        "--guidance": 5.0, "--lr": 0.001, "--without": []}
    assert notes["progress"]["step"] == 5
