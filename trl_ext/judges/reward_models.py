"""Reward models: one way in which judges and D2PO's discriminator load a sequence classifier and read its scores."""

import contextlib
import math
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_layers import GenericForSequenceClassification

from .._trl import get_config_model_id
from ..training.last_states import as_batch, check_last_states, last_states
from ..training.modes import evaluating
from ..training.shared_prompt import SharedPrompts
from .callables import RewardFunctionJudge
from .verdicts import as_text


class RewardModel:
    """
    A sequence classifier with one output, and its tokenizer.

    It reads what [`~trl.RewardTrainer`] trains it on: messages by the chat template, and text followed by the
    end-of-sequence token. Its score is the one at the last token of each sequence, whatever the model's pad token, and
    padding is on the right. Neither the tokenizer nor the model's configuration is changed.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The model, or what `from_pretrained` loads it from.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer; loaded from where the model was by default.
        max_length (`int`, *optional*):
            Tokens kept of prompt and completion, from the end.
        model_init_kwargs (`dict`, *optional*):
            Passed to `from_pretrained`. By default only weights in safetensors are loaded, as a pickle can run code.
        tokenizer_argument (`str`, *optional*, defaults to `"processing_class"`):
            The caller's name for `processing_class`, for messages.

    Raises:
        `TypeError`: If `model` is not a model or a name. `ValueError`: If the model does not have one output, its
        tokenizer is unknown, or its weights are not in safetensors.
    """

    def __init__(
        self,
        model: torch.nn.Module | str,
        processing_class: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
        model_init_kwargs: dict | None = None,
        tokenizer_argument: str = "processing_class",
    ):
        source = model if isinstance(model, str) else None
        loaded: Any = _load(source, model_init_kwargs or {}) if source else model
        if not hasattr(loaded, "config") or not hasattr(loaded, "parameters"):
            raise TypeError(
                f"`model` must be a sequence-classification model or its name, got a `{type(loaded).__name__}`."
            )
        source = source or get_config_model_id(loaded.config)
        self.name = source or type(loaded).__name__
        outputs = getattr(loaded.config, "num_labels", None)
        if outputs != 1:
            raise ValueError(
                f"A reward model has one output; {self.name} has {outputs} outputs (`num_labels={outputs}`). Wrap it "
                "in a function that makes one number of them, and use it as a reward function."
            )
        if processing_class is None:
            if not source:
                raise ValueError(
                    f"`{tokenizer_argument}` is needed: the tokenizer of a `{type(loaded).__name__}` built in memory "
                    "is unknown."
                )
            processing_class = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        self.model, self.processing_class, self.max_length = loaded, processing_class, max_length

    def token_ids(self, prompt, completion) -> list[int]:
        """The tokens of a prompt and its completion, both texts or both messages."""
        tokenizer = self.processing_class
        if not isinstance(completion, str) and getattr(tokenizer, "chat_template", None):
            messages = list(prompt) + list(completion)
            ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        else:
            is_text = isinstance(completion, str)
            text = prompt + completion if is_text else f"{as_text(prompt)}\n\n{as_text(completion)}"
            eos = tokenizer.eos_token or ""
            ids = tokenizer(text=text + ("" if text.endswith(eos) else eos))["input_ids"]
        return list(ids) if self.max_length is None else list(ids)[-self.max_length :]

    def score(self, sequences: list[list[int]], prompts: SharedPrompts | None = None) -> torch.Tensor:
        """
        Scores of token sequences in one forward, in fp32, with gradient where the caller wants one: shape `(N,)`.

        Args:
            sequences (`list[list[int]]`):
                The sequences.
            prompts ([`~trl_ext.training.shared_prompt.SharedPrompts`], *optional*):
                Decides whether they run as one packed row; then those that begin alike should stand in the two halves
                of the list.
        """
        inputs, pad = self._as_batch(sequences)
        rows = None if prompts is None else prompts.rows(self._base, inputs)
        if rows is not None:
            return self._base.score(last_states(self._backbone, inputs, rows))[:, 0].float()
        with _pad_token(self.model, pad):
            batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            return self.model(**batch).logits[:, 0].float()

    def check_layout(self, sequences: list[list[int]], prompts: SharedPrompts) -> None:
        """
        Compares both layouts, the first time it is called; in evaluation mode, and on every process. See
        [`SharedPrompts.check`].
        """
        base = self._base
        if prompts.is_decided(base):
            return
        inputs, _ = self._as_batch(sequences)
        refusal = None
        if type(base).forward is not GenericForSequenceClassification.forward:
            refusal = f"`{type(base).__name__}` may not score the last token's hidden state alone"
        check_last_states(prompts, base, self._backbone, inputs, refusal)

    def _as_batch(self, sequences: list[list[int]]) -> tuple[dict[str, torch.Tensor], int]:
        # Padding is on the right, where no token of a causal model sees it; the mask hides it from other models.
        pad = _unused_token(sequences, self.model.config.get_text_config().vocab_size)
        return as_batch(sequences, pad, next(self.model.parameters()).device), pad

    @property
    def _base(self) -> Any:
        """The classifier itself, under its adapters."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def _backbone(self) -> Any:
        return getattr(self._base, self._base.base_model_prefix, None)


def _load(source: str, model_init_kwargs: dict):
    kwargs = {"use_safetensors": True, "trust_remote_code": False, **model_init_kwargs}
    try:
        return AutoModelForSequenceClassification.from_pretrained(source, **kwargs)
    except OSError as error:
        if kwargs["use_safetensors"] and "safetensors" in str(error):
            raise ValueError(
                f"The reward model {source!r} has no weights in safetensors, and a pickle can run code when it is "
                "loaded. Convert it with `model.save_pretrained(folder)`, or load a model that you trust yourself and "
                "give the object."
            ) from error
        raise


def _unused_token(sequences: list[list[int]], vocabulary: int) -> int:
    """A token id that no sequence has; where together they have all of them, one that none ends with."""
    for used in (set().union(*sequences), {ids[-1] for ids in sequences}):
        unused = next((token for token in range(vocabulary) if token not in used), None)
        if unused is not None:
            return unused
    raise ValueError(f"A vocabulary of {vocabulary} tokens leaves none to pad with. Use `batch_size=1`.")


@contextlib.contextmanager
def _pad_token(model, pad: int):
    """
    Sets the pad token of a classifier's configuration. The classifier reads its score at the last token that is not
    the pad token, which may be missing, or be the end-of-sequence token. With a pad token that no sequence has, that
    is the last one.
    """
    config = model.config.get_text_config()
    original, config.pad_token_id = config.pad_token_id, pad
    try:
        yield
    finally:
        config.pad_token_id = original


def default_device() -> str:
    """The device for models that are loaded here: a CUDA device if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class RewardModelJudge(RewardFunctionJudge):
    """
    A judge from a reward model: a sequence classifier with one output, as [`~trl.RewardTrainer`] trains it; see
    [`RewardModel`].

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The model, or what `from_pretrained` loads it from.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer; loaded from where the model was by default.
        probability (`bool`, *optional*, defaults to `False`):
            Give the Bradley-Terry probability, sigmoid(r_a - r_b), instead of 1, 0 or a tie.
        batch_size (`int`, *optional*, defaults to `8`):
            Completions in a forward.
        max_length (`int`, *optional*):
            Tokens kept of prompt and completion, from the end.
        tie_margin (`float`, *optional*, defaults to `0.0`):
            As for [`RewardFunctionJudge`].
        name (`str`, *optional*):
            Defaults to the model's.
        device (`str`, *optional*):
            Where a model that is loaded here is put; a CUDA device if there is one, by default.
        model_init_kwargs (`dict`, *optional*):
            Passed to `from_pretrained`. By default only weights in safetensors are loaded.
    """

    def __init__(
        self,
        model: torch.nn.Module | str,
        processing_class: PreTrainedTokenizerBase | None = None,
        probability: bool = False,
        batch_size: int = 8,
        max_length: int | None = None,
        tie_margin: float = 0.0,
        name: str | None = None,
        device: str | None = None,
        model_init_kwargs: dict | None = None,
    ):
        self.reward_model = RewardModel(model, processing_class, max_length, model_init_kwargs)
        if isinstance(model, str):
            placed = (model_init_kwargs or {}).keys() & {"device_map", "quantization_config"}
            device = device or (None if placed else default_device())
            if device is not None:
                self.reward_model.model.to(device)
        self.probability, self.batch_size = probability, batch_size
        super().__init__(self._score, tie_margin=tie_margin, name=name or self.reward_model.name)

    @property
    def model(self):
        """The classifier."""
        return self.reward_model.model

    @property
    def processing_class(self):
        """The classifier's tokenizer."""
        return self.reward_model.processing_class

    @property
    def max_length(self) -> int | None:
        """Tokens kept of prompt and completion."""
        return self.reward_model.max_length

    def _ids(self, prompt, completion) -> list[int]:
        return self.reward_model.token_ids(prompt, completion)

    def _score(self, prompts, completions):
        sequences = [self._ids(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        scores = [0.0] * len(sequences)
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))  # similar lengths need little padding
        with evaluating(self.model):
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                for i, value in zip(rows, self.reward_model.score([sequences[i] for i in rows]).tolist(), strict=True):
                    scores[i] = value
        return scores

    def _compare(self, a, b):
        verdict = super()._compare(a, b)
        if not self.probability or verdict is None or math.isnan(verdict):
            return verdict
        return 1 / (1 + math.exp(-max(min(a - b, 500.0), -500.0)))

    def describe(self):
        found = {**super().describe(), "probability": self.probability, "max_length": self.max_length}
        del found["reward_weights"]  # one function, the model
        return found
