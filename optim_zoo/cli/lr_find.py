"""``optim-zoo lr-find CONFIG [section.key=value ...]``."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "lr-find",
        help="draw the loss while the learning rate rises, and suggest a range",
        description="Trains the first stage of a config while the learning rate rises "
        "exponentially, and draws the loss with the suggested range. No checkpoint is written.",
    )
    parser.add_argument("config", type=Path, help="a TOML file, such as configs/digits_lars.toml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="low=1e-6, high=10 and steps=100 set the test; section.key=value a key of the config",
    )
    parser.set_defaults(run=run)


def _split(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Returns the settings of the test, and the overrides of the config."""
    from optim_zoo.lab import toml_values

    own: dict[str, Any] = {}
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("low", "high", "steps"):
            own[key] = toml_values.parsed(value)
        else:
            overrides.append(argument)
    return own, overrides


def run(parsed: argparse.Namespace) -> int:
    """Finds a range of learning rates and prints it with its rule."""
    from optim_zoo.lab import lr_find  # lazily: it needs the extra `train`

    sys.path.append(os.getcwd())  # to find the user's own tasks, as `train` does
    own, overrides = _split(parsed.overrides)
    named = [text.partition("=")[2] for text in overrides if text.startswith("run.dir=")]
    folder = Path(named[-1] if named else f"runs/{parsed.config.stem}_lr_find").expanduser()
    found = lr_find.run(parsed.config, overrides, folder, **own)
    if found.suggestion is None:
        print("the loss has not fallen by 1 %: raise high or steps, or lower low")
    else:
        print(f"range: {found.low:.3g} (a tenth of the fall) to {found.high:.3g} (least loss)")
        print(f"suggestion: {found.suggestion:.3g}, a third of the rate with the least loss")
    print(f"plot: {folder / 'lr_find.png'}")
    return 0
