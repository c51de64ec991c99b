"""Talking to language models: one OpenAI-compatible client, and what is made of their answers.

Read before: kit/files.py.

Captions (data.py), the reasoner (reason.py) and the judges (rl.py) all ask through `Endpoint`. What
comes back is rarely the bare text that was asked for: `clean` finds the one prompt in an answer,
`parse_json` the one JSON value. docs/formats.md says which dialects are understood.
"""
import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import random
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from kit.files import error_context, is_whole, read_json_lines, require

# --- The client -----------------------------------------------------------------------------------

USER_AGENT = "lens/0.1"               # some hosts turn away the one that Python sends
FIRST_WAIT = 1.0                      # seconds before a second try; later waits double
LONGEST_WAIT = 60.0                   # seconds, also where the server asks for more
WORTH_ANOTHER_TRY = (408, 409, 429)   # of the HTTP errors below 500; all from 500 on are


class NoAnswer(ValueError):
    """A reply without an answer, or an answer that cannot be used; its text is the reason, in a few
    words that quote neither."""


# What a broken connection, or a reply that is no answer of a chat, raises.
BAD_REPLY = (OSError, http.client.HTTPException, ValueError)

# Reasons that are about one request: the server itself is well.
FILTERED = "an answer that a filter took away"
ABOUT_THE_REQUEST = ("HTTP 400", "HTTP 413", "HTTP 422", FILTERED)


class Endpoint:
    """An OpenAI-compatible chat endpoint.

    url          up to and with /v1
    model        one of the models that it serves
    journal      file that keeps all answers: work begun again asks only for the rest; None: no file
    workers      requests under way at the same time
    tries        of one request, with longer and longer waits between them
    timeout      seconds that the server may be silent
    temperature  of its answers; None: what the server takes by itself
    patience     after so many requests in a row without an answer, a LensError ends the work, for
                 the server is down; None: never

    Its key is read from the environment variable LENS_API_KEY; it goes to this address alone and is
    written nowhere. `failed` holds the reason, in a few words, of every request without an answer
    that could be used; `unanswered` is the number of those that got none at all.
    """

    def __init__(self, url, model, journal=None, workers=8, tries=5, timeout=120, temperature=None,
                 patience=20):
        require(re.fullmatch(r"https?://[^\s/]\S*", url), f"--endpoint {url}: must be an address "
                "that begins with http:// or https:// and goes up to and with /v1")
        require("?" not in url and "#" not in url, f"--endpoint {url}: must end with /v1 or the "
                "like, without ? and #")
        key = os.environ.get("LENS_API_KEY", "").strip()
        require(key.isascii() and key.isprintable(), "the key in LENS_API_KEY has a line end or a "
                "letter in it that no key has: copy it again")
        self.url = url.rstrip("/").removesuffix("/chat/completions")
        self.model = model
        self.journal = journal
        self.workers = workers
        self.tries = tries
        self.timeout = timeout
        self.temperature = temperature
        self.patience = patience

        self.known = read_journal(journal)
        self.failed = []
        self.unanswered = 0
        self.in_a_row = 0                # those of them since the server last worked
        self.lock = threading.Lock()
        self.opener = urllib.request.build_opener(NoRedirect)

    def ask(self, items, messages=lambda item: item, read=lambda answer, item: answer):
        """[item] -> [what was read from its answer, or None], in order.

        messages(item)      makes a chat when its turn comes
        read(answer, item)  what is made of the answer's text; raises NoAnswer where it is unusable
        """
        def value_for(item):
            return self.one(messages(item), lambda answer: read(answer, item))

        with ThreadPoolExecutor(self.workers) as pool:
            values = pool.map(value_for, items)
            bar = tqdm(values, total=len(items), desc=f"asking {self.model}",
                       disable=len(items) < 2)
            return list(bar)

    def one(self, messages, read=lambda answer: answer):
        """What is read from the answer to one chat, which comes from the journal if it is there.
        None where all tries failed or `read` raised NoAnswer.

        The journal keeps what could be read, no other answer: work begun again asks anew.
        """
        name = name_of_chat(self.model, messages)
        if name in self.known:
            with contextlib.suppress(NoAnswer):
                return read(self.known[name])

        if self.journal:
            make_appendable(self.journal)          # before an answer is paid for
        answer, reason = self.try_until_answered(messages, self.tries)
        if answer is None:
            self.count_unanswered(reason)
            return None
        self.in_a_row = 0
        try:
            value = read(answer)
        except NoAnswer as e:
            self.failed.append(str(e))
            return None
        self.keep(name, answer)
        return value

    def check(self, messages):
        """Asks once, before any work is done. LensError where no answer comes."""
        answer, reason = self.try_until_answered(messages, min(self.tries, CHECK_TRIES))
        require(answer is not None, self.silence(reason))

    def silence(self, reason):
        """The line of an error where nobody answers: why, and what to look at."""
        return (f"no answer from {self.model} at {self.url} ({reason}): --endpoint URL goes up to "
                "and with /v1, --model NAME is one that it serves, its key is read from the "
                "environment variable LENS_API_KEY")

    def count_unanswered(self, reason):
        """Counts a request that got no answer. LensError after `patience` of them in a row."""
        with self.lock:
            self.failed.append(reason)
            self.unanswered += 1
            self.in_a_row += 1
            if reason in ABOUT_THE_REQUEST:
                self.in_a_row = 0
            require(self.patience is None or self.in_a_row < self.patience,
                    self.silence(reason))

    def try_until_answered(self, messages, tries):
        """Posts a request until there is an answer, or asking again would not help, or `tries` are
        used up. -> (answer, None), or (None, the reason)."""
        for trial in range(tries):
            # 1, 2, 4, ... seconds, spread at random: the workers must not come back all at once.
            wait = FIRST_WAIT * 2**trial * random.uniform(0.5, 1.0)
            try:
                return self.post(messages), None
            except urllib.error.HTTPError as e:
                reason = reason_of(e)
                if e.code < 500 and e.code not in WORTH_ANOTHER_TRY:
                    break
                asked_for = e.headers["Retry-After"] or ""
                if asked_for.isdecimal():
                    wait = float(asked_for)
            except BAD_REPLY as e:
                reason = reason_of(e)
            if trial + 1 < tries:
                time.sleep(min(LONGEST_WAIT, wait))
        return None, reason

    def post(self, messages):
        """One try -> the answer's text. Raises HTTPError, or another of BAD_REPLY.

        Some models refuse any temperature but their own: from then on they are asked without.
        """
        temperature = self.temperature
        try:
            return self.send(messages, temperature)
        except urllib.error.HTTPError as e:
            if temperature is None or not refuses_temperature(e):
                raise
        answer = self.send(messages, None)         # an HTTPError if that was not the reason
        if self.temperature is not None:
            print(f"note: {self.model} refuses temperature {temperature:g}, and is asked at its "
                  "own", file=sys.stderr)
        self.temperature = None
        return answer

    def send(self, messages, temperature):
        body = {"model": self.model, "messages": messages}
        if temperature is not None:
            body["temperature"] = temperature
        headers = {"Content-Type": "application/json", "User-Agent": USER_AGENT}
        key = os.environ.get("LENS_API_KEY", "").strip()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            self.url + "/chat/completions", json.dumps(body).encode(), headers)
        with self.opener.open(request, timeout=self.timeout) as reply:
            return answer_of(reply.read())

    def keep(self, name, answer):
        with self.lock:
            self.known[name] = answer
            if self.journal:
                append_line(self.journal, json.dumps([name, answer]))


CHECK_TRIES = 3           # 3 seconds of waiting in all, unless the server asks for more


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects become HTTP errors: urllib would carry the key to whatever host they name, and turn
    the POST into a GET."""

    def redirect_request(self, *_):
        return None


def refuses_temperature(error):
    """Whether an HTTPError is about the temperature: its body, which is read here, names it."""
    return error.code in (400, 422) and b"temperature" in error.read().lower()


# What servers call the end of an answer that is whole; "length", "max_tokens", "abort" ... are not.
WHOLE = ("", "stop", "eos", "eos_token", "end_turn", "stop_sequence", "tool_calls")


def answer_of(body):
    """The text of the answer in a reply's body, bytes. NoAnswer where there is none.

    Its content is a text, or a list of parts; thoughts, which some servers send apart, are no
    answer.
    """
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        raise NoAnswer("a reply that is not JSON") from None
    if isinstance(reply, dict) and reply.get("error"):
        raise NoAnswer("an error in place of an answer")
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        text = text_of(message.get("content")).strip()
        finish = str(choice.get("finish_reason") or "").lower()
        failed = choice.get("error")
        thoughts = message.get("reasoning_content") or message.get("reasoning")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise NoAnswer("a reply without a message") from None

    if finish in ("content_filter", "safety"):
        raise NoAnswer(FILTERED)
    if failed or finish not in WHOLE:
        raise NoAnswer("an answer that was cut off")
    if not is_whole(text):
        raise NoAnswer("an answer with half a character")
    if not text and thoughts:
        raise NoAnswer("thoughts without an answer")
    if not text:
        raise NoAnswer("an empty answer")
    return text


def text_of(content):
    """The text of a message's content: a text itself, or a list of parts, each a text or
    {"type": "text", "text": ...}. Parts of other types hold thoughts or pictures."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = []
    for part in content:
        if isinstance(part, dict) and part.get("type") == "text":
            part = part["text"]
        if isinstance(part, str):
            texts.append(part)
    return "".join(texts)


def reason_of(error):
    """Why one of BAD_REPLY gives no answer, in a few words. Of messages only those are told that
    are about the connection: others, and the body of an HTTP error, may quote the request."""
    if isinstance(error, NoAnswer):
        return str(error)
    if isinstance(error, urllib.error.HTTPError):
        if 300 <= error.code < 400:
            return f"redirect (HTTP {error.code})"
        return f"HTTP {error.code}"
    if isinstance(error, urllib.error.URLError):
        return f"URLError: {error.reason}"
    return type(error).__name__


def name_of_chat(model, messages):
    """What a journal calls a chat. The temperature is left out: it may be dropped on the way."""
    body = json.dumps({"model": model, "messages": messages}).encode()
    return hashlib.sha256(body).hexdigest()


def read_journal(path):
    """{name of the chat: answer}. A line that a crash tore is left out, and asked for again."""
    known = {}
    if path is None:
        return known
    for row in read_json_lines(path):
        if isinstance(row, list) and len(row) == 2 and isinstance(row[1], str):
            name, answer = row
            known[name] = answer
    return known


def make_appendable(path):
    """Makes a text file and its folder where they are missing. LensError where nothing can be
    added to it."""
    with error_context(f"cannot write {path}"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        open(path, "ab").close()


def append_line(path, line):
    """Adds a line to a text file. LensError where it cannot be written.

    Where a crash tore the last line, that one is ended first: glued to it, the new line could not
    be read again.
    """
    make_appendable(path)
    with error_context(f"cannot write {path}"), open(path, "a+b") as f:
        size = f.seek(0, os.SEEK_END)
        if size > 0:
            f.seek(size - 1)
            if f.read(1) != b"\n":
                f.write(b"\n")
        f.write(line.encode() + b"\n")


def chat_about(image, words):
    """Messages that show a picture beside words.

    image: PIL, RGB; sent as a JPEG of at most 1024 pixels a side.
    """
    small = image.copy()
    small.thumbnail((1024, 1024))
    jpeg = io.BytesIO()
    small.save(jpeg, "JPEG", quality=90)
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}},
               {"type": "text", "text": words}]
    return [{"role": "user", "content": content}]


# --- One prompt out of an answer ------------------------------------------------------------------
# Each function takes the text as the one before it has left it; STEPS below is their order. Every
# example is run by tests/test_chat.py.

# Harmony: the one channel that is meant for the user.
FINAL = (r"(?s)<\|channel\|>\s*final\b.*?<\|message\|>(.*?)"
         r"(?=<\|(?:end|return|start|channel|call)\|>|$)")
# What is left of harmony where the special tokens were dropped.
BARE_CHANNELS = r"(?s)^.*assistantfinal|^(?:analysis|commentary)(?=[A-Z\"“]).*$"


def final_channel(text):
    """What stands in harmony's last final channel: "" where the model was cut off before it.

    >>> final_channel("<|channel|>analysis<|message|>Hm.<|end|><|channel|>final<|message|>A cat.")
    'A cat.'
    >>> final_channel("analysisThe user wants a cat.assistantfinalA cat.")
    'A cat.'
    """
    if "<|channel|>" not in text:
        return re.sub(BARE_CHANNELS, "", text.strip())
    answers = re.findall(FINAL, text)
    return answers[-1] if answers else ""


THOUGHTS = (r"(?is)<(think|thinking|reasoning|analysis)>.*?(?:</\1>|$)"
            r"|^.*</(?:think|thinking|reasoning|analysis)>"
            r"|\[think\].*?(?:\[/think\]|$)|◁think▷.*?(?:◁/think▷|$)")


def without_thoughts(text):
    """Without <think> blocks, also those that lack their beginning or their end.

    >>> without_thoughts("Hm, a cat.</think>A cat.<think>Or a dog?")
    'A cat.'
    """
    return re.sub(THOUGHTS, "", text)


def up_to_end_marker(text):
    """Up to the first marker that ends a message: what a model writes after it is no answer.

    >>> up_to_end_marker("A cat.<|end|>A dog.")
    'A cat.'
    """
    return re.split(r"<\|(?:end|return|call|im_end|endoftext|eot_id)\|>", text)[0]


def without_markers(text):
    """Without any other <|...|>, the innermost first; the same rule as lens.strip_markers.

    >>> without_markers("A <|<|x|>y|>cat.")
    'A cat.'
    """
    marker = r"<\|(?:(?!<\|).)*?\|>"
    while re.search(marker, text):
        text = re.sub(marker, "", text)
    return text


def inside_fence(text):
    r"""What stands in the first ``` block, if there is one.

    >>> inside_fence("Your prompt:\n```text\nA cat.\n```\nEnjoy!")
    'A cat.'
    """
    # A word after the opening is a language only where the line ends there.
    fence = re.search(r"(?s)```(?:[\w-]*[ \t\r]*\n)?(.*?)(?:```|$)", text)
    if fence:
        text = fence[1]
    return text.strip()


REMARK = (r"(?is)\n\s*\W*(?:let me know|feel free|i hope|hope this|would you like"
          r"|if you(?:'d| would)? (?:like|want)|note|explanation|this prompt)\b.*")


def without_remarks(text):
    r"""Without the model's remarks after the prompt.

    >>> without_remarks("A cat.\n\nLet me know if you want a dog.")
    'A cat.'
    """
    return re.sub(REMARK, "", text)


def without_opening(text):
    r"""Without first lines that end in a colon, in any language.

    >>> without_opening("Voici le prompt :\n\nUn chat.")
    'Un chat.'
    """
    return re.sub(r"\A(?:[^\n]{0,120}[:：][*_ ]*\n\s*)+", "", text)


OPTION = (r"(?im)^\W{0,3}(?:"
          r"(?:option|version|variant|variante|opción|вариант|选项|方案)\s*\w{1,2}\b\W*"
          r"|\d{1,2}[.)]\W*\s"
          r"|[a-c]\)\s)")


def first_option(text):
    r"""The first of several prompts to choose from. One numbered line alone is no choice.

    >>> first_option("1. A cat.\n2. A dog.")
    'A cat.\n'
    """
    starts = [match.start() for match in re.finditer(OPTION, text)]
    if len(starts) > 1 and starts[0] == 0:
        return re.sub(OPTION, "", text[:starts[1]])
    return text


def without_bullets(text):
    r"""Without the signs of lists and headings: a description in points is one prompt.

    >>> without_bullets("- A cat.\n- A sofa.")
    'A cat.\nA sofa.'
    """
    return re.sub(r"(?m)^\s*(?:[-*•]|#+)\s+", "", text)


LABEL = (r"(?i)^\W*(?:(?:here(?: is|['’]s)|the|your|final|new|rewritten|revised|improved|enhanced"
         r"|detailed|dense|image)\s+)*"
         r"(?:prompt|description|提示词|改写)\W*?[:：]\W*?(?=[\w\"“'«「])")


def without_label(text):
    """Without a label before the prompt.

    >>> without_label("Your final prompt: A cat.")
    'A cat.'
    """
    return re.sub(LABEL, "", text)


def one_paragraph(text):
    r"""All white space as single blanks.

    >>> one_paragraph("A cat.\n\nA sofa. ")
    'A cat. A sofa.'
    """
    return " ".join(text.split())


QUOTED = "|".join([
    r"\*\*([^*]+)\*\*",
    r'"([^"]+)"', r"'([^']+)'", r"`([^`]+)`",
    r"“([^“”]+)”", r"„([^“”]+)[“”]", r"‘([^‘’]+)’",
    r"«([^«»]+)»", r"「([^「」]+)」",
])


def without_quotes(text):
    """Without quotation marks or asterisks around the whole, however many.

    >>> without_quotes('**"A cat."**')
    'A cat.'
    """
    quoted = re.fullmatch(QUOTED, text)
    while quoted:
        text = quoted[quoted.lastindex].strip()
        quoted = re.fullmatch(QUOTED, text)
    return text


REFUSAL = (r"(?i)(?:i['’]?m (?:\w+ )?sorry|sorry,? (?:but )?i|i apologi[sz]e|my apologies"
           r"|i (?:can(?:no|['’])t|can not|won['’]t|am (?:unable|not able))\b"
           r"|i['’]m (?:unable|not able)|i (?:don['’]t|do not) (?:see|have)\b"
           r"|as an? (?:large )?(?:ai|language model)\b|unfortunately,? i"
           r"|很?抱歉|对不起|我(?:无法|不能)|申し訳|すみません|죄송"
           r"|(?:je suis )?désolée?\b|je ne peux pas|lo siento|no puedo"
           r"|(?:es )?tut mir leid|ich kann \w* ?nicht"
           r"|извините|к сожалению|mi dispiace|desculpe)")


def nothing_if_refused(text):
    """"" in place of a refusal, and of a text without a letter or digit.

    >>> nothing_if_refused("I'm sorry, but I can't help with that.")
    ''
    """
    says_something = any(character.isalnum() for character in text)
    if re.match(REFUSAL, text) or not says_something:
        return ""
    return text


STEPS = (
    final_channel,
    without_thoughts,
    up_to_end_marker,
    without_markers,
    inside_fence,
    without_remarks,
    without_opening,
    first_option,
    without_bullets,
    without_label,
    one_paragraph,
    without_quotes,
    nothing_if_refused,
)


def clean(raw):
    """A language model's raw answer -> the one prompt in it, one paragraph.

    "" where there is none: it is empty, a refusal, or cut off while the model still reasoned.

    >>> clean('<think>Red?</think>Sure! Here is your prompt:\\n\\n"A red cat."')
    'A red cat.'
    """
    text = raw
    for step in STEPS:
        text = step(text)
    return text


# --- JSON out of an answer ------------------------------------------------------------------------

def each_name_once(pairs):
    """dict(pairs); ValueError where a name stands twice: whichever was meant is not known."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def json_values(text, openings="{["):
    """All JSON objects and lists in an answer, the outermost, whatever stands around them; none in
    thoughts. [(value, its length in characters)]

    openings: "{" for objects alone, "[" for lists alone

    >>> json_values('<think>{"1": 0}?</think>Here you are: {"1": 1}. Or [true]?')
    [({'1': 1}, 8), ([True], 6)]
    """
    text = without_thoughts(final_channel(text))
    text = re.sub(r",(\s*[}\]])", r"\1", text)     # a comma too many in a list (or in a text)
    decoder = json.JSONDecoder(object_pairs_hook=each_name_once)
    found = []
    end = 0
    for match in re.finditer(f"[{re.escape(openings)}]", text):
        begin = match.start()
        if begin < end:                            # inside the value before
            continue
        try:
            value, end = decoder.raw_decode(text, begin)
        except RecursionError:                     # thousands of brackets: no answer
            break
        except ValueError:
            continue
        found.append((value, end - begin))
    return found


def parse_json(text, opening="{"):
    """The JSON value of an answer, whatever stands around it: the longest where there are several.
    None where there is none.

    opening: "{" for an object, "[" for a list

    >>> parse_json('Here you are: {"1": 0}. Anything else?')
    {'1': 0}
    """
    found = json_values(text, opening)
    if not found:
        return None
    value, _ = max(found, key=lambda pair: pair[1])
    return value
