"""Programs compiled for TPUs and GPUs that are not here: passes over memory, collectives, conditionals, memory.

A change that adds a pass or a collective fails here. Flax, compiled beside ours, is the measure for networks.
"""

import importlib.util
import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from experiments import __main__ as main
from experiments.benchmark import compiled, compiled_programs, compilers
from experiments.benchmark.compiled_programs import SHAPE, WIDE
from experiments.benchmark.traffic import Program
from experiments.harness.data import InputError

pytestmark = pytest.mark.optimized

CASES = list(itertools.product(["bn", "bn_relu"], ["forward", "backward"], ["bfloat16", "float32"]))
FAST = ("bn", "backward", "float32")
SUMS = 2 * 4 * WIDE[-1]
"""bytes of two float32 numbers for each feature of the wide layer, the minimum that devices must merge"""
MERGED = {"forward": 3 * 4 * WIDE[-1], "backward": 3 * 4 * WIDE[-1] + SUMS}
"""bytes that any number of devices may merge: forward a weight in addition to the two, and with `backward` two more"""
CHIPS = ["v5e", "v5e-64", "v5e-256"]


def has(name):
    return importlib.util.find_spec(compilers.target(name).module) is not None


needs_tpu_compiler = pytest.mark.skipif(not has("v5e"), reason="libtpu, the compiler for TPUs, is for Linux on x86-64")
needs_cuda_compiler = pytest.mark.skipif(not has("h100"), reason="needs the CUDA plugin, of the extra cuda-compiler")


@pytest.fixture(scope="module")
def tpu():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in compilers.target("v5e").environment.items():
            patch.setenv(name, value)
        yield compilers.mesh("v5e")


def layer(block, direction, dtype, devices, apply=bnjax.bn_apply, variables=None, **options):
    """The function that `compiled` compiles, its variables and its case."""
    case = compiled.Case((SHAPE[0] * devices, *SHAPE[1:]), block, direction, dtype)

    def call(params, state, x):
        return apply(params, state, x, True, **options)

    return compiled.contenders.step(case, call), variables or bnjax.bn_init(SHAPE[-1]), case


def wide(name, mapping, direction):
    """The counts of bnjax's wide layer, compiled for a target whose environment is that of `tpu`."""
    mesh = compilers.mesh(name)
    for facts, f, variables, case in compiled_programs.synchronized(mesh):
        if (facts["library"], facts["mapping"], facts["direction"]) == ("bnjax", mapping, direction):
            return compiled.count_layer(mesh, f, variables, case)
    raise AssertionError


@needs_tpu_compiler
@pytest.mark.parametrize(
    ("block", "direction", "dtype"),
    [case if case == FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_a_layer_for_tpu_reads_once_and_has_one_collective_each_way(block, direction, dtype, tpu):
    found = compiled.count_layer(tpu, *layer(block, direction, dtype, tpu.size))
    # Forward: x for the statistics, x again, y. Backward: x and dy for the sums; both again, and dx, where XLA reads x
    # once for dx and y. With ReLU in bfloat16 it writes the masked dy first; for Flax's formula it does not.
    most = 3 if direction == "forward" else 8 if (block, dtype) == ("bn_relu", "bfloat16") else 7
    assert found["passes"] <= most + 0.01
    assert [kind for kind, _ in found["collectives"]] == ["all-reduce"] * (1 if direction == "forward" else 2)
    assert [size for _, size in found["collectives"]] == [2 * 4 * SHAPE[-1]] * len(found["collectives"])
    assert found["temporary"] < 0.02 * np.prod(SHAPE) * jnp.dtype(dtype).itemsize


@pytest.mark.slow
@needs_tpu_compiler
@pytest.mark.parametrize("name", ["masked", "without a state", "renorm_bn_apply", "indexed_bn_apply", "conditional"])
def test_a_variant_for_tpu_reads_once_and_has_one_collective_each_way(name, tpu):
    apply, variables = compiled_programs.variants((SHAPE[0] * tpu.size, *SHAPE[1:]))[name]

    def call(params, state, x, train):
        return apply(params, state, x)

    found = compiled.count_layer(tpu, *layer("bn", "backward", "bfloat16", tpu.size, call, variables))
    assert found["passes"] <= 7.01
    assert [kind for kind, _ in found["collectives"]] == ["all-reduce", "all-reduce"]


@pytest.mark.slow
@needs_tpu_compiler
def test_models_under_vmap_for_tpu_read_once_and_share_one_collective(tpu):
    models, shape = 4, (SHAPE[0] * tpu.size, *SHAPE[1:])
    variables = jax.tree.map(lambda v: jnp.stack([v] * models), bnjax.bn_init(shape[-1]))
    # The axis of the models is the second, so that the first is divided among the devices.
    many = jax.vmap(lambda params, state, x: bnjax.bn_apply(params, state, x, True), (0, 0, 1), (1, 0))
    x = jax.ShapeDtypeStruct((shape[0], models, *shape[1:]), jnp.bfloat16)
    found = compiled.count(tpu, many, variables, [x], 2 * models * int(np.prod(SHAPE)))
    assert found["passes"] <= 3.01
    assert [kind for kind, _ in found["collectives"]] == ["all-reduce"]


@pytest.mark.slow
@needs_cuda_compiler
def test_a_compiler_that_fails_says_why():
    with pytest.raises(InputError, match=r"(?s)h100: the compiler stopped.*no_such_part"):
        list(compilers.lines("h100", "-c", "import sys; sys.stderr.write('x' * 10**6); import no_such_part"))


@pytest.mark.slow
@needs_tpu_compiler
def test_groups_for_tpu_need_no_collective_for_the_output(tpu):
    ghost = partial(bnjax.ghost_bn_apply, ghost_size=16)

    def output(params, state, x, train):
        return ghost(params, state, x, train)[0], None

    found = compiled.count_layer(tpu, *layer("bn", "forward", "bfloat16", tpu.size, output))
    assert found["passes"] <= 4.01  # a sixteenth is read twice, which counts as the whole
    assert found["collectives"] == []


@pytest.mark.slow
@needs_tpu_compiler
def test_a_named_axis_for_tpu_has_one_collective_each_way(tpu):
    f, variables, case = layer("bn", "backward", "bfloat16", tpu.size, axis_name="data")
    found = compiled.count_layer(tpu, compiled_programs.mapped(tpu, f, "backward"), variables, case)
    assert found["passes"] <= 7.01
    assert [kind for kind, _ in found["collectives"]] == ["all-reduce", "all-reduce"]


@needs_tpu_compiler
@pytest.mark.usefixtures("tpu")
@pytest.mark.parametrize("direction", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CHIPS)
def test_bytes_merged_by_jit_do_not_depend_on_the_number_of_chips(name, direction):
    found = wide(name, "jit", direction)
    assert [size for _, size in found["collectives"]] == [SUMS] * (1 if direction == "forward" else 2)


@pytest.mark.slow
@needs_tpu_compiler
@pytest.mark.usefixtures("tpu")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", CHIPS)
def test_bytes_merged_over_a_named_axis_do_not_depend_on_the_number_of_chips(name, direction):
    found = wide(name, "shard_map", direction)
    assert SUMS <= compiled.merged(found) <= MERGED[direction]


@pytest.mark.slow
@needs_tpu_compiler
def test_a_network_for_tpu_moves_no_more_than_with_flax(tpu):
    with jax.numpy_dtype_promotion("standard"):  # as Flax's convolutions need it
        flax, ours = (
            compiled.count(tpu, f, variables, [x, compiled_programs.labels(x.shape[0])])
            for _, f, variables, x in compiled_programs.networks("nnx", 128 * tpu.size)
        )
    assert ours["bytes"] <= 1.01 * flax["bytes"]
    assert len(ours["collectives"]) <= len(flax["collectives"])
    # What the guard's conditional would read stays until it is decided: at this network's peak, two activations.
    assert ours["temporary"] <= flax["temporary"] + 2.1 * (128 * 32 * 32 * 64 * 2)


@pytest.mark.slow
@needs_cuda_compiler
@pytest.mark.parametrize("name", ["h100", "h100-8"])
def test_programs_for_gpu_move_no_more_than_with_flax(name):
    entries = list(compiled.compiled_for(name, "variants", "nnx"))
    for entry in entries:
        if entry["part"] == "layer" and entry["library"] == "bnjax":
            assert entry["passes"] <= (3.1 if entry["direction"] == "forward" else 8.1), entry
            ghost = entry["variant"] == "ghost_bn_apply"
            assert len(entry["collectives"]) <= (0 if name == "h100" else 2 + ghost), entry
            assert entry["conditionals"] == 0, entry
    network = compiled.of(entries, part="nnx")
    # On eight devices XLA's cost model fuses less of the small network's backward for ours than for Flax's formula.
    assert network["bnjax"]["bytes"] <= (1 if name == "h100" else 1.05) * network["Flax NNX"]["bytes"]
    assert len(network["bnjax"]["collectives"]) <= len(network["Flax NNX"]["collectives"])
    assert network["bnjax"]["temporary"] <= 1.02 * network["Flax NNX"]["temporary"]


@pytest.mark.slow
@needs_cuda_compiler
@pytest.mark.parametrize("name", ["h100", "h100-8"])
def test_small_layers_for_gpu_are_read_once_for_both_sums(name):
    found = {(e["library"], e["variant"], e["direction"]): e for e in compiled.compiled_for(name, "small")}
    for direction, passes in ("forward", 3.25), ("backward", 7.3):
        assert found["bnjax", None, direction]["passes"] <= passes
        for variant in None, "masked":
            entry = found["bnjax", variant, direction]
            assert entry["conditionals"] == 0, entry
            assert entry["passes"] < found["Flax Linen, two reads", None, direction]["passes"], entry


@pytest.fixture(scope="module")
def on_8_gpus():
    entries = [e for e in compiled.compiled_for("h100-8", "synchronized") if e["library"] == "bnjax"]
    return {(e["mapping"], e["direction"]): e for e in entries}


@pytest.mark.slow
@needs_cuda_compiler
def test_on_8_gpus_no_host_waits(on_8_gpus):
    for (_, direction), entry in on_8_gpus.items():
        assert entry["passes"] <= (3.1 if direction == "forward" else 7.2), entry
        assert entry["conditionals"] == 0, entry
        assert len(entry["collectives"]) == (1 if direction == "forward" else 2), entry
    assert [compiled.merged(on_8_gpus["jit", direction]) for direction in ("forward", "backward")] == [
        2 * SUMS,
        3 * SUMS,
    ]


@pytest.mark.slow
@needs_cuda_compiler
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_bytes_merged_over_a_named_axis_on_8_gpus_are_few(direction, on_8_gpus):
    # Forward they are sums in float64.
    assert compiled.merged(on_8_gpus["shard_map", direction]) == 2 * SUMS + (SUMS if direction == "backward" else 0)


PROGRAM = """HloModule m

%cheap (p: (f32[8])) -> f32[8] {
  ROOT %p.1 = f32[8]{0} parameter(0)
}

%dear (p: f32[8]) -> f32[8] {
  %p.2 = f32[8]{0} parameter(0)
  ROOT %twice = f32[8]{0} add(%p.2, %p.2)
}

ENTRY %main (x: f32[4,8], which: pred[]) -> f32[8] {
  %x = f32[4,8]{1,0} parameter(0)
  %which = pred[] parameter(1)
  %near = f32[4,8]{1,0:S(1)} negate(%x)
  %sum = f32[8]{0} fusion(%x, %near), kind=kInput, calls=%f
  %all = f32[8]{0} all-reduce(%sum), to_apply=%add
  ROOT %out = f32[8]{0} conditional(%which, %all, %all), true_computation=%dear, false_computation=%cheap
}
"""


def test_bytes_and_collectives_are_those_of_the_text():
    program = Program(PROGRAM)
    # negate reads x, 128 bytes, and writes on the chip; the fusion reads x and writes 32; the all-reduce reads and
    # writes 32 each; the cheap branch moves nothing.
    assert program.bytes == 128 + (128 + 32) + (32 + 32)
    assert [(c.kind, c.bytes) for c in program.collectives] == [("all-reduce", 32)]
    assert program.conditionals == 1


CALLS = """HloModule m

%quiet (p: f32[8]) -> f32[8] {
  ROOT %p.1 = f32[8]{0:S(1)} parameter(0)
}

%merging (p: f32[8]) -> f32[8] {
  %p.2 = f32[8]{0:S(1)} parameter(0)
  ROOT %near = f32[8]{0:S(1)} all-reduce(%p.2), to_apply=%add
}

%body (p: f32[8]) -> f32[8] {
  %p.3 = f32[8]{0:S(1)} parameter(0)
  %start = (f32[8]{0}, f32[16]{0}) all-gather-start(%p.3), dimensions={0}
  %done = f32[16]{0} all-gather-done(%start)
  ROOT %chosen = f32[8]{0:S(1)} conditional(%which, %p.3, %p.3), branch_computations={%merging, %quiet}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:S(1)} parameter(0)
  ROOT %out = f32[8]{0:S(1)} while(%x), condition=%more, body=%body
}
"""


def test_what_is_called_counts_once_and_of_a_conditional_the_branch_without_collectives():
    program = Program(CALLS)
    assert [(c.kind, c.bytes) for c in program.collectives] == [("all-gather", 64)]
    assert program.conditionals == 1


SLICED = """HloModule m

%f (p.0: f32[8,4], p.1: f32[8,4], p.2: f32[4]) -> f32[4] {
  %p.0 = f32[8,4]{1,0} parameter(0)
  %p.1 = f32[8,4]{1,0} parameter(1)
  %p.2 = f32[4]{0} parameter(2)
  %one = f32[1,4]{1,0} slice(%p.0), slice={[0:1], [0:4]}
  %two = f32[2,4]{1,0} slice(%p.0), slice={[0:2], [0:4]}
  %three = f32[2,4]{1,0} slice(%p.1), slice={[0:2], [0:4]}
  %whole = f32[4]{0} reduce(%p.1), dimensions={0}
  ROOT %out = f32[4]{0} add(%p.2, %whole)
}

ENTRY %main (x: f32[8,4], y: f32[8,4], z: f32[4]) -> f32[4] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = f32[8,4]{1,0} parameter(1)
  %z = f32[4]{0} parameter(2)
  ROOT %out = f32[4]{0} fusion(%x, %y, %z), kind=kInput, calls=%f
}
"""


def test_of_an_operand_that_a_fusion_slices_the_slices_are_read():
    # One and two rows of x, of 16 bytes each; all of y, which is used in another way too; z, and the result.
    assert Program(SLICED).bytes == 16 + 32 + 128 + 16 + 16


def test_compiled_rejects_an_unknown_target_by_name(capsys):
    assert main.main(["compiled", "--targets", "v5e", "tpu9"]) == 2
    assert "tpu9" in (said := capsys.readouterr().err)
    assert "v5e, v6e, tpu7x, v5e-64, v5e-256, h100, h100-8" in said


def test_compiled_leaves_out_by_name_what_has_no_compiler(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)
    assert main.main(["compiled", "--targets", "v5e", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "left out: v5e, whose compiler, libtpu, is not installed" in out
    assert "extra `compiled`" in err


def test_a_program_that_its_compiler_cannot_print_is_left_out_by_name(tmp_path, capsys):
    facts = {"target": "tpu7x", "library": "bnjax", "variant": "conditional", "direction": "backward"}
    entries = [{**facts, "unread": "INTERNAL: no text"}, {**facts, "target": "v5e", "passes": 7.0}]
    (tmp_path / "programs.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert compiled.read(tmp_path) == entries[1:]
    assert capsys.readouterr().out == "left out: tpu7x, conditional, backward: INTERNAL: no text\n"


def test_counts_come_from_a_module_that_python_finds(monkeypatch):
    asked = []
    monkeypatch.setattr(compilers, "lines", lambda target, *arguments: asked.extend(arguments) or [])
    assert list(compiled.compiled_for("v5e", "layer")) == []
    assert importlib.util.find_spec(asked[asked.index("-m") + 1]) is not None
