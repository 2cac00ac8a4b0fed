"""A live systemd for tests: pid 1 of namespaces of its own (pid, mount, cgroup, uts), on this machine or in the
lab's.

Nothing of the host is in its reach: /run, /etc/systemd, /var/lib/systemd and /etc/cron.d are empty and its own,
no generator runs, and of the distribution's units it sees only the few targets that timers and services need.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.host import service
from tests.support import CHECKOUT

SYSTEMD = "/usr/lib/systemd/systemd"
BOOT = """
set -e
mount --make-rprivate /
# A copy of another test's mount would keep its device busy when that test is over.
while read -r device point rest; do
    case "$device" in /dev/loop*) umount -l "$(printf %%b "$point")" || true ;; esac
done </proc/self/mounts
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
umount -R /sys/fs/cgroup 2>/dev/null || true
mkdir -p /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
if [ -d /run/udev ]; then exec 9</run/udev; fi
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/systemd/system /run/lock /run/units /run/udev
# LVM asks there whether there is an udev, and waits for it.
if [ -e /proc/self/fd/9 ]; then mount --no-canonicalize --bind /proc/self/fd/9 /run/udev; exec 9<&-; fi
cd /usr/lib/systemd/system
cp basic.target sysinit.target sockets.target timers.target paths.target slices.target \\
    local-fs.target shutdown.target time-set.target time-sync.target network-online.target network.target /run/units/
cd /
mount --bind /run/units /usr/lib/systemd/system
mkdir -p /var/lib/systemd /etc/cron.d
mkdir -p "$1/system"
mount --bind "$1" /etc/systemd
for place in /usr/lib/systemd/system-generators /var/lib/systemd /etc/cron.d; do
    mount -t tmpfs -o mode=755 tmpfs $place
done
export container=snapshotter-test
exec %s --system --unit=basic.target --log-target=null --show-status=no
"""


class Systemd:
    """Runs programs inside, where `systemctl` reaches it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def enter(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["nsenter", "-t", str(self.pid), "-p", "-m", "-C", "-u", "--wd=/", "--", *words],
            capture_output=True,
            text=True,
            check=check,
            stdin=subprocess.DEVNULL,
            timeout=300,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        )

    def write(self, path: str, content: str) -> None:
        """A file inside."""
        Path(f"/proc/{self.pid}/root{path}").write_text(content)

    def read(self, path: str) -> str:
        return Path(f"/proc/{self.pid}/root{path}").read_text()

    def unit(self, name: str, content: str) -> None:
        """A unit in /etc/systemd/system, loaded."""
        self.write(f"/etc/systemd/system/{name}", content)
        self.enter("systemctl", "daemon-reload")

    def show(self, unit: str, wanted: str) -> str:
        return self.enter("systemctl", "show", f"--property={wanted}", "--value", "--", unit).stdout.strip()


@contextlib.contextmanager
def booted(work: Path) -> Iterator[Systemd]:
    """systemd as pid 1 until the end of the `with`; then all that it started is gone, and its cgroup. What is in its
    /etc/systemd stays in `work`, and is there again at the next boot."""
    if os.geteuid() != 0:
        pytest.skip("needs root: namespaces")
    if not os.path.exists(SYSTEMD):
        pytest.skip("needs systemd's program")
    top = service.cgroup2()
    if top is None:
        pytest.skip("needs the unified cgroup hierarchy")
    script = work / "boot"
    script.write_text(BOOT % SYSTEMD)
    group = Path(top) / f"snapshotter-test-{uuid.uuid4().hex[:8]}"
    group.mkdir()
    with open(work / "boot.log", "wb") as log:
        process = subprocess.Popen(
            ["sh", "-c", f'echo $$ >{group}/cgroup.procs && exec unshare --pid --mount --cgroup --uts --fork '
             '--mount-proc --kill-child=SIGKILL sh "$0" "$1"', str(script), str(work / "etc-systemd")],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        made = Systemd(_inside_of(process.pid))
        give_up = time.monotonic() + 120
        while made.enter("systemctl", "is-active", "basic.target", check=False).stdout.strip() != "active":
            said = (work / "boot.log").read_text()
            assert process.poll() is None and time.monotonic() < give_up, f"systemd did not start: {said}"
            time.sleep(0.2)
        yield made
    finally:
        process.kill()  # and its child with it: that is pid 1 of all others
        process.wait(30)
        give_up = time.monotonic() + 60
        while group.exists() and time.monotonic() < give_up:
            for directory, _, _ in os.walk(group, topdown=False):
                try:
                    os.rmdir(directory)
                except OSError:
                    time.sleep(0.1)


def _inside_of(pid: int) -> int:
    """The child of unshare, which is pid 1 in there."""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.05)
    raise AssertionError("unshare has no child")
