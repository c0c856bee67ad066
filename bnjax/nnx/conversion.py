"""Conversion of an existing NNX model: its BatchNorm layers become layers of bnjax."""

from typing import Any, TypeVar

from flax import linen, nnx

from bnjax.flax_shared.conventions import counts
from bnjax.flax_shared.conversion import VARIANTS, Where, conversion
from bnjax.nnx import norm as norm_module
from bnjax.nnx.norm import BatchNorm

Model = TypeVar("Model")


def convert(model: Model, *, to: type | None = None, where: Where | None = None, **changes: Any) -> Model:
    """Turn every `flax.nnx.BatchNorm` in `model` into a `bnjax.nnx.BatchNorm`, in place.

    PyTorch's counterpart is `SyncBatchNorm.convert_sync_batchnorm`. Each layer stays the same object and changes its
    class; values, options and metadata are kept, in lists, vmapped stacks and shared layers as well. Options of bnjax's
    own layers are changed as well. Instances of other subclasses of `flax.nnx.BatchNorm` are not converted. Call
    `convert` outside of transforms, and before `nnx.view` and `nnx.cached_partial`, which store the layers' classes.

    Args:
      model: an NNX module, or any container of modules.
      to: the class to convert to, `BatchNorm`, `GhostBatchNorm` or `RenormBatchNorm`; by default a layer of bnjax keeps
        its class. Layers with an index or a label always keep theirs.
      where: function from a layer's path in the model, such as "blocks/0/bn", to whether it is converted; by default
        every layer is. A shared layer has one path.
      **changes: options of `BatchNorm`: `axis_name` (None removes the model's own), `axis_index_groups`, `momentum`,
        `epsilon`, `unbiased_var`, `frozen`, `frozen_params`; of `GhostBatchNorm`: `ghost_size`; of `RenormBatchNorm`:
        `r_max`, `d_max`. Other options stay as in the model.

    Returns:
      `model` itself.

    Raises:
      TypeError, ValueError: for an object that neither is an NNX module nor holds one, an option that the layers do not
        have, or a value that the option does not accept. The model is then unchanged.

    Example:
      >>> from flax import nnx
      >>> import bnjax.nnx
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
      >>> model = bnjax.nnx.convert(model, momentum=0.9)
      >>> isinstance(model.layers[1], bnjax.nnx.BatchNorm), model.layers[1].momentum
      (True, 0.9)
    """
    check_model("convert", model)
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
        if counts(layer) and not hasattr(layer, "count"):
            norm_module.add_count(layer)
    return model


def check_model(call: str, model: Any, *, containers: bool = True) -> None:
    """Check that a model is an NNX module or, if `containers` are accepted, holds one."""
    if isinstance(model, type):
        raise TypeError(f"{call}(model={model.__name__}): expected a module, got a class. Pass {model.__name__}(...).")
    if isinstance(model, nnx.Module):
        return
    name, nodes = type(model).__name__, [node for _, node in nnx.iter_graph(model)]
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
    norm_module.collect_for_linen(layer)
    for name in ("ghost_size", "r_max", "d_max"):
        if hasattr(layer, name):
            delattr(layer, name)
    layer.__class__ = kind
    if kind is norm_module.RenormBatchNorm:
        layer.r_max, layer.d_max = norm_module.RENORM_R_MAX, norm_module.RENORM_D_MAX
