"""Checkpoints of the official code, timm, mmdetection and mmsegmentation to safetensors, and back."""
