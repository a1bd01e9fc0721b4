"""What several processes add, as far as one process can tell; the rest is in tests/multiprocess."""

from pathlib import Path

import jax
import pytest

from optim_zoo.errors import UserError
from optim_zoo.train import processes

GLOO = "UNKNOWN: Gloo all-reduce failed: Connection closed by peer\nand more"


@pytest.fixture
def _several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "several", lambda: True)


@pytest.mark.usefixtures("_several")
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_error_of_the_runtime_is_a_lost_process(wrapped: bool, tmp_path: Path) -> None:
    """Also where a checkpoint could not be written for it."""
    for step in (9, 10):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    with pytest.raises(processes.Lost) as caught, processes.watched(tmp_path):
        try:
            raise jax.errors.JaxRuntimeError(GLOO)
        except jax.errors.JaxRuntimeError as error:
            if wrapped:
                raise UserError("cannot write a checkpoint") from error
            raise
    assert str(caught.value) == (
        f"another process of this run has failed or is gone ({GLOO.splitlines()[0]}); step 10 is "
        f"saved in {tmp_path}: start all processes again, by the same commands, to go on from there"
    )


def test_without_a_checkpoint_a_lost_process_says_so(tmp_path: Path) -> None:
    said = str(processes.Lost(tmp_path))
    assert "is gone; no checkpoint was saved: start all processes again" in said


@pytest.mark.usefixtures("_several")
@pytest.mark.parametrize(
    "error",
    [
        UserError("a mistake"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: memory"),
        jax.errors.JaxRuntimeError("INVALID_ARGUMENT: a bug"),
    ],
)
def test_other_errors_are_their_own(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error), match=str(error)), processes.watched(tmp_path):
        raise error


def test_one_process_loses_no_other(tmp_path: Path) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError), processes.watched(tmp_path):
        raise jax.errors.JaxRuntimeError(GLOO)


def test_one_process_waits_for_nobody(tmp_path: Path) -> None:
    assert processes.is_first()
    assert not processes.several()
    processes.wait_for_all("nobody")
    processes.check_same({"config": "any"})
    processes.check_shared(tmp_path / "is not touched")
    assert [processes.as_the_first_says(value) for value in (True, False)] == [True, False]
    assert processes.leave(3, "") == 3
