"""A judge behind an HTTP endpoint: one client for whoever asks a language model which of two responses is better."""

import datetime
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from .judges import IndexedVerdict, Judge, as_text


logger = logging.getLogger(__name__)

JUDGE_TEMPLATE = """\
Below are a request and two responses to it. Decide which response serves the person who asked better. Neither the order of \
the responses nor their length is a merit.

### Request
{prompt}

### Response A
{completion_a}

### Response B
{completion_b}

### Verdict
Reply with a single letter: A if response A is better, B if response B is better, T if they are equally good."""


# A verdict's letter is a word of its own and a capital. An "A" before another word is an article, unless that word makes the
# letter its subject or goes on after it.
_GOES_ON = "is|was|wins|won|has|and|or|nor|over|than|by|for"
_LETTER = rf"(?<![\w'])(?:A(?!\s+(?!(?:{_GOES_ON})\b)[a-z])|[BT])(?![\w'])"
_NAMED = rf"(?:(?i:response|answer|option|completion)\s+)?({_LETTER})"
_TIE = r"(?<![\w'])(?i:tie|tied|neither|equally good)(?![\w'])"
# Forms that say what the letter is there for: the more explicit ones first.
_LABELLED = re.compile(
    rf"\b(?i:verdict|winner|decision|choice|final answer|answer\s+is|answer\s*:)(?:\s+is)?[\s:]*{_NAMED}"
)
_PREFERRED = re.compile(
    rf"\b(?i:better|best|stronger|superior|preferable)(?:\s+\w+)?\s+is\s+{_NAMED}"
    rf"|{_NAMED}\s+(?:(?:is|was)\s+(?:\w+\s+){{0,3}}?(?:better|best|stronger|superior|preferable)\b|wins\b|won\b)"
    rf"|\b(?i:prefer|choose|pick)\s+{_NAMED}"
    rf"|({_TIE}).*"  # neither of what follows
)
_FIRST = re.compile(rf"^\s*{_NAMED}\s*(?:[.;!]|$)", flags=re.MULTILINE)
_WORD = re.compile(rf"({_LETTER})|({_TIE})")
# What a clause with one of these says of a letter is not that it is better, or not for sure.
_HEDGED = re.compile(r"\b(?i:not|cannot|never|if|whether|hardly|worse|worst)\b|n't\b")
_CLAUSE_END = re.compile(r"[.,;:!?()\n]+|\b(?:because|since|while|whereas|but|although|though|as)\b")


def parse_verdict(reply: str) -> float | None:
    """
    1 for A, 0 for B, 1/2 for T, "tie" or "neither"; `None` for a reply that says none of them, or more than one.

    A reply that is only the letter is the verdict; then what is labelled as one ("Verdict: B"), then what is said to be better
    ("B is better", "A better answer is B", "B wins"), what stands alone before its reasons, and last the only such word that
    there is. Clauses that deny or doubt ("A is not better") are no verdict. What stands in `<think>...</think>` is no reply yet.
    """
    reply = re.sub(r"<think>.*?(</think>|\Z)", "", reply, flags=re.DOTALL).rpartition("</think>")[2]
    # Markdown, quotes and brackets; an apostrophe is part of a word, unless it stands before or after one.
    reply = re.sub(r"[*_`\"“”\[\](){}<>$\\]|(?<!\w)['‘’]|['‘’](?!\w)", " ", reply.replace("’", "'")).strip()
    if only := re.fullmatch(rf"{_NAMED}[\s.,;:!]*", reply):
        return _value(only[1])
    clauses = _CLAUSE_END.split(reply)
    said = [clause for clause in clauses if not _HEDGED.search(clause)]
    for form, texts in ((_LABELLED, [reply]), (_PREFERRED, said), (_FIRST, [reply]), (_WORD, clauses)):
        found = {_value(next(filter(None, match.groups()))) for text in texts for match in form.finditer(text)}
        if found:
            break
    else:
        return None
    if form is _WORD and any(_WORD.search(clause) for clause in clauses if _HEDGED.search(clause)):
        return None
    return found.pop() if len(found) == 1 else None


def _value(word: str) -> float:
    return {"A": 1.0, "B": 0.0}.get(word, 0.5)


class _CalledOff(Exception):
    """A question that need not be asked anymore, since another one has failed."""


class EndpointJudge(Judge):
    """
    A judge that asks a language model behind an OpenAI-compatible endpoint (`POST {base_url}/chat/completions`): a
    provider's, or a local vLLM, llama.cpp or TGI server.

    Fix the model's snapshot, and keep the template and the settings with the numbers ([`describe`] has them): a win rate is
    one under this judge.

    Args:
        model (`str`):
            Name of the model, as the endpoint knows it.
        base_url (`str`, *optional*, defaults to `"https://api.openai.com/v1"`):
            The endpoint.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable with the key. The key is read when a request is made, sent to this endpoint only (redirects
            are not followed), and never logged or written. Unset means that none is sent.
        template (`str`, *optional*):
            The question, with the fields `{prompt}`, `{completion_a}` and `{completion_b}` and, if needed, the names of
            columns, where there are columns: D2PO gives those of the prompts' dataset. `{{name}}` is the text `{name}`.
        parse (`Callable[[str], float | None]`, *optional*, defaults to [`parse_verdict`]):
            Makes a verdict of the reply. `None` means that it says nothing: the question is asked again, `max_retries` times,
            then the pair is without a verdict.
        temperature (`float`, *optional*, defaults to `0.0`), max_tokens (`int`, *optional*, defaults to `8`):
            Of the judge's sampling; `None` leaves a field out of the request, for models that refuse it. A judge that reasons
            before it answers needs more tokens, or to be told not to, with `extra_body`.
        timeout (`float`, *optional*, defaults to `60.0`):
            Seconds that one request may take.
        max_retries (`int`, *optional*, defaults to `4`):
            How often a request is repeated after a timeout, a lost connection, an answer that is no chat completion, or a
            status of 408, 409, 429 or 5xx, with pauses that double up to a minute, or as long as `Retry-After` says (seconds or
            a date), up to ten minutes.
        retry_delay (`float`, *optional*, defaults to `1.0`):
            Seconds before the first repetition.
        concurrency (`int`, *optional*, defaults to `8`):
            Requests under way at once.
        extra_body (`dict`, *optional*):
            Further fields of the request, such as `{"seed": 0}`, `{"max_completion_tokens": 2048}`, or, for Qwen3 behind vLLM,
            `{"chat_template_kwargs": {"enable_thinking": False}}`.

    Raises:
        [`JudgeError`]: If the endpoint refuses a request, or does not answer after all repetitions.
    """

    LONGEST_PAUSE = 60.0  # of its own accord
    LONGEST_RETRY_AFTER = 600.0  # if the server asks for it

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
        # First of all, since the other messages and `describe` show the address.
        if "@" in (parts.netloc or parts.path) or "?" in base_url or "#" in base_url:
            raise ValueError(
                "`base_url` holds a user name or password, a query or a fragment, where keys are, and it goes into reports. Put the "
                "key into a variable, see `api_key_env`, and other fields of a request into `extra_body`."
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"`base_url` must be an http or https address, got {base_url!r}.")
        missing = [f"{{{field}}}" for field in ("completion_a", "completion_b") if field not in _fields(template)]
        if missing:
            raise ValueError(f"`template` lacks {' and '.join(missing)}: the judge would not see what it compares.")
        if max_retries < 0 or concurrency < 1:
            raise ValueError(
                f"`max_retries` must not be negative and `concurrency` at least 1, got {max_retries} and {concurrency}."
            )
        self.model, self.base_url, self.api_key_env = model, base_url.rstrip("/"), api_key_env
        self.template, self.parse = template, parse or parse_verdict
        self.temperature, self.max_tokens, self.extra_body = temperature, max_tokens, dict(extra_body or {})
        self.timeout, self.max_retries, self.retry_delay = timeout, max_retries, retry_delay
        self.concurrency = concurrency
        self.name = f"{model} at {parts.netloc}"
        self._told = False

    def describe(self):
        names = ("model", "base_url", "template", "temperature", "max_tokens", "extra_body")
        return {**super().describe(), **{name: getattr(self, name) for name in names}}

    def __call__(self, prompts, completions_a, completions_b, **columns):
        verdicts: list[float | None] = [None] * len(prompts)
        for index, verdict in self._answers(self._questions(prompts, completions_a, completions_b, columns)):
            verdicts[index] = verdict
        return verdicts

    def stream(self, prompts, completions_a, completions_b, **columns) -> Iterator[IndexedVerdict]:
        return self._answers(self._questions(prompts, completions_a, completions_b, columns))

    def needed_columns(self):
        return _fields(self.template) - {"prompt", "completion_a", "completion_b"}

    def _questions(self, prompts, completions_a, completions_b, columns: dict) -> list[str]:
        shown = {"prompt": prompts, "completion_a": completions_a, "completion_b": completions_b}
        unknown = sorted(_fields(self.template) - {*shown, *columns})
        if unknown:
            raise self._error(
                f"`template` of the judge {self.name} has the field {{{unknown[0]}}}, and there is no such column (columns: "
                f"{', '.join(columns) or 'none'}). Name one that there is; {{{{{unknown[0]}}}}} is the text in braces itself."
            )
        rows = zip(prompts, completions_a, completions_b, strict=True)
        return [
            _fill(
                self.template,
                {name: str(values[i]) for name, values in columns.items()}
                | {name: as_text(value) for name, value in zip(shown, row, strict=True)},
            )
            for i, row in enumerate(rows)
        ]

    def _answers(self, questions: list[str]) -> Iterator[IndexedVerdict]:
        """
        Each verdict as soon as it is there. When a question fails, those not sent yet are called off, and those under way,
        which are paid for, waited for and given.
        """
        stop, failure = threading.Event(), None
        with ThreadPoolExecutor(self.concurrency) as pool:
            indices = {pool.submit(self._ask, question, stop): i for i, question in enumerate(questions)}
            try:
                for future in as_completed(indices):
                    error = None if future.cancelled() else future.exception()
                    if error is not None and not isinstance(error, _CalledOff):
                        failure = failure or error
                        stop.set()
                        for other in indices:
                            other.cancel()
                    elif error is None and not future.cancelled():
                        yield IndexedVerdict(indices[future], future.result())
            finally:  # whoever asked may have gone
                stop.set()
                for future in indices:
                    future.cancel()
        if failure is not None:
            raise failure from None

    def _ask(self, question: str, stop: threading.Event) -> float | None:
        limits = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            **{name: value for name, value in limits.items() if value is not None},
            **self.extra_body,
        }
        for attempt in range(self.max_retries + 1):
            if stop.is_set():
                raise _CalledOff
            reply, problem, wait = self._request(body)
            if problem is None:
                try:
                    verdict = self.parse(reply)
                except (ValueError, KeyError, IndexError, TypeError) as error:
                    problem, wait = f"`parse` cannot read its reply ({type(error).__name__})", 0.0
                else:
                    if verdict is not None:
                        return verdict
                    continue  # it says nothing
            if wait is None or attempt == self.max_retries:
                stop.set()
                raise self._error(f"The judge {self.name} did not answer after {attempt + 1} request(s): {problem}.")
            own = min(self.retry_delay * 2**attempt, self.LONGEST_PAUSE)
            stop.wait(max(own, min(wait, self.LONGEST_RETRY_AFTER)))
        self._tell(reply)
        return None

    def _tell(self, reply: str) -> None:
        """Once: a judge whose replies say nothing is most often one that is cut off while it reasons."""
        if not self._told:
            self._told = True
            logger.warning(
                "The judge %s gave no verdict, after %d request(s), but %r. Such pairs are left out. If it reasons before it "
                "answers, raise `max_tokens=%s`, or turn that off with `extra_body`.",
                *(self.name, self.max_retries + 1, reply[:80], self.max_tokens),
            )

    def _request(self, body: dict) -> tuple[str, str | None, float | None]:
        """The reply; what went wrong, without anything the request held; and the least pause if repeating may help."""
        import requests

        key = (os.environ.get(self.api_key_env) or "").strip() if self.api_key_env else ""
        if not key.isascii() or not key.isprintable():  # the error of who cannot send it would show it
            return "", f"the variable {self.api_key_env} holds what no key does: other than printable ASCII", None

        def authorize(request):  # given as `auth`, it also keeps a ~/.netrc from adding what nobody asked for
            if key:
                request.headers["Authorization"] = f"Bearer {key}"
            return request

        url, options = f"{self.base_url}/chat/completions", dict(timeout=self.timeout, allow_redirects=False)
        try:
            response = requests.post(url, json=body, auth=authorize, **options)
        except requests.Timeout:
            return "", f"no answer within {self.timeout} s", 0.0
        except requests.RequestException as error:
            return "", f"no connection ({type(error).__name__})", 0.0
        status = response.status_code
        if status != 200:
            hints = {
                400: "(a model may refuse `temperature` or `max_tokens`: `None` leaves them out, `extra_body` gives others)",
                401: f"the key in the variable {self.api_key_env} is missing or wrong",
                403: f"the key in the variable {self.api_key_env} may not do this",
                404: "no such address or model",
            }
            hint = "a redirect, which is not followed" if 300 <= status < 400 else hints.get(status, "")
            passing = status in (408, 409, 429) or status >= 500
            return "", f"HTTP {status} {hint}".rstrip(), self._pause(response) if passing else None
        try:
            return response.json()["choices"][0]["message"]["content"] or "", None, None
        except (ValueError, KeyError, IndexError, TypeError):
            return "", "its answer is not a chat completion", 0.0

    @staticmethod
    def _pause(response) -> float:
        """The seconds that `Retry-After` says, which may be a number of them or a date; 0 if it says nothing."""
        value = response.headers.get("Retry-After", "").strip()
        if re.fullmatch(r"\d+(\.\d+)?", value):
            return float(value)
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        if date.tzinfo is None:  # "-0000": in UTC, from nowhere in particular
            date = date.replace(tzinfo=datetime.UTC)
        return max(0.0, (date - datetime.datetime.now(datetime.UTC)).total_seconds())


# A name in one pair of braces is a field; in two it is the name in one.
# What `str.format` would read, such as an index or a precision, is part of a name that no column has, and refused.
_FIELD = re.compile(r"\{(?P<literal>\{[^\W\d][^{}\s\"]*\})\}|\{(?P<name>[^\W\d][^{}\s\"]*)\}")


def _fields(template: str) -> set[str]:
    return {found["name"] for found in _FIELD.finditer(template) if found["name"]}


def _fill(template: str, values: dict[str, str]) -> str:
    """
    The template with its fields, in one pass, so that a field's text is never looked at. Not `str.format`: what a model wrote
    may hold braces, and a template may hold JSON.
    """
    return _FIELD.sub(lambda found: found["literal"] or values[found["name"]], template)
