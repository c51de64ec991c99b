"""kit/files.py and kit/run.py: errors in one line, files that are never half written, and what
every run needs."""
import argparse
import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, error_line, random_model, rows
from torch.distributed.checkpoint import CheckpointException

import distill
import kit.run
import lens
import rl
import sample
import toy.autoencoder
import toy.language
import train
from kit.files import (
    LensError,
    Parser,
    check_writable,
    did_you_mean,
    error_context,
    file_hash,
    first_few,
    not_negative,
    open_safetensors,
    positive,
    read_json,
    read_json_lines,
    read_text,
    replace_file,
    require,
    run_command,
    seed_number,
    utf8_text,
    write_json,
    write_json_lines,
    write_safetensors,
    write_text,
)
from kit.run import (
    KERNELS,
    Log,
    Notice,
    Run,
    average_decay,
    choose,
    compile_blocks,
    curves,
    follow,
    generator,
    learning_rate_factor,
    make_loader,
    matmul_peak,
    pick_attention,
    pick_device,
    pick_dtype,
    race,
    rank_zero_first,
    running_mean,
    same_everywhere,
    start_run,
    usable_cores,
    use_attention,
)
from kit.state import checkpoint_errors, load_state, save_state
from tools import strip

# --- Errors ---------------------------------------------------------------------------------------

def test_require_raises_unless_all_is_well():
    require(True, "never seen")
    with pytest.raises(LensError, match="^too small$"):
        require(False, "too small")


def test_an_error_of_a_library_begins_with_what_we_were_doing():
    with pytest.raises(LensError) as error:
        with error_context("cannot count"):
            int("many\nlines")
    assert str(error.value).startswith("cannot count: invalid literal for int()")
    assert "\n" not in str(error.value)

    with pytest.raises(LensError, match="^cannot look: KeyError$"):
        with error_context("cannot look"):
            raise KeyError
    with pytest.raises(LensError, match="^cannot look: 'prompt' is missing$"):
        with error_context("cannot look"):
            raise KeyError("prompt")
    with pytest.raises(LensError, match="^cannot read /none: no such file or directory$"):
        with error_context("cannot read /none"):
            open("/none")
    with pytest.raises(LensError, match="^cannot count: .*No such file or directory: '/none'$"):
        with error_context("cannot count"):
            open("/none")
    with pytest.raises(LensError, match="^told already$"):
        with error_context("cannot do more"):
            raise LensError("told already")
    with pytest.raises(KeyboardInterrupt):                        # not an error of what is done
        with error_context("cannot wait"):
            raise KeyboardInterrupt


def test_a_long_list_is_cut():
    assert first_few({"b", "a"}) == "a, b"
    assert first_few("gfedcba") == "a, b, c, d and 3 more"


def failing(error):
    def main():
        raise error

    return main


def exit_of(main):
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    return ended.value.code


def test_a_users_mistake_is_one_line_and_exit_code_2(capsys):
    assert exit_of(failing(LensError("no such size"))) == 2
    assert capsys.readouterr().err == "error: no such size\n"
    assert exit_of(failing(torch.OutOfMemoryError("CUDA out of memory"))) == 2
    assert capsys.readouterr().err == "error: CUDA out of memory\n"
    assert exit_of(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "stopped\n"
    with pytest.raises(ZeroDivisionError):                        # our mistake: with its trace
        run_command(failing(ZeroDivisionError()))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_terminal_that_is_not_utf8_gets_what_it_can_show(name, encoding, monkeypatch):
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding)
    monkeypatch.setattr(sys, name, stream)
    run_command(lambda: print("out/赤い丸-0.png", file=stream, flush=True))
    assert written.getvalue() == rb"out/\u8d64\u3044\u4e38-0.png" + b"\n"


# --- Command lines --------------------------------------------------------------------------------

DOC = """What it does.

    python x.py --steps 4       # a command
    not a command
    torchrun --nproc-per-node 2 x.py
"""


def a_parser():
    parser = Parser("Does something.", DOC)
    parser.add_argument("--steps", type=positive)
    parser.add_argument("--seed", type=not_negative, default=0)
    return parser


def test_a_parser_parses_and_its_help_ends_with_the_commands(capsys):
    args = a_parser().parse_args(["--steps", "1"])
    assert (args.steps, args.seed) == (1, 0)
    with pytest.raises(SystemExit) as ended:
        a_parser().parse_args(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Does something." in lines
    assert lines[-2:] == ["    python x.py --steps 4       # a command",
                          "    torchrun --nproc-per-node 2 x.py"]
    assert isinstance(a_parser(), argparse.ArgumentParser)


@pytest.mark.parametrize("argv, said", [
    (["--steps", "0"], "--steps: must be at least 1"),
    (["--steps", "-3"], "--steps: must be at least 1"),
    (["--steps", "many"], "--steps: must be a whole number, not 'many'"),
    (["--steps", "1.5"], "--steps: must be a whole number, not '1.5'"),
    (["--seed", "-1"], "--seed: must be at least 0"),
    (["--sead", "1"], "there is no option --sead; did you mean --seed?"),
    (["--steps"], "--steps: expected one argument"),
])
def test_a_parsers_errors_are_ours(argv, said):
    with pytest.raises(LensError, match=said):
        a_parser().parse_args(argv)


def test_a_seed_is_one_that_torch_numpy_and_servers_take():
    for number in (0, 7, 2**32, 2**63 - 1):
        assert seed_number(str(number)) == number
        np.random.default_rng((number, 0))
        first_draw(number)
        torch.Generator().manual_seed(number + 10_000)                # of a later picture


COMMANDS = [sample, train, rl, distill, toy.autoencoder, toy.language, strip]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda module: module.__name__)
@pytest.mark.parametrize("number, said", [
    ("-1", "--seed: must be from 0 to 2^63 - 1"),
    (str(2**63), "--seed: must be from 0 to 2^63 - 1"),
    ("9" * 30, "--seed: must be from 0 to 2^63 - 1"),
    ("1.5", "--seed: must be a whole number, not '1.5'"),
])
def test_every_command_refuses_a_seed_that_is_none(command, number, said, tmp_path, capsys):
    line = error_line(command.main, ["--out", str(tmp_path), "--seed", number], capsys)
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_every_command_with_a_seed_is_in_that_list():
    with_a_seed = {str(path.relative_to(ROOT)) for folder in (".", "toy", "tools")
                   for path in (ROOT / folder).glob("*.py") if '"--seed", ' in path.read_text()}
    assert with_a_seed == {f"{module.__name__.replace('.', '/')}.py" for module in COMMANDS}


def test_text_that_no_file_takes_is_refused():
    parser = Parser("Does something.")
    parser.add_argument("--prompt", type=utf8_text)
    assert parser.parse_args(["--prompt", "赤い丸"]).prompt == "赤い丸"
    with pytest.raises(LensError, match="--prompt: must be text in UTF-8"):
        parser.parse_args(["--prompt", "k\udcfchn"])              # "kühn" in Latin-1


# --- Files ----------------------------------------------------------------------------------------

def test_replacing_a_file_makes_its_folders_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "one")
    write_text(path, "zwei, drü")
    assert read_text(path) == "zwei, drü"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_a_full_disk_keeps_the_previous_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel refuses longer files, as a full disk would.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(LensError, match=f"cannot write {path}"):
            write_text(path, "x" * 20_000)
        with pytest.raises(LensError, match="cannot write"):
            write_safetensors(tmp_path / "w.safetensors", {"w": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_text(path) == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("odd"), KeyboardInterrupt()])
def test_what_stops_the_writing_keeps_the_previous_file(tmp_path, error):
    path = tmp_path / "a.txt"
    write_text(path, "before")

    def half(beside):
        beside.write_text("aft")
        raise error

    with pytest.raises((LensError, KeyboardInterrupt)):
        replace_file(path, half)
    assert read_text(path) == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_link_whose_target_is_gone_is_not_meant_by_itself(tmp_path):
    (tmp_path / "a.png").symlink_to("gone.png")
    (tmp_path / "b.png").touch()
    assert did_you_mean(tmp_path / "a.png") == f"; did you mean {tmp_path / 'b.png'}?"


def test_a_folder_is_tried_before_the_work(tmp_path):
    check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(LensError, match="cannot write"):
        check_writable(tmp_path / "file" / "folder")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "torn.json").write_text('{"a": 1')
    for read, name in ((read_text, "none.txt"), (read_text, "binary.txt"),
                       (read_json, "none.json"), (read_json, "torn.json"),
                       (open_safetensors, "torn.json")):
        with pytest.raises(LensError, match=f"cannot read {tmp_path / name}"):
            read(tmp_path / name)


def test_json_comes_back(tmp_path):
    data = {"a": [1, 2.5, None], "b": {"c": "drü"}}
    write_json(tmp_path / "a.json", data)
    assert read_json(tmp_path / "a.json") == data
    lines = [data, {}, {"x": 1}]
    write_json_lines(tmp_path / "a.jsonl", lines)
    assert read_json_lines(tmp_path / "a.jsonl") == lines
    assert read_json_lines(tmp_path / "none.jsonl") == []


def test_a_torn_line_is_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n{"st')
    assert read_json_lines(path) == [{"step": 1}, {"step": 3}]


def test_tensors_and_notes_come_back(tmp_path):
    strided = torch.arange(6.0).view(2, 3).T
    write_safetensors(tmp_path / "a.safetensors", {"w": strided.requires_grad_()}, {"seed": 3})
    with open_safetensors(tmp_path / "a.safetensors") as f:
        assert torch.equal(f.get_tensor("w"), strided)
        assert f.metadata() == {"seed": "3"}


def test_a_hash_is_of_the_content(tmp_path):
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(text)
    assert file_hash(tmp_path / "a") == file_hash(tmp_path / "b") != file_hash(tmp_path / "c")
    assert len(file_hash(tmp_path / "a")) == 16


# --- The run --------------------------------------------------------------------------------------

def test_a_run_of_one_process(tmp_path, capsys):
    run = start_run(tmp_path / "run", seed=3, device="cpu")
    assert run == Run(tmp_path / "run", seed=3, device="cpu")
    assert run.out.is_dir()
    run.say("hello")
    Run(run.out, rank=1, ranks=2).say("not heard")
    assert capsys.readouterr().out == "hello\n"

    x = torch.ones(2)
    assert run.sum_over_ranks(x) is x
    assert run.move(x).device.type == "cpu"
    assert same_everywhere("value") == "value"
    with rank_zero_first(run):
        pass


def test_autocast_is_bf16_where_the_run_chose_it(tmp_path):
    a = torch.ones(2, 2)
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        with Run(tmp_path, bf16=bf16).autocast():
            assert (a @ a).dtype == dtype


def test_a_run_whose_folder_takes_nothing_ends_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LensError, match="cannot write"):
        start_run(tmp_path / "file" / "run", device="cpu")


TWO_RANKS = """
import sys
from pathlib import Path
import torch
from kit.run import gathered, rank_zero_first, same_everywhere, start_run

run = start_run(sys.argv[1], seed=1, device="cpu")
total = run.sum_over_ranks(torch.tensor([1.0 + run.rank]))
assert total.item() == 3
assert gathered(run.rank * 10) == [0, 10]
assert same_everywhere(run.rank + 7) == 7
made = Path(sys.argv[1]) / "made"
with rank_zero_first(run):
    if run.rank == 0:
        made.write_text("by rank 0")
    assert made.read_text() == "by rank 0"
run.say(f"ranks: {run.ranks}")
torch.distributed.destroy_process_group()
"""


def test_two_processes_agree(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", str(script), str(tmp_path / "run")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ranks: 2") == 1                     # rank 0 alone talks


def test_notice_of_sigterm():
    notice = Notice()
    assert not notice.given
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.given


def test_ctrl_c_asks_for_an_end_and_then_ends(capfd):
    notice = Notice()
    os.kill(os.getpid(), signal.SIGINT)
    assert notice.given
    assert "Ctrl-C again stops at once" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


# Takes the folder, says so, and waits.
HOLDER = """
import sys, time
from kit.run import start_run
start_run(sys.argv[1])
print("at work", flush=True)
time.sleep(60)
"""


def test_a_folder_takes_one_run_at_a_time_and_a_crash_frees_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == "at work\n"
        with pytest.raises(LensError, match="another run is at work there; wait for it, or give"):
            start_run(tmp_path)
        start_run(tmp_path / "other")
    finally:
        holder.kill()
        holder.wait()
    start_run(tmp_path)
    start_run(tmp_path)                            # this process has it already


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, k):
        return k


def test_no_worker_of_a_loader_dies_of_sigterm():
    """It goes to every process of a group. They come in order, and none is missing."""
    batches = iter(make_loader(Numbers(), range(40), workers=2, prefetch=2))
    numbers = [next(batches), next(batches)]
    workers = [str(worker.pid) for worker in multiprocessing.active_children()]
    assert len(workers) == 2
    subprocess.run(["kill", "-TERM", *workers], check=True)
    numbers += list(batches)
    assert numbers == list(range(40))
    assert list(make_loader(Numbers(), [3, 1], workers=0)) == [3, 1]


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5}, raising=False)
    assert usable_cores() == 1
    assert train.arguments([]).workers == 1
    monkeypatch.delattr(os, "sched_getaffinity")                  # as on a Mac
    assert usable_cores() == 64
    assert train.arguments([]).workers == 4


# --- Random numbers, learning rate, averages ------------------------------------------------------

def first_draw(*key):
    return torch.rand(1, generator=generator(*key), dtype=torch.float64).item()


def test_a_generator_is_a_function_of_its_key():
    assert first_draw(3, 1, 4) == first_draw(3, 1, 4)
    assert first_draw(np.int64(3), 1) == first_draw(3, 1)
    keys = [(a, b, c) for a in range(4) for b in range(4) for c in range(4)]
    assert len({first_draw(*key) for key in keys}) == 64
    state = torch.get_rng_state()
    first_draw(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("key", [(-1,), (3, -1), (-3, 1)])
def test_a_negative_number_is_no_other_streams_key(key):
    """-1 and 1 once gave the same draws."""
    with pytest.raises(LensError, match="no number may be negative"):
        generator(*key)


def test_a_generators_first_numbers_stay_what_they_were():
    """What the shipped weights were trained on hangs on them."""
    drawn = torch.rand(3, generator=generator(0, 1, 2))
    expected = torch.tensor([0.0109328, 0.2176456, 0.4115266])
    torch.testing.assert_close(drawn, expected, atol=1e-6, rtol=0)


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    def at(step, decay=0.5):
        return learning_rate_factor(step, steps=100, warmup=10, decay=decay)

    assert at(0) == pytest.approx(0.1)
    assert at(4) == pytest.approx(0.5)
    assert at(9) == at(10) == at(50) == 1
    assert at(75) == pytest.approx(0.5)
    assert at(99) == pytest.approx(0.02)
    assert at(100) == 0
    assert at(95, decay=0.1) == pytest.approx(0.5)
    assert at(90, decay=0.1) == 1
    factors = [at(step) for step in range(101)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert learning_rate_factor(99, steps=100, warmup=1, decay=0.0) == 1      # no fall at all


def test_an_average_soon_forgets_its_start():
    assert average_decay(0, 0.999) == pytest.approx(0.1)
    assert average_decay(90, 0.999) == pytest.approx(0.91)
    assert average_decay(10**6, 0.999) == 0.999
    left = np.prod([average_decay(step, 0.999) for step in range(100)])
    assert left < 1e-12                            # of the first weights, after 100 steps


def test_one_tensor_follows_another():
    behind, ahead = [torch.zeros(2), torch.ones(3)], [torch.ones(2), torch.full((3,), 3.0)]
    follow(behind, ahead, 0.25)
    assert torch.equal(behind[0], torch.full((2,), 0.25))
    assert torch.equal(behind[1], torch.full((3,), 1.5))
    assert torch.equal(ahead[0], torch.ones(2))


# --- What a clock decides -------------------------------------------------------------------------

def test_a_race_takes_turns_and_leaves_the_first_run_out():
    order = []
    pauses = iter([0.05, 0, 0, 0])

    def a():
        order.append("a")
        time.sleep(next(pauses))

    def b():
        order.append("b")
        return 7

    seconds = race({"a": a, "b": b}, 3, "cpu")
    assert order == ["a", "b"] * 4
    first, median, _ = seconds["a"]
    assert first >= 0.05 > 10 * median
    assert seconds["b"][2] == 7


def test_a_device_is_checked():
    assert pick_device("cpu") == "cpu"
    assert pick_device() == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(LensError, match="--device abacus: not a device"):
        pick_device("abacus")
    assert pick_device("cpu:0") == "cpu"           # all else asks whether it is "cpu"


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "mps:0"])
def test_a_device_of_another_kind_is_one_line(name):
    with pytest.raises(LensError, match=f"--device {name}: this code runs on cpu and cuda alone"):
        pick_device(name)


def test_a_gpu_beyond_those_that_are_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda") == "cuda"
    assert pick_device("cuda:1") == "cuda:1"
    with pytest.raises(LensError, match="--device cuda:2: there are 2 CUDA devices here"):
        pick_device("cuda:2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(LensError, match="no CUDA device was found"):
        pick_device("cuda:1")


def test_a_precision_is_as_asked_or_measured(monkeypatch):
    assert pick_dtype("cpu", "bf16")[0] == torch.bfloat16
    assert pick_dtype("cpu", "fp32")[0] == torch.float32
    assert pick_dtype("cuda")[0] == torch.bfloat16 or torch.cuda.is_available()

    def pretend(ratio):
        def race(runners, rounds, device):
            seconds = {torch.float32: ratio, torch.bfloat16: 1.0}
            return {dtype: (0, seconds[dtype], runners[dtype]()) for dtype in runners}

        monkeypatch.setattr(kit.run, "race", race)

    for ratio, dtype in ((0.5, torch.float32), (1.4, torch.float32), (1.6, torch.bfloat16)):
        pretend(ratio)
        chosen, why = pick_dtype("cpu")
        assert chosen == dtype
        assert f"{ratio:.1f}x" in why


@pytest.mark.parametrize("capability, dtype, why", [
    ((7, 5), torch.float32, "this GPU has no bf16 in hardware"),      # T4
    ((6, 1), torch.float32, "this GPU has no bf16 in hardware"),
    ((8, 0), torch.bfloat16, "the GPU's fast type"),                  # A100
    ((9, 0), torch.bfloat16, "the GPU's fast type"),
])
def test_a_gpu_computes_in_bf16_where_its_hardware_does(capability, dtype, why, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)     # by emulation
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_dtype("cuda") == (dtype, why)
    assert pick_dtype("cuda", "bf16")[0] == torch.bfloat16            # as asked


def test_that_blocks_are_compiled_is_told_once(capsys, monkeypatch):
    monkeypatch.setattr(kit.run, "why_not_compiled", lambda device: None)
    kit.run.say_that_it_compiles.cache_clear()
    for _ in range(2):
        assert compile_blocks(random_model())      # each block when it first runs: not here
    kit.run.say_that_it_compiles.cache_clear()
    assert capsys.readouterr().err == (
        "compiling the blocks: what runs first takes about a minute longer\n")


def test_without_a_compiler_all_goes_on_uncompiled(capsys):
    """With the error of PyTorch's own search for one."""
    model = random_model()
    kit.run.why_not_compiled.cache_clear()
    torch._dynamo.reset()                          # or an earlier trial's program would be taken
    try:
        with torch._inductor.config.patch("cpp.cxx", (None, "/no/such/compiler")):
            assert compile_blocks(model) is False
            assert compile_blocks(model, fullgraph=False) is False
    finally:
        kit.run.why_not_compiled.cache_clear()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].startswith("note: --compile: going on without")
    assert "No working C++ compiler found" in said[0]
    assert all(block._compiled_call_impl is None for block in model.transformer_blocks)
    assert not model.records_graphs


ON_CPU = ("flash", "math")                         # the kernels that a CPU has


@torch.no_grad()
def test_every_attention_kernel_gives_the_same():
    model = random_model()
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    velocities = {}
    for kernel in (None, *ON_CPU):
        use_attention(kernel)
        velocities[kernel] = model(x, torch.tensor([0.3, 0.7]), None, None, (3, 4))
    for kernel in ON_CPU:
        torch.testing.assert_close(velocities[kernel], velocities[None], atol=1e-5, rtol=1e-4)
    # Else both were the same kernel.
    assert not torch.equal(velocities["flash"], velocities["math"])


@pytest.mark.parametrize("slow, best", [("math", "flash"), ("flash", "math"), (None, "flash")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fastest_attention_is_picked(slow, best, dtype, monkeypatch):
    """The times are the machine's, so they are made up here; what is made of them is ours."""
    ran = []

    def race(runners, rounds, device):
        for run in runners.values():
            run()
        ran.extend(runners)
        return {name: (0, 3.0 if name == slow else 1.0, None) for name in runners}

    monkeypatch.setattr(kit.run, "race", race)
    kit.run.fastest_attention.cache_clear()
    config = lens.SIZES["nano"].transformer
    try:
        kernel, why = pick_attention("cpu", dtype, config, 60, learns=True)
    finally:
        kit.run.fastest_attention.cache_clear()
    assert kernel == best
    assert set(ran) == set(ON_CPU)
    assert all(f"{name} " in why for name in ran)
    # PyTorch's own choice is back.
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


def test_forwards_on_a_cpu_need_no_race(monkeypatch):
    monkeypatch.setattr(kit.run, "race", None)
    kernel, _ = pick_attention("cpu", torch.float32, lens.SIZES["nano"].transformer, 60)
    assert kernel == "flash"


def test_a_chosen_kernel_keeps_the_others_behind_it():
    """A mask or a wide head needs them: flash attention cannot do every shape."""
    use_attention(list(KERNELS)[0])
    assert torch.backends.cuda.math_sdp_enabled()
    use_attention("math")
    assert not torch.backends.cuda.flash_sdp_enabled()
    use_attention()
    assert torch.backends.cuda.flash_sdp_enabled()
    q = torch.randn(1, 2, 5, 8)
    assert F.scaled_dot_product_attention(q, q, q).shape == q.shape


def test_a_resumed_run_keeps_its_precision_and_attention(tmp_path, monkeypatch):
    config = lens.SIZES["nano"].transformer
    monkeypatch.setattr(kit.run, "fastest_dtype", lambda *_: (torch.bfloat16, "made up"))
    monkeypatch.setattr(kit.run, "fastest_attention", lambda *_: ("math", "made up too"))
    run = Run(tmp_path)
    line = choose(run, config, 60)
    assert (run.bf16, run.attention) == (True, "math")
    assert line == "bf16 compute (made up); math attention (made up too)"
    line = choose(run, config, 60, kept={"bf16": False, "attention": "flash"})
    assert (run.bf16, run.attention) == (False, "flash")
    assert line == "fp32 compute (as this run began); flash attention (as this run began)"


def test_the_peak_of_matrix_products_is_a_speed():
    assert 1e8 < matmul_peak("cpu", torch.float32) < 1e15


# --- The log and its curves -----------------------------------------------------------------------

def test_a_log_is_a_line_a_step_and_a_resume_drops_what_came_after(tmp_path):
    run = Run(tmp_path)
    log = Log(run, 0)
    for step in range(1, 6):
        log(step=step, loss=1 / step)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]

    resumed = Log(run, 3)
    resumed(step=4, loss=0.9)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert rows(tmp_path)[-1]["loss"] == 0.9


def test_what_is_not_finite_is_null_in_the_log(tmp_path):
    """JSON has neither NaN nor infinity, though Python writes both."""
    log = Log(Run(tmp_path), 0)
    log(step=1, loss=float("nan"), grad_norm=float("inf"), size="64x64")
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": null, "grad_norm": null, "size": "64x64"}\n'


def test_a_state_from_before_the_first_sound_step_is_resumed(tmp_path):
    """Its optimiser has no moments yet: none may be asked of the file."""
    def learner():
        p = torch.nn.Parameter(torch.zeros(2))
        return {"model": {"p": p}}, [torch.optim.AdamW([p])]

    run = Run(tmp_path)
    groups, optimizers = learner()
    with torch.no_grad():
        groups["model"]["p"].fill_(3.0)
    save_state(run, 1, groups, optimizers, settings={}, progress={"step": 1})
    groups, optimizers = learner()
    assert load_state(run, groups, optimizers, settings={}) == {"step": 1}
    assert groups["model"]["p"].tolist() == [3.0, 3.0]


def test_an_error_without_words_is_named_by_its_kind():
    with pytest.raises(LensError, match="cannot write here: AssertionError"):
        with checkpoint_errors("cannot write here"):
            raise CheckpointException("failed", {0: (AssertionError(), None)})


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4, "loss": 1.0}', "\0" * 40])
def test_a_torn_last_line_does_not_block_a_resume(tmp_path, torn):
    """A kill or a full disk in the middle of a line; a crashed machine leaves zeros."""
    log = Log(Run(tmp_path), 0)
    for step in (1, 2, 3):
        log(step=step, loss=1 / step)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write(torn)

    resumed = Log(Run(tmp_path), 3)
    resumed(step=4, loss=0.25)
    resumed.draw()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert rows(tmp_path)[-1] == {"step": 4, "loss": 0.25}
    assert (tmp_path / "curves.svg").exists()


def test_other_ranks_write_nothing(tmp_path):
    log = Log(Run(tmp_path, rank=1, ranks=2), 0)
    log(step=1, loss=1.0)
    log.draw()
    assert list(tmp_path.iterdir()) == []


SVG = "{http://www.w3.org/2000/svg}"


def panels_of(drawing):
    """The labels and the lines of a drawing, which must be well-formed XML."""
    root = ElementTree.fromstring(drawing)
    assert root.tag == f"{SVG}svg"
    lines = []
    for line in root.iter(f"{SVG}polyline"):
        points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        lines.append(points)
    return ["".join(label.itertext()) for label in root.iter(f"{SVG}text")], lines


def test_curves_show_each_name_that_has_two_numbers():
    log = [{"step": step, "loss": 1 / step, "lr": 0.1, "words": "many"} for step in range(1, 11)]
    log[3]["reward"] = 0.5                         # once: no curve
    labels, lines = panels_of(curves(log))
    assert labels == ["loss: 0.1 at step 10 (from 0.1 to 1)",
                      "learning rate: 0.1 at step 10 (from 0.1 to 0.1)"]
    assert len(lines) == 4                         # the values and their mean, of two panels
    values = lines[0]
    assert len(values) == 10
    assert values[0] == (10, 25)                   # the highest value at the top left
    assert values[-1] == (650, 145)                # the lowest at the bottom right
    assert [x for x, _ in values] == sorted(x for x, _ in values)
    assert all(0 <= y <= 330 for line in lines for _, y in line)


def test_curves_draw_a_line_for_each_noise_level():
    """On one scale; where no sample fell into a quarter there is no point."""
    log = [{"step": step, "loss_by_t": [0.1, 0.2, None, 0.4]} for step in (1, 2, 3)]
    log[1]["loss_by_t"] = [0.1, 0.2, 0.3, None]
    labels, lines = panels_of(curves(log))
    assert labels == ["loss by quarters of t, data to noise: "
                      "0.1, 0.2, 0.4 at step 3 (from 0.1 to 0.4)"]
    low, second, high = lines[:3]                  # the third quarter has one number: no line
    assert [y for _, y in low] == [145, 145, 145]  # at the bottom
    assert [x for x, _ in high] == [10, 650]
    assert [y for _, y in high] == [25, 25]
    assert low[0][1] > second[0][1] > high[0][1]


def test_the_mean_of_a_curve_does_not_lag():
    assert running_mean(np.arange(50.0))[10:40] == pytest.approx(np.arange(10, 40))
    assert running_mean(np.array([1.0, 3.0])) == pytest.approx([2, 2])


def test_a_spike_does_not_flatten_a_curve():
    log = [{"step": step, "loss": 0.1 + 0.1 * (step % 2)} for step in range(1000)]
    log[0]["loss"] = 1e6
    labels, lines = panels_of(curves(log))
    assert labels[0].endswith("(from 0.1 to 0.2)")
    heights = [y for _, y in lines[0]]
    assert min(heights) == 25                               # the spike is at the edge
    assert heights.count(145) > 200                         # 0.1, at the bottom


def test_curves_of_strange_numbers_are_well_formed():
    log = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 3.0},
           {"step": 3, "loss": float("inf")}, {"step": 4, "loss": -1e30}, {"step": 5, "loss": None}]
    labels, lines = panels_of(curves(log))
    assert len(labels) == 1
    assert len(lines[0]) == 2
    assert panels_of(curves([])) == ([], [])
    assert panels_of(curves([{"step": 1, "loss": 2.0}] * 2))[0]   # twice the same step


def test_long_logs_are_thinned_to_what_a_screen_can_show():
    log = [{"step": step, "loss": step % 7} for step in range(5000)]
    labels, lines = panels_of(curves(log))
    assert len(lines[0]) == 640
    assert lines[0][0][0] == 10
    assert lines[0][-1][0] == 650
    assert labels[0].startswith("loss: 1 at step 4999")


def test_a_log_draws_its_curves(tmp_path):
    log = Log(Run(tmp_path), 0)
    for step in range(1, 4):
        log(step=step, loss=1 / step)
    log.draw()
    labels, _ = panels_of((tmp_path / "curves.svg").read_text())
    assert len(labels) == 1
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["loss"] == 1
