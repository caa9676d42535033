"""Orchestration: one Prefect flow a stage, also runnable as `python -m flows.<stage>`. No arithmetic here.

Importing the package quiets prefect, ray and mlflow, which read their settings when they are imported.
"""

from flows.environment import quiet_environment

quiet_environment()
