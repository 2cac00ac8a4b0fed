"""What of the lvm provider needs no LVM: its tags, LVM's report and names, sizes, what is read from fstab and crypttab.
The driver itself is held to the contract in the lab."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from providers.lvm import LvmProvider, _Made, claims, clones, commands, images, room, swaps
from providers.lvm.reports import (
    Row,
    attachment_record,
    birth_of,
    birth_tags,
    hanging_on,
    image_name,
    lacks,
    maker_lives,
    maker_tag,
    mark_tag,
    marks,
    parse,
    snapshot,
    tag,
    to_text,
    volume_of,
)
from snapshotter import provider
from snapshotter.core.command import Outcome
from snapshotter.core.errors import (
    BusyError,
    NotFoundError,
    PreconditionError,
    SnapshotterError,
    StorageError,
    UsageError,
)
from snapshotter.core.model import ImageState, Volume
from snapshotter.host import block
from snapshotter.provider import Settings
from snapshotter.testing import make_birth

#: lvm(8): what a tag may be.
TAG = re.compile(r"[A-Za-z0-9_+./=!:#&][A-Za-z0-9_+./=!:#&-]{0,1023}")
MIB, GIB = 1 << 20, 1 << 30

#: As 2.03.16 printed it in the lab.
REPORT = """
  { "report": [ { "lv": [
    {"vg_name":"tv-a", "vg_uuid":"Uc9npy-qJ9R-zcFQ-EGQV-R788-xSdG-EK0Swg", "vg_attr":"wz--n-", "vg_size":"8585740288",
     "vg_free":"6060769280", "vg_extent_size":"4194304", "pv_count":"1", "vg_mda_size":"1044480",
     "vg_mda_free":"519680", "lv_name":"data", "lv_uuid":"txOUbv-5mg2-jugW-Z4R4-18zB-Fovf-vT9X8R",
     "lv_attr":"Vwi-aotz--", "lv_size":"1073741824",
     "lv_tags":"", "pool_lv":"pool", "origin":"", "data_percent":"4.78", "metadata_percent":"", "lv_metadata_size":"",
     "chunk_size":"0", "lv_layout":"thin,sparse"},
    {"vg_name":"tv-a", "vg_uuid":"Uc9npy-qJ9R-zcFQ-EGQV-R788-xSdG-EK0Swg", "vg_attr":"wz--n-", "vg_size":"8585740288",
     "vg_free":"6060769280", "vg_extent_size":"4194304", "pv_count":"1", "vg_mda_size":"1044480",
     "vg_mda_free":"519680", "lv_name":"pool", "lv_uuid":"U6anhp-NrTY-u3E2-0gDY-DtRZ-s7CG-zbfVry",
     "lv_attr":"twi-aotz--", "lv_size":"2147483648",
     "lv_tags":"backup=1,theirs", "pool_lv":"", "origin":"", "data_percent":"2.40", "metadata_percent":"11.82",
     "lv_metadata_size":"104857600", "chunk_size":"65536", "lv_layout":"thin,pool"}
  ] } ] }
"""


def row(**changes: Any) -> Row:
    return msgspec.structs.replace(parse(REPORT)[0], **changes)


def pool(**changes: Any) -> Row:
    return msgspec.structs.replace(parse(REPORT)[1], **changes)


def test_the_report_is_read() -> None:
    data, its_pool = parse(REPORT)
    assert (data.id, data.thin, data.active, data.open, data.skipped, data.tags) == (
        "tv-a/data", True, True, True, False, (),
    )  # fmt: skip
    assert (its_pool.data, its_pool.metadata, its_pool.tags) == (2.4, 11.82, ("backup=1", "theirs"))
    assert (data.size, data.extent, data.mda_free, data.metadata) == (GIB, 4 * MIB, 519680, None)
    assert data.dm_name == "tv--a-data"
    assert row(attr="owi-aotz--").thin, "somebody's classic snapshot of it changes nothing"
    assert not its_pool.thin and not row(layout="cache").thin


names = st.text("abcXYZ019+_.-", min_size=1, max_size=20).filter(lambda name: name[0] not in "-." and name.strip("."))


@given(vg=names, lv=names)
def test_device_names_are_read_back(vg: str, lv: str) -> None:
    found = row(vg=vg, name=lv)
    assert volume_of(found.dm_name, found.dm_uuid) == f"{vg}/{lv}"
    assert volume_of(f"{found.dm_name}-real", f"{found.dm_uuid}-real") is None, "a hidden layer is no volume"
    assert volume_of(found.dm_name, "CRYPT-LUKS2-0123-data") is None


@given(
    node=st.text(min_size=1, max_size=20),
    path=st.text(min_size=1, max_size=200),
    volume=st.from_regex(r"[a-z][a-z0-9_.-]{0,40}/[a-z][a-z0-9_.-]{0,40}", fullmatch=True),
)
def test_a_record_survives_as_tags(node: str, path: str, volume: str) -> None:
    birth = make_birth([Volume("lvm", volume, "/" + path)], node=node)
    try:
        tags = birth_tags(birth, 7)
    except PreconditionError:
        return
    assert all(TAG.fullmatch(text) for text in tags), "LVM would refuse it"
    image = row(name="x", tags=("theirs", *tags, mark_tag("sealed", "20261122t100630z")), attr="Vri---tz-k")
    found = birth_of(image)
    assert found is not None and (found.set_id, found.node, found.members) == (birth.set_id, node, birth.members)
    listed = snapshot(image, [image, pool()])
    assert listed is not None and listed.order == 7 and dict(listed.marks) == {"sealed": "20261122t100630z"}


@given(path=st.text(max_size=1500))
@example(path=os.fsdecode(b"/data/\xff\xfe"))
def test_an_attachment_survives_as_tags(path: str) -> None:
    record = {"id": "a20261122t100630z-5f3a9c", "member": 0, "path": path}
    tags = [tag(f"attachment{k}", chunk) for k, chunk in enumerate(to_text(record))]
    assert all(TAG.fullmatch(text) for text in tags)
    assert attachment_record(row(tags=tuple(reversed(tags)))) == record, "LVM keeps no order of tags"


@pytest.mark.parametrize(
    "tags",
    [(), ("snapshotter.birth0=eyJ2Ijox",), ("snapshotter.attachment0=bm9uZQ",), ("snapshotter.", "snapshotter.birth0")],
)
def test_others_tags_are_no_records(tags: tuple[str, ...]) -> None:
    assert snapshot(row(tags=tags), []) is None
    assert attachment_record(row(tags=tags)) is None
    assert marks(row(tags=("snapshotter.mark.colour=red",))) == {}


def test_the_maker_is_known_while_it_lives() -> None:
    assert maker_lives(row(tags=(maker_tag(),)))
    assert not maker_lives(row(tags=(tag("maker", f"{os.getpid()}.1"),))), "another process of that number"
    assert not maker_lives(row(tags=(tag("maker", ""),)))


THIN, CLASSIC = "Vri---tz-k", "sri-a-s---"


@pytest.mark.parametrize(
    ("attr", "pool_attr", "valid"),
    [
        (THIN, "twi-aotz--", True),
        (THIN, "twi---tz--", True),  # nothing is active
        (THIN, "twi-aotzD-", True),  # full, and what is there can be read
        (THIN, "twi-aotzM-", True),
        (THIN, "twi-aotzF-", False),
        (THIN, "twi-cotz--", False),
        ("Vwi---tz-k", "twi-aotz--", False),
        ("Sri---tz-k", "twi-aotz--", False),  # its merge waits for the origin's next activation
        ("Vri---tzpk", "twi-aotz--", False),
        (CLASSIC, "", True),
        ("sri---s---", "", True),  # inactive: can't be asked, and isn't attached
        ("sri-I-s---", "", False),
        ("sri-S-s---", "", False),
        ("Sri-a-s---", "", False),
        ("swi-a-s---", "", False),
        ("-ri-a-----", "", False),  # a killed lvcreate had come no further
        ("-wi-a-----", "", False),
    ],
)
def test_an_image_is_judged_by_what_lvm_says(attr: str, pool_attr: str, valid: bool) -> None:
    thin = "t" in attr[6:7]
    image = row(attr=attr, pool="pool" if thin else "", origin="data")
    why = lacks(image, pool(attr=pool_attr) if thin else None)
    assert bool(why) is not valid, why


def test_an_image_of_a_dead_run_is_none_until_sealed() -> None:
    birth = make_birth([Volume("lvm", "tv-a/data", "/d")])
    tags = birth_tags(birth, 1)
    for sealed, maker, state in (
        ("", tag("maker", f"{os.getpid()}.1"), ImageState.INVALID),
        ("", maker_tag(), ImageState.READY),
        (mark_tag("sealed", "20261122t100630z"), tag("maker", f"{os.getpid()}.1"), ImageState.READY),
    ):
        image = row(name=image_name(birth), attr=THIN, tags=tuple(text for text in (*tags, maker, sealed) if text))
        found = snapshot(image, [image, pool()])
        assert found is not None and found.state is state


def test_what_carries_a_record_by_another_name_is_no_image() -> None:
    birth = make_birth([Volume("lvm", "tv-a/data", "/d")])
    tags = (*birth_tags(birth, 1), mark_tag("sealed", "20261122t100630z"))
    image, kept = row(name=image_name(birth), attr=THIN, tags=tags), row(name="production", attr=THIN, tags=tags)
    found = snapshot(kept, [kept, pool()])
    assert found is not None and found.state is ImageState.INVALID and "renamed it to production" in found.why
    copied = msgspec.structs.replace(image, vg="copy")
    assert images.in_use([image, kept], birth.set_id) is None, "only one of them would go"
    refused = images.in_use([image, copied, kept], birth.set_id)
    assert refused is not None and image.id in refused.line() and copied.id in refused.line()
    wanted = snapshot(copied, [copied, msgspec.structs.replace(pool(), vg="copy")])
    assert wanted is not None
    assert images.find_image([image, copied, msgspec.structs.replace(pool(), vg="copy")], wanted) is copied


def test_a_full_classic_snapshot_is_none() -> None:
    full = row(attr=CLASSIC, pool="", origin="data", data=100.0)
    assert "overflowed" in lacks(full, None)
    found = snapshot(
        msgspec.structs.replace(full, tags=tuple(birth_tags(make_birth([Volume("lvm", "tv-a/data", "/d")]), 1))), []
    )
    assert found is not None and found.state is ImageState.INVALID


# ------------------------------------------------------------------------------------------------------------ room


@pytest.mark.parametrize(("given", "bytes_"), [("10G", 10 * GIB), ("512m", 512 * MIB), ("1.5T", 1536 * GIB), ("4096", 4096), (7, 7), ("2GiB", 2 * GIB)])  # fmt: skip  # noqa: E501
def test_sizes_are_read(given: object, bytes_: int) -> None:
    kind = provider.load("lvm")
    assert provider.parse_options(kind, {"size": given}) == {"size": bytes_}


@pytest.mark.parametrize("given", ["", "G", "-1", "0", "ten", "10%", "infG", "nan", "1e999T"])
def test_what_is_no_size_is_refused(given: str) -> None:
    with pytest.raises(UsageError):
        provider.parse_options(provider.load("lvm"), {"size": given})


@given(
    size=st.integers(4 * MIB, 4 << 40),
    free=st.integers(0, 8 << 40),
    rate=st.floats(0, 1e9),
    wanted=st.none() | st.integers(1, 8 << 40),
)
def test_a_classic_snapshot_has_a_sane_size(size: int, free: int, rate: float, wanted: int | None) -> None:
    origin = row(size=size, vg_free=free)
    try:
        (given,) = room.cow_sizes([origin], wanted, [rate])
    except PreconditionError as error:
        assert error.cure
        return
    assert 0 < given <= free and given % origin.extent == 0
    assert given <= size * 1.01 + 3 * origin.extent, "more than could ever be used"
    left = free - given
    if wanted is None and given < size and left - room.least_store(origin) >= origin.extent:
        assert given >= min(2 * rate * room.HORIZON_S, size) - origin.extent, "it would overflow within a day"
    if wanted is None:
        store = room.store_size(origin, left, None)  # else what was taken could not be restored
        assert room.least_store(origin) <= store <= left


def test_volumes_of_one_set_share_the_room() -> None:
    """The first took all that its group had, and the second was refused; then the clone of the last was."""
    origins = [row(name=name, size=400 * GIB, vg_free=60 * GIB) for name in ("data", "log")]
    elsewhere = row(vg="other", name="more", size=400 * GIB, vg_free=60 * GIB)
    first, second, third = room.cow_sizes([*origins, elsewhere], None, [1e6, 1e5, 1e6])
    least = room.least_store(origins[0])
    assert 60 * GIB - 2 * (least + MIB * 4) <= first + second + 2 * least <= 60 * GIB < 2 * third
    assert second >= 40 * GIB * 0.1 and first > second, "in proportion"
    assert third + least <= 60 * GIB
    assert room.cow_sizes([], None, []) == []
    with pytest.raises(PreconditionError, match="room for a clone"):
        room.cow_sizes([row(size=400 * GIB, vg_free=6 * GIB)], None, [0.0])
    assert room.cow_sizes([row(size=400 * GIB, vg_free=6 * GIB)], 6 * GIB, [0.0]) == [6 * GIB], "as it was asked for"
    with pytest.raises(PreconditionError) as refused:
        room.store_size(row(size=400 * GIB, vg_free=0), 0, None)
    assert "--to" in refused.value.cure, "--in-place takes no such option"


@given(
    sizes=st.lists(st.integers(4 * MIB, 4 << 40), min_size=1, max_size=5),
    free=st.integers(0, 2 << 20).map(lambda extents: extents * 4 * MIB),
    rate=st.floats(0, 1e9),
)
@example(sizes=[100 * GIB, 400 * GIB], free=20 * GIB, rate=0.0)
@example(sizes=[100 * GIB] * 3, free=10 * GIB, rate=0.0)
def test_what_was_taken_can_be_attached_whole(sizes: list[int], free: int, rate: float) -> None:
    origins = [row(name=f"v{number}", size=size, vg_free=free) for number, size in enumerate(sizes)]
    try:
        taken = room.cow_sizes(origins, None, [rate] * len(origins))
    except PreconditionError:
        return
    left = free - sum(taken)
    for number, origin in enumerate(origins):
        store = room.store_size(origin, left, None, origins[number + 1 :])
        assert store >= room.least_store(origin)
        left -= store
    assert left >= 0


def test_a_group_without_room_for_tags_is_refused() -> None:
    with pytest.raises(PreconditionError, match="metadata area"):
        room.check_group(row(mda_free=1500), ["x" * 600], 1)
    room.check_group(row(mda_free=20_000), ["x" * 600], 1)


@pytest.mark.parametrize(
    "changes", [{"data": 95.0}, {"metadata": 95.0}, {"attr": "twi-aotzF-"}, {"attr": "twi-aotzM-"}]
)
def test_a_pool_that_would_stop_its_origin_is_refused(changes: dict[str, Any]) -> None:
    room.check_pool(pool(), 0.1)
    with pytest.raises(PreconditionError) as refused:
        room.check_pool(pool(**changes), 0.1)
    assert "lv" in refused.value.cure, "it says what to run"


def test_lvms_own_threshold_is_a_limit_too() -> None:
    room.check_pool(pool(data=62.0), 0.1)
    for full in (pool(data=62.0), pool(metadata=62.0)):
        with pytest.raises(PreconditionError, match="limit 60 %"):
            room.check_pool(full, 0.1, 60.0)


@given(
    size=st.integers(64 * MIB, 1 << 40),
    room_=st.integers(4 * MIB, 1 << 40),
    used=st.floats(0, 99),
    need=st.integers(1, 1 << 40),
)
def test_a_copy_that_would_overflow_a_classic_snapshot_is_refused(
    size: int, room_: int, used: float, need: int
) -> None:
    origin = row(name="data", pool="", layout="linear", attr="owi-aos---", size=size)
    image = row(name="image", pool="", layout="linear", attr=CLASSIC, origin="data", size=room_, data=used)
    left = room_ - round(room_ * used / 100)
    try:
        room.check_writes([origin, image], {origin.id: need})
    except PreconditionError as refused:
        assert room_ < room.whole(size), "one with room for all of its origin can't overflow"
        assert re.search(r"lvextend -L\+([0-9]+)M tv-a/image", refused.cure)
        more = int(refused.cure.partition("-L+")[2].partition("M")[0]) * MIB
        grown = msgspec.structs.replace(image, size=room_ + more, data=100 * (room_ - left) / (room_ + more))
        room.check_writes([origin, grown, row(name="other")], {origin.id: need})
    else:
        assert need <= left or size <= left or room_ >= room.whole(size)
    lost = msgspec.structs.replace(image, data=100.0, attr="sri-I-s---")
    room.check_writes([origin, lost], {origin.id: need})
    room.check_writes([origin, msgspec.structs.replace(image, origin="another")], {origin.id: need})


def test_a_copy_that_would_fill_a_thin_pool_is_refused() -> None:
    data, other, its_pool = row(), row(name="other"), pool(data=50.0)
    room.check_writes([data, its_pool], {data.id: 512 * MIB})
    for full in ({"data": 80.0}, {"metadata": 94.99}):
        with pytest.raises(PreconditionError, match="stops all") as refused:
            room.check_writes([data, pool(**full)], {data.id: 512 * MIB})
        assert "lvextend" in refused.value.cure and its_pool.id in refused.value.cure
    with pytest.raises(PreconditionError):  # they share the room
        room.check_writes([data, other, its_pool], {data.id: 512 * MIB, other.id: 512 * MIB})
    room.check_writes([data, pool(data=96.0)], {data.id: 4096})  # a key alone


# ------------------------------------------------------------------------------------------------- other files


@pytest.mark.skipif(shutil.which("mkfs.ext4", path="/sbin:/usr/sbin:/usr/bin") is None, reason="needs mkfs.ext4")
@pytest.mark.parametrize("kind", ["inside", "elsewhere", "none", "no file system"])
def test_a_journal_on_another_device_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(16 * MIB)
    how = ["-O", "^has_journal"] if kind == "none" else []
    if kind != "no file system":
        subprocess.run(
            ["mkfs.ext4", "-q", "-F", *how, str(image)], check=True, env={"PATH": "/sbin:/usr/sbin:/usr/bin"}
        )
    if kind == "elsewhere":  # as mke2fs -J device= would write it
        with open(image, "r+b") as file:
            file.seek(1024 + 0xE0)
            file.write(bytes(4))
    monkeypatch.setattr(block, "device", lambda number: block.Device(number, f"..{image}"))
    assert claims.has_journal_elsewhere("254:0") is (kind == "elsewhere")


def test_fstab_by_lvms_uuid_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = row()
    fstab = tmp_path / "fstab"
    fstab.write_text(
        "# /dev/disk/by-id/dm-uuid-" + origin.dm_uuid + " /old ext4 defaults 0 0\n"
        "/dev/tv-a/data /data ext4 defaults 0 2\n"
        f"/dev/disk/by-id/dm-uuid-{origin.dm_uuid} /data2 ext4 defaults 0 2\n"
    )
    monkeypatch.setattr(swaps, "FSTAB", str(fstab))
    assert [number for number, _ in swaps.fstab_by_uuid(origin)] == [3]
    monkeypatch.setattr(swaps, "FSTAB", str(tmp_path / "none"))
    assert not list(swaps.fstab_by_uuid(origin))


def test_the_key_file_is_found_in_crypttab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uuid = "0a1b2c3d-0000-1111-2222-333344445555"
    device = tmp_path / "device"
    device.write_bytes(b"LUKS\xba\xbe\x00\x02".ljust(168, b"\0") + uuid.encode().ljust(40, b"\0") + bytes(400))
    table = tmp_path / "crypttab"
    monkeypatch.setattr(clones, "CRYPTTAB", str(table))
    for text, key in (
        (f"data UUID={uuid} /etc/keys/data luks\n", "/etc/keys/data"),
        (f"data {device} /etc/keys/data luks\n", "/etc/keys/data"),
        (f"# data UUID={uuid} /etc/keys/data luks\n", None),
        (f"data UUID={uuid} none luks\n", None),
        ("data UUID=another /etc/keys/data luks\n", None),
    ):
        table.write_text(text)
        assert clones._key_file(uuid) == key, text


def test_the_way_down_ends_where_it_forks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree as sysfs has it: dm-1 (LUKS) on dm-0 (a volume) on nvme0n1p2 on nvme0n1; md0 on two disks, a pool and a
    thin volume on that."""
    devices = tmp_path / "devices"
    for name, number, slaves in (
        ("nvme0n1", "259:0", []),
        ("nvme0n1/nvme0n1p2", "259:2", []),
        ("dm-0", "254:0", ["nvme0n1/nvme0n1p2"]),
        ("dm-1", "254:1", ["dm-0"]),
        ("sdb", "8:16", []),
        ("sdc", "8:32", []),
        ("md0", "9:0", ["sdb", "sdc"]),
        ("dm-2", "254:2", ["md0"]),
        ("dm-3", "254:3", ["dm-2"]),
    ):
        top = devices / name
        top.mkdir(parents=True)
        (top / "dev").write_text(number + "\n")
        for slave in slaves:
            (top / "slaves").mkdir(exist_ok=True)
            (top / "slaves" / Path(slave).name).symlink_to(devices / slave)
        (tmp_path / number).symlink_to(top)
    (devices / "nvme0n1/nvme0n1p2/partition").write_text("2\n")
    for name, uuid in (
        ("dm-0", row().dm_uuid),
        ("dm-1", "CRYPT-LUKS2-x-data"),
        ("dm-2", f"{pool().dm_uuid}-tpool"),
        ("dm-3", row().dm_uuid),
    ):
        (devices / name / "dm").mkdir()
        (devices / name / "dm" / "uuid").write_text(uuid + "\n")
        (devices / name / "dm" / "name").write_text("tv--a-data\n" if name == "dm-0" else "data\n")
    monkeypatch.setattr(block, "SYS_BLOCK", str(tmp_path))
    chain = block.chain("254:1")
    assert [device.name for device in chain] == ["dm-1", "dm-0", "nvme0n1p2", "nvme0n1"]
    assert [device.partition for device in chain] == [False, False, True, False]
    assert [volume_of(device.dm_name, device.dm_uuid) for device in chain] == [None, "tv-a/data", None, None]
    assert [device.name for device in block.chain("254:2")] == ["dm-2", "md0"]
    assert block.disks("254:2") == ["8:16", "8:32"] and block.disks("254:1") == ["259:0"]
    assert block.chain("1:99") == []
    # What LVM wrote is flushed through what LVM wrote to: md0 may have a journal of its own.
    assert images._physical("254:0", row()) == ["259:2"]
    assert images._physical("254:3", row()) == ["9:0"]


@pytest.mark.parametrize("same_run", [True, False])
def test_the_seal_reaches_the_disks_of_the_images_too(monkeypatch: pytest.MonkeyPatch, same_run: bool) -> None:
    """What a classic image holds may be on another disk than its origin is."""
    birth = make_birth([Volume("lvm", "tv-a/data", "/d")])
    origin = row(attr="owi-aos---", pool="", layout="linear")
    tags = (*birth_tags(birth, 1), maker_tag())
    image = row(name=image_name(birth), attr=CLASSIC, pool="", layout="linear", origin="data", tags=tags)
    flushed: list[str] = []
    monkeypatch.setattr(images, "carry_out", lambda work, _: None)
    monkeypatch.setattr(images, "flush", lambda rows: flushed.extend(each.device for each in rows))
    lvm = LvmProvider(Settings("/nowhere"))
    monkeypatch.setattr(lvm, "_report", lambda: [origin, image])
    if same_run:
        lvm._made[birth.set_id] = [_Made(image.id, origin, maker_tag())]
    lvm.mark(birth.set_id, {"sealed": "20261122t100630z"})
    assert set(flushed) == {origin.device, image.device}


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ('  Failed to find logical volume "vg/none"', NotFoundError),
        ('  Volume group "none" not found\n  Cannot process volume group none', NotFoundError),
        (
            "  WARNING: Device /dev/sdb not found, see vgs\n  Insufficient free extents: insufficient free space",
            StorageError,
        ),
        ("  WARNING: PV abc not found\n  Logical volume vg/x in use.", BusyError),
        (
            "  Couldn't find device with uuid x.\n  /dev/disk/by-id/x: stat failed: not found\n  Something new",
            StorageError,
        ),
    ],
)
def test_not_found_in_a_warning_is_not_absent(said: str, kind: type[SnapshotterError]) -> None:
    """Else what is there would count as removed."""
    assert type(commands.failure(Outcome(("lvremove",), 5, "", said), "vg/x")) is kind


#: What LVM 2.03.16 says, to the letter.
ORPHAN = """\
  device-mapper: message ioctl on  (254:2) failed: File exists
  Failed to process message "create_snap 2 1".
  Thin pool e-p1-tpool (254:2) already contain thin device with device_id 2.
  Manual intervention may be required to remove device dev_id=2 in thin pool metadata.
  Failed to suspend thin snapshot origin e/base.
"""


def test_a_device_that_lvm_knows_nothing_of_is_named() -> None:
    error = commands.failure(Outcome(("lvcreate",), 5, "", ORPHAN), "e/base")
    assert isinstance(error, StorageError) and "e-p1-tpool has a device 2" in error.line()
    assert error.cure.endswith("dmsetup message e-p1-tpool 0 'delete 2'")


def test_what_goes_with_a_volume() -> None:
    image = row(name="i", pool="p", layout="thin,sparse")
    of_its_pool = row(name="a", pool="p", layout="thin,sparse", origin="i", attr="Vwi-a-tz--")
    assert hanging_on([image, of_its_pool], image) is None
    for other in (
        row(name="b", pool="other", layout="thin,sparse", origin="i", attr="Vwi-a-tz--"),
        row(name="c", pool="", layout="linear", origin="i", attr="swi-a-s---"),
    ):
        assert hanging_on([image, of_its_pool, other], image) == other


def test_what_is_suspended_with_a_volume_is_on_record(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed command may leave each of them so, and only what is on record is ever resumed."""
    origin = row(attr="owi-aos---", pool="", layout="linear")
    kept, other = (
        row(name=name, uuid=f"{name}-uuid", attr=CLASSIC, pool="", layout="linear", origin=of)
        for name, of in (("kept", "data"), ("others", "another"))
    )
    birth = make_birth([Volume("lvm", origin.id, "/d")])
    made = msgspec.structs.replace(kept, name=image_name(birth), uuid="made-uuid", tags=tuple(birth_tags(birth, 1)))
    noted: list[list[str]] = []

    def run(group: commands.Group, argv: Any) -> Outcome:
        noted.append(json.loads((records / group.vg).read_text())["uuids"])
        return Outcome(tuple(argv), 0, "", "")

    monkeypatch.setattr(commands.Group, "_run", run)
    lvm, group = LvmProvider(Settings("/nowhere")), commands.Group(origin.vg)
    lvm._shoot(group, origin, [origin, kept, other], birth.of_member(0), [], 4 * MIB)
    images.remove([origin, kept, other, made], birth.set_id)
    assert len(noted) == 2
    for uuids in noted:
        assert {origin.dm_uuid, kept.dm_uuid} <= set(uuids) and other.dm_uuid not in uuids


@pytest.mark.parametrize("thin", [True, False])
def test_a_classic_image_loses_its_seal_before_it_goes(
    records: Path, monkeypatch: pytest.MonkeyPatch, thin: bool
) -> None:
    """lvremove of one has two steps: killed between them it left a sealed volume that was no image: damaged."""
    birth = make_birth([Volume("lvm", "tv-a/data", "/d")])
    tags = (*birth_tags(birth, 1), mark_tag("sealed", "20261129t000000z"))
    classic = {"attr": "sri-a-s---", "layout": "linear", "pool": "", "origin": "data"}
    made = row(name=image_name(birth), uuid="made", tags=tags, **({"attr": "Vri---tz-k"} if thin else classic))
    ran: list[list[str]] = []

    def run(group: commands.Group, argv: Any) -> Outcome:
        ran.append(list(argv))
        return Outcome(tuple(argv), 0, "", "")

    monkeypatch.setattr(commands.Group, "_run", run)
    images.remove([made], birth.set_id)
    assert [argv[0] for argv in ran] == (["lvremove"] if thin else ["lvchange", "lvremove"])
    assert thin or ran[0][1:] == ["--deltag", mark_tag("sealed", "20261129t000000z"), made.id]


#: LVM 2.03.16 where the metadata of a group can't be read.
AMID = """  {
      "report": [
  Retrying metadata scan.
          {
              "lv": [
%s
              ]
          }
      ]
  }
"""


def test_what_lvm_says_before_or_amid_its_report_is_no_part_of_it() -> None:
    """Amid it, a group that couldn't be read hid all others: no set was listed, none could be taken."""
    assert parse("  Retrying metadata scan.\n" + REPORT) == parse(REPORT)
    rows = json.dumps(json.loads(REPORT)["report"][0]["lv"], indent=0)[1:-1]
    assert parse(AMID % rows) == parse(REPORT)


def test_a_volume_of_several_segments_is_one_volume() -> None:
    """`lvs` told of it twice, so its image had a twin, and could never be removed."""
    report = json.loads(REPORT)
    report["report"][0]["lv"] += report["report"][0]["lv"]
    assert parse(json.dumps(report)) == parse(REPORT)


def test_a_commit_is_refused_before_any_other_is_made() -> None:
    place, origin = (
        tag("place", "data"),
        row(name="w1-aside", uuid="o", attr="Vwi-a-tz--", tags=(tag("aside", "w1"), tag("place", "data"))),
    )
    clone = row(name="data", uuid="c", tags=(tag("swap", "w1"), place, tag("origin", "o")))
    swaps.refuse_commit(lambda: [clone, origin], "w1")
    swaps.refuse_commit(lambda: [clone, origin], "w2")
    with pytest.raises(BusyError, match="in use"):
        swaps.refuse_commit(lambda: [clone, msgspec.structs.replace(origin, attr="Vwi-aotz--")], "w1")
    with pytest.raises(StorageError, match="its clone is gone"):
        swaps.refuse_commit(lambda: [origin], "w1")
    with pytest.raises(StorageError, match="never finished"):
        swaps.refuse_commit(lambda: [msgspec.structs.replace(clone, name="w1-new"), origin], "w1")


def test_a_swap_that_a_copied_group_has_too_is_not_guessed_at() -> None:
    """vgimportclone copies tags and the volumes' UUIDs: of the two, the wrong one's set-aside was removed."""
    place = tag("place", "data")
    origin = row(name="w1-aside", uuid="o", attr="Vwi---tz-k", tags=(tag("aside", "w1"), place, tag("committed", "1")))
    clone = row(name="data", uuid="c", tags=(tag("swap", "w1"), place, tag("origin", "o")))
    copies = [msgspec.structs.replace(each, vg="copy") for each in (origin, clone)]
    rows = [origin, clone, *copies]
    assert {(each.vg, each.aside and each.aside.vg, each.clone and each.clone.vg) for each in swaps.found(rows)} == {
        ("tv-a", "tv-a", "tv-a"),
        ("copy", "copy", "copy"),
    }
    for end in (swaps.swap_back, swaps.swap_commit):
        with pytest.raises(BusyError, match="tv-a and copy") as refused:
            end(lambda: rows, "w1")
        assert "/data" not in refused.value.cure, "which of them is the copy nobody can tell"
    with pytest.raises(BusyError, match="tv-a and copy"):  # what an undo asks before it stops the node
        swaps.refuse_copied(rows, "tv-a/data")
    swaps.refuse_copied(rows, "tv-a/other")
    swaps.refuse_copied([origin, clone], "tv-a/data")
    assert swaps.finish_commits([origin, copies[0]]) == []


def test_a_clone_that_a_copied_group_has_too_is_not_guessed_at() -> None:
    id = "a20261122t100630z-5f3a9c"
    tags = tuple(tag(f"attachment{k}", text) for k, text in enumerate(to_text({"id": id, "member": 0})))
    part = row(name=f"{id}-0", tags=tags)
    with pytest.raises(BusyError, match="copied group"):
        clones.detach([part, msgspec.structs.replace(part, vg="copy")], id)


def test_a_swap_is_refused_while_the_node_runs_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`swap` itself would, with the node stopped by then."""
    birth = make_birth([Volume("lvm", "tv-a/data", "/d")])
    tags = (*birth_tags(birth, 1), mark_tag("sealed", "20261122t100630z"))
    image = row(name=image_name(birth), attr=THIN, origin="data", tags=tags)
    found = snapshot(image, [image, pool()])
    assert found is not None
    lvm, volume = LvmProvider(Settings("/nowhere")), Volume("lvm", "tv-a/data", "/d")
    fstab = tmp_path / "fstab"
    monkeypatch.setattr(swaps, "FSTAB", str(fstab))
    rows = [row(), image, pool()]
    monkeypatch.setattr(lvm, "_report", lambda groups: rows)
    assert lvm.swappable(volume, found), "it is mounted: open"
    rows[0] = row(pool="", layout="linear", attr="owi-aos---")
    assert not lvm.swappable(volume, found)
    rows[0] = row(attr="Vwi-aotz-k")
    with pytest.raises(PreconditionError, match="left out of activation"):
        lvm.swappable(volume, found)
    rows[:] = [row(), image, pool(), row(name="theirs", attr="swi-a-s---", pool="", layout="linear", origin="data")]
    with pytest.raises(BusyError, match="theirs hangs on it"):
        lvm.swappable(volume, found)
    rows.pop()
    fstab.write_text(f"/dev/disk/by-id/dm-uuid-{row().dm_uuid} /d ext4 defaults 0 2\n")
    with pytest.raises(PreconditionError, match="line 1"):
        lvm.swappable(volume, found)


def test_reports_that_are_none_are_refused() -> None:
    for text in ("", "{}", '{"report": []', json.dumps({"report": [{"lv": [{"lv_name": "x"}]}]})):
        with pytest.raises((ValueError, KeyError)):
            parse(text)


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a run notes the groups that it changes."""
    monkeypatch.setenv("SNAPSHOTTER_RUN", str(tmp_path / "run"))
    return Path(commands._directory())


def test_only_a_driver_with_a_record_is_asked_to_resume(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first act of take, tick and reap, which must cost nothing where nothing was left."""
    asked: list[str] = []

    def load(name: str) -> type[provider.Provider]:
        asked.append(name)
        return real(name)

    real = provider.load
    monkeypatch.setattr(provider, "load", load)
    assert provider.resume() == [] and asked == []
    (records / "vg").write_text("{}")
    monkeypatch.setattr(commands.Group, "recover", lambda group: [f"{group.vg}-data"])
    (name,) = provider.resume()
    assert "vg-data" in name and asked == ["lvm"]


def test_one_groups_trouble_is_no_others(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recover(group: commands.Group) -> list[str]:
        if group.vg == "bad":
            raise StorageError("can't be resumed", object="bad-data")
        return [f"{group.vg}-data"]

    monkeypatch.setattr(commands.Group, "recover", recover)
    for vg, born in (("bad", "bad-s20261122t100630z--5f3a9c--0"), ("fine", "")):
        (records / vg).write_text(json.dumps({"names": [born]}))
    resumed, failed = commands.recover_all()
    assert resumed == ["fine-data"] and [error.object for error in failed] == ["bad-data"]
    assert not commands.wait_for_dead_runs(["another"])
    assert commands.wait_for_dead_runs(["fine"]), "there may be news now"
    assert not commands.wait_for_dead_runs([], "s20261122t100630z-000000")
    for groups, made in ((["bad"], ""), ([], "s20261122t100630z-5f3a9c")):
        with pytest.raises(StorageError):
            commands.wait_for_dead_runs(groups, made)


def test_a_kernel_without_classic_snapshots_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "dm_snapshot"
    monkeypatch.setattr(commands, "TARGET", str(module))
    for loads in (True, False):
        tool = tmp_path / "modprobe"
        tool.write_text(f"#!/bin/sh\n{'mkdir ' + str(module) if loads else 'exit 1'}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        if loads:
            commands.check_target()
            module.rmdir()
        else:
            with pytest.raises(PreconditionError) as refused:
                commands.check_target()
            assert "modprobe dm_snapshot" in refused.value.cure
