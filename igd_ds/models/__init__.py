"""Backbones: how each kind of model is built, loaded and asked for the logits of labelled positions."""
