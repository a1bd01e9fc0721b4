"""BERT with a linear classifier of words (Devlin et al., arXiv 1810.04805, section 4.3)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from optim_zoo.train.tasks.bert.model import INIT, BertEncoder


class Tagger(BertEncoder):
    """BERT for token tagging, applied to one sequence of T tokens."""

    num_labels: int

    def setup(self) -> None:
        """Makes the embeddings, the encoder and the head."""
        super().setup()
        self.dropout = nn.Dropout(self.config.dropout)
        # Float32 also where the encoder is bfloat16, because the loss is a difference of logits.
        self.tagger = nn.Dense(self.num_labels, dtype=jnp.float32, kernel_init=INIT)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        type_ids: jax.Array | None = None,
        *,
        deterministic: bool,
    ) -> jax.Array:
        """Returns the float32 logits of the labels.

        Args:
          input_ids: tokens, ``(T,)`` of integers.
          attention_mask: ``(T,)``; 0 for padding. None for a sequence without padding.
          positions: the places to classify, ``(K,)`` of integers; None for all T.
          type_ids: ``(T,)`` of integers; None for zeros.
          deterministic: whether dropout is off.

        Returns:
          An array ``(K, labels)``.
        """
        type_ids = jnp.zeros_like(input_ids) if type_ids is None else type_ids
        x = self.encode(input_ids, type_ids, attention_mask, deterministic=deterministic)
        x = x if positions is None else x[positions]
        return self.tagger(self.dropout(x, deterministic=deterministic))

    def logits(
        self, input_ids: jax.Array, type_ids: jax.Array, attention_mask: jax.Array | None = None
    ) -> jax.Array:
        """Returns the float32 logits of every position: ``(T,), (T,), (T,) -> (T, labels)``."""
        return self(input_ids, attention_mask, type_ids=type_ids, deterministic=True)
