"""The settings of `calibrate.quality`, apart from the groups: one of those is called tasks too."""
