"""Chat templates are programs of whoever made the model folder: they run in a process of their own, within limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oprd_tune.errors import ConfigError
from oprd_tune.workers import ProcessPool, process_pool

_PROGRAM = Path(process_pool.__file__).with_name("template_worker.py")
_CHATS_A_JOB = 250
_POOL = ProcessPool(_PROGRAM, seconds=20.0, workers=1, megabytes=2048, idle_seconds=30.0)


def render(
    template: str, chats: Sequence[Sequence[Mapping[str, Any]]], *, add_generation_prompt: bool, **variables: Any
) -> list[str]:
    """The text of each chat, as transformers renders it. A few hundred chats may take 20 seconds and 2 GiB.

    Args:
        template: a chat template in jinja.
        chats: messages, with values that JSON has, or whose text is meant.
        add_generation_prompt: whether the assistant's header follows.
        variables: values for the template's own variables and for its special tokens.

    Raises:
        ConfigError: if the template rejects a chat, exceeds a limit, or cannot be rendered here.
    """
    texts: list[str] = []
    for start in range(0, len(chats), _CHATS_A_JOB):
        part = [list(chat) for chat in chats[start : start + _CHATS_A_JOB]]
        job = {"template": template, "chats": part, "add_generation_prompt": add_generation_prompt}
        late = _POOL.late
        try:
            (done,) = _POOL.run([{**job, "variables": variables}])
        except ChildProcessError as error:
            raise ConfigError(f"chat templates cannot be rendered: {error}") from error
        if done is None:
            done = {"limit": f"ran for more than {_POOL.seconds:.0f} s" if _POOL.late > late else "ended its process"}
        if "limit" in done:
            raise ConfigError(
                f"the chat template {done['limit']} on {len(part)} conversations, and was stopped; look at it in the "
                "model folder, or give dataset.prompt_template instead"
            )
        if "error" in done:
            raise ConfigError(f"the chat template rejects this conversation: {done['error']}")
        texts += done["texts"]
    return texts
