"""The BatchNorm layers of an NNX model that somebody else wrote, turned into those of bnjax."""

from typing import Any, TypeVar

from flax import nnx

from bnjax.flax_shared.conversion import VARIANTS, Where, conversion
from bnjax.nnx import norm as norm_module
from bnjax.nnx.norm import BatchNorm

Model = TypeVar("Model")


def convert(model: Model, *, to: type | None = None, where: Where | None = None, **changes: Any) -> Model:
    """Turn every `flax.nnx.BatchNorm` in `model` into a `bnjax.nnx.BatchNorm`, in place.

    What `convert_sync_batchnorm` is to PyTorch. The layers stay the objects that they were, of another class: values,
    options and metadata are kept, and lists, vmapped stacks and shared layers need no care. The options of bnjax's own
    layers are changed as well; instances of other subclasses of `flax.nnx.BatchNorm` are left as they are. Convert
    outside of transforms, and before `nnx.view` and `nnx.cached_partial`, which hold on to the layers as they are.

    Args:
      model: an NNX module, or any container of modules.
      to: the class to convert to, `BatchNorm`, `GhostBatchNorm` or `RenormBatchNorm`; by default a layer of bnjax keeps
        its class. Layers with an index or a label always do.
      where: which layers to convert: a function of the layer's path in the model, such as "blocks/0/bn". By default all
        of them. A layer that is shared has one path.
      **changes: `axis_name` (None takes away what the model's author wrote), `axis_index_groups`, `momentum`,
        `epsilon`, `unbiased_var`, `frozen`, `frozen_params`, as `BatchNorm` has them, and those of the variant:
        `ghost_size`; `r_max`, `d_max`. What is not named stays as the model has it.

    Returns:
      `model` itself.

    Raises:
      TypeError, ValueError: for a class of modules in place of a module, a change that the layers do not have, or a
        value that they do not take. The model is then as it was.

    Example:
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
      >>> model = bnjax.nnx.convert(model, momentum=0.9)
      >>> isinstance(model.layers[1], bnjax.nnx.BatchNorm), model.layers[1].momentum
      (True, 0.9)
    """
    if isinstance(model, type):
        raise TypeError(f"convert(model={model.__name__}): expected a module, got a class. Pass {model.__name__}(...).")
    kinds = {name: getattr(norm_module, name) for name in VARIANTS}
    changed = conversion("nnx", to, where, changes, kinds)
    for path, node in nnx.iter_graph(model):
        layer: Any = node
        ours = isinstance(node, BatchNorm)
        if not (ours or type(node) is nnx.BatchNorm) or not changed.converts("/".join(map(str, path))):
            continue
        if not ours or (changed.to is not None and type(layer) in kinds.values()):
            _become(layer, changed.to or BatchNorm)
        for name, value in changed.changes:
            setattr(layer, name, value)
        if layer._counts() and not hasattr(layer, "count"):
            layer._add_count()
    return model


def _become(layer, kind):
    """Of another class, without the options of the old one, and with the defaults of the new one."""
    for name in ("ghost_size", "r_max", "d_max"):
        if hasattr(layer, name):
            delattr(layer, name)
    layer.__class__ = kind
    if kind is norm_module.RenormBatchNorm:
        layer.r_max, layer.d_max = norm_module.RENORM_R_MAX, norm_module.RENORM_D_MAX
