import dataclasses
import re
from typing import Any

import jax
import numpy as np
import pytest

from optim_zoo import recorded, registry, verify
from optim_zoo.errors import UserError
from optim_zoo.recorded import agreement


def change_last_step(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Changes the last recorded step of every case."""
    load = recorded.Case.load

    def changed(case: recorded.Case) -> recorded.Trajectory:
        trajectory = load(case)
        *others, last = trajectory.params
        return dataclasses.replace(trajectory, params=(*others, jax.tree.map(change, last)))

    monkeypatch.setattr(recorded.Case, "load", changed)


def test_verify_prints_the_comparison_with_one_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.verify(["torch_sgd"])
    opening, meaning, _, head, line, _, total = capsys.readouterr().out.splitlines()
    assert opening == f"on {jax.devices()[0].device_kind} with jax {jax.__version__}"
    assert meaning.startswith("difference: the largest relative difference")
    assert " ".join(head.split()) == "optimizer reference steps difference tolerance verdict"
    assert re.fullmatch(
        r"torch\.SGD  torch 2\.13\.0     12    \d\.\de-\d\d      1e-9  agrees", line
    )
    assert total == "1 recorded trajectory: 1 agrees"


def test_an_optimizer_is_also_compared_with_its_proofs(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.verify(["lookahead"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.endswith("  agrees")] == [
        "optax", "pytorch_optimizer", "michaelrzhang/lookahead"[14:],
    ]  # fmt: skip
    assert lines[-1] == "3 recorded trajectories: 3 agree"


def test_a_changed_recording_differs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change_last_step(monkeypatch, lambda x: x * (1 + 4e-9))
    assert not verify.verify(["torch_sgd", "nadam"])
    out = capsys.readouterr().out
    assert re.search(r"^torch\.SGD .*  4\.0e-9 +1e-9  DIFFERS$", out, re.MULTILINE)
    assert "\nDIFFERS: torch.SGD from the case torch_sgd\n" in out
    assert out.endswith("\n\n2 recorded trajectories: 0 agree, 2 differ\n")


def test_a_change_within_the_tolerance_agrees(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change_last_step(monkeypatch, lambda x: x * (1 + 4e-10))
    assert verify.verify(["torch_sgd"])
    assert re.search(r"  4\.0e-10 +1e-9  agrees$", capsys.readouterr().out, re.MULTILINE)


def test_nan_always_differs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN in one leaf and step must not be hidden by finite differences elsewhere."""
    steps = agreement.steps

    def spoiled(*arguments: Any) -> Any:
        for i, step in enumerate(steps(*arguments)):
            leaves, structure = jax.tree.flatten(step.params)
            if i == 3:
                leaves[0] = np.full(leaves[0].shape, np.nan)
            yield agreement.Step(jax.tree.unflatten(structure, leaves), step.state)

    monkeypatch.setattr(agreement, "steps", spoiled)
    assert not verify.verify(["torch_sgd"])
    out = capsys.readouterr().out
    assert re.search(r"  nan +1e-9  DIFFERS$", out, re.MULTILINE)
    assert out.endswith("\n\n1 recorded trajectory: 0 agree, 1 differs\n")


def test_a_difference_within_the_noise_of_the_reference_passes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert verify.verify(["pytorch_optimizer.Lamb"])
    out = capsys.readouterr().out
    assert re.search(r"  2\.4e-6 +1e-9  noise$", out, re.MULTILINE)
    assert "\nnoise: po_lamb_prenorm is within the reference's own noise, 3e-6: " in out
    assert out.endswith(
        "\n\n3 recorded trajectories: 2 agree, 1 within its reference's own noise\n"
    )


@pytest.mark.parametrize(
    ("case_id", "difference", "within"),
    [
        ("po_lamb_prenorm", 2.9e-6, True),
        ("po_lamb_prenorm", 3.1e-6, False),
        ("po_lamb_prenorm", float("nan"), False),
        ("po_lamb", 2e-9, False),
    ],
)
def test_noise_is_limited_and_allowed_for_one_case_only(
    case_id: str, difference: float, within: bool
) -> None:
    case = recorded.get(case_id)
    held = agreement.Agreement(case, "ports.pytorch_optimizer.Lamb", difference, False)
    assert held.within_noise is within


def test_agreement_is_not_reported_as_noise() -> None:
    case = recorded.get("po_lamb_prenorm")
    assert not agreement.Agreement(case, "ports.pytorch_optimizer.Lamb", 0.0, True).within_noise


def test_a_difference_above_the_noise_of_the_reference_differs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change_last_step(monkeypatch, lambda x: x * (1 + 1e-5))
    assert not verify.verify(["po_lamb_prenorm"])
    assert "DIFFERS" in capsys.readouterr().out


def test_without_names_every_case_is_compared_once() -> None:
    """The optimizers come first, then the ports."""
    found = verify.comparisons()
    assert sorted(c.case.id for c in found) == [case.id for case in recorded.cases()]
    assert all(c.constructor == c.case.constructor and c.arguments is None for c in found)
    names = [c.constructor.removeprefix("optim_zoo.") for c in found]
    of_zoo = sum(name in registry.OPTIMIZERS for name in names)
    assert all(name in registry.OPTIMIZERS for name in names[:of_zoo])
    assert names[:of_zoo] == sorted(names[:of_zoo])
    assert names[of_zoo:] == sorted(names[of_zoo:])


def test_names_of_optimizers_libraries_ports_and_cases_are_accepted() -> None:
    def ids(*names: str) -> list[str]:
        return [c.case.id for c in verify.comparisons(names)]

    assert ids("torch.AdamW") == ["torch_adamw", "torch_adamw_excl", "torch_adamw_sched"]
    assert ids("optim_zoo.ports.torch.AdamW") == ids("torch.AdamW")
    of_torch = {
        c.id for c in recorded.cases() if c.constructor.startswith("optim_zoo.ports.torch.")
    }
    assert set(ids("torch")) == of_torch
    assert ids("keras_lion", "torch_adamw", "torch.AdamW") == [
        "keras_lion", "torch_adamw", "torch_adamw_excl", "torch_adamw_sched",
    ]  # fmt: skip
    # An optimizer and a case have this name; the optimizer takes precedence.
    assert {c.constructor for c in verify.comparisons(["bert_adamw"])} == {"optim_zoo.bert_adamw"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lookahed", "unknown optimizer or case 'lookahed'; did you mean lookahead"),
        ("torch_sgdd", "did you mean torch_sgd"),
        ("qqqqq", "unknown optimizer or case 'qqqqq'; `optim-zoo list` lists all names"),
    ],
)
def test_an_unknown_name_raises_before_anything_runs(
    name: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as caught:
        verify.verify(["torch_sgd", name])
    assert expected in str(caught.value)
    assert capsys.readouterr().out == ""


def test_an_optimizer_without_a_recording_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify.catalogue, "comparisons", lambda short: [])
    with pytest.raises(UserError, match=r"^no trajectory is recorded for lamb$"):
        verify.verify(["torch_sgd", "lamb"])
    assert capsys.readouterr().out == ""


def test_a_device_without_float64_raises_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_has_float64", lambda: False)
    with pytest.raises(UserError) as caught:
        verify.verify(["torch_sgd", "torch_adam", "ymcui_lamb"])
    assert str(caught.value) == (
        f"{jax.devices()[0].device_kind} does not compute in float64, which 2 of 3 recorded "
        "trajectories need: set JAX_PLATFORMS=cpu to run them on the CPU"
    )
    assert verify.verify(["ymcui_lamb"])  # recorded in float32


def test_float64_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify._has_float64()
    enable_x64 = jax.enable_x64
    monkeypatch.setattr(jax, "enable_x64", lambda _: enable_x64(False))
    assert not verify._has_float64()

    def refused(_: bool) -> None:
        raise RuntimeError("UNIMPLEMENTED: float64")

    monkeypatch.setattr(jax, "enable_x64", refused)
    assert not verify._has_float64()


def test_every_line_fits_a_terminal_of_100_columns() -> None:
    cases = recorded.cases()
    optimizer = max(len(c.constructor.removeprefix("optim_zoo.ports.")) for c in cases)
    reference = max(len(verify.short_reference(c.reference)) for c in cases)
    assert optimizer + 2 + reference + len("  steps difference tolerance  DIFFERS") <= 100


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("torch 2.13.0 torch.optim.Adam", "torch 2.13.0"),
        ("keras 3.15.1 (jax backend) keras.optimizers.SGD", "keras 3.15.1"),
        ("arXiv 1904.00962v5 Algorithm 2 (own numpy oracle)", "arXiv 1904.00962v5"),
        ("google-research/bert optimization.py @eedf571 create_optimizer",
         "google-research/bert eedf571"),
        ("NVIDIA/DeepLearningExamples TensorFlow/LAMB.py @729963d", "DeepLearningExamples 729963d"),
    ],
)  # fmt: skip
def test_short_reference_keeps_the_name_and_version(reference: str, expected: str) -> None:
    assert verify.short_reference(reference) == expected


def test_short_references_are_distinct() -> None:
    """Different repositories and libraries have different short texts."""
    sources = {" ".join(c.reference.split()[:1]) for c in recorded.cases()}
    short = {verify.short_reference(c.reference).split()[0] for c in recorded.cases()}
    assert len(short) == len(sources)
