"""Model folders: where they are, which files hold their weights, and what is said about one that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from oprd_tune.errors import ConfigError, nearest

DOWNLOADS = Path("/tmp")  # where `tune download` puts a model that gets no folder of its own
_PACKAGE = Path(__file__).parents[1]
_SHOWN = 4  # names listed in a message
_INDEX = "model.safetensors.index.json"
_TO_SAFETENSORS = (
    "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{0}', dtype='auto')"
    ".save_pretrained('{0}')\""
)


def find_folder(key: str, name: str) -> Path:
    """The folder of a model that is named by a folder, or by a hub name that has been fetched.

    A hub name is looked up where `tune download` puts it, then in the hub's own cache. Nothing is fetched here. Names
    such as `tiny/student` stand for the embedded models.

    Args:
        key: the config key, for messages.

    Raises:
        ConfigError: if there is no such folder, with the command that fetches it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if is_embedded(name):
        return _PACKAGE / name
    if name.startswith("tiny/"):
        embedded = [f"tiny/{file.parent.name}" for file in (_PACKAGE / "tiny").glob("*/config.json")]
        raise ConfigError(f"{key}: there is no embedded model {name}{nearest(name, embedded)}")
    if not _is_hub_name(name):
        raise ConfigError(f"{key}: there is no folder {name}; give a model folder, or a hub name such as Qwen/Qwen3-4B")
    download = DOWNLOADS / path.name
    if (download / "config.json").is_file():
        return download
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return Path(cached).parent
    raise ConfigError(
        f"{key}: {name} is neither a folder here, nor in {download}, nor in the hub's cache. "
        f"`tune download {name}` fetches it"
    )


def hub_name(name: str) -> str | None:
    """A model's name on the hub; None if `name` is a folder or no hub name."""
    is_folder = Path(name).expanduser().is_dir() or is_embedded(name)
    return name if _is_hub_name(name) and not is_folder else None


def is_embedded(name: str) -> bool:
    """Whether a name such as `tiny/student` stands for a model that this package contains."""
    return name.startswith("tiny/") and (_PACKAGE / name / "config.json").is_file()


def model_folder(checkpoint_dir: str, name: str | None = None) -> tuple[Path, list[str]]:
    """A Hugging Face model folder, and the names of its weight files.

    Args:
        name: the model's name on the hub, for the message that something is missing.

    Raises:
        ConfigError: if its `config.json` or a weight file is missing.
    """
    folder = Path(checkpoint_dir).expanduser()
    fetch = f"`tune download {name or '<hub name>'} --output-dir {folder}` fetches it"
    fetch += "" if name else ", unless an earlier run is to leave it there"
    read_config(folder, fetch)
    return folder, weight_files(folder, fetch)


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith(("/", "~", ".")) and not name.endswith("/")


def read_config(folder: Path, fetch: str = "") -> dict[str, Any]:
    """The content of a model folder's `config.json`.

    Raises:
        ConfigError: if it is missing or damaged. `fetch` tells how to get it.
    """
    path = folder / "config.json"
    adapter = folder / "adapter_config.json"
    if not path.is_file() and adapter.is_file():
        base = json.loads(adapter.read_text()).get("base_model_name_or_path") or "a model that it does not name"
        raise ConfigError(
            f"{folder} holds a PEFT adapter of {base}, not a model. Merge it into its base first: "
            "AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload().save_pretrained(…). The folder above "
            "`adapter` in an export of ours holds the merged model"
        )
    if not path.is_file():
        raise ConfigError(f"{folder} is no Hugging Face model folder: it has no config.json{fetch and f'; {fetch}'}")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged: it holds no JSON object; fetch it again")
    return content


def weight_files(folder: Path, fetch: str) -> list[str]:
    """The names of a model folder's safetensors files.

    A stale index does no harm: if it names files that are not there, the others count, as long as they hold every
    tensor that it lists.

    Args:
        fetch: tells how to get missing files, for messages.

    Raises:
        ConfigError: if files are missing, or if the weights are pickles.
    """
    index, whole = folder / _INDEX, "model.safetensors"
    wanted: dict[str, str] = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
    listed = sorted(set(wanted.values())) or [whole]
    missing = [file for file in listed if not (folder / file).is_file()]
    if not missing:
        return listed
    found = [whole] if (folder / whole).is_file() else sorted(path.name for path in folder.glob("model*.safetensors"))
    if found and wanted.keys() <= {name for file in found for name in stored_shapes(folder / file)}:
        return found
    if any(folder.glob("pytorch_model*.bin")):
        raise ConfigError(
            f"{folder} has its weights as pickles (pytorch_model*.bin), which may run code when they are read. Convert "
            f"them once: {_TO_SAFETENSORS.format(folder)}"
        )
    raise ConfigError(f"{folder} lacks {', '.join(missing[:_SHOWN])}; {fetch}")


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a safetensors file, from its header. Raises ConfigError if the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is damaged or incomplete ({error}); fetch it again") from error
