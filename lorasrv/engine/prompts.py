"""Prompts that are text, plain or of a chat, as the tokens that the model reads."""

from tokenizers import Encoding, Tokenizer

from lorasrv.engine.chat import ChatTemplate
from lorasrv.errors import InvalidRequest
from lorasrv.requests import Chat, Prompt


def read_prompt(
    prompt: str | Chat, tokenizer: Tokenizer, template: ChatTemplate | None, system_prompt: str | None = None
) -> Prompt:
    """The prompt as text and as tokens; raises what `encode_prompt` does."""
    text, encoding = encode_prompt(prompt, tokenizer, template, system_prompt)
    return Prompt(text=text, token_ids=tuple(encoding.ids))


def encode_prompt(
    prompt: str | Chat, tokenizer: Tokenizer, template: ChatTemplate | None, system_prompt: str | None = None
) -> tuple[str, Encoding]:
    """A text is tokenized as the tokenizer is configured; a chat as its template says, special tokens included.

    `system_prompt` is for chats that begin with no system message. Raises InvalidRequest, and what the template raises.
    """
    if isinstance(prompt, str):
        return prompt, tokenizer.encode(prompt)
    if template is None:
        raise InvalidRequest("messages", "the base model has no chat template; send text or tokens")
    text = template.render(prompt.with_system(system_prompt))
    return text, tokenizer.encode(text, add_special_tokens=False)
