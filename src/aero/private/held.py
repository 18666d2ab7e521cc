"""A model that is loaded and folded once, in memory from which every session of a server takes its weights.

The memory is an anonymous file: it has no name, lies on no disk, is sealed against writing, and is gone with the last
process that holds it. A process of its own loads and folds, so that the server does without the model's libraries and
is as small after it as before.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from aero.eliminate.private_model import Array, PrivateConfig, PrivateModel
from aero.errors import AeroError
from aero.private.dumps import forbid_dumps
from aero.private.processes import absolute

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def hold(model: str, *, seed: int) -> int:
    """Load and fold ``model``, a folder or SHAPE:ROW; the descriptor of the memory that holds it.

    Raises AeroError as ``eliminate.source.folded`` does.
    """
    memory = os.memfd_create("aero-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # The model's libraries leave folders where temporary files go; these go with the process.
        with tempfile.TemporaryDirectory(prefix="aero-load-") as folder:
            done = subprocess.run(
                [sys.executable, "-m", "aero.private.held"],
                input=json.dumps({"model": absolute(model), "seed": seed, "memory": memory}),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # libraries' warnings; what matters comes on standard output
                text=True,
                check=False,
                pass_fds=(memory,),
                env={**os.environ, "TMPDIR": folder},
            )
        if done.returncode != 0:
            how = f"was killed (signal {-done.returncode})" if done.returncode < 0 else "failed"
            raise AeroError(done.stdout.strip() or f"Loading the model {how}; the machine may be short of memory.")
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(memory)
        raise AeroError(f"The model cannot be loaded: {error.strerror or error}.") from None
    except BaseException:
        os.close(memory)
        raise
    return memory


def write(memory: int, model: PrivateModel) -> None:
    """Put a folded model into the memory ``memory``: its description, then its numbers in the description's order."""
    described: dict[str, Any] = {
        "config": model.config.to_dict(),
        "rotation": None if model.rotation is None else model.rotation.shape,
    }
    head = json.dumps(described).encode()
    head = len(head).to_bytes(8, "little") + head
    with open(memory, "wb", closefd=False) as file:
        file.write(head.ljust(-(-len(head) // 8) * 8))
        for name in model.config.shapes():
            file.write(np.ascontiguousarray(model.weights[name], np.float64).data)
        if model.rotation is not None:
            file.write(np.ascontiguousarray(model.rotation, np.float64).data)


def read(memory: int) -> PrivateModel:
    """The folded model in ``memory``; its weights are read-only views, which take no memory of this process."""
    # A private map of a file that cannot change: older systems refuse a shared one of a sealed file.
    mapped = mmap.mmap(memory, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    length = int.from_bytes(mapped[:8], "little")
    described = json.loads(mapped[8 : 8 + length])
    config = PrivateConfig.from_dict(described["config"])
    numbers = np.frombuffer(mapped, np.float64, offset=-(-(8 + length) // 8) * 8)

    def parts() -> Iterator[Array]:
        start = 0
        for shape in [*config.shapes().values(), *([described["rotation"]] if described["rotation"] else [])]:
            size = int(np.prod(shape))
            yield numbers[start : start + size].reshape(shape)
            start += size

    arrays = list(parts())
    weights = dict(zip(config.shapes(), arrays, strict=False))
    return PrivateModel(config, weights, arrays[-1] if described["rotation"] else None)


def main() -> None:
    """Load and fold what standard input names; exit code 2 with one sentence on standard output if it cannot be."""
    forbid_dumps()
    job = json.loads(sys.stdin.readline())
    from aero.eliminate.source import folded

    try:
        write(job["memory"], folded(job["model"], seed=job["seed"]))
    except AeroError as error:
        print(error)
        sys.exit(2)
    except (OSError, MemoryError) as error:
        print(f"The model's weights do not fit into memory ({type(error).__name__}); serve a smaller one.")
        sys.exit(2)


if __name__ == "__main__":
    main()
