"""Making models smaller: quantisation, distillation, fewer layers. Each system is a module; its verbs are here."""

from jaxformers.compress.depth import block_influence, macro_influence, remove_layers
from jaxformers.compress.fusegpt import FuseConfig, fuse_layers
from jaxformers.compress.gptq import dequantize, gptq, quantize_checkpoint  # gptq: the function, not the module
from jaxformers.compress.rmsnorm import convert_norm, convert_norm_checkpoint, verify_norm
from jaxformers.compress.x_ecomla import upcycle_mla

__all__ = [
    "FuseConfig",
    "block_influence",
    "convert_norm",
    "convert_norm_checkpoint",
    "dequantize",
    "fuse_layers",
    "gptq",
    "macro_influence",
    "quantize_checkpoint",
    "remove_layers",
    "upcycle_mla",
    "verify_norm",
]
