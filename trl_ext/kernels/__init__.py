"""Per-position statistics of one or two LM heads, in tiles, without materialized logits."""

from .paired_head import (
    HeadStatistics,
    PairedHeadStatistics,
    head_statistics,
    paired_head_details,
    paired_head_statistics,
)


__all__ = [
    "HeadStatistics",
    "PairedHeadStatistics",
    "head_statistics",
    "paired_head_details",
    "paired_head_statistics",
]
