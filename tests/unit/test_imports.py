"""The import law, read from the sources: who may know whom, who runs programs, what the command loads at start.

core <- host <- provider <- catalog, nodes <- checks, verbs <- cli, functions. Imports inside functions count, and those
under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from snapshotter import provider
from snapshotter.nodes.config import load
from snapshotter.verbs.session import Session

CHECKOUT = Path(__file__).resolve().parents[2]

#: Each may import itself, its equals and those before it.
ORDER = (
    ("snapshotter.core",),
    ("snapshotter.host",),
    ("snapshotter.provider",),
    ("snapshotter.catalog", "snapshotter.nodes"),
    ("snapshotter.checks", "snapshotter.verbs"),
    ("snapshotter.cli", "snapshotter.functions", "snapshotter.human"),
    ("snapshotter.__main__",),
)
#: What reaches for a shell or a process past core/command.py.
PROCESS_MODULES = ("subprocess", "multiprocessing", "pty", "asyncio.subprocess")
PROCESS_CALLS = ("os.system", "os.popen")
#: Modules that `import snapshotter.cli` may not load.
HEAVY = (
    "boto3",
    "botocore",
    "google",
    "libzfs_core",
    "rich",
    "tenacity",
    "rocksdict",
    "providers",
    "pytest",
    "hypothesis",
)


def below(module: str, top: str) -> bool:
    return module == top or module.startswith(top + ".")


def imports(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that the source imports, by statement or by a literal `import_module`.
    `from a import b` is a.b, whether b is a module or not."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [base])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def rank(module: str) -> int | None:
    for number, group in enumerate(ORDER):
        if any(below(module, top) for top in group):
            return number
    return None


def allowed(module: str, imported: str) -> bool:
    """May `module`, one of ours, import `imported`, one of ours?"""
    if below(imported, "snapshotter") and imported.count(".") <= 1 and rank(imported) is None:
        # `from snapshotter import __version__`; anything else of that shape is a module that has no place yet.
        return imported in ("snapshotter", "snapshotter.__version__")
    if below(module, "providers"):
        driver = ".".join(module.split(".")[:2])  # one that outgrew a file is a folder of its name
        return any(
            below(imported, top) for top in ("snapshotter.core", "snapshotter.host", "snapshotter.provider", driver)
        )
    if below(module, "snapshotter.testing"):
        above = ("snapshotter.core", "snapshotter.host", "snapshotter.provider", "snapshotter.testing")
        return any(below(imported, top) for top in above)
    mine, theirs = rank(module), rank(imported)
    return mine is not None and theirs is not None and theirs <= mine


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    found = []
    for line, imported in imports(source, module, is_package):
        where = f"{module}:{line}"
        if (below(imported, "snapshotter") or below(imported, "providers")) and not allowed(module, imported):
            found.append(f"{where} imports {imported}")
        if module != "snapshotter.core.command" and any(below(imported, top) for top in PROCESS_MODULES):
            found.append(f"{where} imports {imported}: only core/command.py runs programs")
        if below(imported, "pytest") and not below(module, "snapshotter.testing.conformance"):
            found.append(f"{where} imports {imported}: only testing.conformance does")
        if below(imported, "hypothesis"):
            found.append(f"{where} imports {imported}: the shipped code doesn't")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in PROCESS_CALLS:
            found.append(f"{module}:{node.lineno} uses {ast.unparse(node)}: only core/command.py runs programs")
    return found


def sources() -> list[tuple[str, Path]]:
    found = []
    for top in ("snapshotter", "providers"):
        for path in sorted((CHECKOUT / top).rglob("*.py")):
            parts = path.relative_to(CHECKOUT).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def test_the_law_is_kept() -> None:
    checked = sources()
    assert {"snapshotter.core.model", "snapshotter.provider", "snapshotter.testing.memory"} <= {
        name for name, _ in checked
    }
    broken = [
        violation
        for module, path in checked
        for violation in violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    ]
    assert not broken, "\n".join(broken)


def test_every_module_has_a_place() -> None:
    tops = ("providers", "snapshotter.testing")
    placed = [name for name, _ in sources() if rank(name) is not None or any(below(name, top) for top in tops)]
    assert [name for name, _ in sources() if name not in placed] == ["snapshotter"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("snapshotter.core.model", "from snapshotter.host import mounts"),
        ("snapshotter.core.model", "from ..host.mounts import table"),
        ("snapshotter.core.model", "def f():\n    import snapshotter.provider"),
        ("snapshotter.core.model", "if TYPE_CHECKING:\n    from snapshotter.provider import Provider"),
        ("snapshotter.host.mounts", "from snapshotter import provider"),
        ("snapshotter.provider", "from snapshotter.catalog import read"),
        ("snapshotter.provider", "import providers.copy"),
        ("snapshotter.provider", "import_module('providers.copy')"),
        ("snapshotter.nodes.config", "from snapshotter.verbs.take import take"),
        ("snapshotter.verbs.take", "from snapshotter.cli import main"),
        ("snapshotter.verbs.take", "import snapshotter.testing.memory"),
        ("snapshotter.verbs.take", "from snapshotter import unheard_of"),
        ("snapshotter.testing.memory", "from snapshotter.catalog import read"),
        ("snapshotter.testing.memory", "import pytest"),
        ("providers.copy", "from providers import zfs"),
        ("providers.copy", "from . import zfs"),
        ("providers.copy", "from .zfs import ZfsProvider"),
        ("providers.copy.making", "from providers.zfs import ZfsProvider"),
        ("providers.copy.making", "from snapshotter.verbs import take"),
        ("providers.copy", "from snapshotter.verbs import take"),
        ("providers.copy", "from snapshotter.nodes.config import Config"),
        ("providers.copy", "import subprocess"),
        ("snapshotter.host.watchdog", "from subprocess import Popen"),
        ("snapshotter.host.watchdog", "from asyncio import subprocess"),
        ("snapshotter.host.watchdog", "def f():\n    os.system('true')"),
    ],
)
def test_the_law_sees_what_breaks_it(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("snapshotter.core.labels", "from snapshotter.core.model import Birth"),
        ("snapshotter.core.command", "import subprocess"),
        ("snapshotter.verbs.take", "from snapshotter import catalog, provider"),
        ("snapshotter.verbs.take", "from snapshotter.verbs.session import Session"),
        ("snapshotter.cli", "from snapshotter import __version__"),
        ("snapshotter.__main__", "from snapshotter.cli import main"),
        ("providers.copy", "from snapshotter.provider import Provider\nfrom snapshotter.core import labels"),
        ("providers.copy.making", "from providers.copy.sets import Sets"),
        ("snapshotter.testing.conformance", "import pytest"),
        ("snapshotter.provider", 'BUILT_IN = {"copy": ("providers.copy:CopyProvider", "")}'),
    ],
)
def test_the_law_allows_what_is_right(module: str, source: str) -> None:
    assert not violations(source, module)


def loaded_by(statement: str) -> set[str]:
    """Modules in a fresh interpreter after the statement."""
    program = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import snapshotter.cli", "import snapshotter.provider"])
def test_the_command_loads_nothing_heavy(statement: str) -> None:
    loaded = loaded_by(statement)
    assert not {name for name in loaded for heavy in HEAVY if below(name, heavy)}


def test_a_take_by_btrfs_loads_only_what_it_needs() -> None:
    """Each of these takes a part of what the whole snapshot does. What our libraries load is theirs."""
    libraries = loaded_by("import click, msgspec")
    ours = loaded_by("import snapshotter.__main__, snapshotter.cli.sets, snapshotter.verbs.take, providers.btrfs")
    slow = {"dataclasses", "_hashlib", "json", "secrets", "random", "tempfile", "subprocess", "tenacity", "logging"}
    slow |= {
        "snapshotter.host.quiesce",
        "snapshotter.host.processes",
        "snapshotter.nodes.rpc",
        "urllib",
        "importlib.metadata",
    }
    assert not (ours - libraries) & slow


def test_no_cloud_is_loaded_by_naming_the_providers() -> None:
    loaded = loaded_by("import snapshotter.provider; list(snapshotter.provider.names())")
    assert not {name for name in loaded for heavy in HEAVY if below(name, heavy)}
    loaded = loaded_by("import snapshotter.provider; snapshotter.provider.load('copy')")
    assert "providers.copy" in loaded
    assert not {name for name in loaded for heavy in HEAVY if below(name, heavy) and not below(name, "providers")}


def test_what_can_see_nothing_here_is_not_loaded_to_list(tmp_path: Path) -> None:
    """It would take longer than a clone. A driver's own answer is the same: the empty list."""
    config = tmp_path / "config.toml"
    config.write_text(f'state = "{tmp_path}/state"\n')
    run = f"""
        from snapshotter import provider
        provider._SIGNS = dict.fromkeys(provider._SIGNS, ())
        provider.VENDORS = dict.fromkeys(provider.VENDORS, "nobody")
        from snapshotter.nodes.config import load
        from snapshotter.verbs.session import Session
        assert not Session(load("{config}")).catalog().unavailable
    """
    loaded = loaded_by(textwrap.dedent(run))
    assert {name for name in loaded if name.count(".") == 1 and name.startswith("providers.")} == {
        "providers.btrfs",
        "providers.copy",
    }
    assert "importlib.metadata" not in loaded or provider._third_parties()


@pytest.mark.parametrize("table", ['[aws]\nregion = "eu-west-1"', '[gcp]\nproject = "nodes"'])
def test_a_cloud_that_the_config_names_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str) -> None:
    monkeypatch.setattr(provider, "may_be_here", lambda name: False)
    config = tmp_path / "config.toml"
    config.write_text(f'state = "{tmp_path}/state"\n{table}\n')
    session = Session(load(str(config)))
    assert session._may_see("ebs") is ("aws" in table) and session._may_see("gce") is ("gcp" in table)


def test_a_third_partys_driver_is_found_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert not provider._third_parties()
    made = tmp_path / "other-1.0.dist-info"
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (made / "entry_points.txt").write_text("[console_scripts]\nx = x:y\n")
    assert not provider._third_parties()
    (made / "entry_points.txt").write_text("[snapshotter.providers]\nceph = other:Ceph\n")
    assert provider._third_parties()
    assert [*provider.names()][-2:] == ["ceph", "copy"]
    assert provider.may_be_here("ceph"), "nobody knows what it needs but itself"


def _import_error() -> type[provider.Provider]:
    raise AttributeError("module 'x' has no attribute 'y'")


class Old(provider.Provider):
    name = "old"


@pytest.mark.parametrize("load_it", [lambda: Old, _import_error])
def test_a_third_partys_driver_that_does_not_fit_hides_only_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_it: Callable[[], type[provider.Provider]]
) -> None:
    point = SimpleNamespace(name="old", load=load_it)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [point])
    monkeypatch.setattr(provider, "names", lambda: ("old", "copy"))
    config = tmp_path / "config.toml"
    config.write_text(f'state = "{tmp_path}/state"\n')
    entries = Session(load(str(config))).catalog()
    assert [gone.provider for gone in entries.unavailable] == ["old"] and "old" in entries.unavailable[0].reason


def test_the_shipped_proxies_need_no_pytest() -> None:
    assert "pytest" not in loaded_by("import snapshotter.testing")
