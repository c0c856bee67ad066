"""The changes that `convert` makes to layers, checked and in hashable form, for Linen and NNX."""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bnjax.core import checks
from bnjax.core.jax_internals import is_traced
from bnjax.core.layer import BatchNorm
from bnjax.variants.adaptive import AdaptiveBatchNorm
from bnjax.variants.ghost import GhostBatchNorm
from bnjax.variants.renorm import RenormBatchNorm

Where = Callable[[str], object]

OPTIONS = ("axis_name", "axis_index_groups", "momentum", "epsilon", "unbiased_var", "frozen", "frozen_params")
# The classes to convert to, each with its own options. IndexedBatchNorm and ConditionalBatchNorm are missing, because
# their calls take an index or a label, which an existing model does not pass.
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "BatchNorm": (),
    "AdaptiveBatchNorm": ("source_weight",),
    "GhostBatchNorm": ("ghost_size",),
    "RenormBatchNorm": ("r_max", "d_max", "average"),
}
_PURE: Mapping[str, type[BatchNorm]] = {
    kind.__name__: kind for kind in (BatchNorm, AdaptiveBatchNorm, GhostBatchNorm, RenormBatchNorm)
}


class Conversion(NamedTuple):
    """The changes that `convert` makes to the layers of a model. Equal changes compare and hash equal."""

    to: type | None
    where: Where | None
    changes: tuple[tuple[str, Any], ...]

    def converts(self, path: str) -> bool:
        """Whether the layer of this path is converted."""
        return self.where is None or bool(self.where(path))

    def followed_by(self, later: "Conversion") -> "Conversion":
        """This conversion and a later one of the same layers in one."""
        changes = tuple(sorted({**dict(self.changes), **dict(later.changes)}.items(), key=lambda change: change[0]))
        return later._replace(to=self.to if later.to is None else later.to, changes=changes)


def conversion(library: str, to: Any, where: Any, changes: Mapping[str, Any], layers: Mapping[str, type]) -> Conversion:
    """Check the arguments of `convert`; `layers` are the library's classes by name."""
    if isinstance(to, type) and issubclass(to, BatchNorm):
        raise TypeError(
            f"convert(to=bnjax.{to.__name__}): expected a layer, got the class of its options. Pass "
            f"bnjax.{library}.{to.__name__}."
        )
    if to is not None and to not in [layers[name] for name in VARIANTS]:
        raise TypeError(
            f"convert(to={getattr(to, '__name__', to)!r}): expected one of {list(VARIANTS)} of bnjax.{library}. Layers "
            "with an index or a label need it as an argument, which the model does not pass."
        )
    if where is not None and not callable(where):
        raise TypeError(
            f"convert(where={where!r}): expected a function of a layer's path, such as lambda path: 'head' in path."
        )
    kind = "BatchNorm" if to is None else to.__name__
    own = VARIANTS[kind]
    for name, value in changes.items():
        if name not in OPTIONS + own:
            variant = next((v for v, names in VARIANTS.items() if name in names), None)
            wanted = f"It belongs to {variant}: pass to={variant} too" if variant else f"Changes are {OPTIONS + own}"
            raise TypeError(f"convert({name}=...): a {kind} has no {name}. {wanted}.")
        if is_traced(value):
            raise TypeError(
                f"convert({name}=...): the value is traced, but the options of a converted model are static. Pass a "
                "number, or write the model with bnjax's layers, which take traced values."
            )
    flags = {name: value for name, value in changes.items() if name in ("frozen", "frozen_params")}
    for name, value in flags.items():
        checks.boolean("convert", name, value)
    options = {name: value for name, value in changes.items() if name not in flags}
    required: dict[str, Any] = {name: None for name in own if name not in options and not hasattr(_PURE[kind], name)}
    layer = _PURE[kind](**{**required, **options}, call="convert")  # it checks them
    checked = flags | {name: _hashable(getattr(layer, name)) for name in options}
    return Conversion(to, where, tuple(sorted(checked.items(), key=lambda change: change[0])))


def _hashable(value: Any) -> Any:
    """An option, in a hashable form that is equal for equal values."""
    if not callable(value):
        return getattr(value, "item", lambda: value)()
    try:
        hash(value)
    except TypeError:  # a schedule that holds arrays, say; a partial is told apart by its identity
        return functools.partial(value)
    return value


def other_library(name: str) -> Any:
    """The module of conversion for "linen" or "nnx", for a layer of the one inside a model of the other.

    `flax.nnx.bridge` makes such layers. It is imported only when one is met, so that Linen does not load NNX.
    """
    return importlib.import_module(f"bnjax.{name}.conversion")


def instead(model: Any, is_module: Callable[[Any], bool]) -> str:
    """What to pass instead of an object that is not a module but has one, such as a Transformers model; or ""."""
    partial = isinstance(model, functools.partial)
    if partial and isinstance(model.func, type):
        return f"Call the partial, and pass the module that it makes, a {model.func.__name__}."
    if partial:
        return instead(model.func, is_module)
    owner = getattr(model, "__self__", None)
    if is_module(owner):
        return f"Pass the module itself, the {type(owner).__name__} whose method was passed."
    held = next((name for name in ("module", "model") if is_module(getattr(model, name, None))), None)
    if held is not None:
        return f"Pass its module, model.{held}."
    if is_module(getattr(getattr(model, "apply_fn", None), "__self__", None)):
        return "Pass the module whose apply the state was made with, state.apply_fn.__self__."
    return ""
