"""Batch normalization timed on this machine's device, such as a GPU: `python -m experiments.benchmark.device`.

Calls that are compared run in one process, in turn, after a warm-up, and each is represented by its minimum time. The
driver of an NVIDIA GPU reports the clocks before, during and after the measurements. What each part compares:

* `copy`: the speed of copying a large array, the limit for everything else.
* `exact`: errors of mean, variance, output and gradient against float64, for data far from 0.
* `layer`: the layer, by itself and with what follows it, against Flax and PyTorch, with the bandwidth that it reaches.
* `guard`: the layer as it is, with a guard, after the guard sent x to be read again, and without a guard; one layer,
  and a chain of layers with nothing between. Calls are issued one at a time and several at once.
* `resnet`: a training step of ResNet-50, and the part of it that normalization adds: (step - none) / (Flax - none).
* `pytorch`: the same step of torchvision's ResNet-50, in turn with the steps of `resnet`.

For its command line the module needs only Python's own parser.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax

from experiments.benchmark import contenders, device_network, device_parts, device_record, device_tables
from experiments.benchmark.contenders import Block, Dtype
from experiments.benchmark.device_record import Record
from experiments.harness import data, records

Part = Literal["copy", "exact", "layer", "guard", "resnet", "pytorch"]


@dataclass(frozen=True)
class Device:
    """The configuration of the measurements. Its fields are the flags of the command line."""

    parts: tuple[Part, ...] = get_args(Part)
    """what to measure; the speed of copying is always measured if it is not in the results yet"""
    shapes: tuple[str, ...] = ("256x56x56x64", "256x28x28x512", "128x14x14x1024", "65536x1024", "64x64")
    """shapes of x for the layer, channels last; the last is so small that its time is the time to issue a call"""
    dtypes: tuple[Dtype, ...] = ("bfloat16", "float32")
    """dtypes of x; dtypes after the first are timed only for the first block"""
    blocks: tuple[Block, ...] = get_args(Block)
    """only batch normalization, with ReLU, or with the addition of another branch and ReLU"""
    libraries: tuple[str, ...] = ("bnjax", "Flax Linen", "PyTorch")
    """libraries to time; one that is not installed is left out"""
    guard_shapes: tuple[str, ...] = ("256x56x56x64", "64x14x14x256")
    """shapes of x for the guard's cost"""
    layers: int = 50
    """layers in a chain"""
    images: int = 256
    """images in a batch of the ResNet-50"""
    size: int = 224
    """height and width of an image"""
    rows: int = 65536
    """examples for exactness"""
    features: int = 64
    """features for exactness"""
    copy_mebibytes: int = 1024
    """size of the array that is copied"""
    rounds: int = 25
    """timings of each call"""
    resnet_rounds: int = 10
    """timings of each training step, of three steps each"""
    repeats: int = 20
    """calls in a timing of a layer"""
    threads: int = 8
    """programs that are compiled at once"""
    limit_seconds: float = 600.0
    """time after which the remaining measurements are left out, by name"""
    out: Path = Path("results")
    """folder for config.json and device.json, in a folder of their own"""

    def __post_init__(self) -> None:
        numbers = [f.name for f in fields(self) if isinstance(f.default, (int, float))]
        records.check_positive(self, *numbers)
        for name in ("parts", "blocks", "dtypes", "libraries"):
            known = {"parts": Part, "blocks": Block, "dtypes": Dtype}.get(name)
            allowed = get_args(known) if known else ("bnjax", "Flax Linen", "PyTorch")
            if not getattr(self, name) or not set(getattr(self, name)) <= set(allowed):
                raise data.InputError(f"{name}={getattr(self, name)}: expected some of {list(allowed)}.")


def run(config: Device) -> None:
    """Times of the layer and of a ResNet-50 on this machine's device, its bandwidth, and the guard's cost."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # otherwise PyTorch would find no memory
    folder = config.out / "device"
    records.write_config(folder, config)
    with Record(folder / "device.json", config.limit_seconds) as record:
        device = jax.devices()[0]
        record.results["device"] = {
            "name": device.device_kind,
            "platform": device.platform,
            "driver": device_record.driver(device_record.DRIVER),
            "flags": os.environ.get("XLA_FLAGS", ""),
            "libraries": {"jax": jax.__version__, **contenders.versions()},
        }
        record.results.setdefault("runs", []).append(asdict(config) | {"out": str(config.out)})
        record.say(f"{record.results['device']}")
        done = record.results["parts"]
        for part, measure in _measures(config, record).items():
            if part in config.parts or (part == "copy" and part not in done):
                record.begin(part)
                record.attempt(part, measure)
    print(device_tables.report(record.results), flush=True)


def _measures(config: Device, record: Record) -> dict[str, Callable[[], Any]]:
    """The measurements, in their order."""
    libraries, threads = config.libraries, config.threads
    network = (libraries, config.images, config.size, config.resnet_rounds)
    steps: dict[str, Callable[[], Any]] = {}
    guard = partial(device_parts.guard, record, config.guard_shapes, config.dtypes[0], config.layers)
    every = device_parts.cases(config.shapes, config.dtypes, config.blocks)
    return {
        "copy": partial(device_parts.copy_speed, record, config.copy_mebibytes, config.rounds),
        "exact": partial(device_parts.exact, record, config.rows, config.features),
        "layer": partial(device_parts.layer, record, every, libraries, config.rounds, config.repeats, threads),
        "guard": partial(guard, config.rounds, config.repeats, threads),
        "resnet": lambda: steps.update(device_network.resnet(record, *network, threads)),
        "pytorch": lambda: device_network.beside_torch(record, steps, *network),
    }


def main(args: list[str] | None = None) -> int:
    """Measure as the flags in `args` say, by default the command line; bad input is one line and exit status 2."""
    parser = argparse.ArgumentParser("python -m experiments.benchmark.device", description=run.__doc__)
    for field in fields(Device):
        several = isinstance(field.default, tuple)
        kind = str if several else type(field.default)
        if isinstance(field.default, Path):
            kind = Path
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, nargs="+" if several else None, default=field.default)
    given: dict[str, Any] = {}
    for name, value in vars(parser.parse_args(args)).items():
        given[name] = tuple(value) if isinstance(value, list) else value
    try:
        run(Device(**given))
    except (OSError, data.InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
