"""Writes tests/oracles/vision from Hugging Face's own models: python tests/live/freeze_vision.py [name …]

Tiny models with every head and the settings that change the computation, run on images of the trained size and of
others. All weights are drawn so large that no term is invisible. Needs torch and transformers (the extra 'oracle').
"""

import inspect
import sys
from pathlib import Path

import numpy as np

ORACLES = Path(__file__).resolve().parent.parent / "oracles" / "vision"
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
       "image_size": 16, "patch_size": 4, "encoder_stride": 4}  # fmt: skip
DINO = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 15,
        "patch_size": 5}  # fmt: skip
BEIT = {**VIT, "vocab_size": 11}
SWIN = {"image_size": 30, "patch_size": 2, "embed_dim": 8, "depths": [2, 1, 2], "num_heads": [2, 2, 4],
        "window_size": 3, "mlp_ratio": 1.5}  # fmt: skip
SEGFORMER = {"num_encoder_blocks": 3, "depths": [2, 1, 2], "hidden_sizes": [8, 12, 16], "mlp_ratios": [2, 3, 2],
             "num_attention_heads": [1, 2, 4], "sr_ratios": [4, 2, 1], "patch_sizes": [7, 3, 3], "strides": [4, 2, 2],
             "decoder_hidden_size": 12}  # fmt: skip
MAE = {**VIT, "decoder_hidden_size": 12, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 3,
       "decoder_intermediate_size": 20}  # fmt: skip
LABELS = {"num_labels": 3}
# Sizes of images that the models were not made for. Hugging Face's Swin must see the one that is no larger than its
# windows last: it forgets how it shifted them.
OTHER = ((12, 28), (32, 20))

# name: (class, settings of its config, sizes of images)
VARIANTS = {
    "vit-base": ("ViTModel", {**VIT, "pooler_output_size": 10, "pooler_act": "relu"}, OTHER),
    "vit-oblong": ("ViTForImageClassification", {**VIT, **LABELS, "image_size": [12, 20], "qkv_bias": False}, ()),
    "vit-mim": ("ViTForMaskedImageModeling", VIT, ()),
    "deit-base": ("DeiTModel", VIT, OTHER),
    "deit-classes": ("DeiTForImageClassification", {**VIT, **LABELS, "hidden_act": "relu"}, OTHER),
    "deit-mim": ("DeiTForMaskedImageModeling", VIT, ()),
    "dinov2-base": ("Dinov2Model", {**DINO, "layerscale_value": 0.3}, ((15, 30), (24, 40))),
    "dinov2-swiglu": ("Dinov2ForImageClassification", {**DINO, **LABELS, "use_swiglu_ffn": True, "mlp_ratio": 3,
                                                       "use_mask_token": False}, OTHER),
    "registers-base": ("Dinov2WithRegistersModel", {**DINO, "num_register_tokens": 2}, ((10, 30), (40, 20))),
    "registers-swiglu": ("Dinov2WithRegistersForImageClassification",
                         {**DINO, **LABELS, "num_register_tokens": 3, "use_swiglu_ffn": True}, ((10, 30), (40, 20))),
    "beit-base": ("BeitModel", {**BEIT, "use_relative_position_bias": True, "drop_path_rate": 0.2}, OTHER),
    "beit-token": ("BeitModel", {**BEIT, "use_mean_pooling": False, "use_absolute_position_embeddings": True}, OTHER),
    "beit-shared": ("BeitForImageClassification", {**BEIT, **LABELS, "use_shared_relative_position_bias": True,
                                                   "use_mean_pooling": False, "layer_scale_init_value": 0.0}, OTHER),
    "beit-all": ("BeitForImageClassification",
                 {**BEIT, **LABELS, "use_shared_relative_position_bias": True, "use_relative_position_bias": True,
                  "use_absolute_position_embeddings": True, "layer_scale_init_value": 0.2}, OTHER),
    "beit-mim": ("BeitForMaskedImageModeling", {**BEIT, "use_mask_token": True, "use_mean_pooling": False,
                                                "use_relative_position_bias": True}, ()),
    "beit-maps": ("BeitForSemanticSegmentation",
                  {**BEIT, **LABELS, "num_hidden_layers": 5, "out_indices": [1, 3, 4, 5], "pool_scales": [1, 2, 3],
                   "auxiliary_channels": 6, "auxiliary_num_convs": 2, "auxiliary_concat_input": True,
                   "use_relative_position_bias": True}, ((20, 28),)),
    "beit-maps-bare": ("BeitForSemanticSegmentation",
                       {**BEIT, **LABELS, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "pool_scales": [2],
                        "use_auxiliary_head": False}, ()),
    "swin-base": ("SwinModel", {**SWIN, "use_absolute_embeddings": True}, ((36, 28), (24, 50))),
    "swin-classes": ("SwinForImageClassification", {**SWIN, **LABELS, "qkv_bias": False, "window_size": 4,
                                                    "image_size": 34, "layer_norm_eps": 1e-3}, ((41, 55), (32, 64))),
    "swin-mim": ("SwinForMaskedImageModeling", {**SWIN, "image_size": 32, "window_size": 4, "depths": [2, 2],
                                                "num_heads": [2, 4], "encoder_stride": 4}, ()),
    "segformer-base": ("SegformerModel", SEGFORMER, ((40, 72), (35, 61))),
    "segformer-classes": ("SegformerForImageClassification", {**SEGFORMER, **LABELS, "layer_norm_eps": 1e-2}, ()),
    "segformer-maps": ("SegformerForSemanticSegmentation", {**SEGFORMER, "num_labels": 4}, ((40, 72), (35, 61))),
    "segformer-one": ("SegformerForSemanticSegmentation", {**SEGFORMER, "num_labels": 1}, ()),
    "mae-normed": ("ViTMAEForPreTraining", {**MAE, "num_channels": 4, "image_size": 30, "patch_size": 6,
                                            "norm_pix_loss": True, "qkv_bias": False, "mask_ratio": 0.6}, ()),
    "mae-wide": ("ViTMAEForPreTraining", MAE, OTHER),
}  # fmt: skip


def build(name: str):
    """The Hugging Face model of a variant, in eval mode, with weights and running statistics drawn from its name."""
    import torch
    import transformers

    class_name, settings, _ = VARIANTS[name]
    cls = getattr(transformers, class_name)
    torch.manual_seed(sum(name.encode()))
    model = cls._from_config(cls.config_class(**settings), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            wide = parameter.ndim > 1
            parameter.copy_(torch.randn(parameter.shape) * (0.4 if wide else 0.2) + (0 if wide else 0.5))
        for key, buffer in model.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape) + 0.5)
    return model


def batches(name: str) -> list[dict[str, np.ndarray]]:
    """Inputs of the trained size, then of the variant's other sizes."""
    class_name, settings, others = VARIANTS[name]
    rng = np.random.default_rng(sum(name.encode()))
    size = settings.get("image_size", 64)
    patch, made = settings.get("patch_size", 4), []
    for height, width in ((size, size) if isinstance(size, int) else size, *others):
        images = 1 if made else 2
        shape = (images, settings.get("num_channels", 3), height, width)
        batch = {"pixel_values": rng.integers(-8, 9, shape).astype(np.float32) / 4}  # few values: small files
        patches = (height // patch) * (width // patch)
        if "MaskedImage" in class_name:
            batch["bool_masked_pos"] = rng.random((images, patches)) < 0.4
        if "PreTraining" in class_name:
            batch["noise"] = rng.random((images, patches)).astype(np.float32)
        if "Segmentation" in class_name:
            classes = max(settings["num_labels"], 2)
            batch["labels"] = rng.integers(0, classes, (images, 25, 31))
            batch["labels"][rng.random(batch["labels"].shape) < 0.2] = 255
        made.append(batch)
    return made


def run(model, inputs: dict[str, np.ndarray], stretch: bool) -> dict[str, np.ndarray]:
    """What a Hugging Face model gives for ``inputs``. ``stretch``: its position tables, for images of another size."""
    import torch

    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    if stretch and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        tensors["interpolate_pos_encoding"] = True
    with torch.no_grad():
        out = model(**tensors)
    names = ("last_hidden_state", "pooler_output", "logits", "reconstruction", "loss", "mask", "ids_restore",
             "cls_logits", "distillation_logits")  # fmt: skip
    return {name: out[name].numpy() for name in names if out.get(name) is not None}


def main(names: list[str]) -> None:
    for name in names or VARIANTS:
        folder = ORACLES / name
        model, arrays = build(name), {}
        model.save_pretrained(folder)
        for i, batch in enumerate(batches(name)):
            arrays |= {f"{i}/in/{key}": value for key, value in batch.items()}
            arrays |= {f"{i}/out/{key}": value for key, value in run(model, batch, i > 0).items()}
        np.savez_compressed(folder / "io.npz", **arrays)
        print(name, sum(file.stat().st_size for file in folder.iterdir()))


if __name__ == "__main__":
    main(sys.argv[1:])
