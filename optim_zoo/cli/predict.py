"""``optim-zoo predict RUN FILE``."""

import argparse

from optim_zoo.cli import starting


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "predict",
        help="print what a run predicts for a text",
        description="Prints what a run predicts for a text. A masked_language run fills in each "
        "[MASK], and a token_tagging run prints the tag of every word. Nothing is written, and the "
        "run may still be training.",
    )
    starting.add_run(parser)
    parser.add_argument("file", metavar="FILE", help="a text in UTF-8; - is standard input")
    parser.add_argument(
        "--top",
        type=int,
        default=0,
        metavar="K",
        help="also print the K most probable candidates, with their probabilities",
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Prints the predictions."""
    # Imported lazily: the other commands work without the extra `train`.
    from optim_zoo.train import predicting

    starting.check_text(str(parsed.run_dir), parsed.file)
    with starting.using_a_run():
        for line in predicting.predict(
            parsed.run_dir, parsed.file, top=parsed.top, **starting.saved_step(parsed)
        ):
            print(line, flush=True)
    return 0
