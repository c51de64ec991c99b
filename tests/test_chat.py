"""Answers of language models cleaned and read; an endpoint, good and bad, and its key kept."""
import base64
import doctest
import io
import json
import random
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
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
    ("A sorry-looking dog that cannot swim.", "A sorry-looking dog that cannot swim."),
]


@pytest.mark.parametrize("raw, expected", ANSWERS)
def test_an_answer_becomes_one_prompt(raw, expected):
    assert chat.clean(raw) == expected


@pytest.mark.parametrize("function", [*chat.STEPS, chat.clean, chat.parse_json],
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
    (None, "{", None),
    ("[" * 100_000 + "]" * 100_000, "[", None),
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
    return chat.Endpoint(server.url, "writer", journal, tries=tries, timeout=0.5)


def messages_of(words):
    return [{"role": "user", "content": words}]


def too_short_a_body(request):
    """More is announced than comes: http.client raises IncompleteRead, which is no OSError."""
    return 200, {"Content-Length": "1000"}


@pytest.mark.parametrize("script", [
    [" hello "],
    [429, "hello"],
    [503, "hello"],
    ["hang", "hello"],
    ["die", "hello"],
    [b"<html>busy</html>", "hello"],
    [b'{"error": "busy"}', "hello"],
    [too_short_a_body, "hello"],
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
    ([408], "HTTP 408", 3),
    ([429], "HTTP 429", 3),
    ([500], "HTTP 500", 3),
    (["hang"], "TimeoutError", 3),
    (["die"], "RemoteDisconnected", 3),
    ([b"nonsense"], "JSONDecodeError", 3),
    ([b'{"error": 1}'], "KeyError", 3),
    ([b'{"choices": []}'], "IndexError", 3),
    ([b'{"choices": [{"message": {"content": null}}]}'], "AttributeError", 3),
    ([b'[1]'], "TypeError", 3),
    ([too_short_a_body], "IncompleteRead", 3),
])
def test_an_endpoint_that_does_not_says_why(server, script, reason, calls):
    server.script = script
    endpoint = endpoint_of(server, tries=3)
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
    assert endpoint.failed == ["URLError", "URLError"]


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
    """Each answer was paid for: better one line of error than to go on and lose them."""
    (tmp_path / "file").write_text("")
    server.script = ["hello"]
    with pytest.raises(LensError, match="cannot write"):
        endpoint_of(server, tmp_path / "file" / "answers.jsonl").ask([HELLO])
    assert len(server.calls) == 1


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
    running = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    running.url = f"http://localhost:{running.server_port}/v1"
    running.keys = []
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_follows_no_redirect(server, elsewhere, status):
    server.script = [(status, {"Location": elsewhere.url + "/chat/completions"})]
    endpoint = endpoint_of(server, tries=3)
    assert endpoint.one(HELLO) is None
    assert endpoint.failed == [f"redirect (HTTP {status})"]
    assert len(server.calls) == 1                            # asking again would not help
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
