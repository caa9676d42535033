"""Prompts -> trajectories: plan, tap, record, store, read back.

Imported by training, search and all that follows.
"""
