"""nanorlhf.runtime.endpoint against a real HTTP server on loopback, on its good and its bad days; local models against Hugging Face's."""

import contextlib
import json
import re
import socketserver
import threading
import time
from email.utils import formatdate
from urllib.parse import quote

import pytest
import torch
from support import Endpoint, chat, word_tokenizer
from transformers import AutoModelForCausalLM

from nanorlhf import world
from nanorlhf.errors import InputError
from nanorlhf.evals.win_rates import JudgeConfig
from nanorlhf.models import Policy
from nanorlhf.rollout import ask_locally
from nanorlhf.runtime import endpoint
from nanorlhf.runtime.endpoint import Rejected, Unreachable, ask_all, asker


class Clock:
    """In the place of the module's `time`: nobody waits, but the time is told as if."""

    def __init__(self):
        self.now, self.slept = 1e9, []

    def time(self):
        return self.now

    monotonic = time

    def sleep(self, seconds):
        self.now += seconds
        self.slept += [seconds] if seconds else []


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(endpoint, "time", Clock())
    return endpoint.time


def test_what_is_sent(monkeypatch):
    with Endpoint(chat("yes")) as server:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        assert asker(server.url + "/", "tiny", 7)("Is it \u00fcber?\n") == "yes"
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        asker(server.url, "tiny", 7)("again")
    (path, headers, body), (_, with_key, _) = server.asked
    assert path == "/v1/chat/completions" and headers["Content-Type"] == "application/json"
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Is it \u00fcber?\n"}],
        "temperature": 0,
        "max_tokens": 7,
    }
    assert "Authorization" not in headers and with_key["Authorization"] == "Bearer secret"


CUT_OFF = (200, '{"choices": [', {"Content-Length": "5000"})


@pytest.mark.parametrize("bad", [(429, ""), (500, "oops"), (503, ""), (408, ""), 0, 0.5, CUT_OFF])
def test_it_is_asked_again(clock, bad):
    with Endpoint(bad, bad, bad, chat("yes")) as server:
        assert asker(server.url, "tiny", 7, pause=2, timeout=0.3)("?") == "yes"
        assert clock.slept == [2, 4, 8] and len(server.asked) == 4
    with Endpoint(bad) as server, pytest.raises(Unreachable, match=", 4 times"):
        asker(server.url, "tiny", 7, pause=2, timeout=0.3)("?")
    assert clock.slept == [2, 4, 8] * 2 and len(server.asked) == 4


def drip(text, pause=0.02):
    """What a server sends a byte at a time, never silent for as long as a timeout."""
    for character in text:
        yield character.encode()
        time.sleep(pause)


HEAD = "HTTP/1.1 200 OK\r\n"
DRIPS = {  # where a server becomes slow: before a single line is whole, between headers, in a body
    "the status line": lambda: drip("HTTP/1.1 200 " + "x" * 1000),
    "a header": lambda: drip(HEAD + "X: " + "x" * 1000),
    "many headers": lambda: drip(HEAD + "X: y\r\n" * 1000),
    "the body": lambda: drip(HEAD + "Content-Length: 1000\r\n\r\n" + "x" * 1000),
    "a body without a length": lambda: drip(HEAD + "\r\n" + "x" * 1000),
    "the body of an error": lambda: drip("HTTP/1.1 400 no\r\n\r\n" + "x" * 1000),
    "many provisional answers": lambda: drip("HTTP/1.1 100 Continue\r\n\r\n" * 1000),
}


@pytest.mark.parametrize("where", DRIPS)
def test_a_deadline_for_the_whole_answer(where):
    """A server that goes on sending holds nobody for longer than TRIES timeouts."""
    start = time.monotonic()
    with RawServer(DRIPS[where]) as url, pytest.raises(Unreachable, match="timed out, 4 times"):
        asker(url, "tiny", 7, pause=0, timeout=0.1)("?")
    assert time.monotonic() - start < 2  # dripped to its end it would be 20 s


def test_an_endless_answer_is_not_kept(monkeypatch):
    """Of an answer that comes fast and never ends a part is read, and it is no completion."""
    monkeypatch.setattr(endpoint, "LONGEST_ANSWER", 1000)

    def endless():
        yield (HEAD + "\r\n").encode()
        while True:
            yield b"x" * 100

    with RawServer(endless) as url, pytest.raises(ValueError, match="not a chat completion"):
        asker(url, "tiny", 7, timeout=9)("?")


@pytest.mark.parametrize("flag, value, good", [
    ("timeout", 86_400, True), ("timeout", 1e-300, True), ("timeout", 86_401, False), ("timeout", 1e300, False), ("timeout", 0, False),
    ("timeout", float("inf"), False), ("timeout", float("nan"), False), ("timeout", -1, False), ("pause", 1e300, False),
    ("pause", float("nan"), False), ("pause", 0, True), ("requests_per_minute", 1e-300, False), ("requests_per_minute", 1e30, True),
    ("requests_per_minute", 0, True), ("requests_per_minute", 5e-324, False), ("requests_per_minute", 0.001, True),
])  # fmt: skip
def test_waits_that_flags_may_ask_for(flag, value, good):
    """What is taken can be waited for: neither sockets nor time.sleep() say that the number is too large."""
    if good:
        config = JudgeConfig(a=["a"], b=["b"], **{flag: value})
        with (
            Endpoint(chat("yes")) as server,
            contextlib.suppress(Unreachable),
        ):  # 1e-300 s are too short
            ask = asker(server.url, "tiny", 7, 0, config.timeout, config.requests_per_minute)
            assert ask("?") == "yes"
    else:
        with pytest.raises(InputError, match=f"--{flag}"):
            JudgeConfig(a=["a"], b=["b"], **{flag: value})


IN_A_MINUTE = formatdate(1e9 + 60)


@pytest.mark.parametrize(
    "value, seconds",
    [
        ("30", 30),
        ("0.5", 2),
        ("-3", 2),
        ("soon", 2),
        ("nan", 2),
        ("Mon, 01 Jan 0001 00:00:00 -0000", 2),
        ("", 2),
        (IN_A_MINUTE, 60),
    ],
)
def test_it_waits_as_long_as_it_is_told(clock, value, seconds):
    with Endpoint(
        (429, "", {"Retry-After": value}), (503, "", {"Retry-After": value}), chat("yes")
    ) as server:
        assert asker(server.url, "tiny", 7, pause=2)("?") == "yes"
    assert clock.slept == [
        seconds,
        4 if seconds == 2 or value == IN_A_MINUTE else seconds,
    ]  # by then its date has come


def test_it_does_not_wait_for_hours(clock):
    with (
        Endpoint((429, "", {"Retry-After": "3600"})) as server,
        pytest.raises(Unreachable, match="HTTP 429 .* for the next 3600 seconds"),
    ):
        asker(server.url, "tiny", 7)("?")
    assert not clock.slept and len(server.asked) == 1


@pytest.mark.parametrize(
    "status, error",
    [(401, Unreachable), (403, Unreachable), (404, Unreachable), (400, Rejected), (413, Rejected)],
)
def test_it_is_not_asked_again(clock, status, error):
    with (
        Endpoint((status, '{"error":\n"no"}')) as server,
        pytest.raises(Unreachable, match=f"HTTP {status}") as raised,
    ):
        asker(server.url, "tiny", 7)("?")
    assert ('{"error": "no"}' in str(raised.value)) == (error is Rejected)
    assert raised.type is error and len(server.asked) == 1 and not clock.slept


def test_the_key_is_shown_to_nobody_else(clock, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Endpoint(chat("yes")) as other, Endpoint((302, "", {"Location": other.url})) as server:
        with pytest.raises(Unreachable, match="HTTP 302"):
            asker(server.url, "tiny", 7)("?")
    assert not other.asked


SECRET = "sk-SECRET/123+x"  # with characters that URLs and JSON escape
ECHOES = {  # what a server makes of the key that it was sent, wherever it may put it
    "a bad question's body": lambda key: (400, f"bad request with {key}"),
    "beyond what is shown": lambda key: (400, "x" * 145 + key),
    "a body of blanks and half a key": lambda key: (400, " " * (1000 - len(key) // 2) + key),
    "a body of JSON": lambda key: (
        422,
        json.dumps({"error": f"bad key {key}"}).replace("/", "\\/"),
    ),
    "a body with a URL": lambda key: (413, f"see /login?key={quote(key, safe='')}"),
    "what is no completion": lambda key: (200, f"welcome {key}"),
    "no completion, beyond what is shown": lambda key: (200, "x" * 50 + key),
    "a refusal": lambda key: chat(None, refusal=f"I know {key}"),
    "an answer": lambda key: chat(f"your key is {key}"),
    "an answer in escapes": lambda key: (
        200,
        chat("KEY")[1].replace("KEY", "".join(f"\\u{ord(c):04x}" for c in key)),
    ),
    "an answer that quotes JSON": lambda key: chat("".join(f"\\u{ord(c):04X}" for c in key)),
}


def everything_said(url, clock):
    """An answer, or the error in its place, as text."""
    try:
        return asker(url, "tiny", 7)("?")
    except (ValueError, Unreachable) as e:
        return f"{e} {e!r}"


@pytest.mark.parametrize("echo", ECHOES)
def test_a_key_that_the_server_says_is_not_repeated(clock, monkeypatch, echo):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with Endpoint(ECHOES[echo](SECRET)) as server:
        said = everything_said(server.url, clock)
        assert server.asked[0][1]["Authorization"] == f"Bearer {SECRET}"  # it was sent as it is
    for part in ("SECRET", quote(SECRET, safe=""), "\\u0073"):
        assert part not in said and part.lower() not in said, said
    shown = echo not in (
        "beyond what is shown",
        "a body of blanks and half a key",
        "no completion, beyond what is shown",
    )
    assert not shown or "[OPENAI_API_KEY]" in said, said


@pytest.mark.parametrize(
    "status", ["400 {0}", "404 no {0}", "503 busy {0}", "302 {0}", "{0}", "999999 {0}"]
)
def test_a_key_in_the_status_line(clock, monkeypatch, status):
    """The reason phrase, or what http.client makes of a line that is none; a redirect's Location too."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with RawServer(
        f"HTTP/1.1 {status.format(SECRET)}\r\nLocation: /{SECRET}\r\nContent-Length: 0\r\n\r\n"
    ) as url:
        assert "SECRET" not in everything_said(url, clock)
    with RawServer(f"{SECRET} {status.format(SECRET)}\r\n\r\n") as url:
        assert "SECRET" not in everything_said(url, clock)


class RawServer:
    """A server on loopback that sends these very characters to everyone, or the parts that a function
    gives. As a context: its URL."""

    def __init__(self, text):
        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                headers = b""
                while not headers.endswith(b"\r\n\r\n"):
                    headers += self.rfile.readline()
                self.rfile.read(int(re.search(rb"(?i)content-length: (\d+)", headers)[1]))
                with contextlib.suppress(OSError):  # whoever asked may have gone
                    for part in text() if callable(text) else [text.encode()]:
                        self.wfile.write(part)

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True  # a slow answer is not waited for at the end
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.parametrize("stray", ["{0}\r", "{0}\n", "{0}\r\n", " \t{0} ", "\n{0}\n\n"])
def test_a_key_with_white_space_around_it(clock, monkeypatch, stray):
    """A key file with Windows line ends, for one: http.client would refuse the header, and quote it."""
    monkeypatch.setenv("OPENAI_API_KEY", stray.format(SECRET))
    with Endpoint(chat("yes")) as server:
        assert asker(server.url, "tiny", 7)("?") == "yes"
    assert server.asked[0][1]["Authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize(
    "inside", ["{0}\r\n{0}", "{0}\n{0}", "{0} {0}", "{0}\t{0}", "{0}\u00e9", "{0}\udcff", "{0}\x7f"]
)
def test_what_is_no_key(monkeypatch, inside):
    monkeypatch.setenv("OPENAI_API_KEY", inside.format(SECRET))
    with (
        Endpoint(chat("yes")) as server,
        pytest.raises(InputError, match="OPENAI_API_KEY is no key") as raised,
    ):
        asker(server.url, "tiny", 7)("?")
    assert "SECRET" not in str(raised.value) and not server.asked


@pytest.mark.parametrize("key", ["x", "1", "EMPTY"])
def test_a_placeholder_is_no_secret(clock, monkeypatch, key):
    """Local servers take any key; an answer that holds such a word is left as it is."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with Endpoint(chat(f"Answer: {key}")) as server:
        assert asker(server.url, "tiny", 7)("?") == f"Answer: {key}"


SECRET_URLS = ["http://user:SECRET@127.0.0.1:9/v1", "http://SECRET@127.0.0.1:9/v1", "http://127.0.0.1:9/v1?key=SECRET", "HTTPS://u:SECRET@x",
               "http://127.0.0.1:9/v1#SECRET", "http:/u:SECRET@x/v1", " http://u:SECRET@[::1/v1", "http://x/sk-SECRET/123+x/v1"]  # fmt: skip


@pytest.mark.parametrize("url", SECRET_URLS)
def test_a_secret_in_a_url(monkeypatch, url):
    """Refused in words that do not quote it; a mistyped one is still known for a URL, and is not printed as the name of a folder."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert endpoint.is_endpoint(url)
    for refuse in (lambda: endpoint.check_endpoint("--judge", url), lambda: asker(url, "tiny", 7)):
        with pytest.raises(InputError, match="OPENAI_API_KEY") as raised:
            refuse()
        assert "SECRET" not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["http://a b/v1", "http://[::1/v1", "http://x:abc/v1", "http://" + "a" * 70 + ".x/v1"]
)
def test_what_is_no_url(clock, url):
    with pytest.raises(Unreachable):
        asker(url, "tiny", 7)("?")
    assert not clock.slept


def test_what_is_no_answer():
    bodies = [
        "",
        "[" * 100_000,
        '{"choices": ' * 100_000,
        "1" * 5000,
        "<html>",
        "[]",
        "3",
        '{"error": {"message": "busy"}}',
        '{"choices": []}',
        '{"choices": {"0": 1}}',
    ]
    choices = ("1", '{"text": "x"}', '{"message": "x"}', '{"message": ["content"]}')
    for body in (*bodies, *(f'{{"choices": [{choice}]}}' for choice in choices)):
        with pytest.raises(ValueError, match="not a chat completion"):
            endpoint.content_of(body)


def test_half_a_character_in_an_answer():
    """JSON may name a lone surrogate, which no terminal can print and no tokenizer read."""
    assert endpoint.content_of('{"choices": [{"message": {"content": "a\\ud800b"}}]}') == "a?b"


def test_refusals():
    for message in (
        {"content": None},
        {"content": None, "refusal": "No."},
        {"content": "1", "refusal": "No."},
    ):
        with pytest.raises(
            ValueError, match="a refusal" if "refusal" in message else "without text"
        ):
            endpoint.content_of(json.dumps({"choices": [{"message": message}]}))


def test_the_rate(clock):
    times = []
    with Endpoint(chat("yes")) as server:
        ask = asker(server.url, "tiny", 7, requests_per_minute=20)
        for _ in range(4):
            times.append(clock.now)
            ask("?")
        clock.now += 100  # nothing is saved up
        ask("?")
        start = clock.now
        ask("?")
    assert (
        times == [1e9, 1e9, 1e9 + 3, 1e9 + 6]
        and clock.slept == [3, 3, 3, 3]
        and clock.now - start == 3
    )


def test_threads_share_the_rate():
    begun, turn = [], endpoint.pacer(3000)  # one call every 20 ms
    start = time.monotonic()
    threads = [
        threading.Thread(
            target=lambda: [(turn(), begun.append(time.monotonic() - start)) for _ in range(4)]
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(t >= 0.02 * i - 1e-3 for i, t in enumerate(sorted(begun))) and len(begun) == 12


def test_answers_come_in_any_order():
    """Four at a time; what is wrong with one question stands in its place."""

    def reply(question):
        time.sleep(0.1)
        return {"3": (400, ""), "5": chat(None, refusal="No."), "6": (200, "{")}.get(
            question, chat(f"<{question}>")
        )

    with Endpoint(reply) as server:
        start = time.monotonic()
        found = dict(ask_all(asker(server.url, "tiny", 7), list("01234567"), parallel=4))
        assert time.monotonic() - start < 0.6  # one after the other: 0.8 s
    assert sorted(found) == list(range(8)) and all(found[i] == f"<{i}>" for i in (0, 1, 2, 4, 7))
    assert (
        isinstance(found[3], Rejected)
        and "refusal" in str(found[5])
        and "not a chat completion" in str(found[6])
    )


@pytest.mark.parametrize("parallel", [1, 3])
def test_one_that_is_down_is_left_alone(parallel):
    def reply(question):
        time.sleep(0 if question == "2" else 0.1)
        return (401, "") if question == "2" else chat(question)

    with Endpoint(reply) as server:
        found = []
        with pytest.raises(Unreachable, match="HTTP 401"):
            for item in ask_all(
                asker(server.url, "tiny", 7), [str(i) for i in range(50)], parallel
            ):
                found.append(item)
        assert sorted(found)[:2] == [(0, "0"), (1, "1")]  # what was under way has come in
        assert len(found) == len(server.asked) - 1 <= 2 + 2 * (parallel - 1)


def test_who_stops_listening_stops_the_questions():
    with Endpoint(lambda question: time.sleep(0.05) or chat(question)) as server:
        answers = ask_all(asker(server.url, "tiny", 7), [str(i) for i in range(50)])
        next(answers)
        answers.close()
        assert (
            len(server.asked) <= 3
        )  # the second was under way, the third may have begun meanwhile


# -------------------------------------------------------------------------------------------------------------------- a local model


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}w1 {{ m['content'] }} w2{% endfor %}"]
)
def test_a_local_model_takes_the_likeliest_token(template):
    torch.manual_seed(0)
    config = world.model_config()
    (
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.initializer_range,
    ) = 2, 32, 64, 0.3
    lm, tokenizer = AutoModelForCausalLM.from_config(config).eval(), word_tokenizer()
    tokenizer.chat_template = template
    questions = ["w5 w6 w7", "w8", "w9 " * 150, "w10 w11 w12 w13 w14 w15 w16", "w5"]
    expected = {}
    for i, question in enumerate(questions):
        text = f"w1 {question} w2" if template else question
        ids = torch.tensor([tokenizer(text).input_ids])
        if i != 2:
            best = lm.generate(
                ids,
                do_sample=False,
                max_new_tokens=6,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=0,
            )
            expected[i] = tokenizer.decode(best[0, ids.shape[1] :], skip_special_tokens=True)
    for batch_size in (1, 3):
        found = dict(ask_locally(Policy(lm, value_head=False), tokenizer, questions, 6, batch_size))
        assert "longer than the model's context" in str(found.pop(2)) and found == expected
    assert len(set(expected.values())) == 4
