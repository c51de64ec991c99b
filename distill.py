"""distill.py: a teacher of twenty guided steps becomes a student of four plain ones.

Read before: rl.py, this one's sibling, and all that stands before it; kit/players.py.
Assumes:     a trained teacher (`--teacher`, default weights/toy), which stays frozen. Do reward RL
             before this: a student of few steps blurs when it is trained by rewards.

The same command again resumes:

    python distill.py --out runs/turbo                     # from weights/toy, on the toy world
    python sample.py --eval --weights runs/turbo           # its notes say four steps, guidance 1
    python distill.py --out runs/no-ca --without ca        # what a term does: ca, dm, gan or ida
    python distill.py --out runs/turbo --lora 3 --export weights/toy-turbo     # as a small adapter

    python distill.py --size full --lora 64 --teacher DIR_OR_REPO --data 'shards/*.tar'
    python distill.py --size full --lora 64 --teacher DIR_OR_REPO --data captions.txt --without gan
    torchrun --nproc-per-node 8 distill.py --size full --fsdp --teacher DIR --data 'shards/*.tar'

The story in one paragraph. The student is put where its own sampler would put it: k of its four
steps are run without gradient, and from there it predicts the picture, y. Three forces act on y.
Distribution matching (DM): y is noised, and a `fake` model, which always learns what the student
now makes, and the teacher both say what they see in it; the difference moves the student's
pictures, as a crowd, onto the teacher's. Guidance (CA, CFG augmentation): the teacher's guided
prediction against its plain one, at levels cleaner than the student's input only; this is what
makes one forward a step enough. Discriminator (GAN): small heads on the frozen teacher's features
tell real pictures from the student's and give back the sharpness that the other two lose. Fake and
heads take four updates for each one of the student's, and after it the fake is pulled three
hundredths of the way to the student (IDA, implicit distribution alignment), so that it never falls
far behind.

Where this departs from the paper [ours]: the heads' shape and places, and a logit for each token;
fake and heads learn at the same noise levels as DM; R1, which keeps the heads smooth, takes a
quarter of a batch, since it is slow, being in fp32; a running average of the student is what is
saved; `--lora` trains adapters where the paper trains all weights; the toy has other rates, batches
and steps (`SETTINGS`), and its student's rate falls to zero over the last half of a run.
"""
import argparse
import copy
import functools
import json
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import data
import kit.lora
import lens
import sample
import train
from kit.checkpoint import load_pipeline, save_pipeline, unsharded
from kit.files import Parser, not_negative, positive, require, run_command, seed_number, user_path
from kit.images import contact_sheet, save_png
from kit.places import (
    PARTS,
    Places,
    add_part_flags,
    base_from,
    fetch_places,
    gather,
    has_parts,
    read_metadata,
    vae_identity,
)
from kit.players import Players, trained_weights
from kit.run import (
    Log,
    Notice,
    average_decay,
    choose,
    code_version,
    compile_blocks,
    due,
    follow,
    gathered,
    generator,
    in_words,
    learning_rate_factor,
    pick_device,
    rank_zero_first,
    share_out,
    start_run,
    use_attention,
    whole,
)
from kit.shrink import shrink
from kit.state import (
    check_no_other_weights,
    check_same_run,
    kept_progress,
    load_state,
    save_state,
)
from kit.tars import find_files
from toy.checker import held_out
from toy.dataset import World
from toy.world import TASKS

STEPS = 4                  # [paper] of the student's sampler
CRITIC = 4                 # [paper] updates of fake and heads to one of the student
PULL = 0.1                 # [paper] weight of L_DM + L_CA
IDA = 0.03                 # [paper] phi <- 0.97 phi + 0.03 theta
R1_GAMMA = 1.0             # [paper] weight of R1
R1_NOISE = 0.1             # [paper] standard deviation of what R1 adds to a noised picture
R1_SHARE = 0.25            # [ours] share of a batch that R1 looks at
BETAS = (0.0, 0.9)         # [paper] of AdamW: an adversary's old gradients mislead
MARGIN = 0.02              # [ours] share of a range left out at both of its ends, see draw_levels
TERMS = ("ca", "dm", "gan", "ida")


# --- Settings -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Settings:
    """What a distillation learns by."""
    stage: train.Stage     # areas, pictures a device, steps, the student's rate, the toy's scenes
    fake_lr: float         # learning rate of the fake
    heads_lr: float        # learning rate of the discriminator's heads
    gan: float             # weight of L_G
    guidance: float        # of the teacher, to be distilled
    average: float         # decay of the student's average, which the toy's 100 steps do not reach
    without: frozenset = frozenset()       # terms that are left out, to see what they do


SETTINGS = {
    "nano": Settings(
        stage=train.Stage(areas=(64, 96), batch=(8, 4), steps=20, lr=1e-4, scenes=(48, 24),
                          shape_odds=train.STAR_ODDS),
        fake_lr=1e-4, heads_lr=1e-3, gan=0.02, guidance=5.0, average=0.9),
    # [ours] gan: L_DM and L_CA are means over the n numbers of a picture, so their force shrinks as
    # 1 / sqrt(n), and that of L_G does not. Of 1024 x 1024 pixels n is 524,288, of 96 x 96 1,152:
    # 0.001 [paper] x sqrt(524,288 / 1,152) = 0.001 x 21.3 = 0.02.
    # guidance: train.TOY_GUIDANCE is best for the teacher, but a student of it scored lower.
    "toy": Settings(
        stage=train.Stage(areas=(64, 96, 128), batch=(32, 32, 24), steps=100, lr=1e-4,
                          scenes=(300, 300, 3_000), shape_odds=train.STAR_ODDS),
        fake_lr=5e-4, heads_lr=2e-3, gan=0.02, guidance=5.0, average=0.98),
    # [paper] but the average
    "full": Settings(
        stage=train.Stage(areas=(512, 768, 1024), batch=(4, 4, 4), steps=1000, lr=5e-7,
                          decay=False),
        fake_lr=5e-7, heads_lr=1e-4, gan=0.001, guidance=5.0, average=0.98),
}

# [ours] An adapter's rates are 10 times those of whole weights; at 20 times the toy's pictures lost
# texture.
LORA_LR = 10.0
# [ours] The modulation too: a student meets four noise levels only, and when all weights of the toy
# were trained, these layers moved three times as far as the others. Without them an adapter of rank
# 6 ended at 0.72 where all weights reached 0.78 (seed 0, 96 x 96).
LORA_TARGETS = (*kit.lora.LORA_TARGETS, "img_mod.1", "txt_mod.1")


def settings_for(size, lora=0, steps=None, lr=None, guidance=None, without=()):
    """The preset of a size, with what is asked for in its place. lora: rank of adapters, or 0."""
    preset = SETTINGS.get(size, SETTINGS["full"])
    stage = preset.stage
    if steps is None:
        steps = stage.steps
    if lr is None:
        lr = stage.lr * (LORA_LR if lora else 1)
    if guidance is None:
        guidance = preset.guidance
    fake_lr = lr * preset.fake_lr / stage.lr       # the fake keeps its ratio to the student
    return replace(preset, stage=replace(stage, steps=steps, lr=lr), fake_lr=fake_lr,
                   guidance=guidance, without=frozenset(without))


# --- Noise levels, and the student's own sampler --------------------------------------------------

def shifted(u, levels):
    """u in (0, 1), in which the sampler's steps are evenly spaced, -> noise level t.

    levels  [steps + 1] of the sampler, see lens.sigmas. It multiplies odds by a factor:
            t / (1 - t) = e^mu u / (1 - u).
    """
    # The last level above 0 has u = 1 / steps, so u / (1 - u) = 1 / (steps - 1). Its own odds, over
    # that, are the factor.
    steps = len(levels) - 1
    last = levels[-2].item()
    factor = last / (1 - last) * (steps - 1)                                       # e^mu
    return factor * u / (1 - u + factor * u)


def draw_levels(count, levels, below, rng):
    """[count] noise levels: u evenly drawn from 0 to `below`, less a MARGIN of that at both ends,
    then shifted.

    DM: below = 1, the whole range. CA: below = 1 - k / STEPS, the u of level k: only levels cleaner
    than the student's input. The decoupled-DMD paper, whose CA this is, has time run the other way
    round: with its sign one would draw the noisier levels, where guidance overshoots (see
    test_where_the_mean_comes_to_rest).
    """
    u = torch.rand(count, generator=rng)
    return shifted(below * (MARGIN + (1 - 2 * MARGIN) * u), levels)


@torch.no_grad()
def simulate(model, noise, text, mask, grid, levels, k):
    """The first k steps of the student's sampler, so that it learns on states that it will meet.

    noise [B, N, C], text K x [B, S, E], mask [B, S], levels [STEPS + 1] -> x [B, N, C] fp32 at
    level k: what `sample.denoise` has there at guidance 1, bit for bit, except under FSDP.
    """
    x = noise.float()
    if k == 0:
        return x

    levels = levels.to(x.device)
    if isinstance(model, FSDPModule):
        # FSDP gathers weights when `forward` is called; the sampler's velocity calls other methods.
        def velocity(x, i):
            return model(x, levels[i].expand(len(x)), text, mask, grid).float()    # [B, N, C]
    else:
        velocity = sample.GuidedVelocity(model, text, mask, None, grid, levels, guidance=1.0,
                                         share=False)
    for i in range(k):
        x = lens.euler_step(x, velocity(x, i), levels[i], levels[i + 1])
    return x


# --- The forces on a prediction y. A gradient here is what is subtracted from y -------------------
# At a noised x_t a model with velocity v predicts the picture x0 = x_t - t v. So of two models
# x0_a - x0_b = t (v_b - v_a).

def dm_gradient(v_fake, v_teacher, t):
    """x0 of the fake - x0 of the teacher, from their velocities at one noised y: [B, N, C]. Zero
    where both see the same. [paper]"""
    return lens.widen(t, v_teacher) * (v_teacher - v_fake)     # (x_t - t v_fake) - (x_t - t v_T)


def ca_gradient(v_cond, v_uncond, t, guidance, guide=sample.guide):
    """x0 of the teacher with its caption - its guided x0: [B, N, C]. [paper]

    In the paper -(g - 1) (x0 with the caption - x0 without). Here by the guidance of the sampler
    with its rescaling [ours]: else the student learns the burnt-out colours that the teacher's
    sampler takes care to avoid. guide: tests pass one that does not rescale.
    """
    guided = guide(v_cond, v_uncond, guidance)
    return lens.widen(t, v_cond) * (guided - v_cond)           # (x_t - t v_cond) - (x_t - t guided)


def normalised(gradient, y, x0_teacher):
    """Divided per sample by mean|y - x0 of the teacher|: levels at which the teacher itself is
    unsure of y count no more than others. Divided by its own size, it would be of size 1 for ever.
    [paper]"""
    unsure = (y - x0_teacher).abs().mean((1, 2), keepdim=True)                     # [B, 1, 1]
    return gradient / unsure.clamp_min(1e-5)


def pull(y, gradient):
    """The mean of 1/2 |y - stop(y - gradient)|^2 over all numbers: a loss whose gradient at y is
    `gradient` / their count. [paper]"""
    target = (y - gradient).detach()
    return 0.5 * (y - target).square().mean()


# --- The discriminator: heads on the frozen teacher's image tokens --------------------------------

def places(blocks):
    """Numbers, from 0, of the blocks whose output the heads read: about a third and two thirds of
    the way in, and the last. [ours]"""
    return sorted({blocks // 3, 2 * blocks // 3, blocks - 1})


def make_heads(config, seed):
    """One head a place, each a logit a token. The last layer's weights start at zero: all logits
    are then its bias, whatever the picture, and no force acts on the student. [ours]"""
    width = config.inner_dim
    hidden = min(256, width)
    heads = nn.ModuleList()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in places(config.num_layers):
            heads.append(nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, hidden),
                nn.SiLU(),
                nn.Linear(hidden, 1)))
    for head in heads:
        nn.init.zeros_(head[-1].weight)
    return heads


def teacher_features(teacher, x, t, text, mask, grid):
    """The image tokens [B, N, W] after each block of `places`."""
    wanted = places(len(teacher.transformer_blocks))
    features = []

    def keep(i, img):
        if i in wanted:
            features.append(img)

    teacher(x, t, text, mask, grid, on_block=keep)
    return features


def judge(heads, features):
    """Logits [B, places * N] fp32: high for real."""
    pairs = zip(heads, features, strict=True)
    logits = [head(feature.float()).squeeze(-1) for head, feature in pairs]        # [B, N] each
    return torch.cat(logits, 1)


def logistic(real, made):
    """The heads' loss from their logits on real and on made pictures: 2 log 2 where all logits are
    zero. [paper]"""
    return F.softplus(-real).mean() + F.softplus(made).mean()


def approximate_r1(plain, moved):
    """gamma / 2 |D(x) - D(x + a noise)|^2, from D's logits on both. [paper]

    For small a, D(x + a noise) - D(x) is a noise . grad D(x). So on average over noises this is
    gamma a^2 / 2 times the squared length of D's gradient, without a second backward pass.
    """
    return R1_GAMMA / 2 * (plain - moved).square().mean()


# --- Who plays ------------------------------------------------------------------------------------

def make_players(base, heads, seed, lora=0, recompute="none", compiled=False, shard_dtype=None,
                 device=None):
    """-> Players: student, fake and average all start as the teacher.

    base         the teacher; all weights are fp32, though products may be bf16
    heads        of `make_heads`
    lora         rank of adapters; 0: whole models
    recompute    see LensTransformer.set_recompute
    shard_dtype  under FSDP the type of products; None: each process holds all weights
    device       where the players will run: under FSDP the base is still on the CPU
    """
    models = {"teacher": base}
    for who in ("student", "fake", "ema"):
        if lora:                                   # one seed: alike, and as the teacher (B is zero)
            kit.lora.add_lora(base, lora, lora, LORA_TARGETS, who, generator(seed, 1))
            models[who] = base
        else:
            models[who] = copy.deepcopy(base)

    for model in models.values():
        model.requires_grad_(False)
    for who in ("student", "fake"):
        for p in trained_weights(models[who], who, lora).values():
            p.requires_grad_(True)

    # With LoRA all four are one model, which is then set up four times alike: harmless.
    for who, model in models.items():
        model.set_recompute(recompute)
        if compiled:
            compile_blocks(model, fullgraph=False, device=device)
        if shard_dtype is not None:
            # The teacher's weights stay fp32, as R1 needs; elsewhere autocast casts its products.
            share_out(model, None if who == "teacher" else shard_dtype)

    # Looked up once, here: after a forward under FSDP, named_parameters may give gathered copies.
    trained = {who: trained_weights(models[who], who, lora) for who in ("student", "fake", "ema")}
    trained["heads"] = dict(heads.named_parameters())
    return Players(models, heads, trained, lora)


def make_optimizers(players, settings):
    """{who: AdamW} of student, fake and, where there is a discriminator, heads."""
    rates = {"student": settings.stage.lr, "fake": settings.fake_lr}
    if "gan" not in settings.without:
        rates["heads"] = settings.heads_lr
    return {who: torch.optim.AdamW(players.weights(who).values(), lr=lr, betas=BETAS,
                                   weight_decay=0.0, fused=True)
            for who, lr in rates.items()}


def descend(run, optimizer):
    """One step along the mean gradient of all ranks, clipped. -> its norm. Along a gradient that is
    not finite no step is taken: weights and moments stay."""
    parameters = optimizer.param_groups[0]["params"]
    if run.ranks > 1:
        for p in parameters:
            # FSDP has averaged over ranks what it has sharded.
            if p.grad is not None and not isinstance(p.grad, DTensor):
                run.sum_over_ranks(p.grad)
                p.grad /= run.ranks

    norm = whole(nn.utils.clip_grad_norm_(parameters, train.CLIP)).item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


# --- The two kinds of update ----------------------------------------------------------------------

@dataclass
class UpdateBatch:
    """What one update is made of, on the run's device. The first four are as in data.Batch, so
    train.flow_matching_loss takes it for one."""
    tokens: torch.Tensor   # [B, N, C] real pictures; None: captions alone
    text: list             # K x [B, S, E]
    mask: torch.Tensor     # [B, S]
    grid: tuple            # (h, w), N = h * w
    noise: torch.Tensor    # [B, N, C] where the student's sampler starts
    levels: torch.Tensor   # [STEPS + 1] of that sampler, on the CPU
    k: int                 # how many of its steps lie behind the student's input
    rng: torch.Generator   # of all that is drawn in the update


def make_update_batch(run, batch, number, channels):
    """data.Batch -> the UpdateBatch of update `number`.

    Its noise is a function of (seed, number, rank), and k of (seed, number), the same on all ranks:
    a rank that had fewer steps to simulate would wait for the others.
    """
    rng = generator(run.seed, number, 1 + run.rank)
    k = int(torch.randint(STEPS, (), generator=generator(run.seed, number)))
    N = batch.grid[0] * batch.grid[1]
    noise = torch.randn((len(batch.samples), N, channels), generator=rng)
    tokens = None
    if batch.tokens is not None:
        tokens = run.move(batch.tokens)
    return UpdateBatch(
        tokens=tokens, text=[run.move(layer) for layer in batch.text], mask=run.move(batch.mask),
        grid=batch.grid, noise=run.move(noise), levels=lens.sigmas(N, STEPS), k=k, rng=rng)


def noised(run, batch, x, below=1.0, t=None):
    """x [B, N, C] -> (x at noise levels t [B, N, C], the noise, t [B]). t: None, to draw it."""
    if t is None:
        t = draw_levels(len(x), batch.levels, below, batch.rng).to(run.device)
    noise = torch.randn(x.shape, generator=batch.rng).to(run.device)
    return lens.add_noise(x, noise, t), noise, t


def student_prediction(run, players, batch):
    """y [B, N, C] fp32: what the student takes for the picture, k steps into its own sampler."""
    student = players.as_("student")               # with LoRA: switches to the student's adapter
    text, mask, grid = batch.text, batch.mask, batch.grid
    t = batch.levels[batch.k].expand(len(batch.noise)).to(run.device)              # [B]
    with run.autocast():
        x = simulate(student, batch.noise, text, mask, grid, batch.levels, batch.k)

    # A second context: autocast caches the weights that it casts. Those it cast in `simulate`,
    # under no_grad, have no gradient, and in the same context they would be taken again.
    with run.autocast():
        v = student(x, t, text, mask, grid).float()                                # [B, N, C]
    return lens.data_prediction(x, v, t)


def critic_update(run, players, batch, optimizers, settings):
    """Fake: flow matching on the student's pictures. Heads: real or made? -> what the log tells."""
    with torch.no_grad():
        y = student_prediction(run, players, batch)                                # [B, N, C]

    _, noise, t = noised(run, batch, y)            # flow_matching_loss makes x_t again, from these
    made = replace(batch, tokens=y)
    with run.autocast():
        loss = train.flow_matching_loss(players.as_("fake"), made, noise, t).mean()
    loss.backward()
    report = {"fake_loss": loss.item(), "fake_norm": descend(run, optimizers["fake"])}
    if "gan" not in settings.without:
        report |= heads_update(run, players, batch, y, optimizers["heads"])
    return report


def heads_update(run, players, batch, y, optimizer):
    """The heads see real pictures and the student's y [B, N, C], with the same captions, at the
    same levels. -> what the log tells."""
    teacher, heads = players.as_("teacher"), players.heads
    real, _, t = noised(run, batch, batch.tokens)                                  # [B, N, C]
    made, _, _ = noised(run, batch, y, t=t)                                        # [B, N, C]
    text, mask = captions_twice(batch, len(y))
    with torch.no_grad(), run.autocast():
        features = teacher_features(teacher, torch.cat([real, made]), torch.cat([t, t]),
                                    text, mask, batch.grid)                        # [2B, N, W] each
    on_real, on_made = judge(heads, features).chunk(2)

    # R1, in fp32: bf16 cannot hold the difference of two nearly equal numbers.
    few = max(1, round(R1_SHARE * len(y)))
    real, t = real[:few], t[:few]
    moved = real + R1_NOISE * torch.randn(real.shape, generator=batch.rng).to(run.device)
    text, mask = captions_twice(batch, few)
    with torch.no_grad():
        features = teacher_features(teacher, torch.cat([real, moved]), torch.cat([t, t]),
                                    text, mask, batch.grid)
    r1 = approximate_r1(*judge(heads, features).chunk(2))

    loss = logistic(on_real, on_made) + r1
    loss.backward()

    right = ((on_real > 0).float().mean() + (on_made < 0).float().mean()) / 2
    return {"heads_loss": loss.item(), "r1": r1.item(), "heads_right": right.item(),
            "heads_norm": descend(run, optimizer)}


def captions_twice(batch, count):
    """(text, mask) of a batch's first `count` captions, twice over: each goes with two pictures."""
    text = [layer[:count].repeat(2, 1, 1) for layer in batch.text]
    return text, batch.mask[:count].repeat(2, 1)


def student_update(run, players, batch, optimizers, settings):
    """PULL (L_DM + L_CA) + settings.gan L_G. [paper] -> what the log tells.

    The losses' gradients are gathered at y, as a force, so that each can be measured. The force
    then goes through the student in one backward pass.
    """
    text, mask, grid = batch.text, batch.mask, batch.grid
    y = student_prediction(run, players, batch)                                    # [B, N, C]
    leaf = y.detach().requires_grad_()             # where the forces are gathered

    with torch.no_grad(), run.autocast():
        # Distribution matching: what the fake sees in y, against what the teacher sees.
        x, _, t = noised(run, batch, leaf)
        v_teacher = players.as_("teacher")(x, t, text, mask, grid).float()         # [B, N, C]
        v_fake = players.as_("fake")(x, t, text, mask, grid).float()
        dm = normalised(dm_gradient(v_fake, v_teacher, t), leaf,
                        lens.data_prediction(x, v_teacher, t))
        cosine = F.cosine_similarity(v_fake.flatten(1), v_teacher.flatten(1)).mean()

        # Guidance: the teacher with the caption against the teacher without, at levels cleaner
        # than the student's input.
        x, _, t = noised(run, batch, leaf, below=1 - batch.k / STEPS)
        teacher = players.as_("teacher")
        v_cond = teacher(x, t, text, mask, grid).float()                           # [B, N, C]
        v_uncond = teacher(x, t, None, None, grid).float()
        ca = normalised(ca_gradient(v_cond, v_uncond, t, settings.guidance), leaf,
                        lens.data_prediction(x, v_cond, t))

    # DM or CA that is left out is still measured, for the log. The cosine tells how alike fake and
    # teacher see y: at 1 DM has nothing left to say.
    dm_weight = 0.0 if "dm" in settings.without else PULL
    ca_weight = 0.0 if "ca" in settings.without else PULL
    loss = dm_weight * pull(leaf, dm) + ca_weight * pull(leaf, ca)
    (force,) = torch.autograd.grad(loss, leaf)                                     # [B, N, C]
    terms = {"cosine": cosine.item(), "dm": dm.abs().mean().item(), "ca": ca.abs().mean().item()}

    if "gan" not in settings.without:
        x, _, t = noised(run, batch, leaf)
        with run.autocast():                       # the gradient flows through the teacher
            features = teacher_features(players.as_("teacher"), x, t, text, mask, grid)
        gan_loss = F.softplus(-judge(players.heads, features)).mean()
        (from_heads,) = torch.autograd.grad(settings.gan * gan_loss, leaf)
        terms["gan_loss"] = gan_loss.item()
        # The force of the heads, against that of the other two together.
        terms["gan"] = from_heads.norm().item() / max(force.norm().item(), 1e-12)
        loss = loss + settings.gan * gan_loss
        force = force + from_heads

    # With LoRA the teacher and the fake have played since. Blocks that are recomputed backwards
    # need the student's adapter again.
    players.as_("student")
    y.backward(force)
    norm = descend(run, optimizers["student"])
    if "ida" not in settings.without:
        fake = players.models["fake"]
        if isinstance(fake, FSDPModule):           # its root is still gathered, as it was before
            fake.reshard()
        follow(players.weights("fake").values(), players.weights("student").values(), IDA)

    report = {"loss": loss.item(), **terms, "grad_norm": norm, "spread": spread(leaf.detach())}
    if batch.tokens is not None:
        report["spread_real"] = spread(batch.tokens)
    return report


def spread(x):
    """How far apart a batch's pictures are: 0 where all are one. x [B, N, C]."""
    return x.var(0, correction=0).mean().sqrt().item()


def distillation_step(run, players, batches, optimizers, settings, step):
    """Four updates of fake and heads, one of the student, and its average follows.

    batches  an iterator of UpdateBatch;  step: how many are done
    -> (what the log tells, of fake and heads the last update; the student's batch)
    """
    for _ in range(CRITIC):
        critic = critic_update(run, players, next(batches), optimizers, settings)

    # The student's rate falls to zero, so that the fake can catch up: at a constant rate the toy's
    # pictures grew noisy after a hundred steps.
    stage = settings.stage
    factor = learning_rate_factor(step, stage.steps, warmup=1) if stage.decay else 1.0
    optimizers["student"].param_groups[0]["lr"] = stage.lr * factor

    batch = next(batches)
    report = student_update(run, players, batch, optimizers, settings)
    decay = average_decay(step + 1, settings.average)
    follow(players.weights("ema").values(), players.weights("student").values(), 1 - decay)
    return {**report, **critic}, batch


# --- How far a run is, and what it saves ----------------------------------------------------------

@dataclass
class Progress:
    """How far a run is; kept with its state."""
    step: int = 0
    seconds: float = 0.0
    scores: dict = field(default_factory=dict)     # the student's, of the last evaluation
    teacher: dict = field(default_factory=dict)    # {"20 steps, guidance 5": scores, ...}
    data: str = None                               # digest of the shards or captions
    bf16: bool = False
    attention: str = ""


@dataclass(frozen=True)
class Output:
    """What checkpoints, scores and contact sheets need beside the weights."""
    teacher: Places        # as it was asked for, and
    here: Places           # on this machine
    vae: nn.Module
    encoder: lens.TextEncoder
    home: tuple            # (height, width) at which the student is evaluated
    same: dict             # {flag: value}, the settings that a resume must share
    shown: tuple = ()      # prompts of the sheets; none: held-out ones of the toy world


def save(run, players, optimizers, progress, output):
    """The student, and the state to resume from: last, so that a run killed in between goes back
    and writes both again."""
    model = unsharded(run, players.as_("ema"))     # under FSDP gathered on rank 0
    if run.rank == 0:
        write_student(run, model, players.lora, progress, output)
    save_state(run, progress.step, players.trained, optimizers.values(), output.same,
               asdict(progress))


def write_student(run, model, lora, progress, output):
    """The student's average in the released layout; with LoRA as an adapter beside the name of its
    base. sample.py --weights reads either."""
    notes = {
        "command": shlex.join(["python", "distill.py", *sys.argv[1:]]),
        "commit": code_version(),
        "seed": run.seed,
        "trained_steps": progress.step,
        "trained_seconds": round(progress.seconds),
        "score": json.dumps(progress.scores),
        "teacher": str(output.teacher),
        "steps": STEPS,
        "guidance": 1.0,
        "base": output.home[0],
        "words": read_metadata(output.here.transformer).get("words", "[]"),
    }
    base = base_from(run.out, output.teacher)
    if lora:
        kit.lora.save_lora(model, run.out, "ema", notes)
        save_pipeline(run.out, metadata=notes, base=base)
    else:
        if has_parts(run.out):
            base = None
        save_pipeline(run.out, transformer=model, metadata=notes, base=base)


# --- Evaluation: every rank calls, since FSDP gathers weights from all; rank 0 works --------------

class Viewer:
    """Teacher and student as they sample: scores on the toy's tasks, and contact sheets."""

    def __init__(self, run, players, output, guidance):
        self.run, self.players, self.output, self.guidance = run, players, output, guidance
        self.teacher_pictures = None               # of the sheet; they never change

    def pipeline(self, who):
        """(model, vae, encoder), or None on ranks above 0."""
        model = unsharded(self.run, self.players.as_(who))
        if self.run.rank > 0:
            return None
        return model, self.output.vae, self.output.encoder

    def evaluate(self, progress, say):
        """Fills progress.scores with the student's scores. The first time it also fills
        progress.teacher: guided at its own number of steps, and plain at the student's."""
        if not progress.teacher:
            for steps, guidance in ((sample.STEPS, self.guidance), (STEPS, 1.0)):
                how = f"{steps} steps, guidance {guidance:g}"
                progress.teacher[how] = self.scores("teacher", steps, guidance)
                say(f"step {progress.step}: teacher, {how}: {in_words(progress.teacher[how])}")
        progress.scores = self.scores("ema", STEPS, 1.0)
        say(f"step {progress.step}: student, {STEPS} steps, guidance 1: "
            f"{in_words(progress.scores)}")

    def scores(self, who, steps, guidance):
        """{name: score}; {} on ranks above 0."""
        pipeline = self.pipeline(who)
        if pipeline is None:
            return {}
        scores, _, _ = sample.evaluate(pipeline, *self.output.home, steps, guidance, per_task=20,
                                       progress=True, diversity=True)
        return scores

    def sheet(self, path):
        """A contact sheet, one prompt and seed a column. Rows: the teacher's 20 guided steps; its 4
        plain steps; the student's 4 plain steps."""
        prompts = self.output.shown
        if not prompts:
            prompts = [row.prompt for task in TASKS
                       for row in held_out(task, 2, *self.output.home)]
        if self.teacher_pictures is None:
            guided = self.pictures("teacher", prompts, sample.STEPS, self.guidance)
            plain = self.pictures("teacher", prompts, STEPS, 1.0)
            self.teacher_pictures = guided + plain
        student = self.pictures("ema", prompts, STEPS, 1.0)
        if self.run.rank == 0:
            sheet = contact_sheet(self.teacher_pictures + student, columns=len(prompts))
            save_png(sheet, path)

    def pictures(self, who, prompts, steps, guidance):
        """A PIL image a prompt; [] on ranks above 0."""
        pipeline = self.pipeline(who)
        if pipeline is None:
            return []
        height, width = self.output.home
        return sample.generate(prompts, pipeline, height=height, width=width, steps=steps,
                               guidance=guidance, progress=True)


# --- The loop -------------------------------------------------------------------------------------

def planned_batches(run, source, pictures, first, last):
    """The batches of updates first to last - 1, those of all ranks: what data.plan gives, epoch
    after epoch. Ranks take them in turn. pictures: {bucket: pictures a device}."""
    @functools.lru_cache(maxsize=1)                # one epoch is needed at a time
    def plan(epoch):
        return data.plan(source.buckets, source.lengths(epoch), pictures, run.seed, epoch)

    length = len(plan(0))                          # as many in every epoch
    batches = []
    for number in range(first * run.ranks, last * run.ranks):
        epoch, place = divmod(number, length)
        batches.append(plan(epoch)[place])
    return batches


def update_batches(run, source, planned, first, channels):
    """The UpdateBatch of each planned batch, in order. first: the number of the first update."""
    faults = data.FaultCount()
    for number, batch in enumerate(source.stream(planned), first):
        faults.add(batch)
        yield make_update_batch(run, batch, number, channels)


def mean_over_ranks(run, report):
    """{name: number}, averaged over the ranks."""
    values = torch.tensor(list(report.values()), dtype=torch.float64).to(run.device)
    values = run.sum_over_ranks(values) / run.ranks
    return dict(zip(report, values.tolist(), strict=True))


def train_student(run, players, optimizers, source, settings, progress, output, schedule):
    """From progress.step to the last step: updates, the log, and now and then scores, a contact
    sheet and a checkpoint."""
    steps, updates = settings.stage.steps, CRITIC + 1
    first = progress.step * updates
    pictures = settings.stage.pictures(source.sizes)
    planned = planned_batches(run, source, pictures, first, steps * updates)
    log, notice = Log(run, progress.step), Notice()
    if planned and not data.prepare(run, source, planned, stopped=lambda: notice.given):
        sys.exit(0)                                # before the first step: there is nothing to save

    channels = players.models["teacher"].config.in_channels
    mine = planned[run.rank::run.ranks]
    batches = update_batches(run, source, mine, first, channels)
    viewer = Viewer(run, players, output, settings.guidance)
    bar = tqdm(total=steps, initial=progress.step, desc="distillation", unit="step",
               mininterval=2, disable=run.rank > 0)

    def say(message):
        if run.rank == 0:
            bar.write(message)

    unsound = 0                                    # steps in a row that could not be learnt from
    while progress.step < steps:
        begin = time.perf_counter()
        report, batch = distillation_step(run, players, batches, optimizers, settings,
                                          progress.step)
        report = mean_over_ranks(run, report)
        unsound = 0 if math.isfinite(report["grad_norm"] + report["fake_norm"]) else unsound + 1
        train.check_sound(unsound, bar)
        stop = any(gathered(notice.given))         # a notice to one rank stops all
        progress.step += 1
        progress.seconds += time.perf_counter() - begin

        if due(schedule.eval_every, progress.step, steps):
            viewer.evaluate(progress, say)
            report |= progress.scores
        if due(schedule.preview_every, progress.step, steps):
            viewer.sheet(run.out / f"preview-{progress.step:05d}.png")
        h, w = batch.grid
        report = {name: round(value, 6) for name, value in report.items()}
        log(step=progress.step, **report, k=batch.k,
            size=train.size_name((data.CELL * h, data.CELL * w)),
            seconds=round(progress.seconds, 2))
        if stop or due(schedule.save_every, progress.step, steps):
            save(run, players, optimizers, progress, output)
            log.draw()

        bar.update()
        bar.set_postfix_str(f"dm {report['dm']:.2f}, ca {report['ca']:.2f}, "
                            f"fake {report['fake_loss']:.3f}")
        if stop and progress.step < steps:
            bar.close()
            run.say_stopped(progress.step)
            sys.exit(0)
    bar.close()


def open_source(run, stage, output, pattern):
    """A source of batches, as data.py describes it: the toy world, tar shards, or captions."""
    vae, encoder = output.vae, output.encoder
    if pattern is None:
        return World(stage, run.seed, vae, encoder, run.out.parent, run.device, run.say)
    paths = find_files(pattern)
    if all(path.endswith(".tar") for path in paths):
        return data.ShardSource(pattern, stage.sizes(), run.seed, vae, encoder, run.device,
                                workers=4, vae_hash=vae_identity(output.here.vae), say=run.say)
    (path,) = paths
    return data.CaptionSource(path, stage.sizes(), encoder)


def distill(run, size, teacher, settings, same, schedule, pattern=None, lora=0, fsdp=False,
            compiled=False):
    """A whole run, from what `run.out` holds of it to its last step.

    teacher   Places of it, or its name
    same      {flag: value}, the settings that a resume must share
    pattern   of tar shards, or a file of captions; None: the toy world
    lora      rank of adapters; 0: all weights
    """
    config, stage = lens.SIZES[size].transformer, settings.stage
    usual_text, _ = train.text_tokens(size)
    why = choose(run, config, (stage.home // data.CELL)**2 + usual_text, kept_progress(run.out))
    use_attention(run.attention)

    # The frozen models, and the four that play.
    teacher = gather(teacher)
    here = fetch_places(teacher)
    dtype = torch.float32 if size in train.TOY_SIZES else None     # None: as they are stored
    _, vae, encoder = load_pipeline(here, run.device, dtype, parts=("vae", "text_encoder"))
    output = Output(teacher, here, vae, encoder, data.bucket(stage.home), same)
    # Under FSDP no device ever holds a whole model.
    base, _, _ = load_pipeline(here, "cpu" if fsdp else run.device, torch.float32,
                               parts=("transformer",))
    require(base.config == config, f"--teacher {teacher}: its weights are not of size {size}")
    shard_dtype = None
    if fsdp:
        shard_dtype = torch.bfloat16 if run.bf16 else torch.float32
    heads = make_heads(config, run.seed).to(run.device)
    players = make_players(base, heads, run.seed, lora, "full" if size == "full" else "none",
                           compiled, shard_dtype, run.device)

    optimizers = make_optimizers(players, settings)
    progress = Progress()
    kept = load_state(run, players.trained, optimizers.values(), same)
    if kept is not None:
        progress = Progress(**kept)
        run.say(f"resuming {run.out} at step {progress.step}")
    progress.bf16, progress.attention = run.bf16, run.attention
    what = f"LoRA of rank {lora}" if lora else "all weights"
    count = sum(p.numel() for p in players.weights("student").values())
    left_out = ", ".join(sorted(settings.without)) or "nothing"
    run.say(f"{size}: {what}, {count:,} parameters each in student and fake, on {run.ranks} x "
            f"{run.device}\n{why}\nwithout: {left_out}; guidance {settings.guidance:g}")

    with rank_zero_first(run):                     # it indexes the shards
        source = open_source(run, stage, output, pattern)
    require(progress.data in (None, source.digest), "--data: these are not the shards or captions "
            f"that the run in {run.out} began with; give another --out, or the same ones")
    progress.data = source.digest
    prompt = None                                  # the six tasks are the toy world's
    if pattern is not None:
        output = replace(output, shown=tuple(source.first_captions(12)))
        prompt = min(output.shown, key=len)
    train_student(run, players, optimizers, source, settings, progress, output, schedule)
    run.say(f"done: {sample.command_to_see(run.out, prompt)}")


# --- Export: the student as a small adapter of its teacher ----------------------------------------

def export(student_folder, teacher, folder, rank, device, score_at=None):
    """Writes the student as a LoRA over its teacher, in bf16, to ship. Of a toy's student that
    scored 0.80 (seed 1, 96 x 96), rank 3 is 0.24 MB and scored 0.78.

    score_at  (height, width) at which the adapter is scored on the toy's tasks; None: it is not
    """
    parts = ("transformer",) if score_at is None else PARTS
    model, vae, encoder = load_pipeline(teacher, device, torch.float32, parts=parts)
    student, _, _ = load_pipeline(student_folder, device, torch.float32, parts=("transformer",))
    notes = read_metadata(student_folder)
    require(student.config == model.config,
            f"--out {student_folder}: not a student of --teacher {teacher}")

    shrink(student, model, rank, "export")         # gives `model` an adapter: nearly the student
    if score_at is not None:
        scores, _, _ = sample.evaluate((model, vae, encoder), *score_at, STEPS, 1.0)
        notes["score"] = json.dumps(scores)
    kit.lora.save_lora(model, folder, "export", notes)
    save_pipeline(folder, metadata=notes, base=base_from(folder, teacher))
    print(f"wrote {folder}: {notes.get('score', 'not scored')}")


# --- The command line -----------------------------------------------------------------------------

def arguments(argv):
    parser = Parser("Distil a teacher of 20 guided steps into a student of 4 plain ones. "
                    "The same command again resumes.", __doc__)
    add = parser.add_argument
    add("--size", default="toy", choices=lens.SIZES, help="default: toy")
    add("--teacher", default=str(sample.TOY), metavar="DIR_FILE_OR_REPO",
        help="the model to distil, where student and fake start too: a folder, file or hub id "
             "(default: weights/toy)")
    add_part_flags(add)
    add("--out", type=user_path, default="runs/turbo", metavar="DIR",
        help="the student, its state, metrics.jsonl, curves.svg, contact sheets (default: "
             "%(default)s)")
    add("--data", metavar="GLOB",
        help="tar shards of `data.py pack`, or with --without gan a file of captions (default: the "
             "toy world)")
    add("--lora", type=not_negative, default=0, metavar="RANK",
        help="student and fake are adapters on the teacher, instead of whole models (default: "
             "0, whole models)")
    add("--without", action="append", default=[], choices=TERMS,
        help="leave this out, to see what it does; may be given more than once")
    add("--guidance", type=float,
        help="the teacher's, to be distilled (default: what the size says)")
    add("--lr", type=float,
        help="the student's; the fake's keeps its ratio to it (default: what the size says, ten "
             "times that with --lora)")
    add("--fsdp", action="store_true",
        help="under torchrun: weights and moments are shared out over the ranks")
    add("--export", type=user_path, metavar="DIR",
        help="train nothing: write the student of --out there, as a LoRA of rank --lora over "
             "--teacher")
    add("--steps", type=positive, help="of the student (default: what the size says)")
    add("--seed", type=seed_number, default=0, help="default: %(default)s")
    add("--device", help="cpu or cuda (default: CUDA if there is one)")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="compile the blocks (default: on a GPU)")
    add("--save-every", type=positive, default=50, metavar="N", help="steps (default: %(default)s)")
    add("--eval-every", type=not_negative, default=100, metavar="N",
        help="steps; the toy's six tasks, 20 prompts each; 0: never (default: %(default)s)")
    add("--preview-every", type=not_negative, default=100, metavar="N",
        help="steps; 0: never (default: %(default)s)")
    return parser.parse_args(argv)


def check_settings(settings):
    """LensError where there is nothing to learn."""
    without = settings.without
    require(settings.guidance > 1 or "ca" in without,
            f"--guidance {settings.guidance:g}: there is guidance to distil above 1 only "
            "(or --without ca)")
    require(not {"ca", "dm", "gan"} <= without,
            "--without: one of ca, dm and gan must stay, or nothing moves the student")
    require(settings.stage.lr > 0, f"--lr {settings.stage.lr:g}: must be above 0")


def check_data(size, pattern, without):
    """LensError where there is nothing to learn from."""
    if pattern is None:
        require(size in ("nano", "toy"), f"--size {size}: name shards or captions with --data; "
                "the toy world is for --size toy or nano")
        return
    paths = find_files(pattern)
    require(paths, f"--data {pattern}: no file matches")
    if all(path.endswith(".tar") for path in paths):
        return
    require("gan" in without,
            f"--data {pattern}: captions alone suffice with --without gan only; "
            "the discriminator needs real pictures, in tar shards of `data.py pack`")
    require(len(paths) == 1, f"--data {pattern}: more than one file of captions; give one")


def main(argv=None):
    args = arguments(argv)
    settings = settings_for(args.size, args.lora, args.steps, args.lr, args.guidance, args.without)
    check_settings(settings)

    teacher = gather(args.teacher, args.vae, args.text_encoder)
    if args.export:
        require(args.lora, "--export: name the adapter's rank with --lora")
        score_at = None
        if args.size in ("nano", "toy"):
            score_at = data.bucket(settings.stage.home)
        export(args.out, teacher, args.export, args.lora, pick_device(args.device), score_at)
        return

    check_data(args.size, args.data, settings.without)
    same = {
        "--size": args.size,
        "--teacher": str(teacher),
        "--seed": args.seed,
        "--data": args.data,
        "--lora": args.lora,
        "--guidance": settings.guidance,
        "--lr": settings.stage.lr,
        "--without": sorted(settings.without),
    }
    check_same_run(args.out, same)
    check_no_other_weights(args.out, adapter=args.lora > 0)

    run = start_run(args.out, args.seed, args.device)
    require(run.ranks > 1 or not args.fsdp, "--fsdp shares weights among processes: start it with "
            "torchrun --nproc-per-node N distill.py ...")
    require(not (args.fsdp and args.lora), "--fsdp is for whole weights; adapters are small: leave "
            "it out, each process then holds the base")
    compiled = run.device != "cpu" if args.compile is None else args.compile
    # Evaluation is on the toy's tasks, which a model of other data does not know.
    schedule = train.Schedule(save_every=args.save_every,
                              eval_every=0 if args.data else args.eval_every,
                              preview_every=args.preview_every)
    distill(run, args.size, teacher, settings, same, schedule, pattern=args.data,
            lora=args.lora, fsdp=args.fsdp, compiled=compiled)


if __name__ == "__main__":
    run_command(main)
