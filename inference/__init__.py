"""What a trained model is asked: early exit over a stream, thresholds for budgets, pictures."""
