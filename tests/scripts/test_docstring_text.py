from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts.importing import imported

pytest.importorskip("griffe", reason="the extra docs is not installed")


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    with imported("docs", "docstring_text") as (found,):
        yield found


def test_a_formula_becomes_a_block_of_text(module: ModuleType) -> None:
    text = (
        "First.\n\n::\n\n    m <- b m\n      + g\n\nAfter.\n\nArgs:\n  b: with::\n\n      a = 1\n"
    )
    assert module.markdown(text, {}).splitlines() == [
        *("First.", "", "```text", "m <- b m", "  + g", "```", "", "After.", "", "Args:"),
        *("  b: with:", "", "  ```python", "  a = 1", "  ```"),
    ]


def test_names_of_the_package_become_links(module: ModuleType) -> None:
    links = {"lamb": "optim_zoo.lamb", "optim_zoo.lamb": "optim_zoo.lamb"}
    text = "`lamb`, ``lamb``, `optim_zoo.lamb`, `other`, [`lamb`](x)\n```python\n`lamb`\n```"
    assert module.markdown(text, links) == (
        "[`lamb`][optim_zoo.lamb], ``lamb``, [`optim_zoo.lamb`][optim_zoo.lamb], `other`, "
        "[`lamb`](x)\n```python\n`lamb`\n```"
    )


def test_arguments_that_share_a_description_become_separate_items(module: ModuleType) -> None:
    text = "Args:\n  a, b: one\n    more\n  c: a, b: two\n  d, e:\n    three\n"
    assert module.separated(text) == (
        "Args:\n  a: one\n    more\n  b: one\n    more\n  c: a, b: two\n"
        "  d:\n    three\n  e:\n    three\n"
    )


def test_the_type_that_is_returned_comes_first(module: ModuleType) -> None:
    text = "Sums.\n\nReturns:\n  A tree: of sums.\n\nRaises:\n  E: never.\n"
    assert "Returns:\n  dict: A tree: of sums.\n" in module.typed(text, "dict")


@pytest.mark.parametrize(
    ("source", "line", "expected"),
    [
        ("x: int  # the count", 1, "The count."),
        ("# of steps,\n# from 1\nx: int", 3, "Of steps, from 1."),
        ("x: int  # type: ignore", 1, ""),
        ('x: str = "#"', 1, ""),
        ("# other\n\nx: int", 3, ""),
    ],
)
def test_a_comment_becomes_the_description_of_a_field(
    module: ModuleType, source: str, line: int, expected: str
) -> None:
    assert module.comment(source.splitlines(), line, line) == expected


def test_links_lead_to_the_reference(module: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A\n\n::: optim_zoo.layers.split\n\n::: optim_zoo.split\n")
    targets = module.targets(tmp_path)
    assert targets["split"] == targets["optim_zoo.split"] == "optim_zoo.split"
    assert targets["layers.split"] == "optim_zoo.layers.split"


def test_fields_that_a_class_describes_are_shown_once_with_their_types(
    module: ModuleType, tmp_path: Path
) -> None:
    griffe = pytest.importorskip("griffe")
    code = '''
class State:
    """State.

    Attributes:
      count: Of steps, as an array.
    """

    count: int = 0
    other: dict[str, int]  # by name
'''
    path = tmp_path / "optim_zoo.py"
    path.write_text(code)
    state = griffe.visit("optim_zoo", path, code)["State"]
    extension = module.DocstringText()
    extension.on_object(obj=state)
    extension.on_object(obj=state.members["other"])
    assert "  count (int): Of steps" in state.docstring.value
    assert list(state.members) == ["other"]
    assert state.members["other"].docstring.value == "By name."
