"""BERT with a masked-language head (Devlin et al., arXiv 1810.04805), in Flax linen.

The model is written for one sequence, and ``jax.vmap`` maps it over a batch. Each sequence thus
has a dropout key of its own, and its numbers do not depend on how a batch is sharded over devices.
Shapes: T tokens, D hidden size, H heads, K masked positions, V vocabulary size.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from optim_zoo import layers
from optim_zoo.train.tasks.bert.sections import Model

LAYER_NORM_EPSILON = 1e-12  # google-research/bert modeling.py, by way of tf.contrib.layers
INIT = nn.initializers.truncated_normal(0.02)


class Attention(nn.Module):
    """Self-attention of one sequence, without the residual branch."""

    config: Model

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """``(T, D) -> (T, D)``."""
        heads = self.config.num_heads

        def project(name: str) -> jax.Array:
            projected = _dense(self.config, self.config.hidden_size, name)(x)
            return projected.reshape(len(x), heads, -1)

        query, key, value = project("query"), project("key"), project("value")
        scores = jnp.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
        weights = nn.softmax(scores.astype(jnp.float32)).astype(x.dtype)
        weights = nn.Dropout(self.config.dropout)(weights, deterministic=deterministic)
        mixed = jnp.einsum("hqk,khd->qhd", weights, value).reshape(x.shape)
        return _dense(self.config, self.config.hidden_size, "output")(mixed)


class Layer(nn.Module):
    """One post-LayerNorm encoder layer; returns a pair, as ``nn.scan`` requires."""

    config: Model
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        """``(T, D) -> (T, D)``."""

        def dropout(y: jax.Array) -> jax.Array:
            return nn.Dropout(self.config.dropout)(y, deterministic=self.deterministic)

        attended = Attention(self.config, name="attention")(x, self.deterministic)
        x = _layer_norm(self.config, "attention_LayerNorm")(x + dropout(attended))
        hidden = _dense(self.config, self.config.intermediate_size, "intermediate")(x)
        output = _dense(self.config, self.config.hidden_size, "output")(nn.gelu(hidden))
        return _layer_norm(self.config, "output_LayerNorm")(x + dropout(output)), None


class Encoder(nn.Module):
    """The encoder's layers: separate modules, or one whose arrays stack the layers."""

    config: Model

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """``(T, D) -> (T, D)``."""
        if self.config.scan_layers:
            stack = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.config.num_layers,
            )
            return stack(self.config, deterministic, name="layers")(x, None)[0]
        for i in range(self.config.num_layers):
            x, _ = Layer(self.config, deterministic, name=f"layer_{i}")(x)
        return x


class Embeddings(nn.Module):
    """Token, position and type embeddings. The token table also serves for decoding."""

    config: Model
    vocabulary_size: int

    def setup(self) -> None:
        """Makes the three tables."""
        size = self.config.hidden_size
        self.word_embeddings = nn.Embed(self.vocabulary_size, size, embedding_init=INIT)
        self.position_embeddings = nn.Embed(self.config.max_positions, size, embedding_init=INIT)
        self.token_type_embeddings = nn.Embed(2, size, embedding_init=INIT)
        self.LayerNorm = _layer_norm(self.config)
        self.dropout = nn.Dropout(self.config.dropout)

    def __call__(self, input_ids: jax.Array, type_ids: jax.Array, deterministic: bool) -> jax.Array:
        """``(T,), (T,) -> (T, D)``."""
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(type_ids)
        x = self.LayerNorm(x + self.position_embeddings(jnp.arange(len(input_ids))))
        return self.dropout(x, deterministic=deterministic)

    def decode(self, x: jax.Array) -> jax.Array:
        """``(K, D) -> (K, V)`` float32: the similarity to every token's embedding."""
        table = self.word_embeddings.embedding.astype(x.dtype)
        # Float32 also where x is bfloat16, because the loss is a difference of logits.
        return jnp.matmul(x, table.T, preferred_element_type=jnp.float32)


class MaskedLanguageHead(nn.Module):
    """The layer before decoding, which uses the token embeddings."""

    config: Model

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(K, D) -> (K, D)``."""
        x = nn.gelu(_dense(self.config, self.config.hidden_size, "transform")(x))
        return _layer_norm(self.config, "LayerNorm")(x)


class Bert(nn.Module):
    """BERT for masked-language pretraining, applied to one sequence."""

    config: Model
    vocabulary_size: int

    def setup(self) -> None:
        """Makes the embeddings, the encoder and the head."""
        self.embeddings = Embeddings(self.config, self.vocabulary_size)
        self.encoder = Encoder(self.config)
        self.masked_language = MaskedLanguageHead(self.config)
        self.output_bias = self.param("output_bias", nn.initializers.zeros, (self.vocabulary_size,))

    def __call__(
        self,
        input_ids: jax.Array,
        type_ids: jax.Array,
        masked_positions: jax.Array,
        *,
        deterministic: bool,
    ) -> jax.Array:
        """Returns float32 logits of the masked positions: ``(T,), (T,), (K,) -> (K, V)``."""
        x = self.embeddings(input_ids, type_ids, deterministic)
        x = self.encoder(x, deterministic)
        x = self.masked_language(x[masked_positions])
        return self.embeddings.decode(x) + self.output_bias[None]


def layer_rules(model: Model) -> list[tuple[str, layers.LayerAxis]]:
    """Returns rules that say what a layer is: ``nn.scan`` stacks layers along the first axis."""
    return [("^encoder/layers/", layers.stacked(0))] if model.scan_layers else []


def _dense(model: Model, features: int, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=model.dtype, kernel_init=INIT, name=name)


def _layer_norm(model: Model, name: str | None = None) -> Any:
    return nn.LayerNorm(LAYER_NORM_EPSILON, dtype=model.dtype, name=name)
