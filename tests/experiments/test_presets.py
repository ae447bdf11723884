"""The `paper` presets: they can be chosen, and their sizes fit the models of the papers, without any weights."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxformers as jf
from experiments import common, gptq, linktransformer, minilm, rmsnorm, star
from jaxformers import nn
from jaxformers.compress.minilm import check_models, minilm_objective, v1, v2
from jaxformers.compress.minilm_distil import StudentConfig, student_model
from jaxformers.models import bert, opt
from jaxformers.models import roberta as roberta_file
from jaxformers.pretrain.star import POOLS, star_objective
from jaxformers.tasks.linktransformer_train import LinkTrainingArgs, group_objective
from jaxformers.train import make_optimizer

KEY = jax.random.key(0)


def abstract(config, head=None, pooling=None):
    """A model without arrays."""

    def build():
        model = jf.init(config, head=head, key=KEY)
        if pooling is not None:
            kind, act = POOLS[pooling]
            nn.new_sentence_head(model, pooling=kind, out=config.hidden_size, act=act, rngs=nnx.Rngs(0))
        return model

    return jf.surgery.named(nnx.eval_shape(build))


def texts(*shape):
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    return {"input_ids": ids, "attention_mask": ids}


def roberta(layers, width, heads, vocab=50265):
    return roberta_file.Config.from_hf({
        "model_type": "roberta", "vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": 4 * width, "max_position_embeddings": 514,
        "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5,
    })  # fmt: skip


@pytest.mark.parametrize("experiment", [gptq, linktransformer, minilm, rmsnorm, star])
def test_presets_are_chosen_by_name(experiment):
    assert set(experiment.PRESETS) == {"smoke", "small", "paper"}
    for name in experiment.PRESETS:
        assert common.parse(experiment.PRESETS, [name]) == (name, experiment.PRESETS[name])
    assert common.parse(experiment.PRESETS, ["paper", "--seeds", "7"])[1].seeds == 7


def test_minilm():
    config = minilm.PRESETS["paper"]
    teacher = abstract(bert.Config(30522, 768, 12, 12, 3072, pooler=False))
    size = StudentConfig(config.layers, config.width, None, dropout=config.dropout)
    student = jf.surgery.named(nnx.eval_shape(lambda: student_model(teacher, size, KEY)))
    assert minilm.parameters(student) == 22_565_376  # "22M" in the authors' table, with embeddings
    batch = texts(config.batch, config.length)
    for loss in (v1(), v1(value=0), v2(relation_heads=config.relation_heads)):
        assert check_models(teacher, student, loss) == (12, 6)
        objective, params, _ = minilm_objective(teacher, student, loss)
        out, terms = jax.eval_shape(lambda p, b, k: objective(None, p, b, k), params, batch, KEY)  # noqa: B023
        assert out.shape == () and all(x.shape == () for x in terms.values())


def test_star():
    config = star.PRESETS["paper"]
    model = abstract(roberta(config.layers, 1024, 16), pooling=config.pool)
    apply, params = jf.functional(model)
    assert params["head"]["dense"]["kernel"].shape == (1024, 1024)
    everything = {"model": params, "log_scale": jnp.float32(0)}
    batch = texts(config.authors, config.views, config.length)
    batch["labels"] = jax.ShapeDtypeStruct((config.authors,), jnp.int32)
    objective = star_objective(config.chunk, temperature=config.temperature)
    step = jax.value_and_grad(lambda p, b, k: objective(apply, p, b, k)[0])
    loss, grads = jax.eval_shape(step, everything, batch, KEY)
    assert loss.shape == () and jax.tree.structure(grads) == jax.tree.structure(everything)
    train = star.training(config)
    flat = jf.paths.flatten(everything)
    optimizer = make_optimizer(train.optim, train.steps, flat, {path: path for path in flat})
    state = jax.eval_shape(optimizer.init, flat)
    second_moments = sum(x.size for x in jax.tree.leaves(state))
    assert second_moments < 0.01 * sum(x.size for x in flat.values()), "Adafactor factors them"


def test_linktransformer():
    config = linktransformer.PRESETS["paper"]
    model = abstract(roberta(12, 768, 12, vocab=250002), head="sentence")  # multilingual MPNet is an XLM-R
    apply, params = jf.functional(model)
    args = LinkTrainingArgs(**dataclasses.asdict(config.training))
    labels = jax.ShapeDtypeStruct((args.train_batch_size,), jnp.int32)
    batch = {"inputs": texts(args.train_batch_size, 128), "labels": labels}
    objective = group_objective(args)
    loss = jax.eval_shape(lambda p, b, k: objective(apply, p, b, k)[0], params, batch, KEY)
    assert loss.shape == ()


def test_gptq():
    config = gptq.PRESETS["paper"]
    sizes = opt.Config.from_hf({
        "model_type": "opt", "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072,
        "num_attention_heads": 12, "max_position_embeddings": 2048, "word_embed_proj_dim": 768,
    })  # fmt: skip
    model = abstract(sizes, head="causal_lm")
    apply, params = jf.functional(model)
    assert minilm.parameters(model) == 125_239_296
    out = jax.eval_shape(apply, params, {"input_ids": jax.ShapeDtypeStruct((1, config.length), jnp.int32)})
    assert out.logits.shape == (1, config.length, 50272)
    kernels = [x for path, x in jf.paths.flatten(params["layers"]).items() if path.endswith("kernel")]
    assert kernels and all(kernel.shape[0] % config.group == 0 for kernel in kernels)
    assert len(gptq.ways(config)) == 4
