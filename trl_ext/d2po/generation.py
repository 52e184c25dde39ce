"""Samples completions from the policy, as tokens that training uses without tokenizing again."""

import inspect

import torch

from .._trl import load_vllm_generation, unwrap_model_for_generation
from ..training.modes import evaluation_mode
from ..training.sampling import SampledTokens, end_token_ids, sample_tokens
from .window import Completion


class CompletionSampler:
    """
    Samples completions with transformers; see [`~trl_ext.training.sampling.sample_tokens`].

    Args:
        trainer ([`~transformers.Trainer`]): Holds the policy.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The policy's.
        max_new_tokens (`int`): Length at which a completion is cut.
        temperature, top_p, top_k, min_p: The distribution that is sampled from.
        settings (`dict`): Further settings of [`~transformers.GenerationConfig`].
        batch_size (`int`): Sequences generated at once.
    """

    def __init__(
        self, trainer, tokenizer, *, max_new_tokens, temperature, top_p, top_k, min_p, settings: dict, batch_size: int
    ):
        self.trainer = trainer
        self.tokenizer = tokenizer
        self.options = dict(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            generation_options=settings,
            batch_size=batch_size,
        )

    def __call__(self, prompts: list[list[int]], count: int, seeds: list[tuple]) -> list[list[Completion]]:
        """`count` completions of each prompt; each prompt's random numbers are derived from its entry of `seeds`."""
        rows = [ids for ids in prompts for _ in range(count)]
        row_seeds = [(*seed, i) for seed in seeds for i in range(count)]
        with (
            unwrap_model_for_generation(
                self.trainer.model_wrapped,
                self.trainer.accelerator,
                gradient_checkpointing_kwargs=self.trainer.args.gradient_checkpointing_kwargs,
            ) as model,
            self.trainer.accelerator.autocast(),
        ):
            sampled = sample_tokens(model, self.tokenizer, rows, row_seeds, **self.options)
        return _in_groups(sampled, count, self.tokenizer)


class VLLMSampler:
    """
    Samples completions with vLLM, through TRL: in the training processes or on a server. The policy's weights are sent
    to vLLM whenever they have changed. vLLM draws its own random numbers, so a resumed run does not repeat its
    completions.

    Args:
        trainer ([`~transformers.Trainer`]): Holds the policy, whose own adapter must be active.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The policy's.
        max_new_tokens, temperature, top_p, top_k, min_p, settings: As for [`CompletionSampler`].
        batch_size (`int`): Sequences that vLLM runs at once in each process.
        vllm_settings (`dict`): Passed to TRL's `VLLMGeneration`.
    """

    def __init__(
        self,
        trainer,
        tokenizer,
        *,
        max_new_tokens,
        temperature,
        top_p,
        top_k,
        min_p,
        settings: dict,
        batch_size: int,
        vllm_settings: dict,
    ):
        settings = dict(settings)
        self.trainer = trainer
        self.tokenizer = tokenizer
        self.eos_token_ids = end_token_ids(trainer.model, tokenizer)
        self.vllm = load_vllm_generation()(
            model=trainer.model,
            accelerator=trainer.accelerator,
            processing_class=tokenizer,
            max_num_seqs=batch_size,
            repetition_penalty=settings.pop("repetition_penalty", 1.0),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            max_completion_length=max_new_tokens,
            logprobs=None,
            generation_kwargs=settings,
            **vllm_settings,
        )
        self._synced_at: int | None = None

    def __call__(self, prompts: list[list[int]], count: int, seeds: list[tuple]) -> list[list[Completion]]:
        if self._synced_at != self.trainer.state.global_step:
            self.vllm.sync_weights()
            self._synced_at = self.trainer.state.global_step
        rows = [ids for ids in prompts for _ in range(count)]
        with torch.no_grad(), evaluation_mode(self.trainer.model):
            _, sampled, _, _ = self.vllm.generate(prompts=rows, images=None, num_generations=count)
        tokens = [SampledTokens.until_end(list(ids), self.eos_token_ids) for ids in sampled]
        return _in_groups(tokens, count, self.tokenizer)


# Fields of `vllm.SamplingParams`, for checks where vLLM is not installed.
_VLLM_SETTINGS = """
    allowed_token_ids bad_words detokenize extra_args flat_logprobs frequency_penalty guided_decoding ignore_eos
    include_stop_str_in_output logit_bias logits_processors logprobs max_tokens min_p min_tokens n output_kind
    presence_penalty prompt_logprobs repetition_penalty seed skip_special_tokens spaces_between_special_tokens stop
    stop_token_ids structured_outputs temperature top_k top_p truncate_prompt_tokens
""".split()


def vllm_settings() -> set[str]:
    """Names of vLLM's sampling parameters: those of the installed version, or a list of known ones."""
    try:
        from vllm import SamplingParams
    except ImportError:
        return set(_VLLM_SETTINGS)
    return set(inspect.signature(SamplingParams).parameters)


def _in_groups(sampled: list[SampledTokens], count: int, tokenizer) -> list[list[Completion]]:
    """The completions of each prompt. One that was cut gets no end-of-sequence token."""
    texts = tokenizer.batch_decode([tokens.ids for tokens in sampled], skip_special_tokens=True)
    completions = [Completion(tokens.ids, text, tokens.finished) for tokens, text in zip(sampled, texts, strict=True)]
    return [completions[i : i + count] for i in range(0, len(completions), count)]
