"""An order in a mail: what ``lowbit batch run mails.jsonl --schema order.py:Order`` has each answer checked by.

The schema bounds what the model can write: score.py says how much of it is true.
"""

from __future__ import annotations

from pydantic import BaseModel, Field


class Order(BaseModel):
    """One article that somebody wants. The order of the fields is the order in which the model writes them."""

    customer: str = Field(min_length=1, max_length=60, description="who the goods are for")
    article: str = Field(pattern=r"^[0-9]{4}$", description="the article's number, four digits")
    quantity: int = Field(ge=1, le=999, description="how many")
