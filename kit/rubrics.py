"""What pictures are judged by: prompts with rubrics, and a judge behind an endpoint.

Read before: kit/chat.py. `rl.py` rewards what the judges say; `toy/rubrics.py` has the toy's own
prompts, and a check whether a judge can be trusted.
"""
import collections
import json
import math
import re
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import Image

from kit.chat import (
    Endpoint,
    NoAnswer,
    chat_about,
    final_channel,
    json_values,
    parse_json,
    without_thoughts,
)
from kit.files import (
    error_context,
    is_whole,
    one_form,
    read_text,
    require,
    write_json_lines,
)

# --- Prompts with rubrics -------------------------------------------------------------------------

class Rubric(TypedDict, total=False):
    """A statement about a picture, which a judge affirms or denies."""
    name: str                 # what the log counts it under, two words at most
    check: str                # the statement, in words
    fact: object              # the same for the checker, a toy.world.Fact; the toy's alone
    held_out: bool            # judged, but never rewarded


class PromptRow(TypedDict):
    """A prompt and what its pictures are judged by. A file's lines have it without the size."""
    prompt: str
    rubrics: list             # [Rubric]
    size: tuple               # (height, width) of its pictures


# The global rubric of every prompt. [paper]
COHERENT = Rubric(
    name="coherent",
    check="The whole picture is structurally coherent and physically plausible.")

# Where a held-out rubric falls while the reward rises, the reward is being gamed. The toy's facts
# pass over specks that are smaller than any object, so a policy that pleases them may leave some.
CLEAN = Rubric(name="clean", check="There are no stray specks or smears.", held_out=True)


A_ROW = '{"prompt": "...", "rubrics": [{"name": "...", "check": "..."}]}'


def read_rows(path, sizes):
    """[PromptRow] of a JSON-lines file, the sizes in turn. LensError names a line that is none.

    A line: {"prompt": "...", "rubrics": [{"name": "...", "check": "...", "held_out": true}, ...]};
    "held_out" may be missing, and there may be more.
    """
    lines = []
    if Path(path).is_file():
        # At "\n" alone: str.splitlines would also split inside a JSON string, at U+2028.
        lines = read_text(path).split("\n")
        if lines[-1] == "":                        # after the end of the last line
            lines.pop()

    rows = []
    for n, line in enumerate(lines, start=1):
        with error_context(f"--data {path}, line {n}: not a prompt with rubrics like {A_ROW}"):
            given = json.loads(line)
            prompt = given["prompt"]
            require(prompt.strip(), f"--data {path}, line {n}: its prompt is empty")
            require(is_whole(prompt), f"--data {path}, line {n}: half a character in its prompt")
            rubrics = [read_rubric(rubric) for rubric in given["rubrics"]]
        size = sizes[n % len(sizes)]
        rows.append(PromptRow(prompt=one_form(prompt), rubrics=rubrics + [COHERENT], size=size))
    require(rows, f"--data {path}: no prompts there (rl.py --write-prompts makes such a file)")
    return rows


def read_rubric(given):
    """A Rubric of one in a file; ValueError where it is none."""
    for name in ("name", "check"):
        if not isinstance(given[name], str) or not given[name].strip():
            raise ValueError(f"{name} is not a text")
    if given["name"] == "held_out":                # the log counts all held-out ones under it
        raise ValueError("a rubric cannot be called held_out")
    held_out = given.get("held_out") or False
    if not isinstance(held_out, bool):
        raise ValueError("held_out is neither true nor false")
    rubric = Rubric(name=given["name"], check=given["check"])
    if held_out:
        rubric["held_out"] = True
    return rubric


# --- Judges ---------------------------------------------------------------------------------------
# judge(pictures, rows) -> for each picture the answers to its row's rubrics: True, False, or None
# (failed); judge.failed: why answers are None. The toy world's judge is toy.checker.Checker.

ASK_JUDGE = """\
Look at the picture. For each statement below, say whether it holds: 1 for yes, 0 for no. \
Reply with one JSON object from the statement's number to 1 or 0, nothing else.
"""


class EndpointJudge:
    """A vision-language model behind an OpenAI-compatible endpoint.

    All rubrics of a picture go in one request, and JSON comes back. Answers are kept by content in
    a journal: a picture that was judged before costs nothing. What fails is None, and counted in
    `failed`.
    """

    def __init__(self, url, model, journal, **how):
        # However long it is silent: the run counts what fails, and saves before it stops.
        self.endpoint = Endpoint(url, model, journal, temperature=0, patience=None, **how)
        self.failed = self.endpoint.failed

    def check(self):
        """LensError where the model does not answer, asked about a grey picture."""
        blank = Image.new("RGB", (64, 64), "grey")
        self.endpoint.check(self.question((blank, {"rubrics": [COHERENT]})))

    def __call__(self, pictures, rows):
        answers = self.endpoint.ask(list(zip(pictures, rows)), self.question, self.read)
        return [known or [None] * len(row["rubrics"]) for known, row in zip(answers, rows)]

    @staticmethod
    def question(item):
        picture, row = item
        statements = [f"{k}. {rubric['check']}" for k, rubric in enumerate(row["rubrics"], start=1)]
        return chat_about(picture, ASK_JUDGE + "\n".join(statements))

    @staticmethod
    def read(text, item):
        _, row = item
        return verdicts(text, len(row["rubrics"]))


def verdicts(text, count):
    """A judge's text -> [True or False], one for each of `count` statements.

    NoAnswer where they are not all there, where the text holds two readings that differ, or an
    object that begins like one and cannot be read (then what can be read may be a draft): a part of
    an answer is not kept, since the parts that cannot be read are not yes and no alike.
    """
    values = json_values(text)
    whole = sum(count_objects(value) for value, _ in values)
    begun = re.findall(r"""\{\s*["']?\W*(?:statement|claim)?[\W_]*\d""",
                       without_thoughts(final_channel(text)), re.I)
    if len(begun) > whole:
        raise NoAnswer("nonsense")

    readings = []
    for value, _ in values:
        reading = reading_of(value, count)
        if reading is not None and reading not in readings:
            readings.append(reading)
    if len(readings) != 1:
        raise NoAnswer("nonsense")
    return readings[0]


def count_objects(value):
    """How many JSON objects a value is and holds."""
    if isinstance(value, list):
        return sum(count_objects(one) for one in value)
    if isinstance(value, dict):
        return 1 + sum(count_objects(one) for one in value.values())
    return 0


def reading_of(value, count):
    """A JSON value -> [True or False] for each statement, or None.

    Forms: {"1": yes, "2": no}, the same inside {"answers": ...}, [yes, no], [{"1": yes}, {"2": no}]
    """
    if isinstance(value, dict) and len(value) == 1:
        ((name, inside),) = value.items()
        if isinstance(inside, (dict, list)) and name.lower() in WRAPPINGS:
            value = inside

    pairs = []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and all(isinstance(one, dict) for one in value):
        pairs = [pair for one in value for pair in one.items()]
    elif isinstance(value, list):
        pairs = list(enumerate(value, start=1))

    said = {}                                      # {statement's number: True, False or None}
    for name, answer in pairs:
        number = STATEMENT.fullmatch(str(name))
        if number is None:                         # a remark beside the answers
            continue
        if int(number[1]) in said:
            return None
        said[int(number[1])] = verdict_of(answer)
    if sorted(said) != list(range(1, count + 1)) or None in said.values():
        return None
    return [said[k] for k in range(1, count + 1)]


# What may stand around the answers; "no" or "violated" would turn them over.
WRAPPINGS = ("answer", "answers", "result", "results", "verdict", "verdicts", "statements",
             "judgement", "judgements", "judgment", "judgments", "evaluation", "scores", "output",
             "response", "picture", "image")

# "1", "2.", "Statement 3", "s_4"; not "2 cats", and not "-1".
STATEMENT = re.compile(
    r"(?!\s*-)\W*(?:statement|claim|rubric|item|no|q|s)?[\W_]*(\d{1,4})\W*", re.I)

# A word of yes or no, alone or before a sign that sets a reason apart: "No, it is blue." but not
# "no idea", "0.5" or "yes and no".
VERDICT = re.compile(
    r"""[\s*_"'`(]*(yes|true|1|no|false|0)(?:\.0+)?[\s*_"'`)]*
        (?:[.,;:!(–—-](?!\s*(?:\d|yes\b|no\b|true\b|false\b|out\s+of\b)).*)?""",
    re.I | re.S | re.X)


def verdict_of(value):
    """1, 1.0, true, "yes", "Yes - clearly" -> True, their opposites False, anything else None."""
    if not isinstance(value, (str, int, float)):
        return None
    match = VERDICT.fullmatch(str(value))          # of True: "True"
    if match is None:
        return None
    return match[1].lower() in ("yes", "true", "1")


# --- What the answers say -------------------------------------------------------------------------

def reward_of(answers, rubrics):
    """Mean of the rewarded rubrics' answers that came, or NaN where none did."""
    known = [answer for answer, rubric in zip(answers, rubrics)
             if answer is not None and not rubric.get("held_out")]
    return sum(known) / len(known) if known else math.nan


def rubric_shares(answers, rows):
    """{rubric: share of yes}, and "held_out": that of all which are held out, together.

    answers: for each row, for each of its pictures, the answers to the row's rubrics
    """
    by_name = collections.defaultdict(list)
    for group, row in zip(answers, rows):
        for judged in group:
            for answer, rubric in zip(judged, row["rubrics"]):
                if answer is None:
                    continue
                by_name[rubric["name"]].append(answer)
                if rubric.get("held_out"):
                    by_name["held_out"].append(answer)

    # A file's rubrics have a thousand names: the commonest are enough.
    common = sorted(by_name, key=lambda name: (name != "held_out", -len(by_name[name])))[:16]
    return {name: round(sum(by_name[name]) / len(by_name[name]), 4) for name in common}


def gaming(history):
    """The warning that the reward is being gamed: it rises, while diversity or the held-out rubrics
    fall. "" where it is not.

    history: [(reward, diversity, held-out rubrics' share of yes)], one entry a step. The means of
    the newest ten steps are held against those of the first ten.
    """
    reward_then, diversity_then, held_out_then = np.mean(history[:10], axis=0)
    reward_now, diversity_now, held_out_now = np.mean(history[-10:], axis=0)
    if reward_now <= reward_then + 0.02:
        return ""
    if diversity_now < 0.8 * diversity_then:
        return f"diversity fell to {diversity_now / diversity_then:.2f} of the start's"
    if held_out_now < held_out_then - 0.05:
        return f"the held-out rubrics fell from {held_out_then:.2f} to {held_out_now:.2f}"
    return ""


# --- Written by a language model ------------------------------------------------------------------
# Taxonomy -> category -> item -> drawn dimensions -> prompt, and the rubrics that it is judged by.

# The ten categories are the paper's, what is inside them is [ours].
TAXONOMY = {
    "Human": ("portraits", "people at work", "families and groups", "sports",
              "dancers and musicians"),
    "Object": ("tools", "furniture", "vehicles", "instruments", "household things"),
    "Animal": ("mammals", "birds", "fish and sea life", "insects", "reptiles and amphibians"),
    "Plant": ("trees", "flowers", "vegetables", "mosses and ferns", "cacti"),
    "Scene": ("cities", "mountains", "coasts", "interiors", "villages and farms"),
    "Food": ("dishes", "baking", "drinks", "fruit", "street food"),
    "Event": ("festivals", "weddings", "concerts", "competitions", "markets"),
    "Fictional World": ("dragons and beasts", "space", "fairy tales", "cities of the future",
                        "mythology"),
    "Text": ("signs", "posters", "book covers", "labels", "handwriting"),
    "UI and Graphic Design": ("app screens", "dashboards", "logos", "icons", "infographics"),
}

# One to four of these are drawn for each prompt. [paper]
DIMENSIONS = ("attribute", "spatial relationship", "count", "interaction", "color")


WRITE_ITEMS = """\
List {count} different concrete things that a picture of the kind '{sub}' ({category}) could show. \
Reply with a JSON list of short strings, nothing else."""

WRITE_ROW = """\
Write one dense prompt of about 80 English words for a picture of: {item} ({sub}, {category}). \
It must state: {dimensions}. \
Then write up to ten rubrics, each one fact of the prompt that can be seen to be so or not. \
Reply with one JSON object, nothing else: \
{{"prompt": "...", "rubrics": [{{"name": "two words", "check": "..."}}]}}"""


def write_prompts(path, url, model, pool, seed):
    """A language model fills the taxonomy: about `pool` prompts with rubrics, lines of `path`.

    Every answer that could be used is kept beside the file, so the same command again asks only
    for what is missing.
    """
    endpoint = Endpoint(url, model, f"{path}.answers")
    endpoint.check([{"role": "user", "content": "Are you there? Reply with one word."}])
    plans = plan_prompts(endpoint, pool, seed)
    answers = endpoint.ask(plans, ask_for_row, written_row)
    rows = [row for row in answers if row]

    counts = collections.Counter(row["category"] for row in rows)
    for category in TAXONOMY:
        print(f"{category:24} {counts[category]:6}")
    print(f"{len(plans) - len(rows)} of {len(plans)} answers were no prompt with rubrics")
    if endpoint.failed:
        print(f"failed: {dict(collections.Counter(endpoint.failed))}")
    require(rows, f"{url} gave no usable prompt; is the URL right up to and with /v1, and "
            "LENS_API_KEY set?")
    write_json_lines(path, rows)


def plan_prompts(endpoint, pool, seed):
    """What to ask prompts for: [{category, subcategory, item, dimensions}], about `pool` of them,
    as many for each sub-category."""
    subs = [(category, sub) for category, inside in TAXONOMY.items() for sub in inside]
    each = math.ceil(pool / len(subs))

    def ask_for_items(pair):
        category, sub = pair
        words = WRITE_ITEMS.format(count=each, sub=sub, category=category)
        return [{"role": "user", "content": words}]

    answers = endpoint.ask(subs, ask_for_items, listed_items)
    rng = np.random.default_rng(seed)
    plans = []
    for (category, sub), answer in zip(subs, answers):
        for item in (answer or [])[:each]:
            order = rng.permutation(DIMENSIONS)
            dimensions = order[:rng.integers(1, 5)].tolist()
            plans.append({"category": category, "subcategory": sub, "item": item,
                          "dimensions": dimensions})
    return plans


def listed_items(answer, _):
    """[str] of a language model's answer."""
    items = parse_json(answer, "[") or []
    items = [item for item in items if isinstance(item, str) and item.strip()]
    if not items:
        raise NoAnswer("no list of things")
    return items


def ask_for_row(plan):
    words = WRITE_ROW.format(item=plan["item"], sub=plan["subcategory"],
                             category=plan["category"], dimensions=", ".join(plan["dimensions"]))
    return [{"role": "user", "content": words}]


def written_row(answer, plan):
    """A line of the file from a language model's answer; NoAnswer where the answer is unusable."""
    given = parse_json(answer) or {}
    prompt, listed = given.get("prompt"), given.get("rubrics")
    if not isinstance(prompt, str) or not prompt.strip() or not isinstance(listed, list):
        raise NoAnswer("no prompt with rubrics")
    if not is_whole(prompt):
        raise NoAnswer("half a character")

    rubrics = [{"name": str(rubric["name"]), "check": str(rubric["check"])}
               for rubric in listed[:10]
               if isinstance(rubric, dict) and {"name", "check"} <= rubric.keys()
               and str(rubric["name"]).strip() and str(rubric["check"]).strip()]
    if not rubrics:
        raise NoAnswer("no prompt with rubrics")
    rubrics[-1]["held_out"] = len(rubrics) > 3     # one fact of each prompt that no reward sees
    return {**plan, "prompt": prompt.strip(), "rubrics": rubrics}
