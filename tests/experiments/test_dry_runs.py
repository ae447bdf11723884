"""The steps that `--dry-run` compiles: those of the paper presets trace, with the sizes that the papers have."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jaxformers as jf
from experiments import common
from jaxformers import dryrun
from jaxformers.cost import count_flops

eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
# parameters of the step in millions; matrix products in TFLOPs, from 6 · parameters · tokens and what is run besides
EXPECTED = {
    "gptq": (7.1, 0.5, 1.5),
    "minilm": (132, 25, 60),
    "star": (357, 2e4, 5e4),
    "linktransformer": (278, 3, 10),
    "rmsnorm": (125, 24, 32),
    "x_ecomla": (2471, 4.5e3, 6.5e3),
    "essential_sparsity": (125, 14, 18),
    "fusegpt": (1417, 140, 170),
    "vtrans": (219.6, 2.7, 3.5),
}


@eight
@pytest.mark.parametrize("name", EXPECTED)
def test_the_paper_presets_have_a_step(name):
    module = importlib.import_module(f"experiments.{name}")
    step = module.step(module.PRESETS["paper"], jf.mesh("data=8"))
    traced = jax.jit(step.function, donate_argnums=step.donate, out_shardings=step.out_shardings).trace(*step.args)
    millions, low, high = EXPECTED[name]
    assert step.parameters / 1e6 == pytest.approx(millions, rel=0.02)
    assert low < count_flops(traced.jaxpr) / 1e12 < high
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(step.args))


@pytest.mark.parametrize("name", ["gptq", "essential_sparsity", "fusegpt", "vtrans"])
def test_presets_that_make_their_own_models_have_none(name):
    module = importlib.import_module(f"experiments.{name}")
    with pytest.raises(ValueError, match="this preset trains its own"):
        module.step(module.PRESETS["small"], jf.mesh("data=1"))


def test_the_command_runs_the_step_in_a_process_of_its_own(monkeypatch, capsys):
    seen = {}

    def run_child(command, timeout, name, topology, mesh):
        seen.update(command=command, timeout=timeout)
        return dryrun.Report(name, topology, mesh, 8, 1.0, None, note="the compiler had not ended")

    monkeypatch.setattr(dryrun, "run_child", run_child)
    monkeypatch.setattr(dryrun, "devices_of", lambda topology: [None] * 64)
    gptq = importlib.import_module("experiments.gptq")
    found = common.main("gptq", gptq.PRESETS, gptq.run, ["--dry-run", "v5p:4x4x4", "--group", "64"], step=gptq.step)
    assert found["fits"] is None and "gptq, preset paper" in capsys.readouterr().out
    assert seen["command"][1:] == [
        "-m", "experiments.gptq", "paper", "--group", "64", "--dry-run", "v5p:4x4x4", "--mesh", "data=64", "--within"
    ]  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        common.main("gptq", gptq.PRESETS, gptq.run, ["--dry-run", "v9:4x4x4", "--mesh", "data=1"])
    assert caught.value.code == 2 and "no step" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_for_a_tpu(tmp_path):
    """One real compilation by libtpu: a decoding step of a tiny llama, its report, and its largest batch's bounds."""
    pytest.importorskip("libtpu")
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2, '
        '"num_attention_heads": 2, "intermediate_size": 256, "max_position_embeddings": 64}'
    )
    command = [sys.executable, "-m", "jaxformers.cli", "dry-run", str(tmp_path), "--topology", "v5e:2x2", "--mesh"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [*command, "data=2,tensor=2", "--step", "decode", "--seq", "64", "--no-largest-batch", "--json-out",
         str(tmp_path / "report.json")], capture_output=True, text=True, timeout=300, cwd=root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "fits: 0.00 of 15.8 GiB a device" in done.stdout
    report = dryrun.from_json(json.loads((tmp_path / "report.json").read_text()))
    assert report.fits and report.devices == 4 and report.parameters == 393_856
    assert report.arguments > 2 * report.parameters / 2  # half of the bfloat16 weights, and the cache
    assert "all-reduce" in report.collectives and "reduce-scatter" not in report.collectives
