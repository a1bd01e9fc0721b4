"""The Markdown page: figures, seeds, spread, and a reading next to the published claim."""

from collections.abc import Sequence

import numpy as np

from optim_zoo.lab.experiments import training
from optim_zoo.lab.experiments.lars_lamb.measuring import KINDS, Kind, Result, Scale
from optim_zoo.lab.experiments.markdown import listed, opening, spread, table, wrapped

_USABLE = 0.1  # a rate is usable if its loss is at most 10 % above the best one


def text(results: Sequence[Result], scale: Scale, seconds: float, *, quick: bool) -> str:
    """Returns the page.

    Args:
      results: the search of every optimizer on both tasks.
      scale: the size of the experiment.
      seconds: how long its runs took.
      quick: whether the page must say that its figures mean nothing.
    """
    blocks = [
        *opening("LARS and LAMB on attention and on images", "lars-lamb", seconds, quick=quick),
        "## The claim",
        wrapped(
            """You et al. (LAMB, [arXiv 1904.00962](https://arxiv.org/abs/1904.00962)) find that
            LARS ([arXiv 1708.03888](https://arxiv.org/abs/1708.03888)), which was made for
            convolutional networks on images, performs poorly on attention models such as BERT,
            while LAMB works on both."""
        ),
        *_setting(results, scale),
        "![The held-out loss against the learning rate](lars_lamb.png)",
        wrapped(
            """*The mean over the seeds, in a band from the lowest to the highest. A diamond is the
            best rate, where rates were tried on both sides of it.*"""
        ),
        *_table(results),
        *_reading(results, scale),
    ]
    return "\n\n".join(blocks) + "\n"


def _setting(results: Sequence[Result], scale: Scale) -> list[str]:
    settings = "; ".join(
        f"{r.optimizer.title}: {r.optimizer.settings}" for r in results if r.kind is KINDS[0]
    )
    steps = scale.examples // scale.batch
    return [
        "## What is measured",
        wrapped(
            f"""Attention: a causal transformer ({scale.model.num_layers} layers, hidden size
            {scale.model.hidden_size}) predicts the next byte of the standard library's source.
            Images: an MLP (hidden layers: {scale.mlp.num_layers}, units of each:
            {scale.mlp.hidden_size}) classifies scikit-learn's digits. A run has {steps} steps of
            {scale.batch} examples. The learning rate rises linearly over
            {100 * training.WARMUP:.0f} % of them, then falls linearly to 0. The loss is that of
            held-out examples after the last step."""
        ),
        wrapped(f"{settings}. Biases and norms are neither decayed nor given a trust ratio."),
        wrapped(
            f"""The budget is equal: {scale.budget} learning rates for each optimizer and task, each
            with the seeds {", ".join(map(str, scale.seeds))}. The first {scale.rates} are a grid in
            steps of the square root of 10; the others refine the best rate, or extend the grid
            where the best is at its end."""
        ),
    ]


def _table(results: Sequence[Result]) -> list[str]:
    rows = []
    for result in results:
        tuned = result.tuned
        if tuned.best is None:
            rows.append((result.kind.title, result.optimizer.title, "all diverged", "-", "-", "-"))
            continue
        accuracy = np.array([row["accuracy"] for row in tuned.rows[tuned.best]])
        rows.append(
            (
                result.kind.title,
                result.optimizer.title,
                f"{tuned.best:g}" + ("" if tuned.interior else " (at the edge)"),
                spread(tuned.best_losses, 1, 3),
                spread(accuracy, 100, 1),
                f"{_usable(result):.1f}",
            )
        )
    head = ("task", "optimizer", "best rate", "loss", "accuracy, %", "usable range")
    return [
        wrapped(
            """The mean over the seeds, and the smallest and the largest value. The usable range is
            the ratio of the largest to the smallest tried rate with a mean loss of at most 1.1
            times the best one."""
        ),
        table(head, *rows),
    ]


def _usable(result: Result) -> float:
    best = result.tuned.best_losses.mean()
    rates = [
        rate
        for rate in result.tuned.rows
        if result.tuned.losses(rate).mean() <= (1 + _USABLE) * best
    ]
    return max(rates) / min(rates)


def _reading(results: Sequence[Result], scale: Scale) -> list[str]:
    points = [
        *(_compared(results, kind) for kind in KINDS),
        _claim(results),
        f"""These are two small models, {scale.examples // scale.batch} steps and
        {len(scale.seeds)} seeds at one batch size. An MLP has no convolutions, and the figures say
        nothing about large batches.""",
    ]
    return ["## Reading", listed(points)]


def _compared(results: Sequence[Result], kind: Kind) -> str:
    own = {r.optimizer.name: r for r in results if r.kind is kind}
    lars, lamb = (own[name].tuned.best_losses for name in ("lars", "lamb"))
    order = sorted(own.values(), key=lambda result: result.tuned.best_losses.mean())
    names = ", ".join(result.optimizer.title for result in order)
    if not np.isfinite([lars.mean(), lamb.mean()]).all():
        return f"On {kind.title}, from the lowest loss: {names}."
    apart = lars.min() > lamb.max() or lamb.min() > lars.max()
    return f"""On {kind.title}, LARS has a loss of {lars.mean():.3f} and LAMB of {lamb.mean():.3f},
    a difference of {100 * (lars.mean() / lamb.mean() - 1):+.1f} %; the seeds
    {"do not overlap" if apart else "overlap"}. From the lowest loss: {names}."""


def _claim(results: Sequence[Result]) -> str:
    attention = KINDS[0]
    own = {r.optimizer.name: r.tuned.best_losses for r in results if r.kind is attention}
    behind = own["lars"].min() > own["lamb"].max()
    seen = "LARS is behind LAMB there for every seed" if behind else "LARS is not behind LAMB there"
    return f"""The claim would have LARS clearly behind LAMB on attention: {seen}, with the learning
    rates tuned alike, with biases and norms left out of the trust ratio, and with LARS's trust
    coefficient and momentum as above."""
