"""What is true of tensors: the PuLID method (arXiv 2404.16022) without a host, a file or a network."""
