"""Tests the commands, links and length of the README; `test_docs` runs its example."""

import re
from pathlib import Path

import pytest

import optim_zoo
from optim_zoo import registry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_readme_installs_and_trains_with_one_command() -> None:
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


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_table_of_ports_names_optimizers_of_the_zoo() -> None:
    """The table need not be complete, because `optim-zoo list` prints all ports."""
    _, _, after = (ROOT / "docs" / "ports.md").read_text().partition("| here | agrees ")
    rows = after.partition("\n\n")[0].splitlines()
    named = {name for row in rows[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert {"lamb", "adamw"} <= named <= set(registry.OPTIMIZERS)


def anchors(text: str) -> set[str]:
    """Returns the anchors that mkdocs and GitHub generate for headings."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_have_existing_targets(name: str) -> None:
    """Checks only files outside of docs/; mkdocs checks the links between its pages."""
    for path, anchor in re.findall(
        r"\]\((?!http)([^)#]+)(?:#([^)]+))?\)", (ROOT / name).read_text()
    ):
        assert (ROOT / path).exists(), path
        assert not anchor or anchor in anchors((ROOT / path).read_text()), (path, anchor)


def test_the_changelog_has_a_section_for_this_version() -> None:
    assert f"\n## {optim_zoo.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
