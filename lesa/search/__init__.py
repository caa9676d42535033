"""Where the full steps stand.

Imported by flows and benchmarks.
"""
