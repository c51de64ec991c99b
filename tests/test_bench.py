"""--bench: every fast path computes what the plain one does, and the lines that it prints say what they must."""
import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import shutil

import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import full_step
import lens
import sample
import train
import vae

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.fixture(scope="module")
def toy():
    """(denoiser, (plain autoencoder, the one as it is loaded), features [K, S, E]) of the shipped weights, where text matters; noise of three pictures."""
    def load(device, dtype):
        model, auto, encoder = lens.load_pipeline(sample.TOY, device, dtype)
        noise = torch.cat([sample.picture_noise(i, (3, 4), 32) for i in range(3)]).to(device)
        return model, (copy.deepcopy(auto).to(memory_format=torch.contiguous_format), auto), sample.encode(encoder, ["two red circles above a star"])[0], noise
    return functools.cache(load)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", BOUND, ids=["fp32", "bf16"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_fast_path_is_the_plain_one(toy, device, dtype, guidance):
    """Each trick alone taken away, and all: one guided step from noise gives the naive sampler's tokens, padded far beyond the text."""
    model, vaes, features, noise = toy(device, dtype)
    run = lambda *without, features=features: sample.attempt(model, vaes, features, noise, (3, 4), 1, guidance, without, pad=40)
    with torch.no_grad():
        naive, pixels = run(*sample.TRICKS)
        assert naive.shape == noise.shape and pixels.shape == (3, 3, 48, 64) and relative(naive, noise) > 0.5
        for without in ((), *[(trick,) for trick in sample.TRICKS]):
            assert relative(run(*without)[0], naive) < BOUND[dtype], without
        assert relative(run(features=features[:, 1:])[0], naive) > 2 * BOUND[dtype]         # a word less, and the bound tells
        latent = vaes[0].to_latent(naive, (3, 4)).to(dtype)
        assert relative(vaes[1].decode(latent), vaes[0].decode(latent)) < BOUND[dtype]


def test_the_naive_sampler_is_the_public_forward_by_hand(toy):
    """Padded, masked, both branches in one doubled batch, modulation inside each block: what a reader of the paper would write."""
    model, vaes, features, noise = toy("cpu", torch.float32)
    S = features.shape[1]
    text = [torch.nn.functional.pad(layer, (0, 0, 0, 9)).expand(6, -1, -1) for layer in features[:, None]]
    mask, x, levels = torch.arange(S + 9).expand(6, -1) < torch.tensor([S, S, S, 0, 0, 0])[:, None], noise, lens.sigmas(12, 3)
    with torch.no_grad():
        for t, s in zip(levels, levels[1:]):
            c, u = model(torch.cat([x, x]), t.repeat(6), text, mask, (3, 4)).chunk(2)
            x = lens.euler_step(x, sample.guide(c, u, 4.0), t, s)
        for without in (sample.TRICKS, ()):
            assert relative(sample.attempt(model, vaes, features, noise, (3, 4), 3, 4.0, without, pad=S + 9)[0], x) < 3e-6          # 1e-6 a step


def test_naive_does_what_it_is_named_for(toy, monkeypatch):
    """The baseline must not borrow from us: rows padded and masked in both branches, modulation in every block at every step."""
    model, vaes, features, noise = toy("cpu", torch.float32)
    seen, block = [], type(model.transformer_blocks[0])
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, img, txt, time, mod, rope, mask: seen.append((len(img), txt, mod, mask)) or forward(self, img, txt, time, mod, rope, mask))
    run = lambda *without: (seen.clear(), sample.attempt(model, vaes, features, noise, (3, 4), 3, 2.0, without, pad=40), list(seen))[2]
    with torch.no_grad():
        naive, fast, apart = run(*sample.TRICKS), run(), run("shared forward")
    blocks, S = 5, features.shape[1]
    assert len(naive) == 3 * 2 * blocks and all(txt.shape[1] == 40 and mod is None and mask.shape[-1] == 52 and b == 3 for b, txt, mod, mask in naive)
    assert sorted({mask[..., 12:].sum().item() for *_, mask in naive}) == [0, 3 * S]        # the unconditional branch hides all of its text
    assert len(fast) == 3 * blocks and all(b == 6 and txt.shape[:2] == (3, S) and mod is not None and mask is None for b, txt, mod, mask in fast)
    assert len(apart) == 3 * 2 * blocks and sum(txt is None for _, txt, *_ in apart) == 3 * blocks


class Tape(torch.utils._python_dispatch.TorchDispatchMode):
    """A CUDA graph's stand-in where there is no GPU: keeps each operation with the very tensors that it met, and replays them into the same memory."""
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "a number was read: a GPU would wait for the CPU, and a recording breaks"
        self.calls.append((func, args, kwargs or {}, out := func(*args, **(kwargs or {}))))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for new, old in zip(*map(torch.utils._pytree.tree_leaves, (func(*args, **kwargs), out))):
                old.copy_(new) if torch.is_tensor(old) and old.data_ptr() != new.data_ptr() else None


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("guidance, together, start", [(1.0, 512, 0), (3.0, 512, 0), (3.0, 0, 0), (3.0, 512, 2)], ids=["plain", "shared", "apart", "from a picture"])
def test_steps_played_back_from_a_graph_are_the_steps(toy, device, guidance, together, start, monkeypatch):
    """Recorded once, played for every other step: nothing in a step may depend on Python, or be overwritten while a caller still holds it."""
    model, _, features, noise = toy(device, torch.float32)
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
        monkeypatch.setattr(torch.cuda, "graph", lambda tape: tape)
    calls, forward = [], type(model).velocity_from
    monkeypatch.setattr(type(model), "velocity_from", lambda *args: calls.append(1) or forward(*args))

    def run(graph):
        m, met = copy.copy(model), []
        calls.clear()
        m.graph = graph
        out = sample.denoise(m, noise, list(features[:, None].expand(-1, 3, -1, -1)), None, (3, 4), 6, guidance, lambda *now: met.append(now), start=start, together=together)
        return out, met, len(calls)
    (plain, steps, often), (quick, played, twice) = run(False), run(True)
    assert torch.allclose(quick, plain, rtol=0, atol=0 if device == "cpu" else 1e-5) and [i for i, *_ in played] == list(range(start, 6))
    for (_, x, v), (_, y, w) in zip(steps, played):
        assert torch.allclose(x, y, rtol=0, atol=0 if device == "cpu" else 1e-5) and torch.allclose(v, w, rtol=0, atol=0 if device == "cpu" else 1e-5)
    assert twice == 2 * often // (6 - start) < often


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_fp8_is_close_to_the_plain_model_on_its_own_way(toy, device):
    """Each forward along a guided run, with text and without; the bound must also tell: fewer bits by one in the weights break it."""
    model, _, features, noise = toy(device, torch.bfloat16)
    rounded, coarse, text = lens.to_fp8(copy.deepcopy(model)), copy.deepcopy(model), list(features[:, None].expand(-1, 3, -1, -1))
    layers = [name for name, layer in rounded.named_modules() if isinstance(layer, lens.Fp8Linear)]
    assert len(layers) == 10 and all("img_qkv" in name or "to_out" in name for name in layers)             # 426 is no multiple of 16: the MLP stays
    for name in layers:
        weight = coarse.get_submodule(name).weight
        scale = weight.abs().amax(1, keepdim=True) / 2
        weight.data = (weight.float() / scale).mul(4).round().div(4).mul(scale).to(weight)
    worst, levels = {}, lens.sigmas(12, 8)

    def compare(i, x, v):
        t = levels[i + 1:i + 2].to(device)
        for branch in (text, None) if i < 7 else ():
            plain = model(x.bfloat16(), t, branch, None, (3, 4)).float().flatten()
            for name, other in (("fp8", rounded), ("coarse", coarse)):
                near = torch.nn.functional.cosine_similarity(other(x.bfloat16(), t, branch, None, (3, 4)).float().flatten(), plain, 0).item()
                worst[name] = min(near, worst.get(name, 1))
    with torch.no_grad():
        sample.denoise(model, noise, text, None, (3, 4), 8, 3.0, compare)
    assert worst["fp8"] > 0.999 > worst["coarse"], worst


def test_e4m3_and_its_product_are_the_arithmetic_they_say():
    w, x = torch.randn(48, 32, generator=torch.Generator().manual_seed(0)), torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)) * 1000
    w[3], x[1, 2] = 0, 0                                                                    # rows of zeros must not divide by zero
    layer = torch.nn.Linear(32, 48)
    layer.weight.data = w
    (q, scale), quick = lens.e4m3(w, 1), lens.Fp8Linear(layer)
    assert q.dtype == torch.float8_e4m3fn and scale.shape == (48, 1) and lens.e4m3(w)[1].shape == (1, 1)
    assert ((q.double() * scale - w).abs() <= w.abs() / 16 + scale * 2**-10).all()
    back = q.float() * scale
    again, other = lens.e4m3(back, 1)
    assert torch.equal(again.float() * other, back)                                         # what was fp8 once stays as it is
    assert torch.equal(lens.e4m3(back, ())[0].float() * lens.e4m3(back, ())[1], back)       # under another scale too, as weights/toy is stored
    rows, scales = lens.e4m3(x.flatten(0, 1), 1)
    with torch.no_grad():
        by_hand = (rows.double() * scales) @ (q.double() * scale).T + layer.bias.double()
        assert relative(quick(x), by_hand.view(2, 5, 48)) < 1e-6 and relative(quick(x), layer(x)) > 1e-3


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", BOUND, ids=["fp32", "bf16"])
def test_every_attention_kernel_gives_the_same_and_the_fastest_is_picked(toy, device, dtype, monkeypatch):
    model, vaes, features, noise = toy(device, dtype)
    able = [kernel for kernel in sample.KERNELS if device != "cpu" or kernel in ("flash", "math")]
    out = {k: sample.attempt(model, vaes, features, noise, (3, 4), 1, 3.0, kernel=k)[0] for k in (None, *able)}
    assert all(relative(out[k], out[None]) < BOUND[dtype] for k in able)
    assert device != "cpu" or not torch.equal(out["flash"], out["math"])                    # else both were the same kernel
    with monkeypatch.context() as patch:                                                    # the times are the machine's; what is made of them is ours
        for slow, best in (("math", "flash"), ("flash", "math"), (None, "flash")):
            ran = []
            patch.setattr(vae, "race", lambda runners, rounds, device: (
                [run() for run in runners.values()], ran.extend(runners), {k: (0, 3.0 if k == slow else 1.0, None) for k in runners})[-1])
            sample.pick_attention.cache_clear()
            kernel, why = sample.pick_attention(device, dtype, model.config, 60, learns=True)
            assert set(ran) <= set(able) and "math" in ran and (device != "cpu" or (kernel == best and set(ran) == set(able)))
            assert all(f"{k} " in why for k in ran)
    sample.pick_attention.cache_clear()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    assert sample.pick_attention("cpu", dtype, model.config, 60)[0] == "flash"              # forwards alone


@pytest.fixture
def elsewhere(monkeypatch):
    """A device without values: to read a number from it fails, as it would make a GPU wait; to mix it with the CPU fails, as it would on a GPU."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)                     # the only thing that this device does not know
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    config = dataclasses.replace(lens.SIZES["full"].transformer, num_layers=2)              # of full width; all 48 blocks pass too, in a minute
    with torch.device("meta"):
        parts = lens.LensTransformer(config).bfloat16(), vae.LensVAE(lens.SIZES["full"].vae).eval().bfloat16(), lens.LensTransformer(config).train()
    lens.rope_table.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield [part.to_empty(device="meta") for part in parts]
    lens.rope_table.cache_clear()


@pytest.mark.parametrize("side, batch, guidance", [(64, 1, 5.0), (16, 2, 5.0), (64, 1, 1.0)])
def test_a_picture_of_full_size_never_waits_for_the_device(elsewhere, side, batch, guidance):
    model, auto, _ = elsewhere
    features, noise = torch.empty(4, 128, 2880, device="meta", dtype=torch.bfloat16), torch.empty(batch, side**2, 128, device="meta")
    with torch.no_grad():
        for m in (model, lens.to_fp8(model)):
            for without in ((), sample.TRICKS):
                tokens, pixels = sample.attempt(m, (auto, auto), features, noise, (side, side), 3, guidance, without)
                assert tokens.device.type == pixels.device.type == "meta" and pixels.shape == (batch, 3, 16 * side, 16 * side)
    assert sum(isinstance(layer, lens.Fp8Linear) for layer in model.modules()) == 5 * 2


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_a_training_step_of_full_size_waits_for_the_device_once(elsewhere, how):
    (*_, model), tokens = elsewhere, 32 * 32
    [p.requires_grad_(False) for name, p in model.named_parameters() if name in set(model.unread())]
    train.set_recompute(model, how)
    args = argparse.Namespace(device="meta", fsdp=False, ranks=1, labels=False, notice=[], seed=0)
    batch = torch.zeros(2, tokens, 128), list(torch.ones(4, 2, 128, 2880)), torch.ones(2, 128, dtype=torch.bool), []
    with pytest.raises(DataDependentOutputException) as stopped:
        train.train_step(args, argparse.Namespace(sizes=[(512, 512)]), model, model, [((0, range(2), 0), 1)], 2, iter([batch]), train.STAGES["full"][2],
                         {"bf16": True, "replaced": 0})
    assert [str(e.statement).strip() for e in stopped.traceback if e.path.name == "train.py"][-1].startswith("sums = sums.tolist()")
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters() if p.requires_grad)


def test_race_takes_turns_and_leaves_the_first_run_out():
    order, slow = [], iter([0.05, 0, 0, 0])
    import time
    found = vae.race({"a": lambda: order.append("a") or time.sleep(next(slow)), "b": lambda: order.append("b") or 7}, 3, "cpu")
    assert order == ["a", "b"] * 4 and found["b"][2] == 7
    assert found["a"][0] >= 0.05 > 10 * found["a"][1]


def test_the_bench_of_samples_prints_json_lines(capsys):
    sample.main(["--bench", "--size", "nano", "--steps", "1", "--dtype", "fp32", "--device", "cpu", "--fp8"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(rows) == 8
    for row in rows:
        assert {"device", "dtype", "attention", "pixels", "image_tokens", "text_tokens", "batch", "steps", "guidance", "warm_up", "cold_s", "tflops", "peak_memory_gib"} <= row.keys()
        assert row["ratio"] == pytest.approx(row["naive_s"] / row["ours_s"], rel=2e-3) and row["tight_ratio"] == pytest.approx(row["tight_s"] / row["ours_s"], rel=2e-3)
        assert row["peak_share"] == pytest.approx(row["tflops"] / row["matmul_tflops"], rel=2e-3) and row["difference"] < 2e-6
    assert {row["image_tokens"] for row in rows} == {4, 16, 64} and rows[0]["predicted_s"] == rows[0]["ours_s"]
    double = rows[3]["predicted_s"] / rows[0]["predicted_s"]                                # a batch of four against one
    assert 3.9 < double <= 4.001
    assert {f"without_{trick.replace(' ', '_')}" for trick in sample.TRICKS if trick not in ("compiled", "CUDA graph")} <= rows[0].keys()
    assert all(row["with_fp8"] > 0 for row in rows)


def test_the_bench_loads_the_toy_outside_a_gpus_context(monkeypatch):
    """transformers takes a `with torch.device("cuda")` for a device_map, and refuses without accelerate: seen in its source, since no GPU was at hand."""
    def load(*_):
        raise lens.LensError(f"loaded for {_[1]} on {torch.get_default_device()}")
    monkeypatch.setattr(lens, "load_pipeline", load)
    with pytest.raises(lens.LensError, match="loaded for meta on cpu"):
        sample.bench(argparse.Namespace(size="toy", dtype="bf16", compile=False, fp8=False, steps=None), "meta")


def test_flags_for_a_gpu_are_refused_in_one_line_or_work_on_a_cpu(tmp_path, capsys):
    with pytest.raises(lens.LensError, match="--cuda-graph is for a GPU"):
        sample.main(["--prompt", "a red circle", "--cuda-graph", "--device", "cpu"])
    make = lambda name, *flags: sample.main(["--prompt", "a red circle", "--steps", "3", "--device", "cpu", "--cache", "", "--out", str(tmp_path / name), *flags])
    make("plain"), make("rounded", "--fp8")
    plain, rounded = (Image.open(next((tmp_path / name).glob("*.png"))) for name in ("plain", "rounded"))
    assert plain.tobytes() != rounded.tobytes() and "flash attention" in capsys.readouterr().out
    assert plain.text["precision"] in ("bfloat16", "float32") and rounded.text["precision"] == plain.text["precision"] + " and fp8"


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_inference_is_the_plain_one():
    """quicken: one program for other sizes and lengths, with both branches in one forward and apart; names of weights stay."""
    model, features, noise = lens.build("nano"), torch.randn(2, 7, 32), torch.randn(3, 12, 16)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    fast = copy.deepcopy(model)
    lens.quicken(fast)
    assert fast.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        for n, together in ((7, 512), (5, 0)):
            text = list(features[:, None, :n].expand(-1, 3, -1, -1))
            plain, quick = (sample.denoise(m, noise, text, None, (3, 4), 2, 3.0, together=together) for m in (model, fast))
            assert relative(quick, plain) < 1e-6


def test_the_bench_of_training_prints_json_lines(capsys):
    train.main(["--bench", "--size", "nano", "--device", "cpu", "--batch", "2,1"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["pixels"] for row in rows] == ["64x64", "96x96"] and [row["batch"] for row in rows] == [2, 1]
    for row in rows:
        assert {"device", "dtype", "text_tokens", "recompute", "compiled", "warm_up", "cold_s", "peak_memory_gib"} <= row.keys()
        assert row["ratio"] == pytest.approx(row["naive_s"] / row["ours_s"], rel=2e-3)
        assert row["noise_s"] + row["gradients_s"] + row["optimizer_s"] == pytest.approx(row["ours_s"], rel=2e-2, abs=1e-5)
        assert row["peak_share"] == pytest.approx(row["tflops"] / row["matmul_tflops"], rel=2e-3)


def test_a_batch_that_does_not_fit_is_halved_and_none_is_an_error_of_one_line(monkeypatch, capsys):
    command, step = ["--bench", "--size", "nano", "--device", "cpu", "--batch", "7,2"], train.train_step
    def on_a_card_for(room):
        def within(args, source, model, parallel, rows, total, *more):
            if total > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return step(args, source, model, parallel, rows, total, *more)
        monkeypatch.setattr(train, "train_step", within)
    on_a_card_for(3)
    train.main(command)
    assert [json.loads(line)["batch"] for line in capsys.readouterr().out.splitlines()] == [3, 2]
    on_a_card_for(0)
    with pytest.raises(SystemExit) as stopped:
        sample.run(lambda: train.main(command))
    assert stopped.value.code == 2 and capsys.readouterr().err == "error: 64 x 64: not even one picture fits into the memory of this GPU\n"


@pytest.mark.parametrize("what", ["rl", "distill"])
def test_the_measured_step_beside_the_counted_one_runs(what, capsys):
    found = full_step.main([what, "--size", "nano", "--rank", "4", "--area", "64", "--pictures", "2"])
    assert found["peak_gib"] > found["counted_gib"] > 0 and found["adapter"] < found["parameters"]
