"""The measurements on this machine's device, with small arrays on CPU, and their tables."""

import json

import jax
import numpy as np
import pytest

import bnjax
from docs.tools import tables
from experiments.benchmark import device, device_network, device_parts, device_record, device_tables
from experiments.harness.data import InputError

EPS = float(np.finfo(np.float32).eps)
SMALL = ["--rounds", "2", "--resnet-rounds", "2", "--repeats", "2", "--threads", "2", "--copy-mebibytes", "1"]


def measured(folder, *flags):
    assert device.main([*SMALL, *flags, "--out", str(folder)]) == 0
    return device_tables.read(folder / "device")


@pytest.mark.optimized
def test_a_small_run_is_exact_far_from_zero_and_flax_is_not(tmp_path, flax_promotion, capsys):
    results = measured(tmp_path, "--parts", "copy", "exact", "--rows", "512", "--features", "4")
    entries = [e for e in results["parts"]["exact"] if "ratio" in e]
    ours = {(e["ratio"], e["running mean"]): e for e in entries if e["library"] == "bnjax"}
    assert set(ours) == {(ratio, where) for ratio in device_parts.RATIOS for where in ("near", "0")}
    for (ratio, _), e in ours.items():
        assert e["y"] <= 8 * EPS * (1 + 6 + ratio)  # the values lie within 6 standard deviations of their mean
        assert e["mean"] <= 8 * EPS * (1 + ratio)
        assert e["var"] <= 16 * EPS
        assert e["dx"] <= 8 * EPS * (1 + 6 + ratio)
    flax = next(e for e in entries if e["library"] == "Flax Linen" and e["ratio"] == 1e4)
    assert flax["y"] > 100 * ours[1e4, "near"]["y"]
    assert results["parts"]["exact"][-1]["second derivative"] < 100 * EPS
    assert f"{ours[1e4, 'near']['y']:.1e}" in tables.device("exact", tmp_path / "device")
    assert "Device: cpu" in capsys.readouterr().out


@pytest.mark.slow
def test_a_small_run_times_the_layer_and_the_guard(tmp_path, flax_promotion):
    blocks = ["--blocks", "bn", "--dtypes", "float32", "--libraries", "bnjax", "Flax Linen"]
    shapes = ["--shapes", "4x2x2x8", "--guard-shapes", "4x2x2x8", "--layers", "2"]
    results = measured(tmp_path, "--parts", "layer", "guard", *blocks, *shapes)
    layer = results["parts"]["layer"]
    assert [(e["shape"], e["direction"]) for e in layer] == [([4, 2, 2, 8], "forward"), ([4, 2, 2, 8], "backward")]
    assert all(set(e["seconds"]) == {"copy", "bnjax", "Flax Linen"} for e in layer)
    guard = results["parts"]["guard"]
    assert [(e["direction"], e["layers"]) for e in guard if e["issued"] == 1] == [
        ("forward", 1),
        ("backward", 1),
        ("forward", 2),
    ]
    contenders = {"bnjax", device_parts.NEAR, device_parts.FAR, device_parts.NO_GUARD, *device_parts.FLAX}
    assert all(set(e["seconds"]) == contenders for e in guard)
    assert results["left_out"] == {}
    assert "copy" in results["parts"]  # the limit of all else


@pytest.mark.slow
def test_a_small_run_times_a_network_whose_running_means_are_near(tmp_path, monkeypatch, flax_promotion):
    monkeypatch.setattr(device_network.resnet50, "STAGES", (1,))
    flags = ["--images", "4", "--size", "16", "--libraries", "bnjax"]
    (entry,) = measured(tmp_path, "--parts", "resnet", *flags)["parts"]["resnet"]
    names = {"none", "bnjax", device_parts.NEAR, device_parts.NO_GUARD, device_parts.FAR}
    assert set(entry["seconds"]) == set(entry["facts"]) == names
    assert entry["facts"][device_parts.NEAR]["looked again"] == [0, 5]
    assert entry["facts"][device_parts.FAR]["looked again"] == [5, 5]
    # The running statistics play no part in training, with or without the guard.
    np.testing.assert_allclose(*[entry["facts"][name]["loss"] for name in ("bnjax", device_parts.FAR)], rtol=1e-2)
    np.testing.assert_allclose(*[entry["facts"][name]["loss"] for name in ("bnjax", device_parts.NO_GUARD)], rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "conditional"), [("bnjax", False), (device_parts.NEAR, True), (device_parts.NO_GUARD, False)]
)
def test_the_guard_is_in_the_program_for_a_gpu_that_is_traced_with_it(name, conditional, rng):
    x = rng.standard_normal((64, 4), np.float32)
    params, state = bnjax.bn_init(4)

    def text():
        lowered = (
            jax.jit(lambda x: bnjax.bn_apply(params, state, x, True)[0]).trace(x).lower(lowering_platforms=("cuda",))
        )
        return lowered.as_text()

    with device_parts.read_by(name):
        assert ("stablehlo.case" in text()) == conditional
        y, new = bnjax.bn_apply(params, state, x, True, momentum=0.0)
    assert "stablehlo.case" not in text()
    np.testing.assert_allclose(new.mean, x.mean(0), atol=1e-6)
    np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), atol=1e-5)


def results_of(**parts):
    libraries = {"jax": "1.2.3"}
    facts = {"name": "a GPU", "platform": "gpu", "driver": None, "libraries": libraries}
    return {"device": facts, "parts": parts, "left_out": {}, "clocks": {}}


# A copy of 8 GB in 4 ms is 2000 GB a second.
COPY = [{"bytes": 8 * 10**9, "seconds": {"copy": [0.005, 0.004]}}]


def test_the_table_of_the_layer_has_the_bandwidth_of_the_least_passes(tmp_path):
    # An array of 2 * 10^8 bytes. Forward and backward 8 passes are 1.6 GB, in 1 ms 1600 GB a second.
    entry = {"shape": [1000, 100_000], "block": "bn", "direction": "backward", "dtype": "bfloat16"}
    entry["seconds"] = {"bnjax": [0.001, 0.002], "Flax Linen": [0.0015, 0.0015], "copy": [0.0002, 0.0002]}
    results = results_of(copy=COPY, layer=[entry])
    (tmp_path / "device.json").write_text(json.dumps(results))
    assert tables.device("layer", tmp_path).splitlines()[2] == (
        "| BN, forward and backward, bfloat16 | 1.50 | 80% | 53% |"
    )
    assert "2000 GB a second" in tables.device("facts", tmp_path)
    assert "1000 x 100000, bfloat16 | BN, forward and backward | 1000 | 1500 | 200 | 50% |" in tables.device(
        "layer_times", tmp_path
    )


def test_the_tables_of_guard_and_network_have_the_differences():
    seconds = {device_parts.NEAR: [0.001], device_parts.NO_GUARD: [0.0005], "Flax Linen": [0.0008]}
    entry = {"shape": [2, 3], "direction": "forward", "dtype": "bfloat16", "layers": 50, "issued": 1}
    _, rows = device_tables.guard(results_of(guard=[{**entry, "seconds": seconds}]))
    assert rows == [["2 x 3, bfloat16, a chain of 50, forward, one call at a time", "20.0", "10.0", "16.0", "10.0"]]
    facts = {device_parts.NEAR: {"loss": 1.0, "temporary": 2 * 10**9, "looked again": [1, 53]}}
    steps = {"none": [0.06], "Flax Linen": [0.1], device_parts.NEAR: [0.09]}
    _, rows = device_tables.resnet(results_of(resnet=[{"images": 9, "size": 224, "seconds": steps, "facts": facts}]))
    assert rows[2] == [device_parts.NEAR, "90.00", "0.0%", "100", "0.750", "2.00", "1 of 53"]


def test_the_facts_have_the_clocks_under_load():
    reading = {"seconds": 1.0, "clocks.mem": "2619", "temperature.gpu": "40", "power.draw": "[N/A]"}
    idle = {**reading, "clocks.sm": "345", "utilization.gpu": "0"}
    busy = [{**reading, "clocks.sm": str(mhz), "utilization.gpu": "90"} for mhz in (1980, 1755)]
    results = results_of() | {"clocks": {"layer": [idle, *busy]}}
    assert "an SM clock of 1755 to 1980 (median 1868) MHz" in device_tables.facts(results)


def test_a_record_keeps_what_it_has_and_names_what_it_has_not(tmp_path):
    path = tmp_path / "device.json"
    with device_record.Record(path, limit_seconds=60) as record:
        record.begin("layer")
        record.keep({"seconds": {"copy": [1.0]}})
        assert record.attempt("PyTorch", lambda: 1 / 0) is None
        assert json.loads(path.read_text())["parts"]["layer"] == [{"seconds": {"copy": [1.0]}}]
    with device_record.Record(path, limit_seconds=0) as record:
        record.begin("guard")
        assert record.attempt("chain", lambda: pytest.fail("it is late")) is None
    found = json.loads(path.read_text())
    assert list(found["parts"]) == ["layer"]
    assert found["left_out"] == {
        "layer: PyTorch": "ZeroDivisionError: division by zero",
        "guard: chain": "the limit of 0 s",
    }


def test_device_rejects_what_it_does_not_know(tmp_path, capsys):
    assert device.main(["--parts", "layers", "--out", str(tmp_path)]) == 2
    assert "parts=('layers',): expected some of ['copy'" in capsys.readouterr().err
    with pytest.raises(InputError, match="rounds=0: expected a positive number"):
        device.Device(rounds=0)
