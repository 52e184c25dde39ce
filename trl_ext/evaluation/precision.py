"""The precision in which models are measured."""

import contextlib


@contextlib.contextmanager
def without_autocast(model):
    """
    A model that a trainer prepared for mixed precision (`bf16=True`, TRL's default), in the precision of its weights: what is
    measured must not be rounded. Under bfloat16 autocast the log-probability of a response is off by up to a few tenths of a
    nat, more than many pairs differ by.

    Every runner of this package does this; it is for forwards of your own. Weights that are in half precision themselves, all
    or some, leave nothing to gain, and layers of different precisions may not work together without autocast: such a model is
    left as it is.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model itself, not wrapped for several processes ([`~accelerate.Accelerator.unwrap_model`]).
    """
    # Accelerate puts its autocast around the forward of the instance, where unwrapping leaves it, and keeps what was there.
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
