"""One process of a distributed ``train``: ``python train_worker.py CORPUS OUT ROW STOP``, ranks from the environment.

STOP: the step before which every process gives up, as if killed; a run that is already in OUT is resumed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.train.test_trainer import tiny

from aero.eliminate.anneal import StaticSchedule
from aero.train.loop import AeroTrainer, checkpoints
from aero.train.trainer import train


def main(corpus: Path, out: Path, row: str, stop: int) -> None:
    step = AeroTrainer.training_step

    def limited(self: AeroTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == stop:
            sys.exit(7)
        return step(self, *args, **kwargs)

    AeroTrainer.training_step = limited  # type: ignore[method-assign]
    recipe = tiny(row, steps=8, checkpoints=3, micro_batch=2, static=StaticSchedule(start=0.2, end=0.8))
    train(recipe, corpus, out, resume=bool(checkpoints(out / "checkpoints")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
