"""Tiny models, tokenizers and data, built on the spot: the tests need no network."""

import json
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


ADJECTIVES = ("bright", "clever", "slow", "warm", "dull", "honest", "loud", "quiet")
NOUNS = ("film", "story", "score", "scene", "ending", "cast", "camera", "script")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def rows(count: int = 32, conversational: bool = False, seed: int = 0) -> list[dict]:
    """Preference rows of varied lengths: the chosen response praises, the rejected one complains at some length."""
    generator = torch.Generator().manual_seed(seed)

    def pick(words):
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    out = []
    for i in range(count):
        noun = pick(NOUNS)
        prompt = f"What of the {noun}, number {i}?"
        chosen = " ".join(f"The {pick(NOUNS)} was {pick(ADJECTIVES)}." for _ in range(1 + i % 3))
        rejected = " ".join(f"A {pick(ADJECTIVES)} {noun}, sadly." for _ in range(1 + (i + 1) % 3))
        row = {"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected}
        if conversational:
            row = {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        out.append(row)
    return out


def dataset(count: int = 32, conversational: bool = False, seed: int = 0) -> Dataset:
    return Dataset.from_list(rows(count, conversational, seed))


def write_jsonl(path: Path, count: int = 32, seed: int = 0) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count, seed=seed)))
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained here on the words above."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [" ".join(row.values()) for row in rows(64)]
    bpe.train_from_iterator(texts, trainer=trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>", padding_side="left")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def model(seed: int = 0, hidden_size: int = 32, vocab_size: int = 384, dtype=torch.float32, **kwargs):
    """A Qwen2 of two layers. Weights are larger than the usual 0.02, so that the model has opinions to change."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
        **kwargs,
    )
    return Qwen2ForCausalLM(config).to(dtype)


def write_models(folder: Path, pairs: int) -> Path:
    """Three models that differ, `reference`, `first` and `second`, with tokenizers, beside so many `pairs.jsonl`."""
    for seed, name in enumerate(("reference", "first", "second")):
        save(folder / name, seed=seed)
    write_jsonl(folder / "pairs.jsonl", pairs)
    return folder


def save(folder: Path, **kwargs) -> str:
    """Saves a tiny model and its tokenizer, and returns the folder as the string a user would pass."""
    model(**kwargs).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


VISION_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_vision(folder: Path) -> str:
    """Saves a tiny LLaVA (a CLIP tower of 2 x 2 patches before the Qwen2 above) and its processor."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    text = tokenizer()
    text.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 16, "width": 16}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=text,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=VISION_CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    vision_config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=model(vocab_size=len(text)).config,
        image_token_index=text.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


def vision_dataset(count: int = 16, seed: int = 0) -> Dataset:
    """The conversational rows, each with an image of noise."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(seed)
    noise = generator.integers(0, 255, (count, 16, 16, 3), dtype=np.uint8)
    columns = {key: [row[key] for row in rows(count, conversational=True)] for key in ("prompt", "chosen", "rejected")}
    return Dataset.from_dict({**columns, "images": [[Image.fromarray(pixels)] for pixels in noise]})
