"""Checkpoints of families that differ in what gates and cuts meet, inputs for them, and masks of everything."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxformers as jf
from jaxformers import gates

FAMILIES = (
    "bert/seqcls", "electra-generator", "mpnet", "gpt2", "gpt_neox", "llama", "t5-v1_0", "dinov2", "beit/tiny_cls",
)  # fmt: skip


def load(oracles, name):
    """``(model, batch)`` of a family, in float32."""
    folder = oracles / "backbones" / name
    folder = folder if (folder / "config.json").is_file() else next(iter(sorted(folder.glob("*/config.json")))).parent
    model = jf.load(folder, dtype="float32")
    return model, inputs(model)


def inputs(model):
    """Random inputs, padded on the right where there is a mask."""
    random, c = np.random.default_rng(0), model.config
    if hasattr(c, "num_mel_bins"):
        return {"input_values": random.normal(size=(2, c.max_length, c.num_mel_bins)).astype(np.float32)}
    if hasattr(c, "image_size"):
        return {"pixel_values": random.normal(size=(2, 3, *np.broadcast_to(c.image_size, 2))).astype(np.float32)}
    ids = random.integers(5, c.vocab_size, (2, 7))
    mask = np.ones_like(ids)
    mask[-1, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    return {**batch, "decoder_input_ids": ids[:, :4]} if getattr(model, "decoder", None) is not None else batch


def masks(model, *, values=True, hidden=True, seed=0):
    """Random masks of every kind: some units gone, one MLP gone, the heads of one attention gone, other values ≠ 1."""
    random = np.random.default_rng(seed)

    def draw(like):
        if like.ndim == 0:
            return jnp.ones(())
        scale = random.uniform(0.6, 1.4, like.shape) if values else np.ones(like.shape)
        gone = random.random(like.shape) < 0.35
        gone[random.integers(like.size)] = False
        return jnp.asarray(np.where(gone, 0, scale), jnp.float32)

    found = jax.tree.map(draw, gates.ones(model))
    first, *_, last = found["sublayers"]
    found["sublayers"][last] = jnp.zeros(())
    if first in found.get("heads", {}):
        found["heads"][first] = 0 * found["heads"][first]
    return {kind: mask for kind, mask in found.items() if hidden or kind not in ("hidden", "embeddings")}
