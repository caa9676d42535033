"""Experts: from true histories first, then in the closed loop.

Imported by search, publishing, flows and benchmarks.
"""
