"""The exponent of logits that are known to be bounded: a few squarings, no maximum, no clip.

A softmax divides by its row's sum, so any multiple of the exponent will do. ``FORMS`` give ``WEIGHT`` exp(s): with
logits near 0 the weights and the reciprocal of a sum over 128 of them then both keep 16 bits. A kernel's exponents are
at most 0 and its sums hold 1 besides, so there what counts is the absolute error of exp(y).

    q_0 = scale s + shift,   q_(i+1) = q_i^2 + sum of c_j q_j over j < i + constant

Each line is one product and one truncation, the other terms being free before it (``ring``). The numbers of ``FORMS``
come from a least-squares fit of the relative error on Chebyshev points, reweighted until the error's peaks were level.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, log2, sqrt

import jax

from aero.private import ring

WEIGHT = 2.0**-3
"""The weight of a logit of 0."""


@dataclass(frozen=True)
class Exponential:
    """One form: bound is the largest |s| it is for.

    error: the largest relative error there in real numbers; of a kernel's form, the absolute error of exp(s) for
        -bound <= s <= 0.
    reach: the largest exponent, rounded up.
    scale: positive, for a kernel's queries and keys take a root of it each.
    steps: for each squaring the coefficients of q_0, q_1, ... (trailing zeros left out) and the constant.
    weight: the multiple of the exponent that it gives.
    """

    bound: float
    error: float
    reach: float
    scale: float
    shift: float
    steps: tuple[tuple[tuple[float, ...], float], ...]
    weight: float = WEIGHT

    def __call__(self, scaled_logits: jax.Array) -> jax.Array:
        """``scale`` s -> ``weight`` exp(s).

        Fixed point adds two units to the error of ``FORMS``; half a unit for every one in ``bound`` to a kernel's.
        """
        terms = [scaled_logits + self.shift]
        for coefficients, constant in self.steps:
            double = ring.product(terms[-1], terms[-1])
            for coefficient, term in zip(coefficients, terms, strict=False):
                if coefficient:
                    double = double + ring.scaled(term, coefficient)
            terms.append(ring.truncate(double) + constant)
        return terms[-1]

    def weighing(self, weight: float) -> Exponential:
        """The same form of another multiple. Square roots alone, which every party finds to be the same numbers."""
        roots = [weight / self.weight]
        for _ in self.steps:
            roots.insert(0, sqrt(roots[0]))
        steps = tuple(
            (tuple(each * roots[i + 1] / roots[j] for j, each in enumerate(coefficients)), constant * roots[i + 1])
            for i, (coefficients, constant) in enumerate(self.steps)
        )
        return replace(self, scale=self.scale * roots[0], shift=self.shift * roots[0], steps=steps, weight=weight)


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


KERNEL_FORMS = (
    Exponential(
        24.0, 2.2e-4, 1.0, 0.069204, 1.0952937,
        (
            ((), -0.352245),
            ((0.0771535,), 0.047351),
            ((0.0064111, 0.2612211), 0.1022448),
            ((0.003162, -0.0521275, -0.0715851), -0.0076777),
        ),
        weight=1.0,
    ),
    Exponential(
        64.0, 1.3e-4, 1.0, 0.0319891, 1.1780638,
        (
            ((), -0.5143462),
            ((0.1544351,), -0.0931933),
            ((0.1970958, 0.0213356), 0.0719169),
            ((-0.0288214, -0.0350684, -0.012112), -0.023837),
            ((), 0.0),
        ),
        weight=1.0,
    ),
    Exponential(
        96.0, 5.6e-4, 1.0, 0.0233017, 1.3452164,
        (
            ((), -0.6942151),
            ((0.0054879,), -0.3339972),
            ((-0.0001808, 0.0341654), 0.0277397),
            ((6.8e-06, 0.002376, 0.1526672), 0.0536406),
            ((-4.5e-06, 0.0004967, -0.0161781, -0.0262796), -0.0022319),
        ),
        weight=1.0,
    ),
    Exponential(
        128.0, 6.0e-6, 1.0, 0.0167734, 1.2298479,
        (
            ((), -0.7011767),
            ((0.1667925,), -0.1640008),
            ((0.0685977, 0.3675817), 0.2843094),
            ((-0.0073716, -0.1972914, -0.0725487), -0.1166751),
            ((), 0.0),
            ((), 0.0),
        ),
        weight=1.0,
    ),
    Exponential(
        192.0, 2.3e-5, 1.0, 0.0121684, 1.3935815,
        (
            ((), -0.8123557),
            ((-0.0813728,), -0.30989),
            ((0.0643827, 0.0469589), -0.0661038),
            ((0.0084095, -0.0012152, 0.4062298), 0.0765899),
            ((0.0091625, 0.0066861, -0.065632, -0.1421168), -0.0168871),
            ((), 0.0),
        ),
        weight=1.0,
    ),
    Exponential(
        256.0, 1.5e-4, 1.0, 0.0101495, 1.5207749,
        (
            ((), -1.0786409),
            ((0.015382,), -0.6901753),
            ((0.0085178, 0.0982223), -0.0603367),
            ((0.0023956, 0.0112053, 0.3255074), 0.1200981),
            ((0.0005889, 0.0066062, -0.0741527, -0.0784941), -0.0219628),
            ((), 0.0),
        ),
        weight=1.0,
    ),
    Exponential(
        512.0, 3.4e-6, 1.0, 0.0051249, 1.5438642,
        (
            ((), -1.0860576),
            ((-0.1569071,), -0.5966309),
            ((0.1134827, 0.0256491), -0.2324576),
            ((0.0450472, 0.0003812, 0.4945963), 0.1963568),
            ((0.0112771, 0.0004426, -0.2038727, -0.1310916), -0.0991041),
            ((), 0.0),
            ((), 0.0),
        ),
        weight=1.0,
    ),
)  # fmt: skip
"""Of a kernel's exponents, -bound <= y <= 0: bound, and largest absolute error there. Squarings: 4, 5, 5, 6, 6, 6, 7.

A weight of e^-12 or less only has to be small, so that these polynomials are of a kind with Chebyshev's, which stay
small on a range that grows with the square of their degree. Each stays below 1e-4 up to a tenth beyond its bound.
Slightly above 0, where rounding puts a key that equals its query, the error grows by less than a seventh."""

KERNEL_WEIGHT = 2.0**-4
"""The weight of a key at no distance, between the accuracy of a weight and that of one over a sum of up to 129."""

KERNEL_REACH = 1.75
"""Of a form beyond those: the largest -z. The rest, up to 2, is for text whose keys are farther than the bound says."""


@lru_cache
def kernel_exponential(bound: float) -> Exponential:
    """The cheapest form for a kernel's exponents -``bound`` <= y <= 0, giving ``KERNEL_WEIGHT`` exp(y).

    One of ``KERNEL_FORMS``, or, for a wider bound, (1 + z + z^2/2)^n with z = y/n, n a power of two. Its base is
    ((1 + z)/sqrt(2))^2 + 1/2, which stays within 1 for -2 <= z <= 0. The larger n, the more exact: the error is
    |y|^3 exp(y) / (6 n^2), largest at y = -3.
    """
    fitted = next((form for form in KERNEL_FORMS if form.bound >= bound), None)
    if fitted is not None:
        return fitted.weighing(KERNEL_WEIGHT)
    squarings = ceil(log2(bound / KERNEL_REACH))
    n, root = 2**squarings, 2.0**-0.5
    steps = (((), 0.5), *[((), 0.0)] * squarings)
    taylor = Exponential(KERNEL_REACH * n, 0.23 / n**2, 1.0, root / n, root, steps, weight=1.0)
    return taylor.weighing(KERNEL_WEIGHT)
