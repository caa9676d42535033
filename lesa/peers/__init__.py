"""What we are compared with: rules, solvers, caches, at their best settings.

Imported by evaluation, publishing and benchmarks.
"""
