"""Samplers as pytrees: one class, one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.types import leaves32, pytree, static


@pytree
class A:
    eta: float = 0.0
    order: int = static(default=2)


@pytree
class B:
    eta: float = 0.0
    order: int = static(default=2)


def test_equal_fields_are_not_equal_classes():
    assert jax.tree.structure(A()) != jax.tree.structure(B())
    run = jax.jit(lambda node: 1.0 if isinstance(node, A) else 2.0)
    assert run(A()) == 1 and run(B()) == 2


def test_static_fields_are_part_of_the_structure():
    assert jax.tree.structure(A(order=1)) != jax.tree.structure(A(order=2))
    assert jax.tree.structure(A(eta=1.0)) == jax.tree.structure(A(eta=2.0))
    assert jax.tree.leaves(A(eta=0.25)) == [0.25]


def test_nodes_are_frozen_and_compare_by_value():
    assert A(0.5) == A(0.5) != A(0.6)
    assert A(0.5) != B(0.5)
    with pytest.raises(AttributeError):
        A().eta = 1.0


def test_one_program_for_one_and_one_point_nought():
    traces = []

    @jax.jit
    def run(node):
        traces.append(1)
        return node.eta * node.order

    for eta in (1, 1.0, np.float32(1), np.float64(1), np.int64(1)):
        assert run(leaves32(A(eta))) == 2
    assert len(traces) == 1


def test_leaves32_leaves_arrays_of_other_kinds_alone():
    key = jax.random.key(0)
    tree = leaves32({"f": np.zeros(2), "i": np.zeros(2, np.int32), "k": key, "n": None})
    assert tree["f"].dtype == np.float32 and tree["i"].dtype == np.int32
    assert tree["k"] is key and tree["n"] is None


def test_fields_may_be_mapped_over():
    out = jax.vmap(lambda node: node.eta * 2)(A(jnp.arange(3.0)))
    np.testing.assert_array_equal(out, [0, 2, 4])


def test_paths_name_the_fields():
    ((path, _),) = jax.tree_util.tree_leaves_with_path(A())
    assert jax.tree_util.keystr(path) == ".eta"
