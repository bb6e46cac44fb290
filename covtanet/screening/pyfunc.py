"""MLflow's pyfunc flavour of a registered model, for those who trust their registry; our own jobs never load it.

MLflow stores this file with the model and runs it on ``mlflow.pyfunc.load_model``. It is no module to import.
"""

import os
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from covtanet.inference.predictor import Predictor, refuse_without_segmentation
from covtanet.ledger.schema import LEDGER_SCHEMA
from covtanet.model.checkpoint import load_model
from covtanet.screening.config import ScreeningConfig, for_model
from covtanet.screening.study import Screener


class LedgerModel(PythonModel):  # type: ignore[misc]
    """Paths or URIs of studies to the ledger's columns, one row per series."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the model once, its digest checked against its own description."""
        model = load_model(Path(context.artifacts["model"]))
        refuse_without_segmentation(model)
        predictor = Predictor(model, num_threads=len(os.sched_getaffinity(0)))
        config = for_model(ScreeningConfig(), model.preprocessing)
        self.screener = Screener(predictor, predictor.window, config, model.digest)

    def predict(self, model_input: list[str]) -> pd.DataFrame:
        """Screen NIfTI files and DICOM folders. Columns that belong to a run of the job are null."""
        try:
            found = [row for place in model_input for row in self.screener(place)]
        finally:
            self.screener.close()
        # As objects, so that what is null stays null.
        return pd.DataFrame(
            {
                name: pd.Series([row[name] for row in found], dtype=object)
                for name in LEDGER_SCHEMA.names
            }
        )


mlflow.models.set_model(LedgerModel())
