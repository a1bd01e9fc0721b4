"""The Markdown page: figures, seeds, spread, and a reading next to the published claim."""

import os
import textwrap
from collections.abc import Sequence

import numpy as np

from optim_zoo.lab.experiments.warmup.training import Measured, Scale, multiplier


def text(measured: Sequence[Measured], scale: Scale, seconds: float, *, quick: bool) -> str:
    """Returns the page.

    Args:
      measured: each optimizer with and then without bias correction.
      scale: the size of the experiment.
      seconds: how long it took.
      quick: whether the page must say that its figures mean nothing.
    """
    pairs = list(zip(measured[::2], measured[1::2], strict=True))
    blocks = [
        "# Warmup in place of bias correction",
        *(["**A quick run: its figures mean nothing.**"] if quick else []),
        f"```sh\noptim-zoo reproduce warmup{' --quick' if quick else ''}\n```",
        _wrapped(
            f"""The command wrote this page in {seconds:.0f} seconds, on a machine with
            {os.cpu_count()} CPU cores that other programs may have used too."""
        ),
        "## The claim",
        _wrapped(
            """The AdamW of BERT ([arXiv 1810.04805](https://arxiv.org/abs/1810.04805)) has no bias
            correction, and neither have many implementations for large batches: the learning rate
            warms up anyway, and the warmup is said to make the correction unnecessary."""
        ),
        *_exact(measured, scale),
        *_losses(pairs, scale),
        *_reading(pairs, scale),
    ]
    return "\n\n".join(blocks) + "\n"


def _wrapped(paragraph: str, indent: str = "") -> str:
    return textwrap.fill(
        " ".join(paragraph.split()), 120, subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _table(*rows: Sequence[str]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _exact(measured: Sequence[Measured], scale: Scale) -> list[str]:
    exact = multiplier(np.arange(1, scale.steps + 1))
    off = {}
    for one in measured:
        if one.corrected:
            found = one.ratio[0, one.best(0)]
            off[one.form.name] = (float(np.abs(found / exact - 1).max()), found.max())
    return [
        "## What is exact: the multiplier",
        _wrapped(
            f"""Without correction, Adam's direction at step t is (1 - b1^t) / sqrt(1 - b2^t) times
            that with it, except for eps. With b1 = 0.9 and b2 = 0.999 this is 3.16 at the first
            step, at most 6.57 at step 12, and {exact[-1]:.2f} at step {scale.steps}, the last one
            here. LAMB scales the direction of a layer to the norm of its parameters, so that the
            multiplier cancels where a layer is adapted; biases and the scales of LayerNorm are
            not."""
        ),
        "![The ratio of the norms of both updates, against steps](warmup_ratios.png)",
        _wrapped(
            f"""*Measured in the runs with correction and without warmup, at the best learning rate:
            at every step, both updates are computed from the same parameters and gradients, and
            the one with correction is made. Lines are means over the seeds; the band of all seeds
            is too narrow to see where they agree. The ratio of AdamW differs from the multiplier by
            at most {100 * off["adamw"][0]:.1f} % (eps, weight decay); that of LAMB is at most
            {off["lamb"][1]:.2f}.*"""
        ),
    ]


def _losses(pairs: Sequence[tuple[Measured, Measured]], scale: Scale) -> list[str]:
    rows = []
    for pair in pairs:
        for one in pair:
            for index, warmup in enumerate(scale.warmups):
                rate = one.best(index)
                at_edge = rate in (0, len(one.form.rates) - 1)
                rows.append(
                    (
                        one.title,
                        f"{100 * warmup:g} %",
                        f"{one.form.rates[rate]:g}{' (at the edge)' if at_edge else ''}",
                        _spread(one.loss[index, rate]),
                        str(int((~np.isfinite(one.loss[index])).sum())),
                    )
                )
    form = pairs[0][0].form
    count = len(form.rates) * len(scale.seeds)
    return [
        "## What is measured: a byte language model",
        _wrapped(
            f"""A causal transformer (layers: {scale.model.num_layers}, hidden size:
            {scale.model.hidden_size}) predicts the next byte of the source of Python's standard
            library. A run has {scale.steps} steps of {scale.batch_size} windows of 32 bytes. The
            learning rate rises linearly during the warmup and then falls to 0 along a cosine. Every
            optimizer, with and without correction, at every warmup has the same budget: {count}
            runs, for {len(form.rates)} rates and the seeds {", ".join(map(str, scale.seeds))}. Both
            optimizers have b1 = 0.9, b2 = 0.999, eps = 1e-6, weight decay 0.01, and neither decay
            nor layer adaptation of biases and norms. AdamW without correction is then
            `bert_adamw`."""
        ),
        "![Held-out loss against the learning rate](warmup_losses.png)",
        _wrapped(
            """*Means over the seeds, with a bar from the lowest to the highest. Lines are moved
            sideways so that they do not cover each other.*"""
        ),
        "The learning rate with the lowest mean loss: the mean, and the smallest and the largest "
        "value of the seeds.",
        _table(("optimizer", "warmup", "rate", "loss, nats", "diverged runs"), *rows),
    ]


def differences(pair: tuple[Measured, Measured], warmup: int) -> np.ndarray:
    """Returns how much higher the loss without correction is, for each seed, (seeds,).

    Both variants have their own best learning rate.
    """
    with_it, without = (one.loss[warmup, one.best(warmup)] for one in pair)
    return without - with_it


def _reading(pairs: Sequence[tuple[Measured, Measured]], scale: Scale) -> list[str]:
    lines = []
    for pair in pairs:
        parts = []
        for index, warmup in enumerate(scale.warmups):
            each = differences(pair, index)
            parts.append(
                f"{each.mean():+.3f} nats ({each.min():+.3f} to {each.max():+.3f}) with a warmup "
                f"of {100 * warmup:g} %"
            )
        lines.append(
            f"- {pair[0].form.title}, each variant at its own best rate: without correction the "
            f"loss changes by {', '.join(parts)}. {_verdict(pair, scale)}"
        )
        highest = [pair[1].loss[i, -1].mean() - pair[0].loss[i, -1].mean()
                   for i in range(len(scale.warmups))]  # fmt: skip
        shown = ", ".join(f"{x:+.3f}" if np.isfinite(x) else "diverged" for x in highest)
        lines.append(
            f"- {pair[0].form.title} at the highest rate tried, {pair[0].form.rates[-1]:g}: the "
            f"changes are {shown} nats at the same warmups."
        )
    lines.append(_caveat(pairs, scale))
    lines.append(
        f"- This is one small model, {scale.steps} steps and {len(scale.seeds)} seeds, with "
        f"{len(pairs[0][0].form.rates)} learning rates each. The figures say nothing about other "
        "models, larger batches or longer runs."
    )
    return ["## Reading", "\n".join(_wrapped(line, "  ") for line in lines)]


def _caveat(pairs: Sequence[tuple[Measured, Measured]], scale: Scale) -> str:
    """Returns how often the best rate is at an edge of the grid, and what it means."""
    at_edge = [
        one.best(i) in (0, len(one.form.rates) - 1)
        for pair in pairs
        for one in pair
        for i in range(len(scale.warmups))
    ]
    text = (
        f"- The best rate is the lowest or the highest one tried in {sum(at_edge)} of "
        f"{len(at_edge)} cases. "
    )
    if any(at_edge):
        text += "A rate outside the grid may be better, and the changes above would then differ. "
    last = multiplier(np.array([scale.steps]))[0]
    return text + (
        f"In the last step the multiplier is still {last:.2f}: in a run this short, leaving the "
        "correction out raises the learning rate of AdamW in every step, also after the warmup."
    )


def _verdict(pair: tuple[Measured, Measured], scale: Scale) -> str:
    """Returns whether the loss without correction is higher for all seeds, at which warmups."""
    worse = [
        f"{100 * warmup:g} %"
        for index, warmup in enumerate(scale.warmups)
        if (differences(pair, index) > 0).all()
    ]
    if not worse:
        return "At no warmup it is higher for every seed."
    return (
        f"It is higher for every seed at a warmup of {' and '.join(worse)} only."
        if len(worse) < len(scale.warmups)
        else "It is higher for every seed at every warmup."
    )


def _spread(values: np.ndarray) -> str:
    low, mean, high = (float(f(values)) for f in (np.min, np.mean, np.max))
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"
