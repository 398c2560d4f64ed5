"""What is measured, and pictures of it."""
