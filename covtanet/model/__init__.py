"""The paper's networks and losses: torch only; no choice of device, no configuration parsing."""
