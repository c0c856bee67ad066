"""Layers of batch normalization in the trees that hold a model's variables, by name.

The name of a layer is its path: "block/BatchNorm_0" in Linen, "layers/1" in NNX, "" if the tree holds a single layer.
The last part of a path names the variable: scale, bias, mean, var or count. A tree is made of dictionaries, named
tuples or NNX states.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from bnjax.core.records import BNParams, BNState, Collected, Moments, Support


def leaves(tree: Any) -> dict[str, dict[str, Any]]:
    """The arrays of a tree, by the name of the layer and the name of the variable."""
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        layer, name = _names(path)
        found.setdefault(layer, {})[name] = leaf
    return found


def replaced(tree: Any, new: Mapping[str, Mapping[str, Any]]) -> Any:
    """The tree with the arrays of `new` in place of its own; arrays of `new` that the tree lacks are ignored."""

    def replace(path, leaf):
        layer, name = _names(path)
        return new.get(layer, {}).get(name, leaf)

    return jax.tree_util.tree_map_with_path(replace, tree)


def norms(params: Any, batch_stats: Any) -> dict[str, tuple[BNParams, BNState]]:
    """The layers with a running mean and variance. A scale, bias or count that a layer lacks is None."""
    learned = leaves(params)
    found = {}
    for layer, stats in leaves(batch_stats).items():
        if "mean" in stats and "var" in stats:
            own = learned.get(layer, {})
            found[layer] = (BNParams(own.get("scale"), own.get("bias")), _state(**stats))
    return found


def collected(batch_moments: Any) -> dict[str, Collected]:
    """The moments that the layers collected, by layer."""
    parts = leaves(batch_moments)
    layers = [path.removesuffix("moments").rstrip("/") for path in parts if path.rpartition("/")[2] == "moments"]
    return {
        layer: Collected(Moments(**parts[_below(layer, "moments")]), Support(**parts[_below(layer, "support")]))
        for layer in layers
    }


def others(variables: Mapping[str, Any], handled: Iterable[str]) -> list[str]:
    """The layers that own a running mean and variance, under whatever names and in any collection, but are not handled.

    An example is a project's own batch normalization with a `running_mean` and a `running_var`.
    """
    known = set(handled)
    found: dict[str, None] = {}
    for collection, tree in variables.items():
        if collection != "batch_moments":
            for layer, arrays in leaves(tree).items():
                ranks = {name: getattr(array, "ndim", 0) for name, array in arrays.items()}
                if layer not in known and owns_statistics(collection, ranks):
                    found[layer] = None
    return list(found)


_MEAN = re.compile(r"(?<![a-z])(mean|mu)(?![a-z])")
_SPREAD = re.compile(r"(?<![a-z])(var|variance|std|stddev|sigma)(?![a-z])")
_RUNNING = re.compile(r"(?<![a-z])(running|moving|ra|ema|pop|population|average|avg)(?![a-z])")
_BATCH_NORM = re.compile(r"[Bb]atch_?([Rr]e)?[Nn]orm|BN(?!N)")


def owns_statistics(collection: str, ranks: Mapping[str, int], owner: str = "") -> bool:
    """Whether variables of one module, by the rank of each name, hold a running mean and variance of features.

    Plain names such as `mean` and `var` count in a collection of statistics only: elsewhere they may be parameters of a
    distribution, or constants of a data set. Scalars, such as the statistics of a reward, have no features. If the
    class of the module, `owner`, is called batch normalization, plain names count wherever they are not parameters, and
    two variables of statistics count whatever their names are.
    """
    names = {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() for name, rank in ranks.items() if rank > 0}
    means, spreads = ({rule.sub("", n) for n in names if rule.search(n)} for rule in (_MEAN, _SPREAD))
    stems = means & spreads
    batch_norm = _BATCH_NORM.search(owner) is not None
    if "stat" in collection.lower():
        return bool(stems) or (batch_norm and len(names) > 1)
    plain = batch_norm and "param" not in collection.lower()
    return any(plain or _RUNNING.search(stem) for stem in stems)


def named(layers: Iterable[str]) -> str:
    """The names of layers, for a message."""
    return ", ".join(layer or "the model itself" for layer in layers)


def check_no_report(argument: str, tree: Any) -> None:
    """Check that variables are not the report of a conversion, nor the pair of variables and report."""

    def is_report(node):
        return type(node).__module__.startswith("bnjax.interop.")

    if is_report(tree) or (isinstance(tree, tuple | list) and any(map(is_report, tree))):
        got = "the report of a conversion" if is_report(tree) else "the variables of a conversion and its report"
        raise TypeError(
            f"{argument}: got {got}. Take them apart, variables, report = from_torch_model(...), and pass the "
            "variables."
        )


def check_collected(call: str, batch_stats: Any, batch_moments: Any) -> None:
    """Check that every layer with running statistics collected the moments of the batch."""
    given = collected(batch_moments)
    missing = [layer for layer in norms({}, batch_stats) if layer not in given]
    if missing:
        raise ValueError(
            f"{call}: layers with running statistics that gave no moments of the batch: {named(missing)}. For a model "
            "written with Flax's BatchNorm use bnjax.linen.convert or bnjax.nnx.convert. If convert(model, where=...) "
            "left these layers out, convert its result once more without where=. Layers of other classes have to "
            "compute through bnjax's. For bnjax's own, list the collection batch_moments beside batch_stats in nn.scan "
            "and nn.vmap."
        )


def _names(path):
    whole = jax.tree_util.keystr(path, simple=True, separator="/").lstrip("/").removesuffix("/value")  # of NNX
    layer, _, name = whole.rpartition("/")
    return layer, name


def _below(layer, name):
    return f"{layer}/{name}" if layer else name


def _state(mean: Any, var: Any, count: Any = None, **_: Any) -> BNState:
    return BNState(mean, var, count)
