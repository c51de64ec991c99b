"""Prompts with rubrics, judges, also behind a bad server, and the search for a system prompt."""
import json
import math
import re

import numpy as np
import pytest
from conftest import error_line
from PIL import Image

import data
import reason
import rl
import sample
from kit import chat
from kit import rubrics as kit_rubrics
from kit.chat import NoAnswer
from kit.files import LensError
from toy import rubrics as toy_rubrics
from toy.checker import Checker, check_facts
from toy.language import REWRITE
from toy.world import TASKS, draw, facts

# --- Prompts of the toy world ---------------------------------------------------------------------

def test_rows_of_the_toy_take_the_tasks_in_turn_and_claim_what_is_drawn():
    sizes = data.buckets(96)
    tasks = ["counting", "position"]
    for i in range(20):
        row = toy_rubrics.toy_row(5, i, tasks, sizes)
        scene, details, words = toy_rubrics.toy_scene(5, i, tasks, row["size"])
        assert scene.task == tasks[i % 2]
        assert row["prompt"] == words
        assert row["size"] in sizes

        claims = [rubric["fact"] for rubric in row["rubrics"] if "fact" in rubric]
        assert claims == facts(scene, details)
        assert row["rubrics"][-3:] == [
            kit_rubrics.COHERENT, kit_rubrics.CLEAN, toy_rubrics.TEXTURED]
        assert all(check_facts(draw(scene, *row["size"]), claims))


def test_sizes_of_the_toys_rows_are_all_drawn():
    sizes = data.buckets(96)
    assert {toy_rubrics.toy_row(0, i, TASKS, sizes)["size"] for i in range(80)} == set(sizes)


# --- Prompts of a file ----------------------------------------------------------------------------

LINE = {"prompt": "a cat", "rubrics": [{"name": "cat", "check": "There is a cat."}], "more": 1}


def write_lines(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def test_rows_of_a_file(tmp_path):
    held_out = {"name": "mat", "check": "There is a mat.", "held_out": True}
    line = {**LINE, "rubrics": LINE["rubrics"] + [held_out]}
    write_lines(tmp_path / "rows.jsonl", json.dumps(LINE), json.dumps(line))
    first, second = kit_rubrics.read_rows(tmp_path / "rows.jsonl", [(64, 64), (64, 96)])
    assert first["prompt"] == "a cat"
    assert first["rubrics"] == [LINE["rubrics"][0], kit_rubrics.COHERENT]
    assert second["rubrics"][1] == held_out
    assert {first["size"], second["size"]} == {(64, 64), (64, 96)}


@pytest.mark.parametrize("line, words", [
    ("no JSON", "line 2: not a prompt with rubrics"),
    ("", "line 2: not a prompt with rubrics"),
    ('{"prompt": "a cat"}', "line 2: not a prompt with rubrics"),
    ('{"prompt": 5, "rubrics": []}', "line 2: not a prompt with rubrics"),
    ('{"prompt": "a cat", "rubrics": [{"name": "cat"}]}', "line 2: not a prompt with rubrics"),
    ('{"prompt": " ", "rubrics": []}', "line 2: its prompt is empty"),
])
def test_a_line_that_is_no_row_is_named(tmp_path, line, words):
    write_lines(tmp_path / "rows.jsonl", json.dumps(LINE), line)
    with pytest.raises(LensError, match=words):
        kit_rubrics.read_rows(tmp_path / "rows.jsonl", [(64, 64)])


def writer(request):
    """An endpoint's model that writes prompts, but none for UI and Graphic Design."""
    words = request["messages"][0]["content"]
    if words.startswith("List"):
        return '["a thing", "another thing"]'
    if "UI and Graphic" in words:
        return "no"
    rubrics = [{"name": f"r{k}", "check": "there is a thing"} for k in range(5)]
    return json.dumps({"prompt": "A thing on a table.", "rubrics": rubrics})


def test_prompts_are_written_by_an_endpoint_and_resumed(server, tmp_path, capsys):
    server.script = [writer]
    path = tmp_path / "prompts.jsonl"
    for _ in range(2):
        rl.main(["--write-prompts", str(path), "--endpoint", server.url, "--pool", "100"])
    # The second time only what was unusable; and each time whether somebody is there.
    assert len(server.calls) == 1 + 50 + 100 + 1 + 10
    said = capsys.readouterr().out
    assert "Human                        10" in said
    assert "10 of 100 answers were no prompt" in said

    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(written) == 90
    for row in written:
        assert 1 <= len(row["dimensions"]) <= 4
        assert [rubric.get("held_out") for rubric in row["rubrics"]] == [None] * 4 + [True]
    read = kit_rubrics.read_rows(path, data.buckets(64))
    assert {row["size"] for row in read} == set(data.buckets(64))


@pytest.mark.parametrize("answer", [
    "no",
    "[]",
    '{"prompt": "a cat"}',
    '{"prompt": "", "rubrics": [{"name": "a", "check": "b"}]}',
    '{"prompt": "a cat", "rubrics": "x"}',
    '{"prompt": "a cat", "rubrics": [3, {"name": "a"}]}',
    '{"prompt": "a cat", "rubrics": [{"name": "a", "check": " "}]}',
    r'{"prompt": "a cat \ud83d", "rubrics": [{"name": "a", "check": "b"}]}',
])
def test_an_unusable_answer_gives_no_row(answer):
    with pytest.raises(NoAnswer):
        kit_rubrics.written_row(answer, {})


def test_few_facts_are_all_rewarded():
    rubrics = [{"name": "a", "check": "b"}] * 3
    answer = json.dumps({"prompt": " a cat ", "rubrics": rubrics})
    row = kit_rubrics.written_row(answer, {"item": "cat"})
    assert row["prompt"] == "a cat"
    assert row["item"] == "cat"
    assert not any(rubric.get("held_out") for rubric in row["rubrics"])


@pytest.mark.parametrize("script, words", [
    ([400], "no answer from default at .*HTTP 400"),
    (["I would rather not."], "no usable prompt"),
])
def test_an_endpoint_that_writes_nothing_is_one_line(server, tmp_path, capsys, script, words):
    server.script = script
    argv = ["--write-prompts", str(tmp_path / "p.jsonl"), "--endpoint", server.url, "--pool", "50"]
    assert re.search(words, error_line(rl.main, argv, capsys))
    assert not (tmp_path / "p.jsonl").exists()


DEAD = "http://127.0.0.1:9/v1"


@pytest.mark.parametrize("what", [
    ["--write-prompts", "p.jsonl"],
    ["--judge-check"],
    ["--search"],
    [],
])
def test_a_dead_server_is_one_line_before_any_work(tmp_path, monkeypatch, capsys, what):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.01)
    argv = [*what, "--endpoint", DEAD, "--out", "run", "--pool", "50", "--device", "cpu"]
    assert "no answer from default at " + DEAD in error_line(rl.main, argv, capsys)
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize("answer, items", [
    ('["a", "b"]', ["a", "b"]),
    ('Things: ["a", 3, ""]', ["a"]),
    ('{"things": ["a"]}', ["a"]),
    ("no", None),
    ("[1, 2]", None),
])
def test_a_list_of_things_is_read_or_counted(answer, items):
    if items:
        assert kit_rubrics.listed_items(answer, None) == items
        return
    with pytest.raises(NoAnswer):
        kit_rubrics.listed_items(answer, None)


# --- Judges ---------------------------------------------------------------------------------------

def test_a_reward_leaves_out_failures_and_what_is_held_out():
    plain, held_out = {"name": "a", "check": "b"}, {"name": "c", "check": "d", "held_out": True}
    assert kit_rubrics.reward_of([True, False, None, True], [plain] * 4) == 2 / 3
    assert kit_rubrics.reward_of([True, False], [plain, held_out]) == 1.0
    assert math.isnan(kit_rubrics.reward_of([None, True], [plain, held_out]))


def test_a_blank_picture_earns_less_than_everything():
    row = toy_rubrics.toy_row(5, 0, TASKS, [(96, 96)])
    (answers,) = Checker()([np.full((96, 96, 3), 128, np.uint8)], [row])
    assert kit_rubrics.reward_of(answers, row["rubrics"]) < 1


def test_the_checker_is_a_good_judge():
    table, failures = toy_rubrics.judge_check(Checker(), 60, seed=0, size=data.bucket(128))
    assert failures == 0
    kinds = {"total", "count", "size", "place", "relation", "background"}
    assert {kind for kind, holds in table if holds} == kinds
    assert {kind for kind, holds in table if not holds} == kinds
    for (_, holds), answers in table.items():
        assert np.mean([answer == holds for answer in answers]) >= 0.99


class Flatterer:
    """Affirms everything, but fails at each tenth picture."""
    failed = ["HTTP 500"]

    def __call__(self, pictures, rows):
        return [[None if k % 10 == 0 else True for _ in row["rubrics"]]
                for k, row in enumerate(rows)]


def test_a_judge_that_affirms_everything_is_not_trusted(capsys):
    toy_rubrics.print_judge_check(Flatterer(), 20, seed=0, size=(128, 128))
    said = capsys.readouterr().out
    assert "do not trust this judge: 0.00 at its worst" in said
    assert "'HTTP 500': 1" in said


def test_the_judge_check_is_a_command(capsys):
    rl.main(["--judge-check", "--pool", "30"])
    assert "a run can trust this judge" in capsys.readouterr().out


YES_NO = [True, False]


@pytest.mark.parametrize("text, expected", [
    ('{"1": 1, "2": 0}', YES_NO),
    ('{"1": 1.0, "2": 0.0}', YES_NO),
    ('{"1": true, "2": false}', YES_NO),
    ('{"1": "1", "2": "0"}', YES_NO),
    ('{"1": "Yes.", "2": "No"}', YES_NO),
    ('{"1": "yes - clearly", "2": "No, it is blue."}', YES_NO),
    ('{"1": "**YES**", "2": " no (hidden) "}', YES_NO),
    ('{"1": "True", "2": "false: it is blue"}', YES_NO),
    ('{"2": 0, "1": 1}', YES_NO),
    ('{"1.": 1, "Statement 2": 0}', YES_NO),
    ('{"1": 1, "2": 0, "remark": "dark"}', YES_NO),
    ('{"answers": {"1": 1, "2": 0}}', YES_NO),
    ('{"answers": [1, 0]}', YES_NO),
    ("[1, 0]", YES_NO),
    ('["yes", "no"]', YES_NO),
    ('[{"1": 1}, {"2": 0}]', YES_NO),
    ('Sure:\n```json\n{"1": 1, "2": 0}\n```\nAnything {else}?', YES_NO),
    ('{"1": 1, "2": 0}\n\nStatement 2 fails: see [2].', YES_NO),
    ('<think>{1: yes?} {"1": 0, "2": 0}</think>{"1": 1, "2": 0}', YES_NO),
    ('{"1": 1, "2": 0} So: {"1": 1, "2": 0}', YES_NO),
    ('{"1": 1, "2": 0,}', YES_NO),
    ('{"answers": [{"1": 1}, {"2": 0}]}', YES_NO),
    ('[THINK]{"1": 0, "2": 0}?[/THINK]{"1": 1, "2": 0}', YES_NO),
    # Not read: half, unclear, or twice in different ways.
    ('{"1": 1}', None),
    ('Draft {"1": 0, "2": 0}. Final: {1: 1, 2: 0}', None),
    ('Draft {"1": 0, "2": 0}. Final: {"1": 1, "2": 0', None),
    ('{"no": {"1": 1, "2": 0}}', None),
    ('{"violated": {"1": 1, "2": 0}}', None),
    ('{"1": 1, "2": 0, "1": 0}', None),
    ('{"1": "1, 0", "2": 0}', None),
    ('{"1": 1, "2": 0, "' + "1" * 5000 + '": 1}', [True, False]),
    ('{"1": "yes, no", "2": 0}', None),
    ('{"1": "1 (out of 10)", "2": 0}', None),
    ('{"-1": 1, "2": 0}', None),
    ('{"1": 1, "2": null}', None),
    ('{"1": 1, "2": 0.5}', None),
    ('{"1": 1, "2": "0.5"}', None),
    ('{"1": 1, "2": 2}', None),
    ('{"1": "yes", "2": "no idea"}', None),
    ('{"1": "yes", "2": "yes and no"}', None),
    ('{"1": "yes", "2": "yes/no"}', None),
    ('{"1": "yes", "2": "-1"}', None),
    ('{"1": "yes", "2": ["no"]}', None),
    ('{"0": 1, "1": 0}', None),
    ('{"1": 1, "2": 0, "3": 1}', None),
    ('{"2 cats": 1, "1 dog": 0}', None),
    ('{"1": 1, "1.": 0, "2": 0}', None),
    ('[{"statement": 1, "holds": true}, {"statement": 2, "holds": false}]', None),
    ("[1, 0, 1]", None),
    ("[1]", None),
    ('{"1": 1, "2": 1}. No: {"1": 1, "2": 0}', None),
    ('{"1": 1, "2"', None),
    ('<think>{"1": 1, "2": 0}', None),
    ("[" * 5000 + "]" * 5000, None),
    ("yes, no", None),
])
def test_an_answer_of_a_judge_is_read_whole_or_not_at_all(text, expected):
    if expected:
        assert kit_rubrics.verdicts(text, 2) == expected
        return
    with pytest.raises(NoAnswer, match="nonsense"):
        kit_rubrics.verdicts(text, 2)


@pytest.mark.parametrize("rubric", [
    {"name": "a", "check": "b", "held_out": "false"},
    {"name": "a", "check": None},
    {"name": "a", "check": " "},
    {"name": ["a"], "check": "b"},
])
def test_a_rubric_of_other_types_is_refused(rubric, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a cat", "rubrics": [rubric]}))
    with pytest.raises(LensError, match="line 1: .*(held_out|is not a text)"):
        kit_rubrics.read_rows(path, [(64, 64)])


def test_half_a_character_in_a_prompt_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(r'{"prompt": "a cat \ud83d", "rubrics": [{"name": "a", "check": "b"}]}')
    with pytest.raises(LensError, match="line 1: half a character"):
        kit_rubrics.read_rows(path, [(64, 64)])


def all_yes(request):
    words = request["messages"][0]["content"][1]["text"]
    answers = {k: 1 for k in range(1, words.count("\n") + 1)}
    return f"Sure:\n```json\n{json.dumps(answers)}\n```"


def impatient_judge(server, tmp_path):
    journal = tmp_path / "judge.jsonl"
    return kit_rubrics.EndpointJudge(server.url, "m", journal, workers=1, tries=1, timeout=1)


def test_a_judge_that_misbehaves_costs_a_count(server, tmp_path):
    row = toy_rubrics.toy_row(1, 0, TASKS, [(64, 64)])
    pictures = [Image.new("RGB", (64, 64), (20 * k,) * 3) for k in range(6)]
    server.script = [all_yes, "I would rather not.", '{"1": 1}', 400, "die", "hang"]
    judge = impatient_judge(server, tmp_path)
    answers = judge(pictures, [row] * 6)

    count = len(row["rubrics"])
    assert answers[0] == [True] * count
    for k in range(1, 6):
        assert answers[k] == [None] * count
    rewards = [kit_rubrics.reward_of(one, row["rubrics"]) for one in answers]
    assert rewards[0] == 1.0
    assert all(math.isnan(reward) for reward in rewards[1:])
    assert len(judge.failed) == 5
    assert judge.failed.count("nonsense") == 2


def test_only_what_gave_no_verdicts_is_asked_again(server, tmp_path):
    row = toy_rubrics.toy_row(1, 0, TASKS, [(64, 64)])
    pictures = [Image.new("RGB", (64, 64), (20 * k,) * 3) for k in range(4)]
    server.script = [all_yes, 400, all_yes, '{"1": "Yes.", "2": "maybe"}']
    first = impatient_judge(server, tmp_path)(pictures, [row] * 4)
    server.script = [all_yes]
    again = impatient_judge(server, tmp_path)(pictures, [row] * 4)
    assert len(server.calls) == 6
    assert again[0] == first[0]
    assert first[1] == first[3] == [None] * len(row["rubrics"])
    assert again == [[True] * len(row["rubrics"])] * 4


def test_a_judge_is_asked_at_temperature_0(server, tmp_path):
    row = toy_rubrics.toy_row(1, 0, TASKS, [(64, 64)])
    server.script = [all_yes]
    judge = impatient_judge(server, tmp_path)
    judge.check()
    judge([Image.new("RGB", (64, 64))], [row])
    assert [call["temperature"] for call in server.calls] == [0, 0]


def test_a_judge_sees_the_picture_beside_numbered_statements(server, tmp_path):
    row = toy_rubrics.toy_row(1, 0, TASKS, [(64, 64)])
    server.script = [all_yes]
    impatient_judge(server, tmp_path)([Image.new("RGB", (64, 64))], [row])
    picture, words = server.calls[0]["messages"][0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,")
    for k, rubric in enumerate(row["rubrics"], start=1):
        assert f"\n{k}. {rubric['check']}" in words["text"]


# --- The search, with pictures of the shipped toy -------------------------------------------------

@pytest.fixture
def small_search(monkeypatch):
    """Few pictures of two steps; and an error so large that something is accepted on them."""
    monkeypatch.setitem(reason.SEARCH, "toy", reason.Search(summary=3, pairs=6, final=6))
    monkeypatch.setattr(reason, "ERROR", 0.9)
    monkeypatch.setattr(sample, "sampler_settings", lambda *_: (2, 1.0))


def search(out, steps, *flags):
    rl.main(["--search", "--out", str(out), "--steps", str(steps), "--pool", "60",
             "--device", "cpu", "--dtype", "fp32", *flags])
    return [json.loads(line) for line in (out / "search.jsonl").read_text().splitlines()]


def stop_in_second_candidate(self, which, k, systems, made=reason.Trials.__call__):
    if k > 0 and which != "final":
        raise KeyboardInterrupt
    return made(self, which, k, systems)


def test_a_search_resumes_logs_and_saves_what_sample_takes(small_search, tmp_path, monkeypatch,
                                                           capsys):
    straight = search(tmp_path / "a", 2)
    candidates = [line for line in straight if "candidate" in line]
    assert len(candidates) == 2
    assert straight[-1]["final"]
    accepted = [line["system"] for line in candidates if line["accepted"]]
    best = ([REWRITE] + accepted)[-1]
    assert (tmp_path / "a" / "best.txt").read_text().strip() == best

    # Stopped in the middle of its second candidate, it goes on to the same end.
    with monkeypatch.context() as patch:
        patch.setattr(reason.Trials, "__call__", stop_in_second_candidate)
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / "b", 2)
    assert search(tmp_path / "b", 2) == straight
    said = capsys.readouterr().out
    assert "1 candidates judged before" in said
    hint = said.splitlines()[-1]
    assert hint.startswith("done: python sample.py --reason --prompt ")
    assert hint.endswith(f" --system-prompt {tmp_path / 'b' / 'best.txt'}")

    argv = ["--search", "--out", str(tmp_path / "a"), "--pool", "60", "--seed", "1",
            "--device", "cpu", "--dtype", "fp32"]
    line = error_line(rl.main, argv, capsys)
    assert "another search, which differs in --seed" in line

    # sample.py takes the result as it is.
    sample.main(["--reason", "--prompt", "a star", "--system-prompt", str(tmp_path / "a/best.txt"),
                 "--out", str(tmp_path / "c"), "--steps", "1", "--guidance", "1", "--height", "64",
                 "--device", "cpu", "--dtype", "fp32", "--cache", ""])
    (picture,) = (tmp_path / "c").glob("*.png")
    assert Image.open(picture).text["system_prompt"] == best


def echo(system, requests, seed, trial):
    """A reasoner that leaves requests as they are."""
    return requests


def fake_trials(rows=None, judge=None, seed=0):
    """(Trials on 60 toy prompts or `rows`, the seeds of every batch of pictures)."""
    asked = []

    def blank_pictures(prompts, seeds):
        asked.append(seeds)
        return [Image.new("RGB", (64, 64)) for _ in prompts]

    if rows is None:
        rows = [toy_rubrics.toy_row(0, i, TASKS, [(64, 64)]) for i in range(60)]
    trials = reason.Trials(
        rows, reason.Reasoner(echo, REWRITE), blank_pictures, judge or Checker(),
        reason.Search(summary=5, pairs=10, final=5), seed)
    return trials, asked


PARTS = ("summary", "pairs 1", "pairs 2", "final")


def test_no_row_is_in_two_sets():
    trials, asked = fake_trials()
    for which in PARTS:
        trials(which, 0, [REWRITE])
    assert [len(seeds) for seeds in asked] == [5, 5, 5, 5]
    assert len(set(sum(asked, []))) == 20


@pytest.mark.parametrize("seed", range(5))
def test_no_request_is_in_two_sets_where_requests_repeat(seed):
    rows = [{"prompt": f"request {i % 15}", "rubrics": [kit_rubrics.COHERENT]} for i in range(60)]
    trials, _ = fake_trials(rows, seed=seed)
    sets = {name: {rows[i]["prompt"] for i in trials.parts[name][0]} for name in PARTS}
    assert sets["pairs 1"] == sets["pairs 2"]
    dealt = [sets["summary"], sets["pairs 1"], sets["final"]]
    assert sum(len(requests) for requests in dealt) == len(set.union(*dealt)) == 15
    members = [trials.parts[name][0] for name in ("summary", "pairs 1", "final")]
    assert sorted(sum(members, [])) == list(range(60))


def test_distinct_requests_are_dealt_as_their_rows_were():
    trials, _ = fake_trials(seed=3)
    parts = np.array_split(np.random.default_rng(3).permutation(60), 3)
    for name, part in zip(("summary", "pairs 1", "final"), parts):
        assert trials.parts[name][0] == part.tolist()


def test_the_second_half_of_few_pairs_is_not_empty(tmp_path, monkeypatch):
    """Twelve rows make sets of four, fewer than half of the pairs that the search would take."""
    monkeypatch.setattr(reason, "ERROR", 0.9)
    rows = [toy_rubrics.toy_row(0, i, TASKS, [(64, 64)]) for i in range(12)]
    shown = []

    def judge(pictures, rows):
        """The first system prompt's pictures are wrong, the other's are right."""
        shown.append(len(pictures))
        right = len(shown) % 2 == 1
        return [[right] * len(row["rubrics"]) for row in rows]

    judge.failed = ()
    trials, _ = fake_trials(rows, judge)
    assert trials.pairs == 4

    def propose(system, failures, tried):
        return "a better one"

    reason.search_prompt(tmp_path, trials, propose, 1, {})
    lines = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()]
    assert shown == [4, 2, 2, 2, 2, 4, 4]           # summary; halves, under both each; final
    assert lines[1]["pairs"] == 4
    assert lines[1]["accepted"]
    assert (tmp_path / "best.txt").read_text() == "a better one\n"


def test_the_gain_counts_what_was_judged_under_both():
    nan = math.nan

    def trials(which, k, systems):
        assert which == "final"
        return np.array([[0.0, 0.5, 0.5, nan], [1.0, 1.0, 0.5, 1.0]]), ["", ""]

    trials.seed = 0
    final = reason.gain_over("start", "best", trials)
    assert final["requests"] == 3
    assert final["gain"] == 0.5
    assert final["error"] == round(np.std([1.0, 0.5, 0.0]) / math.sqrt(3), 4)
    assert final["start"] == round(1 / 3, 4)
    assert final["right_best"] == round(2 / 3, 4)


def test_both_system_prompts_get_the_same_requests_and_noises():
    trials, asked = fake_trials()
    rewards, failures = trials("pairs 1", 0, ["one", "other"])
    assert asked[0] == asked[1]
    assert rewards.shape == (2, 5)
    assert np.array_equal(rewards[0], rewards[1])
    assert len(failures) == 2
    assert failures[0].startswith("5 of 5 pictures had something wrong")
    trials("pairs 1", 1, ["one"])
    assert asked[2] != asked[0]                      # the next candidate meets other requests


class Silent:
    failed = ["HTTP 400"] * 3

    def __call__(self, pictures, rows):
        return [[None] * len(row["rubrics"]) for row in rows]


def test_a_search_whose_judge_never_answers_says_so():
    trials, _ = fake_trials(judge=Silent())
    with pytest.raises(LensError, match="no answer from the judge.*'HTTP 400': 3"):
        trials("summary", 0, [REWRITE])


def test_a_search_needs_enough_prompts(tmp_path, capsys):
    argv = ["--search", "--out", str(tmp_path), "--pool", "11", "--device", "cpu"]
    assert "too few for a search" in error_line(rl.main, argv, capsys)


# --- The search behind an endpoint ----------------------------------------------------------------

def everything(request):
    """A judge, a proposer and a reasoner in one model."""
    last = request["messages"][-1]["content"]
    if isinstance(last, list):
        return all_yes(request)
    if "system prompt" in last:
        return '{"system_prompt": "Describe each object apart."}'
    return "a large red circle"


def test_a_search_by_an_endpoint(server, small_search, tmp_path):
    rows = [json.dumps({**LINE, "prompt": f"a red circle, {k}"}) for k in range(30)]
    write_lines(tmp_path / "rows.jsonl", *rows)
    server.script = [everything]
    lines = search(tmp_path / "out", 1, "--data", str(tmp_path / "rows.jsonl"),
                   "--endpoint", server.url, "--model", "m", "--reasoner-model", "writer")
    assert lines[0]["settings"]["--system-prompt"] != REWRITE      # the reasoner's own
    assert lines[1]["system"] == "Describe each object apart."
    assert not lines[1]["accepted"]                                # everything was right before
    assert lines[-1]["gain"] == 0
    assert {call["model"] for call in server.calls} == {"m", "writer"}
