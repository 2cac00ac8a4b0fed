"""The copy provider under the whole contract: on this machine's ext4, and on btrfs and XFS (reflinks) of our own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from providers.copy import CopyProvider
from snapshotter.core.model import Snapshot, Volume
from snapshotter.host import mounts
from snapshotter.provider import Provider, Settings
from snapshotter.testing import Harness
from snapshotter.testing.conformance import ProviderConformance
from tests.support import CHECKOUT, NOBODY, as_user, loop_file_system

#: What a store is made of, empty.
SKELETON = {"", "snapshotter.store", "sets", "attachments", "trash", "order"}


class CopyHarness(Harness):
    """Everything in one short directory: ids of volumes are paths here, and a record has 560 bytes."""

    def __init__(self, base: str, store: str | None = None) -> None:
        self.base = base
        self.named = store
        self.store = store or os.path.join(base, ".snapshotter")
        self.made = 0

    def _new(self, kind: str) -> str:
        self.made += 1
        return os.path.join(self.base, f"{kind}{self.made}")

    def provider(self) -> Provider:
        options = {} if self.named is None else {"store": self.named}
        return CopyProvider(Settings(state=os.path.join(self.base, "state"), options=options, floor=0.01))

    def volume(self) -> Volume:
        path = self._new("v")
        os.mkdir(path)
        claimed = self.provider().claim(mounts.mount_of(path), path)
        assert claimed is not None
        return claimed

    def destination(self) -> str:
        return self._new("d")

    def foreign(self, volume: Volume) -> Callable[[], bool]:
        """Directories that look like a set: beside the store, and in it without a record of ours."""
        places = [self._new("s20261122t100630z-5f3a9")]
        if os.path.isdir(os.path.join(self.store, "sets")):
            self.made += 1
            places.append(os.path.join(self.store, "sets", f"s20261122t100630z-{self.made:06x}"))
            places.append(os.path.join(self.store, "sets", f"of another tool {self.made}"))
            for name in os.listdir(os.path.join(self.store, "sets"))[:1]:
                places.append(os.path.join(self.store, "sets", f"{name}.bak"))
        for place in places:
            os.makedirs(os.path.join(place, "0/tree"))
            for name in ("birth.json", "0/tree/file"):
                with open(os.path.join(place, name), "w") as file:
                    file.write("another tool's")
        return lambda: all(
            open(os.path.join(place, name)).read() == "another tool's"
            for place in places
            for name in ("birth.json", "0/tree/file")
        )

    def objects(self) -> set[str]:
        found = {name for name in os.listdir(self.base) if name != "state" and name != os.path.basename(self.store)}
        for directory, directories, files in os.walk(self.store):
            relative = os.path.relpath(directory, self.store)
            found |= {os.path.normpath(os.path.join(relative, name)) for name in [*directories, *files]} - SKELETON
        return found

    def damage(self, snapshot: Snapshot) -> bool:
        shutil.rmtree(os.path.join(snapshot.id, "tree"))
        return True


def clean(base: str) -> None:
    for mount in mounts.mounts_below(os.path.realpath(base)):
        mounts.unmount(mount.path)
    shutil.rmtree(base)


class TestCopyHere(ProviderConformance):
    """Where the tests run, the store at its default place beside the data."""

    @pytest.fixture
    def harness(self) -> Iterator[Harness]:
        base = tempfile.mkdtemp(prefix="cc")
        yield CopyHarness(base)
        clean(base)


class OnLoop(ProviderConformance):
    kind: str

    @pytest.fixture(scope="class")
    @classmethod
    def file_system(cls) -> Iterator[str]:
        where = tempfile.mkdtemp(prefix="cl")
        try:
            with loop_file_system(cls.kind, Path(where)) as mounted:
                yield str(mounted)
        finally:
            shutil.rmtree(where)

    @pytest.fixture
    def harness(self, file_system: str) -> Iterator[Harness]:
        base = tempfile.mkdtemp(prefix="c", dir=file_system)
        yield CopyHarness(base)
        clean(base)


@pytest.mark.root
class TestCopyOnBtrfs(OnLoop):
    kind = "btrfs"


@pytest.mark.root
class TestCopyOnXfs(OnLoop):
    kind = "xfs"


@pytest.mark.root
class TestCopyToAnotherFileSystem(OnLoop):
    """The data here, the store named, on an ext4 of its own."""

    kind = "ext4"

    @pytest.fixture
    def harness(self, file_system: str) -> Iterator[Harness]:
        base, store = tempfile.mkdtemp(prefix="cc"), tempfile.mkdtemp(prefix="s", dir=file_system)
        yield CopyHarness(base, os.path.join(store, "store"))
        clean(base)
        shutil.rmtree(store)


@pytest.mark.root
def test_the_contract_holds_without_root(tmp_path: Path) -> None:
    """The same suite in another process, as a user who may do nothing special."""
    packages = Path(pytest.__file__).parents[1]
    home = tempfile.mkdtemp(prefix="ch")
    os.chown(home, NOBODY, NOBODY)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": home,
        "TMPDIR": home,
        "PYTHONPATH": f"{CHECKOUT}:{packages}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [*as_user(NOBODY), *words]
        return subprocess.run(argv, env=environment, cwd=CHECKOUT, capture_output=True, text=True, timeout=400)

    try:
        wanted = "import pytest, hypothesis, msgspec, tenacity, click"
        usable = [each for each in (sys.executable, "/usr/bin/python3") if run(each, "-c", wanted).returncode == 0]
        if not usable:
            pytest.skip("no Python here that another user may run")
        suite = [usable[0], "-m", "pytest", "-p", "no:cacheprovider", "-q", "tests/conformance/test_copy.py"]
        done = run(*suite, "-k", TestCopyHere.__name__)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert " passed" in done.stdout
    finally:
        shutil.rmtree(home)
