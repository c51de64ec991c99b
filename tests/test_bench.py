"""tools/bench.py: every path computes what the plain one does, and its lines say what they must."""
import contextlib
import copy
import functools
import json
import shutil
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import error_line, random_model
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import data
import kit.run
import lens
import sample
import train
from kit.checkpoint import load_pipeline
from kit.files import LensError
from kit.fp8 import Fp8Linear, to_fp8
from tools import bench
from vae import LensVAE

no_gpu = not torch.cuda.is_available()
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(no_gpu, reason="no GPU"))
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2e-2}
both_dtypes = pytest.mark.parametrize("dtype", BOUND, ids=["fp32", "bf16"])
needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")


def distance(a, b):
    """Length of the difference over the length of b."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


# --- Both samplers, on the shipped weights, where text matters ------------------------------------

class Toy:
    """The shipped weights on a device, and three pictures of one prompt to ask of them."""

    def __init__(self, device, dtype):
        self.model, self.vae, encoder = load_pipeline(sample.TOY, device, dtype)
        self.plain_vae = copy.deepcopy(self.vae).to(memory_format=torch.contiguous_format)
        noise = [sample.picture_noise(i, (3, 4), 32) for i in range(3)]
        (self.features,) = encoder.encode_each(["two red circles above a star"])
        self.noise = torch.cat(noise).to(device)

    def request(self, steps, guidance, features=None):
        features = self.features if features is None else features
        return bench.Request(features, self.noise, (3, 4), steps, guidance)

    def ours(self, request, **how):
        return bench.our_picture(self.model, self.vae, request, **how)

    def naive(self, request, padded=40):
        return bench.naive_picture(self.model, self.plain_vae, request, padded)


@pytest.fixture(scope="module")
def toy():
    return functools.cache(Toy)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@both_dtypes
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_path_gives_the_same_picture(toy, device, dtype, guidance):
    """One step from noise: ours, the naive one, padded far beyond the text, and the tight one."""
    parts = toy(device, dtype)
    request = parts.request(1, guidance)
    naive, pixels = parts.naive(request)
    assert naive.shape == parts.noise.shape
    assert pixels.shape == (3, 3, 48, 64)
    assert distance(naive, parts.noise) > 0.5

    assert distance(parts.ours(request)[0], naive) < BOUND[dtype]
    assert distance(parts.naive(request, padded=0)[0], naive) < BOUND[dtype]
    # A word less, and the bound tells.
    shorter = parts.request(1, guidance, parts.features[:, 1:])
    assert distance(parts.ours(shorter)[0], naive) > 2 * BOUND[dtype]

    latent = parts.vae.to_latent(naive, (3, 4)).to(dtype)
    with torch.no_grad():
        assert distance(parts.vae.decode(latent), parts.plain_vae.decode(latent)) < BOUND[dtype]


def test_the_naive_sampler_is_the_public_forward_by_hand(toy):
    """Padded, masked, both branches in one doubled batch: as a reader of the paper writes it."""
    parts = toy("cpu", torch.float32)
    S = parts.features.shape[1]
    text = F.pad(parts.features, (0, 0, 0, 9))[:, None]                    # [K, 1, S + 9, E]
    text = list(text.expand(-1, 6, -1, -1))
    seen = torch.tensor([S, S, S, 0, 0, 0])
    mask = torch.arange(S + 9) < seen[:, None]                             # [6, S + 9]
    x, levels = parts.noise, lens.sigmas(12, 3)
    with torch.no_grad():
        for t, s in zip(levels[:-1], levels[1:], strict=True):
            v = parts.model(torch.cat([x, x]), t.repeat(6), text, mask, (3, 4))
            cond, uncond = v.chunk(2)
            x = lens.euler_step(x, sample.guide(cond, uncond, 4.0), t, s)

    request = parts.request(3, 4.0)
    for tokens, _ in (parts.naive(request, padded=S + 9), parts.ours(request)):
        assert distance(tokens, x) < 3e-6                                  # 1e-6 a step


def test_naive_does_what_it_is_named_for(toy, monkeypatch):
    """The baseline must not borrow from us: rows padded and masked in both branches, modulation in
    every block at every step."""
    parts = toy("cpu", torch.float32)
    calls, forward = [], lens.Block.forward

    def noting(self, img, txt, time, modulation, rope, mask):
        calls.append((img, txt, modulation, mask))
        return forward(self, img, txt, time, modulation, rope, mask)

    monkeypatch.setattr(lens.Block, "forward", noting)
    request, blocks, S = parts.request(3, 2.0), 5, parts.features.shape[1]

    parts.naive(request)
    assert len(calls) == 3 * 2 * blocks
    for img, txt, modulation, mask in calls:
        assert len(img) == 3
        assert txt.shape[1] == 40
        assert mask.shape[-1] == 12 + 40
        assert modulation is None
    # The unconditional branch hides all of its text.
    assert sorted({mask[..., 12:].sum().item() for *_, mask in calls}) == [0, 3 * S]

    calls.clear()
    parts.naive(request, padded=0)
    assert {txt.shape[1] for _, txt, _, _ in calls} == {S}
    assert all(mask is not None for *_, mask in calls)

    # Ours: both branches share a forward, whose second half sees no text.
    calls.clear()
    parts.ours(request)
    assert len(calls) == 3 * blocks
    for img, txt, modulation, mask in calls:
        assert len(img) == 6
        assert txt.shape[:2] == (3, S)
        assert modulation is not None
        assert mask is None


# --- Attention and compiling ----------------------------------------------------------------------

@pytest.mark.parametrize("device", ["cpu", CUDA])
@both_dtypes
def test_every_attention_kernel_gives_the_same(toy, device, dtype):
    parts = toy(device, dtype)
    request = parts.request(1, 3.0)
    names = ("flash", "math") if device == "cpu" else tuple(kit.run.KERNELS)
    usual, _ = parts.ours(request)
    tokens = {name: parts.ours(request, kernel=name)[0] for name in names}
    for name in names:
        assert distance(tokens[name], usual) < BOUND[dtype]
    # Else both were the same kernel.
    assert device != "cpu" or not torch.equal(tokens["flash"], tokens["math"])


@pytest.mark.parametrize("slow, best", [("math", "flash"), ("flash", "math"), (None, "flash")])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_the_fastest_attention_is_picked(device, slow, best, monkeypatch):
    """The times are the machine's; what is made of them is ours. Of equals the first is taken."""
    ran = []

    def race(runners, rounds, device):
        for run in runners.values():
            run()
        ran.extend(runners)
        return {name: (0, 3.0 if name == slow else 1.0, None) for name in runners}

    monkeypatch.setattr(kit.run, "race", race)
    kit.run.fastest_attention.cache_clear()
    config = lens.SIZES["toy"].transformer
    kernel, why = kit.run.pick_attention(device, torch.bfloat16, config, 60, learns=True)
    kit.run.fastest_attention.cache_clear()

    assert set(ran) <= set(kit.run.KERNELS)
    assert "math" in ran
    assert all(f"{name} " in why for name in ran)
    if device == "cpu":
        assert sorted(ran) == ["flash", "math"]
        assert kernel == best
    # The race leaves PyTorch's own choice behind.
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


def test_forwards_on_a_cpu_take_flash():
    config = lens.SIZES["toy"].transformer
    assert kit.run.pick_attention("cpu", torch.float32, config, 60)[0] == "flash"


def test_race_takes_turns_and_leaves_the_first_run_out():
    order, pauses = [], iter([0.05, 0, 0, 0])

    def slow_at_first():
        order.append("a")
        time.sleep(next(pauses))

    def quick():
        order.append("b")
        return 7

    found = kit.run.race({"a": slow_at_first, "b": quick}, 3, "cpu")
    assert order == ["a", "b"] * 4
    assert found["b"][2] == 7
    first, median, _ = found["a"]
    assert first >= 0.05 > 10 * median


@needs_compiler
def test_compiled_blocks_sample_as_plain_ones_do():
    """One program for other sizes and lengths, with both branches in one forward and apart; names
    of weights stay, and the naive path runs none of it."""
    plain = random_model()
    fast = copy.deepcopy(plain)
    assert kit.run.compile_blocks(fast)
    assert fast.state_dict().keys() == plain.state_dict().keys()

    features, noise = torch.randn(2, 7, 32), torch.randn(3, 12, 16)
    for length, share_tokens in ((7, 512), (5, 0)):
        text = list(features[:, None, :length].expand(-1, 3, -1, -1))
        tokens = [sample.denoise(model, noise, text, None, (3, 4), 2, 3.0,
                                 share_tokens=share_tokens) for model in (plain, fast)]
        assert distance(tokens[1], tokens[0]) < 1e-6

    vae = LensVAE(lens.SIZES["nano"].vae).eval()
    request = bench.Request(features, noise, (3, 4), steps=2, guidance=3.0)
    naive = [bench.naive_picture(model, vae, request)[0] for model in (plain, fast)]
    assert torch.equal(*naive)


# --- A device without values ----------------------------------------------------------------------
# To read a number from it fails, as it would make a GPU wait; to mix it with the CPU fails, as it
# would on a GPU.

@pytest.fixture
def elsewhere(monkeypatch):
    """Denoiser, autoencoder and a denoiser that learns, of full width, on such a device. With two
    blocks: all 48 pass too, in a minute."""
    # Autocast is the only thing that this device does not know.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    full = lens.SIZES["full"]
    config = replace(full.transformer, num_layers=2)
    with torch.device("meta"):
        parts = [lens.LensTransformer(config).bfloat16(), LensVAE(full.vae).eval().bfloat16(),
                 lens.LensTransformer(config).train()]
    lens.rope_table.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield [part.to_empty(device="meta") for part in parts]
    lens.rope_table.cache_clear()


@pytest.mark.parametrize("side, batch, guidance", [(64, 1, 5.0), (16, 2, 5.0), (64, 1, 1.0)])
def test_a_picture_of_full_size_never_waits_for_the_device(elsewhere, side, batch, guidance):
    model, vae, _ = elsewhere
    features = torch.empty(4, 128, 2880, device="meta", dtype=torch.bfloat16)
    noise = torch.empty(batch, side**2, 128, device="meta")
    request = bench.Request(features, noise, (side, side), steps=3, guidance=guidance)

    pictures = [bench.our_picture(model, vae, request), bench.naive_picture(model, vae, request)]
    to_fp8(model)
    pictures.append(bench.our_picture(model, vae, request))
    for tokens, pixels in pictures:
        assert tokens.device.type == pixels.device.type == "meta"
        assert tokens.shape == noise.shape
        assert pixels.shape == (batch, 3, 16 * side, 16 * side)
    assert sum(isinstance(layer, Fp8Linear) for layer in model.modules()) == 5 * 2


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_a_training_step_of_full_size_waits_for_the_device_once(elsewhere, how):
    *_, model = elsewhere
    unread = set(model.unread())
    for name, p in model.named_parameters():
        p.requires_grad_(name not in unread)
    model.set_recompute(how)
    run = kit.run.Run(out=None, device="meta", bf16=True)
    batch = bench.random_batch(model.config, 2, (32, 32), 128)
    micro = train.MicroBatch(batch, share=0.5, last=True)
    stage = train.STAGES["full", 2]

    with pytest.raises(DataDependentOutputException) as stopped:
        train.train_step(run, model, [micro], [], stage)
    where = [str(entry.statement) for entry in stopped.traceback if entry.path.name == "train.py"]
    assert "sums.tolist()" in where[-1]
    for p in model.parameters():
        assert not p.requires_grad or p.grad.shape == p.shape


def test_a_naive_training_step_never_waits_for_the_device(elsewhere):
    *_, model = elsewhere
    run = kit.run.Run(out=None, device="meta", bf16=True)
    stage = train.STAGES["full", 2]
    trainee = bench.Trainee("full", run, model, stage, [], [], "none", compiled=False)
    batch = bench.random_batch(model.config, 2, (32, 32), 128, "meta")
    bench.naive_step(trainee, bench.padded(batch, 415))
    assert model.img_in.weight.grad.shape == model.img_in.weight.shape


# --- The lines -----------------------------------------------------------------------------------

def lines_of(capsys):
    """The JSON lines of standard output; what is told beside them goes to stderr."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def check_line(row):
    """What a line of either kind says, and that its ratios are those of its times."""
    assert {
        "device", "size", "dtype", "compiled", "attention", "pixels", "image_tokens", "text_tokens",
        "padded_to", "batch", "cold_s", "tflops", "peak_memory_gib"} <= row.keys()
    assert row["ratio"] == pytest.approx(row["naive_s"] / row["ours_s"], rel=2e-3)
    assert row["tight_ratio"] == pytest.approx(row["tight_s"] / row["ours_s"], rel=2e-3)
    assert row["peak_share"] == pytest.approx(row["tflops"] / row["matmul_tflops"], rel=2e-3)


def test_the_bench_of_pictures_prints_json_lines(capsys):
    bench.main(["sample", "--size", "nano", "--steps", "1", "--dtype", "fp32", "--device", "cpu",
                "--fp8", "--full"])
    rows = lines_of(capsys)
    plain, rounded = rows[::2], rows[1::2]
    assert len(plain) == len(rounded) == 8
    for row in rows:
        check_line(row)
        assert {"steps", "guidance"} <= row.keys()
    for row, other in zip(plain, rounded, strict=True):
        assert row["dtype"] == "float32" and other["dtype"] == "float32 and fp8"
        assert row["naive_s"] == other["naive_s"]
        assert row["difference"] < 2e-6 < other["difference"]
    assert {row["image_tokens"] for row in plain} == {4, 16, 64}
    assert {row["batch"] for row in plain} == {1, 4}
    assert {row["guidance"] for row in plain} == {1.0, 5.0}
    assert {row["text_tokens"] for row in plain} == {32, 128, 415}
    # Four pictures are four times the work of one: tflops and seconds give it back.
    work = [row["tflops"] * row["ours_s"] for row in plain]
    assert work[3] / work[0] == pytest.approx(4, rel=0.03)


def test_a_few_cases_are_the_default(capsys):
    bench.main(["sample", "--size", "nano", "--dtype", "fp32", "--device", "cpu"])
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [row["image_tokens"] for row in rows] == [16, 4, 16]
    assert [(row["steps"], row["guidance"]) for row in rows] == [(20, 5.0), (20, 5.0), (4, 1.0)]
    assert captured.err.startswith("sizes nano: a line a case, ")
    assert "peak_share is of" in captured.err


def test_the_full_size_is_for_a_gpu():
    assert bench.default_sizes("sample", "cpu", everything=False) == ["toy", "small"]
    assert bench.default_sizes("sample", "cuda", everything=False) == ["full"]
    assert bench.default_sizes("train", "cpu", everything=False) == ["toy"]
    assert bench.default_sizes("train", "cuda", everything=False) == ["full"]


def test_the_toy_is_loaded_outside_a_gpus_context(monkeypatch):
    """transformers takes a `with torch.device("cuda")` for a device_map, and wants accelerate."""
    def load(path, device, dtype):
        raise LensError(f"loaded for {device} on {torch.get_default_device()}")

    monkeypatch.setattr(bench, "load_pipeline", load)
    with pytest.raises(LensError, match="loaded for meta on cpu"):
        bench.make_subject("toy", "meta", torch.bfloat16)


def test_the_bench_of_training_prints_json_lines(capsys):
    bench.main(["train", "--size", "nano", "--device", "cpu", "--recompute", "full"])
    rows = lines_of(capsys)
    assert [row["pixels"] for row in rows] == ["64x64", "96x96"]
    assert [row["batch"] for row in rows] == [16, 8]
    for row in rows:
        check_line(row)
        assert row["recompute"] == "full"
        assert (row["text_tokens"], row["padded_to"]) == (40, 64)
    config = lens.SIZES["nano"].transformer
    model = bench.make_trainee("nano", "cpu", torch.float32).model
    for row, tokens in zip(rows, (16, 36), strict=True):
        assert model.config == config
        work = row["batch"] * train.flops(model, tokens, 40)
        assert 1e12 * row["tflops"] * row["ours_s"] == pytest.approx(work, rel=2e-3)


def test_all_three_training_paths_learn_the_same(monkeypatch):
    """Ours, naive and tight differ in how, not in what: with equal noise their steps are equal."""
    rng = torch.Generator().manual_seed(0)
    batch = fixed_batch(lens.SIZES["nano"].transformer, rng)
    noise, t = torch.empty_like(batch.tokens).normal_(generator=rng), torch.tensor([0.3, 0.8])
    shown = torch.zeros(2, dtype=torch.bool)
    monkeypatch.setattr(bench, "draw_plainly", lambda batch: (noise, t))
    monkeypatch.setattr(train, "draw_noise_and_time", lambda *_: (noise, t, shown))

    def change(step):
        trainee = bench.make_trainee("nano", "cpu", torch.float32)
        before = [p.detach().clone() for p in trainee.model.parameters()]
        step(trainee)
        after = trainee.model.parameters()
        return torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])

    ours = change(lambda trainee: bench.our_step(trainee, batch, "flash"))
    naive = change(lambda trainee: bench.naive_step(trainee, bench.padded(batch, 64)))
    tight = change(lambda trainee: bench.naive_step(trainee, batch))
    assert ours.abs().max() > 0
    assert distance(naive, ours) < 1e-3
    assert distance(tight, ours) < 1e-3


def fixed_batch(config, rng):
    """Two pictures of 2 x 3 tokens with five text tokens."""
    text = [torch.empty(2, 5, config.enc_hidden_dim).normal_(generator=rng)
            for _ in config.selected_layer_index]
    return data.Batch(
        samples=range(2), epoch=0, grid=(2, 3), text=text,
        mask=torch.ones(2, 5, dtype=torch.bool),
        tokens=torch.empty(2, 6, config.in_channels).normal_(generator=rng))


def test_a_batch_that_does_not_fit_is_halved(monkeypatch, capsys):
    """And where not even one picture fits, that is an error of one line."""
    command = ["train", "--size", "nano", "--device", "cpu"]
    step = train.train_step

    def card_with_room_for(pictures):
        def within(run, model, micro_batches, optimizers, stage):
            if len(micro_batches[0].batch.samples) > pictures:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return step(run, model, micro_batches, optimizers, stage)
        monkeypatch.setattr(train, "train_step", within)

    card_with_room_for(4)
    bench.main(command)
    assert [row["batch"] for row in lines_of(capsys)] == [4, 4]
    card_with_room_for(0)
    line = error_line(bench.main, command, capsys)
    assert line == "error: 64 x 64: not even one picture fits into this GPU's memory"


@pytest.mark.parametrize("arguments, words", [
    (["sample", "--size", "huge"], "unknown size"),
    (["train", "--fp8"], "for sample"),
    (["sample", "--steps", "0"], "--steps"),
    (["paint"], "invalid choice"),
])
def test_bad_input_is_one_clear_line(arguments, words, capsys):
    assert words in error_line(bench.main, arguments, capsys)
