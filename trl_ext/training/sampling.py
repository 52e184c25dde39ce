"""Samples responses to tokenized prompts; the result does not depend on the batch, the process or the run."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .modes import evaluation_mode
from .seeds import derive_seed


class SampledTokens(NamedTuple):
    """
    One sampled response.

    Args:
        ids (`list[int]`): Its tokens without padding, the end-of-sequence token included where the model gave one.
        finished (`bool`): Whether the model ended it; otherwise it was cut at `max_new_tokens`.
    """

    ids: list[int]
    finished: bool

    @classmethod
    def until_end(cls, ids: Sequence[int], end_token_ids: Sequence[int]) -> "SampledTokens":
        """Cuts generated tokens after the first end-of-sequence token; what follows is padding."""
        for position, token in enumerate(ids):
            if token in end_token_ids:
                return cls(list(ids[: position + 1]), True)
        return cls(list(ids), False)


def pack(sampled: Sequence[SampledTokens]) -> dict[str, torch.Tensor]:
    """Responses as tensors, for [`TensorCache`]: `ids` `(N, T)`, filled up with 0, and `lengths` `(N,)`."""
    lengths = torch.tensor([len(response.ids) for response in sampled])
    ids = torch.zeros(len(sampled), max(1, int(lengths.max())), dtype=torch.int64)
    for row, response in zip(ids, sampled, strict=True):
        row[: len(response.ids)] = torch.tensor(response.ids, dtype=torch.int64)
    return {"ids": ids, "lengths": lengths}


def unpack(packed: dict[str, torch.Tensor]) -> list[list[int]]:
    """The tokens of the responses that [`pack`] was given."""
    pairs = zip(packed["ids"].tolist(), packed["lengths"].tolist(), strict=True)
    return [ids[:length] for ids, length in pairs]


class SeededSampling(LogitsProcessor):
    """
    Samples each sequence with random numbers of its own, by inverting the cumulative distribution. What is sampled for
    a prompt therefore depends, up to rounding, neither on the other prompts of the batch nor on the process.

    It leaves one possible token, so it must be the last processor and decoding must be greedy.

    Args:
        uniforms (`torch.Tensor` of shape `(N, max_new_tokens)`): Random numbers in [0, 1).
        prompt_length (`int`): Length of the padded prompts.
        warpers (`LogitsProcessorList`): Temperature and truncation of the distribution.
    """

    def __init__(self, uniforms: torch.Tensor, prompt_length: int, warpers: LogitsProcessorList):
        self.uniforms = uniforms
        self.prompt_length = prompt_length
        self.warpers = warpers

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cumulative = self.warpers(input_ids, scores).float().softmax(dim=-1).cumsum(dim=-1)
        # Relative to the last value, and below it: rounding must not choose a token that truncation has excluded.
        total = cumulative[:, -1:]
        drawn = self.uniforms[:, input_ids.size(1) - self.prompt_length, None] * total
        drawn = torch.minimum(drawn, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, drawn, right=True).clamp(max=scores.size(-1) - 1)
        return torch.full_like(scores, float("-inf")).scatter(1, tokens, 0.0)


def make_warpers(temperature: float, top_p: float, top_k: int, min_p: float | None) -> LogitsProcessorList:
    """The processors that shape the sampled distribution; none where the settings leave it unchanged."""
    warpers = LogitsProcessorList()
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers


def end_token_ids(model, tokenizer) -> list[int]:
    """The tokens that end a response: the tokenizer's and those of the model's generation configuration."""
    ends = _owner(model).generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return [token for token in dict.fromkeys([tokenizer.eos_token_id, *ends]) if token is not None]


def sample_tokens(
    model,
    tokenizer,
    prompts: Sequence[list[int]],
    seeds: Sequence[tuple],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float | None = None,
    generation_options: dict | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> list[SampledTokens]:
    """
    Samples one response to each prompt, in evaluation mode and without gradients.

    Response `i` depends on the model, `prompts[i]`, `seeds[i]` and the settings, not on the batch size or the global
    random state. Of the model's generation configuration only the special tokens are used, so that the same settings
    mean the same for every model. The model's modes and its generation configuration are restored, and no random state
    is touched.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model to sample from.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`Sequence[list[int]]` of length `N`):
            Token ids without padding.
        seeds (`Sequence[tuple]` of length `N`):
            Key from which the random numbers of each response are derived; see
            [`~trl_ext.training.seeds.derive_seed`].
        max_new_tokens (`int`):
            Tokens of a response at most, the end-of-sequence token included.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits; 0 is greedy decoding.
        top_p (`float`, *optional*, defaults to `1.0`):
            Truncation to the most probable tokens that together have this probability; the default truncates nothing.
        top_k (`int`, *optional*, defaults to `0`):
            Truncation to this many tokens; 0 truncates nothing.
        min_p (`float`, *optional*):
            Truncation of tokens below this share of the most probable one's probability.
        generation_options (`dict`, *optional*):
            Further fields of [`~transformers.GenerationConfig`], such as `repetition_penalty`.
        batch_size (`int`, *optional*, defaults to `16`):
            Responses generated at once.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        `list[SampledTokens]` of length `N`.
    """
    from tqdm.auto import tqdm

    ends = end_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    warpers = make_warpers(temperature or 1.0, top_p, top_k, min_p)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,  # `SeededSampling` samples
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
        **(generation_options or {}),
    )
    device = next(model.parameters()).device
    sampled: list[SampledTokens] = []
    with torch.no_grad(), evaluation_mode(model), _bare_generation_config(model):
        for start in tqdm(range(0, len(prompts), batch_size), desc="Sampling", unit="batch", disable=not progress):
            batch = prompts[start : start + batch_size]
            length = max(map(len, batch))
            # Generation continues at the prompt's end, so the padding is on the left.
            input_ids = torch.tensor([[pad] * (length - len(ids)) + list(ids) for ids in batch], device=device)
            mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in batch], device=device)
            processors = LogitsProcessorList()
            if temperature:
                generators = (
                    torch.Generator().manual_seed(derive_seed(*s)) for s in seeds[start : start + batch_size]
                )
                uniforms = torch.stack([torch.rand(max_new_tokens, generator=generator) for generator in generators])
                processors.append(SeededSampling(uniforms.to(device), length, warpers))
            output = model.generate(
                input_ids=input_ids, attention_mask=mask, generation_config=config, logits_processor=processors
            )
            sampled += [SampledTokens.until_end(ids, ends) for ids in output[:, length:].tolist()]
    return sampled


def _owner(model):
    """The transformers model, inside its adapters if it has some."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def _bare_generation_config(model):
    """Hides the model's generation configuration, whose values transformers would use for every option left open."""
    # `PeftModel.generate` copies its own attribute to the model inside, so both are replaced where they are two
    # objects.
    owners = list({id(each): each for each in (_owner(model), model)}.values())
    kept = [dict(vars(each)) for each in owners]
    for each in owners:
        each.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for each, before in zip(owners, kept, strict=True):
            vars(each).pop("generation_config", None)
            if "generation_config" in before:
                vars(each)["generation_config"] = before["generation_config"]
