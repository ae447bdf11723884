"""The smoke preset on scenes of digits; the paper's sizes and its step without any weights; data there or not."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import jaxformers as jf
from experiments import common, transkd
from jaxformers.compress.transkd import new_distiller
from jaxformers.cost import count_flops
from jaxformers.models import segformer

pytest.importorskip("sklearn")


@pytest.mark.slow
def test_smoke(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(common, "shared_data", lambda name, given=None: given)
    result = transkd.run(transkd.PRESETS["smoke"], tmp_path)
    assert [r["method"] for r in result["rows"]] == ["none", "ea"] and len(result["classes"]) == 11
    assert all(0 <= r["mIoU"] <= 100 and len(r["IoU"]) == 11 for r in result["rows"])
    assert (tmp_path / "figure.png").is_file()
    assert jf.load(tmp_path / "student").head.classifier.kernel.get_value().shape == (1, 1, 8, 11)


def test_scenes_do_not_share_digits():
    train, test, again = (transkd.scenes(4, seed, (64, 96)) for seed in (0, 1, 0))
    assert not np.array_equal(train.images, test.images) and np.array_equal(train.images, again.images)
    assert (train.labels == 10).mean() > 0.5 and len(np.unique(train.labels)) > 5


def abstract(config):
    return jf.surgery.named(
        nnx.eval_shape(lambda: segformer.SegFormer(config, head="semantic_segmentation", rngs=nnx.Rngs(0)))
    )


def test_the_papers_sizes():
    """Millions of parameters in the authors' table: 27.36, 3.72, and with what distils 4.56, 5.22 and 5.53."""
    config = transkd.PRESETS["paper"]
    teacher, student = (abstract(transkd.sizes(config, 20, teacher=own)) for own in (True, False))
    count = lambda model: sum(x.size for x in jax.tree.leaves(jf.functional(model)[1])) / 1e6
    assert count(teacher) == pytest.approx(27.36, abs=0.01) and count(student) == pytest.approx(3.72, abs=0.01)
    for method, millions in (("base", 4.56), ("gl", 5.22), ("ea", 5.53)):
        made = nnx.eval_shape(
            lambda m=method: new_distiller(teacher, student, transkd.loss(config, m), key=jax.random.key(0))
        )
        assert count(student) + count(made) == pytest.approx(millions, abs=0.015)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
def test_the_paper_preset_has_a_step():
    config = dataclasses.replace(transkd.PRESETS["paper"], size=(128, 256))
    step = transkd.step(config, jf.mesh("data=8"))
    traced = jax.jit(step.function, donate_argnums=step.donate, out_shardings=step.out_shardings).trace(*step.args)
    assert step.parameters / 1e6 == pytest.approx(27.36 + 5.53, abs=0.03)
    assert count_flops(traced.jaxpr) > 1e11


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"neither leftImg8bit/ nor train\.npz"):
        transkd.data(transkd.Config(data=tmp_path))
    with pytest.raises(ValueError, match="methods: expected some of"):
        transkd.Config(methods=("teach",))


def test_street_scenes(shared):
    train, val, test, names = transkd.data(transkd.Config())
    assert (len(train), len(val), len(test), len(names)) == (123, 34, 47, 11) and train.void == 11
