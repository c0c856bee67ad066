"""The tolerance of a comparison with another library, and the table of differences at the end of the run."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax.core.moments import wider

# A value goes through two sums, of at most 2^8 numbers in pairs, and through about 16 other operations, each rounded by
# at most epsilon / 2: 32 roundings, in each of two libraries, of numbers that are not larger than the scale.
ROUNDINGS = 32


def pytest_itemcollected(item):
    """Accuracy is compared, so everything is compiled as users compile it."""
    item.add_marker(pytest.mark.optimized)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture
def x64():
    """Only float64, which distinguishes the most."""
    with jax.enable_x64(True):
        yield "float64"


@pytest.fixture
def agree(request):
    """`agree(quantity, ours, theirs)`: the one place in this folder where two libraries are compared.

    max |ours - theirs| / max(1, max |theirs|) must not be larger than `growth` times what rounding explains: ROUNDINGS
    epsilons of the dtype, and for a half precision, in which both store what they computed in float32, one epsilon of
    that, the distance of two neighbours. The call gives the reason for a `growth` that is not 1; 0 asks for equal bits.
    """
    library = request.path.stem.removeprefix("test_")

    def agree(quantity, ours, theirs, growth=1.0):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.shape == theirs.shape
        if not growth:
            assert ours.dtype == theirs.dtype
        stored = max((jnp.finfo(v.dtype) for v in (ours, theirs)), key=lambda finfo: finfo.eps)
        computed = jnp.finfo(wider(stored.dtype))
        allowed = growth * (ROUNDINGS * computed.eps + (stored.eps if stored.bits < computed.bits else 0))
        wanted = theirs.astype(np.float64)
        difference = np.max(np.abs(ours.astype(np.float64) - wanted), initial=0) / np.max(np.abs(wanted), initial=1)
        row = library, stored.dtype.name, quantity, float(difference), request.node.name
        request.node.user_properties.append(("difference", row))
        assert difference <= allowed, f"{quantity} differs by {difference:.1e}; rounding explains {allowed:.1e}"

    return agree


def pytest_terminal_summary(terminalreporter):
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    calls = [report for report in reports if getattr(report, "when", None) == "call"]
    rows = [tuple(value) for report in calls for name, value in report.user_properties if name == "difference"]
    if not rows:
        return
    groups = {}
    for row in rows:
        for group in (row[:3], ("all", row[1], "all")):
            groups.setdefault(group, []).append(row)
    terminalreporter.section("largest differences, max |ours - theirs| / max(1, max |theirs|)")
    line = "{:<8} {:<9} {:<13} {:>6} {:>8}  {}".format
    terminalreporter.line(line("library", "dtype", "quantity", "number", "largest", "case"))
    for group, members in sorted(groups.items(), key=lambda item: (item[0][0] == "all", item[0])):
        *_, largest, case = max(members, key=lambda row: row[3])
        terminalreporter.line(line(*group, len(members), f"{largest:.1e}", case))
