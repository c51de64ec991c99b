"""kit/features.py: the cache knows what features depend on, and costs nothing when it fails."""
import json
import os
from pathlib import Path

import pytest
import torch

import kit.features
import lens
import sample
from kit.files import write_json, write_safetensors


def key_of(folder, dtype=torch.float32, date=lens.DATE):
    return kit.features.feature_key(folder, dtype, date)


def read_other_layers(folder):
    """Lets a pipeline's denoiser read the encoder's layers in the other order."""
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    assert config["selected_layer_index"] == [0, 1]
    write_json(path, {**config, "selected_layer_index": [1, 0]})


def test_the_cache_key_knows_what_features_depend_on(copied, monkeypatch):
    keys = [key_of(copied)]
    assert key_of(copied) == keys[0]                              # the same again

    keys.append(key_of(copied, dtype=torch.bfloat16))
    keys.append(key_of(copied, date="2027-01-01"))
    with monkeypatch.context() as patch:
        head, tail = lens.CHAT["gpt_oss"]
        patch.setitem(lens.CHAT, "gpt_oss", (head + " ", tail))
        keys.append(key_of(copied))

    read_other_layers(copied)
    keys.append(key_of(copied))
    tokenizer = copied / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    keys.append(key_of(copied))
    weights = copied / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    keys.append(key_of(copied))
    assert len(set(keys)) == len(keys) == 7


def cached(folder, prompts, cache):
    return kit.features.cached_features(folder, prompts, "cpu", torch.float32, cache=str(cache))


def test_another_selection_of_layers_gets_its_own_features(copied, tmp_path):
    """Once the cache served it those of the layers that were read first."""
    before = cached(copied, ["a red circle"], tmp_path / "cache")[0]
    read_other_layers(copied)
    after = cached(copied, ["a red circle"], tmp_path / "cache")[0]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before.flip(0))


def test_features_of_the_cache_are_those_of_the_encoder(nano, pipeline, tmp_path):
    prompts = ["a red circle", "", "two blue stars"]
    expected = pipeline[2].encode_each(prompts)
    first = cached(nano, prompts, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2                     # no text is nothing to keep
    second = cached(nano, prompts, tmp_path)
    for ours, again, theirs in zip(first, second, expected):
        if theirs is None:
            assert ours is None and again is None
        else:
            assert torch.equal(ours, theirs)
            assert torch.equal(again, theirs)


def test_only_what_is_missing_is_encoded(nano, pipeline, tmp_path):
    cached(nano, ["a red circle"], tmp_path)
    asked = []

    class Listening:
        def encode_each(self, prompts):
            asked.extend(prompts)
            return pipeline[2].encode_each(prompts)

    kit.features.cached_features(nano, ["a star", "a red circle", ""], "cpu", torch.float32,
                           cache=str(tmp_path), encoder=Listening())
    assert asked == ["a star"]


def test_a_spoilt_entry_is_made_again(nano, tmp_path):
    first = cached(nano, ["a red circle"], tmp_path)[0]
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(b"torn")
    assert torch.equal(cached(nano, ["a red circle"], tmp_path)[0], first)
    assert torch.equal(kit.features.read_features(entry), first)


def test_a_disk_that_takes_nothing_costs_the_cache_alone(nano, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    features = cached(nano, ["a red circle", "a star"], tmp_path / "file" / "cache")
    assert all(own is not None for own in features)
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1
    assert notes[0].startswith("note: prompt features were not cached: cannot write")


def test_a_cache_that_cannot_be_read_costs_the_cache_alone(nano, tmp_path, capsys):
    """Another user's folder was once a traceback; so is a name that the file system refuses."""
    features = cached(nano, ["a red circle"], tmp_path / ("x" * 300))
    assert features[0] is not None
    assert capsys.readouterr().err.startswith("note: prompt features were not cached: cannot write")


def test_an_entry_without_features_is_made_again(nano, tmp_path):
    first = cached(nano, ["a red circle"], tmp_path)[0]
    (entry,) = tmp_path.iterdir()
    write_safetensors(entry, {"other": torch.zeros(1)})
    assert torch.equal(cached(nano, ["a red circle"], tmp_path)[0], first)


def test_the_oldest_entries_of_the_cache_go_first(tmp_path):
    names = [letter * 64 for letter in "bac"]      # the oldest first
    for age, name in enumerate(names):
        entry = tmp_path / f"{name}.safetensors"
        entry.write_bytes(bytes(100))
        os.utime(entry, (1000 + age, 1000 + age))
    others = [tmp_path / "model.safetensors", tmp_path / "notes.txt"]
    for other in others:
        other.write_bytes(bytes(1000))
        os.utime(other, (1, 1))

    def kept():
        return sorted(path.name[0] for path in tmp_path.glob("?" * 64 + ".safetensors"))

    kit.features.trim_cache(tmp_path, limit=300)
    assert kept() == ["a", "b", "c"]
    kit.features.trim_cache(tmp_path, limit=299)
    assert kept() == ["a", "c"]
    kit.features.trim_cache(tmp_path, limit=1)
    assert kept() == []
    assert all(other.exists() for other in others)
    kit.features.trim_cache(tmp_path / "none")           # nothing to do, and no error


def test_the_cache_is_trimmed_when_it_has_grown(nano, tmp_path, monkeypatch):
    trimmed = []
    monkeypatch.setattr(kit.features, "trim_cache", trimmed.append)
    cached(nano, ["a red circle"], tmp_path)
    cached(nano, ["a red circle"], tmp_path)       # nothing new
    assert trimmed == [str(tmp_path)]


def test_many_prompts_are_kept_as_they_are_encoded(nano, pipeline, tmp_path):
    """A kill costs the last 64, not all."""
    prompts = [f"{'a ' * (k % 3)}red circle {k}" for k in range(70)]

    class DiesInTheSecond:
        calls = 0

        def encode_each(self, few):
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return pipeline[2].encode_each(few)

    with pytest.raises(KeyboardInterrupt):
        kit.features.cached_features(nano, prompts, "cpu", torch.float32, cache=str(tmp_path),
                               encoder=DiesInTheSecond())
    assert len(list(tmp_path.iterdir())) == 64


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert kit.features.default_cache() == ""
    assert sample.arguments(["--prompt", "a star"]).cache == ""
