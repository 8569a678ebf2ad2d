"""Applications of distilled models: text to image, editing, in-painting and style transfer."""
