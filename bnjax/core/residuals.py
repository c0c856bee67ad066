"""The `checkpoint_name` of the statistics, by which a policy of `jax.checkpoint` can save them."""

from collections.abc import Callable
from functools import partial
from typing import Any

from jax.ad_checkpoint import checkpoint_name

# If a policy saves this name, the backward pass repeats no reduction of `x` and no collective. Every result of a
# reduction that the backward pass needs must have the name, intermediate results included.
STATISTICS = "bnjax_statistics"
named: Callable[..., Any] = partial(checkpoint_name, name=STATISTICS)
