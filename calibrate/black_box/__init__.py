"""A server calibrated from outside: any URL that speaks OpenAI's completions protocol.

`client` sends requests and notes when each token comes, `sweep` keeps some number of clients busy
with requests of some length, cell by cell, `steps` finds the engine's steps in the token times,
`estimate` fits rule 12 to them, `prediction` plays a cell in the simulator, and `calibration` puts
a bundle of kind `black-box` together, with its error on cells that the fit did not see. Nothing
here needs PyTorch.
"""
