"""The commands: each parses its arguments, calls the library and returns an exit code.

``covtanet NAME``, ``python -m covtanet NAME`` and ``python jobs/NAME.py`` are the same.
"""
