"""What asks a run to stop, sent to this very process."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.contract.tiny import overrides
from trainer import signals
from trainer.errors import StopRequested
from trainer.run.checkpoint import checkpoints_in
from trainer.signals import StopSignal, hold_stop_signals, stop_signals

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"]


def send(number, times=1):
    for _ in range(times):
        os.kill(os.getpid(), number)


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def stderr_in(path):
    kept = os.dup(2)
    with open(path, "wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield path
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@pytest.fixture
def ended(monkeypatch):
    """Exit statuses that the process would have ended with."""
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    return statuses


@pytest.mark.parametrize("name", NAMES)
def test_a_request_is_heard_and_gets_its_word(name, tmp_path):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    # In a file, as capfd empties what it has read, and loses what the thread writes in between.
    with stderr_in(tmp_path / "said") as told, StopSignal("saving, then leaving") as stop:
        assert not stop.requested
        send(number)
        assert (stop.requested, stop.name) == (True, name)
        wait_for(lambda: told.read_text().endswith("\n"))
    said = told.read_text()
    assert said.startswith(f"{name} received: saving, then leaving")
    assert ("Ctrl-C again" in said) == (name == "SIGINT")
    assert signal.getsignal(number) == before and signal.set_wakeup_fd(-1) == -1
    assert "signals" not in [thread.name for thread in threading.enumerate()]


def test_a_guest_passes_on_what_it_was_asked(ended, capfd):
    """The process is not ended; what it does when asked so, it does after the run has saved."""
    saved, before = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), signals.as_guest(), StopSignal():
        send(signal.SIGINT)
        saved.append(True)
    assert saved and not ended and signal.getsignal(signal.SIGINT) == before
    with StopSignal():
        send(signal.SIGINT)  # of nobody's guest nothing is passed on


def test_a_second_ctrl_c_leaves_a_guest_at_once_and_the_process_lives(ended, monkeypatch):
    monkeypatch.setattr(signals, "_SAME_CTRL_C", 0.0)
    with pytest.raises(KeyboardInterrupt), signals.as_guest(), StopSignal():
        send(signal.SIGINT)
        send(signal.SIGINT)
        pytest.fail("it went on")
    assert not ended


def test_a_handler_that_python_did_not_set_stays(monkeypatch):
    get = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda n: None if n == signal.SIGUSR2 else get(n))
    assert signal.SIGUSR2 not in stop_signals() and signal.SIGUSR1 in stop_signals()


def test_one_process_of_several_speaks(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with StopSignal() as stop:
        send(signal.SIGTERM)
    assert stop.requested and capfd.readouterr().err == ""


def test_a_request_waits_for_who_listens():
    hold_stop_signals()
    # To this thread, as other threads of a test process hold nothing back.
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # else the end of this process
    with StopSignal() as stop:
        wait_for(lambda: stop.requested)


def test_under_nohup_a_closed_terminal_is_not_heard():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
        with StopSignal() as stop:
            send(signal.SIGHUP)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in stop_signals()


def test_a_second_ctrl_c_ends_the_process_at_once(monkeypatch, ended, capfd):
    monkeypatch.setattr(signals, "_SAME_CTRL_C", 0.0)
    with StopSignal():
        send(signal.SIGINT)
        time.sleep(0.02)
        send(signal.SIGINT)
        wait_for(lambda: ended)
    assert ended == [130] and "left at once" in capfd.readouterr().err


def test_a_ctrl_c_that_a_launcher_passes_on_is_the_same_one(ended):
    with StopSignal() as stop:
        send(signal.SIGINT, times=3)
    assert stop.requested and not ended


def test_a_second_sigterm_is_only_asked_for_again(monkeypatch, ended):
    monkeypatch.setattr(signals, "_SAME_CTRL_C", 0.0)
    with StopSignal() as stop:
        send(signal.SIGTERM, times=3)
    assert stop.requested and not ended


def test_with_nothing_to_save_a_request_leaves_where_it_stands():
    with StopSignal() as stop:
        with pytest.raises(StopRequested), stop.at_once():
            send(signal.SIGTERM)
            raise AssertionError("not reached")
        with pytest.raises(StopRequested), stop.at_once():
            raise AssertionError("not reached either: it is asked for already")
        send(signal.SIGTERM)  # outside, it is a request again


def test_no_handler_for_failures_swallows_it():
    with StopSignal() as stop, pytest.raises(StopRequested), stop.at_once():
        try:
            send(signal.SIGTERM)
        except Exception:
            raise AssertionError from None


def test_on_another_thread_nothing_is_heard_and_nothing_fails():
    def work():
        with StopSignal() as stop:
            found.append(stop.requested)

    found: list[bool] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


# -- processes -----------------------------------------------------------------------------------------------------


def command(path, *words):
    return [sys.executable, str(ROOT / "mytrainer.py"), *overrides("gpt2", f"output_dir={path}", *words)]


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves(tmp_path):
    run = tmp_path / "run"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, command(run, "num_iterations=100000", "val_loss_every=0"))
    seen = b""
    while b"100000  loss" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(checkpoints_in(run)) == 1 and not (run / "summary.json").exists()


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_goes_on_to_its_end(tmp_path):
    process = subprocess.Popen(
        command(tmp_path / "run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    process.stdout.readline()
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "Error" not in errors, errors
    assert (tmp_path / "run/report.html").exists()


@pytest.mark.slow
def test_a_second_ctrl_c_in_the_middle_of_a_save(tmp_path):
    """It ends in the save, which leaves no half of a checkpoint under its name, and says nothing of torch's."""
    sizes = ["model_cfg.d_model=1024", "model_cfg.n_layers=4", "save_steps=1", "val_loss_every=0"]
    process = subprocess.Popen(
        command(tmp_path / "run", *sizes), stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    wait_for(lambda: list(tmp_path.glob("run/.checkpoint-*")), seconds=120)
    process.send_signal(signal.SIGINT)
    time.sleep(2 * signals._SAME_CTRL_C)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (0, 130), errors  # 0: the save was over before
    assert "Traceback" not in errors and "enforce" not in errors
    assert all((checkpoint / "digests.json").exists() for checkpoint in checkpoints_in(tmp_path / "run"))
