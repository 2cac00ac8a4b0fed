"""Makes the zip of a cloud function: our packages without what a function can't use, one provider, and (for AWS) the
libraries of that provider without what they don't need there. The same input gives the same bytes.

  aws   everything in it; Lambda runs it as it is. Handler: snapshotter.functions.lambda_handler
  gcp   source and requirements.txt; Google installs the libraries. Entry point: gcf_handler
"""

from __future__ import annotations

import argparse
import compileall
import importlib.metadata
import os
import py_compile
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Lambda's own limits: a zip that is uploaded, and what it unpacks to.
AWS_ZIP, AWS_UNPACKED = 50 * 1000**2, 250 * 1000**2
CORE = ("msgspec", "tenacity")
LIBRARIES = {"aws": (*CORE, "boto3"), "gcp": (*CORE, "google-cloud-compute", "functions-framework")}
PROVIDER = {"aws": "ebs", "gcp": "gce"}
#: Of botocore's 20 MB of service descriptions, those that are called.
SERVICES = {"ec2", "ssm", "sts"}
#: A terminal's, and what is for third parties' tests.
NOT_OURS = {"cli", "testing", "human.py", "__main__.py"}


def ours(cloud: str, to: Path) -> None:
    """The packages of this checkout."""
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("snapshotter", "providers"):
        for path in sorted((ROOT / name).iterdir()):
            wanted = path.name not in NOT_OURS if name == "snapshotter" else path.stem in ("__init__", PROVIDER[cloud])
            if not wanted or path.name == "__pycache__":
                continue
            if path.is_dir():
                shutil.copytree(path, to / name / path.name, ignore=skip)
            else:
                (to / name).mkdir(exist_ok=True)
                shutil.copyfile(path, to / name / path.name)


def installed(names: tuple[str, ...], to: Path) -> None:
    """These distributions and what they require, from the environment that runs this."""
    todo, done = list(names), set()
    while todo:
        name = re.split(r"[^A-Za-z0-9._-]", todo.pop())[0]
        if name.lower() in done:
            continue
        done.add(name.lower())
        distribution = importlib.metadata.distribution(name)
        todo += [line for line in distribution.requires or () if ";" not in line]
        for file in distribution.files or ():
            source = Path(str(distribution.locate_file(file)))
            if ".." in file.parts or "__pycache__" in file.parts or not source.is_file():
                continue
            (to / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, to / file)


def downloaded(names: tuple[str, ...], to: Path, python: str, arch: str) -> None:
    """The same by pip, for Lambda's Python and processor whatever this machine's are."""
    platform = {"x86_64": "x86_64", "arm64": "aarch64"}[arch]
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile",
            "--target", str(to), "--only-binary=:all:", "--implementation=cp", f"--python-version={python}",
            f"--platform=manylinux2014_{platform}", f"--platform=manylinux_2_17_{platform}",
            f"--platform=manylinux_2_28_{platform}", *names,
        ],
        check=True,
    )  # fmt: skip


def trim(to: Path) -> None:
    """What no function of ours calls."""
    for path in (to / "botocore" / "data").iterdir():
        if path.is_dir() and path.name not in SERVICES:
            shutil.rmtree(path)
    for path in (to / "boto3" / "data", to / "boto3" / "examples", to / "bin"):
        shutil.rmtree(path, ignore_errors=True)
    for path in [*to.rglob("*.dist-info")]:
        for file in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json"):
            (path / file).unlink(missing_ok=True)


def pack(tree: Path, archive: Path) -> None:
    """Sorted, and of one date: zip knows none before 1980."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        for path in sorted(path for path in tree.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(str(path.relative_to(tree)), (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            out.writestr(entry, path.read_bytes())


def size(tree: Path) -> int:
    return sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())


def build(cloud: str, archive: Path, python: str, arch: str, here: bool) -> int:
    """Returns the size of what it unpacks to."""
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        if cloud == "aws":
            if here:
                installed(LIBRARIES[cloud], tree)
            else:
                downloaded(LIBRARIES[cloud], tree, python, arch)
            trim(tree)
        ours(cloud, tree)
        if cloud == "aws" and python == running:
            # Lambda's file system can't be written to: without byte code every cold start would compile all of it.
            compileall.compile_dir(
                tree, quiet=2, stripdir=scratch, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
            )
        if cloud == "gcp":
            (tree / "main.py").write_text("from snapshotter.functions import gcf_handler  # noqa: F401\n")
            (tree / "requirements.txt").write_text("".join(f"{name}\n" for name in LIBRARIES[cloud]))
        pack(tree, archive)
        return size(tree)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/build-function", description=__doc__.split("\n\n")[0])
    parser.add_argument("cloud", choices=["aws", "gcp"])
    parser.add_argument("-o", "--output", type=Path, default=Path("snapshotter-function.zip"))
    parser.add_argument("--python", default="3.13", help="Lambda's Python (default 3.13)")
    parser.add_argument("--arch", choices=["x86_64", "arm64"], default="x86_64")
    parser.add_argument("--here", action="store_true", help="take the libraries of this environment: no network")
    given = parser.parse_args()
    python = f"{sys.version_info.major}.{sys.version_info.minor}" if given.here else given.python
    unpacked = build(given.cloud, given.output, python, given.arch, given.here)
    zipped = os.path.getsize(given.output)
    print(f"{given.output}: {zipped / 1e6:.1f} MB, unpacked {unpacked / 1e6:.1f} MB, Python {python}")
    if given.cloud == "aws" and (zipped > AWS_ZIP or unpacked > AWS_UNPACKED):
        print("error: Lambda takes no more than 50 MB, 250 MB unpacked", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
