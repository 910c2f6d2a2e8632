"""What the package promises before any training: its requirements, its import, its files.

Peer failures are named by their id: F79 is the malicious uploads of Lightning 2.6.2 and 2.6.3.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import lightning_aux

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

PINNED = ("constraints.txt", "constraints-third-party.txt")


def requirements(name: str) -> list[Requirement]:
    """Every requirement on `name`, of the package and of its extras."""
    extras = PROJECT["optional-dependencies"].values()
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    return [req for req in map(Requirement, lines) if req.name == name]


def pins() -> dict[str, str]:
    lines = [line for name in PINNED for line in (ROOT / name).read_text("utf-8").splitlines()]
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("name", ["lightning", "pytorch-lightning"])
@pytest.mark.parametrize("version", ["2.5.6", "2.6.0", "2.6.1", "2.6.2", "2.6.3", "2.6.4", "2.6.5"])
def test_f79_unsafe_lightning_releases_are_excluded(name: str, version: str) -> None:
    assert requirements(name), f"pyproject.toml has no requirement on {name}"
    for requirement in requirements(name):
        assert not requirement.specifier.contains(version)
        assert requirement.specifier.contains("2.6.6")


@pytest.mark.parametrize("name", ["lightning", "pytorch-lightning"])
def test_f79_the_pinned_lightning_is_a_safe_one(name: str) -> None:
    assert all(req.specifier.contains(pins()[name]) for req in requirements(name))


def test_every_requirement_has_a_pin_that_satisfies_it() -> None:
    extras = PROJECT["optional-dependencies"].values()
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    normalised = {re.sub(r"[-_.]+", "-", name).lower(): pin for name, pin in pins().items()}
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        pin = normalised.get(requirement.name.lower())
        assert pin is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(pin), f"{requirement} does not allow {pin}"


def test_constraints_are_exact_and_name_no_place() -> None:
    text = "".join((ROOT / name).read_text("utf-8") for name in PINNED)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert pins()["torch"] == "2.13.0"
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.!]+", line)] == []


NOT_NEEDED = ["wandb", "jsonargparse", "rich", "matplotlib", "sklearn", "scipy", "mnist1d"]

IMPORT_WITHOUT = """
import sys

import importlib.metadata
import importlib.machinery

blocked = {blocked!r}

# Both ways of asking whether a package is there: looking for the module, and for its metadata.
find_spec = importlib.machinery.PathFinder.find_spec
from_name = importlib.metadata.Distribution.from_name

def find_other(name, path=None, target=None):
    return None if name.partition(".")[0] in blocked else find_spec(name, path, target)

def of_other(name):
    if name.lower().replace("scikit-learn", "sklearn") in blocked:
        raise importlib.metadata.PackageNotFoundError(name)
    return from_name(name)

importlib.machinery.PathFinder.find_spec = find_other
importlib.metadata.Distribution.from_name = of_other

import lightning_aux
for name in lightning_aux.__all__:
    getattr(lightning_aux, name)
import lightning_aux.functional, lightning_aux.registry
assert not blocked & {{name.partition(".")[0] for name in sys.modules}}
"""


def test_the_package_imports_with_only_torch_lightning_and_torchmetrics() -> None:
    script = IMPORT_WITHOUT.format(blocked=set(NOT_NEEDED))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_version_is_read_from_the_package() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([.\w]+)?", lightning_aux.__version__)
    assert "version" in PROJECT["dynamic"]


def tracked_files() -> Iterator[Path]:
    """The files of the repository: what git tracks or would add, or in an export all files."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        yield from (ROOT / name for name in listed.stdout.split("\0") if name)
    else:
        hidden = (".", "site")
        everything = ((path, path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file())
        yield from (path for path, name in everything if not name.parts[0].startswith(hidden))


# Split, so that this file does not contain what it looks for.
HOSTS_AND_PATHS = re.compile(
    "|".join(
        [
            "pypi" + r"\.org",
            "pythonhosted" + r"\.org",
            "download" + r"\.pytorch",
            r"(?<![\w.:/])/(?:" + "home|work|opt|root|Users" + r")/\w",
            "file" + "://",
            r"--(?:extra-)?index" + "-url",
        ]
    )
)


def test_no_file_names_a_registry_or_a_path_of_a_machine() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text("utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if HOSTS_AND_PATHS.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


@pytest.mark.parametrize("name", ["lightning", "pytorch-lightning"])
@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_f79_a_malicious_release_is_refused_before_it_is_imported(
    name: str, version: str, tmp_path: Path
) -> None:
    """Its metadata is read; the module itself, which would steal, is never run."""
    info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for module in ("lightning", "pytorch_lightning"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('stolen')\n")
    ended = subprocess.run(
        [sys.executable, "-c", "import lightning_aux"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"ImportError: {name} {version} was a malicious upload" in ended.stderr
    assert "stolen" not in ended.stderr
