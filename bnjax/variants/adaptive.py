"""Test-time adaptation of batch normalization: running statistics averaged with the statistics of the test batch.

Schneider et al. (2020), section 2; with source_weight = 0 prediction-time batch normalization, Nado et al. (2020).
Nothing is learned or stored: the state stays as training left it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from bnjax.core import checks
from bnjax.core.layer import BatchNorm
from bnjax.core.merging import support_of
from bnjax.core.moments import merge_over_axes
from bnjax.core.records import BNParams, BNState, Collected, Moments
from bnjax.core.running import average
from bnjax.core.sharding import select, sharded_as
from bnjax.core.weights import divided, is_real, nonzero, total_weight


@dataclass(frozen=True, kw_only=True)
class AdaptiveBatchNorm(BatchNorm):
    """Test-time adaptation as a value: `bnjax.BatchNorm` whose evaluation is `bnjax.adaptive_bn_apply`.

    Args:
      source_weight: how many examples the running statistics count as, >= 0.
      axis, momentum, ...: as in `bnjax.BatchNorm`. `axis_name` is used in evaluation too.

    Example:
      >>> import bnjax, jax.numpy as jnp
      >>> norm = bnjax.AdaptiveBatchNorm(source_weight=2)
      >>> params, state = norm.init(1)
      >>> y, state = norm.apply(params, state, jnp.array([[3.0], [5.0]]), train=False)
      >>> y[:, 0].round(3).tolist()
      [1.0, 3.0...]
    """

    source_weight: float | Array

    numeric: ClassVar[tuple[str, ...]] = ("momentum", "source_weight")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(source_weight=_checked_weight(self.call, self.source_weight))

    def numbers(self, state: Any, train: bool) -> dict[str, Any]:
        if state is None and not train:
            raise ValueError(
                f"{self.call}(state=None): there are no running statistics to adapt. Pass the state of bn_init after "
                "training, or call bn_apply with state=None, which normalizes by the batch."
            )
        return {**super().numbers(state, train), "source_weight": self.source_weight}

    def check(self, params: Any, state: Any, x: Array, mask: Array | None, train: bool) -> None:
        super().check(params, state, x, mask, train=True)  # axes have to be bound in evaluation too

    def evaluate(self, params: Any, state: BNState, x: Array, mask: Array | None, numbers: Any, stored: Any) -> Array:
        moments = self.batch_moments(state, x, mask, stored).moments
        examples = self._examples(x, mask, moments.weight)
        share = examples / nonzero(jnp.maximum(numbers["source_weight"], 0).astype(examples.dtype) + examples)

        def adapted(running, own):
            running = sharded_as(own, running)
            both = average(running, own, (1 - share, share))
            # A NaN of the batch would remain NaN when multiplied by a share of 0.
            return select(share > 0, both, running.astype(both.dtype))

        mean, var = adapted(state.mean, moments.mean), adapted(state.var.real, moments.var)
        return self.normalized(x, mean, var, params, mask)

    def _examples(self, x, mask, weight):
        """The examples of each feature in the batch, over the named axes too; `weight` is that of the moments."""
        axes = tuple(a for a in range(x.ndim) if a not in self.features)
        inner = axes[1:]  # the axes of one example
        shape = tuple(1 if a in inner else n for a, n in enumerate(x.shape))
        if mask is None:  # the moments include all devices already
            examples, elements = (total_weight(s, None, axes, weight.dtype) for s in (shape, x.shape))
            return weight * divided(examples, elements)
        if is_real(mask):
            mask = jnp.max(jnp.where(mask > 0, mask, 0), inner, keepdims=True, initial=0)
        else:
            mask = jnp.any(mask, inner, keepdims=True)
        zeros = jnp.zeros_like(weight)
        total = total_weight(shape, mask, axes, weight.dtype) + zeros
        support = support_of(total, shape, mask, axes) if is_real(mask) else None
        counted = Collected(Moments(total, zeros, zeros), support)
        (examples, *_), support = merge_over_axes(counted, self.names, self.axis_index_groups)
        if support is not None:
            examples = divided(examples, support.mean_weight)
        return jnp.where(weight > 0, examples, 0)  # an image without pixels is not an example


def adaptive_bn_apply(
    params: BNParams,
    state: BNState,
    x: Array,
    *,
    source_weight: float | Array,
    axis: checks.Axis = -1,
    epsilon: float = 1e-5,
    mask: Array | None = None,
    axis_name: checks.AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> tuple[Array, BNState]:
    """Evaluation that adapts to the batch, for data unlike the training data (Schneider et al., 2020, section 2).

        mean = (N running mean + n batch mean) / (N + n)          N = source_weight, n = number of examples
        var = (N running var + n batch var) / (N + n)
        y = scale * (x - mean) / sqrt(var + epsilon) + bias

    The running statistics come from the source, the training data, and the batch from the target, such as images with
    another camera, noise or contrast. With N = 0 only the batch counts, which is prediction-time batch normalization
    (Nado et al., 2020); a large N, or infinity, is evaluation by the running statistics.

    The variance is averaged as in the paper, without the spread of the two means, N n |running mean - batch mean|^2 /
    (N + n)^2. With it, var would be the variance of source and target together. A batch from only the target has less
    variance than that: the farther apart the two means are, the smaller its output would become.

    Args:
      source_weight: how many examples the running statistics count as, >= 0. A number, which may be traced, so that a
        sweep compiles once; a value that is known only at run time is raised to 0. The smaller it is, the more the
        batch counts; the larger it is, the less noise a small batch adds.
      state: running statistics. A feature without a valid value in the batch is normalized by only these. None is an
        error, because there would be nothing to adapt.
      mask: as in `bnjax.bn_apply`. An example counts for a feature if any of its elements is valid, no matter how many,
        so that padding has no effect. Real-valued weights count as (sum w)^2 / sum w^2 examples, with w the largest
        weight in each example (Kish, 1965).
      axis_name: mapped axis, or several, whose devices or examples share statistics. Examples of all of them count.
        Under `vmap` a call with `x` of the features' shape is one example; an example with other axes, such as an
        image, needs a batch axis: `x[None]`.
      params, x, and the rest: as in `bnjax.bn_apply`.

    Returns:
      y: of x's shape and dtype. Reductions are float32 or wider.
      state: the given one, unchanged.

    The examples lie on the first axis that is not a feature axis. `x` is read as in training, and derivatives go
    through the batch's statistics too.

    Raises:
      TypeError, ValueError: as `bnjax.bn_apply`, and for a state that is None, or a `source_weight` that is not a
        number, or known to be negative.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnjax
      >>> params, state = bnjax.bn_init(1)  # mean 0 and variance 1
      >>> x = jnp.array([[3.0], [5.0]])
      >>> y, _ = bnjax.adaptive_bn_apply(params, state, x, source_weight=2)
      >>> y[:, 0].round(3).tolist()  # mean (2 * 0 + 2 * 4) / 4, variance (2 * 1 + 2 * 1) / 4
      [1.0, 3.0...]
    """
    layer = AdaptiveBatchNorm(
        axis=axis,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        source_weight=source_weight,
        call="adaptive_bn_apply",
    )
    return layer.apply(params, state, x, False, mask)


def _checked_weight(call: str, value: Any) -> Any:
    """The weight of the running statistics, a number; one that is known is 0 or more."""
    array = isinstance(value, Array | np.ndarray | np.number)
    real = array and any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer))
    if (real or type(value) in (int, float)) and np.ndim(value) == 0:
        number = checks.known(value) if isinstance(value, Array) else value
        if number is None or number >= 0:
            return value if number is None else float(number)
    raise ValueError(
        f"{call}(source_weight={value!r}): expected a number of 0 or more, how many examples the running statistics "
        "count as. Pass 16, say; 0 normalizes by only the batch."
    )
