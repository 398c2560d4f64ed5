"""The papers' recipes as `Trainer`s."""
