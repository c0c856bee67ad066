"""Figures, made from the files of a run. The colours are Okabe and Ito's (2008), for colour-blind readers too."""

import textwrap
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, NullLocator

BLUE: str = "#0072B2"
VERMILION: str = "#D55E00"
GREEN: str = "#009E73"
PURPLE: str = "#CC79A7"
ORANGE: str = "#E69F00"
SKY: str = "#56B4E9"
BLACK: str = "#000000"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
COLOURS = {"plain": VERMILION, "batch normalization": BLUE}
MARKERS = "os^Dv<>"


@contextmanager
def figure(
    path: Path, title: str, panels: int = 1, height: float = 4.2, width: float | None = None, **options: Any
) -> Generator[Any, None, None]:
    """Axes to draw on, or an array of adjacent axes. After the block, the figure gets its title and is saved.

    Sizes are in inches. A width of at most 5.2 keeps letters of 10 points legible on a phone, which shows 360 pixels.
    """
    width = (7, 8.4, 10.5)[panels - 1] if width is None else width
    drawn, axes = plt.subplots(1, panels, figsize=(width, height), layout="constrained", **options)
    yield axes
    for each in np.ravel(axes):
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    drawn.suptitle(textwrap.fill(title, int(13.5 * width)), x=0.01, ha="left", fontsize=10)
    drawn.savefig(path, dpi=150)
    plt.close(drawn)


def curves(
    axes: Any,
    series: Mapping[Any, tuple[Any, np.ndarray]],
    colours: Mapping[Any, str] = COLOURS,
    markers: bool = False,
    xlabel: str = "training steps",
) -> None:
    """Draw the mean over seeds of each series (x, values of shape (seeds, points)), and the range over seeds as a band.

    A cross at the bottom marks where a run has diverged: the first such point of a line, or every one with markers.
    """
    for i, (name, (x, values)) in enumerate(series.items()):
        x, diverged = np.asarray(x), np.flatnonzero(np.isnan(values).any(0))
        values = np.ma.masked_invalid(values)
        colour = colours.get(name, PALETTE[i % len(PALETTE)])
        axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
        marker = {"marker": MARKERS[i % len(MARKERS)], "markersize": 5} if markers else {}
        axes.plot(x, values.mean(0), color=colour, linewidth=2, label=name, **marker)
        if diverged.size:
            crosses = x[diverged if markers else diverged[:1]]
            label = None if "diverged" in axes.get_legend_handles_labels()[1] else "diverged"
            # Fractions of the axes' height, so that the crosses of two series do not overlap.
            heights = np.full(len(crosses), 0.03 + 0.04 * i)
            style = {"color": colour, "linestyle": "", "markersize": 8, "label": label, "clip_on": False}
            axes.plot(crosses, heights, marker="x", transform=axes.get_xaxis_transform(), **style)
    axes.set_xlabel(xlabel)
    axes.margins(x=0.02 if markers else 0)


def legend(axes: Any, seeds: int, **options: Any) -> None:
    """Draw a legend, whose title explains the line and the band."""
    what = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
    axes.legend(title=what, frameon=False, fontsize=8, title_fontsize=8, **options)


LIBRARIES = {
    "bnjax": BLUE,
    "Flax Linen": VERMILION,
    "Flax NNX": ORANGE,
    "Haiku": PURPLE,
    "Equinox": SKY,
    "Keras on JAX": GREEN,
    "PyTorch": BLACK,
}
BLOCKS = {"bn": "BN", "bn_relu": "BN + ReLU", "bn_add_relu": "BN + add + ReLU"}


def limits(path: Path, panels: dict[tuple[str, str], dict[str, list[float]]], *, title: str) -> None:
    """Draw times divided by the limit, a panel for each direction and block: geometric means and ranges of shapes."""
    directions, blocks = (list(dict.fromkeys(key[i] for key in panels)) for i in (0, 1))
    size = (1.5 + 2.9 * len(blocks), 0.8 + 2.2 * len(directions))
    figure, axes_grid = plt.subplots(
        len(directions), len(blocks), figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for (direction, block), values in panels.items():
        axes = axes_grid[directions.index(direction)][blocks.index(block)]
        names = list(values)[::-1]
        means = [np.exp(np.mean(np.log(values[name]))) for name in names]
        axes.hlines(names, [min(values[n]) for n in names], [max(values[n]) for n in names], color="0.6", linewidth=2)
        axes.scatter(means, names, color=[LIBRARIES[name] for name in names], s=45, zorder=3)
        for name, mean in zip(names, means, strict=True):
            axes.annotate(f"{mean:.1f}", (mean, name), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        axes.axvline(1, color="0.3", linewidth=1, linestyle="--")
        what = "forward" if direction == "forward" else "forward + backward"
        axes.set_title(f"{BLOCKS[block]}, {what}", fontsize=9)
        axes.margins(y=0.12)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    first = axes_grid[0][0]
    first.set_xscale("log")
    ticks(first, [1, 2, 5, 10, 20, 50, 100])
    figure.supxlabel("time, in multiples of what the block's passes take at the speed of copying (dashed)", fontsize=9)
    figure.suptitle(textwrap.fill(title, 120), x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def bars(path: Path, panels: Mapping[str, Mapping[str, Mapping[str, float]]], *, title: str) -> None:
    """Draw a panel for each quantity, with a bar for each library and target."""
    with figure(path, title, panels=len(panels), height=3.6) as axes:
        for each, (label, libraries) in zip(np.ravel(axes), panels.items(), strict=True):
            targets = list(dict.fromkeys(target for values in libraries.values() for target in values))
            width = 0.8 / len(libraries)
            for i, (name, values) in enumerate(libraries.items()):
                places = [targets.index(target) + (i - (len(libraries) - 1) / 2) * width for target in values]
                drawn = each.bar(places, list(values.values()), width, color=PALETTE[i], label=name)
                each.bar_label(drawn, fmt="%.1f", fontsize=6)
            each.set_xticks(range(len(targets)), targets, fontsize=8)
            each.set_ylabel(label)
        np.ravel(axes)[0].legend(frameon=False, fontsize=8)


def growth(path: Path, megabytes: list[float], series: dict[str, list[float]], *, title: str) -> None:
    """Draw nanoseconds per element against the size of x."""
    with figure(path, title, height=4) as axes:
        for name, values in series.items():
            copied = name == "copy"
            colour, line = ("0.5", "--") if copied else (LIBRARIES[name], "-")
            label = "four copies of x (8 passes)" if copied else name
            axes.plot(megabytes, values, marker="o", markersize=4, color=colour, linestyle=line, label=label)
        axes.set(xscale="log", xlabel="size of x, MB", ylabel="forward and backward, ns for each value", ylim=(0, None))
        ticks(axes, megabytes)
        axes.legend(frameon=False)


def line_labels(axes: Any, ends: Mapping[str, float], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the name of each line to the right of logarithmic axes, near the line's last value, with a piece of it.

    Names move apart where their lines end close to each other, in the order of the last values.
    """
    bottom, top = np.log(axes.get_ylim())
    height, gap = (axes.figure.get_figheight() - 1.3) * 72, 14.0  # points, of the axes and between two names
    names, places = sorted(ends, key=lambda name: ends[name], reverse=True), list[float]()
    for name in names:
        wanted = (np.log(ends[name]) - bottom) / (top - bottom) * height
        places.append(min([wanted, *(place - gap for place in places[-1:])]))
    # Names that would lie below the axes push the ones above them up again.
    for i in reversed(range(len(places))):
        places[i] = max(places[i], places[i + 1] + gap if i + 1 < len(places) else gap / 2)
    for name, place in zip(names, places, strict=True):
        end = (np.log(ends[name]) - bottom) / (top - bottom)
        inside = {"transform": axes.transAxes, "clip_on": False}
        axes.plot([1.0, 1.05], [end, place / height], color="0.75", linewidth=0.8, **inside)
        axes.plot([1.05, 1.12], [place / height] * 2, **styles[name], **inside)
        axes.text(1.15, place / height, name, transform=axes.transAxes, va="center", fontsize=10)


def ticks(axes: Any, places: Sequence[float]) -> None:
    """Set the ticks of a logarithmic x axis only to these places, as plain numbers."""
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
