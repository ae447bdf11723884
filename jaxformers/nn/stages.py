"""Hierarchical models: stages under the names "0", "1", …, each with ``layers`` of its own width and grid."""

from collections.abc import Iterator
from typing import Any

from flax import nnx


class Stages(nnx.Module):
    """A list of stages whose paths are ``stages.0``, ``stages.1``, …; their blocks are ``stages.0.layers.0``, …"""

    def __init__(self, stages: list[nnx.Module]):
        self.path = ""
        self.depth = len(stages)
        for i, stage in enumerate(stages):
            setattr(self, str(i), stage)

    def __len__(self) -> int:
        return self.depth

    def __getitem__(self, i: int) -> Any:
        return getattr(self, str(range(self.depth)[i]))

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(self.depth))
