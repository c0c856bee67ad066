"""Experiments on batch normalization: `all` of them and their report, or one. Each writes its configuration and what it
measured to a folder of its name."""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import tyro

from experiments.benchmark import bench, compiled, exactness
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
from experiments.demos import averaging
from experiments.harness import data, runtime, study

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
    """Every experiment on a claim, those excepted that are done, and the report on all."""

    preset: study.Preset = "default"
    """smoke to see that it works, default for verdicts, full for a longer look"""
    data_dir: Path | None = None
    """folder of (Fashion-)MNIST's four IDX files or of CIFAR-10's binary ones; by default scikit-learn's digits"""
    out: Path = Path("results")
    """folder for report.html, verdicts.json and a folder for each experiment"""


def run_all(config: All) -> None:
    """All experiments on claims, those excepted that are done, and their report."""
    studies = [each.of(config.preset, data_dir=config.data_dir, out=config.out) for each in STUDIES]
    studies[0] = replace(studies[0], runtime=runtime.Runtime(devices=1))  # like all but those that are about several
    study.run_all(studies)


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
    return 0


def _commands(args: list[str]) -> dict[str, Any]:
    """What runs each experiment; the flags' defaults are those of the preset that is asked for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset", nargs="?", default="default")
    preset = parser.parse_known_args(args)[0].preset
    commands: dict[str, Any] = {"all": run_all}
    for each in STUDIES:
        commands[each.NAME] = _command(each, each.of(preset if preset in get_args(study.Preset) else "default"))
    return commands | {
        "averaging": averaging.run,
        "bench": bench.run,
        "compiled": compiled.run,
        "exactness": exactness.run,
    }


def _command(kind: type[study.Study], default: study.Study) -> Any:
    def command(config: study.Study = default) -> None:
        study.run_one(config)

    command.__annotations__["config"] = kind
    command.__doc__ = kind.CLAIM
    return command


if __name__ == "__main__":
    runtime.exit_with(main)
