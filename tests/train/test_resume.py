"""A run that is killed, stopped, damaged or moved to another mesh goes on as if nothing had happened."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from train import toy

from jaxformers.train import DamagedCheckpoint, TrainConfig, checkpoint, fit, load_params
from jaxformers.train.checkpoint import Checkpoints, fingerprints

# TensorStore's threads complain when the read that they belonged to has failed
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
HERE = Path(__file__).parent


def start(directory, out, *options, **environment):
    """toy.py in a process of its own."""
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent.parent}{os.pathsep}{HERE}"} | environment
    command = [sys.executable, str(HERE / "toy.py"), str(directory), str(out), *map(str, options)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(directory, out, *options):
    """The same, until it ends: its completed process."""
    process = start(directory, out, *options)
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def same(a, b):
    """All arrays of two result files, bit for bit."""
    a, b = np.load(a), np.load(b)
    assert sorted(a.files) == sorted(b.files) and len(a.files) == 7
    for name in a.files:
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(directory, result file) of a run that nobody disturbed."""
    base = tmp_path_factory.mktemp("unbroken")
    done = run(base / "run", base / "out.npz")
    assert done.returncode == 0, done.stderr
    return base / "run", base / "out.npz"


@pytest.mark.parametrize("step", [1, 8, 25, 40])
def test_killed_at_any_step_and_resumed(unbroken, tmp_path, step):
    killed = run(tmp_path / "run", tmp_path / "out.npz", "--kill-at", step)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "out.npz").exists()
    done = run(tmp_path / "run", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    same(tmp_path / "out.npz", unbroken[1])
    # and metrics.jsonl reads as if there had been one run
    read = lambda d: [json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()]
    train = lambda d: [r["step"] for r in read(d) if r["kind"] == "train"]
    assert train(tmp_path / "run") == train(unbroken[0]) == list(range(5, 41, 5))


def test_killed_again_and_again(unbroken, tmp_path):
    for step in (9, 11, 9):
        assert run(tmp_path / "run", tmp_path / "out.npz", "--kill-at", step).returncode == -signal.SIGKILL
    assert run(tmp_path / "run", tmp_path / "out.npz").returncode == 0
    same(tmp_path / "out.npz", unbroken[1])


def test_killed_at_any_moment(unbroken, tmp_path):
    """From outside, whatever the process is doing: most of the time it is writing a checkpoint."""
    rng = random.Random(1)
    for _ in range(3):
        process = start(tmp_path / "run", tmp_path / "out.npz", "--checkpoint-every", 1)
        before = set((tmp_path / "run").glob("checkpoints/*"))
        while process.poll() is None and set((tmp_path / "run").glob("checkpoints/*")) == before:
            time.sleep(0.005)
        time.sleep(rng.random() / 10)
        process.kill()
        process.communicate()
    assert run(tmp_path / "run", tmp_path / "out.npz", "--checkpoint-every", 1).returncode == 0
    same(tmp_path / "out.npz", unbroken[1])


def test_sigterm_saves_once_and_exits_0(unbroken, tmp_path):
    stopped = run(tmp_path / "run", tmp_path / "out.npz", "--term-at", 17)
    assert stopped.returncode == 0 and "SIGTERM: saved step 17" in stopped.stderr
    assert not (tmp_path / "out.npz").exists()
    steps = Checkpoints(tmp_path / "run" / "checkpoints").steps()
    assert steps == [7, 14, 17]
    assert run(tmp_path / "run", tmp_path / "out.npz").returncode == 0
    same(tmp_path / "out.npz", unbroken[1])


def test_onto_another_mesh(unbroken, tmp_path):
    """Saved on one device, resumed on 2 × 4, saved there, resumed on 8: the same numbers up to summation order."""
    first = run(tmp_path / "run", tmp_path / "out.npz", "--kill-at", 18)
    assert first.returncode == -signal.SIGKILL
    second = run(tmp_path / "run", tmp_path / "out.npz", "--mesh", "data=2,fsdp=4", "--kill-at", 12)
    assert second.returncode == -signal.SIGKILL, second.stderr
    third = run(tmp_path / "run", tmp_path / "out.npz", "--mesh", "fsdp=8")
    assert third.returncode == 0, third.stderr
    ours, plain = np.load(tmp_path / "out.npz"), np.load(unbroken[1])
    for name in plain.files:
        np.testing.assert_allclose(ours[name], plain[name], rtol=1e-3, atol=1e-5)


def together(tmp_path, name, *options, processes=2, devices=4, mesh="data=2,fsdp=4"):
    """Processes of some devices each train together; their return codes and what they said."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    begun = [
        start(
            tmp_path / "run", tmp_path / f"{name}-{i}.npz", "--mesh", mesh, "--process", f"{i}/{processes}:{port}",
            *options, JAX_NUM_CPU_DEVICES=str(devices),
        )
        for i in range(processes)
    ]  # fmt: skip
    said = [process.communicate(timeout=150)[1] for process in begun]
    return [process.returncode for process in begun], said


def test_two_processes_train_stop_and_resume_as_one(unbroken, tmp_path):
    codes, said = together(tmp_path, "a", "--term-at", 17)
    assert codes == [0, 0], said
    stopped = Checkpoints(tmp_path / "run" / "checkpoints").steps()
    assert stopped[:2] == [7, 14] and stopped[2] == 20, "they agree to stop at the next report"
    codes, said = together(tmp_path, "b")
    assert codes == [0, 0], said
    a, b, plain = np.load(tmp_path / "b-0.npz"), np.load(tmp_path / "b-1.npz"), np.load(unbroken[1])
    for name in plain.files:
        np.testing.assert_array_equal(a[name], b[name])
        np.testing.assert_allclose(a[name], plain[name], rtol=1e-3, atol=1e-5)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(5, 41, 5)), "one process writes"
    # and one process goes on where two stopped
    done = run(tmp_path / "run", tmp_path / "c.npz")
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "c.npz")["step"], 40)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "mesh"), [(2, "data=2"), (4, "data=2,fsdp=2")])
def test_losses_of_several_processes_are_those_of_one(unbroken, tmp_path, processes, mesh):
    codes, said = together(tmp_path, "a", processes=processes, devices=1, mesh=mesh)
    assert codes == [0] * processes, said
    losses = [
        [r["loss"] for r in map(json.loads, (d / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "train"]
        for d in (unbroken[0], tmp_path / "run")
    ]
    assert len(losses[0]) == 8 and min(losses[0]) < 0.8 * losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_one_of_two_dies_the_other_says_so_and_both_go_on(tmp_path):
    """Process 1 is killed in step 18; process 0 ends by itself, and the run ends bit by bit as if nothing had been."""
    kinds = {"processes": 2, "devices": 1, "mesh": "data=2"}
    codes, said = together(tmp_path / "whole", "a", **kinds)
    assert codes == [0, 0], said
    began = time.monotonic()
    codes, said = together(tmp_path / "hurt", "a", "--kill-at", 18, "--killed", 1, "--peer-timeout", 20, **kinds)
    assert codes == [75, -signal.SIGKILL], said
    assert time.monotonic() - began < 60
    # the checkpoint of step 14 may still be on its way to the disk when the other is killed
    told = r"process 0 of 2: .*has probably died\. The last checkpoint is .*/checkpoints/(7|14); the same"
    assert re.search(told, said[0])
    codes, said = together(tmp_path / "hurt", "b", **kinds)
    assert codes == [0, 0], said
    same(tmp_path / "hurt" / "b-0.npz", tmp_path / "whole" / "a-0.npz")


def _train(directory, steps=12, **options):
    data = [toy.arrays(16)]
    config = TrainConfig(steps=steps, checkpoint_every=4, log_every=4, progress=False, **options)
    return fit(toy.objective, (toy.apply, toy.parameters()), data, config, key=jax.random.key(0), directory=directory)


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(directory, result) of a run with checkpoints at 4, 8 and 12."""
    directory = tmp_path_factory.mktemp("trained")
    return directory, _train(directory)


@pytest.mark.parametrize("damage", [_truncate, _flip, _zero, Path.unlink], ids=["truncate", "flip", "zero", "delete"])
@pytest.mark.parametrize("target", ["arrays", "manifest.ocdbt", "metadata"])
def test_damaged_newest_is_skipped(trained, tmp_path, capfd, damage, target):
    want = trained[1]
    shutil.copytree(trained[0], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "12"
    files = [p for p in newest.rglob("*") if p.is_file()]
    if target == "arrays":
        files = [p for p in files if p.parent.name == "d"]
    else:
        files = [p for p in files if p.name == target and p.parent.name in ("state", "meta")]
    assert files
    for path in files:
        damage(path)
    again = _train(tmp_path / "run")
    assert re.search("checkpoint 12 in .* is damaged .*; using 8 instead", capfd.readouterr().err)
    assert [r["step"] for r in again.history if r["kind"] == "train"] == [4, 8, 12]
    for a, b in zip(jax.tree.leaves(want.params), jax.tree.leaves(again.params), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [4, 8, 12]
    assert (tmp_path / "run" / "checkpoints-damaged" / "12").is_dir()


@pytest.mark.parametrize("damage", [_truncate, _flip, _zero, Path.unlink], ids=["truncate", "flip", "zero", "delete"])
def test_damage_to_any_other_file_never_changes_numbers(trained, tmp_path, damage):
    """Orbax can do without some of its files: what it then reads is what was saved, or the checkpoint is skipped."""
    shutil.copytree(trained[0], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "12"
    for path in [p for p in newest.rglob("*") if p.is_file() and p.parent.name != "d" and p.parent.name != "meta"]:
        if path.name != "manifest.ocdbt":
            damage(path)
    again = _train(tmp_path / "run")
    for a, b in zip(jax.tree.leaves(trained[1].params), jax.tree.leaves(again.params), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_random_damage_is_found_or_harmless(trained, tmp_path):
    """60 checkpoints with random bytes somewhere: none is read as something else, none crashes or hangs the reader."""
    source = trained[0] / "checkpoints" / "12"
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    meta = checkpoint.read_meta(source)
    like = {k: jax.ShapeDtypeStruct(tuple(s), d, sharding=here) for k, (s, d) in meta["arrays"].items()}
    want = checkpoint._read_arrays(source, meta, like)
    rng = random.Random(0)
    found = 0
    for i in range(60):
        broken = shutil.copytree(source, tmp_path / str(i))
        path = rng.choice(sorted(p for p in broken.rglob("*") if p.is_file() and p.stat().st_size))
        data = bytearray(path.read_bytes())
        for _ in range(rng.choice([1, 1, 8, 64])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            read = checkpoint._read_arrays(broken, checkpoint.read_meta(broken), like)
        except DamagedCheckpoint:
            found += 1
            continue
        for name, x in read.items():
            assert np.asarray(x).tobytes() == np.asarray(want[name]).tobytes(), (path, name)
    assert 5 < found < 60


def test_all_damaged_is_an_error_and_nothing_is_moved(tmp_path):
    _train(tmp_path)
    for step in (4, 8, 12):
        _truncate(tmp_path / "checkpoints" / str(step) / "meta" / "metadata")
    with pytest.raises(DamagedCheckpoint, match="step 12"):
        _train(tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4, 8, 12]


def test_unfinished_checkpoint_of_a_killed_process_is_not_taken(tmp_path):
    _train(tmp_path, steps=8)
    half = tmp_path / "checkpoints" / "12.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4, 8]
    assert _train(tmp_path, steps=12).step == 12
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4, 8, 12]


def test_another_model_or_key_or_frozen_base_is_refused(tmp_path, capsys):
    _train(tmp_path, freeze=("layers.**",))
    data, config = [toy.arrays(16)], TrainConfig(steps=20, checkpoint_every=4, freeze=("layers.**",), progress=False)
    again = lambda params, key, config=config: fit(
        toy.objective, (toy.apply, params), data, config, key=key, directory=tmp_path
    )
    with pytest.raises(ValueError, match="key: the run in this directory"):
        again(toy.parameters(), jax.random.key(1))
    with pytest.raises(ValueError, match="frozen parameters are not those"):
        again(toy.parameters(seed=5), jax.random.key(0))
    with pytest.raises(ValueError, match="another model or optimiser"):
        again(toy.parameters(width=16), jax.random.key(0))
    with pytest.raises(ValueError, match="holds a run"):
        again(toy.parameters(), jax.random.key(0), TrainConfig(steps=20, resume=False, freeze=("layers.**",)))
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4, 8, 12], "nothing was taken for damaged"
    capsys.readouterr()
    assert again(toy.parameters(), jax.random.key(0)).step == 20
    assert "resuming step 12 with other settings than it was saved with: steps 12 -> 20\n" == capsys.readouterr().err


def test_keep_and_best(tmp_path):
    scores = {4: 3.0, 8: 1.0, 12: 2.0, 16: 5.0, 20: 4.0}
    data = [toy.arrays(16)]
    config = TrainConfig(steps=20, checkpoint_every=4, eval_every=4, keep=2, best="score", progress=False)
    seen = {}

    def evaluate(params, step):
        seen[step] = jax.tree.map(np.asarray, params)
        return {"score": scores[step]}

    fit(
        toy.objective, (toy.apply, toy.parameters()), data, config, key=jax.random.key(0), directory=tmp_path,
        evaluate=evaluate,
    )  # fmt: skip
    assert Checkpoints(tmp_path / "checkpoints").steps() == [8, 16, 20]
    for step, number in (("best", 8), ("latest", 20), (16, 16)):
        found = load_params(tmp_path, toy.parameters(), step=step)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(seen[number]), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="no checkpoint of step 12"):
        load_params(tmp_path, toy.parameters(), step=12)
    with pytest.raises(ValueError, match="moving average"):
        load_params(tmp_path, toy.parameters(), ema=True)
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        load_params(tmp_path / "elsewhere", toy.parameters())


def test_best_survives_a_restart(tmp_path):
    data = [toy.arrays(16)]
    for steps in (8, 24):  # the best score is the first run's
        config = TrainConfig(steps=steps, checkpoint_every=4, eval_every=4, keep=1, best="score", progress=False)
        fit(
            toy.objective, (toy.apply, toy.parameters()), data, config, key=jax.random.key(0), directory=tmp_path,
            evaluate=lambda params, step: {"score": abs(step - 4)},
        )  # fmt: skip
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4, 24]


def test_a_score_that_is_not_a_number_is_never_the_best(tmp_path):
    config = TrainConfig(steps=12, checkpoint_every=4, eval_every=4, keep=1, best="score", progress=False)
    fit(
        toy.objective, (toy.apply, toy.parameters()), [toy.arrays(16)], config, key=jax.random.key(0),
        directory=tmp_path, evaluate=lambda params, step: {"score": {4: 1.0, 8: float("nan"), 12: 3.0}[step]},
    )  # fmt: skip
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4, 12]


def test_sigterm_breaks_off_an_evaluation(tmp_path):
    """What was measured in part is not written down; the checkpoint is of the step before the evaluation."""
    seen = []

    def held():
        for i in range(1000):
            if i == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            seen.append(i)
            yield toy.arrays(16)

    class Data:
        def __iter__(self):
            return held()

    config = TrainConfig(steps=12, checkpoint_every=9, eval_every=4, log_every=4, progress=False)
    with pytest.raises(SystemExit) as caught:
        fit(
            toy.objective, (toy.apply, toy.parameters()), [toy.arrays(16)], config, key=jax.random.key(0),
            directory=tmp_path, eval_data=Data(),
        )  # fmt: skip
    assert caught.value.code == 0 and len(seen) <= 5
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4]
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "eval" not in kinds and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "int32", "uint8", "int4"])
def test_fingerprint_sees_every_single_change(dtype):
    x = np.arange(24).reshape(2, 3, 4) % 2
    base = fingerprints({"x": jax.numpy.asarray(x, dtype)})["x"]
    prints = set()
    for i in range(24):
        y = x.copy()
        y.flat[i] = 1 - y.flat[i]
        prints.add(fingerprints({"x": jax.numpy.asarray(y, dtype)})["x"])
    assert base not in prints
    swapped = x.copy()
    swapped[0, 0, :2] = x[0, 0, 1::-1]
    assert fingerprints({"x": jax.numpy.asarray(swapped, dtype)})["x"] != base


def test_fingerprint_does_not_depend_on_the_sharding():
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, -1), ("a", "b"))
    spec = jax.sharding.PartitionSpec("b", "a")
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    assert fingerprints({"x": spread}) == fingerprints({"x": jax.numpy.asarray(x)})


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint_whole(unbroken, tmp_path):
    stopped = run(tmp_path / "run", tmp_path / "out.npz", "--full-at", 10)
    assert stopped.returncode == 1, stopped.stderr
    last = stopped.stderr.strip().splitlines()[-1]
    assert "CheckpointNotWritten: a checkpoint could not be written to" in last and "of step 7" in last
    assert "File too large" in last
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["7"], "nothing half-written is left"
    again = run(tmp_path / "run", tmp_path / "out.npz")
    assert again.returncode == 0, again.stderr
    same(unbroken[1], tmp_path / "out.npz")


def test_a_full_disk_at_the_end_does_not_lose_what_was_trained(unbroken, tmp_path):
    done = run(tmp_path / "run", tmp_path / "out.npz", "--full-at", 37)
    assert done.returncode == 0, done.stderr
    same(unbroken[1], tmp_path / "out.npz")
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] == 35
