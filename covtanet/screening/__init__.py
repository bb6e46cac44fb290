"""From an archive to a ledger: stages, predictor, pipeline and the ledger's schema."""
