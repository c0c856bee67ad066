"""Programs over the variables of `functional` are exported, serialized, read again and called."""

import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax.nnx
from bnjax.nnx.serialization import serializable
from tests.support.folding import numbers

pytestmark = pytest.mark.usefixtures("flax_promotion")
X = numbers(6, 3)
KEY = jax.random.key(0)


class Rows(nnx.Variable):
    pass


class Network(nnx.Module):
    """Layers by name and by number, a stream, and a variable of a type of its own."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), bnjax.nnx.BatchNorm(4, momentum=0.0, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.rows = Rows(jnp.array(0))

    def __call__(self, x):
        self.rows[...] += len(x)
        return self.dropout(self.layers[1](self.layers[0](x)))


def exported(function, *args):
    return jax.export.deserialize(jax.export.export(jax.jit(function))(*args).serialize()).call(*args)


def test_evaluation_and_training_are_exported():
    model = Network(nnx.Rngs(0, dropout=1))
    apply, variables = bnjax.nnx.functional(model)
    assert sorted(variables) == ["Rows", "batch_stats", "params"]
    np.testing.assert_allclose(exported(apply, variables, X), apply(variables, X), rtol=1e-6)

    def train(variables, x, key):
        return apply(variables, x, mutable=["batch_stats", "batch_moments", "Rows"], rngs={"dropout": key})[1]

    updates = exported(train, variables, X, KEY)
    hidden = X @ np.asarray(model.layers[0].kernel[...])
    np.testing.assert_allclose(updates["batch_moments"]["layers/1"].moments.mean, hidden.mean(0), rtol=1e-5, atol=1e-6)
    nnx.update(model, updates["batch_stats"], updates["Rows"])
    np.testing.assert_allclose(model.layers[1].var[...], hidden.var(0), rtol=1e-5)
    assert model.rows[...] == 6
    # A state in Flax's own form comes back in that form.
    own = {**variables, "batch_stats": nnx.state(model, nnx.BatchStat)}
    shapes = jax.eval_shape(train, own, X, KEY)
    assert jax.tree.structure(shapes["batch_stats"]) == jax.tree.structure(own["batch_stats"])


def test_a_type_defined_again_and_types_that_others_registered():
    kinds = [type("Again", (nnx.Variable,), {}) for _ in range(2)]
    for kind in kinds:
        state = serializable(nnx.State({"a": kind(jnp.ones(2))}))
        assert exported(lambda s: s, state)["a"].__class__ is kind
    own = type("Own", (nnx.Variable,), {})
    jax.export.register_pytree_node_serialization(
        own, serialized_name="own", serialize_auxdata=repr, deserialize_auxdata=eval
    )
    assert serializable(nnx.State({"a": own(jnp.ones(2))}))["a"].shape == (2,)


def test_metadata_that_cannot_be_written_are_named():
    state = serializable(nnx.State({"a": nnx.Param(jnp.ones(2), note=(1, "model")), "b": {0: nnx.Param(jnp.ones(2))}}))
    got = exported(lambda s: s, state)
    assert got["a"].note == (1, "model")
    state = serializable(nnx.State({"a": nnx.Param(jnp.ones(2), note=len)}))
    with pytest.raises(TypeError, match=r"jax.export of Param: its metadata .*built-in function len.*flatten"):
        exported(lambda s: s, state)


@pytest.mark.slow
def test_the_import_registers_no_type_of_flax():
    program = """
import bnjax.nnx, jax.export
from flax import nnx
for kind in nnx.State, nnx.Param, nnx.BatchStat:
    jax.export.register_pytree_node_serialization(
        kind, serialized_name=kind.__name__, serialize_auxdata=repr, deserialize_auxdata=eval)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
