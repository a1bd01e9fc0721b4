"""Two processes with equal and different settings, and with one or two run folders."""

from pathlib import Path

from tests.multiprocess.group import Group, free_port

PROGRAM = """
import os, sys
from pathlib import Path
from optim_zoo.errors import UserError
from optim_zoo.train import distributed
from optim_zoo.train.config import Distributed

address, index, root = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])

def refused(check, *arguments):
    try:
        check(*arguments)
    except UserError as error:
        return str(error)
    return ""

with distributed.start(Distributed(address, 2, index), root) as processes:
    assert processes.joined and distributed.several()
    assert distributed.is_first() == (index == 0)
    with distributed.first_process_first("a file"):
        if index == 0:
            (root / "written").write_text("by process 0")
        assert (root / "written").exists()
    assert distributed.broadcast_from_first(index == 0)
    assert not distributed.broadcast_from_first(index == 1)

    distributed.check_same({"config": "same", "text": ""})
    said = refused(distributed.check_same, {"one": "same", "two": f"{index}", "three": f"{index}"})
    assert said.startswith("the two and three must be the same in every process, but differs"), said

    for _ in range(2):  # the second time with a mark that a killed process has left
        distributed.check_shared(root)
        distributed.wait_for_all("the mark is removed")
        assert not (root / ".shared").exists()
        distributed.wait_for_all("no mark was found")
        if index == 0:
            (root / ".shared").write_text("left")

    own = root / str(index)
    for _ in range(2):  # the first time one of the folders does not exist
        if index == 0:
            own.mkdir(exist_ok=True)
        said = refused(distributed.check_shared, own)
        assert said.startswith(f"the run folder {own} must be one that all processes share"), said
        distributed.wait_for_all("the marks are removed")
        assert not (own / ".shared").exists()
        own.mkdir(exist_ok=True)
    os.write(1, b"of C, hidden")
    print("done")
    processes.leave(0)
    os.write(2, b"of C, hidden too")
os.write(1, b"standard output and\\n")
os.write(2, b"standard error are restored\\n")
"""


def test_two_processes_compare_their_settings_and_run_folders(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    commands = [["-c", PROGRAM, address, str(index), str(tmp_path)] for index in range(2)]
    with Group(commands, devices=1) as group:
        ends = group.ends()
    expected = (0, "done\nstandard output and\n", "standard error are restored\n")
    assert ends == [expected] * 2
