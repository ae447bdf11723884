"""Making models smaller: quantisation, pruning, distillation, fewer layers. Each system is a module; verbs are here."""

from jaxformers.compress.axformer import specialise
from jaxformers.compress.depth import block_influence, macro_influence, remove_layers
from jaxformers.compress.essential_sparsity import prune
from jaxformers.compress.fusegpt import FuseConfig, fuse_layers
from jaxformers.compress.gptq import dequantize, gptq, quantize_checkpoint  # gptq: the function, not the module
from jaxformers.compress.rmsnorm import convert_norm, convert_norm_checkpoint, verify_norm
from jaxformers.compress.sparsity_curve import lottery_ticket, mask_similarity, sparsity_sweep
from jaxformers.compress.teacher_intervention_qat import qat
from jaxformers.compress.vtrans_distil import DistilConfig
from jaxformers.compress.vtrans_prune import VTransConfig, vib_prune
from jaxformers.compress.x_ecomla import upcycle_mla
from jaxformers.compress.zero_tprune import prune_tokens

__all__ = [
    "DistilConfig",
    "FuseConfig",
    "VTransConfig",
    "block_influence",
    "convert_norm",
    "convert_norm_checkpoint",
    "dequantize",
    "fuse_layers",
    "gptq",
    "lottery_ticket",
    "macro_influence",
    "mask_similarity",
    "prune",
    "prune_tokens",
    "qat",
    "quantize_checkpoint",
    "remove_layers",
    "sparsity_sweep",
    "specialise",
    "upcycle_mla",
    "verify_norm",
    "vib_prune",
]
