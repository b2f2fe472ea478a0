"""What a model's tokens add to a text, each found out once."""

import re

from tokenizers import Tokenizer, decoders

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary:
    """A tokenizer with what is known of its tokens. One for all requests; owned by one thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._byte_of_letter = _byte_of_letter() if isinstance(tokenizer.decoder, decoders.ByteLevel) else None
        self._bytes: dict[int, bytes | None] = {}

    @property
    def is_byte_level(self) -> bool:
        """Whether every token stands for its bytes, so that a text is their bytes in a row."""
        return self._byte_of_letter is not None

    def bytes_of(self, token_id: int) -> bytes | None:
        """What the token always adds; None where that depends on its neighbours.

        Special tokens add nothing to a text, and neither do ids outside the vocabulary.
        """
        try:
            return self._bytes[token_id]
        except KeyError:
            found = self._bytes[token_id] = self._find(token_id)
            return found

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _find(self, token_id: int) -> bytes | None:
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._special:
            return b""
        if self._byte_of_letter is not None:
            # As the decoder has it: a token with a letter of no byte is itself.
            if all(letter in self._byte_of_letter for letter in token):
                return bytes(self._byte_of_letter[letter] for letter in token)
            return token.encode()
        match = _BYTE_TOKEN.fullmatch(token)
        # A token merely spelled like a byte decodes to itself.
        return bytes.fromhex(match[1]) if match is not None and self.decode([token_id]) != token else None


def _byte_of_letter() -> dict[str, int]:
    """The alphabet of byte-level vocabularies, which is GPT-2's: printable bytes as they are, the others moved up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(moved)}
