"""The demo: starts a Besu-shaped node, takes it hot, kills it, ruins its data, restores, proves that no acknowledged
write is missing. Every step is the command that an operator would type. Run it through scripts/demo."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support import Command, Node, StopWatch, check_database


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def shown(command: Command, *words: str) -> None:
    print("$ snapshotter " + " ".join(words), flush=True)
    done = subprocess.run(command.argv(*words), env=command.environment(), check=False)
    if done.returncode:
        raise SystemExit(f"the demo failed: snapshotter {words[0]} ended with {done.returncode}")


def usable_directory() -> str:
    """Where the demo's node lives: a disk, not a tmpfs (a tmpfs has nothing to come back to after a crash)."""
    for candidate in (os.environ.get("TMPDIR"), "/var/tmp", os.getcwd()):
        if candidate and os.access(candidate, os.W_OK):
            kind = subprocess.run(["stat", "-f", "-c", "%T", candidate], capture_output=True, text=True).stdout.strip()
            if kind != "tmpfs":
                return candidate
    raise SystemExit("no writable directory on a disk: set TMPDIR")


def main() -> None:
    home = Path(tempfile.mkdtemp(prefix="snapshotter-demo-", dir=usable_directory()))
    data, clone = home / "node", home / "restored"
    command = Command(home / "etc")
    node = revived = None
    started = time.monotonic()
    try:
        say(f"a Besu-shaped node starts in {data}: 22 column families, blobs, 5 MB/s of synced writes")
        node = Node(data, "--fill", "200")
        node.wait_for(300)
        print(f"it has acknowledged {node.acknowledged()} blocks")

        say("taken hot: the node goes on writing")
        with StopWatch(node) as watch:
            # btrfs, where the disk has it, needs root; `copy` never does.
            shown(command, "take", str(data), *([] if os.geteuid() == 0 else ["--provider", "copy"]))
        found = command.json("list", str(data))["sets"][0]
        node.wait_for(node.acknowledged() + 100)
        print(f"the node has gone on to block {node.acknowledged()}")

        say("the node is killed and its data ruined")
        node.kill()
        for victim in [*data.glob("database/*.blob"), *data.glob("database/MANIFEST-*"), *data.glob("database/*.log")]:
            victim.write_bytes(os.urandom(min(victim.stat().st_size, 1 << 20)))
        print("every MANIFEST, blob and WAL file now holds noise")

        say("restored")
        began = time.monotonic()
        shown(command, "restore", f"latest:{data}", "--to", str(clone))
        took = time.monotonic() - began

        say("proven")
        result = check_database(clone)
        floor = watch.acknowledged_when_stopped
        missing = result["lost"] + max(0, floor - result["head"])
        revived = Node(clone)
        revived.wait_for(result["head"] + 10)
        print(f"acknowledged when the image was fixed: {floor}; in the image: {result['head']}; missing: {missing}")
        print(f"a node started on the clone has gone on to block {revived.acknowledged()}")
        revived.kill()
        shown(command, "release", str(clone), "--discard-changes")
        shown(command, "delete", found["set_id"], "--last", "--yes")

        say("in numbers")
        size = found["size_bytes"]
        print(f"node paused for   {found['freeze_ms']} ms")
        print(f"restored          {size / 1e6:.0f} MB in {took:.1f} s ({size / 1e6 / took:.0f} MB/s)")
        print(f"writes missing    {missing} of {floor} acknowledged")
        print(f"the whole demo    {time.monotonic() - started:.0f} s")
        if missing or not floor:
            raise SystemExit("the demo failed: acknowledged writes are missing, or the pause was never seen")
    finally:
        for one in (node, revived):
            if one is not None:
                one.kill()
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
