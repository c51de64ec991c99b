"""The reasoner: a request becomes a dense prompt. And the search for a better system prompt for it.

Read before: lens.py, kit/chat.py, kit/rubrics.py. Used by sample.py (`--reason`) and rl.py
(`--search`).

The story in one paragraph. The denoiser is trained on dense captions alone, and people type "two
crimson discs". So a language model first writes the request out as a caption, and a system prompt
tells it how [paper]. Any model will do: one behind an OpenAI-compatible endpoint, or the text
encoder, which is in memory anyway. Which system prompt is best is found by trying: rewrite,
generate, judge, put the failures into words, have a proposer change the system prompt, and keep the
change where a paired test on other requests says that it is better. Nothing is trained.

Where this departs from the paper [ours]: answers are checked where a check is known (of the toy
world: toy.language.keeps), and the user's own words stand where no answer passes. And to score
better is not enough for a change: it must pass a test. Where no system prompt is better than
another, the chance that a whole search accepts any is at most `ERROR`.
"""
import hashlib
import json
import math
import re
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from tqdm import tqdm

import lens
from kit.chat import NoAnswer, clean, parse_json
from kit.files import first_few, read_json_lines, require, write_json_lines, write_text
from kit.rubrics import reward_of

# --- The reasoner ---------------------------------------------------------------------------------

# The paper's rules in our words.
SYSTEM = """\
Turn the user's request into one dense prompt for a text-to-image model that was trained on \
detailed captions. Settle on one concrete scene. Whatever the user said stays as it is: \
objects, numbers, colors, names, quoted text, relations; add only what was left open. \
Describe each of several subjects apart: its look, its place, how it stands to the others. \
Write out what follows from the request: if it shows the answer to 2+2, write "2+2=4". \
Then background, light, style, viewpoint. State things as they are: no maybe, no alternatives.
Reply in the user's language with the prompt alone: one paragraph of about 100 words."""


@dataclass(frozen=True)
class Reasoner:
    """`reason` with everything settled but the requests."""
    writes: Callable             # (system, requests, seed, trial) -> raw answers, see `reason`
    system: str                  # the system prompt
    seed: int = 0
    faithful: Callable = None    # (request, prompt) -> whether the prompt keeps the request

    def rewrite(self, requests):
        """[request] -> [prompt]"""
        return reason(self.writes, requests, self.system, self.seed, self.faithful)


TRIALS = 8                   # how often a request is asked for before the user's own words stand
LONGEST_REQUEST = 2000       # characters, about what the text encoder reads of a prompt


def reason(writes, requests, system, seed=0, faithful=None):
    """[request] -> [prompt], in order.

    writes(system, requests, seed, trial) -> raw answers, None for one that failed
    faithful(request, prompt) -> bool, the check; None: every prompt passes

    Where an answer is empty, a refusal or not faithful, `writes` is asked again in the next trial.
    After the last one the user's own words stand, and a notice says so. They also stand for
    requests that are too long or that the check cannot read: faithful(request, request) is False.
    """
    def passes(request, prompt):
        return faithful is None or faithful(lens.strip_markers(request), prompt)

    able = [request for request in dict.fromkeys(requests)
            if len(request) <= LONGEST_REQUEST and passes(request, lens.strip_markers(request))]
    prompts = {}
    for trial in range(TRIALS):
        left = [request for request in able if request not in prompts]
        if not left:
            break
        for request, raw in zip(left, writes(system, left, seed, trial), strict=True):
            prompt = clean(raw or "")              # without chatter; "" for a refusal
            if prompt and passes(request, prompt):
                prompts[request] = prompt

    unchanged = {request for request in requests if request not in prompts}
    if unchanged:
        print(f"note: no usable prompt from the reasoner for {len(unchanged)} of "
              f"{len(set(requests))} requests, which stay as they are: {first_few(unchanged)}",
              file=sys.stderr)
    return [prompts.get(request, request) for request in requests]


# --- Who writes: a language model behind an endpoint, or the text encoder -------------------------

def endpoint_writer(endpoint):
    """-> writes, for `reason`: the model behind a kit.chat.Endpoint.

    It is asked once: its journal would give the same answers to a second trial. LensError where not
    one request was answered.
    """
    def writes(system, requests, seed, trial):
        if trial > 0:
            return [None] * len(requests)
        chats = [[{"role": "system", "content": system}, {"role": "user", "content": request}]
                 for request in requests]
        unanswered_before = endpoint.unanswered
        answers = endpoint.ask(chats, read=with_prompt)
        unanswered = endpoint.unanswered - unanswered_before
        reasons = ", ".join(sorted(set(endpoint.failed)))
        require(unanswered < len(requests), endpoint.silence(reasons))
        return answers

    return writes


def with_prompt(answer, _):
    """The raw answer itself. NoAnswer where no prompt is in it: the journal keeps no refusals."""
    if not clean(answer):
        raise NoAnswer("a refusal, or no words")
    return answer


LONGEST_ANSWER = 512      # tokens that the text encoder may write, its reasoning included [ours]
TEMPERATURE = 0.7         # of its answers after the first trial [ours]


def encoder_writes(encoder, system, requests, seed, trial):
    """The text encoder itself as the reasoner: a lens.TextEncoder -> [raw answer].

    The first trial takes the likeliest token at each place, later ones sample. Each request has a
    random generator of its own, so its answer is the same in any batch. LensError for an encoder
    that was stored without its head.
    """
    require(hasattr(encoder.model, "lm_head"),
            "this text encoder was stored without its head and cannot write: "
            "name another reasoner with --endpoint URL --model NAME")
    rows = [chat_ids(encoder, system, request) for request in requests]

    # Equal lengths run together: nothing is padded.
    members_by_length = defaultdict(list)
    for i, row in enumerate(rows):
        members_by_length[len(row)].append(i)

    answers = {}
    bar = tqdm(members_by_length.items(), "rewriting", unit="batch", leave=False)
    for length, members in bar:
        processors = []
        if trial > 0:
            processors.append(GumbelNoise([f"{seed} {trial} {requests[i]}" for i in members]))
        ids = torch.tensor([rows[i] for i in members], device=encoder.model.device)  # [B, L]
        written = encoder.model.generate(                                            # [B, L + new]
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST_ANSWER,
            do_sample=False, logits_processor=processors)
        texts = encoder.tokenizer.batch_decode(written[:, length:])
        answers.update(zip(members, texts, strict=True))
    return [answers[i] for i in range(len(requests))]


def chat_ids(encoder, system, request):
    """Token ids of the chat in which the encoder is to answer a request."""
    # Markers are stripped, so that neither text can leave its turn of the chat.
    chat = [{"role": "system", "content": lens.strip_markers(system)},
            {"role": "user", "content": lens.strip_markers(request)}]
    # Released templates ask for today's date: the prompt of a seed would drift from day to day.
    # GPT-OSS's template reads reasoning_effort, Qwen's reads enable_thinking: little reasoning.
    template = encoder.tokenizer.get_chat_template()
    template = re.sub(r"strftime_now\([^)]*\)", "current_date", template)
    text = encoder.tokenizer.apply_chat_template(
        chat, chat_template=template, tokenize=False, add_generation_prompt=True,
        reasoning_effort="low", enable_thinking=False, current_date=encoder.date)
    return encoder.tokenizer(text, add_special_tokens=False)["input_ids"]


class GumbelNoise:
    """A logits processor for `generate`, which makes the likeliest token a sampled one.

    The largest of scores with Gumbel noise is a sample of their softmax; with T times the noise, a
    sample at temperature T, since s + T g is largest where s / T + g is.
    """

    def __init__(self, names):
        """names: one for each row of a batch; its noise is a function of it."""
        self.generators = []
        for name in names:
            seed = int(hashlib.sha256(name.encode()).hexdigest()[:12], 16)
            self.generators.append(torch.Generator().manual_seed(seed))

    def __call__(self, input_ids, scores):
        draws = [torch.empty(scores.shape[1]).exponential_(generator=generator)
                 for generator in self.generators]
        # The log of an exponential variable, negated, has Gumbel's distribution.
        gumbel = -torch.stack(draws).log().to(scores)             # [B, vocabulary]
        return scores + TEMPERATURE * gumbel


# --- The search: a paired test --------------------------------------------------------------------

@dataclass(frozen=True)
class Search:
    """How many requests each part of the search takes. No request is in two parts. [ours]"""
    summary: int         # whose failures a proposer is told
    pairs: int           # pictured under both system prompts, the best one so far and the candidate
    final: int           # to tell at the end what was gained over the start


SEARCH = {
    "nano": Search(summary=6, pairs=12, final=12),
    "toy": Search(summary=48, pairs=192, final=300),
    "full": Search(summary=48, pairs=192, final=300),
}

# The chance that a search accepts anything where no system prompt's rewards are distributed
# otherwise than the first one's, however many it tries. [ours]
ERROR = 0.02
FLIPS = 20_000            # sign patterns that the test draws at a time


def paired_test(old, new, alpha=0.05, seed=0):
    """Paired sign-flip test: is `new` better than `old`? -> (p, gain).

    old, new  [n] rewards of the same requests and noises under two system prompts; NaN: not judged,
              and left out
    alpha     what p will be held against

    Where the system prompts are alike, each difference has either sign with equal chance. p is the
    share of sign patterns whose sum is at least the one seen (which is counted among them), so
    P(p <= alpha) <= alpha, whatever the rewards' distribution. gain: the mean difference.
    """
    difference = np.asarray(new, float) - np.asarray(old, float)
    difference = difference[~np.isnan(difference)]
    gain = float(difference.mean()) if len(difference) else 0.0
    seen = difference.sum()
    if seen <= 0:                                                  # then p is above one half
        return 1.0, gain

    # From m random patterns the smallest p is 1 / (1 + m): with m >= 5 / alpha, below alpha / 5.
    rounds = math.ceil(5 / alpha / FLIPS)
    rng = np.random.default_rng(seed)
    at_least = 0
    for _ in range(rounds):
        bits = rng.integers(0, 2, (FLIPS, len(difference)), dtype=np.int8)
        signs = 2.0 * bits - 1                                     # [FLIPS, n]
        at_least += int((signs @ difference >= seen - 1e-9).sum())
    p = (1 + at_least) / (1 + rounds * FLIPS)
    return p, gain


# --- The search: climbing -------------------------------------------------------------------------

@dataclass(frozen=True)
class Candidate:
    """A system prompt that was tried. One line of a search's log, under these names."""
    candidate: int       # its number, from 1
    accepted: bool       # whether it is now the best
    old: float           # mean reward of the best one before it ...
    new: float           # ... and its own, on the same requests
    gain: float          # the mean of the paired differences
    p: float             # of the paired test ...
    alpha: float         # ... and what p had to be at most
    pairs: int           # requests tried
    system: str          # the candidate itself
    parent: str          # the best one before it
    failures: str        # of the parent, in words: what the proposer was told


def best_system(start, candidates):
    """The system prompt that was accepted last."""
    accepted = [candidate.system for candidate in candidates if candidate.accepted]
    return accepted[-1] if accepted else start


def climb(start, trial, propose, steps, pairs, candidates, write, seed=0):
    """The search's loop -> the best system prompt.

    trial(which, k, systems) -> (rewards [len(systems), n], the failures under each in words): the
        same requests and noises under each system prompt. which: "summary", or one of "pairs 1"
        and "pairs 2", the halves of the pairs. k: from 0; each candidate's requests are drawn anew,
        from the same set.
    propose(system, failures, tried) -> a better system prompt than `system`, or None. tried: all so
        far, `system` among them
    steps        candidates in all
    pairs        requests that a candidate may be compared on
    candidates   list of those that were tried before, where a search goes on. It grows, and
                 write(candidates) is called after each.
    """
    for k in range(len(candidates), steps):
        # 1 / ((k + 1) (k + 2)) adds up to 1 over all k, so the alphas add up to ERROR. The chance
        # that any of several tests errs is at most the sum of their alphas.
        alpha = ERROR / ((k + 1) * (k + 2))
        smallest_p = 2.0**-pairs                                   # where all pairs are won
        if smallest_p > alpha:
            print(f"{pairs} pairs are too few to accept a candidate {k + 1}: the search ends here")
            break

        best = best_system(start, candidates)
        tried = [start] + [candidate.system for candidate in candidates]
        _, (failures,) = trial("summary", k, [best])
        system = propose(best, failures, tried)
        if system is None:
            print("the proposer has nothing new to try")
            break

        rewards, _ = trial("pairs 1", k, [best, system])           # [2, n]
        # With no gain so far it is not accepted, and the other half's pictures need not be made.
        if np.nanmean(rewards[1] - rewards[0]) > 0:
            second_half, _ = trial("pairs 2", k, [best, system])
            rewards = np.concatenate([rewards, second_half], axis=1)
        old, new = rewards
        p, gain = paired_test(old, new, alpha, (seed, k))
        accepted = p <= alpha

        candidate = Candidate(
            candidate=k + 1, accepted=accepted,
            old=round(float(np.nanmean(old)), 4), new=round(float(np.nanmean(new)), 4),
            gain=round(gain, 4), p=round(p, 5), alpha=round(alpha, 5), pairs=len(old),
            system=system, parent=best, failures=failures)
        candidates.append(candidate)
        write(candidates)
        verdict = "accepted" if accepted else "not accepted"
        print(f"candidate {k + 1}: reward {candidate.old:.3f} -> {candidate.new:.3f} "
              f"on {len(old)} requests, p {p:.4f} (wanted {alpha:.4f}): {verdict}\n    {system}")
    return best_system(start, candidates)


# --- The search: pictures and a judge -------------------------------------------------------------

class Trials:
    """Pictures the same requests, from the same noises, under several system prompts; has them
    judged."""

    def __init__(self, rows, reasoner, generate, judge, search, seed):
        """Deals the requests into three sets. Rows with the same request go to the same one.

        rows                      [PromptRow]; their prompts are the requests
        generate(prompts, seeds)  -> pictures
        search                    Search: how many requests each part takes
        """
        self.rows, self.reasoner, self.seed = rows, reasoner, seed
        self.generate, self.judge = generate, judge

        rows_of = defaultdict(list)                # {request: [its rows' numbers]}
        for i, row in enumerate(rows):
            rows_of[row["prompt"]].append(i)
        require(len(rows_of) >= 12, f"{len(rows_of)} different prompts are too few for a search: "
                "three sets are made of them")
        groups = list(rows_of.values())
        order = np.random.default_rng(seed).permutation(len(groups))
        sets = []
        for part in np.array_split(order, 3):
            sets.append([i for g in part for i in groups[g]])
        summary, pairs, final = sets

        # Halves of what is there, which may be less than search.pairs.
        self.pairs = min(search.pairs, len(pairs))
        half = self.pairs // 2
        self.parts = {
            "summary": (summary, slice(0, search.summary)),
            "pairs 1": (pairs, slice(0, half)),
            "pairs 2": (pairs, slice(half, self.pairs)),
            "final": (final, slice(0, search.final)),
        }

    def __call__(self, which, k, systems):
        """-> (rewards [len(systems), n], the failures under each of them in words).

        which: one of `parts`;  k: for each candidate the part is drawn anew from its set
        """
        members, part = self.parts[which]
        # The 1 stands for this use of the seed. The permutation is the same for both halves of the
        # pairs, so they share no row.
        chosen = np.random.default_rng((self.seed, 1, k)).permutation(members)[part].tolist()
        rows = [self.rows[i] for i in chosen]
        requests = [row["prompt"] for row in rows]
        seeds = [1000 * k + i for i in chosen]             # of the noise: another for each k

        rewards, failures = [], []
        for system in systems:
            prompts = replace(self.reasoner, system=system).rewrite(requests)
            answers = self.judge(self.generate(prompts, seeds), rows)
            rewards.append([reward_of(own, row["rubrics"]) for own, row in zip(answers, rows)])
            failures.append(failures_in_words(rows, prompts, answers))
            require(not np.isnan(rewards[-1]).all(),
                    f"no answer from the judge: {dict(Counter(self.judge.failed))}; if it is at "
                    "--endpoint: is the URL right up to and with /v1, and LENS_API_KEY set?")
        return np.array(rewards), failures


class SearchLog:
    """search.jsonl: the search's settings, its candidates, at last what was gained; best.txt."""

    def __init__(self, out, start, settings):
        """start: the system prompt of the start;  settings: {"--flag": value}.

        LensError where `out` holds a search with other settings.
        """
        self.out, self.start = Path(out), start
        self.settings = {**settings, "--system-prompt": start}
        self.candidates = []
        lines = read_json_lines(self.out / "search.jsonl")
        if lines:
            kept = lines[0].get("settings", {})
            differ = [name for name, value in self.settings.items() if kept.get(name) != value]
            require(not differ, f"{out} holds another search, which differs in "
                    f"{', '.join(differ)}: give another --out, or the same settings")
            self.candidates = [Candidate(**line) for line in lines[1:] if "final" not in line]
        self.write(self.candidates)

    def write(self, candidates, final=None):
        lines = [{"settings": self.settings}] + [asdict(candidate) for candidate in candidates]
        if final:
            lines.append(final)
        write_json_lines(self.out / "search.jsonl", lines)
        write_text(self.out / "best.txt", best_system(self.start, candidates) + "\n")


def search_prompt(out, trials, propose, steps, settings):
    """Searches for a better system prompt than the reasoner's; nothing is trained.

    trials     Trials, with the reasoner that has the system prompt to start from
    propose    as in `climb`;  steps: system prompts to try
    settings   {"--flag": value} that a later call must share to go on with this search
    """
    start = trials.reasoner.system
    log = SearchLog(out, start, settings)
    print(f"start, {len(log.candidates)} candidates judged before:\n    {start}")
    best = climb(start, trials, propose, steps, trials.pairs, log.candidates, log.write,
                 trials.seed)

    final = gain_over(start, best, trials)
    log.write(log.candidates, final)
    print(json.dumps(final))


def gain_over(start, best, trials):
    """What the best system prompt gained, on requests that no candidate has met: for the log."""
    (before, after), _ = trials("final", 0, [start, best])
    p, gain = paired_test(before, after, seed=trials.seed)
    known = ~np.isnan(after - before)              # judged under both
    require(known.any(), "the judge answered for no request under both system prompts")
    before, after = before[known], after[known]
    spread = float((after - before).std())
    return {
        "final": True,
        "requests": len(before),
        "start": round(float(before.mean()), 4),
        "best": round(float(after.mean()), 4),
        "gain": round(gain, 4),
        "p": round(p, 5),
        "error": round(spread / math.sqrt(len(before)), 4),          # standard error of the gain
        "right_start": round(float((before == 1).mean()), 4),        # pictures without a failure
        "right_best": round(float((after == 1).mean()), 4),
    }


# --- The search: what a proposer is told, and a proposer behind an endpoint -----------------------

KINDS_TOLD = 12           # kinds of rubric in a summary: those of --data may have very many


def failures_in_words(rows, prompts, answers):
    """What a proposer is told: how often which kind of rubric failed, with an example of each.

    rows     [kit.rubrics.PromptRow], their prompts the requests; held-out rubrics, which are
             judged but never rewarded, are left out
    prompts  the requests as they were rewritten
    answers  of a judge: for each picture a list with True, False or None (failed) for each rubric
    """
    judged = Counter()                     # {kind of rubric: statements}
    false = defaultdict(list)              # {kind of rubric: [(statement, request, prompt)]}
    bad_pictures = 0
    for row, prompt, verdicts in zip(rows, prompts, answers, strict=True):
        is_bad = False
        for rubric, verdict in zip(row["rubrics"], verdicts, strict=True):
            if verdict is None or rubric.get("held_out"):
                continue
            judged[rubric["name"]] += 1
            if not verdict:
                false[rubric["name"]].append((rubric["check"], row["prompt"], prompt))
                is_bad = True
        bad_pictures += is_bad

    lines = [f"{bad_pictures} of {len(rows)} pictures had something wrong."]
    worst_first = sorted(false, key=lambda kind: (-len(false[kind]), kind))
    for kind in worst_first[:KINDS_TOLD]:
        check, request, prompt = false[kind][0]
        lines.append(f'{kind}: {len(false[kind])} of {judged[kind]} statements were false, such as '
                     f'"{check}" for the request "{request}", rewritten as "{prompt}".')
    return "\n".join(lines) + "\n"


ASK_PROPOSER = """\
A language model rewrites short requests for pictures into dense prompts for a text-to-image \
model. This is its system prompt:
---
{system}
---
Pictures made that way were judged: {failures}
{tried}Write a better system prompt: general rules that prevent such failures, nothing about \
single requests. It must still ask that all the user said is kept and that the reply is the prompt \
alone.
Reply with one JSON object, nothing else: {{"system_prompt": "..."}}"""

TRIED_BEFORE = """\
This was tried before and was not better, or was replaced by a better one: {text}
"""


def propose_by(endpoint):
    """-> propose, for `climb`: the language model behind a kit.chat.Endpoint.

    It is told the failures and the last four others that were tried; the start counts as tried once
    it is not the best any more. An unusable answer gives None, which ends the search.
    """
    def read(answer):
        found = parse_json(answer) or {}
        proposed = lens.strip_markers(str(found.get("system_prompt") or "")).strip()
        if not proposed:
            raise NoAnswer("no system prompt")
        return proposed

    def propose(system, failures, tried):
        others = [text for text in tried if text != system]
        earlier = "".join(TRIED_BEFORE.format(text=text) for text in others[-4:])
        question = ASK_PROPOSER.format(system=system, failures=failures, tried=earlier)
        proposed = endpoint.one([{"role": "user", "content": question}], read)
        if proposed is None:
            print(f"note: no system prompt from the proposer: {endpoint.failed[-1]}")
        if proposed in tried:
            return None
        return proposed

    return propose
