"""Programs as they are read: what makes and what uses a value, inlined functions, bodies of loops, marks."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from bnjax.traced.program import mark, read

X = np.ones((2, 3), np.float32)


def kinds(program):
    return [operation.kind for operation in program.operations]


def test_read_inlines_functions_that_are_called_once():
    @jax.custom_jvp
    def double(x):
        return x * 2

    double.defjvp(lambda primals, tangents: (double(*primals), tangents[0] * 2))

    @jax.jit
    def inner(x):
        return jnp.sin(jax.checkpoint(double)(x))

    program = read(lambda x: inner(x) + 1, X)
    assert kinds(program) == ["mul", "sin", "add"]
    mul, sin, add = program.operations
    assert mul.operands[0] is program.arguments[0]
    assert sin.operands == mul.results
    assert add.results == program.results
    assert sin.results[0].maker is sin
    assert sin.results[0].users == [add]
    assert sin.results[0].returned_by == {"inner"}
    assert [user.kind for user in add.results[0].users] == ["the model's result"]
    assert (add.results[0].shape, add.results[0].dtype) == ((2, 3), np.float32)


def test_read_keeps_loops_and_branches_as_bodies():
    program = read(lambda x, y: jax.lax.scan(lambda c, row: (jnp.sin(c + row), None), y, x)[0], X, X[0])
    (scan,) = program.operations
    (body,) = scan.bodies
    assert kinds(body) == ["add", "sin"]
    assert [argument.outer for argument in body.arguments] == scan.operands
    assert [user.kind for user in body.results[0].users] == ["the result of a loop"]
    program = read(lambda x: jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x), X)
    cond = program.operations[-1]
    assert sorted(kind for body in cond.bodies for kind in kinds(body)) == ["cos", "sin"]
    assert {body.arguments[0].outer for body in cond.bodies} == {program.arguments[0]}


def test_read_finds_only_the_marks_of_layers_wherever_they_are():
    def function(x):
        x = mark("in", "a/b", checkpoint_name(x, "other"))
        return jax.lax.fori_loop(0, 2, lambda i, x: mark("out", "c", x + i), x)

    assert [(found.role, found.path) for found in read(function, X).marks()] == [("in", "a/b"), ("out", "c")]


def test_read_leaves_arguments_that_are_no_arrays_as_they_are():
    shape = jax.ShapeDtypeStruct((2, 3), np.float32)
    program = read(lambda x, options: (x * 2 if options["train"] else x, "no array"), shape, {"train": True})
    assert kinds(program) == ["mul"]
    assert len(program.arguments) == len(program.results) == 1
