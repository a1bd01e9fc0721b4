"""Token tagging with BERT (arXiv 1810.04805, section 4.3) as a task."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optim_zoo.sharding import WeightedLoss
from optim_zoo.train.config import Stage
from optim_zoo.train.random_numbers import KEYS, generator
from optim_zoo.train.tasks.base import Baseline, Batch, Setup, Task, WeightedSum
from optim_zoo.train.tasks.bert import init_from
from optim_zoo.train.tasks.bert.loaded import LoadedBert, user_tokenizer
from optim_zoo.train.tasks.bert.model import layer_rules
from optim_zoo.train.tasks.bert.sections import Model, check_positions
from optim_zoo.train.tasks.bert.vocabulary import digest_of
from optim_zoo.train.tasks.token_tagging import batches, corpus, entities, predictions, scores
from optim_zoo.train.tasks.token_tagging.model import Tagger
from optim_zoo.train.tasks.token_tagging.sections import Data
from optim_zoo.tree import Tree

_ORDER_STREAM, _DROPOUT_STREAM = 0, 2
_WARNED_UNKNOWN = 0.05  # share of unknown tokens in the text


class TokenTagging(Task):
    """Predicts a label for every word of a text.

    The first piece of a word carries its label. The loss of a batch is the sum over its words of
    ``-log p(label)`` in nats, and its weight is their number. The metrics are those of `scores`.
    """

    sections = MappingProxyType({"data": Data, "model": Model})
    paths = ("data.text", "data.held_out_text", "data.vocabulary", "model.init_from")
    unit = "tokens"  # padding and special tokens included
    loss_unit = "nats"
    weight_unit = "words"
    essential = ("vocabulary", "labels")

    def __init__(self, setup: Setup) -> None:
        """Reads the text, or makes that of Python's standard library.

        Without `Setup.reads_data` it reads only the vocabulary and the labels of the run.

        Raises:
          UserError: the text or the vocabulary cannot be used, or the labels are missing.
        """
        super().__init__(setup)
        data: Data = setup.sections["data"]
        self.start = init_from.resolve(setup.sections["model"], data.vocabulary, setup.cache)
        self.model_sizes, self.vocabulary = self.start.model, self.start.vocabulary
        check_positions(self.model_sizes, data.sequence_length)
        self.sequence_length = data.sequence_length
        self.layers = layer_rules(self.model_sizes)
        text = corpus.load(data, setup.cache) if setup.reads_data else None
        labels = text.labels if text else corpus.saved_labels(setup.cache)
        self.scheme = entities.scheme(labels)
        self.identity = {
            "vocabulary": self.vocabulary.digest,
            "labels": digest_of(labels),
            **self.start.identity,
        }
        self.model = Tagger(self.model_sizes, self.vocabulary.size, len(labels))
        if text:
            self.start.match(jax.eval_shape(self.init, jax.random.key(0)), labels)
            self._encode(text)

    def _encode(self, text: corpus.Corpus) -> None:
        """Makes the examples, the held-out batches and what to know about them."""
        self.identity = {**self.identity, "text": text.digest}
        ids = {label: number for number, label in enumerate(text.labels)}
        train, rest = (
            batches.encode(part, ids, self.vocabulary, self.sequence_length)
            for part in (text.train, text.held_out)
        )
        self._train = list(itertools.chain.from_iterable(train))
        examples = list(itertools.chain.from_iterable(rest))
        first = self.setup.stages[0]
        chosen = _spread(examples, self.setup.evaluation_batches * first.batch_size)
        # The size of a micro-batch, which fits into memory if a training step does.
        size = first.batch_size // first.micro_batches
        self._held_out = [
            self._padded(chosen[start : start + size], size)
            for start in range(0, len(chosen), size)
        ]
        self.facts = {
            "text": f"{_words(text.train):,} words to train on, {_words(text.held_out):,} held out",
            "labels": f"{len(text.labels)} of {len(self.scheme.classes)} classes "
            f"({', '.join(self.scheme.classes[:12])}{', ...' * (len(self.scheme.classes) > 12)})",
        }
        self.notes = [
            *self.start.notes,
            *_cut_note([*train, *rest], self.sequence_length),
            *_unknown_note([*self._train, *examples], self.vocabulary.unk),
            *_part_note(len(chosen), len(examples)),
            *_scheme_note(text.labels),
        ]
        self.baseline = _baseline(self.scheme, self._train, self._held_out)

    @classmethod
    def check(cls, setup: Setup) -> None:
        """Checks that the position table has a row for every position of a sequence."""
        check_positions(setup.sections["model"], setup.sections["data"].sequence_length)

    def init(self, key: jax.Array) -> Tree:
        """Returns the initial parameters of BERT and of the classifier ``tagger``."""
        ids = jnp.zeros(self.sequence_length, jnp.int32)
        variables: Any = self.model.init(key, ids, deterministic=True)
        return variables["params"]

    def pretrained(self, params: Tree) -> Tree:
        """Returns the parameters of ``model.init_from``, where it has them."""
        return self.start.params(params)

    def loaded(self, params: Tree, step: int) -> LoadedBert:
        """Returns the model with methods to apply it to text."""
        words = user_tokenizer(self.vocabulary, self.model_sizes.max_positions)
        own = (self.vocabulary, self.scheme.labels)
        return LoadedBert(self, self.model, params, words, step, *own)

    def loss(self, params: Tree, batch: Tree) -> WeightedLoss:
        """Returns the loss of a batch with dropout, if the model has any."""
        return WeightedLoss(*scores.loss(self._logits(params, batch), batch))

    def measure(self, params: Tree, batch: Tree) -> Mapping[str, WeightedSum]:
        """Returns the loss and the metrics of a batch without dropout."""
        logits = self._logits(params, batch, deterministic=True)
        predicted = jnp.argmax(logits, -1)
        return {
            "loss": scores.loss(logits, batch),
            **scores.of_predictions(self.scheme, predicted, batch),
        }

    def batch(self, number: int, stage: Stage) -> Batch:
        """Returns the next examples of an endless sequence of shuffled epochs."""
        places = number * stage.batch_size + np.arange(stage.batch_size)
        epochs, within = np.divmod(places, len(self._train))
        rows = np.empty(stage.batch_size, np.int64)
        for epoch in np.unique(epochs):
            shuffled = generator(self.setup.seed, int(epoch), _ORDER_STREAM)
            order = shuffled.permutation(len(self._train))
            rows[epochs == epoch] = order[within[epochs == epoch]]
        made = self._padded([self._train[row] for row in rows], stage.batch_size)
        if not self.model_sizes.dropout:
            return made
        keys = generator(self.setup.seed, number, _DROPOUT_STREAM)
        size = (stage.batch_size, 2)
        return {**made, "dropout_keys": keys.integers(0, 1 << 32, size, dtype=np.uint32)}

    def held_out(self) -> Sequence[Batch]:
        """Returns the held-out examples, or an even selection if they are too many."""
        return self._held_out

    def units(self, stage: Stage) -> int:
        """Returns the number of tokens of a batch."""
        return stage.batch_size * self.sequence_length

    def predict(self, loaded: Any, lines: Sequence[str], top: int = 0) -> Iterable[str]:
        """Returns a line ``word<TAB>tag`` for each word of a text; see `predictions`."""
        data: Data = self.setup.sections["data"]
        labels = self.scheme.labels
        return predictions.tag(
            loaded,
            predictions.read(lines, data, labels),
            labels,
            self.vocabulary,
            sequence_length=self.sequence_length,
            top=top,
        )

    def _padded(self, examples: Sequence[batches.Example], rows: int) -> Batch:
        return batches.padded(examples, self.vocabulary, self.sequence_length, rows)

    def _logits(self, params: Tree, batch: Tree, deterministic: bool = False) -> jax.Array:
        """Returns the logits of all words, ``(batch, words, labels)``.

        Dropout is on where the batch has ``dropout_keys``, one per sequence, unless
        ``deterministic``.
        """

        def logits(sequence: Mapping[str, jax.Array]) -> jax.Array:
            keys = sequence.get("dropout_keys")
            made: Any = self.model.apply(
                {"params": params},
                sequence["input_ids"],
                sequence["attention_mask"],
                sequence["word_positions"],
                deterministic=deterministic or keys is None,
                rngs=None
                if keys is None
                else {"dropout": jax.random.wrap_key_data(keys, impl=KEYS)},
            )
            return made

        return jax.vmap(logits)(dict(batch))


def _spread(examples: Sequence[batches.Example], most: int) -> Sequence[batches.Example]:
    """Returns at most ``most`` examples, evenly spaced."""
    if len(examples) <= most:
        return examples
    return [examples[index * len(examples) // most] for index in range(most)]


def _words(sentences: Sequence[corpus.Sentence]) -> int:
    return sum(len(sentence.words) for sentence in sentences)


def _cut_note(sentences: Sequence[Sequence[batches.Example]], length: int) -> list[str]:
    cut = sum(len(examples) > 1 for examples in sentences)
    if not cut:
        return []
    return [
        f"{cut:,} of {len(sentences):,} sentences have more than {length} tokens and are cut "
        "between words; data.sequence_length sets the limit"
    ]


def _unknown_note(examples: Sequence[batches.Example], unknown: int) -> list[str]:
    ids = np.concatenate([example.ids[1:-1] for example in examples])
    share = float(np.mean(ids == unknown))
    if share <= _WARNED_UNKNOWN:
        return []
    return [
        f"warning: {share:.1%} of the tokens are unknown ([UNK]): the vocabulary should be a "
        "WordPiece vocabulary of the text's language"
    ]


def _part_note(used: int, all_examples: int) -> list[str]:
    if used == all_examples:
        return []
    return [
        f"{used:,} of {all_examples:,} held-out examples are evaluated; "
        "raise output.evaluation_batches to evaluate more"
    ]


def _scheme_note(labels: Sequence[str]) -> list[str]:
    other = [label for label in labels if label[:2] in ("E-", "S-", "L-", "U-")]
    if not other or not any(label.startswith("I-") for label in labels):
        return []
    return [
        f"warning: the label {other[0]} is no IOB2 label, so that it counts as an entity of its "
        "own: convert the tags to IOB2 for the F1 of whole entities"
    ]


def _baseline(
    scheme: entities.Scheme, train: Sequence[batches.Example], held_out: list[Batch]
) -> Baseline:
    """Returns the metrics of predicting the most frequent label.

    The loss is that of predicting every label by its frequency, with one more occurrence of each.
    """
    ids = np.concatenate([example.labels for example in train])
    counts = np.bincount(ids, minlength=len(scheme.labels))
    losses = -np.log((counts + 1) / np.sum(counts + 1))
    words = [batch["labels"][batch["word_weights"] > 0] for batch in held_out]
    return Baseline(
        "majority class",
        {
            "loss": float(np.mean(losses[np.concatenate(words)])),
            **scores.of_constant(scheme, int(np.argmax(counts)), held_out),
        },
    )
