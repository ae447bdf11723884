"""LLaVA (arXiv 2304.08485, 2310.03744): a decoder that reads images as tokens.

A vision tower's states of one layer (or several, side by side) pass through a projector, and stand where the prompt has
image tokens, one for each. Tower and decoder are architectures of the library, as ``vision_config`` and ``text_config``
name them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxformers import models, nn, sites
from jaxformers.models import clip_vision, llama
from jaxformers.models import config as configs
from jaxformers.models.keymap import HF, body_keys, nested, nested_ignored

TOWER = clip_vision.Config(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, projection_dim=768,
    image_size=(336, 336), patch_size=(14, 14),
)  # fmt: skip
STRATEGIES = ("default", "full")


@dataclasses.dataclass(frozen=True)
class Config:
    """The parts' configs and what joins them.

    ``vision_feature_layer``: which of the tower's states the projector reads, 0 the embeddings, −1 the last; several
    are put side by side. ``vision_feature_select_strategy``: ``default`` leaves out the class token, ``full`` keeps it.
    """

    vision: Any = TOWER
    text: Any = llama.Config()
    image_token_index: int = 32000
    image_seq_length: int = 576
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    vision_feature_layer: tuple[int, ...] | int = -2
    vision_feature_select_strategy: str = "default"
    tie_word_embeddings: bool = False
    hf: str = dataclasses.field(default="{}", repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.vision_feature_select_strategy not in STRATEGIES:
            raise ValueError(
                f"config.json: vision_feature_select_strategy must be one of {', '.join(STRATEGIES)}, got "
                f"{self.vision_feature_select_strategy!r}"
            )
        states = self.vision.num_hidden_layers + 1
        for layer in self.feature_layers:
            if not isinstance(layer, int) or not -states <= layer < states:
                raise ValueError(
                    f"config.json: vision_feature_layer: expected numbers from {-states} to {states - 1}, got {layer!r}"
                )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        parts = {"vision": TOWER, "text": llama.Config()}
        for name, kind in (("vision", "clip_vision_model"), ("text", "llama")):
            section = configs.section(hf, f"{name}_config")
            if section:
                parts[name] = models.architecture(section.get("model_type") or kind).Config.from_hf(section)
        vision, text = parts["vision"], parts["text"]
        if not models.reads_images(vision) or not hasattr(vision, "num_hidden_layers"):
            raise ValueError(f"config.json: vision_config: this {_name(vision)} is no tower of layers over images")
        if not models.decodes(text):
            raise ValueError(f"config.json: text_config: this {_name(text)} is no decoder of texts")
        layer = hf.get("vision_feature_layer", -2)
        layer = tuple(layer) if isinstance(layer, list) else layer
        # writers of today say in text_config alone that the output is tied to the token embeddings
        tied = bool(hf.get("tie_word_embeddings")) or text.tie_word_embeddings
        return configs.from_hf(cls, hf, {}, **parts, vision_feature_layer=layer, tie_word_embeddings=tied)

    def to_hf(self) -> dict[str, Any]:
        hf = configs.to_hf(self, {}, "llava", skip=("vision", "text"))
        return {**hf, "vision_config": self.vision.to_hf(), "text_config": self.text.to_hf()}

    @property
    def feature_layers(self) -> tuple[int, ...]:
        layer = self.vision_feature_layer
        return layer if isinstance(layer, tuple) else (layer,)

    @property
    def hidden_size(self) -> int:
        return self.text.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @property
    def max_position_embeddings(self) -> int | None:
        return getattr(self.text, "max_position_embeddings", None)


def _name(config: Any) -> str:
    return models.module_of(config).Model.__name__


class Projector(nnx.Module):
    """``down(act(up(h)))``: from the tower's width to the decoder's. Site ``hidden``."""

    def __init__(self, width: int, out: int, *, act: str, bias: bool, std: float, rngs: nnx.Rngs):
        self.path = ""
        self.act = act
        self.up = nn.Linear(width, out, bias=bias, std=std, rngs=rngs)
        self.down = nn.Linear(out, out, bias=bias, std=std, rngs=rngs)
        nn.activation(act)

    def __call__(self, h: Float[Array, "*batch width"]) -> Float[Array, "*batch out"]:
        return self.down(sites.site(f"{self.path}.hidden", nn.activation(self.act)(self.up(h))))


class Llava(nnx.Module):
    """``vision`` → ``projector`` → ``text``, a decoder without a head of its own → ``head``. Head: causal_lm."""

    def __init__(self, config: Config, *, head: str | None = None, rngs: nnx.Rngs):
        self.path, self.source, self.surgery = "", None, ()
        self.config, self.head_name = config, head
        c, text, std = config, config.text, config.text.initializer_range
        self.vision = models.module_of(c.vision).Model(c.vision, rngs=rngs)
        self.projector = Projector(
            c.vision.hidden_size * len(c.feature_layers),
            text.hidden_size,
            act=c.projector_hidden_act,
            bias=c.multimodal_projector_bias,
            std=std,
            rngs=rngs,
        )
        self.text = models.module_of(text).Model(text, rngs=rngs)
        self.head = nnx.data(None)
        if head == "causal_lm":
            tied = c.tie_word_embeddings
            self.head = nn.CausalLMHead(text.hidden_size, text.vocab_size, tied=tied, std=std, rngs=rngs)

    def empty_cache(self, batch: int, slots: int) -> nn.Cache:
        """A cache for ``batch`` sequences of up to ``slots`` tokens, in the embeddings' dtype."""
        return self.text.empty_cache(batch, slots)

    def image_features(
        self, pixel_values: Float[Array, "images channels height width"], *, rngs: jax.Array | None = None
    ) -> Float[Array, "images tokens width"]:
        """What the decoder reads of each image: so many vectors, each in the place of an image token."""
        path, depth = self.vision.path, len(self.vision.layers)
        numbers = [layer % (depth + 1) for layer in self.config.feature_layers]  # of the states, 0 the embeddings
        names = [f"{path}.layers.{i - 1}.output" if i else f"{path}.embeddings" for i in numbers]
        _, seen = sites.reap(self.vision, set(names))(pixel_values, rngs=rngs)
        h = jnp.concatenate([seen[name] for name in names], axis=-1)
        return self.projector(h[:, 1:] if self.config.vision_feature_select_strategy == "default" else h)

    def tokens_of_image(self, pixel_values: Any) -> int:
        """How many tokens stand for one of ``pixel_values`` (images, channels, height, width)."""
        image = jax.ShapeDtypeStruct((1, *pixel_values.shape[1:]), jnp.float32)
        return jax.eval_shape(self.image_features, image).shape[1]

    def expand_images(self, prompts: Sequence[Sequence[int]], pixel_values: Any) -> list[list[int]]:
        """``prompts`` (token ids) with as many image tokens as the images need, where they have one for each image, as
        a tokenizer gives them; others stay as they are."""
        token, each = self.config.image_token_index, self.tokens_of_image(pixel_values)
        if sum(list(ids).count(token) for ids in prompts) != len(pixel_values):
            return [list(ids) for ids in prompts]
        return [[i for id in ids for i in [id] * (each if id == token else 1)] for ids in prompts]

    def count_images(self, prompts: Sequence[Sequence[int]], pixel_values: Any) -> list[int]:
        """How many of ``pixel_values`` (images, channels, height, width) belong to each of ``prompts`` (token ids).

        Raises ValueError when a prompt's image tokens are no multiple of what an image needs, or do not match the
        images.
        """
        token, each = self.config.image_token_index, self.tokens_of_image(pixel_values)
        if token == 0:
            raise ValueError("image_token_index: 0 is what prompts are padded with; generation needs another id")
        counts = [list(ids).count(token) for ids in prompts]
        for i, count in enumerate(counts):
            if count % each:
                raise ValueError(
                    f"prompts: item {i} has {count} image tokens ({token}); an image of this size needs {each} of them"
                )
        if sum(counts) != each * len(pixel_values):
            raise ValueError(
                f"pixel_values: {len(pixel_values)} images, but the prompts have the tokens of {sum(counts) // each}"
            )
        return [count // each for count in counts]

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        *,
        pixel_values: Float[Array, "images channels height width"] | None = None,
        image_mask: Int[Array, "images"] | None = None,
        inputs_embeds: jax.Array | None = None,
        cache: nn.Cache | None = None,
        logits_to_keep: int = 0,
        rngs: jax.Array | None = None,
    ) -> nn.Output:
        """``pixel_values`` holds all images of the batch, in the order of their tokens, row after row; where
        ``image_mask`` is 0 it holds padding, which has no tokens.

        ``extra["image_hidden_states"]`` (images, tokens, width) is what stands for them. Raises ValueError when image
        tokens and images do not match; under jit, where the ids are not known, the result is NaN then.
        """
        vision_key, text_key, head_key = nn.split(rngs, 3)
        extra = None
        if pixel_values is not None:
            if input_ids is None or inputs_embeds is not None:
                raise ValueError("pixel_values: images stand where input_ids has image tokens; give input_ids alone")
            features = self.image_features(pixel_values, rngs=vision_key)
            tokens = self.text.embeddings.token(input_ids)
            inputs_embeds = spliced(tokens, input_ids == self.config.image_token_index, features, image_mask)
            extra = {"image_hidden_states": features}
        ids = input_ids if inputs_embeds is None else None
        out = self.text(
            ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, cache=cache, rngs=text_key
        )  # fmt: skip
        h = out.last_hidden_state
        if self.head_name == "causal_lm":
            logits = self.head(h[:, -logits_to_keep:], self.text.embeddings.token)
            return nn.Output(h, logits=logits, cache=out.cache, extra=extra)
        if self.head_name == "sentence":
            return nn.Output(h, pooled=self.head(h, attention_mask), cache=out.cache, extra=extra)
        return nn.Output(h, cache=out.cache, extra=extra)


def spliced(
    tokens: Float[Array, "batch length width"],
    where: Bool[Array, "batch length"],
    features: Float[Array, "images each width"],
    image_mask: Int[Array, "images"] | None = None,
) -> Float[Array, "batch length width"]:
    """``tokens`` with the rows of ``features``, in order, at the places that ``where`` marks.

    Raises ValueError when their numbers differ; where they are not known yet (under jit), NaN stands there then.
    """
    images, each, width = features.shape
    if image_mask is not None:
        features = features[jnp.argsort(image_mask == 0, stable=True)]  # padding last
        images = (image_mask != 0).sum()
    count = where.sum()
    if not any(isinstance(n, jax.core.Tracer) for n in (count, images)) and count != images * each:
        raise ValueError(
            f"pixel_values: {images} images of {each} tokens each need {images * each} image tokens, input_ids has "
            f"{count}"
        )
    rows = features.reshape(-1, width).astype(tokens.dtype)
    rows = jnp.where(count == images * each, rows, jnp.nan)
    order = jnp.cumsum(where.reshape(-1)).reshape(where.shape) - 1  # how many image tokens come before
    return jnp.where(where[..., None], jnp.take(rows, order, axis=0, mode="clip"), tokens)


def keys(config: Config) -> dict[str, HF]:
    """The tables of tower and decoder, under the names that Hugging Face writes."""
    vision, text = (body_keys(models.module_of(part), part) for part in (config.vision, config.text))
    return {**nested(vision, "vision", "vision_tower"), **nested(text, "text", "language_model.model")}


def ignored(config: Config) -> tuple[str, ...]:
    """What tower and decoder ignore."""
    vision, text = (models.module_of(part) for part in (config.vision, config.text))
    names = (vision, config.vision, "vision_tower"), (text, config.text, "language_model.model")
    return tuple(pattern for part in names for pattern in nested_ignored(*part))


def settle(config: Config, tensors: Mapping[str, Any]) -> Config:
    """The config with what only the checkpoint's ``tensors`` tell: whether the tower has a pooler."""
    return dataclasses.replace(config, vision=configs.without_pooler(config.vision, tensors, "vision_tower.pooler."))


Model = Llava
PREFIX = ""
KEYS = {"projector.up": "multi_modal_projector.linear_1", "projector.down": "multi_modal_projector.linear_2"}
HEADS = {"causal_lm": ("LlavaForConditionalGeneration", {"head.decoder": "language_model.lm_head"})}
BASE_CLASS = "LlavaModel"
IGNORED = ()
RENAMED = (
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(?=(vision_tower|multi_modal_projector|language_model)\.)", ""),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    # the decoder's own prefix, or none at all
    (r"^language_model\.(?:(?:model|transformer|gpt_neox)\.)?(?!lm_head\.)", "language_model.model."),
)
