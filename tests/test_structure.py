"""The rules of CONTRIBUTING.md that a program can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "oprd_tune").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
LINES = {"recipes": 350, "oprd_tune": 300}
FUNCTION_LINES = 60
# A module may import from its own layer and from those before it.
LAYERS = [
    {"errors", "types", "registry", "_hook", "__init__"},
    {"losses", "modeling", "data", "grading", "metrics", "settings"},
    {"teacher", "rollout"},
    {"training"},
    {"tiny", "__main__"},
]
ONLY_IN = {"vllm": set(), "torchao": set(), "math_verify": {"grading/graders.py"}, "transformers": set()}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def layer_of(package):
    return next(i for i, names in enumerate(LAYERS) if package in names)


@pytest.mark.parametrize("path", LIBRARY + RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert text.count("\n") <= LINES[path.relative_to(ROOT).parts[0]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= FUNCTION_LINES, node.name
            public = not node.name.startswith("_") and path not in RECIPES
            assert not public or ast.get_docstring(node) or node.end_lineno - node.lineno <= 8, node.name


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = path.relative_to(ROOT / "oprd_tune")
    for name in imports(path):
        if name.startswith("oprd_tune.") and not name.startswith("oprd_tune._"):
            imported = name.split(".")[1]
            assert layer_of(imported) <= layer_of(own.parts[0].removesuffix(".py")), name
        for package, files in ONLY_IN.items():
            if name.split(".")[0] == package:
                assert str(own) in files, f"{package} is imported in {own}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_are_files_to_copy_not_modules(path):
    assert not any(name.split(".")[0] == "recipes" for p in LIBRARY + RECIPES for name in imports(p))
    assert not (ROOT / "recipes" / "__init__.py").exists()


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, oprd_tune; print([m for m in ('torch', 'torchtune', 'datasets') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_metrics_page_is_made_from_the_code():
    from oprd_tune.metrics.names import as_markdown

    assert as_markdown() in (ROOT / "docs" / "metrics.md").read_text()


def test_every_setting_is_documented_in_order():
    from dataclasses import fields

    from oprd_tune.settings import OPDSettings

    page = (ROOT / "docs" / "configuration.md").read_text()
    places = [page.find(f"| `{field.name}` |") for field in fields(OPDSettings)]
    assert all(place >= 0 for place in places)
    assert places == sorted(places)
