"""scripts/check_package.py: files that an sdist or a wheel lacks, or shouldn't hold, are named."""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from support.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import check_package

EXPECTED = {"README.md", "configs/quick.toml", "src/abliterate/py.typed", "src/abliterate/demo/model/config.json"}
WHEEL = {"abliterate/configs/quick.toml", "abliterate/py.typed", "abliterate/demo/model/config.json"}


def test_files_of_the_checkout_are_sound() -> None:
    assert check_package.faults(EXPECTED | check_package.ADDED, WHEEL, EXPECTED) == []


@pytest.mark.parametrize(
    ("sdist", "wheel", "fault"),
    [
        (EXPECTED - {"configs/quick.toml"}, WHEEL, "The sdist lacks configs/quick.toml"),
        (EXPECTED | {"tests/__pycache__/x.pyc"}, WHEEL, "The sdist holds tests/__pycache__/x.pyc"),
        (EXPECTED, WHEEL - {"abliterate/demo/model/config.json"}, "The wheel lacks abliterate/demo/model/config.json"),
        (EXPECTED, WHEEL | {"abliterate/notes.txt"}, "The wheel holds abliterate/notes.txt"),
    ],
)
def test_a_file_too_few_or_too_many_is_named(sdist: set[str], wheel: set[str], fault: str) -> None:
    (found,) = check_package.faults(sdist, wheel, EXPECTED)
    assert found.startswith(fault)


def test_a_package_without_types_is_told() -> None:
    without = {path for path in EXPECTED if "py.typed" not in path}
    found = check_package.faults(without, WHEEL - {"abliterate/py.typed"}, without)
    assert found == ["The wheel has no py.typed, so type checkers would ignore its types."]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git lists the files of a checkout, and this is none")
def test_this_checkout_packs_its_demo_its_configs_and_its_types() -> None:
    wheel = check_package.in_wheel(check_package.tracked())
    assert {"abliterate/py.typed", "abliterate/configs/default.toml", "abliterate/demo/model/model.safetensors"} <= wheel
    assert not [path for path in wheel if not path.startswith("abliterate/")]


def test_the_files_are_read_from_the_archives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_package, "tracked", lambda: EXPECTED)
    name = f"abliterate-{check_package.version()}"
    with tarfile.open(tmp_path / f"{name}.tar.gz", "w:gz") as archive:
        for path in (*EXPECTED, *check_package.ADDED):
            archive.addfile(tarfile.TarInfo(f"{name}/{path}"), io.BytesIO())
    with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w") as archive:
        for path in (*WHEEL, f"{name}.dist-info/METADATA"):
            archive.writestr(path, "")
    assert check_package.main(tmp_path) == 0
    assert f"{len(WHEEL)} in the wheel" in capsys.readouterr().out
    monkeypatch.setattr(check_package, "tracked", lambda: EXPECTED | {"docs/new.md"})
    assert check_package.main(tmp_path) == 1
    assert "The sdist lacks docs/new.md" in capsys.readouterr().out
    (tmp_path / f"{name}.tar.gz").rename(tmp_path / "abliterate-0.tar.gz")
    assert check_package.main(tmp_path) == 1
    assert "build them again" in capsys.readouterr().err
