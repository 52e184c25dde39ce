"""Configuration that every language-model method shares."""

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from typing import ClassVar

from trl import DPOConfig


def _default(option: dataclasses.Field):
    return option.default_factory() if option.default_factory is not dataclasses.MISSING else option.default


@dataclass
class PreferenceConfig(DPOConfig):
    r"""
    Configuration class for [`PreferenceTrainer`], and the parent of every method's configuration.

    It makes sure that no option of [`~trl.DPOConfig`] is silently ignored: one that a method cannot honour is refused
    here, by name, with the reason and the remedy. Only the parameters added to `DPOConfig` are listed.

    A method's configuration lists what it refuses beyond its parent's in `_refused_options` (option name -> reason),
    and what it takes back in `_honoured_options`.

    Parameters:
        drop_empty_completions (`bool`, *optional*, defaults to `False`):
            Leave out the pairs in which a response is empty, and say how many, instead of refusing the dataset.
        log_token_kl (`bool`, *optional*, defaults to `False`):
            Log the exact sequential KL(reference || policy), summed over each response's tokens, as `kl/chosen`,
            `kl/rejected` and `kl/margin`. Costs a few passes over tiles of logits and no GEMM. Methods whose loss reads
            the KL log it in any case.

        reference_cache_dir (`str`, *optional*):
            Folder of the cache that `precompute_ref_log_probs=True` reads from and adds to; `trl_ext/reference_cache` in
            the `datasets` cache (`HF_DATASETS_CACHE`) by default. Runs share it: what one has computed for a reference
            and a pair, all others find. Nothing in it is needed to resume or to use a trained model.

    Raises:
        `ValueError`: If `beta` is not a positive finite number, or an option that the method cannot honour was given a
            value other than its default.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-6` instead of `5e-5`.
    """

    _refused_options: ClassVar[dict[str, str]] = {
        "loss_type": "the method has one loss of its own. Use `trl.DPOTrainer` for TRL's loss types",
        "loss_weights": "the method has one loss of its own, so there is nothing to weigh it against",
        "ld_alpha": "length desensitisation replaces the log ratio that the method's derivation needs",
        "use_weighting": "WPO weights belong to `trl.DPOTrainer`'s losses",
        "label_smoothing": "TRL reads it in its `robust` and `exo_pair` losses only",
        "discopop_tau": "TRL reads it in its `discopop` loss only",
        "f_divergence_type": "use `FDPOTrainer` with `FDPOConfig(divergence=...)`",
        "f_alpha_divergence_coef": "use `FDPOTrainer` with `FDPOConfig(divergence='alpha', alpha=...)`; note that the "
        "paper's alpha is 1 minus TRL's",
        "padding_free": "TRL 1.16 warns and ignores it; so that nothing is ignored, it is refused here",
    }
    _honoured_options: ClassVar[tuple[str, ...]] = ()

    # An option that only means something beside another one: (option, the one it needs).
    _dependent_options: ClassVar[tuple[tuple[str, str], ...]] = (
        ("ref_model_mixup_alpha", "sync_ref_model"),
        ("ref_model_sync_steps", "sync_ref_model"),
        ("precompute_ref_batch_size", "precompute_ref_log_probs"),
        ("reference_cache_dir", "precompute_ref_log_probs"),
    )

    drop_empty_completions: bool = field(
        default=False,
        metadata={
            "help": "Leave out the pairs in which a response is empty, and say how many, instead of refusing the dataset."
        },
    )

    log_token_kl: bool = field(
        default=False,
        metadata={
            "help": "Log the exact sequential KL(reference || policy), summed over each response's tokens, as `kl/*`."
        },
    )

    reference_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the cache that `precompute_ref_log_probs=True` reads from and adds to. Default: "
            "`trl_ext/reference_cache` in the `datasets` cache (`HF_DATASETS_CACHE`)."
        },
    )

    def __post_init__(self):
        self._check_refused_options()
        self._check_positive("beta")
        if self.log_token_kl and self.precompute_ref_log_probs:
            raise ValueError(
                "`log_token_kl=True` cannot be combined with `precompute_ref_log_probs=True`: the KL needs the "
                "reference's whole next-token distributions, of which precomputing keeps one number a response. Leave one "
                "of them out."
            )
        super().__post_init__()

    def __getstate__(self) -> dict:
        # Transformers pickles the arguments into `training_args.bin`, which goes up with every push: not the token.
        return {**self.__dict__, "hub_token": None}

    def __deepcopy__(self, memo):
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __copy__(self):
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    @classmethod
    def refused_options(cls) -> dict[str, str]:
        """The options that must be left at their defaults, each with the reason."""
        refused = {}
        for parent in reversed(cls.__mro__):
            refused.update(vars(parent).get("_refused_options", {}))
            for option in vars(parent).get("_honoured_options", ()):
                refused.pop(option, None)
        return refused

    def _check_refused_options(self) -> None:
        name = type(self).__name__
        defaults = {option.name: _default(option) for option in dataclasses.fields(self)}
        for option, reason in self.refused_options().items():
            value, default = getattr(self, option), defaults[option]
            if value != default and [value] != default:  # `loss_type` may come as the string or the list
                raise ValueError(
                    f"`{option}={value!r}` is not supported by `{name}`: {reason}. Leave `{option}` at its default "
                    f"({default!r})."
                )
        for option, needed in self._dependent_options:
            value, default = getattr(self, option), defaults[option]
            if value != default and not getattr(self, needed):
                raise ValueError(
                    f"`{option}={value!r}` has no effect unless `{needed}=True`. Set `{needed}=True`, or leave "
                    f"`{option}` at its default ({default!r})."
                )

    def _check_positive(self, option: str) -> None:
        value = getattr(self, option)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise ValueError(
                f"`{option}` must be a positive, finite number, got {value!r}. "
                f"The default is {next(f.default for f in dataclasses.fields(self) if f.name == option)}."
            )
