"""Batch normalization folded away in a Linen model."""

from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.core import trees
from bnjax.core.apply import aligned
from bnjax.deploy.affine import fold as affine_fold
from bnjax.deploy.neighbours import FoldReport, Neighbours, Seen, as_pairs, fold_linear, fold_pairs, log, watched
from bnjax.linen.conversion import class_of, contexts, converted, wrapped
from bnjax.linen.norm import BatchNorm, GhostBatchNorm, RenormBatchNorm

_LINEAR = (nn.Dense, nn.Conv, nn.ConvTranspose)
_NORM = (nn.BatchNorm, BatchNorm, GhostBatchNorm, RenormBatchNorm)


def fold_model(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, pairs: Any = None, **kwargs: Any
) -> tuple[dict[str, Any], "Folded"]:
    """Fold batch normalization into the layers beside it: for evaluation, the same model without it.

    The model is traced in evaluation, and every linear layer and norm that stand side by side are folded: nothing but
    reshapes that keep the features on the last axis may be between the two, and nothing else may use what the first
    gives. A norm goes into the linear layer before it, or else into the one after it. `interceptor.report` says which
    were folded, and for each norm that was not, why; where there are such, the logger `bnjax` warns of them.

    A Linen module cannot drop a layer. So this gives variables, and a model, `interceptor.model`, which is applied to
    them and in which a layer folded gives back what it gets, and a linear layer without a bias adds the one that it has
    now. For one that holds this model, the interceptor does it for both:

        y = interceptor.model.apply(variables, x, train=False)

        with nn.intercept_methods(interceptor):
            y = model.apply(variables, x, train=False)

    The variables are those of the model written without the norms and with use_bias=True.

    Args:
      model: a Linen module.
      variables: `params` and `batch_stats`, and whatever else it has.
      *args, **kwargs: of `model.apply` in evaluation, arrays or `jax.ShapeDtypeStruct`s. The model is traced with them,
        not run.
      pairs: those to fold in place of all that are found: (linear, norm) or (norm, linear), paths such as
        ("Conv_0", "BatchNorm_0") or ("Block_0/BatchNorm_0", "Block_0/Dense_0"), in the order in which the model calls
        them. They may come before *args too. Linear layers are `nn.Dense`, `nn.Conv` (grouped and depthwise too) and
        `nn.ConvTranspose`. After the norm they are exact only where no zeros are padded into their input: with padding
        VALID, CIRCULAR or REFLECT, or a kernel of one place.

    Returns:
      variables: new ones, without those of the layers folded.
      interceptor: for `flax.linen.intercept_methods` around every `apply`, also under `jit` and `jax.export`, with
        `model` and `report`.

    Raises:
      ValueError, TypeError: for a path that the model does not call, a pair that is not of these kinds, does not fit or
        does not stand side by side, a layer that is in two pairs, or a trace in training.

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
    chosen, args = as_pairs("fold_model", args, pairs)
    if not args and not kwargs:
        raise ValueError("fold_model(...): no arguments of the model. Pass an example input, with which it is traced.")
    seen, norm_facts, neighbours = _traced(model, variables, args, kwargs)
    params: dict[Any, Any]
    params, stats = (flatten_dict(unfreeze(variables.get(name, {}))) for name in ("params", "batch_stats"))
    norms = trees.norms(variables.get("params", {}), variables.get("batch_stats", {}))
    folded: dict[str, Any] = {}  # the dtype that each norm gives
    biased = set()

    def fold_one(call, linear, norm, previous):
        epsilon, dtype = norm_facts[norm]
        affine = affine_fold(*norms[norm], epsilon=epsilon)
        kernel, bias = ((*linear.split("/"), name) if linear else (name,) for name in ("kernel", "bias"))
        old_kernel, old_bias = (nn.meta.unbox(params.get(path)) for path in (kernel, bias))
        both = fold_linear(call, seen[linear].module, old_kernel, old_bias, affine, previous)
        if bias not in params:
            biased.add(linear)
        for path, new in zip((kernel, bias), both, strict=True):
            box = params.get(path)
            params[path] = box.replace_boxed(new) if isinstance(box, nn.meta.AxisMetadata) else new
        folded[norm] = dtype

    report = fold_pairs(chosen, seen, neighbours, (_LINEAR, _NORM), fold_one)
    log(report)
    gone = {tuple(name.split("/")) for name in folded}
    remaining = {
        name: unflatten_dict({path: value for path, value in flat.items() if path[:-1] not in gone})
        for name, flat in {"params": params, "batch_stats": stats}.items()
    }
    variables = {name: tree for name, tree in {**variables, **remaining}.items() if tree}
    return variables, Folded(model, folded, biased, report)


class Folded:
    """The interceptor that `fold_model` gives, with the `model` that runs under it and the `report`."""

    def __init__(self, model: nn.Module, folded: Mapping[str, Any], biased: set[str], report: FoldReport):
        self._folded, self._biased, self.report = folded, biased, report
        # Outside of a conversion, which would compute the norms.
        self.model: Any = wrapped(model.clone(), self, *contexts(model))

    def __call__(self, next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, name = context.module, "/".join(context.module.path)
        called = context.method_name == "__call__"
        if called and name in self._folded:
            if module.has_variable("batch_stats", "mean"):
                raise ValueError(_UNFOLDED.format(f"{name!r} has statistics"))
            return _argument(args, kwargs).astype(self._folded[name])
        y = next_function(*args, **kwargs)
        if called and name in self._biased:
            if not module.has_variable("params", "bias"):
                raise ValueError(_UNFOLDED.format(f"{name!r} has no bias"))
            added: Any = aligned(module.get_variable("params", "bias"), y, (y.ndim - 1,))
            y += added.astype(y.dtype)
        return y

    @contextmanager
    def active(self):
        """Everything within is folded, blocks under `flax.linen.jit` included."""
        with ExitStack() as stack:
            if self not in _active.value:
                stack.enter_context(_active((*_active.value, self)))
                stack.enter_context(nn.intercept_methods(self))
            yield


_UNFOLDED = "interceptor: {}. Apply the variables that fold gave, not others."
_active = jax.make_user_context(())  # in jit's key: a block that was compiled in another way is compiled anew


def _traced(model, variables, args, kwargs):
    """The layers that a model calls, by path; each norm's epsilon and the dtype it gives; who takes what from whom."""
    seen: dict[str, Seen] = {}
    facts: dict[str, tuple[float, Any]] = {}

    def record(next_function, args, kwargs, context):
        module, path, kind = context.module, "/".join(context.module.path), class_of(context.module)
        if context.method_name != "__call__" or not (args or kwargs):
            return next_function(*args, **kwargs)
        folded_already = kind in _NORM and not module.has_variable("batch_stats", "mean")
        if kind not in _LINEAR + _NORM or folded_already:
            seen[path] = Seen(nn.Module if folded_already else kind, None)
            return next_function(*args, **kwargs)
        x, kernel, options = _argument(args, kwargs), None, converted(context)
        if kind in _NORM:
            said = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
            evaluates = bool(options.use_running_average if said is None else said) or getattr(options, "frozen", False)
            now = Seen(kind, None, options.axis, frozenset({jnp.ndim(x)}), evaluates)
        else:
            kernel = nn.meta.unbox(module.get_variable("params", "kernel"))
            now = Seen(kind, module.clone(parent=None))  # unbound, since a bound one holds what is traced
        seen[path] = now.again(seen.get(path))

        def call(x):
            if args:
                return next_function(x, *args[1:], **kwargs)
            return next_function(**{**kwargs, next(iter(kwargs)): x})

        y = watched(path, kernel, call, x)
        if kind in _NORM:
            facts[path] = options.epsilon, y.dtype
        return y

    def call(variables, args, kwargs):
        return model.apply(variables, *args, **kwargs)

    with nn.intercept_methods(record), _active((*_active.value, object())):
        neighbours = Neighbours(call, (variables, args, kwargs), {})
    return seen, facts, neighbours


def _argument(args, kwargs):
    """The first argument of a call."""
    return args[0] if args else next(iter(kwargs.values()))
