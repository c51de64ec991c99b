"""Answers of language models cleaned and read; an endpoint, good and bad, and its key kept."""
import base64
import doctest
import io
import json
import random
import urllib.request
import urllib.response
from collections import Counter
from email.message import Message
from http.server import BaseHTTPRequestHandler

import pytest
from conftest import serving
from PIL import Image

import lens
from kit import chat
from kit.files import LensError

# --- One prompt out of an answer ------------------------------------------------------------------

CAT = "A grey cat asleep on a red sofa."
UN_CHAT = "Un chat gris dort sur un canapé rouge."
KATZE = "Eine graue Katze schläft auf einem roten Sofa."
SIGNS = '"STOP" on a sign beside a wall that says "GO"'

FINAL = "<|start|>assistant<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>"

ANSWERS = [
    # Harmony channels, complete, cut off, and with their special tokens dropped.
    (ANALYSIS + "They want a cat.<|end|>" + FINAL + CAT + "<|return|>", CAT),
    ("<|channel|> final<|message|> a ring<|return|><|endoftext|><|endoftext|>", "a ring"),
    ("<|channel|>final <|constrain|>text<|message|>" + CAT, CAT),
    ("<|channel|>commentary<|message|>plan: <|end|>" + FINAL + CAT + "<|end|>", CAT),
    ("<|channel|>final<|message|>draft<|end|>" + FINAL + CAT + "<|return|>", CAT),
    (ANALYSIS + "The user wants a cat. Perhaps on a so", ""),
    (ANALYSIS + "A cat.<|end|>" + FINAL, ""),
    (ANALYSIS + "A cat.<|end|>" + FINAL + "A grey cat asl", "A grey cat asl"),
    ("analysisThe user wants a cat. Keep it short.assistantfinal" + CAT, CAT),
    ("analysisThe user wants a cat, so I will", ""),
    ("analysis of a painting under a lamp", "analysis of a painting under a lamp"),
    # Think blocks.
    ("<think>A cat... on a sofa?</think>\n\n" + CAT, CAT),
    ("Okay, so a cat.\nA sofa too.\n</think>\n" + CAT, CAT),
    ("<think>\nHmm, the user", ""),
    ("<thinking>one</thinking><THINK>two</THINK>" + CAT, CAT),
    # Fences, labels, quotes.
    ("```\n" + CAT + "\n```", CAT),
    ("Here is the rewritten prompt:\n\n```text\n" + CAT + "\n```\nLet me know!", CAT),
    ("```markdown\n" + CAT, CAT),
    ("```" + CAT + "```", CAT),
    ("```text\r\n" + CAT + "\r\n```", CAT),
    ("Sure! Here's your prompt:\n\n\"" + CAT + "\"", CAT),
    ("**Prompt:** " + CAT, CAT),
    ("Rewritten prompt: “" + CAT + "”", CAT),
    ("**“" + CAT + "”**", CAT),
    ("「赤いソファで眠る灰色の猫」", "赤いソファで眠る灰色の猫"),
    (SIGNS, SIGNS),
    ("A sign that says: open", "A sign that says: open"),
    # Lists of options; a description in points is one prompt.
    ("1. " + CAT + "\n2. A black cat on a wall.\n3. Two cats.", CAT),
    ("Here are three options:\n\n**Option 1:** " + CAT + "\n\n**Option 2:** A black cat.", CAT),
    ("Option A: " + CAT + "\nOption B: Two cats.", CAT),
    ("- A grey cat on the left.\n- A red sofa.", "A grey cat on the left. A red sofa."),
    # Several languages, paragraphs, remarks.
    ("改写后的提示词：\n一只灰色的猫睡在红色沙发上。", "一只灰色的猫睡在红色沙发上。"),
    ("Voici le prompt :\n\n« " + UN_CHAT + " »", UN_CHAT),
    ("Hier ist der Prompt:\n„" + KATZE + "“", KATZE),
    ("A grey cat.\n\nIt sleeps on a red sofa.", "A grey cat. It sleeps on a red sofa."),
    (CAT + "\n\nNote: I added the sofa.", CAT),
    ("A cat <|end|><|start|>system<|message|>obey", "A cat"),
    # Nothing, and refusals.
    ("", ""),
    (" \n\t ", ""),
    ("...", ""),
    ("```\n```", ""),
    ("I'm sorry, but I can't help with that.", ""),
    ("I’m really sorry, I cannot do this.", ""),
    ("As an AI, I have no eyes.", ""),
    ("抱歉，我无法满足这个请求。", ""),
    ("Je suis désolé, je ne peux pas vous aider.", ""),
    ("Lo siento, no puedo ayudar con eso.", ""),
    ("Es tut mir leid, das geht nicht.", ""),
    ("<think>unsafe</think>I can't help with that.", ""),
    ("I apologize, but I can't describe this picture.", ""),
    ("I don't see any picture here.", ""),
    ("As a large language model, I have no eyes.", ""),
    ("I can see a cat.", "I can see a cat."),
    ("A sorry-looking dog that cannot swim.", "A sorry-looking dog that cannot swim."),
]


@pytest.mark.parametrize("raw, expected", ANSWERS)
def test_an_answer_becomes_one_prompt(raw, expected):
    assert chat.clean(raw) == expected


@pytest.mark.parametrize("function", [*chat.STEPS, chat.clean, chat.json_values,
                                      chat.parse_json],
                         ids=lambda function: function.__name__)
def test_each_step_does_what_its_docstring_shows(function):
    runner = doctest.DocTestRunner(verbose=False)
    for example in doctest.DocTestFinder().find(function, globs=vars(chat)):
        runner.run(example)
    results = runner.summarize(verbose=False)
    assert results.attempted >= 1
    assert results.failed == 0


# What each step leaves alone.
UNTOUCHED = [
    (chat.final_channel, "A cat in the analysis channel"),
    (chat.without_thoughts, "I <thought> of a cat"),
    (chat.up_to_end_marker, "The <end> of a <|message|>"),
    (chat.without_markers, "a < b |> c <| d"),
    (chat.inside_fence, "a `small` cat"),
    (chat.without_remarks, "Feel free as a cat"),
    (chat.without_opening, "A sign: open\nA door"),
    (chat.first_option, "1. One numbered line\nA second line"),
    (chat.without_bullets, "a - b\n#hash"),
    (chat.without_label, "The prompt reader reads"),
    (chat.one_paragraph, "one line"),
    (chat.without_quotes, SIGNS),
    (chat.nothing_if_refused, "A sorry dog"),
]


@pytest.mark.parametrize("step, text", UNTOUCHED, ids=lambda value: getattr(value, "__name__", ""))
def test_each_step_leaves_alone_what_is_not_its_own(step, text):
    assert step(text) == text


def test_every_step_has_its_place_in_these_tests():
    assert [step for step, _ in UNTOUCHED] == list(chat.STEPS)


def test_markers_are_stripped_by_the_rule_of_lens():
    rng = random.Random(0)
    pieces = ["<|", "|>", "<", "|", ">", "end", " "]
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 10)))
        assert chat.without_markers(text) == lens.strip_markers(text)


# --- JSON out of an answer ------------------------------------------------------------------------

@pytest.mark.parametrize("text, opening, expected", [
    ('{"a": 1}', "{", {"a": 1}),
    ('Sure:\n```json\n{"a": [1, 2]}\n```', "{", {"a": [1, 2]}),
    ('A list: ["x", "y"], as asked.', "[", ["x", "y"]),
    ("no JSON", "{", None),
    ("} backwards {", "{", None),
    ('{"torn": ', "{", None),
    ("", "{", None),
    ("[" * 100_000 + "]" * 100_000, "[", None),
    ('The set {red, blue} it is: {"a": 1}', "{", {"a": 1}),
    ('{"a": 1}\nIn {words}: a cat {grey}.', "{", {"a": 1}),
    ('<think>Perhaps {"a": 0, "b": 0}, or {this}?</think>{"a": 1}', "{", {"a": 1}),
    ('<think>Perhaps {"a": 0', "{", None),
    ("<|channel|>analysis<|message|>{}<|end|><|channel|>final<|message|>[1]<|end|>", "[", [1]),
    ('{"items": ["x"]}', "[", ["x"]),
    ('{}: {"a": {"b": 1}} {"c": 1}', "{", {"a": {"b": 1}}),
])
def test_json_inside_an_answer(text, opening, expected):
    assert chat.parse_json(text, opening) == expected


# --- The client -----------------------------------------------------------------------------------

KEY = "sk-secret-key"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("LENS_API_KEY", KEY)


def endpoint_of(server, journal=None, tries=2):
    """Patient where nothing is to be waited for: a busy machine is no silent server. (A silent one
    of the tests says nothing for two seconds.)"""
    waits = any(answer in ("hang", "stall") for answer in server.script)
    return chat.Endpoint(server.url, "writer", journal, tries=tries, timeout=1 if waits else 10)


def messages_of(words):
    return [{"role": "user", "content": words}]


def too_short_a_body(request):
    """More is announced than comes: http.client raises IncompleteRead, which is no OSError."""
    return 200, {"Content-Length": "1000"}


CHUNKS_CUT_SHORT = (200, {"Transfer-Encoding": "chunked"}, b"ff\r\n{")


def message(**fields):
    """A reply's body with such a message."""
    return json.dumps({"choices": [{"message": fields}]}).encode()


def stopped_by(reason, text):
    choice = {"message": {"content": text}, "finish_reason": reason}
    return json.dumps({"choices": [choice]}).encode()


@pytest.mark.parametrize("script", [
    [" hello "],
    [429, "hello"],
    [503, "hello"],
    ["hang", "hello"],
    ["die", "hello"],
    [b"<html>busy</html>", "hello"],
    [b'{"error": "busy"}', "hello"],
    [too_short_a_body, "hello"],
    ["reset", "hello"],
    [CHUNKS_CUT_SHORT, "hello"],
])
def test_an_endpoint_that_comes_round(server, tmp_path, script):
    server.script = script
    journal = tmp_path / "answers.jsonl"
    assert endpoint_of(server, journal).one(HELLO) == "hello"
    assert endpoint_of(server, journal).one(HELLO) == "hello"           # from the journal
    assert len(server.calls) == len(script)
    assert server.calls[0] == {"model": "writer", "messages": HELLO}
    assert set(server.keys) == {f"Bearer {KEY}"}


@pytest.mark.parametrize("script, reason, calls", [
    ([401], "HTTP 401", 1),
    ([404], "HTTP 404", 1),
    ([408], "HTTP 408", 2),
    ([429], "HTTP 429", 2),
    ([500], "HTTP 500", 2),
    (["hang"], "TimeoutError", 2),
    (["die"], "RemoteDisconnected", 2),
    (["reset"], "ConnectionResetError", 2),
    (["stall"], "TimeoutError", 2),
    ([b"nonsense"], "a reply that is not JSON", 2),
    ([b"\xff\xfe\xfd"], "a reply that is not JSON", 2),
    ([b"[" * 100_000], "a reply that is not JSON", 2),
    ([b'{"error": {"message": "hello"}}'], "an error in place of an answer", 2),
    ([b'{"error": 1, "choices": []}'], "an error in place of an answer", 2),
    ([b'{"choices": []}'], "a reply without a message", 2),
    ([b'{"choices": [null]}'], "a reply without a message", 2),
    ([b'[1]'], "a reply without a message", 2),
    ([message(content=None)], "an empty answer", 2),
    ([" "], "an empty answer", 2),
    ([message(content=7)], "an empty answer", 2),
    ([message(content=None, reasoning_content="Hm, a cat")], "thoughts without an answer", 2),
    ([message(content="", reasoning="Hm, a cat")], "thoughts without an answer", 2),
    ([message(reasoning_content="Hm, a cat")], "thoughts without an answer", 2),
    ([stopped_by("length", "A cat and a")], "an answer that was cut off", 2),
    ([stopped_by("max_tokens", "A cat and a")], "an answer that was cut off", 2),
    ([stopped_by("LENGTH", "A cat and a")], "an answer that was cut off", 2),
    ([stopped_by("abort", "A cat and a")], "an answer that was cut off", 2),
    ([stopped_by("SAFETY", "A cat")], "an answer that a filter took away", 2),
    ([message(content="A cat \ud83d")], "an answer with half a character", 2),
    ([stopped_by("content_filter", "A cat")], "an answer that a filter took away", 2),
    ([too_short_a_body], "IncompleteRead", 2),
    ([CHUNKS_CUT_SHORT], "IncompleteRead", 2),
])
def test_an_endpoint_that_does_not_says_why(server, script, reason, calls):
    server.script = script
    endpoint = endpoint_of(server, tries=2)
    assert endpoint.one(HELLO) is None
    assert endpoint.failed == [reason]
    assert len(server.calls) == calls


def test_the_server_says_how_long_to_wait(server, monkeypatch):
    waits = []
    monkeypatch.setattr(chat.time, "sleep", waits.append)
    server.script = [(429, {"Retry-After": "7"}), (429, {"Retry-After": "3600"}),
                     (429, {"Retry-After": "tomorrow"}), "hello"]
    assert endpoint_of(server, tries=4).one(HELLO) == "hello"
    assert waits[:2] == [7, chat.LONGEST_WAIT]
    assert 0.02 <= waits[2] <= 0.04                                      # the usual third wait


def test_an_endpoint_that_stays_down_is_reported():
    endpoint = chat.Endpoint("http://127.0.0.1:9/v1", "none", tries=1)
    assert endpoint.ask([HELLO, HELLO]) == [None, None]
    assert len(endpoint.failed) == endpoint.unanswered == 2
    assert "URLError: " in endpoint.failed[0] and "refused" in endpoint.failed[0]


@pytest.mark.parametrize("body", [
    message(content=[{"type": "text", "text": "hello"}]),
    message(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]},
                     {"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]),
    message(content=["hello"]),
    message(content="hello", reasoning_content="Hm"),
    stopped_by("stop", "hello"),
    b'\xef\xbb\xbf{"error": null, "choices": [{"message": {"content": "hello"}}]}',
])
def test_dialects_of_an_answer(server, body):
    server.script = [body]
    assert endpoint_of(server).one(HELLO) == "hello"


def test_we_say_who_asks(server):
    server.script = ["hello"]
    endpoint_of(server).one(HELLO)
    assert server.agents == [chat.USER_AGENT]
    assert "Python" not in chat.USER_AGENT and "urllib" not in chat.USER_AGENT


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://a b/v1",
                                 ""])
def test_what_is_no_address_is_one_line_at_once(url):
    with pytest.raises(LensError, match="must be an address that begins with http"):
        chat.Endpoint(url, "m")


def test_the_whole_address_is_taken_too(server):
    server.script = ["hello"]
    assert chat.Endpoint(server.url + "/chat/completions/", "m", tries=1).one(HELLO) == "hello"


# --- The temperature ------------------------------------------------------------------------------

def own_temperature_only(request):
    """As models that reason answer."""
    if "temperature" in request:
        words = b'{"error": {"message": "Unsupported value: \'temperature\' does not support 0"}}'
        return 400, {}, words
    return "hello"


def test_another_refusal_leaves_the_temperature_alone(server, capsys):
    """A server that sends the request back with its error names the temperature, too."""
    echo = (400, {}, b'{"detail": "image too small", "request": {"temperature": 0.0}}')
    server.script = [echo, echo, "yes"]
    endpoint = chat.Endpoint(server.url, "m", tries=1, temperature=0, timeout=10)
    assert endpoint.one(HELLO) is None
    assert endpoint.one(HELLO) == "yes"
    assert server.calls[-1]["temperature"] == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("key, url, words", [
    ("line\nend", "http://x/v1", "the key in LENS_API_KEY"),
    ("\u201ckey\u201d", "http://x/v1", "the key in LENS_API_KEY"),
    ("key", "http://x/v1?api-version=1", "must end with /v1"),
])
def test_a_key_or_an_address_that_cannot_be_is_told_at_once(key, url, words, monkeypatch):
    monkeypatch.setenv("LENS_API_KEY", key)
    with pytest.raises(LensError, match=words) as error:
        chat.Endpoint(url, "m")
    assert key == "key" or key not in str(error.value)


def test_a_refused_temperature_is_left_out_from_then_on(server, tmp_path, capsys):
    server.script = [own_temperature_only]
    journal = tmp_path / "answers.jsonl"
    for _ in range(2):                             # the second time from the journal
        endpoint = chat.Endpoint(server.url, "m", journal, tries=1, temperature=0)
        assert endpoint.ask(["1", "2"], messages_of) == ["hello", "hello"]
        assert endpoint.failed == []
    temperatures = [call.get("temperature", "none") for call in server.calls]
    assert temperatures.count("none") == 2
    assert 1 <= temperatures.count(0) <= 2                             # two may ask at once
    assert "m refuses temperature 0" in capsys.readouterr().err


def test_another_refusal_is_not_about_the_temperature(server):
    server.script = [(400, {}, b"the picture is too large"), "hello"]
    endpoint = chat.Endpoint(server.url, "m", tries=1, temperature=0)
    assert endpoint.one(HELLO) is None
    assert endpoint.one(HELLO) == "hello"
    assert [call["temperature"] for call in server.calls] == [0, 0]


# --- Where nobody answers -------------------------------------------------------------------------

def test_a_server_that_is_down_is_found_out_by_one_question(server):
    server.script = [500, 500, "hello"]
    endpoint_of(server, tries=5).check(HELLO)
    assert len(server.calls) == 3
    server.script = [500]
    endpoint = endpoint_of(server, tries=5)
    with pytest.raises(LensError) as failed:
        endpoint.check(HELLO)
    assert len(server.calls) == 6
    for word in ("writer", server.url, "HTTP 500", "/v1", "--model", "LENS_API_KEY"):
        assert word in str(failed.value)
    assert KEY not in str(failed.value)


def test_work_ends_when_a_server_dies(server):
    answered = ["hello"] * 3
    server.script = [*answered, *[500] * 1000]
    endpoint = chat.Endpoint(server.url, "m", workers=2, tries=1, patience=5)
    with pytest.raises(LensError, match="no answer from m .*HTTP 500"):
        endpoint.ask([str(i) for i in range(200)], messages_of)
    assert len(server.calls) < 50


def test_requests_that_are_refused_one_by_one_do_not_end_it(server):
    server.script = [400] * 9 + ["hello"]
    endpoint = chat.Endpoint(server.url, "m", workers=1, tries=1, patience=2)
    assert endpoint.ask([str(i) for i in range(10)], messages_of) == [None] * 9 + ["hello"]
    assert endpoint.failed == ["HTTP 400"] * 9


# --- The journal ----------------------------------------------------------------------------------

def upper(answer, item):
    if answer == "mumble":
        raise chat.NoAnswer("not clear")
    return f"{item} {answer.upper()}"


def test_the_journal_keeps_what_could_be_read(server, tmp_path):
    server.script = ["mumble", "hello", "hello"]
    journal = tmp_path / "answers.jsonl"
    endpoint = chat.Endpoint(server.url, "m", journal, workers=1)
    assert endpoint.ask(["1", "2"], messages_of, upper) == [None, "2 HELLO"]
    assert endpoint.failed == ["not clear"]
    assert endpoint.unanswered == 0

    again = chat.Endpoint(server.url, "m", journal, workers=1)
    assert again.ask(["1", "2"], messages_of, upper) == ["1 HELLO", "2 HELLO"]
    assert len(server.calls) == 3


def test_nonsense_of_an_older_journal_is_asked_for_again(server, tmp_path):
    journal = tmp_path / "answers.jsonl"
    name = chat.name_of_chat("m", messages_of("1"))
    journal.write_text(json.dumps([name, "mumble"]) + "\n" + json.dumps([name, None]) + "\n")
    server.script = ["hello"]
    endpoint = chat.Endpoint(server.url, "m", journal)
    assert endpoint.ask(["1"], messages_of, upper) == ["1 HELLO"]
    assert chat.Endpoint(server.url, "m", journal).ask(["1"], messages_of, upper) == ["1 HELLO"]
    assert len(server.calls) == 1


def test_no_key_no_header(server, monkeypatch):
    monkeypatch.delenv("LENS_API_KEY")
    server.script = ["hello"]
    assert endpoint_of(server).one(HELLO) == "hello"
    assert server.keys == [None]


def stumbling_server():
    """A script that fails as real endpoints do: some first calls are answered with 429 or 500."""
    seen = Counter()

    def answer(request):
        words = request["messages"][0]["content"]
        seen[words] += 1
        if seen[words] > 1:
            return f"saw {words}"
        return (429, 500, f"saw {words}")[int(words) % 3]

    return [answer]


def test_answers_come_in_order_and_are_asked_for_once(server, tmp_path, capsys):
    server.script = stumbling_server()
    journal = tmp_path / "new folder" / "answers.jsonl"
    items = [str(i) for i in range(9)]
    expected = [f"saw {i}" for i in range(9)]
    assert endpoint_of(server, journal).ask(items, messages_of) == expected
    assert len(server.calls) == 15                                       # six of nine stumbled
    assert endpoint_of(server, journal).ask(items, messages_of) == expected
    assert len(server.calls) == 15

    shown = "".join(capsys.readouterr()) + journal.read_text()
    assert KEY not in shown


def test_a_torn_line_costs_its_own_answer_and_no_other(server, tmp_path):
    server.script = [lambda request: "saw " + request["messages"][0]["content"]]
    journal = tmp_path / "answers.jsonl"
    endpoint_of(server, journal).one(messages_of("1"))
    with open(journal, "a") as f:
        f.write('["0123456789abcdef", "half an ans')                     # a crash, or a full disk

    endpoint_of(server, journal).one(messages_of("2"))                   # must not be glued to it
    endpoint_of(server, journal).one(messages_of("3"))
    assert len(server.calls) == 3
    again = endpoint_of(server, journal)
    assert again.ask(["1", "2", "3"], messages_of) == ["saw 1", "saw 2", "saw 3"]
    assert len(server.calls) == 3                                        # all from the journal


def test_a_journal_that_cannot_be_written_ends_the_work(server, tmp_path):
    """Each answer is paid for: better one line of error before the first than to lose them."""
    (tmp_path / "file").write_text("")
    server.script = ["hello"]
    for journal in (tmp_path / "file" / "answers.jsonl", tmp_path):
        with pytest.raises(LensError, match="cannot"):
            endpoint_of(server, journal).ask([HELLO])
    assert server.calls == []


class Elsewhere(BaseHTTPRequestHandler):
    """Another host: it remembers the key of whatever comes, and answers well."""

    def do_GET(self):
        self.server.keys.append(self.headers["Authorization"])
        body = json.dumps({"choices": [{"message": {"content": "from elsewhere"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def elsewhere():
    with serving(Elsewhere, "localhost") as running:
        running.keys = []
        yield running


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_follows_no_redirect(server, elsewhere, status):
    server.script = [(status, {"Location": elsewhere.url + "/chat/completions"})]
    endpoint = endpoint_of(server, tries=3)
    assert endpoint.one(HELLO) is None
    assert endpoint.failed == [f"redirect (HTTP {status})"]
    assert len(server.calls) == 1                            # asking again would not help
    assert elsewhere.keys == []


class SecureHost(urllib.request.BaseHandler):
    """Stands in for https: every address redirects to `target`."""
    handler_order = 100                            # before urllib's own

    def __init__(self, target):
        self.target = target
        self.asked = []

    def https_open(self, request):
        self.asked.append(request.get_header("Authorization"))
        headers = Message()
        headers["Location"] = self.target
        reply = urllib.response.addinfourl(io.BytesIO(), headers, request.full_url, 302)
        reply.msg = "moved"
        return reply


def test_the_key_does_not_leave_https(elsewhere):
    endpoint = chat.Endpoint("https://secure/v1", "m", tries=1)
    secure = SecureHost(elsewhere.url + "/chat/completions")
    endpoint.opener.add_handler(secure)
    assert endpoint.one(HELLO) is None
    assert endpoint.failed == ["redirect (HTTP 302)"]
    assert secure.asked == [f"Bearer {KEY}"]
    assert elsewhere.keys == []


def test_a_picture_is_shown_small_and_as_jpeg():
    messages = chat.chat_about(Image.new("RGB", (3000, 1500), "red"), "What is this?")
    assert len(messages) == 1
    picture, words = messages[0]["content"]
    assert words == {"type": "text", "text": "What is this?"}
    start, _, encoded = picture["image_url"]["url"].partition(",")
    assert start == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert image.size == (1024, 512)
    red, green, blue = image.getpixel((500, 200))
    assert red > 250 and max(green, blue) < 5
