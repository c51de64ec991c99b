"""The stopwatch: what a picture and a training step take, ours beside what one writes first.

Read before: sample.py and train.py.

    python tools/bench.py sample                              # three minutes on two cores
    python tools/bench.py sample --full --compile             # every case
    python tools/bench.py sample --size full --compile --fp8  # 8-bit products, as further lines
    python tools/bench.py train --compile

One JSON line a case. Three paths take turns in one process, so whatever else the machine does meets
all of them alike; seconds are medians of three rounds after one that does not count (`cold_s`: of
ours, that one).

    ours    what sample.py or train.py does, attention kernel, compiled blocks and all
    naive   what one writes first: text padded to the most tokens that a prompt has and masked in
            both branches of guidance, every block's modulation made anew in each step, nothing
            compiled, attention of PyTorch's own choice, a plain optimiser
    tight   the naive one, but its text is not padded

Pictures go from features to pixels, those of the toy from the prompt on. Weights are random but for
the toy's. `tflops` is our work over our seconds; `peak_share` is that over what a large matrix
product reaches on the same machine (`matmul_tflops`, measured before). `peak_memory_gib` is on a
GPU the most while our path runs, with the weights of the other paths, and on a CPU the most that
the whole process held. `difference` is the length of our tokens less the naive ones, over the
length of these; it tells something of the toy, where text matters, and little of random weights.
What was measured with all this: docs/speed.md.
"""
import copy
import json
import resource
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lens  # noqa: E402  (the path above comes first)
import sample  # noqa: E402
import train  # noqa: E402
from kit.checkpoint import load_pipeline  # noqa: E402
from kit.files import Parser, positive, require, run_command  # noqa: E402
from kit.fp8 import to_fp8  # noqa: E402
from kit.run import (  # noqa: E402
    Run,
    compile_blocks,
    matmul_peak,
    pick_attention,
    pick_device,
    pick_dtype,
    race,
    use_attention,
)
from kit.state import make_moments  # noqa: E402
from tools.budget import random_batch  # noqa: E402
from vae import LensVAE  # noqa: E402

ROUNDS = 3
USUAL_TEXT, MOST_TEXT = train.TEXT_TOKENS            # of a caption, and of the longest prompt
PROMPT = "a red circle to the left of a blue square" # what the toy encodes, 23 tokens


# --- A picture ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Case:
    """One kind of picture to be timed."""
    side: int                          # tokens on each side: a square of 16 * side pixels
    batch: int = 1                     # pictures at once
    steps: int = sample.STEPS
    guidance: float = sample.GUIDANCE
    text: int = USUAL_TEXT             # text tokens; the toy encodes PROMPT where it is USUAL_TEXT


# A small, a usual and a large picture, in tokens on a side.
SIDES = {"nano": (2, 4, 8), "full": (32, 64, 90)}
OTHER_SIDES = (8, 16, 32)


def cases_of(size, steps, everything):
    """The cases of a size, the usual one first: a few, or all of them."""
    small, usual, large = SIDES.get(size, OTHER_SIDES)
    first = Case(usual, steps=steps)
    plain = replace(first, steps=4, guidance=1.0)                # as a distilled student samples
    if not everything:
        return [first, replace(first, side=small), plain]
    return [
        first,
        replace(first, side=small),
        replace(first, side=large),
        replace(first, batch=4),
        replace(first, steps=4),
        plain,
        replace(first, text=32),
        replace(first, text=MOST_TEXT),
    ]


@dataclass
class Request:
    """What both samplers are given."""
    features: torch.Tensor             # [K, S, E] of one prompt
    noise: torch.Tensor                # [B, N, C], a picture's each
    grid: tuple                        # (h, w), N = h * w
    steps: int
    guidance: float


@torch.no_grad()
def our_picture(model, vae, request, kernel=None):
    """(tokens [B, N, C], pixels [B, 3, H, W]) as sample.generate makes them. kernel: attention's,
    as kit.run.pick_attention chose it."""
    use_attention(kernel)
    B = len(request.noise)
    text = list(request.features[:, None].expand(-1, B, -1, -1))                   # K x [B, S, E]
    tokens = sample.denoise(model, request.noise, text, None, request.grid, request.steps,
                            request.guidance)                                      # [B, N, C]
    return tokens, decode(vae, tokens, request)


@torch.no_grad()
def naive_picture(model, vae, request, padded=MOST_TEXT):
    """(tokens, pixels) as one first writes it, after the paper alone. padded: text tokens, or more
    where the prompt has more."""
    use_attention(None)
    device, guidance = request.noise.device, request.guidance
    B, N, C = request.noise.shape
    K, S, E = request.features.shape
    P = max(S, padded)
    text = F.pad(request.features, (0, 0, 0, P - S))                               # [K, P, E]
    text = list(text[:, None].expand(-1, B, -1, -1))                               # K x [B, P, E]
    visible = (torch.arange(P, device=device) < S).expand(B, -1)                   # [B, P]
    hidden = torch.zeros_like(visible)
    dtype = model.proj_out.weight.dtype

    x = request.noise.float()                                                      # [B, N, C]
    levels = lens.sigmas(N, request.steps).to(device)                              # [steps + 1]
    with torch.compiler.set_stance("force_eager"):
        for i in range(request.steps):
            t = levels[i].expand(B)
            v = model(x.to(dtype), t, text, visible, request.grid).float()
            if guidance != 1.0:
                without = model(x.to(dtype), t, text, hidden, request.grid).float()
                v = sample.guide(v, without, guidance)
            x = x + (levels[i + 1] - levels[i]) * v
        return x, decode(vae, x, request)


def decode(vae, tokens, request):
    latent = vae.to_latent(tokens, request.grid)
    return vae.decode(latent.to(next(vae.parameters()).dtype))


# --- What is timed --------------------------------------------------------------------------------

@dataclass
class Subject:
    """A denoiser and the parts around it, on the device that they are timed on."""
    size: str
    model: lens.LensTransformer
    vae: LensVAE                       # ours: channels last in bf16
    plain_vae: LensVAE
    encoder: lens.TextEncoder          # None but for the toy
    device: str
    dtype: torch.dtype
    rounded: lens.LensTransformer = None         # the model with matrices in 8 bits, if asked for
    compiled: bool = False


def make_subject(size, device, dtype, fp8=False, compiled=False):
    if size == "toy":
        model, vae, encoder = load_pipeline(sample.TOY, device, dtype)
    else:
        encoder = None
        with torch.device(device):     # random numbers are drawn where they are needed
            model = lens.LensTransformer(lens.SIZES[size].transformer).to(dtype)
            vae = LensVAE(lens.SIZES[size].vae).eval().to(dtype)
    plain_vae = copy.deepcopy(vae).to(memory_format=torch.contiguous_format)
    if dtype == torch.bfloat16:
        vae = vae.to(memory_format=torch.channels_last)
    rounded = to_fp8(copy.deepcopy(model)) if fp8 else None

    if compiled:                       # as sample.py --compile does it
        compiled = compile_blocks(model, vae, graphs=device != "cpu")
        if rounded is not None:
            compile_blocks(rounded, graphs=device != "cpu")
    return Subject(size, model, vae, plain_vae, encoder, device, dtype, rounded, compiled)


def time_picture(subject, case, peak):
    """Prints the case's line, and with fp8 a second one. peak: FLOP/s of a large matrix product."""
    model, device = subject.model, subject.device
    make_request = request_maker(subject, case)
    length = make_request().features.shape[1]
    kernel, why = pick_attention(device, subject.dtype, model.config, case.side**2 + length)

    def ours(model=model):
        return our_picture(model, subject.vae, make_request(), kernel)[0]

    def naive(padded=MOST_TEXT):
        return naive_picture(model, subject.plain_vae, make_request(), padded)[0]

    # Compiled, its products would be hidden from the counter.
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        ours()
    runners = {"ours": ours, "naive": naive, "tight": partial(naive, padded=0)}
    if subject.rounded is not None:
        runners["fp8"] = partial(ours, subject.rounded)
    found = race(runners, ROUNDS, device)

    for name in ("ours", "fp8"):
        if name not in runners:
            continue
        print_row(
            **what_was_timed(subject, case, name, length),
            attention=f"{kernel}: {why}",
            **times(found, name),
            **speed(found[name][1], counter.get_total_flops(), peak),
            peak_memory_gib=peak_memory(runners[name], device),
            difference=relative_length(found[name][2], found["naive"][2]),
        )


def request_maker(subject, case):
    """-> a function that makes the case's Request: the toy encodes its prompt anew in each."""
    config, device = subject.model.config, subject.device
    grid = (case.side, case.side)
    noise = [sample.picture_noise(i, grid, config.in_channels) for i in range(case.batch)]
    noise = torch.cat(noise).to(device)                                            # [B, N, C]
    layers = len(config.selected_layer_index)
    drawn = torch.randn(layers, case.text, config.enc_hidden_dim)                  # [K, S, E]
    drawn = drawn.to(device, subject.dtype)

    def make():
        features = drawn
        if subject.encoder is not None and case.text == USUAL_TEXT:
            (features,) = subject.encoder.encode_each([PROMPT])
        return Request(features, noise, grid, case.steps, case.guidance)

    return make


def what_was_timed(subject, case, name, length):
    """The first fields of a line. name: "ours" or "fp8";  length: text tokens."""
    return {
        "device": device_name(subject.device),
        "size": subject.size,
        "dtype": dtype_name(subject.dtype) + (" and fp8" if name == "fp8" else ""),
        "compiled": subject.compiled,
        "pixels": f"{16 * case.side}x{16 * case.side}",
        "image_tokens": case.side**2,
        "text_tokens": length,
        "padded_to": max(length, MOST_TEXT),
        "batch": case.batch,
        "steps": case.steps,
        "guidance": case.guidance,
    }


def relative_length(a, b):
    """Length of a - b over that of b."""
    return ((a - b).norm() / b.norm()).item()


def bench_pictures(size, device, dtype=None, steps=sample.STEPS, everything=False, **how):
    """Prints a line a case. everything: all cases, not a few; how: what make_subject takes."""
    kind, _ = pick_dtype(device, dtype, lens.SIZES[size].transformer.inner_dim)
    peak = told_peak(device, kind)
    subject = make_subject(size, device, kind, **how)
    for case in cases_of(size, steps, everything):
        time_picture(subject, case, peak)


# --- A training step ------------------------------------------------------------------------------

@dataclass
class Trainee:
    """A denoiser that learns, and what makes it learn."""
    size: str
    run: Run
    model: lens.LensTransformer
    stage: train.Stage
    optimizers: list                   # ours
    plain_optimizers: list             # the naive path's, over the same moments
    recompute: str
    compiled: bool


def make_trainee(size, device, dtype, recompute="none", compiled=False):
    run = Run(out=None, device=device, bf16=dtype == torch.bfloat16)
    stage = train.stage_of(size, 2)
    with torch.device("meta"):
        model = lens.LensTransformer(lens.SIZES[size].transformer)
    # Drawn where it is needed: 4 billion numbers take long on a CPU.
    drawn = torch.Generator(device).manual_seed(0)
    model = model.to_empty(device=device).init_weights(drawn).train()
    unread = set(model.unread())
    for name, p in model.named_parameters():
        p.requires_grad_(name not in unread)
    model.set_recompute(recompute)
    if compiled:
        compiled = compile_blocks(model, fullgraph=False)    # recomputation breaks the graph

    optimizers = train.make_optimizers(model, stage)
    make_moments(optimizers)
    plain = [plain_twin(optimizer) for optimizer in optimizers]
    return Trainee(size, run, model, stage, optimizers, plain, recompute, compiled)


def plain_twin(optimizer):
    """AdamW one tensor after the other, over the moments of the fused one: a second set of them, or
    the copies that PyTorch's default (foreach) makes, would not fit beside the full size."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return optimizer
    group = optimizer.param_groups[0]
    twin = torch.optim.AdamW(group["params"], lr=group["lr"], betas=group["betas"],
                             weight_decay=0.0, foreach=False)
    for p, moments in optimizer.state.items():
        # The count stays on the CPU: to read it from a GPU for each tensor would wait each time.
        twin.state[p] = {**moments, "step": torch.ones(())}
    return twin


def padded(batch, length):
    """The batch with its text padded to `length` tokens, which the mask hides."""
    room = length - batch.mask.shape[1]
    text = [F.pad(layer, (0, 0, 0, room)) for layer in batch.text]
    return replace(batch, text=text, mask=F.pad(batch.mask, (0, room)))


def our_step(trainee, batch, kernel):
    """A step of train.py, from noise to weights."""
    use_attention(kernel)
    micro = train.MicroBatch(batch, share=1 / len(batch.samples), last=True)
    return train.train_step(trainee.run, trainee.model, [micro], trainee.optimizers, trainee.stage)


def draw_plainly(batch):
    """-> noise [B, N, C], t [B], without a generator of its own for each picture."""
    noise = torch.randn_like(batch.tokens)
    t = torch.sigmoid(1 + torch.randn(len(noise), device=noise.device))
    return noise, t


def naive_step(trainee, batch):
    """A step as one first writes it, after the paper alone."""
    use_attention(None)
    model = trainee.model
    noise, t = draw_plainly(batch)
    with torch.compiler.set_stance("force_eager"):
        with trainee.run.autocast():
            loss = train.flow_matching_loss(model, batch, noise, t).mean()
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), train.CLIP)
    for optimizer in trainee.plain_optimizers:
        optimizer.step()
        optimizer.zero_grad()


def time_step(trainee, area, count, peak):
    """Prints the line of a step over `count` pictures of area x area pixels."""
    model, run = trainee.model, trainee.run
    usual, longest = train.text_tokens(trainee.size)
    side = area // 16
    batch = random_batch(model.config, count, (side, side), usual, run.device)
    long_batch = padded(batch, longest)
    tokens = batch.tokens.shape[1]
    dtype = torch.bfloat16 if run.bf16 else torch.float32
    kernel, why = pick_attention(run.device, dtype, model.config, tokens + usual, learns=True)

    ours = partial(our_step, trainee, batch, kernel)
    runners = {
        "ours": ours,
        "naive": partial(naive_step, trainee, long_batch),
        "tight": partial(naive_step, trainee, batch),
    }
    found = race(runners, ROUNDS, run.device)
    work = count * train.flops(model, tokens, usual)
    print_row(
        device=device_name(run.device),
        size=trainee.size,
        dtype=dtype_name(dtype),
        compiled=trainee.compiled,
        recompute=trainee.recompute,
        attention=f"{kernel}: {why}",
        pixels=f"{area}x{area}",
        image_tokens=tokens,
        text_tokens=usual,
        padded_to=longest,
        batch=count,
        **times(found, "ours"),
        **speed(found["ours"][1], work, peak),
        peak_memory_gib=peak_memory(ours, run.device),
    )


def bench_training(size, device, dtype=None, **how):
    """Prints a line an area of the size's second stage. how: what make_trainee takes."""
    kind, _ = pick_dtype(device, dtype, lens.SIZES[size].transformer.inner_dim)
    peak = told_peak(device, kind)
    trainee = make_trainee(size, device, kind, **how)
    for area, count in zip(trainee.stage.areas, trainee.stage.batch, strict=True):
        time_largest_batch(trainee, area, count, peak)


def time_largest_batch(trainee, area, count, peak):
    """time_step with `count` pictures, or half as many until they fit."""
    while True:
        try:
            time_step(trainee, area, count, peak)
            return
        except torch.OutOfMemoryError:
            pass                       # out here, the error no longer holds the step's tensors
        require(count > 1, f"{area} x {area}: not even one picture fits into this GPU's memory")
        count //= 2
        trainee.model.zero_grad()
        if trainee.run.device != "cpu":
            torch.cuda.empty_cache()


# --- What a line says -----------------------------------------------------------------------------

def told_peak(device, dtype):
    """FLOP/s of a large matrix product here, told on stderr: standard output is for the lines."""
    peak = matmul_peak(device, dtype)
    print(f"peak_share is of {peak / 1e12:.3g} TFLOP/s, which a large {dtype_name(dtype)} matrix "
          f"product reaches on this {device_name(device)}", file=sys.stderr)
    return peak


def times(found, name):
    """Seconds of the path `name` and of the other two, of what kit.run.race found."""
    cold, ours, _ = found[name]
    naive, tight = found["naive"][1], found["tight"][1]
    return {"cold_s": cold, "ours_s": ours, "naive_s": naive, "ratio": naive / ours,
            "tight_s": tight, "tight_ratio": tight / ours}


def speed(seconds, work, peak):
    """work: FLOPs in these seconds; peak: FLOP/s."""
    return {"tflops": work / seconds / 1e12, "matmul_tflops": peak / 1e12,
            "peak_share": work / seconds / peak}


def peak_memory(run, device):
    """GiB: on a GPU the most that one more run() holds; on a CPU the most that the process ever
    held."""
    if device == "cpu":
        unit = 2**30 if sys.platform == "darwin" else 2**20           # bytes there, elsewhere KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**30


def device_name(device):
    if device == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name()


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def print_row(**row):
    """One JSON line; numbers to four digits."""
    for name, value in row.items():
        if isinstance(value, float):
            row[name] = float(f"{value:.4g}")
    print(json.dumps(row), flush=True)


# --- The command line -----------------------------------------------------------------------------

def default_sizes(what, device, everything):
    """What fits the machine: the full size is for a GPU."""
    on_cpu = device == "cpu"
    if what == "train":
        return ["toy"] if on_cpu else ["full"]
    if everything:
        return ["toy", "small"] if on_cpu else ["toy", "small", "full"]
    return ["toy", "small"] if on_cpu else ["full"]


def main(argv=None):
    parser = Parser("Times pictures or training steps: ours beside a naive path.", __doc__)
    add = parser.add_argument
    add("what", choices=("sample", "train"))
    add("--size", help="one of " + ", ".join(lens.SIZES) + " (default: what suits the machine)")
    add("--device", help="cpu or cuda (default: CUDA if there is one)")
    add("--dtype", choices=("fp32", "bf16"), help="default: the faster one")
    add("--compile", action="store_true",
        help="compile the blocks, and the decoder; on a GPU, sample records CUDA graphs too")
    add("--steps", type=positive, default=sample.STEPS,
        help="of the sampler (default: %(default)s)")
    add("--fp8", action="store_true", help="sample: a second line a case, with 8-bit matrices")
    add("--full", action="store_true", help="sample: every case, not a few")
    add("--recompute", choices=("none", "selective", "full"),
        help="train: activations to compute again (default: none; selective at full size)")
    args = parser.parse_args(argv)

    require(args.size is None or args.size in lens.SIZES,
            f"unknown size '{args.size}': choose one of {', '.join(lens.SIZES)}")
    require(args.what == "sample" or not (args.fp8 or args.full),
            "--fp8 and --full are for sample")
    require(args.what == "train" or not args.recompute, "--recompute is for train")
    device = pick_device(args.device)
    sizes = [args.size] if args.size else default_sizes(args.what, device, args.full)
    print(f"sizes {', '.join(sizes)}: a line a case, each after {ROUNDS + 1} runs on every path, "
          "some within seconds, some after minutes", file=sys.stderr)
    for size in sizes:
        if args.what == "sample":
            bench_pictures(size, device, args.dtype, args.steps, args.full, fp8=args.fp8,
                           compiled=args.compile)
        else:
            recompute = args.recompute or ("selective" if size == "full" else "none")
            bench_training(size, device, args.dtype, recompute=recompute,
                           compiled=args.compile)


if __name__ == "__main__":
    run_command(main)
