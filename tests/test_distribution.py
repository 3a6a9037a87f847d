"""What the source distribution holds, and what an installation of it has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    project = folder / "project"
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc", "*.egg-info")
    for name in ("csrc", "t2", "t2kernels"):
        shutil.copytree(ROOT / name, project / name, ignore=unwanted)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, project)
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder / "dist"]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    (made,) = (folder / "dist").glob("*.tar.gz")
    return made


def test_everything_that_is_built_or_read_is_there(archive):
    with tarfile.open(archive) as opened:
        there = {name.partition("/")[2] for name in opened.getnames()}
    wanted = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "t2", "t2kernels")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }
    assert len(wanted) > 100 and not wanted - there
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= there


def pip_install(what, target, **environment):
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", target, what]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


CALL = """
import sys
sys.meta_path[:] = [each for each in sys.meta_path if "editable" not in str(each).lower()]
import t2kernels, torch
print(t2kernels.__file__)
print(t2kernels.backends()["cpu"])
t2kernels.svf_linear(torch.ones(2, 3), torch.ones(4, 2), torch.ones(2), torch.ones(2, 3), torch.ones(2))
"""


def call(target):
    environment = os.environ | {"PYTHONPATH": str(target)}
    return subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, cwd=target, env=environment)


def test_a_failed_build_ends_the_installation_and_can_be_left_out(archive, tmp_path):
    failed = pip_install(archive, tmp_path / "failed", CXX="no-such-compiler")
    assert failed.returncode and "T2KERNELS_NO_EXTENSION=1 installs without" in failed.stdout + failed.stderr
    done = pip_install(archive, tmp_path / "slow", CXX="no-such-compiler", T2KERNELS_NO_EXTENSION="1")
    assert done.returncode == 0, done.stderr
    ran = call(tmp_path / "slow")
    assert ran.returncode == 0 and str(tmp_path) in ran.stdout, ran.stderr
    assert "available" not in ran.stdout.splitlines()[1] and "reference" in ran.stderr


@pytest.mark.slow
def test_an_installation_of_the_source_distribution_and_of_its_wheel_has_the_kernels(archive, tmp_path):
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, archive]
    subprocess.run(wheel, check=True, capture_output=True)
    (made,) = tmp_path.glob("*.whl")
    assert pip_install(made, tmp_path / "there").returncode == 0
    ran = call(tmp_path / "there")
    assert ran.returncode == 0 and str(tmp_path) in ran.stdout, ran.stderr
    assert ran.stdout.splitlines()[1].startswith("available") and not ran.stderr
    for name in ("t2/banks", "t2kernels/triton/measured"):
        assert any((tmp_path / "there" / name).rglob("*.*"))
