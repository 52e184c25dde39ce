"""Pure loss functions on tensors: no trainer, no model, no I/O. One file a paper."""

from .simper import simper_loss
