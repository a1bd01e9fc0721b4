"""``optim-zoo show NAME``."""

import argparse
import shutil
import sys


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "show",
        help="show the formula and the arguments of an optimizer, and what it agrees with",
        description="Shows the formula, the paper and the arguments of an optimizer, and the "
        "recorded trajectories that it reproduces.",
    )
    parser.add_argument("name", metavar="NAME", help="such as lamb, torch.AdamW or torch")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Prints the page of an optimizer, a port or a library."""
    from optim_zoo import catalogue  # lazily, as the other commands do not need it

    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else catalogue.WIDTH
    print(catalogue.page(parsed.name, min(columns, catalogue.WIDTH)), flush=True)
    return 0
