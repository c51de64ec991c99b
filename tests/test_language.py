"""The toy's language: what its reasoner must keep, its proposer, its tokenizer, its training."""
import doctest
import functools
import json
import re
import signal

import numpy as np
import pytest
import torch
from conftest import ROOT, error_line, killed_after_steps, rows

import lens
import reason
from kit.checkpoint import load_text_encoder
from kit.places import read_metadata
from kit.state import newest_state
from toy import language
from toy.checker import held_out
from toy.language import GUIDELINES, REWRITE, TOY_SYSTEM, edit_guidelines, keeps
from toy.world import COLORS, RELATIONS, SHAPES, TASKS, random_scene

# --- The check ------------------------------------------------------------------------------------

STAR_RING = "a star above a ring"


@pytest.mark.parametrize("asked, answer, expected", [
    ("two crimson discs", "two small red circles, one at the top and one on the left", True),
    ("two red circles", "three small red circles", False),
    ("two red circles", "two small blue circles", False),
    ("a red circle and a blue square", "a blue circle and a red square", False),
    (STAR_RING, "a red star and a blue ring. the red star is above the blue ring", True),
    (STAR_RING, "a red star and a blue ring. the blue ring is above the red star", False),
    (STAR_RING, "a red star and a blue ring", False),
    ("a ring to the left of a star", "a pink ring to the left of a pink star", True),
    ("a ring on the left side of a star", "a pink ring to the left of a pink star", True),
    ("two rings", "two rings, one at the top and one at the top", False),
    ("two rings", "two rings, one at the top left and one in the top left corner", False),
    ("a star", "a star and a ring", False),
    ("a small star", "a large star", False),
    ("a cat", "a red circle", False),
    ("a cat", "a cat", False),
    (STAR_RING, "a red star at the top left and a red ring at the top right. "
                "the red star is above the red ring", False),
    (STAR_RING, "a red star at the bottom and a red ring at the top. "
                "the red star is above the red ring", False),
    (STAR_RING, "a red star at the top and a red ring at the bottom. "
                "the red star is above the red ring", True),
])
def test_an_answer_must_keep_the_request(asked, answer, expected):
    assert keeps(asked, answer) is expected


@pytest.mark.parametrize("function", [language.in_plain_words, language.mentions,
                                      language.relations, language.can_be_drawn],
                         ids=lambda function: function.__name__)
def test_each_part_of_the_check_does_what_its_docstring_shows(function):
    runner = doctest.DocTestRunner(verbose=False)
    for example in doctest.DocTestFinder().find(function, globs=vars(language)):
        runner.run(example)
    results = runner.summarize(verbose=False)
    assert results.attempted >= 1
    assert results.failed == 0


# --- What the author of a prompt is told ----------------------------------------------------------

KNOWN = set(json.loads(read_metadata(ROOT / "weights" / "toy")["words"]))


@pytest.mark.parametrize("prompt, said", [
    ("a rad circle at the top", "never saw the word rad (did you mean red?). It knows: a, above"),
    ("a sqare and a bleu star", "words bleu (did you mean blue?), sqare (did you mean square?)."),
    ("2 stars on the left", "the word 2 (did you mean two?)"),
    ("a zeppelin at the top", "the word zeppelin. It knows: a, above"),
    ("five red stars on the left", "hold four objects at most"),
    ("12 red stars on the left", "hold four objects at most"),
    ("a couple of Crimson discs", 'in words that it knows: "two red circles"; or --reason'),
    ("a navy box over a star", 'in words that it knows: "a blue square above a star"'),
    ("a red star on a blue background", "never saw a blue background: they are black, grey, white"),
    ("a star. The background is pink", "never saw a pink background"),
    ("a circle", "says no place leaves much open"),
    ("Two red stars", "says no place leaves much open"),
    ("two red stars", "--reason writes it out first"),
])
def test_what_may_surprise_is_told_before(prompt, said):
    assert said in "\n".join(language.remarks([prompt], KNOWN))
    assert language.remarks([prompt], set()) == []                # nobody counted


@pytest.mark.parametrize("prompt", [
    "a red circle to the left of a blue square",
    "a large Pink Ring at the top left. it is all on a grey background",
    "four crosses, one at the top, one on the left, one on the right and one at the bottom",
    "a star on a white background",
])
def test_of_prompts_as_in_training_nothing_is_said(prompt):
    assert language.remarks([prompt], KNOWN) == []


def test_who_has_a_reasoner_is_not_told_of_it():
    brief = ["a circle", "a couple of crimson discs"]
    lines = language.remarks(brief, KNOWN, rewritten=True)
    assert len(lines) == 1
    assert lines[0].startswith("this model never saw the words couple, crimson, discs. It knows")


def test_new_words_of_captions_are_told_once(shipped):
    tokenizer = shipped.tokenizer
    assert KNOWN <= language.words_read(tokenizer)
    known = ["A small Red circle, above two stars", "a couple of crimson discs"]
    assert language.remark_on_captions(known, tokenizer) == ""
    line = language.remark_on_captions([*known, "a fluffy cat", "a Cat on a sofa"], tokenizer)
    assert 'never read 3 words of these captions ("cat", "fluffy", "sofa"):' in line
    assert "never read a word of" in language.remark_on_captions(["a red cat"], tokenizer)
    # Each of them is pieces, and one word's are not another's.
    pieces = [tuple(tokenizer.tokenize(word)) for word in ("cat", "cats", "act", "sofa")]
    assert len(set(pieces)) == 4
    assert min(map(len, pieces)) > 1


def test_spellings_are_those_of_the_weights():
    prompts, lines = language.respelled(["a Gray star in the centre", "grayer"], KNOWN)
    assert prompts == ["a grey star in the center", "grayer"]
    assert lines == ["gray is drawn as grey, the spelling that this model knows",
                     "centre is drawn as center, the spelling that this model knows"]
    for known in (set(), {"gray"}, {"gray", "grey"}):
        assert language.respelled(["a gray star"], known) == (["a gray star"], [])
    assert language.respelled(["a grey star"], {"gray"})[0] == ["a gray star"]


def test_every_exercise_passes_the_check():
    """What the reasoner learns is what the check asks for."""
    kept = 0
    for i in range(300):
        rng = np.random.default_rng(i)
        scene = random_scene(rng, 96, 96)
        instructions, asked, answer = language.rewriting(scene, rng, vague=i % 2 == 0)
        assert instructions.startswith(REWRITE)
        kept += keeps(asked, answer)
    assert kept == 300


# --- The reasoner that is shipped -----------------------------------------------------------------

@pytest.fixture(scope="module")
def shipped():
    return load_text_encoder(ROOT / "weights" / "toy", "cpu", torch.float32)


@pytest.fixture(scope="module")
def writes(shipped):
    return functools.partial(reason.encoder_writes, shipped)


def group(words):
    return "(" + "|".join(words) + ")"


# Objects and relations, word by word: not the code that is tested.
WORD = re.compile(rf"\b(?:(a|an|two|three|four|the) )?(?:(?:small|large) )?"
                  rf"(?:{group(COLORS)} )?{group(SHAPES)}(?:s|es)?\b|\b{group(RELATIONS)}\b")


def read(caption):
    """({(shape, color or None): number}, {(who, relation, whom)}) of a caption."""
    numbers, relations = {}, set()
    last, waiting = None, None
    for number, color, shape, relation in WORD.findall(caption):
        if relation:
            waiting = (last, relation)
            continue
        last = (shape, color or None)
        if number != "the":
            counted = {"two": 2, "three": 3, "four": 4}.get(number, 1)
            numbers[last] = numbers.get(last, 0) + counted
        if waiting:
            relations.add((*waiting, last))
            waiting = None
    return numbers, relations


def fits(wanted, who):
    return all(part in (None, own) for part, own in zip(wanted, who, strict=True))


def says(caption, facts):
    """Whether a caption states the facts (total, count and relation; the others are free)."""
    numbers, relations = read(caption)
    for fact in facts:
        if fact.kind == "total" and sum(numbers.values()) != fact.value:
            return False
        if fact.kind == "count":
            if sum(n for who, n in numbers.items() if fits(fact.subject, who)) != fact.value:
                return False
        if fact.kind == "relation":
            stated = [relation == fact.value and fits(fact.subject, a) and fits(fact.other, b)
                      for a, relation, b in relations]
            if not any(stated):
                return False
    return True


def test_rewriting_keeps_the_words_of_500_requests(writes, capsys):
    asked = []
    for style in ("brief", "vague"):
        for task, count in zip(TASKS, (42, 42, 42, 42, 41, 41), strict=True):
            asked += held_out(task, count, 96, 96, style)
    requests = [row.prompt for row in asked]
    assert len(requests) == 500
    prompts = reason.reason(writes, requests, TOY_SYSTEM, 0, keeps)

    unchanged = 0
    for row, prompt in zip(asked, prompts, strict=True):
        if prompt == row.prompt:
            unchanged += 1
        else:
            assert says(prompt, row.claims), (row.prompt, prompt)
            assert len(prompt) > len(row.prompt)                 # it does rewrite
    assert unchanged <= 25
    assert unchanged == 0 or "stay as they are" in capsys.readouterr().err


def test_what_the_system_prompt_says_changes_what_is_written(writes):
    asked = ["a crimson disc"]
    told = reason.reason(writes, asked, REWRITE + " " + GUIDELINES["background"][0], 0, keeps)[0]
    bare = reason.reason(writes, asked, REWRITE, 0, keeps)[0]
    assert "background" in told
    assert "background" not in bare
    assert "red circle" in bare


def test_long_and_strange_requests_stay_as_they_are(writes, capsys):
    asked = []

    def spy(system, requests, seed, trial):
        asked.extend(requests)
        return writes(system, requests, seed, trial)

    requests = ["x" * 5000, "a star", "a cat in a hat", "a star " * 400]
    prompts = reason.reason(spy, requests, TOY_SYSTEM, 0, keeps)
    stayed = [prompt == request for prompt, request in zip(prompts, requests, strict=True)]
    assert stayed == [True, False, True, True]
    assert asked == ["a star"]
    assert "3 of 4 requests" in capsys.readouterr().err


# --- The offline proposer -------------------------------------------------------------------------

SUMMARY = ("5 of 9 pictures had something wrong.\n"
           "relation: 5 of 9 statements were false, such as \"x\".")


def test_the_proposer_edits_what_the_failures_call_for():
    first = edit_guidelines(REWRITE, SUMMARY, [])
    assert first == " ".join([REWRITE, GUIDELINES["place"][0], GUIDELINES["relation"][0]])


def test_the_proposer_tries_every_edit_once():
    tried = []
    edit = edit_guidelines(REWRITE, SUMMARY, tried)
    while edit is not None:
        assert edit not in tried
        tried.append(edit)
        edit = edit_guidelines(REWRITE, SUMMARY, tried)
    # Those called for, all five, each of the five, each of the ten pairs; one pair was called for.
    assert len(tried) == 1 + 1 + 5 + 10 - 1


def test_the_proposer_takes_sentences_away():
    everything = " ".join([REWRITE] + [wordings[1] for wordings in GUIDELINES.values()])
    edit = edit_guidelines(everything, SUMMARY, [])
    assert edit.startswith(REWRITE)
    assert len(edit) < len(everything)
    assert GUIDELINES["place"][1] not in edit


# --- The tokenizer --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer():
    return language.toy_tokenizer(scenes=200)


def test_the_chat_template_says_what_lens_renders(tokenizer):
    head, tail = lens.CHAT["gpt_oss"]
    thinking = tail.split("<|message|>")[1].split("<|end|>")[0]
    messages = [{"role": "developer", "content": lens.DESCRIBE},
                {"role": "user", "content": "a red circle"},
                {"role": "assistant", "thinking": thinking, "content": ""}]
    said = tokenizer.apply_chat_template(messages, tokenize=False, current_date=lens.DATE)
    assert said == head.replace("{date}", lens.DATE) + "a red circle" + tail


def tokens_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_common_words_and_fixed_sentences_are_one_token_each(tokenizer):
    ids = tokens_of(tokenizer, "a red circle above a star")
    assert len(ids) == 6
    assert tokenizer.decode(ids).strip() == "a red circle above a star"
    for sentence in language.fixed_sentences():
        assert len(tokens_of(tokenizer, sentence)) == 1
    for marker in language.SPECIAL:
        assert len(tokens_of(tokenizer, marker)) == 1


def test_any_other_text_comes_back(tokenizer):
    for text in ("quartz, 猫 and naïve", "x\ny"):
        assert tokenizer.decode(tokens_of(tokenizer, text)).strip() == text


# --- What is learned ------------------------------------------------------------------------------

def test_a_batch_is_a_function_of_seed_and_step(tokenizer):
    sentences = language.Sentences(tokenizer, seed=1, batch=8)
    for one, other in zip(sentences[5], sentences[5], strict=True):
        assert torch.equal(one, other)
    ids, _, _ = sentences[5]
    for other in (sentences[6], language.Sentences(tokenizer, seed=2, batch=8)[5]):
        assert other[0].shape != ids.shape or not torch.equal(other[0], ids)


def test_what_is_given_has_no_loss_and_what_is_learned_is_the_answer(tokenizer):
    ids, labels, mask = language.Sentences(tokenizer, seed=1, batch=8)[0]
    assert ids.shape == labels.shape == mask.shape
    for i in range(8):
        learned = labels[i] != language.NO_LOSS
        assert torch.equal(ids[i][learned], labels[i][learned])
        assert mask[i][learned].all()
        text = tokenizer.decode(ids[i][mask[i].bool()])
        answer = tokenizer.decode(labels[i][learned])
        assert text.startswith("<|start|>")
        if i % 4 == 0:
            assert "analysis" in answer                          # a caption and the tail after it
            assert not answer.startswith("<|channel|>")
        else:
            assert answer.startswith("<|channel|>")
            assert answer.endswith("<|return|>")


# --- Training -------------------------------------------------------------------------------------

@pytest.fixture
def quick(monkeypatch):
    """A tokenizer that is soon learned, and small batches."""
    monkeypatch.setattr(language, "toy_tokenizer",
                        functools.partial(language.toy_tokenizer, scenes=20))
    monkeypatch.setattr(language, "BATCH", 4)


@pytest.fixture
def one_thread():
    """With two, the experts' sums come in either order on a busy machine: they differ by a
    rounding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(folder, *flags):
    language.main(["--size", "nano", "--save-every", "3", "--device", "cpu", "--out", str(folder),
                   *flags])


def weights(folder):
    return load_text_encoder(folder, "cpu").model.state_dict()


def assert_same_weights(a, b):
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch, quick, one_thread, capsys):
    train(tmp_path / "whole", "--steps", "6")
    with killed_after_steps(monkeypatch, language, 5):
        train(tmp_path / "halves", "--steps", "6")
    train(tmp_path / "halves", "--steps", "6")
    assert "resuming at step 3" in capsys.readouterr().out
    assert_same_weights(tmp_path / "whole", tmp_path / "halves")


def test_a_finished_run_writes_its_encoder_again_and_can_be_lengthened(tmp_path, quick):
    train(tmp_path, "--steps", "3")
    before = weights(tmp_path)
    train(tmp_path, "--steps", "3")
    for name, tensor in weights(tmp_path).items():
        assert torch.equal(tensor, before[name])
    train(tmp_path, "--steps", "5")
    assert newest_state(tmp_path / "text").name == "state-00000005"


def test_sigterm_saves_and_the_run_goes_on(tmp_path, monkeypatch, quick, one_thread, capsys):
    step_done = language.train_step
    steps_before_the_notice = iter(range(3))

    def notified(*inputs):
        if next(steps_before_the_notice, None) is None:
            signal.raise_signal(signal.SIGTERM)
        return step_done(*inputs)

    train(tmp_path / "whole", "--steps", "8")
    monkeypatch.setattr(language, "train_step", notified)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "stopped", "--steps", "8")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("first the tokenizer is learned: a few seconds\n")
    assert "at step 4" in said
    assert not (tmp_path / "stopped" / "text_encoder").exists()

    monkeypatch.setattr(language, "train_step", step_done)
    train(tmp_path / "stopped", "--steps", "8")
    said = capsys.readouterr().out
    assert "resuming at step 4" in said
    assert "\nnext: python -m toy.autoencoder --out " in said
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_the_log_has_every_twentieth_step(tmp_path, quick):
    train(tmp_path, "--steps", "41")
    log = rows(tmp_path / "text")
    assert [row["step"] for row in log] == [20, 40]
    assert log[1]["loss"] < log[0]["loss"]
    assert (tmp_path / "text" / "curves.svg").exists()


def test_what_is_written_is_what_the_denoiser_reads(tmp_path, quick):
    train(tmp_path, "--steps", "1")
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {"text_encoder", "tokenizer"} <= index.keys()
    encoder = load_text_encoder(tmp_path, "cpu")
    encoder.layers = (0, 1)                      # a folder of parts alone does not say which
    features, _ = encoder.encode(["a red circle"])
    assert features[0].shape[-1] == lens.SIZES["nano"].transformer.enc_hidden_dim


@pytest.mark.parametrize("flags, said", [
    (["--size", "huge"], "unknown size 'huge'"),
    (["--size", "full"], "unknown size 'full'"),
    (["--steps", "0"], "--steps"),
    (["--steps", "x"], "--steps"),
    (["--seed", "-1"], "--seed"),
    (["--save-every", "0"], "--save-every"),
    (["--out", "{tmp}/file/run"], "cannot write"),
])
def test_bad_input_is_one_clear_line(flags, said, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    assert said in error_line(language.main, ["--out", str(tmp_path / "run"), *flags], capsys)


def test_another_run_on_the_same_folder_is_refused(tmp_path, quick, capsys):
    train(tmp_path, "--steps", "1")
    message = error_line(language.main, ["--size", "nano", "--seed", "7", "--out", str(tmp_path)],
                         capsys)
    assert "another run" in message
    assert "--seed 0, not 7" in message
