"""`bn_apply` as a layer calls it: with the moments of the batch among the results."""

import bnjax
from bnjax.core.merging import with_support


def apply_and_collect(params, state, x, *, mask=None, earlier=None, **options):
    """y, the state and the moments of a training step with their support; options as in `bn_apply`."""
    y, state, batch = bnjax.BatchNorm(**options).apply_part(params, state, x, True, mask, earlier)
    return y, state, with_support(batch)
