"""The layout of the project: what may import what, and what importing does."""

import ast
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_command

PACKAGE = ROOT / "slm"
GROUND = "ground"
WINGS = {  # each with those that it may import from
    GROUND: set(),
    "model": {GROUND},
    "training": {GROUND, "model"},
    "data": {GROUND},
    "formats": {GROUND, "model", "training", "data"},
    "run": {GROUND, "model", "training", "data"},
    "watch": {GROUND, "model", "training", "data", "run"},
    "command": {GROUND, "model", "training", "data", "run", "watch"},
    "page": {GROUND, "model", "training", "data", "run", "watch", "command"},
    "research": {GROUND, "model", "training", "data", "run", "watch", "command"},
    "doors": {GROUND, "model", "training", "data", "formats", "run", "watch", "command", "page", "research"},
}
ON_THE_GROUND = {"errors", "durable", "hardware", "messages", "paths"}
FILES = {
    ".".join(("slm", *file.relative_to(PACKAGE).with_suffix("").parts)): file
    for file in sorted(PACKAGE.rglob("*.py"))
    if file != PACKAGE / "__init__.py"
}


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


def wing_of(module: str) -> str:
    first, *rest = module.removeprefix("slm.").split(".")
    if not rest and first not in WINGS:
        return GROUND if first in ON_THE_GROUND else "doors"
    return first


def ours_in(module: str) -> set[str]:
    """The files of the package that a file imports; a wing's `__init__` where that is named."""
    found = {name for name in imports_of(FILES[module]) if name.startswith("slm.")}
    known = {name.removesuffix(".__init__") for name in FILES}
    return {name for name in found if name in known} - {module}


def test_there_are_no_other_wings() -> None:
    assert {wing_of(module) for module in FILES} == {*WINGS}
    assert {f"slm.{name}" for name in ON_THE_GROUND} <= FILES.keys()


@pytest.mark.parametrize("module", FILES)
def test_a_file_imports_only_from_wings_below_its_own(module: str) -> None:
    wing = wing_of(module)
    assert {wing_of(other) for other in ours_in(module)} <= {wing, *WINGS[wing]}


def test_no_file_imports_itself_by_way_of_others() -> None:
    left = {name.removesuffix(".__init__"): ours_in(name) for name in FILES}
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    assert left == {}


def test_the_network_knows_torch_alone() -> None:
    for module, file in FILES.items():
        packages = {name.partition(".")[0] for name in imports_of(file)} - {*sys.stdlib_module_names}
        if wing_of(module) == "model":
            assert packages <= {"torch", "slm"}, module
        if wing_of(module) in ("training", "data"):
            assert not packages & {"jsonargparse", "tensorboard"}, module


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
