"""Writes tests/oracles/images from Hugging Face's image processors on Pillow: python tests/live/freeze_images.py

Needs transformers and Pillow 13 or newer (the extra 'oracle'): older ones resize a tall image's width first.
"""

import json
from pathlib import Path

import numpy as np

ORACLES = Path(__file__).resolve().parent.parent / "oracles" / "images"
SMALL, CROP = {"height": 13, "width": 17}, {"height": 12, "width": 16}

# name: (class, settings, heights and widths of images)
CASES = {
    "vit": ("ViTImageProcessor", {"size": SMALL}, ((40, 30), (9, 60))),
    "vit-nearest": ("ViTImageProcessor", {"size": SMALL, "resample": 0, "do_normalize": False}, ((40, 30), (9, 60))),
    "vit-lanczos": ("ViTImageProcessor", {"size": SMALL, "resample": 1, "do_rescale": False}, ((40, 30),)),
    "vit-box": ("ViTImageProcessor", {"size": SMALL, "resample": 4, "rescale_factor": 0.01}, ((40, 30),)),
    "vit-hamming": ("ViTImageProcessor", {"size": SMALL, "resample": 5, "image_mean": [0.1, 0.2, 0.3]}, ((40, 30),)),
    "vit-as-is": ("ViTImageProcessor", {"do_resize": False}, ((12, 14), (12, 14))),
    "vit-longest": ("ViTImageProcessor", {"size": {"shortest_edge": 10, "longest_edge": 15}}, ((20, 50),)),
    "vit-fits": ("ViTImageProcessor", {"size": {"max_height": 9, "max_width": 20}}, ((20, 50),)),
    "deit": ("DeiTImageProcessor", {"size": {"height": 20, "width": 20}, "crop_size": CROP}, ((70, 30), (9, 60))),
    "beit": ("BeitImageProcessor", {"size": SMALL, "do_center_crop": True, "crop_size": {"height": 16, "width": 15}},
             ((33, 20),)),
    "dinov2": ("BitImageProcessor", {"size": {"shortest_edge": 14}, "crop_size": CROP}, ((40, 30), (31, 90))),
    "clip": ("CLIPImageProcessor", {"size": {"shortest_edge": 12}, "crop_size": {"height": 12, "width": 12}},
             ((30, 31), (44, 22))),
    "segformer": ("SegformerImageProcessor", {"size": SMALL, "do_reduce_labels": True}, ((40, 30), (9, 60))),
    "segformer-plain": ("SegformerImageProcessor", {"size": SMALL}, ((40, 30),)),
}  # fmt: skip


def build(name: str):
    """Hugging Face's processor of a case, on Pillow."""
    import transformers

    class_name, settings, _ = CASES[name]
    return getattr(transformers, class_name + "Pil")(**settings)


def inputs(name: str) -> dict[str, list[np.ndarray]]:
    """Images of noise and slopes, drawn from the name, and class numbers for segmentation."""
    rng = np.random.default_rng(sum(name.encode()))
    images = []
    for h, w in CASES[name][2]:
        slope = np.add.outer(np.linspace(0, 90, h), np.linspace(0, 90, w))[..., None] * [1, 0.5, 0.2]
        images.append(np.clip(slope + rng.integers(0, 120, (h, w, 3)), 0, 255).astype(np.uint8))
    maps = [rng.choice([0, 1, 2, 7, 254, 255], image.shape[:2]).astype(np.uint8) for image in images]
    return {"images": images, "segmentation_maps": maps} if name.startswith("segformer") else {"images": images}


def run(processor, given: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    out = processor(**{key: [a.copy() for a in value] for key, value in given.items()})
    return {key: np.stack([np.asarray(a) for a in out[key]]) for key in out}


def main() -> None:
    arrays, configs = {}, {}
    for name in CASES:
        processor, given = build(name), inputs(name)
        configs[name] = processor.to_dict()
        for key, values in given.items():
            arrays |= {f"{name}/in/{key}/{i}": value for i, value in enumerate(values)}
        arrays |= {f"{name}/out/{key}": value for key, value in run(processor, given).items()}
    ORACLES.mkdir(exist_ok=True)
    np.savez_compressed(ORACLES / "images.npz", **arrays)
    (ORACLES / "configs.json").write_text(json.dumps(configs, indent=1, default=dict) + "\n")
    (ORACLES / "README.md").write_text(README)


README = """# Image processors
Hugging Face's processors on Pillow 13 (transformers 5.24), made by tests/live/freeze_images.py: per case its
`preprocessor_config.json` (configs.json), images and class numbers `in/images/i`, `in/segmentation_maps/i`, and
`out/pixel_values`, `out/labels`. Equal to 1e-5; labels equal.
"""

if __name__ == "__main__":
    main()
