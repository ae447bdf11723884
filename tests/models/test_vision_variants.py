"""Vision models' other heads, settings and sizes of images: tiny models frozen by tests/live/freeze_vision.py."""

import numpy as np
import pytest
from models.test_vision import arrays, assert_same_tensors
from parity import assert_close_scaled, run

import jaxformers as jf
from jaxformers import image_losses

NAMES = (
    "beit-all", "beit-base", "beit-maps", "beit-maps-bare", "beit-mim", "beit-shared", "beit-token", "deit-base",
    "deit-classes", "deit-mim", "dinov2-base", "dinov2-swiglu", "mae-normed", "mae-wide", "registers-base",
    "registers-swiglu", "segformer-base", "segformer-classes", "segformer-maps", "segformer-one", "swin-base",
    "swin-classes", "swin-mim", "vit-base", "vit-mim", "vit-oblong",
)  # fmt: skip
PARTS = {"last_hidden_state": "last_hidden_state", "pooler_output": "pooled", "logits": "logits",
         "reconstruction": "logits"}  # fmt: skip


def cases(folder):
    """``[(inputs, outputs)]``, one for each size of images."""
    found = arrays(folder)
    count = 1 + max(int(name[0]) for name in found)
    part = lambda i, kind: {n[len(f"{i}/{kind}/") :]: a for n, a in found.items() if n.startswith(f"{i}/{kind}/")}
    return [(part(i, "in"), part(i, "out")) for i in range(count)]


def loss(model, batch, out):
    """The loss that Hugging Face gives with these inputs."""
    c, pixels = model.config, batch["pixel_values"]
    if "labels" in batch:
        auxiliary = (out.extra or {}).get("auxiliary_logits")
        more = 0 if auxiliary is None else image_losses.segmentation(auxiliary, batch["labels"])
        return image_losses.segmentation(out.logits, batch["labels"]) + getattr(c, "auxiliary_loss_weight", 0) * more
    if "noise" in batch:
        return image_losses.masked_patches(
            out.logits, pixels, out.extra["mask"], patch=c.patch_size, normalize=c.norm_pix_loss
        )
    return image_losses.masked_pixels(out.logits, pixels, batch["bool_masked_pos"], patch=c.patch_size)


@pytest.mark.parametrize("name", NAMES)
def test_equals_hugging_face_and_survives_a_round_trip(name, oracles, tmp_path):
    folder = oracles / "vision" / name
    model = jf.load(folder)
    for batch, expected in cases(folder):
        out = run(model, {key: value for key, value in batch.items() if key != "labels"})
        compared = 0
        for part, ours in PARTS.items():
            if part in expected:
                found, value = getattr(out, ours), expected[part]
                if value.ndim == 4 and part == "last_hidden_state":  # SegFormer's as a map, channels first
                    value = np.moveaxis(value, 1, -1).reshape(found.shape)
                assert_close_scaled(found, value, 2e-5)
                compared += 1
        assert compared
        if "loss" in expected:
            assert_close_scaled(loss(model, batch, out), expected["loss"], 1e-5)
    jf.save(model, tmp_path / "copy")
    assert_same_tensors(folder, tmp_path / "copy", {"decoder_encoder.layer": "decoder_layers"})
