"""The networks that the paper compares with (Tables II to IV), written from their papers where no library has them."""
