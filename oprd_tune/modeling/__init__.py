"""Working on torchtune decoders: taps, heads, layer pairs."""
