"""Audio Spectrogram Transformer (arXiv 2104.01778): a DeiT over overlapping patches of a log-mel spectrogram."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformers import nn, surgery
from jaxformers.models import config as configs
from jaxformers.models import vit
from jaxformers.models.keymap import HF


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of an AST. A spectrogram has ``max_length`` frames of ``num_mel_bins``, patches lie
    ``frequency_stride`` bins and ``time_stride`` frames apart."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    patch_size: int = 16
    qkv_bias: bool = True
    frequency_stride: int = 10
    time_stride: int = 10
    max_length: int = 1024
    num_mel_bins: int = 128
    num_labels: int = 2
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    def __post_init__(self) -> None:
        if min(self.patch_size, self.frequency_stride, self.time_stride) < 1 or min(self.grid) < 1:
            raise ValueError(
                f"config.json: max_length {self.max_length} and num_mel_bins {self.num_mel_bins} hold no patch of "
                f"{self.patch_size} × {self.patch_size}"
            )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        return configs.from_hf(cls, hf, {})

    def to_hf(self) -> dict[str, Any]:
        return configs.to_hf(self, {}, "audio-spectrogram-transformer")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along frequency and along time; the sequence goes frequency by frequency."""
        fit = lambda size, stride: (size - self.patch_size) // stride + 1
        return fit(self.num_mel_bins, self.frequency_stride), fit(self.max_length, self.time_stride)


class SpectrogramHead(nnx.Module):
    """``classifier(norm(h))``."""

    def __init__(self, width: int, labels: int, *, eps: float, std: float, rngs: nnx.Rngs):
        self.path = ""
        self.norm = nn.LayerNorm(width, eps=eps)
        self.classifier = nn.Linear(width, labels, std=std, rngs=rngs)

    def __call__(self, h: Float[Array, "batch width"]) -> Float[Array, "batch labels"]:
        return self.classifier(self.norm(h))


class AudioSpectrogramTransformer(nnx.Module):
    """``embeddings`` → ``layers`` → ``final_norm`` → ``head``. Head: audio_classification.

    ``pooled`` is the mean of the class and the distillation token, which the head reads.
    """

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, width, std = config, config.hidden_size, config.initializer_range
        self.embeddings = nn.ImageEmbeddings(
            width,
            grid=c.grid,
            patch=(c.patch_size, c.patch_size),
            stride=(c.frequency_stride, c.time_stride),
            channels=1,
            distillation=True,
            rate=c.hidden_dropout_prob,
            std=std,
            rngs=rngs,
        )
        self.layers = nn.Layers([vit.block(c, rngs) for _ in range(c.num_hidden_layers)])
        self.final_norm = nn.LayerNorm(width, eps=c.layer_norm_eps)
        self.head = nnx.data(None)
        if head == "audio_classification":
            self.head = SpectrogramHead(width, c.num_labels, eps=c.layer_norm_eps, std=std, rngs=rngs)

    def __call__(
        self, input_values: Float[Array, "batch max_length mels"], *, rngs: jax.Array | None = None
    ) -> nn.Output:
        """``input_values``: normalised log-mel spectrograms, of ``jf.load_feature_extractor``.

        Raises ValueError for another number of frames or bins (see :func:`with_length`).
        """
        shape = (self.config.max_length, self.config.num_mel_bins)
        if input_values.ndim != 3 or input_values.shape[1:] != shape:
            raise ValueError(f"input_values: expected (batch, {shape[0]}, {shape[1]}), got {tuple(input_values.shape)}")
        embed_key, layers_key = nn.split(rngs, 2)
        x, _ = self.embeddings(input_values.swapaxes(1, 2)[:, None], key=embed_key)
        h, _ = self.layers(x, key=layers_key)
        h = self.final_norm(h)
        pooled = (h[:, 0] + h[:, 1]) / 2
        return nn.Output(h, logits=None if self.head is None else self.head(pooled), pooled=pooled)


def with_length(model: AudioSpectrogramTransformer, max_length: int, *, positions: str = "fit") -> Any:
    """A copy of ``model`` for spectrograms of ``max_length`` frames.

    ``positions``: "fit" takes the middle of the position table along time where it is longer, and stretches it
    bilinearly where it is shorter (the AST's authors, arXiv 2104.01778, section 2.2); "zero" starts from zeros, special
    tokens included, as Hugging Face does when it ignores sizes that do not match. Raises ValueError for another word,
    or a length without a patch.
    """
    if positions not in ("fit", "zero"):
        raise ValueError(f"positions: expected 'fit' or 'zero', got {positions!r}")
    model, old = surgery.copy(model), model.config
    model.config = dataclasses.replace(old, max_length=max_length)
    model.embeddings.grid = model.config.grid
    table = model.embeddings.position.embedding.get_value()
    (rows, columns), (_, new) = old.grid, model.config.grid
    special, patches = table[:2], table[2:].reshape(rows, columns, -1)
    if new <= columns:
        start = columns // 2 - new // 2
        patches = patches[:, start : start + new]
    else:
        patches = nn.resize(patches, (rows, new), "bilinear")
    table = jnp.concatenate([special, patches.reshape(rows * new, -1)])
    model.embeddings.position.embedding.set_value(table if positions == "fit" else jnp.zeros_like(table))
    return model


Model = AudioSpectrogramTransformer
PREFIX = "audio_spectrogram_transformer"
KEYS = {name: entry for name, entry in vit.KEYS.items() if name not in ("embeddings.mask_token", "pooler")}
KEYS["embeddings.distillation_token"] = HF("embeddings.distillation_token", ones=2)
HEADS = {
    "audio_classification": (
        "ASTForAudioClassification",
        {"head.norm": "classifier.layernorm", "head.classifier": "classifier.dense"},
    ),
}
BASE_CLASS = "ASTModel"
IGNORED = ()
