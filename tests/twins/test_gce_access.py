"""The twin's faults, and whom it lets in: credentials, permissions, the metadata server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request

import google.auth.transport._mtls_helper  # noqa: F401  (slow, and each client would ask for it)
import pytest
from google.api_core.exceptions import (
    Forbidden,
    GoogleAPICallError,
    ServiceUnavailable,
)
from requests.exceptions import ConnectionError, ReadTimeout

from tests.support import CHECKOUT
from tests.twins.gce import Twin
from tests.twins.gce.policy import holds
from tests.twins.gce_client import ZONE, Asked, codes, raw, reason

# -- faults -------------------------------------------------------------------------------------------------------


def test_faults_are_what_they_say(twin: Twin, ask: Asked) -> None:
    twin.fail("disks.get", "refuse", code="backendError", forever=True)
    for _ in range(3):
        with pytest.raises(ServiceUnavailable):
            ask.disk()
    twin.faults.clear()
    ask.disk()
    twin.fail("snapshots.insert", "refuse", code="forbidden", message="no", nth=2)
    ask.snapshot("s1")
    with pytest.raises(Forbidden):
        ask.snapshot("s2")
    twin.fail("snapshots.insert", "broken")
    with pytest.raises(GoogleAPICallError) as broken:
        ask.snapshot("s3")
    assert broken.value.code == 500
    twin.fail("snapshots.insert", "lost")
    with pytest.raises(ConnectionError):
        ask.snapshot("s4")
    twin.fail("snapshots.insert", "hang")
    with pytest.raises(ReadTimeout):
        ask("Snapshots.insert_unary", snapshot_resource={"name": "s5", "source_disk": ask.disk().self_link})
    assert set(twin.world.snapshots) == {"s1", "s3", "s4"}
    twin.fail("snapshots.insert", "operation", code="RESOURCE_NOT_READY")
    failed = ask.look(ask.snapshot("s6"))
    assert (codes(failed), failed.http_error_status_code) == (["RESOURCE_NOT_READY"], 400)
    twin.fail("snapshots.insert", "vanish")
    assert not codes(ask.look(ask.snapshot("s7")))
    assert set(twin.world.snapshots) == {"s1", "s3", "s4"}
    twin.limits.upload_s = 60
    twin.fail("snapshots.insert", "upload")
    ask.snapshot("s8")
    assert ask("Snapshots.get", snapshot="s8").status == "UPLOADING"
    twin.clock.advance(61)
    assert ask("Snapshots.get", snapshot="s8").status == "FAILED"


_DIES = """
import sys
from google.api_core.client_options import ClientOptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import compute_v1
client = compute_v1.SnapshotsClient(
    credentials=AnonymousCredentials(), client_options=ClientOptions(api_endpoint=sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
client.insert_unary(request={"project": "twin-project", "snapshot_resource": {
    "name": "s", "source_disk": "zones/europe-west3-a/disks/data"}}, retry=None, timeout=5)
"""


@pytest.mark.parametrize(("kind", "there"), [("kill", set()), ("kill-after", {"s"})])
def test_the_caller_is_killed_at_the_call(twin: Twin, kind: str, there: set[str]) -> None:
    argv = [sys.executable, "-c", _DIES, twin.url]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, cwd=CHECKOUT) as process:
        assert process.stdin and process.stdout and process.stdout.readline() == "ready\n"
        twin.fail("snapshots.insert", kind, pid=process.pid)
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(30) == -9
    assert set(twin.world.snapshots) == there


# -- who may ------------------------------------------------------------------------------------------------------


def test_what_is_not_granted_is_refused(twin: Twin, ask: Asked) -> None:
    twin.permissions = {"compute.disks.createSnapshot", "compute.snapshots.create"}
    with pytest.raises(Forbidden) as refused:
        ask.disk()
    assert reason(refused) == "forbidden"
    assert f"'compute.disks.get' permission for 'projects/twin-project/zones/{ZONE}/disks/data'" in str(refused.value)
    with pytest.raises(Forbidden, match=r"compute\.snapshots\.setLabels"):  # born with labels is setting them
        ask.snapshot("s", labels={"a": "b"})
    ask.snapshot("s")
    for call in (
        lambda: ask("GlobalOperations.get", operation=next(iter(twin.world.operations))),
        lambda: ask("Snapshots.delete_unary", snapshot="s"),
        lambda: list(ask("Snapshots.list")),
        lambda: ask("Disks.insert_unary", zone=ZONE, disk_resource={"name": "new", "size_gb": 10}),
        lambda: ask("Instances.detach_disk_unary", zone=ZONE, instance="node", device_name="dev-data"),
    ):
        with pytest.raises(Forbidden):
            call()
    ours = 'resource.name.startsWith("projects/twin-project/global/snapshots/s2")'
    twin.permissions = [
        {"permissions": {"compute.disks.createSnapshot", "compute.snapshots.create"}},
        {"permissions": {"compute.snapshots.delete"}, "condition": ours},
    ]
    ask.snapshot("s2")
    with pytest.raises(Forbidden):
        ask("Snapshots.delete_unary", snapshot="s")
    ask("Snapshots.delete_unary", snapshot="s2")
    assert set(twin.world.snapshots) == {"s"}


def test_conditions() -> None:
    disk = "projects/p/zones/z/disks/a2-0"
    assert holds('resource.type == "compute.googleapis.com/Disk" && resource.name.endsWith("-0")', disk)
    assert not holds('!(resource.name.startsWith("projects/p/zones/z/disks/a2"))', disk)
    assert holds('resource.type != "compute.googleapis.com/Disk" || resource.name == "' + disk + '"', disk)
    assert not holds('resource.name.startsWith("projects/p/zones")', "projects/p")
    with pytest.raises(AssertionError):
        holds('resource.matchTag("a", "b")', disk)


def test_tokens(twin: Twin) -> None:
    """Without one, one of the metadata server's, one that the account signed; and none that is another's or too old."""
    twin.anonymous = False
    assert raw(twin, "GET", "/compute/v1/projects/twin-project/global/snapshots")[0] == 401
    for keys, expired in ((True, False), (False, False), (False, True)):
        twin.expired = expired
        inner = (
            "import os; from google.cloud import compute_v1; from google.api_core.client_options import ClientOptions\n"
            "client = compute_v1.DisksClient(client_options=ClientOptions(api_endpoint=os.environ['GCE_ENDPOINT']))\n"
            "import google.auth; project = google.auth.default()[1]\n"
            f"print(client.get(project=project, zone='{ZONE}', disk='data', timeout=5, retry=None).status)\n"
        )
        environment = {"PATH": os.environ["PATH"], **twin.environment(keys=keys)}
        argv = [sys.executable, "-c", inner]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.stdout == "READY\n") is not expired, done.stderr
        if expired:
            assert "Unauthorized: 401" in done.stderr
    forged = urllib.request.Request(f"{twin.url}/compute/v1/projects/twin-project/global/snapshots")
    forged.add_header("Authorization", "Bearer eyJhbGciOiJub25lIn0.e30.")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(forged, timeout=5)


def test_the_metadata_server(twin: Twin) -> None:
    def get(path: str, **headers: str) -> tuple[int, str]:
        request = urllib.request.Request(twin.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                assert answer.headers["Metadata-Flavor"] == "Google"
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""

    flavor = {"Metadata-Flavor": "Google"}
    top = "/computeMetadata/v1"
    assert twin.here is not None
    assert get(f"{top}/instance/name")[0] == 403
    assert get(f"{top}/instance/name", **flavor) == (200, "node")
    assert get(f"{top}/instance/id", **flavor) == (200, twin.here.id)
    assert get(f"{top}/instance/zone", **flavor) == (200, f"projects/123456789012/zones/{ZONE}")
    assert get(f"{top}/project/project-id", **flavor) == (200, "twin-project")
    assert get(f"{top}/instance/disks/1/device-name", **flavor)[0] == 404
    whole = json.loads(get(f"{top}/instance/?recursive=true", **flavor)[1])
    assert [each["deviceName"] for each in whole["disks"]] == ["persistent-disk-0", "dev-data"]
    assert json.loads(get(f"{top}/instance/service-accounts/default/token", **flavor)[1])["token_type"] == "Bearer"
