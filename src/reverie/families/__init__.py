"""Families of models: one folder each, which knows how to recognise, configure and build its members."""
