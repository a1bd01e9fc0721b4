"""The main job: pretraining from a config file to a run folder. Needs the extra ``train``."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optim_zoo.train.tasks.base import Loaded

__all__ = ["load"]


def load(
    run_dir: str | Path, step: int | None = None, best: bool = False, averaged: bool | None = None
) -> "Loaded":
    """Loads the model that a run has trained, in any later process.

    Nothing is written and no data is read, so a run can be loaded while it trains, and after its
    data is gone. A vocabulary of the user's own must still be where the config names it.

    Args:
      run_dir: the run folder, which has ``config.toml`` and ``checkpoints``.
      step: the number of steps after which the parameters were saved; None for the last ones. If
        the last checkpoint is damaged, the one before is loaded with a warning.
      best: whether to load the parameters that ``output.keep_best`` has kept.
      averaged: whether to load the averages of the parameters that ``averaging.decay`` keeps. None
        loads the parameters, and the best ones as the run has evaluated them.

    Returns:
      A record with these fields:

      - ``task``: the task of the run, made without its data.
      - ``model``: the model, such as a Flax module; None for a task that names none.
      - ``params``: the parameters as plain arrays on one device.
      - ``tokenizer``: turns text into ids; None for a task without text.
      - ``step``: the number of steps after which the parameters were saved.

      A BERT has the methods ``apply`` and ``encode`` of
      `optim_zoo.train.tasks.bert.loaded.LoadedBert`.

    Raises:
      UserError: the folder holds no run, the step is not saved (the message lists those that are),
        nothing of what ``best`` or ``averaged`` asks for was kept, the checkpoint is damaged or was
        saved by an earlier version, or the vocabulary is not the one that the run was trained with.

    Example:
      ::

        from optim_zoo.train import load

        run = load("runs/smoke")
        [encoding] = run.tokenizer.encode_batch(["The value is [MASK]."])
        logits = run.apply([encoding.ids])  # (1, length, vocabulary)
    """
    from optim_zoo.train import loading  # Imported lazily: it imports every part of a job.

    return loading.load(Path(run_dir), step, best, averaged)
