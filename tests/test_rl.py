"""Reward RL: the loss against known answers, judges against a bad server, and a run that is killed."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import lens
import rl
import sample
import train
from lens import LensError

ROOT = Path(__file__).resolve().parent.parent


# --- DiffusionNFT on one number: data N(0, 1), noise N(0, 1). Posterior of x0 at x_t: mean (1 - t) x / g, variance t^2 / g.

def old_velocity(x, t):
    return x * (2 * t - 1) / ((1 - t) ** 2 + t**2)


def batch(n, seed, t):
    g = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(n, 1, 1, generator=g, dtype=torch.float64), torch.randn(n, 1, 1, generator=g, dtype=torch.float64)
    t = torch.rand(n, generator=g, dtype=torch.float64).clamp(1e-3, 1 - 1e-3) if t is None else t
    return x0, lens.add_noise(x0, eps, t), t


def mean_after(shift):
    """Mean of what the sampler makes where the velocity is old_velocity + shift(t): the flow is linear, so one path is enough."""
    m, steps = 0.0, 4000
    for i in range(steps):
        t = 1 - (i + 0.5) / steps
        m -= (old_velocity(m, t) + shift(t)) / steps
    return m


def solve(r_of, kl=0.0, rounds=1, seed=0, bins=50):
    """Minimises rl.nft_loss over one shift of the velocity per bin of t, `rounds` times, the old policy following: -> shift by bin."""
    old = torch.zeros(bins, dtype=torch.float64)
    x0, x_t, t = batch(400_000, seed, None)
    where, v_ref = (t * bins).long(), old_velocity(x_t, t[:, None, None])
    for _ in range(rounds):
        shift = old.clone().requires_grad_()
        v = v_ref + shift[where][:, None, None]
        v_old = v_ref + old[where][:, None, None]
        loss, _ = rl.nft_loss(v, v_old, v_ref, x_t, x0, t, r_of(x0).flatten(), 1.0, kl, adaptive=False)
        (slope,) = torch.autograd.grad(loss.sum(), shift, create_graph=True)       # the loss is quadratic and the bins are apart: one Newton step solves it
        (curve,) = torch.autograd.grad(slope.sum(), shift)
        old = (shift - slope / curve).detach()
    return old


def test_one_converged_solve_moves_the_mean_by_a_fifth_of_a_sigma():
    shift = solve(rl.optimality)                                                   # reward x0, its mean 0 and its spread 1: the advantage is x0
    t = (torch.arange(50) + 0.5) / 50
    assert torch.allclose(shift[5:], (-t / (5 * ((1 - t) ** 2 + t**2)))[5:].double(), atol=0.06)       # - posterior variance / (5 t)
    assert abs(mean_after(lambda at: shift[int(at * 50)].item()) - 0.2) < 0.02


def test_a_constant_reward_gives_no_gradient():
    x0, x_t, t = batch(64, 1, None)
    r = rl.optimality(rl.advantages(torch.full((4, 16), 0.7, dtype=torch.float64))).flatten().double()
    v_old = old_velocity(x_t, t[:, None, None])
    v = v_old.clone().requires_grad_()
    loss, _ = rl.nft_loss(v, v_old, v_old, x_t, x0, t, r)
    (grad,) = torch.autograd.grad(loss.sum(), v)
    assert grad.abs().max() < 1e-12


def test_the_loss_at_the_start_does_not_depend_on_the_reward():
    x0, x_t, t = batch(64, 2, None)
    v = old_velocity(x_t, t[:, None, None])
    a, b = (rl.nft_loss(v, v, v, x_t, x0, t, torch.full((64,), r, dtype=torch.float64))[0] for r in (0.1, 0.9))
    assert torch.allclose(a, b)


@pytest.mark.parametrize("form, expected", [(lambda x: 0.5 + 0.5 * x, 0.5), (lambda x: 0.5 + x / 10, 0.1)])
def test_the_reference_stops_the_mean(form, expected):
    """A policy that is one number, the mean of its data, with kl k stops at 0.5 sigma / k where r = 1/2 + A/2 (the paper's form, unclipped),
    and at a fifth of that where r = 1/2 + A/10."""
    kl, x0, x_t, t = 4.0, *batch(400_000, 3, None)
    mean = torch.zeros((), dtype=torch.float64)
    at = t[:, None, None]
    pull = at / ((1 - at) ** 2 + at**2)                                            # the velocity of data N(m, 1) is old_velocity - m * pull
    v_ref = old_velocity(x_t, at)
    for _ in range(60):                                                            # its pictures have its own mean; the reward stays x0, against the group's mean
        moved, learnt = x0 + mean, mean.clone().requires_grad_()
        x_moved = x_t + (1 - at) * mean
        v_then = old_velocity(x_moved, at)
        loss, _ = rl.nft_loss(v_then - learnt * pull, v_then - mean * pull, v_then, x_moved, moved, t, form(x0).flatten(), 1.0, kl, adaptive=False)
        (slope,) = torch.autograd.grad(loss.mean(), learnt, create_graph=True)
        (curve,) = torch.autograd.grad(slope, learnt)
        mean = (learnt - slope / curve).detach()
    assert abs(mean.item() - expected / kl) < 0.1 * expected / kl
    assert torch.isfinite(v_ref).all()


def test_advantages_know_failures():
    rewards = torch.tensor([[0.0, 1.0, math.nan], [math.nan] * 3, [0.5, 0.5, 0.5]])
    a = rl.advantages(rewards)
    spread = torch.tensor([0.0, 1.0, 0.5, 0.5, 0.5]).std(correction=0) + 1e-4
    assert torch.allclose(a, torch.tensor([[-0.5, 0.5, 0.0], [0.0] * 3, [0.0] * 3]) / spread)
    assert rl.optimality(torch.tensor([-99.0, 0.0, 2.0, 99.0])).tolist() == pytest.approx([0.0, 0.5, 0.7, 1.0])
    assert torch.equal(rl.advantages(torch.full((2, 2), math.nan)), torch.zeros(2, 2))


def test_the_adaptive_weight_has_no_gradient_and_makes_the_scale_of_errors_fall_out():
    x0, x_t, t = batch(8, 4, None)
    v_old = old_velocity(x_t, t[:, None, None])
    v = (v_old + 0.1).requires_grad_()
    r = torch.full((8,), 0.7, dtype=torch.float64)
    loss, _ = rl.nft_loss(v, v_old, v_old, x_t, x0, t, r, kl=0.0)
    plus, minus = lens.data_prediction(x_t, v, t) - x0, lens.data_prediction(x_t, 2 * v_old - v, t) - x0
    assert torch.allclose(loss, 0.7 * plus.abs().flatten() + 0.3 * minus.abs().flatten(), rtol=1e-5)           # one number a sample: |e|^2 / |e|
    (grad,) = torch.autograd.grad(loss.sum(), v)
    assert torch.allclose(grad.flatten(), 2 * t * (-0.7 * plus.sign() + 0.3 * minus.sign()).detach().flatten(), rtol=1e-5)


def test_the_solver_is_of_second_order():
    """Against 400 steps: at 20 steps the error is well below Euler's, and halving the steps costs more than twice."""
    model, _, encoder = lens.load_pipeline(sample.TOY, "cpu", torch.float32)
    (text,) = sample.encode(encoder, ["a large red circle in the center. the background is black"])
    noise = torch.cat([sample.picture_noise(k, (6, 6), 32) for k in range(4)])
    given = [layer.expand(4, -1, -1) for layer in text[:, None]]
    levels = lens.sigmas
    try:                                                                           # the grid's shift depends on the number of steps: fix it
        lens.sigmas = lambda tokens, steps: torch.linspace(1, 0, steps + 1) ** 1.0
        exact = sample.denoise(model, noise, given, None, (6, 6), 400, 1.0)
        error = lambda x: (x - exact).square().mean().sqrt().item()
        ours = [error(rl.rollout(model, noise, given, (6, 6), n)) for n in (10, 20, 40)]
        euler = [error(sample.denoise(model, noise, given, None, (6, 6), n, 1.0)) for n in (10, 20, 40)]
    finally:
        lens.sigmas = levels
    assert all(a < b for a, b in zip(ours[1:], euler[1:])) and ours[2] < 0.6 * euler[2]


# --- Judges

def test_the_checker_is_a_good_judge_and_true_scenes_are_coherent_and_clean():
    table, failures = rl.judge_check(rl.Checker(), 60, 0, data.bucket(128))
    assert failures == 0 and all(yes >= 0.99 * of_yes and no >= 0.99 * of_no for yes, of_yes, no, of_no in table.values()) and len(table) == 6
    rows = [rl.toy_row(5, i, data.TASKS, data.buckets(96)) for i in range(60)]
    scenes = [sample.sampled(5, 77, i, *row["size"], task=data.TASKS[i % 6])[0] for i, row in enumerate(rows)]
    answers = rl.Checker()([data.draw(scene, *row["size"]) for scene, row in zip(scenes, rows)], rows)
    assert np.mean([all(a) for a in answers]) >= 0.98
    blank = rl.Checker()([np.full((96, 96, 3), 128, np.uint8)], rows[:1])[0]
    assert rl.reward_of(blank, rows[0]["rubrics"]) < 1


def test_specks_are_seen_by_the_held_out_rubric_alone():
    row = rl.toy_row(5, 0, data.TASKS, [(96, 96)])
    picture = np.array(data.draw(sample.sampled(5, 77, 0, 96, 96, task=data.TASKS[0])[0], 96, 96))
    for k in range(14):
        picture[6 * k:6 * k + 4, 1:5] = (255, 0, 0) if k % 2 else (0, 0, 255)
    answers = dict(zip((rubric["name"] for rubric in row["rubrics"]), rl.Checker()([picture], [row])[0]))
    assert answers["clean"] is False and answers["total"] is True
    assert rl.reward_of(list(answers.values()), row["rubrics"]) == rl.reward_of([True if n == "clean" else a for n, a in answers.items()], row["rubrics"])


def all_yes(request):
    words = request["messages"][0]["content"][1]["text"]
    return "Sure:\n```json\n" + json.dumps({k: 1 for k in range(1, words.count("\n") + 1)}) + "\n```"


def test_a_judge_that_misbehaves_costs_a_count(server, tmp_path):
    rows, pictures = [rl.toy_row(1, 0, data.TASKS, [(64, 64)])] * 6, [np.full((64, 64, 3), 20 * k, np.uint8) for k in range(6)]
    pictures = [sample.Image.fromarray(p) for p in pictures]
    server.script = [all_yes, "I would rather not.", '{"1": 1}', 400, "die", "hang"]
    judge = rl.EndpointJudge(server.url, "m", tmp_path / "judge.jsonl", workers=1, tries=1, timeout=1)
    answers = judge(pictures, rows)
    assert answers[0] == [True] * len(rows[0]["rubrics"]) and answers[2] == [True] + [None] * (len(answers[2]) - 1)
    assert all(a is None for k in (1, 3, 4, 5) for a in answers[k])
    rewards = [rl.reward_of(a, rows[0]["rubrics"]) for a in answers]
    assert rewards[0] == rewards[2] == 1.0 and all(map(math.isnan, (rewards[1], *rewards[3:])))
    assert len(judge.failed) == 5 and judge.failed.count("nonsense") == 2
    server.script = [all_yes]
    asked = len(server.calls)
    again = rl.EndpointJudge(server.url, "m", tmp_path / "judge.jsonl", workers=1, tries=1, timeout=1)(pictures, rows)
    assert again[0] == answers[0] and len(server.calls) - asked == 3               # only what never answered is asked again
    request = server.calls[0]["messages"][0]["content"]
    assert request[0]["image_url"]["url"].startswith("data:image/jpeg;base64,") and request[1]["text"].count("\n") == len(rows[0]["rubrics"])


def test_prompts_are_written_by_an_endpoint_and_resumed(server, tmp_path, capsys):
    def write(request):
        words = request["messages"][0]["content"]
        if words.startswith("List"):
            return '["a thing", "another thing"]'
        return "no" if "UI and Graphic" in words else json.dumps({"prompt": "A thing on a table.", "rubrics": [{"name": f"r{k}", "check": "there is a thing"} for k in range(5)]})
    server.script, path = [write], tmp_path / "prompts.jsonl"
    for trial in range(2):
        rl.main(["--write-prompts", str(path), "--endpoint", server.url, "--pool", "100"])
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 90 and len(server.calls) == 50 + 100                       # the second time nothing was asked
    assert "Human                        10" in said and "10 of 100 answers were no prompt" in said
    assert all(1 <= len(row["dimensions"]) <= 4 and row["rubrics"][-1]["held_out"] for row in rows)
    read = rl.read_rows(path, data.buckets(64))
    assert len({row["size"] for row in read}) == len(data.buckets(64)) and read[0]["rubrics"][-1] == rl.COHERENT


# --- Runs

@pytest.fixture(scope="module")
def base(parts, tmp_path_factory):
    """A nano model with all its parts."""
    out = tmp_path_factory.mktemp("base")
    train.main(["--size", "nano", "--parts", str(parts), "--out", str(out), "--steps", "6", "--preview-every", "0"])
    return out


def go(base, out, *flags):
    rl.main(["--size", "nano", "--init", str(base), "--out", str(out), "--pool", "12", "--eval-every", "0", "--preview-every", "0", "--dtype", "fp32", "--save-every", "1", *flags])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


KEPT = ("step", "loss", "reward", "drift", "diversity", "grad_norm")


def test_resume_goes_on_to_the_bit(base, tmp_path):
    whole = go(base, tmp_path / "a", "--steps", "4")
    go(base, tmp_path / "b", "--steps", "2")
    halves = go(base, tmp_path / "b", "--steps", "4")
    assert [[row[k] for k in KEPT] for row in whole] == [[row[k] for k in KEPT] for row in halves]
    states = [train.load_state(tmp_path / x / "state.safetensors")[2] for x in "ab"]
    assert all(torch.equal(states[0][g][n], states[1][g][n]) for g in states[0] for n in states[0][g]) and {"new", "old", "ema", "optimizer"} <= states[0].keys()
    assert whole[0]["drift"] == 0 and whole[-1]["drift"] > 0


def test_killed_runs_give_the_same_rewards_and_weights(base, tmp_path):
    command = [sys.executable, str(ROOT / "rl.py"), "--size", "nano", "--init", str(base), "--out", str(tmp_path / "k"), "--pool", "12", "--eval-every", "0",
               "--preview-every", "0", "--dtype", "fp32", "--save-every", "1", "--steps", "4"]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + 120
    while time.time() < end and not (tmp_path / "k" / "state.safetensors").exists():
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    killed = go(base, tmp_path / "k", "--steps", "4")
    whole = go(base, tmp_path / "w", "--steps", "4")
    assert [[row[k] for k in KEPT] for row in killed] == [[row[k] for k in KEPT] for row in whole]


def test_two_processes_do_what_one_does(base, tmp_path):
    whole = go(base, tmp_path / "one", "--steps", "2")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "rl.py"), "--size", "nano", "--init", str(base), "--out", str(tmp_path / "two"), "--pool", "12",
                    "--eval-every", "0", "--preview-every", "0", "--dtype", "fp32", "--steps", "2"], check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    two = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    for a, b in zip(whole, two):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["reward"] == pytest.approx(b["reward"], abs=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_what_is_saved_is_a_lora_that_sample_loads_and_that_merges(base, tmp_path, capsys):
    go(base, tmp_path / "run", "--steps", "2")
    plain, merged = lens.load_transformer(base, "cpu", torch.float32), lens.load_transformer(base, "cpu", torch.float32)
    assert lens.load_lora(merged, tmp_path / "run") > 0
    rl.main(["--size", "nano", "--init", str(base), "--out", str(tmp_path / "run"), "--merge", str(tmp_path / "merged")])
    written = lens.load_transformer(tmp_path / "merged", "cpu", torch.float32)
    for (name, a), b, c in zip(plain.state_dict().items(), merged.state_dict().values(), written.state_dict().values()):
        assert torch.equal(b, c)
    assert any(not torch.equal(a, b) for a, b in zip(plain.state_dict().values(), merged.state_dict().values()))
    sample.main(["--weights", str(base), "--lora", str(tmp_path / "run"), "--prompt", "a red circle", "--guidance", "1", "--steps", "2", "--out", str(tmp_path / "png"), "--cache", ""])
    assert "layers changed" in capsys.readouterr().out and len(list((tmp_path / "png").glob("*.png"))) == 1


def test_a_run_with_a_judge_behind_an_endpoint_goes_on_when_the_judge_dies(base, server, tmp_path):
    rows = [{"prompt": f"a red circle number {k}", "category": "Object", "rubrics": [{"name": "a", "check": "red"}, {"name": "b", "check": "circle", "held_out": True}]} for k in range(8)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server.script = [all_yes] * 20 + ['{"1": 0, "2": 1, "3": 0}'] * 12 + [400]
    log = go(base, tmp_path / "run", "--steps", "3", "--data", str(tmp_path / "p.jsonl"), "--endpoint", server.url)
    assert 0 < log[1]["reward"] <= 1 and sum(row["failures"] for row in log) == log[-1]["judge_failed"] > 0
    assert all(math.isfinite(row["loss"]) for row in log)


def test_an_unlike_run_is_not_resumed_and_mistakes_are_one_line(base, tmp_path):
    go(base, tmp_path / "run", "--steps", "1")
    for flags, words in ((["--out", str(tmp_path / "run"), "--seed", "5"], "holds another run"), (["--tasks", "singing"], "--tasks"), (["--data", "none.jsonl", "--endpoint", "http://x"], "no prompts there"),
                         (["--data", "none.jsonl"], "--endpoint"), (["--init", str(sample.TOY)], "not of size nano"), (["--steps", "0"], "at least 1")):
        with pytest.raises(LensError, match=words):
            rl.main(["--size", "nano", "--init", str(base), "--out", str(tmp_path / "other"), "--pool", "12", "--preview-every", "0", "--eval-every", "0", *flags])


def test_the_watch_warns_when_diversity_falls_under_a_rising_reward():
    watch = rl.Watch()
    assert not any(watch(0.5 + 0.01 * k, 1.0, 0.9) for k in range(20))
    assert any("diversity" in watch(0.8, 0.5, 0.9) for _ in range(20))
    watch = rl.Watch()
    assert not any(watch(0.5, 1.0 - 0.05 * k, 0.9) for k in range(15))                 # no rise, nothing to say
    watch.first = watch.first[:0]
    watch.last.clear()
    [watch(0.5, 1.0, 0.9) for _ in range(10)]
    assert any("held-out" in watch(0.8, 1.0, 0.6) for _ in range(20))


def test_the_dry_run_needs_no_weights(capsys):
    rl.main(["--size", "nano", "--dry-run", "--device", "cpu"])
    assert "GiB a device" in capsys.readouterr().out
