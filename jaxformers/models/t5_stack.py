"""T5's encoder and decoder: blocks that share one relative position bias, and the norm after them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformers import nn
from jaxformers.sites import site


class Stack(nnx.Module):
    """Encoder or decoder: dropout, ``relative_bias`` → ``layers`` → ``final_norm``, dropout. Site ``embeddings``."""

    def __init__(self, c: Any, *, decoder: bool, rngs: nnx.Rngs):
        self.path, self.decoder, self.rate = "", decoder, c.hidden_dropout_prob
        self.max_distance = c.relative_attention_max_distance
        std = c.initializer_factor * c.hidden_size**-0.5
        self.relative_bias = nn.Embed(c.relative_attention_num_buckets, c.num_attention_heads, std=std, rngs=rngs)
        depth = c.decoder_layers if decoder else c.num_hidden_layers
        self.layers = nn.Layers([_block(c, decoder, rngs) for _ in range(depth)])
        self.final_norm = nn.RMSNorm(c.hidden_size, eps=c.layer_norm_eps)

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        *,
        mask: nn.Mask,
        keys: int,
        cache: dict[str, Any] | None = None,
        key: jax.Array | None = None,
        **context: Any,
    ) -> tuple[Float[Array, "batch length width"], dict[str, Any] | None]:
        """``keys``: how many there are to attend to, those of the cache included."""
        first, layers_key, last = nn.split(key, 3)
        x = site(f"{self.path}.embeddings", nn.dropout(x, self.rate, first))
        h, cache = self.layers(
            x, mask=mask, bias=self._bias(x.shape[1], keys, mask.start), cache=cache, key=layers_key, **context
        )
        return nn.dropout(self.final_norm(h), self.rate, last), cache

    def _bias(self, queries: int, keys: int, start: jax.Array | int) -> Float[Array, "1 heads queries keys"]:
        buckets = nn.relative_buckets(
            jnp.arange(queries) + start,
            jnp.arange(keys),
            buckets=self.relative_bias.embedding.get_value().shape[0],
            max_distance=self.max_distance,
            bidirectional=not self.decoder,
        )
        return self.relative_bias(buckets).transpose(2, 0, 1)[None]


def _block(c: Any, decoder: bool, rngs: nnx.Rngs) -> nn.Block:
    mlp = nn.MLP(
        c.hidden_size,
        c.intermediate_size,
        act=c.hidden_act,
        gated=c.gated,
        bias=False,
        rate=c.hidden_dropout_prob,
        std=c.initializer_factor * c.hidden_size**-0.5,
        rngs=rngs,
    )
    _redraw(mlp.down, c.initializer_factor * c.intermediate_size**-0.5, rngs)
    return nn.Block(
        _attention(c, rngs),
        mlp,
        nn.RMSNorm(c.hidden_size, eps=c.layer_norm_eps),
        nn.RMSNorm(c.hidden_size, eps=c.layer_norm_eps),
        prenorm=True,
        rate=c.hidden_dropout_prob,
        cross_attention=_attention(c, rngs) if decoder else None,
        cross_attention_norm=nn.RMSNorm(c.hidden_size, eps=c.layer_norm_eps) if decoder else None,
    )


def _attention(c: Any, rngs: nnx.Rngs) -> nn.Attention:
    attention = nn.Attention(
        c.hidden_size,
        c.num_attention_heads,
        head_size=c.head_dim,
        bias=False,
        scale=1.0,
        rate=c.hidden_dropout_prob,
        std=c.initializer_factor * c.hidden_size**-0.5,
        rngs=rngs,
    )
    _redraw(attention.query, c.initializer_factor * (c.hidden_size * c.head_dim) ** -0.5, rngs)
    _redraw(attention.out, c.initializer_factor * (c.num_attention_heads * c.head_dim) ** -0.5, rngs)
    return attention


def _redraw(linear: nn.Linear, std: float, rngs: nnx.Rngs) -> None:
    linear.kernel.set_value(std * jax.random.normal(rngs.params(), linear.kernel.get_value().shape))
