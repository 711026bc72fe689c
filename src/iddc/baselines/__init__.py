"""Methods to compare with: each gives a Segmenter fitted on the same embeddings as IDDC."""
