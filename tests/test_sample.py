"""sample.py: the sampler against the reference's numbers, its invariances, and its command line on a nano model."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import data
import lens
import sample
import train
import vae

GOLDENS = Path(__file__).parent / "goldens"


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def read(name):
    with safe_open(str(GOLDENS / f"{name}.safetensors"), "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()


@pytest.fixture(scope="session")
def nano(tmp_path_factory):
    """A whole pipeline of size nano on disk, with weights that are random but not zero."""
    folder = tmp_path_factory.mktemp("nano")
    tokenizer = train.toy_tokenizer(scenes=200)
    text = lens.build_text_model(lens.SIZES["nano"].text_encoder, seed=1, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    model = lens.build("nano", 0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    autoencoder = vae.LensVAE(lens.SIZES["nano"].vae).eval()
    encoder = lens.TextEncoder(text, tokenizer, lens.SIZES["nano"].transformer.selected_layer_index)
    notes = dict(steps=3, guidance=2.0, base=64, words=json.dumps(["a", "red", "blue", "circle"]))
    lens.save_pipeline(folder, model, autoencoder, encoder, notes)
    return folder


# ---- The sampler

def test_golden_guided_pipeline():
    dit, dit_meta = read("dit")
    auto, auto_meta = read("vae")
    run, meta = read("pipeline")
    model = lens.LensTransformer(lens.LensConfig.from_dict(json.loads(dit_meta["config"]))).eval()
    model.load_state_dict({k[8:]: v for k, v in dit.items() if k.startswith("weights.")})
    autoencoder = vae.LensVAE(json.loads(auto_meta["config"])).eval()
    autoencoder.load_state_dict({k[8:]: v for k, v in auto.items() if k.startswith("weights.")})
    grid, states = tuple(json.loads(meta["latent_grid"])), []
    text = [run[f"in.text_features.{k}"] for k in range(4)]
    tokens = sample.denoise(model, run["in.noise"], text, run["in.text_mask"], grid, int(meta["steps"]), float(meta["guidance_scale"]),
                            on_step=lambda i, x, v: states.append(x))
    for ours, theirs in zip(states, run["out.latents_per_step"]):
        assert relative(ours, theirs) < 1e-3
    assert torch.equal(tokens, states[-1])
    with torch.no_grad():
        assert relative(autoencoder.decode(autoencoder.to_latent(tokens, grid)), run["out.image"]) < 1e-3


def test_guidance_one_is_one_forward_a_step_and_no_guidance(nano):
    model, *_ = lens.load_pipeline(nano, parts=("transformer",))
    calls, forward = [], model.velocity_from
    model.velocity_from = lambda *a: calls.append(1) or forward(*a)
    noise, text = torch.randn(2, 12, 16), [torch.randn(2, 5, 32) for _ in range(2)]
    plain = sample.denoise(model, noise, text, None, (3, 4), 4, 1.0)
    assert len(calls) == 4
    x = noise                                                  # by hand, through the public forward
    levels = lens.sigmas(12, 4)
    with torch.no_grad():
        for i in range(4):
            x = lens.euler_step(x, model(x, levels[i].expand(2), text, None, (3, 4)), levels[i], levels[i + 1])
    assert relative(plain, x) < 1e-5
    calls.clear()
    sample.denoise(model, noise, text, None, (3, 4), 4, 3.0, together=0)
    assert len(calls) == 8
    sample.denoise(model, noise, text, None, (3, 4), 4, 3.0)       # small enough for both branches in one forward
    assert len(calls) == 12


def test_guided_velocity_keeps_the_length_of_the_conditional_one():
    c, u = torch.randn(2, 2, 7, 16).unbind(0)
    g = sample.guide(c, u, 5.0)
    assert torch.allclose(g.norm(dim=-1), c.norm(dim=-1), rtol=1e-5)
    direction = u + 5.0 * (c - u)
    assert torch.allclose(torch.nn.functional.cosine_similarity(g, direction, dim=-1), torch.ones(2, 7), atol=1e-5)


def test_a_picture_does_not_depend_on_its_batch(nano):
    pipeline = lens.load_pipeline(nano)
    prompts = ["a red circle", "a small blue square on the left. the background is white", "two green stars", "a red circle", ""]
    seeds = [3, 4, 5, 6, 7]
    together = sample.generate(prompts, pipeline, seeds=seeds, height=48, width=64, steps=3, guidance=3.0)
    for prompt, seed, picture in zip(prompts, seeds, together):
        alone = sample.generate(prompt, pipeline, seeds=[seed], height=48, width=64, steps=3, guidance=3.0)[0]
        assert picture.size == (64, 48)
        assert np.abs(np.asarray(picture, int) - np.asarray(alone, int)).max() <= 1
    assert np.asarray(together[0]).tolist() != np.asarray(together[3]).tolist()                 # same words, other seed


def test_negative_prompt_changes_the_picture_and_the_empty_one_is_no_text(nano):
    pipeline = lens.load_pipeline(nano)
    make = lambda **k: np.asarray(sample.generate("a red circle", pipeline, height=48, width=48, steps=3, guidance=4.0, **k)[0], int)
    assert (make() == make(negative="   ")).all()
    assert np.abs(make() - make(negative="a blue circle")).max() > 0


def test_image_to_image_starts_from_the_picture(nano):
    _, autoencoder, encoder = lens.load_pipeline(nano)
    pipeline = (lens.build("nano"), autoencoder, encoder)      # a fresh model's velocity is zero: what goes in comes out
    start = data.draw(data.sample(0, 0, 1, 64, 64)[0], 64, 64)
    seen = {}
    for strength in (0.05, 0.5, 1.0):
        sample.generate("a red circle", pipeline, height=64, width=64, steps=20, guidance=1.0, images=[start], strength=strength,
                        on_step=lambda i, x, v: seen.setdefault(strength, []).append(x))
    with torch.no_grad():
        x0 = autoencoder.to_tokens(autoencoder.encode(vae.from_pil([start]))[0])
    noise = sample.picture_noise(0, (4, 4), 16)
    for strength, steps in ((0.05, 1), (0.5, 10), (1.0, 20)):
        assert len(seen[strength]) == steps
        assert relative(seen[strength][0], lens.add_noise(x0, noise, lens.sigmas(16, 20)[20 - steps].item())) < 1e-5


def test_frechet_distance_of_known_gaussians():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(20000, 3, generator=g)
    assert abs(vae.frechet_distance(a, a)) < 1e-6
    b = 2 * torch.randn(20000, 3, generator=g) + torch.tensor([1.0, 0, 0])
    assert abs(vae.frechet_distance(a, b) - (1 + 3 * (1 + 4 - 2 * 2))) < 0.15               # |1|^2 + 3 (1 + 4 - 2 sqrt(4))


# ---- The command line

def cli(capsys, *arguments):
    code = 0
    try:
        sample.run(lambda: sample.main([str(a) for a in arguments]))
    except SystemExit as e:
        code = e.code
    said = capsys.readouterr()
    return code, said.out, said.err


def test_prompt_to_png_with_its_story(nano, tmp_path, capsys):
    code, out, err = cli(capsys, "--weights", nano, "--prompt", "a red circle and a zeppelin", "--out", tmp_path / "o", "--cache", tmp_path / "c",
                         "--seed", 5, "--num", 2, "--dtype", "fp32")
    assert code == 0
    assert "never saw the words and, zeppelin" in err and "blue" in err
    pictures = sorted((tmp_path / "o").glob("a-red-circle*.png"))
    assert [p.name[-6:] for p in pictures] == ["-5.png", "-6.png"] and (tmp_path / "o" / "sheet.png").exists()
    text = Image.open(pictures[0]).text
    assert text["prompt"] == "a red circle and a zeppelin" and text["seed"] == "5" and text["steps"] == "3" and text["guidance"] == "2.0"
    assert text["size"] == "64x64" and text["date"] == lens.DATE and nano.name in text["weights"]
    assert not list(tmp_path.rglob("*.new"))


def test_cached_features_spare_the_encoder_and_give_the_same_picture(nano, tmp_path, capsys, monkeypatch):
    command = ["--weights", nano, "--prompt", "a blue circle", "--cache", tmp_path / "c", "--dtype", "fp32"]
    assert cli(capsys, *command, "--out", tmp_path / "one")[0] == 0
    monkeypatch.setattr(lens, "load_text_encoder", lambda *a, **k: pytest.fail("the encoder was loaded"))
    assert cli(capsys, *command, "--out", tmp_path / "two")[0] == 0
    one, two = (np.asarray(Image.open(next((tmp_path / d).glob("*.png")))) for d in ("one", "two"))
    assert (one == two).all()
    monkeypatch.setattr(lens, "load_text_encoder", lambda *a, **k: (_ for _ in ()).throw(lens.LensError("loaded")))
    assert "loaded" in cli(capsys, *command, "--date", "2027-01-01", "--out", tmp_path / "three")[2]          # another date, another key


def test_geneval_file_is_written_in_its_evaluators_folders(nano, tmp_path, capsys):
    rows = [{"tag": "counting", "include": [{"class": "circle", "count": 2}], "prompt": "two circles"}, {"tag": "colors", "include": [], "prompt": "a red circle"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert cli(capsys, "--weights", nano, "--prompts-file", tmp_path / "p.jsonl", "--num", 2, "--out", tmp_path / "o", "--cache", "")[0] == 0
    for k, row in enumerate(rows):
        folder = tmp_path / "o" / f"{k:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == row
        assert sorted(p.name for p in (folder / "samples").iterdir()) == ["0000.png", "0001.png"]


def test_eval_ends_with_a_line_of_json(nano, tmp_path, capsys):
    code, out, _ = cli(capsys, "--weights", nano, "--eval", "--per-task", 4, "--out", tmp_path)
    scores = json.loads(out.strip().splitlines()[-1])
    assert cli(capsys, "--weights", nano, "--eval", "--per-task", 2, "--dtype", "bf16", "--out", tmp_path)[0] == 0
    assert code == 0 and list(scores) == ["overall", *data.TASKS, "fidelity"]
    assert scores["overall"] == pytest.approx(sum(scores[t] for t in data.TASKS) / 6, abs=1e-3) and scores["fidelity"] > 0


def test_every_size_of_the_checkpoint_is_allowed():
    for base in data.PAPER_BUCKETS:
        for ratio in data.RATIOS:
            assert sample.pick_size(None, None, ratio, base) == data.bucket(base, ratio)


def test_held_out_prompts_are_not_trained_on():
    held = {row[2] for row in sample.held_out("position", 50, 96, 96)}
    trained = {data.sample(0, e, i, 96, 96)[2] for e in range(2) for i in range(300)}
    assert len(held) >= 49 and not held & trained


@pytest.mark.parametrize("arguments, words", [
    (["--prompt", "x", "--height", 100, "--width", 96], "divisible by 16"),
    (["--prompt", "x", "--height", 320, "--width", 64], "1:2"),
    (["--prompt", "x", "--aspect", "3:1"], "1:2"),
    (["--prompt", "x", "--aspect", "wide"], "W:H"),
    (["--prompt", "x", "--height", 1456, "--width", 1456], "1440"),
    (["--prompt", "x", "--height", 48, "--width", 112], "1:2"),
    (["--prompt", "x", "--height", -16, "--width", 96], "positive"),
    (["--prompt", "x", "--size", "huge"], "unknown size"),
    (["--prompt", "x", "--size", "full"], "another size"),
    (["--prompt", "x", "--weights", "{tmp}/nothing"], "no weights"),
    (["--prompt", "x", "--weights", "{tmp}"], "no weights"),
    (["--prompt", "x", "--weights", "{tmp}/bent"], "img_in.weight"),
    (["--prompt", "x", "--lora", "{tmp}/lora.safetensors"], "matches no layer"),
    (["--prompt", "  "], "empty"),
    ([], "nothing to do"),
    (["--prompts-file", "{tmp}/none.txt"], "cannot read prompts"),
    (["--prompts-file", "{tmp}/bad.jsonl"], "cannot read prompts"),
    (["--prompts-file", "{tmp}/binary.txt"], "cannot read prompts"),
    (["--prompts-file", "{tmp}/blank.txt"], "no prompts"),
    (["--prompt", "x", "--image", "{tmp}/blank.txt"], "cannot read --image"),
    (["--prompt", "x", "--strength", "1.5"], "--strength"),
    (["--prompt", "x", "--steps", "0"], "--steps"),
    (["--prompt", "x", "--steps", "many"], "--steps"),
    (["--prompt", "x", "--out", "{tmp}/blank.txt/folder"], "cannot write"),
    (["--prompt", "x", "--colour", "red"], "--colour"),
    pytest.param(["--prompt", "x", "--device", "cuda"], "CUDA", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")),
    (["--prompt", "x", "--device", "abacus"], "abacus"),
])
def test_bad_input_is_one_clear_line_and_exit_code_2(arguments, words, nano, tmp_path, capsys):
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text("{not json}\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00a red circle")
    lens.write_safetensors(tmp_path / "lora.safetensors", {"elsewhere.lora_A.weight": torch.zeros(2, 2), "elsewhere.lora_B.weight": torch.zeros(2, 2)})
    bent = {**lens.load_transformer(nano).state_dict(), "img_in.weight": torch.zeros(3, 3)}
    lens.write_safetensors(tmp_path / "bent" / "transformer" / "diffusion_pytorch_model.safetensors", bent)
    (tmp_path / "bent" / "transformer" / "config.json").write_text((nano / "transformer" / "config.json").read_text())
    (tmp_path / "bent" / "model_index.json").write_text(json.dumps({"base": str(nano)}))
    arguments = [str(a).replace("{tmp}", str(tmp_path)) for a in arguments]
    code, _, err = cli(capsys, *([] if "--weights" in arguments else ["--weights", nano]), "--out", tmp_path / "o", *arguments, "--cache", "")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and words in lines[0], err
    assert "Traceback" not in err
    assert not list((tmp_path / "o").glob("*.png")) if (tmp_path / "o").is_dir() else True
