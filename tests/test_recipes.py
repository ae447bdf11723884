"""Recipes: chains of compressions from data, resumed between steps, measured after each."""

import json
import shutil

import jax
import numpy as np
import pytest

import jaxformers as jf
from jaxformers import cli, recipe_data, weights
from jaxformers.data.tokenizers import train_bpe, train_wordpiece
from jaxformers.evaluation import accuracy, perplexity, windows_of_file
from jaxformers.models import bert, llama, vit
from jaxformers.recipe_steps import METHODS, Method
from jaxformers.recipes import read_recipe, run_recipe

TEXT = "the first line of a text and a second one, which is longer than the first one was\n" * 40
STEPS = [
    {"method": "fusegpt", "layers": 1, "group_size": 2, "rank": 2, "lora_rank": 2, "epochs": 1, "batch_size": 4,
     "influence_sequences": 8},
    {"method": "gptq", "bits": 4},
]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint with a tokenizer, and a text file."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = train_bpe([TEXT], vocab_size=280)
    config = llama.Config(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32, initializer_range=0.1,
    )  # fmt: skip
    jf.save(jf.init(config, head="causal_lm", key=jax.random.key(0)), folder / "model", tokenizer=tokenizer)
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def done(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    data = {"calibration": source / "text.txt", "evaluation": source / "text.txt", "samples": 8, "length": 16}
    return run_recipe(source / "model", STEPS, out, **data), out, data


def test_what_a_recipe_makes_and_reports(source, done):
    report, out, _ = done
    dense, fused, packed = report.rows
    assert [r.step.split()[:2][-1] for r in report.rows] == ["source", "fusegpt", "gptq"]
    layers = 2 * 3 * 4 * 32 * 32 / 2 + 3 * 3 * 32 * 64  # matrices of three layers
    assert dense.parameters - fused.parameters == pytest.approx(layers / 3 + 2 * 32)
    assert fused.parameters == packed.parameters and packed.bytes < fused.bytes < dense.bytes
    assert fused.macs < dense.macs and packed.macs == fused.macs and min(r.milliseconds for r in report.rows) > 0
    assert len(report.model.layers) == 2
    assert all(
        isinstance(m.kernel.get_value(), weights.PackedWeight)
        for _, m in jf.surgery.find_linears(report.model.layers, "**")
    )
    windows = windows_of_file(report.model, source / "text.txt", 16)
    for row in report.rows:
        model = jf.load(source / "model" if row.directory is None else out / row.directory)
        assert row.quality == pytest.approx(perplexity(model, windows, 16), rel=1e-5)
        assert f"{row.quality:.4g}" in str(report)
    assert (out / "figure.png").stat().st_size > 1000
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    told = json.loads((out / "report.json").read_text())
    assert [r["step"] for r in told["rows"].values()] == [r.step for r in report.rows]


def test_a_killed_run_goes_on_after_the_last_finished_step(source, done, tmp_path, monkeypatch):
    report, out, data = done
    shutil.copytree(out, tmp_path / "out")
    (last,) = (tmp_path / "out").glob("1-gptq-*")
    shutil.rmtree(last)
    calls = []

    def counted(name, fail):
        real = METHODS[name]

        def apply(model, options, data):
            calls.append(name)
            if fail:
                raise KeyboardInterrupt
            return real.apply(model, options, data)

        return Method(real.options, real.check, apply, real.calibrated)

    for fail in (True, False):
        for name in ("fusegpt", "gptq"):
            monkeypatch.setitem(METHODS, name, counted(name, fail))
        if fail:
            with pytest.raises(KeyboardInterrupt):
                run_recipe(source / "model", STEPS, tmp_path / "out", **data)
        else:
            again = run_recipe(source / "model", STEPS, tmp_path / "out", **data)
        monkeypatch.undo()
    assert calls == ["gptq", "gptq"]
    ours, theirs = (jf.functional(r.model)[1] for r in (again, report))
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))
    assert [r.quality for r in again.rows] == [r.quality for r in report.rows]
    names = {p.name for p in (tmp_path / "out").iterdir()}
    other = run_recipe(source / "model", [STEPS[0], {"method": "gptq", "bits": 8}], tmp_path / "out", **data)
    new = {p.name for p in (tmp_path / "out").iterdir()} - names
    assert len(new) == 1 and other.rows[1] == again.rows[1]  # the first step was kept, the second made anew


def test_the_command(source, tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text('[[step]]\nmethod = "gptq"\nscheme = "rtn"\nbits = 8\n')
    argv = ["compress", str(source / "model"), "--recipe", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "o")]
    cli.main(argv)
    assert "0 gptq bits=8" in capsys.readouterr().out
    (tmp_path / "recipe.toml").write_text('[[step]]\nmethod = "gptq"\nbitts = 8\n')
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2 and "bitts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ([], "it has no steps"),
        ([{"bits": 4}], "step 0 names no method; there are .*fusegpt, gptq"),
        ([STEPS[1], {"method": "prune it"}], "step 1 has method 'prune it'; there are .*fusegpt, gptq"),
        ([{"method": "gptq", "bitts": 4}], "step 0: gptq has no option 'bitts'; it takes .*bits, group_size"),
        ([{"method": "gptq", "bits": 5}], "step 0: gptq: bits=5: must be one of"),
        ([{"method": "fusegpt", "rate": "much"}], "step 0: fusegpt: .*not supported between"),
        ([{"method": "fusegpt", "group_size": 3}], "step 0: fusegpt: group_size=3: must be even"),
        ([{"method": "remove_layers", "count": 1, "by": "size"}], "by='size': must be"),
        ([{"method": "prune", "by": "wanda", "keep_n": 5, "m": 4}], "prune: keep_n=5, m=4: of every m"),
        ([{"method": "prune", "sparsity": 1.5}], "prune: sparsity=1.5: must be a share"),
        ([{"method": "upcycle_mla"}], "upcycle_mla: d_n is missing"),
        ([{"method": "vtrans"}], "vtrans: budget is missing"),
        ([{"method": "vtrans", "budget": {"params": 2}}], "vtrans: budget: the share of params"),
        ([{"method": "vtrans", "budget": {"params": 0.5}, "steps": 0}], "vtrans: steps: expected 1"),
        ([{"method": "vtrans", "budget": {"params": 0.5}, "distil": {"tau": 2}}], "distil: no option 'tau'; ce, layer"),
        ([{"method": "vtrans", "budget": {"params": 0.5}, "distil": "yes"}], "distil: expected true, false or a table"),
        ([{"method": "dequantize", "dtype": "float32"}], "dequantize has no option 'dtype'; it takes none"),
    ],
)
def test_recipes_that_cannot_be(recipe, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_recipe(tmp_path / "no model is looked for", recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_and_data_that_cannot_be(source, tmp_path):
    for content, message in (("[[step]", "cannot be read as TOML"), ("[step]\n", "must hold .*step.* tables")):
        (tmp_path / "r.toml").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_recipe(tmp_path / "r.toml")
    with pytest.raises(ValueError, match="calibration: step 1, gptq, needs data"):
        run_recipe("m", [{"method": "dequantize"}, {"method": "gptq"}], tmp_path)
    tiny = bert.Config(40, 16, 2, 2, 24, pooler=False)
    jf.save(jf.init(tiny, head="masked_lm", key=jax.random.key(0)), tmp_path / "bert")
    with pytest.raises(ValueError, match="needs a causal language model, not Bert with head masked_lm; give a clas"):
        run_recipe(
            tmp_path / "bert",
            STEPS[1:],
            tmp_path / "o",
            calibration=np.ones((2, 8), int),
            evaluation=np.ones((2, 8), int),
        )
    shrink = {"method": "vtrans", "budget": {"params": 0.5}}
    with pytest.raises(ValueError, match="step 1, vtrans, trains Bert with head masked_lm; give .* 'labels'"):
        run_recipe(tmp_path / "bert", [STEPS[1], shrink], tmp_path / "o", calibration=np.ones((2, 8), int))
    assert not (tmp_path / "o").exists()
    with pytest.raises(ValueError, match="step 0, fusegpt: model: Bert is no decoder"):
        run_recipe(tmp_path / "bert", STEPS[:1], tmp_path / "o", calibration=np.ones((8, 8), int))


def test_pruned_then_packed(source, tmp_path):
    """Zeros that the first step made are exact zeros after the second."""
    steps = [{"method": "prune", "keep_n": 2, "m": 4}, {"method": "gptq", "scheme": "rtn", "bits": 8}]
    small = run_recipe(source / "model", steps, tmp_path / "o").model
    kernel = np.asarray(small.layers[0].mlp.up.kernel.get_value().dense())
    assert ((kernel.reshape(-1, 4, kernel.shape[1]) == 0).sum(1) >= 2).all()


GATES = {"method": "vtrans", "steps": 60, "rate": 1e-3, "mask_rate": 0.3, "lambda_rate": 0.3, "kl_factor": 1e-3,
         "batch": 8, "miss": 0.3}  # fmt: skip


def test_a_language_model_loses_units_then_gets_random_latent_attention(source, tmp_path):
    steps = [
        {**GATES, "budget": {"params": 0.8}, "units": ["ffn"], "mode": "faster"},
        {"method": "upcycle_mla", "d_n": 8, "d_r": 8, "kv_rank": 16, "init": "random"},
    ]
    data = {"calibration": source / "text.txt", "samples": 16, "length": 16}
    report = run_recipe(source / "model", steps, tmp_path / "o", **data)
    narrow = jf.load(tmp_path / "o" / report.rows[1].directory)
    widths = [layer.mlp.up.kernel.get_value().shape[1] for layer in narrow.layers]
    assert sum(widths) < 3 * 64 and report.rows[1].parameters < report.rows[0].parameters
    for layer in report.model.layers:
        assert isinstance(layer.attention, jf.nn.LatentAttention)
        assert np.abs(layer.attention.query.kernel.get_value()).max() <= 32**-0.5  # drawn, not the source's


def test_a_classifier_is_pruned_on_labelled_rows_then_packed(tmp_path):
    words = [f"{'good' if i % 3 else 'bad'} film number {i}" for i in range(24)]
    tokenizer = train_wordpiece(words, 80, max_length=16)
    shape = bert.Config(tokenizer.vocab_size, 64, 1, 4, 128, max_position_embeddings=16, num_labels=2)
    jf.save(jf.init(shape, head="sequence_classification", key=jax.random.key(0)), tmp_path / "m", tokenizer=tokenizer)
    lines = [json.dumps({"text": text, "label": int(text.startswith("good"))}) for text in words]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    gates = {**GATES, "budget": {"params": 0.4}, "distil": True, "multiple": 32}
    steps = [gates, {"method": "gptq", "bits": 8, "group_size": -1}]
    file = tmp_path / "rows.jsonl"
    report = run_recipe(tmp_path / "m", steps, tmp_path / "o", calibration=file, evaluation=file, samples=16)
    source, small, packed = report.rows
    assert small.parameters < 0.75 * source.parameters and packed.bytes < small.bytes

    model = jf.load(tmp_path / "m")
    told = [text.startswith("good") for text in words]
    for row, tested in ((source, model), (packed, report.model)):  # all rows count, the calibration's draw or not
        logits = np.concatenate([np.asarray(tested(**tokenizer([text])).logits) for text in words])
        assert row.quality == pytest.approx(np.mean(logits.argmax(-1) == told)) and report.metric == "accuracy"
    rows = recipe_data.labelled_rows(model, tmp_path / "rows.jsonl", samples=16, length=4, seed=0)
    assert set(rows) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert rows["input_ids"].shape == (16, 4)
    again = [tokenizer.decode(ids).split()[0] == "good" for ids in rows["input_ids"]]
    assert again == rows["labels"].astype(bool).tolist() and 0 < sum(again) < 16
    (tmp_path / "rows.jsonl").write_text('{"text": "good", "label": 2}')
    with pytest.raises(ValueError, match=r"rows.jsonl has the label 2; expected labels below 2"):
        run_recipe(tmp_path / "m", steps, tmp_path / "o", calibration=tmp_path / "rows.jsonl")


def test_a_classifier_of_images_is_measured_on_arrays(tmp_path, capsys):
    shape = vit.Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=(8, 8),
        patch_size=(4, 4), num_labels=3,
    )  # fmt: skip
    model = jf.init(shape, head="image_classification", key=jax.random.key(0))
    jf.save(model, tmp_path / "m")
    pixels = np.random.default_rng(0).standard_normal((10, 3, 8, 8)).astype(np.float32)
    labels = np.arange(10) % 3
    np.savez(tmp_path / "rows.npz", pixel_values=pixels, labels=labels)
    (tmp_path / "r.toml").write_text('[[step]]\nmethod = "gptq"\nbits = 8\ngroup_size = -1\n')
    files = [f"--{name}={tmp_path / 'rows.npz'}" for name in ("calibration", "evaluation")]
    cli.main(["compress", str(tmp_path / "m"), "--recipe", str(tmp_path / "r.toml"), f"--out={tmp_path / 'o'}", *files])
    right = np.mean(np.asarray(model(pixels).logits).argmax(-1) == labels)
    assert "accuracy" in capsys.readouterr().out
    rows = json.loads((tmp_path / "o" / "report.json").read_text())["rows"].values()
    assert [r["quality"] for r in rows] == [right, right]

    assert accuracy(model, {"pixel_values": pixels, "labels": labels}, batch_size=4) == right
    run = lambda data: run_recipe(tmp_path / "m", STEPS[1:], tmp_path / "p", calibration=data, evaluation=data)
    (tmp_path / "rows.npz").write_bytes(b"no archive")
    for data, message in (
        ({"pixel_values": pixels}, "evaluation: accuracy needs 'labels' beside pixel_values"),
        (tmp_path / "rows.npz", "calibration: .*rows.npz cannot be read as arrays by name"),
        (pixels, "evaluation: perplexity needs a causal language model, not .* with head image_classification"),
    ):
        with pytest.raises(ValueError, match=message):
            run(data)
    assert not (tmp_path / "p").exists()
    for rows, message in (
        ({"pixel_values": pixels}, "expected inputs by name and 'labels', got pixel_values"),
        ({"pixel_values": pixels, "labels": labels[:9]}, "as many of each"),
        ({"pixel_values": pixels, "labels": labels[:, None]}, r"labels have shape \(8, 1\), expected \(8,\)"),
        ({"pixel_values": pixels, "labels": labels - 3}, "no label is at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            accuracy(model, rows)


def test_a_metric_of_ones_own(tmp_path):
    """An encoder, its inputs by name, and a function of the model in the place of perplexity."""
    tiny = bert.Config(40, 32, 2, 2, 64, pooler=False)
    jf.save(jf.init(tiny, head="masked_lm", key=jax.random.key(0)), tmp_path / "bert")
    batch = {"input_ids": np.ones((4, 8), np.int32), "attention_mask": np.ones((4, 8), np.int32)}
    layers = lambda model: float(len(model.layers))
    report = run_recipe(
        tmp_path / "bert", STEPS[1:], tmp_path / "o", calibration=batch, metric=layers, metric_name="layers"
    )
    assert [r.quality for r in report.rows] == [2.0, 2.0] and report.metric == "layers"
