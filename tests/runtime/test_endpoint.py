"""nanorlhf.runtime.endpoint against a real HTTP server on loopback, on its good and its bad days.

The last part compares a local model's answers with those of Hugging Face's generate().
"""

import contextlib
import json
import os
import re
import signal
import socketserver
import threading
import time
from email.utils import formatdate
from urllib.parse import quote

import pytest
import torch
from support import Endpoint, chat, fork, join, wait_for
from tiny_models import V, word_tokenizer
from transformers import AutoModelForCausalLM

from nanorlhf import world
from nanorlhf.errors import InputError
from nanorlhf.evals.win_rates import JudgeConfig
from nanorlhf.models import Policy
from nanorlhf.rollout import ask_locally
from nanorlhf.runtime import cli, endpoint
from nanorlhf.runtime.endpoint import Rejected, Unreachable, ask_all, asker


def ask(url, question="?", **settings):
    """Ask one question, and return the answer."""
    return asker(url, "tiny", 7, **settings)(question)


class Clock:
    """In the place of the module's `time`: nobody waits, but the time is told as if."""

    def __init__(self):
        self.now = 1e9
        self.slept = []

    def time(self):
        return self.now

    monotonic = time

    def sleep(self, seconds):
        self.now += seconds
        if seconds > 0:
            self.slept.append(seconds)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(endpoint, "time", Clock())
    return endpoint.time


def receive_question(stream):
    """Read one request up to its end: its headers, and as many bytes as they say."""
    headers = b""
    while not headers.endswith(b"\r\n\r\n"):
        headers += stream.readline()
    length = re.search(rb"(?i)content-length: (\d+)", headers)[1]
    stream.read(int(length))


class RawServer:
    """A server on loopback that sends exactly the bytes that parts() gives.

    As a context it is its URL.
    """

    def __init__(self, parts):
        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                receive_question(self.rfile)
                # Whoever asked may have gone.
                with contextlib.suppress(OSError):
                    for part in parts():
                        self.wfile.write(part)

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        # A slow answer is not waited for at the end.
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        _, port = self.server.server_address
        return f"http://127.0.0.1:{port}/v1"

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()


def raw_server(text):
    """A RawServer that sends this text in one piece."""
    return RawServer(lambda: [text.encode()])


# ------------------------------------------------------------------------------------- the question


def test_what_is_sent(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Endpoint(chat("yes")) as server:
        # A slash at the URL's end does not count.
        assert ask(server.url + "/", "Is it \u00fcber?\n") == "yes"

    ((path, headers, body),) = server.asked
    assert path == "/v1/chat/completions"
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Is it \u00fcber?\n"}],
        "temperature": 0,
        "max_tokens": 7,
    }


def test_the_key_is_sent_in_a_header(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Endpoint(chat("yes")) as server:
        ask(server.url)
    ((_, headers, _),) = server.asked
    assert headers["Authorization"] == "Bearer secret"


# ---------------------------------------------------------------------------------- asking it again

CUT_OFF = (200, '{"choices": [', {"Content-Length": "5000"})
TEMPORARY = pytest.mark.parametrize(
    "bad",
    [
        pytest.param((429, ""), id="too many requests"),
        pytest.param((500, "oops"), id="an error of the server"),
        pytest.param((503, ""), id="busy"),
        pytest.param((408, ""), id="timed out there"),
        pytest.param(0, id="hangs up"),
        pytest.param(0.5, id="silent for longer than the timeout", marks=pytest.mark.slow),
        pytest.param(CUT_OFF, id="hangs up in the middle"),
    ],
)


@TEMPORARY
def test_a_bad_answer_is_asked_for_again(clock, bad):
    with Endpoint(bad, bad, bad, chat("yes")) as server:
        assert ask(server.url, pause=2, timeout=0.3) == "yes"
        assert clock.slept == [2, 4, 8]
        assert len(server.asked) == 4


@TEMPORARY
def test_after_four_bad_answers_it_is_unreachable(clock, bad):
    with Endpoint(bad) as server:
        with pytest.raises(Unreachable, match=", 4 times"):
            ask(server.url, pause=2, timeout=0.3)
    assert clock.slept == [2, 4, 8]
    assert len(server.asked) == 4


HEAD = "HTTP/1.1 200 OK\r\n"


# Where a server becomes slow: before a single line is whole, between headers, in a body.
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("HTTP/1.1 200 " + "x" * 1000, id="the status line"),
        pytest.param(HEAD + "X: " + "x" * 1000, id="a header", marks=pytest.mark.slow),
        pytest.param(HEAD + "X: y\r\n" * 1000, id="many headers", marks=pytest.mark.slow),
        pytest.param(
            HEAD + "Content-Length: 1000\r\n\r\n" + "x" * 1000,
            id="the body",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            HEAD + "\r\n" + "x" * 1000, id="a body without a length", marks=pytest.mark.slow
        ),
        pytest.param(
            "HTTP/1.1 400 no\r\n\r\n" + "x" * 1000,
            id="the body of an error",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "HTTP/1.1 100 Continue\r\n\r\n" * 1000,
            id="many provisional answers",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_slow_answer_has_a_deadline_as_a_whole(text):
    """A server that goes on sending holds nobody for longer than TRIES timeouts.

    It sends a byte every 20 ms, and so is never silent for as long as the timeout.
    """

    def drip():
        for character in text:
            yield character.encode()
            time.sleep(0.02)

    start = time.monotonic()
    with RawServer(drip) as url:
        with pytest.raises(Unreachable, match="timed out, 4 times"):
            ask(url, pause=0, timeout=0.1)
    # Dripped to its end the answer would take 20 s.
    assert time.monotonic() - start < 2


def test_of_an_endless_answer_a_part_is_read(monkeypatch):
    """It comes fast and never ends; its beginning is no completion."""
    monkeypatch.setattr(endpoint, "LONGEST_ANSWER", 1000)

    def endless():
        yield (HEAD + "\r\n").encode()
        while True:
            yield b"x" * 100

    with RawServer(endless) as url:
        with pytest.raises(ValueError, match="not a chat completion"):
            ask(url, timeout=9)


def judge_config(**flags):
    return JudgeConfig(a=["a"], b=["b"], **flags)


def ask_as_told(url, config):
    rate = config.requests_per_minute
    return ask(url, pause=0, timeout=config.timeout, requests_per_minute=rate)


@pytest.mark.parametrize(
    "flag, value",
    [
        ("timeout", 86_400),
        ("pause", 0),
        ("requests_per_minute", 1e30),
        ("requests_per_minute", 0),
        ("requests_per_minute", 0.001),
    ],
)
def test_a_wait_that_a_flag_may_ask_for(flag, value):
    """It can be waited for: neither sockets nor time.sleep() say that the number is too large."""
    config = judge_config(**{flag: value})
    with Endpoint(chat("yes")) as server:
        assert ask_as_told(server.url, config) == "yes"


def test_a_timeout_may_be_too_short_for_any_answer():
    config = judge_config(timeout=1e-300)
    with Endpoint(chat("yes")) as server, contextlib.suppress(Unreachable):
        assert ask_as_told(server.url, config) == "yes"


@pytest.mark.parametrize(
    "flag, value",
    [
        ("timeout", 86_401),
        ("timeout", 1e300),
        ("timeout", 0),
        ("timeout", float("inf")),
        ("timeout", float("nan")),
        ("timeout", -1),
        ("pause", 1e300),
        ("pause", float("nan")),
        ("requests_per_minute", 1e-300),
        ("requests_per_minute", 5e-324),
    ],
)
def test_a_wait_that_no_flag_may_ask_for(flag, value):
    with pytest.raises(InputError, match=f"--{flag}"):
        judge_config(**{flag: value})


@pytest.mark.parametrize(
    "value, slept",
    [
        ("30", [30, 30]),
        # Its own pauses of 2 and 4 seconds are longer.
        ("0.5", [2, 4]),
        # Not a number of seconds, and no date.
        ("-3", [2, 4]),
        ("soon", [2, 4]),
        ("nan", [2, 4]),
        ("Mon, 01 Jan 0001 00:00:00 -0000", [2, 4]),
        ("", [2, 4]),
        # A minute from now. The second time that date has come.
        (formatdate(1e9 + 60), [60, 4]),
    ],
)
def test_it_waits_as_long_as_it_is_told(clock, value, slept):
    told = {"Retry-After": value}
    with Endpoint((429, "", told), (503, "", told), chat("yes")) as server:
        assert ask(server.url, pause=2) == "yes"
    assert clock.slept == slept


def test_it_does_not_wait_for_hours(clock):
    with Endpoint((429, "", {"Retry-After": "3600"})) as server:
        with pytest.raises(Unreachable, match="HTTP 429 .* for the next 3600 seconds"):
            ask(server.url)
    assert not clock.slept
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "status, error, shows_body",
    [
        # There is no use in asking this endpoint anything.
        (401, Unreachable, False),
        (403, Unreachable, False),
        (404, Unreachable, False),
        # It will not take this question, and says why.
        (400, Rejected, True),
        (413, Rejected, True),
    ],
)
def test_after_a_final_no_it_is_not_asked_again(clock, status, error, shows_body):
    with Endpoint((status, '{"error":\n"no"}')) as server:
        with pytest.raises(Unreachable, match=f"HTTP {status}") as raised:
            ask(server.url)
    assert raised.type is error
    assert ('{"error": "no"}' in str(raised.value)) == shows_body
    assert len(server.asked) == 1
    assert not clock.slept


# -------------------------------------------------------------------------------------- the secrets

SECRET = "sk-SECRET/123+x"  # with characters that URLs and JSON escape


def test_the_key_is_shown_to_nobody_else(clock, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Endpoint(chat("yes")) as other, Endpoint((302, "", {"Location": other.url})) as server:
        with pytest.raises(Unreachable, match="HTTP 302"):
            ask(server.url)
    assert not other.asked


def escape_as_json(text, digits):
    """Each character as its code in hexadecimal digits, "04x" or "04X": s -> \\u0073."""
    return "".join(f"\\u{ord(character):{digits}}" for character in text)


# Each of these is what a server makes of the key that it was sent: key -> reply.


def in_the_body_of_an_error(key):
    return 400, f"bad request with {key}"


def beyond_what_is_shown(key):
    # The first 150 characters are shown: they would end within the key.
    return 400, "x" * 140 + key


def after_many_blanks(key):
    # Blanks are not shown: the 1000th character is inside the key.
    blanks = " " * (1000 - len(key) // 2)
    return 400, blanks + key


def in_a_body_of_json(key):
    body = json.dumps({"error": f"bad key {key}"})
    return 422, body.replace("/", "\\/")


def in_a_url(key):
    return 413, f"see /login?key={quote(key, safe='')}"


def in_what_is_no_completion(key):
    return 200, f"welcome {key}"


def in_no_completion_beyond_what_is_shown(key):
    # The first 60 characters are shown: they would end within the key.
    return 200, "x" * 50 + key


def in_a_refusal(key):
    return chat(None, refusal=f"I know {key}")


def in_an_answer(key):
    return chat(f"your key is {key}")


def in_an_answer_in_escapes(key):
    status, body = chat("KEY")
    return status, body.replace("KEY", escape_as_json(key, "04x"))


def in_an_answer_that_quotes_json(key):
    return chat(escape_as_json(key, "04X"))


def everything_said(url):
    """An answer, or the error in its place, as text."""
    try:
        return ask(url)
    except (ValueError, Unreachable) as e:
        return f"{e} {e!r}"


@pytest.mark.parametrize(
    "echo, is_shown",
    [
        (in_the_body_of_an_error, True),
        (beyond_what_is_shown, False),
        (after_many_blanks, True),
        (in_a_body_of_json, True),
        (in_a_url, True),
        (in_what_is_no_completion, True),
        (in_no_completion_beyond_what_is_shown, False),
        (in_a_refusal, True),
        (in_an_answer, True),
        (in_an_answer_in_escapes, True),
        (in_an_answer_that_quotes_json, True),
    ],
)
def test_a_key_that_the_server_says_is_not_repeated(clock, monkeypatch, echo, is_shown):
    """is_shown: where the key stood is shown, with the variable's name in its place."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with Endpoint(echo(SECRET)) as server:
        said = everything_said(server.url)

    # It was sent as it is.
    ((_, headers, _),) = server.asked
    assert headers["Authorization"] == f"Bearer {SECRET}"
    for part in ("SECRET", quote(SECRET, safe=""), "\\u0073"):
        assert part not in said
        assert part.lower() not in said
    if is_shown:
        assert "[OPENAI_API_KEY]" in said


ODD_STATUS = pytest.mark.parametrize(
    "status", ["400 {0}", "404 no {0}", "503 busy {0}", "302 {0}", "{0}", "999999 {0}"]
)


@ODD_STATUS
def test_a_key_in_the_reason_or_a_redirect(clock, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    first_line = f"HTTP/1.1 {status.format(SECRET)}\r\n"
    with raw_server(f"{first_line}Location: /{SECRET}\r\nContent-Length: 0\r\n\r\n") as url:
        assert "SECRET" not in everything_said(url)


@ODD_STATUS
def test_a_key_in_a_first_line_that_is_no_status_line(clock, monkeypatch, status):
    """http.client quotes such a line in its error."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with raw_server(f"{SECRET} {status.format(SECRET)}\r\n\r\n") as url:
        assert "SECRET" not in everything_said(url)


@pytest.mark.parametrize("stray", ["{0}\r", "{0}\n", "{0}\r\n", " \t{0} ", "\n{0}\n\n"])
def test_white_space_around_a_key_does_not_count(clock, monkeypatch, stray):
    """A key file with Windows line ends, say: http.client would refuse the header, and quote it."""
    monkeypatch.setenv("OPENAI_API_KEY", stray.format(SECRET))
    with Endpoint(chat("yes")) as server:
        assert ask(server.url) == "yes"
    ((_, headers, _),) = server.asked
    assert headers["Authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize(
    "inside", ["{0}\r\n{0}", "{0}\n{0}", "{0} {0}", "{0}\t{0}", "{0}\u00e9", "{0}\udcff", "{0}\x7f"]
)
def test_what_is_no_key_is_refused_and_not_quoted(monkeypatch, inside):
    monkeypatch.setenv("OPENAI_API_KEY", inside.format(SECRET))
    with Endpoint(chat("yes")) as server:
        with pytest.raises(InputError, match="OPENAI_API_KEY is no key") as raised:
            ask(server.url)
    assert "SECRET" not in str(raised.value)
    assert not server.asked


@pytest.mark.parametrize("key", ["x", "1", "EMPTY"])
def test_a_placeholder_is_no_secret(clock, monkeypatch, key):
    """Local servers take any key; an answer that holds such a word is left as it is."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with Endpoint(chat(f"Answer: {key}")) as server:
        assert ask(server.url) == f"Answer: {key}"


SECRET_URL = pytest.mark.parametrize(
    "url",
    [
        "http://user:SECRET@127.0.0.1:9/v1",
        "http://SECRET@127.0.0.1:9/v1",
        "http://127.0.0.1:9/v1?key=SECRET",
        "HTTPS://u:SECRET@x",
        "http://127.0.0.1:9/v1#SECRET",
        "http:/u:SECRET@x/v1",
        " http://u:SECRET@[::1/v1",
        "http://x/sk-SECRET/123+x/v1",
    ],
)


def check_is_not_quoted(raised):
    message = str(raised.value)
    assert "SECRET" not in message
    assert "\n" not in message


@SECRET_URL
def test_a_mistyped_url_is_no_folder_s_name(url):
    """It may hold a secret, so it must not be printed as the name of a missing folder."""
    assert endpoint.is_endpoint(url)


@SECRET_URL
def test_a_flag_with_a_secret_in_its_url_is_refused(monkeypatch, url):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with pytest.raises(InputError, match="OPENAI_API_KEY") as raised:
        endpoint.check_endpoint("--judge", url)
    check_is_not_quoted(raised)


@SECRET_URL
def test_a_secret_in_a_url_is_not_asked(monkeypatch, url):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with pytest.raises(InputError, match="OPENAI_API_KEY") as raised:
        asker(url, "tiny", 7)
    check_is_not_quoted(raised)


@pytest.mark.parametrize(
    "url",
    [
        "http://a b/v1",
        "http://[::1/v1",
        "http://x:abc/v1",
        pytest.param("http://" + "a" * 70 + ".x/v1", id="a host's name of 70 letters"),
    ],
)
def test_what_is_no_url_is_not_asked_again(clock, url):
    with pytest.raises(Unreachable):
        ask(url)
    assert not clock.slept


# --------------------------------------------------------------------------------------- the answer


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("", id="empty"),
        pytest.param("[" * 100_000, id="deep lists"),
        pytest.param('{"choices": ' * 100_000, id="deep objects"),
        pytest.param("1" * 5000, id="a number of 5000 digits"),
        "<html>",
        "[]",
        "3",
        '{"error": {"message": "busy"}}',
        '{"choices": []}',
        '{"choices": {"0": 1}}',
        '{"choices": [1]}',
        '{"choices": [{"text": "x"}]}',
        '{"choices": [{"message": "x"}]}',
        '{"choices": [{"message": ["content"]}]}',
    ],
)
def test_what_is_no_completion(body):
    with pytest.raises(ValueError, match="not a chat completion"):
        endpoint.content_of(body)


def test_half_a_character_in_an_answer():
    """JSON may name a lone surrogate, which no terminal can print and no tokenizer read."""
    body = '{"choices": [{"message": {"content": "a\\ud800b"}}]}'
    assert endpoint.content_of(body) == "a?b"


@pytest.mark.parametrize(
    "message, words",
    [
        ({"content": None}, "without text"),
        ({"content": None, "refusal": "No."}, "a refusal"),
        ({"content": "1", "refusal": "No."}, "a refusal"),
    ],
)
def test_a_refusal_is_no_answer(message, words):
    body = json.dumps({"choices": [{"message": message}]})
    with pytest.raises(ValueError, match=words):
        endpoint.content_of(body)


# -------------------------------------------------------------------------------- many questions


def test_questions_keep_to_the_rate(clock):
    times = []
    with Endpoint(chat("yes")) as server:
        ask_slowly = asker(server.url, "tiny", 7, requests_per_minute=20)
        for _ in range(4):
            times.append(clock.now)
            ask_slowly("?")
    # 20 a minute: one every 3 seconds. Each but the first waits for its turn.
    assert times == [1e9, 1e9, 1e9 + 3, 1e9 + 6]
    assert clock.slept == [3, 3, 3]


def test_a_pause_saves_up_no_questions(clock):
    with Endpoint(chat("yes")) as server:
        ask_slowly = asker(server.url, "tiny", 7, requests_per_minute=20)
        ask_slowly("?")
        clock.now += 100
        ask_slowly("?")
        start = clock.now
        ask_slowly("?")
    assert clock.now - start == 3
    assert clock.slept == [3]


def test_threads_share_the_rate():
    begun = []
    wait_for_turn = endpoint.pacer(3000)  # one call every 20 ms
    start = time.monotonic()

    def call_four_times():
        for _ in range(4):
            wait_for_turn()
            begun.append(time.monotonic() - start)

    threads = [threading.Thread(target=call_four_times) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(begun) == 12
    for i, seconds in enumerate(sorted(begun)):
        assert seconds >= 0.02 * i - 1e-3


def test_answers_come_in_any_order():
    """Four at a time; what is wrong with one question stands in its place."""
    odd_replies = {"3": (400, ""), "5": chat(None, refusal="No."), "6": (200, "{")}

    def reply(question):
        time.sleep(0.1)
        return odd_replies.get(question, chat(f"<{question}>"))

    with Endpoint(reply) as server:
        start = time.monotonic()
        found = dict(ask_all(asker(server.url, "tiny", 7), list("01234567"), parallel=4))
        seconds = time.monotonic() - start

    # One after the other they would take 0.8 s.
    assert seconds < 0.6
    assert sorted(found) == list(range(8))
    for i in (0, 1, 2, 4, 7):
        assert found[i] == f"<{i}>"
    assert isinstance(found[3], Rejected)
    assert "refusal" in str(found[5])
    assert "not a chat completion" in str(found[6])


@pytest.mark.parametrize("parallel", [1, 3])
def test_an_endpoint_that_is_down_is_left_alone(parallel):
    """The third question finds it down."""

    def reply(question):
        if question == "2":
            return 401, ""
        time.sleep(0.1)
        return chat(question)

    questions = [str(i) for i in range(50)]
    found = []
    with Endpoint(reply) as server:
        with pytest.raises(Unreachable, match="HTTP 401"):
            for item in ask_all(asker(server.url, "tiny", 7), questions, parallel):
                found.append(item)

    # What was under way has come in, and nothing was asked after it.
    assert sorted(found)[:2] == [(0, "0"), (1, "1")]
    assert len(found) == len(server.asked) - 1
    assert len(found) <= 2 + 2 * (parallel - 1)


def test_who_stops_listening_stops_the_questions():
    def reply(question):
        time.sleep(0.05)
        return chat(question)

    questions = [str(i) for i in range(50)]
    with Endpoint(reply) as server:
        answers = ask_all(asker(server.url, "tiny", 7), questions)
        next(answers)
        answers.close()
        # Nobody waits for the thread that asks. If it went on, it would ask four more in this time.
        time.sleep(0.2)
        # The second was under way, the third may have begun meanwhile.
        assert len(server.asked) <= 3


def ask_two(url):
    with cli.errors_in_one_line():
        list(ask_all(asker(url, "tiny", 7), ["?", "??"], parallel=2))


@pytest.mark.slow
def test_ctrl_c_while_an_endpoint_is_silent():
    """The threads that wait for it would do so for minutes, and ask again."""
    with Endpoint(600) as server:
        process = fork(ask_two, server.url)
        wait_for(lambda: len(server.asked) == 2)
        os.kill(process.pid, signal.SIGINT)
        join(process, code=130)


# ------------------------------------------------------------------------------------ a local model

TEMPLATE = "{% for m in messages %}w1 {{ m['content'] }} w2{% endfor %}"


def tiny_lm():
    torch.manual_seed(0)
    config = world.model_config()
    config.vocab_size = V  # one id for each word of word_tokenizer()
    config.num_hidden_layers = 2
    config.hidden_size = 32
    config.intermediate_size = 64
    config.initializer_range = 0.3
    return AutoModelForCausalLM.from_config(config).eval()


def answer_of_hugging_face(lm, tokenizer, text):
    """The likeliest tokens after a text, one text at a time."""
    ids = torch.tensor([tokenizer(text).input_ids])
    whole = lm.generate(
        ids,
        do_sample=False,
        max_new_tokens=6,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
    )
    answer_ids = whole[0, ids.shape[1] :]
    return tokenizer.decode(answer_ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "template, before, after", [(None, "", ""), (TEMPLATE, "w1 ", " w2")], ids=["plain", "chat"]
)
def test_a_local_model_takes_the_likeliest_token(template, before, after):
    lm = tiny_lm()
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    too_long = "w9 " * 150
    questions = ["w5 w6 w7", "w8", too_long, "w10 w11 w12 w13 w14 w15 w16", "w5"]
    expected = {}
    for i in (0, 1, 3, 4):
        text = before + questions[i] + after
        expected[i] = answer_of_hugging_face(lm, tokenizer, text)
    # Each question has an answer of its own.
    assert len(set(expected.values())) == 4

    policy = Policy(lm, value_head=False)
    for batch_size in (1, 3):
        found = dict(ask_locally(policy, tokenizer, questions, 6, batch_size))
        assert "longer than the model's context" in str(found.pop(2))
        assert found == expected
