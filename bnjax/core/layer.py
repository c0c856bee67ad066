"""A layer of batch normalization as one value: its options, and the steps of a call.

    y = scale * (x - mean) / sqrt(var + epsilon) + bias

In training `mean` and `var` are the batch's moments, which the running statistics absorb; in evaluation they are the
running statistics. A call goes through four steps:

    check              every argument is checked, and x is widened to 32 bits or more
    batch_moments      `reading.py` reads one part of a batch, `merging.py` merges parts
    normalized         the formula, with its derivative, in `normalize.py`
    absorb             the running statistics, in `running.py`

A variant is a subclass that replaces a step: `train` or `evaluate`.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import Array

from bnjax.core import checks
from bnjax.core.merging import merge_together
from bnjax.core.moments import collect, widened, wider
from bnjax.core.normalize import normalize
from bnjax.core.records import BNParams, BNState, Collected, Moments
from bnjax.core.running import absorb, rates
from bnjax.core.schedules import Momentum, check_no_class
from bnjax.core.sharding import select, sharded_as


@dataclass(frozen=True, kw_only=True)
class BatchNorm:
    """The options of a layer of batch normalization, checked, with the layer's functions `init` and `apply`.

    A value is immutable, hashes and compares by its options, and holds no arrays of the layer: `init` makes them, and
    `apply` takes and returns them. `bnjax.bn_apply` with the same options computes the same. A jitted function closes
    over a value, or takes it as a static argument. The layers of Flax are `bnjax.linen.BatchNorm` and
    `bnjax.nnx.BatchNorm`.

    Args:
      axis, momentum, epsilon, axis_name, axis_index_groups, unbiased_var: as in `bnjax.bn_apply`. If the momentum is an
        array, the value cannot be hashed or compared.
      dtype: dtype of y, complex for complex x; None is x's.

    Raises:
      TypeError, ValueError: for options that do not fit; the message names the option and what to pass.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> norm = bnjax.BatchNorm(momentum=0.9)
      >>> params, state = norm.init(2)
      >>> y, state = norm.apply(params, state, jnp.array([[1.0, 10.0], [3.0, 30.0]]), train=True)
      >>> y.round(3).tolist(), state.mean.round(3).tolist()
      ([[-1.0, -1.0], [1.0, 1.0]], [0.2..., 2.0])
    """

    axis: checks.Axis = -1
    momentum: Momentum = 0.99
    epsilon: float = 1e-5
    axis_name: checks.AxisName | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    unbiased_var: bool = False
    dtype: Any = None
    call: str = field(default="", repr=False, compare=False)  # the name in errors; by default the class's
    # `features` are the feature axes of the array that a value was fitted to, counted from 0; `names` is axis_name as a
    # tuple. Both are derived, so that a user never passes them.
    features: tuple[int, ...] = field(default=(), init=False, repr=False)
    names: tuple[Hashable, ...] = field(default=(), init=False, repr=False, compare=False)

    # The options that are numbers or functions of the number of updates. `numbers` makes them arguments of the compiled
    # function, so that another number does not compile another program.
    numeric: ClassVar[tuple[str, ...]] = ("momentum",)
    average: ClassVar[str] = "var"  # what the running variance is an average of, or "std"

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Reject the arguments of a layer of Flax, and say where to find that layer."""
        if args or not options.keys() <= cls.__dataclass_fields__.keys():
            names = [field.name for field in fields(cls) if field.init and field.name != "call"]
            got = ", ".join([*map(repr, args), *(name for name in options if name not in names)])
            raise TypeError(
                f"{cls.__name__}({got}): expected the options {', '.join(names)}, by keyword. The layers of Flax are "
                f"bnjax.linen.{cls.__name__} and bnjax.nnx.{cls.__name__}."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check the options, and give equal ones one spelling."""
        call = self.call or type(self).__name__
        checks.boolean(call, "unbiased_var", self.unbiased_var)
        names = checks.axis_names(call, self.axis_name)
        axis = checks.static_axis(call, self.axis)
        check_no_class(call, "momentum", self.momentum)
        self._set(
            call=call,
            axis=axis[0] if isinstance(axis, tuple) and len(axis) == 1 else axis,
            momentum=self.momentum if callable(self.momentum) else checks.momentum(call, self.momentum),
            epsilon=checks.positive(call, "epsilon", self.epsilon),
            axis_name=names[0] if len(names) == 1 else names or None,
            names=names,
            axis_index_groups=checks.index_groups(call, self.axis_index_groups),
            dtype=self.dtype if self.dtype is None else checks.inexact_dtype(call, self.dtype),
        )

    def _set(self, **options):
        vars(self).update(options)  # the class is frozen; only a value that nobody has seen yet may be changed

    def _fitted(self, **options):
        """A copy with other options, checked elsewhere."""
        fitted = object.__new__(type(self))
        fitted._set(**vars(self) | options)
        return fitted

    def init(
        self, features: int | Sequence[int], *, scale: Any = 1.0, bias: Any = 0.0, dtype: Any = jnp.float32
    ) -> tuple[BNParams, BNState]:
        """Parameters and running statistics, as `bnjax.bn_init` makes them."""
        return initial(self.call, features, scale, bias, dtype)

    def apply(
        self, params: BNParams, state: BNState | None, x: Array, train: bool, mask: Array | None = None
    ) -> tuple[Array, Any]:
        """y and the new state, as from `bnjax.bn_apply` with the same arguments."""
        return self.apply_part(params, state, x, train, mask, moments=False)[:2]

    def apply_part(
        self,
        params: Any,
        state: BNState | None,
        x: Array,
        train: bool,
        mask: Array | None = None,
        earlier: Collected | None = None,
        *,
        moments: bool = True,
        **inputs: Any,
    ) -> tuple[Array, Any, Collected | None]:
        """`apply` to one part of a batch, and the `moments` of the parts so far if asked for; None in evaluation.

        `earlier` are the moments of the other parts. They are merged with the moments of this part: the state absorbs
        all of them, and all of them are returned. The output is normalized by the moments of this part. `inputs` are
        further arguments of a variant.
        """
        checks.boolean(self.call, "train", train)
        checks.inexact(self.call, "x", x)
        checks.known_weights(self.call, mask)  # an eager call knows their values, the compiled function does not
        features = checks.feature_axes(self.call, x, self.axis)
        program = self._fitted(
            axis=features,
            features=features,
            dtype=x.dtype if self.dtype is None else self.dtype,
            **dict.fromkeys(self.numeric),
        )
        numbers = self.numbers(state, train, **inputs)
        y, new_state, batch = batch_norm(program, train, moments, params, state, x, mask, numbers, earlier)
        return y, new_state if train or state is None else state, batch

    def numbers(self, state: Any, train: bool) -> dict[str, Any]:
        """The numeric options as arguments of the compiled function, checked, with schedules called.

        A schedule is called here, for each call of `apply`. The compiled function would call it only while it is
        traced, and any other value that the schedule reads would never change again.
        """
        return {"momentum": rates(self.call, self.momentum, state, train)}

    # What follows is traced, for a value that was fitted to x. Its numeric options come in `numbers`.

    def check(self, params: Any, state: Any, x: Array, mask: Array | None, train: bool) -> None:
        """Check that the arguments of `apply` fit each other."""
        if jnp.iscomplexobj(x) and not jnp.issubdtype(self.dtype, jnp.complexfloating):
            raise TypeError(
                f"{self.call}(dtype={jnp.dtype(self.dtype).name}): x is {x.dtype}, and a real dtype cannot hold the "
                "imaginary part of y. Pass dtype=None, or a complex one."
            )
        checks.variables(self.call, params, state, x, self.features)
        checks.weights(self.call, mask, x)
        if train or state is None:
            checks.bound_axes(self.call, self.names, self.axis_index_groups)

    def run(
        self, params: Any, state: Any, x: Array, mask: Array | None, numbers: Any, earlier: Any, train: bool
    ) -> tuple[Array, Any, Collected | None]:
        """`apply_part`, as it is compiled."""
        self.check(params, state, x, mask, train)
        wide, mask = widened(x, mask)
        if state is not None and not train:
            return self.evaluate(params, state, wide, mask, numbers, x.dtype), state, None
        y, batch = self.train(params, state, wide, mask, numbers, x.dtype)
        if earlier is not None:
            batch = merge_together(earlier, batch)
        if state is not None:
            checks.rate(self.call, numbers["momentum"], state.mean)
            std_epsilon = self.epsilon if self.average == "std" else None
            state = absorb(state, batch, numbers["momentum"], self.unbiased_var, std_epsilon)
        return y, state, batch

    def train(
        self, params: Any, state: Any, x: Array, mask: Array | None, numbers: Any, stored: Any
    ) -> tuple[Array, Collected]:
        """y by the batch's statistics, and these statistics; `x` is widened from the dtype `stored`."""
        batch = self.batch_moments(state, x, mask, stored)
        mean, var = known_or_running(batch.moments, state, x, mask)
        return self.normalized(x, mean, var, params, mask), batch

    def evaluate(self, params: Any, state: BNState, x: Array, mask: Array | None, numbers: Any, stored: Any) -> Array:
        """y by the running statistics."""
        return self.normalized(x, state.mean, state.var.real, params, mask)

    def batch_moments(self, state: BNState | None, x: Array, mask: Array | None, stored: Any) -> Collected:
        """The moments of the batch, over the named axes too. The running mean is a guess of the batch's mean."""
        shift = None if state is None else state.mean
        return collect(x, mask, self.features, stored, self.names, self.axis_index_groups, shift=shift)

    @jax.named_scope("bnjax.normalize")
    def normalized(self, x: Array, mean: Any, var: Any, params: Any, mask: Array | None) -> Array:
        """The formula, in the output's dtype; statistics have the features' shape, scale and bias that or x's rank."""
        mean, var, scale, bias = (aligned(v, x, self.features) for v in (mean, var, *params))
        return normalize(x, mean, var, scale, bias, mask, self.epsilon, self.dtype).astype(self.dtype)


@partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def batch_norm(layer, train, moments, params, state, x, mask, numbers, earlier):
    """One program for each set of options and shapes, which an eager call dispatches once."""
    y, state, batch = layer.run(params, state, x, mask, numbers, earlier, train)
    return y, state, batch if moments else None


def known_or_running(moments: Moments, state: BNState | None, x: Array, mask: Array | None) -> tuple[Array, Array]:
    """Mean and variance to normalize by: the batch's, or the running ones for a feature without a valid element."""
    _, mean, var = moments
    if mask is None and 0 not in x.shape:
        return mean, var
    if state is None:
        running_mean, running_var = jnp.zeros_like(mean), jnp.ones_like(var)
    else:
        running_mean, running_var = state.mean.astype(mean.dtype), state.var.real.astype(var.dtype)
    some = moments.weight > 0
    return select(some, mean, sharded_as(mean, running_mean)), select(some, var, sharded_as(var, running_var))


def aligned(v: Any, x: Array, features: tuple[int, ...]) -> Any:
    """`v` with x's rank, which conditional scale and bias have already, and sharded as `x`."""
    if v is None:
        return v
    return sharded_as(x, v if v.ndim == x.ndim else jnp.expand_dims(v, [a for a in range(x.ndim) if a not in features]))


def initial(call: str, features: Any, scale: Any, bias: Any, dtype: Any) -> tuple[BNParams, BNState]:
    """`bnjax.bn_init`; errors name `call`."""
    shape = checks.feature_shape(call, features)
    dtype = checks.inexact_dtype(call, dtype)

    def learned(name, value):
        if value is None:
            return None
        checks.initial(call, name, value, shape, dtype)
        return jnp.broadcast_to(jnp.array(value, dtype), shape)

    wide = wider(dtype)
    state = BNState(jnp.zeros(shape, wide), jnp.ones(shape, jnp.finfo(wide).dtype), jnp.zeros(shape, jnp.int32))
    return BNParams(learned("scale", scale), learned("bias", bias)), state
