"""The model registry: versions and aliases, tags, what the gate measures.

Imported by publish, retrain and repro.
"""
