"""Image processors: the frozen ones are those of the installed version, and what is written here it reads alike."""

import numpy as np
import pytest

import jaxformers as jf

transformers = pytest.importorskip("transformers", reason="live comparison: pip install 'jaxformers[oracle]'")
PIL = pytest.importorskip("PIL", reason="live comparison: pip install 'jaxformers[vision]'")

from live import freeze_images  # noqa: E402

if int(PIL.__version__.split(".")[0]) < 13:
    pytest.skip("Pillow before version 13 resizes tall images in another order", allow_module_level=True)


@pytest.mark.parametrize("name", freeze_images.CASES)
def test_both_ways(name, tmp_path):
    theirs = freeze_images.build(name)
    theirs.save_pretrained(tmp_path)
    ours = jf.load_image_processor(tmp_path)
    rng = np.random.default_rng(7)
    shape = lambda: tuple(rng.integers(12, 70, 2))
    one = shape()
    sizes = [one] * 3 if name in ("vit-as-is", "vit-longest", "vit-fits") else [shape() for _ in range(3)]
    given = {"images": [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]}
    if name.startswith("segformer"):
        given["segmentation_maps"] = [rng.integers(0, 256, size).astype(np.uint8) for size in sizes]
    expected, found = freeze_images.run(theirs, given), ours(**given)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].shape == value.shape and np.abs(found[key] - value).max() <= 1e-5, key
    (tmp_path / "preprocessor_config.json").write_bytes(ours.files()["preprocessor_config.json"])
    again = freeze_images.run(type(theirs).from_pretrained(tmp_path), given)
    assert all(np.array_equal(again[key], expected[key]) for key in expected)
