"""From the bytes of a series to a prepared series, in a sandboxed child process."""
