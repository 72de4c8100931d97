"""Collects what the site is made of: all pages, and each file that a page links to, laid as in the repository.

    python docs/stage.py FOLDER

So the links of the pages hold on the site as they do in the repository. `make docs` calls it and builds the site.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_STAGED = ".staged"
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/*.md", "benchmarks/results/*.md")


def stage(folder: Path) -> None:
    """Copy pages and what they link to into a folder, which is made anew. It must be one of ours, or not exist."""
    if folder.exists() and not (folder / _STAGED).exists():
        sys.exit(f"{folder} exists, and was not made by this script; give another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _STAGED).touch()
    pages = [page for pattern in PAGES for page in sorted(ROOT.glob(pattern))]
    wanted = {*pages}
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            file = (page.parent / link).resolve()
            if not link.startswith("http") and file.is_file():
                wanted.add(file)
    for file in wanted:
        target = folder / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


if __name__ == "__main__":
    stage(Path(sys.argv[1]))
