"""Running LVM's mutating commands: one run at a time per volume group, never killed, and undone if it was killed all
the same. Must know nothing of sets.

A killed `lvcreate` may leave its origin *suspended*: every write to it hangs. What a command may suspend is therefore
written to /run before it starts, and forgotten when it ended by itself. Whoever takes the group's lock next and
finds such a record resumes what it names, and nothing else: what somebody suspended on purpose has no record of ours.
That lock is free only when no command of a dead run works any more. The command can't hold it itself: LVM closes every
descriptor above 2 that it was given (lvmcmdline.c, _close_stray_fds). So its parent is a shell, which inherits the lock
(`core.command`) and does nothing but wait for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress

from providers.lvm.reports import ENVIRONMENT, LVS, NAME, PREFIX, READING_S, SEALED, Row, report_of, said
from snapshotter.core.command import Outcome, run
from snapshotter.core.errors import BusyError, NotFoundError, PreconditionError, SnapshotterError, StorageError
from snapshotter.core.labels import dumps, loads
from snapshotter.host import block
from snapshotter.host.locks import Locks
from snapshotter.host.places import private_directory, run_directory

WAIT_S = 60.0
TARGET_MODULE = "dm_snapshot"
TARGET = f"/sys/module/{TARGET_MODULE}"  # there also where it is built in: it has parameters
_FRESH = "~"  # behind the name of a record that is being written: no group's name may have that
_RESUME_WAIT_S = 2.0  # whoever holds the group so long does something to it, and its volumes run

#: `exit` keeps the shell from becoming the command, as it would for its last one; `trap` from dying before it of what
#: LVM blocks while it works. (A signal that is caught, not ignored, is the command's own again.)
_HELD = ("sh", "-c", 'trap : HUP INT TERM; "$@"; exit $?', "sh")


class Group:
    """The right to change one volume group: see `changing`."""

    def __init__(self, vg: str) -> None:
        self.vg = vg
        self._record = os.path.join(_directory(), vg)

    def lvm(
        self, *argv: str, object: str, suspends: Sequence[Row] = (), born: str = "", gone_is_done: bool = False
    ) -> None:
        """Run a command of LVM to its end. `suspends`: the volumes that it may hold for a moment; `born`: the name of
        one that it makes. Raises BusyError (in use, exists), NotFoundError (unless `gone_is_done`), StorageError."""
        if suspends or born:
            self._intend(suspends, born)
        done = self._run(argv)
        if not done.ok and "with queued messages" in done.stderr and self._unstick():
            done = self._run(argv)
        if done.code < 0:  # somebody killed it: LVM itself ends with 0 to 5
            self.recover()
            raise StorageError(f"{argv[0]} was killed by signal {-done.code}", object=object, cure="try again")
        if not done.ok:
            self.recover()
            error = failure(done, object)
            if gone_is_done and isinstance(error, NotFoundError):
                return
            raise error
        if suspends or born:
            self._forget()

    def remove(self, row: Row, *, suspends: Sequence[Row] = (), half_made: bool = False) -> None:
        """Remove a volume of ours; absent is done. `half_made`: its lvcreate (that alone, even) may have been killed
        after the thin pool was told and before LVM had noted so. LVM would tell it again, and the pool refuse: so the
        device goes first, which LVM doesn't mind. Raises BusyError (in use), StorageError."""
        if half_made and row.thin:
            asked = run([*LVS, "--noheadings", "-o", "thin_id", row.id], timeout=READING_S, extra_env=ENVIRONMENT)
            if (number := asked.stdout.strip().rpartition("\n")[2].strip()).isdigit():
                self._run(("dmsetup", "message", self._tpool(row.pool), "0", f"delete {number}"))
        self.lvm("lvremove", "-y", row.id, object=row.id, suspends=suspends, born=row.name, gone_is_done=True)

    def other(self, *argv: str, object: str) -> None:
        """As `lvm`, for a program that suspends nothing (dmsetup, cryptsetup)."""
        done = run(argv, mutates=True)
        if not done.ok:
            raise failure(done, object)

    def _run(self, argv: Sequence[str]) -> Outcome:
        """Its code is negative if a signal ended it, as everywhere: the shell says 128 and the signal."""
        done = run([*_HELD, *argv], mutates=True, extra_env=ENVIRONMENT)
        return Outcome(tuple(argv), 128 - done.code if done.code > 128 else done.code, done.stdout, done.stderr)

    # -- what a killed command leaves ------------------------------------------------------------------------------

    def _intend(self, suspends: Sequence[Row], born: str) -> None:
        record = {
            "uuids": [row.dm_uuid for row in suspends],
            "names": [f"{self.vg.replace('-', '--')}-{born.replace('-', '--')}"] if born else [],
            "volumes": [row.id for row in suspends],
        }
        fresh = f"{self._record}{_FRESH}"
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(dumps(record))
        os.rename(fresh, self._record)

    def _forget(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._record)

    def recover(self) -> list[str]:
        """Resume what a killed command of ours left suspended; the devices' names. Raises StorageError where that can't
        be done, with the command that would."""
        try:
            with open(self._record, encoding="utf-8") as file:
                record = loads(file.read())
        except FileNotFoundError:
            return []
        except ValueError:
            record = {}
        found = _suspended(record)
        if found:
            # LVM's own way first: it loads the tables of the metadata that was committed, under its own lock.
            self._run(("lvchange", "--refresh", *record.get("volumes", [])))
            # What others stand on comes first.
            for device in sorted(_suspended(record), key=lambda each: (-len(each.dm_uuid), each.name)):
                self._run(("dmsetup", "clear", device.dm_name))
                self._run(("dmsetup", "resume", device.dm_name))
            if left := _suspended(record):
                raise StorageError(
                    "was left suspended by a killed command, and can't be resumed",
                    object=left[0].dm_name,
                    cure=f"dmsetup resume {left[0].dm_name}",
                )
        self._unstick()
        self._forget()
        return [device.dm_name for device in found]

    def _unstick(self) -> bool:
        """A killed lvcreate may also have told a thin pool to make the image, and not that this is done: LVM tells it
        again with every later command, and the pool refuses ("manual intervention may be required"). So take that image
        away: the one of ours, never sealed, whose message is queued still. Its LV remains; its set is a leftover."""
        fields = "lv_name,lv_tags,pool_lv,thin_id,transaction_id"
        done = run([*LVS, "--reportformat", "json", "-o", fields, self.vg], timeout=READING_S, extra_env=ENVIRONMENT)
        try:
            rows: list[dict[str, str]] = loads(report_of(done.stdout))["report"][0]["lv"]
        except (ValueError, KeyError, IndexError):
            return False
        freed = False
        for pool in rows:
            kernel = self._transaction_of(pool["lv_name"]) if pool["transaction_id"] and not pool["pool_lv"] else None
            if kernel is None or int(pool["transaction_id"]) != kernel + 1:
                continue
            for row in rows:
                tags = row["lv_tags"].split(",")
                ours = any(tag.startswith(PREFIX) for tag in tags) and not any(SEALED in tag for tag in tags)
                if ours and row["pool_lv"] == pool["lv_name"] and row["transaction_id"] == str(kernel):
                    message = ("message", self._tpool(pool["lv_name"]), "0", f"delete {row['thin_id']}")
                    freed = self._run(("dmsetup", *message)).ok or freed  # there may be none yet
        return freed

    def _tpool(self, pool: str) -> str:
        return f"{self.vg.replace('-', '--')}-{pool.replace('-', '--')}-tpool"

    def _transaction_of(self, pool: str) -> int | None:
        """What the kernel's thin pool says (thin-provisioning.rst: its status begins with the transaction id)."""
        words = run(["dmsetup", "status", "--noflush", self._tpool(pool)], timeout=READING_S).stdout.split()
        return int(words[3]) if len(words) > 3 and words[2] == "thin-pool" and words[3].isdigit() else None


def _suspended(record: dict[str, list[str]]) -> list[block.Device]:
    uuids, names = tuple(record.get("uuids", [])), tuple(record.get("names", []))
    return [
        device
        for device in block.mapped()
        if device.suspended
        and (
            device.dm_uuid.startswith(uuids) or (device.dm_uuid.startswith("LVM-") and device.dm_name.startswith(names))
        )
    ]


def _directory() -> str:
    return private_directory(os.path.join(run_directory(), NAME))


def _is_made(vg: str, name: str) -> bool:
    try:
        with open(os.path.join(_directory(), vg), encoding="utf-8") as file:
            return name.replace("-", "--") in file.read()
    except FileNotFoundError:
        return False


def _recorded() -> list[str]:
    """The groups in which a command of ours works, or was killed."""
    return sorted(name for name in os.listdir(_directory()) if not name.endswith(_FRESH))


@contextmanager
def changing(vg: str, wait_s: float = WAIT_S) -> Iterator[Group]:
    """Nobody else of ours changes this volume group meanwhile; what a killed command left suspended runs again. Raises
    BusyError, StorageError."""
    with Locks([f"{NAME}-commands:{vg}"], wait_s=wait_s):
        group = Group(vg)
        group.recover()
        yield group


def recover_all() -> tuple[list[str], list[StorageError]]:
    """Resume what dead runs left suspended in any group, where no command of theirs works any more: the devices' names,
    and what could not be resumed."""
    resumed: list[str] = []
    failed: list[StorageError] = []
    for vg in _recorded():
        try:
            with suppress(BusyError), Locks([f"{NAME}-commands:{vg}"], wait_s=_RESUME_WAIT_S):
                resumed += Group(vg).recover()
        except StorageError as error:
            failed.append(error)
    return resumed, failed


def wait_for_dead_runs(groups: Collection[str], made: str = "") -> bool:
    """Return when no command of a dead run works any more in these volume groups, or on a volume named after `made`. (A
    live run holds its locks, so that nobody else gets as far as this.) False: none did. Raises BusyError after a
    minute, StorageError."""
    waited = False
    for vg in _recorded():
        if vg in groups or (made and _is_made(vg, made)):
            waited = True
            with changing(vg):
                pass
    return waited


def check_target() -> None:
    """Is dm-snapshot, which classic snapshots are made of, in the kernel? Loaded if it isn't, as lvcreate would. Raises
    PreconditionError where that can't be: no such module, or a caller that may load none (a service without
    CAP_SYS_MODULE), in which lvcreate fails too."""
    if os.path.exists(TARGET):
        return
    with suppress(PreconditionError):
        run(["modprobe", "-q", TARGET_MODULE], timeout=READING_S)
    if not os.path.exists(TARGET):
        raise PreconditionError(
            "is not loaded, and can't be from here: classic snapshots need it",
            object=TARGET_MODULE,
            cure=f"modprobe {TARGET_MODULE}; for scheduled takes: snapshotter schedule install",
        )


#: Not any "not found": warnings speak of devices, links and physical volumes that aren't.
_ABSENT = re.compile(r'Failed to find logical volume|Volume group "\S+" not found|[Ll]ogical volume \S+ not found')
#: A killed command's, or somebody's own.
_ORPHAN = re.compile(r"Thin pool (\S+) \([0-9:]+\) already contains? thin device with device_id ([0-9]+)")


def failure(done: Outcome, object: str) -> SnapshotterError:
    """LVM's complaint as one of ours. (It has no error codes: the words are those of 2.03.)"""
    line = said(done.stderr) or done.said
    text = " ".join(done.stderr.split())
    if _ABSENT.search(text):
        return NotFoundError("there is no such logical volume", object=object, cure="`lvs` shows what there is")
    if orphan := _ORPHAN.search(text):
        return StorageError(
            f"the thin pool {orphan[1]} has a device {orphan[2]} that LVM knows nothing of, and wants that number next",
            object=object,
            cure=f"if it is nobody's: dmsetup message {orphan[1]} 0 'delete {orphan[2]}'",
        )
    if "already exists" in text:
        return BusyError("exists already", object=object, cure="try again, which chooses another name")
    if "in use" in text or "is used by another device" in text:
        return BusyError("is in use", object=object, cure=f"see who with: fuser -vm /dev/{object}")
    if "Device or resource busy" in text and "suspend" in text:
        return StorageError(
            "can't be snapshotted while its file system is frozen", object=object, cure="fsfreeze --unfreeze it"
        )
    if "insufficient free space" in text or "nsufficient free extents" in text:
        return StorageError(
            "its volume group has no room for that", object=object, cure="delete old sets, or vgextend the group"
        )
    if "reached threshold" in text:
        return StorageError("its thin pool is full", object=object, cure="delete old sets, or lvextend the pool")
    if "metadata" in text and ("too large" in text or "buffer" in text):
        return StorageError(
            "the group's metadata area is full", object=object, cure="delete old sets, or vgextend --metadatasize"
        )
    if "while PVs are missing" in text:
        return StorageError("a physical volume of its group is missing", object=object, cure="`pvs` shows which")
    return StorageError(f"{done.argv[0]} failed: {line}", object=object)
