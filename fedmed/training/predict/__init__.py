"""What a kept network says of images: probabilities, heat maps and masks, drawn on the images as they were given."""
