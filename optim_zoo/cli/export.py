"""``optim-zoo export RUN DIR``."""

import argparse
from pathlib import Path

from optim_zoo.cli import starting
from optim_zoo.errors import ArgumentError, UserError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "export",
        help="write the model of a run as a folder that other libraries load",
        description="Writes the model of a run as a folder that other libraries load. Nothing is "
        "overwritten, and the run may still be training.",
    )
    starting.add_run(parser)
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help="the folder to write, which must not exist"
    )
    parser.add_argument(
        "--format",
        default="huggingface",
        help="huggingface (the default): for from_pretrained of transformers",
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Writes the folder, and prints its path."""
    # Imported lazily: the other commands work without the extra `train`.
    from optim_zoo.train.tasks.bert.huggingface import export

    starting.check_text(str(parsed.run_dir), str(parsed.folder))
    with starting.using_a_run():
        try:
            written = export.export(
                parsed.run_dir, parsed.folder, format=parsed.format, **starting.saved_step(parsed)
            )
        except ArgumentError as error:
            raise UserError(f"{error}") from error
    print(f"exported to {written}", flush=True)
    return 0
