"""The documentation as a site."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
ROOT = Path(__file__).parents[1]


def test_the_site_builds_without_a_warning_and_has_every_page(tmp_path):
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    staged = [sys.executable, str(ROOT / "docs" / "stage.py"), str(tmp_path / "build" / "docs")]
    built = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    for command in (staged, built):
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert "WARNING  -" not in result.stderr
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    listed = set(re.findall(r"docs/([\w-]+)\.md", navigation))
    assert listed == {page.stem for page in (ROOT / "docs").glob("*.md")}
    for page in listed:
        html = (tmp_path / "build" / "site" / "docs" / page / "index.html").read_text()
        assert not re.search(r"<p>(- |\d+\. |\|)", html), f"{page}: a list or a table was not read as one"
    assert (tmp_path / "build" / "site" / "benchmarks" / "results" / "objectives.png").is_file()
