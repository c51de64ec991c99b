"""Training of the toy's autoencoder, on scenes drawn as it goes, or on pictures of one's own.

Read before: vae.py, toy/labels.py, toy/pictures.py; of toy/world.py the first screen, for what a
scene is.

    python -m toy.autoencoder --out runs/toy --minutes 20
    python -m toy.autoencoder --out runs/plain --minutes 20 --semantic 0
    python -m toy.autoencoder --data 'shards/*.tar' --out runs/mine --minutes 20

It writes runs/toy/vae: the weights of the model's running average, its state and metrics.jsonl. The
same command again resumes. The second command trains without the semantic term, to compare probes.
The third trains on shards of `data.py pack`.

The story in one paragraph: the loss is reconstruction, a little KL and a little meaning. The KL
term keeps latents close together, and the decoder gets them through a little noise, so that what a
denoiser gets almost right decodes to something right. The semantic term asks one Linear to read off
each token, through much noise, which object covers it and how that lies; it makes tokens in which a
scene's facts stand out. At the end the tokens' mean and variance are measured once, and a fresh
Linear on held-out scenes says how much can be read off them (the probe). Nobody knows what covers
which token of one's own pictures: there the semantic term and the probe are left out, and a round
trip of pictures that were kept aside says how good it is.

Where this departs: everything here is [ours]. The paper takes FLUX.2's weights, whose own recipe is
not published. The Linear of the semantic term is thrown away after training.
"""
import copy
import functools
import json
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

import data
from kit.checkpoint import save_pipeline
from kit.files import Parser, positive, require, run_command, seed_number, user_path
from kit.images import contact_sheet, enlarged, save_png, to_images, to_pil
from kit.muon import Muon
from kit.places import WEIGHT_NAMES, command_for_next_part
from kit.run import (
    Log,
    Notice,
    average_decay,
    code_version,
    follow,
    make_loader,
    race,
    start_run,
)
from kit.state import check_same_run, kept_progress, load_state, save_state
from lens import SIZES, add_noise
from toy.labels import label_head, label_loss, labels, read_labels
from toy.pictures import Pictures
from toy.world import draw, random_scene
from vae import Attention, LensVAE, ResBlock

LR = 1e-3                     # peak, of AdamW, whatever the batch
MUON_LR = 3e-3                # peak, of Muon, for the kernels of convolutions
EMA = 0.995                   # decay of the average of weights, which is what is saved
DECODED_NOISE = 0.25          # of what is decoded in training, over a channel's spread
MOST_NOISE = 0.9              # t of the noise through which the semantic term is read: 0 to this
BATCH = {64: 8, 96: 4, 128: 2}     # pictures of each area: all cost about the same

# Seeds of held-out scenes, which a run with a usual --seed does not draw.
PROBE_TRAIN = 1_000_001
PROBE_TEST = 1_000_002
PREVIEW = 1_000_004
STATISTICS = 1_000_005


@dataclass(frozen=True)
class Settings:
    """How to train. The command line takes its defaults from here."""
    size: str = "toy"         # one of lens.SIZES
    steps: int = None         # how long: this many steps; None: `minutes` says it
    minutes: float = 20
    semantic: float = 1.0     # weight of the semantic term; 0: none
    kl: float = 0.02          # weight of the KL term, per latent number
    dtype: str = "auto"       # "fp32" or "bf16" to compute in; "auto": the faster of the two
    save_every: int = 300     # steps
    preview_every: int = 300  # steps
    data: str = None          # digest of the shards of one's own pictures; None: drawn scenes

    def identity(self, seed):
        """What a resumed run must have in common with the one that it goes on with."""
        return {"--size": self.size, "--seed": seed,
                "--semantic": self.semantic, "--kl": self.kl, "--data": self.data}

    @property
    def saturated(self):
        """What a saturated pixel counts, see `reconstruction_loss`."""
        return 7 if self.data is None else 1


@dataclass
class Progress:
    """How far a run is: saved with its state."""
    step: int = 0
    seconds: float = 0.0      # of training, over all resumes
    dtype: str = "auto"       # "fp32" or "bf16" once it is chosen: a resume must go on as it began

    def done(self, settings):
        """The share of the run that is behind us: 1 or more at its end."""
        if settings.steps is not None:
            return self.step / settings.steps
        return self.seconds / (60 * settings.minutes)


# --- Batches --------------------------------------------------------------------------------------

def make_batch(seed, index, size=None, count=None):
    """One batch of one bucket, a function of its arguments alone: a resumed run draws what it would
    have drawn. size (height, width) and count: None to draw them too.

    -> images uint8 [B, H, W, 3], covering fp32 [B, h*w, 6] as toy.labels.labels tells it
    """
    if size is None:
        # Half of them of the small area: it holds the same shapes for less work.
        rng = np.random.default_rng((seed, index))
        area = int(rng.choice(list(BATCH), p=[0.5, 0.2, 0.3]))
        sizes = data.buckets(area)
        size = sizes[rng.integers(len(sizes))]
        count = BATCH[area]

    H, W = size
    images, covering = [], []
    for i in range(count):
        rng = np.random.default_rng((seed, index, i))
        scene = random_scene(rng, H, W)
        images.append(np.asarray(draw(scene, H, W)))
        covering.append(labels(scene, H, W))
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(covering))


class Batches(Dataset):
    """Item i is batch i of a seed."""

    def __init__(self, seed):
        self.seed = seed

    def __getitem__(self, index):
        return make_batch(self.seed, index)


def batches_from(seed, first):
    """Batches `first`, `first` + 1, ... without end: one process draws while the other learns."""
    return iter(make_loader(Batches(seed), range(first, 1 << 30), workers=1, prefetch=4))


# --- The start ------------------------------------------------------------------------------------

@torch.no_grad()
def initialise(vae):
    """Starts as a nearly linear map that carries the picture through. -> vae

    Residual branches and attention add nothing yet, the other convolutions keep the variance, and
    the posterior is narrow. With torch's own initialisation the noise drowned the latents, and
    every picture came out one grey for the first hundreds of steps.
    """
    for module in reversed(list(vae.modules())):   # children first: their block's zeros must stay
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
        if isinstance(module, Attention):
            nn.init.zeros_(module.to_out[0].weight)
            nn.init.zeros_(module.to_out[0].bias)

    # Log variance: noise of 0.14 beside means of about 1.
    c = vae.config["latent_channels"]
    vae.quant_conv.weight[c:] = 0.0
    vae.quant_conv.bias[c:] = -4.0
    return vae


# --- The loss: reconstruction, a little KL, a little meaning --------------------------------------

def reconstruction_loss(decoded, images, saturated=7):
    """Pixels, their differences, and two coarser pictures; both [B, 3, H, W] -> a number.

    L1 alone is content with soft edges, because an edge is few pixels: the differences make it pay
    there. The squares fix the colours of whole objects early. Saturated pixels and their rims count
    `saturated` times. In the drawn world these are the objects, and without that the noise of the
    background, nine pixels in ten, is learnt before the shape of anything. Pictures of one's own
    have 1: in them a bright colour does not say what matters, and a grey picture, or the grey part
    of one, would be learnt late.
    """
    off = decoded - images                                            # [B, 3, H, W]
    chroma = images.amax(1, keepdim=True) - images.amin(1, keepdim=True)           # in [0, 2]
    is_saturated = (chroma > 0.4).float()                             # [B, 1, H, W]
    weight = 1 + (saturated - 1) * F.max_pool2d(is_saturated, 5, stride=1, padding=2)

    loss = (weight * (off.abs() + 2 * off.square())).mean()
    loss = loss + (weight[:, :, 1:] * off.diff(dim=2).abs()).mean()
    loss = loss + (weight[:, :, :, 1:] * off.diff(dim=3).abs()).mean()
    loss = loss + 2 * F.avg_pool2d(off, 2).square().mean()
    loss = loss + 2 * F.avg_pool2d(off, 4).square().mean()
    return loss


def kl_loss(mean, logvar):
    """Mean over latent numbers of KL(N(mean, exp(logvar)) || N(0, 1)).

    Too much of it: blur. None: latents drift far apart, the decoder never sees what lies between,
    and what a denoiser gets almost right decodes to rubbish.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def spread_of(z):
    """Standard deviation of each channel of a latent [B, c, H/8, W/8]: [1, c, 1, 1]. Detached, so
    that what has to be seen through noise may grow by itself, which the KL term limits. With a
    gradient, all else in its channel would be pushed down to make room for it."""
    return z.detach().std((0, 2, 3), keepdim=True)


def semantic_loss(head, z, covering, noise, t):
    """How badly a Linear reads off noised tokens what covers each of them: a number.

    z, noise [B, c, H/8, W/8]        covering [B, h*w, 6]        t [B] in [0, 1)

    The latent is noised much as a denoiser will see it. What has to be read through noise must
    stand out: it takes more of a token's variance, and textures, which no caption tells, take less.
    Read without noise, facts lie in the tokens but not on top, and the denoiser learns them later.
    """
    z = add_noise(z / spread_of(z), noise, t)
    tokens = F.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2)       # [B, h*w, 4c]
    return label_loss(head, tokens, covering).mean()


def losses(vae, head, pixels, covering, draws, semantic, kl, saturated=7):
    """A batch's loss and its terms: (total, {"reconstruction", "kl", "semantic"}). A semantic term
    of weight 0 is left out.

    pixels     uint8 [B, H, W, 3]     covering  [B, h*w, 6], or None where the semantic term is out
    draws      Draws;  saturated: see `reconstruction_loss`
    """
    images = to_images(pixels, draws.t.device)                        # [B, 3, H, W]
    mean, logvar = vae.encode(images)
    mean, logvar = mean.float(), logvar.float()                       # [B, c, H/8, W/8]
    z = mean + (0.5 * logvar).exp() * draws.posterior
    # No denoiser is exact. Without noise here, latents grow until the posterior's is nothing beside
    # them, edges and textures lie in the last digits, and what a denoiser draws wobbles.
    noised = z + DECODED_NOISE * spread_of(z) * draws.decoder
    decoded = vae.decode(noised).float()                              # [B, 3, H, W]

    terms = {"reconstruction": reconstruction_loss(decoded, images, saturated),
             "kl": kl_loss(mean, logvar)}
    total = terms["reconstruction"] + kl * terms["kl"]
    if semantic > 0:
        covering = covering.to(z.device)
        terms["semantic"] = semantic_loss(head, z, covering, draws.semantic, draws.t)
        total = total + semantic * terms["semantic"]
    return total, terms


# --- After training: statistics, probe or round trip, preview -------------------------------------

def set_statistics(vae, seed, batches, device):
    """`measure_statistics` of so many batches of drawn scenes."""
    drawn = (make_batch(seed, i) for i in range(batches))
    measure_statistics(vae, drawn, batches, device)


@torch.no_grad()
def measure_statistics(vae, batches, number, device):
    """Measures the mean and variance of the folded latent, with which tokens are normalised, in one
    exact pass over batches, `number` of them. The variance is that of a posterior *sample*: the
    variance of the means plus the mean of the variances."""
    count, total, square = 0, 0, 0
    for pixels, _ in tqdm(batches, "statistics", number, unit="batch", leave=False):
        mean, logvar = vae.encode(to_images(pixels, device))          # [B, c, H/8, W/8]
        mean = F.pixel_unshuffle(mean, 2).double()                    # [B, 4c, h, w]
        var = F.pixel_unshuffle(logvar.exp(), 2).double()
        mean, var = mean.transpose(0, 1).flatten(1), var.transpose(0, 1).flatten(1)   # [4c, B*h*w]
        count += mean.shape[1]
        total = total + mean.sum(1)
        square = square + (mean.square() + var).sum(1)

    vae.bn.running_mean.copy_(total / count)
    vae.bn.running_var.copy_(square / count - (total / count).square())
    vae.bn.num_batches_tracked.fill_(number)


@torch.no_grad()
def encode_scenes(vae, seed, count, device):
    """Tokens [N, 4c] and what covers them [N, 6], of at least `count` scenes of the small area, in
    whole batches of 50, its sizes in turn."""
    sizes = data.buckets(64)
    tokens, covering = [], []
    for i in tqdm(range(math.ceil(count / 50)), "probe: scenes", unit="batch", leave=False):
        pixels, batch_covering = make_batch(seed, i, sizes[i % len(sizes)], 50)
        mean, _ = vae.encode(to_images(pixels, device))
        tokens.append(vae.to_tokens(mean).flatten(0, 1))
        covering.append(batch_covering.to(device).flatten(0, 1))
    return torch.cat(tokens), torch.cat(covering)


def probe(vae, device, train_scenes=2000, test_scenes=500):
    """How much of a scene one Linear reads off frozen tokens, on scenes that it was not fitted on.

    -> {"shape", "colour": accuracy at the tokens that an object covers, "pose": mean error there of
    an object's place, size (tokens) and angle (radians)}
    """
    train_tokens, train_covering = encode_scenes(vae, PROBE_TRAIN, train_scenes, device)
    tokens, covering = encode_scenes(vae, PROBE_TEST, test_scenes, device)

    head = label_head(tokens.shape[-1]).to(device)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in tqdm(range(300), "probe: the Linear", unit="step", leave=False):
        # All tokens at once: this takes seconds.
        optimizer.zero_grad()
        label_loss(head, train_tokens[None], train_covering[None]).backward()
        optimizer.step()

    covered = covering[:, 0] > 0
    with torch.no_grad():
        shape, color, pose = read_labels(head, tokens[covered])
    true_shape, true_color = covering[covered, 0].long(), covering[covered, 1].long()

    def accuracy(said, true):
        return round((said.argmax(1) == true).float().mean().item(), 4)

    return {"shape": accuracy(shape, true_shape), "colour": accuracy(color, true_color),
            "pose": round((pose - covering[covered, 2:]).abs().mean().item(), 4)}


def psnr(decoded, images):
    """The peak signal-to-noise ratio of each picture in dB: [B]; half the error is 6 dB more. Both
    [B, 3, H, W] in [-1, 1]."""
    error = (decoded.clamp(-1, 1) - images).square().mean((1, 2, 3))
    return 10 * torch.log10(2**2 / error)                             # from -1 to 1 it is 2


@torch.no_grad()
def round_trip(vae, batches, number, device):
    """-> the mean PSNR in dB of pictures that are encoded and decoded, from `number` batches."""
    ratios = []
    for pixels, _ in tqdm(batches, "round trip", number, unit="batch", leave=False):
        images = to_images(pixels, device)
        mean, _ = vae.encode(images)
        ratios.append(psnr(vae.decode(mean), images))
    return torch.cat(ratios).mean().item()


@torch.no_grad()
def preview(vae, path, device, pictures=None):
    """A PNG of twelve held-out scenes above what the autoencoder makes of them, twice as large; or
    of twelve that were kept aside of one's own, as they are. pictures: Pictures or None"""
    batches, times = [make_batch(PREVIEW, 0, (64, 64), 12)], 2
    if pictures is not None:
        batches, times = pictures.kept_aside(12), 1
    before, after = [], []
    for pixels, _ in batches:
        images = to_images(pixels, device)
        mean, _ = vae.encode(images)
        before += to_pil(images)
        after += to_pil(vae.decode(mean))
    shown = [enlarged(picture, times) for picture in before + after]
    save_png(contact_sheet(shown, columns=len(before)), path)


# --- Training -------------------------------------------------------------------------------------

def choose_dtype(run, vae, pixels):
    """"fp32" or "bf16" by three timed steps of each: on a CPU it depends on its instructions, so
    measure."""
    trial = copy.deepcopy(vae)
    images = to_images(pixels, run.device)
    device_type = torch.device(run.device).type

    def step(dtype):
        with torch.autocast(device_type, torch.bfloat16, enabled=dtype == "bf16"):
            mean, _ = trial.encode(images)
            trial.decode(mean).float().square().mean().backward()

    runners = {dtype: functools.partial(step, dtype) for dtype in ("fp32", "bf16")}
    timed = race(runners, 3, run.device)
    seconds = {dtype: median for dtype, (_, median, _) in timed.items()}
    best = min(seconds, key=seconds.get)
    run.say(f"precision: {best}, because a step takes {seconds['fp32']:.3f} s in fp32 and "
            f"{seconds['bf16']:.3f} s in bf16")
    return best


def rate_factor(step, done):
    """What the peak rates are scaled by: rises over 100 steps (Adam's second moments are empty at
    first), then a cosine down to 2%. done: the share of the run that is behind us."""
    falling = 0.51 + 0.49 * math.cos(math.pi * done)
    return min((step + 1) / 100, falling)


class Draws(NamedTuple):
    """The noise of one step."""
    posterior: torch.Tensor   # [B, c, H/8, W/8], with which the latent is drawn from the posterior
    semantic: torch.Tensor    # [B, c, H/8, W/8], through which the semantic term is read
    t: torch.Tensor           # [B], how much of the latter
    decoder: torch.Tensor     # [B, c, H/8, W/8], through which the latent is decoded


def draw_step(seed, step, shape):
    """-> Draws of this step alone, so that a resume is exact. shape: of the latent"""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    posterior = torch.randn(shape, generator=generator)
    semantic = torch.randn(shape, generator=generator)
    t = MOST_NOISE * torch.rand(shape[0], generator=generator)
    decoder = torch.randn(shape, generator=generator)
    return Draws(posterior, semantic, t, decoder)


def make_optimizers(vae, params):
    """[AdamW, Muon]. Muon has the kernels between the picture and the latent: with it three minutes
    of training gave what half an hour of AdamW alone had given. params: all that learn"""
    kernels = [p for name, p in vae.named_parameters()
               if p.ndim == 4 and name.startswith(("encoder.", "decoder."))
               and "conv_in" not in name and "conv_out" not in name]
    of_muon = {id(p) for p in kernels}
    others = [p for p in params if id(p) not in of_muon]
    return [torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.99), weight_decay=1e-3),
            Muon(kernels, lr=MUON_LR)]


class Learner:
    """What training changes: the autoencoder, the head of its semantic term, the average of the
    autoencoder's weights, and the optimisers' moments. Drawn from the run's seed."""

    def __init__(self, run, settings):
        torch.manual_seed(run.seed)
        # Channels last is for tensor cores. On a CPU it lost: torch's GroupNorm is slow in it.
        on_gpu = torch.device(run.device).type == "cuda"
        layout = torch.channels_last if on_gpu else torch.contiguous_format
        vae = initialise(LensVAE(SIZES[settings.size].vae))
        self.vae = vae.to(run.device, memory_format=layout)
        self.head = label_head(4 * self.vae.config["latent_channels"]).to(run.device)
        self.ema = copy.deepcopy(self.vae).requires_grad_(False)

        self.params = list(self.vae.parameters())
        if settings.semantic > 0:                  # else it gets no gradient, and has no moments
            self.params += self.head.parameters()
        self.optimizers = make_optimizers(self.vae, self.params)

    def groups(self):
        """{group: {name: tensor}} as kit.state saves them."""
        return {"model": dict(self.vae.named_parameters()),
                "head": dict(self.head.named_parameters()),
                "ema": dict(self.ema.named_parameters())}


def train_step(run, settings, learner, batch, step, done):
    """One step, number `step` of the run, of which the share `done` is behind us. -> {name: number}
    for the log."""
    pixels, covering = batch                           # [B, H, W, 3], [B, h*w, 6] or None
    B, H, W, _ = pixels.shape
    latent_shape = (B, learner.vae.config["latent_channels"], H // 8, W // 8)
    draws = Draws(*[run.move(drawn) for drawn in draw_step(run.seed, step, latent_shape)])

    with run.autocast():                                              # the weights stay fp32
        loss, terms = losses(learner.vae, learner.head, pixels, covering, draws,
                             semantic=settings.semantic, kl=settings.kl,
                             saturated=settings.saturated)
    for optimizer in learner.optimizers:
        optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(learner.params, 1.0)

    factor = rate_factor(step, done)
    for optimizer, peak in zip(learner.optimizers, (LR, MUON_LR)):
        for group in optimizer.param_groups:
            group["lr"] = peak * factor
        optimizer.step()
    moved = 1 - average_decay(step, EMA)
    follow(learner.ema.parameters(), learner.vae.parameters(), moved)

    numbers = {name: term.item() for name, term in terms.items()}
    return {"loss": loss.item(), **numbers, "images": B, "lr": LR * factor}


def train(run, settings, pictures=None):
    """Trains, or goes on with what run.out holds, until the settings' end or until a notice comes.
    -> (the average's autoencoder, Progress). pictures: Pictures; None: drawn scenes"""
    learner = Learner(run, settings)
    identity = settings.identity(run.seed)

    progress = Progress(dtype=settings.dtype)
    saved = load_state(run, learner.groups(), learner.optimizers, identity)
    if saved:
        progress = Progress(**saved)
        run.say(f"resuming at step {progress.step}, {progress.seconds / 60:.1f} minutes in")
    if progress.dtype == "auto":
        # Drawn scenes for pictures of one's own, too: it is timed, not learnt.
        pixels, _ = make_batch(run.seed, 0)
        progress.dtype = choose_dtype(run, learner.vae, pixels)
    run.bf16 = progress.dtype == "bf16"

    length = f"{settings.steps} steps"
    if settings.steps is None:
        length = f"{settings.minutes:g} minutes"
    run.say(f"the autoencoder trains for {length} in all, saved every {settings.save_every} steps")

    log = Log(run, progress.step)
    notice = Notice()
    if pictures is None:
        batches = batches_from(run.seed, first=progress.step)
    else:
        batches = pictures.batches(first=progress.step)
    bar = tqdm(total=settings.steps, initial=progress.step, unit="step")
    done = progress.done(settings)
    stopping = done >= 1
    while not stopping:
        begin = time.perf_counter()
        numbers = train_step(run, settings, learner, next(batches), progress.step, done)
        progress.step += 1
        progress.seconds += time.perf_counter() - begin
        done = progress.done(settings)
        stopping = done >= 1 or notice.given       # asked once: the last step is always saved

        log(step=progress.step, **numbers, seconds=progress.seconds)
        minutes = f"{progress.seconds / 60:.1f}"
        if settings.steps is None:                 # then the bar has no end of its own
            minutes += f" of {settings.minutes:g}"
        bar.set_postfix_str(f"loss {numbers['loss']:.4f}, {minutes} min")
        bar.update()
        if progress.step % settings.preview_every == 0:
            path = run.out / f"preview_{progress.step:06d}.png"
            preview(learner.ema, path, run.device, pictures)
        if progress.step % settings.save_every == 0 or stopping:
            save_state(run, progress.step, learner.groups(), learner.optimizers, identity,
                       asdict(progress))
            log.draw()
    bar.close()
    return learner.ema, progress


def finish(run, settings, ema, progress, report, command, pictures=None):
    """Measures what the autoencoder is worth, and writes it beside the run's state: run.out is the
    folder vae/ of a pipeline.

    report    number of the probe's test scenes, or at most so many pictures of the round trip
    pictures  Pictures; None: drawn scenes
    """
    if pictures is None:
        scores = measure_on_scenes(run, settings, ema, report)
    else:
        scores = measure_on_pictures(run, ema, report, pictures)
    log = Log(run, progress.step)
    log(step=progress.step, **scores)

    notes = {"command": command, "commit": code_version(), "seed": run.seed,
             "steps": progress.step, "minutes": round(progress.seconds / 60, 2),
             "semantic": settings.semantic,
             **{name: json.dumps(score) for name, score in scores.items()}}
    save_pipeline(run.out.parent, vae=ema, vae_metadata=notes)
    preview(ema, run.out / "preview.png", run.device, pictures)


def measure_on_scenes(run, settings, ema, report):
    """Statistics and probe on held-out scenes -> {"probe": scores}."""
    batches = report // 5 + 1                      # by default 101, of 5.4 scenes on average
    set_statistics(ema, STATISTICS, batches, run.device)
    scores = probe(ema, run.device, train_scenes=4 * report, test_scenes=report)
    run.say(f"semantic {settings.semantic}: a linear probe on held-out scenes gets "
            f"shape {scores['shape']:.3f}, colour {scores['colour']:.3f}, "
            f"pose within {scores['pose']:.3f}")
    return {"probe": scores}


def measure_on_pictures(run, ema, report, pictures):
    """Statistics on the pictures that were learnt, and a round trip of those that were kept aside
    -> {"psnr": dB, "psnr_learnt": dB}, the second of as many that were learnt: far above the first
    where they are too few, or were seen too often. weights/toy has 34 dB on drawn scenes."""
    planned = pictures.epoch(0)[:report]
    measure_statistics(ema, pictures.load(planned), len(planned), run.device)

    count = min(report, len(pictures.aside))
    aside = round_trip(ema, pictures.kept_aside(count), count, run.device)
    ones = [batch._replace(samples=batch.samples[:1]) for batch in planned[:count]]
    learnt = round_trip(ema, pictures.load(ones), len(ones), run.device)
    run.say(f"encoded and decoded, {count} of the pictures that were kept aside have a PSNR of "
            f"{aside:.1f} dB, and some that were learnt {learnt:.1f} dB; {run.out}/preview.png "
            "shows the former")
    return {"psnr": round(aside, 2), "psnr_learnt": round(learnt, 2)}


def main(argv=None):
    parser = Parser("Train the toy autoencoder on drawn scenes, or on pictures of your own, for "
                    f"{Settings.minutes} minutes unless --minutes or --steps says otherwise. The "
                    "same command again resumes.", __doc__)
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR",
                        help="write DIR/vae")
    parser.add_argument("--data", metavar="GLOB", help="shards of `data.py pack`, say "
                        "'shards/*.tar' (default: drawn scenes)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=Settings.minutes,
                        help="train this long (default: %(default)s)")
    length.add_argument("--steps", type=positive, help="or this many steps")
    parser.add_argument("--size", default="toy",
                        help="toy, nano (for tests) or full (default: %(default)s)")
    parser.add_argument("--seed", type=seed_number, default=0, help="default: %(default)s")
    parser.add_argument("--semantic", type=float, help="weight of the semantic term, for drawn "
                        f"scenes alone; 0: none (default: {Settings.semantic})")
    parser.add_argument("--kl", type=float, default=Settings.kl,
                        help="weight of the KL term, per latent number (default: %(default)s)")
    parser.add_argument("--dtype", default=Settings.dtype, choices=["auto", "bf16", "fp32"],
                        help="auto: measure, take the faster (default)")
    parser.add_argument("--save-every", type=positive, default=Settings.save_every, metavar="N",
                        help="steps (default: %(default)s)")
    parser.add_argument("--preview-every", type=positive, default=Settings.preview_every,
                        metavar="N", help="steps (default: %(default)s)")
    parser.add_argument("--report", type=positive, default=500,
                        help="held-out scenes or pictures of the final report "
                             "(default: %(default)s)")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    require(args.size in SIZES, f"unknown size '{args.size}': choose one of {', '.join(SIZES)}")
    require(args.minutes > 0, "--minutes must be above 0")
    require(args.data is None or args.semantic is None,
            "--semantic is for drawn scenes: nobody has labelled what the pictures of --data show")

    semantic, pictures, digest = args.semantic, None, None
    if args.data is not None:
        semantic, pictures = 0.0, Pictures(args.data, args.seed, BATCH)
        digest = pictures.shards.digest
    elif semantic is None:
        semantic = Settings.semantic
    settings = Settings(size=args.size, steps=args.steps, minutes=args.minutes,
                        semantic=semantic, kl=args.kl, dtype=args.dtype,
                        save_every=args.save_every, preview_every=args.preview_every, data=digest)
    # DIR itself is for the denoiser's run.
    run = start_run(Path(args.out) / "vae", seed=args.seed)
    if pictures is not None:
        run.say(f"{len(pictures.buckets):,} pictures, of which {len(pictures.aside)} are kept "
                "aside; they have no labels, so there is no semantic term and no probe")
    check_same_run(run.out, settings.identity(run.seed))
    kept = kept_progress(run.out)
    finished = kept and Progress(**kept).done(settings) >= 1
    if finished and (run.out / WEIGHT_NAMES[0]).exists():
        run.say(f"{run.out} was finished at step {kept['step']}, and is left as it is")
        return
    ema, progress = train(run, settings, pictures)
    if progress.done(settings) < 1:
        run.say_stopped(progress.step)
        return
    command = shlex.join(["python", "-m", "toy.autoencoder", *argv])
    finish(run, settings, ema, progress, args.report, command, pictures)
    if args.size in ("nano", "toy"):               # the sizes of which all parts are made here
        run.say(f"next: {command_for_next_part(run.out.parent, args.size, args.data)}")


if __name__ == "__main__":
    run_command(main)
