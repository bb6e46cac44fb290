"""Pictures and tables from a ledger or an evaluation; no model."""
