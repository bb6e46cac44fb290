"""The paper's two phases: what an epoch does, the loop around it, and its distribution on Ray."""
