"""What a chat template would make of messages: checks before anything is tokenized with it."""

from collections.abc import Mapping

from accelerate.logging import get_logger


logger = get_logger(__name__)

_ROLES = ("system", "developer", "user", "assistant", "tool")
# What a tool is asked in the conversation that a template is tried on; nowhere else in it.
_ASKED = "trl-ext-asks"


def shorten(value) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def check_template(messages: list[Mapping], tokenizer) -> None:
    """
    Raises `ValueError` if the chat template of the tokenizer would not write what the messages hold: roles by another
    name, content in parts, which it would write as Python does, or tool calls, which it would leave out.

    Args:
        messages (`list[Mapping]`):
            Messages of the dataset.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
    """
    if tokenizer.chat_template is None:
        return
    _check_roles(messages, str(tokenizer.chat_template))
    parts = next((m["content"] for m in messages if isinstance(m.get("content"), list) and m["content"]), None)
    if parts is not None:
        written = tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": "a"}]}], tokenize=False
        )
        if "'type'" in written or '"type"' in written:
            raise ValueError(
                f"Messages have their content in parts, {shorten(parts)}, which the chat template of this tokenizer "
                'writes out as Python, brackets included. Make it a text, `"".join(part["text"] for part in '
                'message["content"])`, or use a template that knows parts.'
            )
    if any(message.get("tool_calls") for message in messages):
        written = _written_call(tokenizer)
        if written is not None and _ASKED not in written:
            raise ValueError(
                "Messages have `tool_calls`, which the chat template of this tokenizer leaves out. Use a template "
                "that writes them, or write them into the content."
            )


def _check_roles(messages: list[Mapping], template: str) -> None:
    for role in dict.fromkeys(message["role"] for message in messages if message.get("role")):
        usual = role.strip().lower()
        usual = {"human": "user", "gpt": "assistant"}.get(usual, usual)
        if usual in _ROLES and usual != role and f"'{role}'" not in template and f'"{role}"' not in template:
            raise ValueError(
                f"Messages have the role {role!r}, which the chat template of this tokenizer does not know: it would "
                f"write a turn that no generation begins, or none. Rename it to {usual!r}."
            )


def warn_of_reasoning(messages: list[Mapping], tokenizer) -> None:
    """Warns if responses hold reasoning beside their content and the chat template leaves it out."""
    for key in ("reasoning_content", "thinking", "reasoning"):
        if tokenizer.chat_template is None or not any(message.get(key) for message in messages):
            continue
        answer = {"role": "assistant", "content": "b", key: _ASKED}
        written = tokenizer.apply_chat_template([{"role": "user", "content": "a"}, answer], tokenize=False)
        if _ASKED not in written:
            logger.warning(
                f"Responses have {key!r} beside their content, which the chat template of this tokenizer leaves out: "
                "they are trained without it. Use a template that writes it, or write it into the content."
            )


def _written_call(tokenizer) -> str | None:
    """A conversation with a tool call as the chat template writes it; `None` if it refuses this one."""
    call = {"name": "look_up", "arguments": {"what": _ASKED}}
    messages = [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "a1b2c3d4e", "type": "function", "function": call}],
        },
    ]
    properties = {"what": {"type": "string", "description": "What."}}
    schema = {"type": "object", "properties": properties, "required": ["what"]}
    function = {"name": "look_up", "description": "Looks it up.", "parameters": schema}
    try:
        return tokenizer.apply_chat_template(
            messages, tools=[{"type": "function", "function": function}], tokenize=False
        )
    except Exception:  # a template may ask for more than this, and raises whatever it likes
        return None
