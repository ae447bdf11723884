"""Keys of another generator in `fit`: `rbg` compiles faster than the default; it resumes, and does not see the mesh."""

import jax
import numpy as np
import pytest
from train import toy

import jaxformers as jf
from jaxformers.data.batches import array_batches
from jaxformers.train import OptimConfig, TrainConfig, fit

OPTIM = OptimConfig(learning_rate=1e-2, schedule="constant")
IMPLS = ("threefry2x32", "rbg", "unsafe_rbg")


def run(impl, steps=6, directory=None, mesh=None):
    data = array_batches(toy.arrays(), 16, threads=0)
    train = TrainConfig(steps=steps, optim=OPTIM, checkpoint_every=0 if directory is None else 2, progress=False)
    key = jax.random.key(3, impl=impl)
    done = fit(toy.objective, toy.parameters(), data, train, key=key, apply=toy.apply, directory=directory, mesh=mesh)
    return jf.paths.flatten(done.params)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_resumed_run_drops_the_same(impl, tmp_path):
    whole, other = run(impl), run("threefry2x32" if impl == "rbg" else "rbg")
    run(impl, steps=4, directory=tmp_path)
    resumed = run(impl, directory=tmp_path)
    assert all(np.array_equal(resumed[path], whole[path]) for path in whole)
    assert not all(np.array_equal(other[path], whole[path]) for path in whole), "dropout does depend on the generator"


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
@pytest.mark.parametrize("impl", IMPLS)
def test_a_mesh_drops_the_same(impl):
    one, spread = run(impl), run(impl, mesh=jf.mesh("data=4,fsdp=2"))
    for path in one:
        np.testing.assert_allclose(spread[path], one[path], rtol=1e-4, atol=1e-6)
