"""Point-to-point transfers of activations and gradients between the ranks of one pipeline."""
