"""Why Lookahead and Ranger scored zero when fine-tuning BERT.

``settings`` and ``arms`` have what is compared, ``exact`` what needs no training, ``training``
trains, ``results`` keeps the figures, ``figures`` draws, ``page`` writes.
"""

from pathlib import Path

from optim_zoo.lab.experiments import Say
from optim_zoo.lab.experiments.fine_tuning_zero import figures, page, training
from optim_zoo.lab.experiments.fine_tuning_zero.arms import ARMS, QUICK_ARMS
from optim_zoo.lab.experiments.fine_tuning_zero.results import Results, Row
from optim_zoo.lab.experiments.fine_tuning_zero.settings import FINE_TUNING, FULL, QUICK
from optim_zoo.train.files import replace_file


def run(folder: Path, *, quick: bool, say: Say) -> Path:
    """Runs the experiment, and returns the path of its page.

    It first pretrains, in ``folder/pretrained``, unless that folder or link already holds a
    finished run of ``configs/bert_tiny_lamb.toml``. Started again after it was stopped, it makes
    only what is missing.

    Args:
      folder: an existing folder, for ``results.jsonl``, two PNGs, ``fine_tuning_zero.md``, the
        pretrained run and the tagged text.
      quick: whether to train a small model that is not pretrained, for few steps.
      say: prints a line.
    """
    scale = QUICK if quick else FULL
    if not quick:
        training.pretrain(folder / "pretrained")
    results = Results(folder / "results.jsonl", scale, FINE_TUNING["schedule"]["learning_rate"])
    bench = training.Bench(scale, folder)
    for arm in QUICK_ARMS if quick else ARMS:
        rate = results.rate_of(arm)
        for seed in scale.seeds:
            if results.has(arm, rate, seed):
                continue
            curve = bench.train(arm.optimizer, rate, seed, pretrained=arm.pretrained)
            results.add(Row.of(arm, rate, seed, scale, curve))
            say(
                f"{arm.title}: learning rate {rate:.2g}, seed {seed}, F1 {curve.f1:.3f}, "
                f"{curve.seconds:.0f} s"
            )
    baseline = bench.baseline()
    figures.draw_f1(results, baseline, folder / "fine_tuning_zero_f1.png")
    figures.draw_movement(results, folder / "fine_tuning_zero_movement.png")
    seconds = training.pretraining_seconds(folder / "pretrained")
    text = page.text(results, baseline, bench.words(), seconds, quick=quick)
    replace_file(folder / "fine_tuning_zero.md", text.encode())
    return folder / "fine_tuning_zero.md"
