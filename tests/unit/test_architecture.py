"""The shape of the code: who imports whom, how light an import is, and that files stay readable."""

import ast
import functools
import importlib
import importlib.metadata
import pathlib
import subprocess
import sys
from collections.abc import Mapping

import pytest

from cluster.config import Config

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("cluster", "training", "serving", "jobs")
MAY_IMPORT = {
    "cluster": {"cluster"},
    "training": {"cluster", "training"},
    "serving": {"cluster", "serving"},
    "jobs": set(PACKAGES),
}
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@functools.cache
def parsed(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def installed_packages() -> Mapping[str, list[str]]:
    """Top-level package -> the distributions that install it."""
    return importlib.metadata.packages_distributions()


def imported_packages(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_direction(path):
    package = path.relative_to(ROOT).parts[0]
    assert imported_packages(path) & set(PACKAGES) <= MAY_IMPORT[package]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is_and_stays_small(path):
    text = path.read_text()
    assert ast.get_docstring(parsed(path)), "module docstring"
    assert text.count("\n") <= 400
    assert path.stem == "__main__" or path.stem not in sys.stdlib_module_names


def test_no_function_is_longer_than_70_lines():
    long = [
        f"{path.name}:{node.name}"
        for path in FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno + 1 > 70
    ]
    assert long == []


def test_modules_import_no_heavy_package():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES if path.stem != "__init__"]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "heavy = {'torch', 'transformers', 'vllm', 'ray', 'peft', 'deepspeed', 'sklearn', 'presidio_analyzer'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("package", PACKAGES)
def test_top_level_packages_are_ours_alone(package):
    assert set(installed_packages().get(package, ["understudy"])) == {"understudy"}


def journey(text: str) -> list[tuple[str, str]]:
    """(stage, artifact) of a journey table's rows; a row without a stage goes on with the one above it."""
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 4 or set(cells[0]) == {"-"}:
            continue
        if cells[0]:
            found.append((cells[0], cells[3]))
        else:
            found[-1] = (found[-1][0], f"{found[-1][1]}, {cells[3]}")
    return found


def test_the_two_tables_of_the_journey_agree():
    section = (ROOT / "README.md").read_text().split("## The journey of one call")[1].split("\n## ")[0]
    page = journey(section)
    conversion = journey(ast.get_docstring(ast.parse((ROOT / "jobs" / "convert.py").read_text())) or "")
    assert page[0] == conversion[0] == ("stage", "artifact under the store")
    assert [row[0] for row in conversion[1:]] == [
        "S2 curate",
        "S3 discover",
        "S4 select",
        "S5 fine-tune",
        "validate",
        "release",
    ]
    first = page.index(conversion[1])
    assert page[first : first + len(conversion) - 1] == conversion[1:]


def config_classes() -> list[type[Config]]:
    for path in FILES:
        if path.stem != "__main__":
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    found = [Config]
    for one in found:
        found += [other for other in one.__subclasses__() if other.__module__.split(".")[0] in PACKAGES]
    return found[1:]


def test_every_config_field_says_what_it_means():
    """A section, whose type is a config class, is described by that class."""
    classes = config_classes()
    assert len(classes) >= 20
    silent = []
    for one in classes:
        silent += [] if one.__dict__.get("__doc__") else [one.__name__]
        for name, field in one.model_fields.items():
            is_section = isinstance(field.annotation, type) and issubclass(field.annotation, Config)
            silent += [] if field.description or is_section else [f"{one.__name__}.{name}"]
    assert silent == []
