"""Every operator's private result against plaintext within its stated bound, under every protocol.

The engine runs in this process, all parties in threads, with the settings of the real parties. Inputs are as large as
trained models make them: small random ones hide errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, get_args

import numpy as np
import pytest

pytest.importorskip("spu")

import spu.utils.simulation as simulation
from tests.eliminate.test_fold import small

from aero.architecture import architecture, architecture_names
from aero.config import KERNEL_SINK, POWER_FLOOR, GeluForm
from aero.eliminate.fold import fold
from aero.model.decoder import Decoder
from aero.model.norm import set_static_blend
from aero.private import attention, exponent, nonlinear, program, ring, softmax
from aero.private.dealer.process import DealerProcess
from aero.private.engine import FRACTION_BITS, runtime_config
from aero.private.protocols import PROTOCOLS, protocol_named
from aero.private.reciprocal import widest_uncut

UNIT = 2.0**-FRACTION_BITS
Array = np.ndarray


@lru_cache
def parties(protocol: str, fraction_bits: int = FRACTION_BITS) -> Any:
    chosen = protocol_named(protocol)
    access = dealer().access if chosen.dealer else None
    return simulation.Simulator(len(chosen.roles), runtime_config(chosen, 1, access, fraction_bits))


@lru_cache
def dealer() -> DealerProcess:
    return DealerProcess()


@pytest.fixture(autouse=True, scope="module")
def dealer_ends() -> Iterator[None]:
    yield
    if dealer.cache_info().currsize:
        dealer().stop()


def draw(*shape: int, scale: float = 1.0, seed: int = 0) -> Array:
    return (scale * np.random.default_rng((seed, *shape)).normal(size=shape)).astype(np.float32)


def heads(x: Array, group: int = 1) -> Array:
    return np.repeat(x.astype(np.float64), group, axis=0)


def softmax_rows(scores: Array) -> Array:
    queries, keys = scores.shape[1:]
    seen = np.tril(np.ones((queries, keys), dtype=bool), keys - queries)
    shown = np.where(seen, scores.astype(np.float64), -np.inf)
    weights = np.exp(shown - shown.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def tanh_gelu(x: Array) -> Array:
    wide = x.astype(np.float64)
    return wide / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))


def erf_gelu(x: Array) -> Array:
    return np.array([each / 2 * (1 + math.erf(each / math.sqrt(2))) for each in x.astype(np.float64)])


def layernorm(x: Array, eps: Array) -> Array:
    wide = x.astype(np.float64)
    return (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + eps)


def rms(x: Array, eps: Array) -> Array:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps)


def row_maximum(scores: Array) -> Array:
    queries, keys = scores.shape[1:]
    seen = np.tril(np.ones((queries, keys), dtype=bool), keys - queries)
    return np.where(seen, scores, -np.inf).max(-1, keepdims=True)


def rotated(q: Array, k: Array) -> Array:
    cosine, sine = np.cos(ANGLES), np.sin(ANGLES)
    half = ANGLES.shape[1]

    def turn(x: Array) -> Array:
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return np.concatenate([first * cosine - second * sine, first * sine + second * cosine, rest], axis=-1)

    return np.concatenate([turn(q), turn(k)])


def squared(x: Array) -> Array:
    return np.square(x.astype(np.float64)).sum(-1)


def distances(q: Array, k: Array) -> Array:
    apart = q.astype(np.float64)[:, :, None] - heads(k, len(q) // len(k))[:, None]
    return np.square(apart).sum(-1)


def one_hot(tokens: list[int], size: int) -> Array:
    return np.eye(size, dtype=np.float32)[tokens]


ANGLES = np.arange(6)[:, None] * np.array([1.0, 0.1])
ROTATION = tuple(tuple(map(tuple, table.tolist())) for table in (np.cos(ANGLES), np.sin(ANGLES)))
LINE = np.concatenate([np.linspace(-8, 8, 401), [-200.0, -40.0, 40.0, 200.0]]).astype(np.float32)
SIZES = np.concatenate([draw(4, 48, scale=scale) for scale in (0.3, 3.0, 30.0)])
SCORES = draw(2, 12, 12, scale=4.0)
SATURATED = draw(2, 12, 12, scale=150.0)
CACHED = draw(2, 1, 20, scale=4.0)
PEAK = row_maximum(SCORES).astype(np.float32)
WEIGHTS = np.exp(np.minimum(SCORES - PEAK, 0)).astype(np.float32) * np.tril(np.ones((12, 12), np.float32))


TRIANGLE = softmax.Triangle(6, 9)
WIDE = np.linspace(-7.5, 7.5, 288, dtype=np.float32).reshape(2, 12, 12)
OFFSET = np.array([0.5, -0.5], np.float32)


def in_blocks(scores: Array) -> Array:
    """Zeros where no block of the triangle reaches."""
    queries, keys = scores.shape[1:]
    triangle = softmax.Triangle(queries, keys)
    reached = np.asarray(triangle.unpack(np.ones((1, triangle.packed), np.float32)))
    return scores * reached


def packed(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of packed scores as one of a square of them."""

    def of_square(scores: Any, *others: Any) -> Any:
        triangle = softmax.Triangle(*scores.shape[1:])
        return function(triangle.pack(scores), *others, triangle=triangle)

    of_square.func = function  # type: ignore[attr-defined]
    return of_square


def powers(power: int, scores: Array) -> Array:
    raised = (scores.astype(np.float64) + OFFSET[:, None, None]) ** power + POWER_FLOOR
    return np.tril(raised) * softmax.POWER_WEIGHT[power]


@dataclass(frozen=True)
class Case:
    """function: what the parties compute on ``inputs``; exact: what it should be; bound: on the absolute error.

    Where a docstring states a relative error, the bound is that share of the largest exact value.
    """

    function: Callable[..., Any]
    inputs: tuple[Array, ...]
    exact: Array
    bound: float


CASES = {
    "embedding": Case(
        partial(program._embed, past=3, batch=1),
        (one_hot([5, 0, 39], 40), draw(40, 16), draw(8, 16, seed=1)),
        draw(40, 16)[[5, 0, 39]] + draw(8, 16, seed=1)[3:6],
        4 * UNIT,
    ),
    "projection": Case(
        partial(program._affine, most=None),
        (draw(6, 64, scale=30), draw(64, 20, scale=0.1), draw(20)),
        draw(6, 64, scale=30).astype(np.float64) @ draw(64, 20, scale=0.1) + draw(20),
        2e-3,
    ),
    "vocabulary": Case(
        partial(program._vocabulary, most=None),
        (draw(1, 64), draw(64, 90).T.copy()),
        draw(1, 64).astype(np.float64) @ draw(64, 90),
        2e-4,
    ),
    "residual": Case(program._add3, (SIZES, SIZES, SIZES), 3.0 * SIZES, 4 * UNIT),
    "gate product": Case(
        program._multiply,
        (draw(6, 64, scale=30), draw(6, 64, scale=4, seed=1)),
        draw(6, 64, scale=30).astype(np.float64) * draw(6, 64, scale=4, seed=1),
        2e-4,
    ),
    "rotary": Case(
        lambda q, k: np_concatenate(attention.rotate(q, k, rotation=ROTATION)),
        (draw(2, 6, 6, scale=5), draw(1, 6, 6, scale=5)),
        rotated(draw(2, 6, 6, scale=5), draw(1, 6, 6, scale=5)),
        1e-4,
    ),
    "temperature": Case(
        partial(attention.temper, first=2),
        (draw(2, 5, 8, scale=5), np.abs(draw(2, 9, scale=3))),
        draw(2, 5, 8, scale=5) * np.abs(draw(2, 9, scale=3))[:, 2:7, None],
        1e-4,
    ),
    "scores": Case(
        lambda q, k: TRIANGLE.unpack(attention.scores(q, k)),
        (draw(4, 6, 16, scale=3), draw(2, 9, 16, scale=3)),
        in_blocks(heads(draw(4, 6, 16, scale=3)) @ heads(draw(2, 9, 16, scale=3), 2).transpose(0, 2, 1)),
        2e-4,
    ),
    "scores, heads together": Case(
        lambda q, k: TRIANGLE.unpack(attention.scores(q, k, together=2)),
        (draw(3, 6, 16, scale=3), draw(3, 9, 16, scale=3)),
        in_blocks(heads(draw(3, 6, 16, scale=3)) @ heads(draw(3, 9, 16, scale=3)).transpose(0, 2, 1)),
        2e-4,
    ),
    "scores, heads crossed": Case(
        lambda q, k: TRIANGLE.unpack(attention.scores(q, k, together=2, crossed=True)),
        (draw(3, 6, 16, scale=3), draw(3, 9, 16, scale=3)),
        in_blocks(heads(draw(3, 6, 16, scale=3)) @ heads(draw(3, 9, 16, scale=3)).transpose(0, 2, 1)),
        2e-4,
    ),
    "values, heads crossed": Case(
        partial(attention.values, kv_heads=3, together=2, crossed=True),
        (np.abs(draw(3, 6, 9)), draw(4, 9, 16, scale=10)),
        heads(np.abs(draw(3, 6, 9))) @ heads(draw(4, 9, 16, scale=10)[:3]),
        2e-4,
    ),
    "values, heads together": Case(
        partial(attention.values, kv_heads=3, together=2),
        (np.abs(draw(3, 6, 9)), draw(4, 9, 16, scale=10)),
        heads(np.abs(draw(3, 6, 9))) @ heads(draw(4, 9, 16, scale=10)[:3]),
        2e-4,
    ),
    "uniform heads": Case(
        partial(attention.averages, first=1, queries=6, group=2),
        (draw(3, 9, 16, scale=10),),
        np.repeat(heads(draw(3, 9, 16, scale=10)[1:]).cumsum(1)[:, 3:] / np.arange(4, 10)[:, None], 2, axis=0),
        1e-4,
    ),
    "values": Case(
        partial(attention.values, kv_heads=2),
        (np.abs(draw(4, 6, 9)), draw(2, 9, 16, scale=10)),
        heads(np.abs(draw(4, 6, 9))) @ heads(draw(2, 9, 16, scale=10), 2),
        2e-4,
    ),
    "softmax maximum": Case(softmax.row_maximum, (SCORES,), row_maximum(SCORES), 4 * UNIT),
    "softmax maximum, saturated": Case(softmax.row_maximum, (SATURATED,), row_maximum(SATURATED), 4 * UNIT),
    "softmax exponent": Case(packed(softmax.attention_weights), (SCORES, PEAK), WEIGHTS, 3e-4),
    "softmax reciprocal": Case(
        softmax.row_reciprocal, (WEIGHTS,), 1 / WEIGHTS.sum(-1, keepdims=True, dtype=np.float64), 1e-4
    ),
    "softmax normalise": Case(
        attention.normalise,
        (draw(2, 6, 8, scale=30), np.abs(draw(2, 6, 1))),
        (draw(2, 6, 8, scale=30) * np.abs(draw(2, 6, 1))).transpose(1, 0, 2).reshape(6, -1),
        1e-4,
    ),
    "softmax": Case(softmax.causal_softmax, (SCORES,), softmax_rows(SCORES), 5e-4),
    "softmax, saturated": Case(softmax.causal_softmax, (SATURATED,), softmax_rows(SATURATED), 5e-4),
    "softmax, one query": Case(softmax.causal_softmax, (CACHED,), softmax_rows(CACHED), 5e-4),
    "power, squared": Case(
        packed(partial(softmax.power_weights, power=2, bound=8.0)),
        (np.float32(softmax.power_scale(2, 8.0) * WIDE), OFFSET * np.float32(softmax.power_scale(2, 8.0))),
        powers(2, WIDE),
        1e-4,
    ),
    "power, to the fourth": Case(
        packed(partial(softmax.power_weights, power=4, bound=8.0)),
        (np.float32(softmax.power_scale(4, 8.0) * WIDE), OFFSET * np.float32(softmax.power_scale(4, 8.0))),
        powers(4, WIDE),
        4e-3,
    ),
    "power, squared, wide": Case(
        packed(partial(softmax.power_weights, power=2, bound=32.0)),
        (np.float32(softmax.power_scale(2, 32.0) * WIDE), OFFSET * np.float32(softmax.power_scale(2, 32.0))),
        powers(2, WIDE) / 2,  # see POWER_FALL: half a bit each time that the bound doubles
        1e-4,
    ),
    "kernel, squared norms": Case(
        lambda q, k: np_concatenate([ring.truncate(each).reshape(-1) for each in attention.squares(q, k)]),
        (draw(4, 6, 16, scale=3), draw(2, 9, 16, scale=3)),
        np.concatenate([squared(draw(heads_, rows, 16, scale=3)).ravel() for heads_, rows in ((4, 6), (2, 9))]),
        2e-4,
    ),
    "kernel, scores": Case(
        lambda q, k: TRIANGLE.unpack(attention.distances(q, k, *attention.squares(q, k))),
        (draw(4, 6, 16, scale=3), draw(2, 9, 16, scale=3)),
        in_blocks(-distances(draw(4, 6, 16, scale=3), draw(2, 9, 16, scale=3))),
        4e-4,
    ),
    "kernel, scores at once": Case(
        lambda q, k: softmax.Triangle(6, 6).unpack(attention.distances_at_once(q, k, together=2)[0]),
        (draw(6, 6, 16, scale=3), draw(3, 6, 16, scale=3)),
        np.tril(-distances(draw(6, 6, 16, scale=3), draw(3, 6, 16, scale=3))),
        4e-4,
    ),
    "kernel, far from 0 and near each other": Case(
        lambda q, k: TRIANGLE.unpack(attention.distances(q, k, *attention.squares(q, k))),
        (draw(4, 6, 16) + 200, draw(2, 9, 16) + 200),
        in_blocks(-distances(draw(4, 6, 16) + 200, draw(2, 9, 16) + 200)),
        1e-3,
    ),
    "shaped attention": Case(
        attention.shaped,
        (draw(2, 6, 8, scale=30), np.abs(draw(2, 6, 1)), draw(2, 6, 8, scale=9), draw(2, 6, 8, scale=5)),
        (draw(2, 6, 8, scale=30) * np.abs(draw(2, 6, 1)) + draw(2, 6, 8, scale=9) + draw(2, 6, 8, scale=5))
        .transpose(1, 0, 2)
        .reshape(6, -1),
        1e-4,
    ),
    "layernorm": Case(nonlinear.layernorm, (SIZES, np.float32(1e-3)), layernorm(SIZES, np.float32(1e-3)), 3e-3),
    "rmsnorm": Case(nonlinear.rms, (SIZES, np.float32(1e-3)), rms(SIZES, np.float32(1e-3)), 3e-3),
    "gelu": Case(partial(nonlinear.gelu_by_polynomial, erf=True), (LINE,), erf_gelu(LINE), 1e-3),
    "gelu_tanh": Case(partial(nonlinear.gelu_by_polynomial, erf=False), (LINE,), tanh_gelu(LINE), 1e-3),
    "gelu by the engine's tanh": Case(nonlinear.gelu_by_tanh, (LINE[:401],), tanh_gelu(LINE[:401]), 2e-2),
    "relu": Case(nonlinear.relu, (LINE,), np.maximum(LINE, 0), 2 * UNIT),
    "leaky": Case(nonlinear.leaky, (LINE, np.float32(0.3)), np.where(LINE >= 0, LINE, 0.3 * LINE), 3e-4),
    "square": Case(nonlinear.square, (LINE,), LINE.astype(np.float64) ** 2, 4e-4),
    "silu": Case(nonlinear.silu, (LINE[:401],), LINE[:401] / (1 + np.exp(-LINE[:401].astype(np.float64))), 1e-2),
}


for form in exponent.FORMS:
    logits = np.linspace(-form.bound, form.bound, 288).reshape(2, 12, 12)
    exact = np.exp(logits) * exponent.WEIGHT
    CASES[f"softmax exponent, bounded by {form.bound:g}"] = Case(
        packed(partial(softmax.bounded_weights, form=form)),
        (np.float32(form.scale * logits),),
        np.tril(exact),
        1.2 * form.error * exact.max() + 4 * UNIT,
    )
    sums = np.tril(np.floor(exact[:, ::-1, ::-1] / UNIT) * UNIT)  # what fixed point holds
    CASES[f"softmax reciprocal, bounded by {form.bound:g}"] = Case(
        partial(softmax.bounded_reciprocal, ends=softmax.bounded_ends(form)),
        (np.float32(sums),),
        1 / sums.sum(-1, keepdims=True),
        1e-4 / sums.sum(-1).min() + 10 * UNIT,
    )


def kernel_sums(weights: Array, form: exponent.Exponential) -> Case:
    held = np.floor(form.weight * weights / UNIT) * UNIT  # what fixed point holds
    exact = 1 / (form.weight * KERNEL_SINK + held.sum(-1, keepdims=True))
    return Case(
        partial(softmax.kernel_reciprocal, form=form), (np.float32(held),), exact, 1e-4 * exact.max() + 10 * UNIT
    )


for bound in (*(form.bound for form in exponent.KERNEL_FORMS), 600.0):
    form = exponent.kernel_exponential(bound)
    far = np.concatenate([np.linspace(-bound, 0, 144), np.linspace(-8, 0, 144)]).reshape(2, 12, 12)
    CASES[f"kernel, bounded by {bound:g}"] = Case(
        packed(partial(softmax.bounded_weights, form=form)),
        (np.float32(form.scale * far),),
        np.tril(form.weight * np.exp(far)),
        form.weight * (form.error + form.bound * UNIT) + UNIT,
    )
    CASES[f"kernel's reciprocal, bounded by {bound:g}"] = kernel_sums(np.tril(np.exp(far[::-1])), form)

CASES["kernel's reciprocal, few keys"] = kernel_sums(
    np.tril(np.abs(draw(2, 5, 5)).clip(0, 1)), exponent.kernel_exponential(20.0)
)
full = np.tril(np.ones((1, 128, 128)))
CASES["kernel's reciprocal, all keys at no distance"] = kernel_sums(full, exponent.kernel_exponential(20.0))


def np_concatenate(parts: tuple[Any, ...]) -> Any:
    import jax.numpy as jnp

    return jnp.concatenate(parts)


IN_CHEETAH = ("projection", "layernorm", "gelu", "softmax")
"""A product, a root, a polynomial and a maximum. Homomorphic encryption takes seconds a case: the others are slow."""


@pytest.mark.parametrize(
    ("operator", "protocol"),
    [
        pytest.param(
            operator,
            protocol,
            marks=[pytest.mark.slow] if protocol == "cheetah" and operator not in IN_CHEETAH else [],
        )
        for operator in CASES
        for protocol in PROTOCOLS
    ],
)
def test_an_operator_keeps_its_bound(operator: str, protocol: str) -> None:
    case = CASES[operator]
    private = np.asarray(simulation.sim_jax(parties(protocol), case.function)(*case.inputs), np.float64)
    assert private.shape == case.exact.shape
    assert np.abs(private - case.exact).max() < case.bound


@pytest.mark.parametrize("bits", [20, 22])
@pytest.mark.parametrize("protocol", ["semi2k-insecure", "aby3"])
def test_a_kernels_sums_need_no_comparison_with_fine_bits(protocol: str, bits: int) -> None:
    """One over sums of 0 to 128 weights, relative: with 20 bits the range is cut, with 22 it is not."""
    form = exponent.kernel_exponential(128.0)
    weights = np.tril(np.linspace(0.0, 1.0, 128)[:, None] ** 4 * np.ones((1, 128, 128)))
    held = np.floor(form.weight * weights * 2.0**bits) * 2.0**-bits
    exact = 1 / (form.weight + held.sum(-1, keepdims=True))
    with ring.computing_with(bits):
        low = form.weight * (1 - 128 * form.error)
        assert (widest_uncut(low) > 129) == (bits == 22)
        inverse = partial(softmax.kernel_reciprocal, form=form)
        private = np.asarray(simulation.sim_jax(parties(protocol, bits), inverse)(np.float32(held)), np.float64)
    assert np.abs(private / exact - 1).max() < 1e-4


def test_every_kind_of_step_is_covered() -> None:
    """A new operator of the program has to get its bound here; only those that move numbers need none."""
    assert set(IN_CHEETAH) <= set(CASES)
    movers = {program._enter, program._last, program._halves, attention.split, attention.keep, attention.extend}
    movers |= {attention.side_by_side}
    covered = {underlying(case.function) for case in CASES.values()} | {
        program._add,
        program._product,
    }  # as exact as the sum of three
    covered |= {attention.rotate, attention.scores, softmax.packed_maximum}  # in cases of another shape
    covered |= {attention.squares, attention.distances, attention.distances_at_once}
    for shape in ("gpt2-tiny", "llama-tiny"):
        for row in architecture_names():
            decoder = Decoder(small(architecture(row, shape)))
            set_static_blend(decoder, 1.0)
            model = fold(decoder)
            for gelu in get_args(GeluForm):
                steps = program.Program(model.config, model.rotation, one_hot=True, gelu=gelu)
                for step in [*steps.forward(0, 4), *steps.forward(4, 1)]:
                    assert underlying(step.function) in covered | movers, step.operator


def underlying(function: Callable[..., Any]) -> Callable[..., Any]:
    while hasattr(function, "func"):
        function = function.func
    return function
