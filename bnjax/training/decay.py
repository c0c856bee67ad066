"""Which parameters weight decay applies to."""

from typing import Any

import jax


def decay_mask(params: Any) -> Any:
    """Select the parameters that weight decay applies to: all except those named scale or bias, of any rank.

    Args:
      params: any tree of dictionaries, namedtuples (`BNParams`) or NNX states. The last name in a parameter's path
        counts, also in keys that are tuples or joined by "/". Haiku's `offset` counts as a bias.

    Returns:
      The same tree with True where decay applies, for `optax.masked` and the `mask` of `optax.adamw`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import bnjax
      >>> from bnjax.training import decay_mask
      >>> decay_mask({"kernel": jnp.ones((3, 4)), "bn": bnjax.bn_init((1, 1, 4))[0]})
      {'bn': BNParams(scale=False, bias=False), 'kernel': True}
      >>> optimizer = optax.adamw(1e-3, weight_decay=0.05, mask=decay_mask)
    """

    def decays(path, _):
        keys = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        names = [name for key in keys for name in (key if isinstance(key, tuple) else str(key).split("/"))]
        named = [name for name in names if isinstance(name, str) and name not in ("None", "value")]
        return not named or named[-1] not in ("scale", "bias", "offset")

    return jax.tree_util.tree_map_with_path(decays, params)
