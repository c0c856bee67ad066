"""Models that others wrote, from conversion to serving, on one device and on eight.

They are trained with accumulation, checkpointed, recalibrated, diagnosed, folded and exported.
"""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as orbax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax import training
from tests.support import real_models

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def flax_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def images(rng, *shape):
    return {"image": rng.normal(0.5, 1, (16, *shape)).astype(np.float32), "label": rng.integers(0, 10, 16)}


def loss(model, batch, train):
    return judged(model(batch["image"]), batch)


def resnet_loss(model, batch, train):
    return judged(model(batch["image"], train=train), batch)


def judged(logits, batch):
    hits = jnp.sum(logits.argmax(-1) == batch["label"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), {"hits": hits}


def train(apply, variables, batch, loss, steps, **fields):
    """A few steps over micro-batches, on one device and on eight, which are the same."""
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    finals = []
    for sharding in (None, NamedSharding(mesh, P("data"))):
        state = training.TrainState.create(apply_fn=apply, tx=optax.sgd(0.05), **variables, **fields)
        placed = batch if sharding is None else jax.device_put(batch, sharding)
        step, losses = training.train_step(loss, accumulate=2), []
        for _ in range(steps):
            state, metrics = step(state, placed)
            losses.append(float(metrics["loss"]))
        assert losses[-1] < losses[0]
        assert jnp.issubdtype(metrics["hits"].dtype, jnp.integer)
        finals.append((losses, state))
    np.testing.assert_allclose(*(losses for losses, _ in finals), rtol=1e-3)
    return finals[0][1]


def exported(call, x):
    """The results of a program exported with a symbolic batch, for two sizes."""
    (batch,) = jax.export.symbolic_shape("batch")
    program = jax.export.export(jax.jit(call))(jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype))
    return program.call(x), program.call(x[:3])


def after_training(apply, state, batch, folder, keys=None):
    """Through a checkpoint, recalibration and diagnosis: variables to serve."""
    saved = {"params": state.params, "batch_stats": state.batch_stats, **state.collections}
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", saved)
        checkpointer.wait_until_finished()
        variables = checkpointer.restore(folder / "checkpoint", saved)
    jax.tree.map(np.testing.assert_array_equal, variables, saved)
    options = {} if keys is None else {"rngs": keys}
    variables = bnjax.recalibrate(partial(apply, **options), variables, [batch["image"]] * 2)
    _, left = apply(variables, batch["image"], mutable=["batch_stats", "batch_moments"], **options)
    diagnosis = bnjax.diagnose(variables["params"], variables["batch_stats"], left["batch_moments"])
    assert not [finding for finding in diagnosis.findings if finding.severity == "error"], diagnosis
    return variables


@pytest.mark.slow
def test_the_resnet_of_flax_from_conversion_to_serving(rng, tmp_path):
    model = real_models.ResNet(
        stage_sizes=[1, 1], block_cls=real_models.BottleneckResNetBlock, num_classes=10, num_filters=4
    )
    batch = images(rng, 16, 16, 3)
    x = batch["image"]
    ours = bnjax.linen.convert(model, axis_name=None)
    variables = ours.init(KEY, x, train=False)
    with pytest.raises(NameError, match="batch"):  # as its author wrote it, it runs only in pmap
        jax.eval_shape(partial(model.apply, train=True, mutable=["batch_stats"]), variables, x)
    jax.tree.map(np.testing.assert_array_equal, variables, model.init(KEY, x, train=False))

    state = train(ours.apply, variables, batch, resnet_loss, 4)
    variables = after_training(partial(ours.apply, train=True), state, batch, tmp_path)
    want = model.apply(variables, x, train=False)
    folded, interceptor = bnjax.linen.fold_model(ours, variables, x, train=False)
    assert len(interceptor.report.folded) == 9
    assert not interceptor.report.unfolded
    assert "batch_stats" not in folded
    served = partial(interceptor.model.apply, folded, train=False)
    for got in (served(x), *exported(served, x)):
        np.testing.assert_allclose(got, want[: len(got)], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_all_53_norms_of_a_resnet_50_are_found(rng):
    model = real_models.ResNet50(num_classes=10, num_filters=4)
    x = rng.normal(0.5, 1, (2, 32, 32, 3)).astype(np.float32)
    variables = jax.jit(partial(model.init, train=False))(KEY, x)

    def draw(path, leaf):  # statistics and scales of a trained network, which keep activations of size 1
        name = str(path[-1].key)
        values = {"var": rng.uniform(0.5, 2, leaf.shape), "mean": rng.normal(0, 0.3, leaf.shape)}
        values["scale"] = rng.uniform(0.3, 1, leaf.shape)
        return jnp.asarray(values.get(name, leaf), leaf.dtype)

    variables = jax.tree_util.tree_map_with_path(draw, variables)
    folded, interceptor = bnjax.linen.fold_model(model, variables, x, train=False)
    assert len(interceptor.report.folded) == 53
    assert not interceptor.report.unfolded
    want = jax.jit(partial(model.apply, train=False))(variables, x)
    got = jax.jit(partial(interceptor.model.apply, train=False))(folded, x)
    # 53 layers round their outputs in another order: eps sqrt(53) of the largest, 8 times for the sums in each.
    np.testing.assert_allclose(got, want, rtol=0, atol=8 * 1.2e-7 * np.sqrt(53) * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tutorial", "scanned"])
def test_nnx_models_of_flax_from_conversion_to_serving(rng, kind, tmp_path):
    def make():
        rngs = nnx.Rngs(params=0, dropout=1)
        return real_models.CNN(rngs=rngs) if kind == "tutorial" else real_models.Scanned(10, 3, rngs=rngs)

    batch = images(rng, *((8, 8, 1) if kind == "tutorial" else (10,)))
    x, keys = batch["image"], {"dropout": KEY}
    model = bnjax.nnx.convert(make(), momentum=0.9)
    apply, variables = bnjax.nnx.functional(model)
    state = train(apply, variables, batch, loss, 12, rngs=keys)
    variables = after_training(apply, state, batch, tmp_path, keys)
    nnx.update(model, *variables.values())
    model.eval()
    flax = make()  # the model as it was written serves the same variables
    nnx.update(flax, *variables.values())
    flax.eval()
    want = flax(x)
    np.testing.assert_allclose(model(x), want, rtol=1e-4, atol=1e-5)
    report = bnjax.nnx.fold_report(model, x)
    folded = [("conv1", "batch_norm1"), ("conv2", "batch_norm2")]
    assert report.folded == (folded if kind == "tutorial" else [("blocks/linear", "blocks/bn")])
    bnjax.nnx.fold_model(model, x)
    assert not jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    apply, variables = bnjax.nnx.functional(model)
    served = partial(apply, variables)
    for got in (served(x), *exported(served, x)):
        np.testing.assert_allclose(got, want[: len(got)], rtol=1e-4, atol=1e-5)
