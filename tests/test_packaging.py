"""What users install. Oracle: a wheel built from a copy of the checkout, unpacked and imported from elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ["compress", "kernels", "eval", "recipes"]
BUILD_FILES = ["pyproject.toml", "README.md", "LICENSE"]
GENERATED = {"__pycache__", ".DS_Store"}


def run_python(code: str, *paths: Path, cwd: Path) -> dict:
    """Runs code in a fresh interpreter with `paths` first on sys.path; returns the JSON that it printed last.

    No .pth file is read (-S): an editable install of this very checkout may be active in the environment.
    """
    inherited = [p for p in sys.path if p and Path(p).resolve() not in (ROOT, ROOT / "tests")]
    search = [*map(str, paths), *inherited]
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:] = {search!r}\n{code}"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that builds leave no build/ and no egg-info in the original."""
    directory = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, directory / folder, ignore=shutil.ignore_patterns(*GENERATED))
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, directory)
    return directory


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-build-isolation", "--no-deps"]
    done = subprocess.run([*pip, "--wheel-dir", str(out), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


def test_wheel_owns_one_top_level_name(unpacked: Path) -> None:
    """Oracle: beside the metadata, the wheel holds the one folder `compress`."""
    names = {p.name for p in unpacked.iterdir() if p.suffix != ".dist-info"}
    assert names == {"compress"}


def test_distribution_has_a_name_of_its_own_and_no_console_script(wheel: Path, unpacked: Path) -> None:
    """Oracle: `compress` is another distribution on PyPI and a Unix command, so the wheel claims neither."""
    assert wheel.name.startswith("compress_llm-")
    (dist_info,) = unpacked.glob("*.dist-info")
    assert not (dist_info / "entry_points.txt").exists()
    assert "License-Expression: Apache-2.0" in (dist_info / "METADATA").read_text()


def test_wheel_holds_every_file_of_the_checkout(unpacked: Path) -> None:
    """Oracle: the checkout's own listing. A recipe group, task or model file added later is covered without a change
    here, and fails here when pyproject.toml does not ship it."""
    missing = []
    for folder in FOLDERS:
        target = unpacked / "compress" / ("" if folder == "compress" else folder)
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT / folder)
            if path.is_file() and not GENERATED & set(relative.parts) and not (target / relative).is_file():
                missing.append(f"{folder}/{relative}")
    assert not missing, f"not in the wheel: {missing}"


@pytest.mark.parametrize(
    "needed",
    ["recipes/config.yaml", "recipes/recipe/awq4.yaml", "reference/model/config.json", "reference/texts"],
)
def test_wheel_holds_what_the_first_command_reads(unpacked: Path, needed: str) -> None:
    """Oracle: what `python -m compress recipe=awq4` opens."""
    assert (unpacked / "compress" / needed).exists()


def test_wheel_holds_tasks(unpacked: Path) -> None:
    """Oracle: lm-eval reads a YAML and its data from compress/eval/tasks."""
    tasks = unpacked / "compress" / "eval" / "tasks"
    assert list(tasks.rglob("*.yaml")) and list(tasks.rglob("*.jsonl"))


def test_installed_package_finds_its_parts_inside_itself(unpacked: Path, tmp_path: Path) -> None:
    """Oracle: the origins of compress.kernels, compress.eval and compress.recipes lie in the unpacked wheel."""
    code = """
import importlib, json
names = ["compress", "compress.kernels", "compress.eval", "compress.recipes"]
print(json.dumps({n: list(importlib.import_module(n).__path__) for n in names}))
"""
    found = run_python(code, unpacked, cwd=tmp_path)
    for name, paths in found.items():
        assert paths == [str(unpacked / name.replace(".", os.sep))]


def test_importing_compress_is_cheap(unpacked: Path, tmp_path: Path) -> None:
    """Oracle: sys.modules after `import compress` in a fresh interpreter."""
    code = """
import json, compress, compress.config
heavy = {"torch", "transformers", "numpy", "triton", "datasets", "lm_eval"}
print(json.dumps({"heavy": sorted(heavy & set(sys.modules)), "version": compress.__version__}))
"""
    found = run_python(code, unpacked, cwd=tmp_path)
    assert found["heavy"] == []
    (dist_info,) = unpacked.glob("*.dist-info")
    assert dist_info.name == f"compress_llm-{found['version']}.dist-info"


@pytest.mark.parametrize("layout", ["wheel", "checkout"])
def test_hugging_face_kernels_package_is_not_shadowed(layout: str, unpacked: Path, tmp_path: Path) -> None:
    """Oracle: with a regular package called `kernels` on the path, `import kernels` finds it from elsewhere and, as a
    plain folder never beats a regular package, also with the checkout ahead of it on the path."""
    other = tmp_path / "site-packages"
    (other / "kernels").mkdir(parents=True)
    (other / "kernels" / "__init__.py").write_text("whose = 'Hugging Face'\n")
    ours = unpacked if layout == "wheel" else ROOT
    code = """
import json, kernels, compress.kernels
print(json.dumps({"whose": kernels.whose, "ours": list(compress.kernels.__path__)}))
"""
    found = run_python(code, ours, other, cwd=tmp_path)
    assert found["whose"] == "Hugging Face"
    assert all(str(ours) in path for path in found["ours"])


COMPOSE = """
import json
import compress.eval.roofline, compress.kernels
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
with initialize_config_module("compress.recipes", version_base="1.3"):
    loader = GlobalHydra.instance().config_loader()
    loader.ensure_main_config_source_available()
    print(json.dumps({"recipes": loader.get_group_options("recipe"), "at": compress.__file__}))
"""


def shipped_recipes() -> list[str]:
    recipes = sorted(p.stem for p in (ROOT / "recipes" / "recipe").glob("*.yaml"))
    assert "awq4" in recipes
    return recipes


def test_hydra_finds_recipes_in_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    """Oracle: Hydra's pkg:// search sees the config root and every recipe of the checkout, in the unpacked wheel."""
    found = run_python(COMPOSE, unpacked, cwd=tmp_path)
    assert found == {"recipes": shipped_recipes(), "at": str(unpacked / "compress" / "__init__.py")}


def test_editable_install_works_from_any_folder(source: Path, tmp_path: Path) -> None:
    """Oracle: the same search through what `pip install -e` would install, from a folder that is not the checkout.
    The wheel is made by the hook that pip calls, and unpacked here: pip itself would replace the environment's own."""
    hook = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", hook], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = tmp_path.glob("*.whl")
    site_packages = tmp_path / "site-packages"
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site_packages)
    activate = f"import site; site.addsitedir({str(site_packages)!r})\n"
    found = run_python(activate + COMPOSE, site_packages, cwd=tmp_path)
    assert found == {"recipes": shipped_recipes(), "at": str(source / "compress" / "__init__.py")}
