"""The dealer's key pair: parties encrypt the seeds of their masks for it and can then pass them through each other.

SM2 public-key encryption (GB/T 32918.4-2016), the only one that the engine's parties speak. A ciphertext is the DER
sequence of the point (x, y), the check value and the masked text.
"""

from __future__ import annotations

import gmalg
from cryptography.hazmat import asn1

from aero.private.dealer.access import write_public_key

SEED_BYTES = 16


@asn1.sequence
class _Ciphertext:
    x: int
    y: int
    check: bytes
    masked: bytes


class KeyPair:
    """A fresh key pair, which lives as long as the dealer does and is written nowhere.

    public: the public key as PEM, as the parties need it.
    """

    def __init__(self) -> None:
        secret, point = gmalg.SM2().generate_keypair()
        self._secret = gmalg.SM2(secret)
        self.public = write_public_key(point)

    def decrypt(self, ciphertext: bytes) -> bytes:
        """The 16-byte seed in ``ciphertext``. Raises ValueError if it is not one encrypted for this key."""
        try:
            parts = asn1.decode_der(_Ciphertext, ciphertext)
            point = b"\x04" + parts.x.to_bytes(32, "big") + parts.y.to_bytes(32, "big")
            seed = bytes(self._secret.decrypt(point + parts.check + parts.masked))
        except (ValueError, OverflowError, gmalg.errors.GMError) as error:
            raise ValueError("a seed is not encrypted for this dealer's key") from error
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a seed has {len(seed)} bytes, not {SEED_BYTES}")
        return seed
