"""From files to batches: images, archives, who sees what in which order, token labels."""
