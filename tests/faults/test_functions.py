"""The functions, called by the clouds' own runtimes on loopback, over twins: what is in the cloud afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from providers.ebs import EbsProvider
from snapshotter.core.model import Hold, Volume, compact_time, utc_now
from snapshotter.provider import Settings
from snapshotter.testing.harness import make_birth
from tests.support import CHECKOUT
from tests.twins import gce
from tests.twins.ec2 import Twin
from tests.unit.ebs_kit import REGION, environment
from tests.unit.functions_kit import google_function, lambda_function

DAILY = "[node.n0]\npath = '/data'\nevery = '24h'\nkeep = {daily = 1}\n"


def tag(twin: Twin, volume: Any, **tags: str) -> None:
    twin.world.retag(volume, {f"snapshotter:{name}": value for name, value in tags.items()})


def fleet(twin: Twin, nodes: int, volumes: int = 1, kind: str = "validator") -> list[Any]:
    """Instances, whose data volumes carry the tags."""
    instances = []
    for number in range(nodes):
        instances.append(twin.world.run_instance())
        for device in "fg"[:volumes]:
            made = twin.world.add_volume(instances[-1], f"/dev/sd{device}", with_bytes=False)
            tag(twin, made, node=f"n{number}", type=kind)
    return instances


@pytest.fixture
def twin() -> Iterator[Twin]:
    with Twin() as made:
        yield made


def alive(twin: Twin) -> list[dict[str, str]]:
    return [each.tags for each in twin.world.snapshots.values() if each.gone is None]


def test_lambda_takes_the_fleet_once(twin: Twin, tmp_path: Path) -> None:
    fleet(twin, 3, volumes=2)
    other = twin.world.add_volume(twin.world.run_instance(), "/dev/sdf", with_bytes=False)  # nobody's
    with lambda_function(twin.environment(), tmp_path / "log") as call:
        kind, answer = call({})
        assert kind == "response", (answer, (tmp_path / "log").read_text())
        assert answer["schema"] == 1 and answer["nodes"] == 3 and len(answer["taken"]) == 3
        made = alive(twin)
        assert len(made) == 6 and all("snapshotter:mark-sealed" in tags for tags in made)
        assert {tags["snapshotter:mark-grade"] for tags in made} == {"crash"}
        assert other.id not in {each.volume for each in twin.world.snapshots.values()}
        kind, answer = call({"detail-type": "EBS Snapshot Notification"})  # a hint, whatever it says
        assert kind == "response" and answer["taken"] == [] and len(alive(twin)) == 6


def test_lambda_raises_after_the_rest(twin: Twin, tmp_path: Path) -> None:
    fleet(twin, 3)
    odd = twin.world.add_volume(twin.world.run_instance(), "/dev/sdf", with_bytes=False)
    tag(twin, odd, node="n-odd", type="nonsense")
    twin.fail("CreateSnapshots", "refuse", code="SnapshotLimitExceeded")
    with lambda_function(twin.environment(), tmp_path / "log") as call:
        kind, answer = call({})
        assert kind == "error" and answer["errorType"] == "TickFailed"
        assert "nonsense" in answer["errorMessage"]
        odd.tagged.clear()
        for _ in range(2):
            kind, answer = call({})
        assert kind == "response", answer
        assert len({tags["snapshotter:set"] for tags in alive(twin) if "snapshotter:mark-sealed" in tags}) == 3


def test_a_node_in_the_middle_of_a_restore_is_told_and_the_others_are_taken(twin: Twin, tmp_path: Path) -> None:
    """Its host was killed after it had detached a disk: what is left on the instance isn't the node."""
    fleet(twin, 3, volumes=2)
    origin = next(each for each in twin.world.volumes.values() if each.tags.get("snapshotter:node") == "n1")
    assert origin.attached is not None
    new = twin.world.add_volume(twin.world.instances[origin.attached.instance], "/dev/sdh", with_bytes=False)
    tag(twin, new, node="n1", swap="w1", origin=origin.id, instance=origin.attached.instance)
    tag(twin, origin, **{"node": "n1", "set-aside": "w1"})
    origin.attached = new.attached = None
    with lambda_function(twin.environment(), tmp_path / "log") as call:
        kind, answer = call({})
    assert kind == "response", answer
    assert len(answer["taken"]) == 2 and len(alive(twin)) == 4
    (busy,) = answer["busy"]
    assert busy.startswith("n1: ") and "restore in place" in busy and origin.id in busy


def test_two_at_once_leave_one_set_a_slot(twin: Twin, tmp_path: Path) -> None:
    """EventBridge calls at least once: two functions, on machines that share nothing."""
    fleet(twin, 4)
    own = {**twin.environment(), "SNAPSHOTTER_RUN": str(tmp_path / "other-run")}
    with (
        lambda_function({**twin.environment(), "SNAPSHOTTER_RUN": str(tmp_path / "run")}, tmp_path / "log") as one,
        lambda_function(own, tmp_path / "other-log") as other,
    ):
        one.events.put({})
        other.events.put({})
        answers = [call.answer() for call in (one, other)]
        assert [kind for kind, _ in answers] == ["response", "response"], answers
        sealed = [tags for tags in alive(twin) if "snapshotter:mark-sealed" in tags]
        assert len(sealed) == len({tags["snapshotter:slot"] for tags in sealed}) == 4
        assert sum(len(answer["taken"]) for _, answer in answers) == 4
        assert len(alive(twin)) == 4


def test_the_config_is_above_the_tags_and_wrong_ones_are_told(twin: Twin, tmp_path: Path) -> None:
    fleet(twin, 2, kind="")  # no type: no schedule of its own
    given = {**twin.environment(), "SNAPSHOTTER_CONFIG_TOML": DAILY}
    with lambda_function(given, tmp_path / "log") as call:
        kind, answer = call({})
        assert kind == "response" and len(answer["taken"]) == 1, answer
    with lambda_function({**given, "SNAPSHOTTER_CONFIG_TOML": "[node.n0]\npaht = 1"}, tmp_path / "log") as call:
        kind, answer = call({})
        assert kind == "error" and "paht" in answer["errorMessage"]


@pytest.fixture
def agent() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """SSM's SendCommand on loopback: what it was asked."""
    asked: list[dict[str, Any]] = []

    class Ssm(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(request)
            there = "refused" not in asked[0].get("Comment", "") and len(asked) < 3
            body = {"Command": {"CommandId": "11111111-2222-3333-4444-555555555555"}}
            if not there:
                body = {"__type": "InvalidInstanceId", "Message": "no agent there"}
            content = json.dumps(body).encode()
            self.send_response(200 if there else 400)
            self.send_header("Content-Type", "application/x-amz-json-1.1")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Ssm)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_a_node_is_asked_to_take_it_frozen(twin: Twin, tmp_path: Path, agent: tuple[str, list[dict[str, Any]]]) -> None:
    url, asked = agent
    (instance,) = fleet(twin, 1)
    at = datetime.now(UTC) - timedelta(minutes=5)
    given = {
        **twin.environment(),
        "AWS_ENDPOINT_URL_SSM": url,
        "SNAPSHOTTER_FREEZE_BY_COMMAND": "yes",
        "SNAPSHOTTER_CONFIG_TOML": f"[node.n0]\npath = '/data'\nevery = '24h'\nat = '{at:%H:%M}'\n",
    }
    (disk,) = [each for each in twin.world.volumes.values() if "snapshotter:node" in each.tags]
    before = taken_yesterday(twin, disk.id)
    with lambda_function(given, tmp_path / "log") as call:
        for _ in range(2):  # the second, as nothing came of the first
            kind, answer = call({})
            assert kind == "response" and answer["taken"] == [] and "was asked" in answer["busy"][0], answer
        assert {tags["snapshotter:set"] for tags in alive(twin)} == {before}
        (command,) = asked[0]["Parameters"]["commands"]
        words = command.split()
        assert words[:4] == ["snapshotter", "tick", "n0", "--slot"] and words[5:] == ["--provider", "ebs", "--json"]
        assert asked[0]["InstanceIds"] == [instance.id]
        kind, answer = call({})  # now there is no agent
        assert kind == "response" and len(answer["taken"]) == 1 and "from outside" in answer["warnings"][0], answer
        assert {tags["snapshotter:mark-grade"] for tags in alive(twin)} == {"crash"}


def taken_yesterday(twin: Twin, disk: str) -> str:
    with environment(**twin.environment()):
        provider = EbsProvider(Settings("/nonexistent", options={"region": REGION}))
        volumes = [Volume("ebs", disk)]
        birth = replace(make_birth(volumes, node="n0"), taken_at=utc_now() - timedelta(days=1))
        provider.check(volumes, birth)
        provider.create(volumes, birth, Hold())
        provider.mark(birth.set_id, {"sealed": compact_time(utc_now()), "grade": "crash"})
    return birth.set_id


@pytest.mark.alone
def test_cold_start(twin: Twin, measured: Callable[[str], None]) -> None:
    """From the import of the handler to its first call of EC2, the best of a few: the machine does other things too."""
    fleet(twin, 1)
    program = (
        "import time; t = time.perf_counter()\n"
        "from snapshotter.functions import lambda_handler\n"
        "import botocore.httpsession as h\n"
        "send = h.URLLib3Session.send\n"
        "def first(self, request):\n"
        "    print(time.perf_counter() - t, flush=True)\n"
        "    raise SystemExit\n"
        "h.URLLib3Session.send = first\n"
        "lambda_handler({}, None)\n"
    )
    times = []
    for _ in range(7):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **twin.environment(), "PYTHONPATH": str(CHECKOUT), "AWS_REGION": "eu-central-1"},
            capture_output=True,
            text=True,
            cwd=CHECKOUT,
        )
        assert done.stdout, done.stderr[-2000:]
        times.append(float(done.stdout))
        time.sleep(0.1)
    measured(
        f"lambda: cold start, import to first call: {min(times):.2f} s (of {len(times)}, worst {max(times):.2f} s)"
    )
    assert min(times) <= 1.0


def post(url: str, log: Path, headers: dict[str, str], patience_s: float = 60) -> tuple[int, bytes]:
    """Ask the function, once it listens."""
    give_up = time.monotonic() + patience_s
    while True:
        request = urllib.request.Request(url, data=b"{}", headers={"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < give_up, log.read_text()
            time.sleep(0.2)


CLOUD_EVENT = {
    "ce-id": "1",
    "ce-source": "//cloudscheduler.googleapis.com/x",
    "ce-specversion": "1.0",
    "ce-type": "google.cloud.scheduler.job.v1.executed",
}


@pytest.mark.parametrize(("kind", "headers"), [("http", {}), ("cloudevent", CLOUD_EVENT)])
def test_google_takes_the_fleet_once(tmp_path: Path, kind: str, headers: dict[str, str]) -> None:
    with gce.Twin() as twin:
        for number in range(3):
            instance = twin.world.run_instance()
            disk = twin.world.add_disk(f"data-{number}", instance, with_bytes=False)
            disk.labels = {"snapshotter-node": f"n{number}", "snapshotter-type": "validator"}
        log = tmp_path / "log"
        with google_function(twin.environment(), kind, log) as url:
            status, answer = post(url, log, headers)
            assert status == 200, (answer, log.read_text()[-3000:])
            made = list(twin.world.snapshots.values())
            assert len(made) == 3 and all("snapshotter-mark-sealed" in each.labels for each in made)
            if kind == "http":
                assert len(json.loads(answer)["taken"]) == 3
            assert post(url, log, headers)[0] == 200 and len(twin.world.snapshots) == 3, "twice is once"
            odd = twin.world.add_disk("odd", twin.world.run_instance(), with_bytes=False)
            odd.labels = {"snapshotter-node": "n-odd", "snapshotter-type": "nonsense"}
            assert post(url, log, headers)[0] == 500
            assert "nonsense" in log.read_text()


def test_google_takes_the_nodes_of_other_zones_than_the_lost_one(tmp_path: Path) -> None:
    with gce.Twin() as twin:
        for number, zone in enumerate(("europe-west3-a", "europe-west3-b", "us-central1-a", "us-central1-b")):
            disk = twin.world.add_disk(f"data-{number}", twin.world.run_instance(zone), with_bytes=False)
            disk.labels = {"snapshotter-node": f"n{number}", "snapshotter-type": "validator"}
        more = {"place": "regions/us-central1", "replica_zones": ["us-central1-a", "us-central1-b"]}
        both = twin.world.add_disk("both", with_bytes=False, **more)
        both.labels = {"snapshotter-node": "n-free", "snapshotter-type": "validator"}
        twin.world.unreachable = {"zones/us-central1-b"}
        log = tmp_path / "log"
        given = {**twin.environment(), "SNAPSHOTTER_CONFIG_TOML": "[node.n3]\npath = '/data'\ntype = 'validator'\n"}
        with google_function(given, "http", log) as url:
            for _ in range(2):
                assert post(url, log, {})[0] == 500, "and it is told"
                taken = sorted(each.source.rpartition("/")[2] for each in twin.world.snapshots.values())
                assert taken == ["data-0", "data-1", "data-2"], log.read_text()[-3000:]
                assert all("snapshotter-mark-sealed" in each.labels for each in twin.world.snapshots.values())
            said = log.read_text()
            assert "can't say what is in zones/us-central1-b now, and n-free may have disks there" in said
            assert "nor tagged volumes" not in said, "whose volumes can't be seen isn't wrong"
            twin.world.unreachable = set()
            assert post(url, log, {})[0] == 200 and len(twin.world.snapshots) == 5
