"""What `bench/peers.py` is made of: the programs, where they are installed, what is measured and how it is told."""
