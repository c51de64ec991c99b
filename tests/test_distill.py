"""Distillation: the forces against known answers, and runs that are killed."""
import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import distill
import lens
import sample
import train
from conftest import STEADY, steady
from lens import LensError

ROOT = Path(__file__).resolve().parent.parent


# --- One number a picture. Data N(m, 1): what is known of x0 at x_t is m + (1 - t) (x_t - (1 - t) m) / ((1 - t)^2 + t^2).

def velocity(x, t, m):
    t = lens.wide(t, x)
    return (x - (m + (1 - t) * (x - (1 - t) * m) / ((1 - t) ** 2 + t**2))) / t


PLAIN = lambda cond, uncond, g: uncond + g * (cond - uncond)       # over one channel, rescaling would undo all guidance
EVEN = torch.linspace(1, 0, 5)                                     # levels without a shift


def forces(mean, m, a, ca_levels, count=4000):
    """(y, DM gradient, CA gradient) for a student of N(mean, 1), its perfect fake, and a teacher of N(m, 1), without text N(0, 1)."""
    rng = torch.Generator().manual_seed(0)
    y = torch.randn(count, 1, 1, generator=rng, dtype=torch.float64) + mean
    t = distill.draw_levels(count, EVEN, 1.0, rng).double()
    x = lens.add_noise(y.detach(), torch.randn(y.shape, generator=rng, dtype=torch.float64), t)
    dm = distill.dm_gradient(velocity(x, t, mean.detach()), velocity(x, t, m), t)
    s = ca_levels(count, rng).double()
    x = lens.add_noise(y.detach(), torch.randn(y.shape, generator=rng, dtype=torch.float64), s)
    return y, dm, distill.ca_gradient(velocity(x, s, m), velocity(x, s, 0.0), s, a, PLAIN)


@pytest.mark.parametrize("ca_levels, expected", [
    (lambda n, rng: distill.draw_levels(n, EVEN, 1.0, rng), 4.0),
    (lambda n, rng: distill.draw_levels(n, EVEN, 0.5, rng), 1.92),
    (lambda n, rng: 1 - distill.draw_levels(n, EVEN, 0.5, rng), 6.08)])
def test_where_the_mean_comes_to_rest(ca_levels, expected):
    """Guidance 4: shared levels 4 m; CA at the cleaner half of them 1.92 m; at the noisier half, the sign that ports copied, 6.08 m."""
    m, mean = 0.7, torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([mean], lr=1.0)
    for _ in range(40):
        y, dm, ca = forces(mean, m, 4.0, ca_levels)
        optimizer.zero_grad()
        distill.pull(y, dm + ca).backward()
        optimizer.step()
    assert mean.item() / m == pytest.approx(expected, rel=0.02)


def test_the_dm_gradient_vanishes_where_the_student_is_the_data():
    m = 0.7
    y, dm, _ = forces(torch.tensor(m, dtype=torch.float64), m, 4.0, lambda n, rng: distill.draw_levels(n, EVEN, 0.5, rng))
    y.requires_grad_()
    for force in (dm, distill.normalised(dm, y, torch.zeros_like(y))):             # a force divided by its own size would be 1 everywhere
        (grad,) = torch.autograd.grad(distill.pull(y, force), y)
        assert grad.abs().max() < 1e-12
    *_, off = (forces(torch.tensor(m + d, dtype=torch.float64), m, 4.0, lambda n, rng: distill.draw_levels(n, EVEN, 0.5, rng))[1] for d in (0.1,))
    assert off.min() > 0                                                           # the student's mean is too high: y is to fall


def test_pull_has_the_force_as_its_gradient_and_nothing_flows_into_the_force():
    y, w = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    loss = distill.pull(y, 2 * w + y)
    loss.backward()
    assert torch.allclose(y.grad * y.numel(), (2 * w + y).detach(), atol=1e-6) and w.grad is None
    assert loss.item() == pytest.approx(0.5 * (2 * w + y).square().mean().item(), rel=1e-5)


def test_guidance_is_the_samplers_own():
    x, cond, uncond, t = *torch.randn(3, 2, 5, 8), torch.tensor([0.3, 0.9])
    g = distill.ca_gradient(cond, uncond, t, 5.0)
    guided = lens.data_prediction(x, sample.guide(cond, uncond, 5.0), t)
    assert torch.allclose(lens.data_prediction(x, cond, t) - g, guided, atol=1e-5)             # one step along it is the guided prediction
    assert torch.allclose(distill.ca_gradient(cond, uncond, t, 5.0, PLAIN), -4 * (lens.data_prediction(x, cond, t) - lens.data_prediction(x, uncond, t)), atol=1e-4)
    assert not torch.allclose(g, distill.ca_gradient(cond, uncond, t, 5.0, PLAIN), atol=0.1)


def test_forces_are_normalised_each_sample_by_itself():
    g, y, x0 = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    plain = distill.normalised(g, y, x0)
    assert torch.allclose(plain[0], g[0] / (y[0] - x0[0]).abs().mean())
    scale = torch.tensor([1.0, 10.0])[:, None, None]
    assert torch.allclose(distill.normalised(g * scale, y * scale, x0 * scale), plain, atol=1e-6)
    assert torch.isfinite(distill.normalised(g, y, y)).all()


def test_ida_alone_lags_by_32_steps():
    behind, ahead, d = torch.zeros(3), torch.zeros(3), 0.01
    for _ in range(1000):
        ahead += d
        distill.follow([behind], [ahead], distill.IDA)
    assert ((ahead - behind) / d).tolist() == pytest.approx([0.97 / 0.03] * 3, rel=1e-3)       # 32.3


def test_r1_of_a_linear_head():
    w, x, noise = torch.randn(6, requires_grad=True), torch.randn(200_000, 6), torch.randn(200_000, 6)
    r1 = distill.approximate_r1(lambda x: x @ w, x, noise)
    (grad,) = torch.autograd.grad(r1, w)
    assert r1.item() == pytest.approx(0.5 * 0.01 * w.square().sum().item(), rel=0.02)          # gamma / 2 a^2 |w|^2
    assert torch.allclose(grad, 0.01 * w, atol=0.02 * 0.01 * w.abs().max().item() + 1e-4)


@pytest.mark.parametrize("tokens", [16, 36, 64, 1024, 4096, 6400])
def test_levels_of_ca_are_cleaner_than_the_students_input(tokens):
    levels, rng = lens.sigmas(tokens, distill.STEPS), torch.Generator().manual_seed(0)
    assert torch.allclose(distill.shifted(torch.tensor([0.75, 0.5, 0.25]), levels), levels[1:4], atol=1e-6)        # the sampler's own shift
    for k in range(distill.STEPS):
        t = distill.draw_levels(100_000, levels, 1 - k / distill.STEPS, rng)
        assert 0 < t.min() and t.max() < levels[k] and t.max() > 0.95 * levels[k]
        u = distill.draw_levels(100_000, EVEN, 1 - k / distill.STEPS, rng)
        assert u.mean().item() == pytest.approx((1 - k / 4) / 2, rel=0.01)                     # even in the unshifted variable


@pytest.mark.parametrize("grid, length", [((4, 6), 0), ((6, 6), 9)])
def test_simulation_is_the_samplers_prefix_to_the_bit(grid, length):
    model = lens.build("nano", 1)
    torch.manual_seed(0)
    with torch.no_grad():
        [p.add_(0.1 * torch.randn(p.shape)) for p in model.parameters()]
    text = [torch.randn(3, length, 32) for _ in range(2)] if length else None
    noise, states = torch.randn(3, grid[0] * grid[1], 16), []
    mask = torch.arange(length)[None] < torch.tensor([[9], [4], [7]]) if length else None
    sample.denoise(model, noise, text, mask, grid, distill.STEPS, 1.0, on_step=lambda i, x, v: states.append(x.clone()))
    for k in range(distill.STEPS):
        assert torch.equal(distill.simulate(model, noise, text, mask, grid, k), [noise, *states][k])
    # and the last forward, which the gradient goes through, ends where the sampler ends
    x, t = distill.simulate(model, noise, text, mask, grid, 3), lens.sigmas(noise.shape[1], 4)[3].expand(3)
    assert torch.allclose(lens.data_prediction(x, model(x, t, text, mask, grid), t), states[-1], atol=1e-5)


# --- Runs

@pytest.fixture(scope="module")
def base(parts, tmp_path_factory):
    """A nano model over the parts. Its gates are opened: fresh from adaLN-zero, it would not see its text."""
    out, model = tmp_path_factory.mktemp("base"), lens.build("nano")
    torch.manual_seed(0)
    with torch.no_grad():
        [p.add_(0.05 * torch.randn(p.shape)) for p in model.parameters()]
    lens.save_pipeline(out, model, metadata={"words": "[]"}, base=os.path.relpath(parts, out))
    return out


@pytest.fixture(scope="module", autouse=True)
def fp32():
    with pytest.MonkeyPatch.context() as patch:
        steady(patch)
        yield


FLAGS = ["--size", "nano", "--eval-every", "0", "--preview-every", "0", "--save-every", "1", "--device", "cpu", "--lr", "0.001"]


def go(base, out, *flags):
    Path(out).mkdir(exist_ok=True)
    for world in list(base.glob("world.safetensors")):                             # drawn once: most of a short run's time
        shutil.copy(world, out)
    distill.main([*FLAGS, "--teacher", str(base), "--out", str(out), *flags])
    return rows(out)


def rows(out):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    go(base, out, "--steps", "5")
    shutil.copy(out / "world.safetensors", base)
    return out


def tensors(out):
    (path,) = Path(train.checkpoints(out)[-1]).glob("*.safetensors")
    with lens.open_safetensors(path) as f:
        return {k: f.get_tensor(k) for k in f.keys()}


def alike(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and {name.split(".")[0] for name in a} == {"student", "fake", "ema", "heads", "optimizer"}
    return all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_that_is_killed_and_told_to_stop_goes_on_to_the_bit(base, whole, tmp_path):
    (tmp_path / "run.py").write_text(STEADY + "import sys, distill\nsample.run(lambda: distill.main(sys.argv[1:]))\n")
    out, log = tmp_path / "out", tmp_path / "out" / "metrics.jsonl"
    out.mkdir()
    shutil.copy(base / "world.safetensors", out)
    for how, until in ((signal.SIGKILL, 1), (signal.SIGTERM, 2)):
        run = subprocess.Popen([sys.executable, tmp_path / "run.py", *FLAGS, "--teacher", str(base), "--out", str(out), "--steps", "5"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())})
        while run.poll() is None and (not log.exists() or log.read_text().count("\n") < until):
            time.sleep(0.02)
        run.send_signal(how)
        said = run.communicate()[0].decode()
        assert run.returncode == (0 if how == signal.SIGTERM else -9) and ("SIGTERM: saved" in said) == (how == signal.SIGTERM or run.returncode == 0)
    assert go(base, out, "--steps", "5") == rows(whole) and [row["step"] for row in rows(out)] == [1, 2, 3, 4, 5]
    assert alike(out, whole)


def test_signals_are_logged_and_all_that_should_move_moves(base, whole):
    wanted = {"loss", "dm", "ca", "gan", "cosine", "fake_loss", "heads_loss", "r1", "heads_right", "spread", "spread_real", "grad_norm", "k", "size"}
    log, start, end = rows(whole), lens.load_transformer(base, "cpu", torch.float32).state_dict(), tensors(whole)
    assert all(wanted <= row.keys() and all(row[k] is not None for k in wanted) for row in log)
    assert log[0]["heads_loss"] == pytest.approx(2 * math.log(2), abs=0.02) and -1 <= log[0]["cosine"] <= 1
    for who in ("student", "fake", "ema"):
        mine = {k[len(who) + 1:]: v for k, v in end.items() if k.startswith(who + ".")}
        assert set(start) - set(mine) == set(lens.load_transformer(base).unread())             # what can get no gradient is not there
        assert not any(torch.equal(start[k], v) for k, v in mine.items() if start[k].numel() > 32 and "txt_norm" not in k)


def test_the_student_loads_as_any_weights_do_with_four_steps_and_no_guidance(whole, tmp_path, capsys):
    notes = lens.read_metadata(whole)
    assert (int(notes["steps"]), float(notes["guidance"])) == (4, 1.0) and notes["command"].startswith("python distill.py")
    sample.main(["--weights", str(whole), "--prompt", "a red circle", "--out", str(tmp_path), "--cache", ""])
    assert "4 steps, guidance 1," in capsys.readouterr().out and len(list(tmp_path.glob("*.png"))) == 1
    ema = {k[4:]: v for k, v in tensors(whole).items() if k.startswith("ema.")}
    stored = lens.load_transformer(whole).state_dict()
    assert all(torch.equal(stored[k], v) for k, v in ema.items())


def test_captions_alone_suffice_without_a_discriminator(base, tmp_path, monkeypatch):
    (tmp_path / "captions.txt").write_text("\n".join(f"a {size} {color} circle" for size in ("small", "large") for color in data.COLORS))
    monkeypatch.setattr(distill, "tapped", lambda *_: pytest.fail("a discriminator was run"))
    with pytest.raises(LensError, match="captions alone suffice with --no-gan only"):
        go(base, tmp_path / "run", "--data", str(tmp_path / "captions.txt"))
    log = go(base, tmp_path / "run", "--data", str(tmp_path / "captions.txt"), "--no-gan", "--steps", "1")
    log = go(base, tmp_path / "run", "--data", str(tmp_path / "captions.txt"), "--no-gan", "--steps", "2")         # resumed
    assert len(log) == 2 and not {"gan", "heads_loss", "spread_real"} & log[0].keys() and all(math.isfinite(row["loss"]) for row in log)
    heads = {k: v for k, v in tensors(tmp_path / "run").items() if k.startswith("heads.")}
    assert all(torch.equal(heads[f"heads.{k}"], v) for k, v in distill.make_heads(lens.SIZES["nano"].transformer, 0).state_dict().items())


def stage(base, **how):
    """What distill.main fills before a run, and one batch of the toy world's shapes."""
    args = argparse.Namespace(size="nano", teacher=str(base), lora=0, fsdp=False, compile=False, device="cpu", seed=0, rank=0, ranks=1, bf16=False, without=set(), guidance=5.0, how=distill.SETTINGS["nano"])
    vars(args).update(how)
    distill.make_nets(args, lens.load_pipeline(base, "cpu", torch.float32, parts=("transformer",))[0], torch.float32)
    args.heads, g = distill.make_heads(lens.SIZES["nano"].transformer, 0), torch.Generator().manual_seed(0)
    given = ([torch.randn(4, 7, 32, generator=g) for _ in range(2)], torch.arange(7)[None] < torch.tensor([[7], [3], [5], [6]]), (4, 6))
    batch = distill.Batch(torch.randn(4, 24, 16, generator=g), given, lens.sigmas(24, 4), 2, torch.randn(4, 24, 16, generator=g), g)
    return args, batch, {who: torch.optim.AdamW([*(args.heads.parameters() if who == "heads" else distill.weights(args, who).values())], lr=1e-3, betas=distill.BETAS) for who in ("student", "fake", "heads")}


def test_an_exported_adapter_is_the_student(base, tmp_path, capsys):
    """A change of rank 2 in one matrix, of weights and biases in the modulation, and of the time embedding: all of it comes through rank 4."""
    teacher, student = (lens.load_pipeline(base, "cpu", torch.float32, parts=("transformer",))[0] for _ in range(2))
    g, change = torch.Generator().manual_seed(0), lambda *shape: 0.05 * torch.randn(*shape, generator=g)
    with torch.no_grad():
        block, embed = student.transformer_blocks[0], student.time_text_embed["timestep_embedder"]
        block.attn.img_qkv.weight += change(block.attn.img_qkv.weight.shape[0], 2) @ change(2, block.attn.img_qkv.weight.shape[1]) * 20
        for layer in (block.img_mod[1], block.txt_mod[1], student.norm_out["linear"]):
            layer.weight += change(layer.weight.shape[0], 1) @ change(1, layer.weight.shape[1]) * 20
            layer.bias += change(len(layer.bias))
        embed["linear_2"].bias += 0.1 * change(len(embed["linear_2"].bias))
    notes = dict(steps=4, guidance=1.0, base=64, words="[]")
    lens.save_pipeline(tmp_path / "run", transformer=student, metadata=notes, base=os.path.relpath(base, tmp_path / "run"))
    flags = ["--size", "nano", "--teacher", str(base), "--out", str(tmp_path / "run"), "--export", str(tmp_path / "small")]
    with pytest.raises(LensError, match="--lora"):
        distill.main(flags)
    distill.main([*flags, "--lora", "4"])
    small = lens.load_pipeline(tmp_path / "small", "cpu", torch.float32, parts=("transformer",))[0]
    noise, t, text = torch.randn(8, 24, 16, generator=g), torch.linspace(0.1, 1, 8), [torch.randn(8, 7, 32, generator=g) for _ in range(2)]
    with torch.no_grad():
        is_, want, was = (model(noise, t, text, None, (4, 6)) for model in (small, student, teacher))
    assert (is_ - want).norm() < 0.05 * (was - want).norm()
    assert sample.settings(lens.read_metadata(tmp_path / "small"), None, None) == (4, 1.0) and "overall" in capsys.readouterr().out


def test_adapters_start_alike_and_as_the_teacher_and_the_base_stays(base):
    args, batch, optimizers = stage(base, lora=4)
    before = {k: v.clone() for k, v in args.nets["teacher"].state_dict().items() if ".lora_" not in k}
    run = lambda who: distill.act(args, who)(batch.start, batch.levels[1].expand(4), *batch.given)
    with torch.no_grad():
        a, b, c, d = (run(who) for who in ("teacher", "student", "fake", "ema"))
        assert torch.equal(a, b) and torch.equal(a, c) and torch.equal(a, d)
    assert all(torch.equal(p, q) for p, q in zip(distill.weights(args, "student").values(), distill.weights(args, "fake").values()))
    for _ in range(2):
        distill.critic_update(args, batch, optimizers)
        distill.student_update(args, batch, optimizers)
    with torch.no_grad():
        after = {who: run(who) for who in ("teacher", "student", "fake", "ema")}
    assert torch.equal(after["teacher"], a) and torch.equal(after["ema"], a)
    assert not torch.equal(after["student"], a) and not torch.equal(after["fake"], a) and not torch.equal(after["fake"], after["student"])
    assert all(torch.equal(v, before[k]) for k, v in args.nets["teacher"].state_dict().items() if ".lora_" not in k)


def test_the_adapter_that_is_saved_is_what_was_trained_and_resumes(base, tmp_path):
    go(base, tmp_path / "a", "--lora", "4", "--steps", "3")
    go(base, tmp_path / "b", "--lora", "4", "--steps", "1")
    assert go(base, tmp_path / "b", "--lora", "4", "--steps", "3") == rows(tmp_path / "a") and alike(tmp_path / "a", tmp_path / "b")
    args, batch, _ = stage(base, lora=4)
    saved = tensors(tmp_path / "a")
    with torch.no_grad():
        [p.copy_(saved[f"ema.{name}"]) for name, p in distill.weights(args, "ema").items()]
        want = distill.act(args, "ema")(batch.start, batch.levels[1].expand(4), *batch.given)
        got = lens.load_pipeline(tmp_path / "a", "cpu", torch.float32, parts=("transformer",))[0](batch.start, batch.levels[1].expand(4), *batch.given)
    assert torch.allclose(want, got, atol=1e-5) and not torch.allclose(got, lens.load_transformer(base)(batch.start, batch.levels[1].expand(4), *batch.given), atol=1e-5)


def test_dm_and_ca_have_levels_and_normalisers_of_their_own(base, monkeypatch):
    args, batch, optimizers = stage(base)
    seen, levels, normalised, draw = [], [], distill.normalised, distill.draw_levels
    monkeypatch.setattr(distill, "normalised", lambda g, y, x0: seen.append((y, x0)) or normalised(g, y, x0))
    monkeypatch.setattr(distill, "draw_levels", lambda n, of, below, rng: levels.append((below, draw(n, of, below, rng))) or levels[-1][1])
    distill.student_update(args, batch, optimizers)
    (y, x0), (same, other) = seen
    assert torch.equal(y, same) and not torch.equal(x0, other)
    assert [below for below, _ in levels] == [1.0, 0.5, 1.0] and levels[1][1].max() < batch.levels[2]          # DM, CA at k = 2, the heads


@pytest.mark.parametrize("bf16", [False, True])
def test_every_weight_of_the_student_gets_a_gradient_and_the_teacher_none(base, bf16):
    """In one autocast context the casts of the simulation, made without gradient, would be kept for the forward pass: no gradient, no error."""
    args, batch, optimizers = stage(base, bf16=bf16)
    distill.student_predicts(args, batch).square().sum().backward()
    idle = {name for name, p in distill.weights(args, "student").items() if not (p.grad is not None and p.grad.abs().sum() > 0)}
    assert idle == {"transformer_blocks.1.attn.norm_added_q.weight"}                           # the last block's text queries: nobody reads what they find
    distill.critic_update(args, batch, optimizers)
    distill.student_update(args, batch, optimizers)
    assert all(p.grad is None for p in args.nets["teacher"].parameters()) and all(p.grad is None for p in distill.weights(args, "fake").values())


def test_heads_learn_and_push_the_student_through_the_teacher(base):
    args, batch, optimizers = stage(base, without={"dm", "ca", "ida"})
    first = distill.student_update(args, batch, optimizers)
    assert first["gan_loss"] == pytest.approx(math.log(2), abs=0.02) and first["grad_norm"] == 0           # heads without an opinion push nothing
    optimizers["heads"].param_groups[0]["lr"], batch = 0.01, batch._replace(real=batch.real + 2)
    losses = [distill.critic_update(args, batch, optimizers)["heads_loss"] for _ in range(60)]
    assert losses[-1] < losses[0] - 0.1 and distill.student_update(args, batch, optimizers)["grad_norm"] > 0


@pytest.mark.parametrize("term, moved", [("ida", False), (None, True)])
def test_ida_is_what_pulls_the_fake_in_the_students_update(base, term, moved):
    args, batch, optimizers = stage(base, without={term})
    before = [p.detach().clone() for p in distill.weights(args, "fake").values()]
    distill.student_update(args, batch, optimizers)
    student, fake = (list(distill.weights(args, who).values()) for who in ("student", "fake"))
    assert all(torch.allclose(f, 0.97 * b + 0.03 * s if moved else b, atol=1e-7) for f, b, s in zip(fake, before, student))
    assert any(not torch.equal(f, b) for f, b in zip(fake, before)) == moved


def test_k_is_the_same_on_all_ranks_and_the_noise_is_not(base):
    args, _, _ = stage(base)
    source = argparse.Namespace(sizes=[(64, 96)])
    make = lambda rank, number: (setattr(args, "rank", rank), distill.get_batch(args, source, number, 0, [1, 2], (None, [torch.zeros(2, 3, 32)] * 2, torch.ones(2, 3).bool(), [])))[1]
    pairs = [(make(0, n), make(1, n)) for n in range(40)]
    assert all(a.k == b.k and not torch.equal(a.start, b.start) for a, b in pairs) and {a.k for a, _ in pairs} == {0, 1, 2, 3}


def test_two_processes_share_the_weights_and_one_goes_on(base, whole, tmp_path):
    """FSDP2 on two processes saves a student that loads, and a state that one process resumes."""
    shutil.copy(base / "world.safetensors", tmp_path)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "distill.py"), *FLAGS, "--teacher", str(base), "--out", str(tmp_path), "--fsdp", "--steps", "1"],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    student, teacher = (lens.load_transformer(folder, "cpu", torch.float32).state_dict() for folder in (tmp_path, base))
    assert student.keys() == teacher.keys() and any(not torch.equal(student[k], teacher[k]) for k in student) and rows(tmp_path)[0]["k"] == rows(whole)[0]["k"]
    log = go(base, tmp_path, "--steps", "2")
    assert [row["step"] for row in log] == [1, 2] and all(math.isfinite(row["loss"]) for row in log) and tensors(tmp_path).keys() == tensors(whole).keys()


def test_evaluation_and_sheets_come_on_schedule(base, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "evaluate", lambda pipeline, h, w, steps, guidance, *a, **k: ({"overall": steps / 100 + guidance}, [], []))
    log = go(base, tmp_path, "--steps", "2", "--eval-every", "2", "--preview-every", "2")
    assert "overall" not in log[0] and log[1]["overall"] == pytest.approx(1.04) and log[1]["diversity"] > 0
    with sample.Image.open(tmp_path / "preview-00002.png") as sheet:
        assert sheet.size == (12 * 100 - 4, 3 * 100 - 4)
    known = json.loads((train.checkpoints(tmp_path)[-1] / "notes.json").read_text())["teacher"]
    assert {k: v["overall"] for k, v in known.items()} == {"20 steps, guidance 5": 5.2, "4 steps, guidance 1": 1.04}


@pytest.mark.parametrize("flags, words", [
    (["--size", "huge"], "unknown size"), (["--size", "full"], "--data"), (["--data", "none-*.tar"], "no file matches"), (["--without", "eyes"], "--without"), (["--steps", "0"], "at least 1"),
    (["--without", "ca", "--without", "dm", "--no-gan"], "must stay"), (["--guidance", "1"], "--guidance 1"), (["--fsdp"], "torchrun"), (["--size", "toy"], "not of size toy"),
    (["--teacher", "/nowhere"], "/nowhere"), (["--seed", "9"], "holds another run"), (["--lora", "-1"], "--lora")])
def test_a_mistake_is_one_clear_line(base, whole, flags, words, capsys):
    with pytest.raises(SystemExit) as done:
        sample.run(lambda: distill.main([*FLAGS, "--teacher", str(base), "--out", str(whole), *flags]))
    err = capsys.readouterr().err
    assert done.value.code == 2 and words in err and len([line for line in err.splitlines() if line.startswith("error: ")]) == 1


def test_the_dry_run_needs_no_weights(capsys):
    distill.main(["--size", "nano", "--dry-run", "--device", "cpu"])
    said = capsys.readouterr().out
    assert said.count("all weights") == 2 and said.count("LoRA 64") == 2 and "89,872 parameters" in said
