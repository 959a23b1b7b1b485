"""Activation fine-tuning (§4.2): loss, tuner, training."""
