"""A causal transformer over bytes: a decoder with LayerNorm before each part (arXiv 2002.04745).

Shapes: B examples, T bytes of each, D hidden size, H heads.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from optim_zoo.train.tasks.byte_language.sections import Model

NUM_SYMBOLS = 256
_INIT = nn.initializers.normal(0.02)


class Attention(nn.Module):
    """Self-attention in which a position reads itself and those before it."""

    sizes: Model

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(B, T, D) -> (B, T, D)``."""

        def project(name: str) -> jax.Array:
            projected = nn.Dense(self.sizes.hidden_size, name=name)(x)
            return projected.reshape(*x.shape[:2], self.sizes.num_heads, -1)

        query, key, value = project("query"), project("key"), project("value")
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        visible = jnp.tri(x.shape[1], dtype=bool)
        scores = jnp.where(visible[None, None], scores, jnp.finfo(scores.dtype).min)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), value)
        return nn.Dense(self.sizes.hidden_size, name="output")(mixed.reshape(x.shape))


class Layer(nn.Module):
    """Attention and a feed-forward part, each added to its input."""

    sizes: Model

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(B, T, D) -> (B, T, D)``."""
        x += Attention(self.sizes, name="attention")(nn.LayerNorm(name="attention_norm")(x))
        hidden = nn.LayerNorm(name="feed_forward_norm")(x)
        hidden = nn.gelu(nn.Dense(self.sizes.intermediate_size, name="intermediate")(hidden))
        return x + nn.Dense(self.sizes.hidden_size, name="output")(hidden)


class ByteTransformer(nn.Module):
    """Predicts every next byte."""

    sizes: Model

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Maps bytes, ``(B, T)`` of integers below 256, to float32 logits, ``(B, T, 256)``.

        The logits at a position are those of the byte that follows it.
        """
        size = self.sizes.hidden_size
        x = nn.Embed(NUM_SYMBOLS, size, embedding_init=_INIT, name="byte_embeddings")(ids)
        positions = self.param("position_embeddings", _INIT, (ids.shape[1], size))
        x += positions[None]
        for index in range(self.sizes.num_layers):
            x = Layer(self.sizes, name=f"layer_{index}")(x)
        x = nn.LayerNorm(name="final_norm")(x)
        return nn.Dense(NUM_SYMBOLS, name="logits")(x).astype(jnp.float32)
