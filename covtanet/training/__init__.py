"""The paper's two phases: steps and epochs, the loop around them, their distribution on Ray."""
