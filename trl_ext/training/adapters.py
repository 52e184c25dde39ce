"""Checks that the model without its LoRA is what training starts from, so that it can be the reference."""

import torch


# Initializations that move a part of the base weights into the adapter: the base alone is then no longer the original
# model.
_REWRITING_INITIALIZATIONS = ("pissa", "olora", "corda", "loftq")


def check_lora_config(peft_config, is_fresh: bool = True) -> None:
    """
    Raises `ValueError` for a `LoraConfig` under which the model with the LoRA switched off is not what training starts
    from, or does not stay so.

    Args:
        peft_config (`peft.LoraConfig`):
            The configuration.
        is_fresh (`bool`, *optional*, defaults to `True`):
            Whether the LoRA is new. One that was trained before may have been loaded without an initialization.
    """
    init = getattr(peft_config, "init_lora_weights", True)
    if (init is False and is_fresh) or (isinstance(init, str) and init.startswith(_REWRITING_INITIALIZATIONS)):
        why = "draws a LoRA that changes the model" if init is False else "rewrites the base weights"
        raise ValueError(
            f"`init_lora_weights={init!r}` of the `LoraConfig` is not supported: it {why}, so that the model without "
            "the LoRA, which is the reference, is not the model that training starts from. Use "
            "`init_lora_weights=True` or 'gaussian'."
        )
    bias = getattr(peft_config, "bias", "none")
    if bias != "none":
        raise ValueError(
            f"`bias={bias!r}` of the `LoraConfig` is not supported: it trains biases of the base model, so that the "
            "model without the LoRA, which is the reference, would change in training. Use `bias='none'`."
        )
    if getattr(peft_config, "trainable_token_indices", None):
        raise ValueError(
            f"`trainable_token_indices={peft_config.trainable_token_indices!r}` of the `LoraConfig` is not supported: "
            "it trains embeddings beside the LoRA. Leave it out."
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
