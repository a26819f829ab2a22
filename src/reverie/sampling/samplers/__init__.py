"""One file a sampler. `reverie.sampling.registry.load_all` imports them."""
