"""Figures, read from the files of a run; nothing here trains. The colours are Okabe and Ito's, told apart by all."""

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, NullLocator

COLOURS = {"plain": "#D55E00", "batch normalization": "#0072B2"}


def curves(
    path: Path, series: dict[str, tuple[np.ndarray, np.ndarray]], *, title: str, ylabel: str, target: float
) -> None:
    """Mean over seeds of each series against steps, with the range over seeds as a band, and a line at `target`."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, (steps, values) in series.items():
        values = np.ma.masked_invalid(values)  # a gap where a run has diverged
        axes.fill_between(steps, values.min(0), values.max(0), color=COLOURS[name], alpha=0.2, linewidth=0)
        axes.plot(steps, values.mean(0), color=COLOURS[name], linewidth=2, label=name)
    axes.axhline(target, color="0.4", linewidth=1, linestyle="--", label="best of the plain network")
    seeds = len(next(iter(series.values()))[1])
    axes.set(xlabel="training steps", ylabel=ylabel, ylim=(0, 1.02))
    axes.margins(x=0)
    axes.set_title(textwrap.fill(title, 85), loc="left", fontsize=10)
    axes.legend(title=f"mean and range of {seeds} seeds" if seeds > 1 else "one seed", loc="lower right", frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


LIBRARIES = {
    "bnjax": "#0072B2",
    "Flax Linen": "#D55E00",
    "Flax NNX": "#E69F00",
    "Haiku": "#CC79A7",
    "Equinox": "#56B4E9",
    "Keras on JAX": "#009E73",
    "PyTorch": "#000000",
}
BLOCKS = {"bn": "BN", "bn_relu": "BN + ReLU", "bn_add_relu": "BN + add + ReLU"}


def limits(path: Path, panels: dict[tuple[str, str], dict[str, list[float]]], *, title: str) -> None:
    """Time over the limit, a panel for each direction and block: geometric means, with the range of the shapes."""
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
    first.xaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100]))
    first.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    first.xaxis.set_minor_locator(NullLocator())
    figure.supxlabel("time, in multiples of what the block's passes take at the speed of copying (dashed)", fontsize=9)
    figure.suptitle(textwrap.fill(title, 120), x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def growth(path: Path, megabytes: list[float], series: dict[str, list[float]], *, title: str) -> None:
    """Nanoseconds for each value against the size of x."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, values in series.items():
        copied = name == "copy"
        colour, line = ("0.5", "--") if copied else (LIBRARIES[name], "-")
        label = "four copies of x (8 passes)" if copied else name
        axes.plot(megabytes, values, marker="o", markersize=4, color=colour, linestyle=line, label=label)
    axes.set(xscale="log", xlabel="size of x, MB", ylabel="forward and backward, ns for each value", ylim=(0, None))
    axes.xaxis.set_major_locator(FixedLocator(megabytes))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(textwrap.fill(title, 85), loc="left", fontsize=10)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
