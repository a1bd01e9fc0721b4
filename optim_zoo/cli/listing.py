"""``optim-zoo list``. The module has another name than the command, which would hide the type."""

import argparse
import shutil
import sys


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "list",
        help="list the optimizers, and the ports of other libraries' optimizers",
        description="Lists the optimizers with their papers, and the ports by library.",
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Prints the catalogue in the width of the terminal."""
    from optim_zoo import catalogue  # lazily, as the other commands do not need it

    del parsed
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(catalogue.table(columns), flush=True)
    return 0
