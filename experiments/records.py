"""The files of a run: config.json and metrics.jsonl, which process 0 writes and figures are made from."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from experiments import data, runtime
from experiments.train import Evaluation


def check_positive(config: Any, *names: str) -> None:
    """These fields of an experiment are positive and finite."""
    for name in names:
        for value in np.ravel(getattr(config, name)):
            if not 0 < value < np.inf:
                raise data.InputError(f"{name}={value}: expected a positive number.")


def write_run(
    folder: Path, config: Any, dataset: data.Dataset, runs: dict[str, Iterator[Evaluation]], steps: int
) -> None:
    """Train, with a progress bar, and write `config.json` and, as they come, the evaluations to `metrics.jsonl`.

    Args:
      folder: where to write; process 0 alone does.
      config: the experiment.
      dataset: what is trained on.
      runs: what `train.fit` returned for each network.
      steps: updates per network.
    """
    primary = runtime.is_primary()
    if primary:
        write_config(folder, config, dataset=dataset.name)
    with (
        (folder / "metrics.jsonl" if primary else Path(os.devnull)).open("w") as lines,
        tqdm(total=len(runs) * steps, unit="step", mininterval=0.5, desc=dataset.name, disable=not primary) as progress,
    ):
        for network, evaluations in runs.items():
            before = 0
            for evaluation in evaluations:
                lines.writelines(json.dumps(record) + "\n" for record in records(network, evaluation))
                progress.set_postfix_str(f"{network}: test accuracy {np.mean(evaluation.accuracy):.3f}")
                progress.update(evaluation.step - before)
                before = evaluation.step


def write_config(folder: Path, config: Any, **facts: Any) -> None:
    """`config.json`: the fields of the experiment, and facts about the run."""
    folder.mkdir(parents=True, exist_ok=True)
    where = {"jax": jax.__version__, "backend": jax.default_backend(), "processes": jax.process_count()}
    content = {"config": asdict(config), **facts, **where}
    (folder / "config.json").write_text(json.dumps(content, indent=2, default=str) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """What `write_config` wrote."""
    return json.loads((folder / "config.json").read_text())


def records(network: str, evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """One line of `metrics.jsonl` per seed; what is not finite is null, as JSON has no NaN."""
    for seed, (loss, accuracy) in enumerate(zip(evaluation.loss, evaluation.accuracy, strict=True)):
        yield {
            "network": network,
            "seed": seed,
            "step": evaluation.step,
            "loss": float(loss) if np.isfinite(loss) else None,
            "test_accuracy": float(accuracy) if np.isfinite(accuracy) else None,
        }


def read_curves(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """From `metrics.jsonl`, per network: the steps, and test accuracies of shape (seeds, evaluations), nan for null."""
    curves: dict[str, dict[int, dict[int, float]]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        runs = curves.setdefault(record["network"], {})
        runs.setdefault(record["seed"], {})[record["step"]] = record["test_accuracy"]
    return {
        network: (np.array(list(runs[0])), np.array([list(run.values()) for run in runs.values()], float))
        for network, runs in curves.items()
    }


def spread(values: np.ndarray, form: str, none: str = "diverged") -> str:
    """Mean and standard deviation of those that are not nan, and how many are if some are; `none` if none is."""
    some = values[np.isfinite(values)]
    if not some.size:
        return none
    spread = f" ± {some.std(ddof=1):{form}}" if some.size > 1 else ""
    missing = f" ({some.size} of {values.size})" if some.size < values.size else ""
    return f"{some.mean():{form}}{spread}{missing}"
