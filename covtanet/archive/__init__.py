"""From the objects of an archive to the bytes of a series: listing, series manifest, upload."""
