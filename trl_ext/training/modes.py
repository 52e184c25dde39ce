"""Modes of a model that are switched for a while and restored on exit."""

import contextlib

import torch


@contextlib.contextmanager
def in_mode(training: bool, *models: torch.nn.Module):
    """Training or evaluation mode of every module. Each module's own mode is restored on exit."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def evaluation_mode(*models: torch.nn.Module):
    """
    Evaluation mode of every module: no dropout, no noise on embeddings (NEFTune). Each module's mode is restored on
    exit.
    """
    return in_mode(False, *models)


@contextlib.contextmanager
def without_autocast(model: torch.nn.Module):
    """
    Runs a model that a trainer prepared for mixed precision (`bf16=True`, TRL's default) in the precision of its
    weights.

    Measurements must not be rounded: under bfloat16 autocast the log-probability of a response is off by up to a few
    tenths of a nat, more than many pairs differ by. Every runner of the evaluation does this; use it for forwards of
    your own. A model with weights in half precision is left as it is, since layers of different precisions may not
    work together without autocast.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model itself, not wrapped for several processes ([`~accelerate.Accelerator.unwrap_model`]).
    """
    # Accelerate wraps its autocast around the instance's forward, where unwrapping leaves it, and keeps the original.
    prepared, original = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    half = any(weight.is_floating_point() and weight.element_size() < 4 for weight in model.parameters())
    if prepared is None or original is None or half:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = prepared


@contextlib.contextmanager
def evaluating(model):
    """Evaluation mode, no gradients and no autocast; on exit every module has its own mode again."""
    with torch.no_grad(), evaluation_mode(model), without_autocast(model):
        yield
