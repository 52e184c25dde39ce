"""
Diversity of a model's responses.

Sources: distinct-n, https://huggingface.co/papers/1510.03055; self-BLEU, https://huggingface.co/papers/1802.01886;
their use on tuned models, *Understanding the Effects of RLHF on LLM Generalisation and Diversity*,
https://huggingface.co/papers/2310.06452.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ._arrays import as_array, check_count


ENTROPY_AVERAGES = ("tokens", "responses")


def distinct_n(
    responses: Sequence[Sequence[Hashable]],
    n: int,
    *,
    length: int | None = None,
    pooled: bool = False,
    num_samples: int | None = None,
) -> float | None:
    """
    Distinct n-grams divided by all n-grams.

    It falls with the size of a text whatever its diversity, so two models can only be compared at the same `length`,
    and pooled only with the same `num_samples` too: four samples of 32 tokens repeat themselves more than two of them
    do, and a model whose samples are often too short has fewer of them.

    Args:
        responses (`Sequence[Sequence]`):
            Responses as sequences of tokens (ids or strings).
        n (`int`):
            Length of the n-grams.
        length (`int`, *optional*):
            Tokens that count of each response: the first `length`. Shorter responses are left out. By default whole
            responses count.
        pooled (`bool`, *optional*, defaults to `False`):
            Count the n-grams of several responses together (as for samples of one prompt: repetition between them
            counts), instead of averaging over the responses (repetition within each).
        num_samples (`int`, *optional*):
            Responses in a pool, with `pooled`. Those that are long enough are pooled in order, so many at a time, and
            the mean of the pools is taken; what is left over is left out. By default all that are long enough make one
            pool, which compares only with pools of as many.

    Returns:
        `float`, or `None` where no response, or fewer than `num_samples`, is long enough. Over prompts, average those
        that have a value and state how many they are.

    Raises:
        `ValueError`: For an `n` below 1, a `length` below `n`, or a `num_samples` below 1 or without `pooled`.
        `TypeError`: If `responses` is one text instead of a sequence of responses.
    """
    if isinstance(responses, str):
        raise TypeError("`responses` is one text. Give a sequence of responses, each a sequence of tokens.")
    check_count("n", n, 1)
    if length is not None:
        check_count("length", length, n)
    if num_samples is not None:
        check_count("num_samples", num_samples, 1)
        if not pooled:
            raise ValueError(f"`num_samples={num_samples}` says how many responses are pooled. Set `pooled=True` too.")
    shortest = n if length is None else length
    kept = [list(response)[:length] for response in responses if len(response) >= shortest]
    ngrams = [[tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)] for tokens in kept]
    if pooled:
        size = num_samples or max(1, len(ngrams))
        ends = range(size, len(ngrams) + 1, size)
        ngrams = [[ngram for grams in ngrams[end - size : end] for ngram in grams] for end in ends]
    if not ngrams:
        return None
    return float(np.mean([len(set(grams)) / len(grams) for grams in ngrams]))


def self_bleu(responses: Sequence[str], *, max_order: int = 4, tokenize: str = "13a") -> float:
    """
    Mean sentence BLEU of each response against the others of the same prompt, from 0 to 1; the higher, the less
    diverse.

    By sacrebleu, with effective order (n-grams longer than the response do not count) and exponential smoothing.

    Args:
        responses (`Sequence[str]`):
            At least two samples of one prompt.
        max_order (`int`, *optional*, defaults to `4`):
            Longest n-grams.
        tokenize (`str`, *optional*, defaults to `"13a"`):
            sacrebleu's tokenizer: `"13a"`, `"intl"`, `"char"`, `"zh"`, or `"none"` for text with spaces between
            tokens.

    Returns:
        `float`.

    Raises:
        `ImportError`: Without the package `sacrebleu`.
        `ValueError`: For fewer than two responses, or a `max_order` below 1.
        `TypeError`: If `responses` is one text instead of a sequence of them.
    """
    if isinstance(responses, str):
        raise TypeError("`responses` is one text. Give a sequence of samples of one prompt.")
    check_count("max_order", max_order, 1)
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise ImportError('self-BLEU needs the package `sacrebleu`: pip install "trl-ext[evaluation]".') from error
    responses = list(responses)
    if len(responses) < 2:
        raise ValueError(f"`responses` needs at least 2 samples to compare with each other, got {len(responses)}.")
    bleu = BLEU(max_ngram_order=max_order, effective_order=True, tokenize=tokenize)
    scores = [
        bleu.sentence_score(response, responses[:i] + responses[i + 1 :]).score / 100
        for i, response in enumerate(responses)
    ]
    return float(np.mean(scores).clip(0.0, 1.0))


def predictive_entropy(logits: ArrayLike, mask: ArrayLike | None = None, *, average: str = "tokens") -> float:
    r"""
    Mean entropy of the next-token distributions, `H_t = -sum_v pi_t(v) log pi_t(v)`, in nats a token.

    There are two means, and they differ where long responses are less certain than short ones, or more:

    | `average` | | |
    |---|---|---|
    | `"tokens"` | `sum_{i,t} H_it / sum_i T_i` | every token counts the same: entropy of a random token |
    | `"responses"` | `1/N sum_i 1/T_i sum_t H_it` | every response counts the same |

    The second is the mean of [`ScoredResponses`]' `entropy`, and the entropy of the evaluation report.

    Args:
        logits (array of shape `(..., V)`):
            Logits over the whole vocabulary; `-inf` is an impossible token. With `average="responses"`, of shape
            `(N, T, V)`.
        mask (array of shape `(...)`, *optional*):
            Non-zero where the position counts: the tokens of responses. f-DPO's code counts the prompt too, so numbers
            of different papers do not compare.
        average (`str`, *optional*, defaults to `"tokens"`):
            `"tokens"` or `"responses"`.

    Returns:
        `float`.

    Raises:
        `ValueError`: For no logits, NaN, `+inf`, a position without a token that can be said, a mask of another shape
            or that leaves nothing (of a response, with `average="responses"`), or an unknown `average`.
    """
    if average not in ENTROPY_AVERAGES:
        raise ValueError(f"`average` must be one of {', '.join(ENTROPY_AVERAGES)}, got {average!r}.")
    logits = as_array("logits", logits, 3 if average == "responses" else None)
    if logits.ndim == 0 or logits.size == 0:
        raise ValueError(
            f"`logits` has the shape {logits.shape}: there is nothing to measure. Its last is the vocabulary."
        )
    if np.isposinf(logits).any() or np.isneginf(logits).all(axis=-1).any():
        raise ValueError(
            "`logits` has +inf, or a position with nothing but -inf: no distribution. Check what was scored, or drop "
            "these positions."
        )
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    probs = np.exp(log_probs)
    entropy = -(probs * np.where(probs > 0, log_probs, 0.0)).sum(axis=-1)
    mask = np.ones(entropy.shape, dtype=bool) if mask is None else as_array("mask", mask) != 0
    if mask.shape != entropy.shape:
        raise ValueError(f"`mask` must have the shape {entropy.shape} of the positions, got {mask.shape}.")
    if not mask.any():
        raise ValueError("`mask` leaves no position. Let it be 1 on the tokens of responses.")
    if average == "tokens":
        return float(entropy[mask].mean())
    counts = mask.sum(axis=1)
    if (counts == 0).any():
        raise ValueError(f"`mask` leaves no position of response {int((counts == 0).argmax())}. Leave it out.")
    return float(((entropy * mask).sum(axis=1) / counts).mean())


def embedding_diversity(embeddings: ArrayLike) -> float:
    """
    One minus the mean cosine similarity of all pairs of embeddings: 0 for identical samples, 1 for orthogonal ones.

    Args:
        embeddings (array of shape `(K, D)`):
            Embeddings of at least two samples of one prompt, see [`embed_texts`].

    Returns:
        `float`, in `[0, 2]`.

    Raises:
        `ValueError`: For fewer than two embeddings, values that are not finite, or an embedding of length 0.
    """
    embeddings = as_array("embeddings", embeddings, 2)
    if np.isinf(embeddings).any():
        raise ValueError("`embeddings` has infinite values. Embed in float32.")
    if len(embeddings) < 2:
        raise ValueError(f"`embeddings` needs at least 2 samples to compare with each other, got {len(embeddings)}.")
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if (norms == 0).any():
        raise ValueError("`embeddings` has a vector of length 0, which has no direction. Leave empty responses out.")
    unit = embeddings / norms
    count = len(unit)
    cosines = ((unit.sum(axis=0) ** 2).sum() - count) / (count * (count - 1))
    # Rounding must not make identical samples diverse by less than nothing.
    return float(max(1 - cosines, 0.0))


def load_encoder(model: str, device: str | None = None):
    """
    A model of sentence-transformers by its Hub id or folder; neither code nor pickles that come with it are run.

    Args:
        model (`str`):
            Hub id or folder, with weights in safetensors.
        device (`str`, *optional*):
            Where it runs; chosen by the library by default.

    Returns:
        `sentence_transformers.SentenceTransformer`.

    Raises:
        `ImportError`: Without the package `sentence-transformers`.
        `OSError`: If there is no such model, or none in safetensors.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            'Embedding diversity needs the package `sentence-transformers`: pip install "trl-ext[embeddings]".'
        ) from error
    return SentenceTransformer(model, device=device, trust_remote_code=False, model_kwargs={"use_safetensors": True})


def embed_texts(texts: Sequence[str], model: Any, *, batch_size: int = 32, device: str | None = None) -> np.ndarray:
    """
    Embeddings of texts by a model of sentence-transformers (an optional dependency, `pip install
    "trl-ext[embeddings]"`).

    Args:
        texts (`Sequence[str]`):
            Texts.
        model (`str` or `sentence_transformers.SentenceTransformer`):
            Hub id or folder, with weights in safetensors; or a loaded model. State it with the number: embeddings of
            two models do not compare.
        batch_size (`int`, *optional*, defaults to `32`):
            Texts in a forward.
        device (`str`, *optional*):
            Where a model given by name runs; chosen by the library by default.

    Returns:
        Array of shape `(len(texts), D)`.

    Raises:
        `ImportError`, `OSError`: As [`load_encoder`], for a model given by name.
        `ValueError`: For a `batch_size` below 1.
        `TypeError`: If `texts` is one text instead of a sequence of them.
    """
    if isinstance(texts, str):
        raise TypeError("`texts` is one text. Give a sequence of them.")
    check_count("batch_size", batch_size, 1)
    encoder = load_encoder(model, device) if isinstance(model, str) else model
    return encoder.encode(list(texts), batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False)
