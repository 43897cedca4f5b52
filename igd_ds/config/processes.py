"""Settings of commands that run on several ranks."""

import math
from dataclasses import dataclass

from igd_ds.config.options import option, require


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """How the ranks meet, and how long they wait for each other."""

    timeout: float = option(
        "minutes after which a rank that does not answer ends the job; ranks that load may be "
        "busy for longer",
        10.0,
    )
    master_port: int = option(
        "port at which rank 0 listens under srun and mpirun; torchrun and deepspeed have an option "
        "of this name; 0: a free one, or one that follows from the SLURM job",
        0,
    )
    quiet: bool = option("print only warnings, errors and results", False)

    def check(self) -> None:
        """Raise UsageError for values that no job can use."""
        require(self, "timeout", lambda value: 0 < value < math.inf, "must be positive and finite")
        require(self, "master_port", lambda value: 0 <= value < 2**16, "must lie in [0, 65535]")
