"""Chat templates of others, in a process of their own: `render`.

A chat template is a program in Jinja's language. Jinja's sandbox keeps it from Python, but does not end its loops or bound its
texts. So it runs in another process of this interpreter, which has little memory and time. It sees what it would in transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

MEMORY, SECONDS = 2**30, 3  # of the process: address space, time of a processor
PATIENCE = 60  # seconds until it is killed, whatever it waits for


class TemplateRefused(ValueError):
    """A template that cannot be rendered; the message says why."""


def render(template: str, messages: Sequence[dict[str, str]], variables: dict[str, Any], longest: int) -> str:
    """The text of a chat.

    >>> render("{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}", [{"role": "user", "content": "a cat"}], {}, 99)
    '<user> a cat '

    variables: what the template may use besides, plain data. longest: characters of the text.

    Raises TemplateRefused: a template that is broken, refuses the messages, or takes too much time, memory or text.
    """
    asked = json.dumps({"template": template, "messages": list(messages), "variables": variables, "longest": longest})
    path = os.pathsep.join(filter(None, sys.path))
    try:
        done = subprocess.run(
            [sys.executable, __file__],
            input=asked.encode(),
            capture_output=True,
            timeout=PATIENCE,
            env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        answer = json.loads(done.stdout) if done.returncode == 0 else {}
    except (subprocess.TimeoutExpired, ValueError):
        answer = {}
    if "text" in answer:
        return str(answer["text"])
    took_too_much = f"one that takes more than {SECONDS} s or {MEMORY >> 20} MiB"
    raise TemplateRefused(str(answer.get("error", took_too_much)))


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _rendered(asked: dict[str, Any]) -> str:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Marks what the assistant says, which matters in training only."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja has it)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        text = environment.from_string(asked["template"]).render(messages=asked["messages"], **asked["variables"])
    except jinja2.TemplateError as error:
        raise TemplateRefused(str(error)) from None
    if len(text) > asked["longest"]:
        raise TemplateRefused(f"a text of {len(text)} characters, of which it may have {asked['longest']}")
    return text


def _main() -> None:
    import resource

    asked = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    try:
        answer = {"text": _rendered(asked)}
    except MemoryError:
        answer = {"error": f"one that takes more than {MEMORY >> 20} MiB"}
    except Exception as error:
        answer = {"error": f"{str(error) or type(error).__name__:.500}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
