"""A tiny LM whose responses can all be enumerated: 5 tokens, of which 0 ends, and at most 3 of them."""

import itertools

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


WORDS = ["<eos>", "a", "b", "c", "d"]
LENGTH, PROMPT = 3, 3


def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>", padding_side="left")


def model(seed=0):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        initializer_range=0.4,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def save(folder, seed=0):
    model(seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def _responses():
    whole = range(1, len(WORDS))
    ended = [[*tokens, 0] for n in range(LENGTH) for tokens in itertools.product(whole, repeat=n)]
    return ended + [list(tokens) for tokens in itertools.product(whole, repeat=LENGTH)]


RESPONSES = _responses()  # all 85
HAS_A = torch.tensor([float(1 in ids) for ids in RESPONSES], dtype=torch.float64)
_IDS = torch.zeros(len(RESPONSES), 1 + LENGTH, dtype=torch.long)
_IDS[:, 0] = PROMPT
_MASK = torch.zeros(len(RESPONSES), LENGTH, dtype=torch.float64)
for _i, _row in enumerate(RESPONSES):
    _IDS[_i, 1 : 1 + len(_row)] = torch.tensor(_row)
    _MASK[_i, : len(_row)] = 1


def log_probs(lm):
    """Exact log-probability of every response, with gradient; they sum to one."""
    logps = lm(input_ids=_IDS.to(lm.device)).logits.double()[:, :-1].log_softmax(-1)
    return (logps.gather(2, _IDS[:, 1:, None]).squeeze(-1) * _MASK).sum(1)


def has_a(prompts, completions, completion_ids, **columns):
    return [float(1 in ids) for ids in completion_ids]
