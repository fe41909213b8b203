"""The learner: the JAX policy, its weights and tokenizer, training from the log, sampling and serving.

Nothing heavy is imported before it is used (PEP 562): `import nexactor.learner` costs no JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nexactor.learner.fetch import resolve_policy as resolve_policy
    from nexactor.learner.model import Config as Config
    from nexactor.learner.tiny import make_tiny_policy as make_tiny_policy
    from nexactor.learner.tokenizer import PolicyTokenizer as PolicyTokenizer
    from nexactor.learner.weights import Policy as Policy
    from nexactor.learner.weights import load_policy as load_policy
    from nexactor.learner.weights import save_policy as save_policy

_HOMES = {
    "Config": "model",
    "Policy": "weights",
    "PolicyTokenizer": "tokenizer",
    "load_policy": "weights",
    "make_tiny_policy": "tiny",
    "resolve_policy": "fetch",
    "save_policy": "weights",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
