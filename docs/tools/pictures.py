"""The pictures of the guide to diagnosis: `python -m docs.tools.pictures` makes them again, under docs/images.

One network of six dense layers with batch normalization and ReLU, on normal random data; what is wrong differs. The
path of x (docs/images/path-of-x.svg) is drawn by hand, and `docs.tools.drawings` makes the other drawings.
"""

from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import bnjax
import bnjax.linen

IMAGES = Path(__file__).parents[1] / "images"
LAYERS = 6


class Network(nn.Module):
    """Dense layers with batch normalization and ReLU; with `dead`, one ReLU outputs only zeros."""

    momentum: float = 0.9
    dead: bool = False

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        for i in range(LAYERS):
            momentum = bnjax.debiased(self.momentum) if self.momentum < 0.99 else constant
            x = nn.relu(nn.Dense(32)(x) - (100 if self.dead and i == 2 else 0))
            x = bnjax.linen.BatchNorm(use_running_average=not train, momentum=momentum)(x)
        return x


def constant(count: Any) -> Any:
    """0.99 for every number of updates: a function, so that the updates are counted."""
    return jnp.full(count.shape, 0.99)


def trained(network: Network, updates: int) -> Any:
    """Variables whose statistics absorbed so many batches."""
    x = jax.random.normal(jax.random.key(0), (updates, 256, 16))
    variables = network.init(jax.random.key(1), x[0], train=False)
    update = jax.jit(partial(network.apply, train=True, mutable=["batch_stats"]))
    for batch in x:
        variables = {**variables, **update(variables, batch)[1]}
    return variables


def diagnosed(
    network: Network, updates: int, change: Any = lambda x: x, edit: Any = lambda stats: stats, **options: Any
) -> bnjax.Diagnosis:
    """The diagnosis by another batch, changed as evaluation changes it, of statistics that `edit` changes."""
    variables = trained(network, updates)
    variables["batch_stats"] = edit(variables["batch_stats"])
    x = change(jax.random.normal(jax.random.key(2), (512, 16)))
    _, left = network.apply(variables, x, train=True, mutable=["batch_stats", "batch_moments"])
    return bnjax.diagnose(variables["params"], variables["batch_stats"], left["batch_moments"], **options)


def amplified(stats: Any) -> Any:
    """The variance of feature 7 of the fourth layer is 1e-4."""
    layer = stats["BatchNorm_3"]
    return {**stats, "BatchNorm_3": {**layer, "var": layer["var"].at[7].set(1e-4)}}


def diagnoses() -> dict[str, bnjax.Diagnosis]:
    """By the name of the picture."""
    return {
        "healthy": diagnosed(Network(), 200),
        "shifted": diagnosed(Network(), 200, lambda x: 3 * x + 2),
        "feature": diagnosed(Network(), 200, edit=amplified),
        "lagging": diagnosed(Network(momentum=0.99), 20, momentum=0.99),
        "dead": diagnosed(Network(dead=True), 200),
    }


def main() -> None:
    """Draw all of them."""
    IMAGES.mkdir(exist_ok=True)
    for name, diagnosis in diagnoses().items():
        print(f"{name}\n{diagnosis}\n")
        diagnosis.plot(IMAGES / f"diagnosis-{name}.png")


if __name__ == "__main__":
    main()
