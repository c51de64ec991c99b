"""The parts as people hold them: files alone, ComfyUI's folder, a stock language model, the hub;
from each the same picture."""
import datetime
import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import GOLDENS, error_line
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_names import hub  # noqa: F401
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel

import lens
import sample
import train
from kit.checkpoint import load_pipeline, load_text_encoder, load_transformer, load_vae
from kit.files import LensError, read_json, write_json
from kit.places import Places, base_from, gather

PROMPT = "a red circle"


def picture_of(weights, **parts):
    pipeline = load_pipeline(gather(weights, **parts), dtype=torch.float32)
    return sample.generate([PROMPT], pipeline, height=32, width=32, steps=2, guidance=2)[0]


@pytest.fixture(scope="module")
def expected(nano):
    return picture_of(nano)


def bfl_names(state, config):
    """An autoencoder's tensors as FLUX.2's own code names them, each name written here by hand: the
    independent second path."""
    def block(ours, theirs):
        for end in ("norm1", "conv1", "norm2", "conv2"):
            yield f"{ours}.{end}", f"{theirs}.{end}"
        yield f"{ours}.conv_shortcut", f"{theirs}.nin_shortcut"

    stages, layers = len(config["block_out_channels"]), config["layers_per_block"]
    pairs = [("quant_conv", "encoder.quant_conv"), ("post_quant_conv", "decoder.post_quant_conv")]
    for half in ("encoder", "decoder"):
        pairs += [(f"{half}.conv_in", f"{half}.conv_in"), (f"{half}.conv_out", f"{half}.conv_out"),
                  (f"{half}.conv_norm_out", f"{half}.norm_out")]
        pairs += block(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1")
        pairs += block(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2")
        ours, theirs = f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1"
        pairs += [(f"{ours}.group_norm", f"{theirs}.norm"), (f"{ours}.to_q", f"{theirs}.q"),
                  (f"{ours}.to_k", f"{theirs}.k"), (f"{ours}.to_v", f"{theirs}.v"),
                  (f"{ours}.to_out.0", f"{theirs}.proj_out")]
    for i in range(stages):
        last = stages - 1 - i
        for j in range(layers):
            pairs += block(f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}")
        for j in range(layers + 1):
            pairs += block(f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{last}.block.{j}")
        pairs += [(f"encoder.down_blocks.{i}.downsamplers.0.conv",
                   f"encoder.down.{i}.downsample.conv"),
                  (f"decoder.up_blocks.{i}.upsamplers.0.conv",
                   f"decoder.up.{last}.upsample.conv")]

    named = {f"{ours}.{end}": f"{theirs}.{end}"
             for ours, theirs in pairs for end in ("weight", "bias")}
    renamed = {}
    for name, tensor in state.items():
        theirs = named.get(name, name)
        if ".attn_1." in theirs and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]                      # a 1 x 1 convolution there
        renamed[theirs] = tensor.contiguous()
    assert not any("_blocks" in name for name in renamed)
    return renamed


@pytest.fixture
def three(nano, tmp_path):
    """The parts of `nano` as people download them: {"denoiser": file, "vae": file, "encoder":
    folder}."""
    denoiser = load_file(nano / "transformer" / "diffusion_pytorch_model.safetensors")
    files = tmp_path / "files"
    files.mkdir()
    save_file({f"model.diffusion_model.{name}": t for name, t in denoiser.items()},
              files / "lens_bf16.safetensors")
    coder = load_file(nano / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(bfl_names(coder, lens.SIZES["nano"].vae), files / "flux2-vae.safetensors")
    stock = files / "gpt-oss"
    shutil.copytree(nano / "text_encoder", stock)
    for file in (nano / "tokenizer").iterdir():
        shutil.copy(file, stock)
    # Shapes do not tell which layers are read, nor how heads are split over axes.
    write_json(files / "config.json", read_json(nano / "transformer" / "config.json"))
    return {"denoiser": files / "lens_bf16.safetensors", "vae": files / "flux2-vae.safetensors",
            "encoder": stock}


def test_three_files_make_the_picture(three, expected):
    picture = picture_of(three["denoiser"], vae=three["vae"], text_encoder=three["encoder"])
    assert picture == expected


def test_so_does_the_command(three, nano, tmp_path, capsys):
    def pixels(out, *weights):
        sample.main(["--prompt", PROMPT, "--steps", "2", "--guidance", "2", "--height", "32",
                     "--width", "32", "--dtype", "fp32", "--device", "cpu", "--cache",
                     str(tmp_path / "cache"), "--out", str(tmp_path / out), *map(str, weights)])
        return (tmp_path / out).read_bytes()

    apart = ["--weights", three["denoiser"], "--vae", three["vae"],
             "--text-encoder", three["encoder"]]
    a, b = pixels("a.png", *apart), pixels("b.png", "--weights", nano)
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()
    assert a != b                                  # their notes differ
    line = error_line(sample.main, ["--prompt", "x", "--weights", str(three["denoiser"]),
                                    "--vae", str(three["vae"])], capsys)
    assert "is one file, of one part: name the others with --vae and --text-encoder" in line


def test_comfyui_keeps_them_in_folders_of_its_own(three, nano, tmp_path, expected):
    models = tmp_path / "models"
    for folder in ("diffusion_models", "vae", "text_encoders"):
        (models / folder).mkdir(parents=True)
    shutil.copy(three["denoiser"], models / "diffusion_models")
    shutil.copy(three["denoiser"].parent / "config.json", models / "diffusion_models")
    shutil.copy(three["vae"], models / "vae")
    encoder = nano / "text_encoder" / "model.safetensors"
    shutil.copy(encoder, models / "text_encoders" / "gpt.safetensors")
    for file in [nano / "text_encoder" / "config.json", *(nano / "tokenizer").iterdir()]:
        shutil.copy(file, models / "text_encoders")
    assert picture_of(models) == expected

    shutil.copy(three["vae"], models / "vae" / "another.safetensors")
    with pytest.raises(LensError, match=r"found 2 files \(another.*, flux2-vae.*name one"):
        load_vae(models)


def test_a_language_model_may_be_one_file(three, nano, tmp_path, expected, hub):  # noqa: F811
    """Its config is then told by its shapes, and its tokenizer comes from the hub."""
    file = tmp_path / "gpt_oss.safetensors"
    shutil.copy(nano / "text_encoder" / "model.safetensors", file)
    config = read_json(nano / "text_encoder" / "config.json")
    nano_text = lens.SIZES["nano"].text_encoder
    assert config["num_experts_per_tok"] == nano_text["num_experts_per_tok"]
    hub["openai/gpt-oss-20b"] = nano / "tokenizer"
    encoder = load_pipeline(Places(three["denoiser"], three["vae"], file), dtype=torch.float32,
                            parts=("text_encoder",))[2]
    told = encoder.model.config
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "head_dim", "num_local_experts", "intermediate_size", "vocab_size"):
        assert getattr(told, name) == config[name], name
    assert told.num_experts_per_tok == 4           # as nothing says it, GPT-OSS-20B's

    write_json(tmp_path / "config.json", config)
    shutil.copy(nano / "tokenizer" / "tokenizer.json", tmp_path)
    assert picture_of(three["denoiser"], vae=three["vae"], text_encoder=file) == expected


def test_each_part_may_be_on_the_hub(three, nano, tmp_path, expected, hub):  # noqa: F811
    hub["comfy/lens@v2"] = three["denoiser"].parent
    hub["owner/whole"] = nano
    hub["openai/stock"] = three["encoder"]
    with pytest.raises(LensError, match="hub could not give it"):
        load_vae("comfy/lens/flux2-vae.safetensors")               # of the main revision
    places = gather("owner/whole", vae="comfy/lens@v2/flux2-vae.safetensors",
                    text_encoder="openai/stock")
    pipeline = load_pipeline(places, dtype=torch.float32)
    assert sample.generate([PROMPT], pipeline, height=32, width=32, steps=2,
                           guidance=2)[0] == expected
    # What was named apart is not fetched with the rest.
    whole = tmp_path / "snapshots" / "owner" / "whole"
    weights = {file.parent.name for file in whole.rglob("*.safetensors")}
    assert weights == {"transformer"}


def test_a_tokenizer_of_another_model_is_refused(three):
    config = read_json(three["encoder"] / "config.json")
    tokenizer = read_json(three["encoder"] / "tokenizer.json")
    extra = {"id": config["vocab_size"], "content": "<|extra|>", "single_word": False,
             "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"].append(extra)
    write_json(three["encoder"] / "tokenizer.json", tokenizer)
    with pytest.raises(LensError, match="tokenizer has .* tokens, the model"):
        load_pipeline(Places(three["denoiser"], three["vae"], three["encoder"]))


def test_an_adapter_over_three_files_knows_them(three, expected, tmp_path):
    """Trained over parts that lie apart, it is sampled by its own name."""
    out = tmp_path / "lora"
    train.main(["--size", "nano", "--stage", "2", "--init", str(three["denoiser"]),
                "--vae", str(three["vae"]), "--text-encoder", str(three["encoder"]),
                "--lora", "2", "--out", str(out), "--steps", "1", "--preview-every", "0",
                "--device", "cpu"])
    assert read_json(out / "model_index.json")["base"] == {
        "transformer": "../files/lens_bf16.safetensors", "vae": "../files/flux2-vae.safetensors",
        "text_encoder": "../files/gpt-oss"}
    pipeline = load_pipeline(out, dtype=torch.float32)
    assert sample.generate([PROMPT], pipeline, height=32, width=32, steps=2, guidance=2)
    with_lora, _, _ = pipeline
    plain, _, _ = load_pipeline(Places(*three.values()), dtype=torch.float32)
    # After one step B is not zero any more, but small.
    name = "transformer_blocks.0.attn.img_qkv.weight"
    change = (with_lora.state_dict()[name] - plain.state_dict()[name]).abs().max()
    assert 0 < change < 0.01


def test_a_part_of_another_kind_is_one_line(three, nano, capsys):
    """An autoencoder for a denoiser, or of another size than it."""
    apart = ["--vae", str(three["vae"]), "--text-encoder", str(three["encoder"])]
    coder = str(nano / "vae" / "diffusion_pytorch_model.safetensors")
    line = error_line(sample.main, ["--prompt", "x", "--weights", coder, *apart], capsys)
    assert "is not a Lens denoiser" in line
    toy = str(sample.TOY)
    for flags, words in ((["--vae", toy], "makes tokens of 32 channels"),
                         (["--text-encoder", toy], "has features 96 wide")):
        line = error_line(sample.main, ["--prompt", "x", "--weights", str(nano), *flags], capsys)
        assert words in line and "not of one model" in line


@pytest.mark.parametrize("prefix", ["vae.", "first_stage_model."])
def test_an_autoencoder_out_of_a_larger_file(prefix, three):
    tensors = load_file(three["vae"])
    save_file({prefix + name: t for name, t in tensors.items()}, three["vae"])
    assert load_vae(three["vae"]).config == lens.SIZES["nano"].vae


def test_the_plain_file_is_taken_before_a_variant(nano, copied):
    folder = copied / "transformer"
    wrong = {name: torch.zeros_like(t)
             for name, t in load_file(folder / "diffusion_pytorch_model.safetensors").items()}
    save_file(wrong, folder / "diffusion_pytorch_model.fp16-00001-of-00001.safetensors")
    write_json(folder / "diffusion_pytorch_model.fp16.safetensors.index.json", {
        "weight_map": {name: "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"
                       for name in wrong}})
    state, expected = load_transformer(copied).state_dict(), load_transformer(nano).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_language_model_with_tensors_left_over_is_refused(copied):
    file = copied / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 2)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(LensError, match="tensors this model has no place for"):
        load_text_encoder(copied)


@pytest.mark.parametrize("content", ["5", "null", "[1]"])
def test_json_of_another_type_is_one_line(content, copied):
    (copied / "transformer" / "config.json").write_text(content)
    with pytest.raises(LensError, match="it holds no JSON object"):
        load_transformer(copied)
    shutil.rmtree(copied / "transformer")
    (copied / "model_index.json").write_text(content)
    with pytest.raises(LensError, match="it holds no JSON object"):
        load_transformer(copied)
    write_json(copied / "model_index.json", {"base": 5})
    with pytest.raises(LensError, match="its base is no name: 5"):
        load_transformer(copied)


def test_names_of_parts_are_told_once():
    assert str(gather("weights/toy")) == "weights/toy"
    assert str(gather("a", vae="b")) == "a, b"
    assert gather(gather("a", text_encoder="c")) == Places("a", "a", "c")
    assert base_from("out", gather("owner/name@v1")) == "owner/name@v1"


# --- The reference's numbers from every layout ----------------------------------------------------

def golden_weights(name, folder, layout):
    """A golden's weights as a file or folder in a layout -> (what to load, golden, its notes)."""
    with safe_open(str(GOLDENS / f"{name}.safetensors"), "pt") as f:
        tensors, notes = {key: f.get_tensor(key) for key in f.keys()}, f.metadata()
    weights = {key.removeprefix("weights."): t for key, t in tensors.items()
               if key.startswith("weights.")}
    config = json.loads(notes["config"])
    prefix, names = "", weights
    if layout == "model.diffusion_model." or layout == "net.":
        prefix = layout
    if layout == "bfl":
        names = bfl_names(weights, config)
    target = folder / "part"
    write_json(target / "config.json", config)
    save_file({prefix + key: t.contiguous() for key, t in names.items()},
              target / "weights.safetensors")
    return target / "weights.safetensors", tensors, notes


def off(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("layout", ["released", "model.diffusion_model.", "net."])
def test_a_denoiser_of_every_layout_gives_the_references_velocity(layout, tmp_path):
    file, golden, notes = golden_weights("dit", tmp_path, layout)
    model = load_transformer(file)
    text = [golden[f"in.text_features.{k}"] for k in range(4)]
    with torch.no_grad():
        v = model(golden["in.latents"], golden["in.timestep"], text, golden["in.text_mask"],
                  tuple(json.loads(notes["latent_grid"])))
    assert off(v, golden["out.velocity"]) < 1e-4


@pytest.mark.parametrize("layout", ["released", "bfl"])
@pytest.mark.parametrize("with_config", [True, False])
def test_an_autoencoder_of_every_layout_gives_the_references_picture(
        layout, with_config, tmp_path, monkeypatch):
    file, golden, notes = golden_weights("vae", tmp_path, layout)
    if not with_config:
        (file.parent / "config.json").unlink()
        # The one number that shapes do not tell is that of a known size with such widths.
        config = json.loads(notes["config"])
        assert config["norm_num_groups"] == 4
        known = replace(lens.SIZES["full"], vae=config)
        monkeypatch.setitem(lens.SIZES, "golden", known)
    coder = load_vae(file)
    with torch.no_grad():
        mean, _ = coder.encode(golden["in.image"])
        image = coder.decode(golden["in.latent"])
    assert off(mean, golden["out.encode_mean"]) < 1e-4
    assert off(image, golden["out.decode"]) < 1e-4


@pytest.mark.parametrize("as_file", [True, False])
def test_a_language_model_of_either_layout_gives_the_references_features(as_file, tmp_path):
    file, golden, notes = golden_weights("text_encoder", tmp_path, "released")
    words = WordLevel({"red": 0, "[UNK]": 1}, unk_token="[UNK]")
    Tokenizer(words).save(str(file.parent / "tokenizer.json"))
    config = read_json(file.parent / "config.json")
    write_json(file.parent / "config.json", {"model_type": "gpt_oss", **config})
    place = file
    if not as_file:
        place = file.parent
        file.rename(file.with_name("model.safetensors"))
    layers = json.loads(notes["selected_layers"])
    encoder = load_text_encoder(place, dtype=torch.float32, layers=layers)
    features = lens.text_features(encoder.model, golden["in.input_ids"],
                                  golden["in.attention_mask"], layers)
    for k, layer in enumerate(features):
        visible = golden["in.attention_mask"].bool()
        assert off(layer[visible], golden[f"out.features.{k}"][visible]) < 1e-4


# --- The chat -------------------------------------------------------------------------------------

# How GPT-OSS's own tokenizer renders a chat, as far as these messages go (written anew here).
HARMONY = """\
{{- "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\\n" }}
{{- "Knowledge cutoff: 2024-06\\nCurrent date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}
{{- "Reasoning: " + (reasoning_effort or "medium") + "\\n\\n# Valid channels: analysis, " }}
{{- "commentary, final. Channel must be included for every message.<|end|>" }}
{%- for message in messages %}
{%- if message.role == "developer" %}
{{- "<|start|>developer<|message|># Instructions\\n\\n" + message.content + "\\n\\n<|end|>" }}
{%- elif message.role == "user" %}
{{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
{%- else %}
{{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
{{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
{%- endif %}
{%- endfor %}"""
# Its special tokens that a chat has, with their published ids.
SPECIAL = {"<|return|>": 200002, "<|channel|>": 200005, "<|start|>": 200006, "<|end|>": 200007,
           "<|message|>": 200008}


def test_our_chat_is_what_the_tokenizers_own_template_renders():
    letters = {letter: k for k, letter in enumerate(sorted(ByteLevel.alphabet()))}
    words = Tokenizer(BPE(letters, []))            # each byte a token: no merges
    words.pre_tokenizer = ByteLevel(add_prefix_space=False)
    words.add_special_tokens(list(SPECIAL))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, chat_template=HARMONY)
    ours = {tokenizer.convert_tokens_to_ids(name): number for name, number in SPECIAL.items()}

    encoder = lens.TextEncoder(random_language_model(len(tokenizer)), tokenizer, (0,),
                               date=datetime.date.today().isoformat(), max_length=4096)
    prompt = 'A red fox, "déjà vu" in 2 lines.\nAnd a sign.'
    (ids,), _ = encoder.tokenize([prompt])
    thinking = "Need to generate one image according to the description."
    theirs = tokenizer.apply_chat_template(
        [{"role": "developer", "content": lens.DESCRIBE}, {"role": "user", "content": prompt},
         {"role": "assistant", "thinking": thinking, "content": ""}], return_dict=False)
    assert [ours.get(i, i) for i in ids] == [ours.get(i, i) for i in theirs[:-1]]
    assert ours[theirs[-1]] == SPECIAL["<|return|>"]               # which ends what we go on with
    assert [ours.get(i) for i in ids[:1]] == [200006]


def random_language_model(vocabulary):
    spec = lens.SIZES["nano"].text_encoder
    return lens.build_text_model(spec, vocab_size=vocabulary, pad_token_id=0)
