"""Records tiny BERTs that `transformers` has written, with their logits, losses and tokens.

    python scripts/recordings/make_huggingface.py [FOLDER]

Needs the extra ``huggingface``. FOLDER, which is replaced, is by default
``tests/train/tasks/bert/huggingface/recorded``. It holds what ``save_pretrained`` of `transformers`
writes for masked language, with a cased vocabulary with accents, and

- ``recorded.npz``: ``input_ids``, ``attention_mask``, ``token_type_ids``, ``labels`` (all
  ``(2, 10)``; the second row is padded, and a label of -100 is not counted), and float32 ``logits``
  ``(2, 10, vocabulary)`` and ``loss``, the mean cross entropy of the labels in nats.
- ``tokens.json``: lines of text, and the tokens of each without special ones.

``recorded_tagger`` next to it holds a ``BertForTokenClassification`` with the same vocabulary and
sizes, and ``recorded.npz`` with the same inputs and the logits ``(2, 10, 3)`` of its labels.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

FOLDER = Path("tests/train/tasks/bert/huggingface/recorded")
WORDS = "the learning rate of a Layer grows with its norm Über café naïve É é ü u e A B 1 2 . , ! -"
LABELS = ["B-X", "I-X", "O"]
LINES = ["The learning rate", "a layer grows!", "Über café, naïve É", "Cafe\u0301 \u4e2d 1-1."]


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    tagger_folder = folder.with_name(f"{folder.name}_tagger")
    for each in (folder, tagger_folder):
        shutil.rmtree(each, ignore_errors=True)
        each.mkdir(parents=True)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split(), "##s", "##1", "##e"]
    tokenizer = transformers.BertTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, do_lower_case=False
    )
    sizes = {
        "vocab_size": len(tokens),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 12,
    }
    torch.manual_seed(0)
    model = scattered(transformers.BertForMaskedLM(transformers.BertConfig(**sizes)))
    random = np.random.default_rng(0)
    ids = random.integers(5, len(tokens), (2, 10))
    mask = np.array([[1] * 10, [1] * 7 + [0] * 3])
    ids[mask == 0] = 0
    types = np.array([[0] * 6 + [1] * 4, [0] * 4 + [1] * 6])
    labels = np.where((random.random(ids.shape) < 0.4) & (mask == 1), ids, -100)
    with torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        made = model(**{k: torch.tensor(v) for k, v in inputs.items()}, labels=torch.tensor(labels))
    arrays: dict[str, Any] = {
        **{name: array.astype(np.int32) for name, array in {**inputs, "labels": labels}.items()},
        "logits": made.logits.numpy(),
        "loss": made.loss.numpy(),
    }
    np.savez_compressed(folder / "recorded.npz", **arrays)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    said = {line: tokenizer.tokenize(line) for line in LINES}
    (folder / "tokens.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")

    ids_of = {label: number for number, label in enumerate(LABELS)}
    names = {"id2label": {i: label for label, i in ids_of.items()}, "label2id": ids_of}
    tagger = scattered(
        transformers.BertForTokenClassification(transformers.BertConfig(**sizes, **names))
    )
    with torch.no_grad():
        logits = tagger(**{k: torch.tensor(v) for k, v in inputs.items()}).logits.numpy()
    kept = {name: arrays[name] for name in inputs}
    np.savez_compressed(tagger_folder / "recorded.npz", **kept, logits=logits)
    tagger.save_pretrained(tagger_folder)
    tokenizer.save_pretrained(tagger_folder)


def scattered(model: Any) -> Any:
    """Returns the model with noise on every parameter, as biases of 0 would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


if __name__ == "__main__":
    main()
