"""What a codec costs a model: its predictions with the cache as a store would give it back.

Needs torch and transformers, the extra ``eval``; nothing here imports them before they are used.
See docs/quality.md.
"""

from __future__ import annotations

__all__: list[str] = []
