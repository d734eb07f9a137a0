"""A format for every weight, so that a checkpoint of a given size predicts as the original does.

units.py        what has one format: weights that engines fuse, the experts of a layer
candidates.py   the formats there are: what a weight then takes, and how its module then computes
costs.py        the KL divergence of every unit in every format, measured
assign.py       the cheapest assignment of a size
recipes.py      the assignment as the precision of a recipe
run.py          from a checkpoint and a text to a result
"""
