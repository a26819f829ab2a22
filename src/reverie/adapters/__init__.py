"""Floor 3: small files that change a model. They enter by three ports, combine freely and leave without a trace."""
