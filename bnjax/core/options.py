"""The options that all calls share, checked once, in one spelling that is hashable and so static in a compiled call."""

from collections.abc import Hashable
from typing import Any, NamedTuple

from bnjax.core import checks
from bnjax.core.collectives import Groups


class Options(NamedTuple):
    """What is static in a call of `bn_apply`, of a variant, or of a layer.

    `call` is the name that errors mention. `collect` asks for the moments of the batch. `dtype` is the output's,
    by default x's: a layer whose output is wider than its input need not widen the input first. The other fields are
    arguments of `bnjax.bn_apply`.
    """

    call: str
    train: bool
    axis: int | tuple[int, ...]
    epsilon: float
    axis_names: tuple[Hashable, ...]
    axis_index_groups: Groups
    unbiased_var: bool
    collect: bool
    dtype: Any


def checked(
    call: str,
    train: bool,
    *,
    axis: Any,
    epsilon: Any,
    axis_name: Any,
    axis_index_groups: Any,
    unbiased_var: bool,
    collect: bool = False,
    dtype: Any = None,
) -> Options:
    """The options, or an error that names the call, the argument, what came and what to pass."""
    checks.boolean(call, "train", train)
    checks.boolean(call, "unbiased_var", unbiased_var)
    return Options(
        call,
        train,
        checks.static_axis(call, axis),
        checks.positive(call, "epsilon", epsilon),
        checks.axis_names(call, axis_name),
        checks.index_groups(call, axis_index_groups),
        unbiased_var,
        collect,
        dtype,
    )


def fitted(options: Options, x: Any, mask: Any) -> Options:
    """The options for this array, with its feature axes in one spelling, so that equal calls share a compiled program.

    A mask is looked into here, since its values are known to an eager call but not inside of the compiled function.
    """
    checks.inexact(options.call, "x", x)
    checks.known_weights(options.call, mask)
    axes = checks.feature_axes(options.call, x, options.axis)
    return options._replace(axis=axes[0] if len(axes) == 1 else axes)
