"""Joining the processes of several hosts into one run, and what only one of them does."""

import dataclasses
import importlib.util
import os
import re
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np

from gpt2_jax.errors import UserError
from gpt2_jax.training.settings import DistributedSettings


class _Place(NamedTuple):
    """Where a launcher put this process."""

    processes: int
    process: int
    coordinator: str | None
    """HOST:PORT, if it can be told"""
    devices: list[int] | None
    """the host's devices that are this process's; None for all that it sees"""


def join_cluster(settings: DistributedSettings) -> None:
    """Connects to the other processes of the run, if there are any.

    Slurm, Open MPI and Kubernetes (an indexed Job) are recognised by their environment
    variables; explicit settings win over what those say. Must come before the first use of a
    device.

    Raises:
      UserError: if the settings are incomplete, or the others do not answer in five minutes.
    """
    place = _slurm() or _open_mpi()
    coordinator, processes, process = dataclasses.astuple(settings)
    if place is not None:
        coordinator = coordinator or place.coordinator
        processes = place.processes if processes is None else processes
        process = place.process if process is None else process
    values = {"coordinator": coordinator, "num_processes": processes, "process_id": process}
    if place is None and not any(value is not None for value in values.values()):
        if _in_indexed_job():
            _initialize({})  # JAX asks the Kubernetes API
        return
    _check(values)
    devices = None if place is None else place.devices
    _initialize(
        {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process,
            "local_device_ids": devices,
            # Its detection would show a process nothing but the GPU of its rank on the host.
            "cluster_detection_method": "deactivate",
            # JAX listens on every interface unless it is told otherwise.
            "coordinator_bind_address": coordinator if _is_loopback(str(coordinator)) else None,
        }
    )


def _initialize(arguments: dict[str, Any]) -> None:
    # The run stops on SIGTERM by itself (`gpt2_jax.training.stopping`), on all hosts at a time.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"cannot join the other processes ({error}); check that process 0 runs and "
            f"that its --distributed.coordinator HOST:PORT can be reached"
        ) from None


def is_primary() -> bool:
    """Whether this process is the one that writes files and speaks to the user."""
    return jax.process_index() == 0


def agree(value: int) -> int:
    """Process 0's value, in every process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def check_same(what: str, text: str) -> None:
    """Raises UserError where a text is not what it is in process 0."""
    mine = zlib.crc32(text.encode()) >> 1  # an int32
    if agree(mine) != mine:
        raise UserError(
            f"{what} of process {jax.process_index()} are not those of process 0; give all "
            f"processes the same files and flags"
        )


def _check(values: dict[str, Any]) -> None:
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise UserError(
            f"--distributed.{missing[0]} is missing; coordinator, num_processes and process_id "
            f"go together"
        )
    coordinator, count, process = values.values()
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(
            f"distributed.coordinator={coordinator!r} must be HOST:PORT, such as 127.0.0.1:9876"
        )
    if count < 1 or not 0 <= process < count:
        raise UserError(
            f"distributed.process_id={process} must be in 0..{count - 1}, "
            f"below distributed.num_processes={count}"
        )


def _is_loopback(address: str) -> bool:
    return address.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]")


def _slurm() -> _Place | None:
    """A task of `srun` among several."""
    count = _number("SLURM_NTASKS") or 1
    first_host = re.match(r"[^,\[]+(\[\d+)?", os.environ.get("SLURM_STEP_NODELIST", ""))
    if count == 1 or first_host is None or _number("SLURM_PROCID") is None:
        return None
    # Jobs and their steps may share a host, so the port follows their numbers.
    one_host = _number("SLURM_STEP_NUM_NODES") == 1
    host = "127.0.0.1" if one_host else first_host[0].replace("[", "")
    port = 61440 + ((_number("SLURM_JOB_ID") or 0) + 7 * (_number("SLURM_STEP_ID") or 0)) % 4096
    alone = re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    devices = None if alone else _device_of_rank(_number("SLURM_LOCALID"))
    return _Place(count, _number("SLURM_PROCID") or 0, f"{host}:{port}", devices)


def _open_mpi() -> _Place | None:
    """A rank of `mpirun` among several; across hosts it does not say where rank 0 is."""
    count, here = _number("OMPI_COMM_WORLD_SIZE") or 1, _number("OMPI_COMM_WORLD_LOCAL_SIZE")
    if count == 1:
        return None
    # Jobs may share a host, so the port follows the job's name, as version 5 or 4 gives it.
    names = map(os.environ.get, ("PMIX_NAMESPACE", "OMPI_MCA_orte_hnp_uri"))
    port = 61440 + zlib.crc32(next(filter(None, names), "").encode()) % 4096
    coordinator = f"127.0.0.1:{port}" if here == count else None
    devices = None if here == 1 else _device_of_rank(_number("OMPI_COMM_WORLD_LOCAL_RANK"))
    return _Place(count, _number("OMPI_COMM_WORLD_RANK") or 0, coordinator, devices)


def _device_of_rank(local_rank: int | None) -> list[int] | None:
    """The GPU of one of several processes on a host, unless the launcher shows it just one."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return None if local_rank is None or (shown and "," not in shown) else [local_rank]


def _in_indexed_job() -> bool:
    """Whether this is a pod of a Kubernetes Job that numbers its pods."""
    if not {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys():
        return False
    if importlib.util.find_spec("kubernetes") is None:
        raise UserError(
            "this is a pod of an indexed Kubernetes Job, but the package that finds the others is "
            "not installed; pass --distributed.coordinator, --distributed.num_processes and "
            "--distributed.process_id as launch/kubernetes-jobset.yaml does, or "
            "pip install kubernetes"
        )
    return True


def _number(variable: str) -> int | None:
    value = os.environ.get(variable, "")
    return int(value) if value.isdigit() else None
