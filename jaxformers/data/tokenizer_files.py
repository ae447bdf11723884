"""From the files that lie in a checkpoint directory to one `tokenizers.Tokenizer` and its merged configuration.

Read, first found first: `tokenizer.json` (any model of the `tokenizers` library), `vocab.json` + `merges.txt`
(byte-level BPE of GPT-2, OPT, RoBERTa, BART), `vocab.txt` (WordPiece of BERT and its relatives). Beside them
`tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`, with Hugging Face's precedence.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

MAX_FILE_BYTES = 1 << 28  # the largest tokenizer.json in use is about 35 MB
NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

_BERT = dict(unk="[UNK]", sep="[SEP]", pad="[PAD]", cls="[CLS]", mask="[MASK]")
_ROBERTA = dict(bos="<s>", eos="</s>", unk="<unk>", sep="</s>", pad="<pad>", cls="<s>", mask="<mask>")
_GPT2 = dict(bos="<|endoftext|>", eos="<|endoftext|>", unk="<|endoftext|>")
# model_type, or tokenizer_class less its ending and in lower case -> (frame, special tokens where no file names them)
_WORDPIECE = {
    **{name: ("bert", _BERT) for name in ("bert", "distilbert", "electra", "mobilebert", "convbert", "squeezebert")},
    **{name: ("bert", _BERT) for name in ("lxmert", "layoutlm", "retribert", "visual_bert", "megatron-bert")},
    "mpnet": ("roberta", {**_ROBERTA, "unk": "[UNK]"}),
}
_BYTE_BPE = {
    **{name: ("roberta", _ROBERTA) for name in ("roberta", "bart", "longformer", "led")},
    **{name: ("plain", _GPT2) for name in ("gpt2", "gpt_neo", "gptneo", "gptj", "opt")},
}


def read_json(path: Path) -> dict:
    """The object in a JSON file. ValueError naming the file: not there, too large, not UTF-8, not JSON, no object."""
    text = read_utf8(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error or 'nested too deeply'})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_utf8(path: Path) -> str:
    """A small text file, newlines made `\\n`. ValueError naming the file where that cannot be done."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{path}: {size} bytes; a tokenizer's file has at most {MAX_FILE_BYTES}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None


def read_tokenizer(directory: Path) -> tuple[Tokenizer, dict]:
    """(the `tokenizers` object without truncation or padding, `tokenizer_config.json` completed) of a directory.

    In the returned configuration `{name}_token` is a string or None for each of NAMES that a file or the checkpoint's
    family decides; names that nobody decides are absent.
    """
    config = _read_config(directory)
    if (path := directory / "tokenizer.json").exists():
        core = _from_tokenizer_json(path)
        guarded(directory, _apply_overrides, core, config)
        frame = None
    elif (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        core, frame = _from_merges(directory, config)
    elif (directory / "vocab.txt").exists():
        core, frame = _from_vocab(directory / "vocab.txt", config)
    else:
        raise ValueError(_nothing_found(directory))
    guarded(directory, _add_tokens, core, config, directory)
    if frame is not None:
        core.post_processor = guarded(directory, _post_processor, core, frame, config, directory)
    core.no_truncation()
    core.no_padding()
    _check_ids(core, directory)
    return core, config


def _read_config(directory: Path) -> dict:
    """tokenizer_config.json completed by special_tokens_map.json; special tokens as strings, their flags in _flags."""
    config = read_json(path) if (path := directory / "tokenizer_config.json").exists() else {}
    if (path := directory / "special_tokens_map.json").exists():
        for key, value in read_json(path).items():
            config.setdefault(key, value)
    flags = {}
    for name in NAMES:
        value = config.get(key := f"{name}_token")
        content = value.get("content") if isinstance(value, dict) else value  # {"content": "<mask>", "lstrip": true}
        if content is not None and not isinstance(content, str):
            raise ValueError(f"{directory}: {key} is {value!r}; expected a string")
        if isinstance(value, dict):
            config[key] = content
            flags[content] = value
    return config | {"_flags": flags, "_path": str(directory)}


def _check_ids(core: Tokenizer, directory: Path) -> None:
    """The ids of the vocabulary fit into int32, and what is put around texts is in it."""
    ids = core.get_vocab(with_added_tokens=True).values()
    if not ids or max(ids) >= 2**31:
        raise ValueError(f"{directory}: {'an empty vocabulary' if not ids else f'a token has id {max(ids)}'}")
    for i in guarded(directory, core.encode, "", "").ids:
        if core.id_to_token(i) is None:
            raise ValueError(f"{directory}: the post-processor puts id {i} around texts, which the vocabulary lacks")


def flag(config: dict, key: str, default: bool | None) -> bool | None:
    """A yes or no of a configuration file; `default` where it is absent or null. ValueError for anything else."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{config.get('_path')}: {key} is {value!r}; expected true or false")
    return default if value is None else value


def _family(directory: Path, config: dict) -> str | None:
    """The tokenizer's family in lower case: from `tokenizer_class`, else from config.json's `model_type`."""
    name = config.get("tokenizer_class")
    if isinstance(name, str) and not name.startswith(("PreTrained", "TokenizersBackend")):
        return name.removesuffix("Fast").removesuffix("Tokenizer").lower()
    if (path := directory / "config.json").exists():
        name = read_json(path).get("model_type")
        return name if isinstance(name, str) else None
    return None


def guarded(place: object, function, *args, **kwargs):
    """Call into the Rust library; whatever it raises (a panic is no Exception) becomes a ValueError naming `place`."""
    try:
        return function(*args, **kwargs)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        if type(error) is ValueError and str(error).startswith(str(place)):
            raise
        raise ValueError(f"{place}: {error}") from None


def _from_tokenizer_json(path: Path) -> Tokenizer:
    core = guarded(path, Tokenizer.from_str, read_utf8(path))
    unknown = getattr(core.model, "unk_token", None)
    if isinstance(core.model, models.WordPiece | models.WordLevel) and core.model.token_to_id(unknown) is None:
        raise ValueError(f"{path}: the unknown token {unknown!r} is not in the vocabulary")
    return core


def _apply_overrides(core: Tokenizer, config: dict) -> None:
    """tokenizer_config.json wins over tokenizer.json in BERT's normaliser and in byte-level BPE's leading space."""
    old = core.normalizer
    if isinstance(old, normalizers.BertNormalizer):
        core.normalizer = normalizers.BertNormalizer(
            clean_text=old.clean_text,
            handle_chinese_chars=flag(config, "tokenize_chinese_chars", old.handle_chinese_chars),
            strip_accents=flag(config, "strip_accents", old.strip_accents),
            lowercase=flag(config, "do_lower_case", old.lowercase),
        )
    if isinstance(core.pre_tokenizer, pre_tokenizers.ByteLevel):
        space = flag(config, "add_prefix_space", core.pre_tokenizer.add_prefix_space)
        if core.pre_tokenizer.add_prefix_space != space:
            spec = json.loads(core.to_str())
            for part in ("pre_tokenizer", "post_processor"):  # the latter trims the offsets by it
                if spec[part] and "add_prefix_space" in spec[part]:
                    spec[part]["add_prefix_space"] = space
            changed = Tokenizer.from_str(json.dumps(spec))
            core.pre_tokenizer = changed.pre_tokenizer
            if changed.post_processor is not None:
                core.post_processor = changed.post_processor


def _from_vocab(path: Path, config: dict) -> tuple[Tokenizer, str]:
    """WordPiece: a token a line, its id the line's number. A token that stands twice has its last line, as in BERT."""
    vocab = {token: i for i, token in enumerate(read_utf8(path).removesuffix("\n").split("\n"))}
    family = _family(path.parent, config)
    if family is None and "[CLS]" in vocab:
        family = "bert"
    if family not in _WORDPIECE:
        raise ValueError(
            f"{path}: a vocab.txt of the family {family!r}; WordPiece is built for {', '.join(_WORDPIECE)}. "
            "Other families need a tokenizer.json"
        )
    frame, special = _WORDPIECE[family]
    _complete_special(config, special)
    unknown = config["unk_token"]
    if unknown not in vocab:
        raise ValueError(f"{path}: the unknown token {unknown!r} is not in it")
    core = Tokenizer(guarded(path, models.WordPiece, vocab, unk_token=unknown, max_input_chars_per_word=100))
    core.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=flag(config, "tokenize_chinese_chars", True),
        strip_accents=flag(config, "strip_accents", None),
        lowercase=flag(config, "do_lower_case", True),
    )
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##")
    return core, frame


def _from_merges(directory: Path, config: dict) -> tuple[Tokenizer, str]:
    """Byte-level BPE: vocab.json maps token to id; each line of merges.txt is a pair, most frequent first."""
    path = directory / "vocab.json"
    vocab = read_json(path)
    taken: dict[int, str] = {}
    for token, i in vocab.items():
        if type(i) is not int or not 0 <= i < 2**32:
            raise ValueError(f"{path}: the id of {token!r} is {i!r}; expected an integer >= 0")
        if taken.setdefault(i, token) != token:
            raise ValueError(f"{path}: {taken[i]!r} and {token!r} have the same id {i}")
    family = _family(directory, config)
    if family is None:
        names = {"<s>", "</s>", "<mask>"}
        family = "roberta" if names <= vocab.keys() else "gpt2" if "<|endoftext|>" in vocab else None
    if family not in _BYTE_BPE:
        raise ValueError(
            f"{path}: vocab.json and merges.txt of the family {family!r}; byte-level BPE is built for "
            f"{', '.join(_BYTE_BPE)}. Other families need a tokenizer.json"
        )
    frame, special = _BYTE_BPE[family]
    _complete_special(config, special)
    path = directory / "merges.txt"
    merges = []
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2:
            raise ValueError(f"{path}, line {number}: expected two tokens with one blank between, found {line[:60]!r}")
        merges.append(pair)
    core = Tokenizer(guarded(path, models.BPE, vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=flag(config, "add_prefix_space", False))
    core.decoder = decoders.ByteLevel()
    return core, frame


def _complete_special(config: dict, special: dict[str, str]) -> None:
    for name, token in special.items():
        config.setdefault(f"{name}_token", token)
    if special.get("mask") == "<mask>":  # RoBERTa's and MPNet's <mask> takes the blank before it
        config["_flags"].setdefault("<mask>", {"lstrip": True})


def _add_tokens(core: Tokenizer, config: dict, directory: Path) -> None:
    """Tokens that the vocabulary lacks, in the order of their ids; then the special tokens, marked as such."""
    wanted: dict[int, tuple[str, dict]] = {}
    path = directory / "tokenizer_config.json"
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError(f"{path}: added_tokens_decoder is no object")
    for key, value in decoder.items():
        if not str(key).isdecimal() or not isinstance(value, dict) or not isinstance(value.get("content"), str):
            raise ValueError(f"{path}: added_tokens_decoder has the entry {key!r}: {value!r}")
        wanted[int(key)] = (value["content"], value)
    if (path := directory / "added_tokens.json").exists():
        for token, i in read_json(path).items():
            if type(i) is not int or i < 0:
                raise ValueError(f"{path}: the id of {token!r} is {i!r}; expected an integer >= 0")
            wanted.setdefault(i, (token, {}))
    special = {token for name in NAMES if (token := config.get(f"{name}_token"))}
    present = {token.content for token in core.get_added_tokens_decoder().values()}
    for i, (content, flags) in sorted(wanted.items()):
        if content not in present:
            core.add_tokens([_added_token(content, flags, content in special or bool(flags.get("special")))])
        if (found := core.token_to_id(content)) != i:
            raise ValueError(f"{directory}: the added token {content!r} should have id {i}, the vocabulary has {found}")
    present |= {content for content, _ in wanted.values()}
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    extra = list(extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else [])
    for token in [config.get(f"{name}_token") for name in NAMES] + extra:
        flags = token if isinstance(token, dict) else config["_flags"].get(token, {}) if isinstance(token, str) else {}
        content = flags.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content and content not in present:
            core.add_special_tokens([_added_token(content, flags, True)])
            present.add(content)


def _added_token(content: str, flags: dict, special: bool) -> AddedToken:
    known = {key: bool(flags[key]) for key in ("single_word", "lstrip", "rstrip", "normalized") if key in flags}
    return AddedToken(content, special=special, **{"normalized": not special, **known})


def _post_processor(core: Tokenizer, frame: str, config: dict, directory: Path):
    """What stands around a text where there is no tokenizer.json to say it."""
    if frame == "plain":
        return _bos_eos(core, config, directory / "tokenizer_config.json")
    sep, cls = ((config[key], core.token_to_id(config[key])) for key in ("sep_token", "cls_token"))
    if frame == "roberta":
        space = flag(config, "add_prefix_space", False)
        return processors.RobertaProcessing(sep, cls, trim_offsets=True, add_prefix_space=space)
    return processors.BertProcessing(sep, cls)


def _bos_eos(core: Tokenizer, config: dict, path: Path):
    """`add_bos_token`, `add_eos_token` of decoder-only models (OPT sets the first)."""
    tokens = {}
    for name in ("bos", "eos"):
        tokens[name] = [config.get(f"{name}_token")] if flag(config, f"add_{name}_token", False) else []
        if tokens[name] and tokens[name][0] is None:
            raise ValueError(f"{path}: add_{name}_token is set, but there is no {name}_token")
    single = [*tokens["bos"], "$A", *tokens["eos"]]
    second = [f"{part}:1" for part in (*tokens["bos"], "$B", *tokens["eos"])]
    special = {token: core.token_to_id(token) for token in tokens["bos"] + tokens["eos"]}
    return processors.TemplateProcessing(single=single, pair=single + second, special_tokens=list(special.items()))


def tokenizer_directory(directory: Path) -> Path:
    """Where the tokenizer's files lie: sentence-transformers may keep them in its first module's directory."""
    here = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer_config.json")
    if not (path := directory / "modules.json").exists() or any((directory / name).exists() for name in here):
        return directory
    try:
        name = json.loads(path.read_text(encoding="utf-8"))[0]["path"]
        inner = directory / name
        inside = inner.resolve().is_relative_to(directory.resolve())
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: expected a list of modules with a path each ({error})") from None
    if not inside:
        raise ValueError(f"{path}: the path {name!r} leads out of the directory")
    return inner


def _nothing_found(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory}: no such directory"
    for name in ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "spm.model", "source.spm"):
        if (directory / name).exists():
            return (
                f"{directory}: has a bare SentencePiece file ({name}), and no tokenizer.json. Convert it once, where "
                'transformers and sentencepiece are installed: python -c "from transformers import AutoTokenizer; '
                f'AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"'
            )
    return f"{directory}: no tokenizer here; looked for tokenizer.json, vocab.json with merges.txt, and vocab.txt"
