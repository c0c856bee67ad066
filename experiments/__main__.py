"""Experiments on batch normalization: `all` of them with a report, or one. Each writes its configuration and its
measurements to a folder of its name."""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

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
    """Run every experiment on a claim that is not done yet, and write the report on all of them."""

    preset: study.Preset = "default"
    """smoke for a quick check, default for verdicts, full for longer runs with more seeds"""
    data_dir: Path | None = None
    """folder of the four IDX files of (Fashion-)MNIST or of the binary files of CIFAR-10; default: the digits of
    scikit-learn"""
    out: Path = Path("results")
    """folder for report.html, verdicts.json and a folder for each experiment"""


def run_all(config: All) -> None:
    """Run the experiments on claims that are not done yet, and write the report."""
    studies = [each.of(config.preset, data_dir=config.data_dir, out=config.out) for each in STUDIES]
    # As most experiments, which do not measure the effect of devices.
    studies[0] = replace(studies[0], runtime=runtime.Runtime(devices=1))
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
    """By name, the function that runs each experiment. The defaults of its flags are those of the given preset."""
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
        "device": device.run,
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
