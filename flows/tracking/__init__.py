"""MLflow runs that can neither stop nor slow a training: spool, sender, client, revisions.

Imported by the stages and the registry.
"""
