"""What can be learned: a task gives the job parameters, a loss, batches and a yardstick."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optim_zoo import rules
from optim_zoo.train import batches, bert
from optim_zoo.train.config import Config, Stage
from optim_zoo.train.corpus import load as load_corpus
from optim_zoo.tree import Tree

KEYS = "threefry2x32"  # the same random numbers whatever JAX's default generator is


@dataclasses.dataclass(frozen=True)
class Task:
    """What the training loop needs to know of a task."""

    init: Callable[[jax.Array], Tree]  # key -> parameters
    loss: Callable[[Tree, Tree], tuple[jax.Array, jax.Array]]  # training: (sum, weight) of a batch
    held_out_loss: Callable[[Tree, Tree], tuple[jax.Array, jax.Array]]  # the same, no dropout
    batch: Callable[[int, Stage], batches.Batch]  # (step, stage) -> a batch, always the same
    held_out: Callable[[], list[batches.Batch]]  # the batches of every evaluation
    layers: rules.Rules  # what a layer is in the parameters
    reference_loss: float  # nats, of predicting by token frequency, on the same held-out targets
    identity: Mapping[str, str]  # digests a checkpoint must agree with, by what they are of


def bert_mlm(config: Config, folder: Path) -> Task:
    """Masked-language pretraining of BERT; tokens are cached under ``folder``.

    The loss of a batch is the sum over its masked tokens of -log p(token), with their number as
    weight.
    """
    corpus = load_corpus(
        config.data.text,
        config.data.vocabulary,
        config.data.held_out,
        folder,
        sequence_length=max(stage.sequence_length for stage in config.stages),
    )
    model = bert.Bert(config.model, corpus.vocabulary.size)
    seed, first = config.run.seed, config.stages[0]

    def init(key: jax.Array) -> Tree:
        return init_bert(model, first, key)

    def batch(step: int, stage: Stage) -> batches.Batch:
        made = batches.masked_batch(
            corpus.train,
            corpus.vocabulary,
            seed=seed,
            step=step,
            batch_size=stage.batch_size,
            sequence_length=stage.sequence_length,
        )
        if not config.model.dropout:
            return made
        keys = batches.generator(seed, step, batches.DROPOUT_STREAM)
        size = (stage.batch_size, 2)
        return {**made, "dropout_keys": keys.integers(0, 1 << 32, size, dtype=np.uint32)}

    held_out = list(
        batches.held_out_batches(
            corpus.held_out,
            corpus.vocabulary,
            seed=seed,
            # The same windows in parts that fit into memory where a training step does.
            batch_size=first.batch_size // first.micro_batches,
            sequence_length=first.sequence_length,
            num_batches=config.output.evaluation_batches * first.micro_batches,
        )
    )

    return Task(
        init=init,
        loss=lambda params, batch: masked_loss(model, params, batch),
        held_out_loss=lambda params, batch: masked_loss(model, params, batch, deterministic=True),
        batch=batch,
        held_out=lambda: held_out,
        layers=bert.layer_rules(config.model),
        reference_loss=batches.unigram_loss(corpus.train, corpus.vocabulary, held_out),
        identity={"vocabulary": corpus.vocabulary.digest, "text": corpus.digest},
    )


def init_bert(model: bert.Bert, stage: Stage, key: jax.Array) -> Tree:
    """Parameters of a BERT."""
    ids = jnp.zeros(stage.sequence_length, jnp.int32)
    variables: Any = model.init(key, ids, ids, ids[:1], deterministic=True)
    return variables["params"]


def masked_loss(
    model: bert.Bert, params: Tree, batch: Tree, deterministic: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The cross entropy in nats summed over the masked tokens of a batch, and their number.

    Dropout is on where the batch holds ``dropout_keys``, one a sequence.
    """

    def logits(sequence: Mapping[str, jax.Array]) -> jax.Array:
        keys = sequence.get("dropout_keys")
        scores: Any = model.apply(
            {"params": params},
            sequence["input_ids"],
            sequence["type_ids"],
            sequence["masked_positions"],
            deterministic=deterministic or keys is None,
            rngs=None if keys is None else {"dropout": jax.random.wrap_key_data(keys, impl=KEYS)},
        )
        return scores

    losses = optax.softmax_cross_entropy_with_integer_labels(
        jax.vmap(logits)(dict(batch)), batch["masked_targets"]
    )
    weights = batch["masked_weights"]
    return jnp.sum(losses * weights), jnp.sum(weights)


TASKS: Mapping[str, Callable[[Config, Path], Task]] = MappingProxyType({"bert_mlm": bert_mlm})


def make(config: Config, folder: Path) -> Any:
    """The task that ``config`` names; its data is cached under ``folder``."""
    return TASKS[config.task.name](config, folder)
