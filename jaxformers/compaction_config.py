"""Whether Hugging Face's ``config.json`` can say what a cut has made of a model: by building what it would say."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from jaxformers import models, surgery, units
from jaxformers.nn.keys import Keys
from jaxformers.residual import at


def as_config(small: nnx.Module, blocks: Mapping[str, Sequence[int]]) -> Any | None:
    """A config whose own model is built as ``small`` is; None where the architecture has no words for it."""
    old = small.config
    sizes, heads = units.units(small), [module for _, module in units.attentions(small)]
    hidden, inner = sizes.get("hidden"), _one(sizes.get("ffn", {}).values())
    say = {
        "num_hidden_layers": len(at(small, "encoder.layers") or at(small, "layers") or ()),
        "num_decoder_layers": len(at(small, "decoder.layers") or ()) or None,
        "hidden_size": hidden,
        "embedding_size": sizes.get("embeddings", hidden),
        "intermediate_size": inner,
        "mlp_ratio": inner // hidden if inner and hidden and inner % hidden == 0 else None,
        "num_attention_heads": _one(a.heads for a in heads),
        "num_key_value_heads": _one(getattr(a, "kv_heads", a.heads) for a in heads),
        "head_dim": _one(a.size for a in heads),
    }
    known = {field.name: getattr(old, field.name) for field in dataclasses.fields(old)}
    say = {name: value for name, value in say.items() if name in known and value is not None and known[name] != value}
    if "hidden_size" in say and known.get("scale_decoder_outputs"):
        return None  # T5 scales its logits by the width that it was trained with
    said = {name: value for name, value in say.items() if known[name] is not None}  # defaults stay unsaid if they fit
    for chosen in (said, say):
        try:
            config = _with_depth(dataclasses.replace(old, **chosen), old, blocks.get("layers"))
            again = type(config).from_hf(config.to_hf())
            if all(_builds(c, small) for c in (config, again)):
                return config
        except ValueError:
            continue
    return None


def _with_depth(config: Any, old: Any, stay: Sequence[int] | None) -> Any:
    """What ``config`` says layer by layer, said of the layers that are left."""
    depth = old.num_hidden_layers
    if stay is None:
        return config
    fewer = lambda value: [value[i] for i in stay] if isinstance(value, list | tuple) and len(value) == depth else value
    hf = {name: fewer(value) if "layer" in name else value for name, value in json.loads(config.hf).items()}
    named = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if "layer" in f.name}
    listed = {name: tuple(fewer(value)) for name, value in named.items() if isinstance(value, tuple)}
    return dataclasses.replace(config, hf=json.dumps(hf, sort_keys=True), **listed)


def _builds(config: Any, small: nnx.Module) -> bool:
    """Is the model that ``config`` describes built as ``small`` is, in every shape and setting?"""
    if getattr(config, "rope", None) != getattr(small.config, "rope", None):
        return False
    head = None if small.head_name == "sentence" else small.head_name
    model = nnx.eval_shape(lambda: models.module_of(config).Model(config, head=head, rngs=Keys(0)))
    model = surgery.replay(model, {"surgery": surgery.to_json(small)})
    return settings(model) == settings(small)


def settings(model: nnx.Module) -> dict[str, Any]:
    """Shapes by parameter and plain settings by module; a sentence head is described elsewhere."""
    plain = lambda value: isinstance(value, int | float | str | tuple | None)
    unlike = ("path", "source", "surgery", "config", "head_name", "remat")
    found: dict[str, Any] = {path: tuple(leaf.shape) for path, leaf in units.flat_state(model).items()}
    for path, module in nnx.iter_modules(model):
        own = {n: v for n, v in vars(module).items() if plain(v) and n not in unlike and not n.startswith("_")}
        found[".".join(map(str, (*path, "settings")))] = (type(module), own)
    return {path: value for path, value in found.items() if model.head_name != "sentence" or "head." not in path}


def _one(values: Any) -> Any:
    """The number that all ``values`` are; None where they differ, or there are none."""
    found = set(values)
    return found.pop() if len(found) == 1 else None
