"""`python -m oprd_tune`: torchtune's command line with our recipes in it, and three more commands.

    python -m oprd_tune run oprd_distributed --config tiny/oprd
    python -m oprd_tune export CHECKPOINT_FOLDER HF_FOLDER
    python -m oprd_tune compare RUN RUN … [--out FOLDER] [--against seconds]
    python -m oprd_tune prune FOLDER_OR_HUB_NAME OUT [--drop-blocks I,J,… | --blocks N] [--width D] …

`export` writes a checkpoint as a Hugging Face folder. `compare` puts several runs into one picture and one table; each
RUN is the `output_dir` of a run. `prune` makes a smaller student; `prune --help` lists its options. Everything else
works like `tune`, and also works where Python reads no `.pth` files.
"""

from __future__ import annotations

import sys

from oprd_tune.errors import ConfigError


def main() -> None:
    """Dispatch on the first argument: `export`, `compare` and `prune` are ours, everything else torchtune's."""
    if sys.argv[1:2] == ["export"]:
        if len(sys.argv) != 4:
            sys.exit(__doc__)
        from oprd_tune.run.export import export_checkpoint

        try:
            print(f"wrote {export_checkpoint(sys.argv[2], sys.argv[3])}")
        except ConfigError as error:
            sys.exit(f"error: {error}")
        return
    if sys.argv[1:2] == ["compare"]:
        from oprd_tune.compare.command import main as compare

        sys.exit(compare(sys.argv[2:]))
    if sys.argv[1:2] == ["prune"]:
        from oprd_tune.pruning.prune_command import main as prune

        sys.exit(prune(sys.argv[2:]))
    from oprd_tune.registry import register
    from oprd_tune.torchtune_compat import recipe_registry, run_tune

    register(recipe_registry())
    run_tune()


if __name__ == "__main__":
    main()
