"""MAE (arXiv 2111.06377): a ViT that sees a quarter of the patches, and a small decoder that draws the rest."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformers import nn
from jaxformers.models import config as configs
from jaxformers.models import vit
from jaxformers.models.keymap import HF


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of an MAE. ``mask_ratio``: the share of patches that the encoder does not see.

    ``norm_pix_loss``: what the loss is to be called with, see :func:`jaxformers.image_losses.masked_patches`.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    num_channels: int = 3
    qkv_bias: bool = True
    decoder_num_attention_heads: int = 16
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_intermediate_size: int = 2048
    mask_ratio: float = 0.75
    norm_pix_loss: bool = False
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"config.json: mask_ratio must be 0 or more and less than 1, got {self.mask_ratio}")
        if self.decoder_num_hidden_layers > configs.LIMITS["num_hidden_layers"]:
            raise ValueError(f"config.json: decoder_num_hidden_layers = {self.decoder_num_hidden_layers} is too many")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        sizes = {"image_size": configs.pair(hf, "image_size", 224), "patch_size": configs.pair(hf, "patch_size", 16)}
        return configs.from_hf(cls, hf, {}, **sizes)

    def to_hf(self) -> dict[str, Any]:
        hf = configs.to_hf(self, {}, "vit_mae", skip=("image_size", "patch_size"))
        return configs.put_pairs(hf, self, "image_size", "patch_size")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of ``image_size``."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    def kept(self, patches: int) -> int:
        """How many of so many patches the encoder sees."""
        return int(patches * (1 - self.mask_ratio))


def sinusoids(grid: tuple[int, int], width: int) -> np.ndarray:
    """(1 + patches, width): sines and cosines of the column, then of the row, each at width/4 frequencies.

    The first row, of the class token, is 0. Raises ValueError when ``width`` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"hidden_size, decoder_hidden_size: must be multiples of 4 for sines of two axes, got {width}")
    omega = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (columns, rows)]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    return np.concatenate([np.zeros((1, width)), table]).astype(np.float32)


def choose(noise: Float[Array, "batch patches"], kept: int) -> tuple[Int[Array, "batch kept"], jax.Array, jax.Array]:
    """``(ids, mask, ids_restore)``: the patches of least noise in rising order, 1 where a patch is hidden, and each
    patch's place in the order of all."""
    shuffled = jnp.argsort(noise, axis=1)
    restore = jnp.argsort(shuffled, axis=1)
    return shuffled[:, :kept], (restore >= kept).astype(jnp.float32), restore


class Decoder(nnx.Module):
    """``embed`` → mask tokens in the gaps → positions → ``layers`` → ``norm`` → ``decoder``: each patch's pixels."""

    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.path = ""
        width, std = c.decoder_hidden_size, c.initializer_range
        narrow = dataclasses.replace(
            c,
            hidden_size=width,
            num_attention_heads=c.decoder_num_attention_heads,
            intermediate_size=c.decoder_intermediate_size,
        )
        self.embed = nn.Linear(c.hidden_size, width, std=std, rngs=rngs)
        self.mask_token = nnx.Param(std * jax.random.normal(rngs.params(), (width,)))
        self.position = nn.Embed(1 + c.grid[0] * c.grid[1], width, std=std, rngs=rngs)
        self.position.embedding.set_value(jnp.asarray(sinusoids(c.grid, width)))
        self.layers = nn.Layers([vit.block(narrow, rngs) for _ in range(c.decoder_num_hidden_layers)])
        self.norm = nn.LayerNorm(width, eps=c.layer_norm_eps)
        pixels = c.patch_size[0] * c.patch_size[1] * c.num_channels
        self.decoder = nn.Linear(width, pixels, std=std, rngs=rngs)

    def __call__(
        self, h: Float[Array, "batch kept_1 width"], restore: Int[Array, "batch patches"], key: jax.Array | None
    ) -> Float[Array, "batch patches pixels"]:
        h = self.embed(h)
        hidden = restore.shape[1] + 1 - h.shape[1]
        tokens = jnp.broadcast_to(self.mask_token.get_value().astype(h.dtype), (h.shape[0], hidden, h.shape[2]))
        patches = jnp.concatenate([h[:, 1:], tokens], axis=1)
        patches = jnp.take_along_axis(patches, restore[..., None], axis=1)
        x = jnp.concatenate([h[:, :1], patches], axis=1)
        table = self.position.embedding.get_value()
        if table.shape[0] != x.shape[1]:  # for images of another size, along the sequence, as Hugging Face does it
            stretched = nn.resize(table[None, 1:], (1, restore.shape[1]), "bicubic")[0]
            table = jnp.concatenate([table[:1], stretched])
        x, _ = self.layers(x + jax.lax.stop_gradient(table).astype(x.dtype), key=key)
        return self.decoder(self.norm(x))[:, 1:]


class ViTMAE(nnx.Module):
    """``embeddings`` → the patches that noise has left → ``layers`` → ``final_norm`` → ``head``.

    Head: pretraining (every patch's pixels, (B, patches, patch height · patch width · channels)). Without a head, and
    without noise, it is a ViT over all patches. Positions are fixed sines: they get no gradient.
    """

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, width, std = config, config.hidden_size, config.initializer_range
        self.embeddings = nn.ImageEmbeddings(
            width,
            grid=c.grid,
            patch=c.patch_size,
            channels=c.num_channels,
            fixed_positions=True,
            std=std,
            rngs=rngs,
        )
        self.embeddings.position.embedding.set_value(jnp.asarray(sinusoids(c.grid, width)))
        self.layers = nn.Layers([vit.block(c, rngs) for _ in range(c.num_hidden_layers)])
        self.final_norm = nn.LayerNorm(width, eps=c.layer_norm_eps)
        self.head = Decoder(c, rngs) if head == "pretraining" else nnx.data(None)

    def __call__(
        self,
        pixel_values: Float[Array, "batch channels height width"],
        noise: Float[Array, "batch patches"] | None = None,
        *,
        rngs: jax.Array | None = None,
    ) -> nn.Output:
        """The encoder sees the patches of least ``noise``, in rising order; for pre-training, ``rngs`` draws it where
        it is not given.

        ``extra``: ``mask`` (B, patches), 1 where a patch was hidden, and ``ids_restore`` (B, patches), its place in the
        order of noise. Images of another size than ``image_size`` stretch the position tables.
        Raises ValueError in pre-training when there is neither noise nor a key.
        """
        noise_key, layers_key, head_key = nn.split(rngs, 3)
        x, grid = self.embeddings(pixel_values)
        batch, patches = x.shape[0], grid[0] * grid[1]
        if noise is None and self.head_name == "pretraining":
            if noise_key is None:
                raise ValueError("noise: pre-training hides patches by it; give noise (batch, patches), or rngs")
            noise = jax.random.uniform(noise_key, (batch, patches))
        extra = None
        if noise is not None:
            if noise.shape != (batch, patches):
                raise ValueError(f"noise: expected shape {(batch, patches)}, got {tuple(noise.shape)}")
            kept = self.config.kept(patches)
            if not kept:
                raise ValueError(f"mask_ratio {self.config.mask_ratio} leaves none of {patches} patches")
            ids, mask, restore = choose(jnp.asarray(noise), kept)
            seen = jnp.take_along_axis(x[:, 1:], ids[..., None], axis=1)
            x, extra = jnp.concatenate([x[:, :1], seen], axis=1), {"mask": mask, "ids_restore": restore}
        h, _ = self.layers(x, key=layers_key)
        h = self.final_norm(h)
        if self.head_name == "pretraining":
            return nn.Output(h, logits=self.head(h, extra["ids_restore"], head_key), extra=extra)
        if self.head_name == "sentence":
            return nn.Output(h, pooled=self.head(h, None), extra=extra)
        return nn.Output(h, extra=extra)


Model = ViTMAE
PREFIX = "vit"
KEYS = {ours: name for ours, name in vit.KEYS.items() if ours not in ("pooler", "embeddings.mask_token")}
DECODER = {
    f"head.{ours}": str(name).replace("encoder.layer", "decoder.decoder_layers")
    for ours, name in vit.KEYS.items()
    if ours.startswith("layers.")
}
HEADS = {
    "pretraining": (
        "ViTMAEForPreTraining",
        {
            **DECODER,
            "head.embed": "decoder.decoder_embed",
            "head.mask_token": HF("decoder.mask_token", ones=2),
            "head.position.embedding": HF("decoder.decoder_pos_embed", ones=1),
            "head.norm": "decoder.decoder_norm",
            "head.decoder": "decoder.decoder_pred",
        },
    ),
}
BASE_CLASS = "ViTMAEModel"
IGNORED = ()
RENAMED = ((r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),)  # transformers 5.23 and newer
