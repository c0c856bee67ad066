"""The files of a run, config.json and metrics.jsonl. Process 0 writes them, and figures are made from them.

The claims have a metrics.jsonl of another form, with a line for each run (see `runs`); here, each evaluation has one.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.harness import data, runtime
from experiments.harness.runs import Series
from experiments.harness.train import Evaluation

Runs = Mapping[str, Iterator[Evaluation]]
"""The results of `train.fit` by network."""


def check_positive(config: Any, *names: str) -> None:
    """Check that these fields of an experiment are positive and finite."""
    for name in names:
        for value in np.ravel(getattr(config, name)):
            if not 0 < value < np.inf:
                raise data.InputError(f"{name}={value}: expected a positive number.")


def write_run(
    folder: Path, config: Any, dataset: data.Dataset, runs: Runs, progress: Callable[[float, str], None]
) -> None:
    """Train, write `config.json`, and write each evaluation to `metrics.jsonl` as soon as it is made.

    Args:
      folder: folder of the files; only process 0 writes.
      config: the experiment.
      dataset: the data set that the networks are trained on.
      runs: the evaluations, by network.
      progress: called for every evaluation with the fraction of the experiment since the one before, and a remark.
    """
    primary = runtime.is_primary()
    if primary:
        write_config(folder, config, dataset=dataset.name)
    with (folder / "metrics.jsonl" if primary else Path(os.devnull)).open("w") as lines:
        for network, evaluations in runs.items():
            before = 0.0
            for evaluation in evaluations:
                lines.writelines(json.dumps(record) + "\n" for record in records(network, evaluation))
                progress((evaluation.progress - before) / len(runs), f"{network}, step {evaluation.step}")
                before = evaluation.progress


def write_config(folder: Path, config: Any, **facts: Any) -> None:
    """Write `config.json`: the fields of the experiment, and facts about the run."""
    folder.mkdir(parents=True, exist_ok=True)
    where = {"jax": jax.__version__, "backend": jax.default_backend(), "processes": jax.process_count()}
    content = {"config": asdict(config), **facts, **where}
    (folder / "config.json").write_text(json.dumps(content, indent=2, default=str) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """The content that `write_config` wrote."""
    return json.loads((folder / "config.json").read_text())


def records(network: str, evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """One line of `metrics.jsonl` per run. Numbers that are not finite become null, because JSON has no NaN."""
    for seed, loss in enumerate(evaluation.loss):
        values = {name: _finite(value[seed]) for name, value in evaluation.values.items()}
        yield {"network": network, "seed": seed, "step": evaluation.step, "loss": _finite(loss), **values}


def _finite(value: np.ndarray) -> Any:
    """A number, or nested lists of numbers, with null for numbers that are not finite."""
    if np.ndim(value):
        return [_finite(part) for part in value]
    return float(f"{value:.7g}") if np.isfinite(value) else None  # 7 digits, the precision of float32


def read_metrics(folder: Path) -> dict[str, Series]:
    """The metrics that `write_run` wrote, by network: curves of shape (seeds, evaluations, ...)."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record.pop("network"), {}).setdefault(record.pop("seed"), []).append(record)
    metrics = {}
    for network, runs in found.items():
        names = [name for name in runs[0][0] if name != "step"]
        values = {name: np.array([[e[name] for e in run] for run in runs.values()], float) for name in names}
        metrics[network] = Series((*runs,), np.array([e["step"] for e in runs[0]]), values)
    return metrics


def spread(values: np.ndarray, form: str, none: str = "diverged") -> str:
    """Mean and standard deviation of the finite values, with their number if some are not finite, or `none`."""
    some = values[np.isfinite(values)]
    if not some.size:
        return none
    deviation = (some - some[0]).std(ddof=1) if some.size > 1 else 0.0  # exactly 0 for equal values
    spread = f" ± {deviation:{form.lstrip('+')}}" if some.size > 1 else ""
    missing = f" ({some.size} of {values.size})" if some.size < values.size else ""
    return f"{some.mean():{form}}{spread}{missing}"
