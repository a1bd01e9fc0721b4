"""Which errors mean that another process is lost. These tests run in one process."""

from pathlib import Path

import jax
import pytest

from optim_zoo.errors import UserError
from optim_zoo.train.distributed import Lost, agreement, watched

GLOO = "UNKNOWN: Gloo all-reduce failed: Connection closed by peer\nand more"


@pytest.fixture
def _several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "several", lambda: True)


@pytest.mark.usefixtures("_several")
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_communication_error_means_that_a_process_is_lost(wrapped: bool, tmp_path: Path) -> None:
    """It may also be the cause of another error, such as a failed save."""
    for step in (9, 10):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    with pytest.raises(Lost) as caught, watched(tmp_path):
        try:
            raise jax.errors.JaxRuntimeError(GLOO)
        except jax.errors.JaxRuntimeError as error:
            if wrapped:
                raise UserError("cannot write a checkpoint") from error
            raise
    assert str(caught.value) == (
        f"another process of this run has failed or is gone ({GLOO.splitlines()[0]}); step 10 is "
        f"saved in {tmp_path}: start all processes again with the same commands to resume from "
        f"there"
    )


def test_the_message_says_if_no_checkpoint_was_saved(tmp_path: Path) -> None:
    assert str(Lost(tmp_path)) == (
        "another process of this run has failed or is gone; no checkpoint was saved: start all "
        "processes again with the same commands"
    )


@pytest.mark.usefixtures("_several")
@pytest.mark.parametrize(
    "error",
    [
        UserError("a mistake"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: memory"),
        jax.errors.JaxRuntimeError("INVALID_ARGUMENT: a bug"),
    ],
)
def test_other_errors_do_not_mean_that_a_process_is_lost(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error), match=str(error)), watched(tmp_path):
        raise error


def test_a_single_process_never_reports_a_lost_process(tmp_path: Path) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError), watched(tmp_path):
        raise jax.errors.JaxRuntimeError(GLOO)
