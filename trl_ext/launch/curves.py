"""Draws the training curves of a run into its output folder, with or without a tracker."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerCallback


logger = logging.getLogger(__name__)

FILE_NAME = "training_curves.png"

_COLORS = ("#3b6fb6", "#d9822b", "#3a923a", "#8b5fb0", "#8a8a8a")
_MOST_PANELS = 9


@dataclass(frozen=True)
class Panel:
    """
    One plot of the picture.

    Args:
        title (`str`):
            Its title.
        curves (`dict[str, str]`):
            Key of the log -> label, `""` where the title says it.
        level (`float`, *optional*):
            Height of a dashed line: chance level, or no difference.
    """

    title: str
    curves: dict[str, str]
    level: float | None = None


# In order of interest. A panel is left out if the run does not log its keys.
PANELS = (
    Panel("Loss", {"loss": ""}),
    Panel("Reward accuracy", {"rewards/accuracies": ""}, level=0.5),
    Panel("Reward margin", {"rewards/margins": ""}, level=0.0),
    Panel("Rewards", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}, level=0.0),
    Panel("Error gap to the reference", {"gaps/chosen": "chosen", "gaps/rejected": "rejected"}, level=0.0),
    Panel("Log-probability of responses", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
    Panel("Forward KL on the responses", {"forward_kl/chosen": "chosen", "forward_kl/rejected": "rejected"}),
    Panel(
        "The policy prefers the chosen response",
        {"ranking_accuracy/policy": "sum", "ranking_accuracy/policy_norm": "per token"},
        level=0.5,
    ),
    Panel("Gold reward of completions", {"d2po/gold_reward": ""}),
    Panel(
        "Accuracy against gold", {"d2po/gold_accuracy": "discriminator", "d2po/silver_accuracy": "silver"}, level=0.5
    ),
    Panel("Reward", {"reward": ""}),
    Panel("KL of the images, in nats", {"kl": ""}, level=0.0),
    Panel("Gradient norm", {"grad_norm": ""}),
    Panel("Learning rate", {"learning_rate": ""}),
)


def points(log: list[dict], key: str) -> dict[str, list[tuple[float, float]]]:
    """
    The curves of a key: `"training"`, and one of every evaluation set (`"held out"`, or `"held out, NAME"`), as steps
    and values.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    pattern = re.compile(rf"eval(?:_(.+))?_{re.escape(key)}")
    for entry in log:
        for name, value in entry.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                continue
            if name == key:
                label = "training"
            elif match := pattern.fullmatch(name):
                label = f"held out, {match[1]}" if match[1] else "held out"
            else:
                continue
            curves.setdefault(label, []).append((entry["step"], float(value)))
    return curves


def draw_curves(log: list[dict], path: Path, title: str) -> bool:
    """
    Draws what a trainer logged.

    Args:
        log (`list[dict]`):
            The trainer's `state.log_history`.
        path (`Path`):
            The picture's file, a PNG.
        title (`str`):
            Title of the whole.

    Returns:
        `bool`: Whether there was anything to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = []
    for panel in PANELS:
        found = {label: points(log, key) for key, label in panel.curves.items()}
        if any(found.values()):
            panels.append((panel, found))
    panels = panels[:_MOST_PANELS]
    if not panels:
        return False
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows + 0.5), dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (panel, found) in zip(axes, panels, strict=False):
        color = 0
        for label, curves in found.items():
            for split, values in curves.items():
                steps, heights = zip(*values, strict=True)
                held_out = split != "training"
                name = ", ".join(part for part in (label, split) if part)
                axis.plot(
                    steps,
                    heights,
                    color=_COLORS[color % len(_COLORS)],
                    linestyle="--" if held_out and label else "-",
                    # A line of one point is invisible.
                    marker="o" if held_out or len(steps) == 1 else None,
                    markersize=3.5,
                    linewidth=1.4,
                    label=name,
                )
                color += not label
            color += bool(label)
        if panel.level is not None:
            axis.axhline(panel.level, color="#8a8a8a", linewidth=0.8, linestyle=":")
        axis.set_title(panel.title, fontsize=10, fontweight="bold")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axis.ticklabel_format(axis="y", scilimits=(-3, 4))
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(axis.lines) > 1 + (panel.level is not None):
            axis.legend(frameon=False, fontsize=7)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel("step", fontsize=8)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path)
    return True


class CurvesCallback(TrainerCallback):
    """
    Keeps `training_curves.png` in the output folder up to date: at every checkpoint, and as training ends.

    Args:
        method (`str`):
            Name of the method, for the title.
    """

    def __init__(self, method: str):
        self.method = method

    def on_save(self, args, state, control, **kwargs):
        self.draw(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self.draw(args, state)

    def draw(self, args, state) -> None:
        """Draws the curves; an error while drawing is a warning and does not stop the run."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            draw_curves(state.log_history, folder / FILE_NAME, f"{self.method}: {folder.resolve().name}")
        except Exception as error:
            logger.warning(f"{folder / FILE_NAME} was not drawn. {type(error).__name__}: {error}")
