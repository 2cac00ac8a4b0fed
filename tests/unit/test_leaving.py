"""How the process ends: quickly, but with all that an ordinary end does that somebody could miss."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from snapshotter.core.digest import sha256


def ended(program: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """A process whose last act is `leave`."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys\nfrom snapshotter.__main__ import leave\n{program}"],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("code", [0, 3, 130])
def test_the_code_is_the_commands(code: int) -> None:
    assert ended(f"leave({code})").returncode == code


def test_nothing_said_is_lost() -> None:
    done = ended("sys.stdout.write('x' * 100_000 + 'out'); sys.stderr.write('err'); leave(4)")
    assert (done.returncode, done.stdout[-4:], done.stderr) == (4, "xout", "err")


def test_what_others_registered_for_the_end_is_done() -> None:
    done = ended("import atexit; atexit.register(print, 'done'); leave(0)")
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_a_thread_at_work_is_waited_for() -> None:
    work = "import threading, time; threading.Thread(target=lambda: (time.sleep(0.3), print('worked'))).start()"
    done = ended(f"{work}; leave(5)")
    assert (done.returncode, done.stdout) == (5, "worked\n")


def test_output_that_could_not_be_written_is_no_success() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        done = ended("sys.stdout.write('lost'); leave(0)", stdout=full)
    finally:
        os.close(full)
    assert done.returncode != 0
    assert "No space left" in done.stderr


def test_our_digest_is_everybodys() -> None:
    """Ids of targets and hosts are in the labels of sets that other versions and interpreters made."""
    assert sha256(b"abc").hexdigest() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
