"""The networks, as plain modules built from frozen configs, with the parameter names of the published folders."""
