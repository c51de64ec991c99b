"""
train.py - training: the toy's text encoder, then the denoiser by flow matching.

Read `lens.py`, `vae.py`, `data.py` and `sample.py` first. Assumes an autoencoder and a text encoder that are settled:
a change to either means training everything after it again. From nothing to a model, on a laptop:

    python vae.py --out runs/toy                         # 1. the autoencoder
    python train.py --stage text --out runs/toy          # 2. the text encoder, as a language model on captions
    python train.py --out runs/toy                       # 3. the denoiser: stage 1 on one area, stage 2 on all
    python sample.py --eval --weights runs/toy           #    the six-task table

    python train.py --stage 1 --compile --out runs/quick # the quick recipe: only 3, its first stage, over the parts of weights/toy
    python train.py --bench --compile                    # what a step takes, beside a naive one
    python train.py --size full --dry-run                # what the real size would take; then, with shards of `data.py pack`:
    torchrun --nproc-per-node 8 train.py --size full --stage 2 --data 'shards/*.tar' --parts DIR_OR_REPO --fsdp --recompute selective

The same command again resumes what DIR holds. DIR is a checkpoint that `sample.py --weights DIR` takes as it is.

Where the toy departs from the paper [ours]: its pictures are encoded once and kept, each with several captions (drawing and encoding cost as much as a
training step); the learning rate falls to zero over the last half of a stage, since a short run's average of weights cannot do that work alone; the
blocks' matrices are trained by Muon (`make_optimizers`); times sit nearer t = 1 (`TIMES`); in stage 1 an early block is asked for the shape and the
colour that cover each token (`vae.label_loss`).
"""
import argparse, contextlib, copy, dataclasses, datetime, functools, glob, itertools, json, math, os, shlex, shutil, signal, sys, time, warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from tqdm import tqdm

import data
import lens
import sample
import vae as autoencoder
from lens import LensError

# ---------------------------------------------------------------------------------------------------------------------
# Plumbing, used by rl.py and distill.py too.

def generator(*key):
    """A torch generator that is a function of integers alone, say (seed, epoch, sample): what it draws does not depend on
    batch size, rank count, or where a run was resumed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([abs(int(k)) for k in key]).generate_state(1, np.uint64)[0] >> 1))

class Log:
    """metrics.jsonl in DIR: one line a step. On resume, lines after the checkpoint's step are dropped, so none stands twice."""
    def __init__(self, folder, step):
        self.path = Path(folder) / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        lens.replace_file(self.path, lambda new: new.write_text("".join(l + "\n" for l in lines if json.loads(l)["step"] <= step)))
        self.file = open(self.path, "a", buffering=1)

    def __call__(self, **row): self.file.write(json.dumps(row) + "\n")

def save_state(path, step, notes, **groups):
    """One safetensors file with everything a resume needs, written beside and renamed: there is no moment at which the
    folder holds half a checkpoint. groups: name -> {tensor name: tensor}; notes: what JSON can hold."""
    tensors = {f"{group}/{name}": t for group, named in groups.items() for name, t in named.items()}
    lens.write_safetensors(path, tensors, {"step": step, "notes": json.dumps(notes)})

def load_state(path):
    """-> (step, notes, {group: {name: tensor}}), or None where there is no such file yet."""
    if not Path(path).exists():
        return None
    with lens.open_safetensors(path) as f:
        meta, groups = f.metadata(), {}
        for group, name in (key.split("/", 1) for key in f.keys()):
            groups.setdefault(group, {})[name] = f.get_tensor(f"{group}/{name}")
    return int(meta["step"]), json.loads(meta["notes"]), groups

def optimizer_tensors(optimizers, named):
    """Moments and step counts under the parameters' names: all that an optimiser carries from step to step."""
    return {f"{name}:{k}": v for o in optimizers for name, p in named.items() if p in o.state for k, v in o.state[p].items() if torch.is_tensor(v)}

def make_moments(optimizers):
    """Lets optimisers make their moments, by a step of length zero: a resume then fills them."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0                                                      # every step sets it anew
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step(), optimizer.zero_grad()

def on_notice():
    """A list that stays empty until SIGTERM comes, a cluster's notice before it kills: the loop looks, saves, and ends well."""
    notice = []
    signal.signal(signal.SIGTERM, lambda *_: notice.append(True))
    return notice

def join(device):
    """-> (rank, ranks, device): this process among those of torchrun, each on a GPU of its own; without torchrun (0, 1, device)."""
    if "RANK" not in os.environ:
        return 0, 1, device
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():                          # the others wait for rank 0 while it draws the world: hours, at most
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=datetime.timedelta(hours=2))
    return dist.get_rank(), dist.get_world_size(), device

def schedule(step, steps, warmup, decay=0.5):
    """Learning-rate factor: a short rise (Adam's moments are empty at first), flat, then linear to zero over the last `decay`."""
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1, decay * steps))

# ---------------------------------------------------------------------------------------------------------------------
# Stage "text": a tokenizer and a tiny GPT-OSS, trained as a language model. Its hidden states are the denoiser's text.

SPECIAL = ("<|endoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>")
# What the real tokenizer's template does with messages, in the one form that the toy needs.
CHAT_TEMPLATE = """{%- set date = current_date or "DATE" -%}
HEAD
{%- for message in messages -%}
{%- if message.role in ("system", "developer") -%}<|start|>developer<|message|># Instructions\n\n{{ message.content }}\n\n<|end|>
{%- elif message.role == "assistant" -%}{%- if message.thinking -%}<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}\
<|end|>{%- endif -%}<|start|>assistant<|channel|>final<|message|>{{ message.content }}{%- if message.content -%}<|return|>{%- endif -%}
{%- else -%}<|start|>user<|message|>{{ message.content }}<|end|>{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"""

def toy_tokenizer(seed=0, scenes=4000):
    """Byte-level BPE learned on the toy world's sentences: a common word is one token, any other text a few bytes. The fixed sentences of the
    chat form are one token each [ours]: they carry nothing, and word by word they would make every prompt twice as long."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    texts = [s for pair in sample.GUIDELINES.values() for s in pair] * 40 + [
        sample.REWRITE, "# Instructions", "system developer user assistant analysis final"] * 40
    for i in range(scenes):
        texts += [sample.sampled(seed, 0, i, 96, 96, style=style)[2] for style in ("dense", "brief", "vague")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizers.Lowercase(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)      # a word is the same token first and later in a prompt
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=768, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    head, tail = lens.CHAT["gpt_oss"]
    fixed = [head.split("<|message|>")[1].split("{date}")[0], head.split("{date}")[1].split("<|end|>")[0], lens.DESCRIBE,
             tail.split("<|message|>")[1].split("<|end|>")[0]]
    tokenizer.add_tokens([AddedToken(sentence, normalized=False) for sentence in fixed])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[5], additional_special_tokens=list(SPECIAL[1:5]))
    before_developer = head.split("<|start|>developer")[0]
    wrapped.chat_template = CHAT_TEMPLATE.replace("DATE", lens.DATE).replace("HEAD", before_developer.replace("{date}", "{{ date }}"))
    return wrapped

class Sentences(torch.utils.data.Dataset):
    """A quarter captions as the denoiser will meet them, the rest rewritings: copying a request's words is slower to learn than
    the captions' grammar. A batch is (ids [B, L], labels [B, L] with -100 where no loss counts, mask [B, L])."""
    def __init__(self, tokenizer, seed, batch):
        self.tokenizer, self.seed, self.batch = tokenizer, seed, batch

    def __getitem__(self, step):
        rows, starts = [], []
        encode = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]
        for i in range(self.batch):
            rng = np.random.default_rng((self.seed, step, i))
            scene = data.random_scene(rng, *data.BUCKETS[96][rng.integers(len(data.BUCKETS[96]))])
            head, tail = lens.CHAT["gpt_oss"]
            date = lens.DATE if rng.random() < 0.7 else f"20{rng.integers(24, 36)}-{rng.integers(1, 13):02d}-{rng.integers(1, 29):02d}"
            if i % 4 == 0:
                rest = data.caption(scene, data.details_for(scene, rng), rng) + tail
            else:
                instructions, request, answer = sample.rewriting(scene, rng, vague=rng.random() < 0.5)
                head = head.replace(lens.DESCRIBE, instructions) + request + "<|end|><|start|>assistant"
                rest = "<|channel|>final<|message|>" + answer + "<|return|>"
            head = encode(head.replace("{date}", date))
            rows.append(head + encode(rest))
            starts.append(len(head))
        length = max(map(len, rows))
        ids = torch.tensor([r + [0] * (length - len(r)) for r in rows])            # [B, L], right padding with id 0
        labels = torch.tensor([[-100] * s + r[s:] + [-100] * (length - len(r)) for r, s in zip(rows, starts)])
        return ids, labels, torch.tensor([[1] * len(r) + [0] * (length - len(r)) for r in rows])

def train_text(args):
    """Next-token prediction on captions and rewritings; writes DIR/text_encoder and DIR/tokenizer. About 1M parameters."""
    out, steps, batch, step, tokenizer = Path(args.out), args.steps or 3200, 48, 0, toy_tokenizer()
    model = lens.build_text_model(lens.SIZES[args.size].text_encoder, seed=args.seed, vocab_size=len(tokenizer), pad_token_id=0,
                                  eos_token_id=tokenizer.eos_token_id).to(args.device).train()
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(named.values(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    if saved := load_state(out / "text" / "state.safetensors"):
        step, _, groups = saved
        model.load_state_dict(groups["model"])
        make_moments([optimizer])
        for name, t in optimizer_tensors([optimizer], named).items():
            t.copy_(groups["optimizer"][name])
        print(f"resuming at step {step}")
    log = Log(out / "text", step)
    bar = tqdm(torch.utils.data.DataLoader(Sentences(tokenizer, args.seed, batch), batch_size=None, sampler=range(step, steps),
                                           num_workers=1), initial=step, total=steps, desc="text encoder", mininterval=2)
    for ids, labels, mask in bar:
        optimizer.param_groups[0]["lr"] = 2e-3 * schedule(step, steps, 100, 0.6)
        logits = model(input_ids=ids.to(args.device), attention_mask=mask.to(args.device)).logits            # [B, L, vocabulary]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(args.device), ignore_index=-100)
        optimizer.zero_grad(), loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            log(step=step, loss=loss.item(), grad_norm=norm.item())
            bar.set_postfix_str(f"loss {loss.item():.3f}")
        if step % args.save_every == 0 or step == steps:
            save_state(out / "text" / "state.safetensors", step, {}, model=model.state_dict(), optimizer=optimizer_tensors([optimizer], named))
    lens.save_pipeline(out, text_encoder=lens.TextEncoder(model, tokenizer, lens.SIZES[args.size].transformer.selected_layer_index))
    print(f"wrote {out}/text_encoder and {out}/tokenizer")

# ---------------------------------------------------------------------------------------------------------------------
# Stages 1 and 2: the denoiser.

# How often training draws each of data.SHAPES [ours]. With all alike, three quarters of the wrong pictures of a model at 0.80 were wrong in
# a star alone: five thin arms over few tokens, decided between t = 0.8 and 0.5 (of stars noised to 0.8, 0.62 came back; of squares, all).
ODDS = (0.11, 0.12, 0.12, 0.37, 0.17, 0.11)

class Stage:
    """What a stage trains on. areas: bases of the buckets, the largest its weights' `home`; batch: pictures a device, by area, so that steps of
    different areas cost about the same; scenes: how many the toy world draws, by area (captions per scene: CAPTIONS); odds: how often it draws each of
    data.SHAPES (None: all alike); lr: AdamW's; muon_lr: Muon's, for the matrices of the blocks (None: AdamW has them too); times: mean and standard
    deviation of logit(t) (None: the paper's, by the number of tokens); decay: whether the learning rate falls to zero at the end; betas: AdamW's;
    labels: weight of `vae.label_loss` beside the loss of the velocity, falling with the learning rate."""
    def __init__(self, areas, batch, steps, lr, scenes=(), muon_lr=None, times=None, decay=True, betas=(0.9, 0.99), odds=ODDS, labels=0.0):
        self.areas, self.batch, self.scenes, self.steps, self.home = areas, dict(zip(areas, batch)), dict(zip(areas, scenes)), steps, max(areas)
        self.lr, self.muon_lr, self.times, self.decay, self.betas, self.odds, self.labels = lr, muon_lr, times, decay, betas, odds, labels

    def sizes(self, area): return [(area, area)] if len(self.areas) == 1 else data.buckets(area)       # one area: squares; more: nine ratios [paper]

    def counts(self, sizes):                               # {bucket: pictures a device}, those of the area that it comes closest to
        return {b: self.batch[min(self.areas, key=lambda a: abs(math.log(h * w / a**2)))] for b, (h, w) in enumerate(sizes)}

# Where the toy's times sit [ours]: a quarter above 0.9, where the text alone says what to show, a fifth below 0.5, where shapes get corners (1.75
# and 1.25 left 8% there). After 83,000 pictures the loss at t = 0.97 was 0.89 with the paper's 1.0 and 1.0, 0.81 with 2.0 (0.93 without text).
# The short stage 1 has 2.0 and 1.5, and all shapes alike. Its labels teach the shapes soon (4% off the loss after 900 steps, 5% between 0.75 and
# 0.5), so its times can go to where the text decides what and where: 0.69 after 8,500 steps; with 1.0 and 1.2 clean, wrong shapes: 0.41 after 10,800.
TIMES = (1.25, 1.5)
STAGES = {"nano": {1: Stage((64,), (16,), 30, 1e-3, (64,), 3e-3, TIMES, labels=0.2), 2: Stage((64, 96), (16, 8), 30, 1e-3, (64, 32), 3e-3, TIMES)},
          "toy": {1: Stage((128,), (48,), 8500, 1.2e-3, (20_000,), 3e-3, (2.0, 1.5), odds=None, labels=0.2),   # [ours]
                  2: Stage((64, 96, 128), (96, 72, 48), 12000, 1.2e-3, (2_000, 5_000, 20_000), 3e-3, TIMES)},
          "full": {1: Stage((512,), (24,), 400_000, 2e-4, decay=False, betas=(0.9, 0.999)),        # [paper]
                   2: Stage((512, 768, 1024), (24, 10, 6), 400_000, 1e-4, decay=False, betas=(0.9, 0.999))}}
CAPTIONS = 2              # kept per scene, each stating other details
BRIEF = 0.25              # [ours] share of the captions of "position" scenes that state the relation and nothing else
DROPOUT = 0.1             # [ours] share of samples trained without text: the unconditional branch that guidance needs
SPIKE, PATIENCE = 4.0, 10  # [ours] a step whose loss is not finite or over SPIKE times the usual is left out; so many in a row end the run
TOY_GUIDANCE = 3.0        # [ours] without guidance and at 3 and 5, 41, 24 and 33 of 300 pictures were wrong; the released weights' is 5 [checkpoint]
TEXT = {True: (40, 64), False: (128, sample.LIMIT)}       # tokens of a usual and of the longest caption, in the toy world (of 600, 60) and outside
CLIP, EMA = 1.0, 0.998    # [paper] gradient norm; [ours] decay of the weights' average, which is what is sampled and saved

def captions_of(scene, rng):
    """CAPTIONS sentences for a scene, each stating other details. Dense, but for some of the scenes made for a relation: a dense
    caption states the places too, and from these alone "to the left of" was never learnt, since the places already say it."""
    style = lambda: "brief" if scene.task == "position" and rng.random() < BRIEF else "dense"
    return [data.caption(scene, data.details_for(scene, rng, style()), rng) for _ in range(CAPTIONS)]

class Encoding(torch.utils.data.Dataset):
    """Chunks of scenes of one size, drawn, captioned and encoded: (size, {tokens [n, h*w, C], text [sum of lengths, K * E], lengths, labels}, words)."""
    def __init__(self, chunks, odds, seed, vae, encoder):
        self.chunks, self.odds, self.seed, self.vae, self.encoder = chunks, odds, seed, vae, encoder

    @torch.no_grad()
    def __getitem__(self, k):
        area, (height, width), numbers = self.chunks[k]
        scenes, captions = [], []
        for i in numbers:
            rng = np.random.default_rng((self.seed, area, i))
            scenes.append(data.random_scene(rng, height, width, odds=self.odds))
            captions += captions_of(scenes[-1], rng)
        pictures = autoencoder.from_pil([data.draw(scene, height, width) for scene in scenes]).to(next(self.vae.parameters()).device)
        # the posterior's mean: sharper than a sample; by fours, whose activations fit a CPU's cache: 2.8 times as fast as 64 at once
        mean = torch.cat([self.vae.encode(few)[0] for few in pictures.split(4)])
        text = [f.transpose(0, 1).flatten(1).bfloat16().cpu() for f in sample.encode(self.encoder, captions)]      # [S, K * E] each
        words = {w for c in captions for w in c.replace(",", " ").replace(".", " ").split()}
        return (height, width), {"tokens": self.vae.to_tokens(mean).bfloat16().cpu(), "text": torch.cat(text), "lengths": torch.tensor([len(t) for t in text]),
                                 "labels": torch.from_numpy(np.stack([data.labels(scene, height, width) for scene in scenes]))}, words

class World:
    """The toy world as the denoiser meets it: every scene drawn, captioned CAPTIONS times and encoded once. Scenes are numbered through, size
    after size: `buckets[i]` is scene i's size, `first[bucket]` the size's first scene.
    tokens[size]   [n, h*w, C] bf16; labels[size]: their data.labels, [n, h*w, 6]
    text[size]     [total length, K * E] bf16, the captions' features end to end; caption c of the size's scene j is rows
                   offsets[size][CAPTIONS * j + c] up to the next offset: nothing is padded in memory."""
    def __init__(self, stage, seed, vae, encoder, path, device):
        self.stage, self.layers, self.digest, self.waited = stage, len(encoder.layers), None, 0.0
        key = dict(seed=seed, scenes=stage.scenes, captions=CAPTIONS, brief=BRIEF, odds=stage.odds, labels=[*data.SHAPES, *data.COLORS],
                   vae=vae.bn.running_mean.double().sum().item())
        saved = load_state(path)
        if saved and json.loads(json.dumps(key)) == saved[1]["key"]:
            _, notes, groups = saved
        else:
            notes, groups = self.encode(seed, vae, encoder, device)
            save_state(path, 0, {"key": key, **notes}, **groups)
        self.words, parse = notes["words"], lambda name: tuple(int(v) for v in name.split("x"))
        self.tokens, self.text, self.labels = ({parse(k): v for k, v in groups[name].items()} for name in ("tokens", "text", "labels"))
        self.offsets = {parse(k): F.pad(v.cumsum(0), (1, 0)) for k, v in groups["lengths"].items()}
        self.sizes = sorted(self.tokens)                                           # a file gives them back in its own order
        counts = [len(self.tokens[size]) for size in self.sizes]
        self.buckets, self.first = np.repeat(np.arange(len(counts)), counts), np.cumsum([0, *counts])

    def encode(self, seed, vae, encoder, device):
        """Every scene through both frozen models; on a CPU by one process a core, since these models are too small for threads."""
        chunks = []
        for area, count in self.stage.scenes.items():
            sizes = self.stage.sizes(area)                                         # in turn
            chunks += [(area, size, mine[j:j + 64]) for k, size in enumerate(sizes) for mine in [range(count)[k::len(sizes)]] for j in range(0, len(mine), 64)]
        loader = torch.utils.data.DataLoader(Encoding(chunks, self.stage.odds, seed, vae, encoder), batch_size=None, sampler=range(len(chunks)),
                                             num_workers=os.cpu_count() if device == "cpu" else 0)
        groups, words = {}, set()
        bar = tqdm(total=sum(self.stage.scenes.values()), desc="drawing and encoding scenes", unit="scene", mininterval=2)
        for (height, width), found, seen in loader:
            for name, value in found.items():
                groups.setdefault(name, {}).setdefault(f"{height}x{width}", []).append(value.clone())
            words |= seen
            bar.update(len(found["tokens"]))
        bar.close()
        return {"words": sorted(words)}, {name: {size: torch.cat(parts) for size, parts in group.items()} for name, group in groups.items()}

    def lengths(self, epoch):
        """Tokens of the caption that each scene shows in this epoch: the captions take turns."""
        mine = [self.offsets[size].diff().numpy().reshape(-1, CAPTIONS) for size in self.sizes]
        return np.concatenate([rows[np.arange(len(rows)), (np.arange(len(rows)) + first + epoch) % CAPTIONS] for rows, first in zip(mine, self.first)])

    def labels_of(self, bucket, samples): return self.labels[self.sizes[bucket]][torch.from_numpy(samples - self.first[bucket])]      # [B, N, 6]

    def stream(self, batches):
        """Batches of data.plan -> tokens [B, N, C] fp32, text [K x [B, S, E]], mask [B, S], no faults."""
        for bucket, samples, epoch in batches:
            size, j = self.sizes[bucket], samples - self.first[bucket]
            pieces = [self.text[size][self.offsets[size][r]:self.offsets[size][r + 1]] for r in CAPTIONS * j + (samples + epoch) % CAPTIONS]
            longest = max(map(len, pieces))
            text = torch.stack([F.pad(p, (0, 0, 0, longest - len(p))) for p in pieces]).float()        # [B, S, K * E]
            mask = torch.arange(longest)[None] < torch.tensor([len(p) for p in pieces])[:, None]
            yield self.tokens[size][torch.from_numpy(j)].float(), list(text.chunk(self.layers, -1)), mask, []

class Pictures:
    """Tar shards as the denoiser meets them: decoded by workers while the last batch trains, encoded here by the frozen models."""
    def __init__(self, args, stage):
        with lens.told("--data"):
            self.shards = data.Shards(args.data, [size for area in stage.areas for size in stage.sizes(area)], args.seed, data.vae_identity(args.parts))
        self.sizes, self.buckets, self.digest, self.words = self.shards.sizes, self.shards.buckets, self.shards.digest, []
        self.vae, self.encoder, self.device, self.workers, self.waited = args.vae, args.encoder, args.device, args.workers, 0.0
        args.say(f"{len(self.buckets):,} samples in {len(self.shards.paths)} shards; left out: {dict(+self.shards.faults) or 'nothing'}")

    def lengths(self, epoch): return self.shards.lengths

    @torch.no_grad()
    def stream(self, batches):
        loader = iter(torch.utils.data.DataLoader(self.shards, batch_size=None, sampler=batches, num_workers=self.workers, pin_memory=self.device != "cpu"))
        for bucket, samples, _ in batches:
            begin = time.perf_counter()
            try:
                pictures, captions, faults = next(loader)
            except ValueError as e:                                                # a worker's comes with its whole traceback
                raise LensError(str(e).strip().splitlines()[-1].removeprefix("ValueError: ")) from None
            self.waited = time.perf_counter() - begin                              # what the workers were late by
            if pictures.ndim == 2:                                                 # `data.py cache` has been here
                tokens = pictures.view(torch.bfloat16).view(len(samples), -1, 4 * self.vae.config["latent_channels"]).to(self.device)
            else:
                tokens = self.vae.to_tokens(self.vae.encode(autoencoder.to_images(pictures, self.device))[0])
            text, mask = self.encoder.encode(captions)                             # no mask: all of one length
            yield tokens.float(), [layer.float() for layer in text], torch.ones(text[0].shape[:2]).bool() if mask is None else mask, faults

def timestep_mu(image_tokens):
    """Where training times sit: t = sigmoid(mu + normal), mu from 1.0 at 256 tokens to 1.3 at 4096 [paper]."""
    return 1.0 + 0.3 * (image_tokens - 256) / (4096 - 256)

def noise_and_time(seed, epoch, samples, shape, times):
    """One generator a sample, from (seed, epoch, sample): noise [B, N, C], t [B], dropped [B] bool. times: mean and deviation of logit(t)."""
    rows = [(torch.randn(shape, generator=g), torch.sigmoid(times[0] + times[1] * torch.randn((), generator=g)),  # logit-normal [paper]
             torch.rand((), generator=g) < DROPOUT) for g in (generator(seed, epoch, i) for i in samples)]
    return tuple(map(torch.stack, zip(*rows)))

def flow_matching_loss(model, tokens, text, mask, grid, noise, t, seen=None):
    """|v_model(x_t, t, text) - (noise - tokens)|^2, per sample [B] in fp32. Rectified flow [paper]. seen: as in LensTransformer.forward."""
    x_t = lens.add_noise(tokens, noise, t)                                         # [B, N, C]
    v = model(x_t, t, text, mask, grid, seen).float()                              # [B, N, C]
    return (v - lens.velocity(tokens, noise)).square().mean((1, 2))

def same_everywhere(value):
    """Rank 0's value on every rank: two ranks that measure may come to two answers."""
    box = [value]
    dist.broadcast_object_list(box) if dist.is_initialized() else None
    return box[0]

def pick_attention(args, dtype, base, state):
    """The fastest attention kernel for training on areas up to base x base, put to use in this process; a resumed run keeps to what it began with."""
    tokens, config = (base // 16) ** 2 + TEXT[args.size in ("nano", "toy")][0], lens.SIZES[args.size].transformer
    kernel, why = same_everywhere(sample.pick_attention(args.device, dtype, config, tokens, learns=True))
    sample.use_attention(state.setdefault("attention", kernel))
    return f"{state['attention']} attention ({why})"

def make_optimizers(model, stage):
    """AdamW for everything [paper]; where the stage says so, Muon for the blocks' matrices [ours]: it makes each step's change
    of a matrix orthogonal, so that rare directions (a shape's corners) move as fast as common ones (the background). After
    150 seconds on two cores the held-out loss of the toy was 0.515 with it and 0.565 without, a step costing 13% more.
    Weight decay off: with norms on q, k and every input it acts on little but the scale of a short run."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in named.items()
                if stage.muon_lr and p.ndim == 2 and "transformer_blocks" in name and "_mod." not in name and "lora_" not in name}
    adamw = torch.optim.AdamW([p for name, p in named.items() if name not in matrices], lr=stage.lr, betas=stage.betas, weight_decay=0.0, fused=True)
    # match_rms_adamw: its steps are scaled to be as long as AdamW's would be, so the two rates are of one kind
    return [adamw] + ([torch.optim.Muon(matrices.values(), lr=stage.muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")] if matrices else [])

def set_recompute(model, how):
    """What the blocks keep for the backward pass. none: all; full: their inputs, each block is run again; selective: what matrix
    products and attention gave, and the cheap rest is run again."""
    heavy = ("aten.mm", "aten.addmm", "aten.bmm", "aten._scaled_dot_product")
    policy = lambda _, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE if str(op).startswith(heavy) else CheckpointPolicy.PREFER_RECOMPUTE
    extra = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)} if how == "selective" else {}
    for block in model.transformer_blocks if how != "none" else ():
        plain = block.forward
        block.forward = lambda *args, plain=plain: (checkpoint(plain, *args, use_reentrant=False, **extra) if torch.is_grad_enabled() else plain(*args))

@functools.cache
def flops(model, tokens, length):
    """FLOPs of one training step for one picture, forward and backward: 6 for each weight and token that meets it (4 if it is frozen), 12 W N^2
    for each block's attention. Recomputation is not counted: it is not work that trains."""
    meets = lambda name: 1 if any(k in name for k in ("_mod.", "time", "norm_out")) else length if "txt" in name or "add" in name else tokens
    dead = set(model.unread())
    weights = sum((6 if p.requires_grad else 4) * p.numel() * meets(name) for name, p in model.named_parameters() if p.ndim == 2 and name not in dead)
    return weights + 12 * model.config.num_layers * model.config.inner_dim * (tokens + length) ** 2

def matmul_peak(device, dtype):
    """FLOP/s of a large matrix product here: what 100% of the machine means in this project."""
    n = 8192 if device != "cpu" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    clock = [((a @ a)[0, 0].item(), time.perf_counter())[1] for _ in range(6)]     # .item() waits for the product
    return 2 * n**3 / min(after - before for before, after in zip(clock, clock[1:]))

local = lambda t: t.to_local() if hasattr(t, "to_local") else t                    # this rank's part of what FSDP has sharded
whole = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t              # all of it; every rank must ask

def train_step(args, source, model, parallel, rows, total, stream, stage, state, factor=1.0):
    """Gradients of one optimiser step, from this rank's device batches `rows` [(batch, weight)] of its `total` pictures, and
    its losses over all ranks: (loss, mean loss by quarter of t [4], stop, this rank's FLOPs). A weight of 0: there was no batch
    left for this rank, it runs along for its peers. factor: what the schedule leaves of the labels' weight."""
    work, sums = 0, torch.zeros(12, device=args.device)              # losses, then by quarter of t: losses, counts; notices; faults; labels
    move = lambda x: x.to(args.device, non_blocking=True)
    for k, ((bucket, samples, epoch), weight) in enumerate(rows):
        height, width = source.sizes[bucket]
        tokens, text, mask, faults = next(stream)
        noise, t, dropped = noise_and_time(args.seed, epoch, samples, tokens.shape[1:], stage.times or (timestep_mu(tokens.shape[1]), 1.0))
        tokens, text, noise, t = move(tokens), [move(layer) for layer in text], move(noise), move(t)
        mask = move(mask) & ~move(dropped)[:, None]                                # no visible text is no text at all
        last, img = k == len(rows) - 1, []                                         # ranks exchange gradients once a step
        if args.fsdp:
            parallel.set_requires_gradient_sync(last)
        elif args.ranks > 1:
            parallel.require_backward_grad_sync = last
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=state["bf16"]):
            losses = flow_matching_loss(parallel, tokens, text, mask, (height // 16, width // 16), noise, t, img.append if args.labels else None)
            covering = autoencoder.label_loss(model.label_head, img[len(img) // 3], move(source.labels_of(bucket, samples))) if args.labels else sums[:1] * 0
        # DDP and FSDP average over ranks: the mean of the whole step
        ((losses.sum() + factor * stage.labels * covering.sum()) * (weight * args.ranks / total)).backward()
        work += weight * len(samples) * flops(model, tokens.shape[1], text[0].shape[1])
        quarter = (4 * t).long().clamp(max=3)
        sums[0] += weight * losses.detach().sum()
        sums[1:5].index_add_(0, quarter, weight * losses.detach())
        sums[5:9].index_add_(0, quarter, weight * torch.ones_like(losses))
        sums[10] += weight * len(faults)
        sums[11] += weight * covering.detach().sum()
        print("".join(f"replaced by the next of its bucket: {fault}\n" for fault in faults if weight), end="", file=sys.stderr)
    sums[9] += len(args.notice)
    dist.all_reduce(sums) if args.ranks > 1 else None
    sums = sums.tolist()                                                           # the step's only wait for the device
    state["replaced"], state["label_loss"] = state["replaced"] + round(sums[10]), sums[11] / total
    return sums[0] / total, [s / n if n else None for s, n in zip(sums[1:5], sums[5:9])], sums[9] > 0, work      # a notice to one rank stops all

def train_stage(number, args, source, model, parallel, ema, optimizers, state, log):
    """One stage from state["step"] (counted in the stage) to its last step. A step takes `group` device batches of the plan,
    whoever computes them: with equal group, the number of ranks changes neither what is learnt nor its noise."""
    stage, named, group = args.table[number], dict(model.named_parameters()), args.ranks * args.accumulate
    steps, home, peak = args.steps or stage.steps, data.bucket(stage.home), matmul_peak(args.device, torch.bfloat16 if state["bf16"] else torch.float32)
    trained, averaged = zip(*((local(named[name]), local(q)) for name, q in ema.named_parameters() if named[name].requires_grad))
    batch, pixels = stage.counts(source.sizes), [h * w for h, w in source.sizes]
    plan = lambda epoch: data.plan(source.buckets, source.lengths(epoch), batch, args.seed, epoch)
    sizes = [(len(samples), batch[b]) for b, samples, _ in plan(0)]                # the same in every epoch, but for their order
    epoch_length = -(-len(sizes) // group)
    lens.require(state.setdefault("data", source.digest) == source.digest, f"--data: these shards are not those that the run "
                 f"in {args.out} began with; give another --out, or the same shards")
    args.say(f"an epoch is {epoch_length} steps of {group} device batches; {sum(count < full for count, full in sizes)} batches "
             "are smaller: what was left over in their buckets")
    bar = tqdm(total=steps, initial=state["step"], desc=f"stage {number}", unit="step", mininterval=2, disable=args.rank > 0)
    while state["step"] < steps:
        epoch, done = divmod(state["step"], epoch_length)
        found = plan(1000 * number + epoch)                                        # no two stages draw the same noise for a sample
        # A step's batches in order of cost, dealt in turn: what the ranks compute at one moment takes them equally long.
        found = [sorted(found[k:k + group], key=lambda b: -pixels[b[0]] * len(b[1])) for k in range(0, len(found), group)][done:done + steps - state["step"]]
        deal = lambda step: [(step[k], 1) if k < len(step) else (step[0], 0) for k in range(args.rank, -(-len(step) // args.ranks) * args.ranks, args.ranks)]
        stream = source.stream([b for step in found for b, _ in deal(step)])
        for step in found:
            begin, total = time.perf_counter(), sum(len(samples) for _, samples, _ in step)
            factor = schedule(state["step"], steps, 100) if stage.decay else min(1.0, (state["step"] + 1) / 1000)
            [of.update(lr=lr * factor) for optimizer, lr in zip(optimizers, (stage.lr, stage.muon_lr)) for of in optimizer.param_groups]
            loss, by_t, stop, work = train_step(args, source, model, parallel, deal(step), total, stream, stage, state, factor)
            norm = whole(torch.nn.utils.clip_grad_norm_([p for p in named.values() if p.requires_grad], CLIP)).item()
            # One bad batch must not reach the weights: a NaN there is for ever, and Adam remembers a spike for hundreds of steps.
            good = math.isfinite(loss) and math.isfinite(norm) and loss < SPIKE * (state["usual"] or math.inf)
            [(optimizer.step() if good else None, optimizer.zero_grad()) for optimizer in optimizers]
            state["step"], state["total"], state["seen"] = state["step"] + 1, state["total"] + 1, state["seen"] + total
            state["in_a_row"], state["skipped"] = 0 if good else state["in_a_row"] + 1, state["skipped"] + (not good)
            if good:
                state["usual"] = loss + 0.98 * ((state["usual"] or loss) - loss)
            elif state["in_a_row"] == PATIENCE:
                raise LensError(f"{PATIENCE} steps in a row had a loss that was not finite or over {SPIKE:g} times the usual, "
                                f"{loss:.3g} at the last (step {state['total']}): none of them touched the weights; "
                                f"the last checkpoint in {args.out} is whole. Try a lower learning rate")
            lens.require(state["replaced"] <= 100 + 0.01 * state["seen"],
                         f"{state['replaced']} of {state['seen']} samples could not be read: more than one in a hundred; look at the shards (data.py stats)")
            with torch.no_grad():                                                  # a young average forgets its random start quickly
                torch._foreach_lerp_(averaged, trained, 1 - min(EMA, (1 + state["total"]) / (10 + state["total"])))
            seconds = time.perf_counter() - begin
            state["seconds"] += seconds
            row = dict(step=state["total"], stage=number, loss=loss if good else None, grad_norm=norm if good else None,
                       lr=stage.lr * factor, loss_by_t=[round(b, 4) if b and math.isfinite(b) else None for b in by_t],
                       label_loss=round(state["label_loss"], 4) if good and args.labels else None,
                       size="+".join(sorted({"{1}x{0}".format(*source.sizes[b]) for b, *_ in step})), skipped=state["skipped"],
                       replaced=state["replaced"], pictures_per_s=round(total / seconds, 1), tflops=round(work / seconds / 1e12, 3),
                       peak_share=round(work / seconds / peak, 3), wait_s=round(source.waited, 4), seconds=round(state["seconds"], 2),
                       memory_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2) if args.device != "cpu" else None)
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, {total / seconds:.0f} pictures/s, {row['peak_share']:.0%} of peak", refresh=False)
            report(number, args, model, ema, optimizers, state, source, log, row, state["step"] == steps, stop, bar, home)
    bar.close()

def report(number, args, model, ema, optimizers, state, source, log, row, last, stop, bar, home):
    """What happens beside a step: previews, evaluation, the log, checkpoints, and the end that SIGTERM asks for."""
    due = lambda every: every and (state["step"] % every == 0 or last)
    shown = averaged_model(args, ema) if due(args.preview_every) or due(args.eval_every) else None
    if due(args.preview_every) and args.rank == 0:
        prompts = [prompt for task in ("position", "counting") for *_, prompt in sample.held_out(task, 6, *home)]
        pictures = sample.generate(prompts, (shown, args.vae, args.encoder), height=home[0], width=home[1], guidance=args.guidance)
        data.contact_sheet(pictures, 6).save(Path(args.out) / f"preview-{state['total']:06d}.png")
    if due(args.eval_every) and args.rank == 0:
        state["scores"], *_ = sample.evaluate((shown, args.vae, args.encoder), *home, sample.STEPS, args.guidance, 20, progress=False)
        bar.write(f"step {state['total']}: " + ", ".join(f"{k} {v:.2f}" for k, v in state["scores"].items()))
        row.update(state["scores"])
    log(**row) if log else None
    save(args, number, model, ema, optimizers, state, source.words) if due(args.save_every) or stop else None
    if stop:
        bar.close()
        args.say(f"SIGTERM: saved {args.out} at step {state['total']}; the same command goes on from there")
        sys.exit(0)

def averaged_model(args, ema):
    """The average as a plain model that can sample: itself, or under FSDP gathered on rank 0's device (None on the others)."""
    if not args.fsdp:
        return ema
    state = {name: full.cpu() for name, t in ema.state_dict().items() for full in [whole(t.detach())] if args.rank == 0}
    with torch.device("meta"):
        model = lens.LensTransformer(ema.config)
        lens.add_lora(model, args.lora, args.lora) if args.lora else None
    return model.load_state_dict(state, assign=True) and model.to(args.device) if state else None

def resumable(model, ema, optimizers):
    """{name: tensor} of all that a resume needs: weights, their average, the optimisers' moments. Each rank names its own parts."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    averaged = {name: p for name, p in ema.named_parameters() if name in trained}
    return {f"{group}.{name}": t.detach() for group, named in (
        ("model", trained), ("ema", averaged), ("optimizer", optimizer_tensors(optimizers, trained))) for name, t in named.items()}

@contextlib.contextmanager
def checkpointing(what):
    """lens.told around torch.distributed.checkpoint: its error is no Exception, and it warns that one process is one process."""
    with lens.told(what), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except dcp.CheckpointException as e:
            raise OSError(*(str(failure) for failure, _ in list(e.failures.values())[:1])) from None

def write_state(args, step, tensors, notes):
    """The resume state: one folder written by all ranks (torch.distributed.checkpoint, safetensors inside). It gets its name when all
    of it is there, and only then does the one before it go."""
    name = Path(args.out) / f"state-{step:08d}"
    shutil.rmtree(f"{name}.new", ignore_errors=True) if args.rank == 0 else None
    with checkpointing(f"cannot write {name}"):
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(f"{name}.new", save_distributed=True))
        if args.rank == 0:
            (Path(f"{name}.new") / "notes.json").write_text(json.dumps(notes))
            os.replace(f"{name}.new", name)
            [shutil.rmtree(old) for old in checkpoints(args.out)[:-1]]

def save(args, number, model, ema, optimizers, state, words):
    """The resume state, and the averaged weights in the released layout, which sample.py takes as it is."""
    write_state(args, state["total"], resumable(model, ema, optimizers), {**state, "stage": number})
    out, averaged = Path(args.out), averaged_model(args, ema)
    if args.rank == 0:
        notes = dict(command=shlex.join(["python", "train.py", *sys.argv[1:]]), seed=args.seed, trained_steps=state["total"],
                     trained_seconds=round(state["seconds"]), score=json.dumps(state.get("scores", {})), steps=sample.STEPS,
                     guidance=args.guidance, base=args.table[number].home, words=json.dumps(words))
        lens.save_lora(averaged, out, metadata=notes) if args.lora else lens.save_pipeline(
            out, transformer=averaged, metadata=notes, base=None if has_parts(out) else os.path.relpath(args.parts, out))

def resume(args, model, ema, optimizers, state):
    """Loads the newest state of --out into what is here, whatever number of ranks saved it; -> its stage, or None."""
    if not (found := checkpoints(args.out)):
        return None
    state.update(json.loads((found[-1] / "notes.json").read_text()))
    make_moments(optimizers)
    with checkpointing(f"cannot read {found[-1]}"):                                # fills these tensors in place
        dcp.load(resumable(model, ema, optimizers), storage_reader=dcp.HuggingFaceStorageReader(str(found[-1])))
    args.say(f"resuming {args.out} at step {state['total']} (stage {state['stage']}, step {state['step']})")
    return state.pop("stage")

checkpoints = lambda out: sorted((p for p in Path(out).glob("state-*") if p.name[6:].isdigit()), key=lambda p: int(p.name[6:]))  # finished ones, oldest first
has_parts = lambda folder: all((Path(folder) / part / "config.json").exists() for part in ("vae", "text_encoder"))

def dry_run(args):
    """What each setting would cost, counted on the meta device: no weight is made. Memory is the sum of what must be there at once."""
    stage, gib = args.table[args.stages[-1]], 2**30
    with torch.device("meta"):
        model = lens.LensTransformer(lens.SIZES[args.size].transformer)
        dead, total = set(model.unread()), sum(p.numel() for p in model.parameters())
        lens.add_lora(model, args.lora, args.lora) if args.lora else None
    learnt = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and n not in dead)
    fixed = {"weights": 4 * total, "average": 4 * learnt, "gradients": 4 * learnt, "moments": 8 * learnt}      # all of them fp32
    print(f"{args.size}: {total:,} parameters, {learnt:,} of them learn; in GiB: " + ", ".join(f"{k} {v / gib:.2f}" for k, v in fixed.items()))
    print(f"{'pictures':>16} {'recompute':>10} {'activations GiB':>16} {'one GPU':>9} {'FSDP on 8':>10} {'TFLOP a step':>13}")
    for (area, count), how in itertools.product(stage.batch.items(), ("none", "selective", "full")):
        kept, static, work = (activations(model.config, how, count, (area // 16, area // 16), 128) / gib, sum(fixed.values()) / gib,
                              flops(model, (area // 16) ** 2, 128))
        print(f"{count:4} of {area:4} x {area:<4}{how:>10} {kept:16.2f} {kept + static:9.2f} {kept + static / 8:10.2f} {count * work / 1e12:13.2f}")

def activations(config, how, count, grid, length):
    """Bytes that a device batch leaves in memory between its forward and its backward pass, bf16 copies of weights included: PyTorch's
    own tracker over tensors without storage. Blocks are alike, so two and three of them tell what all of them keep."""
    from torch._subclasses.fake_tensor import FakeTensorMode                       # private names: only the dry run stands on them
    from torch.distributed._tools.mem_tracker import MemTracker
    kept = []
    for blocks in (2, 3):
        lens.rope_table.cache_clear()                                              # a table without storage must not outlive its mode
        with FakeTensorMode(), MemTracker() as tracker:
            model = lens.LensTransformer(dataclasses.replace(config, num_layers=blocks)).train()
            set_recompute(model, how)
            tracker.track_external(model)
            tokens, text = (torch.empty(count, grid[0] * grid[1], config.in_channels),
                            [torch.empty(count, length, config.enc_hidden_dim) for _ in config.selected_layer_index])
            mask = torch.ones(count, length, dtype=torch.bool)
            before = tracker.get_tracker_snapshot()
            with torch.autocast("cpu", torch.bfloat16):
                loss = flow_matching_loss(model, tokens, text, mask, grid, tokens, torch.empty(count)).mean()
            total = lambda snapshot: sum(sizes["Total"] for sizes in snapshot.values())
            kept.append(total(tracker.get_tracker_snapshot()) - total(before))
    lens.rope_table.cache_clear()
    return kept[0] + (config.num_layers - 2) * (kept[1] - kept[0])

def bench(args):
    """A JSON line an area: seconds of a training step of one device batch (halved until it fits), ours beside the naive one (text padded to the longest
    caption, nothing compiled, no fused optimiser, attention of PyTorch's own choice) and a `tight` one (the same, not padded). Usual captions."""
    stage, (S, longest), args.notice, args.labels = args.table[args.stages[-1]], TEXT[args.size in ("nano", "toy")], [], False
    (dtype, _), model = (sample.pick_dtype(args.device, None, lens.SIZES[args.size].transformer.inner_dim),
                         lens.build(args.size, args.seed).to(args.device).train())
    [p.requires_grad_(False) for name, p in model.named_parameters() if name in set(model.unread())]
    optimizers, state, peak = make_optimizers(model, stage), {"bf16": dtype == torch.bfloat16, "replaced": 0}, matmul_peak(args.device, dtype)
    set_recompute(model, args.recompute)
    lens.quicken(model, fullgraph=False) if args.compile else None
    def measure(area, count):
        def gradients(length=S, ours=True):
            pick_attention(args, dtype, area, {}) if ours else sample.use_attention()
            text, mask = torch.ones(len(model.txt_norm), count, length, model.config.enc_hidden_dim), (torch.arange(length) < S).expand(count, -1)
            batch = torch.zeros(count, (area // 16) ** 2, model.config.in_channels), list(text), mask, []
            with torch.compiler.set_stance("default" if ours else "force_eager"):
                return train_step(args, argparse.Namespace(sizes=[(area, area)]), model, model, [((0, range(count), 0), 1)], count,
                                  iter([batch]), stage, state)

        def step(length=S, ours=True):
            gradients(length, ours)
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for optimizer in optimizers:
                [group.update(fused=ours, foreach=False) for group in optimizer.param_groups if "fused" in group]
                optimizer.step(), optimizer.zero_grad()
        parts = {"noise": lambda: noise_and_time(args.seed, 0, range(count), ((area // 16) ** 2, model.config.in_channels), (1.0, 1.0)),
                 "gradients": gradients}
        found = autoencoder.race({"ours": step, "naive": lambda: step(longest, False), "tight": lambda: step(S, False), **parts}, 3, args.device)
        ours, work, (noise, grads) = found["ours"][1], found["gradients"][2][-1], (found[part][1] for part in parts)
        autoencoder.tell(found, work, peak, args.device, size=args.size, dtype=str(dtype)[6:], compiled=args.compile, recompute=args.recompute,
                    pixels=f"{area}x{area}", batch=count, text_tokens=S, padded_to=longest, noise_s=noise, gradients_s=grads - noise, optimizer_s=ours - grads)

    for area, count in stage.batch.items():
        while count:
            try:
                count = measure(area, count)                                       # None: it is done
            except torch.OutOfMemoryError:
                lens.require(count > 1, f"{area} x {area}: not even one picture fits into the memory of this GPU")
                count //= 2

def train_denoiser(args):
    out, config = Path(args.out), lens.SIZES[args.size].transformer
    args.labels = not (args.data or args.lora) and any(args.table[n].labels for n in args.stages)
    _, args.vae, args.encoder = lens.load_pipeline(args.parts, args.device, None if args.size == "full" else torch.float32, parts=("vae", "text_encoder"))
    lens.require(config.in_channels == 4 * args.vae.config["latent_channels"],
                 f"--parts {args.parts}: its autoencoder is not the one that size {args.size} works with")
    model = (lens.load_transformer(args.init, args.device, torch.float32) if args.init else lens.build(args.size, args.seed).to(args.device)).train()
    lens.require(model.config == config, f"--init {args.init}: its weights are not of size {args.size}")
    args.encoder.layers = config.selected_layer_index                        # a folder of parts alone does not say which
    [p.requires_grad_(False) for name, p in model.named_parameters() if name in set(model.unread())]
    args.say(f"LoRA of rank {args.lora} on {lens.add_lora(model, args.lora, args.lora, generator=generator(args.seed))} layers") if args.lora else None
    ema = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad}).requires_grad_(False)         # what is frozen is shared
    if args.labels:                # after the copy, so that neither the average nor what is saved to sample from has it
        model.label_head = autoencoder.label_head(config.inner_dim).to(args.device)
    state = {"step": 0, "total": 0, "seen": 0, "seconds": 0.0, "bf16": None, "usual": None, "in_a_row": 0, "skipped": 0, "replaced": 0}
    dtype, why = same_everywhere(sample.pick_dtype(args.device.split(":")[0], None, config.inner_dim))
    set_recompute(model, args.recompute)
    lens.quicken(model, fullgraph=False) if args.compile else None                # FSDP's hooks and recomputation break the graph
    if args.fsdp:                  # each rank keeps a share of every weight, its average and its moments; a block is gathered when it runs
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for part in (part for m in (model, ema) for part in (*m.transformer_blocks, m)):
            fully_shard(part, mp_policy=policy)
    parallel = torch.nn.parallel.DistributedDataParallel(model) if args.ranks > 1 and not args.fsdp else model
    optimizers = make_optimizers(model, args.table[args.stages[0]])
    at = resume(args, model, ema, optimizers, state) or min(args.stages)
    state["bf16"] = dtype == torch.bfloat16 if state["bf16"] is None else state["bf16"]          # a resumed run keeps to what it began with
    kernel = pick_attention(args, dtype, args.table[max(args.stages)].home, state)
    log, args.notice = Log(out, state["total"]) if args.rank == 0 else None, on_notice()
    args.say(f"{args.size}: {sum(p.numel() for p in model.parameters()):,} parameters on {args.ranks} x {args.device}; autoencoder and "
             f"text encoder from {args.parts}\nprecision: fp32 weights, {'bf16' if state['bf16'] else 'fp32'} compute: {why}; {kernel}")
    for number in (n for n in args.stages if n >= at):
        if number > at:
            state["step"], at = 0, number
            state.pop("data", None)
        if state["step"] < (args.steps or args.table[number].steps):
            dist.barrier() if args.rank > 0 else None    # rank 0 draws the world, or indexes the shards; the others then read what it wrote
            source = (Pictures(args, args.table[number]) if args.data else
                      World(args.table[number], args.seed, args.vae, args.encoder, out / f"world-{number}.safetensors", args.device))
            dist.barrier() if args.rank == 0 and args.ranks > 1 else None
            train_stage(number, args, source, model, parallel, ema, optimizers, state, log)
    args.say(f"done: python sample.py --eval --weights {args.out}")

def export(args):
    """DIR of --out as a small checkpoint to ship, scored on 50 prompts a task: bf16, and the matrices of the blocks fp8 (e4m3) with a
    scale each, as ComfyUI's files have them [ours]. That halves the file and cost two pictures of 300 (0.920 against 0.927)."""
    transformer, vae, encoder = lens.load_pipeline(args.out, args.device, torch.float32)
    stored = {}
    for name, w in transformer.state_dict().items():                               # w: the model's own memory, so what is scored is what is stored
        stored[name] = w.copy_(w.bfloat16())
        if w.ndim == 2 and name.startswith("transformer_blocks"):
            stored[name], scale = lens.e4m3(w)
            stored[name.removesuffix("weight") + "scale_weight"] = scale.view(())
            w.copy_(stored[name].float() * scale)
    notes, vae_notes = lens.read_metadata(args.out), lens.open_safetensors(lens.weight_files(Path(args.parts) / "vae")[0]).metadata() or {}
    scores, *_ = sample.evaluate((transformer, vae, encoder), *data.bucket(int(notes["base"])), int(notes["steps"]), float(notes["guidance"]))
    encoder.model.to(torch.bfloat16)
    lens.save_pipeline(args.export, transformer, vae, encoder, {**notes, "score": json.dumps(scores), "vae": json.dumps(vae_notes)},
                       dtype=torch.bfloat16, weights=stored)
    print(f"wrote {args.export}: " + json.dumps(scores))

def main(argv=None):
    parser = argparse.ArgumentParser(description="Train the toy's text encoder, or the denoiser by flow matching. The same command again resumes.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=__doc__[__doc__.index("    python vae"):__doc__.index("The same command")])
    parser.error = sample.complain
    parser.add_argument("--size", default="toy", help="one of " + ", ".join(lens.SIZES))
    parser.add_argument("--stage", default="all", choices=("text", "1", "2", "all"), help="text: the text encoder; 1: one area; 2: all areas; all: 1, then 2")
    parser.add_argument("--out", default="runs/toy", metavar="DIR", help="checkpoint, metrics.jsonl and previews")
    parser.add_argument("--parts", metavar="DIR", help="autoencoder and text encoder (default: those of --out, else of weights/toy)")
    parser.add_argument("--init", metavar="DIR", help="start from these weights (say weights/toy) instead of random ones")
    parser.add_argument("--steps", type=int, help="steps of each stage (default: what the size and stage say)")
    parser.add_argument("--data", metavar="GLOB", help="tar shards of `data.py pack` or `cache`, say 'shards/*.tar' (default: the toy world)")
    parser.add_argument("--batch", metavar="N,N", type=lambda s: [int(n) for n in s.split(",")], help="pictures a device batch, one number an area")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="device batches a rank takes for one step")
    parser.add_argument("--recompute", default="none", choices=("none", "selective", "full"), help="activations to compute again, to save memory")
    parser.add_argument("--fsdp", action="store_true", help="under torchrun: share weights and moments among ranks (else DDP: each holds all)")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train an adapter over --init instead of all weights")
    parser.add_argument("--workers", type=int, default=4, help="processes a rank that decode --data")
    parser.add_argument("--bench", action="store_true", help="train nothing: a JSON line an area, our step beside a naive one (--size, --recompute, --compile)")
    parser.add_argument("--dry-run", action="store_true", help="train nothing: print parameters, memory and FLOPs of each setting")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu or cuda (default: CUDA if there is one)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks: 1.1 to 1.4x faster after a minute (on a CPU needs a C++ compiler)")
    parser.add_argument("--save-every", type=int, default=250, metavar="N", help="steps")
    parser.add_argument("--eval-every", type=int, default=0, metavar="N", help="steps; six tasks, 20 prompts each; 0: never")
    parser.add_argument("--preview-every", type=int, default=1000, metavar="N", help="steps; 0: never")
    parser.add_argument("--export", metavar="DIR", help="train nothing: score what --out holds and write it there in bf16, to ship")
    args = parser.parse_args(argv)
    lens.require(args.size in lens.SIZES, f"unknown size '{args.size}': choose one of {', '.join(lens.SIZES)}")
    args.stages, args.table = ((1, 2) if args.stage == "all" else (int(args.stage),) if args.stage.isdigit() else (),
                               copy.deepcopy(STAGES.get(args.size, STAGES["full"])))
    for stage in (args.table[n] for n in args.stages) if args.batch else ():
        lens.require(len(args.batch) >= len(stage.batch) and min(args.batch) > 0,
                     f"--batch: {len(stage.batch)} numbers of at least 1, for the areas {', '.join(map(str, stage.batch))}")
        stage.batch = dict(zip(stage.batch, args.batch))
    lens.require(not args.data or glob.glob(args.data), f"--data {args.data}: no file matches")
    args.guidance = TOY_GUIDANCE if args.size in ("nano", "toy") else sample.GUIDANCE
    if args.dry_run:
        return dry_run(args)
    lens.require(args.data or args.bench or args.size in ("nano", "toy"), f"--size {args.size}: name the shards to train on "
                 "with --data (`data.py pack` makes them); the toy world is for --size toy or nano")
    lens.require(min(1 if args.steps is None else args.steps, args.save_every, args.accumulate) > 0, "--steps, --save-every and --accumulate: at least 1")
    args.rank, args.ranks, args.device = join(sample.pick_device(args.device))
    lens.require(args.ranks > 1 or not args.fsdp, "--fsdp shares weights among processes: start it with torchrun --nproc-per-node N train.py ...")
    if args.bench:
        return bench(args)
    args.say = print if args.rank == 0 else lambda *_: None
    if args.rank > 0 and (args.stage == "text" or args.export):
        return                                             # small work, for one process
    sample.check_writable(args.out) if args.rank == 0 else None        # two processes would remove each other's trial file
    args.parts = args.parts or str(args.out if has_parts(args.out) else sample.TOY)
    (train_text if args.stage == "text" else export if args.export else train_denoiser)(args)

if __name__ == "__main__":
    sample.run(main)
