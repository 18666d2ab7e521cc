"""What can go: folding a trained model into plain matrices."""
