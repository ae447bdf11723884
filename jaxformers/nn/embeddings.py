"""Input embeddings: token + position + token type, normalised and dropped out where the architecture does."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformers.nn.cache import Cache
from jaxformers.nn.dropout import dropout
from jaxformers.nn.linear import Embed, Linear
from jaxformers.nn.norms import LayerNorm
from jaxformers.sites import site


class Embeddings(nnx.Module):
    """Sum of the tables ``token``, ``position`` and ``token_type`` (each but the first optional), then ``norm``.

    Where ``token_width`` differs from ``width`` the token rows pass through ``project`` first (OPT-350M); where
    ``out_width`` does, the result passes through ``widen`` (ELECTRA). ``scale``: a factor of the token rows (BART).

    Site ``embeddings``: the result (B, L, D).
    """

    def __init__(
        self,
        vocab: int,
        width: int,
        *,
        positions: int = 0,
        token_types: int = 0,
        token_width: int | None = None,
        out_width: int | None = None,
        scale: float = 1.0,
        eps: float | None = None,
        rate: float = 0.0,
        std: float = 0.02,
        rngs: nnx.Rngs,
    ):
        self.path = ""
        self.rate, self.scale = rate, scale
        narrow = width if token_width is None else token_width
        self.token = Embed(vocab, narrow, std=std, rngs=rngs)
        self.project = None if narrow == width else Linear(narrow, width, bias=False, std=std, rngs=rngs)
        self.position = Embed(positions, width, std=std, rngs=rngs) if positions else None
        self.token_type = Embed(token_types, width, std=std, rngs=rngs) if token_types else None
        self.norm = None if eps is None else LayerNorm(width, eps=eps)
        self.widen = None if out_width in (None, width) else Linear(width, out_width, std=std, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None,
        *,
        position_ids: Int[Array, "#batch length"] | None = None,
        token_type_ids: Int[Array, "batch length"] | None = None,
        inputs_embeds: Float[Array, "batch length width"] | None = None,
        key: jax.Array | None = None,
    ) -> Float[Array, "batch length width"]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: give exactly one of the two")
        x = self.token(input_ids) if inputs_embeds is None else inputs_embeds
        if inputs_embeds is None and self.scale != 1.0:
            x = x * self.scale
        if self.project is not None:
            x = self.project(x)
        if self.token_type is not None:
            x = x + (
                self.token_type.embedding.get_value()[0] if token_type_ids is None else self.token_type(token_type_ids)
            )
        if self.position is not None:
            x = x + self.position(position_ids)
        if self.norm is not None:
            x = self.norm(x)
        x = dropout(x, self.rate, key)
        return site(self.path, x if self.widen is None else self.widen(x))


def check_length(length: int, positions: int, cache: Cache | None = None) -> None:
    """Raise ValueError when an input is longer than the position table.

    Tokens in ``cache`` count, outside of jit, where their number is known.
    """
    used = 0 if cache is None or isinstance(cache.used, jax.core.Tracer) else int(cache.used)
    if used + length > positions:
        cached = f" after {used} cached tokens" if used else ""
        raise ValueError(f"input_ids: length {length}{cached} exceeds this model's {positions} positions; truncate it")


def padded_positions(
    input_ids: Int[Array, "batch length"], pad_id: int, used: Int[Array, ""] | int = 0
) -> Int[Array, "batch length"]:
    """RoBERTa's positions: real tokens count from ``pad_id + 1``, padding stays at ``pad_id``.

    ``used``: how many tokens a cache holds already, all of them counted as real.
    """
    real = (input_ids != pad_id).astype(jnp.int32)
    return (jnp.cumsum(real, axis=1) + used) * real + pad_id
