"""The room that knows DeepSpeed: its configuration file, the engine, an optimizer step,
checkpoints, export.

No other room imports deepspeed.
"""
