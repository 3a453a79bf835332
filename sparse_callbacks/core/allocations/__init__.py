"""Rules by which layers share a target sparsity: by their shapes, their weights, or the whole model."""
