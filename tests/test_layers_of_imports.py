"""Tests that a module imports only from earlier rows of `ROWS`, and what the core imports.

The core does not import the optional dependencies.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import optim_zoo

ROWS = (
    ("errors",),
    ("tree", "ranges", "optax_arguments"),
    ("rules", "schedules", "saved_state"),
    ("rows",),
    ("layers",),
    ("transforms",),
    ("optimizers",),
    ("wrappers",),
    ("sharding",),
    ("registry", "recorded", "ports"),
    ("__init__",),  # the public names
    ("catalogue",),
    ("verify",),
    ("train",),
    ("lab",),
    ("cli",),
)
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}
ROOT = Path(optim_zoo.__file__).parent


def _imported(file: Path) -> set[str]:
    """Returns the parts of optim_zoo that ``file`` imports: ``rules`` for ``optim_zoo.rules``."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = {name.split(".")[1] for name in names if name.startswith("optim_zoo.")}
    return {part if part in LEVEL else "__init__" for part in parts}


def test_the_rows_list_every_part_of_the_package() -> None:
    files = {path.stem for path in ROOT.glob("*.py")}
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert files | folders == LEVEL.keys()


def test_imports_point_down() -> None:
    wrong = []
    for file in ROOT.rglob("*.py"):
        part = file.relative_to(ROOT).with_suffix("").parts[0]
        for used in _imported(file) - {part}:
            if LEVEL[used] >= LEVEL[part]:
                wrong.append(f"{file.relative_to(ROOT)} imports {used}")
    assert not wrong, wrong


def test_the_architecture_page_lists_the_long_files() -> None:
    page = (ROOT.parent / "docs" / "architecture.md").read_text("utf-8")
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text("utf-8").splitlines())
        for file in ROOT.rglob("*.py")
    }
    assert max(lengths.values()) <= 400
    long = {name for name, length in lengths.items() if length > 300}
    assert long == set(re.findall(r"`([\w/]+\.py)`", page.partition("## Long files")[2]))


def test_the_architecture_page_has_the_rows_of_this_test() -> None:
    page = (ROOT.parent / "docs" / "architecture.md").read_text("utf-8")
    listed = re.search(r"holds these rows:\n\n```\n(.*?)```", page, re.DOTALL)
    assert listed
    rows = [tuple(line.partition(" (")[0].split()) for line in listed[1].splitlines()]
    assert rows == list(ROWS)


def _modules_imported(file: Path) -> set[Path]:
    """Returns the files of optim_zoo that ``file`` imports at module level."""
    found = set()
    for node in ast.parse(file.read_text("utf-8")).body:
        if not isinstance(node, ast.ImportFrom) or not f"{node.module}.".startswith("optim_zoo."):
            continue
        package = ROOT.parent.joinpath(*str(node.module).split("."))
        for alias in node.names:
            paths = [
                package / f"{alias.name}.py",
                package / alias.name / "__init__.py",
                package.with_suffix(".py"),
                package / "__init__.py",
            ]
            found.add(next(path for path in paths if path.exists()))
    return found


def test_the_imports_of_train_have_no_cycle() -> None:
    """The imports between the files, direct and indirect, have no cycle."""
    left = {file: _modules_imported(file) for file in (ROOT / "train").rglob("*.py")}
    assert any(used & left.keys() for used in left.values())
    while ready := {file for file, used in left.items() if not used & left.keys() - {file}}:
        left = {file: used for file, used in left.items() if file not in ready}
    assert not left, sorted(str(file.relative_to(ROOT)) for file in left)


@pytest.mark.parametrize("arguments", [("list",), ("show", "lamb"), ("verify", "torch_sgd")])
def test_commands_that_do_not_train_do_not_import_train(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom optim_zoo import cli\n"
        f"assert cli.main({list(arguments)}) == 0\n"
        "print('imported:', *(m for m in sys.modules if m.startswith('optim_zoo.train')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *said, imported = done.stdout.splitlines()
    assert said
    assert imported.split() == ["imported:"]


def test_an_error_in_these_commands_does_not_import_train() -> None:
    code = (
        "import sys\nfrom optim_zoo import cli\n"
        "assert cli.main(['show', 'lamp']) == cli.main(['verify', 'lamp']) == 2\n"
        "print(*(m for m in sys.modules if m.startswith('optim_zoo.train')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert done.stderr.count("did you mean") == 2


def test_the_core_does_not_import_optional_dependencies() -> None:
    code = (
        "import sys, optim_zoo, optim_zoo.verify\n"
        "extras = {'flax', 'orbax', 'matplotlib', 'tokenizers', 'rich', 'tomli_w'}\n"
        "print(*sorted(extras & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
