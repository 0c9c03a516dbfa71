"""What one row of a data set asks.

A prompt is a text, or a conversation: a list of dicts of role and content. It is what the first of these fields holds
that a row has:

    prompt          a text or a conversation
    messages        a conversation of {"role": ..., "content": ...}
    conversations   the same, or ShareGPT's {"from": "human" or "gpt", "value": ...}
    turns           what one user says, a text each, of which the first is taken; or a conversation
    instruction     a text, and what Alpaca's `input` or Dolly's `context` adds to it, behind an empty line
    question, text  a text

What the assistant says last in a conversation is left out, for the target is to answer by itself. `system` or
`system_prompt` beside the prompt is a message in front of it.
"""

from __future__ import annotations

import json
import re
from reprlib import repr as shown

Prompt = str | list[dict]

FIELDS = ("prompt", "messages", "conversations", "turns", "instruction", "question", "text")
UNREADABLE = ("tools", "history", "image", "images", "audio", "videos")
"""Parts of a prompt that would be lost."""
ROLES = {role: role for role in ("user", "assistant", "system", "developer", "tool")}
ROLES |= {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}


def prompt_of(row: dict) -> Prompt:
    """The prompt of one row, see above. A conversation of one user message is its text.

    Raises:
        ValueError: what was found, and what was expected.
    """
    field = next((field for field in FIELDS if row.get(field) is not None), None)
    if field is None:
        raise ValueError(f"found {', '.join(row) or 'no field'}; expected one of the fields {', '.join(FIELDS)}.")
    if lost := [name for name in UNREADABLE if row.get(name)]:
        raise ValueError(f"found {', '.join(lost)}, which cannot be read and would be lost; expected text alone.")
    value = row[field]
    if field == "turns" and isinstance(value, list) and value and isinstance(value[0], str):
        value = value[0]
    if field in ("messages", "conversations") or (field in ("prompt", "turns") and isinstance(value, list)):
        messages = conversation_of(value, field)
    else:
        more = [name for name in ("input", "context") if field == "instruction" and row.get(name)]
        texts = [text_of(value, field), *(text_of(row[name], name) for name in more)]
        messages = [{"role": "user", "content": "\n\n".join(texts)}]
    if system := next((name for name in ("system", "system_prompt") if row.get(name)), None):
        messages.insert(0, {"role": "system", "content": text_of(row[system], system)})
    if half := re.search("[\ud800-\udfff]", json.dumps(messages, ensure_ascii=False, default=str)):
        raise ValueError(f"found {half[0]!r} in {field}, half of a character (a lone surrogate); expected whole ones.")
    return messages[0]["content"] if len(messages) == 1 else messages


def conversation_of(value, field: str) -> list[dict]:
    """The messages of a conversation, up to the last that is not the assistant's."""
    if not isinstance(value, list):
        raise ValueError(f"found {shown(value)} ({type(value).__name__}) as {field}; expected a list of messages.")
    messages = [message_of(message, f"{field}[{place}]") for place, message in enumerate(value)]
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise ValueError(f"found no user message in {field} (its roles: {', '.join(roles) or 'none'}); expected one.")
    while messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


def message_of(message, where: str) -> dict:
    """A message as chat templates take it, whichever of the two forms it has. What else it holds stays: a template may
    read it."""
    if not isinstance(message, dict):
        raise ValueError(f"found {shown(message)} as {where}; expected a message, a dict of role and content.")
    given = {name: value for name, value in message.items() if value is not None}  # `datasets` fills up with None
    role = given.pop("role", given.pop("from", None))
    content = given.pop("content", given.pop("value", None))
    if (known := ROLES.get(str(role))) is None:
        raise ValueError(f"found the role {shown(role)} in {where}; expected one of {', '.join(ROLES)}.")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(text_of(part.get("text"), where, may_be_empty=True) for part in content)
    return {**given, "role": known, "content": text_of(content, where, may_be_empty=known != "user")}


def text_of(value, where: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"found {shown(value)} ({type(value).__name__}) as {where}; expected a text.")
    if not may_be_empty and not value.strip():
        raise ValueError(f"found an empty text as {where}; expected one that can be answered.")
    return value


def task_of(row: dict) -> str:
    """What kind of prompt it is, where the row says so."""
    return str(row.get("task") or row.get("category") or "all")
