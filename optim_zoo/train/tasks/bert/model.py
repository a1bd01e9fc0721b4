"""BERT with a masked-language head (Devlin et al., arXiv 1810.04805), in Flax linen.

The model is written for one sequence, and ``jax.vmap`` maps it over a batch. Each sequence thus
has a dropout key of its own, and its numbers do not depend on how a batch is sharded over devices.
Shapes: T tokens, D hidden size, H heads, K masked positions, V vocabulary size.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from optim_zoo import layers
from optim_zoo.train.tasks.bert.sections import Model

LAYER_NORM_EPSILON = 1e-12  # google-research/bert modeling.py, by way of tf.contrib.layers
INIT = nn.initializers.truncated_normal(0.02)
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {
        "gelu": functools.partial(nn.gelu, approximate=False),
        "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    }
)
"""``model.activation`` -> the function: GELU (arXiv 1606.08415), and its approximation by tanh."""


class Attention(nn.Module):
    """Self-attention of one sequence, without the residual branch."""

    config: Model

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool, mask: jax.Array | None) -> jax.Array:
        """``(T, D), (T,) -> (T, D)``; every position reads those whose mask is not 0."""
        heads = self.config.num_heads

        def project(name: str) -> jax.Array:
            projected = _dense(self.config, self.config.hidden_size, name)(x)
            return projected.reshape(len(x), heads, -1)

        query, key, value = project("query"), project("key"), project("value")
        scores = jnp.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
        scores = scores.astype(jnp.float32)
        if mask is not None:
            # A finite number: a sequence without any unmasked position must not give NaN.
            scores = jnp.where(mask != 0, scores, jnp.finfo(jnp.float32).min)
        weights = nn.softmax(scores).astype(x.dtype)
        weights = nn.Dropout(self.config.dropout)(weights, deterministic=deterministic)
        mixed = jnp.einsum("hqk,khd->qhd", weights, value).reshape(x.shape)
        return _dense(self.config, self.config.hidden_size, "output")(mixed)


class Layer(nn.Module):
    """One post-LayerNorm encoder layer; returns a pair, as ``nn.scan`` requires.

    The second value is the output again where ``all_layers`` is true, and None elsewhere.
    """

    config: Model
    deterministic: bool
    all_layers: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """``(T, D), (T,) -> (T, D)``."""

        def dropout(y: jax.Array) -> jax.Array:
            return nn.Dropout(self.config.dropout)(y, deterministic=self.deterministic)

        attended = Attention(self.config, name="attention")(x, self.deterministic, mask)
        x = _layer_norm(self.config, "attention_LayerNorm")(x + dropout(attended))
        hidden = _dense(self.config, self.config.intermediate_size, "intermediate")(x)
        hidden = ACTIVATIONS[self.config.activation](hidden)
        output = _dense(self.config, self.config.hidden_size, "output")(hidden)
        x = _layer_norm(self.config, "output_LayerNorm")(x + dropout(output))
        return x, x if self.all_layers else None


class Encoder(nn.Module):
    """The encoder's layers: separate modules, or one whose arrays stack the layers."""

    config: Model

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        deterministic: bool,
        mask: jax.Array | None = None,
        *,
        all_layers: bool = False,
    ) -> jax.Array:
        """Returns the output of the last layer: ``(T, D), (T,) -> (T, D)``.

        With ``all_layers`` it returns ``x`` and the output of each layer, ``(layers + 1, T, D)``.
        """
        outputs = [x]
        if self.config.scan_layers:
            stack = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=self.config.num_layers,
            )
            stacked: Any = stack(self.config, deterministic, all_layers, name="layers")
            last, each = stacked(x, mask)
            return jnp.concatenate([x[None], each]) if all_layers else last
        for i in range(self.config.num_layers):
            x, _ = Layer(self.config, deterministic, name=f"layer_{i}")(x, mask)
            outputs.append(x)
        return jnp.stack(outputs) if all_layers else x


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
        x = _dense(self.config, self.config.hidden_size, "transform")(x)
        x = ACTIVATIONS[self.config.activation](x)
        return _layer_norm(self.config, "LayerNorm")(x)


class BertEncoder(nn.Module):
    """BERT without a head, applied to one sequence.

    A model with a head is a subclass: it calls ``super().setup()`` in its own ``setup``, so that
    the parameters of embeddings and encoder have the same paths in every model.
    """

    config: Model
    vocabulary_size: int

    def setup(self) -> None:
        """Makes the embeddings and the encoder."""
        self.embeddings = Embeddings(self.config, self.vocabulary_size)
        self.encoder = Encoder(self.config)

    def encode(
        self,
        input_ids: jax.Array,
        type_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        deterministic: bool,
        all_layers: bool = False,
    ) -> jax.Array:
        """Returns the hidden states of one sequence.

        Args:
          input_ids: tokens, ``(T,)`` of integers, with T at most ``max_positions``.
          type_ids: 0 for the first segment and 1 for the second, ``(T,)`` of integers.
          attention_mask: ``(T,)``; 0 at the positions that no other position reads, such as those
            of [PAD]. None reads all of them. The hidden states of masked positions mean nothing.
          deterministic: whether dropout is off.
          all_layers: whether to return all layers instead of the last.

        Returns:
          The output of the last layer, ``(T, D)``; with ``all_layers`` the output of the embeddings
          and of each layer, ``(num_layers + 1, T, D)``.
        """
        x = self.embeddings(input_ids, type_ids, deterministic)
        return self.encoder(x, deterministic, attention_mask, all_layers=all_layers)

    def logits(
        self, input_ids: jax.Array, type_ids: jax.Array, attention_mask: jax.Array | None = None
    ) -> jax.Array:
        """Returns the float32 logits of every position, ``(T, classes)``, without dropout.

        Each model with a head implements this. The arguments are those of `encode`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no head")


class Bert(BertEncoder):
    """BERT for masked-language pretraining, applied to one sequence."""

    def setup(self) -> None:
        """Makes the embeddings, the encoder and the head."""
        super().setup()
        self.masked_language = MaskedLanguageHead(self.config)
        self.output_bias = self.param("output_bias", nn.initializers.zeros, (self.vocabulary_size,))

    def __call__(
        self,
        input_ids: jax.Array,
        type_ids: jax.Array,
        masked_positions: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        deterministic: bool,
    ) -> jax.Array:
        """Returns float32 logits of the masked positions: ``(T,), (T,), (K,), (T,) -> (K, V)``."""
        x = self.encode(input_ids, type_ids, attention_mask, deterministic=deterministic)
        return self.decode(x[masked_positions])

    def logits(
        self, input_ids: jax.Array, type_ids: jax.Array, attention_mask: jax.Array | None = None
    ) -> jax.Array:
        """Returns the float32 logits of every position: ``(T,), (T,), (T,) -> (T, V)``."""
        return self.decode(self.encode(input_ids, type_ids, attention_mask, deterministic=True))

    def decode(self, x: jax.Array) -> jax.Array:
        """Returns the float32 logits of hidden states of the last layer: ``(K, D) -> (K, V)``."""
        return self.embeddings.decode(self.masked_language(x)) + self.output_bias[None]


def layer_rules(model: Model) -> list[tuple[str, layers.LayerAxis]]:
    """Returns rules that say what a layer is: ``nn.scan`` stacks layers along the first axis."""
    return [("^encoder/layers/", layers.stacked(0))] if model.scan_layers else []


def _dense(model: Model, features: int, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=model.dtype, kernel_init=INIT, name=name)


def _layer_norm(model: Model, name: str | None = None) -> Any:
    return nn.LayerNorm(LAYER_NORM_EPSILON, dtype=model.dtype, name=name)
