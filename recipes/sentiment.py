"""
The controlled-sentiment task of the quickstart: its prompt, its scorer, sampling, and intervals.

Nothing here knows about a training method, so that the script that made the pairs and the recipe that trains on them
measure with the same ruler.
"""

import re
import statistics
from functools import lru_cache
from pathlib import Path


DATA_DIR = Path(__file__).resolve().parent / "data"
PAIRS_DIR = DATA_DIR / "sentiment_pairs"

# The opening stands inside the assistant's turn: SmolLM2-135M-Instruct, asked for a review and already writing one,
# stays on the subject clearly more often than when it continues the bare opening (README of the pairs has numbers).
# There is no system turn, which would make each sequence a third longer for nothing measurable.
PROMPT_TEMPLATE = "<|im_start|>user\nWrite a short, honest film review.<|im_end|>\n<|im_start|>assistant\n{opening}"


def format_prompt(opening: str) -> str:
    """The prompt, as plain text, that makes the model go on with the `opening` of a film review."""
    return PROMPT_TEMPLATE.format(opening=opening)


def opening_of(prompt: str) -> str:
    """The opening inside a prompt made by [`format_prompt`]."""
    head, _, tail = PROMPT_TEMPLATE.partition("{opening}")
    if not (prompt.startswith(head) and prompt.endswith(tail)):
        raise ValueError(f"prompt was not made by `format_prompt`: {prompt!r}")
    return prompt[len(head) : len(prompt) - len(tail)]


@lru_cache(maxsize=1)
def _analyzer():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError(
            "the sentiment scorer needs the package `vaderSentiment`: pip install 'trl-ext[quickstart]'"
        ) from error
    return SentimentIntensityAnalyzer()


def gold_scores(texts: list[str]) -> list[float]:
    """
    VADER's compound sentiment of each text, from -1 (most negative) to 1 (most positive); 0 for an empty text.

    A fixed lexicon and fixed rules: no weights to download, the same number on every machine, and microseconds a text.
    Pass completions without their opening: the opening is the same in both halves of a pair, and some openings hold
    words ("love story", "horror movie") that would move both scores.
    """
    analyzer = _analyzer()
    return [float(analyzer.polarity_scores(text)["compound"]) if text.strip() else 0.0 for text in texts]


def finished_sentences(text: str) -> str:
    """
    The first paragraph of `text` up to its last complete sentence; empty if it has none.

    A sample stops at its token limit, mostly inside a sentence. Trained on as it is, with the end-of-sequence token
    that trainers append, it would teach the model to stop anywhere.
    """
    paragraph = text.split("\n", 1)[0].rstrip()
    ends = [match.end() for match in re.finditer(r"[.!?]+[\"'”’)]*(?=\s|$)", paragraph)]
    return paragraph[: ends[-1]] if ends else ""


def sample_completions(
    model,
    tokenizer,
    prompts: list[str],
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.85,
    top_p: float = 0.95,
    num_samples: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> list[str]:
    """
    Samples `num_samples` completions of each prompt.

    The same arguments give the same texts on the same machine: every batch has its own seed, and the caller's random
    state, the model's mode and the tokenizer's padding side are left as they were.

    Args:
        model: Causal language model (plain or with adapters), on any device.
        tokenizer: Its tokenizer.
        prompts: Plain-text prompts. They may hold special tokens as text; none are added.
        max_new_tokens, temperature, top_p: Of the sampling.
        num_samples: Completions per prompt.
        seed: Of the whole call.
        batch_size: Sequences (not prompts) generated at once.
        progress: Whether to show a progress bar.

    Returns:
        `list[str]`: `len(prompts) * num_samples` completions, without their prompts; those of prompt `i` are at
        `[i * num_samples : (i + 1) * num_samples]`.
    """
    import torch
    from tqdm.auto import tqdm

    rows = [prompt for prompt in prompts for _ in range(num_samples)]
    device = next(model.parameters()).device
    was_training, padding_side = model.training, tokenizer.padding_side
    completions = []
    model.eval()
    # Generation reads the prompt's end, so the padding has to be on the other side.
    tokenizer.padding_side = "left"
    try:
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            for start in tqdm(range(0, len(rows), batch_size), desc="Sampling", unit="batch", disable=not progress):
                torch.manual_seed(seed + start)
                batch = tokenizer(
                    rows[start : start + batch_size], return_tensors="pt", padding=True, add_special_tokens=False
                ).to(device)
                output = model.generate(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    do_sample=True,
                    temperature=temperature,
                    top_p=top_p,
                    top_k=0,  # the library's default of 50 would cut the tail a second time
                    max_new_tokens=max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                    use_cache=True,
                )
                new_tokens = output[:, batch["input_ids"].shape[1] :]
                completions += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    finally:
        tokenizer.padding_side = padding_side
        model.train(was_training)
    return completions


def mean_ci(values: list[float]) -> tuple[float, float, float]:
    """
    Mean of the values and the ends of its 95% interval (Student's t): `(mean, low, high)`.

    Raises:
        ValueError: with fewer than two values, for which there is no interval.
    """
    from scipy import stats

    if len(values) < 2:
        raise ValueError(f"an interval needs at least two values, got {len(values)}")
    mean, error = statistics.fmean(values), stats.sem(values)
    if error == 0:
        return mean, mean, mean
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error)
    return mean, float(low), float(high)
