"""What vLLM can and cannot do for training, beyond what TRL checks."""


def check_vllm(mode: str) -> None:
    """
    Refuses a vLLM in the training process that cannot take the policy's weights.

    Args:
        mode (`str`): `"colocate"` or `"server"`; TRL itself refuses a server for a policy that is not on CUDA.

    Raises:
        `ValueError`: For vLLM's CPU build. It packs linear layers when it has loaded them and drops the parameters,
            so the first update of the weights would end in `'Parameter' object has no attribute 'weight_loader'`.
    """
    if mode == "colocate" and packs_weights():
        raise ValueError(
            "`use_vllm=True` needs a vLLM whose weights can be updated, and the installed one is a CPU build, which "
            "packs its weights for good when it loads them. Leave `use_vllm` at False on a CPU, or train on a GPU."
        )


def packs_weights() -> bool:
    """Whether the installed vLLM is a CPU build. False where vLLM is not installed, of which TRL tells."""
    try:
        from vllm.platforms import current_platform
    except ImportError:
        return False
    return bool(current_platform.is_cpu())
