"""Experiments on batch normalization: `all` of them with a report, or one. Each writes its configuration and its
measurements to a folder of its name."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from experiments import extra

try:
    import tyro

    from experiments.benchmark import bench, compiled, device, exactness
    from experiments.claims import (
        activations,
        batch_size,
        convergence,
        cost,
        devices,
        gradients,
        initialization,
        learning_rate,
        noise,
        placement,
        recurrent,
        regularization,
        smoothness,
    )
    from experiments.demos import averaging, training
    from experiments.harness import data, mnist8000, readme, runtime, seeds, study
except ModuleNotFoundError as error:
    raise SystemExit(extra.message(error)) from None

STUDIES: tuple[type[study.Study], ...] = (
    convergence.Convergence,
    activations.Activations,
    learning_rate.LearningRate,
    initialization.Initialization,
    gradients.Gradients,
    smoothness.Smoothness,
    regularization.Regularization,
    noise.Noise,
    batch_size.BatchSize,
    recurrent.Recurrent,
    placement.Placement,
    cost.Cost,
    devices.Devices,
)


@dataclass(frozen=True)
class All:
    """Run every experiment on a claim, go on with those that are not complete, and write the report on all of them."""

    preset: study.Preset = "default"
    """smoke for a quick check, default for verdicts, full for an accelerator"""
    dataset: data.Name = "digits"
    """digits of scikit-learn, or a data set that is downloaded from its publisher"""
    data_dir: Path | None = None
    """folder of the four IDX files of (Fashion-)MNIST or of the binary files of CIFAR-10, instead of a download"""
    stream: bool = False
    """shift, rotate and scale the training images at random in every step"""
    claims: tuple[str, ...] = ()
    """names of the claims; by default all"""
    out: Path = Path("results")
    """folder for report.html, verdicts.json and a folder for each experiment"""


@dataclass(frozen=True)
class Report:
    """Write the report on all complete measurements in a folder again, without any measurement."""

    out: Path = Path("results")
    """folder of the measurements"""
    readme: Path | None = None
    """file in which the lines on the claims are replaced"""


def run_all(config: All) -> None:
    """Run the experiments on claims, go on with those that are not complete, and write the report."""
    _check_names(config.claims)
    given = {name: getattr(config, name) for name in ("dataset", "data_dir", "stream", "out")}
    chosen = [each for each in STUDIES if each.NAME in config.claims or not config.claims]
    study.run_all([each.of(config.preset, **given) for each in chosen], STUDIES)


def more(config: seeds.More) -> None:
    """Measure more seeds for undecided parts, and write the report."""
    _check_names(config.claims)
    seeds.more(config, STUDIES)


def _check_names(claims: tuple[str, ...]) -> None:
    unknown = {*claims} - {each.NAME for each in STUDIES}
    if unknown:
        raise data.InputError(f"claims={', '.join(unknown)}: expected some of {', '.join(e.NAME for e in STUDIES)}.")


def write_report(config: Report) -> None:
    """Write the report on all complete measurements in a folder again."""
    study.write_report(config.out, STUDIES)
    if config.readme is not None:
        readme.update(config.readme, config.out / "verdicts.json")


def main(args: list[str] | None = None) -> int:
    """Run the experiment named in `args`, by default the command line; bad input is one line and exit status 2."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            _commands(sys.argv[1:] if args is None else args),
            args=args,
            prog="python -m experiments",
            description=__doc__,
            config=(tyro.conf.OmitArgPrefixes,),  # --steps, not --config.steps
        )
    except (OSError, data.InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:  # of a package that only some experiments import
        print(extra.message(error), file=sys.stderr)
        return 2
    return 0


def _commands(args: list[str]) -> dict[str, Any]:
    """By name, the function that runs each experiment. The defaults of its flags are those of the given preset."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset", nargs="?", default="default")
    preset = parser.parse_known_args(args)[0].preset
    commands: dict[str, Any] = {"all": run_all, "more": more, "report": write_report}
    for each in STUDIES:
        commands[each.NAME] = _command(each, each.of(preset if preset in get_args(study.Preset) else "default"))
    return commands | {
        "averaging": averaging.run,
        "bench": bench.run,
        "compiled": compiled.run,
        "device": device.run,
        "exactness": exactness.run,
        "mnist8000": mnist8000.run,
        "train": training.run,
    }


def _command(kind: type[study.Study], default: study.Study) -> Any:
    def command(config: study.Study = default) -> None:
        study.run_one(config)

    command.__annotations__["config"] = kind
    command.__doc__ = kind.CLAIM
    return command


if __name__ == "__main__":
    runtime.exit_with(main)
