"""Modes of a model that are switched for a while and left as they were found."""

import contextlib

import torch


@contextlib.contextmanager
def evaluation_mode(*models: torch.nn.Module):
    """Evaluation mode of every module: no dropout, no noise on embeddings (NEFTune). Each module's mode is restored on exit."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
