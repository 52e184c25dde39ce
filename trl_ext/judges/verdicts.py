"""Verdicts: their forms, their checks, and the texts that they are about."""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class JudgeError(RuntimeError):
    """A judge could not be asked, or its answer could not be read."""


class IndexedVerdict(NamedTuple):
    """A verdict with the index of its pair, from a judge whose answers come in any order."""

    index: int  # type: ignore[assignment]  # hides `tuple.index`, which nobody needs of two values
    verdict: float | None


def normalize_verdict(value: Any) -> float | None:
    """
    Returns a verdict as the probability that the first completion is better, 0.5 for a tie; `None` stays `None`.

    Raises:
        `ValueError`: If `value` is not a valid verdict. The caller prefixes the message with the judge's name.
    """
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if number == -1:
        return 0.5
    if not 0 <= number <= 1:  # false for NaN too
        raise ValueError(
            f"gave the verdict {value!r}. A verdict is 1 (the first is better), 0 (the second), 1/2 or -1 (a tie), a "
            "probability that the first is better, or None."
        )
    return number


def as_text(value: Any) -> str:
    """
    Returns a prompt or completion as one text; several messages keep their roles.

    Raises:
        `ValueError`: If a message has no content.
    """
    if isinstance(value, str):
        return value
    if len(value) == 1:
        return _content(value[0])
    return "\n\n".join(f"{message['role']}: {_content(message)}" for message in value)


def _content(message: dict) -> str:
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):  # parts, of which a judge reads the texts
        content = "".join(part.get("text") or "" for part in content)
    if calls:
        content = f"{content or ''}\n{json.dumps(calls, ensure_ascii=False, default=str)}".strip()
    if not isinstance(content, str):
        raise ValueError(
            f"A message of the role {message.get('role')!r} has the content {content!r}. Give it a text; an empty one "
            "is ''."
        )
    return content


def as_completions(prompts: Sequence, texts: Sequence) -> list:
    """Texts as completions in their prompts' form: an assistant's message where the prompt is messages."""
    return [
        [{"role": "assistant", "content": text}] if isinstance(prompt, list) and isinstance(text, str) else text
        for prompt, text in zip(prompts, texts, strict=True)
    ]
