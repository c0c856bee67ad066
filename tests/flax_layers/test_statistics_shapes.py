"""Statistics with axes of size 1, such as Haiku keeps, in the layers of both frameworks."""

import numpy as np
import pytest
from flax import nnx

import bnjax.linen
import bnjax.nnx

pytestmark = pytest.mark.usefixtures("flax_promotion")


def run(framework, x, mean, var, train=False, **options):
    kind = "IndexedBatchNorm" if "num_indices" in options else "BatchNorm"
    index = {"index": 0} if "num_indices" in options else {}
    if framework == "nnx":
        layer = getattr(bnjax.nnx, kind)(x.shape[-1], use_scale=False, use_bias=False, rngs=nnx.Rngs(0), **options)
        layer.mean.set_value(mean)
        layer.var.set_value(var)
        return layer(x, use_running_average=not train, **index)
    layer = getattr(bnjax.linen, kind)(use_scale=False, use_bias=False, **options)
    stats = {"batch_stats": {"mean": mean, "var": var}}
    return layer.apply(stats, x, use_running_average=not train, mutable=["batch_stats"], **index)[0]


@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (1, 1, 3), (1, 1, 1, 3)])
def test_statistics_that_fit_up_to_ones_are_refused_with_the_shape_to_give_them(framework, shape, rng):
    x = rng.normal(2, 3, (4, 2, 3)).astype(np.float32)
    mean, var = rng.normal(size=shape).astype(np.float32), rng.uniform(1, 2, shape).astype(np.float32)
    flat = mean.reshape((3,)), var.reshape((3,))
    for given, name in (((mean, var), "mean"), ((flat[0], var), "var")):
        for train in True, False:
            with pytest.raises(ValueError, match=rf"BatchNorm\(...\): the layer's {name}.*{name}\.reshape\(\(3,\)\)"):
                run(framework, x, *given, train)
    expected = (x - flat[0].astype(np.float64)) / np.sqrt(flat[1] + 1e-5)
    np.testing.assert_allclose(run(framework, x, *flat), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_one_index_is_an_axis_of_size_1_that_belongs_there(framework, rng):
    x = rng.normal(2, 3, (4, 3)).astype(np.float32)
    mean, var = np.ones((1, 3), np.float32), np.full((1, 3), 4, np.float32)
    y = run(framework, x, mean, var, num_indices=1)
    np.testing.assert_allclose(y, (x.astype(np.float64) - 1) / np.sqrt(4 + 1e-5), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"IndexedBatchNorm\(...\): the layer's mean has shape \(2, 1, 3\)"):
        run(framework, x, np.ones((2, 1, 3), np.float32), np.ones((2, 1, 3), np.float32), num_indices=2)
