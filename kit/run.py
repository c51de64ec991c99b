"""What every run needs: a device, ranks, a precision, random generators, loaders, a log with
curves, notice of SIGTERM and Ctrl-C, averages.

Read before: kit/files.py.
"""
import atexit
import contextlib
import datetime
import errno
import functools
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:                                # on Windows
    fcntl = None

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from kit.files import (
    check_writable,
    error_context,
    read_json_lines,
    require,
    write_json_lines,
    write_text,
)

# --- The run: this process among its peers --------------------------------------------------------

@dataclass
class Run:
    """One process of a run. Made by `start_run`; nothing in it changes after `choose` has set the
    last two."""
    out: Path                 # the run's folder
    seed: int = 0
    device: str = "cpu"       # "cpu", "cuda", or this rank's own, such as "cuda:1"
    rank: int = 0             # this process among `ranks`; rank 0 talks, writes and evaluates
    ranks: int = 1
    bf16: bool = False        # compute in bf16 over fp32 weights
    attention: str = "flash"  # the kernel behind scaled_dot_product_attention, one of KERNELS

    def say(self, message):
        """Prints on rank 0 only."""
        if self.rank == 0:
            print(message)

    def say_stopped(self, step):
        """The last words of a run that a notice ended, after it has saved."""
        self.say(f"stopped at step {step}; the same command goes on (saved in {self.out})")

    def autocast(self):
        """Matrix products in bf16 where the run chose it; weights, losses and optimisers stay
        fp32."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16)

    def move(self, x):
        """x on this rank's device, without waiting for the copy."""
        return x.to(self.device, non_blocking=True)

    def sum_over_ranks(self, x):
        """Adds up a tensor over all ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(x)
        return x


def start_run(out, seed=0, device=None):
    """-> Run. Joins the other processes if torchrun started this one, each with a GPU of its own.
    Rank 0 checks that the folder can be written, and locks it."""
    device = pick_device(device)
    if "RANK" not in os.environ:
        run = Run(Path(out), seed, device)
    else:
        if device == "cuda":
            device = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            # The others wait for rank 0 while it draws the toy world or indexes shards: hours, at
            # most.
            backend = "nccl" if device.startswith("cuda") else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
        run = Run(Path(out), seed, device, dist.get_rank(), dist.get_world_size())
    if run.rank == 0:          # two processes would remove each other's trial file
        check_writable(run.out)
        lock(run.out)
    return run


_locks = []                                    # open files: a lock goes when its file is closed


def lock(folder):
    """Keeps a folder for this process, until it ends in whatever way. LensError where another has
    it: two runs would write over each other's states."""
    if fcntl is None:
        return
    file = open(folder / ".lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        taken = e.errno in (errno.EACCES, errno.EAGAIN)            # else: this disk has no locks
        require(not taken, f"{folder}: another run is at work there; wait for it, or give another "
                "--out")
    _locks.append(file)


@contextlib.contextmanager
def rank_zero_first(run):
    """Rank 0 runs the body before the others: it makes a file (an index), they read it."""
    if run.rank > 0:
        dist.barrier()
    yield
    if run.rank == 0 and run.ranks > 1:
        dist.barrier()


def same_everywhere(value):
    """Rank 0's value on every rank: two ranks that measure may come to two answers."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def gathered(value):
    """[the value of every rank], in order of rank."""
    if not dist.is_initialized():
        return [value]
    box = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def local(tensor):
    """This rank's part of a tensor that FSDP has sharded; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor):
    """All of a tensor that FSDP has sharded; every rank must ask at once."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Notice:
    """`given` turns True at SIGTERM, a cluster's notice before it kills, and at Ctrl-C: the loop
    looks, saves, and ends well. A second Ctrl-C stops at once."""

    def __init__(self):
        self.given = False
        signal.signal(signal.SIGTERM, self.receive)
        signal.signal(signal.SIGINT, self.receive)

    def receive(self, number, _):
        self.given = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # Not print: it may be what was interrupted.
            os.write(2, b"\nstopping after this step, to save; Ctrl-C again stops at once\n")


# --- Processes that prepare batches ---------------------------------------------------------------

def make_loader(dataset, order, workers, prefetch=None, pin_memory=False):
    """dataset[k] for each k of `order`, a whole batch each, made by worker processes while the last
    batch is used. Every loader here comes from this place, so that no worker dies of a signal that
    is meant for the run.

    workers   0: this process makes them itself;  prefetch: batches ahead, for each worker
    """
    return DataLoader(dataset, batch_size=None, sampler=order, num_workers=workers,
                      prefetch_factor=prefetch, pin_memory=pin_memory,
                      worker_init_fn=ignore_signals)


def ignore_signals(worker=None):
    """A cluster's SIGTERM and a terminal's Ctrl-C go to every process of a group: a worker that
    died of one would take the trainer down before it has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def usable_cores():
    """CPU cores that this process may use: a container or `taskset` may leave it one of many."""
    if hasattr(os, "sched_getaffinity"):           # not on a Mac
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@atexit.register
def end_workers():
    """Python ends with a SIGTERM to its children, then waits: for ever, if they ignore it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or PyTorch complains of workers that died
    for child in multiprocessing.active_children():
        child.kill()


# --- Random numbers -------------------------------------------------------------------------------

def generator(*key):
    """A torch generator that is a function of integers alone, say (seed, epoch, sample): what it
    draws does not depend on batch size, rank count, or where a run was resumed. Zeros at the end
    do not count: (5, 1) and (5, 1, 0) are one stream. LensError for a negative integer."""
    numbers = [int(k) for k in key]
    require(min(numbers) >= 0, f"a random stream's key {numbers}: no number may be negative")
    entropy = np.random.SeedSequence(numbers)
    # 63 bits of it: a seed of torch's is a signed integer.
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))


# --- Learning rate and averages -------------------------------------------------------------------

def learning_rate_factor(step, steps, warmup, decay=0.5):
    """A factor in (0, 1]: a short rise (Adam's moments are empty at first), flat, then linear to
    zero over the last share `decay`. step: counted from 0"""
    rising = (step + 1) / warmup
    falling = (steps - step) / max(1, decay * steps)
    return min(1.0, rising, falling)


def average_decay(step, limit):
    """Decay of a running average at its step-th update: small at first, so that it soon forgets
    where it started. It comes to 0.92 in 100 steps and to 0.99 in 900, if the limit is above."""
    return min(limit, (1 + step) / (10 + step))


@torch.no_grad()
def follow(behind, ahead, rate):
    """behind <- (1 - rate) behind + rate ahead, tensor by tensor, in place; of sharded ones each
    rank moves its part."""
    torch._foreach_lerp_([local(t) for t in behind], [local(t) for t in ahead], rate)


# --- What a clock decides: precision and attention ------------------------------------------------

def race(runners, rounds, device):
    """Times functions against each other: -> {name: (seconds of the first run, median seconds of
    the others, what the last run gave)}.

    rounds    timed runs of each, after its first
    runners   {name: function}; they run in turn, so that whatever else the machine does meets all
              of them alike. The first run compiles and warms up.
    """
    def clock():
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds, results = {name: [] for name in runners}, {}
    for _ in range(rounds + 1):
        for name, run in runners.items():
            begin = clock()
            results[name] = run()
            seconds[name].append(clock() - begin)
    return {name: (s[0], float(np.median(s[1:])), results[name]) for name, s in seconds.items()}


def pick_device(name=None):
    """"cpu", "cuda" or "cuda:1", as asked, else CUDA if there is one. LensError for a device that
    is not there, or of another kind."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    require(not name.startswith("cuda") or torch.cuda.is_available(),
            f"--device {name}: no CUDA device was found; leave --device out to run on the CPU")
    with error_context(f"--device {name}: not a device; try cpu or cuda"):
        device = torch.device(name)
    require(device.type in ("cpu", "cuda"), f"--device {name}: this code runs on cpu and cuda "
            "alone; leave --device out for the better of those that are here")
    if device.type == "cpu":
        return "cpu"
    count = torch.cuda.device_count()
    require((device.index or 0) < count, f"--device {name}: there are {count} CUDA devices here, "
            "numbered from 0")
    return str(device)


def pick_dtype(device, name=None, width=128):
    """(torch.float32 or torch.bfloat16, why). `name`: what the user asked for, "fp32" or "bf16";
    None: the faster one. width: of the model, whose matrix products are timed."""
    if name:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[name], "as asked"
    if device == "cpu":
        return fastest_dtype(width)
    # PyTorch's is_bf16_supported() also counts GPUs that compute it by fp32, at a loss.
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float32, "this GPU has no bf16 in hardware"
    return torch.bfloat16, "the GPU's fast type"


def fastest_dtype(width):
    """Only some CPUs have bf16 instructions: 2.9 times as fast there, many times slower elsewhere.
    So measure."""
    def product(dtype):
        x, w = torch.randn(512, width).to(dtype), torch.randn(width, 4 * width).to(dtype)
        return functools.partial(torch.matmul, x, w)

    found = race({dtype: product(dtype) for dtype in (torch.float32, torch.bfloat16)}, 9, "cpu")
    ratio = found[torch.float32][1] / found[torch.bfloat16][1]
    best = torch.bfloat16 if ratio > 1.5 else torch.float32
    return best, f"bf16 products run {ratio:.1f}x as fast as fp32 here"


KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
           "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
_chosen_kernel = contextlib.ExitStack()        # holds the context that use_attention has entered


def use_attention(kernel=None, alone=False):
    """For the whole process: this kernel behind scaled_dot_product_attention, then those after it
    in KERNELS, which do what it cannot (a mask, a wide head). alone: no others. None: back to
    PyTorch's own choice."""
    _chosen_kernel.close()
    if kernel is None:
        return
    names = list(KERNELS)
    order = [kernel] if alone else names[names.index(kernel):]
    _chosen_kernel.enter_context(sdpa_kernel([KERNELS[name] for name in order], set_priority=True))


@contextlib.contextmanager
def any_attention():
    """Inside, all kernels in one order, whatever `use_attention` chose: the frozen models around a
    run then compute the same in every process."""
    with sdpa_kernel(list(KERNELS.values()), set_priority=True):
        yield


def pick_attention(device, dtype, config, tokens, learns=False):
    """(kernel, why): the fastest for sequences of so many tokens.

    config: a LensConfig; learns: masked and with its backward pass, as training has it. PyTorch's
    own order is fixed, cuDNN last. On a CPU its first, flash, wins every forward (1.3 to 5 times as
    fast at 64 to 1024 tokens) and in fp32 loses no backward, but in bf16 its backward takes twice
    as long as plain products at 104 tokens. So training measures."""
    if device == "cpu" and not learns:
        return "flash", "the fastest forwards on a CPU"
    return fastest_attention(device, dtype, config, tokens, learns)


@functools.cache
def fastest_attention(device, dtype, config, tokens, learns):
    batch = 4 if learns else 1
    shape = (batch, tokens, config.num_attention_heads, config.attention_head_dim)
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=learns)
    mask = torch.ones(batch, 1, 1, tokens, dtype=torch.bool, device=device) if learns else None

    def attend(kernel):
        use_attention(kernel, alone=True)          # what it cannot do is a RuntimeError then
        q = x.transpose(1, 2)                      # laid out as the blocks have it
        out = F.scaled_dot_product_attention(q, q, q, mask)
        if learns:
            out.backward(out)

    able = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kernel in KERNELS:
            with contextlib.suppress(RuntimeError):
                attend(kernel)
                able[kernel] = functools.partial(attend, kernel)
    seconds = {kernel: median for kernel, (_, median, _) in race(able, 5, device).items()}
    use_attention()

    fastest = min(seconds.values())
    # Of equals the first, so that two runs agree.
    best = next(kernel for kernel, s in seconds.items() if s < 1.1 * fastest)
    return best, ", ".join(f"{kernel} {1000 * s:.2g} ms" for kernel, s in seconds.items())


def choose(run, config, tokens, kept=None, dtype=None):
    """Settles run.bf16 and run.attention, and returns a line that says how and why.

    What rank 0 measures holds for all, unless a run that is resumed has them in `kept` ({"bf16",
    "attention"}): it goes on as it began, but for a dtype that is asked for.
    config   a LensConfig;  tokens: of a usual training sequence, image and text
    dtype    "fp32" or "bf16", as asked for; None: the faster one
    """
    if kept and dtype is None:
        run.bf16, why_dtype = kept["bf16"], "as this run began"
    else:
        device = torch.device(run.device).type
        chosen, why_dtype = same_everywhere(pick_dtype(device, dtype, config.inner_dim))
        run.bf16 = chosen == torch.bfloat16

    if kept:
        run.attention, why_kernel = kept["attention"], "as this run began"
    else:
        kernel_dtype = torch.bfloat16 if run.bf16 else torch.float32
        run.attention, why_kernel = same_everywhere(
            pick_attention(run.device, kernel_dtype, config, tokens, learns=True))
    compute = "bf16" if run.bf16 else "fp32"
    return f"{compute} compute ({why_dtype}); {run.attention} attention ({why_kernel})"


def share_out(model, dtype=None, root=None):
    """FSDP: each rank keeps a share of every weight, and a block is gathered when it runs. Models
    of one shape are shared out alike, so `follow` needs no word from another rank.

    dtype  of matrix products; None: weights are gathered in fp32
    root   a module around the model whose other weights are shared out as well; None: the model
    """
    policy = MixedPrecisionPolicy()
    if dtype is not None:
        # Inputs of a block are left alone: rotary angles must stay fp32.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)
    for block in model.transformer_blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(root or model, mp_policy=policy)


def matmul_peak(device, dtype):
    """FLOP/s of a large matrix product here: what 100% of the machine means in this project."""
    n = 8192 if device != "cpu" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)

    def product():
        return (a @ a)[0, 0].item()                # .item() waits for the product

    times = []
    for _ in range(6):
        begin = time.perf_counter()
        product()
        times.append(time.perf_counter() - begin)
    return 2 * n**3 / min(times[1:])


def compile_blocks(model, vae=None, fullgraph=True, graphs=False, device=None):
    """torch.compile in place, so that weights keep their names: the blocks one by one (they are
    alike and compile once), for all sizes and text lengths.

    fullgraph   False where FSDP's hooks or recomputation break the graph
    graphs      records CUDA graphs, for sampling on a GPU: a block is then one launch, where Python
                cannot ask for its kernels as fast as they run (a picture of 512 x 512 at full size
                took 0.36 s in place of 0.95 s on an H200)
    device      where the blocks will run; None: where the weights are
    Returns whether it did: where nothing can be compiled, a line says why, and all stays as it is.
    """
    device = device or next(model.parameters()).device
    reason = why_not_compiled(torch.device(device).type)
    if reason:
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"note: --compile: going on without, since this machine cannot: {reason}",
                  file=sys.stderr)
        return False

    say_that_it_compiles()
    mode = "reduce-overhead" if graphs else None
    model.records_graphs = graphs
    # Programs of a block: last or not, each branch of guidance or both, one picture or many.
    torch._dynamo.config.recompile_limit = 64
    # DDP's own optimiser would cut a block where a bucket of gradients is full, and fails on it:
    # dynamic sizes.
    torch._dynamo.config.optimize_ddp = False
    for block in model.transformer_blocks:
        block.compile(fullgraph=fullgraph, dynamic=True, mode=mode)
    if vae is not None:
        vae.decoder.compile(fullgraph=fullgraph, dynamic=True)
    return True


@functools.cache
def say_that_it_compiles():
    """Once a process, however many models it compiles."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("compiling the blocks: what runs first takes about a minute longer", file=sys.stderr)


@functools.cache
def why_not_compiled(device):
    """What stands in the way of torch.compile, found by a trial; None: nothing. A CPU needs a C++
    compiler, a GPU a C compiler and Triton."""
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except Exception as e:                         # each part of it has errors of its own
        text = str(e).strip() or type(e).__name__
        return text.splitlines()[0]
    return None


# --- The log --------------------------------------------------------------------------------------

def due(every, step, steps):
    """Whether something is due that comes every so many steps and at the end; 0: never."""
    return every > 0 and (step % every == 0 or step == steps)


@functools.cache
def code_version():
    """The commit of the code that runs, for notes: 12 digits, with "-dirty" where a file that git
    knows was changed since; "" where this is no checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True,
                              timeout=20, check=True).stdout.strip()
    return ""


def in_words(scores):
    """{name: number} as a line to print."""
    return ", ".join(f"{name} {value:.2f}" for name, value in scores.items())


class Log:
    """metrics.jsonl in a run's folder, one line a step; and curves.svg, drawn from it. Rank 0 only:
    others get a silent one. On resume, lines after the checkpoint's step are dropped, so that none
    stands twice."""

    def __init__(self, run, step):
        self.folder, self.file = run.out, None
        if run.rank == 0:
            path = run.out / "metrics.jsonl"
            write_json_lines(path, [row for row in read_json_lines(path) if row["step"] <= step])
            self.file = open(path, "a", buffering=1)

    def __call__(self, **row):
        if self.file:
            for name, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):
                    row[name] = None               # JSON has neither NaN nor infinity
            self.file.write(json.dumps(row) + "\n")

    def draw(self):
        """Draws curves.svg anew."""
        if self.file:
            rows = read_json_lines(self.folder / "metrics.jsonl")
            write_text(self.folder / "curves.svg", curves(rows))


# What curves.svg shows, in this order: names of metrics.jsonl, and what a panel is called.
SHOWN = {"loss": "loss", "loss_by_t": "loss by quarters of t, data to noise",
         "reward": "reward", "overall": "score", "fidelity": "fidelity", "outline": "outline",
         "diversity": "diversity", "length": "length of v over the reference's",
         "label_loss": "loss of the labels", "fake_loss": "loss of the fake score",
         "heads_loss": "loss of the heads", "grad_norm": "gradient norm", "lr": "learning rate"}
COLORS = ("#124", "#27b", "#2a7", "#d70")          # of a panel's lines
WIDTH, HEIGHT = 640, 120                           # of a panel, in pixels


def curves(rows):
    """The log as an SVG: one panel for each name of SHOWN that has two numbers or more, over the
    step. A pale line joins the values, a dark one their running mean. A list in the log, such as
    the loss by quarters of the noise level, gives a line an entry; the last numbers stand above in
    the colours of the lines."""
    panels = []
    for name, title in SHOWN.items():
        lines = lines_of(rows, name)
        if lines:
            panels.append(panel(title, lines, top=len(panels) * (HEIGHT + 40)))
    total = len(panels) * (HEIGHT + 40)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + 20}" height="{total + 10}" '
            f'font-family="sans-serif" font-size="12">\n'
            f'<rect width="100%" height="100%" fill="white"/>\n'
            + "\n".join(panels) + "\n</svg>\n")


def lines_of(rows, name):
    """{colour: points [steps, 2], the step and the value}: one line for a number, several where the
    log has a list. A line has two points at least."""
    lines = []
    for row in rows:
        value = row.get(name)
        values = value if isinstance(value, list) else [value]
        while len(lines) < len(values):
            lines.append([])
        for points, value in zip(lines, values):
            if isinstance(value, (int, float)) and math.isfinite(value):
                points.append((row["step"], value))
    return {color: np.array(points, float)
            for color, points in zip(COLORS, lines) if len(points) >= 2}


def panel(title, lines, top):
    """One panel as SVG, `top` pixels from the top of the page. lines: see `lines_of`."""
    every = np.concatenate(list(lines.values()))
    first, last = every[:, 0].min(), every[:, 0].max()
    # Without the outermost half percent: a loss begins twenty times as high as it ends, and one
    # spike of a gradient would flatten all the rest. What is outside is drawn at the edge.
    low, high = np.quantile(every[:, 1], (0.005, 0.995), method="inverted_cdf")

    def polyline(steps, values, color, opacity):
        across = 10 + WIDTH * (steps - first) / max(last - first, 1)
        down = top + 25 + HEIGHT * (high - values.clip(low, high)) / max(high - low, 1e-12)
        where = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down))
        return (f'<polyline points="{where}" fill="none" stroke="{color}" '
                f'stroke-opacity="{opacity}"/>')

    pale, dark = [], []
    for color, points in lines.items():
        if len(points) > WIDTH:                    # one for each pixel is enough
            points = points[np.linspace(0, len(points) - 1, WIDTH).astype(int)]
        steps, values = points.T
        pale.append(polyline(steps, values, color, opacity=0.25))
        dark.append(polyline(steps, running_mean(values), color, opacity=1))

    now = ", ".join(f'<tspan fill="{color}">{points[-1, 1]:.4g}</tspan>'
                    for color, points in lines.items())
    label = f"{title}: {now} at step {last:.0f} (from {low:.4g} to {high:.4g})"
    return f'<text x="10" y="{top + 18}">{label}</text>' + "".join(pale + dark)


def running_mean(values, window=21):
    """The mean of each value and the ten on either side of it, as far as there are so many."""
    ones = np.ones(window)
    sums = np.convolve(values, ones)[window // 2:][:len(values)]
    counts = np.convolve(np.ones(len(values)), ones)[window // 2:][:len(values)]
    return sums / counts
