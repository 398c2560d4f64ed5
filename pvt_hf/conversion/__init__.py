"""Checkpoints of the released code, timm, mmdetection and mmsegmentation to safetensors, and back."""
