"""
The function that `training_args.bin` of a D2PO run of 0.1.0 names. The module goes in the next release.

The configuration of 0.1.0 was of a class composed at run time, with the parameters of its loss as fields. Pickles of
it call `rebuild_config`, and then [`D2POConfig.__setstate__`], which moves these parameters to `loss_kwargs`.
"""

from typing import Any


def rebuild_config(config_class: type[Any], loss: str) -> Any:
    """An empty configuration, for unpickling."""
    return object.__new__(config_class)
