"""Limits of a volume's size, for every format."""

# 2048 slices of 512 x 512. The decoder's memory (decode_memory_mib) holds such a volume twice, as
# stored and in HU or in HU and with two masks, if a voxel has 16 bits; of wider voxels it holds as
# many fewer.
MAX_VOXELS = 1 << 29
MAX_BYTES = 2 * MAX_VOXELS
MAX_SLICES = 4096
MIN_SLICES = 8
