"""The learner: the JAX policy, its weights and tokenizer, training from the log, sampling and serving.

Nothing heavy is imported before it is used (PEP 562): `import nexactor.learner` costs no JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nexactor.events.lazy import lazy_exports

if TYPE_CHECKING:
    from nexactor.learner.config import LearnerConfig as LearnerConfig
    from nexactor.learner.config import load_learner_config as load_learner_config
    from nexactor.learner.fetch import resolve_policy as resolve_policy
    from nexactor.learner.loop import run_learner as run_learner
    from nexactor.learner.model import Config as Config
    from nexactor.learner.server import PolicyServer as PolicyServer
    from nexactor.learner.tiny import make_tiny_policy as make_tiny_policy
    from nexactor.learner.tokenizer import PolicyTokenizer as PolicyTokenizer
    from nexactor.learner.weights import Policy as Policy
    from nexactor.learner.weights import load_policy as load_policy
    from nexactor.learner.weights import save_policy as save_policy

_EXPORTS = {
    "Config": "nexactor.learner.model",
    "LearnerConfig": "nexactor.learner.config",
    "Policy": "nexactor.learner.weights",
    "PolicyServer": "nexactor.learner.server",
    "PolicyTokenizer": "nexactor.learner.tokenizer",
    "load_learner_config": "nexactor.learner.config",
    "load_policy": "nexactor.learner.weights",
    "make_tiny_policy": "nexactor.learner.tiny",
    "resolve_policy": "nexactor.learner.fetch",
    "run_learner": "nexactor.learner.loop",
    "save_policy": "nexactor.learner.weights",
}
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
