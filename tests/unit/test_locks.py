"""An output folder is written by one process at a time, and a dead holder keeps nobody out."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from igd_ds import locks
from igd_ds.errors import UsageError
from igd_ds.folders import claim, new_folder
from igd_ds.locks import LOCK, Holder, acquire, held, holding, release
from igd_ds.process import Process

FORK = multiprocessing.get_context("fork")


def contend(folder: Path, gate, index: int) -> None:
    """Claim a folder when all contenders are ready, and end when all have tried."""
    gate.wait(20)
    code = 0
    try:
        claim(folder, "config.yaml", "--output_dir", "run")
    except UsageError as error:
        code = 2
        (folder.parent / f"message-{index}").write_text(str(error))
    gate.wait(20)
    os._exit(code)  # as after a kill, the lock stays


@pytest.mark.parametrize("left", ["nothing", "the lock of a dead holder", "a damaged lock"])
def test_of_many_processes_that_start_at_once_one_gets_the_folder(tmp_path, left):
    run = tmp_path / "run"
    if left != "nothing":
        run.mkdir()
        (run / LOCK).write_text("" if "damaged" in left else dead_holder().to_json())
        os.utime(run / LOCK, (0, 0))

    gate = FORK.Barrier(12)
    processes = [FORK.Process(target=contend, args=(run, gate, i)) for i in range(12)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)

    codes = [process.exitcode for process in processes]
    assert sorted(codes) == [0] + [2] * 11
    winner = processes[codes.index(0)].pid
    for path in tmp_path.glob("message-*"):
        message = path.read_text()
        assert message.startswith(f"--output_dir {run} is in use by process {winner} on ")
        assert message.endswith(": wait until it ends, or stop it")


def dead_holder() -> Holder:
    """Return a holder on this host whose process has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    process = dataclasses.replace(Process.here(), pid=child.pid)
    return dataclasses.replace(Holder.here(), processes=(process,))


def changed(**changes) -> Holder:
    """Return a holder like this process, but for some fields of its process."""
    here = Holder.here()
    return dataclasses.replace(here, processes=(dataclasses.replace(Process.here(), **changes),))


def test_a_holder_whose_number_another_process_has_now_is_dead(tmp_path):
    lock = tmp_path / LOCK
    lock.write_text(changed(pid=os.getppid(), started=time.time() - 1e6).to_json())
    assert acquire(lock, "RUN")
    release(lock)
    assert not lock.exists()


def test_a_zombie_holds_nothing(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    process = Process(**vars(Process.here()) | {"pid": child.pid})
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.runs() is False
    child.wait()


def test_a_holder_on_another_host_is_removed_by_hand(tmp_path):
    lock = tmp_path / LOCK
    lock.write_text(changed(host="node7", pid=41).to_json())
    with pytest.raises(UsageError) as caught:
        acquire(lock, "--output_dir RUN")
    message = str(caught.value)
    assert message.startswith("--output_dir RUN is in use by process 41 on node7, since ")
    assert message.endswith(f"If that process no longer runs there, remove {lock}")


def test_a_slurm_job_that_was_requeued_takes_its_own_lock_over(tmp_path, monkeypatch):
    lock = tmp_path / LOCK
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    lock.write_text(changed(host="node7").to_json())
    with pytest.raises(UsageError):  # the same start of the job
        acquire(lock, "RUN")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert acquire(lock, "RUN")
    release(lock)


def test_a_rank_that_outlived_rank_0_is_named(tmp_path):
    lock = tmp_path / LOCK
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        started = psutil.Process(child.pid).create_time()
        rank_1 = dataclasses.replace(Process.here(1), pid=child.pid, started=started)
        holder = dead_holder()
        holder = dataclasses.replace(holder, processes=(*holder.processes, rank_1))
        lock.write_text(holder.to_json())
        with pytest.raises(UsageError, match=rf"in use by process {child.pid} \(rank 1\) on "):
            acquire(lock, "RUN")
    finally:
        child.kill()
        child.wait()
    assert acquire(lock, "RUN")
    release(lock)


def test_a_lock_names_all_ranks(tmp_path, monkeypatch):
    here = Process.here()
    ranks = (here, dataclasses.replace(here, pid=99, rank=1))
    monkeypatch.setattr(locks, "_ranks", ranks)
    with holding(tmp_path / LOCK, "RUN"), open(tmp_path / LOCK) as file:
        found = Holder.read(file)
    assert found.processes == ranks and found.processes[0].pid == os.getpid()


def test_a_process_may_take_its_lock_again_and_a_child_does_not_give_it_back(tmp_path):
    lock = tmp_path / LOCK
    with holding(lock, "RUN"):
        with holding(lock, "RUN"):
            pass
        child = FORK.Process(target=locks.release_all)
        child.start()
        child.join()
        assert lock.exists() and lock in held()
    assert not lock.exists() and lock not in held()


def test_a_lock_that_another_process_has_now_is_not_removed(tmp_path):
    lock = tmp_path / LOCK
    acquire(lock, "RUN")
    lock.write_text(changed(host="node7").to_json())  # removed by hand, and taken
    release(lock)
    assert lock.exists()


def test_a_folder_that_is_made_in_one_go_is_made_by_one_process(tmp_path):
    target = tmp_path / "DATASET"
    (tmp_path / "DATASET.lock").write_text(changed(host="node7").to_json())
    with pytest.raises(UsageError, match="DATASET is in use by process"), new_folder(target):
        pass
    (tmp_path / "DATASET.lock").write_text(dead_holder().to_json())
    with new_folder(target):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["DATASET"]


STOPPED = """
import signal, sys, time
from pathlib import Path
from igd_ds import locks

locks.acquire(Path(sys.argv[1]), "RUN")
locks.end_at(signal.SIGTERM, 143)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_signal_ends_a_process_and_gives_its_lock_back(tmp_path):
    lock = tmp_path / LOCK
    child = subprocess.Popen([sys.executable, "-c", STOPPED, lock], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n" and lock.exists()
    child.send_signal(signal.SIGTERM)
    assert child.wait(10) == 143 and not lock.exists()
