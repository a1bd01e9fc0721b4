"""The Markdown page: figures, seeds, spread, and a reading next to the published figures."""

from collections.abc import Sequence

import numpy as np

from optim_zoo.lab import fits
from optim_zoo.lab.experiments import training
from optim_zoo.lab.experiments.batch_scaling import measuring, reading
from optim_zoo.lab.experiments.batch_scaling.measuring import Noise, Result, Scale
from optim_zoo.lab.experiments.markdown import opening, spread, table, wrapped


def text(
    results: Sequence[Result],
    panels: reading.Panels,
    noise: Noise,
    scale: Scale,
    seconds: float,
    *,
    quick: bool,
) -> str:
    """Returns the page.

    Args:
      results: the runs of every optimizer.
      panels: the steps to a target that is reached at all batch sizes, and to one that is reached
        at all but the largest.
      noise: the measured gradient noise scale.
      scale: the size of the experiment.
      seconds: how long its runs took.
      quick: whether the page must say that its figures mean nothing.
    """
    blocks = [
        *opening("Batch size and optimizer", "batch-scaling", seconds, quick=quick),
        "## The claim",
        wrapped(
            """You et al. (LAMB, [arXiv 1904.00962](https://arxiv.org/abs/1904.00962)) pretrain BERT
            and compare the F1 on SQuAD: 90.395 for the AdamW baseline at batch 512, and 91.460 for
            LAMB at batch 32,768, whose learning rate follows the square root of the batch size
            without being tuned again. They report that AdamW stops scaling beyond batch 512. Nado
            et al. ([arXiv 2102.06356](https://arxiv.org/abs/2102.06356)) tune Adam at batch 32,768
            and report that it matches LAMB there."""
        ),
        *_setting(results, scale),
        *_tuned(results, scale),
        *_untuned(results, scale),
        *_exponents(results),
        *_steps(panels, scale),
        *_noise(panels, noise),
        *reading.paragraphs(results, panels, noise, scale),
    ]
    return "\n\n".join(blocks) + "\n"


def _setting(results: Sequence[Result], scale: Scale) -> list[str]:
    model = scale.model
    lengths = ", ".join(f"{scale.steps(b):,} steps of {b:,}" for b in scale.batches)
    settings = "; ".join(f"{r.optimizer.title}: {r.optimizer.settings}" for r in results)
    middles = ", ".join(f"{measuring.MIDDLES[r.optimizer.name]:g} ({r.optimizer.title})"
                        for r in results)  # fmt: skip
    return [
        "## What is measured",
        wrapped(
            f"""A causal transformer ({model.num_layers} layers, hidden size {model.hidden_size})
            predicts the next byte of the standard library's source in windows of
            {scale.sequence_length} bytes. Every run sees the same {scale.examples:,} windows of its
            seed in the same order: {lengths}. The learning rate rises linearly over
            {100 * training.WARMUP:.0f} % of the steps, then falls linearly to 0. The loss is that
            of 2,000 held-out windows after the last step."""
        ),
        wrapped(
            f"""{settings}. Biases and norms are neither decayed nor given a trust ratio. Muon and
            AdamH are not in this library, and so are not compared."""
        ),
        wrapped(
            f"""Every optimizer has the same budget at every batch size: {scale.budget} learning
            rates with seed {scale.seeds[0]}, then the seeds {", ".join(map(str, scale.seeds))} at
            the best one. The first {scale.rates} rates are a grid in steps of the square root of
            10, whose middle at batch {scale.batches[0]} is {middles} and grows with the square root
            of the batch size. The others refine the best rate, or extend the grid where the best is
            at its end. A best rate that is still at the end of the tried ones is marked, and is not
            drawn as the best. The rates are chosen by the same held-out windows, so that the losses
            are slightly optimistic, for every optimizer alike."""
        ),
    ]


def _tuned(results: Sequence[Result], scale: Scale) -> list[str]:
    rows = []
    for result in results:
        cells = []
        for batch in scale.batches:
            tuned = result.tuned[batch]
            edge = "" if tuned.interior else ", at the edge of the tried rates"
            cells.append(
                "all runs diverged"
                if tuned.best is None
                else f"{spread(tuned.best_losses, 1, 3)} at {tuned.best:g}{edge}"
            )
        rows.append((result.optimizer.title, *cells))
    return [
        "## Tuned at every batch size",
        "![The held-out loss of each optimizer against the batch size](batch_scaling_loss.png)",
        "The held-out loss in nats per byte: the mean over the seeds, the smallest and the largest "
        "value, and the best\nlearning rate.",
        table(("optimizer", *(f"batch {batch:,}" for batch in scale.batches)), *rows),
    ]


def _untuned(results: Sequence[Result], scale: Scale) -> list[str]:
    rows = []
    for result in results:
        cells = []
        for batch in scale.batches[1:]:
            if batch not in result.untuned:
                cells.append("no best rate")
                continue
            (rate,) = {row["learning_rate"] for row in result.untuned[batch]}
            values = result.untuned_losses(batch)
            cells.append(
                f"{spread(values, 1, 3)} at {rate:g}"
                if np.isfinite(values).all()
                else f"diverged at {rate:g}"
            )
        rows.append((result.optimizer.title, *cells))
    return [
        "## Untuned, by the square-root rule",
        wrapped(
            f"""The best rate at batch {scale.batches[0]}, times the square root of the ratio of the
            batch sizes. These are the dashed lines."""
        ),
        table(("optimizer", *(f"batch {batch:,}" for batch in scale.batches[1:])), *rows),
    ]


def _exponents(results: Sequence[Result]) -> list[str]:
    rows = []
    for result in results:
        p = result.exponent()
        used = sum(tuned.interior for tuned in result.tuned.values())
        rows.append((result.optimizer.title, "-" if p is None else f"{p:.2f}", str(used)))
    return [
        "## How the best learning rate grows",
        wrapped(
            """The exponent p of the least-squares line through the best rates, rate ~ batch^p. The
            square-root rule has 0.5. Neighbouring rates differ by a factor of about 1.8, which
            alone changes p by about 0.1."""
        ),
        table(("optimizer", "exponent p", "batch sizes used"), *rows),
    ]


def _steps(panels: reading.Panels, scale: Scale) -> list[str]:
    rows = []
    for target in (target for panel in panels for target in panel):
        cells = [
            f"{np.mean(target.steps[b]):.0f}" if target.steps.get(b) else "-" for b in scale.batches
        ]
        fit = target.fit
        end = (
            [
                _with_interval(fit.least_steps, fit.least_steps_interval),
                _with_interval(fit.critical_batch, fit.critical_batch_interval),
            ]
            if isinstance(fit, fits.Fit)
            else [f"no fit: {fit}", "-"]
        )
        loss = "-" if target.loss is None else f"{target.loss:.2f}"
        rows.append((target.optimizer.title, loss, *cells, *end))
    head = ("optimizer", "target", *(f"batch {b:,}" for b in scale.batches), "S_min", "B_crit")
    return [
        "## Steps to a target",
        wrapped(
            """Every optimizer has two targets: the training loss that all its tuned runs reach, and
            the one that they reach at all batch sizes but the largest. Every example is new to the
            model, so that this is no loss of memorized text. The fit is S(B) = S_min (1 + B_crit/B)
            ([arXiv 1812.06162](https://arxiv.org/abs/1812.06162)), with 95 % intervals from a
            bootstrap over the seeds."""
        ),
        "![Steps to the target against the batch size](batch_scaling_steps.png)",
        table(head, *rows),
        wrapped(
            """The schedule is made for the whole run and not for the shortest way to the target.
            The largest batch reaches it at its end, where the learning rate has fallen; a small
            batch reaches it early, while the rate is high or still rises. The steps to a target are
            therefore not the fewest possible ones, as the formula has them, and B_crit is no more
            than an order of magnitude."""
        ),
    ]


def _with_interval(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:,.0f}" + (f" ({interval[0]:,.0f} to {interval[1]:,.0f})" if interval else "")


def _noise(panels: reading.Panels, noise: Noise) -> list[str]:
    head = tuple(f"after {100 * fraction:.0f} %" for fraction in measuring.NOISE_AT)
    rows = [
        (
            "-" if target.loss is None else f"{target.loss:.2f}",
            _critical_batch(target.fit),
            _noise_cell(noise.at(target)),
        )
        for target in reading.of_adamw(panels)
    ]
    return [
        "## The gradient noise scale",
        wrapped(
            f"""Measured during runs of AdamW at batch {noise.batch:,} and its best rate
            {noise.rate:g}, by `accumulation.accumulate(..., noise_scale=True,
            noise_decay={measuring.NOISE_DECAY})` ([how](../noise_scale.md)), in examples: the mean
            over the seeds, the smallest and the largest value. It is an average over about
            {1 / (1 - measuring.NOISE_DECAY):.0f} steps, and grows as the loss falls."""
        ),
        table(head, tuple(_noise_cell(column) for column in noise.during().T)),
        wrapped(
            f"""The fitted B_crit of AdamW, next to the noise scale at the step where the run at
            batch {noise.batch:,} reaches the same loss:"""
        ),
        table(("target", "fitted B_crit", "noise scale at the target"), *rows),
    ]


def _critical_batch(fit: fits.Fit | str) -> str:
    if isinstance(fit, str):
        return "no fit"
    return _with_interval(fit.critical_batch, fit.critical_batch_interval)


def _noise_cell(values: np.ndarray) -> str:
    if not values.size:
        return "-"
    finite = values[np.isfinite(values)]
    if not finite.size:
        return "not measurable"
    left = len(values) - len(finite)
    return spread(finite, 1, 0) + (f", without {left} that are infinite" if left else "")
