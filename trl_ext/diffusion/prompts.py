"""
Prompts that are longer than a text encoder reads: counted once, instead of printed by diffusers whenever one is
encoded.
"""

import contextlib
import logging
from typing import NamedTuple

from .data import ImagePreferenceDataset, warn_once_a_run
from .families import PipelineFamily
from .prompt_data import PromptDataset


class CutPrompts(NamedTuple):
    """
    Prompts that are longer than a text encoder reads.

    Args:
        tokenizer (`str`): Name of the encoder's tokenizer in the pipeline.
        cut, prompts (`int`): Number of different prompts that are cut, and of all.
        limit, longest (`int`): Tokens that the encoder reads, and those of the longest prompt.
    """

    tokenizer: str
    cut: int
    prompts: int
    limit: int
    longest: int


def count_cut_prompts(family: PipelineFamily, images: ImagePreferenceDataset | PromptDataset) -> list[CutPrompts]:
    """What each text encoder cuts of the prompts; nothing for an encoder that reads all of them whole."""
    prompts = sorted(set(images.prompts()))
    found = []
    for name, limit in family.prompt_limits().items():
        lengths = family.count_tokens(name, prompts)
        cut = sum(length > limit for length in lengths)
        if cut:
            found.append(CutPrompts(name, cut, len(prompts), limit, max(lengths)))
    return found


def warn_of_cut_prompts(family: PipelineFamily, images: ImagePreferenceDataset | PromptDataset) -> None:
    """Warns if prompts are longer than a text encoder reads, with their number and that of the tokens."""
    for found in count_cut_prompts(family, images):
        warn_once_a_run(
            f"{found.cut:,} of the {found.prompts:,} different prompts of the {images.name} dataset are longer than "
            f"the {found.limit} tokens that the text encoder of `{found.tokenizer}` reads (the longest has "
            f"{found.longest}); what is beyond has no effect on it."
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
