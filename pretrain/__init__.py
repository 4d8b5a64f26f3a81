"""Self-supervised pretraining with CorInfoMax, and the evaluation of what was learned."""
