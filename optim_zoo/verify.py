"""Compares optimizers with recorded trajectories on this machine, and prints the differences."""

import os
import re
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from optim_zoo import catalogue, recorded, registry
from optim_zoo.catalogue import Comparison, short_number
from optim_zoo.errors import UserError
from optim_zoo.recorded.agreement import REFERENCE_NOISE, Agreement, follow

_REFERENCE_WIDTH = 30  # so that a line fits into 100 columns


def verify(names: Sequence[str] = ()) -> bool:
    """Prints a line for each comparison once it is made.

    Args:
      names: Names of optimizers (which include their `recorded.proofs`), ports, libraries or cases.
        Without names, every recorded case is compared.

    Returns:
      Whether no comparison differs.

    Raises:
      UserError: A name is unknown, nothing is recorded for it, or the device cannot run it.
    """
    chosen = comparisons(names)
    device = _device()
    _check_float64(chosen, device)
    print(f"on {device.device_kind} with jax {jax.__version__}")
    print("difference: the largest relative difference of any parameter after any step\n")
    width = max(len("optimizer"), *(len(_name(c)) for c in chosen))
    reference = max(len("reference"), *(len(short_reference(c.case.reference)) for c in chosen))
    print(
        f"{'optimizer':{width}}  {'reference':{reference}}  steps difference tolerance  verdict",
        flush=True,
    )
    agreements = []
    for c in chosen:
        agreement = follow(c.case, c.constructor, c.arguments)
        agreements.append(agreement)
        print(
            f"{_name(c):{width}}  {short_reference(c.case.reference):{reference}}  "
            f"{c.case.steps:5} {short_number(agreement.difference, 2):>10} "
            f"{short_number(c.case.rtol, 1):>9}  {_verdict(agreement)}",
            flush=True,
        )
    print("", *_notes(agreements), _total(agreements), sep="\n", flush=True)
    return all(a.agrees or a.within_noise for a in agreements)


def comparisons(names: Sequence[str] = ()) -> list[Comparison]:
    """Returns the comparisons that `verify` makes for these names, each once.

    Raises:
      UserError: A name is unknown, or nothing is recorded for it.
    """
    if not names:
        every = [Comparison(case, case.constructor, None) for case in recorded.cases()]
        return sorted(every, key=lambda c: (_name(c) not in registry.OPTIMIZERS, c.constructor))
    found = [comparison for name in names for comparison in _comparisons_of(name)]
    return list({(c.case.id, c.constructor): c for c in found}.values())


def short_reference(reference: str) -> str:
    """Returns whose code it is and its version, such as "google-research/albert b772393"."""
    plain = re.sub(r"\(.*?\)", "", reference)
    commit = re.search(r"@(\w+)", plain)
    if commit is None:
        return " ".join(plain.split()[:2])
    repository = plain.split()[0]
    whole = f"{repository} {commit[1]}"
    # A repository with a long name is shown without its owner.
    return whole if len(whole) <= _REFERENCE_WIDTH else whole.partition("/")[2]


def _comparisons_of(name: str) -> Iterator[Comparison]:
    short = catalogue.short_name(name)
    cases = {case.id: case for case in recorded.cases()}
    library, _, port = short.partition(".")
    if short in registry.OPTIMIZERS or port in catalogue.libraries().get(library, {}):
        found = catalogue.comparisons(short)
        if not found:
            raise UserError(f"no trajectory is recorded for {short}")
        yield from found
    elif short in catalogue.libraries():
        for port in catalogue.libraries()[short]:
            yield from catalogue.comparisons(f"{short}.{port}")
    elif name in cases:
        yield Comparison(cases[name], cases[name].constructor, None)
    else:
        raise catalogue.unknown("optimizer or case", name, [*catalogue.names(), *cases])


def _device() -> jax.Device:
    """Returns the device that JAX uses by default."""
    try:
        (device,) = jnp.zeros(()).devices()
    except RuntimeError as error:
        raise UserError(f"{_no_device()}: {error}") from error
    except AssertionError as error:  # JAX raises this, without a text, for some platforms
        raise UserError(_no_device()) from error
    return device


def _no_device() -> str:
    platforms = os.environ.get("JAX_PLATFORMS")
    return f"JAX finds no device{f' (JAX_PLATFORMS={platforms})' if platforms else ''}"


def _check_float64(chosen: Sequence[Comparison], device: jax.Device) -> None:
    double = sum(c.case.dtype == "float64" for c in chosen)
    if double and not _has_float64():
        raise UserError(
            f"{device.device_kind} does not compute in float64, which {double} of "
            f"{_trajectories(chosen)} need: set JAX_PLATFORMS=cpu to run them on the CPU"
        )


def _has_float64() -> bool:
    """Returns whether the device computes in more than float32, also by pairs of float32."""
    try:
        with jax.enable_x64(True):
            return float(jax.jit(lambda x: x + 2.0**-40)(jnp.ones(()))) > 1.0
    except RuntimeError:
        return False


def _name(comparison: Comparison) -> str:
    return catalogue.short_name(comparison.constructor)


def _verdict(agreement: Agreement) -> str:
    if agreement.agrees:
        return "agrees"
    return "noise" if agreement.within_noise else "DIFFERS"


def _notes(agreements: Sequence[Agreement]) -> list[str]:
    """Returns lines that name the cases that do not agree, and a blank line after them."""
    lines = []
    for a in agreements:
        if a.within_noise:
            noise = short_number(REFERENCE_NOISE[a.case.id], 1)
            lines += [
                f"noise: {a.case.id} is within the reference's own noise, {noise}: that code, run",
                "again, does not repeat its own recording to within the tolerance either",
            ]
        elif not a.agrees:
            lines.append(f"DIFFERS: {catalogue.short_name(a.optimizer)} from the case {a.case.id}")
    return [*lines, ""] if lines else []


def _total(agreements: Sequence[Agreement]) -> str:
    agree = sum(a.agrees for a in agreements)
    noise = sum(a.within_noise for a in agreements)
    differ = len(agreements) - agree - noise
    parts = [f"{agree} {'agrees' if agree == 1 else 'agree'}"]
    if noise:
        whose = "its reference's" if noise == 1 else "their references'"
        parts.append(f"{noise} within {whose} own noise")
    if differ:
        parts.append(f"{differ} {'differs' if differ == 1 else 'differ'}")
    return f"{_trajectories(agreements)}: {', '.join(parts)}"


def _trajectories(things: Sequence[object]) -> str:
    return f"{len(things)} recorded {'trajectory' if len(things) == 1 else 'trajectories'}"
