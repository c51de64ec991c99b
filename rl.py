"""Reward RL with rubrics: pictures are judged fact by fact, and DiffusionNFT makes the good ones
likelier.

Read before: kit/rubrics.py, reason.py, sample.py, train.py; toy/checker.py judges the toy world.
Assumes:     a trained model (`--init`, default weights/toy). It stays frozen: what is learnt is a
             LoRA.

On the toy world everything runs offline and can be verified:

    python rl.py --out runs/rl                           # the same command again resumes
    python sample.py --eval --lora runs/rl --guidance 1  # compare: without --lora
    python rl.py --judge-check                           # can a judge be trusted?
    python rl.py --search --out runs/search              # a better system prompt, no training
    python sample.py --eval --requests brief --reason --system-prompt runs/search/best.txt

In real use a language model writes prompts and rubrics, and a vision-language model judges:

    python rl.py --write-prompts prompts.jsonl --pool 8000 --endpoint URL --model NAME
    python tools/budget.py rl --size full                # what a step would take
    torchrun --nproc-per-node 8 rl.py --size full --init DIR --data prompts.jsonl \\
        --endpoint URL --model NAME

The story in one paragraph. The `old` policy makes a group of pictures for each prompt, from
different noises, without guidance. A judge answers each rubric of each picture with yes or no; the
mean is the picture's reward. Compared with the mean of its group, a reward becomes an advantage,
and that becomes a share r in [0, 1]: how much of this picture is something to move towards, and
1 - r to move away from. No likelihood is needed and no trajectory is kept: the loss is flow
matching's own, at noise levels of the sampler, on the model's own pictures. Such learning makes
velocities longer than the frozen model's, and texture is lost that way: a penalty on the excess
keeps their length.

Where this departs from the paper [ours]: that penalty is of a later paper (`norm_guard`;
`--norm-guard 0` leaves it out); the second-order solver is Adams-Bashforth's, one forward a step
(the paper does not name its own); the toy takes fewer and smaller groups, fewer steps and a smaller
rank (`SETTINGS`).
"""
import argparse
import collections
import functools
import json
import math
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import lens
import reason
import sample
import train
from kit.chat import Endpoint
from kit.checkpoint import load_pipeline, save_pipeline
from kit.files import (
    Parser,
    not_negative,
    positive,
    quoted,
    require,
    run_command,
    seed_number,
    user_path,
)
from kit.images import contact_sheet, save_png
from kit.lora import add_lora, lora_parameters, merge_lora, named_lora, save_lora, set_lora
from kit.places import (
    add_part_flags,
    base_from,
    fetch_places,
    gather,
    part_flags,
    read_metadata,
)
from kit.rubrics import (
    EndpointJudge,
    gaming,
    read_rows,
    reward_of,
    rubric_shares,
    write_prompts,
)
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
    pick_device,
    pick_dtype,
    start_run,
    use_attention,
)
from kit.state import (
    check_no_other_weights,
    check_same_run,
    kept_progress,
    load_state,
    save_state,
)
from toy.checker import Checker, held_out, token_diversity
from toy.language import REWRITE, edit_guidelines
from toy.rubrics import print_judge_check, toy_row
from toy.world import TASKS

# --- DiffusionNFT: from rewards to a loss ---------------------------------------------------------

def advantages(rewards):
    """[P, G] rewards of P prompts' groups, NaN where the judge failed -> [P, G] advantages. [paper]

    Reward less the mean of the prompt's group, over the spread of the whole step: where a group
    agrees, its own spread would be near 0. A failed judgement is no reward: its advantage is 0.
    """
    known = ~rewards.isnan()
    # In fp64: in fp32 the mean of equal rewards may be a rounding off, and over 1e-4 that counts.
    value = rewards.nan_to_num().double()
    mean = value.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp_min(1)          # [P, 1]
    spread = value[known].std(correction=0) if known.any() else value.new_zeros(())
    return torch.where(known, (value - mean) / (spread + 1e-4), 0.0).float()


def optimality(advantage):
    """r = 1/2 + clip(A, +-5) / 10, in [0, 1]: how much of a picture is to be moved towards.

    This is the form of DiffusionNFT's released code; its paper has 1/2 + clip(A, +-1) / 2.
    """
    return advantage.clamp(-5, 5) / 10 + 0.5


def nft_loss(v, v_old, v_ref, x_t, x0, t, r, beta=1.0, kl=1e-4, adaptive=True):
    """DiffusionNFT's loss, and the mean square of v - v_ref, each of a sample: [B], [B]. [paper]

    v         [B, N, C]  velocity of the learning policy
    v_old     [B, N, C]  of the policy that made the pictures
    v_ref     [B, N, C]  of the model without adapters
    x0, x_t   [B, N, C]  a picture of the old policy, and the same noised to t
    t, r      [B]        noise level, and the picture's optimality in [0, 1]
    beta                 how far v+ and v- stand apart from v_old
    kl                   weight of the mean square of v - v_ref
    adaptive             divide each mean square error by the mean absolute one, so that a sample
                         counts by the size of its error and not by the square; False: tests compare
                         with closed forms

    v+ = (1 - beta) v_old + beta v and v- = (1 + beta) v_old - beta v are mirror images: pulling v-
    to a bad picture pushes v away from it.
    """
    plus = (1 - beta) * v_old + beta * v                              # [B, N, C]
    minus = (1 + beta) * v_old - beta * v                             # [B, N, C]

    total = 0
    for share, branch in ((r, plus), (1 - r, minus)):
        error = lens.data_prediction(x_t, branch, t) - x0             # [B, N, C]
        scale = 1.0
        if adaptive:                                # in fp64, as DiffusionNFT's code has it
            size = error.detach().double().abs().mean((1, 2))         # [B]
            scale = size.clamp_min(1e-5).float()
        total = total + share * error.square().mean((1, 2)) / scale   # [B]

    drift = (v - v_ref).square().mean((1, 2))                         # [B]
    # In both branches v has the factor beta, and so has the gradient: it is divided out.
    return total / beta + kl * drift, drift


def norm_guard(v, v_ref):
    """By how much v is longer than v_ref, and the ratio of their lengths: each [B]. [NormGuard,
    arXiv 2606.27771; token by token: ours]

    v      [B, N, C]  velocity of the learning policy
    v_ref  [B, N, C]  of the model without adapters; it gets no gradient

    The length |v| of a token is the root mean square over its channels. The excess is the mean over
    tokens of relu(|v| - |v_ref|), so no token that is too short makes up for one that is too long.
    It is not squared: a small excess is pulled back as firmly as a large one. The ratio is that of
    the mean lengths of a picture's tokens.

    Reward RL makes v 5 to 15% longer, and that is where texture goes. The length by itself earns no
    reward, so little is lost by holding it; to rescale v in the sampler afterwards does not help.
    """
    length, length_ref = token_lengths(v), token_lengths(v_ref.detach())         # [B, N]
    excess = (length - length_ref).relu().mean(1)
    return excess, length.mean(1) / length_ref.mean(1)


def token_lengths(v):
    """[B, N, C] -> [B, N]: each token's root mean square over its channels."""
    # The root alone has an infinite slope at 0.
    return (v.square().mean(2) + 1e-12).sqrt()


# --- Sampling of second order ---------------------------------------------------------------------

@torch.no_grad()
def rollout(model, noise, text, grid, steps):
    """Second-order sampling without guidance, one forward a step (Adams-Bashforth). [ours]

    noise  [G, N, C] fp32;  text  K x [G, S, E];  grid  (h, w).  Returns tokens [G, N, C] fp32.
    """
    sigmas = lens.sigmas(noise.shape[1], steps)                       # [steps + 1], on the CPU
    context = model.prepare(text, None, grid)
    modulation = model.modulation(sigmas[:-1].to(noise.device))
    dtype = model.proj_out.weight.dtype
    levels = sigmas.tolist()

    x = noise.float()                                                 # [G, N, C]
    v_before = None
    for i in range(steps):
        v = model.velocity_from(x.to(dtype), modulation.at(i), context).float()
        step = levels[i + 1] - levels[i]

        # The velocity goes on changing as it just did: take it half a step ahead. The last step is
        # longer than the two before it together, too far to extrapolate: it is Euler's.
        v_ahead = v
        if v_before is not None and i < steps - 1:
            slope = (v - v_before) / (levels[i] - levels[i - 1])
            v_ahead = v + step / 2 * slope
        x = lens.euler_step(x, v_ahead, levels[i], levels[i + 1])
        v_before = v
    return x


# --- Settings -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Settings:
    prompts: int              # groups a step, all ranks together
    group: int                # pictures a prompt
    rank: int                 # of the LoRA
    alpha: float              # of the LoRA: its change is scaled by alpha / rank
    lr: float                 # of AdamW
    steps: int                # optimiser steps of a run
    sampler_steps: int        # of the rollout
    times: int                # noise levels that each picture is trained at
    base: int                 # the pictures have the sizes data.buckets(base)
    batch: int                # pictures a forward, in sampling and in training
    beta: float = 1.0         # of nft_loss [paper]
    kl: float = 1e-4          # of nft_loss [paper]
    norm_guard: float = 0.3   # weight of norm_guard's excess; 0: off [NormGuard, 0.3 is ours]
    decay: float = 0.9        # of the average of adapters that is evaluated and saved; in the toy's
                              # 30 steps it comes to 0.77 (kit.run.average_decay) [ours]
    betas: tuple = (0.9, 0.999)      # of AdamW [paper]
    eps: float = 1e-8                # of AdamW [paper]
    weight_decay: float = 1e-4       # of AdamW [paper]


SETTINGS = {
    "nano": Settings(
        prompts=4, group=4, rank=4, alpha=4.0, lr=1e-3, steps=4,
        sampler_steps=4, times=2, base=64, batch=32),
    # [ours]
    "toy": Settings(
        prompts=12, group=12, rank=8, alpha=8.0, lr=3e-3, steps=30,
        sampler_steps=10, times=2, base=128, batch=48),
    # [paper] but for times and batch, and for norm_guard [NormGuard, ours]
    "full": Settings(
        prompts=48, group=24, rank=64, alpha=128.0, lr=3e-4, steps=180,
        sampler_steps=20, times=4, base=1024, batch=4),
}


# --- The policies: three adapters of one frozen model ---------------------------------------------

class Policies:
    """`old` makes the pictures, `new` learns from them, `ema` follows and is evaluated and saved.

    The reference is the model without an adapter.
    """

    def __init__(self, model, settings, seed):
        self.model, self.settings = model, settings
        # All three start alike, from the one key (seed, 1), and as no change: B is zero.
        for name in ("ema", "old", "new"):
            add_lora(model, settings.rank, settings.alpha, name=name, generator=generator(seed, 1))
        model.requires_grad_(False)
        for p in self.parameters("new"):
            p.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            self.parameters("new"), lr=settings.lr, betas=settings.betas, eps=settings.eps,
            weight_decay=settings.weight_decay)

    def parameters(self, name):
        return lora_parameters(self.model, name)

    def groups(self):
        """{"new", "old", "ema": {name: parameter}}: what is saved, and filled on resume."""
        return {name: named_lora(self.model, name) for name in ("new", "old", "ema")}

    def use(self, name):
        """The model is this policy from now on; None: the reference."""
        set_lora(self.model, name)

    def velocity(self, name, x_t, t, text, grid):
        """v of one policy, or of the reference (name None): [B, N, C] fp32."""
        self.use(name)
        dtype = self.model.proj_out.weight.dtype
        return self.model(x_t.to(dtype), t, text, None, grid).float()

    def learn(self, run, step):
        """`new` goes one step along the gradients of all ranks, `old` and `ema` follow.

        Returns (gradient norm before clipping, eta). A gradient that is not finite is dropped, so
        that `new` stays where it is.
        """
        new = self.parameters("new")
        for p in new:
            # In place. A sum, since each loss is divided by the total of all ranks.
            run.sum_over_ranks(p.grad)
        norm = torch.nn.utils.clip_grad_norm_(new, train.CLIP).item()
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()

        # old <- eta old + (1 - eta) new: nearly on policy at first. [paper]
        eta = min(0.001 * (step + 1), 0.5)
        follow(self.parameters("old"), new, 1 - eta)
        follow(self.parameters("ema"), new, 1 - average_decay(step, self.settings.decay))
        return norm, eta


# --- One step: sample with `old`, judge, train `new` ----------------------------------------------

# Noise is drawn from (seed, step, prompt, picture) for sampling, and in training from
# (seed, step, prompt, NO_PICTURE): no picture has that number, so the two never meet.
NO_PICTURE = 10**6


@dataclass
class Group:
    """What the old policy made of one prompt."""
    tokens: torch.Tensor      # [G, N, C]
    pictures: list            # G PIL images
    text: list                # K x [1, S, E], the prompt's features
    grid: tuple               # (h, w)


def make_group(run, model, vae, text, row, settings, key):
    """One prompt's pictures by the policy in use -> Group.

    text  K x [1, S, E], the prompt's features
    key   (step, prompt): picture g has noise of its own, drawn from (seed, *key, g)
    """
    grid = data.grid_of(row["size"])
    shape = (grid[0] * grid[1], model.config.in_channels)
    noise = [torch.randn(shape, generator=generator(run.seed, *key, g))
             for g in range(settings.group)]
    noise = torch.stack(noise).to(run.device)                         # [G, N, C]

    tokens, pictures = [], []
    for part in noise.split(settings.batch):
        layers = [layer.expand(len(part), -1, -1) for layer in text]  # K x [part, S, E]
        tokens.append(rollout(model, part, layers, grid, settings.sampler_steps))
        pictures += sample.to_pictures(vae, tokens[-1], grid)
    return Group(torch.cat(tokens), pictures, text, grid)


def noised_batches(tokens, r, settings, rng):
    """A group's pictures, each at `times` different levels of the sampler, in batches that fit.

    tokens [G, N, C] and r [G], on the CPU.  Yields (x0 [B, N, C], noise [B, N, C], t [B], r [B]).
    """
    levels = lens.sigmas(tokens.shape[1], settings.sampler_steps)[:-1]
    chosen = [levels[torch.randperm(len(levels), generator=rng)[:settings.times]] for _ in tokens]
    # The whole group at each picture's first level, then at each one's second, and so on.
    t = torch.stack(chosen, 1).flatten()                              # [T * G]
    x0 = tokens.repeat(settings.times, 1, 1)                          # [T * G, N, C]
    r = r.repeat(settings.times)                                      # [T * G]
    noise = torch.randn(x0.shape, generator=rng)                      # [T * G, N, C]

    size = settings.batch
    yield from zip(x0.split(size), noise.split(size), t.split(size), r.split(size))


def group_loss(run, policies, group, r, total, key):
    """Adds one group's gradient to `new`. -> sums of losses, drifts and ratios of lengths: [3], on
    the CPU.

    r      [G] optimality of the group's pictures
    total  number of noised pictures in the whole step, by which losses are divided
    key    (step, prompt): noise and its levels are drawn from (seed, *key, NO_PICTURE)
    """
    settings = policies.settings
    rng = generator(run.seed, *key, NO_PICTURE)
    sums = torch.zeros(3)
    # On the CPU, where noise and levels are drawn.
    for batch in noised_batches(group.tokens.cpu(), r, settings, rng):
        x0, noise, t, share = [part.to(run.device) for part in batch]
        x_t = lens.add_noise(x0, noise, t)                            # [B, N, C]
        text = [layer.expand(len(x0), -1, -1) for layer in group.text]
        with torch.no_grad():
            v_old = policies.velocity("old", x_t, t, text, group.grid)
            v_ref = policies.velocity(None, x_t, t, text, group.grid)
        # Last of the three: the backward pass recomputes blocks with whatever adapter is active.
        v = policies.velocity("new", x_t, t, text, group.grid)        # [B, N, C]

        loss, drift = nft_loss(v, v_old, v_ref, x_t, x0, t, share, settings.beta, settings.kl)
        excess, length = norm_guard(v, v_ref)
        loss = loss + settings.norm_guard * excess                    # [B]
        (loss.sum() / total).backward()
        sums += torch.stack([loss.sum(), drift.sum(), length.sum()]).detach().cpu()
    return sums


def sample_and_judge(run, pipeline, policies, judge, rows, step):
    """This rank's share of a step's pictures, by `old`.

    Returns {p: Group} and {p: answers}, p being places in rows, and the time when sampling ended.
    """
    model, vae, encoder = pipeline
    settings = policies.settings
    own = range(run.rank, len(rows), run.ranks)
    features = encoder.encode_each([rows[p]["prompt"] for p in own])

    # The judge works in a thread on one group while the next is sampled.
    policies.use("old")
    groups, judging = {}, {}
    with ThreadPoolExecutor(1) as thread:
        for p, own_features in zip(own, features):
            text = list(own_features[:, None].to(run.device))         # K x [1, S, E]
            groups[p] = make_group(run, model, vae, text, rows[p], settings, key=(step, p))
            judging[p] = thread.submit(judge, groups[p].pictures, [rows[p]] * settings.group)
        sampled_at = time.perf_counter()
        answers = {p: judged.result() for p, judged in judging.items()}
    return groups, answers, sampled_at


def rl_step(run, pipeline, policies, judge, rows, step):
    """One step: sample with `old`, judge, train `new` -> the step's row of the log.

    pipeline  (transformer, vae, text encoder)
    rows      [P] PromptRow of this step; each rank has its share of them

    The row's means are over all ranks. Its loss is no measure of progress: at v = v_old both
    branches are v_old, and their shares r and 1 - r add up to 1, whatever the rewards.
    """
    settings = policies.settings
    began = time.perf_counter()
    groups, answers, sampled_at = sample_and_judge(run, pipeline, policies, judge, rows, step)
    answers = from_all_ranks(answers)              # P x G x [answer to each rubric]

    rewards = torch.tensor([                                          # [P, G]
        [reward_of(judged, row["rubrics"]) for judged in group]
        for group, row in zip(answers, rows)])
    r = optimality(advantages(rewards))                               # [P, G]
    judged_at = time.perf_counter()

    # The attention that is fastest backwards is not the one that samples fastest: training has its
    # own, then PyTorch chooses again.
    use_attention(run.attention)
    sums, total = torch.zeros(3), len(rows) * settings.group * settings.times
    for p, group in groups.items():
        sums += group_loss(run, policies, group, r[p], total, key=(step, p))
    use_attention()
    grad_norm, eta = policies.learn(run, step)

    # Gathered and not reduced: these sums are on the CPU, where NCCL does not reach.
    loss, drift, length = (torch.stack(gathered(sums)).sum(0) / total).tolist()
    brightness, saturation, diversity = picture_statistics(groups.values())
    return {
        "step": step + 1,
        "loss": loss,
        "reward": known_mean(rewards),             # None where no judgement came
        "spread": known_mean(rewards.std(1, correction=0)),          # of rewards within a group
        "rubrics": rubric_shares(answers, rows),
        "drift": drift,                            # mean square of v - v_ref
        "length": length,                          # |v| / |v_ref|, see norm_guard
        "brightness": brightness,                  # of the pictures, in [0, 1]
        "saturation": saturation,                  # likewise
        "diversity": diversity,                    # RMS distance between a prompt's pictures
        "failures": int(rewards.isnan().sum()),    # pictures without a reward, of this step
        "judge_failed": sum(gathered(len(judge.failed))),  # judgements, since the run was started
        "grad_norm": grad_norm,                    # before clipping
        "eta": eta,                                # how much of itself `old` kept
        "sample_s": round(sampled_at - began, 3),
        "judge_wait_s": round(judged_at - sampled_at, 3),            # after the sampling
        "train_s": round(time.perf_counter() - judged_at, 3),
    }


def from_all_ranks(own):
    """{p: value} of this rank -> [value] of all ranks, in order."""
    everyone = {}
    for values in gathered(own):
        everyone.update(values)
    return [everyone[p] for p in sorted(everyone)]


def known_mean(x):
    """Mean of what is not NaN, or None."""
    known = x[~x.isnan()]
    return known.mean().item() if len(known) else None


def picture_statistics(groups):
    """(brightness, saturation, diversity), means over all ranks: a reward that is gamed often shows
    here first."""
    pictures = [picture for group in groups for picture in group.pictures]
    hsv = [picture.convert("HSV").resize((32, 32)) for picture in pictures]
    hsv = np.stack([np.asarray(small, np.float32) / 255 for small in hsv])       # [n, 32, 32, 3]
    brightness, saturation = hsv[..., 2].mean(), hsv[..., 1].mean()
    diversity = np.mean([token_diversity(group.tokens) for group in groups])

    own = (float(brightness), float(saturation), float(diversity))
    return [round(float(mean), 4) for mean in np.mean(gathered(own), axis=0)]


# --- The loop -------------------------------------------------------------------------------------

# A step is lost where more than this share of its pictures got no reward, and a run stops after so
# many lost steps in a row: what would be learnt without rewards is nothing. [ours]
LOST_SHARE = 0.5
LOST_STEPS = 3
CHECKED = 120             # scenes at most that --judge-check shows a judge


@dataclass
class Progress:
    """How far a run is: with adapters and moments, all that a resume needs."""
    bf16: bool                # type of the frozen base; a resumed run keeps what was measured first
    attention: str            # kernel of training, likewise
    step: int = 0
    seconds: float = 0.0      # of training, evaluation left out
    base: dict = field(default_factory=dict)       # scores of the frozen model
    scores: dict = field(default_factory=dict)     # newest scores of `ema`
    history: list = field(default_factory=list)    # of every step that was judged, for `gaming`


@dataclass
class Viewer:
    """`ema` as sample.py will use it: scores on the toy's tasks, and contact sheets."""
    policies: Policies
    pipeline: tuple           # (transformer, vae, text encoder)
    shown: list               # [(prompt, seed)] of the sheets
    per_task: int             # held-out prompts a task

    def scores(self):
        """{name: score} at guidance 1."""
        self.policies.use("ema")
        height, width = data.bucket(self.policies.settings.base)
        scores, _, _ = sample.evaluate(self.pipeline, height, width, sample.STEPS, guidance=1.0,
                                       per_task=self.per_task, progress=True, diversity=True)
        return scores

    def sheet(self, path):
        self.policies.use("ema")
        settings = self.policies.settings
        height, width = data.bucket(settings.base)
        pictures = sample.generate(
            [prompt for prompt, _ in self.shown], self.pipeline,
            seeds=[seed for _, seed in self.shown], height=height, width=width,
            steps=sample.STEPS, guidance=1.0, batch_size=settings.batch, progress=True)
        save_png(contact_sheet(pictures, columns=6), path)


def train_policy(run, init, size, rows, shown, settings, same_run, judge, schedule, per_task=20,
                 dtype=None, compiled=False):
    """Reward RL on a trained model: what it learns is a LoRA. The same call again resumes.

    init, size  the model to improve, its name or Places, and its name in lens.SIZES
    rows        [PromptRow] to train on;  shown: [(prompt, seed)] of the contact sheets
    same_run    {"--flag": value} that a later call must share to resume this run
    schedule    train.Schedule;  per_task: prompts a task in its evaluations
    dtype       "fp32" or "bf16" of the frozen base; None: the faster one
    """
    config = lens.SIZES[size].transformer
    usual_text, _ = train.text_tokens(size)
    tokens = (settings.base // data.CELL)**2 + usual_text
    why = choose(run, config, tokens, kept_progress(run.out), dtype)

    pipeline = load_base(run, init, size)
    model = pipeline[0]
    policies = Policies(model, settings, run.seed)
    model.set_recompute("full" if size == "full" else "none")
    if compiled:
        compile_blocks(model, fullgraph=False)
    progress = resume(run, policies, same_run)

    count = sum(p.numel() for p in policies.parameters("new"))
    run.say(f"{size}: LoRA of rank {settings.rank}, {count:,} parameters, "
            f"on {run.ranks} x {run.device}; {why}")
    run.say(f"a step: {settings.prompts} prompts x {settings.group} pictures of {len(rows)}, "
            f"{settings.sampler_steps} sampler steps, {settings.times} noise levels")
    viewer = Viewer(policies, pipeline, shown, per_task)
    # The base's sheet and scores, to compare with: the B of `ema` is still zero.
    if progress.step == 0 and run.rank == 0:
        if schedule.preview_every or schedule.eval_every:
            print("before step 1: pictures of the base, to compare with")
        if schedule.preview_every:
            viewer.sheet(run.out / "before.png")
        if schedule.eval_every:
            progress.base = viewer.scores()
            print(f"the base at guidance 1: {in_words(progress.base)}")

    log, notice, stop = Log(run, progress.step), Notice(), False
    lost, lost_limit = 0, min(LOST_STEPS, settings.steps)
    unsound = 0                                    # steps in a row that could not be learnt from
    bar = tqdm(total=settings.steps, initial=progress.step, desc="RL", unit="step",
               mininterval=2, disable=run.rank > 0)
    while progress.step < settings.steps and not stop:
        begin = time.perf_counter()
        chosen = rows_of_step(rows, settings.prompts, progress.step, run.seed)
        row = rl_step(run, pipeline, policies, judge, chosen, progress.step)
        progress.step += 1
        progress.seconds += time.perf_counter() - begin
        row["seconds"] = round(progress.seconds, 2)

        is_lost = row["failures"] > LOST_SHARE * settings.prompts * settings.group
        lost = lost + 1 if is_lost else 0
        unsound = 0 if math.isfinite(row["grad_norm"]) else unsound + 1
        train.check_sound(unsound, bar)

        stop = any(gathered(notice.given)) or lost == lost_limit
        row |= watch_and_view(run, viewer, progress, row, schedule, bar)
        log(**row)
        if stop or due(schedule.save_every, progress.step, settings.steps):
            save(run, policies, progress, init, same_run)
            log.draw()
        bar.update()
        bar.set_postfix_str(in_brief(row))
    bar.close()

    require(lost < lost_limit,
            f"stopped and saved at step {progress.step}: most pictures of {lost} steps in a row "
            f"got no judgement, {dict(collections.Counter(judge.failed))}; once the judge answers "
            "again, the same command goes on")
    if stop and progress.step < settings.steps:
        run.say_stopped(progress.step)
    else:
        prompt = None                              # the six tasks are the toy world's
        if same_run.get("--data"):
            prompt = min((prompt for prompt, _ in shown), key=len)
        run.say(f"done: {sample.command_to_see(run.out, prompt)}")


def rows_of_step(rows, count, step, seed):
    """The rows of a step: every row once, then again in another order."""
    chosen = []
    for k in range(step * count, (step + 1) * count):
        epoch, place = divmod(k, len(rows))
        order = np.random.default_rng((seed, epoch)).permutation(len(rows))
        chosen.append(rows[order[place]])
    return chosen


def watch_and_view(run, viewer, progress, row, schedule, bar):
    """What may follow a step: a warning, an evaluation, a contact sheet. -> more for the log."""
    more, warning = {}, ""
    step, steps = progress.step, viewer.policies.settings.steps
    if row["reward"] is not None:                  # else nothing was judged
        held_out_share = row["rubrics"].get("held_out", 0.0)
        progress.history.append((row["reward"], row["diversity"], held_out_share))
        warning = gaming(progress.history)
    if warning:
        more["warning"] = warning
        if step % 10 == 0 and run.rank == 0:
            bar.write(f"warning: step {step}: the reward rises, but {warning}")

    if run.rank == 0 and due(schedule.eval_every, step, steps):
        progress.scores = viewer.scores()
        more |= progress.scores
        bar.write(f"step {step}, guidance 1: {in_words(progress.scores)}")
    if run.rank == 0 and due(schedule.preview_every, step, steps):
        viewer.sheet(run.out / f"preview-{step:04d}.png")
    return more


def in_brief(row):
    reward = math.nan if row["reward"] is None else row["reward"]
    words = (f"reward {reward:.3f}, diversity {row['diversity']:.2f}, "
             f"length {row['length']:.3f}")
    if row["judge_failed"]:
        words += f", {row['judge_failed']} judgements failed"
    return words


# --- What a run begins with, and what it leaves ---------------------------------------------------

def load_base(run, init, size):
    """(transformer, vae, text encoder) of --init. LensError where it is not of --size."""
    dtype = torch.bfloat16 if run.bf16 else torch.float32
    model, vae, encoder = load_pipeline(init, run.device, dtype)
    require(model.config == lens.SIZES[size].transformer,
            f"--init {init}: its weights are not of size {size}")
    return model, vae, encoder


def resume(run, policies, same_run):
    """Fills adapters and moments from run.out -> Progress; a new one where nothing is there."""
    kept = load_state(run, policies.groups(), [policies.optimizer], same_run)
    if kept is None:
        return Progress(run.bf16, run.attention)
    # `choose` has settled these two, from what was kept or by --dtype.
    progress = Progress(**{**kept, "bf16": run.bf16, "attention": run.attention})
    run.say(f"resuming {run.out} at step {progress.step}")
    return progress


def save(run, policies, progress, init, same_run):
    """The average of the adapters in PEFT's format, which sample.py --lora takes, and --weights, as
    it names its base; and the state, last: a run that is killed between the two makes the same
    adapter again."""
    if run.rank == 0:
        save_lora(policies.model, run.out, "ema", {
            "command": shlex.join(["python", "rl.py", *sys.argv[1:]]),
            "commit": code_version(),
            "seed": run.seed,
            "trained_steps": progress.step,
            "trained_seconds": round(progress.seconds),
            "guidance": 1.0,
            "score_before": json.dumps(progress.base),
            "score": json.dumps(progress.scores),
            "init": str(init),
        })
        save_pipeline(run.out, base=base_from(run.out, init))
    save_state(run, progress.step, policies.groups(), [policies.optimizer], same_run,
               asdict(progress))


def merge(init, lora, out):
    """Writes the model --init with a run's LoRA merged into it, as a pipeline of its own."""
    places = fetch_places(gather(init))
    model, vae, encoder = load_pipeline(places, "cpu")
    count = merge_lora(model, lora)
    notes = {**read_metadata(places.transformer), "guidance": 1.0, "lora": str(lora)}
    save_pipeline(out, model, vae, encoder, notes)
    print(f"wrote {out}: {count} layers changed")


# --- What the search for a system prompt works with -----------------------------------------------

def make_trials(init, device, dtype, rows, size, batch_size, judge, make_reasoner, start, search,
                seed):
    """-> reason.Trials of the model --init, with its own number of steps and guidance.

    make_reasoner(notes, encoder) -> reason.Reasoner
    start  the system prompt to begin with; None: that reasoner's own
    """
    places = fetch_places(gather(init))
    notes = read_metadata(places.transformer)
    pipeline = load_pipeline(places, device, dtype)
    height, width = size
    steps, guidance = sample.sampler_settings(notes)
    reasoner = make_reasoner(notes, pipeline[2])
    if start is not None:
        reasoner = replace(reasoner, system=start)

    def generate(prompts, seeds):
        return sample.generate(
            prompts, pipeline, seeds=seeds, height=height, width=width, steps=steps,
            guidance=guidance, batch_size=batch_size, progress=True)

    return reason.Trials(rows, reasoner, generate, judge, search, seed)


def command_after_search(out, request, init, endpoint=None, model=None):
    """What to type to see what the system prompt that was found does to a request. model: that
    rewrites at the endpoint, or None."""
    command = (f"python sample.py --reason --prompt {quoted(request)} "
               f"--system-prompt {quoted(f'{out}/best.txt')}")
    if init != gather(str(sample.TOY)):
        command += f" {part_flags(init)}"
    if model:
        command += f" --endpoint {quoted(endpoint)} --model {quoted(model)}"
    return command


# --- The command line -----------------------------------------------------------------------------

def arguments(argv):
    parser = Parser("Reward RL: rubrics, judges and DiffusionNFT. The same command again resumes.",
                    __doc__)
    add = parser.add_argument_group("the run").add_argument
    add("--out", type=user_path, default="runs/rl", metavar="DIR",
        help="the LoRA, its state, metrics.jsonl, contact sheets (default: %(default)s)")
    add("--init", default=str(sample.TOY), metavar="DIR_FILE_OR_REPO",
        help="the model to improve (default: weights/toy)")
    add_part_flags(add)
    add("--size", default="toy", choices=lens.SIZES, help="of that model (default: %(default)s)")
    add("--steps", type=positive, help="default: what the size says; of a search 8")
    add("--lr", type=float, help="default: what the size says")
    add("--norm-guard", type=float, metavar="W",
        help="weight of a penalty on velocities longer than the frozen model's: reward RL "
        "lengthens them (metrics.jsonl: length), and texture is lost by it; 0: no penalty "
        "(default: what the size says)")
    add("--seed", type=seed_number, default=0, help="default: %(default)s")
    add("--device", help="cpu or cuda (default: CUDA if there is one)")
    add("--dtype", choices=("fp32", "bf16"), help="of the frozen base (default: the faster one)")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="compile the blocks (default: on a GPU)")
    add("--save-every", type=positive, default=10, metavar="N", help="steps (default: %(default)s)")
    add("--eval-every", type=not_negative, default=50, metavar="N",
        help="steps; the toy's six tasks at guidance 1; 0: never (default: %(default)s)")
    add("--per-task", type=positive, default=20, metavar="N",
        help="prompts a task in that evaluation (default: %(default)s)")
    add("--preview-every", type=not_negative, default=50, metavar="N",
        help="steps; 0: never (default: %(default)s)")

    add = parser.add_argument_group("prompts and judge").add_argument
    add("--data", type=user_path, metavar="FILE",
        help="prompts with rubrics, JSON lines (default: the toy world's)")
    add("--pool", type=positive, default=1000, metavar="N",
        help="prompts of the toy world, or to write (default: %(default)s)")
    add("--tasks", default=",".join(TASKS), help="of the toy world's prompts (default: all six)")
    add("--endpoint", metavar="URL", help="the judge: an OpenAI-compatible server, up to and with "
        "/v1; its key is read from LENS_API_KEY (default: the toy's checker)")
    add("--model", default="default", help="the endpoint's model (default: %(default)s)")

    add = parser.add_argument_group("instead of training").add_argument
    add("--judge-check", action="store_true", help="score the judge on true and altered claims")
    add("--write-prompts", type=user_path, metavar="FILE",
        help="have the endpoint's model write --pool prompts with rubrics")
    add("--merge", type=user_path, metavar="DIR",
        help="write --init with the LoRA of --out merged into it")
    add("--search", action="store_true",
        help="search for a better system prompt of the reasoner, in --steps candidates")
    add("--system-prompt", type=user_path, metavar="FILE",
        help="where that search starts (default: sample.py's; "
        "the toy's: the bare rule to rewrite)")
    add("--requests", choices=("brief", "vague"), default="brief",
        help="how the toy world is asked for in that search (default: %(default)s)")
    add("--reasoner-model", metavar="NAME",
        help="the endpoint's model that rewrites in that search (default: the text encoder)")

    args = parser.parse_args(argv)
    require(set(args.tasks.split(",")) <= set(TASKS), f"--tasks: choose among {', '.join(TASKS)}")
    require(args.norm_guard is None or args.norm_guard >= 0, "--norm-guard: must be at least 0")
    return args


NEEDS_ENDPOINT = ("pictures of real prompts are judged, and their prompts written, by a model "
                  "behind --endpoint URL (key in LENS_API_KEY)")


def main(argv=None):
    args = arguments(argv)
    settings = SETTINGS.get(args.size, SETTINGS["full"])
    size = data.bucket(settings.base)
    tasks = args.tasks.split(",")
    # What makes it the same run, or the same search.
    init = gather(args.init, args.vae, args.text_encoder)
    same = {"--init": str(init), "--size": args.size, "--seed": args.seed, "--data": args.data,
            "--pool": args.pool, "--tasks": args.tasks}

    if args.write_prompts:
        require(args.endpoint, NEEDS_ENDPOINT)
        write_prompts(args.write_prompts, args.endpoint, args.model, args.pool, args.seed)
        return

    if args.judge_check:
        judge = make_judge(args.endpoint, args.model)
        count = min(args.pool, CHECKED)
        print_judge_check(judge, count, args.seed, data.bucket(sample.TOY_BASE))
        return

    if args.merge:
        merge(init, args.out, args.merge)
        return

    require(args.endpoint or args.data is None, NEEDS_ENDPOINT)
    require(args.data or args.size in ("nano", "toy"),
            f"--size {args.size}: name prompts with rubrics with --data (rl.py --write-prompts "
            "makes them); the toy world is for --size toy or nano")

    if args.search:
        device, out = pick_device(args.device), Path(args.out)
        dtype, _ = pick_dtype(device, args.dtype, lens.SIZES[args.size].transformer.inner_dim)
        same |= {"--requests": args.requests, "--model": args.model,
                 "--reasoner-model": args.reasoner_model}
        # Without a model's name the text encoder rewrites, whoever judges and proposes.
        make_reasoner = functools.partial(
            sample.make_reasoner, system_prompt=args.system_prompt,
            endpoint=args.endpoint if args.reasoner_model else None, model=args.reasoner_model,
            journal=out / "reasoner.jsonl", seed=args.seed)
        start, propose = None, edit_guidelines     # the toy's proposer, a program
        if args.data is None and args.system_prompt is None:
            start = REWRITE                        # bare: all that helps is to be found
        if args.endpoint:
            # A silent proposer ends the search, which can go on: it has not run out of ideas.
            proposer = Endpoint(args.endpoint, args.model, out / "proposer.jsonl", patience=1)
            propose = reason.propose_by(proposer)

        rows = make_rows(args.data, args.seed, args.pool, tasks, [size], args.requests)
        trials = make_trials(
            init, device, dtype, batch_size=min(32, settings.batch), size=size, start=start,
            rows=rows,
            judge=make_judge(args.endpoint, args.model, out / "judge.jsonl"),
            make_reasoner=make_reasoner, seed=args.seed,
            search=reason.SEARCH.get(args.size, reason.SEARCH["full"]))
        reason.search_prompt(out, trials, propose, args.steps or 8, same)
        command = command_after_search(out, rows[0]["prompt"], init, args.endpoint,
                                       args.reasoner_model)
        print(f"done: {command}")
        return

    require(args.lr is None or args.lr > 0, f"--lr {args.lr}: must be above 0")
    settings = replace(settings, steps=args.steps or settings.steps, lr=args.lr or settings.lr)
    if args.norm_guard is not None:                # 0 is a weight too
        settings = replace(settings, norm_guard=args.norm_guard)
    same |= {"--lr": settings.lr, "--norm-guard": settings.norm_guard}
    check_no_other_weights(args.out, adapter=True)
    check_same_run(args.out, same)
    run = start_run(args.out, args.seed, args.device)
    require(settings.prompts % run.ranks == 0, f"{settings.prompts} prompts a step cannot be dealt "
            f"evenly over {run.ranks} processes")

    rows = make_rows(args.data, args.seed, args.pool, tasks, data.buckets(settings.base))
    shown = [(row["prompt"], k) for k, row in enumerate(rows[:12])]
    eval_every = 0
    if args.data is None:                          # the six tasks are the toy world's
        shown = held_out_prompts(size)
        eval_every = args.eval_every
    judge = make_judge(args.endpoint, args.model, run.out / f"judge-{run.rank}.jsonl")
    schedule = train.Schedule(args.save_every, eval_every, args.preview_every)
    compiled = run.device != "cpu" if args.compile is None else args.compile
    train_policy(run, init, args.size, rows, shown, settings, same, judge, schedule,
                 args.per_task, args.dtype, compiled)


def make_judge(url, model, journal=None):
    """The model behind the endpoint, asked whether it is there; where none is named, the toy
    world's checker."""
    if not url:
        return Checker()
    judge = EndpointJudge(url, model, journal)
    judge.check()
    return judge


def make_rows(path, seed, pool, tasks, sizes, style="dense"):
    """[PromptRow] of the file --data, or `pool` of the toy world."""
    if path:
        return read_rows(path, sizes)
    return [toy_row(seed, i, tasks, sizes, style) for i in range(pool)]


def held_out_prompts(size):
    """[(prompt, seed)]: two of each of the toy's tasks, for contact sheets. The seed is the task's
    number."""
    height, width = size
    return [(row.prompt, seed) for seed, task in enumerate(TASKS)
            for row in held_out(task, 2, height, width)]


if __name__ == "__main__":
    run_command(main)
