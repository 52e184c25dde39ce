"""
Diversity of what a model says.

Sources: distinct-n, https://huggingface.co/papers/1510.03055; self-BLEU, https://huggingface.co/papers/1802.01886; their use
on tuned models, *Understanding the Effects of RLHF on LLM Generalisation and Diversity*,
https://huggingface.co/papers/2310.06452.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from ._arrays import as_array


def distinct_n(
    responses: Sequence[Sequence[Hashable]], n: int, *, length: int | None = None, pooled: bool = False
) -> float | None:
    """
    Distinct n-grams divided by all n-grams.

    It falls with the length of a text whatever its diversity, so two models can only be compared at the same `length`.

    Args:
        responses (`Sequence[Sequence]`):
            Responses as sequences of tokens (ids or strings).
        n (`int`):
            Length of the n-grams.
        length (`int`, *optional*):
            Tokens that count of each response: the first `length`. Shorter responses are left out. By default whole
            responses count.
        pooled (`bool`, *optional*, defaults to `False`):
            Count the n-grams of all responses together (as for samples of one prompt: repetition between them counts),
            instead of averaging over the responses (repetition within each).

    Returns:
        `float`, or `None` where no response is long enough.
    """
    if n < 1 or (length is not None and length < n):
        raise ValueError(f"`n` must be at least 1 and `length` at least `n`, got n={n!r} and length={length!r}.")
    shortest = n if length is None else length
    kept = [list(response)[:length] for response in responses if len(response) >= shortest]
    ngrams = [[tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)] for tokens in kept]
    if not ngrams:
        return None
    if pooled:
        ngrams = [[ngram for grams in ngrams for ngram in grams]]
    return float(np.mean([len(set(grams)) / len(grams) for grams in ngrams]))


def self_bleu(responses: Sequence[str], *, max_order: int = 4, tokenize: str = "13a") -> float:
    """
    Mean sentence BLEU of each response against the others of the same prompt, from 0 to 1; the higher, the less diverse.

    By sacrebleu, with effective order (n-grams longer than the response do not count) and exponential smoothing.

    Args:
        responses (`Sequence[str]`):
            At least two samples of one prompt.
        max_order (`int`, *optional*, defaults to `4`):
            Longest n-grams.
        tokenize (`str`, *optional*, defaults to `"13a"`):
            sacrebleu's tokenizer: `"13a"`, `"intl"`, `"char"`, `"zh"`, or `"none"` for text with spaces between tokens.
    """
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


def predictive_entropy(logits, mask=None) -> float:
    r"""
    Mean entropy of the next-token distributions, `mean_t -sum_v pi_t(v) log pi_t(v)`, in nats a token.

    Args:
        logits (array of shape `(..., V)`):
            Logits over the whole vocabulary.
        mask (array of shape `(...)`, *optional*):
            Non-zero where the position counts: the tokens of responses. f-DPO's code counts the prompt too, so numbers of
            different papers do not compare.
    """
    logits = as_array("logits", logits)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    probs = np.exp(log_probs)
    entropy = -(probs * np.where(probs > 0, log_probs, 0.0)).sum(axis=-1)
    if mask is None:
        return float(entropy.mean())
    mask = as_array("mask", mask) != 0
    if mask.shape != entropy.shape:
        raise ValueError(f"`mask` must have the shape {entropy.shape} of the positions, got {mask.shape}.")
    if not mask.any():
        raise ValueError("`mask` leaves no position.")
    return float(entropy[mask].mean())


def embedding_diversity(embeddings) -> float:
    """
    One minus the mean cosine similarity of all pairs of embeddings: 0 for identical samples, 1 for orthogonal ones.

    Args:
        embeddings (array of shape `(K, D)`):
            Embeddings of at least two samples of one prompt, see [`embed_texts`].
    """
    embeddings = as_array("embeddings", embeddings, 2)
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
    """A model of sentence-transformers by its Hub id or folder; neither code nor pickles that come with it are run."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            'Embedding diversity needs the package `sentence-transformers`: pip install "trl-ext[embeddings]".'
        ) from error
    return SentenceTransformer(model, device=device, trust_remote_code=False, model_kwargs={"use_safetensors": True})


def embed_texts(texts: Sequence[str], model, *, batch_size: int = 32, device: str | None = None) -> np.ndarray:
    """
    Embeddings of texts by a model of sentence-transformers (an optional dependency, `pip install "trl-ext[embeddings]"`).

    Args:
        texts (`Sequence[str]`):
            Texts.
        model (`str` or `sentence_transformers.SentenceTransformer`):
            Hub id or folder, with weights in safetensors; or a loaded model. State it with the number: embeddings of two
            models do not compare.
        batch_size (`int`, *optional*, defaults to `32`):
            Texts in a forward.
        device (`str`, *optional*):
            Where a model given by name runs; chosen by the library by default.

    Returns:
        Array of shape `(len(texts), D)`.
    """
    encoder = load_encoder(model, device) if isinstance(model, str) else model
    return encoder.encode(list(texts), batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False)
