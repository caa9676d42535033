"""Small base models trained here from nothing, on images that ship with scikit-learn.

Imported by flows.base, and by evaluation for its scorer.
"""
