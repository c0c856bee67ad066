"""The name of the statistics among the residuals, by which a policy of `jax.checkpoint` saves them."""

from collections.abc import Callable
from functools import partial
from typing import Any

from jax.ad_checkpoint import checkpoint_name

# A policy that saves what has this name keeps the backward pass from reducing `x`, and from collectives, a second time.
# Every result of a reduction that the backward pass needs has to have it, also where that is an intermediate one.
STATISTICS = "bnjax_statistics"
named: Callable[..., Any] = partial(checkpoint_name, name=STATISTICS)
