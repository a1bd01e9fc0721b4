"""Language modelling of bytes: a causal transformer predicts every next byte of a text."""
