"""Chat templates: Jinja code that came with a stranger's model file, rendered in Jinja's sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from lowbit.errors import BadFile, BadOption


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = True,
    where: object = None,
    **variables: Any,
) -> str:
    """The prompt text of a conversation, as Hugging Face's apply_chat_template renders it.

    template:  Jinja source from the model file
    messages:  mappings with "role" and "content"
    variables: anything else the template reads ("tools", ...)
    Raises BadFile for a template that does not parse or reaches out of the sandbox, BadOption where the template
    refuses the conversation (its raise_exception, as for two user messages in a row).
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Refused(Exception):
        pass

    def refuse(message: str) -> None:
        raise Refused(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=[dict(m) for m in messages],
            bos_token=bos_token,
            eos_token=eos_token,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
    except Refused as error:
        raise BadOption("the chat template refuses this conversation", where=where, found=str(error)) from None
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise BadFile("the chat template cannot be rendered", where=where, found=str(error)) from None


def tojson(value: Any, indent: int | None = None, **_: Any) -> str:
    """JSON as it is, for templates of prompts."""
    # Jinja's own tojson escapes for HTML (& < >), which would put \u0026 into prompts.
    return json.dumps(value, ensure_ascii=False, indent=indent)
