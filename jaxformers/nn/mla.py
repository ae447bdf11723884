"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, arXiv 2412.19437).

    c_q = norm(W_qd x)                                    query latent (or none: q = W_q x)
    [q_nope | q_rope] = W_qu c_q                          per head
    [c | k_rope] = W_kvd x,   c ← norm(c)                 what is cached: one line for all heads
    [k_nope | v] = W_kvu c                                per head
    score = (q_nope · k_nope + rotate(q_rope) · rotate(k_rope)) · scale,   context = softmax(score) v

Read as above it is *expanded*. With W_kvu = [W_uk | W_uv] per head the same is, *absorbed*,

    score = (W_ukᵀ q_nope · c + rotate(q_rope) · rotate(k_rope)) · scale,   context = W_uv (softmax(score) c)

which is attention of many query heads to a single head whose keys and values are the cached lines.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformers import weights
from jaxformers.kernels import decode
from jaxformers.kernels.mla import mla_decode
from jaxformers.nn.attention import Mask, attend, needs_only_context, visible_slots
from jaxformers.nn.cache import KeyValue, Latent
from jaxformers.nn.dropout import split
from jaxformers.nn.linear import Linear
from jaxformers.nn.norms import RMSNorm
from jaxformers.nn.positions import Rotary, Turns, rotary_table, rotate
from jaxformers.sites import site, wanted

DECODE = ("absorbed", "expanded")


class LatentAttention(nnx.Module):
    """Attention whose keys and values come from a latent of ``rank`` numbers a token.

    ``query_down``, ``query_norm``, ``query_up`` (or ``query`` when ``query_rank`` is None), ``kv_down`` (with outputs
    [latent | rotary key]), ``kv_norm``, ``kv_up`` (per head [key | value]), ``out``. ``nope`` and ``rope`` are the
    sizes of a head's parts without and with rotary positions, ``value_size`` that of its value. ``latent_norm`` False
    leaves both norms out. ``bias``: of the down projections and of ``out``. ``rotary``: how this layer rotates, where
    it does so otherwise than the model around it.

    ``decode``: ``"absorbed"`` caches the latent and the rotary key, ``rank + rope`` numbers a token, and multiplies
    by W_uk and W_uv on the queries' side; for many new tokens at once (a prompt), and wherever a site of ``kv_up`` is
    read or edited, keys and values are expanded from the same cache, which gives the same result. ``"expanded"`` caches
    every head's keys and values. Sites: those of :class:`jaxformers.nn.Attention`.

    Raises ValueError for an unknown ``decode``.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        query_rank: int | None,
        rank: int,
        nope: int,
        rope: int,
        value_size: int,
        latent_norm: bool = True,
        eps: float = 1e-6,
        bias: bool = False,
        scale: float | None = None,
        interleaved: bool = True,
        rotary: Rotary | None = None,
        decode: str = "absorbed",
        rate: float = 0.0,
        std: float = 0.02,
        rngs: Any,
    ):
        if decode not in DECODE:
            raise ValueError(f"decode: expected one of {', '.join(DECODE)}, got {decode!r}")
        self.path = ""
        self.heads, self.rank, self.nope, self.rope, self.value_size = heads, rank, nope, rope, value_size
        self.scale = (nope + rope) ** -0.5 if scale is None else scale
        self.interleaved = interleaved if rotary is None else rotary.interleaved
        self.rotary, self.decode, self.rate = rotary, decode, rate
        linear = lambda d_in, d_out, bias=False: Linear(d_in, d_out, bias=bias, std=std, rngs=rngs)
        down = query_rank is not None
        self.query = None if down else linear(width, heads * (nope + rope))
        self.query_down = linear(width, query_rank, bias) if down else None
        self.query_norm = RMSNorm(query_rank, eps=eps) if down and latent_norm else None
        self.query_up = linear(query_rank, heads * (nope + rope)) if down else None
        self.kv_down = linear(width, rank + rope, bias)
        self.kv_norm = RMSNorm(rank, eps=eps) if latent_norm else None
        self.kv_up = linear(rank, heads * (nope + value_size))
        self.out = linear(heads * value_size, width, bias)

    def empty_cache(self, batch: int, slots: int, dtype: jnp.dtype) -> KeyValue | Latent:
        """Storage for ``slots`` tokens, as ``decode`` asks for."""
        if self.decode == "absorbed":
            return Latent(jnp.zeros((batch, slots, self.rank + self.rope), dtype))
        sizes = (self.nope + self.rope, self.value_size)
        return KeyValue(*(jnp.zeros((batch, self.heads, slots, size), dtype) for size in sizes))

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        *,
        mask: Mask | None = None,
        bias: jax.Array | None = None,
        rotary: Turns | tuple[jax.Array, jax.Array] | None = None,
        cache: KeyValue | Latent | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "batch length width"], KeyValue | Latent | None]:
        """Attend from ``x`` to itself, or to ``cache`` after writing to it at slot ``mask.start``."""
        batch, length, _ = x.shape
        if self.rotary is not None:
            rotary = rotary_table(self.rotary, rotary.positions)
        q = self._queries(x, rotary)
        line = self._lines(x, rotary)
        (drop,) = split(key, 1)
        settings = {"mask": mask, "bias": bias, "scale": self.scale, "path": self.path, "rate": self.rate, "key": drop}
        if isinstance(cache, Latent):
            cache = cache.write(line, mask.start)
            line = cache.read(x.dtype)
        if isinstance(cache, Latent) and self._absorbs(length):
            context = self._absorbed(q, line, settings)
        else:
            k, v = self._expand(line)
            if isinstance(cache, KeyValue):
                cache = cache.write(k, v, mask.start)
                k, v = cache.read(x.dtype)
            context = attend(q, k, v, **settings)
        context = site(f"{self.path}.context", context)
        return self.out(context.reshape(batch, length, self.heads * self.value_size)), cache

    def _queries(self, x: Array, rotary: Any) -> Float[Array, "batch length heads nope_rope"]:
        if self.query is not None:
            q = self.query(x)
        else:
            latent = self.query_down(x)
            q = self.query_up(latent if self.query_norm is None else self.query_norm(latent))
        q = q.reshape(*x.shape[:2], self.heads, self.nope + self.rope)
        if rotary is None:
            return q
        return jnp.concatenate([q[..., : self.nope], rotate(q[..., self.nope :], rotary, self.interleaved)], axis=-1)

    def _lines(self, x: Array, rotary: Any) -> Float[Array, "batch length rank_rope"]:
        """[latent | rotary key] of each token, as it is cached."""
        line = self.kv_down(x)
        latent, turning = line[..., : self.rank], line[..., self.rank :]
        latent = latent if self.kv_norm is None else self.kv_norm(latent)
        turning = turning if rotary is None else rotate(turning[:, :, None], rotary, self.interleaved)[:, :, 0]
        return jnp.concatenate([latent, turning], axis=-1)

    def _expand(self, line: Float[Array, "batch keys rank_rope"]) -> tuple[Array, Array]:
        """Every head's keys (B, S, H, nope + rope) and values (B, S, H, value size)."""
        kv = self.kv_up(line[..., : self.rank]).reshape(*line.shape[:2], self.heads, self.nope + self.value_size)
        turning = jnp.broadcast_to(line[:, :, None, self.rank :], (*kv.shape[:3], self.rope))
        return jnp.concatenate([kv[..., : self.nope], turning], axis=-1), kv[..., self.nope :]

    def _absorbs(self, length: int) -> bool:
        """Whether the absorbed form takes fewer products per cached token than expanding that token's line.

        It also needs W_kvu as a plain linear map that nobody looks into.
        """
        up, expanded = self.kv_up, self.nope + self.value_size
        plain = up.adapter is None and up.bias is None
        plain = plain and not wanted(f"{up.path}.input") and not wanted(f"{up.path}.output")
        return plain and length * (2 * self.rank + self.rope - expanded) <= self.rank * expanded

    def _absorbed(self, q: Array, line: Array, settings: dict[str, Any]) -> Float[Array, "batch length heads value"]:
        up = weights.dense(self.kv_up.kernel.get_value()).astype(q.dtype)
        up = up.reshape(self.rank, self.heads, self.nope + self.value_size)
        latent_q = jnp.einsum("blhn,rhn->blhr", q[..., : self.nope], up[..., : self.nope])
        slots, bias, mask = line.shape[1], settings["bias"], settings["mask"] or Mask()
        alone = needs_only_context(self.path, self.rate, settings["key"])
        if q.shape[1] == 1 and bias is None and alone and decode.choose(slots) != "xla":
            allowed = visible_slots(mask, len(q), slots)
            latent = mla_decode(latent_q[:, 0], q[:, 0, :, self.nope :], line, scale=self.scale, valid=allowed)[:, None]
            return jnp.einsum("blhr,rhv->blhv", latent, up[..., self.nope :])
        q, line = jnp.concatenate([latent_q, q[..., self.nope :]], axis=-1), line[:, :, None]
        # the whole line serves as value too, so that it is read where it lies; the rotary part is dropped afterwards
        latent = attend(q, line, line, **settings)[..., : self.rank]
        return jnp.einsum("blhr,rhv->blhv", latent, up[..., self.nope :])
