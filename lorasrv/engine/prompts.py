"""Prompts that are text, plain or of a chat, as the tokens that the model reads."""

from tokenizers import Tokenizer

from lorasrv.engine.chat import ChatTemplate
from lorasrv.errors import InvalidRequest
from lorasrv.requests import Chat, Prompt


def read_prompt(
    prompt: str | Chat, tokenizer: Tokenizer, template: ChatTemplate | None, system_prompt: str | None = None
) -> Prompt:
    """A text is tokenized as the tokenizer is configured; a chat as its template says, special tokens included.

    `system_prompt` is for chats that begin with no system message. Raises InvalidRequest, and what the template raises.
    """
    if isinstance(prompt, str):
        return Prompt(text=prompt, token_ids=tuple(tokenizer.encode(prompt).ids))
    if template is None:
        raise InvalidRequest("messages", "the base model has no chat template; send text or tokens")
    text = template.render(prompt.with_system(system_prompt))
    return Prompt(text=text, token_ids=tuple(tokenizer.encode(text, add_special_tokens=False).ids))
