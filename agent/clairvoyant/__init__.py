"""What nobody can exceed: the most that a policy could earn which knew the future.

`bound` says it of a workload; `charges` has what work costs at the least, `options` the ways to
serve a request, `intervals` what cannot be put off, and `program` puts them together.
"""

from agent.clairvoyant.bound import bound as bound

__all__ = ["bound"]
