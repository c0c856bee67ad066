"""Figures, read from the files of a run; nothing here trains. The colours are Okabe and Ito's, told apart by all."""

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

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
