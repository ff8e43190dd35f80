"""What a client sends, checked before it reaches a model: a JSON body in, samples for the extractor out."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fac_ray.corpus.samples import join_contents
from fac_ray.schema import Message

Sample = tuple[str, Sequence[Message] | None]


class TooLarge(ValueError):
    """A request that would be fine if it were smaller."""


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: str = Field(min_length=1, max_length=64)
    content: str


class ScoreRequest(BaseModel):
    """Texts or chats, not both. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"texts": ["Where is my parcel?"]}]})

    texts: list[str] | None = None
    chats: list[list[ChatMessage]] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> ScoreRequest:
        if (self.texts is None) == (self.chats is None):
            raise ValueError("give either `texts` or `chats`")
        return self

    def samples(self, max_samples: int, max_characters: int) -> list[Sample]:
        """One (text, messages) for each item, in the client's order; a chat's text is its contents, as in a corpus.

        Raises:
            ValueError: there are none, or one is empty; the item is named by its position.
            TooLarge: there are too many, or one is too long.
        """
        samples: list[Sample] = [(text, None) for text in self.texts or []]
        for chat in self.chats or []:
            messages = [Message(role=message.role, content=message.content) for message in chat]
            samples.append((join_contents(messages), messages))
        if not samples:
            raise ValueError(f"no item; a request holds 1 to {max_samples}")
        if len(samples) > max_samples:
            raise TooLarge(f"{len(samples)} items; a request holds 1 to {max_samples}")
        for position, (text, _) in enumerate(samples):
            if not text.strip():
                raise ValueError(f"item {position} is empty")
            if len(text) > max_characters:
                raise TooLarge(f"item {position} has {len(text):,} characters; at most {max_characters:,} are scored")
        return samples
