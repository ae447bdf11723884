"""X-EcoMLA's checkpoints in other layouts: those that the authors published, in; Hugging Face's DeepSeek-V3, out.

A published directory holds the source llama's config.json, ``MLA_config.json`` (which layers stay attention),
``mla_layer_config.json`` (sizes, and the ranks of each layer) and tensors ``model.layers.N.mla.{q_a_proj, q_b_proj,
kv_a_proj_with_mqa, kv_b_proj, out_proj}`` (official code: AMD-AGI/AMD-Hybrid-Models, folder X-EcoMLA).
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jaxformers import hub, nn, resolve
from jaxformers.compress.x_ecomla import abstract_mla
from jaxformers.functional import functional, with_params
from jaxformers.models import deepseek_v3
from jaxformers.models.reading import fill
from jaxformers.nn.keys import Keys
from jaxformers.safetensors_io import CheckpointError, read_json

LAYERS, SIZES = "MLA_config.json", "mla_layer_config.json"
# the official configuration class writes only what differs from its defaults
DEFAULTS = {
    "num_attention_heads": 128, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "use_lora_layer_norm": False, "layer_rank_list": {},
    "max_position_embeddings": 4096, "rope_theta": 10000.0, "rope_scaling": None, "rope_type": "yarn",
    "attention_bias": False,
}  # fmt: skip
NAMES = {
    "q_proj": "model.layers.{}.self_attn.q_proj", "out_proj": "model.layers.{}.self_attn.o_proj",
    "q_a_proj": "jaxformers.layers.{}.attention.query_down", "q_b_proj": "jaxformers.layers.{}.attention.query_up",
    "q_a_layernorm": "jaxformers.layers.{}.attention.query_norm",
    "kv_a_layernorm": "jaxformers.layers.{}.attention.kv_norm",
    "kv_a_proj_with_mqa": "jaxformers.layers.{}.attention.kv_down", "kv_b_proj": "jaxformers.layers.{}.attention.kv_up",
}  # fmt: skip


def load_published(path_or_id: str | Path, *, dtype: Any = None, mesh: jax.sharding.Mesh | None = None) -> nnx.Module:
    """The model of a published X-EcoMLA checkpoint (safetensors); `jaxformers.save` writes it in this library's layout.

    Rotary positions are those of the official code: YaRN with every setting that ``rope_scaling`` has (Llama 3.2's
    original length of 8192 among them), over 4096 positions where it names none. ``dtype``, ``mesh``: as for
    :func:`jaxformers.load`.

    Raises ValueError (CheckpointError for the files): a missing file, tensors that do not fit, settings that this
    library's latent attention does not have.
    """
    directory = Path(resolve.find(str(path_or_id)))
    for name in (LAYERS, SIZES):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory}: has no {name}; expected a published X-EcoMLA checkpoint")
    sizes = {**DEFAULTS, **_object(directory / SIZES)}
    kept = _object(directory / LAYERS).get("attn_layers", [])
    found = hub.outline(directory)
    config, depth = found.model.config, len(found.model.layers)
    if sizes["attention_bias"]:
        raise ValueError(f"{SIZES}: attention_bias true is not supported")
    if sizes["num_attention_heads"] != config.num_attention_heads or sizes["v_head_dim"] != config.head_size:
        raise ValueError(f"{SIZES}: its heads are not those of config.json")
    if not isinstance(kept, list) or not all(isinstance(i, int) and 0 <= i < depth for i in kept):
        raise ValueError(f"{LAYERS}: attn_layers must be a list of layers from 0 to {depth - 1}")
    listed, ranks = sizes["layer_rank_list"], {}
    for i in range(depth):
        if i not in kept:
            own = listed.get(str(i)) or {"q_rank": sizes["q_lora_rank"], "kv_rank": sizes["kv_lora_rank"]}
            ranks[str(i)] = [own["q_rank"], own["kv_rank"]]
    settings = {
        "nope": sizes["qk_nope_head_dim"], "rope": sizes["qk_rope_head_dim"],
        "rotary": dataclasses.asdict(_rotary(sizes)), "latent_norm": bool(sizes["use_lora_layer_norm"]),
    }  # fmt: skip
    model = nnx.eval_shape(functools.partial(abstract_mla, ranks=ranks, **settings), found.model)
    return fill(model, found.arch, _Renamed(found.checkpoint), found.extra, dtype, mesh, None, found.skip)


def _rotary(sizes: Mapping[str, Any]) -> nn.Rotary:
    scaling = sizes["rope_scaling"]
    hf = {"rope_theta": sizes["rope_theta"], "max_position_embeddings": sizes["max_position_embeddings"]}
    if scaling is not None:
        if sizes["rope_type"] != "yarn" or scaling.get("mscale_all_dim"):
            raise ValueError(f"{SIZES}: with a rope_scaling, rope_type must be 'yarn' and mscale_all_dim 0")
        used = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale")
        scaling = {name: scaling[name] for name in used if name in scaling}
        hf["rope_scaling"] = {"original_max_position_embeddings": 4096, **scaling, "rope_type": "yarn"}
    return nn.rotary_from_hf(hf, sizes["qk_rope_head_dim"], interleaved=True)


def _object(file: Path) -> dict[str, Any]:
    found = read_json(file)
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return found


class _Renamed(Mapping[str, Any]):
    """A checkpoint with the published names of latent attention in this library's."""

    def __init__(self, checkpoint: Any):
        self._plain, self.directory = checkpoint, checkpoint.directory
        self._names = {_own(name): name for name in checkpoint}

    def __getitem__(self, name: str) -> Any:
        return self._plain[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def release(self) -> None:
        self._plain.release()


def _own(name: str) -> str:
    match = re.fullmatch(r"model\.layers\.(\d+)\.mla\.(\w+)\.weight", name)
    return name if match is None or match[2] not in NAMES else f"{NAMES[match[2]].format(match[1])}.weight"


def as_deepseek_v3(model: nnx.Module) -> nnx.Module:
    """The same function as a dense DeepSeek-V3, which other tools load once it is saved.

    That architecture has norms on its latents, one pair of ranks and latent attention in every layer: ``model`` must
    have been made with ``latent_norm=True``, fixed ranks and all layers. Raises ValueError where it was not, or has a
    layer that DeepSeek-V3 lacks.
    """
    found = [block.attention for block in model.layers]
    if not all(isinstance(a, nn.LatentAttention) and a.kv_norm is not None for a in found):
        raise ValueError("model: DeepSeek-V3 needs latent attention with norms (latent_norm=True) in every layer")
    same = lambda a: (None if a.query_down is None else a.query_up.kernel.get_value().shape[0], a.rank, a.rotary)
    if len({same(a) for a in found}) > 1:
        raise ValueError("model: DeepSeek-V3 has the same ranks in every layer; upcycle with fixed ranks")
    query_rank, rank, rotary = same(found[0])
    c, first = model.config, found[0]
    config = deepseek_v3.Config(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads, intermediate_size=c.intermediate_size,
        first_k_dense_replace=c.num_hidden_layers, num_nextn_predict_layers=0, q_lora_rank=query_rank,
        kv_lora_rank=rank, qk_nope_head_dim=first.nope, qk_rope_head_dim=first.rope, v_head_dim=first.value_size,
        hidden_act=c.hidden_act, max_position_embeddings=c.max_position_embeddings, layer_norm_eps=c.layer_norm_eps,
        attention_probs_dropout_prob=c.attention_probs_dropout_prob, initializer_range=c.initializer_range,
        pad_token_id=c.pad_token_id, tie_word_embeddings=c.tie_word_embeddings, rope_interleave=rotary.interleaved,
        num_labels=c.num_labels, rotary=rotary,
    )  # fmt: skip
    new = nnx.eval_shape(lambda: deepseek_v3.Model(config, head=model.head_name, rngs=Keys(0)))
    new = with_params(new, functional(model)[1])
    new.source = model.source
    return new
