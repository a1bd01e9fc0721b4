"""Messages about a start that fails. tests/multiprocess/test_job.py tests such starts."""

import socket
from pathlib import Path

import jax
import pytest

from optim_zoo.errors import UserError
from optim_zoo.train import distributed
from optim_zoo.train.config import Distributed
from optim_zoo.train.distributed import starting


def test_a_single_process_joins_no_cluster(tmp_path: Path) -> None:
    with distributed.start(Distributed(processes=1), tmp_path / "not made") as processes:
        assert not processes.joined
    assert not jax.distributed.is_initialized()
    assert not list(tmp_path.iterdir())


def test_an_unreachable_coordinator_is_reported_in_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"  # bound, but nothing listens on it
        settings = Distributed(coordinator=address, processes=2, index=1, start_seconds=1)
        expected = rf"^the coordinator {address} was not reached in 1 s \("
        with pytest.raises(UserError, match=expected):
            distributed.start(settings, tmp_path)


ABORTED = "F0000 client.h:77] Terminating process because the JAX distributed service detected\n"


def test_aborts_of_the_coordination_service_are_explained(tmp_path: Path) -> None:
    settings = Distributed(start_seconds=7)
    assert starting._not_started("double free or corruption", settings) is None
    assert starting._lost("double free or corruption", tmp_path) is None
    code, line = starting._not_started(f"{ABORTED}absl::Status: Unexpected task 3", settings)
    assert code == 2
    assert line.startswith(
        "optim-zoo: the processes did not come together (distributed.processes is smaller in "
    )
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    code, line = starting._lost(f"{ABORTED}Failed to send RPC to coordination service", tmp_path)
    assert code == 75
    assert line.startswith(
        "optim-zoo: another process of this run has failed or is gone (no answer from process 0); "
        f"step 4 is saved in {tmp_path}: "
    )
