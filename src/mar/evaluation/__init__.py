"""How good pictures are: uint8 pictures in, numbers out. Streams compose; disk is optional."""
