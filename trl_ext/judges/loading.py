"""Judges from a word on a command line."""

import importlib
import importlib.util
from pathlib import Path

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
    source, _, name = spec.rpartition(":")
    if not source or not name.isidentifier() or kind in ("reward_model", "endpoint"):
        raise ValueError(
            f"`judge={spec!r}` is none of `FILE.py:FUNCTION`, `MODULE:FUNCTION`, `reward_model:ID_OR_FOLDER` and "
            "`endpoint:MODEL@URL`."
        )
    if source.endswith(".py"):
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"`judge={spec!r}`: there is no file {source}.")
        module_spec = importlib.util.spec_from_file_location(path.stem, path)
        assert module_spec is not None and module_spec.loader is not None  # so for every .py
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    if not hasattr(module, name):
        raise ValueError(f"`judge={spec!r}`: {source} has no {name}.")
    return judge_from_function(getattr(module, name))
