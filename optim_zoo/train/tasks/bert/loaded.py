"""A BERT that a run has trained, used from Python."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from optim_zoo.errors import ArgumentTypeError, ArgumentValueError
from optim_zoo.train.tasks.base import Loaded
from optim_zoo.train.tasks.bert.model import BertEncoder
from optim_zoo.train.tasks.bert.vocabulary import SPECIAL_TOKENS, Vocabulary, tokenizer
from optim_zoo.tree import Tree

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Encoded(NamedTuple):
    """What `LoadedBert.encode` returns, in float32."""

    hidden_states: jax.Array  # (layers + 1, batch, length, size): embeddings, then each layer
    pooled: jax.Array  # (batch, size): one vector for each sequence


@dataclasses.dataclass(frozen=True)
class LoadedBert(Loaded):
    """A trained BERT, whose methods accept arrays or lists of shape ``(batch, length)``.

    Each method is compiled once for each shape. ``tokenizer`` is a ``tokenizers.Tokenizer`` that
    adds [CLS] and [SEP] and pads the texts of a batch to the same length; see `user_tokenizer`.

    ``vocabulary`` has the WordPieces, and ``labels`` those of a token tagger in the order of their
    ids; it is () for masked language.

    Example:
      ::

        encodings = run.tokenizer.encode_batch(["A short text.", "Another text, which is longer."])
        ids = [encoding.ids for encoding in encodings]
        mask = [encoding.attention_mask for encoding in encodings]
        vectors = run.encode(ids, mask).pooled
    """

    vocabulary: Vocabulary
    labels: Sequence[str] = ()

    def apply(
        self,
        input_ids: npt.ArrayLike,
        attention_mask: npt.ArrayLike | None = None,
        token_type_ids: npt.ArrayLike | None = None,
    ) -> jax.Array:
        """Returns the logits at every position, without dropout.

        Args:
          input_ids: tokens, ``(batch, length)`` of integers in [0, vocabulary size). The length is
            at most ``model.max_positions`` of the config.
          attention_mask: ``(batch, length)``; 0 where a token is padding, which no other position
            reads. None for a batch without padding. Logits at padding mean nothing.
          token_type_ids: ``(batch, length)``; 0 for the first segment and 1 for the second. None
            for zeros.

        Returns:
          A float32 array ``(batch, length, classes)``. For masked-language models the classes are
          the tokens of the vocabulary, and for taggers the labels.

        Raises:
          ArgumentTypeError: an argument is not an array of numbers with two axes.
          ArgumentValueError: the length or an id is out of range, or the shapes differ.
        """
        arrays = self._checked(input_ids, attention_mask, token_type_ids)
        return _logits(self.model, self.params, *arrays)

    def encode(
        self,
        input_ids: npt.ArrayLike,
        attention_mask: npt.ArrayLike | None = None,
        token_type_ids: npt.ArrayLike | None = None,
    ) -> Encoded:
        """Returns the hidden states of all layers, and a vector for each sequence.

        Args:
          input_ids: see `apply`.
          attention_mask: see `apply`.
          token_type_ids: see `apply`.

        Returns:
          A named tuple of float32 arrays:

          - ``hidden_states``: ``(layers + 1, batch, length, size)``: the output of the embeddings,
            then that of each layer.
          - ``pooled``: ``(batch, size)``. Where the parameters have a pooler, this is
            ``tanh(W h + b)`` of the last layer at [CLS] (arXiv 1810.04805); elsewhere it is the
            mean of the last layer over the positions that are not masked.

        Raises:
          ArgumentTypeError: see `apply`.
          ArgumentValueError: see `apply`.
        """
        arrays = self._checked(input_ids, attention_mask, token_type_ids)
        return _encoded(self.model, self.params, *arrays)

    def _checked(
        self, input_ids: Any, attention_mask: Any, token_type_ids: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns ids, types and mask as arrays."""
        ids = _array("input_ids", input_ids)
        longest = self.model.config.max_positions
        if not 0 < ids.shape[1] <= longest:
            raise ArgumentValueError(
                "input_ids",
                f"have a length from 1 to the {longest} positions of the model",
                ids.shape[1],
                "shorten the sequences",
            )
        size = self.model.vocabulary_size
        _check_ids("input_ids", ids, size, f"the {size} tokens of the vocabulary")
        types, mask = (
            np.full(ids.shape, default, np.int32) if given is None else _array(name, given)
            for name, given, default in (
                ("token_type_ids", token_type_ids, 0),
                ("attention_mask", attention_mask, 1),
            )
        )
        for name, array in (("token_type_ids", types), ("attention_mask", mask)):
            if array.shape != ids.shape:
                raise ArgumentValueError(
                    name,
                    f"have the shape {ids.shape} of input_ids",
                    array.shape,
                    related=["input_ids"],
                )
        _check_ids("token_type_ids", types, 2, "0 for the first segment and 1 for the second")
        return jnp.asarray(ids), jnp.asarray(types), jnp.asarray(mask)


def user_tokenizer(vocabulary: Vocabulary, max_positions: int) -> "Tokenizer":
    """Returns a tokenizer for text that is passed to `LoadedBert`.

    It splits text as in training, and differs from `vocabulary.tokenizer` in four ways: it writes
    ``[CLS] A [SEP]`` or ``[CLS] A [SEP] B [SEP]``; it recognizes special tokens that the text
    spells out, such as [MASK]; it cuts texts off that are longer than the model's positions; and
    ``encode_batch`` pads the texts to the length of the longest one. An encoding has ``ids``,
    ``attention_mask`` (0 for padding), ``type_ids`` and ``tokens``.

    Args:
      vocabulary: the vocabulary of the model.
      max_positions: the largest number of tokens, including [CLS] and [SEP].
    """
    from tokenizers import decoders, processors  # Imported lazily, as in `tokenizer`.

    built = tokenizer(vocabulary)
    built.add_special_tokens(list(SPECIAL_TOKENS))
    built.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary.sep), ("[CLS]", vocabulary.cls)
    )
    built.decoder = decoders.WordPiece()
    built.enable_padding(pad_id=vocabulary.pad, pad_token="[PAD]")
    built.enable_truncation(max_positions)
    return built


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    model: BertEncoder, params: Tree, ids: jax.Array, types: jax.Array, mask: jax.Array
) -> jax.Array:
    def one(*sequence: jax.Array) -> jax.Array:
        made: Any = model.apply({"params": params}, *sequence, method="logits")
        return made.astype(jnp.float32)

    return jax.vmap(one)(ids, types, mask)


@functools.partial(jax.jit, static_argnums=0)
def _encoded(
    model: BertEncoder, params: Any, ids: jax.Array, types: jax.Array, mask: jax.Array
) -> Encoded:
    def one(*sequence: jax.Array) -> jax.Array:
        made: Any = model.apply(
            {"params": params}, *sequence, deterministic=True, all_layers=True, method="encode"
        )
        return made.astype(jnp.float32)

    states = jax.vmap(one, out_axes=1)(ids, types, mask)
    last = states[-1]
    if "pooler" in params:
        pooler = params["pooler"]
        return Encoded(states, jnp.tanh(last[:, 0] @ pooler["kernel"] + pooler["bias"][None]))
    kept = (mask != 0).astype(jnp.float32)[..., None]
    # At least 1, so that a sequence of padding alone has the vector 0.
    number = jnp.maximum(kept.sum(1), 1.0)
    return Encoded(states, jnp.where(kept != 0, last, 0.0).sum(1) / number)


def _array(name: str, given: Any) -> np.ndarray | jax.Array:
    """Returns an argument as an array of numbers with two axes."""
    expected = "be an array or lists of numbers of shape (batch, length)"
    try:
        array = given if isinstance(given, jax.Array) else np.asarray(given)
    except ValueError as error:  # lists of different lengths
        raise ArgumentTypeError(
            name, expected, given, "rows have the same length: pad the shorter ones with [PAD]"
        ) from error
    if array.ndim != 2:
        raise ArgumentTypeError(name, expected, array.shape)
    kinds = "biuf" if name == "attention_mask" else "iu"
    if array.dtype.kind not in kinds:
        raise ArgumentTypeError(name, "hold integers", array.dtype)
    return array


def _check_ids(name: str, ids: np.ndarray | jax.Array, size: int, meaning: str) -> None:
    if isinstance(ids, jax.core.Tracer) or not ids.size:
        return
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= size:
        raise ArgumentValueError(
            name, f"be in [0, {size})", most if most >= size else least, f"they stand for {meaning}"
        )
