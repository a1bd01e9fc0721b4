"""A runner that writes what a run would write, without training."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from optim_zoo.lab.results import FAILED, FINISHED, Outcome
from optim_zoo.lab.trials import Trial, folder_of


class FakeRunner:
    """Its loss is a function of the trial; where that raises, the run fails."""

    def __init__(self, folder: Path, loss: Callable[[Trial], float], stop_after: int = -1) -> None:
        self.folder, self.loss, self.stop_after = folder, loss, stop_after
        self.ran: list[Trial] = []

    def __call__(
        self, trials: Sequence[Trial], ended: Callable[[Trial, Outcome | None], Any]
    ) -> None:
        for trial in trials:
            if len(self.ran) == self.stop_after:
                raise KeyboardInterrupt
            self.ran.append(trial)
            run = folder_of(self.folder, trial)
            run.mkdir(parents=True, exist_ok=True)
            try:
                loss = self.loss(trial)
            except ZeroDivisionError:
                ended(trial, Outcome(FAILED, 2, "it failed", 1.0))
                continue
            steps = trial.config.total_steps
            lines = [
                {"kind": "train", "step": step, "loss": loss + 1 / step, "images": step * 512}
                | {"images_per_second": 100.0}
                for step in range(1, steps + 1)
            ]
            lines += [
                {"kind": "held_out", "step": step, "loss": loss + 1 / step - 1 / steps}
                | {"accuracy": 0.5 + step / 100}
                for step in range(1, steps + 1)
            ]
            (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
            ended(trial, Outcome(FINISHED, 0, "", float(len(self.ran))))
