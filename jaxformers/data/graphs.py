"""Batches of graphs of static shape: several graphs as one, padded."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Graph = Mapping[str, Any]  # x (nodes, features), edge_index (2, edges), edge_attr (edges, features): integers


def pack(
    graphs: Sequence[Graph],
    *,
    nodes: int | None = None,
    edges: int | None = None,
    size: int | None = None,
    sizes: Sequence[int] | None = None,
    edge_sizes: Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
    """Graphs side by side in one batch: the inputs of a GIN.

    ``x`` (nodes, f), ``edge_index`` (2, edges), ``edge_attr`` (edges, g), ``batch`` (nodes,): which graph; and the
    masks ``node_mask``, ``edge_mask``, ``graph_mask`` (size,), True where real. Padded to ``nodes``, ``edges`` and
    ``size`` graphs; by default nodes and edges to the next power of two from 64 on, so that few shapes are compiled.
    Padding edges join the last node to itself.

    ``sizes``, ``edge_sizes``: the rows of the tables that the features of x and of edge_attr are looked up in.

    Raises ValueError naming the graph that is malformed, has features beyond its tables or edges to nodes it has not,
    and when the graphs do not fit.
    """
    if not graphs:
        raise ValueError("graphs: expected at least one")
    parts = [_checked(i, graph, sizes, edge_sizes) for i, graph in enumerate(graphs)]
    counts = np.array([len(x) for x, _, _ in parts])
    total, total_edges = int(counts.sum()), sum(index.shape[1] for _, index, _ in parts)
    nodes = _fit("nodes", nodes, total)
    edges = _fit("edges", edges, total_edges)
    size = len(parts) if size is None else size
    if size < len(parts):
        raise ValueError(f"size={size}: there are {len(parts)} graphs")
    starts = np.cumsum(counts) - counts
    x = np.zeros((nodes, parts[0][0].shape[1]), np.int32)
    x[:total] = np.concatenate([x for x, _, _ in parts])
    index = np.full((2, edges), nodes - 1, np.int32)
    index[:, :total_edges] = np.concatenate([e + start for (_, e, _), start in zip(parts, starts, strict=True)], axis=1)
    attr = np.zeros((edges, parts[0][2].shape[1]), np.int32)
    attr[:total_edges] = np.concatenate([a for _, _, a in parts])
    batch = np.full(nodes, size - 1, np.int32)
    batch[:total] = np.repeat(np.arange(len(parts)), counts)
    return {
        "x": x,
        "edge_index": index,
        "edge_attr": attr,
        "batch": batch,
        "node_mask": np.arange(nodes) < total,
        "edge_mask": np.arange(edges) < total_edges,
        "graph_mask": np.arange(size) < len(parts),
    }


def unpack(h: np.ndarray, batch: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The rows of ``h`` (nodes, …) of each real graph of a packed ``batch``, in order."""
    real = np.asarray(batch["node_mask"])
    graph, h = np.asarray(batch["batch"])[real], np.asarray(h)[real]
    return [h[graph == i] for i in range(int(np.sum(batch["graph_mask"])))]


def _fit(name: str, wanted: int | None, needed: int) -> int:
    if wanted is None:
        return max(64, 1 << (needed - 1).bit_length())
    if wanted < max(needed, 1):
        raise ValueError(f"{name}={wanted}: the graphs have {needed}")
    return wanted


def _checked(i: int, graph: Graph, sizes: Any, edge_sizes: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, index, attr = (np.asarray(graph[name]) for name in ("x", "edge_index", "edge_attr"))
    index, attr = (a.astype(np.int32) if not a.size else a for a in (index, attr))  # of a lone atom: perhaps floats
    fits = x.ndim == attr.ndim == index.ndim == 2 and index.shape == (2, len(attr)) and len(x) > 0
    if not fits or not all(np.issubdtype(a.dtype, np.integer) for a in (x, index, attr)):
        raise ValueError(
            f"graphs: item {i} has x {x.dtype} {x.shape}, edge_index {index.dtype} {index.shape}, edge_attr "
            f"{attr.dtype} {attr.shape}; expected whole numbers (nodes, features), (2, edges), (edges, features), and "
            "at least one node"
        )
    if index.size and (index.min() < 0 or index.max() >= len(x)):
        raise ValueError(f"graphs: item {i} has {len(x)} nodes, its edges go from {index.min()} to {index.max()}")
    for name, values, rows in (("x", x, sizes), ("edge_attr", attr, edge_sizes)):
        if rows is not None and values.shape[1] != len(rows):
            raise ValueError(f"graphs: item {i}: {name} has {values.shape[1]} features, there are {len(rows)} tables")
        top = np.full(values.shape[1], np.iinfo(np.int32).max) if rows is None else np.asarray(rows)
        wrong = np.argwhere((values < 0) | (values >= top))
        if len(wrong):
            row, feature = wrong[0]
            raise ValueError(
                f"graphs: item {i}: {name}[{row}, {feature}] is {values[row, feature]}, "
                f"of {top[feature]} rows of its table"
            )
    return x.astype(np.int32), index.astype(np.int32), attr.astype(np.int32)
