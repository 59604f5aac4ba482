"""The layout of the project: what may import what, and what importing does."""

import ast
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_command

PACKAGE = ROOT / "slm"
ORDER = re.findall(r"^    (\w+)\.py +\S", (PACKAGE / "__init__.py").read_text(), re.M)


def imports_of(file: Path) -> set[str]:
    """The names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_package_maps_every_file() -> None:
    assert sorted(ORDER) == sorted(file.stem for file in PACKAGE.glob("*.py") if file.stem != "__init__")


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_from_files_above_it(name: str) -> None:
    below = ORDER[ORDER.index(name) :]
    assert imports_of(PACKAGE / f"{name}.py") & {f"slm.{other}" for other in below} == set()


def test_the_network_knows_torch_alone() -> None:
    for name in ("transformer", "accumulation", "hardware", "source", "loader"):
        packages = {module.partition(".")[0] for module in imports_of(PACKAGE / f"{name}.py")}
        assert packages - set(sys.stdlib_module_names) <= {"torch", "slm"}, name


def test_module_and_data_never_import_one_another() -> None:
    assert not {"slm.data", "slm.source", "slm.corpus"} & imports_of(PACKAGE / "module.py")
    assert "slm.module" not in imports_of(PACKAGE / "data.py")


def test_importing_the_package_does_nothing() -> None:
    code = (
        "import os, sys, warnings\n"
        "before = dict(os.environ), list(warnings.filters), set(sys.modules)\n"
        "import slm\n"
        "assert (dict(os.environ), list(warnings.filters)) == before[:2]\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = run_command("-c", code, cwd=ROOT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
