"""Masked-language pretraining of BERT (arXiv 1810.04805, section 3.1) as a task."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optim_zoo.errors import UserError
from optim_zoo.sharding import WeightedLoss
from optim_zoo.train.config import Stage
from optim_zoo.train.random_numbers import KEYS, generator
from optim_zoo.train.tasks.base import Baseline, Batch, Loaded, Setup, Task, WeightedSum
from optim_zoo.train.tasks.bert import init_from
from optim_zoo.train.tasks.bert.loaded import LoadedBert, user_tokenizer
from optim_zoo.train.tasks.bert.model import Bert, layer_rules
from optim_zoo.train.tasks.bert.sections import Model, check_positions
from optim_zoo.train.tasks.masked_language import batches, corpus, predict
from optim_zoo.train.tasks.masked_language.sections import Data
from optim_zoo.tree import Tree

_WARNED_UNKNOWN, _REFUSED_UNKNOWN = 0.05, 0.5  # shares of unknown tokens in a text


class MaskedLanguage(Task):
    """Predicts masked tokens of text.

    The loss of a batch is the sum over its masked tokens of ``-log p(token)`` in nats, and its
    weight is their number.
    """

    sections = MappingProxyType({"data": Data, "model": Model})
    stage_keys = MappingProxyType({"sequence_length": "data"})
    paths = ("data.text", "data.vocabulary", "model.init_from")
    earlier_values = MappingProxyType({"model.activation": "gelu_tanh"})
    unit = "tokens"  # padding and special tokens included
    loss_unit = "nats"
    weight_unit = "masked tokens"
    essential = ("vocabulary",)

    def __init__(self, setup: Setup) -> None:
        """Reads and tokenizes the text, or reads the tokens that an earlier run has saved.

        Without `Setup.reads_data` it reads only the vocabulary.

        Raises:
          UserError: the text or the vocabulary cannot be used.
        """
        super().__init__(setup)
        data: Data = setup.sections["data"]
        self.start = init_from.resolve(setup.sections["model"], data.vocabulary, setup.cache)
        self.model_sizes, self.vocabulary = self.start.model, self.start.vocabulary
        check_positions(self.model_sizes, max(map(sequence_length, setup.stages)))
        self.model = Bert(self.model_sizes, self.vocabulary.size)
        self.layers = layer_rules(self.model_sizes)
        self.identity = {"vocabulary": self.vocabulary.digest, **self.start.identity}
        if setup.reads_data:
            self.start.match(jax.eval_shape(self.init, jax.random.key(0)))
            self._read_text(data)

    def _read_text(self, data: Data) -> None:
        """Reads the text, and makes the held-out batches from it."""
        setup = self.setup
        self.corpus = corpus.load(
            data.text,
            self.vocabulary,
            data.held_out,
            setup.cache,
            field=data.field,
            sequence_length=max(map(sequence_length, setup.stages)),
        )
        self.notes = (*self.start.notes, *_check_unknown(self.corpus.unknown))
        self.facts = {
            "text": f"{len(self.corpus.train):,} tokens to train on, "
            f"{len(self.corpus.held_out):,} held out",
            "unknown tokens": f"{self.corpus.unknown:.2%} of the text",
        }
        self.identity = {**self.identity, "text": self.corpus.digest}
        first = setup.stages[0]
        self._held_out = list(
            batches.held_out_batches(
                self.corpus.held_out,
                self.vocabulary,
                seed=setup.seed,
                # The size of a micro-batch, which fits into memory if a training step does.
                batch_size=first.batch_size // first.micro_batches,
                sequence_length=sequence_length(first),
                num_batches=setup.evaluation_batches * first.micro_batches,
                masking_rate=data.masking_rate,
                whole_words=data.whole_word_masking,
            )
        )
        if not any(batch["masked_weights"].any() for batch in self._held_out):
            raise UserError(
                "text: expected known tokens in the held-out part, but all that are masked are "
                "unknown; add text, or raise data.held_out or output.evaluation_batches"
            )
        frequencies = batches.unigram_loss(self.corpus.train, self.vocabulary, self._held_out)
        self.baseline = Baseline("token frequency", {"loss": frequencies})

    @classmethod
    def check(cls, setup: Setup) -> None:
        """Checks that the position table has a row for every position of the longest sequence."""
        check_positions(setup.sections["model"], max(map(sequence_length, setup.stages)))

    def init(self, key: jax.Array) -> Tree:
        """Returns the initial parameters of BERT."""
        return init_bert(self.model, sequence_length(self.setup.stages[0]), key)

    def pretrained(self, params: Tree) -> Tree:
        """Returns the parameters of ``model.init_from``, where it has them."""
        return self.start.params(params)

    def loaded(self, params: Tree, step: int) -> LoadedBert:
        """Returns the model with methods to apply it to text."""
        words = user_tokenizer(self.vocabulary, self.model_sizes.max_positions)
        return LoadedBert(self, self.model, params, words, step, self.vocabulary)

    def loss(self, params: Tree, batch: Tree) -> WeightedLoss:
        """Returns the loss of a batch with dropout, if the model has any."""
        return masked_loss(self.model, params, batch)

    def measure(self, params: Tree, batch: Tree) -> Mapping[str, WeightedSum]:
        """Returns the loss of a batch without dropout."""
        return {"loss": masked_loss(self.model, params, batch, deterministic=True)}

    def batch(self, number: int, stage: Stage) -> Batch:
        """Returns windows of the text at random positions, and if needed a dropout key for each."""
        data: Data = stage.sections["data"]
        made = batches.masked_batch(
            self.corpus.train,
            self.vocabulary,
            seed=self.setup.seed,
            step=number,
            batch_size=stage.batch_size,
            sequence_length=data.sequence_length,
            masking_rate=data.masking_rate,
            whole_words=data.whole_word_masking,
        )
        if not self.model_sizes.dropout:
            return made
        keys = generator(self.setup.seed, number, batches.DROPOUT_STREAM)
        size = (stage.batch_size, 2)
        return {**made, "dropout_keys": keys.integers(0, 1 << 32, size, dtype=np.uint32)}

    def held_out(self) -> Sequence[Batch]:
        """Returns consecutive windows of the held-out text."""
        return self._held_out

    def predict(self, loaded: Loaded, lines: Sequence[str], top: int = 0) -> Iterable[str]:
        """Returns the lines with their masked tokens filled in; see `predict.fill`."""
        return predict.fill(
            self.model,
            loaded.params,
            self.vocabulary,
            lines,
            longest=max(map(sequence_length, self.setup.stages)),
            top=top,
        )

    def units(self, stage: Stage) -> int:
        """Returns the number of tokens of a batch."""
        return stage.batch_size * sequence_length(stage)


def _check_unknown(share: float) -> tuple[str, ...]:
    """Returns a warning if many tokens are unknown.

    Raises:
      UserError: more than half of them are.
    """
    cure = (
        "data.vocabulary should be a WordPiece vocabulary of the text's language, such as the "
        "vocab.txt of a BERT that was trained on it"
    )
    if share > _REFUSED_UNKNOWN:
        raise UserError(
            f"text: expected text that the vocabulary covers, but {share:.1%} of the tokens are "
            f"unknown ([UNK]): {cure}"
        )
    if share > _WARNED_UNKNOWN:
        return (f"warning: {share:.1%} of the tokens are unknown ([UNK]): {cure}",)
    return ()


def sequence_length(stage: Stage) -> int:
    """Returns the number of tokens per example in a stage."""
    data: Data = stage.sections["data"]
    return data.sequence_length


def init_bert(model: Bert, length: int, key: jax.Array) -> Tree:
    """Returns the initial parameters of a BERT; ``length`` is that of a sequence."""
    ids = jnp.zeros(length, jnp.int32)
    variables: Any = model.init(key, ids, ids, ids[:1], deterministic=True)
    return variables["params"]


def masked_loss(
    model: Bert, params: Tree, batch: Tree, deterministic: bool = False
) -> WeightedLoss:
    """Returns the cross entropy in nats summed over the masked tokens, and their number.

    Dropout is on where the batch has ``dropout_keys``, one per sequence, unless ``deterministic``.
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
    return WeightedLoss(jnp.sum(losses * weights), jnp.sum(weights))
