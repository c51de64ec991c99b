"""Runs of train.py that end at any moment, in the middle of saving too, and go on; and what may not
go on in the same folder."""
import copy
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    STEADY_SCRIPT,
    Killed,
    error_line,
    fixed_attention,
    fixed_dtype,
    rows,
    untimed_rows,
)
from shards import make_shards, spoil

import data
import kit.run
import lens
import toy.autoencoder
import toy.dataset
import toy.language
import train
from kit.checkpoint import load_transformer, save_pipeline
from kit.files import LensError, read_json, write_json
from kit.lora import add_lora, merge_lora, save_lora
from kit.state import newest_state


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The pattern of tars with 40 scenes."""
    return make_shards(tmp_path_factory.mktemp("shards"), 40)


@pytest.fixture(scope="module")
def on_world(parts):
    """Flags of a short run on the toy world."""
    return ["--size", "nano", "--device", "cpu", "--preview-every", "0", "--parts", str(parts),
            "--stage", "1", "--steps", "8"]


@pytest.fixture(scope="module")
def on_shards(parts, shards):
    """Flags of a run on shards, over a few epochs."""
    return ["--size", "nano", "--device", "cpu", "--preview-every", "0", "--parts", str(parts),
            "--stage", "2", "--steps", "24", "--save-every", "4", "--batch", "5,3",
            "--data", shards]


def train_in(out, flags, *more):
    train.main([*flags, *more, "--out", str(out)])


@pytest.fixture(scope="module")
def undisturbed(on_shards, tmp_path_factory):
    """The folder of a run on shards that nobody killed. Tests read it, and leave it as it is."""
    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit.run, "fastest_dtype", fixed_dtype)
        patch.setattr(kit.run, "fastest_attention", fixed_attention)
        train_in(out, on_shards, "--workers", "0")
    return out


@pytest.fixture
def finished(undisturbed, tmp_path):
    """A copy of it, to go on with."""
    return shutil.copytree(undisturbed, tmp_path / "finished")


def assert_same_run(out, expected):
    """Every number that no clock fills, and every weight, to the bit."""
    assert untimed_rows(out) == untimed_rows(expected)
    one = load_transformer(out).state_dict()
    other = load_transformer(expected).state_dict()
    assert one.keys() == other.keys()
    for name, w in one.items():
        assert torch.equal(w, other[name]), name


def steps_of(out):
    return [row["step"] for row in rows(out)]


# --- A run that is killed -------------------------------------------------------------------------

def before_loss(patch, call, act):
    """Has act() called before the call-th loss of a run, counted from 1."""
    original, calls = train.flow_matching_loss, itertools.count(1)

    def loss(*inputs):
        if next(calls) == call:
            act()
        return original(*inputs)

    patch.setattr(train, "flow_matching_loss", loss)


def test_a_run_on_the_world_goes_on_to_the_bit(on_world, tmp_path, steady, monkeypatch, capsys):
    """Killed in the middle of stage 2, after steps that no checkpoint holds."""
    flags = [*on_world, "--stage", "all", "--save-every", "3"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train_in(whole, flags)
    assert steps_of(whole) == list(range(1, 17))   # stage 1, then stage 2

    def die():
        raise Killed

    with monkeypatch.context() as patch:
        before_loss(patch, 13, die)
        with pytest.raises(Killed):
            train_in(halves, flags)
    train_in(halves, flags)
    said = f"resuming {halves} at step 11 (stage 2, step 3)"
    assert said in capsys.readouterr().out
    assert_same_run(halves, whole)


@pytest.fixture
def start(tmp_path):
    """start(flags) runs train.py in a process and a group of its own."""
    script = tmp_path / "run.py"
    script.write_text(f"{STEADY_SCRIPT}\nimport kit.files\nimport train\n"
                      "kit.files.run_command(train.main)\n")
    threads = str(torch.get_num_threads())         # with as many, sums come in the same order
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}
    started = []

    def popen(flags):
        process = subprocess.Popen(
            [sys.executable, str(script), *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=environment, start_new_session=True)
        started.append(process)
        return process

    yield popen
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def wait_for_step(process, out, step):
    """Returns once the log of a running process has so many steps."""
    log = out / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < step:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.002)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_run_that_is_killed_goes_on_to_the_bit(workers, on_shards, undisturbed, tmp_path, start):
    """SIGKILL twice, at steps that no checkpoint holds, over an epoch's end."""
    out = tmp_path / "out"
    flags = [*on_shards, "--workers", str(workers), "--out", str(out)]
    for step in (6, 15):
        process = start(flags)
        wait_for_step(process, out, step)
        process.kill()
        process.communicate()
        assert newest_state(out) is not None
    last = start(flags)
    said, complaint = last.communicate()
    assert last.returncode == 0, complaint[-3000:]
    assert f"resuming {out} at step " in said
    assert_same_run(out, undisturbed)


def test_a_torn_last_line_of_the_log_does_not_block_a_resume(
        on_world, tmp_path, steady, monkeypatch):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    train_in(whole, on_world, "--save-every", "3")

    def die():
        with open(torn / "metrics.jsonl", "a") as log:
            log.write('{"step": 5, "stage": 1, "lo')
        raise Killed

    with monkeypatch.context() as patch:
        before_loss(patch, 5, die)
        with pytest.raises(Killed):
            train_in(torn, on_world, "--save-every", "3")
    train_in(torn, on_world, "--save-every", "3")
    assert_same_run(torn, whole)


# --- A run that gets notice -----------------------------------------------------------------------

def test_sigterm_saves_and_ends_well(on_world, tmp_path, steady, monkeypatch, capsys):
    def notify():
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        before_loss(patch, 5, notify)
        with pytest.raises(SystemExit) as ended:
            train_in(tmp_path, on_world)
    assert ended.value.code == 0
    words = f"stopped at step 5; the same command goes on (saved in {tmp_path})"
    assert words in capsys.readouterr().out
    assert newest_state(tmp_path).name == "state-00000005"
    assert (tmp_path / "curves.svg").exists()

    train_in(tmp_path, on_world)
    assert "at step 5" in capsys.readouterr().out
    assert steps_of(tmp_path) == list(range(1, 9))


def test_sigterm_while_a_stage_ends_is_not_lost(parts, tmp_path, steady, monkeypatch, capsys):
    """It comes in the preview after the stage's last step: the next stage must not begin."""
    def notify(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train, "preview", notify)
    train_in(tmp_path / "run", ["--size", "nano", "--device", "cpu", "--parts", str(parts),
                                "--steps", "2", "--preview-every", "2"])
    assert "stopped at step 2; the same command goes on" in capsys.readouterr().out
    assert steps_of(tmp_path / "run") == [1, 2]
    assert newest_state(tmp_path / "run").name == "state-00000002"


def test_sigterm_while_scenes_are_drawn_keeps_them_and_the_run_is_the_same_to_the_bit(
        parts, tmp_path, steady, monkeypatch, capsys):
    """Two steps need some of the 96 scenes; a run beside one that has them draws none."""
    flags = ["--size", "nano", "--device", "cpu", "--preview-every", "0", "--parts", str(parts),
             "--stage", "2", "--steps", "2"]
    whole, beside, halves = tmp_path / "a" / "whole", tmp_path / "a" / "2", tmp_path / "b" / "run"

    def drawn():
        return re.findall(r"drawing (\d+) scenes", capsys.readouterr().out)

    train_in(whole, flags)
    (count,) = map(int, drawn())
    assert count == read_json(newest_state(whole) / "notes.json")["progress"]["pictures"]
    train_in(beside, flags)
    assert not drawn()
    assert_same_run(beside, whole)

    def write_and_notify(*inputs):
        dataset_write(*inputs)
        signal.raise_signal(signal.SIGTERM)

    dataset_write = toy.dataset.write_piece
    with monkeypatch.context() as patch:
        patch.setattr(toy.dataset, "write_piece", write_and_notify)
        with pytest.raises(SystemExit) as ended:
            train_in(halves, flags)
    assert ended.value.code == 0
    said = capsys.readouterr().out
    kept = int(re.search(r"stopped: (\d+) of 96 scenes are drawn and kept", said)[1])
    assert 0 < kept < count
    assert newest_state(halves) is None

    train_in(halves, flags)
    assert drawn() == [str(count - kept)]
    assert_same_run(halves, whole)


def test_sigterm_to_a_whole_group_saves_and_the_run_goes_on_to_the_bit(
        on_shards, undisturbed, tmp_path, start):
    """A cluster sends it to every process: a worker that dies of it takes the trainer down."""
    out = tmp_path / "out"
    flags = [*on_shards, "--workers", "2", "--out", str(out)]
    process = start(flags)
    wait_for_step(process, out, 6)
    os.killpg(process.pid, signal.SIGTERM)
    said, complaint = process.communicate()
    assert process.returncode == 0, complaint[-3000:]
    assert f"stopped at step {steps_of(out)[-1]}; the same command goes on" in said
    assert newest_state(out).name == f"state-{steps_of(out)[-1]:08d}"

    last = start(flags)
    _, complaint = last.communicate()
    assert last.returncode == 0, complaint[-3000:]
    assert_same_run(out, undisturbed)


def notify_group_in(patch, module, call):
    """Has the call-th train_step of a run end with a SIGTERM to this process and to all that it has
    started: what a group gets, without the tests' own parents. It comes from outside: PyTorch's
    workers end quietly where the trainer itself sends it."""
    original, calls = module.train_step, itertools.count(1)

    def step(*inputs, **named):
        result = original(*inputs, **named)
        if next(calls) == call:
            workers = [str(worker.pid) for worker in multiprocessing.active_children()]
            assert workers
            subprocess.run(["kill", "-TERM", *workers, str(os.getpid())], check=True)
            time.sleep(0.3)                        # a worker that dies ends this run here
        return result

    patch.setattr(module, "train_step", step)


def test_sigterm_to_the_text_encoders_group_saves(tmp_path, monkeypatch, capsys):
    flags = ["--size", "nano", "--device", "cpu", "--steps", "6", "--out", str(tmp_path)]
    few = toy.language.toy_tokenizer(scenes=200)   # the real one takes seconds
    with monkeypatch.context() as patch:
        patch.setattr(toy.language, "toy_tokenizer", lambda: few)
        notify_group_in(patch, toy.language, 3)
        with pytest.raises(SystemExit) as ended:
            toy.language.main(flags)
    assert ended.value.code == 0
    assert "stopped at step 3; the same command goes on" in capsys.readouterr().out
    assert newest_state(tmp_path / "text").name == "state-00000003"


def test_sigterm_to_the_autoencoders_group_saves(tmp_path, monkeypatch, capsys):
    flags = ["--size", "nano", "--dtype", "fp32", "--steps", "6", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        notify_group_in(patch, toy.autoencoder, 3)
        toy.autoencoder.main(flags)
    assert "stopped at step 3; the same command goes on" in capsys.readouterr().out
    assert newest_state(tmp_path / "vae").name == "state-00000003"


# --- Killed while it saves ------------------------------------------------------------------------

# A child saves without end, each time numbers that all equal the step's, and is killed; what is
# there must be of one step. Then the disk is full.
SAVE_WITHOUT_END = STEADY_SCRIPT + """
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch

import lens
import train
from kit.checkpoint import load_transformer
from kit.files import LensError
from kit.run import Run
from kit.state import load_state, make_moments, named_tensors, newest_state

out, parts = Path(sys.argv[1]), sys.argv[2]
run, stage = Run(out), train.STAGES["nano", 2]
learner = train.make_learner(run, lens.build("nano"), stage)
output = train.Output(parts, None, None, guidance=3.0, settings={})
make_moments(learner.optimizers)


def tensors():
    return named_tensors(learner.groups(), learner.optimizers).values()


def save(step):
    for t in tensors():
        t.fill_(step)
    train.save(run, stage, learner, train.Progress(total=step), output, [])


def loaded_step():
    progress = load_state(run, learner.groups(), learner.optimizers, {})
    step = progress["total"]
    assert all((t == step).all() for t in tensors()), step
    return step


random.seed(0)
last, loaded = 0, 0
for _ in range(20):
    child = os.fork()
    if child == 0:
        for step in range(last + 1, last + 10_000):
            save(step)
    time.sleep(random.uniform(0.05, 0.4))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

    if newest_state(out):
        step = loaded_step()
        assert step >= last, (step, last)
        last, loaded = step, loaded + 1
    if (out / "model_index.json").exists():
        weights = load_transformer(out).state_dict()
        learnt = torch.cat([weights[name].flatten() for name in learner.averaged()])
        assert len(learnt.unique()) == 1
print("loaded", loaded)
print("last", last)

limit = 100_000                                    # bytes: no file can be longer
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    save(last + 1)
except LensError as error:
    print("error", error)
print("still", loaded_step())
"""


def test_killed_while_saving_twenty_times_the_newest_state_is_whole(parts, tmp_path):
    script = tmp_path / "save.py"
    script.write_text(SAVE_WITHOUT_END)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out"), str(parts)], capture_output=True,
        text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert int(said["loaded"]) >= 15
    assert int(said["last"]) >= 5
    # A full disk is one line, and the state before it stays.
    assert said["error"].startswith("cannot write")
    assert said["still"] == said["last"]


def test_a_run_that_is_killed_in_its_last_save_still_gets_its_last_weights(
        on_world, tmp_path, steady, monkeypatch):
    """After the first of its two parts, state and weights. Once the state came first: the run was
    done then, and the weights stayed those of the save before."""
    flags = [*on_world, "--save-every", "3"]       # saves after steps 3, 6 and 8
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train_in(whole, flags)

    parts_saved = itertools.count(1)

    def dies_after_its_fifth(save):
        def part(*inputs, **named):
            save(*inputs, **named)
            if next(parts_saved) == 5:
                raise Killed
        return part

    with monkeypatch.context() as patch:
        for name in ("save_state", "save_pipeline"):
            patch.setattr(train, name, dies_after_its_fifth(getattr(train, name)))
        with pytest.raises(Killed):
            train_in(halves, flags)
    assert steps_of(halves)[-1] == 8
    train_in(halves, flags)
    assert_same_run(halves, whole)


# --- What may not go on in the same folder --------------------------------------------------------

@pytest.mark.parametrize("change, words", [
    (["--seed", "7"], "--seed 0, not 7"),
    (["--init", "{toy}"], "--init None, not {toy}"),
    (["--init", "{toy}", "--lora", "4"], "--lora 0, not 4"),
    (["--size", "toy", "--batch", "2,2,2"], "--size nano, not toy"),
    (["--parts", "{toy}"], "not {toy}"),
])
def test_another_run_in_the_same_folder_is_one_clear_line(
        change, words, on_shards, finished, capsys, monkeypatch):
    def load(*_, **__):
        pytest.fail("models were loaded before the mistake was found")

    monkeypatch.setattr(train, "load_pipeline", load)
    toy = str(ROOT / "weights" / "toy")
    change = [word.replace("{toy}", toy) for word in change]
    before = (finished / "metrics.jsonl").read_text()
    line = error_line(train.main, [*on_shards, *change, "--out", str(finished)], capsys)
    assert f"{finished} holds another run" in line
    assert words.replace("{toy}", toy) in line
    assert (finished / "metrics.jsonl").read_text() == before


def test_the_toy_world_does_not_go_on_with_shards(on_shards, on_world, finished, capsys):
    line = error_line(train.main, [*on_world, "--out", str(finished)], capsys)
    assert "--data shards, not the toy world" in line


@pytest.fixture
def folder_of_weights(tmp_path):
    save_pipeline(tmp_path / "whole", lens.build("nano"))
    return tmp_path / "whole"


@pytest.fixture
def folder_of_an_adapter(tmp_path):
    model = lens.build("nano")
    add_lora(model, 2, 2)
    save_lora(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_not_trained_into_a_folder_of_whole_weights(
        on_world, folder_of_weights, capsys):
    """Who loads the folder would get both."""
    flags = [*on_world, "--lora", "4", "--init", str(folder_of_weights)]
    line = error_line(train.main, [*flags, "--out", str(folder_of_weights)], capsys)
    assert f"{folder_of_weights} holds a whole checkpoint" in line
    assert not (folder_of_weights / "adapter_model.safetensors").exists()


def test_whole_weights_are_not_trained_into_a_folder_of_an_adapter(
        on_world, folder_of_an_adapter, capsys):
    line = error_line(train.main, [*on_world, "--out", str(folder_of_an_adapter)], capsys)
    assert f"{folder_of_an_adapter} holds an adapter" in line
    assert not (folder_of_an_adapter / "transformer").exists()


# --- Shards ---------------------------------------------------------------------------------------

def other_shards(flags, pattern):
    """The flags with the other pattern after --data."""
    k = flags.index("--data")
    return [*flags[:k], "--data", pattern, *flags[k + 2:]]


def test_other_shards_are_refused(on_shards, finished, tmp_path, steady):
    flags = other_shards(on_shards, make_shards(tmp_path / "other", 24, seed=9))
    with pytest.raises(LensError, match="not those that the run"):
        train_in(finished, flags, "--steps", "30", "--workers", "0")


def test_spoilt_samples_are_replaced_named_and_counted(on_shards, tmp_path, steady, capsys):
    """24 samples in batches of 5 and 3: six steps are an epoch and a bit."""
    pattern = make_shards(tmp_path / "other", 24, seed=9)
    spoil(data.Shards(pattern, data.buckets(64) + data.buckets(96)), 3)
    train_in(tmp_path / "run", other_shards(on_shards, pattern), "--steps", "6", "--workers", "1")
    assert rows(tmp_path / "run")[-1]["replaced"] >= 1
    assert "sample 3: broken picture" in capsys.readouterr().err


def test_the_count_of_spoilt_samples_goes_on_with_the_run(on_shards, finished, shards, steady):
    """One in a hundred may be, and a hundred more: over the whole run, not since its last start."""
    notes = newest_state(finished) / "notes.json"
    kept = read_json(notes)
    kept["progress"]["replaced"] = 101 + round(0.01 * kept["progress"]["pictures"])
    write_json(notes, kept)
    with pytest.raises(LensError, match="more than one in a hundred"):
        train_in(finished, on_shards, "--steps", "30", "--workers", "0")


@pytest.fixture(scope="module")
def on_latents(on_shards, shards, parts, tmp_path_factory):
    """Flags of a run on the same shards, encoded once."""
    out = tmp_path_factory.mktemp("latents")
    data.main(["cache", "--data", shards, "--bases", "64,96", "--weights", str(parts),
               "--out", str(out)])
    return other_shards(on_shards, str(out / "*.tar"))


def test_cached_latents_train_as_pictures_do(on_latents, tmp_path, steady):
    """The same samples in the same order, but for the crop."""
    train_in(tmp_path, on_latents, "--workers", "0")
    assert steps_of(tmp_path) == list(range(1, 25))
    assert np.isfinite([row["loss"] for row in rows(tmp_path)]).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_latents_of_another_autoencoder_end_the_process(workers, on_latents, tmp_path, start):
    """With what a worker found. One that ignores SIGTERM was once waited for without end."""
    toy = ["--size", "toy", "--batch", "2,2,2", "--parts", str(ROOT / "weights" / "toy")]
    process = start([*on_latents, *toy, "--workers", str(workers), "--out", str(tmp_path / "out")])
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 2
    assert complaint.count("error: ") == 1
    assert "holds latents of another autoencoder" in complaint
    assert "Traceback" not in complaint


# --- Adapters -------------------------------------------------------------------------------------

def test_lora_trains_an_adapter_and_nothing_else_and_goes_on_to_the_bit(
        on_shards, undisturbed, tmp_path, steady, monkeypatch):
    flags = [*on_shards, "--init", str(undisturbed), "--lora", "4", "--steps", "6",
             "--workers", "0"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train_in(whole, flags)
    base = load_transformer(undisturbed)
    tuned = copy.deepcopy(base)
    assert merge_lora(tuned, whole) > 4
    before, after = base.state_dict(), tuned.state_dict()
    changed = [name for name, w in before.items() if not torch.equal(w, after[name])]
    assert changed
    assert all(name.endswith("weight") for name in changed)
    assert not (whole / "transformer").exists()

    # The state holds no copy of the base: it has the adapter four times.
    kept = sum(file.stat().st_size for file in newest_state(whole).rglob("*") if file.is_file())
    assert kept < 4 * sum(4 * w.numel() for w in before.values())

    def die():
        raise Killed

    with monkeypatch.context() as patch:
        before_loss(patch, 6, die)                 # the state is of step 4
        with pytest.raises(Killed):
            train_in(halves, flags)
    train_in(halves, flags)
    assert untimed_rows(halves) == untimed_rows(whole)
    again = copy.deepcopy(base)
    merge_lora(again, halves)
    for name, w in again.state_dict().items():
        assert torch.equal(w, after[name]), name


def test_the_state_of_a_run_says_what_it_is(undisturbed, parts):
    notes = json.loads((newest_state(undisturbed) / "notes.json").read_text())
    assert notes["settings"] == {
        "--size": "nano", "--seed": 0, "--init": None, "--lora": 0, "--data": "shards",
        "--base-dtype": None, "--parts": str(parts)}
    assert notes["progress"]["total"] == 24
    assert notes["progress"]["attention"] == "flash"
    assert not notes["progress"]["bf16"]
