"""Normalizations with the signature of `bnjax.bn_apply`, for the `normalize` of `networks.network`.

They differ in the values over which a mean and a variance are taken. None of them supports a mask, so that the batch
size has to divide the number of training images.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import bnjax

Normalize = Callable[..., tuple[Array, Any]]


def identity(params: Any, state: Any, x: Array, train: bool, **_: Any) -> tuple[Array, Any]:
    """The plain network: no normalization, only the bias of `params`."""
    return x + params.bias.reshape(*[1] * (x.ndim - 1), -1), state


def group(params: Any, state: Any, x: Array, train: bool, *, size: int = 8, **_: Any) -> tuple[Array, Any]:
    """Group normalization (Wu & He, 2018, equations 1 and 7), the same in training and in evaluation.

        y = scale * (x - mean_g) / sqrt(var_g + epsilon) + bias    over the pixels and channels of a group g of an image

    Args:
      params: scale and bias of each channel.
      state: returned as it is, because there are no running statistics.
      x: of shape (batch, ..., channels).
      train: without effect.
      size: channels of a group.
    """
    grouped = x.reshape(len(x), -1, x.shape[-1] // size, size)
    mean = grouped.mean((1, 3), keepdims=True)
    var = grouped.var((1, 3), keepdims=True)
    scale, bias = (v.reshape(*[1] * (x.ndim - 1), -1) for v in params)
    return ((grouped - mean) * lax.rsqrt(var + 1e-5)).reshape(x.shape) * scale + bias, state


def batch(params: Any, state: Any, x: Array, train: bool, *, momentum: float, **_: Any) -> tuple[Array, Any]:
    """Batch normalization."""
    return bnjax.bn_apply(params, state, x, train, momentum=momentum)


def ghost(
    params: Any, state: Any, x: Array, train: bool, *, momentum: float, ghost_size: int, **_: Any
) -> tuple[Array, Any]:
    """Batch normalization of each `ghost_size` examples (Hoffer et al., 2017, algorithm 1)."""
    return bnjax.ghost_bn_apply(params, state, x, train, momentum=momentum, ghost_size=ghost_size)


def renormalized(
    params: Any, state: Any, x: Array, train: bool, *, momentum: float, steps: int, **_: Any
) -> tuple[Array, Any]:
    """Batch renormalization (Ioffe, 2017), whose bounds open between 1/20 and 1/4 of `steps`, in the paper's order:
    r_max from 1 to 3, d_max from 0 to 5."""
    opening = {"start": steps // 20, "stop": steps // 4 + 1}
    return bnjax.renorm_bn_apply(
        params,
        state,
        x,
        train,
        momentum=momentum,
        r_max=bnjax.linear_ramp(1, 3, **opening),
        d_max=bnjax.linear_ramp(0, 5, **opening),
    )


def synchronized(
    params: Any, state: Any, x: Array, train: bool, *, momentum: float, devices: int, **_: Any
) -> tuple[Array, Any]:
    """Batch normalization of the examples of several devices, by the collectives of `axis_name`.

    A mapped axis stands for the devices, each of which has an equal part of the batch.
    """
    if not train:
        return bnjax.bn_apply(params, state, x, train)

    def shard(x):
        return bnjax.bn_apply(params, state, x, train, momentum=momentum, axis_name="devices")

    y, states = jax.vmap(shard, axis_name="devices")(x.reshape(devices, -1, *x.shape[1:]))
    return y.reshape(x.shape), jax.tree.map(lambda v: v[0], states)


def chosen(arms: Mapping[str, Normalize]) -> Normalize:
    """The normalization at position `state["arm"]` of `arms`, so that runs of one program may differ in it.

    Under `vmap` all are computed: on an accelerator, where the runs' cost is starting kernels, one program of all arms
    takes far less time than one for each. The state also has the state of each arm.
    """

    def apply(params, state, x, train, **options):
        def of(name):
            def branch(state):
                y, new = arms[name](params, state[name], x, train, **options)
                return y, state | {name: new}

            return branch

        return lax.switch(state["arm"], [of(name) for name in arms], state)

    return apply


def with_arms(init: Callable[..., tuple[Any, Any]], arms: Sequence[str]) -> Callable[..., tuple[Any, Any]]:
    """`init` with the state of `chosen`; the setting `arm` is the position of an arm."""

    def started(key, arm=0):
        params, state = init(key)
        return params, [{"arm": jnp.int32(arm)} | dict.fromkeys(arms, each) for each in state]

    return started
