"""Pictures of the benchmarks: needs matplotlib, of the extra `reports`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which stays readable with any colour vision, without yellow, which is faint on white, and
# with a dark red for a ninth.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#882255"]


def can_draw() -> None:
    """
    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('matplotlib is missing: pip install "modeling-grassmann[reports]"') from error


def new_figure(columns: int = 1) -> tuple["Figure", list["Axes"]]:
    """A figure of axes side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 5.5 * columns, 4.5), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def log_axes(axes: "Axes", ticks: Sequence[int], xlabel: str, ylabel: str, title: str) -> None:
    """Logarithmic axes, with the lengths that were measured on the first."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.minorticks_off()
    ticks = sorted(set(ticks))
    axes.set_xticks(ticks, [f"{tick // 1024}k" if tick % 1024 == 0 else str(tick) for tick in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(alpha=0.3)


def save(figure: "Figure", path: Any) -> None:
    """Write a figure as a PNG, with one legend for all its axes; equal records give equal files."""
    # A canvas of its own draws with Agg, whatever backend the user's pyplot would choose.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    lines = {label: line for label, line in lines.items() if not label.startswith("_")}
    if lines:
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=5, fontsize="small")
    FigureCanvasAgg(figure).print_figure(path, dpi=150, metadata={"Software": None})
