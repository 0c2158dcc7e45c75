"""Clips of a test of data/writer.py. Apart from test_all.py: a process that makes them starts sooner."""
import os

import numpy as np

from common.flags import UserError


def numbered(i):
    """A clip that shows its own number; 4 cannot be made, and 6 takes the process with it, once."""
    if i == 4:
        raise UserError("clip 4: damaged")
    if i == 6 and not os.environ.get("GO_ON"):
        raise MemoryError
    return dict(id=f"clip {i}", video=np.full((4, 8, 8, 1), i), fps=25)
