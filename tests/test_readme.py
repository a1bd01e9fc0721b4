"""The README is short, and its commands are what they say; `test_docs` runs its example."""

import re
from pathlib import Path

import pytest

import optim_zoo
from optim_zoo import registry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_two_commands_set_everything_up() -> None:
    run, test = (block.strip() for block in blocks("sh")[:2])
    install, _, job = run.partition(" && ")
    assert install == "pip install -c constraints.txt -e '.[train]'"
    program, _, config = job.rpartition(" ")
    assert program == "optim-zoo train"
    assert (ROOT / config).is_file()
    assert test == "pip install -c constraints.txt -e '.[all]' && pytest -n 2"


def test_continuous_integration_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    steps = blocks("sh")[1].strip().split(" && ")
    assert [step for step in steps if step.replace("install", "install -q") in script] == steps


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_table_of_ports_names_optimizers_of_the_zoo() -> None:
    """Not all of them have to be there: `optim-zoo list` prints them."""
    _, _, after = (ROOT / "docs" / "ports.md").read_text().partition("| here | agrees ")
    rows = after.partition("\n\n")[0].splitlines()
    named = {name for row in rows[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert {"lamb", "adamw"} <= named <= set(registry.OPTIMIZERS)


def anchors(text: str) -> set[str]:
    """The anchors that mkdocs and GitHub make of headings without special characters."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    """mkdocs checks the links between the pages of docs/."""
    for path, anchor in re.findall(
        r"\]\((?!http)([^)#]+)(?:#([^)]+))?\)", (ROOT / name).read_text()
    ):
        assert (ROOT / path).exists(), path
        assert not anchor or anchor in anchors((ROOT / path).read_text()), (path, anchor)


def test_the_changelog_has_the_version() -> None:
    assert f"\n## {optim_zoo.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
