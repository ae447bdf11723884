"""The plumbing of the experiments: presets, run directories, results, tables and figures."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import common


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 10
    rates: tuple[float, ...] = (0.1, 0.2)
    data: str | None = None

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps: expected 1 or more, got {self.steps}")


PRESETS = {"smoke": Config(steps=1), "small": Config(), "paper": Config(steps=1000)}


def test_presets_and_overrides():
    assert common.parse(PRESETS, []) == ("small", Config())
    assert common.parse(PRESETS, ["smoke"]) == ("smoke", Config(steps=1))
    assert common.parse(PRESETS, ["--steps", "3"]) == ("small", Config(steps=3))
    assert common.parse(PRESETS, ["paper", "--data", "here"]) == ("paper", Config(steps=1000, data="here"))


@pytest.mark.parametrize("argv", [["--steps", "x"], ["--unknown", "1"], ["small", "--steps", "0"], ["huge"]])
def test_bad_options_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        common.parse(PRESETS, argv)
    assert caught.value.code == 2 and capsys.readouterr().err


def test_main_writes_config_and_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "ROOT", tmp_path)

    def run(config, out):
        return {"loss": np.float32(0.5), "steps": config.steps, "bad": float("nan"), "curve": jnp.arange(3), "at": out}

    result = common.main("demo", PRESETS, run, ["smoke"])
    (out,) = (tmp_path / "runs" / "demo").iterdir()
    assert json.loads((out / "config.json").read_text()) == {
        "system": "demo", "preset": "smoke", "steps": 1, "rates": [0.1, 0.2], "data": None
    }  # fmt: skip
    stored = json.loads((out / "result.json").read_text())
    assert stored | {"seconds": 0} == {
        "loss": 0.5, "steps": 1, "bad": None, "curve": [0, 1, 2], "at": str(out), "seconds": 0
    }  # fmt: skip
    assert result["loss"] == 0.5 and "demo" in capsys.readouterr().out

    def refuse(config, out):
        raise ValueError("data: there is none")

    with pytest.raises(SystemExit) as caught:
        common.main("demo", PRESETS, refuse, [])
    assert caught.value.code == 2 and capsys.readouterr().err == "error: data: there is none\n"


def test_two_runs_in_one_second_get_two_directories(tmp_path):
    assert len({common.run_directory("demo", tmp_path) for _ in range(3)}) == 3


def test_shared_data(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ROOT", tmp_path / "repository")
    assert common.shared_data("books") is None
    (tmp_path / "shared" / "data" / "books").mkdir(parents=True)
    assert common.shared_data("books") == tmp_path / "shared" / "data" / "books"
    assert common.shared_data("books", tmp_path) == tmp_path
    with pytest.raises(ValueError, match="data: .* does not exist"):
        common.shared_data("books", tmp_path / "missing")


def test_table_and_numbers(capsys):
    common.table("Title", [{"name": "a", "value": 0.123456, "n": 1234567}, {"name": "b"}])
    text = capsys.readouterr().out
    for part in ("Title", "name", "value", "0.1235", "1,234,567", "–"):
        assert part in text
    assert common.mean_std([1.0, 2.0, 3.0]) == "2 ± 1"
    assert common.mean_std([0.5]) == "0.5" and common.mean_std([]) == "–"


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    path = common.figure(tmp_path / "figure.png", lambda fig: fig.subplots().plot([1, 2, 3]))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plain_refuses_what_json_cannot_hold():
    with pytest.raises(TypeError):
        common.plain({"x": object()})
