"""Typed weights: what may stand where a kernel array stood, and the one ``matmul`` that every linear layer uses.

A typed weight is a registered pytree with ``shape`` (in, out), ``dtype``, ``matmul(x)``, ``dense()``, and
``to_tensors()`` / ``from_tensors(read)`` for checkpoints. They nest: :class:`LowRank` over :class:`PackedWeight` is
QLoRA.
"""

from jaxformers.weights.arranged import ArrangedWeight, arrange
from jaxformers.weights.base import Weight, dense, from_tensors, is_typed, matmul, take, to_tensors
from jaxformers.weights.fake import FakeQuant, fake_quantise, full_precision, pack_ternary, zero_fraction
from jaxformers.weights.grafted import Grafted
from jaxformers.weights.lowrank import LowRank, add_lora, merge_lora
from jaxformers.weights.masked import Masked, add_masks, load_masks, masks_of, merge_masks, save_masks
from jaxformers.weights.packed import PackedWeight
from jaxformers.weights.sparse import NMSparse, pack_nm, unpack_nm
from jaxformers.weights.ternary import TernaryWeight
from jaxformers.weights.ternary_codes import TernaryCodes

__all__ = [
    "ArrangedWeight",
    "FakeQuant",
    "Grafted",
    "LowRank",
    "Masked",
    "NMSparse",
    "PackedWeight",
    "TernaryCodes",
    "TernaryWeight",
    "Weight",
    "add_lora",
    "add_masks",
    "arrange",
    "dense",
    "fake_quantise",
    "from_tensors",
    "full_precision",
    "is_typed",
    "load_masks",
    "masks_of",
    "matmul",
    "merge_lora",
    "merge_masks",
    "pack_nm",
    "pack_ternary",
    "save_masks",
    "take",
    "to_tensors",
    "unpack_nm",
    "zero_fraction",
]
