"""Sampling from models so that what is measured is what was sampled."""

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import torch

from .._checks import annotations_of, at_least, between, check_value
from ..losses import Divergence
from ..training.sampling import sample_tokens
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
            Seed from which the random numbers of each response are derived.
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

    Each response has random numbers of its own, derived from `settings.seed`, its prompt's position and its number, so
    that it depends, up to rounding, on neither the batch size nor the number of prompts and samples. The random state,
    the mode of the model and its generation configuration are left as they were. See
    [`~trl_ext.training.sampling.sample_tokens`].

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
    settings = settings or SamplingSettings()
    prompts = list(prompts)
    if not prompts or num_samples < 1:
        raise ValueError(f"`prompts` and `num_samples` must not be empty, got {len(prompts)} and {num_samples!r}.")
    options = [{}] * len(prompts) if template_options is None else list(template_options)
    if len(options) != len(prompts):
        raise ValueError(f"`template_options` has {len(options)} entries for {len(prompts)} prompts. Give one each.")
    unique = [_prompt_ids(tokenizer, prompt, **each) for prompt, each in zip(prompts, options, strict=True)]
    rows = [ids for ids in unique for _ in range(num_samples)]
    seeds = [(settings.seed, "response", *divmod(i, num_samples)) for i in range(len(rows))]
    with evaluating(model):
        sampled = sample_tokens(
            model,
            tokenizer,
            rows,
            seeds,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            batch_size=batch_size,
            progress=progress,
        )
    response_ids = [response.ids for response in sampled]
    return Samples(
        prompts=prompts,
        prompt_ids=rows,
        response_ids=response_ids,
        texts=tokenizer.batch_decode(response_ids, skip_special_tokens=True),
        finished=[response.finished for response in sampled],
        num_samples=num_samples,
        settings=settings,
    )


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
