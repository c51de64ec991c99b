"""From a request to a PNG: encode the prompt, denoise, decode, write; and the evaluation.

Read before: lens.py and vae.py; for --reason reason.py; for --eval toy/world.py, toy/checker.py.
Assumes:     weights in a layout that kit/checkpoint.py reads. Without --weights it takes the toy
             that the repository ships, which runs on any laptop in seconds.

    python sample.py --prompt "a red circle to the left of a blue square"
    python sample.py --prompt "..." --num 4 --seed 7 --steps 50 --aspect 16:9
    python sample.py --prompt "..." --image photo.png --strength 0.6     # start from a picture
    python sample.py --prompt "..." --out picture.webp                   # .png, .jpg or .webp
    python sample.py --prompts-file prompts.txt --out pictures/          # or GenEval's JSON lines
    python sample.py --prompt "..." --weights DIR_OR_REPO --base 1440    # the released model, or
    python sample.py --prompt "..." --weights lens_bf16.safetensors --vae flux2-vae.safetensors \
        --text-encoder openai/gpt-oss-20b                                # its parts, one by one
    python sample.py --prompt "a trio of golden hoops" --reason          # a model rewrites it first
    python sample.py --eval                                              # the six tasks of the toy

The sampler is `denoise`: Euler's method, and under guidance two velocities a step, with the prompt
and without it (`guide`). Prompts of unequal length never share a batch: nothing is padded, so no
attention needs a mask, and but for rounding a picture is the same whatever was made beside it.
Pictures are written as they are made, and what was made is not made again: the same command goes on
where it was stopped.
"""
import functools
import hashlib
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import lens
import reason
from kit.chat import Endpoint
from kit.checkpoint import check_fit, load_pipeline, read_denoiser_config
from kit.features import CACHE_BYTES, cached_features, default_cache, feature_key
from kit.files import (
    Parser,
    check_writable,
    error_context,
    positive,
    quoted,
    read_prompts,
    read_text,
    require,
    run_command,
    seed_number,
    user_path,
    utf8_text,
    write_json_lines,
)
from kit.fp8 import to_fp8
from kit.images import (
    contact_sheet,
    cover,
    enlarged,
    from_pil,
    read_picture,
    to_pil,
    to_rgb,
)
from kit.lora import lora_file, merge_lora
from kit.outputs import metadata_of, names_a_picture, plan_jobs, save_new, save_sheets
from kit.places import (
    PARTS,
    Places,
    adapters_of,
    add_part_flags,
    check_parts,
    fetch_lora,
    fetch_places,
    gather,
    identity,
    locate,
    read_metadata,
    settings_of_adapter,
    trained_over,
)
from kit.run import compile_blocks, pick_attention, pick_device, pick_dtype, use_attention
from toy import language
from toy.checker import (
    DRAWN,
    first_failures,
    held_out_rows,
    round_trip,
    score,
    token_diversity,
)

TOY = data.TOY
STEPS = 20               # [checkpoint] where weights do not say otherwise
GUIDANCE = 5.0           # [checkpoint]
BASE = 1024              # [checkpoint] pictures of 1024 x 1024
PER_TASK = 50            # [ours] prompts of --eval
TOY_BASE = 128           # [ours] the toy's own size
MAX_AREA = 1440**2       # [paper] works too, though training ends at 1024 x 1024
USUAL_TEXT = 128         # text tokens of a usual caption, about: the paper's have 109 words
STRENGTH = 0.7           # [ours] the share of the steps that is run on a picture of --image
BATCH = 16               # pictures that are made, and then written, at a time


# --- The sampler ----------------------------------------------------------------------------------

@torch.no_grad()
def denoise(model, noise, text, text_mask, grid, steps, guidance=1.0, negative=None, on_step=None,
            start=0, share_tokens=None):
    """Euler's method on dx/dt = v(x, t), from noise at t = 1 to data at t = 0. [paper]

    noise         [B, N, C] fp32, N = h * w; with a `start` above 0 the state at that level
    text          K x [B, S, E]; None: no text at all
    text_mask     [B, S] bool; None: every token is visible
    grid          (h, w) tokens;  steps: of the whole way;  start: the first of them that is run
    guidance      1.0: none, and one forward a step
    negative      features of a negative prompt, as `text`; None: that branch sees no text at all
    on_step       called as on_step(i, x, v) after step i
    share_tokens  see `share_limit`; None: what it says of the device
    Returns tokens [B, N, C] fp32.
    """
    B, N, _ = noise.shape
    if share_tokens is None:
        share_tokens = share_limit(noise.device)
    levels = lens.sigmas(N, steps).to(noise.device)                                # [steps + 1]
    velocity = GuidedVelocity(model, text, text_mask, negative, grid, levels, guidance,
                              share=B * N <= share_tokens)

    x = noise.float()                              # bf16 would round away parts of small steps
    for i in range(start, steps):
        v = velocity(x, i)                                                         # [B, N, C]
        x = lens.euler_step(x, v, levels[i], levels[i + 1])
        if on_step:
            on_step(i, x, v)
    return x


def share_limit(device):
    """The most image tokens in a batch for which guidance's two branches share a forward. [ours]

    To share halves the calls, and every weight is read once. At full size, compiled, on an H200 a
    picture of 512 x 512 (1024 tokens) took 1.0 s instead of 1.7; at 1024 x 1024 nothing changed.
    """
    return 512 if torch.device(device).type == "cpu" else 2048


class GuidedVelocity:
    """v(x, t_i) under guidance. What does not depend on x is made once, here: the projected text,
    the rotary angles, and the modulation of every block at every step (a third of the weights).

    share: run both branches in one forward, where they differ in the text alone. Then x stands
    twice in the batch, and the text of `cond` is seen by the first half alone (see lens.Context).
    """

    def __init__(self, model, text, text_mask, negative, grid, levels, guidance, share):
        self.model = model
        self.guidance = guidance
        self.dtype = model.proj_out.weight.dtype
        self.modulation = model.modulation(levels[:-1])
        self.cond = model.prepare(text, text_mask, grid)
        self.uncond = None
        # One forward holds one text: that of `cond`. So the other branch must have none.
        self.share_forward = share and text is not None and negative is None
        if guidance != 1.0 and not self.share_forward:
            self.uncond = model.prepare(negative, None, grid)

    def __call__(self, x, i):
        """x [B, N, C] fp32 at level i -> velocity [B, N, C] fp32."""
        modulation = self.modulation.at(i)
        if self.guidance == 1.0:
            return self.velocity(x, modulation, self.cond)
        if self.share_forward:
            both = self.velocity(torch.cat([x, x]), modulation, self.cond)         # [2B, N, C]
            cond, uncond = both.chunk(2)
        else:
            cond = self.velocity(x, modulation, self.cond)
            uncond = self.velocity(x, modulation, self.uncond)
        return guide(cond, uncond, self.guidance)

    def velocity(self, x, modulation, context):
        return self.model.velocity_from(x.to(self.dtype), modulation, context).float()


def guide(cond, uncond, guidance):
    """u + g (c - u), each token then scaled to the length of c: [B, N, C]. [checkpoint]

    c, u, g: the velocity with the prompt (cond), without it (uncond), and the guidance. Without the
    scaling guided velocities are too long, tokens leave the range of data, and colours burn out.
    """
    guided = uncond + guidance * (cond - uncond)
    length = guided.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return guided * (cond.norm(dim=-1, keepdim=True) / length)


# --- From prompts to pictures ---------------------------------------------------------------------

@torch.no_grad()
def generate(prompts, pipeline=None, weights=TOY, seed=0, seeds=None, height=None, width=None,
             steps=None, guidance=None, negative="", features=None, images=None, strength=1.0,
             batch_size=BATCH, on_step=None, progress=False):
    """One PIL image a prompt, in order.

    pipeline    (transformer, vae, text encoder or None), already loaded; else `weights` is loaded
    height, width, steps, guidance   None: the defaults above; or, where `weights` is loaded here,
                what is noted in its files
    seeds       one a picture (default: seed, seed + 1, ...); the same seed gives the same picture
                in any batch
    negative    a negative prompt;  on_step: see `denoise`
    features    what encoder.encode_each gave for prompts + [negative]
    images      one PIL image a prompt to start from; what the size has no room for is cut off
    strength    the share of the steps that is run on `images`, which are noised to the level where
                these steps begin (1: all steps, from noise alone)
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    require(0 < strength <= 1, f"strength {strength}: must be above 0 and at most 1")
    notes = {}                                     # {"steps", "guidance", "base", "words"} as text
    if pipeline is None:
        places = fetch_places(gather(weights))
        notes = read_metadata(places.transformer)
        device = pick_device()
        pipeline = load_pipeline(places, device, pick_dtype(device)[0])
    transformer, vae, encoder = pipeline
    device = transformer.proj_out.weight.device
    channels = transformer.config.in_channels

    steps, guidance = sampler_settings(notes, steps, guidance)
    base = usual_base(notes, channels)
    height, width = height or width or base, width or height or base
    require(height % 16 == 0 and width % 16 == 0,
            f"size {width} x {height}: both sides must be divisible by 16")
    grid = data.grid_of((height, width))
    if seeds is None:
        seeds = [seed + i for i in range(len(prompts))]
    if features is None:
        features = encoder.encode_each(prompts + [negative])
    *features, negative_features = features

    start = first_step(steps, strength) if images else 0
    batches = batches_of_one_length(features, batch_size)
    bar = tqdm(total=len(batches) * (steps - start), desc="denoise", unit="step",
               disable=not progress, leave=False)

    def after_step(i, x, v):
        bar.update()
        if on_step:
            on_step(i, x, v)

    pictures = [None] * len(prompts)
    for batch in batches:
        noise = torch.cat([picture_noise(seeds[i], grid, channels) for i in batch]).to(device)
        if images:
            begin = [cover(to_rgb(images[i]), (height, width)) for i in batch]
            level = lens.sigmas(noise.shape[1], steps)[start].item()
            noise = lens.add_noise(to_tokens(vae, begin), noise, level)

        text, negative_text = None, None      # no text at all
        if features[batch[0]] is not None:         # then none of the batch is: all are as long
            text = list(torch.stack([features[i] for i in batch], 1).to(device))   # K x [B, S, E]
        if negative_features is not None:
            negative_text = [layer.expand(len(batch), -1, -1)
                             for layer in negative_features.to(device)]            # K x [B, S, E]

        tokens = denoise(transformer, noise, text, None, grid, steps, guidance, negative_text,
                         on_step=after_step, start=start)                          # [B, N, C]
        for i, picture in zip(batch, to_pictures(vae, tokens, grid)):
            pictures[i] = picture
    bar.close()
    return pictures


def first_step(steps, strength):
    """Where the last `strength` of the steps begins: at least one of them is run."""
    return steps - max(1, round(steps * strength))


def picture_noise(seed, grid, channels):
    """[1, h*w, C] noise of one picture, from its own seed alone, made on the CPU: the same on every
    device and in every batch."""
    generator = torch.Generator().manual_seed(int(seed))
    return torch.randn((1, grid[0] * grid[1], channels), generator=generator)


def to_pictures(vae, tokens, grid):
    """Tokens [B, h*w, C] -> B PIL images."""
    latent = vae.to_latent(tokens, grid)
    return to_pil(vae.decode(latent.to(next(vae.parameters()).dtype)))


def to_tokens(vae, pictures):
    """PIL images of one size -> tokens [B, h*w, C] fp32: the mean of their posterior."""
    first = next(vae.parameters())
    mean, _ = vae.encode(from_pil(pictures).to(first.device, first.dtype))
    return vae.to_tokens(mean).float()


def batches_of_one_length(features, batch_size):
    """[[index]]: prompts whose features are equally long (0: no text) share a batch."""
    groups = {}
    for i, own in enumerate(features):
        length = 0 if own is None else own.shape[1]
        groups.setdefault(length, []).append(i)
    batches = []
    for members in groups.values():
        batches += [members[k:k + batch_size] for k in range(0, len(members), batch_size)]
    return batches


def sampler_settings(notes, steps=None, guidance=None):
    """(steps, guidance): as asked, else what the weights' notes say, else the defaults."""
    if steps is None:
        steps = int(notes.get("steps", STEPS))
    if guidance is None:
        guidance = float(notes.get("guidance", GUIDANCE))
    return steps, guidance


def usual_base(notes, channels):
    """Side in pixels of a usual picture: what the weights' notes say, else by the channels of a
    token: the released model has 128, the toy fewer."""
    default = BASE if channels >= 128 else TOY_BASE
    return int(notes.get("base", default))


# --- Evaluation on the toy world ------------------------------------------------------------------

@torch.no_grad()
def evaluate(pipeline, height, width, steps, guidance, per_task=50, seed=0, style="dense",
             rewrite=None, progress=True, diversity=False):
    """-> (scores, pictures, prompts) of held-out prompts, `per_task` for each of the six tasks.

    scores     each task's share of prompts all of whose facts hold, `overall` (their mean), and
               measures of the pictures beside the facts, see toy.checker.score
    style      how the scenes are asked for: dense, brief or vague
    rewrite    [prompt] -> [prompt], the reasoner
    diversity  adds `diversity`, see `measure_diversity`
    """
    rows = held_out_rows(per_task, height, width, style)
    prompts = [row.prompt for row in rows]
    asked = rewrite(prompts) if rewrite else prompts
    pictures = generate(asked, pipeline, seed=seed, height=height, width=width, steps=steps,
                        guidance=guidance, batch_size=32, progress=progress)
    _, vae, _ = pipeline
    scores = score(pictures, rows, vae)            # fidelity is measured on the vae's tokens
    if diversity:
        scores["diversity"] = measure_diversity(pipeline, height, width, steps, guidance, progress)
    return scores, pictures, prompts


def measure_diversity(pipeline, height, width, steps, guidance, progress=False):
    """Root mean square distance between the pictures of one prompt, per token channel: the mean
    over 12 held-out prompts, four seeds each. A model that makes good pictures, but always the same
    ones, scores low here."""
    transformer, _, encoder = pipeline
    device, channels = transformer.proj_out.weight.device, transformer.config.in_channels
    grid = data.grid_of((height, width))
    prompts = [row.prompt for row in held_out_rows(2, height, width)]
    noise = torch.cat([picture_noise(seed, grid, channels) for seed in range(4)]).to(device)
    distances = []
    features = encoder.encode_each(prompts)
    for own in tqdm(features, "diversity", unit="prompt", leave=False, disable=not progress):
        text = list(own[:, None].expand(-1, 4, -1, -1).to(device))                 # K x [4, S, E]
        tokens = denoise(transformer, noise, text, None, grid, steps, guidance)
        distances.append(token_diversity(tokens))
    return round(float(np.mean(distances)), 4)


# --- Sizes, prompts, words ------------------------------------------------------------------------

def pick_size(height, width, aspect, base):
    """(height, width) in pixels from what was asked for: a height or a width, else aspect and base.
    LensError unless both sides are divisible by 16, the ratio lies within 1:2 and 2:1, and the area
    is at most 1440^2, or the size is in the released model's table of that base."""
    if height or width:
        height, width = height or width, width or height           # one side alone: a square
    else:
        with error_context("--aspect"):
            height, width = data.bucket(base, aspect or "1:1")

    name = f"size {width} x {height}"
    near = f"{max(16, width // 16 * 16)} x {max(16, height // 16 * 16)}"
    require(min(height, width) > 0 and height % 16 == 0 and width % 16 == 0,
            f"{name}: both sides must be positive and divisible by 16 (say {near})")
    short, long = sorted((height, width))
    require(long <= 2 * short, f"{name}: the ratio must lie between 1:2 and 2:1")
    # Two sizes of the checkpoint's own table, 1040 x 2080 and 1088 x 1936, are a little above.
    require(height * width <= MAX_AREA or (short, long) in data.PAPER_BUCKETS[1440],
            f"{name}: the area is above 1440 x 1440, the largest that the model was tried at")
    return height, width


def warn_of_size(height, width, home):
    """Warns where a picture is far from the weights' home size, `home` pixels a side. The toy's
    pictures of 96 to 192 pixels are as good as those of 128; at 256 one of six is right, at 48
    none."""
    if not home / 2 <= math.sqrt(height * width) <= 1.5 * home:
        print(f"warning: these weights draw {home} x {home} pixels; of {width} x {height} expect "
              f"noise, or objects that are cut or repeated (--base {home} is the usual size)",
              file=sys.stderr)


def warn_of_base(lora, trained, weights):
    """Warns where a LoRA is merged into other weights than it was trained over.

    trained   the files of those, as far as they are known;  weights: where the denoiser is
    """
    def sizes(files):
        return [(file.name, file.stat().st_size) for file in files]

    files, _ = locate(weights, "transformer")
    if trained is not None and sizes(trained) != sizes(files):
        print(f"warning: --lora {lora} was trained over {trained[0]}, not over {files[0]}: what it "
              "does to other weights is anybody's guess", file=sys.stderr)


def make_reasoner(notes, encoder=None, system_prompt=None, endpoint=None, model="default",
                  journal=None, seed=0):
    """The reasoner that the flags ask for: -> reason.Reasoner.

    notes          of the weights. Those that say which words they know are the toy's; then each
                   answer is checked word by word (toy.language.keeps)
    encoder        writes where no `endpoint` is named
    system_prompt  a file (default: the project's own words);  journal: of an endpoint's answers
    """
    toy = "words" in notes
    system = language.TOY_SYSTEM if toy else reason.SYSTEM
    if system_prompt:
        with error_context(f"--system-prompt {system_prompt}"):
            system = read_text(system_prompt).strip()
    if endpoint:
        writes = reason.endpoint_writer(Endpoint(endpoint, model, journal))
    else:
        require(language.can_rewrite(encoder), "the text encoder of these weights has read "
                "captions alone and cannot rewrite: leave out --reason, or name a model with "
                "--endpoint")
        writes = functools.partial(reason.encoder_writes, encoder)
    return reason.Reasoner(writes, system, seed, language.keeps if toy else None)


# --- The command line -----------------------------------------------------------------------------

@dataclass(frozen=True)
class Weights:
    """Which weights, and how they are loaded. The text encoder comes apart from the rest, so that
    a card needs to hold only the larger of the two."""
    places: Places            # of each part, on this machine
    device: str
    dtype: torch.dtype
    date: str                 # for the chat around the prompt
    lora: str | None          # as it was asked for
    lora_strength: float
    compiled: bool
    fp8: bool
    lora_path: Path | None    # merged into the denoiser, times lora_strength

    def text_encoder(self):
        _, _, encoder = load_pipeline(self.places, self.device, self.dtype,
                                      parts=("text_encoder",), date=self.date)
        return encoder

    def denoiser_and_vae(self):
        transformer, vae, _ = load_pipeline(self.places, self.device, self.dtype,
                                            parts=("transformer", "vae"))
        if self.lora:
            count = merge_lora(transformer, self.lora_path, self.lora_strength)
            print(f"LoRA: {count} layers changed")
        if self.fp8:
            to_fp8(transformer)
        if self.compiled:
            compile_blocks(transformer, vae, graphs=self.device != "cpu")
        return transformer, vae

    def fingerprint(self):
        """16 hex digits of all that a picture depends on here: the text encoder with what is around
        the prompt, and the names, sizes and dates of the other files."""
        files = [*locate(self.places.transformer, "transformer")[0],
                 *adapters_of(self.places.transformer), *locate(self.places.vae, "vae")[0]]
        if self.lora:
            files.append(lora_file(self.lora_path))
        parts = [feature_key(self.places, self.dtype, self.date)]
        for file in files:
            status = file.stat()
            parts.append((file.name, status.st_size, status.st_mtime_ns))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def notes(self):
        """What a picture says of the weights that made it."""
        precision = str(self.dtype).removeprefix("torch.")
        if self.fp8:
            precision += " and fp8"
        lora = f"{self.lora} x {self.lora_strength}" if self.lora else ""
        return {
            "weights": identity(self.places.transformer),          # its name and a hash
            "lora": lora,
            "precision": precision,
            "date": self.date,
            "made_from": self.fingerprint(),
            "software": "Lens",
        }


@dataclass(frozen=True)
class Sampling:
    """How a picture is drawn."""
    height: int
    width: int
    steps: int
    guidance: float
    seed: int                 # of the first picture; the next have seed + 1, ...

    def notes(self):
        """What a picture says of it; its seed is its own."""
        return {"steps": self.steps, "guidance": self.guidance,
                "size": f"{self.width}x{self.height}"}


def evaluate_command(weights, sampling, out, per_task, style, make_reasoner=None):
    """--eval: the table of the six tasks, a contact sheet with ticks and crosses; the last line is
    JSON.

    make_reasoner   text encoder -> reason.Reasoner; None: prompts stay as they are
    """
    transformer, vae = weights.denoiser_and_vae()
    encoder = weights.text_encoder()
    ceiling = round_trip(vae, weights.device, 200)
    print(f"a perfect denoiser would score {ceiling:.3f}: that share of drawn scenes keeps every "
          "fact when the autoencoder encodes and decodes them, over all training sizes")

    rewrite = None
    if make_reasoner:
        rewrite = make_reasoner(encoder).rewrite
    begin = time.perf_counter()
    scores, pictures, _ = evaluate(
        (transformer, vae, encoder), sampling.height, sampling.width, steps=sampling.steps,
        guidance=sampling.guidance, per_task=per_task, seed=sampling.seed, style=style,
        rewrite=rewrite)
    seconds = time.perf_counter() - begin

    how = f"{style} prompts a task" + (", rewritten" if rewrite else "")
    about_eight_a_task = slice(None, None, max(1, per_task // 8))
    shown = pictures[about_eight_a_task]
    rows = held_out_rows(per_task, sampling.height, sampling.width, style)[about_eight_a_task]
    failures = first_failures(shown, rows)
    below = [f"not so: {failure}" if failure else row.prompt
             for failure, row in zip(failures, rows)]
    sheet = contact_sheet(shown, 12, captions=below, right=[not failure for failure in failures])
    notes = {"prompts": f"{per_task} held-out {how}", "seed": sampling.seed,
             "score": json.dumps(scores), **sampling.notes(), **weights.notes()}
    path = save_new(sheet, out / "eval.png", notes)
    print(f"\n{'task':14} score   ({notes['prompts']}, {seconds:.0f} s)")
    for name, value in scores.items():
        drawn = f"   (drawn pictures: {DRAWN[name]:.2f})" if name in DRAWN else ""
        print(f"{name:14} {value:.3f}{drawn}")
    print(f"{len(shown)} of the pictures are in {path}, each with its prompt, or with the first "
          "fact that does not hold")
    print(json.dumps(scores))


def pictures_command(weights, sampling, out, requests, rows=None, num=1, negative="", image=None,
                     strength=STRENGTH, scale=1, cache="", make_reasoner=None, endpoint_model=None):
    """Pictures of `requests`, `num` each, as files. What is there already, made from the same, is
    not made again.

    out             their folder; or a file, see `names_a_picture`
    requests        prompts as the user gave them;  rows: GenEval's metadata, one for each, or None
    make_reasoner   text encoder or None -> reason.Reasoner; None: requests are the prompts
    scale           each pixel is written so many times across and down
    endpoint_model  the model that rewrites at an endpoint; None: the text encoder rewrites
    """
    known = set(json.loads(read_metadata(weights.places.transformer).get("words", "[]")))
    (negative, *requests), changes = language.respelled([negative, *requests], known)
    prompts, encoder = requests, None
    common = {"negative": negative, **sampling.notes(), **weights.notes()}
    if image:
        common |= {"image": hashlib.sha256(image.tobytes()).hexdigest()[:16], "strength": strength}
    if scale > 1:
        common |= {"scale": scale}
    if make_reasoner:
        if endpoint_model is None:
            encoder = weights.text_encoder()
        reasoner = make_reasoner(encoder)
        prompts = reasoner.rewrite(requests)
        common |= {"system_prompt": reasoner.system,
                   "reasoner": endpoint_model or "the text encoder"}
        for request, prompt in zip(requests, prompts):
            print(f"{request!r} -> {prompt!r}")
        del reasoner

    for remark in changes + language.remarks(prompts, known, rewritten=bool(make_reasoner)):
        print(f"note: {remark}", file=sys.stderr)

    jobs = plan_jobs(out, requests, prompts, rows, num, sampling.seed, common)
    missing = [job for job in jobs if not job.path.exists()]
    said = len(jobs) <= 16                         # whether each picture's name is printed
    if len(missing) < len(jobs):
        print(f"{len(jobs) - len(missing)} of {len(jobs)} pictures are there already, made from "
              "the same: they are not made again")
        for job in jobs:
            if said and job.path.exists():
                print(job.path)

    if missing:
        texts = list(dict.fromkeys([*(job.prompt for job in missing), negative]))
        features = cached_features(weights.places, texts, weights.device, weights.dtype,
                                   weights.date, cache, encoder)
        del encoder                    # nothing may hold it when the denoiser comes
        pipeline = (*weights.denoiser_and_vae(), None)
        try:
            make_pictures(missing, pipeline, dict(zip(texts, features)), negative, sampling,
                          image=image, strength=strength, scale=scale,
                          say=tqdm.write if said else None)
        except KeyboardInterrupt:
            made = sum(job.path.exists() for job in jobs)
            tqdm.write(f"stopped: {made} of {len(jobs)} pictures are there; the same command makes "
                       "the others", file=sys.stderr)
            sys.exit(130)

    if len(jobs) > 1 and not names_a_picture(out):
        sheets = " ".join(str(path) for path in save_sheets(out, jobs))
        print(f"{len(jobs)} pictures in {out}, all of them in {sheets}")


def make_pictures(jobs, pipeline, features, negative, sampling, image=None, strength=1.0, scale=1,
                  say=None):
    """Makes the pictures of jobs, and writes each batch when it is made.

    features  {text: [K, S, E]} of all prompts and of `negative`
    say       called with the path of each picture
    """
    batches = batches_of_one_length([features[job.prompt] for job in jobs], BATCH)
    for batch in tqdm(batches, "pictures", unit="batch", leave=False, disable=len(batches) == 1):
        few = [jobs[i] for i in batch]
        pictures = generate(
            [job.prompt for job in few], pipeline, seeds=[job.seed for job in few],
            height=sampling.height, width=sampling.width, steps=sampling.steps,
            guidance=sampling.guidance,
            features=[features[job.prompt] for job in few] + [features[negative]],
            images=[image] * len(few) if image else None, strength=strength, progress=True)
        for job, picture in zip(few, pictures):
            if job.row is not None:
                write_json_lines(metadata_of(job.path), [job.row])
            job.path = save_new(enlarged(picture, scale), job.path, job.notes)
            if say:
                say(str(job.path))


def open_start(path):
    """The picture of --image, RGB; None where none is named."""
    if not path:
        return None
    with error_context(f"cannot read --image {path}"):
        return read_picture(Path(path).read_bytes())


def command_to_see(weights, prompt=None):
    """What to type to see what weights can do: a picture of a prompt; None: the toy's six tasks."""
    what = "--eval"
    if prompt is not None:
        what = f"--prompt {quoted(' '.join(prompt.split()))}"
    return f"python sample.py {what} --weights {quoted(str(weights))}"


def arguments(argv):
    parser = Parser("Make pictures from prompts, or score a model on the toy world.", __doc__,
                    bare="python sample.py --prompt")
    add = parser.add_argument_group("what to make").add_argument
    add("--prompt", action="append", type=utf8_text,
        help="what the picture shows; may be given more than once")
    add("--prompts-file", metavar="FILE", type=user_path,
        help="one prompt a line. Of a .jsonl file, GenEval's: pictures go into the folders that "
        "its evaluator reads")
    add("--negative", default="", type=utf8_text,
        help="what it should not show, under guidance; empty: no text at all")
    add("--seed", type=seed_number, default=0,
        help="of the first picture; the next have seed + 1, ... (default: %(default)s)")
    add("--num", type=positive, default=1, help="pictures a prompt (default: %(default)s)")
    add("--image", metavar="FILE", type=user_path,
        help="a picture to start from; its middle is taken where its proportions are not those "
        "asked for")
    add("--strength", type=float,
        help=f"how much of --image is redrawn, above 0 to 1 (default: {STRENGTH})")

    add = parser.add_argument_group("how").add_argument
    add("--steps", type=positive,
        help=f"of Euler (default: what --lora or the weights say, else {STEPS})")
    add("--guidance", type=float,
        help=f"1.0: none, one forward a step (default: what --lora or the weights say, "
        f"else {GUIDANCE})")
    add("--aspect", metavar="W:H", help="such as 16:9; any from 1:2 to 2:1")
    add("--base", type=positive,
        help=f"the area is base x base pixels (default: what the weights say, else {BASE}, or "
        f"{TOY_BASE} for the toy)")
    add("--height", type=positive, help="pixels, divisible by 16 (instead of --aspect and --base)")
    add("--width", type=positive, help="pixels, divisible by 16")

    add = parser.add_argument_group("the model").add_argument
    add("--weights", default=str(TOY), metavar="DIR_FILE_OR_REPO",
        help="a folder, file or hub id (default: the toy)")
    add_part_flags(add)
    add("--size", choices=lens.SIZES, help="check that the weights are of this size")
    add("--lora", metavar="PATH_OR_REPO",
        help="a LoRA's file, folder or hub id, merged into the weights")
    add("--lora-strength", type=float, help="default: 1")
    add("--device", help="cpu or cuda (default: CUDA if there is one)")
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU that has it; on a "
        "CPU the faster one, which is timed")
    add("--date", default=lens.DATE, help="written into the chat around the prompt (default "
        "%(default)s: frozen, so that a seed keeps its picture)")
    add("--compile", action="store_true", help="for many pictures: faster, after a minute or two; "
        "on a GPU records CUDA graphs (a CPU needs a C++ compiler)")
    add("--fp8", action="store_true",
        help="8-bit products on the image tokens, not to the last digit: for a GPU with them (L4, "
        "RTX 4090, H100 or newer); a CPU computes the same numbers slowly")

    add = parser.add_argument_group("the reasoner").add_argument
    add("--reason", action="store_true",
        help="rewrite each prompt into a dense one first, as the captions in training were")
    add("--system-prompt", metavar="FILE", type=user_path,
        help="what the reasoner is told (default: the project's own words; rl.py --search finds "
        "others)")
    add("--endpoint", metavar="URL", help="OpenAI-compatible, up to and with /v1 (default: the "
        "text encoder writes); its key is read from LENS_API_KEY")
    add("--model", help="the endpoint's model")

    add = parser.add_argument_group("out").add_argument
    add("--out", default="out", metavar="PATH", type=user_path,
        help="folder for the pictures (default: %(default)s), or a file: picture.png, .jpg or "
        ".webp (of several: picture-0.png, ...)")
    add("--scale", type=positive, default=1, metavar="N", help="write each pixel N times across "
        "and down, to see small pictures large (default: %(default)s)")
    add("--cache", default=default_cache(), metavar="DIR", type=user_path,
        help=f"folder for prompt features, {CACHE_BYTES >> 30} GiB at most; '' for none "
        "(default: %(default)s)")

    add = parser.add_argument_group("score").add_argument
    add("--eval", action="store_true",
        help="the six-task table on held-out scenes; the last line is JSON")
    add("--per-task", type=positive, help=f"prompts a task (default: {PER_TASK})")
    add("--requests", dest="style", choices=("dense", "brief", "vague"),
        help="how the held-out scenes are asked for (default: dense)")

    args = parser.parse_args(argv)
    require(args.per_task != 1, "--per-task must be at least 2")
    require(args.guidance is None or args.guidance >= 0,
            f"--guidance {args.guidance}: must be at least 0")
    require(args.strength is None or 0 < args.strength <= 1,
            f"--strength {args.strength}: must be above 0 and at most 1")
    given = sum([args.eval, bool(args.prompt), bool(args.prompts_file)])
    require(given > 0, "nothing to do: give --prompt, --prompts-file or --eval (--help explains)")
    require(given == 1, "give one of --prompt, --prompts-file and --eval")
    for prompt in args.prompt or ():
        require(prompt.strip(), "--prompt is empty: say what the picture should show")
    require(not (args.aspect or args.base) or not (args.height or args.width),
            "give --aspect and --base, or --height and --width, not both")
    require(args.reason or not (args.system_prompt or args.endpoint),
            "--system-prompt and --endpoint tell the reasoner what to do: add --reason")

    # What would have no effect is a mistake, too.
    require(args.endpoint or not args.model, "--model is one of an endpoint: add --endpoint")
    require(args.image or args.strength is None,
            "--strength says how much of a picture is redrawn: add --image")
    require(args.lora or args.lora_strength is None, "--lora-strength is of a LoRA: add --lora")
    require(args.eval or not (args.per_task or args.style),
            "--per-task and --requests choose the scenes of --eval: add it")
    others = args.negative or args.image or args.num > 1 or args.scale > 1
    require(not args.eval or not others,
            "--eval makes pictures of its own: leave out --negative, --image, --num and --scale")
    require(args.scale <= 16, f"--scale {args.scale}: must be at most 16")
    return args


def main(argv=None):
    args = arguments(argv)
    device = pick_device(args.device)
    if args.fp8 and device != "cpu":
        require(torch.cuda.get_device_capability(device) >= (8, 9),
                "--fp8: this GPU has no fp8 products (an L4, RTX 4090, H100 or newer has): "
                "leave it out")
        require(args.dtype != "fp32", "--fp8 is for bf16 on a GPU: leave out --dtype fp32")

    places = fetch_places(gather(args.weights, args.vae, args.text_encoder))
    check_parts(places, PARTS)
    check_fit(places)
    lora_path = fetch_lora(args.lora) if args.lora else None
    config = read_denoiser_config(places.transformer)
    require(args.size is None or config == lens.SIZES[args.size].transformer,
            f"--size {args.size}: the weights in {args.weights} are of another size")

    notes = read_metadata(places.transformer)
    if lora_path:
        notes |= settings_of_adapter(lora_file(lora_path))
        warn_of_base(args.lora, trained_over(lora_path), places.transformer)
    steps, guidance = sampler_settings(notes, args.steps, args.guidance)
    require(guidance != 1 or not args.negative.strip(),
            "--negative has no effect at guidance 1, where only the prompt is read: leave it out, "
            f"or add --guidance, say {GUIDANCE:g}")
    home = usual_base(notes, config.in_channels)
    height, width = pick_size(args.height, args.width, args.aspect, args.base or home)
    warn_of_size(height, width, home)
    sampling = Sampling(height, width, steps, guidance, args.seed)

    strength = args.strength or STRENGTH
    if args.image and first_step(steps, strength) == 0:
        print(f"warning: all {steps} steps begin at noise alone, so nothing is left of --image: "
              "take a smaller --strength, or more --steps", file=sys.stderr)

    out = Path(args.out)
    requests, rows = args.prompt or [], None
    if args.prompts_file:
        requests, rows = read_prompts(args.prompts_file)
    image = open_start(args.image)
    out_folder = out
    if names_a_picture(out):
        require(not args.eval and rows is None,
                f"--out {out}: --eval and GenEval's prompts fill a folder; name one")
        out_folder = out.parent
    check_writable(out_folder)

    dtype, why = pick_dtype(device, args.dtype, config.inner_dim)
    h, w = data.grid_of((height, width))
    kernel, why_kernel = pick_attention(device, dtype, config, h * w + USUAL_TEXT)
    use_attention(kernel)
    print(f"{device}, {str(dtype).removeprefix('torch.')} ({why}), {kernel} attention "
          f"({why_kernel}); {steps} steps, guidance {guidance:g}, {width} x {height} pixels")

    lora_strength = 1.0 if args.lora_strength is None else args.lora_strength
    weights = Weights(places, device, dtype, args.date, args.lora, lora_strength, args.compile,
                      args.fp8, lora_path)
    reasoner_of = None                             # text encoder -> reasoner
    if args.reason:
        reasoner_of = functools.partial(
            make_reasoner, notes, system_prompt=args.system_prompt, endpoint=args.endpoint,
            model=args.model or "default", journal=out_folder / "reasoner.jsonl", seed=args.seed)

    if args.eval:
        evaluate_command(weights, sampling, out, args.per_task or PER_TASK, args.style or "dense",
                         reasoner_of)
    else:
        pictures_command(
            weights, sampling, out, requests, rows, num=args.num, negative=args.negative,
            image=image, strength=strength, scale=args.scale, cache=args.cache,
            make_reasoner=reasoner_of,
            endpoint_model=(args.model or "default") if args.endpoint else None)


if __name__ == "__main__":
    run_command(main)
