"""vae.py: pixels to tokens and back. FLUX.2's autoencoder in plain PyTorch, and the training of the toy one.

Read before: nothing (data.py's first screen, for what a scene is, if you train). Read after: data.py, sample.py.
Assumes: you have seen a convolution and a KL divergence.

    python vae.py --out runs/vae --minutes 24            # train the toy autoencoder on drawn scenes; the same command again resumes
    python vae.py --out runs/plain --minutes 24 --semantic 0                   # without the semantic term, to compare the probes

What happens to one picture of 64 x 96 pixels in the toy (full size in brackets; both are 8x down, then 2x2 folded):

    pixels   [B,   3, 64, 96]                            RGB in [-1, 1]
    latent   [B,   8,  8, 12]   ([B,  32, 8, 12])        encode: the posterior's mean and log variance, both this shape
    tokens   [B, 24, 32]        ([B, 24, 128])           to_tokens: 4 x 6 = 24 cells of 16 x 16 pixels; zero mean, unit variance
    latent   [B,   8,  8, 12]                            to_latent(tokens, (4, 6))
    pixels   [B,   3, 64, 96]                            decode

The denoiser never sees pixels: it sees the tokens. So the tokens decide how hard its task is. Three things make them easy:
few (16x down), smooth (the KL term: nearby latents decode to nearby pictures), and of unit variance (BatchNorm statistics).
Departures: the paper takes FLUX.2's weights, frozen; our toy is trained here, its semantic term a linear head, then thrown away.
"""
import argparse, copy, functools, json, math, os, sys, time
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

# ---- The model. Attribute names are the released tensor names, so state_dict() needs no renaming anywhere.   [checkpoint]

SIZES = {  # full: what FLUX.2's weights need [checkpoint]; toy: what we ship, 32 numbers a token [ours]; nano: tests
    "full": dict(block_out_channels=(128, 256, 512, 512), latent_channels=32, norm_num_groups=32, layers_per_block=2),
    "toy":  dict(block_out_channels=(16, 32, 64, 96),     latent_channels=8,  norm_num_groups=8,  layers_per_block=1),
    "nano": dict(block_out_channels=(8, 8, 16, 16),       latent_channels=4,  norm_num_groups=4,  layers_per_block=1),
}

LR = 1e-3   # peak, of AdamW at batch 8: 2e-3 was a little worse after 150 steps, 4e-3 much worse  [ours]

class ResBlock(nn.Module):
    def __init__(self, cin, cout, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps=1e-6)      # 1e-6, not torch's 1e-5: flat regions have tiny variance
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, cout, eps=1e-6)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:                                       # the residual path needs a 1x1 only where the width changes
            self.conv_shortcut = nn.Conv2d(cin, cout, 1)
    def forward(self, x):                                     # [B, cin, H, W]
        h = self.conv1(F.silu(self.norm1(x)))                 # [B, cout, H, W]
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + h

class Attention(nn.Module):
    """One head over all positions at the lowest resolution: the one place where far corners of a picture meet."""
    def __init__(self, width, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
    def forward(self, x):                                     # [B, C, H, W]
        h = self.group_norm(x).flatten(2).transpose(1, 2)     # [B, H*W, C]
        q, k, v = (f(h)[:, None] for f in (self.to_q, self.to_k, self.to_v))             # [B, 1 head, H*W, C]
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])                # [B, H*W, C]
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])

class Stage(nn.Module):
    """Residual blocks at one resolution, then one step down or up (none at the end of either half)."""
    def __init__(self, cin, cout, layers, groups, step):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(cin if i == 0 else cout, cout, groups) for i in range(layers)])
        if step == "down": self.downsamplers = nn.ModuleList([nn.ModuleDict({"conv": nn.Conv2d(cout, cout, 3, stride=2)})])
        if step == "up": self.upsamplers = nn.ModuleList([nn.ModuleDict({"conv": nn.Conv2d(cout, cout, 3, padding=1)})])
    def forward(self, x):                                     # [B, cin, H, W]
        for block in self.resnets: x = block(x)               # [B, cout, H, W]
        if hasattr(self, "downsamplers"):                     # [B, cout, H/2, W/2]; pad right and bottom only: with symmetric padding
            x = self.downsamplers[0]["conv"](F.pad(x, (0, 1, 0, 1)))   # each level is half a pixel off against the released weights
        if hasattr(self, "upsamplers"):                       # [B, cout, 2H, 2W]
            x = self.upsamplers[0]["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x

class Mid(nn.Module):
    def __init__(self, width, groups):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(width, groups)])
        self.resnets = nn.ModuleList([ResBlock(width, width, groups) for _ in range(2)])
    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))

class Half(nn.Module):
    """Encoder and decoder are mirror images: stages downwards and then the middle, or the middle and then stages upwards."""
    def __init__(self, cin, cout, widths, layers, groups, step):
        super().__init__()
        self.conv_in = nn.Conv2d(cin, widths[0], 3, padding=1)
        steps = [step] * (len(widths) - 1) + [None]           # a step after every stage but the last
        blocks = nn.ModuleList([Stage(a, b, layers, groups, s) for a, b, s in zip((widths[0], *widths), widths, steps)])
        if step == "down": self.down_blocks, self.mid_block = blocks, Mid(widths[-1], groups)
        else:              self.mid_block, self.up_blocks = Mid(widths[0], groups), blocks
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], cout, 3, padding=1)
    def forward(self, x):                                     # encoder: [B, 3, H, W]         decoder: [B, c, H/8, W/8]
        x = self.conv_in(x)                                   #          [B, C0, H, W]                 [B, C3, H/8, W/8]
        if hasattr(self, "up_blocks"): x = self.mid_block(x)
        for stage in (self.up_blocks if hasattr(self, "up_blocks") else self.down_blocks): x = stage(x)
        if hasattr(self, "down_blocks"): x = self.mid_block(x)   #       [B, C3, H/8, W/8]             [B, C0, H, W]
        return self.conv_out(F.silu(self.conv_norm_out(x)))   #          [B, 2c, H/8, W/8]             [B, 3, H, W]

def fold(z):
    """[B, c, 2h, 2w] -> [B, 4c, h, w]; the new channel index counts (channel, row, column), column fastest.  [checkpoint]"""
    B, c, H, W = z.shape
    return z.reshape(B, c, H // 2, 2, W // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(B, 4 * c, H // 2, W // 2)

def unfold(z):
    """[B, 4c, h, w] -> [B, c, 2h, 2w]"""
    B, C, h, w = z.shape
    return z.reshape(B, C // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(B, C // 4, 2 * h, 2 * w)

class LensVAE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = {k: config.get(k, v) for k, v in SIZES["full"].items()}  # other keys of a released config.json do not matter
        widths, latent = tuple(self.config["block_out_channels"]), self.config["latent_channels"]
        groups, layers = self.config["norm_num_groups"], self.config["layers_per_block"]
        self.encoder = Half(3, 2 * latent, widths, layers, groups, "down")     # twice: mean and log variance
        self.decoder = Half(latent, 3, widths[::-1], layers + 1, groups, "up")  # one residual block more in every stage
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)
        # Only its buffers are used, never its forward: in train mode a batch would be normalised by its own statistics,
        # and the same picture would get other tokens in other company.
        self.bn = nn.BatchNorm2d(4 * latent, eps=1e-4, affine=False)

    def encode(self, images):                                 # [B, 3, H, W] in [-1, 1]
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)   # each [B, c, H/8, W/8]
        return mean, logvar.clamp(-30, 20)                    # exp of an early, wild logvar is inf without the clamp

    def decode(self, latent):                                 # [B, c, H/8, W/8]
        return self.decoder(self.post_quant_conv(latent))     # [B, 3, H, W], about [-1, 1], not clamped

    def _statistics(self):                                    # fp32: bf16 would round sqrt(var + 1e-4) to three digits
        return self.bn.running_mean.float()[:, None, None], (self.bn.running_var.float() + self.bn.eps).sqrt()[:, None, None]

    def to_tokens(self, latent):                              # [B, c, 2h, 2w]
        mean, std = self._statistics()
        z = (fold(latent).float() - mean) / std               # [B, 4c, h, w]
        return z.flatten(2).transpose(1, 2).to(latent.dtype)  # [B, h*w, 4c]

    def to_latent(self, tokens, grid):                        # [B, h*w, 4c], (h, w)
        mean, std = self._statistics()
        z = tokens.float().transpose(1, 2).unflatten(2, tuple(grid))           # [B, 4c, h, w]
        return unfold(z * std + mean).to(tokens.dtype)        # [B, c, 2h, 2w]

# ---- Pixels and files

def to_images(pixels, device="cpu"):                          # [B, H, W, 3] uint8 -> [B, 3, H, W] in [-1, 1]
    layout = torch.channels_last if str(device) == "cuda" else torch.contiguous_format   # see train()
    return pixels.to(device).permute(0, 3, 1, 2).float().contiguous(memory_format=layout) / 127.5 - 1

def to_pil(images):                                           # [B, 3, H, W] -> list of PIL images
    x = (images.float().clamp(-1, 1) + 1) * 127.5             # [checkpoint] the reference truncates, it does not round
    return [Image.fromarray(p) for p in x.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()]

def from_pil(images):                                         # PIL images of one size -> [B, 3, H, W] in [-1, 1]
    return to_images(torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])))

@torch.no_grad()
def fidelity_features(vae, images):                           # [n, 3, H, W] in [-1, 1] -> [n, 2 * 4c]
    """Mean and spread over the picture of the encoder's tokens. Blur shrinks the spread."""
    tokens = [vae.to_tokens(vae.encode(part.to(next(vae.parameters())))[0]).float() for part in images.split(32)]
    return torch.cat([torch.cat([t.mean(1), t.std(1)], 1) for t in tokens])


def frechet_distance(a, b):                                   # [n, d], [m, d] -> number
    """|mean a - mean b|^2 + tr(Ca + Cb - 2 (Ca Cb)^1/2) of two sets of features: how far two sets of pictures are apart
    as wholes, 0 for equal ones. fp64: the square root of a nearly singular matrix loses half its digits."""
    a, b = a.double(), b.double()
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(ca)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T                        # Ca^1/2
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp_min(0).sqrt().sum()      # tr (Ca Cb)^1/2
    return ((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * cross).item()


def save_vae(vae, directory, metadata):
    """Diffusers layout, so that anything that reads the released VAE reads ours."""
    (directory := Path(directory)).mkdir(parents=True, exist_ok=True)
    config = dict(_class_name="AutoencoderKLFlux2", in_channels=3, out_channels=3, act_fn="silu", batch_norm_eps=1e-4,
                  patch_size=[2, 2], down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, **vae.config)
    tensors = {k: v.detach().cpu().contiguous() for k, v in vae.state_dict().items()}
    save_file(tensors, directory / "beside", {k: str(v) for k, v in metadata.items()})
    os.replace(directory / "beside", directory / "diffusion_pytorch_model.safetensors")    # never half a file under the real name
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")

def load_vae(directory):
    for d in (Path(directory) / "vae", Path(directory)):      # a run's folder is as good as the vae folder in it
        if (d / "diffusion_pytorch_model.safetensors").exists(): break
    else: fail(f"{directory} holds no autoencoder (diffusion_pytorch_model.safetensors)")
    vae = LensVAE(json.loads((d / "config.json").read_text()))
    vae.load_state_dict(load_file(d / "diffusion_pytorch_model.safetensors"))
    return vae.eval()

def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

# ---- Training: reconstruction, a little KL, a little meaning.   [ours]: FLUX.2's own recipe is not published

def make_batch(seed, index, size=None, count=None):
    """One batch of one bucket, a function of (seed, index) alone, so that a resumed run draws what it would have drawn.
    images [B, H, W, 3] uint8, cells [B, h*w, 4]: shape and colour of the object whose centre is in the cell (-1: none),
    and where in the cell the centre is (column, row in [0, 1])."""
    import data
    rng = np.random.default_rng((seed, index))
    if size is None:                                          # mostly the small area: it holds the same shapes for less work
        area = int(rng.choice([64, 96, 128], p=[0.80, 0.12, 0.08]))
        size, count = data.BUCKETS[area][rng.integers(len(data.BUCKETS[area]))], {64: 8, 96: 4, 128: 2}[area]
    (H, W), colors = size, list(data.COLORS)
    h, w, images = H // 16, W // 16, np.empty((count, H, W, 3), np.uint8)
    cells = np.full((count, h, w, 4), -1, np.float32)
    for i in range(count):
        scene = data.random_scene(np.random.default_rng((seed, index, i)), H, W)
        images[i] = np.asarray(data.draw(scene, H, W))
        for o in scene.objects:                               # two centres in one cell: the later one is drawn on top
            x, y = min(max(o.x * w, 0), w - 1e-3), min(max(o.y * h, 0), h - 1e-3)
            cells[i, int(y), int(x)] = data.SHAPES.index(o.shape), colors.index(o.color), x % 1, y % 1
    return torch.from_numpy(images), torch.from_numpy(cells.reshape(count, h * w, 4))

class Batches(torch.utils.data.Dataset):
    def __init__(self, seed): self.seed = seed
    def __getitem__(self, step): return make_batch(self.seed, step)

@torch.no_grad()
def initialise(vae):
    """Start as a nearly linear map that carries the picture through: residual branches and attention add nothing yet, the
    other convolutions keep the variance, and the posterior is narrow. With torch's own initialisation the noise drowned
    the latents and every picture came out one grey for the first hundreds of steps (squared error 0.46 after 200; so: 0.04 after 150)."""
    for m in reversed([*vae.modules()]):                      # children before their block, whose zeros must stay
        if isinstance(m, nn.Conv2d): nn.init.kaiming_normal_(m.weight, nonlinearity="linear"); nn.init.zeros_(m.bias)
        if isinstance(m, ResBlock): nn.init.zeros_(m.conv2.weight)
        if isinstance(m, Attention): nn.init.zeros_(m.to_out[0].weight); nn.init.zeros_(m.to_out[0].bias)
    c = vae.config["latent_channels"]
    vae.quant_conv.weight[c:], vae.quant_conv.bias[c:] = 0.0, -4.0                       # log variance: noise of 0.14 beside means of about 1
    return vae

def reconstruction_loss(x, y):
    """Pixels, their differences, and two coarser pictures, saturated pixels and their rims counting seven times. [ours]
    L1 alone is content with soft edges, because an edge is few pixels: the differences make it pay there. The squares fix
    the colours of whole objects early. Without the weights, the noise of the background, nine pixels in ten, is learned
    before the shape of anything."""
    d = x - y                                                 # [B, 3, H, W]; x is the true picture
    chroma = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    weight = 1 + 6 * F.max_pool2d((chroma > 0.4).float(), 5, stride=1, padding=2)
    loss = (weight * (d.abs() + 2 * d.square())).mean()
    for axis in (2, 3): loss = loss + (weight.narrow(axis, 1, x.shape[axis] - 1) * d.diff(dim=axis).abs()).mean()
    for k in (2, 4): loss = loss + 2 * F.avg_pool2d(d, k).square().mean()
    return loss


def semantic_loss(head, tokens, cells, shapes):
    """tokens [N, 4c], cells [N, 4] -> four terms from one Linear: is a centre here, which shape, which colour, where."""
    out, (shape, color, offset) = head(tokens), (cells[:, 0].long(), cells[:, 1].long(), cells[:, 2:])
    here = shape >= 0
    place = F.binary_cross_entropy_with_logits(out[:, 0], here.float())
    offset = (out[here, 1:3] - offset[here]).abs().mean()
    return place + offset + F.cross_entropy(out[here, 3:3 + shapes], shape[here]) + F.cross_entropy(out[here, 3 + shapes:], color[here])

def label_sizes():
    import data
    return 1 + len(data.SHAPES), 1 + len(data.COLORS), 4      # none or a shape, none or a colour, pose

def label_head(width):
    """The Linear that label_loss reads with, [W] -> [classes + 4], all zeros: it knows nothing yet."""
    head = nn.Linear(width, sum(label_sizes()))
    nn.init.zeros_(head.weight); nn.init.zeros_(head.bias)
    return head

def label_loss(head, img, labels):
    """For train.py: what covers each token (data.labels [B, N, 6]), read by a Linear off a block's image tokens [B, N, W]: cross-entropy of shape and
    colour, L1 of the pose; per sample [B]. REPA's thought (arXiv 2410.06940) with facts in the place of a network's features [ours]: who knows what
    is to be drawn, and which part of it here, can draw it."""
    shape, color, pose = head(F.rms_norm(img.float(), img.shape[-1:])).float().split(label_sizes(), -1)            # [B, N, classes or 4] each
    named = sum(F.cross_entropy(x.transpose(1, 2), labels[..., k].long(), reduction="none") for k, x in enumerate((shape, color)))         # [B, N]
    return (named + (labels[..., 0] > 0) * (pose - labels[..., 2:]).abs().sum(-1)).mean(1)

def losses(vae, head, pixels, cells, noise, args, shapes):
    x = to_images(pixels, noise.device.type)
    mean, logvar = (t.float() for t in vae.encode(x))
    z = mean + (0.5 * logvar).exp() * noise                   # [B, c, H/8, W/8]
    parts = {"reconstruction": reconstruction_loss(vae.decode(z).float(), x),
             # mean over latent numbers of KL(N(mean, var) || N(0, 1)). Too much: blur. None: latents drift far apart,
             # the decoder never sees what lies between, and what a denoiser gets almost right decodes to rubbish.
             "kl": 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()}
    if args.semantic > 0:
        parts["semantic"] = semantic_loss(head, fold(z).flatten(2).transpose(1, 2).flatten(0, 1), cells.to(z.device).flatten(0, 1), shapes)
    return parts["reconstruction"] + args.kl * parts["kl"] + args.semantic * parts.get("semantic", 0), parts

def race(runners, rounds, device):
    """{name: (seconds of the first run, median of the others, what the last gave)} of runners {name: function}, taken in turn, so that
    whatever else the machine does meets all of them alike. The first run compiles and warms up."""
    wait, seconds, made = torch.cuda.synchronize if device != "cpu" else lambda: None, {name: [] for name in runners}, {}
    for name, run in [*runners.items()] * (rounds + 1):
        begin = (wait(), time.perf_counter())[1]
        made[name] = run()
        seconds[name].append((wait(), time.perf_counter())[1] - begin)
    return {name: (s[0], float(np.median(s[1:])), made[name]) for name, s in seconds.items()}

def tell(found, work, peak, device, **row):
    """Prints a case's JSON line: row, and what race found of ours, the naive and the tight path; work: our FLOPs, peak: FLOP/s of a matrix product."""
    import resource                                           # Unix has it: only --bench may need it
    (cold, ours, _), naive, tight = found["ours"], found["naive"][1], found["tight"][1]
    name, memory = ((f"cpu, {torch.get_num_threads()} threads", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
                    if device == "cpu" else (torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()))
    row = dict(device=name, **row, warm_up=1, rounds=3, cold_s=cold, ours_s=ours, naive_s=naive, ratio=naive / ours,
               tight_s=tight, tight_ratio=tight / ours, tflops=work / ours / 1e12, matmul_tflops=peak / 1e12,
               peak_share=work / ours / peak, peak_memory_gib=memory / 2**30)
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}), flush=True)

def choose_dtype(vae, batch, device):
    """bf16 or fp32 by three timed steps of each: on a CPU it depends on the instructions it has, so measure."""
    x, trial = to_images(batch[0], device), copy.deepcopy(vae)
    def step(dtype):
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            trial.decode(trial.encode(x)[0]).float().square().mean().backward()
    found = race({dtype: functools.partial(step, dtype) for dtype in ("fp32", "bf16")}, 3, device)
    seconds = {dtype: median for dtype, (_, median, _) in found.items()}
    print(f"precision: {(best := min(seconds, key=seconds.get))}, because a step takes " + " and ".join(f"{v:.3f} s in {k}" for k, v in seconds.items()))
    return best

@torch.no_grad()
def set_statistics(vae, seed, batches, device):
    """One exact pass, no momentum. The variance is that of a posterior *sample*: that of the means plus the mean of the variances."""
    n = total = square = 0
    for i in range(batches):
        mean, logvar = vae.encode(to_images(make_batch(seed, i)[0], device))
        mean, var = (fold(t).double().transpose(0, 1).flatten(1) for t in (mean, logvar.exp()))    # [4c, N]
        n, total, square = n + mean.shape[1], total + mean.sum(1), square + (mean.square() + var).sum(1)
    vae.bn.running_mean.copy_(total / n)
    vae.bn.running_var.copy_(square / n - (total / n).square())
    vae.bn.num_batches_tracked.fill_(batches)

def probe(vae, device, train_scenes=2000, test_scenes=500):
    """How much of a scene one Linear reads off frozen tokens: accuracy of shape and colour at the cells with a centre,
    and balanced accuracy of place (the mean over cells with and without a centre: guessing gives 0.5)."""
    import data
    S, sets = len(data.SHAPES), []
    for seed, count in ((1_000_001, train_scenes), (1_000_002, test_scenes)):            # scenes no training seed draws
        tokens, cells = [], []
        for i in range(math.ceil(count / 50)):
            pixels, c = make_batch(seed, i, data.BUCKETS[64][i % len(data.BUCKETS[64])], 50)
            with torch.no_grad(): tokens.append(vae.to_tokens(vae.encode(to_images(pixels, device))[0]).flatten(0, 1))
            cells.append(c.to(device).flatten(0, 1))
        sets.append((torch.cat(tokens), torch.cat(cells)))
    head = nn.Linear(sets[0][0].shape[1], 3 + S + len(data.COLORS)).to(device)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(300):                                      # all cells at once: 32 numbers each, so this takes seconds
        optimizer.zero_grad()
        semantic_loss(head, *sets[0], S).backward()
        optimizer.step()
    (tokens, cells), here = sets[1], sets[1][1][:, 0] >= 0
    out = head(tokens).detach()
    # A Linear trained on rare centres says "none" too readily: put its threshold where it names the right share of cells.
    found = out[:, 0] > torch.quantile(head(sets[0][0])[:, 0].detach(), 1 - (sets[0][1][:, 0] >= 0).float().mean())
    right = lambda a, b: round((a == b).float().mean().item(), 4)
    return {"shape": right(out[here, 3:3 + S].argmax(1), cells[here, 0].long()),
            "colour": right(out[here, 3 + S:].argmax(1), cells[here, 1].long()),
            "place": round((right(found[here], True) + right(found[~here], False)) / 2, 4)}

@torch.no_grad()
def preview(vae, path, device):                               # originals above, reconstructions below
    x = to_images(make_batch(1_000_004, 0, (64, 64), 12)[0], device)
    rows = torch.cat([torch.cat(list(t), dim=2) for t in (x, vae.decode(vae.encode(x)[0]))], dim=1)
    to_pil(rows[None])[0].resize((12 * 128, 256), Image.NEAREST).save(path)

def train(args):
    import data
    device, out = "cuda" if torch.cuda.is_available() else "cpu", Path(args.out) / "vae"     # DIR itself is for the denoiser's run
    try: out.mkdir(parents=True, exist_ok=True); (out / "metrics.jsonl").touch()
    except OSError as e: fail(f"cannot write to {out}: {e.strerror}")
    torch.manual_seed(args.seed)
    # Channels last is for tensor cores. On a CPU it lost: 0.81 s against 0.63 s a step (torch's GroupNorm is slow in it).
    vae = initialise(LensVAE(SIZES[args.size])).to(device, memory_format=torch.channels_last if device == "cuda" else torch.contiguous_format)
    head = nn.Linear(4 * vae.config["latent_channels"], 3 + len(data.SHAPES) + len(data.COLORS)).to(device)
    params = [*vae.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(params, lr=LR, betas=(0.9, 0.99), weight_decay=1e-3)
    ema = copy.deepcopy(vae)
    kept = {"vae": vae, "head": head, "ema": ema, "optimizer": optimizer}
    state = {"step": 0, "seconds": 0.0, "dtype": args.dtype}
    if (out / "state.pt").exists():                           # the same command again
        saved = torch.load(out / "state.pt", map_location=device, weights_only=True)
        for name, part in kept.items(): part.load_state_dict(saved[name])
        state = saved["state"]
        lines = [l for l in (out / "metrics.jsonl").read_text().splitlines() if json.loads(l)["step"] <= state["step"]]
        (out / "metrics.jsonl").write_text("".join(l + "\n" for l in lines))             # drop what was logged after the save
        print(f"resuming at step {state['step']}, {state['seconds'] / 60:.1f} minutes in")
    if state["dtype"] == "auto": state["dtype"] = choose_dtype(vae, make_batch(args.seed, 0), device)
    loader = iter(torch.utils.data.DataLoader(Batches(args.seed), batch_size=None, sampler=range(state["step"], 1 << 30),
                                              num_workers=1, prefetch_factor=4))         # one process draws while one learns
    done = lambda: state["step"] / args.steps if args.steps else state["seconds"] / (60 * args.minutes)
    def save():
        torch.save({"state": state, **{name: part.state_dict() for name, part in kept.items()}}, out / "state.beside")
        os.replace(out / "state.beside", out / "state.pt")
    row, log, bar = {"loss": None}, open(out / "metrics.jsonl", "a"), tqdm(total=args.steps, initial=state["step"], unit="step")
    while done() < 1:
        start, step = time.perf_counter(), state["step"]
        for group in optimizer.param_groups:                  # warm up 100 steps (Adam's second moments are empty), then a cosine to 2%
            group["lr"] = LR * min((step + 1) / 100, 0.51 + 0.49 * math.cos(math.pi * done()))
        pixels, cells = next(loader)
        B, H, W, _ = pixels.shape
        own = torch.Generator().manual_seed(args.seed * 1_000_003 + step)                # noise of this step alone: resume is exact
        noise = torch.randn((B, vae.config["latent_channels"], H // 8, W // 8), generator=own).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=state["dtype"] == "bf16"):   # weights stay fp32
            loss, parts = losses(vae, head, pixels, cells, noise, args, len(data.SHAPES))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        decay = min(0.995, (1 + step) / (10 + step))          # a young average forgets its random start quickly
        with torch.no_grad(): torch._foreach_lerp_(list(ema.parameters()), list(vae.parameters()), 1 - decay)
        state["step"], state["seconds"] = step + 1, state["seconds"] + time.perf_counter() - start
        row = {"step": step + 1, "loss": loss.item(), **{k: v.item() for k, v in parts.items()}, "images": B, "lr": group["lr"], **state}
        print(json.dumps(row), file=log, flush=True)
        bar.set_postfix_str(f"loss {row['loss']:.4f}, {state['seconds'] / 60:.1f} min")
        bar.update()
        if (step + 1) % args.preview_every == 0: preview(ema, out / f"preview_{step + 1:06d}.png", device)
        if (step + 1) % args.save_every == 0: save()
    del loader                                                # stops the drawing process
    save()
    set_statistics(ema, 1_000_005, args.report // 5 + 1, device)      # 101 batches, about 4000 scenes
    metrics = {"probe": probe(ema, device, 4 * args.report, args.report)}
    print(json.dumps({"step": state["step"], "loss": row["loss"], **metrics}), file=log, flush=True)
    save_vae(ema, out, {"command": "python vae.py " + " ".join(sys.argv[1:]), "seed": args.seed, "steps": state["step"],
                                "minutes": round(state["seconds"] / 60, 2), "semantic": args.semantic, **metrics})
    preview(ema, out / "preview.png", device)
    print(f"semantic {args.semantic}: a linear probe on held-out scenes gets " + ", ".join(f"{k} {v:.3f}" for k, v in metrics["probe"].items()))

def main(argv=None):
    parser = argparse.ArgumentParser(description="Train the toy autoencoder on drawn scenes.")
    parser.error = fail                                       # one line, exit code 2
    parser.add_argument("--out", required=True, metavar="DIR", help="train, and write here; the same command again resumes")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=24, help="train this long")
    length.add_argument("--steps", type=int, help="or this many steps")
    parser.add_argument("--size", default="toy", help="toy, nano (tests) or full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--semantic", type=float, default=0.1, help="weight of the semantic term (0: none)")
    parser.add_argument("--kl", type=float, default=1e-3, help="weight of the KL term, per latent number")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="auto: measure, take the faster")
    parser.add_argument("--save-every", type=int, default=300, help="steps")
    parser.add_argument("--preview-every", type=int, default=300, help="steps")
    parser.add_argument("--report", type=int, default=500, help="held-out scenes of the final report")
    args = parser.parse_args(argv)
    if args.size not in SIZES: fail(f"unknown size {args.size!r}; there are {', '.join(SIZES)}")
    if (args.minutes if args.steps is None else args.steps) <= 0: fail("--steps and --minutes must be above 0")
    train(args)

if __name__ == "__main__": main()
