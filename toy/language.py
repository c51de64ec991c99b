"""The toy's language: its reasoner's exercises and check, its tokenizer, its text encoder.

Read before: toy/world.py, reason.py, kit/state.py.

    python -m toy.language --out runs/toy        # runs/toy/text_encoder and runs/toy/tokenizer
    python -m toy.language --data 'shards/*.tar' --out runs/mine       # of captions of your own

The story in one paragraph. The toy's text encoder is a tiny GPT-OSS, about 1M parameters, trained
as a language model. It has two jobs, so it meets two kinds of chat: a caption in the frame in which
the denoiser will have it read, for its hidden states; and instructions with a brief request,
answered by a dense caption, since it is the toy's reasoner too. Requests hold words that captions
never do ("crimson discs"), and the instructions say which details the answer is to state.
Of captions of one's own nobody knows such requests: the second job is then left out.

Where the toy departs from the paper [ours]: the paper takes GPT-OSS-20B as it is, frozen. Here all
that a reasoner must keep is known, so its answers are checked word by word (`keeps`); and a system
prompt is a choice of sentences (`GUIDELINES`), so a program can propose a better one
(`edit_guidelines`).
"""
import difflib
import hashlib
import itertools
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import lens
from kit.checkpoint import save_pipeline
from kit.files import (
    Parser,
    first_few,
    positive,
    require,
    run_command,
    seed_number,
    user_path,
)
from kit.places import command_for_next_part
from kit.run import Log, Notice, learning_rate_factor, make_loader, start_run
from kit.state import check_same_run, load_state, save_state
from toy.pictures import caption_in_turn, read_captions
from toy.world import (
    COLORS,
    NUMBERS,
    PAIR_TASKS,
    PLACE_WORDS,
    PLACES,
    RELATIONS,
    SHAPES,
    TONES,
    VAGUE,
    caption,
    details_for,
    plural,
    random_scene,
    request,
    sample_scene,
)

# --- What the toy's reasoner is told --------------------------------------------------------------

REWRITE = "Rewrite the request as a description of one picture."

# Sentences that a system prompt can add to that, two wordings each, by the detail that the reasoner
# then states.
GUIDELINES = {
    "size": ("State the size of every object.", "Say how large each object is."),
    "place": ("State where every object is.", "Give the place of each object."),
    "relation": ("Say how the objects stand to each other.",
                 "Describe the relations between objects."),
    "background": ("Describe the background.", "Say what is behind the objects."),
    "color": ("Give every object a color.", "Name a color for each object."),
}

# It knows only the sentences that it was trained on. Of them these two did best. [ours]
TOY_SYSTEM = " ".join([REWRITE, GUIDELINES["color"][0], GUIDELINES["place"][0]])


def rewriting(scene, rng, vague):
    """One exercise for the reasoner: (instructions, request, the dense caption that follows both).

    vague: whether the request is in words that captions never use.
    """
    asked = details_for(scene, rng, "brief")
    chosen = [detail for detail in GUIDELINES if rng.random() < 0.55]
    rng.shuffle(chosen)
    sentences = [GUIDELINES[detail][rng.integers(2)] for detail in chosen]
    instructions = " ".join([REWRITE] + sentences)

    details = set(asked) | set(chosen)
    if scene.task not in PAIR_TASKS:
        details.discard("relation")
    words = request(scene, asked, rng, vague)
    return instructions, words, caption(scene, details, rng)


# --- The check: does an answer keep the request? --------------------------------------------------

def one_of(words):
    """A regular expression that captures one of `words`, the longest that fits."""
    longest_first = sorted(words, key=len, reverse=True)
    return "(" + "|".join(re.escape(word) for word in longest_first) + ")"


def cells_by_words():
    """{place in words: (column, row)} of the nine cells of a picture."""
    cells = {}
    for row, places in enumerate(PLACES):
        for column, place in enumerate(places):
            for words in PLACE_WORDS[place]:
                cells[words] = (column, row)
    return cells


PLAIN = {wording: name for name, wordings in VAGUE.items() for wording in wordings}
CELLS = cells_by_words()

# "left of" is a vague wording, but not within "to the left of".
VAGUE_WORD = re.compile(rf"(?<!to the )\b{one_of(PLAIN)}(e?s)?\b")
# Captures a color, "" where none is said, and a shape.
NOUN = rf"(?:(?:small|large) )?(?:{one_of(COLORS)} )?{one_of(SHAPES)}(?:es|s)?\b"
MENTION = re.compile(rf"\b(an?|two|three|four) {NOUN}")
RELATED = re.compile(rf"\b{NOUN}(?: is)? {one_of(RELATIONS)} (?:an?|the) {NOUN}")
PLACED = re.compile(rf"\b{NOUN}(?: is)? {one_of(CELLS)}\b")
PLACE = re.compile(rf"\b{one_of(CELLS)}\b")

# Words that an answer need not take over.
LITTLE_WORDS = {"a", "an", "the", "and", "of"}


class Mention(NamedTuple):
    """Objects where a text first speaks of them. "" stands for what it does not say."""
    number: str          # "a", "two", "three" or "four"
    color: str
    shape: str


class Related(NamedTuple):
    """A relation as a text states it. "" stands for a color that it does not say."""
    color: str
    shape: str
    relation: str
    other_color: str
    other_shape: str


def keeps(asked, answer):
    """Whether an answer keeps a request of the toy world, and can be drawn.

    All words, numbers, colors and relations of the request stand in the answer, in plain words, and
    the answer adds no object. False for a request that is not about this world.
    """
    asked = in_plain_words(asked)
    answer = in_plain_words(answer)
    wanted, found = mentions(asked), mentions(answer)
    return (len(wanted) == len(found) > 0
            and all_among(wanted, found)
            and all_among(relations(asked), relations(answer))
            and words_of(asked) <= words_of(answer) | LITTLE_WORDS
            and can_be_drawn(answer))


def in_plain_words(text):
    """Lower case, vague words replaced by those of the captions.

    >>> in_plain_words("a couple of Crimson discs")
    'two red circles'
    """
    def plain(match):
        vague, ending = match.groups()
        return plural(PLAIN[vague]) if ending else PLAIN[vague]

    return VAGUE_WORD.sub(plain, text.lower())


def mentions(text):
    """[Mention]. "the red circle" is none: it was mentioned before.

    >>> mentions("two small red circles and a star")[1]
    Mention(number='a', color='', shape='star')
    """
    return [Mention("a" if number == "an" else number, color, shape)
            for number, color, shape in MENTION.findall(text)]


def relations(text):
    """[Related].

    >>> relations("a red ring and a star. the red ring is above the star")[0]
    Related(color='red', shape='ring', relation='above', other_color='', other_shape='star')
    """
    return [Related(*parts) for parts in RELATED.findall(text)]


def words_of(text):
    return set(re.findall(r"\w+", text))


def all_among(wanted, found):
    """Whether each of `wanted` is one of `found`, which may say more where it says nothing."""
    def fits(one, other):
        return all(part in ("", other_part) for part, other_part in zip(one, other, strict=True))

    return all(any(fits(one, other) for other in found) for one in wanted)


def can_be_drawn(text):
    """False where two objects have one place, or a relation contradicts two places.

    >>> can_be_drawn("a star at the top and a ring at the bottom. the ring is above the star")
    False
    """
    cells = [CELLS[place] for place in PLACE.findall(text)]
    if len(set(cells)) < len(cells):
        return False

    cell_of = {(color, shape): CELLS[place] for color, shape, place in PLACED.findall(text)}
    for stated in relations(text):
        first = cell_of.get((stated.color, stated.shape))
        second = cell_of.get((stated.other_color, stated.other_shape))
        if first is None or second is None:
            continue
        across, down = RELATIONS[stated.relation]
        ahead = (first[0] - second[0]) * across + (first[1] - second[1]) * down
        if ahead <= 0:
            return False
    return True


# --- Words that the denoiser never saw ------------------------------------------------------------

# British and American spellings: which of two a model knows depends on its captions.
SPELLINGS = (("grey", "gray"), ("centre", "center"), ("colour", "color"))

DIGITS = {str(number): word for number, word in NUMBERS.items()}
TOO_MANY = re.compile(r"five|six|seven|eight|nine|ten|eleven|twelve|dozen|many|several|[5-9]|\d\d+")
COLORED_GROUND = re.compile(rf"\b{one_of(COLORS)} background\b|\bbackground is {one_of(COLORS)}\b")
VAGUE_PARTS = set(re.findall(r"\w+", " ".join(PLAIN)))


def respelled(prompts, known):
    """-> (prompts, lines that tell what was changed): words of SPELLINGS in the spelling that is
    among the words `known`."""
    lines = []
    for pair in SPELLINGS:
        for one, other in (pair, pair[::-1]):
            if other not in known or one in known:
                continue
            spelled = [re.sub(rf"\b{one}\b", other, prompt, flags=re.IGNORECASE)
                       for prompt in prompts]
            if spelled != list(prompts):
                lines.append(f"{one} is drawn as {other}, the spelling that this model knows")
                prompts = spelled
    return prompts, lines


def strange_words(texts, known):
    """[word] of texts that are not among the words `known`."""
    used = set().union(*(words_of(text.lower()) for text in texts))
    return sorted(used - known)


def words_read(tokenizer):
    """The words that the toy's text encoder has read: those that are one token, with the blank
    before them. Any other is spelled in pieces, see `learn_tokenizer`."""
    with_blank = [token for token in tokenizer.get_vocab() if token.startswith("\u0120")]
    # Tokens are bytes: a letter that is no ASCII stands there as two others.
    return {tokenizer.convert_tokens_to_string([token])[1:] for token in with_blank}


def remark_on_captions(captions, tokenizer):
    """What may surprise who trains on captions of his own: a line, or "" where all words are
    known."""
    strange = strange_words(captions, words_read(tokenizer))
    if not strange:
        return ""
    number = "a word" if len(strange) == 1 else f"{len(strange)} words"
    named = first_few(f'"{word}"' for word in strange)
    return (f"the toy's text encoder, which stays frozen, never read {number} of these captions "
            f"({named}): it sees mere pieces of letters there, so what they mean is learnt from "
            "your pictures alone, of which each such word needs many")


def remarks(prompts, known, rewritten=False):
    """What may surprise in the pictures of prompts: [a line for their author].

    known      words that the model saw in training; none: nobody counted them, nothing is said
    rewritten  whether a reasoner has written the prompts
    """
    if not known:
        return []
    lines = []
    strange = strange_words(prompts, known)
    if strange:
        word_or_words = "word" if len(strange) == 1 else "words"
        told = ", ".join(word + nearest_word(word, known) for word in strange)
        lines.append(f"this model never saw the {word_or_words} {told}. "
                     f"It knows: {', '.join(sorted(known))}")
    if any(TOO_MANY.fullmatch(word) for word in strange):
        lines.append("its pictures hold four objects at most")

    for prompt in prompts:
        plain = in_plain_words(prompt)
        if plain != prompt.lower() and words_of(plain) <= known and not rewritten:
            lines.append(f'in words that it knows: "{plain}"; or --reason, which rewrites')
            break
    for prompt in prompts:
        ground = COLORED_GROUND.search(prompt.lower())
        if ground:
            color = ground[1] or ground[2]
            lines.append(f"it never saw a {color} background: they are {', '.join(TONES)}")
            break
    small = [prompt.lower() for prompt in prompts]
    if not rewritten and any(is_brief(prompt) for prompt in small if words_of(prompt) <= known):
        # Of 144 brief requests all facts held in 0.68 of the pictures, rewritten in 0.88.
        lines.append("a prompt that says no place leaves much open, and is drawn wrong more often; "
                     "--reason writes it out first")
    return lines


def nearest_word(word, known):
    """" (did you mean red?)" for a word that is nearly one of `known`, else ""."""
    if word in VAGUE_PARTS:                        # it has a meaning, if not to the denoiser
        return ""
    near = difflib.get_close_matches(word, [other for other in known if len(other) > 2], 1, 0.66)
    meant = DIGITS.get(word, near[0] if near else None)
    return f" (did you mean {meant}?)" if meant else ""


def is_brief(prompt):
    """Whether a prompt is of this world and says no place, relation or background."""
    more = PLACE.search(prompt) or relations(prompt) or "background" in prompt
    return keeps(prompt, prompt) and not more


# --- The offline proposer -------------------------------------------------------------------------

# What is likely to help where a kind of rubric fails: an object whose color and place are said is
# seldom left out, or there twice.
REMEDIES = {
    "total": ("place",),
    "count": ("color", "place"),
    "relation": ("place", "relation"),
    "coherent": ("size", "background"),
}


def edit_guidelines(system, summary, tried):
    """The toy's proposer for reason.climb, a program: the next edit of a system prompt, or None.

    summary: of reason.failures_in_words. In order: adds the sentences that the failures call for,
    all sentences, each alone; takes each away; adds two. The first that is not in `tried` is taken.
    """
    failing = re.findall(r"(?m)^(\w+): \d+ of", summary)
    called_for = [detail for kind in failing for detail in REMEDIES.get(kind, ())]
    most_wanted_first = list(dict.fromkeys(called_for + list(GUIDELINES)))
    present = [detail for detail in most_wanted_first if asks_for(system, detail)]
    missing = [detail for detail in most_wanted_first if detail not in present]

    edits = [added(system, [detail for detail in missing if detail in called_for])]
    edits += [added(system, missing)]
    edits += [added(system, [detail]) for detail in missing]
    edits += [taken_away(system, detail) for detail in present]
    edits += [added(system, pair) for pair in itertools.combinations(missing, 2)]
    for edit in edits:
        if edit != system and edit not in tried:
            return edit
    return None


def asks_for(system, detail):
    return any(wording in system for wording in GUIDELINES[detail])


def added(system, details):
    """The system prompt with the sentences for more details."""
    return " ".join([system] + [GUIDELINES[detail][0] for detail in details])


def taken_away(system, detail):
    """The system prompt without its sentence for a detail."""
    for wording in GUIDELINES[detail]:
        system = system.replace(wording, "")
    return " ".join(system.split())


# --- The tokenizer --------------------------------------------------------------------------------

SPECIAL = ("<|endoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>")

# What the real tokenizer's template does with messages, in the one form that the toy needs.
CHAT_TEMPLATE = """{%- set date = current_date or "DATE" -%}
HEAD
{%- for message in messages -%}
{%- if message.role in ("system", "developer") -%}\
<|start|>developer<|message|># Instructions\n\n{{ message.content }}\n\n<|end|>
{%- elif message.role == "assistant" -%}\
{%- if message.thinking -%}\
<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>\
{%- endif -%}\
<|start|>assistant<|channel|>final<|message|>{{ message.content }}\
{%- if message.content -%}<|return|>{%- endif -%}
{%- else -%}<|start|>user<|message|>{{ message.content }}<|end|>{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"""


# What stands in the chat around every prompt, beside its fixed sentences.
CHAT_WORDS = ["# Instructions", "system developer user assistant analysis final"]
TOKENS = 768             # of the toy world, whose words are few
OWN_TOKENS = 4096        # at most, of captions of one's own


def toy_tokenizer(seed=0, scenes=4000):
    """-> the tokenizer of the toy world's sentences, see `learn_tokenizer`."""
    return learn_tokenizer(sentences_to_tokenize(seed, scenes), TOKENS)


def own_tokenizer(captions):
    """-> the tokenizer of captions of one's own, [[caption]] of all pictures. Their words stand
    alone too, so that "clock" of "o'clock" is a token."""
    texts = [caption.lower() for own in captions for caption in own]
    words = [word for text in texts for word in sorted(words_of(text))]
    return learn_tokenizer([*texts, *words, *(40 * CHAT_WORDS)], OWN_TOKENS)


def learn_tokenizer(texts, tokens):
    """-> a tokenizer of transformers, learned on texts, of so many tokens at most.

    Byte-level BPE: a common word is one token, any other text a few bytes. The fixed sentences of
    the chat are one token each [ours]: they say nothing of the picture, and word by word they would
    make every prompt twice as long.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.decoder = decoders.ByteLevel()
    # With a blank before the first word, a word is the same token first and later in a prompt.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = BpeTrainer(
        vocab_size=tokens, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in fixed_sentences()])

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|return|>",
        additional_special_tokens=["<|start|>", "<|message|>", "<|channel|>", "<|end|>"])
    wrapped.chat_template = chat_template()
    return wrapped


def sentences_to_tokenize(seed, scenes):
    """[text]: what the reasoner is told, over and over, and each scene in three styles."""
    guidelines = [wording for wordings in GUIDELINES.values() for wording in wordings]
    texts = 40 * guidelines + 40 * [REWRITE, *CHAT_WORDS]
    for i in range(scenes):
        for style in ("dense", "brief", "vague"):
            _, _, sentence = sample_scene(seed, 0, i, 96, 96, style=style)
            texts.append(sentence)
    return texts


def fixed_sentences():
    """[text] of the chat around every prompt."""
    head, tail = lens.CHAT["gpt_oss"]
    return [
        between("<|message|>", head, "{date}"),          # "You are ChatGPT, ... date: "
        between("{date}", head, "<|end|>"),              # "Reasoning: medium ..."
        lens.DESCRIBE,
        between("<|message|>", tail, "<|end|>"),         # "Need to generate one image ..."
    ]


def between(begin, text, end):
    return text.split(begin)[1].split(end)[0]


def chat_template():
    head, _ = lens.CHAT["gpt_oss"]
    before_developer = head.split("<|start|>developer")[0].replace("{date}", "{{ date }}")
    return CHAT_TEMPLATE.replace("DATE", lens.DATE).replace("HEAD", before_developer)


# --- What the text encoder learns -----------------------------------------------------------------

PICTURE_SIZES = data.buckets(96)         # for which the scenes of the exercises are drawn
NO_LOSS = -100                           # the label of tokens that are given, not learned
LONGEST = 512                            # tokens of a chat; the denoiser has no more of it read


class Sentences(torch.utils.data.Dataset):
    """Item `step` is that step's batch: a function of seed and step alone.

    A quarter are captions as the denoiser will meet them, the rest rewritings: copying a request's
    words is slower to learn than the captions' grammar.
    captions   of one's own, [[caption]] of all pictures, which are then all that is learnt from;
               None: the toy world
    """

    def __init__(self, tokenizer, seed, batch, captions=None):
        self.tokenizer = tokenizer
        self.seed = seed
        self.batch = batch
        self.captions = captions

    def __getitem__(self, step):
        """(ids, labels, mask), each [B, L], padded on the right; mask: 1 where there is a token."""
        rows, labels = [], []
        for i in range(self.batch):
            given, learned = self.exercise(step, i)
            given, learned = self.encode(given), self.encode(learned)
            rows.append((given + learned)[:LONGEST])
            labels.append((len(given) * [NO_LOSS] + learned)[:LONGEST])
        masks = [len(row) * [1] for row in rows]
        return padded(rows, 0), padded(labels, NO_LOSS), padded(masks, 0)

    def exercise(self, step, i):
        """(text given, text to learn) of row i of a step."""
        if self.captions is not None:
            return own_exercise(self.captions, self.seed, step * self.batch + i)
        rng = np.random.default_rng((self.seed, step, i))
        return caption_exercise(rng) if i % 4 == 0 else rewriting_exercise(rng)

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def padded(rows, filler):
    """[B, L] of lists of unequal length."""
    length = max(len(row) for row in rows)
    return torch.tensor([row + (length - len(row)) * [filler] for row in rows])


def caption_exercise(rng):
    """(text given, text to learn): a caption in the frame in which the denoiser has it read."""
    scene, date = scene_and_date(rng)
    return in_frame(caption(scene, details_for(scene, rng), rng), date)


def own_exercise(captions, seed, number):
    """The same with captions of one's own. number: of the exercise in the run; each epoch has one
    for every picture."""
    epoch, place = divmod(number, len(captions))
    sample = int(np.random.default_rng((seed, epoch)).permutation(len(captions))[place])
    rng = np.random.default_rng((seed, epoch, sample))
    text = caption_in_turn(captions[sample], sample + epoch, rng)
    return in_frame(lens.strip_markers(text), date_for(rng))


def in_frame(text, date):
    """(text given, text to learn) of a caption."""
    head, tail = lens.CHAT["gpt_oss"]
    return head.replace("{date}", date), text + tail


def rewriting_exercise(rng):
    """(text given, text to learn): instructions and a request, then the answer."""
    scene, date = scene_and_date(rng)
    vague = rng.random() < 0.5
    instructions, asked, answer = rewriting(scene, rng, vague)
    head, _ = lens.CHAT["gpt_oss"]
    given = head.replace(lens.DESCRIBE, instructions) + asked + "<|end|><|start|>assistant"
    return given.replace("{date}", date), "<|channel|>final<|message|>" + answer + "<|return|>"


def scene_and_date(rng):
    """A scene, and a date for the chat's head: often the frozen one, else a random one."""
    height, width = PICTURE_SIZES[rng.integers(len(PICTURE_SIZES))]
    scene = random_scene(rng, height, width)
    return scene, date_for(rng)


def date_for(rng):
    """A date for the chat's head."""
    if rng.random() < 0.7:
        return lens.DATE
    year = rng.integers(24, 36)
    month = rng.integers(1, 13)
    day = rng.integers(1, 29)
    return f"20{year}-{month:02d}-{day:02d}"


# --- Training -------------------------------------------------------------------------------------

BATCH = 48               # chats a step
STEPS = 3200
LEARNING_RATE = 2e-3
WARMUP = 100             # steps
DECAY = 0.6              # share of the steps over which the learning rate falls to zero


def next_token_loss(model, ids, labels, mask):
    """Mean cross entropy of the tokens that are to be learned."""
    logits = model(input_ids=ids, attention_mask=mask).logits         # [B, L, vocabulary]
    logits = logits[:, :-1].flatten(0, 1).float()                     # [B * (L - 1), vocabulary]
    labels = labels[:, 1:].flatten()                                  # [B * (L - 1)]
    return F.cross_entropy(logits, labels, ignore_index=NO_LOSS)


def train_step(model, optimizer, batch):
    """One step of AdamW -> (loss, norm of the gradient), tensors."""
    loss = next_token_loss(model, *batch)
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss, norm


def train_text(run, settings, folder, size, steps, save_every, captions=None):
    """Next-token prediction on captions and rewritings; writes folder/text_encoder and /tokenizer.

    run: a kit.run.Run whose folder holds the state. settings: what tells this run from others.
    captions: of one's own, see Sentences
    """
    run.say("first the tokenizer is learned: a few seconds")
    more = {}
    if captions is None:
        tokenizer = toy_tokenizer()
    else:
        tokenizer = own_tokenizer(captions)
        more = {"captions_only": True}             # into its config.json, see can_rewrite
        strange = strange_words(itertools.chain(*captions), words_read(tokenizer))
        run.say(f"{len(tokenizer):,} tokens; {len(strange):,} words of the captions are none of "
                "them, and are spelled in pieces")
    model = lens.build_text_model(
        lens.SIZES[size].text_encoder, seed=run.seed, vocab_size=len(tokenizer), pad_token_id=0,
        eos_token_id=tokenizer.eos_token_id, **more)
    model.to(run.device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    weights = {"model": dict(model.named_parameters())}
    progress = load_state(run, weights, [optimizer], settings)
    step = 0
    if progress:
        step = progress["step"]
        run.say(f"resuming at step {step}")
    log = Log(run, step)
    notice = Notice()

    sentences = Sentences(tokenizer, run.seed, BATCH, captions)
    batches = make_loader(sentences, range(step, steps), workers=1)
    bar = tqdm(batches, initial=step, total=steps, desc="text encoder", mininterval=2)
    for batch in bar:
        factor = learning_rate_factor(step, steps, WARMUP, DECAY)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * factor
        loss, norm = train_step(model, optimizer, [run.move(part) for part in batch])
        step += 1

        if step % 20 == 0:
            log(step=step, loss=loss.item(), grad_norm=norm.item())
            bar.set_postfix_str(f"loss {loss.item():.3f}")
        if step % save_every == 0 or step == steps or notice.given:
            save_state(run, step, weights, [optimizer], settings, {"step": step})
            log.draw()
        if notice.given and step < steps:
            bar.close()
            run.say_stopped(step)
            sys.exit(0)

    layers = lens.SIZES[size].transformer.selected_layer_index
    save_pipeline(folder, text_encoder=lens.TextEncoder(model, tokenizer, layers))
    run.say(f"wrote {folder}/text_encoder and {folder}/tokenizer")


def can_rewrite(encoder):
    """Whether a text encoder can be the reasoner: one that has read captions alone cannot."""
    return not getattr(encoder.model.config, "captions_only", False)


# --- The command ----------------------------------------------------------------------------------

def main(argv=None):
    parser = Parser("Train the toy's tokenizer and text encoder. The same command again resumes.",
                    __doc__)
    parser.add_argument("--out", type=user_path, default="runs/toy", metavar="DIR",
                        help="gets text_encoder, tokenizer, and text, the run's own folder "
                             "(default: %(default)s)")
    parser.add_argument("--data", metavar="GLOB", help="shards of `data.py pack`, say "
                        "'shards/*.tar', for their captions (default: the toy world's)")
    parser.add_argument("--size", default="toy",
                        help="toy, or nano, which is for tests (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=STEPS,
                        help="default: %(default)s, 40 minutes on one core")
    parser.add_argument("--seed", type=seed_number, default=0, help="default: %(default)s")
    parser.add_argument("--save-every", type=positive, default=250, metavar="N",
                        help="steps (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: CUDA if there is one)")
    args = parser.parse_args(argv)
    require(args.size in ("nano", "toy"),
            f"unknown size '{args.size}': the text encoders of toy and nano are made here")

    folder = Path(args.out)
    captions, digest = None, None
    if args.data is not None:
        captions, missing = read_captions(args.data)
        digest = hashlib.sha256(json.dumps(captions).encode()).hexdigest()[:16]
    settings = {"--size": args.size, "--seed": args.seed, "--data": digest}
    check_same_run(folder / "text", settings)
    run = start_run(folder / "text", args.seed, args.device)
    require(run.ranks == 1, "the text encoder is small: train it in one process, without torchrun")
    if captions is not None:
        run.say(f"{sum(map(len, captions)):,} captions of {len(captions):,} pictures ({missing} "
                "have none); requests to rewrite are of the toy world, so the reasoner is left out")
    train_text(run, settings, folder, size=args.size, steps=args.steps,
               save_every=args.save_every, captions=captions)
    run.say(f"next: {command_for_next_part(folder, args.size, args.data)}")


if __name__ == "__main__":
    run_command(main)
