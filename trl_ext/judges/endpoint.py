"""
A judge behind an HTTP endpoint: one client for everything that asks a language model which of two responses is better.
"""

import json
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Annotated, Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from .._checks import NOT_EMPTY, at_least, between, check_value
from .._secrets import without_secrets
from .callables import Judge, code_of
from .replies import parse_verdict
from .templates import fields_of, fill, sections_of
from .verdicts import IndexedVerdict, as_text, normalize_verdict


logger = logging.getLogger(__name__)

JUDGE_TEMPLATE = """\
Below are a request and two responses to it. Decide which response serves the person who asked better. Neither the \
order of the responses nor their length is a merit.

### Request
{prompt}

### Response A
{completion_a}

### Response B
{completion_b}

### Verdict
Reply with a single letter: A if response A is better, B if response B is better, T if they are equally good."""

# A chat completion is a few kilobytes; a judge that reasons may write some hundred.
LARGEST_REPLY = 4 * 2**20
LONGEST_PAUSE = 60.0
LONGEST_WAIT = 1e6  # seconds; Python waits for no more than some centuries
LONGEST_RETRY_AFTER = 600.0


class _CalledOff(Exception):
    """A question that need not be asked anymore, since another one has failed."""


class _RequestFailed(Exception):
    """
    A request without a usable answer. The message holds nothing of the request.

    Args:
        problem (`str`): What went wrong.
        wait (`float`, *optional*): Minimum delay before a repetition; `None` if repeating is pointless.
    """

    def __init__(self, problem: str, wait: float | None = 0.0):
        super().__init__(problem)
        self.wait = wait


class _Retries(Retry):
    """
    urllib3's policy of repetitions, with a pause before the first one too. `Retry-After` may be a fraction of a
    second, and a value that means nothing is ignored.
    """

    def get_backoff_time(self) -> float:
        # A large exponent would overflow; the pause has reached its limit long before.
        return min(self.backoff_factor * 2 ** min(len(self.history) - 1, 30), self.backoff_max)

    def parse_retry_after(self, retry_after: str) -> float:
        try:
            return min(max(0.0, float(retry_after)), LONGEST_RETRY_AFTER)
        except ValueError:
            pass
        try:
            return min(super().parse_retry_after(retry_after), LONGEST_RETRY_AFTER)
        except (InvalidHeader, ValueError, TypeError, OverflowError):
            return 0.0


class _CuttableAdapter(HTTPAdapter):
    """
    An adapter whose connections can be shut from another thread. The timeout of requests limits the silence between
    two bytes only, so a server that sends one now and then would hold a request as long as it likes.
    """

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self._is_cut = False
        super().__init__()

    def get_connection_with_tls_context(self, *args, **kwargs):
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        connection_class = pool.ConnectionCls

        def make(*arguments, **options):
            connection = connection_class(*arguments, **options)
            connect = connection.connect

            def remember():
                connect()
                self._sockets.append(connection.sock)
                if self._is_cut:
                    self.cut()

            connection.connect = remember
            return connection

        pool.ConnectionCls = make
        return pool

    def cut(self) -> None:
        """Shuts all connections, those made from now on too."""
        self._is_cut = True
        for each in self._sockets:
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # closed already


class EndpointJudge(Judge):
    """
    A judge that asks a language model behind an OpenAI-compatible endpoint (`POST {base_url}/chat/completions`): a
    provider's, or a local vLLM, llama.cpp or TGI server.

    A win rate holds for one judge only: fix the model's snapshot, and report the template and the settings with the
    numbers ([`describe`] returns them).

    Args:
        model (`str`):
            Name of the model, as the endpoint knows it.
        base_url (`str`, *optional*, defaults to `"https://api.openai.com/v1"`):
            The endpoint.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable with the key. The key is read when a request is made, sent to this endpoint only
            (redirects are not followed), and never logged or written, not even where a reply repeats it. If the
            variable is unset, no key is sent.
        template (`str`, *optional*):
            The question, with the fields `{prompt}`, `{completion_a}` and `{completion_b}` and, if needed, names of
            columns of the prompts' dataset. `{{name}}` is the text `{name}`. A line of an inserted text that imitates
            one of the template's own lines is shown as a quotation, so that a completion cannot forge a section.
        parse (`Callable[[str], float | None]`, *optional*, defaults to [`parse_verdict`]):
            Returns the verdict of a reply, or `None` if it has none: the question is then asked again, `max_retries`
            times, after which the pair has no verdict.
        temperature (`float`, *optional*, defaults to `0.0`), max_tokens (`int`, *optional*, defaults to `8`):
            The judge's sampling; `None` leaves a field out of the request, for models that refuse it. A judge that
            reasons before it answers needs more tokens, or to be told not to, with `extra_body`.
        timeout (`float`, *optional*, defaults to `60.0`):
            Seconds that one request may take in all, however the server spends them.
        max_retries (`int`, *optional*, defaults to `4`):
            How often a request is repeated after a timeout, a lost connection, an answer that is no chat completion,
            or a status of 408, 409, 429 or 5xx, with pauses that double up to a minute, or as long as `Retry-After`
            says (seconds or a date), up to ten minutes.
        retry_delay (`float`, *optional*, defaults to `1.0`):
            Seconds before the first repetition.
        concurrency (`int`, *optional*, defaults to `8`):
            Requests under way at once.
        extra_body (`dict`, *optional*):
            Further fields of the request, such as `{"seed": 0}`, `{"max_completion_tokens": 2048}`, or, for Qwen3
            behind vLLM, `{"chat_template_kwargs": {"enable_thinking": False}}`.

    Raises:
        [`JudgeError`]: If the endpoint refuses a request, or does not answer after all repetitions. An answer of more
            than 4 MiB is refused.
    """

    is_free = False

    def __init__(
        self,
        model: str,
        base_url: str = "https://api.openai.com/v1",
        *,
        api_key_env: str | None = "OPENAI_API_KEY",
        template: str = JUDGE_TEMPLATE,
        parse: Callable[[str], float | None] | None = None,
        temperature: float | None = 0.0,
        max_tokens: int | None = 8,
        timeout: float = 60.0,
        max_retries: int = 4,
        retry_delay: float = 1.0,
        concurrency: int = 8,
        extra_body: dict | None = None,
    ):
        parts = urlsplit(base_url)
        # Checked first, since the other messages and `describe` show the address.
        if "@" in (parts.netloc or parts.path) or "?" in base_url or "#" in base_url:
            raise ValueError(
                "`base_url` holds a user name or password, a query or a fragment, where keys are, and it goes into "
                "reports. Put the key into a variable, see `api_key_env`, and other fields of a request into "
                "`extra_body`."
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"`base_url` must be an http or https address, got {base_url!r}.")
        missing = [f"{{{field}}}" for field in ("completion_a", "completion_b") if field not in fields_of(template)]
        if missing:
            raise ValueError(f"`template` lacks {' and '.join(missing)}: the judge would not see what it compares.")
        for name, value, kind in (
            ("temperature", temperature, Annotated[float | None, at_least(0)]),
            ("max_tokens", max_tokens, Annotated[int | None, at_least(1)]),
            ("timeout", timeout, Annotated[float, between(0, LONGEST_WAIT, "(]")]),
            ("max_retries", max_retries, Annotated[int, at_least(0)]),
            ("retry_delay", retry_delay, Annotated[float, between(0, LONGEST_WAIT)]),
            ("concurrency", concurrency, Annotated[int, between(1, 1024)]),
            ("extra_body", extra_body, dict | None),
            ("api_key_env", api_key_env, Annotated[str | None, NOT_EMPTY]),
        ):
            check_value(name, value, kind)
        self.model, self.base_url, self.api_key_env = model, base_url.rstrip("/"), api_key_env
        self.template, self.parse = template, parse or parse_verdict
        self.temperature, self.max_tokens, self.extra_body = temperature, max_tokens, dict(extra_body or {})
        self.timeout, self.max_retries, self.retry_delay = timeout, max_retries, retry_delay
        self.concurrency = concurrency
        self.name = f"{model} at {parts.netloc}"
        self._has_warned = False

    def describe(self):
        names = ("model", "base_url", "template", "temperature", "max_tokens", "extra_body")
        settings = {name: without_secrets(name, getattr(self, name), "<HIDDEN>") for name in names}
        return {**super().describe(), **settings}

    def identity(self):
        return {**self.describe(), "parse": code_of(self.parse)}

    def taken_columns(self, columns):
        return {name: columns[name] for name in self.needed_columns() & columns.keys()}

    def __call__(self, prompts, completions_a, completions_b, **columns) -> list[float | None]:
        verdicts: list[float | None] = [None] * len(prompts)
        for index, verdict in self._answers(self._questions(prompts, completions_a, completions_b, columns)):
            verdicts[index] = verdict
        return verdicts

    def stream(self, prompts, completions_a, completions_b, **columns) -> Iterator[IndexedVerdict]:
        return self._answers(self._questions(prompts, completions_a, completions_b, columns))

    def needed_columns(self):
        return fields_of(self.template) - {"prompt", "completion_a", "completion_b"}

    def _questions(self, prompts, completions_a, completions_b, columns: dict) -> list[str]:
        shown = {"prompt": prompts, "completion_a": completions_a, "completion_b": completions_b}
        unknown = sorted(fields_of(self.template) - {*shown, *columns})
        if unknown:
            raise self._error(
                f"`template` of the judge {self.name} has the field {{{unknown[0]}}}, and there is no such column "
                f"(columns: {', '.join(columns) or 'none'}). Name one that there is; {{{{{unknown[0]}}}}} is the text "
                "in braces itself."
            )
        questions = []
        sections = sections_of(self.template)
        for i, row in enumerate(zip(prompts, completions_a, completions_b, strict=True)):
            try:
                texts = {name: as_text(value) for name, value in zip(shown, row, strict=True)}
            except ValueError as error:
                raise self._error(f"The judge {self.name} cannot be shown pair {i}. {error}") from None
            texts = {name: str(values[i]) for name, values in columns.items()} | texts
            questions.append(fill(self.template, texts, sections))
        return questions

    def _answers(self, questions: list[str]) -> "_Answers":
        return _Answers(self._ask, questions, self.concurrency)

    def _ask(self, question: str, stop: threading.Event) -> float | None:
        """The verdict on one question, asked again as `max_retries` allows."""
        limits = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            **{name: value for name, value in limits.items() if value is not None},
            **self.extra_body,
        }
        retries = _Retries(total=None, backoff_factor=self.retry_delay, backoff_max=LONGEST_PAUSE)
        reply = ""
        for attempt in range(self.max_retries + 1):
            if stop.is_set():
                raise _CalledOff
            try:
                reply = self._request(body)
                verdict = self._parse(reply)
            except _RequestFailed as failed:
                retries = retries.increment(error=failed)
                if failed.wait is None or attempt == self.max_retries:
                    stop.set()
                    raise self._error(
                        f"The judge {self.name} did not answer after {attempt + 1} request(s): {failed}."
                    ) from None
                stop.wait(max(retries.get_backoff_time(), failed.wait))
                continue
            if verdict is not None:
                return verdict
        self._warn_of_silence(reply)
        return None

    def _parse(self, reply: str) -> float | None:
        try:
            return normalize_verdict(self.parse(reply))
        except Exception as error:  # its text may hold the reply's, and that the key
            raise _RequestFailed(f"`parse` cannot read its reply ({type(error).__name__})") from None

    def _warn_of_silence(self, reply: str) -> None:
        """Warns once: a judge without verdicts is most often one that is cut off while it reasons."""
        if not self._has_warned:
            self._has_warned = True
            shown = "a reply that repeats the key" if _repeats(self._key(), reply) else repr(reply[:80])
            logger.warning(
                "The judge %s gave no verdict, after %d request(s), but %s. Such pairs are left out. If it reasons "
                "before it answers, raise `max_tokens=%s`, or turn that off with `extra_body`.",
                *(self.name, self.max_retries + 1, shown, self.max_tokens),
            )

    def _key(self) -> str:
        return (os.environ.get(self.api_key_env) or "").strip() if self.api_key_env else ""

    def _request(self, body: dict) -> str:
        """
        Sends one request and returns the reply's text, within `timeout` seconds whatever the server does.

        Raises:
            [`_RequestFailed`]: If there is no usable answer.
        """
        key = self._key()
        if not key.isascii() or not key.isprintable():  # the error of a client that cannot send it would show it
            raise _RequestFailed(
                f"the variable {self.api_key_env} holds what no key does: other than printable ASCII", None
            )
        adapter = _CuttableAdapter()
        outcome: queue.Queue[tuple[str, None] | tuple[None, BaseException]] = queue.Queue()

        def send():
            try:
                outcome.put((self._send(body, key, adapter), None))
            except BaseException as error:
                outcome.put((None, error))

        threading.Thread(target=send, daemon=True).start()
        try:
            reply, error = outcome.get(timeout=self.timeout)
        except queue.Empty:
            adapter.cut()
            reply, error = None, requests.Timeout()
        if reply is not None:
            return reply
        if isinstance(error, _RequestFailed):
            raise error
        if isinstance(error, requests.Timeout):
            raise _RequestFailed(f"no answer within {self.timeout} s")
        if isinstance(error, requests.RequestException):
            raise _RequestFailed(f"no connection ({type(error).__name__})")
        raise _RequestFailed(f"the request failed ({type(error).__name__})", None)

    def _send(self, body: dict, key: str, adapter: HTTPAdapter) -> str:
        def authorize(request):  # as `auth`, it also keeps requests from adding what a ~/.netrc says
            if key:
                request.headers["Authorization"] = f"Bearer {key}"
            return request

        with requests.Session() as session:
            session.mount("http://", adapter)
            session.mount("https://", adapter)
            response = session.post(
                f"{self.base_url}/chat/completions",
                json=body,
                auth=authorize,
                timeout=self.timeout,
                allow_redirects=False,
                stream=True,
            )
            with response:
                self._check_status(response)
                content = bytearray()
                for chunk in response.iter_content(2**16):
                    content += chunk
                    if len(content) > LARGEST_REPLY:
                        raise _RequestFailed(f"its answer has more than {LARGEST_REPLY // 2**20} MiB", None)
        try:
            reply = json.loads(bytes(content))["choices"][0]["message"]["content"] or ""
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            reply = None
        if not isinstance(reply, str):
            raise _RequestFailed("its answer is not a chat completion")
        return reply

    def _check_status(self, response: requests.Response) -> None:
        status = response.status_code
        if status == 200:
            return
        hints = {
            400: "(some models refuse `temperature` or `max_tokens`: set them to `None`; `extra_body` adds others)",
            401: f"the key in the variable {self.api_key_env} is missing or wrong",
            403: f"the key in the variable {self.api_key_env} may not do this",
            404: "no such address or model",
        }
        hint = "a redirect, which is not followed" if 300 <= status < 400 else hints.get(status, "")
        passes = status in (408, 409, 429) or status >= 500
        wait = _Retries().parse_retry_after(response.headers.get("Retry-After", "")) if passes else None
        raise _RequestFailed(f"HTTP {status} {hint}".rstrip(), wait)


class _Answers(Iterator[IndexedVerdict]):
    """
    Asks several questions at once and gives each verdict as soon as it is there. When a question fails, those not sent
    yet are called off; those under way, which are paid for, are waited for and given before the error is raised.

    An exception in the caller's thread, such as that of Ctrl-C, loses nothing: iteration can go on.

    Args:
        ask (`Callable`): Gives the verdict on a question; also takes an event that says when to stop.
        questions (`list[str]`): The questions.
        concurrency (`int`): How many are asked at once.
    """

    def __init__(self, ask: Callable[[str, threading.Event], float | None], questions: list[str], concurrency: int):
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._pool = ThreadPoolExecutor(concurrency)
        self._indices = {self._pool.submit(ask, question, self._stop): i for i, question in enumerate(questions)}
        self._completed: Iterator[Future] | None = None

    def call_off(self) -> None:
        """Sends no more questions. Iteration goes on with the answers to those under way. From any thread."""
        self._stop.set()
        for future in list(self._indices):
            future.cancel()

    def close(self) -> None:
        """Sends no more questions and waits for those under way, whose answers are dropped."""
        self.call_off()
        self._indices.clear()
        self._pool.shutdown()

    def __next__(self) -> IndexedVerdict:
        while self._indices:
            self._completed = self._completed or as_completed(list(self._indices))
            try:
                future = next(self._completed)
            except BaseException:
                self._completed = None
                raise
            error = None if future.cancelled() else future.exception()
            verdict = None if error is not None or future.cancelled() else future.result()
            index = self._indices.pop(future)
            if error is not None and not isinstance(error, _CalledOff):
                self._failure = self._failure or error
                self.call_off()
            elif error is None and not future.cancelled():
                return IndexedVerdict(index, verdict)
        self._pool.shutdown(wait=False)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure from None
        raise StopIteration

    def __del__(self):  # the caller may have stopped reading
        self.call_off()
        self._pool.shutdown(wait=False)


def _repeats(key: str, text: str) -> bool:
    """Whether a text holds the key, or eight characters in a row of it."""
    text, size = text.lower(), min(len(key), 8)
    return bool(key) and any(key[i : i + size].lower() in text for i in range(len(key) - size + 1))
