"""One batch, its loss, and what the float64 oracle makes of it: for tests of transforms and of what is compiled."""

import jax.numpy as jnp
import numpy as np

import bnjax
from tests.support import reference

ROWS, FEATURES = 16, 3
RNG = np.random.default_rng(7)
X = (RNG.standard_normal((ROWS, FEATURES)) * 2 + 5).astype(np.float32)
G = RNG.standard_normal((ROWS, FEATURES)).astype(np.float32)
SCALE = np.array([0.5, -2.0, 3.0], np.float32)
BIAS = np.array([1.0, 0.0, -1.0], np.float32)
PARAMS = bnjax.BNParams(SCALE, BIAS)
STATE = bnjax.bn_init(FEATURES)[1]
# Split over four devices: full ones, 3 + 1 + 4 + 2 valid rows, one device without any, weights.
DEVICE_ROWS = np.arange(ROWS).reshape(4, 4)
MASKS = {
    "none": None,
    "unequal": (np.array([3, 1, 4, 2]).reshape(4, 1) > DEVICE_ROWS % 4).reshape(ROWS, 1),
    "empty": (DEVICE_ROWS // 4 != 2).reshape(ROWS, 1),
    "weights": ((DEVICE_ROWS // 4 != 1) * RNG.random((4, 4))).astype(np.float32).reshape(ROWS, 1),
}


def loss(params, x, mask, g, state=STATE, **options):
    y, new = bnjax.bn_apply(params, state, x, True, mask=mask, momentum=0.9, **options)
    return jnp.sum(y * g), (y, new)


def assert_matches_the_oracle(result, mask):
    (_, (y, new)), (dparams, dx) = result
    want_y, want_mean, want_var = reference.train(X, SCALE, BIAS, np.zeros(3), np.ones(3), momentum=0.9, mask=mask)
    want_dx, want_dscale, want_dbias = reference.gradients(X, G, SCALE, mask=mask)
    np.testing.assert_allclose(y, want_y, atol=2e-5)
    np.testing.assert_allclose(new.mean, want_mean, rtol=2e-6)
    np.testing.assert_allclose(new.var, want_var, rtol=2e-6)
    np.testing.assert_array_equal(new.count, [1, 1, 1])
    np.testing.assert_allclose(dx, want_dx, atol=2e-5)
    np.testing.assert_allclose(dparams.scale, want_dscale, atol=2e-5)
    np.testing.assert_allclose(dparams.bias, want_dbias, atol=2e-5)
