"""What the experiments share: presets on the command line, the run directory, tables, figures, where data lie.

    PRESETS = {"smoke": Config(steps=3), "small": Config(), "paper": Config(layers=24)}

    def run(config: Config, out: Path) -> dict: ...   # returns what belongs into result.json

    if __name__ == "__main__":
        common.main("gptq", PRESETS, run)

`python -m experiments.gptq smoke --steps 5`, in the repository, starts from the preset `smoke`; without a name it is
`small`. `--preset smoke` says the same. `--dry-run v5p:4x4x4 [--mesh data=64]` runs nothing: it compiles the step of
the preset (`paper`, if none is named) for that TPU topology, on this machine, and tells whether it fits.

Several processes that are started as for `jaxformers train` (`launch/`, or by `--coordinator host:port --processes n
--process i`) train together, on all their devices along data. Everything else each of them does for itself, and of what
they write beside checkpoints the files of process 0 are kept.
"""

import contextlib
import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

import jaxformers as jf
from jaxformers.atomic import write_json_atomic
from jaxformers.compilation import enable_cache
from jaxformers.data.tokenizers import Tokenizer, load_tokenizer
from jaxformers.distributed import initialize
from jaxformers.extras import require

Config = TypeVar("Config")
ROOT = Path(__file__).resolve().parent.parent
_ABOUT = {
    "smoke": "seconds; shows that everything runs",
    "small": "minutes on two CPU cores, on real data (the default)",
    "paper": "the paper's configuration",
}


def parse(presets: Mapping[str, Config], argv: Sequence[str] | None = None, *, about: str = "") -> tuple[str, Config]:
    """(preset, config) from the command line: a preset's name, then options that change single fields.

    Presets are frozen dataclasses of one type. Exits with code 2 and one line for options that do not fit.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    named = _taken(argv, "--preset")
    argv = argv if named is None else [named, *argv]
    if not argv or (argv[0] not in presets and argv[0] not in ("-h", "--help")):
        argv.insert(0, "small")
    chosen = argv[0] if argv[0] in presets else None
    try:
        config = tyro.extras.overridable_config_cli(
            {name: (_ABOUT.get(name, ""), config) for name, config in presets.items()}, args=argv, description=about
        )
    except ValueError as error:  # a config that checks itself
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return chosen, config


def main(
    system: str,
    presets: Mapping[str, Config],
    run: Callable[[Config, Path], Mapping[str, Any]],
    argv: Sequence[str] | None = None,
    *,
    step: Callable[[Config, Any], Any] | None = None,
) -> dict[str, Any]:
    """Parse, make `runs/<system>/<time>/`, write `config.json`, run, write `result.json`; returns the result.

    ``run(config, directory)`` returns a dict of plain values. Its ValueErrors (bad input) become one line and exit
    code 2. ``step(config, mesh)``: the `jaxformers.dryrun.Step` that `--dry-run` compiles.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    topology = _taken(argv, "--dry-run")
    if topology is not None:
        return dry_run(system, presets, step, topology, argv)
    coordinator, *numbers = (_taken(argv, f"--{name}") for name in ("coordinator", "processes", "process"))
    try:
        if not all(value is None or value.isdigit() for value in numbers):
            raise ValueError(f"processes, process: expected numbers, got {' and '.join(map(str, numbers))}")
        initialize(coordinator, *(None if value is None else int(value) for value in numbers))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    about = (sys.modules["__main__"].__doc__ or "").strip().split("\n\n")[0]
    preset, config = parse(presets, argv, about=about)
    enable_cache()
    with contextlib.ExitStack() as stack:
        if first():
            out = run_directory(system)
        else:  # `fit` writes where process 0 says; what this one writes beside goes
            out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{system}-")))
        write_json_atomic(
            out / "config.json", {"system": system, "preset": preset, **plain(dataclasses.asdict(config))}
        )
        began = time.perf_counter()
        try:
            result = dict(run(config, out))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        result["seconds"] = round(time.perf_counter() - began, 1)
        write_json_atomic(out / "result.json", plain(result))
        if first():
            Console().print(f"everything is in {out}", highlight=False, soft_wrap=True)
    return result


def first() -> bool:
    """Whether this is process 0, whose tables are printed and whose files are kept."""
    return jax.process_index() == 0


def dry_run(
    system: str, presets: Mapping[str, Config], step: Callable | None, topology: str, argv: list[str]
) -> dict[str, Any]:
    """Compile the step of a preset for a TPU topology, in a process of its own; print and return the report."""
    from jaxformers import dryrun

    mesh, timeout = _taken(argv, "--mesh"), float(_taken(argv, "--timeout") or 900)
    within = "--within" in argv  # the process that compiles
    argv = [a for a in argv if a != "--within"]
    if "--preset" not in argv and not (argv and argv[0] in presets):
        argv = ["paper", *argv]
    preset, config = parse(presets, argv)
    try:
        if step is None:
            raise ValueError(f"dry-run: {system} has no step that it could compile")
        if within:
            dryrun.child(lambda devices: step(config, devices), topology, mesh)
            return {}
        mesh = mesh or f"data={len(dryrun.devices_of(topology))}"
        options = ["--dry-run", topology, "--mesh", mesh, "--within"]
        command = [sys.executable, "-m", f"experiments.{system}", *argv, *options]
        report = dryrun.run_child(command, timeout, f"{system}, preset {preset}", topology, mesh)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(report)
    return report.to_json()


def _taken(argv: list[str], option: str) -> str | None:
    """The value of an option, which is removed from ``argv``. Exits with code 2 when it has none."""
    for i, word in enumerate(argv):
        if word == option or word.startswith(f"{option}="):
            if word == option and i + 1 == len(argv):
                print(f"error: {option} needs a value", file=sys.stderr)
                raise SystemExit(2)
            value = word.partition("=")[2] if "=" in word else argv[i + 1]
            del argv[i : i + (1 if "=" in word else 2)]
            return value
    return None


def run_directory(system: str, base: str | Path | None = None) -> Path:
    """A new directory `runs/<system>/<YYYYmmdd-HHMMSS>/` under ``base`` (default: the repository)."""
    parent = Path(base or ROOT) / "runs" / system
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{i}" for i in range(1, 1000))):
        path = parent / (stamp + suffix)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise ValueError(f"{parent}: a thousand runs in one second")


def pretrained(model: str, **changes: Any) -> tuple[nnx.Module, Tokenizer]:
    """A checkpoint and its tokenizer; ``changes`` as for `jaxformers.load`."""
    loaded = jf.load(model, **changes)
    return loaded, load_tokenizer(loaded.source)


def record(out: Path, rows: list[dict[str, Any]], row: Mapping[str, Any]) -> None:
    """Append ``row`` to ``rows`` and, as a line, to `metrics.jsonl` in ``out``: what was measured outlives a crash."""
    rows.append(dict(row))
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(plain(row)) + "\n")


def shared_data(name: str, given: str | Path | None = None) -> Path | None:
    """Where the data set ``name`` lies: ``given`` (an option of the experiment), else `../shared/data/<name>` beside
    the repository, else None. Raises ValueError when ``given`` is not there."""
    if given is not None:
        if not Path(given).exists():
            raise ValueError(f"data: {given} does not exist")
        return Path(given)
    path = ROOT.parent / "shared" / "data" / name
    return path if path.exists() else None


def table(title: str, rows: Iterable[Mapping[str, Any]], *, columns: Sequence[str] | None = None) -> None:
    """Print rows ({column: value}) as one table; numbers to four significant digits, missing values as a dash."""
    rows = list(rows)
    columns = list(columns or dict.fromkeys(k for row in rows for k in row))
    shown = Table(title=title, title_justify="left")
    numeric = {c: all(isinstance(r.get(c), int | float | np.number | None) for r in rows) for c in columns}
    for c in columns:
        shown.add_column(c, justify="right" if numeric[c] else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*(_cell(row.get(c)) for c in columns))
    if not first():
        return
    console = Console()
    # a file or a pipe has no width: give the table what it needs
    (console if console.is_terminal else Console(width=200)).print(shown)


def mean_std(values: Iterable[float]) -> str:
    """``mean ± standard deviation`` (of the sample) over seeds, as text."""
    x = np.asarray(list(values), np.float64)
    if not x.size:
        return "–"
    if x.size == 1:
        return _cell(float(x[0]))
    rounding = 1e-12 * np.abs(x).max()
    mean, std = (0.0 if v <= rounding else v for v in (abs(x.mean()), x.std(ddof=1)))
    return f"{_cell(float(np.copysign(mean, x.mean())) if mean else 0.0)} ± {_cell(float(std))}"


def figure(path: str | Path, draw: Callable[[Any], None], *, size: tuple[float, float] = (6.4, 4.0)) -> Path:
    """Draw into one matplotlib figure and save it: ``draw(fig)``. Needs the extra `plot`; makes no window."""
    require("matplotlib", extra="plot")
    from matplotlib.figure import Figure  # without pyplot there is no global state and no display

    fig = Figure(figsize=size, layout="constrained")
    draw(fig)
    fig.savefig(path, dpi=150)
    return Path(path)


def bars(axis: Any, values: Mapping[str, Sequence[float]], label: str) -> None:
    """One horizontal bar of the mean for each name, from top to bottom, and a point for each of its values."""
    for row, found in enumerate(values.values()):
        axis.barh(row, np.mean(found), color="C0", alpha=0.6)
        axis.plot(found, np.full(len(found), row), "k.", markersize=4)
        axis.annotate(f"  {np.mean(found):.3g}", (max(*found, np.mean(found)), row), va="center", fontsize=8)
    axis.set_yticks(range(len(values)), list(values))
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set_xlabel(label)


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: numpy and JAX scalars, arrays, paths, dataclasses; NaN and infinity as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Path):
        return str(value)
    array = np.asarray(value)
    if array.ndim:
        return plain(array.tolist())
    item = array.item()
    if isinstance(item, float):
        return item if math.isfinite(item) else None
    json.dumps(item)  # raises TypeError for what JSON cannot hold
    return item


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    number = float(value)
    if not math.isfinite(number):
        return str(number)
    return f"{number:,.0f}" if abs(number) >= 10_000 else f"{number:.4g}"
