"""What the ZFS driver decides without ZFS: whose a property is, which member a snapshot is, what an error means."""

from __future__ import annotations

import errno
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from providers.zfs import ZfsProvider, _refuse_hollow, attaching, library, objects, swaps, tool
from snapshotter.core.command import Outcome
from snapshotter.core.errors import BusyError, PreconditionError, SnapshotterError, StorageError
from snapshotter.core.journal import Journal
from snapshotter.core.labels import encode_birth
from snapshotter.core.model import Birth, ImageState, Volume
from snapshotter.host import mounts
from snapshotter.host.mounts import Mount
from snapshotter.nodes.config import Config
from snapshotter.provider import OpenSwap, Settings, may_claim
from snapshotter.testing.harness import make_birth
from snapshotter.verbs import doctor, in_place_back, in_place_ways
from snapshotter.verbs.session import Session

SET = "s20261122t100630z-5f3a9c"
VOLUMES = [Volume("zfs", "tank/a", "/a"), Volume("lvm", "vg/b", "/b"), Volume("zfs", "tank/c", "/c")]


def birth() -> Birth:
    return make_birth(VOLUMES, set_id=SET)


def found(name: str, source: str = "local", **native: str) -> objects.Object:
    properties = {key: (value, "-") for key, value in {"createtxg": "77", **native}.items()}
    properties[objects.BIRTH] = encode_birth(birth()), source
    return objects._object(name, properties)


@pytest.mark.parametrize(
    ("name", "member"),
    [
        (f"tank/a@{SET}-0", 0),
        (f"tank/c@{SET}-2", 2),
        (f"tank/c.aside-w1@{SET}-2", 2),  # swapped since
        ("tank/c@renamed", 2),
        (f"tank/c@{SET[:-1]}d-0", 2),  # another set's form of name, given by hand
        ("tank/elsewhere@renamed", None),
        (f"tank/a@{SET}-1", None),  # the number of another provider's member
        (f"tank/a@{SET}-9", 0),
        ("tank/a", None),
    ],
)
def test_which_member_a_snapshot_is(name: str, member: int | None) -> None:
    read = found(name).birth
    assert (read and read.member) == member


def test_only_what_is_set_on_the_object_itself_is_ours() -> None:
    assert objects.as_snapshot(found(f"tank/a@{SET}-0")) is not None
    assert objects.as_snapshot(found(f"tank/a@{SET}-0", "inherited from tank/a")) is None
    replica = found(f"tank/a@{SET}-0", "received")
    assert replica.replica and objects.as_snapshot(replica) is not None


def test_what_is_to_go_with_its_last_user_is_no_image() -> None:
    snapshot = objects.as_snapshot(found(f"tank/a@{SET}-0", defer_destroy="on"))
    assert snapshot is not None and snapshot.state is ImageState.INVALID and snapshot.why
    snapshot = objects.as_snapshot(found(f"tank/a@{SET}-0", defer_destroy="off"))
    assert snapshot is not None and snapshot.state is ImageState.READY and snapshot.order == 77


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("", {}),
        ("{}", {}),
        ('{"sealed":"x","of-a-newer-version":"y"}', {"sealed": "x"}),
        ('{"sealed":"x"', None),
        ('["sealed"]', None),
        ("[" * 5000, None),
        ('{"sealed":1}', None),
        ('{"scaled":"x"}', None),
    ],
)
def test_marks_that_cannot_be_read_are_not_none(text: str, marks: dict[str, str] | None) -> None:
    one = objects._object(f"tank/a@{SET}-0", {objects.BIRTH: (encode_birth(birth()), "local")})
    one.ours[objects.MARKS] = text
    snapshot = objects.as_snapshot(one)
    assert snapshot is not None and snapshot.marks_known == (marks is not None) and snapshot.marks == (marks or {})


@pytest.mark.parametrize("path", ["/plain", "/\u00fcber/\U0001f40b", "/undecodable/\udcff", "/tab\there", '/"\\'])
def test_a_record_goes_through_a_table_of_tabs_and_lines(path: str) -> None:
    text = objects.dump({"path": path})
    assert text.isascii() and text.isprintable()
    read = objects._object("tank/a@x", {objects.MOUNTS: (text, "local")}).record(objects.MOUNTS)
    assert read is not None and read["path"].encode(errors="surrogateescape") == path.encode(errors="surrogateescape")


@pytest.mark.parametrize(
    ("said", "number", "kind"),
    [
        ("cannot create snapshot 'tank/a@x': out of space", errno.ENOSPC, StorageError),
        ("cannot create snapshots : permission denied", errno.EPERM, PreconditionError),
        ("cannot create snapshot 'tank/a@x': dataset already exists", errno.EEXIST, BusyError),
        ("cannot open 'tank/gone': dataset does not exist\nusage:\n\tsnapshot [-r]", errno.ENOENT, StorageError),
        ("cannot destroy 'tank/a@x': snapshot has dependent clones\nuse '-R'", errno.EBUSY, BusyError),
        ("cannot destroy 'tank/c': filesystem has children\nuse '-r'", errno.ENOTEMPTY, BusyError),
        ("cannot destroy snapshot tank/a@x: dataset is busy", errno.EBUSY, BusyError),
        ("cannot open 'tank': pool I/O is currently suspended", errno.EAGAIN, StorageError),
        ("cannot set property for 'tank/a@x': pool is read-only", errno.EROFS, PreconditionError),
        ("cannot mount 'tank/a': encryption key not loaded", errno.ENOKEY, PreconditionError),
        ("internal error: something new", 0, StorageError),
        # Words in names are no reasons.
        ("cannot open 'tank/busy': dataset does not exist", errno.ENOENT, StorageError),
        ("cannot destroy snapshot tank/permission denied/a@read-only: dataset is busy", errno.EBUSY, BusyError),
        ("cannot create snapshot 'tank/does not exist@x': out of space", errno.ENOSPC, StorageError),
        ("cannot destroy 'tank/c': filesystem has children\nuse '-r'\ntank/c/busy", errno.ENOTEMPTY, BusyError),
        ("internal error: 'suspended': something new", 0, StorageError),
        ("cannot open 'tank/a': I/O error", errno.EIO, StorageError),
    ],
)
def test_what_libzfs_says_is_an_error_of_ours(said: str, number: int, kind: type[SnapshotterError]) -> None:
    assert tool.number_of(said) == number
    error = tool.failure(number, "tank/a@x", said)
    assert type(error) is kind and "tank/a@x" in error.line()
    assert error.cure or (not number and said in error.line()) or number == errno.EEXIST


def build(release: object) -> types.ModuleType:
    made = types.ModuleType("libzfs_core")
    made.lzc_release = release  # type: ignore[attr-defined]
    return made


def test_a_build_whose_errors_are_none_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libzfs_core", build(lambda holds: holds.iteritems()))
    assert library._library(load=True) is None
    sound = build(lambda holds: [])
    monkeypatch.setitem(sys.modules, "libzfs_core", sound)
    assert library._library(load=False) is sound
    monkeypatch.setitem(sys.modules, "libzfs_core", None)
    assert library._library(load=True) is None


def mount(fstype: str, source: str, device: str = "0:99") -> Mount:
    return Mount(
        id=1,
        parent=0,
        device=device,
        root="/",
        path="/data",
        options=frozenset(),
        fstype=fstype,
        source=source,
        super_options=frozenset(),
    )


def test_who_may_claim_what_is_known_without_loading_a_driver() -> None:
    assert may_claim("zfs", mount("zfs", "tank/a")) and not may_claim("btrfs", mount("zfs", "tank/a"))
    assert may_claim("zfs", mount("ext4", "/dev/zd0")) and not may_claim("zfs", mount("ext4", "/dev/sda"))
    assert may_claim("btrfs", mount("btrfs", "/dev/sda")) and may_claim("copy", mount("ext4", "/dev/sda"))
    assert may_claim("lvm", mount("ext4", "/dev/mapper/vg-data")) and may_claim("another", mount("zfs", "tank/a"))


def test_one_pool_is_one_instant() -> None:
    provider = ZfsProvider(Settings("/nonexistent"))
    claimed = provider.claim(mount("zfs", "tank/a/b"), "/data")
    assert claimed is not None and (claimed.id, claimed.path) == ("tank/a/b", "/data")
    assert provider.claim(mount("ext4", "/dev/sda"), "/data") is None
    assert provider.one_instant([claimed, Volume("zfs", "tank", "/tank")])
    assert not provider.one_instant([claimed, Volume("zfs", "tank2/a", "/tank2")])


def test_what_lies_in_another_pool_than_it_was_made_in_is_a_replica() -> None:
    """As in a split mirror, or in a copied LUN: there all that is ours is local as well."""
    copied = found(f"copy/a@{SET}-0")
    assert copied.replica and copied.of_pool == "tank"
    snapshot = objects.as_snapshot(copied)
    assert snapshot is not None and snapshot.received and snapshot.state is ImageState.READY
    moved = found(f"tank/other@{SET}-2")  # by a promotion: the pool stays
    assert not moved.replica


@pytest.mark.parametrize("told", [{"pool": "tank"}, {"volume": "tank/a"}])
def test_a_record_that_came_with_a_copy_of_its_pool_is_nobodys(told: dict[str, str]) -> None:
    for prop in (objects.CLONE, objects.SWAP, objects.ASIDE, objects.KEPT):
        text = objects.dump({"id": "w1", **told})
        here, copied = (objects._object(f"{pool}/a", {prop: (text, "local")}) for pool in ("tank", "copy"))
        assert here.record(prop) and copied.record(prop) is None and copied.record(prop, anywhere=True)


def test_a_read_only_mount_that_came_with_a_copy_of_its_pool_is_nobodys() -> None:
    text = objects.dump({"a1": {"id": "a1", "pool": "tank"}})
    here, copied = (objects._object(f"{pool}/a@x", {objects.MOUNTS: (text, "local")}) for pool in ("tank", "copy"))
    assert list(attaching.mounts_of(here)) == ["a1"] and not attaching.mounts_of(copied)


def test_what_nothing_can_take_the_place_of_is_not_swappable() -> None:
    """So that a restore in place copies, rather than to be refused when the node is stopped already."""
    provider = ZfsProvider(Settings("/nonexistent"))

    def swappable(volume: str, snapshot: str) -> bool:
        image = objects.as_snapshot(found(snapshot))
        assert image is not None
        return provider.swappable(Volume("zfs", volume, "/data", "zfs"), image)

    assert swappable("tank/a", f"tank/a@{SET}-0") and swappable("tank/a", f"tank/a.aside-w1@{SET}-0")
    assert not swappable("tank", f"tank@{SET}-0")
    assert not swappable("tank/a", f"backup/a@{SET}-0")


@pytest.fixture
def suspended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tank` is well, and has nothing of ours; another pool has lost its devices."""
    for pool, state in (("tank", "ONLINE"), ("usb", "SUSPENDED")):
        (tmp_path / pool).mkdir()
        (tmp_path / pool / "state").write_text(state)
    monkeypatch.setattr(tool, "_POOLS", str(tmp_path))
    for reading in ("read", "labelled", "sure"):
        monkeypatch.setattr(objects, reading, lambda *_, **__: [])


@pytest.mark.usefixtures("suspended")
def test_a_pool_that_has_nothing_to_do_with_it_keeps_no_undo() -> None:
    volumes, provider = [VOLUMES[0], VOLUMES[2]], ZfsProvider(Settings("/nonexistent"))
    provider.prepare(volumes, birth(), 5.0)
    provider.delete(SET)
    with pytest.raises(StorageError, match="suspended"):
        provider.delete(SET)  # now it could be anywhere
    on_it = make_birth([Volume("zfs", "usb/a", "/a")])
    provider.prepare([Volume("zfs", "usb/a", "/a")], on_it, 5.0)
    with pytest.raises(StorageError, match="suspended"):
        provider.delete(on_it.set_id)


@pytest.mark.usefixtures("suspended")
def test_only_what_holds_the_volume_must_tell_of_its_swaps() -> None:
    provider = ZfsProvider(Settings("/nonexistent"))
    assert not list(provider.open_swaps("tank/a"))
    for asked in (None, "usb/a"):
        with pytest.raises(StorageError, match="suspended"):
            list(provider.open_swaps(asked))


@pytest.mark.parametrize(
    ("mounted", "said"),
    [
        (["/", "/a", "/a/below"], ""),
        (["/", "/a"], "isn't mounted at /a/below"),
        (["/", "/a/below", "/a"], "is hidden by what was mounted later at /a"),
    ],
)
def test_a_dataset_that_cannot_be_seen_where_it_should_be_stops_a_take(
    mounted: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"/": "tank", "/a": "tank/a", "/a/below": "tank/a/below"}
    # Each is mounted on the one before it that holds its place: a later one above doesn't hold what is hidden.
    parents = {"/": 0, "/a": 1, "/a/below": 2 if mounted.index("/a") == 1 else 1}
    table = [
        msgspec.structs.replace(mount("zfs", names[path]), id=k, parent=parents[path], path=path)
        for k, path in enumerate(mounted, 1)
    ]
    monkeypatch.setattr(mounts, "table", lambda: table)
    datasets = {"tank/a": "/a", "tank/a/below": "/a/below", "tank/other": "/other", "tank/legacy": ""}
    if not said:
        _refuse_hollow(birth(), datasets)
        return
    with pytest.raises(PreconditionError, match=said) as refused:
        _refuse_hollow(birth(), datasets)
    assert "tank/a/below" in refused.value.line() and refused.value.cure


def swapped(pool: str = "tank") -> list[objects.Object]:
    """A swap that came to its end: the clone, and what is set aside."""
    record = objects.dump({"id": "w1", "volume": "tank/a", "canmount": "on", "reserved": {"reservation": "7"}})
    return [
        objects._object(f"{pool}/a", {objects.SWAP: (record, "local")}),
        objects._object(f"{pool}/a.aside-w1", {objects.ASIDE: (record, "local")}),
    ]


def of_swaps(monkeypatch: pytest.MonkeyPatch, found: list[objects.Object]) -> ZfsProvider:
    monkeypatch.setattr(objects, "sure", lambda *_, **__: found)
    monkeypatch.setattr(tool, "pools", lambda: ["tank"])
    monkeypatch.setattr(tool, "children", lambda _: [])
    monkeypatch.setattr(swaps, "_origin", lambda _: None)
    return ZfsProvider(Settings("/nonexistent"))


def test_an_open_swap_that_no_journal_names_is_told_with_the_way_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(Config(state=str(tmp_path)))
    session._everywhere = ([of_swaps(monkeypatch, swapped())], [])
    (finding,) = doctor._restores(session)
    assert "tank/a" in finding.message and "w1" in finding.message and str(tmp_path) in finding.message
    steps = (
        "zfs rename -u tank/a tank/a.clone-w1; zfs rename -u tank/a.aside-w1 tank/a; zfs destroy tank/a.clone-w1; "
        "zfs set canmount=on reservation=7 tank/a; zfs inherit snapshotter:aside tank/a"
    )
    assert steps in finding.cure
    # Not where a journal names it, nor where one that can't be read might.
    directory = tmp_path / "restores"
    directory.mkdir()
    journal = Journal.create(str(directory / "t.journal"), path="/a", plan={"swaps": [{"swap_id": "w1"}]})
    assert [found.check for found in doctor._restores(session)] == ["restore"]
    Path(journal.path).write_text("damaged\n{}\n")
    assert [found.check for found in doctor._restores(session)] == ["restore"]
    journal.remove()
    session._everywhere = ([of_swaps(monkeypatch, swapped("copy"))], [])
    assert not list(doctor._restores(session)), "a copied pool's swap is nobody's here"


def test_the_way_back_of_a_swap_that_was_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "children", lambda _: [])
    monkeypatch.setattr(swaps, "_origin", lambda _: None)
    whole, aside = swapped()
    waiting = msgspec.structs.replace(whole, name="tank/a.clone-w1")
    untouched = msgspec.structs.replace(aside, name="tank/a")
    end = "zfs set canmount=on reservation=7 tank/a; zfs inherit snapshotter:aside tank/a"
    assert swaps.by_hand("w1", waiting, None) == "zfs destroy tank/a.clone-w1"
    assert swaps.by_hand("w1", waiting, untouched) == f"zfs destroy tank/a.clone-w1; {end}"
    back = "zfs rename -u tank/a.aside-w1 tank/a"
    assert swaps.by_hand("w1", waiting, aside) == f"{back}; zfs destroy tank/a.clone-w1; {end}"
    assert swaps.by_hand("w1", None, aside) == f"{back}; {end}"
    assert swaps.by_hand("w1", whole, None) == "zfs inherit snapshotter:swap tank/a"
    monkeypatch.setattr(swaps, "_origin", lambda _: "tank/a@s")  # a commit was killed once it had promoted
    steps = f"zfs rename -u tank/a tank/a.clone-w1; zfs promote tank/a.aside-w1; {back}; zfs destroy tank/a.clone-w1; "
    assert swaps.by_hand("w1", whole, aside) == steps + end
    left_in = {"left_in": {"com.sun:auto-snapshot": "true"}, **(aside.record(objects.ASIDE) or {})}
    labelled = objects._object(aside.name, {objects.ASIDE: (objects.dump(left_in), "local")})
    assert "; zfs set com.sun:auto-snapshot=true tank/a; zfs inherit" in swaps.by_hand("w1", None, labelled)


def test_no_other_restore_is_planned_as_a_swap_while_one_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = of_swaps(monkeypatch, swapped())
    with pytest.raises(BusyError, match="w1") as refused:
        in_place_ways._refuse_open(provider, VOLUMES[0].id)
    assert "doctor" in refused.value.cure
    in_place_ways._refuse_open(provider, VOLUMES[2].id)


ALLOWED = """---- Permissions on tank/a- ------------------------------------------
Permission sets:
\t@keeps snapshot,hold
Create time permissions:
\tdestroy
Local permissions:
\tuser (unknown: 4242) send
Descendent permissions:
\tgroup domain users create,mount
Local+Descendent permissions:
\tuser alice @keeps,mount
\teveryone userused
---- Permissions on tank ----------------------------------------------
Local+Descendent permissions:
\tuser bob rollback
"""


def test_what_is_delegated_is_read_as_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def says(text: str) -> None:
        monkeypatch.setattr(tool, "run", lambda *_, **__: Outcome(("zfs",), 0, text, ""))

    says(ALLOWED)
    assert tool.delegations("tank/a-") == [
        ["-s", "@keeps", "snapshot,hold"],
        ["-c", "destroy"],
        ["-l", "-u", "4242", "send"],
        ["-d", "-g", "domain users", "create,mount"],
        ["-u", "alice", "@keeps,mount"],
        ["-e", "userused"],
    ]
    assert tool.delegations("tank") == [["-u", "bob", "rollback"]] and tool.delegations("tank/b") == []
    says(ALLOWED.replace("user alice", "role alice"))
    with pytest.raises(StorageError, match="role alice"):
        tool.delegations("tank/a-")
    (note,) = swaps._delegate("tank/a-", "tank/a-.clone-w1", "tank/a-.aside-w1")
    assert "role alice" in note and "zfs allow tank/a-.aside-w1" in note


def test_of_several_swaps_none_is_committed_where_one_would_be_refused() -> None:
    committed: list[str] = []

    class Refusing(ZfsProvider):
        def refuse_commit(self, swap_id: str) -> None:
            if swap_id == "w1":
                raise BusyError("still carries a set", object=swap_id)

        def swap_commit(self, swap_id: str) -> None:
            committed.append(swap_id)

        def open_swaps(self, volume: str | None = None) -> Iterator[OpenSwap]:
            return iter(OpenSwap(swap_id) for swap_id in ("w0", "w1"))

    provider, kept = Refusing(Settings("/nonexistent")), list[str]()
    work: Any = types.SimpleNamespace(
        session=types.SimpleNamespace(provider=lambda *_, **__: provider),
        plan=types.SimpleNamespace(
            node=None, swaps=[types.SimpleNamespace(provider="zfs", swap_id=f"w{k}", volume="tank/a") for k in range(2)]
        ),
        journal=types.SimpleNamespace(append=kept.append),
    )
    with pytest.raises(BusyError, match="still carries"):
        in_place_back._commit_swaps(work)
    assert not committed and kept == ["kept"], "all of it can still be undone"


@pytest.mark.parametrize(
    ("clone", "cure"),
    [
        ("tank/snapshotter-a1-0", "zfs promote tank/a, then again"),  # promoted, which brought it there
        ("tank/a", f"snapshotter delete {SET}"),  # taken of it
        ("", "zfs destroy tank/snapshotter-a1-0@theirs, then again"),
    ],
)
def test_a_clone_that_carries_sets_is_not_released_at_their_price(
    clone: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = f"{clone}@{SET}-0" if clone else "tank/snapshotter-a1-0@theirs"
    monkeypatch.setattr(tool, "snapshots_of", lambda _: [(carried, 1)])
    monkeypatch.setattr(objects, "read", lambda names: [found(name) for name in names if clone])
    with pytest.raises(BusyError) as refused:
        attaching._refuse_foreign(clone or "tank/snapshotter-a1-0", "a1")
    assert refused.value.cure == cure
