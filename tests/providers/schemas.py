"""A schema with a pattern, and the same without it."""

from __future__ import annotations


PATTERNED = {
    "type": "object",
    "properties": {
        "prompts": {"type": "array", "maxItems": 2, "items": {"type": "string", "pattern": "^a"}}
    },
}
PLAIN = {
    "type": "object",
    "properties": {"prompts": {"type": "array", "maxItems": 2, "items": {"type": "string"}}},
}
