"""What every program needs to write: files that appear when they are complete, text of others made harmless."""
