"""lens.py against the reference's numbers (tests/goldens) and against properties that must hold whatever the weights."""
import json
import re
import resource
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lens
import train

GOLDENS = Path(__file__).parent / "goldens"


def golden(name):
    with safe_open(str(GOLDENS / f"{name}.safetensors"), "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()


def weights_of(tensors):
    return {k[len("weights."):]: v for k, v in tensors.items() if k.startswith("weights.")}


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(scope="module")
def dit():
    tensors, meta = golden("dit")
    model = lens.LensTransformer(lens.LensConfig.from_dict(json.loads(meta["config"])))
    model.load_state_dict(weights_of(tensors))
    text = [tensors[f"in.text_features.{i}"] for i in range(4)]
    return model.eval(), tensors, text, tuple(json.loads(meta["latent_grid"]))


def random_model(size="nano", seed=0):
    """Every weight random: as initialised, gates and output are zero and any test of the output would pass."""
    model, generator = lens.build(size, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def inputs(model, batch=2, grid=(4, 3), length=5, seed=1):
    g, c = torch.Generator().manual_seed(seed), model.config
    text = [torch.randn(batch, length, c.enc_hidden_dim, generator=g) for _ in c.selected_layer_index]
    return torch.randn(batch, grid[0] * grid[1], c.in_channels, generator=g), torch.rand(batch, generator=g), text


# --- the convention and the numbers

def test_one_exact_euler_step_returns_the_data():
    g = torch.Generator().manual_seed(0)
    x0, eps, t = torch.randn(3, 5, 4, generator=g), torch.randn(3, 5, 4, generator=g), torch.tensor([1.0, 0.7, 0.2])
    x_t, v = lens.add_noise(x0, eps, t), lens.velocity(x0, eps)
    assert torch.equal(lens.add_noise(x0, eps, 1.0), eps) and torch.equal(lens.add_noise(x0, eps, 0.0), x0)   # t = 1 is noise
    torch.testing.assert_close(lens.euler_step(x_t, v, t, 0.0), x0)
    torch.testing.assert_close(lens.data_prediction(x_t, v, t), x0)
    torch.testing.assert_close(x_t + (1 - t)[:, None, None] * v, eps)
    torch.testing.assert_close(lens.euler_step(x_t, v, t, 0.1), lens.add_noise(x0, eps, 0.1))


@torch.no_grad()
def test_golden_velocity(dit):
    model, tensors, text, grid = dit
    v = model(tensors["in.latents"], tensors["in.timestep"], text, tensors["in.text_mask"], grid)
    assert relative(v, tensors["out.velocity"]) < 2e-5
    v = model(tensors["in.latents"], tensors["in.timestep"], None, None, grid)
    assert relative(v, tensors["out.velocity_no_text"]) < 2e-5
    v = model(tensors["in.latents"], tensors["in.timestep"], text, torch.zeros(2, 7, dtype=torch.bool), grid)
    assert relative(v, tensors["out.velocity_no_text"]) < 2e-5          # every token hidden = no text at all


@torch.no_grad()
def test_golden_guided_trajectory(dit):
    model, _, _, grid = dit
    tensors, meta = golden("pipeline")
    text, x, levels = [tensors[f"in.text_features.{i}"] for i in range(4)], tensors["in.noise"], lens.sigmas(24, 4)
    torch.testing.assert_close(levels, tensors["out.sigmas"], atol=1e-5, rtol=0)
    context, empty, mods = model.prepare(text, tensors["in.text_mask"], grid), model.prepare(None, None, grid), model.modulation(levels[:-1])
    for i in range(4):
        c, u = model.velocity_from(x, mods.at(i), context), model.velocity_from(x, mods.at(i), empty)
        g = u + float(meta["guidance_scale"]) * (c - u)
        x = lens.euler_step(x, g * c.norm(dim=-1, keepdim=True) / g.norm(dim=-1, keepdim=True), levels[i], levels[i + 1])
        assert relative(x, tensors["out.latents_per_step"][i]) < 1e-3


def test_golden_sigmas():
    rows = json.loads((GOLDENS / "schedule.json").read_text())
    for row in rows:
        got = lens.sigmas(row["image_tokens"], row["steps"])
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, torch.tensor(row["sigmas"]), atol=1e-4, rtol=0)
    assert train.timestep_mu(256) == 1.0 and train.timestep_mu(4096) == pytest.approx(1.3)


def test_golden_text_features():
    tensors, meta = golden("text_encoder")
    model = lens.build_text_model({"model_type": "gpt_oss", **json.loads(meta["config"])})
    model.load_state_dict(weights_of(tensors))
    layers = json.loads(meta["selected_layers"])
    for m in (model, model.model):                                       # with its head, and bare
        out = lens.text_features(m, tensors["in.input_ids"], tensors["in.attention_mask"], layers)
        for i, f in enumerate(out):
            want = tensors[f"out.features.{i}"]
            assert ((f - want).norm() / want.norm()).item() < 1e-4 and relative(f, want) < 1e-4


def test_full_size_state_dict():
    want = json.loads((GOLDENS / "checkpoint_tensors.json").read_text())["transformer"]
    with torch.device("meta"):
        model = lens.LensTransformer(lens.SIZES["full"].transformer)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == want and len(want) == 1264
    assert sum(p.numel() for p in model.parameters()) == 4_104_225_152


# --- properties of the denoiser

@torch.no_grad()
def test_rows_without_visible_text_and_rows_of_any_length_equal_the_same_row_alone():
    model, grid, lengths = random_model(), (4, 3), [5, 2, 0]
    x, t, text = inputs(model, 3, grid)
    mask = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    together = model(x, t, text, mask, grid)
    for i, n in enumerate(lengths):
        own = [f[i:i + 1, :n] for f in text] if n else None
        torch.testing.assert_close(together[i:i + 1], model(x[i:i + 1], t[i:i + 1], own, None, grid), atol=1e-5, rtol=1e-4)
    assert relative(together[0], model(x, t, None, None, grid)[0]) > 1e-2       # and text does matter


@torch.no_grad()
def test_hoisted_work_equals_forward():
    model, grid = random_model(), (4, 3)
    x, _, text = inputs(model, 2, grid)
    mods, context = model.modulation(torch.tensor([0.9, 0.3])), model.prepare(text, None, grid)
    for i, t in enumerate((0.9, 0.3)):
        want = model(x, torch.full((2,), t), text, torch.ones(2, 5, dtype=torch.bool), grid)
        torch.testing.assert_close(model.velocity_from(x, mods.at(i), context), want, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_positions_matter():
    """Swapped tokens give a result that is not the swapped result; a transposed grid neither."""
    model = random_model()
    x, t, text = inputs(model, 1, (4, 3))
    a, b = model(x, t, text, None, (4, 3)), model(x, t, text, None, (3, 4))
    assert relative(a, b) > 1e-4 and relative(model(x.flip(1), t, text, None, (4, 3)).flip(1), a) > 1e-4


def test_recompute_gives_the_same_gradients_and_the_last_text_output_gets_none():
    grads = []
    for recompute in ("none", "full", "selective"):
        model = random_model()
        train.set_recompute(model, recompute)
        assert model.state_dict().keys() == random_model().state_dict().keys()
        x, t, text = inputs(model)
        model(x, t, text, torch.ones(2, 5, dtype=torch.bool), (4, 3)).square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    without = {n for n, g in grads[0].items() if g is None}
    assert without == set(model.unread()) and any("to_add_out" in n for n in without) and any("txt_mlp" in n for n in without)
    assert all(n.startswith("transformer_blocks.1.") for n in without)
    for n in grads[0].keys() - without:
        torch.testing.assert_close(grads[0][n], grads[1][n], msg=n)
        torch.testing.assert_close(grads[0][n], grads[2][n], msg=n)


def test_fresh_model_predicts_zero_and_is_seeded():
    a, b, c = lens.build("nano", 1), lens.build("nano", 1), lens.build("nano", 2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.img_in.weight, c.img_in.weight)
    x, t, text = inputs(a)
    assert a(x, t, text, None, (4, 3)).abs().max() == 0


@pytest.mark.parametrize("mode", ["autocast", "pure"])
@torch.no_grad()
def test_bf16_is_close_to_fp32(dit, mode):
    model, tensors, text, grid = dit
    x, t, mask = tensors["in.latents"], torch.tensor([0.75, 0.25]), tensors["in.text_mask"]      # exact in bf16
    want = model(x, t, text, mask, grid)
    if mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            got = model(x, t, text, mask, grid)
    else:
        half = lens.LensTransformer(model.config).to(torch.bfloat16)
        half.load_state_dict(model.state_dict())
        got = half(x.bfloat16(), t, text, mask, grid)
    assert got.dtype == torch.bfloat16 and ((got.float() - want).norm() / want.norm()).item() < 0.03


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_golden_velocity_on_a_gpu(dit):
    model, tensors, text, grid = dit
    got = lens.LensTransformer(model.config).cuda()
    got.load_state_dict(model.state_dict())
    v = got(tensors["in.latents"].cuda(), tensors["in.timestep"].cuda(), [f.cuda() for f in text], tensors["in.text_mask"].cuda(), grid)
    assert relative(v.cpu(), tensors["out.velocity"]) < 2e-3


@torch.no_grad()
def test_trace_table_is_true():
    """The shapes in the header of lens.py, from a real run of the toy size."""
    import vae
    size = lens.SIZES["toy"]
    coder, model = vae.LensVAE(size.vae).eval(), lens.build("toy")
    pixels = torch.rand(1, 3, 96, 64) * 2 - 1
    mean, _ = coder.encode(pixels)
    tokens = coder.to_tokens(mean)
    hf = lens.build_text_model(size.text_encoder)
    ids = torch.arange(12)[None]
    features = lens.text_features(hf, ids, torch.ones_like(ids), size.transformer.selected_layer_index)
    seen = {}
    model.transformer_blocks[0].attn.register_forward_pre_hook(lambda m, a: seen.update(img=a[0], txt=a[1]))
    v = model(tokens, torch.tensor([0.5]), features, None, (6, 4))
    real = dict(pixels=pixels, latent=mean, tokens=tokens, features=features[0], text=seen["txt"], image=seen["img"],
                joint=torch.cat([seen["img"], seen["txt"]], 1), velocity=v, decoded=coder.decode(coder.to_latent(v, (6, 4))))
    rows = re.findall(r"^    (\w+) +(?:(\d) x )?(\[[\d, ]+\])", lens.__doc__, re.M)
    assert [r[0] for r in rows] == list(real) and len(features) == 4 == int(rows[3][1])
    for name, _, shape in rows:
        assert list(real[name].shape) == json.loads(shape), name


@pytest.mark.parametrize("wrong", [dict(inner_dim=100), dict(axes_dims_rope=(8, 28, 20)), dict(in_channels=64), dict(gate_mlp=False),
                                   dict(axes_dims_rope=(9, 27, 28)), dict(rms_norm=False)])
def test_config_says_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        lens.LensConfig.from_dict({**lens.LensConfig().to_dict(), **wrong})


def test_config_round_trip_ignores_unknown_keys():
    d = lens.SIZES["toy"].transformer.to_dict()
    assert lens.LensConfig.from_dict({**json.loads(json.dumps(d)), "_class_name": "x", "new": 1}) == lens.SIZES["toy"].transformer
    with pytest.raises(lens.LensError, match="nano, toy, small, 1b, full"):
        lens.build("huge")


# --- text

SPECIAL = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    t = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<|pad|>")


def encoder_for(kind, tokenizer, **kw):
    spec = dict(lens.SIZES["nano"].text_encoder, vocab_size=300)
    if kind == "qwen3":
        spec = dict(model_type="qwen3", num_hidden_layers=2, hidden_size=32, intermediate_size=32, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=8, vocab_size=300)
    return lens.TextEncoder(lens.build_text_model(spec), tokenizer, (0, 1), **{"max_length": 1024, **kw})


def test_chat_rendering(tokenizer):
    text = encoder_for("gpt_oss", tokenizer).render("a red circle")
    assert text == (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\nCurrent date: "
        "2026-05-23\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message."
        "<|end|><|start|>developer<|message|># Instructions\n\nDescribe the image by detailing the color, shape, size, texture, quantity, "
        "text, spatial relationships of the objects and background.\n\n<|end|><|start|>user<|message|>a red circle<|end|><|start|>assistant"
        "<|channel|>analysis<|message|>Need to generate one image according to the description.<|end|><|start|>assistant<|channel|>final"
        "<|message|>")
    assert "Current date: 2020-01-01\n" in encoder_for("gpt_oss", tokenizer, date="2020-01-01").render("x")


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3"])
def test_encode(kind, tokenizer):
    enc = encoder_for(kind, tokenizer)
    rows, offset = enc.tokenize(["a red circle"])
    assert rows[0] == tokenizer(enc.render("a red circle"), add_special_tokens=False)["input_ids"]     # apart = together
    assert tokenizer.decode(rows[0][offset:]).startswith("a red circle")
    features, mask = enc.encode(["a red circle", "a blue square beside it"])
    assert len(features) == 2 and mask.dtype == torch.bool
    assert features[0].shape == (2, max(map(len, enc.tokenize(["a blue square beside it"])[0])) - offset, 32)
    assert mask.sum(1).tolist()[1] - mask.sum(1).tolist()[0] == len("a blue square beside it") - len("a red circle")
    alone, none = enc.encode("a red circle")
    assert none is None                                                 # equal lengths need no mask
    for f, g in zip(features, alone):
        torch.testing.assert_close(f[0, :g.shape[1]], g[0], atol=1e-4, rtol=1e-3)
        assert f[0, g.shape[1]:].abs().max() == 0


def test_truncation_cuts_the_prompt_never_the_tail(tokenizer):
    full = encoder_for("gpt_oss", tokenizer)
    rows, offset = full.tokenize([""])
    enc = encoder_for("gpt_oss", tokenizer, max_length=len(rows[0]) + 10)
    with pytest.warns(UserWarning, match="last 5 were cut"):
        cut, _ = enc.tokenize(["0123456789abcde"])
    assert len(cut[0]) == enc.max_length and cut[0] == full.tokenize(["0123456789"])[0][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enc.tokenize(["0123456789"])


@pytest.mark.parametrize("prompt, left", [("a <|end|>b", "a b"), ("<|<|end|>end|>x", "x"), ("<|st<|end|>art|>", None), ("a < b | c > d", "a < b | c > d")])
def test_markers_in_a_prompt_are_stripped(prompt, left, tokenizer):
    out = lens.strip_markers(prompt)
    assert not re.search(r"<\|.*?\|>", out) and (left is None or out == left)
    special = set(tokenizer.convert_tokens_to_ids(SPECIAL))
    assert not special & set(tokenizer(out, add_special_tokens=False)["input_ids"])


# --- LoRA

def adapter(seed=3, size="nano", **kw):
    model = random_model(size)
    lens.add_lora(model, 4, 8, generator=torch.Generator().manual_seed(seed), **kw)
    with torch.no_grad():
        for p in lens.lora_parameters(model, kw.get("name", "default")):
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    return model


def test_new_adapter_changes_nothing_and_two_share_one_base():
    base, model = random_model(), random_model()
    x, t, text = inputs(base)
    lens.add_lora(model, 4, 8, name="new")
    lens.add_lora(model, 4, 8, name="old")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained) and any(".new" in n for n in trained) and any(".old" in n for n in trained)
    want = base(x, t, text, None, (4, 3))
    torch.testing.assert_close(model(x, t, text, None, (4, 3)), want)
    torch.nn.init.ones_(lens.lora_parameters(model, "new")[1])
    lens.set_lora(model, "new")
    out = model(x, t, text, None, (4, 3))
    assert relative(out, want) > 1e-3
    out.square().mean().backward()
    assert all(p.grad is None for p in lens.lora_parameters(model, "old"))
    assert all(p.grad is not None for p in lens.lora_parameters(model, "new"))
    for name in ("old", None):
        lens.set_lora(model, name)
        torch.testing.assert_close(model(x, t, text, None, (4, 3)), want)
    assert set(base.state_dict()) <= set(model.state_dict())            # base names stay
    with pytest.raises(lens.LensError, match="nwe"):
        lens.set_lora(model, "nwe")


@torch.no_grad()
def test_merged_equals_attached(tmp_path):
    model, merged = adapter(), random_model()
    lens.save_lora(model, tmp_path)
    x, t, text = inputs(model)
    assert lens.load_lora(merged, tmp_path) == len(lens.lora_layers(model, "default"))
    torch.testing.assert_close(merged(x, t, text, None, (4, 3)), model(x, t, text, None, (4, 3)), atol=1e-4, rtol=1e-3)
    assert relative(merged(x, t, text, None, (4, 3)), random_model()(x, t, text, None, (4, 3))) > 1e-2
    half = random_model()
    lens.load_lora(half, tmp_path, 0.5)
    lens.set_lora(model, "default", 0.5)
    torch.testing.assert_close(half(x, t, text, None, (4, 3)), model(x, t, text, None, (4, 3)), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("style", ["bare", "diffusion_model.", "transformer.", "base_model.model.", "base_model.model.transformer.", "sd-scripts"])
@torch.no_grad()
def test_lora_key_styles(style, tmp_path):
    a, b, names = torch.randn(4, 32), torch.randn(32, 4), ["transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.attn.to_out.0"]
    tensors = {}
    for n in names:
        if style == "sd-scripts":
            k = "lora_unet_" + n.replace(".", "_")
            tensors.update({k + ".lora_down.weight": a, k + ".lora_up.weight": b, k + ".alpha": torch.tensor(2.0)})
        else:
            k = style.replace("bare", "") + n
            tensors.update({k + ".lora_A.weight": a, k + ".lora_B.weight": b})
    save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "lora.safetensors")
    model, base = random_model(), random_model()
    assert lens.load_lora(model, tmp_path / "lora.safetensors") == 2
    for n in names:
        scale = 2 / 4 if style == "sd-scripts" else 1                   # alpha / rank, else alpha = rank
        torch.testing.assert_close(model.get_submodule(n).weight, base.get_submodule(n).weight + scale * b @ a)


def test_lora_that_does_not_fit_is_an_error_and_changes_nothing(tmp_path):
    model, good, file = random_model(), "transformer_blocks.0.attn.to_out.0", tmp_path / "l.safetensors"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pair = {good + ".lora_A.weight": torch.ones(2, 32), good + ".lora_B.weight": torch.ones(32, 2)}
    for tensors, word in (({"other.lora_A.weight": torch.ones(2, 32), "other.lora_B.weight": torch.ones(32, 2)}, "matches no layer"),
                          ({**pair, "elsewhere.lora_A.weight": torch.ones(1)}, "elsewhere"),
                          ({good + ".lora_A.weight": torch.ones(2, 32)}, "lacks one"),
                          ({**pair, good + ".lora_A.weight": torch.ones(2, 31)}, re.escape("(32, 32)"))):
        save_file(tensors, file)
        with pytest.raises(lens.LensError, match=word):
            lens.load_lora(model, file)
    with pytest.raises(lens.LensError):
        lens.load_lora(model, tmp_path / "none")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- files

def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items()) and a.config == b.config


@pytest.fixture
def saved(tmp_path):
    model = random_model()
    lens.save_pipeline(tmp_path / "p", transformer=model, metadata={"seed": "7"})
    return model, tmp_path / "p", tmp_path / "p/transformer/diffusion_pytorch_model.safetensors"


def test_save_load_whole_pipeline(tmp_path, tokenizer):
    import vae
    size, model, enc = lens.SIZES["nano"], random_model(), encoder_for("gpt_oss", tokenizer, max_length=512)
    coder = vae.LensVAE(size.vae).eval()
    lens.save_pipeline(tmp_path / "p", model, coder, enc, metadata={"command": "x", "seed": 3})
    a, b, c = lens.load_pipeline(tmp_path / "p")
    assert same(model, a) and all(torch.equal(v, b.state_dict()[k]) for k, v in coder.state_dict().items())
    warnings.simplefilter("ignore")
    for f, g in zip(enc.encode("a red circle")[0], c.encode("a red circle")[0]):
        assert torch.equal(f, g)
    assert c.model.lm_head is not None and lens.read_metadata(tmp_path / "p")["seed"] == "3"
    # a fine-tuned checkpoint that holds its denoiser alone, and points at the rest
    lens.save_pipeline(tmp_path / "tuned", random_model(seed=5), base="../p", weights=model.state_dict())
    a, b, c = lens.load_pipeline(str(tmp_path / "tuned"), dtype=torch.bfloat16, parts=("transformer", "vae"))
    assert c is None and a.img_in.weight.dtype == torch.bfloat16 and torch.equal(a.img_in.weight, model.img_in.weight.bfloat16())
    # only what is asked for is read
    (tmp_path / "p/vae/diffusion_pytorch_model.safetensors").unlink()
    assert lens.load_pipeline(tmp_path / "p", parts=("text_encoder",))[:2] == (None, None)
    with pytest.raises(lens.LensError, match="no weights in"):
        lens.load_pipeline(tmp_path / "p", parts=("vae",))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "net.", "diffusion_model."])
def test_single_file_without_config(prefix, saved, tmp_path):
    model, _, _ = saved
    save_file({prefix + k: v for k, v in model.state_dict().items()}, tmp_path / "one.safetensors")
    assert same(model, lens.load_transformer(tmp_path / "one.safetensors"))
    assert same(model, lens.load_transformer(tmp_path))                 # a folder with that one file and no config
    half = lens.load_transformer(tmp_path / "one.safetensors", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_shapes_alone_give_the_full_config(tmp_path, monkeypatch):
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in lens.LensTransformer(lens.LensConfig()).state_dict().items()}
    save_file({"x": torch.zeros(1)}, tmp_path / "one.safetensors")
    monkeypatch.setattr(lens, "shapes_in", lambda files: shapes)
    monkeypatch.setattr(lens, "fill", lambda module, *rest: module)
    assert lens.load_transformer(tmp_path / "one.safetensors").config == lens.LensConfig()


def test_shards_with_an_index(saved):
    model, folder, file = saved
    state = load_file(file)
    names = sorted(state)
    parts = {"a-00001-of-00002.safetensors": names[::2], "a-00002-of-00002.safetensors": names[1::2]}
    for f, keys in parts.items():
        save_file({k: state[k] for k in keys}, file.parent / f)
    index = {"weight_map": {k: f for f, keys in parts.items() for k in keys}}
    (file.parent / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()
    assert same(model, lens.load_pipeline(folder, parts=("transformer",))[0])
    (file.parent / "a-00002-of-00002.safetensors").unlink()
    with pytest.raises(lens.LensError, match="00002"):
        lens.load_transformer(folder)


@pytest.mark.parametrize("suffix", [".scale_weight", ".weight_scale"])
def test_fp8_file(suffix, saved, tmp_path):
    model, out = saved[0], {"scaled_fp8": torch.zeros(1)}
    for i, (k, v) in enumerate(model.state_dict().items()):
        out[k] = v
        if v.dim() == 2:
            scale = v.abs().amax(1, keepdim=True) / 448 if i % 2 else v.abs().max() / 448    # one a row, or one a tensor
            out[k], out[k[:-len(".weight")] + suffix] = (v / scale).to(torch.float8_e4m3fn), scale.reshape(-1) if i % 2 else scale
    save_file(out, tmp_path / "fp8.safetensors")
    got = lens.load_transformer(tmp_path / "fp8.safetensors", dtype=torch.float32)
    for k, v in model.state_dict().items():
        assert (got.state_dict()[k] - v).abs().max() <= v.abs().max() * 0.04, k


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("txt_in.bias"), "missing.*txt_in.bias"),
    (lambda s: s.update(extra_thing=torch.ones(1)), "no place.*extra_thing"),
    (lambda s: s.update({"proj_out.bias": torch.ones(5)}), r"proj_out.bias has shape \[5\], expected \[16\]")])
def test_wrong_tensors_are_named(change, words, saved):
    state = load_file(saved[2])
    change(state)
    save_file(state, saved[2])
    with pytest.raises(lens.LensError, match=words) as e:
        lens.load_pipeline(saved[1], parts=("transformer",))
    assert str(saved[2]) in str(e.value) and "\n" not in str(e.value)


def test_paths_without_weights(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", "no such thing", tmp_path / "a" / "b"):
        with pytest.raises(lens.LensError, match="no weights"):
            lens.load_pipeline(path)
    (tmp_path / "bad.safetensors").write_bytes(b"not weights")
    with pytest.raises(lens.LensError, match="bad.safetensors"):
        lens.load_transformer(tmp_path / "bad.safetensors")


def test_full_disk_keeps_the_previous_file(saved):
    model, folder, file = saved
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))       # the kernel refuses longer files, as a full disk would
    try:
        with pytest.raises(lens.LensError, match="cannot write"):
            lens.save_pipeline(folder, transformer=random_model(seed=9))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before and [f.name for f in file.parent.iterdir() if ".new" in f.name] == []
    assert same(model, lens.load_transformer(folder))


def test_attached_adapters_are_not_lost_silently(tmp_path):
    with pytest.raises(lens.LensError, match="save_lora"):
        lens.save_pipeline(tmp_path, transformer=adapter())
