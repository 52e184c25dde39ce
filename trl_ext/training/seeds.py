"""Seeds derived from what they are for, and the random state of a part of a run."""

import contextlib
import hashlib

import torch


def derive_seed(*parts) -> int:
    """
    Returns a seed for one purpose, derived from `parts` alone.

    What a window of D2PO or an evaluation samples, chooses and shuffles depends on such seeds and not on how many
    random numbers were drawn before, so a resumed run repeats it.

    Args:
        parts: What the seed is for, such as `(config.seed, "train", window, row)`. Their `repr` counts.

    Returns:
        `int`: A number below 2**56.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


@contextlib.contextmanager
def seeded(device: torch.device, *parts):
    """Seeds torch's generators of the CPU and of `device` with [`derive_seed`], and restores their state on exit."""
    with forked_random_state(device):
        torch.manual_seed(derive_seed(*parts))
        yield


def forked_random_state(device: torch.device):
    """Context that restores the global random state, also the device's, on exit."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)
