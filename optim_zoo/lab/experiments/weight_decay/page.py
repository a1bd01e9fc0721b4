"""The Markdown page: figures, seeds, spread, and a reading next to the published claim."""

from collections.abc import Mapping, Sequence

import numpy as np

from optim_zoo.lab.experiments.markdown import listed, opening, spread, table, wrapped
from optim_zoo.lab.experiments.weight_decay import two_coordinates
from optim_zoo.lab.experiments.weight_decay.maps import Map, Scale


def text(
    kept: Mapping[str, np.ndarray],
    maps: Sequence[Map],
    scale: Scale,
    seconds: float,
    *,
    quick: bool,
) -> str:
    """Returns the page.

    Args:
      kept: what each optimizer leaves of the two coordinates.
      maps: the map of every form of weight decay: L2, that of optax, that of the paper.
      scale: the size of the experiment.
      seconds: how long it took.
      quick: whether the page must say that its figures mean nothing.
    """
    blocks = [
        *opening(
            "L2 regularization compared with decoupled weight decay",
            "weight-decay",
            seconds,
            quick=quick,
        ),
        "## The claim",
        wrapped(
            """Loshchilov and Hutter ([arXiv 1711.05101](https://arxiv.org/abs/1711.05101)) claim
            that decoupled weight decay makes the best decay independent of the learning rate, which
            L2 does not, and that it lets Adam generalize better: the test error falls by 15 %,
            relative to L2, in their Figures 2 and 3 (ResNets on CIFAR-10)."""
        ),
        *_exact(kept),
        *_setting(maps, scale),
        *_best(maps),
        *_moving(maps),
        *_reading(maps),
    ]
    return "\n\n".join(blocks) + "\n"


def _exact(kept: Mapping[str, np.ndarray]) -> list[str]:
    rate, decay = two_coordinates.LEARNING_RATE, two_coordinates.WEIGHT_DECAY
    steps = two_coordinates.STEPS
    rows = [(name, *(f"{share:.4f}" for share in shares[-1])) for name, shares in kept.items()]
    return [
        "## What is exact: two coordinates",
        wrapped(
            f"""The loss is linear. The gradients of both coordinates have the same signs, and the
            sizes 1 and 100. Both coordinates start at 1. The table shows what remains of them after
            {steps:,} steps at learning rate {rate:g} and weight decay {decay:g}. It is the mean of
            two runs with opposite signs, in which the gradients of SGD and AdamW cancel exactly."""
        ),
        table(("optimizer", "gradient scale 1", "gradient scale 100"), *rows),
        wrapped(
            f"""With SGD, L2 regularization and decoupled decay are the same, and AdamW decays both
            coordinates like SGD: (1 - {rate:g} x {decay:g})^{steps} =
            {(1 - rate * decay) ** steps:.4f} remains. Adam divides the L2 term by the size of the
            gradients, so that the coordinate with the larger gradients is decayed less."""
        ),
        "![What remains of two coordinates, against steps](weight_decay_two_coordinates.png)",
    ]


def _setting(maps: Sequence[Map], scale: Scale) -> list[str]:
    return [
        "## What is measured: digits",
        wrapped(
            f"""An MLP (hidden layers: {scale.num_layers}, units of each: {scale.hidden_size})
            learns scikit-learn's handwritten digits from {scale.batches * scale.batch_size} images,
            few enough that it overfits without decay. A run has {scale.steps} steps of
            {scale.batch_size} images. The learning rate falls to 0 along a cosine, without warmup.
            Every form of decay has the same budget: {maps[0].loss.size} runs, for
            {len(scale.rates)} learning rates, {len(maps[0].form.decays)} decays and the seeds
            {", ".join(map(str, scale.seeds))}. A seed sets the initial parameters and the training
            images. The metrics are those of 297 held-out images after the last step. The best cells
            are chosen by the same images, so that their losses are slightly optimistic, for every
            form alike."""
        ),
        wrapped(
            """`adamw` multiplies the decay by the learning rate, as optax and torch do. In the
            paper both follow the same schedule, but the decay has a size of its own. The third map
            has the paper's form: its decay is `weight_decay` times the highest learning rate."""
        ),
        "![Maps of the loss and accuracy for learning rates and decays](weight_decay_maps.png)",
        wrapped(
            """*Means over the seeds: the loss above, the accuracy in per cent below. A frame marks
            the decay with the lowest loss at each learning rate; the red one is the lowest loss of
            the map.*"""
        ),
    ]


def _best(maps: Sequence[Map]) -> list[str]:
    rows = []
    for one in maps:
        decay, rate = one.best()
        rows.append(
            (
                one.form.title + _edge(one),
                f"{one.scale.rates[rate]:g}",
                f"{one.form.decays[decay]:g}",
                spread(one.loss[decay, rate], 1, 3),
                spread(one.accuracy[decay, rate], 100, 1),
                spread(one.loss[0, one.mean()[0].argmin()], 1, 3),
            )
        )
    head = ("form", "learning rate", "decay", "loss", "accuracy, %", "best loss without decay")
    return [
        "The cell of each map with the lowest mean loss: the mean, and the smallest and the "
        "largest value of the seeds.",
        table(head, *rows),
    ]


def _moving(maps: Sequence[Map]) -> list[str]:
    rates = [f"{rate:g}" for rate in maps[0].scale.rates]
    rows = []
    for one in maps:
        best = [f"{one.form.decays[index]:g}" for index in one.mean().argmin(0)]
        usable = f"{rates[one.usable()[0]]} to {rates[one.usable()[-1]]}"
        rows.append((one.form.title, *best, usable, spread(one.cost_of_moving(), 100, 0)))
    return [
        wrapped(
            """The decay with the lowest mean loss at each learning rate, and the cost of keeping a
            decay when the learning rate changes. The cost is how much higher the loss is than with
            the decay that is best at the new rate: the geometric mean over all ordered pairs of
            usable rates, for each seed. It is 0 if one decay is best at every rate. A rate is
            usable if its best loss is at most twice the lowest one of the map."""
        ),
        table(("form", *(f"rate {rate}" for rate in rates), "usable rates", "cost, %"), *rows),
    ]


def _reading(maps: Sequence[Map]) -> list[str]:
    l2, _, paper = maps
    costs = {one.form.title: 100 * one.cost_of_moving().mean() for one in maps}
    each = ", ".join(f"{cost:.0f} % ({title})" for title, cost in costs.items())
    shown = costs[paper.form.title] < costs[l2.form.title]
    scale = l2.scale
    points = [
        f"""Keeping a decay when the learning rate changes costs {each}. If the paper's claim held
        here, the cost of the paper's form would be close to 0, and below that of L2. It is
        {"below" if shown else "not below"} that of L2.""",
        _comparison(l2, paper),
        f"""This is one small model, {scale.batches * scale.batch_size} training images,
        {scale.steps} steps and {len(scale.seeds)} seeds. The figures say nothing about other models
        or longer runs.""",
    ]
    return ["## Reading", listed(points)]


def _comparison(l2: Map, one: Map) -> str:
    loss, loss_of_l2 = one.loss[one.best()], l2.loss[l2.best()]
    wrong, wrong_of_l2 = (100 - 100 * m.accuracy[m.best()].mean() for m in (one, l2))
    difference = 100 * (loss.mean() / loss_of_l2.mean() - 1)
    return f"""With both tuned, the held-out loss of {one.form.title} is {loss.mean():.3f}, and that
    of L2 is {loss_of_l2.mean():.3f}: a difference of {difference:+.0f} %. It is lower for
    {int((loss < loss_of_l2).sum())} of {len(loss)} seeds. The held-out errors are {wrong:.1f} % and
    {wrong_of_l2:.1f} %: a relative difference of {100 * (wrong / wrong_of_l2 - 1):+.0f} %."""


def _edge(one: Map) -> str:
    """Returns a note if the best cell is at an edge of the grid, where it may not be the best."""
    decay, rate = one.best()
    at = [
        name
        for name, index, size in (
            ("decay", decay, len(one.form.decays)),
            ("learning rate", rate, len(one.scale.rates)),
        )
        if index in (0, size - 1)
    ]
    return f" (at the edge of the grid: {' and '.join(at)})" if at else ""
