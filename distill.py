"""
distill.py - four steps without guidance: a teacher of twenty guided steps becomes a student of four plain ones.

Read the files before `rl.py` first (`rl.py` is this one's sibling). Assumes a trained teacher (`--teacher`, default weights/toy), which
stays frozen; do reward RL before this, few-step students blur under it. The same command again resumes:

    python distill.py --out runs/turbo                   # from weights/toy, on the toy world
    python sample.py --eval --weights runs/turbo         # four steps, guidance 1: the weights say so themselves
    python distill.py --out runs/no-ca --without ca      # what a term does, shown by leaving it out: ca, dm, gan or ida
    python distill.py --out runs/turbo --lora 3 --export weights/toy-turbo             # it, as a small adapter of its teacher

    python distill.py --size full --dry-run              # memory and work of a step, by mode; then
    python distill.py --size full --lora 64 --teacher DIR_OR_REPO --data 'shards/*.tar'                # one GPU of 80 GB, by that account
    python distill.py --size full --lora 64 --teacher DIR_OR_REPO --data captions.txt --no-gan         # captions alone suffice
    torchrun --nproc-per-node 8 distill.py --size full --fsdp --teacher DIR_OR_REPO --data 'shards/*.tar'

The story in one paragraph. The student is put where its own sampler would put it: k of its four steps are run without gradient, and
from there it predicts the picture, y. Three forces act on y. Distribution matching (DM): y is noised, and a `fake` model, which always
learns what the student now makes, and the teacher both say what they see in it; the difference moves the student's pictures, as a
crowd, onto the teacher's. Guidance (CA): the teacher's guided prediction against its plain one, at levels cleaner than the student's
input only; this is what makes one forward a step enough. Discriminator (GAN): small heads on the frozen teacher's features tell real
pictures from the student's and give back the sharpness that the other two lose. Fake and heads take four updates for each one of the
student's, and after it the fake is pulled three hundredths of the way to the student (IDA), so that it never falls far behind.

Where this departs from the paper [ours]: the heads' shape and places, and a logit for each token; the fake is trained, and heads judge, at the
levels at which DM noises; the approximate R1 takes a quarter of a batch, since only it runs in fp32; a running average of the student is
what is saved; `--lora` trains adapters where the paper trains all weights; the toy has other rates, batches and steps (`SETTINGS`), and
its student's rate falls to zero over the last half of a run.
"""
import argparse, copy, functools, glob, json, math, os, shlex, sys, time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from tqdm import tqdm

import data
import lens
import sample
import train

STEPS, CRITIC = 4, 4                       # [paper] the student's sampler steps; updates of fake and heads to one of the student
PULL = 0.1                                 # [paper] weight of L_DM + L_CA
IDA = 0.03                                 # [paper] phi <- 0.97 phi + 0.03 theta
R1_GAMMA, R1_NOISE, R1_SHARE = 1.0, 0.1, 0.25      # [paper], [paper]; [ours] share of a batch that it looks at
BETAS = (0.0, 0.9)                         # [paper] of AdamW: an adversary's old gradients mislead
MARGIN = 0.02                              # [ours] of a range of noise levels, left out at both ends: nothing can be learnt there

class Settings(NamedTuple):
    stage: train.Stage   # areas, pictures a batch, steps, the student's learning rate, scenes of the toy world
    fake_lr: float
    heads_lr: float
    gan: float           # weight of L_G
    guidance: float      # of the teacher, to be distilled
    average: float       # decay of the student's average

SETTINGS = {"nano": Settings(train.Stage((64, 96), (8, 4), 20, 1e-4, (48, 24)), 1e-4, 1e-3, 0.02, 5.0, 0.9),
            # [ours]
            "toy": Settings(train.Stage((64, 96, 128), (32, 32, 24), 100, 1e-4, (300, 300, 3000)), 5e-4, 2e-3, 0.02, 5.0, 0.98),
            # [paper] but the average
            "full": Settings(train.Stage((512, 768, 1024), (4, 4, 4), 1000, 5e-7, decay=False), 5e-7, 1e-4, 0.001, 5.0, 0.98)}
# The toy's gan: L_DM and L_CA are means over a picture's numbers, so their pull on y shrinks with the root of how many there are, and
# that of L_G does not. A toy picture of 96 x 96 has 1,152, one of 1024 x 1024 524,288: with the paper's 0.001 the heads' pull on the toy was a
# thousandth of the other two; times sqrt(524288 / 1152) it stands to them as in the paper (at 128 x 128 0.016 would).
LORA_LR = 10.0           # [ours] an adapter's rates against those of whole weights; at 20 the toy's pictures lost their texture
# [ours] The modulation too: a student meets four times only, and when all weights of the toy were trained, these layers moved three times
# as far as the others (1% of their length). Without them an adapter of rank 6 ended at 0.72 where all weights reached 0.78.
LORA_TARGETS = (*lens.LORA_TARGETS, "img_mod.1", "txt_mod.1")

# ---------------------------------------------------------------------------------------------------------------------
# Noise levels, and the student's own sampler.

def shifted(u, levels):
    """u in (0, 1), the variable in which the sampler's steps are evenly spaced, -> noise level t of the sampler of `levels`.
    The shift t = e^mu / (e^mu + 1/u - 1) multiplies the odds of u by e^mu, and the last level above 0 (u = 1 / steps) tells by how much."""
    last, steps = levels[-2].item(), len(levels) - 1
    odds = last / (1 - last) * (steps - 1)
    return odds * u / (1 - u + odds * u)

def draw_levels(count, levels, below, rng):
    """[count] noise levels, evenly drawn in the unshifted variable from 0 to `below`, then shifted. DM: below = 1, the whole range.
    CA: below = 1 - k / steps, so tau_CA < t_k, strictly. The decoupled-DMD paper writes time the other way round; ports that copied its
    sign drew the noisier levels, where guidance overshoots (the mean of the check lands at 6.08 m, not at 1.92 m)."""
    return shifted(below * (MARGIN + (1 - 2 * MARGIN) * torch.rand(count, generator=rng)), levels)

@torch.no_grad()
def simulate(model, noise, text, mask, grid, k):
    """The first k steps of the student's sampler, to the bit what `sample.denoise` does with STEPS steps and guidance 1: so the student
    learns on states that it will meet. noise [B, N, C], text K x [B, S, E] -> [B, N, C] at levels[k]."""
    levels, x, gathered = lens.sigmas(noise.shape[1], STEPS), noise.float(), isinstance(model, FSDPModule)
    if k and not gathered:
        context, modulation = model.prepare(text, mask, grid), model.modulation(levels[:-1].to(noise.device))
    for i in range(k):
        if gathered:                                       # FSDP gathers weights for forward alone, which may round otherwise
            v = model(x, levels[i].expand(len(x)).to(x.device), text, mask, grid).float()
        else:
            v = model.velocity_from(x.to(model.proj_out.weight.dtype), modulation.at(i), context).float()      # [B, N, C]
        x = x + (levels[i + 1] - levels[i]).item() * v
    return x

# ---------------------------------------------------------------------------------------------------------------------
# The forces on a prediction y. A gradient here is what is subtracted from y.

def dm_gradient(v_fake, v_teacher, t):
    """x0^_phi - x0^_T(cond) at one noised y, from their velocities (x0 = x_t - t v): [B, N, C]. Zero where the student is the data."""
    return lens.wide(t, v_teacher) * (v_teacher - v_fake)

def ca_gradient(v_cond, v_uncond, t, guidance, guide=sample.guide):
    """-(g - 1)(x0^_T(cond) - x0^_T(uncond)): plain against guided prediction, by the guidance of the sampler, rescaling and all. Without
    the rescaling the student learns the burnt-out colours that the teacher's sampler takes care to avoid."""
    return lens.wide(t, v_cond) * (guide(v_cond, v_uncond, guidance) - v_cond)

def normalised(gradient, y, x0_teacher):
    """Divided per sample by mean|y - x0^_T|: levels at which the teacher itself is unsure of y count no more than others. Not by the
    gradient's own size: it would then never vanish."""
    return gradient / (y - x0_teacher).abs().mean((1, 2), keepdim=True).clamp_min(1e-5)

def pull(y, gradient):
    """1/2 |y - stop(y - gradient)|^2, a loss whose gradient at y is `gradient`. Mean over all numbers."""
    return 0.5 * (y - (y - gradient).detach()).square().mean()

def follow(behind, ahead, rate):
    """behind <- (1 - rate) behind + rate ahead: IDA for the fake (rate 0.03 lags 32.3 steps), and the student's average."""
    with torch.no_grad():
        torch._foreach_lerp_([train.local(p) for p in behind], [train.local(p) for p in ahead], rate)

# ---------------------------------------------------------------------------------------------------------------------
# The discriminator: heads on the frozen teacher's image stream.

def places(blocks):
    """Blocks whose output the heads read: after a third, two thirds and all of them."""
    return sorted({blocks // 3, 2 * blocks // 3, blocks - 1})

def make_heads(config, seed):
    """One head a place, each a logit a token. The last layer starts at zero: no opinion, and no force on the student."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width, hidden = config.inner_dim, min(256, config.inner_dim)
        heads = nn.ModuleList([nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))
                               for _ in places(config.num_layers)])
    for head in heads:
        nn.init.zeros_(head[-1].weight)
    return heads

def tapped(model, x, t, text, mask, grid):
    """[B, N, W] for each of `places`: LensTransformer.forward up to the last of them. Not by hooks: compiled blocks pass over hooks that
    come after the compilation, without a word."""
    context, time, seen = model.prepare(text, mask, grid), model.time(t), []
    img, txt = model.img_in(x), context.txt                                        # [B, N, W], [B, S, W]
    for i, block in enumerate(model.transformer_blocks):
        img, txt = block(img, txt, time, None, context.rope, context.mask)
        seen += [img] if i in places(len(model.transformer_blocks)) else []
    return seen

def judge(heads, features):
    """Logits [B, places * N], in fp32: high for real."""
    return torch.cat([head(f.float()).squeeze(-1) for head, f in zip(heads, features)], 1)

def logistic(real, made):
    """The heads' loss from their logits on real and on made pictures: 2 log 2 where they know nothing."""
    return F.softplus(-real).mean() + F.softplus(made).mean()

def approximate_r1(judged, x, noise):
    """gamma / 2 |D(x) - D(x + a noise)|^2: for small a the squared length of D's gradient times gamma a^2 / 2, without a second
    backward pass. judged: x -> logits. In fp32: the difference of two nearly equal numbers is what bf16 cannot hold."""
    plain, moved = judged(torch.cat([x, x + R1_NOISE * noise])).chunk(2)
    return R1_GAMMA / 2 * (plain - moved).square().mean()

# ---------------------------------------------------------------------------------------------------------------------
# Who plays: teacher, student, fake, and the student's average `ema`.

def act(args, who):
    """The model that plays `who`. With --lora all of them are one base, with this adapter or another, the teacher with none."""
    if args.lora:
        lens.set_lora(args.nets[who], None if who == "teacher" else who)
    return args.nets[who]

def weights(args, who):
    """{name: parameter} of what is trained in student and fake, and averaged in `ema`; in the same order for all three."""
    if args.lora:
        return {f"{n}.lora_{ab}": getattr(layer, f"lora_{ab}")[who]
                for n, layer in lens.lora_layers(args.nets[who], who).items() for ab in "AB"}
    dead = set(args.nets[who].unread())
    return {name: p for name, p in args.nets[who].named_parameters() if name not in dead}

def make_nets(args, base, dtype):
    """Fills args.nets and args.trained from the teacher. All weights are fp32, and computed with in bf16 (autocast)."""
    # one seed: all three start alike, and as the teacher (B is zero)
    for who in ("student", "fake", "ema") if args.lora else ():
        lens.add_lora(base, args.lora, args.lora, LORA_TARGETS, who, generator=train.generator(args.seed, 1))
    base.requires_grad_(False)
    args.nets = {who: base if who == "teacher" or args.lora else copy.deepcopy(base) for who in ("teacher", "student", "fake", "ema")}
    for p in (*weights(args, "student").values(), *weights(args, "fake").values()):
        p.requires_grad_(True)
    for who, model in args.nets.items() if not args.lora else [("teacher", base)]:
        train.set_recompute(model, "full" if args.size == "full" else "none")
        model.tapped = functools.partial(tapped, model)
        lens.quicken(model, fullgraph=False) if args.compile else None
        if args.fsdp:              # each shares the same weights out in the same way, so `follow` needs no word from another rank
            # The teacher is gathered in fp32, for the R1. Inputs are left alone: rotary angles must stay fp32.
            policy = (MixedPrecisionPolicy() if who == "teacher" else
                      MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False))
            for block in model.transformer_blocks:
                fully_shard(block, mp_policy=policy)
            fully_shard(model, mp_policy=policy)
            register_fsdp_forward_method(model, "tapped")                          # it gathers weights as forward does
    # now: gathered weights would go by the same names
    args.trained = {who: weights(args, who) for who in ("student", "fake", "ema")}

def make_optimizers(args, rates):
    """{who: optimiser} of student, fake and, where there is a discriminator, heads; rates: {who: learning rate}."""
    learn = {who: args.heads.parameters() if who == "heads" else args.trained[who].values() for who in rates}
    return {who: torch.optim.AdamW([*learn[who]], lr=lr, betas=BETAS, weight_decay=0.0, fused=True)
            for who, lr in rates.items() if who != "heads" or "gan" not in args.without}

def descend(args, optimizer):
    """One step along the mean gradient of all ranks, clipped; one that is not finite touches nothing. -> its norm."""
    parameters = optimizer.param_groups[0]["params"]
    for p in parameters if args.ranks > 1 else ():
        if p.grad is not None and not hasattr(p, "to_local"):                      # FSDP has done it for its own
            dist.all_reduce(p.grad)
            p.grad /= args.ranks
    norm = train.whole(torch.nn.utils.clip_grad_norm_(parameters, train.CLIP)).item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm

# ---------------------------------------------------------------------------------------------------------------------
# The two kinds of update.

class Batch(NamedTuple):
    real: torch.Tensor           # [B, N, C] tokens of real pictures, or None: captions alone
    given: tuple                 # text K x [B, S, E], mask [B, S], grid: what a model is told beside x and t
    levels: torch.Tensor         # [STEPS + 1] of the student's sampler at this size
    k: int                       # how many of its steps lie behind the student's input
    start: torch.Tensor          # [B, N, C] noise
    rng: torch.Generator

def get_batch(args, source, number, bucket, samples, found):
    """Update `number`'s batch: its noise is a function of (seed, number, rank), and k of (seed, number), the same on all ranks: a rank
    that had fewer steps to simulate would wait for the others."""
    real, text, mask, _ = found
    height, width = source.sizes[bucket]
    rng, move = train.generator(args.seed, number, 1 + args.rank), lambda x: x.to(args.device, non_blocking=True)
    grid, k = (height // 16, width // 16), int(torch.randint(STEPS, (), generator=train.generator(args.seed, number)))
    start = torch.randn((len(samples), grid[0] * grid[1], args.nets["teacher"].config.in_channels), generator=rng)
    return Batch(None if real is None else move(real), ([move(layer) for layer in text], move(mask), grid),
                 lens.sigmas(start.shape[1], STEPS), k, move(start), rng)

def noised(args, batch, x, below=1.0, same=None):
    """(x at a drawn level [B, N, C], noise, t [B]); same: the levels of another draw."""
    t = draw_levels(len(x), batch.levels, below, batch.rng).to(args.device) if same is None else same
    noise = torch.randn(x.shape, generator=batch.rng).to(args.device)
    return lens.add_noise(x, noise, t), noise, t

def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)

def student_predicts(args, batch):
    """y [B, N, C]: what the student takes for the picture, k steps into its own sampler."""
    student, t = act(args, "student"), batch.levels[batch.k].expand(len(batch.start)).to(args.device)
    with autocast(args):
        x = simulate(student, batch.start, *batch.given, batch.k)
    # a second one: autocast keeps the casts that it made without gradient, and the weights would get none
    with autocast(args):
        return lens.data_prediction(x, student(x, t, *batch.given).float(), t)

def critic_update(args, batch, optimizers):
    """Fake: flow matching on the student's pictures. Heads: real or made? -> what the log tells."""
    with torch.no_grad():
        y = student_predicts(args, batch)
    _, noise, t = noised(args, batch, y)
    with autocast(args):
        loss = train.flow_matching_loss(act(args, "fake"), y, *batch.given, noise, t).mean()
    loss.backward()
    row = {"fake_loss": loss.item(), "fake_norm": descend(args, optimizers["fake"])}
    if "gan" in args.without:
        return row
    real, _, t = noised(args, batch, batch.real)
    made, *_ = noised(args, batch, y, same=t)
    text, mask, grid = batch.given
    few, teacher = max(1, round(R1_SHARE * len(y))), act(args, "teacher")
    with torch.no_grad(), autocast(args):
        features = teacher.tapped(torch.cat([real, made]), torch.cat([t, t]),
                                  [layer.repeat(2, 1, 1) for layer in text], mask.repeat(2, 1), grid)

    def judged(x):                                                                 # two times `few` pictures, in fp32
        with torch.no_grad():
            seen = teacher.tapped(x, t[:few].repeat(2), [layer[:few].repeat(2, 1, 1) for layer in text], mask[:few].repeat(2, 1), grid)
        return judge(args.heads, seen)
    on_real, on_made = judge(args.heads, features).chunk(2)
    r1 = approximate_r1(judged, real[:few], torch.randn(real[:few].shape, generator=batch.rng).to(args.device))
    loss = logistic(on_real, on_made) + r1
    loss.backward()
    right = ((on_real > 0).float().mean() + (on_made < 0).float().mean()) / 2
    return {**row, "heads_loss": loss.item(), "r1": r1.item(), "heads_right": right.item(),
            "heads_norm": descend(args, optimizers["heads"])}

def student_update(args, batch, optimizers):
    """0.1 (L_DM + L_CA) + 0.001 L_G [paper]. The forces are gathered at y, and then go through the student in one backward pass: so each can be
    measured, and no adapter is switched between a forward pass and its recomputation. -> what the log tells."""
    y, row = student_predicts(args, batch), {}
    leaf, total = y.detach().requires_grad_(), y.new_zeros(())
    with torch.no_grad(), autocast(args):
        x, _, t = noised(args, batch, leaf)
        v_teacher = act(args, "teacher")(x, t, *batch.given).float()
        v_fake = act(args, "fake")(x, t, *batch.given).float()
        dm = normalised(dm_gradient(v_fake, v_teacher, t), leaf, lens.data_prediction(x, v_teacher, t))
        row["cosine"] = F.cosine_similarity(v_fake.flatten(1), v_teacher.flatten(1)).mean().item()
        x, _, t = noised(args, batch, leaf, 1 - batch.k / STEPS)                   # cleaner than the student's input
        teacher = act(args, "teacher")
        v_cond, v_uncond = teacher(x, t, *batch.given).float(), teacher(x, t, None, None, batch.given[2]).float()
        ca = normalised(ca_gradient(v_cond, v_uncond, t, args.guidance), leaf, lens.data_prediction(x, v_cond, t))
    for name, force in (("dm", dm), ("ca", ca)):
        row[name] = force.abs().mean().item()                                      # against mean|y - x0^_T|, the teacher's own
        total = total + (name not in args.without) * PULL * pull(leaf, force)
    (at_y,) = torch.autograd.grad(total, leaf)
    size = at_y.norm().item()
    if "gan" not in args.without:
        x, _, t = noised(args, batch, leaf)
        with autocast(args):
            features = teacher.tapped(x, t, *batch.given)                          # the gradient flows through the teacher
        loss = F.softplus(-judge(args.heads, features)).mean()
        (from_heads,) = torch.autograd.grad(args.how.gan * loss, leaf)
        row.update(gan_loss=loss.item(), gan=from_heads.norm().item() / max(size, 1e-12))      # against the other two together
        total, at_y = total + args.how.gan * loss, at_y + from_heads
    act(args, "student")
    y.backward(at_y)
    norm = descend(args, optimizers["student"])
    if "ida" not in args.without:
        follow(args.trained["fake"].values(), args.trained["student"].values(), IDA)
    spread = lambda x: x.var(0, correction=0).mean().sqrt().item()                 # over the batch: 0 where all pictures are one
    return {"loss": total.detach().item(), **row, "grad_norm": norm, "spread": spread(leaf.detach()),
            **({} if batch.real is None else {"spread_real": spread(batch.real)})}

# ---------------------------------------------------------------------------------------------------------------------
# Captions, checkpoints, evaluation.

class Captions:
    """Captions alone, a line each, as `train.World` and `train.Pictures` give them; the sizes take turns."""

    def __init__(self, args, stage):
        self.captions, self.encoder = sample.read_prompts(args.data)[0], args.encoder
        self.sizes = [size for area in stage.areas for size in stage.sizes(area)]
        self.buckets, self.count = (np.arange(len(self.captions)) % len(self.sizes),
                                    np.array([len(row) for row in args.encoder.tokenize(self.captions)[0]]))

    def lengths(self, epoch):
        return self.count

    def stream(self, batches):
        for _, samples, _ in batches:
            text, mask = self.encoder.encode([self.captions[i] for i in samples])
            yield None, [layer.float() for layer in text], torch.ones(text[0].shape[:2], dtype=torch.bool) if mask is None else mask, []

def updates(args, source, stage, first, last):
    """This rank's batches [(bucket, samples, epoch)] of the updates first to last - 1: an epoch after the other, dealt in turn."""
    counts = stage.counts(source.sizes)
    plan = functools.lru_cache(2)(lambda epoch: data.plan(source.buckets, source.lengths(epoch), counts, args.seed, epoch))
    place = lambda number: divmod(number * args.ranks + args.rank, len(plan(0)))
    return [plan(epoch)[k] for epoch, k in map(place, range(first, last))]

def resumable(args, optimizers):
    """{name: tensor} of all that a resume needs."""
    found = ({f"{who}.{name}": p for who in ("student", "fake", "ema") for name, p in args.trained[who].items()}
             | {f"heads.{name}": p for name, p in args.heads.named_parameters()})
    return ({name: t.detach() for name, t in found.items()}
            | {f"optimizer.{name}": t for name, t in train.optimizer_tensors(optimizers.values(), found).items()})

def save(args, optimizers, state):
    """The resume state as train.py writes it, and the student's average in the released layout: `sample.py --weights` takes it as it is."""
    train.write_state(args, state["step"], resumable(args, optimizers), state)
    out, model = Path(args.out), train.averaged_model(args, act(args, "ema"))      # under FSDP gathered on rank 0, None on the others
    if args.rank == 0:
        notes = dict(command=shlex.join(["python", "distill.py", *sys.argv[1:]]), seed=args.seed, trained_steps=state["step"],
                     trained_seconds=round(state["seconds"]), score=json.dumps(state["scores"]),
                     teacher=str(args.teacher), steps=STEPS, guidance=1.0, base=args.home[0], words=args.words)
        # an adapter beside the name of its base: as good as whole weights
        if args.lora:
            lens.save_lora(model, out, "ema", notes)
        lens.save_pipeline(out, transformer=None if args.lora else model, metadata=notes,
                           base=None if train.has_parts(out) and not args.lora else os.path.relpath(args.parts, out))

def resume(args, optimizers):
    """Fills weights and optimisers from the newest state of --out; -> the state of the loop, or a fresh one."""
    if not (found := train.checkpoints(args.out)):
        return {"step": 0, "seconds": 0.0, "scores": {}, "teacher": {}, "bf16": None, "key": args.key}
    state = json.loads((found[-1] / "notes.json").read_text())
    lens.require(state["key"] == args.key,
                 f"--out {args.out} holds another run ({state['key']}): give another folder, "
                 "or the same --teacher, --seed, --data, --lora, --guidance, --lr and --without")
    train.make_moments(optimizers.values())
    with train.checkpointing(f"cannot read {found[-1]}"):
        dcp.load(resumable(args, optimizers), storage_reader=dcp.HuggingFaceStorageReader(str(found[-1])))
    args.say(f"resuming {args.out} at step {state['step']}")
    return state

@torch.no_grad()
def measure(args, model, steps, guidance):
    """Six tasks, 20 prompts each, fidelity, and diversity: root mean square distance between the pictures of one prompt (12 prompts, four
    seeds each) per token channel. Sharper pictures of fewer kinds would show here."""
    scores, *_ = sample.evaluate((model, args.vae, args.encoder), *args.home, steps, guidance, 20, progress=False)
    grid, spread = (args.home[0] // 16, args.home[1] // 16), []
    for text in sample.encode(args.encoder, [sample.held_out(data.TASKS[i % 6], 2, *args.home)[i // 6][2] for i in range(12)]):
        noise = torch.cat([sample.picture_noise(seed, grid, model.config.in_channels) for seed in range(4)]).to(args.device)
        tokens = sample.denoise(model, noise, list(text[:, None].expand(-1, 4, -1, -1).to(args.device)), None, grid, steps, guidance)
        spread.append(sample.diversity(tokens))
    return {**scores, "diversity": round(float(np.mean(spread)), 4)}

def evaluate(args, state, bar):
    """The student's scores, and once the teacher's, guided at its own number of steps and plain at the student's."""
    known = state["teacher"]
    for who, steps, guidance in (((("teacher", sample.STEPS, args.guidance), ("teacher", STEPS, 1.0)) if not known else ())
                                 + (("ema", STEPS, 1.0),)):
        model = train.averaged_model(args, act(args, who))
        if args.rank == 0:
            scores = measure(args, model, steps, guidance)
            known.update({f"{steps} steps, guidance {guidance:g}": scores} if who == "teacher" else {})
            bar.write(f"step {state['step']}: {who if who == 'teacher' else 'student'}, {steps} steps, guidance {guidance:g}: "
                      + ", ".join(f"{k} {v:.2f}" for k, v in scores.items()))
            state["scores"] = scores

def sheet(args, path):
    """Contact sheet. Rows: teacher, 20 guided steps; teacher, 4 plain steps; student, 4 plain steps. One prompt and seed a column."""
    prompts = [sample.held_out(task, 2, *args.home)[k][2] for task in data.TASKS for k in range(2)]
    for name, who, steps, guidance in (("guided", "teacher", sample.STEPS, args.guidance), ("plain", "teacher", STEPS, 1.0),
                                       ("student", "ema", STEPS, 1.0)):
        if who == "ema" or name not in args.rows:                                  # the teacher's do not change
            model = train.averaged_model(args, act(args, who))
            args.rows[name] = args.rank == 0 and sample.generate(
                prompts, (model, args.vae, args.encoder), height=args.home[0], width=args.home[1], steps=steps, guidance=guidance)
    if args.rank == 0:
        lens.replace_file(path, lambda new: data.contact_sheet(sum(args.rows.values(), []), len(prompts)).save(new, "PNG"))

# ---------------------------------------------------------------------------------------------------------------------
# The loop.

def mean_over_ranks(args, row):
    """The log's numbers, each rank's as one."""
    values = torch.tensor(list(row.values()), dtype=torch.float64, device="cpu" if args.device == "cpu" else args.device)
    dist.all_reduce(values) if args.ranks > 1 else None
    return dict(zip(row, (values / args.ranks).tolist()))

def distill(args):
    out, how, config = Path(args.out), args.how, lens.SIZES[args.size].transformer
    folder = lens.fetch(args.teacher, ("transformer", "vae", "text_encoder"))
    args.parts, args.words = str(folder), lens.read_metadata(folder).get("words", "[]")
    _, args.vae, args.encoder = lens.load_pipeline(folder, args.device, None if args.size == "full" else torch.float32,
                                                   parts=("vae", "text_encoder"))
    dtype, why = train.same_everywhere(sample.pick_dtype(args.device.split(":")[0], None, config.inner_dim))
    base = lens.load_pipeline(folder, "cpu" if args.fsdp else args.device, torch.float32, parts=("transformer",))[0]
    lens.require(base.config == config, f"--teacher {args.teacher}: its weights are not of size {args.size}")
    make_nets(args, base, dtype)
    args.heads, args.rows = make_heads(config, args.seed).to(args.device), {}
    rates = {"student": args.lr, "fake": args.lr * how.fake_lr / how.stage.lr, "heads": how.heads_lr}
    optimizers = make_optimizers(args, rates)
    state = resume(args, optimizers)
    for who, optimizer in optimizers.items():
        optimizer.param_groups[0]["lr"] = rates[who]
    # a resumed run keeps to what it began with
    state["bf16"] = dtype == torch.bfloat16 if state["bf16"] is None else state["bf16"]
    kernel = train.pick_attention(args, dtype, how.stage.home, state)
    args.bf16, log, notice = state["bf16"], train.Log(out, state["step"]) if args.rank == 0 else None, train.on_notice()
    count = sum(p.numel() for p in args.trained["student"].values())
    args.say(f"{args.size}: {'LoRA of rank ' + str(args.lora) if args.lora else 'all weights'}, "
             f"{count:,} parameters each in student and fake, {sum(p.numel() for p in args.heads.parameters()):,} in the heads, "
             f"on {args.ranks} x {args.device}; fp32 weights, {'bf16' if args.bf16 else 'fp32'} compute: {why}; {kernel}\n"
             f"without: {', '.join(sorted(args.without)) or 'nothing'}; guidance {args.guidance:g}")
    if args.rank > 0:
        # rank 0 draws the world, or indexes the shards; the others then read what it wrote
        dist.barrier()
    captions = args.data and not args.data.endswith(".tar")
    source = (Captions(args, how.stage) if captions else train.Pictures(args, how.stage) if args.data else
              train.World(how.stage, args.seed, args.vae, args.encoder, out / "world.safetensors", args.device))
    if args.rank == 0 and args.ranks > 1:
        dist.barrier()
    batches = updates(args, source, how.stage, state["step"] * (CRITIC + 1), args.steps * (CRITIC + 1))
    bar = tqdm(total=args.steps, initial=state["step"], desc="distillation", unit="step", mininterval=2, disable=args.rank > 0)
    begin = time.perf_counter()
    for number, ((bucket, samples, _), found) in enumerate(zip(batches, source.stream(batches)), state["step"] * (CRITIC + 1)):
        batch, turn = get_batch(args, source, number, bucket, samples, found), number % (CRITIC + 1)
        if turn < CRITIC:
            critic = critic_update(args, batch, optimizers)
            continue
        # The fake catches up with a student that comes to rest; at a constant rate the toy's pictures grew noisy after a hundred steps.
        factor = train.schedule(state["step"], args.steps, 1) if how.stage.decay else 1.0
        optimizers["student"].param_groups[0]["lr"] = rates["student"] * factor
        row = mean_over_ranks(args, {**student_update(args, batch, optimizers), **critic, "notice": len(notice)})
        state["step"] += 1
        follow(args.trained["ema"].values(), args.trained["student"].values(),
               1 - min(how.average, (1 + state["step"]) / (10 + state["step"])))
        state["seconds"] += time.perf_counter() - begin
        stop, due = row.pop("notice") > 0, lambda every: every and (state["step"] % every == 0 or state["step"] == args.steps)
        if due(args.eval_every) and not args.data:
            evaluate(args, state, bar)
            row.update(state["scores"])
        if due(args.preview_every):
            sheet(args, out / f"preview-{state['step']:05d}.png")
        if log:
            log(step=state["step"], **{name: round(v, 6) if math.isfinite(v) else None for name, v in row.items()}, k=batch.k,
                size="{1}x{0}".format(*source.sizes[bucket]), seconds=round(state["seconds"], 2))
        if due(args.save_every) or stop:
            save(args, optimizers, state)
        bar.update()
        bar.set_postfix_str(f"dm {row['dm']:.2f}, ca {row['ca']:.2f}, fake {row['fake_loss']:.3f}")
        if stop:
            bar.close()
            args.say(f"SIGTERM: saved {out} at step {state['step']}; the same command goes on from there")
            sys.exit(0)
        begin = time.perf_counter()
    bar.close()
    args.say(f"done: python sample.py --eval --weights {out}")

@torch.no_grad()
def export(args):
    """The student of --out as a LoRA over its teacher, of rank --lora and in bf16, to ship: of the toy's 0.80, 0.24 MB at rank 3 keep 0.78.
    Each matrix's change becomes the nearest of that rank. Layers that see the time alone are fitted to what the student's give over all
    t instead, by least squares: so their biases and the time embedding, where a LoRA has no place, go into it. Left out, they cost
    another student at rank 4 a tenth (0.69 instead of 0.78)."""
    teacher, vae, encoder = lens.load_pipeline(args.teacher, args.device, torch.float32)
    student, notes = lens.load_pipeline(args.out, args.device, torch.float32, parts=("transformer",))[0], lens.read_metadata(args.out)
    lens.require(student.config == teacher.config, f"--out {args.out}: not a student of --teacher {args.teacher}")
    linear = [name for name, layer in teacher.named_modules() if isinstance(layer, nn.Linear) and "time" not in name]
    lens.add_lora(teacher, args.lora, args.lora, linear, "export")
    times = torch.linspace(MARGIN, 1, 256, device=args.device)
    before, after = (F.silu(model.time(times)).double() for model in (teacher, student))       # [T, W]: what the timed layers are given
    gram = before.T @ before                               # [W, W], nearly singular, since all times look alike: hence the ridge
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    solve = torch.linalg.solve(gram + ridge, before.T)     # [W, T]: what a layer should give -> the weights that come nearest
    for name, layer in lens.lora_layers(teacher, "export").items():
        new = student.get_submodule(name)
        if "_mod." in name or "norm_out" in name:
            change = after @ new.weight.double().T + new.bias - before @ layer.weight.double().T - layer.bias      # [T, out]
            fit = solve @ change                                                               # [W, out]
            b = torch.linalg.svd((before @ fit).T, full_matrices=False)[0][:, :args.lora]      # [out, r]
            a = b.T @ fit.T                                                                    # [r, W]
        else:
            u, s, v = torch.linalg.svd((new.weight - layer.weight).double(), full_matrices=False)
            b, a = u[:, :args.lora] * s[:args.lora].sqrt(), s[:args.lora, None].sqrt() * v[:args.lora]
        layer.lora_A["export"].data, layer.lora_B["export"].data = a.bfloat16(), b.bfloat16()
    if args.size in ("nano", "toy"):
        notes["score"] = json.dumps(sample.evaluate((teacher, vae, encoder), *args.home, STEPS, 1.0)[0])
    lens.save_lora(teacher, args.export, "export", notes)
    lens.save_pipeline(args.export, metadata=notes, base=os.path.relpath(lens.fetch(args.teacher, ("transformer",)), args.export))
    print(f"wrote {args.export}: {notes['score']}")

def fixed_bytes(base, learnt, heads):
    """What there is beside activations, in fp32: the teacher; of student and fake weights and two moments; the student's average; a
    gradient, of one at a time; the heads'. base, learnt, heads: numbers of parameters."""
    return 4 * base + (12 + 12 + 4 + 4) * learnt + 16 * heads

def dry_run(args):
    """Memory a device and work a step, by mode and area; counted on the meta device, no weight is made."""
    config, gib, again, gan = lens.SIZES[args.size].transformer, 2**30, args.size == "full", "gan" not in args.without
    with torch.device("meta"):
        model, lora = lens.LensTransformer(config), lens.LensTransformer(config)
    lens.add_lora(lora, rank := args.lora or 64, rank, LORA_TARGETS, "student")
    base, adapter = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in lens.lora_parameters(lora, "student"))
    heads = gan * sum(p.numel() for p in make_heads(config, 0).parameters())
    measured = args.device != "cpu" or not again           # a CPU tells nothing of the machine that the full size needs
    peak = train.matmul_peak(args.device, torch.bfloat16) if measured else 7e14
    print(f"{args.size}: {base:,} parameters, adapter {adapter:,}, heads {heads:,}; "
          f"128 text tokens, activations {'computed again' if again else 'kept'}\n"
          f"seconds are those of 40% of {peak / 1e12:.2f} TFLOP/s, "
          f"{'a large product as measured on this ' + args.device if measured else 'assumed of an H100'}\n"
          f"{'pictures a device':>18} {'mode':>12} {'weights GiB':>12} {'activations':>12} "
          f"{'one GPU':>8} {'FSDP on 8':>10} {'TFLOP a step':>13} {'seconds':>8}")
    for area, count in args.how.stage.batch.items():
        # The student's graph waits while the heads' gradient goes through the teacher: two sets of activations.
        kept = (1 + gan) * train.activations(config, "full" if again else "none", count, (area // 16, area // 16), 128)
        for mode, learnt in (("all weights", base), (f"LoRA {rank}", adapter)):
            fixed, whole = fixed_bytes(base, learnt, heads), learnt == base
            # in forwards: there, back, there again; steps simulated, on average
            learn, simulated = (3 if whole else 2) + again, (STEPS - 1) / 2
            forwards = CRITIC * (simulated + 1 + learn + gan * (2 + 2 * R1_SHARE)) + simulated + learn + 4 + gan * (2 + again)
            work = forwards * count * train.flops(model, (area // 16) ** 2, 128) / 3
            print(f"{count:4} of {area:4} x {area:<4} {mode:>12} {fixed / gib:12.2f} {kept / gib:12.2f} {(fixed + kept) / gib:8.2f} "
                  f"{f'{(fixed / 8 + kept) / gib:.2f}' if whole else '-':>10} {work / 1e12:13.2f} {work / peak / 0.4:8.1f}")

def main(argv=None):
    parser = argparse.ArgumentParser(description="Distil a teacher of 20 guided steps into a student of 4 plain ones. "
                                                 "The same command again resumes.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=__doc__[__doc__.index("    python distill.py --out"):__doc__.index("The story")])
    parser.error = sample.complain
    parser.add_argument("--size", default="toy", help="one of " + ", ".join(lens.SIZES))
    parser.add_argument("--teacher", "--init", default=str(sample.TOY), metavar="DIR",
                        help="the model to distil, where student and fake start too: a folder or hub id (default: weights/toy)")
    parser.add_argument("--out", default="runs/turbo", metavar="DIR", help="the student, its state, metrics.jsonl, contact sheets")
    parser.add_argument("--data", metavar="GLOB",
                        help="tar shards of `data.py pack`, or with --no-gan a file of captions (default: the toy world)")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK",
                        help="student and fake are adapters on the teacher, instead of whole models")
    parser.add_argument("--no-gan", action="store_true", help="no discriminator: captions alone suffice")
    parser.add_argument("--without", action="append", default=[], choices=("ca", "dm", "gan", "ida"),
                        help="leave this out, to see what it does; may be given more than once")
    parser.add_argument("--guidance", type=float, help="the teacher's, to be distilled (default: what the size says)")
    parser.add_argument("--lr", type=float, help="the student's; the fake's keeps its ratio to it (default: what the size says)")
    parser.add_argument("--fsdp", action="store_true", help="under torchrun: weights and moments are shared out over the ranks")
    parser.add_argument("--dry-run", action="store_true", help="train nothing: print memory and work of a step, by mode")
    parser.add_argument("--export", metavar="DIR",
                        help="train nothing: write the student of --out there, as a LoRA of rank --lora over --teacher")
    parser.add_argument("--steps", type=int, help="of the student (default: what the size says)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu or cuda (default: CUDA if there is one)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--save-every", type=int, default=50, metavar="N", help="steps")
    parser.add_argument("--eval-every", type=int, default=100, metavar="N", help="steps; the toy's six tasks, 20 prompts each; 0: never")
    parser.add_argument("--preview-every", type=int, default=100, metavar="N", help="steps; 0: never")
    args = parser.parse_args(argv)
    lens.require(args.size in lens.SIZES, f"unknown size '{args.size}': choose one of {', '.join(lens.SIZES)}")
    args.how, args.without = SETTINGS.get(args.size, SETTINGS["full"]), set(args.without) | ({"gan"} if args.no_gan else set())
    args.steps, args.guidance = (args.how.stage.steps if args.steps is None else args.steps,
                                 args.how.guidance if args.guidance is None else args.guidance)
    args.lr, args.home, args.workers = (args.lr or args.how.stage.lr * (LORA_LR if args.lora else 1),
                                        data.bucket(args.how.stage.home), 4)
    lens.require(min(args.steps, args.save_every) > 0 and min(args.lora, args.eval_every, args.preview_every) >= 0,
                 "--steps and --save-every must be at least 1, --lora, --eval-every and --preview-every not below 0")
    lens.require(args.guidance > 1 or "ca" in args.without,
                 f"--guidance {args.guidance:g}: there is guidance to distil above 1 only (or --without ca)")
    lens.require(not {"ca", "dm", "gan"} <= args.without, "--without: one of ca, dm and gan must stay, or nothing moves the student")
    args.device = sample.pick_device(args.device)
    if args.dry_run:
        return dry_run(args)
    if args.export:
        lens.require(args.lora, "--export: name the adapter's rank with --lora")
        return export(args)
    lens.require(args.data or args.size in ("nano", "toy"),
                 f"--size {args.size}: name shards or captions with --data; the toy world is for --size toy or nano")
    lens.require(not args.data or glob.glob(args.data), f"--data {args.data}: no file matches")
    lens.require(not args.data or args.data.endswith(".tar") or "gan" in args.without,
                 f"--data {args.data}: captions alone suffice with --no-gan only; "
                 "the discriminator needs real pictures, in tar shards of `data.py pack`")
    args.rank, args.ranks, args.device = train.join(args.device)
    lens.require(args.ranks > 1 or not args.fsdp,
                 "--fsdp shares weights among processes: start it with torchrun --nproc-per-node N distill.py ...")
    lens.require(not (args.fsdp and args.lora),
                 "--fsdp is for whole weights; adapters are small: leave it out, each process then holds the base")
    args.say = print if args.rank == 0 else lambda *_: None
    args.key = [str(args.teacher), args.seed, str(args.data), args.lora, args.guidance, args.lr, sorted(args.without)]
    sample.check_writable(args.out) if args.rank == 0 else None
    distill(args)

if __name__ == "__main__":
    sample.run(main)
