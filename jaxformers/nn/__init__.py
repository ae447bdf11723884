"""Building blocks that every architecture shares."""

from jaxformers.nn.adapter import Adapter, add_adapters
from jaxformers.nn.alignment import EmbeddingAlignment, FeatureFusion, GlobalLocalMixer
from jaxformers.nn.attention import Attention, Mask, attend, causal_mask
from jaxformers.nn.block import Block, Layers, drop_path
from jaxformers.nn.cache import Cache, KeyValue, Latent, WithMemory, advance, new_cache
from jaxformers.nn.conv import Conv
from jaxformers.nn.decoder import NO_CROSS_ATTENTION, decode, empty_cache
from jaxformers.nn.dropout import dropout, split
from jaxformers.nn.embeddings import Embeddings, check_length, padded_positions
from jaxformers.nn.experts import ExpertLinear, Experts, MoE, balance_loss, check_routing, route
from jaxformers.nn.gin import POOLS, GraphBlock, graph_pool
from jaxformers.nn.hard import hard_attention, keep_largest
from jaxformers.nn.heads import (
    CausalLMHead,
    ClassificationHead,
    MaskedLMHead,
    SentenceHead,
    decoder_output,
    encoder_output,
    new_sentence_head,
    span_head,
)
from jaxformers.nn.keys import Keys
from jaxformers.nn.linear import CenteredLinear, Embed, Linear
from jaxformers.nn.mla import LatentAttention
from jaxformers.nn.mlp import MLP, activation
from jaxformers.nn.norms import BatchNorm, CRMSNorm, LayerNorm, Recentre, RMSNorm, follow, followed
from jaxformers.nn.output import Output
from jaxformers.nn.pooling import normalize, pool
from jaxformers.nn.positions import (
    Rotary,
    Turns,
    relative_buckets,
    rotary_from_hf,
    rotary_table,
    rotary_to_hf,
    rotate,
)
from jaxformers.nn.removed import Bias, Identity, NoAttention, NoMLP
from jaxformers.nn.rolling import Rolling
from jaxformers.nn.seq2seq import Memory, memory_cache, memory_context, shift_right
from jaxformers.nn.stages import Stages
from jaxformers.nn.vision import (
    GridBias,
    ImageEmbeddings,
    OverlapEmbeddings,
    drop_path_rates,
    offsets,
    pixel_shuffle,
    resize,
)
from jaxformers.nn.windows import PatchMerging, WindowAttention

__all__ = [
    "hard_attention", "keep_largest",
    "Bias", "Identity", "NoAttention", "NoMLP",
    "CRMSNorm", "CenteredLinear", "Recentre",
    "EmbeddingAlignment", "FeatureFusion", "GlobalLocalMixer",
    "POOLS", "GraphBlock", "followed", "graph_pool",
    "NO_CROSS_ATTENTION",
    "ExpertLinear", "Experts", "Latent", "LatentAttention", "MoE", "balance_loss", "check_routing", "route",
    "Memory", "Rolling", "WithMemory", "memory_cache", "memory_context", "shift_right",
    "BatchNorm", "GridBias", "ImageEmbeddings", "OverlapEmbeddings", "PatchMerging", "Stages", "WindowAttention",
    "drop_path_rates", "follow", "offsets", "pixel_shuffle", "resize",
    "Adapter", "Attention", "Block", "Cache", "CausalLMHead", "ClassificationHead", "Conv", "Embed", "Embeddings",
    "KeyValue", "Keys", "LayerNorm", "Layers", "Linear", "MLP", "Mask", "MaskedLMHead", "Output", "RMSNorm", "Rotary",
    "SentenceHead", "Turns", "activation", "add_adapters", "advance", "attend", "causal_mask", "check_length", "decode",
    "decoder_output", "drop_path", "dropout", "empty_cache", "encoder_output", "new_cache", "new_sentence_head",
    "normalize", "padded_positions", "pool", "relative_buckets", "rotary_from_hf", "rotary_table", "rotary_to_hf",
    "rotate", "span_head", "split",
]  # fmt: skip
