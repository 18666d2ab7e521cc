"""The emulated ring and its functions against integers of any size, against the engine itself, and against float64."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.eliminate.test_fold import disturbed, small

from aero.architecture import architecture
from aero.eliminate import plain
from aero.eliminate.fold import fold
from aero.private import nonlinear, program, softmax
from aero.private.emulator.emulate import (
    Emulator,
    Settings,
    emulate,
    negative_log_likelihood,
    truncation_of,
)
from aero.private.emulator.interpret import evaluate
from aero.private.emulator.machine import Machine
from aero.private.emulator.ring import Ring, exact_matmul, limb_matmul
from aero.private.emulator.values import Secret
from aero.private.precision import fraction_bits_of
from aero.private.protocols import protocol_named
from aero.private.ring import FRACTION_BITS, computing_with, nearest, scaled, truncate

UNIT = 2.0**-FRACTION_BITS
ROWS = ["static+bilinear", "SM+LN+G", "SM+ScFuFFN"]
BOUNDED = ["static+bilinear+bounded", "static+bilinear+power", "static+bilinear+kernel"]
WIDE = st.integers(-(2**63), 2**63 - 1)


def over(ring: Ring, function: Any, *inputs: Any) -> np.ndarray:
    arrays = [np.asarray(each, np.float32) for each in inputs]
    (found,) = evaluate(ring, jax.make_jaxpr(function)(*arrays), [Secret(ring.encode(each)) for each in arrays])
    assert isinstance(found, Secret)
    return ring.decode(found.data).numpy()


def draw(*shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (scale * np.random.default_rng((seed, *shape)).normal(size=shape)).astype(np.float32)


def modulo(value: int, bits: int) -> int:
    return (value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


@pytest.mark.parametrize("matmul", [exact_matmul, limb_matmul])
@settings(max_examples=60, deadline=None)
@given(st.lists(WIDE, min_size=6, max_size=6), st.lists(WIDE, min_size=6, max_size=6), st.integers(0, 60))
def test_matrix_products_are_exact_modulo_the_ring(matmul: Any, first: list[int], second: list[int], less: int) -> None:
    first = [each >> less for each in first]
    x, y = torch.tensor(first).reshape(2, 3), torch.tensor(second).reshape(3, 2)
    right = [
        [modulo(sum(first[3 * i + k] * second[2 * k + j] for k in range(3)), 64) for j in range(2)] for i in range(2)
    ]
    assert matmul(x, y).tolist() == right


@pytest.mark.parametrize("bits", [32, 64])
@settings(max_examples=60, deadline=None)
@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1))
def test_elements_wrap_around_the_ring(bits: int, x: int, y: int) -> None:
    ring = Ring(bits, 8)
    assert int(ring.add(torch.tensor(x), torch.tensor(y))) == modulo(x + y, bits)
    assert int(ring.wrap(torch.tensor(x) * torch.tensor(y))) == modulo(x * y, bits)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize(("truncation", "mean"), [("probabilistic", 0.0), ("low", -0.5)])
def test_truncation_is_off_by_less_than_two_units_and_known_on_average(bits: int, truncation: Any, mean: float) -> None:
    ring = Ring(bits, 10, truncation=truncation, seed=1)
    value = 300 * 2**10 + 357
    for sign in (1, -1):
        many = torch.full((200_000,), sign * value)
        for found in (ring.truncate(many, 10), ring._truncate_shares(many, 10)):
            error = found.double() - sign * value / 2**10
            assert float(error.abs().max()) < 1.7
            assert abs(float(error.mean()) - mean - 2**-10) < 4 * 0.75 / math.sqrt(200_000)


def test_local_truncation_fails_as_often_as_its_operand_is_large() -> None:
    ring = Ring(32, 8, truncation="local", seed=2)
    value = 2**27
    found = ring.truncate(torch.full((100_000,), value), 8)
    share = float(((found - value / 256).abs() > 2).double().mean())
    assert share == pytest.approx(value / 2**32, rel=0.1)


def test_what_is_entered_is_the_nearest_number_that_fixed_point_has() -> None:
    values = np.random.default_rng(0).normal(size=2000)
    ring = Ring(64, 20)
    machine = Machine(ring, {"weight": values})
    machine.enter("row", values[None])
    for name in ("weight", "row"):
        errors = (machine.read(name).cpu().numpy().ravel() - values) * 2.0**20
        assert np.abs(errors).max() <= 0.5 + 1e-6
        assert np.abs((errors * np.sign(values)).mean()) < 0.05  # cut off towards zero it is half a unit
    assert np.array_equal(nearest(values, 20) * 2.0**20, np.rint(values * 2.0**20))


def test_what_leaves_the_range_is_seen_and_wrong() -> None:
    ring = Ring(64, 20)
    big = ring.encode(np.full(100, 3000.0))
    assert float((ring.decode(ring.multiply(big, big)) - 9e6).abs().max()) > 1e6
    assert ring.peak == pytest.approx(9e6 * 2**40, rel=1e-6)
    assert ring.peak > ring.limit


@pytest.mark.parametrize("fraction", [13, 17, 20, 24])
def test_reciprocals_and_roots_hold_over_their_whole_range(fraction: int) -> None:
    ring = Ring(64, fraction)
    x = np.exp2(np.linspace(-4, 9, 200)).astype(np.float32)
    noise = 8 * 2.0**-fraction
    np.testing.assert_allclose(over(ring, lambda x: 1.0 / x, x), 1 / x, atol=noise * 2, rtol=1e-4 + 64 * noise)
    np.testing.assert_allclose(over(ring, lambda x: 1.0 / x, -x), -1 / x, atol=noise * 2, rtol=1e-4 + 64 * noise)
    np.testing.assert_allclose(over(ring, jax.lax.rsqrt, x), x**-0.5, atol=noise * 2, rtol=2e-3 + 64 * noise)


def test_a_fraction_or_ring_that_the_engine_has_not_is_refused() -> None:
    for bits, fraction in ((16, 4), (64, 27), (32, 20)):
        with pytest.raises(ValueError, match=r"ring|fraction"):
            Ring(bits, fraction)
    with pytest.raises(ValueError, match="no rule for erf"):
        over(Ring(), lambda x: jax.scipy.special.erf(x), [1.0])
    with pytest.raises(ValueError, match=r"shape \(1, 1\)"):
        emulate(fold(disturbed(small(architecture("SM+LN+G", "gpt2-tiny")))), np.zeros((1, 1), np.int64))


@pytest.mark.parametrize("row", [*ROWS, "SM+LN+R", "SM(t)+ScFuFFN", *BOUNDED])
@pytest.mark.parametrize("shape", ["gpt2-tiny", "llama-tiny"])
def test_many_texts_at_once_give_the_exact_models_logits(shape: str, row: str) -> None:
    model = fold(disturbed(small(architecture(row, shape)), seed=3))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 9))
    found = emulate(model, tokens, Settings(batch=2))
    exact = np.stack([plain.logits(model, each) for each in tokens])
    assert found.largest_logit == np.abs(exact).max()
    assert found.max_logit_error < 2e-3 * found.largest_logit
    assert found.exact_perplexity == pytest.approx(math.exp(negative_log_likelihood(exact, tokens) / 24))
    assert found.perplexity == pytest.approx(found.exact_perplexity, rel=1e-3)
    assert [each.layer for each in found.layers] == list(range(model.config.depth))
    assert all(0 < each.rms_error < each.max_error < 0.05 * (1 + each.rms_stream) for each in found.layers)
    assert found.wrong_outputs == 0
    assert 0 < found.bits_left < 62


def test_a_key_value_cache_goes_on_where_the_prefill_ended() -> None:
    model = fold(disturbed(small(architecture("SM+LN+G", "llama-tiny")), seed=3))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 8))
    emulator = Emulator(model, Settings())
    parts = [
        emulator.logits(tokens[:, :5]),
        emulator.logits(tokens[:, 5:7], past=5),
        emulator.logits(tokens[:, 7:], past=7),
    ]
    exact = np.stack([plain.logits(model, each) for each in tokens])
    np.testing.assert_allclose(np.concatenate(parts, axis=1), exact, atol=2e-3 * np.abs(exact).max())


def test_a_small_ring_overflows_and_says_so() -> None:
    model = fold(disturbed(small(architecture("SM+LN+G", "gpt2-tiny")), seed=3))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 9))
    found = emulate(model, tokens, Settings(ring=32, fraction_bits=14))
    assert found.bits_left < 0
    assert found.wrong_outputs > 0
    assert found.max_logit_error > 100 * emulate(model, tokens).max_logit_error


def test_powers_that_wrap_around_and_are_not_chosen_do_no_harm() -> None:
    x = np.array([-200.0, -1.0, 1.0, 200.0])
    ring = Ring()
    gelu = over(ring, partial(nonlinear.gelu_by_polynomial, erf=True), x)
    assert ring.peak > ring.limit
    np.testing.assert_allclose(gelu, [0.0, -0.1587, 0.8413, 200.0], atol=1e-3)


class TestAgainstTheEngine:
    """The same functions on the engine itself, all parties in this process: they differ by the noise of truncation."""

    RUNS = 6

    def noise(self, protocol: str, function: Any, *inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Answers of the engine and of the emulation, [RUNS, ...] each."""
        pytest.importorskip("spu")
        import spu.utils.simulation as simulation
        from tests.private.test_operators import parties

        on_engine = simulation.sim_jax(parties(protocol), function)
        engine = np.stack([np.asarray(on_engine(*inputs), np.float64) for _ in range(self.RUNS)])
        ring = Ring(truncation=truncation_of(protocol_named(protocol)), seed=5)
        return engine, np.stack([over(ring, function, *inputs) for _ in range(self.RUNS)])

    @pytest.mark.parametrize("protocol", ["aby3", "semi2k-insecure"])
    @pytest.mark.parametrize(
        ("function", "inputs"),
        [
            (jnp.exp, (np.linspace(-12, 2, 200),)),
            (jnp.tanh, (np.linspace(-7, 7, 200),)),
            (jax.nn.sigmoid, (np.linspace(-7, 7, 200),)),
            (lambda x: 1.0 / x, (np.linspace(0.05, 300, 200),)),
            (lambda x, y: x / y, (draw(200, scale=5), np.linspace(-30.5, 30, 200))),
            (jax.lax.rsqrt, (np.linspace(0.01, 300, 200),)),
            (lambda x: 0.37 * (x * 0.61) + x / 3.0 + x**3, (draw(200, scale=3),)),
            (softmax.exponential, (np.linspace(-18, 0, 200),)),
            (lambda x, y: x @ y, (draw(10, 64, scale=2), draw(64, 20, scale=0.3))),
        ],
        ids=["exp", "tanh", "sigmoid", "reciprocal", "division", "rsqrt", "products", "softmax exponent", "matmul"],
    )
    def test_means_agree_and_so_does_the_noise(self, function: Any, inputs: Any, protocol: str) -> None:
        engine, emulated = self.noise(protocol, function, *(np.float32(each) for each in inputs))
        spread, other = (float(each.std(0, ddof=1).mean()) for each in (engine, emulated))
        # Bias is what the two have in common; noise is what they have not. A wrong constant would be a bias.
        gap = np.abs(engine.mean(0) - emulated.mean(0)).mean()
        assert gap < 1.2 * max(spread, other) + UNIT
        assert 0.6 < (spread + UNIT / 4) / (other + UNIT / 4) < 1.7

    @pytest.mark.parametrize(
        ("protocol", "factor"),
        [(protocol, factor) for protocol in ("aby3", "semi2k-insecure") for factor in (0.5, 0.125, 0.3)]
        + [pytest.param("cheetah", 0.5, marks=pytest.mark.slow)],
    )
    def test_products_round_as_the_engine_rounds(self, protocol: str, factor: float) -> None:
        """Down to the mean of one unit in its last place, with a public factor and with a secret one."""
        x = np.arange(-2000, 2000, dtype=np.float32) * np.float32(2**-17 + 2**-20)
        for function, inputs in (
            (lambda x: x * np.float32(factor), (x,)),
            (lambda x, y: x * y, (x, np.full_like(x, factor))),
        ):
            engine, emulated = self.noise(protocol, function, *inputs)
            assert abs(engine.mean() - emulated.mean()) < 0.04 * UNIT
            assert abs(engine.std(0).mean() - emulated.std(0).mean()) < 0.04 * UNIT

    @pytest.mark.parametrize("row", [*ROWS, *BOUNDED])
    def test_a_models_logits_differ_by_the_engines_own_noise(self, row: str) -> None:
        simulation = pytest.importorskip("spu.utils.simulation")
        from tests.private.test_operators import parties

        model = fold(disturbed(small(architecture(row, "gpt2-tiny")), seed=3))
        tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 10)
        emulator = Emulator(model, Settings())
        bits = fraction_bits_of(model.config)
        assert bits == (22 if row.startswith("static") and not row.endswith("power") else 20)
        weights = {name: nearest(value, bits) for name, value in emulator.weights.items()}
        rows = nearest(model.weights["embedding"][tokens] + model.weights["positions"][:10], bits)
        steps = emulator.program.forward(0, 10, 10)

        def logits(weights: Any, rows: Any) -> Any:
            return program.run_plain(steps, {**weights, "tokens": rows})["logits"]

        on_engine = simulation.sim_jax(parties("semi2k-insecure", bits), logits)
        with computing_with(bits):
            first, second = (np.asarray(on_engine(weights, rows), np.float64) for _ in range(2))
        emulated = emulator.logits(tokens[None])[0]
        exact = plain.logits(model, tokens)
        own = rms(first - second)
        assert rms(emulated - first) < 1.5 * own
        assert rms(emulated - exact) < 1.5 * rms(first - exact)
        assert rms(first - exact) < 1.5 * rms(emulated - exact)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x * x)))


def test_fraction_bits_are_those_of_what_is_traced() -> None:
    for bits in (22, FRACTION_BITS):
        with computing_with(bits):
            # A function of its own each time: the library remembers what it has traced.
            traced = jax.make_jaxpr(lambda x: truncate(scaled(x, 0.3)))(1.0)
        assert traced.eqns[0].params["factor"].bits == bits
    with pytest.raises(ValueError, match="from 1 to 26, not 27"), computing_with(27):
        pass
    with computing_with(22), pytest.raises(ValueError, match="smaller than 512"):
        scaled(jnp.ones(()), 600.0)
