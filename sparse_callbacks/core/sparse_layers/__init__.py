"""Linear layers that hold their live weights alone: products, patterns, and how places move."""
