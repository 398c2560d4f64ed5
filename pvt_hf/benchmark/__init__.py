"""How fast the models are, and how much memory they take, beside their peers: what `pvt-hf benchmark` measures."""
