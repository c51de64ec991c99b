"""sample.py: the sampler against the reference's numbers, its invariances, the cache of prompt
features, and the command line on a nano model."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDENS, error_line, random_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import data
import kit.checkpoint
import kit.places
import lens
import sample
import vae
from kit import outputs
from kit.checkpoint import load_transformer, save_pipeline
from kit.files import LensError, write_json, write_safetensors
from kit.images import from_pil, read_notes
from kit.lora import add_lora, lora_parameters, save_lora
from kit.places import WEIGHT_NAMES, base_from
from toy.checker import DRAWN, token_diversity
from toy.world import TASKS, draw, sample_scene

GRID = (3, 4)
NANO = lens.SIZES["nano"]


def difference(a, b):
    """Length of a - b over the length of b."""
    return ((a - b).norm() / b.norm()).item()


def golden(name):
    """-> (tensors, notes) of a file of goldens."""
    with safe_open(str(GOLDENS / f"{name}.safetensors"), "pt") as f:
        return {key: f.get_tensor(key) for key in f.keys()}, f.metadata()


def load_golden(model, tensors):
    prefix = "weights."
    state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()
             if key.startswith(prefix)}
    model.load_state_dict(state)
    return model.eval()


def noise_and_text(batch=2, length=5, seed=0):
    """Random (noise [B, 12, 16], text 2 x [B, S, 32]) for the nano denoiser."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 12, 16, generator=generator)
    text = [torch.randn(batch, length, 32, generator=generator) for _ in range(2)]
    return noise, text


def pixels(picture):
    return np.asarray(picture, int)


# --- The sampler ----------------------------------------------------------------------------------

def test_golden_guided_pipeline():
    denoiser_tensors, denoiser_notes = golden("dit")
    vae_tensors, vae_notes = golden("vae")
    run, notes = golden("pipeline")
    config = lens.LensConfig.from_dict(json.loads(denoiser_notes["config"]))
    model = load_golden(lens.LensTransformer(config), denoiser_tensors)
    autoencoder = load_golden(vae.LensVAE(json.loads(vae_notes["config"])), vae_tensors)

    grid = tuple(json.loads(notes["latent_grid"]))
    text = [run[f"in.text_features.{k}"] for k in range(4)]
    states = []
    tokens = sample.denoise(
        model, run["in.noise"], text, run["in.text_mask"], grid, int(notes["steps"]),
        float(notes["guidance_scale"]), on_step=lambda i, x, v: states.append(x))

    for ours, theirs in zip(states, run["out.latents_per_step"], strict=True):
        assert difference(ours, theirs) < 1e-3
    assert torch.equal(tokens, states[-1])
    with torch.no_grad():
        image = autoencoder.decode(autoencoder.to_latent(tokens, grid))
    assert difference(image, run["out.image"]) < 1e-3


@torch.no_grad()
def plain_euler(model, noise, text, steps, guidance, negative=None, start=0):
    """The method as one writes it first: the public forward, twice a step under guidance."""
    levels = lens.sigmas(noise.shape[1], steps)
    x = noise
    for i in range(start, steps):
        t = levels[i].expand(len(x))
        v = model(x, t, text, None, GRID)
        if guidance != 1.0:
            without = model(x, t, negative, None, GRID)
            v = sample.guide(v, without, guidance)
        x = lens.euler_step(x, v, levels[i], levels[i + 1])
    return x


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize("with_negative", [True, False])
@pytest.mark.parametrize("start", [0, 2])
def test_denoise_is_the_plain_euler_loop(guidance, with_text, with_negative, start):
    model = random_model()
    noise, text = noise_and_text()
    text = text if with_text else None
    negative = noise_and_text(length=3, seed=1)[1] if with_negative else None
    expected = plain_euler(model, noise, text, 4, guidance, negative, start)
    for share_tokens in (0, 512):
        tokens = sample.denoise(model, noise, text, None, GRID, 4, guidance, negative,
                                start=start, share_tokens=share_tokens)
        assert difference(tokens, expected) < 1e-5
    assert difference(expected, noise) > 0.1


def test_denoise_reads_masked_text_as_the_forward_does():
    model = random_model()
    noise, text = noise_and_text()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    tokens = sample.denoise(model, noise, text, mask, GRID, 3, 4.0)
    second = [layer[1:, :3] for layer in text]
    alone = sample.denoise(model, noise[1:], second, None, GRID, 3, 4.0)
    assert difference(tokens[1:], alone) < 1e-5
    all_visible = sample.denoise(model, noise, text, None, GRID, 3, 4.0)
    assert difference(tokens[1:], all_visible[1:]) > 1e-4


def guided_velocity(model, noise, text, guidance=3.0, share=True, negative=None):
    levels = lens.sigmas(noise.shape[1], 4)
    return sample.GuidedVelocity(model, text, None, negative, GRID, levels, guidance, share)


@torch.no_grad()
def test_a_shared_forward_equals_two():
    model = random_model()
    noise, text = noise_and_text()
    shared = guided_velocity(model, noise, text, share=True)
    apart = guided_velocity(model, noise, text, share=False)
    assert shared.share_forward
    assert not apart.share_forward
    for i in range(4):
        assert difference(shared(noise, i), apart(noise, i)) < 1e-6

    # And text counts: without it there is nothing to guide along.
    nothing = guided_velocity(model, noise, None)
    assert difference(nothing(noise, 1), apart(noise, 1)) > 1e-2


def test_only_branches_that_differ_in_text_alone_share_a_forward():
    model = random_model()
    noise, text = noise_and_text()
    assert not guided_velocity(model, noise, text, negative=text).share_forward
    assert not guided_velocity(model, noise, None).share_forward


def test_forwards_a_step():
    """No guidance: one. Guidance: one for both branches while they are small, else two."""
    model = random_model()
    noise, text = noise_and_text()
    calls = []
    model.img_in.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))

    sample.denoise(model, noise, text, None, GRID, 4, 1.0)
    assert calls == [2] * 4
    calls.clear()
    sample.denoise(model, noise, text, None, GRID, 4, 3.0, share_tokens=0)
    assert calls == [2] * 8
    calls.clear()
    sample.denoise(model, noise, text, None, GRID, 4, 3.0)
    assert calls == [4] * 4
    calls.clear()
    sample.denoise(model, noise, text, None, GRID, 4, 3.0, share_tokens=2 * 12 - 1)
    assert calls == [2] * 8


def test_larger_batches_share_a_forward_on_a_gpu_than_on_a_cpu():
    assert sample.share_limit("cpu") == 512
    assert sample.share_limit(torch.device("cuda:1")) == 2048


def test_guided_velocity_keeps_the_length_of_the_conditional_one():
    generator = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, 2, 7, 16, generator=generator).unbind(0)
    guided = sample.guide(cond, uncond, 5.0)
    assert torch.allclose(guided.norm(dim=-1), cond.norm(dim=-1), rtol=1e-5)
    direction = uncond + 5.0 * (cond - uncond)
    cosine = F.cosine_similarity(guided, direction, dim=-1)
    assert torch.allclose(cosine, torch.ones(2, 7), atol=1e-5)
    assert torch.allclose(sample.guide(cond, uncond, 1.0), cond, atol=1e-5)
    assert torch.equal(sample.guide(cond * 0, cond * 0, 5.0), cond * 0)       # no division by 0


# --- From prompts to pictures ---------------------------------------------------------------------

def test_a_picture_does_not_depend_on_its_batch(pipeline):
    prompts = [
        "a red circle",
        "a small blue square on the left. the background is white",
        "two green stars",
        "a red circle",
        "",
    ]
    seeds = [3, 4, 5, 6, 7]
    how = dict(height=48, width=64, steps=3, guidance=3.0)
    together = sample.generate(prompts, pipeline, seeds=seeds, **how)
    for prompt, seed, picture in zip(prompts, seeds, together):
        alone = sample.generate(prompt, pipeline, seeds=[seed], **how)[0]
        assert picture.size == (64, 48)
        assert np.abs(pixels(picture) - pixels(alone)).max() <= 1
    # The same words from another seed.
    assert (pixels(together[0]) != pixels(together[3])).any()


def test_a_long_batch_is_cut_and_its_order_kept(pipeline):
    prompts = ["a red circle"] * 5
    how = dict(height=48, width=48, steps=2, guidance=1.0, seed=3)
    whole = sample.generate(prompts, pipeline, **how)
    in_parts = sample.generate(prompts, pipeline, batch_size=2, **how)
    for a, b in zip(whole, in_parts):
        assert np.abs(pixels(a) - pixels(b)).max() <= 1
    assert len({picture.tobytes() for picture in whole}) == 5     # five seeds


def test_one_side_alone_makes_a_square_picture(pipeline):
    for side in ({"height": 48}, {"width": 48}):
        (picture,) = sample.generate("a red circle", pipeline, steps=2, **side)
        assert picture.size == (48, 48)
    with pytest.raises(LensError, match="size 100 x 64: both sides must be divisible by 16"):
        sample.generate("a red circle", pipeline, height=64, width=100)


def test_prompts_of_one_length_share_a_batch():
    features = [torch.zeros(2, length, 4) for length in (3, 5, 3, 3)] + [None]
    assert sample.batches_of_one_length(features, 2) == [[0, 2], [3], [1], [4]]


def test_a_negative_prompt_changes_the_picture_and_an_empty_one_is_no_text(pipeline):
    def make(negative):
        pictures = sample.generate("a red circle", pipeline, height=48, width=48, steps=3,
                                   guidance=4.0, negative=negative)
        return pixels(pictures[0])

    plain = make("")
    assert (plain == make("   ")).all()
    assert (plain != make("a blue circle")).any()


def test_image_to_image_starts_from_the_picture(pipeline):
    _, autoencoder, encoder = pipeline
    # A fresh model's velocity is zero: what goes in comes out.
    fresh = (lens.build("nano"), autoencoder, encoder)
    scene, _, _ = sample_scene(0, 0, 1, 64, 64)
    start = draw(scene, 64, 64)
    with torch.no_grad():
        mean, _ = autoencoder.encode(from_pil([start]))
        x0 = autoencoder.to_tokens(mean)
    noise = sample.picture_noise(0, (4, 4), 16)
    levels = lens.sigmas(16, 20)

    for strength, steps in ((0.05, 1), (0.5, 10), (1.0, 20)):
        states = []
        sample.generate(
            "a red circle", fresh, height=64, width=64, steps=20, guidance=1.0, images=[start],
            strength=strength, on_step=lambda i, x, v, states=states: states.append(x))
        assert len(states) == steps
        expected = lens.add_noise(x0, noise, levels[20 - steps].item())
        assert difference(states[0], expected) < 1e-5


def test_the_start_keeps_its_proportions_and_what_is_clear_is_white(pipeline):
    """A wide picture's middle is taken, not all of it squashed: the same as of that middle."""
    wide = draw(sample_scene(0, 0, 5, 64, 128)[0], 64, 128)
    middle = wide.crop((32, 0, 96, 64))
    clear = middle.convert("RGBA")
    clear.putalpha(0)

    def from_start(start):
        (picture,) = sample.generate("a red circle", pipeline, height=64, width=64, steps=4,
                                     guidance=1.0, images=[start], strength=0.25)
        return np.asarray(picture)

    assert (from_start(wide) == from_start(middle)).all()
    assert (from_start(clear) == from_start(Image.new("RGB", (64, 64), "white"))).all()


def test_the_start_is_read_as_training_reads_pictures(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                               # held upright, stored on its side
    scene = draw(sample_scene(0, 0, 5, 64, 128)[0], 64, 128)
    scene.save(tmp_path / "phone.png", exif=exif)
    expected = scene.transpose(Image.Transpose.ROTATE_270)
    assert (np.asarray(sample.open_start(tmp_path / "phone.png")) == np.asarray(expected)).all()

    scene.putalpha(0)
    scene.save(tmp_path / "clear.png")
    assert (np.asarray(sample.open_start(tmp_path / "clear.png")) == 255).all()
    (tmp_path / "torn.png").write_bytes((tmp_path / "clear.png").read_bytes()[:60])
    with pytest.raises(LensError, match="cannot read --image .*torn.png: broken picture"):
        sample.open_start(tmp_path / "torn.png")


@pytest.mark.parametrize("strength", [1.5, 0.0])
def test_a_strength_that_is_no_share_is_refused(strength, pipeline):
    start = Image.new("RGB", (64, 64))
    with pytest.raises(LensError, match="above 0 and at most 1"):
        sample.generate("a star", pipeline, images=[start], strength=strength)


def test_a_usual_picture_is_as_large_as_the_notes_say_else_as_the_model():
    assert sample.usual_base({"base": "96"}, channels=32) == 96
    assert sample.usual_base({}, channels=32) == sample.TOY_BASE
    assert sample.usual_base({}, channels=128) == sample.BASE


def test_settings_are_as_asked_else_as_the_weights_say_else_the_defaults():
    notes = {"steps": "4", "guidance": "1.0"}
    assert sample.sampler_settings(notes) == (4, 1.0)
    assert sample.sampler_settings(notes, steps=7) == (7, 1.0)
    assert sample.sampler_settings(notes, guidance=2.5) == (4, 2.5)
    assert sample.sampler_settings({}) == (sample.STEPS, sample.GUIDANCE)


def test_noise_is_of_its_seed_alone():
    noise = sample.picture_noise(3, GRID, 16)
    torch.manual_seed(9)
    assert torch.equal(noise, sample.picture_noise(3, GRID, 16))
    assert not torch.equal(noise, sample.picture_noise(4, GRID, 16))
    assert noise.shape == (1, 12, 16)


# --- Evaluation -----------------------------------------------------------------------------------

def test_evaluation_measures_diversity_where_asked(pipeline):
    how = dict(height=48, width=48, steps=2, guidance=1.0, per_task=2, progress=False)
    scores, pictures, prompts = sample.evaluate(pipeline, **how)
    assert list(scores) == ["overall", *TASKS, *DRAWN]
    assert len(pictures) == len(prompts) == 12
    more, *_ = sample.evaluate(pipeline, **how, diversity=True)
    assert more.pop("diversity") > 0
    assert more == scores

    rewritten, again, asked = sample.evaluate(
        pipeline, **how, rewrite=lambda prompts: ["a star"] * len(prompts))
    assert asked == prompts                                       # scored as they were asked
    assert again[0].tobytes() != pictures[0].tobytes()


def test_diversity_of_a_model_that_leaves_the_noise_as_it_is(pipeline):
    """A fresh model's velocity is zero, so its tokens are the noise of four seeds."""
    _, autoencoder, encoder = pipeline
    fresh = (lens.build("nano"), autoencoder, encoder)
    of_noise = sample.measure_diversity(fresh, 48, 48, 1, 1.0)
    noise = torch.cat([sample.picture_noise(seed, (3, 3), 16) for seed in range(4)])
    assert of_noise == pytest.approx(float(token_diversity(noise)), abs=1e-4)


# --- Sizes and prompts ----------------------------------------------------------------------------

def test_every_size_of_the_checkpoint_is_allowed():
    for base in data.PAPER_BUCKETS:
        for ratio in data.RATIOS:
            assert sample.pick_size(None, None, ratio, base) == data.bucket(base, ratio)


def test_one_side_alone_is_a_square():
    assert sample.pick_size(96, None, None, 128) == (96, 96)
    assert sample.pick_size(None, 64, None, 128) == (64, 64)
    assert sample.pick_size(None, None, None, 128) == (128, 128)


# --- The command line -----------------------------------------------------------------------------

def run_sample(*arguments):
    sample.main([str(argument) for argument in arguments])


def only_picture(folder):
    (path,) = folder.glob("*.png")
    return Image.open(path)


def test_an_adapter_says_how_it_is_sampled(copied, tmp_path, capsys):
    """Ours does; of other tools' notes "steps" may be anything."""
    tuned = load_transformer(copied)
    add_lora(tuned, 2, 2)
    command = ["--weights", copied, "--prompt", "a red circle", "--cache", "", "--dtype", "fp32",
               "--out", tmp_path / "o", "--lora", tmp_path / "lora"]
    save_lora(tuned, tmp_path / "lora", metadata={"trained_steps": 9, "steps": 4, "guidance": 1.0})
    run_sample(*command)
    assert "; 4 steps, guidance 1, 64 x 64 pixels" in capsys.readouterr().out
    run_sample(*command, "--guidance", 2.5)
    assert "; 4 steps, guidance 2.5," in capsys.readouterr().out
    save_lora(tuned, tmp_path / "lora", metadata={"steps": 3000})
    run_sample(*command)
    assert "; 3 steps, guidance 2," in capsys.readouterr().out


def test_a_lora_over_other_weights_is_told(nano, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    model = load_transformer(nano)
    add_lora(model, 2, 2)
    save_lora(model, adapter)
    save_pipeline(adapter, base=base_from(adapter, nano))
    asks_for(nano, tmp_path, "--prompt", "a star", "--lora", adapter)
    assert "warning" not in capsys.readouterr().err
    tensors, notes = load_file(nano / "transformer" / WEIGHT_NAMES[0]), {"longer": "x" * 99}
    other = tmp_path / "other"
    shutil.copytree(nano, other)
    write_safetensors(other / "transformer" / WEIGHT_NAMES[0], tensors, notes)
    asks_for(other, tmp_path, "--prompt", "a star", "--lora", adapter)
    assert f"was trained over {nano.resolve()}" in capsys.readouterr().err


def test_the_shipped_adapters_say_how_they_are_sampled():
    weights = sample.TOY.parent
    turbo = kit.places.settings_of_adapter(weights / "toy-turbo" / "adapter_model.safetensors")
    assert sample.sampler_settings(turbo) == (4, 1.0)


@pytest.mark.parametrize("home, sizes_in, sizes_out", [
    (128, [(128, 128), (64, 64), (192, 192), (96, 192)], [(1024, 1024), (256, 256), (48, 48)]),
    (1024, [(1440, 1440), (512, 512), (1088, 1936)], [(256, 256), (128, 128)]),
])
def test_a_size_far_from_home_is_warned_of(home, sizes_in, sizes_out, capsys):
    for height, width in sizes_in:
        sample.warn_of_size(height, width, home)
    assert capsys.readouterr().err == ""
    for height, width in sizes_out:
        sample.warn_of_size(height, width, home)
        assert f"warning: these weights draw {home} x {home} pixels" in capsys.readouterr().err


def test_a_start_of_which_nothing_is_left_is_warned_of(nano, tmp_path, capsys):
    start = tmp_path / "start.png"
    Image.new("RGB", (64, 64), "red").save(start)
    asks_for(nano, tmp_path, "--prompt", "a red circle", "--image", start, "--strength", 0.8)
    assert "nothing is left of --image" in capsys.readouterr().err     # two steps of two
    asks_for(nano, tmp_path, "--prompt", "a red circle", "--image", start, "--strength", 0.5)
    assert "nothing is left" not in capsys.readouterr().err


def test_prompts_are_in_one_form_and_a_quoted_tilde_is_the_home(nano, tmp_path, monkeypatch):
    """macOS types an accent as a character of its own; a shell leaves "~" in quotation marks."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts.txt").write_text("a star")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "start.png")
    run_sample("--weights", nano, "--cache", "", "--steps", 2, "--prompt", "a cafe\u0301",
               "--negative", "re\u0301d", "--image", "~/start.png", "--out", "~/one.png")
    notes = read_notes(tmp_path / "one.png")
    assert (notes["prompt"], notes["negative"]) == ("a caf\u00e9", "r\u00e9d")
    assert notes["strength"] == "0.7"
    run_sample("--weights", nano, "--cache", "", "--steps", 2, "--prompts-file", "~/prompts.txt",
               "--out", "~/two.png")
    assert read_notes(tmp_path / "two.png")["prompt"] == "a star"


def test_a_spelling_that_the_weights_do_not_know_is_replaced(nano, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample.language, "SPELLINGS", (("blue", "bleu"),))
    asks_for(nano, tmp_path, "--prompt", "a Bleu circle", "--negative", "bleu")
    assert "note: bleu is drawn as blue" in capsys.readouterr().err
    (path,) = (tmp_path / "o").iterdir()
    assert path.name == "a-blue-circle-0.png"
    assert read_notes(path)["prompt"] == "a blue circle"
    assert read_notes(path)["negative"] == "blue"


def test_prompt_to_png_with_its_story(nano, tmp_path, capsys):
    run_sample("--weights", nano, "--prompt", "a red circle and a zeppelin", "--seed", 5,
               "--num", 2, "--dtype", "fp32", "--out", tmp_path / "o", "--cache", tmp_path / "c")
    warned = capsys.readouterr().err
    assert "never saw the words and, zeppelin" in warned
    assert "blue" in warned
    pictures = sorted((tmp_path / "o").glob("a-red-circle*.png"))
    assert [path.name[-6:] for path in pictures] == ["-5.png", "-6.png"]
    assert (tmp_path / "o" / "sheet.png").exists()

    notes = Image.open(pictures[0]).text
    assert notes["prompt"] == "a red circle and a zeppelin"
    assert notes["seed"] == "5"
    assert notes["steps"] == "3"
    assert notes["guidance"] == "2.0"
    assert notes["size"] == "64x64"
    assert notes["date"] == lens.DATE
    assert notes["precision"] == "float32"
    assert nano.name in notes["weights"]
    assert not list(tmp_path.rglob("*.new"))


def asks_for(nano, tmp_path, *arguments):
    """Runs sample.py in tmp_path/o, with two steps."""
    run_sample("--weights", nano, "--dtype", "fp32", "--cache", "", "--steps", 2,
               "--out", tmp_path / "o", *arguments)


def written(folder):
    """{path: bytes} of the pictures in a folder, but for the sheets."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*.png"))
            if not path.name.startswith("sheet")}


THREE = ["--prompt", "a red circle", "--prompt", "two blue stars above", "--prompt", "a star"]


def test_pictures_are_written_as_they_are_made_and_not_made_again(nano, tmp_path, monkeypatch,
                                                                  capsys):
    """Three prompts of three lengths are three batches; Ctrl-C comes in the second."""
    generate, asked = sample.generate, []

    def generate_one(prompts, *inputs, **how):
        asked.append(prompts)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return generate(prompts, *inputs, **how)

    monkeypatch.setattr(sample, "generate", generate_one)
    with pytest.raises(SystemExit) as ended:
        asks_for(nano, tmp_path, *THREE)
    assert ended.value.code == 130
    assert "stopped: 1 of 3 pictures are there" in capsys.readouterr().err
    first = written(tmp_path / "o")
    assert [path.name for path in first] == ["a-red-circle-0.png"]

    asks_for(nano, tmp_path, *THREE)
    assert "1 of 3 pictures are there already" in capsys.readouterr().out
    assert asked[2:] == [["two blue stars above"], ["a star"]]
    every = written(tmp_path / "o")
    assert len(every) == 3
    assert first.items() <= every.items()

    # As in one go; and where all is there, no model is loaded.
    asks_for(nano, tmp_path / "whole", *THREE)
    assert list(written(tmp_path / "whole" / "o").values()) == list(every.values())
    monkeypatch.setattr(sample, "load_pipeline", None)
    asks_for(nano, tmp_path, *THREE)
    said = capsys.readouterr().out
    assert "3 of 3 pictures are there already" in said
    assert all(str(path) in said for path in every)
    assert written(tmp_path / "o") == every


def test_no_picture_is_written_over_by_another(copied, tmp_path):
    """Each of these changes the picture, and none the beginning of its name."""
    lora = tmp_path / "lora"
    start = tmp_path / "start.png"
    Image.new("RGB", (64, 64), "red").save(start)

    def save_a_lora(size):
        tuned = load_transformer(copied)
        add_lora(tuned, 4, 8)
        for p in lora_parameters(tuned):
            torch.nn.init.constant_(p, size)
        save_lora(tuned, lora)

    long = "a red circle " * 5                     # 60 letters and more
    before = {}
    for change in (
            [], ["--prompt", long + "on the left"], ["--steps", "1"], ["--guidance", "3"],
            ["--negative", "a star"], ["--height", "48"], ["--lora", lora],
            ["--lora", lora, "--lora-strength", "0.5"], "other lora", "other weights",
            ["--image", start], ["--image", start, "--strength", "0.5"], ["--dtype", "bf16"]):
        if change == ["--lora", lora]:
            save_a_lora(0.1)
        if change == "other lora":
            save_a_lora(0.2)
            change = ["--lora", lora]
        if change == "other weights":
            (weights,) = (copied / "vae").glob("*.safetensors")
            os.utime(weights, (1, 1))
            change = []
        if "--prompt" not in change:
            change = [*change, "--prompt", long]
        asks_for(copied, tmp_path, *change)
        after = written(tmp_path / "o")
        assert len(after) == len(before) + 1, change
        assert before.items() <= after.items(), change
        before = after
    names = {path.name for path in before}
    assert {f"{'-'.join(long.split())[:60]}-0{n}.png" for n in ("", "_2", "_13")} <= names


def test_a_place_that_was_taken_meanwhile_is_left_alone(tmp_path):
    """Two processes may write into one folder."""
    white, red = Image.new("RGB", (4, 4), "white"), Image.new("RGB", (4, 4), "red")
    path = tmp_path / "a-star-0.png"
    assert outputs.save_new(white, path, {"seed": 0}) == path
    other = outputs.save_new(red, path, {"seed": 1})
    assert other == tmp_path / "a-star-0_2.png"
    assert outputs.save_new(red, path, {"seed": 1}) == other
    assert Image.open(path).getpixel((0, 0)) == (255, 255, 255)


def test_many_pictures_are_on_several_sheets_of_small_ones(nano, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outputs, "SHEET", 2)
    monkeypatch.setattr(outputs, "SHEET_SIDE", 32)
    asks_for(nano, tmp_path, *THREE)
    sheets = sorted((tmp_path / "o").glob("sheet*.png"))
    assert [path.name for path in sheets] == ["sheet-1.png", "sheet-2.png"]
    assert Image.open(sheets[0]).width == 32 + 4 + 32
    assert Image.open(sheets[1]).width == 32
    below = np.asarray(Image.open(sheets[0]))[32:]
    assert (below[:, :32] < 128).any() and (below[:, 36:] < 128).any()        # both prompts
    assert f"all of them in {sheets[0]} {sheets[1]}" in capsys.readouterr().out
    asks_for(nano, tmp_path, *THREE, "--guidance", 3)             # a sheet is a picture, too
    assert len(list((tmp_path / "o").glob("sheet*.png"))) == 4


def test_a_name_fits_a_file_system_in_every_script():
    assert outputs.file_name("A red, circle!") == "a-red-circle"
    assert outputs.file_name("...") == "picture"
    for letter in ("a", "é", "赤", "𝐀"):            # of 1 to 4 bytes
        name = outputs.file_name(letter * 100)
        assert set(name) <= {letter, letter.lower()}
        assert 45 <= len(name) <= 60
        assert len(name.encode()) <= 180


@pytest.mark.parametrize("ending", [".png", ".jpg", ".jpeg", ".webp", ".PNG", ".JPG"])
def test_out_may_be_a_file_with_its_story(ending, nano, tmp_path, capsys):
    out = tmp_path / "new" / f"picture{ending}"
    command = ["--weights", nano, "--dtype", "fp32", "--cache", "", "--out", out, "--steps", 2,
               "--prompt", "赤い a red circle"]
    run_sample(*command)
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    picture = Image.open(out)
    assert picture.size == (64, 64)
    notes = read_notes(out)
    assert notes["prompt"] == "赤い a red circle"
    assert (notes["seed"], notes["steps"], notes["guidance"]) == ("0", "2", "2.0")

    content = out.read_bytes()
    run_sample(*command)
    assert "1 of 1 pictures are there already" in capsys.readouterr().out
    with pytest.raises(LensError, match="already, and differs in seed: give another --out"):
        run_sample(*command, "--seed", 1)
    assert out.read_bytes() == content


def test_small_pictures_are_written_large(nano, tmp_path):
    command = [nano, tmp_path, "--prompt", "a star", "--out"]
    asks_for(*command, tmp_path / "small.png")
    asks_for(*command, tmp_path / "large.png", "--scale", 4)
    small, large = (pixels(Image.open(tmp_path / name)) for name in ("small.png", "large.png"))
    assert (large == small.repeat(4, 0).repeat(4, 1)).all()
    assert read_notes(tmp_path / "large.png")["scale"] == "4"
    assert "scale" not in read_notes(tmp_path / "small.png")
    with pytest.raises(LensError, match="differs in scale"):
        asks_for(*command, tmp_path / "large.png", "--scale", 2)


def test_several_pictures_of_a_file_name_are_numbered(nano, tmp_path):
    asks_for(nano, tmp_path, "--prompt", "a star", "--num", 2, "--seed", 7,
             "--out", tmp_path / "star.webp")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["star-0.webp", "star-1.webp"]
    assert read_notes(tmp_path / "star-1.webp")["seed"] == "8"


def test_a_photo_under_the_name_of_out_stays(nano, tmp_path, capsys):
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (64, 64)).save(photo)
    content = photo.read_bytes()
    command = ["--weights", str(nano), "--prompt", "x", "--image", str(photo), "--out", str(photo)]
    line = error_line(sample.main, command, capsys)
    assert f"{photo} is there already, and is not ours" in line
    assert photo.read_bytes() == content


def test_a_folder_may_be_named_as_a_picture(nano, tmp_path):
    (tmp_path / "o.png").mkdir()
    asks_for(nano, tmp_path, "--prompt", "a star", "--out", tmp_path / "o.png")
    assert [path.name for path in (tmp_path / "o.png").iterdir()] == ["a-star-0.png"]
    asks_for(nano, tmp_path, "--prompt", "a star", "--out", tmp_path / "v1.5")
    assert [path.name for path in (tmp_path / "v1.5").iterdir()] == ["a-star-0.png"]


def test_cached_features_spare_the_encoder_and_give_the_same_picture(nano, tmp_path, monkeypatch,
                                                                     capsys):
    command = ["--weights", nano, "--prompt", "a blue circle", "--cache", tmp_path / "c",
               "--dtype", "fp32"]
    run_sample(*command, "--out", tmp_path / "one")

    def refuse(*_, **__):
        raise LensError("the encoder was loaded")

    monkeypatch.setattr(kit.checkpoint, "load_text_encoder", refuse)
    run_sample(*command, "--out", tmp_path / "two")
    one, two = only_picture(tmp_path / "one"), only_picture(tmp_path / "two")
    assert one.tobytes() == two.tobytes()
    with pytest.raises(LensError, match="the encoder was loaded"):            # another key
        run_sample(*command, "--date", "2027-01-01", "--out", tmp_path / "three")


def test_a_lora_is_merged_and_named_in_the_notes(nano, tmp_path, capsys):
    tuned = load_transformer(nano)
    add_lora(tuned, 4, 8)
    for p in lora_parameters(tuned):
        torch.nn.init.constant_(p, 0.1)
    save_lora(tuned, tmp_path / "lora")
    command = ["--weights", nano, "--prompt", "a red circle", "--cache", "", "--dtype", "fp32"]
    run_sample(*command, "--out", tmp_path / "plain")
    run_sample(*command, "--out", tmp_path / "tuned", "--lora", tmp_path / "lora")
    assert "LoRA: " in capsys.readouterr().out
    plain, merged = only_picture(tmp_path / "plain"), only_picture(tmp_path / "tuned")
    assert merged.tobytes() != plain.tobytes()
    assert merged.text["lora"] == f"{tmp_path / 'lora'} x 1.0"
    assert plain.text["lora"] == ""


def test_fp8_on_a_cpu_computes_what_a_gpu_would(tmp_path, capsys):
    """With the shipped toy, whose attention has matrices that 8-bit products can do."""
    command = ["--prompt", "a red circle", "--steps", "3", "--device", "cpu", "--cache", ""]
    run_sample(*command, "--out", tmp_path / "plain")
    run_sample(*command, "--out", tmp_path / "rounded", "--fp8")
    plain, rounded = only_picture(tmp_path / "plain"), only_picture(tmp_path / "rounded")
    assert plain.tobytes() != rounded.tobytes()
    assert "flash attention" in capsys.readouterr().out
    assert plain.text["precision"] in ("bfloat16", "float32")
    assert rounded.text["precision"] == plain.text["precision"] + " and fp8"


def test_a_geneval_file_is_written_in_its_evaluators_folders(nano, tmp_path):
    rows = [
        {"tag": "counting", "include": [{"class": "circle", "count": 2}], "prompt": "two circles"},
        {"tag": "colors", "include": [], "prompt": "a red circle"},
    ]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_sample("--weights", nano, "--prompts-file", prompts, "--num", 2, "--out", tmp_path / "o",
               "--cache", "")
    for k, row in enumerate(rows):
        folder = tmp_path / "o" / f"{k:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == row
        names = sorted(path.name for path in (folder / "samples").iterdir())
        assert names == ["0000.png", "0001.png"]

    # The names are the evaluator's, so another command there would have to write over them.
    before = written(tmp_path / "o")
    command = ["--weights", nano, "--num", 2, "--out", tmp_path / "o", "--cache", ""]
    run_sample(*command, "--prompts-file", prompts)
    with pytest.raises(LensError, match="0000.png is there already, and differs in steps"):
        run_sample(*command, "--prompts-file", prompts, "--steps", 1)
    rows[1]["tag"] = "other"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(LensError, match="metadata.jsonl is of other prompts"):
        run_sample(*command, "--prompts-file", prompts)
    assert written(tmp_path / "o") == before


def test_eval_ends_with_a_line_of_json(nano, tmp_path, capsys):
    run_sample("--weights", nano, "--eval", "--per-task", 4, "--out", tmp_path)
    said = capsys.readouterr().out.strip().splitlines()
    scores = json.loads(said[-1])
    assert list(scores) == ["overall", *TASKS, *DRAWN]
    mean = sum(scores[task] for task in TASKS) / 6
    assert scores["overall"] == pytest.approx(mean, abs=1e-3)
    assert scores["fidelity"] > 0
    assert f"24 of the pictures are in {tmp_path / 'eval.png'}" in said[-2]
    below = pixels(Image.open(tmp_path / "eval.png"))[64:]
    assert (below[..., 0] - below[..., 1] > 100).any()            # a cross: random weights


def test_eval_in_bf16_too(nano, tmp_path, capsys):
    run_sample("--weights", nano, "--eval", "--per-task", 2, "--dtype", "bf16", "--out", tmp_path)
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["fidelity"] > 0


@pytest.fixture(scope="module")
def bad_files(nano, tmp_path_factory):
    """A folder of files that no command can use."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "blank.txt").write_text("\n \n")
    (folder / "bad.jsonl").write_text("{not json}\n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00a red circle")
    write_safetensors(folder / "lora.safetensors", {
        "elsewhere.lora_A.weight": torch.zeros(2, 2),
        "elsewhere.lora_B.weight": torch.zeros(2, 2)})

    bent = folder / "bent"
    state = {**load_transformer(nano).state_dict(), "img_in.weight": torch.zeros(3, 3)}
    write_safetensors(bent / "transformer" / "diffusion_pytorch_model.safetensors", state)
    shutil.copy(nano / "transformer" / "config.json", bent / "transformer" / "config.json")
    write_json(bent / "model_index.json", {"base": str(nano)})
    return folder


HAS_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")


@pytest.mark.parametrize("arguments, words", [
    (["--prompt", "x", "--height", "100", "--width", "96"], "divisible by 16"),
    (["--prompt", "x", "--height", "320", "--width", "64"], "1:2"),
    (["--prompt", "x", "--aspect", "3:1"], "1:2"),
    (["--prompt", "x", "--aspect", "wide"], "W:H"),
    (["--prompt", "x", "--aspect", "1:1", "--height", "64"], "not both"),
    (["--prompt", "x", "--base", "64", "--height", "64"], "not both"),
    (["--prompt", "x", "--base", "64", "--width", "64"], "not both"),
    (["--prompt", "x", "--eval"], "give one of"),
    (["--prompt", "x", "--prompts-file", "{bad}/blank.txt"], "give one of"),
    (["--prompt", "x", "--height", "1456", "--width", "1456"], "1440"),
    (["--prompt", "x", "--height", "48", "--width", "112"], "1:2"),
    (["--prompt", "x", "--height", "-16", "--width", "96"], "--height: must be at least 1"),
    (["--prompt", "x", "--size", "huge"], "invalid choice: 'huge'"),
    (["--prompt", "x", "--size", "full"], "another size"),
    (["--prompt", "x", "--weights", "{bad}/nothing"], "no weights"),
    (["--prompt", "x", "--weights", "{bad}/empty"], "no weights"),
    (["--prompt", "x", "--weights", "{bad}/bent"], "img_in.weight"),
    (["--prompt", "x", "--lora", "{bad}/lora.safetensors"], "matches no layer"),
    (["--prompt", "  "], "empty"),
    ([], "nothing to do"),
    (["--prompts-file", "{bad}/none.txt"], "cannot read {bad}/none.txt"),
    (["--prompts-file", "{bad}/bad.jsonl"], "cannot read prompts from {bad}/bad.jsonl: line 1"),
    (["--prompts-file", "{bad}/binary.txt"], "cannot read {bad}/binary.txt"),
    (["--prompts-file", "{bad}/blank.txt"], "no prompts"),
    (["--prompt", "x", "--image", "{bad}/blank.txt"], "cannot read --image"),
    (["--prompt", "x", "--strength", "1.5"], "--strength"),
    (["--prompt", "x", "--strength", "nan"], "--strength: must be a number, not 'nan'"),
    (["--prompt", "x", "--guidance", "-1"], "--guidance -1.0: must be at least 0"),
    (["--prompt", "x", "--guidance", "inf"], "--guidance: must be a number, not 'inf'"),
    (["--prompt", "x", "--lora-strength", "nan"], "--lora-strength: must be a number, not 'nan'"),
    (["--prompt", "x", "--height", "0"], "--height: must be at least 1"),
    (["--prompt", "x", "--base", "0"], "--base: must be at least 1"),
    (["--prompt", "x", "--aspect", "0:1"], "of the form W:H, such as 16:9"),
    (["--prompt", "x", "--aspect", "1:0"], "of the form W:H, such as 16:9"),
    (["--prompt", "x", "--strength", "0.5"], "add --image"),
    (["--prompt", "x", "--lora-strength", "0.5"], "add --lora"),
    (["--prompt", "x", "--model", "m"], "add --endpoint"),
    (["--prompt", "x", "--per-task", "9"], "--eval: add it"),
    (["--prompt", "x", "--requests", "brief"], "--eval: add it"),
    (["--prompt", "x", "--negative", "y", "--guidance", "1"], "--negative has no effect"),
    (["--eval", "--negative", "y"], "leave out --negative"),
    (["--eval", "--num", "2"], "leave out --negative, --image, --num and --scale"),
    (["--eval", "--scale", "2"], "leave out --negative, --image, --num and --scale"),
    (["--prompt", "x", "--scale", "99"], "--scale 99: must be at most 16"),
    (["--eval", "--image", "{bad}/blank.txt"], "leave out --negative, --image"),
    (["--eval", "--prompts-file", "{bad}/blank.txt"], "give one of"),
    (["--prompt", "k\udcfchn"], "--prompt: must be text in UTF-8"),
    (["--prompt", "x", "--out", "{bad}/picture.gif"], "are written as .png, .jpg, .jpeg, .webp"),
    (["--eval", "--out", "{bad}/picture.png"], "fill a folder"),
    (["--prompt", "x", "--steps", "0"], "--steps"),
    (["--prompt", "x", "--steps", "many"], "--steps"),
    (["--prompt", "x", "--out", "{bad}/blank.txt/folder"], "cannot write"),
    (["--prompt", "x", "--colour", "red"], "--colour"),
    (["--prompt", "x", "--dtype", "fp16"], "--dtype"),
    (["--eval", "--per-task", "1"], "--per-task must be at least 2"),
    pytest.param(["--prompt", "x", "--device", "cuda"], "CUDA", marks=HAS_CUDA),
    (["--prompt", "x", "--device", "abacus"], "abacus"),
])
def test_bad_input_is_one_clear_line(arguments, words, nano, bad_files, tmp_path, capsys):
    (bad_files / "empty").mkdir(exist_ok=True)
    arguments = [argument.replace("{bad}", str(bad_files)) for argument in arguments]
    if "--weights" not in arguments:
        arguments += ["--weights", str(nano)]
    # --out stands first, so that a case may name another one.
    message = error_line(
        sample.main, ["--out", str(tmp_path / "o"), *arguments, "--cache", ""], capsys)
    assert words.replace("{bad}", str(bad_files)) in message
    assert not list(tmp_path.rglob("*.png"))
