"""The program of a process that renders chat templates, as transformers does: in jinja's sandbox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serving import serve

_MOST_CHARACTERS = 64 * 10**6  # of the texts of one job together
_MOST_SAID = 500  # characters of a template's own message


def renderer() -> Callable[[Any], Any]:
    """The job: `{template, chats, add_generation_prompt, variables}` → `{texts}`, `{error}` or `{limit}`, a reason."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def rendered(job: Any) -> Any:
        """The answer to one job."""
        try:
            texts, size = [], 0
            for chat in job["chats"]:
                (text,), _ = render_jinja_template(
                    conversations=[chat],
                    chat_template=job["template"],
                    add_generation_prompt=job["add_generation_prompt"],
                    **job["variables"],
                )
                texts.append(text)
                size += len(text)
                if size > _MOST_CHARACTERS:
                    return {"limit": f"wrote more than {_MOST_CHARACTERS // 10**6} million characters"}
        except MemoryError:
            return {"limit": "asked for too much memory"}
        except Exception as error:  # a template is a program of the folder's author
            return {"error": str(error)[:_MOST_SAID] or type(error).__name__}
        return {"texts": texts}

    return rendered


if __name__ == "__main__":
    serve(renderer)
