"""How long a step takes and how good an answer is.

Makes the profile bundles that the simulator runs on: `calibrate.roofline` predicts one from a
datasheet, and `profiles/` holds those that are shipped. `calibrate.validate_run` predicts recorded
runs of vLLM (`recorded/`) and says how far off it is. This package imports `sim` only.
"""
