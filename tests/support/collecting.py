"""`bn_apply` as a layer calls it: with the moments of the batch among the results."""

import bnjax
from bnjax.core.apply import apply
from bnjax.core.options import checked


def apply_and_collect(params, state, x, *, mask=None, momentum=0.99, earlier=None, **options):
    """y, the state and the moments of a training step; options as in `bn_apply`."""
    defaults = {k: v for k, v in bnjax.bn_apply.__kwdefaults__.items() if k not in ("mask", "momentum")}
    options = checked("bn_apply", True, **defaults | options, collect=True)
    return apply(params, state, x, options, momentum=momentum, mask=mask, earlier=earlier)
