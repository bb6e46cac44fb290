"""Networks that the paper compares with (Tables II to IV), by a library or from their papers."""
