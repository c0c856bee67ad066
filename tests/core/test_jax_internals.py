"""What JAX does not promise to keep is taken away, one piece at a time: results stay those of the oracle."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import mlir
from jax.sharding import PartitionSpec as P

from tests.support import reference

RNG = np.random.default_rng(11)
X = RNG.standard_normal((32, 3)) * 2 + 5
G = RNG.standard_normal((32, 3))
MASK = RNG.random((32, 1)) < 0.7
SCALE, BIAS = np.array([0.5, -2.0, 3.0]), np.array([1.0, 0.0, -1.0])
MODULES = [
    "jax.extend.core",
    "jax.interpreters.ad",
    "jax.interpreters.batching",
    "jax.interpreters.mlir",
    "jax.experimental.jet",
    "jax.extend.core.primitives",
]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def imported_without(monkeypatch):
    """Import bnjax anew where a module of JAX cannot be imported; the tests' own bnjax comes back afterwards."""

    def imported(module):
        monkeypatch.setitem(sys.modules, module, None)
        for name in [name for name in sys.modules if name.split(".")[0] == "bnjax"]:
            monkeypatch.delitem(sys.modules, name)
        return importlib.import_module("bnjax")

    return imported


def assert_exact(bnjax, mask):
    """Output, state, gradient, directional derivative of the gradient and vmap are those of the float64 oracle."""
    params, state = bnjax.BNParams(SCALE, BIAS), bnjax.bn_init(3, dtype=jnp.float64)[1]

    def loss(x):
        y, new = bnjax.bn_apply(params, state, x, True, mask=mask)
        return jnp.sum(G * y), (y, new)

    def oracle(x):
        _, mean, var = reference.moments(x, mask=mask)
        return reference.normalize(x, mean, var, SCALE, BIAS), mean, var

    differentiate = jax.jit(jax.grad(loss, has_aux=True))
    gradient, (y, new) = differentiate(X)
    want, mean, var = oracle(X)
    np.testing.assert_allclose(y, want, rtol=1e-10)
    np.testing.assert_allclose(new.mean, 0.01 * mean, rtol=1e-12)
    np.testing.assert_allclose(new.var, 0.99 + 0.01 * var, rtol=1e-12)
    step = 1e-6 * RNG.standard_normal(X.shape)
    rise = np.sum(G * (oracle(X + step)[0] - oracle(X - step)[0])) / 2
    np.testing.assert_allclose(np.sum(gradient * step), rise, rtol=1e-6)
    turn = jax.jit(lambda x, step: jax.jvp(jax.grad(loss, has_aux=True), (x,), (step,))[1][0])(X, step)
    there, here = (differentiate(x)[0] for x in (X + step, X - step))
    np.testing.assert_allclose(turn, (there - here) / 2, rtol=1e-4, atol=1e-12)
    both = jax.jit(jax.vmap(lambda x: loss(x)[1][0]))(np.stack([X, 3 * X]))
    np.testing.assert_allclose(both[1], oracle(3 * X)[0], rtol=1e-10)


@pytest.mark.parametrize("mask", [None, MASK], ids=["plain", "masked"])
@pytest.mark.parametrize("module", MODULES)
def test_bn_apply_is_exact_without(module, mask, imported_without):
    bnjax = imported_without(module)
    internals = sys.modules["bnjax.core.jax_internals"]
    assert (module in ("jax.experimental.jet", "jax.extend.core.primitives")) == internals.HAS_PRIMITIVES
    assert_exact(bnjax, mask)


@pytest.mark.parametrize("name", ["ShardingContext", "SPMDAxisContext"])
def test_bn_apply_is_exact_without_the_contexts_of_a_lowering(name, monkeypatch):
    import bnjax

    monkeypatch.delattr(mlir, name)
    assert_exact(bnjax, None)


def test_synchronized_statistics_are_exact_without_the_names_of_mesh_axes(monkeypatch):
    import bnjax

    monkeypatch.delattr(jax.sharding, "get_abstract_mesh")
    params, state = bnjax.bn_init(3, dtype=jnp.float64)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(params, x):
        def shard(params, x):
            y, new = bnjax.bn_apply(params, state, x, True, axis_name="data")
            return jax.lax.psum(jnp.sum(y**3), "data"), new

        specs = {"in_specs": (P(), P("data")), "out_specs": P(), "check_vma": False}
        return jax.shard_map(shard, mesh=mesh, **specs)(params, x)

    def differentiated(f):
        return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(params, X)

    (value, new), gradients = differentiated(loss)

    def whole(params, x):
        y, new = bnjax.bn_apply(params, state, x, True)
        return jnp.sum(y**3), new

    (want, want_new), want_gradients = differentiated(whole)
    np.testing.assert_allclose(value, want, rtol=1e-10)
    for got, wanted in zip(jax.tree.leaves((new, gradients)), jax.tree.leaves((want_new, want_gradients)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(new.var, 0.99 + 0.01 * X.var(0), rtol=1e-12)


def test_importing_bnjax_adds_rules_for_its_own_primitives_only(imported_without):
    from jax.experimental import jet
    from jax.interpreters import ad

    tables = jet.jet_rules, ad.primitive_jvps, ad.primitive_transposes
    before = [dict(table) for table in tables]
    imported_without("a module that JAX does not have")
    for table, old in zip(tables, before, strict=True):
        changed = {primitive.name for primitive, rule in table.items() if old.get(primitive) is not rule}
        assert changed
        assert all(name.startswith("bnjax_") for name in changed)
