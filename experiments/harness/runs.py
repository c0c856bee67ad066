"""The file metrics.jsonl of a claim: one line for each run, of one network from one seed.

A line is written when a run is complete, so that an interrupted measurement continues with the runs that are missing.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness.train import Evaluation

DIGITS = 5
"""Significant digits of a recorded number: more than its spread over seeds can tell apart."""

Summary = Callable[[list[int], dict[str, Any]], tuple[list[int], dict[str, Any]]]
"""A function from the steps and the metrics of a run to those of them, or of what follows from them, that are kept."""


@dataclass(frozen=True)
class Series:
    """The metrics of one network: its seeds, the steps of its evaluations, and arrays by name. A curve has the shape
    (seeds, evaluations, ...); a test metric, which is measured once, at the end, has the shape (seeds,). Numbers that
    are not finite are nan."""

    seeds: tuple[int, ...]
    steps: np.ndarray
    values: Mapping[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[name]


class Metrics(dict[str, Series]):
    """The series of all networks of a claim, by name, and the number of classes of the data set."""

    def __init__(self, series: Mapping[str, Series], classes: int) -> None:
        super().__init__(series)
        self.classes = classes


class Record:
    """The runs that a file contains, and those that are added to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, dict[int, dict[str, Any]]] = {}
        if path.is_file():
            *lines, rest = path.read_bytes().split(b"\n")
            for line in lines:
                run = json.loads(line)
                self.runs.setdefault(run["network"], {})[run["seed"]] = run
            if rest:  # the writing of the last line was interrupted
                with path.open("rb+") as file:
                    file.truncate(path.stat().st_size - len(rest))

    def missing(self, networks: Iterable[str], seeds: Iterable[int]) -> list[int]:
        """The seeds for which a run of one of the networks is missing."""
        networks = [*networks]
        return [seed for seed in seeds if not all(seed in self.runs.get(name, {}) for name in networks)]

    def add(self, network: str, seed: int, steps: Iterable[int], values: Mapping[str, Any]) -> None:
        """Add a run, and write its line."""
        rounded = {name: _rounded(np.asarray(value, float)) for name, value in values.items()}
        run: dict[str, Any] = {"network": network, "seed": int(seed), "steps": [int(step) for step in steps], **rounded}
        self.runs.setdefault(network, {})[run["seed"]] = run
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(run, separators=(",", ":")) + "\n")

    def add_all(
        self,
        networks: Iterable[str],
        seeds: Iterable[int],
        evaluations: list[Evaluation],
        summary: Summary = lambda steps, values: (steps, values),
    ) -> None:
        """Add the runs of `train.fit`, which are ordered by network, then by seed, each in the form of its summary."""
        names = [(network, seed) for network in networks for seed in seeds]
        for i, (network, seed) in enumerate(names):
            values: dict[str, Any] = {"loss": [evaluation.loss[i] for evaluation in evaluations]}
            for name in evaluations[-1].values:
                curve = [evaluation.values[name][i] for evaluation in evaluations if name in evaluation.values]
                # No choice depends on the test images, so their metrics are kept only for the end.
                values[name] = curve[-1] if name.startswith("test_") else curve
            self.add(network, seed, *summary([evaluation.step for evaluation in evaluations], values))

    def metrics(self, seeds: Iterable[int], classes: int) -> Metrics:
        """The series of every network, of those of the seeds for which it has a run."""
        seeds = [*seeds]
        found = {}
        for network, runs in self.runs.items():
            own = [seed for seed in seeds if seed in runs]
            if own:
                names = [name for name in runs[own[0]] if name not in ("network", "seed", "steps")]
                values = {name: np.array([_array(runs[seed][name]) for seed in own]) for name in names}
                found[network] = Series((*own,), np.array(runs[own[0]]["steps"]), values)
        return Metrics(found, classes)


def _rounded(values: np.ndarray) -> Any:
    """A number, or nested lists of numbers, with null for numbers that are not finite, because JSON has no NaN."""
    if values.ndim:
        return [_rounded(part) for part in values]
    return float(f"{values:.{DIGITS}g}") if np.isfinite(values) else None


def _array(values: Any) -> np.ndarray:
    return np.array(values, float)  # null becomes nan
