"""Profiles: what is known of Besu, and that a data path's content speaks for it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import snapshotter
from snapshotter.core.errors import PreconditionError, UsageError
from snapshotter.nodes import profiles


def besu_tree(path: Path) -> Path:
    (path / "database").mkdir(parents=True)
    (path / "database/CURRENT").write_text("MANIFEST-000004\n")
    for name in ("DATABASE_METADATA.json", "VERSION_METADATA.json", "key", "key.pub", "nodeAddress"):
        (path / name).write_text("{}")
    for name in ("besu.ports", "besu.networks", "besu.pid", "static-nodes.json"):
        (path / name).write_text("")
    (path / "caches").mkdir()
    return path


def test_every_file_of_a_besu_data_path_has_its_place(tmp_path: Path) -> None:
    tree = besu_tree(tmp_path / "besu")
    profile = profiles.get("besu")
    groups = ("database", "metadata", "identity", "config", "runtime", "caches")
    named = [path for group in groups for p in getattr(profile, group) for path in profiles.matches(str(tree), p)]
    assert sorted(named) == sorted(str(entry) for entry in tree.iterdir())
    assert profile.secrets == ("key",) and profile.sign_state == ()
    assert profile.hot_safety.safety == "crash-recovers" and profile.hot_safety.source
    assert any("25.4.0" in warning.text for warning in profile.warnings)


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        ([], "besu"),
        (["key", "key.pub", "nodeAddress"], "besu"),  # the key may be elsewhere
        (["DATABASE_METADATA.json"], "besu"),
        (["DATABASE_METADATA.json", "VERSION_METADATA.json"], "besu"),
        (["DATABASE_METADATA.json", "VERSION_METADATA.json", "key"], "generic"),  # any RocksDB in a `database`
        (["database/CURRENT", "database"], "generic"),
    ],
)
def test_found_from_the_content(tmp_path: Path, gone: list[str], expected: str) -> None:
    tree = besu_tree(tmp_path / "data [x] *")
    for name in gone:
        (tree / name).rmdir() if (tree / name).is_dir() else (tree / name).unlink()
    found, why = profiles.detect(str(tree))
    assert found.name == expected and why


def test_a_linked_database_speaks_too(tmp_path: Path) -> None:
    tree = besu_tree(tmp_path / "data")
    os.rename(tree / "database", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", tree / "database")
    assert profiles.detect(str(tree))[0].name == "besu"
    assert profiles.detect(str(tmp_path / "not-there"))[0].name == "generic"


def test_unknown_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean besu"):
        profiles.get("bezu")
    with pytest.raises(UsageError, match=r"besu, .*generic"):
        profiles.get("xyz")


_USER = 'name = "mine"\ntitle = "Mine"\n[hot_safety]\nsafety = "contested"\nreason = "r"\nsource = "s"\n'


def test_the_users_own(tmp_path: Path) -> None:
    built_in = profiles.load_all(str(tmp_path / "missing"))
    assert {"besu", "generic"} <= set(built_in) and all(name == each.name for name, each in built_in.items())
    (tmp_path / "mine.toml").write_text(_USER + '[[detect]]\nall = ["*.special"]\nscore = 99\n')
    (tmp_path / "notes.txt").write_text("no profile")
    data = besu_tree(tmp_path / "data")
    assert profiles.detect(str(data), str(tmp_path))[0].name == "besu"
    (data / "x.special").write_text("")
    assert profiles.detect(str(data), str(tmp_path))[0].name == "mine"
    (tmp_path / "mine.toml").write_text(_USER.replace('"mine"', '"besu"'))
    assert profiles.get("besu", str(tmp_path)).title == "Mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (_USER + "[health]\nrpx = 1\n", ["health.rpx", "did you mean rpc"]),
        (_USER.replace("contested", "fine"), ["hot_safety.safety", "contested"]),
        ("databse = []\n" + _USER, ["databse", "database"]),
        ('runtime = ["../../etc/passwd"]\n' + _USER, ["../../etc/passwd"]),
        ('runtime = ["/etc/passwd"]\n' + _USER, ["/etc/passwd"]),
        ('runtime = ["."]\n' + _USER, ["'.'"]),
        ('runtime = [""]\n' + _USER, ["''"]),
        (_USER.replace('"mine"', '"My Node"'), ["My Node"]),
        ("name = ", ["not TOML"]),
    ],
)
def test_a_wrong_profile_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        profiles.load_all(str(tmp_path))
    assert all(word in caught.value.line() for word in [*words, "mine.toml"])


def test_one_that_cant_be_opened(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").mkdir()
    with pytest.raises(PreconditionError, match=r"mine\.toml"):
        profiles.load_all(str(tmp_path))


def test_profiles_are_read_from_a_zip(tmp_path: Path) -> None:
    package = Path(snapshotter.__file__).parent
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for file in package.rglob("*"):
            if file.suffix in (".py", ".toml"):
                archive.write(file, Path("snapshotter") / file.relative_to(package))
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path / "all.zip")!r})
import snapshotter.nodes.profiles as profiles
assert "all.zip" in profiles.__file__
print(*profiles.load_all())
"""
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert outcome.stdout.split() == list(profiles.load_all()), outcome.stderr
