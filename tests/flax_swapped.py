"""Pytest plugin that puts our BatchNorm in the place of Flax's before Flax's own tests import it: `make test-flax`."""


def pytest_configure():
    import flax.linen
    import flax.nnx

    import bnjax.linen
    import bnjax.nnx

    flax.linen.BatchNorm = flax.linen.normalization.BatchNorm = bnjax.linen.BatchNorm
    flax.nnx.BatchNorm = flax.nnx.nn.normalization.BatchNorm = bnjax.nnx.BatchNorm
