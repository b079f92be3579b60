"""Evaluation harnesses: lmms-eval and VLMEvalKit put their questions to the engine, and get what a batch job would answer.

answerer.py prepares and answers questions, prompts.py words them as the published scores were taken. lmms.py and
vlmevalkit.py are what the harnesses load; they import the harness, the rest of this package does not.
"""

from ..lazy import lazy_exports

__all__, __getattr__ = lazy_exports(
    __name__,
    {
        "evals.answerer": ("Answerer", "Desk", "Question"),
        "evals.prompts": ("published_prompt",),
    },
)
