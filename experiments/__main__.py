"""Experiments on batch normalization. Each writes its configuration and what it measured to a folder of its name."""

import sys

import tyro

from experiments import averaging, bench, convergence, data, runtime

EXPERIMENTS = {"averaging": averaging.run, "bench": bench.run, "convergence": convergence.run}


def main(args: list[str] | None = None) -> int:
    """Run the experiment named in `args`, by default the command line; bad input is one line and exit status 2."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            EXPERIMENTS,
            args=args,
            prog="python -m experiments",
            description=__doc__,
            config=(tyro.conf.OmitArgPrefixes,),  # --steps, not --config.steps
        )
    except (OSError, data.InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    runtime.exit_with(main)
