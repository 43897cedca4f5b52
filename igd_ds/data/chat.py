"""A tokenizer's own chat template as the texts of a prompt: the history is the user's turn."""

from datetime import datetime
from typing import TYPE_CHECKING

from igd_ds.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = "chat"
"""Name of the prompt that the tokenizer's chat template makes."""

USER_TURN = {
    "prefix": "Recent {domain}:\n",
    "item": "{item}",
    "separator": "\n",
    "suffix": "\nNext:",
}
"""What the user says."""

_TODAY = datetime(2024, 7, 26)
# Replaces the function of that name which chat templates may call: theirs knows the real date.
_DATE_MACRO = (
    "{%- macro strftime_now(format) -%}{{- format|replace('%-', '%')"
    + "".join(f"|replace('%{letter}', '{_TODAY:%{letter}}')" for letter in "ABHIMSYabdjmpy")
    + " -}}{%- endmacro -%}"
)
# Stands for the user's turn while the chat template is filled in.
_TURN = "igd-ds-user-turn"


def chat_texts(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """Return the four texts of a prompt (see Template) around which a chat puts its own.

    Chat templates that print today's date get one fixed date, so that the prompt is the same in
    every run. Templates that can think aloud are asked not to: the item follows at once.

    Raises:
        UsageError: the tokenizer has no chat template, or none that shows what a user says.
    """
    if not tokenizer.chat_template:
        raise UsageError(
            "--prompt chat: the tokenizer has no chat template; take --prompt short, or the "
            "tokenizer of a chat model"
        )
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": _TURN}],
        chat_template=_DATE_MACRO + tokenizer.get_chat_template(),
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
        date_string=f"{_TODAY:%d %b %Y}",
    )
    before, turn, behind = text.partition(_TURN)
    if not turn or _TURN in behind:
        raise UsageError(
            "--prompt chat: the tokenizer's chat template does not show the user's turn once; "
            "write a template file instead and give its path"
        )
    return USER_TURN | {
        "prefix": before + USER_TURN["prefix"],
        "suffix": USER_TURN["suffix"] + behind,
    }
