"""The memory, and the time to trace and compile, that batch normalization adds to a network.

Residuals are the arrays that a forward pass saves for the backward pass, except its arguments; they are read from the
jaxpr. XLA on CPU undoes rematerialization in unrolled code, so temporary memory and time are measured with the blocks
under `jax.lax.scan`.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.extend.core import Literal

import bnjax.linen
from bnjax import training

BLOCKS = 12
LAYERS = 20


class Block(nn.Module):
    """Convolution, batch normalization or a bias, ReLU."""

    norm: Callable[[], nn.Module] | None
    features: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.features, (3, 3), use_bias=self.norm is None)(x)
        return nn.relu(x if self.norm is None else self.norm()(x))


class Network(nn.Module):
    """Blocks, the mean over pixels, and a linear layer."""

    norm: Callable[[], nn.Module] | None
    depth: int
    features: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = Block(self.norm, self.features)(x)
        return nn.Dense(10)(x.mean((1, 2)))


NORMS = {
    "never had it": None,
    "Flax": partial(nn.BatchNorm, use_running_average=False),
    "bnjax": partial(bnjax.linen.BatchNorm, use_running_average=False),
}
# Name, layer, and whether the loss is under jax.checkpoint with the policy.
WAYS = (("Flax", "Flax", False), ("bnjax", "bnjax", False), ("save_statistics", "bnjax", True))


def measure(rounds: int) -> Iterator[dict[str, Any]]:
    """Bytes of residuals, temporary bytes and times with scanned blocks, seconds to trace and compile."""
    x = jax.random.normal(jax.random.key(0), (32, 16, 16, 16))
    yield {"measure": "saved residuals, MB", "values": {n: residuals(norm, p, x) / 1e6 for n, norm, p in WAYS}}
    steps = {name: _scanned(norm, policy, x) for name, norm, policy in WAYS}
    yield {
        "measure": "temporary memory with scanned blocks, MB",
        "values": {name: _temporary(step) / 1e6 for name, (step, _) in steps.items()},
    }
    seconds = times({name: partial(step, *args) for name, (step, args) in steps.items()}, rounds)
    yield {"measure": "time of a step with scanned blocks, ms", "values": {n: 1e3 * s for n, s in seconds.items()}}
    compiled = {name: partial(_compile, _step(NORMS[name], x[:4, :8, :8])) for name in ("Flax", "bnjax")}
    yield {"measure": f"tracing and compiling {LAYERS} layers, s", "values": times(compiled, min(rounds, 5))}


def serving(x: jax.Array) -> dict[str, Callable[[], Any]]:
    """Evaluations of the network with batch normalization, with it folded, and without it."""
    plain = Network(None, BLOCKS, x.shape[-1])
    network = Network(partial(bnjax.linen.BatchNorm, use_running_average=True), BLOCKS, x.shape[-1])
    variables = network.init(jax.random.key(0), x)
    pairs = [(f"Block_{i}/Conv_0", f"Block_{i}/BatchNorm_0") for i in range(BLOCKS)]
    folded, interceptor = bnjax.linen.fold_model(network, variables, x, pairs=pairs)

    @jax.jit
    def serve(folded, x):
        with nn.intercept_methods(interceptor):
            return network.apply(folded, x)

    return {
        "never had it": partial(jax.jit(plain.apply), plain.init(jax.random.key(0), x), x),
        "folded": partial(serve, folded, x),
        "batch normalization": partial(jax.jit(network.apply), variables, x),
    }


def report(entries: list[dict[str, Any]]) -> None:
    """Print the table, with ratios to Flax."""
    for i, entry in enumerate(entries):
        if i == 0:
            print(f"\nA network of {BLOCKS} blocks of convolution, batch normalization and ReLU\n")
        flax = entry["values"]["Flax"]
        values = (f"{name} {value:.4g} ({value / flax:.2f})" for name, value in entry["values"].items())
        print(f"{entry['measure']:44}" + "  ".join(values))


def times(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The minimum seconds of each call over `rounds` interleaved calls, after a call that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):  # the first is not counted
        for name, call in calls.items():
            begun = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - begun)
    return {name: min(s[1:]) for name, s in seconds.items()}


def _temporary(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


def _under(policy, f):
    return jax.checkpoint(f, policy=training.save_statistics) if policy else f


def gradient(norm, policy, x, seed=0):
    """A function of params, statistics and x, which returns the gradient of a loss and the new statistics; and such
    params and statistics, initialized by the seed."""
    network = Network(NORMS[norm], BLOCKS, x.shape[-1])
    variables = network.init(jax.random.key(seed), x[:1])
    return jax.value_and_grad(_loss(network, policy), has_aux=True), _split(variables)


def residuals(norm, policy, x):
    """The bytes of residuals that the forward pass saves, except its arguments."""
    network = Network(NORMS[norm], BLOCKS, x.shape[-1])

    def pullback(params, stats, x):
        return jax.vjp(lambda params, x: _loss(network, policy)(params, stats, x), params, x, has_aux=True)[1]

    jaxpr = jax.make_jaxpr(pullback)(*_split(jax.eval_shape(network.init, jax.random.key(0), x)), x).jaxpr
    kept = {v for v in jaxpr.outvars if not isinstance(v, Literal)} - {*jaxpr.invars, *jaxpr.constvars}
    return sum(v.aval.size * v.aval.dtype.itemsize for v in kept)


def _loss(network, policy):
    def loss(params, stats, x):
        y, new = network.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return jnp.sum(y**2), new

    return _under(policy, loss)


def _split(variables):
    return variables["params"], variables.get("batch_stats", {})


def _scanned(norm, policy, x):
    """The compiled gradient of blocks under scan, and its arguments."""
    block = Block(NORMS[norm], x.shape[-1])
    variables = jax.vmap(block.init, (0, None))(jax.random.split(jax.random.key(0), BLOCKS), x[:1])

    def loss(params, stats, x):
        def body(x, layer):
            params, stats = layer
            return block.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])

        y, stats = jax.lax.scan(_under(policy, body), x, (params, stats))
        return jnp.sum(y**2), stats

    args = *_split(variables), x
    return jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*args).compile(), args


def _step(norm, x):
    """A training step of a deep network, and its arguments."""
    network = Network(norm, LAYERS, x.shape[-1])
    variables = network.init(jax.random.key(0), x)
    optimizer = optax.sgd(0.1, momentum=0.9)

    def step(params, stats, state, x):
        def loss(params):
            y, new = network.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
            return jnp.mean(y**2), new

        (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), new["batch_stats"], state, value

    return step, (variables["params"], variables["batch_stats"], optimizer.init(variables["params"]), x)


def _compile(step_and_args):
    step, args = step_and_args
    jax.clear_caches()
    jax.jit(lambda *args: step(*args)).lower(*args).compile()
