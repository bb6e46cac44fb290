from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    seed: int = 0
