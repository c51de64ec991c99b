"""train.py: what a step learns from, and that a run that was killed goes on as if nothing had happened."""
import contextlib
import copy
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import lens
import sample
import train
import vae as autoencoder
from conftest import STEADY, steady


@pytest.fixture(scope="module")
def world(parts, tmp_path_factory):
    _, autoencoder, encoder = lens.load_pipeline(parts, parts=("vae", "text_encoder"))
    encoder.layers = lens.SIZES["nano"].transformer.selected_layer_index
    return train.World(train.STAGES["nano"][2], 0, autoencoder, encoder, tmp_path_factory.mktemp("world") / "w.safetensors", "cpu")


def weights(folder):
    return lens.load_transformer(folder).state_dict()


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_world_keeps_each_caption_as_long_as_it_is(world):
    """What the plan sorts by is what the batch then holds; the two captions of a scene take turns."""
    for epoch in (0, 1):
        lengths = world.lengths(epoch)
        plan = data.plan(world.buckets, lengths, {b: 3 for b in range(len(world.sizes))}, 0, epoch)
        assert sorted(np.concatenate([s for _, s, _ in plan])) == list(range(sum(train.STAGES["nano"][2].scenes.values())))
        for (bucket, samples, _), (tokens, text, mask, faults) in zip(plan, world.stream(plan)):
            assert tokens.shape[:2] == (len(samples), world.sizes[bucket][0] * world.sizes[bucket][1] // 256) and not faults
            assert mask.sum(1).tolist() == lengths[samples].tolist() and all(t.shape[1] == lengths[samples].max() for t in text)
    assert (world.lengths(0) != world.lengths(1)).any() and (world.lengths(0) == world.lengths(2)).all()


def test_the_kept_world_is_what_the_frozen_models_say(world, parts):
    """Scene i of an area is a function of (seed, area, i): drawn again here, through the encoders one by one."""
    _, autoencoder, encoder = lens.load_pipeline(parts, parts=("vae", "text_encoder"))
    encoder.layers = lens.SIZES["nano"].transformer.selected_layer_index
    size = data.BUCKETS[64][2]
    bucket = world.sizes.index(size)
    scene = world.first[bucket] + 3
    tokens, text, mask, _ = next(world.stream([(bucket, np.array([scene]), 1 - scene % 2)]))            # its second caption
    rng = np.random.default_rng((0, 64, 2 + 3 * len(data.BUCKETS[64])))
    scene = data.random_scene(rng, *size, odds=train.ODDS)
    picture = data.draw(scene, *size)
    captions = train.captions_of(scene, rng)
    features, _ = encoder.encode([captions[1]])
    with torch.no_grad():
        expected = autoencoder.to_tokens(autoencoder.encode(sample.autoencoder.from_pil([picture]))[0])
    assert torch.allclose(tokens, expected.bfloat16().float(), atol=0.02)
    assert mask.all() and all(torch.allclose(a, b.bfloat16().float(), rtol=0.02, atol=0.02) for a, b in zip(text, features))


def test_what_is_exported_is_what_was_scored(parts, tmp_path, monkeypatch):
    """The shipped file: matrices of the blocks in fp8 with a scale, the rest bf16; read back, the very weights that the score is of."""
    scored, model = {}, lens.build("nano", seed=3)
    lens.save_pipeline(tmp_path / "run", model, metadata=dict(base=64, steps=2, guidance=3.0, words="[]"), base=os.path.relpath(parts, tmp_path / "run"))
    monkeypatch.setattr(sample, "evaluate", lambda pipeline, height, width, steps, guidance: (
        scored.update({n: t.clone() for n, t in pipeline[0].state_dict().items()}) or {"overall": 0.5, "at": [height, width, steps, guidance]}, None))
    train.main(["--size", "nano", "--out", str(tmp_path / "run"), "--parts", str(parts), "--export", str(tmp_path / "small")])
    got, notes, exact = weights(tmp_path / "small"), lens.read_metadata(tmp_path / "small"), model.state_dict()
    assert json.loads(notes["score"]) == {"overall": 0.5, "at": [64, 64, 2, 3.0]}
    assert all(torch.equal(t.float(), scored[n]) for n, t in got.items())
    with lens.open_safetensors(tmp_path / "small" / "transformer" / lens.WEIGHT_NAMES[0]) as f:
        kinds = {n: f.get_tensor(n).dtype for n in f.keys()}
    matrices = {n for n, t in exact.items() if n.startswith("transformer_blocks") and t.ndim == 2}
    assert matrices == {n for n, kind in kinds.items() if kind == torch.float8_e4m3fn} and {kinds[n] for n in kinds.keys() - matrices} == {torch.bfloat16}
    for name in matrices:                                                          # half of e4m3's last bit, or of its smallest step
        assert ((scored[name] - exact[name]).abs() <= 0.0665 * exact[name].abs() + exact[name].abs().max() / 448 * 2**-9 * 2).all(), name
    assert all(torch.equal(scored[n], exact[n].bfloat16().float()) for n in exact.keys() - matrices)


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    noise, t, dropped = train.noise_and_time(1, 2, [5, 9, 2], (16, 4), (1.0, 1.0))
    alone = train.noise_and_time(1, 2, [9], (16, 4), (1.0, 1.0))
    assert torch.equal(noise[1], alone[0][0]) and t[1] == alone[1][0] and dropped[1] == alone[2][0]
    other = train.noise_and_time(1, 3, [9], (16, 4), (1.0, 1.0))
    assert not torch.equal(other[0], alone[0])


def test_times_and_dropout_follow_their_distributions():
    _, t, dropped = train.noise_and_time(0, 0, range(4000), (1, 1), (1.75, 1.25))
    logit = torch.log(t / (1 - t))
    assert abs(logit.mean() - 1.75) < 0.07 and abs(logit.std() - 1.25) < 0.06
    assert abs(dropped.float().mean() - train.DROPOUT) < 0.02


def test_the_loss_is_zero_for_the_true_velocity_and_its_least_value_is_the_mean():
    tokens, noise, t = torch.randn(3, 6, 4), torch.randn(3, 6, 4), torch.rand(3)
    exact = lambda x_t, t, *_: lens.velocity(tokens, noise)
    assert train.flow_matching_loss(exact, tokens, None, None, (2, 3), noise, t).max() == 0
    silent = lambda x_t, t, *_: torch.zeros_like(x_t)
    assert torch.allclose(train.flow_matching_loss(silent, tokens, None, None, (2, 3), noise, t), (noise - tokens).square().mean((1, 2)))


def test_labels_are_learnt_from_an_early_block_and_leave_no_trace(parts, tmp_path, monkeypatch):
    """The term beside the velocity's: what it is without knowledge and with all of it; that it falls; that what is saved to sample from has no part of it."""
    model = lens.build("nano").requires_grad_(False)
    [p.normal_(std=0.2) for name, p in model.named_parameters() if "_mod" in name]         # gates start at zero, where every block gives the same
    x, t, text, seen = torch.randn(2, 6, 16), torch.rand(2), [torch.randn(2, 3, 32)] * 2, []
    assert torch.equal(model(x, t, text, None, (2, 3), seen.append), model(x, t, text, None, (2, 3)))
    assert [s.shape for s in seen] == [(2, 6, 32)] * 2 and not torch.allclose(seen[0], seen[1])
    shapes, colors = len(data.SHAPES) + 1, len(data.COLORS) + 1
    labels = torch.cat([torch.arange(6.0).expand(2, -1)[..., None], torch.zeros(2, 6, 1), torch.full((2, 6, 4), 0.5)], -1)
    ignorant = lambda img: torch.zeros(2, 6, shapes + colors + 4)                  # the pose, 4 times 0.5, counts where a shape is: 5 tokens of 6
    assert torch.allclose(autoencoder.label_loss(ignorant, seen[0], labels), torch.tensor(np.log(shapes) + np.log(colors) + 2 * 5 / 6).float())
    wise = lambda img: torch.cat([50.0 * F.one_hot(labels[..., k].long(), n) for k, n in enumerate((shapes, colors))] + [labels[..., 2:]], -1)
    assert autoencoder.label_loss(wise, seen[0], labels).max() < 1e-6
    steady(monkeypatch)
    command = ["--size", "nano", "--stage", "1", "--parts", str(parts), "--preview-every", "0", "--device", "cpu"]
    train.main([*command, "--steps", "150", "--out", str(tmp_path)])
    told = [r["label_loss"] for r in rows(tmp_path)]
    assert told[0] > np.log(shapes) + np.log(colors) - 1e-3 and np.mean(told[-5:]) < 0.8 * told[0]
    assert weights(tmp_path).keys() == model.state_dict().keys()


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_else():
    model = lens.build("nano")
    dead = set(model.unread())
    for name, p in model.named_parameters():
        p.requires_grad_(name not in dead)
    adamw, muon = train.make_optimizers(model, train.STAGES["nano"][1])
    taken = [{id(p) for group in o.param_groups for p in group["params"]} for o in (adamw, muon)]
    named = {name: id(p) for name, p in model.named_parameters() if p.requires_grad}
    assert not taken[0] & taken[1] and taken[0] | taken[1] == set(named.values())
    for name in ("transformer_blocks.0.attn.img_qkv.weight", "transformer_blocks.1.img_mlp.w2.weight"):
        assert named[name] in taken[1]
    for name in ("img_in.weight", "proj_out.weight", "transformer_blocks.0.img_mod.1.weight", "transformer_blocks.0.attn.norm_q.weight"):
        assert named[name] in taken[0]
    assert len(train.make_optimizers(model, train.STAGES["full"][1])) == 1                      # the paper's AdamW for all


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("how", ("none", "selective", "full"))
def test_the_memory_account_is_what_the_allocator_gives(how):
    """--dry-run's activations and fixed part against the bytes that PyTorch's allocator hands out in a real step, on the toy."""
    size, count, grid, length = "toy", 8, (6, 6), 24
    config, measured = lens.SIZES[size].transformer, {}
    tokens, text = torch.randn(count, 36, config.in_channels), [torch.randn(count, length, config.enc_hidden_dim) for _ in config.selected_layer_index]
    mask, t = torch.ones(count, length, dtype=torch.bool), torch.rand(count)
    lens.rope_table(grid, length, tuple(config.axes_dims_rope), torch.device("cpu"))           # kept from step to step, so not the step's

    @contextlib.contextmanager
    def allocated(name):
        gc.collect()           # an earlier test's model, held by a cycle, would else be freed at any time and counted as ours: once 22 MB below zero
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            yield
        measured[name] = sum(event.self_cpu_memory_usage for event in profile.events())
    with allocated("weights"):
        model = lens.build(size).train()
    dead = set(model.unread())
    for name, p in model.named_parameters():
        p.requires_grad_(name not in dead)
    train.set_recompute(model, how)
    with allocated("average"):
        average = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
    optimizers = train.make_optimizers(model, train.Stage((512,), (24,), 1, 1e-4))
    with allocated("activations"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = train.flow_matching_loss(model, tokens, text, mask, grid, tokens, t).mean()
    loss.backward()
    with allocated("moments"):
        optimizers[0].step()
    total, learnt = sum(p.numel() for p in average.parameters()), sum(p.numel() for p in model.parameters() if p.requires_grad)
    for name, account in {"weights": 4 * total, "average": 4 * learnt, "moments": 8 * learnt, "activations": train.activations(config, how, count, grid, length)}.items():
        assert abs(measured[name] / account - 1) < 0.05, (name, measured[name], account)


def test_compiled_blocks_compute_what_plain_ones_do():
    """--compile: one dynamic program must serve every size and text length, values and gradients."""
    plain = lens.build("nano").train()
    with torch.no_grad():
        for p in plain.parameters():                           # an adaLN-zero start would compare zeros
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    fast = copy.deepcopy(plain)
    for block in fast.transformer_blocks:
        block.compile(dynamic=True)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    for grid, length in (((4, 6), 5), ((3, 3), 7)):
        x, t, text = torch.randn(2, grid[0] * grid[1], 16), torch.rand(2), [torch.randn(2, length, 32) for _ in range(2)]
        mask = torch.arange(length)[None] < torch.tensor([[length], [2]])
        a, b = (m(x, t, text, mask, grid) for m in (plain, fast))
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5) and a.abs().mean() > 0.01
        a.square().mean().backward()
        b.square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters()):
        assert p.grad is None and q.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5), name


def test_training_learns_and_resumes_bit_for_bit(parts, tmp_path, monkeypatch, capsys):
    command = ["--size", "nano", "--parts", str(parts), "--steps", "8", "--save-every", "3", "--preview-every", "0", "--device", "cpu"]
    steady(monkeypatch)
    train.main([*command, "--out", str(tmp_path / "whole")])
    losses = [r["loss"] for r in rows(tmp_path / "whole")]
    assert [r["step"] for r in rows(tmp_path / "whole")] == list(range(1, 17))          # stage 1, then stage 2
    assert np.mean(losses[-4:]) < np.mean(losses[:4])

    class Killed(Exception): pass
    step, count = train.flow_matching_loss, [0]
    def dies(*a):                                              # in the middle of stage 2, after steps that no checkpoint holds
        count[0] += 1
        if count[0] == 13:
            raise Killed
        return step(*a)
    monkeypatch.setattr(train, "flow_matching_loss", dies)
    with pytest.raises(Killed):
        train.main([*command, "--out", str(tmp_path / "halves")])
    monkeypatch.setattr(train, "flow_matching_loss", step)
    train.main([*command, "--out", str(tmp_path / "halves")])
    assert "resuming" in capsys.readouterr().out
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert all(torch.equal(one[k], two[k]) for k in one)
    strip = lambda folder: [{k: v for k, v in r.items() if k not in ("seconds", "pictures_per_s", "tflops", "peak_share", "wait_s")} for r in rows(folder)]
    assert strip(tmp_path / "whole") == strip(tmp_path / "halves")
    notes = lens.read_metadata(tmp_path / "whole")
    assert {"command", "seed", "steps", "guidance", "words"} <= notes.keys()
    pictures = sample.generate("a red circle", weights=tmp_path / "whole", height=48, width=48, steps=2)       # parts come from --parts, by `base`
    assert pictures[0].size == (48, 48)


def test_attention_is_picked_for_training_kept_by_a_resume_and_told(parts, tmp_path, monkeypatch, capsys):
    command = ["--size", "nano", "--stage", "2", "--parts", str(parts), "--save-every", "1", "--preview-every", "0", "--device", "cpu", "--out", str(tmp_path)]
    asked = []
    monkeypatch.setattr(sample, "pick_attention", lambda device, dtype, config, tokens, learns: asked.append((tokens, learns)) or ("math", "slow clock"))
    train.main([*command, "--steps", "1"])
    assert asked == [(36 + 40, True)] and "math attention (slow clock)" in capsys.readouterr().out
    assert torch.backends.cuda.math_sdp_enabled() and not torch.backends.cuda.flash_sdp_enabled()
    monkeypatch.setattr(sample, "pick_attention", lambda *a, **k: ("flash", "fast clock"))
    train.main([*command, "--steps", "2"])
    assert "math attention" in capsys.readouterr().out and not torch.backends.cuda.flash_sdp_enabled()
    assert json.loads((tmp_path / "state-00000002" / "notes.json").read_text())["attention"] == "math"


def torchrun(ranks, script, command, timeout=300):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), script, *command], check=True,
                          timeout=timeout, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(Path(train.__file__).parent), "OMP_NUM_THREADS": "1"}).stdout


def steady_script(folder, first=""):
    """train.py but for the choices of precision and attention, which a clock makes; `first`: a line of Python before it begins."""
    script = folder / "ranks.py"
    script.write_text(STEADY + f"import functools, sys, train\n{first}\ntrain.main(sys.argv[1:])\n")
    return script


@pytest.mark.parametrize("ranks, how", [(2, ["--fsdp"]), (4, [])])
def test_ranks_learn_what_one_process_learns(parts, tmp_path, monkeypatch, capsys, ranks, how):
    """torchrun over gloo, DDP and FSDP2, against one process that takes as many device batches a step; some batches are smaller
    than others, and the last step of an epoch leaves a rank with nothing to do. What the ranks saved, one process goes on from."""
    command = ["--size", "nano", "--parts", str(parts), "--save-every", "100", "--preview-every", "0", "--device", "cpu", "--batch", "5,3"]
    torchrun(ranks, steady_script(tmp_path), [*command, *how, "--steps", "6", "--out", tmp_path / "many"])
    steady(monkeypatch)
    train.main([*command, "--accumulate", str(ranks), "--steps", "6", "--out", str(tmp_path / "one")])
    one, many = rows(tmp_path / "one"), rows(tmp_path / "many")
    assert [r["step"] for r in many] == list(range(1, 13))
    for a, b in zip(one, many):
        assert a["size"] == b["size"] and a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-5) for k in a)
    train.main([*command, "--accumulate", str(ranks), "--steps", "8", "--out", str(tmp_path / "one")])
    train.main([*command, "--accumulate", str(ranks), "--steps", "8", "--out", str(tmp_path / "many")])
    assert "at step 12" in capsys.readouterr().out and [r["step"] for r in rows(tmp_path / "many")] == list(range(1, 15))
    assert rows(tmp_path / "one")[-1]["loss"] == pytest.approx(rows(tmp_path / "many")[-1]["loss"], rel=1e-4)


def test_ranks_that_share_their_weights_train_the_adapter_that_one_process_trains(parts, tmp_path, monkeypatch):
    command = ["--size", "nano", "--stage", "1", "--parts", str(parts), "--save-every", "100", "--preview-every", "0", "--device", "cpu", "--batch", "4", "--steps", "5"]
    steady(monkeypatch)
    train.main([*command, "--out", str(tmp_path / "base")])
    command += ["--init", str(tmp_path / "base"), "--lora", "4"]
    torchrun(2, steady_script(tmp_path), [*command, "--fsdp", "--out", tmp_path / "many"])
    train.main([*command, "--accumulate", "2", "--out", str(tmp_path / "one")])
    base, one, many = (lens.load_transformer(tmp_path / "base") for _ in range(3))
    lens.load_lora(one, tmp_path / "one"), lens.load_lora(many, tmp_path / "many")
    moved = {k: (w - base.state_dict()[k]).abs().max() for k, w in one.state_dict().items() if not torch.equal(w, base.state_dict()[k])}
    assert len(moved) > 10 and all(torch.allclose(w, many.state_dict()[k], atol=1e-2 * moved.get(k, 0) + 1e-9) for k, w in one.state_dict().items())


def test_ranks_take_compiled_blocks(parts, tmp_path, monkeypatch):
    """--compile under torchrun. Left to itself PyTorch cuts a compiled block where a bucket of DDP's gradients is full, and fails on the cut:
    the toy's blocks are larger than its first bucket of 1 MiB, nano's than buckets of 1 KB."""
    command = ["--size", "nano", "--stage", "1", "--steps", "3", "--parts", str(parts), "--preview-every", "0", "--device", "cpu", "--batch", "4"]
    small = "torch.nn.parallel.DistributedDataParallel = functools.partial(torch.nn.parallel.DistributedDataParallel, bucket_cap_mb=0.001)"
    torchrun(2, steady_script(tmp_path, small), [*command, "--compile", "--out", tmp_path / "many"])
    steady(monkeypatch)
    train.main([*command, "--accumulate", "2", "--out", str(tmp_path / "one")])
    losses = [[r["loss"] for r in rows(tmp_path / name)] for name in ("many", "one")]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_sigterm_saves_and_ends_well(parts, tmp_path, monkeypatch, capsys):
    command = ["--size", "nano", "--stage", "1", "--parts", str(parts), "--steps", "8", "--preview-every", "0", "--out", str(tmp_path), "--device", "cpu"]
    step, count = train.flow_matching_loss, [0]
    steady(monkeypatch)
    def notified(*a):
        count[0] += 1
        if count[0] == 5:
            signal.raise_signal(signal.SIGTERM)
        return step(*a)
    monkeypatch.setattr(train, "flow_matching_loss", notified)
    with pytest.raises(SystemExit) as done:
        train.main(command)
    assert done.value.code == 0 and "step 5" in capsys.readouterr().out
    train.main(command)
    assert "at step 5" in capsys.readouterr().out and [r["step"] for r in rows(tmp_path)] == list(range(1, 9))


def test_a_bad_step_is_left_out_and_counted_and_many_end_the_run(parts, tmp_path, monkeypatch):
    command = ["--size", "nano", "--stage", "1", "--parts", str(parts), "--preview-every", "0", "--save-every", "3", "--device", "cpu"]
    step, count, bad = train.flow_matching_loss, [0], {4: float("nan"), 6: 1e3}
    steady(monkeypatch)
    def sometimes(*a):
        count[0] += 1
        return step(*a) * bad.get(count[0], 1.0)
    monkeypatch.setattr(train, "flow_matching_loss", sometimes)
    train.main([*command, "--steps", "8", "--out", str(tmp_path / "two")])
    found = rows(tmp_path / "two")
    assert [r["step"] for r in found if r["loss"] is None] == [4, 6] and found[-1]["skipped"] == 2
    assert all(v.isfinite().all() for v in weights(tmp_path / "two").values())
    assert all(len(r["loss_by_t"]) == 4 for r in found)
    bad.update({k: float("inf") for k in range(count[0] + 5, count[0] + 99)})
    with pytest.raises(lens.LensError, match="in a row"):
        train.main([*command, "--steps", "40", "--out", str(tmp_path / "many")])
    notes = json.loads((train.checkpoints(tmp_path / "many")[-1] / "notes.json").read_text())
    assert notes["total"] == 12 and notes["in_a_row"] < train.PATIENCE and all(v.isfinite().all() for v in weights(tmp_path / "many").values())


def test_text_stage_resumes_bit_for_bit(tmp_path, monkeypatch):
    """On one thread: with two on a busy machine, the experts' sums come in either order, and differ by a rounding."""
    command = ["--stage", "text", "--size", "nano", "--save-every", "3", "--steps", "6", "--out"]
    class Killed(Exception): pass
    def dies(step, *a):
        if step == 5:
            raise Killed
        return schedule(step, *a)
    schedule, threads = train.schedule, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train.main([*command, str(tmp_path / "whole")])
        monkeypatch.setattr(train, "schedule", dies)
        with pytest.raises(Killed):
            train.main([*command, str(tmp_path / "halves")])
        monkeypatch.setattr(train, "schedule", schedule)
        train.main([*command, str(tmp_path / "halves")])
    finally:
        torch.set_num_threads(threads)
    one, two = (lens.load_pipeline(tmp_path / f, parts=("text_encoder",))[2].model.state_dict() for f in ("whole", "halves"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_the_toy_chat_template_says_what_lens_renders(parts):
    tokenizer = lens.load_pipeline(parts, parts=("text_encoder",))[2].tokenizer
    head, tail = lens.CHAT["gpt_oss"]
    messages = [dict(role="developer", content=lens.DESCRIBE), dict(role="user", content="a red circle"),
                dict(role="assistant", thinking=tail.split("<|message|>")[1].split("<|end|>")[0], content="")]
    said = tokenizer.apply_chat_template(messages, tokenize=False, current_date=lens.DATE)
    assert said == head.replace("{date}", lens.DATE) + "a red circle" + tail
    assert tokenizer.decode(tokenizer("a red circle above a star", add_special_tokens=False)["input_ids"]).strip() == "a red circle above a star"
    assert len(tokenizer("a red circle", add_special_tokens=False)["input_ids"]) == 3


@pytest.mark.parametrize("arguments, words", [
    (["--size", "huge"], "unknown size"), (["--size", "full"], "shards"), (["--steps", "0"], "--steps"), (["--steps", "x"], "--steps"),
    (["--parts", "{tmp}/none"], "no weights"), (["--out", "{tmp}/file/run"], "cannot write"),
])
def test_bad_input_is_one_clear_line(arguments, words, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    with pytest.raises(SystemExit) as e:
        sample.run(lambda: train.main(["--out", str(tmp_path / "run"), *arguments]))
    err = capsys.readouterr().err
    assert e.value.code == 2 and len([l for l in err.splitlines() if l.startswith("error: ")]) == 1 and words in err
