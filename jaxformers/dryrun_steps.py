"""The steps that dry runs compile, as functions of shapes: training, prefill, decoding; and models by name."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxformers import hub, losses, models, nn, paths, resolve
from jaxformers.chips import devices_of
from jaxformers.dryrun import STEPS, Step
from jaxformers.functional import functional
from jaxformers.mesh import batch_sharding, batch_ways, cache_shardings, constrained
from jaxformers.mesh import mesh as make_mesh
from jaxformers.models.config import positions_of
from jaxformers.nn.block import stack
from jaxformers.nn.keys import Keys
from jaxformers.safetensors_io import read_json
from jaxformers.train import placement
from jaxformers.train.config import TrainConfig
from jaxformers.train.optim import OptimConfig, make_optimizer
from jaxformers.train.state import State, leaf_paths, split
from jaxformers.train.step import make_step
from jaxformers.weights.base import is_typed

Array = jax.ShapeDtypeStruct


def _sizes(model_type: str, width: int, layers: int, heads: int, mlp: int, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
            "intermediate_size": mlp, **more}  # fmt: skip


_XLMR = {"vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
_OPT = {"model_type": "opt", "vocab_size": 50272, "max_position_embeddings": 2048}
# What config.json of well-known models says, for machines without a network. Names are compared without their owner.
NAMED: dict[str, dict[str, Any]] = {
    "bert-base-uncased": _sizes("bert", 768, 12, 12, 3072, architectures=["BertForMaskedLM"]),
    "bert-base-cased": _sizes("bert", 768, 12, 12, 3072, vocab_size=28996, architectures=["BertForMaskedLM"]),
    "bert-large-uncased": _sizes("bert", 1024, 24, 16, 4096, architectures=["BertForMaskedLM"]),
    "roberta-large": _sizes("roberta", 1024, 24, 16, 4096, **_XLMR | {"vocab_size": 50265}),
    "paraphrase-multilingual-mpnet-base-v2": _sizes("xlm-roberta", 768, 12, 12, 3072, **_XLMR),
    "opt-125m": _OPT | {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072},
    "opt-66b": _OPT | {"hidden_size": 9216, "num_hidden_layers": 64, "num_attention_heads": 72, "ffn_dim": 36864},
    "llama-7b": _sizes("llama", 4096, 32, 32, 11008, max_position_embeddings=4096),
    "llama-2-7b-hf": _sizes("llama", 4096, 32, 32, 11008, max_position_embeddings=4096, torch_dtype="float16"),
    "llama-70b": _sizes("llama", 8192, 80, 64, 28672, num_key_value_heads=8, max_position_embeddings=4096),
    "llama-3-8b": _sizes("llama", 4096, 32, 32, 14336, num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0,
                         max_position_embeddings=8192),
    "llama-3.2-1b-instruct": _sizes(
        "llama", 2048, 16, 32, 8192, num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0, head_dim=64,
        max_position_embeddings=131072, tie_word_embeddings=True,
        rope_scaling={"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192},
    ),
    # the sizes of xTrimoPGLM-100B (arXiv 2401.06199) in the blocks of GLM-4
    "glm-100b": _sizes("glm", 10240, 72, 80, 31744, num_key_value_heads=80, head_dim=128, vocab_size=128,
                       max_position_embeddings=2048, pad_token_id=0),
    "t5-11b": {"model_type": "t5", "d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_layers": 24, "num_heads": 128,
               "vocab_size": 32128, "architectures": ["T5ForConditionalGeneration"]},
    "deit-small-patch16-224": _sizes("vit", 384, 12, 6, 1536, id2label={str(i): "" for i in range(1000)},
                                     architectures=["ViTForImageClassification"]),
    "vit-g": _sizes("vit", 1408, 40, 16, 6144, image_size=224, patch_size=14,
                    id2label={str(i): "" for i in range(1000)}, architectures=["ViTForImageClassification"]),
}  # fmt: skip


def config_dict(model: str) -> dict[str, Any]:
    """config.json of a file, a directory, a name of :data:`NAMED` or a hub id. Raises ValueError."""
    path = Path(model)
    if path.suffix == ".json":
        return read_json(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model: {path} has no config.json")
        return read_json(path / "config.json")
    name = model.rpartition("/")[2].lower()
    if name in NAMED:
        return dict(NAMED[name])
    try:
        return read_json(resolve.find(model) / "config.json")
    except ValueError as error:
        raise ValueError(f"model: {error}; names known without files are {', '.join(NAMED)}") from None


def check(
    *, model: str, topology: str, mesh: str | None, step: str, batch: int | None, seq: int, head: str | None,
    optimizer: str, remat: str | None, scan_layers: bool,
) -> tuple[int, int]:  # fmt: skip
    """(batch, the number that batches are multiples of). Raises ValueError for what cannot be."""
    if step not in STEPS:
        raise ValueError(f"step: expected one of {', '.join(STEPS)}, got {step!r}")
    if seq < 1 or (batch is not None and batch < 1):
        raise ValueError(f"batch, seq: expected 1 or more, got {batch}, {seq}")
    devices = devices_of(topology)
    made = make_mesh(mesh or f"fsdp={len(devices)}", devices)
    if made.size != len(devices):
        raise ValueError(f"mesh {mesh!r}: it takes {made.size} of the {len(devices)} devices of {topology}")
    unit = batch_ways(made)
    batch = unit if batch is None else batch
    if batch % unit:
        raise ValueError(f"batch: {batch} does not divide over the {unit} devices along data and fsdp")
    OptimConfig(name=optimizer)
    hf = config_dict(model)
    arch = models.architecture(hf.get("model_type", ""))
    config, head = arch.Config.from_hf(hf), _head(hf, arch, head)
    positions = positions_of(config)
    if positions is not None and getattr(config, "rope", None) is None and seq > positions and step != "decode":
        raise ValueError(f"seq: {seq} tokens exceed the {positions} positions of {model}")
    if step == "decode" and not _decodes(arch.Model, config):
        raise ValueError(
            f"step: dry runs decode with decoders alone, which {arch.Model.__name__} is not here; its forward pass is "
            "what prefill compiles"
        )
    if step == "train":
        objective_of(head)
    abstract(arch, config, head, scan_layers=scan_layers, remat=remat)  # do equal layers stack?
    return batch, unit


def _head(hf: Mapping[str, Any], arch: Any, head: str | None) -> str | None:
    if head is None:
        head = hub.head_from_architectures(hf, arch) or next(iter(arch.HEADS), None)
    hub.check_head(head, arch)
    return head


def abstract(arch: Any, config: Any, head: str | None, **options: Any) -> tuple[Callable, Any]:
    """(apply, shapes of its parameters) of a model, without making any array; ``options``: of `jf.functional`."""
    kept: list[Callable] = []

    def build() -> Any:
        apply, params = functional(_model(arch, config, head), **options)
        kept.append(apply)
        return params

    params = jax.eval_shape(build)
    return kept[0], params


def _decodes(kind: type, config: Any) -> bool:
    """Whether a model generates from a cache of its own, without an encoder's memory."""
    inputs = inspect.signature(kind.__call__).parameters
    alone = "decoder_input_ids" not in inputs and "pixel_values" not in inputs
    return hasattr(kind, "empty_cache") and alone and getattr(config, "is_decoder", True)


def _model(arch: Any, config: Any, head: str | None) -> Any:
    model = arch.Model(config, head=None if head == "sentence" else head, rngs=Keys(0))
    return nn.new_sentence_head(model, pooling="mean", rngs=Keys(0)) if head == "sentence" else model


def model_step(
    *, model: str, mesh: Mesh, step: str, batch: int, seq: int, head: str | None, optimizer: str, remat: str | None,
    scan_layers: bool,
) -> Step:  # fmt: skip
    """The step of a model; arguments as for `jaxformers.dryrun.dry_run`."""
    hf = config_dict(model)
    arch = models.architecture(hf["model_type"])
    config, head = arch.Config.from_hf(hf), _head(hf, arch, head)
    training = step == "train"
    apply, params = abstract(arch, config, head, scan_layers=scan_layers, remat=remat if training else None)
    apply = constrained(apply, mesh)
    data, items = batch_shapes(arch.Model, config, head, batch, seq, labels=training)
    name = f"{Path(model).name}, {step} step, {batch:,} × {items}"
    if training:
        settings = TrainConfig(steps=1000, optim=OptimConfig(name=optimizer), compute_dtype="bfloat16")
        return train_step(name, objective_of(head), apply, params, data, settings, mesh)
    params, count = placed(as_dtype(params, jnp.bfloat16), mesh), size(params)
    if not _decodes(arch.Model, config):
        return Step(name, apply, (params, spread(data, mesh)), parameters=count)

    def empty() -> Any:
        built = _model(arch, config, head)
        built.layers = stack(built.layers) if scan_layers else built.layers
        return built.empty_cache(batch, seq)

    cache = as_dtype(jax.eval_shape(empty), jnp.bfloat16)
    cache = jax.tree.map(_at, cache, cache_shardings(mesh, cache))
    tokens = {"input_ids": Array((batch, seq if step == "prefill" else 1), jnp.int32)}

    def forward(params: Any, tokens: Any, cache: Any) -> tuple[jax.Array, Any]:
        out = apply(params, {**tokens, "cache": cache, "logits_to_keep": 1})
        return out.last_hidden_state if out.logits is None else jnp.argmax(out.logits[:, -1], axis=-1), out.cache

    places = (None, jax.tree.map(lambda x: x.sharding, cache))
    return Step(name, forward, (params, spread(tokens, mesh), cache), (2,), places, count)


def batch_shapes(
    kind: type, config: Any, head: str | None, batch: int, seq: int, *, labels: bool
) -> tuple[dict[str, Array], str]:
    """A batch of ``kind``'s inputs, with labels for its head, and what one of its rows is."""
    inputs = inspect.signature(kind.__call__).parameters
    if "pixel_values" in inputs:
        sides = getattr(config, "image_size", (224, 224))
        sides = (sides, sides) if isinstance(sides, int) else tuple(sides)
        data = {"pixel_values": Array((batch, getattr(config, "num_channels", 3), *sides), jnp.float32)}
        items, tokens = f"images of {sides[0]} × {sides[1]}", None
    elif "input_ids" in inputs:
        data, items, tokens = {"input_ids": Array((batch, seq), jnp.int32)}, f"{seq:,} tokens", (batch, seq)
        if "decoder_input_ids" in inputs:
            data["decoder_input_ids"] = Array((batch, seq), jnp.int32)
            items += " in and out"
    else:
        raise ValueError(f"model: dry runs feed pixel_values or input_ids; {kind.__name__} takes {', '.join(inputs)}")
    if labels:
        per_token = tokens is not None and head not in ("sequence_classification", "sentence")
        data["labels"] = Array(tokens if per_token else (batch,), jnp.int32)
    return data, items


def objective_of(head: str | None) -> Callable:
    """The loss that a head is trained by: next tokens, masked tokens or labels, supervised contrast for sentences.

    Raises ValueError for a head without one, and for no head.
    """
    if head is None:
        raise ValueError("head: a model without a head has no loss to train by; choose one")
    known = ("causal_lm", "masked_lm", "seq2seq_lm", "sequence_classification", "token_classification",
             "image_classification", "sentence")  # fmt: skip
    if head not in known:
        raise ValueError(f"head: dry runs know the losses of {', '.join(known)}, not of {head!r}")

    def objective(apply: Callable, params: Any, batch: Mapping[str, Any], key: Any) -> tuple[jax.Array, dict]:
        labels = batch["labels"]
        out = apply(params, {k: v for k, v in batch.items() if k != "labels"}, rngs=key)
        if head == "sentence":
            return losses.supcon_loss(out.pooled, labels, temperature=0.07), {}
        logits, labels = (out.logits[:, :-1], labels[:, 1:]) if head == "causal_lm" else (out.logits, labels)
        return losses.cross_entropy(logits, labels), {}

    return objective


def train_step(
    name: str, objective: Callable, apply: Any, params: Any, batch: Any, config: TrainConfig, mesh: Mesh,
    optimizer: optax.GradientTransformation | None = None,
) -> Step:  # fmt: skip
    """The step that `jaxformers.fit` would compile for these shapes: state, frozen parameters, batch, key.

    ``optimizer``: as there, in place of ``config.optim``.
    """
    trained, frozen, join = split(params, config.trainable, config.freeze)
    owners = dict(leaf_paths(params))
    optimizer = make_optimizer(config.optim, config.steps, trained, owners) if optimizer is None else optimizer
    places = placement.param_shardings(params, mesh)
    wide = {p: Array(x.shape, jnp.promote_types(x.dtype, jnp.float32), sharding=places[p]) for p, x in trained.items()}
    moments = jax.eval_shape(optimizer.init, wide)
    moments = jax.tree.map(_at, moments, placement.state_shardings(moments, wide, places, mesh))
    ema = None if config.ema is None else wide
    scalar = Array((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    state = State(scalar, wide, moments, ema, scalar, scalar)
    low = config.compute_dtype
    changes = lambda p, x: low and owners[p] == p and jnp.issubdtype(x.dtype, jnp.floating)
    frozen = {p: Array(x.shape, low if changes(p, x) else x.dtype, sharding=places[p]) for p, x in frozen.items()}
    function = make_step(
        objective, apply, join, optimizer, dtypes={p: config.compute_dtype or x.dtype for p, x in trained.items()},
        accumulate=config.accumulate, ema=config.ema, skip_nonfinite=config.on_nan == "skip",
    )  # fmt: skip
    key = _at(jax.eval_shape(lambda: jax.random.key(0)), scalar.sharding)
    out = (jax.tree.map(lambda x: x.sharding, state), None)
    return Step(name, function, (state, frozen, spread(batch, mesh), key), (0,), out, size(params))


def size(params: Any) -> int:
    """How many weights the arrays (or shapes) of a tree are; a typed weight counts as the matrix it stands for."""
    return sum(paths.count(x) for x in jax.tree.leaves(params, is_leaf=is_typed))


def placed(params: Any, mesh: Mesh) -> Any:
    """Shapes of parameters with the shardings of `jaxformers.mesh`."""
    places = placement.param_shardings(params, mesh)
    flat = [_at(x, places[path]) for (path, _), x in zip(leaf_paths(params), jax.tree.leaves(params), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), flat)


def replicated(tree: Any, mesh: Mesh) -> Any:
    """Shapes of which every device holds the whole."""
    return jax.tree.map(lambda x: _at(x, NamedSharding(mesh, PartitionSpec())), tree)


def as_dtype(tree: Any, dtype: Any) -> Any:
    """Floating-point shapes of a tree in ``dtype``."""
    return jax.tree.map(lambda x: Array(x.shape, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype), tree)


def spread(batch: Any, mesh: Mesh) -> Any:
    """Shapes of a batch, cut over the data axes."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: _at(x, batch_sharding(mesh) if len(x.shape) else whole), batch)


def _at(x: Any, sharding: NamedSharding) -> Array:
    return Array(x.shape, x.dtype, sharding=sharding)
