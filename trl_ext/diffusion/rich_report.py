"""What became of the images of which preference pairs were to be made."""

import logging
import math
from dataclasses import dataclass, field


logger = logging.getLogger(__name__)


@dataclass
class RichPairsReport:
    """
    What became of the images, filled in by [`make_rich_pairs`].

    Attributes:
        images (`int`):
            Images asked for: prompts times `samples_per_prompt`.
        dropped (`dict[str, int]`):
            Images that gave no pair, by reason: `"not sampled"`, `"black"`, `"no critique"`, `"no instructions"`,
            `"nothing to improve"`, `"edit refused"`, `"edit changes nothing"`, `"no reward"`, `"below the margin"`,
            `"edit is worse"`.
        pairs (`int`):
            Pairs made.
        edited_chosen (`int`):
            Pairs in which the edit is the chosen image.
        gain, round_trip_gain (`tuple[float, float, int]`, *optional*):
            Reward of the edits minus that of their originals: mean, half of its 95 % interval, and number of edits;
            and the same of edits with an empty instruction, which are what the editor alone does to an image.
        pair_distance, sample_distance (`float`, *optional*):
            Mean absolute difference of the pixels, in [0, 1], within the pairs, and between two samples of a prompt.
    """

    images: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    pairs: int = 0
    edited_chosen: int = 0
    gain: tuple[float, float, int] | None = None
    round_trip_gain: tuple[float, float, int] | None = None
    pair_distance: float | None = None
    sample_distance: float | None = None

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def __str__(self) -> str:
        lines = [f"{self.pairs:,} pairs from {self.images:,} images; the edit is chosen in {self.edited_chosen:,}."]
        lines += [f"No pair: {reason}, {count:,}." for reason, count in self.dropped.items()]
        for gain, name in ((self.gain, "an edit"), (self.round_trip_gain, "an edit with an empty instruction")):
            if gain is not None:
                lines.append(f"Reward gained by {name}: {gain[0]:+.4g} +- {gain[1]:.2g} ({gain[2]:,} edits).")
        if self.pair_distance is not None:
            lines.append(f"Distance of the pixels within a pair: {self.pair_distance:.4f}.")
        if self.sample_distance is not None:
            lines.append(f"Distance of the pixels of two samples of a prompt: {self.sample_distance:.4f}.")
        return "\n".join(lines)

    def warn_of_signature(self) -> None:
        """Warns if an edit with an empty instruction gains as much as one with an instruction."""
        if self.gain is None or self.round_trip_gain is None:
            return
        (gain, spread, _), (empty, empty_spread, _) = self.gain, self.round_trip_gain
        if empty > 0 and gain - empty <= math.hypot(spread, empty_spread):
            logger.warning(
                f"Edits gain a reward of {gain:+.4g}, and edits with an empty instruction {empty:+.4g}: what the "
                "editor does to every image may be all that the pairs teach. Pass the originals through the editor, "
                "too, with `round_trip_rejected=True`, or use another editor."
            )
