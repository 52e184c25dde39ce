"""Per-position statistics of one or two LM heads, in tiles, without materialized logits."""

from .paired_head import PairedHeadStatistics, paired_head_details, paired_head_statistics


__all__ = ["PairedHeadStatistics", "paired_head_details", "paired_head_statistics"]
