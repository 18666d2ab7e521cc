"""From text to trained weights: corpus, tokenizer, recipes, trainer. Importing this package loads no library."""
