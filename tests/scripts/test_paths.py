"""The programs of ``scripts/`` are at the paths that the documentation names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
PATTERNS = (
    "*.md",
    "*.toml",
    "configs/**/*.toml",
    "docs/**/*.md",
    "optim_zoo/**/*.md",
    "tests/**/*.md",
)
TEXTS = [
    path.read_text() for pattern in (*PATTERNS, "scripts/**/*.py") for path in ROOT.glob(pattern)
]
PROGRAMS = [path for path in SCRIPTS.rglob("*.py") if '__name__ == "__main__"' in path.read_text()]


def test_every_program_that_the_documentation_names_exists() -> None:
    named = {name for text in TEXTS for name in re.findall(r"scripts/[\w/]+\.\w+", text)}
    assert len(named) >= len(PROGRAMS)
    assert sorted(name for name in named if not (ROOT / name).is_file()) == []


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_every_program_documents_its_command(path: Path) -> None:
    command = rf"^    python {path.relative_to(ROOT)}\b"
    assert re.search(command, path.read_text(), flags=re.MULTILINE)


def test_modules_have_different_names() -> None:
    """A program imports the other files of its folder by their short names."""
    modules = [path.stem for path in SCRIPTS.glob("*/*.py")]
    assert sorted(modules) == sorted(set(modules))
