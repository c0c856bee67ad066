"""If JAX does not accept our lowerings, plain formulas run, with one warning. `make test-plain` tests their results."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.support import reference

CODE = """
import sys, warnings
{before}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import bnjax, numpy as np
    from bnjax.core import jax_internals
x = np.random.default_rng(0).normal(5, 2, (32, 3)).astype("f")
y, state = bnjax.bn_apply(*bnjax.bn_init(3), x, True)
print(sum("plain formulas run" in str(w.message) for w in caught), *np.asarray(y)[:2].ravel(), *state.mean, *state.var)
"""


@pytest.mark.parametrize(
    ("before", "warnings"),
    [
        ("import jax; sys.modules['jax.interpreters.mlir'] = None", 1),
        ("import jax.extend.core; del jax.extend.core.Primitive", 1),
        ("import os; os.environ['BNJAX_PLAIN'] = '1'", 0),
    ],
    ids=["no mlir", "no Primitive", "chosen"],
)
def test_plain_formulas_run_where_lowerings_cannot_and_say_so_once(before, warnings):
    code = CODE.format(before=before)
    environment = {name: value for name, value in os.environ.items() if name != "BNJAX_PLAIN"}
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    said, *numbers = map(float, result.stdout.split())
    assert said == warnings
    x = np.random.default_rng(0).normal(5, 2, (32, 3)).astype("f")
    y, mean, var = reference.train(x, 1, 0, 0, 1)
    np.testing.assert_allclose(numbers, [*y[:2].ravel(), *mean, *var], rtol=1e-5, atol=1e-6)
