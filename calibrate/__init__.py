"""How long a step takes and how good an answer is.

Makes the profile bundles that the simulator runs on: `calibrate.run` measures one, on a device or,
by a URL, of a server from outside (`black_box/`); `calibrate.roofline` predicts one from a
datasheet and the models' `config.json`; `profiles/` holds those that are shipped.
`calibrate.validate_roofline` says how far the roofline is off where steps were measured,
`calibrate.validate_run` predicts recorded runs of vLLM (`recorded/`) and says how far off that is.
`calibrate.quality` measures how good each model's answers are. This package imports `sim` only.
"""
