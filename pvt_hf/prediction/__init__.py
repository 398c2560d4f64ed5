"""What a model finds in images, and pictures of it: what `pvt-hf predict`, exports and the demo share."""
