"""The toy world's prompts with rubrics, and a check whether a judge can be trusted.

Read before: toy/world.py, toy/checker.py, kit/rubrics.py.
"""
import collections
import math

import numpy as np

from kit.rubrics import CLEAN, COHERENT, PromptRow, Rubric
from toy.checker import fact_words
from toy.world import PLACES, TASKS, TONES, draw, facts, sample_scene

# --- Prompts --------------------------------------------------------------------------------------

TOY_EPOCH = 77                # the denoiser's scenes have their area there: 64, 96 or 128

# Reward RL lets go of texture, which no fact asks for: so it is watched, and never rewarded. Of
# drawn pictures nine in ten have some.
TEXTURED = Rubric(
    name="textured", held_out=True,
    check="The ground has bands or speckle, or an object has stripes or shading.")


def toy_scene(seed, i, tasks, size, style="dense"):
    """Scene i of the toy's prompts, the tasks in turn -> (scene, details, words)."""
    height, width = size
    task = tasks[i % len(tasks)]
    return sample_scene(seed, TOY_EPOCH, i, height, width, task=task, style=style)


def toy_row(seed, i, tasks, sizes, style="dense"):
    """Row i of the toy's prompts, its size drawn. The rubrics are what its caption claims."""
    drawn = np.random.default_rng((seed, i, 1)).integers(len(sizes))
    size = sizes[int(drawn)]
    scene, details, words = toy_scene(seed, i, tasks, size, style)
    rubrics = [fact_rubric(fact) for fact in facts(scene, details)]
    return PromptRow(prompt=words, rubrics=rubrics + [COHERENT, CLEAN, TEXTURED], size=size)


def fact_rubric(fact):
    return Rubric(name=fact.kind, check=fact_words(fact), fact=fact)


# --- Can a judge be trusted? ----------------------------------------------------------------------

OPPOSITE = {"to the left of": "to the right of", "to the right of": "to the left of",
            "above": "below", "below": "above"}
TRUSTED = 0.9                 # share of right answers, of each kind of claim, that a judge needs


def false_fact(fact, rng):
    """A claim of the same kind that does not hold where `fact` does."""
    if fact.kind in ("total", "count"):
        return fact._replace(value=fact.value + int(rng.integers(1, 3)))
    if fact.kind == "relation":
        return fact._replace(value=OPPOSITE[fact.value])      # only the opposite is surely wrong

    values = {"size": ("small", "large"), "background": tuple(TONES), "place": sum(PLACES, ())}
    others = [value for value in values[fact.kind] if value != fact.value]
    return fact._replace(value=str(rng.choice(others)))


def judge_check(judge, count, seed, size):
    """Has a judge look at `count` drawn scenes, with true and with altered claims.

    Returns {(kind of claim, whether it holds): [the judge's answers, without failures]}, and the
    number of failures.
    """
    pictures, rows, truths = [], [], []
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        scene, details, words = toy_scene(seed + 1, i, TASKS, size)
        true = facts(scene, details)
        # With two objects, the altered place of one may be the other's.
        alterable = [fact for fact in true if fact.kind != "place" or len(scene.objects) == 1]
        altered = [false_fact(fact, rng) for fact in alterable]

        rubrics = [fact_rubric(fact) for fact in true + altered]
        pictures.append(draw(scene, *size))
        rows.append(PromptRow(prompt=words, rubrics=rubrics, size=size))
        truths.append([True] * len(true) + [False] * len(altered))

    table, failures = collections.defaultdict(list), 0
    for answers, row, truth in zip(judge(pictures, rows), rows, truths):
        for answer, rubric, holds in zip(answers, row["rubrics"], truth):
            if answer is None:
                failures += 1
            else:
                table[rubric["name"], holds].append(answer)
    return dict(table), failures


def print_judge_check(judge, count, seed, size):
    """judge_check as a table, with a verdict."""
    table, failures = judge_check(judge, count, seed, size)
    right = {}                                     # {(kind, holds): share of right answers}
    for (kind, holds), answers in table.items():
        right[kind, holds] = sum(answer == holds for answer in answers) / len(answers)

    print(f"{'claim':12} {'true, affirmed':>16} {'altered, denied':>16}")
    for kind in dict.fromkeys(kind for kind, _ in right):
        affirmed, denied = right.get((kind, True), math.nan), right.get((kind, False), math.nan)
        print(f"{kind:12} {affirmed:16.3f} {denied:16.3f}")
    print(f"failed: {failures} {dict(collections.Counter(judge.failed)) or ''}")
    worst = min(right.values(), default=0.0)
    if worst >= TRUSTED:
        print("a run can trust this judge")
    else:
        print(f"do not trust this judge: {worst:.2f} at its worst, of {TRUSTED:.2f} wanted")
