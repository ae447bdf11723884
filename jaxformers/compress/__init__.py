"""Making models smaller: quantisation and distillation. Each system is a module; its verb is a function here."""

from jaxformers.compress.gptq import dequantize, gptq, quantize_checkpoint  # gptq: the function, not the module

__all__ = ["dequantize", "gptq", "quantize_checkpoint"]
