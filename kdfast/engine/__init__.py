"""The engine fits stages, all with the same loop. It saves between and within them, and resumes anywhere."""

from kdfast.engine.console import Console
from kdfast.engine.distributed import World, join
from kdfast.engine.interrupt import Interrupted, catching
from kdfast.engine.loop import Options
from kdfast.engine.metrics import Evaluation, NonFiniteLoss, evaluate
from kdfast.engine.run import Run, StageResult, locked
from kdfast.engine.stage import Mean, Stage, Training

__all__ = [
    "Console",
    "Evaluation",
    "Interrupted",
    "Mean",
    "NonFiniteLoss",
    "Options",
    "Run",
    "Stage",
    "StageResult",
    "Training",
    "World",
    "catching",
    "evaluate",
    "join",
    "locked",
]
