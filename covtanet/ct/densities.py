"""HU that tell tissue, lung and air apart in a chest."""

BODY_HU = -300
AIR_HU = -1000
AERATED_HU = -400
# Soft tissue, which is flat if an image was made without noise.
TISSUE_HU = (1, 300)
# Half the voxels of severe emphysema lie below -950. Room air was measured at -1000 to -930, and so
# was foam of tables and cushions: between these limits only the position tells air from lung.
SURELY_AIR_HU = -970
SURELY_DENSE_HU = -880
