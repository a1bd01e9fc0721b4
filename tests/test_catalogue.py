import inspect
import re

import pytest

from optim_zoo import catalogue, ports, recorded, registry
from optim_zoo.errors import UserError
from optim_zoo.recorded.proofs import PROOFS

MODULES = [name for name in ports.__all__ if inspect.ismodule(getattr(ports, name))]
PORTS = [f"{library}.{name}" for library, made in catalogue.libraries().items() for name in made]


def test_each_line_of_the_table_begins_with_a_name() -> None:
    """The command `optim-zoo list | cut -d' ' -f1` therefore prints the names."""
    of_zoo, of_ports = catalogue.table().split("\n\n")
    assert [line.split()[0] for line in of_zoo.splitlines()] == list(registry.OPTIMIZERS)
    for line, entry in zip(of_zoo.splitlines(), registry.OPTIMIZERS.values(), strict=True):
        assert re.split("  +", line) == [entry.name, entry.description, entry.paper]
    assert [line.split(":")[0] for line in of_ports.splitlines()] == [f"ports.{m}" for m in MODULES]
    assert re.search(r"^ports\.nvidia: +Lamb$", of_ports, re.MULTILINE)


def test_the_columns_are_aligned() -> None:
    of_zoo, of_ports = catalogue.table().split("\n\n")
    descriptions = zip(of_zoo.splitlines(), registry.OPTIMIZERS.values(), strict=True)
    assert len({line.index(entry.description) for line, entry in descriptions}) == 1
    assert len({len(re.match(r"\S+ +", line)[0]) for line in of_ports.splitlines()}) == 1  # type: ignore[index]


@pytest.mark.parametrize("width", [80, 100, 150, 200])
def test_the_table_fits_a_terminal(width: int) -> None:
    wrapped = catalogue.table(width)
    assert max(map(len, wrapped.splitlines())) <= width
    # Wrapping must keep every word.
    assert sorted(wrapped.split()) == sorted(catalogue.table().split())


def test_every_port_is_listed() -> None:
    """The list is made from the recorded cases, so that a port without one would be missing."""
    for library in MODULES:
        module = getattr(ports, library)
        public = {
            name
            for name, value in vars(module).items()
            if inspect.isfunction(value)
            and value.__module__ == module.__name__
            and (name[0].isupper() or name == "create_optimizer")
        }
        assert public == set(catalogue.libraries()[library])


@pytest.mark.parametrize("entry", registry.OPTIMIZERS.values(), ids=lambda entry: entry.name)
def test_the_page_of_an_optimizer_is_complete(entry: registry.Entry) -> None:
    page = catalogue.page(entry.name)
    assert page.startswith(f"{entry.name}: {entry.description}")
    for text in (entry.paper, entry.variant, entry.example):
        assert text in page
    for line in entry.formula.splitlines():
        assert line in page
    for name in inspect.signature(entry.constructor).parameters:
        assert re.search(rf"\b{name}\b", page)
    assert_shows_cases(page, entry.name)


@pytest.mark.parametrize("name", PORTS)
def test_the_page_of_a_port_is_complete(name: str) -> None:
    library, port = name.split(".")
    page = catalogue.page(name)
    assert page.startswith(f"ports.{name}\n")
    assert inspect.getdoc(catalogue.libraries()[library][port]).splitlines()[-1] in page  # type: ignore[union-attr]
    assert getattr(ports, library).__doc__.splitlines()[0] in " ".join(page.split())
    assert catalogue.comparisons(name)
    assert_shows_cases(page, name)


def assert_shows_cases(page: str, name: str) -> None:
    assert " at 0x" not in page  # no default is shown as an object
    assert max(map(len, page.splitlines())) <= catalogue.WIDTH
    words = set(re.findall(r"\w+", page.partition("agrees, step by step, with")[2]))
    for comparison in catalogue.comparisons(name):
        assert comparison.case.id in words
        assert comparison.case.reference.split()[0] in page


def test_the_page_says_when_no_trajectory_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "comparisons", lambda short: [])
    page = catalogue.page("lamb")
    assert "agrees" not in page.partition("example")[2]
    assert "\n\nNo trajectory is recorded for it. The tests compare it with" in page


def test_a_page_says_to_how_many_digits_cases_agree() -> None:
    lamb = catalogue.page("lamb")
    assert "      9 digits, float64: optax_lamb, optax_lamb_excl, optax_lamb_wd0\n" in lamb
    assert "      4 digits, float32: dle_tf_bert_lamb\n" in lamb  # within 2e-5
    # The reference is reproducible to fewer digits than the tolerance requires.
    assert "      5 digits, float64: po_lamb_prenorm" in catalogue.page("pytorch_optimizer.Lamb")


def test_a_page_shows_the_signature_without_types() -> None:
    shown = " ".join(catalogue.page("adamw").split())
    assert (
        "arguments learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0001, *, "
        "bias_correction=True, exclude_from_weight_decay=(), mask=None, eps_root=0.0, "
        "nesterov=False example" in shown
    )


@pytest.mark.parametrize("name", ["torch.SGD", "ports.torch.SGD", "optim_zoo.ports.torch.SGD"])
def test_a_port_is_found_by_its_full_path(name: str) -> None:
    assert catalogue.page(name) == catalogue.page("torch.SGD")


@pytest.mark.parametrize("library", MODULES)
def test_the_page_of_a_library_names_its_ports(library: str) -> None:
    page = catalogue.page(library)
    assert page.startswith(inspect.getdoc(getattr(ports, library)))  # type: ignore[arg-type]
    for name in catalogue.libraries()[library]:
        assert f"\nports.{library}.{name} " in page


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lamp", "unknown optimizer 'lamp'; did you mean lamb or "),
        ("AdamW", "did you mean adamw or keras.AdamW or tensorflow_addons.AdamW or torch.AdamW?"),
        ("ports.torch.adam", "unknown optimizer 'ports.torch.adam'; did you mean torch.Adam?"),
        ("torch.", "unknown optimizer 'torch.'; did you mean "),
        ("", "unknown optimizer ''; `optim-zoo list` lists all names"),
        ("qqqqq", "unknown optimizer 'qqqqq'; `optim-zoo list` lists all names"),
    ],
)
def test_an_unknown_name_suggests_the_nearest_names(name: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        catalogue.page(name)
    assert expected in str(caught.value)


def test_every_recorded_case_appears_on_one_page() -> None:
    found = [c for name in (*registry.OPTIMIZERS, *PORTS) for c in catalogue.comparisons(name)]
    own = [c.case.id for c in found if c.arguments is None]
    assert sorted(own) == [case.id for case in recorded.cases()]
    assert len(found) - len(own) == sum(map(len, PROOFS.values()))


@pytest.mark.parametrize(
    ("number", "digits", "expected"),
    [(2.41e-6, 2, "2.4e-6"), (1e-9, 1, "1e-9"), (0.0, 2, "0"), (12.0, 2, "1.2e+1"),
     (1.23e-16, 2, "1.2e-16"), (float("nan"), 2, "nan"), (float("inf"), 2, "inf")],
)  # fmt: skip
def test_short_number_formats_with_few_digits(number: float, digits: int, expected: str) -> None:
    assert catalogue.short_number(number, digits) == expected
