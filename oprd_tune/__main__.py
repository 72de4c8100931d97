"""`python -m oprd_tune COMMAND`: what this package can do.

    run RECIPE --config CONFIG [key=value …]   train or evaluate, as `tune run` does
    ls, cp, cat, download, validate            as `tune` does; `COMMAND --help` explains each
    prune MODEL FOLDER [options]               a smaller student from a trained model; see `prune --help`
    compare RUN RUN … [options]                several runs in one table and one picture; each RUN is an output_dir
    export CHECKPOINT FOLDER [--trust NAME]    a checkpoint as a Hugging Face folder; --trust lets it call NAME, a
                                               component of yours
    doctor                                     what is installed, which engines and devices work, what is missing

It also works where Python reads no `.pth` files, by which `tune` knows our recipes.
"""

from __future__ import annotations

import os
import sys

from oprd_tune.errors import ConfigError, nearest

_EXPORT = "export takes CHECKPOINT FOLDER [--trust NAME]; --trust lets the checkpoint call NAME, a component of yours"
_TORCHTUNES = ("run", "ls", "cp", "cat", "download", "validate")


def main() -> None:
    """Dispatch on the first argument. What is not ours is torchtune's."""
    command, words = sys.argv[1] if len(sys.argv) > 1 else "--help", sys.argv[2:]
    if command in ("-h", "--help"):
        print(__doc__)
        sys.exit(0)
    if command in ("export", "doctor") and {"-h", "--help"} & set(words):
        print(_EXPORT if command == "export" else "doctor takes nothing. It says what works here, and what is missing.")
        sys.exit(0)
    if command == "export":
        sys.exit(_export(words))
    if command == "compare":
        from oprd_tune.compare.command import main as compare

        sys.exit(compare(words))
    if command == "prune":
        from oprd_tune.pruning.prune_command import main as prune

        sys.exit(prune(words))
    if command == "doctor":
        from oprd_tune.doctor import main as doctor

        sys.exit(doctor())
    if command not in _TORCHTUNES:
        hint = nearest(command, [*_TORCHTUNES, "prune", "compare", "export", "doctor"])
        print(
            f"error: there is no command {command!r}{hint}; python -m oprd_tune --help explains them", file=sys.stderr
        )
        sys.exit(2)
    from oprd_tune.command_line import file_to_register, look_at

    look_at(sys.argv[1:])
    from oprd_tune.registry import register
    from oprd_tune.torchtune_compat import recipe_registry, run_tune

    register(recipe_registry(), file_to_register(sys.argv[1:]))
    run_tune()


def _export(words: list[str]) -> str | None:
    """Export a checkpoint; returns what went wrong."""
    if len(words) < 2 or len(words) % 2 or any(word != "--trust" for word in words[2::2]):
        return f"error: {_EXPORT}"
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
