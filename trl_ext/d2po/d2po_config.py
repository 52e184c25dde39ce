"""Configuration of D2PO."""

import dataclasses
import difflib
import warnings
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, cast

from transformers import GenerationConfig, TrainingArguments

from .._checks import NOT_EMPTY, above, at_least, between
from ..preference import PreferenceConfig
from ..preference.method import METHOD_NAMES, get_method
from .generation import vllm_settings
from .loss_options import MethodOptionsParser, accept_method_options, config_for_loss, method_options
from .window import SELECTIONS, TIE_POLICIES


_ONLINE = "the pairs are sampled during training, so there is nothing to compute beforehand"
# Settings in `generation_kwargs` that decide how a token is drawn, which is done with random numbers of each prompt's
# own.
_SAMPLING_SETTINGS = frozenset(
    {
        "constraints",
        "do_sample",
        "dola_layers",
        "early_stopping",
        "epsilon_cutoff",
        "eta_cutoff",
        "force_words_ids",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "penalty_alpha",
        "stop_strings",
        "top_h",
        "typical_p",
        "watermarking_config",
    }
)
# Settings in `generation_kwargs` that have an option of their own, or that the trainer decides.
_OWN_SETTINGS = {
    **{name: f"set `{name}`" for name in ("temperature", "top_p", "top_k", "min_p")},
    **dict.fromkeys(("max_new_tokens", "max_length"), "set `max_completion_length`"),
    **dict.fromkeys(
        ("pad_token_id", "bos_token_id", "eos_token_id"), "set the tokenizer's, or the model's `generation_config`"
    ),
    "use_cache": "leave it out, the cache is always used",
}
# The same with vLLM.
_OWN_VLLM_SETTINGS = {
    "max_tokens": "set `max_completion_length`",
    "n": "set `num_completions`",
    **dict.fromkeys(("logprobs", "prompt_logprobs", "output_kind", "detokenize"), "leave it out"),
}


# What the configuration of the loss's method shares with D2PO's: every option of preference training, and the
# precision.
_SHARED_OPTIONS = [
    option.name
    for option in dataclasses.fields(PreferenceConfig)
    if option.name not in {inherited.name for inherited in dataclasses.fields(TrainingArguments)}
]
_SHARED_OPTIONS += ["use_cpu", "bf16", "fp16", "tf32"]


@accept_method_options
@dataclass
class D2POConfig(PreferenceConfig):
    r"""
    Configuration class for [`D2POTrainer`].

    Only the parameters that D2PO adds or changes are listed; the others are those of [`~trl.DPOConfig`].

    Parameters:
        loss (`str`, *optional*, defaults to `"dpo"`):
            Loss of the pairs: `"dpo"`, `"ipo"`, or a method of this project: `"fdpo"`, `"mallows"`, `"rainbowpo"`,
            `"simper"` or `"tdpo"`. It cannot be changed after construction.
        loss_kwargs (`dict`, *optional*):
            Parameters of the method that `loss` names, as its own configuration has them: with `loss="tdpo"`,
            `{"variant": "tdpo1"}`. On the command line, as JSON. Parameters that are left out have the method's
            defaults.
        beta (`float`, *optional*):
            The method's beta. `None` is the method's own default: 10 for `loss="rainbowpo"`, 0.1 for the others.

        > Parameters of sampling

        num_completions (`int`, *optional*, defaults to `2`):
            Completions sampled of each prompt. With more than two, the pair is the one that the discriminator scores
            highest and the one it scores lowest.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Tokens at which a completion is cut. `max_length` must hold it and the prompt.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits in sampling; the default samples from the unmodified distribution.
        top_p (`float`, *optional*, defaults to `1.0`):
            Truncation to the most probable tokens that together have this probability.
        top_k (`int`, *optional*, defaults to `0`):
            Truncation to this many tokens; 0 truncates nothing.
        min_p (`float`, *optional*):
            Truncation of tokens below this share of the most probable one's probability.
        generation_kwargs (`dict`, *optional*):
            Further settings of [`~transformers.GenerationConfig`], such as `repetition_penalty` or `min_new_tokens`.
        generation_batch_size (`int`, *optional*, defaults to `32`):
            Completions generated at once by each process.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Sample with vLLM, which must be installed. A resumed run then does not repeat its completions.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`):
            `"colocate"`, in the training processes, or `"server"`, on one started with `trl vllm-serve`.
        vllm_server_base_url (`str`, *optional*):
            The server's address, such as `"http://localhost:8000"`.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of the GPU's memory that vLLM takes in colocate mode.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            GPUs that vLLM spreads the model over in colocate mode.

        > Parameters of the windows and the labels

        window_size (`int`, *optional*):
            Pairs in a window, over all processes: they are sampled together, the gold labels are chosen among them,
            and the policy is then trained on them. A multiple of the pairs of an optimizer step; by default, those of
            4 steps.
        num_policy_epochs (`int`, *optional*, defaults to `1`):
            Passes of the policy over each window.
        labels_per_window (`int`, *optional*):
            Gold labels bought in a window, over all processes. By default one pair in eight; `window_size` labels
            every pair.
        label_budget (`int`, *optional*):
            Gold labels at most, over all processes and resumptions. `0` buys none: online DPO with a fixed
            discriminator.
        selection (`str`, *optional*, defaults to `"confidence"`):
            Which pairs of the window to buy labels for: `"confidence"`, those whose scores are nearest;
            `"disagreement"`, those about which the discriminator's members, or its dropouts, disagree most;
            `"random"`.
        tie_policy (`str`, *optional*, defaults to `"discriminator"`):
            What a gold tie trains: `"discriminator"`, only the discriminator, toward equal scores; `"silver"`, that,
            and the policy in the discriminator's order; `"drop"`, nothing.
        ledger_file (`str`, *optional*):
            Where the gold labels are written; `gold_labels.jsonl` in `output_dir` by default.
        label_batch_size (`int`, *optional*, defaults to `16`):
            Comparisons in a call of the labeler.
        label_retries (`int`, *optional*, defaults to `2`):
            How often a call of the labeler that raised is repeated.
        label_retry_delay (`float`, *optional*, defaults to `1.0`):
            Seconds before it is repeated, doubled each time.
        label_timeout (`float`, *optional*):
            Seconds to wait for the next verdict; no limit by default.

        > Parameters of the discriminator

        discriminator (`str`, *optional*, defaults to `"adapter"`):
            `"adapter"`: a reward head on a further LoRA adapter of the policy's base. `"self"`: the policy's own
            implicit reward (self-rewarding). `"none"`: no discriminator, every pair is labeled by gold. Anything else
            is the name or folder of a sequence-classification model with one output.
        discriminator_learning_rate (`float`, *optional*, defaults to `1e-4`):
            Constant learning rate of AdamW; `0.0` leaves the discriminator unchanged.
        discriminator_epochs (`int`, *optional*, defaults to `4`):
            Passes over the gold labels of each window.
        discriminator_batch_size (`int`, *optional*, defaults to `16`):
            Comparisons in a batch, over all processes.
        replay_decay (`float`, *optional*, defaults to `0.8`):
            In each pass a gold label that is k windows old is used with probability `replay_decay ** k`: 0 trains on
            the window's own labels only, as the paper's code does, 1 on all so far.
        rescore (`bool`, *optional*, defaults to `True`):
            Score the window again with the updated discriminator before its pairs are ordered. The paper's code does
            not.
        discriminator_lora_r (`int`, *optional*, defaults to `8`):
            LoRA rank of the discriminator's adapter, which is on the same modules as the policy's.
        discriminator_lora_alpha (`int`, *optional*, defaults to `32`):
            LoRA alpha of that adapter.
        discriminator_lora_dropout (`float`, *optional*, defaults to `0.1`):
            LoRA dropout of that adapter.
        discriminator_ensemble_size (`int`, *optional*, defaults to `1`):
            Number of adapters; their mean score is used.
        dropout_samples (`int`, *optional*, defaults to `8`):
            Forwards with dropout that `selection="disagreement"` uses if the ensemble has one member.
        warm_start_epochs (`int`, *optional*, defaults to `1`):
            Passes over `discriminator_dataset` before the first window.
        collapse_windows (`int`, *optional*, defaults to `5`):
            Windows over which the discriminator's accuracy on fresh gold is watched: a warning says when it is at
            chance.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-6` instead of `5e-5`.
    """

    _dependent_options: ClassVar[tuple[tuple[str, str], ...]] = (
        ("vllm_mode", "use_vllm"),
        ("vllm_server_base_url", "use_vllm"),
        ("vllm_gpu_memory_utilization", "use_vllm"),
        ("vllm_tensor_parallel_size", "use_vllm"),
    )

    _refused_options: ClassVar[dict[str, str]] = {
        "precompute_ref_log_probs": _ONLINE,
        "precompute_ref_batch_size": _ONLINE,
        "reference_cache_dir": _ONLINE,
        "drop_empty_completions": "the completions are the policy's own; an empty one is its EOS token, which is "
        "trained on",
        "truncation_mode": "prompts that leave no room for a completion are left out, so nothing is ever truncated",
        "auto_find_batch_size": "windows are made of whole batches, whose size must not change",
        "ignore_data_skip": "a resumed run continues in the middle of a window",
    }

    _VALID_DICT_FIELDS = PreferenceConfig._VALID_DICT_FIELDS + ["loss_kwargs"]
    _parser_class: ClassVar[type] = MethodOptionsParser

    # Every method has a beta; here `None` stands for the default of the method until the constructor ends.
    beta: Annotated[float | None, above(0)] = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "The beta of the method that `loss` names. Default: that method's own (rainbowpo 10, others 0.1)."
        },
    )
    loss: str = field(
        default="dpo",
        metadata={
            "help": "Loss of the pairs: that of DPO, IPO, or another method of this project.",
            "choices": METHOD_NAMES,
        },
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Parameters of the method that `loss` names, as its own configuration has them, such as "
            "'{\"variant\": \"tdpo1\"}' with `loss='tdpo'`."
        },
    )

    num_completions: Annotated[int, at_least(2)] = field(
        default=2,
        metadata={
            "help": "Completions sampled of each prompt. With more than two, the pair is the one that the "
            "discriminator scores highest and the one it scores lowest."
        },
    )
    max_completion_length: Annotated[int, at_least(1)] = field(
        default=256,
        metadata={"help": "Tokens at which a completion is cut. `max_length` must hold it and the prompt."},
    )
    temperature: Annotated[float, above(0)] = field(default=1.0, metadata={"help": "Temperature of sampling."})
    top_p: Annotated[float, between(0, 1, "(]")] = field(
        default=1.0, metadata={"help": "Cumulative probability of the likeliest tokens sampled from."}
    )
    top_k: Annotated[int, at_least(0)] = field(
        default=0, metadata={"help": "Number of the likeliest tokens sampled from; 0 for all."}
    )
    min_p: Annotated[float | None, between(0, 1)] = field(
        default=None, metadata={"help": "Least probability of a token sampled, relative to the likeliest."}
    )
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Further settings of `GenerationConfig`, such as '{\"repetition_penalty\": 1.1}'.",
        },
    )
    generation_batch_size: Annotated[int, at_least(1)] = field(
        default=32, metadata={"help": "Completions generated at once by each process."}
    )

    use_vllm: bool = field(default=False, metadata={"help": "Sample with vLLM, which must be installed."})
    vllm_mode: str = field(
        default="colocate",
        metadata={
            "help": "'colocate' (in the training processes) or 'server' (started with `trl vllm-serve`).",
            "choices": ["colocate", "server"],
        },
    )
    vllm_server_base_url: Annotated[str | None, NOT_EMPTY] = field(
        default=None, metadata={"help": "The vLLM server's address, such as 'http://localhost:8000'."}
    )
    vllm_gpu_memory_utilization: Annotated[float, between(0, 1, "(]")] = field(
        default=0.3, metadata={"help": "Share of the GPU's memory for vLLM in the training processes."}
    )
    vllm_tensor_parallel_size: Annotated[int, at_least(1)] = field(
        default=1, metadata={"help": "GPUs that vLLM in the training processes splits the model over."}
    )

    window_size: Annotated[int | None, at_least(1)] = field(
        default=None,
        metadata={
            "help": "Pairs in a window, over all processes: sampled together, chosen among for gold labels, then "
            "trained on. A multiple of the pairs of an optimizer step; by default, those of 4 steps."
        },
    )
    num_policy_epochs: Annotated[int, at_least(1)] = field(
        default=1, metadata={"help": "Passes of the policy over each window."}
    )
    labels_per_window: Annotated[int | None, at_least(0)] = field(
        default=None,
        metadata={
            "help": "Gold labels bought in a window, over all processes. By default one pair in eight; `window_size` "
            "labels every pair."
        },
    )
    label_budget: Annotated[int | None, at_least(0)] = field(
        default=None,
        metadata={"help": "Gold labels at most, over all processes and resumptions. 0 buys none."},
    )
    selection: str = field(
        default="confidence",
        metadata={
            "help": "Which pairs of the window to buy labels for: 'confidence' (nearest scores), 'disagreement' (of "
            "the discriminator's members or dropouts), 'random'.",
            "choices": list(SELECTIONS),
        },
    )
    tie_policy: str = field(
        default="discriminator",
        metadata={
            "help": "What a gold tie trains: 'discriminator' (only it, toward equal scores), 'silver' (that, and the "
            "policy in the discriminator's order), 'drop' (nothing).",
            "choices": list(TIE_POLICIES),
        },
    )
    ledger_file: Annotated[str | None, NOT_EMPTY] = field(
        default=None,
        metadata={"help": "Where gold labels are written; `gold_labels.jsonl` in `output_dir` by default."},
    )
    label_batch_size: Annotated[int, at_least(1)] = field(
        default=16, metadata={"help": "Comparisons in a call of the labeler."}
    )
    label_retries: Annotated[int, at_least(0)] = field(
        default=2, metadata={"help": "How often a call of the labeler that raised is repeated."}
    )
    label_retry_delay: Annotated[float, between(0, 1e6)] = field(
        default=1.0, metadata={"help": "Seconds before such a call is repeated, doubled each time."}
    )
    label_timeout: Annotated[float | None, between(0, 1e6, "(]")] = field(
        default=None, metadata={"help": "Seconds to wait for the next verdict; no limit by default."}
    )

    discriminator: Annotated[str, NOT_EMPTY] = field(
        default="adapter",
        metadata={
            "help": "'adapter' (a reward head on a further LoRA adapter of the policy's base), 'self' (the policy's "
            "implicit reward), 'none' (every pair is labeled by gold), or the name of a sequence-classification model."
        },
    )
    discriminator_learning_rate: Annotated[float, at_least(0)] = field(
        default=1e-4, metadata={"help": "Learning rate of the discriminator, constant; 0 keeps it as it is."}
    )
    discriminator_epochs: Annotated[int, at_least(0)] = field(
        default=4, metadata={"help": "Passes over the gold labels of each window."}
    )
    discriminator_batch_size: Annotated[int, at_least(1)] = field(
        default=16, metadata={"help": "Comparisons in a batch of the discriminator, over all processes."}
    )
    replay_decay: Annotated[float, between(0, 1)] = field(
        default=0.8,
        metadata={
            "help": "In each pass a gold label that is k windows old is used with probability replay_decay ** k: 0 "
            "for the window's own only, as in the paper's code, 1 for all so far."
        },
    )
    rescore: bool = field(
        default=True,
        metadata={"help": "Score the window again with the updated discriminator before its pairs are ordered."},
    )
    discriminator_lora_r: Annotated[int, at_least(1)] = field(
        default=8, metadata={"help": "Rank of the discriminator's adapter."}
    )
    discriminator_lora_alpha: Annotated[int, at_least(1)] = field(
        default=32, metadata={"help": "Alpha of the discriminator's adapter."}
    )
    discriminator_lora_dropout: Annotated[float, between(0, 1, "[)")] = field(
        default=0.1, metadata={"help": "Dropout of the discriminator's adapter."}
    )
    discriminator_ensemble_size: Annotated[int, at_least(1)] = field(
        default=1, metadata={"help": "Adapters, whose mean score counts."}
    )
    dropout_samples: Annotated[int, at_least(2)] = field(
        default=8,
        metadata={"help": "Forwards with dropout that selection='disagreement' takes where the ensemble is of one."},
    )
    warm_start_epochs: Annotated[int, at_least(0)] = field(
        default=1, metadata={"help": "Passes over `discriminator_dataset` before the first window."}
    )
    collapse_windows: Annotated[int, at_least(1)] = field(
        default=5,
        metadata={"help": "Windows over which the discriminator's accuracy on fresh gold is watched."},
    )

    @classmethod
    def for_loss(cls, loss: str) -> type["D2POConfig"]:
        """
        Deprecated: a class for a parser, with this loss as the default and its parameters as options. `D2POConfig`
        itself takes them as `loss_kwargs`.
        """
        warnings.warn(
            f"`D2POConfig.for_loss({loss!r})` is deprecated and will be removed in the next release. Use "
            f"`D2POConfig(loss={loss!r}, loss_kwargs=...)`, or give `D2POConfig` to the parser.",
            FutureWarning,
            stacklevel=2,
        )
        return config_for_loss(cls, loss)

    def _check_options(self) -> None:
        super()._check_options()
        if self.beta is None:
            options = dataclasses.fields(get_method(self.loss).config_class)
            self.beta = next(cast(float, option.default) for option in options if option.name == "beta")
        self._check_generation_kwargs()
        self._check_lengths()

    def __post_init__(self):
        super().__post_init__()
        self.make_method_args()
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"`train_sampling_strategy={self.train_sampling_strategy!r}` is not supported by `D2POConfig`: "
                "prompts are drawn a window at a time. Use 'random' or 'sequential'."
            )
        self._resolve_window()

    def __setattr__(self, name, value):
        if name == "loss" and value != vars(self).get("loss", value):
            raise AttributeError(
                f"`loss={value!r}`: the loss of a configuration cannot be changed, as `beta={self.beta!r}` and "
                f"`loss_kwargs` were checked for {self.loss!r}. Make a new `D2POConfig(loss={value!r}, ...)`."
            )
        super().__setattr__(name, value)

    def __setstate__(self, state: dict) -> None:
        # In 0.1.0 the method's parameters were options of the configuration.
        options = method_options(state["loss"])
        given = {name: state[name] for name in options if name in state and state[name] != options[name].default}
        state = {name: value for name, value in state.items() if name not in options}
        self.__dict__.update({**state, "loss_kwargs": state.get("loss_kwargs") or given or None})

    def make_method_args(self) -> PreferenceConfig:
        """
        The configuration of the method that `loss` names, from `loss_kwargs` and the options that it shares with this
        one.

        Raises:
            `ValueError`: If the method does not have one of these parameters, or refuses the value of one.
        """
        options, given = method_options(self.loss), cast(dict, self.loss_kwargs or {})  # JSON text has been parsed
        for name, value in given.items():
            if name in _SHARED_OPTIONS:
                raise ValueError(f"`loss_kwargs` has {name!r}: set `{name}={value!r}` on `D2POConfig` instead.")
            if name not in options:
                known = ", ".join(map(repr, options)) or "none"
                raise ValueError(
                    f"`loss_kwargs` has {name!r}, which is not a parameter of `loss={self.loss!r}`. Its parameters: "
                    f"{known}."
                )
        if self.loss == "dpo" and given.get("divergence", "reverse_kl") != "reverse_kl":
            raise ValueError(
                f"`loss_kwargs` has the divergence {given['divergence']!r}, which is not DPO's. Use `loss='fdpo'` "
                "with it, or leave it out."
            )
        shared = {name: getattr(self, name) for name in _SHARED_OPTIONS}
        return get_method(self.loss).config_class(self.output_dir, **shared, **given)

    def _check_generation_kwargs(self) -> None:
        given = self.generation_kwargs
        if not given:
            return
        assert isinstance(given, dict)  # JSON text has been read
        if self.use_vllm:
            library, known, own = "vllm.SamplingParams", vllm_settings(), {**_OWN_SETTINGS, **_OWN_VLLM_SETTINGS}
            if self.vllm_mode == "colocate":
                own["seed"] = "leave it out, as all completions of a prompt would be the same"
        else:
            known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
            library, own = "transformers.GenerationConfig", _OWN_SETTINGS
        for name in given:
            if name in own:
                raise ValueError(f"`generation_kwargs` has {name!r}: {own[name]}.")
            if name in _SAMPLING_SETTINGS or name.startswith(("assistant_", "output_", "return_", "prompt_lookup_")):
                raise ValueError(
                    f"`generation_kwargs` has {name!r}, which is not supported: completions are sampled token by "
                    "token, with random numbers of each prompt's own. `temperature`, `top_p`, `top_k` and `min_p` "
                    "shape the distribution."
                )
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise ValueError(
                    f"`generation_kwargs` has {name!r}, which is no setting of `{library}`."
                    + (f" Did you mean {near[0]!r}?" if near else "")
                )

    def _check_lengths(self) -> None:
        if self.max_length is not None and self.max_completion_length >= self.max_length:
            raise ValueError(
                f"`max_completion_length={self.max_completion_length}` leaves no room for a prompt in "
                f"`max_length={self.max_length}`. Lower it, or raise `max_length`."
            )

    def _resolve_window(self) -> None:
        """Fills in the sizes that were left at `None`, and raises `ValueError` for impossible ones."""
        per_step = self.train_batch_size * self.gradient_accumulation_steps * self.world_size
        if self.window_size is None:
            self.window_size = 4 * per_step
        if self.window_size < 1 or self.window_size % per_step:
            raise ValueError(
                f"`window_size={self.window_size}` must be a multiple of the {per_step} pairs of an optimizer step "
                f"(`per_device_train_batch_size` {self.train_batch_size} x `gradient_accumulation_steps` "
                f"{self.gradient_accumulation_steps} x {self.world_size} processes): the policy is trained on whole "
                "windows."
            )
        if self.labels_per_window is None:
            self.labels_per_window = (
                self.window_size if self.discriminator == "none" else max(1, self.window_size // 8)
            )
            if self.label_budget == 0:
                self.labels_per_window = 0
        if not 0 <= self.labels_per_window <= self.window_size:
            raise ValueError(
                f"`labels_per_window={self.labels_per_window}` must be between 0 and "
                f"`window_size={self.window_size}`: there are no more pairs to label."
            )
        if self.label_budget and self.label_budget < self.labels_per_window:
            raise ValueError(
                f"`label_budget={self.label_budget}` does not last for one window of "
                f"`labels_per_window={self.labels_per_window}`. Raise it, lower `labels_per_window`, or set it to 0 "
                "to buy none."
            )
        if self.discriminator == "none":
            if not self.buys_labels:
                raise ValueError(
                    "Without gold labels (`label_budget=0` or `labels_per_window=0`) and without a discriminator "
                    "(`discriminator='none'`) nothing orders the pairs. Give one of them."
                )
            if self.labels_per_window < self.window_size:
                raise ValueError(
                    f"`discriminator='none'` leaves {self.window_size - self.labels_per_window} pairs of each window "
                    f"without an order. Set `labels_per_window={self.window_size}`, all of the window, or choose a "
                    "discriminator."
                )
            if self.num_completions > 2:
                raise ValueError(
                    f"`num_completions={self.num_completions}` needs a discriminator, which says which two of them "
                    "are the pair. Set it to 2, or choose a `discriminator`."
                )
            if self.selection != "confidence":
                raise ValueError(
                    f"`selection={self.selection!r}` has no effect with `discriminator='none'`, which labels every "
                    "pair. Leave it out."
                )
        if self.selection == "disagreement" and self.discriminator_ensemble_size == 1:
            if self.discriminator == "self":
                raise ValueError(
                    "`selection='disagreement'` needs dropout or an ensemble, and `discriminator='self'` has neither. "
                    "Use 'confidence' or 'random'."
                )
            if self.discriminator == "adapter" and self.discriminator_lora_dropout == 0:
                raise ValueError(
                    "`selection='disagreement'` needs dropout or an ensemble. Set `discriminator_lora_dropout` above "
                    "0, or `discriminator_ensemble_size` above 1."
                )
        if self.discriminator != "adapter" and self.discriminator_ensemble_size > 1:
            raise ValueError(
                f"`discriminator_ensemble_size={self.discriminator_ensemble_size}` is a number of adapters and has no "
                f"effect with `discriminator={self.discriminator!r}`. An ensemble of models is a list of them, given "
                "to the trainer as `discriminator`."
            )

    @property
    def resolved_window_size(self) -> int:
        """`window_size`, which the constructor sets where it was not given."""
        assert self.window_size is not None
        return self.window_size

    @property
    def buys_labels(self) -> bool:
        """Whether this run asks for gold labels at all."""
        return self.label_budget != 0 and bool(self.labels_per_window)
