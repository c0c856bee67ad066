"""Masks of lower rank than x, and weights below 0, in the layers of both frameworks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax.linen
import bnjax.nnx

pytestmark = pytest.mark.usefixtures("flax_promotion")

FRAMEWORKS = ["linen", "nnx"]


def mean(framework, x, mask, axis=-1, kind="BatchNorm", **options):
    """The mean that a layer finds in training, of the shape of the features."""
    options = {"axis": axis, "momentum": 0.0, "use_running_average": False, **options}
    if framework == "nnx":
        layer = getattr(bnjax.nnx, kind)(x.shape[axis], rngs=nnx.Rngs(0), **options)
        layer(x, mask=mask)
        return layer.mean[...]
    zeros, ones = np.zeros(x.shape[axis], "f"), np.ones(x.shape[axis], "f")
    variables = {"params": {"scale": ones, "bias": zeros}, "batch_stats": {"mean": zeros, "var": ones}}
    layer = getattr(bnjax.linen, kind)(**options)
    return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])[1]["batch_stats"]["mean"]


# Shape of x, feature axis, shape of a mask that could mean two things, and the expressions that the error shows.
TWO_MEANINGS = {
    "examples as features": ((4, 4), -1, (4,), ["mask[:, None]", "mask[None, :]"]),
    "examples, rank 3": ((4, 5, 4), -1, (4,), ["mask[:, None, None]", "mask[None, None, :]"]),
    "positions as features": ((6, 4, 4), -1, (4,), ["mask[None, :, None]", "mask[None, None, :]"]),
    "all the same": ((3, 3, 3), -1, (3,), ["mask[:, None, None]", "mask[None, :, None]", "mask[None, None, :]"]),
    "pixels of a square image": ((4, 4, 4, 4), -1, (4, 4, 4), ["mask[:, :, :, None]", "mask[None, :, :, :]"]),
    "sequences": ((4, 4, 4), -1, (4, 4), ["mask[:, :, None]", "mask[None, :, :]"]),
    "examples, channels first": ((4, 3, 4), 1, (4,), ["mask[:, None, None]", "mask[None, None, :]"]),
    "examples and length": ((3, 3, 5), 1, (3, 5), ["mask[:, None, :]", "mask[None, :, :]"]),
    "an image, channels first": (
        (4, 3, 4, 3),
        1,
        (4, 3),
        ["mask[None, None, :, :]", "mask[:, None, None, :]", "mask[:, :, None, None]"],
    ),
    "features first": ((4, 4), 0, (4,), ["mask[None, :]"]),
    "by feature only": ((6, 5, 3), -1, (3,), ["mask[None, None, :]"]),
    "no fit, examples": ((6, 5, 3), -1, (6,), ["mask[:, None, None]"]),
    "no fit, sequences": ((6, 5, 3), -1, (6, 5), ["mask[:, :, None]"]),
}


COMPUTED = ("all the same", "an image, channels first", "by feature only")


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("case", TWO_MEANINGS)
def test_a_mask_with_two_meanings_is_refused_and_each_remedy_is_the_meaning_it_names(framework, case, rng):
    shape, axis, mask_shape, expressions = TWO_MEANINGS[case]
    x = rng.normal(2, 3, shape).astype(np.float32)
    mask = np.resize([1.0, 3.0, 0.5, 2.0, 0.0], mask_shape).astype(np.float32)
    with pytest.raises(ValueError, match=r"BatchNorm\(mask=...\)") as raised:
        mean(framework, x, mask, axis)
    message = str(raised.value)
    assert f"has shape {mask_shape}" in message
    assert f"x has shape {shape}" in message
    reduced = tuple(a for a in range(len(shape)) if a != axis % len(shape))
    for expression in expressions:
        assert expression in message
        if framework == "linen" or case not in COMPUTED:  # the code is the same, and each shape is compiled
            continue
        full = eval(expression, {"mask": mask})
        weight = np.broadcast_to(full, shape).astype(np.float64)
        total = weight.sum(reduced)
        expected = (weight * x).sum(reduced) / np.where(total > 0, total, 1)  # 0, as it was, where all is masked
        np.testing.assert_allclose(mean(framework, x, full, axis), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("kind", ["BatchNorm", "GhostBatchNorm", "RenormBatchNorm"])
def test_a_mask_of_lower_rank_that_has_one_meaning_passes(framework, kind, rng):
    options = {"ghost_size": 4} if kind == "GhostBatchNorm" else {}
    x = rng.normal(2, 3, (4, 5, 5)).astype(np.float32)
    lengths = np.array([True, False, True, True, False])
    for axis, mask in ((-1, lengths[:, None]), (1, lengths), (1, lengths[None, :])):
        found = mean(framework, x, mask, axis, kind, **options)
        moved = x if axis == -1 else x.swapaxes(1, 2)
        np.testing.assert_allclose(found, moved[:, lengths].mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(mean(framework, x, True, kind=kind, **options), x.mean((0, 1)), rtol=1e-5)
    with pytest.raises(ValueError, match=rf"{kind}\(mask=...\): .*could mask features"):
        mean(framework, x, lengths, kind=kind, **options)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("shape", "axis", "mask_shape"),
    [
        ((4, 3), -1, (4, 1)),
        ((4, 5, 3), -1, (5, 1)),
        ((4, 5, 3), 1, (3,)),
        ((4, 2, 5, 3), -1, (4, 2, 5, 1)),
        ((4, 3, 2, 5), 1, (2, 5)),
        ((4, 3), -1, ()),
    ],
)
def test_a_negative_weight_that_is_known_is_refused(framework, shape, axis, mask_shape, rng):
    x = rng.normal(size=shape).astype(np.float32)
    mask = np.ones(mask_shape, np.float32)
    mask[(0,) * len(mask_shape)] = -1
    for known in mask, jnp.asarray(mask), mask.astype(np.int32):
        with pytest.raises(
            ValueError, match=r"BatchNorm\(mask=...\): expected booleans or weights of 0 or more, got -1"
        ):
            mean(framework, x, known, axis)
    with pytest.raises(ValueError, match="weights of 0 or more, got -1"):  # a constant of a compiled function
        jax.jit(lambda x: mean(framework, x, mask, axis))(x)
