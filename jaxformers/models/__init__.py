"""Architectures, one a file: a frozen ``Config``, the modules, and the table of Hugging Face's names.

Each module has ``Config``, ``Model``, ``KEYS`` and ``HEADS`` (parameter paths ↔ checkpoint names), ``PREFIX`` (under
which a checkpoint with a head keeps the body; may be empty), ``BASE_CLASS`` and ``IGNORED`` (buffers that carry no
weights). Where there is one: ``RENAMED`` lists (pattern, replacement): from other writers' names to those in KEYS;
``DEFAULT_HEAD`` is the head where a checkpoint names no class; ``OPTIONAL`` names the parts of models that only some
heads or configs have; ``keys(config)`` adds to KEYS, and ``ignored(config)`` to IGNORED, what a config decides;
``FLOAT32`` lists patterns of parameters that never get less precision; ``ALIASES``
{name: names that stand for it where it is missing}; ``UNPREFIXED``: heads whose checkpoints do without PREFIX;
``check_head(config, head)`` refuses heads that a config cannot have;
``settle(config, tensors)``: the config with what only a checkpoint's tensors tell.
"""

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any

from jaxformers.safetensors_file import show

# model_type of config.json -> module here
ARCHITECTURES = {
    "audio-spectrogram-transformer": "audio_spectrogram_transformer",
    "beit": "beit",
    "bert": "bert",
    "camembert": "roberta",
    "clip": "clip",
    "clip_text_model": "clip_text",
    "clip_vision_model": "clip_vision",
    "deberta-v2": "deberta_v2",
    "deepseek_v3": "deepseek_v3",
    "deit": "deit",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2_with_registers",
    "distilbert": "distilbert",
    "electra": "electra",
    "esm": "esm",
    "gin": "gin",
    "glm": "glm",
    "gpt2": "gpt2",
    "gpt_bigcode": "gpt_bigcode",
    "gpt_neo": "gpt_neo",
    "gpt_neox": "gpt_neox",
    "gptj": "gptj",
    "llama": "llama",
    "llava": "llava",
    "mistral": "mistral",
    "mpnet": "mpnet",
    "mt5": "t5",
    "opt": "opt",
    "qwen2": "qwen2",
    "roberta": "roberta",
    "segformer": "segformer",
    "swin": "swin",
    "t5": "t5",
    "trocr": "trocr",
    "vision-encoder-decoder": "vision_encoder_decoder",
    "vit": "vit",
    "vit_mae": "vit_mae",
    "wav2vec2": "wav2vec2",
    "xlm-roberta": "roberta",
}


def architecture(model_type: str) -> ModuleType:
    """The module that implements ``model_type``. Raises ValueError listing the known ones."""
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"config.json: model_type {show(model_type)} is not known; known are {', '.join(ARCHITECTURES)}"
        )
    return importlib.import_module(f"jaxformers.models.{ARCHITECTURES[model_type]}")


def module_of(config: Any) -> ModuleType:
    """The architecture that a Config belongs to."""
    return sys.modules[type(config).__module__]


def reads_images(config: Any) -> bool:
    """Is it the Config of an encoder of images, one that gives a sequence of states?"""
    return hasattr(config, "hidden_size") and _inputs(config)[0] == "pixel_values"


def decodes(config: Any) -> bool:
    """Is it the Config of a decoder of texts that needs no encoder?"""
    model = module_of(config).Model
    alone = hasattr(model, "empty_cache") and not hasattr(model, "encode") and hasattr(config, "hidden_size")
    return alone and "pixel_values" not in _inputs(config) and getattr(config, "is_decoder", True)


def _inputs(config: Any) -> list[str]:
    return list(inspect.signature(module_of(config).Model.__call__).parameters)[1:]
