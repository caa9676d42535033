"""What a workload takes against what this machine has.

Imported by the command line.
"""
