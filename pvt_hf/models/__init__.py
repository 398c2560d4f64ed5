"""The models, and all that ships with a checkpoint: flat, because that is what `save_pretrained` can publish."""
