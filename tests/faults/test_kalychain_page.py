"""docs/kalychain.md, from the first command to the last, as it is written there: with a Besu-shaped node under a live
systemd."""

from __future__ import annotations

import re
import shlex
import sys
import time
from pathlib import Path

import pytest

from tests.hot.besu_shaped import acknowledged
from tests.support import CHECKOUT
from tests.systemd_kit import booted
from tests.unit.test_schedule import Inside

pytestmark = pytest.mark.root
PAGE = CHECKOUT / "docs" / "kalychain.md"
UNIT = """[Service]
WorkingDirectory=/
Environment=PYTHONPATH={checkout} PYTHONDONTWRITEBYTECODE=1
ExecStart={python} -m tests.hot.besu_shaped run {data} {acks}
"""


def test_every_command_of_the_page(tmp_path: Path) -> None:
    text = PAGE.read_text()
    data, clone, out = tmp_path / "kalychain", tmp_path / "test-restore", tmp_path / "kalychain.age"
    data.mkdir()
    acks = tmp_path / "acks"
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("correct horse battery staple\n")
    passphrase.chmod(0o600)
    places = {"/var/lib/kalychain": str(data), "/var/lib/test-restore": str(clone), "kalychain.age": str(out)}

    def here(line: str) -> str:
        for there, place in places.items():
            line = line.replace(there, place)
        return line

    lines = [here(line) for line in re.findall(r"^    snapshotter ([^#\n]*)", text, re.MULTILINE)]
    lines += [here(line) for line in re.findall(r"`snapshotter (restore [^`]* --dry-run)`", text)]
    assert len(lines) >= 12
    with booted(tmp_path) as systemd:
        systemd.unit(
            "kalychain.service",
            UNIT.format(checkout=CHECKOUT, python=sys.executable, data=data, acks=acks),
        )
        systemd.enter("systemctl", "start", "kalychain.service")
        give_up = time.monotonic() + 120
        while acknowledged(acks) < 3:
            assert time.monotonic() < give_up
            time.sleep(0.1)
        command = Inside(tmp_path / "etc")
        command.config.unlink()
        command.systemd = systemd
        for line in lines:
            words = shlex.split(line)
            if words[:2] == ["identity", "export"]:
                words += ["--passphrase-file", str(passphrase)]
            done = command.run(*words)
            # doctor: this machine's clock is nobody's business.
            wanted = (0, 8) if words[0] == "doctor" else (0,)
            assert done.returncode in wanted, f"{line}: exit {done.returncode}: {done.stdout}{done.stderr}"
            if words[0] == "init":
                written = command.config.read_text()
                for part in (
                    "[node.kalychain]",
                    'profile = "besu"',
                    'unit = "kalychain.service"',
                    'type = "validator"',
                ):
                    assert part in written
                config = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
                assert config is not None
                example = here(config[1]).replace("besu:besu", "root:root")
                command.nodes(example + 'floor = "0.1%"\n')
            if words[:2] == ["restore", "latest:kalychain"] and "--to" in words:
                assert (clone / "database" / "CURRENT").exists()
                assert b"0x" not in (clone / "key").read_bytes()[:2], "the key is a placeholder"
        assert systemd.show("snapshotter-kalychain.timer", "ActiveState") == "active"
        assert out.read_text().startswith("-----BEGIN AGE ENCRYPTED FILE-----")
        assert command.json("list", "kalychain")["sets"][0]["verify_level"] == 3
