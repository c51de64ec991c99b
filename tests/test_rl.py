"""Reward RL: the loss against known answers, the solver, and runs that are killed and resumed."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, STEADY_SCRIPT, error_line, random_model, rows, untimed_rows
from safetensors.torch import load_file

import lens
import rl
import sample
import train
from kit.checkpoint import load_pipeline, load_transformer
from kit.lora import merge_lora
from kit.places import read_metadata
from kit.rubrics import gaming
from kit.run import Run, choose
from kit.state import check_no_other_weights, newest_state
from toy.checker import DRAWN, Checker
from toy.world import TASKS

# --- DiffusionNFT on one number -------------------------------------------------------------------
# Data N(0, 1), noise N(0, 1). Posterior of x0 at x_t: mean (1 - t) x_t / g, variance t^2 / g, with
# g = (1 - t)^2 + t^2.

def old_velocity(x, t):
    return x * (2 * t - 1) / ((1 - t) ** 2 + t**2)


def draw_batch(n, seed):
    """(x0 [n, 1, 1], x_t [n, 1, 1], t [n]) in fp64, t uniform."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(n, 1, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, 1, 1, generator=generator, dtype=torch.float64)
    t = torch.rand(n, generator=generator, dtype=torch.float64).clamp(1e-3, 1 - 1e-3)
    return x0, lens.add_noise(x0, noise, t), t


def newton_step(loss, x):
    """The minimum over x of a loss that is quadratic in it, element by element."""
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    (curve,) = torch.autograd.grad(slope.sum(), x)
    return (x - slope / curve).detach()


def mean_after(shift):
    """Mean of what the sampler makes where the velocity is old_velocity + shift(t): the flow is
    linear, so one path is enough."""
    mean, steps = 0.0, 4000
    for i in range(steps):
        t = 1 - (i + 0.5) / steps
        mean -= (old_velocity(mean, t) + shift(t)) / steps
    return mean


def test_one_converged_solve_moves_the_mean_by_a_fifth_of_a_sigma():
    # One shift of the velocity for each bin of t; of 400,000 samples each bin has 8,000.
    bins = 50
    x0, x_t, t = draw_batch(400_000, seed=0)
    bin_of = (t * bins).long()
    v_old = old_velocity(x_t, t[:, None, None])
    shift = torch.zeros(bins, dtype=torch.float64, requires_grad=True)
    v = v_old + shift[bin_of][:, None, None]

    # The reward is x0, its mean 0 and its spread 1: so it is the advantage.
    r = rl.optimality(x0).flatten()
    loss, _ = rl.nft_loss(v, v_old, v_old, x_t, x0, t, r, beta=1.0, kl=0.0, adaptive=False)
    solved = newton_step(loss.sum(), shift)

    # Known: minus the posterior's variance over 5 t.
    middle = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    expected = -middle / (5 * ((1 - middle) ** 2 + middle**2))
    assert torch.allclose(solved[5:], expected[5:], atol=0.06)
    mean = mean_after(lambda at: solved[int(at * bins)].item())
    assert abs(mean - 0.2) < 0.02


def test_a_constant_reward_gives_no_gradient():
    x0, x_t, t = draw_batch(64, seed=1)
    rewards = torch.full((4, 16), 0.7, dtype=torch.float64)
    r = rl.optimality(rl.advantages(rewards)).flatten().double()
    v_old = old_velocity(x_t, t[:, None, None])
    v = v_old.clone().requires_grad_()
    loss, _ = rl.nft_loss(v, v_old, v_old, x_t, x0, t, r)
    (gradient,) = torch.autograd.grad(loss.sum(), v)
    assert gradient.abs().max() < 1e-12


def test_the_loss_at_the_start_does_not_depend_on_the_reward():
    x0, x_t, t = draw_batch(64, seed=2)
    v = old_velocity(x_t, t[:, None, None])
    bad = torch.full((64,), 0.1, dtype=torch.float64)
    good = torch.full((64,), 0.9, dtype=torch.float64)
    loss_of_bad, _ = rl.nft_loss(v, v, v, x_t, x0, t, bad)
    loss_of_good, _ = rl.nft_loss(v, v, v, x_t, x0, t, good)
    assert torch.allclose(loss_of_bad, loss_of_good)


def paper_form(advantage):
    """1/2 + A/2, unclipped."""
    return 0.5 + 0.5 * advantage


def code_form(advantage):
    """1/2 + A/10, unclipped."""
    return 0.5 + advantage / 10


@pytest.mark.parametrize("form, expected", [(paper_form, 0.5), (code_form, 0.1)])
def test_the_reference_stops_the_mean(form, expected):
    """A policy that is one number, the mean of its data, stops at 0.5 sigma / kl with the paper's
    form of r, and at a fifth of that with the code's."""
    kl = 4.0
    x0, x_t, t = draw_batch(400_000, seed=3)
    at = t[:, None, None]
    # The velocity of data N(m, 1) is old_velocity - m pull.
    pull = at / ((1 - at) ** 2 + at**2)

    mean = torch.zeros((), dtype=torch.float64)
    for _ in range(60):
        # Its pictures have its own mean; the reward stays x0, against the mean of the group.
        learnt = mean.clone().requires_grad_()
        made, x_made = x0 + mean, x_t + (1 - at) * mean
        v_ref = old_velocity(x_made, at)
        loss, _ = rl.nft_loss(v_ref - learnt * pull, v_ref - mean * pull, v_ref, x_made, made, t,
                              form(x0).flatten(), beta=1.0, kl=kl, adaptive=False)
        mean = newton_step(loss.mean(), learnt)
    assert abs(mean.item() - expected / kl) < 0.1 * expected / kl


def test_advantages_know_failures():
    rewards = torch.tensor([[0.0, 1.0, math.nan], [math.nan] * 3, [0.5, 0.5, 0.5]])
    spread = torch.tensor([0.0, 1.0, 0.5, 0.5, 0.5]).std(correction=0) + 1e-4
    expected = torch.tensor([[-0.5, 0.5, 0.0], [0.0] * 3, [0.0] * 3]) / spread
    assert torch.allclose(rl.advantages(rewards), expected)
    assert torch.equal(rl.advantages(torch.full((2, 2), math.nan)), torch.zeros(2, 2))


def test_optimality_is_clipped():
    r = rl.optimality(torch.tensor([-99.0, 0.0, 2.0, 99.0]))
    assert r.tolist() == pytest.approx([0.0, 0.5, 0.7, 1.0])


def test_the_adaptive_weight_has_no_gradient_and_the_scale_of_errors_falls_out():
    x0, x_t, t = draw_batch(8, seed=4)
    v_old = old_velocity(x_t, t[:, None, None])
    v = (v_old + 0.1).requires_grad_()
    r = torch.full((8,), 0.7, dtype=torch.float64)
    loss, _ = rl.nft_loss(v, v_old, v_old, x_t, x0, t, r, kl=0.0)

    # Of one number a sample, |e|^2 / |e| is |e|.
    plus = (lens.data_prediction(x_t, v, t) - x0).flatten()
    minus = (lens.data_prediction(x_t, 2 * v_old - v, t) - x0).flatten()
    assert torch.allclose(loss, 0.7 * plus.abs() + 0.3 * minus.abs(), rtol=1e-5)

    (gradient,) = torch.autograd.grad(loss.sum(), v)
    expected = 2 * t * (0.3 * minus.sign() - 0.7 * plus.sign())
    assert torch.allclose(gradient.flatten(), expected.detach(), rtol=1e-5)


def test_drift_is_the_distance_from_the_reference():
    x0, x_t, t = draw_batch(8, seed=5)
    v_old = old_velocity(x_t, t[:, None, None])
    r = torch.full((8,), 0.5, dtype=torch.float64)
    near, drift = rl.nft_loss(v_old, v_old, v_old + 3, x_t, x0, t, r, kl=0.0)
    far, _ = rl.nft_loss(v_old, v_old, v_old + 3, x_t, x0, t, r, kl=0.1)
    assert torch.allclose(drift, torch.full_like(drift, 9.0))
    assert torch.allclose(far - near, torch.full_like(drift, 0.9))


# --- NormGuard: no velocity longer than the reference's -------------------------------------------

def random_velocity(seed, tokens=5):
    """[2, tokens, 3] in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, 3, generator=generator, dtype=torch.float64)


def test_a_velocity_that_is_too_long_pays_for_its_excess():
    v_ref = random_velocity(0)
    length = v_ref.square().mean(2).sqrt()                            # [2, 5]
    for factor in (1.1, 3.0, -3.0):                                   # a length has no sign
        excess, ratio = rl.norm_guard(factor * v_ref, v_ref)
        assert torch.allclose(excess, (abs(factor) - 1) * length.mean(1))
        assert torch.allclose(ratio, torch.full_like(ratio, abs(factor)))


@pytest.mark.parametrize("factor", [1.0, 0.9, 0.0, -0.5])
def test_a_velocity_that_is_not_too_long_is_left_alone(factor):
    v_ref = random_velocity(1)
    v = (factor * v_ref).requires_grad_()
    excess, ratio = rl.norm_guard(v, v_ref)
    (gradient,) = torch.autograd.grad(excess.sum(), v)
    assert torch.equal(excess, torch.zeros_like(excess))
    assert torch.equal(gradient, torch.zeros_like(v))
    assert torch.allclose(ratio, torch.full_like(ratio, abs(factor)), atol=1e-5)


def test_the_guard_shortens_and_does_not_turn():
    """Its slope is the token's own direction, as steep for a small excess as for a large one."""
    v_ref = random_velocity(2).requires_grad_()
    for factor in (1.001, 3.0):
        v = (factor * v_ref).detach().requires_grad_()
        excess, _ = rl.norm_guard(v, v_ref)
        slope, slope_ref = torch.autograd.grad(excess.sum(), (v, v_ref), allow_unused=True)
        length = v.square().mean(2, keepdim=True).sqrt()
        assert torch.allclose(slope, v / length / (5 * 3))            # tokens times channels
        assert slope_ref is None


def test_a_short_token_does_not_pay_for_a_long_one():
    v_ref = torch.ones(1, 2, 4, dtype=torch.float64)
    v = torch.stack([2.5 * v_ref[:, 0], -0.5 * v_ref[:, 1]], 1)       # lengths 2.5 and 0.5
    excess, ratio = rl.norm_guard(v, v_ref)
    assert excess.item() == pytest.approx((1.5 + 0) / 2)
    assert ratio.item() == pytest.approx((2.5 + 0.5) / 2)
    # Nor does a short picture for a long one.
    excess, _ = rl.norm_guard(torch.cat([2 * v_ref, 0 * v_ref]), torch.cat([v_ref, v_ref]))
    assert excess.tolist() == pytest.approx([1, 0])


def test_the_guards_gradient_is_the_limit_of_differences():
    v, v_ref = random_velocity(3).requires_grad_(), random_velocity(4)
    long = rl.token_lengths(v) > rl.token_lengths(v_ref)
    assert long.any() and not long.all()
    assert torch.autograd.gradcheck(lambda v: rl.norm_guard(v, v_ref), v)


def test_no_velocity_at_all_has_a_gradient():
    for dtype in (torch.float32, torch.float64):
        v = torch.zeros(1, 2, 3, dtype=dtype, requires_grad=True)
        excess, ratio = rl.norm_guard(v, torch.zeros_like(v))
        gradients = torch.autograd.grad(excess.sum() + ratio.sum(), v)
        assert torch.equal(gradients[0], torch.zeros_like(v))


def policies_that_have_learnt(norm_guard):
    """rl.Policies of a random nano model, whose `new` and `old` have left the reference."""
    settings = replace(rl.SETTINGS["nano"], norm_guard=norm_guard)
    policies = rl.Policies(random_model(), settings, seed=0)
    rng = torch.Generator().manual_seed(5)
    for p in policies.parameters("new") + policies.parameters("old"):
        p.data.normal_(std=0.2, generator=rng)
    return policies


def gradient_of(policies):
    """That of `new`, flat; and it is taken away."""
    gradient = torch.cat([p.grad.flatten() for p in policies.parameters("new")])
    policies.optimizer.zero_grad()
    return gradient


def test_the_guard_is_added_to_a_steps_loss_and_weight_0_leaves_it_as_it_was():
    policies = policies_that_have_learnt(norm_guard=0.0)
    guarded = policies_that_have_learnt(norm_guard=0.3)
    run, config, rng = Run("unused"), policies.model.config, torch.Generator().manual_seed(6)
    tokens = torch.randn(4, 6, config.in_channels, generator=rng)
    text = [torch.randn(1, 3, config.enc_hidden_dim, generator=rng) for _ in range(2)]
    group, r = rl.Group(tokens, [], text, (2, 3)), torch.tensor([0.9, 0.1, 0.5, 0.6])
    sums = rl.group_loss(run, policies, group, r, total=8, key=(0, 0))
    guarded_sums = rl.group_loss(run, guarded, group, r, total=8, key=(0, 0))
    gradient, guarded_gradient = gradient_of(policies), gradient_of(guarded)

    # The loss without a guard, written out: 4 pictures at 2 levels are one batch.
    noise_rng = rl.generator(run.seed, 0, 0, rl.NO_PICTURE)
    ((x0, noise, t, share),) = rl.noised_batches(tokens, r, policies.settings, noise_rng)
    x_t = lens.add_noise(x0, noise, t)
    text = [layer.expand(8, -1, -1) for layer in text]
    with torch.no_grad():
        v_old = policies.velocity("old", x_t, t, text, (2, 3))
        v_ref = policies.velocity(None, x_t, t, text, (2, 3))
    v = policies.velocity("new", x_t, t, text, (2, 3))
    loss, drift = rl.nft_loss(v, v_old, v_ref, x_t, x0, t, share)
    (loss.sum() / 8).backward()
    plain_gradient = gradient_of(policies)
    assert plain_gradient.abs().max() > 1e-3
    assert torch.equal(gradient, plain_gradient)
    assert torch.equal(sums[:2], torch.stack([loss.sum(), drift.sum()]))

    excess, ratio = rl.norm_guard(v.detach(), v_ref)
    assert excess.min() > 1e-3
    assert torch.allclose(guarded_sums, sums + 0.3 * torch.stack([excess.sum(), *torch.zeros(2)]))
    assert sums[2].item() == pytest.approx(ratio.sum().item())
    assert not torch.allclose(guarded_gradient, gradient, rtol=0.01)


# --- The solver -----------------------------------------------------------------------------------

def even_levels(image_tokens, steps):
    return torch.linspace(1, 0, steps + 1)


def test_the_solver_is_of_second_order(monkeypatch):
    """Against 400 steps: half the step, about a quarter of the error; Euler's is about a half."""
    model, _, encoder = load_pipeline(sample.TOY, "cpu", torch.float32)
    prompt = "a large red circle in the center. the background is black"
    (features,) = encoder.encode_each([prompt])
    text = [layer.expand(2, -1, -1) for layer in features[:, None]]
    noise = torch.cat([sample.picture_noise(seed, (4, 4), 32) for seed in range(2)])

    # The shift of the levels depends on the number of steps: leave it out.
    monkeypatch.setattr(lens, "sigmas", even_levels)
    exact = sample.denoise(model, noise, text, None, (4, 4), 400)

    def error(tokens):
        return (tokens - exact).square().mean().sqrt().item()

    ours, euler = {}, {}
    for steps in (20, 40):
        ours[steps] = error(rl.rollout(model, noise, text, (4, 4), steps))
        euler[steps] = error(sample.denoise(model, noise, text, None, (4, 4), steps))
    assert ours[20] > 3 * ours[40]
    assert euler[20] < 3 * euler[40]
    assert ours[20] < euler[20]
    assert ours[40] < 0.6 * euler[40]


def test_with_one_step_the_solver_is_eulers():
    model = load_transformer(sample.TOY, "cpu", torch.float32)
    noise = sample.picture_noise(0, (4, 4), 32)
    text = [torch.randn(1, 5, model.config.enc_hidden_dim) for _ in model.txt_norm]
    ours = rl.rollout(model, noise, text, (4, 4), steps=1)
    assert torch.equal(ours, sample.denoise(model, noise, text, None, (4, 4), steps=1))


# --- Small parts ----------------------------------------------------------------------------------

def test_every_row_comes_once_before_any_comes_again():
    names = [str(k) for k in range(10)]
    taken = []
    for step in range(5):
        taken += rl.rows_of_step(names, 4, step, seed=3)
    assert sorted(taken[:10]) == names
    assert sorted(taken[10:]) == names
    assert taken[:10] != taken[10:]


def warnings_of(history):
    """The warning after each step."""
    return [gaming(history[:k + 1]) for k in range(len(history))]


RISING = [(0.5 + 0.01 * k, 1.0, 0.9) for k in range(20)]


def test_gaming_is_told_when_diversity_falls_under_a_rising_reward():
    warnings = warnings_of(RISING + [(0.8, 0.5, 0.9)] * 20)
    assert warnings[:20] == [""] * 20
    assert any("diversity" in warning for warning in warnings)


def test_nothing_is_told_where_the_reward_does_not_rise():
    assert warnings_of([(0.5, 1.0 - 0.05 * k, 0.9) for k in range(15)]) == [""] * 15


def test_gaming_is_told_when_held_out_rubrics_fall():
    warnings = warnings_of([(0.5, 1.0, 0.9)] * 10 + [(0.8, 1.0, 0.6)] * 20)
    assert warnings[:10] == [""] * 10
    assert any("held-out" in warning for warning in warnings)


def test_gaming_is_told_of_the_newest_ten_against_the_first_ten():
    history = [(0.5, 1.0, 0.9)] * 10 + [(0.8, 0.1, 0.9)] * 50
    assert gaming(history) == "diversity fell to 0.10 of the start's"
    assert gaming(history + [(0.5, 1.0, 0.9)] * 10) == ""


def test_a_resumed_run_keeps_to_its_precision_and_kernel(tmp_path, steady):
    config = lens.SIZES["nano"].transformer
    run = Run(tmp_path)
    kept = {"bf16": True, "attention": "math"}
    choose(run, config, tokens=20)
    assert (run.bf16, run.attention) == (False, "flash")
    choose(run, config, tokens=20, kept=kept)
    assert (run.bf16, run.attention) == (True, "math")
    choose(run, config, tokens=20, dtype="fp32", kept=kept)
    assert (run.bf16, run.attention) == (False, "math")


def test_policies_start_alike_and_the_base_is_frozen():
    model = lens.build("nano", seed=0)
    policies = rl.Policies(model, rl.SETTINGS["nano"], seed=0)
    new = policies.parameters("new")
    for name in ("old", "ema"):
        for a, b in zip(policies.parameters(name), new):
            assert torch.equal(a, b)
            assert a is not b
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    assert learning == {id(p) for p in new}


def test_old_and_average_follow_and_a_bad_gradient_touches_nothing():
    run, model = Run("unused"), lens.build("nano", seed=0)
    policies = rl.Policies(model, rl.SETTINGS["nano"], seed=0)
    before = [p.clone() for p in policies.parameters("new")]

    for p in policies.parameters("new"):
        p.grad = torch.full_like(p, math.nan)
    policies.learn(run, step=0)
    for p, was in zip(policies.parameters("new"), before):
        assert torch.equal(p, was)

    for p in policies.parameters("new"):
        p.grad = torch.ones_like(p)
    _, eta = policies.learn(run, step=4)
    assert eta == 0.005
    followers = zip(policies.parameters("new"), policies.parameters("old"),
                    policies.parameters("ema"), before)
    for new, old, ema, was in followers:
        assert torch.allclose(old, torch.lerp(was, new, 0.995), atol=1e-7)
        assert torch.allclose(ema, torch.lerp(was, new, 1 - 5 / 14), atol=1e-7)


# --- Runs -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def base(parts, tmp_path_factory):
    """A nano model with all its parts."""
    out = tmp_path_factory.mktemp("base")
    train.main(["--size", "nano", "--parts", str(parts), "--out", str(out), "--steps", "6",
                "--preview-every", "0"])
    return out


def flags(base, out, *more):
    return ["--size", "nano", "--init", str(base), "--out", str(out), "--pool", "12",
            "--eval-every", "0", "--preview-every", "0", "--dtype", "fp32", "--device", "cpu",
            "--save-every", "1", *more]


def go(base, out, *more):
    """Runs rl.py -> the lines of its log, without what a clock fills in."""
    rl.main(flags(base, out, *more))
    return untimed_rows(out)


def steady_script(folder):
    """rl.py as a script whose choices no clock makes."""
    path = folder / "run.py"
    path.write_text(f"{STEADY_SCRIPT}\nimport sys\nimport rl\nrl.main(sys.argv[1:])\n")
    return str(path)


# How such a script finds rl.py, on one thread as two processes share the machine.
CHILD = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def state(out):
    """{name: tensor} of a run's state."""
    tensors = {}
    for file in newest_state(out).glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run of four steps that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kit.run.fastest_attention", lambda *_: ("flash", "tests compare numbers"))
        go(base, out, "--steps", "4")
    return out


def test_a_run_learns_from_the_frozen_model(whole):
    log = untimed_rows(whole)
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert log[0]["drift"] == 0
    assert log[-1]["drift"] > 0
    assert log[0]["length"] == 1
    assert log[-1]["length"] == pytest.approx(1, abs=0.1)
    for row in log:
        assert math.isfinite(row["loss"])
        assert 0 <= row["reward"] <= 1
        assert set(row["rubrics"]) >= {"coherent", "held_out", "clean", "textured"}
        held_out = (row["rubrics"]["clean"] + row["rubrics"]["textured"]) / 2
        assert row["rubrics"]["held_out"] == pytest.approx(held_out, abs=1e-3)
    assert "<polyline" in (whole / "curves.svg").read_text()


def test_resume_goes_on_to_the_bit(base, whole, tmp_path, steady):
    go(base, tmp_path, "--steps", "2")
    assert go(base, tmp_path, "--steps", "4") == untimed_rows(whole)
    ours, theirs = state(tmp_path), state(whole)
    assert ours.keys() == theirs.keys()
    assert {name.split(".")[0] for name in ours} == {"new", "old", "ema", "optimizer"}
    for name in ours:
        assert torch.equal(ours[name], theirs[name])


def test_a_killed_run_gives_the_same_rewards(base, whole, tmp_path, steady):
    out = tmp_path / "killed"
    command = [sys.executable, steady_script(tmp_path), *flags(base, out, "--steps", "4")]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           env={**CHILD, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    end = time.time() + 120
    while time.time() < end and newest_state(out) is None:
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert go(base, out, "--steps", "4") == untimed_rows(whole)


class TellsToStop(Checker):
    """A judge that sends SIGTERM, as a cluster does, with its sixth group: in the second step."""
    groups = 0

    def __call__(self, pictures, rows):
        self.groups += 1
        if self.groups == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(pictures, rows)


def test_sigterm_saves_and_the_run_goes_on(base, whole, tmp_path, steady, monkeypatch, capsys):
    monkeypatch.setattr(rl, "Checker", TellsToStop)
    log = go(base, tmp_path, "--steps", "4", "--save-every", "100")
    assert len(log) == 2
    assert "stopped at step" in capsys.readouterr().out
    monkeypatch.undo()
    assert go(base, tmp_path, "--steps", "4") == untimed_rows(whole)


def test_two_processes_do_what_one_does_and_one_goes_on(base, whole, tmp_path):
    out = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               steady_script(tmp_path), *flags(base, out, "--steps", "2")]
    subprocess.run(command, check=True, capture_output=True, env=CHILD)
    log = go(base, out, "--steps", "3")
    assert len(log) == 3
    for ours, theirs in zip(log, untimed_rows(whole)):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["reward"] == pytest.approx(theirs["reward"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["diversity"] == pytest.approx(theirs["diversity"], abs=1e-3)


def test_what_is_saved_is_a_lora_that_merges(base, whole, tmp_path, capsys):
    plain = load_transformer(base, "cpu", torch.float32).state_dict()
    merged = load_transformer(base, "cpu", torch.float32)
    assert merge_lora(merged, whole) > 0
    merged = merged.state_dict()
    taken_as_weights = load_transformer(whole, "cpu", torch.float32).state_dict()
    assert all(torch.equal(merged[name], taken_as_weights[name]) for name in plain)
    assert read_metadata(whole)["guidance"] == "1.0"              # as it was trained
    rl.main(["--size", "nano", "--init", str(base), "--out", str(whole),
             "--merge", str(tmp_path / "merged")])
    assert "layers changed" in capsys.readouterr().out
    written = load_transformer(tmp_path / "merged", "cpu", torch.float32).state_dict()
    for name in plain:
        assert torch.equal(merged[name], written[name])
    assert any(not torch.equal(plain[name], merged[name]) for name in plain)
    assert float(read_metadata(tmp_path / "merged")["guidance"]) == 1.0


def test_the_state_is_saved_last(base, tmp_path, steady, monkeypatch):
    """A run that is killed while it saves its state has the adapter of that step already."""
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rl, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        go(base, tmp_path, "--steps", "1")
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert newest_state(tmp_path) is None


def test_a_resumed_run_keeps_what_it_has_seen(base, whole):
    notes = json.loads((newest_state(whole) / "notes.json").read_text())
    history = notes["progress"]["history"]
    expected = [[row["reward"], row["diversity"], row["rubrics"]["held_out"]]
                for row in untimed_rows(whole)]
    assert history == expected


def test_sample_takes_the_lora(base, whole, tmp_path):
    sample.main(["--weights", str(base), "--lora", str(whole), "--prompt", "a red circle",
                 "--guidance", "1", "--steps", "2", "--out", str(tmp_path), "--cache", ""])
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_evaluation_and_sheets_come_on_schedule(base, tmp_path, steady, capsys):
    log = go(base, tmp_path, "--steps", "2", "--eval-every", "2", "--preview-every", "1",
             "--per-task", "1")
    said = capsys.readouterr()
    assert "before step 1: pictures of the base" in said.out
    assert said.out.splitlines()[-1] == f"done: python sample.py --eval --weights {tmp_path}"
    for bar in ("denoise", "diversity"):
        assert bar in said.err
    names = {"overall", *TASKS, *DRAWN, "diversity"}
    assert not names - {"diversity"} & log[0].keys()
    assert names <= log[1].keys()
    sheets = {path.name for path in tmp_path.glob("*.png")}
    assert sheets == {"before.png", "preview-0001.png", "preview-0002.png"}

    notes = json.loads((newest_state(tmp_path) / "notes.json").read_text())
    assert notes["progress"]["base"].keys() == notes["progress"]["scores"].keys() == names


# --- A judge behind an endpoint -------------------------------------------------------------------

def all_yes(request):
    words = request["messages"][0]["content"][1]["text"]
    return json.dumps({k: 1 for k in range(1, words.count("\n") + 1)})


def write_rows(path, count):
    rubrics = [{"name": "a", "check": "red"}, {"name": "b", "check": "circle", "held_out": True}]
    lines = [json.dumps({"prompt": f"a red circle number {k}", "rubrics": rubrics})
             for k in range(count)]
    path.write_text("\n".join(lines) + "\n")


def test_a_run_goes_on_when_its_judge_dies(base, server, tmp_path, capsys):
    write_rows(tmp_path / "prompts.jsonl", 8)
    some_no = '{"1": 0, "2": 1, "3": 0}'
    server.script = [all_yes] * 20 + [some_no] * 12 + [400]
    log = go(base, tmp_path / "run", "--steps", "3", "--data", str(tmp_path / "prompts.jsonl"),
             "--endpoint", server.url)
    hint = capsys.readouterr().out.splitlines()[-1]
    assert hint.startswith("done: python sample.py --prompt ")
    assert hint.endswith(f" --weights {tmp_path / 'run'}")
    assert 0 < log[1]["reward"] <= 1
    assert sum(row["failures"] for row in log) == log[-1]["judge_failed"] > 0
    for row in log:
        assert math.isfinite(row["loss"])


def test_a_run_whose_judge_stays_silent_saves_and_stops(base, server, tmp_path, capsys):
    write_rows(tmp_path / "prompts.jsonl", 8)
    # One answer when the run asks whether the judge is there, then a good step.
    server.script = [all_yes] * 17 + ["I would rather not."] * 1000
    # The guard needs no rewards; without it nothing is learnt.
    flagged = flags(base, tmp_path / "run", "--steps", "6", "--save-every", "100",
                    "--data", str(tmp_path / "prompts.jsonl"), "--endpoint", server.url,
                    "--norm-guard", "0")
    line = error_line(rl.main, flagged, capsys)
    assert "stopped and saved at step 4: most pictures of 3 steps" in line
    assert "'nonsense': 48" in line
    log = rows(tmp_path / "run")
    assert [row["failures"] for row in log] == [0, 16, 16, 16]
    assert log[1]["reward"] is None
    assert log[1]["grad_norm"] < 1e-6                 # r is 1/2 everywhere: both pulls cancel
    assert newest_state(tmp_path / "run").name.endswith("4")

    server.script = [all_yes]                         # the judge is back: the same command
    rl.main(flagged)
    assert [row["failures"] for row in rows(tmp_path / "run")] == [0, 16, 16, 16, 0, 0]


def test_steps_that_are_not_finite_end_the_run(base, tmp_path, monkeypatch, capsys):
    """It ran to its end, had learnt nothing, and said that it was done."""
    monkeypatch.setattr(train, "PATIENCE", 2)
    monkeypatch.setattr(rl.Policies, "learn", lambda *_: (math.nan, 0.0))
    line = error_line(rl.main, flags(base, tmp_path), capsys)
    assert "2 steps in a row had a gradient that was not finite" in line


# --- Mistakes -------------------------------------------------------------------------------------

@pytest.mark.parametrize("more, words", [
    (["--seed", "5"], "--seed 0, not 5"),
    (["--lr", "0.5"], "--lr 0.001, not 0.5"),
    (["--norm-guard", "0"], "--norm-guard 0.3, not 0.0"),
    (["--pool", "13"], "--pool 12, not 13"),
])
def test_another_run_is_not_resumed(base, whole, more, words, capsys):
    assert words in error_line(rl.main, flags(base, whole, *more), capsys)


def test_the_number_of_steps_may_change(base, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    assert len(go(base, tmp_path / "run", "--steps", "5")) == 5


def test_a_folder_with_a_checkpoint_is_refused(base, capsys):
    line = error_line(rl.main, flags(base, base), capsys)
    assert "holds a whole checkpoint" in line
    check_no_other_weights(base, adapter=False)       # nothing was written


@pytest.mark.parametrize("more, words", [
    (["--tasks", "singing"], "--tasks"),
    (["--data", "none.jsonl", "--endpoint", "http://x"], "no prompts there"),
    (["--data", "none.jsonl"], "--endpoint"),
    (["--write-prompts", "out.jsonl"], "--endpoint"),
    (["--init", str(sample.TOY)], "not of size nano"),
    (["--steps", "0"], "at least 1"),
    (["--norm-guard", "-0.1"], "--norm-guard: must be at least 0"),
    (["--lr", "0"], "--lr 0.0: must be above 0"),
    (["--size", "full"], "name prompts with rubrics with --data"),
    (["--size", "enormous"], "--size"),
])
def test_mistakes_are_one_line(base, tmp_path, more, words, capsys):
    assert words in error_line(rl.main, flags(base, tmp_path / "run", *more), capsys)


def test_the_log_tells_times(whole):
    for row in rows(whole):
        assert row["sample_s"] > 0
        assert row["train_s"] > 0
        assert row["seconds"] > 0
