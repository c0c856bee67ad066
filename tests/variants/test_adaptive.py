"""Test-time adaptation against an oracle written from Schneider et al. (2020), and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from bnjax import adaptive_bn_apply
from tests.support import reference

EPSILON = 1e-3
RNG = np.random.default_rng(0)
PARAMS = bnjax.BNParams(*RNG.normal(1, 0.5, (2, 3)).astype(np.float32))
STATE = bnjax.BNState(np.float32([1, -2, 3]), np.float32([0.5, 4, 9]), np.zeros(3, np.int32))
X = RNG.normal(2, 3, (8, 5, 3)).astype(np.float32)
LENGTHS = np.array([5, 0, 3, 1, 5, 2, 0, 4])
MASKS = {
    "no": None,
    "lengths": (np.arange(5) < LENGTHS[:, None])[..., None],
    "elements": RNG.random(X.shape) < 0.4,
    "weights": np.where(RNG.random(X.shape) < 0.3, 0, RNG.random(X.shape)).astype(np.float32),
    "a weight for each example": np.float32([1, 2, 0, 3, 1, 1, 0.5, 7])[:, None, None],
    "features": np.array([[[True, False, True]]]),
}


def oracle(x, source_weight, mask=None, axis=-1):
    mean, var = reference.adapted(x, *STATE[:2], source_weight, axis, mask)
    return reference.normalize(x, mean, var, *PARAMS, axis, EPSILON)


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@jax.jit
def adapt(x, source_weight, mask=None):
    return adaptive_bn_apply(PARAMS, STATE, x, source_weight=source_weight, mask=mask, epsilon=EPSILON)[0]


@pytest.mark.parametrize("name", MASKS)
def test_adaptive_bn_apply_matches_the_oracle(name):
    for source_weight in (0.0, 0.3, 16.0, np.inf):
        expected = oracle(X, min(source_weight, 1e12), MASKS[name])
        close(adapt(X, source_weight, MASKS[name]), expected)


@pytest.mark.parametrize("axis", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_examples_lie_on_the_first_axis_that_is_no_feature_axis(axis):
    x = np.moveaxis(X, -1, axis)
    mask = np.moveaxis(MASKS["weights"], -1, axis)
    y, _ = adaptive_bn_apply(PARAMS, STATE, x, source_weight=4, axis=axis, mask=mask, epsilon=EPSILON)
    close(y, oracle(x, 4, mask, axis))
    close(np.moveaxis(y, axis, -1), oracle(X, 4, MASKS["weights"]))


def test_a_source_weight_of_0_is_the_batch_and_an_infinite_one_evaluation():
    batch, _ = bnjax.bn_apply(PARAMS, None, X, True, epsilon=EPSILON)
    running, _ = bnjax.bn_apply(PARAMS, STATE, X, False, epsilon=EPSILON)
    close(adapt(X, 0.0), batch, 1e-6)
    close(adapt(X, np.inf), running, 1e-6)
    bad = X.copy()
    bad[0, 0, 0] = np.nan
    assert np.isnan(adapt(bad, np.inf)).sum() == 1
    assert np.isnan(adapt(bad, 16.0)).all((0, 1)).tolist() == [True, False, False]  # it shows in its feature


def test_a_sweep_of_source_weights_compiles_once_and_a_negative_one_is_0():
    sweep = jax.jit(lambda w: adaptive_bn_apply(PARAMS, STATE, X, source_weight=w, epsilon=EPSILON)[0])
    for source_weight in (0.0, 1.0, 16.0, 1e6):
        close(sweep(source_weight), oracle(X, source_weight))
    close(sweep(-3.0), oracle(X, 0))
    assert sweep._cache_size() == 1


def test_the_state_comes_back_as_it_is():
    assert adaptive_bn_apply(PARAMS, STATE, X, source_weight=16)[1] is STATE
    one_count = STATE._replace(count=np.int32(3))
    close(adaptive_bn_apply(PARAMS, one_count, X, source_weight=16, epsilon=EPSILON)[0], oracle(X, 16))


def test_padding_changes_nothing():
    padded = np.concatenate([X, np.full((8, 4, 3), np.nan, np.float32)], 1)
    padded = np.concatenate([padded, np.full((2, 9, 3), np.nan, np.float32)])
    mask = np.zeros((10, 9, 1), bool)
    mask[:8, :5] = MASKS["lengths"]
    y = adapt(padded, 4.0, mask)[:8, :5]
    close(y, oracle(X, 4, MASKS["lengths"]))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.where(mask, adapt(x, 4.0, mask), 0) ** 2)))(padded)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("shape", [(0, 3), (8, 0, 3), (3,)])
def test_batches_of_no_values_and_of_one(shape):
    """One example of a value a feature has variance 0, which counts as one example of the formula does."""
    y, state = adaptive_bn_apply(PARAMS, STATE, jnp.ones(shape), source_weight=4, epsilon=EPSILON)
    assert y.shape == shape
    assert state is STATE
    if shape == (3,):
        close(y, oracle(np.ones((1, 3)), 4)[0])


@pytest.mark.parametrize("masked", [pytest.param("no", marks=pytest.mark.slow), "weights"])
def test_examples_of_all_devices_count(masked):
    """Shards of unequal weight; one of four shards is empty. Under vmap an example needs its batch axis."""
    mask = MASKS[masked]
    mask = np.ones((8, 5, 1), np.float32) if mask is None else mask * (np.arange(8) >= 2)[:, None, None]
    expected = oracle(X, 4, mask)

    def apply(x, mask):
        options = {"axis_name": "data", "epsilon": EPSILON, "mask": None if masked == "no" else mask}
        return adaptive_bn_apply(PARAMS, STATE, x, source_weight=4, **options)[0]

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(apply, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    examples = jax.vmap(lambda x, mask: apply(x[None], mask[None])[0], axis_name="data")
    for y in jax.jit(lambda *args: (mapped(*args), examples(*args)))(X, mask):
        close(y, expected)


def test_one_example_a_call_and_groups_of_devices():
    x, weight = X[:, 0], MASKS["a weight for each example"][:, 0]
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]

    def apply(x, weight, groups=None):
        options = {"axis_name": "examples", "epsilon": EPSILON, "axis_index_groups": groups}
        return adaptive_bn_apply(PARAMS, STATE, x, source_weight=4, mask=weight, **options)[0]

    whole, halves = jax.jit(
        lambda *a: [jax.vmap(lambda x, w, g=g: apply(x, w, g), axis_name="examples")(*a) for g in (None, groups)]
    )(x, weight)
    close(whole, oracle(x, 4, weight))
    for half in (slice(0, 4), slice(4, 8)):
        close(halves[half], oracle(x[half], 4, weight[half]))


def test_explicitly_sharded_arrays():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x, mask = (jax.device_put(v, NamedSharding(mesh, P("data"))) for v in (X, MASKS["weights"]))
        y = adapt(x, 4.0, mask)
    assert jax.typeof(y).sharding.spec[0] == "data"
    close(y, oracle(X, 4, MASKS["weights"]))


def test_derivatives_match_plain_autodiff():
    """In everything that is not static, in float64, to second order in x."""
    with jax.enable_x64(True):
        x, g = X[:, 0].astype(np.float64), RNG.normal(size=(8, 3))
        params, state = (jax.tree.map(lambda v: jnp.asarray(v, float), t) for t in (PARAMS, STATE[:2]))

        def oracle_loss(params, state, x, source_weight):
            keep, take = (v / (source_weight + 8) for v in (source_weight, 8))
            mean, var = keep * state[0] + take * x.mean(0), keep * state[1] + take * x.var(0)
            xhat = (x - mean[None]) / jnp.sqrt(var + EPSILON)[None]
            return jnp.sum(g * (params.scale[None] * xhat + params.bias[None]) ** 2)

        def loss(params, state, x, source_weight):
            state = bnjax.BNState(*state, STATE.count)
            return jnp.sum(
                g * adaptive_bn_apply(params, state, x, source_weight=source_weight, epsilon=EPSILON)[0] ** 2
            )

        def derivatives(f, *args):
            return jax.grad(f, (0, 1, 2, 3))(*args), jax.jvp(jax.grad(lambda x: f(*args[:2], x, 5.0)), (x,), (g,))[1]

        actual, expected = jax.jit(lambda *args: [derivatives(f, *args) for f in (loss, oracle_loss)])(
            params, state, x, 5.0
        )
        jax.tree.map(lambda a, b: close(a, b, 1e-8), actual, expected)


@pytest.mark.optimized
def test_adaptation_is_exact_far_from_0():
    """At |mean| / std = 1e4, where just rounding the data moves a value by 5e-4 standard deviations."""
    x = RNG.normal(1e4, 1, (256, 3)).astype(np.float32)
    state = bnjax.BNState(np.full(3, 1e4 + 0.5, np.float32), np.ones(3, np.float32), STATE.count)
    y, _ = adaptive_bn_apply(PARAMS, state, x, source_weight=64, epsilon=EPSILON)
    mean, var = reference.adapted(x, *state[:2], 64)
    assert np.abs(y - reference.normalize(x, mean, var, *PARAMS, -1, EPSILON)).max() < 1.5e-3


def test_complex_and_half_precision_data():
    x = (X + 1j * X[::-1]).astype(np.complex64)
    params, state = bnjax.bn_init(3, dtype=jnp.complex64)
    state = state._replace(mean=jnp.array([1 + 1j, 2, 3j]))
    y, _ = adaptive_bn_apply(params, state, x, source_weight=4, epsilon=EPSILON)
    mean, var = reference.adapted(x, *state[:2], 4)
    close(y, reference.normalize(x, mean, var, *params, -1, EPSILON))
    half = jnp.asarray(X, jnp.bfloat16)
    y = adapt(half, 4.0)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), oracle(half.astype(np.float32), 4), rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize(
    "value", [-1, None, "16", True, np.nan, np.ones(3), 1j, np.bool_(True), jnp.array(-1.0)], ids=repr
)
def test_adaptive_bn_apply_rejects_a_source_weight_that_is_no_number_of_examples(value):
    with pytest.raises(ValueError, match=r"adaptive_bn_apply\(source_weight=.*expected a number of 0 or more"):
        adaptive_bn_apply(PARAMS, STATE, X, source_weight=value)


def test_adaptive_bn_apply_takes_numbers_of_any_kind_and_rejects_the_rest():
    for value in (4, np.float64(4), np.array(4), jnp.array(4, jnp.bfloat16)):
        close(adaptive_bn_apply(PARAMS, STATE, X, source_weight=value, epsilon=EPSILON)[0], oracle(X, 4))
    with pytest.raises(ValueError, match=r"adaptive_bn_apply\(state=None\).*call bn_apply with state=None"):
        adaptive_bn_apply(PARAMS, None, X, source_weight=4)
    with pytest.raises(ValueError, match=r"adaptive_bn_apply\(axis_name='data'\): no mapped axis"):
        adaptive_bn_apply(PARAMS, STATE, X, source_weight=4, axis_name="data")
