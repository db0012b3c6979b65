"""Which images a network sees: data sets in splits, batches of them, augmentation."""
