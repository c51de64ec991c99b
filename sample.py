"""
sample.py - from a request to a PNG: encode the prompt, denoise, decode, write. And the six-task evaluation.

Read `lens.py`, `vae.py` and `data.py` first. Assumes weights in one of the layouts that `lens.load_pipeline` reads;
without `--weights` it takes the toy that the repository ships, which runs on any laptop in seconds.

    python sample.py --prompt "a red circle to the left of a blue square"
    python sample.py --prompt "..." --num 4 --seed 7 --steps 50 --aspect 16:9
    python sample.py --prompt "..." --image photo.png --strength 0.6        # start from a picture
    python sample.py --prompts-file prompts.txt --out pictures/             # a line a prompt, or GenEval's JSON lines
    python sample.py --prompt "..." --weights DIR_OR_REPO --base 1440       # the released model
    python sample.py --prompt "a couple of crimson discs" --reason          # put first into words like those of the captions
    python sample.py --eval                                                 # the six tasks on the toy world
    python sample.py --bench                                                # what a picture costs, beside a naive sampler

The sampler is Euler's method on dx/dt = v(x, t), from noise at t = 1 to data at t = 0 [paper]. With guidance g the model runs twice a step, with the
prompt and without any, and the step goes along u + g (c - u), scaled back to the length of c [checkpoint]. Prompts of unequal length never share a
batch: nothing is padded, so no attention needs a mask, and a picture is the same whatever was made beside it.
"""
import argparse, collections, colorsys, contextlib, copy, functools, hashlib, json, math, os, re, sys, time, warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import lens
import vae as autoencoder
from lens import LensError

TOY = Path(__file__).resolve().parent / "weights" / "toy"
STEPS, GUIDANCE, BASE = 20, 5.0, 1024     # [checkpoint] where weights do not say otherwise
TOY_BASE = 128                             # [ours] the toy's own size: pictures of 128 x 128 where nothing else is said
MAX_AREA = 1440**2                         # [paper] the largest area it generalises to, untrained
TOGETHER = 512                             # [ours] image tokens up to which guidance's two branches share a forward
TRICKS = ("exact length", "bare unconditional branch", "shared forward", "modulation once", "compiled", "channels last", "CUDA graph")   # see bench
LIMIT = 415                                # [checkpoint] the most text tokens that a prompt has: 512 less the 97 of the chat before it

# ---------------------------------------------------------------------------------------------------------------------
# The sampler.

def guide(cond, uncond, guidance):
    """u + g (c - u), each token then scaled to the length of c: [B, N, C]. Without the scaling, guided tokens grow longer
    than any that the decoder has met, and colours burn out."""
    combined = uncond + guidance * (cond - uncond)
    return combined * (cond.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True).clamp_min(1e-12))

@torch.no_grad()
def denoise(model, noise, text, text_mask, grid, steps, guidance, on_step=None, negative=None, negative_mask=None, start=0, together=TOGETHER):
    """Euler's method from noise to tokens.

    noise       [B, h*w, C] fp32, the state at sigma[start]: plain noise for start 0
    text        list of K [B, S, E] or None; text_mask [B, S] bool or None (all visible)
    grid        (h, w); steps: number of levels; guidance: 1.0 is none, and one forward a step
    negative    features of a negative prompt; None means no text at all, and that branch runs on image tokens alone
    on_step     called as on_step(i, x, v) after step i, x [B, h*w, C] at sigma[i + 1]
    Returns tokens [B, h*w, C] fp32. [paper] [checkpoint]"""
    levels = lens.sigmas(noise.shape[1], steps)                                    # [steps + 1] on the CPU: no sync to read one
    dtype = model.proj_out.weight.dtype
    # Nothing below the next four lines but the blocks depends on x: projections of the text, rotary angles and the
    # modulation of every block at every step are made once.
    cond = model.prepare(text, text_mask, grid)
    uncond = model.prepare(negative, negative_mask, grid) if guidance != 1.0 else None
    modulation = model.modulation(levels[:-1].to(noise.device))
    x = noise.float()                                                              # the state stays fp32: twenty small sums
    # Branches that differ in the text alone share one forward while they are small: half the calls, every weight read once.
    shared = uncond is not None and uncond.txt is None and cond.txt is not None and len(x) * x.shape[1] <= together
    gaps = levels.diff().to(x.device)

    def step(x, i):                                                                # i: the step's number, in a CUDA graph [1] on the device
        now = modulation.at(i)
        v, *u = model.velocity_from((torch.cat([x, x]) if shared else x).to(dtype), now, cond).float().split(len(x))       # [B, N, C] each
        if uncond is not None:
            v = guide(v, u[0] if shared else model.velocity_from(x.to(dtype), now, uncond).float(), guidance)
        return x + gaps[i] * v, v

    for i in range(start, steps):
        step = recorded(step, x) if model.graph and i == start + 1 else step       # not the first: what compiles or warms up cannot be recorded
        x, v = step(x, i)
        if on_step:
            on_step(i, x, v)
    return x

def recorded(step, x):
    """step(x, i) as one launch instead of thousands: a GPU draws small pictures faster than Python can ask for kernels. A graph reads and writes
    the same memory each time, so what goes in and comes out is copied. It lives as long as one call of denoise: recording costs about a step."""
    graph, x, i = torch.cuda.CUDAGraph(), x.clone(), torch.zeros(1, dtype=torch.long, device=x.device)
    with torch.cuda.graph(graph):
        out = step(x, i)
    return lambda now, k: (x.copy_(now), i.fill_(k), graph.replay(), tuple(t.clone() for t in out))[-1]

def picture_noise(seed, grid, channels):
    """[1, h*w, C] noise of one picture, from its own seed alone, made on the CPU: the same on every device, in every batch."""
    return torch.randn((1, grid[0] * grid[1], channels), generator=torch.Generator().manual_seed(int(seed)))

def encode(encoder, prompts):
    """Features of prompts, one by one [K, S, E]: equal lengths run together, so there is no padding. Empty prompts give None:
    an empty prompt is never encoded, it is no text at all [checkpoint]."""
    found, by_length = [None] * len(prompts), {}
    for i, (prompt, row) in enumerate(zip(prompts, encoder.tokenize(prompts)[0] if prompts else [])):
        if prompt.strip():
            by_length.setdefault(len(row), []).append(i)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                            # tokenize has already told what was cut
        for chunk in (members[k:k + 64] for members in by_length.values() for k in range(0, len(members), 64)):
            for i, one in zip(chunk, torch.stack(encoder.encode([prompts[i] for i in chunk])[0], 1)):
                found[i] = one
    return found

def settings(notes, steps, guidance):
    """(steps, guidance): as asked, else what the weights' notes say, else the defaults."""
    return steps or int(notes.get("steps", STEPS)), float(notes.get("guidance", GUIDANCE)) if guidance is None else guidance

@torch.no_grad()
def generate(prompts, pipeline=None, weights=TOY, seed=0, seeds=None, height=None, width=None, steps=None, guidance=None, negative="",
             features=None, images=None, strength=1.0, batch_size=16, on_step=None, progress=False):
    """One PIL image a prompt, in order.

    pipeline    (transformer, vae, text encoder or None) already loaded; else `weights` is loaded
    steps, guidance, height, width   None: what the weights say of themselves where they are loaded here, else the defaults above
    seeds       one a picture (default: seed, seed + 1, ...); the same seed gives the same picture in any batch
    features    what `encode` returned for prompts + [negative]; then the text encoder is not needed
    images      one PIL image a prompt to start from, noised to `strength` (1: all noise, as if there were none)"""
    notes = lens.read_metadata(weights) if pipeline is None else {}
    steps, guidance = settings(notes, steps, guidance)
    transformer, vae, encoder = pipeline or lens.load_pipeline(weights, device := pick_device(), pick_dtype(device)[0])
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = list(seeds) if seeds is not None else [seed + i for i in range(len(prompts))]
    device = transformer.proj_out.weight.device
    base = int(notes.get("base", TOY_BASE if transformer.config.in_channels < 128 else BASE))          # what the weights are at home in
    height, width = height or base, width or base
    grid = (height // 16, width // 16)                                             # the autoencoder's 8x, then 2 x 2 to a token
    *features, negative_features = features if features is not None else encode(encoder, prompts + [negative])
    groups = {}                                                                    # equal text lengths share batches
    for i, f in enumerate(features):
        groups.setdefault(0 if f is None else f.shape[1], []).append(i)
    batches = [members[k:k + batch_size] for members in groups.values() for k in range(0, len(members), batch_size)]
    start = min(steps - 1, steps - max(1, round(steps * strength))) if images else 0
    results, bar = {}, tqdm(total=len(batches) * (steps - start), desc="denoise", unit="step", disable=not progress, leave=False)
    for batch in batches:
        noise = torch.cat([picture_noise(seeds[i], grid, transformer.config.in_channels) for i in batch]).to(device)
        if images:
            begin = autoencoder.from_pil([images[i].resize((width, height), Image.LANCZOS) for i in batch])
            x0 = vae.to_tokens(vae.encode(begin.to(device, next(vae.parameters()).dtype))[0]).float()
            noise = lens.add_noise(x0, noise, lens.sigmas(noise.shape[1], steps)[start].item())
        text = None if features[batch[0]] is None else list(torch.stack([features[i] for i in batch], 1).to(device))   # K x [B, S, E], or no text
        unwanted = None if negative_features is None else [layer.expand(len(batch), -1, -1) for layer in negative_features.to(device)]
        step = lambda *now: (bar.update(), on_step(*now) if on_step else None)
        tokens = denoise(transformer, noise, text, None, grid, steps, guidance, step, unwanted, None, start)
        results.update(zip(batch, autoencoder.to_pil(vae.decode(vae.to_latent(tokens, grid).to(next(vae.parameters()).dtype)))))
    bar.close()
    return [results[i] for i in range(len(prompts))]

def attempt(model, vaes, features, noise, grid, steps, guidance, without=(), pad=LIMIT, kernel=None):
    """(tokens, pixels) by all of TRICKS but some. With none it is what one writes first: text padded to `pad` and masked in both branches,
    each block's modulation made anew in every step, nothing compiled. features [K, S, E]; vaes: the plain one, the one in channels last;
    kernel: what pick_attention chose, used where nothing is masked (None: PyTorch chooses). A CUDA graph is for a GPU alone."""
    S, on, model = features.shape[1], lambda trick: trick not in without, copy.copy(model)
    rows = S if on("exact length") else max(S, pad)
    text = [F.pad(layer, (0, 0, 0, rows - S)).expand(len(noise), -1, -1) for layer in features[:, None]]           # K x [B, rows, E]
    seen = (torch.arange(rows, device=noise.device) < S).expand(len(noise), -1)
    other = (None, None) if on("bare unconditional branch") else (text, torch.zeros_like(seen))
    if not on("modulation once"):
        model.modulation = lambda t: lens.Modulation(time := model.time(t), (None,) * len(model.transformer_blocks), model.norm_out["linear"](F.silu(time)))
    model.graph = noise.is_cuda and on("CUDA graph")
    use_attention(kernel if on("exact length") and on("bare unconditional branch") else None)
    with torch.compiler.set_stance("default" if on("compiled") else "force_eager"):
        tokens = denoise(model, noise, text, None if on("exact length") else seen, grid, steps, guidance, None, *other, 0, TOGETHER * on("shared forward"))
        return tokens, (vae := vaes[on("channels last")]).decode(vae.to_latent(tokens, grid).to(features.dtype))

@torch.no_grad()
def bench(args, device):
    """A JSON line a case: seconds from features (toy: from the prompt) to pixels, ours beside a naive one padded to LIMIT and a `tight` one, masked, not
    padded; predicted_s: the first case's by FLOPs; without_..., with_fp8: in units of ours, all tricks but one, and fp8. Random weights but for the toy."""
    for size in [args.size] if args.size else ["toy", "small", *["full"] * (device != "cpu")]:
        (dtype, _), side = pick_dtype(device, args.dtype, lens.SIZES[size].transformer.inner_dim), 1024 if device == "cpu" else 8192
        with torch.device("cpu" if size == "toy" else device):                     # inside a GPU's context transformers would want accelerate
            model, vae, encoder = lens.load_pipeline(TOY, device, dtype) if size == "toy" else (
                lens.LensTransformer(lens.SIZES[size].transformer).to(dtype), autoencoder.LensVAE(lens.SIZES[size].vae).eval().to(dtype), None)
        vaes = (copy.deepcopy(vae).to(memory_format=torch.contiguous_format),
                vae.to(memory_format=torch.channels_last if dtype == torch.bfloat16 else torch.contiguous_format))
        big, rounded = torch.randn(side, side, device=device).to(dtype), lens.to_fp8(copy.deepcopy(model)) if args.fp8 else None
        [lens.quicken(m, v) for m, v in ((model, vae), (rounded, None)) if m and args.compile]
        n, (low, mid, high) = args.steps or STEPS, {"full": (32, 64, 90), "nano": (2, 4, 8)}.get(size, (8, 16, 32))
        for k, (h, batch, steps, g, S) in enumerate([                              # 128: the paper's captions have 109 words
                (mid, 1, n, GUIDANCE, 128), *((h, 1, n, GUIDANCE, 128) for h in (low, high)), (mid, 4, n, GUIDANCE, 128),
                *((mid, 1, 4, g, 128) for g in (GUIDANCE, 1.0)), *((mid, 1, n, GUIDANCE, S) for S in (32, LIMIT))]):
            given = torch.randn(len(model.txt_norm), S, model.config.enc_hidden_dim).to(device, dtype)
            read = lambda: encode(encoder, ["a red circle to the left of a blue square"])[0] if encoder and S == 128 else given
            noise = torch.cat([picture_noise(i, (h, h), model.config.in_channels) for i in range(batch)]).to(device)
            kernel, why = pick_attention(device, dtype, model.config, h * h + S)
            go = lambda *without, pad=LIMIT, model=model: lambda: attempt(model, vaes, read(), noise, (h, h), steps, g, without, pad, kernel)
            with FlopCounterMode(display=False) as counter:
                go("compiled", "CUDA graph")()                                     # which hide their products from the counter
            table = {f"without_{trick.replace(' ', '_')}": go(trick) for trick in TRICKS if k == 0 and
                     {"compiled": args.compile, "CUDA graph": device != "cpu"}.get(trick, True)}
            table.update({"with_fp8": go(model=rounded)} if rounded else {})
            found = autoencoder.race({"ours": go(), "naive": go(*TRICKS), "tight": go(*TRICKS, pad=0), "matmul": lambda: big @ big, **table}, 3, device)
            ours, (a, _), (b, _), work, peak = (found["ours"][1], found["ours"][2], found["naive"][2],
                                                counter.get_total_flops(), 2 * side**3 / found["matmul"][1])
            per_flop = ours / work if k == 0 else per_flop
            autoencoder.tell(
                found, work, peak, device, size=size, dtype=str(dtype)[6:], compiled=args.compile, attention=f"{kernel}: {why}",
                pixels=f"{16 * h}x{16 * h}", image_tokens=h * h, text_tokens=read().shape[1], padded_to=LIMIT, batch=batch, steps=steps, guidance=g,
                predicted_s=per_flop * work, difference=((a - b).norm() / b.norm()).item(), **{name: found[name][1] / ours for name in table})

# ---------------------------------------------------------------------------------------------------------------------
# Devices, sizes, files.

def pick_device(name=None):
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    lens.require(not name.startswith("cuda") or torch.cuda.is_available(), "--device cuda: no CUDA device was found; leave --device out to run on the CPU")
    with lens.told(f"--device {name}: not a device; try cpu or cuda"):
        return str(torch.device(name))

def pick_dtype(device, name=None, width=128):
    """(dtype, why). On a GPU bf16; on a CPU whichever multiplies this model's matrices faster, since only some CPUs have bf16
    instructions (2.9 times faster there, many times slower elsewhere)."""
    if name:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[name], "as asked"
    if device != "cpu":
        return torch.bfloat16, "the GPU's fast type"
    product = lambda dtype: functools.partial(torch.matmul, torch.randn(512, width).to(dtype), torch.randn(width, 4 * width).to(dtype))
    seconds = autoencoder.race({dtype: product(dtype) for dtype in (torch.float32, torch.bfloat16)}, 9, device)
    ratio = seconds[torch.float32][1] / seconds[torch.bfloat16][1]
    return (torch.bfloat16 if ratio > 1.5 else torch.float32), f"bf16 products run {ratio:.1f}x as fast as fp32 here"

KERNELS = dict(flash=SDPBackend.FLASH_ATTENTION, cudnn=SDPBackend.CUDNN_ATTENTION, efficient=SDPBackend.EFFICIENT_ATTENTION, math=SDPBackend.MATH)
CHOICE = contextlib.ExitStack()            # holds what use_attention has entered

def use_attention(kernel=None, alone=False):
    """For the whole process: this kernel behind scaled_dot_product_attention, then those after it in KERNELS (alone: none). None: PyTorch's own choice."""
    CHOICE.close()
    if kernel:                                                                     # those after it do what it cannot: a mask, a wide head
        order = [KERNELS[kernel]] if alone else [*KERNELS.values()][[*KERNELS].index(kernel):]
        CHOICE.enter_context(sdpa_kernel(order, set_priority=True))

@functools.cache
def pick_attention(device, dtype, config, tokens, learns=False):
    """(kernel, why): the fastest for sequences of so many tokens, measured; learns: masked and with its backward pass, as training has it. PyTorch's
    own order is fixed, cuDNN last: on a CPU its first, flash, wins every forward (1.3 to 5 times as fast at 64 to 1024 tokens) and in fp32
    loses no backward, but in bf16 its backward takes twice as long as plain products at 104 tokens, and mostly less from 256 on."""
    if device == "cpu" and not learns:
        return "flash", "the fastest forwards on a CPU"
    q = torch.randn(3 * learns + 1, tokens, config.num_attention_heads, config.attention_head_dim, device=device, dtype=dtype, requires_grad=learns)
    mask = torch.ones(len(q), 1, 1, tokens, dtype=torch.bool, device=device) if learns else None

    def run(kernel):
        use_attention(kernel, alone=True)                                          # what it cannot do is an error then
        out = F.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, mask)       # laid out as the blocks have it
        out.backward(out) if learns else None
    able = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kernel in KERNELS:
            with contextlib.suppress(RuntimeError):
                run(kernel)
                able[kernel] = functools.partial(run, kernel)
    seconds = {kernel: median for kernel, (_, median, _) in autoencoder.race(able, 5, device).items()}
    use_attention()
    best = next(kernel for kernel, s in seconds.items() if s < 1.1 * min(seconds.values()))                # of equals the first: runs agree
    return best, ", ".join(f"{kernel} {1000 * s:.2g} ms" for kernel, s in seconds.items())

def pick_size(height, width, aspect, base):
    """(height, width) from what was asked, or LensError: sides divisible by 16, ratio within 1:2 and 2:1, area to 1440^2."""
    if height or width:
        height, width = height or width, width or height
        lens.require(not aspect, "give --aspect and --base, or --height and --width, not both")
    else:
        with lens.told("--aspect"):
            height, width = data.bucket(base, aspect or "1:1")
    lens.require(min(height, width) > 0 and height % 16 == width % 16 == 0,
                 f"size {height} x {width}: both sides must be positive and divisible by 16 "
                 f"(say {max(16, height // 16 * 16)} x {max(16, width // 16 * 16)})")
    lens.require(max(height, width) <= 2 * min(height, width), f"size {height} x {width}: the ratio must lie between 1:2 and 2:1")
    # two sizes of the checkpoint's own table, 1040 x 2080 and 1088 x 1936, are a few rows above the limit
    lens.require(height * width <= MAX_AREA or (min(height, width), max(height, width)) in data.PAPER_BUCKETS[1440],
                 f"size {height} x {width}: the area is above 1440 x 1440, the largest that the model was tried at")
    return height, width

def identity(folder, part="transformer"):
    """A short name for a part's weights: folder name and a hash of what the files say of themselves (header, size, date)."""
    digest = hashlib.sha256()
    for file in (*lens.locate(folder, part)[0], *(Path(folder).glob("adapter_model.safetensors") if part == "transformer" else ())):
        with open(file, "rb") as f:
            digest.update(f.read(1 << 16))
        digest.update(str((file.name, file.stat().st_size, file.stat().st_mtime_ns if part == "text_encoder" else 0)).encode())
    return f"{Path(folder).name}-{digest.hexdigest()[:10]}"

def cached_features(folder, prompts, device, dtype, date, cache, encoder=None):
    """Features of prompts from the disk cache, encoding what is not there. -> list as from `encode`. The key covers encoder, date and text. When all are
    there the encoder is not even loaded; else it is loaded, used and let go before the denoiser comes: a 24 GB card never has to hold both."""
    encoder_id = identity(lens.part_folder(folder, "text_encoder"), "text_encoder") if cache else ""
    key = lambda prompt: hashlib.sha256("\0".join((encoder_id, date, str(dtype), prompt)).encode()).hexdigest()
    paths = [Path(cache) / f"{key(p)}.safetensors" if cache and p.strip() else None for p in prompts]
    found = {}
    for i, path in enumerate(paths):
        if path and path.exists():
            with contextlib.suppress(LensError), lens.open_safetensors(path) as f:  # a spoilt cache entry is made again
                found[i] = f.get_tensor("features")
    missing = [i for i in range(len(prompts)) if i not in found and prompts[i].strip()]
    if missing:
        encoder = encoder or lens.load_pipeline(folder, device, dtype, parts=("text_encoder",), date=date)[2]
        for i, f in zip(missing, encode(encoder, [prompts[i] for i in missing])):
            found[i] = f.cpu()
            if paths[i]:
                try:
                    lens.write_safetensors(paths[i], {"features": found[i]})
                except LensError as e:                                           # a full or read-only disk costs the cache, not the picture
                    print(f"note: prompt features were not cached: {e}", file=sys.stderr)
                    paths = [None] * len(paths)
    return [found.get(i) for i in range(len(prompts))]

def check_writable(folder):
    """LensError where nothing can be written to folder: asked before the work, not found out after it."""
    lens.replace_file(Path(folder) / ".writable", lambda new: new.write_text(""))
    (Path(folder) / ".writable").unlink()

def save_png(image, path, notes):
    """Writes beside and renames; notes become PNG text chunks (UTF-8), which any image viewer shows."""
    info = PngImagePlugin.PngInfo()
    [info.add_itxt(name, str(value)) for name, value in notes.items()]
    lens.replace_file(path, lambda new: image.save(new, "PNG", pnginfo=info))

def strange_words(prompts, notes):
    """Words of the prompts that the model never saw in training, where its weights say which it saw (the toy's do)."""
    known = set(json.loads(notes.get("words", "[]")))
    words = {w for p in prompts for w in "".join(c if c.isalnum() else " " for c in p.lower()).split()}
    return sorted(words - known) if known else [], known

# ---------------------------------------------------------------------------------------------------------------------
# The checker: pixels in, facts out. Colour segmentation, connected regions, and shape by moments.

Found = collections.namedtuple("Found", "shape color size x y")      # shape: one of data.SHAPES, or "unclear"; size and place: shares of the side

def _regions(labels):
    """Connected regions (4 neighbours, equal label > 0) of an integer map [H, W]: list of (rows, columns) index arrays."""
    height, width = labels.shape
    flat, regions = labels.ravel().copy(), []
    for start in np.flatnonzero(flat):
        if not flat[start]:
            continue
        label, stack, members = flat[start], [int(start)], []
        flat[start] = 0                                                            # visited
        while stack:
            i = stack.pop()
            members.append(i)
            x = i % width
            for j in ((i - 1) if x else -1, (i + 1) if x + 1 < width else -1, i - width, i + width):
                if 0 <= j < flat.size and flat[j] == label:
                    flat[j] = 0
                    stack.append(j)
        regions.append(np.divmod(np.array(members), width))
    return regions

def _signature(weight, ys, xs):
    """A region's centre, equal-area radius (pixels), and shape numbers that do not depend on size, place or rotation. With z the offset from the centre as
    a complex number in units of that radius, |mean z^k| is large for a shape of k-fold symmetry (3: triangle, 4: square and cross, 5: star) and 0 for a
    disc; mean |z|^2 tells compact from spread shapes, and the cover near the centre a ring. Sums over areas: a pixel more or less hardly matters."""
    total = weight.sum()
    cx, cy = (weight * xs).sum() / total, (weight * ys).sum() / total
    radius = math.sqrt(total / math.pi)
    z = ((xs - cx) + 1j * (ys - cy)) / radius
    moment = lambda k: abs((weight * z**k).sum() / total)
    middle = np.abs(z) < 0.36
    hollow = 1 - weight[middle].sum() / max(math.pi * (0.36 * radius) ** 2, 1.0)
    return cx, cy, radius, np.array([(weight * np.abs(z) ** 2).sum() / total, moment(3), moment(4), moment(5), 0.5 * hollow])

@functools.cache
def _references():
    """Mean shape numbers of each shape, measured on drawn ones: [6, 5], and their spread over all shapes: [5]."""
    rng, table, spread = np.random.default_rng(0), [], []
    for shape in data.SHAPES:
        rows = []
        for k in range(24):
            obj = data.Object(shape, "red", 0.10 + 0.07 * k / 23, 0.5 + rng.uniform(-.01, .01), 0.5 + rng.uniform(-.01, .01),
                              rng.uniform(0, 6.3), "plain", (0, 0, 0))
            cover = data.coverage(obj, 80, 80)
            ys, xs = np.nonzero(cover)
            rows.append(_signature(cover[ys, xs], ys, xs)[3])
        table.append(np.mean(rows, 0))
        spread.append(np.std(rows, 0))
    return np.array(table), np.sqrt(np.mean(np.square(spread), 0)) + 0.012

UNCLEAR = 12.0           # this many spreads from every reference, a region is no shape at all
HUES = np.array([colorsys.rgb_to_hsv(*(v / 255 for v in rgb))[0] for rgb in data.COLORS.values()])

def look(image):
    """(list of Found, background luminance in [0, 1]) of a PIL image or uint8 array [H, W, 3]."""
    rgb = np.asarray(image, np.float32)[..., :3] / 255
    (height, width), low, high = rgb.shape[:2], rgb.min(-1), rgb.max(-1)
    chroma = high - low                                                            # [H, W]: 0 on greys, about 0.7 on objects
    (r, g, b), safe = np.moveaxis(rgb, -1, 0), np.maximum(chroma, 1e-6)
    hue = np.where(high == r, (g - b) / safe, np.where(high == g, 2 + (b - r) / safe, 4 + (r - g) / safe)) / 6 % 1
    gap = np.abs(hue[..., None] - HUES)
    nearest = np.minimum(gap, 1 - gap).argmin(-1) + 1
    labels = np.where(chroma > 0.22, nearest, 0)
    empty = chroma < 0.10
    tone = float(rgb.mean(-1)[empty].mean()) if empty.any() else 0.5
    (table, spread), found = _references(), []
    for ys, xs in _regions(labels):
        if len(ys) < 0.30 * math.pi * data.SIZE_RANGES["small"][0] ** 2 * height * width:   # specks: under a third of the smallest object
            continue
        c = chroma[ys, xs]
        weight = (2 * c / np.quantile(c, 0.8) - 0.5).clip(0, 1)                    # half-covered rim pixels count a half
        cx, cy, radius, numbers = _signature(weight, ys, xs)
        distance = np.sqrt((((numbers - table) / spread) ** 2).mean(1))
        k = int(distance.argmin())
        found.append(Found(data.SHAPES[k] if distance[k] < UNCLEAR else "unclear", list(data.COLORS)[labels[ys[0], xs[0]] - 1],
                           radius / math.sqrt(height * width), (cx + 0.5) / width, (cy + 0.5) / height))
    return found, tone

def check(image, claims, seen=None):
    """Which of the facts hold in the picture: list of bool. image: PIL or uint8 [H, W, 3]; claims: list of Fact; seen: look(image)."""
    found, tone = seen or look(image)
    match = lambda ref: [o for o in found if ref[0] in (None, o.shape) and ref[1] in (None, o.color)]

    def holds(fact):
        mine = match(fact.subject)
        if fact.kind == "total":
            return len(found) == fact.value
        if fact.kind == "count":
            return len(mine) == fact.value
        if fact.kind == "size":
            return bool(mine) and all((o.size < data.SIZE_LIMIT) == (fact.value == "small") for o in mine)
        if fact.kind == "place":
            row, column = next((i, row.index(fact.value)) for i, row in enumerate(data.PLACES) if fact.value in row)
            inside = lambda v, k: k / 3 - data.CELL_TOLERANCE <= v <= (k + 1) / 3 + data.CELL_TOLERANCE
            return any(inside(o.x, column) and inside(o.y, row) for o in mine)
        if fact.kind == "relation":
            dx, dy = data.RELATIONS[fact.value]
            return any((a.x - b.x) * dx + (a.y - b.y) * dy > data.RELATION_TOLERANCE for a in mine for b in match(fact.other) if a is not b)
        nearest_tone = min(data.TONES, key=lambda name: abs(sum(data.TONES[name]) / 2 - tone))
        return nearest_tone == fact.value
    return [holds(fact) for fact in claims]

# ---------------------------------------------------------------------------------------------------------------------
# Requests as people type them, and what a reasoner is asked to make of them.

# Words that people use and captions never do. Only requests hold them, so the denoiser has not seen them; the reasoner
# learns to put them into the words of the captions.
VAGUE = {"circle": ("disc", "dot"), "square": ("box", "block"), "triangle": ("pyramid", "wedge"), "star": ("asterisk", "starlet"),
         "cross": ("plus", "plus sign"), "ring": ("hoop", "donut"), "red": ("crimson", "scarlet"), "orange": ("tangerine", "amber"),
         "yellow": ("lemon", "golden"), "green": ("emerald", "grassy"), "cyan": ("turquoise", "teal"), "blue": ("navy", "cobalt"),
         "purple": ("violet", "lilac"), "pink": ("rosy", "magenta"),
         "two": ("a couple of", "a pair of"), "three": ("a trio of", "three"), "four": ("a quartet of", "four"),
         "to the left of": ("left of", "on the left side of"), "to the right of": ("right of", "on the right side of"),
         "above": ("over", "on top of"), "below": ("under", "beneath")}

def request(scene, details, rng, vague=False):
    """A brief request for the scene, as a person would type it: "two red circles"; vague ones swap words by VAGUE."""
    say = lambda word: str(VAGUE[word][rng.integers(2)]) if vague and word in VAGUE and rng.random() < 0.6 else word
    phrases = []
    for shape, color, _, members in data.grouped(scene, details):
        n, noun, hue = len(members), say(shape), say(color) if color else ""
        lead = say(data.NUMBERS[n]) if n > 1 else "an" if (hue or noun)[0] in "aeiou" else "a"
        phrases.append(" ".join(w for w in (lead, hue, noun if n == 1 else data.plural(noun)) if w))
    if "relation" in details:
        first, second = phrases
        return f"{first} {say(data.relation_of(*scene.objects[:2]))} {second}"
    return data.listing(phrases)

REWRITE = "Rewrite the request as a description of one picture."
# What a system message can ask of the reasoner, and the detail that it then writes out. Two wordings each.
GUIDELINES = {"size": ("State the size of every object.", "Say how large each object is."),
              "place": ("State where every object is.", "Give the place of each object."),
              "relation": ("Say how the objects stand to each other.", "Describe the relations between objects."),
              "background": ("Describe the background.", "Say what is behind the objects."),
              "color": ("Give every object a color.", "Name a color for each object.")}

def rewriting(scene, rng, vague):
    """One exercise for the reasoner: (instructions, request, the dense caption that follows both)."""
    asked = data.details_for(scene, rng, "brief")
    chosen = [d for d in GUIDELINES if rng.random() < 0.55]
    rng.shuffle(chosen)
    instructions = " ".join([REWRITE] + [GUIDELINES[d][rng.integers(2)] for d in chosen])
    pair = scene.task not in ("single_object", "counting", "colors")
    details = frozenset(d for d in set(asked) | set(chosen) if d != "relation" or pair)
    return instructions, request(scene, asked, rng, vague), data.caption(scene, details, rng)

# What a reasoner is told: the paper's rules in our words. The toy's knows only the sentences that it was trained on; these two did best [ours].
SYSTEM = """Turn the user's request into one dense prompt for a text-to-image model that was trained on detailed captions. \
Settle on one concrete scene. Whatever the user said stays as it is:
objects, numbers, colors, names, quoted text, relations; add only what was left open. \
Describe each of several subjects apart: its look, its place, how it stands to the others. Write out what
follows from the request: if it shows the answer to 2+2, write "2+2=4". \
Then background, light, style, viewpoint. State things as they are: no maybe, no alternatives.
Reply in the user's language with the prompt alone: one paragraph of about 100 words."""
TOY_SYSTEM = " ".join([REWRITE, GUIDELINES["color"][0], GUIDELINES["place"][0]])
# harmony: the one channel for the user; and what is left of harmony where special tokens were dropped
FINAL = r"(?s)<\|channel\|>\s*final\b.*?<\|message\|>(.*?)(?=<\|(?:end|return|start|channel|call)\|>|$)"
BARE = r"(?s)^.*assistantfinal|^(?:analysis|commentary)(?=[A-Z\"“]).*$"
THINK = r"(?is)<(think|thinking|reasoning|analysis)>.*?(?:</\1>|$)|^.*</(?:think|thinking|reasoning|analysis)>"
ITEM = r"(?im)^\W{0,3}(?:(?:option|version|variant|variante|opción|вариант|选项|方案)\s*\w{1,2}\b\W*|\d{1,2}[.)]\W*\s|[a-c]\)\s)"
LABEL = (r"(?i)^\W*(?:(?:here(?: is|['’]s)|the|your|final|new|rewritten|revised|improved|enhanced|detailed|dense|image)\s+)*"
         r"(?:prompt|description|提示词|改写)\W*?[:：]\W*?(?=[\w\"“'«「])")
CHATTER = (r"(?is)\n\s*\W*(?:let me know|feel free|i hope|hope this|would you like|if you(?:'d| would)? (?:like|want)|note|explanation|this prompt)\b.*")
QUOTED = r"""\*\*([^*]+)\*\*|"([^"]+)"|“([^“”]+)”|„([^“”]+)[“”]|'([^']+)'|‘([^‘’]+)’|«([^«»]+)»|「([^「」]+)」|`([^`]+)`"""
REFUSAL = (r"(?i)(?:i['’]?m (?:\w+ )?sorry|sorry,? (?:but )?i|i (?:can(?:no|['’])t|can not|won['’]t|am (?:unable|not able))\b|"
           r"i['’]m (?:unable|not able)|as an ai\b|unfortunately,? i|很?抱歉|对不起|我(?:无法|不能)|申し訳|すみません|죄송|"
           r"(?:je suis )?désolée?\b|je ne peux pas|lo siento|no puedo|(?:es )?tut mir leid|ich kann \w* ?nicht|"
           r"извините|к сожалению|mi dispiace|desculpe)")

def clean(raw):
    """A language model's raw answer -> the one prompt in it, one paragraph; "" where there is none: empty, refused, cut off while it still reasoned."""
    text = (re.findall(FINAL, raw) or [""])[-1] if "<|channel|>" in raw else re.sub(BARE, "", raw.strip())
    text = lens.strip_markers(re.split(r"<\|(?:end|return|call|im_end|endoftext|eot_id)\|>", re.sub(THINK, "", text))[0])
    text = re.sub(CHATTER, "", (fence[1] if (fence := re.search(r"(?s)```[\w-]*[ \t]*\n?(.*?)(?:```|$)", text)) else text).strip())
    text = re.sub(r"\A(?:[^\n]{0,120}[:：][*_ ]*\n\s*)+", "", text)              # "Here is your prompt:", in any language
    starts = [m.start() for m in re.finditer(ITEM, text)]
    text = re.sub(ITEM, "", text[:starts[1]]) if len(starts) > 1 and starts[0] == 0 else text          # several to choose from: the first
    text = " ".join(re.sub(LABEL, "", re.sub(r"(?m)^\s*(?:[-*•]|#+)\s+", "", text)).split())
    while quoted := re.fullmatch(QUOTED, text):
        text = quoted[quoted.lastindex].strip()
    return "" if re.match(REFUSAL, text) or not any(c.isalnum() for c in text) else text

ANY = lambda words: "(" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"
PLAIN = {word: name for name, words in VAGUE.items() for word in words}
SPOT = {words: (x, y) for y, row in enumerate(data.PLACES) for x, place in enumerate(row) for words in data.PLACE_WORDS[place]}
NOUN = rf"(?:(?:small|large) )?(?:{ANY(data.COLORS)} )?{ANY(data.SHAPES)}(?:es|s)?\b"

def keeps(request, answer):
    """The toy world's check: all words, numbers, colors and relations of the request stand in the answer, which adds no object, and can be drawn."""
    plain = [re.sub(rf"(?<!to the )\b{ANY(PLAIN)}(e?s)?\b", lambda m: data.plural(PLAIN[m[1]]) if m[2] else PLAIN[m[1]], text.lower())
             for text in (request, answer)]
    asked, found = ([(n.rstrip("n"), *noun) for n, *noun in re.findall(rf"\b(an?|two|three|four) {NOUN}", text)] for text in plain)
    wanted, said = (re.findall(rf"\b{NOUN}(?: is)? {ANY(data.RELATIONS)} (?:an?|the) {NOUN}", text) for text in plain)
    (words, known), spots = (set(re.findall(r"\w+", text)) for text in plain), re.findall(rf"\b{ANY(SPOT)}\b", plain[1])
    at = {(color, shape): SPOT[spot] for color, shape, spot in re.findall(rf"\b{NOUN}(?: is)? {ANY(SPOT)}\b", plain[1])}
    among = lambda claims, others: all(any(all(a in ("", b) for a, b in zip(claim, other)) for other in others) for claim in claims)
    possible = len({SPOT[s] for s in spots}) == len(spots) and all(sum((p - q) * d for p, q, d in zip(at[c, s], at[e, t], data.RELATIONS[r])) > 0
                                                                   for c, s, r, e, t in said if {(c, s), (e, t)} <= at.keys())
    return (len(asked) == len(found) > 0 and among(asked, found) and among(wanted, said) and words <= known | {"a", "an", "the", "and", "of"} and possible)

def encoder_writes(encoder, system, requests, seed, trial):
    """The text encoder itself as the reasoner: its raw answers. The first trial takes the likeliest tokens; later ones add Gumbel noise
    of each request's own seed to their scores, which is to sample at temperature 0.7, and the same in any batch."""
    lens.require(hasattr(encoder.model, "lm_head"), "this text encoder was stored without its head and cannot write: "
                                                    "name another reasoner with --endpoint URL --model NAME")
    rows, answers = [], {}
    # released ones ask for today's date: a prompt would drift
    template = re.sub(r"strftime_now\([^)]*\)", "current_date", encoder.tokenizer.get_chat_template())
    for request in requests:
        chat = [{"role": role, "content": lens.strip_markers(words)}               # nothing leaves its turn
                for role, words in (("system", system), ("user", request))]
        said = encoder.tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True,
                                                     reasoning_effort="low", enable_thinking=False, current_date=encoder.date)
        rows.append(encoder.tokenizer(said, add_special_tokens=False)["input_ids"])
    for length in set(map(len, rows)):                                             # equal lengths run together: no padding
        members = [i for i, row in enumerate(rows) if len(row) == length]
        own = [torch.Generator().manual_seed(int(hashlib.sha256(f"{seed} {trial} {requests[i]}".encode()).hexdigest()[:12], 16)) for i in members]
        noise = lambda _, scores: scores - 0.7 * torch.stack(
            [torch.empty(scores.shape[1]).exponential_(generator=g).log() for g in own]).to(scores) if trial else scores
        ids = torch.tensor([rows[i] for i in members], device=encoder.model.device)                    # [B, L]
        new = encoder.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=512, do_sample=False, logits_processor=[noise])
        answers.update(zip(members, encoder.tokenizer.batch_decode(new[:, length:])))
    return [answers[i] for i in range(len(rows))]

def reason(writes, requests, system, seed=0, faithful=None, trials=8, longest=2000):
    """[request] -> [prompt]. writes(system, requests, seed, trial) -> raw answers, or None. What is empty, refused or not faithful(request, prompt)
    is asked for again from another seed; after the last trial the user's own words stand, and a notice says so. So do requests of more than `longest`
    characters: the text encoder reads no more than that."""
    prompts, trial, tell = {}, 0, lens.strip_markers
    # what cannot be checked stays as it is
    able = [r for r in dict.fromkeys(requests) if len(r) <= longest and (faithful is None or faithful(tell(r), tell(r)))]
    while (left := [r for r in able if r not in prompts]) and trial < trials:
        cleaned = [clean(raw or "") for raw in writes(system, left, seed, trial)]
        prompts.update((r, p) for r, p in zip(left, cleaned) if p and (faithful is None or faithful(tell(r), p)))
        trial += 1
    if kept := {r for r in requests if r not in prompts}:
        print(f"note: no usable prompt from the reasoner for {len(kept)} of {len(set(requests))} requests, "
              f"which stay as they are: {lens.some(kept)}", file=sys.stderr)
    return [prompts.get(r, r) for r in requests]

def reasoner(args, notes, encoder):
    """`reason` as the flags say: by the endpoint if one is named, else by the text encoder. Only the toy's weights say which words they know."""
    def endpoint_writes(system, requests, _, trial):                              # its journal would give the same answer to a second trial
        answers = (ask.ask([[{"role": "system", "content": system}, {"role": "user", "content": r}] for r in requests])
                   if trial == 0 else [None] * len(requests))
        lens.require(trial or any(a is not None for a in answers),
                     f"no answer from the reasoner at {ask.url} ({', '.join(sorted(set(ask.failed)))}): --endpoint URL goes up to and "
                     "with /v1, --model NAME is one that it serves, its key is read from the environment variable LENS_API_KEY")
        return answers
    with lens.told(f"cannot read --system-prompt {args.system_prompt}"):
        system = Path(args.system_prompt).read_text(encoding="utf-8").strip() if args.system_prompt else TOY_SYSTEM if "words" in notes else SYSTEM
    ask = data.Endpoint(args.endpoint, args.model, Path(args.out) / "reasoner.jsonl") if args.endpoint else None
    return functools.partial(reason, endpoint_writes if ask else functools.partial(encoder_writes, encoder), system=system,
                             seed=args.seed, faithful=keeps if "words" in notes else None)

# ---------------------------------------------------------------------------------------------------------------------
# Evaluation on the toy world: held-out prompts, the checker, and the Fréchet distance.

EVAL_SEED = 20_260_523                     # training draws its scenes from (seed, epoch, index) with other seeds

def sampled(seed, epoch, index, height, width, task=None, style="dense"):
    """data.sample with the words of a style: dense (a caption), brief or vague (a request)."""
    say = data.caption if style == "dense" else functools.partial(request, vague=style == "vague")
    return data.sample(seed, epoch, index, height, width, task, style, say)

def held_out(task, count, height, width, style="dense"):
    """[(scene, facts, prompt)] of one task that no training run draws."""
    drawn = (sampled(EVAL_SEED, data.TASKS.index(task), i, height, width, task, style) for i in range(count))
    return [(scene, data.facts(scene, details), prompt) for scene, details, prompt in drawn]

@torch.no_grad()
def round_trip(vae, device, scenes=500, noise=0.0):
    """Share of drawn scenes that keep every fact after pixels -> tokens -> pixels: what a perfect denoiser would score; at least
    0.98 is what we ship. With noise, that much is added to every (unit-variance) token first: a denoiser is never exact either."""
    passed, sizes, dtype = 0, [size for area in data.BUCKETS for size in data.BUCKETS[area]], next(vae.parameters()).dtype
    for i in tqdm(range(scenes), desc="round trip", leave=False):
        scene, details, _ = data.sample(1_000_003, 0, i, *(size := sizes[i % len(sizes)]))     # the facts a dense caption of it states
        pixels = torch.from_numpy(np.array(data.draw(scene, *size)))[None]               # [1, H, W, 3]
        tokens = vae.to_tokens(vae.encode(autoencoder.to_images(pixels, device).to(dtype))[0]).float()
        tokens = tokens + noise * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(i)).to(device)
        image = autoencoder.to_pil(vae.decode(vae.to_latent(tokens, (size[0] // 16, size[1] // 16)).to(dtype)))[0]
        passed += all(check(image, data.facts(scene, details | {"color"})))
    return passed / scenes

def diversity(tokens): return (2 * tokens.float().var(0, correction=1)).mean().sqrt().item()   # [G, N, C] of one prompt: RMS distance

@torch.no_grad()
def evaluate(pipeline, height, width, steps, guidance, per_task=50, seed=0, style="dense", rewrite=None, progress=True):
    """-> (scores, pictures, prompts). scores: the six tasks' shares of prompts all of whose facts hold, `overall` (their mean),
    and `fidelity`: Fréchet distance to the drawn pictures of the same prompts. rewrite: [prompt] -> [prompt], the reasoner."""
    rows = [(task, *row) for task in data.TASKS for row in held_out(task, per_task, height, width, style)]
    prompts = [prompt for *_, prompt in rows]
    pictures = generate(rewrite(prompts) if rewrite else prompts, pipeline, seed=seed, height=height, width=width, steps=steps,
                        guidance=guidance, batch_size=32, progress=progress)
    passed = [all(check(picture, claims)) for picture, (_, _, claims, _) in zip(pictures, rows)]
    drawn = [data.draw(scene, height, width) for _, scene, _, _ in rows]
    tasks = {task: sum(p for p, row in zip(passed, rows) if row[0] == task) / per_task for task in data.TASKS}
    fidelity = autoencoder.frechet_distance(*(autoencoder.fidelity_features(pipeline[1], autoencoder.from_pil(images)) for images in (pictures, drawn)))
    return {"overall": round(sum(tasks.values()) / len(tasks), 4), **tasks, "fidelity": round(fidelity, 3)}, pictures, prompts

# ---------------------------------------------------------------------------------------------------------------------
# The command line.

def read_prompts(path):
    """Prompts of a file: plain lines, or JSON lines with a `prompt` field (GenEval's) -> (prompts, metadata per prompt or None)."""
    with lens.told(f"cannot read prompts from {path}"):
        lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [json.loads(line) for line in lines] if str(path).endswith((".jsonl", ".json")) else None
        prompts = [row["prompt"] for row in rows] if rows else lines
    lens.require(prompts and all(isinstance(p, str) and p.strip() for p in prompts), f"{path}: no prompts, or an empty one, in the file")
    return prompts, rows

def complain(message):
    """argparse's own errors (an unknown flag, a number that is none) as everybody else's: one line, exit code 2."""
    raise LensError(message)

def arguments(argv):
    parser = argparse.ArgumentParser(description="Make pictures from prompts, or score a model on the six tasks of the toy world.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=__doc__[__doc__.index("    python"):__doc__.index("The sampler is")])
    parser.error = complain
    what = parser.add_argument_group("what to make")
    what.add_argument("--prompt", action="append", help="what the picture shows; may be given more than once")
    what.add_argument("--prompts-file", help="a line a prompt; .jsonl with GenEval's fields is written in the folders that its evaluator reads")
    what.add_argument("--negative", default="", help="what it should not show; empty: no text at all")
    what.add_argument("--seed", type=int, default=0, help="of the first picture; the next have seed + 1, + 2, ...")
    what.add_argument("--num", type=int, default=1, help="pictures a prompt")
    what.add_argument("--image", help="a picture to start from")
    what.add_argument("--strength", type=float, default=0.7, help="how much of --image is redrawn, above 0 to 1")
    how = parser.add_argument_group("how")
    how.add_argument("--steps", type=int, help=f"Euler steps (default: what the weights say, else {STEPS})")
    how.add_argument("--guidance", type=float, help=f"1.0: none, one forward a step (default: what the weights say, else {GUIDANCE})")
    how.add_argument("--aspect", help="W:H, such as 16:9; any from 1:2 to 2:1")
    how.add_argument("--base", type=int, help=f"the area is base x base pixels (default: what the weights say, else {BASE})")
    how.add_argument("--height", type=int, help="pixels, divisible by 16 (instead of --aspect and --base)")
    how.add_argument("--width", type=int, help="pixels, divisible by 16")
    model = parser.add_argument_group("the model")
    model.add_argument("--weights", default=str(TOY), help="a folder or hub id in diffusers layout (default: the toy)")
    model.add_argument("--size", help="check that the weights are of this size: " + ", ".join(lens.SIZES))
    model.add_argument("--lora", help="a LoRA file or folder, merged into the weights")
    model.add_argument("--lora-strength", type=float, default=1.0)
    model.add_argument("--device", help="cpu or cuda (default: CUDA if there is one)")
    model.add_argument("--dtype", choices=("fp32", "bf16"), help="default: the faster one, measured on a CPU")
    model.add_argument("--date", default=lens.DATE, help=f"written into the chat around the prompt; frozen at {lens.DATE} so that a seed keeps its picture")
    model.add_argument("--compile", action="store_true", help="faster after a minute or more: for many pictures (on a CPU needs a C++ compiler)")
    model.add_argument("--cuda-graph", action="store_true", help="record a step on the GPU and play it back: faster where pictures are small")
    model.add_argument("--fp8", action="store_true", help="8-bit products on the image tokens: faster on an H100 or newer, not to the last digit")
    words = parser.add_argument_group("the reasoner")
    words.add_argument("--reason", action="store_true", help="rewrite each prompt into a dense one first, as the pictures' captions in training were")
    words.add_argument("--system-prompt", metavar="FILE", help="what the reasoner is told (default: the project's own; rl.py --search finds others)")
    words.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible, up to /v1 (default: the text encoder); its key is read from LENS_API_KEY")
    words.add_argument("--model", default="default", help="the endpoint's model")
    out = parser.add_argument_group("out")
    out.add_argument("--out", default="out", help="folder for the pictures")
    out.add_argument("--cache", default=str(Path.home() / ".cache" / "lens"), help="folder for prompt features, '' for none")
    score = parser.add_argument_group("score")
    score.add_argument("--eval", action="store_true", help="the six-task table on held-out scenes; the last line is JSON")
    score.add_argument("--bench", action="store_true", help="our path beside a naive one, a JSON line a case; see --size, --steps, --dtype, --compile, --fp8")
    score.add_argument("--per-task", type=int, default=50, help="prompts a task")
    score.add_argument("--requests", choices=("dense", "brief", "vague"), default="dense", help="how the held-out scenes are asked for")
    args = parser.parse_args(argv)
    lens.require(min(args.steps or 1, args.num) > 0 and args.steps != 0 and args.per_task > 1, "--steps and --num must be at least 1, --per-task at least 2")
    lens.require(0 < args.strength <= 1, f"--strength {args.strength}: must be above 0 and at most 1")
    lens.require(args.size in (None, *lens.SIZES), f"unknown size '{args.size}': choose one of {', '.join(lens.SIZES)}")
    lens.require(args.eval or args.bench or args.prompt or args.prompts_file, "nothing to do: give --prompt, --prompts-file or --eval (--help explains)")
    lens.require(all(p.strip() for p in args.prompt or []), "--prompt is empty: say what the picture should show")
    lens.require(args.reason or not (args.system_prompt or args.endpoint), "--system-prompt and --endpoint tell the reasoner what to do: add --reason")
    return args

def main(argv=None):
    args = arguments(argv)
    device = pick_device(args.device)
    lens.require(not args.cuda_graph or device != "cpu", "--cuda-graph is for a GPU: leave it out on the CPU")
    lens.require(not args.fp8 or device == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9) and args.dtype != "fp32",
                 "--fp8 is for bf16 on a GPU with fp8 products (L4, RTX 4090, H100 or newer): leave it out")
    if args.bench:
        return bench(args, device)
    folder = lens.fetch(args.weights, ("transformer", "vae", "text_encoder"))
    files, config = lens.locate(folder, "transformer")
    notes = lens.read_metadata(folder)
    lens.require(not (args.size and config) or lens.LensConfig.from_dict(config) == lens.SIZES[args.size].transformer,
                 f"--size {args.size}: the weights in {args.weights} are of another size")
    args.steps, args.guidance = settings(notes, args.steps, args.guidance)
    height, width = pick_size(args.height, args.width, args.aspect, args.base or int(notes.get("base", BASE)))
    dtype, why = pick_dtype(device, args.dtype, (config or {}).get("inner_dim", 1536))
    kernel, why_kernel = pick_attention(device, dtype, lens.LensConfig.from_dict(config or {}), height * width // 256 + 128)
    use_attention(kernel)
    print(f"{device}, {str(dtype)[6:]} ({why}), {kernel} attention ({why_kernel}); {args.steps} steps, guidance {args.guidance:g}, "
          f"{width} x {height} pixels")
    out = Path(args.out)
    prompts, rows = read_prompts(args.prompts_file) if args.prompts_file else (args.prompt or [], None)
    with lens.told(f"cannot read --image {args.image}"):
        start = Image.open(args.image).convert("RGB") if args.image else None
    check_writable(out)
    read = lambda: lens.load_pipeline(folder, device, dtype, parts=("text_encoder",), date=args.date)[2]

    def load():                                                                    # the denoiser and the VAE, LoRA merged
        transformer, vae, _ = lens.load_pipeline(folder, device, dtype, parts=("transformer", "vae"))
        print(f"LoRA: {lens.load_lora(transformer, args.lora, args.lora_strength)} layers changed") if args.lora else None
        transformer, transformer.graph = lens.to_fp8(transformer) if args.fp8 else transformer, args.cuda_graph
        lens.quicken(transformer, vae) if args.compile else None
        return transformer, vae

    if args.eval:
        pipeline = (*load(), read())
        print(f"the autoencoder alone keeps every fact of {round_trip(pipeline[1], device, 200):.3f} of drawn scenes, over all training sizes")
        begin = time.perf_counter()
        scores, pictures, _ = evaluate(pipeline, height, width, args.steps, args.guidance, args.per_task, args.seed, args.requests,
                                       reasoner(args, notes, pipeline[2]) if args.reason else None)
        data.contact_sheet(pictures[::max(1, args.per_task // 8)], 12).save(out / "eval.png")
        print(f"\n{'task':14} score   ({args.per_task} held-out {args.requests} prompts a task{', rewritten' * args.reason}, "
              f"{time.perf_counter() - begin:.0f} s, pictures in {out}/eval.png)")
        print("".join(f"{name:14} {value:.3f}\n" for name, value in scores.items()) + json.dumps(scores))
        return

    requests, encoder = prompts, read() if args.reason and not args.endpoint else None
    if args.reason:
        rewrite = reasoner(args, notes, encoder)
        prompts, system = rewrite(requests), rewrite.keywords["system"]
        print("".join(f"{request!r} -> {prompt!r}\n" for request, prompt in zip(requests, prompts)), end="")
    strange, known = strange_words(prompts, notes)
    if strange:
        print(f"note: this model never saw the word{'s' * (len(strange) > 1)} {', '.join(strange)}. "
              f"It knows: {', '.join(sorted(known))}", file=sys.stderr)
    features = cached_features(folder, prompts + [args.negative], device, dtype, args.date, args.cache, encoder)
    rewrite = encoder = None                                                       # nothing may hold the encoder when the denoiser comes
    pipeline = (*load(), None)
    jobs = [(p, k, args.seed + p * args.num + k) for p in range(len(prompts)) for k in range(args.num)]
    pictures = generate([prompts[p] for p, _, _ in jobs], pipeline, seeds=[seed for *_, seed in jobs], height=height, width=width,
                        steps=args.steps, guidance=args.guidance, features=[features[p] for p, _, _ in jobs] + features[-1:],
                        images=[start] * len(jobs) if start else None, strength=args.strength, progress=True)
    weights_id, precision = identity(folder), str(dtype)[6:] + " and fp8" * args.fp8
    for (p, k, seed), picture in zip(jobs, pictures):
        chunks = dict(prompt=prompts[p], negative=args.negative, seed=seed, steps=args.steps, guidance=args.guidance, size=f"{width}x{height}", date=args.date,
                      weights=weights_id, lora=f"{args.lora} x {args.lora_strength}" if args.lora else "", precision=precision, software="Lens")
        chunks.update(request=requests[p], system_prompt=system, reasoner=args.model if args.endpoint else "the text encoder") if args.reason else None
        if rows is not None:                                                       # GenEval: 00000/metadata.jsonl, 00000/samples/0000.png
            path = out / f"{p:05d}" / "samples" / f"{k:04d}.png"
            lens.replace_file(out / f"{p:05d}" / "metadata.jsonl", lambda new: new.write_text(json.dumps(rows[p]) + "\n"))
        else:
            slug = "-".join("".join(c if c.isalnum() else " " for c in requests[p].lower()).split())[:60] or "picture"
            path = out / f"{slug}-{seed}.png"
        save_png(picture, path, chunks)
        print(path) if len(jobs) <= 16 else None
    if len(jobs) > 1:
        save_png(data.contact_sheet(pictures), out / "sheet.png", dict(prompts="\n".join(prompts), seed=args.seed, weights=weights_id))
        print(f"{len(jobs)} pictures in {out}, all of them in {out}/sheet.png")

def run(command):
    """Runs a script's main: a user's mistake, or a GPU too small, becomes one line on stderr and exit code 2, never a stack trace."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        command()
    except (LensError, torch.OutOfMemoryError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

if __name__ == "__main__":
    run(main)
