"""How exact batch normalization is where the mean is far from 0, in bnjax and in other libraries.

The data are float32 normal numbers around a mean of many standard deviations. Float64 computes what the layer should
give for these float32 numbers, so that an error is the library's own. The unavoidable error is measured too: rounding
the data to float32 already changes the exact output, by a number that grows with |mean| / std.

Errors are the largest of all elements and seeds: of the output, which has a standard deviation of 1, and of the
gradient with respect to x, as a fraction of its largest value.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.benchmark import contenders
from experiments.harness import data, plot, records

ROUNDING = "rounding x to float32"
"""The unavoidable error, an entry like the libraries."""
EPSILON = {"Keras on JAX": 1e-3}
"""epsilon of the libraries whose default is not 1e-5"""
LIBRARIES = (*contenders.LAYERS, "PyTorch")
WIDTHS = {"Flax Linen": 5.0, "Flax NNX": 2.8, "Flax Linen, two reads": 4.0, "bnjax": 2.4}
"""widths of lines that lie on each other: the wider one is drawn behind"""


@dataclass(frozen=True)
class Exactness:
    """One run of the comparison; the command line's flags are these fields."""

    ratios: tuple[float, ...] = (1, 10, 100, 1e3, 1e4, 1e5)
    """|mean| / std of the data"""
    rows: int = 4096
    """examples in the batch"""
    features: int = 8
    """features of each"""
    seeds: int = 5
    """batches, of which the largest error counts"""
    libraries: tuple[str, ...] = LIBRARIES
    """those to compare, of which only what is installed is"""
    out: Path = Path("results")
    """folder for config.json, errors.jsonl and the figures, in a folder of their own"""
    redraw: bool = False
    """print and draw the errors that are in that folder again, without a measurement"""

    def __post_init__(self) -> None:
        records.check_positive(self, "ratios", "rows", "features", "seeds")
        if not set(self.libraries) <= set(LIBRARIES):
            raise data.InputError(f"libraries={self.libraries}: expected some of {list(LIBRARIES)}.")


def run(config: Exactness) -> None:
    """Errors of batch normalization against |mean| / std of the data, in this and in other libraries."""
    folder = config.out / "exactness"
    if not config.redraw:
        _measure(folder, config)
    entries = read(folder)
    report(entries)
    figures(folder, entries)


def _measure(folder: Path, config: Exactness) -> None:
    records.write_config(folder, config, libraries=contenders.versions())
    names = [name for name in config.libraries if name.partition(",")[0] in contenders.installed()]
    calls = {name: _call(name, config) for name in names}
    with (folder / "errors.jsonl").open("w") as lines:
        for ratio in tqdm(config.ratios, unit="ratio"):
            for name, errors in errors_at(ratio, config, calls).items():
                lines.write(json.dumps({"library": name, "ratio": ratio, **errors}) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """What a run measured: an entry for each library and ratio; an error is null where the result is not finite."""
    return [json.loads(line) for line in (folder / "errors.jsonl").read_text().splitlines()]


Call = Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]
"""The output for x, and the gradient of sum(cotangent * output) with respect to x."""


def errors_at(ratio: float, config: Exactness, calls: dict[str, Call]) -> dict[str, dict[str, float | None]]:
    """The largest errors over the seeds, by library."""
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(config.seeds):
        rng = np.random.default_rng(seed)
        exact = rng.standard_normal((config.rows, config.features)) + ratio
        cotangent = rng.standard_normal(exact.shape, np.float32)
        x = exact.astype(np.float32)
        for name, call in calls.items():
            epsilon = EPSILON.get(name, 1e-5)
            found.setdefault(name, []).append(_distance(call(x, cotangent), oracle(x, cotangent, epsilon)))
        found.setdefault(ROUNDING, []).append(_distance(oracle(x, cotangent), oracle(exact, cotangent)))
    worst = {name: np.max(errors, axis=0).tolist() for name, errors in found.items()}  # nan if any is
    return {
        name: {key: value if np.isfinite(value) else None for key, value in zip(("y", "dx"), values, strict=True)}
        for name, values in worst.items()
    }


def oracle(x: np.ndarray, cotangent: np.ndarray, epsilon: float = 1e-5) -> tuple[np.ndarray, np.ndarray]:
    """Output and gradient in float64 (Ioffe & Szegedy, 2015, section 3), with scale 1 and bias 0."""
    x, g = x.astype(np.float64), cotangent.astype(np.float64)
    rstd = 1 / np.sqrt(x.var(0) + epsilon)
    y = (x - x.mean(0)) * rstd
    return y, rstd * (g - g.mean(0) - y * (g * y).mean(0))


def _distance(got, want):
    y, dx = (np.asarray(v, np.float64) for v in got)
    return np.abs(y - want[0]).max(), np.abs(dx - want[1]).max() / np.abs(want[1]).max()


def _call(name: str, config: Exactness) -> Call:
    case = contenders.Case((config.rows, config.features))
    if name == "PyTorch":
        return _torch(config.features)
    apply, params, state = contenders.LAYERS[name][1](case)
    step = jax.jit(contenders.step(case, apply))

    def call(x, cotangent):
        y, _, (_, dx) = step(params, state, jnp.asarray(x), jnp.zeros_like(x), jnp.asarray(cotangent))
        return y, dx

    return call


def _torch(features: int) -> Call:
    import torch  # pyright: ignore[reportMissingImports]

    layer = torch.nn.BatchNorm1d(features)

    def call(x, cotangent):
        leaf = torch.from_numpy(x).requires_grad_()
        y = layer(leaf)
        y.backward(torch.from_numpy(cotangent))
        assert leaf.grad is not None
        return y.detach().numpy(), leaf.grad.numpy()

    return call


def by_library(entries: list[dict[str, Any]], quantity: str) -> dict[str, dict[float, float | None]]:
    """Errors of a quantity, "y" or "dx": by library, by ratio."""
    found: dict[str, dict[float, float | None]] = {}
    for entry in entries:
        found.setdefault(entry["library"], {})[entry["ratio"]] = entry[quantity]
    return found


def report(entries: list[dict[str, Any]]) -> None:
    """Print the tables."""
    for quantity, what in (("y", "output, whose standard deviation is 1"), ("dx", "gradient, in parts of its largest")):
        rows = by_library(entries, quantity)
        ratios = list(next(iter(rows.values())))
        print(f"\nLargest error of the {what}, for |mean| / std of\n\n{'':24}" + "".join(f"{r:>10g}" for r in ratios))
        for name, errors in rows.items():
            cells = ("not finite" if errors[r] is None else f"{errors[r]:.1e}" for r in ratios)
            print(f"{name:24}" + "".join(f"{cell:>11}" for cell in cells))


FIGURES = {
    "exactness": ("y", "Largest error of the float32 output, whose standard deviation is 1"),
    "exactness-gradient": ("dx", "Largest error of the float32 gradient, relative to its largest value"),
}
"""By the name of the file: the quantity, and the title."""


def figures(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Draw errors against |mean| / std, a line for each library, in a figure for the output and one for the gradient.

    Each figure is narrow, so that two fit side by side on a desktop, and one fills a phone.
    """
    for file, (quantity, title) in FIGURES.items():
        with plot.figure(folder / f"{file}.png", title, width=5.2, height=4.4) as axes:
            _lines(axes, by_library(entries, quantity))


def _lines(axes: Any, errors: dict[str, dict[float, float | None]]) -> None:
    highest = max(value for values in errors.values() for value in values.values() if value is not None)
    ends, styles = {}, {}
    for name, by_ratio in errors.items():
        plain, again = name == ROUNDING, "," in name  # the second form of a library
        width = WIDTHS.get(name, 1.4)
        style = {
            "color": "0.3" if plain else plot.LIBRARIES.get(name.partition(",")[0], plot.BLACK),
            "linewidth": width,
            "linestyle": "--" if plain else "-",
            "alpha": 0.45 if again else 1,
        }
        values = [np.nan if value is None else value for value in by_ratio.values()]
        axes.plot(list(by_ratio), values, marker="" if plain else "o", markersize=4, zorder=4 - 0.1 * width, **style)
        broken = [ratio for ratio, value in by_ratio.items() if value is None]
        axes.plot(broken, [8 * highest] * len(broken), "x", color=style["color"])
        label = f"{name} (x: not finite)" if broken else name
        ends[label], styles[label] = values[-1] if np.isfinite(values[-1]) else 8 * highest, style
    axes.figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    axes.set(xscale="log", yscale="log", xlabel="|mean| / standard deviation of the data")
    plot.line_labels(axes, ends, styles)
