"""Recorded workloads: readers of the public trace formats, one file per family.

`TraceSource` says which file and which part of it, `read` gives its requests as `Recorded` arrays,
and a `TraceError` names the file, the line, the column and what is allowed there.
"""

from sim.traces.source import MAX_REQUESTS, Recorded, TraceSource, has_lengths, read
from sim.traces.table import BadRows, TraceError

__all__ = [
    "MAX_REQUESTS",
    "BadRows",
    "Recorded",
    "TraceError",
    "TraceSource",
    "has_lengths",
    "read",
]
