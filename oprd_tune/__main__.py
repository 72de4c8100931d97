"""`python -m oprd_tune`: torchtune's command line with our recipes in it, and three more commands.

    python -m oprd_tune run oprd_distributed --config tiny/oprd
    python -m oprd_tune export CHECKPOINT_FOLDER HF_FOLDER [--trust COMPONENT]
    python -m oprd_tune compare RUN RUN … [--out FOLDER] [--against seconds]
    python -m oprd_tune prune FOLDER_OR_HUB_NAME OUT [--drop-blocks I,J,… | --blocks N] [--width D] …

`export` writes a checkpoint as a Hugging Face folder; `--trust` lets it call a component of your own. `compare` puts
several runs into one picture and one table; each RUN is the `output_dir` of a run. `prune` makes a smaller student;
`prune --help` lists its options. Everything else works like `tune`, and also works where Python reads no `.pth` files.
"""

from __future__ import annotations

import os
import sys

from oprd_tune.errors import ConfigError


def main() -> None:
    """Dispatch on the first argument: `export`, `compare` and `prune` are ours, everything else torchtune's."""
    if sys.argv[1:2] == ["export"]:
        sys.exit(_export(sys.argv[2:]))
    if sys.argv[1:2] == ["compare"]:
        from oprd_tune.compare.command import main as compare

        sys.exit(compare(sys.argv[2:]))
    if sys.argv[1:2] == ["prune"]:
        from oprd_tune.pruning.prune_command import main as prune

        sys.exit(prune(sys.argv[2:]))
    from oprd_tune.command_line import look_at

    words = sys.argv[1:]
    look_at(words)
    sys.argv[1:] = words
    from oprd_tune.registry import register
    from oprd_tune.torchtune_compat import recipe_registry, run_tune

    register(recipe_registry())
    run_tune()


def _export(words: list[str]) -> str | None:
    """Export a checkpoint; returns what went wrong."""
    if len(words) < 2 or len(words) % 2 or any(word != "--trust" for word in words[2::2]):
        return __doc__
    (folder, target), trust = words[:2], words[3::2]
    from oprd_tune.run.export import export_checkpoint

    if trust and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a run finds the user's own components too
    try:
        print(f"wrote {export_checkpoint(folder, target, trust)}")
    except ConfigError as error:
        return f"error: {error}"
    return None


if __name__ == "__main__":
    main()
