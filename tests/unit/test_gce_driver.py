"""The gce provider's pure parts, and what must hold of its source: names, labels, errors; who loads Google's SDK."""

from __future__ import annotations

import ast
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from providers.gce import GceProvider, labels, names
from providers.gce.errors import reason_of, told
from snapshotter.core.errors import BusyError, Exit, NotFoundError, PreconditionError, SnapshotterError, StorageError
from snapshotter.core.model import Access, Grade, Purpose, Quiesce, Volume, new_attachment_id, utc_now
from snapshotter.host.disks import Disks
from snapshotter.provider import Settings
from snapshotter.testing.harness import make_birth
from snapshotter.verbs import plan
from tests.support import CHECKOUT

compute_v1 = pytest.importorskip("google.cloud.compute_v1")


def test_a_disk_is_known_by_its_place_and_name() -> None:
    zonal, regional = names.disk("europe-west3-a/data"), names.disk("europe-west3/data")
    assert (zonal.regional, regional.regional) == (False, True)
    for each in (zonal, regional):
        assert names.disk(each.id) == each
        for link in (each.link("p"), f"https://www.googleapis.com/compute/v1/{each.link('p')}"):
            assert names.disk_of(link) == each
            assert names.path_of(link) == each.link("p")
    assert names.region_of("europe-west3-a") == names.region_of("europe-west3") == "europe-west3"
    assert names.disk_of("projects/p/global/snapshots/data") is None


def snapshot(**changes: object) -> object:
    birth = make_birth([Volume("gce", "europe-west3-a/data"), Volume("gce", "europe-west3-a/ancient")])
    born = labels.of_set(birth.of_member(1), "ext4/1")
    given = {
        "name": f"{birth.set_id}-1",
        "source_disk": names.disk("europe-west3-a/ancient").link("p"),
        **born,
        **changes,
    }
    return compute_v1.Snapshot(given)


def test_a_snapshot_says_whose_it_is() -> None:
    item = snapshot()
    birth = labels.birth_of(item)
    assert birth is not None and birth.member == 1
    assert labels.file_system(item) == ("ext4", 1)
    assert len(item.description) <= 2048  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": {}},
        {"labels": {labels.MANAGED: "true", labels.SET: "s20261122t100630z-5f3a9c"}},
        {"description": ""},
        {"description": "{}"},
        {"name": "copy-of-it"},
        {"source_disk": names.disk("europe-west3-a/another").link("p")},
    ],
)
def test_what_only_looks_like_ours_is_not(changes: dict[str, object]) -> None:
    assert labels.birth_of(snapshot(**changes)) is None


@pytest.mark.parametrize("path", ["/restored", "/mit leer/\u00fc\U0001f40b \n'\"", "/\udcff\udcfe"])
def test_an_attachments_record_comes_back(path: str) -> None:
    identity, since = new_attachment_id(utc_now()), datetime.now(UTC)
    born = labels.of_attachment(
        identity, "s20261122t100630z-5f3a9c", 3, path, Access.READ_ONLY, Purpose.VERIFY, "4711", (12, 34)
    )
    item = compute_v1.Disk(name=f"{identity}-3", **born)
    assert labels.attachment_of(compute_v1.Disk(name="a-copy-of-it", **born)) is None
    found = labels.attachment_of(item)
    assert found is not None
    assert (found.id, found.member, found.path, found.since) == (identity, 3, path, None)
    assert (found.access, found.purpose) == (Access.READ_ONLY, Purpose.VERIFY)
    assert labels.maker_of(item.labels) == (12, 34)
    item.labels[labels.SINCE] = labels.since(since)
    settled = labels.attachment_of(item)
    assert settled is not None and settled.since == since
    assert all(len(value) <= 63 and value == value.lower() for value in item.labels.values())


def test_a_swaps_record_comes_back() -> None:
    """Below whatever the origin's description is, also a long one, and one that ends with an earlier record."""
    swap_id, record = "w20261122t100630z-5f3a9c", labels.InPlace("z/data", "dev-1", True, "NVME", "READ_ONLY")
    for theirs in ("", "data", "{}", "two\nlines", "x" * 2048):
        born = labels.of_swap(swap_id, record, "1", theirs)
        assert born["description"].startswith(theirs[:1900]) and len(born["description"]) <= 2048
        assert labels.swap_of(compute_v1.Disk(name=f"{swap_id}-0", **born)) == record
        assert labels.swap_of(compute_v1.Disk(name="a-copy-of-it", **born)) is None
        assert labels.of_swap(swap_id, record, "1", born["description"]) == born
    # As it was written before there was more to keep.
    born["description"] = '{"origin": "z/data", "device": "dev-1", "auto_delete": false}'
    old = labels.swap_of(compute_v1.Disk(name=f"{swap_id}-0", **born))
    assert old == labels.InPlace("z/data", "dev-1", False)


def test_a_path_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PreconditionError, match="too long"):
        labels.of_attachment("a", "s", 0, "/" + "x" * 4000, Access.WRITABLE, Purpose.RESTORE, "1", None)


@pytest.mark.parametrize(
    ("reason", "message", "kind", "words"),
    [
        (
            "forbidden",
            "Required 'compute.disks.get' permission for 'projects/p/zones/z/disks/d'",
            Exit.PRECONDITION,
            "may not compute.disks.get",
        ),
        ("accessNotConfigured", "Compute Engine API has not been used", Exit.PRECONDITION, "gcloud services enable"),
        ("authError", "Invalid Credentials", Exit.PRECONDITION, "log in again"),
        ("QUOTA_EXCEEDED", "Quota 'SNAPSHOTS' exceeded.  Limit: 5000.0 globally.", Exit.REFUSED, "SNAPSHOTS"),
        ("quotaExceeded", "Quota 'SSD_TOTAL_GB' exceeded", Exit.REFUSED, "quota"),
        ("ZONE_RESOURCE_POOL_EXHAUSTED", "The zone does not have enough resources", Exit.REFUSED, "-o zone="),
        (
            "notFound",
            "The resource 'projects/other/zones/z/disks/d' was not found",
            Exit.NOT_FOUND,
            "projects/other/zones/z/disks/d",
        ),
        (
            "resourceInUseByAnotherResource",
            "The disk resource 'd' is already being used by 'i'",
            Exit.BUSY,
            "already being used",
        ),
        (
            "badRequest",
            "Cloud KMS error when using key projects/p/locations/l/keyRings/r/cryptoKeys/k: denied",
            Exit.PRECONDITION,
            "cryptoKeys/k",
        ),
        ("RESOURCE_OPERATION_RATE_EXCEEDED", "Operation rate exceeded for resource", Exit.REFUSED, "ten minutes"),
        ("invalid", "Invalid value for field\n 'resource.type'", Exit.REFUSED, "resource.type"),
    ],
)
def test_a_refusal_is_one_line_with_its_cure(reason: str, message: str, kind: Exit, words: str) -> None:
    error = told(reason, message, "Disks.insert", "europe-west3-a/data")
    assert error.exit is kind and error.cure
    assert words in error.line() and "\n" not in error.line()
    assert reason_of(error) == reason.lower().replace("_", "")
    assert isinstance(error, PreconditionError | StorageError | NotFoundError | BusyError)
    assert isinstance(error, SnapshotterError)


def test_nobody_waits_for_an_operation_with_the_clients_own_means() -> None:
    """`ExtendedOperation.result()` asks the public endpoint whatever is configured: neither it, nor a method that gives
    one, is called anywhere."""
    plain = {"insert", "delete", "set_labels", "attach_disk", "detach_disk"}
    for path in sorted((CHECKOUT / "providers/gce").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                where = f"{path.name}:{node.lineno}"
                assert node.func.attr not in ("result", "exception", "add_done_callback"), where
                if isinstance(node.func.value, ast.Call):  # api.client(...).insert(...)
                    assert node.func.attr not in plain, where
    # Every call goes through Api.call, which appends `_unary` to what changes something.
    text = (CHECKOUT / "providers/gce/api.py").read_text(encoding="utf-8")
    assert text.count("retry=None, timeout=") == text.count("getattr(client, method)(") == 1


def run_in_new_process(program: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_off_compute_engine_nobody_is_asked(tmp_path: Path) -> None:
    """No option names a project, DMI names another maker: no SDK, no call, nothing claimed."""
    loaded = run_in_new_process(
        "import sys\n"
        "from providers.gce import GceProvider\n"
        "from snapshotter.host.disks import Disks\n"
        "from snapshotter.host.mounts import mount_of\n"
        "from snapshotter.provider import Settings\n"
        f"GceProvider.disks = Disks(sysfs={str(tmp_path)!r})\n"
        "provider = GceProvider(Settings('/nonexistent'))\n"
        "assert provider.claim(mount_of('/'), '/') is None\n"
        "assert not list(provider.snapshots()) and not list(provider.attachments()) and not list(provider.swaps())\n"
        "provider.delete('s20261122t100630z-5f3a9c'); provider.detach('a20261122t100630z-5f3a9c')\n"
        "assert provider.availability() and not provider.reap()\n"
        "print(*sys.modules)\n"
    )
    assert not {"google", "requests", "tenacity", "http.client", "ssl"} & loaded


@pytest.mark.parametrize(
    "statement",
    [
        "import runpy; sys.argv = ['snapshotter', '--help']; runpy.run_module('snapshotter', run_name='__main__')",
        "from snapshotter import provider; [provider.load(name) for name in ('zfs', 'btrfs', 'lvm', 'copy', 'gce')]",
        "import providers.ebs.api, providers.ebs.clones, providers.ebs.swaps, providers.ebs.choosing, boto3",
    ],
)
def test_google_is_loaded_by_nobody_else(statement: str) -> None:
    loaded = run_in_new_process(
        f"import sys\ntry:\n    {statement}\nexcept SystemExit:\n    pass\nprint()\nprint(*sys.modules)"
    )
    assert not {name for name in loaded if name.partition(".")[0] in ("google", "requests")}


def test_a_machine_that_only_says_google_is_not_claimed(tmp_path: Path) -> None:
    from snapshotter.host.mounts import mount_of

    dmi = tmp_path / "class/dmi/id"
    dmi.mkdir(parents=True)
    (dmi / "sys_vendor").write_text("Google\n")
    provider = GceProvider(Settings("/nonexistent"))
    provider.disks = Disks(sysfs=str(tmp_path), by_id=str(tmp_path))
    assert provider.claim(mount_of("/"), "/") is None


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (b'{"device_name":"archive-data","disk_type":"PERSISTENT"}', "archive-data"),
        (b"", ""),
        (b"\xff\xfe", ""),
        (b'["device_name"]', ""),
    ],
)
def test_a_disk_without_a_link_says_its_name_itself(said: bytes, name: str) -> None:
    from providers.gce.devices import name_in

    assert name_in(said) == name


def test_a_file_system_over_disks_of_several_instants_wants_a_freeze(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel writes its journal and metadata whoever is stopped: what isn't frozen, nor one group, is torn."""
    monkeypatch.setattr(GceProvider, "one_instant", lambda self, volumes: False)
    owners, volumes = [GceProvider(Settings("/nonexistent"))], [Volume("gce", "z/a+z/b", "/data", "ext4")]
    for quiesce in (Quiesce.STOP, Quiesce.HOOKS, Quiesce.PAUSE, Quiesce.NONE):
        assert plan._grade(quiesce, owners, volumes) is Grade.SKEWED
    assert plan._grade(Quiesce.FREEZE, owners, volumes) is Grade.FILESYSTEM
