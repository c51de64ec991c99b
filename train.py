"""train.py: the denoiser, trained by flow matching.

Read before: lens.py, vae.py, data.py, sample.py.
Assumes:     an autoencoder and a text encoder that are settled: a change to either means training
             everything after it again.

From nothing to a model, on a laptop:

    python -m toy.autoencoder --out runs/toy             # 1. the autoencoder
    python -m toy.language --out runs/toy                # 2. the text encoder
    python train.py --out runs/toy                       # 3. the denoiser: one area, then all
    python sample.py --eval --weights runs/toy           #    the six-task table

    python train.py --stage 1 --compile --out runs/quick # instead of 3: one area alone, 40 minutes
    python train.py --data 'shards/*.tar' --out runs/mine    # 3 on pictures of your own, after 1
                                                         #    and 2 with the same --data and --out
    python tools/budget.py train --size full             # what the real size would take; then
    torchrun --nproc-per-node 8 train.py --size full --stage 2 --data 'shards/*.tar' \\
        --parts DIR_OR_REPO --fsdp --recompute selective

The same command again resumes what DIR holds; `sample.py --weights DIR` takes it as it is. What
it draws of the toy world is kept beside DIR, in world-*, and runs beside it use it too.

Where the toy departs from the paper [ours]: its pictures are encoded once and kept, each with
several captions (drawing and encoding cost as much as a training step); the learning rate falls to
zero over the last half of a stage (in the paper it stays, and an average over a long run stands in
for that); most of the blocks' matrices are trained by Muon (`make_optimizers`); times sit nearer 1
(`TOY_TIMES`, `QUICK_TIMES`); stage 2 draws stars more often (`SHAPE_ODDS`); stage 1 has a second
loss: a linear head on an early block must tell the shape, the colour and the pose of what covers
each token (`toy/labels.py`). At every size, a step whose loss is far above the usual is left out
(`SPIKE`).
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
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import lens
import sample
from kit.checkpoint import load_pipeline, load_transformer, save_pipeline, unsharded
from kit.files import (
    LensError,
    Parser,
    not_negative,
    open_safetensors,
    positive,
    read_json,
    require,
    run_command,
    seed_number,
    user_path,
)
from kit.fp8 import e4m3
from kit.images import contact_sheet
from kit.lora import add_lora, save_lora, write_for_comfyui
from kit.muon import Muon
from kit.places import (
    INDEX_NAME,
    Places,
    add_part_flags,
    base_from,
    command_for_next_part,
    expanded,
    fetch,
    gather,
    has_parts,
    locate,
    missing_parts,
    read_metadata,
    vae_identity,
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
    generator,
    in_words,
    learning_rate_factor,
    matmul_peak,
    rank_zero_first,
    share_out,
    start_run,
    usable_cores,
    use_attention,
    whole,
)
from kit.state import (
    check_no_other_weights,
    check_same_run,
    kept_progress,
    load_state,
    save_state,
)
from kit.tars import find_files
from toy import language
from toy.checker import held_out
from toy.dataset import World
from toy.labels import label_head, label_loss
from toy.world import SHAPES

# --- Settings -------------------------------------------------------------------------------------

CLIP = 1.0                # [paper] largest length of a step's gradient
EMA = 0.998               # [ours] decay of the weights' average, which is sampled from and saved
DROPOUT = 0.1             # [ours] share of samples without text: guidance needs that branch
SPIKE = 4.0               # [ours] a step whose loss is this many times the usual is left out
PATIENCE = 10             # [ours] so many left out in a row end the run
PAPER_TIMES = (1.0, 1.3)  # [paper] mean of logit(t) at 256 and at 4096 image tokens

# [ours] Of 300 pictures of the toy, 41 were wrong at guidance 1, 24 at 3, 33 at 5; the released
# weights' own is 5 [checkpoint].
TOY_GUIDANCE = 3.0

# Tokens of a usual and of the longest caption, in the toy world and outside it.
TOY_TEXT_TOKENS = (40, 64)
TEXT_TOKENS = (sample.USUAL_TEXT, 415)

TOY_SIZES = ("nano", "toy")       # sizes of lens.SIZES that are made for the toy world

# [ours] What the frozen weights under an adapter are kept in: fp32; bf16, half of it; fp8, bf16 but
# for the blocks' matrices, which are 8 bits and unpacked when they are used. The adapter is fp32.
BASE_DTYPES = ("fp32", "bf16", "fp8")


@dataclass(frozen=True)
class Stage:
    """What a stage trains on, and how."""
    areas: tuple               # each as the side of a square in pixels; a bucket has one of them
    batch: tuple               # pictures on a device, one number an area: all cost about the same
    steps: int
    lr: float                  # of AdamW
    muon_lr: float = None      # of Muon, for the blocks' matrices; None: AdamW has them too
    betas: tuple = (0.9, 0.99) # of AdamW
    decay: bool = True         # the learning rate falls to zero over the last half
    mean_std: tuple = None     # of logit(t); None: the paper's, by the number of tokens
    scenes: tuple = ()         # how many the toy world draws, one number an area
    shape_odds: tuple = None   # how often it draws each of its shapes; None: all alike
    label_weight: float = 0.0  # of toy.labels.label_loss; falls with the learning rate

    @property
    def home(self):
        """The largest of the areas: its square is previewed and evaluated."""
        return max(self.areas)

    def sizes_of(self, area):
        """The (height, width) of an area: a square where the stage has one area alone, else nine
        ratios [paper]."""
        return [(area, area)] if len(self.areas) == 1 else data.buckets(area)

    def sizes(self):
        return [size for area in self.areas for size in self.sizes_of(area)]

    def pictures(self, sizes):
        """{bucket: pictures on a device}: those of the area that the bucket comes closest to."""
        counts = {}
        for bucket, (height, width) in enumerate(sizes):
            distances = [abs(math.log(height * width / area**2)) for area in self.areas]
            nearest = distances.index(min(distances))
            counts[bucket] = self.batch[nearest]
        return counts


# Where the toy's times sit [ours], as mean and standard deviation of logit(t): a quarter above 0.9,
# where the text alone says what to show, a fifth below 0.5, where shapes get corners.
TOY_TIMES = (1.25, 1.5)

# Nearer 1 in the toy's short stage 1: there the labels teach the shapes early, and what takes long
# is to obey the text (how many, where), which is decided above t = 0.9.
QUICK_TIMES = (2.0, 1.5)

# [ours] Stars are drawn more often: with all shapes alike, three of four wrong pictures were wrong
# in a star alone, whose five thin arms cover few tokens.
SHAPE_ODDS = {"circle": 0.11, "square": 0.12, "triangle": 0.12, "star": 0.37, "cross": 0.17,
              "ring": 0.11}
STAR_ODDS = tuple(SHAPE_ODDS[shape] for shape in SHAPES)

STAGES = {
    ("nano", 1): Stage(
        areas=(64,), batch=(16,), steps=30, lr=1e-3, muon_lr=3e-3, mean_std=TOY_TIMES,
        scenes=(64,), shape_odds=STAR_ODDS, label_weight=0.2),
    ("nano", 2): Stage(
        areas=(64, 96), batch=(16, 8), steps=30, lr=1e-3, muon_lr=3e-3, mean_std=TOY_TIMES,
        scenes=(64, 32), shape_odds=STAR_ODDS),
    ("toy", 1): Stage(                                                             # [ours]
        areas=(128,), batch=(48,), steps=8_500, lr=1.2e-3, muon_lr=3e-3, mean_std=QUICK_TIMES,
        scenes=(20_000,), label_weight=0.2),
    ("toy", 2): Stage(                                                             # [ours]
        areas=(64, 96, 128), batch=(96, 72, 48), steps=12_000, lr=1.2e-3, muon_lr=3e-3,
        mean_std=TOY_TIMES, scenes=(2_000, 5_000, 20_000), shape_odds=STAR_ODDS),
    ("full", 1): Stage(                                                            # [paper]
        areas=(512,), batch=(24,), steps=400_000, lr=2e-4, betas=(0.9, 0.999), decay=False),
    ("full", 2): Stage(                                                            # [paper]
        areas=(512, 768, 1024), batch=(24, 10, 6), steps=400_000, lr=1e-4, betas=(0.9, 0.999),
        decay=False),
}


def stage_of(size, number):
    """The stage of a size; sizes without their own, `small` and `1b`, have those of `full`."""
    return STAGES.get((size, number), STAGES["full", number])


# --- The loss and one step ------------------------------------------------------------------------

def flow_matching_loss(model, batch, noise, t, on_block=None):
    """Mean square of v_model(x_t, t, text) - (noise - x0) over tokens and channels: [B] fp32.
    Rectified flow. [paper]

    batch      data.Batch;  noise [B, N, C];  t [B] in (0, 1)
    on_block   as in LensTransformer.velocity_from
    """
    x_t = lens.add_noise(batch.tokens, noise, t)                                   # [B, N, C]
    v = model(x_t, t, batch.text, batch.mask, batch.grid, on_block).float()        # [B, N, C]
    return (v - lens.velocity(batch.tokens, noise)).square().mean((1, 2))


def train_step(run, model, micro_batches, optimizers, stage, labels=None, label_weight=0.0,
               usual_loss=None, notice=None):
    """One optimiser step over this rank's micro-batches; -> StepReport.

    run         kit.run.Run: this process among its peers, its device and its precision
    model       what is called: the denoiser, or DDP or FSDP around it
    micro_batches    iterable of MicroBatch;  optimizers: of `make_optimizers`
    stage       for where its times sit
    labels      LabelReader, or None;  label_weight: of its loss beside the velocity's
    usual_loss  a step far above it is left out, see StepReport.sound
    notice      kit.run.Notice: one in the middle of a step still ends the run after it
    """
    tally = Tally(run.device)
    for micro in micro_batches:
        noise, t, dropped = draw_noise_and_time(run.seed, micro.batch, stage.mean_std)
        noise, t = run.move(noise), run.move(t)
        batch = without_text(to_device(run, micro.batch), run.move(dropped))
        will_exchange(model, micro.last)
        with run.autocast():
            losses, label_losses = losses_of(model, batch, noise, t, labels)       # [B] each
        loss = losses.sum() + label_weight * label_losses.sum()
        (loss * micro.share).backward()            # of the step's mean, see train_stage
        tally.add(micro, losses.detach(), label_losses.detach(), t)
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(trained, CLIP)

    notified = notice is not None and notice.given
    report = tally.over_all_ranks(run, norm, usual_loss=usual_loss, notified=notified)
    if report.sound:                               # a NaN in the weights is there for ever
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return report


def losses_of(model, batch, noise, t, labels=None):
    """(loss of the velocity, loss of the labels), each [B]; without `labels` the second is 0."""
    if labels is None:
        losses = flow_matching_loss(model, batch, noise, t)
        return losses, torch.zeros_like(losses)

    early = []

    def keep(i, img):
        if i == labels.block:
            early.append(img)

    losses = flow_matching_loss(model, batch, noise, t, keep)
    return losses, label_loss(labels.head, early[0], batch.labels)


def timestep_mu(image_tokens):
    """Mean of logit(t) in training, from 1.0 at 256 tokens to 1.3 at 4096 [paper]."""
    low, high = PAPER_TIMES
    return low + (high - low) * (image_tokens - 256) / (4096 - 256)


def draw_noise_and_time(seed, batch, mean_std=None):
    """-> noise [B, N, C], t [B], dropped [B] bool: the samples that are shown without their text.

    Each sample has its own generator, from (seed, epoch, sample): what it draws does not depend on
    its batch. mean_std: of logit(t), which is normal [paper]; None: the paper's.
    """
    mean, std = mean_std or (timestep_mu(batch.tokens.shape[1]), 1.0)
    noises, times, drops = [], [], []
    for i in batch.samples:
        g = generator(seed, batch.epoch, i)
        noises.append(torch.randn(batch.tokens.shape[1:], generator=g))
        times.append(torch.sigmoid(mean + std * torch.randn((), generator=g)))
        drops.append(torch.rand((), generator=g) < DROPOUT)
    return torch.stack(noises), torch.stack(times), torch.stack(drops)


# --- Around the step: micro-batches, ranks, accounts ----------------------------------------------

class MicroBatch(NamedTuple):
    """What a rank computes at once; a step has `accumulate` of them on every rank."""
    batch: data.Batch
    share: float      # what a sample's loss weighs; 0: it does not count, see `deal`
    last: bool        # of the step


class LabelReader(NamedTuple):
    """Asks an early block for what covers each token, see toy/labels.py."""
    head: nn.Linear
    block: int        # whose image tokens it reads


def to_device(run, batch):
    return replace(
        batch,
        tokens=run.move(batch.tokens),
        text=[run.move(layer) for layer in batch.text],
        mask=run.move(batch.mask),
        labels=None if batch.labels is None else run.move(batch.labels))


def without_text(batch, dropped):
    """The batch with all text of the `dropped` [B] samples hidden. Image tokens then see each other
    alone, as if there were no text."""
    return replace(batch, mask=batch.mask & ~dropped[:, None])


def will_exchange(model, now):
    """Says before a micro-batch whether ranks exchange gradients in its backward pass: they do once
    a step, with the last."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
    elif isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = now


class BatchShape(NamedTuple):
    pictures: int
    image_tokens: int      # of each picture
    text_tokens: int       # of the longest caption


@dataclass(frozen=True)
class StepReport:
    """A step, over all ranks."""
    loss: float            # mean over the step's samples
    loss_by_t: list        # mean by quarter of t; None where no sample fell
    label_loss: float
    grad_norm: float       # before clipping
    replaced: int          # samples that could not be read
    stop: bool             # a notice came to one of the ranks
    sound: bool            # False: nothing was stepped, the weights are as before
    shapes: list           # [BatchShape] of this rank's own micro-batches


class Tally:
    """Sums over a step's micro-batches. They stay on the device until `over_all_ranks`."""

    def __init__(self, device):
        self.samples = torch.zeros(1, device=device)
        self.replaced = torch.zeros(1, device=device)
        self.loss = torch.zeros(1, device=device)
        self.label_loss = torch.zeros(1, device=device)
        self.loss_by_t = torch.zeros(4, device=device)
        self.count_by_t = torch.zeros(4, device=device)
        self.shapes = []

    def add(self, micro, losses, label_losses, t):
        """losses, label_losses, t [B], without gradient."""
        if micro.share == 0:
            return
        batch = micro.batch
        self.shapes.append(BatchShape(len(losses), batch.tokens.shape[1], batch.mask.shape[1]))
        self.samples += len(losses)
        self.replaced += len(batch.faults)
        self.loss += losses.sum()
        self.label_loss += label_losses.sum()
        quarter = (4 * t).long().clamp(max=3)                                      # [B]
        self.loss_by_t.index_add_(0, quarter, losses)
        self.count_by_t.index_add_(0, quarter, torch.ones_like(losses))

    def over_all_ranks(self, run, norm, usual_loss, notified):
        """-> StepReport. The step's only wait for the device."""
        notices = torch.full_like(self.samples, float(notified))
        sums = run.sum_over_ranks(torch.cat([
            self.samples, self.replaced, notices, self.loss, self.label_loss,
            self.loss_by_t, self.count_by_t]))                                     # [5 + 4 + 4]
        samples, replaced, notices, loss, label_loss, *by_t = sums.tolist()
        loss_by_t, count_by_t = by_t[:4], by_t[4:]
        norm = whole(norm).item()                  # under FSDP it is sharded

        loss = loss / samples
        limit = SPIKE * usual_loss if usual_loss else math.inf
        return StepReport(
            loss=loss,
            loss_by_t=[total / count if count else None
                       for total, count in zip(loss_by_t, count_by_t)],
            label_loss=label_loss / samples,
            grad_norm=norm,
            replaced=round(replaced),
            stop=notices > 0,
            sound=math.isfinite(loss) and math.isfinite(norm) and loss < limit,
            shapes=self.shapes)


def deal(step_batches, rank, ranks):
    """This rank's part of a step: [(planned batch, whether it counts)].

    step_batches   [data.PlannedBatch] of the step, dearest first

    They are dealt in turn, as cards are: of five, two ranks get 0, 2, 4 and 1, 3. So what the ranks
    compute at one moment takes them about equally long. Here the second rank has none for the third
    moment. It computes the cheapest again, which does not count: gradients are exchanged by all
    ranks or by none.
    """
    moments = -(-len(step_batches) // ranks)
    mine = []
    for k in range(rank, moments * ranks, ranks):
        if k < len(step_batches):
            mine.append((step_batches[k], True))
        else:
            mine.append((step_batches[-1], False))
    return mine


def micro_batches(stream, mine, share, faults):
    """This rank's MicroBatches of a step. mine: from `deal`; share: what a sample's loss weighs;
    faults: data.FaultCount of pictures that could not be read."""
    for k, (_, counts) in enumerate(mine):
        batch = next(stream)
        if counts:
            faults.add(batch)
        yield MicroBatch(batch, share if counts else 0.0, last=k == len(mine) - 1)


@functools.cache
def flops(model, tokens, length):
    """FLOPs of one training step for one picture of so many image and text tokens.

    6 for each weight and each token that meets it, forward and backward, or 4 if the weight is
    frozen; 12 W (N + S)^2 for each block's attention, of width W over N image and S text tokens.
    Recomputation is not counted: it is not work that trains.
    """
    def meets(name):
        if "_mod." in name or "time" in name or "norm_out" in name:
            return 1                               # a row a picture
        if "txt" in name or "add" in name:         # txt_in, txt_qkv, txt_mlp; to_add_out
            return length
        return tokens                              # img_in, img_qkv, img_mlp; to_out; proj_out

    config, unread = model.config, set(model.unread())
    total = 12 * config.num_layers * config.inner_dim * (tokens + length)**2
    for name, p in model.named_parameters():
        if p.ndim == 2 and name not in unread:
            total += (6 if p.requires_grad else 4) * p.numel() * meets(name)
    return total


def make_optimizers(model, stage):
    """[AdamW], or [AdamW, Muon] where the stage has a rate for it.

    AdamW has everything [paper]; Muon takes the matrices of attention and MLPs [ours], not those of
    the modulation, which meet one row a picture. See kit/muon.py.

    No weight decay: it would mostly change the scale of the weights, and the norms that follow (on
    q, on k, on every block's input) take that out again.
    """
    matrices, others = [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        is_matrix = p.ndim == 2 and "transformer_blocks" in name
        if stage.muon_lr and is_matrix and "_mod." not in name and "lora_" not in name:
            matrices.append(p)
        else:
            others.append(p)
    optimizers = [torch.optim.AdamW(others, lr=stage.lr, betas=stage.betas, weight_decay=0.0,
                                    fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, lr=stage.muon_lr))
    return optimizers


def set_learning_rates(optimizers, stage, factor):
    for optimizer, lr in zip(optimizers, (stage.lr, stage.muon_lr)):
        for group in optimizer.param_groups:
            group["lr"] = lr * factor


# --- The run --------------------------------------------------------------------------------------

@dataclass
class Learner:
    """All that learns, and its average."""
    denoiser: lens.LensTransformer      # with --lora it holds the adapter, too
    model: nn.Module                    # what is called: the denoiser, or DDP or FSDP around it
    ema: lens.LensTransformer           # running average: sampled from and saved
    labels: LabelReader | None
    optimizers: list
    lora: int                           # the adapter's rank; 0: all weights learn

    def trained(self):
        """{name: parameter} of the denoiser's weights that learn."""
        return {name: p for name, p in self.denoiser.named_parameters() if p.requires_grad}

    def averaged(self):
        trained, averaged = self.trained(), dict(self.ema.named_parameters())
        return {name: averaged[name] for name in trained}

    def groups(self):
        """What a resume needs, for kit.state."""
        groups = {"model": self.trained(), "ema": self.averaged()}
        if self.labels:
            groups["labels"] = dict(self.labels.head.named_parameters())
        return groups


class WithLabels(nn.Module):
    """The denoiser and its label head as one module, so that DDP and FSDP see the parameters of
    both. The head is called in `losses_of`: until then FSDP leaves gathered what is in no block."""

    def __init__(self, denoiser, head):
        super().__init__()
        self.denoiser, self.head = denoiser, head

    def forward(self, *args):
        return self.denoiser(*args)


def make_learner(run, denoiser, stage, lora=0, with_labels=False, recompute="none",
                 compiled=False, fsdp=False):
    """Learner around a denoiser on the run's device; run.bf16 is settled before."""
    unread = set(denoiser.unread())
    for name, p in denoiser.named_parameters():
        p.requires_grad_(name not in unread)
    if lora:
        count = add_lora(denoiser, rank=lora, alpha=lora, generator=generator(run.seed))
        run.say(f"LoRA of rank {lora} on {count} layers")
    # What is frozen is shared with the average: a copy takes what stands in its memo as it is.
    frozen = {id(p): p for p in denoiser.parameters() if not p.requires_grad}
    ema = copy.deepcopy(denoiser, memo=frozen).requires_grad_(False)

    model, labels = denoiser, None
    if with_labels:
        config = denoiser.config
        third = config.num_layers // 3             # [ours] of the way in
        labels = LabelReader(label_head(config.inner_dim).to(run.device), block=third)
        model = WithLabels(denoiser, labels.head)

    denoiser.set_recompute(recompute)
    if compiled:
        compile_blocks(denoiser, fullgraph=False)
    if fsdp:                                       # the average is shared out as the model is
        dtype = torch.bfloat16 if run.bf16 else None
        share_out(denoiser, dtype, root=model)
        share_out(ema, dtype)
    optimizers = make_optimizers(model, stage)
    if run.ranks > 1 and not fsdp:
        model = DistributedDataParallel(model)
    return Learner(denoiser, model, ema, labels=labels, optimizers=optimizers, lora=lora)


@dataclass
class Progress:
    """How far a run is; kept with its state."""
    stage: int = 0
    step: int = 0                  # in the stage
    total: int = 0                 # over all stages
    pictures: int = 0              # seen
    seconds: float = 0.0
    usual_loss: float = None       # running mean, which a step's loss is held against
    with_labels: bool = False      # whether a label head learns along
    skipped: int = 0               # steps that were left out
    skipped_in_a_row: int = 0
    replaced: int = 0              # samples that could not be read
    data: str = None               # digest of the shards
    scores: dict = field(default_factory=dict)
    bf16: bool = False
    attention: str = ""

    def add(self, report, pictures):
        """Counts one step. LensError where too many in a row were left out."""
        self.step += 1
        self.total += 1
        self.pictures += pictures
        self.replaced += report.replaced
        if report.sound:
            self.skipped_in_a_row = 0
            usual = self.usual_loss or report.loss
            self.usual_loss = report.loss + 0.98 * (usual - report.loss)   # over about 50 steps
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        require(self.skipped_in_a_row < PATIENCE,
                f"{PATIENCE} steps in a row had a loss or gradient that was not finite, or a loss "
                f"over {SPIKE:g} times the usual, {report.loss:.3g} at the last "
                f"(step {self.total}): none of them "
                "touched the weights; the last checkpoint is whole. Try a lower learning rate")


def check_sound(unsound, bar):
    """LensError where so many steps in a row, of rl.py or distill.py, had a gradient that was not
    finite, and so changed nothing. bar: of tqdm, which is closed first"""
    if unsound >= PATIENCE:
        bar.close()
        raise LensError(f"{unsound} steps in a row had a gradient that was not finite: none of "
                        "them touched the weights; the last checkpoint is whole. Try a lower "
                        "learning rate")


@dataclass(frozen=True)
class Schedule:
    """When things happen beside the steps; each a number of steps, 0 for never."""
    save_every: int
    eval_every: int
    preview_every: int


@dataclass(frozen=True)
class Output:
    """What a checkpoint needs beside the weights: the frozen parts, and notes."""
    parts: Places                  # of autoencoder and text encoder
    vae: nn.Module | None          # None, as the encoder: the inputs are cached
    encoder: lens.TextEncoder | None
    guidance: float                # what pictures of these weights are sampled with
    settings: dict                 # what a resume must be given again, see check_same_run
    init: str | None = None        # the name of what an adapter changes
    shown: tuple = ()              # prompts of previews; none: held-out ones of the toy world


def train_denoiser(run, size, stages, steps=None, accumulate=1, pattern=None, workers=4,
                   parts=None, init=None, lora=0, recompute="none", compiled=False,
                   fsdp=False, base_dtype="fp32", *, schedule):
    """Stages 1 and 2 of a size, as many as `stages` {number: Stage} names.

    steps     of each stage; None: the stage's own;  accumulate: micro-batches a rank and step
    pattern   of shards, as in --data; None: the toy world
    parts     Places of the autoencoder and the text encoder, or the name of both; None: those of
              `init`, else the toy's, or those that the shards were cached by
    init      weights to start from, a folder, file or hub id; None: random ones
    base_dtype    of what is frozen under an adapter, one of BASE_DTYPES
    """
    config = lens.SIZES[size].transformer
    settings = {"--size": size, "--seed": run.seed, "--init": init, "--lora": lora,
                "--data": "the toy world" if pattern is None else "shards",
                "--parts": None if parts is None else parts_named(parts, run.out),
                # None for fp32: runs from before there was a choice have none.
                "--base-dtype": None if base_dtype == "fp32" else base_dtype}
    check_same_run(run.out, settings)
    check_no_other_weights(run.out, adapter=bool(lora))

    # The frozen models, and the one that learns.
    inputs = open_inputs(run, size, pattern, parts, init)
    if inputs.vae is None and (schedule.preview_every or schedule.eval_every):
        schedule = replace(schedule, preview_every=0, eval_every=0)
        run.say("inputs are cached, so neither autoencoder nor text encoder is loaded: no previews "
                "and no --eval-every; sample.py shows what a checkpoint makes")
    denoiser = make_denoiser(run, size, init, base_dtype)

    # Precision and attention kernel: the faster ones, timed here; those of a run that is resumed.
    kept = kept_progress(run.out)
    home = max(stage.home for stage in stages.values())
    usual_text, _ = text_tokens(size)
    # Over a base in bf16 or less, products are in bf16.
    asked = None if base_dtype == "fp32" else "bf16"
    why = choose(run, config, (home // data.CELL)**2 + usual_text, kept, asked)
    use_attention(run.attention)

    # One learner for all stages, which share betas and Muon. A label head stays in stage 2 too,
    # where its loss is logged and weighs nothing.
    first = min(stages)
    with_labels = pattern is None and not lora and any(s.label_weight for s in stages.values())
    if kept:
        with_labels = with_labels and kept["with_labels"]
    learner = make_learner(
        run, denoiser.train(), stages[first], lora=lora, with_labels=with_labels,
        recompute=recompute, compiled=compiled, fsdp=fsdp)
    progress = Progress(stage=first)
    if kept:
        load_state(run, learner.groups(), learner.optimizers, settings=settings)
        progress = Progress(**kept)
        run.say(f"resuming {run.out} at step {progress.total} "
                f"(stage {progress.stage}, step {progress.step})")
        require(progress.stage <= max(stages), f"{run.out} is in stage {progress.stage} already, "
                f"past --stage {max(stages)}: leave out --stage, or give another --out")
    progress.bf16, progress.attention = run.bf16, run.attention
    progress.with_labels = with_labels

    count = sum(p.numel() for name, p in denoiser.named_parameters()
                if not name.endswith(".scale"))    # a PackedLinear's, no weights of the model
    frozen = f", frozen ones in {base_dtype}," if lora else ""
    made_by = "latents and prompt features by" if inputs.vae is None else "parts from"
    run.say(f"{size}: {count:,} parameters{frozen} on {run.ranks} x {run.device}; "
            f"{made_by} {inputs.parts}\n{why}")
    if pattern is not None and schedule.eval_every:
        run.say("note: --eval-every scores the six tasks of the toy world, not the pictures of "
                "--data; these are seen in the previews, which show captions of them")
    guidance = TOY_GUIDANCE if size in TOY_SIZES else sample.GUIDANCE
    output = Output(inputs.parts, inputs.vae, inputs.encoder, guidance=guidance,
                    settings=settings, init=init)
    log, notice = Log(run, progress.total), Notice()
    for number, stage in stages.items():
        if number < progress.stage:
            continue
        if number > progress.stage:
            progress.stage, progress.step, progress.data = number, 0, None
        stage = replace(stage, steps=steps or stage.steps)
        if progress.step < stage.steps:
            notices = torch.full((1,), float(notice.given), device=run.device)
            if progress.total and run.sum_over_ranks(notices).item():
                run.say_stopped(progress.total)    # it came while the stage before ended
                return
            with rank_zero_first(run):
                source = open_source(run, stage, inputs, pattern, workers)
            if pattern is not None and not output.shown:
                output = replace(output, shown=captions_to_show(run, size, source, inputs.encoder))
            train_stage(run, stage, source, learner=learner, progress=progress, output=output,
                        log=log, notice=notice, accumulate=accumulate, schedule=schedule)
    prompt = None                                  # the six tasks are the toy world's
    if pattern is not None:
        prompt = min(output.shown, key=len, default="...")
    run.say(f"done: {sample.command_to_see(run.out, prompt)}")


def parts_named(parts, out):
    """The two parts as somebody named them; None for those in the run's own folder, where any later
    call finds them."""
    places = gather(parts)
    names = dict.fromkeys((str(places.vae), str(places.text_encoder)))
    if all(expanded(name).resolve() == out.resolve() for name in names):
        return None
    return ", ".join(names)


def make_denoiser(run, size, init, base_dtype):
    """The denoiser of --init, in base_dtype; without one a new one, in fp32."""
    if not init:
        return lens.build(size, run.seed).to(run.device)
    dtype = torch.float32 if base_dtype == "fp32" else torch.bfloat16
    denoiser = load_transformer(init, run.device, dtype, packed=base_dtype == "fp8")
    require(denoiser.config == lens.SIZES[size].transformer,
            f"--init {init}: its weights are not of size {size}")
    return denoiser


def captions_to_show(run, size, source, encoder):
    """The first twelve captions of the user's, for previews. Says which words the toy's frozen text
    encoder has never read. encoder: None where the inputs are cached"""
    if size in TOY_SIZES and encoder is not None:
        remark = language.remark_on_captions(source.first_captions(1000), encoder.tokenizer)
        if remark:
            run.say(f"note: {remark}")
    return tuple(source.first_captions(12))


@dataclass(frozen=True)
class Inputs:
    """What makes pictures and captions into what the denoiser learns from."""
    parts: Places                  # of autoencoder and text encoder
    vae: nn.Module | None          # None, as the encoder: all is cached
    encoder: lens.TextEncoder | None
    vae_hash: str | None = None    # what stored latents must have been made by
    text_key: str | None = None    # what stored features must have been made by; None: not read


def open_inputs(run, size, pattern, parts, init):
    """-> Inputs. Of shards in which both latents and features are cached, neither model is loaded,
    nor transformers imported."""
    config = lens.SIZES[size].transformer
    with rank_zero_first(run):                     # which makes the shards' indices
        cached = None if pattern is None else data.cached_inputs(pattern)
    if cached is None:
        parts = gather(parts or parts_of(init))
        # The toy's parts are small enough for fp32.
        dtype = torch.float32 if size in TOY_SIZES else None       # None: as they are stored
        _, vae, encoder = load_pipeline(parts, run.device, dtype, parts=("vae", "text_encoder"))
        require(config.in_channels == 4 * vae.config["latent_channels"],
                f"--parts {parts}: its autoencoder is not the one that size {size} works with; "
                "name a folder or hub id with --parts, or files with --vae and --text-encoder")
        encoder.layers = config.selected_layer_index   # a folder of parts alone does not say which
        vae_hash = None if pattern is None else vae_identity(parts.vae)
        return Inputs(parts, vae, encoder, vae_hash)

    expected = (config.in_channels, config.enc_hidden_dim, config.selected_layer_index)
    require((cached.channels, cached.width, cached.layers) == expected,
            f"--data {pattern}: latents and prompt features, cached by {cached.weights}, are not "
            f"what size {size} works with")
    data.check_cached(cached, parts, init, config.selected_layer_index)
    return Inputs(gather(parts or cached.weights), vae=None, encoder=None, vae_hash=cached.vae_hash,
                  text_key=cached.text_key)


def parts_of(init):
    """Where autoencoder and text encoder come from if nobody says: from the model that training
    starts from, which knows no other latents; where there is none, or it is a denoiser alone, from
    weights/toy."""
    if init is None or str(init).endswith(".safetensors"):
        return sample.TOY
    folder = expanded(init)
    if not folder.is_dir() or (folder / "vae").is_dir():
        return init                                # a hub id, or a folder that has them
    index = folder / INDEX_NAME
    has_base = index.exists() and read_json(index).get("base")
    return init if has_base else sample.TOY


def text_tokens(size):
    """(of a usual caption, of the longest)."""
    return TOY_TEXT_TOKENS if size in TOY_SIZES else TEXT_TOKENS


def open_source(run, stage, inputs, pattern, workers):
    """A stage's source of batches: shards where there is a pattern, else the toy world."""
    if pattern is None:
        return World(stage, run.seed, inputs.vae, inputs.encoder, run.out.parent, run.device,
                     run.say)
    return data.ShardSource(
        pattern, stage.sizes(), run.seed, inputs.vae, inputs.encoder, run.device, workers,
        inputs.vae_hash, run.say, text_key=inputs.text_key)


def train_stage(run, stage, source, learner, progress, output, log, notice, accumulate, schedule):
    """One stage from progress.step, counted in the stage, to its last step.

    A step takes ranks * accumulate device batches of the plan. Which rank computes which changes
    neither what is learnt nor its noise: two ranks with --accumulate 1 learn what one rank learns
    with --accumulate 2.
    """
    per_step = run.ranks * accumulate
    pixels = [height * width for height, width in source.sizes]
    pictures = stage.pictures(source.sizes)
    peak = matmul_peak(run.device, torch.bfloat16 if run.bf16 else torch.float32)
    trained, averaged = learner.trained().values(), learner.averaged().values()
    faults = data.FaultCount(progress.replaced, progress.pictures)

    def plan(epoch):
        number = epoch_number(progress.stage, epoch)
        return data.plan(source.buckets, source.lengths(number), pictures, run.seed, number)

    def cost(planned):
        return pixels[planned.bucket] * len(planned.samples)

    require(progress.data in (None, source.digest), f"--data: these shards are not those that the "
            f"run in {run.out} began with; give another --out, or the same shards")
    progress.data = source.digest
    first_epoch = plan(0)                          # every epoch has as many batches
    epoch_length = -(-len(first_epoch) // per_step)
    smaller = sum(len(planned.samples) < pictures[planned.bucket] for planned in first_epoch)
    run.say(f"an epoch is {in_number(epoch_length, 'step')} of "
            f"{in_number(per_step, 'device batch', 'device batches')}; in {smaller} of "
            f"{in_number(len(first_epoch), 'batch', 'batches')} there are fewer pictures: what was "
            "left over in their buckets")

    def steps_after(step):
        """What is left after so many steps of the epoch that they end in, or the next one: a list
        of batches for each step."""
        epoch, done = divmod(step, epoch_length)
        batches = plan(epoch)
        steps = [sorted(batches[k:k + per_step], key=cost, reverse=True)
                 for k in range(0, len(batches), per_step)]
        return steps[done:done + stage.steps - step]

    # The rest of this epoch and the next one: if the stage goes on after that, an epoch of it was
    # whole, and has every sample.
    needed = steps_after(progress.step)
    needed += steps_after(progress.step + len(needed))
    if not data.prepare(run, source, [planned for step in needed for planned in step],
                        stopped=lambda: notice.given):
        sys.exit(0)                                # before the first step: there is nothing to save

    bar = tqdm(total=stage.steps, initial=progress.step, desc=f"stage {progress.stage}",
               unit="step", mininterval=2, disable=run.rank > 0)

    while progress.step < stage.steps:
        steps = steps_after(progress.step)
        dealt = [deal(step_batches, run.rank, run.ranks) for step_batches in steps]
        stream = source.stream([planned for mine in dealt for planned, _ in mine])

        for step_batches, mine in zip(steps, dealt):
            begin = time.perf_counter()
            factor = rate_factor(stage, progress.step)
            set_learning_rates(learner.optimizers, stage, factor)

            # Ranks average their gradients. For the mean over the step's samples a rank's sum is
            # therefore taken `ranks` times, over their total.
            total = sum(len(planned.samples) for planned in step_batches)
            share = run.ranks / total
            report = train_step(
                run, learner.model, micro_batches(stream, mine, share, faults=faults),
                optimizers=learner.optimizers, stage=stage, labels=learner.labels,
                label_weight=stage.label_weight * factor, usual_loss=progress.usual_loss,
                notice=notice)
            progress.add(report, total)
            follow(averaged, trained, rate=1 - average_decay(progress.total, EMA))

            seconds = time.perf_counter() - begin
            progress.seconds += seconds
            work = sum(
                shape.pictures * flops(learner.denoiser, shape.image_tokens, shape.text_tokens)
                for shape in report.shapes)
            sizes = {size_name(source.sizes[planned.bucket]) for planned in step_batches}
            row = log_row(run, progress, report)
            row |= {
                "lr": stage.lr * factor,
                "size": "+".join(sorted(sizes)),
                "pictures_per_s": round(total / seconds, 1),
                "tflops": round(work / seconds / 1e12, 3),
                "peak_share": round(work / seconds / peak, 3),
                "wait_s": round(source.waited, 4),
            }
            bar.update()
            bar.set_postfix_str(f"loss {report.loss:.3f}, {total / seconds:.0f} pictures/s, "
                                f"{row['peak_share']:.0%} of peak", refresh=False)
            after_step(run, stage, learner, progress=progress, output=output, log=log,
                       schedule=schedule, row=row, words=source.words, stop=report.stop, bar=bar)
    bar.close()


def epoch_number(stage, epoch):
    """A number that no other stage's epoch has, however long they are: a sample never meets the
    same noise twice."""
    thousands, rest = divmod(epoch, 1000)
    return 1_000_000 * thousands + 1000 * stage + rest


def rate_factor(stage, step):
    """The learning rate over the stage's, after so many of its steps. Where it does not fall it
    rises over 1000 steps [ours]."""
    if stage.decay:
        return learning_rate_factor(step, stage.steps, warmup=100)
    return min(1.0, (step + 1) / 1000)


def in_number(count, one, many=None):
    """"1 step", "2 steps": `many` where the plural is not formed by an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def size_name(size):
    """(height, width) as people write it: width x height."""
    height, width = size
    return f"{width}x{height}"


def log_row(run, progress, report):
    """What metrics.jsonl says of a step, without its speed. A step that was left out has no
    loss."""
    row = {
        "step": progress.total,
        "stage": progress.stage,
        "loss": report.loss if report.sound else None,
        "grad_norm": report.grad_norm if report.sound else None,
        "loss_by_t": [round(loss, 4) if report.sound and loss is not None else None
                      for loss in report.loss_by_t],
        "label_loss": round(report.label_loss, 4) if report.sound and report.label_loss else None,
        "skipped": progress.skipped,
        "replaced": progress.replaced,
        "seconds": round(progress.seconds, 2),
    }
    if run.device != "cpu":
        row["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row


def after_step(run, stage, learner, progress, output, log, schedule, row, words, stop, bar):
    """What happens beside a step: previews, evaluation, the log, checkpoints, and the end that
    a notice asks for.

    row    the step's line of the log;  words: that the captions use, for the notes
    stop   whether one came;  bar: of tqdm
    """
    step, steps = progress.step, stage.steps
    preview_due = due(schedule.preview_every, step, steps)
    eval_due = due(schedule.eval_every, step, steps)
    if preview_due or eval_due:
        shown = unsharded(run, learner.ema, lora_rank=learner.lora)    # None on ranks but 0
        if run.rank == 0 and preview_due:
            preview(run, shown, stage.home, progress=progress, output=output)
        if run.rank == 0 and eval_due:
            height, width = data.bucket(stage.home)
            progress.scores, _, _ = sample.evaluate(
                (shown, output.vae, output.encoder), height, width, steps=sample.STEPS,
                guidance=output.guidance, per_task=20, progress=True)
            bar.write(f"step {progress.total}: {in_words(progress.scores)}")
            row |= progress.scores
    log(**row)
    if stop or due(schedule.save_every, step, steps):
        save(run, stage, learner, progress=progress, output=output, words=words)
        log.draw()
    if stop and step < steps:                      # at a stage's end, train_denoiser looks itself
        bar.close()
        run.say_stopped(progress.total)
        sys.exit(0)


def preview(run, model, home, progress, output):
    """A contact sheet of twelve prompts."""
    height, width = data.bucket(home)
    prompts = output.shown
    if not prompts:
        prompts = [row.prompt for task in ("position", "counting")
                   for row in held_out(task, 6, height, width)]
    pictures = sample.generate(
        prompts, (model, output.vae, output.encoder), height=height,
        width=width, guidance=output.guidance, progress=True)
    contact_sheet(pictures, 6).save(run.out / f"preview-{progress.total:06d}.png")


def save(run, stage, learner, progress, output, words):
    """The averaged weights in the released layout, or the adapter in PEFT's: sample.py takes them
    as they are. Then the resume state.

    In this order: a run that is killed between the two does its last steps again. In the other, one
    that is killed at its very end would never write its weights.
    """
    averaged = unsharded(run, learner.ema, lora_rank=learner.lora)
    if run.rank == 0:
        notes = {
            "command": shlex.join(["python", "train.py", *sys.argv[1:]]),
            "commit": code_version(),
            "seed": run.seed,
            "trained_steps": progress.total,
            "trained_seconds": round(progress.seconds),
            "score": json.dumps(progress.scores),
            "steps": sample.STEPS,
            "guidance": output.guidance,
            "base": stage.home,
            "words": json.dumps(words),
        }
        if learner.lora:
            save_lora(averaged, run.out, metadata=notes)
            base = Places(output.init, output.parts.vae, output.parts.text_encoder)
            save_pipeline(run.out, base=base_from(run.out, base))
        else:
            rest = None if has_parts(run.out) else base_from(run.out, output.parts)
            save_pipeline(run.out, transformer=averaged, metadata=notes, base=rest)
    save_state(run, progress.total, learner.groups(), optimizers=learner.optimizers,
               settings=output.settings, progress=asdict(progress))


# --- A checkpoint to ship -------------------------------------------------------------------------

@torch.no_grad()
def export(run, target, parts):
    """The run's folder as a small checkpoint in `target`, scored on 50 prompts a task.

    parts   Places of the autoencoder that it was trained with, or its name

    bf16, and the blocks' matrices in fp8 (e4m3) with a scale each, as ComfyUI's files have them
    [ours]. That halves the file and cost two pictures of 300 (0.920 against 0.927).
    """
    transformer, vae, encoder = load_pipeline(run.out, run.device, torch.float32)
    stored = {}
    for name, w in transformer.state_dict().items():
        # w is the model's own memory, so what is scored is what is stored: fp32 numbers that bf16
        # holds exactly, here and below. save_pipeline makes them bf16.
        stored[name] = w.copy_(w.bfloat16())
        if w.ndim == 2 and name.startswith("transformer_blocks"):
            stored[name], scale = e4m3(w)
            stored[name.removesuffix("weight") + "scale_weight"] = scale.view(())
            w.copy_(stored[name].float() * scale)
    for w in (*vae.parameters(), *encoder.model.parameters()):
        w.copy_(w.bfloat16())

    notes = read_metadata(run.out)
    height, width = data.bucket(int(notes["base"]))
    scores, _, _ = sample.evaluate(
        (transformer, vae, encoder), height, width, steps=int(notes["steps"]),
        guidance=float(notes["guidance"]))
    notes["score"] = json.dumps(scores)
    # How the autoencoder was made: for people, since its file is written anew.
    files, _ = locate(fetch(gather(parts).vae, ("vae",)), "vae")
    with open_safetensors(files[0]) as f:
        notes["vae"] = json.dumps(f.metadata() or {})
    encoder.model.to(torch.bfloat16)
    save_pipeline(target, transformer, vae, text_encoder=encoder, metadata=notes,
                  dtype=torch.bfloat16, weights=stored)
    print(f"wrote {target}: {json.dumps(scores)}")


# --- The command line -----------------------------------------------------------------------------

def pictures_by_area(text):
    """An argparse type: "24,10,6" -> (24, 10, 6)."""
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("must be numbers of at least 1")
    return numbers


def check_both_parts(out, size, pattern):
    """LensError where --out has one of the two parts alone: weights/toy's would be taken, in
    silence, in the place of the one that was just trained. pattern: of --data, or None"""
    missing = missing_parts(out)
    if len(missing) == 1:
        raise LensError(f"{out} has one of the two parts that this takes, and no {missing[0]}/: "
                        f"make it with `{command_for_next_part(out, size, pattern)}`, or name both "
                        "parts with --parts")


def usual_base_dtype(size, lora, fsdp=False):
    """What of BASE_DTYPES a run has where nothing is asked for."""
    if lora and not fsdp and size not in TOY_SIZES:
        return "bf16"
    return "fp32"


def arguments(argv):
    parser = Parser("Train the denoiser by flow matching. The same command again resumes.", __doc__)
    add = parser.add_argument_group("what").add_argument
    add("--size", default="toy", choices=lens.SIZES, help="default: toy")
    add("--stage", default="all", choices=("1", "2", "all"),
        help="1: one area; 2: all areas; all: 1, then 2 (default)")
    add("--out", type=user_path, default="runs/toy", metavar="DIR",
        help="checkpoint, metrics, curves, previews (default: %(default)s)")
    add("--parts", metavar="DIR_OR_REPO",
        help="autoencoder and text encoder (default: those of --out, else of --init, else of "
             "weights/toy)")
    add_part_flags(add)
    add("--init", metavar="DIR_FILE_OR_REPO",
        help="start from these weights, not from random ones")
    add("--data", metavar="GLOB", help="shards of `data.py pack` or `cache`, say 'shards/*.tar' "
        "(default: the toy world); of `cache --text`, --parts are not loaded")
    add("--lora", type=not_negative, default=0, metavar="RANK",
        help="train an adapter over --init instead of all weights (default: 0, all weights)")
    add("--base-dtype", choices=BASE_DTYPES, help="of --init under --lora (default: bf16; fp32 for "
        "the toy's sizes and with --fsdp); tools/budget.py lora says what fits")
    add("--seed", type=seed_number, default=0, help="default: %(default)s")
    add("--export", type=user_path, metavar="DIR",
        help="train nothing: score what --out holds and write it there in bf16, to ship")
    add("--export-lora", choices=("comfy",), help="train nothing: write the LoRA of --out (of "
        "train.py, rl.py or distill.py) as ComfyUI reads it, into --out/comfyui_lora.safetensors")

    add = parser.add_argument_group("how").add_argument
    add("--steps", type=positive, help="of each stage (default: what size and stage say)")
    add("--batch", type=pictures_by_area, metavar="N,N",
        help="pictures in a device batch, one number for each of the stage's areas, the smallest "
        "first (with --stage all: for those of stage 2)")
    add("--accumulate", type=positive, default=1, metavar="N",
        help="device batches that a rank takes for one step (default: %(default)s)")
    add("--recompute", default="none", choices=("none", "selective", "full"),
        help="activations to compute again, to save memory (default: %(default)s)")
    add("--fsdp", action="store_true", help="under torchrun: share weights and moments among the "
        "ranks (else DDP: each holds all)")
    add("--workers", type=not_negative, default=min(4, usable_cores()),
        help="processes a rank that decode --data (default: %(default)s)")
    add("--device", help="cpu or cuda (default: CUDA if there is one)")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile the blocks: 1.1 to 1.4 "
        "times as fast after a minute (default: on a GPU; a CPU needs a C++ compiler)")

    add = parser.add_argument_group("when").add_argument
    add("--save-every", type=positive, default=250, metavar="N",
        help="steps (default: %(default)s)")
    add("--eval-every", type=not_negative, default=0, metavar="N",
        help="steps; six tasks, 20 prompts each (default: 0, never)")
    add("--preview-every", type=not_negative, default=1000, metavar="N",
        help="steps; 0: never (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    if args.export_lora:
        target = f"{args.out}/comfyui_lora.safetensors"
        count = write_for_comfyui(args.out, target)
        print(f"wrote {target}: {count} layers; put it into ComfyUI's models/loras")
        return
    numbers = (1, 2) if args.stage == "all" else (int(args.stage),)
    stages = {number: stage_of(args.size, number) for number in numbers}
    if args.batch:
        areas = stages[max(numbers)].areas         # stage 1 has one of these
        require(len(args.batch) == len(areas),
                f"--batch: {len(areas)} numbers, for the areas {', '.join(map(str, areas))}")
        pictures = dict(zip(areas, args.batch))
        for number, stage in stages.items():
            batch = tuple(pictures[area] for area in stage.areas)
            stages[number] = replace(stage, batch=batch)
    require(args.data is None or find_files(args.data), f"--data {args.data}: no file matches; "
            "`python data.py pack --images DIR --out shards` makes shards of pictures")
    require(args.data or args.size in TOY_SIZES,
            f"--size {args.size}: name the shards to train on with --data (`data.py pack` makes "
            "them); the toy world is for --size toy or nano")
    require(args.init or not args.lora,
            "--lora trains an adapter over trained weights: name them with --init")

    require(args.lora or args.base_dtype is None,
            "--base-dtype is of what is frozen under an adapter: with --lora alone")
    base_dtype = args.base_dtype or usual_base_dtype(args.size, args.lora, args.fsdp)
    require(base_dtype == "fp32" or not args.fsdp, f"--base-dtype {base_dtype}: not with --fsdp, "
            "which shares out weights of one type, fp32")

    run = start_run(args.out, args.seed, args.device)
    require(base_dtype != "fp8" or run.ranks == 1, "--base-dtype fp8 is for one process")
    require(run.ranks > 1 or not args.fsdp, "--fsdp shares weights among processes: start it with "
            "torchrun --nproc-per-node N train.py ...")
    if not args.parts and not args.init:
        check_both_parts(args.out, args.size, args.data)
    parts = args.parts or (args.out if has_parts(args.out) else None)
    if parts or args.vae or args.text_encoder:
        parts = gather(parts or parts_of(args.init), args.vae, args.text_encoder)
    if args.export:
        if run.rank == 0:                          # small work, for one process
            export(run, args.export, parts or parts_of(args.init))
        return
    compiled = args.compile
    if compiled is None:
        compiled = run.device != "cpu"
        if compiled and base_dtype == "fp8":       # Triton unpacks e4m3 on GPUs from 8.9 on alone
            compiled = torch.cuda.get_device_capability(run.device) >= (8, 9)
    train_denoiser(
        run, args.size, stages, steps=args.steps, accumulate=args.accumulate, pattern=args.data,
        workers=args.workers, parts=parts, init=args.init, lora=args.lora,
        recompute=args.recompute, compiled=compiled,
        fsdp=args.fsdp, base_dtype=base_dtype,
        schedule=Schedule(save_every=args.save_every, eval_every=args.eval_every,
                          preview_every=args.preview_every))


if __name__ == "__main__":
    run_command(main)
