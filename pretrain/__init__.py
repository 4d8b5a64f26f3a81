"""Self-supervised pretraining with CorInfoMax, and the evaluation of the encoder."""
