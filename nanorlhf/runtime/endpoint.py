"""A chat model behind an OpenAI-compatible endpoint, which is asked questions.

POST <url>/chat/completions by the standard library alone; the key is the environment's
OPENAI_API_KEY. What is asked, and what becomes of the answers, is the callers' business
(explainer.py, win_rates.py). A local model is asked by rollout.ask_locally().

The key goes into one header and nowhere else. A URL is printed, stored in config.json and part of
what caches are named by, so one that holds a password or a query is refused. What a server says may
hold the key, so it passes through redact() before anyone sees it.
"""

import email.utils
import json
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import Future, TimeoutError
from http.client import HTTPException, IncompleteRead, InvalidURL

from ..errors import InputError, first_line

TRIES = 4  # of one question
LONGEST_PAUSE = 300  # seconds that an endpoint may ask for
LONGEST_ANSWER = 2**24  # bytes that are read of one
KEY = "OPENAI_API_KEY"  # the environment variable
# Characters of a secret. Less is a placeholder such as "x" or "EMPTY", which local servers take: it
# may be a part of any answer, which redact() must not change.
SHORTEST_KEY = 6


class Unreachable(Exception):
    """An endpoint that does not answer, or refuses to: it is no use asking it anything else."""


class Rejected(Unreachable):
    """It will not take this question (too long, filtered); others it may."""


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect becomes an HTTPError.

    Followed, it would show the key to another host, and turn the question into a GET.
    """

    def redirect_request(self, *args):
        return None


OPENER = urllib.request.build_opener(NoRedirects)


def is_endpoint(spec):
    """Whether a judge or explainer is named by a URL.

    A mistyped URL is one too: it may hold a key, so it must not be printed as a missing folder.
    """
    return spec.strip().lower().startswith(("http:", "https:"))


# -------------------------------------------------------------------------------------- the secrets


def read_key() -> str:
    """The environment's key, "" where there is none, without white space around it, a line end say.

    InputError, which does not quote the key: it holds what an HTTP header cannot.
    """
    key = os.environ.get(KEY, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise InputError(
            f"the environment variable {KEY} is no key: it holds white space or a character that "
            "is not ASCII"
        )
    return key


def check_endpoint(flag: str, url: str):
    """InputError, which does not quote the URL, where it holds a secret.

    A secret is a user name, a password, a query, or the key itself.
    """
    key = read_key()
    holds_key = len(key) >= SHORTEST_KEY and key in url
    if holds_key or any(mark in url for mark in "@?#"):
        raise InputError(
            f"{flag}: the endpoint's URL is stored with the results, so it must be a plain one, "
            "such as http://HOST/v1, without a user name, a password, a query or a key; "
            f"a key belongs in the environment variable {KEY}"
        )


def redact(text: str) -> str:
    """A text without the key, whether it is written as it is or escaped as in a URL or in JSON."""
    key = read_key()
    if len(key) < SHORTEST_KEY:
        return text
    # A server that quotes the key may escape any of its characters.
    pattern = ""
    for character in key:
        plain = re.escape(character)
        code = ord(character)
        # s, \s, %73 or \u0073
        pattern += rf"(?:\\?{plain}|%(?i:{code:02x})|\\u(?i:{code:04x}))"
    return re.sub(pattern, f"[{KEY}]", text)


# -------------------------------------------------------------------------------------- an endpoint


def asker(url, model, max_tokens, pause=1.0, timeout=60.0, requests_per_minute=0):
    """-> the function question -> answer, for any number of threads.

    Together they keep to the rate (0: as fast as it goes). A busy or silent endpoint is asked again
    after `pause` seconds, twice as many each time, or as many as its Retry-After names.
    The function raises ValueError: what came is no answer, or a refusal; Rejected: the question was
    refused; Unreachable: nothing came. InputError: the URL holds a secret, or the key is none.
    """
    check_endpoint("the endpoint", url)
    wait_for_turn = pacer(requests_per_minute)

    # The key is read from the environment for every question, and kept nowhere.
    def ask(question):
        address = url.rstrip("/") + "/chat/completions"
        headers = {"Content-Type": "application/json"}
        key = read_key()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        messages = [{"role": "user", "content": question}]
        fields = {"model": model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        body = json.dumps(fields).encode()
        # Every try waits for its turn, since the endpoint counts failed requests too.
        for attempt in range(TRIES):
            wait_for_turn()
            text, problem, seconds = post(address, body, headers, timeout)
            if not problem:
                return content_of(text)
            if attempt + 1 < TRIES:
                time.sleep(max(seconds, pause * 2**attempt))
        raise Unreachable(f"{problem}, {TRIES} times")

    return ask


def post(url, body, headers, timeout):
    """request(), with `timeout` for the whole of its answer."""
    answer = Future()

    def work():
        try:
            answer.set_result(request(url, body, headers, timeout))
        except BaseException as e:
            answer.set_exception(e)  # result() raises it again

    # A server that sends a byte now and then would hold its reader for ever. A daemon thread ends
    # with the program at the latest.
    threading.Thread(target=work, daemon=True).start()
    try:
        return answer.result(timeout)
    except TimeoutError:
        return "", "timed out", 0


def request(url, body, headers, timeout):
    """One request -> its text, what went wrong for now, the seconds that it asks to be left alone.

    `timeout` is for each read. What went wrong is redacted already, the text is not: content_of()
    reads it as JSON first.
    """
    try:
        http_request = urllib.request.Request(url, body, headers)
        with OPENER.open(http_request, timeout=timeout) as response:
            text = response.read(LONGEST_ANSWER)
            if response.length:  # bytes that are still to come: read(n) does not miss them
                raise IncompleteRead(text, response.length)
            return text.decode("utf-8", "replace"), "", 0
    # An error ends in one of three ways: the question is refused (Rejected), the endpoint is of no
    # use (Unreachable), or the problem may pass, and asker() tries again.
    except urllib.error.HTTPError as e:
        problem = redact(f"HTTP {e.code} {e.reason}")
        seconds = retry_after(e.headers.get("Retry-After", ""))
        if e.code in (400, 413, 422):
            raise Rejected(f"{problem} {read_reason(e)}".strip()) from None
        if e.code < 500 and e.code not in (408, 429):
            raise Unreachable(problem) from None
        if seconds > LONGEST_PAUSE:
            raise Unreachable(f"{problem}, and so for the next {seconds:.0f} seconds") from None
        return "", problem, seconds
    except (ValueError, InvalidURL) as e:
        raise Unreachable(redact(first_line(e))) from None  # not a URL
    except (OSError, HTTPException) as e:  # refused, unknown host, timed out, cut off
        return "", redact(first_line(getattr(e, "reason", e))), 0


def read_reason(error):
    """The beginning of what came with an HTTPError.

    It alone tells what is wrong with a question, or with the model's name.
    """
    try:
        text = error.read(LONGEST_ANSWER).decode("utf-8", "replace")
    except (OSError, HTTPException):
        return ""
    return " ".join(redact(text).split())[:150]  # redacted whole: half a key would not be found


def retry_after(value):
    """The header Retry-After, a number or a date (RFC 9110, 10.2.3), in seconds from now.

    0 for anything else.
    """
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        date = email.utils.parsedate_to_datetime(value)
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, OverflowError):  # also of a year that the system's clock cannot have
        return 0.0


def content_of(text):
    """The body of a chat completion -> what the model said, redacted.

    ValueError: it is no chat completion, or a refusal.
    """
    try:
        message = json.loads(text)["choices"][0]["message"]
        content = message["content"]
        refusal = message.get("refusal")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        beginning = " ".join(redact(text).split())[:60]
        raise ValueError(f"not a chat completion: {beginning!r}") from None
    if refusal:
        raise ValueError(f"a refusal: {redact(str(refusal))[:60]!r}")
    if not isinstance(content, str):
        raise ValueError("an answer without text: longer than what it may use?")
    # JSON may hold half a character (a lone surrogate), which cannot be printed.
    return redact(content.encode("utf-8", "replace").decode())


def pacer(per_minute):
    """-> a function that waits for its turn: one call every 60 / per_minute seconds; 0: at once"""
    lock = threading.Lock()
    free_at = time.monotonic()
    interval = 0.0
    if per_minute:
        interval = 60 / per_minute

    def wait_for_turn():
        nonlocal free_at
        # A thread takes its turn under the lock. It waits outside, so others can take theirs.
        with lock:
            mine = max(free_at, time.monotonic())
            free_at = mine + interval
        time.sleep(max(0.0, mine - time.monotonic()))

    return wait_for_turn


def ask_all(ask, questions, parallel=1):
    """Questions, so many at a time -> (i, answer) as they come.

    A ValueError or Rejected may stand in the place of an answer. Once the endpoint is down nothing
    more is asked; Unreachable is raised when all that was under way has come in. When the caller
    stops listening nothing more is asked either, and nobody waits for what is under way.
    """
    # Set when a question finds the endpoint down, and when the caller stops listening.
    stop = threading.Event()
    waiting = queue.SimpleQueue()  # (i, question)
    for item in enumerate(questions):
        waiting.put(item)
    answers = queue.SimpleQueue()  # (i, answer), and (None, what ended it) of each thread

    def ask_one(question):
        try:
            return ask(question)
        except (ValueError, Rejected) as e:
            return e

    def work():
        ended_by = None
        try:
            while not stop.is_set():
                i, question = waiting.get_nowait()
                answers.put((i, ask_one(question)))
        except queue.Empty:
            pass
        except Exception as e:
            stop.set()
            ended_by = e
        answers.put((None, ended_by))

    # Daemon threads end with the program: after Ctrl-C nobody waits for an endpoint that is silent.
    for _ in range(parallel):
        threading.Thread(target=work, daemon=True).start()
    error = None
    n_ended = 0
    try:
        while n_ended < parallel:
            i, answer = answers.get()
            # Answers that are under way when one fails are paid for, so they are still handed on.
            if i is not None:
                yield i, answer
                continue
            n_ended += 1
            error = error or answer
    finally:
        stop.set()
    if error:
        raise error
