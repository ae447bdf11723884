"""What composes with what: every ordered pair of compressions, on tiny models; and chains on a trained one.

`docs/compose.md` shows PAIRS as its matrix, and a test below compares the two.
"""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import jaxformers as jf
from jaxformers import losses, weights
from jaxformers.compress import zero_tprune
from jaxformers.compress.fusegpt import FuseConfig, fuse_layers
from jaxformers.compress.minilm import minilm_objective, v2
from jaxformers.compress.x_ecomla import cache_bytes
from jaxformers.compress.zero_tprune_graph import Stage
from jaxformers.data import batches, text
from jaxformers.evaluation import perplexity
from jaxformers.models import llama
from jaxformers.train import OptimConfig, TrainConfig, fit

ROOT = Path(__file__).resolve().parents[2]
KEY = jax.random.key(0)
IDS = np.random.default_rng(0).integers(0, 40, (8, 8))
IMAGES = np.random.default_rng(0).standard_normal((2, 3, 24, 24)).astype(np.float32)
FUSE = FuseConfig(
    rate=None, layers=1, group_size=2, rank=2, lora_rank=2, epochs=1, batch_size=4, influence_sequences=8
)  # fmt: skip


def decoder():
    config = llama.Config(
        vocab_size=40, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96,
        max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    return jf.init(config, head="causal_lm", key=KEY)


def vit():
    config = {
        "model_type": "deit", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 64, "image_size": 24, "patch_size": 4, "num_labels": 5, "initializer_range": 0.3,
    }  # fmt: skip
    return jf.init(config, head="image_classification", key=jax.random.key(1))


def is_image_model(model):
    return not hasattr(model.embeddings, "token")


def logits(model):
    apply, params = jf.functional(model)
    batch = {"pixel_values": IMAGES} if is_image_model(model) else {"input_ids": IDS}
    return np.asarray(jax.jit(apply)(params, batch).logits, np.float32)


def kernels(model):
    return [linear.kernel.get_value() for _, linear in jf.surgery.find_linears(model.layers, "**")]


# --- what can be done to a model, and how one sees that it was done -------------------------------------------------


def gptq(model):
    if is_image_model(model):
        return jf.compress.gptq(model, bits=8, method="rtn")
    return jf.compress.gptq(model, IDS, bits=8)


def fusegpt(model):
    return fuse_layers(model, IDS, FUSE, key=KEY).model


def narrower(model, layers):
    """Masks that leave the last 32 units of these layers out."""
    return {"ffn": {f"layers.{i}.mlp": np.arange(n) < n - 32 for i, n in enumerate(widths(model)) if i in layers}}


def compact(model):
    """The first layer's MLP gets narrower than the others'."""
    return jf.compact(model, narrower(model, [0]))


def compact_evenly(model):
    return jf.compact(model, narrower(model, range(len(model.layers))), uniform=True)


def lora(model):
    """Low-rank updates that are not zero."""
    targets = "layers.*.{attention.out,mlp.up}"
    model = weights.add_lora(model, targets, rank=2, key=KEY)
    for i, (_, linear) in enumerate(jf.surgery.find_linears(model, targets)):
        kernel = linear.kernel.get_value()
        noise = 0.05 * jax.random.normal(jax.random.key(i), kernel.b.shape)
        linear.kernel.set_value(dataclasses.replace(kernel, b=noise))
    return model


def prune(model):
    """2 of every 4 inputs stay, and masks keep the zeros."""
    found = jf.compress.prune(model, keep_n=2, m=4)
    return weights.add_masks(found.model, found.masks)


def is_sparse(model):
    """Are half of the entries of an untouched kind of kernel zero?"""
    kernel = model.layers[1].mlp.down.kernel.get_value()
    while isinstance(kernel, weights.LowRank):
        kernel = kernel.base
    zeros = np.asarray(weights.dense(kernel)) == 0
    return 0.5 <= zeros.mean() < 0.8


def x_ecomla(model):
    return jf.compress.upcycle_mla(model, kv_rank=32, query_rank=32, d_n=16, d_r=16)


def widths(model):
    return [block.mlp.up.kernel.get_value().shape[1] for block in model.layers]


def holds(model, kind):
    """Does each kernel of this kind stand, at whatever depth, in some linear of the blocks?"""
    inner = lambda w: (w, *inner(w.base)) if isinstance(w, weights.LowRank | weights.Masked) else (w,)
    return any(isinstance(part, kind) for kernel in kernels(model) for part in inner(kernel))


@dataclasses.dataclass(frozen=True)
class Operation:
    apply: object
    done: object  # model -> bool
    exact: float | None = None  # how far logits may move, relative to their size; None: as far as they do


OPERATIONS = {
    "GPTQ": Operation(gptq, lambda m: holds(m, weights.PackedWeight), 0.05),
    "FuseGPT": Operation(fusegpt, lambda m: len(m.layers) == 2),
    "compact": Operation(compact, lambda m: widths(m)[0] < widths(m)[-1]),
    "compact, uniform": Operation(compact_evenly, lambda m: max(widths(m)) < 96),
    "LoRA": Operation(lora, lambda m: holds(m, weights.LowRank)),
    "prune 2:4": Operation(prune, is_sparse),
    "X-EcoMLA": Operation(x_ecomla, lambda m: hasattr(m.layers[0].attention, "kv_up")),
}

MASKED = "is a Masked"
# (first, then) -> None where it works, else what the error says
PACKED = "is a PackedWeight.*dequantize"
ADAPTED = "is a LowRank.*merge_lora"
NUMBERED = "speaks of layers by number; remove layers first"
PAIRS = {
    ("GPTQ", "GPTQ"): "already quantised.*dequantize it first",
    ("GPTQ", "FuseGPT"): PACKED,
    ("GPTQ", "compact"): PACKED,
    ("GPTQ", "compact, uniform"): PACKED,
    ("GPTQ", "LoRA"): None,
    ("GPTQ", "X-EcoMLA"): None,
    ("FuseGPT", "GPTQ"): None,
    ("FuseGPT", "FuseGPT"): "removing 1 of 2 layers leaves fewer than 2",
    ("FuseGPT", "compact"): None,
    ("FuseGPT", "compact, uniform"): None,
    ("FuseGPT", "LoRA"): None,
    ("FuseGPT", "X-EcoMLA"): None,
    ("compact", "GPTQ"): None,
    ("compact", "FuseGPT"): "layers 0 and 1 differ in mlp",
    ("compact", "compact"): None,
    ("compact", "compact, uniform"): None,
    ("compact", "LoRA"): None,
    ("compact", "X-EcoMLA"): None,
    ("compact, uniform", "GPTQ"): None,
    ("compact, uniform", "FuseGPT"): None,
    ("compact, uniform", "compact"): None,
    ("compact, uniform", "compact, uniform"): None,
    ("compact, uniform", "LoRA"): None,
    ("compact, uniform", "X-EcoMLA"): None,
    ("LoRA", "GPTQ"): None,
    ("LoRA", "FuseGPT"): ADAPTED,
    ("LoRA", "compact"): ADAPTED,
    ("LoRA", "compact, uniform"): ADAPTED,
    ("LoRA", "LoRA"): None,
    ("LoRA", "X-EcoMLA"): None,
    ("GPTQ", "prune 2:4"): "quantised",
    ("FuseGPT", "prune 2:4"): None,
    ("compact", "prune 2:4"): None,
    ("compact, uniform", "prune 2:4"): None,
    ("LoRA", "prune 2:4"): None,
    ("X-EcoMLA", "prune 2:4"): None,
    ("prune 2:4", "GPTQ"): None,
    ("prune 2:4", "FuseGPT"): MASKED,
    ("prune 2:4", "compact"): MASKED,
    ("prune 2:4", "compact, uniform"): MASKED,
    ("prune 2:4", "LoRA"): None,
    ("prune 2:4", "prune 2:4"): None,
    ("prune 2:4", "X-EcoMLA"): None,
    ("X-EcoMLA", "GPTQ"): None,
    ("X-EcoMLA", "FuseGPT"): NUMBERED,
    ("X-EcoMLA", "compact"): None,
    ("X-EcoMLA", "compact, uniform"): None,
    ("X-EcoMLA", "LoRA"): None,
    ("X-EcoMLA", "X-EcoMLA"): "is LatentAttention, no standard attention",
}


@pytest.fixture(scope="module")
def after():
    """name -> the decoder after that operation, made when it is first asked for."""
    made = {"": decoder()}

    def model(name):
        if name not in made:
            made[name] = OPERATIONS[name].apply(made[""])
        return made[name]

    return model


@pytest.mark.parametrize(("first", "then"), PAIRS, ids=lambda name: name.replace(", ", " "))
def test_pairs(first, then, after, tmp_path):
    """The second works on what the first made, both can be seen in the result, and it survives its files; or the second
    says why not, before it computes anything."""
    model, refusal = after(first), PAIRS[first, then]
    operation = OPERATIONS[then]
    if refusal is not None:
        with pytest.raises(ValueError, match=refusal):
            operation.apply(model)
        return
    both = operation.apply(model)
    assert operation.done(both)
    assert OPERATIONS[first].done(both) or (first, then) == ("compact", "compact, uniform")
    out = logits(both)
    assert np.all(np.isfinite(out))
    if operation.exact is not None:
        before = logits(model)
        assert np.abs(out - before).max() < operation.exact * np.abs(before).max()
    jf.save(both, tmp_path)
    again = jf.load(tmp_path)
    assert again.surgery == both.surgery  # so that it can be saved again
    np.testing.assert_array_equal(logits(again), out)


def gpt2():
    """A Pre-LN decoder, with the biases and gains that RMSNorm has to fold away."""
    config = {"model_type": "gpt2", "n_layer": 3, "n_head": 2, "n_embd": 64, "n_inner": 96, "vocab_size": 40,
              "n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
    model = jf.init(config, head="causal_lm", key=KEY)
    for i, (_, module) in enumerate(nnx.iter_modules(model.layers)):
        if type(module).__name__ == "LayerNorm":
            module.bias.set_value(0.1 * jax.random.normal(jax.random.key(i), (64,)))
    return model


NORM_FIRST = {"GPTQ": None, "FuseGPT": NUMBERED, "compact": None, "LoRA": None}
NORM_THEN = {"GPTQ": "PackedWeight", "FuseGPT": None, "compact": None, "LoRA": "LowRank"}


@pytest.mark.parametrize("then", NORM_FIRST)
def test_after_rmsnorm(then, tmp_path):
    """A decoder whose LayerNorms have become RMSNorms."""
    model = jf.compress.convert_norm(gpt2())
    if NORM_FIRST[then] is not None:
        with pytest.raises(ValueError, match=NORM_FIRST[then]):
            OPERATIONS[then].apply(model)
        return
    both = OPERATIONS[then].apply(model)
    assert OPERATIONS[then].done(both) and type(both.layers[0].mlp_norm).__name__ == "RMSNorm"
    jf.save(both, tmp_path)
    np.testing.assert_array_equal(logits(jf.load(tmp_path)), logits(both))


@pytest.mark.parametrize("first", NORM_THEN)
def test_rmsnorm_after(first, tmp_path):
    """The conversion changes no output, whatever came before that it accepts."""
    model = OPERATIONS[first].apply(gpt2())
    if NORM_THEN[first] is not None:
        with pytest.raises(ValueError, match=NORM_THEN[first]):
            jf.compress.convert_norm(model)
        return
    both = jf.compress.convert_norm(model)
    assert OPERATIONS[first].done(both) and type(both.layers[0].mlp_norm).__name__ == "RMSNorm"
    np.testing.assert_allclose(logits(both), logits(model), atol=1e-4)
    jf.save(both, tmp_path)
    np.testing.assert_array_equal(logits(jf.load(tmp_path)), logits(both))


@pytest.mark.parametrize("first", ["GPTQ", "compact", "compact, uniform", "LoRA"])
def test_zero_tprune_after(first):
    """Tokens are pruned when the model runs, whatever its weights are. Packed to 8 bits, a DeiT keeps nearly the tokens
    that it kept before, and answers nearly alike."""
    dense = vit()
    model = OPERATIONS[first].apply(dense)
    schedule = (Stage(1, 4, 0.9, 8), Stage(2, 3, 0.6, 2))
    found = zero_tprune.prune_tokens(model, IMAGES, schedule)
    assert OPERATIONS[first].done(model) and found.tokens.shape[1] < 37
    assert np.all(np.isfinite(found.output.logits))
    if first == "GPTQ":
        before = zero_tprune.prune_tokens(dense, IMAGES, schedule)
        kept = [
            (set(ours), set(theirs))
            for ours, theirs in zip(
                *map(np.ndarray.tolist, map(np.asarray, (found.tokens, before.tokens))), strict=True
            )
        ]
        assert np.mean([len(ours & theirs) / len(ours) for ours, theirs in kept]) > 0.9
        alike = [i for i, (ours, theirs) in enumerate(kept) if ours == theirs]  # where no ranking was that close
        assert alike
        ours, theirs = (np.asarray(m.output.logits)[alike] for m in (found, before))
        np.testing.assert_allclose(ours, theirs, atol=0.05 * np.abs(theirs).max())


def test_image_models_go_back_to_plain_weights():
    """Where a convolution embeds the patches, merging and unpacking leave it alone."""
    adapted, packed = lora(vit()), gptq(vit())
    merged, unpacked = weights.merge_lora(adapted), jf.compress.dequantize(packed)
    for plain, typed in ((merged, adapted), (unpacked, packed)):
        assert not any(weights.is_typed(kernel) for kernel in kernels(plain))
        np.testing.assert_allclose(logits(plain), logits(typed), atol=1e-4)


def test_what_zero_tprune_and_fusegpt_refuse_of_each_other():
    with pytest.raises(ValueError, match="DeiT is no decoder of texts"):
        fusegpt(vit())
    with pytest.raises(ValueError, match="Llama is no ViT"):
        zero_tprune.prune_tokens(decoder(), IMAGES)


@pytest.mark.parametrize("first", ["GPTQ", "FuseGPT", "compact", "compact, uniform", "LoRA"])
def test_minilm_with_a_teacher_after(first, after):
    """The changed model teaches: its relations differ from the dense student's, and the student gets a gradient."""
    student, config = after(""), v2(relation_heads=4, causal=True)
    objective, params, _ = minilm_objective(after(first), student, config)
    batch = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    ours = lambda student: objective(None, {**params, "student": student}, batch, KEY)[0]
    loss, slopes = jax.jit(jax.value_and_grad(ours))(params["student"])
    assert 0 < float(loss) < np.inf
    assert any(np.any(leaf) for leaf in jax.tree.leaves(slopes))


def test_minilm_refuses_a_teacher_with_latent_attention(after):
    with pytest.raises(ValueError, match="teacher: relations compare .* LatentAttention has no key"):
        minilm_objective(after("X-EcoMLA"), after(""), v2(relation_heads=4, causal=True))


# --- chains on a trained model --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(shared):
    """A byte-level OPT of three layers that has learnt WikiText; calibration windows, and test windows."""
    folder, data = shared / "oracles" / "gptq" / "trained_byte_lm", shared / "data" / "wikitext2_small"
    valid, test = (np.frombuffer(text.read_text(data / f"{n}.txt.gz").encode(), np.uint8) for n in ("valid", "test"))
    calibration = text.random_windows(valid.astype(np.int32), 32, 64, seed=0)
    return jf.load(folder), calibration, valid.astype(np.int32), text.windows(test.astype(np.int32), 64)[::40]


def test_fused_then_quantised(trained, tmp_path):
    """FuseGPT wins back some of what the removal cost, and 4-bit GPTQ after it costs next to nothing."""
    model, calibration, _, test = trained
    ranks = {"rank": 8, "lora_rank": 8, "group_size": 4, "learning_rate": 1e-3}
    config = dataclasses.replace(FUSE, epochs=4, batch_size=8, influence_sequences=32, **ranks)
    fused = fuse_layers(model, calibration, config, key=KEY, evaluation=test)
    removed = perplexity(jf.compress.remove_layers(model, fused.victims), test, 64)
    packed = jf.compress.gptq(fused.model, calibration, bits=4, group_size=32)
    after = perplexity(packed, test, 64)
    assert fused.perplexity_before < fused.perplexity_after < removed
    assert after < 1.02 * fused.perplexity_after
    jf.save(packed, tmp_path)
    assert perplexity(jf.load(tmp_path), test, 64) == pytest.approx(after, rel=1e-6)


def test_low_rank_updates_over_two_bits_then_merged(trained, tmp_path):
    """QLoRA: updates trained over frozen 2-bit weights win back some of what rounding cost; merged, they are a plain
    model that says the same."""
    model, calibration, ids, test = trained
    packed = jf.compress.gptq(model, calibration, bits=2, group_size=32)
    adapted = weights.add_lora(packed, "layers.**", rank=8, alpha=16, key=KEY)
    settings = TrainConfig(steps=60, optim=OptimConfig(learning_rate=2e-3, schedule="cosine"), progress=False)

    def next_token(apply, params, batch, key):
        return losses.cross_entropy(apply(params, batch, rngs=key).logits[:, :-1], batch["input_ids"][:, 1:]), {}

    tuned = fit(next_token, adapted, batches.token_batches(ids, 64, 8, seed=0), settings, key=KEY).model
    words = lambda m: [k.base.qweight for k in kernels(m) if isinstance(k, weights.LowRank)]
    assert all(map(np.array_equal, words(tuned), words(adapted))) and len(words(tuned)) == 18
    merged = weights.merge_lora(tuned)
    assert not any(weights.is_typed(kernel) for kernel in kernels(merged))
    dense, rounded, ours = (perplexity(m, test, 64) for m in (model, packed, merged))
    assert dense < ours < rounded
    assert perplexity(tuned, test, 64) == pytest.approx(ours, rel=1e-4)
    jf.save(merged, tmp_path)
    assert perplexity(jf.load(tmp_path), test, 64) == pytest.approx(ours, rel=1e-6)


def test_latent_attention_with_packed_projections_decodes(after):
    """X-EcoMLA, its projections in 8 bits: decoding by the latent cache says what whole passes say, and the cache is
    smaller than the source's."""
    model = OPERATIONS["GPTQ"].apply(after("X-EcoMLA"))
    packed = [
        p
        for p, m in jf.surgery.find_linears(model.layers, "*.attention.*")
        if isinstance(m.kernel.get_value(), weights.PackedWeight)
    ]
    assert len(packed) >= 6
    assert cache_bytes(model) < cache_bytes(after(""))
    apply, params = jf.functional(model)
    run = jax.jit(lambda params, ids, cache: apply(params, {"input_ids": ids, "cache": cache}))
    cache, steps = model.empty_cache(len(IDS), 8), []
    for i in range(8):
        out = run(params, IDS[:, i : i + 1], cache)
        cache = out.cache
        steps.append(out.logits[:, 0])
    np.testing.assert_allclose(np.stack(steps, 1), logits(model), atol=2e-4)


# --- the page -------------------------------------------------------------------------------------------------------


def test_the_page_shows_these_pairs():
    """docs/compose.md: its matrix is PAIRS, and every test that it names exists."""
    page = (ROOT / "docs" / "compose.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    head = next(i for i, row in enumerate(rows) if row[0] == "first ↓, then →")
    columns = rows[head][1:]
    shown = {}
    for row in rows[head + 2 :]:
        if row[0] not in OPERATIONS:
            break
        shown |= {(row[0], then): cell for then, cell in zip(columns, row[1:], strict=True)}
    assert shown.keys() == PAIRS.keys()
    for pair, cell in shown.items():
        assert cell.split()[0] == ("yes" if PAIRS[pair] is None else "no"), pair
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 10
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M), f"{file}::{name}"
