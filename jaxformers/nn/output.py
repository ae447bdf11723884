"""What a forward pass returns."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """The result of a forward pass; parts that the model does not have are None.

    ``last_hidden_state`` (B, L, D); ``logits`` (B, L, V), (B, L, labels) or (B, labels) by head; ``pooled`` (B, D): the
    pooler's output, or the sentence embedding of a model with a sentence head; ``cache``: the cache after this pass;
    ``extra``: what only some architectures have, by the name that Hugging Face gives it
    (``encoder_last_hidden_state``, ``contacts``, ``mask``, ``image_embeds``, …), documented at their ``__call__``.
    """

    last_hidden_state: Float[Array, "batch length width"] | None = None
    logits: Float[Array, "..."] | None = None
    pooled: Float[Array, "batch width"] | None = None
    cache: Any = None
    extra: dict[str, Any] | None = None
