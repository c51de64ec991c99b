"""train.py: what a step learns from, and that a run that was killed goes on as if nothing had happened."""
import json

import numpy as np
import pytest
import torch

import data
import lens
import sample
import train
import vae


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A nano autoencoder and text encoder, made by the commands that make the real ones."""
    folder = tmp_path_factory.mktemp("parts")
    vae.main(["--out", str(folder), "--size", "nano", "--steps", "4", "--report", "10", "--dtype", "fp32"])
    train.main(["--stage", "text", "--size", "nano", "--steps", "6", "--out", str(folder), "--save-every", "3"])
    return folder


@pytest.fixture(scope="module")
def world(parts, tmp_path_factory):
    _, autoencoder, encoder = lens.load_pipeline(parts, parts=("vae", "text_encoder"))
    encoder.layers = lens.SIZES["nano"].transformer.selected_layer_index
    return train.World(train.STAGES["nano"][2], 0, autoencoder, encoder, tmp_path_factory.mktemp("world") / "w.safetensors", "cpu")


def weights(folder):
    return lens.load_transformer(folder).state_dict()


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_epoch_is_every_scene_once_in_batches_of_one_bucket(world):
    for epoch in (0, 1):
        seen = [(size, int(i)) for size, scenes, _ in world.batches(0, epoch) for i in scenes]
        assert len(seen) == len(set(seen)) == sum(train.STAGES["nano"][2].scenes.values())
    assert [b[1].tolist() for b in world.batches(0, 0)] == [b[1].tolist() for b in world.batches(0, 0)]
    assert [b[1].tolist() for b in world.batches(0, 0)] != [b[1].tolist() for b in world.batches(0, 1)]


def test_the_kept_world_is_what_the_frozen_models_say(world, parts):
    """Scene i of an area is a function of (seed, area, i): drawn again here, through the encoders one by one."""
    _, autoencoder, encoder = lens.load_pipeline(parts, parts=("vae", "text_encoder"))
    encoder.layers = lens.SIZES["nano"].transformer.selected_layer_index
    size = data.BUCKETS[64][2]
    tokens, text, mask = world.load(size, torch.tensor([3]), torch.tensor([1]))
    rng = np.random.default_rng((0, 64, 2 + 3 * len(data.BUCKETS[64])))
    scene = data.random_scene(rng, *size)
    picture = data.draw(scene, *size)
    captions = [data.caption(scene, data.details_for(scene, rng), rng) for _ in range(train.CAPTIONS)]
    features, _ = encoder.encode([captions[1]])
    with torch.no_grad():
        expected = autoencoder.to_tokens(autoencoder.encode(sample.from_pil([picture]))[0])
    assert torch.allclose(tokens, expected.bfloat16().float(), atol=0.02)
    assert mask.all() and all(torch.allclose(a, b.bfloat16().float(), rtol=0.02, atol=0.02) for a, b in zip(text, features))


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    noise, t, dropped = train.noise_and_time(1, 2, (64, 64), torch.tensor([5, 9, 2]), (16, 4), 1.0)
    alone = train.noise_and_time(1, 2, (64, 64), torch.tensor([9]), (16, 4), 1.0)
    assert torch.equal(noise[1], alone[0][0]) and t[1] == alone[1][0] and dropped[1] == alone[2][0]
    other = train.noise_and_time(1, 3, (64, 64), torch.tensor([9]), (16, 4), 1.0)
    assert not torch.equal(other[0], alone[0])


def test_times_and_dropout_follow_their_distributions():
    _, t, dropped = train.noise_and_time(0, 0, (64, 64), torch.arange(4000), (1, 1), 1.0)
    logit = torch.log(t / (1 - t))
    assert abs(logit.mean() - 1.0) < 0.06 and abs(logit.std() - 1.0) < 0.06
    assert abs(dropped.float().mean() - train.DROPOUT) < 0.02


def test_the_loss_is_zero_for_the_true_velocity_and_its_least_value_is_the_mean():
    tokens, noise, t = torch.randn(3, 6, 4), torch.randn(3, 6, 4), torch.rand(3)
    exact = lambda x_t, t, *_: lens.velocity(tokens, noise)
    assert train.flow_matching_loss(exact, tokens, None, None, (2, 3), noise, t).max() == 0
    silent = lambda x_t, t, *_: torch.zeros_like(x_t)
    assert torch.allclose(train.flow_matching_loss(silent, tokens, None, None, (2, 3), noise, t), (noise - tokens).square().mean((1, 2)))


def test_training_learns_and_resumes_bit_for_bit(parts, tmp_path, monkeypatch, capsys):
    command = ["--size", "nano", "--parts", str(parts), "--steps", "8", "--save-every", "3", "--preview-every", "0", "--device", "cpu"]
    monkeypatch.setattr(train, "faster_precision", lambda *a: (False, "tests compare bits"))
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
    strip = lambda folder: [{k: v for k, v in r.items() if k != "seconds"} for r in rows(folder)]
    assert strip(tmp_path / "whole") == strip(tmp_path / "halves")
    notes = lens.read_metadata(tmp_path / "whole")
    assert {"command", "seed", "steps", "guidance", "words"} <= notes.keys()
    pictures = sample.generate("a red circle", weights=tmp_path / "whole", height=48, width=48, steps=2)       # parts come from --parts, by `base`
    assert pictures[0].size == (48, 48)


def test_text_stage_resumes_bit_for_bit(parts, tmp_path):
    command = ["--stage", "text", "--size", "nano", "--save-every", "3", "--out", str(tmp_path)]
    train_text = train.schedule
    class Killed(Exception): pass
    def dies(step, *a):
        if step == 5 and not (tmp_path / "again").exists():
            (tmp_path / "again").touch()
            raise Killed
        return train_text(step, *a)
    train.schedule = dies
    try:
        with pytest.raises(Killed):
            train.main([*command, "--steps", "6"])
        train.main([*command, "--steps", "6"])
    finally:
        train.schedule = train_text
    one, two = (lens.load_pipeline(f, parts=("text_encoder",))[2].model.state_dict() for f in (parts, tmp_path))
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
