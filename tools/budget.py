"""Memory and work before you pay: what training, reward RL and distillation take at a size.

Read before: train.py, rl.py, distill.py.

    python tools/budget.py train --size full                # all weights; --lora 16: an adapter
    python tools/budget.py lora --size full                 # an adapter on small cards: what fits
    python tools/budget.py rl --size full
    python tools/budget.py distill --size full --without gan
    python tools/budget.py step rl --size nano --area 64    # one real step: counted and measured
    python tools/budget.py step distill --size full --area 256 --lora 16
    python tools/budget.py step lora --blocks 4 --base-dtype fp8

Everything but `step` is counted, no weight is made. One set of rules for all three recipes.

Memory of a device, what must be there at once:

    weights      all models that the recipe holds, in fp32 but for the base of RL, which is bf16,
                 and that of a LoRA in training, which is what train.py --base-dtype says.
                 Train: the model. RL: the base, adapters `new` and `old`. Distillation: teacher,
                 student, fake and heads; student and fake are adapters or whole models
    average      the running average of what learns, fp32
    gradients    of what learns, fp32; student and fake take turns, so one of the two counts
    moments      two of everything that learns, fp32 (AdamW's; Muon has one, so the toy has less)
    activations  what a device batch leaves between its forward and its backward pass, counted on
                 tensors without storage. Distillation with heads has two sets: the student's graph
                 waits while the heads' gradient goes through the teacher

Text encoder, autoencoder, a block's own work while it runs and what CUDA needs come on top. FSDP
divides all but the activations by the number of GPUs; adapters of RL and distillation do without,
and so does one over a base in bf16 or fp8. `lora` is closer, as small cards need it: a block's work
is counted, 1 GiB is left for CUDA, and inputs are cached, so there are no encoders.

Work is what the GPU does, recomputation included (`tflops` in the logs leaves that out, since it
teaches nothing):

    forward      2 FLOPs for each weight and token that meets it, 4 W N^2 for each block's attention
    backward     2 for each weight and token, the gradient of the inputs; 2 more where the weight
                 learns; 8 W N^2 for each block's attention
    recompute    "full": the forward once more; "selective" keeps what costs much, so nothing

So where all weights learn a step costs three forwards, and four when it recomputes. Over a frozen
base an adapter's step costs two and three in products with weights, and the same attention. Text
encoder, autoencoder, heads, judge and optimiser are left out: a few percent at full size.
"""
import functools
import json
import os
import sys
import threading
import time
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402  (the path above comes first)
import distill  # noqa: E402
import lens  # noqa: E402
import rl  # noqa: E402
import train  # noqa: E402
from kit.files import Parser, not_negative, positive, require, run_command  # noqa: E402
from kit.fp8 import pack_blocks  # noqa: E402
from kit.lora import LORA_TARGETS, add_lora  # noqa: E402
from kit.run import Run, pick_device  # noqa: E402

GIB, MIB = 2**30, 2**20
FP32, BF16 = 4, 2             # bytes of a number
GPUS = 8                      # that the table shares weights out to
TEXT, _ = train.TEXT_TOKENS   # text tokens of a usual caption
RANK = 64                     # of an adapter, where nothing else is said
LORA_RANK = 16                # of one in training


# --- Parameters -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Counts:
    """Numbers of parameters."""
    base: int                 # the denoiser's
    adapter: int              # a LoRA's on it; 0: all weights learn
    learnt: int               # that get a gradient: the adapter's, or nearly all
    heads: int = 0            # the discriminator's of distillation


@functools.cache
def counted_model(config, rank=0, targets=LORA_TARGETS, learns="trained"):
    """The denoiser without storage.

    rank    of an adapter over it; 0: no adapter
    learns  "trained": the adapter, or without one all weights that are read; "all": these weights
            and the adapter; "nothing"
    """
    with torch.device("meta"):
        model = lens.LensTransformer(config)
        if rank:
            add_lora(model, rank, rank, targets)
    if learns != "trained":
        model.requires_grad_(learns == "all")
    unread = set(model.unread())
    for name, p in model.named_parameters():
        if name in unread:
            p.requires_grad_(False)
    return model


def parameter_counts(config, rank=0, targets=LORA_TARGETS, gan=False):
    """-> Counts. gan: with the heads of distillation."""
    base = sum(p.numel() for p in counted_model(config).parameters())
    model = counted_model(config, rank, targets)
    adapter = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    learnt = sum(p.numel() for p in model.parameters() if p.requires_grad)
    heads = 0
    if gan:
        heads = sum(p.numel() for p in distill.make_heads(config, seed=0).parameters())
    return Counts(base, adapter, learnt, heads)


# --- Memory ---------------------------------------------------------------------------------------

PARTS = ("weights", "average", "gradients", "moments")


@dataclass(frozen=True)
class Part:
    """Something that a device holds all through a step."""
    name: str                 # one of PARTS
    bytes: int


def base_bytes(config, base_dtype):
    """Of a denoiser that is kept in one of train.BASE_DTYPES."""
    with torch.device("meta"):
        model = base_model(config, base_dtype)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def base_model(config, base_dtype):
    usual = torch.get_default_dtype()
    # Made in its type: tensors without storage cannot be turned into another.
    torch.set_default_dtype(torch.float32 if base_dtype == "fp32" else torch.bfloat16)
    try:
        model = lens.LensTransformer(config)
    finally:
        torch.set_default_dtype(usual)
    if base_dtype == "fp8":
        pack_blocks(model)
    return model


def fixed_parts(recipe, counts, base=None):
    """[Part] of a recipe, one of "train", "rl" and "distill": all but the activations.

    base    of train: bytes of the denoiser; None: fp32
    """
    learnt, adapter = counts.learnt, counts.adapter
    # What a second model costs that plays beside the first: its adapter, or all of it.
    player = adapter or counts.base
    if recipe == "train":
        return [
            Part("weights", (base or FP32 * counts.base) + FP32 * adapter),
            Part("average", FP32 * learnt),                  # what is frozen is shared with it
            Part("gradients", FP32 * learnt),
            Part("moments", 2 * FP32 * learnt),
        ]
    if recipe == "rl":
        return [
            Part("weights", BF16 * counts.base + 2 * FP32 * adapter),        # new, old
            Part("average", FP32 * adapter),
            Part("gradients", FP32 * adapter),
            Part("moments", 2 * FP32 * adapter),
        ]
    return [
        Part("weights", FP32 * (counts.base + 2 * player + counts.heads)),   # student, fake
        Part("average", FP32 * player),
        Part("gradients", FP32 * (learnt + counts.heads)),
        Part("moments", 2 * FP32 * (2 * learnt + counts.heads)),
    ]


def fixed_bytes(parts):
    return sum(part.bytes for part in parts)


def activation_bytes(config, recompute, count, grid, text=TEXT, rank=0, base_dtype="fp32"):
    """Bytes that a device batch leaves between its forward and its backward pass, bf16 copies of
    weights included.

    count pictures of a grid (h, w) of tokens, with `text` tokens each. Products are in bf16. All
    weights learn, or an adapter of `rank` over a frozen base. Blocks are alike, so two and three of
    them tell what all of them keep.
    """
    def kept(blocks):
        of_few = replace(config, num_layers=blocks)
        return tracked_bytes(of_few, recompute, count, grid, text, rank, base_dtype)[0]

    of_two = kept(2)
    return of_two + (config.num_layers - 2) * (kept(3) - of_two)


def step_bytes(config, recompute, count, grid, text=TEXT, rank=0, base_dtype="fp32"):
    """The most bytes that a forward and a backward pass hold at once: the activations, and the work
    of the block that is computed. Gradients are among them, as far as they are made by then.

    From three and four blocks: of two, one is the last, which has less to do.
    """
    def most(blocks):
        of_few = replace(config, num_layers=blocks)
        return tracked_bytes(of_few, recompute, count, grid, text, rank, base_dtype)[1]

    of_three = most(3)
    return of_three + (config.num_layers - 3) * (most(4) - of_three)


def tracked_bytes(config, recompute, count, grid, text, rank=0, base_dtype="fp32"):
    """-> (bytes held after the forward pass, the most held during both), on tensors without
    storage."""
    lens.rope_table.cache_clear()      # a table without storage must not outlive its mode
    with FakeTensorMode():
        model = base_model(config, base_dtype).train()
        if rank:
            add_lora(model, rank, rank)
        model.set_recompute(recompute)
        batch = random_batch(config, count, grid, text)
        t = torch.rand(count)
        with Held() as held:
            with torch.autocast("cpu", torch.bfloat16):
                loss = train.flow_matching_loss(model, batch, batch.tokens, t).mean()
            kept = held.now            # after autocast, which lets its copies of weights go
            loss.backward()
    lens.rope_table.cache_clear()
    return kept, held.most


class Held(TorchDispatchMode):
    """Inside, counts the bytes of what operations make: `now`, as long as something refers to it,
    and the `most` that there were at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()             # ids of the storages that are counted

    def __torch_dispatch__(self, func, types, given=(), named=None):
        out = func(*given, **(named or {}))
        inputs = {id(t.untyped_storage()) for t in tree_leaves((given, named))
                  if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            # A view is of its input's storage, which is no new one.
            if isinstance(t, torch.Tensor) and id(t.untyped_storage()) not in inputs:
                self.add(t.untyped_storage())
        return out

    def add(self, storage):
        if id(storage) not in self.known:
            self.known.add(id(storage))
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.drop, id(storage), storage.nbytes())

    def drop(self, known, count):
        self.known.discard(known)
        self.now -= count


def random_batch(config, count, grid, text, device="cpu"):
    """A data.Batch of random numbers: count pictures of a grid (h, w), `text` tokens each."""
    layers = [torch.randn(count, text, config.enc_hidden_dim, device=device)
              for _ in config.selected_layer_index]
    return data.Batch(
        samples=np.arange(count),
        epoch=0,
        grid=grid,
        text=layers,                                                       # K x [B, S, E]
        mask=torch.ones(count, text, dtype=torch.bool, device=device),     # [B, S]
        tokens=torch.randn(count, grid[0] * grid[1], config.in_channels, device=device))


# --- Work -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Work:
    """A part of a step's work."""
    name: str
    flops: float


def forward_flops(config, tokens, text, rank=0, targets=LORA_TARGETS):
    """Of one picture, without a gradient: a third of a step in which every weight learns."""
    return train.flops(counted_model(config, rank, targets, "all"), tokens, text) / 3


def step_flops(config, tokens, text, recompute, rank=0, targets=LORA_TARGETS):
    """Of one picture, forward and backward. rank: of an adapter; 0: all weights learn."""
    work = train.flops(counted_model(config, rank, targets), tokens, text)
    if recompute == "full":
        work += forward_flops(config, tokens, text, rank, targets)
    return work


def frozen_step_flops(config, tokens, text, recompute):
    """The same where no weight learns, for the gradient at the model's input."""
    work = train.flops(counted_model(config, learns="nothing"), tokens, text)
    if recompute == "full":
        work += forward_flops(config, tokens, text)
    return work


def train_work(config, area, count, rank, recompute):
    """[Work] of a step over one device batch: `count` pictures of area x area pixels."""
    tokens = (area // 16)**2
    learn = step_flops(config, tokens, TEXT, "none", rank)
    again = step_flops(config, tokens, TEXT, recompute, rank) - learn
    return [Work("forward and backward", count * learn), Work("recomputed", count * again)]


def rl_work(config, settings, recompute):
    """[Work] of an RL step, of all GPUs together."""
    tokens, rank = (settings.base // 16)**2, settings.rank
    reference = forward_flops(config, tokens, TEXT)
    old = forward_flops(config, tokens, TEXT, rank)
    new = step_flops(config, tokens, TEXT, recompute, rank)

    pictures = settings.prompts * settings.group
    noised = pictures * settings.times
    return [
        Work("sampling", pictures * settings.sampler_steps * old),
        Work("old and reference, forward", noised * (old + reference)),
        Work("new, forward and backward", noised * new),
    ]


def distill_work(config, area, count, rank, recompute, gan):
    """[Work] of a step over one device batch: CRITIC updates of fake and heads, one of the student.
    gan: with the heads."""
    tokens, targets = (area // 16)**2, distill.LORA_TARGETS
    teacher = forward_flops(config, tokens, TEXT)
    teacher_without_text = forward_flops(config, tokens, 0)
    student = forward_flops(config, tokens, TEXT, rank, targets)
    learn = step_flops(config, tokens, TEXT, recompute, rank, targets)

    critic = distill.CRITIC
    simulated = (distill.STEPS - 1) / 2            # steps of the student's sampler, on average
    predictions = critic * (simulated + 1) + simulated
    work = [
        Work("student, without gradient", count * predictions * student),
        Work("fake learns", count * critic * learn),
        Work("student learns", count * learn),
        Work("teacher and fake at y", count * (2 * teacher + teacher_without_text + student)),
    ]
    if gan:
        few = max(1, round(distill.R1_SHARE * count))
        seen = 2 * count + 2 * few                 # real and made; R1's few, as they are and moved
        through = frozen_step_flops(config, tokens, TEXT, recompute)
        work.append(Work("teacher for the heads", critic * seen * teacher))
        work.append(Work("heads' gradient at y", count * through))
    return work


# --- The table ------------------------------------------------------------------------------------

@dataclass
class Row:
    """A device batch, and what it takes."""
    pictures: str             # "24 of 512 x 512"
    learns: str               # "all weights" or "LoRA 64"
    recompute: str
    counts: Counts
    parts: list               # [Part]
    activations: int          # bytes
    work: list                # [Work]
    sharded: bool             # FSDP divides all but the activations

    @property
    def flops(self):
        return sum(work.flops for work in self.work)


def train_rows(size, stage_number, rank, base_dtype="fp32"):
    config, stage = lens.SIZES[size].transformer, train.stage_of(size, stage_number)
    counts = parameter_counts(config, rank)
    rows = []
    for area, count in zip(stage.areas, stage.batch, strict=True):
        for recompute in ("none", "selective", "full"):
            rows.append(Row(
                pictures=pictures_in_words(count, area),
                learns=learns_in_words(rank),
                recompute=recompute,
                counts=counts,
                parts=fixed_parts("train", counts, base_bytes(config, base_dtype)),
                activations=activation_bytes(config, recompute, count, grid_of(area), rank=rank,
                                             base_dtype=base_dtype),
                work=train_work(config, area, count, rank, recompute),
                sharded=base_dtype == "fp32"))
    return rows


CARDS = (8, 12, 16, 24)       # GB, which are 10^9 bytes here; most cards have a little more
CUDA = GIB                    # bytes, assumed: CUDA's own, and what its allocator cannot fill


@dataclass
class LoraRow:
    """An adapter in training, by setting; inputs are cached."""
    base_dtype: str
    recompute: str
    area: int                 # pixels on a side
    fixed: int                # bytes of base and adapter, with average, gradients and moments
    steps: dict               # {pictures at once: bytes of a step beside the fixed}

    def total(self, count):
        return self.fixed + self.steps[count]

    def card(self, count):
        """The smallest of CARDS that holds it, or None."""
        return next((card for card in CARDS if self.total(count) + CUDA <= card * 1e9), None)


def lora_rows(size, rank, base_dtypes=train.BASE_DTYPES, areas=(512, 1024), counts=(1, 2, 4),
              recomputes=("none", "full")):
    config = lens.SIZES[size].transformer
    numbers = parameter_counts(config, rank)
    rows = []
    for base_dtype in base_dtypes:
        parts = fixed_parts("train", numbers, base_bytes(config, base_dtype))
        for recompute in recomputes:
            for area in areas:
                steps = {count: step_bytes(config, recompute, count, grid_of(area), rank=rank,
                                           base_dtype=base_dtype) for count in counts}
                rows.append(LoraRow(base_dtype, recompute, area, fixed_bytes(parts), steps))
    return rows


def print_lora(size, rank, rows):
    config = lens.SIZES[size].transformer
    numbers = parameter_counts(config, rank)
    cards = ", ".join(map(str, CARDS))
    print(f"{size}: {counts_in_words(numbers)} (rank {rank})\n"
          f"GiB of memory at the most, with cached inputs of {TEXT} text tokens, and the smallest "
          f"card of {cards} GB that holds it and {CUDA / GIB:.0f} GiB for CUDA")
    print(f"{'base':>5} {'recompute':>9} {'pictures of':>11} {'fixed':>6}"
          + "".join(f"{count:>8} at once" for count in rows[0].steps))
    for row in rows:
        line = f"{row.base_dtype:>5} {row.recompute:>9} {row.area:>11} {row.fixed / GIB:6.2f}"
        for count in row.steps:
            card = row.card(count)
            fits = f"{card} GB" if card else "-"
            line += f"{row.total(count) / GIB:9.2f} {fits:>6}"
        print(line)


def rl_rows(size, rank=None):
    """rank: of the adapters; None: what the size says."""
    config = lens.SIZES[size].transformer
    settings = rl.SETTINGS.get(size, rl.SETTINGS["full"])
    if rank is not None:
        settings = replace(settings, rank=rank)
    recompute, grid = recompute_of(size), grid_of(settings.base)
    counts = parameter_counts(config, settings.rank)
    return [Row(
        pictures=pictures_in_words(settings.batch, settings.base),
        learns=learns_in_words(settings.rank),
        recompute=recompute,
        counts=counts,
        parts=fixed_parts("rl", counts),
        activations=activation_bytes(config, recompute, settings.batch, grid),
        work=rl_work(config, settings, recompute),
        sharded=False)]


def distill_rows(size, rank, gan):
    """Each area with whole models, and with adapters of this rank."""
    config, stage = lens.SIZES[size].transformer, distill.settings_for(size).stage
    recompute = recompute_of(size)
    rows = []
    for area, count in zip(stage.areas, stage.batch, strict=True):
        kept = distill_activations(config, recompute, count, grid_of(area), gan)
        for adapter in (0, rank):
            counts = parameter_counts(config, adapter, distill.LORA_TARGETS, gan)
            rows.append(Row(
                pictures=pictures_in_words(count, area),
                learns=learns_in_words(adapter),
                recompute=recompute,
                counts=counts,
                parts=fixed_parts("distill", counts),
                activations=kept,
                work=distill_work(config, area, count, adapter, recompute, gan),
                sharded=adapter == 0))
    return rows


def distill_activations(config, recompute, count, grid, gan, text=TEXT):
    """Two sets with heads: the student's graph waits while theirs goes through the teacher."""
    sets = 2 if gan else 1
    return sets * activation_bytes(config, recompute, count, grid, text)


def recompute_of(size):
    """How rl.py and distill.py run their blocks."""
    return "full" if size == "full" else "none"


def grid_of(area):
    return (area // 16, area // 16)


def pictures_in_words(count, area):
    return f"{count} of {area} x {area}"


def learns_in_words(rank):
    return f"LoRA {rank}" if rank else "all weights"


COLUMNS = {                   # {heading: width}
    "pictures a GPU": 17, "learns": 12, "recompute": 10, "weights": 8, "average": 8,
    "gradients": 10, "moments": 8, "activations": 12, "one GPU": 8, f"FSDP on {GPUS}": 10,
    "work a step": 13, "GPU seconds": 12,
}


def print_budget(recipe, size, rows, sustained):
    """The counts of the last row, the table, and the parts of the last row's work.

    sustained: FLOP/s that a GPU keeps up
    """
    largest = max(fixed_bytes(row.parts) + row.activations for row in rows)
    unit, unit_name = (GIB, "GiB") if largest >= GIB else (MIB, "MiB")
    print(f"{size}: {counts_in_words(rows[-1].counts)}")
    print(f"{unit_name} of memory on a device, {TEXT} text tokens; seconds at "
          f"{in_flop(sustained)}/s, assumed (--tflops)")
    print_line(COLUMNS)
    for row in rows:
        print_line(cells_of(row, unit, sustained))

    whose = "of all GPUs together" if recipe == "rl" else "of one GPU"
    parts = [f"{work.name} {in_flop(work.flops)}" for work in rows[-1].work if work.flops]
    print(f"work of the last line, {whose}: {'; '.join(parts)}")


def cells_of(row, unit, sustained):
    """[text] of a row, one for each of COLUMNS."""
    fixed = fixed_bytes(row.parts)
    memory = [part.bytes for part in row.parts] + [row.activations, fixed + row.activations]
    cells = [row.pictures, row.learns, row.recompute]
    cells += [f"{count / unit:.2f}" for count in memory]
    if row.sharded:
        cells.append(f"{(fixed / GPUS + row.activations) / unit:.2f}")
    else:
        cells.append("-")
    return cells + [in_flop(row.flops), f"{row.flops / sustained:,.2f}"]


def print_line(cells):
    padded = [f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True)]
    print(" ".join(padded))


def counts_in_words(counts):
    words = [f"{counts.base:,} parameters"]
    if counts.adapter:
        words.append(f"an adapter of {counts.adapter:,} learns")
    else:
        words.append(f"{counts.learnt:,} of them learn")
    if counts.heads:
        words.append(f"heads of {counts.heads:,}")
    return ", ".join(words)


def in_flop(flops):
    """"883 PFLOP": a number of FLOPs with the unit that suits it."""
    for unit, name in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP")):
        if flops >= unit:
            return f"{flops / unit:.4g} {name}"
    return f"{flops / 1e9:.4g} GFLOP"


# --- One real step: counted memory beside measured ------------------------------------------------

@dataclass(frozen=True)
class Trial:
    """What the step is made of: random weights, random text and pictures."""
    size: str
    area: int                 # pixels on a side
    pictures: int
    rank: int                 # of the adapters
    text: int                 # text tokens
    device: str
    blocks: int = None        # None: as many as the size has
    base_dtype: str = "bf16"  # of lora

    @property
    def config(self):
        config = lens.SIZES[self.size].transformer
        return replace(config, num_layers=self.blocks or config.num_layers)


def random_model(config, device, dtype):
    """Every weight random, and never held twice: 16 GiB would not fit twice on the machines that
    this is for."""
    with torch.device("meta"):
        model = lens.LensTransformer(config)
    model = model.to(dtype).to_empty(device=device).eval()
    # The same numbers over and over: to draw 4 billion takes minutes on a CPU.
    numbers = 0.02 * torch.randn(2**20, device=device, dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.fill_(0.5)
                continue
            for part in p.view(-1).split(len(numbers)):
                part.copy_(numbers[:len(part)])
    return model


def rl_trial(trial):
    """-> (Counts, bytes that are counted, a function that takes the step): one group's loss, there
    and back, and the optimiser's step."""
    config, count, grid = trial.config, trial.pictures, grid_of(trial.area)
    recompute = recompute_of(trial.size)
    settings = replace(rl.SETTINGS["full"], rank=trial.rank, alpha=2.0 * trial.rank, times=1,
                       batch=count, group=count)
    model = random_model(config, trial.device, torch.bfloat16)
    model.set_recompute(recompute)
    policies = rl.Policies(model, settings, seed=0)
    run = Run(out=None, device=trial.device)
    batch = random_batch(config, count, grid, trial.text, trial.device)
    text = [layer[:1].bfloat16() for layer in batch.text]                  # K x [1, S, E]
    group = rl.Group(batch.tokens, [], text, grid)

    counts = parameter_counts(config, trial.rank)
    counted = fixed_bytes(fixed_parts("rl", counts))
    counted += activation_bytes(config, recompute, count, grid, trial.text)

    def step():
        rl.group_loss(run, policies, group, torch.rand(count), total=count, key=(0, 0))
        policies.learn(run, step=0)

    return counts, counted, step


def distill_trial(trial):
    """The same: four updates of fake and heads, one of the student."""
    config, count, grid = trial.config, trial.pictures, grid_of(trial.area)
    recompute = recompute_of(trial.size)
    settings = distill.settings_for("full", lora=trial.rank)
    base = random_model(config, trial.device, torch.float32)
    heads = distill.make_heads(config, seed=0).to(trial.device)
    players = distill.make_players(base, heads, seed=0, lora=trial.rank, recompute=recompute)
    optimizers = distill.make_optimizers(players, settings)
    run = Run(out=None, device=trial.device, bf16=True)
    batch = random_batch(config, count, grid, trial.text, trial.device)

    counts = parameter_counts(config, trial.rank, distill.LORA_TARGETS, gan=True)
    counted = fixed_bytes(fixed_parts("distill", counts))
    counted += distill_activations(config, recompute, count, grid, gan=True, text=trial.text)

    def update_batch(k):
        return distill.UpdateBatch(
            tokens=batch.tokens, text=batch.text, mask=batch.mask, grid=grid,
            noise=torch.randn_like(batch.tokens),
            levels=lens.sigmas(batch.tokens.shape[1], distill.STEPS), k=k,
            rng=torch.Generator().manual_seed(k))

    def step():
        for k in range(distill.CRITIC):
            distill.critic_update(run, players, update_batch(k), optimizers, settings)
        last = update_batch(distill.STEPS - 1)
        distill.student_update(run, players, last, optimizers, settings)

    return counts, counted, step


def lora_trial(trial):
    """The same: an adapter's step in train.py, blocks recomputed."""
    config, count, grid = trial.config, trial.pictures, grid_of(trial.area)
    dtype = torch.float32 if trial.base_dtype == "fp32" else torch.bfloat16
    model = random_model(config, trial.device, dtype)
    if trial.base_dtype == "fp8":
        pack_blocks(model)
    run = Run(out=None, device=trial.device, bf16=True)
    stage = train.Stage(areas=(trial.area,), batch=(count,), steps=1, lr=1e-4)
    learner = train.make_learner(run, model.train(), stage, lora=trial.rank, recompute="full")
    batch = random_batch(config, count, grid, trial.text, trial.device)

    counts = parameter_counts(config, trial.rank)
    counted = fixed_bytes(fixed_parts("train", counts, base_bytes(config, trial.base_dtype)))
    counted += step_bytes(config, "full", count, grid, trial.text, trial.rank, trial.base_dtype)

    def step():
        micro = train.MicroBatch(batch, 1 / count, last=True)
        train.train_step(run, learner.model, [micro], learner.optimizers, stage)

    return counts, counted, step


def resident_bytes():
    """What this process holds in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Watch:
    """Inside, looks every millisecond how much memory the process holds: `most`."""

    def __enter__(self):
        self.most, self.done = resident_bytes(), False
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def look(self):
        while not self.done:
            self.most = max(self.most, resident_bytes())
            time.sleep(0.001)

    def __exit__(self, *_):
        self.done = True
        self.thread.join()


def measure_step(recipe, trial):
    """Takes one real step -> {name: what it took}.

    Peak memory is the allocator's on a GPU, on a CPU the most that the process held: `before`, that
    of Python and PyTorch, 0.3 to 0.5 GiB, is among it.
    """
    prepare = {"rl": rl_trial, "distill": distill_trial, "lora": lora_trial}[recipe]
    before = resident_bytes()
    counts, counted, step = prepare(trial)
    on_gpu = trial.device != "cpu"
    if on_gpu:                                     # without what making the model took
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    with Watch() as watch:
        step()
    peak = watch.most
    if on_gpu:
        torch.cuda.synchronize()
        before, peak = 0, torch.cuda.max_memory_allocated()
    return {
        "recipe": recipe,
        "size": trial.size,
        "area": trial.area,
        "pictures": trial.pictures,
        "rank": trial.rank,
        "text": trial.text,
        "blocks": trial.blocks,
        "base_dtype": trial.base_dtype if recipe == "lora" else None,
        "device": trial.device,
        "parameters": counts.base,
        "adapter": counts.adapter,
        "before_gib": round(before / GIB, 4),
        "counted_gib": round(counted / GIB, 4),
        "peak_gib": round(peak / GIB, 4),
        "seconds": round(time.perf_counter() - began, 1),
    }


# --- The command line -----------------------------------------------------------------------------

def main(argv=None):
    parser = Parser("Memory and work of a step, counted; `step`: measured too.", __doc__)
    add = parser.add_argument
    add("what", choices=("train", "lora", "rl", "distill", "step"))
    add("recipe", nargs="?", choices=("rl", "distill", "lora"), help="which step")
    add("--size", default="full", help=f"one of {', '.join(lens.SIZES)} (default: %(default)s)")
    add("--lora", type=not_negative, metavar="RANK", help="of adapters (default: train none, rl "
        f"what the size says, lora {LORA_RANK}, else {RANK})")
    add("--base-dtype", choices=train.BASE_DTYPES,
        help="of train --lora and step lora, as train.py has it")
    add("--stage", type=int, default=2, choices=(1, 2), help="of train (default: %(default)s)")
    add("--without", choices=("gan",), help="distill: no discriminator, as distill.py has it")
    add("--tflops", type=float, default=400.0, metavar="N",
        help="TFLOP/s that a GPU keeps up (default: %(default)s)")
    add("--area", type=positive, default=512,
        help="of a step: pixels on a side (default: %(default)s)")
    add("--pictures", type=positive, default=1, help="of a step (default: %(default)s)")
    add("--text", type=positive, default=TEXT,
        help="of a step: text tokens (default: %(default)s)")
    add("--blocks", type=positive, help="of a step: how many of the size's blocks (default: all)")
    add("--device", help="of a step: cpu or cuda (default: CUDA if there is one)")
    args = parser.parse_args(argv)

    size, rank = args.size, args.lora
    require(size in lens.SIZES, f"unknown size '{size}': choose one of {', '.join(lens.SIZES)}")
    require((args.recipe is not None) == (args.what == "step"),
            "`step` takes a step of `rl`, `distill` or `lora`; these or `train` alone count one")
    base_dtype = args.base_dtype or train.usual_base_dtype(size, rank or args.recipe == "lora")
    require(rank != 0 or args.what == "train", "--lora 0: that is for train alone")
    of_adapters = args.recipe == "lora" or (args.what == "train" and rank)
    require(of_adapters or args.base_dtype is None,
            "--base-dtype is of what is frozen under an adapter: of `train --lora` and `step lora`")
    require(args.tflops > 0, f"--tflops {args.tflops:g}: must be above 0")
    require(args.area % 16 == 0, f"--area {args.area}: must be divisible by 16")

    if args.what == "step":
        usual = LORA_RANK if args.recipe == "lora" else RANK
        trial = Trial(size, args.area, args.pictures, rank or usual, args.text,
                      pick_device(args.device), args.blocks, base_dtype)
        print(json.dumps(measure_step(args.recipe, trial)))
        return
    if args.what == "lora":
        print_lora(size, rank or LORA_RANK, lora_rows(size, rank or LORA_RANK))
        return
    if args.what == "train":
        rows = train_rows(size, args.stage, rank or 0, base_dtype)
    elif args.what == "rl":
        rows = rl_rows(size, rank)
    else:
        rows = distill_rows(size, rank or RANK, gan=args.without != "gan")
    print_budget(args.what, size, rows, 1e12 * args.tflops)


if __name__ == "__main__":
    run_command(main)
