"""What each aten operation does with the axes of its tensors."""
