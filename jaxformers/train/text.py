"""Training of a language model on text files, from nothing or on: next tokens for decoders, masked ones for encoders.

    result = train_on_text(TextRun(text=("books.txt",), out="runs/books", model="gpt2"))

What is special about it is nothing: it joins `jaxformers.load` or `init`, a tokenizer, `data.batches` and `fit`.
"""

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformers import hub, losses, models
from jaxformers.data import text as texts
from jaxformers.data.batches import array_batches, heldout_batches
from jaxformers.data.tokenizers import Tokenizer, load_tokenizer, train_bpe, train_wordpiece
from jaxformers.mesh import mesh as make_mesh
from jaxformers.models.config import positions_of
from jaxformers.train.config import TrainConfig
from jaxformers.train.loop import FitResult, fit
from jaxformers.train.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class TextRun:
    """What to train on what.

    ``text``: .txt files (documents are paragraphs run on), or .jsonl, .csv, .tsv with a column ``text``. ``out``
    receives metrics, checkpoints and, in ``model/``, the trained model. ``model``: a checkpoint to go on with, or None
    to begin from ``config``, a config.json as a dict, with a tokenizer (a directory) or a new one of ``vocab`` entries
    learnt from the text. ``valid``: a file for eval_loss. ``length``: tokens a window; ``batch``: windows a step, of
    all processes. ``masked``: share of the tokens that an encoder is to find. ``mesh``: as for `jaxformers.mesh`.
    """

    text: tuple[str, ...]
    out: str
    model: str | None = None
    config: Mapping[str, Any] | None = None
    tokenizer: str | None = None
    vocab: int = 8192
    valid: str | None = None
    length: int = 256
    batch: int = 16
    masked: float = 0.15
    seed: int = 0
    mesh: str | None = None
    dtype: str | None = None
    train: TrainConfig = TrainConfig(steps=1000, optim=OptimConfig(warmup=0.05, weight_decay=0.1))

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("text: give at least one file")
        if (self.model is None) == (self.config is None):
            raise ValueError("model, config: give one of the two, a checkpoint to go on with or sizes to begin from")
        if self.model is not None and self.tokenizer is not None:
            raise ValueError("tokenizer: the checkpoint brings its own")
        if self.length < 2 or self.batch < 1 or not 0 < self.masked < 1:
            raise ValueError(
                f"length, batch, masked: expected 2 or more tokens, 1 or more windows, a share between 0 and 1; "
                f"got {self.length}, {self.batch}, {self.masked}"
            )


def read_toml(path: str | Path) -> dict[str, Any]:
    """The fields of a :class:`TextRun` from a TOML file: the table ``[config]`` is a config.json, ``[train]`` and
    ``[train.optim]`` are fields of `TrainConfig` and `OptimConfig`. Raises ValueError for what is none of them."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as TOML ({error})") from None
    train = values.pop("train", {})
    optim = train.pop("optim", {}) if isinstance(train, dict) else {}
    for kind, given in ((TextRun, values), (TrainConfig, train), (OptimConfig, optim)):
        known = [f.name for f in dataclasses.fields(kind)]
        for name in given:
            if name not in known:
                raise ValueError(f"{path}: {name!r} is no field of {kind.__name__}; there are {', '.join(known)}")
    lists = lambda table: {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    if isinstance(values.get("text"), str):
        values["text"] = (values["text"],)
    if train or optim:
        train = {"steps": TextRun.train.steps, **train}
        values["train"] = TrainConfig(**lists(train), optim=OptimConfig(**lists(optim)))
    return {**values, **({"text": tuple(values["text"])} if "text" in values else {})}


def train_on_text(run: TextRun) -> FitResult:
    """Train as ``run`` says; a run that is found in ``out`` is taken up. The model is saved by process 0.

    Raises ValueError for files without enough text, and as `jaxformers.fit` does.
    """
    mesh = None if run.mesh is None else make_mesh(run.mesh)
    if mesh is None and jax.process_count() > 1:
        mesh = make_mesh("data=-1")
    documents = [document for file in run.text for document in _documents(file)]
    model, tokenizer = _begin(run, documents, mesh)
    positions = positions_of(model.config)
    if positions is not None and run.length > positions:
        raise ValueError(f"length: {run.length} tokens exceed the model's {positions} positions")
    windows = pack(documents, tokenizer, run.length)
    held = None if run.valid is None else pack(_documents(run.valid), tokenizer, run.length)
    data = array_batches(windows, run.batch, seed=run.seed)
    if held is not None:
        held = heldout_batches(held, run.batch)
    objective = next_tokens if model.head_name == "causal_lm" else masked_tokens(tokenizer, run.masked)
    result = fit(
        objective, model, data, run.train, key=jax.random.key(run.seed), eval_data=held, mesh=mesh, directory=run.out
    )
    _save(result, Path(run.out) / "model", tokenizer)
    return result


def next_tokens(apply: Callable, params: Any, batch: Mapping[str, Any], key: Any) -> tuple[jax.Array, dict[str, Any]]:
    """Objective: cross-entropy of each next token, in nats."""
    logits = apply(params, {"input_ids": batch["input_ids"]}, rngs=key).logits
    return losses.cross_entropy(logits[:, :-1], batch["input_ids"][:, 1:]), {}


def masked_tokens(tokenizer: Tokenizer, share: float) -> Callable:
    """Objective: cross-entropy of tokens chosen with probability ``share``, of which 80 % are masked, 10 % replaced and
    10 % kept (BERT, arXiv 1810.04805, section 3.1). Evaluation always chooses the same ones."""
    special = [i for i in (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id) if i is not None]
    if tokenizer.mask_id is None:
        raise ValueError("tokenizer: it has no mask token")

    def objective(apply: Callable, params: Any, batch: Mapping[str, Any], key: Any) -> tuple[jax.Array, dict[str, Any]]:
        ids = batch["input_ids"]
        choose, how, draw, drop = jax.random.split(jax.random.key(0) if key is None else key, 4)
        chosen = (jax.random.uniform(choose, ids.shape) < share) & ~jnp.isin(ids, jnp.asarray(special))
        kind = jax.random.uniform(how, ids.shape)
        other = jax.random.randint(draw, ids.shape, 0, tokenizer.vocab_size)
        token = jnp.where(kind < 0.8, tokenizer.mask_id, jnp.where(kind < 0.9, other, ids))
        inputs = {"input_ids": jnp.where(chosen, token, ids), "attention_mask": batch["attention_mask"]}
        logits = apply(params, inputs, rngs=None if key is None else drop).logits
        loss = losses.cross_entropy(logits, jnp.where(chosen, ids, losses.IGNORE))
        return loss, {"weight": chosen.sum().astype(jnp.float32)}

    return objective


def pack(documents: list[str], tokenizer: Tokenizer, length: int) -> dict[str, np.ndarray]:
    """Documents run on, as windows {input_ids, attention_mask} (n, length), framed where the tokenizer does so."""
    ids = [tokenizer.encode(d, add_special_tokens=False) for d in documents if d.strip()]
    if tokenizer.cls_id is not None and tokenizer.sep_id is not None and tokenizer.pad_id is not None:
        frame = {"cls_id": tokenizer.cls_id, "sep_id": tokenizer.sep_id, "pad_id": tokenizer.pad_id}
        rows = texts.pack_blocks(ids, length, **frame)
        return {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}
    windows = texts.windows(texts.join_documents(ids, tokenizer.eos_id), length)
    return {"input_ids": windows, "attention_mask": np.ones_like(windows)}


def _documents(file: str) -> list[str]:
    kind = [suffix for suffix in Path(file).suffixes if suffix != ".gz"][-1:]
    if kind and kind[0] in (".jsonl", ".ndjson", ".csv", ".tsv"):
        return texts.read_texts(file)
    return [texts.read_text(file)]


def _begin(run: TextRun, documents: list[str], mesh: Any) -> tuple[Any, Tokenizer]:
    """The model before training and its tokenizer."""
    hf = dict(run.config or {})
    if run.model is not None:
        head = _language_head(hub.read_config(run.model))
        model = hub.load(run.model, head=head, mesh=mesh, dtype=run.dtype, key=jax.random.key(run.seed))
        return model, load_tokenizer(model.source)
    head = _language_head(hf)
    if run.tokenizer is not None:
        tokenizer = load_tokenizer(run.tokenizer)
    else:
        learn = train_bpe if head == "causal_lm" else train_wordpiece
        tokenizer = learn(documents, run.vocab, max_length=run.length)
    hf = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": run.length, **hf}
    if hf["vocab_size"] < tokenizer.vocab_size:
        raise ValueError(f"config: vocab_size {hf['vocab_size']} is less than the tokenizer's {tokenizer.vocab_size}")
    if tokenizer.pad_id is not None:
        hf.setdefault("pad_token_id", tokenizer.pad_id)
    return hub.init(hf, head=head, key=jax.random.key(run.seed), dtype=run.dtype), tokenizer


def _language_head(hf: Mapping[str, Any]) -> str:
    """The head of a config.json's architecture that models language: masked tokens, or next ones of a decoder."""
    arch = models.architecture(hf.get("model_type", ""))
    order = ("causal_lm", "masked_lm") if hf.get("is_decoder") else ("masked_lm", "causal_lm")
    head = next((head for head in order if head in arch.HEADS), None)
    if head is None:
        raise ValueError(f"model: {arch.Model.__name__} has no language-model head; it has {', '.join(arch.HEADS)}")
    return head


def _save(result: FitResult, directory: Path, tokenizer: Tokenizer) -> None:
    """Write the model once; of several processes each holds a part, which all of them gather first."""
    from jaxformers.functional import with_params

    model = result.model
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        model = with_params(model, multihost_utils.process_allgather(result.params, tiled=True))
    if jax.process_index() == 0:
        hub.save(model, directory, tokenizer)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("jaxformers: model saved")
