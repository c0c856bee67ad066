"""Conversion of an existing NNX model: its BatchNorm layers become layers of bnjax."""

import functools
import inspect
import types
from typing import Any, TypeVar

from flax import linen, nnx
from flax.nnx import bridge

from bnjax.core.trees import owns_statistics
from bnjax.flax_shared import flax_internals
from bnjax.flax_shared.conventions import counts
from bnjax.flax_shared.conversion import VARIANTS, Conversion, Where, conversion, instead, other_library
from bnjax.flax_shared.found import Found
from bnjax.nnx import variants
from bnjax.nnx.norm import BatchNorm, add_count, collect_for_linen

Model = TypeVar("Model")
_LAYERS = {
    name: kind for name, kind in vars(variants).items() if isinstance(kind, type) and issubclass(kind, BatchNorm)
}


def convert(model: Model, *, to: type | None = None, where: Where | None = None, **changes: Any) -> Model:
    """Turn every `flax.nnx.BatchNorm` in `model` into a `bnjax.nnx.BatchNorm`, in place.

    PyTorch's counterpart is `SyncBatchNorm.convert_sync_batchnorm`. Each layer stays the same object and changes its
    class; values, options and metadata are kept, in lists, vmapped stacks and shared layers as well. Options of bnjax's
    own layers are changed as well. A layer of a subclass gets a subclass of that class, of the same name, whose
    `super().__call__` is bnjax's. Linen layers in `flax.nnx.bridge.ToNNX` are converted as in `bnjax.linen.convert`.
    Call `convert` outside transforms, and before `nnx.view` and `nnx.cached_partial`, which store the layers' classes.

    A layer that `where` leaves out is not converted: a layer of Flax stays one. To convert every layer and change the
    options of some, convert twice.

    A warning says that nothing was converted, or names what could not be: modules with a running mean and variance that
    are not Flax's, and subclasses that override `__call__` without `super().__call__`. For Linen layers, the first call
    of the model warns.

    Args:
      model: an NNX module, or any container of modules.
      to: the class to convert to, `BatchNorm`, `AdaptiveBatchNorm`, `GhostBatchNorm` or `RenormBatchNorm`; by default a
        layer of bnjax keeps its class. Layers with an index or a label always keep theirs.
      where: function from a layer's path in the model, such as "blocks/0/bn", to whether it is converted; by default
        every layer is. A shared layer has one path.
      **changes: options of `BatchNorm`: `axis_name` (None removes the model's own), `axis_index_groups`, `momentum`,
        `epsilon`, `unbiased_var`, `frozen`, `frozen_params`; of `AdaptiveBatchNorm`:
        `source_weight`; of `GhostBatchNorm`: `ghost_size`; of `RenormBatchNorm`: `r_max`, `d_max`, `average`. Other
        options stay as in the model.

    Returns:
      `model` itself.

    Raises:
      TypeError, ValueError: for an object that neither is an NNX module nor holds one, an option that the layers do not
        have, a value that the option does not accept, or a `where` that matches no layer. The model is then unchanged.

    Example:
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
      >>> model = bnjax.nnx.convert(model, momentum=0.9)
      >>> isinstance(model.layers[1], bnjax.nnx.BatchNorm), model.layers[1].momentum
      (True, 0.9)
    """
    check_model("convert", model)
    kinds = {name: _LAYERS[name] for name in VARIANTS}
    changed = conversion("nnx", to, where, changes, kinds)
    found = Found(type(model).__name__, changed)
    planned = _plan(model, (), found)
    found.tell(everything=not found.waiting)  # a Linen part reports the rest in its first call
    _carry_out(planned, found)
    return model


def convert_part(model: Any, changed: Conversion, prefix: tuple[str, ...], found: Found) -> Any:
    """An NNX model inside a Linen model, converted in place; `changed` is the conversion of the Linen model."""
    if changed.to is not None:
        changed = changed._replace(to=_LAYERS[changed.to.__name__])
    part = Found(found.model, changed)
    _carry_out(_plan(model, prefix, part), part)
    found.layers.update({path: found.conversion.converts(path) for path in part.layers})
    found.left.update(part.left)
    return model


def _plan(model, prefix, found):
    """What becomes of each module that is converted: its path, the module, and its new class or None for Linen's."""
    planned = []
    for inner, node in nnx.iter_graph(model):
        names = (*prefix, *map(str, inner))
        path = "/".join(names)
        if isinstance(node, bridge.ToNNX):
            found.waiting.add(names)
            planned.append((names, node, None))
        elif isinstance(node, nnx.BatchNorm):
            kind, reason = _target(node, found.conversion.to)
            if kind is not None:
                found.layers[path] = found.conversion.converts(path)
                if found.layers[path]:
                    planned.append((names, node, kind))
            if reason:
                found.leave(path, reason)
        elif not isinstance(node, nnx.Variable) and _owns_statistics(node):
            name = type(node).__name__
            found.leave(path, f"{name} holds running statistics, but is no BatchNorm layer of Flax or bnjax")
    return planned


def _carry_out(planned, found):
    for path, node, kind in planned:
        if kind is None:
            linen_conversion = other_library("linen")
            node.to_nnx__module = linen_conversion.convert_part(node.to_nnx__module, found.conversion, path, found)
            continue
        if type(node) is not kind:
            _become(node, kind)
        for name, value in found.conversion.changes:
            setattr(node, name, value)
        if counts(node) and not hasattr(node, "count"):
            add_count(node)


def _target(layer, to):
    """The class that a layer gets, None if it cannot be converted; and why the result is not what was asked for."""
    written = getattr(layer, "_written", type(layer))  # a converted subclass has the class that its author wrote
    ours: Any = next((c for c in written.__mro__ if _LAYERS.get(c.__name__) is c), None)
    if ours is not None and to in (None, ours):
        return type(layer) if to is None else written, ""
    kind, base = to or BatchNorm, ours or nnx.BatchNorm
    if base.__name__ in VARIANTS and written is base:
        return kind, ""
    if base.__name__ == "BatchNorm" and _reaches(written, base):
        return _subclass(written, kind), ""
    if ours is None:
        return None, f"{written.__name__} overrides __call__ without super().__call__"
    return type(layer), f"{written.__name__} keeps its class, since its call is not that of BatchNorm"


def _reaches(cls, stop):
    """Whether each class before `stop`, which is a base of the class, calls `super().__call__` where it overrides it.

    The call may be in another method of the class, which `__call__` calls.
    """
    before = cls.__mro__[: cls.__mro__.index(stop)]
    return all("__call__" not in vars(c) or any(map(_calls_super, vars(c).values())) for c in before)


def _calls_super(method):
    method = getattr(method, "func", method)  # of functools.partialmethod
    codes = [getattr(inspect.unwrap(method) if callable(method) else method, "__code__", None)]
    names: set[str] = set()
    for code in codes:
        if isinstance(code, types.CodeType):
            names.update(code.co_names)
            codes += code.co_consts  # functions and lambdas inside
    return {"super", "__call__"} <= names


@functools.cache  # NNX itself keeps every class of a module
def _subclass(written, kind):
    """A subclass of an author's subclass of BatchNorm whose `super().__call__` is that of `kind`."""
    body = {name: getattr(written, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {"_written": written, "__reduce_ex__": _reduced}
    return type(written)(written.__name__, (written, kind), body, pytree=flax_internals.is_pytree(written))


def _reduced(layer, protocol):
    # Pickle finds a class by its name, which is that of the author's class.
    kind = type(layer).__bases__[1]
    return _rebuilt, (layer._written, kind), layer.__getstate__()


def _rebuilt(written, kind):
    cls = _subclass(written, kind)
    return cls.__new__(cls)


def _owns_statistics(node):
    collections: dict[str, dict[str, int]] = {}
    for name, value in getattr(node, "__dict__", {}).items():
        if isinstance(value, nnx.Variable):
            held = value.get_value()  # one array, or a dictionary of them
            arrays = held if isinstance(held, dict) else {name: held}
            ranks = {str(key): getattr(array, "ndim", 0) for key, array in arrays.items()}
            collections.setdefault(type(value).__name__, {}).update(ranks)
    owner = type(node).__name__
    return any(owns_statistics(collection, ranks, owner) for collection, ranks in collections.items())


def check_model(call: str, model: Any, *, containers: bool = True) -> None:
    """Check that a model is an NNX module or, if `containers` are accepted, holds one."""
    if isinstance(model, type):
        raise TypeError(f"{call}(model={model.__name__}): expected a module, got a class. Pass {model.__name__}(...).")
    if isinstance(model, nnx.Module):
        return
    name = type(model).__name__
    if advice := instead(model, lambda value: isinstance(value, nnx.Module)):
        raise TypeError(f"{call}(model={name}): expected an NNX module. {advice}")
    if advice := instead(model, lambda value: isinstance(value, linen.Module)):
        raise TypeError(f"{call}(model={name}): expected an NNX module. Use bnjax.linen.{call}. {advice}")
    nodes = [node for _, node in nnx.iter_graph(model)]
    if any(isinstance(node, linen.Module) for node in nodes):
        other = "fold_model" if call == "fold_report" else call  # its report is an attribute of the result
        raise TypeError(f"{call}(model={name}): a Linen module. Use bnjax.linen.{other}.")
    if not containers:
        raise TypeError(f"{call}(model={name}): expected an NNX module. Pass the module whose call takes the input.")
    if not any(isinstance(node, nnx.Module) for node in nodes):
        raise TypeError(
            f"{call}(model={name}): expected an NNX module, or a container such as a list or a dictionary that holds "
            "one. Pass the module."
        )


def _become(layer, kind):
    """Change a layer's class: remove the options of the old class, and set the defaults of the new one."""
    collect_for_linen(layer)
    for name in (option for options in VARIANTS.values() for option in options):
        if hasattr(layer, name):
            delattr(layer, name)
    layer.__class__ = kind
    if issubclass(kind, variants.RenormBatchNorm):
        layer.r_max, layer.d_max = variants.RENORM_R_MAX, variants.RENORM_D_MAX
        layer.average = "std"
