"""--bench: every fast path computes what the plain one does, and the lines that it prints say what they must."""
import copy
import json
import shutil
import types

import pytest
import torch

import lens
import sample
import train
import vae

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def nano(device, dtype, seed=0):
    """A denoiser and both layouts of an autoencoder, random but not zero; features [K, S, E] and noise of three pictures."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = lens.LensTransformer(lens.SIZES["nano"].transformer).to(device, dtype)
        auto = vae.LensVAE(lens.SIZES["nano"].vae).eval().to(device, dtype)
        features = torch.randn(2, 7, 32).to(device, dtype)
    noise = torch.cat([sample.picture_noise(i, (3, 4), 16) for i in range(3)]).to(device)
    return model, (auto, copy.deepcopy(auto).to(memory_format=torch.channels_last)), features, noise


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", BOUND, ids=["fp32", "bf16"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_fast_path_is_the_plain_one(device, dtype, guidance):
    """Each trick alone taken away, and all: the tokens and pixels of the naive sampler, padded far beyond the text."""
    model, vaes, features, noise = nano(device, dtype)
    run = lambda *without: sample.attempt(model, vaes, features, noise, (3, 4), 2, guidance, without, pad=20)
    with torch.no_grad():
        naive = run(*sample.TRICKS)
        fast = run()
        assert naive[0].shape == noise.shape and naive[1].shape == (3, 3, 48, 64) and relative(naive[0], noise) > 0.05
        for without in ((), *[(trick,) for trick in sample.TRICKS]):
            tokens, pixels = run(*without)
            assert relative(tokens, naive[0]) < BOUND[dtype] and relative(pixels, naive[1]) < 3 * BOUND[dtype], without
        far = sample.attempt(model, vaes, features, noise, (3, 4), 2, guidance + 0.5, ())[0]
        assert relative(far, fast[0]) > 3 * BOUND[dtype]                                    # the bound can tell pictures apart


def test_the_naive_sampler_is_the_public_forward_by_hand():
    """Padded, masked, both branches in one doubled batch, modulation inside each block: what a reader of the paper would write."""
    model, vaes, features, noise = nano("cpu", torch.float32)
    text = [torch.nn.functional.pad(layer, (0, 0, 0, 13)).expand(6, -1, -1) for layer in features[:, None]]
    mask, x, levels = torch.arange(20).expand(6, -1) < torch.tensor([7, 7, 7, 0, 0, 0])[:, None], noise, lens.sigmas(12, 3)
    with torch.no_grad():
        for t, s in zip(levels, levels[1:]):
            c, u = model(torch.cat([x, x]), t.repeat(6), text, mask, (3, 4)).chunk(2)
            x = lens.euler_step(x, sample.guide(c, u, 4.0), t, s)
        for without in (sample.TRICKS, ()):
            assert relative(sample.attempt(model, vaes, features, noise, (3, 4), 3, 4.0, without, pad=20)[0], x) < 1e-6


def test_naive_does_what_it_is_named_for(monkeypatch):
    """The baseline must not borrow from us: rows padded and masked in both branches, modulation in every block at every step."""
    model, vaes, features, noise = nano("cpu", torch.float32)
    seen, block = [], type(model.transformer_blocks[0])
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, img, txt, time, mod, rope, mask: seen.append((len(img), txt, mod, mask)) or forward(self, img, txt, time, mod, rope, mask))
    run = lambda *without: (seen.clear(), sample.attempt(model, vaes, features, noise, (3, 4), 3, 2.0, without, pad=20), list(seen))[2]
    with torch.no_grad():
        naive, fast, apart = run(*sample.TRICKS), run(), run("shared forward")
    assert len(naive) == 3 * 2 * 2 and all(txt.shape[1] == 20 and mod is None and mask.shape[-1] == 32 and b == 3 for b, txt, mod, mask in naive)
    assert sorted({mask[..., 12:].sum().item() for *_, mask in naive}) == [0, 3 * 7]        # the unconditional branch hides all of its text
    assert len(fast) == 3 * 2 and all(b == 6 and txt.shape[:2] == (3, 7) and mod is not None and mask is None for b, txt, mod, mask in fast)
    assert len(apart) == 3 * 2 * 2 and sum(txt is None for _, txt, *_ in apart) == 6


def test_race_takes_turns_and_leaves_the_first_run_out():
    order, slow = [], iter([0.05, 0, 0, 0])
    import time
    found = sample.race({"a": lambda: order.append("a") or time.sleep(next(slow)), "b": lambda: order.append("b") or 7}, 3, "cpu")
    assert order == ["a", "b"] * 4 and found["b"][2] == 7
    assert found["a"][0] >= 0.05 > 10 * found["a"][1]


def test_the_bench_of_samples_prints_json_lines(capsys):
    sample.main(["--bench", "--size", "nano", "--steps", "1", "--dtype", "fp32", "--device", "cpu"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(rows) == 8
    for row in rows:
        assert {"device", "dtype", "pixels", "image_tokens", "text_tokens", "batch", "steps", "guidance", "warm_up", "cold_s", "tflops", "peak_memory_gib"} <= row.keys()
        assert row["ratio"] == pytest.approx(row["naive_s"] / row["ours_s"], rel=2e-3) and row["tight_ratio"] == pytest.approx(row["tight_s"] / row["ours_s"], rel=2e-3)
        assert row["peak_share"] == pytest.approx(row["tflops"] / row["matmul_tflops"], rel=2e-3) and row["difference"] < 1e-6
    assert {row["image_tokens"] for row in rows} == {64, 256, 1024} and rows[0]["predicted_s"] == rows[0]["ours_s"]
    double = rows[3]["predicted_s"] / rows[0]["predicted_s"]                                # a batch of four against one
    assert 3.9 < double <= 4.001
    assert {f"without_{trick.replace(' ', '_')}" for trick in sample.TRICKS if trick != "compiled"} <= rows[0].keys()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_inference_is_the_plain_one():
    """quicken: one program for other sizes and lengths, with both branches in one forward and apart; names of weights stay."""
    model, _, features, noise = nano("cpu", torch.float32)
    fast = copy.deepcopy(model)
    lens.quicken(fast)
    assert fast.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        for n, together in ((7, 512), (5, 0)):
            text = list(features[:, None, :n].expand(-1, 3, -1, -1))
            plain, quick = (sample.denoise(m, noise, text, None, (3, 4), 2, 3.0, together=together) for m in (model, fast))
            assert relative(quick, plain) < 1e-6
