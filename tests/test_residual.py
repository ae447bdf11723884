"""The residual stream's roles against what models do: one model of every architecture, and heads that read it apart."""

import inspect
import re

import jax
import numpy as np
import pytest
from flax import nnx

import jaxformers as jf
from jaxformers import models, nn, paths, residual

MODELS = (
    "backbones/audio-spectrogram-transformer", "backbones/beit/tiny_cls", "backbones/bert/mlm", "backbones/clip",
    "backbones/deepseek_v3/moe_mla", "backbones/deit", "backbones/distilbert-seqcls", "backbones/electra-generator",
    "backbones/esm/base", "backbones/gpt2", "backbones/gpt_neo", "backbones/gpt_neox", "backbones/gptj",
    "backbones/llama/gqa_tied_llama3rope", "backbones/mpnet", "backbones/opt", "backbones/roberta/seqcls",
    "backbones/swin", "backbones/t5-v1_1", "backbones/vision_encoder_decoder/vit_trocr", "backbones/vit",
    "backbones/vit_mae/tiny", "mixed/clip-text-projection", "mixed/clip-vision-projection", "mixed/llava-gpt2",
    "variants/bigcode-tokens", "variants/deberta-v2-conv", "variants/deberta-v3-mlm", "variants/opt-postnorm",
    "variants/wav2vec2-ctc-stable", "variants/wav2vec2-ctc", "vision/beit-mim", "vision/registers-swiglu",
    "vision/segformer-maps",
)  # fmt: skip
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiled once, run twice


def inputs_of(model, folder):
    """The model's inputs among an oracle's arrays, those of the first case where there are several."""
    file = next(f for f in (folder / "io.npz", folder / "oracle.npz") if f.is_file())
    found = {}
    with np.load(file) as z:
        for key in z.files:
            *before, name = re.split(r"[/.]", key)
            if not {"out", "grad", "padded", "mask"} & set(before) and name not in found:
                found[name] = z[key]
    known = inspect.signature(type(model).__call__).parameters
    return {name: found[name] for name in known if name in found and "attention_mask" not in name}


def normed(model, path, x):
    """What the norm at ``path`` makes of x, by its formula."""
    norm = model
    for name in path.split("."):
        norm = getattr(norm, name)
    h = np.asarray(x, np.float64)
    if isinstance(norm, nn.LayerNorm):
        h = h - h.mean(-1, keepdims=True)
    h = h / np.sqrt((h**2).mean(-1, keepdims=True) + norm.eps)
    h = h if norm.scale is None else h * np.asarray(norm.scale.get_value())
    return h if getattr(norm, "bias", None) is None else h + np.asarray(norm.bias.get_value())


def same(found, expected):
    """Equal values; what is cut into windows or a grid, in whatever order."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.size == expected.size
    if found.shape != expected.shape:
        found, expected = (np.sort(a.reshape(-1)) for a in (found, expected))
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


def seen_once(model, reader):
    """Experts see the tokens that chose them; DeBERTa's query and key may see a table of positions besides."""
    return ".experts." not in reader and not (hasattr(model, "relative") and reader.endswith(("query", "key")))


def check_branches(model, stream, seen):
    """Every block puts out what the roles say it adds to its input; readers see the stream through their norms."""
    layers = f"{stream.path}.layers" if stream.path else "layers"
    for i in range(len({b.path.split(".")[-2] for b in stream.branches})):
        start = x = np.asarray(seen[f"{layers}.{i}.input"], np.float64)
        for branch in (b for b in stream.branches if b.path.startswith(f"{layers}.{i}.")):
            if branch.path.endswith(".conv"):  # DeBERTa's, of the block's input
                written = np.asarray(jax.nn.gelu(seen[f"{branch.path}.output"], approximate=False), np.float64)
                x = normed(model, branch.after, x + written)
                continue
            read = start if branch.parallel else x
            read = read if branch.norm is None else normed(model, branch.norm, read)
            for reader in branch.readers:
                if seen_once(model, reader):
                    same(seen[f"{reader}.input"], read)
            if len(branch.writers) > 1 or seen[f"{branch.writers[0]}.output"].shape != x.shape:
                return  # experts, windows: what they write is not the sum of outputs
            written = np.asarray(seen[f"{branch.writers[0]}.output"], np.float64)
            if branch.scale is not None:
                written = written * np.asarray(paths.flatten(nnx.to_pure_dict(nnx.state(model)))[branch.scale])
            x = x + written if branch.after is None else normed(model, branch.after, x + written)
        same(seen[f"{layers}.{i}.output"], x)


def new_order(model, stream):
    """A permutation of the width; of wav2vec 2.0, whose first convolution has groups, one of its groups."""
    groups = model.embeddings.position.groups if stream.entries[-1].endswith(".masked") else stream.width
    shuffled = np.random.default_rng(0).permutation(groups)
    return np.arange(stream.width).reshape(groups, -1)[shuffled].reshape(-1)


def permuted(model, stream, params, order):
    """``params`` with the stream's coordinates in another ``order``, on every axis that has them."""
    flat = paths.flatten(params)
    for axis in residual.axes(model, stream):
        index = np.concatenate([order + i * stream.width for i in range(axis.copies)])
        flat[axis.path] = np.take(np.asarray(flat[axis.path]), index, axis.axis)
    return paths.unflatten(flat)


@pytest.mark.parametrize("name", MODELS)
def test_the_roles_are_what_the_model_does(name, oracles):
    model = jf.load(oracles / name)
    batch = inputs_of(model, oracles / name)
    apply, params = jf.functional(model)
    found = residual.streams(model)
    assert found
    branches = [b for s in found for b in s.branches]
    reads = [f"{r}.input" for b in branches for r in b.readers if seen_once(model, r)]
    writes = [f"{w}.output" for b in branches for w in b.writers if ".experts." not in w]
    reaped = jf.reap(apply, ["**.layers.*.{input,output}", *reads, *writes])
    run = jax.jit(reaped, compiler_options=FAST if jax.default_backend() == "cpu" else None)
    out, seen = run(params, batch)
    for stream in found:
        check_branches(model, stream, seen)
    # any order of the width's coordinates is as good: the model does not change when all axes of it are turned alike
    turned, order, tables = params, {}, {}
    for stream in found:
        first = tables.setdefault(stream.table or stream.path, stream.path)  # T5's two share a table, and so an order
        order[stream.path] = order[first] if first in order else new_order(model, stream)
        before = paths.flatten(turned)
        turned = permuted(model, stream, turned, order[stream.path])
        if first != stream.path:
            table = f"{stream.table}.embedding"
            turned = paths.unflatten(paths.flatten(turned) | {table: before[table]})
    again, _ = run(turned, batch)
    if out.logits is not None:
        same(again.logits, out.logits)
    elif "" in order:
        same(again.last_hidden_state, np.asarray(out.last_hidden_state)[..., order[""]])
    else:
        same(again.extra["image_embeds"], out.extra["image_embeds"])


def test_every_architecture_is_among_them(oracles):
    types = {jf.hub.read_config(oracles / name)["model_type"] for name in MODELS}
    covered = {models.architecture(t).Model for t in (*types, "trocr", "gin")}  # the last is in a pair, or see below
    assert covered >= {models.architecture(t).Model for t in models.ARCHITECTURES}


def test_a_graph_network_has_no_residual_stream(oracles):
    assert residual.streams(jf.hub.outline(oracles / "backbones/gin/gin").model) == ()


def test_what_is_not_known_is_refused(oracles):
    model = jf.hub.outline(oracles / "backbones/vit").model
    model.layers[1].mlp.side = nn.Linear(4, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="layers.1.mlp.side has weights, but its part"):
        residual.streams(model)
    maps = jf.hub.outline(oracles / "vision/beit-maps").model
    with pytest.raises(ValueError, match="head reads the residual stream of the model by more than linear maps"):
        residual.axes(maps, residual.streams(maps)[0])
