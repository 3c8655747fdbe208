"""How long a step takes and how good an answer is.

Makes the profile bundles that the simulator runs on: `calibrate.roofline` predicts one from a
datasheet, and `profiles/` holds those that are shipped. This package imports `sim` only.
"""
