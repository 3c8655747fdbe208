"""Recorded runs of vLLM, predicted: a folder's operator times in, latencies out, compared.

A folder holds what LLMServingSim 2.0 records (github.com/casys-kaist/LLMServingSim): `meta.json`
(the engine's arguments), `config.json` (the model's), `requests.jsonl` (when each request came and
was answered) and `ops/` (times of the model's operators, measured apart from the run). The
step-time model is built from the operators, never from the run's own latencies.
"""
