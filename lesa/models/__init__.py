"""Transformers and pipelines we know: the table of families, loading, calling, fingerprints, counting.

Imported by every package after predictor.
"""
