"""Every derivative against plain autodiff of the formula in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax.core import moments, normalize, reading

AXIS = 1
SHAPE = (7, 3, 2)
EPSILON = 1e-3
MASKS = {
    "none": None,
    "bool": np.random.default_rng(1).random(SHAPE) < 0.7,
    "weights": np.random.default_rng(2).random((7, 1, 2)) * (np.random.default_rng(3).random((7, 1, 2)) < 0.8),
}
DTYPES = [np.float64, np.complex128]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def plain(params, state, x, mask, momentum=0.9):
    """bn_apply in training, written out with jnp and differentiated by plain autodiff."""
    with jax.numpy_dtype_promotion("standard"):
        return _plain(params, state, x, mask, momentum)


def _plain(params, state, x, mask, momentum):
    w = jnp.ones(x.shape) if mask is None else jnp.broadcast_to(jnp.asarray(mask, float), x.shape)
    axes, column = (0, 2), (1, -1, 1)
    mean = (jnp.sum(w * x, axes) / jnp.sum(w, axes)).reshape(column)
    var = (jnp.sum(w * jnp.abs(x - mean) ** 2, axes) / jnp.sum(w, axes)).reshape(column)
    scale, bias = params.scale.reshape(column), params.bias.reshape(column)
    y = scale * (x - mean) / jnp.sqrt(var + EPSILON) + bias
    return y, [momentum * old + (1 - momentum) * new.reshape(3) for old, new in ((state.mean, mean), (state.var, var))]


def exact(params, state, x, mask):
    y, new = bnjax.bn_apply(params, state, x, True, axis=AXIS, mask=mask, momentum=0.9, epsilon=EPSILON)
    return y, [new.mean, new.var]


def problem(mask, dtype):
    """Two scalar functions of the same arrays, which depend on y and on the new state, and a point with directions."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        z = rng.standard_normal(shape)
        return np.asarray(z + 1j * rng.standard_normal(shape) if dtype == np.complex128 else z, dtype)

    t, u = draw(*SHAPE), draw(3)

    def scalar(apply):
        def f(x, scale, bias, mean):
            state = bnjax.BNState(mean, jnp.ones(3), jnp.zeros(3, jnp.int32))
            y, (new_mean, new_var) = apply(bnjax.BNParams(scale, bias), state, x, mask)
            y_part = jnp.sum(jnp.real(jnp.conj(t) * y) ** 3 + jnp.abs(y) ** 2)
            return y_part + jnp.sum(jnp.sin(jnp.real(u * new_mean)) * jnp.cos(10 * new_var))

        return f

    point = (draw(*SHAPE) + 3, draw(3), draw(3), draw(3))
    directions = [(draw(*SHAPE), draw(3), draw(3), draw(3)) for _ in range(3)]
    return scalar(exact), scalar(plain), point, directions


def along(f, direction):
    return lambda *point: jax.jvp(f, point, direction)[1]


def against(f, direction):
    """The derivative of f along a direction, in reverse mode."""

    def value(*point):
        gradient = jax.grad(f, tuple(range(len(point))))(*point)
        return sum(jnp.sum(jnp.real(g * d)) for g, d in zip(gradient, direction, strict=True))

    return value


ORDERS = {
    "forward": [along],
    "reverse": [against],
    "forward_over_forward": [along, along],
    "forward_over_reverse": [against, along],
    "reverse_over_reverse": [against, against],
    "reverse_over_forward": [along, against],
    "third_forward": [along, along, along],
    "third_reverse": [against, against, against],
    "third_mixed": [along, against, along],
}


# Every order with every kind of mask (the third without the middle one), complex data with the most general one.
CASES = [(order, mask, np.float64) for order in ORDERS for mask in MASKS if "third" not in order or mask != "bool"]
CASES += [(order, "weights", np.complex128) for order in ORDERS if order != "third_forward"]


@pytest.mark.parametrize(("order", "mask", "dtype"), CASES)
def test_bn_apply_derivative_matches_plain_autodiff(order, mask, dtype):
    f, oracle, point, directions = problem(MASKS[mask], dtype)
    for mode, direction in zip(ORDERS[order], directions, strict=False):
        f, oracle = mode(f, direction), mode(oracle, direction)
    np.testing.assert_allclose(jax.jit(f)(*point), jax.jit(oracle)(*point), rtol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_bn_apply_gradient_matches_plain_autodiff_in_every_entry(mask, dtype):
    f, oracle, point, _ = problem(MASKS[mask], dtype)
    every = tuple(range(4))
    got, want = (jax.jit(jax.grad(h, every))(*point) for h in (f, oracle))
    chex.assert_trees_all_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mask", MASKS)
def test_bn_apply_hessian_matches_plain_autodiff(mask):
    f, oracle, point, _ = problem(MASKS[mask], np.float64)
    want = jax.jit(jax.hessian(oracle))(*point)
    for hessian in (jax.hessian(f), jax.jacrev(jax.jacrev(f)), jax.jacrev(jax.jacfwd(f))):
        np.testing.assert_allclose(jax.jit(hessian)(*point), want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [(7, 3, 2), (7, 3, 1), (1, 3, 1), (7, 1, 1)])
def test_conditional_scale_and_bias_gradients_match_plain_autodiff(shape, rng):
    x, t = rng.standard_normal((2, *SHAPE))
    scale, bias = rng.standard_normal((2, *shape))
    _, state = bnjax.bn_init(3)

    def f(x, scale, bias):
        y, _ = bnjax.bn_apply(bnjax.BNParams(scale, bias), state, x, True, axis=AXIS, epsilon=EPSILON)
        return jnp.sum(t * y**2)

    def oracle(x, scale, bias):
        centered = x - x.mean((0, 2), keepdims=True)
        y = scale * centered / jnp.sqrt((centered**2).mean((0, 2), keepdims=True) + EPSILON) + bias
        return jnp.sum(t * y**2)

    got, want = (jax.jit(jax.grad(h, (0, 1, 2)))(x, scale, bias) for h in (f, oracle))
    chex.assert_trees_all_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wrt", ["scale", "bias", "mean", "var", "x"])
def test_evaluation_gradients_match_plain_autodiff(wrt, rng):
    values = {
        "x": rng.standard_normal(SHAPE),
        "mean": rng.standard_normal(3),
        "var": rng.random(3),
        "scale": rng.standard_normal(3),
        "bias": rng.standard_normal(3),
    }

    def f(value):
        v = values | {wrt: value}
        state = bnjax.BNState(v["mean"], v["var"], np.zeros(3, np.int32))
        y, _ = bnjax.bn_apply(bnjax.BNParams(v["scale"], v["bias"]), state, v["x"], False, axis=AXIS, epsilon=EPSILON)
        return jnp.sum(y**3)

    def oracle(value):
        v = {k: a if k == "x" else jnp.reshape(a, (1, 3, 1)) for k, a in (values | {wrt: value}).items()}
        return jnp.sum((v["scale"] * (v["x"] - v["mean"]) / jnp.sqrt(v["var"] + EPSILON) + v["bias"]) ** 3)

    want = jax.jit(jax.grad(oracle))(values[wrt])
    for derivative in (jax.grad(f), jax.jacfwd(f)):
        np.testing.assert_allclose(jax.jit(derivative)(values[wrt]), want, rtol=1e-9)


@pytest.mark.parametrize("mask", MASKS)
def test_batch_moments_gradients_match_their_autodiff_version(mask, rng):
    x = rng.standard_normal(SHAPE)
    weights = MASKS[mask]
    shift = np.ones(SHAPE[1])  # which changes neither the moments nor their derivatives

    def ours(x, mask):
        return moments.collect(x, mask, (1,), x.dtype, shift=shift).moments

    def two_looks(x, mask):
        return reading.two_looks(x, mask, (0, 2))

    def f(rule, x):
        out = rule(*moments.widened(x, None if weights is None else jnp.asarray(weights)))
        return jnp.sum(out.mean**3 * out.var)

    for derivative in (jax.grad, jax.hessian):
        got, want = (jax.jit(derivative(f, argnums=1), static_argnums=0)(rule, x) for rule in (ours, two_looks))
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_normalize_derivative_matches_its_autodiff_version(rng):
    args = (rng.standard_normal(SHAPE), *(rng.random((1, 3, 1)) for _ in range(4)))
    tangents = tuple(rng.standard_normal(np.shape(a)) for a in args)
    got, want = (
        jax.jvp(lambda *a, f=f: f(*a, None, EPSILON), args, tangents) for f in (normalize.normalize, normalize.formula)
    )
    chex.assert_trees_all_close(got, want, rtol=1e-12)


@pytest.mark.lowerings
def test_the_gradient_needs_one_pair_of_reductions_of_full_size(rng):
    # This is the main benefit of the rule: sum g and sum g (x - mean) serve x, scale and bias alike.
    x = jnp.asarray(rng.standard_normal((64, 32)))
    params, state = bnjax.bn_init(32, dtype=jnp.float64)
    _, backward = jax.vjp(lambda params, x: bnjax.bn_apply(params, state, x, True)[0], params, x)
    equations = list(_equations(jax.make_jaxpr(backward)(x).jaxpr))
    assert equations.count("bnjax_sums") == 1
    assert "reduce_sum" not in equations


def _equations(jaxpr):
    """Names of the primitives that take an array of 64 x 32, in nested jaxprs too."""
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)
        if getattr(equation.invars[0].aval, "shape", ()) == (64, 32):
            yield equation.primitive.name


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_second_derivatives_at_variance_zero_agree_merged_and_whole(value):
    # max(var, 0) has half a derivative at 0; the variance of a constant feature has a whole second one.
    z = np.full(4, value)
    identity = np.eye(4)
    want = 2 / 4 * (identity - 1 / 4)

    def whole(z):
        return bnjax.batch_moments(z[:, None]).var[0]

    def mapped(z):
        f = jax.vmap(lambda row: bnjax.batch_moments(row, axis_name="i").var, axis_name="i")
        return f(z[:, None])[0, 0]

    def merged(z):
        return bnjax.merge_moments(*(bnjax.batch_moments(part[:, None]) for part in (z[:1], z[1:]))).var[0]

    for f in (whole, mapped, merged):
        np.testing.assert_allclose(jax.jit(jax.hessian(f))(z), want, atol=1e-12)
