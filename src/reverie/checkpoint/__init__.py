"""Files on disk: what they hold is decided by their header, before a weight is read; nothing is ever executed."""
