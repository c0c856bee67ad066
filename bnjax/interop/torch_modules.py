"""What PyTorch's modules, and the names of their tensors, say about a layer besides its arrays."""

import re
from collections.abc import Mapping
from typing import Any

from bnjax.core import trees
from bnjax.interop.arrays import Arrays, as_arrays, tensors
from bnjax.interop.kernels import NORM, Layer
from bnjax.interop.match import Pair, torch_layers

_COMPUTED = {  # by the endings of the tensors that a weight is computed from, the call that puts the weight back
    ("_g", "_v"): "torch.nn.utils.remove_weight_norm(module, {!r})",
    ("_orig", "_u"): "torch.nn.utils.remove_spectral_norm(module, {!r})",
    ("_orig", "_mask"): "torch.nn.utils.prune.remove(module, {!r})",
    (".original",): "torch.nn.utils.parametrize.remove_parametrizations(module, {!r})",
    (".original0",): "torch.nn.utils.parametrize.remove_parametrizations(module, {!r})",
}


def modules(source: Any) -> dict[str, Any]:
    """The modules in a PyTorch module by name, itself as ""; none for a state_dict."""
    return dict(source.named_modules(remove_duplicate=False)) if hasattr(source, "named_modules") else {}


def is_batch_norm(module: Any) -> bool:
    """Whether a PyTorch module is a batch normalization. One that tracks no statistics has them as None."""
    kinds = {kind.__name__ for kind in type(module).__mro__}
    return hasattr(module, "running_mean") and "_InstanceNorm" not in kinds


def check_computed(call: str, state_dict: Mapping[str, Any]) -> None:
    """Reject weights that PyTorch computes from other tensors at each call, as weight_norm and pruning do."""
    for endings, remedy in _COMPUTED.items():
        stems = [name.removesuffix(endings[0]) for name in state_dict if name.endswith(endings[0])]
        stems = [stem for stem in stems if re.search(r"parametrizations\.\w+$|(weight|bias)[^.]*$", stem)]
        stems = [stem for stem in stems if all(stem + ending in state_dict for ending in endings)]
        if stems:
            parts = [name for name in state_dict if name.startswith(tuple(stems))]
            remedy = remedy.format(stems[0].rpartition(".")[2])
            raise ValueError(
                f"{call}: PyTorch computes weights from other tensors at each call: {parts}. After model.eval(), put "
                f"the weight of each such module back by {remedy}, then pass the model or its state_dict."
            )


def model_layers(call: str, source: Any, variables: Any) -> tuple[Arrays, list[Layer]]:
    """The arrays of a PyTorch model or state_dict, and its layers.

    A batch normalization without any tensor, which only a model reveals, is a layer if the Flax model has one with
    nothing but running statistics.
    """
    state_dict = tensors(call, source)
    check_computed(call, state_dict)
    arrays = as_arrays(f"{call}(state_dict=...)", state_dict)
    layers, named = torch_layers(arrays), modules(source)
    own = variables if isinstance(variables, Mapping) else {}
    norms = trees.norms(own.get("params", {}), own.get("batch_stats", {}))
    if any(params.scale is None and params.bias is None for params, _ in norms.values()):
        bare = [name for name, module in named.items() if is_batch_norm(module) and not module.state_dict()]
        layers += [Layer(name, NORM, {}, {}) for name in bare]
        places = {name: i for i, name in enumerate(named)}
        layers.sort(key=lambda layer: places.get(layer.name, places.get(layer.name.rpartition(".")[0], 0)))
    return arrays, layers


def check_untracked(call: str, source: Any, pairs: list[Pair]) -> None:
    """Check that a layer without running statistics that is paired with one that has them is a batch normalization."""
    named = modules(source)
    for theirs, ours, by in pairs:
        module = named.get(theirs.name)
        if "mean" not in set(ours.arrays) - set(theirs.arrays) or is_batch_norm(module):
            continue
        if module is not None:
            raise ValueError(
                f"{call}(state_dict=...): {theirs.name!r} is a {type(module).__name__}, but {ours.name!r} has running "
                "statistics. Use the same kind of layer in the Flax model."
            )
        if by != "names":
            raise ValueError(
                f"{call}(state_dict=...): {ours.name!r} has running statistics, but {theirs.name!r} has none, so it "
                "may be a LayerNorm, or a BatchNorm with track_running_stats=False. Pass the PyTorch model itself, or, "
                f"if it is a BatchNorm, names={{{theirs.name!r}: {ours.name!r}}}."
            )
