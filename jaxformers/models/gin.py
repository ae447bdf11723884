"""GIN over molecules, as GraphMVP trains it (arXiv 2110.07728): atoms in, a vector per atom and per molecule out."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxformers import nn
from jaxformers.models import config as configs
from jaxformers.sites import site

NAMES = {
    "num_hidden_layers": "num_layer",
    "hidden_size": "emb_dim",
    "jumping": "JK",
    "hidden_dropout_prob": "drop_ratio",
    "layer_norm_eps": "batch_norm_eps",
    "momentum": "batch_norm_momentum",
}
JUMPING = ("last", "concat", "max", "sum")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a GIN, and of the tables of its atoms' and bonds' features.

    ``jumping`` (knowledge, arXiv 1806.03536): what a node's vector is made of: the ``last`` layer, or the ``concat``,
    ``max`` or ``sum`` of the input and all layers. ``loop_bond_type``: bond type of the edge from an atom to itself.
    ``momentum``: of the running statistics, for :func:`jaxformers.nn.followed`.
    """

    num_hidden_layers: int = 5
    hidden_size: int = 300
    jumping: str = "last"
    hidden_dropout_prob: float = 0.0
    num_atom_type: int = 120
    num_chirality_tag: int = 3
    num_bond_type: int = 6
    num_bond_direction: int = 3
    loop_bond_type: int = 4
    graph_pooling: str = "mean"
    layer_norm_eps: float = 1e-5
    momentum: float = 0.1
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.jumping not in JUMPING:
            raise ValueError(f"config.json: JK must be one of {', '.join(JUMPING)}, got {self.jumping!r}")
        if self.graph_pooling not in nn.POOLS:
            raise ValueError(
                f"config.json: graph_pooling must be one of {', '.join(nn.POOLS)}, got {self.graph_pooling!r}"
            )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        return configs.from_hf(cls, hf, NAMES)

    def to_hf(self) -> dict[str, Any]:
        return configs.to_hf(self, NAMES, "gin")


class AtomEmbeddings(nnx.Module):
    """Sum of the tables ``atom`` (element) and ``chirality``. Site: ``embeddings``."""

    def __init__(self, atoms: int, chiralities: int, width: int, *, rngs: nnx.Rngs):
        self.path = ""
        self.atom = nn.Embed(atoms, width, std=(2 / (atoms + width)) ** 0.5, rngs=rngs)
        self.chirality = nn.Embed(chiralities, width, std=(2 / (chiralities + width)) ** 0.5, rngs=rngs)

    def __call__(self, x: Int[Array, "nodes 2"]) -> Float[Array, "nodes width"]:
        return site(self.path, self.atom(x[:, 0]) + self.chirality(x[:, 1]))


class GIN(nnx.Module):
    """``embeddings`` → ``layers``; no heads. Its inputs are what :func:`jaxformers.data.graphs.pack` makes."""

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name, self.head = config, head, nnx.data(None)
        c = config
        self.embeddings = AtomEmbeddings(c.num_atom_type, c.num_chirality_tag, c.hidden_size, rngs=rngs)
        self.layers = nn.Layers(
            [
                nn.GraphBlock(
                    c.hidden_size,
                    c.num_bond_type,
                    c.num_bond_direction,
                    loop=(c.loop_bond_type, 0),
                    act=i < c.num_hidden_layers - 1,
                    eps=c.layer_norm_eps,
                    rate=c.hidden_dropout_prob,
                    rngs=rngs,
                )
                for i in range(c.num_hidden_layers)
            ]
        )

    def __call__(
        self,
        x: Int[Array, "nodes 2"],
        edge_index: Int[Array, "2 edges"],
        edge_attr: Int[Array, "edges 2"],
        batch: Int[Array, "nodes"],
        graph_mask: Bool[Array, "graphs"],
        node_mask: Bool[Array, "nodes"] | None = None,
        edge_mask: Bool[Array, "edges"] | None = None,
        *,
        rngs: jax.Array | None = None,
    ) -> nn.Output:
        """``last_hidden_state`` (nodes, width) and ``pooled`` (graphs, width); (layers + 1) times as wide for "concat".

        ``x``: element and chirality of each atom; ``edge_index``: from and to; ``edge_attr``: type and direction of
        each bond; ``batch``: the atom's graph; masks: which are real (vectors of others mean nothing). ``rngs`` turns
        on dropout and the batch's own statistics: read the sites ``layers.*.norm.{mean,var}`` and move the running ones
        after them by :func:`jaxformers.nn.followed`.
        """
        keys = nn.split(rngs, self.config.num_hidden_layers)
        seen = [self.embeddings(x)]
        for layer, key in zip(self.layers, keys, strict=True):
            seen.append(layer(seen[-1], edge_index, edge_attr, node_mask, edge_mask, key=key))
        jump = {
            "last": lambda: seen[-1],
            "concat": lambda: jnp.concatenate(seen, axis=-1),
            "max": lambda: jnp.stack(seen).max(axis=0),
            "sum": lambda: jnp.stack(seen).sum(axis=0),
        }
        h = jump[self.config.jumping]()
        pooled = nn.graph_pool(h, batch, graph_mask.shape[0], node_mask, mode=self.config.graph_pooling)
        return nn.Output(h, pooled=pooled)


Model = GIN
PREFIX = ""
KEYS = {
    "embeddings.atom": "x_embedding1",
    "embeddings.chirality": "x_embedding2",
    "layers.{}.mlp.up": "gnns.{}.mlp.0",
    "layers.{}.mlp.down": "gnns.{}.mlp.2",
    "layers.{}.kind": "gnns.{}.edge_embedding1",
    "layers.{}.direction": "gnns.{}.edge_embedding2",
    "layers.{}.norm": "batch_norms.{}",
}
HEADS: dict[str, Any] = {}
BASE_CLASS = "GNNGraphMVP"
IGNORED = (r"batch_norms\.\d+\.num_batches_tracked",)
