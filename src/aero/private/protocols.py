"""The protocols a private answer can run under, and exactly what each one promises. No engine is loaded here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from aero.errors import AeroError

MODEL, CLIENT = 0, 1
"""Ranks: the party that owns the weights and the party that owns the prompt. A third party is the helper."""

Role = Literal["model", "client", "helper"]
Holding = Literal["shared", "cached", "owned"]


@dataclass(frozen=True, kw_only=True)
class TrustModel:
    """What must hold for the secrets to stay secret; printed with every result.

    secure: False where the protocol as it runs protects nothing and serves cost studies only.
    """

    name: str
    parties: int
    assumption: str
    statement: str
    secure: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class Together:
    """How many key/value heads share one product of all their queries and keys, or weights and values.

    prefill, row: in a pass of several rows and of one. crossed: every head of a group is multiplied with every other
    and the products of different heads are thrown away, so that an operand is opened once and what is thrown away is
    never sent. Otherwise zeros keep the heads apart: nothing is computed for nothing, and zeros are opened too.

    Measured for the logits of a prefill, 12 heads of 128 x 64, in one process on one core (MB, rounds, s):

        heads            1                4                6                12
        semi2k, zeros    4.7, 13, 0.08    9.4, 4, 0.14     12.6, 3, 0.20    22.0, 2, 0.36
        aby3, zeros     10.2, 14, 0.09   10.4, 6, 0.14     10.4, 5, 0.19    10.4, 3, 0.33

    Crossed, semi2k sends 4.7 MB whatever the group; aby3 would send every product that is thrown away. With cheetah a
    product's ciphertexts grow with the group.
    """

    prefill: int
    row: int
    crossed: bool = False

    def arguments(self, rows: int, batch: int = 1) -> dict[str, Any]:
        """What ``attention.scores`` and ``attention.values`` take for a pass of so many rows of each prompt.

        Where heads share products those of all prompts do: a batch takes the rounds of one prompt.
        """
        together = self.row if rows == 1 else self.prefill
        return {"together": together * batch if together > 1 else 1, "crossed": self.crossed}


ALONE = Together(1, 1)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A protocol as this package runs it.

    name: as the command line takes it. kind: the engine's own name.
    roles: what each rank is; rank 0 owns the weights, rank 1 the prompt.
    weights: how the weights lie during the run. ``shared``: secret-shared once among all parties. ``cached``: shared,
        and their mask opened once, so that later products open only the other factor. ``owned``: they stay with their
        owner, which is cheaper where products are homomorphic.
    warm_up: the first comparison and product of a session set up correlated randomness; do that before the prompt.
    offline: what the offline column holds.
    share_bytes: bytes a party keeps for one secret-shared number.
    together: which heads share a product.
    dealer: whether a third party, which is none of the roles, makes correlated randomness.
    largest_product: how many multiplications one product with a weight has at most; a larger one is taken in parts of
        the weight's columns. None: whatever it has. For memory: homomorphic products hold every multiplication at once.
    whole_products: how many elementwise products are one unit of cost, so that what is left over such units is cheaper
        as a product of its own. None: products cost what they number.
    """

    name: str
    kind: str
    roles: tuple[Role, ...]
    trust: TrustModel
    weights: Holding
    warm_up: bool
    offline: str
    share_bytes: int
    together: Together
    dealer: bool = False
    largest_product: int | None = None
    whole_products: int | None = None


ABY3 = Protocol(
    name="aby3",
    kind="ABY3",
    roles=("model", "client", "helper"),
    trust=TrustModel(
        name="3PC honest majority, semi-honest",
        parties=3,
        assumption="no two of the three parties collude, and all follow the protocol",
        statement=(
            "The model owner, the client and a helper hold replicated shares; one party alone learns nothing. "
            "Two colluding parties learn everything."
        ),
        secure=True,
    ),
    weights="shared",
    warm_up=False,
    offline="sharing the weights, once a session; correlated randomness comes from common seeds and costs no bytes",
    share_bytes=16,
    together=Together(4, 12),
)

CHEETAH = Protocol(
    name="cheetah",
    kind="CHEETAH",
    roles=("model", "client"),
    trust=TrustModel(
        name="2PC, semi-honest, no dealer",
        parties=2,
        assumption="both parties follow the protocol",
        statement=(
            "The model owner and the client compute with homomorphic encryption and oblivious transfer; "
            "neither learns anything of the other's secret, and nobody else takes part."
        ),
        secure=True,
    ),
    weights="owned",
    warm_up=True,
    offline="setting up oblivious transfer, once a session; later correlated randomness is made, and counted, online",
    share_bytes=8,
    together=ALONE,
    largest_product=160_000_000,
    # Two ciphertexts of 8192 numbers each. A product and its truncation in the engine: 16384 numbers 3.63 MB, 17152
    # 7.20, 99072 (the triangles of 12 heads at T = 128) 25.3; 768 alone 0.15.
    whole_products=16384,
)

SEMI2K = Protocol(
    name="semi2k",
    kind="SEMI2K",
    roles=("model", "client"),
    trust=TrustModel(
        name="2PC with dealer, semi-honest",
        parties=3,
        assumption=(
            "the dealer colludes with neither party and cannot read what they send each other; all follow the protocol"
        ),
        statement=(
            "The model owner and the client compute on shares with correlated randomness from a dealer, who sees seeds "
            "of masks and the sizes of arrays and no data. A dealer that colludes with a party, or that reads the link "
            "between them, learns everything."
        ),
        secure=True,
    ),
    weights="cached",
    warm_up=False,
    offline="opening the masked weights, once a session; and everything between the dealer and the model owner",
    share_bytes=8,
    together=Together(4, 12, crossed=True),
    dealer=True,
)

SEMI2K_INSECURE = Protocol(
    name="semi2k-insecure",
    kind="SEMI2K",
    roles=("model", "client"),
    trust=TrustModel(
        name="2PC, semi-honest, INSECURE triples",
        parties=2,
        assumption="none that helps: party 0 makes every multiplication triple",
        statement=(
            "NOT SECURE: the model owner knows every mask and could read the prompt. A cost study of two parties with "
            "a dealer; the bytes of making triples are not in it."
        ),
        secure=False,
    ),
    weights="cached",
    warm_up=False,
    offline="opening the masked weights, once a session; the making of triples is missing, so this column is too small",
    share_bytes=8,
    together=Together(4, 12, crossed=True),
)

PROTOCOLS: dict[str, Protocol] = {each.name: each for each in (ABY3, CHEETAH, SEMI2K, SEMI2K_INSECURE)}


def protocol_named(name: str) -> Protocol:
    """The protocol of that name. Raises AeroError naming the known ones."""
    if name not in PROTOCOLS:
        raise AeroError(f"Unknown protocol {name!r}: choose one of {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]
