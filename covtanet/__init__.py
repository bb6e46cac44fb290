"""Screens archives of chest CT for COVID-19 on Ray, and trains the network it screens with."""

import os

# Neither MLflow nor Ray reports to anybody, unless the site says otherwise: both read this before they do.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
