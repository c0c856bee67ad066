"""A claim: its question, its parts, its measurement and its files.

A run writes its configuration and its metrics. Verdict, table and figure are made from these files, without training
again. `protocol` decides the parts.
"""

import abc
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import jax
import numpy as np
from tqdm import tqdm

from experiments.harness import curves, data, headline, lab, protocol, records, report, runs, runtime

Preset = Literal["smoke", "default", "full"]

FIRST_SEED = 2000
"""The first seed of the committed verdicts. Designs were tried with the seeds from 0 on, and measured before with those
from 1000 on, which have no part in them."""


def again(what: str = "") -> report.Change:
    """The change for which all claims were measured again; `what` says what else changed in one of them."""
    shared = (
        "All claims were measured again with fresh seeds, because three rules changed. Fewer than ten seeds decide "
        "nothing. A claim is refuted in part, no longer refuted, if some of its parts are refuted, others are "
        "undecided and none holds. The steps to a target are interpolated linearly between evaluations in all claims."
    )
    return report.Change("2026-11-27", f"{what} {shared}".strip(), "2000 to 2009")


class Finding(NamedTuple):
    """The result of the metrics: the effects by part and seed, the reasons why parts cannot be decided, the numbers in
    words, the figure's title, and a table, whose first row names the columns."""

    effects: Mapping[str, np.ndarray]
    measured: str
    title: str
    table: list[list[str]]
    remarks: Mapping[str, str] = {}


@dataclass(frozen=True)
class Study(abc.ABC):
    """A claim. Its fields are the flags of the command line."""

    NAME: ClassVar[str]
    CLAIM: ClassVar[str]
    HEADLINE: ClassVar[headline.Headline]
    """the part that answers the claim best, and its effect in words"""
    QUESTION: ClassVar[str]
    SOURCE: ClassVar[str]
    PROTOCOL: ClassVar[str]
    """how the claim is measured, in sentences"""
    WOULD_CHANGE: ClassVar[str]
    """what would change the verdict, in sentences"""
    PARTS: ClassVar[tuple[protocol.Part, ...]]
    CHANGES: ClassVar[tuple[report.Change, ...]] = ()
    SMOKE: ClassVar[dict[str, Any]]
    FULL: ClassVar[dict[str, Any]]

    preset: Preset = "default"
    """defaults of the other fields: smoke for a quick check, default for a verdict, full for an accelerator"""
    seeds: int = 10
    """number of seeds; each redraws the split, the subset, the initialization and the order"""
    first_seed: int = FIRST_SEED
    """the first of the seeds"""
    dataset: data.Name = "digits"
    """digits of scikit-learn, or a data set that is downloaded from its publisher"""
    data_dir: Path | None = None
    """folder of the four IDX files of (Fashion-)MNIST or of the binary files of CIFAR-10, instead of a download"""
    stream: bool = False
    """shift, rotate and scale the training images at random in every step"""
    side: int = 16
    """pixels of an image's longer side, at most; larger images are averaged down"""
    out: Path = Path("results")
    """folder in which the experiment makes a folder for config.json, metrics.jsonl and the figure"""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = np.ravel(getattr(self, each.name))
            if each.name not in ("momentum", "first_seed") and value.size and value.dtype.kind in "if":
                records.check_positive(self, each.name)
        momentum = getattr(self, "momentum", 0)
        if not 0 <= momentum <= 1:
            raise data.InputError(f"momentum={momentum}: expected a number in [0, 1].")
        if self.first_seed < 0:
            raise data.InputError(f"first_seed={self.first_seed}: expected 0 or more.")
        if set(self.seed_numbers) & set(lab.TUNING_SEEDS):
            raise data.InputError(
                f"first_seed={self.first_seed}, seeds={self.seeds}: the seeds {lab.TUNING_SEEDS} choose the learning "
                "rates. Expected others."
            )

    @classmethod
    def of(cls, preset: Preset, **changes: Any) -> Self:
        """The experiment with the fields of a preset."""
        return replace(cls(), preset=preset, **{"smoke": cls.SMOKE, "default": {}, "full": cls.FULL}[preset], **changes)

    @property
    def seed_numbers(self) -> range:
        """The seeds that the verdict is based on."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def load(self) -> data.Dataset:
        """The data set, with images of at most `side` pixels a side."""
        return data.shrink(data.load(self.dataset, self.data_dir), self.side)

    def folder(self, dataset: data.Dataset) -> Path:
        """The folder of this experiment's files."""
        return self.out / self.NAME / (_slug(dataset.name) + "-stream" * self.stream)

    @abc.abstractmethod
    def measure(self, lab: lab.Lab) -> None:
        """Train the networks, or whatever the claim measures, unless the laboratory's record has it already."""

    @abc.abstractmethod
    def judge(self, metrics: runs.Metrics) -> Finding:
        """The finding from the metrics."""

    @abc.abstractmethod
    def draw(self, path: Path, metrics: runs.Metrics, title: str) -> None:
        """Draw the figure."""

    def design(self) -> dict[str, Any]:
        """What the results depend on besides seeds and data: the fields, and the numbers among the constants of the
        claim's module and of the harness. Runs of another design are not mixed with these."""
        elsewhere = ("preset", "seeds", "first_seed", "dataset", "data_dir", "out")
        own = {name: value for name, value in asdict(self).items() if name not in elsewhere}
        for module in (lab, curves, sys.modules[type(self).__module__]):
            own |= {name: _numbers(value) for name, value in vars(module).items() if name.isupper()}
        own = {name: value for name, value in own.items() if value is not None}
        return {"changes": len(self.CHANGES), **json.loads(json.dumps(own, default=str))}


def _numbers(value: Any) -> Any:
    """A constant that consists of numbers, in the form of JSON; None for another."""
    if isinstance(value, int | float):
        return value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    found = [_numbers(each) for each in items]
    if not found or None in found:
        return None
    return dict(zip(map(str, value), found, strict=True)) if isinstance(value, dict) else found


def _slug(name: str) -> str:
    """The name of a data set as the name of a folder."""
    return "digits" if name.startswith("scikit-learn digits") else re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def bar(studies: int) -> "tqdm[Any]":
    """A progress bar of some experiments."""
    form = "{desc}: {n_fmt} of {total} experiments, {elapsed}{postfix}"
    return tqdm(total=studies, bar_format=form, mininterval=0.5, disable=not runtime.is_primary())


def run(
    study: Study, dataset: data.Dataset, progress: "tqdm[Any]", may_go_on: Callable[[], bool] = lambda: True
) -> None:
    """Make the measurement, and write the files. A run that was interrupted is continued.

    If the folder has a complete measurement of fewer seeds, config.json describes that one until the other seeds are
    complete. Seeds of a complete measurement are never left out, because their results may have been seen.

    Args:
      study: the experiment.
      dataset: its data.
      progress: the bar of all experiments.
      may_go_on: asked before each training, whether there is time for it.

    Raises:
      InputError: if the folder has the results of another design or of other data.
      TimeIsUpError: if there was not enough time. The measurement can be continued.
    """
    folder = study.folder(dataset)
    before, checksum = _earlier(study, dataset), dataset.sha256()
    complete_seeds = _complete_seeds(study, folder)
    study = replace(study, seeds=max(study.seeds, complete_seeds))
    until_then = replace(study, seeds=complete_seeds or study.seeds)
    shown = dataset.name.replace("scikit-learn digits", "digits") + ", moving" * study.stream
    begun, record = time.perf_counter(), runs.Record(folder / "metrics.jsonl")

    def write(complete):
        facts = {"dataset": shown, "dataset_sha256": checksum, "classes": dataset.classes, "design": study.design()}
        seconds = round(before + time.perf_counter() - begun, 1)
        described, judged = (study, True) if complete else (until_then, complete_seeds > 0)
        records.write_config(folder, described, **facts, seconds=seconds, complete=judged)

    def tell(remark):
        progress.set_postfix_str(remark)
        if time.perf_counter() - told[0] > 5:
            told[0] = time.perf_counter()
            write(complete=False)

    told = [begun]
    progress.set_description_str(study.NAME)
    write(complete=False)
    tuning = lab.TUNING_SEEDS[: 1 if study.preset == "smoke" else None]
    try:
        study.measure(lab.Lab(dataset, record, study.seed_numbers, tuning, study.stream, tell, may_go_on))
    except lab.TimeIsUpError:
        write(complete=False)
        raise
    write(complete=True)
    progress.update(1)


def _complete_seeds(study: Study, folder: Path) -> int:
    """The number of seeds of the complete measurement in the folder that begins with the study's first one, or 0."""
    if not (folder / "config.json").is_file():
        return 0
    config = records.read_config(folder)
    found = config["config"]
    return found["seeds"] if config.get("complete") and found["first_seed"] == study.first_seed else 0


def _earlier(study: Study, dataset: data.Dataset) -> float:
    """The seconds that an interrupted run of the study has taken already."""
    try:
        config = records.read_config(study.folder(dataset))
    except FileNotFoundError:
        return 0.0
    except ValueError as error:
        raise data.InputError(
            f"{study.folder(dataset)}: config.json is damaged ({error}). Delete the folder."
        ) from error
    found = {"dataset_sha256": config.get("dataset_sha256"), **config.get("design", {})}
    wanted = {"dataset_sha256": dataset.sha256(), **study.design()}
    _refuse_difference(study.folder(dataset), found, wanted)
    return float(config["seconds"])


def _refuse_difference(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = [
        f"{name}: {found.get(name)} there, {wanted.get(name)} here"
        for name in {**wanted, **found}
        if found.get(name) != wanted.get(name)
    ]
    if different:
        raise data.InputError(
            f"{folder} has the results of another design ({'; '.join(different)}). Pass another folder by --out, or "
            "delete that one."
        )


def conclude(kind: type[Study], out: Path) -> report.Section | None:
    """The section of the report on a claim, on all data sets of which the folder has a complete run. It draws the
    figures. None if there is no complete run.

    Raises:
      InputError: if a run is of another design, so that its results would be judged by parts that are not theirs.
    """
    results, shown = [], []
    for folder, study, config in complete(kind, out):
        result, section = _concluded(study, folder, config)
        results.append(result)
        shown.append(section)
    if not results:
        return None
    words = (kind.NAME, kind.CLAIM, kind.HEADLINE, kind.QUESTION, kind.SOURCE, kind.PROTOCOL, kind.WOULD_CHANGE)
    return report.Section(report.Claim(*words, kind.CHANGES, (*results,)), (*shown,))


def complete(kind: type[Study], out: Path) -> Iterator[tuple[Path, Study, dict[str, Any]]]:
    """The folders of the complete runs of a claim, that of the digits first, with the studies and the config.json.

    Raises:
      InputError: if a run is of another design.
    """
    for path in sorted((out / kind.NAME).glob("*/config.json"), key=lambda path: (path.parent.name != "digits", path)):
        config = records.read_config(path.parent)
        if config.get("complete"):
            study = replace(_restored(kind, config["config"]), out=out)  # the folder may have been moved
            _refuse_difference(path.parent, config.get("design", {}), study.design())
            yield path.parent, study, config


def judged(study: Study, record: runs.Record, classes: int) -> tuple[runs.Metrics, Finding, list[protocol.Decided]]:
    """The metrics of a study's seeds in a record, the finding from them, and its parts, decided."""
    metrics = record.metrics([*lab.TUNING_SEEDS, *study.seed_numbers], classes)
    finding = study.judge(metrics)
    return metrics, finding, protocol.decide(study.PARTS, finding.effects, finding.remarks)


def _concluded(study: Study, folder: Path, config: Mapping[str, Any]) -> tuple[report.Result, report.Shown]:
    metrics, finding, decided = judged(study, runs.Record(folder / "metrics.jsonl"), config["classes"])
    parts = (*decided,)
    path = folder / f"{study.NAME}.png"
    study.draw(path, metrics, finding.title)
    command = f"python -m experiments {study.NAME} --preset {study.preset}"
    if study.dataset != "digits":
        command += f" --dataset {study.dataset}"
    if study.data_dir is not None:
        command += f" --data-dir {study.data_dir}"
    configuration = {name: value for name, value in config["config"].items() if name != "out"}
    return (
        report.Result(config["dataset"], study.seeds, protocol.verdict(parts), parts, finding.measured),
        report.Shown([path], finding.title, finding.table, config["seconds"], configuration, command),
    )


def _restored(kind: type[Study], config: Mapping[str, Any]) -> Study:
    """The study whose fields config.json has."""
    values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in config.items()}
    values |= {name: Path(values[name]) for name in ("out", "data_dir") if values[name] is not None}
    return kind(**values)


def run_one(study: Study) -> None:
    """Run an experiment and print its verdict."""
    runtime.provide_devices()
    dataset = study.load()
    with bar(1) as progress:
        run(study, dataset, progress)
    folder = study.folder(dataset)
    config = records.read_config(folder)
    result, shown = _concluded(_restored(type(study), config["config"]), folder, config)
    print(f"claim     {study.CLAIM} ({study.SOURCE})\nmeasured  {result.measured}")
    print(f"verdict   {result.verdict} ({result.seeds} seeds, {result.dataset})\n")
    print(table([["part", "effect", "threshold", "verdict"], *map(_row, result.parts)]))
    print(f"\n{table(shown.table)}\nfigure: {shown.figures[0]}")


def _row(part: protocol.Decided) -> list[str]:
    effect = "" if part.value is None else f"{part.value:.3g} [{part.low:.3g}, {part.high:.3g}]"
    return [part.name, effect, f"{part.side} {part.threshold:g}", f"{part.verdict} {part.remark}".strip()]


def run_all(studies: Sequence[Study], kinds: Sequence[type[Study]]) -> None:
    """Run the experiments, go on with those that are not complete, and write the report on all kinds in the folder."""
    runtime.provide_devices()
    datasets = [study.load() for study in studies]
    for study, dataset in zip(studies, datasets, strict=True):
        _earlier(study, dataset)  # another design is refused before anything is measured
    out = studies[0].out
    with bar(len(studies)) as progress:
        for study, dataset in zip(studies, datasets, strict=True):
            run(study, dataset, progress)
    write_report(out, kinds)


def write_report(out: Path, kinds: Sequence[type[Study]]) -> None:
    """Write the report on all complete runs in a folder, and print the verdicts.

    Raises:
      InputError: if there is no complete run, or one of another design.
    """
    sections = [section for section in (conclude(kind, out) for kind in kinds) if section]
    if not sections:
        raise data.InputError(f"out={out}: no complete run is there. Measure: python -m experiments all --out {out}")
    seconds = sum(shown.seconds for section in sections for shown in section.shown)
    facts = {
        "data": ", ".join(dict.fromkeys(result.dataset for section in sections for result in section.claim.results)),
        "jax": f"{jax.__version__} on {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        "time": f"{seconds / 60:.1f} minutes",
    }
    report.write(out, sections, facts)
    rows = [
        [section.claim.id, result.dataset, result.verdict, f"{shown.seconds:.0f}"]
        for section in sections
        for result, shown in zip(section.claim.results, section.shown, strict=True)
    ]
    print(table([["claim", "data", "verdict", "seconds"], *rows]))
    print(f"{out / 'report.html'}\n{out / 'verdicts.json'}")


def table(rows: list[list[str]]) -> str:
    """The rows as text, with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
