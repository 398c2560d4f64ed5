"""What is trained and evaluated on: reading, augmenting, batching."""
