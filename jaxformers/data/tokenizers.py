"""Tokenizers: text to padded integer arrays and back, through the `tokenizers` library.

    tokenizer = load_tokenizer("some/checkpoint")
    batch = tokenizer(["a sentence", "another"], max_length=128, buckets=length_buckets(128))
    batch["input_ids"]                      # int32 [2, 16], ready for apply(params, batch)

Ids are those of Hugging Face's tokenizers. Everything here is numpy; nothing touches an accelerator.
"""

import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers as tk
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxformers.atomic import json_bytes, write_bytes_atomic
from jaxformers.data.padding import bucket, check_side, length_buckets, pad_rows
from jaxformers.data.tokenizer_files import NAMES, flag, guarded, read_json, read_tokenizer, tokenizer_directory

__all__ = ["Tokenizer", "length_buckets", "load_tokenizer", "train_bpe", "train_wordpiece"]

# Where no file names the special tokens: a special token of this name is what everybody means by it.
_CONVENTION = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "mask": ("[MASK]", "<mask>"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "bos": ("<s>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>"),
}
_UNLIMITED = 10**6  # Hugging Face writes 1e30 where a tokenizer has no maximum


class Tokenizer:
    """A vocabulary with its rules. Made by `load_tokenizer`, `train_bpe` or `train_wordpiece`.

    Attributes:
        core: the `tokenizers.Tokenizer` underneath, without truncation or padding.
        max_length: what `__call__` truncates to by default, special tokens included; None where nobody says.
        padding_side, truncation_side: "right" or "left", the checkpoint's own.
        config: the contents of tokenizer_config.json.
        {pad,bos,eos,unk,sep,cls,mask}_token and _id: the string and its id, or None where the tokenizer has none. Only
            `pad_id` is never None: without a pad token it is the end-of-text token's id, else 0. Padded positions are
            masked, so any id that the embedding table has will do.
    """

    def __init__(self, core: tk.Tokenizer, config: dict | None = None, *, max_length: int | None = None):
        config = {key: value for key, value in (config or {}).items() if not key.startswith("_")}
        self.core = core
        self.config = config
        self.max_length = max_length
        self.padding_side = check_side(config.get("padding_side") or "right", "padding_side")
        self.truncation_side = check_side(config.get("truncation_side") or "right", "truncation_side")
        self._lock = threading.Lock()  # the library keeps the truncation length in `core`
        special = _special_tokens(core, config)
        self.pad_token, self.bos_token, self.eos_token = special["pad"], special["bos"], special["eos"]
        self.cls_token, self.sep_token, self.mask_token = special["cls"], special["sep"], special["mask"]
        self.unk_token = special["unk"]
        ids = {name: None if token is None else core.token_to_id(token) for name, token in special.items()}
        self.bos_id, self.eos_id, self.unk_id = ids["bos"], ids["eos"], ids["unk"]
        self.cls_id, self.sep_id, self.mask_id = ids["cls"], ids["sep"], ids["mask"]
        self.pad_id: int = next((i for i in (ids["pad"], self.eos_id) if i is not None), 0)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding table needs so that every id has one: the highest id + 1."""
        return max(self.core.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def __call__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        buckets: Sequence[int] | None = None,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
    ) -> dict[str, np.ndarray]:
        """Tokenize a batch.

        Args:
            texts: n strings.
            pairs: n strings more: row i is then `texts[i]` and `pairs[i]` in the model's pair form.
            max_length: rows are cut to it, special tokens included; of a pair the longer is cut first, token by token.
                Default: `self.max_length`; where that is None nothing is cut.
            buckets: lengths that L may take: the smallest that holds the longest row. Default: the longest row's.
            padding_side: "right" or "left" (left for generation). Default: `self.padding_side`.

        Returns:
            int32 arrays [n, L]: `input_ids` (padded with `pad_id`), `attention_mask` (1 = real), `token_type_ids`.

        Raises:
            ValueError: an item that is no text (its index is named), lengths that do not match, `max_length` with no
                room for the special tokens, or a row longer than the largest bucket.
        """
        rows = self._encode(texts, pairs, self._limit(max_length), add_special_tokens, fast=True)
        return self._arrays(rows, bucket(rows, buckets), self._side(padding_side))

    def offsets(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        buckets: Sequence[int] | None = None,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
    ) -> dict[str, np.ndarray]:
        """As `__call__`, and where each token comes from.

        Returns, besides the arrays of `__call__`: `offsets` int32 [n, L, 2], the token's characters `text[start:end]`
        (0, 0 for special tokens and padding); `word_ids` int32 [n, L], the index of its word, -1 for none;
        `sequence_ids` int32 [n, L], 0 in the text, 1 in its pair, -1 in neither; `special_tokens_mask` int32 [n, L], 1
        for special tokens and padding.
        """
        rows = self._encode(texts, pairs, self._limit(max_length), add_special_tokens, fast=False)
        length, side = bucket(rows, buckets), self._side(padding_side)
        none = lambda values: [-1 if value is None else value for value in values]
        ends = [pad_rows([[offset[k] for offset in row.offsets] for row in rows], length, 0, side) for k in (0, 1)]
        return self._arrays(rows, length, side) | {
            "offsets": np.stack(ends, axis=-1),
            "word_ids": pad_rows([none(row.word_ids) for row in rows], length, -1, side),
            "sequence_ids": pad_rows([none(row.sequence_ids) for row in rows], length, -1, side),
            "special_tokens_mask": pad_rows([row.special_tokens_mask for row in rows], length, 1, side),
        }

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of one text of any length; nothing is cut. ValueError where `text` is no text."""
        return self._encode([text], None, None, add_special_tokens, fast=True)[0].ids

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[str]:
        """As `encode`, but the tokens as strings. Unigram models show an unknown piece as it stands in the text."""
        return self._encode([text], None, None, add_special_tokens, fast=False)[0].tokens

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids [length] (a list or any integer array). Ids that the vocabulary lacks decode to nothing."""
        ids = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
        if ids.size == 0:
            return ""
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 2**32:
            raise ValueError(f"ids: expected a vector of integers >= 0, got {ids.dtype} of shape {ids.shape}")
        return guarded("ids", self.core.decode, ids.tolist(), skip_special_tokens=skip_special_tokens)

    def files(self) -> dict[str, bytes]:
        """tokenizer.json, tokenizer_config.json and special_tokens_map.json, {name: content}.

        `load_tokenizer` and Hugging Face's AutoTokenizer read them back.
        """
        special = {f"{name}_token": token for name in NAMES if (token := getattr(self, f"{name}_token")) is not None}
        skipped = ("add_bos_token", "add_eos_token")  # tokenizer.json says it
        skipped += ("auto_map", "added_tokens_decoder", "name_or_path", "special_tokens_map_file", "tokenizer_file")
        config = {key: value for key, value in self.config.items() if key not in skipped} | special
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        if self.max_length is not None:
            config["model_max_length"] = self.max_length
        return {
            "tokenizer.json": self.core.to_str(pretty=True).encode(),
            "tokenizer_config.json": json_bytes(config),
            "special_tokens_map.json": json_bytes(special),
        }

    def save(self, directory: str | os.PathLike) -> None:
        """Write :meth:`files`, each beside and then renamed. Raises OSError where they cannot be written."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            write_bytes_atomic(directory / name, content)

    def _side(self, side: str | None) -> str:
        return self.padding_side if side is None else check_side(side, "padding_side")

    def _limit(self, max_length: int | None) -> int | None:
        return self.max_length if max_length is None else max_length

    def _encode(self, texts, pairs, limit: int | None, add_special_tokens: bool, *, fast: bool) -> list:
        texts, pairs = _texts(texts, "texts"), None if pairs is None else _texts(pairs, "pairs")
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"pairs: {len(pairs)} for {len(texts)} texts")
        frame = self.core.num_special_tokens_to_add(pairs is not None) if add_special_tokens else 0
        if limit is not None and limit <= frame:
            raise ValueError(f"max_length={limit}: no room beside {frame} special tokens; give at least {frame + 1}")
        encode = self.core.encode_batch_fast if fast else self.core.encode_batch
        items = texts if pairs is None else list(zip(texts, pairs, strict=True))
        with self._lock:
            if limit is not None:
                self.core.enable_truncation(limit, strategy="longest_first", direction=self.truncation_side)
            try:
                return guarded("texts", encode, items, add_special_tokens=add_special_tokens)
            except ValueError as error:
                raise ValueError(f"texts: {problem}" if (problem := _culprit(texts, pairs)) else str(error)) from None
            finally:
                self.core.no_truncation()

    def _arrays(self, rows: list, length: int, side: str) -> dict[str, np.ndarray]:
        return {
            "input_ids": pad_rows([row.ids for row in rows], length, self.pad_id, side),
            "attention_mask": pad_rows([row.attention_mask for row in rows], length, 0, side),
            "token_type_ids": pad_rows([row.type_ids for row in rows], length, 0, side),
        }


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a checkpoint directory, with the ids that Hugging Face's tokenizer of the same files gives.

    Reads tokenizer.json, or vocab.json + merges.txt, or vocab.txt, and the special tokens from tokenizer_config.json,
    special_tokens_map.json and added_tokens.json. `max_length` is sentence_bert_config.json's `max_seq_length` where
    that exists (it wins), else tokenizer_config.json's `model_max_length`. The library's own truncation and padding
    settings, which some tokenizer.json files carry, are dropped, as sentence-transformers does.

    Raises:
        ValueError: naming the file that is malformed, or what was looked for and not found. A bare SentencePiece model
            is such a case: it must be converted to a tokenizer.json first.
    """
    directory = tokenizer_directory(Path(directory))
    core, config = read_tokenizer(directory)
    path = next((path for path in sorted(directory.glob("sentence_*_config.json"))), None)
    sentence = read_json(path) if path else {}
    # sentence-transformers lower-cases before the tokenizer sees the text
    if flag(sentence | {"_path": path}, "do_lower_case", False):
        parts = [normalizers.Lowercase()] + ([core.normalizer] if core.normalizer is not None else [])
        core.normalizer = normalizers.Sequence(parts)
    for source, value in (
        (path, sentence.get("max_seq_length")),
        (directory / "tokenizer_config.json", config.get("model_max_length", config.get("max_len"))),
    ):
        if value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 1:
            raise ValueError(f"{source}: a maximum length of {value!r}; expected a positive number")
        return Tokenizer(core, config, max_length=int(value) if value < _UNLIMITED else None)
    return Tokenizer(core, config)


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    special_tokens: Sequence[str] = ("<|endoftext|>",),
    min_frequency: int = 2,
    max_length: int | None = None,
) -> Tokenizer:
    """Train a byte-level BPE vocabulary (GPT-2's) on texts; no text is ever unknown to it.

    Ids 0.. are `special_tokens`, of which the first begins and ends texts and is given no place of its own in encoded
    text; then the 256 bytes; then the merges, most frequent first. Equal texts give an equal tokenizer. `vocab_size` is
    an upper bound: fewer ids where the texts hold fewer pairs that occur `min_frequency` times.

    Raises ValueError for a `vocab_size` without room for the bytes and special tokens, or items that are no text.
    """
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size}: 256 bytes and {len(special_tokens)} special tokens need {least}")
    core = tk.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_checked(texts), trainer)
    end = special_tokens[0] if special_tokens else None
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "bos_token": end, "eos_token": end}
    return Tokenizer(core, config | {"unk_token": end, "pad_token": None}, max_length=max_length)


def train_wordpiece(
    texts: Iterable[str],
    vocab_size: int,
    *,
    lowercase: bool = True,
    min_frequency: int = 2,
    max_length: int | None = None,
) -> Tokenizer:
    """Train a WordPiece vocabulary with BERT's rules; ids 0 to 4 are [PAD], [UNK], [CLS], [SEP], [MASK].

    Texts are framed [CLS] a [SEP], pairs [CLS] a [SEP] b [SEP] with token type 1 from b on. `lowercase` also strips
    accents, as in BERT. Equal texts give an equal tokenizer. Raises ValueError for a `vocab_size` without room for the
    special tokens and the characters, or items that are no text.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    texts = list(_checked(texts))
    normalizer, words = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()
    first: set[str] = set()
    inner: set[str] = set()
    for text in texts:
        for word, _ in words.pre_tokenize_str(normalizer.normalize_str(text)):
            first.update(word[:1])
            inner.update(word[1:])
    least = len(special) + len(first | inner) + len(inner)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size}: special tokens and the characters of the texts need {least}")
    # The trainer numbers the inner characters as it meets them in a hash table and breaks ties between pairs by those
    # numbers: another vocabulary in each process. Given as special tokens they have fixed numbers; the vocabulary is
    # then put into a tokenizer for which they are ordinary.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special + [f"##{character}" for character in sorted(inner)],
        show_progress=False,
    )
    trained = tk.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = normalizer, words
    trained.train_from_iterator(texts, trainer)
    core = tk.Tokenizer(models.WordPiece(trained.get_vocab(), unk_token="[UNK]", max_input_chars_per_word=100))
    core.normalizer, core.pre_tokenizer, core.decoder = normalizer, words, decoders.WordPiece(prefix="##")
    core.add_special_tokens(special)
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    return Tokenizer(
        core, {"tokenizer_class": "BertTokenizer", "do_lower_case": lowercase} | names, max_length=max_length
    )


def _special_tokens(core: tk.Tokenizer, config: dict) -> dict[str, str | None]:
    """{name: token or None}: what the files say; else what frames an empty text; else what everybody calls it."""
    special: dict[str, str | None] = {}
    frame = core.encode("").tokens if core.num_special_tokens_to_add(False) == 2 else []
    framed = {"cls": frame[0], "sep": frame[1]} if len(frame) == 2 else {}
    known = {token.content for token in core.get_added_tokens_decoder().values() if token.special}
    for name in NAMES:
        if f"{name}_token" in config:
            special[name] = config[f"{name}_token"]
        else:
            special[name] = next((token for token in (framed.get(name), *_CONVENTION[name]) if token in known), None)
    return special


def _texts(texts, argument: str) -> list[str]:
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        kind = type(texts).__name__
        raise ValueError(f"{argument}: expected a sequence of strings, got a {kind}; pass one text as [text]")
    return list(texts)


def _culprit(texts: list, pairs: list | None) -> str | None:
    """Which item the library refused, and why."""
    for values in (texts, pairs or []):
        for i, text in enumerate(values):
            if not isinstance(text, str):
                return f"item {i} is {text!r}, a {type(text).__name__}; expected a string"
            if (problem := _unencodable(text)) is not None:
                return f"item {i} {problem}"
    return None


def _unencodable(text: str) -> str | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"is not valid Unicode: a lone surrogate at character {error.start}"
    return None


def _checked(texts: Iterable[str]) -> Iterable[str]:
    for i, text in enumerate(_texts(texts, "texts")):
        if (problem := _culprit([text], None)) is not None:
            raise ValueError(f"texts: {problem.replace('item 0', f'item {i}', 1)}")
        yield text
