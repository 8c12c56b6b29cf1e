"""What a run leaves behind: checkpoint files, the folder they lie in, and the run that writes them."""
