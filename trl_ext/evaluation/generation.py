"""Sampling from models so that what is measured is what was sampled."""

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch

from .._checks import annotations_of, at_least, between, check_value
from ..losses import Divergence
from .scoring import ScoredResponses, evaluating, score_responses, without_adapters


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """
    How responses are sampled. Temperatures, penalties and truncation in a model's own generation configuration are
    ignored, so that the same settings mean the same for every model.

    Args:
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Longest response, EOS included.
        temperature (`float`, *optional*, defaults to `1.0`):
            What logits are divided by; 0 is greedy decoding.
        top_p (`float`, *optional*, defaults to `1.0`):
            Sample from the smallest set of tokens with at least this probability; 1 is no truncation.
        top_k (`int`, *optional*, defaults to `0`):
            Sample from this many most likely tokens; 0 is no truncation.
        seed (`int`, *optional*, defaults to `0`):
            Of the sampling, which has its own random state. What is sampled depends on the batch size too: a batch is
            drawn from one generator.
    """

    max_new_tokens: Annotated[int, at_least(1)] = 128
    temperature: Annotated[float, at_least(0)] = 1.0
    top_p: Annotated[float, between(0, 1, "(]")] = 1.0
    top_k: Annotated[int, at_least(0)] = 0
    seed: Annotated[int, between(0, 2**63 - 1)] = 0

    def __post_init__(self):
        for name, annotation in annotations_of(type(self)).items():
            object.__setattr__(self, name, check_value(name, getattr(self, name), annotation))

    @property
    def truncates(self) -> bool:
        """Whether tokens with positive probability are never sampled."""
        return self.top_p < 1 or self.top_k > 0 or self.temperature == 0


@dataclasses.dataclass
class Samples:
    """
    Responses to `N` prompts, `K` each; those of prompt `i` are at `[i * K : (i + 1) * K]`.

    Args:
        prompts (`list`):
            The `N` prompts, as given.
        prompt_ids, response_ids (`list[list[int]]` of length `N * K`):
            Token ids without padding; a response that ended has its end-of-sequence token.
        texts (`list[str]` of length `N * K`):
            The responses without special tokens.
        finished (`list[bool]` of length `N * K`):
            Whether the response ended, rather than being cut at `max_new_tokens`.
        num_samples (`int`):
            `K`.
        settings (`SamplingSettings`):
            How they were sampled.
    """

    prompts: list
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    texts: list[str]
    finished: list[bool]
    num_samples: int
    settings: SamplingSettings

    @property
    def repeated_prompts(self) -> list:
        """The prompt of each response."""
        return [prompt for prompt in self.prompts for _ in range(self.num_samples)]


@contextlib.contextmanager
def _own_generation_config(model, tokenizer):
    """A generation configuration with nothing but the special tokens."""
    from transformers import GenerationConfig

    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    original = owner.generation_config
    ends = original.eos_token_id
    ends = [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    special = dict(eos_token_id=ends or None, pad_token_id=pad, bos_token_id=original.bos_token_id)
    # `PeftModel.generate` hands its own attribute to the model inside, so both are set, where they are two.
    owners = [owner] if owner is model else [owner, model]
    kept = [dict(each.__dict__) for each in owners]
    for each in owners:
        each.generation_config = GenerationConfig(**special)
    try:
        yield ends, pad
    finally:
        for each, before in zip(owners, kept, strict=True):
            each.__dict__.pop("generation_config", None)
            if "generation_config" in before:
                each.__dict__["generation_config"] = before["generation_config"]


def sample_responses(
    model: torch.nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence,
    settings: SamplingSettings | None = None,
    *,
    num_samples: int = 1,
    batch_size: int = 16,
    template_options: Sequence[dict] | None = None,
    progress: bool = False,
) -> Samples:
    """
    Samples responses to prompts.

    The same arguments, the batch size among them, give the same responses on the same machine: each batch has its own
    seed, and different `settings.seed` have no batch in common. The random state, the mode of the model, its
    generation configuration and the tokenizer's padding side are left as they were.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to sample from.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`Sequence[str]`, `Sequence[list[dict]]` or `Sequence[list[int]]`):
            Texts, taken as they are; messages, which go through the chat template; or token ids.
        settings ([`SamplingSettings`], *optional*):
            How to sample; the defaults sample the model itself.
        num_samples (`int`, *optional*, defaults to `1`):
            Responses to each prompt.
        batch_size (`int`, *optional*, defaults to `16`):
            Responses sampled at once.
        template_options (`Sequence[dict]` of length `N`, *optional*):
            What each prompt's chat template is given besides the messages, such as `tools`. See the columns `tools`
            and `chat_template_kwargs` of preference data.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.
    """
    from tqdm.auto import tqdm

    settings = settings or SamplingSettings()
    prompts = list(prompts)
    if not prompts or num_samples < 1:
        raise ValueError(f"`prompts` and `num_samples` must not be empty, got {len(prompts)} and {num_samples!r}.")
    options = [{}] * len(prompts) if template_options is None else list(template_options)
    if len(options) != len(prompts):
        raise ValueError(f"`template_options` has {len(options)} entries for {len(prompts)} prompts. Give one each.")
    unique = [_prompt_ids(tokenizer, prompt, **each) for prompt, each in zip(prompts, options, strict=True)]
    rows = [ids for ids in unique for _ in range(num_samples)]
    device = next(model.parameters()).device
    sampling: dict[str, float] = dict(do_sample=settings.temperature > 0)
    if sampling["do_sample"]:
        sampling |= dict(temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k)

    response_ids = []
    with (
        _own_generation_config(model, tokenizer) as (ends, pad),
        evaluating(model),
        _own_random_state(device) as reseed,
    ):
        for start in tqdm(range(0, len(rows), batch_size), desc="Sampling", unit="batch", disable=not progress):
            reseed(batch_seed(settings.seed, start // batch_size))
            batch = rows[start : start + batch_size]
            length = max(map(len, batch))
            # Generation goes on at the prompt's end, so the padding is on the left.
            input_ids = torch.tensor([[pad] * (length - len(ids)) + ids for ids in batch])
            attention_mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in batch])
            output = model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=settings.max_new_tokens,
                use_cache=True,
                **sampling,
            )
            response_ids += [_until_end(ids, ends) for ids in output[:, length:].tolist()]
    return Samples(
        prompts=prompts,
        prompt_ids=rows,
        response_ids=response_ids,
        texts=tokenizer.batch_decode(response_ids, skip_special_tokens=True),
        finished=[ids[-1] in ends for ids in response_ids],
        num_samples=num_samples,
        settings=settings,
    )


def batch_seed(seed: int, index: int) -> int:
    """
    The seed of a batch: `seed` itself for the first one; for the others a hash, so that no batch of one seed is that
    of another.
    """
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]) if index else seed


@contextlib.contextmanager
def _own_random_state(device: torch.device):
    """
    A function that seeds the generators which sampling on a device uses, the CPU's and its own. These are left as they
    were, and those of other devices are not touched, which `torch.manual_seed` would seed too.
    """
    module = None if device.type == "cpu" else torch.get_device_module(device)
    # Apple's device is one, and its functions take no index.
    index = () if device.type in ("cpu", "mps") else (device,)
    states = torch.random.get_rng_state(), None if module is None else module.get_rng_state(*index)

    def reseed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        if module is not None:
            with module.device(device) if index else contextlib.nullcontext():
                module.manual_seed(seed)

    try:
        yield reseed
    finally:
        torch.random.set_rng_state(states[0])
        if module is not None:
            module.set_rng_state(states[1], *index)


def _prompt_ids(tokenizer, prompt, **template_options) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenizer(text=prompt)["input_ids"]
    elif prompt and isinstance(prompt[0], int):
        ids = prompt
    else:
        options = dict(add_generation_prompt=True, tokenize=True, return_dict=True)
        ids = tokenizer.apply_chat_template(prompt, **options, **template_options)["input_ids"]
    if not len(ids):
        raise ValueError(f"The prompt {prompt!r} has no tokens. Give it a text, or a beginning-of-sequence token.")
    return list(ids)


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    """The response up to and with its first end-of-sequence token; what follows is padding."""
    for position, token in enumerate(ids):
        if token in ends:
            return ids[: position + 1]
    return ids


def score_samples(
    model: torch.nn.Module,
    samples: Samples,
    *,
    reference: torch.nn.Module | str | None = None,
    divergences: Iterable[str | Divergence] = (),
    batch_size: int = 8,
) -> ScoredResponses:
    """
    Scores samples of `model` at the temperature that they were sampled at, so that their mean log ratio estimates the
    KL of the policy that was sampled.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model that gave the samples.
        samples ([`Samples`]):
            Its samples, without truncation.
        reference, divergences, batch_size:
            As for [`score_responses`].

    Raises:
        `ValueError`: For samples with `top_p`, `top_k` or greedy decoding: the reference, truncated in the same way,
            gives probability 0 to responses that the policy samples, and the KL is infinite.
    """
    if samples.settings.truncates:
        raise ValueError(
            f"These samples were truncated ({samples.settings}), so their KL to the reference is infinite or another "
            "policy's. Sample with `top_p=1.0`, `top_k=0` and a temperature above 0 to measure divergences."
        )
    return score_responses(
        model,
        samples.prompt_ids,
        samples.response_ids,
        reference=reference,
        divergences=divergences,
        temperature=samples.settings.temperature,
        batch_size=batch_size,
    )


@contextlib.contextmanager
def reference_of(model, reference):
    """The model to sample from for a reference given as a model or as `"base"`."""
    if reference == "base":
        with without_adapters(model):
            yield model
    else:
        yield reference
