"""An experiment on one claim: its measurement, its threshold, and its files.

A run writes its configuration and its metrics. Verdict, table and figure are made from these files, without training
again. A threshold has several parts, which the code fixes before the run. The claim holds if all parts are met, holds
in part if some are met, and does not hold here if none is.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import jax
import numpy as np
import optax
import scipy.stats
from tqdm import tqdm

from experiments.harness import data, records, report, runtime, train

Preset = Literal["smoke", "default", "full"]


class Finding(NamedTuple):
    """The result of the metrics: the numbers in words, whether each part of the threshold is met, the figure's title,
    and a table, whose first row names the columns."""

    measured: str
    met: tuple[bool, ...]
    title: str
    table: list[list[str]]


@dataclass(frozen=True)
class Study:
    """An experiment. Its fields are the flags of the command line."""

    NAME: ClassVar[str]
    CLAIM: ClassVar[str]
    SOURCE: ClassVar[str]
    THRESHOLD: ClassVar[str]
    SMOKE: ClassVar[dict[str, Any]]
    FULL: ClassVar[dict[str, Any]]

    preset: Preset = "default"
    """defaults of the other fields: smoke for a quick check, default for a verdict, full for longer runs"""
    seeds: int = 5
    """number of runs of each network in each setting"""
    data_dir: Path | None = None
    """folder of the four IDX files of (Fashion-)MNIST or of the binary files of CIFAR-10; default: the digits of
    scikit-learn"""
    out: Path = Path("results")
    """folder in which the experiment makes a folder for config.json, metrics.jsonl and the figure"""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = np.ravel(getattr(self, field.name))
            if field.name != "momentum" and value.size and value.dtype.kind in "if":
                records.check_positive(self, field.name)
        momentum = getattr(self, "momentum", 0)
        if not 0 <= momentum <= 1:
            raise data.InputError(f"momentum={momentum}: expected a number in [0, 1].")

    @classmethod
    def of(cls, preset: Preset, **changes: Any) -> Self:
        """The experiment with the fields of a preset."""
        return replace(cls(), preset=preset, **{"smoke": cls.SMOKE, "default": {}, "full": cls.FULL}[preset], **changes)

    @property
    def folder(self) -> Path:
        """The folder of this experiment's files."""
        return self.out / self.NAME

    def prepare(self) -> None:
        """Set up JAX before its first use."""

    def runs(self, dataset: data.Dataset) -> records.Runs:
        """The evaluations of each network."""
        raise NotImplementedError

    def fit(self, init: Any, apply: Any, dataset: data.Dataset, **changes: Any) -> Iterator[train.Evaluation]:
        """Call `train.fit` with this experiment's fields and `changes`.

        The default optimizer is gradient descent, and the default evaluation is at the end.
        """
        names = ("seeds", "steps", "batch_size", "eval_every")
        given = {name: getattr(self, name) for name in names if hasattr(self, name)} | changes
        if "optimizer" not in given:
            given["optimizer"] = partial(optax.sgd, getattr(self, "learning_rate"))  # noqa: B009  not in all studies
        return train.fit(init, apply, dataset=dataset, **{"eval_every": given["steps"]} | given)

    def judge(self, metrics: dict[str, records.Series]) -> Finding:
        """The finding from the metrics."""
        raise NotImplementedError

    def draw(self, path: Path, metrics: dict[str, records.Series], title: str) -> None:
        """Draw the figure."""
        raise NotImplementedError


CLEARLY = "clearly over seeds (beyond the 95% confidence limits of the mean, by Student's t)"


def clearly(values: np.ndarray, limit: float = 0.0) -> bool:
    """Whether the mean over seeds exceeds the limit as `CLEARLY` defines. It is False for one seed, or with a nan."""
    if values.size < 2:
        return False
    error = values.std(ddof=1) / np.sqrt(values.size)
    return bool(values.mean() - scipy.stats.t.ppf(0.975, values.size - 1) * error > limit)


def lower(values: np.ndarray) -> np.ndarray:
    """Accuracies of networks expected to be worse. A network that has diverged counts as accuracy 0."""
    return np.nan_to_num(values, nan=0.0)


def fewer(steps: np.ndarray, others: np.ndarray, last: int, times: float = 1.0) -> bool:
    """Whether all runs reach a target, in clearly fewer than 1 / times of the others' steps.

    Args:
      steps: steps to the target, by seed; nan if a run does not reach it.
      others: the same for the other network; nan counts as the last step.
      last: the last step.
      times: factor by which the steps must be fewer.
    """
    return clearly(np.nan_to_num(others, nan=float(last)) / times - steps)


def first(steps: np.ndarray, accuracy: np.ndarray, target: np.ndarray | float) -> np.ndarray:
    """By seed, the first step with an accuracy of at least the target, or nan."""
    hit = accuracy >= np.reshape(target, (-1, 1))
    return np.where(hit.any(1), steps[hit.argmax(1)], np.nan)


def bar(studies: int) -> "tqdm[Any]":
    """A progress bar of some experiments, each of the same length."""
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f} of {total} experiments, {elapsed}<{remaining}{postfix}"
    return tqdm(total=studies, bar_format=form, mininterval=0.5, disable=not runtime.is_primary())


def run(study: Study, dataset: data.Dataset, progress: "tqdm[Any] | None" = None) -> None:
    """Run the measurement and write the files. Without `progress` it shows a progress bar of its own."""
    begun = time.perf_counter()
    runs = study.runs(dataset)  # invalid input raises here, before anything is printed or written
    with bar(1) if progress is None else contextlib.nullcontext(progress) as shown:
        records.write_run(study.folder, study, dataset, runs, _teller(shown, study))
    if runtime.is_primary():
        done = {"seconds": round(time.perf_counter() - begun, 1), "dataset_sha256": dataset.sha256()}
        records.write_config(study.folder, study, dataset=dataset.name, **done)


def is_done(study: Study, dataset: data.Dataset) -> bool:
    """Whether the folder contains a complete, undamaged run of this configuration on this data set."""
    try:
        config = records.read_config(study.folder)
        study.judge(records.read_metrics(study.folder))
        wanted = json.loads(json.dumps(asdict(study), default=str))
        return (
            "seconds" in config
            and config["dataset_sha256"] == dataset.sha256()
            and config["config"] | {"out": ""} == wanted | {"out": ""}
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False


def conclude(study: Study) -> report.Section:
    """The section of the report on a finished run. It draws the figure."""
    metrics, config = records.read_metrics(study.folder), records.read_config(study.folder)
    finding = study.judge(metrics)
    verdict = (report.NOT_HERE, report.IN_PART, report.HOLDS)[any(finding.met) + all(finding.met)]
    path = study.folder / f"{study.NAME}.png"
    study.draw(path, metrics, finding.title)
    command = f"python -m experiments {study.NAME} --preset {study.preset}"
    return report.Section(
        verdict=report.Verdict(
            study.NAME, study.CLAIM, study.SOURCE, finding.measured, study.THRESHOLD, verdict, study.seeds
        ),
        figures=[path],
        title=finding.title,
        table=finding.table,
        seconds=config.get("seconds", np.nan),
        configuration={name: value for name, value in config["config"].items() if name not in ("out", "runtime")},
        command=command if study.data_dir is None else f"{command} --data-dir {study.data_dir}",
    )


def run_one(study: Study) -> None:
    """Run an experiment and print its verdict."""
    dataset = data.load(study.data_dir)
    study.prepare()
    run(study, dataset)
    if runtime.is_primary():
        section = conclude(study)
        verdict = section.verdict
        print(f"claim      {verdict.claim} ({verdict.source})\nthreshold  {verdict.threshold}")
        print(f"measured   {verdict.measured}\nverdict    {verdict.verdict} ({verdict.seeds} seeds)\n")
        print(table(section.table))
        print(f"figure: {section.figures[0]}")


def run_all(studies: list[Study]) -> None:
    """Run the experiments that are not done yet, and write the report on all."""
    dataset = data.load(studies[0].data_dir)
    for study in studies:
        study.prepare()
    out = studies[0].out
    with bar(len(studies)) as progress:
        for study in studies:
            if is_done(study, dataset):
                progress.update(1)
            else:
                run(study, dataset, progress)
    sections = [conclude(study) for study in studies]
    seconds = sum(section.seconds for section in sections)
    facts = {
        "preset": studies[0].preset,
        "data": dataset.name,
        "jax": f"{jax.__version__} on {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        "time": f"{seconds / 60:.1f} minutes",
    }
    report.write(out, sections, facts)
    rows = [[s.verdict.id, s.verdict.verdict, f"{s.seconds:.0f}"] for s in sections]
    print(table([["experiment", "verdict", "seconds"], *rows]))
    print(f"{out / 'report.html'}\n{out / 'verdicts.json'}")


def _teller(progress: "tqdm[Any]", study: Study) -> Callable[[float, str], None]:
    progress.set_description_str(study.NAME)

    def tell(part: float, remark: str) -> None:
        progress.set_postfix_str(remark, refresh=False)
        # Rounding may make the sum of the parts exceed the total.
        progress.update(min(part, progress.total - progress.n))

    return tell


def table(rows: list[list[str]]) -> str:
    """The rows as text, with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
