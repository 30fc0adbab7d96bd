"""The lock of a run folder."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from embedjax import lock
from embedjax.config.errors import StorageError

HOLDER = "import sys, time; from embedjax import lock\nwith lock.hold(sys.argv[1]): print('held', flush=True); time.sleep(60)"


def test_the_second_is_told_who_holds_the_folder(tmp_path):
    with lock.hold(tmp_path / "runs" / "a"):
        with pytest.raises(StorageError, match=rf"runs/a is held by process {os.getpid()} on .* since 20\d\d-") as caught:
            lock.hold(tmp_path / "runs" / "a").__enter__()
        assert socket.gethostname() in str(caught.value) and caught.value.code == 4
        with lock.hold(tmp_path / "runs" / "b"):
            pass
    with lock.hold(tmp_path / "runs" / "a"):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match=f"held by process {holder.pid} on"):
            lock.hold(tmp_path).__enter__()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with lock.hold(tmp_path):
        pass


def test_an_error_in_the_block_lets_go(tmp_path):
    with pytest.raises(KeyError), lock.hold(tmp_path):
        raise KeyError
    with lock.hold(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="lock cannot be made: Not a directory"):
        lock.hold(tmp_path / "file" / "run").__enter__()
