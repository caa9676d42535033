"""The mathematics a sampler runs, on torch alone.

Imported by everything that predicts, trains or publishes.
"""
