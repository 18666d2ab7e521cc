"""One party as a process: ``python -m aero.private.party``, a job on standard input, events on standard output."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import threading

from aero.errors import AeroError
from aero.private.dumps import forbid_dumps
from aero.private.inbox import Inbox
from aero.private.messages import Event, PartyJob
from aero.private.protocols import CLIENT
from aero.private.session import Session

ENDING = {signal.SIGTERM, signal.SIGHUP}
"""Signals after which the party removes its files and ends."""

_speaking = threading.Lock()


def emit(event: Event) -> None:
    """Write one event, whole, from whatever thread."""
    with _speaking:
        print(json.dumps(event), flush=True)


def no_room(folder: str, who: str) -> str | None:
    """What to tell people if the folder takes no more; the engine then drops its log in silence."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        return f"{who[0].upper()}{who[1:]} cannot write its temporary files: {error.strerror}; make room there."
    return None


def main() -> None:
    """Run the job on standard input; exit code 0, or 2 with an ``error`` event."""
    forbid_dumps()
    session: Session | None = None
    folder = ""

    def leave(code: int) -> None:
        # Native threads may still wait for messages of parties that left; do not wait for them.
        shutil.rmtree(folder, ignore_errors=True)
        sys.stdout.flush()
        os._exit(code)

    def lost(rank: int | None, message: str) -> None:
        emit({"kind": "error", "message": message} | ({} if rank is None else {"lost": rank}))
        leave(2)

    def end_by_signal() -> None:
        number = os.read(waking, 1)[0]
        who = "A party" if session is None else f"Party {session.role}"
        emit({"kind": "error", "message": f"{who} was told to end (signal {number})."})
        leave(2)

    # A thread hears of signals: the main one may be in native code, where Python handles none.
    waking, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    for each in ENDING:
        signal.signal(each, lambda *_: None)
    threading.Thread(target=end_by_signal, daemon=True).start()
    try:
        job = PartyJob.from_json(sys.stdin.readline())
        # The engine keeps files in the folder it is started in. They hold counts and masked numbers, and go with us.
        folder = job.folder or tempfile.mkdtemp(prefix="aero-party-")
        os.chdir(folder)
        tempfile.tempdir = folder
        inbox = Inbox(sys.stdin, lambda: leave(2)) if job.attended or job.rank == CLIENT else None
        session = Session(job, inbox if job.rank == CLIENT else None, emit, lost)
        session.run()
        emit({"kind": "done"})
    except AeroError as error:
        emit({"kind": "error", "message": str(error)})
        leave(2)
    except Exception as error:
        # A traceback or the engine's own text could quote values: only the place and the kind of error are told.
        at = "the start" if session is None else session.at
        who = "" if session is None else f" of party {session.role}"
        dealer = None if session is None else session.dealer
        message = None if dealer is None else dealer.blamed(error, at)
        message = message or no_room(folder, who.removeprefix(" of ") or "a party")
        message = message or f"The engine{who} failed at {at} ({type(error).__name__}); run it again."
        emit({"kind": "error", "message": message})
        leave(2)
    leave(0)


if __name__ == "__main__":
    main()
