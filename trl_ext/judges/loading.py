"""Judges from a word on a command line."""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .callables import Judge, judge_from_function


def load_judge(spec: str, *, device: str | None = None) -> Judge:
    """
    Returns a judge from a word on a command line.

    Args:
        spec (`str`):
            `rewards.py:name` or `package.module:name`: a [`Judge`] of yours, a reward function, or a function on
            pairs, told apart by their signatures. The file is executed. `reward_model:ID_OR_FOLDER`: a reward model.
            `endpoint:MODEL@https://host/v1`: a model behind an OpenAI-compatible endpoint, its key in
            `OPENAI_API_KEY`.
        device (`str`, *optional*):
            Where a reward model is put.
    """
    kind, _, rest = spec.partition(":")
    model, _, url = rest.rpartition("@")
    if kind == "reward_model" and rest:
        from .reward_models import RewardModelJudge

        return RewardModelJudge(rest, device=device)
    if kind == "endpoint" and model and url:
        from .endpoint import EndpointJudge

        return EndpointJudge(model, url)
    if kind in ("reward_model", "endpoint"):
        raise ValueError(_none_of(spec, "judge", "`reward_model:ID_OR_FOLDER`", "`endpoint:MODEL@URL`"))
    return judge_from_function(load_function(spec, "judge", "`reward_model:ID_OR_FOLDER`", "`endpoint:MODEL@URL`"))


def load_function(spec: str, option: str, *others: str) -> Any:
    """
    Returns what `rewards.py:name` or `package.module:name` names. A file is executed.

    Args:
        spec (`str`):
            The word on the command line.
        option (`str`):
            Name of the option, for messages.
        others (`str`):
            Other words that the option takes, for messages.

    Raises:
        `ValueError`: If `spec` is no such word, or names nothing.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name.isidentifier():
        raise ValueError(_none_of(spec, option, *others))
    if source.endswith(".py"):
        path = Path(source).expanduser()
        if not path.is_file():
            raise ValueError(f"`{option}={spec!r}`: there is no file {source}.")
        module = _execute(path)
    else:
        module = importlib.import_module(source)
    if not hasattr(module, name):
        raise ValueError(f"`{option}={spec!r}`: {source} has no {name}.")
    return getattr(module, name)


def _execute(path: Path) -> ModuleType:
    """The module that a file defines, registered as `dataclasses`, `pickle` and `inspect` expect it of any module."""
    name = f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"  # `json.py` is not `json`
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _none_of(spec: str, option: str, *others: str) -> str:
    words = ["`FILE.py:FUNCTION`", "`MODULE:FUNCTION`", *others]
    return f"`{option}={spec!r}` is none of {', '.join(words[:-1])} and {words[-1]}."
