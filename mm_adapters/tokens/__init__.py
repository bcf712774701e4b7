"""What each position of each tower is: class, patch, word, image, padding."""
