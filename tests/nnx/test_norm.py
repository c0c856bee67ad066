"""bnjax.nnx against flax.nnx: the same variables, dtypes and numbers; where it differs on purpose, the right ones."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bnjax
import bnjax.nnx
from tests.support import reference
from tests.support.comparison import assert_same, described
from tests.support.resnet import NNXResNet

pytestmark = pytest.mark.usefixtures("flax_promotion")


def pair(**options):
    """Flax's layer, by its exact variance, and ours."""
    return (
        nnx.BatchNorm(3, rngs=nnx.Rngs(0), use_fast_variance=False, **options),
        bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options),
    )


called = nnx.jit(lambda layer, x, **call: layer(x, **call))


def values(layer):
    return nnx.to_pure_dict(nnx.state(layer))


def test_arguments_and_defaults_are_those_of_flax():
    def arguments(cls):
        return {p.name: (p.kind, p.default) for p in inspect.signature(cls.__init__).parameters.values()}

    ours, flax = arguments(bnjax.nnx.BatchNorm), arguments(nnx.BatchNorm)
    assert set(ours) - set(flax) == {"unbiased_var", "frozen", "frozen_params"}
    initializers = {"bias_init", "scale_init"}  # functions made anew, whose values the next test compares
    assert {name: ours[name] for name in set(flax) - initializers} == {
        name: flax[name] for name in set(flax) - initializers
    }


LAYERS = {
    "default": {},
    "no scale": {"use_scale": False},
    "no bias": {"use_bias": False},
    "neither": {"use_scale": False, "use_bias": False},
    "channels first": {"axis": 1},
    "half parameters": {"param_dtype": jnp.bfloat16},
    "half everything": {"param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16},
    "half output": {"dtype": jnp.float16},
    "complex parameters": {"param_dtype": jnp.complex64},
    "initializers": {"scale_init": nnx.initializers.normal(1.0), "bias_init": nnx.initializers.normal(1.0)},
    "metadata": {"scale_metadata": {"role": "gamma"}, "bias_metadata": {"role": "beta"}},
    "unpromoted": {"dtype": jnp.float32, "promote_dtype": lambda arrays, **_: arrays},
}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_variables_are_those_of_flax(options):
    flax, ours = (nnx.state(layer) for layer in pair(**options))
    assert jax.tree.structure(flax) == jax.tree.structure(ours)  # types and metadata included
    jax.tree.map(np.testing.assert_array_equal, flax, ours)
    assert described(ours) == described(flax)


@pytest.mark.parametrize("options", [options for name, options in LAYERS.items() if name != "complex parameters"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32"])
def test_training_and_evaluation_match_flax(options, dtype, rng):
    x = rng.normal(2, 3, (6, 3, 5, 3)).astype(jnp.dtype(dtype))
    results = []
    for layer in pair(momentum=0.7, **options):
        trained = [called(layer, x), called(layer, x)]
        layer.eval()
        results.append((trained, called(layer, x), values(layer)))
        layer.train()
        assert layer.use_running_average is False
    half = "bfloat16" if options.get("dtype") == jnp.bfloat16 else str(results[1][1].dtype)
    tolerance = {"bfloat16": 0.03, "float16": 4e-3}.get(half, 3e-5)
    assert_same(*results[::-1], tolerance, tolerance)


def test_the_mean_of_complex_data_stays_complex(rng):
    x = (rng.normal(1, 2, (50, 3)) + 1j * rng.normal(3, 1, (50, 3))).astype(np.complex64)
    layer = bnjax.nnx.BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))
    layer(x)
    np.testing.assert_allclose(layer.mean[...], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(layer.var[...], x.var(0), rtol=1e-5)
    assert layer.var[...].dtype == jnp.float32
    layer.eval()
    np.testing.assert_allclose(layer(x), (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), rtol=1e-4, atol=1e-5)


def test_complex_parameters_leave_the_statistics_of_real_data_real(rng):
    """Flax assigns a complex mean to its real variable, which JAX warns will be an error."""
    x = rng.normal(2, 3, (50, 3)).astype(np.float32)
    layer = bnjax.nnx.BatchNorm(3, momentum=0.0, param_dtype=jnp.complex64, rngs=nnx.Rngs(0))
    y = layer(x)
    assert (y.dtype, layer.mean[...].dtype) == (jnp.complex64, jnp.float32)
    np.testing.assert_allclose(layer.mean[...], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(y, reference.train(x, np.ones(3), np.zeros(3), 0, 1)[0], atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (1, 1, 3), (6, 1, 1), (6, 4, 3)])
def test_a_mask_of_any_rank_matches_flax(shape, rng):
    x = rng.normal(1, 2, (6, 4, 3)).astype(np.float32)
    mask = np.ones(shape, bool) if shape in ((), (1,), (1, 1, 3)) else rng.random(shape) < 0.7
    flax, ours = ((called(layer, x, mask=mask), values(layer)) for layer in pair())
    assert_same(ours, flax)


def test_the_call_goes_before_the_constructor_and_a_view_sets_the_layer(rng):
    x = rng.normal(1, 2, (8, 3)).astype(np.float32)
    layer = bnjax.nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))
    evaluated = x / np.sqrt(1 + 1e-5)
    trained = reference.train(x, np.ones(3), np.zeros(3), 0, 1)[0]
    np.testing.assert_allclose(layer(x), evaluated, rtol=1e-6)
    np.testing.assert_allclose(nnx.view(layer, use_running_average=False)(x), trained, atol=1e-5)
    layer = bnjax.nnx.BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="use_running_average"):
        layer(x)
    np.testing.assert_allclose(layer(x, use_running_average=True), evaluated, rtol=1e-6)


@pytest.mark.optimized
def test_statistics_far_from_zero_are_exact(rng):
    x = (1e4 + rng.standard_normal((512, 3))).astype(np.float32)
    layer = bnjax.nnx.BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))
    y = layer(x)
    expected, _, var = reference.train(x.astype(np.float64), np.ones(3), np.zeros(3), 0, 1, momentum=0)
    np.testing.assert_allclose(y, expected, atol=8 * 1.2e-7 * 1e4)
    np.testing.assert_allclose(layer.var[...], var, rtol=8 * 1.2e-7 * 1e4)


def test_a_checkpoint_of_one_continues_in_the_other(rng, tmp_path):
    """Through Orbax, as an NNX user saves a model."""
    import orbax.checkpoint as ocp

    batches = rng.normal(1, 2, (4, 32, 3)).astype(np.float32)
    for i, (writer, reader) in enumerate((pair(momentum=0.8), pair(momentum=0.8)[::-1])):
        for x in batches[:2]:
            called(writer, x)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / str(i), values(writer))
            checkpointer.wait_until_finished()
            state = nnx.state(reader)
            nnx.replace_by_pure_dict(state, checkpointer.restore(tmp_path / str(i), values(reader)))
        nnx.update(reader, state)
        for x in batches[2:]:
            outputs = [called(layer, x) for layer in (writer, reader)]
            assert_same(*outputs)
        assert_same(values(writer), values(reader))


def test_momentum_as_a_function_adds_a_count_which_starts_at_0_without_one(rng):
    batches = rng.normal(1, 2, (3, 32, 3)).astype(np.float32)
    layer = bnjax.nnx.BatchNorm(3, momentum=bnjax.cumulative_average, rngs=nnx.Rngs(0))
    assert described(values(layer)["count"]) == ((3,), jnp.int32)
    nnx.update(layer, nnx.state(pair()[0]))  # a state without count
    for x in batches:
        called(layer, x)
    np.testing.assert_array_equal(layer.count[...], 3)
    np.testing.assert_allclose(layer.mean[...], batches.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(layer.var[...], batches.var(1).mean(0), rtol=1e-5)


def test_a_momentum_function_set_later_counts_from_then_on(rng):
    x = rng.normal(1, 2, (2, 32, 3)).astype(np.float32)
    layer = bnjax.nnx.convert(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    layer.momentum = bnjax.cumulative_average
    for batch in x:
        layer(batch)
    np.testing.assert_allclose(layer.mean[...], x.mean((0, 1)), rtol=1e-5)
    np.testing.assert_array_equal(layer.count[...], 2)


def test_unbiased_var_and_several_axis_names(rng):
    x = rng.normal(1, 2, (2, 4, 5, 3)).astype(np.float32)
    layer = bnjax.nnx.BatchNorm(3, momentum=0.0, unbiased_var=True, axis_name=("a", "b"), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)

    def apply(x):
        layer = nnx.merge(graphdef, state, copy=True)
        return layer(x), nnx.state(layer, nnx.BatchStat)

    y, stats = jax.jit(jax.vmap(jax.vmap(apply, axis_name="b"), axis_name="a"))(x)
    np.testing.assert_allclose(stats["var"][...][0, 0], x.reshape(-1, 3).var(0, ddof=1), rtol=1e-5)
    flat = x.reshape(-1, 3)
    np.testing.assert_allclose(y.reshape(-1, 3), (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5), atol=1e-5)


def test_statistics_stay_where_the_batch_says_nothing():
    for x in np.full((1, 3), 7.0, np.float32), np.full((4, 3), np.nan, np.float32):
        layer = bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        layer(x)
        np.testing.assert_array_equal(layer.mean[...], 0)
        np.testing.assert_array_equal(layer.var[...], 1)


def train_resnet(model, x, labels, steps=3):
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = jnp.stack([step(model, optimizer) for _ in range(steps)])
    model.eval()
    evaluated = called(model, x)
    model.train()
    return losses, evaluated, values(model)


def test_a_converted_resnet_trains_like_flax_where_flax_is_good(rng):
    x = rng.normal(0.5, 1, (8, 8, 8, 3)).astype(np.float32)
    labels = rng.integers(0, 5, 8)
    flax, ours = NNXResNet(nnx.Rngs(0)), NNXResNet(nnx.Rngs(0))
    train_resnet(flax, x, labels, 1)
    train_resnet(ours, x, labels, 1)  # a model in use
    before, layer = values(ours), ours.blocks[1].bn3
    assert bnjax.nnx.convert(ours) is ours
    assert ours.blocks[1].bn3 is layer
    layers = [layer for _, layer in nnx.iter_graph(ours) if isinstance(layer, nnx.BatchNorm)]
    assert {type(layer) for layer in layers} == {bnjax.nnx.BatchNorm}
    assert len(layers) == 6
    jax.tree.map(np.testing.assert_array_equal, values(ours), before)
    assert_same(train_resnet(ours, x, labels), train_resnet(flax, x, labels), 2e-3, 1e-3)


@pytest.mark.optimized
def test_conversion_reaches_lists_stacks_and_shared_layers(rng):
    x = rng.normal(1e4, 1, (64, 3)).astype(np.float32)

    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.layers = nnx.List([nnx.BatchNorm(3, rngs=rngs), nnx.Sequential(nnx.BatchNorm(3, rngs=rngs))])
            self.shared = self.layers[0]
            self.stack = nnx.vmap(lambda key: nnx.BatchNorm(3, use_bias=False, rngs=nnx.Rngs(key)))(
                jax.random.split(jax.random.key(0), 2)
            )

        def __call__(self, x):
            return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.stack, x)

    model = Model()
    metadata = model.layers[0].scale.get_metadata()
    bnjax.nnx.convert(model, axis_name="data")
    assert model.shared is model.layers[0]
    assert type(model.shared) is type(model.stack) is type(model.layers[1].layers[0]) is bnjax.nnx.BatchNorm
    assert model.layers[0].scale.get_metadata() == metadata
    assert model.shared.axis_name == "data"
    model.stack.axis_name = None
    expected = reference.train(x.astype(np.float64), 1, 0, 0, 1)[0]
    np.testing.assert_allclose(model(x), np.stack([expected] * 2), atol=8 * 1.2e-7 * 1e4)
    assert model.stack.mean[...].shape == (2, 3)

    variants = [bnjax.nnx.GhostBatchNorm(3, ghost_size=2, rngs=nnx.Rngs(0)), bnjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))]
    assert [layer.axis_name for layer in bnjax.nnx.convert(variants, axis_name="data")] == ["data", "data"]

    class Special(nnx.BatchNorm):
        pass

    special = Special(3, rngs=nnx.Rngs(0))
    models = bnjax.nnx.convert([special, {"a": nnx.BatchNorm(3, rngs=nnx.Rngs(0))}])
    assert isinstance(models[0], Special)
    assert isinstance(models[0], bnjax.nnx.BatchNorm)
    assert type(models[1]["a"]) is bnjax.nnx.BatchNorm
    assert type(bnjax.nnx.convert(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))) is bnjax.nnx.BatchNorm


def test_a_functional_model_computes_what_the_model_computes(rng):
    x = rng.normal(0.5, 1, (8, 8, 8, 3)).astype(np.float32)
    model = bnjax.nnx.convert(NNXResNet(nnx.Rngs(0)))
    apply, variables = bnjax.nnx.functional(model)
    y, updates = jax.jit(lambda v: apply(v, x, mutable=["batch_stats", "batch_moments"]))(variables)
    expected = called(model, x)
    assert_same(y, expected, 1e-4, 1e-4)
    assert_same(nnx.to_pure_dict(updates["batch_stats"]), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), 1e-4, 1e-4)
    assert set(updates["batch_moments"]) == {
        "stem/layers/1",
        *(f"blocks/{i}/bn{k}" for i, k in ((0, 1), (0, 2), (1, 1), (1, 2), (1, 3))),
    }
    stem = bnjax.batch_moments(model.stem.layers[0](x))
    np.testing.assert_allclose(updates["batch_moments"]["stem/layers/1"].moments.var, stem.var, rtol=1e-4)
    model.eval()
    assert_same(jax.jit(apply)({**variables, **updates}, x), called(model, x), 1e-4, 1e-4)


def test_a_functional_model_wants_a_key_for_each_stream_of_random_numbers():
    apply, variables = bnjax.nnx.functional(nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=0)))
    x = jnp.ones((1000,))
    with pytest.raises(ValueError, match=r"random numbers from 'dropout'"):
        apply(variables, x, mutable=["batch_stats"])
    first, second = (
        apply(variables, x, mutable=["batch_stats"], rngs={"dropout": jax.random.key(i)})[0] for i in range(2)
    )
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(apply(variables, x), x)
