"""The Markdown page: figures, seeds, spread, and a reading next to the published figures."""

import os

import numpy as np

from optim_zoo.lab.experiments.fine_tuning_zero import exact
from optim_zoo.lab.experiments.fine_tuning_zero.arms import BASE, FIRST_SYNC, Arm
from optim_zoo.lab.experiments.fine_tuning_zero.results import Results
from optim_zoo.lab.experiments.markdown import listed, spread, table, wrapped

_NAMES = {BASE: "BERT's AdamW", "lifeiteng.RAdam": "RAdam", "lookahead": "Lookahead of Adam"}


def text(results: Results, baseline: float, words: str, pretraining: float, *, quick: bool) -> str:
    """Returns the page.

    Args:
      results: all runs.
      baseline: the F1 of giving every word the most frequent tag.
      words: how many words there are to train on, and how many are held out.
      pretraining: how long the steps of the pretrained run took, in seconds; 0 without one.
      quick: whether the page must say that its figures mean nothing.
    """
    blocks = [
        "# Why Lookahead and Ranger scored zero when fine-tuning BERT",
        *(["**A quick run: its figures mean nothing.**"] if quick else []),
        f"```sh\noptim-zoo reproduce fine-tuning-zero{' --quick' if quick else ''}\n```",
        _time(results, pretraining),
        "## The question",
        wrapped(
            """A report on fine-tuning a Chinese BERT for named entities, with public TensorFlow
            repositories, gives an F1 of 0 to 30 % with RAdam, Lookahead and Ranger, where AdamW
            reaches 98 %. Its figures are not ours. Two causes are possible:"""
        ),
        listed(
            (
                """The slow weights of Lookahead start at zero in three public TensorFlow
                repositories (lifeiteng/Optimizers, michaelrzhang/lookahead,
                jyhengcoder/Ranger_tensorflow). The first synchronization therefore shrinks the
                pretrained parameters to alpha times their value.""",
                """With the same learning rate, these optimizers move the parameters less than
                BERT's AdamW, which has no bias correction.""",
            )
        ),
        *_exact(results),
        *_setting(results, words),
        *_table(results),
        *_reading(results, baseline),
    ]
    return "\n\n".join(blocks) + "\n"


def _time(results: Results, pretraining: float) -> str:
    minutes = sum(row.seconds for row in results.rows) / 60
    before = (
        f"""Pretraining, which the command does first, took {pretraining / 60:.0f} minutes (the
        config states the time on two free cores); a finished run of `configs/bert_tiny_lamb.toml`
        that is copied or linked to `pretrained` in the folder saves it."""
        if pretraining
        else ""
    )
    return wrapped(
        f"""Its {len(results.rows)} runs of fine-tuning took {minutes:.0f} minutes together, on a
        machine with {os.cpu_count()} CPU cores that other programs used too. {before}"""
    )


def _exact(results: Results) -> list[str]:
    scale = results.scale
    constant = exact.movements(exact.constant, exact.STEPS)
    under_schedule = exact.movements(exact.schedule(scale), scale.steps)
    head = (
        "optimizer",
        f"constant rate, {exact.STEPS:,} steps",
        f"our schedule, {scale.steps} steps",
    )
    moved = [
        (
            _NAMES.get(name, "Ranger"),
            *(f"1/{each[BASE] / each[name]:.1f}" for each in (constant, under_schedule)),
        )
        for name in exact.MOVING[1:]
    ]
    kept = [
        (
            name if "." in name else f"{name.capitalize()}, repaired",
            f"{FIRST_SYNC[name][1]}",
            f"{share:.1f}",
        )
        for name, share in exact.kept_by_first_sync().items()
    ]
    return [
        "## What is exact",
        """What the first synchronization leaves of a parameter, at learning rate 0:""",
        table(("optimizer", "after step", "share that remains"), *kept),
        wrapped(
            """How far a parameter moves whose gradient is always the same, compared with BERT's
            AdamW at the same learning rate. Without bias correction, Adam's early steps are several
            times as large; RAdam makes them smaller; Lookahead goes half of the way back."""
        ),
        table(head, *moved),
    ]


def _setting(results: Results, words: str) -> list[str]:
    scale = results.scale
    return [
        "## What is measured: tags of Python source",
        wrapped(
            f"""The BERT-tiny of `configs/bert_tiny_lamb.toml` is fine-tuned to [tag the words of
            Python source](../tagging.md) ({words}), with the settings of
            `configs/tag_python.toml`, but with {scale.steps} steps of {scale.batch_size} sequences.
            The learning rate rises for {scale.warmup_steps} steps to {results.rate:g} and then
            falls to 0 linearly. The seeds are {", ".join(map(str, scale.seeds))}; a seed sets the
            classifier's initial parameters, the order of the examples, and dropout. All gradients
            are clipped to the norm 1. The optimizers have the defaults of their repositories, and
            Lookahead is around TensorFlow's Adam. The repaired ones have the same settings, but
            slow weights that start as the parameters."""
        ),
        wrapped(
            """Those with a raised learning rate have that of BERT's AdamW, divided by how far the
            optimizer (the repaired one) moved at the rate of BERT's AdamW, compared with it. They
            still move less far than BERT's AdamW, because the distance grows more slowly than the
            learning rate."""
        ),
        "![F1 of every optimizer against steps](fine_tuning_zero_f1.png)",
        wrapped(
            f"""*Means over the seeds, on one of {scale.part} held-out batches; the bands reach from
            the smallest to the largest. Dashed: slow weights that start at zero.*"""
        ),
        "![Distance from the start, and norm, against steps](fine_tuning_zero_movement.png)",
        "*All parameters but those of the classifier, at the learning rate of BERT's AdamW.*",
    ]


def _table(results: Results) -> list[str]:
    rows = [
        (
            arm.title + (", raised rate" if arm.raised_from else ""),
            f"{results.of(arm.name)[0].learning_rate:.2g}",
            spread(results.values(arm.name, "f1"), 100, 1),
            f"{results.movement(arm.name):.2f}" if arm.pretrained else "",
            _kept(results, arm),
        )
        for arm in results.arms()
    ]
    head = ("optimizer", "learning rate", "F1, %", "movement", "norm kept")
    return [
        wrapped(
            """F1 after the last step on all held-out words: the mean, and the smallest and the
            largest value of the seeds. *Movement* is the distance between the last and the first
            parameters, divided by that of BERT's AdamW; with slow weights that start at zero, most
            of it is the loss of norm. *Norm kept* is the norm of the parameters after the first
            synchronization, divided by that one step before."""
        ),
        table(head, *rows),
    ]


def _kept(results: Results, arm: Arm) -> str:
    if arm.optimizer not in FIRST_SYNC:
        return ""
    step = FIRST_SYNC[arm.optimizer][1]
    norm = results.values(arm.name, "norm")
    return f"{np.mean(norm[:, step] / norm[:, step - 1]):.3f}"


def _reading(results: Results, baseline: float) -> list[str]:
    f1 = {arm.name: 100 * float(results.values(arm.name, "f1").mean()) for arm in results.arms()}
    titles = {arm.name: arm.title for arm in results.arms()}
    slow = [name for name in ("radam", "lookahead", "ranger") if name in f1]
    moved = ", ".join(f"1/{1 / results.movement(name):.1f} ({titles[name]})" for name in slow)
    equal = ", ".join(f"{f1[name]:.1f}" for name in slow)
    raised = ", ".join(f"{f1[f'{name}_raised']:.1f}" for name in slow)
    zero = [name for name in ("lookahead", "ranger") if name in f1]
    starts = " and ".join(
        f"{titles[f'{name}_zero']} reaches {f1[f'{name}_zero_raised']:.1f} % instead of "
        f"{f1[f'{name}_raised']:.1f} %"
        for name in zero
    )
    both = " and ".join(f"{f1[f'{name}_zero']:.1f} % ({titles[f'{name}_zero']})" for name in zero)
    by_rate = f1["ranger_raised"] - f1["ranger"]
    by_zero = f1["ranger_raised"] - f1["ranger_zero_raised"]
    larger = "movement" if by_rate > by_zero else "start at zero"
    low = sum(value < 30 for name, value in f1.items() if name != "scratch")
    points = [
        f"""**The smaller movement.** At the learning rate of BERT's AdamW, the optimizers without a
        start at zero move the following parts of its distance: {moved}. They reach an F1 of {equal}
        %, where BERT's AdamW reaches {f1[BASE]:.1f} %. With a raised learning rate they reach
        {raised} %.""",
        f"""**The start at zero.** With the raised rate, {starts}. Without pretraining, BERT's AdamW
        reaches {f1["scratch"]:.1f} %.""",
        f"""**Both together**, as published and at the learning rate of BERT's AdamW: {both}. The
        most frequent tag for every word has {100 * baseline:.1f} %.""",
        f"""For Ranger, the rate costs {by_rate:.1f} points of F1 (repaired, the raised rate against
        that of BERT's AdamW), and the start at zero {by_zero:.1f} (the raised rate, repaired
        against published). Here the larger cause is the {larger}.""",
        f"""{low or "None"} of our optimizers {"has" if low in (0, 1) else "have"} an F1 below 30 %.
        The most frequent tag of our text is an entity. Where it is `O`, as in most texts with named
        entities, a tagger that gives it to every word has an F1 of 0; that the report's taggers did
        so is not shown here.""",
        f"""This is one small model, {results.scale.steps} steps, one learning rate of BERT's AdamW
        and {len(results.scale.seeds)} seeds. A larger model, or a smaller learning rate, was not
        measured.""",
    ]
    return ["## Reading", listed(points)]
