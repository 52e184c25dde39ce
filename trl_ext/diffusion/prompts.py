"""
Prompts that are longer than a text encoder reads: counted once, instead of printed by diffusers whenever one is
encoded.
"""

import contextlib
import logging

from .data import ImagePreferenceDataset, warn_once_a_run
from .families import PipelineFamily


def warn_of_cut_prompts(family: PipelineFamily, images: ImagePreferenceDataset) -> None:
    """Warns if prompts are longer than a text encoder reads, with their number and that of the tokens."""
    prompts = sorted(set(images.prompts()))
    for name, limit in family.prompt_limits().items():
        tokenizer = getattr(family.pipeline, name, None)
        if tokenizer is None:
            continue
        lengths = [
            len(tokens) for tokens in tokenizer(prompts, truncation=False, padding=False, verbose=False)["input_ids"]
        ]
        cut = sum(length > limit for length in lengths)
        if cut:
            warn_once_a_run(
                f"{cut:,} of the {len(prompts):,} different prompts of the {images.name} dataset are longer than the "
                f"{limit} tokens that the text encoder of `{name}` reads (the longest has {max(lengths)}); what is "
                "beyond has no effect on it."
            )


@contextlib.contextmanager
def without_truncation_warnings(pipeline):
    """
    diffusers prints the rest of every prompt that is cut, at every batch; [`warn_of_cut_prompts`] has counted them.
    """
    logger = logging.getLogger(type(pipeline).__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
