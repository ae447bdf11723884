"""STAR: a writing-style encoder, trained so that texts of one author lie close whatever they are about.

"Understanding writing style in social media with a supervised contrastively pre-trained transformer" (arXiv
2310.11081). A batch holds B authors with V texts ("views") each; a text's embedding is

    z = W mean_{real tokens} h + b     (pool="mean_linear")     or     z = tanh(W h_<s> + b)     (pool="cls_pooler")

and the loss over all B V of them is supervised contrastive (`jaxformers.losses.supcon_loss`): the other texts of an
author attract, all other texts repel. The batch is the larger the better, so it is encoded in chunks with the exact
gradient (`jaxformers.train.gradient_cache`).

    style = StylePretrainer("FacebookAI/roberta-base").fit(table, authors_per_batch=64, views=16, chunk=32, key=key)
    style.save("my-style"); style.embed(texts); AuthorIndex(known, style.embed).predict(unknown)

What embeddings are then used for is in `jaxformers.pretrain.star_attribution`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformers import hub, nn, surgery
from jaxformers.atomic import write_json_atomic
from jaxformers.data.tokenizers import Tokenizer, load_tokenizer
from jaxformers.embedding import embed
from jaxformers.functional import functional, with_params
from jaxformers.losses import MAX_SCALE, info_nce, supcon_loss
from jaxformers.pretrain.star_attribution import AuthorIndex, Verifier, checked_texts, cluster, verify
from jaxformers.pretrain.star_batches import AuthorBatches, author_table
from jaxformers.train.gradient_cache import gradient_cache
from jaxformers.train.loop import TrainConfig, fit
from jaxformers.train.optim import OptimConfig
from jaxformers.train.state import trained_by_default

__all__ = [
    "AuthorBatches", "AuthorIndex", "PAPER", "StyleModel", "StylePretrainer", "Verifier", "author_table", "cluster",
    "star_objective", "verify",
]  # fmt: skip

POOLS = {"mean_linear": ("mean", "linear"), "cls_pooler": ("cls", "tanh")}
# The paper's run: RoBERTa-large, 1024 authors with 16 views, chunks of 32. Small models want 1e-3, or AdamW at 1e-4.
PAPER = TrainConfig(
    steps=3000,
    optim=OptimConfig(name="adafactor", learning_rate=1e-2, warmup=0.06, clip_norm=None),
    compute_dtype="bfloat16",
)


@dataclasses.dataclass(frozen=True)
class StyleModel:
    """A trained style encoder: an nnx model with a sentence head, and the tokenizer it reads through."""

    model: nnx.Module
    tokenizer: Tokenizer
    settings: dict[str, Any]  # what style.json holds
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list, repr=False)

    def embed(self, texts: Any, batch_size: int = 128) -> np.ndarray:
        """n texts, taken raw -> (n, width) float32, not normalised. Raises ValueError for an empty text."""
        texts, limit = checked_texts(texts), self.settings["max_length"]
        return embed(self.model, texts, tokenizer=self.tokenizer, batch_size=batch_size, max_length=limit)

    def save(self, directory: str | Path) -> None:
        """A Hugging Face directory in the sentence-transformers layout, with style.json: every recipe can load it."""
        hub.save(self.model, directory, self.tokenizer)
        limit = {"max_seq_length": self.settings["max_length"], "do_lower_case": False}
        write_json_atomic(Path(directory) / "sentence_bert_config.json", limit)
        write_json_atomic(Path(directory) / "style.json", self.settings)

    @classmethod
    def load(cls, directory: str | Path, **options: Any) -> StyleModel:
        """What `save` wrote; `options` (dtype, mesh) go to `jaxformers.load`. Raises ValueError without style.json."""
        file = Path(directory) / "style.json"
        if not file.is_file():
            raise ValueError(f"directory: {directory} has no style.json; expected what StyleModel.save wrote")
        settings = json.loads(file.read_text(encoding="utf-8"))
        return cls(hub.load(directory, **options), load_tokenizer(directory), settings)


class StylePretrainer:
    """Makes a style encoder out of `backbone` (a checkpoint directory, hub id, or nnx encoder).

    `pool`: "mean_linear" or "cls_pooler" (the backbone's own pooler where it has one, else a new one from `key`).
    `loss`: "supcon". `temperature` None learns the scale, from 1/0.07 and at most 100; a number (0.01 or more) fixes
    it at 1/temperature. `compat="star"` takes the loss as the published code computes it. `tuned_layers` n > 0 trains
    the last n layers and the pooling layer only; 0 trains everything. `max_length`: texts are cut to so many tokens;
    None: as many as the backbone takes.
    """

    def __init__(
        self,
        backbone: str | Path | nnx.Module,
        *,
        key: jax.Array,
        pool: str = "mean_linear",
        loss: str = "supcon",
        temperature: float | None = None,
        compat: str | None = None,
        tuned_layers: int = 0,
        max_length: int | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        if pool not in POOLS:
            raise ValueError(f"pool: must be one of {', '.join(POOLS)}, got {pool!r}")
        if loss != "supcon":
            raise ValueError(f"loss: must be 'supcon', got {loss!r}")
        if compat not in (None, "star"):
            raise ValueError(f"compat: must be None or 'star', got {compat!r}")
        if compat == "star" and temperature is not None:
            raise ValueError("temperature: the published loss has none; leave it None with compat='star'")
        if temperature is not None and not temperature >= 1 / MAX_SCALE:
            raise ValueError(f"temperature: must be >= {1 / MAX_SCALE} (a scale of {MAX_SCALE:g}), got {temperature}")
        model = backbone if isinstance(backbone, nnx.Module) else hub.load(backbone, head=hub.NO_HEAD)
        if not 0 <= tuned_layers <= len(model.layers):
            raise ValueError(f"tuned_layers: must be in 0..{len(model.layers)}, got {tuned_layers}")
        if tokenizer is None:
            if model.source is None:
                raise ValueError("tokenizer: the backbone has no directory to read one from; pass tokenizer=")
            tokenizer = load_tokenizer(model.source)
        if tokenizer.vocab_size > model.config.vocab_size:
            rows = model.config.vocab_size
            raise ValueError(f"tokenizer: it has {tokenizer.vocab_size} ids, the backbone's vocabulary {rows}")
        positions = getattr(model.config, "max_length", model.config.max_position_embeddings)
        limit = min(positions, tokenizer.max_length or positions)
        if max_length is not None and not 1 <= max_length <= positions:
            raise ValueError(f"max_length: must be in 1..{positions}, got {max_length}")
        self.model, self.tokenizer = with_pooling(model, pool, key), tokenizer
        self.tuned_layers, self.temperature, self.compat = tuned_layers, temperature, compat
        self.settings = {
            "pool": pool, "loss": loss, "compat": compat, "temperature": temperature, "max_length": max_length or limit
        }  # fmt: skip

    def untrained(self) -> StyleModel:
        """The encoder as it is before training."""
        return StyleModel(self.model, self.tokenizer, self.settings)

    def fit(
        self,
        table: Any,
        *,
        key: jax.Array,
        authors_per_batch: int = 1024,
        views: int = 16,
        chunk: int = 32,
        train: TrainConfig = PAPER,
        validation: Any = None,
        validation_authors: int = 64,
        validation_views: int = 16,
        seed: int = 0,
        directory: str | Path | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> StyleModel:
        """Train on `table` (columns author, text and, where known, source and doc; see `author_table`).

        `chunk` texts are encoded at a time. `validation`: a table of other authors, for eval_loss and eval_accuracy of
        matching the mean of one quarter of an author's views with that of another. `seed` orders the sampling.
        `directory` keeps metrics and checkpoints, and takes a run up again.
        """
        if train.accumulate != 1:
            raise ValueError("train.accumulate: the loss compares all texts of a batch; use a smaller chunk instead")
        if not 1 <= chunk <= authors_per_batch * views:
            raise ValueError(f"chunk: must be in 1..{authors_per_batch * views} (authors x views), got {chunk}")
        tokens = dict(tokenizer=self.tokenizer, max_length=self.settings["max_length"])
        data = AuthorBatches(author_table(table), authors_per_batch, views, seed=seed, **tokens)
        held = None
        if validation is not None:
            if validation_views % 4:
                raise ValueError(f"validation_views: must be a multiple of 4, got {validation_views}")
            known = author_table(validation)
            b = min(validation_authors, len(set(known["author"])))
            held = AuthorBatches(known, b, validation_views, seed=seed + 1, batches=1, **tokens)

        options = {"scan_layers": train.scan_layers, "remat": train.remat}
        apply, params = functional(self.model, **options)
        start = 0.07 if self.compat == "star" else math.log(1 / 0.07)
        everything = {"model": params}
        if self.temperature is None:
            everything["log_scale"] = jnp.float32(start)
        frozen = train.freeze
        if self.tuned_layers:
            if train.scan_layers:
                raise ValueError("train.scan_layers: tuned_layers freezes layers one by one, stacked layers cannot be")
            below = len(self.model.layers) - self.tuned_layers
            frozen = (*frozen, "model.embeddings.**", *(f"model.layers.{i}.**" for i in range(below)))
        trainable = train.trainable
        default = trained_by_default(everything)
        if trainable is None and "model.head.dense.kernel" not in default:  # a LoRA backbone: the pooling layer is new
            trainable = (*sorted(default), "model.head.**", *(["log_scale"] if self.temperature is None else []))
        run = dataclasses.replace(train, trainable=trainable, freeze=frozen, scan_layers=False, remat=None)
        if self.temperature is None:  # weight decay would pull the scale to 1
            keep = (*run.optim.no_decay, "log_scale")
            run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, no_decay=keep))
        loss = {"temperature": self.temperature, "compat": self.compat}
        done = fit(
            star_objective(chunk, **loss), everything, data, run, key=key, apply=apply, eval_data=held,
            eval_objective=star_validation(chunk, **loss), directory=directory, mesh=mesh,
        )  # fmt: skip
        scale = None if self.temperature is not None else float(done.params["log_scale"])
        settings = {**self.settings, "log_scale": scale, "authors": len(data.authors), "steps": done.step}
        return StyleModel(with_params(self.model, done.params["model"]), self.tokenizer, settings, done.history)


def star_objective(chunk: int, *, temperature: float | None = None, compat: str | None = None) -> Callable:
    """Objective for `fit`: params {"model": ..., "log_scale": scalar, unless the temperature is fixed}.

    Batches hold input_ids, attention_mask (B, V, L) and labels (B,). Metrics: scale.
    """

    def objective(apply: Any, params: Any, batch: Any, key: jax.Array | None):
        z = _encode(apply, params["model"], batch, key, chunk)
        log_scale = _log_scale(params, temperature)
        loss = supcon_loss(z, batch["labels"], log_scale=log_scale, compat=compat)
        bound = jnp.maximum if compat == "star" else jnp.minimum
        return loss, {"scale": bound(jnp.exp(log_scale), MAX_SCALE)}

    return objective


def star_validation(chunk: int, *, temperature: float | None = None, compat: str | None = None) -> Callable:
    """Objective for evaluation: InfoNCE between the means of an author's first and second quarter of views.

    Metrics: accuracy, the mean of row and column hits. As published, the scale is min(exp(log_scale), 100).
    """

    def objective(apply: Any, params: Any, batch: Any, key: jax.Array | None):
        z = _encode(apply, params["model"], batch, key, min(chunk, batch["input_ids"][..., 0].size))
        quarter = z.shape[1] // 4
        anchor, replica = z[:, :quarter].mean(1), z[:, quarter : 2 * quarter].mean(1)
        loss, accuracy = info_nce(anchor, replica, log_scale=_log_scale(params, temperature), compat=compat)
        return loss, {"accuracy": accuracy}

    return objective


def _log_scale(params: Any, temperature: float | None) -> jax.Array:
    """ln of the similarity scale: learnt, or 1 / temperature."""
    return params["log_scale"] if "log_scale" in params else jnp.float32(-math.log(temperature or 0.07))


def _encode(apply: Any, params: Any, batch: Any, key: jax.Array | None, chunk: int) -> jax.Array:
    """Texts (B, V, L) -> embeddings (B, V, width), `chunk` of them at a time."""
    names = ("input_ids", "attention_mask")
    shape = batch["input_ids"].shape
    flat = {name: batch[name].reshape(-1, shape[-1]) for name in names}
    pooled = lambda params, part, key: apply(params, part, rngs=key).pooled
    return gradient_cache(pooled, chunk)(params, flat, key).reshape(*shape[:2], -1)


def with_pooling(model: nnx.Module, pool: str, key: jax.Array) -> nnx.Module:
    """A copy of `model` whose head gives style embeddings."""
    model = surgery.copy(model)
    pooling, act = POOLS[pool]
    pooler = getattr(model, "pooler", None)
    if pooler is not None:
        model.pooler = None
    if hasattr(model.config, "pooler"):
        model.config = dataclasses.replace(model.config, pooler=False)
    width = model.config.hidden_size
    nn.new_sentence_head(model, pooling=pooling, out=width, act=act, rngs=nnx.Rngs(key))
    if pool == "cls_pooler" and pooler is not None:
        model.head.dense = pooler
    return surgery.named(model)
