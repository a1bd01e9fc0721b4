"""``optim-zoo verify [NAME ...]``."""

import argparse


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "verify",
        help="compare optimizers with recorded trajectories on this machine",
        description="Compares optimizers with recorded trajectories of other libraries, on this "
        "machine and its default device, and prints the largest difference from each. The exit "
        "code is 1 if one exceeds its tolerance.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="an optimizer (lamb), a port (torch.AdamW), a library (torch) or a recorded case "
        "(torch_adamw_sched); by default all cases",
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Compares the named optimizers, and returns 1 if one of them differs."""
    from optim_zoo import verify  # lazily, as the other commands do not need it

    return 0 if verify.verify(parsed.names) else 1
