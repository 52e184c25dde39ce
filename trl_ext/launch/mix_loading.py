"""What `trl-ext mix` loads: policies, the betas that they were trained with, prompts and rewards."""

import functools
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .mix import MixArguments

DEFAULT_BETA = 0.1


@dataclass
class Loaded:
    """The policies in memory."""

    model: Any
    adapters: list[str] | None
    reference: Any
    tokenizer: Any
    names: list[str]


def adapter_configuration(name: str) -> dict | None:
    """The configuration of an adapter by its Hub id or folder; `None` if it is a whole model."""
    from transformers.utils import find_adapter_config_file

    from ..training.named_datasets import refuse_missing_path

    refuse_missing_path("policy", name, file_types=())
    path = find_adapter_config_file(name)
    return None if path is None else json.loads(Path(path).read_text())


def short_names(policies: list[str]) -> list[str]:
    """The last part of each path, as far as that tells them apart."""
    parts = [Path(name).parts for name in policies]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["_".join(part[-length:]).replace(".", "_") for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"policy_{k}" for k in range(len(policies))]


def trained_beta(policy: str) -> float | None:
    """
    The beta that a policy was trained with, from the `training_args.bin` that trainers save beside the weights; `None`
    if there is none, or no beta in it.

    The file is a pickle, which could run code: it is read without calling anything that it names.
    """
    from transformers.utils import cached_file

    options = dict(_raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    path = cached_file(policy, "training_args.bin", _raise_exceptions_for_gated_repo=False, **options)
    if path is None or not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        try:
            beta = vars(_InertUnpickler(io.BytesIO(archive.read(name))).load()).get("beta")
        except Exception:  # a pickle of something else may fail in many ways
            return None
    return float(beta) if isinstance(beta, int | float) and beta > 0 else None


class _Inert(dict):
    """Stands for an object of any class: takes whatever it is made from, and does nothing with it."""

    def __hash__(self):  # type: ignore[override]
        return id(self)

    def __init__(self, *args, **kwargs):
        pass

    def append(self, item):
        pass

    def extend(self, items):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        return _Inert

    def persistent_load(self, pid):
        return None


def resolve_betas(policies: list[str], beta: float | None, betas: list[float] | None) -> float:
    """
    The policies' common beta: the given one, the one they were trained with, or 0.1 where neither is known.

    Raises:
        `ValueError`: If they were trained with different betas and `betas` does not say so.
    """
    found = {policy: trained_beta(policy) for policy in policies}
    known = {value for value in found.values() if value is not None}
    if betas is None and len(known) > 1:
        told = ", ".join(f"{policy!r} with {value:g}" for policy, value in found.items() if value is not None)
        given = " ".join("BETA" if value is None else f"{value:g}" for value in found.values())
        raise ValueError(
            f"`policy` names policies that were trained with different betas ({told}): their log-ratios are of "
            f"different scales. Give `--betas {given}`, which brings them to one."
        )
    if beta is not None:
        return beta
    return known.pop() if betas is None and known else DEFAULT_BETA


def load_policies(arguments: "MixArguments") -> Loaded:
    """
    Loads the policies and their reference.

    Raises:
        `ValueError`: If some policies are adapters and others are models, the adapters are of different bases, the
            reference is not known, or the tokenizers differ.
    """
    from peft import PeftModel
    from transformers import AutoTokenizer

    from ..evaluation.loading import check_causal_lm, load_causal_lm

    load = functools.partial(
        load_causal_lm,
        dtype=arguments.dtype,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
        load_in_4bit=arguments.load_in_4bit,
    )
    configurations = [adapter_configuration(name) for name in arguments.policy]
    are_adapters = {configuration is not None for configuration in configurations}
    if len(are_adapters) > 1:
        raise ValueError(
            "`policy` names adapters and whole models. Merge the adapters into models of their own, or give adapters "
            "only."
        )
    bases = {configuration["base_model_name_or_path"] for configuration in configurations if configuration}
    if len(bases) > 1:
        raise ValueError(
            f"`policy` names adapters of different bases: {', '.join(map(repr, sorted(bases)))}. A mixture needs "
            "policies that were trained from one reference."
        )
    base = arguments.base or next(iter(bases), None)
    if base is None:
        raise ValueError("`base` is needed with whole models: the model that all policies were trained from.")
    for name in (base, *(() if bases else arguments.policy)):
        check_causal_lm(name, trust_remote_code=arguments.trust_remote_code)
    names = short_names(arguments.policy)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=arguments.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if bases:
        model = PeftModel.from_pretrained(load(base), arguments.policy[0], adapter_name=names[0])
        for path, name in zip(arguments.policy[1:], names[1:], strict=True):
            model.load_adapter(path, adapter_name=name)
        return Loaded(model.eval(), names, None, tokenizer, names)
    for name in arguments.policy:
        other = AutoTokenizer.from_pretrained(name, trust_remote_code=arguments.trust_remote_code)
        if other.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"`policy` {name!r} has another vocabulary than `base` {base!r}. The models of a mixture must share "
                "one tokenizer."
            )
    return Loaded([load(name) for name in arguments.policy], None, load(base), tokenizer, names)


def load_prompts(arguments: "MixArguments", split: str, count: int) -> list:
    """The first distinct prompts of a split."""
    from ..training.named_datasets import get_split, load_named_dataset

    dataset = load_named_dataset(arguments.dataset, arguments.dataset_config, option="dataset")
    rows = get_split(dataset, split, "split")
    if "prompt" not in rows.column_names:
        raise ValueError(
            f"`dataset={arguments.dataset!r}` has no column `prompt`; its columns are {', '.join(rows.column_names)}."
        )
    distinct = {json.dumps(prompt): prompt for prompt in rows["prompt"]}
    return list(distinct.values())[:count]


def load_rewards(specs: list[str] | None, device: str | None) -> dict[str, Callable]:
    """Reward functions by the name that the command line gives them."""
    from ..judges import load_judge
    from ..judges.verdicts import as_completions

    rewards = {}
    for spec in specs or []:
        judge = load_judge(spec, device=device)
        if not judge.has_rewards:
            raise ValueError(f"`reward={spec!r}` compares pairs and gives no rewards.")
        rewards[judge.name] = lambda prompts, texts, judge=judge: [
            float("nan") if value is None else value
            for value in judge.rewards(prompts, as_completions(prompts, texts))
        ]
    return rewards
