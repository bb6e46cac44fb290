"""The cores of this machine that this process may use."""

from joblib import cpu_count


def num_cores() -> int:
    """Return the cores that this process may use: by its affinity and by the quota of its cgroup.

    A container with a quota of 8 CPUs on a machine of 64 cores sees 64 of them and may use 8.
    """
    return int(cpu_count())
