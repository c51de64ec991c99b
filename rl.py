"""
rl.py - reward RL with rubrics: pictures are judged fact by fact, and DiffusionNFT makes the good ones likelier.

Read the five files before this one first. Assumes a trained model (`--init`, default weights/toy), which stays frozen: what
is learnt is a LoRA. On the toy world the judge is the checker, so everything runs offline and can be verified:

    python rl.py --out runs/rl                           # from weights/toy; the same command again resumes
    python sample.py --eval --lora runs/rl --guidance 1  # the six tasks, against the same without --lora
    python rl.py --judge-check                           # is the judge right on pictures whose facts are known?
    python rl.py --search --out runs/search              # no training: a better system prompt for the reasoner, the same judge deciding
    python sample.py --eval --requests brief --reason --system-prompt runs/search/best.txt

    python rl.py --write-prompts prompts.jsonl --endpoint URL --model NAME         # real use: an LLM writes prompts and rubrics,
    torchrun --nproc-per-node 8 rl.py --size full --init DIR_OR_REPO --data prompts.jsonl --endpoint URL --model NAME    # a VLM judges
    python rl.py --size full --dry-run                   # what one step would take

The story in one paragraph. The `old` policy makes a group of pictures for each prompt, from other noises, without guidance.
A judge answers each rubric of each picture with yes or no; the mean is its reward. Against the mean of its group a reward
becomes an advantage, and that a share r in [0, 1]: how much of this picture is something to move towards, and 1 - r to move away from.
No likelihood, no trajectory is kept: the loss is flow matching's own, at noise levels of the sampler, on the model's own pictures.

Where this departs from the paper [ours]: the second-order solver is Adams-Bashforth's (one forward a step; the paper does not
name its own); the toy takes fewer and smaller groups, fewer steps and a smaller rank (`SETTINGS`).
"""
import argparse, collections, functools, itertools, json, math, re, shlex, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import lens
import sample
import train
from lens import LensError

# ---------------------------------------------------------------------------------------------------------------------
# Prompts: taxonomy -> category -> item -> drawn dimensions -> prompt, and the rubrics that it will be judged by.
# A row is {category, item, dimensions, prompt, rubrics: [{name, check, (fact), (held_out)}]}, the toy's and a file's alike.

TAXONOMY = {  # the categories are the paper's, what is inside them [ours]
    "Human": ("portraits", "people at work", "families and groups", "sports", "dancers and musicians"),
    "Object": ("tools", "furniture", "vehicles", "instruments", "household things"),
    "Animal": ("mammals", "birds", "fish and sea life", "insects", "reptiles and amphibians"),
    "Plant": ("trees", "flowers", "vegetables", "mosses and ferns", "cacti"),
    "Scene": ("cities", "mountains", "coasts", "interiors", "villages and farms"),
    "Food": ("dishes", "baking", "drinks", "fruit", "street food"),
    "Event": ("festivals", "weddings", "concerts", "competitions", "markets"),
    "Fictional World": ("dragons and beasts", "space", "fairy tales", "cities of the future", "mythology"),
    "Text": ("signs", "posters", "book covers", "labels", "handwriting"),
    "UI and Graphic Design": ("app screens", "dashboards", "logos", "icons", "infographics")}
DIMENSIONS = ("attribute", "spatial relationship", "count", "interaction", "color")            # one to four of them are drawn [paper]
# the global rubric [paper]
COHERENT = {"name": "coherent", "check": "The whole picture is structurally coherent and physically plausible."}
# Judged but never rewarded: where it falls while the reward rises, the reward is being gamed. The checker passes over specks
# that are smaller than any object, so a policy that only pleases the checker is free to leave them.
CLEAN = {"name": "clean", "check": "There are no stray specks or smears.", "held_out": True}

def fact_words(fact):
    """A fact of the toy world as a sentence that a judge can check."""
    noun = lambda ref, n=1: " ".join(w for w in (ref[1], ref[0] or "object") if w) + ("" if n == 1 else "es" if ref[0] == "cross" else "s")
    return {"total": lambda: f"There are exactly {fact.value} objects in all.",
            "count": lambda: f"There are exactly {fact.value} {noun(fact.subject, fact.value)}.",
            "size": lambda: f"Every {noun(fact.subject)} is {fact.value}.",
            "place": lambda: f"There is a {noun(fact.subject)} {fact.value} of the picture.",
            "relation": lambda: f"A {noun(fact.subject)} is {fact.value} a {noun(fact.other)}.",
            "background": lambda: f"The background is {fact.value}."}[fact.kind]()

def toy_row(seed, i, tasks, sizes, style="dense"):
    """Row i of the toy's prompts: its task in turn, its picture's size drawn; the rubrics are what its caption claims."""
    size = sizes[int(np.random.default_rng((seed, i, 1)).integers(len(sizes)))]
    scene, details, prompt = sample.sampled(seed, 77, i, *size, task=tasks[i % len(tasks)], style=style)
    rubrics = [{"name": fact.kind, "check": fact_words(fact), "fact": fact} for fact in data.facts(scene, details)]
    return {"category": scene.task, "item": scene.objects[0].shape, "dimensions": sorted(details), "prompt": prompt,
            "size": size, "rubrics": rubrics + [COHERENT, CLEAN]}

def read_rows(path, sizes):
    """Rows of a JSON lines file; the sizes take turns. Raises LensError."""
    rows = []
    for n, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else [], 1):
        with lens.told(f"--data {path}, line {n}: not a prompt with rubrics"):
            row = json.loads(line)
            rubrics = [{k: rubric[k] for k in ("name", "check", "held_out") if k in rubric or k != "held_out"} for rubric in row["rubrics"]]
            rows.append({**row, "prompt": row["prompt"], "category": row.get("category", ""), "size": sizes[n % len(sizes)],
                         "rubrics": rubrics + [COHERENT]})
    lens.require(rows, f"--data {path}: no prompts there (rl.py --write-prompts makes such a file)")
    return rows

WRITE_ITEMS = ("List {count} different concrete things that a picture of the kind '{sub}' ({category}) could show. "
               "Reply with a JSON list of short strings, nothing else.")
WRITE_ROW = ("Write one dense prompt of about 80 English words for a picture of: {item} ({sub}, {category}). "
             "It must state: {dimensions}. "
             "Then write up to ten rubrics, each one fact of the prompt that can be seen to be so or not. "
             "Reply with one JSON object, nothing else: "
             "{{\"prompt\": \"...\", \"rubrics\": [{{\"name\": \"two words\", \"check\": \"...\"}}]}}")

def parsed(text, opening="{"):
    """The JSON value inside an answer, whatever stands around it; None where there is none."""
    begin, end = (text or "").find(opening), (text or "").rfind({"{": "}", "[": "]"}[opening])
    try:
        return json.loads(text[begin:end + 1]) if 0 <= begin < end else None
    except ValueError:
        return None

def write_prompts(args):
    """An LLM fills the taxonomy: items of each sub-category, then a prompt and rubrics for each item. Every answer is kept beside
    the file, so the same command again asks only for what is missing. Prints the coverage of the categories."""
    ask = data.Endpoint(args.endpoint, args.model, f"{args.write_prompts}.answers")
    subs = [(category, sub) for category, inside in TAXONOMY.items() for sub in inside]
    each = -(-args.pool // len(subs))
    lists = ask.ask(subs, lambda s: [{"role": "user", "content": WRITE_ITEMS.format(count=each, sub=s[1], category=s[0])}])
    items = [(category, sub, str(item)) for (category, sub), answer in zip(subs, lists) for item in (parsed(answer, "[") or [])[:each]]
    rng, todo = np.random.default_rng(args.seed), []
    for item in items:
        todo.append((*item, [str(d) for d in rng.permutation(DIMENSIONS)[:rng.integers(1, 5)]]))
    answers = ask.ask(todo, lambda t: [{"role": "user", "content": WRITE_ROW.format(category=t[0], sub=t[1], item=t[2],
                                                                                    dimensions=", ".join(t[3]))}])
    rows, counts = [], collections.Counter()
    for (category, sub, item, dimensions), answer in zip(todo, answers):
        row = parsed(answer)
        if isinstance(row, dict) and isinstance(row.get("prompt"), str) and row["prompt"].strip() and isinstance(row.get("rubrics"), list):
            rubrics = [{"name": str(r["name"]), "check": str(r["check"])} for r in row["rubrics"][:10]
                       if isinstance(r, dict) and {"name", "check"} <= r.keys()]
            if rubrics:
                rubrics[-1]["held_out"] = len(rubrics) > 3                         # one fact in each prompt that no reward sees
                rows.append(dict(category=category, subcategory=sub, item=item, dimensions=dimensions,
                                 prompt=row["prompt"].strip(), rubrics=rubrics))
                counts[category] += 1
    print("".join(f"{category:24} {counts[category]:6}\n" for category in TAXONOMY)
          + f"{len(todo) - len(rows)} of {len(todo)} answers were no prompt with rubrics"
          + f"; failed: {dict(collections.Counter(ask.failed))}" * bool(ask.failed))
    lens.require(rows, f"{args.endpoint} gave no usable prompt; is the URL right up to and with /v1, and LENS_API_KEY set?")
    lens.replace_file(args.write_prompts, lambda new: new.write_text("".join(json.dumps(row) + "\n" for row in rows)))

# ---------------------------------------------------------------------------------------------------------------------
# Judges. The protocol: judge(pictures, rows) -> for each picture its rubrics' answers, each True, False or None (failed).

class Checker:
    """The toy world's judge: it looks at the pixels alone, as `sample.check`."""
    failed = ()

    def __call__(self, pictures, rows):
        answers = []
        for picture, row in zip(pictures, rows):
            seen = sample.look(picture)
            facts = iter(sample.check(picture, [rubric["fact"] for rubric in row["rubrics"] if "fact" in rubric], seen))
            own = {"coherent": lambda: all(o.shape != "unclear" for o in seen[0]), "clean": lambda: self.specks(picture, seen[0]) < 0.01}
            answers.append([next(facts) if "fact" in rubric else own[rubric["name"]]() for rubric in row["rubrics"]])
        return answers

    @staticmethod
    def specks(picture, found):
        """Share of the picture that is coloured and belongs to no object."""
        rgb = np.asarray(picture, np.float32)[..., :3] / 255
        return float((rgb.max(-1) - rgb.min(-1) > 0.22).mean()) - sum(math.pi * o.size**2 for o in found)

ASK_JUDGE = ("Look at the picture. For each statement below, say whether it holds: 1 for yes, 0 for no. "
             "Reply with one JSON object from the statement's number to 1 or 0, nothing else.\n")

class EndpointJudge:
    """A vision-language model behind an OpenAI-compatible endpoint: all rubrics of a picture in one request, JSON back. Answers are
    kept by content in a journal: a picture that was judged before costs nothing. What fails is None, and counted in `failed`."""

    def __init__(self, url, model, journal, **how):
        self.endpoint = data.Endpoint(url, model, journal, **how)
        self.failed = self.endpoint.failed

    def __call__(self, pictures, rows):
        words = lambda row: ASK_JUDGE + "\n".join(f"{k}. {rubric['check']}" for k, rubric in enumerate(row["rubrics"], 1))
        asked = self.endpoint.ask(list(zip(pictures, rows)), lambda item: data.chat_about(item[0], words(item[1])))
        answers = []
        for text, row in zip(asked, rows):
            found = parsed(text)
            found = found if isinstance(found, dict) else {}
            answers.append([{"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
                            .get(str(found.get(str(k))).lower()) for k in range(1, len(row["rubrics"]) + 1)])
            if text is not None and None in answers[-1]:
                self.failed.append("nonsense")
        return answers

def false_fact(fact, rng):
    """A claim of the same kind that does not hold where `fact` does, or None."""
    if fact.kind in ("total", "count"):
        return fact._replace(value=fact.value + int(rng.integers(1, 3)))
    others = {"size": ("small", "large"), "background": tuple(data.TONES), "place": sum(data.PLACES, ()),
              "relation": tuple(data.RELATIONS)}[fact.kind]
    if fact.kind == "relation":                                                    # only the opposite is surely wrong
        return fact._replace(value={"to the left of": "to the right of", "above": "below"}.get(fact.value)
                                   or {"to the right of": "to the left of", "below": "above"}[fact.value])
    return fact._replace(value=str(rng.choice([o for o in others if o != fact.value])))

def judge_check(judge, count, seed, size):
    """Scores a judge on drawn scenes with true and with altered claims: {kind: [true ones affirmed, of, altered ones denied, of]}, failures."""
    pictures, rows = [], []
    for i in range(count):
        row, rng = toy_row(seed + 1, i, data.TASKS, [size]), np.random.default_rng((seed, i))
        scene, *_ = sample.sampled(seed + 1, 77, i, *size, task=data.TASKS[i % len(data.TASKS)])
        facts = [rubric["fact"] for rubric in row["rubrics"] if "fact" in rubric]
        wrong = [f for f in (false_fact(fact, rng) for fact in facts if not (fact.kind == "place" and len(scene.objects) > 1)) if f]
        pictures.append(data.draw(scene, *size))
        rows.append({**row, "rubrics": [{"name": f.kind, "check": fact_words(f), "fact": f, "true": k < len(facts)}
                                        for k, f in enumerate(facts + wrong)]})
    table, failures = collections.defaultdict(lambda: [0, 0, 0, 0]), 0
    for answers, row in zip(judge(pictures, rows), rows):
        for answer, rubric in zip(answers, row["rubrics"]):
            failures += answer is None
            if answer is not None:
                side = 0 if rubric["true"] else 2
                table[rubric["name"]][side] += answer == rubric["true"]
                table[rubric["name"]][side + 1] += 1
    return dict(table), failures

# ---------------------------------------------------------------------------------------------------------------------
# DiffusionNFT.

def advantages(rewards):
    """[P, G] rewards, NaN where the judge failed -> [P, G] advantages: against the mean of the prompt's group, over the spread of the
    whole step (groups that agree must not be blown up). A failed judgement is no reward at all: its advantage is 0."""
    known = ~rewards.isnan()
    # in fp32 a group that agrees would be a rounding away from its mean
    value = rewards.nan_to_num().double()
    mean = value.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp_min(1)
    spread = value[known].std(correction=0) if known.any() else value.new_zeros(())
    return torch.where(known, (value - mean) / (spread + 1e-4), 0.0).float()

def optimality(advantage):
    """r = clip(clip(A, +-5) / 10 + 1/2, 0, 1): how much of a picture is to be moved towards (the DiffusionNFT code's form)."""
    return (advantage.clamp(-5, 5) / 10 + 0.5).clamp(0, 1)

def nft_loss(v, v_old, v_ref, x_t, x0, t, r, beta=1.0, kl=1e-4, adaptive=True):
    """DiffusionNFT's loss per sample [B], and |v - v_ref|^2 per sample [B].

    v, v_old, v_ref [B, N, C]  velocities of the learning policy, of the one that made the pictures, of the model without adapters
    x0, x_t [B, N, C]          a picture of the old policy, and the same noised to t [B];  r [B]: its optimality
    beta                       how far v+ and v- stand apart from v_old;  kl: weight of |v - v_ref|^2 [paper: 1 and 1e-4]
    adaptive                   False: weights of 1, for the checks with known answers

    v+ = (1 - b) v_old + b v and v- = (1 + b) v_old - b v are mirror images: to pull v- to a bad picture pushes v away from it."""
    plus, minus = (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v
    total = 0
    for share, branch in ((r, plus), (1 - r, minus)):
        error = lens.data_prediction(x_t, branch, t) - x0                          # [B, N, C]
        weight = error.detach().double().abs().mean((1, 2)).clamp_min(1e-5).float() if adaptive else 1.0
        total = total + share * error.square().mean((1, 2)) / weight
    drift = (v - v_ref).square().mean((1, 2))
    return total / beta + kl * drift, drift

@torch.no_grad()
def rollout(model, noise, text, grid, steps):
    """Second-order sampling without guidance, one forward a step (Adams-Bashforth: the velocity goes on changing as it just did):
    noise [G, N, C], text K x [G, S, E] -> tokens [G, N, C]. The last step is Euler's: it is as long as the two before it."""
    levels = lens.sigmas(noise.shape[1], steps).tolist()
    context, modulation = model.prepare(text, None, grid), model.modulation(torch.tensor(levels[:-1], device=noise.device))
    x, dtype, before = noise.float(), model.proj_out.weight.dtype, None
    for i in range(steps):
        v, step = model.velocity_from(x.to(dtype), modulation.at(i), context).float(), levels[i + 1] - levels[i]
        slope = 0.0 if before is None or i == steps - 1 else (v - before) / (levels[i] - levels[i - 1])
        x, before = x + step * (v + step / 2 * slope), v
    return x

class Settings(NamedTuple):
    prompts: int         # groups a step, all ranks together
    group: int           # pictures a prompt
    rank: int            # of the LoRA
    alpha: float
    lr: float
    steps: int
    sampler_steps: int
    times: int           # noise levels a picture is trained at
    base: int            # the area of the nine sizes
    batch: int           # noised pictures a forward in training

SETTINGS = {"nano": Settings(4, 4, 4, 4.0, 1e-3, 4, 4, 2, 64, 32),
            "toy": Settings(12, 12, 8, 8.0, 3e-3, 30, 10, 2, 128, 48),                       # [ours]
            "full": Settings(48, 24, 64, 128.0, 3e-4, 180, 20, 4, 1024, 4)}                     # [paper] but times and batch
BETA, KL, DECAY = 1.0, 1e-4, 0.9       # [paper], [paper]; [ours] of the average of adapters that is evaluated and saved
ADAM_BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 1e-4                           # [paper]

def gathered(value):
    """[value of every rank]."""
    box = [None] * dist.get_world_size() if dist.is_initialized() else [value]
    if dist.is_initialized():
        dist.all_gather_object(box, value)
    return box

def reward_of(answers, rubrics):
    """Mean of the rewarded rubrics' answers that came, or NaN where none did."""
    known = [a for a, rubric in zip(answers, rubrics) if a is not None and not rubric.get("held_out")]
    return sum(known) / len(known) if known else math.nan

def make_group(args, model, vae, text, step, p, size, how):
    """One prompt's pictures by the active policy: tokens [G, N, C] and PIL images. Each noise has its own generator."""
    grid = (size[0] // 16, size[1] // 16)
    shape, k = (grid[0] * grid[1], model.config.in_channels), max(1, how.batch)
    noise = torch.stack([torch.randn(shape, generator=train.generator(args.seed, step, p, g)) for g in range(how.group)]).to(args.device)
    tokens, pictures = [], []
    for part in noise.split(k):
        tokens.append(rollout(model, part, [layer.expand(len(part), -1, -1) for layer in text], grid, how.sampler_steps))
        pictures += sample.autoencoder.to_pil(vae.decode(vae.to_latent(tokens[-1], grid).to(next(vae.parameters()).dtype)))
    return torch.cat(tokens), pictures

def group_loss(args, model, parallel, tokens, r, text, step, p, size, how, total, sync):
    """Adds one group's gradient to the adapter `new`; -> (sum of losses, sum of drifts). Noise levels are the sampler's own."""
    levels, rng = lens.sigmas(tokens.shape[1], how.sampler_steps)[:-1], train.generator(args.seed, step, p, 10**6)
    # [T * G]
    t = torch.stack([levels[torch.randperm(len(levels), generator=rng)[:how.times]] for _ in range(len(tokens))], 1).flatten()
    x0, r = tokens.repeat(how.times, 1, 1), r.repeat(how.times)                    # [T * G, N, C], [T * G]
    noise, sums = torch.randn(x0.shape, generator=rng), torch.zeros(2)
    grid, dtype, parts = (size[0] // 16, size[1] // 16), model.proj_out.weight.dtype, range(0, len(x0), how.batch)
    for k in parts:
        part = slice(k, k + how.batch)
        clean, times = x0[part].to(args.device), t[part].to(args.device)
        x_t = lens.add_noise(clean, noise[part].to(args.device), times)
        given = [layer.expand(len(clean), -1, -1) for layer in text]
        with torch.no_grad():                                                      # the frozen policies
            lens.set_lora(model, "old")
            v_old = model(x_t.to(dtype), times, given, None, grid).float()
            lens.set_lora(model, None)
            v_ref = model(x_t.to(dtype), times, given, None, grid).float()
        lens.set_lora(model, "new")
        if args.ranks > 1:
            parallel.require_backward_grad_sync = sync and k == parts[-1]
        loss, drift = nft_loss(parallel(x_t.to(dtype), times, given, None, grid).float(), v_old, v_ref, x_t, clean, times,
                               r[part].to(args.device), BETA, KL)
        (loss.sum() * args.ranks / total).backward()                               # DDP averages over ranks: the mean of the whole step
        sums += torch.stack([loss.detach().sum(), drift.detach().sum()]).cpu()
    return sums

def looks(pictures):
    """(brightness, saturation) in [0, 1] of PIL images: a reward that is gamed often shows here first."""
    hsv = np.stack([np.asarray(p.convert("HSV").resize((32, 32)), np.float32) / 255 for p in pictures])
    return float(hsv[..., 2].mean()), float(hsv[..., 1].mean())

class Watch:
    """Says when the reward rises while diversity or the rubrics that no reward sees fall: averages of ten steps, against the first ten."""

    def __init__(self):
        self.first, self.last = [], collections.deque(maxlen=10)

    def __call__(self, reward, spread, held_out):
        self.last.append((reward, spread, held_out))
        self.first += [self.last[-1]] if len(self.first) < 10 else []
        (r0, d0, h0), (r1, d1, h1) = np.mean(self.first, 0), np.mean(self.last, 0)
        if r1 <= r0 + 0.02:
            return ""
        return ((f"diversity fell to {d1 / d0:.2f} of the start's" if d1 < 0.8 * d0 else "")
                or (f"the held-out rubrics fell from {h0:.2f} to {h1:.2f}" if h1 < h0 - 0.05 else ""))

def evaluate(args, model, vae, encoder, per_task):
    """Six tasks at guidance 1 with the averaged adapter, and diversity: 24 held-out prompts, 6 seeds each."""
    lens.set_lora(model, "ema")
    size, how = data.bucket(args.how.base), args.how
    scores, *_ = sample.evaluate((model, vae, encoder), *size, sample.STEPS, 1.0, per_task, progress=False)
    spread = []
    for k in range(24):
        (text,) = sample.encode(encoder, [sample.held_out(data.TASKS[k % 6], 4, *size)[k // 6][2]])
        tokens, _ = make_group(args, model, vae, list(text[:, None].to(args.device)), 10**6, k, size, how._replace(group=6))
        spread.append(sample.diversity(tokens))
    return {**scores, "diversity": round(float(np.mean(spread)), 4)}

def save(args, model, optimizer, named, state):
    """The state (both adapters, their average, moments, counts) in one file, and the average in PEFT's format."""
    groups = {name: {f"{n}.{ab}": getattr(layer, f"lora_{ab}")[name].detach()
                     for n, layer in lens.lora_layers(model, name).items() for ab in "AB"} for name in ("new", "old", "ema")}
    lens.save_lora(model, args.out, "ema", dict(
        command=shlex.join(["python", "rl.py", *sys.argv[1:]]), seed=args.seed, trained_steps=state["step"],
        trained_seconds=round(state["seconds"]), base=json.dumps(state["base"]), score=json.dumps(state["scores"]),
        init=str(args.init)))
    train.save_state(Path(args.out) / "state.safetensors", state["step"], state, **groups,
                     optimizer=train.optimizer_tensors([optimizer], named))

def resume(args, model, optimizer, named):
    """Fills the adapters and the optimiser from --out; -> the state of the loop, or a fresh one."""
    if not (saved := train.load_state(Path(args.out) / "state.safetensors")):
        return {"step": 0, "seconds": 0.0, "base": {}, "scores": {}, "first": [], "last": [], "key": args.key}
    _, state, groups = saved
    lens.require(state["key"] == args.key,
                 f"--out {args.out} holds another run ({state['key']}): give another folder, "
                 "or the same --init, --seed, --data, --pool and --tasks")
    with torch.no_grad():
        for name in ("new", "old", "ema"):
            for n, layer in lens.lora_layers(model, name).items():
                for ab in "AB":
                    getattr(layer, f"lora_{ab}")[name].copy_(groups[name][f"{n}.{ab}"])
    train.make_moments([optimizer])
    for name, t in train.optimizer_tensors([optimizer], named).items():
        t.copy_(groups["optimizer"][name])
    args.say(f"resuming {args.out} at step {state['step']}")
    return state

def rl_step(args, model, parallel, vae, encoder, judge, rows, state, optimizer, pool):
    """One step: sample with `old`, judge, train `new`. -> what the log tells."""
    how, step, device = args.how, state["step"], args.device
    begin = time.perf_counter()
    mine = list(range(args.rank, len(rows), args.ranks))
    texts = {p: list(text[:, None].to(device)) for p, text in zip(mine, sample.encode(encoder, [rows[p]["prompt"] for p in mine]))}
    lens.set_lora(model, "old")
    made, judged = {}, {}
    # the judge works in a thread on one group while the next is sampled
    for p in mine:
        made[p] = make_group(args, model, vae, texts[p], step, p, rows[p]["size"], how)
        judged[p] = pool.submit(judge, made[p][1], [rows[p]] * how.group)
    sampled = time.perf_counter()
    answers = {p: future.result() for p, future in judged.items()}
    everyone = {p: a for part in gathered(answers) for p, a in part.items()}
    rewards = torch.tensor([[reward_of(a, rows[p]["rubrics"]) for a in everyone[p]] for p in range(len(rows))])        # [P, G]
    r = optimality(advantages(rewards))
    judged_at, sums, total = time.perf_counter(), torch.zeros(2), len(rows) * how.group * how.times
    sample.use_attention(state["attention"])               # what is fastest backwards is not what sampling is fastest with
    for p in mine:
        sums += group_loss(args, model, parallel, made[p][0].cpu(), r[p], texts[p], step, p, rows[p]["size"], how, total, p == mine[-1])
    sample.use_attention()
    parameters = lens.lora_parameters(model, "new")
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    # old <- eta old + (1 - eta) new: nearly on policy at first
    with torch.no_grad():
        eta = min(0.001 * (step + 1), 0.5)
        torch._foreach_lerp_(lens.lora_parameters(model, "old"), parameters, 1 - eta)
        torch._foreach_lerp_(lens.lora_parameters(model, "ema"), parameters, 1 - min(DECAY, (1 + step) / (10 + step)))
    by_name = collections.defaultdict(list)
    for p in range(len(rows)):
        for given in everyone[p]:
            for answer, rubric in zip(given, rows[p]["rubrics"]):
                by_name["held_out" if rubric.get("held_out") else rubric["name"]] += [] if answer is None else [answer]
    sums = torch.stack(gathered(sums)).sum(0) / total
    stats = np.mean(gathered((*looks([picture for _, pictures in made.values() for picture in pictures]),
                              np.mean([sample.diversity(tokens) for tokens, _ in made.values()]))), 0)
    mean = lambda x: x[~x.isnan()].mean().item() if (~x.isnan()).any() else None
    common = sorted(by_name, key=lambda name: -len(by_name[name]))[:16]            # a file's rubrics have a thousand names
    return dict(step=step + 1, loss=sums[0].item(), reward=mean(rewards), spread=mean(rewards.std(1, correction=0)),
                rubrics={n: round(sum(by_name[n]) / len(by_name[n]), 4) for n in common if by_name[n]}, drift=sums[1].item(),
                brightness=round(stats[0], 4), saturation=round(stats[1], 4), diversity=round(stats[2], 4),
                failures=int(rewards.isnan().sum()), judge_failed=sum(map(len, gathered(list(judge.failed)))),
                grad_norm=norm, eta=eta, sample_s=round(sampled - begin, 3), judge_wait_s=round(judged_at - sampled, 3),
                train_s=round(time.perf_counter() - judged_at, 3))

def make_policies(args, model):
    """Gives the frozen base its adapters `ema`, `old` and `new`; -> ({name: parameter} of `new`, its optimiser)."""
    for name in ("ema", "old", "new"):                                             # the same start for all three: B is zero
        lens.add_lora(model, args.how.rank, args.how.alpha, name=name, generator=train.generator(args.seed, 1))
    model.requires_grad_(False)
    for p in lens.lora_parameters(model, "new"):
        p.requires_grad_(True)
    train.set_recompute(model, "full" if args.size == "full" else "none")
    lens.quicken(model, fullgraph=False) if args.compile else None
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return named, torch.optim.AdamW(named.values(), lr=args.lr, betas=ADAM_BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)

def train_policy(args):
    how, out = args.how, Path(args.out)
    dtype, why = train.same_everywhere(sample.pick_dtype(args.device.split(":")[0], args.dtype,
                                                         lens.SIZES[args.size].transformer.inner_dim))
    folder = lens.fetch(args.init, ("transformer", "vae", "text_encoder"))
    model, vae, encoder = lens.load_pipeline(folder, args.device, dtype)
    lens.require(model.config == lens.SIZES[args.size].transformer, f"--init {args.init}: its weights are not of size {args.size}")
    named, optimizer = make_policies(args, model)
    parallel = torch.nn.parallel.DistributedDataParallel(model) if args.ranks > 1 else model
    state = resume(args, model, optimizer, named)
    kernel = train.pick_attention(args, dtype, how.base, state)
    sample.use_attention()                                 # until a step trains: see rl_step
    for group in optimizer.param_groups:
        group["lr"] = args.lr
    judge = EndpointJudge(args.endpoint, args.model, out / f"judge-{args.rank}.jsonl") if args.endpoint else Checker()
    log, watch, notice = train.Log(out, state["step"]) if args.rank == 0 else None, Watch(), train.on_notice()
    watch.first, watch.last = [tuple(x) for x in state["first"]], collections.deque(map(tuple, state["last"]), 10)
    args.say(f"{args.size}: LoRA of rank {how.rank}, {sum(p.numel() for p in named.values()):,} parameters, "
             f"on {args.ranks} x {args.device}; {str(dtype)[6:]}: {why}; {kernel}\na step: {how.prompts} prompts x {how.group} pictures "
             f"of {len(args.rows)}, {how.sampler_steps} sampler steps, {how.times} noise levels")
    shown = ([(prompt, seed) for seed, task in enumerate(data.TASKS)
              for *_, prompt in sample.held_out(task, 2, *data.bucket(how.base))]
             if not args.data else [(row["prompt"], k) for k, row in enumerate(args.rows[:12])])

    def preview(name):
        lens.set_lora(model, "ema")
        size = data.bucket(how.base)
        data.contact_sheet(sample.generate([p for p, _ in shown], (model, vae, encoder), seeds=[s for _, s in shown],
                                           height=size[0], width=size[1], steps=sample.STEPS, guidance=1.0,
                                           batch_size=how.batch), 6).save(out / name)
    told = lambda scores: ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
    if state["step"] == 0 and args.rank == 0:                                      # what the run will be held against
        if args.preview_every:
            preview("before.png")
        if args.eval_every and not args.data:
            state["base"] = evaluate(args, model, vae, encoder, args.per_task)
            args.say(f"the base at guidance 1: {told(state['base'])}")
    bar = tqdm(total=args.steps, initial=state["step"], desc="RL", unit="step", mininterval=2, disable=args.rank > 0)
    with ThreadPoolExecutor(1) as pool:
        while state["step"] < args.steps:
            at, n = state["step"] * how.prompts, len(args.rows)
            # every prompt once, then again in another order
            order = lambda k: args.rows[np.random.default_rng((args.seed, k // n)).permutation(n)[k % n]]
            begin = time.perf_counter()
            row = rl_step(args, model, parallel, vae, encoder, judge, [order(at + k) for k in range(how.prompts)], state, optimizer, pool)
            state["step"] += 1
            state["seconds"] += time.perf_counter() - begin
            if warning := watch(row["reward"] or 0.0, row["diversity"], row["rubrics"].get("held_out", 0.0)):
                row["warning"] = warning
                (bar.write(f"warning: step {state['step']}: the reward rises, but {warning}")
                 if state["step"] % 10 == 0 and args.rank == 0 else None)
            state["first"], state["last"] = watch.first, list(watch.last)
            due = lambda every: every and (state["step"] % every == 0 or state["step"] == args.steps)
            stop = sum(gathered(len(notice))) > 0
            if due(args.eval_every) and not args.data and args.rank == 0:
                state["scores"] = evaluate(args, model, vae, encoder, args.per_task)
                row.update(state["scores"])
                bar.write(f"step {state['step']}, guidance 1: {told(state['scores'])}")
            if due(args.preview_every) and args.rank == 0:
                preview(f"preview-{state['step']:04d}.png")
            if log:
                log(**row, seconds=round(state["seconds"], 2))
            if (due(args.save_every) or stop) and args.rank == 0:
                save(args, model, optimizer, named, state)
            bar.update()
            bar.set_postfix_str(f"reward {row['reward'] or math.nan:.3f}, diversity {row['diversity']:.2f}"
                                + f", {row['judge_failed']} judgements failed" * bool(row["judge_failed"]))
            if stop:
                bar.close()
                args.say(f"SIGTERM: saved {out} at step {state['step']}; the same command goes on from there")
                sys.exit(0)
    bar.close()
    args.say(f"done: python sample.py --eval --weights {args.init} --lora {out} --guidance 1")

# ---------------------------------------------------------------------------------------------------------------------
# The search for a system prompt, nothing is trained: rewrite, generate, judge, put the failures into words, have a proposer change
# what the reasoner is told, and keep the change where a paired test on other requests says that it is better.

class Search(NamedTuple):
    summary: int         # requests whose failures a proposer is told of
    pairs: int           # other requests, each pictured under both system prompts
    final: int           # a third set: what was gained over the start

SEARCH = {"nano": Search(6, 12, 12), "toy": Search(48, 192, 300), "full": Search(48, 192, 300)}                      # [ours]
ERROR = 0.02             # chance that a search accepts anything where no candidate differs from the start, however long it goes on

def better(old, new, alpha, seed=0, flips=20_000):
    """Paired sign-flip test of rewards [n] of the same requests and noises under two system prompts -> (accept, p, gain).

    Where the prompts are alike, each difference has either sign with equal chance; p is the share of such sign patterns whose mean
    is at least what was seen (itself among them), so P(accept) <= alpha, whatever the rewards' distribution. Failed judgements drop out."""
    difference = np.asarray(new, float) - np.asarray(old, float)
    difference = difference[~np.isnan(difference)]
    if not difference.sum() > 0:                                                   # then p is above one half
        return False, 1.0, float(difference.mean()) if len(difference) else 0.0
    signs = 2.0 * np.random.default_rng(seed).integers(0, 2, (flips, len(difference)), dtype=np.int8) - 1
    p = (1 + int((signs @ difference >= difference.sum() - 1e-9).sum())) / (1 + flips)
    return p <= alpha, p, float(difference.mean())

def failures_in_words(rows, prompts, answers):
    """What a proposer is told: how often which kind of rubric failed, with an example of each."""
    of, wrong = collections.Counter(), collections.defaultdict(list)
    for row, prompt, given in zip(rows, prompts, answers):
        for rubric, answer in zip(row["rubrics"], given):
            if answer is not None and not rubric.get("held_out"):
                of[rubric["name"]] += 1
                wrong[rubric["name"]] += [] if answer else [(rubric["check"], row["prompt"], prompt)]
    bad = sum(any(a is False and not rubric.get("held_out") for rubric, a in zip(row["rubrics"], given))
              for row, given in zip(rows, answers))
    # a file's rubrics have a thousand names
    kinds = sorted((name for name in wrong if wrong[name]), key=lambda name: (-len(wrong[name]), name))[:12]
    return f"{bad} of {len(rows)} pictures had something wrong.\n" + "".join(
        f'{name}: {len(wrong[name])} of {of[name]} statements were false, such as "{{}}" for the request "{{}}", '
        f'rewritten as "{{}}".\n'.format(*wrong[name][0]) for name in kinds)

# What is likely to help where a kind of rubric fails: an object whose color and place are said is seldom left out, or there twice.
REMEDIES = {"total": ("place",), "count": ("color", "place"), "relation": ("place", "relation"), "coherent": ("size", "background")}

def edit_guidelines(system, summary, tried):
    """The toy's proposer, a program: adds the guideline sentences that the summary's failures call for, all sentences, each alone; takes
    each away; adds two. -> the first of these system prompts that is not in `tried`, or None."""
    failing = re.findall(r"(?m)^(\w+): \d+ of", summary)
    wanted = list(dict.fromkeys([d for kind in failing for d in REMEDIES.get(kind, ())] + list(sample.GUIDELINES)))
    present = [d for d in wanted if any(wording in system for wording in sample.GUIDELINES[d])]
    missing = [d for d in wanted if d not in present]
    plus = lambda details: " ".join([system] + [sample.GUIDELINES[d][0] for d in details])
    minus = lambda d: " ".join(functools.reduce(lambda text, wording: text.replace(wording, ""), sample.GUIDELINES[d], system).split())
    called_for = [d for d in missing if any(d in REMEDIES.get(kind, ()) for kind in failing)]
    edits = ([plus(called_for), plus(missing)] + [plus([d]) for d in missing] + [minus(d) for d in present]
             + [plus(two) for two in itertools.combinations(missing, 2)])
    return next((edit for edit in edits if edit not in (system, *tried)), None)

ASK_PROPOSER = """A language model rewrites short requests for pictures into dense prompts for a text-to-image model. This is its \
system prompt:
---
{system}
---
Pictures made that way were judged: {summary}
{tried}Write a better system prompt: general rules that prevent such failures, nothing about single requests. \
It must still ask that all the user said is kept and that the reply is the prompt alone.
Reply with one JSON object, nothing else: {{"system_prompt": "..."}}"""

def propose_by(endpoint):
    """The proposer for real use: a language model, told the failures and what was tried before. An unusable answer ends the search."""
    def propose(system, summary, tried):
        earlier = "".join(f"This was tried before and was not better, or was replaced by a better one: {text}\n" for text in tried[-4:])
        (answer,) = endpoint.ask([[{"role": "user", "content": ASK_PROPOSER.format(system=system, summary=summary, tried=earlier)}]])
        found = parsed(answer)
        text = lens.strip_markers(str(found.get("system_prompt") or "")).strip() if isinstance(found, dict) else ""
        return text if text not in ("", system, *tried) else None
    return propose

def climb(start, trial, propose, steps, lines, write, seed=0):
    """The loop. trial(which, k, systems) -> (rewards [len(systems), n], summary in words of the first): `which` is "summary", or one of two
    halves "pairs 1" and "pairs 2"; lines: the log of what was tried before, to which write(lines) adds. -> the best system prompt."""
    best = ([start] + [line["system"] for line in lines if line["accepted"]])[-1]
    for k in range(len(lines), steps):
        _, summary = trial("summary", k, [best])
        if (system := propose(best, summary, [start] + [line["system"] for line in lines])) is None:
            print("the proposer has nothing new to try")
            break
        rewards, alpha = np.asarray(trial("pairs 1", k, [best, system])[0], float), ERROR / ((k + 1) * (k + 2))      # these sum to ERROR
        if np.nanmean(rewards[1] - rewards[0]) > 0:                                # else half is enough: with no gain, p is above one half
            rewards = np.concatenate([rewards, trial("pairs 2", k, [best, system])[0]], 1)
        accepted, p, gain = better(*rewards, alpha, (seed, k))
        lines.append(dict(candidate=k + 1, accepted=accepted, old=round(float(np.nanmean(rewards[0])), 4),
                          new=round(float(np.nanmean(rewards[1])), 4), gain=round(gain, 4), p=round(p, 5), alpha=round(alpha, 5),
                          pairs=rewards.shape[1], system=system, parent=best, failures=summary))
        print(f"candidate {k + 1}: reward {lines[-1]['old']:.3f} -> {lines[-1]['new']:.3f} on {rewards.shape[1]} requests, "
              f"p {p:.4f} (wanted {alpha:.4f}): {'accepted' if accepted else 'not accepted'}\n    {system}")
        best = system if accepted else best
        write(lines)
    return best

def search(args):
    how, out, size = SEARCH.get(args.size, SEARCH["full"]), Path(args.out), data.bucket(args.how.base)
    folder = lens.fetch(args.init, ("transformer", "vae", "text_encoder"))
    notes, toy = lens.read_metadata(folder), not args.data
    pipeline = lens.load_pipeline(folder, args.device, sample.pick_dtype(
        args.device.split(":")[0], args.dtype, lens.SIZES[args.size].transformer.inner_dim)[0])
    asks = argparse.Namespace(**{**vars(args), "endpoint": args.endpoint if args.reasoner_model else None, "model": args.reasoner_model})
    rewrite = sample.reasoner(asks, notes, pipeline[2])
    # the toy's: bare, so that all is to be found
    start = rewrite.keywords["system"] if args.system_prompt or not toy else sample.REWRITE
    rows = (read_rows(args.data, [size]) if args.data else
            [toy_row(args.seed, i, args.tasks.split(","), [size], args.requests) for i in range(args.pool)])
    lens.require(len(rows) >= 12, f"{len(rows)} prompts are too few for a search: three sets are made of them")
    # no request is in two
    parts = dict(zip(("summary", "pairs", "final"), np.array_split(np.random.default_rng(args.seed).permutation(len(rows)), 3)))
    judge = EndpointJudge(args.endpoint, args.model, out / "judge.jsonl") if args.endpoint else Checker()
    propose = propose_by(data.Endpoint(args.endpoint, args.model, out / "proposer.jsonl")) if args.endpoint else edit_guidelines
    steps, guidance = sample.settings(notes, None, None)
    half = {"summary": (0, how.summary), "pairs 1": (0, how.pairs // 2), "pairs 2": (how.pairs // 2, how.pairs), "final": (0, how.final)}

    def trial(which, k, systems):
        order = np.random.default_rng((args.seed, 1, k)).permutation(parts[which.split()[0]])[slice(*half[which])]
        mine, rewards, right = [rows[i] for i in order], [], []
        for system in systems:                                                     # the same requests and noises under each
            prompts = rewrite([row["prompt"] for row in mine], system=system, seed=args.seed)
            pictures = sample.generate(prompts, pipeline, seeds=[1000 * k + int(i) for i in order], height=size[0], width=size[1],
                                       steps=steps, guidance=guidance, batch_size=min(32, args.how.batch), progress=True)
            answers = judge(pictures, mine)
            rewards.append([reward_of(given, row["rubrics"]) for given, row in zip(answers, mine)])
            lens.require(not np.isnan(rewards[-1]).all(),
                         f"no answer from the judge at {args.endpoint}: {dict(collections.Counter(judge.failed))}; "
                         "is its URL right up to and with /v1, and LENS_API_KEY set?")
        return np.array(rewards), failures_in_words(mine, prompts, answers)

    log, key = out / "search.jsonl", dict(key=[str(args.init), args.seed, str(args.data), args.pool, args.tasks, args.requests,
                                               args.model, args.reasoner_model, start])
    first, *lines = [line for line in map(json.loads, log.read_text().splitlines()) if "final" not in line] if log.exists() else [key]
    lens.require(first == key, f"--out {out} holds another search: give another folder, or the same --init, --seed, --data, --pool, "
                               "--tasks, --requests, models and starting system prompt")

    # every candidate, its text and its score; then the best one
    def write(lines, final=()):
        lens.replace_file(log, lambda new: new.write_text("".join(json.dumps(line) + "\n" for line in (key, *lines, *final))))
        lens.replace_file(out / "best.txt", lambda new: new.write_text(
            ([start] + [line["system"] for line in lines if line["accepted"]])[-1] + "\n"))
    write(lines)
    print(f"start, {len(lines)} candidates judged before:\n    {start}")
    best = climb(start, trial, propose, args.steps, lines, write, args.seed)
    (before, after), _ = trial("final", 0, [start, best])
    _, p, gain = better(before, after, 0.05, args.seed)
    final = dict(final=True, requests=len(before), start=round(float(np.nanmean(before)), 4),
                 best=round(float(np.nanmean(after)), 4), gain=round(gain, 4), p=round(p, 5),
                 error=round(float(np.nanstd(after - before)) / math.sqrt(len(before)), 4),
                 right_start=round(float((before == 1).mean()), 4), right_best=round(float((after == 1).mean()), 4))
    write(lines, [final])
    print(f"{json.dumps(final)}\ndone: python sample.py --reason --system-prompt {out}/best.txt")

def fixed_bytes(base, adapter):
    """What a device holds beside activations: the base in bf16; adapters new, old, average, a gradient and two moments in fp32."""
    return 2 * base + 6 * 4 * adapter

def dry_run(args):
    """Memory and work of one step at this size, by part; counted on the meta device, no weight is made."""
    how, config, gib = args.how, lens.SIZES[args.size].transformer, 2**30
    with torch.device("meta"):
        model = lens.LensTransformer(config)
    base, tokens, length = sum(p.numel() for p in model.parameters()), (how.base // 16) ** 2, 128
    lens.add_lora(model, how.rank, how.alpha, name="new")
    adapter = sum(p.numel() for p in lens.lora_parameters(model, "new"))
    kept = train.activations(config, "full" if args.size == "full" else "none", how.batch, (how.base // 16,) * 2, length)
    print(f"{args.size}: base {base:,} parameters, adapter {adapter:,}\nGiB a device: base in bf16 {2 * base / gib:.2f}; "
          f"adapters new, old, average, gradient and two moments in fp32 {6 * 4 * adapter / gib:.2f}; "
          f"activations of {how.batch} pictures {kept / gib:.2f}; sum {(fixed_bytes(base, adapter) + kept) / gib:.2f} "
          "(and the text encoder, the autoencoder)")
    forward, pictures = train.flops(model, tokens, length) / 3, how.prompts * how.group
    peak = train.matmul_peak(args.device, torch.bfloat16)
    for part, work in (("sampling", pictures * how.sampler_steps * forward),
                       ("old and reference", 2 * pictures * how.times * forward),
                       ("new, forward and backward", (4 if args.size == "full" else 3) * pictures * how.times * forward)):
        print(f"{part:28} {work / 1e12:12.1f} TFLOP a step, all ranks together; {work / peak / 0.4:10.1f} s "
              f"at 40% of the {peak / 1e12:.1f} TFLOP/s measured on this {args.device}")

def main(argv=None):
    parser = argparse.ArgumentParser(description="Reward RL: rubrics, judges and DiffusionNFT. The same command again resumes.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=__doc__[__doc__.index("    python rl.py --out"):__doc__.index("The story")])
    parser.error = sample.complain
    parser.add_argument("--size", default="toy", help="one of " + ", ".join(lens.SIZES))
    parser.add_argument("--init", default=str(sample.TOY), metavar="DIR",
                        help="the model to improve: a folder or hub id (default: weights/toy)")
    parser.add_argument("--out", default="runs/rl", metavar="DIR", help="the LoRA, its state, metrics.jsonl, contact sheets")
    parser.add_argument("--data", metavar="FILE", help="prompts with rubrics, JSON lines (default: the toy world's)")
    parser.add_argument("--pool", type=int, default=1000, metavar="N", help="different prompts of the toy world, or to write")
    parser.add_argument("--tasks", default=",".join(data.TASKS), help="of the toy world's prompts (default: all six)")
    parser.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible, up to /v1: the judge; its key is read from LENS_API_KEY")
    parser.add_argument("--model", default="default", help="the endpoint's model")
    parser.add_argument("--judge-check", action="store_true", help="train nothing: score the judge on true and altered claims")
    parser.add_argument("--write-prompts", metavar="FILE", help="train nothing: have the endpoint's model write --pool prompts and rubrics")
    parser.add_argument("--merge", metavar="DIR", help="train nothing: write --init with the LoRA of --out merged into it")
    parser.add_argument("--search", action="store_true",
                        help="train nothing: search for a better system prompt of the reasoner; --steps candidates (default 8)")
    parser.add_argument("--system-prompt", metavar="FILE",
                        help="where that search starts (default: sample.py's; the toy's: the bare rule to rewrite)")
    parser.add_argument("--requests", choices=("brief", "vague"), default="brief", help="how the toy world is asked for in that search")
    parser.add_argument("--reasoner-model", metavar="NAME", help="the endpoint's model that rewrites (default: the text encoder)")
    parser.add_argument("--dry-run", action="store_true", help="train nothing: print memory and work of one step")
    parser.add_argument("--steps", type=int, help="default: what the size says")
    parser.add_argument("--lr", type=float, help="default: what the size says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu or cuda (default: CUDA if there is one)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the frozen base (default: the faster one)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--save-every", type=int, default=10, metavar="N", help="steps")
    parser.add_argument("--eval-every", type=int, default=50, metavar="N", help="steps; the toy's six tasks at guidance 1; 0: never")
    parser.add_argument("--per-task", type=int, default=20, metavar="N", help="prompts a task in that evaluation")
    parser.add_argument("--preview-every", type=int, default=50, metavar="N", help="steps; 0: never")
    args = parser.parse_args(argv)
    lens.require(args.size in lens.SIZES, f"unknown size '{args.size}': choose one of {', '.join(lens.SIZES)}")
    args.how = SETTINGS.get(args.size, SETTINGS["full"])
    args.steps, args.lr, tasks = ((8 if args.search else args.how.steps) if args.steps is None else args.steps,
                                  args.lr or args.how.lr, tuple(args.tasks.split(",")))
    lens.require(set(tasks) <= set(data.TASKS), f"--tasks: choose among {', '.join(data.TASKS)}")
    lens.require(min(args.steps, args.save_every, args.pool) > 0, "--steps, --save-every and --pool must be at least 1")
    lens.require(not (args.write_prompts or args.data and not (args.dry_run or args.merge)) or args.endpoint,
                 "pictures of real prompts are judged, and their prompts written, by a model behind --endpoint URL "
                 "(key in LENS_API_KEY)")
    if args.write_prompts:
        return write_prompts(args)
    if args.judge_check:
        judge = EndpointJudge(args.endpoint, args.model, None) if args.endpoint else Checker()
        table, failures = judge_check(judge, min(args.pool, 120), args.seed, data.bucket(128))
        print(f"{'claim':12} {'true, affirmed':>16} {'altered, denied':>16}")
        for name, (yes, of_yes, no, of_no) in table.items():
            print(f"{name:12} {yes / max(of_yes, 1):16.3f} {no / max(of_no, 1):16.3f}")
        worst = min((min(yes / max(of_yes, 1), no / of_no if of_no else 1.0) for yes, of_yes, no, of_no in table.values()), default=0.0)
        print(f"failed: {failures} {dict(collections.Counter(judge.failed)) or ''}\n"
              + ("a run can trust this judge" if worst >= 0.9 else
                 f"do not trust this judge: {worst:.2f} at its worst, of 0.90 wanted"))
        return
    args.device = sample.pick_device(args.device)
    if args.dry_run:
        return dry_run(args)
    if args.merge:
        folder = lens.fetch(args.init, ("transformer", "vae", "text_encoder"))
        model, vae, encoder = lens.load_pipeline(folder, "cpu")
        count = lens.load_lora(model, args.out)
        lens.save_pipeline(args.merge, model, vae, encoder, {**lens.read_metadata(folder), "guidance": 1.0, "lora": str(args.out)})
        return print(f"wrote {args.merge}: {count} layers changed")
    lens.require(args.data or args.size in ("nano", "toy"),
                 f"--size {args.size}: name prompts with rubrics with --data (rl.py --write-prompts makes them); "
                 "the toy world is for --size toy or nano")
    if args.search:
        return search(args)
    args.rank, args.ranks, args.device = train.join(args.device)
    lens.require(args.how.prompts % args.ranks == 0,
                 f"{args.how.prompts} prompts a step cannot be dealt evenly over {args.ranks} processes")
    args.say = print if args.rank == 0 else lambda *_: None
    sizes = data.buckets(args.how.base)
    args.rows = read_rows(args.data, sizes) if args.data else [toy_row(args.seed, i, tasks, sizes) for i in range(args.pool)]
    args.key = [str(args.init), args.seed, str(args.data), args.pool, args.tasks, args.lr]
    sample.check_writable(args.out) if args.rank == 0 else None
    train_policy(args)

if __name__ == "__main__":
    sample.run(main)
