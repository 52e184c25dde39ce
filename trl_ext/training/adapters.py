"""
Adapters: switching between them, and the checks that the model without its adapter is what training starts from, so
that it can be the reference.
"""

import contextlib
import itertools
from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.functional import set_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.distributed.tensor import DTensor


# Name of the frozen copy of the adapter that training starts from, as in `DPOTrainer`.
REFERENCE_ADAPTER = "ref"

# Initializations that move a part of the base weights into the adapter: the base alone is then no longer the original
# model.
_REWRITING_INITIALIZATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_OUTSIDE = (
    "it acts in PEFT's own forward, around the model whose hidden states are scored here, so it would not be trained"
)
# Kinds of adapters -> what they need beyond a forward and a step of the optimizer.
_NEED_MORE = {
    "ADALORA": "its ranks are allocated by `update_and_allocate` after every step, and its factors kept orthogonal by a "
    "term of the loss, neither of which there is here, so every rank would stay as it is",
    "POLY": "its forward needs the number of each row's task (`task_ids`)",
    "MULTITASK_PROMPT_TUNING": "its forward needs the number of each row's task (`task_ids`)",
    "CARTRIDGE": "it is distilled from a cache of keys and values",
    "CPT": _OUTSIDE,
    "XLORA": _OUTSIDE,
}


# ---- Switching ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def use_adapter(model: torch.nn.Module, name: str | None) -> Iterator[None]:
    """
    Makes one adapter of a model the active one, or switches all adapters off. On exit the active adapters and every
    parameter's `requires_grad` are restored (PEFT makes an adapter trainable when it activates it).

    Args:
        model ([`~peft.PeftModel`] or `torch.nn.Module`):
            The model, not wrapped for several processes; or one into whose layers transformers or diffusers has put
            the adapters.
        name (`str`, *optional*):
            Name of the adapter; `None` for none.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(_restore_trained, [(parameter, parameter.requires_grad) for parameter in model.parameters()])
        if isinstance(model, PeftModel) and name is None:
            stack.enter_context(model.disable_adapter())
        elif isinstance(model, PeftModel):
            stack.callback(_activate, model, model.active_adapter, list(model.active_adapters))
            model.set_adapter(name)
        else:
            # Not by the model's own methods, which leave whole modules that are trained too (`modules_to_save`) as
            # they are, and enable what was not.
            layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
            if name is not None:
                for layer in layers:
                    stack.callback(layer.set_adapter, list(layer.active_adapters))
                set_adapter(model, name)
            else:
                for layer in layers:
                    if not layer.disable_adapters:
                        stack.callback(layer.enable_adapters, True)
                        layer.enable_adapters(False)
        yield


def use_reference_adapter(model: torch.nn.Module):
    """
    Context in which a model with an adapter is its own reference: with the frozen copy of the adapter that training
    started from ([`REFERENCE_ADAPTER`]) if there is one, otherwise without adapter. See [`use_adapter`].
    """
    return use_adapter(model, reference_adapter(model))


def reference_adapter(model: torch.nn.Module) -> str | None:
    """Name of a model's frozen copy of the adapter that training started from; `None` if it has none."""
    return REFERENCE_ADAPTER if REFERENCE_ADAPTER in model.peft_config else None


def complete_reference_adapter(model: torch.nn.Module) -> None:
    """
    Copies the whole of the trained adapter into [`REFERENCE_ADAPTER`], where there is one. TRL copies what lies below
    a module called `default` (LoRA's factors), and not what is itself called that, in a dictionary of parameters or
    buffers: the factors of LoHa, LoKr, IA3, VeRA, BOFT, HRA, FourierFT and others, and trained tokens.
    """
    if not isinstance(model, PeftModel) or reference_adapter(model) is None:
        return
    tensors = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "default" not in parts:
            continue
        copied = tensors.get(".".join(REFERENCE_ADAPTER if part == "default" else part for part in parts))
        if copied is not None and copied.shape == tensor.shape:
            copied.data.copy_(tensor.data)


def _restore_trained(trained: list[tuple[torch.nn.Parameter, bool]]) -> None:
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)


def _activate(model: PeftModel, active: str, together: list[str]) -> None:
    model.set_adapter(active)
    if len(together) > 1:  # which a `PeftModel` knows of in its tuner only
        model.base_model.set_adapter(together)


# ---- What training starts from --------------------------------------------------------------------------------------


def check_needs_no_more(config, is_fresh: bool) -> None:
    """
    Raises `ValueError` for an adapter that needs more of a training than a step of the optimizer, and would silently
    be another one without it.

    Args:
        config ([`~peft.PeftConfig`]):
            The adapter's configuration.
        is_fresh (`bool`):
            Whether the trainer makes the adapter.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"The adapter aLoRA (`alora_invocation_tokens={config.alora_invocation_tokens!r}`) is not supported: "
            f"{_OUTSIDE}. Use a plain `LoraConfig`."
        )
    if kind in _NEED_MORE:
        raise ValueError(
            f"The adapter `{type(config).__name__}` is not supported: {_NEED_MORE[kind]}. Use a plain `LoraConfig`."
        )
    if is_fresh and getattr(config, "init_lora_weights", None) == "eva":
        raise ValueError(
            "`init_lora_weights='eva'` reads the data before training, which the trainer does not do: the adapter "
            "would be a plain LoRA. Make the model yourself (`get_peft_model` and `initialize_lora_eva_weights` of "
            "PEFT) and pass it without `peft_config`, or use `init_lora_weights=True`."
        )


def check_starts_at_base(config, is_fresh: bool, instead: str = "") -> None:
    """
    Raises `ValueError` for an adapter under which the model without it is not what training starts from, or does not
    stay so.

    Args:
        config ([`~peft.PeftConfig`]):
            The adapter's configuration.
        is_fresh (`bool`):
            Whether the adapter is new. One that was trained before may have been loaded without an initialization.
        instead (`str`, *optional*, defaults to `""`):
            What the caller can do instead, in addition to changing the option. It ends the message.
    """
    option = "init_lora_weights" if hasattr(config, "init_lora_weights") else "init_weights"
    init = getattr(config, option, True)
    if isinstance(init, str) and init.lower().startswith(_REWRITING_INITIALIZATIONS):
        why = "rewrites the base weights"
    elif init is False and is_fresh:
        why = "makes an adapter that changes the model before training"
    else:
        why = None
    if why is not None:
        raise ValueError(
            f"`{option}={init!r}` {why}, so the model without its adapter is not what training starts from and cannot "
            f"be its reference. Use `{option}=True`{instead}."
        )
    replicated = getattr(config, "layer_replication", None)
    if replicated:
        raise ValueError(
            f"`layer_replication={replicated!r}` repeats layers of the base, which stay repeated when the adapter is "
            f"switched off: the reference would be another model than the base. Leave it out{instead}."
        )
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise ValueError(
            f"`bias={bias!r}` trains biases of the base, which stay when the adapter is switched off: the reference "
            f"would change in training. Use `bias='none'`{instead}."
        )


def find_nonzero_adapter(model: torch.nn.Module, adapter_name: str) -> str | None:
    """Name of a layer that a LoRA changes, `None` if it changes none, as a fresh one should."""
    for name, module in model.named_modules():
        factors = [getattr(module, f"lora_{side}", {}) for side in "AB"]
        if any(adapter_name not in side for side in factors):
            continue
        if all(bool(side[adapter_name].weight.any()) for side in factors):
            down, up = (side[adapter_name].weight.detach().float().flatten(1) for side in factors)
            # An orthogonal start has two factors whose product is 0 to rounding.
            if down.shape[0] != up.shape[1] or (up @ down).abs().max() > 1e-5 * up.abs().max() * down.abs().max():
                return name
    return None


def shared_parameters(model: torch.nn.Module, ref_model: torch.nn.Module, trained_only: bool = False) -> list[str]:
    """
    Names of the parameters of `model` whose memory `ref_model` uses too, views included: training would change both.

    Args:
        model (`torch.nn.Module`):
            The policy.
        ref_model (`torch.nn.Module`):
            The separate reference.
        trained_only (`bool`, *optional*, defaults to `False`):
            Whether parameters of `model` that are frozen may be shared.
    """

    def storages(module: torch.nn.Module, trained_only: bool) -> dict[int, str]:
        here = ((n, p) for n, p in module.named_parameters() if p.numel() and not p.is_meta)
        here = ((n, p) for n, p in here if not isinstance(p, DTensor) and (p.requires_grad or not trained_only))
        return {p.untyped_storage().data_ptr(): name for name, p in here}

    policy = storages(model, trained_only)
    return sorted(policy[key] for key in policy.keys() & storages(ref_model, False).keys())
