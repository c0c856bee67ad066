"""bnjax.linen against flax.linen: the same variables, dtypes and numbers; where it means to differ, the right ones."""

import dataclasses
from functools import partial

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
import bnjax.linen
from tests.support import reference
from tests.support.comparison import assert_same, described
from tests.support.resnet import LinenResNet

pytestmark = pytest.mark.usefixtures("flax_promotion")

KEY = jax.random.key(0)


def pair(**options):
    """Flax's layer, by its exact variance, and ours."""
    return nn.BatchNorm(**options, use_fast_variance=False), bnjax.linen.BatchNorm(**options)


def test_fields_and_defaults_are_those_of_flax():
    def fields(cls):
        return {f.name: (f.default, f.kw_only) for f in dataclasses.fields(cls)}

    ours, flax = fields(bnjax.linen.BatchNorm), fields(nn.BatchNorm)
    assert {name: ours[name] for name in flax} == flax
    assert set(ours) - set(flax) == {"unbiased_var", "frozen", "frozen_params"}
    shared = [name for name in ours if name in flax]
    assert shared == list(flax)  # by position too


LAYERS = {
    "default": {},
    "no scale": {"use_scale": False},
    "no bias": {"use_bias": False},
    "neither": {"use_scale": False, "use_bias": False},
    "channels first": {"axis": 1},
    "two axes": {"axis": (-1, 1)},
    "an axis twice": {"axis": (3, -1)},
    "half parameters": {"param_dtype": jnp.bfloat16},
    "half everything": {"param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16, "force_float32_reductions": False},
    "half output": {"dtype": jnp.float16},
    "complex parameters": {"param_dtype": jnp.complex64},
    "complex everything": {"param_dtype": jnp.complex64, "force_float32_reductions": False},
    "initializers": {"scale_init": nn.initializers.normal(1.0), "bias_init": nn.initializers.normal(1.0)},
    "partitioned": {"scale_init": nn.with_partitioning(nn.initializers.ones, ("data",))},
}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("train", [True, False])
def test_variables_are_those_of_flax(options, train):
    x = np.ones((3, 4, 2, 5), np.float32)
    flax, ours = (jax.jit(partial(layer.init, use_running_average=not train))(KEY, x) for layer in pair(**options))
    assert described(nn.meta.unbox(ours)) == described(nn.meta.unbox(flax))
    jax.tree.map(np.testing.assert_array_equal, nn.meta.unbox(ours), nn.meta.unbox(flax))
    assert jax.tree.structure(ours) == jax.tree.structure(flax)  # metadata included


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "complex64"])
def test_training_and_evaluation_match_flax(options, dtype, rng):
    if dtype == "complex64" and "dtype" in options:
        # A real dtype loses the imaginary part, and so, without float32 reductions, do real parameters.
        options = {**options, "dtype": jnp.complex64}
        if not options.get("force_float32_reductions", True):
            options["param_dtype"] = jnp.complex64
    x = rng.normal(2, 3, (6, 4, 5, 3))
    x = (x + 1j * rng.normal(1, 2, x.shape) if dtype == "complex64" else x).astype(jnp.dtype(dtype))

    @partial(jax.jit, static_argnums=0)
    def run(layer, x):
        variables = nn.meta.unbox(layer.init(KEY, x, use_running_average=True))
        for _ in range(2):
            y, updates = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
            variables = {**variables, **updates}
        return y, updates, layer.apply(variables, x, use_running_average=True)

    flax, ours = (run(layer, x) for layer in pair(momentum=0.7, **options))
    # Where Flax is told to reduce in half precision it does; ours never does.
    rounded = dtype if not options.get("force_float32_reductions", True) else None
    half = {str(leaf.dtype) for leaf in jax.tree.leaves(ours)} | {rounded}
    tolerance = 0.05 if half & {"bfloat16", "float16"} else 2e-5
    assert_same(ours, flax, tolerance, tolerance)


@pytest.mark.parametrize("stored", [jnp.bfloat16, jnp.float16])
def test_integers_are_reduced_in_float32_whatever_the_statistics_are_stored_in(stored):
    x = jnp.array([[100001], [100003], [100008]], jnp.int32)
    options = {"param_dtype": stored, "force_float32_reductions": False, "momentum": 0.0, "use_running_average": False}
    results = [layer.apply(layer.init(KEY, x), x, mutable=["batch_stats"]) for layer in pair(**options)]
    assert_same(*results[::-1], 1e-4, 1e-4)


@partial(jax.jit, static_argnums=0)
def masked(layer, variables, x, mask):
    return layer.apply(variables, x, use_running_average=False, mask=mask, mutable=["batch_stats"])


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (1, 1, 5), (6, 1, 1), (1, 4, 5), (6, 4, 5)])
@pytest.mark.parametrize("kind", [bool, np.int32, np.float32])
def test_a_mask_of_any_rank_matches_flax(shape, kind, rng):
    x = rng.normal(1, 2, (6, 4, 5)).astype(np.float32)
    mask = np.ones(shape, bool) if shape in ((), (1,), (1, 1, 5)) else rng.random(shape) < 0.7
    mask = mask.astype(kind)
    results = []
    for layer in pair():
        variables = {"params": {"scale": np.ones(5, "f"), "bias": np.zeros(5, "f")}}
        variables["batch_stats"] = {"mean": np.zeros(5, "f"), "var": np.ones(5, "f")}
        results.append(masked(layer, variables, x, mask))
    assert_same(*results[::-1])


def test_the_mask_and_the_axis_name_play_no_part_in_initialization_and_evaluation(rng):
    x = rng.normal(1, 2, (6, 3)).astype(np.float32)
    layer = bnjax.linen.BatchNorm(axis_name="unbound", axis_index_groups=[[0], [1]])
    variables = layer.init(KEY, x, use_running_average=False)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    y = layer.apply(variables, x, use_running_average=True, mask=np.zeros((6, 1), bool))
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)
    with pytest.raises(NameError, match="unbound"):
        layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])


def test_use_running_average_is_given_once():
    x = jnp.ones((4, 2))
    with pytest.raises(ValueError, match="use_running_average"):
        bnjax.linen.BatchNorm().init(KEY, x)
    with pytest.raises(ValueError, match="use_running_average"):
        bnjax.linen.BatchNorm(use_running_average=True).init(KEY, x, use_running_average=True)


@pytest.mark.optimized
@pytest.mark.parametrize("options", [{}, {"use_fast_variance": True}, {"use_fast_variance": False}])
def test_statistics_far_from_zero_are_exact(options, rng):
    x = (1e4 + rng.standard_normal((512, 3))).astype(np.float32)
    layer = bnjax.linen.BatchNorm(momentum=0.0, **options)
    variables = layer.init(KEY, x, use_running_average=False)
    y, updates = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    expected, _, var = reference.train(x.astype(np.float64), np.ones(3), np.zeros(3), 0, 1, momentum=0)
    np.testing.assert_allclose(y, expected, atol=8 * 1.2e-7 * 1e4)
    np.testing.assert_allclose(updates["batch_stats"]["var"], var, rtol=8 * 1.2e-7 * 1e4)


def test_a_checkpoint_of_one_continues_in_the_other(rng):
    """Training resumes from the bytes of the other's variables, with the same numbers."""
    batches = rng.normal(1, 2, (4, 32, 3)).astype(np.float32)
    layers = pair(momentum=0.8)
    for writer, reader in (layers, layers[::-1]):
        runs = []
        for second in writer, reader:
            variables = writer.init(KEY, batches[0], use_running_average=False)
            for i, x in enumerate(batches):
                layer = writer if i < 2 else second
                if i == 2:
                    target = second.init(jax.random.key(1), x, use_running_average=False)
                    variables = flax.serialization.from_bytes(target, flax.serialization.to_bytes(variables))
                y, updates = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
                variables = {**variables, **updates}
            runs.append((y, variables))
        assert_same(*runs)


def test_momentum_as_a_function_adds_a_count_which_starts_at_0_without_one(rng):
    batches = rng.normal(1, 2, (3, 32, 2)).astype(np.float32)
    layer = bnjax.linen.BatchNorm(momentum=bnjax.cumulative_average, use_running_average=False)
    variables = layer.init(KEY, batches[0])
    assert described(variables["batch_stats"]["count"]) == ((2,), jnp.int32)
    fresh = nn.BatchNorm(use_running_average=False).init(KEY, batches[0])
    for start in variables, fresh:
        variables = start
        for x in batches:
            _, updates = layer.apply(variables, x, mutable=["batch_stats"])
            variables = {**variables, **updates}
        np.testing.assert_array_equal(updates["batch_stats"]["count"], 3)
        np.testing.assert_allclose(updates["batch_stats"]["mean"], batches.mean((0, 1)), rtol=1e-5)
        np.testing.assert_allclose(updates["batch_stats"]["var"], batches.var(1).mean(0), rtol=1e-5)
    evaluated = bnjax.linen.BatchNorm(momentum=bnjax.cumulative_average).apply(fresh, x, use_running_average=True)
    np.testing.assert_allclose(evaluated, x / np.sqrt(1 + 1e-5), rtol=1e-6)


def test_unbiased_var_and_real_weights_reach_the_statistics(rng):
    x = rng.normal(1, 2, (8, 2)).astype(np.float32)
    weights = rng.random((8, 1)).astype(np.float32)
    layer = bnjax.linen.BatchNorm(momentum=0.0, unbiased_var=True, use_running_average=False)
    _, updates = layer.apply(layer.init(KEY, x), x, mask=weights, mutable=["batch_stats"])
    w = weights.astype(np.float64)
    mean = (w * x).sum(0) / w.sum()
    var = (w * (x - mean) ** 2).sum(0) / (w.sum() - (w**2).sum() / w.sum())
    np.testing.assert_allclose(updates["batch_stats"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["var"], var, rtol=1e-5)


def test_several_axis_names_are_one_batch(rng):
    x = rng.normal(1, 2, (3, 4, 5, 2)).astype(np.float32)
    layer = bnjax.linen.BatchNorm(axis_name=("a", "b"), use_running_average=False)
    variables = layer.init(KEY, x[0, 0])

    def apply(x):
        return layer.apply(variables, x, mutable=["batch_stats"])

    y, updates = jax.vmap(jax.vmap(apply, axis_name="b"), axis_name="a")(x)
    flat = bnjax.linen.BatchNorm(use_running_average=False)
    expected, state = flat.apply(variables, x.reshape(-1, 2), mutable=["batch_stats"])
    np.testing.assert_allclose(y.reshape(-1, 2), expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0, 0], b, rtol=1e-5), updates, state)


def test_unequal_shards_are_merged_by_weight(rng):
    x = rng.normal(1, 2, (4, 6, 2)).astype(np.float32)
    mask = np.arange(6)[None, :, None] < np.array([6, 1, 3, 0])[:, None, None]
    layer = bnjax.linen.BatchNorm(axis_name="data", momentum=0.0, use_running_average=False)
    variables = layer.init(KEY, x[0])
    y, updates = jax.vmap(lambda x, m: layer.apply(variables, x, mask=m, mutable=["batch_stats"]), axis_name="data")(
        x, mask
    )
    valid = x[mask[..., 0]]
    np.testing.assert_allclose(updates["batch_stats"]["mean"][3], valid.mean(0), rtol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["var"][3], valid.var(0), rtol=1e-5)
    np.testing.assert_allclose(y, (x - valid.mean(0)) / np.sqrt(valid.var(0) + 1e-5), rtol=1e-4, atol=1e-5)


def test_statistics_stay_where_the_batch_says_nothing():
    layer = bnjax.linen.BatchNorm(use_running_average=False)
    variables = layer.init(KEY, jnp.ones((1, 2)))
    for x in jnp.full((1, 2), 7.0), jnp.array([[1.0, jnp.nan], [2.0, 3.0]])[:, 1:].repeat(2, 1):
        _, updates = layer.apply(variables, x, mutable=["batch_stats"])
        jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.5}, "momentum=1.5"),
        ({"axis": 2}, "axis=2"),
        ({"axis": -3}, "axis=-3"),
        ({"epsilon": 0}, "epsilon"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bnjax.linen.BatchNorm(**options).init(KEY, jnp.ones((4, 2)), use_running_average=False)


def test_moments_are_collected_where_the_collection_is_named(rng):
    x = rng.normal(3, 2, (10, 2)).astype(np.float32)
    layer = bnjax.linen.BatchNorm(use_running_average=False, momentum=0.5)
    variables = layer.init(KEY, x)
    assert set(variables) == {"params", "batch_stats"}
    assert set(layer.apply(variables, x, mutable=True)[1]) == {"params", "batch_stats"}
    mutable = ["batch_stats", "batch_moments"]
    _, first = layer.apply(variables, x[:4], mutable=mutable)
    np.testing.assert_allclose(first["batch_moments"]["moments"], bnjax.batch_moments(x[:4]), rtol=1e-6)
    carried = {**variables, "batch_moments": first["batch_moments"]}
    _, second = layer.apply(carried, x[4:], mutable=mutable)
    np.testing.assert_allclose(second["batch_moments"]["moments"], bnjax.batch_moments(x), rtol=1e-5)
    _, whole = layer.apply(variables, x, mutable=["batch_stats"])
    assert_same(second["batch_stats"], whole["batch_stats"], 1e-5)


def test_a_mask_that_does_not_fit_is_refused_in_its_own_shape():
    layer = bnjax.linen.BatchNorm(use_running_average=False)
    with pytest.raises(ValueError, match=r"BatchNorm\(mask=\.\.\.\): mask has shape \(8,\).*\(8, 3\)"):
        layer.init(KEY, jnp.ones((8, 3)), mask=np.ones(8, bool))


def test_a_layer_in_evaluation_collects_nothing_and_forgets_nothing(rng):
    x = rng.normal(3, 2, (10, 2)).astype(np.float32)
    layer = bnjax.linen.BatchNorm()
    variables = layer.init(KEY, x, use_running_average=True)
    mutable = ["batch_stats", "batch_moments"]
    _, empty = layer.apply(variables, x, use_running_average=True, mutable=mutable)
    assert not np.any(empty["batch_moments"]["moments"].weight)
    _, full = layer.apply({**variables, **empty}, x, use_running_average=False, mutable=mutable)
    np.testing.assert_allclose(full["batch_moments"]["moments"], bnjax.batch_moments(x), rtol=1e-6)
    _, kept = layer.apply({**variables, **full}, x, use_running_average=True, mutable=mutable)
    jax.tree.map(np.testing.assert_array_equal, kept["batch_moments"], full["batch_moments"])


def test_initialization_leaves_no_moments_even_where_a_lifted_transform_lists_them():
    axes = {"params": 0, "batch_stats": 0, "batch_moments": 0}
    layer = nn.vmap(bnjax.linen.BatchNorm, variable_axes=axes, split_rngs={"params": True})
    assert set(layer(use_running_average=False).init(KEY, jnp.ones((2, 4, 3)))) == {"params", "batch_stats"}


def test_lifted_transforms_carry_the_layer(rng):
    """Stacked by vmap, scanned over layers and rematerialized: as Flax's layer in the same place."""
    x = rng.normal(1, 2, (6, 3)).astype(np.float32)

    def build(layer):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.remat(layer)(use_running_average=False)(nn.Dense(3)(x)), None

        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                axes = {"params": 0, "batch_stats": 0}
                x, _ = nn.scan(Body, axes, split_rngs={"params": True}, length=2)()(x, None)
                stacked = nn.vmap(layer, variable_axes=axes, split_rngs={"params": True}, in_axes=0, axis_size=2)
                return stacked(use_running_average=False)(jnp.stack([x, 2 * x]))

        return Model()

    flax, ours = build(nn.BatchNorm), build(bnjax.linen.BatchNorm)
    variables = jax.jit(flax.init)(KEY, x)
    assert_same(jax.jit(ours.init)(KEY, x), variables)

    def loss(params, model):
        y, updates = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum(y**3), updates

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    assert_same(*(gradient(variables["params"], m) for m in (ours, flax)), 1e-3, 1e-3)


def train_resnet(model, x, labels, steps=3):
    """Losses, variables and evaluation of the model."""
    variables = jax.jit(partial(model.init, train=False))(KEY, x)

    @jax.jit
    def step(variables):
        def loss(params):
            logits, updates = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(x)), labels]), updates

        (value, updates), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return value, {"params": jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients), **updates}

    losses = []
    for _ in range(steps):
        value, variables = step(variables)
        losses.append(value)
    return jnp.stack(losses), variables, jax.jit(partial(model.apply, train=False))(variables, x)


def test_convert_leaves_a_plain_flax_resnet_the_same_network(rng):
    x = rng.normal(0.5, 1, (8, 8, 8, 3)).astype(np.float32)
    labels = rng.integers(0, 5, 8)
    flax = train_resnet(LinenResNet(), x, labels)
    ours = train_resnet(bnjax.linen.convert(LinenResNet()), x, labels)
    assert_same(ours, flax, 2e-3, 2e-4)  # where Flax's statistics are good


@pytest.mark.optimized
def test_convert_makes_a_plain_flax_layer_exact(rng):
    far = rng.normal(0.5, 1, (8, 8, 8, 3)).astype(np.float32) + np.float32(3e4)
    layer = nn.BatchNorm(use_running_average=False, use_bias=False)
    y, _ = bnjax.linen.convert(layer).init_with_output(KEY, far)
    oracle = reference.train(far.astype(np.float64), np.ones(3), np.zeros(3), 0, 1)[0]
    np.testing.assert_allclose(y, oracle, atol=8 * 1.2e-7 * 3e4)
    assert np.abs(layer.init_with_output(KEY, far)[0] - oracle).max() > 10  # only Flax


def test_convert_keeps_what_a_subclass_adds(rng):
    class Doubled(nn.BatchNorm):
        @nn.compact
        def __call__(self, x, use_running_average=None, *, mask=None):
            return 2 * super().__call__(x, use_running_average, mask=mask)

    x = (1e4 + rng.standard_normal((64, 2))).astype(np.float32)
    layer = bnjax.linen.convert(Doubled(use_running_average=False))
    y, _ = layer.init_with_output(KEY, x)
    np.testing.assert_allclose(y, 2 * reference.train(x.astype(np.float64), 1, 0, 0, 1)[0], atol=2e-2)
