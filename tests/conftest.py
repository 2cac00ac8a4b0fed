"""Options of the whole suite, and its last word: what ran for real and what was skipped, and why."""

from __future__ import annotations

import getpass
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

LAB = Path(__file__).parent / "lab"
#: Set by the virtual machine's guest script only.
IN_LAB = os.environ.get("SNAPSHOTTER_IN_LAB") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", default=False, help="run slow matrices whole, not sampled")
    parser.addoption(
        "--require",
        action="append",
        default=[],
        metavar="KIND",
        help="make a skip a failure (root: all that this machine can run as root must run; lvm, zfs: in the lab, "
        "that storage's tests too)",
    )


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Note a number for the summary: what a bar of an issue asks for, and what came out."""
    return lambda line: request.node.user_properties.append(("measured", line))


def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(config, "workerinput", None)
    if worker is not None:  # pytest-xdist's own directory is one deeper: too long for the paths of some tests
        of_user = Path(tempfile.gettempdir()) / f"pytest-of-{getpass.getuser()}"
        of_user.mkdir(mode=0o700, exist_ok=True)
        config.option.basetemp = of_user / f"{worker['testrunuid'][:4]}-{worker['workerid']}"
    if "root" in config.getoption("--require") and os.geteuid() != 0:
        raise pytest.UsageError("--require root: not root")
    for kind, module in (("lvm", "dm_thin_pool"), ("zfs", "zfs")):
        if kind in config.getoption("--require") and not (IN_LAB and os.path.isdir(f"/sys/module/{module}")):
            raise pytest.UsageError(f"--require {kind}: this kernel has none of it; run by scripts/lab or scripts/test")


def pytest_unconfigure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        shutil.rmtree(config.option.basetemp, ignore_errors=True)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    # They make and destroy volume groups and pools: never on a machine of somebody's.
    return True if LAB in (collection_path, *collection_path.parents) and not IN_LAB else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(pytest.mark.skip(reason="needs root: loop devices, mounts, freezing, other users"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    report = yield
    # What the conformance suite leaves out for a driver whose traits lack it was not to be had in the first place.
    lacking = report.skipped and "snapshotter/testing/" not in str(report.longrepr[0])
    if lacking and item.config.getoption("--require"):
        report.outcome = "failed"
        report.longrepr = f"skipped although --require was given: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = Counter(report.nodeid.split("/")[1] for report in terminalreporter.getreports("passed"))
    skipped = Counter(str(report.longrepr[2]) for report in terminalreporter.getreports("skipped"))
    terminalreporter.section("what ran for real")
    user = "root" if os.geteuid() == 0 else f"user {os.geteuid()}"
    terminalreporter.line(f"kernel {os.uname().release}, as {user}")
    for kind, count in sorted(ran.items()):
        terminalreporter.line(f"{count:5} passed in tests/{kind}")
    for reason, count in skipped.most_common():
        terminalreporter.line(f"{count:5} skipped: {reason}")
    if not skipped:
        terminalreporter.line("nothing was skipped")
    if not IN_LAB:
        terminalreporter.line("tests/lab was left out: scripts/lab runs it in a virtual machine with LVM and ZFS")
    ended = [report for reports in terminalreporter.stats.values() for report in reports if hasattr(report, "when")]
    for report in ended:
        for name, line in report.user_properties if report.when == "teardown" else ():
            if name == "measured":
                terminalreporter.line(f"measured: {line}")
    terminalreporter.line("not had here: a running Besu (a RocksDB shaped like Besu's stands in), a real cloud account")
