import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


# The choices that a clock makes, made: for tests that compare numbers. A script that such a test starts begins with STEADY.
STEADY = ("import sample, torch\nsample.pick_dtype = lambda *a: (torch.float32, 'tests compare numbers')\n"
          "sample.pick_attention = lambda *a, **k: ('flash', 'tests compare numbers')\n")


def steady(patch):
    import sample
    patch.setattr(sample, "pick_dtype", lambda *a: (torch.float32, "tests compare numbers"))
    patch.setattr(sample, "pick_attention", lambda *a, **k: ("flash", "tests compare numbers"))


@pytest.fixture(autouse=True)
def every_attention_kernel():
    """Training picks a kernel for its process, and here many runs share one."""
    yield
    import sample
    sample.use_attention()


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """A nano autoencoder and text encoder, made by the commands that make the real ones."""
    import train
    import vae
    folder = tmp_path_factory.mktemp("parts")
    vae.main(["--out", str(folder), "--size", "nano", "--steps", "4", "--report", "10", "--dtype", "fp32"])
    train.main(["--stage", "text", "--size", "nano", "--steps", "6", "--out", str(folder), "--save-every", "3"])
    return folder


class Chat(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that answers call k with entry k of `server.script`, over and over: text, raw bytes, a status, a
    function of the request, "hang" or "die"."""

    def do_POST(self):
        request, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        server.calls.append(request)
        server.keys.append(self.headers["Authorization"])
        what = server.script[(len(server.calls) - 1) % len(server.script)]
        what = what(request) if callable(what) else what
        if what == "hang":
            return time.sleep(2)
        if what == "die":
            return self.connection.close()
        if isinstance(what, int):
            self.send_response(what)
            self.send_header("Retry-After", "0")
            return self.end_headers()
        reply = what if isinstance(what, bytes) else json.dumps({"choices": [{"message": {"content": what}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """One such server for a test: its url, script, the calls it got and the keys they carried."""
    serving = ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    serving.url, serving.script, serving.calls, serving.keys = f"http://127.0.0.1:{serving.server_port}/v1", [], [], []
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield serving
    serving.shutdown()
    serving.server_close()
