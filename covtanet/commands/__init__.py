"""One main per command: parse, call, return the exit code."""
