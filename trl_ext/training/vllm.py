"""What vLLM can and cannot do for training, beyond what TRL checks."""

from importlib.util import find_spec

import torch


def check_vllm(mode: str, device: torch.device) -> None:
    """
    Refuses a vLLM that cannot take the policy's weights. Where vLLM is not installed TRL says so.

    Args:
        mode (`str`): `"colocate"` or `"server"`.
        device (`torch.device`): Device of the policy.

    Raises:
        `ValueError`: For a server, if the policy is not on CUDA: TRL would look for the server, and refuse it
            afterward. For vLLM's CPU build in the training process. It packs linear layers when it has loaded them
            and drops the parameters, so the first update of the weights would end in `'Parameter' object has no
            attribute 'weight_loader'`.
    """
    if mode == "server" and device.type != "cuda" and find_spec("vllm") is not None:
        raise ValueError(
            "`vllm_mode='server'` sends the policy's weights to the server by NCCL, which needs them on a CUDA device, "
            f"and the policy is on {str(device)!r}. Train on a GPU, or leave `use_vllm` at False."
        )
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
