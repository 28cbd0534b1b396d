"""From a manifest and its image files to tensors; and phantom hospitals to try it on."""
