"""Graph isomorphism network (arXiv 1810.00826) with edge features (arXiv 1905.12265, equation 2.3).

    a_i = Σ_{(j, i) ∈ edges} (h_j + e_ji) + (h_i + e_loop)         messages along edges, and from a node to itself
    h_i ← norm(W2 relu(W1 a_i + b1) + b2)                          norm: over all nodes of the batch

Several graphs are one graph without edges between its parts; padding is nodes and edges that masks leave out.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxformers.nn.dropout import dropout
from jaxformers.nn.linear import Embed
from jaxformers.nn.mlp import MLP
from jaxformers.nn.norms import BatchNorm
from jaxformers.sites import site

POOLS = ("mean", "sum", "max")


class GraphBlock(nnx.Module):
    """One round of messages: ``mlp``, ``norm``, and embeddings of an edge's two features, ``kind`` and ``direction``.

    ``loop``: the features of the edge from a node to itself. ``act`` False leaves the last ReLU out (the last layer).
    Sites: ``input``, ``output`` (N, width), those of ``mlp`` and ``norm``.
    """

    def __init__(
        self,
        width: int,
        kinds: int,
        directions: int,
        *,
        loop: tuple[int, int],
        act: bool = True,
        eps: float = 1e-5,
        rate: float = 0.0,
        rngs: Any,
    ):
        if not (0 <= loop[0] < kinds and 0 <= loop[1] < directions):
            raise ValueError(f"loop: features {loop} are not among {kinds} kinds and {directions} directions of edges")
        self.path = ""
        self.loop, self.act, self.rate = loop, act, rate
        self.kind = Embed(kinds, width, std=(2 / (kinds + width)) ** 0.5, rngs=rngs)
        self.direction = Embed(directions, width, std=(2 / (directions + width)) ** 0.5, rngs=rngs)
        self.mlp = MLP(width, 2 * width, act="relu", std=(3 * width) ** -0.5, rngs=rngs)
        self.norm = BatchNorm(width, eps=eps)

    def __call__(
        self,
        h: Float[Array, "nodes width"],
        edge_index: Int[Array, "2 edges"],
        edge_attr: Int[Array, "edges 2"],
        node_mask: Bool[Array, "nodes"] | None = None,
        edge_mask: Bool[Array, "edges"] | None = None,
        *,
        key: jax.Array | None = None,
    ) -> Float[Array, "nodes width"]:
        """``key`` turns dropout on, and normalises by the statistics of this batch instead of the running ones."""
        h = site(f"{self.path}.input", h)
        source, target = edge_index
        message = h[source] + self.kind(edge_attr[:, 0]) + self.direction(edge_attr[:, 1])
        if edge_mask is not None:
            message = jnp.where(edge_mask[:, None], message, 0)
        own = h + self.kind.embedding.get_value()[self.loop[0]] + self.direction.embedding.get_value()[self.loop[1]]
        h = self.mlp(own.at[target].add(message))
        h = self.norm(h, batch_statistics=key is not None, valid=node_mask)
        h = dropout(jax.nn.relu(h) if self.act else h, self.rate, key)
        return site(f"{self.path}.output", h)


def graph_pool(
    h: Float[Array, "nodes width"],
    graph: Int[Array, "nodes"],
    graphs: int,
    node_mask: Bool[Array, "nodes"] | None = None,
    *,
    mode: str = "mean",
) -> Float[Array, "graphs width"]:
    """One vector a graph: the ``mean``, ``sum`` or ``max`` over its nodes; zero for a graph without nodes.

    ``graph``: which of the ``graphs`` each node belongs to. Raises ValueError for another mode.
    """
    if mode not in POOLS:
        raise ValueError(f"graph pooling {mode!r} is unknown; there are {', '.join(POOLS)}")
    mask = jnp.ones(len(h), bool) if node_mask is None else node_mask.astype(bool)
    count = jax.ops.segment_sum(mask.astype(h.dtype), graph, graphs)[:, None]
    if mode == "max":
        top = jax.ops.segment_max(jnp.where(mask[:, None], h, -jnp.inf), graph, graphs)
        return jnp.where(count > 0, top, 0)
    total = jax.ops.segment_sum(jnp.where(mask[:, None], h, 0), graph, graphs)
    return total if mode == "sum" else total / jnp.maximum(count, 1)
