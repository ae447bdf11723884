"""Who joins whom: arguments and environments of launchers. Real processes are in train/test_resume.py."""

import pytest

from jaxformers.distributed import initialize, launched_together


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}, True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, False),  # inside an allocation, but not started by srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "many"}, False),
    ],
)
def test_launchers_are_known_by_their_environment(environment, several):
    assert launched_together(environment) is several


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1", None, None), "processes: coordinator, processes and process belong together"),
        ((None, 2, 0), "coordinator: coordinator, processes"),
        (("localhost", 2, 0), "expected host:port"),
        (("localhost:port", 2, 0), "expected host:port"),
        (("localhost:1", 2, 2), "expected 0 to 1 of 2 processes, got 2"),
        (("localhost:1", 0, 0), "of 0 processes"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        initialize(*arguments)


def test_a_process_alone_stays_alone(monkeypatch):
    for name in ("SLURM_STEP_ID", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    assert initialize() is False
