"""What 4-bit layers must not do while a model is trained."""

import torch


def keep_quantized_weights(model: torch.nn.Module) -> None:
    """
    Keeps bitsandbytes from repacking 4-bit layers of `model` for inference.

    On CPUs with bfloat16 units it does so at a layer's first forward in evaluation mode, for good and with coarser scales:
    after an evaluation, a sample or a reference's forward, training would go on from other weights than it began with.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
