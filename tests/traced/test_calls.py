"""The calls of layers, recorded in Linen and in NNX alike."""

import gc
import weakref

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

from bnjax.traced.calls import record_nnx, recorded_linen
from bnjax.traced.program import read

X = np.ones((2, 4), np.float32)


class Twice(nn.Dense):
    """A subclass, whose call of `super().__call__` is not another layer."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Block(nn.Module):
    def setup(self):
        self.a = Twice(4)

    def __call__(self, x):
        return self.a(inputs=self.a(x))


JitBlock = nn.jit(Block)


class Linen(nn.Module):
    def setup(self):
        self.b, self.e = JitBlock(), nn.Embed(4, 4)

    def __call__(self, x):
        return self.e.attend(self.b(x))


class Nnx(nnx.Module):
    def __init__(self):
        self.a = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return nnx.jit(lambda m, x: m.a(inputs=m.a(x)))(self, x)


@pytest.mark.parametrize("again", [False, True])
def test_both_recorders_see_every_call_and_mark_it(again):
    """Also those under `jit`, in a model that was traced before."""
    found = []

    def record(call):
        found.append((call.path, call.method, call.x.shape))
        return call.marked(call.layer.get_variable("params", "kernel")) if call.path == "b/a" else call()

    model = Linen()
    variables = model.init(jax.random.key(0), X)
    if again:
        model.apply(variables, X)

    def run(x):
        with recorded_linen(record):
            return model.apply(variables, x)

    roles = [mark.role for mark in read(run, X).marks()]
    assert roles == ["kernel", "in", "out"] * 2
    assert [name for name in found if name[0] in ("b/a", "e")] == [
        *[("b/a", "__call__", (2, 4))] * 2,
        ("e", "attend", (2, 4)),
    ]
    found.clear()
    graph, state = nnx.split(Nnx())

    def record_in_nnx(call):
        found.append((call.path, call.method, call.x.shape))
        return call.marked(call.layer.kernel[...])

    def run_nnx(state, x):
        record_nnx(whole := nnx.merge(graph, state), ["a"], record_in_nnx)
        return whole(x)

    if again:
        nnx.merge(graph, state)(X)
    assert [mark.role for mark in read(run_nnx, state, X).marks()] == roles
    assert found == [("a", "__call__", (2, 4))] * 2


def test_no_cache_keeps_what_records():
    """The caches of `jax.jit` keep the modules' attributes."""
    model = Nnx()

    def record(call):
        return call()

    record_nnx(model, ["a"], record)
    np.testing.assert_array_equal(model(X), Nnx()(X))
    kept = weakref.ref(record)
    del record
    gc.collect()
    assert kept() is None
