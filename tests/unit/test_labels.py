"""The one codec for every store: what goes in comes back, 560 bytes at most, and garbage is never an error."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from snapshotter.core import labels
from snapshotter.core.errors import PreconditionError
from snapshotter.core.labels import (
    MARK_NAMES,
    LabelLimits,
    apply_marks,
    check_marks,
    decode_birth,
    encode_birth,
    merge_marks,
    pack,
    path_hash,
    unpack,
    with_paths,
)
from snapshotter.core.model import Birth, Member, Root

#: Stores as they are: an LVM tag, an EC2 tag, a GCE label, a ZFS property, a file.
STORES = {
    "lvm": LabelLimits(max_value=900, value_pattern=r"[A-Za-z0-9_+.\-/=!:#&]*"),
    "ec2": LabelLimits(max_value=256, max_chunks=4),
    "narrow": LabelLimits(max_value=63, max_chunks=12, value_pattern=r"[A-Za-z0-9_-]*"),
    "zfs": LabelLimits(),
}

# As the kernel gives names: any bytes but NUL and slash, decoded with surrogateescape.
names = st.binary(min_size=1, max_size=60).map(lambda raw: os.fsdecode(raw.replace(b"/", b"_").replace(b"\0", b"_")))
paths = st.lists(names, min_size=1, max_size=8).map(lambda parts: "/" + "/".join(parts))
insides = st.one_of(st.just(""), paths.map(lambda path: path[1:]))
moments = st.datetimes(datetime(1971, 1, 1), datetime(2200, 1, 1)).map(lambda at: at.replace(microsecond=0, tzinfo=UTC))
words = st.text(st.characters(codec="utf-8"), max_size=12)


@st.composite
def births(draw: st.DrawFn) -> Birth:
    members = draw(st.lists(st.builds(Member, provider=words, volume=words), min_size=1, max_size=4))
    index = st.integers(0, len(members) - 1)
    return Birth(
        set_id=draw(st.from_regex(r"s[0-9]{8}t[0-9]{6}z-[0-9a-f]{6}", fullmatch=True)),
        target=draw(st.from_regex(r"[0-9a-f]{16}", fullmatch=True)),
        node=draw(words),
        host=draw(words),
        profile=draw(words),
        roots=tuple(draw(st.lists(st.builds(Root, path=paths, member=index, inside=insides), min_size=1, max_size=4))),
        members=tuple(members),
        taken_at=draw(moments),
        deadline=draw(moments),
        slot=draw(words),
        address=draw(st.sampled_from(["", "0x" + "ab" * 20])),
        member=draw(index),
    )


def encoded(birth: Birth) -> str | None:
    try:
        return encode_birth(birth)
    except PreconditionError as error:
        assert error.cure
        return None


@settings(deadline=None)
@given(births())
def test_a_record_comes_back_and_is_never_too_long(birth: Birth) -> None:
    text = encoded(birth)
    if text is None:
        return
    assert len(text.encode("ascii")) <= labels.MAX_RECORD_BYTES
    back = decode_birth(text)
    assert back is not None
    if back.paths_known:
        assert back == birth
    assert replace(back, roots=birth.roots, paths_known=True) == birth
    for root, known in zip(back.roots, birth.roots, strict=True):
        assert root.member == known.member
        assert root == known or (root.path, root.inside) == (path_hash(known.path), known.inside)


@settings(deadline=None)
@given(births())
def test_a_record_is_printable_ascii(birth: Birth) -> None:
    """Whatever bytes a path has: an LVM tag, a ZFS property and a cloud's tag take nothing else."""
    text = encoded(birth)
    assert text is None or (text.isascii() and text.isprintable())


@pytest.mark.parametrize("name", ["\x7f", "\x01\n", "\u00e9", "\u2028", "\udcff", '"\\'])
def test_an_odd_path_is_kept_in_printable_ascii(name: str) -> None:
    birth = plain(roots=(Root(f"/data/{name}", 0),))
    text = encode_birth(birth)
    assert text.isascii() and text.isprintable()
    assert decode_birth(text) == birth


@settings(deadline=None)
@given(births())
def test_hashed_paths_are_found_again_by_their_path(birth: Birth) -> None:
    text = encoded(birth)
    if text is None:
        return
    back = decode_birth(text)
    assert back is not None
    found = with_paths(back, {path_hash(root.path): root.path for root in birth.roots})
    assert found.paths_known
    assert [root.path for root in found.roots] == [root.path for root in birth.roots]


@settings(deadline=None)
@given(births())
def test_every_member_tells_of_the_same_set(birth: Birth) -> None:
    texts = [encoded(birth.of_member(index)) for index in range(len(birth.members))]
    assert all(text is None for text in texts) or all(text is not None for text in texts)
    back = [decode_birth(text) for text in texts if text is not None]
    assert len({found.of_member(0) for found in back if found is not None}) <= 1


@settings(deadline=None)
@given(births())
def test_a_record_read_back_can_be_written_again(birth: Birth) -> None:
    """A driver copies records: what was hashed must not come back as a known path."""
    text = encoded(birth)
    if text is not None:
        back = decode_birth(text)
        assert back is not None
        assert decode_birth(encode_birth(back)) == back


@settings(deadline=None)
@given(births(), st.sampled_from(sorted(STORES)))
def test_every_store_gives_back_what_it_took(birth: Birth, store: str) -> None:
    limits = STORES[store]
    if (text := encoded(birth)) is None:
        return
    pairs = pack(birth, limits)
    assert all(len(value) <= limits.max_value for value in pairs.values())
    if store in ("narrow", "lvm"):
        assert all(value.isascii() and " " not in value and '"' not in value for value in pairs.values())
    noise = {"owner": "somebody", "birthday": "1970-01-01", "mark-sealed": "1"}
    assert unpack({**noise, **pairs}) == decode_birth(text)


@settings(deadline=None)
@given(births())
def test_a_store_that_is_too_small_refuses(birth: Birth) -> None:
    if encoded(birth) is not None:
        with pytest.raises(PreconditionError) as refused:
            pack(birth, LabelLimits(max_value=20, max_chunks=3))
        assert refused.value.cure


@settings(deadline=None)
@given(births(), st.data())
def test_a_lost_or_cut_chunk_is_no_record(birth: Birth, data: st.DataObject) -> None:
    if encoded(birth) is None:
        return
    pairs = pack(birth, STORES["narrow"])
    victim = data.draw(st.sampled_from(sorted(pairs)))
    assert unpack({key: value for key, value in pairs.items() if key != victim}) is None
    assert unpack({**pairs, victim: pairs[victim][:-1]}) is None


def plain(**changes: object) -> Birth:
    birth = Birth(
        set_id="s20261122t100630z-5f3a9c",
        target="0123456789abcdef",
        node="validator-1",
        host="host-01234567",
        profile="besu",
        roots=(Root("/var/lib/kalychain", 0),),
        members=(Member("zfs", "tank/kaly"),),
        taken_at=datetime(2026, 11, 22, 10, 6, 30, tzinfo=UTC),
        deadline=datetime(2026, 11, 22, 11, 6, 30, tzinfo=UTC),
    )
    return replace(birth, **changes)  # type: ignore[arg-type]


def test_the_data_path_is_the_last_to_be_hashed() -> None:
    data = Root("/data/" + "p" * 230, 0)
    other = Root("/other/" + "q" * 230, 0, "inside")
    back = decode_birth(encode_birth(plain(roots=(data, other))))
    assert back is not None
    assert back.roots[0] == data
    assert back.roots[1].path == path_hash(other.path)
    assert not back.paths_known


def test_a_short_path_is_kept_beside_a_long_one() -> None:
    back = decode_birth(encode_birth(plain(roots=(Root("/d", 0), Root("/" + "x" * 560, 0)))))
    assert back is not None
    assert back.path == "/d"


def test_datasets_of_one_pool_below_one_data_path_have_room_with_their_paths() -> None:
    """As an operator lays them out; a restore in place needs the paths."""
    names = ["", "/database", "/database/ancient", "/keystore", "/logs", "/caches"]
    members = tuple(Member("zfs", f"rpool/data/kalychain{name}") for name in names)
    roots = tuple(Root(f"/var/lib/kalychain{name}", number) for number, name in enumerate(names))
    birth = plain(
        node="validator-kalychain-1",
        host="a" * 32,
        roots=roots,
        members=members,
        slot="daily-20261128",
        address="0x" + "ab" * 20,
    )
    text = encode_birth(birth)
    assert len(text) <= labels.MAX_RECORD_BYTES
    assert decode_birth(text) == birth
    fewer = replace(birth, roots=roots[:1], members=members[:1])
    assert json.loads(encode_birth(fewer))["v"] == labels.SCHEMA, "what fits is written so that all can read it"


def test_what_is_too_long_without_any_path_is_refused() -> None:
    with pytest.raises(PreconditionError) as refused:
        encode_birth(plain(node="n" * 560))
    assert refused.value.cure


def test_an_older_or_newer_schema_is_not_ours() -> None:
    record = json.loads(encode_birth(plain()))
    for version in (0, 3, None, "1"):
        assert decode_birth(json.dumps({**record, "v": version})) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.text())
@example("[" * 200_000)
@example('{"v":1,"s":' * 50_000)
@example('{"v":1,"s":"s20261122t100630z-5f3a9c","m":[]}')
def test_garbage_is_no_record(text: str) -> None:
    assert decode_birth(text) is None
    assert unpack({"birth": text}) is None


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["birth0", "birth1", "birth2"]), st.text(max_size=40)))
@example({"birth0": "\u00e9"})
@example({"birth0": "/w=="})
@example({"birth0": "A"})
def test_garbage_chunks_are_no_record(pairs: dict[str, str]) -> None:
    assert unpack(pairs) is None


@settings(deadline=None)
@given(st.sampled_from("vstnhprimadl") | st.sampled_from(["at", "dl", "sl", "x"]), json_values)
@example("at", 1e300)
@example("at", 10**400)
@example("i", -1)
@example("i", 7)
@example("r", [[7, "/d", ""]])
@example("r", [])
@example("m", [])
@example("m", [["zfs"]])
@example("s", None)
@example("m", [[1, "x"]])
@example("m", [["zfs", "p"], [-1, None]])
@example("r", [[0, [1, 2, 3], ""]])
@example("r", [[0, [5, "/x"], ""]])
def test_a_damaged_field_never_raises(key: str, value: object) -> None:
    record = {**json.loads(encode_birth(plain())), key: value}
    back = decode_birth(json.dumps(record))
    if back is not None:
        assert 0 <= back.member < len(back.members)
        assert back.roots and all(0 <= root.member < len(back.members) for root in back.roots)
        assert back.taken_at.tzinfo is not None


@settings(deadline=None)
@given(st.text(), st.text())
def test_only_our_marks_with_values_that_every_store_holds(name: str, value: str) -> None:
    good = bool(value) and len(value) <= 63 and set(value) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-")
    if name not in MARK_NAMES:
        with pytest.raises(ValueError):
            check_marks({name: value})
    for known in MARK_NAMES:
        if good:
            check_marks({known: value, "pinned": None})
        else:
            with pytest.raises(ValueError):
                check_marks({known: value})


marks = st.dictionaries(st.sampled_from(sorted(MARK_NAMES)), st.sampled_from(["1", "2", "ok"]))
changes = st.dictionaries(st.sampled_from(sorted(MARK_NAMES)), st.none() | st.sampled_from(["1", "2", "ok"]))


@settings(deadline=None)
@given(marks, changes)
def test_changes_apply_and_applying_twice_is_once(before: dict[str, str], change: dict[str, str | None]) -> None:
    after = apply_marks(before, change)
    for name in MARK_NAMES:
        assert after.get(name) == (change[name] if name in change else before.get(name))
    assert apply_marks(after, change) == after


@settings(deadline=None)
@given(st.lists(marks, min_size=1, max_size=4))
def test_a_set_is_what_all_its_members_say(members: list[dict[str, str]]) -> None:
    merged = merge_marks(members)
    assert ("pinned" in merged) == any("pinned" in member for member in members)
    assert ("sealed" in merged) == all("sealed" in member for member in members)
    for name in MARK_NAMES - {"pinned", "sealed"}:
        said = {member.get(name) for member in members}
        assert merged.get(name) == (said.pop() if len(said) == 1 else None)
    assert merge_marks([]) == {}


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=32))
def test_a_block_hash_fits_a_mark(raw: bytes) -> None:
    value = labels.pack_hash("0x" + raw.hex())
    check_marks({"block": value})
    assert labels.unpack_hash(value) == "0x" + raw.hex()


@settings(deadline=None)
@given(st.text())
@example("aaaaaaaa")
@example("0x")
def test_what_is_no_block_hash_is_none(text: str) -> None:
    back = labels.unpack_hash(text)
    assert back is None or len(back) == 66
    assert labels.pack_hash(text) == "" or len(labels.pack_hash(text)) == 52
