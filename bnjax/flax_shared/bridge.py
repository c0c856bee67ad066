"""What `flax.nnx.bridge` does not offer: the Linen module around NNX layers, and whether it collects moments."""

from typing import Any

from flax.core.scope import DenyList
from flax.nnx import bridge

from bnjax.flax_shared.flax_internals import linen_module_around


def collects(module: Any) -> bool:
    """Whether the call of a Linen module asks for the collection `batch_moments`.

    Only by name: with mutable=True, a program that passes back all collections would accumulate moments by accident.
    """
    return (
        not module.is_initializing()
        and not isinstance(module.scope.mutable, bool | DenyList)
        and module.is_mutable_collection("batch_moments")
    )


def linen_collects() -> bool:
    """Whether NNX layers that are made here belong to a Linen model (`bridge.to_linen`) that collects moments."""
    module = linen_module_around()
    return isinstance(module, bridge.ToLinen) and collects(module)
