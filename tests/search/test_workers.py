"""Several workers of one sweep, some of them killed: no trial is lost, and none is run twice."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import write_tiny_bert
from optuna.trial import TrialState
from sweeping import base, begun, end_of, pretend, rows, start_worker

from bertpair import Config, sweep
from bertpair.search import study
from bertpair.search.space import read_sweep
from bertpair.search.study import Study

pytestmark = pytest.mark.slow
PLAN: dict[str, Any] = {
    "space": {"weight_decay": [0.0, 0.1], "learning_rate": [1e-3, 2e-3, 3e-3]},
    "seeds": 2,
}
LINES = [(i, "a cat", word, label) for i, (word, label) in enumerate([("sat", "yes"), ("mat", "no")] * 6)]
ALL = Counter(f"trial-{k:03} {seed}" for k in range(6) for seed in (42, 43))


@pytest.fixture(autouse=True)
def files(fresh_process: None, tmp_path: Path, write_tsv: Callable[..., Path]) -> None:
    write_tiny_bert(tmp_path / "tiny")
    write_tsv("train.tsv", LINES, ("index", "text_a", "text_b", "label"))
    write_tsv("dev.tsv", LINES[:5], ("index", "text_a", "text_b", "label"))


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """A PostgreSQL server of its own on loopback: the URL of its database."""
    servers = [shutil.which("postgres"), *map(str, Path("/usr/lib/postgresql").glob("*/bin/postgres"))]
    programs = next((Path(server).parent for server in servers if server), None)
    is_root = os.getuid() == 0  # whom the server refuses: Debian's package has an account for it
    names = {entry.pw_name for entry in pwd.getpwall()}
    if programs is None or (is_root and "postgres" not in names):
        pytest.skip("there is no PostgreSQL")
    owner = pwd.getpwnam("postgres") if is_root else pwd.getpwuid(os.getuid())
    as_owner: dict[str, Any] = {}
    if is_root:
        as_owner = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    folder = Path(tempfile.mkdtemp(prefix="bertpair-postgres-"))
    os.chown(folder, owner.pw_uid, owner.pw_gid)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    made = [programs / "initdb", "-D", folder / "data", "-A", "trust", "-U", "owner", "--no-sync"]
    subprocess.run(made, check=True, timeout=60, **quiet, **as_owner)
    run = [programs / "postgres", "-D", folder / "data", "-k", folder, "-h", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen([*run, "-F"], **quiet, **as_owner)
    try:
        yield f"postgresql://owner@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)
        shutil.rmtree(folder)


def connected(url: str) -> None:
    """Wait until the server answers."""
    import psycopg

    end = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError:
            assert time.monotonic() < end
            time.sleep(0.1)


def states(config: Config, plan: dict[str, Any]) -> Counter[TrialState]:
    """How many trials of each state the storage holds."""
    url = plan.get("storage") or f"sqlite:///{config.output_dir}/sweep.db"
    storage = optuna.storages.RDBStorage(url)
    (found,) = storage.get_all_studies()
    trials = storage.get_all_trials(found._study_id)
    storage.remove_session()
    storage.engine.dispose()
    return Counter(trial.state for trial in trials if trial.datetime_start is not None)


def test_two_workers_share_the_trials_and_run_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, seconds=0.1)
    one, two = (start_worker(base(), PLAN) for _ in range(2))
    assert end_of(one) == end_of(two) == 0
    assert Counter(begun(Path("out"))) == ALL
    workers = {line.split()[0] for line in Path("out/.begun").read_text().splitlines()}
    assert workers == {str(one), str(two)}
    assert states(base(), PLAN) == {TrialState.COMPLETE: 6}
    alone = sweep(base("alone"), PLAN)
    assert rows(sweep(base(), PLAN)) == rows(alone)
    tables = [Path(name, "sweep_results.tsv").read_text().splitlines() for name in ("out", "alone")]
    one_table, other_table = ([line.split("\t")[:7] for line in table] for table in tables)
    assert one_table == other_table


def test_a_worker_that_is_killed_loses_its_trial_to_another_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, seconds=0.3)
    victim = start_worker(base(), PLAN)
    while not Path("out/.begun").exists():
        time.sleep(0.01)
    other = start_worker(base(), PLAN)
    while len(begun(Path("out"))) < 4:
        time.sleep(0.01)
    os.kill(victim, signal.SIGKILL)
    assert end_of(victim) == -signal.SIGKILL and end_of(other) == 0
    ran = Counter(begun(Path("out")))
    assert not ALL - ran and (ran - ALL).total() <= 1  # what the dead worker had begun
    assert rows(sweep(base(), PLAN)) == rows(sweep(base("alone"), PLAN))


def test_a_sweep_that_is_killed_again_and_again_ends_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, seconds=0.05)
    kills = 0
    for wait in (0.05, 0.2, 0.35, 0.5, 0.7, 0.9):
        worker = start_worker(base(), PLAN)
        time.sleep(wait)
        os.kill(worker, signal.SIGKILL)
        kills += end_of(worker) == -signal.SIGKILL
    result = sweep(base(), PLAN)
    assert kills >= 3 and len(result.trials) == 6
    assert rows(result) == rows(sweep(base("whole"), PLAN))
    assert (Counter(begun(Path("out"))) - ALL).total() <= kills


def test_a_trial_of_another_machine_is_taken_up_when_no_sign_of_life_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(study, "BEAT_SECONDS", 1)
    monkeypatch.setattr(study, "DEAD_SECONDS", 2)
    pretend(monkeypatch)
    Path("out").mkdir()
    elsewhere = Study(read_sweep({**PLAN, "metric": "acc"}, base()), Path("out").absolute(), "x" * 64, None)
    elsewhere.place = "another machine"
    with pytest.raises(KeyboardInterrupt), elsewhere.claim() as claim:
        assert claim is not None and claim.point == 0
        monkeypatch.setattr(elsewhere, "_end", lambda *given: None)  # its worker dies without a word
        raise KeyboardInterrupt
    here = Study(elsewhere.sweep, Path("out").absolute(), "x" * 64, None)
    with here.claim() as claim:
        assert claim is not None and claim.point == 1
    time.sleep(3.5)
    with here.claim() as claim:
        assert claim is not None and claim.point == 0


def test_points_that_two_workers_enqueued_at_once_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    done = pretend(monkeypatch)
    enqueue = Study.enqueue

    def twice(self: Study) -> None:
        if not self.points():
            for point, params in enumerate(self._draw()):
                self.study.enqueue_trial(params, user_attrs={"point": point})
                self.study.enqueue_trial(params, user_attrs={"point": point})
        enqueue(self)

    monkeypatch.setattr(Study, "enqueue", twice)
    result = sweep(base(), PLAN)
    assert len(result.trials) == 6 and len(done) == 12


def test_workers_on_a_postgresql_server_share_the_trials(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected(database)
    pretend(monkeypatch, seconds=0.2)
    plan = {**PLAN, "storage": database}
    workers = [start_worker(base(name), plan) for name in ("here", "there")]  # as on two machines
    assert [end_of(worker) for worker in workers] == [0, 0]
    assert Counter(begun(Path("here")) + begun(Path("there"))) == ALL
    assert states(base("here"), plan) == {TrialState.COMPLETE: 6}
    result = rows(sweep(base("here"), plan))
    assert result == rows(sweep(base("there"), plan)) == rows(sweep(base("alone"), PLAN))
