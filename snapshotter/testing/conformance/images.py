"""Images and attachments: fixed, whole, independent, busy while used."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from msgspec.structs import replace

from snapshotter.core.errors import BusyError, NotFoundError, SnapshotterError
from snapshotter.core.model import (
    Access,
    ImageState,
    Purpose,
    Tree,
    Volume,
    new_attachment_id,
    utc_now,
)
from snapshotter.testing.conformance.steps import Contract, attach, content_of, ready, seal, take
from snapshotter.testing.harness import (
    Harness,
    blocks,
    describe,
    fill_with_oddities,
    ruin,
    write_permissions,
)


class Images(Contract):
    """Images and attachments: fixed, whole, independent, busy while used."""

    def test_the_image_stays_while_the_origin_is_written(self, harness: Harness, volume: Volume) -> None:
        content = describe(self.top(volume))
        birth = take(harness.provider(), harness, [volume])
        ruin(self.top(volume))
        (found,) = ready(harness.provider(), harness, birth.set_id)
        assert found.state is ImageState.READY
        assert content_of(harness, found) == content
        shutil.rmtree(os.path.join(self.top(volume), "database"))
        assert content_of(harness, found) == content

    def test_odd_content_comes_back(self, harness: Harness) -> None:
        volume = harness.volume()
        fill_with_oddities(self.top(volume))
        content = describe(self.top(volume))
        birth = take(harness.provider(), harness, [volume])
        assert describe(self.top(volume)) == content, "taking it changed the origin"
        (found,) = ready(harness.provider(), harness, birth.set_id)
        attached = attach(harness, found, Access.WRITABLE)
        try:
            assert describe(attached.path) == content
            sparse = os.path.join(attached.path, "odd/sparse")
            assert blocks(sparse) < os.path.getsize(sparse) // 4, "the holes are filled"
        finally:
            attached.end()

    def test_odd_content_is_seen_read_only(self, harness: Harness) -> None:
        volume = harness.volume()
        fill_with_oddities(self.top(volume))
        birth = take(harness.provider(), harness, [volume])
        (found,) = ready(harness.provider(), harness, birth.set_id)
        attached = attach(harness, found, Access.READ_ONLY)
        try:
            writable = not attached.made_tree
            assert describe(attached.path, writable=writable) == describe(self.top(volume), writable=writable)
        finally:
            attached.end()

    def test_an_image_that_the_storage_lost_is_invalid(self, harness: Harness, volume: Volume) -> None:
        before = harness.objects()
        birth = take(harness.provider(), harness, [volume])
        seal(harness.provider(), birth)
        (found,) = ready(harness.provider(), harness, birth.set_id)
        if not harness.damage(found):
            pytest.skip("this harness can't damage an image")
        (found,) = harness.provider().snapshots(birth.set_id)
        assert found.state is ImageState.INVALID
        assert found.why, "says why, for a person"
        assert "sealed" in found.marks
        destination = harness.destination()
        attachment_id = new_attachment_id(utc_now())
        with pytest.raises(SnapshotterError):
            harness.provider().attach(found, attachment_id, Access.WRITABLE, destination)
        harness.provider().detach(attachment_id)
        harness.provider().delete(birth.set_id)
        assert harness.objects() == before

    def test_a_clone_is_its_own(self, harness: Harness, volume: Volume) -> None:
        provider = harness.provider()
        if not provider.traits.writable_clone:
            pytest.skip("no writable clones here")
        content = describe(self.top(volume))
        birth = take(provider, harness, [volume])
        (found,) = ready(provider, harness, birth.set_id)
        one, two = attach(harness, found, Access.WRITABLE), attach(harness, found, Access.WRITABLE)
        try:
            ruin(one.path)
            assert describe(two.path) == content, "a clone's writes show in another clone"
            assert describe(self.top(volume)) == content, "a clone's writes show in the origin"
            ruin(self.top(volume))
            assert describe(two.path) == content, "the origin's writes show in a clone"
            assert content_of(harness, found) == content, "a clone's writes changed the snapshot"
            written = describe(one.path)
            two.end()
            assert describe(one.path) == written
        finally:
            for each in (one, two):
                each.end()
        assert content_of(harness, found) == content

    def test_read_only_cannot_be_written(self, harness: Harness, volume: Volume) -> None:
        content = describe(self.top(volume))
        birth = take(harness.provider(), harness, [volume])
        (found,) = ready(harness.provider(), harness, birth.set_id)
        attached = attach(harness, found, Access.READ_ONLY)
        try:
            file = os.path.join(attached.path, "database/000012.sst")
            if attached.made_tree and os.geteuid() == 0:
                # Nothing but a mount stops root. Whoever the node runs as is stopped by the modes.
                assert not write_permissions(attached.path)
            else:
                attempts: list[Callable[[], object]] = [
                    lambda: os.close(os.open(file, os.O_RDWR)),
                    lambda: os.close(os.open(os.path.join(attached.path, "new"), os.O_WRONLY | os.O_CREAT)),
                    lambda: os.unlink(file),
                    lambda: os.rename(file, file + ".moved"),
                    lambda: os.mkdir(os.path.join(attached.path, "database/new")),
                ]
                for attempt in attempts:
                    with pytest.raises(OSError):
                        attempt()
            with open(file, "rb") as readable:
                assert readable.read(1)
        finally:
            attached.end()
        assert content_of(harness, found) == content

    @pytest.mark.parametrize("access", list(Access))
    @pytest.mark.parametrize("purpose", list(Purpose))
    def test_attachments_are_listed(self, harness: Harness, volume: Volume, access: Access, purpose: Purpose) -> None:
        before = harness.objects()
        birth = take(harness.provider(), harness, [volume])
        (found,) = ready(harness.provider(), harness, birth.set_id)
        attached = attach(harness, found, access, purpose)
        try:
            (listed,) = harness.provider().attachments()
            assert (listed.id, listed.provider) == (attached.id, harness.provider().name)
            assert (listed.set_id, listed.member) == (birth.set_id, 0)
            assert listed.path == attached.destination
            assert (listed.access, listed.purpose) == (access, purpose)
            assert listed.since is None, "half-made until it is settled"
            assert listed.held, "the run that made it is alive"
            since = datetime.now(UTC)
            for _ in range(2):
                harness.provider().settle(attached.id, since)
            (settled,) = harness.provider().attachments()
            assert settled == replace(listed, since=since, held=settled.held)
            assert [each.birth.set_id for each in harness.provider().snapshots()] == [birth.set_id]
        finally:
            attached.end()
        assert not list(harness.provider().attachments())
        harness.provider().detach(attached.id)
        harness.provider().delete(birth.set_id)
        assert harness.objects() == before

    @pytest.mark.parametrize("access", list(Access))
    def test_an_attached_set_is_busy(self, harness: Harness, volume: Volume, access: Access) -> None:
        birth = take(harness.provider(), harness, [volume])
        seal(harness.provider(), birth)
        (found,) = ready(harness.provider(), harness, birth.set_id)
        attached = attach(harness, found, access)
        try:
            content = describe(attached.path)
            with pytest.raises(BusyError) as busy:
                harness.provider().delete(birth.set_id)
            assert attached.id in busy.value.line() or attached.destination in busy.value.line()
            assert busy.value.cure
            (again,) = harness.provider().snapshots(birth.set_id)
            assert again.state is ImageState.READY and "sealed" in again.marks
            assert describe(attached.path) == content
        finally:
            attached.end()
        harness.provider().delete(birth.set_id)
        assert not list(harness.provider().snapshots())

    def test_detach_of_the_absent_is_done_and_hurts_nothing(self, harness: Harness, volume: Volume) -> None:
        content = describe(self.top(volume))
        birth = take(harness.provider(), harness, [volume])
        (found,) = ready(harness.provider(), harness, birth.set_id)
        before = harness.objects()
        harness.provider().detach(new_attachment_id(utc_now()))
        one, two = attach(harness, found, Access.WRITABLE), attach(harness, found, Access.WRITABLE)
        one.end()
        one.end()
        assert [listed.id for listed in harness.provider().attachments()] == [two.id]
        assert describe(two.path) == content
        two.end()
        assert harness.objects() == before
        assert describe(self.top(volume)) == content
        assert content_of(harness, found) == content

    def test_settling_an_unknown_attachment_is_not_found(self, harness: Harness, volume: Volume) -> None:
        with pytest.raises(NotFoundError):
            harness.provider().settle(new_attachment_id(utc_now()), datetime.now(UTC))
        assert not list(harness.provider().attachments())

    def test_the_same_attachment_twice_is_one(self, harness: Harness, volume: Volume) -> None:
        """After a lost reply: refused or the same again, but never two, and one detach ends it."""
        birth = take(harness.provider(), harness, [volume])
        (found,) = ready(harness.provider(), harness, birth.set_id)
        before = harness.objects()
        attached = attach(harness, found, Access.WRITABLE)
        try:
            content = describe(attached.path)
            try:
                harness.provider().attach(found, attached.id, Access.WRITABLE, attached.destination)
            except SnapshotterError:
                pass
            assert len(list(harness.provider().attachments())) == 1
            assert describe(attached.path) == content
        finally:
            attached.end()
        assert not list(harness.provider().attachments())
        assert harness.objects() == before

    def test_a_destination_with_something_in_it_is_kept(self, harness: Harness, volume: Volume) -> None:
        birth = take(harness.provider(), harness, [volume])
        (found,) = ready(harness.provider(), harness, birth.set_id)
        destination = harness.destination()
        os.mkdir(destination)
        theirs = os.path.join(destination, "theirs")
        with open(theirs, "wb") as file:
            file.write(b"a person's")
        attachment_id = new_attachment_id(utc_now())
        try:
            made = harness.provider().attach(found, attachment_id, Access.WRITABLE, destination)
        except SnapshotterError:
            pass
        else:
            assert not isinstance(made, Tree), "a directory that was not empty was filled"
        harness.provider().detach(attachment_id)
        assert os.listdir(destination) == ["theirs"]
        shutil.rmtree(destination)

    def test_an_empty_destination_will_do(self, harness: Harness, volume: Volume) -> None:
        birth = take(harness.provider(), harness, [volume])
        (found,) = ready(harness.provider(), harness, birth.set_id)
        destination = harness.destination()
        os.mkdir(destination)
        attachment_id = new_attachment_id(utc_now())
        made = harness.provider().attach(found, attachment_id, Access.WRITABLE, destination)
        assert describe(harness.enter(made, destination)) == describe(self.top(volume))
        harness.leave(destination)
        harness.provider().detach(attachment_id)
        assert not os.path.exists(destination) or not os.listdir(destination)

    @pytest.mark.parametrize("how", ["moved away", "removed"])
    def test_what_a_person_put_there_stays(self, harness: Harness, volume: Volume, how: str) -> None:
        birth = take(harness.provider(), harness, [volume])
        (found,) = ready(harness.provider(), harness, birth.set_id)
        attached = attach(harness, found, Access.WRITABLE)
        if not attached.made_tree:
            attached.end()
            pytest.skip("a mount: the place is ours as long as it is mounted")
        moved = attached.destination + ".moved"
        os.rename(attached.destination, moved)
        if how == "removed":
            shutil.rmtree(moved)
        os.mkdir(attached.destination)
        with open(os.path.join(attached.destination, "theirs"), "wb") as file:
            file.write(b"a person's")
        harness.provider().detach(attached.id)
        assert os.listdir(attached.destination) == ["theirs"]
        assert not list(harness.provider().attachments())
        shutil.rmtree(attached.destination)
        shutil.rmtree(moved, ignore_errors=True)
