"""What a learned router does, what it is worth to it, and how it meets a burst.

`recorder` writes down the decisions of a run, `steady` plays stationary loads with requests of all
slacks, `burst` a jump in the load; `plots`, `stepper` and `report` show what came of it.
"""
