"""How good each model's answers are, task by task, measured by lm-evaluation-harness.

`python -m calibrate.quality` runs tasks (lm-eval's own, or a folder's YAML and JSONL) on models
(folders, or names on the hub), keeps every finished pair of a model and a task, and ends in a
quality table as profile bundles have it, with confidence intervals.
"""
