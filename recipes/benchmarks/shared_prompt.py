"""
Draws `shared_prompt.png`, the picture of the page on the paired step: a micro-batch on padded rows and on one packed row.

    python recipes/benchmarks/shared_prompt.py
"""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402


PAIRS = [(12, 4, 6), (5, 7, 3)]  # tokens of prompt, chosen and rejected response
COLORS = {"prompt": "#4c78a8", "chosen": "#54a24b", "rejected": "#e45756", "padding": "#e6e6e6"}


def draw(axis, x: float, y: float, count: int, kind: str, hatch: str | None = None) -> float:
    for i in range(count):
        axis.add_patch(
            plt.Rectangle((x + i, y), 0.9, 0.8, facecolor=COLORS[kind], hatch=hatch, edgecolor="white", linewidth=0.5)
        )
    return x + count


def main() -> None:
    width = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in PAIRS)
    figure, (padded, packed) = plt.subplots(2, 1, figsize=(9, 2.9), height_ratios=[4, 1.3])
    row = 0
    for side, kind in ((1, "chosen"), (2, "rejected")):
        for lengths in PAIRS:
            x = draw(padded, 0, -row, lengths[0], "prompt", "////" if side == 2 else None)
            x = draw(padded, x, -row, lengths[side], kind)
            draw(padded, x, -row, width - int(x), "padding")
            row += 1
    x = 0.0
    for prompt, chosen, _ in PAIRS:
        x = draw(packed, draw(packed, x, 0, prompt, "prompt"), 0, chosen, "chosen")
    for _, _, rejected in PAIRS:
        x = draw(packed, draw(packed, x, 0, 1, "prompt", "////"), 0, rejected, "rejected")
    padded.set_title(f"padded rows, as in TRL: {len(PAIRS) * 2 * width} tokens", loc="left", fontsize=10)
    packed.set_title(f"one packed row: {int(x)} tokens", loc="left", fontsize=10)
    for axis, low in ((padded, 1 - row), (packed, 0)):
        axis.set_xlim(-0.5, x + 0.5)
        axis.set_ylim(low - 0.2, 1)
        axis.set_aspect("equal")
        axis.axis("off")
    handles = [Patch(facecolor=color, label=name) for name, color in COLORS.items()]
    handles.append(Patch(facecolor=COLORS["prompt"], hatch="////", edgecolor="white", label="prompt, computed again"))
    figure.legend(handles=handles, loc="lower center", ncol=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
