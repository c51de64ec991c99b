"""
train.py - training: the toy's text encoder, then the denoiser by flow matching.

Read `lens.py`, `vae.py`, `data.py` and `sample.py` first. Assumes an autoencoder and a text encoder that are settled:
a change to either means training everything after it again. From nothing to a model, on a laptop:

    python vae.py --out runs/toy                         # 1. the autoencoder
    python train.py --stage text --out runs/toy          # 2. the text encoder, as a language model on captions
    python train.py --out runs/toy                       # 3. the denoiser: stage 1 on the small area, stage 2 on all
    python sample.py --eval --weights runs/toy           #    the six-task table

    python train.py                                      # only the denoiser, over the parts shipped in weights/toy
    torchrun --nproc-per-node 2 train.py --compile       # the same, each batch shared by two processes: one a GPU, or one a core

The same command again resumes what DIR holds. DIR is a checkpoint that `sample.py --weights DIR` takes as it is.

Where this departs from the paper [ours]: the toy's pictures are encoded once and kept (drawing and encoding cost as much
as a training step); each scene is kept with several captions; the learning rate falls to zero over the last half of a
stage, since a toy run is too short for its average of weights to do that work alone; the blocks' matrices are trained by
Muon (`make_optimizers`); times sit nearer t = 1 (`TIMES`).
"""
import argparse, json, math, os, shlex, signal, sys, time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
import lens
import sample
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

    def __call__(self, **row):
        self.file.write(json.dumps(row) + "\n")


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
        for key in f.keys():
            group, name = key.split("/", 1)
            groups.setdefault(group, {})[name] = f.get_tensor(key)
    return int(meta["step"]), json.loads(meta["notes"]), groups


def optimizer_tensors(optimizers, named):
    """Moments and step counts under the parameters' names: all that an optimiser carries from step to step."""
    return {f"{name}:{k}": v for o in optimizers for name, p in named.items() if p in o.state for k, v in o.state[p].items() if torch.is_tensor(v)}


def restore_optimizers(optimizers, named, tensors):
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for key, value in tensors.items():
        name, k = key.rsplit(":", 1)
        p = named[name]
        owner[p].state[p][k] = value.to(p.device) if k != "step" else value


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
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=2))
    return dist.get_rank(), dist.get_world_size(), device


def schedule(step, steps, warmup, decay=0.5):
    """Learning-rate factor: a short rise (Adam's moments are empty at first), flat, then linear to zero over the last `decay`."""
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1, decay * steps))


# ---------------------------------------------------------------------------------------------------------------------
# Stage "text": a tokenizer and a tiny GPT-OSS, trained as a language model. Its hidden states are the denoiser's text.

SPECIAL = ("<|endoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>")
REWRITE = "Rewrite the request as a description of one picture."
# What the real tokenizer's template does with messages, in the one form that the toy needs.
CHAT_TEMPLATE = """{%- set date = current_date or "DATE" -%}
HEAD
{%- for message in messages -%}
{%- if message.role in ("system", "developer") -%}<|start|>developer<|message|># Instructions\n\n{{ message.content }}\n\n<|end|>
{%- elif message.role == "assistant" -%}{%- if message.thinking -%}<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>{%- endif -%}<|start|>assistant<|channel|>final<|message|>{{ message.content }}{%- if message.content -%}<|return|>{%- endif -%}
{%- else -%}<|start|>user<|message|>{{ message.content }}<|end|>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"""


def toy_tokenizer(seed=0, scenes=4000):
    """Byte-level BPE learned on the toy world's sentences: a common word is one token, any other text a few bytes.

    The fixed sentences of the chat form are one token each [ours]: they carry nothing, and word by word they would
    make every prompt twice as long."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    texts = [s for pair in data.GUIDELINES.values() for s in pair] * 40 + [REWRITE, "# Instructions", "system developer user assistant analysis final"] * 40
    for i in range(scenes):
        texts += [data.sample(seed, 0, i, 96, 96, style=style)[2] for style in ("dense", "brief", "vague")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)      # a word is the same token first and later in a prompt
    tokenizer.decoder = decoders.ByteLevel()
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


def rewriting(scene, rng, vague):
    """One exercise for the reasoner: (instructions, request, the dense caption that follows both)."""
    asked = data.details_for(scene, rng, "brief")
    chosen = [d for d in data.GUIDELINES if rng.random() < 0.55]
    rng.shuffle(chosen)
    instructions = " ".join([REWRITE] + [data.GUIDELINES[d][rng.integers(2)] for d in chosen])
    pair = scene.task not in ("single_object", "counting", "colors")
    details = frozenset(d for d in set(asked) | set(chosen) if d != "relation" or pair)
    return instructions, data.request(scene, asked, rng, vague), data.caption(scene, details, rng)


class Sentences(torch.utils.data.Dataset):
    """A quarter captions as the denoiser will meet them, the rest rewritings: copying a request's words is slower to learn than
    the captions' grammar. A batch is (ids [B, L], labels [B, L] with -100 where no loss counts, mask [B, L])."""

    def __init__(self, tokenizer, seed, steps, batch):
        self.tokenizer, self.seed, self.steps, self.batch = tokenizer, seed, steps, batch

    def __len__(self):
        return self.steps

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
                instructions, request, answer = rewriting(scene, rng, vague=rng.random() < 0.5)
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
    out = Path(args.out)
    steps, batch = args.steps or 3200, 48
    tokenizer = toy_tokenizer()
    model = lens.build_text_model(lens.SIZES[args.size].text_encoder, seed=args.seed, vocab_size=len(tokenizer), pad_token_id=0,
                                  eos_token_id=tokenizer.eos_token_id).to(args.device).train()
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(named.values(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    saved = load_state(out / "text" / "state.safetensors")
    step = 0
    if saved:
        step, _, groups = saved
        model.load_state_dict(groups["model"])
        restore_optimizers([optimizer], named, groups["optimizer"])
        print(f"resuming at step {step}")
    log = Log(out / "text", step)
    loader = torch.utils.data.DataLoader(Sentences(tokenizer, args.seed, steps, batch), batch_size=None, sampler=range(step, steps), num_workers=1)
    bar = tqdm(loader, initial=step, total=steps, desc="text encoder", mininterval=2)
    for ids, labels, mask in bar:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * schedule(step, steps, 100, 0.6)
        logits = model(input_ids=ids.to(args.device), attention_mask=mask.to(args.device)).logits            # [B, L, vocabulary]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(args.device), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
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

class Stage:
    """What a stage trains on. areas: bases of the buckets; batch: pictures a device, by area, so that steps of different
    areas cost about the same; scenes: how many the toy world draws, by area (captions per scene: CAPTIONS);
    lr: AdamW's; muon_lr: Muon's, for the matrices of the blocks (None: AdamW has them too);
    times: mean and standard deviation of logit(t) (None: the paper's, by the number of tokens)."""

    def __init__(self, areas, batch, steps, lr, scenes=(), muon_lr=None, times=None):
        self.areas, self.batch, self.steps, self.lr, self.muon_lr = areas, dict(zip(areas, batch)), steps, lr, muon_lr
        self.scenes, self.times = dict(zip(areas, scenes)), times


# Where the toy's times sit [ours]. What a picture shows is decided near t = 1, where nothing but the text says it, and the
# paper's mean and spread, 1.0 and 1.0, put a ninth of a run above 0.9: after 83,000 pictures from random weights the loss at
# t = 0.97 was 0.89 with mean 1.0 and 0.81 with 2.0 (0.93 without text). With mean 0 nearly no layout was ever right. But 1.75
# and 1.25 left only 8% below 0.5, where shapes get their corners, and those were then what was wrong most. This spread puts
# a quarter of a run above 0.9 and a fifth below 0.5.
TIMES = (1.25, 1.5)
STAGES = {"nano": {1: Stage((64,), (16,), 30, 1e-3, (64,), 3e-3, TIMES), 2: Stage((64, 96), (16, 8), 30, 1e-3, (64, 32), 3e-3, TIMES)},
          "toy": {1: Stage((64,), (128,), 500, 1.2e-3, (8_000,), 3e-3, TIMES),                        # [ours]
                  2: Stage((64, 96, 128), (96, 72, 48), 12000, 1.2e-3, (4_000, 24_000, 9_000), 3e-3, TIMES)},
          "full": {1: Stage((512,), (24,), 400_000, 2e-4), 2: Stage((512, 768, 1024), (24, 10, 6), 400_000, 1e-4)}}    # [paper]
CAPTIONS = 2              # kept per scene, each stating other details
BRIEF = 0.25              # [ours] share of the captions of "position" scenes that state the relation and nothing else
DROPOUT = 0.1             # [ours] share of samples trained without text: the unconditional branch that guidance needs
SPIKE, PATIENCE = 4.0, 10      # [ours] a step whose loss is not finite or over SPIKE times the usual is left out; so many in a row end the run
GUIDANCE = 3.0            # [ours] the toy's, written into its weights: 1, 2, 3 and 5 scored 0.75, 0.83, 0.80 and 0.82, and 3 was best on twice as many
CLIP, EMA = 1.0, 0.998    # [paper] gradient norm; [ours] decay of the weights' average, which is what is sampled and saved


def captions_of(scene, rng):
    """CAPTIONS sentences for a scene, each stating other details. Dense, but for some of the scenes made for a relation: a dense
    caption states the places too, and from these alone "to the left of" was never learnt, since the places already say it."""
    style = lambda: "brief" if scene.task == "position" and rng.random() < BRIEF else "dense"
    return [data.caption(scene, data.details_for(scene, rng, style()), rng) for _ in range(CAPTIONS)]


class Encoding(torch.utils.data.Dataset):
    """Chunks of scenes of one size, drawn, captioned and encoded: (size, tokens [n, h*w, C], text [sum of lengths, K * E], lengths, words)."""

    def __init__(self, chunks, seed, vae, encoder):
        self.chunks, self.seed, self.vae, self.encoder = chunks, seed, vae, encoder

    def __len__(self):
        return len(self.chunks)

    @torch.no_grad()
    def __getitem__(self, k):
        area, (height, width), numbers = self.chunks[k]
        pictures, captions, device = [], [], next(self.vae.parameters()).device
        for i in numbers:
            rng = np.random.default_rng((self.seed, area, i))
            scene = data.random_scene(rng, height, width)
            pictures.append(data.draw(scene, height, width))
            captions += captions_of(scene, rng)
        mean, _ = self.vae.encode(sample.from_pil(pictures).to(device))            # the posterior's mean: sharper than a sample
        text = [f.transpose(0, 1).flatten(1).bfloat16().cpu() for f in sample.encode(self.encoder, captions)]      # [S, K * E] each
        words = {w for c in captions for w in c.replace(",", " ").replace(".", " ").split()}
        return (height, width), self.vae.to_tokens(mean).bfloat16().cpu(), torch.cat(text), torch.tensor([len(t) for t in text]), words


class World:
    """The toy world as the denoiser meets it: every scene drawn, captioned CAPTIONS times and encoded once.

    tokens[size]   [n, h*w, C] bf16
    text[size]     [total length, K * E] bf16, the captions' features end to end; caption c of scene i is rows
                   offsets[size][CAPTIONS * i + c] up to the next offset: nothing is padded in memory."""

    def __init__(self, stage, seed, vae, encoder, path, device):
        self.stage, self.layers = stage, len(encoder.layers)
        key = {"seed": seed, "scenes": stage.scenes, "captions": CAPTIONS, "brief": BRIEF, "vae": vae.bn.running_mean.double().sum().item()}
        saved = load_state(path)
        if saved and json.loads(json.dumps(key)) == saved[1]["key"]:
            _, notes, groups = saved
        else:
            notes, groups = self.encode(seed, vae, encoder, device)
            save_state(path, 0, {"key": key, **notes}, **groups)
        self.words = notes["words"]
        parse = lambda name: tuple(int(v) for v in name.split("x"))
        self.tokens = {parse(k): v for k, v in groups["tokens"].items()}
        self.text = {parse(k): v for k, v in groups["text"].items()}
        self.offsets = {parse(k): F.pad(v.cumsum(0), (1, 0)) for k, v in groups["lengths"].items()}

    def encode(self, seed, vae, encoder, device):
        """Every scene through both frozen models; on a CPU by one process a core, since these models are too small for threads."""
        chunks = []
        for area, count in self.stage.scenes.items():
            sizes = data.BUCKETS[area]                                             # buckets in turn
            chunks += [(area, sizes[k], range(count)[k::len(sizes)][j:j + 64]) for k in range(len(sizes)) for j in range(0, len(range(count)[k::len(sizes)]), 64)]
        loader = torch.utils.data.DataLoader(Encoding(chunks, seed, vae, encoder), batch_size=None, num_workers=os.cpu_count() if device == "cpu" else 0)
        groups, words = {"tokens": {}, "text": {}, "lengths": {}}, set()
        bar = tqdm(total=sum(self.stage.scenes.values()), desc="drawing and encoding scenes", unit="scene", mininterval=2)
        for (height, width), tokens, text, lengths, seen in loader:
            for group, value in zip(groups.values(), (tokens, text, lengths)):
                group.setdefault(f"{height}x{width}", []).append(value.clone())
            words |= seen
            bar.update(len(tokens))
        bar.close()
        return {"words": sorted(words)}, {name: {size: torch.cat(parts) for size, parts in group.items()} for name, group in groups.items()}

    def batches(self, seed, epoch):
        """An epoch's batches [(size, scene numbers, caption)], a pure function of (seed, epoch): every scene once, one bucket a
        batch, and captions of like length together, so that little is padded."""
        g, found = generator(seed, epoch), []
        for size, tokens in sorted(self.tokens.items()):                           # a file gives them back in its own order
            area = min(self.stage.areas, key=lambda a: abs(math.log(size[0] * size[1] / a**2)))
            batch, order = self.stage.batch[area], torch.randperm(len(tokens), generator=g)
            captions = torch.randint(CAPTIONS, (len(tokens),), generator=g)
            lengths = self.offsets[size].diff()[CAPTIONS * order + captions[order]]
            for window in torch.arange(len(order)).split(8 * batch):               # sort inside windows only: order stays random
                ranked = window[lengths[window].argsort(stable=True)]
                found += [(size, order[chunk], captions[order[chunk]]) for chunk in ranked.split(batch)]
        return [found[i] for i in torch.randperm(len(found), generator=g)]

    def load(self, size, scenes, captions):
        """-> tokens [B, N, C] fp32, text [K x [B, S, E]], mask [B, S]."""
        rows = CAPTIONS * scenes + captions
        pieces = [self.text[size][self.offsets[size][r]:self.offsets[size][r + 1]] for r in rows.tolist()]
        longest = max(map(len, pieces))
        text = torch.stack([F.pad(p, (0, 0, 0, longest - len(p))) for p in pieces]).float()            # [B, S, K * E]
        mask = torch.arange(longest)[None] < torch.tensor([len(p) for p in pieces])[:, None]
        return self.tokens[size][scenes].float(), list(text.chunk(self.layers, -1)), mask


def noise_and_time(seed, epoch, size, scenes, shape, times):
    """One generator a sample, from (seed, epoch, size, scene): noise [B, N, C], t [B] logit-normal, dropped [B] bool.
    times: mean and standard deviation of logit(t)."""
    noise, t, dropped = [], [], []
    for i in scenes.tolist():
        g = generator(seed, epoch, *size, i)
        noise.append(torch.randn(shape, generator=g))
        t.append(torch.sigmoid(times[0] + times[1] * torch.randn((), generator=g)))            # logit-normal [paper]
        dropped.append(torch.rand((), generator=g) < DROPOUT)
    return torch.stack(noise), torch.stack(t), torch.stack(dropped)


def flow_matching_loss(model, tokens, text, mask, grid, noise, t):
    """|v_model(x_t, t, text) - (noise - tokens)|^2, per sample [B] in fp32. Rectified flow [paper]."""
    x_t = lens.add_noise(tokens, noise, t)                                         # [B, N, C]
    v = model(x_t, t, text, mask, grid).float()                                    # [B, N, C]
    return (v - lens.velocity(tokens, noise)).square().mean((1, 2))


def faster_precision(model, batch, device):
    """bf16 compute or fp32, by the best of three timed steps of each on a CPU (weights stay fp32 either way). On a GPU always bf16."""
    if device != "cpu":
        return True, "a GPU computes it faster"
    seconds = {}
    for use in (False, True):
        for _ in range(3):
            begin = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=use):
                flow_matching_loss(model, *batch).mean().backward()
            seconds[use] = min(seconds.get(use, 9e9), time.perf_counter() - begin)
    model.zero_grad()
    return seconds[True] < seconds[False], f"a step takes {seconds[True]:.2f} s in bf16 and {seconds[False]:.2f} s in fp32"


def same_everywhere(value):
    """Rank 0's value on every rank: two ranks that measure may come to two answers."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def make_optimizers(model, stage):
    """AdamW for everything [paper]; where the stage says so, Muon for the blocks' matrices [ours]: it makes each step's change
    of a matrix orthogonal, so that rare directions (a shape's corners) move as fast as common ones (the background). After
    150 seconds on two cores the held-out loss of the toy was 0.515 with it and 0.565 without, a step costing 13% more.
    Weight decay off: with norms on q, k and every input it acts on little but the scale of a short run."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in named.items() if stage.muon_lr and p.ndim == 2 and "transformer_blocks" in name and "_mod." not in name}
    adamw = torch.optim.AdamW([p for name, p in named.items() if name not in matrices], lr=stage.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    # match_rms_adamw: its steps are scaled to be as long as AdamW's would be, so the two rates are of one kind
    return [adamw] + ([torch.optim.Muon(matrices.values(), lr=stage.muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")] if matrices else [])


def train_stage(number, args, world, model, parallel, ema, optimizers, state, log):
    """One stage from state["step"] (counted inside the stage) to its last step. parallel: the model, or DDP around it; with
    more ranks each batch is shared out, so that their number changes neither what is learnt nor the noise it is learnt with."""
    stage, named = world.stage, dict(model.named_parameters())
    steps = args.steps or stage.steps
    epoch_length = len(world.batches(args.seed, 0))
    averaged, home = list(ema.parameters()), data.bucket(sample.TOY_BASE)
    epoch, batches, notice = -1, [], on_notice()
    bar = tqdm(total=steps, initial=state["step"], desc=f"stage {number}", unit="step", mininterval=2, disable=args.rank > 0)
    while state["step"] < steps:
        step = state["step"]
        if step // epoch_length != epoch:
            epoch = step // epoch_length
            stream = 1000 * number + epoch                                         # no two stages draw the same noise for a scene
            batches = world.batches(args.seed, stream)
        size, scenes, captions = batches[step % epoch_length]
        grid = (size[0] // 16, size[1] // 16)
        count = len(scenes)
        mine = slice(args.rank, None, args.ranks)                                  # this rank's part of the batch
        share = len(scenes[mine]) / count                                          # 0 where a small batch has none left for it:
        taken = mine if share else slice(1)                                        # then it computes one that counts for nothing
        scenes, captions = scenes[taken], captions[taken]
        tokens, text, mask = world.load(size, scenes, captions)
        noise, t, dropped = noise_and_time(args.seed, stream, size, scenes, tokens.shape[1:], stage.times or (lens.timestep_mu(tokens.shape[1]), 1.0))
        mask = mask & ~dropped[:, None]                                            # no visible text is no text at all
        batch = [tokens, text, mask, grid, noise, t]
        batch = [[f.to(args.device) for f in b] if isinstance(b, list) else b.to(args.device) if torch.is_tensor(b) else b for b in batch]
        if state["bf16"] is None:
            state["bf16"], why = same_everywhere(faster_precision(model, batch, args.device))
            args.say(f"precision: fp32 weights, {'bf16' if state['bf16'] else 'fp32'} compute: {why}")
        begin = time.perf_counter()
        factor = schedule(step, steps, 100)
        for optimizer, lr in zip(optimizers, (stage.lr, stage.muon_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=state["bf16"]):
            losses = flow_matching_loss(parallel, *batch)
        (losses.mean() * share * args.ranks).backward()                            # DDP averages over ranks: the mean over the whole batch
        norm = torch.nn.utils.clip_grad_norm_(named.values(), CLIP).item()
        seen = torch.zeros(3, count, device=args.device)                           # what every rank must know of every sample
        if share:
            seen[:, mine] = torch.stack([losses.detach(), batch[-1], torch.full_like(losses, len(notice))])
        if args.ranks > 1:
            dist.all_reduce(seen)
        seen, t, stop = seen.cpu()                                                 # [B] each, one transfer
        loss, stop = seen.mean().item(), bool(stop.any())                          # a notice to one rank stops all at the same step
        # One bad batch must not reach the weights: a NaN there is for ever, and Adam remembers a spike for hundreds of steps.
        good = math.isfinite(loss) and math.isfinite(norm) and loss < SPIKE * (state["usual"] or math.inf)
        for optimizer in optimizers:
            if good:
                optimizer.step()
            optimizer.zero_grad()
        state["step"], state["total"] = step + 1, state["total"] + 1
        state["in_a_row"], state["skipped"] = 0 if good else state["in_a_row"] + 1, state["skipped"] + (not good)
        if good:
            state["usual"] = loss + 0.98 * ((state["usual"] or loss) - loss)
        elif state["in_a_row"] == PATIENCE:
            raise LensError(f"{PATIENCE} steps in a row had a loss that was not finite or over {SPIKE:g} times the usual, {loss:.3g} at the last (step {state['total']}): "
                            f"none of them touched the weights; the last checkpoint in {args.out} is whole. Try a lower learning rate")
        with torch.no_grad():                                                      # a young average forgets its random start quickly
            torch._foreach_lerp_(averaged, list(named.values()), 1 - min(EMA, (1 + state["total"]) / (10 + state["total"])))
        state["seconds"] += time.perf_counter() - begin
        bins = [seen[(t >= k / 4) & (t < (k + 1) / 4)].mean().item() for k in range(4)]                # where in t the model is weak
        row = dict(step=state["total"], stage=number, loss=loss if good else None, grad_norm=norm if good else None, lr=stage.lr * factor,
                   loss_by_t=[round(b, 4) if math.isfinite(b) else None for b in bins],
                   size=f"{size[1]}x{size[0]}", skipped=state["skipped"], seconds=round(state["seconds"], 2))
        bar.update()
        if step % 10 == 0:
            bar.set_postfix_str(f"loss {loss:.3f}, {count / (time.perf_counter() - begin):.0f} pictures/s")
        last = state["step"] == steps
        if args.rank == 0:
            if args.preview_every and (state["step"] % args.preview_every == 0 or last):
                rows = [r for task in ("position", "counting") for r in sample.held_out(task, 6, *home)]
                pictures = sample.generate([r[2] for r in rows], (ema, args.vae, args.encoder))
                sample.contact_sheet(pictures, 6).save(Path(args.out) / f"preview-{state['total']:06d}.png")
            if args.eval_every and (state["step"] % args.eval_every == 0 or last):
                scores, *_ = sample.evaluate((ema, args.vae, args.encoder), *home, 20, GUIDANCE, 20, progress=False)
                state["scores"] = scores
                bar.write(f"step {state['total']}: " + ", ".join(f"{k} {v:.2f}" for k, v in scores.items()))
                row.update(scores)
            log(**row)
            if state["step"] % args.save_every == 0 or last or stop:
                save(args, number, model, ema, optimizers, state, world.words)
        if stop:
            bar.close()
            args.say(f"SIGTERM: saved {args.out} at step {state['total']}; the same command goes on from there")
            sys.exit(0)
    bar.close()


def save(args, number, model, ema, optimizers, state, words):
    """The resume state in one file, and the averaged weights in the released layout, which sample.py takes as it is."""
    out, named = Path(args.out), dict(model.named_parameters())
    save_state(out / "state.safetensors", state["total"], {**state, "stage": number}, model=model.state_dict(), ema=ema.state_dict(),
               optimizer=optimizer_tensors(optimizers, named))
    parts = None if has_parts(out) else os.path.relpath(args.parts, out)
    notes = dict(command=shlex.join(["python", "train.py", *sys.argv[1:]]), seed=args.seed, trained_steps=state["total"], trained_seconds=round(state["seconds"]),
                 score=json.dumps(state.get("scores", {})), steps=20, guidance=GUIDANCE, base=sample.TOY_BASE, words=json.dumps(words))
    lens.save_pipeline(out, transformer=ema, metadata=notes, base=parts)


def has_parts(folder):
    return all((Path(folder) / part / "config.json").exists() for part in ("vae", "text_encoder"))


def train_denoiser(args):
    out = Path(args.out)
    _, args.vae, args.encoder = lens.load_pipeline(args.parts, args.device, torch.float32, parts=("vae", "text_encoder"))
    fresh = lambda: lens.load_transformer(args.init, args.device, torch.float32) if args.init else lens.build(args.size, args.seed).to(args.device)
    model, ema = fresh().train(), fresh().requires_grad_(False)
    if model.config != lens.SIZES[args.size].transformer:
        raise LensError(f"--init {args.init}: its weights are not of size {args.size}")
    args.encoder.layers = model.config.selected_layer_index                        # a folder of parts alone does not say which
    dead = set(model.unread())
    for name, p in model.named_parameters():
        p.requires_grad_(name not in dead)
    named = dict(model.named_parameters())
    optimizers = make_optimizers(model, STAGES[args.size][args.stages[0]])
    if args.device == "cpu":
        # Flash attention pays on long sequences; on these of 60 tokens its backward took half of a step on a CPU.
        torch.backends.cuda.enable_flash_sdp(False)
    state, first = {"step": 0, "total": 0, "seconds": 0.0, "bf16": None, "usual": None, "in_a_row": 0, "skipped": 0}, min(args.stages)
    if saved := load_state(out / "state.safetensors"):
        _, kept, groups = saved
        state.update(kept)
        first = state.pop("stage")
        model.load_state_dict(groups["model"])
        ema.load_state_dict(groups["ema"])
        restore_optimizers(optimizers, named, groups["optimizer"])
        args.say(f"resuming {out} at step {state['total']} (stage {first}, step {state['step']})")
    if args.compile:
        for block in model.transformer_blocks:             # in place: the weights keep their names
            block.compile(dynamic=True)                    # one program for all sizes and text lengths
    parallel = torch.nn.parallel.DistributedDataParallel(model) if args.ranks > 1 else model
    log = Log(out, state["total"]) if args.rank == 0 else None
    args.say(f"{args.size}: {sum(p.numel() for p in model.parameters()):,} parameters on {args.ranks} x {args.device}; autoencoder and text encoder from {args.parts}")
    for number in args.stages:
        if number < first:
            continue
        if number > first:
            state["step"], first = 0, number
        if state["step"] < (args.steps or STAGES[args.size][number].steps):
            if args.rank > 0:
                dist.barrier()                             # rank 0 draws the world, the others then read its file
            world = World(STAGES[args.size][number], args.seed, args.vae, args.encoder, out / f"world-{number}.safetensors", args.device)
            if args.rank == 0 and args.ranks > 1:
                dist.barrier()
            train_stage(number, args, world, model, parallel, ema, optimizers, state, log)
    args.say(f"done: python sample.py --eval --weights {args.out}")


def export(args):
    """DIR of --out as a small checkpoint to ship: every part in bf16, scored on 50 prompts a task, its story in the metadata.

    The denoiser's numbers keep 4 of bf16's 7 bits of mantissa [ours]: nothing was lost (0.797 against 0.790 with 7 bits; with 3
    it was 0.747), and git, which keeps every version for ever, packs it in 5.3 MiB instead of 7.1."""
    transformer, vae, encoder = lens.load_pipeline(args.out, args.device, torch.float32)
    for p in transformer.parameters():                                             # fp32 has 23 bits: round half up at the 4th
        p.data = ((p.data.view(torch.int32) + (1 << 18)) >> 19 << 19).view(torch.float32)
    notes, vae_notes = lens.read_metadata(args.out), lens.open_safetensors(lens.weight_files(Path(args.parts) / "vae")[0]).metadata() or {}
    scores, *_ = sample.evaluate((transformer, vae, encoder), *data.bucket(int(notes["base"])), int(notes["steps"]), float(notes["guidance"]))
    encoder.model.to(torch.bfloat16)
    lens.save_pipeline(args.export, transformer, vae, encoder, {**notes, "score": json.dumps(scores), "vae": json.dumps(vae_notes)}, dtype=torch.bfloat16)
    print(f"wrote {args.export}: " + json.dumps(scores))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train the toy's text encoder, or the denoiser by flow matching. The same command again resumes.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, epilog=__doc__[__doc__.index("    python vae"):__doc__.index("The same command")])
    parser.error = sample.complain
    parser.add_argument("--size", default="toy", help="one of " + ", ".join(lens.SIZES))
    parser.add_argument("--stage", default="all", choices=("text", "1", "2", "all"), help="text: the text encoder; 1: small area; 2: all areas; all: 1, then 2")
    parser.add_argument("--out", default="runs/toy", metavar="DIR", help="checkpoint, metrics.jsonl and previews")
    parser.add_argument("--parts", metavar="DIR", help="where the autoencoder and text encoder are (default: DIR of --out if it has them, else weights/toy)")
    parser.add_argument("--init", metavar="DIR", help="start from these weights (say weights/toy) instead of random ones")
    parser.add_argument("--steps", type=int, help="steps of each stage (default: what the size and stage say)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu or cuda (default: CUDA if there is one)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks: 1.4x faster after a minute (on a CPU needs a C++ compiler)")
    parser.add_argument("--save-every", type=int, default=250, metavar="N", help="steps")
    parser.add_argument("--eval-every", type=int, default=0, metavar="N", help="steps; six tasks, 20 prompts each; 0: never")
    parser.add_argument("--preview-every", type=int, default=500, metavar="N", help="steps; 0: never")
    parser.add_argument("--export", metavar="DIR", help="train nothing: score what --out holds and write it there in bf16, to ship")
    args = parser.parse_args(argv)
    if args.size not in lens.SIZES:
        raise LensError(f"unknown size '{args.size}': choose one of {', '.join(lens.SIZES)}")
    if args.size not in ("nano", "toy"):
        raise LensError(f"--size {args.size}: training from shards of real pictures is not built yet; the toy world trains --size toy or nano")
    if args.steps is not None and args.steps < 1 or args.save_every < 1:
        raise LensError("--steps and --save-every must be at least 1")
    args.rank, args.ranks, args.device = join(sample.pick_device(args.device))
    args.say = print if args.rank == 0 else lambda *_: None
    if args.rank > 0 and (args.stage == "text" or args.export):
        return                                             # small work, for one process
    out = Path(args.out)
    if args.rank == 0:                                     # one process: two would remove each other's trial file
        sample.check_writable(out)
    if args.stage == "text":
        return train_text(args)
    args.parts = args.parts or str(out if has_parts(out) else sample.TOY)
    if args.export:
        return export(args)
    args.stages = (1, 2) if args.stage == "all" else (int(args.stage),)
    train_denoiser(args)


if __name__ == "__main__":
    sample.run(main)
