"""The reading of the figures, which says no more than they show."""

from collections.abc import Sequence

import numpy as np

from optim_zoo.lab import fits
from optim_zoo.lab.experiments import training
from optim_zoo.lab.experiments.batch_scaling.measuring import Noise, Result, Scale, Target
from optim_zoo.lab.experiments.markdown import listed

Panels = Sequence[Sequence[Target]]  # for all batch sizes, then for all but the largest


def of_adamw(panels: Panels) -> list[Target]:
    """Returns the targets of AdamW."""
    return [target for panel in panels for target in panel if target.optimizer.name == "adamw"]


def paragraphs(results: Sequence[Result], panels: Panels, noise: Noise, scale: Scale) -> list[str]:
    """Returns the heading and the points of the reading."""
    by_name = {result.optimizer.name: result for result in results}
    adamw, lamb = by_name["adamw"], by_name["lamb"]
    points = [
        _lowest(results, scale),
        _pairs(adamw, lamb, scale),
        _price(results, scale),
        _critical(panels, noise, scale),
        f"""This is one small model, {scale.examples:,} examples and {len(scale.seeds)} seeds, one
        of which has chosen the rates. It says nothing about BERT at batch 32,768.""",
    ]
    return ["## Reading", listed(points)]


def _lowest(results: Sequence[Result], scale: Scale) -> str:
    found = []
    for batch in scale.batches:
        best = min(results, key=lambda result: result.tuned[batch].best_losses.mean())
        found.append(f"{best.optimizer.title} at batch {batch:,}")
    return f"The lowest tuned loss is that of {', '.join(found)}."


def _pairs(adamw: Result, lamb: Result, scale: Scale) -> str:
    found = []
    for batch in scale.batches:
        a, b = adamw.tuned[batch].best_losses, lamb.tuned[batch].best_losses
        apart = a.max() < b.min() or b.max() < a.min()
        found.append(
            f"{b.mean() - a.mean():+.3f} at batch {batch:,}"
            + ("" if apart else " (the seeds overlap)")
        )
    return f"""LAMB's tuned loss minus that of AdamW: {", ".join(found)}. A claim that tuned AdamW
    fails at large batches where LAMB holds would need this to become clearly negative."""


def _price(results: Sequence[Result], scale: Scale) -> str:
    batch = scale.batches[-1]
    found = []
    for result in results:
        tuned = result.tuned[batch].best_losses.mean()
        if batch not in result.untuned:
            continue
        untuned = result.untuned_losses(batch).mean()
        cost = f"{untuned - tuned:+.3f}" if np.isfinite(untuned) else "divergence"
        found.append(f"{cost} ({result.optimizer.title})")
    return f"""At batch {batch:,}, the square-root rule instead of tuning costs, in nats:
    {", ".join(found)}."""


def _critical(panels: Panels, noise: Noise, scale: Scale) -> str:
    found = []
    for target in of_adamw(panels):
        at = noise.at(target)
        if isinstance(target.fit, fits.Fit) and at.size and np.isfinite(at).all():
            found.append(
                f"at a loss of {target.loss:.2f}, the fitted B_crit of AdamW is "
                f"{target.fit.critical_batch:,.0f} and the measured noise scale {at.mean():,.0f}, "
                f"a ratio of {target.fit.critical_batch / at.mean():.2g}{_in_warmup(target, scale)}"
            )
    if not found:
        return "The noise scale cannot be compared with B_crit: one of them was not measurable."
    return f"""McCandlish et al. expect the noise scale and B_crit to agree within a small factor:
    {"; ".join(found)}. Where a target is reached within the warmup, the warmup sets the number of
    steps, so that neither agreement nor disagreement says much."""


def _in_warmup(target: Target, scale: Scale) -> str:
    """Returns a clause that lists the batch sizes whose runs reach a target within the warmup."""
    within = [
        f"{batch:,}"
        for batch, steps in target.steps.items()
        if steps and np.mean(steps) <= training.WARMUP * scale.steps(batch)
    ]
    return f" (reached within the warmup at batch {' and '.join(within)})" if within else ""
