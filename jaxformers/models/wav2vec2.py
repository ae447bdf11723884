"""wav2vec 2.0 (arXiv 2006.11477): convolutions over the waveform, and a transformer over their 20 ms frames."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxformers import nn, sites
from jaxformers.models import config as configs
from jaxformers.models.keymap import HF
from jaxformers.safetensors_file import show
from jaxformers.sites import site

NAMES = {"hidden_dropout_prob": "hidden_dropout", "attention_probs_dropout_prob": "attention_dropout"}
ONLY = {"add_adapter": False, "adapter_attn_dim": None}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and rates of a wav2vec 2.0.

    ``feat_extract_norm``: "group" (a norm over time, after the first convolution) or "layer" (a LayerNorm after each).
    ``do_stable_layer_norm``: pre-norm blocks. ``mask_…``: SpecAugment in training (arXiv 1904.08779), over time and
    over channels: the share that spans would cover without overlap, their length, and how many at least.
    """

    vocab_size: int = 32
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    activation_dropout: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    feat_proj_dropout: float = 0.0
    final_dropout: float = 0.1
    layerdrop: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    feat_extract_norm: str = "group"
    feat_extract_activation: str = "gelu"
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    do_stable_layer_norm: bool = False
    apply_spec_augment: bool = True
    mask_time_prob: float = 0.05
    mask_time_length: int = 10
    mask_time_min_masks: int = 2
    mask_feature_prob: float = 0.0
    mask_feature_length: int = 10
    mask_feature_min_masks: int = 0
    use_weighted_layer_sum: bool = False
    classifier_proj_size: int = 256
    num_labels: int = 2
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.feat_extract_norm not in ("group", "layer"):
            raise ValueError(
                f"config.json: feat_extract_norm must be 'group' or 'layer', got {show(self.feat_extract_norm)}"
            )
        convolutions = (self.conv_dim, self.conv_stride, self.conv_kernel)
        if len({len(values) for values in convolutions}) != 1 or not self.conv_dim or min(map(min, convolutions)) < 1:
            raise ValueError(
                "config.json: conv_dim, conv_stride and conv_kernel must be equally long lists of numbers of 1 or more"
            )
        if min(self.mask_time_length, self.mask_feature_length) < 1:
            raise ValueError("config.json: mask_time_length and mask_feature_length must be 1 or more")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        for name, only in ONLY.items():
            if hf.get(name, only) != only:
                raise ValueError(f"config.json: {name} {show(hf[name])} is not supported, only {only!r}")
        lists = {}
        for name in ("conv_dim", "conv_stride", "conv_kernel"):
            if name in hf:
                if not isinstance(hf[name], list | tuple) or not all(type(n) is int for n in hf[name]):
                    raise ValueError(f"config.json: {name} must be a list of whole numbers, got {show(hf[name])}")
                lists[name] = tuple(hf[name])
        return configs.from_hf(cls, hf, NAMES, **lists)

    def to_hf(self) -> dict[str, Any]:
        hf = configs.to_hf(self, NAMES, "wav2vec2", skip=("conv_dim", "conv_stride", "conv_kernel"))
        return hf | {name: list(getattr(self, name)) for name in ("conv_dim", "conv_stride", "conv_kernel")}

    @property
    def masks(self) -> bool:
        """Whether there is a vector that stands for masked frames."""
        return self.mask_time_prob > 0 or self.mask_feature_prob > 0

    def frames(self, samples: Any) -> Any:
        """Frames that come out of so many ``samples``: a number or an array."""
        for size, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            samples = (samples - size) // stride + 1
        return samples


class TimeNorm(nnx.Module):
    """Each channel of each sequence to mean 0 and variance 1 over its time: a group norm with one channel a group."""

    def __init__(self, width: int, *, eps: float = 1e-5):
        self.path, self.eps = "", eps
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        h = x.astype(jnp.float32)
        h = h - h.mean(axis=1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(axis=1, keepdims=True) + self.eps)
        return (h * self.scale.get_value() + self.bias.get_value()).astype(x.dtype)


class Feature(nnx.Module):
    """``act(norm(conv(x)))``, the norm where there is one."""

    def __init__(self, d_in: int, d_out: int, size: int, stride: int, norm: str | None, c: Config, rngs: nnx.Rngs):
        self.path, self.act = "", c.feat_extract_activation
        std = (2 / (size * d_in)) ** 0.5  # Kaiming's, as Hugging Face draws them
        self.conv = nn.Conv(d_in, d_out, (size,), stride=(stride,), bias=c.conv_bias, std=std, rngs=rngs)
        self.norm = {None: lambda: None, "group": lambda: TimeNorm(d_out), "layer": lambda: nn.LayerNorm(d_out)}[norm]()

    def __call__(self, x: Float[Array, "batch time in"]) -> Float[Array, "batch shorter out"]:
        x = self.conv(x)
        return nn.activation(self.act)(x if self.norm is None else self.norm(x))


class Features(nnx.Module):
    """The convolutions "0", "1", … from the waveform to frames."""

    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.path, self.depth = "", len(c.conv_dim)
        widths = (1, *c.conv_dim)
        for i in range(self.depth):
            norm = "layer" if c.feat_extract_norm == "layer" else ("group" if i == 0 else None)
            layer = Feature(widths[i], widths[i + 1], c.conv_kernel[i], c.conv_stride[i], norm, c, rngs)
            setattr(self, str(i), layer)

    def __call__(self, wave: Float[Array, "batch samples"]) -> Float[Array, "batch frames width"]:
        x = wave[..., None]
        for i in range(self.depth):
            x = getattr(self, str(i))(x)
        return x


class PositionConv(nnx.Module):
    """``act(conv(x))`` with a wide grouped kernel ``magnitude · v / ‖v‖`` (weight normalisation, arXiv 1602.07868).

    ``kernel`` v (size, width / groups, width); ``magnitude`` (size,): one norm a place.
    """

    def __init__(self, width: int, size: int, groups: int, *, act: str, rngs: nnx.Rngs):
        if width % groups:
            raise ValueError(f"config.json: num_conv_pos_embedding_groups {groups} do not divide {width} channels")
        self.path, self.groups, self.act = "", groups, act
        self.kernel = nnx.Param(
            (2 / (size * width)) ** 0.5 * jax.random.normal(rngs.params(), (size, width // groups, width))
        )
        self.magnitude = nnx.Param(jnp.sqrt(jnp.square(self.kernel.get_value()).sum(axis=(1, 2))))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        v = self.kernel.get_value().astype(jnp.float32)
        norm = jnp.sqrt(jnp.square(v).sum(axis=(1, 2), keepdims=True))
        kernel = (v * (self.magnitude.get_value()[:, None, None] / norm)).astype(x.dtype)
        left = kernel.shape[0] // 2
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (1,),
            [(left, kernel.shape[0] - 1 - left)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=self.groups,
        )
        return nn.activation(self.act)(y + self.bias.get_value().astype(y.dtype))


class WaveEmbeddings(nnx.Module):
    """``features`` → ``norm`` → ``project`` → masks → plus ``position`` → ``out_norm`` (post-norm models).

    ``masked`` (width,) stands for masked frames. Site: ``embeddings``.
    """

    def __init__(self, c: Config, rngs: nnx.Rngs):
        width = c.hidden_size
        self.path, self.config = "", c
        self.features = Features(c, rngs)
        self.norm = nn.LayerNorm(c.conv_dim[-1], eps=c.layer_norm_eps)
        self.project = nn.Linear(c.conv_dim[-1], width, std=c.initializer_range, rngs=rngs)
        self.masked = nnx.Param(jax.random.uniform(rngs.params(), (width,))) if c.masks else None
        size, groups = c.num_conv_pos_embeddings, c.num_conv_pos_embedding_groups
        self.position = PositionConv(width, size, groups, act=c.feat_extract_activation, rngs=rngs)
        self.out_norm = None if c.do_stable_layer_norm else nn.LayerNorm(width, eps=c.layer_norm_eps)

    def __call__(
        self,
        wave: Float[Array, "batch samples"],
        lengths: Int[Array, "batch"] | None,
        mask_time_indices: Bool[Array, "batch frames"] | None,
        key: jax.Array | None,
    ) -> tuple[Float[Array, "batch frames width"], Float[Array, "batch frames conv"]]:
        """The input of the layers, and the normalised frames that the convolutions gave."""
        c = self.config
        drop, time_key, feature_key, last = nn.split(key, 4)
        frames = self.norm(self.features(wave.astype(self.project.kernel.get_value().dtype)))
        x = nn.dropout(self.project(frames), c.feat_proj_dropout, drop)
        batch, time, width = x.shape
        if mask_time_indices is None and key is not None and c.apply_spec_augment and c.mask_time_prob > 0:
            settings = (c.mask_time_prob, c.mask_time_length, c.mask_time_min_masks)
            mask_time_indices = spans(time_key, (batch, time), *settings, lengths=lengths)
        if mask_time_indices is not None and c.apply_spec_augment:
            if self.masked is None:
                raise ValueError("mask_time_indices: this model has no vector for masked frames (mask_time_prob is 0)")
            x = jnp.where(mask_time_indices[..., None].astype(bool), self.masked.get_value().astype(x.dtype), x)
        if key is not None and c.apply_spec_augment and c.mask_feature_prob > 0:
            settings = (c.mask_feature_prob, c.mask_feature_length, c.mask_feature_min_masks)
            x = jnp.where(spans(feature_key, (batch, width), *settings)[:, None], 0, x)
        if lengths is not None:  # padding must not reach real frames through the convolution over positions
            x = jnp.where((jnp.arange(time) < lengths[:, None])[..., None], x, 0)
        x = x + self.position(x)
        x = x if self.out_norm is None else self.out_norm(x)
        return site(self.path, nn.dropout(x, c.hidden_dropout_prob, last)), frames


def spans(
    key: jax.Array,
    shape: tuple[int, int],
    prob: float,
    length: int,
    at_least: int = 0,
    *,
    lengths: Int[Array, "batch"] | None = None,
) -> Bool[Array, "batch size"]:
    """SpecAugment's mask (arXiv 1904.08779): in each row, spans of ``length`` at starts drawn without replacement.

    A row of L places (``lengths``, or all of ``shape``) gets ⌊prob · L / length + u⌋ spans, u uniform in [0, 1) and the
    same for all rows, but ``at_least`` so many, as far as they fit. Spans may overlap. Raises ValueError for spans that
    are longer than the rows.
    """
    batch, size = shape
    if length > size:
        raise ValueError(f"mask length {length}: longer than the {size} places that there are")
    u_key, start_key = jax.random.split(key)
    lengths = jnp.full(batch, size) if lengths is None else lengths
    count = jnp.floor(prob * lengths / length + jax.random.uniform(u_key)).astype(jnp.int32)
    starts = jnp.maximum(lengths - (length - 1), 0)  # places where a span may start
    count = jnp.minimum(jnp.minimum(jnp.maximum(count, at_least), size // length), starts)
    lottery = jnp.where(jnp.arange(size) < starts[:, None], jax.random.uniform(start_key, shape), 2.0)
    rank = jnp.argsort(jnp.argsort(lottery, axis=1), axis=1)
    started = jnp.cumsum(rank < count[:, None], axis=1)
    before = jnp.pad(started, ((0, 0), (length, 0)))[:, :size]  # spans that have ended
    return started > before


class WaveHead(nnx.Module):
    """``classifier`` of each frame, or of the frames' mean after ``project``; of the last layer or a sum of all.

    ``layer_weights`` (layers + 1,): the weights of that sum before their softmax, where it is asked for.
    """

    def __init__(self, c: Config, *, pooled: bool, rngs: nnx.Rngs):
        width, std = c.hidden_size, c.initializer_range
        self.path = ""
        n = c.num_hidden_layers + 1
        self.layer_weights = nnx.Param(jnp.full(n, 1 / n)) if c.use_weighted_layer_sum else None
        self.project = nn.Linear(width, c.classifier_proj_size, std=std, rngs=rngs) if pooled else None
        self.classifier = nn.Linear(c.classifier_proj_size if pooled else width, c.num_labels, std=std, rngs=rngs)

    def __call__(self, h: Array, every: Array | None, mask: Bool[Array, "batch frames"] | None) -> Array:
        if self.layer_weights is not None:
            share = jax.nn.softmax(self.layer_weights.get_value().astype(jnp.float32))
            h = jnp.einsum("n,nbtd->btd", share, every, precision="highest").astype(h.dtype)
        if self.project is not None:
            h = nn.pool(self.project(h), mask, "mean")
        return self.classifier(h)


class Wav2Vec2(nnx.Module):
    """``embeddings`` → ``layers`` → ``final_norm`` (pre-norm) → ``head``.

    Heads: ctc (logits (B, frames, vocab); the blank is ``pad_token_id``, see ``optax.ctc_loss``),
    sequence_classification, frame_classification.
    """

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, width = config, config.hidden_size
        self.embeddings = WaveEmbeddings(c, rngs)
        self.layers = nn.Layers([_block(c, rngs) for _ in range(c.num_hidden_layers)])
        self.final_norm = nn.LayerNorm(width, eps=c.layer_norm_eps) if c.do_stable_layer_norm else nnx.data(None)
        self.head = nnx.data(None)
        if head == "ctc":
            std, rate = c.initializer_range, c.final_dropout
            self.head = nn.ClassificationHead(width, c.vocab_size, rate=rate, std=std, rngs=rngs)
        elif head in ("sequence_classification", "frame_classification"):
            self.head = WaveHead(c, pooled=head == "sequence_classification", rngs=rngs)

    def __call__(
        self,
        input_values: Float[Array, "batch samples"],
        attention_mask: Int[Array, "batch samples"] | None = None,
        mask_time_indices: Bool[Array, "batch frames"] | None = None,
        *,
        rngs: jax.Array | None = None,
    ) -> nn.Output:
        """``input_values``: waveforms, padded on the right, of ``jf.load_feature_extractor``.

        Models with ``feat_extract_norm`` "group" were trained without ``attention_mask``. ``extra``:
        ``extract_features`` (B, frames, conv width), and with a mask ``frame_mask`` (B, frames), True where real.
        Raises ValueError for waveforms of another shape, or too short for a frame.
        """
        c = self.config
        if input_values.ndim != 2 or c.frames(input_values.shape[1]) < 1:
            raise ValueError(
                f"input_values: expected (batch, samples) with samples for a frame, got {tuple(input_values.shape)}"
            )
        embed_key, layers_key, head_key = nn.split(rngs, 3)
        lengths = None if attention_mask is None else c.frames(attention_mask.astype(jnp.int32).sum(axis=1))
        x, frames = self.embeddings(input_values, lengths, mask_time_indices, embed_key)
        real = None if lengths is None else jnp.arange(x.shape[1]) < lengths[:, None]
        run, every = lambda x: self.layers(x, mask=nn.Mask(valid=real), key=layers_key)[0], None
        if getattr(self.head, "layer_weights", None) is not None:
            h, seen = sites.reap(run, f"{self.layers.path}.*.output")(x)
            every = jnp.stack([x, *(seen[f"{self.layers.path}.{i}.output"] for i in range(len(self.layers)))])
        else:
            h = run(x)
        h = h if self.final_norm is None else self.final_norm(h)
        extra = {"extract_features": frames} | ({} if real is None else {"frame_mask": real})
        if self.head is None:
            return nn.Output(h, extra=extra)
        logits = self.head(h, head_key) if self.head_name == "ctc" else self.head(h, every, real)
        return nn.Output(h, logits=logits, extra=extra)


def _block(c: Config, rngs: nnx.Rngs) -> nn.Block:
    width, std = c.hidden_size, c.initializer_range
    rate = c.attention_probs_dropout_prob
    return nn.Block(
        nn.Attention(width, c.num_attention_heads, rate=rate, std=std, rngs=rngs),
        nn.MLP(width, c.intermediate_size, act=c.hidden_act, rate=c.activation_dropout, std=std, rngs=rngs),
        nn.LayerNorm(width, eps=c.layer_norm_eps),
        nn.LayerNorm(width, eps=c.layer_norm_eps),
        prenorm=c.do_stable_layer_norm,
        rate=c.hidden_dropout_prob,
        layer_drop=c.layerdrop,
    )


Model = Wav2Vec2
PREFIX = "wav2vec2"
_POSITION = "encoder.pos_conv_embed.conv"
KEYS = {
    "embeddings.features.{}.conv": "feature_extractor.conv_layers.{}.conv",
    "embeddings.features.{}.norm": "feature_extractor.conv_layers.{}.layer_norm",
    "embeddings.norm": "feature_projection.layer_norm",
    "embeddings.project": "feature_projection.projection",
    "embeddings.masked": "masked_spec_embed",
    "embeddings.position.kernel": f"{_POSITION}.parametrizations.weight.original1",
    "embeddings.position.magnitude": HF(f"{_POSITION}.parametrizations.weight.original0", ones=2),
    "embeddings.position.bias": f"{_POSITION}.bias",
    "layers.{}.attention.query": "encoder.layers.{}.attention.q_proj",
    "layers.{}.attention.key": "encoder.layers.{}.attention.k_proj",
    "layers.{}.attention.value": "encoder.layers.{}.attention.v_proj",
    "layers.{}.attention.out": "encoder.layers.{}.attention.out_proj",
    "layers.{}.attention_norm": "encoder.layers.{}.layer_norm",
    "layers.{}.mlp.up": "encoder.layers.{}.feed_forward.intermediate_dense",
    "layers.{}.mlp.down": "encoder.layers.{}.feed_forward.output_dense",
    "layers.{}.mlp_norm": "encoder.layers.{}.final_layer_norm",
}
RENAMED = (
    (r"pos_conv_embed\.conv\.weight_g", "pos_conv_embed.conv.parametrizations.weight.original0"),
    (r"pos_conv_embed\.conv\.weight_v", "pos_conv_embed.conv.parametrizations.weight.original1"),
)


def keys(config: Config) -> dict[str, str]:
    """The norm that stands before the layers, or behind them."""
    return {"final_norm" if config.do_stable_layer_norm else "embeddings.out_norm": "encoder.layer_norm"}


_WEIGHTS = {"head.layer_weights": "layer_weights"}
HEADS = {
    "ctc": ("Wav2Vec2ForCTC", {"head.classifier": "lm_head"}),
    "sequence_classification": (
        "Wav2Vec2ForSequenceClassification",
        {"head.project": "projector", "head.classifier": "classifier", **_WEIGHTS},
    ),
    "frame_classification": ("Wav2Vec2ForAudioFrameClassification", {"head.classifier": "classifier", **_WEIGHTS}),
}
BASE_CLASS = "Wav2Vec2Model"
IGNORED = ()
