"""Checkpoint files: the reference implementation as oracle, round trips, sharding, laziness, corruption."""

import json
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import TensorSpec, safe_open, serialize
from safetensors.numpy import load_file, save_file

from jaxformers.safetensors_file import DTYPES, is_finite
from jaxformers.safetensors_io import (
    CheckpointError,
    SafetensorsFile,
    open_checkpoint,
    read_header,
    write_checkpoint,
    write_tensors,
)


def random_array(rng, kind: str, shape: tuple) -> np.ndarray:
    """Random bits of a dtype of the format: NaN payloads and subnormal numbers included."""
    dtype = DTYPES[kind]
    raw = rng.integers(0, 2 if kind == "BOOL" else 256, max(1, int(np.prod(shape))) * dtype.itemsize, dtype=np.uint8)
    return raw.view(dtype)[: int(np.prod(shape))].reshape(shape)


def every_dtype() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(), (3,), (0,), (2, 5), (4, 0, 2)]
    return {f"{kind}.{i}": random_array(rng, kind, shape) for kind in DTYPES for i, shape in enumerate(shapes)}


def reference_bytes(tensors: dict[str, np.ndarray], metadata) -> bytes:
    specs = {
        name: TensorSpec(dtype=a.dtype.name, shape=a.shape, data_ptr=a.ctypes.data, data_len=a.nbytes)
        for name, a in tensors.items()
    }
    return bytes(serialize(specs, metadata=metadata))


def same_bits(a, b) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_files_equal_the_reference_writer_byte_for_byte(tmp_path):
    tensors = every_dtype()
    write_checkpoint(reversed(tensors.items()), tmp_path / "c")
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == reference_bytes(tensors, {"format": "pt"})


def test_safe_open_reads_back_equal_bits(tmp_path):
    numpy_kinds = {"BOOL", "U8", "I8", "I16", "U16", "F16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"}
    tensors = {name: a for name, a in every_dtype().items() if name.split(".")[0] in numpy_kinds}
    write_checkpoint(tensors.items(), tmp_path / "c")
    with safe_open(tmp_path / "c" / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        assert all(same_bits(file.get_tensor(name), a) for name, a in tensors.items())


def test_reads_what_the_reference_wrote(tmp_path):
    tensors = every_dtype()
    (tmp_path / "model.safetensors").write_bytes(reference_bytes(tensors, None))
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint) == set(tensors) and checkpoint.metadata == {}
    assert all(same_bits(checkpoint[name].read(), a) for name, a in tensors.items())


@settings(max_examples=60)
@given(st.data())
def test_round_trip(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    names = data.draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=8), unique=True, max_size=8))
    tensors = {}
    for name in names:
        kind = data.draw(st.sampled_from(list(DTYPES)))
        shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=4)))
        tensors[name] = random_array(rng, kind, shape)
    limit = data.draw(st.sampled_from([1, 50, 1000, 5e9]))
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoint"
        write_checkpoint(tensors.items(), directory, max_shard_bytes=limit)
        checkpoint = open_checkpoint(directory)
        assert set(checkpoint) == set(tensors)
        for name, array in tensors.items():
            assert same_bits(checkpoint[name].read(), array)
            assert checkpoint[name].nbytes == array.nbytes and checkpoint[name].ndim == array.ndim
        for file in checkpoint.files:
            assert int.from_bytes(file.path.read_bytes()[:8], "little") % 8 == 0  # the data is aligned
            with safe_open(file.path, framework="np"):
                assert len(file) == 1 or sum(t.nbytes for t in file.values()) <= limit
        assert checkpoint.nbytes == sum(a.nbytes for a in tensors.values())
        index = directory / "model.safetensors.index.json"
        assert index.exists() == (len(checkpoint.files) > 1)
        if index.exists():
            content = json.loads(index.read_text())
            assert content["metadata"]["total_size"] == checkpoint.nbytes
            assert content["weight_map"] == {name: t.file.path.name for name, t in checkpoint.items()}


def test_shards_are_cut_in_the_given_order_and_named_as_hugging_face_names_them(tmp_path):
    tensors = [(f"t{i}", np.full(10, i, np.float32)) for i in range(5)] + [("big", np.zeros(100, np.float32))]
    write_checkpoint(tensors, tmp_path / "c", max_shard_bytes=80)
    weight_map = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())["weight_map"]
    shard = lambda i: f"model-{i:05d}-of-00004.safetensors"
    assert weight_map == {
        "t0": shard(1),
        "t1": shard(1),
        "t2": shard(2),
        "t3": shard(2),
        "t4": shard(3),
        "big": shard(4),
    }
    for i in range(1, 5):
        assert load_file(tmp_path / "c" / shard(i))  # the reference reads each shard


def test_reading_is_lazy_zero_copy_and_sliced(tmp_path):
    array = np.arange(6000, dtype=np.float32).reshape(60, 100)
    write_checkpoint([("w", array), ("v", array[:3])], tmp_path / "c")
    checkpoint = open_checkpoint(tmp_path / "c")
    assert all(file._map is None for file in checkpoint.files)  # headers only
    tensor = checkpoint["w"]
    view = tensor.read()
    assert not view.flags.owndata and not view.flags.writeable
    assert np.shares_memory(view, tensor.read()) and np.shares_memory(view, np.asarray(tensor))
    assert same_bits(tensor[10:20, ::7], array[10:20, ::7])
    assert same_bits(tensor[5], array[5]) and same_bits(tensor[..., 3:4], array[..., 3:4])
    assert same_bits(np.asarray(tensor, np.float64), array.astype(np.float64))
    checkpoint.release()
    assert same_bits(view, array)  # read again from the file


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_released_pages_leave_memory(tmp_path):
    def mapped() -> float:
        """Megabytes of files in this process's memory."""
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssFile"))

    names = [f"t{i}" for i in range(8)]
    write_checkpoint([(name, np.ones(4 << 20, np.float32)) for name in names], tmp_path / "c")  # 16 MB each
    checkpoint, before = open_checkpoint(tmp_path / "c"), mapped()
    views = []
    for name in names:
        views.append(checkpoint[name].read())
        assert views[-1].sum() == 4 << 20 and mapped() - before > 8
        checkpoint.release()
        assert mapped() - before < 8
    assert sum(view.sum() for view in views) == 8 * (4 << 20) and mapped() - before > 100


def test_header_length_that_looks_like_a_pickle(tmp_path):
    """A header of 128 bytes starts the file with 0x80, as pickles do."""
    head = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "model.safetensors").write_bytes((128).to_bytes(8, "little") + head.ljust(128) + b"\x07")
    assert open_checkpoint(tmp_path)["a"].read().tolist() == [7]


def test_unaligned_data_is_readable(tmp_path):
    head = b'{"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}'
    data = b"\x01" + np.float32([1.5, -2]).tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    assert open_checkpoint(tmp_path)["w"].read().tolist() == [1.5, -2]


def test_names_of_the_only_file_and_of_quantized_files(tmp_path):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "gptq_model-4bit-128g.safetensors")
    assert set(open_checkpoint(tmp_path)) == {"a"}
    save_file({"b": np.zeros(2, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="several safetensors files .*other.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "model_file_base_name": "gptq_model-4bit-128g"}')
    assert set(open_checkpoint(tmp_path)) == {"a"}
    (tmp_path / "quantize_config.json").write_text('{"bits": 4}')
    (tmp_path / "config.json").write_text('{"quantization_config": {"model_file_base_name": "other"}}')
    assert set(open_checkpoint(tmp_path)) == {"b"}
    save_file({"c": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    assert set(open_checkpoint(tmp_path)) == {"c"}


def test_the_only_index_may_have_another_name(tmp_path):
    write_checkpoint([("a", np.ones(3)), ("b", np.ones(3))], tmp_path / "c", max_shard_bytes=24, stem="gptq_model")
    checkpoint = open_checkpoint(tmp_path / "c")
    assert [file.path.name for file in checkpoint.files] == [f"gptq_model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def test_writes_views_foreign_byte_orders_scalars_jax_arrays_and_lazy_tensors(tmp_path):
    import jax.numpy as jnp

    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    write_checkpoint(
        [
            ("transposed", base.T),
            ("strided", base[:, ::2]),
            ("big_endian", base.astype(">f4")),
            ("jax", jnp.asarray(base, jnp.bfloat16)),
            ("list", [1.0, 2.0]),
            ("later", (6, 4), np.float16, lambda: base.T.astype(np.float16)),
        ],
        tmp_path / "c",
    )
    first = open_checkpoint(tmp_path / "c")
    write_checkpoint(first.items(), tmp_path / "d")  # LazyTensors
    for checkpoint in (first, open_checkpoint(tmp_path / "d")):
        assert same_bits(checkpoint["transposed"], base.T)
        assert same_bits(checkpoint["strided"], base[:, ::2])
        assert same_bits(checkpoint["big_endian"], base)
        assert same_bits(checkpoint["jax"], base.astype(ml_dtypes.bfloat16))
        assert same_bits(checkpoint["list"], np.array([1.0, 2.0]))
        assert same_bits(checkpoint["later"], base.T.astype(np.float16))


def test_large_transposed_tensor_is_written_in_blocks(tmp_path):
    array = np.arange(9_000_000, dtype=np.float32).reshape(3000, 3000)  # 36 MB: several blocks
    write_checkpoint([("w", array.T)], tmp_path / "c")
    assert np.array_equal(open_checkpoint(tmp_path / "c")["w"].read(), array.T)


def test_fetches_one_tensor_at_a_time(tmp_path):
    alive, most = set(), 0

    class Counted(np.ndarray):
        def __array_finalize__(self, parent):
            nonlocal most
            if parent is None:
                alive.add(id(self))
                most = max(most, len(alive))

        def __del__(self):
            alive.discard(id(self))

    def fetch():
        array = Counted((100,), np.float32)
        array[:] = 1
        return array

    write_checkpoint(((f"t{i}", (100,), np.float32, fetch) for i in range(20)), tmp_path / "c", max_shard_bytes=2000)
    assert most == 1


def test_saving_over_a_checkpoint_drops_old_weights_and_keeps_other_files(tmp_path):
    directory = tmp_path / "c"
    write_checkpoint([(f"t{i}", np.ones(9)) for i in range(4)], directory, max_shard_bytes=80)
    (directory / "README.md").write_text("card")
    (directory / "quantize_config.json").write_text("{}")
    (directory / "modules.json").write_text("[]")
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text("{}")
    save_file({"lora": np.zeros(1)}, directory / "adapter_model.safetensors")
    lazily_read = open_checkpoint(directory)["t0"]
    held = lazily_read.read()
    write_checkpoint(
        [("t0", lazily_read)],
        directory,
        extra_files={"config.json": "{}", "1_Pooling/config.json": b'{"a": 1}'},
        drop=["modules.json", "quantize_config.json"],
    )
    names = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    assert names == {
        "README.md", "1_Pooling/config.json", "config.json", "adapter_model.safetensors", "model.safetensors"
    }  # fmt: skip
    assert (directory / "1_Pooling" / "config.json").read_text() == '{"a": 1}'
    assert (directory / "README.md").read_text() == "card"
    assert held.tolist() == [1.0] * 9  # the old file stays readable for who has it mapped
    assert list(tmp_path.iterdir()) == [directory]


@pytest.mark.parametrize(
    "tensors, message",
    [
        ([("a", np.zeros(1)), ("a", np.zeros(1))], "'a' occurs twice"),
        ([("__metadata__", np.zeros(1))], "cannot be a tensor's name"),
        ([(3, np.zeros(1))], "3 cannot be a tensor's name"),
        ([("a", np.zeros(1, np.complex128))], "'a' has dtype complex128"),
        ([("a", np.array(["x"]))], "'a' has dtype <U1"),
        ([("a", np.array([None]))], "'a' has dtype object"),
        ([("a", np.zeros(1, ml_dtypes.int4))], "'a' has dtype int4"),
        ([("\ud800", np.zeros(1))], "surrogates not allowed"),
        (
            [("a", (2,), np.float32, lambda: np.zeros(3, np.float32))],
            r"'a' is float32 \(3,\), announced was float32 \(2,\)",
        ),
        ([("a", (2,), np.float32, lambda: np.zeros(2))], r"'a' is float64 \(2,\), announced was float32"),
    ],
)
def test_bad_tensors_are_named_and_nothing_is_written(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        write_checkpoint(tensors, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"max_shard_bytes": 0}, "max_shard_bytes: must be positive, is 0"),
        ({"max_shard_bytes": float("nan")}, "max_shard_bytes"),
        ({"metadata": {"format": 1}}, "metadata: must map strings to strings"),
        ({"extra_files": {"../x": b""}}, "extra_files: '../x'"),
        ({"extra_files": {"/etc/x": b""}}, "extra_files: '/etc/x'"),
        ({"extra_files": {"": b""}}, "extra_files"),
        ({"stem": "a/b"}, "stem is 'a/b'"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_checkpoint([("a", np.zeros(1))], tmp_path / "c", **arguments)
    assert list(tmp_path.iterdir()) == []


def small_file() -> bytes:
    rng = np.random.default_rng(1)
    tensors = {kind: random_array(rng, kind, (3, 2)) for kind in ("F32", "BF16", "BOOL", "I32")} | {
        "e": np.zeros((0, 2))
    }
    return reference_bytes(tensors, {"format": "pt"})


def read_everything(path: Path) -> int:
    """Opens and reads all tensors; the number of bytes touched. Only a CheckpointError may come out."""
    return sum(len(tensor.read().tobytes()) for tensor in SafetensorsFile(path).values())


def test_truncated_at_every_byte(tmp_path):
    whole, path = small_file(), tmp_path / "model.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="model.safetensors: "):
            read_everything(path)
    path.write_bytes(whole)
    assert read_everything(path) > 0
    path.write_bytes(whole + b"\0")  # data that no tensor owns
    with pytest.raises(CheckpointError, match="model.safetensors: "):
        read_everything(path)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_give_an_error_or_a_valid_read(changes):
    whole = bytearray(small_file())
    header = 8 + int.from_bytes(whole[:8], "little")
    for position, byte in changes:
        whole[int(position * header)] = byte
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(bytes(whole))
        try:
            assert read_everything(path) <= len(whole)
        except CheckpointError as error:
            assert str(error).startswith(str(path))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
tensor_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F4", "F99", ""]) | json_values,
        "shape": st.lists(st.integers(-2, 2**64), max_size=40) | st.lists(st.integers(0, 3), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(0, 20), min_size=2, max_size=2) | json_values,
    },
)


@settings(max_examples=300)
@given(st.dictionaries(st.text(max_size=3), tensor_entries | json_values, max_size=3), st.binary(max_size=24))
def test_any_header_gives_an_error_or_a_valid_read(header, data):
    text = json.dumps(header).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        try:
            assert read_everything(path) <= len(data)
        except CheckpointError as error:
            assert str(error).startswith(str(path))


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_give_an_error_or_a_valid_read(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            read_header(path)


@settings(max_examples=100)
@given(json_values)
def test_any_index_gives_an_error(value):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
        with pytest.raises(CheckpointError, match="model.safetensors.index.json"):
            open_checkpoint(folder)


@pytest.mark.parametrize("kind", [kind for kind in DTYPES if kind[0] in "FBC" and kind != "BOOL"])
def test_is_finite_agrees_with_numpy_on_every_bit_pattern(kind):
    dtype = DTYPES[kind]
    if dtype.itemsize == 1:
        values = np.arange(256, dtype=np.uint8).view(dtype)
    elif dtype.itemsize == 2:
        values = np.arange(2**16, dtype=np.uint16).view(dtype)
    else:
        rng = np.random.default_rng(0)
        values = rng.normal(size=200).astype(dtype)
        values[:5] = [np.inf, -np.inf, np.nan, np.finfo(dtype).max, np.finfo(dtype).tiny]
    with np.errstate(invalid="ignore"):
        wide = values if values.dtype.itemsize > 2 else values.astype(np.float64)
    expected = np.isfinite(wide)
    assert expected.any() and (not expected.all() or kind.startswith("F8"))
    padded = np.zeros(70_000, dtype)  # more than one block
    for value, finite in zip(values[:: max(1, len(values) // 3000)], expected[:: max(1, len(values) // 3000)]):
        padded[-1] = value
        assert is_finite(padded[-3:]) == finite
    assert is_finite(values[expected])
    if not expected.all():
        padded[69_000] = values[~expected][0]
        assert not is_finite(padded)
        assert not is_finite(padded.reshape(100, 700)[:, ::2])
        assert is_finite(padded[:69_000])


def test_non_finite_weights_are_named_when_asked_for(tmp_path):
    write_checkpoint([("good", np.ones(4)), ("bad", np.array([[1, 2], [3, np.nan]], np.float32))], tmp_path / "c")
    assert np.isnan(open_checkpoint(tmp_path / "c")["bad"].read()).any()
    checkpoint = open_checkpoint(tmp_path / "c", check_finite=True)
    assert checkpoint["good"].read().sum() == 4 and checkpoint["bad"][0].tolist() == [1, 2]
    with pytest.raises(CheckpointError, match="model.safetensors: tensor 'bad' contains NaN or infinite"):
        checkpoint["bad"].read()


def test_write_tensors_writes_into_a_directory_that_exists(tmp_path):
    write_tensors([("a", np.ones(2))], tmp_path, metadata={})
    assert open_checkpoint(tmp_path).metadata == {} and set(open_checkpoint(tmp_path)) == {"a"}
