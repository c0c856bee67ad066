"""What the variants cost: forward with backward, against plain `bn_apply` on the same array, interleaved in one run.

Ratios of medians; an absolute time says little on a shared machine.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from tqdm import tqdm

import bnjax
from experiments import records


@dataclass(frozen=True)
class Bench:
    """One run of the benchmark; the command line's flags are these fields."""

    shape: tuple[int, ...] = (64, 28, 28, 128)
    """of x, channels last"""
    ghost_size: int = 16
    """examples in a group"""
    rounds: int = 15
    """timings of each variant"""
    out: Path = Path("results")
    """folder for config.json and timings.json, in a folder of their own"""

    def __post_init__(self) -> None:
        records.check_positive(self, "shape", "ghost_size", "rounds")


def run(config: Bench) -> None:
    """Cost of the variants against plain batch normalization: forward with backward, float32."""
    x, cotangent = jax.random.normal(jax.random.key(0), (2, *config.shape))
    calls = {name: _step(apply, *variables) for name, (apply, variables) in _variants(config).items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call(x, cotangent))
    for _ in tqdm(range(config.rounds), unit="round"):
        for name, call in calls.items():
            begun = time.perf_counter()
            jax.block_until_ready(call(x, cotangent))
            times[name].append(time.perf_counter() - begun)
    folder = config.out / "bench"
    records.write_config(folder, config)
    (folder / "timings.json").write_text(json.dumps(times, indent=2) + "\n")
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"{'variant':24}{'times bn_apply':>16}{'median, ms':>14}")
    for name, median in medians.items():
        print(f"{name:24}{median / medians['bn_apply']:>16.2f}{1e3 * median:>14.1f}")


def _variants(config: Bench) -> dict[str, tuple[Callable[..., Any], tuple[Any, Any]]]:
    """Calls of the form of `bn_apply(params, state, x, train)`, and their variables."""
    features = config.shape[-1]
    plain, indexed = bnjax.bn_init(features), bnjax.indexed_bn_init(features, 10)
    classes = jax.tree.map(lambda v: jnp.broadcast_to(v, (10, features)), plain[0])
    label = jnp.arange(config.shape[0]) % 10

    def ghost(*args):
        return bnjax.ghost_bn_apply(*args, ghost_size=config.ghost_size)

    def renorm(*args):
        return bnjax.renorm_bn_apply(*args, r_max=bnjax.RENORM_R_MAX, d_max=bnjax.RENORM_D_MAX)

    def index(*args):
        return bnjax.indexed_bn_apply(*args, index=jnp.int32(3))

    def conditional(params, state, x, train):
        return bnjax.bn_apply(bnjax.conditional_params(params, label, x), state, x, train)

    def frozen(params, state, x, train):
        return bnjax.bn_apply(params, state, x, False)

    return {
        "bn_apply": (bnjax.bn_apply, plain),
        "ghost_bn_apply": (ghost, plain),
        "renorm_bn_apply": (renorm, plain),
        "indexed_bn_apply": (index, indexed),
        "conditional": (conditional, (classes, plain[1])),
        "frozen": (frozen, plain),
    }


def _step(apply: Callable[..., Any], params: Any, state: Any) -> Callable[[Array, Array], Any]:
    """Output, state, and the gradients in parameters and x."""

    @jax.jit
    def step(x, cotangent):
        y, pullback, state_ = jax.vjp(lambda params, x: apply(params, state, x, True), params, x, has_aux=True)
        return y, state_, pullback(cotangent)

    return step
