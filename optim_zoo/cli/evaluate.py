"""``optim-zoo evaluate RUN [data.key=value ...]``."""

import argparse

from optim_zoo.cli import starting


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "evaluate",
        help="print the held-out metrics of a run, also on other data",
        description="Prints the held-out metrics of what a run has trained, one on each line. "
        "Nothing is trained or written, and the run may still be training.",
    )
    starting.add_run(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="data.key=value",
        help="overrides a key of the run's data, such as data.text=other/*.txt",
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Prints the metrics."""
    # Imported lazily: the other commands work without the extra `train`.
    from optim_zoo.train import evaluating

    starting.check_text(str(parsed.run_dir), *parsed.overrides)
    with starting.using_a_run():
        metrics = evaluating.evaluate(
            parsed.run_dir, parsed.overrides, **starting.saved_step(parsed)
        )
    print(*evaluating.lines(metrics), sep="\n", flush=True)
    return 0
