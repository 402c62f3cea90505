"""What a user gets: one wheel for every Python 3, built from an sdist that is complete."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMPORT_PACKAGES = ("kvcodec", "kvcodec_backends", "kvcodec_proto", "kvcodec_server")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as an installer would lay it out."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_wheel_fits_every_python_3_of_this_platform(wheel: Path):
    _, _, python_tag, abi_tag, platform_tag = wheel.stem.split("-")
    assert (python_tag, abi_tag) == ("py3", "none")
    assert platform_tag != "any"


def test_wheel_holds_every_module_of_the_checkout(unpacked: Path):
    for name in IMPORT_PACKAGES:
        (source,) = [path for path in (ROOT / name, *ROOT.glob(f"*/{name}")) if path.is_dir()]
        modules = {path.relative_to(source) for path in source.rglob("*.py")}
        assert modules == {
            path.relative_to(unpacked / name) for path in unpacked.glob(f"{name}/**/*.py")
        }
        assert (unpacked / name / "py.typed").is_file()


def test_native_folder_holds_what_users_need_and_no_source(unpacked: Path):
    files = {path.name for path in (unpacked / "kvcodec" / "native").iterdir()}
    assert {"libkvcodec.so", "kvcodec.h"} <= files
    assert {name for name in files if not name.endswith(".py")} == {"libkvcodec.so", "kvcodec.h"}


def test_wheel_carries_the_licences(unpacked: Path):
    (folder,) = unpacked.glob("*.dist-info/licenses")
    assert {"LICENSE", "NOTICE"} <= {path.name for path in folder.iterdir()}
    assert "xxHash" in (folder / "NOTICE").read_text()


def test_library_loads_alone(unpacked: Path):
    """libkvcodec brings what it needs: no libxxhash and no libstdc++ has to be there."""
    code = (
        "import ctypes, sys; ctypes.CDLL(sys.argv[1])\n"
        "print(*{line.split()[-1].rsplit('/', 1)[-1] for line in open('/proc/self/maps')})"
    )
    library = unpacked / "kvcodec" / "native" / "libkvcodec.so"
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(library)],
        check=True,
        capture_output=True,
        text=True,
    )
    loaded = run.stdout.split()
    assert "libkvcodec.so" in loaded
    assert [name for name in loaded if name.startswith(("libxxhash", "libstdc++"))] == []


def test_library_exports_what_its_headers_declare_and_nothing_else(unpacked: Path):
    headers = "".join(path.read_text() for path in (ROOT / "kvcodec" / "native").glob("*.h"))
    declared = set(re.findall(r"^KVC_EXPORT .*?\b(kvc_\w+)\(", headers, re.MULTILINE))
    library = unpacked / "kvcodec" / "native" / "libkvcodec.so"
    command = ["nm", "--dynamic", "--defined-only", str(library)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    assert {line.split()[-1] for line in run.stdout.splitlines()} == declared


def test_installed_package_imports_from_the_wheel(unpacked: Path):
    """Library and modules of the wheel work without the checkout."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        # The finder of the editable install would answer first, with the checkout.
        "sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"
        "import kvcodec, kvcodec.native, kvcodec_backends\n"
        "print(kvcodec.__file__, kvcodec.native.__file__, kvcodec_backends.__file__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(unpacked)], check=True, capture_output=True, text=True
    )
    assert all(path.startswith(str(unpacked)) for path in run.stdout.split())


def test_sdist_is_complete_and_holds_no_build_output(built: Path):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"LICENSE", "NOTICE", "pyproject.toml", "kvcodec/native/CMakeLists.txt"} <= names
    assert not [name for name in names if name.endswith((".so", "CMakeCache.txt", ".o"))]
