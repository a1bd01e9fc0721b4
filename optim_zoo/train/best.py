"""Keeps the best parameters of a run, and ends a run that no longer improves.

The folder ``best`` of a run has the format of ``checkpoints``, without the optimizer state. Its
highest step is the best one. A step in it is whole or not there: Orbax renames a complete folder.

A run that was killed resumes from its last checkpoint, and evaluates again what it evaluated after
it. So that it ends with the best parameters of an unbroken run, also on another machine:

- the best parameters are on disk before the checkpoint that records them;
- those that an earlier checkpoint records stay on disk as long as that checkpoint does;
- a resumed run removes those after the step it resumes from.
"""

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from optim_zoo.train import distributed
from optim_zoo.train.checkpoint_records import make
from optim_zoo.train.checkpoints import Checkpoints, writing
from optim_zoo.train.config import Output
from optim_zoo.train.files import cannot_write
from optim_zoo.train.run_folder import BEST, CHECKPOINTS, saved_steps
from optim_zoo.train.stopping import History, metric_of
from optim_zoo.tree import Tree

_REMOVED = "removed-"  # begins the name of a folder that is being removed


class Best:
    """The best evaluation of a run, and its parameters.

    Every process makes one and calls its methods in the same order with the same numbers.

    Args:
      folder: the run folder.
      output: what the config says; nothing is kept where ``keep_best`` is "".
      checkpoints: the checkpoints of the run.
      start: the number of steps made before.
      record: the history that the checkpoint of this step has recorded, or None.
    """

    def __init__(
        self,
        folder: Path,
        output: Output,
        checkpoints: Checkpoints,
        start: int,
        record: Mapping[str, Any] | None,
    ) -> None:
        self._run, self._folder = folder, folder.absolute() / BEST
        self._output, self._checkpoints = output, checkpoints
        self.history = History.of(output.keep_best, record)
        self._remove_all_but([step for step in saved_steps(folder, BEST) if step <= start])

    @property
    def gives_up(self) -> bool:
        """Whether ``output.stop_after`` evaluations have followed the best one."""
        return 0 < self._output.stop_after <= self.history.without_better

    def see(
        self, step: int, metrics: Mapping[str, float], params: Tree, info: Mapping[str, Any]
    ) -> None:
        """Saves the parameters of an evaluation if they are the best ones, and returns when done.

        Args:
          step: the number of steps made.
          metrics: the held-out metrics of ``params``.
          params: the parameters that were evaluated.
          info: what else to record with them, as JSON values.

        Raises:
          UserError: they cannot be written.
        """
        before, self.history = self.history, self.history.after(step, metrics)
        if self.history.step == before.step:
            return
        self._checkpoints.wait()  # Those on disk decide what is still needed.
        bests, saved = saved_steps(self._run, BEST), saved_steps(self._run, CHECKPOINTS)
        needed = [max((b for b in bests if b <= step), default=0) for step in saved]
        self._remove_all_but([*needed, *bests[-1:]])
        best = {"metric": metric_of(self.history.goal), "value": self.history.value, "step": step}
        training = {"params": params}
        with writing(self._folder):
            manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    create=True, cleanup_tmp_directories=True, enable_async_checkpointing=False
                ),
                item_names=("training", "info"),
            )
            manager.save(
                step,
                args=ocp.args.Composite(
                    training=ocp.args.StandardSave(training),
                    info=ocp.args.JsonSave(make(training, {**info, **best})),
                ),
            )
            manager.close()

    def finish(self) -> None:
        """Removes all but the best parameters, once the last checkpoint is complete."""
        self._remove_all_but(saved_steps(self._run, BEST)[-1:])

    def _remove_all_but(self, kept: Collection[int]) -> None:
        """Removes steps from the folder. Each is renamed first, so that a kill leaves no part."""
        if not self._output.keep_best:
            return
        if distributed.is_first():
            try:
                for step in set(saved_steps(self._run, BEST)) - set(kept):
                    (self._folder / str(step)).rename(self._folder / f"{_REMOVED}{step}")
                for pattern in (f"{_REMOVED}*", "*.orbax-checkpoint-tmp*"):  # left by a kill, too
                    for path in self._folder.glob(pattern):
                        shutil.rmtree(path)
            except OSError as error:
                raise cannot_write(self._folder, error) from error
        distributed.wait_for_all("the best parameters")
