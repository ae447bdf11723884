"""What `jf.info` says of a checkpoint, against the loaded model; and checkpoints in 8-bit floating point."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny

import jaxformers as jf
from jaxformers import fp8
from jaxformers.safetensors_file import LazyTensor
from jaxformers.safetensors_io import CheckpointError, open_checkpoint, write_checkpoint

eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")


def per_device(params) -> int:
    """Bytes of all arrays on the first device."""
    first = jax.devices()[0]
    return sum(s.data.nbytes for a in jax.tree.leaves(params) for s in a.addressable_shards if s.device == first)


@eight
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_info_is_what_loading_gives(tmp_path, monkeypatch, dtype):
    model = tiny.model("llama", num_key_value_heads=2)
    jf.save(model, tmp_path / "m")
    mesh = jf.mesh("data=2,fsdp=2,tensor=2")
    loaded = jf.functional(jf.load(tmp_path / "m", mesh=mesh, dtype=dtype))[1]
    monkeypatch.setattr(LazyTensor, "_view", lambda self: pytest.fail(f"{self.name} was read"))
    found = jf.info(tmp_path / "m", mesh="data=2,fsdp=2,tensor=2", dtype=dtype)
    assert found.parameters == sum(a.size for a in jax.tree.leaves(loaded))
    assert found.bytes == sum(a.nbytes for a in jax.tree.leaves(loaded))
    assert found.device_bytes == per_device(loaded) < found.bytes
    assert found.training_bytes == found.device_bytes * (8 if dtype else 4)
    up = next(p for p in found.parts if p.path == "layers.*.mlp.up.kernel")
    assert (up.times, up.shape, up.parameters) == (3, (8, 12), 3 * 96)
    assert found.file_bytes == (tmp_path / "m" / "model.safetensors").stat().st_size
    assert jf.info(tmp_path / "m", mesh=mesh, dtype=dtype) == found


def test_info_of_packed_weights_counts_what_they_stand_for(tmp_path):
    model = tiny.model("llama", hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=4)
    jf.save(jf.compress.gptq(model, method="rtn", bits=4, group_size=32), tmp_path / "m")
    found, loaded = jf.info(tmp_path / "m"), jf.functional(jf.load(tmp_path / "m"))[1]
    assert found.parameters == sum(a.size for a in jax.tree.leaves(jf.functional(model)[1]))
    assert found.bytes == sum(a.nbytes for a in jax.tree.leaves(loaded)) < found.parameters * 4


def test_info_of_a_mesh_that_makes_no_sense(tmp_path):
    jf.save(tiny.model("bert"), tmp_path / "m")
    with pytest.raises(ValueError, match="'date=2' is not one of"):
        jf.info(tmp_path / "m", mesh="date=2")


# ---- 8-bit floating point ------------------------------------------------------------------------------------------


def shrink(directory, out, kind, *, block=None, per="block", suffix="weight_scale_inv", method="fp8"):
    """The checkpoint in ``directory`` with its layers' matrices in 8 bits; {name: what they stand for, float32}."""
    checkpoint, stands, tensors = open_checkpoint(directory), {}, []
    for name in checkpoint:
        w = np.array(checkpoint[name].read())
        if ".layers." not in name or w.ndim != 2:
            tensors.append((name, w))
            continue
        top = float(ml_dtypes.finfo(kind).max)
        rows, columns = {"block": block or (1, 1), "output": (1, w.shape[1]), "tensor": w.shape}[per]
        grid = tuple(-(-n // b) for n, b in zip(w.shape, (rows, columns)))
        scale = np.zeros(grid, np.float32)
        narrow = np.zeros(w.shape, kind)
        stood = np.zeros(w.shape, np.float32)
        for i in range(grid[0]):
            for j in range(grid[1]):
                part = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                scale[i, j] = np.abs(w[part]).max() / top
                narrow[part] = (w[part] / scale[i, j]).astype(kind)
                stood[part] = narrow[part].astype(np.float32) * scale[i, j]
        stands[name] = stood
        module = name.removesuffix(".weight")
        tensors += [(name, narrow), (f"{module}.{suffix}", scale.reshape(1) if per == "tensor" else scale)]
        tensors += [(f"{module}.input_scale", np.ones(1, np.float32))] if per == "tensor" else []
    config = json.loads((directory / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": method, "weight_block_size": block}, "torch_dtype": "bfloat16"}
    config.pop("dtype", None)
    write_checkpoint(tensors, out, extra_files={"config.json": json.dumps(config)})
    return stands


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("float8_e4m3fn", {"block": (5, 3)}),  # the last block of each axis is cut off
        ("float8_e5m2", {"block": (128, 128)}),
        ("float8_e4m3fn", {"per": "output", "suffix": "weight_scale", "method": "compressed-tensors"}),
        ("float8_e4m3fn", {"per": "tensor", "suffix": "weight_scale", "method": "modelopt"}),
    ],
)
def test_fp8_weights_are_what_they_stand_for(tmp_path, kind, options):
    jf.save(tiny.model("llama"), tmp_path / "wide")
    stands = shrink(tmp_path / "wide", tmp_path / "m", np.dtype(getattr(ml_dtypes, kind)), **options)
    model = jf.load(tmp_path / "m", dtype="float32")
    for i, layer in enumerate(model.layers):
        for ours, theirs in (("query", "self_attn.q_proj"), ("out", "self_attn.o_proj")):
            kernel = getattr(layer.attention, ours).kernel.get_value()
            np.testing.assert_array_equal(kernel, stands[f"model.layers.{i}.{theirs}.weight"].T)
        down = stands[f"model.layers.{i}.mlp.down_proj.weight"]
        np.testing.assert_array_equal(layer.mlp.down.kernel.get_value(), down.T)
    assert jf.load(tmp_path / "m").layers[0].mlp.up.kernel.get_value().dtype == jax.numpy.bfloat16
    assert jf.info(tmp_path / "m").parameters == jf.info(tmp_path / "wide").parameters
    jf.save(model, tmp_path / "again")  # as the wide model that it has become
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert tiny.largest_difference(jf.functional(jf.load(tmp_path / "again"))[1], jf.functional(model)[1]) == 0


@eight
def test_fp8_onto_a_mesh(tmp_path):
    jf.save(tiny.model("llama", num_key_value_heads=2), tmp_path / "wide")
    shrink(tmp_path / "wide", tmp_path / "m", np.dtype(ml_dtypes.float8_e4m3fn), block=(4, 4))
    whole, spread = (jf.load(tmp_path / "m", dtype="float32", mesh=m) for m in (None, jf.mesh("fsdp=4,tensor=2")))
    assert tiny.largest_difference(jf.functional(spread)[1], jf.functional(whole)[1]) == 0


def test_fp8_rows_are_widened_piece_by_piece():
    """A tensor larger than one piece, cut at blocks."""
    rng = np.random.default_rng(0)
    narrow = rng.normal(size=(600, 16384)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(1, 2, (5, 128)).astype(np.float32)

    class Tensor:
        def __init__(self, array):
            self.array, self.shape, self.ndim, self.dtype, self.nbytes = array, array.shape, array.ndim, array.dtype, 0

        def read(self):
            return self.array

    wide = fp8.WideTensor("w", Tensor(narrow), Tensor(scale), (128, 128), np.dtype(np.float32)).read()
    for i, j in ((0, 0), (127, 127), (128, 128), (599, 16383), (383, 5000)):
        assert wide[i, j] == narrow[i, j].astype(np.float32) * scale[i // 128, j // 128]


def test_fp8_that_does_not_fit(tmp_path):
    jf.save(tiny.model("llama"), tmp_path / "wide")
    kind = np.dtype(ml_dtypes.float8_e4m3fn)
    shrink(tmp_path / "wide", tmp_path / "a", kind, block=(5, 3))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    for change, message in (
        ({"weight_block_size": [4, 4]}, "has a scale of shape"),
        ({"weight_block_size": None}, "no block of None"),
        ({"quant_method": "mxfp4"}, "quant_method 'mxfp4'; supported are fp8"),
    ):
        changed = config | {"quantization_config": config["quantization_config"] | change}
        (tmp_path / "a" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            jf.load(tmp_path / "a")
