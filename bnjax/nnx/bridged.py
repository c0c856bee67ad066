"""Linen modules inside an NNX model, `flax.nnx.bridge.ToNNX`, as `functional` runs them in training."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax import nnx
from flax.core.scope import DenyList, in_filter
from flax.errors import InvalidRngError
from flax.nnx import bridge

from bnjax.flax_shared import flax_internals
from bnjax.nnx.norm import BatchMoments


class WithoutKey(nnx.RngStream):
    """A stream without a key."""

    def __call__(self):
        raise ValueError(_NO_KEY.format(f"the model draws random numbers from {self.tag!r}", repr(self.tag)))


_NO_KEY = (
    "apply(rngs=...): {}. Without a key these are the same in each call. Pass rngs={{{}: key}} here or to "
    "TrainState.create."
)


def put_in_training(module: Any, mutable: Sequence[str]) -> None:
    """Let a `ToNNX` draw only from streams with a key, and change these collections if its call names none."""
    module.__class__ = _class(type(module))
    module.to_nnx__mutable = tuple(mutable)


def add_moments(module: Any, earlier: Mapping[str, Any]) -> None:
    """Give a `ToNNX` moments that the layers in it, by path, have collected already."""
    for path, collected in earlier.items():
        holder = module
        for name in filter(None, path.split("/")):
            holder = holder[name] if isinstance(holder, dict) else getattr(holder, name)
        for name, part in collected._asdict().items():
            if isinstance(holder, dict):
                holder[name] = BatchMoments(part)
            else:
                setattr(holder, name, BatchMoments(part))


@functools.cache  # NNX itself keeps every class of a module
def _class(kind):
    """A subclass whose call does what `put_in_training` says, and collects moments if `batch_moments` may change."""

    def call(self, *args, rngs=None, mutable=None, **kwargs):
        rngs = self.to_nnx__rngs if rngs is None else rngs
        missing = []
        if isinstance(rngs, nnx.Rngs):
            # The bridge draws from every stream before the call, whether or not the module needs it.
            streams = dict(rngs.items())
            missing = [name for name, stream in streams.items() if isinstance(stream, WithoutKey)]
            if missing:
                rngs = nnx.Rngs(**{name: stream() for name, stream in streams.items() if name not in missing})
        mutable = self.to_nnx__mutable if mutable is None else mutable
        if "batch_moments" in self.to_nnx__mutable:
            mutable = _with_moments(self, mutable)
        try:
            return kind.__call__(self, *args, rngs=rngs, mutable=mutable, **kwargs)
        except InvalidRngError as error:
            if not missing:
                raise
            what = f"{type(self.to_nnx__module).__name__} draws random numbers ({str(error).partition(' (http')[0]})"
            raise ValueError(_NO_KEY.format(what, repr(missing[0]))) from error

    body = {"__module__": kind.__module__, "__call__": call}
    return type(kind)(kind.__name__, (kind,), body)


def _with_moments(module: bridge.ToNNX, mutable: Any) -> list[str]:
    """The collections that a call may change, by name, and `batch_moments`."""
    if isinstance(mutable, str):
        mutable = [mutable]
    if isinstance(mutable, bool | DenyList):
        kinds = {type(node) for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Variable)}
        names = {flax_internals.collection_of(kind) for kind in kinds} | {"intermediates"}
        mutable = [name for name in sorted(names) if in_filter(mutable, name)]
    names: Iterable[str] = mutable or ()
    return [*dict.fromkeys((*names, "batch_moments"))]
