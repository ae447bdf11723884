"""Writes tests/oracles/mixed from Hugging Face's own implementations: python tests/live/freeze_mixed.py

Tiny models of images and texts for what the other oracles leave out: every class, and the settings that change the
computation. All weights are drawn so large that no term is invisible. Needs torch and transformers (pip install
'jaxformers[oracle]').
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

ORACLES = Path(__file__).resolve().parent.parent / "oracles" / "mixed"
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 12, "patch_size": 4, "projection_dim": 10}
TEXT = {**SIZES, "hidden_size": 12, "vocab_size": 40, "max_position_embeddings": 16, "projection_dim": 10,
        "eos_token_id": 39, "bos_token_id": 0, "pad_token_id": 1}  # fmt: skip
LEGACY = {**TEXT, "eos_token_id": 2, "hidden_act": "gelu"}
CLIP = {"vision_config": VISION, "text_config": TEXT, "projection_dim": 7}
OLD_CLIP = {**CLIP, "vision_config": {**VISION, "hidden_act": "gelu"}, "text_config": LEGACY,
            "logit_scale_init_value": 1.5}  # fmt: skip
MISTRAL = {**SIZES, "model_type": "mistral", "vocab_size": 40, "num_key_value_heads": 1, "sliding_window": 8,
           "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 40, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 64,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
TIED = {**MISTRAL, "model_type": "llama", "sliding_window": None, "tie_word_embeddings": True}
LLAVA = {"image_token_index": 37, "vision_config": {**VISION, "model_type": "clip_vision_model"}}
FULL = {**LLAVA, "text_config": MISTRAL, "vision_feature_select_strategy": "full", "vision_feature_layer": [0, -1],
        "multimodal_projector_bias": False, "projector_hidden_act": "relu"}  # fmt: skip
VIT = {**LLAVA, "text_config": GPT2, "vision_config": {**SIZES, "image_size": 12, "patch_size": 4, "model_type": "vit"}}

IMAGE = {**SIZES, "image_size": 12, "patch_size": 4}
DECODER = {**SIZES, "hidden_size": 12, "vocab_size": 40, "max_position_embeddings": 24, "is_decoder": True,
           "add_cross_attention": True, "eos_token_id": None}  # fmt: skip
STARTS = {"decoder_start_token_id": 5, "pad_token_id": 1, "eos_token_id": None}
ROBERTA = {**STARTS, "encoder": {**IMAGE, "model_type": "vit"}, "decoder": {**DECODER, "model_type": "roberta",
           "pad_token_id": 1, "tie_word_embeddings": False}}  # fmt: skip
BEIT = {**STARTS, "encoder": {**IMAGE, "model_type": "beit", "hidden_size": 12, "use_relative_position_bias": True},
        "decoder": {**DECODER, "model_type": "bert", "hidden_act": "relu"}}  # fmt: skip
SINES = {**STARTS, "encoder": {**IMAGE, "model_type": "deit"}, "decoder": {"model_type": "trocr", "vocab_size": 40,
         "d_model": 12, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 20, "pad_token_id": 1,
         "cross_attention_hidden_size": 16, "scale_embedding": True, "use_learned_position_embeddings": False,
         "layernorm_embedding": False, "activation_function": "relu", "tie_word_embeddings": False,
         "eos_token_id": None}}  # fmt: skip
CAPTION = {**STARTS, "encoder": {**IMAGE, "model_type": "vit"}, "decoder": {**GPT2, "add_cross_attention": True,
           "tie_word_embeddings": True, "eos_token_id": None}}  # fmt: skip

# name: (class, settings of its config, what its inputs are)
VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "clip-legacy": ("CLIPModel", OLD_CLIP, "images texts"),
    "clip-stretched": ("CLIPModel", CLIP, "wide texts"),
    "clip-labels": ("CLIPForImageClassification", {**CLIP, "num_labels": 3}, "images"),
    "clip-vision": ("CLIPVisionModel", VISION, "images"),
    "clip-vision-projection": ("CLIPVisionModelWithProjection", VISION, "wide"),
    "clip-text": ("CLIPTextModel", TEXT, "texts"),
    "clip-text-projection": ("CLIPTextModelWithProjection", LEGACY, "texts"),
    "llava-mistral": ("LlavaForConditionalGeneration", FULL, "chats"),
    "llava-gpt2": ("LlavaForConditionalGeneration", VIT, "chats"),
    "llava-base": ("LlavaModel", {**LLAVA, "text_config": MISTRAL}, "chats"),
    "llava-tied": ("LlavaForConditionalGeneration", {**LLAVA, "text_config": TIED}, "chats"),
    "ved-roberta": ("VisionEncoderDecoderModel", ROBERTA, "captions"),
    "ved-beit-bert": ("VisionEncoderDecoderModel", BEIT, "captions"),
    "ved-trocr-sines": ("VisionEncoderDecoderModel", SINES, "captions"),
    "ved-gpt2": ("VisionEncoderDecoderModel", CAPTION, "captions"),
}


def build(name: str) -> Any:
    """The Hugging Face model of a variant, in eval mode, with weights drawn from its name."""
    import torch
    import transformers

    class_name, settings, _ = VARIANTS[name]
    cls = getattr(transformers, class_name)
    torch.manual_seed(sum(name.encode()))
    model = cls._from_config(cls.config_class(**settings), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:  # a scale stays where the config puts it
                wide = parameter.ndim > 1
                parameter.copy_(torch.randn(parameter.shape) * (0.4 if wide else 0.2) + (0 if wide else 0.5))
    if model.can_generate():
        model.generation_config.eos_token_id = None
    return model


def batch(name: str) -> dict[str, np.ndarray]:
    """Images (2 of the config's size, or wider than high), texts (3: full, padded on the right, on the left), chats
    (3 padded on the left, with two images, none and one), captions (3 images with texts, the last one padded)."""
    rng = np.random.default_rng(sum(name.encode()))
    kinds, found = VARIANTS[name][2].split(), {}
    if "images" in kinds or "wide" in kinds:
        size = (12, 12) if "images" in kinds else (12, 20)
        found["pixel_values"] = rng.standard_normal((2, 3, *size)).astype(np.float32)
    if "texts" in kinds:
        ids, mask = rng.integers(3, 38, (3, 9)), np.ones((3, 9), int)
        mask[1, 6:] = mask[2, :3] = 0
        ids[:, -2] = ids[1, 4] = 39  # the end token, followed by another token, or by padding
        found |= {"input_ids": np.where(mask == 1, ids, 1), "attention_mask": mask}
    if "chats" in kinds:
        each = 10 if VARIANTS[name][1].get("vision_feature_select_strategy") == "full" else 9
        ids = rng.integers(3, 37, (3, 25))
        ids[0, 2 : 2 + each] = ids[0, 4 + each : 4 + 2 * each] = ids[2, 12 : 12 + each] = 37
        mask = np.ones_like(ids)
        mask[1, :8] = mask[2, :4] = 0
        pixels = rng.standard_normal((3, 3, 12, 12)).astype(np.float32)
        found = {"pixel_values": pixels, "input_ids": np.where(mask == 1, ids, 0), "attention_mask": mask}
    if "captions" in kinds:
        ids, mask = rng.integers(3, 40, (3, 7)), np.ones((3, 7), int)
        mask[2, 4:] = 0
        pixels = rng.standard_normal((3, 3, 12, 12)).astype(np.float32)
        ids = np.where(mask == 1, ids, 1)
        found = {"pixel_values": pixels, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    return found


def run(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a Hugging Face model gives for ``inputs``: every array of its output, by name."""
    import torch

    options = {"interpolate_pos_encoding": True} if inputs.get("pixel_values", np.zeros(1)).shape[-1] == 20 else {}
    inputs = {k: torch.from_numpy(v) for k, v in inputs.items()}
    start = getattr(model.config, "decoder_start_token_id", None)
    ends = {"decoder_start_token_id": start} if start is not None else {}
    with torch.no_grad():
        out = model(**inputs, **options)
        found = flat({k: v for k, v in out.items() if k not in ("image_outputs", "cache", "past_key_values")})
        if getattr(out, "image_outputs", None) is not None:
            found["image_hidden_states"] = torch.stack(out.image_outputs.pooler_output).numpy()
        if model.can_generate():
            prompt = {name: array for name, array in inputs.items() if not name.startswith("decoder_")}
            ids = model.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, **ends)
            found["generated"] = ids[:, inputs["input_ids"].shape[1] if "input_ids" in inputs else 1 :].numpy()
    return found


def flat(out: Any) -> dict[str, np.ndarray]:
    """The arrays of an output and of those within it (whose pooled states are projected there, so left out)."""
    found = {}
    for name, value in out.items():
        if hasattr(value, "items"):
            inside = {f"{name}.{inner}": array for inner, array in flat(value).items() if inner != "pooler_output"}
            found |= inside
        elif hasattr(value, "numpy"):
            found[name] = value.numpy()
    return found


def main(names: list[str]) -> None:
    for name in names or VARIANTS:
        folder = ORACLES / name
        model, inputs = build(name), batch(name)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        arrays = {f"in.{k}": v for k, v in inputs.items()} | {f"out.{k}": v for k, v in run(model, inputs).items()}
        np.savez_compressed(folder / "io.npz", **arrays)
        print(name, sum(file.stat().st_size for file in folder.iterdir()), *arrays)


if __name__ == "__main__":
    main(sys.argv[1:])
