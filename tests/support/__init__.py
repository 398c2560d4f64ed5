"""What several tests share: small models, random official checkpoints, a local Hub, slow references, small runs."""
