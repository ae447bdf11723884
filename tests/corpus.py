"""A corpus of malformed checkpoints, built on the spot: each case spoils a valid tiny BERT in its own way."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
WORD = "embeddings.word_embeddings.weight"
LAYER = "encoder.layer.0."
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def bert_tensors() -> dict[str, np.ndarray]:
    """A BertModel as Hugging Face names it: weights (out, in)."""
    width, inner, rng = 8, 16, np.random.default_rng(0)
    shapes = {
        WORD: (11, width),
        "embeddings.position_embeddings.weight": (12, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "pooler.dense.weight": (width, width),
        "pooler.dense.bias": (width,),
    }
    for name, out, into in [
        ("attention.self.query", width, width),
        ("attention.self.key", width, width),
        ("attention.self.value", width, width),
        ("attention.output.dense", width, width),
        ("intermediate.dense", inner, width),
        ("output.dense", width, inner),
    ]:
        shapes |= {f"{LAYER}{name}.weight": (out, into), f"{LAYER}{name}.bias": (out,)}
    for name in ("embeddings.LayerNorm", LAYER + "attention.output.LayerNorm", LAYER + "output.LayerNorm"):
        shapes |= {name + ".weight": (width,), name + ".bias": (width,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_valid(directory: Path, *, shards: bool) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    whole = bert_tensors()
    if not shards:
        save_file(whole, directory / FILE, metadata={"format": "pt"})
        return directory
    weight_map = {}
    for i, name in enumerate(sorted(whole)):
        weight_map[name] = (FIRST, SECOND)[i % 2]
    for file in (FIRST, SECOND):
        part = {name: whole[name] for name in whole if weight_map[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


# Ways of spoiling: each takes its arguments and gives a function of the directory.


def write(file: str, data: bytes | str) -> Callable[[Path], None]:
    def spoil(d: Path) -> None:
        (d / file).write_bytes(data if isinstance(data, bytes) else data.encode())

    return spoil


def header(value, data: bytes = b"", length: int | None = None) -> Callable[[Path], None]:
    """model.safetensors becomes this header (bytes, or what JSON encodes) with this data and this claimed length."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return write(FILE, (len(text) if length is None else length).to_bytes(8, "little") + text + data)


def edit(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(d: Path) -> None:
        (d / file).write_bytes(change((d / file).read_bytes()))

    return spoil


def edit_json(file: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(d: Path) -> None:
        value = json.loads((d / file).read_bytes())
        change(value)
        (d / file).write_text(json.dumps(value))

    return spoil


def point(target: object) -> Callable[[Path], None]:
    """The index says that the word embeddings are in `target`."""
    return edit_json(INDEX, lambda index: index["weight_map"].update({WORD: target}))


def edit_tensors(file: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(d: Path) -> None:
        tensors = load_file(d / file)
        change(tensors)
        save_file(tensors, d / file, metadata={"format": "pt"})

    return spoil


def only(*files: str, data: bytes = b"x") -> Callable[[Path], None]:
    """The weights are gone; `files` are there instead."""

    def spoil(d: Path) -> None:
        (d / FILE).unlink()
        for file in files:
            (d / file).write_bytes(data)

    return spoil


class Trap:
    """Unpickling it makes a file, which no test wants to see."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickle_as(file: str, *, protocol: int = 2, archive: bool = False) -> Callable[[Path], None]:
    def spoil(d: Path) -> None:
        (d / FILE).unlink()
        data = pickle.dumps({"a": Trap(d / "sprung")}, protocol=protocol)
        if archive:  # as torch.save does since 1.6
            with zipfile.ZipFile(d / file, "w") as zipped:
                zipped.writestr("archive/data.pkl", data)
        else:
            (d / file).write_bytes(data)

    return spoil


def fifo(d: Path) -> None:
    (d / FILE).unlink()
    os.mkfifo(d / FILE)


def dangling(d: Path) -> None:
    (d / FILE).unlink()
    (d / FILE).symlink_to(d / "nowhere")


def folder(d: Path) -> None:
    (d / FILE).unlink()
    (d / FILE).mkdir()


def swap_shards(d: Path) -> None:
    (d / FIRST).rename(d / "x")
    (d / SECOND).rename(d / FIRST)
    (d / "x").rename(d / SECOND)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


MANY_ZEROS = ",0" * 10_000_000
# Case -> (how the single-file checkpoint is spoiled, what the message says).
SINGLE = {
    "truncated data": (edit(FILE, lambda b: b[:-1]), f"{FILE}: not a valid safetensors file"),
    "truncated header": (edit(FILE, lambda b: b[:100]), f"{FILE}: the header is said to have .*truncated"),
    "truncated length": (edit(FILE, lambda b: b[:5]), f"{FILE}: truncated or empty: 5 bytes"),
    "empty file": (write(FILE, b""), f"{FILE}: truncated or empty: 0 bytes"),
    "bytes after the end": (edit(FILE, lambda b: b + b"x"), f"{FILE}: not a valid safetensors file"),
    "header of 2^60 bytes": (header({}, length=2**60), f"{FILE}: the header is said to have {2**60} bytes"),
    "header of 2^64-1 bytes": (header({}, length=2**64 - 1), f"said to have {2**64 - 1} bytes"),
    "header of 0 bytes": (header({}, length=0), f"{FILE}: the header is said to have 0 bytes"),
    "header over the limit": (header(b" " * 100_000_008), "the format allows 100000000"),
    "header is not JSON": (header(b"{x"), f"{FILE}: not a valid safetensors file"),
    "header is not UTF-8": (header(b'{"\xff": 1}'), f"{FILE}: not a valid safetensors file"),
    "header is a list": (header([1, 2]), f"{FILE}: not a valid safetensors file"),
    "header nested without end": (header(b'{"a":' + b"[" * 10_000_000), f"{FILE}: not a valid safetensors file"),
    "overlapping tensors": (header({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "not a valid safetensors"),
    "the same bytes twice": (header({"a": entry(), "b": entry()}, bytes(8)), f"{FILE}: not a valid safetensors"),
    "hole between tensors": (header({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "not a valid safetens"),
    "offsets beyond the file": (header({"a": entry(shape=(2**40,), offsets=(0, 2**42))}, bytes(8)), "not a valid safe"),
    "offsets backwards": (header({"a": entry(offsets=(8, 0))}, bytes(8)), f"{FILE}: not a valid safetensors"),
    "offsets negative": (header({"a": entry(offsets=(-8, 0))}, bytes(8)), f"{FILE}: not a valid safetensors"),
    "shape disagrees with offsets": (header({"a": entry(shape=(3,))}, bytes(8)), f"{FILE}: not a valid safetensors"),
    "shape overflows": (header({"a": entry(shape=(2**33, 2**33))}, bytes(8)), f"{FILE}: not a valid safetensors"),
    "shape overflows to nothing": (header({"a": entry(shape=(2**63, 2**63, 0), offsets=(0, 0))}), f"{FILE}: "),
    "shape is text": (header({"a": entry(shape="ab")}, bytes(8)), f"{FILE}: not a valid safetensors"),
    "33 dimensions": (header({"a": entry(shape=(1,) * 33, offsets=(0, 4))}, bytes(4)), "'a' has shape .*impossible"),
    "10 million dimensions": (
        header(f'{{"a":{{"dtype":"F32","shape":[0{MANY_ZEROS}],"data_offsets":[0,0]}}}}'.encode()),
        f"{FILE}: a tensor has more than 32 dimensions",
    ),
    "10 million dimensions, escaped": (
        header(f'{{"a":{{"dtype":"F32","sh\\u0061pe":[0{MANY_ZEROS}],"data_offsets":[0,0]}}}}'.encode()),
        f"{FILE}: a tensor has more than 32 dimensions",
    ),
    "unknown dtype": (header({"a": entry("F99")}, bytes(8)), f"{FILE}: not a valid safetensors file.*F99"),
    "dtype without numpy type": (
        header({"a": entry("F4", (16,))}, bytes(8)),
        "tensor 'a' has dtype F4, .* supported are",
    ),
    "a tensor twice": (
        header(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
        f"{FILE}: key 'a' occurs twice",
    ),
    "30000 tensors, one twice": (
        header(
            (
                "{"
                + ",".join(f'"{i}":{json.dumps(entry(shape=(0,), offsets=(0, 0)))}' for i in (*range(30_000), 0))
                + "}"
            ).encode()
        ),
        f"{FILE}: key '0' occurs twice",
    ),
    "metadata is a number": (header({"__metadata__": 3}), f"{FILE}: not a valid safetensors"),
    "metadata values are numbers": (header({"__metadata__": {"a": 3}}), f"{FILE}: not a valid safetensors"),
    "control characters in names": (header({"\x1b[2J\n": entry("F4", (16,))}, bytes(8)), r"tensor '\\x1b\[2J\\n' has"),
    "name of a million letters": (
        header({"a" * 1_000_000: entry("F4", (16,))}, bytes(8)),
        r"tensor 'aaa\w+'\.\.\. has",
    ),
    "pickle": (pickle_as(FILE), f"{FILE}: is a pickle .*convert it to safetensors"),
    "old pickle": (pickle_as(FILE, protocol=0), f"{FILE}: the header is said to have .*not safetensors"),
    "torch archive": (pickle_as(FILE, archive=True), f"{FILE}: is a pickle .*convert it to safetensors"),
    "only pytorch_model.bin": (
        pickle_as("pytorch_model.bin"),
        r"only pickled weights \(pytorch_model.bin\), which can run code.*convert them to safetensors first",
    ),
    "a fifo": (fifo, f"{FILE}: is not a regular file"),
    "a dangling link": (dangling, f"{FILE}: cannot be read: No such file"),
    "a folder": (folder, f"{FILE}: is not a regular file"),
    "no weights": (only(), f"no {FILE}, no index of shards"),
    "two files, none called model": (only("a.safetensors", "b.safetensors"), r"several .* \(a.safetensors, b.safetens"),
    "quantised name with a path": (
        lambda d: (only()(d), write("quantize_config.json", '{"model_file_base_name": "../../etc/passwd"}')(d)),
        "model_file_base_name is '../../etc/passwd'; it must be the plain name",
    ),
    "quantised name is a list": (
        lambda d: (only()(d), write("quantize_config.json", '{"model_file_base_name": [1]}')(d)),
        r"model_file_base_name is \[1\]; it must be the plain name",
    ),
}
# Case -> (how the sharded checkpoint is spoiled, what the message says).
SHARDED = {
    "absolute path": (
        point("/etc/passwd"),
        f"{INDEX}: the file of tensor '{WORD}' is '/etc/passwd'; it must be the plain",
    ),
    "path upwards": (point("../x.safetensors"), f"{INDEX}: the file of tensor '{WORD}' is '../x.safetensors'"),
    "dots": (point(".."), f"{INDEX}: the file of tensor '{WORD}' is '..'"),
    "folder": (point(f"./{FIRST}"), f"{INDEX}: the file of tensor '{WORD}' is './"),
    "backslashes": (point("..\\x.safetensors"), f"{INDEX}: the file of tensor '{WORD}' is "),
    "drive letter": (point("C:x.safetensors"), f"{INDEX}: the file of tensor '{WORD}' is 'C:x"),
    "NUL": (point("x\0.safetensors"), f"{INDEX}: the file of tensor '{WORD}' is "),
    "surrogate": (point("\ud800.safetensors"), r"shard '\\ud800.safetensors' is missing"),
    "name without end": (point("x" * 100_000), f"{INDEX}: the file of tensor '{WORD}' is 'xxx"),
    "name too long for the system": (point("ü" * 200), "shard .* is missing"),
    "file is a number": (point(3), f"{INDEX}: the file of tensor '{WORD}' is 3"),
    "file is null": (point(None), f"{INDEX}: the file of tensor '{WORD}' is None"),
    "file is not safetensors": (point("config.json"), "config.json: the header is said to have"),
    "shard missing": (lambda d: (d / SECOND).unlink(), f"shard '{SECOND}' is missing"),
    "shard truncated": (edit(SECOND, lambda b: b[:-4]), f"{SECOND}: not a valid safetensors"),
    "shards swapped": (swap_shards, f"{INDEX}: tensor .* is not in {FIRST}, where the index says it is"),
    "tensor missing from its shard": (
        edit_tensors(SECOND, lambda t: t.pop(WORD, None) or t.popitem()),
        "is not in model",
    ),
    "tensor in both shards": (
        lambda d: edit_tensors(FIRST, lambda t: t.update(dict([load_file(d / SECOND).popitem()])))(d),
        f"is in both {FIRST} and {SECOND}",
    ),
    "index is not JSON": (write(INDEX, "{"), f"{INDEX}: not valid JSON"),
    "index is a list": (write(INDEX, "[]"), f"{INDEX}: holds a JSON list, not an object"),
    "index is empty": (write(INDEX, b""), f"{INDEX}: not valid JSON"),
    "index is not UTF-8": (write(INDEX, b'{"weight_map": {"\xff": "a"}}'), f"{INDEX}: not valid JSON"),
    "index without weight_map": (write(INDEX, '{"metadata": {}}'), f"{INDEX}: has no 'weight_map'"),
    "index with an empty weight_map": (write(INDEX, '{"weight_map": {}}'), f"{INDEX}: has no 'weight_map'"),
    "index nested without end": (write(INDEX, '{"weight_map": ' + "[" * 1_000_000), f"{INDEX}: not valid JSON"),
    "index with a huge number": (write(INDEX, '{"weight_map": ' + "9" * 100_000 + "}"), f"{INDEX}: not valid JSON"),
    "index with a key twice": (
        write(INDEX, f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}'),
        "key 'a' occurs twice",
    ),
    "index is a fifo": (lambda d: ((d / INDEX).unlink(), os.mkfifo(d / INDEX)), f"{INDEX}: is not a regular file"),
    "index over the limit": (lambda d: os.truncate(d / INDEX, 2**36), f"{INDEX}: {2**36} bytes of JSON; more than"),
}
CORPUS = {name: (False, *case) for name, case in SINGLE.items()} | {
    f"index: {name}" if "index" not in name else name: (True, *case) for name, case in SHARDED.items()
}


def spoilt(directory: Path, case: str) -> Path:
    shards, spoil, _ = CORPUS[case]
    spoil(write_valid(directory, shards=shards))
    return directory
