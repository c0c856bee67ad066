"""More seeds for the parts that only their intervals leave undecided.

A complete run has seeds for some look of the protocol. If one of its parts may be decided by more seeds, they are
measured up to the next look, and the parts are judged again, until none is open, or 40 seeds are measured, or the time
is up. All runs get their next look before one gets the look after it.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.harness import data, lab, protocol, runs, runtime, study


@dataclass(frozen=True)
class More:
    """Measure more seeds for the complete runs in a folder that have undecided parts, and write the report.

    The same command resumes where the time was up.
    """

    claims: tuple[str, ...] = ()
    """names of the claims; by default all"""
    dataset: data.Name | None = None
    """only runs on this data set; by default on all"""
    data_dir: Path | None = None
    """only runs on the data set in a folder of this name, which is read from here; by default each run's own folder"""
    stream: bool = False
    """only runs whose training images move in every step by --stream"""
    out: Path = Path("results")
    """folder of the measurements"""
    minutes: float = 110.0
    """no training begins later than this"""
    dry_run: bool = False
    """only print what would be measured, and what it would cost"""


@dataclass(frozen=True)
class Open:
    """A complete run with parts that more seeds may decide."""

    folder: Path
    study: study.Study
    name: str
    """claim and data set"""
    parts: tuple[str, ...]
    """the names of these parts"""
    look: int
    """the number of seeds of the next look"""
    seconds: float
    """what ten seeds cost, about: the share of the run's time that the runs of its seeds have among all runs"""

    @property
    def next_seconds(self) -> float:
        """What the next look costs."""
        return self.seconds * (self.look - self.study.seeds) / 10

    @property
    def all_seconds(self) -> float:
        """What all looks cost, if none decides all parts."""
        return self.seconds * (protocol.LOOKS[-1] - self.study.seeds) / 10


def found(config: More, kinds: Sequence[type[study.Study]]) -> Iterator[Open]:
    """The runs that `config` asks for and that have open parts.

    Raises:
      InputError: if a run is of another design, or if no complete run is asked for.
    """
    asked_for = [
        run
        for kind in kinds
        if kind.NAME in config.claims or not config.claims
        for run in study.complete(kind, config.out)
        if _asked_for(run[1], config)
    ]
    if not asked_for:
        raise data.InputError(
            f"out={config.out}: no complete run there is one of those asked for. Measure the first seeds: "
            f"python -m experiments all --out {config.out}"
        )
    yield from filter(None, itertools.starmap(_open, asked_for))


def _asked_for(each: study.Study, config: More) -> bool:
    if config.stream and not each.stream:
        return False
    if config.data_dir is not None:
        return each.data_dir is not None and each.data_dir.name == config.data_dir.resolve().name
    return config.dataset is None or (each.data_dir is None and each.dataset == config.dataset)


def _open(folder: Path, each: study.Study, facts: dict[str, Any]) -> Open | None:
    look = protocol.next_look(each.seeds)
    if look is None:
        return None
    record = runs.Record(folder / "metrics.jsonl")
    _, _, decided = study.judged(each, record, facts["classes"])
    parts = (*(part.name for part in decided if protocol.may_be_decided(part)),)
    if not parts:
        return None
    seeds = [seed for by_seed in record.runs.values() for seed in by_seed]
    own = sum(seed not in lab.TUNING_SEEDS for seed in seeds)
    measured = len({*seeds} - {*lab.TUNING_SEEDS})  # those of a look that is not complete have taken time too
    seconds = 10 * facts["seconds"] * own / len(seeds) / measured
    return Open(folder, each, f"{each.NAME}, {facts['dataset']}", parts, look, seconds)


def more(config: More, kinds: Sequence[type[study.Study]]) -> None:
    """Measure the next looks of the runs that have open parts, as long as there is time, and write the report."""
    waiting = deque(found(config, kinds))
    print(table(waiting))
    if config.dry_run:
        return
    runtime.provide_devices()
    end = time.monotonic() + 60 * config.minutes
    datasets, without = _datasets(waiting, config)
    waiting = deque(run for run in waiting if run.folder in datasets)
    left: list[Open] = []
    with study.bar(len(waiting)) as progress:
        while waiting:
            run = waiting.popleft()
            progress.total = progress.n + 1 + len(waiting)
            wanted = replace(run.study, seeds=run.look)
            try:
                study.run(wanted, datasets[run.folder], progress, lambda: time.monotonic() < end)
            except lab.TimeIsUpError:
                left.append(run)
                continue
            again = next(each for each in study.complete(type(wanted), config.out) if each[0] == run.folder)
            if still := _open(*again):
                waiting.append(still)
    study.write_report(config.out, kinds)
    for run, error in without:
        print(f"not measured: {run.name}: {error}")
    if left:
        print(f"\nThe time was up. The same command resumes with:\n{table(left)}")


def _datasets(
    waiting: Sequence[Open], config: More
) -> tuple[dict[Path, data.Dataset], list[tuple[Open, data.InputError | OSError]]]:
    """By folder, the data set of a run; and the runs whose data cannot be read, with the error."""
    loaded, without = {}, []
    for run in waiting:
        try:
            dataset = replace(run.study, data_dir=config.data_dir or run.study.data_dir).load()
        except (data.InputError, OSError) as error:
            without.append((run, error))
        else:
            if run.study.folder(dataset).name != run.folder.name:
                raise data.InputError(f"{run.folder}: the data set is {dataset.name}. Pass its folder by --data-dir.")
            loaded[run.folder] = dataset
    return loaded, without


def table(waiting: Sequence[Open]) -> str:
    """The runs with open parts, and what their next look and all looks cost."""
    if not waiting:
        return "No part is open: each is decided, or cannot be by more seeds."
    rows = [["run", "seeds", "next", "seconds", "to the last", "open parts"]]
    for run in waiting:
        numbers = (run.study.seeds, run.look, round(run.next_seconds), round(run.all_seconds))
        rows.append([run.name, *map(str, numbers), "; ".join(run.parts)])
    total = [round(sum(getattr(run, name) for run in waiting)) for name in ("next_seconds", "all_seconds")]
    rows.append(["all", "", "", *map(str, total), f"{sum(len(run.parts) for run in waiting)} parts"])
    return study.table(rows)
