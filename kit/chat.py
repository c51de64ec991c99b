"""Talking to language models: one OpenAI-compatible client, and what is made of their answers.

Read before: kit/files.py.

Captions (data.py), the reasoner (reason.py) and the judges (rl.py) all ask through `Endpoint`. What
comes back is rarely the bare text that was asked for: `clean` finds the one prompt in an answer,
`parse_json` the one JSON value.
"""
import base64
import hashlib
import http.client
import io
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from kit.files import error_context, read_json_lines

# --- The client -----------------------------------------------------------------------------------

FIRST_WAIT = 1.0                      # seconds before a second try; later waits double
LONGEST_WAIT = 60.0                   # seconds, also where the server asks for more
WORTH_ANOTHER_TRY = (408, 409, 429)   # of the HTTP errors below 500; all from 500 on are

# What a broken connection, or a reply that is no answer of a chat, raises.
BAD_REPLY = (OSError, http.client.HTTPException,
             ValueError, KeyError, IndexError, TypeError, AttributeError)


class Endpoint:
    """An OpenAI-compatible chat endpoint.

    url       up to and with /v1
    model     one of the models that it serves
    journal   file that keeps all answers: work begun again asks only for the rest; None: no file
    workers   requests under way at the same time
    tries     of one request, with longer and longer waits between them
    timeout   seconds that the server may be silent

    Its key is read from the environment variable LENS_API_KEY; it goes to this address alone and is
    written nowhere. `failed` holds the reason, in a few words, of every request without an answer.
    """

    def __init__(self, url, model, journal=None, workers=8, tries=5, timeout=120):
        self.url = url.rstrip("/")
        self.model = model
        self.journal = journal
        self.workers = workers
        self.tries = tries
        self.timeout = timeout

        self.known = read_journal(journal)
        self.failed = []
        self.lock = threading.Lock()
        self.opener = urllib.request.build_opener(NoRedirect)

    def ask(self, items, messages=lambda item: item):
        """[item] -> [answer or None], in order. messages(item) makes a chat when its turn comes."""
        def answer_to(item):
            return self.one(messages(item))

        with ThreadPoolExecutor(self.workers) as pool:
            answers = pool.map(answer_to, items)
            bar = tqdm(answers, total=len(items), desc=f"asking {self.model}",
                       disable=len(items) < 2)
            return list(bar)

    def one(self, messages):
        """The answer to one chat, from the journal if it is there. None where all tries failed."""
        body = json.dumps({"model": self.model, "messages": messages}).encode()
        name = hashlib.sha256(body).hexdigest()
        if name in self.known:
            return self.known[name]

        answer = self.try_until_answered(body)
        if answer is not None:
            self.keep(name, answer)
        return answer

    def try_until_answered(self, body):
        """Posts a request until there is an answer, or asking again would not help, or `tries` are
        used up: then None, and the reason is added to `failed`."""
        for trial in range(self.tries):
            # 1, 2, 4, ... seconds, spread at random: the workers must not come back all at once.
            wait = FIRST_WAIT * 2**trial * random.uniform(0.5, 1.0)
            try:
                return self.post(body)
            except urllib.error.HTTPError as e:
                reason = http_reason(e.code)
                if e.code < 500 and e.code not in WORTH_ANOTHER_TRY:
                    break
                asked_for = e.headers["Retry-After"] or ""
                if asked_for.isdigit():
                    wait = float(asked_for)
            except BAD_REPLY as e:
                reason = type(e).__name__       # without its message, which may quote the request
            if trial + 1 < self.tries:
                time.sleep(min(LONGEST_WAIT, wait))
        self.failed.append(reason)
        return None

    def post(self, body):
        """One try -> the answer's text. Raises HTTPError, or another of BAD_REPLY."""
        headers = {"Content-Type": "application/json"}
        key = os.environ.get("LENS_API_KEY")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url + "/chat/completions", body, headers)
        with self.opener.open(request, timeout=self.timeout) as reply:
            return json.load(reply)["choices"][0]["message"]["content"].strip()

    def keep(self, name, answer):
        with self.lock:
            self.known[name] = answer
            if self.journal:
                append_line(self.journal, json.dumps([name, answer]))


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects become HTTP errors: urllib would carry the key to whatever host they name, and turn
    the POST into a GET."""

    def redirect_request(self, *_):
        return None


def http_reason(code):
    if 300 <= code < 400:
        return f"redirect (HTTP {code})"
    return f"HTTP {code}"


def read_journal(path):
    """{hash of the request: answer}. A line that a crash tore is left out, and asked for again."""
    known = {}
    if path is None:
        return known
    for row in read_json_lines(path):
        if isinstance(row, list) and len(row) == 2:
            name, answer = row
            known[name] = answer
    return known


def append_line(path, line):
    """Adds a line to a text file. LensError where it cannot be written.

    Where a crash tore the last line, that one is ended first: glued to it, the new line could not
    be read again.
    """
    with error_context(f"cannot write {path}"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as f:
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


# --- JSON out of an answer ------------------------------------------------------------------------

def parse_json(text, opening="{"):
    """The JSON value inside an answer, whatever stands around it; None where there is none.

    opening: "{" for an object, "[" for a list. text may be None: so failed requests are answered.

    >>> parse_json('Here you are: {"1": 0}. Anything else?')
    {'1': 0}
    """
    closing = {"{": "}", "[": "]"}[opening]
    text = text or ""
    begin = text.find(opening)
    end = text.rfind(closing)
    if not 0 <= begin < end:
        return None
    try:
        return json.loads(text[begin:end + 1])
    except (ValueError, RecursionError):
        return None


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
            r"|^.*</(?:think|thinking|reasoning|analysis)>")


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
    fence = re.search(r"(?s)```[\w-]*[ \t]*\n?(.*?)(?:```|$)", text)
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


REFUSAL = (r"(?i)(?:i['’]?m (?:\w+ )?sorry|sorry,? (?:but )?i"
           r"|i (?:can(?:no|['’])t|can not|won['’]t|am (?:unable|not able))\b"
           r"|i['’]m (?:unable|not able)|as an ai\b|unfortunately,? i"
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
