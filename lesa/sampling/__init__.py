"""The predictor in somebody's pipeline: enable, hooks, checks, statistics.

Imported by training and all that runs accelerated.
"""
