"""The script for `ddp_spawn`: a fit for each case, whose processes write what they ended with.

Everything is pickled on the way to the processes, and only the weights come back, so the results
are written from inside.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import lightning as L
import torch

from tests.contract.models import Classifier
from tests.contract.strategies.jobs import WITHOUT, added_for, bundles
from tests.contract.strategies.places import Place, ddp, train, whole_weights
from tests.contract.strategies.watching import Rows, Watch, heads, trace

SPAWNED = Place("ddp_spawn", Classifier, lambda: ddp(start_method="spawn"), Classifier)


class Writes(L.Callback):
    """Writes from each of the processes, before our callbacks leave and after."""

    def __init__(self, folder: Path, case: str, added: list[Any], watch: Watch, rows: Rows) -> None:
        self.folder, self.case = folder, case
        self.added, self.watch, self.rows = added, watch, rows
        self.ended: dict[str, Any] = {}

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        self.ended = {
            "weights": whole_weights(module),
            "head": heads(self.added),
            "states": self.watch.states,
            "rows": self.rows.rows,
            "global_step": trainer.global_step,
        }

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        # Called for ours before: this callback stands last in the list.
        self.ended["trace"] = trace(pl_module, trainer)
        torch.save(self.ended, self.folder / f"{self.case}.{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for bundle in [[WITHOUT], *bundles()]:
        case = bundle[0]
        added, rows = [each for one in bundle for each in added_for(one)], Rows()
        watch = Watch(added, states=True, gradients=False)
        writes = Writes(folder, case, added, watch, rows)
        try:
            module, trainer = train(
                SPAWNED, [*added, watch, writes], logger=rows, log_every_n_steps=1
            )
            returned = {"weights": whole_weights(module), "trace": trace(module, trainer)}
        except Exception:
            returned = {"error": traceback.format_exc()}
        torch.save(returned, folder / f"{case}.returned.pt")
