"""Which layers have frozen parameters, as the layers report while a model is traced.

The gradient of a frozen parameter is 0, but weight decay in the optimizer would still shrink it. A training step
therefore listens to the layers, and leaves these parameters unchanged.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import jax

from bnjax.core import trees


class Layers:
    """Whether the parameters of each layer are frozen in all of its calls, by the layer's path."""

    def __init__(self):
        self.frozen: dict[str, bool] = {}
        self.open = False

    def unchanged(self, new: Any, old: Any) -> Any:
        """The parameters `new`, with scale and bias of frozen layers from `old`."""
        frozen = {layer for layer, frozen in self.frozen.items() if frozen}
        if not frozen:
            return new
        kept = {layer: arrays for layer, arrays in trees.leaves(old).items() if layer in frozen}
        names = ("scale", "bias")
        return trees.replaced(new, {layer: {n: a[n] for n in names if n in a} for layer, a in kept.items()})


# A user context is part of the keys of JAX's caches. Without it, a block that was traced before would report nothing.
_listening = jax.make_user_context(None)


@contextmanager
def listening() -> Generator[Layers, None, None]:
    """Collect what layers `say` while they are traced in the context `model_called` inside this one."""
    layers = Layers()
    with _listening(layers):
        yield layers


@contextmanager
def model_called() -> Generator[None, None, None]:
    """The call of the model in training. A loss may call other models, a teacher say, with the same layer names."""
    layers = _listening.value or Layers()
    layers.open = True
    try:
        yield
    finally:
        layers.open = False


def say(path: str, frozen: bool) -> None:
    """Tell the training step that is being traced whether the parameters of the layer at `path` are frozen."""
    layers = _listening.value
    if layers is not None and layers.open:
        layers.frozen[path] = frozen and layers.frozen.get(path, True)
