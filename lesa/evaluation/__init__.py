"""Measure, aggregate, report.

Imported by publishing, the command line, flows and benchmarks.
"""
