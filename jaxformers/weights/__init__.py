"""Typed weights: what may stand where a kernel array stood, and the one ``matmul`` that every linear layer uses.

A typed weight is a registered pytree with ``shape`` (in, out), ``dtype``, ``matmul(x)``, ``dense()``, and
``to_tensors()`` / ``from_tensors(read)`` for checkpoints. They nest: :class:`LowRank` over :class:`PackedWeight` is
QLoRA.
"""

from jaxformers.weights.base import Weight, dense, from_tensors, is_typed, matmul, to_tensors
from jaxformers.weights.grafted import Grafted
from jaxformers.weights.lowrank import LowRank, add_lora, merge_lora
from jaxformers.weights.masked import Masked, add_masks, load_masks, masks_of, merge_masks, save_masks
from jaxformers.weights.packed import PackedWeight
from jaxformers.weights.sparse import NMSparse, pack_nm, unpack_nm
from jaxformers.weights.ternary import TernaryWeight

__all__ = [
    "Grafted",
    "LowRank",
    "Masked",
    "NMSparse",
    "PackedWeight",
    "TernaryWeight",
    "Weight",
    "add_lora",
    "add_masks",
    "dense",
    "from_tensors",
    "is_typed",
    "load_masks",
    "masks_of",
    "matmul",
    "merge_lora",
    "merge_masks",
    "pack_nm",
    "save_masks",
    "to_tensors",
    "unpack_nm",
]
