"""Text: what every Python carries, files, and the ways token streams are cut for training, calibration and evaluation.

Token functions take and return plain integer arrays; which tokenizer made them is the caller's business.
"""

import csv
import gzip
import json
import os
import random
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import StringIO
from pathlib import Path

import numpy as np

MAX_TEXT_BYTES = 1 << 31  # decompressed; a 10 MB .gz may hold 10 GB of blanks
_TABLES = (".jsonl", ".ndjson", ".csv", ".tsv")
# Not program text: tables of character codes, test data, generated topics, other people's packages.
_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}


# --- text that every Python carries ---------------------------------------------------------------------------------


def english_text() -> dict[str, str]:
    """{topic: text}: the language reference that Python's `help()` shows, about 80 topics and 450 kB of English.

    The texts differ a little between Python versions; for one version they are always the same.
    """
    from pydoc_data.topics import topics

    return {name: topics[name] for name in sorted(topics)}


def python_sources(max_bytes: int = 2_000_000) -> dict[str, str]:
    """{path: source}: a fixed, mixed selection of the standard library's own files, at most `max_bytes` of them.

    Files are taken in the order of a checksum of their path, so that a small selection already spans many packages.

    Raises ValueError where `max_bytes` is not positive, or where this Python carries no sources (a zipped library).
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes={max_bytes}: expected a positive number")
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [path.as_posix() for path in paths if not _NOT_SOURCE.intersection(path.parts)]
    chosen: dict[str, str] = {}
    size = 0
    for name in sorted(names, key=lambda name: (zlib.crc32(name.encode()), name)):
        if not 0 < (root / name).stat().st_size <= max_bytes - size:
            continue
        with tokenize.open(root / name) as file:  # reads the encoding that the source declares
            chosen[name] = file.read()
        size += (root / name).stat().st_size
    if not chosen:
        raise ValueError(f"{root}: no Python source of at most {max_bytes} bytes here")
    return dict(sorted(chosen.items()))


def split_documents(documents: dict[str, str], held_out: float = 0.1) -> tuple[dict[str, str], dict[str, str]]:
    """(train, held out): whole documents, neither side empty, the same split for the same documents.

    Documents are held out in the order of a checksum of their names, as long as they fit into the fraction `held_out`
    of all characters (where none fits, the shortest is).

    Raises ValueError where `held_out` is not between 0 and 1, or fewer than two documents are given.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out}: expected a fraction between 0 and 1")
    if len(documents) < 2:
        raise ValueError(f"documents: {len(documents)} cannot be split; at least two are needed")
    budget = held_out * sum(map(len, documents.values()))
    held: set[str] = set()
    for name in sorted(documents, key=lambda name: (zlib.crc32(name.encode()), name)):
        if len(documents[name]) <= budget and len(held) < len(documents) - 1:
            budget -= len(documents[name])
            held.add(name)
    held = held or {min(documents, key=lambda name: (len(documents[name]), name))}
    train = {name: text for name, text in documents.items() if name not in held}
    return train, {name: text for name, text in documents.items() if name in held}


# --- files ----------------------------------------------------------------------------------------------------------


def read_text(path: str | os.PathLike, *, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """A whole UTF-8 text file (`.gz` is decompressed), newlines made `\\n`, a byte-order mark dropped.

    Raises ValueError naming the file: missing, unreadable, a damaged archive, more than `max_bytes` when decompressed,
    not UTF-8.
    """
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip archive ({error})") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(data) > max_bytes:
        raise ValueError(f"{path}: more than {max_bytes} bytes of text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_records(path: str | os.PathLike, *, max_bytes: int = MAX_TEXT_BYTES) -> list[dict]:
    """The rows of a table, each {column: value}: `.jsonl` (an object a line), `.csv`, `.tsv` (a header first); `.gz`.

    `.csv` is quoted as spreadsheets do it; in `.tsv`, as in GLUE's files, a quotation mark is a plain character. Values
    of both are strings.

    Raises ValueError naming file and line: what `read_text` raises, an unknown ending, a line that is no JSON object, a
    row with more or fewer cells than the header, an open quotation.
    """
    path = Path(path)
    kind = _ending(path)
    if kind not in _TABLES:
        raise ValueError(f"{path}: expected a table ({', '.join(_TABLES)}, or one of them with .gz)")
    text = read_text(path, max_bytes=max_bytes)
    return list(_json_rows(path, text) if kind in (".jsonl", ".ndjson") else _csv_rows(path, text, kind == ".tsv"))


def read_texts(path: str | os.PathLike, field: str = "text", *, max_bytes: int = MAX_TEXT_BYTES) -> list[str]:
    """Texts of a file: the column `field` of a table (see `read_records`), or each line of any other text file.

    Raises ValueError as they do, and where a row has no `field` or something else than a string in it.
    """
    path = Path(path)
    if _ending(path) not in _TABLES:
        return read_text(path, max_bytes=max_bytes).removesuffix("\n").split("\n")
    texts = []
    for number, row in enumerate(read_records(path, max_bytes=max_bytes), start=1):
        if field not in row:
            raise ValueError(f"{path}: row {number} has no {field!r}; it has {', '.join(map(repr, row))}")
        if not isinstance(row[field], str):
            raise ValueError(f"{path}: row {number} has the {field} {row[field]!r}; expected a string")
        texts.append(row[field])
    return texts


def read_labelled(
    path: str | os.PathLike, field: str = "text", *, max_bytes: int = MAX_TEXT_BYTES
) -> tuple[list[str] | list[tuple[str, str]], np.ndarray]:
    """(texts, labels int32) of a table (see `read_records`): its columns `field` and `label`.

    Where there is a column text2 the texts are pairs. Raises ValueError naming the row for one without these columns,
    and for a label that is no whole number from 0.
    """
    texts, labels, columns = [], [], {}
    for number, row in enumerate(read_records(path, max_bytes=max_bytes), start=1):
        columns = columns or dict.fromkeys([field, *(["text2"] if "text2" in row else []), "label"])
        for name in columns:
            if name not in row:
                raise ValueError(f"{path}: row {number} has no {name!r}; it has {', '.join(map(repr, row))}")
            if name != "label" and not isinstance(row[name], str):
                raise ValueError(f"{path}: row {number} has the {name} {row[name]!r}; expected a string")
        label = str(row["label"])
        if not (label.isascii() and label.isdigit()):
            raise ValueError(f"{path}: row {number} has the label {row['label']!r}; expected a whole number from 0")
        texts.append((row[field], row["text2"]) if "text2" in columns else row[field])
        labels.append(int(label))
    return texts, np.asarray(labels, np.int32)


def wikitext_document(text: str) -> str:
    """WikiText's raw file as the one document that published perplexities tokenize.

    Each line is a row that keeps its newline, a blank line is an empty row, and rows are joined by two newlines.
    """
    lines = text.removesuffix("\n").split("\n")  # not splitlines, which cuts at other characters too
    return "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)


def _ending(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix != ".gz"), "")


def _json_rows(path: Path, text: str) -> Iterator[dict]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error or 'nested too deeply'})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        yield row


def _csv_rows(path: Path, text: str, tabs: bool) -> Iterator[dict]:
    if "\0" in text:
        raise ValueError(f"{path}: holds a zero byte; this is no text table")
    if tabs:
        lines = enumerate(text.removesuffix("\n").split("\n"), start=1)
        rows = ((number, line.split("\t")) for number, line in lines if line)
    else:
        rows = _quoted_rows(path, text)
    header = None
    for number, row in rows:
        if header is None:
            header = row
            if len(set(header)) != len(header):
                raise ValueError(f"{path}: the header names a column twice: {header}")
        elif len(row) != len(header):
            raise ValueError(f"{path}, line {number}: {len(row)} cells, but the header has {len(header)}")
        else:
            yield dict(zip(header, row, strict=True))
    if header is None:
        raise ValueError(f"{path}: empty; expected a header line")


def _quoted_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))  # the default refuses cells over 128 kB
    try:
        reader = csv.reader(StringIO(text, newline=""), strict=True)
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return iter(rows)


# --- cutting token streams ------------------------------------------------------------------------------------------


def windows(ids: Sequence[int], length: int) -> np.ndarray:
    """int32 [floor(N / length), length]: disjoint windows over N ids, the tail dropped (the perplexity protocol).

    Raises ValueError where there is not one whole window.
    """
    ids = _vector(ids, "ids")
    _positive(length, "length")
    if len(ids) < length:
        raise ValueError(f"ids: {len(ids)} tokens, fewer than one window of length={length}")
    count = len(ids) // length
    return ids[: count * length].reshape(count, length)


def join_documents(documents: Iterable[Sequence[int]], separator: int | None) -> np.ndarray:
    """int32 [N]: token documents one after the other, each ended by `separator` (end of text) unless that is None.

    `windows(join_documents(...), length)` are the blocks that a language model trains on.
    """
    end = [] if separator is None else [separator]
    parts = [_vector(document, "documents") for document in documents]
    tail = np.asarray(end, np.int32)
    return np.concatenate([piece for part in parts for piece in (part, tail)] or [np.zeros(0, np.int32)])


def pack_blocks(
    documents: Iterable[Sequence[int]], length: int, *, cls_id: int, sep_id: int, pad_id: int
) -> dict[str, np.ndarray]:
    """Documents (ids without special tokens) packed end to end into blocks `[CLS] ... [SEP]`, as MiniLM's corpus is.

    Returns `input_ids` and `attention_mask`, int32 [n, length]: every block is full but the last, which is padded.
    Raises ValueError where `length` leaves no room beside the two special tokens.
    """
    if length < 3:
        raise ValueError(f"length={length}: a block is [CLS], at least one token, and [SEP]")
    stream = join_documents(documents, None)
    room = length - 2
    count = -(-len(stream) // room)
    input_ids = np.full((count, length), pad_id, np.int32)
    attention_mask = np.ones((count, length), np.int32)
    input_ids[:, 0] = cls_id
    for i in range(count):
        part = stream[i * room : (i + 1) * room]
        input_ids[i, 1 : 1 + len(part)] = part
        input_ids[i, 1 + len(part)] = sep_id
        attention_mask[i, 2 + len(part) :] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def random_windows(ids: Sequence[int], samples: int, length: int, *, seed: int = 0) -> np.ndarray:
    """int32 [samples, length]: calibration windows at random places of one long text, as GPTQ draws them.

    The starts are those of Python's `random.seed(seed)` followed by `random.randint(0, N - length - 1)` per sample, so
    that the same text and seed give the published samples. Raises ValueError where N <= length.
    """
    ids = _vector(ids, "ids")
    _positive(samples, "samples")
    _positive(length, "length")
    if len(ids) <= length:
        raise ValueError(f"ids: {len(ids)} tokens; windows of length={length} need at least {length + 1}")
    rng = random.Random(seed)
    starts = [rng.randint(0, len(ids) - length - 1) for _ in range(samples)]
    return np.stack([ids[start : start + length] for start in starts])


def random_document_windows(
    documents: Sequence[str], encode: Callable[[str], Sequence[int]], samples: int, length: int, *, seed: int = 0
) -> np.ndarray:
    """int32 [samples, length]: for each sample a random document of more than `length` tokens, and a window in it.

    The protocol of GPTQ's C4 calibration: documents are drawn with `random.randint(0, len(documents) - 1)` until one is
    long enough, then the start with `random.randint(0, N - length - 1)`. Only documents that are drawn are encoded.

    Raises ValueError where no document is long enough.
    """
    _positive(samples, "samples")
    _positive(length, "length")
    if len(documents) == 0:
        raise ValueError("documents: there are none")
    rng = random.Random(seed)
    encoded: dict[int, np.ndarray] = {}
    short: set[int] = set()
    out = np.empty((samples, length), np.int32)
    for row in range(samples):
        while True:
            i = rng.randint(0, len(documents) - 1)
            if i not in encoded and i not in short:
                ids = _vector(encode(documents[i]), "encode")
                if len(ids) > length:
                    encoded[i] = ids
                else:
                    short.add(i)
            if i in encoded:
                break
            if len(short) == len(documents):
                raise ValueError(f"documents: none of {len(documents)} has more than length={length} tokens")
        start = rng.randint(0, len(encoded[i]) - length - 1)
        out[row] = encoded[i][start : start + length]
    return out


def read_token_ids(path: str | os.PathLike) -> np.ndarray:
    """Token ids int32 [samples, length] from a `.npy` file. ValueError naming the file for anything else in it."""
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path}: no readable .npy array ({error})") from None
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.size == 0:
        raise ValueError(f"{path}: {ids.dtype} of shape {ids.shape}; expected integers of shape (samples, length)")
    if ids.min() < 0 or ids.max() >= 2**31:
        raise ValueError(f"{path}: ids from {ids.min()} to {ids.max()}; expected ids of a vocabulary")
    return np.asarray(ids, np.int32)


def _vector(ids: Sequence[int], argument: str) -> np.ndarray:
    array = np.asarray(ids)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{argument}: expected a vector of token ids, got {array.dtype} of shape {array.shape}")
    return array.astype(np.int32)


def _positive(value: int, argument: str) -> None:
    if value < 1:
        raise ValueError(f"{argument}={value}: expected at least 1")
