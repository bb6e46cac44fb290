"""MLflow's pyfunc flavour of a registered model, for sites that trust their registry.

MLflow stores this file with the model and runs it on ``mlflow.pyfunc.load_model``. It is not a
module to import, and no command of this package loads it.
"""

from pathlib import Path

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from covtanet.inference.predictor import Predictor, refuse_without_segmentation
from covtanet.ledger.schema import LEDGER_SCHEMA
from covtanet.machine import num_cores
from covtanet.model.saved_model import load_model
from covtanet.screening.config import ScreeningConfig, for_model
from covtanet.screening.study import Screener


class LedgerModel(PythonModel):  # type: ignore[misc]
    """Turns paths or URIs of studies into the ledger's columns, one row per series."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the model once; its digest is checked against its own description."""
        model = load_model(Path(context.artifacts["model"]))
        refuse_without_segmentation(model)
        predictor = Predictor(model, num_threads=num_cores())
        config = for_model(ScreeningConfig(), model.preprocessing, model.readout)
        self.screener = Screener(predictor, predictor.window, config, model.digest)

    def predict(self, model_input: list[str]) -> pd.DataFrame:
        """Screen NIfTI files and DICOM folders; columns of a run of the job are null."""
        try:
            rows = [row for uri in model_input for row in self.screener(uri)]
        finally:
            self.screener.close()
        columns = {}
        for name in LEDGER_SCHEMA.names:
            # As objects, so that a null stays null.
            columns[name] = pd.Series([row[name] for row in rows], dtype=object)
        return pd.DataFrame(columns)


mlflow.models.set_model(LedgerModel())
