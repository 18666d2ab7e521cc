"""The program's softmax in plain arithmetic, against the obvious one in double precision."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("jax")

import jax

from aero.private import softmax

# Compiled whole: one by one, the operations of every shape take ten times as long to compile.
causal_softmax, row_maximum = jax.jit(softmax.causal_softmax), jax.jit(softmax.row_maximum)


def exact(scores: np.ndarray) -> np.ndarray:
    heads, queries, keys = scores.shape
    result = np.zeros(scores.shape)
    for head in range(heads):
        for row in range(queries):
            seen = scores[head, row, : keys - queries + row + 1].astype(np.float64)
            weights = np.exp(seen - seen.max())
            result[head, row, : len(seen)] = weights / weights.sum()
    return result


SHAPES = [(1, 1), (2, 2), (3, 3), (7, 7), (8, 8), (16, 16), (33, 33), (1, 5), (1, 128), (5, 21), (64, 64)]


@pytest.mark.parametrize(("queries", "keys"), SHAPES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_it_is_a_causal_softmax(queries: int, keys: int, scale: float) -> None:
    scores = (scale * np.random.default_rng(queries * keys).normal(size=(3, queries, keys))).astype(np.float32)
    found = np.asarray(causal_softmax(scores))
    np.testing.assert_allclose(found, exact(scores), atol=1e-3)
    outside = np.triu(np.ones((queries, keys), dtype=bool), keys - queries + 1)
    assert (found[:, outside] == 0).all()


@pytest.mark.parametrize("level", [-1e4, -300.0, 300.0, 1e4])
def test_no_level_of_the_scores_is_special(level: float) -> None:
    scores = (level + np.random.default_rng(0).normal(size=(2, 9, 9))).astype(np.float32)
    np.testing.assert_allclose(np.asarray(causal_softmax(scores)), exact(scores), atol=1e-3)


def test_what_lies_beyond_the_diagonal_has_no_effect() -> None:
    scores = np.random.default_rng(0).normal(size=(2, 12, 12)).astype(np.float32)
    other = scores + np.triu(np.full((12, 12), 1e3, np.float32), 1)
    np.testing.assert_array_equal(causal_softmax(scores), causal_softmax(other))


def test_a_saturated_row_is_one_hot() -> None:
    scores = np.zeros((1, 4, 4), np.float32)
    scores[0, 3] = [0.0, 90.0, 0.0, -90.0]
    np.testing.assert_allclose(np.asarray(causal_softmax(scores))[0, 3], [0, 1, 0, 0], atol=1e-5)


@pytest.mark.parametrize(("queries", "keys"), SHAPES)
def test_the_maximum_is_the_rows_own(queries: int, keys: int) -> None:
    scores = np.random.default_rng(1).normal(size=(2, queries, keys)).astype(np.float32)
    found = np.asarray(row_maximum(scores))[:, :, 0]
    for row in range(queries):
        np.testing.assert_array_equal(found[:, row], scores[:, row, : keys - queries + row + 1].max(1))


def test_the_exponent_keeps_its_bound() -> None:
    x = np.linspace(-60, 0, 20001).astype(np.float32)
    assert np.abs(np.asarray(softmax.exponential(x)) - np.exp(x.astype(np.float64))).max() < 1e-4


def test_packing_leaves_nearly_half_of_the_square_out() -> None:
    triangle = softmax.Triangle(128, 128)
    assert triangle.packed == 8448
    square = np.arange(2 * 128 * 128, dtype=np.float32).reshape(2, 128, 128)
    inside = np.asarray(triangle.mask())
    back = np.asarray(triangle.unpack(triangle.pack(square)))
    np.testing.assert_array_equal(back[:, inside], square[:, inside])
