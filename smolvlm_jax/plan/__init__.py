"""What a program costs on chips that need not be present: memory, work and time, by the chips' own compilers.

Importing this package imports no jax: the compilers work in a child process, whose environment has to be set before.
"""

from ..lazy import lazy_exports

__all__, __getattr__ = lazy_exports(
    __name__,
    {
        "plan.chips": ("CHIPS", "Chip"),
        "plan.settings": ("PlanConfig", "Workload"),
        "plan.figures": ("Cost", "Plan"),
        "plan.run": ("plan",),
    },
)
