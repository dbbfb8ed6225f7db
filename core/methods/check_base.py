"""Whether a method can learn on a base."""

from __future__ import annotations

from ..errors import ConceptError
from .base import METHODS, Method, Task


def check_base(method: Method, task: Task) -> None:
    """Checks a method on a base whose text encoder takes no learned words. Cheap; called before any work.

    Raises:
        ConceptError: The method or its settings need learned words, or there is no class noun instead.
    """
    if task.backbone.layout.takes_words:
        return
    if method.needs_words:
        able = sorted(name for name, entry in METHODS.items() if not entry.method.needs_words)
        raise ConceptError(f"method '{method.name}' learns words, and the model's text encoder takes none; "
                           f"methods that work with this model: {', '.join(able)}")
    if getattr(method.config, "learn_words", False):
        raise ConceptError("setting 'learn_words' is True, and the model's text encoder takes no learned "
                           "words; allowed: False")
    if not task.class_noun.strip():
        raise ConceptError(f"class noun of concept '{task.name}' is empty, and this model encodes prompts "
                           "with it; give one, such as dog or painting")
