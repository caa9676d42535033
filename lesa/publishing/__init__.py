"""Build the bundle, calibrate its error bounds, decide on the champion.

Imported by flows.
"""
