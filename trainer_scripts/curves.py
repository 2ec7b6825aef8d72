"""Picture of a run's training: its loss, and what was measured on validation."""

import math
from pathlib import Path

from run_records import COLOURS, Run, logged, new_figure, save_figure


# Key of `log.jsonl`, label of the axis, its scale.
PANELS = (
    ("loss", "training loss", "linear"),
    ("eval_perplexity", "validation perplexity (log scale)", "log"),
    ("eval_accuracy", "validation accuracy", "linear"),
)


def draw_training_curve(run: Run, path: Path) -> bool:
    """Draw what `log.jsonl` holds of training loss, validation perplexity and accuracy, side by side, as a PNG.

    Returns:
        whether it holds any.

    Raises:
        UserError: if matplotlib is missing, the file cannot be written, or the log holds what is not a number.
    """
    panels = []
    for key, label, scale in PANELS:
        if points := [(epoch, value) for epoch, value in logged(run, key) if math.isfinite(value)]:
            panels.append((points, label, scale))
    if not panels:
        return False
    figure = new_figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    for axes, (points, label, scale) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        # A single point is no line.
        axes.plot(*zip(*points), color=COLOURS[0], marker="o" if len(points) < 40 else None, markersize=4)
        axes.set_yscale(scale)
        if scale == "log":
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
    return True
