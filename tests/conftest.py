"""What several tests share: a folder of nano parts, a chat server, steady choices, and how to read
a run's folder."""
import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import kit.files
import kit.run
import lens
import vae
from kit.checkpoint import load_pipeline, save_pipeline
from toy.language import toy_tokenizer

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = Path(__file__).resolve().parent / "goldens"
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


# --- Steady choices: tests that compare numbers must not depend on a clock ------------------------

def fixed_dtype(*_):
    return torch.float32, "tests compare numbers"


def fixed_attention(*_):
    return "flash", "tests compare numbers"


# How a script that such a test starts begins.
STEADY_SCRIPT = """
import torch
import kit.run
kit.run.fastest_dtype = lambda *_: (torch.float32, "tests compare numbers")
kit.run.fastest_attention = lambda *_: ("flash", "tests compare numbers")
"""


@pytest.fixture
def steady(monkeypatch):
    """Precision fp32 and flash attention, whatever the machine's clock says."""
    monkeypatch.setattr(kit.run, "fastest_dtype", fixed_dtype)
    monkeypatch.setattr(kit.run, "fastest_attention", fixed_attention)


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Killed(Exception):
    """What ends a run in a test where a kill would."""


@contextlib.contextmanager
def killed_after_saving(monkeypatch, module):
    """A run of `module` inside this dies right after it has saved its state; it must get there."""
    save_state = module.save_state

    def save_then_die(*args):
        save_state(*args)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "save_state", save_then_die)
        yield


@contextlib.contextmanager
def killed_after_steps(monkeypatch, module, steps):
    """A run of `module` inside this dies after so many training steps; it must get there."""
    step_done = module.train_step
    steps_before_the_kill = iter(range(steps))

    def dies(*inputs):
        if next(steps_before_the_kill, None) is None:
            raise Killed
        return step_done(*inputs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "train_step", dies)
        yield


@pytest.fixture(autouse=True)
def keep_signals():
    """A run takes notice of SIGTERM and Ctrl-C, and the tests run it in their own process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def every_attention_kernel():
    """Training picks a kernel for its process, and here many runs share one."""
    yield
    kit.run.use_attention()


# --- Models ---------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """A nano autoencoder and text encoder, made by the commands that make the real ones."""
    import toy.autoencoder
    import toy.language
    folder = tmp_path_factory.mktemp("parts")
    toy.autoencoder.main(["--out", str(folder), "--size", "nano", "--steps", "4", "--report", "10",
                          "--dtype", "fp32"])
    toy.language.main(["--size", "nano", "--steps", "6", "--out", str(folder), "--save-every", "3"])
    return folder


@pytest.fixture(scope="session")
def nano(tmp_path_factory):
    """A whole pipeline of size nano on disk, with weights that are random but not zero."""
    folder = tmp_path_factory.mktemp("nano")
    sizes = lens.SIZES["nano"]
    tokenizer = toy_tokenizer(scenes=200)
    text_model = lens.build_text_model(
        sizes.text_encoder, seed=1, vocab_size=len(tokenizer), pad_token_id=0,
        eos_token_id=tokenizer.eos_token_id)
    encoder = lens.TextEncoder(text_model, tokenizer, sizes.transformer.selected_layer_index)

    torch.manual_seed(0)
    model = lens.build("nano", 0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    autoencoder = vae.LensVAE(sizes.vae).eval()
    notes = dict(steps=3, guidance=2.0, base=64,
                 words=json.dumps(["a", "red", "blue", "circle"]))
    save_pipeline(folder, model, autoencoder, encoder, notes)
    return folder


@pytest.fixture(scope="session")
def pipeline(nano):
    """Its three parts, loaded: (transformer, vae, text encoder)."""
    return load_pipeline(nano)


@pytest.fixture
def copied(nano, tmp_path):
    """A copy of the pipeline that a test may change."""
    folder = tmp_path / nano.name
    shutil.copytree(nano, folder)
    return folder


def random_model(size="nano", seed=0):
    """Every weight random: as initialised, gates and output are zero, and any test of the output
    would pass."""
    model = lens.build(size, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def relative(a, b):
    """Largest difference over the largest number."""
    return ((a - b).abs().max() / b.abs().max()).item()


# --- Runs -----------------------------------------------------------------------------------------

# What a clock fills in: left out where two runs are compared.
TIMED = {"seconds", "pictures_per_s", "tflops", "peak_share", "wait_s", "sample_s",
         "judge_wait_s", "train_s"}


def rows(folder):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def untimed_rows(folder):
    """The same without what a clock fills in."""
    return [{name: value for name, value in row.items() if name not in TIMED}
            for row in rows(folder)]


def error_line(main, argv, capsys):
    """The one line of error with which a command must end, exit code 2."""
    with pytest.raises(SystemExit) as ended:
        kit.files.run_command(lambda: main(argv))
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert ended.value.code == 2
    assert len(errors) == 1
    return errors[0]


# --- A chat server --------------------------------------------------------------------------------

class Chat(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that answers call k with entry k of `server.script`, over and
    over. An entry is text, a dict (the message), raw bytes, a status, (status, headers) or
    (status, headers, body), "hang", "die", "reset", "stall" in the middle of a body, or a function
    of the request."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.calls.append(request)
        server.keys.append(self.headers["Authorization"])
        server.agents.append(self.headers["User-Agent"])
        answer = server.script[(len(server.calls) - 1) % len(server.script)]
        if callable(answer):
            answer = answer(request)
        if answer == "hang":
            server.closing.wait(2)
        elif answer == "stall":
            self.reply(200, {"Content-Length": "1000"}, b'{"choices": [')
            server.closing.wait(2)
        elif answer == "die":
            self.connection.close()
        elif answer == "reset":
            at_once = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            self.connection.close()
        elif isinstance(answer, int):
            self.reply(answer, {"Retry-After": "0"}, b"")
        elif isinstance(answer, tuple):
            self.reply(*answer)
        elif isinstance(answer, bytes):
            self.reply(200, {}, answer)
        else:
            message = answer if isinstance(answer, dict) else {"content": answer}
            self.reply(200, {}, json.dumps({"choices": [{"message": message}]}).encode())

    def reply(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 64      # with 5, a sixth connection at once has to knock again after 1 s
    daemon_threads = False       # server_close() waits for all of them


@contextlib.contextmanager
def serving(handler, host):
    """A server on its own thread, with its url and an event `closing`. It leaves no thread behind:
    loader workers that a later test forks beside one may hang for many seconds."""
    running = Server(("127.0.0.1", 0), handler)
    running.url = f"http://{host}:{running.server_port}/v1"
    running.closing = threading.Event()
    # Looks every 10 ms whether it is to stop: each test waits for that at its end.
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield running
    running.closing.set()
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture
def server():
    """A chat server for a test: its url, script, and the calls that it got with their keys and user
    agents."""
    with serving(Chat, "127.0.0.1") as running:
        running.script, running.calls, running.keys, running.agents = [], [], [], []
        yield running
