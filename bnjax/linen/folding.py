"""Batch normalization of a Linen model, folded into its linear layers."""

from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import unfreeze
from flax.errors import InvalidRngError, ModifyScopeVariableError
from flax.nnx import bridge
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.core import trees
from bnjax.core.layer import aligned
from bnjax.deploy.affine import fold as affine_fold
from bnjax.deploy.neighbours import Neighbours
from bnjax.deploy.pairs import (
    EVALUATE,
    FoldReport,
    TracedLayer,
    check_arguments,
    evaluates,
    fold_linear,
    fold_pairs,
    in_training,
    left,
    log,
)
from bnjax.linen.conversion import check_model, class_of, contexts, converted, wrapped
from bnjax.linen.norm import AdaptiveBatchNorm, BatchNorm, GhostBatchNorm, RenormBatchNorm
from bnjax.traced.calls import recorded_linen

_LINEAR = (nn.Dense, nn.Conv, nn.ConvTranspose)
_NORM = (nn.BatchNorm, AdaptiveBatchNorm, BatchNorm, GhostBatchNorm, RenormBatchNorm)


def fold_model(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, pairs: Any = None, **kwargs: Any
) -> tuple[dict[str, Any], "Folded"]:
    """Fold batch normalization into adjacent linear layers, for evaluation without it.

        scale' = scale / sqrt(var + epsilon)    bias' = bias - mean * scale'    (Ioffe & Szegedy, 2015, algorithm 2)

    The model is traced in evaluation, and every norm that is adjacent to a linear layer is folded: into the linear
    layer before it, or else into the one after it. Adjacent means that nothing but reshapes that keep the features on
    the last axis lies between the two, and that the output of the first has no other use. `interceptor.report` lists
    the pairs that were folded, and the reason for each norm that was not, other layers with running statistics
    included; such norms are logged as a warning by the logger `bnjax`.

    A Linen module cannot drop a layer. The result is therefore a model, `interceptor.model`, in which a folded norm
    returns its input and a linear layer without a bias adds its new one. Calling a folded norm in training is an error,
    unless it is frozen. A model that holds this model as a submodule needs the interceptor itself:

        y = interceptor.model.apply(variables, x, train=False)

        with nn.intercept_methods(interceptor):
            y = model.apply(variables, x, train=False)

    The variables have the tree of the same model without the norms and with use_bias=True.

    Args:
      model: a Linen module.
      variables: `params`, `batch_stats`, and the model's other collections.
      *args, **kwargs: arguments of `model.apply` in evaluation, arrays or `jax.ShapeDtypeStruct`s. The model is traced
        with them, not run.
      pairs: the pairs to fold, by default all that are adjacent. A pair is (linear, norm) or (norm, linear), in the
        order of the calls, as paths such as ("Conv_0", "BatchNorm_0") or ("Block_0/BatchNorm_0", "Block_0/Dense_0").
        Linear layers are `nn.Dense`, `nn.Conv` (grouped and depthwise ones included) and `nn.ConvTranspose`. A linear
        layer after the norm must not pad zeros, because the norm would map them to other values: its padding must be
        VALID, CIRCULAR or REFLECT, or its kernel of size 1.

    Returns:
      variables: the new variables, without those of the folded norms; arrays keep their dtypes.
      interceptor: the interceptor for `flax.linen.intercept_methods` around every `apply`, also under `jit` and
        `jax.export`; it has the attributes `model` and `report`.

    Raises:
      ValueError, TypeError: for an object that is not a Linen module, a path that the model does not call, a pair of
        other kinds or shapes or that is not adjacent, a layer in two pairs, or a trace in training, in which norms
        use the batch's statistics. In a call of the folded model: for other variables, and for a call in training.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import bnjax.linen
      >>> model = nn.Sequential([nn.Dense(3, use_bias=False), bnjax.linen.BatchNorm(use_running_average=True)])
      >>> x = jnp.ones((1, 2))
      >>> variables, interceptor = bnjax.linen.fold_model(model, model.init(jax.random.key(0), x), x)
      >>> y = interceptor.model.apply(variables, x)
      >>> interceptor.report.folded, sorted(variables["params"]["layers_0"]), "batch_stats" in variables
      ([('layers_0', 'layers_1')], ['bias', 'kernel'], False)
    """
    check_model("fold_model", model)
    trees.check_no_report("fold_model(variables=...)", variables)
    check_arguments(args, kwargs)
    layers, norm_facts, neighbours = _traced(model, variables, args, kwargs)
    params: dict[Any, Any]
    params, stats = (flatten_dict(unfreeze(variables.get(name, {}))) for name in ("params", "batch_stats"))
    norms = trees.norms(variables.get("params", {}), variables.get("batch_stats", {}))
    folded: dict[str, Any] = {}  # by the path of a norm, the dtype of its output
    biased = set()  # linear layers that had no bias

    def fold_one(call, linear, norm, previous):
        epsilon, dtype = norm_facts[norm]
        affine = affine_fold(*norms[norm], epsilon=epsilon)
        kernel, bias = ((*linear.split("/"), name) if linear else (name,) for name in ("kernel", "bias"))
        old_kernel, old_bias = (nn.meta.unbox(params.get(path)) for path in (kernel, bias))
        both = fold_linear(call, layers[linear].module, old_kernel, old_bias, affine, previous)
        if bias not in params:
            biased.add(linear)
        for path, new in zip((kernel, bias), both, strict=True):
            box = params.get(path)
            params[path] = box.replace_boxed(new) if isinstance(box, nn.meta.AxisMetadata) else new
        folded[norm] = dtype

    others = _others(variables, layers)
    report = fold_pairs(pairs, layers, neighbours, (_LINEAR, _NORM), fold_one, others)
    log(report)
    removed = {tuple(name.split("/")) for name in folded}
    remaining = {
        name: unflatten_dict({path: value for path, value in flat.items() if path[:-1] not in removed})
        for name, flat in {"params": params, "batch_stats": stats}.items()
    }
    variables = {name: tree for name, tree in {**variables, **remaining}.items() if tree}
    return variables, Folded(model, _FoldedLayers(folded, biased), report)


def _others(variables, layers):
    """By path, why each layer with running statistics that is not a norm called by the model is not folded."""
    found = {}
    for path in trees.others(variables, [path for path, layer in layers.items() if layer.kind in _NORM]):
        parts = path.split("/")
        above = ["/".join(parts[:i]) for i in range(len(parts) + 1)]
        bridged = next((p for p in above if p in layers and issubclass(layers[p].kind, bridge.ToLinen)), None)
        if bridged is not None:
            found[path] = (
                f"it is in the NNX module {bridged!r} (flax.nnx.bridge), which is not traced. A layer of bnjax.linen "
                "in its place reads the same variables"
            )
        else:
            found[path] = left(layers[path].kind, _NORM) if path in layers else "the model does not call it"
    return found


class Folded:
    """The interceptor that `fold_model` returns, with the `model` that runs under it and the `report`."""

    def __init__(self, model: nn.Module, layers: "_FoldedLayers", report: FoldReport):
        self._layers = layers
        self.report: FoldReport = report
        # This context comes before that of a conversion, whose interceptor would compute the folded norms.
        self.model: Any = wrapped(model.clone(), layers, *contexts(model))

    def __call__(self, next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        return self._layers(next_function, args, kwargs, context)


class _FoldedLayers:
    """The folded norms and linear layers. They hold no model, because the caches of `jax.jit` keep contexts."""

    def __init__(self, folded: Mapping[str, Any], biased: set[str]):
        self._folded, self._biased = folded, biased

    def __call__(self, next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, name = context.module, "/".join(context.module.path)
        called = context.method_name == "__call__"
        if called and name in self._folded:
            if module.has_variable("batch_stats", "mean"):
                raise ValueError(_UNFOLDED.format(f"{name!r} has statistics"))
            if not evaluates(args, kwargs, converted(context)):
                raise ValueError(
                    f"interceptor: {name!r} is folded, but is called in training, with the batch's statistics. "
                    f"{EVALUATE} Train the model that was not folded."
                )
            return next(iter((*args, *kwargs.values()))).astype(self._folded[name])
        y = next_function(*args, **kwargs)
        if called and name in self._biased:
            if not module.has_variable("params", "bias"):
                raise ValueError(_UNFOLDED.format(f"{name!r} has no bias"))
            added: Any = aligned(module.get_variable("params", "bias"), y, (y.ndim - 1,))
            y += added.astype(y.dtype)
        return y

    @contextmanager
    def active(self):
        """A context in which the model runs folded, blocks under `flax.linen.jit` included."""
        with ExitStack() as stack:
            if self not in _active.value:
                stack.enter_context(_active((*_active.value, self)))
                stack.enter_context(nn.intercept_methods(self))
            yield


_UNFOLDED = "interceptor: {}. Apply the variables that fold_model returned, not others."
# A user context is part of jit's cache key. Without it, a block compiled unfolded would stay unfolded.
_active = jax.make_user_context(())


def _traced(model, variables, args, kwargs):
    """The layers that a model calls, by path; each norm's epsilon and output dtype; and the trace."""
    layers: dict[str, TracedLayer] = {}
    facts: dict[str, tuple[float, Any]] = {}

    def record(call):
        layer, path, kind, x = call.layer, call.path, class_of(call.layer), call.x
        if call.method != "__call__" or x is None:
            return call()
        options = converted(call.context)
        running = kind not in _NORM or evaluates(call.args, call.kwargs, options)
        if not running and not layer.is_mutable_collection("batch_stats"):
            raise in_training("fold_model(...)", path)
        folded_already = kind in _NORM and not layer.has_variable("batch_stats", "mean")
        if kind not in _LINEAR + _NORM or folded_already:
            layers[path] = TracedLayer(nn.Module if folded_already else kind, None)
            return call()
        if kind in _LINEAR:
            # A bound module would hold tracers after the trace.
            layers[path] = TracedLayer(kind, layer.clone(parent=None))
            return call.marked(nn.meta.unbox(layer.get_variable("params", "kernel")))
        calls = {(jnp.ndim(x), running)}.union(layers[path].calls if path in layers else ())
        layers[path] = TracedLayer(kind, None, options.axis, isinstance(options, AdaptiveBatchNorm), frozenset(calls))
        y = call.marked()
        facts[path] = options.epsilon, y.dtype
        return y

    def run(variables, args, kwargs):
        with recorded_linen(record):
            return model.apply(variables, *args, **kwargs)

    try:
        neighbours = Neighbours(run, variables, args, kwargs)
    except (InvalidRngError, ModifyScopeVariableError) as error:
        raise ValueError(f"fold_model(...): the model ran as in training: {error}. {EVALUATE}") from error
    return layers, facts, neighbours
