"""How a party of this deployment reaches the dealer of correlated randomness, where the protocol has one."""

from __future__ import annotations

from pathlib import Path

from aero.private.dealer.access import DealerAccess, read_public_key
from aero.serve.certificates import load
from aero.serve.settings import ClientSettings, ModelSettings, address


def dealer_access(settings: ModelSettings | ClientSettings, folder: Path) -> DealerAccess | None:
    """With this party's own certificate, for a dealer that asks for one. Raises AeroError if a file is missing."""
    dealer = settings.dealer
    if dealer is None:
        return None
    host, port = address(dealer.address)
    public_key = read_public_key(folder / dealer.public_key)
    if dealer.certificate is None:
        return DealerAccess(host=host, port=port, public_key=public_key)
    return DealerAccess(
        host=host,
        port=port,
        public_key=public_key,
        authority=str(load(folder / dealer.certificate).path.resolve()),
        certificate=str((folder / settings.certificate).resolve()),
        secret=str((folder / settings.key).resolve()),
    )
