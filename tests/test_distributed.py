"""How a process finds the others: by its flags, or by what the cluster's launcher left behind."""

import importlib.util
import os

import jax
import pytest

from gpt2_jax.errors import UserError
from gpt2_jax.training.distributed import agree, check_same, is_primary, join_cluster
from gpt2_jax.training.settings import DistributedSettings

SLURM = {
    "SLURM_JOB_ID": "123457",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
NOTHING = DistributedSettings()


@pytest.fixture
def calls(monkeypatch):
    """What `jax.distributed.initialize` is called with, by a process that no launcher started."""
    launchers = ("SLURM_", "OMPI_", "PMIX_", "KUBERNETES_", "JOB_COMPLETION_", "CUDA_VISIBLE_")
    for name in list(os.environ):
        if name.startswith(launchers):
            monkeypatch.delenv(name)
    found = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: found.append(given))
    preemption = jax.config.jax_enable_preemption_service
    yield found
    jax.config.update("jax_enable_preemption_service", preemption)


def place(call):
    """Whom a process was told to join: coordinator, their number, its own, and its devices."""
    names = ("coordinator_address", "num_processes", "process_id", "local_device_ids")
    return tuple(call[name] for name in names)


def under(monkeypatch, *environments, **changes):
    for name, value in {k: v for env in environments for k, v in env.items()}.items():
        monkeypatch.setenv(name, value)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)


def test_a_process_by_itself_joins_nobody(calls, capsys):
    join_cluster(NOTHING)
    assert calls == []
    assert capsys.readouterr() == ("", "")
    assert is_primary()
    assert agree(17) == 17
    check_same("settings", "of nobody else")


def test_flags_say_it_all(calls):
    join_cluster(DistributedSettings("node1:9876", 4, 2))
    (call,) = calls
    assert place(call) == ("node1:9876", 4, 2, None)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_on_one_host_nobody_outside_can_connect(calls, host):
    join_cluster(DistributedSettings(f"{host}:9876", 2, 0))
    assert calls[0]["coordinator_bind_address"] == f"{host}:9876"
    join_cluster(DistributedSettings("127.0.0.1.example.org:9876", 2, 0))
    assert calls[1]["coordinator_bind_address"] is None


@pytest.mark.parametrize("environment", [SLURM, OPEN_MPI, KUBERNETES])
def test_flags_win_over_a_launcher(calls, monkeypatch, environment):
    under(monkeypatch, environment)
    join_cluster(DistributedSettings("10.0.0.2:5000", 8, 7))
    assert place(calls[0])[:3] == ("10.0.0.2:5000", 8, 7)


@pytest.mark.parametrize("environment", [SLURM, OPEN_MPI])
def test_a_flag_may_say_what_the_launcher_does_not_know(calls, monkeypatch, environment):
    under(monkeypatch, environment)
    join_cluster(DistributedSettings(coordinator="10.0.0.2:5000"))
    count = 2 if environment is SLURM else 4
    assert place(calls[0])[:3] == ("10.0.0.2:5000", count, count - 1)


def test_a_shell_of_a_slurm_job_hides_no_device_from_flags(calls, monkeypatch):
    """JAX itself would take SLURM_LOCALID for a number of a GPU, and leave the others idle."""
    under(monkeypatch, SLURM)
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    join_cluster(DistributedSettings("127.0.0.1:5000", 2, 0))
    assert calls[0]["local_device_ids"] is None
    assert calls[0]["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ((None, 2, 0), "coordinator"),
        (("a:1", None, 0), "num_processes"),
        (("a:1", 2, None), "process_id"),
        ((None, None, 0), "coordinator"),
    ],
)
def test_flags_go_together(calls, flags, missing):
    with pytest.raises(UserError, match=f"--distributed.{missing} is missing"):
        join_cluster(DistributedSettings(*flags))
    assert calls == []


@pytest.mark.parametrize(
    "coordinator",
    ["", "node1", "node1:", ":9876", "node1:port", "node1:0", "node1:65536", "node1:-1", "a:1.5"],
)
def test_a_coordinator_is_host_and_port(calls, coordinator):
    with pytest.raises(UserError, match=r"distributed.coordinator=.* must be HOST:PORT"):
        join_cluster(DistributedSettings(coordinator, 2, 0))
    assert calls == []


@pytest.mark.parametrize(("count", "process"), [(2, 2), (2, -1), (0, 0), (-1, 0), (1, 5)])
def test_the_number_of_a_process_is_below_their_count(calls, count, process):
    with pytest.raises(UserError, match=rf"process_id={process} .*num_processes={count}"):
        join_cluster(DistributedSettings("a:1", count, process))
    assert calls == []


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("gpu-a,gpu-b", "gpu-a"),
        ("node[1-2]", "node1"),
        ("node[001-004,007]", "node001"),
        ("node[3,7-9],other", "node3"),
        ("rack2-node08,node[1-2]", "rack2-node08"),
        ("node10.cluster.example", "node10.cluster.example"),
    ],
)
def test_slurm_tasks_meet_on_the_first_node(calls, monkeypatch, nodes, first):
    under(monkeypatch, SLURM, SLURM_STEP_NODELIST=nodes)
    join_cluster(NOTHING)
    (address, count, process, _) = place(calls[0])
    host, port = address.split(":")
    assert (host, count, process) == (first, 2, 1)
    assert 1024 < int(port) < 2**16
    assert calls[0]["coordinator_bind_address"] is None


def test_slurm_on_one_node_stays_on_loopback(calls, monkeypatch):
    under(monkeypatch, SLURM, SLURM_STEP_NUM_NODES="1")
    join_cluster(NOTHING)
    address = calls[0]["coordinator_address"]
    host, port = address.split(":")
    assert host == "127.0.0.1"
    assert 1024 < int(port) < 2**16
    assert calls[0]["coordinator_bind_address"] == address
    # The same in every process of the job, another in the next job.
    under(monkeypatch, SLURM_PROCID="0", SLURM_LOCALID="0")
    join_cluster(NOTHING)
    assert place(calls[1]) == (address, 2, 0, [0])
    under(monkeypatch, SLURM_JOB_ID="123458")
    join_cluster(NOTHING)
    assert calls[2]["coordinator_address"] != address


@pytest.mark.parametrize("environment", [SLURM, OPEN_MPI])
def test_of_several_processes_on_a_host_each_has_its_own_device(calls, monkeypatch, environment):
    under(monkeypatch, environment)
    for shown, devices in [("0,1,2,3", [1]), ("", [1]), ("3", None)]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        join_cluster(DistributedSettings(coordinator="node1:5000"))
        assert calls[-1]["local_device_ids"] == devices


@pytest.mark.parametrize("tasks", ["1", "1(x2)"])
def test_a_slurm_task_alone_on_its_host_has_all_devices(calls, monkeypatch, tasks):
    under(monkeypatch, SLURM, SLURM_STEP_TASKS_PER_NODE=tasks, SLURM_LOCALID="0")
    join_cluster(NOTHING)
    assert calls[0]["local_device_ids"] is None
    under(monkeypatch, SLURM_STEP_TASKS_PER_NODE="2(x2)")
    join_cluster(NOTHING)
    assert calls[1]["local_device_ids"] == [0]


def test_an_open_mpi_rank_alone_on_its_host_has_all_devices(calls, monkeypatch):
    under(monkeypatch, OPEN_MPI, OMPI_COMM_WORLD_LOCAL_SIZE="1", OMPI_COMM_WORLD_LOCAL_RANK="0")
    join_cluster(DistributedSettings(coordinator="node1:5000"))
    assert calls[0]["local_device_ids"] is None


@pytest.mark.parametrize("changes", [{"SLURM_NTASKS": "1"}, {"SLURM_NTASKS": ""}])
def test_a_single_slurm_task_joins_nobody(calls, monkeypatch, changes):
    under(monkeypatch, SLURM, **changes)
    join_cluster(NOTHING)
    assert calls == []


def test_the_shell_of_a_slurm_job_joins_nobody(calls, monkeypatch):
    """An sbatch script, or salloc: there is a job of many tasks, but srun did not start this."""
    under(monkeypatch, {name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS")})
    join_cluster(NOTHING)
    assert calls == []


def test_open_mpi_on_many_nodes_needs_a_coordinator(calls, monkeypatch):
    under(monkeypatch, OPEN_MPI)
    with pytest.raises(UserError, match=r"--distributed\.coordinator is missing"):
        join_cluster(NOTHING)
    assert calls == []


def test_open_mpi_on_one_node_stays_on_loopback(calls, monkeypatch):
    under(monkeypatch, OPEN_MPI, OMPI_COMM_WORLD_LOCAL_SIZE="4")
    join_cluster(NOTHING)
    (address, count, process, devices) = place(calls[0])
    assert address.startswith("127.0.0.1:")
    assert (count, process, devices) == (4, 3, [1])
    assert calls[0]["coordinator_bind_address"] == address


@pytest.mark.parametrize("name", ["OMPI_MCA_orte_hnp_uri", "PMIX_NAMESPACE"])
def test_open_mpi_ranks_of_a_job_meet_and_no_others(calls, monkeypatch, name):
    """Under version 4 and 5, and though each rank be wrapped in a shell: no parent is asked."""
    under(monkeypatch, OPEN_MPI, OMPI_COMM_WORLD_LOCAL_SIZE="4")
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri")
    for parent, job in [(1000, "prterun-node1-7@1"), (1001, "prterun-node1-7@1"), (1000, "8@1")]:
        monkeypatch.setattr(os, "getppid", lambda parent=parent: parent)
        monkeypatch.setenv(name, job)
        join_cluster(NOTHING)
    first, second, other = (call["coordinator_address"] for call in calls)
    assert first == second != other


def test_a_single_open_mpi_rank_joins_nobody(calls, monkeypatch):
    under(monkeypatch, OPEN_MPI, OMPI_COMM_WORLD_SIZE="1", OMPI_COMM_WORLD_LOCAL_SIZE="1")
    join_cluster(NOTHING)
    assert calls == []


def test_kubernetes_is_left_to_jax(calls, monkeypatch):
    under(monkeypatch, KUBERNETES)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: "it is there")
    join_cluster(NOTHING)
    assert calls == [{}]


def test_kubernetes_needs_the_package_that_jax_asks_it_with(calls, monkeypatch):
    under(monkeypatch, KUBERNETES)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"not installed; pass --distributed\.coordinator"):
        join_cluster(NOTHING)
    assert calls == []


@pytest.mark.parametrize("name", KUBERNETES)
def test_a_pod_that_is_not_of_an_indexed_job_joins_nobody(calls, monkeypatch, name):
    under(monkeypatch, {name: KUBERNETES[name]})
    join_cluster(NOTHING)
    assert calls == []


@pytest.mark.parametrize("value", ["", "two", "-2", "2.0", "1(x2)"])
def test_variables_that_make_no_sense_are_no_launcher(calls, monkeypatch, value):
    under(monkeypatch, SLURM, SLURM_NTASKS=value)
    under(monkeypatch, OMPI_COMM_WORLD_SIZE=value)
    join_cluster(NOTHING)
    assert calls == []


@pytest.mark.usefixtures("calls")
def test_jax_leaves_sigterm_to_the_run():
    """Its own preemption service would take the signal away on the hosts of a cluster."""
    join_cluster(DistributedSettings("a:1", 2, 0))
    assert not jax.config.jax_enable_preemption_service


@pytest.mark.parametrize("error", [RuntimeError, ValueError, OSError])
def test_others_that_do_not_answer_are_one_line(calls, monkeypatch, error):
    def fail(*_, **__):
        raise error("DEADLINE_EXCEEDED")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match=r"cannot join .*DEADLINE_EXCEEDED.*process 0"):
        join_cluster(DistributedSettings("a:1", 2, 1))
    assert calls == []
