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
    """Evaluation mode of every module: no dropout, no noise on embeddings (NEFTune). Each module's mode is restored on exit."""
    return in_mode(False, *models)
