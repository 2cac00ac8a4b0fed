"""Sets: born, sealed, marked, listed, deleted; all or none; other tools' objects."""

from __future__ import annotations

import os
import threading
from datetime import UTC, datetime

import pytest

from snapshotter.core.errors import BusyError, NotFoundError, PreconditionError, SnapshotterError
from snapshotter.core.labels import MARK_NAMES, decode_birth, encode_birth
from snapshotter.core.model import (
    Access,
    ImageState,
    Root,
    Volume,
    new_attachment_id,
    new_set_id,
    utc_now,
)
from snapshotter.testing.conformance.steps import Attached, Contract, attach, content_of, ready, seal, take
from snapshotter.testing.harness import (
    Harness,
    describe,
    fill,
    make_birth,
    ruin,
)


class Sets(Contract):
    """Sets: born, sealed, marked, listed, deleted; all or none; other tools' objects."""

    def test_born_is_listed_and_not_sealed(self, harness: Harness, volume: Volume) -> None:
        birth = take(harness.provider(), harness, [volume])
        (found,) = harness.provider().snapshots()
        assert found.birth == birth
        assert found.provider == harness.provider().name
        assert found.volume == volume.id
        assert found.state is not ImageState.INVALID
        assert "sealed" not in found.marks or harness.provider().traits.atomic_across_volumes

    def test_sealed_is_listed_with_its_marks(self, harness: Harness, volume: Volume) -> None:
        birth = take(harness.provider(), harness, [volume])
        seal(harness.provider(), birth)
        (found,) = harness.provider().snapshots(birth.set_id)
        assert found.marks["sealed"] == "20261122t100630z"
        assert found.marks["grade"] == "filesystem"

    def test_every_mark_round_trips_and_goes(self, harness: Harness, volume: Volume) -> None:
        birth = take(harness.provider(), harness, [volume])
        longest = {name: ("0123456789_-abcdefghijklmnopqrstuvwxyz" * 2)[:63] for name in MARK_NAMES}
        harness.provider().mark(birth.set_id, dict(longest))
        assert dict(next(harness.provider().snapshots(birth.set_id)).marks) == longest
        harness.provider().mark(birth.set_id, {"pinned": None, "height": "7"})
        (found,) = harness.provider().snapshots(birth.set_id)
        assert dict(found.marks) == {**{k: v for k, v in longest.items() if k != "pinned"}, "height": "7"}
        assert found.birth == birth
        harness.provider().mark(birth.set_id, {name: None for name in MARK_NAMES})
        assert not next(harness.provider().snapshots(birth.set_id)).marks

    def test_removing_an_absent_mark_is_done(self, harness: Harness, volume: Volume) -> None:
        birth = take(harness.provider(), harness, [volume])
        harness.provider().mark(birth.set_id, {"pinned": None})
        assert "pinned" not in next(harness.provider().snapshots(birth.set_id)).marks

    @pytest.mark.parametrize("changes", [{"colour": "red"}, {"height": "UPPER"}, {"height": "x" * 64}, {"height": ""}])
    def test_a_mark_that_is_none_is_refused(self, harness: Harness, volume: Volume, changes: dict[str, str]) -> None:
        birth = take(harness.provider(), harness, [volume])
        with pytest.raises((ValueError, SnapshotterError)):
            harness.provider().mark(birth.set_id, {"sealed": "20261122t100630z", **changes})
        assert not next(harness.provider().snapshots(birth.set_id)).marks, "all of the changes or none"

    def test_marking_an_unknown_set_is_not_found(self, harness: Harness, volume: Volume) -> None:
        with pytest.raises(NotFoundError):
            harness.provider().mark(new_set_id(utc_now()), {"pinned": "1"})
        assert not list(harness.provider().snapshots())

    def test_nothing_is_listed_of_an_unknown_set(self, harness: Harness, volume: Volume) -> None:
        take(harness.provider(), harness, [volume])
        assert not list(harness.provider().snapshots(new_set_id(utc_now())))

    @pytest.mark.parametrize("kind", ["full", "long", "non-ascii", "many roots", "undecodable"])
    def test_the_birth_record_comes_back(self, harness: Harness, volume: Volume, kind: str) -> None:
        top = self.top(volume)
        roots = {
            "full": [Root(top, 0)],
            "long": [Root("/" + "very-long-directory-name/" * 20 + "end", 0, "inside")],
            "non-ascii": [Root("/\u00fcber/\u65e5\u672c/\U0001f40b \n'\"", 0, "\u65e5")],
            "many roots": [Root(f"/data/root-{k}", 0, f"root-{k}") for k in range(4)],
            "undecodable": [Root(os.fsdecode(b"/data/\xff\xfe"), 0)],
        }[kind]
        birth = make_birth([volume], roots=roots, slot="daily", address="0x" + "9f" * 20)
        # A path without room comes back as its hash; the rest is the record, to the letter.
        expected = decode_birth(encode_birth(birth))
        assert expected is not None and (kind in ("long", "many roots") or expected == birth)
        take(harness.provider(), harness, [volume], birth)
        (found,) = harness.provider().snapshots(birth.set_id)
        assert found.birth == expected

    def test_what_cannot_fit_is_refused_in_check(self, harness: Harness, volume: Volume) -> None:
        before = harness.objects()
        with pytest.raises(PreconditionError) as refused:
            harness.provider().check([volume], make_birth([volume], node="n" * 500))
        assert refused.value.cure
        assert harness.objects() == before

    def test_check_and_looking_have_no_effects(self, harness: Harness, volume: Volume) -> None:
        provider = harness.provider()
        before, content = harness.objects(), describe(self.top(volume))
        provider.check([volume], make_birth([volume]))
        provider.availability()
        provider.space([volume])
        assert not list(provider.snapshots()) and not list(provider.attachments()) and not list(provider.swaps())
        assert harness.objects() == before
        assert describe(self.top(volume)) == content

    def test_the_order_rises(self, harness: Harness, volume: Volume) -> None:
        provider = harness.provider()
        # Ids whose times fall, as after a step of the host's clock: the storage's order is what counts.
        ids = [f"s2026112{9 - k}t100630z-00000{k}" for k in range(3)]
        for set_id in ids:
            take(provider, harness, [volume], make_birth([volume], set_id=set_id))
        orders = [next(harness.provider().snapshots(set_id)).order for set_id in ids]
        assert orders == sorted(orders)
        assert len(set(orders)) == len(orders) or set(orders) == {0}, "an order that can't tell must be 0"

    def test_pending_ends_ready(self, harness: Harness, volume: Volume) -> None:
        birth = take(harness.provider(), harness, [volume])
        seal(harness.provider(), birth)
        assert [found.state for found in ready(harness.provider(), harness, birth.set_id)] == [ImageState.READY]

    def test_space_is_sane(self, harness: Harness, volume: Volume) -> None:
        space = harness.provider().space([volume])
        for number in (space.total_bytes, space.free_bytes, space.will_pin_bytes):
            assert number is None or number >= 0
        if space.total_bytes is not None and space.free_bytes is not None:
            assert space.free_bytes <= space.total_bytes

    def test_it_can_work_here(self, harness: Harness) -> None:
        assert harness.provider().availability() == []

    def test_foreign_objects_are_left_alone(self, harness: Harness, volume: Volume) -> None:
        before_ours = harness.foreign(volume)
        provider = harness.provider()
        assert not list(provider.snapshots())
        birth = take(provider, harness, [volume])
        after_ours = harness.foreign(volume)
        seal(provider, birth)
        assert [found.birth.set_id for found in provider.snapshots()] == [birth.set_id]
        provider.delete(birth.set_id)
        provider.reap()
        assert not list(provider.snapshots())
        assert before_ours() and after_ours()

    def test_delete_leaves_nothing_and_absent_is_done(self, harness: Harness, volume: Volume) -> None:
        before = harness.objects()
        harness.provider().delete(new_set_id(utc_now()))
        birth = take(harness.provider(), harness, [volume])
        assert harness.objects() != before
        harness.provider().delete(birth.set_id)
        assert not list(harness.provider().snapshots())
        assert harness.objects() == before
        harness.provider().delete(birth.set_id)
        assert harness.objects() == before
        take(harness.provider(), harness, [volume], make_birth([volume], set_id=birth.set_id))

    def test_prepared_and_deleted_leaves_nothing(self, harness: Harness, volume: Volume) -> None:
        before, birth = harness.objects(), make_birth([volume])
        provider = harness.provider()
        provider.check([volume], birth)
        provider.prepare([volume], birth, 5.0)
        for found in harness.provider().snapshots():
            assert "sealed" not in found.marks
        harness.provider().delete(birth.set_id)
        harness.provider().delete(birth.set_id)
        assert harness.objects() == before

    def test_two_sets_of_a_volume_are_independent(self, harness: Harness, volume: Volume) -> None:
        provider = harness.provider()
        one = take(provider, harness, [volume])
        content_one = describe(self.top(volume))
        with open(os.path.join(self.top(volume), "database/CURRENT"), "wb") as file:
            file.write(b"the second")
        two = take(provider, harness, [volume])
        content_two = describe(self.top(volume))
        three = take(provider, harness, [volume])
        ruin(self.top(volume))
        for birth, content in ((one, content_one), (two, content_two), (three, content_two)):
            assert content_of(harness, ready(provider, harness, birth.set_id)[0]) == content
        provider.mark(two.set_id, {"pinned": "1"})
        provider.delete(two.set_id)
        assert {found.birth.set_id for found in provider.snapshots()} == {one.set_id, three.set_id}
        assert not any(found.marks for found in provider.snapshots())
        for birth, content in ((one, content_one), (three, content_two)):
            assert content_of(harness, ready(provider, harness, birth.set_id)[0]) == content
        provider.delete(one.set_id)
        assert content_of(harness, ready(provider, harness, three.set_id)[0]) == content_two

    @pytest.mark.parametrize("gone_first", [False, True])
    def test_a_partial_create_leaves_nothing(self, harness: Harness, volume: Volume, gone_first: bool) -> None:
        gone = harness.gone(volume)
        volumes = [gone, volume] if gone_first else [volume, gone]
        before, birth = harness.objects(), make_birth(volumes)
        provider = harness.provider()
        with pytest.raises(SnapshotterError):
            provider.prepare(volumes, birth, 5.0)
            provider.create(volumes, birth, harness.hold())
        assert not list(harness.provider().snapshots())
        harness.provider().delete(birth.set_id)
        assert harness.objects() == before

    def test_create_of_a_set_that_exists_is_refused(self, harness: Harness, volume: Volume) -> None:
        content = describe(self.top(volume))
        birth = take(harness.provider(), harness, [volume])
        seal(harness.provider(), birth)
        objects = harness.objects()
        ruin(self.top(volume))
        provider = harness.provider()
        with pytest.raises(BusyError):
            provider.prepare([volume], birth, 5.0)
            provider.create([volume], birth, harness.hold())
        (found,) = ready(harness.provider(), harness, birth.set_id)
        assert found.marks["sealed"] and found.state is ImageState.READY
        assert content_of(harness, found) == content
        assert harness.objects() == objects

    def test_a_set_of_two_volumes_is_one(self, harness: Harness, volume: Volume) -> None:
        second = harness.volume()
        fill(self.top(second), "two")
        before = harness.objects()
        contents = [describe(self.top(each)) for each in (volume, second)]
        provider = harness.provider()
        birth = take(provider, harness, [volume, second])
        seal(provider, birth)
        found = ready(harness.provider(), harness, birth.set_id)
        assert [snapshot.volume for snapshot in found] == [volume.id, second.id]
        assert [snapshot.birth for snapshot in found] == [birth.of_member(0), birth.of_member(1)]
        assert all("sealed" in snapshot.marks for snapshot in found)
        ruin(self.top(volume))
        ruin(self.top(second))
        assert [content_of(harness, snapshot) for snapshot in found] == contents
        provider.delete(birth.set_id)
        assert harness.objects() == before

    def test_one_attachment_spans_a_set(self, harness: Harness, volume: Volume) -> None:
        second = harness.volume()
        fill(self.top(second), "two")
        provider = harness.provider()
        birth = take(provider, harness, [volume, second])
        before = harness.objects()
        attached = [
            Attached(harness, new_attachment_id(utc_now()), harness.destination()),
        ]
        attached.append(Attached(harness, attached[0].id, harness.destination()))
        access = Access.WRITABLE if provider.traits.writable_clone else Access.READ_ONLY
        for snapshot, part in zip(ready(provider, harness, birth.set_id), attached, strict=True):
            part.path = harness.enter(provider.attach(snapshot, part.id, access, part.destination), part.destination)
        listed = sorted(harness.provider().attachments(), key=lambda found: found.member)
        assert [(found.id, found.member) for found in listed] == [(attached[0].id, 0), (attached[0].id, 1)]
        assert [found.path for found in listed] == [part.destination for part in attached]
        since = datetime.now(UTC)
        harness.provider().settle(attached[0].id, since)
        assert [found.since for found in harness.provider().attachments()] == [since, since]
        for each, part in zip((volume, second), attached, strict=True):
            assert describe(part.path) == describe(self.top(each))
        for part in attached:
            harness.leave(part.destination)
        harness.provider().detach(attached[0].id)
        assert not list(harness.provider().attachments())
        assert harness.objects() == before

    def test_volumes_are_one_instant_where_claimed(self, harness: Harness, volume: Volume) -> None:
        provider = harness.provider()
        if not provider.traits.atomic_across_volumes:
            pytest.skip("several volumes are several instants here")
        volumes = [volume, harness.volume()]
        paths = [os.path.join(self.top(each), "sequence") for each in volumes]
        stop, started = threading.Event(), threading.Event()

        def write() -> None:
            descriptors = [os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for path in paths]
            number = 0
            while not stop.is_set():
                number += 1
                for fd in descriptors:  # the first volume is always written, and on disk, before the second
                    os.pwrite(fd, b"%020d" % number, 0)
                    os.fsync(fd)
                started.set()
            for fd in descriptors:
                os.close(fd)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            assert started.wait(harness.patience_s)
            births = [take(provider, harness, each) for each in (volumes, volumes[::-1], volumes, volumes[::-1])]
        finally:
            stop.set()
            writer.join()
        for birth in births:
            number: dict[str, int] = {}
            for snapshot in ready(provider, harness, birth.set_id):
                attached = attach(harness, snapshot, Access.WRITABLE)
                with open(os.path.join(attached.path, "sequence"), "rb") as file:
                    number[snapshot.volume] = int(file.read() or b"0")
                attached.end()
            ahead = number[volumes[0].id] - number[volumes[1].id]
            assert ahead in (0, 1), f"the volumes are {ahead} writes apart"
