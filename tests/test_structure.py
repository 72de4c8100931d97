"""The rules of CONTRIBUTING.md that a program can check."""

import ast
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "oprd_tune").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
LINES = {"recipes": 200, "oprd_tune": 300}
FUNCTION_LINES = 60
# A module may import from its own layer and from those before it.
LAYERS = [
    {
        "errors",
        "types",
        "registry",
        "ranks",
        "failed_ranks",
        "protocols",
        "packing",
        "selection",
        "torchtune_compat",
        "workers",
        "_hook",
        "command_line",
        "__init__",
    },
    {"config", "losses", "modeling", "data", "grading", "metrics"},
    {"teacher", "rollout"},
    {"training", "preflight", "evaluation"},
    {"run", "compare", "pruning"},
    {"tiny", "doctor", "__main__"},
]
ONLY_IN = {
    "vllm": "rollout/vllm/",
    "torchao": "teacher/quantize.py",
    "math_verify": "workers/verdict_worker.py",
    "transformers": ("data/", "teacher/", "modeling/families/", "workers/template_worker.py"),
}
COMPAT = ROOT / "oprd_tune" / "torchtune_compat.py"
# Attributes of torchtune's objects that it does not promise; ours have other names.
PRIVATE = {"_checkpoint_dir", "_checkpoint_paths", "_weight_map", "_model_type", "_quantize_base", "_get_weight_norm"}


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
        for package, room in ONLY_IN.items():
            if name.split(".")[0] == package:
                assert str(own).startswith(room), f"{package} is imported in {own}"


def test_no_two_files_have_one_name():
    names = [path.name for path in LIBRARY if path.name != "__init__.py"]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)


@pytest.mark.parametrize("path", [p for p in LIBRARY + RECIPES if p != COMPAT], ids=lambda p: str(p.relative_to(ROOT)))
def test_private_parts_of_torchtune_are_touched_in_one_room(path):
    tree = ast.parse(path.read_text())
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] != "torchtune" or not any(part.startswith("_") for part in parts), name
    assert not {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & PRIVATE


@pytest.mark.parametrize("path", LIBRARY + RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_read_runs_no_code(path):
    """`torch.load` takes plain values only, and one file reads pickles, name by name."""
    assert path.name == "safe_reading.py" or not {"pickle", "dill", "cloudpickle"} & set(imports(path))
    for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
        if ast.unparse(call.func) == "torch.load":
            assert "weights_only=True" in map(ast.unparse, call.keywords)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_config_stops_at_the_recipe(path):
    if path.parent.name != "config" and path.name != "launcher.py":  # which hands it to the recipe
        assert "DictConfig" not in path.read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_are_files_to_copy_not_modules(path):
    assert not any(name.split(".")[0] == "recipes" for p in LIBRARY + RECIPES for name in imports(p))
    assert not (ROOT / "recipes" / "__init__.py").exists()


def test_importing_the_package_imports_nothing_heavy():
    heavy = {"torch", "torchtune", "datasets", "transformers"}
    code = f"import sys, oprd_tune; print([m for m in sorted({heavy}) if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_metrics_page_is_written_by_the_command(tmp_path):
    from oprd_tune.metrics.names import write_page

    page = tmp_path / "metrics.md"
    page.write_text((ROOT / "docs" / "metrics.md").read_text())
    write_page(page)
    assert page.read_text() == (ROOT / "docs" / "metrics.md").read_text()


def test_every_component_is_documented():
    from dataclasses import fields

    from oprd_tune.config import Parts

    page = (ROOT / "docs" / "configuration.md").read_text()
    assert all(f"`{f.name}`" in page for f in fields(Parts) if f.name != "record")


README_TREE = (ROOT / "README.md").read_text().partition("```\nrecipes/")[2].partition("```")[0]


def test_the_readmes_tree_names_every_room():
    rooms = {path.relative_to(ROOT / "oprd_tune").parts[0] for path in LIBRARY}
    assert all(f"{room}/" in README_TREE for room in rooms if not room.endswith(".py"))
    assert "torchtune_compat.py" in README_TREE


@pytest.mark.parametrize("page", [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")], ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


BRIDGE_PAGE = (ROOT / "docs" / "bridge.md").read_text()


def readme_rows():
    lines = (ROOT / "README.md").read_text().splitlines()
    return {cells[1].strip(): line for line in lines if len(cells := line.split("|")) > 3}


def test_the_readme_quotes_accuracies_as_measured():
    found = json.loads((ROOT / "benchmarks" / "results" / "objectives.json").read_text())
    rows = {name.split(" (")[0]: line for name, line in readme_rows().items()}
    quoted = found.keys() & rows.keys()
    assert len(quoted) >= 6
    for name in quoted:
        gap = statistics.fmean(run["gap_closed"] for run in found[name]["runs"])
        assert f"| {gap:.3f} |" in rows[name]


def test_the_page_of_the_bridge_quotes_accuracies_as_measured():
    found = json.loads((ROOT / "benchmarks" / "results" / "bridge.json").read_text())
    rows = {cells[1].strip(): line for line in BRIDGE_PAGE.splitlines() if len(cells := line.split("|")) > 3}
    assert len(found.keys() & rows.keys()) == len(found)
    for name, measured in found.items():
        accuracy = statistics.fmean(run["student_after"] for run in measured["runs"])
        assert f"| {accuracy:.3f} |" in rows[name], name


def test_the_page_of_oprd_quotes_self_distillation_as_measured():
    found = json.loads((ROOT / "benchmarks" / "results" / "self_distillation.json").read_text())
    page = (ROOT / "docs" / "oprd_distributed.md").read_text()
    for name, measured in found.items():
        accuracy = statistics.fmean(run["student_after"] for run in measured["runs"])
        before, after = measured["pivots"]
        assert f"| {name} | {accuracy:.3f} | {before:.3f}, {after:.3f} |" in page


def test_the_readme_quotes_costs_as_measured():
    rows = json.loads((ROOT / "benchmarks" / "results" / "update_cost.json").read_text())
    cost = {(r["objective"], r["formulation"]): r for r in rows if r["tokens"] == 2048}
    for name, line in readme_rows().items():
        if (name, "plain") in cost:
            ours, plain = cost[name, "ours"], cost[name, "plain"]
            cells = [f"{r['delta_peak_bytes'] / 2**30:.2f}" for r in (ours, plain)]
            cells += [f"{r['seconds']:.0f}" for r in (ours, plain)]
            assert f"| {' | '.join(cells)} |" in line
    assert {"oprd", "topk", "full"} <= readme_rows().keys()


def test_every_setting_is_documented_in_order():
    from dataclasses import fields

    from oprd_tune.config import OPRDSettings

    page = (ROOT / "docs" / "configuration.md").read_text()
    places = [page.find(f"| `{field.name}` |") for field in fields(OPRDSettings)]
    assert all(place >= 0 for place in places)
    assert places == sorted(places)
