"""
Language models of a few words whose responses can all be enumerated, for demonstrations in which nothing that is
measured needs a sample.
"""

import itertools
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


END = "<eos>"  # word 0 of every vocabulary


def make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, separated by blanks; `words[0]` is [`END`], which also pads."""
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=END))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token=END, pad_token=END, padding_side="left")


def make_model(
    num_words: int, *, hidden_size: int, num_heads: int, initializer_range: float, seed: int = 0
) -> Qwen2ForCausalLM:
    """A transformer of one layer. With a large `initializer_range` it has opinions before any training."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=num_words,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=1,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        initializer_range=initializer_range,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def all_responses(num_words: int, length: int) -> list[list[int]]:
    """All responses of at most `length` tokens: those that end before, with their end, and those that are cut."""
    words = range(1, num_words)
    ended = [[*tokens, 0] for count in range(length) for tokens in itertools.product(words, repeat=count)]
    return ended + [list(tokens) for tokens in itertools.product(words, repeat=length)]


def response_log_probs(model, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> torch.Tensor:
    """
    Log-probabilities of all `responses` to each of `prompts`, with gradient, in float64 `(prompts, responses)`. Over
    [`all_responses`] they sum to one. The prompts are of one length.
    """
    length, start = max(map(len, responses)), len(prompts[0])
    padded = torch.tensor([[*ids, *[0] * (length - len(ids))] for ids in responses])
    mask = torch.tensor([[1.0] * len(ids) + [0.0] * (length - len(ids)) for ids in responses], dtype=torch.float64)
    rows = torch.cat(
        [torch.tensor(prompts).repeat_interleave(len(responses), 0), padded.repeat(len(prompts), 1)], dim=1
    ).to(model.device)
    log_probs = model(input_ids=rows).logits.double()[:, start - 1 : -1].log_softmax(-1)
    found = log_probs.gather(2, rows[:, start:, None]).squeeze(-1).view(len(prompts), len(responses), length)
    return (found * mask.to(found.device)).sum(2)


def quiet_options(steps: int, seed: int) -> dict:
    """What the configurations of all runs on a toy have in common: a constant rate, no files, no bars."""
    return dict(
        max_steps=steps,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_steps=steps,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=seed,
    )
