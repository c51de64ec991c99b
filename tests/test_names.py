"""Names of weights: a folder, a file or a hub id, wherever weights are named; and the bases that
checkpoints name."""
import fnmatch
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, error_line, random_model
from PIL import Image

import distill
import lens
import sample
import train
import vae
from kit.checkpoint import load_pipeline, load_transformer, load_vae, save_pipeline
from kit.files import LensError, read_json, write_json
from kit.lora import add_lora, lora_parameters, merge_lora, save_lora
from kit.places import (
    base_from,
    fetch,
    fetch_lora,
    gather,
    identity,
    part_folder,
    read_metadata,
    vae_identity,
)
from kit.run import Run

WEIGHTS = ROOT / "weights"


def same(a, b):
    """Whether two denoisers hold the same numbers."""
    b = b.state_dict()
    return all(torch.equal(tensor, b[name]) for name, tensor in a.state_dict().items())


def save_base(folder, seed=0):
    """A pipeline of a denoiser and an autoencoder."""
    model = random_model(seed=seed)
    save_pipeline(folder, model, vae.LensVAE(lens.SIZES["nano"].vae), metadata={"steps": 7})
    return model


def save_adapter(folder, seed=1, notes=None):
    """An adapter that changes something, with no word on its base."""
    model = random_model()
    generator = torch.Generator().manual_seed(seed)
    add_lora(model, 2, 4, generator=generator)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(std=0.1, generator=generator)
    save_lora(model, folder, metadata=notes)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder to be in, with weights/base: where it is, and the denoiser in it."""
    root = tmp_path / "repository"
    model = save_base(root / "weights" / "base")
    monkeypatch.chdir(root)
    return root, model


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """{hub id: folder} of a hub that gives the files whose patterns were asked for."""
    import huggingface_hub

    repositories = {}

    def download(repo, revision, allow_patterns):
        if revision:
            repo = f"{repo}@{revision}"
        if repo not in repositories:
            raise OSError(f"no {repo}")
        snapshot = tmp_path / "snapshots" / repo
        for file in Path(repositories[repo]).rglob("*"):
            name = str(file.relative_to(repositories[repo]))
            if file.is_file() and any(fnmatch.fnmatch(name, p) for p in allow_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, snapshot / name)
        return str(snapshot)

    def download_file(repo, file, revision):
        return str(Path(download(repo, revision, [file])) / file)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download_file)
    return repositories


# --- Hub ids --------------------------------------------------------------------------------------

def test_every_loader_takes_a_hub_id(repository, hub):
    _, model = repository
    hub["owner/name"] = "weights/base"
    assert same(load_transformer("owner/name"), model)
    assert load_vae("owner/name").config == lens.SIZES["nano"].vae
    assert same(load_pipeline("owner/name", parts=("transformer", "vae"))[0], model)
    assert vae_identity("owner/name") == vae_identity("weights/base")


def test_an_adapter_on_the_hub_comes_with_its_file_and_its_base(repository, hub, tmp_path):
    _, model = repository
    save_adapter(tmp_path / "adapter")
    save_pipeline(tmp_path / "adapter", base="owner/base")
    hub.update({"owner/base": "weights/base", "owner/adapter": tmp_path / "adapter"})
    merge_lora(model, tmp_path / "adapter")
    assert same(load_transformer("owner/adapter"), model)
    transformer, *_ = load_pipeline("owner/adapter", parts=("transformer", "vae"))
    assert same(transformer, model)


def test_a_lora_of_the_hub_is_merged_and_noted_by_its_id(hub, tmp_path, capsys):
    hub["owner/lora"] = WEIGHTS / "toy-rl"
    sample.main(["--prompt", "a red circle", "--lora", "owner/lora", "--steps", "1", "--height",
                 "64", "--dtype", "fp32", "--device", "cpu", "--cache", "", "--out", str(tmp_path)])
    assert "LoRA: 46 layers changed" in capsys.readouterr().out
    picture = Image.open(tmp_path / "a-red-circle-0.png")
    assert picture.text["lora"] == "owner/lora x 1.0"


@pytest.mark.parametrize("lora", [0, 2])
def test_a_run_from_the_hub_names_its_base_by_the_id(parts, hub, lora, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(parts, whole)
    model = random_model()
    save_pipeline(whole, model)
    hub["owner/name"] = whole
    out = tmp_path / "run"
    train.main(["--size", "nano", "--stage", "2", "--init", "owner/name", "--parts", "owner/name",
                "--lora", str(lora), "--out", str(out), "--steps", "1", "--preview-every", "0",
                "--device", "cpu"])
    assert read_json(out / "model_index.json")["base"] == "owner/name"
    assert part_folder(out, "vae") == tmp_path / "snapshots" / "owner" / "name" / "vae"
    transformer, autoencoder, encoder = load_pipeline(out)
    assert transformer.config == model.config
    assert None not in (autoencoder, encoder)


@pytest.mark.parametrize("lora", [0, 2])
def test_a_student_names_its_teacher_by_the_hub_id(lora, repository, tmp_path):
    model = random_model()
    if lora:
        add_lora(model, lora, lora, name="ema")
    here = gather(Path("weights/base"))
    output = distill.Output(gather("owner/name"), here, None, None, (64, 64), {})
    run = Run(tmp_path / "run")
    distill.write_student(run, model, lora, distill.Progress(), output)
    assert read_json(run.out / "model_index.json")["base"] == "owner/name"


# --- Bases ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("reached", ["runs/mine", "../scratch/runs/mine"])
def test_the_base_is_found_when_the_run_lies_behind_a_link(reached, repository, tmp_path):
    _, model = repository
    (tmp_path / "scratch" / "runs").mkdir(parents=True)
    Path("runs").symlink_to(tmp_path / "scratch" / "runs")
    save_pipeline("runs/mine", base=base_from("runs/mine", "weights/base"))
    assert same(load_transformer(reached), model)


def test_a_base_that_was_stored_by_the_name_of_the_link_is_found_by_it(repository, tmp_path):
    _, model = repository
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    Path("runs").symlink_to(tmp_path / "elsewhere" / "deep")
    save_pipeline("runs/mine", base="../../weights/base")
    assert same(load_transformer("runs/mine"), model)


@pytest.mark.parametrize("run", ["runs/mine", "weights", "."])
def test_a_repository_can_be_moved(run, repository, tmp_path, monkeypatch):
    root, model = repository
    save_pipeline(run, base=base_from(run, root / "weights" / "base"))
    assert not Path(read_json(Path(run) / "model_index.json")["base"]).is_absolute()
    root.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert same(load_transformer(Path("moved") / run), model)


def test_a_run_that_was_moved_says_which_base_it_misses(repository, tmp_path):
    save_pipeline("runs/mine", base=base_from("runs/mine", "weights/base"))
    moved = tmp_path / "a" / "b" / "mine"
    shutil.copytree("runs/mine", moved)
    with pytest.raises(LensError) as error:
        load_pipeline(moved)
    line = str(error.value)
    assert f"{moved}/model_index.json names ../../weights/base as its base" in line
    assert f"{tmp_path}/a/weights/base is not there" in line
    assert '"base"' in line


def test_a_folder_with_an_adapter_is_the_base_and_the_adapter(repository):
    _, model = repository
    save_adapter("runs/mine", notes={"steps": 3})
    save_pipeline("runs/mine", base="../../weights/base")
    assert not same(load_transformer("runs/mine"), model)
    merge_lora(model, "runs/mine")
    assert same(load_transformer("runs/mine"), model)
    assert same(load_pipeline("runs/mine", parts=("transformer", "vae"))[0], model)
    assert read_metadata("runs/mine")["steps"] == "3"

    # An adapter over that: both count, the base's first.
    first = identity("runs/mine")
    save_adapter("runs/more", seed=2, notes={"seed": 5})
    save_pipeline("runs/more", base="../mine")
    merge_lora(model, "runs/more")
    assert same(load_transformer("runs/more"), model)
    notes = read_metadata("runs/more")
    assert (notes["steps"], notes["seed"]) == ("3", "5")
    more = identity("runs/more")
    save_adapter("runs/mine", seed=3)
    assert identity("runs/mine") != first
    assert identity("runs/more") != more


def test_the_shipped_adapters_are_not_their_base():
    base = load_transformer(WEIGHTS / "toy")
    for name, guidance in (("toy-turbo", 1.0), ("toy-rl", 1.0)):
        folder = WEIGHTS / name
        assert not same(load_transformer(folder), base)
        assert sample.sampler_settings(read_metadata(folder))[1] == guidance
        assert sample.usual_base(read_metadata(folder), channels=32) == 128


@pytest.mark.parametrize("known_by", ["init", "base_model_name_or_path"])
def test_an_adapter_without_an_index_works_where_its_base_is_known(
        known_by, repository, tmp_path, monkeypatch):
    _, model = repository
    # rl.py once noted its base's scores under the name of the home size.
    notes = {"init": "weights/base", "base": '{"overall": 0.5}'}
    save_adapter("runs/rl", notes=notes if known_by == "init" else None)
    if known_by != "init":
        config = read_json("runs/rl/adapter_config.json")
        write_json("runs/rl/adapter_config.json", {**config, known_by: "weights/base"})
    merge_lora(model, "runs/rl")
    assert same(load_transformer("runs/rl"), model)
    assert sample.usual_base(read_metadata("runs/rl"), channels=32) == 128

    folder = Path("runs/rl").absolute()
    monkeypatch.chdir(tmp_path)                    # from here, nobody knows where the base is
    for load in (load_transformer, load_pipeline, read_metadata):
        with pytest.raises(LensError, match="is an adapter whose base is not known.*--lora"):
            load(folder)


# --- What is not there ----------------------------------------------------------------------------

def test_what_a_run_has_lost_is_not_taken_from_its_base(repository, capsys):
    save_base(Path("runs/mine"), seed=5)
    save_pipeline("runs/mine", base="../../weights/base")
    shutil.rmtree("runs/mine/transformer")
    lost = "runs/mine: model_index.json names a transformer, but runs/mine/transformer is gone"
    with pytest.raises(LensError, match=lost):
        load_transformer("runs/mine")
    line = error_line(sample.main, ["--prompt", "x", "--weights", "runs/mine"], capsys)
    assert lost in line

    save_adapter("runs/rl")
    save_pipeline("runs/rl", base="../../weights/base")
    Path("runs/rl/adapter_model.safetensors").unlink()
    with pytest.raises(LensError, match="adapter_config.json, but no adapter_model.safetensors"):
        load_transformer("runs/rl")


@pytest.mark.parametrize("name", ["weights/toy", "runs/rl", "weights/toy/"])
def test_our_own_folders_are_not_asked_of_the_hub(name, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub[name] = WEIGHTS / "toy"                    # somebody's who calls himself "weights"
    with pytest.raises(LensError, match=f"no weights at {name}: .*local folder") as error:
        fetch(name, ("transformer",))
    assert (f"there is {ROOT}/weights/toy" in str(error.value)) == ("toy" in name)


def test_a_quoted_tilde_is_the_home(repository, monkeypatch):
    root, model = repository
    monkeypatch.setenv("HOME", str(root))
    save_adapter("lora")
    assert same(load_transformer("~/weights/base"), model)
    assert same(load_pipeline("~/weights/base", parts=("transformer", "vae"))[0], model)
    assert vae_identity("~/weights/base") == vae_identity("weights/base")
    assert fetch_lora("~/lora") == root / "lora"
    assert base_from("runs/mine", "~/weights/base") == "../../weights/base"
    with pytest.raises(LensError, match="no weights at ~nobody/x"):
        fetch("~nobody/x", ("vae",))


def test_a_file_stands_for_its_own_part_alone(repository, capsys):
    _, model = repository
    denoiser = "weights/base/transformer/diffusion_pytorch_model.safetensors"
    coder = "weights/base/vae/diffusion_pytorch_model.safetensors"
    assert same(load_transformer(denoiser), model)
    _, loaded, _ = load_pipeline(coder, parts=("vae",))
    assert torch.equal(loaded.bn.running_mean, load_vae("weights/base").bn.running_mean)
    assert vae_identity(coder) == vae_identity("weights/base")
    with pytest.raises(LensError, match="is one file, of one part: name the others"):
        load_pipeline(denoiser)
    assert base_from("runs/mine", denoiser) == f"../../{denoiser}"

    save_adapter("lora")
    for name in ("lora/adapter_model.safetensors", "lora"):
        line = error_line(sample.main, ["--prompt", "x", "--weights", name], capsys)
        assert "--lora" in line
    # As diffusers names it.
    os.rename("lora/adapter_model.safetensors", "lora/pytorch_lora_weights.safetensors")
    os.unlink("lora/adapter_config.json")
    with pytest.raises(LensError, match="adapter.*--lora"):
        load_transformer("lora")
    save_pipeline("lora", base="../weights/base")
    merge_lora(model, "lora")
    assert same(load_transformer("lora"), model)
