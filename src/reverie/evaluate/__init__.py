"""How good pictures are: distances between sets of pictures, and what is on them against what was asked for."""
