"""The exponent of logits that are known to be bounded: a few squarings, no maximum, no clip.

A softmax divides by its row's sum, so any multiple of the exponent will do. The forms here give ``WEIGHT`` exp(s): with
logits near 0 the weights and the reciprocal of a sum over 128 of them then both keep 16 bits.

    q_0 = scale s + shift,   q_(i+1) = q_i^2 + sum of c_j q_j over j < i + constant

Each line is one product and one truncation, the other terms being free before it (``ring``). The numbers come from a
least-squares fit of the relative error on Chebyshev points, reweighted until the error's peaks were level.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from aero.private import ring

WEIGHT = 2.0**-3
"""The weight of a logit of 0."""


@dataclass(frozen=True)
class Exponential:
    """One fit: bound is the largest |s| it is for, error the largest relative error there in real numbers.

    reach: exp(bound), rounded up.
    steps: for each squaring the coefficients of q_0, q_1, ... (trailing zeros left out) and the constant.
    """

    bound: float
    error: float
    reach: float
    scale: float
    shift: float
    steps: tuple[tuple[tuple[float, ...], float], ...]

    def __call__(self, scaled_logits: jax.Array) -> jax.Array:
        """``scale`` s -> ``WEIGHT`` exp(s); fixed point adds two units to the error."""
        terms = [scaled_logits + self.shift]
        for coefficients, constant in self.steps:
            double = ring.product(terms[-1], terms[-1])
            for coefficient, term in zip(coefficients, terms, strict=False):
                if coefficient:
                    double = double + ring.scaled(term, coefficient)
            terms.append(ring.truncate(double) + constant)
        return terms[-1]


FORMS = (
    Exponential(
        2.0, 1.3e-4, 7.4, 0.1959286, 0.2051147,
        (((), 0.4373627), ((0.5614582,), 0.0268994), ((-0.0211558, -0.1245258), 0.0507322)),
    ),
    Exponential(
        3.0, 1.9e-3, 20.1, 0.1915660, 0.2639285,
        (((), 0.3498094), ((0.5315996,), 0.0549345), ((-0.0235269, -0.0935581), 0.0327675)),
    ),
    Exponential(
        4.0, 7.6e-5, 54.6, 0.1158016, 0.1504214,
        (((), 0.7364008), ((0.818227,), -0.1864918), ((0.24387,), 0.0448278), ((0.0112058,), 0.0047171)),
    ),
    Exponential(
        5.0, 1.1e-4, 148.5, 0.1203001, 0.1136945,
        (
            ((), 0.6394093),
            ((1.1138948,), -0.1012904),
            ((0.1754748, -0.055395), 0.1617681),
            ((0.1205126, 0.1768941, -0.0871536), -0.0865355),
        ),
    ),
    Exponential(
        6.0, 6.5e-4, 403.5, 0.1184391, 0.1620895,
        (
            ((), 0.5515878),
            ((1.0805185,), -0.0335476),
            ((0.1149498, -0.0494461), 0.1222608),
            ((0.0991421, 0.1329045, -0.0615541), -0.053158),
        ),
    ),
    Exponential(
        8.0, 8.0e-4, 2981.0, 0.0529549, 0.5204552,
        (((), 0.3274347), ((), 0.7613001), ((), -0.6542245), ((), -0.0045684), ((), -1.79e-05)),
    ),
)  # fmt: skip
"""By bound, cheapest first. Squarings: 3, 3, 4, 4, 4, 5; each costs, an entry of the packed triangle, 40 bytes and 2
rounds under semi2k, 52 bytes and 3 rounds under aby3 (with a maximum: 432 and 23, 616 and 33)."""


def exponential_for(bound: float | None) -> Exponential | None:
    """The cheapest form for |s| <= ``bound``; None where a maximum must be taken: no bound, or too wide a one."""
    return next((form for form in FORMS if bound is not None and form.bound >= bound), None)
