"""The dealer of one run: started by the launcher, which holds the other end of standard input, and ending with it."""

from __future__ import annotations

import json
import os
import sys
import threading

from aero.errors import AeroError
from aero.private.dealer.serve import serve
from aero.private.dumps import forbid_dumps


def _ready(port: int, public_key: str) -> None:
    print(json.dumps({"port": port, "public_key": public_key}), flush=True)


def _end_with_launcher() -> None:
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    """Serve on a free port of the loopback interface; the port and the public key go to standard output."""
    forbid_dumps()
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    try:
        serve("127.0.0.1", 0, ready=_ready)
    except AeroError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
