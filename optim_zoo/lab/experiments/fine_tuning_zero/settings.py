"""The settings of the experiment: those of two configs, and how long it fine-tunes.

The package is installed without the folder ``configs``, so that their values are repeated here.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Tree = Mapping[str, Mapping[str, Any]]

# configs/bert_tiny_lamb.toml
PRETRAINING: Tree = MappingProxyType(
    {
        "data": {"sequence_length": 64},
        "model": {
            "num_layers": 2,
            "hidden_size": 128,
            "num_heads": 2,
            "intermediate_size": 512,
        },
        "optimizer": {
            "name": "lamb",
            "weight_decay": 0.01,
            "exclude_from_weight_decay": ["bias", "LayerNorm"],
            "exclude_from_layer_adaptation": ["bias", "LayerNorm"],
        },
        "schedule": {"name": "warmup_polynomial", "learning_rate": 0.01, "warmup_steps": 300},
        "train": {"steps": 5000, "batch_size": 32},
        "output": {"log_every": 25, "evaluate_every": 500, "checkpoint_every": 500},
    }
)

# configs/tag_python.toml; `Scale` replaces the steps, the warmup and the batch size.
FINE_TUNING: Tree = MappingProxyType(
    {
        "task": {"name": "token_tagging"},
        "data": {"sequence_length": 64},
        "model": {"dropout": 0.1},
        "optimizer": {"name": "bert_adamw"},
        "schedule": {"name": "warmup_polynomial", "learning_rate": 1e-3, "warmup_steps": 100},
        "train": {"steps": 1000, "batch_size": 32},
        "output": {
            "log_every": 10,
            "evaluate_every": 200,
            "evaluation_batches": 100,
            "checkpoint_every": 200,
        },
    }
)


@dataclasses.dataclass(frozen=True)
class Scale:
    """The size of the experiment, equal for every optimizer."""

    steps: int
    warmup_steps: int
    batch_size: int
    seeds: tuple[int, ...]
    evaluate_every: int  # steps between two evaluations, of a part of the held-out batches
    part: int  # which part: 1 of how many batches
    model: Mapping[str, Any] | None = None  # the sizes of an untrained model; None: the pretrained


FULL = Scale(200, 20, 16, (0, 1, 2), 20, 4)
QUICK = Scale(
    steps=8,
    warmup_steps=2,
    batch_size=8,
    seeds=(0,),
    evaluate_every=4,
    part=2,
    model=MappingProxyType(
        {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "intermediate_size": 8}
    ),
)
