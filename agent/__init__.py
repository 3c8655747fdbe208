"""Who decides, and how well.

Policies route requests: baselines in `agent.baselines`. `agent.evaluate` compares policies on
identical workloads and writes a report. This package imports `sim` and nothing else of the project.
"""
