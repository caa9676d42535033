"""The predictor in a pipeline: enabling, the run, its hooks, checks and statistics.

Imported by training and all that runs accelerated.
"""
