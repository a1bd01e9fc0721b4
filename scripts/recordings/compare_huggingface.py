"""Compares the held-out loss of a BERT-base folder of `transformers` with its own loss.

    python scripts/recordings/compare_huggingface.py [--layers 12] [--batches 2]

Needs the extra ``huggingface``, about 3 GB of memory and a minute on two cores. The parameters are
random. The vocabulary is the bundled one, filled up to the 30,522 tokens of BERT-base, and the text
is the prose of the standard library. The program fails if the losses differ by more than 1e-4.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from optim_zoo.train import config_file, job
from optim_zoo.train.tasks.base import Batch
from optim_zoo.train.tasks.bert.vocabulary import read_vocabulary

CONFIG = """
[data]
sequence_length = 128
[model]
init_from = "{folder}/bert"
[schedule]
name = "constant"
learning_rate = 0.001
[train]
batch_size = 8
[output]
evaluation_batches = {batches}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batches", type=int, default=2)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        theirs = write_bert_base(Path(name) / "bert", chosen.layers)
        config = Path(name) / "run.toml"
        config.write_text(CONFIG.format(folder=name, batches=chosen.batches))
        loaded = config_file.load(config)
        task = config_file.make_task(loaded, Path(name) / "cache")
        params = task.pretrained(job.initial_params(loaded, task))
        measure = jax.jit(task.measure)
        batches = task.held_out()
        ours = np.array([measure(params, batch)["loss"] for batch in batches], np.float64)
        expected = [their_loss(theirs, batch) * ours[i, 1] for i, batch in enumerate(batches)]
        loss, reference = ours[:, 0].sum() / ours[:, 1].sum(), sum(expected) / ours[:, 1].sum()
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"{count:,} parameters, {int(ours[:, 1].sum())} masked tokens")
    print(f"held-out loss {loss:.7f}, transformers {reference:.7f}: {abs(loss - reference):.1e}")
    return int(abs(loss - reference) > 1e-4)


def write_bert_base(folder: Path, layers: int) -> Any:
    """Writes a BERT-base with random parameters, and returns it."""
    size = transformers.BertConfig().vocab_size
    known = read_vocabulary("").tokens
    tokens = [*known, *(f"[unused{i}]" for i in range(size - len(known)))]
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(num_hidden_layers=layers)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases are 0 at first, and would hide mistakes
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    transformers.BertTokenizer(vocab={t: i for i, t in enumerate(tokens)}).save_pretrained(folder)
    return model


def their_loss(model: Any, batch: Batch) -> float:
    """Returns the mean cross entropy of the masked tokens of a batch."""
    labels = np.full(batch["input_ids"].shape, -100)
    targets = np.where(batch["masked_weights"] > 0, batch["masked_targets"], -100)
    np.put_along_axis(labels, batch["masked_positions"], targets, axis=1)
    with torch.no_grad():
        made = model(
            torch.tensor(batch["input_ids"]),
            token_type_ids=torch.tensor(batch["type_ids"]),
            labels=torch.tensor(labels),
        )
    return float(made.loss)


if __name__ == "__main__":
    sys.exit(main())
