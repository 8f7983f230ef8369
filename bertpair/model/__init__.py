"""Token ids → logits: the network, its weights in and out."""
